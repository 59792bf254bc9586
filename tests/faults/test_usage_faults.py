"""Nothing is lost and nothing is counted twice, whoever dies when.

P1 to P4 (order, copies, crashes and batches, rebuild) on a real broker and a real database are one
test: whatever was done to the service on the way, its tables are those of a quiet run, byte for
byte. The properties themselves are in services/usage/tests/unit/test_usage_properties.py.
"""

import asyncio
import bz2
import errno
import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import aio_pika
import asyncpg

from hostler_common import client, db, errors, servers, testing
from hostler_common.testing import RunService
from hostler_usage import app
from hostler_usage.history.fold_store import FoldStore
from hostler_usage.history.rebuild_store import DERIVED, Derived, RebuildStore
from hostler_usage.reading.mapping_file import packaged
from hostler_usage.reading.normalise import Normaliser
from hostler_usage.settings import Settings
from hostler_usage.testing import (
    LARGE,
    SMALL,
    InstanceLife,
    Message,
    Step,
    VolumeLife,
    VolumeStep,
)

DAY = datetime(2026, 5, 8, tzinfo=UTC)
HOUR = timedelta(hours=1)
DIES_AFTER_COMMIT = Path(__file__).parent / "usage_dies_after_commit.py"
NOVA_DAY = Path(__file__).parents[2] / "services/usage/tests/data/nova_day.ndjson.gz"
QUEUE = "usage.notifications.cloud"

LIVES = [
    InstanceLife(
        instance_id=f"00000000-0000-4000-8000-{number:012}",
        project_id=f"p{number % 3}",
        steps=(
            Step(at=DAY + HOUR, action="create", flavor=SMALL),
            Step(at=DAY + 3 * HOUR, action="resize", flavor=LARGE),
            Step(at=DAY + 6 * HOUR, action="delete"),
        ),
    )
    for number in range(30)
]
BODIES = [message.body() for life in LIVES for message in life.messages()]
TRUTH = {f"p{number}": (50.0, 10 * (2 * 1 + 3 * 4)) for number in range(3)}


async def usage(api: client.Api) -> dict[str, tuple[float, float]]:
    answer = await api.get(
        "/v1/usage", start="2026-05-08T00:00:00Z", end="2026-05-09T00:00:00Z", group_by="project"
    )
    assert answer["unfolded_resources"] == 0
    return {
        row["group"]["project"]: (row["hours"]["instance_hours"], row["hours"]["vcpu_hours"])
        for row in answer["usage"]
    }


async def query(url: str, statement: str) -> Any:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()


async def stored(url: str) -> int:
    return int(await query(url, "SELECT count(*) FROM usage.raw_event"))


async def counted(url: str, outcome: str) -> int:
    return int(await query(url, f"SELECT coalesce(sum({outcome}), 0) FROM usage.ingest_tally"))


async def is_settled(url: str, events: int) -> bool:
    return (
        await stored(url) == events and await query(url, "SELECT count(*) FROM usage.touched") == 0
    )


class Sender:
    """Publishes as a careful sender does: what was not confirmed and routed is sent again."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._connection: aio_pika.abc.AbstractConnection | None = None
        self._exchange: aio_pika.abc.AbstractExchange | None = None

    async def publish(self, bodies: Iterable[bytes], pause_seconds: float) -> None:
        for body in bodies:
            await testing.eventually(partial(self._sent, body), seconds=60, every_seconds=0.2)
            await asyncio.sleep(pause_seconds)

    async def _sent(self, body: bytes) -> bool:
        try:
            async with asyncio.timeout(5):
                exchange = self._exchange or await self._open()
                message = aio_pika.Message(body, delivery_mode=2)
                await exchange.publish(message, "notifications.info")
        except (aio_pika.exceptions.AMQPError, OSError, RuntimeError, TimeoutError):
            await self.close()
            return False
        return True

    async def _open(self) -> aio_pika.abc.AbstractExchange:
        self._connection = await aio_pika.connect(self._url)
        channel = await self._connection.channel(on_return_raises=True)
        self._exchange = await channel.get_exchange("nova", ensure=False)
        return self._exchange

    async def close(self) -> None:
        connection, self._connection, self._exchange = self._connection, None, None
        if connection is not None:
            await connection.close()


@asynccontextmanager
async def sender(
    url: str, pause_seconds: float, bodies: Sequence[bytes] = BODIES
) -> AsyncIterator[asyncio.Task[None]]:
    """All of it is being published; when the block ends, it has been."""
    opened = Sender(url)
    task = asyncio.create_task(opened.publish(bodies, pause_seconds))
    try:
        yield task
        await task
    finally:
        task.cancel()
        await asyncio.wait([task])
        await opened.close()


def environment(amqp_url: str, database_url: str, **more: str) -> dict[str, str]:
    values = {
        "HOSTLER_USAGE_AMQP_URL": amqp_url,
        "HOSTLER_USAGE_DATABASE_URL": database_url,
        "HOSTLER_USAGE_AUTH_MODE": "none",
        "HOSTLER_USAGE_HTTP_PORT": str(servers.free_port()),
        "HOSTLER_USAGE_FOLD_SECONDS": "0.05",
        "HOSTLER_USAGE_LOG_LEVEL": "WARNING",
        **more,
    }
    return {**os.environ, **values}


async def test_a_kill_between_commit_and_ack_loses_nothing_and_counts_nothing_twice(
    amqp_url: str, database_url: str, run_service: RunService
) -> None:
    await db.migrate(database_url, schema="usage", package="hostler_usage")
    faulty = environment(amqp_url, database_url, HOSTLER_USAGE_BATCH_SIZE="50")

    async def die() -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(DIES_AFTER_COMMIT), env=faulty
        )
        assert await process.wait() == -signal.SIGKILL

    first = asyncio.create_task(die())  # it makes the queue, and waits for a batch
    await testing.eventually(lambda: bound(amqp_url))
    async with sender(amqp_url, 0):
        await first
    after_first = await stored(database_url)
    assert 0 < after_first < len(BODIES)  # committed, and none of it acked
    await die()  # on what the broker gives it first: the same again, or what comes after
    async with run_service(
        app.serve, Settings, app.PACKAGE, fold_seconds=0.05, log_level="WARNING"
    ) as service:
        await testing.eventually(lambda: is_settled(database_url, len(BODIES)), seconds=60)
        assert await usage(service.api) == TRUTH
        assert await counted(database_url, "stored") == len(BODIES)
        # the window was hit: all that was committed and not acked has come again
        await testing.eventually(lambda: came_again(database_url, after_first))
        assert (await service.api.get("/v1/quarantine"))["entries"] == []


async def came_again(database_url: str, least: int) -> bool:
    return await counted(database_url, "duplicate") >= least


async def bound(amqp_url: str) -> bool:
    """Whether the service's queue is there, so that what is published is kept."""
    async with await aio_pika.connect(amqp_url) as connection:
        channel = await connection.channel(on_return_raises=True)
        try:
            await channel.get_queue(QUEUE)
            await channel.get_exchange("nova")
        except aio_pika.exceptions.AMQPError:
            return False
    return True


async def test_a_kill_in_the_middle_of_a_transaction_loses_nothing(
    amqp_url: str, database_url: str, run_service: RunService
) -> None:
    """Neither while messages are stored nor while a fold writes what follows from them."""
    await db.migrate(database_url, schema="usage", package="hostler_usage")
    values = environment(amqp_url, database_url)
    async with replica(values) as process:
        await testing.eventually(lambda: bound(amqp_url))
        async with locked(database_url, "touched"), sender(amqp_url, 0):
            await testing.eventually(lambda: is_blocked(database_url, "INSERT INTO touched%"))
            process.kill()
            await process.wait()
    assert await stored(database_url) == 0
    async with replica(values) as process, locked(database_url, "usage_interval"):
        await testing.eventually(lambda: is_blocked(database_url, "%usage_interval%"))
        process.kill()
        await process.wait()
    assert await query(database_url, "SELECT count(*) FROM usage.usage_interval") == 0
    async with run_service(
        app.serve, Settings, app.PACKAGE, fold_seconds=0.05, log_level="WARNING"
    ) as service:
        await testing.eventually(lambda: is_settled(database_url, len(BODIES)), seconds=60)
        assert await usage(service.api) == TRUTH


@asynccontextmanager
async def locked(url: str, table: str) -> AsyncIterator[None]:
    """Whoever writes into the table waits."""
    connection = await asyncpg.connect(url)
    try:
        async with connection.transaction():
            await connection.execute(f"LOCK TABLE usage.{table} IN ACCESS EXCLUSIVE MODE")
            yield
    finally:
        await connection.close()


async def is_blocked(url: str, statement: str) -> bool:
    """Whether a transaction waits for a lock in such a statement."""
    return bool(
        await query(
            url,
            "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            f" AND query LIKE '{statement}' AND pid <> pg_backend_pid())",
        )
    )


# --- everything that may be published


class Sent(NamedTuple):
    """A body as it is published, and the code it is put into quarantine with; None: it is stored."""

    body: bytes
    code: str | None = None
    compression: str | None = None


def changed(message: Message, **payload: object) -> Message:
    return replace(message, payload=message.payload | payload)


def bare(**message: object) -> bytes:
    """A message of a type that nobody knows."""
    known = {"event_type": "x.y", "timestamp": "2026-05-08 01:00:00", "message_id": "bare"}
    inner = {key: value for key, value in (known | message).items() if value is not None}
    return json.dumps(inner).encode()


def odd() -> list[Sent]:
    """What a broker may hold besides what a cloud sends in good order."""
    first, *_ = LIVES
    created = next(m for m in first.messages() if m.event_type == "compute.instance.create.end")
    other = InstanceLife(
        instance_id="00000000-0000-4000-9000-000000000000",
        project_id="p-odd",
        steps=(Step(at=DAY + HOUR, action="create", flavor=SMALL),),
    ).messages()
    body = created.body("v1")
    large = b" " * (4 * 1024 * 1024)
    return [
        Sent(bare(message_id="unknown")),
        Sent(bare(message_id="nul", payload={"name": "a\0b", "uuid": "\ud800"})),
        Sent(bare(message_id=None)),  # a uuid5 of the body stands in
        Sent(bare(message_id=None, payload={"n": 2})),
        Sent(bare(message_id="payload", payload="a text where an object should be")),
        Sent(gzip.compress(bare(message_id="gzip")), compression="gzip"),
        # one id with two bodies: which of them comes first decides nothing
        Sent(changed(other[-1], vcpus=3).body()),
        Sent(changed(other[-1], vcpus=5).body()),
        # absurd dates: kept, flagged, not folded; and one id of two times
        Sent(body.replace(b'"timestamp": "2026', b'"timestamp": "9026')),
        Sent(body.replace(b'"timestamp": "2026', b'"timestamp": "1026')),
        # none of these is a notification
        Sent(b"", "usage.notification.not_json"),
        Sent(body[:-1], "usage.notification.not_json"),
        Sent(b"[" * 100_000, "usage.notification.not_json"),
        Sent(body.replace(b"p0", b"p\xff"), "usage.notification.not_utf8"),
        Sent(body[:-1] + large + b"}", "usage.notification.too_large"),
        Sent(gzip.compress(body[:-1] + large + b"}"), "usage.notification.too_large", "gzip"),
        Sent(bz2.compress(b" " * (1 << 26)), "usage.notification.too_large", "bzip2"),
        Sent(gzip.compress(body)[:-9], "usage.notification.bad_compression", "gzip"),
        Sent(body, "usage.notification.bad_compression", "rot13"),
        Sent(b'{"oslo.version":"3.0","oslo.message":"{}"}', "usage.notification.bad_envelope"),
        Sent(b'"text"', "usage.notification.bad_envelope"),
        Sent(bare(event_type=None), "usage.notification.bad_message"),
        Sent(bare(timestamp=None), "usage.notification.bad_message"),
        Sent(bare(timestamp="2014-05-3107: 19: 43.463101"), "usage.notification.bad_message"),
    ]


def everything() -> list[Sent]:
    """A real Nova's day, volumes, counters, and what is odd; every body once."""
    volumes = [
        VolumeLife(
            volume_id=f"00000000-0000-4000-8000-{number:012}",
            project_id="p0",
            steps=(
                VolumeStep(at=DAY + HOUR, action="create", size_gb=10),
                VolumeStep(at=DAY + 3 * HOUR, action="extend", size_gb=10 + number),
                VolumeStep(at=DAY + 5 * HOUR, action="transfer", project_id="p1"),
                VolumeStep(at=DAY + (7 + number) * HOUR, action="delete"),
            ),
        )
        for number in range(5)
    ]
    meters = [
        Message(
            topic="notifications",
            event_type="l3.meter",
            publisher_id="metering.net1",
            timestamp=DAY + minute * timedelta(minutes=5),
            message_id=f"meter-{minute}",
            payload={"label_id": f"label-{minute % 3}", "project_id": "p1", "bytes": 981 * minute},
        )
        for minute in range(60)
    ]
    with gzip.open(NOVA_DAY) as lines:
        real = [Sent(line.rstrip(b"\n")) for line in lines]
    told = [m for life in volumes for m in life.messages(audits_until=DAY + 9 * HOUR)]
    told += [m for life in volumes for m in life.resent(DAY + 30 * HOUR)]
    return [*real, *(Sent(message.body()) for message in (*told, *meters)), *odd()]


async def publish(url: str, messages: Iterable[Sent]) -> None:
    """All of them are in the service's queue."""
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel(on_return_raises=True)
        exchange = await channel.get_exchange("nova", ensure=False)
        waiting: set[asyncio.Task[Any]] = set()
        for sent in messages:
            message = aio_pika.Message(
                sent.body,
                headers={"compression": sent.compression} if sent.compression else {},
                delivery_mode=2,
                message_id=hashlib.sha256(sent.body).hexdigest(),
            )
            waiting.add(asyncio.create_task(exchange.publish(message, "notifications.info")))
            if len(waiting) >= 50:
                await asyncio.gather(*waiting)
                waiting.clear()
        await asyncio.gather(*waiting)


# --- what must be the same whatever happened

CONFLICTS = ("one time", "a thousand years before and after")  # as `odd` has them
OF_MESSAGE = "event_time, message_id, body_sha256"
INGESTED = (
    # all but when and in which order it came
    Derived(
        table="raw_event",
        order=OF_MESSAGE,
        columns=f"{OF_MESSAGE}, region, event_type, publisher_id, priority, request_id,"
        " project_id, resource_type, resource_id, has_own_id, is_known, problems, headers, said,"
        " body",
    ),
    Derived(table="statement_apart", order=f"resource_id, resource_type, {OF_MESSAGE}"),
    Derived(
        table="event_conflict",
        order="message_id, event_time, body_sha256",
        columns=OF_MESSAGE,
    ),
    Derived(
        table="quarantine",
        order="queue, body_sha256, routing_key, exchange",
        columns="queue, exchange, routing_key, properties, body, code, reason, attempts",
    ),
)


@asynccontextmanager
async def rebuilding(url: str) -> AsyncIterator[RebuildStore]:
    mapping = packaged()
    async with db.open_pool(url, schema="usage", max_size=3) as pool:
        yield RebuildStore(
            pool=pool,
            mapping=mapping,
            normaliser=Normaliser(mapping),
            folds=FoldStore(pool=pool, mapping=mapping),
            program="test",
        )


async def hashes(url: str) -> dict[str, str]:
    """The sha256 of every table that follows from the messages, and of the messages."""
    async with rebuilding(url) as store:
        return await store.hashes((*DERIVED, *INGESTED))


async def fetch(url: str, statement: str) -> list[tuple[Any, ...]]:
    connection = await asyncpg.connect(url, server_settings={"search_path": "usage"})
    try:
        return [tuple(row) for row in await connection.fetch(statement)]
    finally:
        await connection.close()


async def tally(url: str) -> dict[str, int]:
    ((*found,),) = await fetch(
        url,
        "SELECT coalesce(sum(stored), 0)::int, coalesce(sum(duplicate), 0)::int,"
        " coalesce(sum(conflict), 0)::int FROM ingest_tally",
    )
    ((*bad,),) = await fetch(
        url, "SELECT count(*)::int, coalesce(sum(seen), 0)::int FROM quarantine"
    )
    names = ("stored", "duplicate", "conflict", "quarantined", "seen")
    return dict(zip(names, (*found, *bad), strict=True))


async def ended(url: str, published: Sequence[Sent]) -> bool:
    """Whether every message was read at least as often as it was published, and all is folded.

    What was redelivered counts as read again, so that distinct messages are asked for as well.
    """
    found = await tally(url)
    read = found["stored"] + found["duplicate"] + found["seen"]
    places = found["stored"] + found["quarantined"]
    ((is_busy,),) = await fetch(url, "SELECT EXISTS (SELECT FROM touched)")
    return read >= len(published) and places >= len(set(published)) and not is_busy


async def assert_each_in_one_place(url: str, published: Iterable[Sent]) -> None:
    """Every body is stored or in quarantine, never both, never twice, with the reason that it should have."""
    wanted = {hashlib.sha256(sent.body).digest(): sent.code for sent in published}
    kept = Counter(row[0] for row in await fetch(url, "SELECT body_sha256 FROM raw_event"))
    bad = await fetch(url, "SELECT body_sha256, code FROM quarantine")
    assert max(kept.values()) == 1
    assert set(kept) == {digest for digest, code in wanted.items() if code is None}
    assert sorted(bad) == sorted((d, code) for d, code in wanted.items() if code is not None)


async def left_in_queue(url: str) -> int:
    """How many messages wait in the service's queue while nobody reads it."""
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        queue = await channel.get_queue(QUEUE)
        return int(queue.declaration_result.message_count or 0)


@asynccontextmanager
async def replica(values: dict[str, str]) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "hostler_usage", "serve"),
        env={**values, "HOSTLER_USAGE_HTTP_PORT": str(servers.free_port())},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_p1_to_p4_any_order_copies_kills_and_a_rebuild_leave_the_tables_of_a_quiet_run(
    amqp_url: str, database_url: str, postgres: servers.Postgres, run_service: RunService
) -> None:
    messages = everything()
    good = [sent for sent in messages if sent.code is None]
    bad = [sent for sent in messages if sent.code is not None]

    # every message once, in order, and nobody dies: all are counted exactly
    async with run_service(app.serve, Settings, app.PACKAGE, fold_seconds=0.05, log_level="ERROR"):
        await publish(amqp_url, messages)
        await testing.eventually(partial(ended, database_url, messages))
        once = {
            "stored": len(good),
            "duplicate": 0,
            "conflict": len(CONFLICTS),
            "quarantined": len(bad),
            "seen": len(bad),
        }
        assert await tally(database_url) == once
        await assert_each_in_one_place(database_url, messages)
        quiet = await hashes(database_url)
        # and all of it again
        await publish(amqp_url, messages[::-1])
        await testing.eventually(partial(ended, database_url, messages * 2))
        assert await tally(database_url) == {
            **once,
            "duplicate": len(good),
            "seen": 2 * len(bad),
        }
    assert await left_in_queue(amqp_url) == 0
    assert await hashes(database_url) == quiet
    assert await fetch(
        database_url,
        "SELECT tableoid::regclass::text, problems, said, EXTRACT(year FROM event_time)::int"
        " FROM raw_event WHERE 'absurd_time:timestamp' = ANY(problems) ORDER BY event_time",
    ) == [("raw_event_default", ["absurd_time:timestamp"], None, year) for year in (1026, 9026)]
    held = "SELECT (attributes->>'vcpus')::int FROM usage_interval WHERE project_id = 'p-odd'"
    assert len(await fetch(database_url, held)) == 1  # of two bodies under one id, one word

    # permuted and doubled, by replicas that are killed in the middle of it
    chance = random.Random(4)
    order = messages + chance.choices(good, k=len(messages) // 4) + bad
    chance.shuffle(order)
    await fetch(postgres.url, "CREATE DATABASE usage_killed")
    url = postgres.url.rsplit("/", 1)[0] + "/usage_killed"
    await db.migrate(url, schema="usage", package="hostler_usage")
    values = environment(
        amqp_url, url, HOSTLER_USAGE_BATCH_SIZE="20", HOSTLER_USAGE_LOG_LEVEL="ERROR"
    )
    await publish(amqp_url, order[: len(order) // 2])  # the backlog
    sending = asyncio.create_task(publish(amqp_url, order[len(order) // 2 :]))
    for low, high in ((0.05, 0.4), (0.5, 1.0)):
        async with replica(values) as one, replica(values) as other:
            for process in (one, other):
                share = chance.uniform(low, high)
                await testing.eventually(
                    partial(enough, url, int(share * len(good))), every_seconds=0.01
                )
                await asyncio.sleep(chance.random() * 0.05)
                process.kill()
            await asyncio.gather(one.wait(), other.wait())
            assert one.returncode == other.returncode == -signal.SIGKILL
    await sending
    async with run_service(
        app.serve, Settings, app.PACKAGE, database_url=url, fold_seconds=0.05, log_level="ERROR"
    ):
        await testing.eventually(partial(ended, url, order))
    await assert_each_in_one_place(url, messages)
    found = await tally(url)
    assert (found["stored"], found["conflict"]) == (len(good), len(CONFLICTS))
    assert await hashes(url) == quiet

    # and made anew from the bodies
    async with rebuilding(url) as store:
        await store.begin({}, anew=True)
        while (progress := await store.read_some(1000)).phase == "messages":
            pass
        while (progress := await store.mark_some(1000)).phase == "resources":
            pass
        assert await store.fold_until(await store.last_mark(), 1000)
        while (progress := await store.sum_some_days(100)).phase == "days":
            pass
    assert (progress.messages, progress.changed, progress.unreadable) == (len(good), 0, 0)
    assert await hashes(url) == quiet
    await fetch(postgres.url, "DROP DATABASE usage_killed WITH (FORCE)")


async def enough(url: str, events: int) -> bool:
    return await stored(url) >= events


async def is_ready(url: str) -> bool:
    async with client.open_api(url) as api:
        try:
            await api.get("/readyz")
        except errors.HostlerError:
            return False
    return True


async def test_a_broker_stopped_and_killed_while_publishing_loses_nothing(
    own_rabbitmq: servers.RabbitMQ, database_url: str, run_service: RunService
) -> None:
    """Neither of a cloud whose exchanges outlive the broker nor of one whose exchanges do not."""
    url = own_rabbitmq.url
    other = own_rabbitmq.make_vhost("durable")
    source = {"region": "r1", "exchanges": ["nova"]}
    async with run_service(
        app.serve,
        Settings,
        app.PACKAGE,
        amqp_url=url,
        sources=[
            {"name": "cloud", **source},
            {"name": "durable", "vhost": "durable", "durable": True, **source},
        ],
        batch_size=20,
        fold_seconds=0.05,
        log_level="ERROR",
    ) as service:
        # a half for each end, or it might all be sent while the service comes back from the first one
        half = len(BODIES) // 2
        for before, end in ((0, own_rabbitmq.stop), (half, own_rabbitmq.kill)):
            bodies = BODIES[before : before + half]
            await testing.eventually(partial(enough, database_url, before))
            async with (
                sender(url, 0.02, bodies[::2]) as one,
                sender(other, 0.02, bodies[1::2]) as another,
            ):
                await testing.eventually(partial(enough, database_url, before + 50))
                assert not (one.done() and another.done())
                await asyncio.to_thread(end)
                await testing.eventually(lambda: is_not_ready(service.url))
                await asyncio.to_thread(own_rabbitmq.start)
                await testing.wait_ready(service.url, seconds=60)
        await testing.eventually(lambda: is_settled(database_url, len(BODIES)), seconds=60)
        assert await usage(service.api) == TRUTH
    assert await counted(database_url, "stored") == len(BODIES)


async def is_not_ready(url: str) -> bool:
    return not await is_ready(url)


async def test_a_database_restarted_while_publishing_loses_nothing(
    own_postgres: servers.Postgres, amqp_url: str, run_service: RunService
) -> None:
    url = own_postgres.url
    async with run_service(
        app.serve,
        Settings,
        app.PACKAGE,
        database_url=url,
        batch_size=20,
        fold_seconds=0.05,
        log_level="ERROR",
    ) as service:
        async with sender(amqp_url, 0.004):
            await testing.eventually(lambda: enough(url, 50))
            await asyncio.to_thread(own_postgres.kill)
            await testing.eventually(lambda: is_not_ready(service.url))
            await asyncio.to_thread(own_postgres.start)
            await testing.wait_ready(service.url, seconds=60)
        await testing.eventually(lambda: is_settled(url, len(BODIES)), seconds=60)
        assert await usage(service.api) == TRUTH
        assert (await service.api.get("/v1/quarantine"))["entries"] == []
    assert await counted(url, "stored") == len(BODIES)


# --- no room on the database's disk

PIECE_BYTES = 512 * 1024


@contextmanager
def small_disk(directory: Path, *, of: Path) -> Iterator[Path]:
    """A file system in memory, its owner that of a server's data. Mounting takes root."""
    directory.mkdir()
    options = f"size=64m,mode=0700,uid={of.stat().st_uid}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def fill(disk: Path) -> list[Path]:
    """Not a byte is left on it; deleting one of the files gives a piece of room."""
    pieces: list[Path] = []
    while True:
        piece = disk / f"ballast-{len(pieces)}"
        pieces.append(piece)
        with piece.open("wb", buffering=0) as file:
            try:
                written = file.write(bytes(PIECE_BYTES))
            except OSError as exc:
                assert exc.errno == errno.ENOSPC  # noqa: PT017  a full disk is what it is for
                return pieces
            if written < PIECE_BYTES:  # the last pages
                return pieces


async def test_a_disk_that_fills_up_again_and_again_is_waited_for_and_nothing_is_lost(
    own_postgres: servers.Postgres, amqp_url: str, run_service: RunService, server_directory: Path
) -> None:
    """The ledger on a disk of 64 MB without a free byte, which is given room piece by piece."""
    published = [
        *(Sent(body) for body in BODIES),
        *(Sent(b"{" * n, "usage.notification.not_json") for n in range(1, 40)),
    ]
    data = Path(await query(own_postgres.url, "SHOW data_directory"))

    def refusals() -> int:
        return (data.parent / "postgres.log").read_text().count("No space left on device")

    with small_disk(server_directory / "small", of=data) as disk:
        await query(own_postgres.url, f"CREATE TABLESPACE small LOCATION '{disk}'")
        await query(own_postgres.url, "CREATE DATABASE small TABLESPACE small")
        url = own_postgres.url.rsplit("/", 1)[0] + "/small"
        async with run_service(
            app.serve,
            Settings,
            app.PACKAGE,
            database_url=url,
            batch_size=50,
            fold_seconds=0.05,
            log_level="ERROR",
        ) as service:
            pieces = fill(disk)
            await publish(amqp_url, published)
            full = 0
            while not await ended(url, published):
                before = refusals()
                # it comes to an end, or to the end of the disk
                await testing.eventually(
                    partial(is_ended_or_refused, url, published, refusals, before)
                )
                if refusals() > before and pieces:
                    full += 1
                    pieces.pop().unlink()
            assert full > 3
            assert await usage(service.api) == TRUTH
        await assert_each_in_one_place(url, published)
        assert (await tally(url))["stored"] == len(BODIES)
        await query(own_postgres.url, "DROP DATABASE small WITH (FORCE)")
        await query(own_postgres.url, "DROP TABLESPACE small")


async def is_ended_or_refused(
    url: str, published: Sequence[Sent], refusals: Callable[[], int], before: int
) -> bool:
    return refusals() > before or await ended(url, published)


FULL = """
    CREATE FUNCTION usage.full_disk() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        PERFORM nextval('usage.tried_' || TG_TABLE_NAME);  -- is not rolled back
        RAISE disk_full USING MESSAGE = 'could not extend file: No space left on device';
    END $$
"""


async def test_a_disk_that_is_full_is_waited_for_and_nothing_is_lost(
    amqp_url: str, database_url: str, run_service: RunService
) -> None:
    """PostgreSQL answers every write with the error of a full disk: to ingest, quarantine and fold."""
    published = [*(Sent(body) for body in BODIES), Sent(b"{", "usage.notification.not_json")]
    async with run_service(
        app.serve, Settings, app.PACKAGE, fold_seconds=0.05, log_level="ERROR"
    ) as service:
        await query(database_url, FULL)
        for table in ("raw_event", "quarantine", "usage_interval"):
            await query(database_url, f"CREATE SEQUENCE usage.tried_{table}")
            await query(
                database_url,
                f"CREATE TRIGGER full_disk BEFORE INSERT ON usage.{table}"
                " EXECUTE FUNCTION usage.full_disk()",
            )
        await publish(amqp_url, published)
        for table in ("raw_event", "quarantine", "usage_interval"):  # one disk after the other
            await testing.eventually(partial(tried, database_url, table))
            assert await query(database_url, f"SELECT count(*) FROM usage.{table}") == 0
            await query(database_url, f"DROP TRIGGER full_disk ON usage.{table}")
        await testing.eventually(partial(ended, database_url, published))
        assert await usage(service.api) == TRUTH
    await assert_each_in_one_place(database_url, published)
    assert await tally(database_url) == {
        "stored": len(BODIES),
        "duplicate": 0,
        "conflict": 0,
        "quarantined": 1,
        "seen": 1,
    }


async def tried(url: str, table: str) -> bool:
    """Whether it was written into, more than once: who was refused came again."""
    return bool(await query(url, f"SELECT last_value > 2 FROM usage.tried_{table}"))
