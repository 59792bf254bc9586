"""The HTTP API: nodes, their power and boot device, and the operations on them.

Every change is one transaction with its events; long work is an operation that the caller follows.
"""

import asyncio
import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from hostler_baremetal import errors, leases, messages, operation_store, store
from hostler_baremetal.credentials import Vault
from hostler_baremetal.executor import Executor, timeout_of
from hostler_baremetal.idempotent import once
from hostler_baremetal.node import Access, Hardware, Node, NodeId, OperationKind
from hostler_baremetal.power import PowerState
from hostler_baremetal.resources import (
    BootDeviceRequest,
    BootDeviceResource,
    NodeCreate,
    NodePage,
    NodeResource,
    NodeUpdate,
    OperationPage,
    OperationResource,
    PowerRequest,
    PowerResource,
)
from hostler_baremetal.settings import Settings
from hostler_common import auth, bus, db, http, idempotency, outbox
from hostler_common.auth import Role

router = APIRouter(
    prefix="/v1", dependencies=[auth.require(Role.READER, every_project=True)], tags=["nodes"]
)
changes = [auth.require(Role.OPERATOR)]

PoolDep = Annotated[db.Pool, http.state("pool")]
VaultDep = Annotated[Vault, http.state("vault")]
ExecutorDep = Annotated[Executor, http.state("executor")]
SettingsDep = Annotated[Settings, http.state("settings")]
Limit = Annotated[int, Query(ge=1, le=1000)]

_FRESH_SECONDS = 15.0
_LONGEST_SECONDS = 366 * 86400


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
    return await once(pool, key, caller, body.model_dump(mode="json"), 201, work)


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
        await leases.end_expired(connection, node_id=node.id)  # a lease goes with its node
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
        Query(
            ge=0,
            le=_LONGEST_SECONDS,
            description="look again if what is known is older, and wait for it",
        ),
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
    reply = await once(pool, key, caller, request, 202, work)
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
