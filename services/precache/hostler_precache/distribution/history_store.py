"""All SQL of what is over for so long that nobody asks about it: it is dropped, a few rows at a time.

Over is what failed or was cancelled, and what is done and wanted by a younger distribution of the
same image on the same hosts as well. Any other that is done is still wanted: its hosts keep the
image because of it. Blobs go when no distribution knows them any more, images that were deleted at
their source when neither knows them, hosts when nobody has heard of them for as long.
"""

from typing import Final
from uuid import UUID

from hostler_common import db

DISTRIBUTIONS_AT_ONCE: Final = 20
ROWS_AT_ONCE: Final = 5000

_OVER = (
    "SELECT d.distribution_id FROM distribution d WHERE d.finished_at IS NOT NULL"
    "   AND greatest(d.finished_at, d.cancelled_at) < now() - make_interval(days => $1)"
    "   AND (d.state IN ('error', 'cancelled')"
    "     OR d.state = 'done' AND d.policy_id IS NULL AND d.percent IS NULL"
    "       AND EXISTS (SELECT 1 FROM distribution again WHERE again.image_id = d.image_id"
    "         AND again.state = 'done' AND again.percent IS NULL AND again.wave >= d.wave"
    "         AND (again.hosts, again.labels) IS NOT DISTINCT FROM (d.hosts, d.labels)"
    "         AND (again.created_at, again.distribution_id) > (d.created_at, d.distribution_id)))"
    # hosts are told for a week, by these rows
    "   AND NOT EXISTS (SELECT 1 FROM image WHERE image.image_id = d.image_id"
    "     AND image.deleted_at > now() - interval '7 days')"
    " ORDER BY greatest(d.finished_at, d.cancelled_at) LIMIT $2 FOR UPDATE OF d SKIP LOCKED"
)


class HistoryStore:
    """What is over, in the schema `precache`."""

    def __init__(
        self,
        pool: db.Pool,
        *,
        distributions_at_once: int = DISTRIBUTIONS_AT_ONCE,
        rows_at_once: int = ROWS_AT_ONCE,
    ) -> None:
        self._pool = pool
        self._distributions_at_once = distributions_at_once
        self._rows_at_once = rows_at_once

    @property
    def pool(self) -> db.Pool:
        """For transactions that span calls."""
        return self._pool

    async def forget_distributions(self, *, days: int) -> int | None:
        """Some of what has been over for so many days is gone, in one transaction of bounded size.

        Hosts' rows and transfers go first, so that no statement takes thousands of them with a
        distribution. What another replica is dropping is left to it.

        Returns:
            How many distributions are gone, or None where there is nothing left to drop.
        """
        async with db.transaction(self._pool) as connection:
            rows = await connection.fetch(_OVER, days, self._distributions_at_once)
            over = [row["distribution_id"] for row in rows]
            if not over:
                return None
            left = self._rows_at_once
            for table in ("distribution_host", "transfer"):
                left -= await self._drop(connection, table, over, at_most=left)
            if left <= 0:
                return 0
            await connection.execute(
                "DELETE FROM distribution WHERE distribution_id = ANY ($1::uuid[])", over
            )
        return len(over)

    async def _drop(
        self, connection: db.Connection, table: str, over: list[UUID], *, at_most: int
    ) -> int:
        """How many rows of these distributions are gone."""
        if at_most <= 0:
            return 0
        status = await connection.execute(
            f"DELETE FROM {table} WHERE ctid = ANY (ARRAY (SELECT ctid FROM {table}"  # noqa: S608  the table is ours
            "   WHERE distribution_id = ANY ($1::uuid[]) LIMIT $2))",
            over,
            at_most,
        )
        return int(status.removeprefix("DELETE "))

    async def forget_hosts(
        self, connection: db.Connection, *, days: int
    ) -> tuple[list[str], set[UUID]]:
        """Hosts that were not heard of for so many days are gone, a few at once.

        Distributions to labels are to the hosts there are: those are gone from them, too. A host that
        comes back joins them again. Distributions to hosts by name wait for them on.

        Returns:
            The hosts, and the distributions that they are gone from.
        """
        rows = await connection.fetch(
            "DELETE FROM host WHERE host = ANY (ARRAY (SELECT host FROM host"
            "   WHERE seen_at < now() - make_interval(days => $1)"
            "   ORDER BY host LIMIT $2 FOR UPDATE SKIP LOCKED)) RETURNING host",
            days,
            self._distributions_at_once,
        )
        gone = sorted(row["host"] for row in rows)
        left = await connection.fetch(
            "DELETE FROM distribution_host h USING distribution d"
            " WHERE d.distribution_id = h.distribution_id AND d.hosts IS NULL"
            "   AND h.host = ANY ($1::text[]) RETURNING h.distribution_id",
            gone,
        )
        return gone, {row["distribution_id"] for row in left}

    async def forget_blobs(self, *, days: int) -> int:
        """Blobs that are nobody's, and deleted images without any, are gone; how many, a few at once."""
        async with db.transaction(self._pool) as connection:
            blobs = await connection.fetch(
                "DELETE FROM blob WHERE blob_id = ANY (ARRAY (SELECT blob_id FROM blob b"
                "   WHERE state = 'error' AND created_at < now() - make_interval(days => $1)"
                "     AND NOT EXISTS (SELECT 1 FROM distribution d WHERE d.blob_id = b.blob_id)"
                "   ORDER BY blob_id LIMIT $2 FOR UPDATE SKIP LOCKED)) RETURNING blob_id",
                days,
                self._distributions_at_once,
            )
            images = await connection.fetch(
                "DELETE FROM image WHERE image_id = ANY (ARRAY (SELECT image_id FROM image i"
                "   WHERE deleted_at < now() - make_interval(days => $1)"
                "     AND NOT EXISTS (SELECT 1 FROM blob b WHERE b.image_id = i.image_id)"
                "     AND NOT EXISTS (SELECT 1 FROM distribution d WHERE d.image_id = i.image_id)"
                "   ORDER BY image_id LIMIT $2 FOR UPDATE SKIP LOCKED)) RETURNING image_id",
                days,
                self._distributions_at_once,
            )
        return len(blobs) + len(images)
