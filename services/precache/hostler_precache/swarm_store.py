"""All SQL of the swarm: which hosts there are, what each should have, and what they report.

Reports are totals of one session, so storing one twice changes nothing.
"""

from collections.abc import Mapping, Sequence
from uuid import UUID

from hostler_common import db
from hostler_precache import protocol
from hostler_precache.distributions import DistributionId, HostRecord, Member, Wanted
from hostler_precache.manifest import BlobId
from hostler_precache.store import blob_record

_FINAL = [state.value for state in protocol.HostState if state.is_final]


class SwarmStore:
    """Hosts, members and transfers in the schema `precache`."""

    def __init__(self, pool: db.Pool) -> None:
        self._pool = pool

    async def hosts(self, *, limit: int, marker: str | None = None) -> list[HostRecord]:
        """Hosts by name, after the marker."""
        async with db.connection(self._pool) as connection:
            rows = await connection.fetch(
                "SELECT host.*, (SELECT count(DISTINCT d.image_id) FROM distribution_host h"
                "     JOIN distribution d USING (distribution_id)"
                "     WHERE h.host = host.host AND h.state IN ('cached', 'existing')) AS images"
                " FROM host WHERE $2::text IS NULL OR host > $2 ORDER BY host LIMIT $1",
                limit,
                marker,
            )
        return [
            HostRecord(
                host=row["host"],
                url=row["url"],
                free_bytes=row["free_bytes"],
                images=row["images"],
                first_seen_at=row["first_seen_at"],
                seen_at=row["seen_at"],
            )
            for row in rows
        ]

    async def desired(self, host: str) -> list[Wanted]:
        """What the host should have, most urgent first, one row a blob.

        A host that distributions to all hosts did not know yet is part of them from now on.
        """
        async with db.transaction(self._pool) as connection:
            await connection.execute(
                "WITH joined AS (INSERT INTO distribution_host (distribution_id, host)"
                "     SELECT distribution_id, $1 FROM distribution"
                "     WHERE hosts IS NULL AND state IN ('fetching', 'distributing', 'done')"
                "     ON CONFLICT DO NOTHING RETURNING distribution_id)"
                " UPDATE distribution SET state = 'distributing', finished_at = NULL"
                " WHERE state = 'done' AND distribution_id IN (SELECT distribution_id FROM joined)",
                host,
            )
            rows = await connection.fetch(
                "SELECT * FROM (SELECT DISTINCT ON (blob.blob_id) d.distribution_id, d.priority,"
                "     d.created_at AS since, image.disk_format, blob.*,"
                "     blob.image_id AS blob_image"
                "   FROM distribution_host h JOIN distribution d USING (distribution_id)"
                "   JOIN blob ON blob.blob_id = d.blob_id AND blob.state = 'ready'"
                "   JOIN image ON image.image_id = d.image_id"
                "   WHERE h.host = $1 AND d.state IN ('distributing', 'done')"
                "   ORDER BY blob.blob_id, d.priority DESC, d.created_at) wanted"
                " ORDER BY priority DESC, since",
                host,
            )
        return [
            Wanted(
                distribution_id=DistributionId(row["distribution_id"]),
                image_id=row["image_id"],
                disk_format=row["disk_format"],
                priority=row["priority"],
                blob=blob_record(row),
            )
            for row in rows
        ]

    async def report(
        self, connection: db.Connection, host: str, report: protocol.HostReport
    ) -> list[DistributionId]:
        """What the host says is stored; returns the distributions that this finished."""
        session = UUID(report.session_id)
        await connection.execute(
            "INSERT INTO host (host, url, session_id, free_bytes) VALUES ($1, $2, $3, $4)"
            " ON CONFLICT (host) DO UPDATE SET url = $2, session_id = $3, free_bytes = $4,"
            "   seen_at = now()",
            host, report.url, session, report.free_bytes,
        )  # fmt: skip
        # always in the same order: two hosts of one distribution must not lock each other out
        finished: list[DistributionId] = []
        for blob in sorted(report.blobs, key=lambda blob: blob.blob_id):
            await self._report_blob(connection, host, session, report.url, blob)
            finished += await self._finish(connection, UUID(blob.blob_id))
        return finished

    async def _report_blob(
        self,
        connection: db.Connection,
        host: str,
        session: UUID,
        url: str,
        blob: protocol.BlobReport,
    ) -> None:
        blob_id = UUID(blob.blob_id)
        await connection.execute(
            "INSERT INTO member (blob_id, host, url, pieces_done, banned)"
            " SELECT $1, $2, $3, $4, $5 WHERE EXISTS (SELECT 1 FROM blob WHERE blob_id = $1)"
            " ON CONFLICT (blob_id, host) DO UPDATE SET url = $3, pieces_done = $4, banned = $5,"
            "   seen_at = now()",
            blob_id, host, url, blob.pieces_done, blob.banned,
        )  # fmt: skip
        # what a host fetched for us stays "cached", though after a restart it finds it "existing"
        await connection.execute(
            "UPDATE distribution_host h SET"
            "   state = CASE WHEN h.state = 'cached' AND $3 = 'existing' THEN h.state ELSE $3 END,"
            "   reason = $4, pieces_done = $5, bytes_done = $6, updated_at = now(),"
            "   finished_at = CASE WHEN $3 = ANY ($7::text[]) THEN coalesce(h.finished_at, now())"
            "     END"
            " FROM distribution d WHERE d.distribution_id = h.distribution_id"
            "   AND d.blob_id = $1 AND h.host = $2",
            blob_id, host, blob.state.value, blob.reason, blob.pieces_done, blob.bytes_done,
            _FINAL,
        )  # fmt: skip
        mine = UUID(blob.distribution_id)
        moved = {mine: 0, **{UUID(key): count for key, count in blob.sent_bytes.items()}}
        for distribution_id, sent in moved.items():
            is_mine = distribution_id == mine
            await self._count_transfer(
                connection,
                distribution_id,
                host,
                session,
                is_seed=False,
                sent=sent,
                from_seed=blob.bytes_from_seed if is_mine else 0,
                from_peers=blob.bytes_from_peers if is_mine else 0,
                wasted=blob.bytes_wasted if is_mine else 0,
            )

    async def seed_sent(self, seed: str, session: UUID, sent_bytes: Mapping[str, int]) -> None:
        """What this process of the seed has sent in all, by distribution, is stored."""
        async with db.transaction(self._pool) as connection:
            for distribution_id, sent in sorted(sent_bytes.items()):
                await self._count_transfer(
                    connection, UUID(distribution_id), seed, session, is_seed=True, sent=sent
                )

    async def _count_transfer(
        self,
        connection: db.Connection,
        distribution_id: UUID,
        host: str,
        session: UUID,
        *,
        is_seed: bool,
        sent: int,
        from_seed: int = 0,
        from_peers: int = 0,
        wasted: int = 0,
    ) -> None:
        await connection.execute(
            "INSERT INTO transfer AS old (distribution_id, host, session_id, is_seed, sent_bytes,"
            "   received_from_seed_bytes, received_from_peers_bytes, wasted_bytes)"
            " SELECT $1, $2, $3, $4, $5, $6, $7, $8"
            " WHERE EXISTS (SELECT 1 FROM distribution WHERE distribution_id = $1)"
            " ON CONFLICT (distribution_id, host, session_id) DO UPDATE SET"
            # totals only grow: a report that was overtaken changes nothing
            "   sent_bytes = greatest(old.sent_bytes, $5),"
            "   received_from_seed_bytes = greatest(old.received_from_seed_bytes, $6),"
            "   received_from_peers_bytes = greatest(old.received_from_peers_bytes, $7),"
            "   wasted_bytes = greatest(old.wasted_bytes, $8)",
            distribution_id, host, session, is_seed, sent, from_seed, from_peers, wasted,
        )  # fmt: skip

    async def _finish(self, connection: db.Connection, blob_id: UUID) -> list[DistributionId]:
        """Distributions of the blob become done, or distribute again, as their hosts say."""
        rows = await connection.fetch(
            "UPDATE distribution d SET"
            "   state = CASE WHEN open.some THEN 'distributing' ELSE 'done' END,"
            "   finished_at = CASE WHEN open.some THEN NULL ELSE now() END"
            " FROM (SELECT x.distribution_id, bool_or(h.state IN ('waiting', 'transferring'))"
            "     AS some FROM distribution x JOIN distribution_host h USING (distribution_id)"
            "     WHERE x.blob_id = $1 GROUP BY x.distribution_id) open"
            " WHERE d.distribution_id = open.distribution_id AND d.blob_id = $1"
            "   AND ((d.state = 'distributing' AND NOT open.some)"
            "     OR (d.state = 'done' AND open.some))"
            " RETURNING d.distribution_id, d.state",
            blob_id,
        )
        return [DistributionId(row["distribution_id"]) for row in rows if row["state"] == "done"]

    async def members(self, blob_id: BlobId, *, within_seconds: float) -> list[Member]:
        """The hosts in the swarm of a blob that were heard of lately."""
        async with db.connection(self._pool) as connection:
            rows = await connection.fetch(
                "SELECT host, url FROM member WHERE blob_id = $1"
                "   AND seen_at > now() - make_interval(secs => $2)",
                UUID(blob_id),
                within_seconds,
            )
        return [Member(host=row["host"], url=row["url"]) for row in rows]

    async def seeds(self, blob_ids: Sequence[str]) -> dict[str, list[str]]:
        """The seeds' URLs of each complete blob."""
        async with db.connection(self._pool) as connection:
            rows = await connection.fetch(
                "SELECT blob_id, seed_url FROM blob WHERE blob_id = ANY ($1::uuid[])"
                "   AND state = 'ready'",
                [UUID(blob_id) for blob_id in blob_ids],
            )
        return {str(row["blob_id"]): [row["seed_url"]] for row in rows}
