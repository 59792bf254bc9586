"""A peer may answer anything: whatever it is, it is that peer's failure and no other error."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import test_utils, web

from hostler_precache import manifest
from hostler_precache.manifest import BlobId
from hostler_precache.peers import HttpPeerClient, PeerError

BLOB = BlobId("5a0e1d0e-0000-4000-8000-000000000001")
PIECE = manifest.MIN_PIECE_BYTES
LISTED = manifest.build(size_bytes=PIECE, piece_bytes=PIECE, digests=bytes(32))

Answer = Callable[[], web.Response]


@asynccontextmanager
async def answering(answer: Answer) -> AsyncIterator[tuple[HttpPeerClient, str]]:
    async def handle(_: web.Request) -> web.Response:
        return answer()

    app = web.Application()
    app.router.add_get("/{path:.*}", handle)
    async with test_utils.TestServer(app) as server, aiohttp.ClientSession() as session:
        asking = HttpPeerClient(
            session, blob_id=BLOB, manifest=LISTED, token=lambda: "t", host="h"
        )
        yield asking, str(server.make_url("/"))


@pytest.mark.parametrize(
    "answer",
    [
        lambda: web.Response(status=429, headers={"Retry-After": "\u00b2"}),
        lambda: web.Response(status=206, headers={"Content-Range": "bytes \u00b2-3/9"}),
        lambda: web.Response(status=206, headers={"Content-Range": f"bytes {'9' * 5000}-3/9"}),
        lambda: web.Response(status=302, headers={"Location": f"http://{'a' * 70}/"}),
    ],
)
async def test_an_answer_that_cannot_be_read_is_the_peers_failure(answer: Answer) -> None:
    async with answering(answer) as (client, url):
        with pytest.raises(PeerError):
            await client.fetch(url, 0, timeout_seconds=5)
        with pytest.raises(PeerError):
            await client.fetch_next(url, timeout_seconds=5)


@pytest.mark.parametrize("line", ["[" * 60_000, "9" * 5000, '{"have":"\u00b2"}', '{"add":[1]}'])
async def test_a_piece_map_that_cannot_be_read_is_the_peers_failure(line: str) -> None:
    async with answering(lambda: web.Response(text=line + "\n")) as (client, url):
        with pytest.raises(PeerError):
            async for _ in client.follow(url):
                pass


async def test_each_request_shows_the_token_as_it_stands() -> None:
    shown: list[str] = []
    tokens = iter(["old", "new"])

    async def handle(request: web.Request) -> web.Response:
        shown.append(request.headers["Authorization"])
        return web.Response(status=404)

    app = web.Application()
    app.router.add_get("/{path:.*}", handle)
    async with test_utils.TestServer(app) as server, aiohttp.ClientSession() as session:
        client = HttpPeerClient(
            session, blob_id=BLOB, manifest=LISTED, token=lambda: next(tokens), host="h"
        )
        for _ in range(2):
            with pytest.raises(PeerError):
                await client.fetch(str(server.make_url("/")), 0, timeout_seconds=5)
    assert shown == ["Bearer old", "Bearer new"]
