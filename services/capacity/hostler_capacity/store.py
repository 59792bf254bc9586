"""Nodes and flavors in SQL: what the fleet is read from, and what is sold.

Claims are in `claim_store`, reports in `report_store`. A reader of the fleet asks for what changed
since the snapshot it has: rows are stamped with the transaction that changed them, and every
transaction older than `pg_snapshot_xmin` had ended when that snapshot was taken. Asking for stamps
from there on can give a row twice and can miss none, which a sequence number could.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import asyncpg

from hostler_capacity.claim import NodeId
from hostler_capacity.fit import Counter, Node
from hostler_capacity.flavor import Flavor, Kind, Match
from hostler_capacity.resources import ResourceClass
from hostler_common import db, errors

BEGINNING = "0"


class FlavorNotFound(errors.NotFound):
    """There is no flavor of that name."""

    code = "capacity.flavor.not_found"


class FlavorExists(errors.Conflict):
    """There is a flavor of that name already."""

    code = "capacity.flavor.exists"


class FlavorChanged(errors.Conflict):
    """Somebody else changed the flavor since it was read."""

    code = "capacity.flavor.changed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What changed on the nodes since a snapshot, and the snapshot to ask from next time."""

    nodes: Sequence[Node]
    gone: Sequence[NodeId]
    as_of: float
    snapshot: str


async def changes(connection: db.Connection, since: str) -> Changes:
    """Return every node that changed after the snapshot `since` (`BEGINNING`: all of them)."""
    mark = await connection.fetchrow(
        "SELECT pg_snapshot_xmin(pg_current_snapshot())::text AS snapshot,"
        " extract(epoch FROM clock_timestamp())::float8 AS as_of"
    )
    assert mark is not None
    rows = await connection.fetch(
        "SELECT n.id, n.host, n.hypervisor_hostname, n.node_uuid, n.hypervisor_type, n.bare_metal,"
        " n.disabled, n.available, n.reported_state, n.zone, n.absent_since,"
        " extract(epoch FROM n.received_at)::float8 AS received_at,"
        " array_agg(i.resource_class) AS classes, array_agg(i.capacity) AS capacity,"
        " array_agg(i.claimed) AS claimed, array_agg(i.foreign_used) AS foreign_used"
        " FROM node n JOIN inventory i ON i.node_id = n.id"
        " WHERE n.changed_in >= $1::text::xid8 GROUP BY n.id",
        since,
    )
    return Changes(
        nodes=[_node(row) for row in rows if row["absent_since"] is None],
        gone=[NodeId(row["id"]) for row in rows if row["absent_since"] is not None],
        as_of=mark["as_of"],
        snapshot=mark["snapshot"],
    )


def _node(row: asyncpg.Record) -> Node:
    counters = zip(
        row["classes"], row["capacity"], row["claimed"], row["foreign_used"], strict=True
    )
    return Node(
        id=NodeId(row["id"]),
        host=row["host"],
        hypervisor_hostname=row["hypervisor_hostname"],
        node_uuid=row["node_uuid"],
        hypervisor_type=row["hypervisor_type"],
        bare_metal=row["bare_metal"],
        disabled=row["disabled"],
        available=row["available"],
        received_at=row["received_at"],
        counters={
            ResourceClass(name): Counter(limit=limit, claimed=claimed, foreign=foreign)
            for name, limit, claimed, foreign in counters
        },
        zone=row["zone"],
        reported_state=row["reported_state"],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFlavor:
    """A flavor, and the generation that a change of it must name."""

    flavor: Flavor
    generation: int


def _flavor(row: asyncpg.Record) -> StoredFlavor:
    return StoredFlavor(
        flavor=Flavor(
            name=row["name"],
            memory_mb=row["memory_mb"],
            vcpus=row["vcpus"],
            disk_gb=row["disk_gb"],
            extra={ResourceClass(name): amount for name, amount in row["extra"].items()},
            vm_type=row["vm_type"],
            kind=Kind(row["kind"]),
            match=Match(row["match"]),
        ),
        generation=row["generation"],
    )


def _values(flavor: Flavor) -> tuple[object, ...]:
    return (
        flavor.name,
        flavor.memory_mb,
        flavor.vcpus,
        flavor.disk_gb,
        dict(flavor.extra),
        flavor.vm_type,
        flavor.kind,
        flavor.match,
    )


async def create_flavor(connection: db.Connection, flavor: Flavor) -> StoredFlavor:
    """The flavor exists, at generation 1.

    Raises:
        FlavorExists: one of that name does already.
    """
    row = await connection.fetchrow(
        "INSERT INTO flavor (name, memory_mb, vcpus, disk_gb, extra, vm_type, kind, match)"
        " VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT (name) DO NOTHING RETURNING *",
        *_values(flavor),
    )
    if row is None:
        raise FlavorExists(f"there is a flavor {flavor.name} already", name=flavor.name)
    return _flavor(row)


async def replace_flavor(
    connection: db.Connection, flavor: Flavor, *, generation: int
) -> StoredFlavor:
    """The flavor is as given, at the next generation. Claims keep what they took.

    Raises:
        FlavorNotFound: there is none of that name.
        FlavorChanged: it is not at `generation` any more.
    """
    row = await connection.fetchrow(
        "UPDATE flavor SET memory_mb = $2, vcpus = $3, disk_gb = $4, extra = $5, vm_type = $6,"
        " kind = $7, match = $8, generation = generation + 1, updated_at = now()"
        " WHERE name = $1 AND generation = $9 RETURNING *",
        *_values(flavor),
        generation,
    )
    if row is None:
        current = await get_flavor(connection, flavor.name)
        raise FlavorChanged(
            f"flavor {flavor.name} is at generation {current.generation}, not {generation}",
            generation=current.generation,
        )
    return _flavor(row)


async def get_flavor(connection: db.Connection, name: str) -> StoredFlavor:
    """Return the flavor.

    Raises:
        FlavorNotFound: there is none of that name.
    """
    row = await connection.fetchrow("SELECT * FROM flavor WHERE name = $1", name)
    if row is None:
        raise FlavorNotFound(f"there is no flavor {name}", name=name)
    return _flavor(row)


async def flavors(
    connection: db.Connection, *, after: str = "", limit: int = 1000
) -> list[StoredFlavor]:
    """Return flavors by name, from the one after `after` on."""
    rows = await connection.fetch(
        "SELECT * FROM flavor WHERE name > $1 ORDER BY name LIMIT $2", after, limit
    )
    return [_flavor(row) for row in rows]


async def delete_flavor(connection: db.Connection, name: str) -> None:
    """The flavor is gone; claims made with it are not.

    Raises:
        FlavorNotFound: there was none of that name.
    """
    if await connection.execute("DELETE FROM flavor WHERE name = $1", name) != "DELETE 1":
        raise FlavorNotFound(f"there is no flavor {name}", name=name)
