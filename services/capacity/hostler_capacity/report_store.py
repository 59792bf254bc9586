"""Reports into rows: nodes found by identity, their counters renewed, their guests' claims confirmed.

Everything here runs in one transaction a part. It locks the host's row first, so the parts of a host
are applied one after the other, then the nodes in order of id. Claims wait for no second node, so
the two cannot wait for each other.

Invariant: after a part is applied, `claimed + foreign_used` of each of its nodes is at least what
was reported as used, and nothing a claim holds has changed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

import asyncpg

from hostler_capacity import inventory, overhead, report
from hostler_capacity.claim import Claim, NodeId
from hostler_capacity.claim_store import claim_of
from hostler_capacity.inventory import LiveClaim, Ratios, ReportedNode
from hostler_capacity.report import Admission, Part
from hostler_capacity.resources import ResourceClass
from hostler_common import db

# any number that no other lock of this schema uses
IDENTITY_LOCK = 0x686F_7374

MOST_FOREIGN: Final = 2**62
"""More than any node has, and still a bigint with the claims added, whatever guests a host makes up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """What a part did. `confirmed` are the held claims whose guest the report lists."""

    admission: Admission
    nodes: int = 0
    outdated_nodes: int = 0
    moved: int = 0
    absent: int = 0
    confirmed: Sequence[Claim] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How reports become limits, and when silence becomes staleness."""

    catalogue: overhead.Catalogue
    ratios: Ratios
    stale: timedelta


async def record(connection: db.Connection, part: Part, policy: Policy) -> Recorded:
    """Apply a part of a report, if it counts; run it in a transaction of its own.

    Applying the same part again, or an older report, changes nothing.
    """
    now = await connection.fetchval("SELECT now()")
    if any(node.node_uuid for node in part.nodes):
        # two proxies that report the same machine would otherwise insert it side by side
        await connection.execute("SELECT pg_advisory_xact_lock($1)", IDENTITY_LOCK)
    admission, latest = await _admit(connection, part, now, policy.stale)
    if not admission.counts:
        return Recorded(admission=admission)
    known = await _lock_known(connection, part)
    placed: list[tuple[NodeId, ReportedNode]] = []
    outdated = moved = 0
    # a row is one node's only, and those that say who they are choose first
    for node in sorted(part.nodes, key=_choosing):
        row = _find(node, part.host, known)
        if row is not None and not report.is_newer(
            part.reported_at, row["reported_at"], row["received_at"], now=now, stale=policy.stale
        ):
            outdated += 1
            continue
        known = [other for other in known if other is not row]
        moved += row is not None and row["host"] != part.host
        placed.append((await _place(connection, node, part, row, known), node))
    confirmed = await _count(connection, placed, part, policy)
    absent = 0
    if latest is None or latest.completed_by(part):
        absent = await _mark_absent(connection, part)
    return Recorded(
        admission=admission,
        nodes=len(placed),
        outdated_nodes=outdated,
        moved=moved,
        absent=absent,
        confirmed=confirmed,
    )


async def _admit(
    connection: db.Connection, part: Part, now: datetime, stale: timedelta
) -> tuple[Admission, report.Latest | None]:
    inserted = await connection.fetchval(
        "INSERT INTO host (host, report_id, reported_at, received_at, parts, parts_seen)"
        " VALUES ($1, $2, $3, now(), $4, ARRAY[$5::integer]) ON CONFLICT (host) DO NOTHING"
        " RETURNING host",
        part.host,
        part.report_id,
        part.reported_at,
        part.parts,
        part.part,
    )
    if inserted is not None:
        return Admission.NEW_REPORT, _fresh(part, now)
    row = await connection.fetchrow(
        "SELECT report_id, reported_at, received_at, parts, parts_seen FROM host WHERE host = $1"
        " FOR UPDATE",
        part.host,
    )
    assert row is not None
    latest = report.Latest(
        report_id=row["report_id"],
        reported_at=row["reported_at"],
        received_at=row["received_at"],
        parts=row["parts"],
        parts_seen=frozenset(row["parts_seen"]),
    )
    admission = report.admit(latest, part, now=now, stale=stale)
    if admission is Admission.NEW_REPORT:
        await connection.execute(
            "UPDATE host SET report_id = $2, reported_at = $3, received_at = now(), parts = $4,"
            " parts_seen = ARRAY[$5::integer] WHERE host = $1",
            part.host,
            part.report_id,
            part.reported_at,
            part.parts,
            part.part,
        )
        return admission, _fresh(part, now)
    if admission is Admission.NEXT_PART:
        await connection.execute(
            "UPDATE host SET received_at = now(), parts_seen = parts_seen || $2::integer"
            " WHERE host = $1",
            part.host,
            part.part,
        )
    return admission, latest


def _fresh(part: Part, now: datetime) -> report.Latest:
    return report.Latest(
        report_id=part.report_id,
        reported_at=part.reported_at,
        received_at=now,
        parts=part.parts,
        parts_seen=frozenset({part.part}),
    )


async def _lock_known(connection: db.Connection, part: Part) -> list[asyncpg.Record]:
    return await connection.fetch(
        "SELECT id, node_uuid, host, hypervisor_hostname, reported_at, received_at, absent_since"
        " FROM node WHERE node_uuid = ANY($1) OR (host = $2 AND hypervisor_hostname = ANY($3))"
        " ORDER BY id FOR UPDATE",
        [node.node_uuid for node in part.nodes if node.node_uuid],
        part.host,
        [node.hypervisor_hostname for node in part.nodes],
    )


def _find(node: ReportedNode, host: str, known: Iterable[asyncpg.Record]) -> asyncpg.Record | None:
    """Return the row that is this node: by identity, else by address, the present one first."""
    by_address = None
    for row in known:
        if node.node_uuid is not None and row["node_uuid"] == node.node_uuid:
            return row
        if (row["host"], row["hypervisor_hostname"]) != (host, node.hypervisor_hostname):
            continue
        if None not in (row["node_uuid"], node.node_uuid):
            continue  # another machine has that address now
        if by_address is None or row["absent_since"] is None:
            by_address = row
    return by_address


def _choosing(node: ReportedNode) -> tuple[bool, str]:
    return node.node_uuid is None, node.hypervisor_hostname


async def _place(
    connection: db.Connection,
    node: ReportedNode,
    part: Part,
    row: asyncpg.Record | None,
    others: Iterable[asyncpg.Record],
) -> NodeId:
    """Write the node's row at its address, and take the address from whoever had it.

    `others` are the known rows that are no node's of this part so far.
    """
    for other in others:
        same_address = (other["host"], other["hypervisor_hostname"]) == (
            part.host,
            node.hypervisor_hostname,
        )
        if same_address and other["absent_since"] is None:
            await connection.execute(
                "UPDATE node SET absent_since = now(), changed_in = pg_current_xact_id()"
                " WHERE id = $1",
                other["id"],
            )
    values = (
        node.node_uuid,
        part.host,
        node.hypervisor_hostname,
        node.hypervisor_type,
        node.bare_metal,
        node.disabled,
        node.available,
        inventory.is_taken(node),
        node.state,
        node.zone,
        list(node.traits),
        part.report_id,
        part.reported_at,
    )
    if row is None:
        return NodeId(
            await connection.fetchval(
                "INSERT INTO node (node_uuid, host, hypervisor_hostname, hypervisor_type,"
                " bare_metal, disabled, available, reported_taken, reported_state, zone, traits,"
                " report_id, reported_at, received_at)"
                " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, now())"
                " RETURNING id",
                *values,
            )
        )
    await connection.execute(
        "UPDATE node SET node_uuid = coalesce($1, node_uuid), host = $2, hypervisor_hostname = $3,"
        " hypervisor_type = $4, bare_metal = $5, disabled = $6, available = $7,"
        " reported_taken = $8, reported_state = $9, zone = $10, traits = $11, report_id = $12,"
        " reported_at = $13, received_at = now(), absent_since = NULL,"
        " changed_in = pg_current_xact_id() WHERE id = $14",
        *values,
        row["id"],
    )
    return NodeId(row["id"])


async def _count(
    connection: db.Connection,
    placed: Sequence[tuple[NodeId, ReportedNode]],
    part: Part,
    policy: Policy,
) -> list[Claim]:
    """Renew the counters of these nodes; return the claims that the report confirms."""
    node_ids = [node_id for node_id, _ in placed]
    live = await _live_claims(connection, node_ids)
    rows = []
    for node_id, node in placed:
        limit = inventory.limits(node, policy.ratios)
        taken = inventory.foreign(
            node,
            live=live.get(node_id, ()),
            model=policy.catalogue.default_for(node.hypervisor_type),
            limit=limit,
            reported_at=part.reported_at,
        )
        rows += [
            (
                node_id,
                name,
                node.total[name],
                node.reserved.get(name, 0),
                node.used.get(name, 0),
                capacity,
                min(taken.get(name, 0), MOST_FOREIGN),
            )
            for name, capacity in limit.items()
        ]
    await connection.executemany(
        "INSERT INTO inventory AS i (node_id, resource_class, total, reserved, reported_used,"
        " capacity, foreign_used, claim_ceiling) VALUES ($1, $2, $3, $4, $5, $6, $7, $6)"
        " ON CONFLICT (node_id, resource_class) DO UPDATE SET total = excluded.total,"
        " reserved = excluded.reserved, reported_used = excluded.reported_used,"
        " capacity = excluded.capacity, foreign_used = excluded.foreign_used,"
        " claim_ceiling = greatest(excluded.capacity, i.claimed)",
        rows,
    )
    # a class that a node no longer reports has nothing left to claim
    await connection.execute(
        "UPDATE inventory SET total = 0, reserved = 0, reported_used = 0, capacity = 0,"
        " foreign_used = 0, claim_ceiling = claimed WHERE node_id = ANY($1::bigint[])"
        " AND NOT (node_id, resource_class) IN (SELECT * FROM unnest($2::bigint[], $3::text[]))",
        node_ids,
        [row[0] for row in rows],
        [row[1] for row in rows],
    )
    return await _confirm_running(connection, placed)


async def _live_claims(
    connection: db.Connection, node_ids: Sequence[NodeId]
) -> Mapping[NodeId, list[LiveClaim]]:
    found: dict[NodeId, list[LiveClaim]] = {}
    for row in await connection.fetch(
        "SELECT node_id, consumer_id, resources, confirmed_at FROM claim"
        " WHERE node_id = ANY($1::bigint[]) AND state IN ('held', 'confirmed')",
        node_ids,
    ):
        found.setdefault(NodeId(row["node_id"]), []).append(
            LiveClaim(
                consumer_id=row["consumer_id"],
                vector={ResourceClass(name): n for name, n in row["resources"].items()},
                confirmed_at=row["confirmed_at"],
            )
        )
    return found


async def _confirm_running(
    connection: db.Connection, placed: Sequence[tuple[NodeId, ReportedNode]]
) -> list[Claim]:
    """A guest that runs is proof enough: its claim must not expire under it."""
    pairs: list[tuple[NodeId, UUID]] = [
        (node_id, guest) for node_id, node in placed for guest in sorted(inventory.running(node))
    ]
    if not pairs:
        return []
    rows = await connection.fetch(
        "UPDATE claim c SET state = 'confirmed', confirmed_at = now() FROM node n,"
        " unnest($1::bigint[], $2::uuid[]) AS runs (node_id, consumer_id)"
        " WHERE c.node_id = runs.node_id AND c.consumer_id = runs.consumer_id"
        " AND n.id = c.node_id AND c.state = 'held' RETURNING c.*, n.host, n.hypervisor_hostname, n.node_uuid",
        [node_id for node_id, _ in pairs],
        [consumer_id for _, consumer_id in pairs],
    )
    return [claim_of(row) for row in rows]


async def _mark_absent(connection: db.Connection, part: Part) -> int:
    """Every part has arrived: the host's nodes that none of them named are gone."""
    rows = await connection.fetch(
        "UPDATE node SET absent_since = now(), changed_in = pg_current_xact_id()"
        " WHERE id IN (SELECT id FROM node WHERE host = $1 AND absent_since IS NULL"
        " AND report_id <> $2 ORDER BY id FOR UPDATE) RETURNING id",
        part.host,
        part.report_id,
    )
    return len(rows)
