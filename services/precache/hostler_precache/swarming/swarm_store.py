"""All SQL of the swarm: which hosts there are, what each should have, and what they report.

Reports are totals of one session, so storing one twice changes nothing.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import asyncpg

from hostler_common import db
from hostler_precache import protocol
from hostler_precache.distribution.distributions import (
    DistributionId,
    HostEnded,
    HostRecord,
    Member,
    SwarmRecord,
    SwarmRule,
    Wanted,
)
from hostler_precache.distribution.shares import Receivers
from hostler_precache.store import MAX_BIGINT, blob_record
from hostler_precache.transfer.manifest import BlobId

# thousands of rows are taken in parts, so that reports are answered in between
MEMBERS_AT_ONCE: Final = 200
_FINAL = [state.value for state in protocol.HostState if state.is_final]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Transfer:
    """What one session sent for a distribution, and received if the blob is wanted for it."""

    distribution_id: UUID
    host: str
    session_id: UUID
    sent: int
    blob: protocol.BlobReport | None


def _sent(blob: protocol.BlobReport) -> dict[UUID, int]:
    """Bytes sent of the blob by distribution, the host's own among them."""
    own = {UUID(blob.distribution_id): 0}
    return own | {UUID(key): count for key, count in blob.sent_bytes.items()}


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
                link_bytes_per_second=row["link_bytes_per_second"],
                labels=row["labels"],
                images=row["images"],
                first_seen_at=row["first_seen_at"],
                seen_at=row["seen_at"],
            )
            for row in rows
        ]

    async def desired(self, host: str) -> list[Wanted]:
        """What the host should have, most urgent first, one row a blob; see `desired_of`."""
        return (await self.desired_of([host]))[host]

    async def desired_of(self, hosts: Collection[str]) -> dict[str, list[Wanted]]:
        """What each of these hosts should have, most urgent first, one row a blob.

        Hosts that distributions by labels did not know yet are part of them from now on.
        """
        async with db.transaction(self._pool) as connection:
            asking = sorted(set(hosts))
            joined = await connection.fetch(
                "INSERT INTO distribution_host (distribution_id, host, wave)"
                " SELECT distribution_id, host, CASE WHEN n = 1 AND is_first THEN 0 ELSE 1 END"
                " FROM (SELECT d.distribution_id, asking.host, d.percent, d.labels,"
                "     row_number() OVER (PARTITION BY d.distribution_id ORDER BY asking.host) AS n,"
                # where there was no host to try it on, the first that comes is the canary
                "     d.wave = 0 AND NOT EXISTS (SELECT 1 FROM distribution_host first"
                "       WHERE first.distribution_id = d.distribution_id AND first.wave = 0)"
                "       AS is_first"
                "   FROM distribution d CROSS JOIN unnest($1::text[]) AS asking (host)"
                "   LEFT JOIN host ON host.host = asking.host"
                "   WHERE d.hosts IS NULL AND d.state IN ('fetching', 'distributing', 'done')"
                "     AND coalesce(host.labels, '{}') @> d.labels"
                "     AND NOT EXISTS (SELECT 1 FROM distribution_host known"
                "       WHERE known.distribution_id = d.distribution_id"
                "         AND known.host = asking.host)) new"
                " WHERE percent IS NULL OR n + (SELECT count(*) FROM distribution_host other"
                "       WHERE other.distribution_id = new.distribution_id) <="
                "     ceil(percent / 100.0 * (SELECT count(*) FROM host every"
                "       WHERE every.labels @> new.labels))"
                # in the same order as any other: two replicas must not lock each other out
                " ORDER BY distribution_id, host"
                " ON CONFLICT DO NOTHING RETURNING distribution_id",
                asking,
            )
            await self.settle(connection, {row["distribution_id"] for row in joined})
            rows = await connection.fetch(
                "SELECT * FROM (SELECT DISTINCT ON (h.host, blob.blob_id) h.host, blob.blob_id,"
                "     d.distribution_id, d.priority, d.created_at AS since, d.deadline_at,"
                "     d.paused_at IS NOT NULL OR NOT d.is_open AS is_paused"
                "   FROM distribution_host h JOIN distribution d USING (distribution_id)"
                "   JOIN blob ON blob.blob_id = d.blob_id AND blob.is_served"
                "   WHERE h.host = ANY ($1::text[]) AND d.state IN ('distributing', 'done')"
                "     AND h.wave <= d.wave"
                # of several distributions of one blob, one that may go on lets it go on
                "   ORDER BY h.host, blob.blob_id, (d.paused_at IS NULL AND d.is_open) DESC,"
                "     d.priority DESC, d.deadline_at, d.created_at) wanted"
                " ORDER BY host, priority DESC, deadline_at, since",
                asking,
            )
            # one row a blob, without the manifest, which may have megabytes
            blobs = {
                row["blob_id"]: (blob_record(row), row["disk_format"])
                for row in await connection.fetch(
                    "SELECT blob_id, image_id AS blob_image, state, reason, seed, seed_url,"
                    "   swarm_key, fetched_bytes, size_bytes, root, verification, disk_format"
                    " FROM blob WHERE blob_id = ANY ($1::uuid[]) AND is_served",
                    list({row["blob_id"] for row in rows}),
                )
            }
        found: dict[str, list[Wanted]] = {host: [] for host in asking}
        for row in rows:
            if row["blob_id"] not in blobs:  # given up between the two statements
                continue
            blob, disk_format = blobs[row["blob_id"]]
            found[row["host"]].append(
                Wanted(
                    distribution_id=DistributionId(row["distribution_id"]),
                    image_id=blob.image_id,
                    disk_format=disk_format,
                    priority=row["priority"],
                    is_paused=row["is_paused"],
                    blob=blob,
                )
            )
        return found

    async def deleted_of(self, hosts: Collection[str]) -> dict[str, list[str]]:
        """Of each host, the images that it was told to get and that were deleted at their source lately."""
        async with db.connection(self._pool) as connection:
            rows = await connection.fetch(
                "SELECT h.host, (array_agg(DISTINCT d.image_id))[:1000] AS image_ids FROM image"
                " JOIN distribution d USING (image_id) JOIN distribution_host h"
                "   ON h.distribution_id = d.distribution_id AND h.host = ANY ($1::text[])"
                " WHERE image.deleted_at > now() - interval '7 days' GROUP BY h.host",
                sorted(set(hosts)),
            )
        return {row["host"]: row["image_ids"] for row in rows}

    async def has_blob(self, host: str, blob_id: UUID) -> bool:
        """Whether some distribution wants the blob on the host, and it is its turn."""
        async with db.connection(self._pool) as connection:
            found = await connection.fetchval(
                "SELECT EXISTS (SELECT 1 FROM distribution d JOIN distribution_host h"
                "     USING (distribution_id) WHERE d.blob_id = $1 AND h.host = $2"
                "       AND d.state IN ('distributing', 'done') AND h.wave <= d.wave)",
                blob_id,
                host,
            )
        return bool(found)

    # --- reports

    async def report(
        self, connection: db.Connection, reports: Mapping[str, protocol.HostReport]
    ) -> tuple[list[HostEnded], list[DistributionId]]:
        """What these hosts say is stored; returns who came to an end, and what this finished.

        A handful of statements however many hosts there are, so that thousands may report every
        few seconds; a row that says nothing new is not written.
        """
        # always in the same order: two replicas' batches must not lock each other out
        ordered = [(host, reports[host]) for host in sorted(reports)]
        hosts = await self._store_hosts(connection, ordered)
        told = [(host, blob) for host in hosts for blob in reports[host].blobs]
        if not told:
            return [], []
        changed = await self._store_progress(connection, told)
        await self._store_transfers(
            connection,
            [
                _Transfer(
                    distribution_id=distribution_id,
                    host=host,
                    session_id=UUID(reports[host].session_id),
                    sent=sent,
                    blob=blob if distribution_id == UUID(blob.distribution_id) else None,
                )
                for host, blob in told
                for distribution_id, sent in _sent(blob).items()
            ],
        )
        finished = await self.settle(connection, {row["distribution_id"] for row in changed})
        return await self._ended(connection, changed), finished

    async def _store_hosts(
        self, connection: db.Connection, reports: Sequence[tuple[str, protocol.HostReport]]
    ) -> list[str]:
        """Returns the hosts whose report was not overtaken by a later one, in order."""
        rows = await connection.fetch(
            "INSERT INTO host AS old (host, url, session_id, free_bytes, link_bytes_per_second,"
            "   labels, sequence)"
            " SELECT * FROM unnest($1::text[], $2::text[], $3::uuid[], $4::bigint[], $5::bigint[],"
            "   $6::jsonb[], $7::bigint[])"
            " ON CONFLICT (host) DO UPDATE SET url = excluded.url, session_id = excluded.session_id,"
            "   free_bytes = excluded.free_bytes, labels = excluded.labels,"
            "   link_bytes_per_second = excluded.link_bytes_per_second, seen_at = now(),"
            "   sequence = excluded.sequence"
            " WHERE old.session_id <> excluded.session_id OR old.sequence IS NULL"
            "   OR excluded.sequence IS NULL OR excluded.sequence > old.sequence"
            " RETURNING old.host",
            [host for host, _ in reports],
            [report.url for _, report in reports],
            [UUID(report.session_id) for _, report in reports],
            [report.free_bytes for _, report in reports],
            [report.link_bytes_per_second for _, report in reports],
            [report.labels for _, report in reports],
            [report.sequence for _, report in reports],
        )
        return sorted(row["host"] for row in rows)

    async def _store_progress(
        self, connection: db.Connection, told: Sequence[tuple[str, protocol.BlobReport]]
    ) -> list[asyncpg.Record]:
        """Returns the rows of hosts that have come to an end, or begun again."""
        rows = await connection.fetch(
            # what a host fetched for us stays "cached", though after a restart it is "existing"
            "WITH told AS (SELECT DISTINCT ON (host, blob_id) host, blob_id, state, reason, pieces,"
            "     bytes, coverage FROM unnest($1::text[], $2::uuid[], $3::text[], $4::text[],"
            "     $5::bigint[], $6::bigint[], $7::text[])"
            "     AS t (host, blob_id, state, reason, pieces, bytes, coverage)),"
            "   known AS (SELECT h.distribution_id, h.state AS before, told.*,"
            "     CASE WHEN h.state = 'cached' AND told.state = 'existing' THEN h.state"
            "       ELSE told.state END AS after"
            "   FROM told JOIN distribution d ON d.blob_id = told.blob_id"
            "     AND d.state IN ('distributing', 'done')"
            "   JOIN distribution_host h ON h.distribution_id = d.distribution_id"
            "     AND h.host = told.host"
            "   WHERE (h.state, h.reason, h.pieces_done, h.bytes_done, h.coverage) IS DISTINCT FROM"
            "     (CASE WHEN h.state = 'cached' AND told.state = 'existing' THEN h.state"
            "       ELSE told.state END, told.reason, told.pieces::integer, told.bytes,"
            "       told.coverage))"
            " UPDATE distribution_host h SET state = after, reason = known.reason,"
            "   pieces_done = pieces, bytes_done = bytes, coverage = known.coverage,"
            "   updated_at = now(),"
            "   started_at = coalesce(h.started_at, CASE WHEN after = 'transferring' THEN now() END),"
            "   finished_at = CASE WHEN after = ANY ($8::text[]) THEN coalesce(h.finished_at, now())"
            "     END"
            " FROM known WHERE h.distribution_id = known.distribution_id AND h.host = known.host"
            " RETURNING h.distribution_id, h.host, after, before = ANY ($8::text[]) AS was_final,"
            "   after = ANY ($8::text[]) AS is_final",
            [host for host, _ in told],
            [UUID(blob.blob_id) for _, blob in told],
            [blob.state.value for _, blob in told],
            [blob.reason for _, blob in told],
            [blob.pieces_done for _, blob in told],
            [blob.bytes_done for _, blob in told],
            [blob.coverage for _, blob in told],
            _FINAL,
        )
        return [row for row in rows if row["was_final"] != row["is_final"]]

    async def _ended(
        self, connection: db.Connection, changed: Sequence[asyncpg.Record]
    ) -> list[HostEnded]:
        ended = [row for row in changed if row["is_final"]]
        if not ended:
            return []
        counts = {
            row["distribution_id"]: row
            for row in await connection.fetch(
                "SELECT d.distribution_id, d.image_id, count(*) AS total,"
                "   count(*) FILTER (WHERE h.state = ANY ($2::text[])) AS ended"
                " FROM distribution d JOIN distribution_host h USING (distribution_id)"
                " WHERE d.distribution_id = ANY ($1::uuid[]) GROUP BY d.distribution_id",
                list({row["distribution_id"] for row in ended}),
                _FINAL,
            )
        }
        left = Counter(row["distribution_id"] for row in ended)
        found = []
        for row in ended:
            count = counts[row["distribution_id"]]
            left[row["distribution_id"]] -= 1
            found.append(
                HostEnded(
                    distribution_id=DistributionId(row["distribution_id"]),
                    image_id=count["image_id"],
                    host=row["host"],
                    state=row["after"],
                    # those of one batch end one after the other
                    index=count["ended"] - left[row["distribution_id"]],
                    total=count["total"],
                )
            )
        return found

    async def _store_transfers(
        self, connection: db.Connection, transfers: Sequence["_Transfer"], *, is_seed: bool = False
    ) -> None:
        blobs = [one.blob for one in transfers]
        await connection.execute(
            "INSERT INTO transfer AS old (distribution_id, host, session_id, is_seed, sent_bytes,"
            "   received_from_seed_bytes, received_from_peers_bytes, received_from_rack_bytes,"
            "   wasted_bytes)"
            " SELECT DISTINCT ON (1, 2, 3) t.distribution_id, t.host, t.session_id, $9, t.sent,"
            "   t.seed, t.peers, t.rack, t.wasted"
            " FROM unnest($1::uuid[], $2::text[], $3::uuid[], $4::bigint[], $5::bigint[],"
            "   $6::bigint[], $7::bigint[], $8::bigint[])"
            "   AS t (distribution_id, host, session_id, sent, seed, peers, rack, wasted)"
            " JOIN distribution USING (distribution_id)"
            " WHERE t.sent + t.seed + t.peers + t.wasted > 0"
            " ORDER BY 1, 2, 3, t.sent DESC"
            " ON CONFLICT (distribution_id, host, session_id) DO UPDATE SET"
            # totals only grow: a report that was overtaken changes nothing
            "   sent_bytes = greatest(old.sent_bytes, excluded.sent_bytes),"
            "   received_from_seed_bytes = greatest(old.received_from_seed_bytes,"
            "     excluded.received_from_seed_bytes),"
            "   received_from_peers_bytes = greatest(old.received_from_peers_bytes,"
            "     excluded.received_from_peers_bytes),"
            "   received_from_rack_bytes = greatest(old.received_from_rack_bytes,"
            "     excluded.received_from_rack_bytes),"
            "   wasted_bytes = greatest(old.wasted_bytes, excluded.wasted_bytes)"
            " WHERE excluded.sent_bytes > old.sent_bytes"
            "   OR excluded.received_from_seed_bytes > old.received_from_seed_bytes"
            "   OR excluded.received_from_peers_bytes > old.received_from_peers_bytes"
            "   OR excluded.wasted_bytes > old.wasted_bytes",
            [one.distribution_id for one in transfers],
            [one.host for one in transfers],
            [one.session_id for one in transfers],
            [one.sent for one in transfers],
            [blob.bytes_from_seed if blob else 0 for blob in blobs],
            [blob.bytes_from_peers if blob else 0 for blob in blobs],
            [blob.bytes_from_rack if blob else 0 for blob in blobs],
            [blob.bytes_wasted if blob else 0 for blob in blobs],
            is_seed,
        )

    async def settle(
        self, connection: db.Connection, changed: Collection[UUID]
    ) -> list[DistributionId]:
        """Of these distributions, some become done, or distribute again, as their hosts say."""
        if not changed:
            return []
        # of two replicas whose hosts end together, the later one sees what the earlier one stored:
        # a statement that waits for a lock goes on with what it saw before
        await connection.execute(
            "SELECT 1 FROM distribution WHERE distribution_id = ANY ($1::uuid[])"
            " ORDER BY distribution_id FOR NO KEY UPDATE",
            list(changed),
        )
        rows = await connection.fetch(
            "UPDATE distribution d SET"
            "   state = CASE WHEN still.open THEN 'distributing' ELSE 'done' END,"
            "   finished_at = CASE WHEN still.open THEN NULL ELSE now() END"
            " FROM (SELECT x.distribution_id, EXISTS (SELECT 1 FROM distribution_host h"
            "     WHERE h.distribution_id = x.distribution_id"
            "       AND h.state IN ('waiting', 'transferring')) AS open"
            "   FROM distribution x WHERE x.distribution_id = ANY ($1::uuid[])"
            "     AND x.state IN ('distributing', 'done')) still"
            " WHERE d.distribution_id = still.distribution_id"
            "   AND (d.state = 'distributing') <> still.open"
            " RETURNING d.distribution_id, d.state",
            list(changed),
        )
        return [DistributionId(row["distribution_id"]) for row in rows if row["state"] == "done"]

    async def seed_sent(self, seed: str, session: UUID, sent_bytes: Mapping[str, int]) -> None:
        """What this process of the seed has sent in all, by distribution, is stored."""
        async with db.transaction(self._pool) as connection:
            await self._store_transfers(
                connection,
                [
                    _Transfer(
                        distribution_id=UUID(distribution_id),
                        host=seed,
                        session_id=session,
                        sent=sent,
                        blob=None,
                    )
                    for distribution_id, sent in sorted(sent_bytes.items())
                ],
                is_seed=True,
            )

    async def moved_bytes(self) -> dict[str, int]:
        """What all hosts have received for the distributions that there are, by source."""
        async with db.connection(self._pool) as connection:
            row = await connection.fetchrow(
                # what agents say is summed as it is: it may be beyond every number
                "SELECT least(coalesce(sum(received_from_seed_bytes), 0), $1)::bigint AS seed,"
                "   least(coalesce(sum(received_from_rack_bytes), 0), $1)::bigint AS rack,"
                "   least(coalesce(sum(greatest("
                "     received_from_peers_bytes - received_from_rack_bytes, 0)), 0), $1)::bigint"
                "     AS outside,"
                "   least(coalesce(sum(wasted_bytes), 0), $1)::bigint AS wasted"
                " FROM transfer WHERE NOT is_seed",
                MAX_BIGINT,
            )
        assert row is not None
        return dict(row)

    # --- swarms

    async def receivers(self, *, within_seconds: float) -> list[Receivers]:
        """Who gets what now, or is about to, of the hosts that were heard of lately, by distribution.

        A host that gets one image is not counted for another that waits its turn there.
        """
        async with db.connection(self._pool) as connection:
            rows = await connection.fetch(
                "SELECT distribution_id, total_bytes_per_second, most, count(*) AS hosts FROM"
                "   (SELECT d.distribution_id, d.total_bytes_per_second,"
                "      least(nullif(host.link_bytes_per_second, 0), d.host_bytes_per_second)"
                "        AS most, h.state = 'transferring' AS is_moving,"
                "      bool_or(h.state = 'transferring') OVER (PARTITION BY h.host) AS is_busy"
                "    FROM distribution d JOIN distribution_host h USING (distribution_id)"
                "    JOIN host ON host.host = h.host"
                "    WHERE d.state = 'distributing' AND d.paused_at IS NULL AND d.is_open"
                "      AND h.wave <= d.wave AND h.state IN ('waiting', 'transferring')"
                "      AND host.seen_at > now() - make_interval(secs => $1)) open"
                " WHERE is_moving OR NOT is_busy"
                " GROUP BY distribution_id, total_bytes_per_second, most",
                within_seconds,
            )
        found: dict[DistributionId, dict[int | None, int]] = {}
        totals: dict[DistributionId, int | None] = {}
        for row in rows:
            distribution_id = DistributionId(row["distribution_id"])
            found.setdefault(distribution_id, {})[row["most"]] = row["hosts"]
            totals[distribution_id] = row["total_bytes_per_second"]
        return [
            Receivers(distribution_id=one, total_bytes_per_second=totals[one], hosts=found[one])
            for one in found
        ]

    async def swarm(self, blob_id: BlobId, *, within_seconds: float) -> SwarmRecord:
        """Who has the blob or is told to get it, who of them was heard of lately, and under which limits."""
        async with db.transaction(self._pool) as connection:
            seed_url = await connection.fetchval(
                "SELECT seed_url FROM blob WHERE blob_id = $1 AND is_served", UUID(blob_id)
            )
            rules = await connection.fetch(
                "SELECT distribution_id, paused_at IS NOT NULL OR NOT is_open AS is_halted,"
                "   host_bytes_per_second, total_bytes_per_second FROM distribution"
                " WHERE blob_id = $1 AND state IN ('distributing', 'done')",
                UUID(blob_id),
            )
            rows = connection.cursor(
                "SELECT host.host, host.url, host.labels->>'rack' AS rack,"
                "   host.seen_at > now() - make_interval(secs => $2) AS is_there,"
                "   bool_or(h.state IN ('waiting', 'transferring')) AS is_moving,"
                "   array_agg(d.distribution_id) AS distribution_ids"
                " FROM distribution d JOIN distribution_host h USING (distribution_id)"
                " JOIN host ON host.host = h.host"
                " WHERE d.blob_id = $1 AND d.state IN ('distributing', 'done')"
                "   AND h.wave <= d.wave"
                "   AND h.state NOT IN ('error', 'unsupported', 'skipped')"
                " GROUP BY host.host",
                UUID(blob_id),
                within_seconds,
                prefetch=MEMBERS_AT_ONCE,
            )
            members = [
                Member(
                    host=row["host"],
                    url=row["url"],
                    rack=row["rack"],
                    is_there=row["is_there"],
                    is_moving=row["is_moving"],
                    distribution_ids=row["distribution_ids"],
                )
                async for row in rows
            ]
        return SwarmRecord(
            seeds=[seed_url] if seed_url else [],
            rules={
                DistributionId(row["distribution_id"]): SwarmRule(
                    is_halted=row["is_halted"],
                    host_bytes_per_second=row["host_bytes_per_second"],
                    total_bytes_per_second=row["total_bytes_per_second"],
                )
                for row in rules
            },
            members=members,
        )
