"""The HTTP API of closed periods: months, their frozen lines, and the adjustments that came after.

What a bill for a month needs: its lines once it is closed (`/lines`), and the adjustments charged to
it (`/adjustments?of=charged`), which correct months before it. Both never change again. The body of
`/lines` is what the manifest's sha256 is over, so that `sha256sum` checks it. A caller bound to
projects sees its own lines and adjustments, and of the manifest the hash alone.
"""

from collections.abc import AsyncGenerator, AsyncIterator
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated

import asyncpg
from fastapi import APIRouter, Body, Path, Query
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field

from hostler_common import auth, db, errors, http, idempotency
from hostler_usage.history.paging import Scope
from hostler_usage.periods.period import MOST_EVIDENCE, Obstacle, State, canonical
from hostler_usage.periods.period_store import PeriodNotClosed, PeriodStore, StoredPeriod

PeriodsDep = Annotated[PeriodStore, http.state("periods")]
router = APIRouter(prefix="/v1", tags=["periods"], dependencies=[auth.require(auth.Role.READER)])

Limit = Annotated[int, Query(ge=1, le=1000)]
Marker = Annotated[str | None, Query(max_length=2000, description="next_marker of the last page")]
PathName = Annotated[str, Path(max_length=255, pattern=r"^[^\x00]*$", description="YYYY-MM")]


class ClosingNotAllowed(errors.Forbidden):
    """A period is of all projects: whoever closes one may see them all."""

    code = "usage.period.closing_not_allowed"


class ManifestItem(BaseModel):
    """What a closed period holds, sealed."""

    sha256: str = Field(description="of the body of /v1/periods/{name}/lines, whole")
    lines: int | None = Field(description="null for callers bound to projects, as totals")
    totals: dict[str, int] | None = Field(
        description="by measure: unit-microseconds of what was held, units of what moved"
    )


class BlockerItem(BaseModel):
    """What keeps a period from closing by itself."""

    obstacle: Obstacle
    detail: str


class PeriodItem(BaseModel):
    """A month of usage."""

    name: str
    start: datetime
    end: datetime
    time_zone: str
    state: State
    settles_at: datetime = Field(description="when it has waited for what is late")
    closed_at: datetime | None
    closed_by: str | None = Field(description="null: it had settled")
    overruled: list[str] = Field(description="what it was closed in spite of")
    kinds: dict[str, str] | None = Field(
        description="of each resource type the attribute that `kind` of its lines is"
    )
    manifest: ManifestItem | None


class PeriodDetail(PeriodItem):
    """A month of usage, and what it waits for."""

    blockers: list[BlockerItem]
    unwritten_changes: int = Field(
        description="changes by late news that are not written as adjustments yet"
    )


class Periods(BaseModel):
    """A page of periods, the newest first."""

    periods: list[PeriodItem]
    next_marker: str | None


class Message(BaseModel):
    """A message that brought an adjustment about."""

    message_id: str
    event_id: str = Field(description="its name at /v1/events")


class AdjustmentItem(BaseModel):
    """A correction of one line of a closed period, on account of one resource."""

    id: int
    period: str
    charged_to: str = Field(description="the period that was open by then")
    region: str
    project_id: str | None
    resource_type: str
    state_class: str | None
    kind: str | None
    measure: str
    delta: int = Field(description="unit-microseconds of what was held, units of what moved")
    resource_id: str
    messages: int = Field(description="how many brought it about")
    evidence: list[Message] = Field(description=f"the first {MOST_EVIDENCE} of them")
    noticed_at: datetime
    written_at: datetime


class Adjustments(BaseModel):
    """A page of adjustments in the order they were written."""

    adjustments: list[AdjustmentItem]
    next_marker: str | None


class Which(StrEnum):
    """Of two periods that an adjustment names, the one that is meant."""

    CORRECTED = "corrected"
    CHARGED = "charged"


class ClosingRequest(BaseModel):
    """How a period is to be closed before it has settled."""

    model_config = {"extra": "forbid"}

    overrule: bool = Field(
        False, description="in spite of a fold that is behind, and of audits not checked"
    )


@router.get("/periods", operation_id="list_periods")
async def list_periods(
    store: PeriodsDep, caller: auth.Caller, limit: Limit = 100, marker: Marker = None
) -> Periods:
    """Periods, the newest first."""
    found, next_marker = await store.periods(limit=limit, marker=marker)
    now = datetime.now(UTC)
    return Periods(
        periods=[_item(store, one, now, caller.projects) for one in found],
        next_marker=next_marker,
    )


@router.get("/periods/{name}", operation_id="show_period")
async def show_period(name: PathName, store: PeriodsDep, caller: auth.Caller) -> PeriodDetail:
    """One period: how far it is, what it waits for, and its manifest once it is closed."""
    found, now = await store.period(name), datetime.now(UTC)
    is_closed = found.manifest is not None
    blockers = [] if is_closed else await store.blockers(found.period, now)
    return PeriodDetail(
        **_item(store, found, now, caller.projects).model_dump(),
        blockers=[BlockerItem(obstacle=one.obstacle, detail=one.detail) for one in blockers],
        unwritten_changes=await store.unwritten(name, scope=caller.projects) if is_closed else 0,
    )


@router.post(
    "/periods/{name}/close",
    operation_id="close_period",
    dependencies=[auth.require(auth.Role.ADMIN)],
    response_model=PeriodItem,
)
async def close_period(
    name: PathName,
    store: PeriodsDep,
    caller: auth.Caller,
    body: Annotated[ClosingRequest | None, Body()] = None,
    key: idempotency.IdempotencyKey = None,
) -> JSONResponse:
    """Freeze a period that is over, without waiting for what is late."""
    if caller.projects is not None:
        raise ClosingNotAllowed("a period is closed by callers that may see every project")
    overrule = body is not None and body.overrule
    request = {"close": name, "overrule": overrule}
    async with db.transaction(store.pool) as connection:
        if key is not None:
            stored = await idempotency.begin(connection, key, caller=caller.name, request=request)
            if stored is not None:
                return JSONResponse(stored.body, stored.status)
        now = datetime.now(UTC)
        found = await store.close(connection, name, now, by=caller.name, overrule=overrule)
        answer = _item(store, found, now, None).model_dump(mode="json")
        if key is not None:
            await idempotency.finish(connection, key, caller=caller.name, status=200, body=answer)
    return JSONResponse(answer)


@router.get(
    "/periods/{name}/lines",
    operation_id="download_period_lines",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/x-ndjson": {}}}},
)
async def download_period_lines(
    name: PathName, store: PeriodsDep, caller: auth.Caller
) -> StreamingResponse:
    """The frozen lines of a closed period in their canonical bytes, one a line.

    For callers that may see every project, the sha256 of this body is the manifest's.
    """
    found = await store.period(name)
    if found.manifest is None:
        raise PeriodNotClosed(f"period {name} has no lines before it is closed")
    pieces = _pieces(store, found, caller.projects)
    first = await anext(pieces)  # what fails before the first line is still an answer of its own
    return StreamingResponse(
        _chain(first, pieces),
        media_type="application/x-ndjson",
        headers={"Content-Disposition": f'attachment; filename="{name}.ndjson"'},
    )


async def _pieces(store: PeriodStore, found: StoredPeriod, scope: Scope) -> AsyncGenerator[bytes]:
    """The lines, a batch at a time: they never change, so that no transaction need last."""
    after: int | None = -1
    while after is not None:
        rows, after = await store.lines(found.period, scope=scope, after=after)
        yield b"".join(canonical(found.period, line, amount) for line, amount in rows)


async def _chain(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in rest:
        yield piece


@router.get("/periods/{name}/adjustments", operation_id="list_period_adjustments")
async def list_period_adjustments(
    name: PathName,
    store: PeriodsDep,
    caller: auth.Caller,
    of: Annotated[
        Which, Query(description="corrected: of its own lines; charged: of others, while it ran")
    ] = Which.CORRECTED,
    limit: Limit = 100,
    marker: Marker = None,
) -> Adjustments:
    """What late news changed: corrections of this period, or those charged to it."""
    await store.period(name)
    rows, next_marker = await store.adjustments(
        name, charged=of is Which.CHARGED, scope=caller.projects, limit=limit, marker=marker
    )
    return Adjustments(adjustments=[_adjustment(row) for row in rows], next_marker=next_marker)


def _item(store: PeriodStore, found: StoredPeriod, now: datetime, scope: Scope) -> PeriodItem:
    one, manifest = found.period, found.manifest
    return PeriodItem(
        name=one.name,
        start=one.start,
        end=one.end,
        time_zone=one.time_zone,
        state=one.state(now),
        settles_at=one.settles_at(store.settle),
        closed_at=one.closed_at,
        closed_by=found.closed_by if scope is None else None,
        overruled=list(found.overruled),
        kinds=None if found.terms is None else dict(found.terms.kinds),
        manifest=None
        if manifest is None
        else ManifestItem(
            sha256=manifest.sha256.hex(),
            lines=manifest.lines if scope is None else None,
            totals=dict(manifest.totals) if scope is None else None,
        ),
    )


def _adjustment(row: asyncpg.Record) -> AdjustmentItem:
    return AdjustmentItem(
        id=row["id"],
        period=row["period"],
        charged_to=row["charged_to"],
        region=row["region"],
        project_id=row["project_id"] or None,
        resource_type=row["resource_type"],
        state_class=row["state_class"] or None,
        kind=row["kind"] or None,
        measure=row["measure"],
        delta=int(row["delta"]),
        resource_id=row["resource_id"],
        messages=row["messages"],
        evidence=[Message(**item) for item in row["evidence"]],
        noticed_at=row["noticed_at"],
        written_at=row["written_at"],
    )
