"""What is drawn: to scale, inside the picture, and nothing that is not there."""

from datetime import UTC, date, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler_usage.charts import (
    LABELS_WIDTH,
    WIDTH,
    Moment,
    Span,
    days_between,
    stack,
    ticks,
    timeline,
)

START = datetime(2026, 5, 8, tzinfo=UTC)
HOUR = timedelta(hours=1)
ROOM = WIDTH - LABELS_WIDTH


def span(start: float, end: float | None, state: str = "running", **attributes: str | int) -> Span:
    return Span(
        start=START + start * HOUR,
        end=None if end is None else START + end * HOUR,
        state_class=state,
        attributes=attributes,
        anchor=f"at-{start}",
    )


def moment(at: float, event_type: str, *, is_error: bool = False) -> Moment:
    return Moment(at=START + at * HOUR, event_type=event_type, is_error=is_error, href="/e")


@given(
    edges=st.lists(st.integers(0, 10_000), min_size=2, max_size=30, unique=True).map(sorted),
    states=st.lists(st.sampled_from(["running", "stopped", "error", "odd"]), min_size=30),
    window=st.tuples(st.integers(0, 10_000), st.integers(1, 10_000)),
    lasts=st.booleans(),
)
def test_a_lane_is_as_long_as_what_was_held_in_the_window(
    edges: list[int], states: list[str], window: tuple[int, int], lasts: bool
) -> None:
    spans = [span(a, b, state) for (a, b), state in zip(pairwise(edges), states, strict=False)]
    if lasts:
        last = spans[-1]
        spans[-1] = span((last.start - START) / HOUR, None, last.state_class)
    start, end = START + window[0] * HOUR, START + (window[0] + window[1]) * HOUR
    now = START + 12_000 * HOUR
    drawn = timeline(spans, [], start, end, now).lanes[0]
    held = sum(
        max(0.0, (min(end, each.end or now) - max(start, each.start)) / HOUR) for each in spans
    )
    assert sum(bar.width for bar in drawn.bars) == pytest.approx(
        held / window[1] * ROOM, abs=0.02 * len(spans)
    )
    for bar in drawn.bars:
        assert LABELS_WIDTH <= bar.x <= bar.x + bar.width <= WIDTH + 0.02
    for left, right in pairwise(drawn.bars):
        assert left.x + left.width <= right.x + 0.02


def test_neighbours_of_one_value_are_one_bar() -> None:
    spans = [
        span(0, 2, "running", flavor="m1.small", vcpus=1),
        span(2, 3, "stopped", flavor="m1.small", vcpus=1),
        span(3, 6, "stopped", flavor="m1.large", vcpus=4),
    ]
    drawn = timeline(spans, [], START, START + 10 * HOUR, START + 6 * HOUR)
    state, flavor = drawn.lanes  # vcpus says nothing that flavor does not
    assert [(bar.label, round(bar.width)) for bar in state.bars] == [
        ("running", round(0.2 * ROOM)),
        ("stopped", round(0.4 * ROOM)),
    ]
    assert [bar.label for bar in flavor.bars] == ["m1.small", "m1.large"]
    assert state.bars[0].href == "#at-0"
    assert "2026-05-08 02:00:00 UTC" in state.bars[0].hint
    assert drawn.now_x == pytest.approx(LABELS_WIDTH + 0.6 * ROOM)


def test_an_attribute_that_changes_on_its_own_has_a_lane() -> None:
    spans = [
        span(0, 2, flavor="f", host="a", zone="z"),
        span(2, 4, flavor="f", host="b", zone="z"),
    ]
    drawn = timeline(spans, [], START, START + 4 * HOUR, START + 9 * HOUR)
    assert [lane.name for lane in drawn.lanes] == ["state", "flavor", "host"]


def test_events_are_marks_by_kind_and_those_outside_are_left_out() -> None:
    moments = [
        moment(1, "compute.instance.create.end"),
        moment(2, "compute.instance.exists"),
        moment(3, "instance.resize.error"),
        moment(3, "compute_task.build", is_error=True),
        moment(11, "compute.instance.delete.end"),
    ]
    drawn = timeline([], moments, START, START + 10 * HOUR, START + 10 * HOUR)
    assert [mark.kind for mark in drawn.marks] == ["event", "audit", "error", "error"]
    assert drawn.marks[0].x == pytest.approx(LABELS_WIDTH + 0.1 * ROOM, abs=0.01)
    assert {mark.y for mark in drawn.marks if mark.kind == "audit"}.isdisjoint(
        mark.y for mark in drawn.marks if mark.kind != "audit"
    )
    assert drawn.marks[0].hint == "compute.instance.create.end, 2026-05-08 01:00:00 UTC"


def test_states_of_an_operators_own_mapping_have_colours_too() -> None:
    spans = [span(n, n + 1, state) for n, state in enumerate(("leased", "running", "cleaning"))]
    drawn = timeline(spans, [], START, START + 3 * HOUR, START + 9 * HOUR)
    assert drawn.states == (
        ("leased", "palette-1"),
        ("running", "state-running"),
        ("cleaning", "palette-2"),
    )


@given(
    start=st.datetimes(datetime(2000, 1, 1), datetime(2090, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001
    length=st.timedeltas(timedelta(minutes=5), timedelta(days=3000)),
)
def test_ticks_are_few_and_inside(start: datetime, length: timedelta) -> None:
    found = ticks(start, start + length)
    assert len(found) <= 10
    assert all(start <= at < start + length for at, _ in found)
    assert all(at.second == 0 for at, _ in found)


def test_a_stack_has_every_day_and_its_sums() -> None:
    days = days_between(START, START + 49 * HOUR)
    assert days == [date(2026, 5, 8), date(2026, 5, 9), date(2026, 5, 10)]
    assert days_between(START, START + 24 * HOUR) == days[:1]
    chart = stack(
        "t", "u", days, {"a": {days[0]: 1.0, days[2]: 2.0}, "b": {}}, colours={"b": "rest"}
    )
    assert [line.values for line in chart.lines] == [(1.0, 0.0), (0.0, 0.0), (2.0, 0.0)]
    assert chart.sums == (3.0, 0.0)
    assert [column.colour for column in chart.columns] == ["", "rest"]
