"""The HTTP API: stored messages, usage of any window, histories with their evidence.

A caller that is bound to projects sees those alone, by a condition in the SQL, and no bodies: some
notifications carry the whole context of whoever acted.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime
from functools import partial
from typing import Annotated, Any

import asyncpg
import orjson
from fastapi import APIRouter, Query, Response
from pydantic import AwareDatetime, BaseModel, Field

from hostler_common import auth, errors, http
from hostler_usage.history.measures import shown_hours
from hostler_usage.history.report_store import (
    EventFilter,
    Group,
    ReportStore,
    UsageFilter,
)
from hostler_usage.history.usage_row import UsageRow
from hostler_usage.listing import Cited, Limit, Marker, Name, PathName, Selected, names
from hostler_usage.reading.event import event_id
from hostler_usage.reading.mapping import Mapping
from hostler_usage.reading.statement import ResourceKey, ResourceType
from hostler_usage.windows import window

ReportsDep = Annotated[ReportStore, http.state("reports")]
router = APIRouter(prefix="/v1", dependencies=[auth.require(auth.Role.READER)])


class BodyNotShown(errors.Forbidden):
    """Bodies and headers are for callers that may see every project."""

    code = "usage.event.body_not_shown"


class EventItem(BaseModel):
    """A stored notification, without its body."""

    id: str
    message_id: str
    has_own_id: bool = Field(description="false: the id was made from the body")
    event_type: str
    event_time: datetime
    received_at: datetime
    source: str
    region: str
    exchange: str
    routing_key: str
    publisher_id: str
    priority: str
    request_id: str | None
    project_id: str | None
    resource_type: str | None
    resource_id: str | None
    problems: list[str] = Field(description="fields that could not be read")
    content_type: str | None
    content_encoding: str | None
    body_bytes: int
    bodies: int = Field(
        description="messages under its message_id, dropped ones too, at most 100 of them: more than"
        " 1 is a conflict; all are counted in, and /v1/events?message_id= has those that are stored"
    )


class Events(BaseModel):
    """A page of stored notifications, newest first."""

    events: list[EventItem]
    next_marker: str | None


class UsageItem(BaseModel):
    """The usage of one group."""

    group: dict[Group, str | None]
    resources: int | None = Field(
        description="how many resources had part in it; null where sums of whole days answered"
    )
    hours: dict[str, float] = Field(description="unit-hours, rounded for showing: do not sum them")
    unit_microseconds: dict[str, int] = Field(description="the exact amounts of what was held")
    amounts: dict[str, int] = Field(description="what moved: bytes, operations")


class Usage(BaseModel):
    """Usage in a window, as far as it had passed at `as_of`."""

    start: datetime
    end: datetime
    as_of: datetime
    group_by: list[Group]
    usage: list[UsageItem]
    next_marker: str | None
    unfolded_resources: int = Field(
        description="resources with messages that are stored but not counted in here yet"
    )


class IntervalItem(BaseModel):
    """A span in which nothing about the resource changed."""

    region: str
    start: datetime
    end: datetime | None = Field(description="null while it lasts")
    project_id: str | None
    state_class: str
    attributes: dict[str, str | int | None]
    opened_by: list[Cited]
    closed_by: list[Cited]
    provenance: str


class History(BaseModel):
    """The intervals of a resource, oldest first."""

    resource_type: str
    resource_id: str
    intervals: list[IntervalItem]
    anomalies: list[str]


@router.get("/events", operation_id="list_events", tags=["events"])
async def list_events(
    reports: ReportsDep,
    caller: auth.Caller,
    selected: Selected,
    start: AwareDatetime | None = None,
    end: AwareDatetime | None = None,
    event_type: Name = None,
    message_id: Name = None,
    resource_id: Name = None,
    source: Name = None,
    limit: Limit = 100,
    marker: Marker = None,
) -> Events:
    """Stored notifications, newest first, without their bodies."""
    rows, next_marker = await reports.events(
        EventFilter(
            scope=caller.projects,
            start=start,
            end=end,
            event_type=event_type,
            message_id=message_id,
            resource_id=resource_id,
            source=source,
            **asdict(selected),
        ),
        limit=limit,
        marker=marker,
    )
    return Events(events=[_event(row) for row in rows], next_marker=next_marker)


@router.get("/events/{event}", operation_id="show_event", tags=["events"])
async def show_event(event: PathName, reports: ReportsDep, caller: auth.Caller) -> EventItem:
    """One stored notification, without its body."""
    return _event(await reports.event(event, scope=caller.projects))


@router.get(
    "/events/{event}/body",
    operation_id="download_event",
    tags=["events"],
    response_class=Response,
    responses={200: {"content": {"application/octet-stream": {}}}},
)
async def download_event(event: PathName, reports: ReportsDep, caller: auth.Caller) -> Response:
    """The body as it was read from the broker, byte for byte."""
    if caller.projects is not None:
        raise BodyNotShown("bodies are shown to callers that may see every project")
    row = await reports.event(event, scope=None)
    headers = {"ETag": f'"{row["body_sha256"].hex()}"'}
    return Response(row["body"], media_type="application/octet-stream", headers=headers)


@router.get("/usage", operation_id="show_usage", tags=["usage"], response_model=Usage)
async def show_usage(
    reports: ReportsDep,
    caller: auth.Caller,
    start: AwareDatetime,
    end: AwareDatetime,
    selected: Selected,
    group_by: Annotated[
        list[str] | None,
        Query(
            description="several with commas: project, user, resource, type, region, state_class,"
            " label, hour, day, month, any attribute (flavor, host, zone, image, os, ...), or"
            " group:<kind>, the groups of a kind that projects were in (/v1/project-groups)"
        ),
    ] = None,
    time_zone: Annotated[str, Query(max_length=64, description="of hours, days, months")] = "UTC",
    resource_id: Name = None,
    limit: Annotated[int, Query(ge=1, le=20_000)] = 1000,
    marker: Marker = None,
) -> Response:
    """What was used in a window: exact amounts, and hours for showing."""
    asked = window(start, end)
    groups = names(group_by)
    # asked first: a fold between the two may be counted twice as a doubt, and never passes unsaid
    unfolded = await reports.unfolded()
    items, next_marker = await reports.shown_usage(
        partial(usage_items, reports.mapping),
        asked,
        groups,
        UsageFilter(scope=caller.projects, resource_id=resource_id, **asdict(selected)),
        limit=limit,
        marker=marker,
        time_zone=time_zone,
    )
    head = Usage(
        start=asked.start,
        end=asked.end,
        as_of=asked.as_of,
        group_by=groups,
        usage=[],
        next_marker=next_marker,
        unfolded_resources=unfolded,
    )
    return Response(usage_document(head, items), media_type="application/json")


@router.get(
    "/resources/{resource_type}/{resource_id}/intervals",
    operation_id="list_intervals",
    tags=["usage"],
)
async def list_intervals(
    resource_type: PathName,
    resource_id: PathName,
    reports: ReportsDep,
    caller: auth.Caller,
    region: Name = None,
) -> History:
    """The history of one resource, with the messages that each interval rests on."""
    rows = await reports.intervals(
        resource_type, resource_id, region=region, scope=caller.projects
    )
    regions = sorted({row["region"] for row in rows} | ({region} if region else set()))
    anomalies: set[str] = set()
    for name in regions:
        key = ResourceKey(
            region=name, resource_type=ResourceType(resource_type), resource_id=resource_id
        )
        anomalies.update(await reports.anomalies(key))
    return History(
        resource_type=resource_type,
        resource_id=resource_id,
        intervals=[_interval(row) for row in rows],
        anomalies=sorted(anomalies),
    )


def _event(row: asyncpg.Record) -> EventItem:
    values: dict[str, Any] = dict(row)
    return EventItem(
        id=event_id(row["event_time"], row["body_sha256"]),
        **{name: values[name] for name in EventItem.model_fields if name != "id"},
    )


def usage_document(head: Usage, items: Iterable[bytes]) -> bytes:
    """The answer as JSON: the head, with the list that these parts of it by `usage_items` make."""
    listed = [orjson.Fragment(part) for part in items]  # copied once, as they are
    return orjson.dumps(head.model_dump(mode="json") | {"usage": listed})


def usage_items(mapping: Mapping, rows: Iterable[UsageRow]) -> bytes:
    """Part of the list of an answer: the `UsageItem` of each row as JSON, commas in between.

    There may be many rows: a model of each would take longer than all else.
    """
    held = frozenset(item.name for item in mapping.measures if item.is_held)
    items = [_usage(row, held) for row in rows]
    try:
        listed = orjson.dumps(items)
    except TypeError:  # a number of more than 64 bits, which orjson does not write
        listed = json.dumps(items, ensure_ascii=False, separators=(",", ":")).encode()
    return listed[1:-1]


def _usage(row: UsageRow, held: frozenset[str]) -> dict[str, object]:
    """A `UsageItem` as it is in JSON."""
    unit_microseconds, moved = row.amounts, {}
    if not held.issuperset(row.amounts):
        unit_microseconds = {name: n for name, n in row.amounts.items() if name in held}
        moved = {name: n for name, n in row.amounts.items() if name not in held}
    return {
        "group": row.group,
        "resources": row.resources,
        "hours": shown_hours(unit_microseconds),
        "unit_microseconds": unit_microseconds,
        "amounts": moved,
    }


def _interval(row: asyncpg.Record) -> IntervalItem:
    return IntervalItem(
        region=row["region"],
        start=row["starts_at"],
        end=row["ends_at"],
        project_id=row["project_id"],
        state_class=row["state_class"],
        attributes=row["attributes"],
        opened_by=[Cited(**item) for item in row["opened_by"]],
        closed_by=[Cited(**item) for item in row["closed_by"]],
        provenance=row["provenance"],
    )
