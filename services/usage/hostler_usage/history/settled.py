"""The past of a resource that nothing new reaches, so that a fold need not read it again.

Most of a long history are audits that repeat each other, and readings whose differences are counted.
What follows from them is in the tables already. `settle` draws a line, `rows_from`, at a midnight,
where rows of verdicts are cut anyway, and keeps of the messages before `said_from`, some hours
later, only those statements that matter to what follows from the line on. Then the ledger of these
and of all that was said since is, from the line on, that of everything that was ever said; and
before the line nothing changes,

- as long as what was said since speaks of nothing before the line (`goes_on`),
- and as long as it leaves the intervals before the line as they are (`is_past_kept`).

Where it does not, everything is read again. So this decides how much a fold reads, and never what
comes of it: tests hold it against the ledger of everything.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import groupby
from operator import itemgetter
from typing import Final, NamedTuple

from hostler_usage.auditing.audits import Code, audit_statement
from hostler_usage.auditing.reconciliation import group_key
from hostler_usage.auditing.repetition import Said, without_repetitions
from hostler_usage.history.intervals import Anomaly, lives
from hostler_usage.history.ledger import Ledger, in_order
from hostler_usage.history.rollup import midnight
from hostler_usage.reading.mapping import Edge, Reading
from hostler_usage.reading.statement import Statement
from hostler_usage.reading.times import SAME_MOMENT

# what was sent later than this after its time is read with everything
_LATE: Final = timedelta(hours=6)
# a line is drawn when the messages are so far beyond it
_BEYOND: Final = timedelta(hours=12)
# more than audits and clocks are ever behind: what takes effect later touches nothing before the line
_MARGIN: Final = timedelta(hours=1)
# an audit of a period before the line is compared with what held when it was sent: in the margin
_SENT_WITHIN: Final = timedelta(minutes=50)
# fewer statements than these are not worth a row of their own
LEAST_READ: Final = 48
LEAST_SPARED: Final = 20
_SILENT: Final = frozenset({Edge.NONE, Edge.COUNT})
_TELLING: Final = frozenset({Edge.LAUNCH, Edge.RELAUNCH, Edge.END})


class Span(NamedTuple):
    """An interval of a history, as it is stored or as it was reckoned."""

    start: datetime
    end: datetime | None
    held: object
    closed_by: object


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """The line, and what is kept of what was said before `said_from`, in the order of citing."""

    rows_from: datetime
    said_from: datetime
    kept: tuple[Said, ...]

    def goes_on(self, said: Iterable[Said]) -> bool:
        """Whether what was said since speaks of nothing before the line that was not told before it."""
        audits = [statement for statement, _ in self.kept if statement.edge is Edge.AUDIT]
        told, audited = _lives(item for item, _ in self.kept), _lives(audits)
        is_ended = any(statement.edge is Edge.END for statement, _ in self.kept)
        for statement, evidence in said:
            moments = (statement.at, *(statement.period or ()))
            if evidence.event_time < self.said_from or any(
                moment is not None and moment < self.rows_from for moment in moments
            ):
                return False
            if statement.edge is Edge.END and is_ended:
                return False
            known = audited if statement.edge is Edge.AUDIT else told
            for moment in (statement.born_at, statement.ended_at):
                if moment is None or moment >= self.rows_from + _MARGIN:
                    continue
                if statement.edge in _TELLING or moment not in known:
                    return False
        return True

    def is_past_kept(self, before: Sequence[Span], after: Sequence[Span]) -> bool:
        """Whether two histories are the same before the line and its margin; they may end differently after it.

        They may not if an audit named an end already: it was compared with that of its life.
        """
        is_end_named = any(
            statement.edge is Edge.AUDIT and statement.ended_at is not None
            for statement, _ in self.kept
        )
        known, ends = ([life[-1].end for life in lives(spans)] for spans in (before, after))
        if is_end_named and known != ends[: max(1, len(known))]:
            return False
        line = self.rows_from + _MARGIN
        return _until(before, line) == _until(after, line)


def settle(said: Sequence[Said], ledger: Ledger) -> Settled | None:
    """Draw the line as late as can be; None where it would spare little, or cannot be drawn.

    `said` is everything, or what an earlier line left of it, and `ledger` what it amounts to.
    """
    if len(said) < LEAST_READ:
        return None
    ordered = in_order(said)
    line = midnight((ordered[-1][1].event_time - _BEYOND).date())
    said_from = line + _LATE
    before = [item for item in ordered if item[1].event_time < said_from]
    # what moved before anybody is known to own it is the first owner's (amounts.py)
    is_old = any(
        item.start < line and isinstance(item.attributes.get("project"), str)
        for item in ledger.intervals
    )
    if any(item.code is Code.RELAUNCH_REPAIRED for item in ledger.reconciliation.verdicts):
        return None  # what was said after it is compared with whichever statement repaired it
    if Anomaly.COUNTS_OVERLAP in ledger.anomalies:
        return None  # what does not count would no longer be known of
    if not is_old or any(_reaches_beyond(item, line) for item in before):
        return None
    spared = _spared(before, line)
    settled = Settled(
        rows_from=line,
        said_from=said_from,
        kept=tuple(item for item in before if item not in spared),
    )
    is_worth_it = len(spared) >= LEAST_SPARED
    return settled if is_worth_it and settled.goes_on(ordered[len(before) :]) else None


def _reaches_beyond(item: Said, line: datetime) -> bool:
    """Whether it speaks of a future, or of both sides of the line."""
    statement, evidence = item
    sent_at = evidence.event_time
    for moment in (statement.born_at, statement.ended_at, statement.at):
        if moment is None:
            continue
        if moment > sent_at + SAME_MOMENT or sent_at < line <= moment:
            return True
    if statement.period is None:
        return False
    start, end = statement.period
    is_of_both = start < line and (line < end or sent_at > line + _SENT_WITHIN)
    return is_of_both or sent_at < line <= start


def _spared(said: Sequence[Said], line: datetime) -> set[Said]:
    """Those that nothing from the line on depends on."""
    telling = set(without_repetitions(said))
    needed = _first_and_last_readings(said, line) | _last_audits(said, line)
    return {
        item
        for item in said
        if item not in telling
        and item not in needed
        and item[0].phase is None
        and (item[0].edge in _SILENT or item[0].edge is Edge.AUDIT)
        and item[1].event_time < line
        and (item[0].period is None or item[0].period[1] <= line)
    }


def _first_and_last_readings(said: Iterable[Said], line: datetime) -> set[Said]:
    """Those that tell and order the runs of growing counters, and that their next readings are compared with.

    The first and the last of each stretch under one name: what a name goes on from is what was read before it.
    """
    series: dict[tuple[str, str], list[tuple[tuple[object, ...], str, Said]]] = defaultdict(list)
    for item in said:
        statement, evidence = item
        at = statement.at or evidence.event_time
        for reading in statement.readings:
            if reading.reading is Reading.CUMULATIVE and at < line:
                order = (at, reading.value, *evidence, reading.run)
                series[reading.name, reading.label].append((order, reading.run, item))
    found: set[Said] = set()
    for told in series.values():
        told.sort(key=itemgetter(0))
        for _, stretch in groupby(told, key=itemgetter(1)):
            items = [item for _, _, item in stretch]
            found.update((items[0], items[-1]))
    return found


def _last_audits(said: Iterable[Said], line: datetime) -> set[Said]:
    """The last one that was sent, and those of the last whole period before the line."""
    audits = [
        (item, group_key(audit)) for item in said if (audit := audit_statement(*item)) is not None
    ]
    if not audits:
        return set()
    whole = [key for _, key in audits if key.start < line and not key.is_partial]
    last = max(whole, default=None)
    return {audits[-1][0], *(item for item, key in audits if key == last)}


def _lives(statements: Iterable[Statement]) -> set[datetime]:
    """The births and ends that are named."""
    named = (moment for item in statements for moment in (item.born_at, item.ended_at))
    return {moment for moment in named if moment is not None}


def _until(spans: Iterable[Span], line: datetime) -> list[tuple[object, ...]]:
    """Spans as they are before the line: what ends after it has not ended."""
    return [
        (
            span.start,
            span.held,
            *((span.end, span.closed_by) if span.end is not None and span.end < line else ()),
        )
        for span in spans
        if span.start < line
    ]
