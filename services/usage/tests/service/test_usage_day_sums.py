"""What sums of whole days answer alone: every group once and in order, and no more read than a page asks for."""

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from typing import Any, NamedTuple

import pytest

from hostler_common import db
from hostler_usage.api import Usage, usage_document, usage_items
from hostler_usage.history import day_sum_store, report_store
from hostler_usage.history.day_sum_store import DaySums
from hostler_usage.history.measures import Window
from hostler_usage.history.paging import BadMarker, marker_after
from hostler_usage.history.report_store import ReportStore, UsageFilter
from hostler_usage.history.rollup_store import days_until
from hostler_usage.history.usage_row import UsageRow
from hostler_usage.reading.mapping_file import packaged
from hostler_usage.service_testing import rows_read

FIRST = date(2026, 4, 27)
MEASURES = {
    "instance": ("instance_hours", "vcpu_hours", "ram_mb_hours", "bandwidth_in_bytes"),
    "volume": ("volume_hours", "volume_gb_hours"),
    "image": ("image_byte_hours",),
}
KNOWN = {(item.resource_type, item.name) for item in packaged().measures}


class Sum(NamedTuple):
    """A row of `usage_day`."""

    day: date
    region: str
    project: str
    type: str
    measure: str
    amount: int


async def filled(pool: db.Pool, sums: Iterable[Sum]) -> None:
    """These are the sums, and those of all days there are."""
    async with db.transaction(pool) as connection:
        await connection.copy_records_to_table("usage_day", schema_name="usage", records=sums)
        await connection.execute("INSERT INTO rollup_state (until) VALUES ('2026-06-01')")
    async with db.connection(pool) as connection:
        await connection.execute("ANALYZE usage_day")


def some(chance: random.Random) -> list[Sum]:
    """Sums of ten days: of projects with much and with nothing, of none, of measures that are no more."""
    found = {}
    for number in range(chance.choice((3, 40))):
        project = "" if number == 0 else f"p{chance.randrange(100):02}"
        for _ in range(chance.choice((1, 5, 60))):
            kind = chance.choice(tuple(MEASURES))
            row = Sum(
                day=FIRST + timedelta(days=chance.randrange(10)),
                region=chance.choice(("r1", "r1", "r2")),
                project=project,
                type=kind,
                measure=chance.choice((*MEASURES[kind], "gone_hours", "instance_hours")),
                # some come down to nothing together, some are beyond what 64 bits hold
                amount=chance.choice((0, 5, -5, chance.randrange(10**12), 10**22)),
            )
            found[row[:-1]] = row
    return list(found.values())


def spelled(row: Sum, group: str) -> str:
    match group:
        case "day":
            return f"{row.day}T00:00:00"
        case "month":
            return f"{row.day.replace(day=1)}T00:00:00"
        case _:
            return str(getattr(row, group))


def expected(rows: Iterable[Sum], groups: Sequence[str]) -> list[tuple[tuple[str, ...], object]]:
    """The answer, put together one sum after the other."""
    found: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    if not groups:
        found[()] = Counter()
    for row in rows:
        if row.amount:
            group = found[tuple(spelled(row, name) for name in groups)]
            if (row.type, row.measure) in KNOWN:
                group[row.measure] += row.amount
    return [
        (key, {name: amount for name, amount in found[key].items() if amount})
        for key in sorted(found)
    ]


GROUPS: tuple[list[str], ...] = (
    ["project", "day"],
    ["day", "project"],
    ["project", "type", "day"],
    ["type", "day", "region", "project"],
    ["project"],
    ["day"],
    ["project", "month"],
    ["month", "region"],
    ["region", "type"],
    [],
)


@pytest.mark.parametrize("seed", range(6))
async def test_pages_of_any_size_hold_every_group_once_and_in_order(
    pool: db.Pool, seed: int
) -> None:
    chance = random.Random(seed)
    sums = some(chance)
    await filled(pool, sums)
    reports = ReportStore(pool=pool, mapping=packaged())
    answered = 0
    for _ in range(40):
        first, groups = FIRST + timedelta(days=chance.randrange(9)), chance.choice(GROUPS)
        last = first + timedelta(days=chance.choice((1, 3, 20)))
        window = Window(
            start=datetime(first.year, first.month, first.day, tzinfo=UTC),
            end=datetime(last.year, last.month, last.day, tzinfo=UTC),
            as_of=datetime(2026, 7, 1, tzinfo=UTC),
        )
        where = UsageFilter(
            scope=chance.choice((None, None, frozenset({"p01", "p07", "p23", "p80", "no such"}))),
            region=chance.choice((None, None, "r2")),
            resource_type=chance.choice((None, None, "volume")),
        )
        right = expected(
            (
                row
                for row in sums
                if first <= row.day < last
                and (where.scope is None or row.project in where.scope)
                and where.region in (None, row.region)
                and where.resource_type in (None, row.type)
            ),
            groups,
        )
        limit, marker = chance.choice((1, 2, 7, 50, 20_000)), None
        rows: list[UsageRow] = []
        while True:
            page, marker = await reports.usage(window, groups, where, limit=limit, marker=marker)
            assert 0 < len(page) <= limit or not right
            rows += page
            if marker is None:
                break
            assert len(page) == limit
        said = [(tuple(value or "" for value in row.group.values()), row.amounts) for row in rows]
        assert said == right, (groups, where, limit)
        assert all(list(row.group) == groups and row.resources is None for row in rows)
        whole = [row async for batch in reports.all_usage(window, groups, where) for row in batch]
        assert whole == rows
        answered += bool(right)
    assert answered > 10


@pytest.mark.parametrize("leading", [0, 1])
async def test_slices_of_whole_days_are_the_usage_between_their_edges(
    pool: db.Pool, leading: int
) -> None:
    chance = random.Random(leading)
    sums = some(chance)
    await filled(pool, sums)
    reports = ReportStore(pool=pool, mapping=packaged())
    answered = 0
    for _ in range(20):
        cuts = sorted(chance.sample(range(-2, 14), chance.choice((2, 3, 8))))
        if chance.random() < 0.3:
            cuts = list(range(cuts[0], cuts[-1] + 1))  # every slice is a day
        days = [FIRST + timedelta(days=cut) for cut in cuts]
        groups = chance.choice((["project"], ["project", "type"], ["region"]))
        found = [
            (row.slice, row.group, row.amounts)
            async for batch in reports.usage_by_slice(
                [datetime(day.year, day.month, day.day, tzinfo=UTC) for day in days],
                groups,
                UsageFilter(),
                as_of=datetime(2026, 7, 1, tzinfo=UTC),
                leading=leading,
            )
            for row in batch
        ]
        right = [
            (number, dict(zip(groups, (part or None for part in key), strict=True)), amounts)
            for number, (first, last) in enumerate(pairwise(days))
            for key, amounts in expected((row for row in sums if first <= row.day < last), groups)
            if amounts
        ]
        if leading:
            right.sort(key=lambda row: row[1][groups[0]] or "")
        assert found == right, (days, groups)
        answered += bool(right)
    assert answered > 10


@pytest.mark.parametrize("groups", [["project", "day"], ["day", "project"], ["project"]])
async def test_a_page_reads_its_own_rows_and_neither_other_projects_nor_other_years(
    pool: db.Pool, database_url: str, groups: list[str]
) -> None:
    days, projects = 60, 2000
    await filled(
        pool,
        (
            Sum(FIRST - timedelta(days=day), "r1", f"p{project:04}", "volume", "volume_hours", 1)
            for day in range(days)
            for project in range(projects)
        ),
    )
    window = Window(
        start=datetime(2026, 4, 1, tzinfo=UTC),
        end=datetime(2026, 4, 11, tzinfo=UTC),
        as_of=datetime(2026, 7, 1, tzinfo=UTC),
    )
    async with db.open_pool(database_url, schema="usage", max_size=1) as quiet:
        reports = ReportStore(pool=quiet, mapping=packaged())
        marker: str | None = None
        for number in range(8):  # more often than a statement is planned anew
            before = await rows_read(quiet, "usage_day")
            page, marker = await reports.usage(
                window, groups, UsageFilter(), limit=20, marker=marker
            )
            assert len(page) == 20
            sums = 20 * (1 if "day" in groups else 10)
            # two pages' worth, two reads to find each project, and of a day that was begun all of it
            bound = 2 * sums + 2 * 25 + (2 * projects if groups[0] == "day" else 0)
            assert await rows_read(quiet, "usage_day") - before <= bound, number


TEN_DAYS = Window(
    start=datetime(2026, 4, 27, tzinfo=UTC),
    end=datetime(2026, 5, 7, tzinfo=UTC),
    as_of=datetime(2026, 7, 1, tzinfo=UTC),
)


async def test_a_page_is_as_of_one_moment(pool: db.Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    await filled(pool, [Sum(FIRST, "r1", "p", "volume", "volume_hours", 1)])

    async def then_changed(connection: db.Connection) -> date | None:
        until = await days_until(connection)
        await pool.execute("UPDATE usage_day SET amount = 2")
        return until

    monkeypatch.setattr(report_store, "days_until", then_changed)
    reports = ReportStore(pool=pool, mapping=packaged())
    for amount in (1, 2):
        (row,), _ = await reports.usage(TEN_DAYS, ["project"], UsageFilter(), limit=9)
        assert row.amounts == {"volume_hours": amount}


async def test_sums_that_cannot_be_read_are_not_hidden_by_the_reading_of_the_next(
    pool: db.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    days = [FIRST + timedelta(days=day) for day in range(10)]
    await filled(pool, [Sum(day, "r1", "p", "volume", "volume_hours", 1) for day in days])

    def unreadable(*_: object) -> object:
        raise ValueError("it is unreadable")

    monkeypatch.setattr(DaySums, "_read", unreadable)
    reports = ReportStore(pool=pool, mapping=packaged())
    with pytest.raises(ValueError, match="it is unreadable"):
        await reports.usage(TEN_DAYS, ["day"], UsageFilter(), limit=9)


@pytest.mark.parametrize("groups", [["project", "day"], ["day", "project"]])
async def test_a_page_is_shown_in_turns_while_the_database_looks_for_more_of_it(
    pool: db.Pool, monkeypatch: pytest.MonkeyPatch, groups: list[str]
) -> None:
    projects, days, rows_a_turn = 40, 10, 15
    await filled(
        pool,
        (
            Sum(FIRST + timedelta(days=day), "r1", f"p{n:02}", "volume", "volume_hours", 1 + n)
            for day in range(days)
            for n in range(projects)
        ),
    )
    monkeypatch.setattr(day_sum_store, "_ROWS_A_TURN", rows_a_turn)
    monkeypatch.setattr(day_sum_store, "_ROWS_A_PART", 10 * days)
    events: list[str] = []
    for name in ("_of_projects", "_statement"):
        made = getattr(DaySums, name)

        def asked(self: DaySums, *arguments: Any, made: Any = made) -> Any:
            events.append("asked")
            return made(self, *arguments)

        monkeypatch.setattr(DaySums, name, asked)
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    def shown(rows: Sequence[UsageRow]) -> tuple[int, list[UsageRow]]:
        events.append("shown")
        assert len(rows) <= rows_a_turn
        return turns, list(rows)

    reports = ReportStore(pool=pool, mapping=packaged())
    beside = asyncio.create_task(others())
    try:
        found, marker = await reports.shown_usage(
            shown, TEN_DAYS, groups, UsageFilter(), limit=projects * days - 5
        )
    finally:
        beside.cancel()
    # of each part the next was asked for before its first rows were shown
    assert events[:3] == ["asked", "asked", "shown"]
    # between any two of them others had their turn
    assert all(before < after for (before, _), (after, _) in pairwise(found))
    rows = [row for _, part in found for row in part]
    assert len(rows) == projects * days - 5
    page = await reports.usage(TEN_DAYS, groups, UsageFilter(), limit=projects * days - 5)
    assert (rows, marker) == page
    assert marker is not None


@pytest.mark.parametrize("is_cancelled", [False, True])
@pytest.mark.parametrize("groups", [["project", "day"], ["day", "project"]])
async def test_a_page_that_nobody_waits_for_or_that_cannot_be_shown_gives_its_connection_back(
    pool: db.Pool, monkeypatch: pytest.MonkeyPatch, groups: list[str], is_cancelled: bool
) -> None:
    await filled(
        pool,
        (
            Sum(FIRST + timedelta(days=day), "r1", f"p{n:02}", "volume", "volume_hours", 1)
            for day in range(10)
            for n in range(40)
        ),
    )
    monkeypatch.setattr(day_sum_store, "_ROWS_A_TURN", 15)
    monkeypatch.setattr(day_sum_store, "_ROWS_A_PART", 100)
    reports = ReportStore(pool=pool, mapping=packaged())
    parts = 0

    def shown(rows: Sequence[UsageRow]) -> int:
        nonlocal parts
        parts += 1
        if parts == 2 and is_cancelled:
            asking.cancel()  # its client is gone
        elif parts == 2:
            raise ValueError("it cannot be shown")
        return len(rows)

    asking = asyncio.create_task(
        reports.shown_usage(shown, TEN_DAYS, groups, UsageFilter(), limit=400)
    )
    with pytest.raises(asyncio.CancelledError if is_cancelled else ValueError):
        await asking
    assert parts == 2
    assert pool.get_idle_size() == pool.get_size()
    rows, marker = await reports.usage(TEN_DAYS, groups, UsageFilter(), limit=400)
    assert (len(rows), marker) == (400, None)


async def test_a_marker_that_no_group_could_have_is_refused(pool: db.Pool) -> None:
    await filled(pool, [Sum(FIRST, "r1", "p", "volume", "volume_hours", 1)])
    reports = ReportStore(pool=pool, mapping=packaged())
    window = Window(
        start=datetime(2026, 4, 27, tzinfo=UTC),
        end=datetime(2026, 4, 28, tzinfo=UTC),
        as_of=datetime(2026, 7, 1, tzinfo=UTC),
    )
    for parts in (["p", "soon"], ["p"], ["p", "0000-00-00"], ["p", ""]):
        with pytest.raises(BadMarker):
            await reports.usage(
                window, ["project", "day"], UsageFilter(), limit=1, marker=marker_after(parts)
            )


def test_amounts_beyond_64_bits_are_written_exactly() -> None:
    plain = UsageRow(group={"project": "p", "day": None}, amounts={"vcpu_hours": 1}, resources=7)
    row = UsageRow(
        group={"project": "ä", "day": None},
        amounts={"image_byte_hours": 10**23 + 1, "volume_read_bytes": 2**64, "vcpu_hours": -3600},
        resources=None,
    )
    now = datetime(2026, 5, 1, 1, 2, 3, tzinfo=UTC)
    head = Usage(
        start=now,
        end=now,
        as_of=now,
        group_by=[],
        usage=[],
        next_marker=None,
        unfolded_resources=0,
    )
    parts = [usage_items(packaged(), rows) for rows in ([plain, row], [plain])]
    first, item, last = Usage.model_validate_json(usage_document(head, parts)).usage
    assert first == last
    assert (first.resources, first.unit_microseconds) == (7, {"vcpu_hours": 1})
    assert item.unit_microseconds == {"image_byte_hours": 10**23 + 1, "vcpu_hours": -3600}
    assert item.amounts == {"volume_read_bytes": 2**64}
    assert item.hours == {"image_byte_hours": 27777777777777.777778, "vcpu_hours": -0.000001}
    assert item.group == {"project": "ä", "day": None}
