"""Which resources are to be folded (`touched`): a row for each stored batch, which names those it speaks of.

In a backlog the batches of many hours name the same resources, and a ledger that is made for one
batch of them is thrown away by the next. So whoever is about to fold a lot has each resource named
once (`gather`): its ledger is then made once for all that is stored by now, and what a backlog
costs grows as its messages do.
"""

from collections.abc import Sequence
from datetime import datetime
from itertools import repeat
from typing import Final

from hostler_common import db
from hostler_usage.reading.statement import ResourceKey

_ROWS: Final = 1000  # looked at at a time, for a statement and a transaction have to end
_FETCHED: Final = 4  # rows at a time: those that are seen are locked, and others may have them

_WAITING = (
    "SELECT coalesce(sum(cardinality(regions)), 0)"
    " FROM (SELECT regions FROM touched ORDER BY id LIMIT $1) AS oldest"
)
# a resource stays where it was named first, so that a row's number says the same as before: what had
# been touched by then is folded when no row of this number or a smaller one is left
_NAME_ONCE = """
WITH said AS (
    SELECT id, k.* FROM touched, unnest(regions, resource_types, resource_ids, oldest)
        AS k (region, resource_type, resource_id, oldest_of_it)
    WHERE id = ANY($1)
), once AS (
    SELECT min(id) AS id, region, resource_type, resource_id,
        CASE WHEN count(oldest_of_it) = count(*) THEN min(oldest_of_it) END AS oldest_of_it
    FROM said GROUP BY region, resource_type, resource_id
), kept AS (
    SELECT id, array_agg(region) AS regions, array_agg(resource_type) AS resource_types,
        array_agg(resource_id) AS resource_ids, array_agg(oldest_of_it) AS oldest
    FROM once GROUP BY id
), gone AS (
    DELETE FROM touched AS t WHERE id = ANY($1)
        AND NOT EXISTS (SELECT FROM kept WHERE kept.id = t.id)
), written AS (
    UPDATE touched AS t SET regions = kept.regions, resource_types = kept.resource_types,
        resource_ids = kept.resource_ids, oldest = kept.oldest
    FROM kept WHERE t.id = kept.id
)
SELECT count(*) FROM once
"""


async def gather(pool: db.Pool, limit: int) -> int:
    """Where more than `limit` wait, each is named once afterwards; return how many wait, or a little more.

    Of a very long backlog it is the oldest part. What another process is folding is left alone.

    Raises:
        DatabaseUnavailable: nothing was changed.
    """
    async with db.transaction(pool) as connection:
        waiting: int = await connection.fetchval(_WAITING, _ROWS)
        if waiting <= limit:
            return waiting
        # a statement of its own: the next one sees what is in the rows now that nobody changes them
        rows = await connection.fetch(
            "SELECT id FROM touched ORDER BY id LIMIT $1 FOR UPDATE SKIP LOCKED", _ROWS
        )
        gathered: int = await connection.fetchval(_NAME_ONCE, [row["id"] for row in rows])
    return gathered


async def take(
    connection: db.Connection, limit: int
) -> tuple[list[int], dict[ResourceKey, datetime | None]]:
    """The oldest rows that name about `limit` resources, and since when there is news of each.

    None: it is not known since when. The caller's transaction holds the rows, and deletes them.
    """
    taken: list[int] = []
    touched: dict[ResourceKey, datetime | None] = {}
    waiting = await connection.cursor(
        "SELECT id, regions, resource_types, resource_ids, oldest FROM touched"
        " ORDER BY id LIMIT $1 FOR UPDATE SKIP LOCKED",
        _ROWS,
    )
    while rows := await waiting.fetch(_FETCHED):
        for number, regions, kinds, names, oldest in rows:
            keys = [ResourceKey(*key) for key in zip(regions, kinds, names, strict=True)]
            more = sum(key not in touched for key in keys)
            if taken and len(touched) + more > limit:
                return taken, touched
            taken.append(number)
            for key, moment in zip(keys, oldest or repeat(None), strict=False):
                known = touched.get(key, moment)
                touched[key] = min(known, moment) if known and moment else None
    return taken, touched


async def forget(connection: db.Connection, taken: Sequence[int]) -> None:
    """What these rows name is folded."""
    await connection.execute("DELETE FROM touched WHERE id = ANY($1)", taken)
