"""The HTTP API of explanations: a number of usage, what it is made of, and the messages it rests on.

One call leads from a usage row to its intervals or amounts, which add up to it exactly, to the
messages that those rest on, and, for callers that may see every project, to their bodies.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal

import asyncpg
from fastapi import APIRouter, Query, Request
from pydantic import AwareDatetime, BaseModel, Field

from hostler_common import auth, http
from hostler_usage.explaining.explain import HeldPart, MovedPart, Share, body_text
from hostler_usage.explaining.explain_question import asked_groups, asked_window
from hostler_usage.explaining.explain_store import (
    OTHERS_SHOWN,
    VERDICTS_A_RESOURCE,
    ExplainStore,
    Explanation,
    Question,
)
from hostler_usage.history.measures import hours
from hostler_usage.history.report_store import ReportStore
from hostler_usage.reading.event import event_id

ExplainDep = Annotated[ExplainStore, http.state("explanations")]
ReportsDep = Annotated[ReportStore, http.state("reports")]
router = APIRouter(prefix="/v1", tags=["usage"], dependencies=[auth.require(auth.Role.READER)])

Marker = Annotated[str | None, Query(max_length=2000, description="next_marker of the last page")]
Name = Annotated[
    str | None,
    Query(max_length=255, pattern=r"^[^\x00]*$", description="empty: where it is not known"),
]
Bucket = Annotated[
    str | None,
    Query(max_length=32, pattern=r"^[^\x00]*$", description="as a usage row's group spells it"),
]


class ExplainedCitation(BaseModel):
    """A message that a part rests on."""

    message_id: str
    event_id: str = Field(description="its name at /v1/events, and in `events`")


class IntervalPart(BaseModel):
    """An interval: `amount` is `span_microseconds` x `quantity`."""

    start: datetime
    end: datetime | None = Field(description="null while it lasts")
    counted_from: datetime
    counted_until: datetime
    span_microseconds: int
    quantity: int
    amount: int
    project_id: str | None
    user_id: str | None
    state_class: str
    attributes: dict[str, str | int | None]
    provenance: str
    opened_by: list[ExplainedCitation]
    closed_by: list[ExplainedCitation]


class AmountPart(BaseModel):
    """What moved at one moment, and what the resource was then."""

    at: datetime
    counter: str
    label: str
    amount: int
    project_id: str | None
    state_class: str | None
    attributes: dict[str, str | int | None]
    evidence: list[ExplainedCitation]


class AuditItem(BaseModel):
    """What became of some audit periods of the resource."""

    period_start: datetime
    period_end: datetime
    periods: int
    is_partial: bool
    status: str
    code: str
    field: str | None
    ours: str | int | None
    theirs: str | int | None
    evidence: list[ExplainedCitation]


class ResourceItem(BaseModel):
    """One resource's share."""

    region: str
    resource_type: str
    resource_id: str
    amount: int = Field(description="all that it adds, on whatever page its parts are")
    parts: int = Field(description="how many parts that is")
    intervals: list[IntervalPart]
    amounts: list[AmountPart]
    audits: list[AuditItem] = Field(
        description=f"at most {VERDICTS_A_RESOURCE}, troubles first; /v1/audits has all"
    )


class BodyItem(BaseModel):
    """The bytes of a message."""

    encoding: Literal["utf-8", "base64"]
    text: str


class ExplainedEvent(BaseModel):
    """A stored message, with its body for callers that may see every project."""

    id: str
    message_id: str
    event_type: str
    event_time: datetime
    received_at: datetime
    source: str
    region: str
    publisher_id: str
    request_id: str | None
    project_id: str | None
    resource_type: str | None
    resource_id: str | None
    problems: list[str]
    content_type: str | None
    content_encoding: str | None
    body_bytes: int
    bodies: int = Field(
        description="messages under its message_id, dropped ones too, at most 100 of them: more than"
        " 1 is a conflict"
    )
    body: BodyItem | None = Field(
        description="null where it is not shown to the caller, or beyond 16 MiB of bodies in one"
        " answer: see /v1/events/{id}/body"
    )


class ExplanationItem(BaseModel):
    """A page of what a number of usage is made of."""

    start: datetime
    end: datetime
    as_of: datetime
    measure: str
    group: dict[str, str]
    amount: int = Field(description="unit-microseconds of what was held, units of what moved")
    hours: float | None = Field(description="unit-hours, rounded for showing; null of what moved")
    resources: int
    parts: int
    shares: list[ResourceItem]
    events: list[ExplainedEvent] = Field(
        description="the messages that this page's parts rest on, and others under their ids,"
        f" at most {OTHERS_SHOWN}"
    )
    not_shown: list[ExplainedCitation] = Field(
        description="those dropped by retention, or another project's"
    )
    next_marker: str | None
    unfolded_resources: int = Field(
        description="resources with messages that are stored but not counted in here yet"
    )


@router.get("/usage/explain", operation_id="explain_usage")
async def explain_usage(
    request: Request,
    store: ExplainDep,
    reports: ReportsDep,
    caller: auth.Caller,
    start: AwareDatetime,
    end: AwareDatetime,
    measure: Annotated[str, Query(max_length=255)],
    as_of: Annotated[
        AwareDatetime | None, Query(description="that of the usage row; now if absent")
    ] = None,
    time_zone: Annotated[str, Query(max_length=64, description="of hour, day, month")] = "UTC",
    project_id: Name = None,
    user_id: Name = None,
    region: Name = None,
    resource_type: Name = None,
    resource_id: Name = None,
    state_class: Name = None,
    label: Name = None,
    hour: Bucket = None,
    day: Bucket = None,
    month: Bucket = None,
    limit: Annotated[int, Query(ge=1, le=1000, description="parts, of all resources")] = 100,
    marker: Marker = None,
) -> ExplanationItem:
    """What a number of a usage row is made of, down to the bodies of the messages it rests on.

    Any attribute (flavor, host, zone, image, ...) is a parameter, too, as are the row's group names.
    """
    del project_id, user_id, region, resource_type, resource_id, state_class, label
    del hour, day, month  # named for their description: all groups are read alike
    asked = asked_window(start, end, as_of)
    groups = asked_groups(request.query_params.multi_items())
    unfolded = await reports.unfolded()
    found = await store.explain(
        Question(
            measure=measure,
            window=asked,
            groups=groups,
            scope=caller.projects,
            time_zone=time_zone,
        ),
        limit=limit,
        marker=marker,
    )
    return ExplanationItem(
        start=found.window.start,
        end=found.window.end,
        as_of=found.window.as_of,
        measure=found.measure.name,
        group=dict(groups),
        amount=found.amount,
        hours=float(hours(found.amount)) if found.measure.is_held else None,
        resources=found.resources,
        parts=found.parts,
        shares=[_share(item, found) for item in found.shares],
        events=[_event(row, found) for row in found.events],
        not_shown=[ExplainedCitation(**item) for item in found.not_shown],
        next_marker=found.next_marker,
        unfolded_resources=unfolded,
    )


def _share(item: Share, found: Explanation) -> ResourceItem:
    key = (item.region, item.resource_type, item.resource_id)
    return ResourceItem(
        region=item.region,
        resource_type=item.resource_type,
        resource_id=item.resource_id,
        amount=item.amount,
        parts=item.parts_in_all,
        intervals=[_interval(part) for part in item.parts if isinstance(part, HeldPart)],
        amounts=[_amount(part) for part in item.parts if isinstance(part, MovedPart)],
        audits=[_audit(row) for row in found.audits.get(key, ())],
    )


def _interval(part: HeldPart) -> IntervalPart:
    return IntervalPart(
        start=part.start,
        end=part.end,
        counted_from=part.counted_from,
        counted_until=part.counted_until,
        span_microseconds=part.span_us,
        quantity=part.quantity,
        amount=part.amount,
        project_id=part.project_id,
        user_id=part.user_id,
        state_class=part.state_class,
        attributes=dict(part.attributes),
        provenance=part.provenance,
        opened_by=[ExplainedCitation(**item) for item in part.opened_by],
        closed_by=[ExplainedCitation(**item) for item in part.closed_by],
    )


def _amount(part: MovedPart) -> AmountPart:
    return AmountPart(
        at=part.at,
        counter=part.counter,
        label=part.label,
        amount=part.amount,
        project_id=part.project_id,
        state_class=part.state_class,
        attributes=dict(part.attributes),
        evidence=[ExplainedCitation(**item) for item in part.evidence],
    )


def _audit(row: asyncpg.Record) -> AuditItem:
    values: Mapping[str, Any] = dict(row)
    names = AuditItem.model_fields.keys() - {"evidence"}
    return AuditItem(
        **{name: values[name] for name in names},
        evidence=[ExplainedCitation(**item) for item in row["evidence"]],
    )


def _event(row: asyncpg.Record, found: Explanation) -> ExplainedEvent:
    values: Mapping[str, Any] = dict(row)
    body = found.bodies.get((row["event_time"], row["body_sha256"]))
    encoding, text = (None, None) if body is None else body_text(body)
    return ExplainedEvent(
        id=event_id(row["event_time"], row["body_sha256"]),
        **{name: values[name] for name in ExplainedEvent.model_fields.keys() - {"id", "body"}},
        body=None
        if text is None
        else BodyItem.model_validate({"encoding": encoding, "text": text}),
    )
