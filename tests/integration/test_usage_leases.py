"""Bare metal: what baremetal leases, usage bills, each a service of its own."""

import asyncio
import random
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hostler_baremetal import app as baremetal
from hostler_baremetal import credentials
from hostler_baremetal.settings import Settings as BaremetalSettings
from hostler_baremetal.simulator import SimulatedBmc
from hostler_common import client, errors
from hostler_common.testing import RunService, eventually
from hostler_usage import app as usage
from hostler_usage.settings import Settings as UsageSettings

HELD_SECONDS = (0.3, 1.0)
LEASES = 8
OWNERS = ("p1", "p2", "p3")


@pytest.mark.parametrize("seed", [1, 2])
async def test_every_lease_of_a_course_is_billed_exactly_to_who_had_the_node(
    run_service: RunService, tmp_path: Path, seed: int
) -> None:
    """Leases of less than a second, each taken as soon as the one before is over, or a little later."""
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
            await _is_billed(metal.api, metering.api, bmc.port, random.Random(seed))
    finally:
        bmc.stop()


async def _is_billed(
    metal: client.Api, metering: client.Api, bmc_port: int, chance: random.Random
) -> None:
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

    leases: list[tuple[Any, str, datetime, datetime]] = []  # each with bounds of its end
    for number in range(LEASES):
        owner = OWNERS[number % len(OWNERS)]
        held_seconds = chance.uniform(*HELD_SECONDS)
        expires = chance.random() < 0.5
        ttl_seconds = held_seconds if expires else 600
        lease = await eventually(partial(taken, owner, ttl_seconds), every_seconds=0.01)
        if expires:
            expires_at = datetime.fromisoformat(lease["expires_at"])
            leases.append((lease, owner, expires_at, expires_at))
        else:
            await asyncio.sleep(held_seconds)
            asked_at = datetime.now(UTC)
            await metal.call("DELETE", path, params={"fencing_token": lease["fencing_token"]})
            leases.append((lease, owner, asked_at, datetime.now(UTC)))
        await asyncio.sleep(chance.choice((0, chance.uniform(0, 0.5))))

    async def history() -> Any:
        try:
            found = await metering.get(f"/v1/resources/node/{node['id']}/intervals")
        except errors.NotFound:
            return None  # nobody has told of the node
        told = found["intervals"]
        return told if len(told) == LEASES and told[-1]["end"] is not None else None

    billed = await eventually(history)
    total = dict.fromkeys(OWNERS, timedelta())
    for interval, (lease, owner, earliest, latest) in zip(billed, leases, strict=True):
        start, end = (datetime.fromisoformat(interval[edge]) for edge in ("start", "end"))
        assert interval["attributes"]["project"] == owner
        assert start == datetime.fromisoformat(lease["taken_at"])
        assert earliest <= end <= latest
        total[owner] += end - start
    day = timedelta(days=1)
    usage_of_nodes = await metering.get(
        "/v1/usage",
        start=(leases[0][2] - day).isoformat(),
        end=(leases[-1][3] + day).isoformat(),
        group_by="project",
        resource_type="node",
    )
    ours = {
        row["group"]["project"]: timedelta(microseconds=row["unit_microseconds"]["node_hours"])
        for row in usage_of_nodes["usage"]
    }
    assert ours == total
