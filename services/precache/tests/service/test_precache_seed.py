"""A seed serves again what is still the image, and others meanwhile."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from hostler_common import servers
from hostler_precache.distribution.distributions import BlobRecord, BlobState
from hostler_precache.swarming import tokens
from hostler_precache.testing import image_of
from hostler_precache.transfer import manifest, pieces
from hostler_precache.transfer.blobs import BlobServer
from hostler_precache.transfer.manifest import BlobId
from hostler_precache.transfer.seed import Seed

PIECE = manifest.MIN_PIECE_BYTES
KEY = bytes(range(32))
DISTRIBUTION = "5a0e1d0e-0000-4000-8000-00000000000d"
OLD = BlobId("5a0e1d0e-0000-4000-8000-000000000001")
NEW = BlobId("5a0e1d0e-0000-4000-8000-000000000002")


def described(data: bytes) -> manifest.Manifest:
    hasher = manifest.Hasher(PIECE)
    hasher.update(data)
    return hasher.finish()


def record(blob_id: BlobId, listed: manifest.Manifest) -> BlobRecord:
    return BlobRecord(
        blob_id=blob_id,
        image_id="image",
        state=BlobState.READY,
        reason=None,
        seed="seed-1",
        seed_url="http://seed-1",
        size_bytes=listed.size_bytes,
        root=listed.root,
        swarm_key=KEY,
        verification=None,
        fetched_bytes=listed.size_bytes,
    )


def token(blob_id: BlobId) -> str:
    grant = tokens.Grant(
        blob_id=blob_id, distribution_id=DISTRIBUTION, expires_at=int(time.time()) + 60
    )
    return tokens.mint(grant, KEY)


@asynccontextmanager
async def seeding(directory: Path) -> AsyncIterator[tuple[Seed, str]]:
    server = BlobServer(slots=4)
    application = web.Application()
    server.attach(application)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=1)
    await runner.setup()
    port = servers.free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    url = f"http://127.0.0.1:{port}"
    seed = Seed(name="seed-1", url=url, directory=directory, server=server)
    try:
        yield seed, url
    finally:
        seed.close()
        await runner.cleanup()


async def chosen(url: str, blob_id: BlobId) -> list[str]:
    """The ranges that the seed chooses, until it has no more."""
    got: list[str] = []
    async with aiohttp.ClientSession() as session:
        while True:
            async with session.get(
                f"{url}/v1/blobs/{blob_id}/next",
                headers={"Authorization": f"Bearer {token(blob_id)}", "Hostler-Host": "h"},
            ) as response:
                if response.status == 204:
                    return got
                assert response.status == 206
                await response.read()
                got.append(response.headers["Content-Range"])


async def test_pieces_of_zeros_are_never_sent(tmp_path: Path) -> None:
    data = bytes(PIECE) + image_of(PIECE) + bytes(3 * PIECE) + image_of(PIECE)
    listed = described(data)
    async with seeding(tmp_path) as (seed, url):
        seed.path(NEW).write_bytes(data)
        await seed.serve(NEW, KEY, listed)
        assert await chosen(url, NEW) == [
            f"bytes {start}-{start + PIECE - 1}/{len(data)}" for start in (PIECE, 5 * PIECE)
        ]
        assert seed.sent_bytes() == {DISTRIBUTION: 2 * PIECE}


async def test_a_seed_that_starts_again_serves_the_others_while_it_reads_an_image_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = image_of(2 * PIECE)
    listed = described(data)
    reading, finish = threading.Event(), threading.Event()
    real = pieces.is_exactly

    def slow(fd: int, expected: manifest.Manifest) -> bool:
        reading.set()
        assert finish.wait(30)
        return real(fd, expected)

    monkeypatch.setattr(pieces, "is_exactly", slow)
    async with seeding(tmp_path) as (seed, url):
        for blob_id in (OLD, NEW):
            seed.path(blob_id).write_bytes(data)
        resuming = asyncio.create_task(seed.resume(record(OLD, listed), listed.to_json()))
        assert await asyncio.to_thread(reading.wait, 30)
        await seed.serve(NEW, KEY, listed)
        assert len(await chosen(url, NEW)) == 2
        assert not resuming.done()
        finish.set()
        assert await resuming
        assert await chosen(url, OLD) == []  # they were probably sent before


@pytest.mark.parametrize("damage", ["flipped", "cut", "longer", "gone", "another root"])
async def test_what_is_not_the_image_any_more_is_not_served_again(
    tmp_path: Path, damage: str
) -> None:
    data = image_of(2 * PIECE)
    listed = described(data)
    content = {
        "flipped": data[:-1] + bytes([data[-1] ^ 1]),
        "cut": data[:-1],
        "longer": data + b"x",
    }
    async with seeding(tmp_path) as (seed, url):
        if damage != "gone":
            seed.path(OLD).write_bytes(content.get(damage, data))
        body = described(b"other").to_json() if damage == "another root" else listed.to_json()
        assert not await seed.resume(record(OLD, listed), body)
        async with (
            aiohttp.ClientSession() as session,
            session.get(
                f"{url}/v1/blobs/{OLD}", headers={"Authorization": f"Bearer {token(OLD)}"}
            ) as response,
        ):
            assert response.status == 404
