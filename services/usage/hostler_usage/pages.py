"""The service's page: usage per project of the last day and of this month, and how ingest is doing."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from hostler_common import auth, http, quarantine
from hostler_common.pages import Pages
from hostler_usage.measures import MEASURES, Window, hours
from hostler_usage.report_store import Group, ReportStore, UsageFilter

ROWS_SHOWN = 200

router = APIRouter(include_in_schema=False)
pages = Pages("hostler_usage")
ReportsDep = Annotated[ReportStore, http.state("reports")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One project in a table."""

    project: str | None
    resources: int
    hours: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Usage per project in one window."""

    title: str
    start: datetime
    end: datetime
    rows: list[Row]
    is_cut: bool


@router.get("/", dependencies=[auth.require(auth.Role.READER)])
async def overview(
    request: Request,
    reports: ReportsDep,
    quarantined: quarantine.QuarantineDep,
    caller: auth.Caller,
) -> HTMLResponse:
    """The overview; how ingest is doing is shown to callers that may see every project."""
    now = datetime.now(UTC)
    month = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    tables = [
        await _table(reports, title, Window(start=start, end=now, as_of=now), caller)
        for title, start in (("Last 24 hours", now - timedelta(days=1)), ("This month", month))
    ]
    sees_all = caller.projects is None
    return pages.render(
        request,
        "overview.html",
        tables=tables,
        measures=[item.name for item in MEASURES],
        overview=await reports.overview() if sees_all else None,
        quarantined=await quarantined.count() if sees_all else None,
    )


async def _table(
    reports: ReportStore, title: str, window: Window, caller: auth.Principal
) -> Table:
    found, marker = await reports.usage(
        window, [Group.PROJECT], UsageFilter(scope=caller.projects), limit=ROWS_SHOWN
    )
    return Table(
        title=title,
        start=window.start,
        end=window.end,
        rows=[
            Row(
                project=item.group[Group.PROJECT],
                resources=item.resources,
                hours=[float(hours(amount)) for amount in item.amounts.values()],
            )
            for item in found
        ],
        is_cut=marker is not None,
    )
