"""Message ids that stand over more than one message (`event_conflict`): resent with another time, or edited.

All messages under an id are stored and folded, and each of them has its row here: which rows there
are follows from which messages are stored, not from the order in which they came. They are looked
for twice, for message ids are random and the months are many:

- `note_near`, in the transaction that stores a batch: in the months of the batch and of three days
  around it, and in the default partition. What is usual is found at once.
- `note_everywhere`, before the feeds' catalogue takes them: in all that is stored. The rest is
  found, however far apart.

Both write the same rows, and an id is counted once, by whoever finds it first.

An id that no message gave itself was made from bytes: what says the same at another time is no conflict.
"""

import uuid
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

from hostler_common import db

_CONFLICTS: Final = "hashtext('hostler_usage.conflicts')"
# ids are random and few. A month that has just begun has no statistics, and a plan may be from when it was empty:
# left alone, the planner reads all of the month for every batch, or all of its key for every id.
_BY_INDEX: Final = (
    "SELECT set_config('enable_seqscan', 'off', true), set_config('jit', 'off', true),"
    " set_config('enable_hashjoin', 'off', true), set_config('enable_mergejoin', 'off', true)"
)
_AROUND: Final = timedelta(days=3)
_MONTHS: Final = 3  # of a batch that are looked at near: an import may hold years
_IDS_AT_ONCE: Final = 5000  # each is looked for in every month, and a statement has to end
_SEARCHER: Final = uuid.UUID(int=0)  # whoever searches does so alone: its tallies are one row's
_KEY: Final = "event_time, message_id, body_sha256"
_LAST_MONTH: Final = 9999 * 12 + 11  # months since the year 0; datetime has no later one

# the index of a month's message ids answers alone, or nearly. A month is named by its table: a condition on the time
# would have the planner take the key, which begins with it
_TWICE: Final = "SELECT message_id FROM ({}) AS found GROUP BY message_id HAVING count(*) > 1"
_OF_TABLE: Final = (
    "SELECT message_id FROM unnest($1::text[]) AS asked (message_id) JOIN {} USING (message_id)"
)
_TABLES: Final = "SELECT name FROM unnest($1::text[]) AS name WHERE to_regclass(name) IS NOT NULL"
# whoever is known to be in conflict is not looked for again: a sender may give one id to all it ever sends
_KNOWN: Final = (
    "SELECT message_id FROM unnest($1::text[]) AS asked (message_id)"
    " WHERE EXISTS (SELECT FROM event_conflict AS c WHERE c.message_id = asked.message_id)"
)
_NOTE: Final = """
WITH found AS MATERIALIZED (
    SELECT * FROM (
        SELECT message_id, event_time, body_sha256, seq, origin,
            bool_or(has_own_id) OVER (PARTITION BY message_id) AS is_given
        FROM unnest($1::text[]) AS asked (message_id) JOIN raw_event USING (message_id)
    ) AS stored WHERE is_given
), written AS (
    INSERT INTO event_conflict (message_id, event_time, body_sha256, seq)
    SELECT message_id, event_time, body_sha256, seq FROM found
    ORDER BY message_id, event_time, body_sha256
)
SELECT source, count(*) AS ids
FROM (SELECT message_id, max(seq) AS seq FROM found GROUP BY message_id) AS newest
JOIN found USING (message_id, seq) JOIN origin ON origin.id = found.origin GROUP BY source
"""
_NOTE_ARRIVED: Final = """
INSERT INTO event_conflict (message_id, event_time, body_sha256, seq)
SELECT message_id, event_time, body_sha256, e.seq
FROM arrived JOIN raw_event AS e USING (event_time, message_id, body_sha256)
WHERE message_id = ANY($1::text[]) ORDER BY message_id, event_time, body_sha256
ON CONFLICT DO NOTHING
"""


async def note_near(
    connection: db.Connection, message_ids: Iterable[str], moments: Iterable[datetime]
) -> int:
    """How many ids of a batch are in conflict from now on, as far as is seen in the months near by.

    The batch is stored, and in the table `arrived` (`store`). From here to its commit it is alone, so
    that of two at once the later sees what the other stored.
    """
    await _be_alone(connection)
    await connection.execute(_BY_INDEX)
    asked = set(message_ids)
    known = await _known(connection, asked)
    if known:
        await connection.execute(_NOTE_ARRIVED, known)
    tables = await connection.fetch(_TABLES, near_tables(moments))
    near = " UNION ALL ".join(
        _OF_TABLE.format(name) for name in ("raw_event_default", *(row["name"] for row in tables))
    )
    twice = await connection.fetch(_TWICE.format(near), list(asked.difference(known)))
    return sum((await _note(connection, [row["message_id"] for row in twice])).values())


def near_tables(moments: Iterable[datetime]) -> list[str]:
    """The names of the tables of these moments' months (in UTC), and of those of three days around, in order.

    Of moments in more than three months, those of the months with the fewest are left out.
    """
    held: dict[int, list[datetime]] = defaultdict(list)
    for moment in moments:
        held[moment.year * 12 + moment.month - 1].append(moment)
    chosen = sorted(held, key=lambda month: len(held[month]), reverse=True)[:_MONTHS]
    taken = set(chosen)
    for month in chosen:
        if min(held[month]) - _begin(month) < _AROUND:
            taken.add(month - 1)
        if _begin(month + 1) - max(held[month]) <= _AROUND:
            taken.add(month + 1)
    return [f"raw_event_{month // 12:04}_{month % 12 + 1:02}" for month in sorted(taken)]


def _begin(month: int) -> datetime:
    if month > _LAST_MONTH:
        return datetime.max.replace(tzinfo=UTC)
    return datetime(month // 12, month % 12 + 1, 1, tzinfo=UTC)


async def note_everywhere(
    connection: db.Connection, message_ids: Collection[str]
) -> Mapping[str, int]:
    """How many of these ids are in conflict from now on, by the source of the message that came last.

    Everything stored is searched, and they are counted with what was ingested. Whoever calls it for every
    message, once none with a lower `seq` can appear, misses no conflict.
    """
    await connection.execute(_BY_INDEX)
    unknown = await _unknown(connection, message_ids)
    twice: list[str] = []
    for first in range(0, len(unknown), _IDS_AT_ONCE):
        rows = await connection.fetch(
            _TWICE.format(_OF_TABLE.format("raw_event")), unknown[first : first + _IDS_AT_ONCE]
        )
        twice += [row["message_id"] for row in rows]
    if not twice:
        return {}
    # only now: whoever stores a batch meanwhile is waited for to write, and not for the search
    await _be_alone(connection)
    found = await _note(connection, await _unknown(connection, twice))
    await connection.executemany(
        "INSERT INTO ingest_tally AS t (source, hour, writer, stored, duplicate, conflict,"
        " unknown_type, problem) VALUES ($1, date_trunc('hour', now()), $2, 0, 0, $3, 0, 0)"
        " ON CONFLICT (source, hour, writer) DO UPDATE"
        " SET conflict = t.conflict + excluded.conflict",
        [(source, _SEARCHER, ids) for source, ids in sorted(found.items())],
    )
    return found


async def _be_alone(connection: db.Connection) -> None:
    await connection.execute(f"SELECT pg_advisory_xact_lock({_CONFLICTS})")


async def _known(connection: db.Connection, message_ids: Iterable[str]) -> list[str]:
    return [row["message_id"] for row in await connection.fetch(_KNOWN, list(message_ids))]


async def _unknown(connection: db.Connection, message_ids: Iterable[str]) -> list[str]:
    """Those of these ids that are not in conflict as far as is known."""
    asked = set(message_ids)
    return list(asked.difference(await _known(connection, asked)))


async def _note(connection: db.Connection, message_ids: Sequence[str]) -> dict[str, int]:
    """Every message of these ids, which were not known to be in conflict, has its row; the ids by source.

    An id counts for the source of the message that came last; one that no message gave itself is left out.
    """
    if not message_ids:
        return {}
    rows = await connection.fetch(_NOTE, message_ids)
    return {row["source"]: row["ids"] for row in rows}


async def forget_some(
    connection: db.Connection, before: datetime, after: tuple[datetime, str, bytes] | None
) -> tuple[datetime, str, bytes] | None:
    """Of the next rows of messages before a moment, those of ids that nothing is stored under are gone.

    Returns the last row that was looked at; None where there are no more.
    """
    await _be_alone(connection)
    await connection.execute(_BY_INDEX)
    begin = f"({_KEY}) > ($3, $4, $5)" if after is not None else "TRUE"
    rows = await connection.fetch(
        f"WITH page AS MATERIALIZED (SELECT {_KEY} FROM event_conflict"  # noqa: S608  constants of this module
        f"  WHERE event_time < $1 AND {begin} ORDER BY {_KEY} LIMIT $2),"
        " gone AS (DELETE FROM event_conflict AS c USING page"
        f"  WHERE (c.event_time, c.message_id, c.body_sha256)"
        "   = (page.event_time, page.message_id, page.body_sha256)"
        "  AND NOT EXISTS (SELECT FROM raw_event AS e WHERE e.message_id = c.message_id))"
        f" SELECT {_KEY} FROM page ORDER BY event_time DESC, message_id DESC, body_sha256 DESC LIMIT 1",
        before,
        _IDS_AT_ONCE,
        *(after or ()),
    )
    return tuple(rows[0]) if rows else None
