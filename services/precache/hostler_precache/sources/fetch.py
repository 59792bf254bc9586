"""Fetch: one image from its source onto the seed's disk, checked as it comes, and in the shape that hosts want.

The bytes are written, hashed as the source hashes them and cut into pieces in one pass; zeros
become holes. What does not match what the source said of itself, or is not the format it was
declared to be, is deleted: it is never served, and no manifest of it ever exists. An image that is
not raw is converted once, here, and the manifest is that of the raw disk.

Where the bytes are served as they come and their number is known from the start, the pieces that
are whole are there for others while the rest comes (`Arriving`): whoever has them must not take them
for the image before all of it was checked.

What a fetch that was interrupted left is gone on with, where the source gives the rest of its bytes and
says what all of them hash to: what is on disk is hashed first, so that the hash is of every byte. If it
is not right in the end, all of it is fetched anew. Without such a hash nothing would tell a mix of two
versions from the image, and all is fetched again at once.
"""

import asyncio
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from hostler_common import logs
from hostler_precache import threads
from hostler_precache.images import Image, Verification
from hostler_precache.sources import conversion, inspection
from hostler_precache.sources.arrival import Arriving, Writer
from hostler_precache.sources.plugins import Fetcher
from hostler_precache.sources.source import Hole, Source, SourceError
from hostler_precache.transfer import leftovers, manifest, pieces
from hostler_precache.transfer.manifest import Manifest

# of a hole, what is hashed in one step off the loop: a step cannot be cancelled
_HOLE_STEP_BYTES: Final = 64 * 1024 * 1024
# why a source may have the same bytes still, and what came of them be of use
_INTERRUPTIONS: Final = frozenset(
    {"source.truncated", "source.unreachable", "source.refused", "source.range_ignored"}
)


log = logs.get(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """An image on the seed's disk, with its manifest and how far it could be checked.

    `disk_format` is that of the bytes there, which is not the source's where they were converted.
    Of the source's bytes, `received_bytes` came, and `left_bytes` were there from an attempt before.
    """

    manifest: Manifest
    verification: Verification
    disk_format: str
    received_bytes: int
    left_bytes: int


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
    told: bytes = b"",
) -> Fetched:
    """The image is at `path`, complete, synced, as its source says it should be, and safe to boot from.

    An attempt that is interrupted leaves what has come beside `path`, for the next one to go on with
    or for `discard`.

    Args:
        fetcher: which opens it.
        image: which.
        path: where.
        reserve_bytes: what is to stay free on that disk.
        progress: what is told of how far it is.
        convert_to_raw: whether a disk in another shape becomes a raw one.
        told: the digests of pieces that others were told of in attempts before: what is left of
            those is believed as far as it has these.

    Raises:
        SourceError: the source failed, or its bytes are not what it says, or not what may be
            served; nothing is at `path`.
        pieces.PieceStoreError: the disk refused; nothing is at `path`.
    """
    part, staged = _part_of(path), path.with_name(path.name + ".raw")
    goes_on = True  # until the source is known
    try:
        is_as_it_is = not (convert_to_raw and inspection.is_shaped(image.disk_format))
        await asyncio.to_thread(_make_ready, path, staged, is_as_it_is)
        async with fetcher.open(image) as source:
            goes_on = _goes_on(source, image)
            writer = await _receive(
                source,
                image,
                part,
                reserve_bytes=reserve_bytes,
                progress=progress or FetchProgress(),
                is_as_it_is=is_as_it_is,
                told=told,
            )
        try:
            found = await asyncio.to_thread(inspection.inspect, part, image.disk_format)
            if found != inspection.RAW and convert_to_raw:
                await conversion.to_raw(part, staged, expected=found, reserve_bytes=reserve_bytes)
                part.unlink()
                described = await threads.to_end(partial(_install, staged, path, None))
                found = inspection.RAW
            else:
                # qemu-img knows formats that the inspection does not; without it, nothing is converted either
                if part.stat().st_size and conversion.is_available():
                    await conversion.look(part, found)
                described = await threads.to_end(partial(_install, part, path, writer.manifest))
        except OSError as exc:
            raise pieces.PieceStoreError(f"{path}: {exc.strerror}") from exc
        return Fetched(
            manifest=described,
            verification=writer.verification,
            disk_format=found,
            received_bytes=writer.size_bytes - writer.left_bytes,
            left_bytes=writer.left_bytes,
        )
    except BaseException as exc:
        if not (goes_on and _is_interruption(exc)):
            discard(path)
        raise
    finally:
        leftovers.remove(staged)


def discard(path: Path) -> None:
    """What an interrupted fetch left for the next attempt is gone."""
    leftovers.remove(_part_of(path))


def _part_of(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _make_ready(path: Path, staged: Path, is_as_it_is: bool) -> None:
    """What a killed process left takes no room, and what it had made whole is what is gone on with."""
    try:
        staged.unlink(missing_ok=True)  # half of a converted disk
        if is_as_it_is and path.exists() and not _part_of(path).exists():
            path.replace(_part_of(path))
    except OSError as exc:
        raise pieces.PieceStoreError(f"{path}: {exc.strerror}") from exc


def _goes_on(source: Source, image: Image) -> bool:
    """Whether a fetch of it may be in two parts: there is a hash of every byte, and they come from anywhere."""
    return source.skip is not None and (image.source_hash is not None or bool(source.parts))


def _is_interruption(exc: BaseException) -> bool:
    if isinstance(exc, SourceError):
        return exc.is_transient and exc.reason in _INTERRUPTIONS
    return isinstance(exc, asyncio.CancelledError)


async def _receive(
    source: Source,
    image: Image,
    part: Path,
    *,
    reserve_bytes: int,
    progress: FetchProgress,
    is_as_it_is: bool,
    told: bytes,
) -> Writer:
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

    def writer_of(left_bytes: int) -> Writer:
        return Writer(
            part, image, known, source.parts, is_as_it_is=is_as_it_is, left_bytes=left_bytes
        )

    left_bytes = 0
    if _goes_on(source, image):
        left_bytes = await asyncio.to_thread(_left_bytes, part, known, told, is_as_it_is)
    writer = await threads.to_end(partial(writer_of, left_bytes), undo=Writer.close)
    try:
        if left_bytes and not await _goes_on_after(left_bytes, writer, source, told):
            await threads.to_end(writer.close)
            writer = await threads.to_end(partial(writer_of, 0), undo=Writer.close)
        if is_as_it_is:
            progress.arriving = await threads.to_end(writer.begin)
        progress.came(writer.left_bytes)
        async for chunk in source.chunks:
            # written and hashed off the loop: both release the interpreter lock
            for step in _steps(chunk):
                progress.came(await threads.to_end(partial(writer.take, step)))
        await threads.to_end(writer.finish)
    except SourceError as exc:
        if writer.left_bytes and exc.reason == "source.hash_mismatch":
            # of one attempt or the other: the next one begins from the start
            raise SourceError(exc.reason, exc.detail, is_transient=True) from exc
        raise
    finally:
        await threads.to_end(writer.close)
    return writer


def _left_bytes(part: Path, size_bytes: int | None, told: bytes, is_as_it_is: bool) -> int:
    """How many of the first bytes of the image are in the file, as far as can be said without reading it."""
    try:
        there = part.stat().st_size
    except OSError:
        return 0
    if not is_as_it_is or size_bytes is None:  # written at its end only
        return there if size_bytes is None else min(there, size_bytes)
    if there != size_bytes:
        return 0
    piece_bytes = manifest.piece_bytes_for(size_bytes)
    whole = min(len(told) // manifest.DIGEST_BYTES, size_bytes // piece_bytes)
    return whole * piece_bytes


async def _goes_on_after(left_bytes: int, writer: Writer, source: Source, told: bytes) -> bool:
    """Whether the writer has taken what is there, and the source begins after it; else it begins at its start."""
    assert source.skip is not None
    if not await source.skip(left_bytes):  # known before 50 GB are read for nothing
        return False
    try:
        while (chunk := await threads.to_end(writer.read_left)) is not None:
            for step in _steps(chunk):
                await threads.to_end(partial(writer.take, step, is_there=True))
        if writer.size_bytes == left_bytes and writer.begins_with(told):
            return True
    except (
        SourceError,
        pieces.PieceStoreError,
    ) as exc:  # a part of it is another by now, or not to be read
        log.info("left_bytes_are_of_no_use", reason=str(exc))
    await source.skip(0)
    return False


def _steps(chunk: bytes | Hole) -> Iterator[bytes | Hole]:
    """The chunk; a hole in runs of which each is taken in a moment.

    Raises:
        SourceError: it is a hole of less than nothing.
    """
    if not isinstance(chunk, Hole):
        yield chunk
        return
    left = chunk.length_bytes
    if left < 0:
        raise SourceError("source.malformed", f"the source has a hole of {left} bytes")
    while left > 0:
        length = min(left, _HOLE_STEP_BYTES)
        yield Hole(length_bytes=length)
        left -= length


def _require_room(part: Path, size_bytes: int, reserve_bytes: int) -> None:
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        volume = os.statvfs(part.parent)
        there = part.stat().st_blocks * 512 if part.exists() else 0  # gone on with, or removed
    except OSError as exc:
        raise pieces.PieceStoreError(f"{part.parent}: {exc.strerror}") from exc
    free = volume.f_bavail * volume.f_frsize + there
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
