"""From readings of counters to what moved: amounts, each belonging to one moment.

Like the fold of states, a pure function of the *set* of readings: order and copies cannot matter.
Three kinds of counters need three rules, each its format's own.

One that grows since the beginning of the audit period and is repeated in every body (Nova's
bandwidth) counts its highest value of each period, once. Periods that overlap without beginning
together (an hourly audit and a daily one) speak of the same bytes: of those, some that do not
overlap are counted, such that they are as much as can be. No less has moved, and nothing is counted
twice.

One that grows until it is reset (volume.usage) counts the differences of successive readings; a
reading below the one before is a reset, and counts as it stands. What overlaps, cancels out.

One that already is a difference (l3.meter) counts as it is: what was told is set to nothing. So a
body that is told again, under another message id, is known by who measured it and until when
(`CounterReading.run`); without a name for who did, every message counts.

The first reading of a growing counter counts whole where the counter is known to have begun at
nothing inside the resource's own metered life: another run of it was read before
(`CounterReading.run`), or the resource's birth is known from its own event. Elsewhere it is where
counting begins.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from operator import itemgetter
from typing import Final, NamedTuple

from hostler_usage.history.intervals import Interval
from hostler_usage.reading.mapping import Reading
from hostler_usage.reading.statement import Evidence, Statement
from hostler_usage.reading.times import MICROSECOND, SAME_MOMENT


@dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """So many units under `counter` (and `label`: a network, a disk) belong to the moment `at`.

    Of a period, that moment is its last microsecond. `evidence` are the readings it rests on.
    """

    counter: str
    label: str
    at: datetime
    amount: int
    project_id: str | None
    evidence: tuple[Evidence, ...]


class _Point(NamedTuple):
    """A reading, and who read it."""

    at: datetime
    value: int
    run: str
    period: tuple[datetime, datetime] | None
    project_id: str | None
    evidence: Evidence


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """What moved, in order of time, and whether readings overlapped so that not all of it is certain."""

    amounts: tuple[Amount, ...]
    is_overlapping: bool


def amounts(
    statements: Iterable[tuple[Statement, Evidence]],
    intervals: Sequence[Interval],
    *,
    is_born_of_event: bool,
) -> Moved:
    """Return what moved of one resource; what is nothing is left out."""
    series: dict[tuple[str, str, Reading], list[_Point]] = defaultdict(list)
    for statement, evidence in statements:
        if not statement.readings:
            continue
        project = next((value for name, value in statement.attributes if name == "project"), None)
        project_id = project if isinstance(project, str) else None
        at = statement.at or evidence.event_time
        for reading in statement.readings:
            series[reading.name, reading.label, reading.reading].append(
                _Point(at, reading.value, reading.run, statement.period, project_id, evidence)
            )
    found: dict[tuple[str, str, datetime], Amount] = {}
    is_overlapping = False
    for (counter, label, kind), points in sorted(series.items(), key=itemgetter(0)):
        counted, is_in_doubt = _RULES[kind](points, is_born_of_event)
        is_overlapping |= is_in_doubt
        for moment, amount, project_id, rests_on in counted:
            if not amount:
                continue
            key = (counter, label, moment)
            before = found.get(key)
            found[key] = Amount(
                counter=counter,
                label=label,
                at=moment,
                amount=amount + (before.amount if before else 0),
                project_id=project_id or _owner(intervals, moment),
                evidence=(before.evidence if before else ()) + rests_on,
            )
    return Moved(amounts=tuple(found[key] for key in sorted(found)), is_overlapping=is_overlapping)


# what moved until which moment, whose it was, and what says so; and whether more was told than counts
_Counted = tuple[datetime, int, str | None, tuple[Evidence, ...]]
_Found = tuple[Iterable[_Counted], bool]


def _order(point: _Point) -> tuple[object, ...]:
    """A total order: what one message says twice is told apart by what it says."""
    evidence = point.evidence
    return (
        *(point.at, point.value, evidence.event_time, evidence.message_id, evidence.digest),
        *(point.run, point.project_id or "", repr(point.period)),
    )


class _Period(NamedTuple):
    """What was told of a period: its highest reading."""

    start: datetime
    end: datetime
    witness: _Point


def _highest_of_periods(points: Sequence[_Point], _: bool) -> _Found:
    by_start: dict[datetime, list[_Point]] = defaultdict(list)
    ends: dict[datetime, datetime] = {}
    for point in points:
        if point.period is not None and point.period[0] < point.period[1]:
            start, end = point.period
            by_start[start].append(point)
            ends[start] = max(end, ends.get(start, end))
    periods = [  # two may end in one moment
        _Period(start, ends[start], same[0] if len(same) == 1 else _highest(same))
        for start, same in sorted(by_start.items())
    ]
    is_overlapping = any(_overlap(one, other) for one, other in pairwise(periods))
    if is_overlapping:  # then each reading counts for itself, until when it was taken
        by_period: dict[tuple[datetime, datetime], list[_Point]] = defaultdict(list)
        for start, same in by_start.items():
            for point in same:
                assert point.period is not None
                by_period[start, point.period[1]].append(point)
        periods = _most_certain(
            _Period(start, end, _highest(same)) for (start, end), same in by_period.items()
        )
    counted = [
        (
            item.end - MICROSECOND,
            item.witness.value,
            item.witness.project_id,
            (item.witness.evidence,),
        )
        for item in periods
    ]
    return counted, is_overlapping


def _highest(points: Sequence[_Point]) -> _Point:
    highest = max(point.value for point in points)
    return min((point for point in points if point.value == highest), key=_order)


def _overlap(before: _Period, after: _Period) -> bool:
    """Whether one begins in the other; that one's end may be cut or rounded to the second."""
    return before.end - after.start > SAME_MOMENT


def _most_certain(periods: Iterable[_Period]) -> list[_Period]:
    """Those of them that do not overlap and together are the most; of equals, the greatest number."""
    ordered = sorted(periods, key=lambda item: (item.end, item.start))
    ends = [item.end for item in ordered]
    best: list[tuple[int, int, int | None]] = [
        (0, 0, None)
    ]  # of the first so many: the last taken
    for number, item in enumerate(ordered):
        compatible = bisect_right(ends, item.start + SAME_MOMENT, hi=number)
        total, count = best[compatible][0] + item.witness.value, best[compatible][1] + 1
        without = best[-1][:2]
        best.append((total, count, compatible) if (total, count) > without else (*without, None))
    chosen: list[_Period] = []
    position = len(ordered)
    while position:
        before_it = best[position][2]
        if before_it is None:
            position -= 1
        else:
            chosen.append(ordered[position - 1])
            position = before_it
    return chosen[::-1]


def _growth(points: Sequence[_Point], is_born_of_event: bool) -> _Found:
    counted: list[_Counted] = []
    for number, run in enumerate(_runs(sorted(points, key=_order))):
        first = run[0]
        if number > 0 or is_born_of_event:
            counted.append((first.at, first.value, first.project_id, (first.evidence,)))
        for before, point in pairwise(run):
            is_reset = point.value < before.value
            grown = point.value if is_reset else point.value - before.value
            counted.append((point.at, grown, point.project_id, (before.evidence, point.evidence)))
    return counted, False


def _runs(points: Iterable[_Point]) -> list[list[_Point]]:
    """Readings in order, parted by the runs they are of, in the order of their first ones.

    A name may lack its last parts, where whoever read could not tell them. As far as both say it is one
    run: of those whose names go on from there, the one that was read last.
    """
    runs: list[list[_Point]] = []
    names: list[str] = []  # the most that was said of each
    latest: dict[str, int] = {}  # of those whose names are this or begin so, the one read last
    number = 0
    name: str | None = None
    for point in points:
        if point.run != name:
            name = point.run
            parts = name.split("/")
            begins = ["/".join(parts[:length]) for length in range(len(parts), -1, -1)]
            same = (
                latest[begin]
                for begin in begins
                if begin in latest and (begin == name or names[latest[begin]] == begin)
            )
            number = next(same, len(runs))
            if number == len(runs):
                runs.append([])
                names.append(name)
            names[number] = max(names[number], name, key=len)
            latest.update(dict.fromkeys(begins, number))
        runs[number].append(point)
    return runs


def _each(points: Sequence[_Point], _: bool) -> _Found:
    told: dict[tuple[object, ...], _Point] = {}
    is_overlapping = False
    for point in sorted(points, key=_order):
        if point.run:
            key: tuple[object, ...] = (point.run, point.at)
            is_overlapping |= key in told and told[key].value != point.value
            # of what is not the same after all, the higher one
            if key not in told or told[key].value < point.value:
                told[key] = point
        else:
            # one message in two envelopes (from the broker and from a log) is two bodies, and moved nothing twice
            told.setdefault((point.at, point.value, point.evidence.message_id), point)
    counted = [
        (point.at, point.value, point.project_id, (point.evidence,)) for point in told.values()
    ]
    return counted, is_overlapping


_RULES: Final[Mapping[Reading, Callable[[Sequence[_Point], bool], _Found]]] = {
    Reading.PERIOD: _highest_of_periods,
    Reading.CUMULATIVE: _growth,
    Reading.DELTA: _each,
}


def _owner(intervals: Sequence[Interval], moment: datetime) -> str | None:
    """Whose the resource was; the first owner's before it was born, the last one's after its end."""
    owner = None
    for interval in intervals:
        if owner is not None and interval.start > moment:
            break
        value = interval.attributes.get("project")
        owner = value if isinstance(value, str) else owner
    return owner
