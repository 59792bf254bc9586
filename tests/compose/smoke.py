"""The smoke test of the compose stack: one short use of each service, as its clients use it, over the stack's network.

It runs in a container of the same image, and is a client of everything else: HTTP with the admin's token, AMQP as the
cloud would speak it, a web server with an image, a BMC. Each claim is printed once it holds; the first that does not
ends it with 1.
"""

import asyncio
import hashlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import aio_pika
from aiohttp import web

from hostler_baremetal.simulator import SimulatedBmc
from hostler_common import bus, client, errors, hosts
from hostler_usage import testing as cloud

SERVICES = {
    "precache": ("http://precache:8301", "/v1/images"),
    "usage": ("http://usage:8302", "/v1/events"),
    "capacity": ("http://capacity:8303", "/v1/hosts"),
    "baremetal": ("http://baremetal:8304", "/v1/nodes"),
}
AGENT = "http://agent:8310"
AGENT_HOST = os.environ["HOSTLER_AGENT_HOST"]
TOKEN_FILE = Path("/run/secrets/admin-token")
PATIENCE_SECONDS = 60.0
T = TypeVar("T")
RAW_BYTES = 20_000_003  # several pieces, and a last one that is shorter
QCOW2_DISK_BYTES = 20_000_256  # a disk of whole sectors, as every qcow2 is


class ClaimBroken(Exception):
    """The stack is not what it should be."""


def check(claim: str, holds: bool) -> None:
    """Print the claim.

    Raises:
        ClaimBroken: it does not hold.
    """
    if not holds:
        raise ClaimBroken(claim)
    print(f"  ok: {claim}")  # noqa: T201  a program


async def eventually(claim: str, look: Callable[[], Awaitable[T | None]]) -> T:
    """What ``look`` finds, asked again until it finds something; then the claim holds.

    Raises:
        ClaimBroken: it found nothing in PATIENCE_SECONDS.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (found := await look()) is None:
        if time.monotonic() > deadline:
            raise ClaimBroken(f"not within {PATIENCE_SECONDS:g} s: {claim}")
        await asyncio.sleep(0.2)
    check(claim, True)
    return found


def own_address() -> str:
    """This container's address on the stack's network."""
    return socket.gethostbyname(socket.gethostname())


async def everybody_is_ready_and_asks_who_calls(token: str) -> None:
    """Probes, the API without and with a token, the page and its style sheet, of each service."""
    for name, url in {
        "agent": AGENT,
        **{name: url for name, (url, _) in SERVICES.items()},
    }.items():
        async with client.open_api(url) as api:

            async def ready(api: client.Api = api) -> bool | None:
                try:
                    return (await api.get("/readyz"))["status"] == "pass" or None
                except errors.Unavailable:
                    return None  # with its servers only just back, it may take a moment

            await eventually(f"{name} is ready", ready)
    for name, (url, path) in SERVICES.items():
        async with client.open_api(url) as api:
            try:
                await api.get(path)
            except errors.Unauthenticated as exc:
                check(f"{name} refuses a caller without a token: {exc.code}", True)
            else:
                raise ClaimBroken(f"{name} answered a caller without a token")
        async with client.open_api(url, token=token) as api:
            check(f"{name} answers one with a token", isinstance(await api.get(path), dict))
            page, style = await api.get("/"), await api.get("/static/common/style.css")
            check(f"{name} has its page", "<html" in page and "{" in style)


async def publish(exchange: str, messages: list[tuple[str, bytes]]) -> None:
    """The broker has taken responsibility for each message, and routed each to a queue."""
    async with await aio_pika.connect(os.environ["HOSTLER_AMQP_URL"]) as connection:
        channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
        target = await channel.get_exchange(exchange)
        for routing_key, body in messages:
            message = aio_pika.Message(body, content_type="application/json")
            await target.publish(message, routing_key, mandatory=True)


async def notifications_become_usage(token: str) -> None:
    """Two hours of an instance, as Nova tells them, are two instance-hours of its project."""
    born = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=6)
    life = cloud.InstanceLife(
        instance_id=str(uuid.uuid4()),
        project_id=uuid.uuid4().hex,
        steps=(
            cloud.Step(at=born, action="create", flavor=cloud.MEDIUM),
            cloud.Step(at=born + timedelta(hours=2), action="delete"),
        ),
    )
    sent = life.messages()
    await publish("nova", [(f"{message.topic}.info", message.body()) for message in sent])
    async with client.open_api(SERVICES["usage"][0], token=token) as api:

        async def stored() -> bool | None:
            answer = await api.get("/v1/events", resource_id=life.instance_id, limit=1000)
            return len(answer["events"]) == len(sent) or None

        async def counted() -> dict[str, Any] | None:
            answer = await api.get(
                "/v1/usage",
                start=(born - timedelta(days=1)).isoformat(),
                end=(born + timedelta(days=1)).isoformat(),
                group_by="project",
                project_id=life.project_id,
            )
            rows: list[dict[str, Any]] = answer["usage"]
            return rows[0]["hours"] if rows and not answer["unfolded_resources"] else None

        await eventually(f"usage has all {len(sent)} notifications of an instance", stored)
        hours = await eventually("usage has counted them", counted)
        used = (hours["instance_hours"], hours["vcpu_hours"])
        check(
            f"2 hours of 2 vCPUs are {used[0]:g} instance-hours, {used[1]:g} vCPU-hours",
            used == (2.0, 4.0),
        )


async def host_reports_become_capacity(token: str) -> None:
    """The agent's own report, and one that comes from elsewhere, are hosts with room in capacity."""
    name = f"{uuid.uuid4().hex}.example"
    node = hosts.NodeRecord(
        hypervisor_hostname=name,
        hypervisor_type="QEMU",
        memory_mb=65536,
        vcpus=16,
        local_gb=500,
        state="up",
    )
    parts = hosts.split(
        host=name, reported_at=datetime.now(UTC), report_id=uuid.uuid4(), nodes=[node]
    )
    await publish(
        bus.HOSTLER.name,
        [(f"host.reported.{name}", part.model_dump_json().encode()) for part in parts],
    )
    async with client.open_api(SERVICES["capacity"][0], token=token) as api:
        for host in (name, AGENT_HOST):

            async def listed(host: str = host) -> dict[str, Any] | None:
                found: list[dict[str, Any]] = (await api.get("/v1/hosts", host=host))["hosts"]
                return found[0] if found else None

            row = await eventually(
                f"capacity lists {'the agent' if host == AGENT_HOST else 'a reported host'}",
                listed,
            )
            check(f"it is up and has {row['resources']['memory_mb']['limit']} MB to give",
                  row["state"] == "up" and row["resources"]["memory_mb"]["limit"] > 0)  # fmt: skip


async def images_reach_the_agent(token: str) -> None:
    """Images at a web server are on the agent's disk, whole, as raw disks."""
    await image_reaches_the_agent(token, "raw", os.urandom(RAW_BYTES), RAW_BYTES)
    await image_reaches_the_agent(token, "qcow2", qcow2_of(QCOW2_DISK_BYTES), QCOW2_DISK_BYTES)


def qcow2_of(disk_bytes: int) -> bytes:
    """A qcow2 image of a disk of so many random bytes."""
    with tempfile.TemporaryDirectory() as folder:
        raw, image = Path(folder, "disk.raw"), Path(folder, "disk.qcow2")
        raw.write_bytes(os.urandom(disk_bytes))
        subprocess.run(
            ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image],
            check=True,
        )
        return image.read_bytes()


async def image_reaches_the_agent(
    token: str, disk_format: str, content: bytes, disk_bytes: int
) -> None:
    """An image is on the agent's disk, whole: it says so only of verified pieces."""

    async def download(_: web.Request) -> web.Response:
        return web.Response(body=content)

    application = web.Application()
    application.router.add_get("/image", download)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "0.0.0.0", 0).start()
    port = runner.addresses[0][1]
    image_id = str(uuid.uuid4())
    try:
        async with client.open_api(SERVICES["precache"][0], token=token) as api:
            started = await api.post(
                "/v1/distributions",
                {
                    "image_id": image_id,
                    "image": {
                        "image_id": image_id,
                        "location": f"http://{own_address()}:{port}/image",
                        "disk_format": disk_format,
                        "os_hash_algo": "sha512",
                        "os_hash_value": hashlib.sha512(content).hexdigest(),
                    },
                    "hosts": [AGENT_HOST],
                },
            )

            async def done() -> dict[str, Any] | None:
                answer: dict[str, Any] = await api.get(
                    f"/v1/distributions/{started['distribution_id']}"
                )
                if answer["state"] == "error":
                    raise ClaimBroken(f"the distribution failed: {answer['reason']}")
                return answer if answer["state"] == "done" else None

            answer = await eventually(f"precache has put a {disk_format} image on the agent", done)
            arrived = {row["host"]: row["bytes_done"] for row in answer["progress"]}
            check(
                f"the agent has all {disk_bytes} bytes of its disk",
                arrived == {AGENT_HOST: disk_bytes},
            )
    finally:
        await runner.cleanup()


async def node_is_powered_on(token: str) -> None:
    """A BMC that speaks cipher suite 17 is enrolled, and told to power its node on."""
    simulator = SimulatedBmc(users={"operator": ("correct horse", 4)}, suites=frozenset({17}))
    await simulator.start("0.0.0.0")
    try:
        async with client.open_api(SERVICES["baremetal"][0], token=token) as api:
            node = await api.post(
                "/v1/nodes",
                {
                    "name": f"node-{uuid.uuid4().hex[:8]}",
                    "address": f"ipmi://{own_address()}:{simulator.port}",
                    "username": "operator",
                    "password": "correct horse",
                    "memory_mb": 1024,
                    "vcpus": 4,
                },
            )
            check("the BMC's password does not come back", "correct horse" not in str(node))
            asked = await api.post(f"/v1/nodes/{node['id']}/power", {"action": "on"})

            async def finished() -> dict[str, Any] | None:
                answer: dict[str, Any] = await api.get(f"/v1/operations/{asked['id']}")
                return answer if answer["finished_at"] else None

            answer = await eventually("baremetal has carried out a power-on", finished)
            check(
                f"it {answer['state']}, and the node is on",
                answer["state"] == "succeeded" and simulator.power,
            )
            await api.delete(f"/v1/nodes/{node['id']}")
    finally:
        simulator.stop()


async def main(token: str) -> int:
    """0 if every claim holds."""
    try:
        await everybody_is_ready_and_asks_who_calls(token)
        await notifications_become_usage(token)
        await host_reports_become_capacity(token)
        await images_reach_the_agent(token)
        await node_is_powered_on(token)
    except (ClaimBroken, errors.HostlerError) as exc:
        print(f"  FAILED: {exc}")  # noqa: T201  a program
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(TOKEN_FILE.read_text().strip())))
