"""What a receiver asks of whom holds whatever the others do, and in whatever order."""

import heapq
import random

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hostler_precache.swarming import receiving, swarm
from hostler_precache.swarming.receiving import Receiver, Request
from hostler_precache.swarming.swarm import News

COUNT = 24
ALL = (1 << COUNT) - 1
PIECES = st.integers(min_value=0, max_value=ALL)
NEIGHBOURS = ("a", "b", "far")


def receiver_of(
    count: int = COUNT, *, have: int = 0, requests: int = 6, seed: int = 1
) -> Receiver:
    return Receiver(
        count, have=have, piece_bytes=1 << 18, requests=requests, rng=random.Random(seed)
    )


class ReceiverMachine(RuleBasedStateMachine):
    """No piece that is had is asked for, nor the same one of many; everybody who fails is left alone."""

    @initialize(have=PIECES, seed=st.integers())
    def start(self, have: int, seed: int) -> None:
        self.now = 0.0
        self.receiver = receiver_of(have=have, seed=seed)
        self.receiver.add("seed", is_seed=True)
        for name in NEIGHBOURS:
            self.receiver.add(name, in_rack=name != "far")
        self.had = have
        self.out: list[Request] = []

    @rule(name=st.sampled_from(NEIGHBOURS), have=PIECES, coming=PIECES)
    def hears(self, name: str, have: int, coming: int) -> None:
        source = self.receiver.find(name)
        assert source is not None
        if not source.is_banned:
            self.receiver.heard(source, News(have=have, coming=coming), self.now)

    @rule(name=st.sampled_from(NEIGHBOURS))
    def loses(self, name: str) -> None:
        source = self.receiver.find(name)
        assert source is not None
        self.receiver.silent(source)

    @rule(seconds=st.floats(min_value=0.0, max_value=5.0))
    def waits(self, seconds: float) -> None:
        rest = self.receiver.rest_seconds(self.now)
        assert 0 < rest <= receiving.SEED_REST_SECONDS + receiving.LONGEST_REST_SECONDS
        self.now += seconds

    @rule()
    def asks(self) -> None:
        while (request := self.receiver.ask(self.now)) is not None:
            source, piece = request.source, request.piece
            assert not source.is_banned
            assert source.not_before <= self.now
            assert len(source.asked) <= receiving.MAX_REQUESTS_PER_SOURCE
            if piece is None:
                assert source.is_seed
                assert not source.is_injected
            else:
                assert not self.had >> piece & 1
                same = [other for other in self.out if other.piece == piece]
                assert all(other.source is not source for other in same)
                if same:  # only the last few, and of no third
                    assert len(same) == 1
                    asked = swarm.bits(one.piece for one in self.out if one.piece is not None)
                    assert asked | self.had == ALL
            self.out.append(request)
        assert len(self.out) <= 6

    @precondition(lambda self: bool(self.out))
    @rule(
        index=st.integers(0, 5),
        end=st.sampled_from(["good", "good", "good", "busy", "bad", "lacks", "fails", "none"]),
        choice=st.integers(0, COUNT - 1),
    )
    def ends(self, index: int, end: str, choice: int) -> None:
        request = self.out.pop(index % len(self.out))
        source = request.source
        match end:
            case "good" | "bad":
                if request.piece is not None or self.receiver.chosen(request, choice):
                    assert request.piece is not None
                    if end == "bad":
                        self.receiver.rejected(source, self.now)
                    else:
                        self.comes(request)
            case "busy":
                self.receiver.busy(request, 0.0, self.now)
            case "none" if request.piece is None:
                self.receiver.injected(source, self.now)
            case "lacks" if request.piece is not None and not source.is_seed:
                self.receiver.lacking(request)
            case _:
                self.receiver.failed(source, self.now)
        self.receiver.ended(request)

    def comes(self, request: Request) -> None:
        assert request.piece is not None
        losers = self.receiver.arrived(request, self.now)
        assert (losers is None) == bool(self.had >> request.piece & 1)
        self.had |= 1 << request.piece
        for loser in losers or ():
            self.out.remove(loser)
            self.receiver.ended(loser)

    @invariant()
    def it_knows_what_it_has_and_what_is_out(self) -> None:
        picker = self.receiver.picker
        assert picker.have == self.had
        out = swarm.bits(one.piece for one in self.out if one.piece is not None)
        assert picker.in_flight == out & ~self.had


TestReceiver = ReceiverMachine.TestCase
TestReceiver.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@given(st.sets(st.sampled_from(NEIGHBOURS), min_size=1), st.integers(0, 1000))
@settings(deadline=None)
def test_what_good_sources_have_is_had_in_the_end(good: set[str], seed: int) -> None:
    receiver, now = receiver_of(seed=seed), 0.0
    for name in NEIGHBOURS:
        source = receiver.add(name, in_rack=name != "far")
        receiver.heard(source, News(have=ALL), now)
    for _ in range(2000):
        while (request := receiver.ask(now)) is not None:
            if request.source.name in good:
                receiver.arrived(request, now)
            else:
                receiver.failed(request.source, now)
            receiver.ended(request)
        if receiver.picker.is_complete:
            return
        now += receiver.rest_seconds(now) + 1e-6
        if good == {"far"}:  # those who fail are gone, with what they said they have
            for name in ("a", "b"):
                gone = receiver.find(name)
                assert gone is not None
                receiver.silent(gone)
    raise AssertionError("it never ended")


def test_the_seeds_choice_is_asked_for_before_anything_of_a_neighbour() -> None:
    receiver = receiver_of()
    receiver.add("seed", is_seed=True)
    receiver.heard(receiver.add("a"), News(have=ALL), 0.0)
    first = receiver.ask(0.0)
    assert first is not None
    assert (first.source.name, first.piece) == ("seed", None)


def test_one_that_has_shown_nothing_yet_is_asked_for_one_piece() -> None:
    receiver = receiver_of()
    receiver.heard(receiver.add("a"), News(have=ALL), 0.0)
    first = receiver.ask(0.0)
    assert first is not None
    assert receiver.ask(0.0) is None
    receiver.arrived(first, 0.1)
    receiver.ended(first)
    assert receiver.ask(0.1) is not None
    assert receiver.ask(0.1) is not None


def test_a_slow_source_is_asked_for_one_piece_at_a_time() -> None:
    count, seconds = 400, {"slow": 5.0, "fast": 0.1, "quick": 0.1}
    receiver, now = receiver_of(count, requests=20), 0.0
    for name in seconds:
        receiver.heard(receiver.add(name), News(have=(1 << count) - 1), now)
    slow = receiver.find("slow")
    assert slow is not None
    out: list[tuple[float, int, Request]] = []
    serial = from_slow = 0
    while not receiver.picker.is_complete:
        while (request := receiver.ask(now)) is not None:
            serial += 1
            heapq.heappush(out, (now + seconds[request.source.name], serial, request))
        if not out:
            now += receiver.rest_seconds(now)
            continue
        now, _, request = heapq.heappop(out)
        from_slow += request.source is slow
        for loser in receiver.arrived(request, now) or ():
            receiver.ended(loser)
            out = [one for one in out if one[2] is not loser]
        receiver.ended(request)
        assert len(slow.asked) <= 1
    assert from_slow <= 0.02 * count
    assert receiver.timeout_seconds(slow) >= 20
    assert receiver.timeout_seconds(receiver.add("new")) >= receiving.TIMEOUT_FLOOR_SECONDS


def test_what_comes_into_the_rack_is_not_asked_for_outside_until_it_had_its_time() -> None:
    receiver = receiver_of()
    near, far = receiver.add("near"), receiver.add("far", in_rack=False)
    receiver.heard(near, News(coming=0b1), 0.0)
    receiver.heard(far, News(have=0b1), 0.0)
    assert receiver.ask(0.1) is None
    request = receiver.ask(receiving.FIRST_COMING_SECONDS)
    assert request is not None
    assert (request.source.name, request.piece) == ("far", 0)


@given(st.integers(0, 5000), st.sets(st.text(max_size=3), min_size=1, max_size=12))
def test_each_of_a_rack_has_a_turn_of_its_own(piece: int, names: set[str]) -> None:
    turns = [swarm.turn(piece, name, names) for name in sorted(names)]
    assert sorted(turns) == list(range(len(names)))


def test_the_first_turns_are_shared_out() -> None:
    names = [f"host-{number}" for number in range(8)]
    first = [swarm.turn(piece, "host-3", names) == 0 for piece in range(1024)]
    assert 100 < sum(first) < 156


def test_a_piece_of_the_rack_is_fetched_in_the_rack() -> None:
    receiver = receiver_of()
    receiver.heard(receiver.add("far", in_rack=False), News(have=0b11), 0.0)
    receiver.heard(receiver.add("near"), News(have=0b01), 0.0)
    asked = {}
    while (request := receiver.ask(1.0)) is not None:
        asked[request.piece] = request.source.name
    assert asked == {0: "near", 1: "far"}


def test_what_comes_into_the_rack_is_told_on_once_and_by_nobody_to_whom_it_comes() -> None:
    receiver = receiver_of()
    near, other = receiver.add("near"), receiver.add("other")
    far = receiver.add("far", in_rack=False)
    assert receiver.heard(near, News(coming=0b011), 0.0) == 0b011
    assert receiver.heard(other, News(coming=0b111), 0.1) == 0b100
    assert receiver.heard(far, News(coming=0b1000), 0.1) == 0
    receiver.heard(far, News(have=0b10000), 10.0)
    request = receiver.ask(20.0)
    assert request is not None
    assert request.piece == 4
    assert receiver.heard(near, News(coming=0b10000), 20.1) == 0
    receiver.lacking(request)
    receiver.ended(request)
    # its own claim came back to it: it does not wait for itself
    assert receiver.heard(near, News(coming=0b10000), 20.2) == 0
    receiver.heard(far, News(have=0b10000), 20.3)
    again = receiver.ask(20.3)
    assert again is not None
    assert again.piece == 4


@given(
    seconds=st.floats(0.01, 20.0),
    have=PIECES,
    coming=PIECES,
)
def test_the_rack_waits_no_longer_than_a_piece_may_take(
    seconds: float, have: int, coming: int
) -> None:
    receiver = receiver_of(requests=COUNT)
    near, far = receiver.add("near"), receiver.add("far", in_rack=False)
    receiver.heard(near, News(coming=coming), 0.0)
    receiver.heard(far, News(have=have), 0.0)
    asked, now = 0, seconds
    for _ in range(4 * COUNT):
        while (request := receiver.ask(now)) is not None:
            assert request.source is far
            assert request.piece is not None
            if now < receiving.FIRST_COMING_SECONDS:
                assert not coming >> request.piece & 1
            asked |= 1 << request.piece
            receiver.lacking(request)
            receiver.ended(request)
        now += receiver.rest_seconds(now)
    assert asked == have


def test_who_repeats_that_pieces_are_coming_into_the_rack_delays_each_but_once() -> None:
    receiver = receiver_of(requests=COUNT)
    liar, far = receiver.add("liar"), receiver.add("far", in_rack=False)
    receiver.heard(far, News(have=(1 << COUNT) - 1), 0.0)
    receiver.heard(liar, News(coming=(1 << COUNT) - 1), 0.0)
    waited = receiving.FIRST_COMING_SECONDS + 0.1
    assert receiver.ask(waited - 0.2) is None
    for _ in range(3):
        assert receiver.heard(liar, News(coming=(1 << COUNT) - 1), waited) == 0
    request = receiver.ask(waited)
    assert request is not None
    assert request.source is far


def test_one_that_has_plenty_for_us_is_asked_for_one_piece_more() -> None:
    receiver, now = receiver_of(400, requests=10), 0.0
    for name in "abcdefghijkl":
        receiver.add(name)
    source = receiver.find("a")
    assert source is not None
    receiver.heard(source, News(have=(1 << receiving.PLENTY) - 1), now)
    first = receiver.ask(now)
    assert first is not None
    receiver.arrived(first, 0.1)
    receiver.ended(first)
    assert receiver.ask(0.1) is not None
    assert receiver.ask(0.1) is None  # fifteen are not plenty
    receiver.heard(source, News(have=(1 << 400) - 1), 0.1)
    assert receiver.ask(0.1) is not None
    assert receiver.ask(0.1) is None


def test_the_endgame_asks_nobody_outside_the_rack_for_a_second_copy() -> None:
    receiver = receiver_of(have=ALL & ~1)
    receiver.heard(receiver.add("near"), News(have=ALL), 0.0)
    receiver.heard(receiver.add("far", in_rack=False), News(have=ALL), 0.0)
    assert receiver.ask(0.0) is not None
    assert receiver.ask(100.0) is None


def test_a_neighbour_that_rests_and_has_nothing_for_us_wakes_nobody() -> None:
    receiver = receiver_of()
    neighbour = receiver.add("a")
    receiver.heard(neighbour, News(), 0.0)
    receiver.failed(neighbour, 0.0)
    assert receiver.rest_seconds(0.0) == 1.0
    receiver.heard(neighbour, News(have=1), 0.0)
    receiver.failed(neighbour, 0.0)
    assert receiver.rest_seconds(0.0) == receiving.FIRST_REST_SECONDS * 2


def test_a_last_piece_that_is_late_wakes_who_waits_for_it() -> None:
    receiver = receiver_of(have=ALL & ~0b11)
    for name in "ab":
        receiver.heard(receiver.add(name), News(have=ALL), 0.0)
    first = receiver.ask(0.0)
    assert first is not None
    receiver.arrived(first, 0.2)
    receiver.ended(first)
    last = receiver.ask(0.25)
    assert last is not None
    assert receiver.ask(0.25) is None
    woken_at = 0.25 + receiver.rest_seconds(0.25)
    assert woken_at <= 0.45 + 1e-6  # what is usual is 0.2 s
    assert receiver.ask(woken_at + receiving.MIN_REST_SECONDS) is not None


def test_the_loser_of_the_endgame_is_named_when_the_piece_is_there() -> None:
    receiver = receiver_of(have=ALL & ~1)
    receiver.heard(receiver.add("a"), News(have=ALL), 0.0)
    receiver.heard(receiver.add("b"), News(have=ALL), 0.0)
    first = receiver.ask(0.0)
    assert first is not None
    assert receiver.ask(0.0) is None  # it is not late yet
    second = receiver.ask(1.0)
    assert second is not None
    assert first.source is not second.source
    assert receiver.ask(2.0) is None
    assert receiver.arrived(second, 2.0) == [first]
    receiver.ended(second)
    receiver.ended(first)
    assert receiver.picker.is_complete


def test_three_bad_pieces_ban_a_neighbour_and_rest_a_seed() -> None:
    receiver = receiver_of()
    seed, peer = receiver.add("seed", is_seed=True), receiver.add("a")
    receiver.heard(peer, News(have=ALL), 0.0)
    for _ in range(receiving.BAD_PIECES_TO_BAN):
        receiver.rejected(seed, 1.0)
        receiver.rejected(peer, 1.0)
    assert peer.is_banned
    assert not seed.is_banned
    assert receiver.ask(1.0) is None
    request = receiver.ask(1.0 + receiving.SEED_REST_SECONDS)
    assert request is not None
    assert request.source is seed


def test_whose_turn_it_is_not_waits_before_it_brings_a_piece_into_the_rack() -> None:
    receiver = receiver_of()
    receiver.add("near")
    receiver.heard(receiver.add("far", in_rack=False), News(have=ALL), 0.0)
    first = receiver.ask(0.0)
    assert first is not None
    assert first.piece is not None
    assert swarm.turn(first.piece, "", ["near"]) == 0
    receiver.heard(receiver.add("further", in_rack=False), News(have=ALL), 0.0)
    second = receiver.ask(0.0)
    assert second is not None
    assert second.piece is not None
    assert swarm.turn(second.piece, "", ["near"]) == 0
