"""All SQL of replicas as keepers of images: which is there, and what one has that is gone."""

from collections.abc import Collection
from typing import Final
from uuid import UUID

from hostler_common import db
from hostler_precache.store import HELD
from hostler_precache.transfer.manifest import BlobId

BLOBS_AT_ONCE: Final = 20


class ReplicaStore:
    """Seeds in the schema `precache`."""

    def __init__(self, pool: db.Pool) -> None:
        self._pool = pool

    async def beat(self, seed: str) -> None:
        """This seed is there."""
        async with db.transaction(self._pool) as connection:
            await connection.execute(
                "INSERT INTO seed (seed) VALUES ($1)"
                " ON CONFLICT (seed) DO UPDATE SET seen_at = now()",
                seed,
            )

    async def blobs_of(self, seed: str) -> set[BlobId]:
        """What this seed has on its disk, or is fetching."""
        async with db.connection(self._pool) as connection:
            rows = await connection.fetch(
                "SELECT blob_id FROM blob WHERE seed = $1 AND state IN ('fetching', 'ready')", seed
            )
        return {BlobId(str(row["blob_id"])) for row in rows}

    async def served_again(
        self, seed: str, seed_url: str, blob_ids: Collection[BlobId]
    ) -> set[BlobId]:
        """Hosts get these complete blobs from this seed at this URL, if they are its own.

        Returns:
            Those of which others had said that it serves them no more, since it was silent.
        """
        async with db.transaction(self._pool) as connection:
            rows = await connection.fetch(
                "UPDATE blob SET seed_url = $2 WHERE seed = $1 AND seed_url IS NULL"
                "   AND state = 'ready' AND blob_id = ANY ($3::uuid[]) RETURNING blob_id",
                seed,
                seed_url,
                [UUID(one) for one in blob_ids],
            )
        return {BlobId(str(row["blob_id"])) for row in rows}

    async def blobs_of_the_gone(self, *, silent_seconds: float) -> list[UUID]:
        """Complete blobs that hosts wait for, and nobody sends: neither their seed nor a host; a few.

        Whoever was not there for so long is gone.
        """
        async with db.connection(self._pool) as connection:
            rows = await connection.fetch(
                "SELECT blob_id FROM blob JOIN seed USING (seed) WHERE blob.state = 'ready'"  # noqa: S608  the clause is ours
                "   AND CASE WHEN blob.seed_url IS NULL"
                f"    THEN NOT {HELD} ELSE seed.seen_at < now() - make_interval(secs => $2) END"
                "   AND EXISTS (SELECT 1 FROM distribution d WHERE d.blob_id = blob.blob_id"
                "     AND d.state = 'distributing') ORDER BY blob_id LIMIT $1",
                BLOBS_AT_ONCE,
                silent_seconds,
            )
        return [row["blob_id"] for row in rows]
