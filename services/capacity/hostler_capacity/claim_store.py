"""Claims in SQL: every step of a claim's life, each guarded by the statement that takes it.

A grant locks its node's row, and only that row; then one statement takes the counters, writes the
claim and stamps the node, all or nothing. Because the statement begins after the lock is held, it
sees every counter as it is; because the guard is in its WHERE, a caller's arithmetic cannot be
wrong about it; and behind it stands the CHECK of the table.

Invariant: `inventory.claimed` equals the sum of `claim.resources` over the live claims of the node,
after every statement of this module, and a claim gives back exactly what it took.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

import asyncpg

from hostler_capacity.claim import Claim, ClaimId, NodeId, State
from hostler_capacity.fit import Counter, NodeState
from hostler_capacity.flavor import Need
from hostler_capacity.resources import ResourceClass
from hostler_common import db


def claim_of(row: asyncpg.Record) -> Claim:
    """Return the claim of a row of all claim columns and its node's address and UUID."""
    return Claim(
        id=ClaimId(row["id"]),
        state=State(row["state"]),
        node_id=NodeId(row["node_id"]),
        host=row["host"],
        hypervisor_hostname=row["hypervisor_hostname"],
        node_uuid=row["node_uuid"],
        consumer_id=row["consumer_id"],
        project_id=row["project_id"],
        flavor=row["flavor"],
        resources={ResourceClass(name): amount for name, amount in row["resources"].items()},
        overhead_mb=row["overhead_mb"],
        overhead_model=row["overhead_model"],
        overhead_model_version=row["overhead_model_version"],
        created_at=row["created_at"],
        expires_at=row["expires_at"],
        confirmed_at=row["confirmed_at"],
        ended_at=row["ended_at"],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LockedNode:
    """A node whose counters nobody else can change until the transaction ends."""

    id: NodeId
    host: str
    hypervisor_hostname: str
    hypervisor_type: str
    bare_metal: bool
    state: NodeState
    counters: Mapping[ResourceClass, Counter]


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a claim is for; the need is found per node."""

    claim_id: ClaimId
    consumer_id: UUID
    project_id: str
    flavor: str | None
    ttl: timedelta


_LOCK_WAITING = """
    SELECT id, host, hypervisor_hostname, hypervisor_type, bare_metal, disabled, available,
           received_at >= now() - $2::interval AS fresh
    FROM node WHERE id = $1 AND absent_since IS NULL FOR UPDATE
"""
_LOCK_AT_ONCE = _LOCK_WAITING + " SKIP LOCKED"


async def lock_node(
    connection: db.Connection, node_id: NodeId, *, stale: timedelta, wait: bool
) -> LockedNode | None:
    """Lock a node for the rest of the transaction (or savepoint) and read its counters.

    None if it is gone, or if it is locked by another transaction and `wait` is false.
    """
    row = await connection.fetchrow(_LOCK_WAITING if wait else _LOCK_AT_ONCE, node_id, stale)
    if row is None:
        return None
    state = NodeState.UP
    if row["disabled"]:
        state = NodeState.DISABLED
    elif not row["available"]:
        state = NodeState.UNAVAILABLE
    elif not row["fresh"]:
        state = NodeState.STALE
    counters = {
        ResourceClass(each["resource_class"]): Counter(
            limit=each["capacity"], claimed=each["claimed"], foreign=each["foreign_used"]
        )
        for each in await connection.fetch(
            "SELECT resource_class, capacity, claimed, foreign_used FROM inventory"
            " WHERE node_id = $1",
            node_id,
        )
    }
    return LockedNode(
        id=NodeId(row["id"]),
        host=row["host"],
        hypervisor_hostname=row["hypervisor_hostname"],
        hypervisor_type=row["hypervisor_type"],
        bare_metal=row["bare_metal"],
        state=state,
        counters=counters,
    )


async def take(connection: db.Connection, node_id: NodeId, need: Need, order: Order) -> bool:
    """Take `need` from a locked node and write the claim; False, and no change, without room."""
    taken = await connection.fetchval(
        """
        WITH need AS (
            SELECT * FROM unnest($2::text[], $3::bigint[]) AS need (resource_class, amount)
        ), taken AS (
            UPDATE inventory AS i SET claimed = i.claimed + need.amount
            FROM need
            WHERE i.node_id = $1 AND i.resource_class = need.resource_class
              AND i.claimed + i.foreign_used + need.amount <= i.capacity
              AND NOT EXISTS (
                  SELECT FROM need AS other
                  LEFT JOIN inventory AS j
                    ON j.node_id = $1 AND j.resource_class = other.resource_class
                  WHERE j.node_id IS NULL
                     OR j.claimed + j.foreign_used + other.amount > j.capacity)
            RETURNING i.resource_class
        ), stamped AS (
            UPDATE node SET changed_in = pg_current_xact_id()
            WHERE id = $1 AND EXISTS (SELECT FROM taken)
        )
        INSERT INTO claim (id, node_id, state, consumer_id, project_id, flavor, resources,
                           overhead_mb, overhead_model, overhead_model_version,
                           created_at, expires_at)
        SELECT $4, $1, 'held', $5, $6, $7, $8, $9, $10, $11, now(), now() + $12::interval
        WHERE (SELECT count(*) FROM taken) = cardinality($2::text[])
        RETURNING id
        """,
        node_id,
        list(need.vector),
        list(need.vector.values()),
        order.claim_id,
        order.consumer_id,
        order.project_id,
        order.flavor,
        dict(need.vector),
        need.overhead_mb,
        need.model_id,
        need.model_version,
        order.ttl,
    )
    return taken is not None


async def get(connection: db.Connection, claim_id: ClaimId) -> Claim | None:
    """Return the claim, or None where there is none of that id."""
    row = await connection.fetchrow(
        "SELECT c.*, n.host, n.hypervisor_hostname, n.node_uuid"
        " FROM claim c JOIN node n ON n.id = c.node_id"
        " WHERE c.id = $1",
        claim_id,
    )
    return claim_of(row) if row else None


async def listed(
    connection: db.Connection,
    *,
    states: Sequence[State] | None,
    host: str | None,
    consumer_id: UUID | None,
    projects: frozenset[str] | None,
    after: ClaimId | None,
    limit: int,
) -> list[Claim]:
    """Return claims, oldest first; `projects` None sees all of them."""
    rows = await connection.fetch(
        "SELECT c.*, n.host, n.hypervisor_hostname, n.node_uuid"
        " FROM claim c JOIN node n ON n.id = c.node_id"
        " WHERE ($1::text[] IS NULL OR c.state = ANY($1)) AND ($2::text IS NULL OR n.host = $2)"
        " AND ($3::uuid IS NULL OR c.consumer_id = $3)"
        " AND ($4::text[] IS NULL OR c.project_id = ANY($4))"
        " AND ($5::uuid IS NULL OR c.number > (SELECT number FROM claim WHERE id = $5))"
        " ORDER BY c.number LIMIT $6",
        list(states) if states is not None else None,
        host,
        consumer_id,
        sorted(projects) if projects is not None else None,
        after,
        limit,
    )
    return [claim_of(row) for row in rows]


async def confirm(connection: db.Connection, claim_id: ClaimId) -> Claim | None:
    """A held claim that has time left is confirmed; None where it is in any other state."""
    row = await connection.fetchrow(
        "UPDATE claim c SET state = 'confirmed', confirmed_at = now() FROM node n"
        " WHERE c.id = $1 AND n.id = c.node_id AND c.state = 'held' AND c.expires_at > now()"
        " RETURNING c.*, n.host, n.hypervisor_hostname, n.node_uuid",
        claim_id,
    )
    return claim_of(row) if row else None


async def release(connection: db.Connection, known: Claim) -> Claim | None:
    """A live claim is released and its room is free; None where it had ended already."""
    await connection.execute("SELECT FROM node WHERE id = $1 FOR UPDATE", known.node_id)
    row = await connection.fetchrow(
        "UPDATE claim c SET state = 'released', ended_at = now() FROM node n"
        " WHERE c.id = $1 AND n.id = c.node_id AND c.state IN ('held', 'confirmed')"
        " RETURNING c.*, n.host, n.hypervisor_hostname, n.node_uuid",
        known.id,
    )
    if row is None:
        return None
    ended = claim_of(row)
    await _give_back(connection, known.node_id, ended.resources)
    return ended


async def due_nodes(connection: db.Connection, *, limit: int) -> list[NodeId]:
    """Return nodes that have claims past their time."""
    rows = await connection.fetch(
        "SELECT DISTINCT node_id FROM claim WHERE state = 'held' AND expires_at <= now()"
        " ORDER BY node_id LIMIT $1",
        limit,
    )
    return [NodeId(row["node_id"]) for row in rows]


async def expire(connection: db.Connection, node_id: NodeId) -> list[Claim]:
    """End the node's claims that are past their time; none if another process has the node."""
    locked = await connection.fetchrow(
        "SELECT id FROM node WHERE id = $1 FOR UPDATE SKIP LOCKED", node_id
    )
    if locked is None:
        return []
    rows = await connection.fetch(
        "UPDATE claim c SET state = 'expired', ended_at = now() FROM node n"
        " WHERE c.node_id = $1 AND n.id = c.node_id AND c.state = 'held'"
        " AND c.expires_at <= now() RETURNING c.*, n.host, n.hypervisor_hostname, n.node_uuid",
        node_id,
    )
    ended = [claim_of(row) for row in rows]
    total: dict[ResourceClass, int] = {}
    for each in ended:
        for name, amount in each.resources.items():
            total[name] = total.get(name, 0) + amount
    if total:
        await _give_back(connection, node_id, total)
    return ended


async def _give_back(
    connection: db.Connection, node_id: NodeId, vector: Mapping[ResourceClass, int]
) -> None:
    """Subtract exactly `vector`. Bare metal that is reported as in use stays full."""
    await connection.execute(
        """
        WITH stamped AS (
            UPDATE node SET changed_in = pg_current_xact_id() WHERE id = $1
            RETURNING bare_metal AND reported_taken AS still_taken
        )
        UPDATE inventory AS i
        SET claimed = i.claimed - coalesce(back.amount, 0),
            foreign_used = CASE WHEN stamped.still_taken THEN i.capacity ELSE i.foreign_used END
        FROM stamped, inventory AS every
        LEFT JOIN unnest($2::text[], $3::bigint[]) AS back (resource_class, amount)
          ON back.resource_class = every.resource_class
        WHERE i.node_id = $1 AND every.node_id = $1 AND every.resource_class = i.resource_class
          AND (back.amount IS NOT NULL OR stamped.still_taken)
        """,
        node_id,
        list(vector),
        list(vector.values()),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Imbalance:
    """A counter that is not the sum of its claims, or is over its limit. There must be none."""

    host: str
    hypervisor_hostname: str
    resource: ResourceClass
    claimed: int
    sum_of_claims: int
    ceiling: int


async def imbalances(connection: db.Connection) -> list[Imbalance]:
    """Return every breach of this module's invariant, in one consistent look at the database."""
    rows = await connection.fetch(
        """
        WITH sums AS (
            SELECT c.node_id, each.key AS resource_class, sum(each.value::bigint) AS amount
            FROM claim c, jsonb_each_text(c.resources) AS each
            WHERE c.state IN ('held', 'confirmed') GROUP BY 1, 2
        )
        SELECT n.host, n.hypervisor_hostname, i.resource_class, i.claimed, i.claim_ceiling,
               coalesce(s.amount, 0)::bigint AS amount
        FROM inventory i JOIN node n ON n.id = i.node_id
        LEFT JOIN sums s ON s.node_id = i.node_id AND s.resource_class = i.resource_class
        WHERE i.claimed <> coalesce(s.amount, 0) OR i.claimed > i.claim_ceiling
        """
    )
    return [
        Imbalance(
            host=row["host"],
            hypervisor_hostname=row["hypervisor_hostname"],
            resource=ResourceClass(row["resource_class"]),
            claimed=row["claimed"],
            sum_of_claims=row["amount"],
            ceiling=row["claim_ceiling"],
        )
        for row in rows
    ]
