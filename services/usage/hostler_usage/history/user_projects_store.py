"""In which projects users had something: what has to be read to know what they used.

By a price that has tiers, what a user's share costs depends on all that its projects used; so the
question is narrowed to projects, and no further.
"""

from collections.abc import Collection
from datetime import datetime
from typing import Final

from hostler_common import db

# what moved is a user's by the interval of its moment, and may be counted to a project of its own
_PROJECTS: Final = """
WITH theirs AS (
    SELECT resource_id, resource_type, region, starts_at, ends_at, project_id FROM usage_interval
     WHERE user_id = ANY($1) AND starts_at < $3 AND (ends_at IS NULL OR ends_at > $2)
)
SELECT project_id FROM theirs
 UNION
SELECT a.project_id FROM theirs AS t
  JOIN usage_amount AS a USING (resource_id, resource_type, region)
 WHERE a.at >= $2 AND a.at < $3 AND a.at >= t.starts_at AND (t.ends_at IS NULL OR a.at < t.ends_at)
"""


async def projects_of(
    pool: db.Pool, users: Collection[str], start: datetime, end: datetime
) -> set[str | None]:
    """The projects in which any of the users held or moved something in `[start, end)`.

    None is among them where something of theirs is of no known project.

    Raises:
        DatabaseUnavailable: the database is away.
    """
    if not users:
        return set()
    async with db.connection(pool) as connection:
        rows = await connection.fetch(_PROJECTS, sorted(users), start, end)
    return {row["project_id"] for row in rows}
