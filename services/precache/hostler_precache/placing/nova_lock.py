"""Nova's lock on a base file, held as Nova holds it.

Nova's image backend and its cache cleaner take `nova-<name>` in `{instances_path}/locks` before
they fetch, use or remove a base (lockutils.synchronized_with_prefix('nova-'), external): a POSIX
record lock on the whole file, by fasteners.InterProcessLock. Whoever creates that file must leave
it to Nova's user, else Nova's next spawn fails on it.

Nova's cleaner deletes the lock's file once it has removed the base, without holding the lock. A
lock on a file without a name excludes nobody, so the name is looked at again after locking.

A process has such a lock, not a thread, and loses it when it closes any descriptor of the file:
within the process one caller at a time uses a lock directory (`shelf` sees to that).
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from hostler_precache.placing.ownership import give_to, make_directory
from hostler_precache.transfer.pieces import PieceStoreError

POLL_SECONDS: Final = 0.05
_FILE_MODE: Final = 0o644


class LockedError(PieceStoreError):
    """Nova is at this very image now."""

    reason = "target.locked"


@contextlib.contextmanager
def held(
    directory: Path,
    name: str,
    *,
    patience_seconds: float,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[None]:
    """Nova's lock on a base file of that name is held inside.

    Args:
        directory: `{instances_path}/locks`; made, for the owner of what it is in, if missing.
        name: the base file's.
        patience_seconds: how long to wait for Nova, which keeps it for as long as it fetches.
        sleep: waits.
        clock: monotonic seconds.

    Raises:
        LockedError: Nova kept it for longer.
        PieceStoreError: it cannot be taken, or not so that Nova can take it after us.
    """
    path = directory / f"nova-{name}"
    deadline = clock() + patience_seconds
    try:
        make_directory(directory)
        while (fd := _try(path)) is None:
            if clock() >= deadline:
                raise LockedError(f"Nova holds {path}: it is fetching or using the image now")
            sleep(POLL_SECONDS)
    except OSError as exc:
        raise PieceStoreError(f"{path}: {exc.strerror}") from exc
    try:
        yield
    finally:
        os.close(fd)


def _try(path: Path) -> int | None:
    """The locked file, if the lock was had at once."""
    while True:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, _FILE_MODE)
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, fd)
            give_to(fd, path.parent)
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):  # either errno, says POSIX
                return None
            try:
                has_name = os.path.samestat(os.fstat(fd), path.stat())
            except FileNotFoundError:
                has_name = False
            if has_name:
                stack.pop_all()
                return fd
