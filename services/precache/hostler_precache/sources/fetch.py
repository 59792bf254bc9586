"""Fetch: one image from its source onto the seed's disk, checked as it comes, and in the shape that hosts want.

The bytes are written, hashed as the source hashes them and cut into pieces in one pass; zeros
become holes. What does not match what the source said of itself, or is not the format it was
declared to be, is deleted: it is never served, and no manifest of it ever exists. An image that is
not raw is converted once, here, and the manifest is that of the raw disk.

Where the bytes are served as they come and their number is known from the start, the pieces that
are whole are there for others while the rest comes (`Arriving`): whoever has them must not take them
for the image before all of it was checked.
"""

import asyncio
import contextlib
import errno
import hashlib
import hmac
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hostler_precache.images import Image, SourceHash, Verification
from hostler_precache.sources import conversion, inspection
from hostler_precache.sources.plugins import Fetcher
from hostler_precache.sources.source import Hole, Part, Source, SourceError
from hostler_precache.transfer import manifest, pieces
from hostler_precache.transfer.manifest import Manifest

_ZEROS: Final = bytes(64 * 1024)
# of a hole, what is hashed in one step off the loop: a step cannot be cancelled
_HOLE_STEP_BYTES: Final = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """An image on the seed's disk, with its manifest and how far it could be checked.

    `disk_format` is that of the bytes there, which is not the source's where they were converted.
    """

    manifest: Manifest
    verification: Verification
    disk_format: str


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


class FetchProgress:
    """How many bytes have come, and what is there of them already; read by whoever shows or serves it."""

    def __init__(self) -> None:
        self.bytes_done = 0
        self.arriving: Arriving | None = None
        self.has_arrived = asyncio.Event()  # a piece of it

    def came(self, length_bytes: int) -> None:
        """So many bytes more are in the file."""
        self.bytes_done += length_bytes
        if self.arriving is not None:
            self.arriving.came()
            if self.arriving.known:
                self.has_arrived.set()


async def fetch(
    fetcher: Fetcher,
    image: Image,
    path: Path,
    *,
    reserve_bytes: int = 0,
    progress: FetchProgress | None = None,
    convert_to_raw: bool = True,
) -> Fetched:
    """The image is at `path`, complete, synced, as its source says it should be, and safe to boot from.

    Raises:
        SourceError: the source failed, or its bytes are not what it says, or not what may be
            served; nothing is at `path`.
        pieces.PieceStoreError: the disk refused; nothing is at `path`.
    """
    part, staged = path.with_name(path.name + ".part"), path.with_name(path.name + ".raw")
    try:
        is_as_it_is = not (convert_to_raw and inspection.is_shaped(image.disk_format))
        async with fetcher.open(image) as source:
            writer = await _receive(
                source, image, part, reserve_bytes, progress or FetchProgress(), is_as_it_is
            )
        try:
            found = await asyncio.to_thread(inspection.inspect, part, image.disk_format)
            if found != inspection.RAW and convert_to_raw:
                await conversion.to_raw(part, staged, expected=found, reserve_bytes=reserve_bytes)
                part.unlink()
                described = await asyncio.to_thread(_install, staged, path, None)
                found = inspection.RAW
            else:
                # qemu-img knows formats that the inspection does not; without it, nothing is converted either
                if part.stat().st_size and conversion.is_available():
                    await conversion.look(part, found)
                described = await asyncio.to_thread(_install, part, path, writer.manifest)
        except OSError as exc:
            raise pieces.PieceStoreError(f"{path}: {exc.strerror}") from exc
        return Fetched(manifest=described, verification=writer.verification, disk_format=found)
    finally:
        for left in (part, staged):
            with contextlib.suppress(FileNotFoundError):
                left.unlink()


async def _receive(
    source: Source,
    image: Image,
    part: Path,
    reserve_bytes: int,
    progress: FetchProgress,
    is_as_it_is: bool,
) -> "_Writer":
    """Everything the source has is in the file, and is what the source says it is."""
    size_bytes = source.size_bytes
    if None not in (image.size_bytes, size_bytes) and image.size_bytes != size_bytes:
        raise SourceError(
            "source.size_mismatch",
            f"the source offers {size_bytes} bytes of an image of {image.size_bytes}",
        )
    known = image.size_bytes if size_bytes is None else size_bytes
    needed = source.allocated_bytes if source.allocated_bytes is not None else known or 0
    await asyncio.to_thread(_require_room, part, needed, reserve_bytes)
    writer = await asyncio.to_thread(_Writer, part, image, known, source.parts)
    try:
        if is_as_it_is:
            progress.arriving = await asyncio.to_thread(writer.begin)
        async for chunk in source.chunks:
            # written and hashed off the loop: both release the interpreter lock
            for step in _steps(chunk):
                progress.came(await asyncio.to_thread(writer.take, step))
        await asyncio.to_thread(writer.finish)
    finally:
        await asyncio.to_thread(writer.close)
    return writer


def _steps(chunk: bytes | Hole) -> Sequence[bytes | Hole]:
    if not isinstance(chunk, Hole):
        return (chunk,)
    whole, rest = divmod(chunk.length_bytes, _HOLE_STEP_BYTES)
    lengths = [_HOLE_STEP_BYTES] * whole + [rest] * (rest > 0)
    return [Hole(length_bytes=length) for length in lengths]


def _require_room(part: Path, size_bytes: int, reserve_bytes: int) -> None:
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        volume = os.statvfs(part.parent)
    except OSError as exc:
        raise pieces.PieceStoreError(f"{part.parent}: {exc.strerror}") from exc
    free = volume.f_bavail * volume.f_frsize
    if free < size_bytes + reserve_bytes:
        raise pieces.NoSpaceError(
            f"{size_bytes} bytes are needed and {reserve_bytes} kept free, {free} are there"
        )


def _install(made: Path, path: Path, described: Manifest | None) -> Manifest:
    """The file is at `path`, synced; its manifest, read from it unless it is known."""
    fd = os.open(made, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if described is None:
            size_bytes = os.fstat(fd).st_size
            described = pieces.describe(fd, manifest.piece_bytes_for(size_bytes))
        os.fsync(fd)
    finally:
        os.close(fd)
    made.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return described


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


class _Writer:
    """The file being written, and the hashes of it. Every method blocks."""

    def __init__(
        self, part: Path, image: Image, size_bytes: int | None, parts: Sequence[Part]
    ) -> None:
        self._part = part
        self._expected = size_bytes
        self._size = 0
        self._whole = _Hash(image.source_hash) if image.source_hash is not None else None
        self._parts = _Parts(parts) if parts and self._whole is None else None
        self.verification = Verification.UNVERIFIABLE
        if image.source_hash is not None:
            self.verification = image.source_hash.verification
        elif parts:
            self.verification = Verification.CHECKSUM
        self.manifest: Manifest | None = None
        # the size decides how large pieces are; where it is not known, they are cut afterwards
        self._hasher = (
            None if size_bytes is None else manifest.Hasher(manifest.piece_bytes_for(size_bytes))
        )
        try:
            self._fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        except OSError as exc:
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

    def take(self, chunk: bytes | Hole) -> int:
        """The next bytes are written and hashed; how many they were."""
        length = chunk.length_bytes if isinstance(chunk, Hole) else len(chunk)
        limit = manifest.MAX_IMAGE_BYTES if self._expected is None else self._expected
        if self._size + length > limit:
            raise SourceError("source.size_mismatch", f"more than {limit} bytes came")
        if isinstance(chunk, Hole):
            self._take_zeros(length)
        else:
            if self._whole is not None:
                self._whole.update(chunk)
            if self._parts is not None:
                self._parts.update(chunk)
            self._write(chunk)
        self._size += length
        return length

    def _take_zeros(self, length: int) -> None:
        if self._hasher is not None:
            self._hasher.update_zeros(length)
        for digest in (self._whole, self._parts):
            left = length if digest is not None else 0
            while digest is not None and left:
                digest.update(_ZEROS[:left])
                left -= min(left, len(_ZEROS))

    def _write(self, chunk: bytes) -> None:
        """Runs of blocks of zeros are left out of the file: they are holes."""
        view = memoryview(chunk)
        begun = at = 0  # of the run of data that is not written yet
        while at < len(chunk):
            length = min(len(chunk) - at, len(_ZEROS) - (self._size + at) % len(_ZEROS))
            if chunk.startswith(_ZEROS[:length], at):
                self._write_data(view[begun:at], begun)
                if self._hasher is not None:
                    self._hasher.update_zeros(length)
                begun = at + length
            at += length
        self._write_data(view[begun:], begun)

    def _write_data(self, data: memoryview, at: int) -> None:
        if self._hasher is not None:
            self._hasher.update(data)
        offset = self._size + at
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
        if self._expected is not None and self._size != self._expected:
            raise SourceError(
                "source.truncated",
                f"{self._size} of {self._expected} bytes came",
                is_transient=True,
            )
        if self._whole is not None:
            self._whole.check("the bytes")
        try:
            os.ftruncate(self._fd, self._size)  # the last bytes may be a hole
        except OSError as exc:
            raise _disk_refused(self._part, exc) from exc
        self.manifest = self._hasher.finish() if self._hasher is not None else None

    def close(self) -> None:
        """The file is closed."""
        os.close(self._fd)


def _disk_refused(part: Path, exc: OSError) -> pieces.PieceStoreError:
    kind = (
        pieces.NoSpaceError
        if exc.errno in (errno.ENOSPC, errno.EDQUOT)
        else pieces.PieceStoreError
    )
    return kind(f"{part}: {exc.strerror}")
