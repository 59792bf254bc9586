"""The pages on which usage is checked: audits, operations, quarantine.

What changes something here does what the API's call of the same name does, for the same roles.
"""

import json
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import HTMLResponse, RedirectResponse

from hostler_common import auth, errors, http, quarantine
from hostler_usage import page_frame
from hostler_usage.auditing.audit_report_store import (
    AuditFilter,
    AuditGroup,
    AuditReportRow,
    AuditReportStore,
)
from hostler_usage.auditing.audits import MEANINGS, Code, Status
from hostler_usage.charts import Chart, Column, Line, days_between, stack
from hostler_usage.history.measures import hours
from hostler_usage.page_frame import Filled, Marker, Name, in_utc, render
from hostler_usage.profiling.operation_store import OperationFilter, OperationStore, Profile
from hostler_usage.windows import window as checked_window

ROWS_SHOWN: Final = 200
PROFILES_SHOWN: Final = 500
PROFILES_DRAWN: Final = 40
BODY_SHOWN_BYTES: Final = 64 * 1024
_WEEK: Final = timedelta(days=7)
_LONGEST_CHART: Final = timedelta(days=92)

router = APIRouter(include_in_schema=False)

AuditReportsDep = Annotated[AuditReportStore, http.state("audit_reports")]
OperationsDep = Annotated[OperationStore, http.state("operations")]
EntryId = Annotated[int, Path(ge=1, lt=2**63)]
READER: Any = auth.require(auth.Role.READER)
OPERATOR: Any = auth.require(auth.Role.OPERATOR, every_project=True)
ADMIN: Any = auth.require(auth.Role.ADMIN, every_project=True)


class ChartTooLong(errors.Invalid):
    """The window has more days than are drawn."""

    code = "usage.window.too_long"


# --- audits


@router.get("/audits", dependencies=[READER])
async def audits(
    request: Request,
    reports: AuditReportsDep,
    caller: auth.Caller,
    start: page_frame.Moment = None,
    end: page_frame.Moment = None,
    project_id: Name = None,
    region: Name = None,
    resource_type: Name = None,
    resource_id: Name = None,
    status: Annotated[Status | None, Filled, Query()] = None,
    code: Annotated[Code | None, Filled, Query()] = None,
    host: Name = None,
    marker: Marker = None,
) -> HTMLResponse:
    """What audits bear out, by day, and their verdicts with ours beside theirs."""
    since, until = _window(start, end)
    where = AuditFilter(
        scope=caller.projects,
        start=since,
        end=until,
        project_id=project_id,
        region=region,
        resource_type=resource_type,
        resource_id=resource_id,
        status=status,
        code=code,
        host=host,
    )
    rows, next_marker = await reports.verdicts(where, limit=ROWS_SHOWN, marker=marker)
    passed = min(until, datetime.now(UTC))
    by_day: list[AuditReportRow] = []
    if since < passed:
        by_day, _ = await reports.report(since, passed, [AuditGroup.DAY], where, limit=ROWS_SHOWN)
    return render(
        request,
        "audits.html",
        start=since,
        end=until,
        verdicts=rows,
        next_marker=next_marker,
        chart=_borne_out(since, passed, by_day) if any(row.held_us for row in by_day) else None,
        counts=_counts(by_day),
        statuses=list(Status),
        codes=list(Code),
        meanings=MEANINGS,
    )


def _borne_out(since: datetime, until: datetime, rows: list[AuditReportRow]) -> Chart:
    """Resource-hours by what audits say of them, by day."""
    parts: dict[str, dict[date, float]] = {
        name: {} for name in ("verified", "repaired", "excused", "unverified")
    }
    for row in rows:
        day = date.fromisoformat(row.group[AuditGroup.DAY] or "")
        for name, amounts in parts.items():
            amounts[day] = float(hours(getattr(row, f"{name}_us")))
    return stack(
        "What audits bear out, by day",
        "resource hours",
        days_between(since, until),
        parts,
        colours={name: name for name in parts},
    )


def _counts(rows: list[AuditReportRow]) -> dict[str, int]:
    found: dict[str, int] = {}
    for status in Status:
        count = sum(row.verdicts.get(status, 0) for row in rows)
        if count:
            found[status] = count
    return found


# --- operations


@router.get("/operations", dependencies=[READER])
async def operations(
    request: Request,
    store: OperationsDep,
    caller: auth.Caller,
    start: page_frame.Moment = None,
    end: page_frame.Moment = None,
    group_by: Profile = Profile.ACTION,
    project_id: Name = None,
    region: Name = None,
    resource_type: Name = None,
    host: Name = None,
    flavor: Name = None,
    unfinished_minutes: Annotated[int, Query(ge=0, le=60 * 24 * 365)] = 60,
    marker: Marker = None,
) -> HTMLResponse:
    """How long operations took and how many failed, and starts that never ended."""
    since, until = _window(start, end)
    where: dict[str, Any] = {
        "scope": caller.projects,
        "start": since,
        "end": until,
        "project_id": project_id,
        "region": region,
        "resource_type": resource_type,
        "host": host,
        "flavor": flavor,
    }
    groups = [group_by] if group_by == Profile.RESOURCE_TYPE else [Profile.RESOURCE_TYPE, group_by]
    profiles, _ = await store.profiles(groups, OperationFilter(**where), limit=PROFILES_SHOWN)
    unfinished, next_marker = await store.operations(
        OperationFilter(
            **where,
            unfinished_since=datetime.now(UTC) - timedelta(minutes=unfinished_minutes),
        ),
        limit=ROWS_SHOWN,
        marker=marker,
    )
    failed, _ = await store.operations(
        OperationFilter(**where, outcome="failed"), limit=ROWS_SHOWN
    )
    named = [
        (" ".join(str(row[f"group_{n}"] or "unknown") for n in range(len(groups))), row)
        for row in profiles
    ]
    return render(
        request,
        "operations.html",
        start=since,
        end=until,
        group_by=group_by,
        groups=list(Profile),
        profiles=named,
        is_cut=len(profiles) == PROFILES_SHOWN,
        chart=_durations([(name, row["p50_ms"], row["p99_ms"]) for name, row in named]),
        unfinished=unfinished,
        unfinished_minutes=unfinished_minutes,
        failed=failed,
        next_marker=next_marker,
    )


def _durations(rows: list[tuple[str, float | None, float | None]]) -> Chart | None:
    """How long operations took, the slowest first; None where none is known to have ended well."""
    timed = [(name, p50, p99) for name, p50, p99 in rows if p50 is not None and p99 is not None]
    slowest = sorted(timed, key=lambda row: -row[2])[:PROFILES_DRAWN]
    if not slowest:
        return None
    return Chart(
        title="Durations of those that succeeded, slowest first",
        corner="operation",
        unit="seconds",
        drawn="points",
        columns=(Column(name="p50"), Column(name="p99")),
        lines=tuple(
            Line(label=name, values=(p50 / 1000, p99 / 1000)) for name, p50, p99 in slowest
        ),
    )


def _window(start: datetime | None, end: datetime | None) -> tuple[datetime, datetime]:
    """What was asked for; else the seven days until now, or until the end, or from the start."""
    since, until = in_utc(start), in_utc(end)
    try:
        until = until or (since + _WEEK if since else datetime.now(UTC))
        since = since or until - _WEEK
    except OverflowError as exc:
        raise page_frame.MomentInvalid("the window leaves the calendar") from exc
    checked_window(since, until)
    if until - since > _LONGEST_CHART:
        raise ChartTooLong(f"at most {_LONGEST_CHART.days} days at once")
    return since, until


# --- quarantine


@router.get("/quarantine", dependencies=[OPERATOR])
async def quarantine_list(
    request: Request,
    store: quarantine.QuarantineDep,
    caller: auth.Caller,
    marker: Annotated[int, Query(ge=0, lt=2**63)] = 0,
    done: Literal["replayed", "discarded"] | None = None,
) -> HTMLResponse:
    """What could not be read, oldest first, each with what may be done about it."""
    rows = await store.rows(after_id=marker, limit=ROWS_SHOWN)
    return render(
        request,
        "quarantine_list.html",
        rows=rows,
        total=await store.count(),
        next_marker=rows[-1]["id"] if len(rows) == ROWS_SHOWN else None,
        done=done,
        may_discard=caller.has(auth.Role.ADMIN),
    )


@router.get("/quarantine/{entry_id}", dependencies=[OPERATOR])
async def quarantined(
    request: Request, entry_id: EntryId, store: quarantine.QuarantineDep, caller: auth.Caller
) -> HTMLResponse:
    """One message with the beginning of its body."""
    row = await store.row(entry_id)
    return render(
        request,
        "quarantine_entry.html",
        entry=row,
        properties=json.dumps(dict(row["properties"]), indent=2, ensure_ascii=False),
        body=readable(row["body"]),
        is_whole=len(row["body"]) <= BODY_SHOWN_BYTES,
        may_discard=caller.has(auth.Role.ADMIN),
    )


@router.post("/quarantine/{entry_id}/replay", dependencies=[OPERATOR, page_frame.own_pages_only])
async def replay(entry_id: EntryId, store: quarantine.QuarantineDep) -> RedirectResponse:
    """Hand the message to its queue again, as a first attempt."""
    await store.replay(entry_id)
    return RedirectResponse("/quarantine?done=replayed", status_code=303)


@router.post("/quarantine/{entry_id}/discard", dependencies=[ADMIN, page_frame.own_pages_only])
async def discard(entry_id: EntryId, store: quarantine.QuarantineDep) -> RedirectResponse:
    """Forget the message."""
    await store.discard(entry_id)
    return RedirectResponse("/quarantine?done=discarded", status_code=303)


def readable(body: bytes) -> str:
    """A body for eyes: JSON laid out, with an envelope's inner message opened; else its beginning.

    Nothing of it is hidden: what is no UTF-8 is spelled as escapes, and the whole is to be had
    byte for byte.
    """
    if len(body) <= BODY_SHOWN_BYTES:
        try:
            found = json.loads(body)
            if isinstance(found, dict) and isinstance(found.get("oslo.message"), str):
                found = {**found, "oslo.message": json.loads(found["oslo.message"])}
            text = json.dumps(found, indent=2, ensure_ascii=False)
            return text.encode("utf-8", "backslashreplace").decode()
        except (ValueError, RecursionError):
            pass  # shown as it is
    return body[:BODY_SHOWN_BYTES].decode("utf-8", "backslashreplace").replace("\0", "\\0")
