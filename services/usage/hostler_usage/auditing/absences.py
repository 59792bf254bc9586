"""What it means that nobody spoke: missing, excused, uncovered, unconfirmed.

A statement is owed for every period that is known to have been audited and in which a resource was
in being. That periods were audited is known from the statements of others (`Known`), or expected
from those before (`expected_periods`): audits that stopped altogether are found out as well. Nova
leaves out whom it cannot see when the audit runs: launched anew since the period's end, on no host,
moved. Those periods are excused, with the reason.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Final

from hostler_usage.auditing.audits import (
    MEANINGS,
    Code,
    Lived,
    Status,
    Verdict,
    merged,
)
from hostler_usage.history.intervals import lives
from hostler_usage.reading.mapping import Audit
from hostler_usage.reading.times import SAME_MOMENT

SETTLE: Final = timedelta(minutes=10)
SILENT_AFTER_PERIODS: Final = 3
_HOUR, _DAY = timedelta(hours=1), timedelta(days=1)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """An audit period that is known to have been, and the hosts that sent statements about it."""

    start: datetime
    end: datetime
    hosts: frozenset[str]


def absences(
    rule: Audit,
    lived: Sequence[Lived],
    launches: Sequence[datetime],
    covered: Iterable[tuple[datetime, datetime]],
    known: Iterable[Known],
    *,
    cadence: Mapping[str, timedelta],
    confirmed_at: datetime | None,
    settle: timedelta = SETTLE,
    silent_after: int = SILENT_AFTER_PERIODS,
) -> tuple[Verdict, ...]:
    """What it means that no statement covers some of the `known` periods of a resource's life.

    `covered` are the spans its statements speak of, `cadence` the length of the periods that each
    host is known to be audited in (the type under "", where audits do not run per host): one that
    is audited daily owes nothing hourly. Of a host (or type) that sent nothing at all, the period
    is `uncovered`.
    """
    spans = sorted(covered)
    found: list[Verdict] = []
    silence: list[Verdict] = []  # the missing periods since the last word, if they reach to now
    for period in sorted(known, key=lambda item: (item.start, item.end)):
        if not _was_there(rule, lived, period):
            continue
        if any(start <= period.start and end >= period.end for start, end in spans):
            silence = []
            continue
        verdict = _absence(rule, lived, launches, period, cadence, settle)
        if verdict is None:
            continue
        found.append(verdict)
        silence = [*silence, verdict] if verdict.status is Status.MISSING else []
    if len(silence) >= silent_after and lived[-1].end is None:
        since = None if confirmed_at is None else confirmed_at.isoformat()
        found = [item for item in found if item not in silence] + [
            replace(item, status=Status.UNCONFIRMED, code=Code.SILENT, theirs=since)
            for item in silence
        ]
    return tuple(merged(found))


def _was_there(rule: Audit, lived: Sequence[Lived], period: Known) -> bool:
    return any(_is_owed(rule, life[0].start, life[-1].end, period) for life in lives(lived))


def _is_owed(rule: Audit, birth: datetime, end: datetime | None, period: Known) -> bool:
    if rule.every is not None:  # it ran at some moment of the period: only a whole one is sure
        return birth <= period.start and (end is None or end >= period.end)
    return period.end - birth > SAME_MOMENT and (end is None or end - period.start > SAME_MOMENT)


def _absence(
    rule: Audit,
    lived: Sequence[Lived],
    launches: Sequence[datetime],
    period: Known,
    cadence: Mapping[str, timedelta],
    settle: timedelta,
) -> Verdict | None:
    """Why a period has no statement; None where none was owed."""
    from_, until = period.end - SAME_MOMENT, period.end + settle
    at_audit = [
        item for item in lived if item.start <= until and (item.end is None or item.end >= from_)
    ] or [max((item for item in lived if item.start < period.end), key=lambda item: item.start)]
    host = at_audit[0].host if rule.is_per_host else None
    verdict = Verdict(
        period_start=period.start,
        period_end=period.end,
        status=Status.MISSING,
        code=Code.NO_STATEMENT,
        project_id=at_audit[0].project_id,
        host=host,
    )
    if any(item.is_offloaded for item in at_audit):
        return _coded(verdict, Code.SHELVED_OFFLOADED)
    if any(from_ <= item <= until and item > lived[0].start for item in launches):
        return _coded(verdict, Code.RELAUNCHED)
    if rule.is_per_host:
        if host is None:
            return _coded(verdict, Code.NO_HOST)
        if len({item.host for item in at_audit}) > 1:
            return _coded(verdict, Code.MOVED)
    if period.hosts if host is None else host in period.hosts:
        return verdict
    length = period.end - period.start
    is_owed = cadence.get(host or "", length) == length
    return _coded(verdict, Code.NOT_AUDITED) if is_owed else None


def _coded(verdict: Verdict, code: Code) -> Verdict:
    return replace(verdict, status=MEANINGS[code].status, code=code)


def expected_periods(
    known: Iterable[tuple[datetime, datetime]], until: datetime, *, limit: int = 1000
) -> tuple[tuple[datetime, datetime], ...]:
    """The periods that the known ones lead to expect up to `until`, and that nobody spoke of.

    Hourly and daily audits only: months have no one length. At most `limit`, oldest first. What was said
    of a time that has not come yet is no reason to expect anything.
    """
    by_length: dict[timedelta, list[datetime]] = defaultdict(list)
    for start, end in known:
        if end - start in (_HOUR, _DAY) and end <= until:
            by_length[end - start].append(start)
    found: list[tuple[datetime, datetime]] = []
    for length, starts in sorted(by_length.items()):
        phases: dict[timedelta, list[datetime]] = defaultdict(list)
        for start in starts:
            phases[(start - _EPOCH) % length].append(start)
        # an audit that changed its offset goes on in the newest one
        for same in phases.values():
            present = set(same)
            is_newest = max(same) == max(starts)
            last = until - length if is_newest else max(same)
            start = min(same)
            while start <= last:
                if start not in present:
                    found.append((start, start + length))
                start += length
    return tuple(sorted(found)[:limit])
