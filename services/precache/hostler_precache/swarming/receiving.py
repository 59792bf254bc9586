"""What one receiver asks of whom, and when: its side of the swarm's policy, and no I/O.

Driven by `download` with real answers and by the simulator with made-up ones, so nothing here reads
a clock or draws a random number that is not an argument. `swarm.Picker` chooses among the pieces of
one neighbour; this chooses the neighbour, and remembers how each one behaves.
"""

import heapq
import math
import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from hostler_precache.swarming import swarm
from hostler_precache.swarming.swarm import News, Picker

BAD_PIECES_TO_BAN: Final = 3
SEED_REST_SECONDS: Final = 30.0
FIRST_REST_SECONDS: Final = 0.5
LONGEST_REST_SECONDS: Final = 30.0
FIRST_BUSY_SECONDS: Final = 0.03
LONGEST_BUSY_SECONDS: Final = 1.0
REFUSED_PIECE_SECONDS: Final = 0.5
FIRST_COMING_SECONDS: Final = 2.0
# until a source has shown how fast it is: the request may wait in its queue behind as many others
TIMEOUT_FLOOR_SECONDS: Final = 5.0
SLOWEST_BYTES_PER_SECOND: Final = 1 << 20
MIN_TURN_SECONDS: Final = 0.1
# so many times what is usual a piece gets to come into the rack before another host fetches it
COMING: Final = 8.0
MIN_HEARD: Final = 3
MIN_REST_SECONDS: Final = 0.001
MIN_REQUESTS_PER_SOURCE: Final = 1
PLENTY: Final = 16
MAX_REQUESTS_PER_SOURCE: Final = 4


@dataclass(slots=True, eq=False)
class Source:
    """A seed or a neighbour: what is asked of it, and how it has behaved."""

    name: str
    is_seed: bool
    in_rack: bool = True
    asked: set["Request"] = field(default_factory=set)
    failures: int = 0
    refusals: int = 0
    bad_pieces: int = 0
    is_banned: bool = False
    is_injected: bool = False
    is_heard: bool = False
    not_before: float = 0.0
    mean_seconds: float | None = None


@dataclass(slots=True, eq=False)
class Request:
    """One piece asked of one source; `piece` is None while that is the seed's choice."""

    source: Source
    piece: int | None
    at: float


class Receiver:
    """The decisions of one host about one image.

    Invariants: no piece is asked for that is had, nor of two sources before the endgame; a banned
    source is never asked again.
    """

    def __init__(
        self,
        count: int,
        *,
        have: int,
        piece_bytes: int,
        requests: int,
        rng: random.Random,
        name: str = "",
    ) -> None:
        """A receiver that knows nobody yet.

        Args:
            count: pieces in the image.
            have: those it has.
            piece_bytes: of each piece, but the last.
            requests: how many are out at once, most of which wait at their senders.
            rng: breaks ties.
            name: its own, as its neighbours know it.
        """
        self.picker = Picker(count, have=have)
        self._piece_bytes = piece_bytes
        self._requests = requests
        self._rng = rng
        self._name = name
        self._heard_outside = 0
        self._importable = self._claimed = self._waited = 0
        self._held: list[tuple[float, int]] = []
        self._sources: dict[str, Source] = {}
        self._out: set[Request] = set()
        self._refused: dict[int, float] = {}
        self._coming: deque[tuple[float, int]] = deque()
        self._usual_seconds = 0.0
        self._orphans_from = math.inf
        self._most = MIN_REQUESTS_PER_SOURCE

    # --- whom there is

    @property
    def sources(self) -> Iterable[Source]:
        """All that are known, the banned too."""
        return self._sources.values()

    def find(self, name: str) -> Source | None:
        """The source of that name."""
        return self._sources.get(name)

    def add(self, name: str, *, is_seed: bool = False, in_rack: bool = True) -> Source:
        """The source may be asked from now on."""
        source = self._sources[name] = Source(name=name, is_seed=is_seed, in_rack=in_rack)
        self._share_out()
        return source

    def drop(self, name: str) -> None:
        """The source is not asked any more; what it was asked for may still come."""
        self.silent(self._sources.pop(name))
        self._share_out()

    def _share_out(self) -> None:
        """As many requests to each source as make the whole; more than one only where there are few."""
        share = math.ceil(self._requests / max(1, len(self._sources)))
        self._most = min(MAX_REQUESTS_PER_SOURCE, max(MIN_REQUESTS_PER_SOURCE, share))

    # --- what they say of themselves

    def heard(self, source: Source, news: News, now: float) -> int:
        """A neighbour has told what it has, and what is on its way into the rack from outside.

        The pieces of the latter that were not known of: to be told on, since not all of a rack are neighbours.
        """
        if not source.is_heard:
            source.is_heard, source.failures, source.not_before = True, 0, 0.0
        if news.have and not source.in_rack:
            self._take_turns(news.have, now)
        if news.have:
            self.picker.neighbour_has(source.name, news.have, in_rack=source.in_rack)
        if not news.coming or not source.in_rack:
            return 0
        # what it has told itself comes back to it; and each is waited for once: who told it may have lied
        new = self.picker.coming(news.coming & ~(self._claimed | self._waited))
        self._waited |= new
        if new:
            patience = COMING * self._usual_seconds or FIRST_COMING_SECONDS
            self._coming.append((now + patience, new))
        return new

    def _take_turns(self, pieces: int, now: float) -> None:
        """Who of the rack may fetch these from outside first, and who if that one does not.

        Without turns, all of them would at once, since all hear of it at once.
        """
        new = pieces & ~self._heard_outside
        self._heard_outside |= new
        names = [one.name for one in self.sources if one.in_rack and not one.is_seed]
        step = max(MIN_TURN_SECONDS, self._usual_seconds / 4)
        turns: dict[int, int] = {}
        for piece in swarm.members(new):
            turn = swarm.turn(piece, self._name, names)
            turns[turn] = turns.get(turn, 0) | 1 << piece
        for turn, some in turns.items():
            heapq.heappush(self._held, (now + turn * step, some))

    def silent(self, source: Source) -> None:
        """A neighbour's piece map has ended: it is not known any more what it has."""
        source.is_heard = False
        self.picker.forget_neighbour(source.name)

    # --- what to ask

    def ask(self, now: float) -> Request | None:
        """The next request, which counts as out from now on; None when there is none to make."""
        if len(self._out) >= self._requests:
            return None
        while self._coming and self._coming[0][0] <= now:
            self.picker.not_coming(self._coming.popleft()[1])
        while self._held and self._held[0][0] <= now:
            self._importable |= heapq.heappop(self._held)[1]
        chosen = self._choose(now)
        if chosen is None:
            return None
        source, piece = chosen
        request = Request(source, piece, now)
        self._out.add(request)
        source.asked.add(request)
        if piece is not None and not source.in_rack:
            self._claimed |= 1 << piece
        return request

    @property
    def is_hungry(self) -> bool:
        """Whether it would ask for more, if there were anything to ask for."""
        return len(self._out) < self._requests

    def rest_seconds(self, now: float) -> float:
        """When there may be something to ask although nothing has happened: at most a second."""
        soonest, maps, missing = now + 1.0, self.picker.maps, self.picker.missing
        for source in self._sources.values():
            # of whoever has nothing for us it does not matter
            if now < source.not_before < soonest and (
                source.is_seed or maps.get(source.name, 0) & missing
            ):
                soonest = source.not_before
        for at in self._refused.values():
            if now < at < soonest:
                soonest = at
        if self.picker.is_endgame:  # what is late then is asked of a second source
            late = (one.at + self._usual_seconds for one in self._out)
            soonest = min((at for at in late if now <= at < soonest), default=soonest)
        if self._coming:
            soonest = min(soonest, max(now, self._coming[0][0]))
        if self._held:
            soonest = min(soonest, max(now, self._held[0][0]))
        return max(soonest - now, MIN_REST_SECONDS)

    def timeout_seconds(self, source: Source) -> float:
        """How long to wait for a piece of the source: four times what is usual with it."""
        floor = (
            TIMEOUT_FLOOR_SECONDS + self._requests * self._piece_bytes / SLOWEST_BYTES_PER_SECOND
        )
        return max(floor, swarm.SLOW * (source.mean_seconds or 0.0))

    def _choose(self, now: float) -> tuple[Source, int | None] | None:
        picker, maps, usual, most = self.picker, self.picker.maps, self._usual_seconds, self._most
        missing, slow = picker.missing, swarm.SLOW * usual
        seed: Source | None = None
        best: Source | None = None
        best_seconds, ties, is_best_outside = math.inf, 0, False
        # one pass and few calls: this runs for each piece, a thousand times in a big image
        for source in self._sources.values():
            if source.not_before > now or source.is_banned:
                continue
            asked, mean = len(source.asked), source.mean_seconds
            # one request until it has shown that it is not slow
            if asked and (mean is None or asked > most):
                continue
            if source.is_seed:
                if asked >= most:
                    continue
                if not source.is_injected and missing:
                    return source, None
                seed = seed or source
                continue
            wanted = maps.get(source.name, 0) & missing
            if not wanted or (mean is not None and asked and mean > slow):
                continue
            # so much of it is for us that we are behind: few others have that, and one more may be asked of it
            if asked == most and (most >= MAX_REQUESTS_PER_SOURCE or wanted.bit_count() < PLENTY):
                continue
            is_outside = not source.in_rack
            if is_outside and not picker.importable(source.name, self._importable):
                continue
            # first what the whole rack waits for; then whoever is likely to be done soonest
            seconds = (asked + 1) * (usual if mean is None else mean)
            if is_outside != is_best_outside:
                if is_best_outside:
                    continue
                is_best_outside, best_seconds = True, math.inf
            if seconds < best_seconds:
                best, best_seconds, ties = source, seconds, 1
            elif seconds == best_seconds:
                ties += 1
                if self._rng.random() * ties < 1.0:
                    best = source
        if seed is not None and now >= self._orphans_from:
            # what a host that is gone had alone: it has to reach all, so it comes first
            piece = self._choose_orphan(now)
            if piece is not None:
                picker.started(piece)
                return seed, piece
        if best is not None:
            among = self._importable if is_best_outside else -1
            return best, picker.pick(best.name, self._rng, among=among)
        if seed is not None:
            piece = self._choose_rare(now)
            if piece is not None:
                picker.started(piece)
                return seed, piece
        return self._choose_again(now) if picker.is_endgame else None

    def _choose_orphan(self, now: float) -> int | None:
        # a piece of the seed's choice that is still on its way would look like an orphan
        if any(request.piece is None for request in self._out):
            return None
        if self._refused:
            self._refused = {piece: at for piece, at in self._refused.items() if at > now}
        orphans = self.picker.orphans() & ~swarm.bits(self._refused)
        return swarm.choose(orphans, self._rng) if orphans else None

    def _choose_rare(self, now: float) -> int | None:
        """What to ask of a seed that has sent each piece once: it has an uplink to spare."""
        orphan = self._choose_orphan(now)
        if orphan is not None or any(request.piece is None for request in self._out):
            return orphan
        # of few neighbours, what one has is not rare
        if sum(one.is_heard for one in self._sources.values()) >= MIN_HEARD:
            rare = self.picker.rare() & ~swarm.bits(self._refused)
            return swarm.choose(rare, self._rng) if rare else None
        return None

    def _choose_again(self, now: float) -> tuple[Source, int] | None:
        """The endgame: one of the last pieces, which is late, from a second source of the rack."""
        in_time = swarm.bits(
            request.piece
            for request in self._out
            if request.piece is not None and now - request.at <= self._usual_seconds
        )
        # from outside each would cross into the rack twice
        ready = [one for one in self._sources.values() if one.in_rack and not one.is_seed]
        ready.sort(key=lambda one: (len(one.asked) + 1) * (one.mean_seconds or 0.0))
        for source in ready:
            if source.is_banned or source.not_before > now or len(source.asked) >= self._most:
                continue
            mine = swarm.bits(one.piece for one in source.asked if one.piece is not None)
            piece = self.picker.pick_again(source.name, self._rng, but=in_time | mine)
            if piece is not None:
                return source, piece
        return None

    # --- what became of it

    def chosen(self, request: Request, piece: int) -> bool:
        """The seed has chosen; whether the piece is of any use."""
        if not self.picker.is_wanted(piece):
            return False
        request.piece = piece
        self.picker.started(piece)
        return True

    def arrived(self, request: Request, now: float) -> list[Request] | None:
        """The piece is verified and stored; the other requests for it, which may be given up.

        None when it was had already: the other one of two was faster by a moment.
        """
        assert request.piece is not None
        self._took(request.source, now - request.at)
        if self.picker.have >> request.piece & 1:
            return None
        is_twice = self.picker.is_twice(request.piece)
        self.picker.received(request.piece)
        if not is_twice:
            return []
        return [
            other for other in self._out if other.piece == request.piece and other is not request
        ]

    def ended(self, request: Request) -> None:
        """The request is not out any more, whatever came of it."""
        self._out.discard(request)
        request.source.asked.discard(request)
        piece = request.piece
        if piece is not None and not self.picker.have >> piece & 1:
            self.picker.failed(piece)

    def injected(self, source: Source, now: float) -> None:
        """The seed has sent each piece once: it chooses no more.

        When the last of them have been told of, what nobody has is lost.
        """
        source.is_injected = True
        self._orphans_from = now + (swarm.SLOW * self._usual_seconds or FIRST_COMING_SECONDS)

    def busy(self, request: Request, retry_after_seconds: float, now: float) -> None:
        """The source has no slot, or the piece has just left a seed for somebody else."""
        source, piece = request.source, request.piece
        if source.is_seed and piece is not None:
            self._refused[piece] = now + REFUSED_PIECE_SECONDS
            return
        rest = min(LONGEST_BUSY_SECONDS, FIRST_BUSY_SECONDS * 2**source.refusals)
        source.refusals = min(source.refusals + 1, 16)
        source.not_before = now + max(retry_after_seconds, rest)

    def lacking(self, request: Request) -> None:
        """The neighbour does not have the piece after all."""
        assert request.piece is not None
        self.picker.neighbour_lacks(request.source.name, request.piece)

    def grew(self) -> None:
        """More of the image has come to its seeds: they are back, and have something to send."""
        for source in self._sources.values():
            if source.is_seed and source.bad_pieces < BAD_PIECES_TO_BAN:
                source.failures = source.refusals = 0
                source.not_before = 0.0

    def failed(self, source: Source, now: float) -> None:
        """The source did not answer as it should: it is left alone, longer each time."""
        rest = min(LONGEST_REST_SECONDS, FIRST_REST_SECONDS * 2**source.failures)
        source.failures = min(source.failures + 1, 16)
        source.not_before = now + rest

    def rejected(self, source: Source, now: float) -> None:
        """The source sent what is not the piece; after a few times it is banned.

        But a seed is left alone for a while: there may be no other, and it may recover.
        """
        source.bad_pieces += 1
        if source.bad_pieces < BAD_PIECES_TO_BAN:
            return
        if source.is_seed:
            source.not_before = now + SEED_REST_SECONDS
            return
        source.is_banned = True
        self.silent(source)

    def _took(self, source: Source, seconds: float) -> None:
        source.failures = source.refusals = 0
        source.mean_seconds = swarm.weighted(source.mean_seconds, seconds)
        # of all sources together: a slow one is heard of seldom, and so weighs little
        usual = self._usual_seconds
        self._usual_seconds = usual + (seconds - usual) / 16 if usual else seconds
