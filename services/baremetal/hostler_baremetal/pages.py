"""The page: every node, what is known of it, who has it, and what was done lately."""

from typing import Annotated

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from hostler_baremetal import operation_store, store
from hostler_common import auth, db, http
from hostler_common.auth import Role
from hostler_common.pages import Pages

router = APIRouter(
    include_in_schema=False, dependencies=[auth.require(Role.READER, every_project=True)]
)
_pages = Pages("hostler_baremetal")

PoolDep = Annotated[db.Pool, http.state("pool")]
NODES_SHOWN = 5000


@router.get("/")
async def overview(request: Request, pool: PoolDep) -> HTMLResponse:
    """All nodes."""
    async with db.connection(pool) as connection:
        nodes = await store.list_nodes(connection, limit=NODES_SHOWN)
        counts = await store.count(connection)
        operations = await operation_store.list_operations(connection, limit=20)
    return _pages.render(
        request,
        "overview.html",
        nodes=nodes,
        counts=counts,
        operations=operations,
        names={node.id: node.name for node in nodes},
        total=sum(counts.by_power.values()),
    )
