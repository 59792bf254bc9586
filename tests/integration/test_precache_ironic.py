"""What precache places in `master_images` is what Ironic deploys: by Ironic's own code.

`peers/ironic_cache.py` is the instance image cache of Ironic 35, with a real Glance behind it. That Ironic
asks Glance what an image is, each time; that it did not fetch one is seen from the inode it deploys.
"""

import asyncio
import contextlib
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from hostler_common.testing import RunService
from hostler_precache import testing
from hostler_precache.placing.ironic_placer import FetchingError, IronicPlacer
from hostler_precache.placing.placement import Outcome, Wanted
from hostler_precache.placing.shelf import Shelf
from hostler_precache.transfer.manifest import BlobId, ImageId

DATA = random.Random(1).randbytes((1 << 20) + 512)
LISTED = testing.described(DATA)
CommandPeer = Callable[[str, str, Path], AbstractContextManager[Any]]
Upload = Callable[..., Awaitable[dict[str, Any]]]

CONF = """\
[DEFAULT]
force_raw_images = true
state_path = {state}
[pxe]
instance_master_path = {state}/master_images
[glance]
auth_type = none
endpoint_override = {glance}
[oslo_concurrency]
lock_path = {state}/locks
"""


class Ironic:
    """The image cache of a conductor, in a process of its own."""

    def __init__(self, conf: Path, peer: Any) -> None:
        self.state = conf.parent
        self.master_images = self.state / "master_images"
        self.begin, self.end, self.do = peer.begin, peer.end, peer.do


@pytest.fixture
def ironic(command_peer: CommandPeer, glance: str, tmp_path: Path) -> Iterator[Ironic]:
    """An Ironic that has deployed nothing yet, beside the Glance of the test."""
    conf = tmp_path / "ironic" / "ironic.conf"
    conf.parent.mkdir()
    conf.write_text(CONF.format(state=conf.parent, glance=glance))
    with command_peer("ironic", "ironic_cache.py", conf) as peer:
        yield Ironic(conf, peer)


def placed_found_pinned_and_let_go(ironic: Ironic, shelf: Shelf, wanted: Wanted) -> None:
    with testing.transferred(shelf, wanted, DATA) as store:
        assert shelf.place(wanted, store, LISTED) is Outcome.PLACED
    target = shelf.target(wanted)
    inode = target.stat().st_ino
    disk = ironic.state / "node" / "disk"

    assert ironic.do("deploy", image_id=wanted.image_id, to=str(disk)) == inode

    disk.unlink()
    assert target.name in ironic.do("clean")  # our link pins it
    assert ironic.do("deploy", image_id=wanted.image_id, to=str(disk)) == inode
    assert shelf.tend([], [wanted.image_id]).removed == ()  # a deployment has it
    assert target.name in ironic.do("clean")
    disk.unlink()
    assert target.name not in ironic.do("clean")  # not wanted, not in use: Ironic's to remove
    assert shelf.tend([]).removed == ()


def fetched_by_ironic_while_we_come(ironic: Ironic, shelf: Shelf, wanted: Wanted) -> None:
    target = shelf.target(wanted)
    with testing.transferred(shelf, wanted, DATA) as store:
        ironic.begin("deploy", image_id=wanted.image_id, to=str(ironic.state / "second"))
        while not target.exists() and not list(ironic.master_images.glob("tmp*")):
            time.sleep(0.001)
        with contextlib.suppress(FetchingError):
            assert shelf.place(wanted, store, LISTED) is Outcome.EXISTING
        inode = ironic.end()  # it did not fail
        if list((shelf.directory / ".precache").glob("*.part")):  # we were sent away
            assert shelf.place(wanted, store, LISTED) is Outcome.EXISTING
    assert target.stat().st_ino == inode
    assert target.read_bytes() == DATA


async def test_ironic_deploys_what_was_placed_and_keeps_it_while_it_is_wanted_or_in_use(
    ironic: Ironic, glance: str, upload: Upload
) -> None:
    shelf = Shelf(IronicPlacer(ironic.master_images, force_raw=True))
    for story in (placed_found_pinned_and_let_go, fetched_by_ironic_while_we_come):
        image = await upload(glance, DATA, visibility="public")
        wanted = Wanted(
            image_id=ImageId(image["id"]),
            blob_id=BlobId(str(uuid.uuid4())),
            disk_format="raw",
        )
        await asyncio.to_thread(story, ironic, shelf, wanted)
    shelf.close()


# --- the whole way


@pytest.mark.parametrize("disk_format", ["raw", "qcow2"])
async def test_ironic_deploys_what_its_conductors_agent_got_from_the_swarm_by_itself(
    disk_format: str, ironic: Ironic, glance: str, upload: Upload,
    qcow2_of: Callable[[bytes, Path], bytes], run_service: RunService, amqp_url: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    content = DATA
    if disk_format == "qcow2":  # Ironic would make it raw itself
        content = await asyncio.to_thread(qcow2_of, DATA, tmp_path)
    image = await upload(glance, content, disk_format=disk_format, visibility="public")
    image_id = image["id"]
    target = ironic.master_images / f"{image_id}.converted"
    async with (
        testing.service(run_service, tmp_path, glance_url=glance) as service,
        testing.agent_process(
            "conductor-1", ironic.master_images, amqp_url=amqp_url, precache_url=service.url,
            settings={"placer": "ironic"},
        ) as agent,
    ):  # fmt: skip
        body = {
            "image_id": image_id,
            "image": {
                "image_id": image_id,
                "fetcher": "glance",
                "disk_format": disk_format,
                "os_hash_algo": image["os_hash_algo"],
                "os_hash_value": image["os_hash_value"],
            },
            "hosts": ["conductor-1"],
        }
        made = await service.api.post("/v1/distributions", body)
        answer = await testing.ended(service.api, made["distribution_id"])
        (host,) = answer["progress"]
        assert (answer["state"], answer["verification"]) == ("done", "hash")
        assert (host["host"], host["state"], host["reason"]) == ("conductor-1", "cached", None)
        assert host["received_from_seed_bytes"] == len(DATA)
        assert target.read_bytes() == DATA
        inode = target.stat().st_ino

        # with its store empty, Glance can still say what the image is, and not give it
        (tmp_path / "glance" / "images" / image_id).unlink()
        disk = ironic.state / "node" / "disk"
        deployed = await asyncio.to_thread(ironic.do, "deploy", image_id=image_id, to=str(disk))
        assert deployed == inode
        assert disk.read_bytes() == DATA
        disk.unlink()
        assert target.name in await asyncio.to_thread(ironic.do, "clean")  # the agent pins it
        assert agent.events("image_ready")
