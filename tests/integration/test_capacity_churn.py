"""Everything at once: hosts report, machines change proxies, claims come and go. The books balance."""

import asyncio
import random
import uuid
from datetime import UTC, datetime
from typing import Any

import asyncpg

from hostler_capacity import app, claim_store
from hostler_capacity.settings import Settings
from hostler_common import client, errors, hosts
from hostler_common.bus import Bus
from hostler_common.testing import RunService, eventually, open_bus

HYPERVISORS = 4
MACHINES = 30
ROUNDS = 25


async def publish(bus: Bus, host: str, nodes: list[hosts.NodeRecord]) -> None:
    for part in hosts.split(
        host=host, reported_at=datetime.now(UTC), report_id=uuid.uuid4(), nodes=nodes
    ):
        await bus.publish(hosts.HOST_REPORTED.message(part, app_id="test", host=host))


async def hypervisors_report(bus: Bus, api: client.Api, chance: random.Random) -> None:
    """Each lists some of the guests that have a claim on it, and strangers."""
    for turn in range(ROUNDS):
        for number in range(HYPERVISORS):
            held = (await api.get("/v1/claims", host=f"hv{number}", limit=1000))["claims"]
            ours = [each for each in held if each["ended_at"] is None and chance.random() < 0.5]
            guests = [
                hosts.GuestRecord(uuid=uuid.UUID(each["consumer_id"]), memory_mb=512, vcpus=1)
                for each in ours
            ] + [hosts.GuestRecord(uuid=uuid.uuid4(), memory_mb=256, vcpus=1)] * (turn % 3)
            node = hosts.NodeRecord(
                hypervisor_hostname=f"hv{number}",
                hypervisor_type="xen",
                memory_mb=chance.choice([6000, 8000]),
                vcpus=16,
                guests=guests,
            )
            await publish(bus, f"hv{number}", [node])


async def machines_move(bus: Bus, chance: random.Random) -> None:
    """Two proxies share the machines anew in every round, and both say so at once."""
    machines = [
        hosts.NodeRecord(
            hypervisor_hostname=f"node-{number}",
            node_uuid=uuid.UUID(int=number + 1),
            hypervisor_type="ironic",
            memory_mb=4096,
            vcpus=4,
        )
        for number in range(MACHINES)
    ]
    for _ in range(ROUNDS):
        shares: list[list[hosts.NodeRecord]] = [[], []]
        for machine in machines:
            shares[chance.randrange(2)].append(machine)
        await asyncio.gather(*(publish(bus, f"proxy{n}", share) for n, share in enumerate(shares)))


async def claims_come_and_go(
    api: client.Api, flavor: str, chance: random.Random, refusals: set[str]
) -> None:
    mine: list[str] = []
    body: dict[str, Any] = {"flavor": flavor, "project_id": "p"}
    for _ in range(ROUNDS):
        try:
            claim = await api.post("/v1/claims", {**body, "ttl_seconds": chance.choice([1, 60])})
            mine.append(claim["id"])
        except errors.Conflict as exc:
            refusals.add(exc.code)
        if mine and chance.random() < 0.4:
            await api.delete(f"/v1/claims/{mine.pop(chance.randrange(len(mine)))}")
        if mine and chance.random() < 0.3:
            try:
                await api.post(f"/v1/claims/{chance.choice(mine)}/confirm")
            except errors.Conflict as exc:
                refusals.add(exc.code)


async def test_the_books_balance_while_everything_changes_at_once(
    run_service: RunService, amqp_url: str, database_url: str
) -> None:
    chance = random.Random(7)
    run = run_service(
        app.serve, Settings, "hostler_capacity", refresh_seconds=0.05, sweep_seconds=0.1
    )
    async with run as service, open_bus(amqp_url) as bus:
        api = service.api
        await api.post("/v1/flavors", {"name": "guest", "memory_mb": 512, "vcpus": 1})
        await api.post(
            "/v1/flavors", {"name": "metal", "memory_mb": 4096, "vcpus": 4, "kind": "node"}
        )
        refusals: set[str] = set()
        async with asyncio.TaskGroup() as group:
            group.create_task(hypervisors_report(bus, api, chance))
            group.create_task(machines_move(bus, chance))
            for flavor in ("guest", "guest", "guest", "metal", "metal"):
                group.create_task(claims_come_and_go(api, flavor, chance, refusals))

        assert refusals <= {"capacity.claim.no_room", "capacity.claim.not_held"}

        async def every_report_is_handled() -> bool:
            text = await api.get("/metrics")
            counted = [
                float(line.split()[-1])
                for line in text.splitlines()
                if line.startswith("hostler_capacity_report_parts_total{")
            ]
            return sum(counted) == ROUNDS * (HYPERVISORS + 2)

        await eventually(every_report_is_handled)
        assert (await api.get("/v1/quarantine"))["entries"] == []
        database = await asyncpg.connect(database_url, server_settings={"search_path": "capacity"})
        try:
            assert await claim_store.imbalances(database) == []
            # one row a machine, whoever fronts it; one claim at most on each
            assert (
                await database.fetchval("SELECT count(*) FROM node WHERE bare_metal") == MACHINES
            )
            doubled = await database.fetch(
                "SELECT node_id FROM claim JOIN node ON node.id = node_id WHERE bare_metal"
                " AND state IN ('held', 'confirmed') GROUP BY node_id HAVING count(*) > 1"
            )
            assert doubled == []
        finally:
            await database.close()
