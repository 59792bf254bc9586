"""The HTTP API: nodes, their power and boot device, leases, operations.

Every change is one transaction with its events; long work is an operation that the caller follows.
"""

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Response
from fastapi.responses import JSONResponse

from hostler_baremetal import errors, leases, messages, operation_store, store
from hostler_baremetal.access import whole_fleet
from hostler_baremetal.credentials import Vault
from hostler_baremetal.executor import Executor, timeout_of
from hostler_baremetal.node import Access, Hardware, Lease, Node, NodeId, OperationKind
from hostler_baremetal.power import PowerState
from hostler_baremetal.resources import (
    BootDeviceRequest,
    BootDeviceResource,
    LeaseRequest,
    LeaseResource,
    NodeCreate,
    NodePage,
    NodeResource,
    NodeUpdate,
    OperationPage,
    OperationResource,
    PowerRequest,
    PowerResource,
    Resource,
)
from hostler_baremetal.settings import Settings
from hostler_common import auth, bus, db, http, idempotency, outbox
from hostler_common import errors as common_errors
from hostler_common.auth import Role

router = APIRouter(
    prefix="/v1", dependencies=[auth.require(Role.READER), Depends(whole_fleet)], tags=["nodes"]
)
changes = [auth.require(Role.OPERATOR)]

PoolDep = Annotated[db.Pool, http.state("pool")]
VaultDep = Annotated[Vault, http.state("vault")]
ExecutorDep = Annotated[Executor, http.state("executor")]
SettingsDep = Annotated[Settings, http.state("settings")]
Limit = Annotated[int, Query(ge=1, le=1000)]

_FRESH_SECONDS = 15.0


async def _once(
    pool: db.Pool,
    key: str | None,
    caller: auth.Principal,
    request: object,
    status: int,
    work: Callable[[db.Connection], Awaitable[Resource]],
) -> JSONResponse:
    """Answers with what `work` gives; under a key that was used, with what it gave then."""
    async with db.transaction(pool) as connection:
        if key is not None:
            stored = await idempotency.begin(connection, key, caller=caller.name, request=request)
            if stored is not None:
                return JSONResponse(stored.body, stored.status)
        resource = await work(connection)
        body = resource.model_dump(mode="json")
        if key is not None:
            await idempotency.finish(connection, key, caller=caller.name, status=status, body=body)
    return JSONResponse(body, status)


# --- nodes


@router.get("/nodes", operation_id="list_nodes")
async def list_nodes(
    pool: PoolDep,
    limit: Limit = 100,
    marker: str | None = None,
    name: str | None = None,
    zone: str | None = None,
    power_state: PowerState | None = None,
    leased: bool | None = None,
) -> NodePage:
    """Nodes by name."""
    async with db.connection(pool) as connection:
        nodes = await store.list_nodes(
            connection,
            limit=limit,
            marker=marker,
            name=name,
            zone=zone,
            power_state=power_state,
            leased=leased,
        )
    return NodePage(
        nodes=[NodeResource.of(node) for node in nodes],
        next_marker=nodes[-1].name if len(nodes) == limit else None,
    )


@router.post(
    "/nodes",
    operation_id="create_node",
    status_code=201,
    response_model=NodeResource,
    dependencies=changes,
)
async def create_node(
    body: NodeCreate,
    pool: PoolDep,
    vault: VaultDep,
    caller: auth.Caller,
    key: idempotency.IdempotencyKey = None,
) -> Response:
    """Enrol a node. Its BMC is looked at as soon as possible."""
    node_id = NodeId(body.id or uuid.uuid4())

    async def work(connection: db.Connection) -> NodeResource:
        node = await store.create_node(connection, node_id, _new_node(node_id, body, vault))
        await outbox.add(connection, [_node_message(messages.NODE_ENROLLED, node)])
        return NodeResource.of(node)

    # the key's fingerprint leaves the secrets out: they are masked
    return await _once(pool, key, caller, body.model_dump(mode="json"), 201, work)


def _new_node(node_id: NodeId, body: NodeCreate, vault: Vault) -> store.NewNode:
    group_key = body.group_key
    return store.NewNode(
        name=body.name,
        hardware=Hardware(
            memory_mb=body.memory_mb,
            vcpus=body.vcpus,
            local_gb=body.local_gb,
            cpu_arch=body.cpu_arch,
            zone=body.zone,
            traits=tuple(body.traits),
            extra_specs=body.extra_specs,
        ),
        access=Access(
            address=body.address,
            username=body.username,
            sealed_password=vault.seal(
                body.password.get_secret_value(), belongs_to=f"{node_id}/password"
            ),
            sealed_group_key=None
            if group_key is None
            else vault.seal(group_key.get_secret_value(), belongs_to=f"{node_id}/group_key"),
            cipher_suites=tuple(body.cipher_suites),
        ),
        maintenance=body.maintenance,
        maintenance_reason=body.maintenance_reason,
    )


@router.get("/nodes/{node_id}", operation_id="show_node")
async def show_node(node_id: uuid.UUID, pool: PoolDep) -> NodeResource:
    """One node."""
    async with db.connection(pool) as connection:
        return NodeResource.of(await store.get_node(connection, node_id))


@router.patch("/nodes/{node_id}", operation_id="update_node", dependencies=changes)
async def update_node(
    node_id: uuid.UUID, body: NodeUpdate, pool: PoolDep, vault: VaultDep
) -> NodeResource:
    """Change a node. New access makes a BMC that refused us be asked again."""
    async with db.transaction(pool) as connection:
        node = await store.get_node(connection, node_id, for_update=True)
        if node.generation != body.generation:
            raise errors.StaleGeneration(
                f"{node.name} is at generation {node.generation}", generation=node.generation
            )
        new = _changed(node, body, vault)
        access_changed = bool(
            body.model_fields_set
            & {"address", "username", "password", "group_key", "cipher_suites"}
        )
        node = await store.update_node(connection, node, new, access_changed=access_changed)
        await outbox.add(connection, [_node_message(messages.NODE_UPDATED, node)])
    return NodeResource.of(node)


def _changed(node: Node, body: NodeUpdate, vault: Vault) -> store.NewNode:
    given = {name: getattr(body, name) for name in body.model_fields_set}
    hardware, access = node.hardware, node.access
    password, group_key = access.sealed_password, access.sealed_group_key
    if body.password is not None:
        password = vault.seal(body.password.get_secret_value(), belongs_to=f"{node.id}/password")
    if "group_key" in given:
        group_key = (
            None
            if body.group_key is None
            else vault.seal(body.group_key.get_secret_value(), belongs_to=f"{node.id}/group_key")
        )
    return store.NewNode(
        name=given.get("name", node.name),
        hardware=Hardware(
            memory_mb=given.get("memory_mb", hardware.memory_mb),
            vcpus=given.get("vcpus", hardware.vcpus),
            local_gb=given.get("local_gb", hardware.local_gb),
            cpu_arch=given.get("cpu_arch", hardware.cpu_arch),
            zone=given.get("zone", hardware.zone),
            traits=tuple(given.get("traits", hardware.traits)),
            extra_specs=given.get("extra_specs", hardware.extra_specs),
        ),
        access=Access(
            address=given.get("address", access.address),
            username=given.get("username", access.username),
            sealed_password=password,
            sealed_group_key=group_key,
            cipher_suites=tuple(given.get("cipher_suites", access.cipher_suites)),
        ),
        maintenance=given.get("maintenance", node.maintenance),
        maintenance_reason=given.get("maintenance_reason", node.maintenance_reason),
    )


@router.delete(
    "/nodes/{node_id}", operation_id="delete_node", status_code=204, dependencies=changes
)
async def delete_node(node_id: uuid.UUID, pool: PoolDep) -> None:
    """Take a node out of the registry. Its power stays as it is."""
    async with db.transaction(pool) as connection:
        node = await store.get_node(connection, node_id, for_update=True)
        await store.delete_node(connection, node)
        await outbox.add(connection, [_node_message(messages.NODE_REMOVED, node)])


def _node_message(event: bus.EventType[messages.NodeChanged], node: Node) -> bus.Message:
    body = messages.NodeChanged(node_uuid=node.id, name=node.name, generation=node.generation)
    return event.message(body, app_id=messages.APP_ID)


# --- power and boot device


@router.get("/nodes/{node_id}/power", operation_id="show_power")
async def show_power(
    node_id: uuid.UUID,
    pool: PoolDep,
    max_age_seconds: Annotated[
        float | None,
        Query(ge=0, description="look again if what is known is older, and wait for it"),
    ] = None,
) -> PowerResource:
    """What is known of a node's power, and since when."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _FRESH_SECONDS
    async with db.transaction(pool) as connection:
        node = await store.get_node(connection, node_id)
        looked_since = await operation_store.look_after(
            connection, node_id, max_age_seconds=max_age_seconds
        )
    while looked_since is not None and loop.time() < deadline:
        await asyncio.sleep(0.1)
        async with db.connection(pool) as connection:
            node = await store.get_node(connection, node_id)
        if node.looked_at is not None and node.looked_at >= looked_since:
            break
    async with db.connection(pool) as connection:
        under_way = await operation_store.under_way(connection, node_id)
    return PowerResource(
        power_state=node.power_state,
        observed_at=node.power_observed_at,
        last_power_state=node.last_power_state,
        error=node.poll_error,
        operation_id=under_way.id if under_way else None,
    )


@router.post(
    "/nodes/{node_id}/power",
    operation_id="change_power",
    status_code=202,
    response_model=OperationResource,
    dependencies=changes,
)
async def change_power(
    node_id: uuid.UUID,
    body: PowerRequest,
    pool: PoolDep,
    settings: SettingsDep,
    executor: ExecutorDep,
    caller: auth.Caller,
    key: idempotency.IdempotencyKey = None,
) -> Response:
    """Switch a node. The same asked for again while it is under way is the operation under way."""
    args = messages.PowerArgs(action=body.action)
    return await _operate(
        pool, settings, executor, caller, key, node_id, "power", args, body.fencing_token
    )


@router.get("/nodes/{node_id}/boot-device", operation_id="show_boot_device")
async def show_boot_device(node_id: uuid.UUID, pool: PoolDep) -> BootDeviceResource:
    """What the node was last told to boot from."""
    async with db.connection(pool) as connection:
        await store.get_node(connection, node_id)
        last = await operation_store.last_succeeded(connection, node_id, "boot_device")
    if last is None:
        return BootDeviceResource(
            device=None, persistent=False, mode="legacy", operation_id=None, set_at=None
        )
    args = messages.BootDeviceArgs.model_validate(last.args)
    return BootDeviceResource(
        device=args.device,
        persistent=args.persistent,
        mode=args.mode,
        operation_id=last.id,
        set_at=last.finished_at,
    )


@router.post(
    "/nodes/{node_id}/boot-device",
    operation_id="change_boot_device",
    status_code=202,
    response_model=OperationResource,
    dependencies=changes,
)
async def change_boot_device(
    node_id: uuid.UUID,
    body: BootDeviceRequest,
    pool: PoolDep,
    settings: SettingsDep,
    executor: ExecutorDep,
    caller: auth.Caller,
    key: idempotency.IdempotencyKey = None,
) -> Response:
    """Choose what a node boots from, the next time or from now on."""
    args = messages.BootDeviceArgs(device=body.device, persistent=body.persistent, mode=body.mode)
    return await _operate(
        pool, settings, executor, caller, key, node_id, "boot_device", args, body.fencing_token
    )


async def _operate(
    pool: db.Pool,
    settings: Settings,
    executor: Executor,
    caller: auth.Principal,
    key: str | None,
    node_id: uuid.UUID,
    kind: OperationKind,
    args: messages.PowerArgs | messages.BootDeviceArgs,
    fencing_token: int | None,
) -> Response:
    plain: dict[str, Any] = args.model_dump(mode="json")

    async def work(connection: db.Connection) -> OperationResource:
        node = await store.get_node(connection, node_id, for_update=True)
        operation = await operation_store.create(
            connection,
            node,
            operation_id=uuid.uuid4(),
            kind=kind,
            args=plain,
            fencing_token=fencing_token,
            requested_by=caller.name,
            timeout_seconds=timeout_of(args, settings),
        )
        return OperationResource.of(operation)

    request = {"node": str(node_id), "kind": kind, "args": plain, "token": fencing_token}
    reply = await _once(pool, key, caller, request, 202, work)
    executor.wake()
    return reply


# --- operations


@router.get("/operations", operation_id="list_operations")
async def list_operations(
    pool: PoolDep,
    limit: Limit = 100,
    marker: uuid.UUID | None = None,
    node_id: uuid.UUID | None = None,
) -> OperationPage:
    """Operations, the newest first."""
    async with db.connection(pool) as connection:
        found = await operation_store.list_operations(
            connection, node_id=node_id, limit=limit, marker=marker
        )
    return OperationPage(
        operations=[OperationResource.of(operation) for operation in found],
        next_marker=str(found[-1].id) if len(found) == limit else None,
    )


@router.get("/operations/{operation_id}", operation_id="show_operation")
async def show_operation(operation_id: uuid.UUID, pool: PoolDep) -> OperationResource:
    """One operation."""
    async with db.connection(pool) as connection:
        return OperationResource.of(await operation_store.get(connection, operation_id))


# --- leases


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
    return await _once(pool, key, caller, request, 200, work)


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
        await store.end_lease(connection, node)
        event = messages.LEASE_RELEASED
        told = leases.message(event, node_id=node.id, name=node.name, lease=lease)
        await outbox.add(connection, [told])


def _lease_of(node: Node) -> Lease:
    if node.lease is None:
        raise errors.LeaseNotFound(f"{node.name} is not leased")
    return node.lease
