"""Our service and our agents on the hosts of a `network_rig`, as an operator runs them.

`hostler-precache serve` runs in the seed's namespace, with its API and its pieces behind the seed's cap; an agent, a
process of its own, on each host. RabbitMQ is reached at the control host, which has no cap; PostgreSQL through a
socket in the file system, as if it were on a network of its own. Files are in memory.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import shutil
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aio_pika
import aiohttp

import bench
import network_relay
import swarm_race
from hostler_common import client, db, testing
from hostler_precache import messages
from hostler_precache.transfer import following
from network_rig import Rig
from swarm_race import SEED, Clock, Course, Result

NAME = "hostler-precache"
API_PORT, BLOB_PORT, AGENT_PORT = 8301, 8311, 8310
START_SECONDS = 120.0
TOLD_SECONDS = 20.0
"""Until senders and receivers have reported their last bytes."""


# --- the cloud


@dataclass(slots=True)
class Agent:
    """One agent's process; a new one after a restart."""

    host: str
    directory: Path
    log: Path
    stack: AsyncExitStack
    process: asyncio.subprocess.Process

    async def kill(self) -> None:
        """End it with SIGKILL."""
        self.process.kill()
        await self.process.wait()


@dataclass(slots=True)
class Cloud:
    """The service and the agents are up and know each other."""

    course: Course
    api: client.Api
    image_id: str
    agents: dict[str, Agent]
    environment: Mapping[str, str]
    amqp_url: str
    first_payload_bytes: int = 0
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    @property
    def directories(self) -> dict[str, Path]:
        """Where each host's images are placed."""
        return {host: agent.directory for host, agent in self.agents.items()}

    async def start_agent(self, host: str) -> Agent:
        """An agent runs on the host, maybe not for the first time; nobody waits until it is ready."""
        rig = self.course.rig
        address, rack = rig.hosts[host].address, rig.hosts[host].rack
        directory = rig.directory / f"{self.image_id}-{host}"
        directory.mkdir(exist_ok=True)
        log = rig.directory / f"agent-{host}.log"
        own = {
            **self.environment,
            "HOSTLER_AGENT_HOST": host,
            "HOSTLER_AGENT_PARTS": "precache",
            "HOSTLER_AGENT_HTTP_HOST": address,
            "HOSTLER_AGENT_HTTP_PORT": str(AGENT_PORT),
            "HOSTLER_PRECACHE_URL": f"http://{rig.hosts[SEED].address}:{API_PORT}",
            "HOSTLER_PRECACHE_ADVERTISE_URL": f"http://{address}:{AGENT_PORT}",
            "HOSTLER_PRECACHE_PLACER": "directory",
            "HOSTLER_PRECACHE_TARGET_DIR": str(directory),
            "HOSTLER_PRECACHE_TARGET_TEMPLATE": "{image_id}",
            "HOSTLER_PRECACHE_RESERVE_BYTES": "0",
            # a shaped interface does not know its speed, as a network card does
            "HOSTLER_PRECACHE_LINK_BYTES_PER_SECOND": str(rig.hosts[host].rate_bps // 8),
            **({"HOSTLER_PRECACHE_LABELS": f"rack={rack}"} if rack is not None else {}),
        }
        stack = AsyncExitStack()
        self._stack.push_async_callback(stack.aclose)
        process = await stack.enter_async_context(
            rig.process(host, _program("hostler-agent"), environment=own, log=log)
        )
        agent = self.agents[host] = Agent(
            host=host, directory=directory, log=log, stack=stack, process=process
        )
        return agent

    async def wait_known(self, hosts: int) -> None:
        """So many agents have reported to the service, and are ready."""

        async def known() -> bool:
            self.check()
            answer = await self.api.get("/v1/hosts", limit=1000)
            return len(answer["hosts"]) >= hosts

        await testing.eventually(known, seconds=START_SECONDS, every_seconds=0.2)
        for host in self.agents:
            address = self.course.rig.hosts[host].address
            await testing.wait_ready(f"http://{address}:{AGENT_PORT}")

    def check(self) -> None:
        """Every agent runs.

        Raises:
            RuntimeError: one has ended; what it said last is in the message.
        """
        for agent in self.agents.values():
            if agent.process.returncode is not None:
                tail = agent.log.read_text().splitlines()[-3:]
                raise RuntimeError(f"{agent.host}'s agent ended: {tail}")

    async def fetch_image(self) -> None:
        """The source is fetched and hashed by the service; no host that exists wants it."""
        source = self.course.source
        body = {
            "image_id": self.image_id,
            "hosts": ["nobody"],
            "image": {
                "image_id": self.image_id,
                "fetcher": "file",
                "location": f"file://{source}",
                "disk_format": "raw",
                "os_hash_algo": "sha512",
                "os_hash_value": await asyncio.to_thread(_sha512, source),
            },
        }
        made = await self.api.post("/v1/distributions", body)

        async def fetched() -> str | None:
            image = await self.api.get(f"/v1/images/{self.image_id}")
            if image["state"] == "error":
                raise RuntimeError(f"the image was not fetched: {image['reason']}")
            return image["blob_id"] if image["state"] == "ready" else None

        blob_id = await testing.eventually(fetched, seconds=START_SECONDS)
        await self.api.delete(f"/v1/distributions/{made['distribution_id']}")
        address = self.course.rig.hosts[SEED].address
        url = f"http://{address}:{API_PORT}/v1/blobs/{blob_id}/growth"
        asked = {"after": 0, "most": following.FIRST_PIECES}
        async with (
            aiohttp.ClientSession(raise_for_status=True) as session,
            session.get(url, params=asked) as answer,
        ):
            told = await answer.read()
        # what a host is told before it can ask for a piece, and then some of the first piece
        self.first_payload_bytes = len(told) + 32_000

    async def distribute(self) -> str:
        """Tell the hosts to have the image; the distribution."""
        made = await self.api.post(
            "/v1/distributions", {"image_id": self.image_id, "hosts": sorted(self.agents)}
        )
        distribution_id: str = made["distribution_id"]
        return distribution_id

    async def told(self, distribution_id: str, hosts: int) -> Mapping[str, Any]:
        """The distribution once so many hosts have reported that they have the image."""
        size = self.course.size_bytes

        async def all_told() -> Mapping[str, Any] | None:
            found: Mapping[str, Any] = await self.api.get(f"/v1/distributions/{distribution_id}")
            sent = found["seed_sent_bytes"] + found["peers_sent_bytes"]
            cached = found["host_states"].get("cached", 0)
            return found if cached >= hosts and sent >= hosts * size else None

        with contextlib.suppress(TimeoutError):  # what is missing then is seen in the figures
            await testing.eventually(all_told, seconds=TOLD_SECONDS, every_seconds=0.5)
        answer: Mapping[str, Any] = await self.api.get(f"/v1/distributions/{distribution_id}")
        return answer


def _program(name: str) -> Path:
    return Path(sys.executable).parent / name


def _sha512(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha512").hexdigest()


@asynccontextmanager
async def cloud(
    stage: bench.Stage,
    course: Course,
    *,
    settings: Mapping[str, str] | None = None,
    is_fetched: bool = True,
) -> AsyncIterator[Cloud]:
    """Everything runs, the image is at the seed unless it is not to be, and no agent knows of it.

    `settings` are added to the environment of all processes.
    """
    rig, seed = course.rig, course.rig.hosts[SEED].address
    vhost, database = stage.new_vhost(), await stage.new_database()
    await db.migrate(database, schema="precache", package="hostler_precache")
    async with AsyncExitStack() as stack:
        assert stage.rabbitmq is not None
        port = await stack.enter_async_context(
            network_relay.relay(stage.rabbitmq.port, address=rig.control_address)
        )
        await stack.enter_async_context(
            network_relay.relay(stage.postgres.port, address=rig.directory / ".s.PGSQL.5432")
        )
        amqp_url = f"amqp://guest:guest@{rig.control_address}:{port}/{vhost.rpartition('/')[2]}"
        environment = {
            "HOSTLER_AMQP_URL": amqp_url,
            "HOSTLER_LOG_FORMAT": "json",
            **(settings or {}),
        }
        data = rig.directory / "seed-data"
        service = {
            **environment,
            "HOSTLER_DATABASE_URL": f"postgresql://postgres@/{database.rpartition('/')[2]}?host={rig.directory}",
            "HOSTLER_AUTH_MODE": "none",
            "HOSTLER_AUTH_ALLOW_NONE": "true",
            "HOSTLER_PRECACHE_HTTP_HOST": seed,
            "HOSTLER_PRECACHE_HTTP_PORT": str(API_PORT),
            "HOSTLER_PRECACHE_PUBLIC_URL": f"http://{seed}:{API_PORT}",
            "HOSTLER_PRECACHE_BLOB_PORT": str(BLOB_PORT),
            "HOSTLER_PRECACHE_SEED_URL": f"http://{seed}:{BLOB_PORT}",
            "HOSTLER_PRECACHE_DATA_DIR": str(data),
            "HOSTLER_PRECACHE_RESERVE_BYTES": "0",
            "HOSTLER_PRECACHE_LINK_BYTES_PER_SECOND": str(rig.hosts[SEED].rate_bps // 8),
            "HOSTLER_PRECACHE_FILE_ROOTS": str(rig.directory),
        }
        log = rig.directory / "service.log"
        process = await stack.enter_async_context(
            rig.process(SEED, _program("hostler-precache"), "serve", environment=service, log=log)
        )
        try:
            await testing.wait_ready(f"http://{seed}:{API_PORT}")
        except TimeoutError as exc:
            tail = log.read_text().splitlines()[-3:]
            raise RuntimeError(f"the service is {process.returncode}: {tail}") from exc
        api = await stack.enter_async_context(
            client.open_api(f"http://{seed}:{API_PORT}", timeout_seconds=60.0)
        )
        made = Cloud(
            course=course,
            api=api,
            image_id=str(uuid.uuid4()),
            agents={},
            environment=environment,
            amqp_url=amqp_url,
        )
        stack.push_async_callback(made._stack.aclose)
        if is_fetched:
            await made.fetch_image()
        for host in course.receivers:
            await made.start_agent(host)
        await made.wait_known(len(course.receivers))
        yield made
    stage.drop_vhost(vhost)
    await stage.drop_database(database)


def keep_logs(rig: Rig, directory: Path) -> None:
    """What the processes on the rig have written is in the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for log in rig.directory.glob("*.log"):
        shutil.copy(log, directory)


# --- a run


@asynccontextmanager
async def _fanout(cloud: Cloud) -> AsyncIterator["asyncio.Future[float]"]:
    """The moment at which the call reached those who listen for it, as a foreign compute agent sees it."""
    came: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    async def heard(_: object) -> None:
        if not came.done():
            came.set_result(time.monotonic())

    exchange = messages.fanout_exchange(durable=False)
    async with await aio_pika.connect(cloud.amqp_url) as connection:
        channel = await connection.channel()
        queue = await channel.declare_queue(exclusive=True)
        await queue.bind(exchange.name)
        await queue.consume(heard, no_ack=True)
        yield came


During = Callable[[Cloud, Clock], Awaitable[None]]


async def run(
    stage: bench.Stage,
    course: Course,
    *,
    during: During | None = None,
    after: Callable[[Cloud], Awaitable[Mapping[str, float]]] | None = None,
    settings: Mapping[str, str] | None = None,
    racer: str = NAME,
    logs: Path | None = None,
) -> Result:
    """One distribution on a fresh cloud; see `swarm_race.race`.

    `after` adds what it saw when that was over; the logs of all processes are kept in the directory `logs`.
    """
    async with cloud(stage, course, settings=settings) as made, _fanout(made) as came:
        told: list[str] = []

        async def start() -> float:
            told.append(await made.distribute())
            return await asyncio.wait_for(came, 30.0)

        async def beside(clock: Clock) -> None:
            if during is not None:
                await during(made, clock)

        try:
            result = await swarm_race.race(
                course,
                racer,
                made.directories,
                start,
                file=made.image_id,
                first_bytes=made.first_payload_bytes,
                during=beside if during is not None else None,
            )
        finally:
            if logs is not None:
                keep_logs(course.rig, logs)
        answer = await made.told(told[0], len(result.done_seconds))
        received = len(result.done_seconds) * course.size_bytes
        seen = dict(await after(made)) if after is not None else {}
        extra = {
            "seed_payload_copies": answer["seed_sent_bytes"] / course.size_bytes,
            "duplicate_share": sum(host["wasted_bytes"] for host in answer["progress"]) / received,
            "agent_rss_mb": max(bench.rss_mb(one.process.pid) for one in made.agents.values()),
            **seen,
        }
        shutil.rmtree(course.rig.directory / "seed-data", ignore_errors=True)
        for directory in made.directories.values():
            shutil.rmtree(directory, ignore_errors=True)
    return dataclasses.replace(result, extra=extra)
