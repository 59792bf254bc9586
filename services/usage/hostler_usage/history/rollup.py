"""What a change of intervals and amounts does to the sums of whole days.

Sums of days are kept beside the facts they are sums of, and changed with them: what a fact that
went away had added is taken off, what a new one adds is put on. Exact integers, so that any number
of changes in any order leaves precisely the sum of what is there.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Mapping as Table
from datetime import UTC, date, datetime, timedelta
from typing import NamedTuple

from hostler_usage.history.measures import quantity
from hostler_usage.reading.mapping import Measure
from hostler_usage.reading.times import microseconds

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


_Series = tuple[str, str, str, str]  # what a cell is without its day


def sums(
    facts: Iterable[HeldFact | MovedFact],
    measures_of: Table[str, Sequence[Measure]],
    until: date,
) -> Counter[Cell]:
    """What facts add to the days before `until`."""
    end = midnight(until)
    days_of: dict[_Series, dict[date, int]] = defaultdict(lambda: defaultdict(int))
    counting: dict[tuple[str, str], list[str]] = {}
    for fact in facts:
        region, resource_type, project_id = fact.region, fact.resource_type, fact.project_id or ""
        measures = measures_of.get(resource_type, ())
        if isinstance(fact, MovedFact):
            counted = (resource_type, fact.counter)
            if counted not in counting:
                counting[counted] = [item.name for item in measures if item.counter == counted[1]]
            if fact.at < end:
                day = fact.at.astimezone(UTC).date()
                for name in counting[counted]:
                    days_of[region, project_id, resource_type, name][day] += fact.amount
            continue
        spans = list(_days(fact, end))
        for measure in measures:
            units = quantity(measure, fact.attributes) if measure.is_held else 0
            if units:
                sums_of_days = days_of[region, project_id, resource_type, measure.name]
                for day, span in spans:
                    sums_of_days[day] += units * span
    return Counter(
        {
            Cell(day, *series): amount
            for series, sums_of_days in days_of.items()
            for day, amount in sums_of_days.items()
        }
    )


def _days(fact: HeldFact, limit: datetime) -> Iterator[tuple[date, int]]:
    """The days before `limit` that a span touches, and the microseconds it lasts in each."""
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
