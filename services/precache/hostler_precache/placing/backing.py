"""Which file a disk image stands on, read from its own header.

A qcow2 overlay names its backing file at a place that its header tells (docs/interop/qcow2.txt of
QEMU: magic, version, offset and length of the name, big-endian). That is all that is read, so it
takes no lock, runs no program, and does not mind that a guest is running on the disk. What a guest
can write is believed only so far: the first bytes of a raw disk are its own, and at worst claim
that a base is in use.
"""

import os
import struct
from collections.abc import Collection
from pathlib import Path
from typing import Final

from hostler_precache.placing.placement import UsersUnknownError

_HEADER: Final = struct.Struct(">4sIQI")
_MAGIC: Final = b"QFI\xfb"
_LONGEST_NAME: Final = 1023
_DEEPEST: Final = 3  # instances/<uuid>/disk, instances/snapshots/<folder>/<uuid>.delta


def backing_name(path: Path) -> str | None:
    """What the disk names as its backing file: a path, or a `json:` of QEMU's; None for no such.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        head = file.read(_HEADER.size) or b""
        if len(head) < _HEADER.size:
            return None
        magic, _version, offset, length = _HEADER.unpack(head)
        if magic != _MAGIC or not offset or not 0 < length <= _LONGEST_NAME:
            return None
        if offset > os.fstat(file.fileno()).st_size:
            return None
        file.seek(offset)
        return (file.read(length) or b"").decode(errors="surrogateescape")


def used_by_disks(names: Collection[str], under: Path, *, outside: Collection[Path]) -> set[str]:
    """Those of the base files' names that a disk under a directory stands on.

    Every file counts, not only those called `disk`: snapshots, ephemeral and swap disks, and the
    folders of instances that are being resized stand on bases too.

    Args:
        names: names of base files, without their directory; long enough not to occur by chance.
        under: Nova's `instances_path`.
        outside: directories in it that hold no disks.

    Raises:
        UsersUnknownError: something could not be read.
    """
    used: set[str] = set()

    def refuse(exc: OSError) -> None:
        if not isinstance(exc, FileNotFoundError):
            raise UsersUnknownError(f"{exc.filename}: {exc.strerror}") from exc

    skipped = {str(path) for path in outside}
    for folder, folders, files in os.walk(under, onerror=refuse):
        depth = len(Path(folder).relative_to(under).parts)
        folders[:] = [
            name
            for name in folders
            if depth < _DEEPEST - 1 and str(Path(folder) / name) not in skipped
        ]
        for file in files if depth else ():
            path = Path(folder) / file
            try:
                name = backing_name(path) if path.is_file() else None
            except OSError as exc:
                refuse(exc)  # a disk that went away meanwhile uses nothing
                continue
            if name is not None:
                used |= {base for base in names if base in name}
    return used
