"""Audits that only say again what the one before them said, which a history need not be made of.

Most of what a cloud sends are audits of what has not changed. One that repeats the audit before it,
with nothing told of the time between, moves no edge and is cited nowhere: the fold of all
statements and the fold of those left by `without_repetitions` are one history. (They still verify
their periods and bring their counters' readings.)

Why this is so: both put their words at the times they were sent. The first one's hold, since no
event of the half hour before makes it stale; nothing takes effect between the two that could have
changed them; so the second one's are those that hold already, and rules 2 and 3 of `intervals`
pass over them.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from datetime import datetime
from itertools import pairwise

from hostler_usage.history.intervals import AUDIT_IS_STALE
from hostler_usage.reading.mapping import Edge
from hostler_usage.reading.statement import Evidence, Statement

Said = tuple[Statement, Evidence]
_SILENT = frozenset({Edge.NONE, Edge.COUNT})


def without_repetitions(said: Sequence[Said]) -> list[Said]:
    """What a history is made of; `said` and the result are in the order of citing."""
    speaking = [item for item in said if item[0].edge not in _SILENT]
    if any(one[1] == other[1] for one, other in pairwise(speaking)):
        return speaking  # what one message says twice has no order among itself to go by
    moments = sorted(_moments(speaking))
    found: list[Said] = []
    before: Said | None = None
    for item in speaking:
        if before is None or not _repeats(item, before, moments):
            found.append(item)
        before = item
    return found


def _moments(said: Iterable[Said]) -> set[datetime]:
    """Every moment from which on something may hold, but for those at which audits were sent."""
    found: set[datetime | None] = set()
    for statement, evidence in said:
        found.add(statement.born_at)
        found.add(statement.ended_at)
        if statement.edge is not Edge.AUDIT:
            found.add(evidence.event_time)
            found.update(statement.period or ())  # what is sent again names its moment so
    return {moment for moment in found if moment is not None}


def _repeats(item: Said, before: Said, moments: Sequence[datetime]) -> bool:
    one, other = before[0], item[0]
    if not (
        one.edge is other.edge is Edge.AUDIT
        and one.attributes == other.attributes
        and one.born_at == other.born_at
        and one.ended_at == other.ended_at
        and one.task == other.task
        and one.failed == other.failed
    ):
        return False
    quiet_since = before[1].event_time - AUDIT_IS_STALE
    return bisect_right(moments, quiet_since) == bisect_right(moments, item[1].event_time)
