"""A window may begin and end within a day: sums answer for the days it holds whole, and the facts for the rest."""

import random
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest

from hostler_common import db
from hostler_usage.history import report_store
from hostler_usage.history.day_sum_store import DaySums
from hostler_usage.history.measures import Window
from hostler_usage.history.report_store import ReportStore, Subjects, UsageFilter
from hostler_usage.history.rollup_store import RollupStore, days_until
from hostler_usage.reading.mapping_file import packaged
from hostler_usage.service_testing import FromFacts, rows_read

FIRST = datetime(2026, 4, 26, tzinfo=UTC)
DAY, HOUR, MOMENT = timedelta(days=1), timedelta(hours=1), timedelta(microseconds=1)
DAYS = 12
PROJECTS = (None, "", "p", "p1", "p2", "p3", "ä", "new")
TYPES = {
    "instance": ({"vcpus": 2, "memory_mb": 512, "flavor": "a"}, {"vcpus": 3, "flavor": "b"}, {}),
    "volume": ({"size_gb": 10}, {"size_gb": 10**15}, {"size_gb": 0}),
    "unknown": ({"size_gb": 3}, {}),  # no measure is of it
}
COUNTERS = {
    "instance": ("bandwidth_in_bytes", "cpu_time_ns", "gone_bytes"),
    "volume": ("volume_read_bytes",),
    "unknown": ("gone_bytes",),
}


class InOneStatement(ReportStore):
    """The same questions, answered by all sums and facts at once, whatever a page has of them."""

    def _day_sums(self, *_: object, **__: object) -> DaySums | None:
        return None

    async def _narrowed(self, *_: object, **__: object) -> AsyncGenerator[None]:
        yield None


def moment(chance: random.Random, first: int = 0, last: int = DAYS) -> datetime:
    """Some are midnights, or a microsecond beside one."""
    found = FIRST + timedelta(days=chance.randrange(first, last))
    if chance.random() < 0.4:
        return found + chance.choice((-MOMENT, timedelta(0), timedelta(0), MOMENT))
    return found + timedelta(microseconds=chance.randrange(86_400_000_000))


async def filled(pool: db.Pool, chance: random.Random, resources: int) -> None:
    """A ledger of some resources: lives that end or go on, owners that change, what moved meanwhile or not."""
    held: list[tuple[Any, ...]] = []
    moved: list[tuple[Any, ...]] = []
    for number in range(resources):
        kind = chance.choice(tuple(TYPES))
        name = (chance.choice(("r1", "r1", "r2")), kind, f"{kind}-{number}")
        edges = sorted({moment(chance) for _ in range(chance.randrange(2, 7))})
        is_new = chance.random() < 0.2
        for start, end in zip(edges, [*edges[1:], None], strict=True):
            if end is None and chance.random() < 0.5:
                break
            project = "new" if is_new else chance.choice(PROJECTS)
            if is_new and (end is not None and end < FIRST + (DAYS - 2) * DAY):
                continue  # nothing is of the project until the last days
            attributes = chance.choice(TYPES[kind])
            said = (f"u{number % 3}", chance.choice(("active", "stopped")))
            held.append((*name, start, end, project, *said, attributes, [], [], "events"))
        for at in {moment(chance) for _ in range(chance.choice((0, 0, 8)))}:
            project = "new" if is_new else chance.choice(PROJECTS)
            amount = chance.choice((0, 7, 10**18))
            moved.append((*name, chance.choice(COUNTERS[kind]), "l", at, amount, project, []))
    async with db.transaction(pool) as connection:
        await connection.executemany(
            "INSERT INTO usage_interval VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)",
            held,
        )
        await connection.executemany(
            "INSERT INTO usage_amount VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)", moved
        )
    async with db.connection(pool) as connection:
        await connection.execute("ANALYZE")


GROUPS: tuple[list[str], ...] = (
    *(["project", "day"], ["day", "project"], ["project"], ["day"], ["project", "month"]) * 4,
    *(["project", "type", "day"], ["type", "day", "region", "project"], ["month", "region"], []),
    *(["project", "region"], ["hour"], ["project", "hour"], ["project", "state_class"]),
    *(["project", "day", "flavor"], ["user"], ["project", "resource", "label"]),
)


def condition(chance: random.Random) -> UsageFilter:
    return UsageFilter(
        scope=chance.choice((None, None, None, frozenset({"p1", "p3", "ä", "no such", ""}))),
        project_id=chance.choice((None, None, None, "p1")),
        region=chance.choice((None, None, "r2")),
        resource_type=chance.choice((None, None, "volume", "instance", "unknown")),
        subjects=chance.choice((None, None, None, Subjects(projects=frozenset({"p", "new"})))),
    )


@pytest.mark.parametrize("seed", range(6))
async def test_pages_of_any_window_are_those_of_the_facts(
    pool: db.Pool, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Page by page, while the window's end moves on with the clock."""
    chance = random.Random(seed)
    await filled(pool, chance, chance.choice((4, 60)))
    # the turn of days may be late
    until = FIRST + timedelta(days=chance.choice((DAYS - 1, DAYS, 7)), hours=1)
    await RollupStore(pool=pool, mapping=packaged()).advance(until)
    summed = ReportStore(pool=pool, mapping=packaged())
    at_once = InOneStatement(pool=pool, mapping=packaged())
    facts = FromFacts(pool=pool, mapping=packaged())
    beside = []  # how many spans were read beside the sums of days
    page = DaySums.page

    async def counted(self: DaySums, *arguments: Any) -> Any:
        beside.append(len(self.rest))
        return await page(self, *arguments)

    monkeypatch.setattr(DaySums, "page", counted)
    for _ in range(60):
        monkeypatch.setattr(report_store, "_PROJECTS_AT_ONCE", chance.choice((1, 4)))
        start, end = sorted((moment(chance), moment(chance, 4, DAYS + 2)))
        now = moment(chance, 8, DAYS + 1)
        groups, where = chance.choice(GROUPS), condition(chance)
        zone = chance.choice(("UTC", "UTC", "UTC", "Asia/Kathmandu", "America/St_Johns"))
        limit, marker = chance.choice((1, 3, 20, 1000)), None
        for _ in range(40):
            window = Window(start=start, end=end, as_of=now)
            asked: dict[str, Any] = {"limit": limit, "marker": marker, "time_zone": zone}
            said, following = await summed.usage(window, groups, where, **asked)
            right, then = await at_once.usage(window, groups, where, **asked)
            assert said == right, (window, groups, where, asked)
            if len(right) < limit or following is not None:
                assert (
                    following == then
                )  # one knows that a full page is the last, and one does not
            marker, now = following, now + timedelta(minutes=chance.randrange(300))
            if marker is None:
                break
        window = Window(start=start, end=end, as_of=now)
        whole = [
            [
                (row.group, row.amounts)
                async for batch in each.all_usage(window, groups, where)
                for row in batch
                if row.amounts  # sums do not know of days on which nothing was used
            ]
            for each in (summed, facts)
        ]
        assert whole[0] == whole[1], (window, groups, where)
    assert sum(map(bool, beside)) > 10


@pytest.mark.parametrize("seed", range(4))
async def test_slices_of_any_window_are_those_of_the_facts(pool: db.Pool, seed: int) -> None:
    chance = random.Random(100 + seed)
    await filled(pool, chance, 40)
    await RollupStore(pool=pool, mapping=packaged()).advance(FIRST + DAYS * DAY)
    summed = ReportStore(pool=pool, mapping=packaged())
    facts = FromFacts(pool=pool, mapping=packaged())
    some = 0
    for _ in range(40):
        edges = sorted({moment(chance) for _ in range(chance.choice((2, 3, 6)))})
        if chance.random() < 0.4:  # by days, of which the first and the last are cut
            first, last = edges[0], edges[-1]
            days = [FIRST + day * DAY for day in range(DAYS)]
            edges = [first, *(day for day in days if first < day < last), last]
        if len(edges) < 2:
            continue
        now = moment(chance, 6, DAYS + 1)
        groups = chance.choice((["project"], ["project", "type"], ["region"], [], ["flavor"]))
        leading, where = chance.choice((0, len(groups[:1]))), condition(chance)
        answers = []
        for each in (summed, facts):
            found: dict[object, Counter[str]] = defaultdict(Counter)
            order = []
            async for rows in each.usage_by_slice(
                edges, groups, where, as_of=now, leading=leading
            ):
                for row in rows:
                    first_of = [row.group[name] or "" for name in groups[:leading]]
                    order.append((*first_of, row.slice))
                    found[row.slice, tuple(row.group.values())].update(row.amounts)
            assert order == sorted(order)
            answers.append(found)
        assert answers[0] == answers[1], (edges, groups, leading, where)
        some += bool(answers[0])
    assert some > 10


async def test_a_project_without_a_name_is_not_those_that_are_not_known(pool: db.Pool) -> None:
    """A caller who may see "", which tokens can say, is shown nothing by the sums that call the unknown so."""
    await filled(pool, random.Random(1), 60)
    await RollupStore(pool=pool, mapping=packaged()).advance(FIRST + DAYS * DAY)
    reports = ReportStore(pool=pool, mapping=packaged())
    for where in (UsageFilter(scope=frozenset({""})), UsageFilter(project_id="")):
        for end in (FIRST + 9 * DAY, FIRST + 9 * DAY + HOUR):
            window = Window(start=FIRST, end=end, as_of=FIRST + 40 * DAY)
            assert await reports.usage(window, ["project"], where, limit=100) == ([], None)
            ((row,), _) = await reports.usage(window, [], where, limit=100)
            assert row.amounts == {}


@pytest.mark.parametrize("day", [3, 57])
async def test_a_page_reads_the_facts_of_its_projects_in_the_broken_day_alone(
    pool: db.Pool, database_url: str, day: int
) -> None:
    """Whether years came before the day or after it."""
    days, projects = 60, 400
    async with db.connection(pool) as connection:
        await connection.execute(
            "INSERT INTO usage_interval SELECT 'r1', 'volume', 'v' || p || '-' || d, $1::timestamptz"
            " + make_interval(days => d), $1::timestamptz + make_interval(days => d, hours => 20),"
            " 'p' || lpad(p::text, 3, '0'), NULL, 'available', '{\"size_gb\": 1}', '[]', '[]', 'events'"
            " FROM generate_series(1, $2::integer) AS p, generate_series(0, $3::integer - 1) AS d",
            FIRST,
            projects,
            days,
        )
    await RollupStore(pool=pool, mapping=packaged()).advance(FIRST + days * DAY)
    async with db.connection(pool) as connection:
        await connection.execute("ANALYZE")
    window = Window(
        start=FIRST + (day - 2) * DAY,
        end=FIRST + day * DAY + 12 * HOUR,
        as_of=FIRST + days * DAY,
    )
    async with db.open_pool(database_url, schema="usage", max_size=1) as quiet:
        reports = ReportStore(pool=quiet, mapping=packaged())
        marker: str | None = None
        for number in range(8):  # more often than a statement is planned anew
            before = await rows_read(quiet, "usage_interval")
            page, marker = await reports.usage(
                window, ["project", "day"], UsageFilter(), limit=30, marker=marker
            )
            assert len(page) == 30
            # eleven projects have a page's rows, and twice as many are known of in case they have none; each
            # is found by a read, and has an interval in the day
            assert await rows_read(quiet, "usage_interval") - before <= 2 * (12 + 22), number


async def test_what_the_sums_and_the_facts_say_is_of_one_moment(
    pool: db.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fold between the two is in both or in none."""
    await filled(pool, random.Random(3), 40)
    await RollupStore(pool=pool, mapping=packaged()).advance(FIRST + DAYS * DAY)
    window = Window(start=FIRST + HOUR, end=FIRST + 9 * DAY + HOUR, as_of=FIRST + 40 * DAY)
    reports = ReportStore(pool=pool, mapping=packaged())
    before, _ = await reports.usage(window, ["project"], UsageFilter(), limit=100)

    async def then_gone(connection: db.Connection) -> date | None:
        until = await days_until(connection)
        await pool.execute("DELETE FROM usage_day")
        await pool.execute("DELETE FROM usage_interval")
        return until

    monkeypatch.setattr(report_store, "days_until", then_gone)
    assert before
    assert (await reports.usage(window, ["project"], UsageFilter(), limit=100))[0] == before
