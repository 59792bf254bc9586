"""Nothing is lost and nothing is counted twice, whoever dies when."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import aio_pika
import asyncpg
import pytest

from hostler_common import client, db, errors, servers, testing
from hostler_common.testing import RunService
from hostler_usage import app
from hostler_usage.settings import Settings
from hostler_usage.testing import LARGE, SMALL, InstanceLife, Step

DAY = datetime(2026, 5, 8, tzinfo=UTC)
HOUR = timedelta(hours=1)
DIES_AFTER_COMMIT = Path(__file__).parent / "usage_dies_after_commit.py"
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
        await stored(url) == events and await query(url, "SELECT count(*) FROM usage.dirty") == 0
    )


class Sender:
    """Publishes as a careful sender does: what was not confirmed and routed is sent again."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._connection: aio_pika.abc.AbstractConnection | None = None
        self._exchange: aio_pika.abc.AbstractExchange | None = None

    async def publish(self, pause_seconds: float) -> None:
        for body in BODIES:
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
async def sender(url: str, pause_seconds: float) -> AsyncIterator[asyncio.Task[None]]:
    """Everything is being published; when the block ends, everything has been."""
    opened = Sender(url)
    task = asyncio.create_task(opened.publish(pause_seconds))
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
    deaths = 0

    async def die() -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(DIES_AFTER_COMMIT), env=faulty
        )
        assert await process.wait() == -signal.SIGKILL

    first = asyncio.create_task(die())  # it makes the queue, and waits for a batch
    await testing.eventually(lambda: bound(amqp_url))
    async with sender(amqp_url, 0):
        await first
        deaths += 1
    after_first = await stored(database_url)
    assert 0 < after_first < len(BODIES)  # committed, and none of it acked
    for _ in range(3):
        await die()
        deaths += 1
    assert await counted(database_url, "duplicate") > 0  # the window was hit: they came again
    async with run_service(
        app.serve, Settings, app.PACKAGE, fold_seconds=0.05, log_level="WARNING"
    ) as service:
        await testing.eventually(lambda: is_settled(database_url, len(BODIES)), seconds=60)
        assert await usage(service.api) == TRUTH
        assert await counted(database_url, "stored") == len(BODIES)
        assert (await service.api.get("/v1/quarantine"))["entries"] == []
    assert deaths == 4


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
    await db.migrate(database_url, schema="usage", package="hostler_usage")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "hostler_usage", "serve"),
        env=environment(amqp_url, database_url),
    )
    await testing.eventually(lambda: bound(amqp_url))
    blocker = await asyncpg.connect(database_url)
    transaction = blocker.transaction()
    await transaction.start()
    await blocker.execute("LOCK TABLE usage.observation IN ACCESS EXCLUSIVE MODE")
    async with sender(amqp_url, 0):
        await testing.eventually(lambda: is_blocked(database_url))
        process.kill()
        await process.wait()
    await transaction.rollback()
    await blocker.close()
    assert await stored(database_url) == 0
    async with run_service(
        app.serve, Settings, app.PACKAGE, fold_seconds=0.05, log_level="WARNING"
    ) as service:
        await testing.eventually(lambda: is_settled(database_url, len(BODIES)), seconds=60)
        assert await usage(service.api) == TRUTH


async def is_blocked(url: str) -> bool:
    """Whether a transaction that stores notifications waits for a lock."""
    return bool(
        await query(
            url,
            "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            " AND query LIKE 'INSERT INTO observation%')",
        )
    )


async def test_a_service_killed_at_any_moment_loses_nothing(
    amqp_url: str, database_url: str, run_service: RunService
) -> None:
    await db.migrate(database_url, schema="usage", package="hostler_usage")
    values = environment(amqp_url, database_url, HOSTLER_USAGE_BATCH_SIZE="20")

    async def start() -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "hostler_usage", "serve", env=values
        )

    process = await start()
    await testing.eventually(lambda: bound(amqp_url))
    async with sender(amqp_url, 0.005) as sending:
        for share in (5, 3, 2):
            await testing.eventually(partial(enough, database_url, len(BODIES) // share))
            process.kill()
            await process.wait()
            process = await start()
        await sending
    await testing.eventually(lambda: enough(database_url, len(BODIES)), seconds=60)
    process.terminate()
    assert await process.wait() == 0
    async with run_service(
        app.serve, Settings, app.PACKAGE, fold_seconds=0.05, log_level="WARNING"
    ) as service:
        await testing.eventually(lambda: is_settled(database_url, len(BODIES)), seconds=60)
        assert await usage(service.api) == TRUTH
    assert await counted(database_url, "stored") == len(BODIES)


async def enough(url: str, events: int) -> bool:
    return await stored(url) >= events


async def is_ready(url: str) -> bool:
    async with client.open_api(url) as api:
        try:
            await api.get("/readyz")
        except errors.HostlerError:
            return False
    return True


@pytest.mark.parametrize("durable", [True, False])
async def test_a_broker_restarted_while_publishing_loses_nothing(
    own_rabbitmq: servers.RabbitMQ, database_url: str, run_service: RunService, durable: bool
) -> None:
    url = own_rabbitmq.url
    source = {"name": "cloud", "region": "r1", "exchanges": ["nova"], "durable": durable}
    async with run_service(
        app.serve,
        Settings,
        app.PACKAGE,
        amqp_url=url,
        sources=[source],
        batch_size=20,
        fold_seconds=0.05,
        log_level="ERROR",
    ) as service:
        async with sender(url, 0.004):
            await testing.eventually(lambda: enough(database_url, 50))
            await asyncio.to_thread(own_rabbitmq.stop)
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
