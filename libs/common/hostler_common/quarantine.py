"""Quarantine: every message that could not be handled, with its body byte for byte, its reason and its attempts.

Served by every service at ``/v1/quarantine``. Replaying hands the message to the queue it came from, and to that queue
alone; the row goes in the same transaction in which the message enters the outbox. The same bad message delivered
twice is one row, ``seen`` twice.
"""

import base64
import hashlib
import math
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

import asyncpg
from fastapi import APIRouter, Query, Response
from pydantic import BaseModel

from hostler_common import auth, bus, db, errors, http, outbox

MAX_BODY_SHOWN_BYTES = 64 * 1024


class EntryNotFound(errors.NotFound):
    """There is no such row in quarantine; perhaps it was replayed or discarded."""

    code = "quarantine.not_found"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantine:
    """The quarantine of one service's schema."""

    pool: db.Pool

    async def put(self, delivery: bus.Delivery, *, code: str, reason: str) -> None:
        """The delivery is kept, durably, when this returns.

        Raises:
            DatabaseUnavailable: it is not.
        """
        properties = _plain(
            {
                "message_id": delivery.message_id,
                "type": delivery.type,
                "app_id": delivery.app_id,
                "content_type": delivery.content_type,
                "content_encoding": delivery.content_encoding,
                "headers": dict(delivery.headers),
                "timestamp": delivery.timestamp.isoformat() if delivery.timestamp else None,
            }
        )
        async with db.transaction(self.pool) as connection:
            await connection.execute(
                "INSERT INTO quarantine AS q (queue, exchange, routing_key, properties, body,"
                " body_sha256, code, reason, attempts) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)"
                " ON CONFLICT (queue, body_sha256, routing_key, exchange) DO UPDATE"
                " SET seen = q.seen + 1, code = excluded.code, reason = excluded.reason,"
                " attempts = excluded.attempts, quarantined_at = now()",
                delivery.queue,
                _plain(delivery.exchange),
                _plain(delivery.routing_key),
                properties,
                delivery.body,
                hashlib.sha256(delivery.body).digest(),
                code,
                _plain(reason)[:2000],
                delivery.attempt,
            )

    async def count(self) -> int:
        """How many messages are in quarantine."""
        async with db.connection(self.pool) as connection:
            return int(await connection.fetchval("SELECT count(*) FROM quarantine"))

    async def rows(self, *, after_id: int = 0, limit: int = 100) -> list[asyncpg.Record]:
        """Rows with a greater id, oldest first, without their bodies."""
        async with db.connection(self.pool) as connection:
            return await connection.fetch(
                "SELECT id, queue, exchange, routing_key, properties, code, reason, attempts, seen,"
                " quarantined_at, octet_length(body) AS body_bytes, NULL::bytea AS body"
                " FROM quarantine WHERE id > $1 ORDER BY id LIMIT $2",
                after_id,
                limit,
            )

    async def row(self, entry_id: int) -> asyncpg.Record:
        """One row with its body.

        Raises:
            EntryNotFound: there is none.
        """
        async with db.connection(self.pool) as connection:
            row = await connection.fetchrow(
                "SELECT *, octet_length(body) AS body_bytes FROM quarantine WHERE id = $1",
                entry_id,
            )
        if row is None:
            raise EntryNotFound(f"there is no quarantined message {entry_id}")
        return row

    async def replay(self, entry_id: int) -> None:
        """The message is on its way to its queue again, as a first attempt, and no longer in quarantine.

        Raises:
            EntryNotFound: there is none.
        """
        async with db.transaction(self.pool) as connection:
            row = await connection.fetchrow(
                "DELETE FROM quarantine WHERE id = $1 RETURNING *", entry_id
            )
            if row is None:
                raise EntryNotFound(f"there is no quarantined message {entry_id}")
            properties = dict(row["properties"])
            timestamp = properties.pop("timestamp")
            delivery = bus.Delivery(
                queue=row["queue"],
                exchange=row["exchange"],
                routing_key=row["routing_key"],
                body=row["body"],
                timestamp=datetime.fromisoformat(timestamp) if timestamp else None,
                **properties,
            )
            await outbox.add(connection, [bus.replaying(delivery, routing_key=delivery.queue)])

    async def discard(self, entry_id: int) -> None:
        """The message is gone.

        Raises:
            EntryNotFound: there was none.
        """
        async with db.transaction(self.pool) as connection:
            if (
                await connection.execute("DELETE FROM quarantine WHERE id = $1", entry_id)
                != "DELETE 1"
            ):
                raise EntryNotFound(f"there is no quarantined message {entry_id}")


def _plain(value: Any) -> Any:  # noqa: ANN401  AMQP tables hold anything
    """An AMQP value as PostgreSQL can keep it in text and jsonb: bytes, times and numbers that JSON lacks become text.

    NUL characters and lone surrogates are escaped.
    """
    if isinstance(value, dict):
        return {_plain(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bytes | bytearray):
        return _plain(value.decode("utf-8", "backslashreplace"))
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if isinstance(value, int | None) else _plain(str(value))


class Entry(BaseModel):
    """A quarantined message."""

    id: int
    queue: str
    exchange: str
    routing_key: str
    message_id: str | None
    code: str
    reason: str
    attempts: int
    seen: int
    quarantined_at: datetime
    body_bytes: int


class EntryWithBody(Entry):
    """A quarantined message with the beginning of its body, as text where it is UTF-8, and base64 always."""

    properties: dict[str, Any]
    body_text: str | None
    body_base64: str
    body_is_whole: bool


class Entries(BaseModel):
    """A page of quarantined messages."""

    entries: list[Entry]
    next_marker: str | None


QuarantineDep = Annotated[Quarantine, http.state("quarantine")]
router = APIRouter(prefix="/v1/quarantine", tags=["quarantine"])


def _entry(row: asyncpg.Record) -> dict[str, Any]:
    return {**dict(row), "message_id": row["properties"].get("message_id")}


@router.get(
    "",
    operation_id="list_quarantine",
    dependencies=[auth.require(auth.Role.OPERATOR, every_project=True)],
)
async def list_quarantine(
    quarantine: QuarantineDep,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    marker: Annotated[int, Query(ge=0)] = 0,
) -> Entries:
    """Quarantined messages, oldest first, without their bodies."""
    rows = await quarantine.rows(after_id=marker, limit=limit)
    return Entries(
        entries=[Entry.model_validate(_entry(row)) for row in rows],
        next_marker=str(rows[-1]["id"]) if len(rows) == limit else None,
    )


@router.get(
    "/{entry_id}",
    operation_id="show_quarantined",
    dependencies=[auth.require(auth.Role.OPERATOR, every_project=True)],
)
async def show_quarantined(entry_id: int, quarantine: QuarantineDep) -> EntryWithBody:
    """One quarantined message with the beginning of its body."""
    row = await quarantine.row(entry_id)
    shown = row["body"][:MAX_BODY_SHOWN_BYTES]
    try:
        text = shown.decode() if b"\0" not in shown else None
    except UnicodeDecodeError:
        text = None
    return EntryWithBody.model_validate(
        {
            **_entry(row),
            "body_text": text,
            "body_base64": base64.b64encode(shown).decode(),
            "body_is_whole": len(shown) == row["body_bytes"],
        }
    )


@router.get(
    "/{entry_id}/body",
    operation_id="download_quarantined",
    dependencies=[auth.require(auth.Role.OPERATOR, every_project=True)],
    response_class=Response,
)
async def download_quarantined(entry_id: int, quarantine: QuarantineDep) -> Response:
    """The body, byte for byte."""
    row = await quarantine.row(entry_id)
    return Response(row["body"], media_type="application/octet-stream")


@router.post(
    "/{entry_id}/replay",
    operation_id="replay_quarantined",
    status_code=202,
    dependencies=[auth.require(auth.Role.OPERATOR, every_project=True)],
)
async def replay_quarantined(entry_id: int, quarantine: QuarantineDep) -> None:
    """Hand the message to its queue again, as a first attempt."""
    await quarantine.replay(entry_id)


@router.delete(
    "/{entry_id}",
    operation_id="discard_quarantined",
    status_code=204,
    dependencies=[auth.require(auth.Role.ADMIN, every_project=True)],
)
async def discard_quarantined(entry_id: int, quarantine: QuarantineDep) -> None:
    """Forget the message."""
    await quarantine.discard(entry_id)
