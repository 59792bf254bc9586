"""How much of all answers may be on their way to us: the receive windows of our connections.

Several peers send to one host at once, and none of them knows of the others. What comes faster than
the host's link carries waits in the queue before it, and what does not fit there is lost after its
sender's uplink has carried it: a swarm in which every uplink counts is then as much slower (16 hosts
behind 50 Mbit/s and 40 ms of queue lost one byte in twenty). So all that is on its way at once is
what keeps the link busy, and little more, shared alike by the connections on which a piece is coming:
what the link carries in `QUEUE_SECONDS`. A peer that is far gets more, what it carries in a round trip.
"""

import socket
from functools import lru_cache
from pathlib import Path
from typing import Final

from hostler_precache.transfer import round_trips

# half a queue of 40 ms: 14 to 28 were tried with 16 hosts; with less a link runs dry, with more bytes are lost
QUEUE_SECONDS: Final = 0.020
# of which one connection has no more than this: its sender's link has a queue, too, and others' answers wait there
ONE_SECONDS: Final = 0.012
# as many packets as make a sender notice a loss by those that come after it
LEAST_BYTES: Final = 24 * 1024
# less of a change is none
NEARLY: Final = 0.9
_LARGEST = Path("/proc/sys/net/core/rmem_max")


def window_bytes(link_bytes_per_second: int, round_trip_seconds: float, *, receiving: int) -> int:
    """The window for one of so many connections of a link, to somebody who is so far away."""
    is_far = round_trip_seconds >= round_trips.FAR_SECONDS
    near_seconds = min(ONE_SECONDS, QUEUE_SECONDS / max(1, receiving))
    seconds = round_trip_seconds if is_far else near_seconds
    return max(LEAST_BYTES, int(link_bytes_per_second * seconds))


class Windows:
    """The receive windows of all connections that share a link."""

    def __init__(self, link_bytes_per_second: int) -> None:
        self._link_bytes_per_second = link_bytes_per_second
        self._receiving: set[Window] = set()

    def open(self, connection: socket.socket) -> "Window":
        """The window of a new connection, which is set."""
        window = Window(connection, self)
        window.fit()
        return window

    def bytes_for(self, window: "Window", round_trip_seconds: float) -> int:
        """What this one gets, or would if it were to receive now."""
        others = len(self._receiving) - (window in self._receiving)
        return window_bytes(self._link_bytes_per_second, round_trip_seconds, receiving=others + 1)

    def begin(self, window: "Window") -> None:
        """A body comes there from now on: the others have less."""
        self._receiving.add(window)
        self._share_out()

    def end(self, window: "Window") -> None:
        """None comes there any more, if one did: the others have more."""
        if window in self._receiving:
            self._receiving.discard(window)
            self._share_out()

    def _share_out(self) -> None:
        for window in self._receiving:
            window.resize()


class Window:
    """The receive window of one connection; what was offered to the peer once stays good."""

    def __init__(self, connection: socket.socket, windows: Windows) -> None:
        self._socket = connection
        self._windows = windows
        self._round_trip_seconds: float | None = None
        self.bytes: int | None = None
        """None while it is the kernel's own, which may become larger than any that can be set."""

    def fit(self) -> None:
        """It is as large as it has to be, by the shortest round trip so far: handshakes are slow on a busy link."""
        self._round_trip_seconds = round_trips.shortest_seconds(self._socket)
        self.resize()

    def resize(self) -> None:
        """It has its share."""
        # over TLS a socket is closed a moment before whoever receives on it is told
        if self._round_trip_seconds is None or self._socket.fileno() < 0:
            return
        wanted, largest = self._windows.bytes_for(self, self._round_trip_seconds), _largest_bytes()
        if self.bytes is None:
            if wanted > largest:
                return
        else:
            wanted = min(wanted, largest)
            if NEARLY * self.bytes < wanted < self.bytes / NEARLY:
                return
        # the kernel takes twice as much memory for it, for what is not payload
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, wanted)
        self.bytes = wanted


@lru_cache
def _largest_bytes() -> int:
    """What SO_RCVBUF may be (net.core.rmem_max)."""
    try:
        return int(_LARGEST.read_text())
    except (OSError, ValueError):
        return 0
