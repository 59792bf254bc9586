"""Capacity's part: hosts report, fit counts with their reasons, and a race for the last places."""

import asyncio
import json
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from demo.stage import Stage
from hostler_common import client, hosts
from hostler_common.servers import free_port
from hostler_common.testing import eventually, wait_ready

CLIENTS = 4
CLAIMS = 200
PROJECT = "capacity-demo"
FLAVOR: Mapping[str, object] = {
    "name": "m1.small",
    "memory_mb": 2048,
    "vcpus": 1,
    "disk_gb": 20,
}


def _hypervisor(
    name: str, kind: str, memory_mb: int, guests: Sequence[int], *, disabled: bool = False
) -> hosts.NodeRecord:
    """A hypervisor that already runs guests of these sizes, which nobody claimed."""
    return hosts.NodeRecord(
        hypervisor_hostname=name,
        hypervisor_type=kind,
        memory_mb=memory_mb,
        memory_mb_reserved=1024,
        vcpus=32,
        local_gb=2000,
        local_gb_used=20 * len(guests),
        state=hosts.NodeState.UP,
        guests=[
            hosts.GuestRecord(
                uuid=uuid.uuid5(uuid.NAMESPACE_DNS, f"{number}.{name}"),
                memory_mb=size,
                vcpus=2,
                vm_type="pv" if kind == "xen" else None,
            )
            for number, size in enumerate(guests)
        ],
        disabled=disabled,
    )


HOSTS = {
    # a pool's master speaks for its members
    "xen-pool.demo": [
        _hypervisor("xen-1", "xen", 65536, [8192, 8192, 4096]),
        _hypervisor("xen-2", "xen", 32768, [4096]),
    ],
    "kvm-1.demo": [_hypervisor("kvm-1", "QEMU", 65536, [4096, 2048])],
    "kvm-2.demo": [_hypervisor("kvm-2", "QEMU", 49152, [], disabled=True)],
}
HYPERVISORS = [node for nodes in HOSTS.values() for node in nodes]


async def tell(stage: Stage) -> None:
    """Play the part.

    Raises:
        ClaimBroken: something is not as the story says.
    """
    async with stage.api("capacity") as api:
        await _forget_last_time(api)
        stage.step(
            f"{len(HYPERVISORS)} hypervisors report over RabbitMQ, by {len(HOSTS)} hostler-agents"
        )
        _start_agents(stage)
        await _show_hosts(stage, api)
        stage.step("how many m1.small fit, and why not one more")
        fits = await _show_fit(stage, api)
        stage.step("which overhead models can be trusted")
        await _show_models(stage, api)
        stage.step(
            f"{CLAIMS} concurrent claims from {CLIENTS} client processes against two capacity"
            f" processes, for {fits} places"
        )
        await _race(stage, api, fits)


async def _forget_last_time(api: client.Api) -> None:
    """Release what an earlier demo claimed in a database that outlived it."""
    for state in ("held", "confirmed"):
        claims = (await api.get("/v1/claims", state=state, limit=1000))["claims"]
        for each in claims:
            if each["project_id"] == PROJECT:
                await api.delete(f"/v1/claims/{each['id']}")
    known = {each["name"] for each in (await api.get("/v1/flavors", limit=1000))["flavors"]}
    if FLAVOR["name"] not in known:
        await api.post("/v1/flavors", FLAVOR)


def _start_agents(stage: Stage) -> None:
    program = str(Path(sys.executable).parent / "hostler-agent")
    for host, nodes in HOSTS.items():
        inventory = stage.state_dir / f"{host}.json"
        listed = [node.model_dump(mode="json", exclude_none=True) for node in nodes]
        inventory.write_text(json.dumps(listed))
        stage.spawn(
            f"agent-{host}",
            [program],
            {
                "HOSTLER_AGENT_HOST": host,
                "HOSTLER_AGENT_PARTS": "capacity",
                "HOSTLER_AGENT_HTTP_PORT": str(free_port()),
                "HOSTLER_CAPACITY_INVENTORY_FILE": str(inventory),
                "HOSTLER_CAPACITY_REPORT_SECONDS": "10",
            },
        )


async def _ours(api: client.Api) -> dict[str, dict[str, Any]]:
    answer = await api.get("/v1/hosts", limit=1000, max_age_seconds=0)
    return {
        each["hypervisor_hostname"]: each
        for each in answer["hosts"]
        if each["host"] in HOSTS and each["state"] in ("up", "disabled")
    }


async def _show_hosts(stage: Stage, api: client.Api) -> None:
    async def all_reported() -> dict[str, dict[str, Any]] | None:
        found = await _ours(api)
        return found if len(found) == len(HYPERVISORS) else None

    found: dict[str, dict[str, Any]] = await eventually(all_reported, seconds=30)
    rows = []
    for node in HYPERVISORS:
        host = found[node.hypervisor_hostname]
        memory = host["resources"]["memory_mb"]
        guests_mb = sum(guest.memory_mb for guest in node.guests or ())
        rows.append(
            (
                host["hypervisor_hostname"],
                host["hypervisor_type"],
                host["state"],
                memory["limit"],
                guests_mb,
                memory["foreign"] - guests_mb,
                memory["free"],
            )
        )
    stage.table(
        "free RAM in MB, overhead of the running guests counted",
        ("host", "type", "state", "limit", "guests", "overhead", "free"),
        rows,
    )
    stage.check(
        "every host's guests cost it more than their own memory",
        all(row[5] > 0 for row in rows if row[4]),
    )


async def _show_fit(stage: Stage, api: client.Api) -> int:
    answer = await api.get("/v1/fit", flavor=FLAVOR["name"], limit=1000, max_age_seconds=0)
    rows = []
    for host in answer["hosts"]:
        binding = host["binding"]
        why = host["blocker"] or (f"{binding['resource']}: {binding['short_by']} short")
        name = host["hypervisor_hostname"]
        rows.append((name, host["fits"], host["overhead_mb"], host["overhead_model"], why))
    stage.table(
        f"{answer['total']} more m1.small fit",
        ("host", "fits", "MB over", "priced by", "why not one more"),
        rows,
    )
    total = int(answer["total"])
    stage.check("the counts on the hosts add up to the total", total == sum(r[1] for r in rows))
    return total


async def _show_models(stage: Stage, api: client.Api) -> None:
    models = (await api.get("/v1/overhead-models"))["overhead_models"]
    rows = [
        (
            model["id"],
            f"{found['exact_rows']}/{found['rows']}",
            found["under_rows_raw"],
            found["under_rows_charged"],
            f"{found['max_under_mb_charged']:g}",
            "refused" if model["under_predicts"] else ", ".join(model["default_for"]) or "-",
        )
        for model in models
        for found in model["evidence"]
        if found["dataset"] == "xen-2013-12"
    ]
    stage.table(
        "Xen overhead models against the 49 guests measured in 2013",
        ("model", "exact", "low raw", "low in MB", "by", "default for"),
        rows,
    )
    exact = {row[0]: row[1] for row in rows}["xapi-exact"]
    stage.check("xapi's own memory model equals all 49 measured rows", exact == "49/49")
    stage.check(
        "no model that charges less than was measured prices any host",
        not any(model["default_for"] for model in models if model["under_predicts"]),
    )


async def _race(stage: Stage, api: client.Api, fits: int) -> None:
    port = free_port()
    second = f"http://127.0.0.1:{port}"
    program = str(Path(sys.executable).parent / "hostler-capacity")
    stage.spawn("capacity-2", [program, "serve"], {"HOSTLER_CAPACITY_HTTP_PORT": str(port)})
    await wait_ready(second)
    urls = [stage.urls["capacity"], second]
    argv = [sys.executable, "-m", "hostler_capacity.storm", *urls, "--flavor", str(FLAVOR["name"])]
    argv += ["--count", str(CLAIMS // CLIENTS), "--project", PROJECT]
    clients = [
        await asyncio.create_subprocess_exec(
            *argv,
            env={"HOSTLER_TOKEN": stage.token},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        for _ in range(CLIENTS)
    ]
    for each in clients:
        assert each.stdout is not None
        await each.stdout.readline()
    outputs = await asyncio.gather(*(each.communicate(b"go\n") for each in clients))
    outcomes = [json.loads(output) for output, _ in outputs]
    stage.table(
        "the race",
        ("client process", "granted", "refused"),
        [(n, len(o["granted"]), o["refused"]) for n, o in enumerate(outcomes, start=1)],
    )
    granted = [claim_id for outcome in outcomes for claim_id in outcome["granted"]]
    refused = sum(outcome["refused"] for outcome in outcomes)
    wanted = min(fits, CLAIMS)
    stage.check(
        f"exactly as many were granted as fit: {len(granted)} of {wanted}",
        len(set(granted)) == len(granted) == wanted,
    )
    stage.check(f"every other claim was refused: {refused}", refused == CLAIMS - wanted)

    left = await api.get("/v1/fit", flavor=FLAVOR["name"], limit=1000, max_age_seconds=0)
    stage.check(f"and now {fits - wanted} more fit", left["total"] == fits - wanted)
    over = [
        name
        for name, host in (await _ours(api)).items()
        if any(each["free"] < 0 for each in host["resources"].values())
    ]
    stage.check("no host is over its limit in any resource", not over)
    await _give_back_some(stage, api, granted)


async def _give_back_some(stage: Stage, api: client.Api, granted: Sequence[str]) -> None:
    """Room given back is room again, and a claim sent twice is one claim."""
    kept, given = granted[0], granted[1:]
    await asyncio.gather(*(api.delete(f"/v1/claims/{claim_id}") for claim_id in given))
    await api.post(f"/v1/claims/{kept}/confirm")
    body = {"flavor": FLAVOR["name"], "project_id": PROJECT, "ttl_seconds": 600}
    key = str(uuid.uuid4())
    replies = await asyncio.gather(
        *(api.post("/v1/claims", body, idempotency_key=key) for _ in range(10))
    )
    stage.check(
        "the same claim sent ten times at once under one Idempotency-Key is one claim",
        len({reply["id"] for reply in replies}) == 1,
    )
    stage.say(f"{len(given)} claims released; one confirmed and one held stay for you to look at")
