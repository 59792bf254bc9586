"""A server that ends connections while they are being used, as it does when it stops or an operator says so."""

import asyncio
from collections import Counter

from hostler_common import db, servers

TERMINATIONS = 100


async def test_a_connection_that_the_server_ends_at_any_moment_is_an_unavailable_database(
    postgres: servers.Postgres, database_url: str
) -> None:
    outcomes: Counter[str] = Counter()
    done = asyncio.Event()

    async def work(pool: db.Pool) -> None:
        while not done.is_set():
            try:
                async with db.transaction(pool) as connection:
                    await connection.fetchval("SELECT 1")
            except db.DatabaseUnavailable:
                outcomes["unavailable"] += 1
            else:
                outcomes["committed"] += 1

    async with (
        db.open_pool(database_url, schema="example", max_size=10) as pool,
        db.open_pool(postgres.url, schema="terminator", max_size=2) as terminator,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(10):
            group.create_task(work(pool))
        for _ in range(TERMINATIONS):
            async with db.connection(terminator) as connection:
                await connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE application_name = 'hostler-example' AND state = 'idle' LIMIT 3"
                )
        done.set()
    assert outcomes["unavailable"] > 0
    assert outcomes["committed"] > 0
