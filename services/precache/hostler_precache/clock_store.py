"""All SQL for a database whose clock was ahead for a while and was put back.

Runs of policies, leases of fetches, signs of life and what was over when are times of the database's
clock, and of no other. What it wrote while it was ahead lies in the future after that: a policy
would not run, a fetch not be taken over, a dead host be there and a blob be kept until the clock
has caught up. Times that are only shown, or make something be remembered for longer, stay as they are.
"""

from typing import Final

from hostler_common import db

EVERY_SECONDS: Final = 60.0
AHEAD_SECONDS: Final = 60.0
"""So far ahead nothing is that was written by this clock: transactions begin before they write."""

# What must not lie in the future; $1 is AHEAD_SECONDS. A row that somebody else has is left to the next turn.
_STATEMENTS: Final = (
    "UPDATE host SET seen_at = now() WHERE host = ANY (ARRAY (SELECT host FROM host"
    "   WHERE seen_at > now() + make_interval(secs => $1) FOR UPDATE SKIP LOCKED))",
    "UPDATE seed SET seen_at = now() WHERE seed = ANY (ARRAY (SELECT seed FROM seed"
    "   WHERE seen_at > now() + make_interval(secs => $1) FOR UPDATE SKIP LOCKED))",
    "UPDATE policy SET next_run_at = now() WHERE policy_id = ANY (ARRAY (SELECT policy_id"
    "   FROM policy WHERE next_run_at > now() + make_interval(secs => every_seconds + $1::float8)"
    "   FOR UPDATE SKIP LOCKED))",
    # from when a canary is silent
    "UPDATE distribution SET announced_at = now() WHERE distribution_id = ANY (ARRAY"
    "   (SELECT distribution_id FROM distribution WHERE state IN ('fetching', 'distributing')"
    "   AND announced_at > now() + make_interval(secs => $1) FOR UPDATE SKIP LOCKED))",
    # when it is tried again, and for how long it is remembered; as the index `distribution_over` has it
    "UPDATE distribution SET finished_at = least(finished_at, now()),"
    "   cancelled_at = CASE WHEN cancelled_at > now() THEN now() ELSE cancelled_at END"
    " WHERE distribution_id = ANY (ARRAY (SELECT distribution_id FROM distribution"
    "   WHERE finished_at IS NOT NULL"
    "   AND greatest(finished_at, cancelled_at) > now() + make_interval(secs => $1)"
    "   FOR UPDATE SKIP LOCKED))",
    # from when nobody has wanted it
    "UPDATE blob SET ready_at = now() WHERE blob_id = ANY (ARRAY (SELECT blob_id FROM blob"
    "   WHERE state = 'ready' AND ready_at > now() + make_interval(secs => $1)"
    "   FOR UPDATE SKIP LOCKED))",
)
# Not at once: whoever still fetches says so within seconds, also if its leases are longer than ours.
_LEASES: Final = (
    "UPDATE blob SET lease_until = now() + make_interval(secs => $1) WHERE blob_id = ANY (ARRAY"
    "   (SELECT blob_id FROM blob WHERE state = 'fetching'"
    "   AND lease_until > now() + make_interval(secs => $1 + $2::float8) FOR UPDATE SKIP LOCKED))"
)


class ClockStore:
    """Times in the schema `precache`."""

    def __init__(self, pool: db.Pool, *, longest_lease_seconds: float) -> None:
        """`longest_lease_seconds` is as far ahead as this replica leases a fetch, or any puts one off."""
        self._pool = pool
        self._longest_lease_seconds = longest_lease_seconds

    async def put_right(self) -> None:
        """Nothing waits for a time that is further ahead than the clock, as it is now, ever put one.

        Raises:
            DatabaseUnavailable: it may.
        """
        async with db.transaction(self._pool) as connection:
            for statement in _STATEMENTS:
                await connection.execute(statement, AHEAD_SECONDS)
            await connection.execute(_LEASES, AHEAD_SECONDS, self._longest_lease_seconds)
