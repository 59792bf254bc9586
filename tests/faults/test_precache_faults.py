"""Processes and servers die under precache: nothing half-written shows, and all ends as it should."""

import asyncio
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from hostler_common import client, db, servers
from hostler_common.testing import RunService, eventually, wait_ready
from hostler_precache import app, testing

MIB = 1 << 20
DATA = testing.image_of(12 * MIB + 99)
PIECES = 49


def request(image_id: str, url: str, hosts: list[str]) -> dict[str, Any]:
    return testing.request_of(image_id, url, DATA, hosts=hosts)


def placed(agent: testing.Program, image_id: str) -> bool:
    file = agent.directory / image_id
    return file.exists() and file.read_bytes() == DATA


def _service(
    seed: Path, amqp_url: str, database_url: str
) -> AbstractAsyncContextManager[testing.Program]:
    return testing.service_process(seed, amqp_url=amqp_url, database_url=database_url)


async def test_a_service_killed_while_it_fetches_fetches_again_and_serves_nothing_half(
    amqp_url: str, database_url: str, tmp_path: Path
) -> None:
    await db.migrate(database_url, schema="precache", package=app.PACKAGE)
    image_id, seed = str(uuid.uuid4()), tmp_path / "seed"
    async with testing.http_source() as source:
        source.break_after, source.hold = 3 * MIB, asyncio.Event()
        async with _service(seed, amqp_url, database_url) as first:
            async with client.open_api(first.url) as api:
                body = request(image_id, source.add("image", DATA), ["host-1"])
                made = await api.post("/v1/distributions", body)

                async def half_way() -> bool:
                    image = await api.get(f"/v1/images/{image_id}")
                    return bool(image["fetched_bytes"] > MIB)

                await eventually(half_way)
            await first.kill()
        assert [file.suffix for file in seed.iterdir()] == [".part"]
        source.break_after = None
        source.hold.set()
        async with (
            _service(seed, amqp_url, database_url) as second,
            client.open_api(second.url) as api,
            testing.agent_process(
                "host-1", tmp_path / "host-1", amqp_url=amqp_url, precache_url=second.url
            ) as agent,
        ):
            answer = await testing.ended(api, made["distribution_id"])
            assert answer["host_states"] == {"cached": 1}
            assert placed(agent, image_id)
            assert len(list(seed.iterdir())) == 1


async def test_a_swarm_finishes_without_its_tracker(
    run_service: RunService, amqp_url: str, tmp_path: Path
) -> None:
    image_id, port = str(uuid.uuid4()), servers.free_port()
    is_up = True

    async with (
        testing.http_source() as source,
        testing.gate(port, passes=PIECES // 2) as (seed_url, gate),
        testing.service(run_service, tmp_path, blob_port=port, seed_url=seed_url) as service,
        aiohttp.ClientSession() as session,
    ):

        async def forward(request: web.Request) -> web.StreamResponse:
            if not is_up and request.transport is not None:
                request.transport.abort()
            url, body = service.url + request.path_qs, await request.read()
            kind = {"Content-Type": "application/json"}
            async with session.request(request.method, url, data=body, headers=kind) as answer:
                return web.json_response(body=await answer.read(), status=answer.status)

        async with (
            testing.http_server(forward) as tracker_url,
            testing.agent_process(
                "host-1", tmp_path / "host-1", amqp_url=amqp_url, precache_url=tracker_url
            ) as one,
            testing.agent_process(
                "host-2", tmp_path / "host-2", amqp_url=amqp_url, precache_url=tracker_url
            ) as two,
        ):
            body = request(image_id, source.add("image", DATA), ["host-1", "host-2"])
            made = await service.api.post("/v1/distributions", body)

            async def half_way() -> bool:
                path = f"/v1/distributions/{made['distribution_id']}"
                hosts = (await service.api.get(path))["progress"]
                return all(host["pieces_done"] >= PIECES // 2 for host in hosts)

            await eventually(half_way)
            is_up = False

            async def is_noticed() -> bool:
                return bool(one.events("report_failed") and two.events("report_failed"))

            await eventually(is_noticed)
            gate.is_open.set()

            async def both_have_it() -> bool:
                return placed(one, image_id) and placed(two, image_id)

            await eventually(both_have_it)
            is_up = True
            answer = await testing.ended(service.api, made["distribution_id"])
            assert answer["host_states"] == {"cached": 2}


async def test_what_is_asked_for_while_the_broker_is_away_is_announced_when_it_is_back(
    run_service: RunService, own_rabbitmq: servers.RabbitMQ, tmp_path: Path
) -> None:
    image_id, url = str(uuid.uuid4()), own_rabbitmq.url
    async with (
        testing.http_source() as source,
        testing.service(run_service, tmp_path, amqp_url=url) as service,
        testing.agent_process(
            "host-1",
            tmp_path / "host-1",
            amqp_url=url,
            precache_url=service.url,
            settings={"desired_seconds": 3600},
        ) as agent,
    ):
        await asyncio.to_thread(own_rabbitmq.stop)
        body = request(image_id, source.add("image", DATA), ["host-1"])
        made = await service.api.post("/v1/distributions", body)

        async def is_fetched() -> bool:
            return bool((await service.api.get(f"/v1/images/{image_id}"))["state"] == "ready")

        await eventually(is_fetched)
        assert agent.events("cache_called") == []
        await asyncio.to_thread(own_rabbitmq.start)

        # the fanout that waited may find the agent's queue not there yet: the next one will not
        async def is_back() -> bool:
            return len(agent.events("broker_connected")) >= 4

        await eventually(is_back)
        if not agent.events("cache_called"):
            await service.api.post("/v1/distributions", {"image_id": image_id})
        answer = await testing.ended(service.api, made["distribution_id"])
        assert answer["host_states"] == {"cached": 1}
        assert placed(agent, image_id)


async def half_way(api: client.Api, distribution_id: str) -> None:
    """Its one host has what comes before the source pauses."""

    async def has_come() -> bool:
        (host,) = (await api.get(f"/v1/distributions/{distribution_id}"))["progress"]
        return bool(host["pieces_done"] >= 6 * MIB // (256 * 1024))

    await eventually(has_come)


@pytest.mark.parametrize("back", ["while it comes", "when all of it has come"])
async def test_an_image_whose_database_is_killed_while_it_comes_reaches_its_hosts_all_the_same(
    run_service: RunService,
    own_postgres: servers.Postgres,
    amqp_url: str,
    tmp_path: Path,
    back: str,
) -> None:
    image_id = str(uuid.uuid4())
    async with (
        testing.http_source() as source,
        testing.service(
            run_service, tmp_path, database_url=own_postgres.url, log_level="ERROR"
        ) as service,
        testing.agent_process(
            "host-1", tmp_path / "host-1", amqp_url=amqp_url, precache_url=service.url
        ) as agent,
    ):
        source.pause_after = 6 * MIB
        body = request(image_id, source.add("image", DATA), ["host-1"])
        made = await service.api.post("/v1/distributions", body)
        await half_way(service.api, made["distribution_id"])
        await asyncio.to_thread(own_postgres.kill)

        async def is_noticed() -> bool:
            return bool(agent.events("report_failed"))

        await eventually(is_noticed)
        if back == "when all of it has come":
            source.go_on.set()

            async def has_come() -> bool:
                names = [file.suffix for file in (tmp_path / "seed").iterdir()]
                return names == [""]

            await eventually(has_come)
            assert not (agent.directory / image_id).exists()  # nobody has said that it is whole
        await asyncio.to_thread(own_postgres.start)
        await wait_ready(service.url, seconds=60)
        source.go_on.set()
        answer = await testing.ended(service.api, made["distribution_id"])
        assert answer["host_states"] == {"cached": 1}
        assert placed(agent, image_id)
        assert source.requests == ["image"]
        (host,) = answer["progress"]
        assert (host["received_from_seed_bytes"], host["wasted_bytes"]) == (len(DATA), 0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB. Mounting takes root."""
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(path)], check=True)
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


async def test_a_seeds_disk_that_fills_while_an_image_comes_is_said_and_the_next_try_succeeds(
    run_service: RunService, amqp_url: str, tmp_path: Path, small_disk: Path
) -> None:
    image_id = str(uuid.uuid4())
    async with (
        testing.http_source() as source,
        testing.service(run_service, small_disk, log_level="ERROR") as service,
        testing.agent_process(
            "host-1", tmp_path / "host-1", amqp_url=amqp_url, precache_url=service.url
        ) as agent,
    ):
        source.pause_after = 6 * MIB
        body = request(image_id, source.add("image", DATA), ["host-1"])
        made = await service.api.post("/v1/distributions", body)
        await half_way(service.api, made["distribution_id"])
        ballast = small_disk / "ballast"
        ballast.write_bytes(bytes(8 * MIB))
        source.go_on.set()
        answer = await testing.ended(service.api, made["distribution_id"])
        assert (answer["state"], answer["reason"].split(":")[0]) == ("error", "storage.no_space")
        assert list((small_disk / "seed").iterdir()) == []

        async def is_clean() -> bool:
            return not list((agent.directory / ".precache").glob("*.part"))

        await eventually(is_clean)
        assert not (agent.directory / image_id).exists()
        ballast.unlink()
        again = await service.api.post("/v1/distributions", {"image_id": image_id})
        answer = await testing.ended(service.api, again["distribution_id"])
        assert answer["host_states"] == {"cached": 1}
        assert placed(agent, image_id)


@pytest.mark.parametrize("full", ["while it comes", "when it begins"])
async def test_a_hosts_disk_that_fills_is_said_and_the_image_is_there_when_there_is_room_again(
    run_service: RunService, amqp_url: str, tmp_path: Path, small_disk: Path, full: str
) -> None:
    image_id = str(uuid.uuid4())
    async with (
        testing.http_source() as source,
        testing.service(run_service, tmp_path, log_level="ERROR") as service,
        testing.agent_process(
            "host-1",
            small_disk,
            amqp_url=amqp_url,
            precache_url=service.url,
            settings={"retry_seconds": 0.5},
        ) as agent,
    ):
        ballast = small_disk / "ballast"
        body = request(image_id, source.add("image", DATA), ["host-1"])
        if full == "while it comes":
            source.pause_after = 6 * MIB
            made = await service.api.post("/v1/distributions", body)
            await half_way(service.api, made["distribution_id"])
            ballast.write_bytes(bytes(8 * MIB))
            source.go_on.set()
        else:
            ballast.write_bytes(bytes(8 * MIB))
            made = await service.api.post("/v1/distributions", body)
        path = f"/v1/distributions/{made['distribution_id']}"

        async def is_said() -> bool:
            (host,) = (await service.api.get(path))["progress"]
            word = (host["reason"] or "").split(":")[0]
            return (host["state"], word) == ("error", "storage.no_space")

        await eventually(is_said)
        assert not (agent.directory / image_id).exists()
        ballast.unlink()

        async def is_there() -> bool:
            return bool((await service.api.get(path))["host_states"] == {"cached": 1})

        await eventually(is_there, seconds=60)
        assert placed(agent, image_id)
