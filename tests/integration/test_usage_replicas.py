"""Two processes of the usage service on one queue and one database are one service."""

import asyncio
import os
import random
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import aio_pika
import asyncpg

from hostler_common import client, db, servers, testing
from hostler_usage.testing import LARGE, SMALL, InstanceLife, Step

DAY = datetime(2026, 5, 8, tzinfo=UTC)
HOUR = timedelta(hours=1)
LIVES = [
    InstanceLife(
        instance_id=f"00000000-0000-4000-8000-{number:012}",
        project_id=f"p{number % 2}",
        steps=(
            Step(at=DAY + HOUR, action="create", flavor=SMALL),
            Step(at=DAY + 3 * HOUR, action="resize", flavor=LARGE),
            Step(at=DAY + 6 * HOUR, action="delete"),
        ),
    )
    for number in range(40)
]
BODIES = [message.body() for life in LIVES for message in life.messages()]


async def query(url: str, statement: str) -> list[Any]:
    connection = await asyncpg.connect(url)
    try:
        return [tuple(row) for row in await connection.fetch(statement)]
    finally:
        await connection.close()


async def test_two_replicas_share_the_work_and_count_everything_once(
    amqp_url: str, database_url: str
) -> None:
    await db.migrate(database_url, schema="usage", package="hostler_usage")
    ports = [servers.free_port(), servers.free_port()]
    replicas = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "hostler_usage", "serve"),
            env={
                **os.environ,
                "HOSTLER_USAGE_AMQP_URL": amqp_url,
                "HOSTLER_USAGE_DATABASE_URL": database_url,
                "HOSTLER_USAGE_AUTH_MODE": "none",
                "HOSTLER_USAGE_HTTP_PORT": str(port),
                "HOSTLER_USAGE_BATCH_SIZE": "20",
                "HOSTLER_USAGE_FOLD_SECONDS": "0.05",
                "HOSTLER_USAGE_LOG_LEVEL": "WARNING",
            },
        )
        for port in ports
    ]
    for port in ports:
        await testing.wait_ready(f"http://127.0.0.1:{port}", seconds=60)
    sent = BODIES + BODIES[::3]
    random.Random(5).shuffle(sent)
    async with await aio_pika.connect(amqp_url) as connection:
        channel = await connection.channel()
        exchange = await channel.get_exchange("nova")
        for body in sent:
            await exchange.publish(aio_pika.Message(body), "notifications.info")

    async def settled() -> bool:
        ((stored, waiting),) = await query(
            database_url,
            "SELECT (SELECT sum(stored + duplicate) FROM usage.ingest_tally),"
            " (SELECT count(*) FROM usage.touched)",
        )
        return bool(stored == len(sent) and waiting == 0)

    await testing.eventually(settled, seconds=60)
    for port in ports:
        async with client.open_api(f"http://127.0.0.1:{port}") as api:
            answer = await api.get(
                "/v1/usage",
                start="2026-05-08T00:00:00Z",
                end="2026-05-09T00:00:00Z",
                group_by="project",
            )
        assert [
            (row["group"]["project"], row["hours"]["instance_hours"], row["hours"]["vcpu_hours"])
            for row in answer["usage"]
        ] == [("p0", 100.0, 280.0), ("p1", 100.0, 280.0)]
    shares = await query(database_url, "SELECT stored, duplicate FROM usage.ingest_tally")
    assert len(shares) == 2
    assert all(stored > 0 for stored, _ in shares)
    assert sum(stored for stored, _ in shares) == len(BODIES)
    for replica in replicas:
        replica.terminate()
    assert [await replica.wait() for replica in replicas] == [0, 0]
