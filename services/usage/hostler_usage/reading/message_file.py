"""A file of messages as an operator keeps it: plain or gzip, or standard input."""

import gzip
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """The file's bytes, decompressed where it is gzip, and how far into the file they are; `-` is standard input.

    Raises:
        OSError: it cannot be opened. Reading what is broken raises this, `EOFError` or `zlib.error`.
    """
    if str(path) == "-":
        yield sys.stdin.buffer, lambda: 0
        return
    with path.open("rb") as file:
        is_gzip = file.peek(2)[:2] == b"\x1f\x8b"
        if not is_gzip:
            yield file, file.tell
            return
        with gzip.GzipFile(fileobj=file) as plain:
            yield plain, file.tell  # type: ignore[misc]  # it is read like any binary file
