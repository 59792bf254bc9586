"""What precache's tests share: images that are made, sources that serve them, agents in process."""

import asyncio
import hashlib
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aio_pika
import pytest
import pytest_asyncio

from hostler_common import agent as agent_process
from hostler_common import client, servers, settings, testing
from hostler_precache import app
from hostler_precache import testing as precache_testing
from hostler_precache.settings import Settings


@pytest_asyncio.fixture
async def source() -> AsyncIterator[precache_testing.Source]:
    """An HTTP source without images."""
    async with precache_testing.http_source() as served:
        yield served


@pytest.fixture
def make_image() -> Callable[..., bytes]:
    """`make_image(size, seed=1)`."""
    return precache_testing.image_of


def body_of(image_id: str, url: str, data: bytes, **fields: Any) -> dict[str, Any]:
    """A distribution request for an image of an HTTP source, with its sha512."""
    return {
        "image_id": image_id,
        "image": {
            "image_id": image_id,
            "fetcher": "http",
            "location": url,
            "os_hash_algo": "sha512",
            "os_hash_value": hashlib.sha512(data).hexdigest(),
        },
        **fields,
    }


@pytest.fixture
def request_of() -> Callable[..., dict[str, Any]]:
    """`request_of(image_id, url, data, **fields)`."""
    return body_of


ServicePrecache = Callable[..., AbstractAsyncContextManager[testing.RunningService]]
StartAgent = Callable[..., Awaitable[Path]]


@pytest.fixture
def precache(run_service: testing.RunService, tmp_path: Path) -> ServicePrecache:
    """`async with precache(**settings) as service`: the service on real servers."""

    @asynccontextmanager
    async def run(**overrides: Any) -> AsyncIterator[testing.RunningService]:
        values = {
            "data_dir": tmp_path / "seed",
            "blob_port": servers.free_port(),
            "seed_id": "seed-1",
            "log_level": "WARNING",
            "reserve_bytes": 0,
            **overrides,
        }
        async with run_service(app.serve, Settings, "hostler_precache", **values) as service:
            yield service

    return run


@pytest_asyncio.fixture
async def start_agent(
    amqp_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[StartAgent]:
    """`directory = await start_agent(name, precache_url, **settings)`: the agent, in this process."""
    async with AsyncExitStack() as stack:

        async def start(host: str, precache_url: str, **overrides: Any) -> Path:
            directory = Path(overrides.pop("target_dir", tmp_path / host))
            values = {
                "precache_url": precache_url,
                "target_dir": directory,
                "placer": "directory",
                "target_template": "{image_id}",
                "reserve_bytes": 0,
                "report_seconds": 0.2,
                "amqp_url": amqp_url,
                "auth_mode": "none",
                **overrides,
            }
            # a part of the agent reads its own settings from the environment
            with monkeypatch.context() as patched:
                for name, value in values.items():
                    patched.setenv(f"HOSTLER_PRECACHE_{name.upper()}", str(value))
                loaded = settings.load(
                    agent_process.AgentSettings,
                    amqp_url=amqp_url,
                    auth_mode="none",
                    http_port=servers.free_port(),
                    host=host,
                    parts=["precache"],
                    drain_seconds=5.0,
                    log_level="WARNING",
                )
                stop = asyncio.Event()
                task = asyncio.create_task(agent_process.serve(loaded, stop=stop))
                stack.push_async_callback(_stopped, stop, task)
                await testing.wait_ready(f"http://127.0.0.1:{loaded.http_port}", task)
            return directory

        yield start


async def _stopped(stop: asyncio.Event, task: "asyncio.Task[None]") -> None:
    stop.set()
    await task


async def until_over(api: client.Api, distribution_id: str, seconds: float = 30) -> dict[str, Any]:
    """The distribution, once it is over."""

    async def over() -> dict[str, Any] | None:
        answer: dict[str, Any] = await api.get(f"/v1/distributions/{distribution_id}")
        return answer if answer["state"] not in ("fetching", "distributing") else None

    found: dict[str, Any] = await testing.eventually(over, seconds=seconds)
    return found


@pytest.fixture
def over() -> Callable[..., Awaitable[dict[str, Any]]]:
    """`await over(api, distribution_id)`."""
    return until_over


@pytest.fixture
def image_id() -> str:
    """An id as Glance makes them."""
    return str(uuid.uuid4())


@pytest_asyncio.fixture
async def hostler_inbox(amqp_url: str) -> AsyncIterator[Callable[..., Awaitable[list[Any]]]]:
    """`await hostler_inbox(routing_key, count=1)`: the first bodies published under that key since."""
    connection = await aio_pika.connect(amqp_url)
    async with connection:
        channel = await connection.channel()
        exchange = await channel.declare_exchange("hostler", "topic", durable=True)
        queue = await channel.declare_queue(exclusive=True)
        await queue.bind(exchange, "#")
        found: dict[str, list[Any]] = {}

        async def take(routing_key: str, count: int = 1) -> list[Any]:
            async def enough() -> bool:
                while (message := await queue.get(fail=False, no_ack=True)) is not None:
                    found.setdefault(message.routing_key or "", []).append(
                        json.loads(message.body)
                    )
                return len(found.get(routing_key, [])) >= count

            await testing.eventually(enough)
            return found[routing_key]

        yield take
