"""What precache's tests share: images that are made, sources that serve them, agents in process."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import aio_pika
import pytest
import pytest_asyncio

from hostler_common import agent as agent_process
from hostler_common import db, servers, settings, testing
from hostler_precache import protocol
from hostler_precache import testing as precache_testing
from hostler_precache.distribution.distribution_store import DistributionStore
from hostler_precache.distribution.distributions import DistributionId, Policy, PolicyId
from hostler_precache.distribution.policy_store import PolicyStore
from hostler_precache.distribution.rollout import Rollout, Targets
from hostler_precache.images import Image
from hostler_precache.jobs import Pipeline
from hostler_precache.store import Store
from hostler_precache.swarming.swarm_store import SwarmStore
from hostler_precache.swarming.tracker import Tracker
from hostler_precache.transfer.manifest import BlobId, ImageId


@pytest_asyncio.fixture
async def source() -> AsyncIterator[precache_testing.Source]:
    """An HTTP source without images."""
    async with precache_testing.http_source() as served:
        yield served


@pytest.fixture
def make_image() -> Callable[..., bytes]:
    """`make_image(size, seed=1)`."""
    return precache_testing.image_of


@pytest.fixture
def request_of() -> Callable[..., dict[str, Any]]:
    """`request_of(image_id, url, data, **fields)`."""
    return precache_testing.request_of


ServicePrecache = Callable[..., AbstractAsyncContextManager[testing.RunningService]]
StartAgent = Callable[..., Awaitable[Path]]


@pytest.fixture
def precache(run_service: testing.RunService, tmp_path: Path) -> ServicePrecache:
    """`async with precache(**settings) as service`: the service on real servers."""

    return partial(precache_testing.service, run_service, tmp_path, seed_id="seed-1")


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
                    amqp_url=values["amqp_url"],
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


@pytest.fixture
def over() -> Callable[..., Awaitable[dict[str, Any]]]:
    """`await over(api, distribution_id)`."""
    return precache_testing.ended


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


# --- the control plane without a service

IMAGE = "image-1"


class Control:
    """The stores of one replica, and the rows that most of these tests begin with."""

    def __init__(self, pool: db.Pool) -> None:
        self.pool = pool
        self.store, self.distributions = Store(pool), DistributionStore(pool)
        self.swarms, self.policies = SwarmStore(pool), PolicyStore(pool)

    async def add_image(self, image_id: str = IMAGE) -> None:
        """The image is known."""
        image = Image(image_id=ImageId(image_id), fetcher="http", location="http://images/1")
        async with db.transaction(self.pool) as connection:
            await self.store.add_image(connection, image)

    async def add_blob(self, image_id: str = IMAGE, state: str = "ready") -> BlobId:
        """Its bytes are at the seed."""
        blob_id = uuid.uuid4()
        async with db.transaction(self.pool) as connection:
            await connection.execute(
                "INSERT INTO blob (blob_id, image_id, state, seed, seed_url, swarm_key,"
                "   lease_until, size_bytes, root, manifest, ready_at)"
                " VALUES ($1, $2, $3, 'seed', 'http://seed', '\\x00', now(), 100, '\\x00', '{}',"
                "   now() - interval '1 hour')",
                blob_id, image_id, state,
            )  # fmt: skip
        return BlobId(str(blob_id))

    async def distribute(
        self, connection: "db.Connection | None" = None, **fields: Any
    ) -> DistributionId:
        """The image is wanted."""
        distribution_id = DistributionId(uuid.uuid4())
        values: dict[str, Any] = {
            "image_id": IMAGE, "targets": Targets(hosts=["h1", "h2"]), "rollout": Rollout(),
            "priority": 0, **fields,
        }  # fmt: skip
        if connection is not None:
            await self.distributions.add_distribution(
                connection, distribution_id=distribution_id, **values
            )
            return distribution_id
        async with db.transaction(self.pool) as own:
            return await self.distribute(own, **fields)

    async def add_policy(self, images: Sequence[str] = (IMAGE,), **fields: Any) -> Policy:
        """A policy that is due."""
        policy_id = PolicyId(uuid.uuid4())
        values: dict[str, Any] = {
            "name": "policy", "lister": "static", "options": {"images": list(images)},
            "hosts": ["h1", "h2"], "labels": {}, "priority": 0, "every_seconds": 3600, **fields,
        }  # fmt: skip
        async with db.transaction(self.pool) as connection:
            await self.policies.add_policy(connection, policy_id=policy_id, **values)
        return await self.policies.policy(policy_id)

    def pipeline(self, lister: Any, *, lister_seconds: float = 60.0) -> Pipeline:
        """What runs policies with this lister, and does nothing else."""
        nothing: Any = None
        return Pipeline(
            settings=cast("Any", SimpleNamespace(
                public_url=None, token_seconds=60, lister_seconds=lister_seconds
            )),
            store=self.store, distributions=self.distributions, swarms=self.swarms,
            tracking=Tracker(self.swarms, member_seconds=30), policies=self.policies,
            seed=nothing, replicas=nothing, plugins=cast("Any", SimpleNamespace(lister=lambda _: lister)),
            metrics=cast("Any", SimpleNamespace(
                policy_runs=SimpleNamespace(labels=lambda _: SimpleNamespace(inc=lambda: None))
            )),
        )  # fmt: skip

    def report(self, host: str, *blobs: Mapping[str, Any]) -> protocol.HostReport:
        """A report of the host."""
        return protocol.HostReport(
            url=f"http://{host}:8310",
            session_id=str(uuid.uuid4()),
            blobs=[protocol.BlobReport(**blob) for blob in blobs],
        )

    async def say(self, host: str, *blobs: Mapping[str, Any]) -> Any:
        """The report is stored."""
        async with db.transaction(self.pool) as connection:
            return await self.swarms.report(connection, {host: self.report(host, *blobs)})

    async def states(self, distribution_id: uuid.UUID) -> dict[str, str]:
        """Where each host is."""
        return {h.host: h.state for h in await self.distributions.progress(distribution_id)}


@pytest_asyncio.fixture
async def control(database_url: str) -> AsyncIterator[Control]:
    """A database with one image."""
    await db.migrate(database_url, schema="precache", package="hostler_precache")
    async with db.open_pool(database_url, schema="precache") as pool:
        made = Control(pool)
        await made.add_image()
        yield made


class ListerOf:
    """Lists the image, after the test has done what it wants to happen meanwhile."""

    def __init__(self, meanwhile: Any) -> None:
        self._meanwhile = meanwhile

    async def list(self, options: Mapping[str, Any]) -> list[Image]:
        """The image."""
        del options
        await self._meanwhile()
        return [Image(image_id=ImageId(IMAGE), fetcher="http", location="http://images/1")]


@pytest.fixture
def lister_of() -> Callable[[Any], ListerOf]:
    """`lister_of(meanwhile)`."""
    return ListerOf
