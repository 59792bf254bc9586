"""Old months of messages go; what they said stays, and no history changes."""

import asyncio
import random
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
from prometheus_client import Counter

from hostler_common import bus, db, testing
from hostler_usage.feeds.feed_store import FeedStore
from hostler_usage.history.fold_store import FoldStore
from hostler_usage.history.rebuild_store import REWRITING, RebuildStore
from hostler_usage.history.retention import Month, expired
from hostler_usage.history.retention_jobs import RetentionJobs
from hostler_usage.history.retention_store import Dropped, RetentionStore
from hostler_usage.jobs import months
from hostler_usage.reading.event import Event, Tally
from hostler_usage.reading.intake import read_delivery
from hostler_usage.reading.mapping_file import packaged
from hostler_usage.reading.normalise import Normaliser
from hostler_usage.store import Store
from hostler_usage.testing import LARGE, SMALL, InstanceLife, Message, Step

DAY = datetime(2026, 5, 30, tzinfo=UTC)
HOUR = timedelta(hours=1)
NORMALISER = Normaliser(packaged())
LATER = datetime(2026, 8, 2, tzinfo=UTC)
MAY = Month(
    "raw_event_2026_05", datetime(2026, 5, 1, tzinfo=UTC), datetime(2026, 6, 1, tzinfo=UTC)
)


def life(number: int) -> list[Message]:
    """From May into June."""
    server = InstanceLife(
        instance_id=f"00000000-0000-4000-8000-{number:012}",
        project_id="p1",
        steps=(
            Step(at=DAY + HOUR, action="create", flavor=SMALL),
            Step(at=DAY + 3 * HOUR, action="resize", flavor=LARGE),
            Step(at=DAY + 60 * HOUR, action="delete"),
        ),
    )
    return server.messages(audits_until=DAY + 70 * HOUR)


IMAGES = Message(
    topic="notifications",
    event_type="image.exists",
    publisher_id="image.ctl1",
    timestamp=DAY,
    message_id="images",
    payload={
        "owner": "p1",
        "images": [
            {"id": f"image-{n}", "created_at": str(DAY), "status": "active", "size": 100 * n}
            for n in (1, 2)
        ],
    },
)
UNDATED = Message(
    topic="notifications",
    event_type="compute.instance.create.end",
    publisher_id="compute.cmp1",
    timestamp=datetime(1970, 1, 1, tzinfo=UTC),
    message_id="absurd",
    payload={"instance_id": "i"},
)


def event(message: Message) -> Event:
    delivery = bus.Delivery(
        queue="q", exchange="nova", routing_key="r", body=message.body(), headers={}
    )
    return read_delivery(delivery, source="cloud", region="r1", normaliser=NORMALISER)


EVENTS = [event(message) for number in range(4) for message in life(number)]
EVENTS += [event(IMAGES), event(UNDATED)]
OF_MAY = [item for item in EVENTS if MAY.start <= item.notification.timestamp < MAY.end]
SAID_IN_MAY = sum(said.statement is not None for item in OF_MAY for said in item.normalised.said)


@pytest.fixture
async def store(pool: db.Pool) -> Store:
    made = Store(pool=pool, writer=uuid.uuid4())
    await made.make_partitions(months(datetime(2026, 6, 1, tzinfo=UTC), 2))
    return made


async def fetch(pool: db.Pool, statement: str) -> list[tuple[object, ...]]:
    async with db.connection(pool) as connection:
        return [tuple(row) for row in await connection.fetch(statement)]


async def history(pool: db.Pool, *, anew: bool = True) -> dict[str, str]:
    """The hashes of everything derived, reckoned from all that is there."""
    mapping = packaged()
    folds = FoldStore(pool=pool, mapping=mapping)
    if anew:
        async with db.connection(pool) as connection:
            await connection.execute(
                "INSERT INTO touched (regions, resource_types, resource_ids) SELECT"
                " array_agg(region), array_agg(resource_type), array_agg(resource_id) FROM resource"
                " HAVING count(*) > 0"
            )
    while await folds.fold_some():
        pass
    store = RebuildStore(
        pool=pool, mapping=mapping, normaliser=NORMALISER, folds=folds, program="p"
    )
    return await store.hashes()


async def ingest(store: Store, events: Sequence[Event]) -> Tally:
    """As the bus does with a batch: it is handed over again while others are in the way."""

    async def ingested() -> Tally | None:
        try:
            return await store.ingest(events)
        except db.DatabaseBusy:
            return None

    tally: Tally = await testing.eventually(ingested)
    return tally


async def drop(pool: db.Pool, month: Month = MAY) -> Dropped:
    async def dropped() -> Dropped | None:
        try:
            return await RetentionStore(pool=pool).drop(month)
        except db.DatabaseBusy:
            return None

    found: Dropped = await testing.eventually(dropped)
    return found


async def test_what_a_dropped_month_said_still_counts(store: Store, pool: db.Pool) -> None:
    await store.ingest(EVENTS)
    before = await history(pool)
    assert await drop(pool) == Dropped(messages=len(OF_MAY), statements=SAID_IN_MAY - 1)
    assert await fetch(pool, "SELECT to_regclass('raw_event_2026_05')") == [(None,)]
    assert await fetch(pool, "SELECT count(*) FROM raw_event") == [(len(EVENTS) - len(OF_MAY),)]
    assert await history(pool) == before


async def test_a_late_message_of_a_dropped_month_changes_what_it_would_have_changed(
    store: Store, pool: db.Pool
) -> None:
    late = [item for item in OF_MAY if "resize" in item.notification.event_type]
    await store.ingest([item for item in EVENTS if item not in late])
    without = await history(pool)
    await drop(pool)
    assert await history(pool) == without
    assert (await store.ingest(late)).stored == len(late)
    with_late = await history(pool, anew=False)
    assert with_late != without
    async with db.connection(pool) as connection:
        await connection.execute(
            "TRUNCATE raw_event, statement_apart, usage_interval, usage_amount, operation,"
            " audit_verdict, audit_resource, resource"
        )
    await store.ingest(EVENTS)
    assert await history(pool) == with_late


async def test_a_message_of_a_dropped_month_that_comes_again_counts_once(
    store: Store, pool: db.Pool
) -> None:
    await store.ingest(EVENTS)
    before = await history(pool)
    await drop(pool)
    assert (await store.ingest(OF_MAY)).stored == len(OF_MAY)  # nothing is left to know them by
    assert await history(pool, anew=False) == before


async def test_messages_that_come_while_their_month_is_dropped_are_not_lost(
    store: Store, pool: db.Pool
) -> None:
    order = list(EVENTS)
    random.Random(5).shuffle(order)
    await store.ingest(order[:20])

    async def write(part: Sequence[Event]) -> None:
        for first in range(0, len(part), 3):
            await ingest(store, part[first : first + 3])

    async with asyncio.TaskGroup() as group:
        group.create_task(drop(pool))
        for number in range(3):
            group.create_task(write(order[20:][number::3]))
    beside = await history(pool)
    async with db.connection(pool) as connection:
        await connection.execute(
            "TRUNCATE raw_event, statement_apart, usage_interval, usage_amount, operation,"
            " audit_verdict, audit_resource, resource"
        )
    await store.ingest(EVENTS)
    assert await history(pool) == beside


async def test_what_is_stored_between_the_copy_and_the_drop_is_copied_too(
    store: Store, pool: db.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = OF_MAY[-30:]
    await store.ingest([item for item in EVENTS if item not in late])
    finish = RetentionStore._finish

    async def slow(
        self: RetentionStore, month: Month, settled: int, messages: int, statements: int
    ) -> Dropped:
        await store.ingest(late)
        return await finish(self, month, settled, messages, statements)

    monkeypatch.setattr(RetentionStore, "_finish", slow)
    await drop(pool)
    copied = await fetch(
        pool, "SELECT count(*) FROM statement_apart WHERE event_time < '2026-06-01'"
    )
    assert copied == [(SAID_IN_MAY,)]


async def test_a_message_whose_writer_is_slow_is_waited_for(store: Store, pool: db.Pool) -> None:
    """Its number was given out before the copy began, and it is committed only after."""
    await store.ingest(EVENTS[:10])
    dropping = None
    async with db.transaction(pool) as writer:
        await writer.execute(
            "INSERT INTO raw_event SELECT (jsonb_populate_record(e, jsonb_build_object("
            "'message_id', 'slow', 'seq', nextval('raw_event_seq')))).* FROM raw_event e"
            " WHERE said IS NOT NULL AND event_time < '2026-06-01' LIMIT 1"
        )
        dropping = asyncio.create_task(drop(pool))
        await testing.eventually(
            partial(fetch, pool, "SELECT 1 FROM pg_locks WHERE NOT granted AND mode = 'ShareLock'")
        )
    await dropping
    rows = await fetch(pool, "SELECT 1 FROM statement_apart WHERE message_id = 'slow'")
    assert rows == [(1,)]


async def test_a_drop_that_fails_drops_nothing(store: Store, pool: db.Pool) -> None:
    await store.ingest(EVENTS)
    before = await history(pool)
    async with db.transaction(pool) as reader:
        await reader.execute("SELECT FROM raw_event LIMIT 1")  # does not let go in time
        with pytest.raises(db.DatabaseBusy):
            await RetentionStore(pool=pool).drop(MAY)
    assert await fetch(pool, "SELECT count(*) FROM raw_event") == [(len(EVENTS),)]
    assert await history(pool) == before
    assert (await drop(pool)).messages == len(OF_MAY)


async def test_a_rebuild_after_a_drop_changes_nothing(store: Store, pool: db.Pool) -> None:
    await store.ingest(EVENTS)
    before = await history(pool)
    await drop(pool)
    rebuild = RebuildStore(
        pool=pool,
        mapping=packaged(),
        normaliser=NORMALISER,
        folds=FoldStore(pool=pool, mapping=packaged()),
        program="p",
    )
    progress = await rebuild.begin({})
    while progress.phase == "messages":
        progress = await rebuild.read_some(10)
    while progress.phase == "resources":
        progress = await rebuild.mark_some(10)
    assert progress.changed == 0
    assert await history(pool, anew=False) == before


async def test_a_turn_drops_what_is_old_once_and_nothing_else(store: Store, pool: db.Pool) -> None:
    await store.ingest(EVENTS)
    counters = [Counter(name, "", registry=None) for name in ("months", "messages")]
    jobs = RetentionJobs(
        store=RetentionStore(pool=pool),
        feeds=FeedStore(pool=pool),
        retention_months=1,
        dropped_months=counters[0],
        dropped_messages=counters[1],
    )

    def counted() -> list[float]:
        return [counter._value.get() for counter in counters]

    await jobs.drop_at(datetime(2026, 6, 30, tzinfo=UTC))
    assert counted() == [0, 0]  # May ended less than a month ago
    async with db.singleton(pool, REWRITING):
        await jobs.drop_at(LATER)  # a rebuild is at work
    assert counted() == [0, 0]
    await asyncio.gather(*(jobs.drop_at(LATER) for _ in range(3)))
    assert counted() == [2, len(EVENTS) - 1]  # May and June
    assert sorted(await RetentionStore(pool=pool).partitions()) == [
        "raw_event_2026_07",
        "raw_event_2026_08",
        "raw_event_default",
    ]
    assert await fetch(pool, "SELECT message_id FROM raw_event") == [("absurd",)]


def test_a_month_goes_when_it_ended_as_long_ago_as_messages_are_kept() -> None:
    names = [
        "raw_event_default",
        "raw_event_2026_01",
        "raw_event_2025_12",
        "raw_event_2025_13",
        "raw_event_2026_02",
        "raw_event_20265_02",
        "other_2020_01",
    ]

    def of(now: datetime, kept: int) -> list[str]:
        return [month.name for month in expired(names, now, kept)]

    assert of(datetime(2026, 1, 31, 23, tzinfo=UTC), 1) == []
    assert of(datetime(2026, 2, 1, tzinfo=UTC), 1) == ["raw_event_2025_12"]
    assert of(datetime(2026, 3, 1, tzinfo=UTC), 1) == ["raw_event_2025_12", "raw_event_2026_01"]
    assert of(datetime(2026, 12, 31, tzinfo=UTC), 12) == []
    assert of(datetime(2027, 1, 1, tzinfo=UTC), 12) == ["raw_event_2025_12"]
    (december,) = expired(names, datetime(2026, 2, 1, tzinfo=UTC), 1)
    assert (december.start, december.end) == (
        datetime(2025, 12, 1, tzinfo=UTC),
        datetime(2026, 1, 1, tzinfo=UTC),
    )
