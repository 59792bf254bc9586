"""Which part of a window sums of whole days answer, and which the facts have to.

A window may be cut into slices. A sum of a day answers for the slice that holds all of the day; the
days that a cut goes through, those that are not summed up yet, and the ends of the window are for
the facts.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from typing import Final

from hostler_usage.history.rollup import midnight
from hostler_usage.reading.times import MICROSECOND

MOST_STRETCHES: Final = 12
"""Each is one more condition, and one more reading of facts beside it, in a statement."""
Span = tuple[datetime, datetime]
"""`[start, end)`."""
_DAY: Final = timedelta(days=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Stretches of days `[first, last)` for the sums, and spans `[start, end)` for the facts, in order.

    Together they are the window, and no moment of it is in two.
    """

    days: tuple[tuple[date, date], ...]
    rest: tuple[Span, ...]


def parts(edges: Sequence[datetime], until: date | None) -> Parts:
    """The parts of the window that `edges`, in order, begin, cut and end; days before `until` are summed up.

    Of more than `MOST_STRETCHES` the shortest are left to the facts.
    """
    stretches: list[tuple[date, date]] = []
    for start, end in pairwise(edges):
        first = (start.astimezone(UTC) + _DAY - MICROSECOND).date()
        last = end.astimezone(UTC).date()
        if until is None or first >= min(last, until):
            continue
        if stretches and stretches[-1][1] == first:
            first = stretches.pop()[0]
        stretches.append((first, min(last, until)))
    longest = sorted(stretches, key=lambda one: one[0] - one[1])[:MOST_STRETCHES]
    days = tuple(sorted(longest))
    cuts = [edges[0], *(midnight(day) for stretch in days for day in stretch), edges[-1]]
    rest = zip(cuts[::2], cuts[1::2], strict=True)
    return Parts(days=days, rest=tuple((one, other) for one, other in rest if one < other))


def pieces(spans: Iterable[Span], cuts: Iterable[datetime]) -> list[Span]:
    """The spans, each cut where one of the cuts lies within it."""
    moments = sorted(cuts)
    found: list[Span] = []
    for start, end in spans:
        within = moments[bisect_right(moments, start) : bisect_left(moments, end)]
        found += pairwise([start, *within, end])
    return found


def midnights(spans: Iterable[Span]) -> list[datetime]:
    """The midnights within spans, in UTC."""
    found = []
    for start, end in spans:
        moment = midnight(start.astimezone(UTC).date() + _DAY)
        while moment < end:
            found.append(moment)
            moment += _DAY
    return found
