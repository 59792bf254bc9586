"""Files in a seed's directory that no blob is behind: of fetches that a crash cut off, and of lost blobs."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Final

from hostler_common import logs
from hostler_precache.transfer.manifest import BlobId

log = logs.get(__name__)

# a blob's file, and what a fetch makes beside it on its way there
_NAME: Final = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})(\.part|\.raw)?")


def remove(path: Path) -> None:
    """The file is gone; on a disk that refuses, as one that became read-only, it stays, and that is logged.

    It is never the worst of what goes wrong there, and `discard` has it the next time.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as exc:
        log.warning("file_stays", path=str(path), reason=exc.strerror)


def discard(directory: Path, keep: Collection[BlobId]) -> list[str]:
    """Files of other blobs than those are gone, and nothing else is; returns their names. Blocks.

    Raises:
        OSError: the directory cannot be read, or a file of it cannot be removed.
    """
    discarded = []
    if not directory.is_dir():
        return []
    for path in sorted(directory.iterdir()):
        name = _NAME.fullmatch(path.name)
        if name is None or BlobId(name[1]) in keep or path.is_symlink() or not path.is_file():
            continue
        path.unlink(missing_ok=True)
        discarded.append(path.name)
    return discarded
