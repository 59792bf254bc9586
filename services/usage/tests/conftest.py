"""What usage's tests share: the running service, and a publisher that is no part of it."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import aio_pika
import hypothesis
import pytest

from hostler_common import testing
from hostler_common.testing import RunningService, RunService
from hostler_usage import app
from hostler_usage.settings import Settings
from hostler_usage.testing import Message

# the machine that runs the tests may be busy: how long an example takes says nothing of the code
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

EMITTER = Path(__file__).parents[3] / "scripts" / "demo" / "emitter.py"

Publish = Callable[[Sequence[bytes]], Awaitable[None]]
Emit = Callable[..., Awaitable[None]]
Settled = Callable[[RunningService, int], Awaitable[dict[str, Any]]]


@pytest.fixture
def run_usage(
    run_service: RunService,
) -> Callable[..., AbstractAsyncContextManager[RunningService]]:
    """`async with run_usage(**settings) as service`."""

    def run(**settings: Any) -> AbstractAsyncContextManager[RunningService]:
        values = {
            "fold_seconds": 0.05,
            "batch_seconds": 0.02,
            "log_level": "WARNING",
            **settings,
        }
        return run_service(app.serve, Settings, app.PACKAGE, **values)

    return run


@asynccontextmanager
async def open_channel(url: str) -> AsyncIterator[aio_pika.abc.AbstractChannel]:
    async with await aio_pika.connect(url) as connection:
        yield await connection.channel(publisher_confirms=True)


@pytest.fixture
def publish(amqp_url: str) -> Publish:
    """Publish bodies to exchange `nova` (which must exist), each confirmed."""

    async def publish(
        bodies: Sequence[bytes],
        exchange: str = "nova",
        routing_key: str = "notifications.info",
        headers: dict[str, Any] | None = None,
    ) -> None:
        async with open_channel(amqp_url) as channel:
            target = await channel.get_exchange(exchange)
            for body in bodies:
                await target.publish(
                    aio_pika.Message(body, headers=headers, content_type="application/json"),
                    routing_key,
                )

    return publish


@pytest.fixture
def emit(amqp_url: str) -> Emit:
    """Have a real oslo.messaging Notifier, in a process of its own, send messages."""

    async def emit(
        messages: Sequence[Message],
        *,
        driver: str = "messagingv2",
        exchange: str = "nova",
        options: dict[str, Any] | None = None,
        url: str = amqp_url,
    ) -> None:
        plan = "\n".join(
            json.dumps(
                {
                    "driver": driver,
                    "exchange": exchange,
                    "topic": message.topic,
                    "event_type": message.event_type,
                    "publisher_id": message.publisher_id,
                    "priority": message.priority,
                    "timestamp": message.timestamp.isoformat(),
                    "payload": message.payload,
                }
            )
            for message in messages
        )
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-W",
            "ignore",
            str(EMITTER),
            url,
            json.dumps(options or {}),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate(plan.encode())
        assert process.returncode == 0, output.decode(errors="replace")[-3000:]

    return emit


async def _settled(service: RunningService, events: int) -> dict[str, Any]:
    """The usage of the test's lives, once this many events are stored and all are folded."""

    async def holds() -> Any:
        stored = await stored_events(service)
        if len(stored) < events:
            return None
        usage = await service.api.get(
            "/v1/usage",
            start="2026-05-07T00:00:00Z",
            end="2026-06-01T00:00:00Z",
            group_by="project",
        )
        return usage if usage["unfolded_resources"] == 0 else None

    usage: dict[str, Any] = await testing.eventually(holds, seconds=60)
    assert len(await stored_events(service)) == events
    return usage


async def stored_events(service: RunningService, **filters: Any) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    marker = None
    while True:
        page = await service.api.get("/v1/events", limit=1000, marker=marker, **filters)
        events += page["events"]
        marker = page["next_marker"]
        if marker is None:
            return events


@pytest.fixture
def settled() -> Settled:
    """`usage = await settled(service, events)`: exactly so many events are stored and folded."""
    return _settled


@pytest.fixture
def stored() -> Callable[..., Awaitable[list[dict[str, Any]]]]:
    """`events = await stored(service, **filters)`: every stored event, newest first."""
    return stored_events
