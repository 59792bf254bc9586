"""A file in order, its holes told and not read: what is sparse stays cheap."""

import errno
import os
from typing import Final

from hostler_precache.sources.source import Hole

CHUNK_BYTES: Final = 1024 * 1024


def read(fd: int, offset: int, stop: int) -> bytes | Hole | None:
    """What is at the offset, up to `stop` at most: some bytes, or the hole; None at the end. Blocks.

    Raises:
        OSError: it cannot be read.
    """
    if offset >= stop:
        return None
    try:
        data = os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as exc:
        if exc.errno != errno.ENXIO:
            raise
        # a hole to the end, unless the file was cut
        if os.fstat(fd).st_size < stop:
            return None
        data = stop
    if data > offset:
        return Hole(length_bytes=min(data, stop) - offset)
    end = min(offset + CHUNK_BYTES, stop, os.lseek(fd, offset, os.SEEK_HOLE))
    return os.pread(fd, end - offset, offset) or None
