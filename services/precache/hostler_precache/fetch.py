"""Fetch: one image from its source onto the seed's disk, checked as it comes.

The bytes are written, hashed as the source hashes them and cut into pieces in one pass. What
does not match what the source said of itself is deleted: it is never served, and no manifest of
it ever exists.
"""

import asyncio
import contextlib
import hashlib
import hmac
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hostler_precache import manifest, pieces
from hostler_precache.images import Image, Verification
from hostler_precache.manifest import Manifest
from hostler_precache.plugins import Fetcher, SourceError


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """An image on the seed's disk, with its manifest and how far it could be checked."""

    manifest: Manifest
    verification: Verification


class FetchProgress:
    """How many bytes have come; read by whoever shows it."""

    def __init__(self) -> None:
        self.bytes_done = 0


async def fetch(
    fetcher: Fetcher,
    image: Image,
    path: Path,
    *,
    reserve_bytes: int = 0,
    progress: FetchProgress | None = None,
) -> Fetched:
    """The image is at `path`, complete, synced and as its source says it should be.

    Raises:
        SourceError: the source failed, or its bytes are not what it says; nothing is at `path`.
        pieces.PieceStoreError: the disk refused; nothing is at `path`.
    """
    part = path.with_name(path.name + ".part")
    try:
        async with fetcher.open(image) as source:
            size_bytes = source.size_bytes
            if None not in (image.size_bytes, size_bytes) and image.size_bytes != size_bytes:
                raise SourceError(
                    "source.size_mismatch",
                    f"the source offers {size_bytes} bytes of an image of {image.size_bytes}",
                )
            known = image.size_bytes if size_bytes is None else size_bytes
            await asyncio.to_thread(_require_room, part, known or 0, reserve_bytes)
            writer = await asyncio.to_thread(_Writer, part, image, known)
            try:
                async for chunk in source.chunks:
                    # written and hashed off the loop: both release the interpreter lock
                    await asyncio.to_thread(writer.take, chunk)
                    if progress is not None:
                        progress.bytes_done += len(chunk)
                return await asyncio.to_thread(writer.finish, path)
            finally:
                await asyncio.to_thread(writer.close)
    finally:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()


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


class _Writer:
    """The file being written, and the hashes of it. Every method blocks."""

    def __init__(self, part: Path, image: Image, size_bytes: int | None) -> None:
        self._part = part
        self._image = image
        self._expected = size_bytes
        self._size = 0
        claimed = image.source_hash
        self._whole: Any = (
            hashlib.new(claimed.algorithm, usedforsecurity=False) if claimed else None
        )
        # the size decides how large pieces are; where it is not known, they are cut afterwards
        self._hasher = (
            None if size_bytes is None else manifest.Hasher(manifest.piece_bytes_for(size_bytes))
        )
        try:
            self._file = part.open("wb")
        except OSError as exc:
            raise pieces.PieceStoreError(f"{part}: {exc.strerror}") from exc

    def take(self, chunk: bytes) -> None:
        self._size += len(chunk)
        limit = manifest.MAX_IMAGE_BYTES if self._expected is None else self._expected
        if self._size > limit:
            raise SourceError("source.size_mismatch", f"more than {limit} bytes came")
        try:
            self._file.write(chunk)
        except OSError as exc:
            raise pieces.PieceStoreError(f"{self._part}: {exc.strerror}") from exc
        if self._whole is not None:
            self._whole.update(chunk)
        if self._hasher is not None:
            self._hasher.update(chunk)

    def finish(self, path: Path) -> Fetched:
        if self._expected is not None and self._size != self._expected:
            raise SourceError(
                "source.truncated",
                f"{self._size} of {self._expected} bytes came",
                is_transient=True,
            )
        claimed = self._image.source_hash
        if claimed is not None and not hmac.compare_digest(self._whole.hexdigest(), claimed.value):
            raise SourceError(
                "source.hash_mismatch",
                f"the {claimed.algorithm} of the bytes is not the one that the source names",
            )
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            hasher = self._hasher or self._cut()
            self._part.replace(path)
            directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as exc:
            raise pieces.PieceStoreError(f"{path}: {exc.strerror}") from exc
        return Fetched(
            manifest=hasher.finish(),
            verification=claimed.verification if claimed else Verification.UNVERIFIABLE,
        )

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a full disk fails the last flush again
            self._file.close()

    def _cut(self) -> manifest.Hasher:
        hasher = manifest.Hasher(manifest.piece_bytes_for(self._size))
        with self._part.open("rb") as file:
            while chunk := file.read(1 << 20):
                hasher.update(chunk)
        return hasher
