"""How far away the other end of a connection is: the shortest round trip that the kernel has seen on it lately."""

import socket
import struct
from typing import Final

# a shorter round trip may be nothing but queues: a busy link has them while connections are made
FAR_SECONDS: Final = 0.025
# tcpi_min_rtt in microseconds: its place in struct tcp_info (linux/tcp.h)
_MIN_RTT: Final = struct.Struct("=148xI")
_UNKNOWN: Final = 0xFFFFFFFF


def shortest_seconds(connection: socket.socket) -> float | None:
    """The shortest of the last minutes (net.ipv4.tcp_min_rtt_wlen); None while that is not known."""
    try:
        told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _MIN_RTT.size)
        (microseconds,) = _MIN_RTT.unpack(told)
    except (OSError, struct.error):
        return None
    return None if microseconds in (0, _UNKNOWN) else float(microseconds) / 1e6
