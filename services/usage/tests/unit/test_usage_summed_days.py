"""Which parts of a window sums of whole days answer: nothing twice, nothing left out."""

from datetime import UTC, date, datetime, timedelta
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from hostler_usage.history.rollup import midnight
from hostler_usage.history.summed_days import MOST_STRETCHES, Parts, parts

MAY = datetime(2026, 5, 1, tzinfo=UTC)
DAY, HOUR = timedelta(days=1), timedelta(hours=1)

_MOMENTS = st.one_of(
    st.integers(0, 40).map(lambda days: MAY + days * DAY),
    st.integers(0, 40 * 86_400).map(lambda seconds: MAY + timedelta(seconds=seconds)),
)


def test_days_are_for_the_sums_and_ends_for_the_facts() -> None:
    edges = [MAY + 5 * HOUR, MAY + 3 * DAY, MAY + 6 * DAY + HOUR]
    assert parts(edges, date(2026, 6, 1)) == Parts(
        days=((date(2026, 5, 2), date(2026, 5, 7)),),
        rest=((MAY + 5 * HOUR, MAY + DAY), (MAY + 6 * DAY, MAY + 6 * DAY + HOUR)),
    )


def test_a_day_that_a_cut_goes_through_is_for_the_facts() -> None:
    edges = [MAY, MAY + 2 * DAY + HOUR, MAY + 4 * DAY]
    assert parts(edges, date(2026, 6, 1)) == Parts(
        days=((date(2026, 5, 1), date(2026, 5, 3)), (date(2026, 5, 4), date(2026, 5, 5))),
        rest=((MAY + 2 * DAY, MAY + 3 * DAY),),
    )


@given(
    st.sets(_MOMENTS, min_size=2, max_size=60).map(sorted),
    st.none() | st.integers(0, 45).map(lambda days: (MAY + days * DAY).date()),
)
def test_the_parts_are_the_window_and_no_summed_day_is_cut(
    edges: list[datetime], until: date | None
) -> None:
    found = parts(edges, until)
    assert len(found.days) <= MOST_STRETCHES
    spans = [(midnight(first), midnight(last)) for first, last in found.days]
    whole = sorted([*spans, *found.rest])
    assert (whole[0][0], whole[-1][1]) == (edges[0], edges[-1])
    assert all(one[1] == other[0] for one, other in pairwise(whole))
    assert all(start < end for start, end in whole)
    for first, last in found.days:
        assert until is not None
        assert last <= until
        for edge in edges:
            if midnight(first) < edge < midnight(last):
                assert edge == midnight(edge.date())
