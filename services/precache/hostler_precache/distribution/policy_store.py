"""All SQL of policies: what a lister names goes to hosts, again and again."""

from collections.abc import Mapping, Sequence
from uuid import UUID

import asyncpg

from hostler_common import db, errors
from hostler_precache.distribution.distributions import Policy, PolicyId

RUN_SECONDS = 300.0  # a run that has not said how it went for so long was cut off


class PolicyNotFound(errors.NotFound):
    """There is no such policy."""

    code = "precache.policy.not_found"


class PolicyExists(errors.Conflict):
    """A policy of that name exists."""

    code = "precache.policy.exists"


class PolicyStore:
    """Policies in the schema `precache`."""

    def __init__(self, pool: db.Pool) -> None:
        self._pool = pool

    @property
    def pool(self) -> db.Pool:
        """For transactions that span calls."""
        return self._pool

    async def add_policy(
        self,
        connection: db.Connection,
        *,
        policy_id: PolicyId,
        name: str,
        lister: str,
        options: Mapping[str, object],
        hosts: Sequence[str] | None,
        labels: Mapping[str, str],
        priority: int,
        every_seconds: int,
    ) -> None:
        """The policy exists and is due.

        Raises:
            PolicyExists: one of that name does already.
        """
        row = await connection.fetchrow(
            "INSERT INTO policy (policy_id, name, lister, options, hosts, labels, priority,"
            "   every_seconds) VALUES ($1, $2, $3, $4, $5, $6, $7, $8)"
            " ON CONFLICT (name) DO NOTHING RETURNING policy_id",
            policy_id, name, lister, dict(options), hosts, dict(labels), priority, every_seconds,
        )  # fmt: skip
        if row is None:
            raise PolicyExists(f"a policy named {name!r} exists")

    async def policy(self, policy_id: UUID) -> Policy:
        """The policy.

        Raises:
            PolicyNotFound: there is none.
        """
        async with db.connection(self._pool) as connection:
            row = await connection.fetchrow("SELECT * FROM policy WHERE policy_id = $1", policy_id)
        if row is None:
            raise PolicyNotFound(f"no policy {policy_id}")
        return _policy(row)

    async def policies(self, *, limit: int, marker: str | None = None) -> list[Policy]:
        """Policies by name, after the marker."""
        async with db.connection(self._pool) as connection:
            rows = await connection.fetch(
                "SELECT * FROM policy WHERE $2::text IS NULL OR name > $2 ORDER BY name LIMIT $1",
                limit,
                marker,
            )
        return [_policy(row) for row in rows]

    async def change_policy(
        self,
        policy_id: UUID,
        *,
        lister: str,
        options: Mapping[str, object],
        hosts: Sequence[str] | None,
        labels: Mapping[str, str],
        priority: int,
        every_seconds: int,
    ) -> None:
        """The policy is this from now on, and due: its run changes what it has distributed.

        Raises:
            PolicyNotFound: there is none.
        """
        async with db.transaction(self._pool) as connection:
            status = await connection.execute(
                "UPDATE policy SET lister = $2, options = $3, hosts = $4, labels = $5,"
                "   priority = $6, every_seconds = $7, next_run_at = now() WHERE policy_id = $1",
                policy_id, lister, dict(options), hosts, dict(labels), priority, every_seconds,
            )  # fmt: skip
        if status == "UPDATE 0":
            raise PolicyNotFound(f"no policy {policy_id}")

    async def run_lister_now(self, lister: str) -> None:
        """Every policy of the lister is due: what it lists has changed."""
        async with db.transaction(self._pool) as connection:
            await connection.execute(
                "UPDATE policy SET next_run_at = now() WHERE lister = $1 AND next_run_at > now()",
                lister,
            )

    async def remove_policy(self, policy_id: UUID) -> None:
        """The policy is gone; its distributions stay, and are nobody's.

        Raises:
            PolicyNotFound: there is none.
        """
        async with db.transaction(self._pool) as connection:
            status = await connection.execute("DELETE FROM policy WHERE policy_id = $1", policy_id)
        if status == "DELETE 0":
            raise PolicyNotFound(f"no policy {policy_id}")

    async def run_policy_now(self, policy_id: UUID) -> None:
        """The policy is due, and tries again what could not be fetched, however lately that was.

        Raises:
            PolicyNotFound: there is none.
        """
        async with db.transaction(self._pool) as connection:
            status = await connection.execute(
                "UPDATE policy SET next_run_at = now() WHERE policy_id = $1", policy_id
            )
            await connection.execute(
                "UPDATE distribution SET failures = 0 WHERE policy_id = $1 AND state = 'error'",
                policy_id,
            )
        if status == "UPDATE 0":
            raise PolicyNotFound(f"no policy {policy_id}")

    async def claim_policy(self) -> Policy | None:
        """A policy that is due, and is no longer: whoever claims it runs it.

        It is due again soon, should nobody say how the run went.
        """
        async with db.transaction(self._pool) as connection:
            row = await connection.fetchrow(
                "UPDATE policy SET last_run_at = now(),"
                "   next_run_at = now() + make_interval(secs => least(every_seconds, $1))"
                " WHERE policy_id = (SELECT policy_id FROM policy WHERE next_run_at <= now()"
                "   ORDER BY next_run_at LIMIT 1 FOR UPDATE SKIP LOCKED) RETURNING *",
                RUN_SECONDS,
            )
        return None if row is None else _policy(row)

    async def hold(self, connection: db.Connection, policy_id: PolicyId) -> bool:
        """Whether the policy is there; it is, then, and no other run changes anything, until the commit."""
        found = await connection.fetchval(
            "SELECT 1 FROM policy WHERE policy_id = $1 FOR NO KEY UPDATE", policy_id
        )
        return found is not None

    async def policy_ran(self, policy_id: PolicyId, *, outcome: str, detail: str) -> None:
        """How the last run went is stored; the next is when it should be, or when somebody asked."""
        async with db.transaction(self._pool) as connection:
            await connection.execute(
                "UPDATE policy SET last_outcome = $2, last_detail = $3, next_run_at = CASE"
                "   WHEN next_run_at = last_run_at + make_interval(secs => least(every_seconds, $4))"
                "     THEN last_run_at + make_interval(secs => every_seconds)"
                "   ELSE next_run_at END WHERE policy_id = $1",
                policy_id, outcome, detail, RUN_SECONDS,
            )  # fmt: skip


def _policy(row: asyncpg.Record) -> Policy:
    return Policy(
        policy_id=PolicyId(row["policy_id"]),
        name=row["name"],
        lister=row["lister"],
        options=row["options"],
        hosts=row["hosts"],
        labels=row["labels"],
        priority=row["priority"],
        every_seconds=row["every_seconds"],
        next_run_at=row["next_run_at"],
        last_run_at=row["last_run_at"],
        last_outcome=row["last_outcome"],
        last_detail=row["last_detail"],
    )
