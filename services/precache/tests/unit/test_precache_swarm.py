"""The decisions of the swarm hold whatever the order of events."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hostler_precache.swarming import swarm

PIECES = st.integers(min_value=0, max_value=2**40 - 1)


@given(st.sets(st.integers(min_value=0, max_value=500)))
def test_a_set_of_pieces_gives_back_its_members(pieces: set[int]) -> None:
    assert list(swarm.members(swarm.bits(pieces))) == sorted(pieces)


@given(st.sets(st.integers(min_value=0, max_value=200), min_size=1), st.randoms())
def test_choose_returns_a_member(pieces: set[int], rng: random.Random) -> None:
    assert swarm.choose(swarm.bits(pieces), rng) in pieces


def test_choose_prefers_nobody() -> None:
    rng = random.Random(7)
    pieces = [0, 1, 63, 64, 900]
    drawn = [swarm.choose(swarm.bits(pieces), rng) for _ in range(5000)]
    assert all(800 < drawn.count(piece) < 1200 for piece in pieces)


@given(PIECES, st.integers(min_value=40, max_value=90))
def test_a_piece_map_comes_back_from_the_wire_as_it_was(pieces: int, count: int) -> None:
    assert swarm.from_hex(swarm.to_hex(pieces, count), count) == pieces


@pytest.mark.parametrize("text", ["", "0", "000", "-1", "+1", "1_", "0x", "zz", " 1", "20"])
def test_a_bad_piece_map_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        swarm.from_hex(text, 5)


class PickerMachine(RuleBasedStateMachine):
    """Whatever happens, the picker picks what is missing and the neighbour has."""

    count = 40

    @initialize(have=PIECES, seed=st.integers())
    def start(self, have: int, seed: int) -> None:
        self.have = set(swarm.members(have))
        self.flying: set[int] = set()
        self.twice: set[int] = set()
        self.coming: set[int] = set()
        self.maps: dict[str, set[int]] = {}
        self.rng = random.Random(seed)
        self.picker = swarm.Picker(self.count, have=have, window=10)

    @rule(name=st.sampled_from("abc"), pieces=PIECES)
    def hears(self, name: str, pieces: int) -> None:
        self.maps.setdefault(name, set()).update(swarm.members(pieces))
        self.picker.neighbour_has(name, pieces, in_rack=name != "c")

    @rule(pieces=PIECES, is_coming=st.booleans())
    def waits_for(self, pieces: int, is_coming: bool) -> None:
        if is_coming:
            # what the rack has, or is had or in flight here, is not waited for
            known = self.have | self.flying | self.coming
            known |= self.maps.get("a", set()) | self.maps.get("b", set())
            new = set(swarm.members(pieces)) - known
            assert set(swarm.members(self.picker.coming(pieces))) == new
            self.coming |= new
        else:
            self.coming -= set(swarm.members(pieces))
            self.picker.not_coming(pieces)

    @rule(name=st.sampled_from("abc"))
    def loses(self, name: str) -> None:
        self.maps.pop(name, None)
        self.picker.forget_neighbour(name)

    @rule(name=st.sampled_from("abc"), piece=st.integers(min_value=0, max_value=39))
    def is_refused(self, name: str, piece: int) -> None:
        self.maps.get(name, set()).discard(piece)
        self.picker.neighbour_lacks(name, piece)

    @rule(name=st.sampled_from("abc"))
    def picks(self, name: str) -> None:
        wanted = self.maps.get(name, set()) - self.have - self.flying
        if name == "c":  # outside the rack: only what is not in it, and does not come
            wanted -= self.maps.get("a", set()) | self.maps.get("b", set()) | self.coming
        piece = self.picker.pick(name, self.rng)
        if piece is None:
            assert not wanted
            return
        assert piece in wanted
        first = min(set(range(self.count)) - self.have)
        near = {other for other in wanted if other < first + 10} or wanted
        copies = {other: sum(other in pieces for pieces in self.maps.values()) for other in near}
        assert copies[piece] == min(copies.values())
        self.flying.add(piece)

    @rule(name=st.sampled_from("abc"), but=PIECES)
    def picks_again(self, name: str, but: int) -> None:
        piece = self.picker.pick_again(name, self.rng, but=but)
        if piece is None:
            return
        assert self.have | self.flying == set(range(self.count))
        assert len(self.flying) <= 2 * swarm.DEFAULT_SLOTS
        assert piece in self.flying & self.maps[name] - self.twice
        assert not but >> piece & 1
        self.twice.add(piece)

    @rule(good=st.booleans())
    def lands(self, good: bool) -> None:
        if self.flying:
            piece = self.flying.pop()
            if good:
                self.have.add(piece)
                self.picker.received(piece)
            else:
                self.picker.failed(piece)
                if piece in self.twice:  # the other request for it goes on
                    self.flying.add(piece)
            self.twice.discard(piece)

    @invariant()
    def it_knows_what_it_has_and_what_nobody_has(self) -> None:
        assert set(swarm.members(self.picker.have)) == self.have
        anywhere = set().union(*self.maps.values())
        orphans = set(range(self.count)) - self.have - self.flying - anywhere
        assert set(swarm.members(self.picker.orphans())) == orphans
        copies = [sum(piece in had for had in self.maps.values()) for piece in range(self.count)]
        missing = set(range(self.count)) - self.have - self.flying
        rare = {piece for piece in missing if copies[piece] <= 1}
        assert set(swarm.members(self.picker.rare())) == rare
        assert self.picker.is_complete == (len(self.have) == self.count)


TestPicker = PickerMachine.TestCase
TestPicker.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(pieces=st.sets(st.integers(0, 199), min_size=1), seed=st.integers(0, 99))
def test_one_of_the_set_is_chosen_however_many_there_are(pieces: set[int], seed: int) -> None:
    assert swarm.choose(swarm.bits(pieces), random.Random(seed)) in pieces


@pytest.mark.parametrize("count", [2, swarm.FEW, swarm.FEW + 2, 60])
def test_each_piece_is_as_likely_as_another(count: int) -> None:
    rng, drawn = random.Random(1), Counter[int]()
    pieces = swarm.bits(range(0, 3 * count, 3))
    for _ in range(200 * count):
        drawn[swarm.choose(pieces, rng)] += 1
    assert sorted(drawn) == list(range(0, 3 * count, 3))
    assert 130 < min(drawn.values()) <= max(drawn.values()) < 270


def test_ties_are_broken_at_random() -> None:
    firsts = set()
    for seed in range(40):
        picker = swarm.Picker(64)
        picker.neighbour_has("a", 2**64 - 1)
        firsts.add(picker.pick("a", random.Random(seed)))
    assert len(firsts) > 15


@given(
    asks=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2)), max_size=80),
    count=st.integers(min_value=0, max_value=20),
)
def test_the_seed_sends_each_piece_once_in_file_order(
    asks: list[tuple[str, int]], count: int
) -> None:
    seed = swarm.SeedPolicy(count)
    given_out = []
    for now, (host, _) in enumerate(asks):
        piece = seed.next(host, float(now))
        if piece is not None:
            seed.completed(piece, float(now))
            given_out.append(piece)
    assert given_out == list(range(min(count, len(asks))))
    assert seed.is_injected == (len(asks) >= count)


def test_a_sending_that_broke_off_makes_the_piece_next_again() -> None:
    seed = swarm.SeedPolicy(3)
    assert [seed.next("a", 0.0), seed.next("b", 0.0)] == [0, 1]
    seed.failed(0, "a")
    assert [seed.next("b", 1.0), seed.next("b", 1.0), seed.next("b", 1.0)] == [0, 2, None]


def test_a_break_does_not_bring_back_a_piece_that_has_left_once() -> None:
    seed = swarm.SeedPolicy(1)
    assert seed.next("a", 0.0) == 0
    seed.completed(0, 1.0)
    assert seed.may_send(0, "a", 2.0, spread_seconds=5)
    seed.failed(0, "a")
    assert seed.is_injected
    assert seed.next("b", 3.0) is None


def test_a_second_copy_leaves_only_when_the_first_had_time_to_spread() -> None:
    seed = swarm.SeedPolicy(2)
    assert seed.next("a", 0.0) == 0
    seed.completed(0, 10.0)
    assert not seed.may_send(0, "b", 11.0, spread_seconds=5)
    assert seed.may_send(0, "a", 11.0, spread_seconds=5)
    seed.completed(0, 11.0)
    assert seed.may_send(0, "b", 21.0, spread_seconds=5)
    assert not seed.may_send(0, "c", 21.5, spread_seconds=5)


def test_a_piece_that_is_not_verified_is_not_sent() -> None:
    seed = swarm.SeedPolicy(4, available=0b0010)
    assert not seed.may_send(0, "a", 0.0, spread_seconds=0)
    assert seed.next("a", 0.0) == 1
    assert seed.next("a", 0.0) is None
    seed.add(0b1101)
    assert [seed.next("a", 0.0) for _ in range(4)] == [0, 2, 3, None]


def test_slots_and_places_are_bounded() -> None:
    slots = swarm.UploadSlots(2, queue=1)
    first, second = slots.take(0.0), slots.take(0.0)
    assert first is not None
    assert second is not None
    assert slots.take(0.0) is None
    assert [slots.enqueue(), slots.enqueue()] == [True, False]
    slots.give_back(first, 1.0)
    slots.dequeue()
    assert slots.take(1.0) is not None
    assert [slots.enqueue(), slots.active] == [True, 2]


def test_a_sender_begins_with_two_and_opens_its_slots_one_by_one() -> None:
    slots = swarm.UploadSlots(4)
    taken = [slots.take(0.0), slots.take(0.0)]
    assert slots.take(0.0) is None
    for now in (1.0, 2.0, 3.0):
        ticket = taken.pop(0)
        assert ticket is not None
        slots.give_back(ticket, now)
        while (more := slots.take(now)) is not None:
            taken.append(more)
    assert slots.active == 4


def test_a_slow_receiver_keeps_its_connection_and_loses_its_slot() -> None:
    slots = swarm.UploadSlots(1)
    for now in range(5):
        ticket = slots.take(float(now))
        assert ticket is not None
        slots.give_back(ticket, now + 0.5)
    assert slots.take(10.0) is not None  # to the slow one
    assert slots.take(11.0) is None
    overdue = slots.next_overdue(11.0)
    assert overdue is not None
    assert slots.take(11.0 + overdue + 0.001) is not None


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 5)), max_size=100), st.integers(1, 5))
def test_there_are_never_more_sendings_than_slots_and_overdue_ones(
    steps: list[tuple[bool, float]], count: int
) -> None:
    slots = swarm.UploadSlots(count)
    now, tickets = 0.0, []
    for takes, seconds in steps:
        now += seconds
        if takes:
            ticket = slots.take(now)
            if ticket is not None:
                tickets.append(ticket)
        elif tickets:
            slots.give_back(tickets.pop(0), now)
        assert slots.active == len(tickets) <= swarm.OVERDUE_FACTOR * count


@given(st.integers(0, 300), st.integers(0, 2**300 - 1))
def test_the_coverage_has_a_digit_for_each_part(count: int, pieces: int) -> None:
    pieces &= (1 << count) - 1
    said = swarm.coverage(pieces, count, 64)
    assert len(said) == (64 if count else 0)
    assert (set(said) <= {"f"}) == (pieces.bit_count() == count)
    if not pieces:
        assert set(said) <= {"0"}


@given(
    st.integers(1, 10**7),
    st.lists(
        st.tuples(st.floats(0, 3), st.integers(1, 10**6), st.booleans()), min_size=1, max_size=60
    ),
)
def test_a_pace_is_kept_but_for_a_burst(limit: int, asks: list[tuple[float, int, bool]]) -> None:
    pace, now, total = swarm.Pace(limit), 0.0, 0
    for pause, count, is_refused in asks:
        now += pause
        now += pace.wait_seconds(now)
        assert pace.wait_seconds(now) <= 1e-6 * max(1.0, now)
        assert total <= limit * (now + 1.0) * (1 + 1e-6) + 1
        pace.spend(count, now)
        if is_refused:
            pace.give_back(count)
        else:
            total += count


def test_what_is_given_back_may_be_spent_at_once() -> None:
    pace = swarm.Pace(1000)
    pace.spend(5000, 0.0)
    assert pace.wait_seconds(0.0) == 5.0
    pace.give_back(5000)
    assert pace.wait_seconds(0.0) == 0.0


def test_when_each_piece_is_out_a_few_copies_leave_at_once() -> None:
    seed = swarm.SeedPolicy(100)
    for now in range(100):
        piece = seed.next("a", float(now))
        assert piece is not None
        seed.completed(piece, float(now))
    granted = [seed.may_send(piece, "b", 99.0, spread_seconds=1000) for piece in range(10)]
    assert granted.count(True) == 3


def test_a_piece_that_is_stuck_on_its_way_goes_to_another_who_asks() -> None:
    seed = swarm.SeedPolicy(10)
    assert seed.next("slow", 0.0) == 0
    for now in (0.1, 0.2, 0.3):
        piece = seed.next("fast", now)
        assert piece is not None
        seed.completed(piece, now + 0.05)
    assert seed.next("slow", 5.0) == 4  # its own is not given to it again
    assert seed.next("fast", 5.0) == 0


@given(st.integers(0, 40), st.integers(0, 2**40 - 1))
def test_a_piece_of_zeros_is_never_sent_of_the_seeds_choice(count: int, holes: int) -> None:
    seed = swarm.SeedPolicy(count, holes=holes)
    sent = []
    while (piece := seed.next("a", 0.0)) is not None:
        sent.append(piece)
    assert sent == [piece for piece in range(count) if not holes >> piece & 1]
    assert seed.is_injected


def test_each_further_copy_has_to_wait_twice_as_long() -> None:
    seed = swarm.SeedPolicy(1)
    assert seed.next("a", 0.0) == 0
    seed.completed(0, 0.0)
    assert seed.may_send(0, "b", 0.0, spread_seconds=1)  # the one to spare
    seed.completed(0, 0.0)
    granted = []
    for tenth in range(200):
        if seed.may_send(0, f"host-{tenth}", tenth / 10, spread_seconds=1):
            seed.completed(0, tenth / 10)
            granted.append(tenth / 10)
    assert granted == [2.0, 6.0, 14.0]


def test_the_rarest_piece_goes_first() -> None:
    picker = swarm.Picker(8, window=8)
    for name, pieces in (("a", 0b1111), ("b", 0b1110), ("c", 0b1100), ("d", 0b1000)):
        picker.neighbour_has(name, pieces)
    rng = random.Random(1)
    assert [picker.pick("a", rng) for _ in range(5)] == [0, 1, 2, 3, None]
