"""The HTTP API of dated groups of projects: which project belongs to which, from when until when."""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Path
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from hostler_common import auth, errors, http
from hostler_usage.history.paging import BadMarker, marked_parts, marker_after
from hostler_usage.listing import Limit, Marker, Name
from hostler_usage.money import budget
from hostler_usage.money.budget import Membership
from hostler_usage.money.costing import Costing, in_utc
from hostler_usage.reading.times import PLAUSIBLE_FROM

CostingDep = Annotated[Costing, http.state("costing")]
router = APIRouter(
    prefix="/v1", tags=["project groups"], dependencies=[auth.require(auth.Role.READER)]
)

Kind = Annotated[str, Path(pattern=f"^{budget.KIND}$")]
PathName = Annotated[str, Path(max_length=255, pattern=r"^[^\x00]+$")]


class MembershipBody(BaseModel):
    """A time that a project belongs to a group."""

    model_config = ConfigDict(extra="forbid")

    group: str = Field(min_length=1, max_length=255, pattern=r"^[^\x00]*$")
    valid_from: AwareDatetime = PLAUSIBLE_FROM
    valid_until: AwareDatetime | None = None


class MembershipsBody(BaseModel):
    """Every group of one kind that a project was or is in."""

    model_config = ConfigDict(extra="forbid")

    memberships: list[MembershipBody] = Field(max_length=1000)


class MembershipView(BaseModel):
    """That a project belongs to a group from then until then."""

    kind: str
    group: str
    project_id: str
    valid_from: datetime
    valid_until: datetime | None


class Memberships(BaseModel):
    """A page of memberships, by kind, project and time."""

    project_groups: list[MembershipView]
    next_marker: str | None


@router.get("/project-groups", operation_id="list_project_groups")
async def list_project_groups(
    store: CostingDep,
    caller: auth.Caller,
    kind: Name = None,
    group: Name = None,
    project_id: Name = None,
    at: AwareDatetime | None = None,
    limit: Limit = 100,
    marker: Marker = None,
) -> Memberships:
    """Which project belongs to which group, from when until when."""
    after = None
    if marker is not None:
        place = marked_parts(marker, 3)
        try:
            after = (place[0], place[1], datetime.fromisoformat(place[2]))
        except ValueError as exc:
            raise BadMarker("the marker is not one of this list's") from exc
    rows = await store.prices.memberships(
        scope=caller.projects,
        kind=kind,
        group=group,
        project=project_id,
        at=at,
        limit=limit,
        after=after,
    )
    last = rows[-1] if len(rows) == limit else None
    return Memberships(
        project_groups=[_membership(row) for row in rows],
        next_marker=None
        if last is None
        else marker_after([last.kind, last.project, last.start.isoformat()]),
    )


@router.put(
    "/project-groups/{kind}/{project_id}",
    operation_id="put_project_groups",
    dependencies=[auth.require(auth.Role.ADMIN, every_project=True)],
)
async def put_project_groups(
    kind: Kind, project_id: PathName, body: MembershipsBody, store: CostingDep
) -> Memberships:
    """All the groups of a kind that the project was and is in; 409 where two of them overlap."""
    found = [
        Membership(
            kind=kind,
            group=one.group,
            project=project_id,
            start=in_utc(one.valid_from),
            end=None if one.valid_until is None else in_utc(one.valid_until),
        )
        for one in body.memberships
    ]
    for one in found:
        if one.end is not None and one.end <= one.start:
            raise errors.Invalid("valid_until must be later than valid_from")
    await store.prices.put_memberships(kind, project_id, found)
    return Memberships(
        project_groups=[_membership(one) for one in sorted(found, key=lambda one: one.start)],
        next_marker=None,
    )


def _membership(row: Membership) -> MembershipView:
    return MembershipView(
        kind=row.kind,
        group=row.group,
        project_id=row.project,
        valid_from=row.start,
        valid_until=row.end,
    )
