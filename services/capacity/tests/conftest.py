"""Fixtures of capacity's tests: the running service, and a host that reports to it."""

import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import pytest_asyncio

from hostler_capacity import app
from hostler_capacity.settings import Settings
from hostler_common import client, hosts
from hostler_common.bus import Bus
from hostler_common.hosts import GuestRecord, HostReport, NodeRecord
from hostler_common.testing import RunningService, RunService, eventually, open_bus


def _node(name: str = "hv1", **values: Any) -> NodeRecord:
    return NodeRecord.model_validate(
        {
            "hypervisor_hostname": name,
            "hypervisor_type": "xen",
            "memory_mb": 8192,
            "vcpus": 16,
            "local_gb": 1000,
            "guests": [],
            **values,
        }
    )


@dataclass(kw_only=True)
class Reporter:
    """Publishes host reports, each a second later than the one before by the host's clock."""

    bus: Bus
    at: datetime = field(default_factory=lambda: datetime.now(UTC) - timedelta(seconds=60))

    def parts(
        self, *nodes: NodeRecord, host: str = "hv1", at: datetime | None = None
    ) -> list[HostReport]:
        """The parts of a whole report on these nodes."""
        self.at += timedelta(seconds=1)
        return hosts.split(
            host=host, reported_at=at or self.at, report_id=uuid.uuid4(), nodes=list(nodes)
        )

    async def send(self, *parts: HostReport) -> None:
        """These parts, in this order."""
        for part in parts:
            await self.bus.publish(
                hosts.HOST_REPORTED.message(part, app_id="test", host=part.host)
            )

    async def report(self, *nodes: NodeRecord, host: str = "hv1") -> None:
        """A whole report."""
        await self.send(*self.parts(*nodes, host=host))


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """The running service, and what tests ask it."""

    api: client.Api
    url: str
    reporter: Reporter

    async def hosts(self) -> dict[str, dict[str, Any]]:
        """Every node by its hypervisor_hostname."""
        answer = await self.api.get("/v1/hosts", limit=1000)
        return {each["hypervisor_hostname"]: each for each in answer["hosts"]}

    async def settled(self) -> None:
        """Return once the service shows everything that was committed before the call."""
        asked_at = datetime.now(UTC)

        async def read_since() -> bool:
            as_of = (await self.api.get("/v1/hosts", limit=1))["as_of"]
            return datetime.fromisoformat(as_of) > asked_at

        await eventually(read_since)

    async def shows(self, name: str, **memory: int) -> dict[str, Any]:
        """The node, once its memory counters are these."""

        async def holds() -> dict[str, Any] | None:
            node = (await self.hosts()).get(name)
            if node is None:
                return None
            found = node["resources"]["memory_mb"]
            return node if {key: found[key] for key in memory} == memory else None

        found: dict[str, Any] = await eventually(holds)
        return found

    async def claim(self, *, key: str | None = None, **body: Any) -> dict[str, Any]:
        """A new claim."""
        granted: dict[str, Any] = await self.api.post(
            "/v1/claims", {"project_id": "p1", **body}, idempotency_key=key
        )
        return granted

    async def flavor(self, name: str = "m1.small", **values: Any) -> None:
        """A flavor exists: Nova's m1.small unless said otherwise."""
        await self.api.post(
            "/v1/flavors",
            {"name": name, "memory_mb": 2048, "vcpus": 1, "disk_gb": 20, **values},
        )


@pytest_asyncio.fixture
async def service(run_service: RunService) -> AsyncIterator[RunningService]:
    async with run_service(
        app.serve, Settings, "hostler_capacity", refresh_seconds=0.05, sweep_seconds=0.1
    ) as running:
        yield running


@pytest_asyncio.fixture
async def capacity(service: RunningService, amqp_url: str) -> AsyncIterator[Capacity]:
    async with open_bus(amqp_url) as bus:
        yield Capacity(api=service.api, url=service.url, reporter=Reporter(bus=bus))


@pytest.fixture
def node() -> Any:
    """Makes a node record; values given replace those of an empty 8 GB Xen host."""
    return _node


@pytest.fixture
def guest() -> Any:
    """Makes a guest record."""

    def make(number: uuid.UUID | str, memory_mb: int = 2048, vcpus: int = 1) -> GuestRecord:
        return GuestRecord(uuid=uuid.UUID(str(number)), memory_mb=memory_mb, vcpus=vcpus)

    return make
