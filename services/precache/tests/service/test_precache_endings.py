"""Whoever listens is told once that a distribution is over, in Nova's words, whatever ended it."""

import asyncio
import json
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest

from hostler_common import db
from hostler_precache.distribution import endings
from hostler_precache.distribution.distributions import DistributionId

IMAGE = "image-1"


async def told(control: Any) -> list[tuple[str, str, dict[str, str]]]:
    """What was told of distributions: the phase, the distribution, the metadata."""
    async with db.connection(control.pool) as connection:
        rows = await connection.fetch(
            "SELECT body FROM outbox WHERE routing_key IN ('aggregate.cache_images.start',"
            "   'aggregate.cache_images.end') ORDER BY id"
        )
    bodies = [json.loads(row["body"]) for row in rows]
    found = []
    for body in bodies:
        data = body["payload"]["nova_object.data"]
        assert (data["name"], data["hosts"]) == (IMAGE, ["h1", "h2"])
        found.append((body["event_type"].rpartition(".")[2], data["uuid"], data["metadata"]))
    return found


async def begin(control: Any, distribution_id: DistributionId) -> None:
    """Its hosts may begin, and that is told."""
    async with db.transaction(control.pool) as connection:
        said = await endings.beginnings_of(connection, control.distributions, [distribution_id])
        await control.store.announce(connection, said)


async def cancelled(control: Any, made: UUID) -> None:
    await control.distributions.cancel(made)
    await control.distributions.cancel(made)


async def deleted(control: Any, made: UUID) -> None:
    del made
    async with db.transaction(control.pool) as connection:
        await control.store.image_deleted(connection, IMAGE)


async def listed_no_more(control: Any, made: UUID) -> None:
    record = await control.distributions.distribution(made)
    policy = await control.policies.policy(record.policy_id)
    async with db.transaction(control.pool) as connection:
        await control.distributions.policy_ran(connection, policy, set())


async def on_other_hosts(control: Any, made: UUID) -> None:
    """Its policy leaves the host that it waited for, and it is done."""
    record = await control.distributions.distribution(made)
    policy = replace(await control.policies.policy(record.policy_id), priority=7)
    async with db.connection(control.pool) as connection:
        await connection.execute("UPDATE distribution_host SET state = 'cached'")
    async with db.transaction(control.pool) as connection:
        await control.distributions.policy_ran(connection, policy, {IMAGE})


async def failed(control: Any, made: UUID) -> None:
    record = await control.distributions.distribution(made)
    async with db.connection(control.pool) as connection:
        await connection.execute("UPDATE blob SET state = 'fetching', piece_bytes = 1")
    await control.store.fetch_failed(
        record.blob_id, seed="seed", reason="source.hash_mismatch", retry_seconds=None
    )


async def all_hosts_ended(control: Any, made: UUID) -> None:
    record = await control.distributions.distribution(made)
    keys = {"distribution_id": str(made), "blob_id": record.blob_id}
    await control.say("h1", {**keys, "state": "cached"})
    await control.say("h2", {**keys, "state": "error", "reason": "storage.no_space"})


@pytest.mark.parametrize(
    ("end", "state"),
    [
        (all_hosts_ended, "done"), (on_other_hosts, "done"), (cancelled, "cancelled"),
        (deleted, "cancelled"), (listed_no_more, "cancelled"), (failed, "error"),
    ],
)  # fmt: skip
async def test_of_each_distribution_it_is_told_once_that_it_is_over(
    control: Any, end: Any, state: str
) -> None:
    await control.add_blob()
    policy = await control.add_policy()
    made = await control.distribute(policy_id=policy.policy_id)
    await begin(control, made)
    await endings.tell(control.distributions)
    assert await told(control) == [("start", str(made), {})]
    await end(control, made)
    # by several replicas at once, and again
    await asyncio.gather(*(endings.tell(control.distributions) for _ in range(3)))
    await endings.tell(control.distributions)
    assert (await told(control))[1:] == [("end", str(made), {"state": state})]


async def test_one_that_ended_before_its_hosts_could_begin_is_told_of_too(control: Any) -> None:
    made = await control.distribute()
    await control.distributions.cancel(made)
    await endings.tell(control.distributions)
    assert await told(control) == [("end", str(made), {"state": "cancelled"})]


async def test_a_crash_in_the_middle_of_telling_loses_nothing_and_repeats_nothing(
    control: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await control.distribute()
    await control.distributions.cancel(made)

    async def crash(*_: object) -> None:
        raise RuntimeError("the process died")

    with monkeypatch.context() as patched:
        patched.setattr("hostler_precache.distribution.endings.outbox.add", crash)
        with pytest.raises(RuntimeError, match="died"):
            await endings.tell(control.distributions)
    assert await told(control) == []
    await endings.tell(control.distributions)
    assert len(await told(control)) == 1


async def test_one_that_a_host_joins_later_goes_on_unsaid_and_one_that_begins_anew_is_told_of_again(
    control: Any,
) -> None:
    blob_id = await control.add_blob()
    policy = await control.add_policy()
    made = await control.distribute(policy_id=policy.policy_id)
    await begin(control, made)
    await all_hosts_ended(control, made)
    await endings.tell(control.distributions)
    # its disk was wiped, and then it has it again
    keys = {"distribution_id": str(made), "blob_id": blob_id}
    await control.say("h1", {**keys, "state": "waiting"})
    await endings.tell(control.distributions)
    await control.say("h1", {**keys, "state": "cached"})
    await endings.tell(control.distributions)
    assert [phase for phase, _, _ in await told(control)] == ["start", "end"]
    await control.distributions.cancel(made)
    await endings.tell(control.distributions)
    assert [phase for phase, _, _ in await told(control)] == ["start", "end"]
    await control.distribute(policy_id=policy.policy_id)  # in its row: the policy lists it again
    await begin(control, made)
    await control.distributions.cancel(made)
    await endings.tell(control.distributions)
    assert [phase for phase, _, _ in await told(control)] == ["start", "end"] * 2
    await control.distribute(policy_id=policy.policy_id)
    await control.distributions.cancel(made)  # before its hosts could begin
    await endings.tell(control.distributions)
    assert [phase for phase, _, _ in await told(control)] == [*["start", "end"] * 2, "end"]


async def test_one_that_begins_anew_before_its_end_was_told_has_one_start_and_one_end(
    control: Any,
) -> None:
    await control.add_blob()
    policy = await control.add_policy()
    made = await control.distribute(policy_id=policy.policy_id)
    await begin(control, made)
    await control.distributions.cancel(made)
    await control.distribute(policy_id=policy.policy_id)
    await begin(control, made)
    await endings.tell(control.distributions)
    await control.distributions.cancel(made)
    await endings.tell(control.distributions)
    assert [phase for phase, _, _ in await told(control)] == ["start", "end"]
