"""Images of a real Glance, with its file store, are listed, fetched, checked and distributed."""

import asyncio
import hashlib
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import aiohttp
import pytest_asyncio

from hostler_common.testing import RunningService, RunService, eventually
from hostler_precache import images, testing
from hostler_precache.placing import placement
from hostler_precache.sources import listers, plugins

DATA = testing.image_of((3 << 20) + 77, seed=5)


RunPeer = Callable[..., AbstractAsyncContextManager[str]]
Upload = Callable[..., Awaitable[dict[str, Any]]]

# the agent looks after its files several times within the age at which Nova would remove them
NOVA_CONF = """\
[DEFAULT]
instances_path = {instances}
[image_cache]
remove_unused_original_minimum_age_seconds = 3
"""


@pytest_asyncio.fixture
async def notifying_glance(run_peer: RunPeer, amqp_url: str, tmp_path: Path) -> AsyncIterator[str]:
    """A real Glance that says on the broker what happens to its images; its address."""
    directory = tmp_path / "glance"
    directory.mkdir()
    async with run_peer("glance", directory, "--amqp-url", amqp_url) as url:
        yield url


async def test_every_page_of_glance_is_listed_with_its_hashes(
    glance: str, upload: Upload, session: aiohttp.ClientSession
) -> None:
    made = [await upload(glance, DATA[: n + 1], tags=["paged"]) for n in range(5)]
    lister = listers.GlanceLister(plugins.Surroundings(session=session, glance_url=glance))
    found = await lister.list({"tags": ["paged"], "page_size": 2})
    assert [image.image_id for image in found] == [image["id"] for image in made]
    assert [image.size_bytes for image in found] == [1, 2, 3, 4, 5]
    for number, image in enumerate(found):
        assert image.source_hash == images.SourceHash(
            algorithm="sha512", value=hashlib.sha512(DATA[: number + 1]).hexdigest()
        )


async def test_a_policy_over_glance_puts_its_images_on_a_host_as_raw_disks(
    glance: str,
    upload: Upload,
    qcow2_of: Callable[[bytes, Path], bytes],
    run_service: RunService,
    amqp_url: str,
    tmp_path: Path,
) -> None:
    image = await upload(glance, DATA, tags=["precache"])
    disk = DATA[: 3 << 20] + bytes(5 << 20)
    content = await asyncio.to_thread(qcow2_of, disk, tmp_path)
    shaped = await upload(glance, content, tags=["precache"], disk_format="qcow2")
    await upload(glance, b"other")
    async with (
        testing.service(run_service, tmp_path, glance_url=glance) as service,
        testing.agent_process(
            "host-1", tmp_path / "host-1", amqp_url=amqp_url, precache_url=service.url
        ) as agent,
    ):
        policy = {"name": "golden", "lister": "glance", "options": {"tags": ["precache"]}}
        await service.api.post("/v1/policies", policy)

        async def done() -> Any:
            listed = (await service.api.get("/v1/distributions"))["distributions"]
            done = {one["image_id"]: one for one in listed if one["state"] == "done"}
            return done if len(done) == 2 else None

        distributions = await eventually(done)
        assert set(distributions) == {image["id"], shaped["id"]}
        assert {one["verification"] for one in distributions.values()} == {"hash"}
        placed = await asyncio.to_thread((agent.directory / image["id"]).read_bytes)
        assert hashlib.sha512(placed).hexdigest() == image["os_hash_value"]
        placed = await asyncio.to_thread((agent.directory / shaped["id"]).read_bytes)
        assert placed == disk
        known = await service.api.get(f"/v1/images/{image['id']}")
        assert (known["name"], known["size_bytes"]) == ("golden", len(DATA))


async def test_bytes_that_are_not_what_glance_says_are_refused(
    glance: str,
    upload: Upload,
    run_service: RunService,
    tmp_path: Path,
) -> None:
    image = await upload(glance, DATA, tags=["damaged"])
    with (tmp_path / "glance" / "images" / image["id"]).open("r+b") as file:
        # bit rot in the store, which Glance does not notice
        file.seek(1 << 20)
        file.write(b"rot")
    async with testing.service(
        run_service, tmp_path, glance_url=glance, log_level="ERROR"
    ) as service:
        policy = {"name": "damaged", "lister": "glance", "options": {"tags": ["damaged"]}}
        await service.api.post("/v1/policies", policy)

        async def failed() -> Any:
            listed = (await service.api.get("/v1/distributions"))["distributions"]
            return [one for one in listed if one["state"] == "error"]

        (distribution,) = await eventually(failed)
        assert distribution["reason"].startswith("source.hash_mismatch")
        assert list((tmp_path / "seed").iterdir()) == []


async def test_what_glance_says_runs_its_policies_at_once_and_lets_a_deleted_image_go(
    notifying_glance: str,
    upload: Upload,
    session: aiohttp.ClientSession,
    run_service: RunService,
    amqp_url: str,
    tmp_path: Path,
) -> None:
    async with testing.service(
        run_service, tmp_path, glance_url=notifying_glance, glance_amqp_url=amqp_url
    ) as service:
        policy = {
            "name": "golden",
            "lister": "glance",
            "options": {"tags": ["precache"]},
            "hosts": ["host-1"],
            "every_seconds": 7 * 86400,
        }
        made = await service.api.post("/v1/policies", policy)

        async def has_run() -> bool:
            shown = await service.api.get(f"/v1/policies/{made['policy_id']}")
            return bool(shown["last_outcome"] == "ok")

        await eventually(has_run)
        image = await upload(notifying_glance, DATA, tags=["precache"])

        async def distribution() -> dict[str, Any]:
            listed = (await service.api.get("/v1/distributions"))["distributions"]
            found: dict[str, Any] = listed[0] if listed else {"state": None}
            return found

        async def has_its_bytes() -> bool:
            found = await distribution()
            return bool(found["state"] == "distributing" and found["verification"] == "hash")

        await eventually(has_its_bytes)
        assert (await distribution())["image_id"] == image["id"]
        async with session.delete(f"{notifying_glance}/v2/images/{image['id']}") as response:
            assert response.status == 204

        async def is_let_go() -> bool:
            found = await distribution()
            return (found["state"], found["reason"]) == ("cancelled", "image.deleted")

        await eventually(is_let_go)


async def endings(service: RunningService) -> Mapping[str, tuple[str, str | None]]:
    """State and reason of each image's distribution."""
    listed = (await service.api.get("/v1/distributions"))["distributions"]
    return {one["image_id"]: (one["state"], one["reason"]) for one in listed}


async def test_what_glance_deletes_goes_from_its_hosts_and_what_a_disk_stands_on_only_with_the_disk(
    notifying_glance: str,
    upload: Upload,
    session: aiohttp.ClientSession,
    run_service: RunService,
    amqp_url: str,
    tmp_path: Path,
) -> None:
    instances = tmp_path / "instances"
    conf = tmp_path / "nova.conf"
    conf.write_text(NOVA_CONF.format(instances=instances))
    made = [await upload(notifying_glance, DATA, tags=["precache"]) for _ in range(3)]
    untagged, used, unused = (image["id"] for image in made)
    bases = {
        image["id"]: placement.target(instances / "_base", "{sha1}", image["id"]) for image in made
    }
    disk = instances / "a-guest" / "disk"
    async with (
        testing.service(
            run_service, tmp_path, glance_url=notifying_glance, glance_amqp_url=amqp_url
        ) as service,
        testing.agent_process(
            "host-1", instances / "_base", amqp_url=amqp_url, precache_url=service.url,
            settings={
                "placer": "nova", "nova_config_files": conf, "target_template": "{sha1}",
                "desired_seconds": 0.2,
            },
        ) as agent,
    ):  # fmt: skip

        async def is_ended(image_id: str, reason: str) -> None:
            async def holds() -> bool:
                return (await endings(service))[image_id] == ("cancelled", reason)

            await eventually(holds)

        async def is_gone(image_id: str) -> None:
            async def holds() -> bool:
                return not bases[image_id].exists()

            await eventually(holds)

        policy = {
            "name": "golden",
            "lister": "glance",
            "options": {"tags": ["precache"]},
            "hosts": ["host-1"],
            "every_seconds": 7 * 86400,
        }
        await service.api.post("/v1/policies", policy)

        async def all_are_placed() -> bool:
            found = await endings(service)
            return [found.get(one) for one in bases] == [("done", None)] * 3

        await eventually(all_are_placed)
        assert [base.read_bytes() for base in bases.values()] == [DATA] * 3
        disk.parent.mkdir()
        create = ["qemu-img", "create", "-f", "qcow2", "-F", "raw", "-b", str(bases[used])]
        await asyncio.to_thread(subprocess.run, [*create, str(disk)], check=True)

        async with session.delete(
            f"{notifying_glance}/v2/images/{untagged}/tags/precache"
        ) as answer:
            assert answer.status == 204
        await is_ended(untagged, "policy: listed no more")
        for image_id in (
            used,
            unused,
        ):  # one after the other: who has the second knows of the first
            async with session.delete(f"{notifying_glance}/v2/images/{image_id}") as answer:
                assert answer.status == 204
            await is_ended(image_id, "image.deleted")

        await is_gone(unused)
        assert bases[used].read_bytes() == DATA
        disk.unlink()
        await is_gone(used)
        # not wanted either, but Glance has it still: it may be wanted again
        assert bases[untagged].read_bytes() == DATA
        removed = [event["image_id"] for event in agent.events("image_removed")]
        assert removed == [unused, used]
