"""What precache places is what Nova finds: by Nova's own code, in a process of Nova's own.

`peers/nova_cache.py` is Nova 34: its image backend, its cache manager, its lock; it says there what is
not Nova's. Where Nova is to ask nobody for an image, its Glance is a port that nobody listens on.
"""

import asyncio
import contextlib
import functools
import io
import json
import os
import random
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import IO, Any

import aiohttp
import pytest
import pytest_asyncio

from hostler_common import servers
from hostler_precache.placing import nova_lock, placers
from hostler_precache.placing.placement import Outcome, Wanted
from hostler_precache.placing.shelf import Shelf
from hostler_precache.settings import AgentSettings
from hostler_precache.transfer import manifest, pieces
from hostler_precache.transfer.manifest import BlobId, ImageId

PEERS = Path(__file__).parent / "peers"
DATA = random.Random(1).randbytes((1 << 20) + 512)
ROOT_BYTES = 8 << 20
DAY = 86400.0

CONF = """\
[DEFAULT]
state_path = {state}
instances_path = $state_path/instances
host = compute-1
[image_cache]
subdirectory_name = _base
[libvirt]
images_type = {images_type}
[database]
connection = sqlite:///{state}/nova.sqlite
[api_database]
connection = sqlite:///{state}/nova_api.sqlite
[glance]
api_servers = {glance}
num_retries = 0
"""


RunPeer = Callable[..., AbstractAsyncContextManager[str]]


@functools.cache
def nova_environment() -> Path:
    """Nova, installed."""
    done = subprocess.run(
        [sys.executable, str(PEERS / "build.py"), "nova"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return Path(done.stdout.strip())


class NovaError(Exception):
    """Nova failed at it."""


class Nova:
    """A Nova in a process of its own, on a directory of its own."""

    def __init__(self, state: Path, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.instances = state / "instances"
        self.base = self.instances / "_base"
        self.conf = state / "nova.conf"
        self._in: IO[str] = process.stdin
        self._out: IO[str] = process.stdout

    def begin(self, do: str, **arguments: object) -> None:
        """Tell Nova to do something."""
        self._in.write(json.dumps({"do": do, **arguments}) + "\n")
        self._in.flush()

    def end(self) -> Any:
        """What came of it."""
        answer = json.loads(self._out.readline())
        if "error" in answer:
            raise NovaError(answer["error"])
        return answer["ok"]

    def do(self, what: str, **arguments: object) -> Any:
        self.begin(what, **arguments)
        return self.end()


def spawning(image: Wanted) -> dict[str, object]:
    return {"uuid": str(uuid.uuid4()), "image_id": image.image_id, "size_bytes": ROOT_BYTES}


@contextlib.contextmanager
def run_nova(
    state: Path, *, images_type: str = "default", glance: str | None = None
) -> Iterator[Nova]:
    (state / "instances" / "_base").mkdir(parents=True)
    conf = state / "nova.conf"
    nobody = f"http://127.0.0.1:{servers.free_port()}"
    conf.write_text(CONF.format(state=state, images_type=images_type, glance=glance or nobody))
    python = nova_environment() / "bin" / "python"
    with (state / "log").open("wb") as log:
        process = subprocess.Popen(
            [python, PEERS / "nova_cache.py", conf],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
    try:
        yield Nova(state, process)
    finally:
        process.communicate()


@pytest.fixture(scope="module")
def nova(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nova]:
    """Nova as it is by default: disks are qcow2 overlays on raw bases. It reaches no Glance."""
    with run_nova(tmp_path_factory.mktemp("nova")) as running:
        yield running


@pytest.fixture(scope="module")
def copying_nova(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nova]:
    """Nova whose disks are copies of their bases."""
    with run_nova(tmp_path_factory.mktemp("copying"), images_type="raw") as running:
        yield running


@contextlib.contextmanager
def shelf_of(nova: Nova, **options: Any) -> Iterator[Shelf]:
    """What the agent makes when it is shown Nova's own configuration."""
    settings = AgentSettings(
        amqp_url="amqp://x",
        precache_url="http://x",
        nova_config_files=[str(nova.conf)],
    )
    shelf = Shelf(placers.nova(settings), **options)
    try:
        yield shelf
    finally:
        shelf.close()


@pytest.fixture
def shelf(nova: Nova) -> Iterator[Shelf]:
    """Precache's side of that Nova's host."""
    with shelf_of(nova, patience_seconds=0.0) as opened:
        yield opened


def image(image_id: str | None = None) -> Wanted:
    return Wanted(
        image_id=ImageId(image_id or str(uuid.uuid4())),
        blob_id=BlobId(str(uuid.uuid4())),
        disk_format="raw",
    )


def described(data: bytes) -> manifest.Manifest:
    hasher = manifest.Hasher(manifest.MIN_PIECE_BYTES)
    hasher.update(data)
    return hasher.finish()


LISTED = described(DATA)


@contextlib.contextmanager
def transferred(shelf: Shelf, wanted: Wanted) -> Iterator[pieces.PieceStore]:
    """All pieces are here, and nothing is placed."""
    shelf.make_room(wanted, LISTED)
    store = pieces.PieceStore.open(shelf.directory, wanted.blob_id, LISTED)
    try:
        for piece, span in manifest.spans(LISTED):
            store.write(piece, DATA[span.start : span.stop])
        store.flush()
        yield store
    finally:
        store.close()


def placed(shelf: Shelf, wanted: Wanted) -> Path:
    with transferred(shelf, wanted) as store:
        assert shelf.place(wanted, store, LISTED) is Outcome.PLACED
    return shelf.target(wanted)


def aged(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


# --- found


def test_nova_makes_a_disk_on_the_placed_base_and_asks_glance_for_nothing(
    nova: Nova, shelf: Shelf
) -> None:
    wanted = image()
    target = placed(shelf, wanted)

    made = nova.do("spawn", **spawning(wanted))

    assert made["backing"] == str(target)
    assert target.read_bytes() == DATA
    assert nova.do("cache_image", image_id=wanted.image_id) is False  # Nova's word for existing


def test_nova_would_have_asked_glance_had_the_base_not_been_there(nova: Nova) -> None:
    with pytest.raises(NovaError, match="Connection to glance host"):
        nova.do("spawn", **spawning(image()))


def test_nova_that_copies_its_bases_copies_the_placed_one(copying_nova: Nova) -> None:
    wanted = image()
    with shelf_of(copying_nova) as shelf:
        placed(shelf, wanted)

    made = copying_nova.do("spawn", **spawning(wanted))

    assert made["backing"] is None
    assert Path(made["disk"]).read_bytes()[: len(DATA)] == DATA


def test_what_nova_scans_and_counts_is_the_base_alone(nova: Nova, shelf: Shelf) -> None:
    wanted = image()
    before = nova.do("usage")
    with transferred(shelf, wanted) as store:
        assert nova.do("usage") == before
        shelf.place(wanted, store, LISTED)

    target = shelf.target(wanted)
    assert nova.do("usage") - before == target.stat().st_blocks * 512
    assert {target.name, ".precache"} <= set(nova.do("clean"))
    assert "precache" not in (nova.conf.parent / "log").read_text()


# --- the lock


def test_the_lock_is_one_and_the_same_for_nova_and_for_us(nova: Nova, shelf: Shelf) -> None:
    wanted = image()
    name = shelf.target(wanted).name
    with transferred(shelf, wanted) as store:
        nova.do("hold", name=name)
        with pytest.raises(nova_lock.LockedError):
            shelf.place(wanted, store, LISTED)
        assert not shelf.target(wanted).exists()
        nova.do("let_go")
        assert shelf.place(wanted, store, LISTED) is Outcome.PLACED

    with nova_lock.held(nova.instances / "locks", name, patience_seconds=0.0):
        assert nova.do("can_lock", name=name) is False
    assert nova.do("can_lock", name=name) is True


# --- age


def test_a_pinned_base_is_not_aged_away_and_an_unpinned_one_is(nova: Nova, shelf: Shelf) -> None:
    pinned, unpinned = image(), image()
    targets = [placed(shelf, one) for one in (pinned, unpinned)]
    for target in targets:
        aged(target, 1.5 * DAY)

    shelf.tend([pinned])
    left = nova.do("clean")

    assert [target.name in left for target in targets] == [True, False]


def test_a_base_that_nova_aged_away_while_no_agent_ran_is_back_without_a_transfer(
    nova: Nova, shelf: Shelf
) -> None:
    wanted = image()
    target = placed(shelf, wanted)
    inode = target.stat().st_ino
    aged(target, 1.5 * DAY)
    assert target.name not in nova.do("clean")

    assert shelf.tend([wanted]).lost == ()

    assert target.stat().st_ino == inode
    assert nova.do("spawn", **spawning(wanted))["backing"] == str(target)


# --- use


def test_a_base_that_a_disk_of_novas_stands_on_outlives_its_image(
    nova: Nova, shelf: Shelf
) -> None:
    wanted = image()
    target = placed(shelf, wanted)
    request = spawning(wanted)
    nova.do("spawn", **request)
    placement_time = target.stat().st_mtime

    assert shelf.tend([], [wanted.image_id]).removed == ()

    nova.do("destroy", uuid=request["uuid"])
    assert shelf.tend([], [wanted.image_id]).removed == ()  # Nova touched it when it spawned
    later = placement_time + 2 * 2400 + 10
    shelf.close()
    with shelf_of(nova, clock=lambda: later) as next_shelf:
        assert next_shelf.tend([], [wanted.image_id]).removed == (target.name,)
    assert not target.exists()
    with pytest.raises(NovaError, match="Connection to glance host"):  # it is Nova's to fetch
        nova.do("spawn", **spawning(wanted))


def test_a_base_that_novas_database_has_in_use_is_not_removed_though_no_disk_names_it(
    copying_nova: Nova,
) -> None:
    wanted = image()
    with shelf_of(copying_nova) as shelf:
        target = placed(shelf, wanted)
    copying_nova.do("spawn", **spawning(wanted))
    aged(target, 1.5 * DAY)
    copying_nova.do("clean")  # touches what instances use

    with shelf_of(copying_nova) as shelf:
        assert shelf.tend([], [wanted.image_id]).removed == ()
    assert target.exists()


# --- at the same time


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
    return image(image_id)


class Watcher:
    """Reads a file as often as it can, and remembers whatever was not the whole image."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.wrong: list[int] = []

    def __enter__(self) -> "Watcher":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set():
            try:
                content = self._path.read_bytes()
            except FileNotFoundError:
                continue
            if content != DATA:
                self.wrong.append(len(content))


def _waited_for(is_there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_there():
        assert time.monotonic() < deadline


def raced(nova: Nova, shelf: Shelf, wanted: Wanted, command: str, first: str) -> Outcome:
    """Nova fetches the base and we place it; whoever looks sees nothing or the whole image."""
    target = shelf.target(wanted)
    request = spawning(wanted) if command == "spawn" else {"image_id": wanted.image_id}
    with transferred(shelf, wanted) as store, Watcher(target) as watcher:
        if first == "ours":
            outcome = shelf.place(wanted, store, LISTED)
            nova.do(command, **request)
        else:
            nova.begin(command, **request)
            if first == "nova":
                part = target.with_name(f"{target.name}.part")
                while not part.exists() and not target.exists():
                    time.sleep(0.001)
            outcome = shelf.place(wanted, store, LISTED)
            nova.end()
    assert watcher.wrong == []
    assert target.read_bytes() == DATA
    assert not list(target.parent.glob(f"{target.name}.*"))
    if shelf.tend([wanted]).lost:  # cache_image takes no lock: Nova's own came over ours
        fd = shelf.find(wanted, LISTED)
        assert fd is not None
        os.close(fd)
    assert shelf.tend([wanted]).lost == ()
    return outcome


async def test_nova_fetching_and_us_placing_the_same_base_leave_one_whole_file(
    glance: str, tmp_path: Path
) -> None:
    with (
        run_nova(tmp_path / "nova", glance=glance) as nova,
        shelf_of(nova, patience_seconds=60.0) as shelf,
    ):

        async def race(command: str, first: str) -> Outcome:
            wanted = await uploaded(glance)
            return await asyncio.to_thread(raced, nova, shelf, wanted, command, first)

        assert await race("spawn", "ours") is Outcome.PLACED
        assert await race("spawn", "nova") is Outcome.EXISTING
        for command in ("spawn", "cache_image", "spawn", "cache_image"):
            await race(command, "nobody")
        assert await race("cache_image", "ours") is Outcome.PLACED
        await race("cache_image", "nova")
