"""Prices applied to usage: exact inside, the same however a month is cut, rounded once."""

import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler_usage.history.calendar_span import Span, begin, begins_within, following, zone
from hostler_usage.money.document import DocumentError
from hostler_usage.money.price_book import (
    Metered,
    PriceBook,
    Rounding,
    Step,
    price_book,
    visible_part,
)
from hostler_usage.money.rating import (
    Charge,
    Rated,
    Slice,
    UsageLine,
    charged_microseconds,
    graduated,
    money,
    rate,
    slices,
)
from hostler_usage.reading.mapping import Measure

MAY = datetime(2026, 5, 1, tzinfo=UTC)
JUNE = datetime(2026, 6, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
MICROSECOND = timedelta(microseconds=1)

MEASURES = {
    item.name: item
    for item in (
        Measure(name="instance_hours", resource_type="instance"),
        Measure(name="volume_gb_hours", resource_type="volume", attribute="size_gb"),
        Measure(name="bandwidth_out_bytes", resource_type="instance", counter="out"),
    )
}
ATTRIBUTE = {"instance_hours": None, "volume_gb_hours": "size_gb", "bandwidth_out_bytes": None}
GROUP = {
    "project": "p1",
    "user": "u1",
    "region": "R1",
    "resource_type": "instance",
    "resource": "i1",
    "state_class": "running",
    "flavor": "m1.small",
    "zone": None,
    "size_gb": None,
}


@dataclass(frozen=True)
class Held:
    """What really was: a resource held for a while, or something that moved at its start."""

    measure: str
    start: datetime
    end: datetime
    amount: int
    group: Mapping[str, str | None]


def held(
    start: datetime,
    length: timedelta,
    measure: str = "instance_hours",
    amount: int = 1,
    **group: str | None,
) -> Held:
    if ATTRIBUTE[measure]:
        group["size_gb"] = str(amount)
    return Held(measure, start, start + length, amount, {**GROUP, **group})


def lines_in(spans: Iterable[Slice], world: Iterable[Held]) -> list[UsageLine]:
    """What a store answers: sums per slice, measure and group."""
    found: dict[Any, int] = defaultdict(int)
    for span in spans:
        for item in world:
            if MEASURES[item.measure].is_held:
                time = min(span.end, item.end) - max(span.start, item.start)
                amount = item.amount * max(time // MICROSECOND, 0)
            else:
                amount = item.amount if span.start <= item.start < span.end else 0
            found[span.start, span.end, item.measure, tuple(item.group.items())] += amount
    return [
        UsageLine(group=dict(group), measure=measure, amount=amount, start=start, end=end)
        for (start, end, measure, group), amount in found.items()
    ]


def rated(
    book: PriceBook,
    world: Sequence[Held],
    start: datetime = MAY,
    end: datetime = JUNE,
    edges: Iterable[datetime] = (),
) -> Rated:
    spans = slices([book], start, end, edges=edges)
    return rate(book, lines_in(spans, world), measures=MEASURES, counted_from=start)


def total(charges: Iterable[Charge]) -> Fraction:
    return sum((charge.cost for charge in charges), Fraction(0))


def book(*prices: Mapping[str, object], **members: object) -> PriceBook:
    named = [
        {"name": f"price {n}", "measure": "instance_hours", **p} for n, p in enumerate(prices)
    ]
    return price_book({"currency": "EUR", "prices": named, **members})


def cost(of: PriceBook, *world: Held, **options: Any) -> Fraction:
    return total(rated(of, world, **options).charges)


# --- prices


def test_a_flat_price_is_per_hour_and_exact_to_the_microsecond() -> None:
    flat = book({"price": "0.012"})
    assert cost(flat, held(MAY, timedelta(minutes=90))) == Fraction("0.018")
    assert cost(flat, held(MAY, MICROSECOND)) == Fraction("0.012") / 3_600_000_000


def test_what_moved_is_priced_by_the_unit_or_by_so_many() -> None:
    traffic = book({"measure": "bandwidth_out_bytes", "price": "0.05", "per": 10**9})
    assert cost(traffic, held(MAY, HOUR, "bandwidth_out_bytes", 3 * 10**9)) == Fraction("0.15")


def test_the_first_price_whose_conditions_hold_is_charged() -> None:
    several = book(
        {"price": 1, "match": {"project": "p1", "flavor": ["m1.small", "m1.tiny"]}},
        {"price": 2, "match": {"project": "p1"}},
        {"price": 3},
    )
    assert cost(several, held(MAY, HOUR)) == 1
    assert cost(several, held(MAY, HOUR, flavor="m1.large")) == 2
    assert cost(several, held(MAY, HOUR, flavor=None)) == 2
    assert cost(several, held(MAY, HOUR, project="p2")) == 3


def test_a_price_holds_from_its_first_day_until_before_its_last() -> None:
    dated = book(
        {"name": "small", "price": 1, "until": "2026-05-10"},
        {"name": "small", "price": 2, "from": "2026-05-10", "until": "2026-05-20T06:00:00+02:00"},
    )
    result = rated(dated, [held(MAY + 8 * DAY, 2 * DAY), held(MAY + 18 * DAY, 4 * DAY)])
    assert total(result.charges) == 24 + 48 + 2 * 28
    assert sum(line.amount for line in result.unpriced) == 68 * 3_600_000_000


def test_days_of_a_book_are_those_of_its_time_zone() -> None:
    dated = book(
        {"name": "small", "price": 1, "until": "2026-05-10"},
        {"name": "small", "price": 2, "from": "2026-05-10"},
        time_zone="Europe/Berlin",
    )
    assert cost(dated, held(datetime(2026, 5, 9, 21, tzinfo=UTC), 2 * HOUR)) == 3


def test_a_state_counts_by_its_factor_in_price_and_tiers() -> None:
    factors = {"stopped": "0.5", "shelved": 0}
    flat = book({"price": 1, "state_class_factors": factors})
    assert cost(flat, held(MAY, 2 * HOUR, state_class="stopped")) == 1
    assert cost(flat, held(MAY, 2 * HOUR, state_class="shelved")) == 0
    assert cost(flat, held(MAY, 2 * HOUR, state_class="paused")) == 2
    steps = [{"up_to": 10, "price": 1}, {"price": 0}]
    tiered = book({"tiers": {"steps": steps}, "state_class_factors": factors})
    assert cost(tiered, held(MAY, 12 * HOUR, state_class="stopped")) == 6
    assert cost(tiered, held(MAY, 12 * HOUR, state_class="shelved")) == 0


def test_discounts_multiply_and_the_list_cost_is_before_them() -> None:
    discounted = book(
        {"price": 1},
        discounts=[
            {"name": "acme", "percent": 10, "match": {"project": "p1"}},
            {"name": "may", "percent": 50, "from": "2026-05-01", "until": "2026-05-02"},
            {"name": "disks", "percent": 99, "measures": ["volume_gb_hours"]},
        ],
    )
    (charge,) = rated(discounted, [held(MAY, 10 * HOUR)], MAY, MAY + DAY).charges
    assert (charge.list_cost, charge.cost) == (Fraction(10), Fraction("4.5"))
    assert cost(discounted, held(MAY, 10 * HOUR, project="p2")) == 5
    assert cost(discounted, held(MAY + DAY, 10 * HOUR)) == 9


def test_what_has_no_price_is_said_and_what_is_free_is_not() -> None:
    only = book({"price": 1, "match": {"flavor": "m1.tiny"}}, free=["volume_gb_hours"])
    result = rated(only, [held(MAY, HOUR), held(MAY, HOUR, "volume_gb_hours", 5)])
    assert result.charges == ()
    assert [(line.measure, line.amount) for line in result.unpriced] == [
        ("instance_hours", 3_600_000_000)
    ]


def test_a_measure_that_nobody_knows_is_unpriced() -> None:
    line = UsageLine(group=GROUP, measure="llama_hours", amount=1, start=MAY, end=JUNE)
    result = rate(book({"price": 1}), [line], measures=MEASURES, counted_from=MAY)
    assert result == Rated(charges=(), unpriced=(line,))


# --- tiers

TIERED = book(
    {"tiers": {"steps": [{"up_to": 10, "price": 3}, {"up_to": 100, "price": 2}, {"price": 1}]}}
)


def test_tiers_are_graduated_and_each_project_has_its_own() -> None:
    assert cost(TIERED, held(MAY, 12 * HOUR)) == 34
    assert cost(TIERED, held(MAY, 110 * HOUR)) == 30 + 180 + 10
    assert cost(TIERED, held(MAY, 6 * HOUR), held(MAY, 6 * HOUR, resource="i2")) == 34
    assert cost(TIERED, held(MAY, 6 * HOUR), held(MAY, 6 * HOUR, project="p2")) == 36


def test_a_window_that_begins_in_mid_month_knows_where_the_tiers_stand() -> None:
    world = [held(MAY, 12 * HOUR), held(MAY + 20 * DAY, HOUR)]
    assert cost(TIERED, *world, start=MAY + 20 * DAY) == 2
    assert total(rated(TIERED, world, start=MAY + 20 * DAY).charges) == 2
    assert slices([TIERED], MAY + 20 * DAY, JUNE)[0].start == MAY
    before = rated(TIERED, [held(MAY, HOUR, "volume_gb_hours", 5)], start=MAY + 20 * DAY)
    assert before == Rated(charges=(), unpriced=())  # nor is what had no price before it said


def test_tiers_begin_anew_with_the_month_of_the_books_place() -> None:
    berlin = book(
        {"tiers": {"steps": [{"up_to": 10, "price": 3}, {"price": 1}]}}, time_zone="Europe/Berlin"
    )
    turn = datetime(2026, 5, 31, 22, tzinfo=UTC)
    assert cost(berlin, held(turn - 12 * HOUR, 14 * HOUR), end=JUNE + DAY) == 32 + 6


def test_a_price_that_changes_in_mid_month_goes_on_in_the_tiers() -> None:
    both = book(
        {
            "name": "p",
            "until": "2026-05-10",
            "tiers": {"steps": [{"up_to": 10, "price": 3}, {"price": 1}]},
        },
        {
            "name": "p",
            "from": "2026-05-10",
            "tiers": {"steps": [{"up_to": 10, "price": 6}, {"price": 2}]},
        },
    )
    assert cost(both, held(MAY, 8 * HOUR), held(MAY + 10 * DAY, 8 * HOUR)) == 24 + 12 + 12


def test_lines_of_one_slice_share_its_tiers_by_their_amounts() -> None:
    charges = rated(
        TIERED, [held(MAY, 9 * HOUR, flavor="a"), held(MAY + DAY, 3 * HOUR, flavor="b")]
    ).charges
    assert {c.line.group["flavor"]: c.cost for c in charges} == {
        "a": Fraction(34 * 9, 12),
        "b": Fraction(34 * 3, 12),
    }


def test_a_correction_gives_back_what_its_amount_had_cost() -> None:
    line = UsageLine(
        group=GROUP, measure="instance_hours", amount=-2 * 3_600_000_000, start=MAY, end=JUNE
    )
    more = UsageLine(
        group=GROUP, measure="instance_hours", amount=11 * 3_600_000_000, start=MAY, end=JUNE
    )
    assert total(rate(TIERED, [line], measures=MEASURES, counted_from=MAY).charges) == -6
    both = rate(TIERED, [line, more], measures=MEASURES, counted_from=MAY).charges
    assert sorted(charge.cost for charge in both) == [-5, 32]


# --- rounding of time


def test_each_resource_is_rounded_up_to_the_hour_once_a_month() -> None:
    hourly = book({"price": 1, "rounding": {"to": "hour"}})
    quarter = timedelta(minutes=15)
    assert cost(hourly, held(MAY, quarter), held(MAY + DAY, quarter)) == 1
    assert cost(hourly, held(MAY, quarter), held(MAY, quarter, resource="i2")) == 2
    assert cost(hourly, held(MAY, quarter), held(MAY, quarter, region="R2")) == 2
    assert cost(hourly, held(MAY, 5 * quarter), held(JUNE, quarter), end=JUNE + DAY) == 3
    daily = book({"price": 1, "rounding": {"to": "hour", "period": "day"}})
    assert cost(daily, held(MAY, quarter), held(MAY + DAY, quarter)) == 2


def test_time_is_rounded_and_not_what_was_held_in_it() -> None:
    hourly = book({"measure": "volume_gb_hours", "price": 1, "rounding": {"to": "hour"}})
    half = timedelta(minutes=30)
    volume = {"resource": "v1", "resource_type": "volume"}
    assert cost(hourly, held(MAY, half, "volume_gb_hours", 10, **volume)) == 10
    # resized within the hour: each size is rounded by itself
    grown = held(MAY + half, half, "volume_gb_hours", 20, **volume)
    assert cost(hourly, held(MAY, half, "volume_gb_hours", 10, **volume), grown) == 30


def test_each_states_time_is_rounded_by_itself_where_states_cost_differently() -> None:
    half = timedelta(minutes=30)
    world = [held(MAY, half), held(MAY + half, half, state_class="stopped")]
    factors = book(
        {"price": 1, "rounding": {"to": "hour"}, "state_class_factors": {"stopped": "0.5"}}
    )
    assert cost(factors, *world) == Fraction("1.5")
    assert cost(factors, *world, edges=[MAY + half]) == Fraction("1.5")
    assert cost(book({"price": 1, "rounding": {"to": "hour"}}), *world) == 1


@pytest.mark.parametrize(
    ("seconds", "rounding", "minimum", "charged"),
    [
        (0, Rounding.HOUR, 60, 0),
        (Fraction(1, 2), Rounding.SECOND, 0, 1),
        (Fraction(1, 2), Rounding.NONE, 0, Fraction(1, 2)),
        (1, Rounding.SECOND, 60, 60),
        (61, Rounding.NONE, 60, 61),
        (3600, Rounding.HOUR, 0, 3600),
        (Fraction(36000001, 10000), Rounding.HOUR, 0, 7200),
        (-1, Rounding.SECOND, 60, -60),
    ],
)
def test_time_charged(
    seconds: Fraction, rounding: Rounding, minimum: int, charged: Fraction
) -> None:
    assert charged_microseconds(int(seconds * 10**6), rounding, minimum) == charged * 10**6


# --- properties, on a book with everything in it

EVERYTHING = price_book(
    {
        "currency": "EUR",
        "time_zone": "America/New_York",
        "prices": [
            {
                "name": "own",
                "measure": "instance_hours",
                "match": {"project": "p1", "flavor": "big"},
                "price": "0.7",
                "from": "2026-05-04",
                "until": "2026-05-25",
                "state_class_factors": {"stopped": "0.5", "shelved": 0},
                "rounding": {"to": "hour", "minimum_seconds": 7200, "period": "day"},
            },
            {
                "name": "all",
                "measure": "instance_hours",
                "until": "2026-05-12",
                "tiers": {
                    "steps": [
                        {"up_to": 5, "price": 0},
                        {"up_to": "50.5", "price": 3},
                        {"price": "0.01"},
                    ]
                },
                "state_class_factors": {"stopped": "0.5"},
                "rounding": {"to": "second", "minimum_seconds": 60},
            },
            {
                "name": "all",
                "measure": "instance_hours",
                "from": "2026-05-12",
                "tiers": {"steps": [{"up_to": 7, "price": 1}, {"price": 2}]},
            },
            {
                "name": "gb",
                "measure": "volume_gb_hours",
                "price": "0.001",
                "rounding": {"to": "hour"},
            },
            {
                "name": "traffic",
                "measure": "bandwidth_out_bytes",
                "per": 1000,
                "match": {"project": ["p1", "p2"]},
                "tiers": {
                    "period": "day",
                    "scope": ["project", "user"],
                    "steps": [{"up_to": 3, "price": 1}, {"price": "0.3"}],
                },
            },
        ],
        "discounts": [
            {"name": "p2", "percent": 15, "match": {"project": "p2"}, "from": "2026-05-08"},
            {"name": "disks", "percent": "12.5", "measures": ["volume_gb_hours"]},
        ],
    }
)
_minutes = st.integers(0, 31 * 24 * 60)
_moments = st.builds(lambda m, s: MAY + timedelta(minutes=m, microseconds=s), _minutes, _minutes)
_worlds = st.lists(
    st.builds(
        lambda measure, start, minutes, amount, project, user, resource, state, flavor: held(
            start,
            timedelta(minutes=minutes),
            measure,
            amount,
            project=project,
            user=user,
            resource=f"{measure[0]}{resource}",
            resource_type=measure,
            state_class=state,
            flavor=flavor,
        ),
        st.sampled_from(sorted(MEASURES)),
        _moments,
        st.integers(0, 5000),
        st.integers(1, 5000),
        st.sampled_from(["p1", "p2", "p3"]),
        st.sampled_from(["u1", None]),
        st.integers(1, 2),
        st.sampled_from(["running", "stopped", "shelved"]),
        st.sampled_from(["big", "small", None]),
    ),
    max_size=6,
)
# what only counts its own time has an amount of one
_worlds = _worlds.map(
    lambda world: [
        Held(w.measure, w.start, w.end, 1 if w.measure == "instance_hours" else w.amount, w.group)
        for w in world
    ]
)


def by_project(charges: Iterable[Charge]) -> dict[str | None, Fraction]:
    found: dict[str | None, Fraction] = defaultdict(Fraction)
    for charge in charges:
        found[charge.line.group["project"]] += charge.cost
    return {project: cost for project, cost in found.items() if cost}


@given(_worlds, st.lists(_moments, max_size=5))
def test_a_month_costs_the_same_however_it_is_cut(
    world: list[Held], edges: list[datetime]
) -> None:
    whole, cut = rated(EVERYTHING, world), rated(EVERYTHING, world, edges=edges)
    assert by_project(cut.charges) == by_project(whole.charges)
    assert sum(line.amount for line in cut.unpriced) == sum(line.amount for line in whole.unpriced)


@given(_worlds, st.lists(_moments, min_size=1, max_size=3))
def test_windows_add_up_to_the_month(world: list[Held], edges: list[datetime]) -> None:
    cuts = sorted({MAY, JUNE, *(edge for edge in edges if MAY < edge < JUNE)})
    parts: list[Charge] = []
    for start, end in pairwise(cuts):
        parts += rated(EVERYTHING, world, start, end).charges
    assert by_project(parts) == by_project(rated(EVERYTHING, world).charges)


@given(_worlds, st.integers(0, 2**32))
def test_the_order_of_lines_means_nothing(world: list[Held], seed: int) -> None:
    lines = lines_in(slices([EVERYTHING], MAY, JUNE), world)
    shuffled = list(lines)
    random.Random(seed).shuffle(shuffled)
    one = rate(EVERYTHING, lines, measures=MEASURES, counted_from=MAY)
    other = rate(EVERYTHING, shuffled, measures=MEASURES, counted_from=MAY)
    assert sorted(one.charges, key=repr) == sorted(other.charges, key=repr)
    assert sorted(one.unpriced, key=repr) == sorted(other.unpriced, key=repr)


@given(_worlds)
def test_every_line_is_charged_or_unpriced_and_no_amount_is_lost(world: list[Held]) -> None:
    lines = [line for line in lines_in(slices([EVERYTHING], MAY, JUNE), world) if line.amount]
    result = rate(EVERYTHING, lines, measures=MEASURES, counted_from=MAY)
    found = [charge.line for charge in result.charges] + list(result.unpriced)
    assert sorted(map(id, found)) == sorted(map(id, lines))


_steps = st.lists(
    st.tuples(st.fractions(Fraction(1, 100), 1000), st.fractions(0, 50)), min_size=1, max_size=5
).map(
    lambda items: tuple(
        Step(above=sum((width for width, _ in items[:n]), Fraction(0)), price=price)
        for n, (_, price) in enumerate(items)
    )
)


@given(_steps, st.fractions(0, 6000), st.fractions(0, 6000))
def test_tiers_are_monotone_and_continuous(
    steps: tuple[Step, ...], one: Fraction, other: Fraction
) -> None:
    less, more = sorted((one, other))
    difference = graduated(steps, more) - graduated(steps, less)
    assert 0 <= difference <= (more - less) * max(step.price for step in steps)


@given(st.lists(st.fractions(-(10**6), 10**6), max_size=20))
def test_money_is_rounded_once_and_by_half_a_cent_at_most(amounts: list[Fraction]) -> None:
    exact = sum(amounts, Fraction(0))
    shown = money(exact, "EUR")
    assert abs(Fraction(shown) - exact) <= Fraction(1, 200)
    assert shown.as_tuple().exponent == -2
    assert money(Fraction(shown), "EUR") == shown


@pytest.mark.parametrize(
    ("amount", "currency", "shown"),
    [
        ("2.345", "EUR", "2.34"),
        ("2.355", "EUR", "2.36"),
        ("2.5", "JPY", "2"),
        ("3.5", "JPY", "4"),
        ("0.0005", "BHD", "0.000"),
        ("-0.015", "USD", "-0.02"),
        ("1e30", "EUR", "1" + 30 * "0" + ".00"),
    ],
)
def test_money_has_its_currencys_smallest_unit(amount: str, currency: str, shown: str) -> None:
    assert money(Fraction(Decimal(amount)), currency) == Decimal(shown)
    assert format(money(Fraction(Decimal(amount)), currency), "f") == shown


# --- misuse is an error, never a wrong number


def test_lines_that_a_price_or_period_cuts_are_refused() -> None:
    dated = book({"price": 1, "from": "2026-05-10"})
    line = UsageLine(group=GROUP, measure="instance_hours", amount=1, start=MAY, end=JUNE)
    with pytest.raises(ValueError, match="a price changes within"):
        rate(dated, [line], measures=MEASURES, counted_from=MAY)
    longer = UsageLine(group=GROUP, measure="instance_hours", amount=1, start=MAY, end=JUNE + DAY)
    with pytest.raises(ValueError, match="a month begins within"):
        rate(TIERED, [longer], measures=MEASURES, counted_from=MAY)
    other = UsageLine(group=GROUP, measure="instance_hours", amount=1, start=MAY + DAY, end=JUNE)
    with pytest.raises(ValueError, match="overlap"):
        rate(TIERED, [line, other], measures=MEASURES, counted_from=MAY)
    bare = UsageLine(group={}, measure="instance_hours", amount=1, start=MAY, end=JUNE)
    with pytest.raises(ValueError, match="told apart by project"):
        rate(TIERED, [bare], measures=MEASURES, counted_from=MAY)


def test_a_book_says_what_usage_must_be_told_apart_by() -> None:
    assert book({"price": 1}).dimensions(MEASURES) == frozenset()
    assert TIERED.dimensions(MEASURES) == {"project"}
    assert EVERYTHING.dimensions(MEASURES) == {
        *("project", "user", "region", "resource_type", "resource"),
        *("flavor", "state_class", "size_gb"),
    }


# --- documents


@pytest.mark.parametrize(
    ("change", "faults"),
    [
        ({"currency": "euro"}, [("currency", "must look like [A-Z]{3}")]),
        ({"currency": None}, [("currency", "is missing")]),
        ({"time_zone": "Europe"}, [("time_zone", "there is no time zone 'Europe'")]),
        ({"colour": "red"}, [("colour", "is not known here")]),
        ({"prices": []}, [("prices", "must be a list with at least one price")]),
        ({"prices": "dear"}, None),
        ({"prices": ["dear"]}, [("prices[0]", "must be a mapping of names to values")]),
        ({"discounts": [{"name": "d", "percent": 101}]}, [("discounts[0].percent", None)]),
        ({"free": ["instance_hours"]}, [("prices[0].measure", "is free in this book")]),
        ({"public": "yes"}, [("public", "must be true or false")]),
    ],
)
def test_a_books_faults_are_named_by_their_paths(
    change: dict[str, object], faults: list[tuple[str, str | None]] | None
) -> None:
    document = {
        "currency": "EUR",
        "prices": [{"name": "p", "measure": "instance_hours", "price": 1}],
        **change,
    }
    assert_faults(document, faults)


def assert_faults(document: object, faults: list[tuple[str, str | None]] | None) -> None:
    with pytest.raises(DocumentError) as caught:
        price_book(document, Metered(measures=MEASURES, dimensions=frozenset(GROUP)))
    if faults is not None:
        found = [(fault.path, fault.problem) for fault in caught.value.faults]
        assert [path for path, _ in found] == [path for path, _ in faults], found
        for (_, said), (_, wanted) in zip(found, faults, strict=True):
            assert wanted is None or said == wanted


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"price": 0.1}, "prices[1].price"),  # a float is not exact
        ({"price": "1e5"}, "prices[1].price"),
        ({"price": "-1"}, "prices[1].price"),
        ({"price": True}, "prices[1].price"),
        ({"price": Decimal("1e999999999")}, "prices[1].price"),
        ({"price": Decimal("nan")}, "prices[1].price"),
        ({"price": 10**15}, "prices[1].price"),
        ({"price": None}, "prices[1].price"),
        ({"per": 0}, "prices[1].per"),
        ({"from": "2026-05-01T00:00:00"}, "prices[1].from"),
        ({"from": "0001-01-01"}, "prices[1].from"),
        ({"from": "2026-05-02", "until": "2026-05-01"}, "prices[1].until"),
        ({"match": {"Flavor": "x"}}, "prices[1].match.Flavor"),
        ({"match": {"flavour": "x"}}, "prices[1].match.flavour"),
        ({"match": {"flavor": 7}}, "prices[1].match.flavor"),
        ({"match": {"flavor": "a\0"}}, "prices[1].match.flavor"),
        ({"match": {"flavor": ["a", "a"]}}, "prices[1].match.flavor[1]"),
        ({"match": {"flavor": []}}, "prices[1].match.flavor"),
        ({"match": []}, "prices[1].match"),
        ({"measure": "llama_hours"}, "prices[1].measure"),
        ({"name": "first"}, "prices[1].name"),
        ({"state_class_factors": {"stopped": "half"}}, "prices[1].state_class_factors.stopped"),
        ({"rounding": {"to": "day"}}, "prices[1].rounding.to"),
        ({"rounding": {"minimum_seconds": 1.5}}, "prices[1].rounding.minimum_seconds"),
        ({"rounding": {"up": True}}, "prices[1].rounding.up"),
        (
            {"measure": "bandwidth_out_bytes", "rounding": {"to": "hour"}},
            "prices[1].rounding",
        ),
        ({"tiers": {"steps": [{"up_to": 1, "price": 1}, {"price": 2}]}}, "prices[1].price"),
        ({"price": None, "tiers": {"steps": [{"price": 2}]}}, "prices[1].tiers.steps"),
        (
            {"price": None, "tiers": {"steps": [{"price": 2}, {"price": 2}]}},
            "prices[1].tiers.steps[0].up_to",
        ),
        (
            {"price": None, "tiers": {"steps": [{"up_to": 1, "price": 2}] * 2}},
            "prices[1].tiers.steps[1].up_to",
        ),
        (
            {
                "price": None,
                "tiers": {"scope": "user", "steps": [{"up_to": 1, "price": 1}, {"price": 2}]},
            },
            "prices[1].tiers.scope",
        ),
    ],
)
def test_a_prices_faults_are_named_by_their_paths(change: dict[str, object], path: str) -> None:
    first = {"name": "first", "measure": "instance_hours", "match": {"zone": "z"}, "price": 1}
    second = {"name": "second", "measure": "instance_hours", "price": 1, **change}
    with pytest.raises(DocumentError) as caught:
        price_book(
            {"currency": "EUR", "prices": [first, second]},
            Metered(measures=MEASURES, dimensions=frozenset(GROUP)),
        )
    assert path in {fault.path for fault in caught.value.faults}, str(caught.value)


def test_all_faults_are_said_at_once() -> None:
    bad = {"name": "p", "measure": "instance_hours", "price": "much", "colour": 1}
    assert_faults(
        {"currency": "EUR", "prices": [bad, {"name": "q", "measure": "x", "price": 1}], "a": 1},
        [
            ("prices[0].price", None),
            ("prices[0].colour", "is not known here"),
            ("prices[1].measure", "is none of the configured measures"),
            ("a", "is not known here"),
        ],
    )


def test_a_price_that_is_never_reached_is_a_fault() -> None:
    with pytest.raises(DocumentError, match=r"prices\[1\]: is never reached"):
        book({"price": 1}, {"price": 2, "match": {"project": "p1"}})
    book({"price": 1, "until": "2026-06-01"}, {"price": 2, "match": {"project": "p1"}})


def test_a_discount_may_not_split_what_accumulates() -> None:
    discount = {"name": "d", "percent": 5, "match": {"flavor": "m1.small"}}
    with pytest.raises(DocumentError, match=r"discounts\[0\].match.flavor: must be absent"):
        book({"tiers": {"steps": [{"up_to": 1, "price": 1}, {"price": 2}]}}, discounts=[discount])
    book({"price": 1}, discounts=[discount])


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.decimals(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["currency", "prices", "name", "price", "match", "tiers", "steps", "from"]
                )
                | st.text(),
                inner,
                max_size=5,
            )
        ),
        max_leaves=20,
    )
)
def test_no_document_makes_the_reader_fail_otherwise(document: object) -> None:
    try:
        price_book(document)
    except DocumentError as exc:
        assert exc.faults  # noqa: PT017


def test_projects_see_what_concerns_them_alone() -> None:
    prices: list[dict[str, object]] = [
        {"name": "theirs", "match": {"project": "p9"}, "price": 1},
        {"name": "shared", "match": {"project": ["p1", "p9"]}, "price": 2},
        {"name": "all", "price": 3},
    ]
    document = {"currency": "EUR", "prices": prices, "discounts": [prices[0]]}
    assert visible_part(document, ["p1"]) == {
        "currency": "EUR",
        "prices": [
            {"name": "shared", "match": {"project": ["p1"]}, "price": 2},
            {"name": "all", "price": 3},
        ],
        "discounts": [],
    }


# --- the calendar


def test_periods_are_those_of_a_place() -> None:
    berlin = zone("Europe/Berlin")
    moment = datetime(2026, 3, 29, 12, tzinfo=UTC)  # the day the clocks go forward, a Sunday
    assert begin(moment, Span.DAY, berlin) == datetime(2026, 3, 28, 23, tzinfo=UTC)
    assert following(moment, Span.DAY, berlin) == datetime(2026, 3, 29, 22, tzinfo=UTC)
    assert begin(moment, Span.WEEK, berlin) == datetime(2026, 3, 22, 23, tzinfo=UTC)
    assert following(moment, Span.WEEK, berlin) == datetime(2026, 3, 29, 22, tzinfo=UTC)
    assert begin(moment, Span.MONTH, berlin) == datetime(2026, 2, 28, 23, tzinfo=UTC)
    assert following(moment, Span.MONTH, berlin) == datetime(2026, 3, 31, 22, tzinfo=UTC)
    assert begins_within(MAY, MAY + 2 * DAY, Span.DAY, UTC) == [MAY + DAY]


@given(
    st.integers(946_800_000, 4_070_000_000).map(lambda s: datetime.fromtimestamp(s, UTC)),
    st.sampled_from(Span),
    st.sampled_from(["UTC", "Europe/Berlin", "America/Havana", "Pacific/Apia", "Asia/Beirut"]),
)
def test_every_moment_lies_in_one_period(moment: datetime, span: Span, name: str) -> None:
    first, after = begin(moment, span, zone(name)), following(moment, span, zone(name))
    assert first <= moment < after
    assert begin(first, span, zone(name)) == first
    assert begin(after, span, zone(name)) == after
    assert following(first, span, zone(name)) == after
