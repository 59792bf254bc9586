"""An image on its way to disk: the partial file, its journal, and its last step into place.

Two files in a `.precache/` directory beside the target, on the same file system so that the last
step is one link: `<blob>.part`, preallocated to the full size, and `<blob>.journal`, a header and
one checksummed record a piece, appended only after the data was synced. A process killed at any
point, or a machine that loses power, leaves a journal whose intact prefix names only pieces that
are on disk; a torn tail is cut off. Nothing half-written is ever visible under the final name.

All calls block; the agent makes them in threads. `write` may run in several threads at once, for
different pieces.
"""

import contextlib
import fcntl
import hashlib
import os
import struct
import threading
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Final, Self

from hostler_precache import swarm
from hostler_precache.manifest import BlobId, Manifest, spans

WORK_DIRECTORY: Final = ".precache"
FILE_MODE: Final = 0o644
_MAGIC: Final = b"HPCJ\0\0\0\1"
_HEADER: Final = struct.Struct(">8s32sQQ")
_RECORD: Final = struct.Struct(">I")
_CRC: Final = struct.Struct(">I")
_RECORD_BYTES: Final = _RECORD.size + _CRC.size


class PieceStoreError(Exception):
    """Why an image cannot be stored; `reason` is a stable word for reports."""

    reason = "storage.failed"


class NoSpaceError(PieceStoreError):
    """The file system has not the room, seen before a byte was fetched."""

    reason = "storage.no_space"


class BusyError(PieceStoreError):
    """Another process is storing the same blob here."""

    reason = "storage.busy"


class PieceRejectedError(PieceStoreError):
    """The bytes are not the piece they were said to be; nothing was written."""

    reason = "piece.rejected"


class TargetExistsError(PieceStoreError):
    """Another file already bears the final name; it was left alone."""

    reason = "target.exists"


class PieceStore:
    """One blob being received. Use `open`, and `close` whatever happens."""

    def __init__(
        self, *, manifest: Manifest, data: Path, journal: Path, data_fd: int, journal_fd: int
    ) -> None:
        """Internal: `open` checks what it finds on disk first."""
        self.manifest = manifest
        self._data = data
        self._journal = journal
        self._data_fd = data_fd
        self._journal_fd = journal_fd
        self._lock = threading.Lock()
        self._unjournaled: list[int] = []
        self._journaled = 0

    @classmethod
    def open(
        cls, directory: Path, blob_id: BlobId, manifest: Manifest, *, reserve_bytes: int = 0
    ) -> Self:
        """Open what an earlier run left of this blob, or begin it.

        After the call the full size is allocated, so the disk cannot fill up half-way.

        Args:
            directory: where the final file will be; made if missing.
            blob_id: a UUID, part of the file names.
            manifest: pieces of another manifest are never taken over.
            reserve_bytes: what must stay free besides.

        Raises:
            NoSpaceError: not enough room.
            BusyError: another process has it open.
            PieceStoreError: the directory or its files cannot be used.
        """
        work = directory / WORK_DIRECTORY
        data, journal = work / f"{blob_id}.part", work / f"{blob_id}.journal"
        with contextlib.ExitStack() as stack:
            try:
                work.mkdir(parents=True, exist_ok=True)
                data_fd = os.open(data, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
                stack.callback(os.close, data_fd)
                fcntl.flock(data_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _allocate(data_fd, manifest.size_bytes, reserve_bytes)
                journal_fd = os.open(journal, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                stack.callback(os.close, journal_fd)
                store = cls(
                    manifest=manifest,
                    data=data,
                    journal=journal,
                    data_fd=data_fd,
                    journal_fd=journal_fd,
                )
                store._resume()
                _sync_directory(work)
            except BlockingIOError as exc:
                raise BusyError(f"{data} is in use by another process") from exc
            except OSError as exc:
                raise PieceStoreError(f"{data}: {exc.strerror}") from exc
            stack.pop_all()
            return store

    @property
    def journaled(self) -> int:
        """The pieces that a crash now would not lose."""
        return self._journaled

    def fileno(self) -> int:
        """The open partial file, still good after `place` gave it its final name."""
        return self._data_fd

    def write(self, piece: int, data: bytes | bytearray | memoryview) -> None:
        """Verify a piece and write it where it belongs; `flush` makes it last.

        Raises:
            PieceRejectedError: the bytes are not this piece.
            PieceStoreError: the disk refused.
        """
        if not self.manifest.accepts(piece, data):
            raise PieceRejectedError(f"piece {piece} is not what the manifest says")
        offset = self.manifest.span(piece).start
        view = memoryview(data)
        try:
            while view:
                written = os.pwrite(self._data_fd, view, offset)
                view, offset = view[written:], offset + written
        except OSError as exc:
            raise PieceStoreError(f"{self._data}: {exc.strerror}") from exc
        with self._lock:
            self._unjournaled.append(piece)

    def flush(self) -> None:
        """Sync the data, then journal the pieces written until now: after it, no crash loses them.

        Raises:
            PieceStoreError: the disk refused; the pieces stay to be journaled.
        """
        with self._lock:
            pieces = list(self._unjournaled)
        if not pieces:
            return
        records = b"".join(self._record(piece) for piece in pieces)
        try:
            os.fdatasync(self._data_fd)
            _write_all(self._journal_fd, records)
            os.fdatasync(self._journal_fd)
        except OSError as exc:
            raise PieceStoreError(f"{self._journal}: {exc.strerror}") from exc
        with self._lock:
            del self._unjournaled[: len(pieces)]
            self._journaled |= swarm.bits(pieces)

    def place(self, target: Path, *, replace: bool = False, mode: int = FILE_MODE) -> None:
        """Give the complete file its final name, in one step, and forget the journal.

        Called again after a crash in the middle, it ends the same way.

        Args:
            target: the final path, in the directory given to `open` or on its file system.
            replace: take the place of a file of that name instead of failing.
            mode: permissions of the file.

        Raises:
            TargetExistsError: a file of that name is there, and is not ours.
            PieceStoreError: pieces are missing, or the disk refused.
        """
        self.flush()
        if self._journaled != (1 << self.manifest.count) - 1:
            raise PieceStoreError("pieces are missing")
        try:
            os.fchmod(self._data_fd, mode)
            os.fsync(self._data_fd)
            if replace:
                self._data.replace(target)
            else:
                with contextlib.suppress(FileNotFoundError):  # an earlier run got past the link
                    self._link(target)
                    self._data.unlink()
            _sync_directory(target.parent)
            self._journal.unlink(missing_ok=True)
        except OSError as exc:
            raise PieceStoreError(f"{target}: {exc.strerror}") from exc

    def discard(self) -> None:
        """Delete the partial file and its journal; the open descriptor stays until `close`."""
        self._journal.unlink(missing_ok=True)
        self._data.unlink(missing_ok=True)

    def close(self) -> None:
        """Close both files. What was not flushed is fetched again by the next run."""
        os.close(self._data_fd)
        os.close(self._journal_fd)

    def _link(self, target: Path) -> None:
        # link, unlike rename, never takes the place of a file that appeared meanwhile
        try:
            target.hardlink_to(self._data)
        except FileExistsError as exc:
            if not target.samefile(self._data):
                raise TargetExistsError(f"{target} exists") from exc

    def _resume(self) -> None:
        """Take over the intact records of the journal, and cut off what follows them."""
        content = _read_all(self._journal_fd)
        header = self._header()
        if not content.startswith(header):
            os.ftruncate(self._journal_fd, 0)
            os.lseek(self._journal_fd, 0, os.SEEK_SET)
            _write_all(self._journal_fd, header)
            os.fsync(self._journal_fd)
            return
        end = len(header)
        while (record := content[end : end + _RECORD_BYTES]) and len(record) == _RECORD_BYTES:
            (piece,) = _RECORD.unpack(record[: _RECORD.size])
            if piece >= self.manifest.count or record != self._record(piece):
                break
            self._journaled |= 1 << piece
            end += _RECORD_BYTES
        os.ftruncate(self._journal_fd, end)
        os.lseek(self._journal_fd, end, os.SEEK_SET)

    def _header(self) -> bytes:
        manifest = self.manifest
        head = _HEADER.pack(_MAGIC, manifest.root, manifest.size_bytes, manifest.piece_bytes)
        return head + _CRC.pack(zlib.crc32(head))

    def _record(self, piece: int) -> bytes:
        index = _RECORD.pack(piece)
        return index + _CRC.pack(zlib.crc32(self.manifest.root + index))


def discard_others(directory: Path, wanted: Collection[str]) -> list[str]:
    """Partial files of blobs that are not wanted here any more are gone; returns their ids.

    A blob that another process has open is left to it.
    """
    discarded = []
    for data in (directory / WORK_DIRECTORY).glob("*.part"):
        if data.stem in wanted:
            continue
        with data.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            data.with_suffix(".journal").unlink(missing_ok=True)
            data.unlink(missing_ok=True)
            discarded.append(data.stem)
    return sorted(discarded)


def matching_pieces(fd: int, manifest: Manifest) -> int:
    """The pieces of the manifest that an open file holds, found by reading all of it."""
    found = 0
    for piece, span in spans(manifest):
        digest, offset = hashlib.sha256(), span.start
        while offset < span.stop and (
            chunk := os.pread(fd, min(1 << 20, span.stop - offset), offset)
        ):
            digest.update(chunk)
            offset += len(chunk)
        if offset == span.stop and digest.digest() == manifest.digest(piece):
            found |= 1 << piece
    return found


def is_exactly(fd: int, manifest: Manifest) -> bool:
    """Whether an open file is the image, to the last byte."""
    if os.fstat(fd).st_size != manifest.size_bytes:
        return False
    return matching_pieces(fd, manifest) == (1 << manifest.count) - 1


def _allocate(fd: int, size_bytes: int, reserve_bytes: int) -> None:
    status = os.fstat(fd)
    if status.st_size > size_bytes:
        os.ftruncate(fd, size_bytes)
    lacking = max(0, size_bytes - status.st_blocks * 512)
    volume = os.fstatvfs(fd)
    free = volume.f_bavail * volume.f_frsize
    if lacking and free < lacking + reserve_bytes:
        raise NoSpaceError(
            f"{lacking} bytes are needed and {reserve_bytes} kept free, {free} are there"
        )
    if size_bytes:
        try:
            os.posix_fallocate(fd, 0, size_bytes)
        except OSError as exc:
            raise NoSpaceError(f"{size_bytes} bytes were refused: {exc.strerror}") from exc


def _read_all(fd: int) -> bytes:
    os.lseek(fd, 0, os.SEEK_SET)
    with os.fdopen(os.dup(fd), "rb") as file:
        return file.read()


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
