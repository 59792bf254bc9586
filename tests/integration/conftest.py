"""What the tests with real peers share: servers of environments of their own, and what they notify of."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import aio_pika
import aiohttp
import pytest

from hostler_common import servers
from hostler_common.testing import RunningService, eventually

PEERS = Path(__file__).parent / "peers"
START_SECONDS = 120.0  # on a machine that is busy with other tests

RunPeer = Callable[..., AbstractAsyncContextManager[str]]
Overheard = Callable[[str], AbstractAsyncContextManager[Callable[[], Awaitable[int]]]]


def environment(name: str) -> Path:
    """The peer, installed."""
    done = subprocess.run(
        [sys.executable, str(PEERS / "build.py"), name],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return Path(done.stdout.strip())


@asynccontextmanager
async def _run_peer(name: str, directory: Path, *arguments: str) -> AsyncIterator[str]:
    python = await asyncio.to_thread(environment, name) / "bin" / "python"
    port = servers.free_port()
    log = directory / "log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *(str(python), str(PEERS / f"{name}_server.py"), *arguments),
            *("--directory", str(directory), "--port", str(port)),
            stdout=output,
            stderr=output,
        )
    url = f"http://127.0.0.1:{port}"

    async def answers() -> bool:
        said = await asyncio.to_thread(log.read_text, errors="replace")
        assert process.returncode is None, said[-3000:]
        try:
            async with aiohttp.ClientSession() as session, session.get(f"{url}/"):
                return True
        except aiohttp.ClientConnectionError:
            return False

    try:
        await eventually(answers, seconds=START_SECONDS, every_seconds=0.2)
        yield url
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


@pytest.fixture
def run_peer() -> RunPeer:
    """`async with run_peer(name, directory, *options) as url`: peers/NAME_server.py, as it answers.

    Leaving ends the peer in good order: it has then said all that it says.
    """
    return _run_peer


@pytest.fixture
def overheard(amqp_url: str) -> Overheard:
    """`async with overheard(exchange) as count`: `await count()` messages were published since."""

    @asynccontextmanager
    async def listen(exchange: str) -> AsyncIterator[Callable[[], Awaitable[int]]]:
        async with await aio_pika.connect(amqp_url) as connection:
            channel = await connection.channel()
            queue = await channel.declare_queue(exclusive=True)
            await queue.bind(exchange, "#")

            async def count() -> int:
                state = await channel.declare_queue(queue.name, passive=True)
                return state.declaration_result.message_count or 0

            yield count

    return listen


async def _settled(service: RunningService, expected: int) -> list[dict[str, Any]]:
    async def holds() -> Any:
        listed = await service.api.get("/v1/events", limit=1000)
        if len(listed["events"]) < expected:
            return None
        usage = await service.api.get(
            "/v1/usage", start="2026-05-08T00:00:00Z", end="2026-05-09T00:00:00Z"
        )
        return listed if usage["unfolded_resources"] == 0 else None

    listed: dict[str, Any] = await eventually(holds)
    assert listed["next_marker"] is None
    assert len(listed["events"]) == expected
    assert (await service.api.get("/v1/quarantine"))["entries"] == []
    events: list[dict[str, Any]] = listed["events"]
    return events[::-1]


@pytest.fixture
def stored() -> Callable[[RunningService, int], Awaitable[list[dict[str, Any]]]]:
    """`await stored(service, count)`: so many events exactly, oldest first, all of them folded.

    Nothing is in quarantine then.
    """
    return _settled
