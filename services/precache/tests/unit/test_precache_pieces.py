"""What is journaled survives anything; what is visible is whole."""

import os
import random
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostler_precache.swarming import swarm
from hostler_precache.transfer import manifest, pieces
from hostler_precache.transfer.manifest import BlobId

PIECE = manifest.MIN_PIECE_BYTES
BLOB = BlobId("5a0e1d0e-0000-4000-8000-000000000001")
DATA = random.Random(1).randbytes(5 * PIECE + 1234)


def described(data: bytes) -> manifest.Manifest:
    hasher = manifest.Hasher(PIECE)
    hasher.update(data)
    return hasher.finish()


MANIFEST = described(DATA)


def part(piece: int) -> bytes:
    span = MANIFEST.span(piece)
    return DATA[span.start : span.stop]


def opened(directory: Path) -> pieces.PieceStore:
    return pieces.PieceStore.open(directory, BLOB, MANIFEST)


def journal(directory: Path) -> Path:
    return directory / ".precache" / f"{BLOB}.journal"


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A store left behind with pieces journaled in a known order."""
    directory = tmp_path_factory.mktemp("crashed")
    store = opened(directory)
    order = [4, 0, 2]
    for piece in order:
        store.write(piece, part(piece))
        store.flush()
    store.close()
    return directory, order


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_journal_cut_at_any_byte_resumes_with_the_records_before_the_cut(
    crashed: tuple[Path, list[int]], data: st.DataObject
) -> None:
    directory, order = crashed
    whole = journal(directory).read_bytes()
    cut = data.draw(st.integers(min_value=0, max_value=len(whole)))
    header = len(whole) - 8 * len(order)
    try:
        journal(directory).write_bytes(whole[:cut])
        store = opened(directory)
        expected = swarm.bits(order[: max(0, cut - header) // 8])
        assert store.journaled == expected
        assert journal(directory).stat().st_size == header + 8 * expected.bit_count()
        store.write(1, part(1))
        store.flush()
        store.close()
        again = opened(directory)
        assert again.journaled == expected | 0b10
        again.close()
    finally:
        journal(directory).write_bytes(whole)


def test_a_flipped_bit_in_the_journal_never_invents_a_piece(
    crashed: tuple[Path, list[int]],
) -> None:
    directory, order = crashed
    whole = journal(directory).read_bytes()
    try:
        for bit in range(8 * len(whole)):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            journal(directory).write_bytes(damaged)
            store = opened(directory)
            assert store.journaled & ~swarm.bits(order) == 0
            store.close()
    finally:
        journal(directory).write_bytes(whole)


def test_a_piece_written_but_not_flushed_is_fetched_again(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.write(0, part(0))
    store.flush()
    store.write(1, part(1))
    store.close()
    again = opened(tmp_path)
    assert again.journaled == 0b1
    again.close()


def test_data_is_synced_before_the_journal_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path)
    store.write(0, part(0))
    seen = []
    real = os.fdatasync

    def spy(fd: int) -> None:
        seen.append((fd == store.fileno(), journal(tmp_path).stat().st_size))
        real(fd)

    empty = journal(tmp_path).stat().st_size
    monkeypatch.setattr(os, "fdatasync", spy)
    store.flush()
    store.close()
    assert seen == [(True, empty), (False, empty + 8)]


def test_the_file_appears_whole_under_its_name_and_leaves_nothing_beside_it(
    tmp_path: Path,
) -> None:
    target = tmp_path / "image"
    store = opened(tmp_path)
    for piece in (5, 3, 1, 0, 2, 4):
        assert not target.exists()
        store.write(piece, part(piece))
    store.place(target)
    assert target.read_bytes() == DATA
    assert target.stat().st_mode & 0o777 == 0o644
    assert list((tmp_path / ".precache").iterdir()) == []
    assert pieces.is_exactly(store.fileno(), MANIFEST)
    store.close()


def test_an_incomplete_file_is_not_placed(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.write(0, part(0))
    with pytest.raises(pieces.PieceStoreError, match="missing"):
        store.place(tmp_path / "image")
    assert not (tmp_path / "image").exists()
    store.close()


def complete(directory: Path) -> pieces.PieceStore:
    store = opened(directory)
    for piece in range(MANIFEST.count):
        store.write(piece, part(piece))
    return store


def test_a_file_of_that_name_is_left_alone_unless_told(tmp_path: Path) -> None:
    target = tmp_path / "image"
    target.write_bytes(b"somebody's")
    store = complete(tmp_path)
    with pytest.raises(pieces.TargetExistsError):
        store.place(target)
    assert target.read_bytes() == b"somebody's"
    store.place(target, replace=True)
    assert target.read_bytes() == DATA
    store.close()


def test_a_crash_between_link_and_unlink_ends_well_the_next_time(tmp_path: Path) -> None:
    target = tmp_path / "image"
    store = complete(tmp_path)
    store.flush()
    target.hardlink_to(tmp_path / ".precache" / f"{BLOB}.part")
    store.close()
    again = opened(tmp_path)
    again.place(target)
    again.close()
    assert target.read_bytes() == DATA
    assert list((tmp_path / ".precache").iterdir()) == []


def test_a_wrong_piece_is_refused_and_not_written(tmp_path: Path) -> None:
    store = opened(tmp_path)
    for wrong in (part(1), part(0)[:-1], part(0) + b"x", b""):
        with pytest.raises(pieces.PieceRejectedError):
            store.write(0, wrong)
    store.flush()
    assert store.journaled == 0
    assert os.pread(store.fileno(), PIECE, 0) == bytes(PIECE)
    store.close()


def test_the_journal_of_another_manifest_is_not_taken_over(tmp_path: Path) -> None:
    store = complete(tmp_path)
    store.flush()
    store.close()
    other = described(b"other" + DATA[5:])
    again = pieces.PieceStore.open(tmp_path, BLOB, other)
    assert again.journaled == 0
    again.close()


def test_too_little_room_is_said_before_anything_is_fetched(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    with pytest.raises(pieces.NoSpaceError, match="kept free"):
        pieces.PieceStore.open(tmp_path, BLOB, MANIFEST, reserve_bytes=2 * free)


def test_partial_files_that_nobody_wants_are_removed_unless_they_are_open(tmp_path: Path) -> None:
    names = {number: BlobId(f"5a0e1d0e-0000-4000-8000-00000000000{number}") for number in "123"}
    stores = {n: pieces.PieceStore.open(tmp_path, name, MANIFEST) for n, name in names.items()}
    for number in "12":
        stores[number].close()
    assert pieces.discard_others(tmp_path, {names["1"]}) == [names["2"]]
    stores["3"].close()
    left = {file.stem for file in (tmp_path / ".precache").iterdir()}
    assert left == {names["1"], names["3"]}
    assert pieces.discard_others(tmp_path / "nowhere", set()) == []


def test_two_stores_of_one_blob_exclude_each_other(tmp_path: Path) -> None:
    store = opened(tmp_path)
    with pytest.raises(pieces.BusyError):
        opened(tmp_path)
    store.close()
    opened(tmp_path).close()


def test_an_image_of_no_bytes_is_placed_too(tmp_path: Path) -> None:
    store = pieces.PieceStore.open(tmp_path, BLOB, described(b""))
    store.place(tmp_path / "image")
    store.close()
    assert (tmp_path / "image").read_bytes() == b""


@given(st.sets(st.integers(min_value=0, max_value=5)))
@settings(max_examples=20, deadline=None)
def test_damaged_pieces_of_a_file_are_named(damaged: set[int]) -> None:
    content = bytearray(DATA)
    for piece in damaged:
        content[piece * PIECE] ^= 1
    fd = os.memfd_create("image")
    try:
        os.write(fd, content)
        assert pieces.matching_pieces(fd, MANIFEST) == 0b111111 & ~swarm.bits(damaged)
        assert pieces.is_exactly(fd, MANIFEST) == (not damaged)
        os.write(fd, b"x")
        assert not pieces.is_exactly(fd, MANIFEST)
    finally:
        os.close(fd)


# --- pieces that come in blocks


def land(landing: pieces.Landing, data: bytes, block_bytes: int = 100_000) -> pieces.Landing:
    for start in range(0, len(data), block_bytes):
        landing.write(data[start : start + block_bytes])
    return landing


def in_file(store: pieces.PieceStore, piece: int) -> bytes:
    span = store.manifest.span(piece)
    return os.pread(store.fileno(), span.length, span.start)


def test_a_piece_that_lands_is_written_as_it_comes_and_counts_once_it_is_verified(
    tmp_path: Path,
) -> None:
    store = opened(tmp_path)
    landing = land(store.landing(2), part(2)[:-1])
    assert in_file(store, 2) == part(2)[:-1] + b"\0"
    with pytest.raises(pieces.PieceRejectedError):
        store.write(2, landing)
    landing = land(store.landing(2), part(2))
    assert not landing.is_spilled
    store.flush()
    assert store.journaled == 0
    store.write(2, landing)
    store.flush()
    assert store.journaled == 0b100
    store.close()


def test_a_landing_takes_no_more_than_its_piece_and_counts_for_no_other(tmp_path: Path) -> None:
    store = opened(tmp_path)
    landing = land(store.landing(0), part(0))
    with pytest.raises(pieces.PieceRejectedError):
        landing.write(b"x")
    with pytest.raises(pieces.PieceRejectedError):
        store.write(1, landing)
    with pytest.raises(pieces.PieceRejectedError):
        store.write(5, land(store.landing(5), bytes(MANIFEST.span(5).length)))
    assert in_file(store, 1) == bytes(PIECE)
    other = opened(tmp_path / "other")
    with pytest.raises(pieces.PieceRejectedError):
        other.write(0, landing)
    for each in (store, other):
        each.close()


def test_what_a_liar_still_sends_never_gets_over_what_is_verified(tmp_path: Path) -> None:
    store = opened(tmp_path)
    lying, honest = store.landing(1), store.landing(1)
    lying.write(b"lie" * 10)
    land(honest, part(1))
    assert honest.is_spilled
    store.write(1, honest)
    assert in_file(store, 1) == part(1)
    lying.write(bytes(PIECE - 30))
    assert in_file(store, 1) == part(1)
    with pytest.raises(pieces.PieceRejectedError):
        store.write(1, lying)
    late = store.landing(1)
    late.write(b"late lie")
    assert in_file(store, 1) == part(1)
    store.close()
    assert list((tmp_path / ".precache").glob("tmp*")) == []


def test_the_place_of_a_piece_is_free_again_when_its_landing_is_forgotten(tmp_path: Path) -> None:
    store = opened(tmp_path)
    first = store.landing(0)
    assert store.landing(0).is_spilled
    del first
    assert not store.landing(0).is_spilled
    store.close()


def test_a_thread_that_is_late_writes_nowhere_once_the_store_is_closed(tmp_path: Path) -> None:
    store = opened(tmp_path)
    landing = store.landing(0)
    number = store.fileno()
    store.close()
    another = os.open(tmp_path / "another", os.O_RDWR | os.O_CREAT)
    try:
        assert another == number  # the descriptor is somebody else's by now
        landing.write(part(0))
        assert os.fstat(another).st_size == 0
    finally:
        os.close(another)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_however_landings_of_one_piece_interleave_a_verified_one_stays(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    store = opened(tmp_path_factory.mktemp("race"))
    size = MANIFEST.span(3).length
    offered = [part(3), bytes(size), part(3), b"x" * size]
    under_way: dict[int, tuple[pieces.Landing, int]] = {}
    is_had = False
    for _ in range(data.draw(st.integers(min_value=1, max_value=25))):
        number = data.draw(st.integers(min_value=0, max_value=3))
        landing, done = under_way.pop(number, (None, 0))
        if landing is None:
            landing = store.landing(3)
        step = data.draw(st.sampled_from([1000, size // 2, size]))
        landing.write(offered[number][done : done + step])
        if done + step < size:
            under_way[number] = (landing, done + step)
            continue
        try:
            store.write(3, landing)
            is_had = True
        except pieces.PieceRejectedError:
            assert offered[number] != part(3)
        if is_had:
            assert in_file(store, 3) == part(3)
    store.flush()
    assert store.journaled == (0b1000 if is_had else 0)
    store.close()


# --- holes


GIB = 1 << 30


def sparse_file(path: Path, size_bytes: int, data: dict[int, bytes]) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, size_bytes)
    for offset, some in data.items():
        os.pwrite(fd, some, offset)
    return fd


def test_a_sparse_image_of_40_gib_costs_what_its_data_costs(tmp_path: Path) -> None:
    content = {0: DATA, 17 * GIB + 5: DATA, 40 * GIB - 10: b"0123456789"}
    source = sparse_file(tmp_path / "source", 40 * GIB, content)
    listed = pieces.describe(source, manifest.piece_bytes_for(40 * GIB))
    wanted = listed.all_pieces & ~listed.zero_pieces
    assert wanted.bit_count() == 3
    assert listed.data_bytes == 3 * listed.piece_bytes
    store = pieces.PieceStore.open(tmp_path / "host", BLOB, listed)
    assert store.journaled == listed.zero_pieces
    for piece in swarm.members(wanted):
        span = listed.span(piece)
        store.write(piece, os.pread(source, span.length, span.start))
    store.flush()
    store.close()
    again = pieces.PieceStore.open(tmp_path / "host", BLOB, listed)
    again.place(tmp_path / "host" / "image")
    status = os.fstat(again.fileno())
    assert status.st_size == 40 * GIB
    assert status.st_blocks * 512 <= listed.data_bytes + (1 << 20)
    assert pieces.is_exactly(again.fileno(), listed)
    assert pieces.is_exactly(source, listed)
    os.pwrite(again.fileno(), b"x", 30 * GIB)
    assert pieces.damaged(again.fileno(), listed) == 1 << (30 * GIB // listed.piece_bytes)
    again.close()
    os.close(source)


def test_only_bytes_that_are_no_zeros_need_room(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    hasher = manifest.Hasher(manifest.MAX_PIECE_BYTES)
    hasher.update_zeros(3 * free)
    blank = hasher.finish()
    store = pieces.PieceStore.open(tmp_path, BLOB, blank)
    store.place(tmp_path / "image")
    store.close()
    assert (tmp_path / "image").stat().st_size == 3 * free


def test_room_may_be_taken_beside_the_transfer_and_changes_nothing_that_came(
    tmp_path: Path,
) -> None:
    store = pieces.PieceStore.open(tmp_path, BLOB, MANIFEST, allocate=False)
    assert os.fstat(store.fileno()).st_blocks == 0
    store.write(1, part(1))
    landing = store.landing(2)
    landing.write(part(2)[:100])
    store.allocate()
    assert os.fstat(store.fileno()).st_blocks * 512 >= len(DATA)
    landing.write(part(2)[100:])
    store.write(2, landing)
    assert (in_file(store, 1), in_file(store, 2)) == (part(1), part(2))
    number = store.fileno()
    store.close()
    another = os.open(tmp_path / "another", os.O_RDWR | os.O_CREAT)
    try:
        assert another == number
        store.allocate()
        assert os.fstat(another).st_size == 0
    finally:
        os.close(another)


def test_a_file_that_was_cut_is_not_believed_for_what_its_journal_says(tmp_path: Path) -> None:
    store = complete(tmp_path)
    store.flush()
    store.close()
    (tmp_path / ".precache" / f"{BLOB}.part").unlink()
    again = opened(tmp_path)
    assert again.journaled == 0
    again.close()
    assert opened_have(tmp_path) == 0


def opened_have(directory: Path) -> int:
    store = opened(directory)
    store.close()
    return store.journaled


def test_what_another_image_left_is_no_zeros_of_this_one(tmp_path: Path) -> None:
    store = complete(tmp_path)
    store.flush()
    store.close()
    blank = described(bytes(len(DATA)))
    again = pieces.PieceStore.open(tmp_path, BLOB, blank)
    again.place(tmp_path / "image")
    again.close()
    assert (tmp_path / "image").read_bytes() == bytes(len(DATA))


@given(
    st.lists(st.tuples(st.integers(0, 6 * PIECE), st.integers(1, 3 * PIECE)), max_size=4),
    st.integers(0, 6 * PIECE),
)
@settings(max_examples=30, deadline=None)
def test_a_file_with_holes_is_described_as_its_bytes_are(
    runs: list[tuple[int, int]], size: int
) -> None:
    content = bytearray(size)
    fd = os.memfd_create("image")
    try:
        os.ftruncate(fd, size)
        for start, length in runs:
            some = b"\1" * max(0, min(length, size - start))
            if some:
                os.pwrite(fd, some, start)
                content[start : start + len(some)] = some
        assert pieces.describe(fd, PIECE) == described(bytes(content))
        assert pieces.damaged(fd, described(bytes(content))) == 0
        for span in pieces.data_spans(fd, 0, size):
            content[span.start : span.stop] = bytes(span.length)
        assert not any(content)
    finally:
        os.close(fd)


# --- scrub and repair


def placed(directory: Path) -> Path:
    store = complete(directory)
    store.place(directory / "image")
    store.close()
    return directory / "image"


@pytest.mark.parametrize(
    ("size", "expected"),
    [(len(DATA) + 1, 0b100000), (5 * PIECE, 0b100000), (PIECE + 1, 0b111110), (0, 0b111111)],
)
def test_a_file_of_another_size_is_damaged_where_it_differs(
    tmp_path: Path, size: int, expected: int
) -> None:
    path = placed(tmp_path)
    os.truncate(path, size)
    with path.open("rb") as file:
        assert pieces.damaged(file.fileno(), MANIFEST) == expected


def test_a_scrub_is_paced_and_can_be_stopped(tmp_path: Path) -> None:
    read: list[int] = []

    def pace(count: int) -> None:
        read.append(count)
        if len(read) == 9:
            raise InterruptedError

    with placed(tmp_path).open("rb") as file:
        assert pieces.damaged(file.fileno(), MANIFEST, after_read=read.append) == 0
        assert sum(read) == len(DATA)
        read.clear()
        read += [0] * 6
        with pytest.raises(InterruptedError):
            pieces.damaged(file.fileno(), MANIFEST, after_read=pace)


@given(st.sets(st.integers(min_value=0, max_value=5), min_size=1))
@settings(max_examples=15, deadline=None)
def test_a_placed_file_is_repaired_in_place_and_never_holds_what_is_not_verified(
    tmp_path_factory: pytest.TempPathFactory, broken: set[int]
) -> None:
    path = placed(tmp_path_factory.mktemp("placed"))
    before = path.stat().st_ino
    with path.open("r+b") as file:
        for piece in broken:
            os.pwrite(file.fileno(), b"rot", piece * PIECE)
        wrong = pieces.damaged(file.fileno(), MANIFEST)
    assert wrong == swarm.bits(broken)
    store = pieces.PieceStore.reopen(path, MANIFEST, damaged=wrong)
    assert store.journaled == MANIFEST.all_pieces & ~wrong
    with pytest.raises(pieces.BusyError):
        pieces.PieceStore.reopen(path, MANIFEST, damaged=wrong)
    for piece in sorted(broken):
        rotten = path.read_bytes()
        lie = land(store.landing(piece), bytes(MANIFEST.span(piece).length))
        with pytest.raises(pieces.PieceRejectedError):
            store.write(piece, lie)
        assert path.read_bytes() == rotten
        store.write(piece, land(store.landing(piece), part(piece)))
    store.flush()
    assert store.journaled == MANIFEST.all_pieces
    store.close()
    assert path.read_bytes() == DATA
    assert path.stat().st_ino == before


def test_zeros_and_the_size_of_a_placed_file_are_put_right_without_a_peer(tmp_path: Path) -> None:
    listed = described(bytes(2 * PIECE) + DATA[:PIECE])
    path = tmp_path / "image"
    path.write_bytes(b"x" * PIECE + bytes(PIECE) + DATA[:PIECE] + b"more")
    with path.open("rb") as file:
        wrong = pieces.damaged(file.fileno(), listed)
    assert wrong == 0b101
    store = pieces.PieceStore.reopen(path, listed, damaged=wrong)
    assert store.journaled == 0b011
    store.write(2, DATA[:PIECE])
    store.close()
    assert path.read_bytes() == bytes(2 * PIECE) + DATA[:PIECE]


def test_who_waits_to_write_comes_before_who_has_just_written(tmp_path: Path) -> None:
    """Whoever allocates takes one turn after the other; pieces do not wait for the last of them."""
    turn = pieces._Turn()
    order: list[str] = []
    waits = threading.Event()

    def write() -> None:
        waits.set()
        with turn:
            order.append("write")

    with turn:
        writer = threading.Thread(target=write)
        writer.start()
        waits.wait()
        for _ in range(1000):
            if turn._next.locked():
                break
            time.sleep(0.001)
        else:
            pytest.fail("who waits does not have the next turn")
        order.append("allocate")
    with turn:
        order.append("allocate")
    writer.join()
    assert order == ["allocate", "write", "allocate"]
