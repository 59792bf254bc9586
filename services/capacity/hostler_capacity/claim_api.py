"""The HTTP API of claims: hold room, confirm it, give it back."""

from datetime import datetime, timedelta
from typing import Annotated
from uuid import UUID, uuid4

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field, model_validator

from hostler_capacity import claim_store, store
from hostler_capacity import flavor as flavors
from hostler_capacity.claim import Claim, ClaimId, State
from hostler_capacity.claim_store import Order
from hostler_capacity.ledger import Ledger, Replay, Wish
from hostler_capacity.settings import Settings
from hostler_capacity.shapes import Amount, Body, FlavorBody, Limit, Name, PoolDep
from hostler_common import auth, db, errors, http, idempotency
from hostler_common.auth import Caller, Role

router = APIRouter(prefix="/v1/claims", tags=["claims"], dependencies=[auth.require(Role.READER)])

LedgerDep = Annotated[Ledger, http.state("ledger")]
SettingsDep = Annotated[Settings, http.state("settings")]


class ClaimResources(Body):
    """What a guest without a flavor gets; overhead comes on top."""

    memory_mb: Annotated[int, Field(ge=1, le=2**48)]
    vcpus: Annotated[int, Field(ge=1, le=2**31)]
    disk_gb: Amount = 0
    extra: dict[Name, Amount] = Field(default_factory=dict)
    vm_type: str | None = Field(None, max_length=32)


class ClaimRequest(Body):
    """What to claim: a flavor or resources, anywhere or at an address."""

    flavor: Name | None = None
    resources: ClaimResources | None = None
    consumer_id: UUID | None = Field(
        None, description="The guest's UUID: a report that lists it confirms the claim."
    )
    project_id: Name
    host: Name | None = None
    hypervisor_hostname: Name | None = None
    ttl_seconds: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _is_one_thing(self) -> "ClaimRequest":
        if (self.flavor is None) == (self.resources is None):
            raise ValueError("name a flavor or resources, not both and not neither")
        if self.hypervisor_hostname is not None and self.host is None:
            raise ValueError("hypervisor_hostname is an address only together with host")
        return self


class ClaimView(BaseModel):
    """A claim. `resources` is what it takes from its node, overhead included."""

    id: UUID
    state: State
    host: str
    hypervisor_hostname: str
    node_uuid: UUID | None
    consumer_id: UUID
    project_id: str
    flavor: str | None
    resources: dict[str, int]
    overhead_mb: int
    overhead_model: str
    overhead_model_version: int
    created_at: datetime
    expires_at: datetime
    confirmed_at: datetime | None
    ended_at: datetime | None


class Claims(BaseModel):
    """A page of claims."""

    claims: list[ClaimView]
    next_marker: str | None


def _claim_view(claim: Claim) -> ClaimView:
    return ClaimView(
        id=claim.id,
        state=claim.state,
        host=claim.host,
        hypervisor_hostname=claim.hypervisor_hostname,
        node_uuid=claim.node_uuid,
        consumer_id=claim.consumer_id,
        project_id=claim.project_id,
        flavor=claim.flavor,
        resources={str(name): amount for name, amount in claim.resources.items()},
        overhead_mb=claim.overhead_mb,
        overhead_model=claim.overhead_model,
        overhead_model_version=claim.overhead_model_version,
        created_at=claim.created_at,
        expires_at=claim.expires_at,
        confirmed_at=claim.confirmed_at,
        ended_at=claim.ended_at,
    )


@router.post(
    "",
    operation_id="create_claim",
    status_code=201,
    dependencies=[auth.require(Role.OPERATOR)],
)
async def create_claim(
    body: ClaimRequest,
    caller: Caller,
    pool: PoolDep,
    ledger: LedgerDep,
    settings: SettingsDep,
    idempotency_key: idempotency.IdempotencyKey = None,
) -> ClaimView:
    """Hold room on a node until the claim is confirmed, released or expires.

    409 `capacity.claim.no_room` says which resource is short by how much where.
    """
    if caller.projects is not None and body.project_id not in caller.projects:
        raise errors.Forbidden(f"{caller.name} may not claim for project {body.project_id}")
    ttl_seconds = body.ttl_seconds or settings.claim_ttl_seconds
    if ttl_seconds > settings.claim_ttl_seconds_max:
        raise errors.Invalid(f"ttl_seconds may be {settings.claim_ttl_seconds_max} at most")
    replay = None
    if idempotency_key is not None:
        replay = Replay(
            key=idempotency_key, caller=caller.name, request=body.model_dump(mode="json")
        )
    try:
        wanted = await _wanted(body, pool)
    except store.FlavorNotFound:
        # a request that was granted is answered alike, whatever became of its flavor
        earlier = await ledger.granted_before(replay) if replay is not None else None
        if earlier is None:
            raise
        return _claim_view(earlier)
    wish = Wish(
        order=Order(
            claim_id=ClaimId(uuid4()),
            consumer_id=body.consumer_id or uuid4(),
            project_id=body.project_id,
            flavor=body.flavor,
            ttl=timedelta(seconds=ttl_seconds),
        ),
        flavor=wanted,
        host=body.host,
        hypervisor_hostname=body.hypervisor_hostname,
    )
    return _claim_view(await ledger.grant(wish, replay))


async def _wanted(body: ClaimRequest, pool: db.Pool) -> flavors.Flavor:
    if body.flavor is not None:
        async with db.connection(pool) as connection:
            return (await store.get_flavor(connection, body.flavor)).flavor
    assert body.resources is not None
    return FlavorBody.model_validate(body.resources.model_dump()).flavor("")


@router.get("", operation_id="list_claims")
async def list_claims(
    caller: Caller,
    pool: PoolDep,
    state: Annotated[list[State] | None, Query()] = None,
    host: str | None = None,
    consumer_id: UUID | None = None,
    limit: Limit = 100,
    marker: UUID | None = None,
) -> Claims:
    """Claims that the caller may see, oldest first."""
    async with db.connection(pool) as connection:
        found = await claim_store.listed(
            connection,
            states=state,
            host=host,
            consumer_id=consumer_id,
            projects=caller.projects,
            after=ClaimId(marker) if marker else None,
            limit=limit,
        )
    return Claims(
        claims=[_claim_view(each) for each in found],
        next_marker=str(found[-1].id) if len(found) == limit else None,
    )


@router.get("/{claim_id}", operation_id="show_claim")
async def show_claim(claim_id: UUID, caller: Caller, ledger: LedgerDep) -> ClaimView:
    """One claim."""
    return _claim_view(await ledger.show(ClaimId(claim_id), caller.projects))


@router.post(
    "/{claim_id}/confirm",
    operation_id="confirm_claim",
    dependencies=[auth.require(Role.OPERATOR)],
)
async def confirm_claim(claim_id: UUID, caller: Caller, ledger: LedgerDep) -> ClaimView:
    """The guest exists: the claim no longer expires. 409 `capacity.claim.not_held` when too late."""
    return _claim_view(await ledger.confirm(ClaimId(claim_id), caller.projects))


@router.delete(
    "/{claim_id}",
    operation_id="release_claim",
    dependencies=[auth.require(Role.OPERATOR)],
)
async def release_claim(claim_id: UUID, caller: Caller, ledger: LedgerDep) -> ClaimView:
    """Give the room back. The claim stays to be read; what had ended before stays as it was."""
    return _claim_view(await ledger.release(ClaimId(claim_id), caller.projects))
