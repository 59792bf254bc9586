"""An image as it arrives: the file that it is written into, the hashes of it, and what others may see of it.

Every byte is hashed before it is written; zeros are not written, and become holes.
"""

import errno
import hashlib
import hmac
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from hostler_precache.images import Image, SourceHash, Verification
from hostler_precache.sources import sparse
from hostler_precache.sources.source import Hole, Part, SourceError
from hostler_precache.transfer import manifest, pieces
from hostler_precache.transfer.manifest import Manifest

_ZEROS: Final = bytes(64 * 1024)


class Arriving:
    """A file that is being written, and the digests of its pieces that are whole, in its order.

    It has its full size from the start: what has not come is a hole.
    """

    def __init__(self, path: Path, *, size_bytes: int, hasher: manifest.Hasher) -> None:
        self.path = path
        self.size_bytes = size_bytes
        self.piece_bytes = hasher.piece_bytes
        self.known = 0
        self._hasher = hasher

    def came(self) -> None:
        """All bytes that were hashed are in the file."""
        self.known = self._hasher.known

    def digests(self, first: int) -> bytes:
        """Of the pieces from number `first` on that are whole, and in the file."""
        return self._hasher.digests(first, self.known)


class _Hash:
    """A hash of a run of bytes, to be compared with what the source says of it."""

    def __init__(self, claimed: SourceHash) -> None:
        self._claimed = claimed
        self._digest: Any = hashlib.new(claimed.algorithm, usedforsecurity=False)

    def update(self, chunk: bytes | memoryview) -> None:
        self._digest.update(chunk)

    def check(self, what: str) -> None:
        if not hmac.compare_digest(self._digest.hexdigest(), self._claimed.value):
            raise SourceError(
                "source.hash_mismatch",
                f"the {self._claimed.algorithm} of {what} is not the one that the source names",
            )


class _Parts:
    """The hashes of consecutive runs of the stream, one at a time."""

    def __init__(self, parts: Sequence[Part]) -> None:
        # a run of no bytes says nothing
        self._left = [part for part in reversed(parts) if part.length_bytes]
        self._current: _Hash | None = None
        self._wanted = self._number = 0

    def update(self, chunk: bytes) -> None:
        view = memoryview(chunk)
        while view:
            if self._current is None:
                if not self._left:
                    raise SourceError(
                        "source.size_mismatch", "more bytes came than the parts have"
                    )
                part = self._left.pop()
                self._current, self._wanted = _Hash(part.source_hash), part.length_bytes
                self._number += 1
            taken = view[: self._wanted]
            self._current.update(taken)
            self._wanted -= len(taken)
            view = view[len(taken) :]
            if not self._wanted:
                self._current.check(f"part {self._number}")
                self._current = None


class Writer:
    """The file being written, and the hashes of it. Every method blocks."""

    def __init__(
        self,
        part: Path,
        image: Image,
        size_bytes: int | None,
        parts: Sequence[Part],
        *,
        is_as_it_is: bool,
        left_bytes: int,
    ) -> None:
        """A writer of the file, of which the first `left_bytes` are there and are to be read first."""
        self._part = part
        self._expected = size_bytes
        self.left_bytes = left_bytes
        self.size_bytes = 0
        self._whole = _Hash(image.source_hash) if image.source_hash is not None else None
        self._parts = _Parts(parts) if parts and self._whole is None else None
        self.verification = Verification.UNVERIFIABLE
        if image.source_hash is not None:
            self.verification = image.source_hash.verification
        elif parts:
            self.verification = Verification.CHECKSUM
        self.manifest: Manifest | None = None
        # the size decides how large pieces are; where it is not known, they are cut afterwards, as are
        # those of what a disk is converted to
        self._hasher = (
            manifest.Hasher(manifest.piece_bytes_for(size_bytes))
            if size_bytes is not None and is_as_it_is
            else None
        )
        self._fd = -1
        try:
            if not left_bytes:
                # what is still being sent of an attempt before, is of its file, and not of this one
                part.unlink(missing_ok=True)
            self._fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            # zeros are not written: what is not there yet has to be a hole
            os.ftruncate(self._fd, left_bytes)
        except OSError as exc:
            self.close()
            raise pieces.PieceStoreError(f"{part}: {exc.strerror}") from exc

    def begin(self) -> Arriving | None:
        """What there is to see of the file while it is written; None where its size is not known."""
        if not self._expected or self._hasher is None:
            return None
        try:
            os.ftruncate(self._fd, self._expected)
        except OSError as exc:
            raise _disk_refused(self._part, exc) from exc
        return Arriving(self._part, size_bytes=self._expected, hasher=self._hasher)

    def read_left(self) -> bytes | Hole | None:
        """The next of the bytes that are there; None when all of them were taken."""
        try:
            return sparse.read(self._fd, self.size_bytes, self.left_bytes)
        except OSError as exc:
            raise pieces.PieceStoreError(f"{self._part}: {exc.strerror}") from exc

    def begins_with(self, told: bytes) -> bool:
        """Whether the pieces that were taken have these digests, as far as there are both."""
        return self._hasher is None or told.startswith(self._hasher.digests(0, self._hasher.known))

    def take(self, chunk: bytes | Hole, *, is_there: bool = False) -> int:
        """The next bytes are hashed, and written unless they are there; how many they were."""
        length = chunk.length_bytes if isinstance(chunk, Hole) else len(chunk)
        limit = manifest.MAX_IMAGE_BYTES if self._expected is None else self._expected
        if self.size_bytes + length > limit:
            raise SourceError("source.size_mismatch", f"more than {limit} bytes came")
        if isinstance(chunk, Hole):
            self._take_zeros(length)
        else:
            if self._whole is not None:
                self._whole.update(chunk)
            if self._parts is not None:
                self._parts.update(chunk)
            self._write(chunk, is_there)
        self.size_bytes += length
        return length

    def _take_zeros(self, length: int) -> None:
        if self._hasher is not None:
            self._hasher.update_zeros(length)
        for digest in (self._whole, self._parts):
            left = length if digest is not None else 0
            while digest is not None and left:
                digest.update(_ZEROS[:left])
                left -= min(left, len(_ZEROS))

    def _write(self, chunk: bytes, is_there: bool) -> None:
        """Runs of blocks of zeros are left out of the file: they are holes."""
        view = memoryview(chunk)
        begun = at = 0  # of the run of data that is not written yet
        while at < len(chunk):
            length = min(len(chunk) - at, len(_ZEROS) - (self.size_bytes + at) % len(_ZEROS))
            if chunk.startswith(_ZEROS[:length], at):
                self._write_data(view[begun:at], begun, is_there)
                if self._hasher is not None:
                    self._hasher.update_zeros(length)
                begun = at + length
            at += length
        self._write_data(view[begun:], begun, is_there)

    def _write_data(self, data: memoryview, at: int, is_there: bool) -> None:
        if self._hasher is not None:
            self._hasher.update(data)
        if is_there:
            return
        offset = self.size_bytes + at
        try:
            while data:
                written = os.pwrite(self._fd, data, offset)
                data, offset = data[written:], offset + written
        except OSError as exc:
            raise _disk_refused(self._part, exc) from exc

    def finish(self) -> None:
        """All that came is what the source says it is.

        Raises:
            SourceError: it is not.
        """
        if self._expected is not None and self.size_bytes != self._expected:
            raise SourceError(
                "source.truncated",
                f"{self.size_bytes} of {self._expected} bytes came",
                is_transient=True,
            )
        if self._whole is not None:
            self._whole.check("the bytes")
        try:
            os.ftruncate(self._fd, self.size_bytes)  # the last bytes may be a hole
        except OSError as exc:
            raise _disk_refused(self._part, exc) from exc
        self.manifest = self._hasher.finish() if self._hasher is not None else None

    def close(self) -> None:
        """The file is closed."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _disk_refused(part: Path, exc: OSError) -> pieces.PieceStoreError:
    kind = (
        pieces.NoSpaceError
        if exc.errno in (errno.ENOSPC, errno.EDQUOT)
        else pieces.PieceStoreError
    )
    return kind(f"{part}: {exc.strerror}")
