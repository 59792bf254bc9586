"""All SQL of the service.

Each function is one transaction unless it takes a connection; events and fanouts are put into
the outbox inside it. Times are the database's.
"""

import uuid
from collections.abc import Sequence
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
    ImageRecord,
)
from hostler_precache.images import Image, SourceHash, Verification
from hostler_precache.transfer.manifest import BlobId, ImageId, Manifest

MAX_BIGINT: Final = 2**63 - 1


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
            "   finished_at = coalesce(finished_at, now())"
            " WHERE image_id = $1 AND state IN ('fetching', 'distributing', 'done')",
            image_id,
        )
        blob_id = await connection.fetchval(
            "SELECT blob_id FROM blob WHERE image_id = $1 AND state IN ('fetching', 'ready')",
            image_id,
        )
        return None if blob_id is None else BlobId(str(blob_id))

    async def deleted_images(self, host: str) -> list[str]:
        """Images that were deleted at their source lately, and that the host was told to get."""
        async with db.connection(self._pool) as connection:
            rows = await connection.fetch(
                "SELECT image_id FROM image WHERE deleted_at > now() - interval '7 days'"
                "   AND EXISTS (SELECT 1 FROM distribution d JOIN distribution_host h"
                "     USING (distribution_id) WHERE d.image_id = image.image_id AND h.host = $1)"
                " ORDER BY deleted_at LIMIT 1000",
                host,
            )
        return [row["image_id"] for row in rows]

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
        self, *, seed: str, seed_url: str, swarm_key: bytes, lease_seconds: float
    ) -> FetchTask | None:
        """An image that somebody waits for and nobody fetches, now leased to this seed.

        That is one without a live blob, or one whose fetching replica has fallen silent or waits
        to try again.
        """
        async with db.transaction(self._pool) as connection:
            row = await connection.fetchrow(
                "UPDATE blob SET seed = $1, seed_url = $2, attempts = attempts + 1,"
                "   lease_until = now() + make_interval(secs => $3), fetched_bytes = 0"
                " WHERE blob_id = (SELECT blob_id FROM blob WHERE state = 'fetching'"
                "   AND lease_until < now() ORDER BY lease_until LIMIT 1 FOR UPDATE SKIP LOCKED)"
                " RETURNING blob_id, image_id, attempts, swarm_key",
                seed, seed_url, lease_seconds,
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
        assert image is not None
        return FetchTask(
            blob_id=BlobId(str(row["blob_id"])),
            image=_image(image),
            swarm_key=bytes(row["swarm_key"]),
            attempts=row["attempts"],
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
        # a distribution that is being made of it is waited for: it sees the blob, or is seen below
        await connection.execute(
            "SELECT 1 FROM image WHERE image_id ="
            "   (SELECT image_id FROM blob WHERE blob_id = $1) FOR NO KEY UPDATE",
            UUID(blob_id),
        )
        row = await connection.fetchrow(
            "UPDATE blob SET state = 'ready', reason = NULL, size_bytes = $3, fetched_bytes = $3,"
            "   root = $4, manifest = $5, verification = $6, disk_format = $7, ready_at = now()"
            " WHERE blob_id = $1 AND seed = $2 AND state = 'fetching' RETURNING image_id",
            UUID(blob_id), seed, manifest.size_bytes, manifest.root, manifest.to_json(),
            verification.value, disk_format,
        )  # fmt: skip
        if row is None:
            return None
        rows = await connection.fetch(
            "UPDATE distribution SET state = 'distributing', blob_id = $2, announced_at = now()"
            " WHERE image_id = $1 AND state = 'fetching' RETURNING distribution_id",
            row["image_id"],
            UUID(blob_id),
        )
        return [DistributionId(row["distribution_id"]) for row in rows]

    async def fetch_failed(
        self,
        blob_id: BlobId,
        *,
        seed: str,
        reason: str,
        retry_seconds: float | None,
        messages: Sequence[Message] = (),
    ) -> None:
        """The fetch is tried again after a time, or, without one, it and its distributions fail."""
        async with db.transaction(self._pool) as connection:
            row = await connection.fetchrow(
                "UPDATE blob SET state = CASE WHEN $4::float8 IS NULL THEN 'error'"
                "     ELSE 'fetching' END,"
                "   reason = $3, lease_until = now() + make_interval(secs => coalesce($4, 0))"
                " WHERE blob_id = $1 AND seed = $2 AND state = 'fetching' RETURNING image_id",
                UUID(blob_id), seed, reason, retry_seconds,
            )  # fmt: skip
            if row is None or retry_seconds is not None:
                return
            await connection.execute(
                "UPDATE distribution SET state = 'error', reason = $2, finished_at = now()"
                " WHERE image_id = $1 AND state = 'fetching'",
                row["image_id"],
                reason,
            )
            await outbox.add(connection, messages)

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
                "UPDATE blob SET seed_url = $2 WHERE seed = $1 AND seed_url <> $2", seed, seed_url
            )
            await connection.execute(
                "UPDATE blob SET lease_until = now() WHERE seed = $1 AND state = 'fetching'"
                "   AND lease_until > now()",
                seed,
            )

    async def ready_blob(self, connection: db.Connection, image_id: str) -> BlobRecord:
        """The complete blob of an image.

        Raises:
            BlobNotFound: there is none.
        """
        row = await connection.fetchrow(
            "SELECT *, image_id AS blob_image FROM blob WHERE image_id = $1 AND state = 'ready'",
            image_id,
        )
        if row is None:
            raise BlobNotFound(f"no complete blob of image {image_id}")
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
                "       OR d.finished_at > now() - make_interval(secs => $2)"
                "         AND image.deleted_at IS NULL))"
                "   AND (image.deleted_at IS NOT NULL"
                "     OR blob.ready_at < now() - make_interval(secs => $2))"
                " RETURNING blob.blob_id",
                [row["blob_id"] for row in idle],
                idle_seconds,
            )
        return [BlobId(str(row["blob_id"])) for row in rows]

    async def blob_lost(self, blob_id: BlobId, *, reason: str) -> None:
        """The seed's copy is gone or damaged: the blob is fetched again for whoever waits for it."""
        async with db.transaction(self._pool) as connection:
            await connection.execute(
                "UPDATE blob SET state = 'error', reason = $2 WHERE blob_id = $1",
                UUID(blob_id),
                reason,
            )
            # hosts say anew what they have: it is another blob, and what is done is not done with,
            # since hosts come later and those that have it are told to keep it
            await connection.execute(
                "UPDATE distribution_host SET state = 'waiting', reason = NULL, pieces_done = 0,"
                "   bytes_done = 0, coverage = '', started_at = NULL, finished_at = NULL"
                " WHERE distribution_id IN (SELECT distribution_id FROM distribution"
                "   WHERE blob_id = $1 AND state IN ('distributing', 'done'))",
                UUID(blob_id),
            )
            await connection.execute(
                "UPDATE distribution SET state = 'fetching', blob_id = NULL, announced_at = NULL,"
                "   finished_at = NULL WHERE blob_id = $1 AND state IN ('distributing', 'done')",
                UUID(blob_id),
            )

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
