"""How much of an answer may be on its way to us: the receive window of a connection.

Several peers send to one host at once, and none of them knows of the others. What comes faster than
the host's link carries waits in the queue before it, and what does not fit there is lost after its
sender's uplink has carried it: a swarm in which every uplink counts is then as much slower (16 hosts
behind 50 Mbit/s and 40 ms of queue lost one byte in twenty). So a connection gets the window that
keeps the link busy, and little more: to a peer that is near, what the link carries in
`QUEUE_SECONDS`; to one that is far, what it carries in a round trip.
"""

import socket
import struct
from functools import lru_cache
from pathlib import Path
from typing import Final

# several senders of that fit a queue of 40 ms, and one alone keeps the link busy while we are about to read
QUEUE_SECONDS: Final = 0.008
# a shorter round trip may be nothing but queues: a busy link has them while connections are made
FAR_SECONDS: Final = 0.025
LEAST_BYTES: Final = 32 * 1024
# less of a change is none
NEARLY: Final = 0.9
# tcpi_min_rtt in microseconds: its place in struct tcp_info (linux/tcp.h)
_MIN_RTT: Final = struct.Struct("=148xI")
_UNKNOWN: Final = 0xFFFFFFFF
_LARGEST = Path("/proc/sys/net/core/rmem_max")


def window_bytes(link_bytes_per_second: int, round_trip_seconds: float) -> int:
    """The window for a link, to somebody who is so far away."""
    seconds = round_trip_seconds if round_trip_seconds >= FAR_SECONDS else QUEUE_SECONDS
    return max(LEAST_BYTES, int(link_bytes_per_second * seconds))


class Window:
    """The receive window of one connection, which becomes smaller when it shows how near the peer is."""

    def __init__(self, connection: socket.socket, link_bytes_per_second: int) -> None:
        """A new connection has its window."""
        self._socket = connection
        self._link_bytes_per_second = link_bytes_per_second
        self.bytes: int | None = None
        """None while it is the kernel's own, which may become larger than any that can be set."""
        self.fit()

    def fit(self) -> None:
        """It is as large as it has to be, by the shortest round trip so far: handshakes are slow on a busy link."""
        seconds = _round_trip_seconds(self._socket)
        if seconds is None:
            return
        window = window_bytes(self._link_bytes_per_second, seconds)
        if window > _largest_bytes() or (self.bytes is not None and window > NEARLY * self.bytes):
            return
        # the kernel takes twice as much memory for it, for what is not payload
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        self.bytes = window


def _round_trip_seconds(connection: socket.socket) -> float | None:
    """The shortest so far; None while that is not known."""
    try:
        told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _MIN_RTT.size)
        (microseconds,) = _MIN_RTT.unpack(told)
    except (OSError, struct.error):
        return None
    return None if microseconds in (0, _UNKNOWN) else float(microseconds) / 1e6


@lru_cache
def _largest_bytes() -> int:
    """What SO_RCVBUF may be (net.core.rmem_max)."""
    try:
        return int(_LARGEST.read_text())
    except (OSError, ValueError):
        return 0
