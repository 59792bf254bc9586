"""Four client processes race for the last places of two capacity processes."""

import asyncio
import json
import sys
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest

from hostler_capacity import claim_store
from hostler_common import client, db, hosts
from hostler_common.servers import free_port
from hostler_common.testing import eventually, open_bus, wait_ready

CLIENTS = 4
CLAIMS = 200


@asynccontextmanager
async def process(
    argv: Sequence[str], environment: Mapping[str, str]
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A Python process of the suite, stopped on leaving."""
    started = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        *argv,
        env=dict(environment),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield started
    finally:
        if started.returncode is None:
            started.terminate()
        await started.communicate()


async def report(amqp_url: str, memory_mb: Mapping[str, int]) -> None:
    """Each host reports that much memory, with one guest of 1 GB that is not ours."""
    async with open_bus(amqp_url) as bus:
        for host, size in memory_mb.items():
            record = hosts.NodeRecord(
                hypervisor_hostname=host,
                hypervisor_type="xen",
                memory_mb=size,
                vcpus=64,
                local_gb=4000,
                guests=[hosts.GuestRecord(uuid=uuid.uuid4(), memory_mb=1024, vcpus=1)],
            )
            for part in hosts.split(
                host=host, reported_at=datetime.now(UTC), report_id=uuid.uuid4(), nodes=[record]
            ):
                await bus.publish(hosts.HOST_REPORTED.message(part, app_id="test", host=host))


async def race(urls: Sequence[str], count: int) -> list[dict[str, Any]]:
    """What each of the client processes got, all having started together."""
    argv = ["hostler_capacity.storm", *urls, "--flavor", "m1.small", "--count", str(count)]
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(process(argv, {"PATH": ""})) for _ in range(CLIENTS)
        ]
        for each in clients:
            assert each.stdout is not None
            assert await each.stdout.readline() == b"ready\n"
        outputs = await asyncio.gather(*(each.communicate(b"go\n") for each in clients))
    return [json.loads(output) for output, _ in outputs]


@pytest.mark.parametrize("turn", range(3))
async def test_exactly_as_many_are_granted_as_fit(
    amqp_url: str, database_url: str, turn: int
) -> None:
    await db.migrate(database_url, schema="capacity", package="hostler_capacity")
    ports = [free_port(), free_port()]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    common = {
        "HOSTLER_AMQP_URL": amqp_url,
        "HOSTLER_DATABASE_URL": database_url,
        "HOSTLER_AUTH_MODE": "none",
        "HOSTLER_LOG_LEVEL": "WARNING",
    }
    async with AsyncExitStack() as stack:
        for port in ports:
            environment = {**common, "HOSTLER_CAPACITY_HTTP_PORT": str(port)}
            await stack.enter_async_context(process(["hostler_capacity", "serve"], environment))
        for url in urls:
            await wait_ready(url)
        apis = [await stack.enter_async_context(client.open_api(url)) for url in urls]
        await apis[0].post(
            "/v1/flavors", {"name": "m1.small", "memory_mb": 2048, "vcpus": 1, "disk_gb": 20}
        )
        # of 2048 + 20 MB each: 2 + 4 + 12 + 20 places beside a guest of 1024 + 12 MB
        sizes = {"hv1": 5500, "hv2": 9500, "hv3": 26000, "hv4": 42500}
        await report(amqp_url, sizes)

        async def both_see_all() -> bool:
            answers = [await api.get("/v1/fit", flavor="m1.small") for api in apis]
            return [answer["total"] for answer in answers] == [38, 38]

        await eventually(both_see_all)
        fits = {
            host["host"]: host["fits"]
            for host in (await apis[0].get("/v1/fit", flavor="m1.small"))["hosts"]
        }

        outcomes = await race(urls, CLAIMS // CLIENTS)

        granted = [claim_id for outcome in outcomes for claim_id in outcome["granted"]]
        assert [outcome["unexpected"] for outcome in outcomes] == [[]] * CLIENTS
        assert len(set(granted)) == len(granted) == 38
        assert sum(outcome["refused"] for outcome in outcomes) == CLAIMS - 38
        listed = (await apis[1].get("/v1/claims", state="held", limit=1000))["claims"]
        assert {each["id"] for each in listed} == set(granted)
        placed = [each["host"] for each in listed]
        assert {host: placed.count(host) for host in fits} == fits
        connection = await asyncpg.connect(
            database_url, server_settings={"search_path": "capacity"}
        )
        try:
            assert await claim_store.imbalances(connection) == []
        finally:
            await connection.close()
