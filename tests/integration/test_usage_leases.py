"""Bare metal: what baremetal leases, usage bills, each a service of its own."""

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from hostler_baremetal import app as baremetal
from hostler_baremetal import credentials
from hostler_baremetal.settings import Settings as BaremetalSettings
from hostler_baremetal.simulator import SimulatedBmc
from hostler_common import client, errors
from hostler_common.testing import RunService, eventually
from hostler_usage import app as usage
from hostler_usage.settings import Settings as UsageSettings

HELD_SECONDS = 3.0
INEXACT = timedelta(seconds=2)
"""AMQP cuts the moment of an event to its second, and the event is made a little after the lease."""


async def test_a_node_is_billed_to_who_leased_it_and_to_who_took_it_as_that_lease_ran_out(
    run_service: RunService, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(credentials.new_key_line("k1") + "\n")
    bmc = SimulatedBmc()
    await bmc.start()
    try:
        async with (
            run_service(
                usage.serve, UsageSettings, usage.PACKAGE, fold_seconds=0.05, log_level="WARNING"
            ) as metering,
            run_service(
                baremetal.serve,
                BaremetalSettings,
                baremetal.PACKAGE,
                credentials_key_file=keys,
                log_level="WARNING",
            ) as metal,
        ):
            await _is_billed(metal.api, metering.api, bmc.port)
    finally:
        bmc.stop()


async def _is_billed(metal: client.Api, metering: client.Api, bmc_port: int) -> None:
    node = await metal.post(
        "/v1/nodes",
        {
            "name": "bm-1",
            "address": f"ipmi://127.0.0.1:{bmc_port}",
            "username": "admin",
            "password": "secret",
            "memory_mb": 65536,
            "vcpus": 32,
            "local_gb": 900,
        },
    )
    path = f"/v1/nodes/{node['id']}/lease"

    async def taken(owner: str, ttl_seconds: float) -> Any:
        body = {"owner": owner, "purpose": "burn-in", "ttl_seconds": ttl_seconds}
        try:
            return await metal.post(path, body)
        except errors.Conflict:
            return None  # it is somebody's

    first = await taken("p1", HELD_SECONDS)
    second = await eventually(lambda: taken("p2", 600))  # told of with the end of the first
    await asyncio.sleep(HELD_SECONDS)
    asked_at = datetime.now(UTC)
    await metal.call("DELETE", path, params={"fencing_token": second["fencing_token"]})
    released_at = datetime.now(UTC)
    least = {
        "p1": _held(first, datetime.fromisoformat(first["expires_at"])),
        "p2": _held(second, asked_at),
    }
    most = {"p1": least["p1"], "p2": _held(second, released_at)}

    async def usage_of_nodes() -> Any:
        return await metering.get(
            "/v1/usage",
            start=(released_at - timedelta(days=1)).isoformat(),
            end=(released_at + timedelta(days=1)).isoformat(),
            group_by="project",
            resource_type="node",
        )

    async def is_over() -> bool:
        if not (await usage_of_nodes())["usage"]:
            return False  # nobody has told of the node
        history = await metering.get(f"/v1/resources/node/{node['id']}/intervals")
        return len(history["intervals"]) > 1 and history["intervals"][-1]["end"] is not None

    await eventually(is_over)
    ours = {
        row["group"]["project"]: timedelta(microseconds=row["unit_microseconds"]["node_hours"])
        for row in (await usage_of_nodes())["usage"]
    }
    assert ours.keys() == most.keys()
    for owner, held in ours.items():
        assert least[owner] - INEXACT <= held <= most[owner] + INEXACT


def _held(lease: Any, until: datetime) -> timedelta:
    return until - datetime.fromisoformat(lease["taken_at"])
