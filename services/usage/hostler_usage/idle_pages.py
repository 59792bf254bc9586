"""The page of resources that nobody seems to need: what the API's report of the same name says."""

from datetime import UTC, datetime
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse

from hostler_common import auth, http
from hostler_usage.exporting import idle, idle_findings
from hostler_usage.exporting.exports import Exports
from hostler_usage.history.report_store import UsageFilter
from hostler_usage.money.price_store import PriceBookNotFound
from hostler_usage.page_frame import DEFAULT_BOOK, BookName, Filled, Marker, Name, render

ROWS_SHOWN: Final = 200

router = APIRouter(include_in_schema=False)
READER: Any = auth.require(auth.Role.READER)
ExportsDep = Annotated[Exports, http.state("exports")]
Reason = Annotated[idle.Reason | None, Filled, Query()]


@router.get("/idle", dependencies=[READER])
async def idle_resources(
    request: Request,
    exports: ExportsDep,
    caller: auth.Caller,
    project_id: Name = None,
    resource_type: Name = None,
    reason: Reason = None,
    price_book: BookName = None,
    marker: Marker = None,
) -> HTMLResponse:
    """What is held and seems forgotten, why that is thought, and what it costs."""
    try:
        pricing = await exports.pricing(price_book or DEFAULT_BOOK, caller)
    except PriceBookNotFound:
        if price_book is not None:
            raise
        pricing = None
    limits = idle.Thresholds()
    found = await idle_findings.find(
        exports,
        UsageFilter(scope=caller.projects, project_id=project_id, resource_type=resource_type),
        limits,
        now=datetime.now(UTC),
        pricing=pricing,
        reason=reason,
        include_unknown=False,
        limit=ROWS_SHOWN,
        marker=marker,
    )
    return render(
        request,
        "idle.html",
        found=found,
        limits=limits,
        currency=None if pricing is None else pricing.book.currency,
        reasons=list(idle.Reason),
        project_id=project_id,
        resource_type=resource_type,
        reason=reason,
        price_book=price_book,
    )
