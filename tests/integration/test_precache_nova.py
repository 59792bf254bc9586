"""What precache places is what Nova finds: by Nova's own code, in a process of Nova's own.

`peers/nova_cache.py` is Nova 34: its image backend, its cache manager, its lock; it says there what is
not Nova's. Where Nova is to ask nobody for an image, its Glance is a port that nobody listens on.
"""

import asyncio
import contextlib
import os
import random
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from hostler_common import servers
from hostler_common.testing import RunService, eventually
from hostler_precache import messages, testing
from hostler_precache.placing import nova_lock, placement, placers
from hostler_precache.placing.placement import Outcome, Wanted
from hostler_precache.placing.shelf import Shelf
from hostler_precache.settings import AgentSettings
from hostler_precache.transfer.manifest import BlobId, ImageId
from hostler_precache.transfer.pieces import PieceStore

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
[notifications]
notification_format = versioned
[oslo_messaging_notifications]
driver = log
"""


CommandPeer = Callable[[str, str, Path], AbstractContextManager[Any]]
RunNova = Callable[..., AbstractContextManager["Nova"]]
Upload = Callable[..., Awaitable[dict[str, Any]]]


class Nova:
    """A Nova in a process of its own, on a directory of its own."""

    def __init__(self, conf: Path, peer: Any) -> None:
        self.conf = conf
        self.instances = conf.parent / "instances"
        self.begin, self.end, self.do = peer.begin, peer.end, peer.do
        self.Failed: type[Exception] = peer.Failed


def spawning(image: Wanted) -> dict[str, object]:
    return {"uuid": str(uuid.uuid4()), "image_id": image.image_id, "size_bytes": ROOT_BYTES}


@pytest.fixture(scope="session")
def run_nova(command_peer: CommandPeer) -> RunNova:
    """`with run_nova(state, **options) as nova`."""

    @contextlib.contextmanager
    def run(
        state: Path, *, images_type: str = "default", glance: str | None = None
    ) -> Iterator[Nova]:
        (state / "instances" / "_base").mkdir(parents=True)
        conf = state / "nova.conf"
        nobody = f"http://127.0.0.1:{servers.free_port()}"
        conf.write_text(CONF.format(state=state, images_type=images_type, glance=glance or nobody))
        with command_peer("nova", "nova_cache.py", conf) as peer:
            yield Nova(conf, peer)

    return run


@pytest.fixture(scope="module")
def nova(run_nova: RunNova, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nova]:
    """Nova as it is by default: disks are qcow2 overlays on raw bases. It reaches no Glance."""
    with run_nova(tmp_path_factory.mktemp("nova")) as running:
        yield running


@pytest.fixture(scope="module")
def copying_nova(run_nova: RunNova, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nova]:
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


LISTED = testing.described(DATA)


def transferred(shelf: Shelf, wanted: Wanted) -> AbstractContextManager[PieceStore]:
    return testing.transferred(shelf, wanted, DATA)


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
    with pytest.raises(nova.Failed, match="Connection to glance host"):
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
    with pytest.raises(nova.Failed, match="Connection to glance host"):  # it is Nova's to fetch
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


# --- what is said of it


def test_what_we_say_of_an_image_and_its_hosts_is_what_nova_would_say_of_an_aggregate(
    nova: Nova,
) -> None:
    distribution_id, image_id = str(uuid.uuid4()), str(uuid.uuid4())
    said = nova.do("notifications", uuid=distribution_id, name=image_id, hosts=["h1", "h2"])

    data = messages.AggregateData(uuid=distribution_id, name=image_id, hosts=["h1", "h2"])
    assert messages.AggregatePayload(data=data).model_dump() == said["start"]
    progress = messages.AggregateCacheData(
        uuid=distribution_id,
        name=image_id,
        host="h1",
        images_cached=[image_id],
        images_failed=[],
        index=1,
        total=2,
    )
    assert messages.AggregateCachePayload(data=progress).model_dump() == said["progress"]


# --- at the same time


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
    run_nova: RunNova, glance: str, upload: Upload, tmp_path: Path
) -> None:
    with (
        run_nova(tmp_path / "nova", glance=glance) as nova,
        shelf_of(nova, patience_seconds=60.0) as shelf,
    ):

        async def race(command: str, first: str) -> Outcome:
            wanted = image((await upload(glance, DATA, visibility="public"))["id"])
            return await asyncio.to_thread(raced, nova, shelf, wanted, command, first)

        assert await race("spawn", "ours") is Outcome.PLACED
        assert await race("spawn", "nova") is Outcome.EXISTING
        for command in ("spawn", "cache_image", "spawn", "cache_image"):
            await race(command, "nobody")
        assert await race("cache_image", "ours") is Outcome.PLACED
        await race("cache_image", "nova")


# --- the whole way


async def test_nova_stands_on_what_an_agent_fetched_and_hears_where_it_could_not(
    nova: Nova, run_service: RunService, amqp_url: str, tmp_path: Path
) -> None:
    in_ceph = tmp_path / "ceph.conf"
    in_ceph.write_text(
        f"[DEFAULT]\ninstances_path = {tmp_path}/ceph\n[libvirt]\nimages_type = rbd\n"
    )
    wanted = image()
    async with (
        testing.http_source() as source,
        testing.service(run_service, tmp_path) as service,
        contextlib.AsyncExitStack() as stack,
    ):
        for host, conf, base in (
            ("compute-1", nova.conf, nova.instances / "_base"),
            ("compute-2", in_ceph, tmp_path / "ceph" / "_base"),
        ):
            agent = testing.agent_process(
                host, base, amqp_url=amqp_url, precache_url=service.url,
                settings={
                    "placer": "nova", "nova_config_files": conf, "target_template": "{sha1}",
                },
            )  # fmt: skip
            await stack.enter_async_context(agent)
        body = {
            "image_id": wanted.image_id,
            "image": {"image_id": wanted.image_id, "location": source.add("image", DATA)},
            "hosts": ["compute-1", "compute-2"],
        }
        made = await service.api.post("/v1/distributions", body)

        async def over() -> dict[str, Any] | None:
            path = f"/v1/distributions/{made['distribution_id']}"
            answer: dict[str, Any] = await service.api.get(path)
            return answer if answer["state"] == "done" else None

        one, two = (await eventually(over))["progress"]
    assert (one["state"], one["reason"]) == ("cached", None)
    assert two["state"] == "unsupported"
    assert two["reason"].startswith("nova.images_type: rbd: ")
    spawned = await asyncio.to_thread(nova.do, "spawn", **spawning(wanted))
    target = nova.instances / "_base" / placement.target(Path(), "{sha1}", wanted.image_id)
    assert spawned["backing"] == str(target)
    assert target.read_bytes() == DATA
    assert not list((tmp_path / "ceph").glob("**/*.part"))
