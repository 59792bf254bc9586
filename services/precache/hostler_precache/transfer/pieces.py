"""An image on its way to disk: the partial file, its journal, and its last step into place.

Two files in a `.precache/` directory beside the target, on the same file system so that the last
step is one link: `<blob>.part`, of the full size, allocated wherever the image is not zeros, and
`<blob>.journal`, a header and one checksummed record a piece, appended only after the data was
synced. A process killed at any point, or a machine that loses power, leaves a journal whose intact
prefix names only pieces that are on disk; a torn tail is cut off. Nothing half-written is ever
visible under the final name.

A piece may come in one part (`PieceStore.write` of its bytes) or, without being kept in memory, as a
`Landing`: blocks that are hashed and written to their place as they come, and count for nothing
until `PieceStore.write` has compared the digest. One landing at a time has the place of a piece,
for as long as anybody holds the object; a second one of the same piece is spilled beside the file,
so what is verified is never overwritten by what is not.

All calls block; the agent makes them in threads. `write` and landings may run in several threads
at once.
"""

import contextlib
import errno
import fcntl
import hashlib
import hmac
import os
import re
import struct
import tempfile
import threading
import weakref
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import BinaryIO, Final, Self

from hostler_precache.swarming import swarm
from hostler_precache.transfer import manifest as manifests
from hostler_precache.transfer.manifest import BlobId, Manifest, PieceList, Span, spans

WORK_DIRECTORY: Final = ".precache"
FILE_MODE: Final = 0o644
_MAGIC: Final = b"HPCJ\0\0\0\1"
_HEADER: Final = struct.Struct(">8s32sQQ")
_RECORD: Final = struct.Struct(">I")
_CRC: Final = struct.Struct(">I")
_RECORD_BYTES: Final = _RECORD.size + _CRC.size
_READ_BYTES: Final = 1 << 20
_ALLOCATED_BYTES: Final = 8 << 20  # at once: whoever writes, or closes the file, waits for no more

Bytes = bytes | bytearray | memoryview


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


class Landing:
    """The bytes of one piece as they come: hashed, and on their way to their place. See the module.

    One thread at a time may `write`; `PieceStore.write` ends it.
    """

    def __init__(self, store: "PieceStore", piece: int, spill: BinaryIO | None) -> None:
        """Internal: `PieceStore.landing` decides where it goes."""
        self.store = store
        self.piece = piece
        self._hash = hashlib.sha256()
        self._length_bytes = 0
        self._limit_bytes = store.manifest.span(piece).length
        self._lock = threading.Lock()
        self._is_revoked = False
        self._spill = spill
        if spill is not None:
            weakref.finalize(self, spill.close)

    def __len__(self) -> int:
        """How many bytes have come."""
        return self._length_bytes

    @property
    def is_spilled(self) -> bool:
        """Whether the bytes wait beside the file, and not at their place."""
        return self._spill is not None

    @property
    def is_revoked(self) -> bool:
        """Whether what comes is not written to the file any more."""
        return self._is_revoked

    def write(self, block: Bytes) -> None:
        """Take the next bytes.

        Raises:
            PieceRejectedError: they are more than the piece has.
            PieceStoreError: the disk refused.
        """
        if self._length_bytes + len(block) > self._limit_bytes:
            raise PieceRejectedError(f"more bytes than piece {self.piece} has")
        self._hash.update(block)
        if self._spill is not None:
            self.store._write(self._spill.fileno(), block, self._length_bytes)
        else:
            start = self.store.manifest.span(self.piece).start
            with self.store._turn, self._lock:
                if not self._is_revoked:
                    self.store._write(self.store.fileno(), block, start + self._length_bytes)
        self._length_bytes += len(block)

    def digest(self) -> bytes:
        """The sha256 of what has come."""
        return self._hash.digest()

    def revoke(self) -> None:
        """Nothing more of it is written to the file, whatever still comes."""
        with self._lock:
            self._is_revoked = True

    def blocks(self) -> Iterator[bytes]:
        """What was spilled."""
        assert self._spill is not None
        offset = 0
        while chunk := os.pread(self._spill.fileno(), _READ_BYTES, offset):
            yield chunk
            offset += len(chunk)


PieceData = Bytes | Landing


class PieceStore:
    """One blob being received, or repaired. Use `open` or `reopen`, and `close` whatever happens."""

    def __init__(
        self,
        *,
        manifest: PieceList,
        data: Path,
        data_fd: int,
        journal: "_Journal | None",
        have: int,
    ) -> None:
        """Internal: `open` checks what it finds on disk first."""
        self.manifest = manifest
        self._data = data
        self._data_fd = data_fd
        self._journal = journal
        self._lock = threading.Lock()
        self._commit = threading.Lock()  # held while verified bytes get to their place
        self._turn = _Turn()  # to write into the file, or to allocate a part of it
        self._is_closed = False
        self._unjournaled: list[int] = []
        self._journaled = have
        self._had = have
        # who writes to the place of a piece; gone when nobody holds the landing any more
        self._landings: weakref.WeakValueDictionary[int, Landing] = weakref.WeakValueDictionary()

    @classmethod
    def open(
        cls,
        directory: Path,
        blob_id: BlobId,
        manifest: PieceList,
        *,
        reserve_bytes: int = 0,
        allocate: bool = True,
    ) -> Self:
        """Open what an earlier run left of this blob, or begin it.

        After the call there is room, and the zero pieces are there: as holes.

        Args:
            directory: where the final file will be; made if missing.
            blob_id: a UUID, part of the file names.
            manifest: pieces of another manifest are never taken over. It may still grow; then `grew`
                is called each time. What was begun with one that grew is read through first.
            reserve_bytes: what must stay free besides.
            allocate: take the room at once; else `allocate` does it, beside the transfer.

        Raises:
            NoSpaceError: not enough room.
            BusyError: another process has it open.
            PieceStoreError: the directory or its files cannot be used.
        """
        work = directory / WORK_DIRECTORY
        data = work / f"{blob_id}.part"
        with contextlib.ExitStack() as stack:
            try:
                work.mkdir(parents=True, exist_ok=True)
                data_fd = _open_locked(data, os.O_CREAT, stack)
                journal = _Journal(work / f"{blob_id}.journal", manifest, blob_id)
                stack.callback(journal.close)
                have = journal.resume()
                if have is not None and journal.has_grown:
                    have = _intact(data_fd, manifest, have)
                if have is None or os.fstat(data_fd).st_size != manifest.size_bytes:
                    # in this order: a journal never names pieces of a file that was cut
                    journal.clear()
                    os.ftruncate(data_fd, 0)
                    os.ftruncate(data_fd, manifest.size_bytes)
                    have = None
                _require_room(data_fd, manifest, reserve_bytes)
                if have is None:
                    journal.begin()
                    have = 0
                store = cls(
                    manifest=manifest,
                    data=data,
                    data_fd=data_fd,
                    journal=journal,
                    have=have | manifest.zero_pieces,
                )
                if allocate:
                    store.allocate()
                _sync_directory(work)
            except OSError as exc:
                raise PieceStoreError(f"{data}: {exc.strerror}") from exc
            stack.pop_all()
            return store

    @classmethod
    def reopen(cls, path: Path, manifest: Manifest, *, damaged: int) -> Self:
        """Open a placed file to have its damaged pieces written again, in place.

        After the call its size is right and its zero pieces are zeros. There is no journal: what is
        interrupted is found again by the next scrub. Unverified bytes never get into the file.

        Args:
            path: the file, under its final name.
            manifest: what it should be.
            damaged: the pieces that it has not, as `damaged` names them.

        Raises:
            BusyError: another process repairs it.
            PieceStoreError: the file cannot be used.
        """
        with contextlib.ExitStack() as stack:
            try:
                (path.parent / WORK_DIRECTORY).mkdir(exist_ok=True)  # for what is spilled
                data_fd = _open_locked(path, 0, stack)
                os.ftruncate(data_fd, manifest.size_bytes)
                store = cls(
                    manifest=manifest,
                    data=path,
                    data_fd=data_fd,
                    journal=None,
                    have=manifest.all_pieces & ~(damaged & ~manifest.zero_pieces),
                )
                store._zero(damaged & manifest.zero_pieces)
            except OSError as exc:
                raise PieceStoreError(f"{path}: {exc.strerror}") from exc
            stack.pop_all()
            return store

    @property
    def journaled(self) -> int:
        """The pieces that a crash now would not lose."""
        return self._journaled

    def fileno(self) -> int:
        """The open file, still good after `place` gave it its final name."""
        return self._data_fd

    def grew(self) -> int:
        """Zero pieces that the manifest has told of meanwhile are there, as holes; returns the set."""
        with self._lock:
            zeros = self.manifest.zero_pieces & ~self._had
            self._had |= zeros
            self._journaled |= zeros
        return zeros

    def allocate(self) -> None:
        """All that is not zeros has its place on the disk, which cannot fill up half-way any more.

        Some file systems write the whole file for that. It may run beside landings and writes; when
        the store is closed meanwhile, it ends early.

        Raises:
            NoSpaceError: others took the room after `open` had seen it.
        """
        for run in _runs(self.manifest.all_pieces & ~self.manifest.zero_pieces):
            start = self.manifest.span(run.start).start
            stop = self.manifest.span(run.stop - 1).stop
            for offset in range(start, stop, _ALLOCATED_BYTES):
                length = min(_ALLOCATED_BYTES, stop - offset)
                with self._turn:
                    if self._is_closed:
                        return
                    try:
                        os.posix_fallocate(self._data_fd, offset, length)
                    except OSError as exc:
                        raise NoSpaceError(
                            f"{self._data}: {length} bytes were refused: {exc.strerror}"
                        ) from exc

    def landing(self, piece: int) -> Landing:
        """Where the bytes of a piece can go as they come, to be told to `write` in the end.

        Raises:
            PieceStoreError: the disk refused.
        """
        with self._lock:
            free = self._journal is not None and piece not in self._landings
            if free and not self._had >> piece & 1:
                landing = self._landings[piece] = Landing(self, piece, None)
                return landing
        directory = self._data.parent
        if self._journal is None:
            directory /= WORK_DIRECTORY
        try:
            spill = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115  closed with the landing
        except OSError as exc:
            raise PieceStoreError(f"{directory}: {exc.strerror}") from exc
        return Landing(self, piece, spill)

    def write(self, piece: int, data: PieceData) -> None:
        """Verify a piece and have it where it belongs; `flush` makes it last.

        A piece that is there already stays as it is.

        Raises:
            PieceRejectedError: the bytes are not this piece.
            PieceStoreError: the disk refused.
        """
        if not self._accepts(piece, data):
            self._give_up(piece, data)
            raise PieceRejectedError(f"piece {piece} is not what the manifest says")
        with self._commit:
            if self._had >> piece & 1:
                return
            with self._lock:
                other = self._landings.pop(piece, None)
            if other is not None and other is not data:
                other.revoke()  # not verified yet: it writes no more to this place
            offset = self.manifest.span(piece).start
            if not isinstance(data, Landing):
                with self._turn:
                    self._write(self._data_fd, data, offset)
            elif data.is_spilled:
                for block in data.blocks():
                    with self._turn:
                        self._write(self._data_fd, block, offset)
                    offset += len(block)
            elif data.is_revoked:
                raise PieceStoreError(f"piece {piece} was given up")
            with self._lock:
                self._had |= 1 << piece
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
        try:
            os.fdatasync(self._data_fd)
            if self._journal is not None:
                self._journal.append(pieces)
        except OSError as exc:
            raise PieceStoreError(f"{self._data}: {exc.strerror}") from exc
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
        assert self._journal is not None, "a file that is repaired is in place"
        self.flush()
        if self._journaled != self.manifest.all_pieces:
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
            self._journal.path.unlink(missing_ok=True)
        except OSError as exc:
            raise PieceStoreError(f"{target}: {exc.strerror}") from exc

    def discard(self) -> None:
        """Delete the partial file and its journal; the open descriptor stays until `close`."""
        assert self._journal is not None, "a file that is repaired is not partial"
        self._journal.path.unlink(missing_ok=True)
        self._data.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the files. What was not flushed is fetched again by the next run."""
        with self._lock:
            landings = list(self._landings.values())
        for landing in landings:  # a thread that still receives must not write to another's file
            landing.revoke()
        with self._turn:
            self._is_closed = True
            os.close(self._data_fd)
        if self._journal is not None:
            self._journal.close()

    def _give_up(self, piece: int, data: PieceData) -> None:
        with self._lock:
            if self._landings.get(piece) is data:
                del self._landings[piece]

    def _accepts(self, piece: int, data: PieceData) -> bool:
        if not isinstance(data, Landing):
            return self.manifest.accepts(piece, data)
        return (
            data.store is self
            and data.piece == piece
            and len(data) == self.manifest.span(piece).length
            and hmac.compare_digest(data.digest(), self.manifest.digest(piece))
        )

    def _write(self, fd: int, data: Bytes, offset: int) -> None:
        view = memoryview(data)
        try:
            while view:
                written = os.pwrite(fd, view, offset)
                view, offset = view[written:], offset + written
        except OSError as exc:
            raise PieceStoreError(f"{self._data}: {exc.strerror}") from exc

    def _zero(self, pieces: int) -> None:
        zeros = bytes(min(_READ_BYTES, self.manifest.piece_bytes))
        for piece in swarm.members(pieces):
            span = self.manifest.span(piece)
            for offset in range(span.start, span.stop, len(zeros)):
                self._write(self._data_fd, zeros[: span.stop - offset], offset)
        if pieces:
            os.fdatasync(self._data_fd)

    def _link(self, target: Path) -> None:
        # link, unlike rename, never takes the place of a file that appeared meanwhile
        try:
            target.hardlink_to(self._data)
        except FileExistsError as exc:
            if not target.samefile(self._data):
                raise TargetExistsError(f"{target} exists") from exc


class _Turn:
    """A lock that everybody gets who waits for it: who gives it back does not take it again before them.

    File systems let one at a time write into a file or allocate it, and who waits in the kernel burns
    a core (a quarter of all that a transfer costs, on tmpfs). Where the C library allocates by writing
    a byte into each block, what is written beside it could be lost.
    """

    def __init__(self) -> None:
        self._next = threading.Lock()
        self._held = threading.Lock()

    def __enter__(self) -> None:
        with self._next:
            self._held.acquire()

    def __exit__(self, *_: object) -> None:
        self._held.release()


class _Journal:
    """Which pieces of a partial file are on disk. Its methods raise OSError."""

    def __init__(self, path: Path, manifest: PieceList, blob_id: BlobId) -> None:
        self.path = path
        self._manifest = manifest
        self._growing = manifests.growing_identity(
            blob_id, manifest.size_bytes, manifest.piece_bytes
        )
        self._identity = manifest.identity
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    @property
    def has_grown(self) -> bool:
        """Whether it was begun when the manifest was not closed."""
        return self._identity == self._growing

    def resume(self) -> int | None:
        """The pieces of the intact records, and what follows them is cut off; None: not of this manifest."""
        content = _read_all(self._fd)
        header = self._header(self._growing)
        if content.startswith(header):
            self._identity = self._growing
        else:
            header = self._header(self._identity)
        if not content.startswith(header):
            return None
        journaled, end = 0, len(header)
        while (record := content[end : end + _RECORD_BYTES]) and len(record) == _RECORD_BYTES:
            (piece,) = _RECORD.unpack(record[: _RECORD.size])
            if piece >= self._manifest.count or record != self._record(piece):
                break
            journaled |= 1 << piece
            end += _RECORD_BYTES
        os.ftruncate(self._fd, end)
        os.lseek(self._fd, end, os.SEEK_SET)
        return journaled

    def clear(self) -> None:
        """It names nothing, and a crash changes nothing about that."""
        os.ftruncate(self._fd, 0)
        os.lseek(self._fd, 0, os.SEEK_SET)
        os.fsync(self._fd)

    def begin(self) -> None:
        """It is of this manifest from now on."""
        self._identity = self._manifest.identity
        _write_all(self._fd, self._header(self._identity))
        os.fsync(self._fd)

    def append(self, pieces: Collection[int]) -> None:
        """These pieces, whose bytes were synced, are on disk."""
        _write_all(self._fd, b"".join(self._record(piece) for piece in pieces))
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Close it."""
        os.close(self._fd)

    def _header(self, identity: bytes) -> bytes:
        manifest = self._manifest
        head = _HEADER.pack(_MAGIC, identity, manifest.size_bytes, manifest.piece_bytes)
        return head + _CRC.pack(zlib.crc32(head))

    def _record(self, piece: int) -> bytes:
        index = _RECORD.pack(piece)
        return index + _CRC.pack(zlib.crc32(self._identity + index))


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


def data_spans(fd: int, start: int, stop: int) -> Iterator[Span]:
    """The parts of a file that are not holes, in order; all of it where that cannot be known."""
    at = start
    while at < stop:
        try:
            first = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno != errno.ENXIO:  # the file system cannot tell
                yield Span(start=at, stop=stop)
            return
        if first >= stop:
            return
        at = min(stop, os.lseek(fd, first, os.SEEK_HOLE))
        yield Span(start=first, stop=at)


def describe(fd: int, piece_bytes: int) -> Manifest:
    """The manifest of an open file as it is; holes cost nothing.

    Raises:
        ManifestError: the file is larger than an image may be.
        PieceStoreError: it cannot be read, or became shorter meanwhile.
    """
    hasher = manifests.Hasher(piece_bytes)
    buffer = memoryview(bytearray(_READ_BYTES))
    size = os.fstat(fd).st_size
    at = 0
    for span in data_spans(fd, 0, size):
        hasher.update_zeros(span.start - at)
        at = span.start
        while at < span.stop:
            count = _read(fd, buffer[: span.stop - at], at)
            if not count:
                raise PieceStoreError("the file became shorter while it was read")
            hasher.update(buffer[:count])
            at += count
    hasher.update_zeros(size - at)
    return hasher.finish()


def matching_pieces(
    fd: int, manifest: Manifest, *, after_read: Callable[[int], None] | None = None
) -> int:
    """The pieces of the manifest that an open file holds, found by reading all that is no hole.

    Args:
        fd: the file.
        manifest: what it should be.
        after_read: called after each read, in this thread, with its count of bytes: it may sleep.

    Raises:
        PieceStoreError: the file cannot be read.
    """
    size = min(os.fstat(fd).st_size, manifest.size_bytes)
    has_data = bytearray(manifest.count)
    for data in data_spans(fd, 0, size):
        touched = manifest.pieces_of(data)
        has_data[touched.start : touched.stop] = b"\1" * len(touched)
    buffer = memoryview(bytearray(_READ_BYTES))
    found = bytearray(-(-manifest.count // 8))
    for piece, span in spans(manifest):
        if not has_data[piece]:
            matches = span.stop <= size and bool(manifest.zero_pieces >> piece & 1)
        else:
            matches = _digest(fd, span, buffer, after_read) == manifest.digest(piece)
        found[piece // 8] |= matches << piece % 8
    return int.from_bytes(found, "little")


def damaged(
    fd: int, manifest: Manifest, *, after_read: Callable[[int], None] | None = None
) -> int:
    """The pieces of a file that are not what the manifest says; none means: exactly the image.

    What is lacking is damaged, and so is the last piece when bytes follow it. Arguments and errors
    are those of `matching_pieces`.
    """
    wrong = manifest.all_pieces & ~matching_pieces(fd, manifest, after_read=after_read)
    if manifest.count and os.fstat(fd).st_size > manifest.size_bytes:
        wrong |= 1 << (manifest.count - 1)
    return wrong


def is_exactly(fd: int, manifest: Manifest) -> bool:
    """Whether an open file is the image, to the last byte.

    Raises:
        PieceStoreError: it cannot be read.
    """
    if os.fstat(fd).st_size != manifest.size_bytes:
        return False
    return matching_pieces(fd, manifest) == manifest.all_pieces


def _digest(
    fd: int, span: Span, buffer: memoryview, after_read: Callable[[int], None] | None
) -> bytes:
    digest, at = hashlib.sha256(), span.start
    while at < span.stop and (count := _read(fd, buffer[: span.stop - at], at)):
        digest.update(buffer[:count])
        at += count
        if after_read is not None:
            after_read(count)
    return digest.digest()


def _read(fd: int, buffer: memoryview, offset: int) -> int:
    try:
        return os.preadv(fd, [buffer], offset)
    except OSError as exc:
        raise PieceStoreError(f"the file cannot be read: {exc.strerror}") from exc


def _open_locked(path: Path, flags: int, stack: contextlib.ExitStack) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, FILE_MODE)
    stack.callback(os.close, fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        raise BusyError(f"{path} is in use by another process") from exc
    return fd


def _intact(fd: int, manifest: PieceList, pieces: int) -> int | None:
    """Those of the pieces that are told of by now; None if one of them is not what it should be."""
    buffer = memoryview(bytearray(_READ_BYTES))
    told = pieces & manifest.known_pieces
    for piece in swarm.members(told):
        if _digest(fd, manifest.span(piece), buffer, None) != manifest.digest(piece):
            return None
    return told


def _require_room(fd: int, manifest: PieceList, reserve_bytes: int) -> None:
    lacking = max(0, manifest.data_bytes - os.fstat(fd).st_blocks * 512)
    volume = os.fstatvfs(fd)
    free = volume.f_bavail * volume.f_frsize
    if lacking and free < lacking + reserve_bytes:
        raise NoSpaceError(
            f"{lacking} bytes are needed and {reserve_bytes} kept free, {free} are there"
        )


def _runs(pieces: int) -> Iterator[range]:
    """The set as ranges without gaps, ascending."""
    for run in re.finditer("1+", f"{pieces:b}"[::-1]):
        yield range(*run.span())


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
