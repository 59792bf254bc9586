"""The HTTP API of leases: who has a node, until when, and under which fencing token."""

import uuid
from typing import Annotated

from fastapi import APIRouter, Query, Response

from hostler_baremetal import errors, leases, messages, store
from hostler_baremetal.idempotent import once
from hostler_baremetal.node import Lease, Node
from hostler_baremetal.resources import LeaseRequest, LeaseResource
from hostler_common import auth, db, http, idempotency, outbox
from hostler_common import errors as common_errors
from hostler_common.auth import Role

router = APIRouter(
    prefix="/v1", dependencies=[auth.require(Role.READER, every_project=True)], tags=["leases"]
)
changes = [auth.require(Role.OPERATOR)]

PoolDep = Annotated[db.Pool, http.state("pool")]


@router.get("/nodes/{node_id}/lease", operation_id="show_lease")
async def show_lease(node_id: uuid.UUID, pool: PoolDep) -> LeaseResource:
    """Who has the node."""
    async with db.connection(pool) as connection:
        node = await store.get_node(connection, node_id)
    return LeaseResource.of(_lease_of(node))


@router.post(
    "/nodes/{node_id}/lease",
    operation_id="take_lease",
    status_code=200,
    response_model=LeaseResource,
    dependencies=changes,
)
async def take_lease(
    node_id: uuid.UUID,
    body: LeaseRequest,
    pool: PoolDep,
    caller: auth.Caller,
    key: idempotency.IdempotencyKey = None,
) -> Response:
    """Take a node that nobody has, or renew one's own lease, under the same fencing token.

    From then on every action on the node has to show the token, and capacity sees it as full. A
    renewal that shows its token fails once the lease is over, instead of taking another one.
    """

    async def work(connection: db.Connection) -> LeaseResource:
        node = await store.get_node(connection, node_id, for_update=True)
        held, token = node.lease, body.fencing_token
        if held is not None and held.owner != body.owner:
            raise errors.NodeLeased(
                f"{node.name} is leased by {held.owner} until {held.expires_at.isoformat()}"
            )
        if token is not None and (held is None or held.fencing_token != token):
            raise errors.Fenced(f"the lease with token {token} of {node.name} is over")
        if held is not None:
            lease = await store.renew_lease(connection, node, ttl_seconds=body.ttl_seconds)
            return LeaseResource.of(lease)
        if node.maintenance:
            raise errors.NodeLeased(f"{node.name} is in maintenance: {node.maintenance_reason}")
        await leases.end_expired(connection, node_id=node.id)
        lease = await store.take_lease(
            connection,
            node,
            owner=body.owner,
            purpose=body.purpose,
            ttl_seconds=body.ttl_seconds,
        )
        event = messages.LEASE_TAKEN
        told = leases.message(event, node_id=node.id, name=node.name, lease=lease)
        await outbox.add(connection, [told])
        return LeaseResource.of(lease)

    request = {"node": str(node_id), **body.model_dump(mode="json")}
    return await once(pool, key, caller, request, 200, work)


@router.delete(
    "/nodes/{node_id}/lease", operation_id="end_lease", status_code=204, dependencies=changes
)
async def end_lease(
    node_id: uuid.UUID,
    pool: PoolDep,
    caller: auth.Caller,
    fencing_token: int | None = None,
    force: Annotated[
        bool, Query(description="break somebody's lease; for admins, without its token")
    ] = False,
) -> None:
    """Give a lease back by its token, or break it."""
    if force and not caller.has(Role.ADMIN):
        raise common_errors.Forbidden("breaking a lease needs the role admin")
    async with db.transaction(pool) as connection:
        node = await store.get_node(connection, node_id, for_update=True)
        lease = _lease_of(node)
        if not force and lease.fencing_token != fencing_token:
            raise errors.Fenced(f"token {fencing_token} is not the one of {node.name}'s lease")
        ended_at = await store.end_lease(connection, node)
        event = messages.LEASE_RELEASED
        told = leases.message(
            event, node_id=node.id, name=node.name, lease=lease, ended_at=ended_at
        )
        await outbox.add(connection, [told])


def _lease_of(node: Node) -> Lease:
    if node.lease is None:
        raise errors.LeaseNotFound(f"{node.name} is not leased")
    return node.lease
