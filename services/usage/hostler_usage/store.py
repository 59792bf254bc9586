"""The ledger in PostgreSQL: notifications go in once, whatever is delivered how often.

`ingest` writes messages, what they say, and which resources that touches in one transaction: either
all of it is there, or none and the messages come again. What follows from them is in `fold_store`,
reading for people in `report_store`. All may run in any number of processes: rows are taken in the
order of their keys, so that writers queue up rather than lock each other out.
"""

import json
import uuid
from collections.abc import Iterable, Sequence, Set
from collections.abc import Mapping as Table
from dataclasses import dataclass, field
from datetime import datetime

import asyncpg

from hostler_common import db
from hostler_usage.history.conflict_store import note_near
from hostler_usage.history.row_set import key_columns
from hostler_usage.reading.event import Event, Origin, Tally
from hostler_usage.reading.statement import ResourceKey, encode

_COLUMNS = (
    "event_time",
    "message_id",
    "body_sha256",
    "origin",
    "region",
    "event_type",
    "publisher_id",
    "priority",
    "request_id",
    "project_id",
    "resource_type",
    "resource_id",
    "has_own_id",
    "is_known",
    "problems",
    "headers",
    "said",
    "body",
)
_ORIGINS_KEPT = 10_000

# a batch is copied here first, for COPY knows no ON CONFLICT; its rows are gone at the commit
_STAGING = (
    "CREATE TEMPORARY TABLE IF NOT EXISTS arrived (event_time timestamptz, message_id text,"
    " body_sha256 bytea, origin integer, region text, event_type text, publisher_id text,"
    " priority text, request_id text, project_id text, resource_type text, resource_id text,"
    " has_own_id boolean, is_known boolean, problems text[], headers text,"
    " said text COMPRESSION lz4, body bytea COMPRESSION lz4) ON COMMIT DELETE ROWS"
)
_MERGE = (
    "WITH stored AS (INSERT INTO raw_event"  # noqa: S608  constants of this module
    f" ({', '.join(_COLUMNS)})"
    f" SELECT {', '.join(f'{name}::jsonb' if name == 'headers' else name for name in _COLUMNS)}"
    " FROM arrived ORDER BY event_time, message_id, body_sha256"
    " ON CONFLICT DO NOTHING RETURNING is_known, problems)"
    " SELECT count(*) AS stored, count(*) FILTER (WHERE NOT is_known) AS unknown_type,"
    " count(*) FILTER (WHERE problems IS NOT NULL) AS problem FROM stored"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """All writing of messages. `writer` is this process, for tallies that replicas do not share."""

    pool: db.Pool
    writer: uuid.UUID
    _origins: dict[Origin, int] = field(default_factory=dict)

    async def ingest(self, events: Sequence[Event]) -> Tally:
        """Every event is stored, exactly once, and its resources are marked to be folded.

        `conflict` of the tally are message ids that stand over several messages from now on, as far as
        the months near by show it (`conflict_store`); what is farther apart is found and counted later.

        Raises:
            DatabaseUnavailable: nothing is stored, or (when the connection broke at the commit)
                all of it is; ingesting the same events again is right in both cases.
        """
        origins = await self._numbers({event.origin for event in events})
        rows = [_event_row(event, origins[event.origin]) for event in events]
        apart = [
            row for event in events if len(event.normalised.said) > 1 for row in _apart_rows(event)
        ]
        touched: dict[ResourceKey, datetime] = {}  # and when the oldest message of each was sent
        for event in events:
            at = event.notification.timestamp
            for said in event.normalised.said:
                if said.statement is not None:
                    touched[said.resource] = min(at, touched.get(said.resource, at))
        async with db.transaction(self.pool) as connection:
            await connection.execute(_STAGING)
            await connection.copy_records_to_table("arrived", records=rows, columns=_COLUMNS)
            try:
                merged = await connection.fetchrow(_MERGE)
            except asyncpg.CheckViolationError as exc:
                # it was on its way to the default partition while its own was being attached
                raise db.DatabaseBusy("a partition was made meanwhile") from exc
            assert merged is not None
            if apart:
                await _insert_apart(connection, apart)
            if touched and merged["stored"]:
                await _mark_touched(connection, touched)
            conflict = 0
            if merged["stored"]:
                conflict = await note_near(
                    connection,
                    {event.notification.message_id for event in events},
                    (event.notification.timestamp for event in events),
                )
            tally = Tally(
                **dict(merged), duplicate=len(events) - merged["stored"], conflict=conflict
            )
            await _count(connection, self.writer, events[0].origin.source, tally)
        return tally

    async def make_partitions(self, months: Iterable[datetime]) -> list[str]:
        """Each of the months has its partition; return those that were made.

        Rows that fell into the default partition meanwhile move to where they belong.

        Raises:
            DatabaseUnavailable: nothing was changed.
        """
        made = []
        for month in months:
            async with db.transaction(self.pool) as connection:
                if await _make_partition(connection, month):
                    made.append(f"{month:%Y-%m}")
        return made

    async def _numbers(self, origins: Set[Origin]) -> Table[Origin, int]:
        """The numbers of these origins; new ones are given."""
        found = {origin: self._origins[origin] for origin in origins & self._origins.keys()}
        missing = origins - found.keys()
        if missing:
            async with db.transaction(self.pool) as connection:
                for origin in sorted(missing):
                    found[origin] = await _number(connection, origin)
            if len(self._origins) + len(found) > _ORIGINS_KEPT:
                self._origins.clear()  # whoever sends thousands of routing keys waits for it
            self._origins.update(found)
        return found


async def _number(connection: db.Connection, origin: Origin) -> int:
    values = (
        origin.source,
        origin.exchange,
        origin.routing_key,
        origin.content_type,
        origin.content_encoding,
    )
    await connection.execute(
        "INSERT INTO origin (source, exchange, routing_key, content_type, content_encoding)"
        " VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING",
        *values,
    )
    number: int = await connection.fetchval(
        "SELECT id FROM origin WHERE (source, exchange, routing_key, content_type,"
        " content_encoding) = ($1, $2, $3, $4, $5)",
        *values,
    )
    return number


def _event_row(event: Event, origin: int) -> tuple[object, ...]:
    notification, normalised = event.notification, event.normalised
    said = normalised.said[0] if normalised.said else None
    resource = said.resource if said else None
    statement = said.statement if said else None
    return (
        notification.timestamp,
        notification.message_id,
        notification.digest,
        origin,
        event.region,
        notification.event_type,
        notification.publisher_id,
        notification.priority,
        notification.request_id,
        normalised.project_id,
        resource.resource_type if resource else None,
        resource.resource_id if resource else None,
        notification.has_own_id,
        normalised.is_known,
        normalised.problems or None,
        json.dumps(event.headers) if event.headers else None,
        encode(statement) if statement else None,
        event.body,
    )


def _apart_rows(event: Event) -> Iterable[tuple[object, ...]]:
    """What the event says of further resources."""
    notification = event.notification
    for said in event.normalised.said[1:]:
        if said.statement is not None:
            yield (
                said.resource.region,
                str(said.resource.resource_type),
                said.resource.resource_id,
                notification.timestamp,
                notification.message_id,
                notification.digest,
                encode(said.statement),
            )


async def _insert_apart(connection: db.Connection, rows: Sequence[tuple[object, ...]]) -> None:
    ordered = sorted(rows, key=lambda row: (row[2], row[1], row[0], row[3:6]))
    await connection.execute(
        "INSERT INTO statement_apart (region, resource_type, resource_id, event_time, message_id,"
        " body_sha256, said) SELECT * FROM unnest($1::text[], $2::text[], $3::text[],"
        " $4::timestamptz[], $5::text[], $6::bytea[], $7::text[]) ON CONFLICT DO NOTHING",
        *(list(column) for column in zip(*ordered, strict=True)),
    )


async def _mark_touched(connection: db.Connection, oldest: Table[ResourceKey, datetime]) -> None:
    keys = sorted(oldest)
    await connection.execute(
        "INSERT INTO touched (regions, resource_types, resource_ids, oldest)"
        " VALUES ($1, $2, $3, $4)",
        *key_columns(keys),
        [oldest[key] for key in keys],
    )


async def _count(connection: db.Connection, writer: uuid.UUID, source: str, tally: Tally) -> None:
    await connection.execute(
        "INSERT INTO ingest_tally AS t (source, hour, writer, stored, duplicate, conflict,"
        " unknown_type, problem) VALUES ($1, date_trunc('hour', now()), $2, $3, $4, $5, $6, $7)"
        " ON CONFLICT (source, hour, writer) DO UPDATE SET stored = t.stored + excluded.stored,"
        " duplicate = t.duplicate + excluded.duplicate, conflict = t.conflict + excluded.conflict,"
        " unknown_type = t.unknown_type + excluded.unknown_type,"
        " problem = t.problem + excluded.problem, last_at = now()",
        source,
        writer,
        tally.stored,
        tally.duplicate,
        tally.conflict,
        tally.unknown_type,
        tally.problem,
    )


# --- partitions


async def _make_partition(connection: db.Connection, month: datetime) -> bool:
    start = month.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    end = start.replace(year=start.year + start.month // 12, month=start.month % 12 + 1)
    name = f"raw_event_{start:%Y_%m}"
    if await connection.fetchval("SELECT to_regclass($1) IS NOT NULL", name):
        return False
    # nobody may write into the default partition between the move and the attachment
    await connection.execute("LOCK TABLE raw_event IN SHARE UPDATE EXCLUSIVE MODE")
    await connection.execute("LOCK TABLE raw_event_default IN ACCESS EXCLUSIVE MODE")
    if await connection.fetchval("SELECT to_regclass($1) IS NOT NULL", name):
        return False  # made by another replica while we waited
    await connection.execute(f"CREATE TABLE {name} (LIKE raw_event INCLUDING ALL)")
    moved = (
        f"WITH moved AS (DELETE FROM raw_event_default WHERE event_time >= $1 AND event_time < $2"  # noqa: S608  the name is a date of ours
        f" RETURNING *) INSERT INTO {name} SELECT * FROM moved"
    )
    await connection.execute(moved, start, end)
    await connection.execute(
        f"ALTER TABLE raw_event ATTACH PARTITION {name}"
        f" FOR VALUES FROM ('{start.isoformat()}') TO ('{end.isoformat()}')"
    )
    return True
