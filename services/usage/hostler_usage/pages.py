"""The pages of usage: overview, projects, the life of one resource, stored messages.

A caller that is bound to projects sees those alone, by the same conditions in the SQL as in the
API. All times are UTC. Tables hold the truth; what is drawn is drawn from them.
"""

import json
from collections import defaultdict
from collections.abc import Mapping as SomeOf
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from itertools import groupby
from typing import Annotated, Any, Final
from urllib.parse import quote

import asyncpg
from fastapi import APIRouter, Path, Request
from fastapi.responses import HTMLResponse

from hostler_common import auth, http, quarantine
from hostler_usage import (
    check_pages,
    explain_pages,
    idle_pages,
    money_pages,
    page_frame,
    price_pages,
)
from hostler_usage.auditing.audit_report_store import AuditFilter, AuditGroup, AuditReportStore
from hostler_usage.charts import Chart, Moment, Span, Timeline, days_between, stack, timeline
from hostler_usage.explaining.explain_store import MeasureUnknown
from hostler_usage.history.measures import Window, hours
from hostler_usage.history.report_store import EventFilter, ReportStore, UsageFilter
from hostler_usage.history.usage_row import UsageRow
from hostler_usage.page_frame import (
    Marker,
    Month,
    Name,
    Shown,
    in_utc,
    render,
    route_paths,
    shown_month,
    spelled,
)
from hostler_usage.profiling.operation_store import OperationFilter, OperationStore, Profile
from hostler_usage.reading.event import event_id
from hostler_usage.reading.mapping import Mapping, Measure
from hostler_usage.reading.statement import ResourceKey, ResourceType
from hostler_usage.reading.times import PLAUSIBLE_FROM, PLAUSIBLE_UNTIL
from hostler_usage.windows import WindowInvalid

PROJECTS_SUMMED: Final = 10_000
TOP_SHOWN: Final = 20
TOP_DRAWN: Final = 6
ROWS_SHOWN: Final = 200
EVENTS_SHOWN: Final = 500
_DAY: Final = timedelta(days=1)
_REST: Final = "all others"
_LIFE_SHOWN: Final = timedelta(days=31)

router = APIRouter(include_in_schema=False)
router.include_router(page_frame.router)
router.include_router(check_pages.router)
router.include_router(money_pages.router)
router.include_router(price_pages.router)
router.include_router(explain_pages.router)
router.include_router(idle_pages.router)

ReportsDep = Annotated[ReportStore, http.state("reports")]
AuditReportsDep = Annotated[AuditReportStore, http.state("audit_reports")]
OperationsDep = Annotated[OperationStore, http.state("operations")]
PathName = Annotated[str, Path(max_length=255, pattern=r"^[^\x00]*$")]
Groups = SomeOf[str, str | None]
READER: Any = auth.require(auth.Role.READER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of a table of usage: what it is of, and its amounts as they are shown.

    `group` are the values that tell its usage from all other.
    """

    name: str | None
    group: Groups
    resources: int | None
    amounts: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of usage in a window."""

    title: str
    window: Window
    measures: tuple[Measure, ...]
    rows: tuple[Row, ...]


# --- usage


@router.get("/", dependencies=[READER])
async def overview(
    request: Request,
    reports: ReportsDep,
    audits: AuditReportsDep,
    quarantined: quarantine.QuarantineDep,
    caller: auth.Caller,
    month: Month = None,
    measure: Name = None,
) -> HTMLResponse:
    """How ingest is doing (for callers that may see every project), and who used how much."""
    now = datetime.now(UTC)
    shown = shown_month(month, now)
    where = UsageFilter(scope=caller.projects)
    found, _ = await reports.usage(shown.window, ["project"], where, limit=PROJECTS_SUMMED)
    last_day = Window(start=now - _DAY, end=now, as_of=now)
    recent, _ = await reports.usage(last_day, ["project"], where, limit=PROJECTS_SUMMED)
    chosen = _chosen(reports.mapping, measure, [*found, *recent])
    sees_all = caller.projects is None
    return render(
        request,
        "overview.html",
        shown=shown,
        measures=_used(reports.mapping, [*found, *recent]),
        chosen=chosen,
        chart=await _by_project(reports, caller, shown, chosen, found) if chosen else None,
        tables=[
            _table(reports.mapping, title, window, rows, "project", chosen)
            for title, window, rows in (
                (f"Projects in {shown.name}", shown.window, found),
                ("Projects in the last 24 hours", last_day, recent),
            )
        ],
        is_cut=len(found) == PROJECTS_SUMMED,
        top_shown=TOP_SHOWN,
        overview=await reports.overview() if sees_all else None,
        quarantined=await quarantined.count() if sees_all else None,
        unverified=await _unverified(audits, caller, now),
    )


@router.get("/projects", dependencies=[READER])
async def projects(
    request: Request,
    reports: ReportsDep,
    caller: auth.Caller,
    month: Month = None,
    marker: Marker = None,
) -> HTMLResponse:
    """Every project that used something in a month, by name."""
    shown = shown_month(month, datetime.now(UTC))
    found, next_marker = await reports.usage(
        shown.window,
        ["project"],
        UsageFilter(scope=caller.projects),
        limit=ROWS_SHOWN,
        marker=marker,
    )
    return render(
        request,
        "projects.html",
        shown=shown,
        table=_table(
            reports.mapping, f"Projects in {shown.name}", shown.window, found, "project", None
        ),
        next_marker=next_marker,
    )


@router.get("/projects/{project_id:path}", dependencies=[READER])
async def project(
    request: Request,
    project_id: PathName,
    reports: ReportsDep,
    audits: AuditReportsDep,
    operations: OperationsDep,
    caller: auth.Caller,
    month: Month = None,
    measure: Name = None,
    marker: Marker = None,
) -> HTMLResponse:
    """A project's month: by day, by resource, what was done, and what audits say."""
    now = datetime.now(UTC)
    shown = shown_month(month, now)
    where = UsageFilter(scope=caller.projects, project_id=project_id)
    by_day, _ = await reports.usage(shown.window, ["day", "type"], where, limit=PROJECTS_SUMMED)
    chosen = _chosen(reports.mapping, measure, by_day)
    by_resource, next_marker = await reports.usage(
        shown.window, ["type", "resource"], where, limit=ROWS_SHOWN, marker=marker
    )
    verdicts, _ = await audits.report(
        shown.window.start,
        shown.window.upper,
        [AuditGroup.RESOURCE_TYPE],
        AuditFilter(scope=caller.projects, project_id=project_id),
        limit=ROWS_SHOWN,
    )
    profiles, _ = await operations.profiles(
        [Profile.RESOURCE_TYPE, Profile.ACTION],
        OperationFilter(
            scope=caller.projects,
            project_id=project_id,
            start=shown.window.start,
            end=shown.window.end,
        ),
        limit=ROWS_SHOWN,
    )
    used = _used(reports.mapping, by_day)
    paths = route_paths(request)
    return render(
        request,
        "project.html",
        project_id=project_id,
        shown=shown,
        measures=used,
        chosen=chosen,
        totals=[(item, _amount(item, sum(_exact(item, row) for row in by_day))) for item in used],
        chart=_by_day(chosen, shown.window, by_day) if chosen else None,
        tables=[
            _table(
                reports.mapping,
                name or "unknown",
                shown.window,
                list(rows),
                "resource",
                None,
                within={"project": project_id},
            )
            for name, rows in groupby(by_resource, key=lambda row: row.group["type"])
        ],
        next_marker=next_marker,
        verdicts=verdicts,
        profiles=profiles,
        has_feed="/feeds/projects/{project_id:feed_key}.atom" in paths,
        has_export="/v1/exports/usage.{file_format}" in paths,
    )


async def _by_project(
    reports: ReportStore,
    caller: auth.Principal,
    shown: Shown,
    measure: Measure,
    found: Sequence[UsageRow],
) -> Chart:
    """Usage by day: the largest projects, and all others as one."""
    largest = [
        row.group["project"]
        for row in sorted(found, key=lambda row: -_exact(measure, row))
        if _exact(measure, row) and row.group["project"] is not None
    ][:TOP_DRAWN]
    days = days_between(shown.window.start, shown.window.upper)
    rest = await _daily(reports, caller, shown.window, measure, None)
    parts: dict[str, dict[date, int]] = {}
    for name in largest:
        parts[name or ""] = await _daily(reports, caller, shown.window, measure, name)
        for day, amount in parts[name or ""].items():
            rest[day] -= amount
    # a fold between two of the questions may leave a little less than nothing
    parts[_REST] = {day: max(0, amount) for day, amount in rest.items()}
    if not any(parts[_REST].values()):
        del parts[_REST]
    return stack(
        f"{spelled(measure.name)} by day",
        spelled(measure.name),
        days,
        {name: _amounts(measure, amounts) for name, amounts in parts.items()},
        colours={_REST: "rest"},
    )


async def _daily(
    reports: ReportStore,
    caller: auth.Principal,
    window: Window,
    measure: Measure,
    project_id: str | None,
) -> dict[date, int]:
    rows, _ = await reports.usage(
        window,
        ["day"],
        UsageFilter(
            scope=caller.projects, project_id=project_id, resource_type=measure.resource_type
        ),
        limit=PROJECTS_SUMMED,
    )
    return defaultdict(int, {_day(row): _exact(measure, row) for row in rows})


def _by_day(measure: Measure, window: Window, rows: Sequence[UsageRow]) -> Chart:
    """One measure by day, of rows that are grouped by day."""
    amounts: dict[date, int] = defaultdict(int)
    for row in rows:
        amounts[_day(row)] += _exact(measure, row)
    name = spelled(measure.name)
    return stack(
        f"{name} by day",
        name,
        days_between(window.start, window.upper),
        {name: _amounts(measure, amounts)},
    )


def _used(mapping: Mapping, rows: Sequence[UsageRow]) -> list[Measure]:
    names = {name for row in rows for name, amount in row.amounts.items() if amount}
    return [item for item in mapping.measures if item.name in names]


def _chosen(mapping: Mapping, name: str | None, rows: Sequence[UsageRow]) -> Measure | None:
    """The measure to draw: what was asked for, else the first that there is any of."""
    if name is not None:
        for item in mapping.measures:
            if item.name == name:
                return item
        raise MeasureUnknown(f"there is no measure {name}")
    used = _used(mapping, rows)
    return next((item for item in used if item.name == "vcpu_hours"), used[0] if used else None)


def _table(
    mapping: Mapping,
    title: str,
    window: Window,
    rows: Sequence[UsageRow],
    of: str,
    chosen: Measure | None,
    *,
    within: Groups | None = None,
) -> Table:
    """What is held, as a table; the largest first, where a measure is chosen.

    `within` are groups that all of its rows are of, beside their own.
    """
    if chosen is not None:
        rows = sorted(rows, key=lambda row: -_exact(chosen, row))[:TOP_SHOWN]
    used = _used(mapping, rows)
    # what moved has units of its own: it is shown where it was asked for, and where there is room
    measures = [item for item in used if item.is_held or item == chosen or of == "resource"]
    return Table(
        title=title,
        window=window,
        measures=tuple(measures),
        rows=tuple(
            Row(
                name=row.group[of],
                group={**(within or {}), **row.group},
                resources=row.resources,
                amounts=tuple(_amount(item, _exact(item, row)) for item in measures),
            )
            for row in rows
        ),
    )


async def _unverified(
    audits: AuditReportStore, caller: auth.Principal, now: datetime
) -> float | None:
    """The share of what was held yesterday that no audit bears out; None where nothing was held."""
    today = now.replace(hour=0, minute=0, second=0, microsecond=0)
    rows, _ = await audits.report(
        today - _DAY,
        today,
        [AuditGroup.REGION],
        AuditFilter(scope=caller.projects),
        limit=ROWS_SHOWN,
    )
    held = sum(row.held_us for row in rows)
    return sum(row.unverified_us for row in rows) / held if held else None


def _day(row: UsageRow) -> date:
    return date.fromisoformat((row.group["day"] or "")[:10])


def _exact(measure: Measure, row: UsageRow) -> int:
    return row.amounts.get(measure.name, 0)


def _amounts(measure: Measure, amounts: dict[date, int]) -> dict[date, float]:
    return {day: _amount(measure, amount) for day, amount in amounts.items()}


def _amount(measure: Measure, exact: int) -> float:
    """An amount for eyes: hours of what was held, whole units of what moved."""
    return float(hours(exact)) if measure.is_held else exact


# --- one resource


@router.get("/resources/{resource_type}/{resource_id:path}", dependencies=[READER])
async def resource(
    request: Request,
    resource_type: PathName,
    resource_id: PathName,
    reports: ReportsDep,
    audits: AuditReportsDep,
    operations: OperationsDep,
    caller: auth.Caller,
    start: page_frame.Moment = None,
    end: page_frame.Moment = None,
    measure: Name = None,
    marker: Marker = None,
) -> HTMLResponse:
    """The life of a resource: its intervals and events, drawn and listed, and what they amount to."""
    now = datetime.now(UTC)
    intervals = await reports.intervals(
        resource_type, resource_id, region=None, scope=caller.projects
    )
    window = _life_window(intervals, in_utc(start), in_utc(end), now)
    of_resource = EventFilter(
        scope=caller.projects,
        start=window.start,
        end=window.end,
        resource_type=resource_type,
        resource_id=resource_id,
    )
    events, next_marker = await reports.events(of_resource, limit=EVENTS_SHOWN, marker=marker)
    # audits come every hour: the rest of what happened is drawn however many of them there are
    told, _ = await reports.events(
        replace(of_resource, is_audit=False), limit=EVENTS_SHOWN, marker=marker
    )
    by_day, _ = await reports.usage(
        window,
        ["day"],
        UsageFilter(scope=caller.projects, resource_type=resource_type, resource_id=resource_id),
        limit=PROJECTS_SUMMED,
    )
    done, _ = await operations.operations(
        OperationFilter(
            scope=caller.projects,
            start=window.start,
            end=window.end,
            resource_type=resource_type,
            resource_id=resource_id,
        ),
        limit=ROWS_SHOWN,
    )
    verdicts, _ = await audits.verdicts(
        AuditFilter(
            scope=caller.projects,
            start=window.start,
            end=window.end,
            resource_type=resource_type,
            resource_id=resource_id,
        ),
        limit=ROWS_SHOWN,
    )
    moments = list(
        {event_id(row["event_time"], row["body_sha256"]): row for row in (*events, *told)}.values()
    )
    regions = sorted({row["region"] for row in intervals} | {row["region"] for row in moments})
    anomalies: set[str] = set()
    for region in regions:
        key = ResourceKey(
            region=region, resource_type=ResourceType(resource_type), resource_id=resource_id
        )
        anomalies.update(await reports.anomalies(key))
    used = _used(reports.mapping, by_day)
    chosen = _chosen(reports.mapping, measure, by_day)
    feed = "/feeds/resources/{resource_type}/{resource_id:feed_key}.atom"
    return render(
        request,
        "resource.html",
        resource_type=resource_type,
        resource_id=resource_id,
        window=window,
        intervals=intervals,
        now_utc=now,
        **_attributes(intervals),
        drawn=[(region, _timeline(intervals, moments, region, window, now)) for region in regions],
        anomalies=sorted(anomalies),
        events=[(event_id(row["event_time"], row["body_sha256"]), row) for row in events],
        next_marker=next_marker,
        measures=used,
        chosen=chosen,
        totals=[(item, _amount(item, sum(_exact(item, row) for row in by_day))) for item in used],
        chart=_by_day(chosen, window, by_day) if chosen and by_day else None,
        operations=done,
        verdicts=verdicts,
        has_feed=feed in route_paths(request),
    )


def _attributes(intervals: Sequence[asyncpg.Record]) -> dict[str, Any]:
    """The attributes that change, and those that never do, with their value; an owner has a column."""
    names = dict.fromkeys(name for row in intervals for name in row["attributes"])
    values = {
        name: {row["attributes"].get(name) for row in intervals}
        for name in names
        if name != "project"
    }
    return {
        "has_owners": len({row["project_id"] for row in intervals}) > 1,
        "attributes": [name for name, found in values.items() if len(found) > 1],
        "constant": [
            (name, value)
            for name, found in values.items()
            if len(found) == 1 and (value := next(iter(found))) is not None
        ],
    }


def _life_window(
    intervals: Sequence[asyncpg.Record],
    start: datetime | None,
    end: datetime | None,
    now: datetime,
) -> Window:
    """What was asked for; else the whole life, or the newest month of a long one."""
    start = None if start is None else max(start, PLAUSIBLE_FROM)  # nothing was before, nor after
    end = None if end is None else min(max(end, PLAUSIBLE_FROM), PLAUSIBLE_UNTIL)
    if end is None:
        lasts = not intervals or any(row["ends_at"] is None for row in intervals)
        last = now if lasts else max(row["ends_at"] for row in intervals)
        end = min(now, last + max(timedelta(minutes=5), (last - _first(intervals, last)) / 50))
    if start is None:
        born = _first(intervals, end - _DAY)
        room = max(timedelta(minutes=5), (end - born) / 50)
        start = max(born - room, end - _LIFE_SHOWN)
    if end <= start:
        raise WindowInvalid("end must be later than start")
    return Window(start=start, end=end, as_of=now)


def _first(intervals: Sequence[asyncpg.Record], otherwise: datetime) -> datetime:
    return min((row["starts_at"] for row in intervals), default=otherwise)


def _timeline(
    intervals: Sequence[asyncpg.Record],
    events: Sequence[asyncpg.Record],
    region: str,
    window: Window,
    now: datetime,
) -> Timeline:
    return timeline(
        [
            Span(
                start=row["starts_at"],
                end=row["ends_at"],
                state_class=row["state_class"],
                attributes=row["attributes"],
                anchor=f"interval-{number}",
            )
            for number, row in enumerate(intervals, start=1)
            if row["region"] == region
        ],
        [
            Moment(
                at=row["event_time"],
                event_type=row["event_type"],
                is_error=row["priority"] == "ERROR",
                href=f"/events/{event_id(row['event_time'], row['body_sha256'])}",
            )
            for row in events
            if row["region"] == region
        ],
        window.start,
        window.end,
        now,
    )


# --- stored messages


@router.get("/events", dependencies=[READER])
async def events(
    request: Request,
    reports: ReportsDep,
    caller: auth.Caller,
    start: page_frame.Moment = None,
    end: page_frame.Moment = None,
    event_type: Name = None,
    message_id: Name = None,
    project_id: Name = None,
    resource_type: Name = None,
    resource_id: Name = None,
    source: Name = None,
    region: Name = None,
    marker: Marker = None,
) -> HTMLResponse:
    """Stored messages, newest first."""
    rows, next_marker = await reports.events(
        EventFilter(
            scope=caller.projects,
            start=in_utc(start),
            end=in_utc(end),
            event_type=event_type,
            message_id=message_id,
            project_id=project_id,
            resource_type=resource_type,
            resource_id=resource_id,
            source=source,
            region=region,
        ),
        limit=ROWS_SHOWN,
        marker=marker,
    )
    return render(
        request,
        "events.html",
        events=[(event_id(row["event_time"], row["body_sha256"]), row) for row in rows],
        next_marker=next_marker,
    )


@router.get("/events/{event}", dependencies=[READER])
async def event(
    request: Request, event: PathName, reports: ReportsDep, caller: auth.Caller
) -> HTMLResponse:
    """One stored message; its headers and body for callers that may see every project."""
    row = await reports.event(event, scope=caller.projects)
    sees_all = caller.projects is None
    return render(
        request,
        "event.html",
        event_name=event,
        event=row,
        resource_href=f"/resources/{quote(row['resource_type'], safe='')}"
        f"/{quote(row['resource_id'], safe='')}"
        if row["resource_type"] and row["resource_id"]
        else None,
        headers=json.dumps(row["headers"], indent=2, ensure_ascii=False)
        if sees_all and row["headers"]
        else None,
        body=check_pages.readable(row["body"]) if sees_all else None,
        is_whole=len(row["body"]) <= check_pages.BODY_SHOWN_BYTES,
    )
