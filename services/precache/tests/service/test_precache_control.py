"""What the control plane keeps true while others write too: replicas, reports on their way, operators.

Two replicas are two transactions here; no service runs, but where a request is what is tried.
"""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import asyncpg
import pytest
import pytest_asyncio
import yarl

from hostler_common import auth, client, db, errors
from hostler_precache import protocol
from hostler_precache.distribution import rollout
from hostler_precache.distribution.distribution_store import DistributionStore
from hostler_precache.distribution.distributions import DistributionId, Policy, PolicyId
from hostler_precache.distribution.policy_store import PolicyStore
from hostler_precache.distribution.rollout import Rollout, Targets, Verdict
from hostler_precache.images import Image, Verification
from hostler_precache.jobs import Pipeline
from hostler_precache.sources.plugins import SourceError
from hostler_precache.store import ImageNotFound, Store
from hostler_precache.swarming.swarm_store import SwarmStore
from hostler_precache.swarming.tracker import Tracker
from hostler_precache.transfer.manifest import BlobId, ImageId

IMAGE = "image-1"
MAX = 2**63 - 1
SOON_SECONDS = 0.5  # what is not done by then waits for a lock


class Control:
    """The stores of one replica, and the rows that most of these tests begin with."""

    def __init__(self, pool: db.Pool) -> None:
        self.pool = pool
        self.store, self.distributions = Store(pool), DistributionStore(pool)
        self.swarms, self.policies = SwarmStore(pool), PolicyStore(pool)

    async def add_image(self, image_id: str = IMAGE) -> None:
        """The image is known."""
        image = Image(image_id=ImageId(image_id), fetcher="http", location="http://images/1")
        async with db.transaction(self.pool) as connection:
            await self.store.add_image(connection, image)

    async def add_blob(self, image_id: str = IMAGE, state: str = "ready") -> BlobId:
        """Its bytes are at the seed."""
        blob_id = uuid.uuid4()
        async with db.transaction(self.pool) as connection:
            await connection.execute(
                "INSERT INTO blob (blob_id, image_id, state, seed, seed_url, swarm_key,"
                "   lease_until, size_bytes, root, manifest, ready_at)"
                " VALUES ($1, $2, $3, 'seed', 'http://seed', '\\x00', now(), 100, '\\x00', '{}',"
                "   now() - interval '1 hour')",
                blob_id, image_id, state,
            )  # fmt: skip
        return BlobId(str(blob_id))

    async def distribute(
        self, connection: "db.Connection | None" = None, **fields: Any
    ) -> DistributionId:
        """The image is wanted."""
        distribution_id = DistributionId(uuid.uuid4())
        values: dict[str, Any] = {
            "image_id": IMAGE, "targets": Targets(hosts=["h1", "h2"]), "rollout": Rollout(),
            "priority": 0, **fields,
        }  # fmt: skip
        if connection is not None:
            await self.distributions.add_distribution(
                connection, distribution_id=distribution_id, **values
            )
            return distribution_id
        async with db.transaction(self.pool) as own:
            return await self.distribute(own, **fields)

    async def add_policy(self, images: Sequence[str] = (IMAGE,), **fields: Any) -> Policy:
        """A policy that is due."""
        policy_id = PolicyId(uuid.uuid4())
        values: dict[str, Any] = {
            "name": "policy", "lister": "static", "options": {"images": list(images)},
            "hosts": ["h1", "h2"], "labels": {}, "priority": 0, "every_seconds": 3600, **fields,
        }  # fmt: skip
        async with db.transaction(self.pool) as connection:
            await self.policies.add_policy(connection, policy_id=policy_id, **values)
        return await self.policies.policy(policy_id)

    def pipeline(self, lister: Any) -> Pipeline:
        """What runs policies with this lister, and does nothing else."""
        nothing: Any = None
        return Pipeline(
            settings=cast("Any", SimpleNamespace(public_url=None, token_seconds=60)),
            store=self.store, distributions=self.distributions, swarms=self.swarms,
            tracking=Tracker(self.swarms, member_seconds=30), policies=self.policies,
            seed=nothing, plugins=cast("Any", SimpleNamespace(lister=lambda _: lister)),
            metrics=cast("Any", SimpleNamespace(
                policy_runs=SimpleNamespace(labels=lambda _: SimpleNamespace(inc=lambda: None))
            )),
        )  # fmt: skip

    def report(self, host: str, *blobs: Mapping[str, Any]) -> protocol.HostReport:
        """A report of the host."""
        return protocol.HostReport(
            url=f"http://{host}:8310",
            session_id=str(uuid.uuid4()),
            blobs=[protocol.BlobReport(**blob) for blob in blobs],
        )

    async def say(self, host: str, *blobs: Mapping[str, Any]) -> Any:
        """The report is stored."""
        async with db.transaction(self.pool) as connection:
            return await self.swarms.report(connection, {host: self.report(host, *blobs)})

    async def states(self, distribution_id: uuid.UUID) -> dict[str, str]:
        """Where each host is."""
        return {h.host: h.state for h in await self.distributions.progress(distribution_id)}


@pytest_asyncio.fixture
async def control(database_url: str) -> AsyncIterator[Control]:
    """A database with one image."""
    await db.migrate(database_url, schema="precache", package="hostler_precache")
    async with db.open_pool(database_url, schema="precache") as pool:
        made = Control(pool)
        await made.add_image()
        yield made


class Lister:
    """Lists the image, after the test has done what it wants to happen meanwhile."""

    def __init__(self, meanwhile: Any) -> None:
        self._meanwhile = meanwhile

    async def list(self, options: Mapping[str, Any]) -> list[Image]:
        """The image."""
        del options
        await self._meanwhile()
        return [Image(image_id=ImageId(IMAGE), fetcher="http", location="http://images/1")]


# --- replicas beside each other


async def test_a_blob_that_a_new_distribution_wants_is_not_retired(control: Control) -> None:
    await control.add_blob()
    async with db.transaction(control.pool) as connection:
        made = await control.distribute(connection)
        retiring = asyncio.create_task(control.store.retire_blobs("seed", idle_seconds=1))
        await asyncio.wait([retiring], timeout=SOON_SECONDS)
    assert await retiring == []
    assert [one.distribution_id for one in await control.swarms.desired("h1")] == [made]


async def test_a_distribution_made_while_its_image_is_fetched_is_not_forgotten(
    control: Control,
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


async def test_a_policy_that_changes_its_hosts_and_a_host_that_ends_do_not_block_each_other(
    control: Control,
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
        await control.swarms._finish(connection, {row["distribution_id"] for row in changed})
    await running
    assert await control.states(made) == {"h2": "waiting"}


async def test_two_replicas_whose_hosts_end_together_end_the_distribution(
    control: Control,
) -> None:
    blob_id = await control.add_blob()
    made = await control.distribute()
    told = protocol.BlobReport(distribution_id=str(made), blob_id=blob_id, state="cached")

    async def other() -> None:
        async with db.transaction(control.pool) as connection:
            await control.swarms._store_progress(connection, [("h2", told)])
            stored.set()
            await finishing.wait()
            await control.swarms._finish(connection, {made})

    stored, finishing = asyncio.Event(), asyncio.Event()
    running = asyncio.create_task(other())
    async with db.transaction(control.pool) as connection:
        await control.swarms._store_progress(connection, [("h1", told)])
        await stored.wait()
        await control.swarms._finish(connection, {made})
        finishing.set()
        await asyncio.wait([running], timeout=SOON_SECONDS)
    await running
    assert (await control.distributions.distribution(made)).state == "done"


async def _changed(control: Control, policy: Policy, **fields: Any) -> Policy:
    values: dict[str, Any] = {
        name: getattr(policy, name)
        for name in ("lister", "options", "hosts", "labels", "priority", "every_seconds")
    }
    await control.policies.change_policy(policy.policy_id, **(values | fields))
    return await control.policies.policy(policy.policy_id)


async def test_a_host_joins_while_a_report_ends_its_distribution(control: Control) -> None:
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


async def test_a_policy_that_is_removed_while_it_runs_leaves_nothing(control: Control) -> None:
    policy = await control.add_policy()

    async def meanwhile() -> None:
        await control.policies.remove_policy(policy.policy_id)

    await control.pipeline(Lister(meanwhile)).run_policies()
    assert await control.distributions.distributions(limit=10) == []


async def test_two_runs_of_one_policy_at_once_distribute_an_image_once(control: Control) -> None:
    await control.add_policy()
    together = asyncio.Barrier(2)
    pipeline = control.pipeline(Lister(together.wait))
    policy = await control.policies.claim_policy()
    assert policy is not None
    await asyncio.gather(pipeline._run_policy(policy), pipeline._run_policy(policy))
    assert len(await control.distributions.distributions(limit=10)) == 1


async def test_a_run_that_was_cut_off_is_due_again_long_before_the_next(control: Control) -> None:
    made = await control.add_policy(every_seconds=7 * 86400)
    policy = await control.policies.claim_policy()
    assert policy is not None
    assert policy.next_run_at - datetime.now(UTC) < timedelta(hours=1)
    await control.policies.policy_ran(made.policy_id, outcome="ok", detail="")
    policy = await control.policies.policy(made.policy_id)
    assert policy.next_run_at - datetime.now(UTC) > timedelta(days=6)


async def test_a_policy_that_is_changed_while_it_runs_runs_again(control: Control) -> None:
    made = await control.add_policy()
    assert await control.policies.claim_policy() is not None
    await control.policies.run_policy_now(made.policy_id)
    await control.policies.policy_ran(made.policy_id, outcome="ok", detail="")
    assert await control.policies.claim_policy() is not None


async def test_the_outcome_of_a_policy_may_be_any_text(control: Control) -> None:
    policy = await control.add_policy()

    async def meanwhile() -> None:
        raise SourceError("source.odd", "a\0b\ud800" + "c" * 100_000)

    await control.pipeline(Lister(meanwhile)).run_policies()
    detail = (await control.policies.policy(policy.policy_id)).last_detail
    assert detail is not None
    assert "ab?cc" in detail
    assert len(detail) < 10_000


async def test_an_image_that_cannot_be_is_refused_and_the_others_are_not(control: Control) -> None:
    bad = Image(image_id=ImageId("image-2"), fetcher="http", size_bytes=-1)
    with pytest.raises(errors.Invalid):
        async with db.transaction(control.pool) as connection:
            await control.store.add_image(connection, bad)


# --- what is over, deleted or lost


async def test_an_image_that_is_deleted_is_distributed_no_more(control: Control) -> None:
    async with db.transaction(control.pool) as connection:
        await control.store.image_deleted(connection, IMAGE)
    with pytest.raises(ImageNotFound, match="deleted"):
        await control.distribute()
    await control.add_image()
    await control.distribute()


async def test_what_the_seed_has_lost_is_fetched_again_for_hosts_that_come_later(
    control: Control,
) -> None:
    blob_id = await control.add_blob()
    made = await control.distribute()
    for host in ("h1", "h2"):
        await control.say(
            host, {"distribution_id": str(made), "blob_id": blob_id, "state": "cached"}
        )
    assert (await control.distributions.distribution(made)).state == "done"
    await control.store.blob_lost(blob_id, reason="seed.damaged")
    assert (await control.distributions.distribution(made)).state == "fetching"
    assert await control.states(made) == {"h1": "waiting", "h2": "waiting"}


async def test_a_distribution_that_is_cancelled_is_told_of_no_more(control: Control) -> None:
    blob_id = await control.add_blob()
    cancelled, other = await control.distribute(), await control.distribute()
    await control.distributions.cancel(cancelled)
    ended, _ = await control.say(
        "h1", {"distribution_id": str(other), "blob_id": blob_id, "state": "cached"}
    )
    assert [one.distribution_id for one in ended] == [other]


# --- canaries and pauses


async def test_who_pauses_what_its_canaries_stopped_does_not_make_it_wait_for_them_again(
    control: Control,
) -> None:
    await control.add_blob()
    made = await control.distribute(rollout=Rollout(canary_percent=50))
    async with db.transaction(control.pool) as connection:
        await control.distributions.pause(connection, made, reason="canary.failed: 1 of 1")
        await control.distributions.pause(connection, made, reason="by somebody")
        await control.distributions.resume(connection, made)
    assert (await control.distributions.distribution(made)).wave == 1


async def test_without_hosts_the_first_that_comes_is_the_canary(control: Control) -> None:
    await control.add_blob()
    made = await control.distribute(
        targets=Targets(hosts=None), rollout=Rollout(canary_percent=10)
    )
    async with db.transaction(control.pool) as connection:
        (live,) = await control.distributions.claim_live(connection)
    assert rollout.canary_verdict(live.canary_states) is Verdict.WAIT
    assert [one.distribution_id for one in await control.swarms.desired("h1")] == [made]
    assert await control.swarms.desired("h2") == []


# --- agents that lie


async def test_totals_beyond_every_number_break_no_sum(control: Control) -> None:
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
