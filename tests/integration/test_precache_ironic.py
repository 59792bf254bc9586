"""What precache places in `master_images` is what Ironic deploys: by Ironic's own code.

`peers/ironic_cache.py` is the instance image cache of Ironic 35, with a real Glance behind it. That Ironic
asks Glance what an image is, each time; that it did not fetch one is seen from the inode it deploys.
"""

import asyncio
import contextlib
import io
import json
import random
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import aiohttp
import pytest_asyncio

from hostler_precache.placing.ironic_placer import FetchingError, IronicPlacer
from hostler_precache.placing.placement import Outcome, Wanted
from hostler_precache.placing.shelf import Shelf
from hostler_precache.transfer import manifest, pieces
from hostler_precache.transfer.manifest import BlobId, ImageId

PEERS = Path(__file__).parent / "peers"
DATA = random.Random(1).randbytes((1 << 20) + 512)
RunPeer = Callable[..., AbstractAsyncContextManager[str]]

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


class IronicError(Exception):
    """Ironic failed at it."""


class Ironic:
    """The image cache of a conductor, in a process of its own."""

    def __init__(self, state: Path, process: subprocess.Popen[str]) -> None:
        self.state = state
        self.master_images = state / "master_images"
        self._process = process

    def begin(self, do: str, **arguments: object) -> None:
        """Tell Ironic to do something."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()

    def end(self) -> Any:
        """What came of it."""
        assert self._process.stdout is not None
        answer = json.loads(self._process.stdout.readline())
        if "error" in answer:
            raise IronicError(answer["error"])
        return answer["ok"]

    def do(self, what: str, **arguments: object) -> Any:
        self.begin(what, **arguments)
        return self.end()


@contextlib.contextmanager
def run_ironic(state: Path, glance: str) -> Iterator[Ironic]:
    done = subprocess.run(
        [sys.executable, str(PEERS / "build.py"), "ironic"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    state.mkdir()
    conf = state / "ironic.conf"
    conf.write_text(CONF.format(state=state, glance=glance))
    with (state / "log").open("wb") as log:
        process = subprocess.Popen(
            [Path(done.stdout.strip()) / "bin" / "python", PEERS / "ironic_cache.py", conf],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
    try:
        yield Ironic(state, process)
    finally:
        process.communicate()


@pytest_asyncio.fixture
async def glance(run_peer: RunPeer, tmp_path: Path) -> AsyncIterator[str]:
    """A real Glance without Keystone."""
    directory = tmp_path / "glance"
    directory.mkdir()
    async with run_peer("glance", directory) as url:
        yield url


async def uploaded(glance: str) -> Wanted:
    """An image of Glance's with our bytes."""
    async with aiohttp.ClientSession() as session:
        body = {
            "name": "golden",
            "disk_format": "raw",
            "container_format": "bare",
            "visibility": "public",
        }
        async with session.post(f"{glance}/v2/images", json=body) as response:
            assert response.status == 201, await response.text()
            image_id = (await response.json())["id"]
        headers = {"Content-Type": "application/octet-stream"}
        url = f"{glance}/v2/images/{image_id}/file"
        async with session.put(url, data=io.BytesIO(DATA), headers=headers) as response:
            assert response.status == 204, await response.text()
    return Wanted(image_id=ImageId(image_id), blob_id=BlobId(str(uuid.uuid4())), disk_format="raw")


def described() -> manifest.Manifest:
    hasher = manifest.Hasher(manifest.MIN_PIECE_BYTES)
    hasher.update(DATA)
    return hasher.finish()


@contextlib.contextmanager
def transferred(shelf: Shelf, wanted: Wanted) -> Iterator[pieces.PieceStore]:
    """All pieces are here, and nothing is placed."""
    listed = described()
    shelf.make_room(wanted, listed)
    store = pieces.PieceStore.open(shelf.directory, wanted.blob_id, listed)
    try:
        for piece, span in manifest.spans(listed):
            store.write(piece, DATA[span.start : span.stop])
        yield store
    finally:
        store.close()


def placed_found_pinned_and_let_go(ironic: Ironic, shelf: Shelf, wanted: Wanted) -> None:
    with transferred(shelf, wanted) as store:
        assert shelf.place(wanted, store, described()) is Outcome.PLACED
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
    with transferred(shelf, wanted) as store:
        ironic.begin("deploy", image_id=wanted.image_id, to=str(ironic.state / "second"))
        while not target.exists() and not list(ironic.master_images.glob("tmp*")):
            time.sleep(0.001)
        with contextlib.suppress(FetchingError):
            assert shelf.place(wanted, store, described()) is Outcome.EXISTING
        inode = ironic.end()  # it did not fail
        if list((shelf.directory / ".precache").glob("*.part")):  # we were sent away
            assert shelf.place(wanted, store, described()) is Outcome.EXISTING
    assert target.stat().st_ino == inode
    assert target.read_bytes() == DATA


async def test_ironic_deploys_what_was_placed_and_keeps_it_while_it_is_wanted_or_in_use(
    glance: str, tmp_path: Path
) -> None:
    with run_ironic(tmp_path / "ironic", glance) as ironic:
        shelf = Shelf(IronicPlacer(ironic.master_images, force_raw=True))
        wanted = await uploaded(glance)
        await asyncio.to_thread(placed_found_pinned_and_let_go, ironic, shelf, wanted)
        wanted = await uploaded(glance)
        await asyncio.to_thread(fetched_by_ironic_while_we_come, ironic, shelf, wanted)
        shelf.close()
