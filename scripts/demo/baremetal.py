"""Baremetal's part: three real BMCs are enrolled, switched and leased, and appear beside the hypervisors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from demo.stage import Running, Stage
from hostler_baremetal import credentials
from hostler_baremetal.testing import PASSWORD, USERNAME, IpmiSim, free_udp_port
from hostler_common import client, errors
from hostler_common.testing import eventually

NODES: Mapping[str, Mapping[str, object]] = {
    "bm-1.demo": {"memory_mb": 131072, "vcpus": 64, "local_gb": 1800, "zone": "rack-1"},
    "bm-2.demo": {"memory_mb": 131072, "vcpus": 64, "local_gb": 1800, "zone": "rack-1"},
    "bm-3.demo": {"memory_mb": 262144, "vcpus": 96, "local_gb": 7600, "zone": "rack-2"},
}


def environment(directory: Path, running: Running) -> dict[str, str]:
    """The service's settings: the keys stay with the other secrets, since the database may outlive a demo."""
    del directory
    keys = running.directory / "secrets" / "baremetal-keys"
    if not keys.exists():
        keys.parent.mkdir(parents=True, exist_ok=True)
        keys.touch(mode=0o600)
        keys.write_text(credentials.new_key_line("demo") + "\n")
    return {
        "HOSTLER_BAREMETAL_CREDENTIALS_KEY_FILE": str(keys),
        "HOSTLER_BAREMETAL_POLL_SECONDS": "2",
    }


async def tell(stage: Stage) -> None:
    """Play the part.

    Raises:
        ClaimBroken: something is not as the story says.
    """
    async with stage.api("baremetal") as api, stage.api("capacity") as capacity:
        await _forget_last_time(api)
        stage.step("three ipmi_sim BMCs start, and their nodes are enrolled")
        simulators = await _start(stage)
        ids = {name: await _enrol(api, simulators[name], NODES[name]) for name in NODES}
        await eventually(lambda: _all_known(api))
        await _show(stage, api)
        shown = json.dumps(await api.get("/v1/nodes"))
        stage.check("no answer holds a BMC's password", f'"{PASSWORD}"' not in shown)

        stage.step("bm-1 is powered on through the API, by our own RMCP+ client")
        operation = await _power(api, ids["bm-1.demo"], "on")
        stage.say(f"operation {operation['id']}: {operation['state']}")
        stage.check(
            "its chassis got one command and is on; the others got none",
            operation["state"] == "succeeded"
            and simulators["bm-1.demo"].power
            and [len(it.commands) for it in simulators.values()] == [1, 0, 0],
        )

        stage.step("bm-3 is leased: from now on an action on it must show the fencing token")
        lease = await api.post(
            f"/v1/nodes/{ids['bm-3.demo']}/lease",
            {"owner": "demo", "purpose": "burn-in", "ttl_seconds": 86400},
        )
        refused = await _refused(api, ids["bm-3.demo"])
        stage.check(
            f"without token {lease['fencing_token']} a power-on is refused: {refused}",
            refused == "baremetal.lease.fenced" and not simulators["bm-3.demo"].power,
        )

        stage.step("somebody presses bm-2's button: the next look finds it")
        simulators["bm-2.demo"].switch(power=True)
        await eventually(lambda: _is(api, ids["bm-2.demo"], "on"))
        stage.check("bm-2 is known to be on, though nobody told us", True)

        stage.step("what capacity knows of them, beside the hypervisors")
        await _show_capacity(stage, capacity)


async def _forget_last_time(api: client.Api) -> None:
    """A database that is not ours alone may hold the nodes of an earlier story."""
    for name in NODES:
        for node in (await api.get("/v1/nodes", name=name))["nodes"]:
            path = f"/v1/nodes/{node['id']}"
            if node["lease"]:
                await api.call("DELETE", f"{path}/lease", params={"force": True})
            await api.delete(path)


async def _start(stage: Stage) -> dict[str, IpmiSim]:
    simulators = {}
    for name in NODES:
        simulator = IpmiSim.prepare(stage.state_dir / name, name=name, port=free_udp_port())
        stage.spawn(f"ipmi-{name}", simulator.command_line, {})

        async def is_up(it: IpmiSim = simulator) -> bool:
            return it.is_bound()

        await eventually(is_up)
        simulators[name] = simulator
    return simulators


async def _enrol(api: client.Api, simulator: IpmiSim, hardware: Mapping[str, object]) -> str:
    body = {
        "name": simulator.name,
        "address": simulator.address,
        "username": USERNAME,
        "password": PASSWORD,
        "cpu_arch": "x86_64",
        **hardware,
    }
    return str((await api.post("/v1/nodes", body))["id"])


async def _ours(api: client.Api) -> list[dict[str, Any]]:
    return [node for node in (await api.get("/v1/nodes"))["nodes"] if node["name"] in NODES]


async def _all_known(api: client.Api) -> bool:
    nodes = await _ours(api)
    return len(nodes) == len(NODES) and all(node["power_state"] != "unknown" for node in nodes)


async def _is(api: client.Api, node_id: str, power: str) -> bool:
    return bool((await api.get(f"/v1/nodes/{node_id}"))["power_state"] == power)


async def _power(api: client.Api, node_id: str, action: str) -> dict[str, Any]:
    operation = await api.post(f"/v1/nodes/{node_id}/power", {"action": action})

    async def ended() -> dict[str, Any] | None:
        found: dict[str, Any] = await api.get(f"/v1/operations/{operation['id']}")
        return found if found["finished_at"] else None

    finished: dict[str, Any] = await eventually(ended)
    return finished


async def _refused(api: client.Api, node_id: str) -> str:
    try:
        await _power(api, node_id, "on")
    except errors.Conflict as exc:
        return exc.code
    return "it was not refused"


async def _show(stage: Stage, api: client.Api) -> None:
    stage.table(
        "nodes",
        ["node", "BMC", "power", "cipher suite", "memory MB", "vCPUs", "zone"],
        [
            [
                node["name"],
                node["address"].removeprefix("ipmi://"),
                node["power_state"],
                node["working_suite"],
                node["memory_mb"],
                node["vcpus"],
                node["zone"],
            ]
            for node in await _ours(api)
        ],
    )


async def _show_capacity(stage: Stage, capacity: client.Api) -> None:
    async def told() -> list[dict[str, Any]] | None:
        hosts: list[dict[str, Any]] = (await capacity.get("/v1/hosts", limit=1000))["hosts"]
        free = {host["hypervisor_hostname"]: _free(host) for host in hosts}
        return hosts if NODES.keys() <= free.keys() and free["bm-3.demo"] == 0 else None

    hosts: list[dict[str, Any]] = await eventually(told)
    stage.table(
        "capacity's hosts",
        ["host", "node", "type", "state", "free MB"],
        [
            [
                host["host"],
                host["hypervisor_hostname"],
                host["hypervisor_type"],
                host["state"],
                _free(host),
            ]
            for host in hosts
        ],
    )
    free = {host["hypervisor_hostname"]: _free(host) for host in hosts}
    stage.check(
        "bm-1 and bm-2 are on and yet free, bm-3 is off and leased: nothing of it is free",
        [free[name] for name in NODES] == [131072, 131072, 0],
    )


def _free(host: Mapping[str, Any]) -> int:
    return int(host["resources"]["memory_mb"]["free"])
