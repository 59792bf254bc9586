"""What a change of intervals and amounts does to the sums of whole days.

Sums of days are kept beside the facts they are sums of, and changed with them: what a fact that
went away had added is taken off, what a new one adds is put on. Exact integers, so that any number
of changes in any order leaves precisely the sum of what is there.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Mapping as Table
from datetime import UTC, date, datetime, timedelta
from typing import NamedTuple

from hostler_usage.mapping import Measure
from hostler_usage.measures import quantity
from hostler_usage.times import microseconds

_DAY = timedelta(days=1)


class Cell(NamedTuple):
    """One sum: of a measure, of a day, of a project in a region."""

    day: date
    region: str
    project_id: str
    resource_type: str
    measure: str


class HeldFact(NamedTuple):
    """A span of a resource's life."""

    region: str
    resource_type: str
    project_id: str | None
    start: datetime
    end: datetime | None
    attributes: Table[str, object]


class MovedFact(NamedTuple):
    """What moved at one moment."""

    region: str
    resource_type: str
    project_id: str | None
    counter: str
    at: datetime
    amount: int


def sums(
    facts: Iterable[HeldFact | MovedFact],
    measures_of: Table[str, Sequence[Measure]],
    until: date,
) -> Counter[Cell]:
    """What facts add to the days before `until`."""
    found: Counter[Cell] = Counter()
    for fact in facts:
        measures = measures_of.get(fact.resource_type, ())
        if isinstance(fact, MovedFact):
            day = fact.at.astimezone(UTC).date()
            for measure in measures:
                if measure.counter == fact.counter and day < until:
                    found[_cell(day, fact, measure)] += fact.amount
            continue
        held = [(item, quantity(item, fact.attributes)) for item in measures if item.is_held]
        for day, span in _days(fact, until):
            for measure, held_units in held:
                if held_units:
                    found[_cell(day, fact, measure)] += held_units * span
    return found


def _cell(day: date, fact: HeldFact | MovedFact, measure: Measure) -> Cell:
    return Cell(day, fact.region, fact.project_id or "", fact.resource_type, measure.name)


def _days(fact: HeldFact, until: date) -> Iterator[tuple[date, int]]:
    """The days before `until` that a span touches, and the microseconds it lasts in each."""
    limit = midnight(until)
    end = limit if fact.end is None else min(fact.end, limit)
    start = fact.start
    while start < end:
        day = start.astimezone(UTC).date()
        following = min(midnight(day + _DAY), end)
        yield day, microseconds(following - start)
        start = following


def midnight(day: date) -> datetime:
    """The moment a UTC day begins."""
    return datetime(day.year, day.month, day.day, tzinfo=UTC)
