"""The page of an explanation: one number of a usage row, down to the bodies of the messages it rests on.

It says what `/v1/usage/explain` says, and takes the same parameters: every number of usage on the
other pages leads here, and everything behind the number is on this one page.
"""

from datetime import UTC, datetime
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse

from hostler_common import auth, http
from hostler_usage import page_frame
from hostler_usage.check_pages import readable
from hostler_usage.explaining.explain_question import asked_groups, asked_window
from hostler_usage.explaining.explain_store import ExplainStore, Explanation, Question
from hostler_usage.history.measures import hours
from hostler_usage.history.report_store import ReportStore
from hostler_usage.page_frame import Marker, in_utc, render
from hostler_usage.reading.event import event_id
from hostler_usage.reading.times import MICROSECOND

PARTS_SHOWN: Final = 50
_FIRST: Final = datetime.min.replace(tzinfo=UTC)

router = APIRouter(include_in_schema=False)

ExplainDep = Annotated[ExplainStore, http.state("explanations")]
ReportsDep = Annotated[ReportStore, http.state("reports")]
READER: Any = auth.require(auth.Role.READER)


@router.get("/explain", dependencies=[READER])
async def explain(
    request: Request,
    store: ExplainDep,
    reports: ReportsDep,
    caller: auth.Caller,
    measure: Annotated[str, Query(max_length=255)],
    start: page_frame.Moment = None,
    end: page_frame.Moment = None,
    as_of: page_frame.Moment = None,
    time_zone: Annotated[str, Query(max_length=64)] = "UTC",
    marker: Marker = None,
) -> HTMLResponse:
    """What a number of usage is made of; of the month so far, where no window is asked for."""
    now = datetime.now(UTC)
    until = in_utc(end) or now
    since = in_utc(start) or _month_of(until)
    groups = asked_groups(request.query_params.multi_items())
    unfolded = await reports.unfolded()
    found = await store.explain(
        Question(
            measure=measure,
            window=asked_window(since, until, in_utc(as_of)),
            groups=groups,
            scope=caller.projects,
            time_zone=time_zone,
        ),
        limit=PARTS_SHOWN,
        marker=marker,
    )
    messages = _messages(found)
    return render(
        request,
        "explain.html",
        found=found,
        groups=groups,
        shown=_shown(found, found.amount),
        shares=[
            (share, [(part, _shown(found, part.amount)) for part in share.parts])
            for share in found.shares
        ],
        hours_of=lambda part: float(hours(part.span_us)),
        is_held=found.measure.is_held,
        messages=messages,
        known={name for name, _, _ in messages},
        sees_all=caller.projects is None,
        unfolded=unfolded,
        next_marker=found.next_marker,
    )


def _month_of(until: datetime) -> datetime:
    """The begin of the month that ends at `until`, or has it within."""
    last = until if until == _FIRST else until - MICROSECOND
    return last.replace(day=1, hour=0, minute=0, second=0, microsecond=0)


def _shown(found: Explanation, exact: int) -> float:
    """An amount for eyes: hours of what was held, units of what moved."""
    return float(hours(exact)) if found.measure.is_held else exact


def _messages(found: Explanation) -> list[tuple[str, Any, str | None]]:
    """The messages of this page's parts, each with its name and what is shown of its body."""
    said = []
    for row in found.events:
        body = found.bodies.get((row["event_time"], row["body_sha256"]))
        name = event_id(row["event_time"], row["body_sha256"])
        said.append((name, row, None if body is None else readable(body)))
    return said
