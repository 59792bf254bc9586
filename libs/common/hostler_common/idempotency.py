"""``Idempotency-Key`` on POST: a request sent twice is done once, and answered twice alike.

The key is claimed in the transaction that does the work. A second request with the same key waits for the first one's
transaction: if that commits, it gets the stored reply; if it rolls back, it does the work itself.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Header

from hostler_common import db, errors

KEEP_DAYS = 7

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=200,
        description="Sent again with the same body, the request is answered as the first time.",
    ),
]


class KeyReused(errors.Conflict):
    """The key was used for another request."""

    code = "request.idempotency_key_reused"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredReply:
    """What the first request was answered."""

    status: int
    body: Any


async def begin(
    connection: db.Connection, key: str, *, caller: str, request: object
) -> StoredReply | None:
    """Claim the key for this transaction; None if it is new, else the reply of the request that had it.

    Keys belong to a caller: two callers may use the same one.

    Raises:
        KeyReused: it was used with another request.
    """
    fingerprint = hashlib.sha256(
        json.dumps(request, sort_keys=True, default=str).encode()
    ).digest()
    # waits here while another transaction has the key and is not done
    row = await connection.fetchrow(
        "INSERT INTO idempotency_key (key, fingerprint) VALUES ($1, $2)"
        " ON CONFLICT (key) DO NOTHING RETURNING key",
        _stored(key, caller),
        fingerprint,
    )
    if row is not None:
        return None
    stored = await connection.fetchrow(
        "SELECT fingerprint, status, reply FROM idempotency_key WHERE key = $1",
        _stored(key, caller),
    )
    if stored is None or stored["status"] is None or stored["fingerprint"] != fingerprint:
        raise KeyReused("this Idempotency-Key was used for another request")
    return StoredReply(status=stored["status"], body=stored["reply"])


def _stored(key: str, caller: str) -> str:
    """The key as it is stored; the length keeps ``a:b`` with ``c`` apart from ``a`` with ``b:c``."""
    return f"{len(caller)}:{caller}:{key}"


async def finish(
    connection: db.Connection, key: str, *, caller: str, status: int, body: object
) -> None:
    """Keep the reply under the key, in the transaction that claimed it."""
    await connection.execute(
        "UPDATE idempotency_key SET status = $2, reply = $3 WHERE key = $1",
        _stored(key, caller),
        status,
        body,
    )


async def forget_old(pool: db.Pool) -> None:
    """Drop keys older than `KEEP_DAYS`: nobody repeats a request that late."""
    async with db.transaction(pool) as connection:
        await connection.execute(
            "DELETE FROM idempotency_key WHERE created_at < now() - make_interval(days => $1)",
            KEEP_DAYS,
        )
