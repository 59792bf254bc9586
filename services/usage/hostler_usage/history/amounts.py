"""From readings of counters to what moved: amounts, each belonging to one moment.

Like the fold of states, a pure function of the *set* of readings: order and copies cannot matter.
Three kinds of counters need three rules. One that grows since the beginning of the audit period and
is repeated in every body (Nova's bandwidth) counts its highest value of each period, once. One that
grows until it is reset counts the differences of successive readings; a reading below the one
before is a reset, and counts as it stands. One that already is a difference counts as it is.

The first reading of a growing counter counts whole where the counter is known to have begun at
nothing inside the resource's own metered life: another run of it was read before
(`CounterReading.run`), or the resource's birth is known from its own event. Elsewhere it is where
counting begins.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from operator import itemgetter
from typing import NamedTuple

from hostler_usage.history.intervals import Interval
from hostler_usage.reading.mapping import Reading
from hostler_usage.reading.statement import Evidence, Statement
from hostler_usage.reading.times import MICROSECOND


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


def amounts(
    statements: Iterable[tuple[Statement, Evidence]],
    intervals: Sequence[Interval],
    *,
    is_born_of_event: bool,
) -> tuple[Amount, ...]:
    """Return what moved of one resource, in order of time; what is nothing is left out."""
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
    for (counter, label, kind), points in sorted(series.items(), key=itemgetter(0)):
        for moment, amount, project_id, rests_on in _RULES[kind](points, is_born_of_event):
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
    return tuple(found[key] for key in sorted(found))


_Found = Iterator[tuple[datetime, int, str | None, tuple[Evidence, ...]]]


def _order(point: _Point) -> tuple[object, ...]:
    """A total order: what one message says twice is told apart by what it says."""
    evidence = point.evidence
    return (
        *(point.at, point.value, evidence.event_time, evidence.message_id, evidence.digest),
        *(point.run, point.project_id or "", repr(point.period)),
    )


def _highest_of_periods(points: Sequence[_Point], _: bool) -> _Found:
    periods: dict[datetime, list[_Point]] = defaultdict(list)
    ends: dict[datetime, datetime] = {}
    for point in points:
        if point.period is not None and point.period[0] < point.period[1]:
            start, end = point.period
            periods[start].append(point)
            ends[start] = max(end, ends.get(start, end))
    for start in sorted(periods):  # two may end in one moment
        same = periods[start]
        witness = same[0] if len(same) == 1 else _highest(same)
        yield ends[start] - MICROSECOND, witness.value, witness.project_id, (witness.evidence,)


def _highest(points: Sequence[_Point]) -> _Point:
    highest = max(point.value for point in points)
    return min((point for point in points if point.value == highest), key=_order)


def _growth(points: Sequence[_Point], is_born_of_event: bool) -> _Found:
    runs: dict[str, list[_Point]] = defaultdict(list)
    for point in sorted(points, key=_order):
        runs[point.run].append(point)
    for number, run in enumerate(runs.values()):  # in order of their first readings
        first = run[0]
        if number > 0 or is_born_of_event:
            yield first.at, first.value, first.project_id, (first.evidence,)
        for before, point in pairwise(run):
            is_reset = point.value < before.value
            grown = point.value if is_reset else point.value - before.value
            yield point.at, grown, point.project_id, (before.evidence, point.evidence)


def _each(points: Sequence[_Point], _: bool) -> _Found:
    told: set[tuple[datetime, int, str]] = set()
    for point in sorted(points, key=_order):
        # one message in two envelopes (from the broker and from a log) is two bodies, and moved nothing twice
        key = (point.at, point.value, point.evidence.message_id)
        if key not in told:
            told.add(key)
            yield point.at, point.value, point.project_id, (point.evidence,)


_RULES = {
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
