"""Who fetches which piece from whom: every decision of the swarm, and no I/O.

The same objects are driven by the agents, by the seed and by a simulator, so nothing here reads
a clock or draws a random number that is not an argument. Sets of pieces are Python integers, bit
i for piece i: intersecting two of 3,200 pieces is one machine-sized loop in C.

The policies, and why (simulated over N = 5 to 1,000 receivers):
- the seed sends each piece once, in file order, before it sends any twice. When its uplink is no
  faster than a host's, every second copy it sends delays all hosts by a whole piece;
- receivers take the rarest piece among their neighbours, ties broken at random (by index, all
  of them would fetch the same piece), within a window past their first gap, so that the prefix
  of the file is usable early;
- the graph is a union of random rings: near-regular and connected, and a host that joins or
  leaves changes only its own neighbours.
"""

import hashlib
import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

MIN_WINDOW_PIECES: Final = 64
DEFAULT_DEGREE: Final = 10


def bits(pieces: Iterable[int]) -> int:
    """The set of these pieces."""
    result = 0
    for piece in pieces:
        result |= 1 << piece
    return result


def members(pieces: int) -> Iterator[int]:
    """The pieces of a set, ascending."""
    while pieces:
        lowest = pieces & -pieces
        yield lowest.bit_length() - 1
        pieces ^= lowest


def choose(pieces: int, rng: random.Random) -> int:
    """One piece of a non-empty set, each as likely as another."""
    rank = rng.randrange(pieces.bit_count())
    low, width = 0, pieces.bit_length()
    while width > 1:
        half = width // 2
        lower = (pieces >> low) & ((1 << half) - 1)
        count = lower.bit_count()
        if rank < count:
            width = half
        else:
            rank -= count
            low += half
            width -= half
    return low


def to_hex(pieces: int, count: int) -> str:
    """A set as text of fixed length, for the wire."""
    return f"{pieces:0{max(1, -(-count // 4))}x}"


def from_hex(text: str, count: int) -> int:
    """The set in such a text, which may come from a stranger.

    Raises:
        ValueError: not hexadecimal, of the wrong length, or with pieces past the end.
    """
    if len(text) != max(1, -(-count // 4)):
        raise ValueError("a piece map of the wrong length")
    pieces = int(text, 16) if text.isalnum() else -1
    if pieces < 0 or pieces >> count:
        raise ValueError("a piece map that is not hexadecimal, or with pieces past the end")
    return pieces


class Picker:
    """What a receiver asks for next.

    Invariant: `pick` never returns a piece that is had or in flight, nor one that the neighbour
    is not known to have.
    """

    def __init__(self, count: int, *, have: int = 0, window: int | None = None) -> None:
        """A receiver of `count` pieces.

        Args:
            count: pieces in the image.
            have: those it has.
            window: how far past the first gap it asks; a quarter of the image, at least 64.
        """
        self._count = count
        self._all = (1 << count) - 1
        self._have = have & self._all
        self._in_flight = 0
        self._window = max(MIN_WINDOW_PIECES, count // 4) if window is None else window
        self._maps: dict[str, int] = {}
        self._copies = [0] * count
        self._by_copies: dict[int, int] = {0: self._all}

    @property
    def have(self) -> int:
        """The pieces it has."""
        return self._have

    @property
    def missing(self) -> int:
        """The pieces it neither has nor has asked for."""
        return self._all & ~(self._have | self._in_flight)

    @property
    def is_complete(self) -> bool:
        """Whether it has them all."""
        return self._have == self._all

    def neighbour_has(self, neighbour: str, pieces: int) -> None:
        """A neighbour says that it has these pieces too; those past the end are ignored."""
        known = self._maps.get(neighbour, 0)
        new = pieces & self._all & ~known
        self._maps[neighbour] = known | new
        for piece in members(new):
            self._move(piece, +1)

    def forget_neighbour(self, neighbour: str) -> None:
        """A neighbour is gone, with all that it had."""
        for piece in members(self._maps.pop(neighbour, 0)):
            self._move(piece, -1)

    def neighbour_lacks(self, neighbour: str, piece: int) -> None:
        """A neighbour refused a piece it was believed to have."""
        if self._maps.get(neighbour, 0) >> piece & 1:
            self._maps[neighbour] &= ~(1 << piece)
            self._move(piece, -1)

    def pick(self, neighbour: str, rng: random.Random) -> int | None:
        """The piece to ask of this neighbour, now in flight; None when it has nothing for us."""
        wanted = self._maps.get(neighbour, 0) & self.missing
        if not wanted:
            return None
        gap = self._all & ~self._have
        first = (gap & -gap).bit_length() - 1
        inside = wanted & (((1 << self._window) - 1) << first)
        piece = self._rarest(inside or wanted, rng)
        self.started(piece)
        return piece

    def orphans(self) -> int:
        """The missing pieces that no neighbour is known to have."""
        return self.missing & self._by_copies.get(0, 0)

    def started(self, piece: int) -> None:
        """The piece is in flight."""
        self._in_flight |= 1 << piece

    def failed(self, piece: int) -> None:
        """The piece did not come, or was not what it should be: it may be asked for again."""
        self._in_flight &= ~(1 << piece)

    def received(self, piece: int) -> None:
        """The piece is verified and stored."""
        self._in_flight &= ~(1 << piece)
        self._have |= 1 << piece

    def is_wanted(self, piece: int) -> bool:
        """Whether the piece exists and is neither had nor in flight."""
        return 0 <= piece < self._count and bool(self.missing >> piece & 1)

    def _rarest(self, wanted: int, rng: random.Random) -> int:
        for copies in sorted(self._by_copies):
            candidates = wanted & self._by_copies[copies]
            if candidates:
                return choose(candidates, rng)
        raise AssertionError("every piece is in one of the sets")

    def _move(self, piece: int, change: int) -> None:
        before = self._copies[piece]
        after = before + change
        self._copies[piece] = after
        bit = 1 << piece
        left = self._by_copies[before] & ~bit
        if left:
            self._by_copies[before] = left
        else:
            del self._by_copies[before]
        self._by_copies[after] = self._by_copies.get(after, 0) | bit


@dataclass(slots=True)
class _Sending:
    """What the seed knows of one piece it has begun to send."""

    to: str
    at: float
    copies: int = 0


class SeedPolicy:
    """What a seed sends: each piece once, in file order, before any goes out twice.

    A receiver asks for the next piece and does not choose. A piece asked for by name is given
    when it was never sent, when the same host asks again, or when the copy sent to somebody else
    has had time to spread: a host that died with the only copy must not stop the others, and the
    others asking all at once must not cost one copy each.
    """

    def __init__(
        self, count: int, *, available: int | None = None, is_injected: bool = False
    ) -> None:
        """A seed of `count` pieces.

        Args:
            count: pieces in the image.
            available: those that are verified; all, unless given.
            is_injected: each was sent once by an earlier run.
        """
        self._count = count
        self._all = (1 << count) - 1
        self._available = self._all if available is None else available & self._all
        self._begun = self._all if is_injected else 0
        self._sent: dict[int, _Sending] = {}

    @property
    def available(self) -> int:
        """The pieces that may be sent at all."""
        return self._available

    @property
    def is_injected(self) -> bool:
        """Whether every piece is out, or on its way, for the first time."""
        return self._begun == self._all

    def add(self, pieces: int) -> None:
        """These pieces have been verified too (the image is still being fetched)."""
        self._available |= pieces & self._all

    def next(self, host: str, now: float) -> int | None:
        """The lowest piece that was never sent, now begun; None when there is none yet or more."""
        fresh = self._available & ~self._begun
        if not fresh:
            return None
        piece = (fresh & -fresh).bit_length() - 1
        self._begin(piece, host, now)
        return piece

    def may_send(self, piece: int, host: str, now: float, *, spread_seconds: float) -> bool:
        """Whether to send a piece asked for by name, which is begun when the answer is yes.

        Args:
            piece: which.
            host: who asks.
            now: a monotonic time.
            spread_seconds: how long a copy gets to reach others before another one leaves.
        """
        if not self._available >> piece & 1:
            return False
        sent = self._sent.get(piece)
        if sent is not None and sent.to != host and now - sent.at < spread_seconds:
            return False
        self._begin(piece, host, now)
        return True

    def completed(self, piece: int, now: float) -> None:
        """The last byte of the piece has left; its time to spread counts from here."""
        sending = self._sent[piece]
        sending.at = now
        sending.copies += 1

    def failed(self, piece: int, host: str) -> None:
        """The sending broke off; unless another copy left, the piece is next again."""
        sending = self._sent.get(piece)
        if sending is not None and sending.to == host and sending.copies == 0:
            del self._sent[piece]
            self._begun &= ~(1 << piece)

    def _begin(self, piece: int, host: str, now: float) -> None:
        self._begun |= 1 << piece
        before = self._sent.get(piece)
        copies = before.copies if before is not None else 0
        self._sent[piece] = _Sending(to=host, at=now, copies=copies)


class UploadSlots:
    """How many pieces a sender has on the wire at once, and how many askers wait.

    Many at once makes each slow: a piece can be shared on only when it is whole.
    """

    def __init__(self, slots: int, *, queue: int = 0) -> None:
        self._slots = slots
        self._queue = queue
        self._active = 0
        self._waiting = 0

    @property
    def active(self) -> int:
        """How many are being sent."""
        return self._active

    def take(self) -> bool:
        """Take a slot, if one is free."""
        if self._active >= self._slots:
            return False
        self._active += 1
        return True

    def give_back(self) -> None:
        """A sending has ended."""
        assert self._active > 0, "a slot is given back once"
        self._active -= 1

    def enqueue(self) -> bool:
        """Take a place among the waiting, if there is one."""
        if self._waiting >= self._queue:
            return False
        self._waiting += 1
        return True

    def dequeue(self) -> None:
        """Leave the waiting, with a slot or without."""
        assert self._waiting > 0, "a place is left once"
        self._waiting -= 1


def neighbours(
    host: str,
    hosts: Collection[str],
    *,
    key: str,
    degree: int = DEFAULT_DEGREE,
    racks: Mapping[str, str] | None = None,
    outside: int = 2,
) -> list[str]:
    """The neighbours of a host in the graph over `hosts`, sorted; the relation is symmetric.

    With at most `degree` + 1 hosts everybody knows everybody. With more, it is a union of rings,
    each in an order that a hash of `key`, ring and host decides: every process that asks gets
    the same graph. With `racks`, all but `outside` of the edges stay inside the rack.
    """
    everyone = set(hosts) | {host}
    if len(everyone) <= degree + 1:
        return sorted(everyone - {host})
    found: set[str] = set()
    if racks is None:
        found |= _on_rings(host, everyone, key=f"{key}/all", rings=max(1, degree // 2))
    else:
        rack = racks.get(host)
        inside = {other for other in everyone if racks.get(other) == rack}
        found |= _on_rings(host, everyone, key=f"{key}/all", rings=max(1, outside // 2))
        found |= _on_rings(host, inside, key=f"{key}/rack", rings=max(1, (degree - outside) // 2))
    return sorted(found)


def _on_rings(host: str, hosts: Collection[str], *, key: str, rings: int) -> set[str]:
    found: set[str] = set()
    for ring in range(rings):
        order = sorted(hosts, key=lambda name, ring=ring: _position(key, ring, name))  # type: ignore[misc]  # mypy cannot infer a lambda with a default
        index = order.index(host)
        found |= {order[index - 1], order[(index + 1) % len(order)]}
    return found - {host}


def _position(key: str, ring: int, host: str) -> tuple[bytes, str]:
    digest = hashlib.blake2b(f"{key}/{ring}/{host}".encode(), digest_size=8).digest()
    return digest, host


def timeout_seconds(durations: Sequence[float], *, floor: float, factor: float = 4.0) -> float:
    """How long to wait for a piece from a peer whose last pieces took `durations` seconds.

    Four times the exponentially weighted mean (weight 1/4), and never under `floor`: a fixed
    time per megabyte either gives up on slow links or waits too long on fast ones.
    """
    mean: float | None = None
    for seconds in durations:
        mean = seconds if mean is None else mean + (seconds - mean) / 4
    return floor if mean is None else max(floor, factor * mean)
