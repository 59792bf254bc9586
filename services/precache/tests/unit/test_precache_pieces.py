"""What is journaled survives anything; what is visible is whole."""

import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostler_precache import manifest, pieces, swarm
from hostler_precache.manifest import BlobId

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
