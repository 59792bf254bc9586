"""However many slices a question has, the ledger is read once, and the answers are those of asking slice by slice."""

import random
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from fractions import Fraction
from itertools import pairwise
from typing import Any, cast
from unittest import mock

import asyncpg

from hostler_common import db
from hostler_usage.exporting.export_store import ExportStore
from hostler_usage.exporting.exports import focus_charges
from hostler_usage.exporting.focus_pricing import Pricing
from hostler_usage.history.groups_testing import ALL, KINDS, MAY, PROJECTS, memberships
from hostler_usage.history.ledger_testing import Ledger
from hostler_usage.history.measures import Window
from hostler_usage.history.report_store import ReportStore, UsageFilter
from hostler_usage.history.rollup_store import RollupStore
from hostler_usage.money.budget import Budget, Membership, budget
from hostler_usage.money.costing import Costing, Question, Wanted
from hostler_usage.money.price_book import price_book
from hostler_usage.money.price_store import PriceStore
from hostler_usage.money.rating import Slice, UsageLine
from hostler_usage.reading.mapping_file import packaged

DAY, HOUR = timedelta(days=1), timedelta(hours=1)
FLAT = {
    "currency": "EUR",
    "free": ["vcpu_hours"],
    "prices": [
        {
            "name": "large",
            "measure": "instance_hours",
            "match": {"flavor": "m1.large"},
            "price": "0.08",
            "until": "2026-05-06T11:30:00Z",
            "state_class_factors": {"stopped": "0.5"},
        },
        {"name": "other", "measure": "instance_hours", "price": "0.02"},
        {"name": "out", "measure": "bandwidth_out_bytes", "price": 1, "per": 1000},
    ],
    "discounts": [{"name": "d", "percent": 10, "match": {"project": "p1"}}],
}
SUMMED = {
    "currency": "EUR",
    "prices": [
        {"name": "v", "measure": "vcpu_hours", "price": "0.1", "until": "2026-05-07T01:00:00Z"},
        {"name": "v", "measure": "vcpu_hours", "price": "0.2", "from": "2026-05-07T01:00:00Z"},
        {"name": "m", "measure": "ram_mb_hours", "price": "0.001"},
    ],
}
TIERED = {
    "currency": "EUR",
    "time_zone": "Asia/Kathmandu",
    "prices": [
        {
            "name": "h",
            "measure": "instance_hours",
            "tiers": {
                "scope": ["project"],
                "period": "day",
                "steps": [{"up_to": 30, "price": 1}, {"price": "0.1"}],
            },
        }
    ],
}
ROUNDED = {
    "currency": "EUR",
    "prices": [
        {
            "name": "h",
            "measure": "vcpu_hours",
            "price": 1,
            "rounding": {"to": "hour", "period": "day", "minimum_seconds": 7200},
        }
    ],
}
BOOKS: dict[str, dict[str, Any]] = {
    "flat": FLAT,
    "summed": SUMMED,
    "tiered": TIERED,
    "rounded": ROUNDED,
}


class SliceBySlice(Costing):
    """The same costs from one question for each slice, and pages of few groups."""

    async def lines(
        self,
        spans: Sequence[Slice],
        dimensions: Iterable[str],
        where: UsageFilter,
        as_of: datetime,
        *,
        are_together: bool,
    ) -> AsyncGenerator[Sequence[UsageLine]]:
        del are_together
        found: list[UsageLine] = []
        names = {name: "type" if name == "resource_type" else name for name in sorted(dimensions)}
        for span in spans:
            if span.start >= as_of:
                break
            window = Window(start=span.start, end=span.end, as_of=as_of)
            marker = None
            while True:
                rows, marker = await self.reports.usage(
                    window, list(names.values()), where, limit=50, marker=marker
                )
                found += [
                    UsageLine(
                        group={name: row.group[known] for name, known in names.items()},
                        measure=measure,
                        amount=amount,
                        start=span.start,
                        end=span.end,
                    )
                    for row in rows
                    for measure, amount in row.amounts.items()
                ]
                if marker is None:
                    break
        yield found


async def prepared(pool: db.Pool, chance: random.Random) -> tuple[Costing, list[Membership]]:
    """A ledger with memberships and books."""
    ledger = Ledger(pool)
    await ledger.told(ALL)
    prices = PriceStore(pool=pool)
    found = memberships(chance)
    for kind in KINDS:
        for project in PROJECTS:
            own = [one for one in found if (one.kind, one.project) == (kind, project)]
            await prices.put_memberships(kind, project, own)
    for name, document in BOOKS.items():
        await prices.put_book(name, document, by="test", replaces=None)
    return Costing(reports=ledger.reports, prices=prices), found


def question(chance: random.Random, kinds: Sequence[str]) -> Question:
    start = MAY + timedelta(minutes=chance.randrange(3 * 24 * 60))
    if chance.random() < 0.5:
        start = MAY + chance.randrange(3) * DAY
    return Question(
        start=start,
        end=start + chance.choice((HOUR, 30 * HOUR, 4 * DAY, 9 * DAY + HOUR)),
        as_of=MAY + chance.choice((4 * DAY + 7 * HOUR, 40 * DAY)),
        group_by=tuple(
            chance.choice(
                (
                    ["project", "day"],
                    ["day"],
                    [],
                    ["resource_type", "month"],
                    ["flavor", "state_class"],
                    *([f"group:{kind}", "day"] for kind in kinds),
                )
            )
        ),
        time_zone=chance.choice(("UTC", "Asia/Kathmandu")),
        scope=chance.choice((None, frozenset({"p0", "p3"}))),
        project_id=chance.choice((None, None, "p1")),
        only=chance.choice(({}, {"resource_type": "instance"}, {"region": "r2"})),
    )


async def test_costs_are_those_of_one_question_for_each_slice(pool: db.Pool) -> None:
    chance = random.Random(4)
    costing, _ = await prepared(pool, chance)
    old = SliceBySlice(reports=costing.reports, prices=costing.prices)
    books = {name: price_book(document) for name, document in BOOKS.items()}
    some = 0
    for number in range(40):
        if number == 20:  # from here on whole days have their sums
            await RollupStore(pool=pool, mapping=packaged()).advance(MAY + 6 * DAY + HOUR)
        asked = question(chance, KINDS)
        names = chance.choice((["flat"], ["summed"], ["tiered"], ["rounded"], ["flat", "summed"]))
        answers = [
            await each.costs(asked, [books[name] for name in names]) for each in (costing, old)
        ]
        assert answers[0] == answers[1], (asked, names)
        assert list(answers[0].rows) == list(answers[1].rows)
        some += bool(answers[0].totals[0].cost)
    assert some > 15  # most of the questions had an answer


def budgets(kinds: Sequence[str]) -> list[Budget]:
    subjects: list[dict[str, Any]] = [{"projects": ["p1"]}, {"projects": ["p0", "p3"]}]
    subjects += [
        {"group": {"kind": kind, "name": name}} for kind in kinds for name in ("research", "sales")
    ]
    limits: list[dict[str, Any]] = [{"amount": 10, "measure": "vcpu_hours"}]
    limits += [{"amount": 10, "price_book": name} for name in BOOKS]
    return [
        budget(
            f"{n}-{m}",
            {"subject": subject, "limit": limit, "period": {"from": first, "until": "2026-05-09"}},
        )
        for n, subject in enumerate(subjects)
        for m, limit in enumerate(limits)
        for first in ("2026-05-04", "2026-05-06")
    ]


def counts(of: Budget, line: UsageLine, known: Sequence[Membership]) -> bool:
    """Whether a line of one project, in which no membership begins or ends, counts in the budget."""
    subject, project = of.subject, line.group["project"]
    if subject.group is None:
        return project in subject.projects
    return any(
        (one.kind, one.group, one.project) == (subject.group_kind, subject.group, project)
        and one.start <= line.start
        and (one.end is None or line.end <= one.end)
        for one in known
    )


async def test_budgets_of_groups_count_what_their_projects_used_while_they_were_in_them(
    pool: db.Pool,
) -> None:
    """Against memberships looked up line by line, in usage cut at every one of their edges."""
    costing, known = await prepared(pool, random.Random(7))
    old = SliceBySlice(reports=costing.reports, prices=costing.prices)
    edges = {edge for one in known for edge in (one.start, one.end) if edge is not None}
    as_of = MAY + 4 * DAY + 9 * HOUR
    wanted = []
    for of in budgets(KINDS):
        assert of.fixed is not None
        wanted.append(Wanted(budget=of, period=of.fixed, as_of=as_of))
    some = 0
    for state, item in zip(await costing.states(wanted), wanted, strict=True):
        of, start = item.budget, item.period.start
        moments = sorted({start, as_of, *(edge for edge in edges if start < edge < as_of)})
        expected = Fraction(0)
        if of.limit.measure is not None:
            cut = [Slice(start=a, end=b) for a, b in pairwise(moments)]
            async for lines in old.lines(
                cut, ["project"], UsageFilter(), as_of, are_together=True
            ):
                expected = sum(
                    (
                        Fraction(line.amount, 3_600_000_000)
                        for line in lines
                        if line.measure == of.limit.measure and counts(of, line, known)
                    ),
                    expected,
                )
        else:
            assert of.limit.price_book is not None
            book = price_book(BOOKS[of.limit.price_book])
            group = f"group:{of.subject.group_kind}"
            found = await old.costs(
                Question(
                    start=start,
                    end=as_of,
                    as_of=as_of,
                    group_by=("project",) if of.subject.group is None else (group,),
                    time_zone="UTC",
                    scope=None,
                    project_id=None,
                    only={},
                ),
                [book],
            )
            for key, shares in found.rows.items():
                if key[0] in ({of.subject.group} if of.subject.group else of.subject.projects):
                    expected += shares[0].cost
        assert state.consumed == expected, of
        some += bool(state.consumed)
    assert some > len(wanted) / 2


# --- how often the facts are read


@dataclass(slots=True)
class Statements:
    """What was asked of a connection."""

    texts: list[str] = field(default_factory=list)

    @property
    def of_facts(self) -> list[str]:
        return [text for text in self.texts if "usage_interval" in text]


@contextmanager
def heard() -> Iterator[Statements]:
    """Every statement that is fetched from meanwhile."""
    found = Statements()
    cursor, fetch = asyncpg.Connection.cursor, asyncpg.Connection.fetch

    def noted_cursor(self: Any, query: str, *values: Any, **options: Any) -> Any:
        found.texts.append(query)
        return cursor(self, query, *values, **options)

    async def noted_fetch(self: Any, query: str, *values: Any, **options: Any) -> Any:
        found.texts.append(query)
        return await fetch(self, query, *values, **options)

    with (
        mock.patch.object(asyncpg.Connection, "cursor", noted_cursor),
        mock.patch.object(asyncpg.Connection, "fetch", noted_fetch),
    ):
        yield found


async def scans(pool: db.Pool) -> int:
    """How often the table of intervals was read from one end to the other, or by an index."""
    async with db.connection(pool) as connection:
        await connection.execute("SELECT pg_stat_force_next_flush()")
    async with db.connection(pool) as connection:
        await connection.execute("SELECT pg_stat_clear_snapshot()")
        return cast(
            "int",
            await connection.fetchval(
                "SELECT (seq_scan + coalesce(idx_scan, 0))::integer FROM pg_stat_user_tables"
                " WHERE relname = 'usage_interval' AND schemaname = 'usage'"
            ),
        )


async def filled(pool: db.Pool, resources: int) -> None:
    """So many volumes, each there for five days."""
    async with db.connection(pool) as connection:
        await connection.execute(
            "INSERT INTO usage_interval SELECT 'r1', 'volume', 'v' || n, $2::timestamptz,"
            " $2::timestamptz + '5 days'::interval, 'p' || n % 50, NULL, 'available',"
            " '{\"size_gb\": 1}', '[]', '[]', 'events' FROM generate_series(1, $1) AS n",
            resources,
            MAY,
        )
        await connection.execute("ANALYZE usage_interval")
        # workers count a scan each
        await connection.execute(
            "DO $$ BEGIN EXECUTE 'ALTER DATABASE ' || quote_ident(current_database())"
            " || ' SET max_parallel_workers_per_gather = 0'; END $$"
        )


async def test_an_export_of_20_000_groups_reads_the_facts_once(
    pool: db.Pool, database_url: str
) -> None:
    await filled(pool, 20_000)
    async with db.open_pool(database_url, schema="usage", max_size=2) as quiet:
        store = ExportStore(reports=ReportStore(pool=quiet, mapping=packaged()))
        asked = Window(start=MAY, end=MAY + 5 * DAY, as_of=MAY + 9 * DAY)
        before = await scans(quiet)
        with heard() as statements:
            async with store.snapshot() as snapshot:
                sizes = [
                    len({line.group["resource"] for line in lines})
                    async for lines in snapshot.usage(asked, ["resource"], UsageFilter())
                ]
        assert sum(sizes) == 20_000
        assert max(sizes) <= 1000
        assert len(statements.of_facts) == 1
        # one reading of what was held, none of it for what moved: nothing did
        assert await scans(quiet) - before == 1


async def test_costs_and_focus_charges_of_many_days_read_the_facts_once(
    pool: db.Pool, database_url: str
) -> None:
    await filled(pool, 500)
    documents: list[dict[str, Any]] = [FLAT, TIERED, ROUNDED]
    async with db.open_pool(database_url, schema="usage", max_size=2) as quiet:
        reports = ReportStore(pool=quiet, mapping=packaged())
        costing = Costing(reports=reports, prices=PriceStore(pool=quiet))
        store = ExportStore(reports=reports)
        window = Window(start=MAY, end=MAY + 31 * DAY, as_of=MAY + 40 * DAY)
        asked = Question(
            start=window.start,
            end=window.end,
            as_of=window.as_of,
            group_by=("project", "day"),
            time_zone="UTC",
            scope=None,
            project_id=None,
            only={},
        )
        for document in documents:
            book = price_book(document)
            with heard() as statements:
                await costing.costs(asked, [book])
            assert len(statements.of_facts) == 1
            pricing = Pricing(book=book, measures=store.measures)
            days = set()
            with heard() as statements:
                async with store.snapshot() as snapshot:
                    async for charges in focus_charges(
                        snapshot, window, UsageFilter(), pricing, "EUR"
                    ):
                        days |= {charge.start for charge in charges}
            assert len(statements.of_facts) == 1
            assert len(days) >= 5


async def test_what_accumulates_is_rated_some_projects_at_a_time(
    pool: db.Pool, database_url: str
) -> None:
    """All lines of a project are in one batch, and no batch is as long as the answer."""
    await filled(pool, 20_000)
    async with db.open_pool(database_url, schema="usage", max_size=2) as quiet:
        costing = Costing(
            reports=ReportStore(pool=quiet, mapping=packaged()), prices=PriceStore(pool=quiet)
        )
        spans = [Slice(start=MAY + n * DAY, end=MAY + (n + 1) * DAY) for n in range(5)]
        sizes: list[int] = []
        seen: set[str | None] = set()
        async for lines in costing.lines(
            spans, ["project", "resource"], UsageFilter(), MAY + 9 * DAY, are_together=True
        ):
            projects = {line.group["project"] for line in lines}
            assert seen.isdisjoint(projects)
            seen |= projects
            sizes.append(len(lines))
        assert len(seen) == 50
        assert sum(sizes) == 20_000 * 5 * 2  # two measures
        assert max(sizes) <= 2 * (20_000 * 5 * 2) / 50 + 4000
