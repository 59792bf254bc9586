"""Files that we make in somebody else's directory belong to that somebody.

Nova's and Ironic's files belong to the user that they run as. A lock file, a directory or an image
that belongs to another makes their next step fail: Ironic may not link it (fs.protected_hardlinks),
Nova may not lock it. The agent therefore runs as that user, or as root and gives away what it makes.
"""

import os
from pathlib import Path

from hostler_precache.transfer.pieces import PieceStoreError


class NotPermittedError(PieceStoreError):
    """The place belongs to another user than the agent's, or may not be written to."""

    reason = "target.not_permitted"


def check_permitted(directory: Path) -> None:
    """Return if files can be made in the directory that its owner can use.

    Raises:
        NotPermittedError: with what to do about it.
    """
    existing = _nearest(directory)
    owner, own = existing.stat().st_uid, os.geteuid()
    if own not in (0, owner):
        raise NotPermittedError(
            f"{existing} belongs to user {owner} and the agent runs as {own}: run it as that user"
        )
    if os.statvfs(existing).f_flag & os.ST_RDONLY:
        raise NotPermittedError(f"{existing} is on a file system that is mounted read-only")
    if not os.access(existing, os.W_OK | os.X_OK, effective_ids=True):
        raise NotPermittedError(f"{existing} may not be written to")


def give_to(fd: int, directory: Path) -> None:
    """The open file belongs to who owns the directory.

    Raises:
        NotPermittedError: we may not give it away.
        OSError: anything else.
    """
    wanted, own = directory.stat(), os.fstat(fd)
    if own.st_uid == wanted.st_uid:
        return
    try:
        os.fchown(fd, wanted.st_uid, wanted.st_gid)
    except PermissionError as exc:
        raise NotPermittedError(
            f"a file of {directory} belongs to user {own.st_uid}, not {wanted.st_uid}, who owns"
            " the directory: run the agent as that user"
        ) from exc


def make_directory(directory: Path) -> None:
    """The directory is there, and its missing part belongs to who owns the part that was there.

    Raises:
        NotPermittedError: we may not give it away.
        OSError: it cannot be made.
    """
    if directory.is_dir():
        return
    make_directory(directory.parent)
    directory.mkdir(mode=0o755, exist_ok=True)
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        give_to(fd, directory.parent)
    finally:
        os.close(fd)


def _nearest(path: Path) -> Path:
    return path if path.exists() else _nearest(path.parent)
