"""The images on this host's disk that precache looks after, whoever owns the place they are in.

One promise a step: nothing half-written is ever seen under a final name; a file that somebody else
put there stays; what is wanted is kept from its owner's cleaner; what is in use is never removed;
and a process killed anywhere in between is put right by the next run, from what is on disk.

How a file is placed: its record and list of pieces are written first, then, under the owner's
lock, one link gives it its name, then a second link is kept in `.precache/`. A record without a
file is a placing that did not happen, or a removal that did; either way it is forgotten.

All calls block; the agent makes them in threads. One agent at a time looks after a directory: the
others (on shared storage) find what it placed, and take over when it is gone.
"""

import contextlib
import dataclasses
import fcntl
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hostler_common import logs
from hostler_common.settings import SettingsError
from hostler_precache.placing import ownership, placement, placers
from hostler_precache.placing.eviction import Quota
from hostler_precache.placing.ownership import NotPermittedError
from hostler_precache.placing.placement import (
    Outcome,
    Placer,
    UnsupportedError,
    UsersUnknownError,
    Wanted,
)
from hostler_precache.placing.shelf_files import ShelfFiles, disk_bytes
from hostler_precache.placing.shelf_records import Record
from hostler_precache.placing.shelf_room import ShelfRoom
from hostler_precache.settings import AgentSettings
from hostler_precache.transfer import pieces
from hostler_precache.transfer.manifest import ImageId, Manifest, PieceList
from hostler_precache.transfer.pieces import (
    FILE_MODE,
    WORK_DIRECTORY,
    BusyError,
    PieceStore,
    PieceStoreError,
    TargetExistsError,
)

log = logs.get(__name__)

PATIENCE_SECONDS: Final = 20.0
LONGEST_PIN_SECONDS: Final = 7200.0
SHORTEST_PIN_SECONDS: Final = 1.0  # whatever age its owner was configured with
_PINS_PER_AGE: Final = 3  # one may fail, and the file is still younger than its cleaner's limit
_GUARD: Final = "agent.lock"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tended:
    """What a round found and did."""

    lost: tuple[Wanted, ...] = ()
    """Wanted, was here, and is not any more, or is another file: to be found or fetched anew."""
    removed: tuple[str, ...] = ()
    """Removed because nobody wants them."""
    evicted: tuple[str, ...] = ()
    """Removed because room was needed."""
    failed: tuple[str, ...] = ()
    """Files that could not be looked after this time, each with the reason."""
    held_bytes: int = 0
    """What is left of ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shelved:
    """One file here."""

    record: Record
    path: Path
    disk_bytes: int
    is_kept: bool
    """Whether a hard link is kept of it."""


class Shelf:
    """The files of one place. Thread-safe."""

    def __init__(
        self,
        placer: Placer,
        *,
        quota: Quota | None = None,
        reserve_bytes: int = 0,
        keep_link: bool = True,
        unwanted_seconds: float = 86400.0,
        patience_seconds: float = PATIENCE_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """A shelf of what is in the placer's directory.

        Args:
            placer: whose place it is.
            quota: how much of what we place there may be.
            reserve_bytes: what must stay free on its file system.
            keep_link: whether a hard link of each wanted file is kept in `.precache/`.
            unwanted_seconds: how long a file of ours stays that nobody wants.
            patience_seconds: how long to wait for the place's owner, who may be fetching.
            clock: seconds since the epoch, comparable with times in inodes.
        """
        self._placer = placer
        self._unwanted_seconds = unwanted_seconds
        self._patience_seconds = patience_seconds
        self._clock = clock
        self._work = placer.directory / WORK_DIRECTORY
        self._files = ShelfFiles(placer, keep_link=keep_link, clock=clock)
        self._room = ShelfRoom(
            self._files, work=self._work, quota=quota, reserve_bytes=reserve_bytes
        )
        self._guard: int | None = None
        self._gone: dict[str, Record] = {}  # with all that was known of the place
        self._mutex = threading.RLock()

    @property
    def directory(self) -> Path:
        """Where `pieces.PieceStore` works, and the final files are."""
        return self._placer.directory

    @property
    def pin_seconds(self) -> float:
        """How often wanted files have to be touched."""
        age = self._placer.cleaner_age_seconds
        if age is None:
            return LONGEST_PIN_SECONDS
        return max(SHORTEST_PIN_SECONDS, min(LONGEST_PIN_SECONDS, age / _PINS_PER_AGE))

    def close(self) -> None:
        """Another agent may look after the place."""
        with self._mutex:
            if self._guard is not None:
                os.close(self._guard)
                self._guard = None

    # --- one image: is it here, is there room, into its place

    def target(self, wanted: Wanted) -> Path:
        """Its final path.

        Raises:
            UnsupportedError: it cannot be placed on this host; the text says why.
        """
        return self._placer.target(wanted)

    def find(self, wanted: Wanted, listed: Manifest, *, replace: bool = False) -> int | None:
        """A descriptor of the image under its final name, which is pinned from now on.

        A file that we know is believed by its inode, size and root: scrubs read it. Any other is
        read in full. One that its owner removed while we kept a link of it is back in its place.

        Returns:
            None where there is none, and it may be fetched.

        Raises:
            UnsupportedError: it cannot be placed on this host.
            TargetExistsError: another file has the name, and stays.
            PieceStoreError: the place cannot be read.
        """
        path = self.target(wanted)
        root = listed.root.hex()
        with self._failures_named(path):
            with self._mutex:
                # what we may not look after can be used all the same
                with contextlib.suppress(OSError, PieceStoreError):
                    self._hold()
                self._files.restore(path, root)
            fd = _open(path)
            if fd is None:
                return None
            with contextlib.ExitStack() as stack:
                stack.callback(os.close, fd)
                known = self._files.known(path.name, os.fstat(fd))
                if (
                    known is None
                    or known.root != root
                    or os.fstat(fd).st_size != listed.size_bytes
                ) and not pieces.is_exactly(fd, listed):
                    self._give_way(path, wanted, root, known, replace=replace)
                    return None
                with self._mutex:
                    self._adopt(path, wanted, listed, fd, is_ours=bool(known and known.is_ours))
                stack.pop_all()
                return fd

    def is_ours(self, wanted: Wanted) -> bool:
        """Whether we placed what is under its final name."""
        record = self._files.records.get(self.target(wanted).name)
        return record is not None and record.is_ours

    def make_room(self, wanted: Wanted, listed: PieceList) -> None:
        """There is room for the image, for which unwanted files may have gone.

        Raises:
            NotPermittedError: we may not write there, or not as its owner needs it.
            BusyError: another agent looks after the place.
            QuotaError: the quota has no room; nothing was evicted.
            NoSpaceError: the file system has none; nothing was evicted.
        """
        with self._failures_named(self.directory), self._mutex:
            ownership.check_permitted(self.directory)
            self._hold()
            part = self._work / f"{wanted.blob_id}.part"
            incoming = max(0, listed.data_bytes - disk_bytes(part))
            self._room.make(incoming)

    def place(
        self, wanted: Wanted, store: PieceStore, listed: Manifest, *, replace: bool = False
    ) -> Outcome:
        """The complete file of a store is under its final name, pinned and remembered.

        Where the image itself appeared there meanwhile, that one stays and the store's is gone.

        Raises:
            UnsupportedError: its bytes are not of the form that this place needs; they are gone.
            TargetExistsError: another file has the name, and stays; or it is in use.
            PieceStoreError: the owner of the place is at that name now, or the disk refused.
        """
        path = self.target(wanted)
        self._check_form(store)
        with self._failures_named(path):
            with self._mutex:
                self._hold()
                ownership.give_to(store.fileno(), self.directory)
                with self._placer.exclusively(path, patience_seconds=self._patience_seconds):
                    if self._is_free(path, store, replace=replace):
                        # its mtime is that of its placing, to whoever reckons its age
                        os.utime(store.fileno())
                        self._files.remember(path, wanted, listed, store.fileno(), is_ours=True)
                        store.place(path, replace=replace, mode=FILE_MODE)
                        self._files.keep(path)
                        return Outcome.PLACED
            found = self.find(wanted, listed)  # reads all of it: not under the owner's lock
            if found is None:
                raise TargetExistsError(f"{path} was there, and went: try again")
            os.close(found)
            store.discard()
            return Outcome.EXISTING

    # --- all images: pins, what nobody wants, what is too much

    def tend(self, wanted: Collection[Wanted], deleted: Collection[ImageId] = ()) -> Tended:
        """Wanted files are pinned; others are let go, or removed where their time has come.

        Args:
            wanted: all that should be here.
            deleted: images that their source has no more: their files go as soon as none is used.

        Raises:
            PieceStoreError: the place cannot be used.
        """
        with self._failures_named(self.directory), self._mutex:
            if self.directory.is_dir():
                self._hold()
            else:
                self._let_place_go()
            by_name: dict[str, list[Wanted]] = {}
            for one in wanted:
                with contextlib.suppress(UnsupportedError):
                    by_name.setdefault(self.target(one).name, []).append(one)
            lost = {
                name for name, record in self._gone.items() if not self._is_known_again(record)
            }
            self._gone.clear()
            doomed: list[Record] = []
            failed: list[str] = []
            for record in list(self._files.records.values()):
                try:
                    if record.name in by_name:
                        if not self._pin(record):
                            lost.add(record.name)
                    elif self._let_go(record, is_deleted=record.image_id in deleted):
                        doomed.append(self._files.records[record.name])
                except (OSError, PieceStoreError) as exc:  # the others are tended
                    failed.append(f"{self.directory / record.name}: {exc}")
            used = self._files.in_use(doomed)
            removed = [
                record.name
                for record in doomed
                if record.name not in used and self._files.remove(record)
            ]
            evicted = self._room.keep_below_the_mark()
            return Tended(
                lost=tuple(one for name in sorted(lost) for one in by_name.get(name, ())),
                removed=tuple(removed),
                evicted=tuple(evicted),
                failed=tuple(failed),
                held_bytes=self._room.held_bytes(),
            )

    def holdings(self) -> tuple[Shelved, ...]:
        """What is here and known, by name."""
        with self._mutex:
            return tuple(
                Shelved(
                    record=record,
                    path=self.directory / name,
                    disk_bytes=disk_bytes(self.directory / name),
                    is_kept=self._files.is_kept(record),
                )
                for name, record in sorted(self._files.records.items())
            )

    # --- scrubs

    def next_scrub(
        self, *, every_seconds: float, retry_seconds: float, besides: Collection[str] = ()
    ) -> Record | None:
        """The wanted file that is due to be checked, and was so the longest ago; None for none.

        Args:
            every_seconds: how often each is.
            retry_seconds: how often one is that has damage.
            besides: names of files that are not.
        """
        with self._mutex:
            now = self._clock()
            due = [
                record
                for record in self._files.records.values()
                if record.unwanted_since is None
                and record.name not in besides
                # after its time, or by a clock that was put back since
                and not 0
                <= now - record.scrubbed_at
                < (retry_seconds if record.damaged_pieces else every_seconds)
            ]
            return min(due, key=lambda record: record.scrubbed_at, default=None)

    def manifest(self, record: Record) -> Manifest | None:
        """The pieces of the file; None where nobody knows them any more.

        Raises:
            PieceStoreError: they cannot be read.
        """
        with self._failures_named(self.directory):
            return self._files.manifest(record)

    def open_for_scrub(self, record: Record) -> tuple[int, Manifest] | None:
        """A writable descriptor of the file and its pieces; None if it is not that file any more.

        Raises:
            PieceStoreError: it cannot be opened.
        """
        path = self.directory / record.name
        with self._failures_named(path):
            listed = self._files.manifest(record)
            try:
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                return None
            if listed is None or os.fstat(fd).st_ino != record.inode:
                os.close(fd)
                return None
            return fd, listed

    def scrubbed(self, record: Record, *, damaged_pieces: int) -> None:
        """The outcome of a scrub is remembered; `damaged_pieces` are those still damaged.

        Raises:
            PieceStoreError: it is not.
        """
        with self._failures_named(self.directory), self._mutex:
            current = self._files.records.get(record.name)
            if current is not None and current.inode == record.inode:
                self._files.save(
                    dataclasses.replace(
                        current, scrubbed_at=self._clock(), damaged_pieces=damaged_pieces
                    )
                )

    # --- the place

    def _hold(self) -> None:
        """This agent looks after the place, and has read what is known of it.

        Whoever wipes the place, or puts another file system there, has taken our lock with it.
        """
        if self._guard is not None:
            if _has_name(self._guard, self._work / _GUARD):
                return
            self._let_place_go()
        ownership.make_directory(self._work)
        fd = os.open(self._work / _GUARD, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._files.load()
        except BlockingIOError as exc:
            os.close(fd)
            raise BusyError(f"another agent looks after {self.directory}") from exc
        except BaseException:
            os.close(fd)
            raise
        self._guard = fd

    def _let_place_go(self) -> None:
        """Nothing is known any more of what was here, but that it was."""
        if self._guard is not None:
            log.warning("place_is_gone", path=str(self.directory))
            os.close(self._guard)
            self._guard = None
        self._gone |= self._files.records
        self._files.records = {}

    def _is_known_again(self, record: Record) -> bool:
        """Whether there is a record of the same image: nothing but our lock went, or it was placed since."""
        now = self._files.records.get(record.name)
        return now is not None and now.root == record.root

    @contextlib.contextmanager
    def _failures_named(self, path: Path) -> Iterator[None]:
        try:
            yield
        except PermissionError as exc:
            raise NotPermittedError(f"{exc.filename or path}: {exc.strerror}") from exc
        except OSError as exc:
            raise PieceStoreError(f"{exc.filename or path}: {exc.strerror}") from exc

    def _check_form(self, store: PieceStore) -> None:
        if not self._placer.is_raw_only:
            return
        found = placement.foreign_format(os.pread(store.fileno(), placement.HEAD_BYTES, 0))
        if found is not None:
            store.discard()
            raise UnsupportedError(
                f"image.not_raw: its first bytes are those of {found}, and files here are raw"
            )

    def _is_free(self, path: Path, store: PieceStore, *, replace: bool) -> bool:
        """Whether the store's file may take the name: it has it already, or nobody has."""
        try:
            status = path.stat()
        except FileNotFoundError:
            return True
        if os.path.samestat(status, os.fstat(store.fileno())):
            return True
        if not replace:
            return False
        try:
            used = self._placer.in_use([path], own_links=self._files.own_links(path))
        except UsersUnknownError as exc:
            raise TargetExistsError(f"{path} may be in use: {exc}") from exc
        if used:
            raise TargetExistsError(f"{path} is another file, and in use")
        return True

    def _give_way(
        self, path: Path, wanted: Wanted, root: str, known: Record | None, *, replace: bool
    ) -> None:
        """Return if the image may be fetched although another file has its name."""
        if known is not None and known.is_ours:
            # an earlier image of that id, or ours with damage: but not one that is wanted too
            is_stale = known.unwanted_since is not None or known.blob_id == wanted.blob_id
            with self._mutex:
                if (is_stale or known.root == root) and self._files.remove(known):
                    return
        if not replace:
            raise TargetExistsError(f"{path} is another file")

    def _adopt(
        self, path: Path, wanted: Wanted, listed: Manifest, fd: int, *, is_ours: bool
    ) -> None:
        """A file that was found is looked after, if that is for us to do."""
        if self._guard is None:
            return
        known = self._files.known(path.name, os.fstat(fd))
        if known is not None and known.root == listed.root.hex():
            self._files.save(
                dataclasses.replace(known, blob_id=wanted.blob_id, unwanted_since=None)
            )
        else:
            self._files.remember(path, wanted, listed, fd, is_ours=is_ours)
        self._files.keep(path)
        self._files.touch(path)

    def _pin(self, record: Record) -> bool:
        """Whether the wanted file is still there, and safe from its owner's cleaner."""
        path = self.directory / record.name
        self._files.restore(path, record.root)
        try:
            status = path.stat()
        except FileNotFoundError:
            self._files.forget(record.name)
            return False
        if status.st_ino != record.inode:  # its owner fetched it anew: to be checked, and adopted
            self._files.forget(record.name)
            return False
        if record.unwanted_since is not None:
            self._files.save(dataclasses.replace(record, unwanted_since=None))
        self._files.keep(path)
        if self._clock() - status.st_mtime >= self.pin_seconds:
            self._files.touch(path)
        return True

    def _let_go(self, record: Record, *, is_deleted: bool) -> bool:
        """Stop keeping an unwanted file; returns whether its time here is over."""
        self._files.drop_link(record)
        if self._files.status(record) is None or not record.is_ours:
            self._files.forget(record.name)
            return False
        since, now = record.unwanted_since, self._clock()
        if since is None:
            log.info("image_unpinned", path=str(self.directory / record.name))
        if since is None or since > now:  # the clock was put back
            since = now
            self._files.save(dataclasses.replace(record, unwanted_since=since))
        return is_deleted or now - since >= self._unwanted_seconds


def open_shelf(settings: AgentSettings) -> Shelf:
    """The shelf that the settings describe.

    Raises:
        SettingsError: they describe none.
    """
    quota = None
    if settings.cache_bytes is not None:
        if settings.cache_low_percent > settings.cache_high_percent:
            raise SettingsError(
                "HOSTLER_PRECACHE_CACHE_LOW_PERCENT: is more than"
                " HOSTLER_PRECACHE_CACHE_HIGH_PERCENT"
            )
        quota = Quota(
            limit_bytes=settings.cache_bytes,
            high_bytes=int(settings.cache_bytes * settings.cache_high_percent / 100),
            low_bytes=int(settings.cache_bytes * settings.cache_low_percent / 100),
        )
    return Shelf(
        placers.build(settings),
        quota=quota,
        reserve_bytes=settings.reserve_bytes,
        keep_link=settings.keep_link,
        unwanted_seconds=settings.unwanted_seconds,
    )


def _has_name(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _open(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
