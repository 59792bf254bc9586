"""Who fetches which piece from whom: every decision of the swarm, and no I/O.

The same objects are driven by the agents, by the seed and by a simulator, so nothing here reads
a clock or draws a random number that is not an argument. Sets of pieces are Python integers, bit
i for piece i: intersecting two of 3,200 pieces is one machine-sized loop in C.

The policies, and why (simulated over N = 5 to 1,000 receivers):
- the seed sends each piece once, in file order, before it sends any twice. When its uplink is no
  faster than a host's, every second copy it sends delays all hosts by a whole piece;
- receivers take the rarest piece among their neighbours, ties broken at random (by index, all
  of them would fetch the same piece), within a window past their first gap, so that the prefix
  of the file is usable early.
"""

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

MIN_WINDOW_PIECES: Final = 64
DEFAULT_SLOTS: Final = 2
# of the pieces, so many more may leave a seed than once each without anybody being lost
SPARE_SHARE: Final = 0.03
# so many times what is usual is slow
SLOW: Final = 4.0
MIN_STUCK_SECONDS: Final = 2.0
STUCK: Final = 8.0
FIRST_SLOTS: Final = 2
# pieces a host asks for at once, most of which wait at their senders: with fewer, single hosts fall behind on real
# links and end late (measured at 8 hosts: 7 made the last one 1.13 to 1.15 T*, 10 1.08 to 1.10, 13 1.05)
REQUESTS: Final = 13
# so many askers wait at a host: more, and pieces that nobody else can fetch wait there behind others
UPLOAD_QUEUE: Final = 5
OVERDUE_FACTOR: Final = 4
# so many pieces are sooner counted off one by one than found by halving
FEW: Final = 12
MIN_OVERDUE_SECONDS: Final = 0.25


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
    count = pieces.bit_count()
    rank = int(rng.random() * count) if count > 1 else 0
    if rank <= FEW:
        for _ in range(rank):
            pieces &= pieces - 1
        return (pieces & -pieces).bit_length() - 1
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


def turn(piece: int, name: str, names: Iterable[str]) -> int:
    """Whose turn it is to bring a piece into the rack: 0 for the first of the names, and so on.

    By rendezvous hashing (Thaler and Ravishankar, 1998): each piece has another order of names, and two who know
    nearly the same names nearly agree.
    """
    mine = _rank(piece, name)
    return sum(_rank(piece, other) < mine for other in {*names} - {name})


def _rank(piece: int, name: str) -> tuple[bytes, str]:
    return hashlib.blake2b(f"{piece}/{name}".encode(), digest_size=4).digest(), name


def coverage(pieces: int, count: int, buckets: int) -> str:
    """How much of each of so many equal parts of an image is there, a hex digit each.

    f is all of it; less is the sixteenths, rounded down, but e at the most. With fewer pieces than
    parts, a piece fills several.
    """
    digits = []
    for bucket in range(buckets if count else 0):
        first = bucket * count // buckets
        width = max(1, (bucket + 1) * count // buckets - first)
        found = (pieces >> first & ((1 << width) - 1)).bit_count()
        digits.append("f" if found == width else f"{min(14, 16 * found // width):x}")
    return "".join(digits)


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """What a neighbour has told of itself since it last did: sets of pieces."""

    have: int = 0
    coming: int = 0


class Picker:
    """What a receiver asks for next.

    How many neighbours have each piece is kept in planes: bit i of plane p is bit p of the count
    of piece i. A whole piece map is then added, and the rarest of a set found, in a few operations
    on integers, however many pieces there are.

    Invariant: `pick` never returns a piece that is had or in flight, nor one that the neighbour
    is not known to have.
    """

    def __init__(
        self, count: int, *, have: int = 0, window: int | None = None, slots: int = DEFAULT_SLOTS
    ) -> None:
        """A receiver of `count` pieces.

        Args:
            count: pieces in the image.
            have: those it has.
            window: how far past the first gap it asks; a quarter of the image, at least 64.
            slots: how many a sender sends at once: as many pieces as that are always on their way.
        """
        self._count = count
        self._all = (1 << count) - 1
        self._told = self._all
        self._have = have & self._all
        self._in_flight = 0
        self._twice = 0
        window = max(MIN_WINDOW_PIECES, count // 4) if window is None else window
        self._window_mask = (1 << window) - 1
        self._endgame = max(2 * slots, count // 100)
        self._maps: dict[str, int] = {}
        self._outside: set[str] = set()
        self._planes: list[int] = []
        self._rack_has = 0
        self._coming = 0

    @property
    def have(self) -> int:
        """The pieces it has."""
        return self._have

    @property
    def in_flight(self) -> int:
        """The pieces it has asked for."""
        return self._in_flight

    @property
    def missing(self) -> int:
        """The pieces it neither has nor has asked for, of those that it is told of."""
        return self._told & ~(self._have | self._in_flight)

    @property
    def is_complete(self) -> bool:
        """Whether it has them all."""
        return self._have == self._all

    def grew(self, told: int, here: int) -> None:
        """Of an image that is still being fetched: only the pieces `told` can be checked, so far.

        Those `here` have come without being asked for: they are zeros.
        """
        self._told = told & self._all
        self._have |= here & self._all

    def neighbour_has(self, neighbour: str, pieces: int, *, in_rack: bool = True) -> None:
        """A neighbour says that it has these pieces too; those past the end are ignored.

        One outside the rack is asked only for what nobody in the rack has or is getting.
        """
        known = self._maps.get(neighbour, 0)
        new = pieces & self._all & ~known
        self._maps[neighbour] = known | new
        if in_rack:
            self._rack_has |= new
        else:
            self._outside.add(neighbour)
        # one more copy of each: binary addition, all columns at once
        planes, index = self._planes, 0
        while new:
            if index == len(planes):
                planes.append(new)
                return
            plane = planes[index]
            planes[index] = plane ^ new
            new &= plane
            index += 1

    def forget_neighbour(self, neighbour: str) -> None:
        """A neighbour is gone, with all that it had."""
        self._remove(self._maps.pop(neighbour, 0))
        self._outside.discard(neighbour)
        self._look_round()

    def neighbour_lacks(self, neighbour: str, piece: int) -> None:
        """A neighbour refused a piece it was believed to have."""
        if self._maps.get(neighbour, 0) >> piece & 1:
            self._maps[neighbour] &= ~(1 << piece)
            self._remove(1 << piece)
            self._look_round()

    def coming(self, pieces: int) -> int:
        """Somebody in the rack is getting these from outside; those of which that was not known."""
        new = pieces & self._all & ~(self._have | self._in_flight | self._rack_has | self._coming)
        self._coming |= new
        return new

    def not_coming(self, pieces: int) -> None:
        """They have come, or had the time to: they are not waited for any more."""
        self._coming &= ~pieces

    @property
    def maps(self) -> Mapping[str, int]:
        """The pieces that each neighbour is known to have."""
        return self._maps

    def known(self, neighbour: str) -> int:
        """The pieces that a neighbour is known to have."""
        return self._maps.get(neighbour, 0)

    def importable(self, neighbour: str, among: int) -> int:
        """What one outside the rack may be asked for: pieces of `among` that are not in the rack, nor coming."""
        wanted = self._maps.get(neighbour, 0) & self.missing & among
        return wanted & ~(self._rack_has | self._coming)

    def is_twice(self, piece: int) -> bool:
        """Whether the piece was asked of two."""
        return bool(self._twice >> piece & 1)

    def pick(self, neighbour: str, rng: random.Random, *, among: int = -1) -> int | None:
        """The piece of `among` to ask of this neighbour, now in flight; None where there is none."""
        if neighbour in self._outside:
            wanted = self.importable(neighbour, among)
        else:
            wanted = self._maps.get(neighbour, 0) & self.missing & among
        if not wanted:
            return None
        have = self._have
        first = (~have & (have + 1)).bit_length() - 1
        rarest = wanted & (self._window_mask << first) or wanted
        for plane in reversed(self._planes):
            rarest = rarest & ~plane or rarest
        piece = choose(rarest, rng)
        self._in_flight |= 1 << piece
        return piece

    @property
    def is_endgame(self) -> bool:
        """Whether only the last few pieces lack, and all of them are in flight."""
        is_last = self._told == self._all and not self.missing
        return is_last and 0 < self._in_flight.bit_count() <= self._endgame

    def pick_again(self, neighbour: str, rng: random.Random, *, but: int) -> int | None:
        """In the endgame: a piece that is in flight from another, to ask of this neighbour too.

        None of those in `but`, and none for a third time.
        """
        if not self.is_endgame:
            return None
        wanted = self._maps.get(neighbour, 0) & self._in_flight & ~self._twice & ~but
        if not wanted:
            return None
        piece = choose(wanted, rng)
        self._twice |= 1 << piece
        return piece

    def orphans(self) -> int:
        """The missing pieces that no neighbour is known to have."""
        return self.missing & ~self._anywhere()

    def rare(self) -> int:
        """The missing pieces that at most one neighbour is known to have."""
        several = 0
        for plane in self._planes[1:]:
            several |= plane
        return self.missing & ~several

    def started(self, piece: int) -> None:
        """The piece is in flight."""
        self._in_flight |= 1 << piece

    def failed(self, piece: int) -> None:
        """The piece did not come, or was not what it should be: it may be asked for again."""
        bit = 1 << piece
        if self._twice & bit:
            self._twice &= ~bit  # the other request for it goes on
        else:
            self._in_flight &= ~bit

    def received(self, piece: int) -> None:
        """The piece is verified and stored."""
        bit = 1 << piece
        self._in_flight &= ~bit
        self._twice &= ~bit
        self._have |= bit

    def is_wanted(self, piece: int) -> bool:
        """Whether the piece exists and is neither had nor in flight."""
        return 0 <= piece < self._count and bool(self.missing >> piece & 1)

    def _anywhere(self) -> int:
        found = 0
        for plane in self._planes:
            found |= plane
        return found

    def _remove(self, pieces: int) -> None:
        planes = self._planes
        for index, plane in enumerate(planes):
            if not pieces:
                return
            planes[index] = plane ^ pieces
            pieces &= ~plane
        assert not pieces, "a copy is taken away once"

    def _look_round(self) -> None:
        self._rack_has = 0
        for name, pieces in self._maps.items():
            if name not in self._outside:
                self._rack_has |= pieces


@dataclass(slots=True)
class _Sending:
    """What the seed knows of one piece it has begun to send."""

    to: str
    began: float
    at: float
    copies: int = 0


class SeedPolicy:
    """What a seed sends: each piece once, in file order, before any goes out twice.

    A receiver asks for the next piece and does not choose. A piece asked for by name is given
    when it was never sent, when the same host asks again, or when the copy sent to somebody else
    has had time to spread: a host that died with the only copy must not stop the others, and the
    others asking all at once must not cost one copy each.

    A slow host asks seldom and so gets few pieces that nobody else has. That these do not slow
    all, a few copies (`SPARE_SHARE` of the pieces) may leave besides: of pieces that are stuck on
    their way to it, and, when each piece is out, of those that are still rare.
    """

    def __init__(
        self,
        count: int,
        *,
        available: int | None = None,
        is_injected: bool = False,
        holes: int = 0,
    ) -> None:
        """A seed of `count` pieces.

        Args:
            count: pieces in the image.
            available: those that are verified; all, unless given.
            is_injected: each was sent once by an earlier run.
            holes: those that do not have to leave once: zeros, and, of an image that is fetched
                again, what was sent of it before.
        """
        self._count = count
        self._all = (1 << count) - 1
        self._available = self._all if available is None else available & self._all
        self._begun = self._all if is_injected else holes & self._all
        self._sent: dict[int, _Sending] = {}
        self._under_way: set[int] = set()
        self._seconds: float | None = None
        self._spare = max(1, int(count * SPARE_SHARE))

    @property
    def available(self) -> int:
        """The pieces that may be sent at all."""
        return self._available

    @property
    def is_injected(self) -> bool:
        """Whether every piece is out, or on its way, for the first time."""
        return self._begun == self._all

    def add(self, pieces: int, *, holes: int = 0) -> None:
        """These pieces have been verified too (the image is still being fetched), some of them holes."""
        self._available |= pieces & self._all
        self._begun |= holes & self._all

    def next(self, host: str, now: float, below: int | None = None) -> int | None:
        """The lowest piece that was never sent, or is stuck on its way to another; it is begun.

        None when there is none yet, or no more; nor any that is not `below` a number, if there is one.
        """
        stuck = self._stuck(host, now, below)
        if stuck is not None:
            self._spare -= 1
            self._begin(stuck, host, now)
            return stuck
        fresh = self._fresh(below)
        if not fresh:
            return None
        piece = (fresh & -fresh).bit_length() - 1
        self._begin(piece, host, now)
        return piece

    def has_next(self, host: str, now: float, below: int | None = None) -> bool:
        """Whether `next` would give a piece."""
        return bool(self._fresh(below)) or self._stuck(host, now, below) is not None

    def _fresh(self, below: int | None) -> int:
        fresh = self._available & ~self._begun
        return fresh if below is None else fresh & ((1 << below) - 1)

    def may_send(self, piece: int, host: str, now: float, *, spread_seconds: float) -> bool:
        """Whether to send a piece asked for by name, which is begun when the answer is yes.

        Args:
            piece: which.
            host: who asks.
            now: a monotonic time.
            spread_seconds: how long the first copy gets to reach others before another one leaves.
        """
        if not self._available >> piece & 1:
            return False
        sent = self._sent.get(piece)
        if sent is not None and sent.to != host:
            # the larger the swarm, the longer it takes: each copy gets twice the time of the last
            patience = spread_seconds * 2 ** min(10, max(0, sent.copies - 1))
            if now - sent.at < patience:
                if not self.is_injected or self._spare <= 0:
                    return False
                self._spare -= 1
        self._begin(piece, host, now)
        return True

    def completed(self, piece: int, now: float) -> None:
        """The last byte of the piece has left; its time to spread counts from here."""
        sending = self._sent[piece]
        sending.at = now
        sending.copies += 1
        self._under_way.discard(piece)
        self._seconds = weighted(self._seconds, now - sending.began)

    def failed(self, piece: int, host: str) -> None:
        """The sending broke off; unless another copy left, the piece is next again."""
        sending = self._sent.get(piece)
        if sending is not None and sending.to == host and sending.copies == 0:
            del self._sent[piece]
            self._under_way.discard(piece)
            self._begun &= ~(1 << piece)

    def _begin(self, piece: int, host: str, now: float) -> None:
        self._begun |= 1 << piece
        before = self._sent.get(piece)
        copies = before.copies if before is not None else 0
        self._sent[piece] = _Sending(to=host, began=now, at=now, copies=copies)
        if not copies:
            self._under_way.add(piece)

    def _stuck(self, host: str, now: float, below: int | None) -> int | None:
        if self._seconds is None or self._spare <= 0:
            return None
        late = now - max(MIN_STUCK_SECONDS, STUCK * self._seconds)
        return min(
            (
                piece
                for piece in self._under_way
                if self._sent[piece].began < late
                and self._sent[piece].to != host
                and (below is None or piece < below)
            ),
            default=None,
        )


class UploadSlots:
    """How many pieces a sender has on the wire at once, and how many askers wait.

    Many at once makes each slow: a piece can be shared on only when it is whole. So a sender
    begins with two and adds a slot for each that has left. A sending that takes several times as
    long as others do is to a slow receiver, which sets the pace: it keeps its connection and gives
    its slot to the next, up to `OVERDUE_FACTOR` times as many in all.
    """

    def __init__(self, slots: int, *, queue: int = 0) -> None:
        self._slots = slots
        self._opened = min(slots, FIRST_SLOTS)
        self._queue = queue
        self._waiting = 0
        self._serial = 0
        self._began: dict[int, float] = {}
        self._seconds: float | None = None

    @property
    def active(self) -> int:
        """How many are being sent."""
        return len(self._began)

    def take(self, now: float) -> int | None:
        """Take a slot, if one is free: a ticket to give back."""
        if len(self._began) >= OVERDUE_FACTOR * self._slots:
            return None
        if len(self._began) >= self._opened and self._timely(now) >= self._opened:
            return None
        self._serial += 1
        self._began[self._serial] = now
        return self._serial

    def give_back(self, ticket: int, now: float) -> None:
        """A sending has ended."""
        self._seconds = weighted(self._seconds, now - self._began.pop(ticket))
        self._opened = min(self._slots, self._opened + 1)

    def next_overdue(self, now: float) -> float | None:
        """In how many seconds the next of those being sent loses its slot, if any can."""
        if self._seconds is None:
            return None
        patience = self._patience()
        return min(
            (began + patience - now for began in self._began.values() if began + patience > now),
            default=None,
        )

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

    def _patience(self) -> float:
        return max(MIN_OVERDUE_SECONDS, SLOW * (self._seconds or 0.0))

    def _timely(self, now: float) -> int:
        if self._seconds is None:
            return len(self._began)
        limit = now - self._patience()
        return sum(began > limit for began in self._began.values())


class Pace:
    """How soon the next piece may be asked for under a limit; bursts of a second at most."""

    def __init__(self, bytes_per_second: int) -> None:
        self.bytes_per_second = bytes_per_second
        self._free_at: float | None = None

    def wait_seconds(self, now: float) -> float:
        """0 when a piece may be asked for now."""
        return 0.0 if self._free_at is None else max(0.0, self._free_at - now)

    def spend(self, count: int, now: float) -> None:
        """So many bytes have been asked for."""
        free_at = now if self._free_at is None else max(self._free_at, now - 1.0)
        self._free_at = free_at + count / max(1, self.bytes_per_second)

    def give_back(self, count: int) -> None:
        """So many of them were refused: they may be asked for elsewhere at once."""
        if self._free_at is not None:
            self._free_at -= count / max(1, self.bytes_per_second)


def weighted(mean: float | None, seconds: float) -> float:
    """The exponentially weighted mean, the last weighing 1/4."""
    return seconds if mean is None else mean + (seconds - mean) / 4
