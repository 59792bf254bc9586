"""What moved, against counters whose truth is known: order, copies, losses and resets."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hostler_usage.history.amounts import Amount, amounts
from hostler_usage.history.intervals import Interval, Provenance
from hostler_usage.history.measures import Window, totals
from hostler_usage.reading.mapping import Edge, Measure, Reading
from hostler_usage.reading.statement import CounterReading, Evidence, Statement
from hostler_usage.reading.times import MICROSECOND

DAY = datetime(2026, 5, 8, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
Said = tuple[Statement, Evidence]


def said(
    reading: Reading,
    value: int,
    at: datetime,
    *,
    label: str = "",
    run: str = "",
    period: tuple[datetime, datetime] | None = None,
    project: str | None = "p1",
    message: str = "",
    body_at: datetime | None = None,
) -> Said:
    statement = Statement(
        edge=Edge.COUNT,
        attributes=() if project is None else (("project", project),),
        at=body_at,
        period=period,
        readings=(CounterReading(name="c", reading=reading, value=value, label=label, run=run),),
    )
    name = message or f"{at}/{label}/{run}/{value}"
    return statement, Evidence(event_time=at, message_id=name, digest=b"d")


def found(items: Sequence[Said], *, born: bool = False) -> tuple[Amount, ...]:
    return amounts(items, (), is_born_of_event=born).amounts


def moved(items: Sequence[Said], *, born: bool = False) -> list[tuple[datetime, int]]:
    return [(item.at, item.amount) for item in found(items, born=born)]


def total(items: Sequence[Said], *, born: bool = False) -> int:
    return sum(item.amount for item in found(items, born=born))


# --- properties

MOMENTS = st.integers(0, 600).map(lambda n: DAY + n * MINUTE)


@st.composite
def readings(draw: st.DrawFn) -> Said:
    start = DAY + draw(st.integers(0, 5)) * HOUR
    return said(
        draw(st.sampled_from(Reading)),
        draw(st.integers(0, 50)),
        draw(MOMENTS),
        label=draw(st.sampled_from(["", "public"])),
        run=draw(st.sampled_from(["", "r1", "r2"])),
        period=draw(st.none() | st.just((start, start + draw(st.integers(-1, 3)) * HOUR))),
        project=draw(st.sampled_from([None, "p1", "p2"])),
        message=draw(st.sampled_from(["", "m1", "m2"])),
    )


@given(st.lists(readings(), max_size=15), st.booleans(), st.data())
def test_order_and_copies_change_nothing(
    items: list[Said], born: bool, data: st.DataObject
) -> None:
    whole = found(items, born=born)
    assert found(data.draw(st.permutations(items + items[:4])), born=born) == whole
    assert all(item.amount > 0 for item in whole)
    assert list(whole) == sorted(whole, key=lambda item: (item.counter, item.label, item.at))
    assert len({(item.label, item.at) for item in whole}) == len(whole)


@given(st.lists(readings(), max_size=15), MOMENTS, st.booleans())
def test_what_moved_is_additive_over_windows(
    items: list[Said], middle: datetime, born: bool
) -> None:
    measures = [Measure(name="m", resource_type="t", counter="c")]
    whole = found(items, born=born)

    def inside(start: datetime, end: datetime) -> int:
        window = Window(start=start, end=end, as_of=end)
        return totals(measures, (), window, whole)["m"]

    first, last = DAY - HOUR, DAY + 99 * HOUR
    assert inside(first, middle) + inside(middle, last) == inside(first, last)
    assert inside(first, last) == sum(item.amount for item in whole)


@st.composite
def runs(draw: st.DrawFn) -> list[list[tuple[datetime, int]]]:
    """A counter's truth: the values it showed, run by run, each of them from nothing upwards."""
    at = DAY
    told = []
    for _ in range(draw(st.integers(1, 4))):
        value, shown = 0, []
        for _ in range(draw(st.integers(1, 5))):
            at += draw(st.integers(1, 90)) * MINUTE
            value += draw(st.integers(0, 1000))
            shown.append((at, value))
        told.append(shown)
    return told


@given(runs(), st.data())
def test_of_every_run_its_last_reading_is_what_it_moved(
    told: list[list[tuple[datetime, int]]], data: st.DataObject
) -> None:
    items = [
        said(Reading.CUMULATIVE, value, at, run=f"run-{n}")
        for n, shown in enumerate(told)
        for at, value in shown
    ]
    truth = sum(shown[-1][1] for shown in told)
    assert total(data.draw(st.permutations(items)), born=True) == truth
    # where counting begins in the middle of a run, what that run had moved before is not counted
    assert total(items) == truth - told[0][0][1]


@given(runs(), st.data())
def test_lost_readings_change_no_total_as_long_as_the_last_of_a_run_comes(
    told: list[list[tuple[datetime, int]]], data: st.DataObject
) -> None:
    items = [
        said(Reading.CUMULATIVE, value, at, run=f"run-{n}")
        for n, shown in enumerate(told)
        for at, value in shown
        if (at, value) == shown[-1] or data.draw(st.booleans())
    ]
    assert total(items, born=True) == sum(shown[-1][1] for shown in told)


@given(runs())
def test_without_names_of_runs_a_reset_is_seen_where_the_counter_falls_and_never_too_much_counted(
    told: list[list[tuple[datetime, int]]],
) -> None:
    items = [said(Reading.CUMULATIVE, value, at) for shown in told for at, value in shown]
    truth = sum(shown[-1][1] for shown in told)
    assert total(items, born=True) <= truth
    falls = all(before[-1][1] > after[0][1] for before, after in pairwise(told))
    if falls:
        assert total(items, born=True) == truth


@given(st.lists(st.tuples(st.integers(0, 59), st.integers(0, 99)), min_size=1, max_size=20))
def test_of_every_period_the_highest_reading_counts_once(shown: list[tuple[int, int]]) -> None:
    """Nova's bandwidth grows since the period began and is in every update, out of order too."""
    items = [
        said(
            Reading.PERIOD,
            value,
            DAY + minute * MINUTE,
            period=(DAY, DAY + (minute + 1) * MINUTE),
            message=str(n),
        )
        for n, (minute, value) in enumerate(shown)
    ]
    assert total(items) == max(value for _, value in shown)


@st.composite
def nested(draw: st.DrawFn) -> tuple[list[int], list[tuple[int, int]]]:
    """What truly moved in each of some hours, and periods of whole hours that are told of, each whole."""
    truth = draw(st.lists(st.integers(0, 99), min_size=1, max_size=12))
    edges = st.integers(0, len(truth))
    periods = draw(st.lists(st.tuples(edges, edges), max_size=10))
    return truth, [(start, end) for start, end in periods if start < end]


@given(nested(), st.data())
@example(([1, 0, 0, 1], [(0, 1), (0, 2), (1, 4)]), None)
def test_of_periods_that_overlap_no_byte_counts_twice_and_the_most_that_is_certain_counts(
    told: tuple[list[int], list[tuple[int, int]]], data: st.DataObject | None
) -> None:
    truth, periods = told
    items = [
        said(
            Reading.PERIOD,
            sum(truth[start:end]),
            DAY + end * HOUR + MINUTE,
            period=(DAY + start * HOUR, DAY + end * HOUR),
            message=f"{start}-{end}/{n}",
        )
        for n, (start, end) in enumerate(periods)
    ]
    if data is not None:
        items = data.draw(st.permutations(items + items[:3]))
    counted = amounts(items, (), is_born_of_event=False)
    total_counted = sum(item.amount for item in counted.amounts)
    assert total_counted <= sum(truth)
    # any two that do not overlap are certain; each is at least as much as itself
    for start, end in periods:
        apart = [(one, other) for one, other in periods if other <= start or one >= end]
        most_beside = max((sum(truth[one:other]) for one, other in apart), default=0)
        assert total_counted >= sum(truth[start:end]) + most_beside
    starts = {start: max(end for one, end in periods if one == start) for start, _ in periods}
    assert counted.is_overlapping == any(
        start < other < end for start, end in starts.items() for other in starts
    )


@given(nested())
def test_hours_and_the_day_they_make_count_once_whichever_of_them_are_lost(
    told: tuple[list[int], list[tuple[int, int]]],
) -> None:
    truth, periods = told
    day = [(0, len(truth)), *((start, start + 1) for start, _ in periods)]
    items = [
        said(
            Reading.PERIOD,
            sum(truth[start:end]),
            DAY + end * HOUR,
            period=(DAY + start * HOUR, DAY + end * HOUR),
        )
        for start, end in day
    ]
    assert total(items) == sum(truth)


@given(
    st.lists(
        st.tuples(MOMENTS, st.sampled_from(["net1", "net2"]), st.integers(1, 99)),
        max_size=20,
        unique_by=lambda item: item[:2],
    ),
    st.data(),
)
def test_what_one_agent_measured_until_one_moment_counts_once_however_often_it_is_told(
    shown: list[tuple[datetime, str, int]], data: st.DataObject
) -> None:
    """l3.meter: an agent sets its counter to nothing when it tells of it; another one has its own."""
    items = [
        said(Reading.DELTA, value, at, run=host, message=f"{host}/{at}/{copy}", body_at=at)
        for at, host, value in shown
        for copy in range(data.draw(st.integers(1, 3)))
    ]
    counted = amounts(data.draw(st.permutations(items)), (), is_born_of_event=False)
    assert sum(item.amount for item in counted.amounts) == sum(value for *_, value in shown)
    assert not counted.is_overlapping
    for at, host, value in shown[:1]:
        other = said(Reading.DELTA, value - 1, at, run=host, message="other", body_at=at)
        again = amounts([other, *items], (), is_born_of_event=False)
        assert (again.amounts, again.is_overlapping) == (counted.amounts, True)


@given(st.lists(st.tuples(MOMENTS, st.integers(0, 99)), max_size=20))
def test_every_difference_counts(shown: list[tuple[datetime, int]]) -> None:
    items = [said(Reading.DELTA, value, at, message=str(n)) for n, (at, value) in enumerate(shown)]
    assert total(items) == sum(value for _, value in shown)


# --- cases


def test_a_growing_counter_counts_its_differences_at_the_moment_of_the_later_reading() -> None:
    items = [
        said(Reading.CUMULATIVE, value, DAY + n * HOUR)
        for n, value in enumerate((100, 150, 150, 400))
    ]
    assert moved(items) == [(DAY + HOUR, 50), (DAY + 3 * HOUR, 250)]
    assert moved(items, born=True) == [(DAY, 100), *moved(items)]


def test_a_counter_that_fell_began_at_nothing_again() -> None:
    items = [said(Reading.CUMULATIVE, v, DAY + n * HOUR) for n, v in enumerate((500, 900, 40, 60))]
    assert moved(items) == [(DAY + HOUR, 400), (DAY + 2 * HOUR, 40), (DAY + 3 * HOUR, 20)]


def test_a_new_run_that_already_passed_the_last_one_counts_whole() -> None:
    items = [
        said(Reading.CUMULATIVE, 500, DAY, run="a"),
        said(Reading.CUMULATIVE, 900, DAY + HOUR, run="b"),
        said(Reading.CUMULATIVE, 950, DAY + 2 * HOUR, run="b"),
    ]
    assert moved(items) == [(DAY + HOUR, 900), (DAY + 2 * HOUR, 50)]


@pytest.mark.parametrize(
    ("names", "amounts"),
    [
        # what is not told apart goes on, and so does what says more than it
        (("a/1", "a/1/5", "a/1", ""), (100, 100, 100, 100)),
        # of two that it may be, it is the one that was read last
        (("a/1/5", "a/1/6", "a/1", "a/1/5"), (100, 200, 100, 300)),
        # what says other things is another one, however little was said between
        (("a/1/5", "a/1", "a/1/6", "a/1"), (100, 100, 300, 100)),
        (("a/1", "a/2", "a/12", "b/1"), (100, 200, 300, 400)),
    ],
)
def test_a_run_of_which_less_is_said_is_the_one_that_it_goes_on_from(
    names: tuple[str, ...], amounts: tuple[int, ...]
) -> None:
    items = [
        said(Reading.CUMULATIVE, 100 * (n + 1), DAY + n * HOUR, run=run)
        for n, run in enumerate(names)
    ]
    assert tuple(amount for _, amount in moved(items, born=True)) == amounts


def test_a_reading_belongs_to_the_moment_that_its_body_gives() -> None:
    """volume.usage: in order of last_refreshed, whenever the message was sent."""
    items = [
        said(Reading.CUMULATIVE, 100, DAY + 9 * HOUR, body_at=DAY),
        said(Reading.CUMULATIVE, 300, DAY + 5 * HOUR, body_at=DAY + HOUR),
    ]
    assert moved(items) == [(DAY + HOUR, 200)]


def test_twins_of_two_dialects_count_once() -> None:
    items = [
        said(reading, value, DAY + HOUR, message=f"{dialect}-{value}", period=(DAY, DAY + HOUR))
        for dialect in ("legacy", "versioned")
        for reading, value in ((Reading.CUMULATIVE, 100), (Reading.PERIOD, 70))
    ]
    assert total(items, born=True) == 100 + 70


def test_what_a_period_moved_belongs_to_its_last_microsecond() -> None:
    items = [said(Reading.PERIOD, 70, DAY + HOUR + MINUTE, period=(DAY, DAY + HOUR))]
    assert moved(items) == [(DAY + HOUR - MICROSECOND, 70)]


def test_every_period_and_every_label_has_an_amount_of_its_own() -> None:
    items = [
        said(Reading.PERIOD, 70, DAY, label=label, period=(DAY + n * HOUR, DAY + (n + 1) * HOUR))
        for n in range(2)
        for label in ("public", "private")
    ]
    assert [(item.label, item.amount) for item in found(items)] == [
        ("private", 70),
        ("private", 70),
        ("public", 70),
        ("public", 70),
    ]


@pytest.mark.parametrize("period", [None, (DAY, DAY), (DAY, DAY - HOUR)])
def test_a_period_of_no_length_moved_nothing(period: tuple[datetime, datetime] | None) -> None:
    assert moved([said(Reading.PERIOD, 70, DAY, period=period)]) == []


def owned(start: datetime, end: datetime | None, project: str) -> Interval:
    return Interval(
        start=start,
        end=end,
        attributes={"project": project},
        opened_by=(),
        closed_by=(),
        provenance=Provenance.EVENTS,
    )


def test_what_moved_is_its_owners_of_that_moment_unless_the_body_names_one() -> None:
    history = (owned(DAY, DAY + HOUR, "p1"), owned(DAY + HOUR, DAY + 2 * HOUR, "p2"))
    moments = [DAY - HOUR, DAY + MINUTE, DAY + HOUR, DAY + 9 * HOUR]
    items = [said(Reading.DELTA, 1, moment, project=None) for moment in moments]
    items.append(said(Reading.DELTA, 1, DAY + 10 * HOUR, project="p9"))
    moved = amounts(items, history, is_born_of_event=True).amounts
    owners = [item.project_id for item in moved]
    assert owners == ["p1", "p1", "p2", "p2", "p9"]
    assert [item.project_id for item in found(items)][:4] == [None] * 4


def test_every_amount_names_the_messages_it_rests_on() -> None:
    items = [
        said(Reading.CUMULATIVE, value, DAY + n * HOUR, message=f"m{n}")
        for n, value in enumerate((100, 150))
    ]
    items.append(said(Reading.DELTA, 5, DAY + HOUR, message="d"))
    (one,) = found(items)
    assert one.amount == 55
    assert {item.message_id for item in one.evidence} == {"m0", "m1", "d"}
