"""Over TLS only peers of the cloud's own authority talk to each other, and pieces are what they were."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from hostler_common import servers, settings, testing
from hostler_precache.swarming import tokens
from hostler_precache.swarming.swarm import News
from hostler_precache.testing import certificate_files, image_of
from hostler_precache.transfer import manifest, pieces, tls
from hostler_precache.transfer.blobs import Blob, BlobServer
from hostler_precache.transfer.connections import Connections
from hostler_precache.transfer.manifest import BlobId
from hostler_precache.transfer.peers import HttpPeerClient, PeerError

BLOB = BlobId("5a0e1d0e-0000-4000-8000-000000000001")
KEY = bytes(range(32))
DISTRIBUTION = "5a0e1d0e-0000-4000-8000-00000000000d"
PIECE = 1 << 20
DATA = image_of(4 * PIECE + 100)


def listed() -> manifest.Manifest:
    hasher = manifest.Hasher(PIECE)
    hasher.update(DATA)
    return hasher.finish()


def token() -> str:
    grant = tokens.Grant(
        blob_id=BLOB, distribution_id=DISTRIBUTION, expires_at=int(time.time()) + 60
    )
    return tokens.mint(grant, KEY)


@asynccontextmanager
async def serving(
    directory: Path, contexts: tls.Tls, *, middlewares: Sequence[Middleware] = ()
) -> AsyncIterator[tuple[str, Blob]]:
    made = listed()
    (directory / "image").write_bytes(DATA)
    fd = os.open(directory / "image", os.O_RDONLY)
    blob = Blob(BLOB, manifest=made, key=KEY, fd=fd, have=made.all_pieces)
    server = BlobServer(slots=4)
    server.serve(blob)
    application = web.Application(middlewares=middlewares)
    server.attach(application)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=1)
    await runner.setup()
    port = servers.free_port()
    await web.TCPSite(runner, "127.0.0.1", port, ssl_context=contexts.server).start()
    try:
        yield f"https://127.0.0.1:{port}", blob
    finally:
        await runner.cleanup()
        os.close(fd)


@asynccontextmanager
async def asking(
    directory: Path, contexts: tls.Tls | None
) -> AsyncIterator[tuple[HttpPeerClient, pieces.PieceStore]]:
    store = pieces.PieceStore.open(directory / "host", BLOB, listed())
    async with Connections(tls=contexts.client if contexts else None) as made:
        yield HttpPeerClient(made, store=store, blob_id=BLOB, token=token, host="h"), store
    store.close()


def contexts(directory: Path, name: str = "peer") -> tls.Tls:
    made = tls.load(*certificate_files(directory, name))
    assert made is not None
    return made


async def test_pieces_and_piece_maps_come_over_tls_as_they_are_and_are_counted(
    tmp_path: Path,
) -> None:
    both = contexts(tmp_path)
    async with serving(tmp_path, both) as (url, blob), asking(tmp_path, both) as (client, store):

        async def get(number: int) -> None:
            store.write(number, await client.fetch(url, number, timeout_seconds=30))

        await asyncio.gather(*(get(number) for number in range(5)))
        assert os.pread(store.fileno(), len(DATA), 0) == DATA
        told: asyncio.Queue[News] = asyncio.Queue()
        following = asyncio.create_task(client.follow(url, told.put_nowait))
        assert (await told.get()).have == blob.manifest.all_pieces
        following.cancel()

        async def counted() -> bool:
            return dict(blob.sent_bytes) == {DISTRIBUTION: len(DATA)}

        await testing.eventually(counted)


async def test_who_goes_away_just_before_a_piece_leaves_is_no_error_here(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    @web.middleware
    async def goes_away(request: web.Request, handler: Handler) -> web.StreamResponse:
        transport = request.transport
        assert transport is not None
        transport.abort()
        await asyncio.sleep(0)  # the socket is gone by now, and aiohttp not told yet
        assert request.transport is transport
        assert transport.get_extra_info("socket") is None
        return await handler(request)

    both = contexts(tmp_path)
    async with (
        serving(tmp_path, both, middlewares=[goes_away]) as (url, blob),
        asking(tmp_path, both) as (client, _),
    ):
        with pytest.raises(PeerError):
            await client.fetch(url, 0, timeout_seconds=5)
        assert blob.sent_bytes == {}
    assert caplog.messages == []


async def test_a_peer_of_another_authority_gets_nothing_and_is_not_believed(
    tmp_path: Path,
) -> None:
    ours, foreign = contexts(tmp_path), contexts(tmp_path, "foreign")
    mixed = tls.Tls(server=ours.server, client=foreign.client)
    async with serving(tmp_path, ours) as (url, blob):
        for client_side in (foreign, mixed, None):
            async with asking(tmp_path, client_side) as (client, _):
                with pytest.raises(PeerError):
                    await client.fetch(url, 0, timeout_seconds=5)
                with pytest.raises(PeerError):
                    await client.follow(url, lambda news: None)
        async with asking(tmp_path, ours) as (client, _):  # who speaks no TLS gets nothing either
            with pytest.raises(PeerError):
                await client.fetch(url.replace("https", "http"), 0, timeout_seconds=5)
        assert blob.sent_bytes == {}


def test_a_certificate_without_its_key_or_authority_is_a_wrong_setting(tmp_path: Path) -> None:
    certificate, key, authority = certificate_files(tmp_path)
    assert tls.load(None, None, None) is None
    some: list[tuple[Path | None, ...]] = [
        (certificate, None, None),
        (certificate, key, None),
        (None, key, authority),
    ]
    for each in some:
        with pytest.raises(settings.SettingsError, match="all three"):
            tls.load(each[0], each[1], each[2])
    for files in ((key, key, authority), (certificate, key, tmp_path / "none")):
        with pytest.raises(settings.SettingsError, match="one of"):
            tls.load(*files)


async def test_seed_and_agents_that_have_certificates_move_an_image_over_tls_alone(
    precache: Any, start_agent: Any, source: Any, request_of: Any, over: Any, image_id: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    certificate, key, authority = certificate_files(tmp_path)
    files = {
        "peer_certificate_file": certificate,
        "peer_key_file": key,
        "peer_ca_file": authority,
    }
    async with precache(**files) as service:
        places = [
            await start_agent(host, service.url, peer_port=servers.free_port(), **files)
            for host in ("host-1", "host-2")
        ]
        hosts = (await service.api.get("/v1/hosts"))["hosts"]
        assert all(one["url"].startswith("https://") for one in hosts)
        body = request_of(image_id, source.add("image", DATA), DATA, hosts=["host-1", "host-2"])
        made = await service.api.post("/v1/distributions", body)
        answer = await over(service.api, made["distribution_id"])
        assert answer["host_states"] == {"cached": 2}
        for place in places:
            assert (place / image_id).read_bytes() == DATA
        desired = await service.api.get("/v1/desired", host="host-1")
        assert desired["images"][0]["seeds"][0].startswith("https://")
