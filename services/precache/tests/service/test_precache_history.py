"""What is over for long is forgotten, a few rows at a time, and what is wanted never is."""

import asyncio
import itertools
import uuid
from dataclasses import replace
from typing import Any

import pytest

from hostler_common import db
from hostler_precache.distribution.distributions import DistributionId
from hostler_precache.distribution.history_jobs import History
from hostler_precache.distribution.history_store import HistoryStore
from hostler_precache.distribution.rollout import Targets
from hostler_precache.images import Image
from hostler_precache.sources.plugins import SourceError
from hostler_precache.transfer.manifest import ImageId

IMAGE = "image-1"
DAYS = 30


async def rows(control: Any, table: str) -> int:
    async with db.connection(control.pool) as connection:
        count: int = await connection.fetchval(f"SELECT count(*) FROM {table}")
    return count


async def age(control: Any, *, days: int, table: str = "distribution") -> None:
    """Everything in the table happened so many days ago."""
    names = {
        "distribution": ("created_at", "finished_at", "cancelled_at"),
        "blob": ("created_at", "ready_at"),
        "image": ("deleted_at",),
        "host": ("seen_at",),
    }[table]
    changes = ", ".join(f"{one} = {one} - make_interval(days => $1)" for one in names)
    async with db.transaction(control.pool) as connection:
        await connection.execute(f"UPDATE {table} SET {changes}", days)


async def forget(control: Any, **bounds: int) -> list[DistributionId]:
    """What was done by it."""
    done: list[DistributionId] = []
    history = HistoryStore(control.pool, **bounds)
    await History(
        history, store=control.store, distributions=control.distributions, swarms=control.swarms,
        on_done=done.extend, days=DAYS,
    ).forget()  # fmt: skip
    return done


async def fail(control: Any, reason: str = "source.refused: 500") -> None:
    """The image that waits to be fetched cannot be."""
    task = await control.store.claim_fetch(
        seed="seed", seed_url="http://seed", swarm_key=b"k", lease_seconds=30
    )
    assert task is not None
    await control.store.fetch_failed(
        task.blob_id, seed="seed", reason=reason, retry_seconds=None, messages=[]
    )


async def nothing() -> None:
    """Nothing happens meanwhile."""


# --- one row for an image of a policy


async def test_a_policy_tries_an_image_that_fails_again_in_one_row_and_later_each_time(
    control: Any, lister_of: Any
) -> None:
    policy = await control.add_policy()
    pipeline = control.pipeline(lister_of(nothing))

    async def run() -> None:
        claimed = await control.policies.policy(policy.policy_id)
        await pipeline._run_policy(claimed)

    seen = []
    for failures in range(1, 9):
        await run()
        await fail(control, f"source.refused: {failures}")
        await run()  # too early: nothing is tried
        (found,) = await control.distributions.distributions(limit=10)
        assert (found.state, found.failures) == ("error", failures)
        assert found.last_failure == f"source.refused: {failures}"
        assert await control.states(found.distribution_id) == {"h1": "waiting", "h2": "waiting"}
        seen.append((found.retry_at - found.finished_at).total_seconds())
        await age(control, days=1)
    assert seen == [300, 600, 1200, 2400, 4800, 9600, 19200, 21600]
    await run()
    (found,) = await control.distributions.distributions(limit=10)
    assert (found.state, found.reason) == ("fetching", None)
    assert (found.failures, found.last_failure) == (8, "source.refused: 8")


async def test_who_asks_for_a_run_now_does_not_wait_for_the_next_try(
    control: Any, lister_of: Any
) -> None:
    policy = await control.add_policy()
    await control.pipeline(lister_of(nothing)).run_policies()
    await fail(control)
    await control.policies.run_policy_now(policy.policy_id)
    await control.pipeline(lister_of(nothing)).run_policies()
    (found,) = await control.distributions.distributions(limit=10)
    assert found.state == "fetching"


async def test_an_image_that_is_listed_again_comes_back_in_its_row(
    control: Any, lister_of: Any
) -> None:
    policy = await control.add_policy()
    blob_id = await control.add_blob()
    await control.pipeline(lister_of(nothing)).run_policies()
    (first,) = await control.distributions.distributions(limit=10)
    made = first.distribution_id
    await control.say(
        "h1",
        {"distribution_id": str(made), "blob_id": blob_id, "state": "cached", "bytes_wasted": 7},
    )
    async with db.transaction(control.pool) as connection:
        await control.distributions.policy_ran(connection, policy, set())
    assert (await control.distributions.distribution(made)).state == "cancelled"
    await control.policies.run_policy_now(policy.policy_id)
    await control.pipeline(lister_of(nothing)).run_policies()
    (again,) = await control.distributions.distributions(limit=10)
    assert (again.distribution_id, again.state, again.reason) == (made, "distributing", None)
    assert (again.finished_at, again.host_states) == (None, {"waiting": 2})
    assert await rows(control, "transfer") == 0


async def test_what_a_policy_distributes_already_is_not_begun_anew(control: Any) -> None:
    policy = await control.add_policy()
    blob_id = await control.add_blob()
    made = await control.distribute(policy_id=policy.policy_id)
    await control.say("h1", {"distribution_id": str(made), "blob_id": blob_id, "state": "cached"})
    await control.distribute(policy_id=policy.policy_id)
    assert await control.states(made) == {"h1": "cached", "h2": "waiting"}
    assert await rows(control, "distribution") == 1


async def test_a_run_says_why_its_lister_failed(control: Any, lister_of: Any) -> None:
    policy = await control.add_policy()

    async def refuse() -> None:
        raise SourceError("source.refused", "500")

    await control.pipeline(lister_of(refuse)).run_policies()
    assert (await control.policies.policy(policy.policy_id)).last_outcome == "failed"


async def test_a_lister_that_never_answers_holds_up_no_other_policy(
    control: Any, lister_of: Any
) -> None:
    never = asyncio.Event()
    policies = [await control.add_policy(name=name) for name in ("one", "two")]
    await control.pipeline(lister_of(never.wait), lister_seconds=0.1).run_policies()
    for policy in policies:
        ran = await control.policies.policy(policy.policy_id)
        assert (ran.last_outcome, ran.last_detail) == (
            "failed", "lister.timeout: it has not answered for 0.1 s",
        )  # fmt: skip


async def test_what_cannot_be_kept_of_a_list_is_named_and_the_others_are_distributed(
    control: Any,
) -> None:
    odd: list[dict[str, Any]] = [
        {"name": "\ud800"},
        {"location": "a\0b"},
        {"size_bytes": -1},
        {"size_bytes": 1 << 63},
    ]
    listed = [
        Image(**{"image_id": ImageId(f"odd-{number}"), "fetcher": "http", **fields})
        for number, fields in enumerate(odd)
    ]
    good = Image(image_id=ImageId("good"), fetcher="http")
    listed += [good, good, replace(good, location="elsewhere")]

    class Lister:
        async def list(self, options: Any) -> Any:
            del options
            return listed

    policy = await control.add_policy()
    await control.pipeline(Lister()).run_policies()
    ran = await control.policies.policy(policy.policy_id)
    summary, *refused = ran.last_detail.split("; ")
    assert (ran.last_outcome, summary) == ("partial", "7 images, 1 new, 0 moved or withdrawn")
    assert [one.partition(":")[0] for one in refused] == [
        "odd-0", "odd-1", "odd-2", "odd-3", "good",
    ]  # fmt: skip
    (made,) = await control.distributions.distributions(limit=10)
    assert made.image_id == "good"


async def test_a_policy_run_ends_when_it_is_cancelled_whatever_its_lister_makes_of_that(
    control: Any, lister_of: Any
) -> None:
    begun = asyncio.Event()

    async def stubborn() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError as exc:
            raise SourceError("source.unreachable", "it was cancelled") from exc

    policy = await control.add_policy()
    running = asyncio.create_task(control.pipeline(lister_of(stubborn)).run_policies())
    await begun.wait()
    running.cancel()
    await asyncio.wait([running])
    assert running.cancelled()
    assert (await control.policies.policy(policy.policy_id)).last_outcome is None


# --- what is over


async def test_what_was_cancelled_long_ago_is_gone_with_its_hosts_and_transfers(
    control: Any,
) -> None:
    blob_id = await control.add_blob()
    made = await control.distribute()
    await control.say(
        "h1",
        {"distribution_id": str(made), "blob_id": blob_id, "state": "cached", "bytes_wasted": 7},
    )
    await control.distributions.cancel(made)
    await age(control, days=DAYS - 1)
    await forget(control)
    assert await rows(control, "distribution") == 1
    await age(control, days=1)
    await forget(control)
    assert [await rows(control, one) for one in ("distribution_host", "transfer")] == [0, 0]
    assert await rows(control, "distribution") == 0


async def test_what_was_done_long_ago_is_wanted_still(control: Any) -> None:
    blob_id = await control.add_blob()
    made = await control.distribute()
    for host in ("h1", "h2"):
        await control.say(
            host, {"distribution_id": str(made), "blob_id": blob_id, "state": "cached"}
        )
    await age(control, days=10 * DAYS)
    await forget(control)
    assert [one.distribution_id for one in await control.swarms.desired("h1")] == [made]


async def test_what_was_done_long_ago_and_is_cancelled_today_is_remembered_for_its_time(
    control: Any,
) -> None:
    blob_id = await control.add_blob()
    made = await control.distribute(targets=Targets(hosts=["h1"]))
    await control.say("h1", {"distribution_id": str(made), "blob_id": blob_id, "state": "cached"})
    await age(control, days=2 * DAYS)
    await control.distributions.cancel(made)
    await forget(control)
    assert await rows(control, "distribution") == 1


@pytest.mark.parametrize(("hosts", "left"), [(["h1"], 1), (["h1", "h2"], 2)])
async def test_what_is_done_goes_where_a_younger_one_of_the_same_hosts_wants_the_same(
    control: Any, hosts: list[str], left: int
) -> None:
    blob_id = await control.add_blob()
    old = await control.distribute(targets=Targets(hosts=["h1"]))
    young = await control.distribute(targets=Targets(hosts=hosts))
    for host in hosts:
        told = {"distribution_id": str(young), "blob_id": blob_id, "state": "cached"}
        await control.say(host, told)
    assert (await control.distributions.distribution(old)).state == "done"
    await age(control, days=2 * DAYS)
    await forget(control)
    assert await rows(control, "distribution") == left
    assert len(await control.swarms.desired("h1")) == 1


async def test_hosts_are_told_of_a_deleted_image_however_long_ago_it_was_done(
    control: Any,
) -> None:
    blob_id = await control.add_blob()
    made = await control.distribute(targets=Targets(hosts=["h1"]))
    await control.say("h1", {"distribution_id": str(made), "blob_id": blob_id, "state": "cached"})
    async with db.transaction(control.pool) as connection:
        await control.store.image_deleted(connection, IMAGE)
    await age(control, days=2 * DAYS)
    await forget(control)
    assert await control.swarms.deleted_of(["h1", "h2"]) == {"h1": [IMAGE]}


async def test_no_batch_takes_more_rows_than_it_may_and_the_turns_take_all(control: Any) -> None:
    hosts = [f"h{number}" for number in range(25)]
    for _ in range(3):
        await control.distributions.cancel(await control.distribute(targets=Targets(hosts=hosts)))
    await age(control, days=DAYS)
    history = HistoryStore(control.pool, distributions_at_once=2, rows_at_once=10)
    left = [75]
    while await history.forget_distributions(days=DAYS) is not None:
        left.append(await rows(control, "distribution_host"))
    assert all(before - after <= 10 for before, after in itertools.pairwise(left))
    assert await rows(control, "distribution") == 0


async def test_what_another_replica_is_dropping_is_left_to_it(control: Any) -> None:
    await control.distributions.cancel(await control.distribute())
    await age(control, days=DAYS)
    async with db.transaction(control.pool) as connection:
        await connection.execute("SELECT 1 FROM distribution FOR UPDATE")
        assert await HistoryStore(control.pool).forget_distributions(days=DAYS) is None


async def test_blobs_and_deleted_images_go_when_nobody_knows_them_any_more(control: Any) -> None:
    await control.add_image("wanted")
    kept = await control.add_blob("wanted")
    await control.add_blob(state="error")
    failed = await control.distribute()
    async with db.transaction(control.pool) as connection:
        await control.store.image_deleted(connection, IMAGE)
    for table in ("distribution", "blob", "image"):
        await age(control, days=DAYS, table=table)
    await forget(control)
    async with db.connection(control.pool) as connection:
        blobs = [str(row["blob_id"]) for row in await connection.fetch("SELECT * FROM blob")]
        images = [row["image_id"] for row in await connection.fetch("SELECT * FROM image")]
    assert (blobs, images) == ([kept], ["wanted"])
    assert failed not in {one.distribution_id for one in await control.swarms.desired("h1")}


async def test_a_host_that_is_gone_for_good_keeps_no_distribution_to_labels_from_its_end(
    control: Any,
) -> None:
    blob_id = await control.add_blob()
    for host in ("h1", "gone"):
        await control.say(host)
    by_labels = await control.distribute(targets=Targets(hosts=None))
    by_name = await control.distribute(targets=Targets(hosts=["gone", "h1"]))
    assert await control.states(by_labels) == {"gone": "waiting", "h1": "waiting"}
    await age(control, days=DAYS, table="host")
    told = {"distribution_id": str(by_labels), "blob_id": blob_id, "state": "cached"}
    await control.say("h1", told)
    assert (await control.distributions.distribution(by_labels)).state == "distributing"
    assert await forget(control) == [by_labels]
    assert [one.host for one in await control.swarms.hosts(limit=10)] == ["h1"]
    assert await control.states(by_labels) == {"h1": "cached"}
    assert (await control.distributions.distribution(by_labels)).state == "done"
    assert await control.states(by_name) == {"gone": "waiting", "h1": "cached"}
    async with db.connection(control.pool) as connection:
        keys = await connection.fetch("SELECT routing_key FROM outbox")
    assert "precache.distribution.finished" in {row["routing_key"] for row in keys}
    # it comes back, and is wanted there again
    await control.say("gone")
    assert {one.distribution_id for one in await control.swarms.desired("gone")} <= {
        by_labels,
        by_name,
    }
    assert await control.states(by_labels) == {"gone": "waiting", "h1": "cached"}


async def test_a_blob_is_kept_for_its_time_from_the_cancellation_on(control: Any) -> None:
    blob_id = await control.add_blob()
    made = await control.distribute(targets=Targets(hosts=["h1"]))
    await control.say("h1", {"distribution_id": str(made), "blob_id": blob_id, "state": "cached"})
    for table in ("distribution", "blob"):
        await age(control, days=60, table=table)
    await control.distributions.cancel(made)
    assert await control.store.retire_blobs("seed", idle_seconds=3600) == []
    await age(control, days=1)
    assert await control.store.retire_blobs("seed", idle_seconds=3600) == [blob_id]


async def test_of_old_rows_of_one_policy_and_image_the_one_that_lives_stays_the_policys(
    database_url: str,
) -> None:
    ours = [
        one for one in db.migrations_of("hostler_precache") if one.component != "hostler_common"
    ]
    policy_id = uuid.uuid4()
    async with db.open_pool(database_url, schema="precache") as pool, db.connection(pool) as one:
        await one.execute("CREATE SCHEMA precache")
        for migration in ours[:2]:
            await one.execute(migration.sql)
        await one.execute(
            "INSERT INTO image (image_id, fetcher) VALUES ('a', 'http'), ('b', 'http')"
        )
        await one.execute(
            "INSERT INTO policy (policy_id, name, lister, options, priority, every_seconds)"
            " VALUES ($1, 'p', 'static', '{}', 0, 60)",
            policy_id,
        )
        for number, (image_id, state) in enumerate(
            [("a", "error"), ("a", "done"), ("a", "error"), ("b", "cancelled"), ("b", "error")]
        ):
            await one.execute(
                "INSERT INTO distribution (distribution_id, image_id, policy_id, priority, state,"
                "   created_at) VALUES ($1, $2, $3, $4, $5, now() + make_interval(secs => $4::integer))",
                uuid.uuid4(), image_id, policy_id, number, state,
            )  # fmt: skip
        await one.execute(ours[2].sql)
        kept = await one.fetch("SELECT * FROM distribution WHERE policy_id IS NOT NULL")
    assert {(row["image_id"], row["state"]) for row in kept} == {("a", "done"), ("b", "error")}
