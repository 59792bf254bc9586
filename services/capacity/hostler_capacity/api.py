"""The HTTP API: hosts, flavors, fit counts, claims and overhead models."""

from datetime import UTC, datetime
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, Field

from hostler_capacity import fit, store
from hostler_capacity import flavor as flavors
from hostler_capacity import overhead as overheads
from hostler_capacity.fleet import FleetView
from hostler_capacity.ledger import Ledger
from hostler_capacity.settings import Settings
from hostler_capacity.shapes import (
    FlavorBody,
    Limit,
    ModelView,
    Name,
    PoolDep,
    model_view,
)
from hostler_common import auth, db, http
from hostler_common.auth import Role

router = APIRouter(prefix="/v1", dependencies=[auth.require(Role.READER)])

LedgerDep = Annotated[Ledger, http.state("ledger")]
ViewDep = Annotated[FleetView, http.state("view")]
CatalogueDep = Annotated[overheads.Catalogue, http.state("catalogue")]
SettingsDep = Annotated[Settings, http.state("settings")]

MaxAge = Annotated[
    float | None,
    Query(ge=0, description="Read the database first if the answer would be older; 0: always."),
]


# --- hosts


class Resource(BaseModel):
    """One class of one host: `free = limit - claimed - foreign`, negative where it is over."""

    limit: int
    claimed: int
    foreign: int
    free: int


class Host(BaseModel):
    """One node as it counts for placement."""

    host: str
    hypervisor_hostname: str
    node_uuid: UUID | None
    hypervisor_type: str
    bare_metal: bool
    state: fit.NodeState
    reported_state: str | None
    zone: str | None
    received_at: datetime
    overhead_model: str
    resources: dict[str, Resource]


class Hosts(BaseModel):
    """A page of hosts, as of one moment."""

    as_of: datetime
    hosts: list[Host]
    next_marker: str | None


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _host(fleet: fit.Fleet, at: int, now: float) -> Host:
    node = fleet.nodes[at]
    return Host(
        host=node.host,
        hypervisor_hostname=node.hypervisor_hostname,
        node_uuid=node.node_uuid,
        hypervisor_type=node.hypervisor_type,
        bare_metal=node.bare_metal,
        state=node.state(now, fleet.stale_seconds),
        reported_state=node.reported_state,
        zone=node.zone,
        received_at=_time(node.received_at),
        overhead_model=fleet.models[fleet.pricing[at]].id,
        resources={
            name: Resource(
                limit=counter.limit,
                claimed=counter.claimed,
                foreign=counter.foreign,
                free=counter.free,
            )
            for name, counter in node.counters.items()
        },
    )


@router.get("/hosts", operation_id="list_hosts", tags=["hosts"])
async def list_hosts(
    view: ViewDep,
    host: Annotated[str | None, Query(description="Only the nodes of this host.")] = None,
    max_age_seconds: MaxAge = None,
    limit: Limit = 100,
    marker: Annotated[int, Query(ge=0)] = 0,
) -> Hosts:
    """Every node with its limits, claims and foreign use, by the time hostler learnt of it."""
    await view.require(max_age_seconds)
    fleet, now = view.fleet, view.now()
    found = [
        at for at, node in enumerate(fleet.nodes) if node.id > marker and host in (None, node.host)
    ]
    page = found[:limit]
    return Hosts(
        as_of=_time(fleet.as_of),
        hosts=[_host(fleet, at, now) for at in page],
        next_marker=str(fleet.nodes[page[-1]].id) if len(found) > limit else None,
    )


# --- flavors


# every project is placed by the same flavors
_changes = [auth.require(Role.OPERATOR, every_project=True)]


class NewFlavor(FlavorBody):
    """A flavor to create."""

    name: Name


class ChangedFlavor(FlavorBody):
    """A flavor as it shall be; `generation` is the one that was read."""

    generation: Annotated[int, Field(ge=1)]


class FlavorView(BaseModel):
    """A flavor as it is."""

    name: str
    generation: int
    memory_mb: int
    vcpus: int
    disk_gb: int
    extra: dict[str, int]
    vm_type: str | None
    kind: flavors.Kind
    match: flavors.Match


class Flavors(BaseModel):
    """A page of flavors."""

    flavors: list[FlavorView]
    next_marker: str | None


def _flavor_view(stored: store.StoredFlavor) -> FlavorView:
    flavor = stored.flavor
    return FlavorView(
        name=flavor.name,
        generation=stored.generation,
        memory_mb=flavor.memory_mb,
        vcpus=flavor.vcpus,
        disk_gb=flavor.disk_gb,
        extra={str(name): amount for name, amount in flavor.extra.items()},
        vm_type=flavor.vm_type,
        kind=flavor.kind,
        match=flavor.match,
    )


@router.get("/flavors", operation_id="list_flavors", tags=["flavors"])
async def list_flavors(pool: PoolDep, limit: Limit = 100, marker: str = "") -> Flavors:
    """Flavors by name."""
    async with db.connection(pool) as connection:
        found = await store.flavors(connection, after=marker, limit=limit)
    return Flavors(
        flavors=[_flavor_view(each) for each in found],
        next_marker=found[-1].flavor.name if len(found) == limit else None,
    )


@router.post(
    "/flavors",
    operation_id="create_flavor",
    tags=["flavors"],
    status_code=201,
    dependencies=_changes,
)
async def create_flavor(body: NewFlavor, pool: PoolDep) -> FlavorView:
    """Create a flavor; 409 `capacity.flavor.exists` where there is one of that name."""
    async with db.transaction(pool) as connection:
        return _flavor_view(await store.create_flavor(connection, body.flavor(body.name)))


@router.get("/flavors/{name}", operation_id="show_flavor", tags=["flavors"])
async def show_flavor(name: str, pool: PoolDep) -> FlavorView:
    """One flavor."""
    async with db.connection(pool) as connection:
        return _flavor_view(await store.get_flavor(connection, name))


@router.put(
    "/flavors/{name}",
    operation_id="replace_flavor",
    tags=["flavors"],
    dependencies=_changes,
)
async def replace_flavor(name: str, body: ChangedFlavor, pool: PoolDep) -> FlavorView:
    """Replace a flavor; claims keep what they took. 409 `capacity.flavor.changed` when too late."""
    async with db.transaction(pool) as connection:
        stored = await store.replace_flavor(
            connection, body.flavor(name), generation=body.generation
        )
    return _flavor_view(stored)


@router.delete(
    "/flavors/{name}",
    operation_id="delete_flavor",
    tags=["flavors"],
    status_code=204,
    dependencies=_changes,
)
async def delete_flavor(name: str, pool: PoolDep) -> Response:
    """Delete a flavor; claims made with it stay."""
    async with db.transaction(pool) as connection:
        await store.delete_flavor(connection, name)
    return Response(status_code=204)


# --- fit


class BindingView(BaseModel):
    """The class that allows no more: one more would need `short_by` beyond what is free."""

    resource: str
    free: int
    need: int
    short_by: int


class HostFit(BaseModel):
    """How many more fit on one node, what one takes there, and why not one more."""

    host: str
    hypervisor_hostname: str
    state: fit.NodeState
    fits: int
    need: dict[str, int]
    overhead_mb: int
    overhead_model: str
    overhead_model_version: int
    binding: BindingView | None
    blocker: fit.Blocker | None


class FitAnswer(BaseModel):
    """How many more of a flavor fit, over all nodes and on each, as of one moment."""

    flavor: FlavorView
    as_of: datetime
    total: int
    nodes: int
    hosts: list[HostFit]
    next_marker: str | None


@router.get("/fit", operation_id="fit", tags=["fit"])
async def show_fit(
    flavor: Annotated[str, Query(description="A flavor's name.")],
    pool: PoolDep,
    view: ViewDep,
    max_age_seconds: MaxAge = None,
    limit: Limit = 100,
    marker: Annotated[int, Query(ge=0)] = 0,
) -> FitAnswer:
    """How many more of a flavor fit where. `total` is over all nodes, whatever the page shows."""
    async with db.connection(pool) as connection:
        stored = await store.get_flavor(connection, flavor)
    await view.require(max_age_seconds)
    found = view.fleet.fit(stored.flavor, view.now())
    fleet = found.fleet
    rest = [at for at, node in enumerate(fleet.nodes) if node.id > marker]
    page = rest[:limit]
    return FitAnswer(
        flavor=_flavor_view(stored),
        as_of=_time(fleet.as_of),
        total=found.total,
        nodes=len(fleet.nodes),
        hosts=[_host_fit(found.at(at)) for at in page],
        next_marker=str(fleet.nodes[page[-1]].id) if len(rest) > limit else None,
    )


def _host_fit(found: fit.NodeFit) -> HostFit:
    return HostFit(
        host=found.node.host,
        hypervisor_hostname=found.node.hypervisor_hostname,
        state=found.state,
        fits=found.count,
        need={str(name): amount for name, amount in found.need.vector.items()},
        overhead_mb=found.need.overhead_mb,
        overhead_model=found.need.model_id,
        overhead_model_version=found.need.model_version,
        binding=None
        if found.binding is None
        else BindingView(
            resource=found.binding.resource,
            free=found.binding.free,
            need=found.binding.need,
            short_by=found.binding.short_by,
        ),
        blocker=found.blocker,
    )


# --- overhead models


class Models(BaseModel):
    """Every overhead model there is."""

    overhead_models: list[ModelView]


@router.get("/overhead-models", operation_id="list_overhead_models", tags=["overhead models"])
async def list_overhead_models(catalogue: CatalogueDep) -> Models:
    """The models, which hypervisors they price, and how they stand against what was measured."""
    return Models(
        overhead_models=[model_view(catalogue, model) for model in catalogue.models.values()]
    )
