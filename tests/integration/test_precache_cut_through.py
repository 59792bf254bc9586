"""Processes die while an image still comes from its source: nothing is fetched twice, nothing mixes."""

import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from hostler_common import client, db, servers
from hostler_common.testing import eventually
from hostler_precache import app, testing

MIB = 1 << 20
PIECE = 256 * 1024
SIZE = 20 * MIB + 12_345
HALF = 10 * MIB
DATA = testing.image_of(SIZE)
# of another process of the suite there may be many on a busy machine
SECONDS = 60.0

Agent = Callable[[str], AbstractAsyncContextManager[testing.Program]]


class Service:
    """`async with service() as program`: always at the same addresses, with the same files."""

    def __init__(self, amqp_url: str, database_url: str, directory: Path) -> None:
        self._amqp_url = amqp_url
        self._database_url = database_url
        self._directory = directory
        self._settings = {"http_port": servers.free_port(), "blob_port": servers.free_port()}
        self.url = f"http://127.0.0.1:{self._settings['http_port']}"

    def __call__(self) -> AbstractAsyncContextManager[testing.Program]:
        return testing.service_process(
            self._directory,
            amqp_url=self._amqp_url,
            database_url=self._database_url,
            settings=self._settings,
        )


@pytest_asyncio.fixture
async def service(amqp_url: str, database_url: str, tmp_path: Path) -> Service:
    """A service that is not started yet."""
    await db.migrate(database_url, schema="precache", package=app.PACKAGE)
    return Service(amqp_url, database_url, tmp_path / "seed")


@pytest.fixture
def agent(amqp_url: str, tmp_path: Path, service: Service) -> Agent:
    """`async with agent(host) as program`."""

    def start(host: str) -> AbstractAsyncContextManager[testing.Program]:
        return testing.agent_process(
            host, tmp_path / host, amqp_url=amqp_url, precache_url=service.url
        )

    return start


@pytest_asyncio.fixture
async def source() -> AsyncIterator[testing.Source]:
    """A source that sends one half, and then waits."""
    async with testing.http_source() as served:
        served.pause_after = HALF
        yield served


async def distribute(url: str, source: testing.Source, hosts: list[str]) -> tuple[str, str]:
    """The image and its distribution."""
    image_id = str(uuid.uuid4())
    body = testing.request_of(image_id, source.add("image", DATA), DATA, hosts=hosts)
    async with client.open_api(url) as api:
        made = await api.post("/v1/distributions", body)
    return image_id, made["distribution_id"]


async def distribution(url: str, distribution_id: str) -> Mapping[str, Any]:
    async with client.open_api(url) as api:
        found: Mapping[str, Any] = await api.get(f"/v1/distributions/{distribution_id}")
    return found


async def half_way(url: str, distribution_id: str) -> str:
    """Every host has the half that the source has sent; the blob's id."""

    async def has() -> str | None:
        found = await distribution(url, distribution_id)
        done = [host["pieces_done"] for host in found["progress"]]
        return found["blob_id"] if min(done) >= HALF // PIECE else None

    blob_id: str = await eventually(has, seconds=SECONDS)
    return blob_id


async def ended(url: str, distribution_id: str) -> Mapping[str, Any]:
    async with client.open_api(url) as api:
        return await testing.ended(api, distribution_id)


async def received(database_url: str, host: str) -> list[int]:
    """What each run of the host's agent has received, wasted bytes and all, the first one first."""
    database = await asyncpg.connect(database_url)
    rows = await database.fetch(
        "SELECT received_from_seed_bytes + received_from_peers_bytes + wasted_bytes AS n"
        " FROM precache.transfer WHERE host = $1 AND NOT is_seed ORDER BY ctid",
        host,
    )
    await database.close()
    return [row["n"] for row in rows]


async def killed_with_half(victim: testing.Program) -> None:
    """The agent is killed when it has journaled what comes before the source pauses."""

    async def kept() -> bool:
        return len(victim.journaled()) == HALF // PIECE

    await eventually(kept)
    await victim.kill()


async def test_a_seed_killed_while_it_fetches_goes_on_with_what_hosts_have(
    service: Service, agent: Agent, source: testing.Source, database_url: str
) -> None:
    hosts = ["host-1", "host-2"]
    async with AsyncExitStack() as stack:
        async with service() as first:
            agents = [await stack.enter_async_context(agent(host)) for host in hosts]
            image_id, distribution_id = await distribute(service.url, source, hosts)
            blob_id = await half_way(service.url, distribution_id)
            await first.kill()
        assert not any((one.directory / image_id).exists() for one in agents)
        source.pause_after = None
        source.go_on.set()
        async with service():
            found = await ended(service.url, distribution_id)
            assert found["host_states"] == {"cached": 2}
            assert found["blob_id"] == blob_id
        assert all((one.directory / image_id).read_bytes() == DATA for one in agents)
        # asked for the rest, a source without ranges sends all of it
        assert source.requests == ["image", "image", "image"]
        for host in hosts:
            assert await received(database_url, host) == [SIZE]


@pytest.mark.parametrize("ending", ["killed", "told to stop"])
async def test_a_seed_that_starts_again_asks_a_source_with_ranges_for_the_rest_only(
    service: Service, agent: Agent, source: testing.Source, database_url: str, ending: str
) -> None:
    source.has_ranges = True
    async with AsyncExitStack() as stack:
        async with service() as first:
            one = await stack.enter_async_context(agent("host-1"))
            image_id, distribution_id = await distribute(service.url, source, ["host-1"])
            await half_way(service.url, distribution_id)
            if ending == "killed":
                await first.kill()
        source.pause_after = None
        source.go_on.set()
        async with service() as second:
            found = await ended(service.url, distribution_id)
            assert found["host_states"] == {"cached": 1}
            (event,) = second.events("fetch_finished")
        assert (one.directory / image_id).read_bytes() == DATA
        assert source.ranges == [f"bytes={HALF}-"]
        assert event["left_bytes"] == HALF
        assert await received(database_url, "host-1") == [SIZE]


async def test_a_seed_that_finds_other_bytes_when_it_starts_again_mixes_nothing(
    service: Service, agent: Agent, source: testing.Source
) -> None:
    other = bytes([DATA[0] ^ 1]) + DATA[1:]
    async with AsyncExitStack() as stack:
        async with service() as first:
            one = await stack.enter_async_context(agent("host-1"))
            image_id = str(uuid.uuid4())
            image = {"image_id": image_id, "location": source.add("image", DATA)}
            async with client.open_api(service.url) as api:
                made = await api.post(
                    "/v1/distributions",
                    {"image_id": image_id, "image": image, "hosts": ["host-1"]},
                )
            blob_id = await half_way(service.url, made["distribution_id"])
            await first.kill()
        source.add("image", other)
        source.pause_after = None
        async with service():
            found = await ended(service.url, made["distribution_id"])
            assert found["host_states"] == {"cached": 1}
            assert found["blob_id"] != blob_id
        assert (one.directory / image_id).read_bytes() == other


async def test_an_agent_killed_while_the_image_comes_goes_on_where_it_was(
    service: Service, agent: Agent, source: testing.Source, database_url: str
) -> None:
    async with service(), AsyncExitStack() as stack:
        victim = await stack.enter_async_context(agent("host-1"))
        image_id, distribution_id = await distribute(service.url, source, ["host-1"])
        await half_way(service.url, distribution_id)
        await killed_with_half(victim)
        again = await stack.enter_async_context(agent("host-1"))

        async def began() -> bool:
            return bool(again.events("transfer_started"))

        await eventually(began, seconds=SECONDS)
        (event,) = again.events("transfer_started")
        assert event["resumed_pieces"] == HALF // PIECE
        source.go_on.set()
        found = await ended(service.url, distribution_id)
        assert found["host_states"] == {"cached": 1}
        assert (again.directory / image_id).read_bytes() == DATA
        assert await received(database_url, "host-1") == [HALF, SIZE - HALF]


async def test_an_agent_that_is_back_when_all_has_come_goes_on_where_it_was(
    service: Service, agent: Agent, source: testing.Source, database_url: str
) -> None:
    async with service(), AsyncExitStack() as stack:
        victim = await stack.enter_async_context(agent("host-1"))
        image_id, distribution_id = await distribute(service.url, source, ["host-1"])
        await half_way(service.url, distribution_id)
        await killed_with_half(victim)
        source.go_on.set()

        async def ready() -> bool:
            async with client.open_api(service.url) as api:
                return bool((await api.get(f"/v1/images/{image_id}"))["state"] == "ready")

        await eventually(ready, seconds=SECONDS)
        again = await stack.enter_async_context(agent("host-1"))
        found = await ended(service.url, distribution_id)
        assert found["host_states"] == {"cached": 1}
        assert (again.directory / image_id).read_bytes() == DATA
        (event,) = again.events("transfer_started")
        assert event["resumed_pieces"] == HALF // PIECE
        assert await received(database_url, "host-1") == [HALF, SIZE - HALF]
