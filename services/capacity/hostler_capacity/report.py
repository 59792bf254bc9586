"""Which reports count: parts in any order, twice, or late.

A host's newest report is the one with the latest `reported_at`, by the host's own clock: those are
only compared with each other. Whether a host is alive is counted from when the database received
its news, so a wrong clock on a host cannot make it look fresh. The one thing a host's clock could
spoil is order after it was set back; hence a report that looks older is taken all the same when the
newer one has gone stale and this one's stamp is about now.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from uuid import UUID

from hostler_capacity.inventory import ReportedNode


class Admission(StrEnum):
    """What a part of a report is to its host."""

    NEW_REPORT = "new_report"
    NEXT_PART = "next_part"
    DUPLICATE = "duplicate"
    OUTDATED = "outdated"

    @property
    def counts(self) -> bool:
        """True where the part is to be applied."""
        return self in {Admission.NEW_REPORT, Admission.NEXT_PART}


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part of a report, as the domain sees it."""

    host: str
    report_id: UUID
    reported_at: datetime
    part: int
    parts: int
    nodes: Sequence[ReportedNode]


@dataclass(frozen=True, slots=True, kw_only=True)
class Latest:
    """The newest report of a host so far."""

    report_id: UUID
    reported_at: datetime
    received_at: datetime
    parts: int
    parts_seen: frozenset[int]

    def completed_by(self, part: Part) -> bool:
        """Return whether every part has arrived once `part` has."""
        return len(self.parts_seen | {part.part}) == self.parts


def admit(latest: Latest | None, part: Part, *, now: datetime, stale: timedelta) -> Admission:
    """Return what `part` is, when the database's clock says `now`."""
    if latest is None:
        return Admission.NEW_REPORT
    if part.report_id == latest.report_id:
        seen = part.part in latest.parts_seen or part.parts != latest.parts
        return Admission.DUPLICATE if seen else Admission.NEXT_PART
    if is_newer(part.reported_at, latest.reported_at, latest.received_at, now=now, stale=stale):
        return Admission.NEW_REPORT
    return Admission.OUTDATED


def is_newer(
    reported_at: datetime,
    known_reported_at: datetime,
    known_received_at: datetime,
    *,
    now: datetime,
    stale: timedelta,
) -> bool:
    """Return whether news of `reported_at` replace news of `known_reported_at`."""
    if reported_at > known_reported_at:
        return True
    return now - known_received_at > stale and abs(now - reported_at) <= stale
