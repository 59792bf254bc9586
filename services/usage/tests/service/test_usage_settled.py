"""Folds that read only what a settled past leaves to be read, on a real PostgreSQL."""

import json
import random
import uuid
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta

import pytest

from hostler_common import bus, db
from hostler_usage.history.fold_store import FoldStore
from hostler_usage.reading.event import Event
from hostler_usage.reading.intake import read_delivery
from hostler_usage.reading.mapping_file import packaged
from hostler_usage.reading.normalise import Normaliser
from hostler_usage.store import Store
from hostler_usage.testing import LARGE, SMALL, InstanceLife, Step

DAY = datetime(2026, 5, 8, tzinfo=UTC)
HOUR = timedelta(hours=1)
DAYS = 6
NORMALISER = Normaliser(packaged())
DERIVED = (
    "usage_interval",
    "usage_amount",
    "usage_day",
    "operation",
    "audit_verdict",
    "audit_resource",
)
TOUCH_EVERYTHING = (
    "INSERT INTO touched (regions, resource_types, resource_ids) SELECT array_agg(region),"
    " array_agg(resource_type), array_agg(resource_id) FROM (SELECT DISTINCT region,"
    " resource_type, resource_id FROM raw_event WHERE said IS NOT NULL) AS k"
)


def lives() -> list[InstanceLife]:
    """One that nothing happens to, one that is resized on the fourth day, one that is deleted on the fifth."""
    create = Step(at=DAY + HOUR / 2, action="create", flavor=SMALL)
    further = (
        (),
        (Step(at=DAY + 80 * HOUR, action="resize", flavor=LARGE),),
        (Step(at=DAY + 50 * HOUR, action="stop"), Step(at=DAY + 110 * HOUR, action="delete")),
    )
    return [
        InstanceLife(
            instance_id=f"00000000-0000-4000-8000-{number:012}",
            project_id="p1",
            steps=(create, *steps),
        )
        for number, steps in enumerate(further)
    ]


def events() -> list[Event]:
    """All that Nova's legacy messages say of them, in order of sending, with some traffic."""
    found = []
    for life in lives():
        for message in life.messages(audits_until=DAY + DAYS * 24 * HOUR):
            if message.topic != "notifications":
                continue
            body = json.loads(message.body())
            inner = json.loads(body["oslo.message"])
            if inner["event_type"].endswith("exists"):
                received = 10**9 + message.timestamp.hour
                inner["payload"]["bandwidth"] = {"public": {"bw_in": received, "bw_out": 0}}
            body["oslo.message"] = json.dumps(inner)
            found.append(opened(json.dumps(body).encode()))
    return sorted(found, key=lambda item: item.notification.timestamp)


def opened(body: bytes) -> Event:
    delivery = bus.Delivery(
        queue="q",
        exchange="nova",
        routing_key="notifications.info",
        body=body,
        headers={},
    )
    return read_delivery(delivery, source="cloud", region="r1", normaliser=NORMALISER)


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[db.Pool]:
    await db.migrate(database_url, schema="usage", package="hostler_usage")
    async with db.open_pool(database_url, schema="usage") as opened_pool:
        async with db.connection(opened_pool) as connection:
            await connection.execute(
                "INSERT INTO rollup_state (until) VALUES ($1)", (DAY + 30 * 24 * HOUR).date()
            )
        yield opened_pool


async def derived(pool: db.Pool) -> dict[str, list[str]]:
    async with db.connection(pool) as connection:
        return {
            table: [
                row[0]
                for row in await connection.fetch(f"SELECT t::text FROM {table} t ORDER BY 1")
            ]
            for table in DERIVED
        }


async def ingest_and_fold(pool: db.Pool, batches: Sequence[Sequence[Event]]) -> None:
    store = Store(pool=pool, writer=uuid.uuid4())
    folds = FoldStore(pool=pool, mapping=packaged())
    for batch in batches:
        await store.ingest(batch)
        while await folds.fold_some():
            pass


async def assert_as_everything(pool: db.Pool) -> None:
    """All that is derived is what a fold of everything derives."""
    ours = await derived(pool)
    assert all(ours.values())
    async with db.connection(pool) as connection:
        await connection.execute("DELETE FROM settled")
        for table in DERIVED:
            await connection.execute(f"DELETE FROM {table}")
        await connection.execute(TOUCH_EVERYTHING)
    await FoldStore(pool=pool, mapping=packaged()).fold_some()
    assert await derived(pool) == ours


async def settled_days(pool: db.Pool) -> list[tuple[datetime, int]]:
    async with db.connection(pool) as connection:
        rows = await connection.fetch("SELECT rows_from, kept FROM settled ORDER BY resource_id")
    return [(row["rows_from"], len(json.loads(row["kept"]))) for row in rows]


async def test_batches_in_order_come_to_what_everything_comes_to(pool: db.Pool) -> None:
    sent = events()
    await ingest_and_fold(pool, [sent[n : n + 12] for n in range(0, len(sent), 12)])
    settled = await settled_days(pool)
    assert [line for line, _ in settled[:2]] == [DAY + (DAYS - 1) * 24 * HOUR] * 2
    assert all(kept < 60 for _, kept in settled)
    await assert_as_everything(pool)


async def test_a_fold_of_a_settled_past_touches_no_row_before_the_line(pool: db.Pool) -> None:
    """Not even a wrong one: that it is read at all is what would cost."""
    sent = events()
    await ingest_and_fold(pool, [sent[:-3]])
    async with db.connection(pool) as connection:
        await connection.execute(
            "UPDATE usage_amount SET amount = 7 WHERE at < $1", DAY + 6 * HOUR
        )
    before = await derived(pool)
    await ingest_and_fold(pool, [sent[-3:]])
    after = await derived(pool)
    assert set(before["usage_amount"]) < set(after["usage_amount"])
    assert set(before["operation"]) <= set(after["operation"])


@pytest.mark.parametrize("seed", range(3))
async def test_late_messages_and_any_batches_come_to_what_everything_comes_to(
    pool: db.Pool, seed: int
) -> None:
    chance = random.Random(seed)
    sent = events()
    late = {id(event): chance.choice([0] * 30 + [20, 70]) * HOUR for event in sent}
    sent.sort(key=lambda event: event.notification.timestamp + late[id(event)])
    batches = []
    while sent:
        size = chance.choice([1, 5, 30, 60])
        batches.append(sent[:size])
        sent = sent[size:]
    await ingest_and_fold(pool, batches)
    await assert_as_everything(pool)


async def test_a_batch_that_does_not_say_how_old_it_is_is_folded_with_everything(
    pool: db.Pool,
) -> None:
    sent = events()
    await ingest_and_fold(pool, [sent[10:]])
    store = Store(pool=pool, writer=uuid.uuid4())
    await store.ingest(sent[:10])
    async with db.connection(pool) as connection:
        await connection.execute("UPDATE touched SET oldest = NULL")
    await FoldStore(pool=pool, mapping=packaged()).fold_some()
    await assert_as_everything(pool)
