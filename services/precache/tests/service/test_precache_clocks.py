"""The database's clock was ahead and is put back: what it wrote meanwhile keeps nothing from its time.

A clock that jumps is told of by the times that it left: all of them, in every table, moved by years.
"""

import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

from hostler_common import db
from hostler_precache import clock_store
from hostler_precache.clock_store import AHEAD_SECONDS, ClockStore

YEARS = timedelta(days=3650)
LEASE_SECONDS = 300.0
IMAGE = "image-1"


async def jumped(control: Any, by: timedelta) -> None:
    """All that the clock wrote until now was written as if it had gone wrong by so much."""
    async with db.transaction(control.pool) as connection:
        columns = await connection.fetch(
            "SELECT table_name, array_agg(column_name::text) AS names"
            " FROM information_schema.columns JOIN information_schema.tables"
            "   USING (table_schema, table_name)"
            " WHERE table_schema = 'precache' AND data_type = 'timestamp with time zone'"
            "   AND table_type = 'BASE TABLE' GROUP BY table_name"
        )
        assert {"host", "seed", "policy", "blob", "distribution"} <= {c[0] for c in columns}
        for table, names in columns:
            moved = ", ".join(f"{name} = {name} + $1" for name in names)
            await connection.execute(f"UPDATE {table} SET {moved}", by)


async def claimed(control: Any) -> Any:
    return await control.store.claim_fetch(
        seed="other", seed_url="http://other", swarm_key=b"k", lease_seconds=30.0
    )


async def some_of_everything(control: Any) -> tuple[Any, Any]:
    """A policy that ran and whose image failed, a fetch that is leased, a blob, a host and a seed that spoke."""
    policy = await control.add_policy()
    assert await control.policies.claim_policy() is not None
    await control.policies.policy_ran(policy.policy_id, outcome="ok", detail="")
    failed = await control.distribute(policy_id=policy.policy_id)
    await control.add_image("image-2")
    await control.distribute(image_id="image-2")
    async with db.transaction(control.pool) as connection:
        await connection.execute("INSERT INTO seed (seed) VALUES ('seed')")
        await connection.execute(
            "UPDATE distribution SET state = 'error', finished_at = now(), failures = 1"
            " WHERE distribution_id = $1",
            failed,
        )
        await connection.execute(
            "INSERT INTO blob (blob_id, image_id, state, seed, seed_url, swarm_key, lease_until)"
            " VALUES ($1, 'image-2', 'fetching', 'seed', 'http://seed', '\\x00',"
            "   now() + interval '5 minutes')",
            uuid.uuid4(),
        )
    await control.add_image("image-3")
    await control.add_blob("image-3")
    await control.distribute(image_id="image-3")
    await control.say("h1")
    return policy, failed


async def test_what_a_clock_wrote_while_it_was_ahead_keeps_nothing_from_its_time(
    control: Any,
) -> None:
    clock = ClockStore(control.pool, longest_lease_seconds=LEASE_SECONDS)
    policy, failed = await some_of_everything(control)
    await jumped(control, YEARS)
    assert await control.policies.claim_policy() is None
    assert await claimed(control) is None
    assert await control.store.retire_blobs("seed", idle_seconds=0) == []

    await clock.put_right()

    now = datetime.now(UTC) + timedelta(minutes=1)
    due = await control.policies.claim_policy()
    assert due is not None
    assert due.policy_id == policy.policy_id
    assert await claimed(control) is None  # whoever fetches it has a minute to say so
    async with db.connection(control.pool) as connection:
        for table, time in (
            ("host", "seen_at"),
            ("seed", "seen_at"),
            ("blob", "ready_at"),
            ("distribution", "announced_at"),
            ("distribution", "finished_at"),  # tried again minutes later, and not years
        ):
            assert await connection.fetchval(f"SELECT max({time}) FROM {table}") < now
        cancelled_at = "SELECT cancelled_at FROM distribution WHERE distribution_id = $1"
        assert await connection.fetchval(cancelled_at, failed) is None
    await jumped(control, timedelta(seconds=-AHEAD_SECONDS - 1))
    assert (await claimed(control)).image.image_id == "image-2"


async def test_a_replica_whose_leases_are_longer_than_ours_keeps_what_it_fetches(
    control: Any,
) -> None:
    await some_of_everything(control)
    async with db.transaction(control.pool) as connection:
        await connection.execute(
            "UPDATE blob SET lease_until = now() + interval '1 hour' WHERE state = 'fetching'"
        )
    await ClockStore(control.pool, longest_lease_seconds=LEASE_SECONDS).put_right()
    assert await claimed(control) is None


async def test_distributions_that_are_long_over_are_not_read_each_minute(control: Any) -> None:
    async with db.transaction(control.pool) as connection:
        await connection.execute(
            "INSERT INTO distribution (distribution_id, image_id, priority, state, finished_at)"
            " SELECT gen_random_uuid(), $1, 0, 'done', now() - interval '1 day'"
            " FROM generate_series(1, 20000)",
            IMAGE,
        )
        await connection.execute("ANALYZE distribution")
        for statement in clock_store._STATEMENTS:
            if statement.startswith("UPDATE distribution "):
                rows = await connection.fetch(f"EXPLAIN {statement}", AHEAD_SECONDS)
                assert not [row[0] for row in rows if "Seq Scan" in row[0]]


async def test_where_the_clock_is_right_nothing_is_changed(control: Any) -> None:
    await some_of_everything(control)

    async def all_times() -> Any:
        async with db.connection(control.pool) as connection:
            return await connection.fetch(
                "SELECT seen_at FROM host UNION ALL SELECT seen_at FROM seed"
                " UNION ALL SELECT next_run_at FROM policy UNION ALL SELECT finished_at"
                " FROM distribution UNION ALL SELECT lease_until FROM blob"
            )

    before = await all_times()
    await ClockStore(control.pool, longest_lease_seconds=LEASE_SECONDS).put_right()
    assert await all_times() == before
    assert await control.policies.claim_policy() is None
