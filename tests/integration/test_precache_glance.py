"""Images of a real Glance, with its file store, are listed, fetched, checked and distributed."""

import asyncio
import hashlib
import io
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from hostler_common import servers
from hostler_common.testing import RunService, eventually
from hostler_precache import app, images, testing
from hostler_precache.settings import Settings
from hostler_precache.sources import listers, plugins

PEERS = Path(__file__).parent / "peers"
DATA = testing.image_of((3 << 20) + 77, seed=5)


@pytest.fixture(scope="session")
def glance_environment() -> Path:
    """Glance, installed."""
    done = subprocess.run(
        [sys.executable, str(PEERS / "build.py"), "glance"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return Path(done.stdout.strip())


@pytest.fixture(scope="module")
def glance_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where Glance keeps everything."""
    return tmp_path_factory.mktemp("glance")


@pytest.fixture(scope="module")
def glance(glance_environment: Path, glance_directory: Path) -> Iterator[str]:
    """A Glance without Keystone that anybody may use; its address."""
    port = servers.free_port()
    with (glance_directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                glance_environment / "bin" / "python", PEERS / "glance_server.py",
                "--directory", glance_directory, "--port", str(port),
            ],
            stdout=log, stderr=log,
        )  # fmt: skip
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait()


@pytest_asyncio.fixture
async def session(glance: str) -> AsyncIterator[aiohttp.ClientSession]:
    """A session, once Glance answers."""
    async with aiohttp.ClientSession() as opened:

        async def answers() -> bool:
            try:
                async with opened.get(f"{glance}/v2/images") as response:
                    return response.status == 200
            except aiohttp.ClientConnectionError:
                return False

        await eventually(answers, seconds=120)
        yield opened


async def upload(
    session: aiohttp.ClientSession, glance: str, name: str, data: bytes, **fields: Any
) -> dict[str, Any]:
    """An image in Glance, as Glance describes it."""
    body = {"name": name, "disk_format": "raw", "container_format": "bare", **fields}
    async with session.post(f"{glance}/v2/images", json=body) as response:
        assert response.status == 201, await response.text()
        image_id = (await response.json())["id"]
    headers = {"Content-Type": "application/octet-stream"}
    url = f"{glance}/v2/images/{image_id}"
    async with session.put(f"{url}/file", data=io.BytesIO(data), headers=headers) as response:
        assert response.status == 204, await response.text()
    async with session.get(url) as response:
        described: dict[str, Any] = await response.json()
    return described


async def test_every_page_of_glance_is_listed_with_its_hashes(
    glance: str, session: aiohttp.ClientSession
) -> None:
    made = [
        await upload(session, glance, f"paged-{n}", DATA[: n + 1], tags=["paged"])
        for n in range(5)
    ]
    lister = listers.GlanceLister(plugins.Surroundings(session=session, glance_url=glance))
    found = await lister.list({"tags": ["paged"], "page_size": 2})
    assert [image.image_id for image in found] == [image["id"] for image in made]
    assert [image.size_bytes for image in found] == [1, 2, 3, 4, 5]
    for number, image in enumerate(found):
        assert image.source_hash == images.SourceHash(
            algorithm="sha512", value=hashlib.sha512(DATA[: number + 1]).hexdigest()
        )


def qcow2_of(data: bytes, directory: Path) -> bytes:
    """The data as a virtual disk, compressed."""
    raw, shaped = directory / "disk.raw", directory / "disk.qcow2"
    raw.write_bytes(data)
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c"]
    subprocess.run([*convert, str(raw), str(shaped)], check=True)
    return shaped.read_bytes()


async def test_a_policy_over_glance_puts_its_images_on_a_host_as_raw_disks(
    glance: str,
    session: aiohttp.ClientSession,
    run_service: RunService,
    amqp_url: str,
    tmp_path: Path,
) -> None:
    image = await upload(session, glance, "golden", DATA, tags=["precache"])
    disk = DATA[: 3 << 20] + bytes(5 << 20)
    content = await asyncio.to_thread(qcow2_of, disk, tmp_path)
    shaped = await upload(
        session, glance, "shaped", content, tags=["precache"], disk_format="qcow2"
    )
    await upload(session, glance, "other", b"other")
    async with (
        run_service(
            app.serve,
            Settings,
            app.PACKAGE,
            data_dir=tmp_path / "seed",
            blob_port=servers.free_port(),
            reserve_bytes=0,
            glance_url=glance,
            log_level="WARNING",
        ) as service,
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
    session: aiohttp.ClientSession,
    run_service: RunService,
    tmp_path: Path,
    glance_directory: Path,
) -> None:
    image = await upload(session, glance, "damaged", DATA, tags=["damaged"])
    with (glance_directory / "images" / image["id"]).open("r+b") as file:
        # bit rot in the store, which Glance does not notice
        file.seek(1 << 20)
        file.write(b"rot")
    async with run_service(
        app.serve,
        Settings,
        app.PACKAGE,
        data_dir=tmp_path / "seed",
        blob_port=servers.free_port(),
        reserve_bytes=0,
        glance_url=glance,
        log_level="ERROR",
    ) as service:
        policy = {"name": "damaged", "lister": "glance", "options": {"tags": ["damaged"]}}
        await service.api.post("/v1/policies", policy)

        async def failed() -> Any:
            listed = (await service.api.get("/v1/distributions"))["distributions"]
            return [one for one in listed if one["state"] == "error"]

        (distribution,) = await eventually(failed)
        assert distribution["reason"].startswith("source.hash_mismatch")
        assert list((tmp_path / "seed").iterdir()) == []
