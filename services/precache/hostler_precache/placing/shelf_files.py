"""One file of a shelf at a time: its record, the link kept of it, its times, and who uses it.

Three facts about a file are kept apart by its inode. What bears the name may not be what we placed
(its owner removed ours and fetched its own); what we linked may not bear the name any more; and an
mtime that is not the one we gave it is somebody else's touch, which says that the file is in use.

The caller holds the shelf's mutex.
"""

import dataclasses
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final

from hostler_common import logs
from hostler_precache.placing.placement import Placer, UsersUnknownError, Wanted
from hostler_precache.placing.shelf_records import Record, RecordStore
from hostler_precache.transfer.manifest import Manifest
from hostler_precache.transfer.pieces import WORK_DIRECTORY, PieceStoreError

log = logs.get(__name__)

_BLOCK_BYTES: Final = 512


class ShelfFiles:
    """The files of one place, of which there are records."""

    def __init__(self, placer: Placer, *, keep_link: bool, clock: Callable[[], float]) -> None:
        self._placer = placer
        self._keeps_link = keep_link or placer.needs_link
        self._clock = clock
        self._store = RecordStore(placer.directory / WORK_DIRECTORY)
        self.records: dict[str, Record] = {}

    def load(self) -> None:
        """What is on disk is known.

        Raises:
            OSError: it cannot be read.
        """
        self.records = self._store.load()

    def path(self, record: Record) -> Path:
        """Its final path."""
        return self._placer.directory / record.name

    def manifest(self, record: Record) -> Manifest | None:
        """Its list of pieces; None where that cannot be believed any more."""
        return self._store.manifest(record)

    def is_kept(self, record: Record) -> bool:
        """Whether a hard link is kept of it."""
        return self._store.kept(record.name).exists()

    def drop_link(self, record: Record) -> None:
        """No hard link is kept of it."""
        self._store.kept(record.name).unlink(missing_ok=True)

    def known(self, name: str, status: os.stat_result) -> Record | None:
        """What is known of the file of that name, if it is the one with this status."""
        record = self.records.get(name)
        return record if record is not None and record.inode == status.st_ino else None

    def remember(
        self, path: Path, wanted: Wanted, listed: Manifest, fd: int, *, is_ours: bool
    ) -> None:
        """There is a record of an open file, and its list of pieces; no link of another is kept.

        Raises:
            OSError: there is not.
        """
        status, now = os.fstat(fd), self._clock()
        kept = self._store.kept(path.name)
        if kept.exists() and not os.path.samestat(kept.stat(), status):
            kept.unlink()
        self._store.save_manifest(path.name, listed)
        self.save(
            Record(
                name=path.name,
                image_id=wanted.image_id,
                blob_id=wanted.blob_id,
                root=listed.root.hex(),
                size_bytes=listed.size_bytes,
                inode=status.st_ino,
                is_ours=is_ours,
                placed_at=now,
                pinned_mtime_ns=status.st_mtime_ns,
                scrubbed_at=now,
            )
        )

    def save(self, record: Record) -> None:
        """The record is this one.

        Raises:
            OSError: it is not.
        """
        if self.records.get(record.name) != record:
            self._store.save(record)
            self.records[record.name] = record

    def forget(self, name: str) -> None:
        """Nothing is known of the name, and no link kept.

        Raises:
            OSError: something still is.
        """
        self._store.forget(name)
        self.records.pop(name, None)

    def keep(self, path: Path) -> None:
        """A link of the file is kept, if links are.

        Raises:
            OSError: there is none, and the place needs it.
        """
        kept = self._store.kept(path.name)
        if not self._keeps_link or kept.exists():
            return
        try:
            kept.hardlink_to(path)
        except OSError as exc:
            if self._placer.needs_link:
                raise
            log.warning("link_refused", path=str(path), reason=exc.strerror)

    def restore(self, path: Path, root: str) -> None:
        """What its owner removed is back under its name, if we kept a link of it.

        Raises:
            pieces.PieceStoreError: its owner is at that name now.
        """
        record, kept = self.records.get(path.name), self._store.kept(path.name)
        if record is None or record.root != root or path.exists() or not kept.exists():
            return
        with self._placer.exclusively(path, patience_seconds=0.0):
            try:
                path.hardlink_to(kept)
            except FileExistsError:
                return
        log.info("image_restored", path=str(path))

    def touch(self, path: Path) -> None:
        """The file is as young as can be, and we know that it was us."""
        record = self.records[path.name]
        used_at = _used_at(record, path.stat())
        os.utime(path)
        self.save(
            dataclasses.replace(record, pinned_mtime_ns=path.stat().st_mtime_ns, used_at=used_at)
        )

    def status(self, record: Record) -> os.stat_result | None:
        """Of the file, while it is the one that the record means."""
        try:
            status = self.path(record).stat()
        except FileNotFoundError:
            return None
        return status if status.st_ino == record.inode else None

    def in_use(self, records: Collection[Record]) -> set[str]:
        """The names of those that must not go: needed by something, or lately by somebody."""
        used = set()
        by_links: dict[int, list[Path]] = {}
        for record in records:
            status = self.status(record)
            if status is None:
                continue
            used_at = _used_at(record, status)
            if used_at is not None and self._clock() - used_at < self._placer.use_seconds:
                used.add(record.name)
            path = self.path(record)
            by_links.setdefault(self.own_links(path), []).append(path)
        try:
            for links, paths in by_links.items():
                used |= {path.name for path in self._placer.in_use(paths, own_links=links)}
        except UsersUnknownError as exc:
            log.warning("users_unknown", reason=str(exc))
            return {record.name for record in records}
        return used

    def own_links(self, path: Path) -> int:
        """How many names the file has from us: its own, and that of the link we keep."""
        kept = self._store.kept(path.name)
        return 2 if kept.exists() and kept.samefile(path) else 1

    def remove(self, record: Record) -> bool:
        """Whether the file is gone: not if it is in use, or its owner is at it."""
        path = self.path(record)
        try:
            with self._placer.exclusively(path, patience_seconds=0.0):
                if self.status(record) is not None:
                    if self.in_use([record]):  # nobody can begin to use it while we are here
                        return False
                    path.unlink()
        except PieceStoreError as exc:
            log.info("removal_postponed", path=str(path), reason=str(exc))
            return False
        self.forget(record.name)
        log.info("image_removed", path=str(path), image_id=record.image_id)
        return True


def _used_at(record: Record, status: os.stat_result) -> float | None:
    """When somebody else touched the file last."""
    if status.st_mtime_ns != record.pinned_mtime_ns:
        return status.st_mtime
    return record.used_at


def disk_bytes(path: Path) -> int:
    """What a file takes on disk; nothing where there is none."""
    try:
        return path.stat().st_blocks * _BLOCK_BYTES
    except FileNotFoundError:
        return 0
