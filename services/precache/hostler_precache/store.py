"""All SQL of the service.

Each function is one transaction unless it takes a connection; events and fanouts are put into
the outbox inside it. Times are the database's.
"""

import asyncio
import uuid
from collections.abc import Collection, Sequence
from typing import Final
from uuid import UUID

import asyncpg

from hostler_common import db, errors, outbox
from hostler_common.bus import Message
from hostler_precache.distribution.distributions import (
    BlobRecord,
    BlobState,
    DistributionId,
    FetchTask,
    Growth,
    ImageRecord,
)
from hostler_precache.images import Image, SourceHash, Verification
from hostler_precache.protocol import HostState
from hostler_precache.transfer import manifest as manifests
from hostler_precache.transfer.manifest import BlobId, ImageId, Manifest

MAX_BIGINT: Final = 2**63 - 1
# Whether a host that was heard of in the last $2 seconds has the whole of `blob`: by its own word,
# so one that says so and sends nothing keeps a blob without a seed from being fetched again.
HELD: Final = (
    "EXISTS (SELECT 1 FROM distribution d JOIN distribution_host h USING (distribution_id)"
    "   JOIN host ON host.host = h.host WHERE d.blob_id = blob.blob_id"
    "     AND d.state IN ('distributing', 'done') AND h.state IN ('cached', 'existing')"
    "     AND host.seen_at > now() - make_interval(secs => $2))"
)


class ImageNotFound(errors.NotFound):
    """No lister and no request has named this image."""

    code = "precache.image.not_found"


class ImageDiffers(errors.Conflict):
    """An image of this id is known with another source or hash."""

    code = "precache.image.differs"


class BlobNotFound(errors.NotFound):
    """There is no such blob, or it is not complete yet."""

    code = "precache.blob.not_found"


class Store:
    """The schema `precache`."""

    def __init__(self, pool: db.Pool) -> None:
        self._pool = pool

    @property
    def pool(self) -> db.Pool:
        """For transactions that span calls."""
        return self._pool

    # --- images

    async def add_image(self, connection: db.Connection, image: Image) -> None:
        """The image is known. What a lister learns later of an image nobody has fetched is kept.

        Raises:
            ImageDiffers: it is known with another source, size or hash, and its bytes are here.
            Unstorable: it is none that there can be.
        """
        if image.size_bytes is not None and image.size_bytes < 0:  # listers are plugins
            raise db.Unstorable(f"{image.size_bytes} bytes are no size of an image")
        known = image.source_hash
        values = (
            image.image_id, image.name, image.fetcher, image.location, image.size_bytes,
            image.disk_format, known and known.algorithm, known and known.value,
        )  # fmt: skip
        row = await connection.fetchrow(
            "INSERT INTO image AS old (image_id, name, fetcher, location, size_bytes, disk_format,"
            "   hash_algorithm, hash_value)"
            " VALUES ($1, $2, $3, $4, $5, $6, $7, $8)"
            " ON CONFLICT (image_id) DO UPDATE SET name = excluded.name,"
            "   fetcher = excluded.fetcher, location = excluded.location,"
            "   size_bytes = excluded.size_bytes, disk_format = excluded.disk_format,"
            "   hash_algorithm = excluded.hash_algorithm, hash_value = excluded.hash_value,"
            "   deleted_at = NULL"
            " WHERE (old.fetcher, old.location, old.hash_value)"
            "     IS NOT DISTINCT FROM (excluded.fetcher, excluded.location, excluded.hash_value)"
            "   OR NOT EXISTS (SELECT 1 FROM blob WHERE blob.image_id = old.image_id"
            "     AND blob.state <> 'error')"
            " RETURNING image_id",
            *values,
        )
        if row is None:
            raise ImageDiffers(
                f"image {image.image_id} is known with another source or hash: use another id"
            )

    async def image_deleted(self, connection: db.Connection, image_id: str) -> BlobId | None:
        """The image is deleted at its source: its distributions are over, and hosts are told.

        Returns:
            Its blob, if there is one.

        Raises:
            ImageNotFound: nobody has named the image.
        """
        status = await connection.execute(
            "UPDATE image SET deleted_at = coalesce(deleted_at, now()) WHERE image_id = $1",
            image_id,
        )
        if status == "UPDATE 0":
            raise ImageNotFound(f"no image {image_id}")
        await connection.execute(
            "UPDATE distribution SET state = 'cancelled', reason = 'image.deleted',"
            "   cancelled_at = now(), finished_at = coalesce(finished_at, now())"
            " WHERE image_id = $1 AND state IN ('fetching', 'distributing', 'done')",
            image_id,
        )
        blob_id = await connection.fetchval(
            "SELECT blob_id FROM blob WHERE image_id = $1 AND state IN ('fetching', 'ready')",
            image_id,
        )
        return None if blob_id is None else BlobId(str(blob_id))

    async def image(self, image_id: str) -> ImageRecord:
        """The image.

        Raises:
            ImageNotFound: there is none.
        """
        rows = await self._images("WHERE image.image_id = $1", image_id)
        if not rows:
            raise ImageNotFound(f"no image {image_id}")
        return rows[0]

    async def images(self, *, limit: int, marker: str | None) -> list[ImageRecord]:
        """Images by id, after the marker."""
        return await self._images(
            "WHERE $2::text IS NULL OR image.image_id > $2 ORDER BY image.image_id LIMIT $1",
            limit,
            marker,
        )

    async def _images(self, clause: str, *values: object) -> list[ImageRecord]:
        async with db.connection(self._pool) as connection:
            rows = await connection.fetch(
                "SELECT image.*, blob.image_id AS blob_image, blob.blob_id, blob.state,"  # noqa: S608  the clause is ours
                "   blob.reason, blob.seed, blob.seed_url, blob.swarm_key, blob.fetched_bytes,"
                "   blob.size_bytes AS blob_size, blob.root, blob.verification"
                " FROM image LEFT JOIN LATERAL (SELECT * FROM blob"
                "   WHERE blob.image_id = image.image_id ORDER BY created_at DESC LIMIT 1) blob"
                f" ON true {clause}",
                *values,
            )
        return [
            ImageRecord(
                image=_image(row),
                blob=blob_record(row, size="blob_size") if row["blob_id"] else None,
                created_at=row["created_at"],
            )
            for row in rows
        ]

    # --- fetching

    async def claim_fetch(
        self,
        *,
        seed: str,
        seed_url: str,
        swarm_key: bytes,
        lease_seconds: float,
        but: Collection[BlobId] = (),
    ) -> FetchTask | None:
        """An image that somebody waits for and nobody fetches, now leased to this seed.

        That is one without a live blob, or one whose fetching replica has fallen silent or waits
        to try again; but none of those that this seed is fetching: after the database was away, their
        leases are over.
        """
        async with db.transaction(self._pool) as connection:
            row = await connection.fetchrow(
                "UPDATE blob SET seed = $1, seed_url = $2, attempts = attempts + 1,"
                "   lease_until = now() + make_interval(secs => $3), fetched_bytes = 0"
                " WHERE blob_id = (SELECT blob_id FROM blob WHERE state = 'fetching'"
                "   AND lease_until < now() AND NOT (seed = $1 AND blob_id = ANY ($4::uuid[]))"
                "   ORDER BY lease_until LIMIT 1 FOR UPDATE SKIP LOCKED)"
                " RETURNING blob_id, image_id, attempts, swarm_key",
                seed, seed_url, lease_seconds, [UUID(one) for one in but],
            )  # fmt: skip
            if row is None:
                row = await connection.fetchrow(
                    "INSERT INTO blob (blob_id, image_id, state, seed, seed_url, swarm_key,"
                    "   lease_until)"
                    " SELECT $5, image_id, 'fetching', $1, $2, $4,"
                    "   now() + make_interval(secs => $3) FROM distribution d"
                    " WHERE state = 'fetching' AND NOT EXISTS (SELECT 1 FROM blob"
                    "   WHERE blob.image_id = d.image_id AND blob.state IN ('fetching', 'ready'))"
                    " ORDER BY priority DESC, created_at LIMIT 1"
                    " ON CONFLICT (image_id) WHERE state IN ('fetching', 'ready') DO NOTHING"
                    " RETURNING blob_id, image_id, attempts, swarm_key",
                    seed, seed_url, lease_seconds, swarm_key, uuid.uuid4(),
                )  # fmt: skip
            if row is None:
                return None
            image = await connection.fetchrow(
                "SELECT * FROM image WHERE image_id = $1", row["image_id"]
            )
            told = await self._growth(connection, row["blob_id"], 0)
        assert image is not None
        return FetchTask(
            blob_id=BlobId(str(row["blob_id"])),
            image=_image(image),
            swarm_key=bytes(row["swarm_key"]),
            attempts=row["attempts"],
            told=told,
        )

    async def renew_fetch(
        self, blob_id: BlobId, *, seed: str, fetched_bytes: int, lease_seconds: float
    ) -> bool:
        """Whether the lease is still this seed's; it is, then, for so many seconds more."""
        async with db.transaction(self._pool) as connection:
            status = await connection.execute(
                "UPDATE blob SET fetched_bytes = $3,"
                "   lease_until = now() + make_interval(secs => $4)"
                " WHERE blob_id = $1 AND seed = $2 AND state = 'fetching'",
                UUID(blob_id), seed, fetched_bytes, lease_seconds,
            )  # fmt: skip
        return status != "UPDATE 0"

    async def grow(
        self,
        connection: db.Connection,
        task: FetchTask,
        *,
        seed: str,
        growth: Growth,
        begins: bool,
    ) -> tuple[BlobRecord, list[DistributionId]] | None:
        """Hosts are told of more pieces of a blob that is being fetched.

        When that `begins`, the distributions that wait for the image are distributing it.

        Returns:
            The blob and those distributions, or None when another replica, or another attempt, has
            taken the fetch over.
        """
        if begins:
            await self._hold_image(connection, task.blob_id)
        row = await connection.fetchrow(
            "UPDATE blob SET size_bytes = $4, piece_bytes = $5,"
            "   fetched_bytes = greatest(fetched_bytes, least($4::bigint, $6::bigint * $5::integer))"
            " WHERE blob_id = $1 AND seed = $2 AND attempts = $3 AND state = 'fetching'"
            " RETURNING *, image_id AS blob_image",
            UUID(task.blob_id), seed, task.attempts, growth.size_bytes, growth.piece_bytes,
            growth.first_piece + len(growth.digests) // manifests.DIGEST_BYTES,
        )  # fmt: skip
        if row is None:
            return None
        await connection.execute(
            # again, and perhaps more, when it is not known whether this was committed before
            "INSERT INTO blob_growth (blob_id, first_piece, digests) VALUES ($1, $2, $3)"
            " ON CONFLICT (blob_id, first_piece) DO UPDATE SET digests = excluded.digests",
            UUID(task.blob_id), growth.first_piece, growth.digests,
        )  # fmt: skip
        begun = await self._distribute(connection, task.blob_id) if begins else []
        return blob_record(row), begun

    async def growth(self, blob_id: UUID, *, after: int) -> Growth:
        """What hosts are to know of the blob's pieces from number `after` on.

        Raises:
            BlobNotFound: it is not served, or not any more.
        """
        async with db.transaction(self._pool) as connection:
            # in this order: it may be complete in between, and is never incomplete again
            growing = await self._growth(connection, blob_id, after)
            if growing is not None:
                return growing
            body = await connection.fetchval(
                "SELECT manifest FROM blob WHERE blob_id = $1 AND state = 'ready'", blob_id
            )
        if body is None:
            raise BlobNotFound(f"no pieces of blob {blob_id} are told")
        # in a thread: of terabytes it has megabytes
        listed = await asyncio.to_thread(manifests.parse, bytes(body))
        return Growth(
            size_bytes=listed.size_bytes,
            piece_bytes=listed.piece_bytes,
            first_piece=after,
            digests=listed.digests[after * manifests.DIGEST_BYTES :],
            root=listed.root,
        )

    async def _growth(self, connection: db.Connection, blob_id: UUID, after: int) -> Growth | None:
        # one statement, so that what is told and whether it still holds are of one moment
        rows = await connection.fetch(
            "SELECT blob.size_bytes, blob.piece_bytes, g.first_piece, g.digests FROM blob"
            " LEFT JOIN blob_growth g ON g.blob_id = blob.blob_id"
            "   AND g.first_piece + length(g.digests) / $3 > $2"
            " WHERE blob.blob_id = $1 AND blob.is_served AND blob.state = 'fetching'"
            " ORDER BY g.first_piece",
            blob_id, after, manifests.DIGEST_BYTES,
        )  # fmt: skip
        if not rows:
            return None
        runs = [row for row in rows if row["digests"] is not None]
        # the first run may begin with what is known
        known = (after - runs[0]["first_piece"]) * manifests.DIGEST_BYTES if runs else 0
        return Growth(
            size_bytes=rows[0]["size_bytes"],
            piece_bytes=rows[0]["piece_bytes"],
            first_piece=after,
            digests=b"".join(bytes(row["digests"]) for row in runs)[known:],
            root=None,
        )

    async def fetch_begins_anew(
        self, task: FetchTask, *, seed: str, seed_url: str, swarm_key: bytes, reason: str
    ) -> None:
        """The bytes are not those that hosts were told of: they are fetched as another blob.

        What hosts have of the old one is of no use any more. The attempts go on counting.
        """
        async with db.transaction(self._pool) as connection:
            await self._hold_image(connection, task.blob_id)
            row = await connection.fetchrow(
                "UPDATE blob SET state = 'error', reason = $4 WHERE blob_id = $1 AND seed = $2"
                "   AND attempts = $3 AND state = 'fetching' RETURNING image_id",
                UUID(task.blob_id), seed, task.attempts, reason,
            )  # fmt: skip
            if row is None:
                return
            await self._forget_growth(connection, task.blob_id)
            await self._recall(connection, task.blob_id)
            await connection.execute(
                "INSERT INTO blob (blob_id, image_id, state, seed, seed_url, swarm_key, attempts,"
                "   reason, lease_until) VALUES ($1, $2, 'fetching', $3, $4, $5, $6, $7, now())",
                uuid.uuid4(), row["image_id"], seed, seed_url, swarm_key, task.attempts, reason,
            )  # fmt: skip

    async def _hold_image(self, connection: db.Connection, blob_id: BlobId) -> None:
        """A distribution that is being made of it is waited for: it sees the blob, or is seen after."""
        await connection.execute(
            "SELECT 1 FROM image WHERE image_id ="
            "   (SELECT image_id FROM blob WHERE blob_id = $1) FOR NO KEY UPDATE",
            UUID(blob_id),
        )

    async def _distribute(
        self, connection: db.Connection, blob_id: BlobId
    ) -> list[DistributionId]:
        rows = await connection.fetch(
            "UPDATE distribution d SET state = 'distributing', blob_id = blob.blob_id,"
            "   announced_at = now() FROM blob"
            " WHERE blob.blob_id = $1 AND d.image_id = blob.image_id AND d.state = 'fetching'"
            " RETURNING distribution_id",
            UUID(blob_id),
        )
        return [DistributionId(row["distribution_id"]) for row in rows]

    async def _recall(self, connection: db.Connection, blob_id: BlobId) -> None:
        """Whoever distributes the blob waits for the image again; hosts say anew what they have.

        What is done is not done with: hosts come later, and those that have it are told to keep it.
        """
        await self._reset_hosts(connection, blob_id, [state.value for state in HostState])
        await connection.execute(
            "UPDATE distribution SET state = 'fetching', blob_id = NULL, announced_at = NULL,"
            "   finished_at = NULL WHERE blob_id = $1 AND state IN ('distributing', 'done')",
            UUID(blob_id),
        )

    async def _reset_hosts(
        self, connection: db.Connection, blob_id: BlobId, states: Sequence[str]
    ) -> None:
        await connection.execute(
            "UPDATE distribution_host SET state = 'waiting', reason = NULL, pieces_done = 0,"
            "   bytes_done = 0, coverage = '', started_at = NULL, finished_at = NULL"
            " WHERE distribution_id IN (SELECT distribution_id FROM distribution"
            "   WHERE blob_id = $1 AND state IN ('distributing', 'done')) AND state = ANY ($2)",
            UUID(blob_id),
            states,
        )

    async def _forget_growth(self, connection: db.Connection, blob_id: BlobId) -> None:
        await connection.execute("DELETE FROM blob_growth WHERE blob_id = $1", UUID(blob_id))

    async def fetch_finished(
        self,
        connection: db.Connection,
        blob_id: BlobId,
        *,
        seed: str,
        manifest: Manifest,
        verification: Verification,
        disk_format: str,
    ) -> list[DistributionId] | None:
        """The blob is ready and the distributions that waited for it are distributing.

        Returns:
            Those distributions, or None when another replica has taken the fetch over.
        """
        await self._hold_image(connection, blob_id)
        status = await connection.execute(
            "UPDATE blob SET state = 'ready', reason = NULL, size_bytes = $3, fetched_bytes = $3,"
            "   root = $4, manifest = $5, verification = $6, disk_format = $7, ready_at = now()"
            " WHERE blob_id = $1 AND seed = $2 AND state = 'fetching'",
            UUID(blob_id), seed, manifest.size_bytes, manifest.root, manifest.to_json(),
            verification.value, disk_format,
        )  # fmt: skip
        if status == "UPDATE 0":
            return None
        await self._forget_growth(connection, blob_id)
        begun = await self._distribute(connection, blob_id)
        await connection.execute(
            "UPDATE distribution SET failures = 0 WHERE blob_id = $1 AND failures > 0",
            UUID(blob_id),
        )
        return begun

    async def is_finished(
        self, connection: db.Connection, blob_id: BlobId, *, seed: str, root: bytes
    ) -> bool:
        """Whether this very result is stored: by a commit whose answer was lost."""
        found: bool = await connection.fetchval(
            "SELECT EXISTS (SELECT FROM blob"
            " WHERE blob_id = $1 AND seed = $2 AND root = $3 AND state = 'ready')",
            UUID(blob_id), seed, root,
        )  # fmt: skip
        return found

    async def fetch_failed(
        self,
        blob_id: BlobId,
        *,
        seed: str,
        reason: str,
        retry_seconds: float | None,
        messages: Sequence[Message] = (),
    ) -> None:
        """The fetch is tried again after a time, or, without one, it and its distributions fail.

        What hosts have of it stays of use in the one case, and is nothing in the other.
        """
        async with db.transaction(self._pool) as connection:
            await self._hold_image(connection, blob_id)
            row = await connection.fetchrow(
                "UPDATE blob SET state = CASE WHEN $4::float8 IS NULL THEN 'error'"
                "     ELSE 'fetching' END,"
                "   reason = $3, lease_until = now() + make_interval(secs => coalesce($4, 0))"
                " WHERE blob_id = $1 AND seed = $2 AND state = 'fetching' RETURNING image_id",
                UUID(blob_id), seed, reason, retry_seconds,
            )  # fmt: skip
            if row is None or retry_seconds is not None:
                return
            await self._forget_growth(connection, blob_id)
            await self._reset_hosts(connection, blob_id, ["waiting", "transferring"])
            await connection.execute(
                "UPDATE distribution SET state = 'error', reason = $2, last_failure = $2,"
                "   failures = failures + 1, finished_at = now()"
                " WHERE (image_id = $1 AND state = 'fetching')"
                "   OR (blob_id = $3 AND state IN ('distributing', 'done'))",
                row["image_id"], reason, UUID(blob_id),
            )  # fmt: skip
            await outbox.add(connection, messages)

    async def fetches_of(self, seed: str) -> set[BlobId]:
        """What this seed is fetching, or is to try again unless another one does."""
        async with db.connection(self._pool) as connection:
            rows = await connection.fetch(
                "SELECT blob_id FROM blob WHERE seed = $1 AND state = 'fetching'", seed
            )
        return {BlobId(str(row["blob_id"])) for row in rows}

    async def seed_blobs(self, seed: str) -> list[BlobRecord]:
        """The complete blobs that this seed has on its disk."""
        async with db.connection(self._pool) as connection:
            rows = await connection.fetch(
                "SELECT *, image_id AS blob_image FROM blob WHERE seed = $1 AND state = 'ready'",
                seed,
            )
        return [blob_record(row) for row in rows]

    async def seed_started(self, seed: str, seed_url: str) -> None:
        """The seed is reached at this URL, and what it was fetching when it died may be claimed."""
        async with db.transaction(self._pool) as connection:
            await connection.execute(
                "UPDATE blob SET seed_url = $2 WHERE seed = $1 AND seed_url IS DISTINCT FROM $2",
                seed,
                seed_url,
            )
            await connection.execute(
                "UPDATE blob SET lease_until = now() WHERE seed = $1 AND state = 'fetching'"
                "   AND lease_until > now()",
                seed,
            )

    async def served_blob(self, connection: db.Connection, image_id: str) -> BlobRecord:
        """The blob of an image whose pieces hosts may fetch: all of them, or those that have come.

        Raises:
            BlobNotFound: there is none.
        """
        row = await connection.fetchrow(
            "SELECT *, image_id AS blob_image FROM blob WHERE image_id = $1 AND is_served",
            image_id,
        )
        if row is None:
            raise BlobNotFound(f"no blob of image {image_id} is served")
        return blob_record(row)

    async def retire_blobs(self, seed: str, *, idle_seconds: float) -> list[BlobId]:
        """Blobs that this seed need not keep any more are given up; returns them.

        Those of deleted images, and those that no distribution has wanted for so long.
        """
        async with db.transaction(self._pool) as connection:
            # not those that a distribution is being made of; what is locked is looked at afterwards,
            # since a statement that waits for a lock goes on with what it saw before
            idle = await connection.fetch(
                "SELECT blob_id FROM blob WHERE seed = $1 AND state = 'ready'"
                " ORDER BY blob_id FOR UPDATE SKIP LOCKED",
                seed,
            )
            rows = await connection.fetch(
                "UPDATE blob SET state = 'error', reason = 'retired' FROM image"
                " WHERE image.image_id = blob.image_id AND blob.blob_id = ANY ($1::uuid[])"
                "   AND NOT EXISTS (SELECT 1 FROM distribution d WHERE d.blob_id = blob.blob_id"
                "     AND (d.state IN ('fetching', 'distributing', 'done')"
                "       OR greatest(d.finished_at, d.cancelled_at) > now() - make_interval(secs => $2)"
                "         AND image.deleted_at IS NULL))"
                "   AND (image.deleted_at IS NOT NULL"
                "     OR blob.ready_at < now() - make_interval(secs => $2))"
                " RETURNING blob.blob_id",
                [row["blob_id"] for row in idle],
                idle_seconds,
            )
        return [BlobId(str(row["blob_id"])) for row in rows]

    async def blob_lost(self, blob_id: BlobId, *, reason: str, silent_seconds: float) -> bool:
        """The seed's copy is gone or damaged: whoever waits for it gets it from hosts, or it is fetched again.

        Args:
            blob_id: of a complete one.
            reason: why it is fetched again.
            silent_seconds: who was not heard of for so long has nothing.

        Returns:
            Whether it is fetched again, since no host has it.
        """
        async with db.transaction(self._pool) as connection:
            held = await connection.fetchval(
                "UPDATE blob SET seed_url = NULL WHERE blob_id = $1 AND state = 'ready'"  # noqa: S608  the clause is ours
                f"  AND {HELD} RETURNING true",
                UUID(blob_id),
                silent_seconds,
            )
            if held:
                return False
            await connection.execute(
                "UPDATE blob SET state = 'error', reason = $2 WHERE blob_id = $1",
                UUID(blob_id),
                reason,
            )
            await self._recall(connection, blob_id)
        return True

    async def manifest(self, blob_id: UUID) -> bytes:
        """The manifest of a complete blob.

        Raises:
            BlobNotFound: there is none.
        """
        async with db.connection(self._pool) as connection:
            body = await connection.fetchval(
                "SELECT manifest FROM blob WHERE blob_id = $1 AND state = 'ready'", blob_id
            )
        if body is None:
            raise BlobNotFound(f"no complete blob {blob_id}")
        return bytes(body)

    async def announce(self, connection: db.Connection, messages: Sequence[Message]) -> None:
        """The messages leave when the transaction commits."""
        await outbox.add(connection, messages)


def _image(row: asyncpg.Record) -> Image:
    return Image(
        image_id=ImageId(row["image_id"]),
        fetcher=row["fetcher"],
        location=row["location"],
        name=row["name"],
        size_bytes=row["size_bytes"],
        disk_format=row["disk_format"],
        source_hash=SourceHash(algorithm=row["hash_algorithm"], value=row["hash_value"])
        if row["hash_value"]
        else None,
    )


def blob_record(row: asyncpg.Record, *, size: str = "size_bytes") -> BlobRecord:
    """A row of `blob`, joined under `blob_image` for its image, as a value."""
    return BlobRecord(
        blob_id=BlobId(str(row["blob_id"])),
        image_id=row["blob_image"],
        state=BlobState(row["state"]),
        reason=row["reason"],
        seed=row["seed"],
        seed_url=row["seed_url"],
        swarm_key=bytes(row["swarm_key"]),
        fetched_bytes=row["fetched_bytes"],
        size_bytes=row[size],
        root=None if row["root"] is None else bytes(row["root"]),
        verification=None if row["verification"] is None else Verification(row["verification"]),
    )
