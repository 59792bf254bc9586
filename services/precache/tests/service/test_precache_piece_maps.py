"""Piece maps, from a real sender to real listeners: what is told, what is not, and who is cut off."""

import asyncio
import itertools
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from hostler_common import testing
from hostler_precache.swarming import tokens
from hostler_precache.swarming.swarm import News
from hostler_precache.testing import image_of
from hostler_precache.transfer import connections, manifest, piece_maps, pieces
from hostler_precache.transfer.blobs import Blob, BlobServer
from hostler_precache.transfer.connections import Connections, _Listener
from hostler_precache.transfer.manifest import BlobId
from hostler_precache.transfer.peers import HttpPeerClient, PeerError

BLOB = BlobId("5a0e1d0e-0000-4000-8000-000000000001")
KEY = bytes(range(32))
DISTRIBUTION = "5a0e1d0e-0000-4000-8000-00000000000d"
COUNT = 3000
DATA = image_of(1000)


def token() -> str:
    grant = tokens.Grant(
        blob_id=BLOB, distribution_id=DISTRIBUTION, expires_at=int(time.time()) + 60
    )
    return tokens.mint(grant, KEY)


def listed() -> manifest.Manifest:
    """So many pieces that news of all of them fill several lines; no bytes of them are asked for."""
    return manifest.build(
        size_bytes=COUNT * manifest.MIN_PIECE_BYTES,
        piece_bytes=manifest.MIN_PIECE_BYTES,
        digests=bytes(range(32)) * COUNT,
    )


class Sender:
    """A server of one blob, whose pieces the test adds."""

    def __init__(self, url: str, server: BlobServer, blob: Blob) -> None:
        self.url = url
        self.server = server
        self.blob = blob
        self.watchers: list[str] = []


@pytest_asyncio.fixture
async def sender(tmp_path: Path) -> AsyncIterator[Sender]:
    path = tmp_path / "blob"
    path.write_bytes(DATA)
    fd = os.open(path, os.O_RDONLY)
    watchers: list[str] = []
    server = BlobServer(slots=2, on_watcher=watchers.append)
    blob = Blob(BLOB, manifest=listed(), key=KEY, fd=fd)
    server.serve(blob)
    application = web.Application()
    server.attach(application)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=5)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made = Sender(f"http://127.0.0.1:{runner.addresses[0][1]}", server, blob)
    made.watchers = watchers
    yield made
    await runner.cleanup()
    os.close(fd)


@asynccontextmanager
async def listening(
    url: str, directory: Path, *, host: str = "host-1"
) -> AsyncIterator[tuple[asyncio.Queue[News], "asyncio.Task[None]"]]:
    """What a host hears, and the task that listens."""
    store = pieces.PieceStore.open(directory / host, BLOB, listed(), allocate=False)
    told: asyncio.Queue[News] = asyncio.Queue()
    async with Connections() as made:
        client = HttpPeerClient(made, store=store, blob_id=BLOB, token=token, host=host)
        task = asyncio.create_task(client.follow(url, told.put_nowait))
        try:
            yield told, task
        finally:
            task.cancel()
            await asyncio.wait([task])
    store.close()


async def test_what_comes_together_is_told_together_in_lines_that_are_not_long(
    sender: Sender, tmp_path: Path
) -> None:
    sender.blob.add(0)
    async with listening(sender.url, tmp_path) as (told, _):
        assert await told.get() == News(have=1)
        everything = (1 << COUNT) - 1
        for piece in range(1, COUNT):
            sender.blob.add(piece)
        heard = 1
        for _ in range(3):
            news = await told.get()
            assert 0 < news.have.bit_count() <= piece_maps.LINE_PIECES
            heard |= news.have
        assert heard == everything
    assert sender.watchers == ["host-1"]


async def test_nobody_is_told_of_a_piece_that_it_is_known_to_have(
    sender: Sender, tmp_path: Path
) -> None:
    has = {"host-1": 0b0110}
    sender.blob.known = lambda host: has.get(host, 0)
    async with (
        listening(sender.url, tmp_path) as (told, _),
        listening(sender.url, tmp_path, host="host-2") as (other, _),
    ):
        assert await told.get() == await other.get() == News(have=0)
        for piece in range(4):
            sender.blob.add(piece)
        sender.blob.claim(7)
        assert await told.get() == News(have=0b1001)
        assert await other.get() == News(have=0b1111)
        assert await told.get() == await other.get() == News(coming=1 << 7)
        has["host-1"] |= 1 << 8
        sender.blob.add(8)
        assert await other.get() == News(have=1 << 8)
        sender.blob.add(9)
        assert await other.get() == News(have=1 << 9)
        assert await told.get() == News(have=1 << 9)  # and nothing of 8 before it


async def test_a_blob_that_is_withdrawn_ends_its_piece_maps_so_that_they_are_asked_for_anew(
    sender: Sender, tmp_path: Path
) -> None:
    async with listening(sender.url, tmp_path) as (told, task):
        await told.get()
        sender.server.withdraw(BLOB)
        await task
    async with listening(sender.url, tmp_path) as (_, task):
        with pytest.raises(PeerError, match="404"):
            await task
    sender.server.serve(sender.blob)
    async with listening(sender.url, tmp_path) as (told, _):
        await told.get()
        sender.blob.add(1)
        assert await told.get() == News(have=0b10)


async def test_by_http_1_1_the_same_lines_come_in_chunks(sender: Sender) -> None:
    headers = {"Authorization": f"Bearer {token()}"}
    url = f"{sender.url}/v1/blobs/{BLOB}/pieces"
    async with (
        aiohttp.ClientSession() as session,
        session.get(url, headers=headers) as response,
    ):
        assert response.headers["Transfer-Encoding"] == "chunked"
        assert (await response.content.readline()).startswith(b'{"have":"000')
        sender.blob.add(3)
        assert await response.content.readline() == b'{"add":[3]}\n'
        sender.server.withdraw(BLOB)
        assert await response.content.read() == b""


async def test_a_peer_that_has_nothing_to_tell_shows_that_it_lives(
    sender: Sender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(piece_maps, "HEARTBEAT_SECONDS", 0.05)
    async with listening(sender.url, tmp_path) as (told, task):
        await told.get()
        await asyncio.wait([task], timeout=0.6)  # three times what a silent one is given
        assert not task.done()


async def test_who_does_not_read_its_piece_map_is_cut_off(
    sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(piece_maps, "LONGEST_UNREAD_BYTES", 1000)
    reader, writer = await asyncio.open_connection(*sender.url.removeprefix("http://").split(":"))
    writer.write(
        f"GET /v1/blobs/{BLOB}/pieces HTTP/1.0\r\nAuthorization: Bearer {token()}\r\n\r\n".encode()
    )
    await reader.readuntil(b"\n\r\n")
    reader._transport.pause_reading()  # type: ignore[attr-defined]
    watchers = sender.blob._watchers

    async def is_cut_off() -> bool:
        for piece in range(COUNT):
            sender.blob.lose(1 << piece)
            sender.blob.add(piece)
        return not watchers

    await testing.eventually(is_cut_off)
    writer.close()


async def test_a_piece_map_is_told_no_longer_than_the_token_lasts(
    sender: Sender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(piece_maps, "HEARTBEAT_SECONDS", 0.5)
    later = time.time() + 61
    async with listening(sender.url, tmp_path) as (told, task):
        await told.get()
        monkeypatch.setattr(time, "time", lambda: later)
        await asyncio.wait([task], timeout=20)
        assert task.done()
    assert not sender.blob._watchers


async def test_who_does_not_read_the_end_of_its_piece_map_is_not_waited_for(
    sender: Sender,
) -> None:
    with socket.socket() as asker:
        asker.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        asker.setblocking(False)
        address, port = sender.url.removeprefix("http://").split(":")
        loop = asyncio.get_running_loop()
        await loop.sock_connect(asker, (address, int(port)))
        head = (
            f"GET /v1/blobs/{BLOB}/pieces HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token()}"
        )
        await loop.sock_sendall(asker, f"{head}\r\n\r\n".encode())

        async def has_much_to_read() -> bool:
            for watcher in sender.blob._watchers:
                while watcher._transport.get_write_buffer_size() < 200_000:
                    watcher._write(b"x" * 10_000)
                return True
            return False

        await testing.eventually(has_much_to_read)
        (transport,) = (one._transport for one in sender.blob._watchers)
        sender.server.withdraw(BLOB)

        async def is_closed() -> bool:
            return bool(transport.get_extra_info("socket").fileno() < 0)

        await testing.eventually(is_closed)


# --- listening to strangers


Answer = Callable[[asyncio.StreamWriter], None]


@asynccontextmanager
async def stranger(answer: bytes, *, ends: bool = True) -> AsyncIterator[str]:
    """Whoever connects is told these bytes."""
    closing = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        if not ends:
            await closing.wait()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    closing.set()
    server.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.0 200 OK\r\n",
        b"HTTP/1.0 404 Not Found\r\n\r\n",
        b"HTTP/1.1 301 Moved\r\nLocation: http://elsewhere\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nContent-Encoding: gzip\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n" + b"x" * 100_000,
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\n{}\n",
        b"HTTP/1.0 200 OK\r\n\r\n\xff\n",
        b'HTTP/1.0 200 OK\r\n\r\n{"have":' + b'"' + b"0" * 100_000,
    ],
)
async def test_who_answers_with_anything_else_is_not_listened_to(
    answer: bytes, tmp_path: Path
) -> None:
    async with stranger(answer) as url, listening(url, tmp_path) as (told, task):
        with pytest.raises(PeerError):
            await task
        assert told.empty()


async def test_who_says_nothing_any_more_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(piece_maps, "HEARTBEAT_SECONDS", 0.05)
    said = b'HTTP/1.0 200 OK\r\n\r\n{"add":[1]}\n'
    async with stranger(said, ends=False) as url, listening(url, tmp_path) as (told, task):
        with pytest.raises(PeerError, match="nothing came"):
            await task
        assert await told.get() == News(have=0b10)


async def test_a_failure_of_who_hears_is_not_the_peers(tmp_path: Path) -> None:
    def hear(_: bytes) -> None:
        raise ZeroDivisionError

    async with stranger(b"HTTP/1.0 200 OK\r\n\r\nx\n", ends=False) as url, Connections() as made:
        with pytest.raises(ZeroDivisionError):
            await made.listen(
                url, "/", {}, hear, longest_line_bytes=10, quiet_seconds=connections.STALL_SECONDS
            )


@given(
    lines=st.lists(st.binary(max_size=20).map(lambda text: text.replace(b"\n", b""))),
    cuts=st.lists(st.integers(min_value=0, max_value=300)),
)
@settings(deadline=None)
def test_however_the_bytes_are_divided_the_lines_are_the_same(
    lines: list[bytes], cuts: list[int]
) -> None:
    heard: list[bytes] = []
    listener = _Listener(b"", heard.append, 20)
    answer = b"HTTP/1.0 200 OK\r\n\r\n" + b"".join(line + b"\n" for line in lines)
    places = sorted({0, len(answer), *(min(cut, len(answer)) for cut in cuts)})
    for start, stop in itertools.pairwise(places):
        listener.data_received(answer[start:stop])
    assert heard == lines
    assert listener.failure is None
