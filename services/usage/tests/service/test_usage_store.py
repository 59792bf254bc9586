"""The ledger itself, on a real PostgreSQL: partitions, atomic batches, folds beside ingest."""

import asyncio
import random
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest

from hostler_common import db, testing
from hostler_usage.envelope import open_body
from hostler_usage.event import Event, Tally
from hostler_usage.jobs import months
from hostler_usage.normalise import normalise
from hostler_usage.store import Store
from hostler_usage.testing import LARGE, SMALL, InstanceLife, Message, Step

DAY = datetime(2026, 5, 8, tzinfo=UTC)
HOUR = timedelta(hours=1)


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
        normalised=normalise(notification, region="r1"),
        body=body,
        source="cloud",
        region="r1",
        exchange="nova",
        routing_key="notifications.info",
        content_type="application/json",
        content_encoding=None,
        headers={},
    )


EVENTS = [event(message) for number in range(12) for message in life(number).messages()]


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[db.Pool]:
    await db.migrate(database_url, schema="usage", package="hostler_usage")
    async with db.open_pool(database_url, schema="usage") as opened:
        yield opened


@pytest.fixture
def store(pool: db.Pool) -> Store:
    return Store(pool=pool, writer=uuid.uuid4())


async def fetch(pool: db.Pool, statement: str) -> list[tuple[object, ...]]:
    async with db.connection(pool) as connection:
        return [tuple(row) for row in await connection.fetch(statement)]


ALL_INTERVALS = (
    "SELECT * FROM usage_interval ORDER BY region, resource_type, resource_id, starts_at"
)
HISTORY_OF_ONE = (
    "SELECT starts_at, ends_at, flavor, state FROM usage_interval"
    " WHERE resource_id = '00000000-0000-4000-8000-000000000000' ORDER BY starts_at"
)


async def test_a_batch_is_stored_once_whatever_is_in_it_twice(store: Store) -> None:
    assert await store.ingest([*EVENTS, *EVENTS[:5]]) == Tally(stored=len(EVENTS), duplicate=5)
    assert await store.ingest(EVENTS) == Tally(duplicate=len(EVENTS))


async def test_a_batch_that_fails_leaves_nothing_behind(store: Store, pool: db.Pool) -> None:
    """Neither messages without their observations, nor tallies of what was rolled back."""
    bad = replace(EVENTS[1], body=None)  # type: ignore[arg-type]  # what the table refuses
    with pytest.raises(Exception, match="null value"):
        await store.ingest([EVENTS[0], bad])
    for table in ("raw_event", "observation", "dirty", "ingest_tally"):
        assert await fetch(pool, f"SELECT count(*) FROM {table}") == [(0,)]


async def test_a_fold_beside_ingest_forgets_no_message(store: Store, pool: db.Pool) -> None:
    """Writers and folders run at once, in small steps; the end is what one big fold makes of it."""
    order = list(EVENTS)
    random.Random(3).shuffle(order)
    done = asyncio.Event()

    async def write(part: Sequence[Event]) -> None:
        for first in range(0, len(part), 5):
            await store.ingest(part[first : first + 5])

    async def fold() -> None:
        while not done.is_set():
            await store.fold_some(3)

    async with asyncio.TaskGroup() as folders:
        for _ in range(2):
            folders.create_task(fold())
        async with asyncio.TaskGroup() as writers:
            for number in range(3):
                writers.create_task(write(order[number::3]))
            writers.create_task(write(order[::-1]))
        done.set()
    while await store.fold_some():
        pass
    beside = await fetch(pool, ALL_INTERVALS)
    assert len(beside) == 12 * 3
    async with db.connection(pool) as connection:
        await connection.execute(
            "TRUNCATE usage_interval, resource; INSERT INTO dirty SELECT DISTINCT region,"
            " resource_type, resource_id FROM observation"
        )
    while await store.fold_some():
        pass
    assert await fetch(pool, ALL_INTERVALS) == beside


async def test_a_message_stored_while_its_resource_is_taken_for_a_fold_is_folded_later(
    store: Store, pool: db.Pool
) -> None:
    first, second = [event for event in EVENTS if event.normalised.observations][:2]
    assert first.normalised.resource == second.normalised.resource
    await store.ingest([first])
    async with db.transaction(pool) as folder:  # as fold_some, between its lock and its delete
        await folder.execute("SELECT FROM dirty FOR UPDATE SKIP LOCKED")
        ingest = asyncio.create_task(store.ingest([second]))

        async def waits() -> bool:
            return bool(
                await fetch(pool, "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
            )

        await testing.eventually(waits)
        await folder.execute("DELETE FROM dirty")
    await ingest
    assert await fetch(pool, "SELECT count(*) FROM dirty") == [(1,)]


async def test_a_fold_that_finds_nothing_new_writes_nothing(store: Store, pool: db.Pool) -> None:
    await store.ingest(EVENTS)
    await store.fold_some()
    before = await fetch(pool, "SELECT ctid, * FROM usage_interval ORDER BY ctid")
    async with db.connection(pool) as connection:
        await connection.execute(
            "INSERT INTO dirty SELECT DISTINCT region, resource_type, resource_id FROM observation"
        )
    assert await store.fold_some() == 12
    assert await fetch(pool, "SELECT ctid, * FROM usage_interval ORDER BY ctid") == before


async def test_late_messages_remake_the_history(store: Store, pool: db.Pool) -> None:
    one = [item for item in EVENTS if item.normalised.resource == EVENTS[0].normalised.resource]
    late = [item for item in one if "resize" in item.notification.event_type]
    await store.ingest([item for item in one if item not in late])
    await store.fold_some()
    await store.ingest(late)
    await store.fold_some()
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
