import asyncio
import os
import signal

import asyncpg

from hostler_common import servers


async def test_postgresql_that_was_killed_starts_again_though_a_backend_did_not_see_its_end(
    own_postgres: servers.Postgres,
) -> None:
    connection = await asyncpg.connect(own_postgres.url)
    backend = await connection.fetchval("SELECT pg_backend_pid()")
    os.kill(backend, signal.SIGSTOP)
    await asyncio.to_thread(own_postgres.kill)
    await asyncio.to_thread(own_postgres.start)
    connection.terminate()
    again = await asyncpg.connect(own_postgres.url)
    assert await again.fetchval("SELECT 1") == 1
    await again.close()
