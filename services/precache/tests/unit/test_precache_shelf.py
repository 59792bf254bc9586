"""Files get their names whole, stay while they are wanted, and go when nobody wants or uses them."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hostler_precache.placing import nova_lock
from hostler_precache.placing.eviction import Quota
from hostler_precache.placing.ironic_placer import IronicPlacer
from hostler_precache.placing.nova_conf import NovaConf
from hostler_precache.placing.nova_placer import NovaPlacer
from hostler_precache.placing.ownership import NotPermittedError
from hostler_precache.placing.placement import Outcome, Placer, UnsupportedError, Wanted
from hostler_precache.placing.placers import DirectoryPlacer
from hostler_precache.placing.shelf import Shelf
from hostler_precache.placing.shelf_room import QuotaError
from hostler_precache.testing import described, transferred
from hostler_precache.transfer import manifest, pieces
from hostler_precache.transfer.manifest import BlobId, ImageId
from hostler_precache.transfer.pieces import BusyError, NoSpaceError, TargetExistsError

PIECE = manifest.MIN_PIECE_BYTES
DATA = random.Random(1).randbytes(2 * PIECE + 4321)
NOBODY = 65534
DAY = 86400.0


def image(number: int = 1, disk_format: str = "raw") -> Wanted:
    return Wanted(
        image_id=ImageId(f"155d900f-4e14-4e4c-a73d-{number:012d}"),
        blob_id=BlobId(f"5a0e1d0e-0000-4000-8000-{number:012d}"),
        disk_format=disk_format,
    )


def brought(shelf: Shelf, wanted: Wanted, data: bytes = DATA, *, replace: bool = False) -> Outcome:
    """What the agent does, with the swarm left out."""
    with transferred(shelf, wanted, data) as store:
        return shelf.place(wanted, store, described(data), replace=replace)


def found(shelf: Shelf, wanted: Wanted, data: bytes = DATA, *, replace: bool = False) -> bool:
    fd = shelf.find(wanted, described(data), replace=replace)
    if fd is not None:
        os.close(fd)
    return fd is not None


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


class Clock:
    """Seconds since the epoch, when the test says so."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


Make = Callable[..., Shelf]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def instances(tmp_path: Path) -> Path:
    path = tmp_path / "instances"
    path.mkdir()
    return path


@pytest.fixture
def make(instances: Path, clock: Clock) -> Iterator[Make]:
    """`make(placer=..., **options)`: the shelf of Nova's `_base`, unless another placer is given."""
    shelves = []

    def shelf(placer: Placer | None = None, **options: object) -> Shelf:
        conf = NovaConf(instances_path=instances, base_directory=instances / "_base")
        options = {"patience_seconds": 0.0, "clock": clock, **options}
        shelves.append(Shelf(placer or NovaPlacer(conf), **options))  # type: ignore[arg-type]
        return shelves[-1]

    yield shelf
    for one in shelves:
        one.close()


def overlay(instances: Path, base: Path, name: str = "11111111-uuid") -> Path:
    disk = instances / name / "disk"
    disk.parent.mkdir()
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(base), str(disk)],
        check=True,
    )
    return disk


# --- into place


def test_a_placed_file_is_whole_readable_and_its_owners(make: Make, instances: Path) -> None:
    os.chown(instances, NOBODY, NOBODY)
    shelf, wanted = make(), image()

    assert brought(shelf, wanted) is Outcome.PLACED

    target = shelf.target(wanted)
    assert target.read_bytes() == DATA
    assert target.stat().st_mode & 0o7777 == 0o644
    for path in (target, target.parent, target.parent / ".precache"):
        assert path.stat().st_uid == NOBODY
    assert not list((target.parent / ".precache").glob("*.part"))
    assert shelf.is_ours(wanted)


def test_what_nova_scans_has_nothing_of_ours_but_the_bases(make: Make, instances: Path) -> None:
    shelf, wanted = make(), image()
    brought(shelf, wanted)

    assert names(instances / "_base") == [".precache", shelf.target(wanted).name]


def test_the_same_bytes_that_appeared_meanwhile_stay_and_ours_go(
    make: Make, instances: Path
) -> None:
    shelf, wanted, listed = make(), image(), described(DATA)
    store = pieces.PieceStore.open(shelf.directory, wanted.blob_id, listed)
    for piece, span in manifest.spans(listed):
        store.write(piece, DATA[span.start : span.stop])
    target = shelf.target(wanted)
    target.write_bytes(DATA)  # Nova was faster
    inode = target.stat().st_ino

    outcome = shelf.place(wanted, store, listed)
    store.close()

    assert outcome is Outcome.EXISTING
    assert target.stat().st_ino == inode
    assert not list((target.parent / ".precache").glob("*.part"))
    assert not shelf.is_ours(wanted)


def test_another_file_of_that_name_stays(make: Make) -> None:
    shelf, wanted = make(), image()
    target = shelf.target(wanted)
    target.parent.mkdir()
    target.write_bytes(b"something else")

    with pytest.raises(TargetExistsError, match="is another file"):
        found(shelf, wanted)
    with pytest.raises(TargetExistsError):
        brought(shelf, wanted)
    assert target.read_bytes() == b"something else"


def test_another_file_is_replaced_where_that_is_wanted_but_never_in_use(
    make: Make, instances: Path
) -> None:
    shelf, wanted = make(), image()
    target = shelf.target(wanted)
    target.parent.mkdir()
    target.write_bytes(bytes(1 << 20))
    disk = overlay(instances, target)

    with pytest.raises(TargetExistsError, match="in use"):
        brought(shelf, wanted, replace=True)
    assert target.read_bytes() == bytes(1 << 20)

    disk.unlink()
    assert brought(shelf, wanted, replace=True) is Outcome.PLACED
    assert target.read_bytes() == DATA


def test_while_nova_fetches_the_image_ours_waits_for_another_time(
    make: Make, instances: Path
) -> None:
    shelf, wanted = make(), image()
    name = shelf.target(wanted).name
    code = (
        "import fcntl,sys; f=open(sys.argv[1],'a'); fcntl.lockf(f, fcntl.LOCK_EX);"
        "print('held', flush=True); sys.stdin.read()"
    )
    (instances / "locks").mkdir()
    nova = subprocess.Popen(
        [sys.executable, "-c", code, str(instances / "locks" / f"nova-{name}")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert nova.stdout is not None
    nova.stdout.readline()
    try:
        with pytest.raises(nova_lock.LockedError):
            brought(shelf, wanted)
        assert not shelf.target(wanted).exists()
    finally:
        nova.communicate()

    assert brought(shelf, wanted) is Outcome.PLACED  # with the pieces it had


def test_bytes_that_a_guessing_program_takes_for_another_format_are_refused(make: Make) -> None:
    shelf, wanted = make(), image()
    data = b"QFI\xfb" + DATA

    with pytest.raises(UnsupportedError, match="those of qcow2"):
        brought(shelf, wanted, data)
    assert names(shelf.directory) == [".precache"]
    assert not list((shelf.directory / ".precache").glob("*.part"))


def test_a_second_agent_of_the_same_place_finds_but_does_not_keep_house(make: Make) -> None:
    first, second, wanted = make(), make(), image()
    brought(first, wanted)

    assert found(second, wanted)
    with pytest.raises(BusyError, match="another agent"):
        second.tend([])
    first.close()
    assert second.tend([wanted]).lost == ()
    assert second.is_ours(wanted)


# --- found again


def test_after_a_restart_a_placed_file_is_known_without_reading_it(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, wanted = make(), image()
    brought(first, wanted)
    first.close()

    def read(*_: object) -> bool:
        raise AssertionError("it was read")

    monkeypatch.setattr(pieces, "is_exactly", read)
    second = make()
    assert found(second, wanted)
    assert second.is_ours(wanted)


def test_a_file_that_its_owner_removed_is_back_from_the_link_that_was_kept(make: Make) -> None:
    shelf, wanted = make(), image()
    brought(shelf, wanted)
    target = shelf.target(wanted)
    inode = target.stat().st_ino
    target.unlink()

    assert found(shelf, wanted)
    assert (target.stat().st_ino, target.read_bytes()) == (inode, DATA)

    target.unlink()
    assert shelf.tend([wanted]).lost == ()
    assert target.stat().st_ino == inode


def test_without_a_kept_link_a_file_that_went_is_lost_and_can_be_fetched(make: Make) -> None:
    shelf, wanted = make(keep_link=False), image()
    brought(shelf, wanted)
    shelf.target(wanted).unlink()

    assert shelf.tend([wanted]).lost == (wanted,)
    assert not found(shelf, wanted)
    assert brought(shelf, wanted) is Outcome.PLACED


def test_where_only_the_lock_went_no_image_is_lost(make: Make) -> None:
    shelf, first, second = make(), image(1), image(2)
    brought(shelf, first)
    (shelf.directory / ".precache" / "agent.lock").unlink()
    brought(shelf, second)

    assert shelf.tend([first, second]).lost == ()
    assert shelf.is_ours(first)
    with pytest.raises(BusyError):
        make().tend([])


def test_an_image_that_is_another_after_its_place_was_put_back_is_lost(
    make: Make, tmp_path: Path
) -> None:
    shelf, wanted = make(), image()
    brought(shelf, wanted)
    before = shelf.directory.rename(tmp_path / "before")
    brought(shelf, wanted, DATA[:-1])
    shelf.tend([wanted])
    shutil.rmtree(shelf.directory)
    before.rename(shelf.directory)

    assert shelf.tend([wanted]).lost == (wanted,)


@pytest.mark.parametrize("wiped", ["all of it", "the directory, too", "what is ours in it"])
def test_a_place_that_is_wiped_is_begun_anew_and_what_was_there_is_lost(
    make: Make, instances: Path, wiped: str
) -> None:
    shelf, first, second = make(), image(1), image(2)
    brought(shelf, first)
    brought(shelf, second)
    match wiped:
        case "what is ours in it":
            shutil.rmtree(shelf.directory / ".precache")
        case "all of it":
            shutil.rmtree(shelf.directory)
            shelf.directory.mkdir()
        case _:
            shutil.rmtree(shelf.directory)
    is_there = shelf.target(first).exists()

    assert found(shelf, first) is is_there  # it may be asked for before its loss is noticed
    # what was found meanwhile is not lost
    assert set(shelf.tend([first, second]).lost) == {first, second} - (
        {first} if is_there else set()
    )
    assert shelf.tend([first, second]).lost == ()
    assert brought(shelf, second) is (Outcome.EXISTING if is_there else Outcome.PLACED)
    assert shelf.tend([first, second]).lost == ()
    other = make()
    with pytest.raises(BusyError):  # it is ours again
        other.tend([])


def test_a_file_that_its_owner_fetched_anew_is_its_own_again(make: Make) -> None:
    shelf, wanted = make(), image()
    brought(shelf, wanted)
    target = shelf.target(wanted)
    target.unlink()
    target.write_bytes(DATA)

    assert shelf.tend([wanted]).lost == (wanted,)
    assert found(shelf, wanted)
    assert not shelf.is_ours(wanted)
    shelf.tend([], [wanted.image_id])
    assert target.read_bytes() == DATA


def test_an_earlier_image_of_the_same_id_gives_way_once_it_is_not_wanted(make: Make) -> None:
    shelf, earlier = make(), image()
    brought(shelf, earlier)
    later = Wanted(image_id=earlier.image_id, blob_id=image(2).blob_id, disk_format="raw")

    with pytest.raises(TargetExistsError):
        found(shelf, later, DATA[:-1])
    shelf.tend([])
    assert not found(shelf, later, DATA[:-1])
    assert brought(shelf, later, DATA[:-1]) is Outcome.PLACED


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"schema": 1}', b'{"schema": 2}'])
def test_a_record_that_cannot_be_read_counts_as_none(make: Make, damage: bytes) -> None:
    first, wanted = make(), image()
    brought(first, wanted)
    first.close()
    (record,) = (first.directory / ".precache").glob("*.record")
    record.write_bytes(damage)

    second = make()
    assert found(second, wanted)
    assert not second.is_ours(wanted)


def test_a_record_of_another_name_or_with_wrong_types_is_not_believed(make: Make) -> None:
    first, wanted = make(), image()
    brought(first, wanted)
    first.close()
    (path,) = (first.directory / ".precache").glob("*.record")
    body = json.loads(path.read_bytes())
    for change in ({"name": "../../etc/passwd"}, {"inode": "7"}, {"is_ours": 1}):
        path.write_text(json.dumps({**body, **change}))
        shelf = make()
        shelf.tend([])
        assert shelf.holdings() == ()
        shelf.close()
        path.write_text(json.dumps(body))


# --- pins


def test_a_wanted_file_never_gets_old_enough_for_its_cleaner(make: Make, clock: Clock) -> None:
    shelf, wanted = make(), image()
    brought(shelf, wanted)
    target = shelf.target(wanted)
    os.utime(target, (clock() - 0.9 * DAY,) * 2)
    shelf.tend([wanted])

    assert clock() - target.stat().st_mtime < 60
    assert shelf.pin_seconds < DAY / 2


def test_pins_are_as_frequent_as_the_cleaner_is_quick(make: Make, instances: Path) -> None:
    conf = NovaConf(
        instances_path=instances, base_directory=instances / "_base", original_age_seconds=600.0
    )

    assert make(NovaPlacer(conf)).pin_seconds == 200.0


def test_what_is_not_wanted_any_more_is_not_touched_and_its_link_is_gone(
    make: Make, clock: Clock
) -> None:
    shelf, wanted = make(), image()
    brought(shelf, wanted)
    target = shelf.target(wanted)
    old = clock() - 0.9 * DAY
    os.utime(target, (old, old))

    shelf.tend([])

    assert target.stat().st_mtime == pytest.approx(old)
    assert target.stat().st_nlink == 1


# --- removal


def test_an_image_deleted_at_its_source_goes_at_once_unless_a_disk_stands_on_it(
    make: Make, instances: Path
) -> None:
    shelf, wanted, used = make(), image(1), image(2)
    for one in (wanted, used):
        brought(shelf, one)
    disk = overlay(instances, shelf.target(used))
    deleted = [wanted.image_id, used.image_id]

    assert shelf.tend([], deleted).removed == (shelf.target(wanted).name,)
    assert shelf.target(used).exists()

    disk.unlink()
    assert shelf.tend([], deleted).removed == (shelf.target(used).name,)
    assert names(shelf.directory) == [".precache"]
    assert names(shelf.directory / ".precache") == ["agent.lock"]


def test_what_its_owner_touched_lately_is_in_use(make: Make, clock: Clock) -> None:
    shelf, wanted = make(), image()
    brought(shelf, wanted)
    clock.ahead = 7300
    shelf.tend([wanted])  # our own touch says nothing
    os.utime(shelf.target(wanted), (clock(), clock()))  # Nova's says that an instance has it

    assert shelf.tend([], [wanted.image_id]).removed == ()
    clock.ahead += 2 * 2400 + 1
    assert shelf.tend([], [wanted.image_id]).removed == (shelf.target(wanted).name,)


def test_our_own_touch_keeps_nothing_in_use(make: Make, clock: Clock) -> None:
    shelf, wanted = make(), image()
    brought(shelf, wanted)
    os.utime(shelf.target(wanted), (clock() - 10800,) * 2)
    shelf.tend([wanted])
    assert clock() - shelf.target(wanted).stat().st_mtime < 60

    assert shelf.tend([], [wanted.image_id]).removed == (shelf.target(wanted).name,)


def test_an_unwanted_file_of_ours_goes_after_its_time_and_not_before(
    make: Make, clock: Clock
) -> None:
    shelf, wanted = make(unwanted_seconds=DAY), image()
    brought(shelf, wanted)

    shelf.tend([])
    clock.ahead = DAY - 10
    assert shelf.tend([]).removed == ()
    clock.ahead = DAY + 10
    assert shelf.tend([]).removed == (shelf.target(wanted).name,)


def test_a_clock_that_was_ahead_and_is_put_back_keeps_nothing_from_its_time(
    make: Make, clock: Clock
) -> None:
    clock.ahead = 10 * 365 * DAY
    shelf, kept, unwanted = make(unwanted_seconds=DAY), image(1), image(2)
    brought(shelf, kept)
    brought(shelf, unwanted)
    shelf.tend([kept])

    clock.ahead = 0.0
    assert shelf.tend([kept]).removed == ()
    due = shelf.next_scrub(every_seconds=7 * DAY, retry_seconds=DAY)
    assert due is not None
    assert due.image_id == kept.image_id
    shelf.scrubbed(due, damaged_pieces=0)
    assert shelf.next_scrub(every_seconds=7 * DAY, retry_seconds=DAY) is None
    clock.ahead = DAY + 10
    assert shelf.tend([kept]).removed == (shelf.target(unwanted).name,)


@pytest.mark.parametrize("age_seconds", [-1.0, 0.0, 1.0])
def test_however_short_its_owners_patience_is_files_are_not_touched_without_a_pause(
    make: Make, instances: Path, age_seconds: float
) -> None:
    conf = NovaConf(
        instances_path=instances,
        base_directory=instances / "_base",
        original_age_seconds=age_seconds,
    )
    assert make(NovaPlacer(conf)).pin_seconds == 1.0


def test_wanted_again_in_time_it_stays(make: Make, clock: Clock) -> None:
    shelf, wanted = make(unwanted_seconds=DAY), image()
    brought(shelf, wanted)
    shelf.tend([])
    shelf.tend([wanted])
    clock.ahead = 2 * DAY
    assert shelf.tend([wanted]) == shelf.tend([wanted])
    assert shelf.target(wanted).stat().st_nlink == 2


def test_what_somebody_else_placed_is_never_removed(make: Make, clock: Clock) -> None:
    shelf, wanted = make(), image()
    target = shelf.target(wanted)
    target.parent.mkdir()
    target.write_bytes(DATA)
    assert found(shelf, wanted)

    clock.ahead = 10 * DAY
    shelf.tend([], [wanted.image_id])

    assert target.read_bytes() == DATA
    assert shelf.holdings() == ()


# --- room


def test_the_quota_is_made_of_the_least_recently_used_that_nobody_wants(
    make: Make, clock: Clock
) -> None:
    quota = Quota(limit_bytes=3 << 20, high_bytes=3 << 20, low_bytes=2 << 20)
    shelf = make(quota=quota)
    first, second, third, fourth = (image(number) for number in range(1, 5))
    data = random.Random(2).randbytes(1 << 20)
    for one in (first, second, third):
        brought(shelf, one, data)
        clock.ahead += 10
    with pytest.raises(QuotaError, match="wanted or in use"):
        brought(shelf, fourth, data)

    shelf.tend([second])
    clock.ahead += 10
    brought(shelf, fourth, data)

    left = {one.record.image_id for one in shelf.holdings()}
    assert left == {second.image_id, fourth.image_id}


def test_above_the_high_mark_what_nobody_wants_goes_without_a_transfer(make: Make) -> None:
    quota = Quota(limit_bytes=4 << 20, high_bytes=1 << 20, low_bytes=1 << 19)
    shelf, wanted, unwanted = make(quota=quota), image(1), image(2)
    data = random.Random(6).randbytes(1 << 20)
    for one in (wanted, unwanted):
        brought(shelf, one, data)

    tended = shelf.tend([wanted])

    assert tended.evicted == (shelf.target(unwanted).name,)
    assert tended.held_bytes == 1 << 20


def test_a_base_in_use_is_not_evicted_whatever_the_quota(make: Make, instances: Path) -> None:
    quota = Quota(limit_bytes=1 << 20, high_bytes=1 << 20, low_bytes=0)
    shelf, used, other = make(quota=quota), image(1), image(2)
    brought(shelf, used)
    overlay(instances, shelf.target(used))
    shelf.tend([])

    with pytest.raises(QuotaError):
        brought(shelf, other, random.Random(3).randbytes(700_000))
    assert shelf.target(used).read_bytes() == DATA


def test_too_little_room_on_the_disk_is_refused_before_a_byte_is_fetched(make: Make) -> None:
    shelf, wanted = make(reserve_bytes=1 << 60), image()

    with pytest.raises(NoSpaceError, match="more than the disk") as caught:
        shelf.make_room(wanted, described(DATA))
    assert caught.value.reason == "storage.no_space"
    assert not list((shelf.directory / ".precache").glob("*.part"))


def test_ironics_deployments_keep_an_image_and_our_link_pins_it(
    make: Make, tmp_path: Path
) -> None:
    masters = tmp_path / "master_images"
    shelf, wanted = make(IronicPlacer(masters, force_raw=True), keep_link=False), image()
    brought(shelf, wanted)
    target = shelf.target(wanted)
    assert target.stat().st_nlink == 2

    (tmp_path / "node-disk").hardlink_to(target)
    assert shelf.tend([], [wanted.image_id]).removed == ()
    (tmp_path / "node-disk").unlink()
    assert shelf.tend([], [wanted.image_id]).removed == (target.name,)


# --- faults


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)], check=True)
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_full_disk_is_said_and_room_is_made_from_what_nobody_wants(
    make: Make, small_disk: Path
) -> None:
    shelf = make(DirectoryPlacer(small_disk / "images", "{image_id}"))
    first, second = image(1), image(2)
    data = random.Random(4).randbytes(3 << 20)
    brought(shelf, first, data)

    with pytest.raises(NoSpaceError) as caught:
        brought(shelf, second, data)
    assert caught.value.reason == "storage.no_space"
    assert shelf.target(first).read_bytes() == data

    shelf.tend([second])
    assert brought(shelf, second, data) is Outcome.PLACED
    assert not shelf.target(first).exists()


def test_a_disk_without_room_for_a_record_places_nothing_and_later_all(
    make: Make, small_disk: Path
) -> None:
    shelf, wanted = make(DirectoryPlacer(small_disk / "images", "{image_id}")), image()
    data = random.Random(5).randbytes(1 << 20)
    listed = described(data)
    shelf.make_room(wanted, listed)
    store = pieces.PieceStore.open(shelf.directory, wanted.blob_id, listed)
    for piece, span in manifest.spans(listed):
        store.write(piece, data[span.start : span.stop])
    store.flush()
    ballast = small_disk / "ballast"
    volume = os.statvfs(small_disk)
    ballast.write_bytes(bytes(volume.f_bavail * volume.f_frsize))

    with pytest.raises(pieces.PieceStoreError, match="No space left"):
        shelf.place(wanted, store, listed)
    assert not shelf.target(wanted).exists()

    ballast.unlink()
    assert shelf.place(wanted, store, listed) is Outcome.PLACED
    store.close()
    assert shelf.target(wanted).read_bytes() == data


def test_a_directory_that_is_read_only_is_said(make: Make, small_disk: Path) -> None:
    shelf, wanted = make(DirectoryPlacer(small_disk / "images", "{image_id}")), image()
    brought(shelf, wanted)
    shelf.close()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)

    other = make(DirectoryPlacer(small_disk / "images", "{image_id}"))
    with pytest.raises(NotPermittedError, match="read-only"):
        other.make_room(image(2), described(DATA))
    with pytest.raises(pieces.PieceStoreError, match="Read-only file system"):
        other.tend([])
    assert found(other, wanted)


def test_a_file_of_the_wrong_owner_is_made_its_owners(make: Make, instances: Path) -> None:
    shelf, wanted, listed = make(), image(), described(DATA)
    store = pieces.PieceStore.open(shelf.directory, wanted.blob_id, listed)  # as root
    for piece, span in manifest.spans(listed):
        store.write(piece, DATA[span.start : span.stop])
    for path in (instances, shelf.directory):
        os.chown(path, NOBODY, NOBODY)

    shelf.place(wanted, store, listed)
    store.close()

    assert shelf.target(wanted).stat().st_uid == NOBODY


KILLED = Path(__file__).parent / "killed_while_placing.py"


@pytest.mark.parametrize("action", ["place", "remove"])
def test_killed_at_any_step_of_placing_or_removing_the_next_run_puts_it_right(
    tmp_path: Path, action: str
) -> None:
    done = subprocess.run(
        [sys.executable, str(KILLED), action, str(tmp_path)],
        check=False, capture_output=True, text=True,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.splitlines()[-1]) > 10  # that many steps there were to be killed at
