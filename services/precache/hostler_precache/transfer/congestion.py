"""How what we send gives way to others: the congestion control of connections on which answers leave.

In a swarm, a link is shared by a few connections that are near each other and come and go by the piece. A share
that is taken over or given back late is one host that ends late. Reno halves what it has on the way when a packet
is lost, and is back within a few round trips of a millisecond; CUBIC, the kernel's own choice nearly everywhere,
gives back less than a third, and BBR looks at losses not at all. The last of 16 hosts behind 50 Mbit/s and 40 ms of
queue was at 1.06 of the bound with Reno, 1.07 to 1.09 with BBR, 1.13 to 1.16 with CUBIC.

On a long way Reno takes minutes to use the link: who is far away is sent to as the host is set up to. Every kernel
has Reno, and every user may choose it unless the operator forbids that (tcp(7), TCP_CONGESTION).
"""

import socket
from contextlib import suppress
from typing import Final

from hostler_precache.transfer import round_trips

NEAR: Final = b"reno"


def settle(connection: socket.socket) -> None:
    """A near peer is sent to in the way that shares a link best; one that is far, or not known, as before."""
    shortest_seconds = round_trips.shortest_seconds(connection)
    if shortest_seconds is not None and shortest_seconds < round_trips.FAR_SECONDS:
        # a route may have its own, locked (ip-route(8), congctl), or Reno not be allowed
        # (tcp_allowed_congestion_control): that is the operator's choice
        with suppress(PermissionError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, NEAR)
