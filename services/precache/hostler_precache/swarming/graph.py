"""Who is whose neighbour in a swarm: a graph that is known before the first piece moves.

The tracker knows the receivers, so nobody has to find peers. The graph is a union of random rings:
near-regular, connected, of small diameter, and a host that joins or leaves changes only its own
neighbours' lists. Most edges stay inside a rack, since a piece that came into a rack once need not
come again; a few cross, since it has to come once.

A host's place on a ring is a hash of the swarm, the ring and the host, so every replica that knows
the same hosts has the same graph.
"""

import bisect
import hashlib
from collections.abc import Iterable
from typing import Final

DEGREE: Final = 12
OUTSIDE: Final = 2


class Graph:
    """The hosts of one swarm, each with its rack or None, and their neighbours.

    Invariants: being neighbours is symmetric; nobody is its own neighbour; the graph is connected.
    """

    def __init__(self, key: str, *, degree: int = DEGREE, outside: int = OUTSIDE) -> None:
        """A graph of no hosts.

        Args:
            key: of the swarm: two swarms of the same hosts have different graphs.
            degree: about how many neighbours a host has.
            outside: how many of them are chosen among all hosts and not in the rack alone.
        """
        self._key = key
        self._degree = degree
        self._rack_rings = max(1, (degree - outside) // 2)
        self._racks: dict[str, str | None] = {}
        self._everywhere = [_Ring(f"{key}/all/{ring}") for ring in range(max(1, outside // 2))]
        self._inside: dict[str | None, list[_Ring]] = {}

    def __len__(self) -> int:
        return len(self._racks)

    def __contains__(self, host: str) -> bool:
        return host in self._racks

    def rack(self, host: str) -> str | None:
        """The rack of a host of the graph."""
        return self._racks[host]

    def add(self, host: str, rack: str | None = None) -> None:
        """The host is in the graph, in that rack."""
        if host in self._racks:
            if self._racks[host] == rack:
                return
            self.remove(host)
        self._racks[host] = rack
        for ring in self._rings(rack):
            ring.add(host)

    def remove(self, host: str) -> None:
        """The host is not in the graph."""
        if host not in self._racks:
            return
        rack = self._racks.pop(host)
        for ring in self._rings(rack):
            ring.remove(host)
        if not len(self._inside[rack][0]):
            del self._inside[rack]

    def neighbours(self, host: str) -> list[str]:
        """The neighbours of a host of the graph, sorted; everybody, where there are few.

        Raises:
            KeyError: it is not in the graph.
        """
        rack = self._racks[host]
        if len(self._racks) <= self._degree + 1:
            return sorted(self._racks.keys() - {host})
        found: set[str] = set()
        for ring in self._rings(rack):
            found.update(ring.beside(host))
        found.discard(host)
        return sorted(found)

    def _rings(self, rack: str | None) -> Iterable["_Ring"]:
        if rack not in self._inside:
            self._inside[rack] = [
                _Ring(f"{self._key}/rack/{ring}") for ring in range(self._rack_rings)
            ]
        return (*self._everywhere, *self._inside[rack])


class _Ring:
    """Hosts in the order of a hash of their names."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._order: list[tuple[bytes, str]] = []

    def __len__(self) -> int:
        return len(self._order)

    def add(self, host: str) -> None:
        bisect.insort(self._order, self._place(host))

    def remove(self, host: str) -> None:
        del self._order[bisect.bisect_left(self._order, self._place(host))]

    def beside(self, host: str) -> tuple[str, str]:
        """The hosts before and after it; itself, where it is alone."""
        index = bisect.bisect_left(self._order, self._place(host))
        return self._order[index - 1][1], self._order[(index + 1) % len(self._order)][1]

    def _place(self, host: str) -> tuple[bytes, str]:
        text = f"{self._key}/{host}"
        return hashlib.blake2b(text.encode(), digest_size=8).digest(), host
