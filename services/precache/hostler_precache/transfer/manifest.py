"""The list of an image's pieces: what an agent trusts, and all it trusts.

A manifest names the size of the image, the size of its pieces and the sha256 of each. Its root
is one hash over those, so whoever knows the root (32 bytes, told by precache over an
authenticated channel) can take the list itself from anywhere. Manifests come over the network:
`parse` believes nothing it has not bounded and recomputed.

A piece of nothing but zeros is known by its digest alone: it never travels, and is a hole in the
file. So an image of 40 GB with 2 GB of data costs what 2 GB cost.

While the seed still fetches an image, nobody knows the root: the list grows at its end, told by
precache over the same channel (`GrowingManifest`), and is a manifest once the root has closed it.
Of one blob id only one list is ever told, which is why journals of a list that grew go by the id.

Invariants: a `Manifest` that exists is consistent. Its digests number exactly
ceil(size / piece_size), and `root` is the root of its own content. A digest that a
`GrowingManifest` has told never changes.
"""

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, NewType

BlobId = NewType("BlobId", str)
ImageId = NewType("ImageId", str)

KIB: Final = 1024
MIB: Final = 1024 * KIB
MIN_PIECE_BYTES: Final = 256 * KIB
MAX_PIECE_BYTES: Final = 16 * MIB
MAX_IMAGE_BYTES: Final = 4 * 1024 * 1024 * MIB
MAX_PIECES: Final = MAX_IMAGE_BYTES // MAX_PIECE_BYTES
DIGEST_BYTES: Final = 32
SCHEMA: Final = 1
_ROOT_DOMAIN: Final = b"hostler precache manifest 1\0"
_GROWING_DOMAIN: Final = b"hostler precache growing manifest 1\0"
# 4 TiB in pieces of 16 MiB: 2**18 digests of 32 bytes in base64, and room for the rest
MAX_MANIFEST_BYTES: Final = 12 * MIB
_ZEROS: Final = memoryview(bytes(MIN_PIECE_BYTES))


class ManifestError(ValueError):
    """A manifest that cannot be believed; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A run of bytes of the image: `[start, stop)`."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """How many bytes it covers."""
        return self.stop - self.start


class PieceList:
    """The pieces of one blob, as far as they are told: what who sends or receives them goes by."""

    __slots__ = ()

    size_bytes: int
    piece_bytes: int
    digests: bytes
    zero_pieces: int  # of those that are told; a set: bit i for piece i

    @property
    def identity(self) -> bytes:
        """32 bytes that no other list has."""
        raise NotImplementedError

    @property
    def known(self) -> int:
        """Of how many pieces, from the first on, the digests are told."""
        return len(self.digests) // DIGEST_BYTES

    @property
    def known_pieces(self) -> int:
        """The set of those."""
        return (1 << self.known) - 1

    @property
    def data_bytes(self) -> int:
        """How many bytes the pieces have that are not all zeros: what travels, and fills the disk.

        What is not told yet counts as if it were none.
        """
        zeros = self.zero_pieces.bit_count() * self.piece_bytes
        if self.count and self.zero_pieces >> (self.count - 1) & 1:
            zeros -= self.count * self.piece_bytes - self.size_bytes
        return self.size_bytes - zeros

    @property
    def all_pieces(self) -> int:
        """The set of every piece."""
        return (1 << self.count) - 1

    @property
    def count(self) -> int:
        """How many pieces there are; none for an empty image."""
        return piece_count(self.size_bytes, self.piece_bytes)

    def digest(self, piece: int) -> bytes:
        """The sha256 of a piece.

        Raises:
            IndexError: there is no such piece, or it is not told yet.
        """
        if not 0 <= piece < self.known:
            raise IndexError(f"piece {piece} of {self.known} that are told")
        return self.digests[piece * DIGEST_BYTES : (piece + 1) * DIGEST_BYTES]

    def span(self, piece: int) -> Span:
        """Where a piece lies; the last one may be short.

        Raises:
            IndexError: there is no such piece.
        """
        self._check(piece)
        start = piece * self.piece_bytes
        return Span(start=start, stop=min(start + self.piece_bytes, self.size_bytes))

    def pieces_of(self, span: Span) -> range:
        """The pieces that a span of bytes touches.

        Raises:
            IndexError: the span is empty or reaches outside the image.
        """
        if not 0 <= span.start < span.stop <= self.size_bytes:
            raise IndexError(f"bytes {span.start}-{span.stop} of {self.size_bytes}")
        return range(span.start // self.piece_bytes, (span.stop - 1) // self.piece_bytes + 1)

    def accepts(self, piece: int, data: bytes | bytearray | memoryview) -> bool:
        """Whether these bytes are that piece: right length, right sha256."""
        if len(data) != self.span(piece).length or piece >= self.known:
            return False
        return hmac.compare_digest(hashlib.sha256(data).digest(), self.digest(piece))

    def _check(self, piece: int) -> None:
        if not 0 <= piece < self.count:
            raise IndexError(f"piece {piece} of {self.count}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest(PieceList):
    """The pieces of one blob, all of them; see the module for what it guarantees."""

    size_bytes: int
    piece_bytes: int
    digests: bytes = field(repr=False)
    root: bytes
    zero_pieces: int = field(repr=False, compare=False)

    @property
    def identity(self) -> bytes:
        """The root."""
        return self.root

    def to_json(self) -> bytes:
        """The wire form; `parse` takes it back to an equal manifest."""
        document = {
            "schema": SCHEMA,
            "hash": "sha256",
            "size_bytes": self.size_bytes,
            "piece_bytes": self.piece_bytes,
            "pieces": base64.b64encode(self.digests).decode("ascii"),
            "root": self.root.hex(),
        }
        return json.dumps(document, sort_keys=True).encode("ascii")


class GrowingManifest(PieceList):
    """The pieces of a blob that is still being fetched; see the module for what it guarantees."""

    __slots__ = ("_blob_id", "_root", "digests", "piece_bytes", "size_bytes", "zero_pieces")

    def __init__(
        self, blob_id: BlobId, *, size_bytes: int, piece_bytes: int, root: bytes | None = None
    ) -> None:
        """A list of which nothing is told yet; `root` is known where only this host has still to be told.

        Raises:
            ManifestError: sizes out of bounds.
        """
        self._root = root
        _check_sizes(size_bytes, piece_bytes)
        self._blob_id = blob_id
        self.size_bytes = size_bytes
        self.piece_bytes = piece_bytes
        self.digests = b""
        self.zero_pieces = 0

    @property
    def identity(self) -> bytes:
        """The root, where it is known; else that of any list of this blob, as long as it grows."""
        return self._root or growing_identity(self._blob_id, self.size_bytes, self.piece_bytes)

    def grow(self, first: int, digests: bytes) -> None:
        """The digests from piece `first` on are told; of some it may be for the second time.

        Raises:
            ManifestError: they begin after a gap, are more than there are pieces, or are others
                than those that were told; nothing has changed.
        """
        start = first * DIGEST_BYTES
        if not 0 <= first <= self.known or len(digests) % DIGEST_BYTES:
            raise ManifestError(f"digests from {first} on, after {self.known} that are told")
        if start + len(digests) > self.count * DIGEST_BYTES:
            raise ManifestError(f"more digests than the {self.count} pieces have")
        if not digests.startswith(self.digests[start : start + len(digests)]):
            raise ManifestError("a piece that was told is told differently")
        new = digests[len(self.digests) - start :]
        if not new:
            return
        stop_bytes = min(
            self.size_bytes, (first + len(digests) // DIGEST_BYTES) * self.piece_bytes
        )
        new_bytes = stop_bytes - self.known * self.piece_bytes
        self.zero_pieces |= _zero_pieces(new_bytes, self.piece_bytes, new) << self.known
        self.digests += new

    def closed(self, root: bytes) -> Manifest:
        """The manifest that this is.

        Raises:
            ManifestError: pieces are not told yet, or they have another root.
        """
        manifest = build(
            size_bytes=self.size_bytes, piece_bytes=self.piece_bytes, digests=self.digests
        )
        if not hmac.compare_digest(root, manifest.root):
            raise ManifestError("the root is not the root of the pieces that were told")
        return manifest


def growing_identity(blob_id: BlobId, size_bytes: int, piece_bytes: int) -> bytes:
    """What a list of that blob goes by while it grows: of one blob id, one list is told."""
    head = size_bytes.to_bytes(8, "big") + piece_bytes.to_bytes(8, "big")
    return hashlib.sha256(_GROWING_DOMAIN + head + blob_id.encode()).digest()


def piece_bytes_for(size_bytes: int) -> int:
    """The piece size for an image: the power of two nearest to size / 1024, 256 KiB to 16 MiB.

    Nearest is meant as a ratio. About 1024 pieces keep the cost of the last pieces near 4 % of
    the whole (the fluid bound times 1 + K/M, with K about 40 for a thousand hosts).
    """
    target = max(1, size_bytes // KIB)
    lower = 1 << (target.bit_length() - 1)
    nearest = lower * 2 if target * target >= 2 * lower * lower else lower
    return min(MAX_PIECE_BYTES, max(MIN_PIECE_BYTES, nearest))


def piece_count(size_bytes: int, piece_bytes: int) -> int:
    """How many pieces an image of that size has."""
    return -(-size_bytes // piece_bytes)


def build(*, size_bytes: int, piece_bytes: int, digests: bytes) -> Manifest:
    """A manifest of our own making, with its root.

    Raises:
        ManifestError: sizes out of bounds, or digests that do not number the pieces.
    """
    _check_sizes(size_bytes, piece_bytes)
    expected = piece_count(size_bytes, piece_bytes) * DIGEST_BYTES
    if len(digests) != expected:
        raise ManifestError(f"digests are {len(digests)} bytes, the sizes ask for {expected}")
    return Manifest(
        size_bytes=size_bytes,
        piece_bytes=piece_bytes,
        digests=digests,
        root=_root(size_bytes, piece_bytes, digests),
        zero_pieces=_zero_pieces(size_bytes, piece_bytes, digests),
    )


def _check_sizes(size_bytes: int, piece_bytes: int) -> None:
    if not 0 <= size_bytes <= MAX_IMAGE_BYTES:
        raise ManifestError(f"image size out of bounds: {size_bytes}")
    if not MIN_PIECE_BYTES <= piece_bytes <= MAX_PIECE_BYTES or piece_bytes & (piece_bytes - 1):
        raise ManifestError(f"piece size is not a power of two within bounds: {piece_bytes}")


def parse(body: bytes, *, root: bytes | None = None) -> Manifest:
    """The manifest in a body from the network, whose root is recomputed.

    Args:
        body: at most `MAX_MANIFEST_BYTES`.
        root: the root that an authenticated answer of precache named; None only where the body
            itself came from such an answer or from our own disk.

    Raises:
        ManifestError: too big, not JSON, a field missing, of the wrong type or out of bounds,
            or a root that is not the root of the content, or not the one asked for.
    """
    if len(body) > MAX_MANIFEST_BYTES:
        raise ManifestError(f"manifest of {len(body)} bytes is over {MAX_MANIFEST_BYTES}")
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise ManifestError("manifest is not JSON") from exc
    if not isinstance(document, dict):
        raise ManifestError("manifest is not an object")
    if document.get("schema") != SCHEMA or document.get("hash") != "sha256":
        raise ManifestError("manifest of another schema or hash")
    manifest = build(
        size_bytes=_integer(document, "size_bytes"),
        piece_bytes=_integer(document, "piece_bytes"),
        digests=_base64(document, "pieces"),
    )
    claimed = _text(document, "root")
    if claimed != manifest.root.hex():
        raise ManifestError("the root is not the root of these pieces")
    if root is not None and not hmac.compare_digest(root, manifest.root):
        raise ManifestError("a manifest of another root than the one asked for")
    return manifest


class Hasher:
    """Builds a manifest from a stream whose chunks need not fall on piece borders."""

    def __init__(self, piece_bytes: int) -> None:
        self.piece_bytes = piece_bytes
        self._digests = bytearray()
        self._current = hashlib.sha256()
        self._filled = 0
        self._size = 0

    @property
    def known(self) -> int:
        """How many pieces are whole."""
        return len(self._digests) // DIGEST_BYTES

    def digests(self, start: int, stop: int) -> bytes:
        """Of these pieces, as far as they are whole."""
        return bytes(self._digests[start * DIGEST_BYTES : stop * DIGEST_BYTES])

    def update(self, chunk: bytes | bytearray | memoryview) -> None:
        """Take the next bytes of the image."""
        view = memoryview(chunk)
        while view:
            part = view[: self.piece_bytes - self._filled]
            self._current.update(part)
            self._filled += len(part)
            self._size += len(part)
            view = view[len(part) :]
            if self._filled == self.piece_bytes:
                self._close_piece()

    def update_zeros(self, length_bytes: int) -> None:
        """Take so many zero bytes. Whole pieces of them are not hashed: their digest is known.

        Raises:
            ManifestError: the image is larger than `MAX_IMAGE_BYTES`.
        """
        if self._size + length_bytes > MAX_IMAGE_BYTES:
            raise ManifestError(f"image size out of bounds: {self._size + length_bytes}")
        head = min(length_bytes, -self._size % self.piece_bytes)
        self._hash_zeros(head)
        whole, tail = divmod(length_bytes - head, self.piece_bytes)
        self._digests += _zero_digest(self.piece_bytes) * whole
        self._size += whole * self.piece_bytes
        self._hash_zeros(tail)

    def _hash_zeros(self, length_bytes: int) -> None:
        while length_bytes:
            part = _ZEROS[:length_bytes]
            self.update(part)
            length_bytes -= len(part)

    def finish(self) -> Manifest:
        """The manifest of all that was taken.

        Raises:
            ManifestError: the image is larger than `MAX_IMAGE_BYTES`.
        """
        if self._filled:
            self._close_piece()
        return build(
            size_bytes=self._size, piece_bytes=self.piece_bytes, digests=bytes(self._digests)
        )

    def _close_piece(self) -> None:
        self._digests += self._current.digest()
        self._current = hashlib.sha256()
        self._filled = 0


def spans(manifest: Manifest) -> Iterator[tuple[int, Span]]:
    """Every piece with its span, in file order."""
    for piece in range(manifest.count):
        yield piece, manifest.span(piece)


def _zero_pieces(size_bytes: int, piece_bytes: int, digests: bytes) -> int:
    # a bitmap in bytes: setting bits of one large integer would copy it for each
    count = len(digests) // DIGEST_BYTES
    found = bytearray(-(-count // 8))
    zero, at = _zero_digest(piece_bytes), 0
    while (at := digests.find(zero, at)) >= 0:
        piece, offset = divmod(at, DIGEST_BYTES)
        if offset == 0:
            found[piece // 8] |= 1 << piece % 8
        at += DIGEST_BYTES - offset
    last_bytes = size_bytes % piece_bytes
    if last_bytes:  # a short piece has the digest of fewer zeros, and no claim to the other one
        bit = 1 << (count - 1) % 8
        is_zero = digests[-DIGEST_BYTES:] == _zero_digest(last_bytes)
        found[-1] = found[-1] & ~bit | bit * is_zero
    return int.from_bytes(found, "little")


@lru_cache(maxsize=64)
def _zero_digest(length_bytes: int) -> bytes:
    digest = hashlib.sha256()
    for _ in range(length_bytes // len(_ZEROS)):
        digest.update(_ZEROS)
    digest.update(_ZEROS[: length_bytes % len(_ZEROS)])
    return digest.digest()


def _root(size_bytes: int, piece_bytes: int, digests: bytes) -> bytes:
    head = size_bytes.to_bytes(8, "big") + piece_bytes.to_bytes(8, "big")
    return hashlib.sha256(_ROOT_DOMAIN + head + digests).digest()


def _integer(document: dict[str, object], name: str) -> int:
    value = document.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ManifestError(f"{name} is not an integer")
    return value


def _text(document: dict[str, object], name: str) -> str:
    value = document.get(name)
    if not isinstance(value, str):
        raise ManifestError(f"{name} is not text")
    return value


def _base64(document: dict[str, object], name: str) -> bytes:
    text = _text(document, name)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise ManifestError(f"{name} is not base64") from exc
