"""Where the settled past of resources is kept (`settled`): a row for each that has a long one."""

from collections.abc import Mapping, Sequence
from datetime import datetime

import orjson

from hostler_common import db
from hostler_usage.auditing.repetition import Said
from hostler_usage.history.row_set import key_columns
from hostler_usage.history.settled import Settled
from hostler_usage.reading.statement import Evidence, ResourceKey, decode, encode

_SAME = "(region, resource_type, resource_id)"


async def load(
    connection: db.Connection, oldest: Mapping[ResourceKey, datetime | None]
) -> dict[ResourceKey, Settled]:
    """The settled pasts that the news do not reach, of which the oldest are these; None: it is not known."""
    since = {key: moment for key, moment in oldest.items() if moment is not None}
    if not since:
        return {}
    keys = list(since)
    rows = await connection.fetch(
        "SELECT k.number, s.rows_from, s.said_from, s.kept"  # noqa: S608  a constant of this module
        " FROM unnest($1::text[], $2::text[], $3::text[], $4::timestamptz[]) WITH ORDINALITY"
        "  AS k (region, resource_type, resource_id, oldest, number)"
        f" JOIN settled AS s USING {_SAME} WHERE k.oldest >= s.said_from",
        *key_columns(keys),
        list(since.values()),
    )
    return {
        keys[number - 1]: Settled(
            rows_from=rows_from, said_from=said_from, kept=tuple(map(_said, orjson.loads(kept)))
        )
        for number, rows_from, said_from, kept in rows
    }


async def save(connection: db.Connection, pasts: Mapping[ResourceKey, Settled | None]) -> None:
    """The settled pasts of these resources are these; None: it has none."""
    gone = [key for key, past in pasts.items() if past is None]
    if gone:
        await connection.execute(
            f"DELETE FROM settled WHERE {_SAME} IN"  # noqa: S608  a constant of this module
            " (SELECT * FROM unnest($1::text[], $2::text[], $3::text[]))",
            *key_columns(gone),
        )
    there = {key: past for key, past in pasts.items() if past is not None}
    if there:
        await connection.execute(
            "INSERT INTO settled (region, resource_type, resource_id, rows_from, said_from, kept)"
            " SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::timestamptz[],"
            "  $5::timestamptz[], $6::text[])"
            " ON CONFLICT (resource_id, resource_type, region) DO UPDATE SET"
            "  rows_from = excluded.rows_from, said_from = excluded.said_from, kept = excluded.kept",
            *key_columns(list(there)),
            [past.rows_from for past in there.values()],
            [past.said_from for past in there.values()],
            [_kept(past.kept) for past in there.values()],
        )


def _kept(said: Sequence[Said]) -> str:
    return orjson.dumps(
        [
            (item.event_time.isoformat(), item.message_id, item.digest.hex(), encode(statement))
            for statement, item in said
        ]
    ).decode()


def _said(row: tuple[str, str, str, str]) -> Said:
    event_time, message_id, digest, text = row
    evidence = Evidence(
        event_time=datetime.fromisoformat(event_time),
        message_id=message_id,
        digest=bytes.fromhex(digest),
    )
    return decode(text), evidence
