"""Images reach hosts whose agents are processes of their own, whatever happens to them on the way."""

import hashlib
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from hostler_common import servers
from hostler_common.testing import RunningService, RunService, eventually
from hostler_precache import testing

MIB = 1 << 20
PIECE = 256 * 1024
SIZE = 40 * MIB + 12_345
PIECES = -(-SIZE // PIECE)

Precache = Callable[..., AbstractAsyncContextManager[RunningService]]


@pytest.fixture(scope="module")
def data() -> bytes:
    return testing.image_of(SIZE)


@pytest.fixture
def precache(run_service: RunService, tmp_path: Path) -> Precache:
    """`async with precache(**settings) as service`."""

    return partial(testing.service, run_service, tmp_path)


def sha512(path: Path) -> str:
    return hashlib.sha512(path.read_bytes()).hexdigest()


async def test_three_agents_get_the_image_from_one_copy_of_the_seed(
    precache: Precache, amqp_url: str, tmp_path: Path, data: bytes
) -> None:
    hosts = ["host-1", "host-2", "host-3"]
    image_id = str(uuid.uuid4())
    async with testing.http_source() as source, precache() as service, AsyncExitStack() as stack:
        agents = [
            await stack.enter_async_context(
                testing.agent_process(
                    host, tmp_path / host, amqp_url=amqp_url, precache_url=service.url
                )
            )
            for host in hosts
        ]
        body = testing.request_of(image_id, source.add("image", data), data, hosts=hosts)
        made = await service.api.post("/v1/distributions", body)
        answer = await testing.ended(service.api, made["distribution_id"])
        assert answer["host_states"] == {"cached": 3}
        expected = hashlib.sha512(data).hexdigest()
        assert [sha512(agent.directory / image_id) for agent in agents] == [expected] * 3

        async def told() -> Mapping[str, Any] | None:
            answer = await service.api.get(f"/v1/distributions/{made['distribution_id']}")
            total = answer["seed_sent_bytes"] + answer["peers_sent_bytes"]
            return answer if total >= 3 * len(data) else None

        answer = await eventually(told)
        # a piece that seems stuck may leave twice; nowhere near a copy for each host
        assert len(data) <= answer["seed_sent_bytes"] <= 1.1 * len(data)
        assert answer["peers_sent_bytes"] <= 2 * len(data)


async def test_a_killed_agent_fetches_nothing_again_that_it_had_journaled(
    precache: Precache, amqp_url: str, database_url: str, tmp_path: Path, data: bytes
) -> None:
    hosts = ["host-1", "host-2", "host-3"]
    image_id, port = str(uuid.uuid4()), servers.free_port()
    async with (
        testing.http_source() as source,
        testing.gate(port, passes=PIECES // 2) as (seed_url, gate),
        precache(blob_port=port, seed_url=seed_url) as service,
        AsyncExitStack() as stack,
    ):

        async def start(host: str) -> testing.Program:
            return await stack.enter_async_context(
                testing.agent_process(
                    host, tmp_path / host, amqp_url=amqp_url, precache_url=service.url
                )
            )

        victim = await start("host-1")
        others = [await start(host) for host in hosts[1:]]
        body = testing.request_of(image_id, source.add("image", data), data, hosts=hosts)
        made = await service.api.post("/v1/distributions", body)

        async def half_way() -> bool:
            # every piece that passed the gate has spread to the victim and is journaled
            return len(victim.journaled()) >= PIECES // 2

        await eventually(half_way)
        await victim.kill()
        kept = len(victim.journaled())
        assert kept == PIECES // 2
        assert not (victim.directory / image_id).exists()
        again = await start("host-1")
        gate.is_open.set()
        answer = await testing.ended(service.api, made["distribution_id"])
        assert answer["host_states"] == {"cached": 3}
        expected = hashlib.sha512(data).hexdigest()
        for agent in (again, *others):
            assert sha512(agent.directory / image_id) == expected
        (began,) = again.events("transfer_started")
        assert began["resumed_pieces"] == kept
        database = await asyncpg.connect(database_url)
        sessions = await database.fetch(
            "SELECT received_from_seed_bytes + received_from_peers_bytes AS n, wasted_bytes"
            " FROM precache.transfer WHERE host = 'host-1' AND NOT is_seed ORDER BY n"
        )
        await database.close()
        # the first session's half and the second's are the image, to the byte
        assert (SIZE - kept * PIECE) in [row["n"] for row in sessions]


async def test_a_lying_peer_is_banned_and_none_of_its_bytes_are_kept(
    precache: Precache, amqp_url: str, tmp_path: Path, data: bytes
) -> None:
    image_id, port = str(uuid.uuid4()), servers.free_port()
    liar = testing.Liar(pieces=PIECES)
    async with (
        testing.http_source() as source,
        testing.http_server(liar.handle) as liar_url,
        testing.gate(port, passes=4) as (seed_url, gate),
        precache(blob_port=port, seed_url=seed_url) as service,
    ):
        body = testing.request_of(
            image_id, source.add("image", data), data, hosts=["host-1", "liar"]
        )
        made = await service.api.post("/v1/distributions", body)

        async def ready() -> str | None:
            image = await service.api.get(f"/v1/images/{image_id}")
            return image["blob_id"] if image["state"] == "ready" else None

        report = {
            "distribution_id": made["distribution_id"],
            "blob_id": await eventually(ready),
            "state": "cached",
            "pieces_done": PIECES,
        }
        await service.api.put(
            "/v1/hosts/liar/report",
            {"url": liar_url, "session_id": str(uuid.uuid4()), "blobs": [report]},
        )
        async with testing.agent_process(
            "host-1", tmp_path / "host-1", amqp_url=amqp_url, precache_url=service.url
        ) as agent:

            async def is_banned() -> bool:
                return bool(agent.events("peer_banned"))

            await eventually(is_banned)
            gate.is_open.set()
            answer = await testing.ended(service.api, made["distribution_id"])
            assert answer["host_states"] == {"cached": 2}
            assert sha512(agent.directory / image_id) == hashlib.sha512(data).hexdigest()
            (host,) = (one for one in answer["progress"] if one["host"] == "host-1")
            assert host["received_from_peers_bytes"] == 0
            # a few requests may be on their way when the third bad piece is found
            assert 3 * PIECE <= host["wasted_bytes"] <= liar.asked * PIECE
            assert liar.asked <= 4


async def test_a_host_that_dies_with_the_only_copy_of_pieces_does_not_stop_the_others(
    precache: Precache, amqp_url: str, tmp_path: Path, data: bytes
) -> None:
    image_id, port = str(uuid.uuid4()), servers.free_port()
    async with (
        testing.http_source() as source,
        testing.gate(port, passes=PIECES // 2) as (seed_url, gate),
        precache(blob_port=port, seed_url=seed_url) as service,
        AsyncExitStack() as stack,
    ):
        victim = await stack.enter_async_context(
            testing.agent_process(
                "host-1", tmp_path / "host-1", amqp_url=amqp_url, precache_url=service.url
            )
        )
        body = testing.request_of(
            image_id, source.add("image", data), data, hosts=["host-1", "host-2"]
        )
        made = await service.api.post("/v1/distributions", body)

        async def has_half() -> bool:
            return len(victim.journaled()) >= PIECES // 2

        await eventually(has_half)
        await victim.kill()
        gate.is_open.set()
        async with testing.agent_process(
            "host-2", tmp_path / "host-2", amqp_url=amqp_url, precache_url=service.url
        ) as survivor:

            async def arrived() -> bool:
                return (survivor.directory / image_id).exists()

            await eventually(arrived, seconds=60)
            assert sha512(survivor.directory / image_id) == hashlib.sha512(data).hexdigest()
        answer = await service.api.get(f"/v1/distributions/{made['distribution_id']}")
        assert answer["state"] == "distributing"
