"""What changed on disk is found at a pace that does not hurt, said, repaired in place and remembered."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from hostler_common import settings
from hostler_common.testing import eventually
from hostler_precache import testing
from hostler_precache.metrics import AgentMetrics
from hostler_precache.placing import keeper, scrub
from hostler_precache.placing.placement import Wanted
from hostler_precache.placing.placers import DirectoryPlacer
from hostler_precache.placing.scrub import Pace
from hostler_precache.placing.shelf import Shelf
from hostler_precache.placing.shelf_records import Record
from hostler_precache.settings import AgentSettings
from hostler_precache.transfer import manifest, pieces
from hostler_precache.transfer.manifest import BlobId, ImageId, Manifest
from hostler_precache.transfer.pieces import PieceStoreError

PIECE = manifest.MIN_PIECE_BYTES
DATA = testing.image_of(3 * PIECE + 99, seed=3)
WANTED = Wanted(image_id=ImageId("golden"), blob_id=BlobId("5a0e1d0e-0000-4000-8000-000000000001"))
FAST = 1e12


@pytest.fixture
def metrics() -> AgentMetrics:
    return AgentMetrics(CollectorRegistry())


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    """A shelf with one image on it."""
    shelf = Shelf(DirectoryPlacer(tmp_path / "images", "{image_id}"))
    put(shelf, WANTED)
    yield shelf
    shelf.close()


def put(shelf: Shelf, wanted: Wanted) -> None:
    """The image is on the shelf."""
    hasher = manifest.Hasher(PIECE)
    hasher.update(DATA)
    listed = hasher.finish()
    shelf.make_room(wanted, listed)
    store = pieces.PieceStore.open(shelf.directory, wanted.blob_id, listed)
    for piece, span in manifest.spans(listed):
        store.write(piece, DATA[span.start : span.stop])
    shelf.place(wanted, store, listed)
    store.close()


def damage(path: Path, *places: int) -> None:
    """Bits turn over, as a disk would have it: nobody's mtime says so."""
    status = path.stat()
    with path.open("r+b") as file:
        for place in places:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 0xFF]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


async def from_peers(record: Record, path: Path, listed: Manifest, damaged: int) -> int:
    """What the agent does with a swarm, with the swarm left out."""
    store = pieces.PieceStore.reopen(path, listed, damaged=damaged)
    for piece, span in manifest.spans(listed):
        if damaged >> piece & 1:
            store.write(piece, DATA[span.start : span.stop])
    store.flush()
    store.close()
    return 0


def only(shelf: Shelf) -> Record:
    (one,) = shelf.holdings()
    return one.record


async def scrubbed(
    shelf: Shelf, metrics: AgentMetrics, repair: scrub.Repair | None
) -> tuple[int, list[int]]:
    told: list[int] = []
    left = await keeper.scrub_once(
        shelf,
        only(shelf),
        damaged=lambda _, bad: told.append(bad),
        repair=repair,
        bytes_per_second=FAST,
        metrics=metrics,
    )
    return left, told


async def test_a_file_without_damage_is_read_and_not_told_of(
    shelf: Shelf, metrics: AgentMetrics
) -> None:
    before = only(shelf).scrubbed_at

    assert await scrubbed(shelf, metrics, from_peers) == (0, [])

    assert only(shelf).scrubbed_at > before
    assert metrics.scrubbed_bytes._value.get() == len(DATA)


async def test_damaged_pieces_are_named_fetched_and_right_again_in_the_same_file(
    shelf: Shelf, metrics: AgentMetrics
) -> None:
    path = shelf.target(WANTED)
    inode = path.stat().st_ino
    damage(path, 5, 3 * PIECE + 98)

    assert await scrubbed(shelf, metrics, from_peers) == (0, [0b1001])

    assert path.read_bytes() == DATA
    assert path.stat().st_ino == inode
    assert await scrubbed(shelf, metrics, from_peers) == (0, [])


@pytest.mark.parametrize("size", [0, PIECE + 7, len(DATA) + 5])
async def test_a_file_of_another_length_is_repaired_too(
    shelf: Shelf, metrics: AgentMetrics, size: int
) -> None:
    path = shelf.target(WANTED)
    os.truncate(path, size)

    left, told = await scrubbed(shelf, metrics, from_peers)

    assert left == 0
    assert told
    assert path.read_bytes() == DATA


async def test_what_cannot_be_repaired_is_remembered_and_tried_again(
    shelf: Shelf, metrics: AgentMetrics
) -> None:
    async def nobody_has_it(_: Record, __: Path, ___: Manifest, damaged: int) -> int:
        return damaged

    damage(shelf.target(WANTED), PIECE)

    assert await scrubbed(shelf, metrics, nobody_has_it) == (0b10, [0b10])
    assert only(shelf).damaged_pieces == 1
    assert shelf.next_scrub(every_seconds=0.0, retry_seconds=1e9) is None
    assert shelf.next_scrub(every_seconds=1e9, retry_seconds=0.0) == only(shelf)

    assert await scrubbed(shelf, metrics, from_peers) == (0, [0b10])
    assert only(shelf).damaged_pieces == 0


async def test_a_repair_that_nobody_can_help_with_keeps_no_other_file_from_being_read(
    shelf: Shelf, metrics: AgentMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Wanted(
        image_id=ImageId("other"), blob_id=BlobId("5a0e1d0e-0000-4000-8000-000000000002")
    )
    put(shelf, other)
    for one in (WANTED, other):
        damage(shelf.target(one), PIECE)
    begun: list[str] = []
    helped = asyncio.Event()

    async def later(record: Record, path: Path, listed: Manifest, damaged: int) -> int:
        begun.append(record.image_id)
        await helped.wait()
        return await from_peers(record, path, listed, damaged)

    loaded = settings.load(
        AgentSettings,
        amqp_url="amqp://nowhere/",
        precache_url="http://nowhere",
        scrub_seconds=0.01,
        scrub_bytes_per_second=1 << 40,
    )
    monkeypatch.setattr(keeper, "RETRY_SECONDS", 0.0)
    scrubbing = asyncio.create_task(
        keeper._scrub_forever(
            shelf, damaged=lambda _, __: None, repair=later, settings=loaded, metrics=metrics
        )
    )

    async def both_begun() -> bool:
        return len(begun) == 2

    async def both_right() -> bool:
        return all(shelf.target(one).read_bytes() == DATA for one in (WANTED, other))

    await eventually(both_begun)
    assert sorted(begun) == ["golden", "other"]  # and none of them twice, though both are due
    helped.set()
    await eventually(both_right)
    scrubbing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await scrubbing


async def test_a_file_that_was_replaced_meanwhile_is_not_scrubbed(
    shelf: Shelf, metrics: AgentMetrics
) -> None:
    path = shelf.target(WANTED)
    path.unlink()
    path.write_bytes(b"of somebody else")

    assert await scrubbed(shelf, metrics, from_peers) == (0, [])
    assert path.read_bytes() == b"of somebody else"


async def test_an_unwanted_file_is_not_scrubbed(shelf: Shelf) -> None:
    assert shelf.next_scrub(every_seconds=0.0, retry_seconds=0.0) is not None
    shelf.tend([])
    assert shelf.next_scrub(every_seconds=0.0, retry_seconds=0.0) is None


async def test_a_scrub_that_is_cancelled_ends_at_once(shelf: Shelf, metrics: AgentMetrics) -> None:
    task = asyncio.create_task(
        keeper.scrub_once(
            shelf,
            only(shelf),
            damaged=lambda _, __: None,
            repair=None,
            bytes_per_second=1.0,  # it would take nine days
            metrics=metrics,
        )
    )
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_a_reader_is_held_to_its_pace() -> None:
    now = [100.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    pace = Pace(bytes_per_second=1000.0, clock=lambda: now[0], sleep=sleep)
    for _ in range(50):
        pace.after_read(100)
        now[0] += 0.01  # what reading takes is part of it

    assert now[0] - 100.0 == pytest.approx(5.0, abs=0.02)


def test_a_reader_that_is_told_to_stop_stops() -> None:
    pace = Pace(bytes_per_second=1.0, is_stopped=lambda: True, sleep=lambda _: None)

    with pytest.raises(scrub.Stopped):
        pace.after_read(1)


# --- the loop


async def test_the_keeper_pins_scrubs_repairs_and_tells_what_was_lost(
    shelf: Shelf, metrics: AgentMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "ROUND_SECONDS", 0.02)
    monkeypatch.setattr(keeper, "SCRUB_PAUSE_SECONDS", 0.02)
    path = shelf.target(WANTED)
    damage(path, 1)
    lost: asyncio.Queue[Wanted] = asyncio.Queue()
    repaired = asyncio.Event()

    async def repair(record: Record, at: Path, listed: Manifest, damaged: int) -> int:
        left = await from_peers(record, at, listed, damaged)
        repaired.set()
        return left

    settings = AgentSettings(
        amqp_url="amqp://x", precache_url="http://x", scrub_seconds=1e-9,
        scrub_bytes_per_second=1 << 40,
    )  # fmt: skip
    task = asyncio.create_task(
        keeper.run(
            shelf,
            wanted=lambda: [WANTED],
            deleted=frozenset,
            lost=lost.put_nowait,
            damaged=lambda _, __: None,
            repair=repair,
            settings=settings,
            metrics=metrics,
        )
    )
    await asyncio.wait_for(repaired.wait(), 30)
    assert path.read_bytes() == DATA
    path.unlink()
    path.write_bytes(DATA)  # its owner's own now
    assert await asyncio.wait_for(lost.get(), 30) == WANTED
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_disk_that_fails_does_not_end_the_keeper(
    shelf: Shelf, metrics: AgentMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "ROUND_SECONDS", 0.01)
    rounds: asyncio.Queue[None] = asyncio.Queue()

    def tend(*_: object) -> None:
        loop.call_soon_threadsafe(rounds.put_nowait, None)
        raise PieceStoreError("the disk refused")

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(shelf, "tend", tend)
    settings = AgentSettings(amqp_url="amqp://x", precache_url="http://x", scrub_seconds=0)
    task = asyncio.create_task(
        keeper.run(
            shelf,
            wanted=list,
            deleted=frozenset,
            lost=lambda _: None,
            damaged=lambda _, __: None,
            repair=None,
            settings=settings,
            metrics=metrics,
        )
    )
    for _ in range(3):
        await asyncio.wait_for(rounds.get(), 30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
