"""The real service as an operator runs it: a full queue before it, a database of its own behind it."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import TypeAlias

import asyncpg

import bench
import usage_cloud
from hostler_common import db, servers, testing
from hostler_common.bus import connection as bus_connection
from hostler_usage import messages as usage_messages
from hostler_usage.settings import Settings

QUEUE = usage_messages.queue(Settings.model_fields["sources"].default[0])
BATCH = 1000
SCHEMA = "usage"
EVENTS = "usage.raw_event"
"""Where a stored message is a row."""
MEMORY = "ram_mb_hours"
PATIENCE_SECONDS = 3600.0

Database: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


@asynccontextmanager
async def full_queue(stage: bench.Stage, bodies: Iterable[bytes]) -> AsyncIterator[str]:
    """A virtual host whose queue, declared as the service declares it, holds the bodies; its address."""
    url = stage.new_vhost()
    async with bench.channel(url) as channel:
        for binding in QUEUE.bindings:
            await channel.declare_exchange(binding.exchange.name, "topic", durable=True)
        await bus_connection.declare_queue(channel, QUEUE)
        sent = await bench.publish(channel, usage_cloud.EXCHANGE, usage_cloud.ROUTING_KEY, bodies)
        waiting = await bench.depth(channel, QUEUE.name)
    if waiting != sent:
        raise RuntimeError(f"{waiting} of {sent} messages are in the queue")
    try:
        yield url
    finally:
        stage.drop_vhost(url)


async def new_database(stage: bench.Stage) -> str:
    """A database with the service's tables and nothing in them; its address."""
    url = await stage.new_database()
    await db.migrate(url, schema=SCHEMA, package="hostler_usage")
    return url


@asynccontextmanager
async def running(
    stage: bench.Stage, amqp_url: str, database_url: str, **settings: str
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """The service's process, and the address of its API, which may not answer yet.

    `settings` are those that are not as they come.
    """
    port = servers.free_port()
    with stage.log_file("service").open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *(bench.python(), "-m", "hostler_usage", "serve"),
            env={
                **os.environ,
                "HOSTLER_USAGE_AMQP_URL": amqp_url,
                "HOSTLER_USAGE_DATABASE_URL": database_url,
                "HOSTLER_USAGE_AUTH_MODE": "none",
                "HOSTLER_USAGE_HTTP_PORT": str(port),
                "HOSTLER_USAGE_BATCH_SIZE": str(BATCH),
                "HOSTLER_USAGE_LOG_LEVEL": "WARNING",
                **{f"HOSTLER_USAGE_{name.upper()}": value for name, value in settings.items()},
            },
            stdout=log,
            stderr=log,
        )
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        await bench.stop_process(process)


async def wait_ready(address: str, process: asyncio.subprocess.Process) -> None:
    """The API answers.

    Raises:
        RuntimeError: the process ended before.
    """
    waiting = asyncio.ensure_future(testing.wait_ready(address, seconds=60))
    ended = asyncio.ensure_future(process.wait())
    await asyncio.wait((waiting, ended), return_when=asyncio.FIRST_COMPLETED)
    ended.cancel()
    if process.returncode is not None:
        waiting.cancel()
        raise RuntimeError(f"the process ended with {process.returncode}")
    await waiting


async def wait_for_rows(
    database: Database,
    relation: str,
    rows: int,
    *,
    amqp_url: str,
    process: asyncio.subprocess.Process,
) -> None:
    """So many rows are there.

    Asks the broker, which costs it nothing, until nothing waits in the queue, and only then counts.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS

    def check() -> None:
        if process.returncode is not None:
            raise RuntimeError(f"the process ended with {process.returncode}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"{relation} has not got {rows} rows")

    async with bench.channel(amqp_url) as channel:
        while await bench.depth(channel, QUEUE.name):
            check()
            await asyncio.sleep(0.1)
    while await database.fetchval(f"SELECT count(*) FROM {relation}") < rows:  # noqa: S608  our own name
        check()
        await asyncio.sleep(0.1)
