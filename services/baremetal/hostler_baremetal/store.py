"""SQL of the registry: nodes, leases, and what capacity is told of them.

Invariants: every change of a node or of a lease raises the inventory's version in its own
transaction, so that the next report tells it; a lease that has run out counts as none from that
moment, whether or not it was swept up already. Work on BMCs is in `operation_store`.
"""

import dataclasses
import uuid
from collections.abc import Sequence
from datetime import datetime
from typing import Final

import asyncpg

from hostler_baremetal import errors
from hostler_baremetal.node import Access, FencingToken, Hardware, Lease, Node, NodeId
from hostler_baremetal.power import PowerState
from hostler_common import db

_NODES: Final = """
    SELECT node.*, lease.owner AS lease_owner, lease.purpose AS lease_purpose,
           lease.fencing_token AS lease_token, lease.taken_at AS lease_taken_at,
           lease.expires_at AS lease_expires_at
      FROM node LEFT JOIN lease ON lease.node_id = node.id AND lease.expires_at > now()
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NewNode:
    """What a node is enrolled or changed with."""

    name: str
    hardware: Hardware
    access: Access
    maintenance: bool = False
    maintenance_reason: str | None = None


def node_of(row: asyncpg.Record) -> Node:
    """Returns the node in a row of the query above."""
    lease = None
    if row["lease_owner"] is not None:
        lease = Lease(
            owner=row["lease_owner"],
            purpose=row["lease_purpose"],
            fencing_token=FencingToken(row["lease_token"]),
            taken_at=row["lease_taken_at"],
            expires_at=row["lease_expires_at"],
        )
    last = row["last_power_state"]
    return Node(
        id=NodeId(row["id"]),
        name=row["name"],
        generation=row["generation"],
        hardware=Hardware(
            memory_mb=row["memory_mb"],
            vcpus=row["vcpus"],
            local_gb=row["local_gb"],
            cpu_arch=row["cpu_arch"],
            zone=row["zone"],
            traits=tuple(row["traits"]),
            extra_specs=row["extra_specs"],
        ),
        access=Access(
            address=row["address"],
            username=row["username"],
            sealed_password=row["sealed_password"],
            sealed_group_key=row["sealed_group_key"],
            cipher_suites=tuple(row["cipher_suites"]),
        ),
        maintenance=row["maintenance"],
        maintenance_reason=row["maintenance_reason"],
        power_state=PowerState(row["power_state"]),
        last_power_state=PowerState(last) if last else None,
        power_observed_at=row["power_observed_at"],
        looked_at=row["looked_at"],
        poll_error=row["poll_error"],
        poll_failures=row["poll_failures"],
        latched_at=row["latched_at"],
        working_suite=row["working_suite"],
        lease=lease,
        created_at=row["created_at"],
        updated_at=row["updated_at"],
    )


async def get_node(
    connection: db.Connection, node_id: uuid.UUID, *, for_update: bool = False
) -> Node:
    """Returns a node; with `for_update`, nobody else changes it until the transaction ends.

    Raises NodeNotFound.
    """
    if for_update:
        # a statement of its own: one that had to wait for the lock still sees the leases of before
        await connection.execute("SELECT FROM node WHERE id = $1 FOR UPDATE", node_id)
    row = await connection.fetchrow(_NODES + " WHERE node.id = $1", node_id)
    if row is None:
        raise errors.NodeNotFound(f"there is no node {node_id}")
    return node_of(row)


async def list_nodes(
    connection: db.Connection,
    *,
    limit: int | None = None,
    marker: str | None = None,
    name: str | None = None,
    zone: str | None = None,
    power_state: PowerState | None = None,
    leased: bool | None = None,
) -> list[Node]:
    """Returns nodes by name, those after `marker`, that match every filter given."""
    rows = await connection.fetch(
        _NODES
        + """
        WHERE ($1::text IS NULL OR name > $1) AND ($2::text IS NULL OR zone = $2)
          AND ($3::text IS NULL OR power_state = $3)
          AND ($4::boolean IS NULL OR (lease.node_id IS NOT NULL) = $4)
          AND ($5::text IS NULL OR name = $5)
        ORDER BY name LIMIT $6
        """,
        marker,
        zone,
        power_state,
        leased,
        name,
        limit,
    )
    return [node_of(row) for row in rows]


async def create_node(connection: db.Connection, node_id: uuid.UUID, new: NewNode) -> Node:
    """Enrols a node, to be looked at as soon as possible. Raises NodeExists."""
    try:
        await connection.execute(
            """
            INSERT INTO node (id, name, address, username, sealed_password, sealed_group_key,
                              cipher_suites, memory_mb, vcpus, local_gb, cpu_arch, zone, traits,
                              extra_specs, maintenance, maintenance_reason)
            VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)
            """,
            node_id,
            *_told(new),
        )
    except asyncpg.UniqueViolationError as exc:
        raise _exists(exc) from exc
    await _inventory_changed(connection)
    return await get_node(connection, node_id)


def _told(new: NewNode) -> tuple[object, ...]:
    """What a node's owner says of it, in the order of the statements that write it."""
    hardware, access = new.hardware, new.access
    return (
        new.name,
        access.address,
        access.username,
        access.sealed_password,
        access.sealed_group_key,
        list(access.cipher_suites),
        hardware.memory_mb,
        hardware.vcpus,
        hardware.local_gb,
        hardware.cpu_arch,
        hardware.zone,
        list(hardware.traits),
        dict(hardware.extra_specs),
        new.maintenance,
        new.maintenance_reason,
    )


async def update_node(
    connection: db.Connection, node: Node, new: NewNode, *, access_changed: bool
) -> Node:
    """Writes a node that was read for update. Raises NodeExists.

    Changed access takes the latch off and has the BMC looked at as soon as possible.
    """
    try:
        await connection.execute(
            """
            UPDATE node SET name = $2, address = $3, username = $4, sealed_password = $5,
                   sealed_group_key = $6, cipher_suites = $7, memory_mb = $8, vcpus = $9,
                   local_gb = $10, cpu_arch = $11, zone = $12, traits = $13, extra_specs = $14,
                   maintenance = $15, maintenance_reason = $16,
                   generation = generation + 1, updated_at = now(),
                   latched_at = CASE WHEN $17 THEN NULL ELSE latched_at END,
                   working_suite = CASE WHEN $17 THEN NULL ELSE working_suite END,
                   poll_failures = CASE WHEN $17 THEN 0 ELSE poll_failures END,
                   poll_error = CASE WHEN $17 THEN NULL ELSE poll_error END,
                   next_poll_at = CASE WHEN $17 THEN now() ELSE next_poll_at END
             WHERE id = $1
            """,
            node.id,
            *_told(new),
            access_changed,
        )
    except asyncpg.UniqueViolationError as exc:
        raise _exists(exc) from exc
    await _inventory_changed(connection)
    return await get_node(connection, node.id)


async def delete_node(connection: db.Connection, node: Node) -> None:
    """Takes a node, read for update, out of the registry.

    Raises NodeLeased or NodeBusy: somebody has it, or something is under way on it.
    """
    if node.lease is not None:
        raise errors.NodeLeased(f"{node.name} is leased by {node.lease.owner}")
    if await _is_busy(connection, node.id):
        raise errors.NodeBusy(f"an operation is under way on {node.name}")
    await connection.execute("DELETE FROM node WHERE id = $1", node.id)
    await _inventory_changed(connection)


def _exists(exc: asyncpg.UniqueViolationError) -> errors.NodeExists:
    column = {"node_pkey": "id", "node_name_key": "name", "node_address_key": "address"}
    which = column.get(exc.constraint_name or "", "id")
    return errors.NodeExists(f"another node has this {which}", conflicts_on=which)


# --- leases


async def take_lease(
    connection: db.Connection, node: Node, *, owner: str, purpose: str, ttl_seconds: float
) -> Lease:
    """Gives a node, read for update and free, to an owner, under a token higher than any before.

    It is taken now, and not when the transaction began: that may be before the end of the lease it waited for.

    Raises NodeBusy: an operation of somebody else's is under way.
    """
    if await _is_busy(connection, node.id):
        raise errors.NodeBusy(f"an operation is under way on {node.name}: try again after it")
    row = await connection.fetchrow(
        """
        WITH moment AS MATERIALIZED (SELECT clock_timestamp() AS at)
        INSERT INTO lease (node_id, owner, purpose, fencing_token, taken_at, expires_at)
        SELECT $1, $2, $3, nextval('fencing_token'), at, at + make_interval(secs => $4) FROM moment
        ON CONFLICT (node_id) DO UPDATE
           SET owner = excluded.owner, purpose = excluded.purpose, taken_at = excluded.taken_at,
               fencing_token = excluded.fencing_token, expires_at = excluded.expires_at
        RETURNING *
        """,
        node.id,
        owner,
        purpose,
        ttl_seconds,
    )
    assert row is not None
    await _inventory_changed(connection)
    return _lease_of(row)


async def renew_lease(connection: db.Connection, node: Node, *, ttl_seconds: float) -> Lease:
    """Has the lease of a node read for update end so long from now; its token stays.

    Raises Fenced: it has run out since the node was read.
    """
    row = await connection.fetchrow(
        "UPDATE lease SET expires_at = clock_timestamp() + make_interval(secs => $2)"
        " WHERE node_id = $1 RETURNING *",
        node.id,
        ttl_seconds,
    )
    if row is None:
        raise errors.Fenced(f"the lease of {node.name} is over")
    return _lease_of(row)


async def end_lease(connection: db.Connection, node: Node) -> datetime:
    """Ends the lease of a node read for update, whoever has it, and returns when it was over.

    Raises LeaseNotFound: it has run out since the node was read, which is told of already.
    """
    ended_at: datetime | None = await connection.fetchval(
        "DELETE FROM lease WHERE node_id = $1 RETURNING least(clock_timestamp(), expires_at)",
        node.id,
    )
    if ended_at is None:
        raise errors.LeaseNotFound(f"{node.name} is not leased")
    await _inventory_changed(connection)
    return ended_at


async def sweep_leases(
    connection: db.Connection, *, node_id: uuid.UUID | None = None
) -> list[tuple[NodeId, str, Lease]]:
    """Removes the leases that have run out, of one node or of all, and returns them with its name.

    Those that another transaction is at work on are left to it; that of the one node is waited for.
    """
    if node_id is not None:
        # were it left to a transaction that fails then, whoever takes the node would overwrite it, and its end be lost
        await connection.execute("SELECT FROM lease WHERE node_id = $1 FOR UPDATE", node_id)
    rows = await connection.fetch(
        """
        DELETE FROM lease USING node
         WHERE node.id = lease.node_id AND lease.node_id IN (
               SELECT node_id FROM lease
                WHERE expires_at <= now() AND ($1::uuid IS NULL OR node_id = $1)
                  FOR UPDATE SKIP LOCKED)
        RETURNING lease.*, node.name
        """,
        node_id,
    )
    if rows:
        await _inventory_changed(connection)
    return [(NodeId(row["node_id"]), row["name"], _lease_of(row)) for row in rows]


def _lease_of(row: asyncpg.Record) -> Lease:
    return Lease(
        owner=row["owner"],
        purpose=row["purpose"],
        fencing_token=FencingToken(row["fencing_token"]),
        taken_at=row["taken_at"],
        expires_at=row["expires_at"],
    )


async def _is_busy(connection: db.Connection, node_id: uuid.UUID) -> bool:
    return bool(
        await connection.fetchval(
            "SELECT EXISTS (SELECT FROM operation WHERE node_id = $1 AND finished_at IS NULL)",
            node_id,
        )
    )


# --- the inventory


async def _inventory_changed(connection: db.Connection) -> None:
    await connection.execute("UPDATE inventory SET version = version + 1")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """All nodes at one moment."""

    version: int
    taken_at: datetime
    nodes: Sequence[Node]


async def inventory_due(connection: db.Connection, *, every_seconds: float) -> Inventory | None:
    """Returns the inventory if it changed since the last report, or that is `every_seconds` old.

    The nodes are those of the version: the connection's transaction must be REPEATABLE READ.
    """
    row = await connection.fetchrow(
        """
        SELECT version, now() AS taken_at FROM inventory
         WHERE version > reported OR reported_at IS NULL
            OR reported_at <= now() - make_interval(secs => $1)
        """,
        every_seconds,
    )
    if row is None:
        return None
    nodes = await list_nodes(connection)
    return Inventory(version=row["version"], taken_at=row["taken_at"], nodes=nodes)


async def inventory_reported(connection: db.Connection, inventory: Inventory) -> None:
    """Notes that a report of this inventory was confirmed by the broker."""
    await connection.execute(
        "UPDATE inventory SET reported = greatest(reported, $1), reported_at = $2",
        inventory.version,
        inventory.taken_at,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """The fleet in numbers."""

    by_power: dict[PowerState, int]
    leased: int
    latched: int
    unfinished: int


async def count(connection: db.Connection) -> Counts:
    """Returns the fleet in numbers."""
    rows = await connection.fetch("SELECT power_state, count(*) FROM node GROUP BY 1")
    found = {row["power_state"]: row["count"] for row in rows}
    row = await connection.fetchrow(
        """
        SELECT (SELECT count(*) FROM lease WHERE expires_at > now()) AS leased,
               (SELECT count(*) FROM node WHERE latched_at IS NOT NULL) AS latched,
               (SELECT count(*) FROM operation WHERE finished_at IS NULL) AS unfinished
        """
    )
    assert row is not None
    return Counts(
        by_power={state: found.get(state, 0) for state in PowerState},
        leased=row["leased"],
        latched=row["latched"],
        unfinished=row["unfinished"],
    )
