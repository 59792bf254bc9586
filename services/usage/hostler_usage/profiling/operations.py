"""Operations: what was done to resources, how long it took, and what never came to its end.

Services announce most of what they do twice: `<action>.start`, and `<action>.end` or
`<action>.error`. `pair` puts them together. It is a pure function of the *set* of marks, whatever
order or how often they came in; the twins of both of Nova's formats are one mark with two witnesses.

Marks of one request belong together. A request may do the same again (a create that is sent to the
next host): each closing closes the last start before it that is still open, of its own host where
there are several. What names no request is paired with the nearest following end of its action.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final

from hostler_usage.reading import citation
from hostler_usage.reading.mapping import Phase
from hostler_usage.reading.statement import Evidence, Statement
from hostler_usage.reading.times import SAME_MOMENT, microseconds

# what has no .start of its own, or one that names no resource (Neutron's: the request's body only)
_AT_ONCE_TYPES: Final = frozenset({"image", "project", "user", "network", "meter_label"})
_AT_ONCE: Final = frozenset(
    {
        ("volume", "retype"),
        ("floating_ip", "create"),
        ("floating_ip", "allocate"),
        ("floating_ip", "associate"),
        ("floating_ip", "disassociate"),
        ("floating_ip", "deallocate"),
    }
)


class Outcome(StrEnum):
    """How an operation ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    UNFINISHED = "unfinished"  # started, and nothing was heard of it since
    LOST_START = "lost_start"  # ended well, and its start is not here


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """One event of an operation. `action` is the same name in all dialects, without the phase."""

    evidence: Evidence
    request_id: str | None
    action: str
    phase: Phase
    at: datetime
    host: str | None = None
    flavor: str | None = None
    reason: str | None = None
    project_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """Something that was done to a resource.

    `started_at` is None where the action has no start, or where it was lost; `ended_at` where it
    did not end. `duration_us` needs both; clocks of two hosts that disagree make it nothing, never
    less. Host and flavor are those it ended with, else those it began with.
    """

    action: str
    request_id: str | None
    started_at: datetime | None
    ended_at: datetime | None
    outcome: Outcome
    host: str | None
    flavor: str | None
    project_id: str | None
    reason: str | None
    evidence: tuple[Evidence, ...]

    @property
    def duration_us(self) -> int | None:
        """Microseconds from start to end."""
        if self.started_at is None or self.ended_at is None:
            return None
        return max(0, microseconds(self.ended_at - self.started_at))

    @property
    def begun_at(self) -> datetime:
        """The first moment that is known of it."""
        moment = self.started_at or self.ended_at
        assert moment is not None
        return moment


def mark(statement: Statement, evidence: Evidence) -> Mark | None:
    """The mark that a message's statement is; None for one that is no part of an operation."""
    if statement.phase is None or statement.operation is None or statement.is_resent:
        return None
    said = {name: value for name, value in statement.attributes if isinstance(value, str)}
    return Mark(
        evidence=evidence,
        request_id=statement.request_id,
        action=statement.operation,
        # a create.end whose message is not "Success" was a failure in old releases
        phase=Phase.ERROR
        if statement.failed and statement.phase is Phase.END
        else statement.phase,
        at=evidence.event_time,
        host=said.get("host"),
        flavor=said.get("flavor"),
        reason=statement.reason,
        project_id=said.get("project"),
    )


def pair_said(
    resource_type: str, said: Iterable[tuple[Statement, Evidence]]
) -> tuple[Operation, ...]:
    """`pair` for all that messages say of one resource."""
    marks = (mark(statement, evidence) for statement, evidence in said)
    return pair(resource_type, (item for item in marks if item is not None))


def pair(resource_type: str, marks: Iterable[Mark]) -> tuple[Operation, ...]:
    """The operations that a set of marks of one resource amounts to, oldest first."""
    by_action: dict[str, dict[str | None, list[_Point]]] = defaultdict(lambda: defaultdict(list))
    for point in _points(set(marks)):
        by_action[point.action][point.request_id].append(point)
    found: list[Operation] = []
    for action, by_request in by_action.items():
        pairs: list[_Pair] = []
        for points in by_request.values():
            pairs += _paired(points)
        has_start = resource_type not in _AT_ONCE_TYPES and (resource_type, action) not in _AT_ONCE
        found += (_operation(item, has_start=has_start) for item in _joined(pairs))
    return tuple(sorted(found, key=_operation_order))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Point:
    """A mark with its twins."""

    action: str
    request_id: str | None
    phase: Phase
    at: datetime
    host: str | None
    flavor: str | None
    reason: str | None
    project_id: str | None
    evidence: tuple[Evidence, ...]


@dataclass(slots=True)
class _Pair:
    """A start, a closing, or both."""

    start: _Point | None
    close: _Point | None

    @property
    def order(self) -> tuple[object, ...]:
        return tuple(_point_order(item) for item in (self.start, self.close) if item is not None)


def _mark_order(item: Mark) -> tuple[object, ...]:
    return (item.at, *citation.order(item.evidence), repr(item))


def _point_order(item: _Point) -> tuple[object, ...]:
    return (item.at, item.phase, [citation.order(evidence) for evidence in item.evidence])


def _operation_order(item: Operation) -> tuple[object, ...]:
    return (item.begun_at, item.action, [citation.order(evidence) for evidence in item.evidence])


def _points(marks: set[Mark]) -> list[_Point]:
    """The marks, twins made one: the same request, action, phase and host within a second."""
    clusters: dict[tuple[object, ...], list[list[Mark]]] = defaultdict(list)
    for item in sorted(marks, key=_mark_order):
        same = clusters[item.request_id, item.action, item.phase, item.host]
        if same and item.at - same[-1][0].at <= SAME_MOMENT:
            same[-1].append(item)
        else:
            same.append([item])
    return sorted(
        (_point(twins) for same in clusters.values() for twins in same), key=_point_order
    )


def _point(twins: Sequence[Mark]) -> _Point:
    first = twins[0]
    return _Point(
        action=first.action,
        request_id=first.request_id,
        phase=first.phase,
        # the versioned format cuts to the second what the legacy one spells out
        at=next((item.at for item in twins if item.at.microsecond), first.at),
        host=first.host,
        flavor=next((item.flavor for item in twins if item.flavor is not None), None),
        reason=next((item.reason for item in twins if item.reason is not None), None),
        project_id=next((item.project_id for item in twins if item.project_id is not None), None),
        evidence=tuple(sorted({item.evidence for item in twins}, key=citation.order)),
    )


def _paired(points: Sequence[_Point]) -> list[_Pair]:
    """The points of one request and one action, in order, put together."""
    pairs: list[_Pair] = []
    for point in points:
        if point.phase is Phase.START:
            pairs.append(_Pair(point, None))
            continue
        start = _open_start(pairs, point)
        if start is not None:
            start.close = point
            continue
        before = pairs[-1] if pairs else None
        if _tells_again(before, point):
            assert before is not None
            assert before.close is not None
            # `create.error` and then the function's own error; delete.end of compute and of the API
            before.close = _with(before.close, point)
            continue
        pairs.append(_Pair(None, point))
    return pairs


def _open_start(pairs: Sequence[_Pair], close: _Point) -> _Pair | None:
    open_pairs = [item for item in reversed(pairs) if item.close is None and item.start]
    same_host = [
        item for item in open_pairs if item.start and close.host and item.start.host == close.host
    ]
    return next(iter(same_host or open_pairs), None)


def _tells_again(before: _Pair | None, close: _Point) -> bool:
    return before is not None and before.close is not None and before.close.phase is close.phase


def _with(close: _Point, other: _Point) -> _Point:
    return replace(
        close,
        host=close.host or other.host,
        flavor=close.flavor or other.flavor,
        reason=close.reason or other.reason,
        project_id=close.project_id or other.project_id,
        evidence=tuple(sorted({*close.evidence, *other.evidence}, key=citation.order)),
    )


def _joined(pairs: list[_Pair]) -> list[_Pair]:
    """What stayed alone, put together across requests where one side names none.

    An end a moment before its start is of another host's clock, in the same request.
    """
    whole = [item for item in pairs if item.start is not None and item.close is not None]
    starts = sorted((item for item in pairs if item.close is None), key=lambda item: item.order)
    closes = sorted((item for item in pairs if item.start is None), key=lambda item: item.order)
    for close in list(closes):
        assert close.close is not None
        candidates = [item for item in starts if _may_join(item, close.close)]
        if candidates:
            nearest = max(candidates, key=lambda item: item.order)
            nearest.close = close.close
            starts.remove(nearest)
            closes.remove(close)
            whole.append(nearest)
    return whole + starts + closes


def _may_join(start: _Pair, close: _Point) -> bool:
    opened = start.start
    assert opened is not None
    is_one_request = opened.request_id == close.request_id
    if is_one_request and opened.request_id is not None:
        return timedelta() <= opened.at - close.at <= SAME_MOMENT
    return None in (opened.request_id, close.request_id) and opened.at <= close.at


def _operation(item: _Pair, *, has_start: bool) -> Operation:
    start, close = item.start, item.close
    first = start or close
    assert first is not None
    if close is None:
        outcome = Outcome.UNFINISHED
    elif close.phase is Phase.ERROR:
        outcome = Outcome.FAILED
    elif start is None and has_start:
        outcome = Outcome.LOST_START
    else:
        outcome = Outcome.SUCCEEDED
    ends = [end for end in (close, start) if end is not None]
    return Operation(
        action=first.action,
        request_id=next((end.request_id for end in ends if end.request_id is not None), None),
        started_at=start.at if start else None,
        ended_at=close.at if close else None,
        outcome=outcome,
        host=next((end.host for end in ends if end.host is not None), None),
        flavor=next((end.flavor for end in ends if end.flavor is not None), None),
        project_id=next((end.project_id for end in ends if end.project_id is not None), None),
        reason=close.reason if close else None,
        evidence=tuple(
            sorted({evidence for end in ends for evidence in end.evidence}, key=citation.order)
        ),
    )
