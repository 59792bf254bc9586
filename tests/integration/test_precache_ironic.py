"""What precache places in `master_images` is what Ironic deploys: by Ironic's own code.

`peers/ironic_cache.py` is the instance image cache of Ironic 35, with a real Glance behind it. That Ironic
asks Glance what an image is, each time; that it did not fetch one is seen from the inode it deploys.
"""

import asyncio
import contextlib
import random
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

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
    command_peer: CommandPeer, glance: str, upload: Upload, tmp_path: Path
) -> None:
    conf = tmp_path / "ironic" / "ironic.conf"
    conf.parent.mkdir()
    conf.write_text(CONF.format(state=conf.parent, glance=glance))
    with command_peer("ironic", "ironic_cache.py", conf) as peer:
        ironic = Ironic(conf, peer)
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
