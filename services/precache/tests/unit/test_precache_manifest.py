"""A manifest survives the wire, and nothing inconsistent becomes one."""

import hashlib
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler_precache.transfer import manifest

PIECE = manifest.MIN_PIECE_BYTES


def manifest_of(data: bytes) -> manifest.Manifest:
    hasher = manifest.Hasher(PIECE)
    hasher.update(data)
    return hasher.finish()


def tampered(original: manifest.Manifest, **fields: object) -> bytes:
    return json.dumps({**json.loads(original.to_json()), **fields}).encode()


@pytest.mark.parametrize(
    ("size", "piece"),
    [
        (0, 256 * 1024),
        (1, 256 * 1024),
        (256 * 2**20, 256 * 1024),
        (10**9, 2**20),
        (10 * 10**9, 8 * 2**20),
        (50 * 10**9, 16 * 2**20),
        (4 * 2**40, 16 * 2**20),
    ],
)
def test_a_piece_is_about_a_1024th_of_the_image_within_bounds(size: int, piece: int) -> None:
    assert manifest.piece_bytes_for(size) == piece


@given(st.integers(min_value=0, max_value=manifest.MAX_IMAGE_BYTES))
def test_every_piece_size_is_one_that_build_takes(size: int) -> None:
    piece = manifest.piece_bytes_for(size)
    assert piece & (piece - 1) == 0
    assert manifest.MIN_PIECE_BYTES <= piece <= manifest.MAX_PIECE_BYTES


@given(
    size=st.integers(min_value=0, max_value=3 * PIECE + 7),
    cuts=st.lists(st.integers(min_value=0, max_value=3 * PIECE + 7), max_size=5),
)
def test_the_digests_do_not_depend_on_how_the_stream_is_cut(size: int, cuts: list[int]) -> None:
    data = (b"0123456789abcdef" * (size // 16 + 1))[:size]
    hasher = manifest.Hasher(PIECE)
    edges = [0, *sorted(min(cut, size) for cut in cuts), size]
    for start, stop in itertools.pairwise(edges):
        hasher.update(data[start:stop])
    made = hasher.finish()
    assert made == manifest_of(data)
    for piece, span in manifest.spans(made):
        assert hashlib.sha256(data[span.start : span.stop]).digest() == made.digest(piece)
        assert made.accepts(piece, data[span.start : span.stop])


@given(st.binary(max_size=PIECE * 2 + 5))
def test_a_manifest_comes_back_from_the_wire_as_it_was(data: bytes) -> None:
    original = manifest_of(data)
    assert manifest.parse(original.to_json(), root=original.root) == original


def test_the_pieces_cover_the_image_once_and_only() -> None:
    made = manifest_of(bytes(2 * PIECE + 3))
    covered = [(span.start, span.stop) for _, span in manifest.spans(made)]
    assert covered == [(0, PIECE), (PIECE, 2 * PIECE), (2 * PIECE, 2 * PIECE + 3)]
    assert made.pieces_of(manifest.Span(start=PIECE - 1, stop=PIECE + 1)) == range(2)
    for start, stop in [(0, 0), (-1, 5), (0, 2 * PIECE + 4), (9, 8)]:
        with pytest.raises(IndexError):
            made.pieces_of(manifest.Span(start=start, stop=stop))
    for piece in (-1, 3):
        with pytest.raises(IndexError):
            made.span(piece)


def test_a_piece_of_the_wrong_length_or_content_is_not_accepted() -> None:
    made = manifest_of(bytes(PIECE + 1))
    assert not made.accepts(1, b"\1")
    assert not made.accepts(1, b"\0\0")
    assert not made.accepts(1, b"")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"schema": 2}, "schema"),
        ({"hash": "crc32"}, "hash"),
        ({"size_bytes": -1}, "out of bounds"),
        ({"size_bytes": 2**60}, "out of bounds"),
        ({"size_bytes": True}, "integer"),
        ({"size_bytes": "1"}, "integer"),
        ({"size_bytes": 1.0}, "integer"),
        ({"size_bytes": 5 * PIECE}, "digests"),
        ({"piece_bytes": 0}, "power of two"),
        ({"piece_bytes": PIECE + 1}, "power of two"),
        ({"piece_bytes": 2**30}, "power of two"),
        ({"pieces": 7}, "text"),
        ({"pieces": "not base64!"}, "base64"),
        ({"pieces": "\u00e9"}, "base64"),
        ({"pieces": ""}, "digests"),
        ({"root": "00" * 32}, "root"),
        ({"root": None}, "text"),
    ],
)
def test_a_manifest_with_a_field_out_of_bounds_is_refused(
    fields: dict[str, object], reason: str
) -> None:
    with pytest.raises(manifest.ManifestError, match=reason):
        manifest.parse(tampered(manifest_of(b"image"), **fields))


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"{", b"[" * 100_000, b"\xff\xfe"])
def test_what_is_no_manifest_at_all_is_refused(body: bytes) -> None:
    with pytest.raises(manifest.ManifestError):
        manifest.parse(body)


def test_a_huge_manifest_is_refused_before_it_is_read() -> None:
    with pytest.raises(manifest.ManifestError, match="is over"):
        manifest.parse(b" " * (manifest.MAX_MANIFEST_BYTES + 1))


def test_a_consistent_manifest_of_another_root_is_refused() -> None:
    with pytest.raises(manifest.ManifestError, match="another root"):
        manifest.parse(manifest_of(b"evil").to_json(), root=manifest_of(b"good").root)


def test_the_root_depends_on_the_sizes_too() -> None:
    same = {"digests": bytes(32), "size_bytes": 10}
    small = manifest.build(piece_bytes=PIECE, **same)  # type: ignore[arg-type]  # a table of arguments
    large = manifest.build(piece_bytes=2 * PIECE, **same)  # type: ignore[arg-type]  # as above
    assert small.root != large.root


@given(
    runs=st.lists(
        st.tuples(st.booleans(), st.integers(min_value=0, max_value=2 * PIECE + 3)), max_size=5
    )
)
def test_zeros_that_are_only_counted_give_the_manifest_of_zeros_that_are_read(
    runs: list[tuple[bool, int]],
) -> None:
    counted, data = manifest.Hasher(PIECE), bytearray()
    for is_zero, length in runs:
        if is_zero:
            counted.update_zeros(length)
            data += bytes(length)
        else:
            counted.update(b"\1" * length)
            data += b"\1" * length
    assert counted.finish() == manifest_of(bytes(data))


@given(blank=st.lists(st.booleans(), max_size=9), rest=st.integers(min_value=1, max_value=PIECE))
def test_the_pieces_of_nothing_but_zeros_are_known(blank: list[bool], rest: int) -> None:
    size = max(0, len(blank) - 1) * PIECE + (rest if blank else 0)
    lengths = [min(PIECE, size - start) for start in range(0, size, PIECE)]
    parts = [bytes(n) if zero else b"\1" * n for zero, n in zip(blank, lengths, strict=True)]
    made = manifest_of(b"".join(parts))
    assert made.zero_pieces == sum(zero << piece for piece, zero in enumerate(blank))
    assert made.data_bytes == sum(len(part) for part in parts if any(part[:1]))
    parsed = manifest.parse(made.to_json())
    assert parsed.zero_pieces == made.zero_pieces


def test_a_short_piece_with_the_digest_of_a_whole_one_of_zeros_is_none_of_zeros() -> None:
    zero = hashlib.sha256(bytes(PIECE)).digest()
    made = manifest.build(size_bytes=PIECE + 1, piece_bytes=PIECE, digests=zero * 2)
    assert made.zero_pieces == 0b01
    assert not made.accepts(1, b"\0")


def test_the_zeros_of_the_largest_image_take_no_time_and_no_more_than_that_is_taken() -> None:
    hasher = manifest.Hasher(manifest.MAX_PIECE_BYTES)
    hasher.update_zeros(manifest.MAX_IMAGE_BYTES)
    made = hasher.finish()
    assert (made.size_bytes, made.data_bytes) == (manifest.MAX_IMAGE_BYTES, 0)
    assert made.zero_pieces == made.all_pieces
    with pytest.raises(manifest.ManifestError, match="out of bounds"):
        hasher.update_zeros(1)
