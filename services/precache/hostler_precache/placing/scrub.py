"""Placed files are read again now and then, and pieces that changed on disk are fetched anew.

Paced, since guests run from the same disk: so many bytes a second, on average from the start of a
file. What is in the page cache is checked as it is there, which is what guests see; what has to be
read from disk for it is marked as not needed again (POSIX_FADV_NOREUSE).
"""

import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hostler_precache.placing.shelf_records import Record
from hostler_precache.transfer import pieces
from hostler_precache.transfer.manifest import Manifest

LONGEST_SLEEP_SECONDS: Final = 1.0

Repair = Callable[[Record, Path, Manifest, int], Awaitable[int]]
"""Fetches the pieces (a set as int) of a placed file anew, in place; returns those still damaged."""


class Stopped(Exception):
    """The scrub was asked to end before it had read all."""


@dataclass(slots=True)
class Pace:
    """Keeps a reader at a number of bytes a second, from the moment it is made."""

    bytes_per_second: float
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    is_stopped: Callable[[], bool] = lambda: False
    read_bytes: int = 0
    started_at: float | None = None

    def after_read(self, count: int) -> None:
        """So many more bytes were read; returns when the next may be.

        Raises:
            Stopped: no more is to be read.
        """
        now = self.clock()
        if self.started_at is None:
            self.started_at = now
        self.read_bytes += count
        due = self.started_at + self.read_bytes / self.bytes_per_second
        while (ahead := due - now) > 0 and not self.is_stopped():
            self.sleep(min(ahead, LONGEST_SLEEP_SECONDS))
            now = self.clock()
        if self.is_stopped():
            raise Stopped


def damaged(fd: int, listed: Manifest, pace: Pace) -> int:
    """The pieces of an open file that are not what they should be, as a set; blocks for as long.

    Raises:
        Stopped: the pace was told to end.
        OSError: it cannot be read.
    """
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_NOREUSE)
    return pieces.damaged(fd, listed, after_read=pace.after_read)
