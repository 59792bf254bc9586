"""Piece maps as a sender tells them: to each neighbour a line whenever there is news for it.

    {"have":"3f"}     all that is here, in hexadecimal, first of all
    {"add":[6,7]}     what has come since
    {"coming":[9]}    what is on its way here from outside the rack
    (an empty line)   nothing, and the sender lives

In a swarm of many hosts these lines are most of what happens, so each costs as little as it can: all
neighbours are told in one go, at most every `BATCH_SECONDS`, and none is told of a piece that it has.
"""

import asyncio
import json
from collections.abc import Iterator
from typing import Final

from hostler_precache.swarming import swarm

BATCH_SECONDS: Final = 0.05
HEARTBEAT_SECONDS: Final = 5.0
LINE_PIECES: Final = 1000
# who lets more than this wait does not read: its connection is closed
LONGEST_UNREAD_BYTES: Final = 1024 * 1024


class Watcher:
    """One who follows a piece map; `ended` says that it does not any more."""

    def __init__(self, host: str, transport: asyncio.Transport, *, is_chunked: bool) -> None:
        """Somebody who was told nothing yet.

        Args:
            host: its name.
            transport: to it; the head of the answer has been written.
            is_chunked: whether the body is (RFC 9112, section 7.1), or lasts until the connection ends.
        """
        self.host = host
        self.ended = asyncio.Event()
        self._transport = transport
        self._is_chunked = is_chunked
        self._told = 0
        self._coming = 0
        self._is_quiet = True

    def begin(self, have: int, count: int) -> None:
        """It is told of all that there is, of so many pieces."""
        self._told = have
        self._write(_line({"have": swarm.to_hex(have, count)}))

    def tell(self, have: int, known: int) -> None:
        """It is told what is new, but for what it is known to have itself."""
        new, coming = have & ~(self._told | known), self._coming & ~(have | known)
        self._told, self._coming = have, 0
        if new or coming:
            self._write(b"".join((*_lines("add", new), *_lines("coming", coming))))

    def claim(self, pieces: int) -> None:
        """These are on their way here: it is told of them with the next news."""
        self._coming |= pieces

    def lose(self, pieces: int) -> None:
        """When these come again, it is told again."""
        self._told &= ~pieces

    def beat(self) -> None:
        """It hears something, if it has heard nothing since the last time."""
        if self._is_quiet:
            self._write(b"\n")
        self._is_quiet = True

    def _write(self, text: bytes) -> None:
        transport = self._transport
        if transport.get_write_buffer_size() > LONGEST_UNREAD_BYTES:
            transport.abort()
        if transport.is_closing():
            self.ended.set()
            return
        self._is_quiet = False
        transport.write(b"%x\r\n%b\r\n" % (len(text), text) if self._is_chunked else text)


def _line(document: dict[str, object]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


def _lines(name: str, pieces: int) -> Iterator[bytes]:
    """The set as lines, none of them long."""
    found = list(swarm.members(pieces)) if pieces else []
    for some in range(0, len(found), LINE_PIECES):
        yield _line({name: found[some : some + LINE_PIECES]})
