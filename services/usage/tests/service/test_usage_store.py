"""The ledger itself, on a real PostgreSQL: partitions, atomic batches, folds beside ingest."""

import asyncio
import random
import uuid
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import pairwise

import pytest

from hostler_common import db, testing
from hostler_usage.history import fold_store
from hostler_usage.history.fold_store import FoldStore
from hostler_usage.history.measures import Window
from hostler_usage.history.report_store import ReportStore, UsageFilter
from hostler_usage.jobs import months
from hostler_usage.reading.envelope import open_body
from hostler_usage.reading.event import Event, Origin, Tally
from hostler_usage.reading.mapping_file import packaged
from hostler_usage.reading.normalise import Normaliser
from hostler_usage.store import Store
from hostler_usage.testing import LARGE, SMALL, InstanceLife, Message, Step

DAY = datetime(2026, 5, 8, tzinfo=UTC)
HOUR = timedelta(hours=1)
NORMALISER = Normaliser(packaged())


def life(number: int) -> InstanceLife:
    return InstanceLife(
        instance_id=f"00000000-0000-4000-8000-{number:012}",
        project_id="p1",
        steps=(
            Step(at=DAY + HOUR, action="create", flavor=SMALL),
            Step(at=DAY + 3 * HOUR, action="resize", flavor=LARGE),
            Step(at=DAY + 6 * HOUR, action="delete"),
        ),
    )


def event(message: Message) -> Event:
    body = message.body()
    notification = open_body(body)
    return Event(
        notification=notification,
        normalised=NORMALISER.read(notification, region="r1"),
        body=body,
        region="r1",
        origin=Origin("cloud", "nova", "notifications.info", "application/json", ""),
        headers={},
    )


def says_something(event: Event) -> bool:
    return any(said.statement is not None for said in event.normalised.said)


EVENTS = [event(message) for number in range(12) for message in life(number).messages()]
IMAGES = event(
    Message(
        topic="notifications",
        event_type="image.exists",
        publisher_id="image.ctl1",
        timestamp=DAY + 9 * HOUR,
        message_id="images",
        payload={
            "owner": "p1",
            "audit_period_beginning": str(DAY),
            "audit_period_ending": str(DAY + 9 * HOUR),
            "images": [
                {"id": f"image-{n}", "created_at": str(DAY), "status": "active", "size": 100 * n}
                for n in (1, 2)
            ],
        },
    )
)
COUNTED = event(
    Message(
        topic="notifications",
        event_type="l3.meter",
        publisher_id="metering.net1",
        timestamp=DAY + HOUR,
        message_id="meter",
        payload={"label_id": "label-1", "project_id": "p1", "bytes": 981124, "pkts": 1184},
    )
)


@pytest.fixture
def store(pool: db.Pool) -> Store:
    return Store(pool=pool, writer=uuid.uuid4())


@pytest.fixture
def folds(pool: db.Pool) -> FoldStore:
    return FoldStore(pool=pool, mapping=packaged())


async def fetch(pool: db.Pool, statement: str) -> list[tuple[object, ...]]:
    async with db.connection(pool) as connection:
        return [tuple(row) for row in await connection.fetch(statement)]


WRITTEN_BY_INGEST = ("raw_event", "statement_apart", "touched", "ingest_tally")
MADE = ("usage_interval", "usage_amount")
TOUCH_EVERYTHING = (
    "INSERT INTO touched (regions, resource_types, resource_ids) SELECT array_agg(region),"
    " array_agg(resource_type), array_agg(resource_id) FROM (SELECT DISTINCT region,"
    " resource_type, resource_id FROM raw_event WHERE said IS NOT NULL) AS k"
)
ALL_INTERVALS = (
    "SELECT * FROM usage_interval ORDER BY region, resource_type, resource_id, starts_at"
)
HISTORY_OF_ONE = (
    "SELECT starts_at, ends_at, attributes->>'flavor', attributes->>'state' FROM usage_interval"
    " WHERE resource_id = '00000000-0000-4000-8000-000000000000' ORDER BY starts_at"
)


async def test_a_batch_is_stored_once_whatever_is_in_it_twice(store: Store) -> None:
    assert await store.ingest([*EVENTS, *EVENTS[:5]]) == Tally(stored=len(EVENTS), duplicate=5)
    assert await store.ingest(EVENTS) == Tally(duplicate=len(EVENTS))


async def test_a_batch_that_fails_leaves_nothing_behind(store: Store, pool: db.Pool) -> None:
    """Neither messages without what they touch, nor tallies of what was rolled back."""
    bad = EVENTS[1]._replace(body=None)  # type: ignore[arg-type]  # what the table refuses
    with pytest.raises(Exception, match="null value"):
        await store.ingest([EVENTS[0], bad])
    for table in WRITTEN_BY_INGEST:
        assert await fetch(pool, f"SELECT count(*) FROM {table}") == [(0,)]


async def test_a_batch_that_fails_at_its_last_word_leaves_nothing_behind(
    store: Store, pool: db.Pool
) -> None:
    async with db.connection(pool) as connection:
        await connection.execute("ALTER TABLE ingest_tally ADD CONSTRAINT broken CHECK (false)")
    with pytest.raises(Exception, match="broken"):
        await store.ingest([*EVENTS, IMAGES])
    for table in WRITTEN_BY_INGEST:
        assert await fetch(pool, f"SELECT count(*) FROM {table}") == [(0,)]
    async with db.connection(pool) as connection:
        await connection.execute("ALTER TABLE ingest_tally DROP CONSTRAINT broken")
    assert (await store.ingest([*EVENTS, IMAGES])).stored == len(EVENTS) + 1
    for table in WRITTEN_BY_INGEST:
        ((rows,),) = await fetch(pool, f"SELECT count(*) FROM {table}")
        assert rows, table


async def test_a_message_of_many_resources_is_folded_for_each_of_them(
    store: Store, folds: FoldStore, pool: db.Pool
) -> None:
    await store.ingest([IMAGES, IMAGES])
    assert await folds.fold_some() == 2
    assert await fetch(
        pool,
        "SELECT resource_id, project_id, (attributes->>'size_bytes')::int FROM usage_interval"
        " ORDER BY resource_id",
    ) == [("image-1", "p1", 100), ("image-2", "p1", 200)]


async def test_a_fold_beside_ingest_forgets_no_message(
    store: Store, folds: FoldStore, pool: db.Pool
) -> None:
    """Writers and folders run at once, in small steps; the end is what one big fold makes of it."""
    order = list(EVENTS)
    random.Random(3).shuffle(order)
    done = asyncio.Event()

    async def write(part: Sequence[Event]) -> None:
        for first in range(0, len(part), 5):
            await store.ingest(part[first : first + 5])

    async def fold() -> None:
        while not done.is_set():
            await folds.gather(3)
            await folds.fold_some(3)

    async with asyncio.TaskGroup() as folders:
        for _ in range(2):
            folders.create_task(fold())
        async with asyncio.TaskGroup() as writers:
            for number in range(3):
                writers.create_task(write(order[number::3]))
            writers.create_task(write(order[::-1]))
        done.set()
    while await folds.fold_some():
        pass
    beside = await fetch(pool, ALL_INTERVALS)
    assert len(beside) == 12 * 3
    async with db.connection(pool) as connection:
        await connection.execute(
            f"TRUNCATE usage_interval, usage_amount, resource; {TOUCH_EVERYTHING}"
        )
    while await folds.fold_some():
        pass
    assert await fetch(pool, ALL_INTERVALS) == beside


async def test_a_message_stored_while_its_resource_is_taken_for_a_fold_is_folded_later(
    store: Store, folds: FoldStore, pool: db.Pool
) -> None:
    first, second = [event for event in EVENTS if says_something(event)][:2]
    assert first.normalised.resource == second.normalised.resource
    await store.ingest([first])
    async with db.transaction(pool) as folder:  # as fold_some, between its lock and its delete
        await folder.execute("SELECT FROM touched FOR UPDATE SKIP LOCKED")
        await store.ingest([second])  # waits for nobody
        await folder.execute("DELETE FROM touched WHERE id = (SELECT min(id) FROM touched)")
    assert await fetch(pool, "SELECT count(*) FROM touched") == [(1,)]
    assert await folds.fold_some() == 1


async def test_two_folds_that_meet_at_a_resource_queue_up_and_the_later_sees_all(
    store: Store, folds: FoldStore, pool: db.Pool
) -> None:
    """Each has a batch of its own; the second must not write what it read before the first."""
    one = [event for event in EVENTS if event.normalised.resource == EVENTS[0].normalised.resource]
    await store.ingest(one[: len(one) // 2])
    assert await folds.fold_some() == 1

    async def waiting(number: int) -> bool:
        found = await fetch(pool, "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
        return len(found) == number

    async with db.transaction(pool) as other:
        await other.execute("SELECT FROM resource FOR UPDATE")
        tasks = []
        for number, part in enumerate((one[len(one) // 2 : -2], one[-2:]), start=1):
            await store.ingest(part)
            tasks.append(asyncio.create_task(folds.fold_some()))
            await testing.eventually(partial(waiting, number))
    assert [await task for task in tasks] == [1, 1]
    in_turn = await fetch(pool, ALL_INTERVALS)
    async with db.connection(pool) as connection:
        await connection.execute(TOUCH_EVERYTHING)
    await folds.fold_some()
    assert await fetch(pool, ALL_INTERVALS) == in_turn
    assert len(in_turn) == 3


async def test_a_fold_that_finds_nothing_new_writes_nothing(
    store: Store, folds: FoldStore, pool: db.Pool
) -> None:
    await store.ingest([*EVENTS, COUNTED])
    await folds.fold_some()
    before = [await fetch(pool, f"SELECT ctid, * FROM {table} ORDER BY ctid") for table in MADE]
    assert all(before)
    async with db.connection(pool) as connection:
        await connection.execute(TOUCH_EVERYTHING)
    assert await folds.fold_some() == 13
    after = [await fetch(pool, f"SELECT ctid, * FROM {table} ORDER BY ctid") for table in MADE]
    assert after == before


async def test_long_histories_are_read_some_after_the_others_and_all_of_each(
    store: Store, pool: db.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more is held than the bound and one history; whoever says nothing has an empty one."""
    await store.ingest(EVENTS)
    spoken = sorted({said.resource for event in EVENTS for said in event.normalised.said})
    keys = [spoken[0]._replace(resource_id="0"), *spoken, spoken[0]._replace(resource_id="silent")]
    async with db.transaction(pool) as connection:
        (whole,) = [found async for found in fold_store._load(connection, keys, {})]
        assert list(whole) == [*spoken, keys[0], keys[-1]]
        longest = max(map(len, whole.values()))
        monkeypatch.setattr(fold_store, "_STATEMENTS", 3 * longest)
        monkeypatch.setattr(fold_store, "_FETCHED", 7)
        portions = [found async for found in fold_store._load(connection, keys, {})]
    assert len(portions) == len(spoken) / 3
    assert max(sum(map(len, found.values())) for found in portions) <= 3 * longest
    together = {key: said for found in portions for key, said in found.items()}
    assert {key: sorted(map(repr, said)) for key, said in together.items()} == {
        key: sorted(map(repr, said)) for key, said in whole.items()
    }


async def test_late_messages_remake_the_history(
    store: Store, folds: FoldStore, pool: db.Pool
) -> None:
    one = [item for item in EVENTS if item.normalised.resource == EVENTS[0].normalised.resource]
    late = [item for item in one if "resize" in item.notification.event_type]
    await store.ingest([item for item in one if item not in late])
    await folds.fold_some()
    await store.ingest(late)
    await folds.fold_some()
    in_time = await fetch(pool, HISTORY_OF_ONE)
    assert [row[2:] for row in in_time] == [
        ("m1.small", "active"),
        ("m1.large", "resized"),
        ("m1.large", "active"),
    ]


async def test_rows_that_came_before_their_partition_move_into_it_and_stay_unique(
    store: Store, pool: db.Pool
) -> None:
    await store.ingest(EVENTS)
    assert await fetch(pool, "SELECT count(*) FROM raw_event_default") == [(len(EVENTS),)]
    assert await store.make_partitions(months(DAY, 1)) == ["2026-04", "2026-05", "2026-06"]
    assert await store.make_partitions(months(DAY, 1)) == []
    assert await fetch(pool, "SELECT count(*) FROM raw_event_default") == [(0,)]
    assert await fetch(pool, "SELECT count(*) FROM raw_event_2026_05") == [(len(EVENTS),)]
    assert await store.ingest(EVENTS) == Tally(duplicate=len(EVENTS))


async def test_partitions_are_made_once_while_replicas_write(store: Store, pool: db.Pool) -> None:
    async def write() -> None:
        for first in range(0, len(EVENTS), 10):
            await testing.eventually(partial(ingested, EVENTS[first : first + 10]))

    async def ingested(batch: Sequence[Event]) -> bool:
        try:
            await store.ingest(batch)
        except db.DatabaseBusy:  # as the bus does with a batch: it is handed over again
            return False
        return True

    async with asyncio.TaskGroup() as group:
        group.create_task(write())
        made = [group.create_task(store.make_partitions(months(DAY, 3))) for _ in range(3)]
    names = [name for task in made for name in task.result()]
    assert sorted(names) == ["2026-04", "2026-05", "2026-06", "2026-07", "2026-08"]
    assert await fetch(pool, "SELECT count(*) FROM raw_event") == [(len(EVENTS),)]
    assert await fetch(pool, "SELECT count(*) FROM raw_event_default") == [(0,)]


def test_the_months_around_new_year_are_consecutive() -> None:
    assert [f"{month:%Y-%m}" for month in months(datetime(2026, 12, 31, tzinfo=UTC), 2)] == [
        "2026-11",
        "2026-12",
        "2027-01",
        "2027-02",
    ]


# --- buckets of a calendar whose hours are not all there, or come twice

# an hour comes twice, or an hour is missing, on the day named; in Havana it is the day's first
CHANGES_OF_CLOCKS = [
    ("Europe/Berlin", datetime(2026, 10, 25, 1, tzinfo=UTC)),
    ("Europe/Berlin", datetime(2026, 3, 29, 1, tzinfo=UTC)),
    ("America/Havana", datetime(2026, 11, 1, 5, tzinfo=UTC)),
    ("America/Havana", datetime(2026, 3, 8, 5, tzinfo=UTC)),
    ("Australia/Lord_Howe", datetime(2026, 4, 4, 15, tzinfo=UTC)),  # by half an hour
    ("Asia/Kathmandu", datetime(2026, 4, 4, 15, tzinfo=UTC)),  # 5:45 ahead
]


async def held_and_moved(pool: db.Pool, around: datetime) -> None:
    """A history with an edge, and an amount, every 17 minutes and some, three hours each way."""
    edges = [around + n * timedelta(seconds=1031.000001) for n in range(-11, 12)]
    async with db.connection(pool) as connection:
        await connection.execute("TRUNCATE usage_interval, usage_amount")
        await connection.executemany(
            "INSERT INTO usage_interval (region, resource_type, resource_id, starts_at, ends_at,"
            " project_id, state_class, attributes, opened_by, closed_by, provenance)"
            " VALUES ('r1', 'instance', 'i', $1, $2, 'p1', 'running', '{}', '[]', '[]', 'events')",
            list(pairwise(edges)),
        )
        await connection.executemany(
            "INSERT INTO usage_amount (region, resource_type, resource_id, counter, label, at,"
            " amount, project_id, evidence) VALUES ('r1', 'instance', 'i', 'bandwidth_in_bytes',"
            " '', $1, $2, 'p1', '[]')",
            [(moment, 2**n) for n, moment in enumerate(edges)],
        )


@pytest.mark.parametrize("bucket", ["hour", "day", "month"])
async def test_buckets_of_any_calendar_add_up_and_none_holds_more_than_it_is_long(
    pool: db.Pool, bucket: str
) -> None:
    reports = ReportStore(pool=pool, mapping=packaged())
    for zone, change in CHANGES_OF_CLOCKS:
        await held_and_moved(pool, change)
        for minutes in range(-190, 191, 95):
            middle = change + timedelta(minutes=minutes)
            for start, end in ((change - 4 * HOUR, middle), (middle, change + 4 * HOUR)):
                window = Window(start=start, end=end, as_of=change + 9 * HOUR)
                (whole,), _ = await reports.usage(window, [], UsageFilter(), limit=10)
                parts, _ = await reports.usage(
                    window, [bucket], UsageFilter(), limit=1000, time_zone=zone
                )
                sums = Counter[str]()
                for part in parts:
                    sums.update(part.amounts)
                    held = part.amounts.get("instance_hours", 0)
                    assert held >= 0
                    # the hour that comes twice is one bucket of two
                    assert bucket != "hour" or held <= 7_200_000_000
                assert sums == whole.amounts, (zone, start, end)


async def test_what_is_held_and_what_moves_in_one_moment_are_in_one_bucket(pool: db.Pool) -> None:
    reports = ReportStore(pool=pool, mapping=packaged())
    for zone, change in CHANGES_OF_CLOCKS:
        await held_and_moved(pool, change)
        for n in range(-22, 22):
            start = change + n * timedelta(minutes=5)
            window = Window(start=start, end=start + timedelta(minutes=5), as_of=change + 9 * HOUR)
            parts, _ = await reports.usage(
                window, ["hour"], UsageFilter(), limit=1000, time_zone=zone
            )
            moved = [part for part in parts if "bandwidth_in_bytes" in part.amounts]
            assert len(parts) == 1
            assert len(moved) <= 1


async def test_usage_of_a_type_that_has_no_measure_is_nothing(pool: db.Pool) -> None:
    reports = ReportStore(pool=pool, mapping=packaged())
    window = Window(start=DAY, end=DAY + HOUR, as_of=DAY + HOUR)
    for groups in ([], ["project"], ["day"]):
        rows, marker = await reports.usage(
            window, groups, UsageFilter(resource_type="user"), limit=10
        )
        assert ([row.amounts for row in rows if row.amounts], marker) == ([], None)
