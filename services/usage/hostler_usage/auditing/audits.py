"""The words of audit reconciliation: statements, verdicts, and what each code means.

`reconciliation` compares every `exists` of a resource with its history and gives a verdict for each
period; `absences` says what the silence of the other periods means. Both are pure functions of
sets: order, copies and the twins of both formats change nothing but how many messages are cited.

What a statement is worth (nova/compute/manager.py, `_instance_usage_audit`; notification
`notify_usage_exists`): it shows its resource as the audit *read* it, at or shortly before the time
it was sent, and not as it was when the period ended. So flavor and state are compared with ours at
the statement's own time; what we held at some moment between the period's end and then (half an
hour at most: audits read all rows first and send for minutes) was right when it was read.

Moments are the same when they lie within a second of each other: one launch is spelled
21:04:51.882856, 21:04:51 (cut, versioned) and 21:04:52 (rounded by the database).

Consecutive periods with the same verdict are one row, cut at midnight UTC, with the newest message
as its evidence. docs/usage-audits.md has the table of codes; `MEANINGS` is its source.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Final

from hostler_usage.history.observe import LAUNCH_IS_OLD
from hostler_usage.reading import citation
from hostler_usage.reading.mapping import Audit, Edge
from hostler_usage.reading.statement import Evidence, Scalar, Statement
from hostler_usage.reading.times import EPOCH, SAME_MOMENT

_HOUR, _DAY = timedelta(hours=1), timedelta(days=1)
# month and year audits differ in length; each is whole days
_WHOLE_LENGTHS: Final = frozenset({_HOUR, *(n * _DAY for n in (1, 28, 29, 30, 31, 365, 366))})
_ANY: Final = Audit()


class Status(StrEnum):
    """What became of a period."""

    VERIFIED = "verified"
    REPAIRED = "repaired"  # the events were lost, and the audit made it good
    MISMATCH = "mismatch"
    MISSING = "missing"
    UNEXPECTED = "unexpected"
    UNCOVERED = "uncovered"  # nobody there was audited
    EXCUSED = "excused"  # no statement, and none could be expected
    UNCONFIRMED = "unconfirmed"  # silent for some periods while its neighbours speak


class Code(StrEnum):
    """Why; never renamed and never reused."""

    AGREED = "agreed"
    AGREED_EARLIER = "agreed_earlier"
    BIRTH_REPAIRED = "birth_repaired"
    END_REPAIRED = "end_repaired"
    CHANGE_REPAIRED = "change_repaired"
    RELAUNCH_REPAIRED = "relaunch_repaired"
    CHANGE_UNTOLD = "change_untold"
    FIELD_DIFFERS = "field_differs"
    LAUNCHED_AT_DIFFERS = "launched_at_differs"
    NO_LAUNCHED_AT = "no_launched_at"
    DELETED_AT_DIFFERS = "deleted_at_differs"
    END_UNKNOWN = "end_unknown"
    ALIVE_AFTER_END = "alive_after_end"
    DELETED_IN_OTHER_STATE = "deleted_in_other_state"
    DELETED_BEFORE_LAUNCH = "deleted_before_launch"
    DELETED_TWICE = "deleted_twice"
    PERIODS_OVERLAP = "periods_overlap"
    NO_LIFE = "no_life"
    BEFORE_BIRTH = "before_birth"
    AFTER_END = "after_end"
    NO_STATEMENT = "no_statement"
    NOT_AUDITED = "not_audited"
    RELAUNCHED = "relaunched"
    SHELVED_OFFLOADED = "shelved_offloaded"
    MOVED = "moved"
    NO_HOST = "no_host"
    SILENT = "silent"


@dataclass(frozen=True, slots=True, kw_only=True)
class Meaning:
    """A code's status, what it says, and what StackTach and Winchester call the same thing."""

    status: Status
    says: str
    stacktach: str = "none"
    winchester: str = "none"


MEANINGS: Final[Mapping[Code, Meaning]] = {
    Code.AGREED: Meaning(
        status=Status.VERIFIED,
        says="every compared field agrees with ours at the time the statement was sent",
        stacktach="verified",
        winchester="no error",
    ),
    Code.AGREED_EARLIER: Meaning(
        status=Status.VERIFIED,
        says="as agreed, with what we held between the period's end and the sending: read, then changed, then sent",
    ),
    Code.BIRTH_REPAIRED: Meaning(
        status=Status.REPAIRED,
        says="the create event is not here; the birth is known from the messages cited (ours: nothing)",
        stacktach="NotFound (InstanceUsage), or reconciled from Nova's database",
        winchester="U8",
    ),
    Code.END_REPAIRED: Meaning(
        status=Status.REPAIRED,
        says="the delete event is not here; the end is known from the messages cited (ours: nothing)",
        stacktach="NotFound (InstanceDeletes), or reconciled from Nova's database",
        winchester="U5",
    ),
    Code.CHANGE_REPAIRED: Meaning(
        status=Status.REPAIRED,
        says="no event tells of this change; ours is the value before it, theirs the value taken over",
        stacktach="FieldMismatch",
        winchester="U2",
    ),
    Code.RELAUNCH_REPAIRED: Meaning(
        status=Status.REPAIRED,
        says="a resize, rebuild, rescue or unshelve set launched_at anew and its event is not here",
        stacktach="NotFound (InstanceUsage)",
        winchester="U8",
    ),
    Code.CHANGE_UNTOLD: Meaning(
        status=Status.MISMATCH,
        says="an event of something else shows the field changed, and none told of it: it changed in the span",
    ),
    Code.FIELD_DIFFERS: Meaning(
        status=Status.MISMATCH,
        says="the field differs from ours at every moment at which the audit can have read it",
        stacktach="FieldMismatch (flavor, tenant, os_*)",
        winchester="U2",
    ),
    Code.LAUNCHED_AT_DIFFERS: Meaning(
        status=Status.MISMATCH,
        says="launched_at (or the birth, of what has no segments) is none that we know for then",
        stacktach="FieldMismatch (launched_at), AmbiguousResults",
        winchester="U2",
    ),
    Code.NO_LAUNCHED_AT: Meaning(
        status=Status.MISMATCH,
        says="a statement about an instance that never launched",
        stacktach="NullFieldException",
        winchester="U1",
    ),
    Code.DELETED_AT_DIFFERS: Meaning(
        status=Status.MISMATCH,
        says="deleted_at is another moment than our end",
        stacktach="FieldMismatch (deleted_at)",
        winchester="U2",
    ),
    Code.END_UNKNOWN: Meaning(
        status=Status.MISMATCH,
        says="the statement has a deleted_at and our history goes on",
        stacktach="NotFound (InstanceDeletes)",
        winchester="U5",
    ),
    Code.ALIVE_AFTER_END: Meaning(
        status=Status.MISMATCH,
        says="the statement shows it alive after our end, and was not merely read before it",
        stacktach="Found InstanceDeletes for non-delete exist",
        winchester="U6",
    ),
    Code.DELETED_IN_OTHER_STATE: Meaning(
        status=Status.MISMATCH,
        says="deleted_at is set and the state is none of something deleted",
        winchester="U3",
    ),
    Code.DELETED_BEFORE_LAUNCH: Meaning(
        status=Status.MISMATCH,
        says="deleted_at lies before launched_at",
        winchester="U4",
    ),
    Code.DELETED_TWICE: Meaning(
        status=Status.MISMATCH,
        says="several delete events name different moments; the earliest counts",
        stacktach="AmbiguousResults",
        winchester="U7",
    ),
    Code.PERIODS_OVERLAP: Meaning(
        status=Status.MISMATCH,
        says="two whole audit periods overlap and are not the same one",
    ),
    Code.NO_LIFE: Meaning(
        status=Status.UNEXPECTED,
        says="a statement about something that was never in being for us",
        stacktach="NotFound (InstanceUsage)",
        winchester="U8",
    ),
    Code.BEFORE_BIRTH: Meaning(
        status=Status.UNEXPECTED,
        says="the whole period lies before our birth",
    ),
    Code.AFTER_END: Meaning(
        status=Status.UNEXPECTED,
        says="the whole period lies after our end",
        stacktach="Found InstanceDeletes for non-delete exist",
        winchester="U6",
    ),
    Code.NO_STATEMENT: Meaning(
        status=Status.MISSING,
        says="it was in being, its host was audited, and no statement came",
        stacktach="No exists for instance (report)",
        winchester="U0",
    ),
    Code.NOT_AUDITED: Meaning(
        status=Status.UNCOVERED,
        says="nobody on this host (of this type, where audits do not run per host) was audited; named once",
    ),
    Code.RELAUNCHED: Meaning(
        status=Status.EXCUSED,
        says="resized, rebuilt or unshelved between the period's end and the audit, which therefore left it out",
    ),
    Code.SHELVED_OFFLOADED: Meaning(
        status=Status.EXCUSED,
        says="shelved-offloaded instances are on no host, and audits run per host",
    ),
    Code.MOVED: Meaning(
        status=Status.EXCUSED,
        says="it changed hosts between the period's end and the audit, each host's audit may have left it out",
    ),
    Code.NO_HOST: Meaning(
        status=Status.EXCUSED,
        says="it was on no host when the audit ran",
    ),
    Code.SILENT: Meaning(
        status=Status.UNCONFIRMED,
        says="no statement for several periods up to now, unlike its neighbours; theirs is when the last one came",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditStatement:
    """One `exists` about one resource.

    `said_at` is the message's own time. The period is None of those that name none. `born_at` is
    launched_at where the type has segments, else the birth; `ended_at` is deleted_at. A field that
    is None is not compared: the formats leave out different ones. `every` is how often audits run
    that name no period: once an hour, or once a day. `is_unborn` is that it shows something that has
    not come to life.
    """

    evidence: Evidence
    said_at: datetime
    period_start: datetime | None = None
    period_end: datetime | None = None
    born_at: datetime | None = None
    ended_at: datetime | None = None
    fields: Mapping[str, Scalar] = field(default_factory=dict)
    every: timedelta = _HOUR
    is_unborn: bool = False

    @property
    def is_partial(self) -> bool:
        """Whether it covers the period so far: sent before a resize, rebuild, shelve or revert."""
        if self.period_start is None or self.period_end is None:
            return False
        length = self.period_end - self.period_start
        return length not in _WHOLE_LENGTHS or self.said_at - self.period_end < SAME_MOMENT

    @property
    def period(self) -> tuple[datetime, datetime]:
        """The period it speaks of; the hour or day it was sent in where it names none."""
        if self.period_start is None or self.period_end is None:
            start = self.said_at - (self.said_at - EPOCH) % self.every
            return start, start + self.every
        return min(self.period_start, self.period_end), self.period_end


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A moment that an event told of itself: a launch, or a deletion."""

    at: datetime
    evidence: Evidence


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of `periods` consecutive audit periods of equal length, from `period_start` on.

    `ours` and `theirs` are the two values side by side; moments are spelled in ISO 8601. `host` is
    the host as the statement names it, of a per-host type. `statements` counts the messages.
    """

    period_start: datetime
    period_end: datetime
    periods: int = 1
    is_partial: bool = False
    status: Status
    code: Code
    field: str | None = None
    ours: Scalar = None
    theirs: Scalar = None
    project_id: str | None = None
    host: str | None = None
    statements: int = 0
    evidence: tuple[Evidence, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Lived:
    """A span of a life as audits see it: who owned it, where it was, whether it was on a host."""

    start: datetime
    end: datetime | None
    project_id: str | None
    host: str | None
    is_offloaded: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconciliation:
    """All that audits say of one resource, and what is needed to tell what their silence means."""

    verdicts: tuple[Verdict, ...]
    lived: tuple[Lived, ...]
    launches: tuple[datetime, ...]
    confirmed_at: datetime | None


# --- from what messages say


def audit_statement(
    statement: Statement, evidence: Evidence, rule: Audit = _ANY
) -> AuditStatement | None:
    """The audit that a message's statement is; None for one that is no audit.

    One that names no period is an hourly one where its `rule` does not say how often it runs.
    """
    if statement.edge is not Edge.AUDIT:
        return None
    start, end = statement.period or (None, None)
    fields = dict(statement.attributes)
    return AuditStatement(
        evidence=evidence,
        said_at=evidence.event_time,
        period_start=start,
        period_end=end,
        born_at=statement.born_at,
        ended_at=None if fields.get("state") in rule.ending else statement.ended_at,
        fields=fields,
        every=rule.every or _HOUR,
    )


def launch(statement: Statement, evidence: Evidence) -> Told | None:
    """The moment a launch event gives for its launch; None for anything else.

    What Cinder sends again (`--send_actions`: a period of no length) is no event of its own, and a
    relaunch with an old launched_at is of a cloud that does not set it anew.
    """
    if statement.edge not in (Edge.LAUNCH, Edge.RELAUNCH) or statement.failed:
        return None
    at = statement.born_at or evidence.event_time
    is_old = evidence.event_time - at > LAUNCH_IS_OLD
    if statement.is_resent or (statement.edge is Edge.RELAUNCH and is_old):
        return None
    return Told(at=at, evidence=evidence)


def deletion(statement: Statement, evidence: Evidence) -> Told | None:
    """The moment a delete event gives for the end; None for anything else."""
    if statement.edge is not Edge.END or statement.failed or statement.is_resent:
        return None
    return Told(at=statement.ended_at or evidence.event_time, evidence=evidence)


# --- rows


def merged(verdicts: Iterable[Verdict]) -> Iterator[Verdict]:
    """Runs of equal verdicts on adjacent periods of one length as one row each, cut at midnight UTC.

    In order of their beginnings; the evidence is that of the newest period.
    """
    runs: dict[tuple[object, ...], Verdict] = {}
    rows: list[Verdict] = []
    for item in sorted(verdicts, key=row_order):
        if item.is_partial or item.period_start == item.period_end:
            rows.append(item)
            continue
        length = item.period_end - item.period_start
        key = (
            item.status,
            item.code,
            item.field,
            item.ours,
            item.theirs,
            item.project_id,
            item.host,
            length,
            item.period_start.astimezone(UTC).date(),
        )
        run = runs.get(key)
        if run is not None and run.period_end == item.period_start:
            runs[key] = replace(
                run,
                period_end=item.period_end,
                periods=run.periods + 1,
                statements=run.statements + item.statements,
                evidence=item.evidence,
            )
            continue
        if run is not None:
            rows.append(run)
        runs[key] = item
    return iter(sorted((*rows, *runs.values()), key=row_order))


def row_order(item: Verdict) -> tuple[object, ...]:
    """The one order of a resource's verdicts."""
    return (
        item.period_start,
        item.period_end,
        item.is_partial,
        item.code,
        item.field or "",
        repr(item.ours),
        repr(item.theirs),
        [citation.order(evidence) for evidence in item.evidence],
    )


def whole_periods(verdict: Verdict) -> Iterator[tuple[datetime, datetime]]:
    """The audit periods a row stands for; none of a partial statement's, whose end is its own."""
    if verdict.is_partial or verdict.period_start == verdict.period_end:
        return
    length = (verdict.period_end - verdict.period_start) / verdict.periods
    for number in range(verdict.periods):
        start = verdict.period_start + number * length
        yield start, start + length
