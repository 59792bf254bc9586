"""A peer may answer anything: whatever it is, it is that peer's failure and no other error."""

import asyncio
import contextlib
import dataclasses
import hashlib
import os
import random
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import test_utils, web
from hypothesis import given, settings
from hypothesis import strategies as st

from hostler_common import testing
from hostler_precache.swarming.swarm import News
from hostler_precache.transfer import connections, manifest, pieces
from hostler_precache.transfer.connections import STALL_SECONDS, Connections
from hostler_precache.transfer.manifest import BlobId
from hostler_precache.transfer.peers import (
    HttpPeerClient,
    PeerBusyError,
    PeerError,
    PieceMissingError,
)

BLOB = BlobId("5a0e1d0e-0000-4000-8000-000000000001")
PIECE = 1 << 20
DATA = random.Random(5).randbytes(4 * PIECE + 77)


def _listed() -> manifest.Manifest:
    hasher = manifest.Hasher(PIECE)
    hasher.update(DATA)
    return hasher.finish()


LISTED = _listed()
SIZE = len(DATA)


def piece_of(number: int) -> bytes:
    span = LISTED.span(number)
    return DATA[span.start : span.stop]


def good(number: int = 0, *fields: str, status: str = "206 Partial Content") -> bytes:
    span = LISTED.span(number)
    return head(
        f"HTTP/1.1 {status}",
        f"Content-Range: bytes {span.start}-{span.stop - 1}/{SIZE}",
        f"Content-Length: {span.length}",
        *fields,
    ) + piece_of(number)


def head(*lines: str) -> bytes:
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


class Peer:
    """A TCP server that says to each request what the test wants, and keeps what it was asked."""

    def __init__(self) -> None:
        self.url = ""
        self.asked: list[bytes] = []
        self.connections = 0
        self.closed = 0
        self.answers: list[bytes] = []
        self.act: Callable[[asyncio.StreamWriter], Awaitable[None]] | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                self.asked.append(await reader.readuntil(b"\r\n\r\n"))
                if self.act is not None:
                    await self.act(writer)
                writer.write(self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.closed += 1
            writer.close()


@pytest_asyncio.fixture
async def peer() -> AsyncIterator[Peer]:
    made = Peer()
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    yield made
    server.close()


@asynccontextmanager
async def asking(
    directory: Path, token: Callable[[], str] = lambda: "t"
) -> AsyncIterator[tuple[HttpPeerClient, pieces.PieceStore]]:
    store = pieces.PieceStore.open(directory, BLOB, LISTED)
    async with Connections() as made:
        yield (
            HttpPeerClient(made, store=store, blob_id=BLOB, token=token, host="h"),
            store,
        )
    store.close()


async def test_a_piece_lands_in_the_file_and_the_next_one_takes_the_same_connection(
    peer: Peer, tmp_path: Path
) -> None:
    async with asking(tmp_path) as (client, store):
        for number in (0, 4, 2):
            peer.answers = [good(number)]
            landing = await client.fetch(f"{peer.url}/", number, timeout_seconds=5)
            store.write(number, landing)
            span = LISTED.span(number)
            assert os.pread(store.fileno(), span.length, span.start) == piece_of(number)
        peer.answers = [good(1)]
        chosen = await client.fetch_next(peer.url, timeout_seconds=5)
        assert chosen is not None
        assert (chosen[0], len(chosen[1])) == (1, PIECE)
        peer.answers = [head("HTTP/1.1 204 No Content")]
        assert await client.fetch_next(peer.url, timeout_seconds=5) is None
    assert peer.connections == 1
    assert peer.asked[0].split(b"\r\n") == [
        f"GET /v1/blobs/{BLOB} HTTP/1.1".encode(),
        f"Host: {peer.url.removeprefix('http://')}".encode(),
        b"Authorization: Bearer t",
        b"Hostler-Host: h",
        f"Range: bytes=0-{PIECE - 1}".encode(),
        b"",
        b"",
    ]


async def test_many_pieces_at_once_and_in_small_chunks_are_what_they_were(
    peer: Peer, tmp_path: Path
) -> None:
    async def dribble(writer: asyncio.StreamWriter) -> None:
        asked = peer.asked[-1].decode()
        number = int(asked.partition("bytes=")[2].partition("-")[0]) // PIECE
        data, at = good(number), 0
        while at < len(data):
            step = random.Random(at).choice([1, 7, 1000, 70_000, 300_000])
            writer.write(data[at : at + step])
            await writer.drain()
            await asyncio.sleep(0)
            at += step

    peer.act, peer.answers = dribble, [b""]
    async with asking(tmp_path) as (client, store):

        async def get(number: int) -> None:
            store.write(number, await client.fetch(peer.url, number, timeout_seconds=60))

        await asyncio.gather(*(get(number) for number in range(5)))
        store.flush()
        assert store.journaled == LISTED.all_pieces
        assert os.pread(store.fileno(), SIZE, 0) == DATA


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (good(1), "another range"),
        (good(0, status="200 OK"), "status 200"),
        (head("HTTP/1.1 206 x", "Content-Length: 0"), "no Content-Range"),
        (
            head(
                "HTTP/1.1 206 x", f"Content-Range: bytes 0-{PIECE - 1}/{SIZE}", "Content-Length: 9"
            ),
            "another number of bytes",
        ),
        (
            head("HTTP/1.1 206 x", "Content-Range: bytes 0-8/*", "Content-Length: 9")
            + b"123456789",
            "not a piece",
        ),
        (
            head(
                "HTTP/1.1 206 x",
                f"Content-Range: bytes 0-{PIECE - 1}/{SIZE + 1}",
                f"Content-Length: {PIECE}",
            ),
            "of another blob",
        ),
        (
            head(
                "HTTP/1.1 206 x",
                f"Content-Range: bytes {10**14}-{10**14 + 8}/*",
                "Content-Length: 9",
            ),
            "not a piece",
        ),
        (head("HTTP/1.1 206 x", "Content-Range: bytes 5-2/*", "Content-Length: 9"), "not a piece"),
        (head("HTTP/1.1 429 x", "Content-Length: 99999999"), "busy"),
        (head("HTTP/1.1 302 Found", "Location: http://x/", "Content-Length: 0"), "status 302"),
        (head("HTTP/1.1 500 x", "Content-Length: 3") + b"abc", "status 500"),
        (good(0, "Content-Encoding: gzip"), "Content-Encoding"),
        (good(0, "Transfer-Encoding: chunked"), "Transfer-Encoding"),
        (good(0, "Content-Length: 5"), "content-length twice"),
        (head("HTTP/1.1 100 Continue") * 1000, "final answer"),
        (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 100_000, "head without end"),
        (b"x" * 1_000_000, "head without end"),
        (head("HTTP/1.1 204 x") + b"extra", "more bytes"),
        (head("HTTP/1.1 404 x", "Content-Length: 3") + b"abcdef", "more bytes"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "final answer"),
        (b"\x16\x03\x01\x02\x00" * 10 + b"\r\n\r\n", "final answer"),
    ],
)
async def test_an_answer_that_is_not_the_piece_is_the_peers_failure(
    peer: Peer, tmp_path: Path, answer: bytes, reason: str
) -> None:
    peer.answers = [answer]
    async with asking(tmp_path) as (client, store):
        with pytest.raises(PeerError, match=reason):
            await client.fetch(peer.url, 0, timeout_seconds=5)
        assert os.pread(store.fileno(), SIZE, 0) == bytes(SIZE)
        peer.answers = [good(0)]
        store.write(0, await client.fetch(peer.url, 0, timeout_seconds=5))


@pytest.mark.parametrize("answer", [good(1)[:-5], good(1)[:200], b"HTTP/1.1 206 P", b""])
async def test_an_answer_that_ends_early_is_the_peers_failure(
    peer: Peer, tmp_path: Path, answer: bytes
) -> None:
    async def stop(writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        writer.close()

    peer.act, peer.answers = stop, [b""]
    async with asking(tmp_path) as (client, store):
        with pytest.raises(PeerError, match="closed"):
            await client.fetch(peer.url, 1, timeout_seconds=5)
        peer.act, peer.answers = None, [good(1)]
        store.write(1, await client.fetch(peer.url, 1, timeout_seconds=5))


async def test_bytes_after_an_answer_end_the_connection_and_are_part_of_no_other_answer(
    peer: Peer, tmp_path: Path
) -> None:
    peer.answers = [good(0) + good(1)]
    async with asking(tmp_path) as (client, store):
        # the piece is good, and may be taken, if the rest is not seen before it is on disk
        with contextlib.suppress(PeerError):
            store.write(0, await client.fetch(peer.url, 0, timeout_seconds=5))

        async def is_closed() -> bool:
            return peer.closed == 1

        await testing.eventually(is_closed, seconds=5)
        peer.answers = [good(2)]
        store.write(2, await client.fetch(peer.url, 2, timeout_seconds=5))
    assert peer.connections == 2


async def test_a_refusal_keeps_the_connection(peer: Peer, tmp_path: Path) -> None:
    peer.answers = [
        head("HTTP/1.1 429 Too Many Requests", "Retry-After: 0", "Content-Length: 4") + b"busy",
        head("HTTP/1.1 503 x", "Retry-After: 999999", "Content-Length: 4") + b"busy",
        head("HTTP/1.1 429 x", "Retry-After: \u00b2", "Content-Length: 0"),
        head("HTTP/1.1 404 Not Found", "Content-Length: 6") + b"absent",
        good(3),
    ]
    async with asking(tmp_path) as (client, store):
        for seconds in (0.0, 30.0, 1.0):
            with pytest.raises(PeerBusyError) as busy:
                await client.fetch(peer.url, 3, timeout_seconds=5)
            assert busy.value.retry_after_seconds == seconds
        with pytest.raises(PieceMissingError):
            await client.fetch(peer.url, 3, timeout_seconds=5)
        store.write(3, await client.fetch(peer.url, 3, timeout_seconds=5))
    assert peer.connections == 1


async def test_a_connection_that_the_peer_closed_meanwhile_is_made_anew(
    peer: Peer, tmp_path: Path
) -> None:
    peer.answers = [good(0)]
    async with asking(tmp_path) as (client, store):
        store.write(0, await client.fetch(peer.url, 0, timeout_seconds=5))

        async def hang_up(writer: asyncio.StreamWriter) -> None:
            peer.act = None
            writer.close()

        peer.act, peer.answers = hang_up, [good(1)]
        store.write(1, await client.fetch(peer.url, 1, timeout_seconds=5))
    assert (peer.connections, len(peer.asked)) == (2, 3)


async def test_connection_close_is_obeyed(peer: Peer, tmp_path: Path) -> None:
    peer.answers = [good(0, "Connection: close"), good(1)]
    async with asking(tmp_path) as (client, store):
        for number in range(2):
            store.write(number, await client.fetch(peer.url, number, timeout_seconds=5))
    assert peer.connections == 2


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 206", good(0)[:300_000]])
async def test_a_peer_that_says_nothing_more_is_given_up(
    peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(connections, "STALL_SECONDS", 0.2)
    forever = asyncio.Event()

    async def stall(writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        await forever.wait()

    peer.act, peer.answers = stall, [b""]
    async with asking(tmp_path) as (client, _):
        with pytest.raises(PeerError, match="nothing came"):
            await client.fetch(peer.url, 0, timeout_seconds=30)
    forever.set()


async def test_a_peer_that_sends_a_head_byte_by_byte_is_given_up_in_time(
    peer: Peer, tmp_path: Path
) -> None:
    async def drip(writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while not writer.is_closing():
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.01)

    peer.act, peer.answers = drip, [b""]
    async with asking(tmp_path) as (client, _):
        with pytest.raises(PeerError, match="not done within"):
            await client.fetch(peer.url, 0, timeout_seconds=0.3)


# --- the mark below which bytes wait in the kernel


@contextlib.contextmanager
def marks_set() -> Iterator[list[tuple[int, int]]]:
    """Each mark as it is set, with the bytes that were still to come then."""
    seen: list[tuple[int, int]] = []
    real = connections._Connection._set_mark

    def remembered(connection: Any, count: int) -> None:
        real(connection, count)
        if connection._socket is not None:
            mark = connection._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT)
            seen.append((mark, connection._left))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connections._Connection, "_set_mark", remembered)
        yield seen


@pytest.mark.parametrize(
    "last", [0, 1, 2, 1447, 65_535, 65_536, 65_537, 131_073, PIECE - 1, PIECE, PIECE + 50]
)
async def test_however_the_bytes_are_divided_the_last_ones_are_read_at_once(
    peer: Peer, tmp_path: Path, last: int
) -> None:
    """The peer holds back the last bytes until what it sent before was surely taken."""
    whole = good(0)
    split = len(whole) - last

    async def act(writer: asyncio.StreamWriter) -> None:
        writer.write(whole[:split])
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.write(whole[split:])

    peer.act, peer.answers = act, [b""]
    with marks_set() as seen:
        async with asking(tmp_path) as (client, store):
            for _ in range(2):  # again, over the same connection
                # far below the time after which a silent peer is looked at again
                data = await client.fetch(peer.url, 0, timeout_seconds=STALL_SECONDS / 4)
                store.write(0, data)
    assert peer.connections == 1
    # what is waited for is still to come; before the next head it is any byte
    assert all(mark <= max(1, left) for mark, left in seen)
    assert seen[-1] == (1, 0)
    assert max(mark for mark, _ in seen) > 1 or last == PIECE + 50


@given(cuts=st.lists(st.integers(0, PIECE + 200), max_size=6), refusal=st.integers(0, 70_000))
@settings(max_examples=25, deadline=None)
async def test_no_division_of_answers_into_packets_lets_a_transfer_hang(
    cuts: list[int], refusal: int
) -> None:
    body = head("HTTP/1.1 429 x", f"Content-Length: {refusal}") + bytes(refusal)
    made = Peer()
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    answers: list[bytes] = []

    async def act(writer: asyncio.StreamWriter) -> None:
        whole = answers.pop(0)
        at = 0
        for stop in [*sorted(cut for cut in cuts if cut < len(whole)), len(whole)]:
            writer.write(whole[at:stop])
            await writer.drain()
            await asyncio.sleep(0.002)
            at = stop

    made.act, made.answers = act, [b""]
    with tempfile.TemporaryDirectory() as directory:
        async with asking(Path(directory)) as (client, store):
            answers[:] = [good(3), body, good(4), body, good(1)]
            for number in (3, None, 4, None, 1):
                if number is None:
                    with pytest.raises(PeerBusyError):
                        await client.fetch(made.url, 3, timeout_seconds=STALL_SECONDS / 4)
                    continue
                data = await client.fetch(made.url, number, timeout_seconds=STALL_SECONDS / 4)
                store.write(number, data)
    server.close()


async def test_pieces_of_one_byte_come_over_one_connection(tmp_path: Path, peer: Peer) -> None:
    data = b"hostler"
    digests = b"".join(hashlib.sha256(data[at : at + 1]).digest() for at in range(len(data)))
    listed = dataclasses.replace(
        LISTED, size_bytes=len(data), piece_bytes=1, digests=digests, zero_pieces=0
    )
    store = pieces.PieceStore.open(tmp_path, BLOB, listed)
    async with Connections() as made:
        client = HttpPeerClient(made, store=store, blob_id=BLOB, token=lambda: "t", host="h")
        for at in range(len(data)):
            said = head(
                "HTTP/1.1 206 x",
                f"Content-Range: bytes {at}-{at}/{len(data)}",
                "Content-Length: 1",
            )

            async def act(writer: asyncio.StreamWriter, said: bytes = said) -> None:
                writer.write(said)
                await writer.drain()
                await asyncio.sleep(0.01)

            peer.act, peer.answers = act, [data[at : at + 1]]
            fetched = await client.fetch(peer.url, at, timeout_seconds=STALL_SECONDS / 4)
            store.write(at, fetched)
    assert os.pread(store.fileno(), 99, 0) == data
    assert peer.connections == 1
    store.close()


async def test_a_peer_so_slow_that_the_mark_is_never_reached_is_not_a_silent_one(
    peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "STALL_SECONDS", 0.4)

    async def act(writer: asyncio.StreamWriter) -> None:
        whole = good(0)
        at = len(whole) - 60_000
        writer.write(whole[:at])
        for start in range(at, len(whole), 2000):  # for longer than the peer may be silent
            await writer.drain()
            await asyncio.sleep(0.05)
            writer.write(whole[start : start + 2000])

    peer.act, peer.answers = act, [b""]
    async with asking(tmp_path) as (client, store):
        store.write(0, await client.fetch(peer.url, 0, timeout_seconds=30))


async def test_bytes_that_trickle_in_wake_the_receiver_seldom(
    peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    woken: list[int] = []
    real = connections._Connection.buffer_updated

    def counted(connection: Any, nbytes: int) -> None:
        woken.append(nbytes)
        real(connection, nbytes)

    monkeypatch.setattr(connections._Connection, "buffer_updated", counted)

    async def trickle(writer: asyncio.StreamWriter) -> None:
        whole = good(0)
        for at in range(0, len(whole), 8192):
            writer.write(whole[at : at + 8192])
            await writer.drain()
            await asyncio.sleep(0)

    peer.act, peer.answers = trickle, [b""]
    async with asking(tmp_path) as (client, store):
        store.write(0, await client.fetch(peer.url, 0, timeout_seconds=30))
    # the head, each mark, and the rest; without the mark it is each of the 128 writes
    assert len(woken) <= 2 + PIECE // connections.AWAKE_BYTES


async def test_a_request_given_up_closes_its_connection_at_once(
    peer: Peer, tmp_path: Path
) -> None:
    begun, forever = asyncio.Event(), asyncio.Event()

    async def stall(writer: asyncio.StreamWriter) -> None:
        writer.write(good(0)[:600_000])
        begun.set()
        peer.act = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await forever.wait()

    peer.act, peer.answers = stall, [b"x" * 5_000_000]
    async with asking(tmp_path) as (client, store):
        asked = asyncio.create_task(client.fetch(peer.url, 0, timeout_seconds=30))
        await begun.wait()
        await asyncio.sleep(0.05)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked

        async def is_closed() -> bool:
            return peer.closed == 1

        await testing.eventually(is_closed)
        peer.answers = [good(0)]
        del asked
        store.write(0, await client.fetch(peer.url, 0, timeout_seconds=5))


async def test_a_slow_disk_stops_the_reading_and_not_the_transfer(
    peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "BLOCK_BYTES", 64 * 1024)
    monkeypatch.setattr(connections, "STALL_SECONDS", 0.1)
    real = pieces.Landing.write

    def slow(landing: pieces.Landing, block: Any) -> None:
        time.sleep(0.03)
        real(landing, block)

    monkeypatch.setattr(pieces.Landing, "write", slow)
    peer.answers = [good(2)]
    async with asking(tmp_path) as (client, store):
        store.write(2, await client.fetch(peer.url, 2, timeout_seconds=60))


async def test_what_was_received_whole_counts_although_the_peer_left_before_it_was_on_disk(
    peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "STALL_SECONDS", 0.1)
    real = pieces.Landing.write

    def slow(landing: pieces.Landing, block: Any) -> None:
        time.sleep(0.5)
        real(landing, block)

    async def leave(writer: asyncio.StreamWriter) -> None:
        writer.write(good(4))
        await writer.drain()
        writer.close()

    monkeypatch.setattr(pieces.Landing, "write", slow)
    peer.act, peer.answers = leave, [b""]
    async with asking(tmp_path) as (client, store):
        store.write(4, await client.fetch(peer.url, 4, timeout_seconds=60))


async def test_a_full_disk_is_the_disks_failure(
    peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(landing: pieces.Landing, block: Any) -> None:
        raise pieces.PieceStoreError("no space")

    monkeypatch.setattr(pieces.Landing, "write", refuse)
    peer.answers = [good(2)]
    async with asking(tmp_path) as (client, _):
        with pytest.raises(pieces.PieceStoreError, match="no space"):
            await client.fetch(peer.url, 2, timeout_seconds=5)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1",
        f"http://{'a' * 70}/",
        "http://nowhere.invalid",
        "ftp://127.0.0.1/",
        "http://127.0.0.1:99999/",
        "http://[::1",
        "",
        "http://127.0.0.1/\r\nX: y",
        "https://127.0.0.1:1",
    ],
)
async def test_an_address_that_leads_nowhere_is_the_peers_failure(
    tmp_path: Path, url: str
) -> None:
    async with asking(tmp_path) as (client, _):
        with pytest.raises(PeerError):
            await client.fetch(url, 0, timeout_seconds=5)
        with pytest.raises(PeerError):
            await client.fetch_next(url, timeout_seconds=5)


async def test_a_token_cannot_add_a_line_to_the_request(peer: Peer, tmp_path: Path) -> None:
    peer.answers = [good(0)]
    async with asking(tmp_path, lambda: "t\r\nX: y") as (client, _):
        with pytest.raises(PeerError, match="cannot be written"):
            await client.fetch(peer.url, 0, timeout_seconds=5)
    assert peer.asked == []


async def test_each_request_shows_the_token_as_it_stands(peer: Peer, tmp_path: Path) -> None:
    tokens = iter(["old", "new"])
    peer.answers = [head("HTTP/1.1 404 x", "Content-Length: 0")]
    async with asking(tmp_path, lambda: next(tokens)) as (client, _):
        for _ in range(2):
            with pytest.raises(PeerError):
                await client.fetch(peer.url, 0, timeout_seconds=5)
    shown = [line for asked in peer.asked for line in asked.split(b"\r\n") if b"Bearer" in line]
    assert shown == [b"Authorization: Bearer old", b"Authorization: Bearer new"]


async def test_blocks_are_used_again_and_a_waiting_request_holds_none(
    peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    real = connections._Blocks.take

    def take(blocks: Any) -> bytearray:
        if not blocks._free:
            made.append(1)
        return real(blocks)

    monkeypatch.setattr(connections._Blocks, "take", take)
    peer.answers = [good(0)]
    async with asking(tmp_path) as (client, _):
        for _ in range(5):
            await client.fetch(peer.url, 0, timeout_seconds=5)
        assert len(made) <= 2
        made.clear()
        release = asyncio.Event()

        async def wait(writer: asyncio.StreamWriter) -> None:
            await release.wait()

        peer.act = wait
        waiting = [
            asyncio.create_task(client.fetch(peer.url, 0, timeout_seconds=5)) for _ in range(20)
        ]
        await asyncio.sleep(0.2)
        assert made == []
        release.set()
        await asyncio.gather(*waiting)


# --- piece maps


@asynccontextmanager
async def mapping(lines: str, directory: Path) -> AsyncIterator[tuple[HttpPeerClient, str]]:
    async def handle(_: web.Request) -> web.Response:
        return web.Response(text=lines)

    app = web.Application()
    app.router.add_get("/{path:.*}", handle)
    async with test_utils.TestServer(app) as server, asking(directory) as (client, _):
        yield client, str(server.make_url("/"))


async def test_a_piece_map_says_what_there_is_and_what_is_coming(tmp_path: Path) -> None:
    lines = '{"have":"03"}\n\n{"add":[2,4]}\n{"coming":[3]}\n'
    async with mapping(lines, tmp_path) as (client, url):
        told: list[News] = []
        await client.follow(url, told.append)
    assert told == [News(have=0b11), News(have=0b10100), News(coming=0b1000)]


@pytest.mark.parametrize(
    "line",
    [
        "[" * 60_000,
        "9" * 5000,
        '{"have":"\u00b2"}',
        '{"have":"ff"}',
        '{"add":[5]}',
        '{"add":[-1]}',
        '{"add":[true]}',
        '{"coming":[1e0]}',
        '{"add":[' + "1," * 5000 + "1]}",
        "x" * 1_000_000,
    ],
)
async def test_a_piece_map_that_cannot_be_read_is_the_peers_failure(
    tmp_path: Path, line: str
) -> None:
    async with mapping(line + "\n", tmp_path) as (client, url):
        with pytest.raises(PeerError):
            await client.follow(url, lambda news: None)
