"""SQL of the work on BMCs: who drives which node, operations, and what was observed.

Invariants: at most one live replica drives a node (`driver_id` until `driver_until`, which it puts
off while it works); an operation is committed as `issuing` before its command leaves this process,
and only by the node's driver while the lease's fencing token still holds; each change of an
operation's state is one of `power.TRANSITIONS`.
"""

import dataclasses
import uuid
from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any, Final

import asyncpg

from hostler_baremetal import errors, store
from hostler_baremetal.node import (
    FencingToken,
    Node,
    NodeId,
    Operation,
    OperationId,
    OperationKind,
    may_act,
)
from hostler_baremetal.power import FINISHED, TRANSITIONS, OperationState, PowerState
from hostler_common import db

_FREE: Final = "(node.driver_id IS NULL OR node.driver_id = $1 OR node.driver_until < now())"


class Superseded(Exception):
    """The operation is not in the state, or the node not in the hands, that the caller believes."""


def _operation_of(row: asyncpg.Record) -> Operation:
    token = row["fencing_token"]
    return Operation(
        id=OperationId(row["id"]),
        node_id=NodeId(row["node_id"]),
        kind=row["kind"],
        args=row["args"],
        state=OperationState(row["state"]),
        fencing_token=None if token is None else FencingToken(token),
        requested_by=row["requested_by"],
        created_at=row["created_at"],
        issued_at=row["issued_at"],
        deadline_at=row["deadline_at"],
        finished_at=row["finished_at"],
        code=row["code"],
        detail=row["detail"],
    )


async def create(
    connection: db.Connection,
    node: Node,
    *,
    operation_id: uuid.UUID,
    kind: OperationKind,
    args: Mapping[str, Any],
    fencing_token: int | None,
    requested_by: str,
    timeout_seconds: float,
) -> Operation:
    """Queues an operation on a node that was read for update.

    The same operation asked for while it is under way is the one under way.

    Raises:
        Fenced: the token is not that of the lease that holds now.
        NodeLatched: the BMC is left alone until its credentials change.
        NodeBusy: another operation is under way.
    """
    token = None if fencing_token is None else FencingToken(fencing_token)
    if not may_act(node.lease, token):
        raise errors.Fenced(_why_fenced(node, token))
    if node.latched_at is not None:
        raise errors.NodeLatched(
            f"the BMC of {node.name} refused our credentials: change them first"
        )
    other = await under_way(connection, node.id)
    if other is not None:
        if (other.kind, dict(other.args), other.fencing_token) == (kind, dict(args), token):
            return other
        raise errors.NodeBusy(
            f"operation {other.id} is under way on {node.name}", operation_id=str(other.id)
        )
    row = await connection.fetchrow(
        """
        INSERT INTO operation (id, node_id, kind, args, fencing_token, requested_by, deadline_at)
        VALUES ($1, $2, $3, $4, $5, $6, now() + make_interval(secs => $7)) RETURNING *
        """,
        operation_id,
        node.id,
        kind,
        dict(args),
        token,
        requested_by,
        timeout_seconds,
    )
    assert row is not None
    return _operation_of(row)


def _why_fenced(node: Node, token: FencingToken | None) -> str:
    if node.lease is None:
        return f"{node.name} is not leased any more: token {token} is over"
    if token is None:
        return f"{node.name} is leased by {node.lease.owner}: show the lease's fencing token"
    return f"token {token} is not the one of the present lease of {node.name}"


async def get(connection: db.Connection, operation_id: uuid.UUID) -> Operation:
    """Returns an operation. Raises OperationNotFound."""
    operation = await find(connection, operation_id)
    if operation is None:
        raise errors.OperationNotFound(f"there is no operation {operation_id}")
    return operation


async def find(connection: db.Connection, operation_id: uuid.UUID) -> Operation | None:
    """Returns an operation, or None."""
    row = await connection.fetchrow("SELECT * FROM operation WHERE id = $1", operation_id)
    return None if row is None else _operation_of(row)


async def list_operations(
    connection: db.Connection,
    *,
    node_id: uuid.UUID | None = None,
    limit: int,
    marker: uuid.UUID | None = None,
) -> list[Operation]:
    """Returns operations, the newest first, those after `marker`."""
    rows = await connection.fetch(
        """
        SELECT * FROM operation
         WHERE ($1::uuid IS NULL OR node_id = $1)
           AND ($2::uuid IS NULL OR (created_at, id) <
                (SELECT created_at, id FROM operation WHERE id = $2))
         ORDER BY created_at DESC, id DESC LIMIT $3
        """,
        node_id,
        marker,
        limit,
    )
    return [_operation_of(row) for row in rows]


# --- who drives what


async def claim_operations(
    connection: db.Connection,
    driver: uuid.UUID,
    *,
    seconds: float,
    limit: int,
    busy: Collection[uuid.UUID],
) -> list[Operation]:
    """Takes unfinished operations on nodes that no other live replica drives, oldest first.

    The nodes are the driver's for so many seconds, unless `renew` puts that off; `busy` are the
    operations that the caller has already.
    """
    rows = await connection.fetch(
        f"""
        WITH due AS (
            SELECT operation.id, operation.node_id
              FROM operation JOIN node ON node.id = operation.node_id
             WHERE operation.finished_at IS NULL AND operation.id <> ALL ($4) AND {_FREE}
             ORDER BY operation.created_at LIMIT $3
               FOR UPDATE OF node SKIP LOCKED
        ), taken AS (
            UPDATE node SET driver_id = $1, driver_until = now() + make_interval(secs => $2)
              FROM due WHERE node.id = due.node_id RETURNING due.id
        )
        SELECT operation.* FROM operation JOIN taken USING (id)
        """,  # noqa: S608  # a constant
        driver,
        seconds,
        limit,
        list(busy),
    )
    return [_operation_of(row) for row in rows]


async def claim_polls(
    connection: db.Connection, driver: uuid.UUID, *, seconds: float, limit: int
) -> list[Node]:
    """Takes nodes that are due for a look, on which nothing is under way, longest overdue first.

    Their next look is put off by `seconds`, in case this one is never finished.
    """
    rows = await connection.fetch(
        f"""
        WITH due AS (
            SELECT id FROM node
             WHERE next_poll_at <= now() AND latched_at IS NULL AND {_FREE}
               AND NOT EXISTS (SELECT FROM operation
                                WHERE node_id = node.id AND finished_at IS NULL)
             ORDER BY next_poll_at LIMIT $3 FOR UPDATE SKIP LOCKED
        )
        UPDATE node SET driver_id = $1, driver_until = now() + make_interval(secs => $2),
                        next_poll_at = now() + make_interval(secs => $2)
          FROM due WHERE node.id = due.id
        RETURNING node.*, NULL::text AS lease_owner
        """,  # noqa: S608  # a constant
        driver,
        seconds,
        limit,
    )
    return [store.node_of(row) for row in rows]


async def renew(
    connection: db.Connection, driver: uuid.UUID, nodes: Collection[uuid.UUID], *, seconds: float
) -> None:
    """Puts off the end of our hold on those of the nodes that are still ours."""
    await connection.execute(
        "UPDATE node SET driver_until = now() + make_interval(secs => $3)"
        " WHERE driver_id = $1 AND id = ANY ($2)",
        driver,
        list(nodes),
        seconds,
    )


async def let_go(connection: db.Connection, driver: uuid.UUID) -> None:
    """Lets go of all nodes: another replica need not wait."""
    await connection.execute("UPDATE node SET driver_id = NULL WHERE driver_id = $1", driver)


# --- the life of an operation


async def issue(connection: db.Connection, operation: Operation, *, driver: uuid.UUID) -> datetime:
    """Notes that the operation's command is about to be sent, and returns since when.

    After the commit nobody sends the command again, whatever happens to this process.

    Raises:
        Superseded: the operation is not queued any more, or the node is not ours.
        Fenced: the lease that the operation was asked for under does not hold any more.
    """
    node = await store.get_node(connection, operation.node_id, for_update=True)
    if not may_act(node.lease, operation.fencing_token):
        raise errors.Fenced(_why_fenced(node, operation.fencing_token))
    issued_at: datetime | None = await connection.fetchval(
        """
        UPDATE operation SET state = 'issuing', issued_at = now()
          FROM node
         WHERE operation.id = $1 AND operation.state = 'queued' AND node.id = operation.node_id
           AND node.driver_id = $2 AND node.driver_until > now()
        RETURNING issued_at
        """,
        operation.id,
        driver,
    )
    if issued_at is None:
        raise Superseded(f"operation {operation.id} is in other hands")
    return issued_at


async def acknowledged(connection: db.Connection, operation: Operation) -> None:
    """Notes that the BMC has taken the command. Raises Superseded."""
    await _move(connection, operation.id, OperationState.WAITING)


async def finish(
    connection: db.Connection,
    operation: Operation,
    state: OperationState,
    *,
    code: str | None = None,
    detail: str | None = None,
) -> Operation:
    """Ends an operation. Raises Superseded if it has ended already."""
    assert state in FINISHED
    row = await _move(connection, operation.id, state, code=code, detail=detail)
    return _operation_of(row)


async def _move(
    connection: db.Connection,
    operation_id: uuid.UUID,
    state: OperationState,
    *,
    code: str | None = None,
    detail: str | None = None,
) -> asyncpg.Record:
    before = [earlier for earlier, following in TRANSITIONS.items() if state in following]
    row = await connection.fetchrow(
        """
        UPDATE operation SET state = $2, code = $3, detail = $4,
               finished_at = CASE WHEN $5 THEN now() END
         WHERE id = $1 AND state = ANY ($6) RETURNING *
        """,
        operation_id,
        state,
        code,
        detail,
        state in FINISHED,
        before,
    )
    if row is None:
        raise Superseded(f"operation {operation_id} cannot become {state} any more")
    return row


async def forget_old(connection: db.Connection, *, keep_days: int) -> None:
    """Drops operations that ended long ago."""
    await connection.execute(
        "DELETE FROM operation WHERE finished_at < now() - make_interval(days => $1)", keep_days
    )


# --- what was observed


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What a look changed."""

    node: Node
    last_operation_id: uuid.UUID | None


async def observed(
    connection: db.Connection,
    node_id: uuid.UUID,
    state: PowerState,
    *,
    observed_at: datetime,
    working_suite: int | None,
    next_poll_seconds: float,
) -> Observed | None:
    """Writes what a BMC said of its power; returns the node as it was before.

    Returns None, and changes nothing, when the node is gone, a later look was written already, or
    an operation is under way: what that one changes would look like drift, and it writes its end.
    """
    row = await connection.fetchrow(
        "SELECT node.*, NULL::text AS lease_owner, (SELECT id FROM operation WHERE node_id = node.id"
        " ORDER BY created_at DESC LIMIT 1) AS last_operation_id"
        " FROM node WHERE id = $1 AND (power_observed_at IS NULL OR power_observed_at < $2)"
        " AND NOT EXISTS (SELECT FROM operation WHERE node_id = node.id AND finished_at IS NULL)"
        " FOR UPDATE OF node",
        node_id,
        observed_at,
    )
    if row is None:
        return None
    await connection.execute(
        """
        UPDATE node SET power_state = $2, last_power_state = $2, power_observed_at = $3,
               looked_at = now(),
               poll_failures = 0, poll_error = NULL,
               working_suite = coalesce($4, working_suite),
               next_poll_at = now() + make_interval(secs => $5)
         WHERE id = $1
        """,
        node_id,
        state,
        observed_at,
        working_suite,
        next_poll_seconds,
    )
    return Observed(node=store.node_of(row), last_operation_id=row["last_operation_id"])


async def not_observed(
    connection: db.Connection, node_id: uuid.UUID, *, reason: str, next_poll_seconds: float
) -> None:
    """Writes that a BMC did not say: its node's power is unknown until it does."""
    await connection.execute(
        """
        UPDATE node SET power_state = 'unknown', looked_at = now(), poll_failures = poll_failures + 1,
               poll_error = $2, next_poll_at = now() + make_interval(secs => $3)
         WHERE id = $1
        """,
        node_id,
        reason,
        next_poll_seconds,
    )


async def latch(
    connection: db.Connection, node_id: uuid.UUID, *, generation: int, reason: str
) -> Node | None:
    """Leaves a BMC alone that refused the credentials of this generation of its node.

    Returns the node, or None if it was changed meanwhile or is latched already.
    """
    row = await connection.fetchrow(
        """
        UPDATE node SET latched_at = now(), looked_at = now(), power_state = 'unknown', poll_error = $3,
               poll_failures = poll_failures + 1
         WHERE id = $1 AND generation = $2 AND latched_at IS NULL
        RETURNING node.*, NULL::text AS lease_owner
        """,
        node_id,
        generation,
        reason,
    )
    return None if row is None else store.node_of(row)


async def look_after(
    connection: db.Connection, node_id: uuid.UUID, *, max_age_seconds: float | None
) -> datetime | None:
    """Has a node looked at soon if the last look is older; returns the moment it must be after.

    None: what is known is good enough, or the BMC is left alone.
    """
    if max_age_seconds is None:
        return None
    asked_at: datetime | None = await connection.fetchval(
        """
        UPDATE node SET next_poll_at = now()
         WHERE id = $1 AND latched_at IS NULL
           AND (looked_at IS NULL OR looked_at < now() - make_interval(secs => $2))
        RETURNING now()
        """,
        node_id,
        max_age_seconds,
    )
    return asked_at


async def under_way(connection: db.Connection, node_id: uuid.UUID) -> Operation | None:
    """Returns the operation under way on a node, if any."""
    row = await connection.fetchrow(
        "SELECT * FROM operation WHERE node_id = $1 AND finished_at IS NULL", node_id
    )
    return None if row is None else _operation_of(row)


async def last_succeeded(
    connection: db.Connection, node_id: uuid.UUID, kind: OperationKind
) -> Operation | None:
    """Returns the last operation of a kind on a node that succeeded, if any."""
    row = await connection.fetchrow(
        "SELECT * FROM operation WHERE node_id = $1 AND kind = $2 AND state = 'succeeded'"
        " ORDER BY finished_at DESC LIMIT 1",
        node_id,
        kind,
    )
    return None if row is None else _operation_of(row)
