"""Which resources are to be folded, on a real PostgreSQL: each once, however many batches speak of it."""

import random
import time
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from prometheus_client import CollectorRegistry

from hostler_common import bus, db
from hostler_usage.history import touched_store
from hostler_usage.history.fold_store import FoldStore
from hostler_usage.history.pace import Pace
from hostler_usage.history.report_store import ReportStore
from hostler_usage.history.rollup_store import RollupStore
from hostler_usage.jobs import Jobs
from hostler_usage.metrics import Metrics
from hostler_usage.reading.event import Event
from hostler_usage.reading.intake import read_delivery
from hostler_usage.reading.mapping_file import packaged
from hostler_usage.reading.normalise import Normaliser
from hostler_usage.store import Store
from hostler_usage.testing import SMALL, InstanceLife, Message, Step

DAY = datetime(2026, 5, 8, tzinfo=UTC)
HOUR = timedelta(hours=1)
INSTANCES, HOURS = 12, 9
NORMALISER = Normaliser(packaged())
ALL_INTERVALS = (
    "SELECT * FROM usage_interval ORDER BY region, resource_type, resource_id, starts_at"
)

Named = dict[str, tuple[int, datetime | None]]
"""Of each resource that is named: the first row that does, and since when there is news."""


def backlog() -> list[list[Event]]:
    """The audits of some hours in order of time: a batch is a third of an hour's."""
    lives = [
        InstanceLife(
            instance_id=f"00000000-0000-4000-8000-{number:012}",
            project_id="p1",
            steps=(Step(at=DAY + HOUR / 2, action="create", flavor=SMALL),),
        )
        for number in range(INSTANCES)
    ]
    audits = sorted(
        (
            message
            for life in lives
            for message in life.messages(audits_until=DAY + HOURS * HOUR)
            if message.event_type == "compute.instance.exists"
        ),
        key=lambda message: (message.timestamp, message.message_id),
    )
    size = INSTANCES // 3
    return [
        [stored(message) for message in audits[first : first + size]]
        for first in range(0, len(audits), size)
    ]


def stored(message: Message) -> Event:
    delivery = bus.Delivery(
        queue="q",
        exchange="nova",
        routing_key="notifications.info",
        body=message.body(),
        headers={},
    )
    return read_delivery(delivery, source="cloud", region="r1", normaliser=NORMALISER)


async def fetch(pool: db.Pool, statement: str) -> list[tuple[object, ...]]:
    async with db.connection(pool) as connection:
        return [tuple(row) for row in await connection.fetch(statement)]


async def touch(pool: db.Pool, names: Sequence[str], oldest: Sequence[datetime | None]) -> None:
    async with db.connection(pool) as connection:
        await connection.execute(
            "INSERT INTO touched (regions, resource_types, resource_ids, oldest)"
            " VALUES ($1, $2, $3, $4)",
            ["r1"] * len(names),
            ["instance"] * len(names),
            names,
            oldest if any(oldest) else None,
        )


async def named(pool: db.Pool) -> Named:
    async with db.connection(pool) as connection:
        rows = await connection.fetch("SELECT id, resource_ids, oldest FROM touched ORDER BY id")
    found: Named = {}
    for number, names, oldest in rows:
        for name, moment in zip(names, oldest or [None] * len(names), strict=True):
            first, known = found.get(name, (number, moment))
            found[name] = (first, min(known, moment) if known and moment else None)
    return found


def jobs_of(pool: db.Pool, store: Store, pace: Pace, registry: CollectorRegistry) -> Jobs:
    mapping = packaged()
    return Jobs(
        store=store,
        folds=FoldStore(pool=pool, mapping=mapping),
        rollups=RollupStore(pool=pool, mapping=mapping),
        reports=ReportStore(pool=pool, mapping=mapping),
        metrics=Metrics(registry),
        pace=pace,
        fold_limit=INSTANCES // 3,
        months_ahead=1,
    )


async def test_a_backlog_in_order_of_time_is_reckoned_once_for_each_resource(
    pool: db.Pool,
) -> None:
    """Though a fold takes fewer resources than an hour names, so that each comes in many batches."""
    store = Store(pool=pool, writer=uuid.uuid4())
    batches = backlog()
    assert len(batches) == 3 * HOURS
    for batch in batches:
        assert (await store.ingest(batch)).stored == INSTANCES // 3
    registry = CollectorRegistry()
    jobs = jobs_of(pool, store, Pace(time.monotonic), registry)
    await jobs.fold()
    assert registry.get_sample_value("hostler_usage_folded_resources_total") == INSTANCES
    assert await fetch(pool, "SELECT count(*) FROM touched") == [(0,)]
    in_turn = await fetch(pool, ALL_INTERVALS)
    assert len(in_turn) == INSTANCES
    async with db.connection(pool) as connection:
        await connection.execute("TRUNCATE usage_interval, usage_amount, resource, settled")
    await touch(pool, [f"00000000-0000-4000-8000-{number:012}" for number in range(INSTANCES)], [])
    await jobs.fold()
    assert await fetch(pool, ALL_INTERVALS) == in_turn


async def test_a_backlog_after_a_long_idleness_is_read_before_it_is_folded(pool: db.Pool) -> None:
    """A turn in which nothing waits is a fold, too: the next one's patience begins with it."""
    now = 0.0
    pace = Pace(lambda: now)
    store = Store(pool=pool, writer=uuid.uuid4())
    jobs = jobs_of(pool, store, pace, CollectorRegistry())
    now = 3600.0
    await jobs.fold()
    pace.batch_read(500, 500)
    assert not pace.may_fold()


async def test_what_is_named_once_says_the_same_as_before(pool: db.Pool) -> None:
    """Which resources wait, since which row each did, and since when there is news of it, if that is known."""
    random_ = random.Random(4)
    for number in range(30):
        names = random_.sample([f"i-{name:02}" for name in range(20)], random_.randint(1, 8))
        is_known = number % 10 != 7
        await touch(
            pool,
            names,
            [DAY + random_.randint(0, 50) * HOUR if is_known else None for _ in names],
        )
    before = await named(pool)
    assert {moment is None for _, moment in before.values()} == {True, False}
    assert await touched_store.gather(pool, 5) == len(before) == 20
    assert await named(pool) == before
    ((entries,),) = await fetch(pool, "SELECT sum(cardinality(resource_ids)) FROM touched")
    assert entries == len(before)
    assert await touched_store.gather(pool, 5) == len(before)
    assert await named(pool) == before


async def test_few_that_wait_are_left_as_they_are(pool: db.Pool) -> None:
    await touch(pool, ["i-1", "i-2"], [DAY, DAY])
    await touch(pool, ["i-2"], [DAY])
    before = await fetch(pool, "SELECT ctid, * FROM touched")
    assert await touched_store.gather(pool, 3) == 3
    assert await fetch(pool, "SELECT ctid, * FROM touched") == before


async def test_what_another_process_is_folding_is_named_beside_it_still(pool: db.Pool) -> None:
    """It may have read its messages before those of the later rows were there."""
    for _ in range(3):
        await touch(pool, ["i-1", "i-2"], [DAY, DAY])
    async with db.transaction(pool) as other:
        taken, _ = await touched_store.take(other, 2)
        assert len(taken) == 3
        await touch(pool, ["i-1", "i-2"], [DAY, DAY])
        await touch(pool, ["i-2", "i-3"], [DAY, DAY])
        assert await touched_store.gather(pool, 1) == 3
        await touched_store.forget(other, taken)
    assert sorted(await named(pool)) == ["i-1", "i-2", "i-3"]


async def test_two_that_fold_take_different_rows(pool: db.Pool) -> None:
    for number in range(12):
        await touch(pool, [f"i-{number:02}"], [DAY])
    async with db.transaction(pool) as one, db.transaction(pool) as other:
        first, of_first = await touched_store.take(one, 2)
        second, of_second = await touched_store.take(other, 2)
    assert len(first) == len(second) == 2
    assert not of_first.keys() & of_second.keys()


async def test_a_resource_is_found_by_its_key_in_a_table_without_statistics(pool: db.Pool) -> None:
    """In the first backlog of all nothing is known of the tables: no other index may look as good."""
    async with db.transaction(pool) as connection:
        await connection.execute(
            "INSERT INTO audit_resource (region, resource_type, resource_id, lived, launches)"
            " SELECT 'r1', 'instance', md5(n::text), '[]', '[]' FROM generate_series(1, 5000) AS n"
        )
        await connection.execute("SET LOCAL enable_seqscan = off")  # as in a fold
        plan = await connection.fetch(
            "EXPLAIN SELECT t.* FROM unnest($1::text[], $2::text[], $3::text[])"
            " AS k (region, resource_type, resource_id)"
            " JOIN audit_resource AS t USING (region, resource_type, resource_id)",
            *zip(*(("r1", "instance", f"i-{number}") for number in range(50)), strict=True),
        )
    text = "\n".join(row[0] for row in plan)
    assert "Nested Loop" in text
    assert "using audit_resource_pkey" in text
