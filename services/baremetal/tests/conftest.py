"""What the tests of baremetal share: simulated BMCs, and the service in this process."""

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from hostler_baremetal import app, credentials
from hostler_baremetal.settings import Settings
from hostler_baremetal.simulator import SimulatedBmc
from hostler_common import testing
from hostler_common.client import Api

QUICK = {
    "poll_seconds": 0.4,
    "poll_backoff_max_seconds": 1.0,
    "report_seconds": 2.0,
    "bmc_timeout_seconds": 2.0,
    "bmc_interval_seconds": 0.0,
    "session_linger_seconds": 1.0,
    "power_timeout_seconds": 10.0,
    "soft_off_timeout_seconds": 10.0,
    "claim_seconds": 2.0,
}


@pytest.fixture
async def make_bmc() -> AsyncIterator[Callable[..., Any]]:
    """Starts simulated BMCs and stops them after the test."""
    started: list[SimulatedBmc] = []

    async def make(**options: Any) -> SimulatedBmc:
        bmc = SimulatedBmc(**options)
        await bmc.start()
        started.append(bmc)
        return bmc

    yield make
    for bmc in started:
        bmc.stop()


@pytest.fixture
async def bmc(make_bmc: Callable[..., Any]) -> SimulatedBmc:
    """One simulated BMC, its node off."""
    made: SimulatedBmc = await make_bmc()
    return made


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    """A key file with one key."""
    path = tmp_path / "keys"
    path.write_text(credentials.new_key_line("k1") + "\n")
    return path


@pytest.fixture
def run_baremetal(run_service: testing.RunService, key_file: Path) -> Callable[..., Any]:
    """`async with run_baremetal(**settings) as service`: quick, on servers of the test's own."""

    def run(**overrides: Any) -> contextlib.AbstractAsyncContextManager[testing.RunningService]:
        values = {**QUICK, "credentials_key_file": key_file, **overrides}
        return run_service(app.serve, Settings, app.PACKAGE, **values)

    return run


class Fleet:
    """What a test does with the API, in few words."""

    def __init__(self, api: Api) -> None:
        self.api = api

    async def enrol(self, bmc: SimulatedBmc | str, name: str = "node-1", **more: Any) -> str:
        """Enrols a node and returns its id."""
        address = bmc if isinstance(bmc, str) else f"ipmi://127.0.0.1:{bmc.port}"
        body = {
            "name": name,
            "address": address,
            "username": "admin",
            "password": "secret",
            "memory_mb": 131072,
            "vcpus": 64,
            "local_gb": 1800,
            **more,
        }
        node = await self.api.post("/v1/nodes", body)
        return str(node["id"])

    async def node(self, node_id: str) -> dict[str, Any]:
        """The node."""
        found: dict[str, Any] = await self.api.get(f"/v1/nodes/{node_id}")
        return found

    async def power(self, node_id: str, action: str, token: int | None = None) -> dict[str, Any]:
        """Asks for a power action and waits for its end."""
        operation = await self.ask(node_id, action, token)
        return await self.ended(operation["id"])

    async def ask(self, node_id: str, action: str, token: int | None = None) -> dict[str, Any]:
        """Asks for a power action."""
        body = {"action": action, "fencing_token": token}
        operation: dict[str, Any] = await self.api.post(f"/v1/nodes/{node_id}/power", body)
        return operation

    async def ended(self, operation_id: str) -> dict[str, Any]:
        """Waits for the end of an operation."""

        async def has_ended() -> dict[str, Any] | None:
            found: dict[str, Any] = await self.api.get(f"/v1/operations/{operation_id}")
            return found if found["state"] in ("succeeded", "failed") else None

        ended: dict[str, Any] = await testing.eventually(has_ended)
        return ended

    async def until(self, node_id: str, **expected: Any) -> dict[str, Any]:
        """Waits until the node is as expected."""

        async def is_so() -> dict[str, Any] | None:
            node = await self.node(node_id)
            return node if all(node[key] == value for key, value in expected.items()) else None

        found: dict[str, Any] = await testing.eventually(is_so)
        return found


@pytest.fixture
def fleet_of() -> Callable[[testing.RunningService], Fleet]:
    """The words above, for a running service."""
    return lambda service: Fleet(service.api)
