"""Precache's part: one image, three hosts, each piece from the seed once and from each other after that."""

import asyncio
import hashlib
import random
import sys
from pathlib import Path
from typing import Any

from demo.stage import Running, Stage
from hostler_common import client
from hostler_common.servers import free_port
from hostler_common.testing import wait_ready

MIB = 1 << 20
IMAGE_ID = "d2c7d4c6-3f0e-4f53-9d1e-6b2d0c5f7a10"
IMAGE_BYTES = 256 * MIB
CHUNK_BYTES = 8 * MIB
HOSTS = ("compute-1.demo", "compute-2.demo", "compute-3.demo")
POLL_SECONDS = 0.2
PATIENCE_SECONDS = 120.0
MOST_SEED_COPIES = 1.5


def environment(work: Path, running: Running) -> dict[str, str]:
    """The settings of the service for the demo: its images and its sources are below `work`."""
    del running
    return {
        "HOSTLER_PRECACHE_DATA_DIR": str(work / "seed"),
        "HOSTLER_PRECACHE_BLOB_PORT": str(free_port()),
        "HOSTLER_PRECACHE_FILE_ROOTS": str(work),
        "HOSTLER_PRECACHE_RESERVE_BYTES": str(256 * MIB),
    }


def make_image(path: Path) -> str:
    """The demo's image is at `path`, the same bytes each time and not compressible; its sha512."""
    bits, digest = random.Random(2014), hashlib.sha512()  # noqa: S311  content, not a secret
    with path.open("wb") as file:
        for _ in range(IMAGE_BYTES // CHUNK_BYTES):
            chunk = bits.randbytes(CHUNK_BYTES)
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()


def sha512_of(path: Path) -> str:
    """The sha512 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha512").hexdigest()


async def start_agent(stage: Stage, host: str) -> Path:
    """An agent process for the host is ready; where it puts images."""
    port, place = free_port(), stage.state_dir / host
    place.mkdir()
    stage.spawn(
        f"agent-{host}",
        [str(Path(sys.executable).parent / "hostler-agent")],
        {
            "HOSTLER_AGENT_HOST": host,
            "HOSTLER_AGENT_PARTS": "precache",
            "HOSTLER_AGENT_HTTP_PORT": str(port),
            "HOSTLER_PRECACHE_PLACER": "directory",
            "HOSTLER_PRECACHE_TARGET_DIR": str(place),
            "HOSTLER_PRECACHE_REPORT_SECONDS": "0.25",
        },
    )
    await wait_ready(f"http://127.0.0.1:{port}")
    return place


async def watch(stage: Stage, api: client.Api, distribution_id: str) -> dict[str, Any]:
    """Show each host's progress until the distribution is over and its senders have told all."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        with stage.progress(IMAGE_BYTES, HOSTS) as show:
            while True:
                answer: dict[str, Any] = await api.get(f"/v1/distributions/{distribution_id}")
                for host in answer["progress"]:
                    show(host["host"], host["bytes_done"])
                if answer["state"] not in ("fetching", "distributing"):
                    break
                await asyncio.sleep(POLL_SECONDS)
        received = sum(
            host["received_from_seed_bytes"] + host["received_from_peers_bytes"]
            for host in answer["progress"]
        )
        while answer["seed_sent_bytes"] + answer["peers_sent_bytes"] < received:
            await asyncio.sleep(POLL_SECONDS)
            answer = await api.get(f"/v1/distributions/{distribution_id}")
    return answer


async def tell(stage: Stage) -> None:
    """An image goes to three hosts."""
    stage.step(f"Three agents start, and an image of {IMAGE_BYTES // MIB} MiB is made")
    source = stage.state_dir / "image.raw"
    async with asyncio.TaskGroup() as group:
        making = group.create_task(asyncio.to_thread(make_image, source))
        starting = [group.create_task(start_agent(stage, host)) for host in HOSTS]
    digest, places = making.result(), [task.result() for task in starting]
    stage.step("It is fetched, checked against its sha512, and announced to the hosts")
    async with stage.api("precache") as api:
        made = await api.post(
            "/v1/distributions",
            {
                "image_id": IMAGE_ID,
                "hosts": list(HOSTS),
                "image": {
                    "image_id": IMAGE_ID,
                    "name": "demo-256",
                    "fetcher": "file",
                    "location": str(source),
                    "os_hash_algo": "sha512",
                    "os_hash_value": digest,
                },
            },
        )
        answer = await watch(stage, api, made["distribution_id"])
    hosts = answer["progress"]
    stage.table(
        "what moved, in MiB, as each side counted it",
        ["host", "state", "from the seed", "from peers", "sent to peers"],
        [
            [
                host["host"],
                host["state"],
                round(host["received_from_seed_bytes"] / MIB, 1),
                round(host["received_from_peers_bytes"] / MIB, 1),
                round(host["sent_bytes"] / MIB, 1),
            ]
            for host in hosts
        ],
    )
    copies = answer["seed_sent_bytes"] / IMAGE_BYTES
    stage.say(
        f"the seed sent {answer['seed_sent_bytes']:,} bytes ({copies:.2f} copies),"
        f" the hosts sent each other {answer['peers_sent_bytes']:,}"
    )
    stage.check(
        f"the seed sent at most {MOST_SEED_COPIES} copies for three hosts",
        copies <= MOST_SEED_COPIES,
    )
    stage.check("every host has the image", answer["host_states"] == {"cached": len(HOSTS)})
    found = await asyncio.gather(
        *(asyncio.to_thread(sha512_of, place / nova_name(IMAGE_ID)) for place in places)
    )
    stage.check(f"each copy's sha512 is the source's, {digest[:16]}...", set(found) == {digest})


def nova_name(image_id: str) -> str:
    """The file name that Nova looks for in `_base` (nova/virt/libvirt/imagecache.py)."""
    return hashlib.sha1(image_id.encode(), usedforsecurity=False).hexdigest()
