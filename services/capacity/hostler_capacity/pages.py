"""The page: what is free where, which claims are live, and what the overhead models are worth."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from hostler_capacity import claim_store, fit, resources, shapes, store
from hostler_capacity import overhead as overheads
from hostler_capacity.claim import LIVE
from hostler_capacity.fleet import FleetView
from hostler_capacity.shapes import PoolDep
from hostler_common import auth, db, http, pages
from hostler_common.auth import Caller

SHOWN_HOSTS = 500
SHOWN_CLAIMS = 50

router = APIRouter(include_in_schema=False)
_pages = pages.Pages("hostler_capacity")

ViewDep = Annotated[FleetView, http.state("view")]
CatalogueDep = Annotated[overheads.Catalogue, http.state("catalogue")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A host's memory as parts of 1000, for drawing; `over` where more is used than allowed."""

    node: fit.Node
    state: fit.NodeState
    memory: fit.Counter
    foreign: int
    claimed: int
    over: bool


def _bar(node: fit.Node, state: fit.NodeState) -> Bar:
    memory = node.counters[resources.MEMORY_MB]
    whole = max(memory.limit, memory.claimed + memory.foreign, 1)
    return Bar(
        node=node,
        state=state,
        memory=memory,
        foreign=1000 * memory.foreign // whole,
        claimed=1000 * memory.claimed // whole,
        over=memory.free < 0,
    )


@router.get("/", dependencies=[auth.require(auth.Role.READER)])
async def overview(
    request: Request, caller: Caller, pool: PoolDep, view: ViewDep, catalogue: CatalogueDep
) -> HTMLResponse:
    """Hosts, flavors, claims and models at a glance."""
    await view.require(0)  # claims and counters on one page should agree
    fleet, now = view.fleet, view.now()
    async with db.connection(pool) as connection:
        sold = [each.flavor for each in await store.flavors(connection, limit=50)]
        live = await claim_store.listed(
            connection,
            states=sorted(LIVE),
            host=None,
            consumer_id=None,
            projects=caller.projects,
            after=None,
            limit=SHOWN_CLAIMS,
        )
    return _pages.render(
        request,
        "overview.html",
        bars=[
            _bar(node, node.state(now, fleet.stale_seconds)) for node in fleet.nodes[:SHOWN_HOSTS]
        ],
        nodes=len(fleet.nodes),
        sold=[(flavor, fleet.fit(flavor, now).total) for flavor in sold],
        claims=live,
        models=[shapes.model_view(catalogue, model) for model in catalogue.models.values()],
    )
