"""What usage's tests share: the running service, and a publisher that is no part of it."""

import asyncio
import hashlib
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from fastapi import APIRouter

from hostler_common import client, db, http, servers, settings, testing
from hostler_common.testing import RunningService, RunService
from hostler_usage import app
from hostler_usage.service_testing import RunUsage, runner, send
from hostler_usage.settings import Settings
from hostler_usage.testing import Message

# the machine that runs the tests may be busy: how long an example takes says nothing of the code
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

EMITTER = Path(__file__).parents[3] / "scripts" / "demo" / "emitter.py"

Tokens = Callable[..., Path]
ServePart = Callable[..., AbstractAsyncContextManager[tuple[str, dict[str, client.Api]]]]
RunTold = Callable[..., AbstractAsyncContextManager[RunningService]]
Publish = Callable[[Sequence[bytes]], Awaitable[None]]
Emit = Callable[..., Awaitable[None]]
Settled = Callable[[RunningService, int], Awaitable[dict[str, Any]]]


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[db.Pool]:
    """Connections to a database with usage's tables and nothing in them."""
    await db.migrate(database_url, schema="usage", package=app.PACKAGE)
    async with db.open_pool(database_url, schema="usage") as opened:
        yield opened


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    """`tokens(alice=("reader", "p1"))`: a file of tokens, each its caller's name."""

    def write(**callers: tuple[str, str]) -> Path:
        file = tmp_path / "tokens"
        file.write_text(
            "\n".join(
                f"{name}:{role}:{projects}:{hashlib.sha256(name.encode()).hexdigest()}"
                for name, (role, projects) in callers.items()
            )
        )
        return file

    return write


@pytest.fixture
def serve_part(tokens: Tokens) -> ServePart:
    """`async with serve_part([router], state, alice=("reader", "p1")) as (address, clients)`: that API alone."""

    @asynccontextmanager
    async def serve(
        routers: Sequence[APIRouter], state: Mapping[str, Any], **callers: tuple[str, str]
    ) -> AsyncIterator[tuple[str, dict[str, client.Api]]]:
        loaded = settings.load(
            Settings,
            amqp_url="amqp://nowhere/",
            database_url="postgresql://nowhere/x",
            http_port=servers.free_port(),
            auth_tokens_file=tokens(**callers),
        )
        part = http.create_app(
            loaded, title="a part", package=app.PACKAGE, routers=routers, state=state
        )
        server = http.Server(part, loaded)
        running = asyncio.create_task(server.run())
        address = f"http://127.0.0.1:{server.port}"
        try:
            async with AsyncExitStack() as stack:
                yield (
                    address,
                    {
                        name: await stack.enter_async_context(client.open_api(address, token=name))
                        for name in callers
                    },
                )
        finally:
            await server.drain()
            await running

    return serve


@pytest.fixture
def run_usage(run_service: RunService) -> RunUsage:
    """`async with run_usage(**settings) as service`."""
    return runner(run_service)


@pytest.fixture
def publish(amqp_url: str) -> Publish:
    """Publish bodies to exchange `nova` (which must exist), each confirmed."""

    async def publish(
        bodies: Sequence[bytes],
        exchange: str = "nova",
        routing_key: str = "notifications.info",
        headers: dict[str, Any] | None = None,
    ) -> None:
        await send(amqp_url, bodies, exchange=exchange, routing_key=routing_key, headers=headers)

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
def run_told(run_usage: RunUsage, publish: Publish) -> RunTold:
    """`async with run_told(messages, **settings) as service`: they are stored and folded.

    Where the service wants tokens, "admin" is one of every project's.
    """

    @asynccontextmanager
    async def run(messages: Sequence[Message], **overrides: Any) -> AsyncIterator[RunningService]:
        async with run_usage(**overrides) as service:
            await publish([message.body() for message in messages])
            if overrides.get("auth_mode") == "token":
                async with client.open_api(service.url, token="admin") as admin:
                    await _settled(replace(service, api=admin), len(messages))
            else:
                await _settled(service, len(messages))
            yield service

    return run


@pytest.fixture
def stored() -> Callable[..., Awaitable[list[dict[str, Any]]]]:
    """`events = await stored(service, **filters)`: every stored event, newest first."""
    return stored_events
