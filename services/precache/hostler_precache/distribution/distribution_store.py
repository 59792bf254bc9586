"""All SQL of distributions: an image wanted on hosts, and how far each is.

Each function is one transaction unless it takes a connection. Times are the database's.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime, time
from typing import Any, Final
from uuid import UUID

import asyncpg

from hostler_common import db, errors
from hostler_precache.distribution.distributions import (
    BlobRecord,
    Candidate,
    Distribution,
    DistributionId,
    DistributionState,
    HostEnded,
    HostProgress,
    ImageOnHosts,
    LiveDistribution,
    Policy,
    PolicyId,
)
from hostler_precache.distribution.rollout import Rollout, Targets, Window, is_open
from hostler_precache.store import MAX_BIGINT, ImageNotFound, blob_record
from hostler_precache.transfer.manifest import BlobId

HOSTS_AT_ONCE: Final = 200
# each names all its hosts
TOLD_AT_ONCE: Final = 20
# agents report every few seconds
SILENT_SECONDS: Final = 60.0
_LIVE = ("fetching", "distributing")
FIRST_RETRY_SECONDS: Final = 300.0
LONGEST_RETRY_SECONDS: Final = 6 * 3600.0

# When a policy tries an image again that could not be fetched: each failure in a row doubles the time.
_RETRY_AT = (
    "d.finished_at + make_interval(secs => CASE WHEN d.failures = 0 THEN 0 ELSE"
    f" least({LONGEST_RETRY_SECONDS}, {FIRST_RETRY_SECONDS} * 2 ^ (least(d.failures, 30) - 1)) END)"
)
# Of a policy's distributions, those that its run leaves as they are.
_STANDS = (
    "(d.state IN ('fetching', 'distributing', 'done')"
    f" OR d.state = 'error' AND {_RETRY_AT} > now())"
)

# The hosts of targets ($2 names, $3 labels, $4 percent) in the order that a hash of their names
# with $1 gives: which hosts make up a share of all, and which go first.
_CHOSEN = (
    "SELECT host, n, count(*) OVER () AS taken FROM (SELECT host,"
    "     row_number() OVER (ORDER BY md5($1::text || host)) AS n, count(*) OVER () AS matching"
    "   FROM (SELECT unnest($2::text[]) AS host"
    "     UNION SELECT host FROM host WHERE $2 IS NULL AND labels @> $3) every) numbered"
    " WHERE n <= ceil(matching * coalesce($4::integer, 100) / 100.0)"
)


class DistributionNotFound(errors.NotFound):
    """There is no such distribution."""

    code = "precache.distribution.not_found"


class DistributionOver(errors.Conflict):
    """The distribution is done, failed or cancelled: there is nothing left to change."""

    code = "precache.distribution.over"


class DistributionStore:
    """Distributions in the schema `precache`."""

    def __init__(self, pool: db.Pool) -> None:
        self._pool = pool

    @property
    def pool(self) -> db.Pool:
        """For transactions that span calls."""
        return self._pool

    async def add_distribution(
        self,
        connection: db.Connection,
        *,
        distribution_id: DistributionId,
        image_id: str,
        targets: Targets,
        rollout: Rollout,
        priority: int,
        policy_id: PolicyId | None = None,
    ) -> tuple[DistributionId, DistributionState]:
        """The image is wanted on these hosts. It is distributing if its bytes are here.

        Which hosts make up a share of them, and which go first, a hash of the distribution and
        their names decides. A policy has one distribution of an image: where it was over it begins
        anew under its own id, and knows what its last failure was; where it is not, it stays as it is.

        Returns:
            The id that it has, and its state.

        Raises:
            ImageNotFound: nobody has named the image, or it is deleted at its source.
        """
        # locked, so that a fetch that ends now sees the distribution or is seen by it, as does
        # whoever deletes the image or retires the blob
        image = await connection.fetchrow(
            "SELECT deleted_at FROM image WHERE image_id = $1 FOR SHARE", image_id
        )
        if image is None:
            raise ImageNotFound(f"no image {image_id}: register it first, or send its source")
        if image["deleted_at"] is not None:
            raise ImageNotFound(
                f"image {image_id} was deleted at its source: register it again if it is back"
            )
        blob_id = await connection.fetchval(
            "SELECT blob_id FROM blob WHERE image_id = $1 AND state IN ('fetching', 'ready')"
            " FOR SHARE",
            image_id,
        )
        await self._clear(connection, policy_id, image_id)
        row = await connection.fetchrow(
            "INSERT INTO distribution AS old (distribution_id, image_id, policy_id, hosts, priority,"
            "   state, blob_id, announced_at, labels, percent, canary_percent, wave, deadline_at,"
            "   deadline_percent, host_bytes_per_second, total_bytes_per_second, windows, is_open)"
            " SELECT $1, $2, $3, $4, $5, CASE WHEN ready.blob_id IS NULL THEN 'fetching'"
            "   ELSE 'distributing' END, ready.blob_id,"
            "   CASE WHEN ready.blob_id IS NULL THEN NULL ELSE now() END,"
            "   $7, $8, $9, CASE WHEN $9::integer IS NULL THEN 1 ELSE 0 END, $10, $11, $12, $13,"
            "   $14, $15"
            " FROM (SELECT 1) one LEFT JOIN blob ready"
            "   ON ready.blob_id = $6 AND ready.is_served"
            " ON CONFLICT (policy_id, image_id) WHERE policy_id IS NOT NULL DO UPDATE SET"
            "   hosts = excluded.hosts, priority = excluded.priority, state = excluded.state,"
            "   blob_id = excluded.blob_id, announced_at = excluded.announced_at,"
            "   labels = excluded.labels, percent = excluded.percent, wave = excluded.wave,"
            "   canary_percent = excluded.canary_percent, deadline_at = excluded.deadline_at,"
            "   deadline_percent = excluded.deadline_percent, deadline_met = NULL,"
            "   host_bytes_per_second = excluded.host_bytes_per_second,"
            "   total_bytes_per_second = excluded.total_bytes_per_second,"
            "   windows = excluded.windows, is_open = excluded.is_open, paused_at = NULL,"
            "   paused_reason = NULL, reason = NULL, finished_at = NULL, cancelled_at = NULL,"
            # of its end nobody may have been told yet: then it goes on
            "   told = nullif(old.told, 'end')"
            " WHERE old.state IN ('error', 'cancelled') RETURNING distribution_id, state",
            distribution_id, image_id, policy_id, targets.hosts, priority, blob_id,
            dict(targets.labels), targets.percent, rollout.canary_percent, rollout.deadline_at,
            rollout.deadline_percent, rollout.host_bytes_per_second,
            rollout.total_bytes_per_second, [_window_row(one) for one in rollout.windows],
            is_open(rollout.windows, datetime.now(UTC)),
        )  # fmt: skip
        if row is None:
            row = await connection.fetchrow(
                "SELECT distribution_id, state FROM distribution"
                " WHERE policy_id = $1 AND image_id = $2",
                policy_id,
                image_id,
            )
            assert row is not None
            return DistributionId(row["distribution_id"]), DistributionState(row["state"])
        await connection.execute(
            "INSERT INTO distribution_host (distribution_id, host, wave)"  # noqa: S608  the clause is ours
            " SELECT $1::uuid, host, CASE WHEN n <= ceil(taken * $5::integer / 100.0) THEN 0"
            f"   ELSE 1 END FROM ({_CHOSEN}) chosen",
            str(row["distribution_id"]), targets.hosts, dict(targets.labels), targets.percent,
            rollout.canary_percent,
        )  # fmt: skip
        return DistributionId(row["distribution_id"]), DistributionState(row["state"])

    async def _clear(
        self, connection: db.Connection, policy_id: PolicyId | None, image_id: str
    ) -> None:
        """What hosts did for the policy's distribution of the image while it was not over yet is gone."""
        for table in ("distribution_host", "transfer"):
            await connection.execute(
                f"DELETE FROM {table} WHERE distribution_id = (SELECT distribution_id"  # noqa: S608  the table is ours
                "   FROM distribution WHERE policy_id = $1 AND image_id = $2"
                "     AND state IN ('error', 'cancelled'))",
                policy_id,
                image_id,
            )

    async def chosen(self, targets: Targets) -> list[Candidate]:
        """The hosts that a distribution to these targets would choose now; of a share, one choice."""
        async with db.connection(self._pool) as connection:
            rows = await connection.fetch(
                "SELECT chosen.host, host.url IS NOT NULL AS is_known, host.free_bytes,"  # noqa: S608  the clause is ours
                f"   host.link_bytes_per_second FROM ({_CHOSEN}) chosen LEFT JOIN host USING (host)"
                " ORDER BY n",
                "plan", targets.hosts, dict(targets.labels), targets.percent,
            )  # fmt: skip
        return [
            Candidate(
                host=row["host"],
                is_known=row["is_known"],
                free_bytes=row["free_bytes"],
                link_bytes_per_second=row["link_bytes_per_second"],
            )
            for row in rows
        ]

    async def hold(self, connection: db.Connection, distribution_id: UUID) -> tuple[int, Rollout]:
        """Its priority and how it goes, which nobody else changes before the commit.

        Raises:
            DistributionNotFound: there is none.
            DistributionOver: there is nothing left to change.
        """
        row = await connection.fetchrow(
            "SELECT * FROM distribution WHERE distribution_id = $1 FOR NO KEY UPDATE",
            distribution_id,
        )
        _require_live(distribution_id, None if row is None else row["state"])
        assert row is not None
        return row["priority"], _rollout(row)

    async def change_distribution(
        self,
        connection: db.Connection,
        distribution_id: UUID,
        *,
        priority: int,
        rollout: Rollout,
    ) -> None:
        """Its priority, deadline, limits and windows are these from now on.

        Raises:
            DistributionNotFound: there is none.
        """
        status = await connection.execute(
            "UPDATE distribution SET priority = $2, deadline_at = $3, deadline_percent = $4,"
            "   deadline_met = CASE WHEN deadline_at IS NOT DISTINCT FROM $3 THEN deadline_met END,"
            "   host_bytes_per_second = $5, total_bytes_per_second = $6, windows = $7, is_open = $8"
            " WHERE distribution_id = $1",
            distribution_id, priority, rollout.deadline_at, rollout.deadline_percent,
            rollout.host_bytes_per_second, rollout.total_bytes_per_second,
            [_window_row(one) for one in rollout.windows],
            is_open(rollout.windows, datetime.now(UTC)),
        )  # fmt: skip
        if status == "UPDATE 0":
            raise DistributionNotFound(f"no distribution {distribution_id}")

    async def pause(
        self, connection: db.Connection, distribution_id: UUID, *, reason: str
    ) -> None:
        """Its hosts fetch nothing more, and keep what they have.

        Raises:
            DistributionNotFound: there is none.
            DistributionOver: there is nothing left to pause.
        """
        state = await connection.fetchval(
            "UPDATE distribution SET paused_at = coalesce(paused_at, now()),"
            "   paused_reason = coalesce(paused_reason, $2)"
            " WHERE distribution_id = $1 RETURNING state",
            distribution_id,
            reason,
        )
        _require_live(distribution_id, state)

    async def resume(self, connection: db.Connection, distribution_id: UUID) -> BlobRecord | None:
        """Its hosts go on, all of them: whoever resumes has looked at the canaries.

        Returns:
            The blob to announce, if its bytes are here.

        Raises:
            DistributionNotFound: there is none.
            DistributionOver: there is nothing left to resume.
        """
        row = await connection.fetchrow(
            "UPDATE distribution SET paused_at = NULL, paused_reason = NULL,"
            # paused by its canaries: all go on. Paused by hand: the canaries still go first
            "   wave = CASE WHEN paused_reason LIKE 'canary.%' THEN 1 ELSE wave END"
            " WHERE distribution_id = $1 RETURNING state, blob_id",
            distribution_id,
        )
        _require_live(distribution_id, None if row is None else row["state"])
        assert row is not None
        return None if row["blob_id"] is None else await self._blob(connection, row["blob_id"])

    async def claim_live(self, connection: db.Connection) -> list[LiveDistribution]:
        """Distributions that have a canary, windows or a deadline to watch, locked until the commit.

        Those that another replica has locked are left to it.
        """
        rows = await connection.fetch(
            "SELECT d.*,"
            "   (SELECT coalesce(jsonb_object_agg(state, n), '{}') FROM (SELECT state, count(*) AS n"
            "     FROM distribution_host h WHERE h.distribution_id = d.distribution_id"
            "       AND h.wave = 0 GROUP BY state) c) AS canary_states,"
            "   (SELECT coalesce(jsonb_object_agg(state, n), '{}') FROM (SELECT state, count(*) AS n"
            "     FROM distribution_host h WHERE h.distribution_id = d.distribution_id"
            "     GROUP BY state) c) AS host_states"
            " FROM distribution d WHERE (d.state IN ('fetching', 'distributing')"
            "     AND (d.windows <> '[]' OR d.wave = 0 AND d.paused_at IS NULL))"
            "   OR (d.state <> 'cancelled' AND d.deadline_at IS NOT NULL AND d.deadline_met IS NULL)"
            " ORDER BY d.distribution_id FOR NO KEY UPDATE OF d SKIP LOCKED"
        )
        return [
            LiveDistribution(
                distribution_id=DistributionId(row["distribution_id"]),
                blob=None
                if row["blob_id"] is None
                else await self._blob(connection, row["blob_id"]),
                rollout=_rollout(row),
                wave=row["wave"],
                is_paused=row["paused_at"] is not None,
                is_open=row["is_open"],
                deadline_met=row["deadline_met"],
                canary_states=row["canary_states"],
                host_states=row["host_states"],
            )
            for row in rows
        ]

    async def canaries_silent_seconds(
        self, connection: db.Connection, distribution_id: DistributionId
    ) -> dict[str, float]:
        """Of each canary that has not ended: how long nothing was heard of it.

        From when the image was announced to it, at the earliest; a host that no agent has ever
        spoken for is silent from then on.
        """
        rows = await connection.fetch(
            "SELECT h.host, extract(epoch FROM now() - greatest(host.seen_at, d.announced_at))"
            "     ::float8 AS seconds"
            " FROM distribution d JOIN distribution_host h USING (distribution_id)"
            " LEFT JOIN host ON host.host = h.host"
            " WHERE d.distribution_id = $1 AND d.announced_at IS NOT NULL AND h.wave = 0"
            "   AND h.state IN ('waiting', 'transferring')",
            distribution_id,
        )
        return {row["host"]: row["seconds"] for row in rows}

    async def skip(
        self,
        connection: db.Connection,
        distribution_id: DistributionId,
        hosts: Sequence[str],
        *,
        reason: str,
    ) -> list[HostEnded]:
        """These hosts, as far as they have not ended yet, are skipped; returns them as they ended.

        One that speaks again says itself how far it is.
        """
        rows = await connection.fetch(
            "WITH ended AS (UPDATE distribution_host SET state = 'skipped', reason = $3,"
            "     updated_at = now(), finished_at = now()"
            # who is just being written has spoken, and its writer waits for the distribution
            "   WHERE distribution_id = $1 AND host = ANY (ARRAY (SELECT host FROM distribution_host"
            "     WHERE distribution_id = $1 AND host = ANY ($2::text[])"
            "       AND state IN ('waiting', 'transferring') FOR UPDATE SKIP LOCKED))"
            "   RETURNING host)"
            " SELECT ended.host, d.image_id, row_number() OVER (ORDER BY ended.host) AS n,"
            "   (SELECT count(*) FROM distribution_host h WHERE h.distribution_id = $1) AS total,"
            # the statement sees the hosts as they were before it
            "   (SELECT count(*) FROM distribution_host h WHERE h.distribution_id = $1"
            "     AND h.state NOT IN ('waiting', 'transferring')) AS before"
            " FROM ended, distribution d WHERE d.distribution_id = $1",
            distribution_id,
            list(hosts),
            reason,
        )
        return [
            HostEnded(
                distribution_id=distribution_id,
                image_id=row["image_id"],
                host=row["host"],
                state="skipped",
                index=row["before"] + row["n"],
                total=row["total"],
            )
            for row in rows
        ]

    async def states(
        self, connection: db.Connection, distribution_id: DistributionId
    ) -> tuple[dict[str, int], dict[str, int]]:
        """How many of its canaries are in which state, and how many of all its hosts."""
        rows = await connection.fetch(
            "SELECT wave, state, count(*) AS n FROM distribution_host WHERE distribution_id = $1"
            " GROUP BY wave, state",
            distribution_id,
        )
        canaries, hosts = Counter[str](), Counter[str]()
        for row in rows:
            hosts[row["state"]] += row["n"]
            if row["wave"] == 0:
                canaries[row["state"]] += row["n"]
        return dict(canaries), dict(hosts)

    async def advance(
        self,
        connection: db.Connection,
        distribution_id: DistributionId,
        *,
        wave: int,
        is_open: bool,
        deadline_met: bool | None,
    ) -> None:
        """What the periodic work decided of a distribution is stored."""
        await connection.execute(
            "UPDATE distribution SET wave = $2, is_open = $3, deadline_met = $4"
            " WHERE distribution_id = $1",
            distribution_id, wave, is_open, deadline_met,
        )  # fmt: skip

    async def _blob(self, connection: db.Connection, blob_id: UUID) -> BlobRecord | None:
        row = await connection.fetchrow(
            "SELECT *, image_id AS blob_image FROM blob WHERE blob_id = $1 AND is_served",
            blob_id,
        )
        return None if row is None else blob_record(row)

    async def cancel(self, distribution_id: UUID) -> BlobId | None:
        """The distribution is over; its hosts stop fetching at their next look. Returns its blob.

        Raises:
            DistributionNotFound: there is none.
        """
        async with db.transaction(self._pool) as connection:
            row = await connection.fetchrow(
                "UPDATE distribution SET finished_at = coalesce(finished_at, now()),"
                "   cancelled_at = coalesce(cancelled_at, now()),"
                "   state = CASE WHEN state = 'error' THEN state ELSE 'cancelled' END"
                " WHERE distribution_id = $1 RETURNING blob_id",
                distribution_id,
            )
        if row is None:
            raise DistributionNotFound(f"no distribution {distribution_id}")
        return None if row["blob_id"] is None else BlobId(str(row["blob_id"]))

    async def policy_ran(
        self, connection: db.Connection, policy: Policy, listed: Collection[str]
    ) -> tuple[set[str], list[BlobId]]:
        """The policy's distributions are on its hosts, at its priority, and of listed images only.

        Those of images that it lists no more are withdrawn, which unpins their files.

        Returns:
            The images that need no distribution now, since they have one or wait to be tried again,
            and the blobs whose swarms changed.
        """
        changed = await connection.fetch(
            "SELECT distribution_id, blob_id FROM distribution"
            " WHERE policy_id = $1 AND state IN ('fetching', 'distributing', 'done')"
            "   AND image_id = ANY ($2::text[])"
            "   AND (priority, hosts, labels) IS DISTINCT FROM ($3, $4, $5)",
            policy.policy_id, list(listed), policy.priority, policy.hosts, dict(policy.labels),
        )  # fmt: skip
        await self._retarget(connection, [row["distribution_id"] for row in changed], policy)
        withdrawn = await connection.fetch(
            "UPDATE distribution SET state = 'cancelled', cancelled_at = now(),"
            "   finished_at = coalesce(finished_at, now()), reason = 'policy: listed no more'"
            " WHERE policy_id = $1 AND state IN ('fetching', 'distributing', 'done')"
            "   AND image_id <> ALL ($2::text[]) RETURNING blob_id",
            policy.policy_id,
            list(listed),
        )
        images = await connection.fetch(
            f"SELECT image_id FROM distribution d WHERE policy_id = $1 AND {_STANDS}",  # noqa: S608  the clause is ours
            policy.policy_id,
        )
        moved = [BlobId(str(row["blob_id"])) for row in (*withdrawn, *changed) if row["blob_id"]]
        return {row["image_id"] for row in images}, moved

    async def _retarget(
        self, connection: db.Connection, distribution_ids: Sequence[UUID], policy: Policy
    ) -> None:
        if not distribution_ids:
            return
        # the hosts' rows before the distributions', and those in order: as reports lock them
        await connection.execute(
            "DELETE FROM distribution_host h WHERE distribution_id = ANY ($1::uuid[]) AND NOT"
            " CASE WHEN $2::text[] IS NULL THEN EXISTS (SELECT 1 FROM host"
            "   WHERE host.host = h.host AND host.labels @> $3) ELSE h.host = ANY ($2) END",
            distribution_ids, policy.hosts, dict(policy.labels),
        )  # fmt: skip
        await connection.execute(
            "INSERT INTO distribution_host (distribution_id, host)"
            " SELECT distribution_id, host FROM unnest($1::uuid[]) AS ids (distribution_id),"
            "   (SELECT unnest($2::text[]) AS host"
            "     UNION SELECT host FROM host WHERE $2 IS NULL AND labels @> $3) every"
            " ON CONFLICT DO NOTHING",
            distribution_ids, policy.hosts, dict(policy.labels),
        )  # fmt: skip
        await connection.execute(
            "SELECT 1 FROM distribution WHERE policy_id = $1 ORDER BY distribution_id"
            " FOR NO KEY UPDATE",
            policy.policy_id,
        )
        await connection.execute(
            "UPDATE distribution d SET priority = $2, hosts = $3, labels = $4,"
            "   state = CASE WHEN d.state = 'fetching' THEN d.state"
            "     WHEN still.open THEN 'distributing' ELSE 'done' END,"
            "   finished_at = CASE WHEN d.state <> 'fetching' AND NOT still.open"
            "     THEN coalesce(d.finished_at, now()) END"
            " FROM (SELECT x.distribution_id, EXISTS (SELECT 1 FROM distribution_host h"
            "     WHERE h.distribution_id = x.distribution_id"
            "       AND h.state IN ('waiting', 'transferring')) AS open"
            "   FROM distribution x WHERE x.distribution_id = ANY ($1::uuid[])) still"
            " WHERE d.distribution_id = still.distribution_id"
            "   AND d.state IN ('fetching', 'distributing', 'done')",
            distribution_ids, policy.priority, policy.hosts, dict(policy.labels),
        )  # fmt: skip

    async def has_distribution(
        self, connection: db.Connection, policy_id: PolicyId, image_id: str
    ) -> bool:
        """Whether the policy's distribution of the image needs nothing now.

        It has it on its hosts, or is to, or has failed and waits to be tried again.
        """
        return bool(
            await connection.fetchval(
                "SELECT EXISTS (SELECT 1 FROM distribution d"  # noqa: S608  the clause is ours
                f"  WHERE policy_id = $1 AND image_id = $2 AND {_STANDS})",
                policy_id,
                image_id,
            )
        )

    async def distribution(self, distribution_id: UUID) -> Distribution:
        """The distribution.

        Raises:
            DistributionNotFound: there is none.
        """
        rows = await self._distributions("WHERE d.distribution_id = $1", distribution_id)
        if not rows:
            raise DistributionNotFound(f"no distribution {distribution_id}")
        return rows[0]

    async def distributions(
        self, *, limit: int, marker: UUID | None = None, image_id: str | None = None
    ) -> list[Distribution]:
        """Distributions, newest first, after the marker; of one image, if one is named."""
        return await self._distributions(
            "WHERE ($3::text IS NULL OR d.image_id = $3) AND ($2::uuid IS NULL"
            "   OR (d.created_at, d.distribution_id) < (SELECT created_at, distribution_id"
            "     FROM distribution WHERE distribution_id = $2))"
            " ORDER BY d.created_at DESC, d.distribution_id DESC LIMIT $1",
            limit,
            marker,
            image_id,
        )

    async def _distributions(self, clause: str, *values: object) -> list[Distribution]:
        async with db.connection(self._pool) as connection:
            rows = await connection.fetch(
                "SELECT d.*, blob.size_bytes, blob.verification,"  # noqa: S608  the clause is ours
                f"  CASE WHEN d.policy_id IS NOT NULL AND d.state = 'error' THEN {_RETRY_AT} END"
                "     AS retry_at,"
                "   coalesce(blob.fetched_bytes, 0) AS fetched_bytes, blob.ready_at AS fetched_at,"
                "   coalesce(sent.by_seed, 0) AS by_seed, coalesce(sent.by_peers, 0) AS by_peers,"
                "   coalesce(states.counts, '{}'::jsonb) AS host_states"
                " FROM distribution d"
                " LEFT JOIN LATERAL (SELECT * FROM blob WHERE blob.blob_id = d.blob_id"
                "   OR (d.blob_id IS NULL AND blob.image_id = d.image_id"
                "     AND blob.state = 'fetching') LIMIT 1) blob ON true"
                " LEFT JOIN LATERAL (SELECT"
                # what agents say is summed as it is: it may be beyond every number
                f"    least(coalesce(sum(sent_bytes) FILTER (WHERE is_seed), 0), {MAX_BIGINT})::bigint"
                "       AS by_seed,"
                "     least(coalesce(sum(sent_bytes) FILTER (WHERE NOT is_seed), 0),"
                f"      {MAX_BIGINT})::bigint AS by_peers"
                "   FROM transfer t WHERE t.distribution_id = d.distribution_id) sent ON true"
                " LEFT JOIN LATERAL (SELECT jsonb_object_agg(state, n) AS counts FROM"
                "   (SELECT state, count(*) AS n FROM distribution_host h"
                "     WHERE h.distribution_id = d.distribution_id GROUP BY state) c) states ON true"
                f" {clause}",
                *values,
            )
        return [_distribution(row) for row in rows]

    async def progress(self, distribution_id: UUID) -> list[HostProgress]:
        """Every host of the distribution, by name. Of thousands it lets others be answered in between."""
        async with db.transaction(self._pool) as connection:
            rows = connection.cursor(
                "SELECT h.*, coalesce(t.sent, 0) AS sent, coalesce(t.seed, 0) AS seed,"
                "   coalesce(t.peers, 0) AS peers, coalesce(t.rack, 0) AS rack,"
                "   coalesce(t.wasted, 0) AS wasted, host.link_bytes_per_second,"
                "   coalesce(host.seen_at > now() - make_interval(secs => $3), false) AS is_there"
                " FROM distribution_host h LEFT JOIN host USING (host) LEFT JOIN (SELECT host,"
                "     least(coalesce(sum(sent_bytes), 0), $2)::bigint AS sent,"
                "     least(coalesce(sum(received_from_seed_bytes), 0), $2)::bigint AS seed,"
                "     least(coalesce(sum(received_from_peers_bytes), 0), $2)::bigint AS peers,"
                "     least(coalesce(sum(received_from_rack_bytes), 0), $2)::bigint AS rack,"
                "     least(coalesce(sum(wasted_bytes), 0), $2)::bigint AS wasted FROM transfer t"
                "   WHERE distribution_id = $1 AND NOT is_seed GROUP BY host) t USING (host)"
                " WHERE h.distribution_id = $1 ORDER BY h.host",
                distribution_id,
                MAX_BIGINT,
                SILENT_SECONDS,
                prefetch=HOSTS_AT_ONCE,
            )
            return [_progress(row) async for row in rows]

    async def host_states(
        self, connection: db.Connection, distribution_id: DistributionId
    ) -> tuple[str, dict[str, int]]:
        """The distribution's image, and how many of its hosts are in which state."""
        image_id = await connection.fetchval(
            "SELECT image_id FROM distribution WHERE distribution_id = $1", distribution_id
        )
        _, hosts = await self.states(connection, distribution_id)
        return image_id, hosts

    async def tell_started(
        self, connection: db.Connection, distribution_ids: Collection[DistributionId]
    ) -> list[DistributionId]:
        """Those of these of which it was not told that they have started, or only before they ended; now it is."""
        rows = await connection.fetch(
            "UPDATE distribution SET told = 'start' WHERE distribution_id = ANY ($1::uuid[])"
            "   AND told IS DISTINCT FROM 'start' RETURNING distribution_id",
            list(distribution_ids),
        )
        return [DistributionId(row["distribution_id"]) for row in rows]

    async def tell_ended(self, connection: db.Connection) -> list[DistributionId]:
        """Distributions that are over, and of which nobody was told so, a few; they are told of now.

        Those that another replica tells of are left to it.
        """
        rows = await connection.fetch(
            "UPDATE distribution SET told = 'end' WHERE distribution_id = ANY (ARRAY ("
            "   SELECT distribution_id FROM distribution"
            "   WHERE state IN ('done', 'error', 'cancelled') AND told IS DISTINCT FROM 'end'"
            "   ORDER BY finished_at LIMIT $1 FOR NO KEY UPDATE SKIP LOCKED))"
            " RETURNING distribution_id",
            TOLD_AT_ONCE,
        )
        return [DistributionId(row["distribution_id"]) for row in rows]

    async def on_hosts(
        self, connection: db.Connection, distribution_ids: Collection[DistributionId]
    ) -> list[ImageOnHosts]:
        """What these distributions are of, and to which hosts."""
        rows = await connection.fetch(
            "SELECT d.distribution_id, d.image_id, d.state,"
            "   coalesce(array_agg(h.host ORDER BY h.host) FILTER (WHERE h.host IS NOT NULL), '{}')"
            "     AS hosts"
            " FROM distribution d LEFT JOIN distribution_host h USING (distribution_id)"
            " WHERE d.distribution_id = ANY ($1::uuid[]) GROUP BY d.distribution_id",
            list(distribution_ids),
        )
        return [
            ImageOnHosts(
                distribution_id=DistributionId(row["distribution_id"]),
                image_id=row["image_id"],
                state=DistributionState(row["state"]),
                hosts=row["hosts"],
            )
            for row in rows
        ]

    async def count_states(self) -> dict[str, int]:
        """How many distributions are in which state."""
        async with db.connection(self._pool) as connection:
            rows = await connection.fetch(
                "SELECT state, count(*) AS n FROM distribution GROUP BY state"
            )
        return {row["state"]: row["n"] for row in rows}


def _progress(row: asyncpg.Record) -> HostProgress:
    return HostProgress(
        host=row["host"],
        is_there=row["is_there"],
        state=row["state"],
        reason=row["reason"],
        pieces_done=row["pieces_done"],
        bytes_done=row["bytes_done"],
        sent_bytes=row["sent"],
        received_from_seed_bytes=row["seed"],
        received_from_peers_bytes=row["peers"],
        received_from_rack_bytes=row["rack"],
        wasted_bytes=row["wasted"],
        coverage=row["coverage"],
        wave=row["wave"],
        link_bytes_per_second=row["link_bytes_per_second"],
        started_at=row["started_at"],
        updated_at=row["updated_at"],
        finished_at=row["finished_at"],
    )


def _require_live(distribution_id: UUID, state: str | None) -> None:
    if state is None:
        raise DistributionNotFound(f"no distribution {distribution_id}")
    if state not in _LIVE:
        raise DistributionOver(f"the distribution is {state}")


def _rollout(row: asyncpg.Record) -> Rollout:
    return Rollout(
        canary_percent=row["canary_percent"],
        deadline_at=row["deadline_at"],
        deadline_percent=row["deadline_percent"],
        host_bytes_per_second=row["host_bytes_per_second"],
        total_bytes_per_second=row["total_bytes_per_second"],
        windows=[_window(one) for one in row["windows"]],
    )


def _window(row: Mapping[str, Any]) -> Window:
    return Window(
        start=time.fromisoformat(row["start"]),
        stop=time.fromisoformat(row["stop"]),
        time_zone=row["time_zone"],
        days=frozenset(row["days"]),
    )


def _window_row(window: Window) -> dict[str, Any]:
    return {
        "start": window.start.isoformat(),
        "stop": window.stop.isoformat(),
        "time_zone": window.time_zone,
        "days": sorted(window.days),
    }


def _distribution(row: asyncpg.Record) -> Distribution:
    states: dict[str, Any] = row["host_states"]
    finished: datetime | None = row["finished_at"]
    return Distribution(
        distribution_id=DistributionId(row["distribution_id"]),
        image_id=row["image_id"],
        blob_id=None if row["blob_id"] is None else str(row["blob_id"]),
        policy_id=None if row["policy_id"] is None else PolicyId(row["policy_id"]),
        hosts=row["hosts"],
        labels=row["labels"],
        percent=row["percent"],
        rollout=_rollout(row),
        wave=row["wave"],
        is_open=row["is_open"],
        paused_reason=row["paused_reason"],
        deadline_met=row["deadline_met"],
        priority=row["priority"],
        state=DistributionState.PAUSED
        if row["paused_at"] is not None and row["state"] in _LIVE
        else DistributionState(row["state"]),
        reason=row["reason"],
        failures=row["failures"],
        last_failure=row["last_failure"],
        retry_at=row["retry_at"],
        size_bytes=row["size_bytes"],
        fetched_bytes=row["fetched_bytes"],
        fetched_at=row["fetched_at"],
        verification=row["verification"],
        seed_sent_bytes=row["by_seed"],
        peers_sent_bytes=row["by_peers"],
        host_states=states,
        created_at=row["created_at"],
        announced_at=row["announced_at"],
        finished_at=finished,
    )
