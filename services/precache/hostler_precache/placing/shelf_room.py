"""Room on a shelf: our own quota and the reserve of the file system, kept by what may be given up.

What to give up is `eviction`'s decision. Here it is carried out, file by file, each looked at once
more under its owner's lock; one that turns out to be in use is kept, and the rest thought over.

The caller holds the shelf's mutex.
"""

import os
from collections.abc import Collection
from pathlib import Path

from hostler_precache.placing import eviction
from hostler_precache.placing.eviction import Held, Quota, Refusal
from hostler_precache.placing.shelf_files import ShelfFiles, disk_bytes
from hostler_precache.placing.shelf_records import Record
from hostler_precache.transfer.pieces import NoSpaceError


class QuotaError(NoSpaceError):
    """Our own quota has no room, and nothing can be evicted for it."""

    reason = "storage.quota"


class ShelfRoom:
    """How much the files of one place may take."""

    def __init__(
        self, files: ShelfFiles, *, work: Path, quota: Quota | None, reserve_bytes: int
    ) -> None:
        self._files = files
        self._work = work
        self._quota = quota
        self._reserve_bytes = reserve_bytes

    def keep_below_the_mark(self) -> list[str]:
        """What nobody wants is gone as far as it is above the high mark; returns the names.

        Who uses what is looked up only then: it takes a look at each disk of the host.

        Raises:
            OSError: the place cannot be read.
        """
        if self._quota is None:
            return []
        if self.held_bytes() + self._partial_bytes() <= self._quota.high_bytes:
            return []
        return self.make(0)

    def make(self, incoming_bytes: int) -> list[str]:
        """There is room for so many bytes more; returns the names of what went for it.

        Raises:
            QuotaError: the quota has none, and what could go was not enough.
            NoSpaceError: the file system has none, likewise.
            OSError: the place cannot be read.
        """
        other_bytes = self._partial_bytes()
        stuck: set[str] = set()
        evicted: list[str] = []
        while True:
            volume = os.statvfs(self._work)
            plan = eviction.plan(
                self._held(stuck),
                incoming_bytes=incoming_bytes,
                quota=self._quota,
                free_bytes=volume.f_bavail * volume.f_frsize,
                reserve_bytes=self._reserve_bytes,
                other_bytes=other_bytes,
            )
            if isinstance(plan, Refusal):
                raise self._refused(plan, incoming_bytes)
            if not plan.evict:
                return evicted
            for name in plan.evict:
                if self._files.remove(self._files.records[name]):
                    evicted.append(name)
                else:
                    stuck.add(name)
                    break  # what else would have to go is to be thought over

    def _refused(self, refusal: Refusal, incoming_bytes: int) -> NoSpaceError:
        kind, limit = (
            (QuotaError, f"cache_bytes ({self._quota.limit_bytes if self._quota else 0})")
            if refusal.is_quota
            else (NoSpaceError, f"the disk, of which {self._reserve_bytes} are to stay free")
        )
        return kind(
            f"{incoming_bytes} bytes are needed, {refusal.over_bytes} more than {limit} has room"
            " for, and what is here is wanted or in use"
        )

    def _held(self, stuck: Collection[str]) -> list[Held]:
        ours = {name: record for name, record in self._files.records.items() if record.is_ours}
        unwanted = [one for one in ours.values() if one.unwanted_since is not None]
        used = self._files.in_use(unwanted) | set(stuck)
        return [
            Held(
                name=name,
                size_bytes=disk_bytes(self._files.path(record)),
                last_used=_last_used(record),
                is_wanted=record.unwanted_since is None,
                is_in_use=name in used,
            )
            for name, record in ours.items()
        ]

    def held_bytes(self) -> int:
        """What all that we placed takes on disk.

        Raises:
            OSError: the place cannot be read.
        """
        ours = (record for record in self._files.records.values() if record.is_ours)
        return sum(disk_bytes(self._files.path(record)) for record in ours)

    def _partial_bytes(self) -> int:
        return sum(disk_bytes(path) for path in self._work.glob("*.part"))


def _last_used(record: Record) -> float:
    """When anybody last had to do with the file."""
    moments = (record.placed_at, record.used_at, record.unwanted_since)
    return max(moment for moment in moments if moment is not None)
