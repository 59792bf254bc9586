"""The HTTP API of operations: what was done, how long it took, and what never came to its end."""

from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Annotated

import asyncpg
from fastapi import APIRouter, Query
from pydantic import AwareDatetime, BaseModel, Field

from hostler_common import auth, errors, http
from hostler_usage.listing import Cited, Limit, Marker, Name, Selected, groups
from hostler_usage.profiling.operation_store import OperationFilter, OperationStore, Profile
from hostler_usage.profiling.operations import Outcome

OperationsDep = Annotated[OperationStore, http.state("operations")]
router = APIRouter(
    prefix="/v1", tags=["operations"], dependencies=[auth.require(auth.Role.READER)]
)

# a hundred years: what was not meant is an error, not an overflow
Seconds = Annotated[float | None, Query(ge=0, le=3_200_000_000, allow_inf_nan=False)]


class ProfileUnknown(errors.Invalid):
    """Operations cannot be profiled by that."""

    code = "usage.operation.group_by_unknown"


class OperationItem(BaseModel):
    """Something that was done to a resource."""

    region: str
    resource_type: str
    resource_id: str
    action: str
    request_id: str | None
    started_at: datetime | None = Field(description="null: it has none, or it was lost")
    ended_at: datetime | None = Field(description="null: nothing was heard of its end")
    outcome: Outcome
    duration_ms: float | None
    host: str | None
    flavor: str | None
    project_id: str | None
    reason: str | None
    evidence: list[Cited]


class Operations(BaseModel):
    """A page of operations, newest first."""

    operations: list[OperationItem]
    next_marker: str | None


class ProfileItem(BaseModel):
    """The operations of one group. Durations are of those that succeeded."""

    group: dict[Profile, str | None]
    operations: int
    succeeded: int
    failed: int
    unfinished: int
    lost_start: int = Field(description="ended well, their starts are not here")
    failure_share: float | None = Field(description="of those that ended; null where none did")
    p50_ms: float | None
    p99_ms: float | None


class Profiles(BaseModel):
    """A page of profiles, in order of their groups."""

    group_by: list[Profile]
    profiles: list[ProfileItem]
    next_marker: str | None


@router.get("/operations", operation_id="list_operations")
async def list_operations(
    operations: OperationsDep,
    caller: auth.Caller,
    selected: Selected,
    start: AwareDatetime | None = None,
    end: AwareDatetime | None = None,
    resource_id: Name = None,
    action: Name = None,
    outcome: Outcome | None = None,
    host: Name = None,
    flavor: Name = None,
    request_id: Name = None,
    unfinished_longer_than_seconds: Seconds = None,
    limit: Limit = 100,
    marker: Marker = None,
) -> Operations:
    """Operations, newest first; with `unfinished_longer_than_seconds`, starts that never ended."""
    since = None
    if unfinished_longer_than_seconds is not None:
        since = datetime.now(UTC) - timedelta(seconds=unfinished_longer_than_seconds)
    rows, next_marker = await operations.operations(
        OperationFilter(
            scope=caller.projects,
            start=start,
            end=end,
            **asdict(selected),
            resource_id=resource_id,
            action=action,
            outcome=outcome,
            host=host,
            flavor=flavor,
            request_id=request_id,
            unfinished_since=since,
        ),
        limit=limit,
        marker=marker,
    )
    return Operations(operations=[_operation(row) for row in rows], next_marker=next_marker)


@router.get("/operations/summary", operation_id="show_operation_profiles")
async def show_operation_profiles(
    operations: OperationsDep,
    caller: auth.Caller,
    selected: Selected,
    start: AwareDatetime | None = None,
    end: AwareDatetime | None = None,
    group_by: Annotated[
        list[str] | None,
        Query(description="action, host, flavor, resource_type, region, project"),
    ] = None,
    action: Name = None,
    host: Name = None,
    flavor: Name = None,
    limit: Limit = 1000,
    marker: Marker = None,
) -> Profiles:
    """How many operations of each kind there were, how many failed, and how long they took."""
    asked = groups(group_by, Profile, ProfileUnknown)
    rows, next_marker = await operations.profiles(
        asked,
        OperationFilter(
            scope=caller.projects,
            start=start,
            end=end,
            **asdict(selected),
            action=action,
            host=host,
            flavor=flavor,
        ),
        limit=limit,
        marker=marker,
    )
    return Profiles(
        group_by=asked,
        profiles=[_profile(row, asked) for row in rows],
        next_marker=next_marker,
    )


def _operation(row: asyncpg.Record) -> OperationItem:
    duration_us = row["duration_us"]
    return OperationItem(
        **{name: row[name] for name in OperationItem.model_fields if name not in _MADE},
        duration_ms=None if duration_us is None else duration_us / 1000,
        evidence=[Cited(**item) for item in row["evidence"]],
    )


_MADE = frozenset({"duration_ms", "evidence"})


def _profile(row: asyncpg.Record, asked: list[Profile]) -> ProfileItem:
    return ProfileItem(
        group={group: row[f"group_{n}"] or None for n, group in enumerate(asked)},
        **{name: row[name] for name in ProfileItem.model_fields if name != "group"},
    )
