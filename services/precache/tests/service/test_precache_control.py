"""What the control plane keeps true while others write too: replicas, reports on their way, operators.

Two replicas are two transactions here; no service runs, but where a request is what is tried.
"""

import asyncio
import errno
import hashlib
import json
import os
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import AsyncMock

import aiohttp
import asyncpg
import pytest
import yarl
from prometheus_client import CollectorRegistry

from hostler_common import auth, client, db, errors, settings, testing
from hostler_precache import protocol
from hostler_precache.distribution import rollout
from hostler_precache.distribution.distributions import Policy
from hostler_precache.distribution.rollout import Rollout, Targets, Verdict
from hostler_precache.images import Image, SourceHash, Verification
from hostler_precache.jobs import Pipeline
from hostler_precache.metrics import Metrics
from hostler_precache.settings import Settings
from hostler_precache.sources.source import Source, SourceError
from hostler_precache.store import ImageNotFound
from hostler_precache.swarming.tracker import Tracker
from hostler_precache.transfer.blobs import BlobServer
from hostler_precache.transfer.manifest import ImageId
from hostler_precache.transfer.replica_store import ReplicaStore
from hostler_precache.transfer.seed import Seed

IMAGE = "image-1"
MAX = 2**63 - 1
SOON_SECONDS = 0.5  # what is not done by then waits for a lock


# --- replicas beside each other


async def test_a_blob_that_a_new_distribution_wants_is_not_retired(control: Any) -> None:
    await control.add_blob()
    async with db.transaction(control.pool) as connection:
        made = await control.distribute(connection)
        retiring = asyncio.create_task(control.store.retire_blobs("seed", idle_seconds=1))
        await asyncio.wait([retiring], timeout=SOON_SECONDS)
    assert await retiring == []
    assert [one.distribution_id for one in await control.swarms.desired("h1")] == [made]


async def test_a_distribution_made_while_its_image_is_fetched_is_not_forgotten(
    control: Any,
) -> None:
    first = await control.distribute()
    manifest: Any = SimpleNamespace(size_bytes=1, root=b"r", to_json=lambda: b"{}")
    async with db.transaction(control.pool) as connection:
        second = await control.distribute(connection)
        task = await control.store.claim_fetch(
            seed="seed", seed_url="http://seed", swarm_key=b"k", lease_seconds=30
        )
        assert task is not None

        async def finish() -> Any:
            async with db.transaction(control.pool) as other:
                return await control.store.fetch_finished(
                    other, task.blob_id, seed="seed", manifest=manifest,
                    verification=Verification.HASH, disk_format="raw",
                )  # fmt: skip

        finishing = asyncio.create_task(finish())
        await asyncio.wait([finishing], timeout=SOON_SECONDS)
    assert set(await finishing) == {first, second}


async def test_of_the_images_that_wait_the_most_urgent_is_fetched_first(control: Any) -> None:
    await control.add_image("urgent")
    await control.add_image("as urgent")
    await control.distribute()
    await control.distribute(image_id="urgent", priority=5)
    await control.distribute(image_id="as urgent", priority=5)
    claimed = [
        await control.store.claim_fetch(
            seed="seed", seed_url="http://seed", swarm_key=b"k", lease_seconds=30
        )
        for _ in range(3)
    ]
    assert [task.image.image_id for task in claimed] == ["urgent", "as urgent", IMAGE]


async def test_a_policy_that_changes_its_hosts_and_a_host_that_ends_do_not_block_each_other(
    control: Any,
) -> None:
    policy = await control.add_policy()
    blob_id = await control.add_blob()
    made = await control.distribute(policy_id=policy.policy_id)
    keys = {"distribution_id": str(made), "blob_id": blob_id, "state": "cached"}
    retargeted = await _changed(control, policy, hosts=["h2"])

    async def run() -> None:
        async with db.transaction(control.pool) as other:
            await control.distributions.policy_ran(other, retargeted, {IMAGE})

    async with db.transaction(control.pool) as connection:
        # a report in its two halves: the hosts' rows, then the distributions'
        told = [("h1", protocol.BlobReport(**keys))]
        changed = await control.swarms._store_progress(connection, told)
        running = asyncio.create_task(run())
        await asyncio.wait([running], timeout=SOON_SECONDS)
        await control.swarms.settle(connection, {row["distribution_id"] for row in changed})
    await running
    assert await control.states(made) == {"h2": "waiting"}


async def test_two_replicas_whose_hosts_end_together_end_the_distribution(
    control: Any,
) -> None:
    blob_id = await control.add_blob()
    made = await control.distribute()
    told = protocol.BlobReport(distribution_id=str(made), blob_id=blob_id, state="cached")

    async def other() -> None:
        async with db.transaction(control.pool) as connection:
            await control.swarms._store_progress(connection, [("h2", told)])
            stored.set()
            await finishing.wait()
            await control.swarms.settle(connection, {made})

    stored, finishing = asyncio.Event(), asyncio.Event()
    running = asyncio.create_task(other())
    async with db.transaction(control.pool) as connection:
        await control.swarms._store_progress(connection, [("h1", told)])
        await stored.wait()
        await control.swarms.settle(connection, {made})
        finishing.set()
        await asyncio.wait([running], timeout=SOON_SECONDS)
    await running
    assert (await control.distributions.distribution(made)).state == "done"


async def _changed(control: Any, policy: Policy, **fields: Any) -> Policy:
    values: dict[str, Any] = {
        name: getattr(policy, name)
        for name in ("lister", "options", "hosts", "labels", "priority", "every_seconds")
    }
    await control.policies.change_policy(policy.policy_id, **(values | fields))
    found: Policy = await control.policies.policy(policy.policy_id)
    return found


async def test_a_host_joins_while_a_report_ends_its_distribution(control: Any) -> None:
    blob_id = await control.add_blob()
    made = await control.distribute(targets=Targets(hosts=None))
    await control.swarms.desired("h1")
    told = {"distribution_id": str(made), "blob_id": blob_id, "state": "cached"}
    await control.say("h1", told)
    async with db.transaction(control.pool) as connection:
        # the half of `desired` that joins a host
        await connection.execute(
            "INSERT INTO distribution_host (distribution_id, host) VALUES ($1, 'h2')", made
        )
        saying = asyncio.create_task(control.say("h1", {**told, "state": "error"}))
        done, _ = await asyncio.wait([saying], timeout=10 * SOON_SECONDS)
        assert done == {saying}


# --- policies


async def test_a_policy_that_is_removed_while_it_runs_leaves_nothing(
    control: Any, lister_of: Any
) -> None:
    policy = await control.add_policy()

    async def meanwhile() -> None:
        await control.policies.remove_policy(policy.policy_id)

    await control.pipeline(lister_of(meanwhile)).run_policies()
    assert await control.distributions.distributions(limit=10) == []


async def test_two_runs_of_one_policy_at_once_distribute_an_image_once(
    control: Any, lister_of: Any
) -> None:
    await control.add_policy()
    together = asyncio.Barrier(2)
    pipeline = control.pipeline(lister_of(together.wait))
    policy = await control.policies.claim_policy()
    assert policy is not None
    await asyncio.gather(pipeline._run_policy(policy), pipeline._run_policy(policy))
    assert len(await control.distributions.distributions(limit=10)) == 1


async def test_a_run_that_was_cut_off_is_due_again_long_before_the_next(control: Any) -> None:
    made = await control.add_policy(every_seconds=7 * 86400)
    policy = await control.policies.claim_policy()
    assert policy is not None
    assert policy.next_run_at - datetime.now(UTC) < timedelta(hours=1)
    await control.policies.policy_ran(made.policy_id, outcome="ok", detail="")
    policy = await control.policies.policy(made.policy_id)
    assert policy.next_run_at - datetime.now(UTC) > timedelta(days=6)


async def test_a_policy_that_is_changed_while_it_runs_runs_again(control: Any) -> None:
    made = await control.add_policy()
    assert await control.policies.claim_policy() is not None
    await control.policies.run_policy_now(made.policy_id)
    await control.policies.policy_ran(made.policy_id, outcome="ok", detail="")
    assert await control.policies.claim_policy() is not None


async def test_the_outcome_of_a_policy_may_be_any_text(control: Any, lister_of: Any) -> None:
    policy = await control.add_policy()

    async def meanwhile() -> None:
        raise SourceError("source.odd", "a\0b\ud800" + "c" * 100_000)

    await control.pipeline(lister_of(meanwhile)).run_policies()
    detail = (await control.policies.policy(policy.policy_id)).last_detail
    assert detail is not None
    assert "ab?cc" in detail
    assert len(detail) < 10_000


async def test_an_image_that_is_listed_twice_and_differently_is_the_first_one_and_is_said(
    control: Any,
) -> None:
    policy = await control.add_policy()
    listed = [
        Image(image_id=ImageId(IMAGE), fetcher="http", location=f"http://images/{number}")
        for number in (1, 1, 2)
    ]
    lister = SimpleNamespace(list=AsyncMock(return_value=listed))
    await control.pipeline(lister).run_policies()
    ran = await control.policies.policy(policy.policy_id)
    assert ran.last_outcome == "partial"
    assert f"{IMAGE}: is listed twice, and differently" in ran.last_detail
    assert (await control.store.image(IMAGE)).image.location == "http://images/1"
    assert len(await control.distributions.distributions(limit=10)) == 1


async def test_an_image_that_cannot_be_is_refused_and_the_others_are_not(control: Any) -> None:
    bad = Image(image_id=ImageId("image-2"), fetcher="http", size_bytes=-1)
    with pytest.raises(errors.Invalid):
        async with db.transaction(control.pool) as connection:
            await control.store.add_image(connection, bad)


# --- what is over, deleted or lost


async def test_an_image_that_is_deleted_is_distributed_no_more(control: Any) -> None:
    async with db.transaction(control.pool) as connection:
        await control.store.image_deleted(connection, IMAGE)
    with pytest.raises(ImageNotFound, match="deleted"):
        await control.distribute()
    await control.add_image()
    await control.distribute()


@pytest.mark.parametrize("is_heard", [True, False])
async def test_what_the_seed_has_lost_comes_from_hosts_that_are_heard_of_or_is_fetched_again(
    control: Any, is_heard: bool
) -> None:
    blob_id = await control.add_blob()
    made = await control.distribute()
    for host in ("h1", "h2"):
        await control.say(
            host, {"distribution_id": str(made), "blob_id": blob_id, "state": "cached"}
        )
    assert (await control.distributions.distribution(made)).state == "done"
    if not is_heard:
        async with db.transaction(control.pool) as connection:
            await connection.execute("UPDATE host SET seen_at = now() - interval '1 hour'")
    again = await control.store.blob_lost(blob_id, reason="seed.damaged", silent_seconds=60)
    assert again is not is_heard
    found = await control.distributions.distribution(made)
    swarm = await control.swarms.swarm(blob_id, within_seconds=60)
    assert swarm.seeds == []
    if is_heard:
        assert (found.state, found.blob_id) == ("done", blob_id)
        assert await control.states(made) == {"h1": "cached", "h2": "cached"}
        assert [member.host for member in swarm.members] == ["h1", "h2"]
    else:
        assert (found.state, found.blob_id) == ("fetching", None)
        assert await control.states(made) == {"h1": "waiting", "h2": "waiting"}


async def test_a_blob_without_a_seed_is_given_up_when_its_last_host_is_gone_and_one_waits(
    control: Any,
) -> None:
    async with db.transaction(control.pool) as connection:
        await connection.execute("INSERT INTO seed (seed) VALUES ('seed')")
    replicas = ReplicaStore(control.pool)

    async def gone() -> list[str]:
        return [str(one) for one in await replicas.blobs_of_the_gone(silent_seconds=60)]

    blob_id = await control.add_blob()
    made = await control.distribute()
    await control.say("h1", {"distribution_id": str(made), "blob_id": blob_id, "state": "cached"})
    assert not await control.store.blob_lost(blob_id, reason="seed.damaged", silent_seconds=60)
    assert await gone() == []
    async with db.transaction(control.pool) as connection:
        await connection.execute("UPDATE host SET seen_at = now() - interval '1 hour'")
    assert await gone() == [blob_id]
    # its seed says that it is there again, with the file
    await control.store.seed_started("seed", "http://again")
    assert await gone() == []
    assert (await control.swarms.swarm(blob_id, within_seconds=60)).seeds == ["http://again"]


class Breaking:
    """A fetcher of an image that breaks off."""

    @asynccontextmanager
    async def open(self, image: Image) -> AsyncIterator[Source]:
        """It breaks off after a byte."""
        del image

        async def chunks() -> AsyncIterator[bytes]:
            yield b"x"
            raise SourceError("source.truncated", "it broke off", is_transient=True)

        async def skip(to: int) -> bool:
            del to
            return True

        yield Source(size_bytes=2, chunks=chunks(), skip=skip)


class Whole:
    """A fetcher of an image of two bytes."""

    @asynccontextmanager
    async def open(self, image: Image) -> AsyncIterator[Source]:
        """All of it comes."""
        del image

        async def chunks() -> AsyncIterator[bytes]:
            yield b"ok"

        yield Source(size_bytes=2, chunks=chunks())


def pipeline_of(
    control: Any,
    database_url: str,
    directory: Path,
    discard_leftovers: Any = None,
    fetcher: type = Breaking,
) -> Pipeline:
    seed = Seed(name="mine", url="http://mine", directory=directory, server=BlobServer(slots=1))
    loaded = settings.load(
        Settings, amqp_url="amqp://x", database_url=database_url, auth_mode="none",
        reserve_bytes=0, lease_seconds=60, fetch_concurrency=1,
    )  # fmt: skip
    return Pipeline(
        settings=loaded, store=control.store, distributions=control.distributions,
        swarms=control.swarms, tracking=Tracker(control.swarms, member_seconds=30),
        policies=control.policies, seed=seed, replicas=cast("Any", SimpleNamespace(
            discard_leftovers=discard_leftovers or AsyncMock())),
        plugins=cast("Any", SimpleNamespace(fetcher=lambda _: fetcher())),
        metrics=Metrics(CollectorRegistry()),
    )  # fmt: skip


async def wanted_image(control: Any, sha256: str = "0" * 64) -> None:
    """An image with a hash, and a distribution that waits for it."""
    hashed = Image(
        image_id=ImageId(IMAGE), fetcher="http", location="http://images/1", size_bytes=2,
        source_hash=SourceHash(algorithm="sha256", value=sha256), disk_format="raw",
    )  # fmt: skip
    async with db.transaction(control.pool) as connection:
        await control.store.add_image(connection, hashed)
    await control.distribute()


async def test_what_an_interrupted_fetch_left_goes_when_another_replica_has_taken_it_over(
    control: Any, database_url: str, tmp_path: Path
) -> None:
    await wanted_image(control)
    pipeline = pipeline_of(control, database_url, tmp_path)
    fetching = asyncio.create_task(pipeline.fetch_forever())

    async def is_tried_again() -> str | None:
        async with db.connection(control.pool) as connection:
            found: str | None = await connection.fetchval("SELECT reason FROM blob")
        return found

    assert await testing.eventually(is_tried_again) == "source.truncated: it broke off"
    fetching.cancel()
    await asyncio.wait([fetching])
    (left,) = tmp_path.iterdir()  # noqa: ASYNC240  a test's own directory
    assert left.suffix == ".part"
    await pipeline.retire()
    assert left.exists()  # it is this seed's to try again
    async with db.transaction(control.pool) as connection:
        await connection.execute("UPDATE blob SET seed = 'another'")
    await pipeline.retire()
    assert not left.exists()


async def test_what_a_killed_process_left_goes_when_another_replica_has_taken_it_over(
    control: Any, database_url: str, tmp_path: Path
) -> None:
    await wanted_image(control)
    task = await control.store.claim_fetch(
        seed="mine", seed_url="http://mine", swarm_key=b"k", lease_seconds=60
    )

    async def is_taken_over() -> None:  # while files are kept or discarded, and read
        async with db.transaction(control.pool) as connection:
            await connection.execute(
                "UPDATE blob SET seed = 'another', lease_until = now() + interval '1 hour'"
            )

    pipeline = pipeline_of(control, database_url, tmp_path, is_taken_over)
    other = tmp_path / "somebody's own"
    # one was cut off, the other killed before it said that it was done
    for left in (tmp_path / task.blob_id, tmp_path / f"{task.blob_id}.part", other):
        left.touch()
    fetching = asyncio.create_task(pipeline.fetch_forever())

    async def are_gone() -> bool:
        await pipeline.retire()
        return list(tmp_path.iterdir()) == [other]  # noqa: ASYNC240  a test's own directory

    await testing.eventually(are_gone)
    fetching.cancel()
    await asyncio.wait([fetching])


async def test_a_seeds_disk_that_became_read_only_fails_the_fetch_and_not_the_service(
    control: Any, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await wanted_image(control)
    pipeline = pipeline_of(control, database_url, tmp_path)

    def read_only(*_: object) -> int:
        monkeypatch.setattr(os, "unlink", read_only)
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "pwrite", read_only)
    fetching = asyncio.create_task(pipeline.fetch_forever())

    async def why() -> str | None:
        async with db.connection(control.pool) as connection:
            found: str | None = await connection.fetchval(
                "SELECT reason FROM blob WHERE state = 'error'"
            )
        return found

    reason = await testing.eventually(why)
    assert reason is not None
    assert reason.startswith("storage.failed")
    assert "Read-only file system" in reason
    await pipeline.retire()
    assert not fetching.done()
    fetching.cancel()
    await asyncio.wait([fetching])


async def test_an_image_that_is_ready_stays_so_though_the_answer_to_the_commit_was_lost(
    control: Any, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await wanted_image(control, hashlib.sha256(b"ok").hexdigest())
    pipeline = pipeline_of(control, database_url, tmp_path, fetcher=Whole)
    begin, finish = db.transaction, control.store.fetch_finished
    finished: list[object] = []

    async def finishes(*args: Any, **fields: Any) -> object:
        finished.append(await finish(*args, **fields))
        return finished[-1]

    @asynccontextmanager
    async def loses_an_answer(pool: db.Pool, **fields: Any) -> AsyncIterator[db.Connection]:
        before = len(finished)
        async with begin(pool, **fields) as connection:
            yield connection
        if before == 0 and finished:
            raise db.DatabaseUnavailable("the connection was lost")

    monkeypatch.setattr(control.store, "fetch_finished", finishes)
    monkeypatch.setattr(db, "transaction", loses_an_answer)
    fetching = asyncio.create_task(pipeline.fetch_forever())

    async def is_asked_again() -> bool:
        return len(finished) == 2

    await testing.eventually(is_asked_again)
    monkeypatch.undo()

    async def is_done() -> bool:
        return not pipeline._fetching

    await testing.eventually(is_done)
    assert finished[1] is None
    assert [path.suffix for path in tmp_path.iterdir()] == [""]  # noqa: ASYNC240  a test's own directory
    async with db.connection(control.pool) as connection:
        said = await connection.fetch("SELECT state FROM blob")
        told = await connection.fetchval(
            "SELECT count(*) FROM outbox WHERE routing_key = 'precache.image.fetched'"
        )
    assert [row["state"] for row in said] == ["ready"]
    assert told == 1
    fetching.cancel()
    await asyncio.wait([fetching])


async def test_a_distribution_that_is_cancelled_is_told_of_no_more(control: Any) -> None:
    blob_id = await control.add_blob()
    cancelled, other = await control.distribute(), await control.distribute()
    await control.distributions.cancel(cancelled)
    ended, _ = await control.say(
        "h1", {"distribution_id": str(other), "blob_id": blob_id, "state": "cached"}
    )
    assert [one.distribution_id for one in ended] == [other]


# --- canaries and pauses


async def test_who_pauses_what_its_canaries_stopped_does_not_make_it_wait_for_them_again(
    control: Any,
) -> None:
    await control.add_blob()
    made = await control.distribute(rollout=Rollout(canary_percent=50))
    async with db.transaction(control.pool) as connection:
        await control.distributions.pause(connection, made, reason="canary.failed: 1 of 1")
        await control.distributions.pause(connection, made, reason="by somebody")
        await control.distributions.resume(connection, made)
    assert (await control.distributions.distribution(made)).wave == 1


async def test_without_hosts_the_first_that_comes_is_the_canary(control: Any) -> None:
    await control.add_blob()
    made = await control.distribute(
        targets=Targets(hosts=None), rollout=Rollout(canary_percent=10)
    )
    async with db.transaction(control.pool) as connection:
        (live,) = await control.distributions.claim_live(connection)
    assert rollout.canary_verdict(live.canary_states) is Verdict.WAIT
    assert [one.distribution_id for one in await control.swarms.desired("h1")] == [made]
    assert await control.swarms.desired("h2") == []


# --- reports that overtake each other


async def test_a_report_that_comes_after_a_later_one_changes_nothing(control: Any) -> None:
    blob_id = await control.add_blob()
    made = await control.distribute(targets=Targets(hosts=["h1"]))
    keys = {"distribution_id": str(made), "blob_id": blob_id}
    session = str(uuid.uuid4())

    async def say(sequence: int, session: str = session, **blob: Any) -> Any:
        report = control.report("h1", {**keys, **blob}).model_copy(
            update={"session_id": session, "sequence": sequence, "free_bytes": sequence}
        )
        async with db.transaction(control.pool) as connection:
            return await control.swarms.report(connection, {"h1": report})

    ended, finished = await say(3, state="cached", bytes_done=100)
    assert ([one.host for one in ended], finished) == (["h1"], [made])
    for sequence in (2, 3, 1):  # one that was overtaken, one told twice, one long forgotten
        late = await say(sequence, state="transferring", bytes_done=sequence)
        assert late == ([], [])
    assert await control.states(made) == {"h1": "cached"}
    (host,) = await control.swarms.hosts(limit=10)
    assert host.free_bytes == 3
    # another run of the agent counts from the beginning
    await say(1, session=str(uuid.uuid4()), state="transferring")
    assert await control.states(made) == {"h1": "transferring"}


async def test_two_replicas_that_hear_one_host_store_the_later_report(control: Any) -> None:
    blob_id = await control.add_blob()
    made = await control.distribute(targets=Targets(hosts=["h1"]))
    session = str(uuid.uuid4())

    def told(sequence: int) -> dict[str, protocol.HostReport]:
        report = control.report(
            "h1",
            {"distribution_id": str(made), "blob_id": blob_id, "state": "transferring",
             "pieces_done": sequence},
        )  # fmt: skip
        update = {"session_id": session, "sequence": sequence}
        return {"h1": report.model_copy(update=update)}

    async def other() -> None:
        async with db.transaction(control.pool) as connection:
            await control.swarms.report(connection, told(1))

    await control.say("h1")
    async with db.transaction(control.pool) as connection:
        await control.swarms.report(connection, told(2))
        running = asyncio.create_task(other())
        await asyncio.wait([running], timeout=SOON_SECONDS)
    await running
    (host,) = await control.distributions.progress(made)
    assert host.pieces_done == 2


# --- what thousands ask at once


async def test_hosts_that_ask_together_are_told_what_each_is_told_alone(control: Any) -> None:
    await control.add_image("other")
    for image_id in (IMAGE, "other"):
        await control.add_blob(image_id)
    await control.distribute(targets=Targets(hosts=["h1", "h2"]))
    await control.distribute(targets=Targets(hosts=["h2"]), image_id="other", priority=5)
    paused = await control.distribute(targets=Targets(hosts=["h3"]))
    async with db.transaction(control.pool) as connection:
        await control.distributions.pause(connection, paused, reason="by somebody")
    hosts = ["h1", "h2", "h3", "h4", "h1"]
    together = await control.swarms.desired_of(hosts)
    assert {host: await control.swarms.desired(host) for host in hosts} == together
    assert [one.image_id for one in together["h2"]] == ["other", IMAGE]
    assert [one.is_paused for one in together["h3"]] == [True]
    assert together["h4"] == []


async def test_of_hosts_that_come_together_where_there_was_none_one_is_the_canary(
    control: Any,
) -> None:
    await control.add_blob()
    made = await control.distribute(
        targets=Targets(hosts=None), rollout=Rollout(canary_percent=10)
    )
    told = await control.swarms.desired_of(["h1", "h2", "h3"])
    progress = await control.distributions.progress(made)
    assert [(one.host, one.wave) for one in progress] == [("h1", 0), ("h2", 1), ("h3", 1)]
    assert [host for host in told if told[host]] == ["h1"]


async def test_of_hosts_that_come_together_a_share_joins_and_one_is_the_canary(
    control: Any,
) -> None:
    await control.add_blob()
    hosts = [f"h{number}" for number in range(20)]
    for host in hosts:
        await control.say(host)
    async with db.transaction(control.pool) as connection:
        await connection.execute("DELETE FROM host WHERE host > 'h1'")  # all but h0 and h1
    made = await control.distribute(
        targets=Targets(hosts=None, percent=25), rollout=Rollout(canary_percent=10)
    )
    for host in hosts[2:]:
        await control.say(host)
    told = await control.swarms.desired_of(hosts)
    progress = await control.distributions.progress(made)
    assert len(progress) == 5
    assert [one.host for one in progress if one.wave == 0] == [h for h in hosts if told[h]]


# --- agents that lie


async def test_totals_beyond_every_number_break_no_sum(control: Any) -> None:
    blob_id = await control.add_blob()
    made = await control.distribute()
    (found,) = await control.distributions.distributions(limit=10)
    assert (found.seed_sent_bytes, found.peers_sent_bytes) == (0, 0)
    assert {one.sent_bytes for one in await control.distributions.progress(made)} == {0}
    assert set((await control.swarms.moved_bytes()).values()) == {0}
    for count in ("sent_bytes", "bytes_from_seed", "bytes_from_peers", "bytes_wasted"):
        value: Any = {str(made): MAX} if count == "sent_bytes" else MAX
        for host in ("h1", "h2", "h1"):
            await control.say(
                host,
                {"distribution_id": str(made), "blob_id": blob_id, "state": "transferring",
                 count: value},
            )  # fmt: skip
    (found,) = await control.distributions.distributions(limit=10)
    assert found.peers_sent_bytes == MAX
    assert {one.sent_bytes for one in await control.distributions.progress(made)} == {MAX}
    assert (await control.swarms.moved_bytes())["seed"] == MAX


# --- requests


async def test_what_two_operators_change_at_once_is_both_there(
    precache: Any, database_url: str
) -> None:
    async with precache() as service:
        made = await service.api.post(
            "/v1/distributions",
            {"image_id": "x", "image": {"image_id": "x", "fetcher": "http",
             "location": "http://127.0.0.1:1/x"}, "hosts": ["h1"]},
        )  # fmt: skip
        path = f"/v1/distributions/{made['distribution_id']}"
        await service.api.post(f"{path}/pause", {})
        held = await asyncpg.connect(database_url)
        async with held.transaction():
            await held.execute("SELECT 1 FROM precache.distribution FOR UPDATE")
            changes = [
                asyncio.create_task(service.api.call("PATCH", path, body=body))
                for body in ({"priority": 7}, {"host_bytes_per_second": 5})
            ]
            await asyncio.wait(changes, timeout=SOON_SECONDS)
        await asyncio.gather(*changes)
        await held.close()
        found = await service.api.get(path)
        assert (found["priority"], found["rollout"]["host_bytes_per_second"]) == (7, 5)


async def test_no_number_and_no_text_in_a_request_is_our_fault(precache: Any) -> None:
    image = {"image_id": "x", "fetcher": "http", "location": "http://127.0.0.1:1/x"}
    session_id = str(uuid.uuid4())
    bodies: list[tuple[str, str, Any]] = [
        ("POST", "/v1/images", {**image, "size_bytes": 5, "name": "a\0\ud800"}),
        ("POST", "/v1/policies", {"name": "p\ud800", "options": {"\ud800": "\0"}}),
        ("POST", "/v1/policies", {"name": "p", "options": {"a": 10**4000, "\0": 1}}),
        ("POST", "/v1/policies", {"name": "p\0", "every_seconds": 10**400}),
        ("POST", "/v1/distributions", {"image_id": "x", "\ud800": 1}),
        ("POST", "/v1/plans", {"image_id": "x", "labels": {"\ud800": "a"}}),
        ("PUT", "/v1/hosts/a%00/report", {"url": "http://a", "session_id": session_id}),
        ("PUT", "/v1/hosts/a/report", {"url": "http://a\ud800", "session_id": session_id}),
        ("PUT", "/v1/hosts/a/report", {"url": "http://a", "session_id": "\0", "\ud800": 1}),
        ("PUT", "/v1/hosts/a/report", [{"a": 10**4000}]),
        ("GET", "/v1/images?marker=%00%ff", None),
        ("GET", "/v1/hosts?marker=%00", None),
        ("GET", "/v1/policies?marker=%00", None),
        ("GET", "/v1/distributions?image_id=%00", None),
        ("GET", "/v1/images/%00", None),
        ("GET", "/v1/desired?host=%00", None),
    ]
    for size_bytes in (2**62, 10**400):
        wanted = {"image_id": "x", "image": {**image, "size_bytes": size_bytes}, "hosts": ["h1"]}
        late, early = "9999-12-31T23:59:59-14:00", "0001-01-01T00:00:00+14:00"
        bodies += [
            ("POST", "/v1/plans", {**wanted, "host_bytes_per_second": 1, "deadline_at": late}),
            ("POST", "/v1/distributions", {**wanted, "deadline_at": early}),
            ("POST", "/v1/distributions", {**wanted, "total_bytes_per_second": 1}),
            ("POST", "/v1/images", {**image, "size_bytes": size_bytes}),
        ]
    headers, found = {"Content-Type": "application/json"}, []
    async with precache() as service, aiohttp.ClientSession(headers=headers) as session:
        for method, path, body in bodies:
            data = None if body is None else json.dumps(body)
            url = yarl.URL(service.url + path, encoded=True)
            async with session.request(method, url, data=data) as response:
                if response.status >= 500:
                    found.append((method, path, (data or "")[:80]))
        async with session.get(f"{service.url}/v1/distributions") as response:
            (made,) = (await response.json())["distributions"]
        async with session.get(f"{service.url}/distributions/{made['distribution_id']}") as page:
            assert page.status == 200
    assert found == []


async def test_a_hosts_token_speaks_for_that_host_and_a_shared_one_for_all(
    precache: Any, source: Any, make_image: Any, request_of: Any, over: Any, tmp_path: Any
) -> None:
    data = make_image(1000)
    names = {"h1": "agent@h1", "h2": "agent@h2", "shared": "agents", "operator": "agent@h9"}
    tokens, lines = {}, []
    for key, name in names.items():
        role = auth.Role.OPERATOR if key == "operator" else auth.Role.AGENT
        tokens[key], line = auth.new_token(name=name, role=role)
        lines.append(line)
    file = tmp_path / "tokens"
    file.write_text("\n".join(lines))
    report = {"url": "http://h1:8310", "session_id": str(uuid.uuid4())}
    async with AsyncExitStack() as stack:
        service = await stack.enter_async_context(
            precache(auth_mode="token", auth_tokens_file=file)
        )
        apis = {
            key: await stack.enter_async_context(client.open_api(service.url, token=token))
            for key, token in tokens.items()
        }
        body = request_of("image", source.add("image", data), data, hosts=["h1"])
        made = await apis["operator"].post("/v1/distributions", body)

        async def announced() -> str | None:
            found = await apis["operator"].get(f"/v1/distributions/{made['distribution_id']}")
            return found["blob_id"] if found["state"] == "distributing" else None

        blob = f"/v1/blobs/{await testing.eventually(announced)}"
        for key in ("h1", "shared", "operator"):
            await apis[key].put("/v1/hosts/h1/report", report)
            assert len((await apis[key].get("/v1/desired", host="h1"))["images"]) == 1
            assert (await apis[key].get(f"{blob}/manifest"))["size_bytes"] == 1000
            await apis[key].get(f"{blob}/growth")
        refused = [
            apis["h2"].put("/v1/hosts/h1/report", report),
            apis["h2"].get("/v1/desired", host="h1"),
            apis["h2"].get("/v1/desired", host="h"),
            apis["h2"].get(f"{blob}/manifest"),
            apis["h2"].get(f"{blob}/growth"),
        ]
        for call in refused:
            with pytest.raises(errors.Forbidden) as caught:
                await call
            assert caught.value.code == "auth.other_host"


async def test_a_token_of_one_project_may_not_touch_what_is_every_projects(
    precache: Any, tmp_path: Any
) -> None:
    token, line = auth.new_token(name="tenant", role=auth.Role.ADMIN, projects="p1")
    file = tmp_path / "tokens"
    file.write_text(line)
    calls = [
        ("GET", "/v1/distributions", None),
        ("GET", "/v1/hosts", None),
        ("GET", "/v1/images", None),
        ("GET", "/v1/policies", None),
        ("POST", "/v1/images", {"image_id": "x"}),
        ("POST", "/v1/plans", {"image_id": "x"}),
        ("DELETE", f"/v1/distributions/{uuid.uuid4()}", None),
        ("GET", "/v1/desired?host=h1", None),
    ]
    async with (
        precache(auth_mode="token", auth_tokens_file=file) as service,
        client.open_api(service.url, token=token) as api,
    ):
        for method, path, body in calls:
            with pytest.raises(errors.Forbidden):
                await api.call(method, path, body=body)
