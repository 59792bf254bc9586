"""The fanout is oslo.messaging's own: an unmodified RPC server on topic `compute` takes it."""

import asyncio
import json
import os
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import aio_pika
import pytest

from hostler_common.testing import RunningService, RunService, eventually
from hostler_precache import envelope, testing

RPC_SERVER = Path(__file__).parent / "peers" / "rpc_server.py"
DATA = testing.image_of(1 << 20)

Precache = Callable[..., AbstractAsyncContextManager[RunningService]]


class ForeignServer:
    """The peer's process, and the calls that it printed."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._output = process.stdout

    async def line(self) -> str:
        """The next line it prints."""
        assert self._output is not None
        async with asyncio.timeout(60):
            return (await self._output.readline()).decode().strip()

    async def call(self) -> dict[str, Any]:
        """The next call it got."""
        called: dict[str, Any] = json.loads(await self.line())
        return called


@asynccontextmanager
async def foreign_server(amqp_url: str) -> AsyncIterator[ForeignServer]:
    """The RPC server listens."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(RPC_SERVER),
        amqp_url.replace("amqp://", "rabbit://", 1),
        stdout=asyncio.subprocess.PIPE,
        env=dict(os.environ),
    )
    server = ForeignServer(process)
    try:
        assert await server.line() == "listening"
        yield server
    finally:
        process.terminate()
        await process.communicate()


@pytest.fixture
def precache(run_service: RunService, tmp_path: Path) -> Precache:
    """`async with precache() as service`."""

    def run() -> AbstractAsyncContextManager[RunningService]:
        return testing.service(run_service, tmp_path, public_url="http://precache.example:8301")

    return run


async def distribute(service: RunningService, url: str) -> str:
    image_id = str(uuid.uuid4())
    image = {"image_id": image_id, "location": url}
    await service.api.post("/v1/distributions", {"image_id": image_id, "image": image})
    return image_id


async def both_are_called(
    service: RunningService, foreign: ForeignServer, agent: testing.Program
) -> None:
    """A distribution reaches the foreign server and our agent, by the same cast."""
    async with testing.http_source() as source:
        image_id = await distribute(service, source.add("image", DATA))
        call = await foreign.call()
        assert call["image_id"] == image_id
        assert set(call["meta"]) == {
            "schema", "distribution_id", "blob_id", "root", "size_bytes", "seeds", "token",
            "manifest_url",
        }  # fmt: skip
        assert len(json.dumps(call["meta"])) < envelope.MAX_META_BYTES
        assert call["meta"]["manifest_url"].startswith("http://precache.example:8301/v1/blobs/")

        async def called() -> bool:
            return image_id in [event["image_id"] for event in agent.events("cache_called")]

        await eventually(called)


async def test_a_server_that_was_there_first_is_called_and_so_are_we(
    precache: Precache, amqp_url: str, tmp_path: Path
) -> None:
    async with (
        foreign_server(amqp_url) as foreign,
        precache() as service,
        testing.agent_process(
            "host-1", tmp_path / "host-1", amqp_url=amqp_url, precache_url=service.url
        ) as agent,
    ):
        await both_are_called(service, foreign, agent)


async def test_a_server_that_comes_after_us_is_called_and_so_are_we(
    precache: Precache, amqp_url: str, tmp_path: Path
) -> None:
    async with precache() as service, testing.http_source() as source:
        # our fanout exists before the foreign server declares it
        await distribute(service, source.add("image", DATA))
        async with (
            testing.agent_process(
                "host-1", tmp_path / "host-1", amqp_url=amqp_url, precache_url=service.url
            ) as agent,
            foreign_server(amqp_url) as foreign,
        ):
            await both_are_called(service, foreign, agent)


async def test_a_foreign_client_calls_our_agent_and_other_methods_are_left_alone(
    precache: Precache, amqp_url: str, tmp_path: Path
) -> None:
    async with (
        precache() as service,
        testing.agent_process(
            "host-1", tmp_path / "host-1", amqp_url=amqp_url, precache_url=service.url
        ) as agent,
        await aio_pika.connect(amqp_url) as connection,
    ):
        channel = await connection.channel()
        exchange = await channel.get_exchange("compute_fanout", ensure=False)
        inner = {"method": "refresh_instance_security_rules", "args": {}, "version": "6.0"}
        call = envelope.CacheCall(image_id="from-elsewhere", meta={})
        for body in (
            b"not json",
            json.dumps({"oslo.version": "2.0", "oslo.message": json.dumps(inner)}).encode(),
            envelope.pack(call, unique_id="1"),
        ):
            await exchange.publish(aio_pika.Message(body), "")

        async def called() -> bool:
            return bool(agent.events("cache_called"))

        await eventually(called)
        assert [event["image_id"] for event in agent.events("cache_called")] == ["from-elsewhere"]
        (refused,) = agent.events("message_refused")
        assert refused["code"] == "precache.call.malformed"
