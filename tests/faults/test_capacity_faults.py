"""Servers and processes killed in the middle of a storm of claims: nothing lost, nothing oversold."""

import asyncio
import contextlib
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import asyncpg

from hostler_capacity import claim_store, storm
from hostler_common import client, db, errors, hosts
from hostler_common.servers import Postgres, free_port
from hostler_common.testing import eventually, open_bus, wait_ready

FITS = 60
CLAIMS = 150
SMALL_MB = 2048 + 20


class Service:
    """A capacity process that can be killed and started again at the same address."""

    def __init__(self, amqp_url: str, database_url: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._environment = {
            "HOSTLER_AMQP_URL": amqp_url,
            "HOSTLER_DATABASE_URL": database_url,
            "HOSTLER_CAPACITY_HTTP_PORT": str(self.port),
            "HOSTLER_AUTH_MODE": "none",
            "HOSTLER_LOG_LEVEL": "ERROR",
        }
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "hostler_capacity", "serve", env=self._environment
        )
        await wait_ready(self.url)

    async def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        await self._process.wait()

    async def close(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            await self._process.wait()


@asynccontextmanager
async def running(amqp_url: str, database_url: str) -> AsyncIterator[Service]:
    await db.migrate(database_url, schema="capacity", package="hostler_capacity")
    service = Service(amqp_url, database_url)
    try:
        await service.start()
        async with client.open_api(service.url) as api:
            await api.post("/v1/flavors", {"name": "m1.small", "memory_mb": 2048, "vcpus": 1})
        yield service
    finally:
        await service.close()


async def publish_report(amqp_url: str, sizes: Mapping[str, int]) -> None:
    async with open_bus(amqp_url) as bus:
        for host, memory_mb in sizes.items():
            node = hosts.NodeRecord(
                hypervisor_hostname=host,
                hypervisor_type="xen",
                memory_mb=memory_mb,
                vcpus=64,
                guests=[],
            )
            for part in hosts.split(
                host=host, reported_at=datetime.now(UTC), report_id=uuid.uuid4(), nodes=[node]
            ):
                await bus.publish(hosts.HOST_REPORTED.message(part, app_id="test", host=host))


async def total(url: str) -> int:
    async with client.open_api(url) as api:
        return int((await api.get("/v1/fit", flavor="m1.small"))["total"])


async def wait_for_total(url: str, wanted: int) -> None:
    async def holds() -> bool:
        with contextlib.suppress(errors.Unavailable):
            return await total(url) == wanted
        return False

    await eventually(holds)


async def live_claims(database_url: str) -> set[str]:
    connection = await asyncpg.connect(database_url, server_settings={"search_path": "capacity"})
    try:
        assert await claim_store.imbalances(connection) == []
        rows = await connection.fetch("SELECT id FROM claim WHERE state IN ('held', 'confirmed')")
        return {str(row["id"]) for row in rows}
    finally:
        await connection.close()


async def claimed_while(
    url: str, database_url: str, strike: Callable[[], Awaitable[None]]
) -> storm.Outcome:
    """What came of a storm during which, once some claims were granted, something broke."""
    async with asyncio.TaskGroup() as group:
        task = group.create_task(
            storm.storm(
                [url],
                flavor="m1.small",
                count=CLAIMS,
                project="p",
                patience_seconds=90,
                connections=8,
            )
        )

        async def some_granted() -> bool:
            return len(await live_claims(database_url)) >= 5

        await eventually(some_granted, every_seconds=0.01)
        assert not task.done()
        await strike()
    return task.result()


async def test_a_service_killed_in_a_storm_loses_no_claim_and_oversells_none(
    amqp_url: str, database_url: str
) -> None:
    async with running(amqp_url, database_url) as service:
        await publish_report(amqp_url, {f"hv{n}": SMALL_MB * 20 + 7 for n in range(3)})
        await wait_for_total(service.url, FITS)

        async def strike() -> None:
            await service.kill()
            await service.start()

        outcome = await claimed_while(service.url, database_url, strike)

        assert outcome.unexpected == []
        assert outcome.unanswered == 0
        assert outcome.retries > 0
        assert len(outcome.granted) == FITS
        assert outcome.refused == CLAIMS - FITS
        assert await live_claims(database_url) == set(outcome.granted)


async def test_a_database_killed_in_a_storm_loses_no_claim_and_oversells_none(
    amqp_url: str, server_directory: Path
) -> None:
    postgres = Postgres(server_directory / f"capacity-{uuid.uuid4().hex[:8]}", durable=True)
    postgres.start()
    try:
        async with running(amqp_url, postgres.url) as service:
            await publish_report(amqp_url, {f"hv{n}": SMALL_MB * 20 + 7 for n in range(3)})
            await wait_for_total(service.url, FITS)

            async def strike() -> None:
                await asyncio.to_thread(postgres.kill)
                async with client.open_api(service.url) as api:
                    with contextlib.suppress(errors.Unavailable):
                        await api.get("/readyz")
                        raise AssertionError("ready without a database")
                await asyncio.to_thread(postgres.start)

            outcome = await claimed_while(service.url, postgres.url, strike)

            assert outcome.unexpected == []
            assert outcome.unanswered == 0
            assert outcome.retries > 0
            assert len(outcome.granted) == FITS
            assert outcome.refused == CLAIMS - FITS
            assert await live_claims(postgres.url) == set(outcome.granted)
            await wait_ready(service.url)
    finally:
        postgres.kill()


async def test_reports_sent_while_the_service_was_down_are_applied_when_it_is_back(
    amqp_url: str, database_url: str
) -> None:
    async with running(amqp_url, database_url) as service:
        await publish_report(amqp_url, {"hv0": SMALL_MB * 2})
        await wait_for_total(service.url, 2)
        await service.kill()

        await publish_report(amqp_url, {"hv0": SMALL_MB * 5, "hv1": SMALL_MB * 4})
        await service.start()

        await wait_for_total(service.url, 9)
