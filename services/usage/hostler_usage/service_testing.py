"""The whole service for tests, a publisher that is no part of it, and what its reports are compared with."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import Any

import aio_pika

from hostler_common import db
from hostler_common.testing import RunningService, RunService
from hostler_usage import app
from hostler_usage.history.report_store import ReportStore
from hostler_usage.history.summed_days import Parts, parts
from hostler_usage.settings import Settings

RunUsage = Callable[..., AbstractAsyncContextManager[RunningService]]


def runner(run_service: RunService) -> RunUsage:
    """`async with run(**settings) as service`: it folds at once, and logs what is wrong alone."""

    def run(**settings: object) -> AbstractAsyncContextManager[RunningService]:
        values: dict[str, Any] = {
            "fold_seconds": 0.05,
            "batch_seconds": 0.02,
            "log_level": "WARNING",
            **settings,
        }
        return run_service(app.serve, Settings, app.PACKAGE, **values)

    return run


async def send(
    url: str,
    bodies: Sequence[bytes],
    *,
    exchange: str = "nova",
    routing_key: str = "notifications.info",
    headers: Mapping[str, Any] | None = None,
) -> None:
    """The bodies are published to an exchange that must exist, each confirmed."""
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel(publisher_confirms=True)
        target = await channel.get_exchange(exchange)
        for body in bodies:
            await target.publish(
                aio_pika.Message(
                    body,
                    headers=None if headers is None else dict(headers),
                    content_type="application/json",
                ),
                routing_key,
            )


class FromFacts(ReportStore):
    """The same questions, answered without the sums of days."""

    async def _parts(
        self, connection: db.Connection, edges: Sequence[datetime], *_: object
    ) -> Parts:
        del connection
        return parts(edges, None)


async def rows_read(pool: db.Pool, table: str) -> int:
    """How many rows of one of usage's tables were read until now."""
    async with db.connection(pool) as connection:
        await connection.execute("SELECT pg_stat_force_next_flush()")
    async with db.connection(pool) as connection:
        await connection.execute("SELECT pg_stat_clear_snapshot()")
        return int(
            await connection.fetchval(
                "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_user_tables"
                " WHERE relname = $1 AND schemaname = 'usage'",
                table,
            )
        )
