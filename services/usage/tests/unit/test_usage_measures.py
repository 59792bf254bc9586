"""Exact integers inside, hours only for showing."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler_usage.history.intervals import Interval, Provenance
from hostler_usage.history.measures import Window, hours, shown_hours, totals
from hostler_usage.reading.mapping_file import packaged

DAY = datetime(2026, 5, 8, tzinfo=UTC)
HOUR = timedelta(hours=1)


def interval(start: datetime, end: datetime | None, **values: int) -> Interval:
    return Interval(
        start=start,
        end=end,
        attributes=values,
        opened_by=(),
        closed_by=(),
        provenance=Provenance.EVENTS,
    )


@pytest.mark.parametrize(
    ("start", "end", "hours_inside"),
    [
        (DAY - HOUR, DAY, 0),  # before
        (DAY - HOUR, DAY + HOUR, 1),  # over the start
        (DAY + HOUR, DAY + 3 * HOUR, 2),  # inside
        (DAY + 9 * HOUR, DAY + 99 * HOUR, 1),  # over the end
        (DAY + 10 * HOUR, DAY + 11 * HOUR, 0),  # after: the end is not in the window
        (DAY - HOUR, None, 10),  # lasting
    ],
)
def test_only_what_lies_in_the_window_counts(
    start: datetime, end: datetime | None, hours_inside: int
) -> None:
    window = Window(start=DAY, end=DAY + 10 * HOUR, as_of=DAY + 20 * HOUR)
    amounts = totals(packaged().measures_of("instance"), [interval(start, end, vcpus=2)], window)
    assert amounts["instance_hours"] == hours_inside * 3_600_000_000
    assert amounts["vcpu_hours"] == 2 * hours_inside * 3_600_000_000


def test_time_that_has_not_come_counts_nothing() -> None:
    window = Window(start=DAY, end=DAY + 10 * HOUR, as_of=DAY + HOUR)
    assert (
        totals(packaged().measures_of("instance"), [interval(DAY, None)], window)["instance_hours"]
        == 3_600_000_000
    )


def test_a_microsecond_is_not_lost_in_a_century_of_terabytes() -> None:
    start, end = datetime(2000, 1, 1, tzinfo=UTC), datetime(2099, 12, 31, tzinfo=UTC)
    span = end - start
    window = Window(start=start, end=end - timedelta(microseconds=1), as_of=end)
    amount = totals(
        packaged().measures_of("instance"), [interval(start, None, memory_mb=2**40)], window
    )["ram_mb_hours"]
    assert amount == 2**40 * ((span // timedelta(microseconds=1)) - 1)


def test_what_is_not_known_counts_nothing() -> None:
    window = Window(start=DAY, end=DAY + HOUR, as_of=DAY + HOUR)
    amounts = totals(packaged().measures_of("volume"), [interval(DAY, None)], window)
    assert {name: n for name, n in amounts.items() if n} == {"volume_hours": 3_600_000_000}
    assert amounts["volume_gb_hours"] == 0


def test_hours_are_shown_to_the_millionth() -> None:
    assert hours(5_400_000_000) == Decimal("1.500000")
    assert hours(1_000_000) == Decimal("0.000278")


def test_measures_have_distinct_names() -> None:
    measures = packaged().measures
    assert len({measure.name for measure in measures}) == len(measures)


def test_an_amount_of_any_size_has_hours() -> None:
    assert hours(36 * 10**50) == Decimal(10) ** 42


@given(st.integers(-(10**30), 10**30) | st.integers(-50, 50).map(lambda halves: 1800 * halves))
def test_shown_hours_are_the_numbers_nearest_to_the_hours(amount: int) -> None:
    assert shown_hours({"a": amount}) == {"a": float(hours(amount))}
