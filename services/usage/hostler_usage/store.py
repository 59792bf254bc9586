"""The ledger in PostgreSQL: notifications go in once, whatever is delivered how often, and histories follow.

`ingest` writes messages, what they say, and which resources that touches in one transaction: either
all of it is there, or none and the messages come again. `fold_some` makes the touched histories
anew. Both may run in any number of processes: rows are taken in the order of their keys, so that
writers queue up rather than lock each other out. Reading for people is in `report_store`.
"""

import json
import uuid
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import asyncpg

from hostler_common import db
from hostler_usage.event import Event, Tally
from hostler_usage.intervals import History, Interval, fold
from hostler_usage.observation import Evidence, Kind, Observation, Rank, ResourceKey
from hostler_usage.rules import NORM_VERSION, state_class
from hostler_usage.times import epoch_microseconds

_COLUMN_OF = {
    "project": "project_id",
    "user": "user_id",
    "state": "state",
    "flavor": "flavor",
    "image": "image",
    "host": "host",
    "zone": "zone",
    "volume_type": "volume_type",
    "vcpus": "vcpus",
    "memory_mb": "memory_mb",
    "disk_gb": "disk_gb",
    "size_gb": "size_gb",
}


def event_id(event_time: datetime, digest: bytes) -> str:
    """The name of a stored message in the API: its event time and its body's sha256."""
    return f"{epoch_microseconds(event_time)}-{digest.hex()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """All writing. `writer` is this process, for tallies that replicas do not share."""

    pool: db.Pool
    writer: uuid.UUID

    async def ingest(self, events: Sequence[Event]) -> Tally:
        """Every event is stored, exactly once, and its resource is marked to be folded.

        Raises:
            DatabaseUnavailable: nothing is stored, or (when the connection broke at the commit)
                all of it is; ingesting the same events again is right in both cases.
        """
        by_key = {event.key: event for event in sorted(events, key=lambda event: event.key)}
        async with db.transaction(self.pool) as connection:
            new = [by_key[key] for key in await _insert_events(connection, by_key.values())]
            conflicts = await _note_conflicts(connection, new) if new else 0
            await _insert_observations(connection, new)
            await _mark_dirty(
                connection,
                {
                    event.normalised.resource
                    for event in new
                    if event.normalised.resource and event.normalised.observations
                },
            )
            tally = Tally(
                stored=len(new),
                duplicate=len(events) - len(new),
                conflict=conflicts,
                unknown_type=sum(not event.normalised.is_known for event in new),
                problem=sum(bool(event.normalised.problems) for event in new),
            )
            await _count(connection, self.writer, events[0].source, tally)
        return tally

    async def fold_some(self, limit: int = 100) -> int:
        """Up to `limit` touched resources have their history made anew; return how many.

        A resource that is touched meanwhile is marked again after this transaction, never lost.

        Raises:
            DatabaseUnavailable: nothing was changed.
        """
        async with db.transaction(self.pool) as connection:
            rows = await connection.fetch(
                "DELETE FROM dirty d USING (SELECT region, resource_type, resource_id"
                "   FROM dirty ORDER BY marked_at LIMIT $1 FOR UPDATE SKIP LOCKED) taken"
                " WHERE (d.region, d.resource_type, d.resource_id)"
                "     = (taken.region, taken.resource_type, taken.resource_id)"
                " RETURNING d.region, d.resource_type, d.resource_id",
                limit,
            )
            keys = sorted(_key(row) for row in rows)
            if keys:
                observations = await _load_observations(connection, keys)
                histories = {key: fold(observations[key]) for key in keys}
                await _replace_histories(connection, histories)
        return len(keys)

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


# --- ingest


async def _insert_events(
    connection: db.Connection, events: Iterable[Event]
) -> list[tuple[object, ...]]:
    columns = list(zip(*(_event_row(event) for event in events), strict=True))
    try:
        rows = await _insert(connection, columns)
    except asyncpg.CheckViolationError as exc:
        # it was on its way to the default partition while its own was being attached
        raise db.DatabaseBusy("a partition was made meanwhile") from exc
    return [tuple(row) for row in rows]


async def _insert(
    connection: db.Connection, columns: Sequence[tuple[object, ...]]
) -> list[asyncpg.Record]:
    return await connection.fetch(
        "INSERT INTO raw_event (event_time, message_id, body_sha256, source, region, exchange,"
        " routing_key, event_type, publisher_id, priority, request_id, project_id, resource_type,"
        " resource_id, has_own_id, problems, content_type, content_encoding, headers, body)"
        " SELECT event_time, message_id, body_sha256, source, region, exchange, routing_key,"
        " event_type, publisher_id, priority, request_id, project_id, resource_type, resource_id,"
        " has_own_id, coalesce(string_to_array(nullif(problems, ''), ','), '{}'), content_type,"
        " content_encoding, headers::jsonb, body"
        " FROM unnest($1::timestamptz[], $2::text[], $3::bytea[], $4::text[], $5::text[],"
        " $6::text[], $7::text[], $8::text[], $9::text[], $10::text[], $11::text[], $12::text[],"
        " $13::text[], $14::text[], $15::boolean[], $16::text[], $17::text[], $18::text[],"
        " $19::text[], $20::bytea[]) AS event (event_time, message_id, body_sha256, source,"
        " region, exchange, routing_key, event_type, publisher_id, priority, request_id,"
        " project_id, resource_type, resource_id, has_own_id, problems, content_type,"
        " content_encoding, headers, body)"
        " ON CONFLICT DO NOTHING RETURNING event_time, message_id, body_sha256",
        *columns,
    )


def _event_row(event: Event) -> tuple[object, ...]:
    notification, normalised = event.notification, event.normalised
    resource = normalised.resource
    return (
        notification.timestamp,
        notification.message_id,
        notification.digest,
        event.source,
        event.region,
        event.exchange,
        event.routing_key,
        notification.event_type,
        notification.publisher_id,
        notification.priority,
        notification.request_id,
        normalised.project_id,
        resource.resource_type if resource else None,
        resource.resource_id if resource else None,
        notification.has_own_id,
        ",".join(normalised.problems),
        event.content_type,
        event.content_encoding,
        json.dumps(event.headers),
        event.body,
    )


async def _note_conflicts(connection: db.Connection, new: Sequence[Event]) -> int:
    """How many of the new events have another body under their id."""
    rows = await connection.fetch(
        "INSERT INTO event_conflict (event_time, message_id, bodies)"
        " SELECT event_time, message_id, count(*) FROM raw_event"
        " WHERE (event_time, message_id) IN (SELECT * FROM unnest($1::timestamptz[], $2::text[]))"
        " GROUP BY event_time, message_id HAVING count(*) > 1 ORDER BY event_time, message_id"
        " ON CONFLICT (event_time, message_id)"
        " DO UPDATE SET bodies = excluded.bodies, noticed_at = now()"
        " RETURNING event_time",
        [event.notification.timestamp for event in new],
        [event.notification.message_id for event in new],
    )
    return len(rows)


async def _insert_observations(connection: db.Connection, new: Sequence[Event]) -> None:
    rows = [
        (
            resource.region,
            resource.resource_type,
            resource.resource_id,
            item.evidence.event_time,
            item.evidence.message_id,
            item.evidence.digest,
            ordinal,
            str(item.kind),
            item.t_eff,
            int(item.rank),
            item.opens,
            item.is_rounded,
            json.dumps(dict(item.attributes)),
        )
        for event in new
        if (resource := event.normalised.resource) is not None
        for ordinal, item in enumerate(event.normalised.observations)
    ]
    if rows:
        await connection.execute(
            "INSERT INTO observation SELECT region, resource_type, resource_id, event_time,"
            " message_id, body_sha256, ordinal, kind, t_eff, rank, opens, is_rounded,"
            " attributes::jsonb, $14"
            " FROM unnest($1::text[], $2::text[], $3::text[], $4::timestamptz[], $5::text[],"
            " $6::bytea[], $7::smallint[], $8::text[], $9::timestamptz[], $10::smallint[],"
            " $11::boolean[], $12::boolean[], $13::text[]) AS item (region, resource_type,"
            " resource_id, event_time, message_id, body_sha256, ordinal, kind, t_eff, rank, opens,"
            " is_rounded, attributes)"
            " ON CONFLICT DO NOTHING",
            *zip(*rows, strict=True),
            NORM_VERSION,
        )


async def _mark_dirty(connection: db.Connection, resources: Iterable[ResourceKey]) -> None:
    keys = sorted(resources)
    if keys:
        # an update, not "do nothing": it waits for a fold that holds the row, and then inserts anew
        await connection.execute(
            "INSERT INTO dirty (region, resource_type, resource_id)"
            " SELECT * FROM unnest($1::text[], $2::text[], $3::text[])"
            " ON CONFLICT (region, resource_type, resource_id) DO UPDATE SET marked_at = dirty.marked_at",
            *_key_columns(keys),
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


# --- fold


def _key(row: asyncpg.Record) -> ResourceKey:
    return ResourceKey(
        region=row["region"],
        resource_type=row["resource_type"],
        resource_id=row["resource_id"],
    )


def _key_columns(keys: Sequence[ResourceKey]) -> tuple[list[str], list[str], list[str]]:
    return (
        [key.region for key in keys],
        [str(key.resource_type) for key in keys],
        [key.resource_id for key in keys],
    )


async def _load_observations(
    connection: db.Connection, keys: Sequence[ResourceKey]
) -> Mapping[ResourceKey, list[Observation]]:
    rows = await connection.fetch(
        "SELECT o.* FROM unnest($1::text[], $2::text[], $3::text[])"
        "  AS k (region, resource_type, resource_id)"
        " JOIN observation o USING (region, resource_type, resource_id)",
        *_key_columns(keys),
    )
    found: dict[ResourceKey, list[Observation]] = defaultdict(list)
    for row in rows:
        found[_key(row)].append(
            Observation(
                kind=Kind(row["kind"]),
                t_eff=row["t_eff"],
                rank=Rank(row["rank"]),
                opens=row["opens"],
                is_rounded=row["is_rounded"],
                attributes=tuple(sorted(row["attributes"].items())),
                evidence=Evidence(
                    event_time=row["event_time"],
                    message_id=row["message_id"],
                    digest=row["body_sha256"],
                ),
            )
        )
    return found


async def _replace_histories(
    connection: db.Connection, histories: Mapping[ResourceKey, History]
) -> None:
    """The intervals of these resources are these; rows that are right already are not touched."""
    keys = list(histories)
    wanted = {
        (*_key_tuple(key), interval.start): _interval_row(key, interval)
        for key, history in histories.items()
        for interval in history.intervals
    }
    rows = await connection.fetch(
        "SELECT i.* FROM unnest($1::text[], $2::text[], $3::text[])"
        "  AS k (region, resource_type, resource_id)"
        " JOIN usage_interval i USING (region, resource_type, resource_id)",
        *_key_columns(keys),
    )
    present = {tuple(row)[:4]: tuple(row) for row in rows}
    wrong = [key for key, row in present.items() if wanted.get(key) != row]
    if wrong:
        await connection.executemany(
            "DELETE FROM usage_interval WHERE (region, resource_type, resource_id, starts_at)"
            " = ($1, $2, $3, $4)",
            wrong,
        )
    await connection.executemany(
        "INSERT INTO usage_interval VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12,"
        " $13, $14, $15, $16, $17, $18, $19, $20, $21, $22)",
        [row for key, row in wanted.items() if present.get(key) != row],
    )
    await connection.executemany(
        "INSERT INTO resource (region, resource_type, resource_id, anomalies)"
        " VALUES ($1, $2, $3, $4) ON CONFLICT (region, resource_type, resource_id)"
        " DO UPDATE SET anomalies = excluded.anomalies, folded_at = now()",
        [
            (*_key_tuple(key), [str(item) for item in history.anomalies])
            for key, history in histories.items()
        ],
    )


def _key_tuple(key: ResourceKey) -> tuple[str, str, str]:
    return (key.region, str(key.resource_type), key.resource_id)


def _interval_row(key: ResourceKey, interval: Interval) -> tuple[object, ...]:
    """The row in the order of the table's columns."""
    values = {column: interval.attributes.get(name) for name, column in _COLUMN_OF.items()}
    state = values["state"]
    return (
        *_key_tuple(key),
        interval.start,
        interval.end,
        values["project_id"],
        values["user_id"],
        state,
        state_class(state if isinstance(state, str) else None),
        values["flavor"],
        values["image"],
        values["host"],
        values["zone"],
        values["volume_type"],
        values["vcpus"],
        values["memory_mb"],
        values["disk_gb"],
        values["size_gb"],
        dict(interval.attributes),
        [_cited(item) for item in interval.opened_by],
        [_cited(item) for item in interval.closed_by],
        str(interval.provenance),
    )


def _cited(evidence: Evidence) -> dict[str, str]:
    return {
        "message_id": evidence.message_id,
        "event_id": event_id(evidence.event_time, evidence.digest),
    }


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
