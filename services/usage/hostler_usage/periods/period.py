"""Months of usage that are closed once and for all, and what late news does to them.

A period runs (open), waits for what is late (settling), and is closed: what it amounts to is frozen
as lines and sealed with a hash. News that comes after that is never an edit. It becomes signed
adjustments, charged to the period that is open by then, so that the lines of a closed period and
its adjustments always add up to what the ledger says of it now.

An adjustment is the difference between what the facts of one resource amounted to before a fold and
what they amount to after it: exact integers, computed from the rows that the fold replaced.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, tzinfo
from enum import StrEnum
from typing import Any, Final, NamedTuple

from hostler_usage.history.calendar_span import Span, begin, following
from hostler_usage.history.measures import quantity
from hostler_usage.reading.mapping import Measure
from hostler_usage.reading.times import microseconds

MOST_EVIDENCE: Final = 100
"""How many of the messages that brought an adjustment about are named with it."""


class State(StrEnum):
    """How far a period has come."""

    OPEN = "open"  # it runs
    SETTLING = "settling"  # it is over, and what is late may still come
    CLOSED = "closed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Period:
    """A calendar month of some place, `[start, end)`; `name` is `YYYY-MM`."""

    name: str
    start: datetime
    end: datetime
    time_zone: str
    made_at: datetime
    closed_at: datetime | None = None

    def state(self, now: datetime) -> State:
        """How far it has come by `now`."""
        if self.closed_at is not None:
            return State.CLOSED
        return State.OPEN if now < self.end else State.SETTLING

    def settles_at(self, settle: timedelta) -> datetime:
        """When it has waited for what is late; one that was made late waits from then."""
        return max(self.end, self.made_at) + settle


def missing(
    known: Iterable[Period], first: datetime, now: datetime, place: tzinfo, time_zone: str
) -> list[Period]:
    """The periods that are to be made, so that each moment from `first` to `now` is in one.

    Where the zone was changed since the known ones were made, new ones begin and end where those
    do: no moment is ever in two.
    """
    by_name = {item.name: item for item in known}
    made = []
    moment = begin(min(first, now), Span.MONTH, place)
    previous: Period | None = None
    while moment <= now:
        after = following(moment, Span.MONTH, place)
        local = moment.astimezone(place) + timedelta(days=1)  # a midnight may be leapt over
        name = f"{local:%Y-%m}"
        if name not in by_name:
            start = moment if previous is None else previous.end
            following_one = by_name.get(f"{after.astimezone(place) + timedelta(days=1):%Y-%m}")
            end = after if following_one is None else following_one.start
            if start < end and start <= now and first < end:
                by_name[name] = Period(
                    name=name, start=start, end=end, time_zone=time_zone, made_at=now
                )
                made.append(by_name[name])
        previous = by_name.get(name, previous)
        moment = after
    return made


# --- what keeps a period from being closed


class Obstacle(StrEnum):
    """Why a period cannot be closed yet."""

    RUNNING = "running"
    SETTLING = "settling"
    FOLD_BEHIND = "fold_behind"
    REBUILDING = "rebuilding"
    AUDITS_UNSETTLED = "audits_unsettled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocker:
    """What keeps a period from being closed, in a code and in words."""

    obstacle: Obstacle
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsettled:
    """What of the ledger may still change a period without any news coming in."""

    fold_behind: timedelta | None = None  # how long the oldest resource waits; None: it keeps up
    is_rebuilding: bool = False
    audit_periods: int = 0
    audited_resources: int = 0


def blockers(
    period: Period, unsettled: Unsettled, now: datetime, settle: timedelta
) -> list[Blocker]:
    """What keeps a period from being closed at `now`; nothing where it may be."""
    found = []
    if now < period.end:
        found.append(_blocker(Obstacle.RUNNING, f"it runs until {period.end.isoformat()}"))
    elif now < (until := period.settles_at(settle)):
        found.append(
            _blocker(Obstacle.SETTLING, f"what is late is waited for until {until.isoformat()}")
        )
    if unsettled.fold_behind is not None:
        seconds = int(unsettled.fold_behind.total_seconds())
        found.append(
            _blocker(Obstacle.FOLD_BEHIND, f"stored messages wait to be folded for {seconds} s")
        )
    if unsettled.is_rebuilding:
        found.append(_blocker(Obstacle.REBUILDING, "everything is being made anew"))
    counts = {
        "audit periods": unsettled.audit_periods,
        "resources": unsettled.audited_resources,
    }
    unchecked = " and ".join(f"{count} {what}" for what, count in counts.items() if count)
    if unchecked:
        found.append(_blocker(Obstacle.AUDITS_UNSETTLED, f"not checked yet in it: {unchecked}"))
    return found


def _blocker(obstacle: Obstacle, detail: str) -> Blocker:
    return Blocker(obstacle=obstacle, detail=detail)


# --- lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a period is metered by: kept with it, so that its adjustments are by the same.

    `kinds` names of each resource type the attribute that tells its lines apart: a flavor, a volume
    type.
    """

    measures: tuple[Measure, ...]
    kinds: Mapping[str, str]
    _of_type: dict[str, list[Measure]] = field(default_factory=dict, repr=False, compare=False)

    def measures_of(self, resource_type: str) -> Sequence[Measure]:
        """The measures of one resource type."""
        if resource_type not in self._of_type:
            self._of_type[resource_type] = [
                item for item in self.measures if item.resource_type == resource_type
            ]
        return self._of_type[resource_type]

    def encoded(self) -> dict[str, Any]:
        """As it is kept, in JSON."""
        return {
            "kinds": dict(sorted(self.kinds.items())),
            "measures": [
                {
                    "name": item.name,
                    "resource_type": item.resource_type,
                    "attribute": item.attribute,
                    "counter": item.counter,
                }
                for item in self.measures
            ],
        }


def decoded(kept: Mapping[str, Any]) -> Terms:
    """What `Terms.encoded` gave."""
    return Terms(
        measures=tuple(Measure(**item) for item in kept["measures"]), kinds=dict(kept["kinds"])
    )


class LineKey(NamedTuple):
    """What one line of a period is about; empty where something is not known."""

    region: str
    project_id: str
    resource_type: str
    state_class: str
    kind: str
    measure: str


class HeldRow(NamedTuple):
    """What a resource was for a span: the columns of an interval that lines are made of, and its citations."""

    start: datetime
    end: datetime | None
    project_id: str | None
    state_class: str
    attributes: Mapping[str, object]
    cited: Sequence[Mapping[str, str]] = ()


class MovedRow(NamedTuple):
    """What moved of a resource at one moment."""

    counter: str
    label: str
    at: datetime
    amount: int
    project_id: str | None
    cited: Sequence[Mapping[str, str]] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that is known of one resource at some time."""

    held: Sequence[HeldRow] = ()
    moved: Sequence[MovedRow] = ()


def lines(
    region: str, resource_type: str, facts: Facts, terms: Terms, start: datetime, end: datetime
) -> Counter[LineKey]:
    """What one resource adds to the lines of `[start, end)`.

    What moved is under the state and kind that the resource had at that moment.
    """
    found: Counter[LineKey] = Counter()
    measures = terms.measures_of(resource_type)
    kind_of = terms.kinds.get(resource_type, "")

    def key(project_id: str | None, row: HeldRow | None, measure: Measure) -> LineKey:
        kind = None if row is None else row.attributes.get(kind_of)
        return LineKey(
            region,
            project_id or "",
            resource_type,
            "" if row is None else row.state_class,
            "" if kind is None else str(kind),
            measure.name,
        )

    for row in facts.held:
        until = end if row.end is None else min(row.end, end)
        span = microseconds(until - max(row.start, start))
        if span <= 0:
            continue
        for measure in measures:
            if measure.is_held and (amount := span * quantity(measure, row.attributes)):
                found[key(row.project_id, row, measure)] += amount
    for item in facts.moved:
        if not start <= item.at < end:
            continue
        for measure in measures:
            if measure.counter == item.counter:
                found[key(item.project_id, _holding(facts.held, item.at), measure)] += item.amount
    return found


def _holding(rows: Iterable[HeldRow], moment: datetime) -> HeldRow | None:
    for row in rows:
        if row.start <= moment and (row.end is None or moment < row.end):
            return row
    return None


def is_touched(before: Facts, after: Facts, until: datetime) -> bool:
    """Whether anything before `until` differs between the two: a look that costs next to nothing."""
    return _clipped(before, until) != _clipped(after, until)


def _begin(row: tuple[object, ...]) -> tuple[Any, ...]:
    return row[:1] if isinstance(row[0], datetime) else row[:3]


def _clipped(facts: Facts, until: datetime) -> tuple[list[Any], list[Any]]:
    held = [
        (row.start, until if row.end is None else min(row.end, until), *row[2:5])
        for row in facts.held
        if row.start < until
    ]
    moved = [row[:5] for row in facts.moved if row.at < until]
    return sorted(held, key=_begin), sorted(moved, key=_begin)


def difference(
    region: str,
    resource_type: str,
    before: Facts,
    after: Facts,
    terms: Terms,
    start: datetime,
    end: datetime,
) -> dict[LineKey, int]:
    """What a fold changed about the lines of `[start, end)`; nothing is left out but zeros."""
    changes = lines(region, resource_type, after, terms, start, end)
    changes.subtract(lines(region, resource_type, before, terms, start, end))
    return {key: amount for key, amount in sorted(changes.items()) if amount}


def news(before: Facts, after: Facts) -> list[dict[str, str]]:
    """The messages that a change came with, oldest first.

    They are those that what is now rests on and what was before did not; where there are none,
    something was taken back, and they are those that only what was before rested on.
    """
    old, new = _cited(before), _cited(after)
    told = (new.keys() - old.keys()) or (old.keys() - new.keys()) or new.keys()
    known = old | new
    return [known[name] for name in sorted(told, key=lambda name: (_event_time(name), name))]


def _event_time(event_id: str) -> int:
    return int(event_id.rpartition("-")[0])


def _cited(facts: Facts) -> dict[str, dict[str, str]]:
    lists = [*(row.cited for row in facts.held), *(row.cited for row in facts.moved)]
    return {item["event_id"]: dict(item) for cited in lists for item in cited}


# --- noted changes become adjustments


class Noted(NamedTuple):
    """What one fold changed about one resource in one closed period."""

    period: str
    region: str
    resource_type: str
    resource_id: str
    changes: Sequence[tuple[LineKey, int]]
    evidence: Sequence[Mapping[str, str]]
    noticed_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Adjustment:
    """A correction of one line of a closed period on account of one resource."""

    period: str
    line: LineKey
    delta: int
    resource_id: str
    messages: int
    evidence: Sequence[Mapping[str, str]]
    noticed_at: datetime


def adjustments(noted: Iterable[Noted]) -> list[Adjustment]:
    """What some noted changes come to: those of one line and resource are one, and zeros are none."""
    deltas: Counter[tuple[str, str, LineKey]] = Counter()
    evidence: dict[tuple[str, str, LineKey], dict[str, Mapping[str, str]]] = {}
    noticed: dict[tuple[str, str, LineKey], datetime] = {}
    for item in noted:
        for line, amount in item.changes:
            key = (item.period, item.resource_id, line)
            deltas[key] += amount
            evidence.setdefault(key, {}).update({one["event_id"]: one for one in item.evidence})
            noticed[key] = min(item.noticed_at, noticed.get(key, item.noticed_at))
    found = []
    for key, delta in sorted(deltas.items()):
        if not delta:
            continue
        period, resource_id, line = key
        messages = sorted(evidence[key], key=lambda name: (_event_time(name), name))
        found.append(
            Adjustment(
                period=period,
                line=line,
                delta=delta,
                resource_id=resource_id,
                messages=len(messages),
                evidence=[evidence[key][name] for name in messages[:MOST_EVIDENCE]],
                noticed_at=noticed[key],
            )
        )
    return found


# --- the seal


def canonical(period: Period, line: LineKey, amount: int) -> bytes:
    r"""One line of a period as the bytes that are hashed and served.

    A JSON object with these keys in this order, no blanks between, everything beyond ASCII escaped
    as \uxxxx in lower case, `null` for what is not known, a line feed at the end. `amount` is a
    whole number: unit-microseconds of what was held, units of what moved.
    """
    said: dict[str, object] = {
        "period": period.name,
        "start": _zulu(period.start),
        "end": _zulu(period.end),
        "region": line.region,
        "project_id": line.project_id or None,
        "resource_type": line.resource_type,
        "state_class": line.state_class or None,
        "kind": line.kind or None,
        "measure": line.measure,
        "amount": amount,
    }
    return json.dumps(said, separators=(",", ":")).encode("ascii") + b"\n"


def _zulu(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a closed period holds: `sha256` is over its canonical lines, one after the other.

    Lines are in the order of their keys, compared as UTF-8; `totals` are sums by measure.
    """

    sha256: bytes
    lines: int
    totals: Mapping[str, int]


def ordered(amounts: Mapping[LineKey, int]) -> list[tuple[LineKey, int]]:
    """The lines in their canonical order; a line of nothing is none."""
    return sorted((key, amount) for key, amount in amounts.items() if amount)


def sealed(period: Period, of: Iterable[tuple[LineKey, int]]) -> Manifest:
    """The manifest of lines in their canonical order."""
    digest, count = hashlib.sha256(), 0
    totals: Counter[str] = Counter()
    for line, amount in of:
        digest.update(canonical(period, line, amount))
        totals[line.measure] += amount
        count += 1
    return Manifest(sha256=digest.digest(), lines=count, totals=dict(sorted(totals.items())))


def recomputed(body: Iterable[bytes]) -> Manifest:
    """The manifest of lines as they were served, with nothing but their bytes to go by.

    Raises:
        ValueError: a line is none of a period's.
    """
    digest, count = hashlib.sha256(), 0
    totals: Counter[str] = Counter()
    for text in body:
        digest.update(text)
        try:
            said = json.loads(text)
            totals[said["measure"]] += said["amount"]
        except (ValueError, KeyError, TypeError) as exc:
            raise ValueError(f"line {count + 1} is none of a period's") from exc
        count += 1
    return Manifest(sha256=digest.digest(), lines=count, totals=dict(sorted(totals.items())))
