"""The HTTP API of audit reconciliation: verdicts with ours beside theirs, and the report on them."""

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated

import asyncpg
from fastapi import APIRouter, Query
from pydantic import AwareDatetime, BaseModel, Field

from hostler_common import auth, errors, http
from hostler_usage.auditing.audit_report_store import (
    AuditFilter,
    AuditGroup,
    AuditReportRow,
    AuditReportStore,
)
from hostler_usage.auditing.audits import Code, Status
from hostler_usage.listing import Cited, Limit, Marker, Name, Selected, groups
from hostler_usage.reading.times import PLAUSIBLE_FROM

AuditReportsDep = Annotated[AuditReportStore, http.state("audit_reports")]
router = APIRouter(prefix="/v1", tags=["audits"], dependencies=[auth.require(auth.Role.READER)])


class AuditWindowInvalid(errors.Invalid):
    """The window ends before it begins, or lies outside the calendar."""

    code = "usage.audit.window_invalid"


class AuditGroupUnknown(errors.Invalid):
    """The report cannot be grouped by that."""

    code = "usage.audit.group_by_unknown"


class VerdictItem(BaseModel):
    """What became of some consecutive audit periods."""

    region: str
    resource_type: str
    resource_id: str | None = Field(description="null: of everything on the host")
    period_start: datetime
    period_end: datetime
    periods: int = Field(description="how many periods of equal length this is")
    is_partial: bool = Field(description="of the period so far, sent before a change")
    status: Status
    code: Code
    field: str | None
    ours: str | int | None
    theirs: str | int | None
    project_id: str | None
    host: str | None
    statements: int = Field(description="how many messages spoke of these periods")
    evidence: list[Cited] = Field(description="those about the newest of the periods")


class Audits(BaseModel):
    """A page of verdicts, newest first."""

    audits: list[VerdictItem]
    next_marker: str | None


class ReportItem(BaseModel):
    """The audits of one group, and how much of its usage they bear out."""

    group: dict[AuditGroup, str | None]
    verdicts: dict[Status, int]
    resource_microseconds: dict[str, int] = Field(
        description="held = verified + repaired + excused + unverified, exact"
    )
    unverified_share: float | None = Field(description="null where nothing was held")


class AuditReport(BaseModel):
    """Audits of a window, as far as it had passed at `as_of`."""

    start: datetime
    end: datetime
    as_of: datetime
    group_by: list[AuditGroup]
    report: list[ReportItem]
    next_marker: str | None


@router.get("/audits", operation_id="list_audits")
async def list_audits(
    reports: AuditReportsDep,
    caller: auth.Caller,
    selected: Selected,
    start: AwareDatetime | None = None,
    end: AwareDatetime | None = None,
    resource_id: Name = None,
    status: Status | None = None,
    code: Code | None = None,
    host: Name = None,
    limit: Limit = 100,
    marker: Marker = None,
) -> Audits:
    """What became of each audit period, ours beside theirs, newest first."""
    rows, next_marker = await reports.verdicts(
        AuditFilter(
            scope=caller.projects,
            start=_in_utc(start),
            end=_in_utc(end),
            **asdict(selected),
            resource_id=resource_id,
            status=status,
            code=code,
            host=host,
        ),
        limit=limit,
        marker=marker,
    )
    return Audits(audits=[_verdict(row) for row in rows], next_marker=next_marker)


@router.get("/audits/report", operation_id="show_audit_report")
async def show_audit_report(
    reports: AuditReportsDep,
    caller: auth.Caller,
    start: AwareDatetime,
    end: AwareDatetime,
    selected: Selected,
    group_by: Annotated[
        list[str] | None, Query(description="project, resource_type, region, day")
    ] = None,
    limit: Limit = 1000,
    marker: Marker = None,
) -> AuditReport:
    """How many verdicts of each status there are, and what share of the usage no audit bears out."""
    asked = groups(group_by, AuditGroup, AuditGroupUnknown) or [AuditGroup.PROJECT]
    since, until = _in_utc(start), _in_utc(end)
    assert since is not None
    assert until is not None
    if until <= since:
        raise AuditWindowInvalid("end must be later than start")
    as_of = datetime.now(UTC)
    # nothing is older, and PostgreSQL takes the first moment of the calendar for an infinity
    first = max(since, PLAUSIBLE_FROM)
    rows, next_marker = await reports.report(
        first,
        max(first, min(until, as_of)),
        asked,
        AuditFilter(
            scope=caller.projects,
            **asdict(selected),
        ),
        limit=limit,
        marker=marker,
    )
    return AuditReport(
        start=since,
        end=until,
        as_of=as_of,
        group_by=asked,
        report=[_report(row) for row in rows],
        next_marker=next_marker,
    )


def _in_utc(moment: datetime | None) -> datetime | None:
    try:
        return None if moment is None else moment.astimezone(UTC)
    except OverflowError as exc:
        raise AuditWindowInvalid("start or end lies outside the calendar in UTC") from exc


def _verdict(row: asyncpg.Record) -> VerdictItem:
    values = dict(row)
    return VerdictItem(
        **{name: values[name] for name in VerdictItem.model_fields if name not in _MADE},
        resource_id=row["resource_id"] or None,
        host=row["host"] or None,
        evidence=[Cited(**item) for item in row["evidence"]],
    )


_MADE = frozenset({"resource_id", "host", "evidence"})


def _report(row: AuditReportRow) -> ReportItem:
    return ReportItem(
        group=dict(row.group),
        verdicts={Status(name): count for name, count in row.verdicts.items()},
        resource_microseconds={
            "held": row.held_us,
            "verified": row.verified_us,
            "repaired": row.repaired_us,
            "excused": row.excused_us,
            "unverified": row.unverified_us,
        },
        unverified_share=row.unverified_us / row.held_us if row.held_us else None,
    )
