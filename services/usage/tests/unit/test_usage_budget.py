"""Budgets: periods of a place, thresholds, forecasts, and documents with every fault named."""

from datetime import UTC, datetime, timedelta
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler_usage.history.calendar_span import Span
from hostler_usage.money.budget import (
    Budget,
    Limit,
    Membership,
    Period,
    Subject,
    amount_of,
    budget,
    crossed,
    forecast,
    overlapping,
    state,
)
from hostler_usage.money.document import DocumentError
from hostler_usage.reading.mapping import Measure

MAY = datetime(2026, 5, 1, tzinfo=UTC)
DAY = timedelta(days=1)
MEASURES = {"vcpu_hours": Measure(name="vcpu_hours", resource_type="instance", attribute="vcpus")}
DOCUMENT: dict[str, object] = {
    "subject": {"projects": ["p1"]},
    "limit": {"amount": "1500.50", "price_book": "default"},
}


def test_what_is_not_said_has_its_default() -> None:
    assert budget("b", DOCUMENT) == Budget(
        name="b",
        subject=Subject(projects=frozenset({"p1"})),
        limit=Limit(amount=Fraction("1500.5"), price_book="default"),
        span=Span.MONTH,
        fixed=None,
        time_zone=budget("b", DOCUMENT).time_zone,
        thresholds=(50, 80, 100),
    )


def test_a_recurring_budget_has_the_periods_of_its_place() -> None:
    weekly = budget("b", {**DOCUMENT, "period": "week", "time_zone": "Europe/Berlin"})
    assert weekly.period(datetime(2026, 5, 10, 21, 59, tzinfo=UTC)) == Period(
        start=datetime(2026, 5, 3, 22, tzinfo=UTC), end=datetime(2026, 5, 10, 22, tzinfo=UTC)
    )


def test_a_fixed_budget_has_one_period() -> None:
    fixed = budget("b", {**DOCUMENT, "period": {"from": "2026-05-01", "until": "2026-05-03"}})
    whole = Period(start=MAY, end=MAY + 2 * DAY)
    assert fixed.period(MAY) == whole
    assert fixed.period(MAY + 2 * DAY) is None
    assert fixed.period(MAY - DAY) is None


@pytest.mark.parametrize(
    ("consumed", "limit", "reached"),
    [
        ("0", "100", ()),
        ("49.999999", "100", ()),
        ("50", "100", (50,)),
        ("99.9", "100", (50, 80)),
        ("100", "100", (50, 80, 100)),
        ("0", "0", ()),
        ("0.000001", "0", (50, 80, 100)),
    ],
)
def test_a_threshold_is_crossed_when_its_share_is_reached(
    consumed: str, limit: str, reached: tuple[int, ...]
) -> None:
    assert crossed((50, 80, 100), Fraction(consumed), Fraction(limit)) == reached


@given(
    st.fractions(0, 10**6),
    st.fractions(0, 10**6),
    st.fractions(0, 10**6),
    st.sets(st.integers(1, 1000)),
)
def test_more_use_never_uncrosses_a_threshold(
    consumed: Fraction, more: Fraction, limit: Fraction, thresholds: set[int]
) -> None:
    ordered = sorted(thresholds)
    before = crossed(ordered, consumed, limit)
    assert set(before) <= set(crossed(ordered, consumed + more, limit))
    assert list(before) == ordered[: len(before)]  # from the lowest on, without a gap


def test_the_forecast_goes_on_as_the_last_week_did() -> None:
    end = MAY + 31 * DAY
    assert forecast(Fraction(70), Fraction(70), MAY + 7 * DAY, end) == 310
    assert forecast(Fraction(70), Fraction(0), MAY + 7 * DAY, end) == 70
    assert forecast(Fraction(70), Fraction(70), end + DAY, end) == 70


def test_the_state_of_a_budget_adds_up() -> None:
    of = budget("b", {**DOCUMENT, "limit": {"amount": 100, "measure": "vcpu_hours"}}, MEASURES)
    period = of.period(MAY)
    assert period is not None
    found = state(of, period, MAY + 7 * DAY, consumed=Fraction(120), recent=Fraction(7))
    assert (found.left, found.crossed, found.forecast) == (
        Fraction(-20),
        (50, 80, 100),
        Fraction(144),
    )


def test_amounts_are_counted_as_limits_are() -> None:
    moved = Measure(name="bytes", resource_type="instance", counter="bytes")
    assert amount_of(MEASURES["vcpu_hours"], 1_800_000_000) == Fraction(1, 2)
    assert amount_of(moved, 5) == 5


RESEARCH = Membership(
    kind="cost_center", group="research", project="p1", start=MAY, end=MAY + 10 * DAY
)


def test_a_project_is_in_one_group_of_a_kind_at_a_time() -> None:
    later = Membership(
        kind="cost_center", group="sales", project="p1", start=MAY + 10 * DAY, end=None
    )
    other = Membership(kind="domain", group="d", project="p1", start=MAY, end=None)
    assert overlapping([later, RESEARCH, other]) is None
    early = Membership(
        kind="cost_center", group="sales", project="p1", start=MAY + 9 * DAY, end=None
    )
    assert overlapping([early, RESEARCH]) == (RESEARCH, early)
    assert overlapping([later, RESEARCH, later]) == (later, later)


@pytest.mark.parametrize(
    ("change", "paths"),
    [
        ({"subject": None}, ["subject"]),
        ({"subject": {"projects": ["p1"], "user": "u"}}, ["subject"]),
        ({"subject": {"group": {"kind": "Cost", "name": "x"}}}, ["subject.group.kind"]),
        ({"subject": {"group": {"kind": "cost", "name": "x", "a": 1}}}, ["subject.group.a"]),
        ({"subject": {"user": 7}}, ["subject.user"]),
        ({"limit": {"amount": 1}}, ["limit"]),
        ({"limit": {"amount": 1, "measure": "a", "price_book": "b"}}, ["limit"]),
        ({"limit": {"amount": 1.5, "price_book": "b"}}, ["limit.amount"]),
        ({"limit": {"price_book": "b"}}, ["limit.amount"]),
        ({"limit": {"amount": 1, "measure": "llama_hours"}}, ["limit.measure"]),
        ({"period": "year"}, ["period"]),
        ({"period": {"from": "2026-01-01"}}, ["period"]),
        ({"period": {"from": "2026-01-02", "until": "2026-01-01"}}, ["period.until"]),
        ({"time_zone": "Nowhere"}, ["time_zone"]),
        ({"thresholds": []}, ["thresholds"]),
        ({"thresholds": [80, 50]}, ["thresholds"]),
        ({"thresholds": [50, 50]}, ["thresholds"]),
        ({"thresholds": [50, "80"]}, ["thresholds[1]"]),
        ({"thresholds": [True]}, ["thresholds[0]", "thresholds"]),
        ({"owner": "me"}, ["owner"]),
    ],
)
def test_a_budgets_faults_are_named_by_their_paths(
    change: dict[str, object], paths: list[str]
) -> None:
    with pytest.raises(DocumentError) as caught:
        budget("b", {**DOCUMENT, **change}, MEASURES)
    assert [fault.path for fault in caught.value.faults] == paths
