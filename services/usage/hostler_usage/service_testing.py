"""The whole service for tests, and a publisher that is no part of it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import aio_pika

from hostler_common.testing import RunningService, RunService
from hostler_usage import app
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
