"""Events of leases: each one's taking and its end are told, whoever notices the end first."""

import uuid
from datetime import datetime

from hostler_baremetal import messages, store
from hostler_baremetal.node import Lease
from hostler_common import bus, db, logs, outbox

log = logs.get(__name__)


def message(
    event: bus.EventType[messages.LeaseChanged],
    *,
    node_id: uuid.UUID,
    name: str,
    lease: Lease,
    ended_at: datetime | None = None,
) -> bus.Message:
    """Returns the event about a lease of a node, which `ended_at` is when it was over."""
    body = messages.LeaseChanged(
        node_uuid=node_id,
        name=name,
        owner=lease.owner,
        purpose=lease.purpose,
        fencing_token=lease.fencing_token,
        taken_at=lease.taken_at,
        expires_at=lease.expires_at,
        ended_at=ended_at,
    )
    return event.message(body, app_id=messages.APP_ID)


async def end_expired(connection: db.Connection, *, node_id: uuid.UUID | None = None) -> None:
    """Ends the leases that have run out, of one node or of all, each with its event."""
    expired = await store.sweep_leases(connection, node_id=node_id)
    await outbox.add(
        connection,
        [
            message(
                messages.LEASE_EXPIRED,
                node_id=its_node,
                name=name,
                lease=lease,
                ended_at=lease.expires_at,
            )
            for its_node, name, lease in expired
        ],
    )
    for _, name, lease in expired:
        log.info("lease_expired", node=name, owner=lease.owner)
