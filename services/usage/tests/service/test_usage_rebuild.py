"""Everything derived is made anew from the bodies alone, and comes out the same, to the byte."""

import asyncio
import json
import os
import random
import signal
import sys
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import asyncpg
import hypothesis
from hypothesis import strategies as st

from hostler_common import bus, db, testing
from hostler_usage.history.fold_store import FoldStore
from hostler_usage.history.rebuild_store import (
    DERIVED,
    REWRITING,
    RebuildStore,
    note_mapping,
    settle_mapping,
)
from hostler_usage.history.rollup_store import RollupStore
from hostler_usage.reading import mapping_file
from hostler_usage.reading.event import Event
from hostler_usage.reading.intake import read_delivery
from hostler_usage.reading.mapping import Mapping
from hostler_usage.reading.mapping_file import packaged
from hostler_usage.reading.normalise import Normaliser
from hostler_usage.store import Store
from hostler_usage.testing import LARGE, SMALL, InstanceLife, Message, Step, VolumeLife, VolumeStep

DAY = datetime(2026, 5, 8, tzinfo=UTC)
HOUR = timedelta(hours=1)
NORMALISER = Normaliser(packaged())


def lives(number: int) -> list[Message]:
    server = InstanceLife(
        instance_id=f"00000000-0000-4000-8000-{number:012}",
        project_id=f"p{number % 2}",
        steps=(
            Step(at=DAY + HOUR, action="create", flavor=SMALL),
            Step(at=DAY + 3 * HOUR, action="resize", flavor=LARGE),
            Step(at=DAY + 30 * HOUR, action="delete"),
        ),
    )
    volume = VolumeLife(
        volume_id=f"00000000-0000-4000-9000-{number:012}",
        project_id="p1",
        steps=(
            VolumeStep(at=DAY, action="create", size_gb=10),
            VolumeStep(at=DAY + 2 * HOUR, action="extend", size_gb=20),
            VolumeStep(at=DAY + 3 * HOUR, action="delete"),
        ),
    )
    return [*server.messages(audits_until=DAY + 6 * HOUR), *volume.messages()]


def message(event_type: str, payload: dict[str, object]) -> Message:
    return Message(
        topic="notifications",
        event_type=event_type,
        publisher_id="somebody",
        timestamp=DAY + 9 * HOUR,
        message_id=f"{event_type}/1",
        payload=payload,
    )


IMAGES = message(
    "image.exists",
    {
        "owner": "p1",
        "audit_period_beginning": str(DAY),
        "audit_period_ending": str(DAY + 9 * HOUR),
        "images": [
            {"id": f"image-{n}", "created_at": str(DAY), "status": "active", "size": 100 * n}
            for n in (1, 2, 3)
        ],
    },
)
METER = message("l3.meter", {"label_id": "label-1", "project_id": "p1", "bytes": 981, "pkts": 11})
SHARE = message("share.create.end", {"share_id": "s1", "project_id": "p1", "size": 7})
MESSAGES = [*lives(0), *lives(1), IMAGES, METER, SHARE]


def delivery(body: bytes, **properties: Any) -> bus.Delivery:
    values: dict[str, Any] = {
        "queue": "usage.notifications.cloud",
        "exchange": "nova",
        "routing_key": "notifications.info",
        "headers": {},
        **properties,
    }
    return bus.Delivery(body=body, **values)


def event(brought: bus.Delivery, normaliser: Normaliser = NORMALISER) -> Event:
    return read_delivery(brought, source="cloud", region="r1", normaliser=normaliser)


def lease(taken: bool) -> bus.Delivery:
    """An event of hostler's own: its envelope is in AMQP's properties."""
    at = DAY + (HOUR if taken else 5 * HOUR)
    return delivery(
        json.dumps({"node_uuid": "n1", "owner": "p1", "purpose": "test"}).encode(),
        exchange=bus.HOSTLER.name,
        type="baremetal.lease.taken" if taken else "baremetal.lease.released",
        message_id=f"lease/{taken}",
        timestamp=at,
    )


DELIVERIES = [
    *(delivery(one.body("v2" if n % 2 else "v1")) for n, one in enumerate(MESSAGES)),
    lease(True),
    lease(False),
    delivery(b'{"event_type": "no.id", "timestamp": "2026-05-08 00:00:00", "payload": {}}'),
]
EVENTS = [event(one) for one in DELIVERIES]


def rebuilder(pool: db.Pool, mapping: Mapping | None = None, program: str = "p") -> RebuildStore:
    metered = mapping or packaged()
    return RebuildStore(
        pool=pool,
        mapping=metered,
        normaliser=Normaliser(metered),
        folds=FoldStore(pool=pool, mapping=metered),
        program=program,
    )


async def rebuilt(store: RebuildStore, batch: int = 7) -> dict[str, str]:
    progress = await store.begin({})
    while progress.phase == "messages":
        progress = await store.read_some(batch)
    while progress.phase == "resources":
        progress = await store.mark_some(batch)
        assert await store.fold_until(await store.last_mark(), batch)
    while progress.phase == "days":
        progress = await store.sum_some_days(2)
    assert progress.phase == "done"
    return await store.hashes()


async def fill(pool: db.Pool, events: Sequence[Event], mapping: Mapping | None = None) -> None:
    """The events are stored and folded, and days are summed up, some of them before they came."""
    metered = mapping or packaged()
    store = Store(pool=pool, writer=uuid.uuid4())
    folds = FoldStore(pool=pool, mapping=metered)
    half = len(events) // 2
    await store.ingest(events[:half] or events)
    await folds.fold_some()
    await RollupStore(pool=pool, mapping=metered).advance(DAY + 3 * 24 * HOUR)
    await store.ingest(events[half:] or events)
    while await folds.fold_some():
        pass


async def execute(pool: db.Pool, *statements: str) -> None:
    async with db.connection(pool) as connection:
        for statement in statements:
            await connection.execute(statement)


async def fetch(pool: db.Pool, statement: str) -> list[tuple[object, ...]]:
    async with db.connection(pool) as connection:
        return [tuple(row) for row in await connection.fetch(statement)]


EMPTY = (
    "TRUNCATE raw_event, statement_apart, touched, resource, usage_interval, usage_amount,"
    " operation, audit_verdict, audit_resource, audit_period, audit_period_host, audit_recheck,"
    " usage_day, rollup_state, rebuild"
)
DERIVED_TABLES = (
    "usage_interval",
    "usage_amount",
    "operation",
    "audit_verdict",
    "audit_resource",
    "usage_day",
)


async def test_p4_what_came_in_any_order_and_batches_is_what_a_rebuild_makes_of_it(
    pool: db.Pool,
) -> None:
    """Incremental equals rebuild, whatever the order, the batches, the doubles and the folds between."""
    seen: set[str] = set()
    loop = asyncio.get_running_loop()

    async def example(seed: int, sizes: list[int], doubled: int, batch: int) -> None:
        await execute(pool, EMPTY)
        order = [*EVENTS, *EVENTS[:doubled]]
        random.Random(seed).shuffle(order)
        store = Store(pool=pool, writer=uuid.uuid4())
        folds = FoldStore(pool=pool, mapping=packaged())
        rollups = RollupStore(pool=pool, mapping=packaged())
        first = 0
        for number, size in enumerate([*sizes, len(order)]):
            if part := order[first : first + size]:
                await store.ingest(part)
            first += size
            if number % 2:
                await folds.fold_some(5)
            if number == 1:
                await rollups.advance(DAY + 3 * 24 * HOUR)
        while await folds.fold_some():
            pass
        await rollups.advance(DAY + 3 * 24 * HOUR)
        rebuild = rebuilder(pool)
        incremental = await rebuild.hashes()
        assert await rebuilt(rebuild, batch) == incremental
        assert (await fetch(pool, "SELECT changed, unreadable FROM rebuild")) == [(0, 0)]
        seen.add(json.dumps(incremental))

    @hypothesis.settings(
        max_examples=12,
        deadline=None,
        suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
    )
    @hypothesis.given(
        seed=st.integers(0, 2**32),
        sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8),
        doubled=st.integers(0, 10),
        batch=st.integers(1, 50),
    )
    def run(seed: int, sizes: list[int], doubled: int, batch: int) -> None:
        asyncio.run_coroutine_threadsafe(example(seed, sizes, doubled, batch), loop).result(120)

    await asyncio.to_thread(run)
    assert len(seen) == 1  # and P1: every order came to the same tables


async def test_a_rebuild_needs_nothing_but_the_bodies(pool: db.Pool) -> None:
    """Everything derived is lost or wrong, and all of it comes back."""
    await fill(pool, EVENTS)
    rebuild = rebuilder(pool)
    right = await rebuild.hashes()
    for table in DERIVED_TABLES:
        assert await fetch(pool, f"SELECT true FROM {table} LIMIT 1") == [(True,)], table
    kept = await fetch(
        pool, "SELECT message_id, said, problems, project_id FROM raw_event ORDER BY 1"
    )
    apart = await fetch(pool, "SELECT * FROM statement_apart ORDER BY resource_id")
    await execute(
        pool,
        "UPDATE raw_event SET said = NULL, project_id = 'wrong', is_known = false"
        " WHERE event_type <> 'image.exists'",
        "UPDATE raw_event SET resource_id = 'wrong', problems = ARRAY['wrong'] WHERE seq % 5 = 0",
        "DELETE FROM statement_apart WHERE resource_id = 'image-2'",
        'UPDATE statement_apart SET said = \'{"e":"none","a":{}}\', resource_id = \'image-9\'',
        *(f"TRUNCATE {table}" for table in DERIVED_TABLES),
        "INSERT INTO usage_interval VALUES ('r1', 'volume', 'ghost', now(), NULL, 'p', NULL, 'x',"
        " '{}', '[]', '[]', 'events')",
        "INSERT INTO resource VALUES ('r1', 'volume', 'ghost')",
        "INSERT INTO usage_day VALUES ('2026-05-08', 'r1', 'p', 'volume', 'volume_hours', 1)",
    )
    assert await rebuild.hashes() != right
    assert await rebuilt(rebuild) == right
    assert kept == await fetch(
        pool, "SELECT message_id, said, problems, project_id FROM raw_event ORDER BY 1"
    )
    assert apart == await fetch(pool, "SELECT * FROM statement_apart ORDER BY resource_id")


async def test_a_rebuild_that_changes_nothing_writes_no_message(pool: db.Pool) -> None:
    await fill(pool, EVENTS)
    before = await fetch(pool, "SELECT tableoid, ctid FROM raw_event ORDER BY 1, 2")
    await rebuilt(rebuilder(pool))
    assert await fetch(pool, "SELECT tableoid, ctid FROM raw_event ORDER BY 1, 2") == before


MANILA = """
resources:
  share:
    life: plain
    attributes: {project: {}, size_gb: {kind: whole}}
    edges: {launch: [create.end]}
    bodies:
      manila:
        events: share.
        id: share_id
        attributes: {project: project_id, size_gb: size}
  volume: null
measures:
  share_gb_hours: {resource: share, attribute: size_gb}
  volume_hours: null
  volume_gb_hours: null
  provisioned_iops_hours: null
  volume_read_bytes: null
  volume_read_operations: null
  volume_write_bytes: null
  volume_write_operations: null
"""


async def test_a_mapping_that_changed_holds_for_what_came_before_it(pool: db.Pool) -> None:
    """What a fresh ledger under the new mapping would hold is what the rebuild makes of the old one."""
    mapping = mapping_file.read(MANILA)
    normaliser = Normaliser(mapping)
    await fill(pool, [event(one, normaliser) for one in DELIVERIES], mapping)
    rebuild = rebuilder(pool, mapping)
    fresh = await rebuild.hashes()
    await execute(pool, EMPTY)
    await fill(pool, EVENTS)
    found = await rebuild.compare_some(None, 1000)
    assert found.messages == len(EVENTS)
    assert found.changed["share.create.end"] == 1
    assert {name.partition(".")[0] for name in found.changed} == {"share", "volume"}
    assert await rebuilt(rebuild) == fresh
    kinds = await fetch(pool, "SELECT DISTINCT resource_type FROM usage_interval ORDER BY 1")
    assert ("share",) in kinds
    assert ("volume",) not in kinds


async def test_short_leases_that_came_before_their_moments_were_read_are_exact_after_a_rebuild(
    pool: db.Pool,
) -> None:
    """An older mapping read neither when a lease was taken nor when it was over, and said so of no old event."""
    at = DAY + 60 * HOUR
    told = []
    for number, (owner, first, last) in enumerate((("p1", 100, 400), ("p2", 401, 800))):
        taken_at, ended_at = (at + timedelta(milliseconds=moment) for moment in (first, last))
        body = {"node_uuid": "n2", "owner": owner, "taken_at": str(taken_at)}
        for action in ("taken", "released"):
            told.append(
                delivery(
                    json.dumps(body).encode(),
                    exchange=bus.HOSTLER.name,
                    type=f"baremetal.lease.{action}",
                    message_id=f"{action}/{number}",
                    timestamp=at,
                )
            )
            body = body | {"ended_at": str(ended_at)}
    before = mapping_file.read(
        "resources: {node: {exact: false, bodies: {lease: {born: none, ended: none}}}}"
    )
    normaliser = Normaliser(before)
    await fill(pool, [event(one, normaliser) for one in [*DELIVERIES, *told]], before)
    held = (
        "SELECT resource_id, project_id, starts_at, ends_at FROM usage_interval"
        " WHERE resource_type = 'node' ORDER BY 1, 3"
    )
    old = ("n1", "p1", DAY + HOUR, DAY + 5 * HOUR)
    assert (await fetch(pool, held))[0] == old
    await rebuilt(rebuilder(pool))
    assert await fetch(pool, held) == [
        old,
        ("n2", "p1", at + timedelta(milliseconds=100), at + timedelta(milliseconds=400)),
        ("n2", "p2", at + timedelta(milliseconds=401), at + timedelta(milliseconds=800)),
    ]


async def test_what_was_read_anew_is_folded_soon_for_those_spoken_of_before_and_now(
    pool: db.Pool,
) -> None:
    """A rebuild that nobody goes on with leaves no history that its messages contradict."""
    await fill(pool, EVENTS)
    rebuild = rebuilder(pool)
    right = await rebuild.hashes([DERIVED[0]])
    await execute(
        pool,
        "UPDATE raw_event SET resource_id = 'wrong' WHERE resource_type = 'volume'",
        "INSERT INTO touched (regions, resource_types, resource_ids) SELECT array_agg(region),"
        " array_agg(resource_type), array_agg(resource_id) FROM (SELECT region, resource_type,"
        " resource_id FROM resource UNION SELECT 'r1', 'volume', 'wrong') AS k",
    )
    assert await rebuild.fold_until(await rebuild.last_mark(), 1000)
    wrong = await fetch(pool, "SELECT 1 FROM usage_interval WHERE resource_id = 'wrong'")
    assert wrong
    progress = await rebuild.begin({})
    while progress.phase == "messages":
        progress = await rebuild.read_some(20)
    assert await rebuild.fold_until(await rebuild.last_mark(), 1000)
    assert await rebuild.hashes([DERIVED[0]]) == right


async def test_a_body_that_can_no_longer_be_read_says_what_it_said(pool: db.Pool) -> None:
    await fill(pool, EVENTS)
    rebuild = rebuilder(pool)
    right = await rebuild.hashes()
    await execute(pool, "UPDATE raw_event SET body = 'gone' WHERE event_type LIKE 'volume.%'")
    assert await rebuilt(rebuild) == right
    ((unreadable, changed),) = await fetch(pool, "SELECT unreadable, changed FROM rebuild")
    assert unreadable
    assert changed == 0


async def test_a_rebuild_goes_on_where_it_was_and_another_programs_half_is_not_used(
    pool: db.Pool,
) -> None:
    await fill(pool, EVENTS)
    one, other = rebuilder(pool, program="one"), rebuilder(pool, program="other")
    await one.begin({"a": "1"})
    await one.read_some(10)
    resumed = await one.begin({"a": "2"})
    assert (resumed.messages, resumed.is_resumed, resumed.hashes_before) == (10, True, {"a": "1"})
    assert (await one.begin({}, anew=True)).messages == 0
    await one.read_some(10)
    begun = await other.begin({})
    assert (begun.messages, begun.is_resumed) == (0, False)


async def test_messages_that_come_during_a_rebuild_are_in_it(pool: db.Pool) -> None:
    """Replicas ingest and fold all the while; the end is what one big rebuild makes of it."""
    order = list(EVENTS)
    random.Random(1).shuffle(order)
    await fill(pool, order[: len(order) // 2])
    store = Store(pool=pool, writer=uuid.uuid4())
    folds = FoldStore(pool=pool, mapping=packaged())
    rebuild = rebuilder(pool)

    async def replica() -> None:
        rest = order[len(order) // 2 :]
        for first in range(0, len(rest), 3):
            await store.ingest(rest[first : first + 3])
            await folds.fold_some(2)

    async with asyncio.TaskGroup() as group:
        group.create_task(replica())
        progress = await rebuild.begin({})
        while progress.phase == "messages":
            progress = await rebuild.read_some(2)
        while progress.phase == "resources":
            progress = await rebuild.mark_some(2)
            mark = await rebuild.last_mark()
            await testing.eventually(partial(rebuild.fold_until, mark, 2))
        while progress.phase == "days":
            progress = await rebuild.sum_some_days(1)
    while await folds.fold_some():
        pass
    beside = await rebuild.hashes()
    assert await fetch(pool, "SELECT count(*) FROM raw_event") == [(len(EVENTS),)]
    assert await rebuilt(rebuild) == beside


async def test_a_mapping_other_than_the_one_in_use_is_told_until_everything_is_made_anew(
    pool: db.Pool,
) -> None:
    assert [await note_mapping(pool, digest) for digest in ("a", "a", "b", "a")] == [
        False,
        False,
        True,
        True,  # going back does not undo what was normalised with the other
    ]
    await settle_mapping(pool, "a")
    assert not await note_mapping(pool, "a")
    assert await note_mapping(pool, "b")


# --- the command, in a process of its own


PROGRAM = (
    "import typer; from hostler_usage.history import rebuild_cli; app = typer.Typer();"
    " rebuild_cli.register(app); app()"
)


async def run_rebuild(url: str, *options: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        PROGRAM,
        "--json",
        *options,
        env={
            **os.environ,
            "HOSTLER_DATABASE_URL": url,
            "HOSTLER_AMQP_URL": "amqp://nowhere.invalid/",
            "HOSTLER_AUTH_MODE": "none",
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def answer(process: asyncio.subprocess.Process) -> dict[str, Any]:
    output, faults = await process.communicate()
    assert process.returncode == 0, faults.decode()[-3000:]
    found: dict[str, Any] = json.loads(output)
    return found


async def test_a_rebuild_that_is_killed_is_gone_on_with(pool: db.Pool, database_url: str) -> None:
    """SIGKILL in the middle of the messages: the next run reads the rest only, and all is right."""
    await fill(pool, EVENTS)
    right = await rebuilder(pool).hashes()
    await execute(pool, "UPDATE raw_event SET said = NULL", "TRUNCATE usage_interval, usage_day")
    held = await asyncpg.connect(database_url)
    try:
        transaction = held.transaction()
        await transaction.start()
        # rows that the rebuild has to rewrite, after most of the others, are in somebody's hand
        await held.execute(
            "SELECT FROM usage.raw_event WHERE event_type = 'compute.instance.exists'"
            " AND event_time > $1 FOR UPDATE",
            DAY + 5 * HOUR,
        )
        process = await run_rebuild(database_url, "--batch", "5")

        async def waits() -> bool:
            assert process.returncode is None
            rows = await fetch(pool, "SELECT 1 FROM pg_locks WHERE NOT granted")
            return bool(rows) and bool(await fetch(pool, "SELECT 1 FROM rebuild"))

        await testing.eventually(waits)
        process.send_signal(signal.SIGKILL)
        await process.communicate()
        ((read,),) = await fetch(pool, "SELECT messages FROM rebuild")
        await transaction.rollback()
    finally:
        await held.close()
    assert isinstance(read, int)
    assert 0 < read < len(EVENTS)

    async def is_free() -> bool:
        async with db.singleton(pool, REWRITING) as is_alone:
            return is_alone

    await testing.eventually(is_free)
    found = await answer(await run_rebuild(database_url, "--batch", "5"))
    assert (found["is_resumed"], found["messages_before"]) == (True, read)
    assert found["messages"] == len(EVENTS)
    assert found["hashes"]["after"] == right
    assert not found["is_identical"]
    again = await answer(await run_rebuild(database_url))
    assert (again["is_identical"], again["changed"], again["is_resumed"]) == (True, 0, False)


async def test_a_dry_run_says_what_would_change_and_writes_nothing(
    pool: db.Pool, database_url: str
) -> None:
    await fill(pool, EVENTS)
    await execute(pool, "UPDATE raw_event SET said = NULL WHERE event_type = 'volume.create.end'")
    found = await answer(await run_rebuild(database_url, "--dry-run", "--batch", "11"))
    assert found["messages"] == len(EVENTS)
    assert found["changed_by_event_type"] == {"volume.create.end": 2}
    assert await fetch(pool, "SELECT 1 FROM rebuild") == []
    assert len(await fetch(pool, "SELECT 1 FROM raw_event WHERE said IS NULL")) > 2


async def test_two_rebuilds_are_not_at_work_at_once(pool: db.Pool, database_url: str) -> None:
    async with db.singleton(pool, REWRITING) as is_alone:
        assert is_alone
        process = await run_rebuild(database_url)
        _, faults = await process.communicate()
    assert process.returncode == 1
    assert b"usage.rebuild.busy" in faults
