"""Seeds beside each other: one that is killed and never comes back, and one that comes back late."""

import uuid
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest_asyncio

from hostler_common import client, db, testing
from hostler_precache import testing as precache_testing
from hostler_precache.swarming.tracker import Tracker
from hostler_precache.transfer.manifest import BlobId
from hostler_precache.transfer.replica_store import ReplicaStore
from hostler_precache.transfer.replicas import Replicas
from hostler_precache.transfer.seed import Seed

MIB = 1 << 20


@pytest_asyncio.fixture
async def replica(amqp_url: str, database_url: str, tmp_path: Path) -> Any:
    """`await replica(name, **settings)`: a service process of its own on the one database."""
    await db.migrate(database_url, schema="precache", package="hostler_precache")
    async with AsyncExitStack() as stack:

        async def start(name: str, **settings: object) -> precache_testing.Program:
            return await stack.enter_async_context(
                precache_testing.service_process(
                    tmp_path / name,
                    amqp_url=amqp_url,
                    database_url=database_url,
                    settings={"seed_id": name, "seed_silent_seconds": 6.0, **settings},
                )
            )

        yield start


async def test_what_a_killed_seed_had_is_fetched_by_another_for_the_hosts_that_wait(
    replica: Any, source: Any, make_image: Any, request_of: Any, start_agent: Any, over: Any,
    image_id: str,
) -> None:  # fmt: skip
    data = make_image(2 * MIB)
    first = await replica("first")
    async with client.open_api(first.url) as api:
        body = request_of(image_id, source.add("image", data), data, hosts=["late"])
        made = await api.post("/v1/distributions", body)

        async def fetched() -> str | None:
            found = await api.get(f"/v1/images/{image_id}")
            return str(found["blob_id"]) if found["state"] == "ready" else None

        blob_id = await testing.eventually(fetched)
    await first.kill()
    second = await replica("second")
    place = await start_agent("late", second.url, desired_seconds=0.5)
    async with client.open_api(second.url) as api:
        answer = await over(api, made["distribution_id"])
        assert answer["host_states"] == {"cached": 1}
        assert answer["blob_id"] != blob_id
        assert (place / image_id).read_bytes() == data
        assert source.requests == ["image", "image"]
        (found,) = (await api.get("/v1/images"))["images"]
        assert (found["state"], found["blob_id"]) == ("ready", answer["blob_id"])
    # the one that comes back has nothing of it, and what a crash left is gone
    left = first.directory / f"{uuid.uuid4()}.part"
    left.write_bytes(b"x")
    assert (first.directory / blob_id).exists()
    again = await replica("first")

    async def is_clean() -> bool:
        return not left.exists() and not (again.directory / blob_id).exists()

    await testing.eventually(is_clean)


async def test_what_a_killed_seed_and_its_source_had_comes_from_a_host_that_has_it(
    replica: Any, source: Any, make_image: Any, request_of: Any, start_agent: Any, over: Any,
    image_id: str,
) -> None:  # fmt: skip
    data = make_image(3 * MIB)
    first = await replica("first")
    early = await start_agent("early", first.url)
    async with client.open_api(first.url) as api:
        body = request_of(image_id, source.add("image", data), data, hosts=["early", "late"])
        made = await api.post("/v1/distributions", body)
        path = f"/v1/distributions/{made['distribution_id']}"

        async def has_it() -> bool:
            found = await api.get(path)
            return bool(found["host_states"].get("cached") == 1)

        await testing.eventually(has_it)
        blob_id = (await api.get(path))["blob_id"]
    await first.kill()
    source.files.clear()
    # where hosts go on to tell how they are
    second = await replica("second", http_port=int(first.url.rpartition(":")[2]))

    async def is_noticed() -> bool:
        return bool(second.events("blob_of_a_gone_seed"))

    await testing.eventually(is_noticed)
    late = await start_agent("late", second.url, desired_seconds=0.5)
    async with client.open_api(second.url) as api:
        answer = await over(api, made["distribution_id"])
        assert (answer["state"], answer["host_states"]) == ("done", {"cached": 2})
        assert answer["blob_id"] == blob_id
        hosts = {one["host"]: one for one in answer["progress"]}
        assert hosts["late"]["received_from_peers_bytes"] == len(data)
    assert source.requests == ["image"]
    assert [(place / image_id).read_bytes() == data for place in (early, late)] == [True, True]


async def test_a_seed_that_was_silent_serves_no_more_what_others_gave_up(
    precache: Any, source: Any, make_image: Any, request_of: Any, database_url: str,
    image_id: str, tmp_path: Path,
) -> None:  # fmt: skip
    data = make_image(1000)
    async with precache(seed_id="mine") as service:
        body = request_of(image_id, source.add("image", data), data, hosts=["h1"])
        await service.api.post("/v1/distributions", body)

        async def ready() -> str | None:
            found = await service.api.get(f"/v1/images/{image_id}")
            return str(found["blob_id"]) if found["state"] == "ready" else None

        blob_id = await testing.eventually(ready)
        async with (
            db.open_pool(database_url, schema="precache") as pool,
            db.transaction(pool) as connection,
        ):
            await connection.execute("UPDATE blob SET state = 'error', reason = 'seed.gone'")

        async def withdrawn() -> bool:
            return not (tmp_path / "seed" / blob_id).exists()

        await testing.eventually(withdrawn, seconds=30)


async def test_a_seed_that_was_only_silent_is_told_of_again(control: Any) -> None:
    blob_id = await control.add_blob()
    made = await control.distribute()
    keys = {"distribution_id": str(made), "blob_id": blob_id, "state": "cached"}
    await control.say("h1", keys)
    tracking = Tracker(control.swarms, member_seconds=30)
    served = {blob_id, BlobId(str(uuid.uuid4()))}
    seed = SimpleNamespace(
        name="seed", url="http://seed", blob_ids=served, withdraw=served.discard
    )

    def replicas(one: SimpleNamespace) -> Replicas:
        return Replicas(
            seed=cast("Seed", one), store=control.store, replicas=ReplicaStore(control.pool),
            tracking=tracking, silent_seconds=60,
        )  # fmt: skip

    async def seeds() -> list[str]:
        return list((await tracking.swarm("h1", blob_id)).seeds)

    await replicas(seed).turn()
    assert (served, await seeds()) == ({blob_id}, ["http://seed"])
    # another replica, that has not heard of it: a host has the blob
    assert not await control.store.blob_lost(blob_id, reason="seed.gone", silent_seconds=60)
    tracking.forget(blob_id)
    assert await seeds() == []
    other = SimpleNamespace(name="other", url="http://other", blob_ids={blob_id}, withdraw=print)
    await replicas(other).turn()
    assert await seeds() == []
    # a file that was lost is not served
    await replicas(
        SimpleNamespace(**{**vars(seed), "blob_ids": {BlobId(str(uuid.uuid4()))}})
    ).turn()
    assert await seeds() == []
    await replicas(seed).turn()
    assert await seeds() == ["http://seed"]
