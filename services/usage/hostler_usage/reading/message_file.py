"""A file of messages as an operator keeps it: plain or gzip, or standard input."""

import gzip
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """The file's bytes, decompressed where it is gzip, and how far into the file they are; `-` is standard input.

    Raises:
        OSError: it cannot be opened. Reading what is broken raises this, `EOFError` or `zlib.error`.
    """
    with _bytes_of(path) as file:
        is_gzip = file.peek(2)[:2] == b"\x1f\x8b"
        position = file.tell if file.seekable() else lambda: 0
        if not is_gzip:
            yield file, position
            return
        with gzip.GzipFile(fileobj=file) as plain:
            yield plain, position  # type: ignore[misc]  # it is read like any binary file


@contextmanager
def _bytes_of(path: Path) -> Iterator[io.BufferedReader]:
    """The file as it is."""
    if str(path) == "-":
        yield cast("io.BufferedReader", sys.stdin.buffer)  # whoever runs this closes it
        return
    with path.open("rb") as file:
        yield file
