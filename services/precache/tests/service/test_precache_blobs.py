"""What leaves a blob server: verified pieces, to those with a token, so many at once."""

import asyncio
import contextlib
import os
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from hostler_common import servers, testing
from hostler_precache.swarming import swarm, tokens
from hostler_precache.testing import image_of
from hostler_precache.transfer import blobs, congestion, manifest
from hostler_precache.transfer.blobs import Blob, BlobServer
from hostler_precache.transfer.manifest import BlobId

PIECE = manifest.MIN_PIECE_BYTES
DATA = image_of(5 * PIECE + 100)
# more than the socket buffers of both sides take, so that a reader who stops stops the sender
LARGE_PIECE = 16 << 20
LARGE = image_of(LARGE_PIECE + 1)
BLOB = BlobId("5a0e1d0e-0000-4000-8000-000000000001")
KEY = bytes(range(32))
DISTRIBUTION = "5a0e1d0e-0000-4000-8000-00000000000d"


def listed(data: bytes, piece_bytes: int) -> manifest.Manifest:
    hasher = manifest.Hasher(piece_bytes)
    hasher.update(data)
    return hasher.finish()


def token(*, blob_id: str = BLOB, key: bytes = KEY, seconds: int = 60) -> str:
    grant = tokens.Grant(
        blob_id=blob_id, distribution_id=DISTRIBUTION, expires_at=int(time.time()) + seconds
    )
    return tokens.mint(grant, key)


class Client:
    """Asks the server under test."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.session = session
        self.url = url

    async def get(
        self, path: str = "", *, host: str = "host-1", authorization: str | None = None, **kw: Any
    ) -> tuple[int, bytes, Any]:
        headers = {
            "Authorization": authorization or f"Bearer {token()}",
            "Hostler-Host": host,
            **kw.pop("headers", {}),
        }
        method = kw.pop("method", "GET")
        async with self.session.request(
            method, f"{self.url}/v1/blobs/{BLOB}{path}", headers=headers, **kw
        ) as response:
            return response.status, await response.read(), response.headers

    async def range(self, text: str, **kw: Any) -> tuple[int, bytes, Any]:
        return await self.get(headers={"Range": f"bytes={text}"}, **kw)


Serve = Callable[..., Any]


@pytest_asyncio.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Serve]:
    """`client, blob = await serve(have=..., policy=..., slots=...)`."""
    path = tmp_path / "blob"
    opened: list[int] = []
    runners: list[web.AppRunner] = []
    async with aiohttp.ClientSession() as session:

        async def start(
            *,
            have: int = 0b111111,
            policy: Any = None,
            data: bytes = DATA,
            piece_bytes: int = PIECE,
            **settings: Any,
        ) -> tuple[Client, Blob]:
            path.write_bytes(data)
            opened.append(os.open(path, os.O_RDONLY))
            server = BlobServer(**{"slots": 4, **settings})
            made = listed(data, piece_bytes)
            blob = Blob(BLOB, manifest=made, key=KEY, fd=opened[-1], have=have, policy=policy)
            server.serve(blob)
            application = web.Application()
            server.attach(application)
            runner = web.AppRunner(application, access_log=None, shutdown_timeout=5)
            await runner.setup()
            runners.append(runner)
            port = servers.free_port()
            await web.TCPSite(runner, "127.0.0.1", port).start()
            return Client(session, f"http://127.0.0.1:{port}"), blob

        yield start
        for runner in runners:
            await runner.cleanup()
    for fd in opened:
        os.close(fd)


@asynccontextmanager
async def stalled(client: Client, path: str) -> AsyncIterator[socket.socket]:
    """Somebody asks, reads the head of the answer, and then nothing more."""
    address = client.url.removeprefix("http://").split(":")
    with socket.socket() as asker:
        asker.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        asker.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(asker, (address[0], int(address[1])))
        head = [
            f"GET /v1/blobs/{BLOB}{path} HTTP/1.1", "Host: x", f"Authorization: Bearer {token()}",
            "Hostler-Host: stalls", "", "",
        ]  # fmt: skip
        await loop.sock_sendall(asker, "\r\n".join(head).encode())
        assert (await loop.sock_recv(asker, 9)) == b"HTTP/1.1 "
        yield asker


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        (f"0-{PIECE - 1}", 0, PIECE),
        ("10-19", 10, 20),
        (f"{PIECE - 5}-{PIECE + 5}", PIECE - 5, PIECE + 6),
        (f"{5 * PIECE}-", 5 * PIECE, len(DATA)),
        ("-7", len(DATA) - 7, len(DATA)),
        (f"0-{10**15}", 0, len(DATA)),
    ],
)
async def test_a_range_is_exactly_those_bytes_and_is_counted(
    serve: Serve, asked: str, start: int, stop: int
) -> None:
    client, blob = await serve()
    status, body, headers = await client.range(asked)
    assert (status, body) == (206, DATA[start:stop])
    assert headers["Content-Range"] == f"bytes {start}-{stop - 1}/{len(DATA)}"

    async def counted() -> bool:
        return dict(blob.sent_bytes) == {DISTRIBUTION: stop - start}

    await testing.eventually(counted)


async def test_a_piece_leaves_with_the_congestion_control_of_near_peers(serve: Serve) -> None:
    client, _ = await serve()
    await client.range(f"0-{PIECE - 1}")
    port = client.url.rpartition(":")[2]
    seen = await asyncio.create_subprocess_exec(
        "ss", "-tinH", "state", "established", f"sport = :{port}", stdout=asyncio.subprocess.PIPE
    )
    told, _ = await seen.communicate()
    assert congestion.NEAR in told.split()


async def test_without_a_range_all_of_it_comes_and_head_sends_nothing(serve: Serve) -> None:
    client, blob = await serve()
    status, body, headers = await client.get(method="HEAD")
    assert (status, body, headers["Content-Length"]) == (200, b"", str(len(DATA)))
    assert blob.sent_bytes == {}
    status, body, _ = await client.get()
    assert (status, body) == (200, DATA)


@pytest.mark.parametrize(
    ("asked", "status", "code"),
    [
        (f"{PIECE}-{2 * PIECE - 1}", 404, "precache.blob.piece_absent"),
        (f"{PIECE - 1}-{PIECE}", 404, "precache.blob.piece_absent"),
        ("0-", 404, "precache.blob.piece_absent"),
        (f"{len(DATA)}-", 416, "precache.blob.range_invalid"),
        ("5-4", 416, "precache.blob.range_invalid"),
        ("x", 416, "precache.blob.range_invalid"),
        ("0-1,3-4", 416, "precache.blob.range_invalid"),
        ("-0", 416, "precache.blob.range_invalid"),
        ("-", 416, "precache.blob.range_invalid"),
        ("+1-2", 416, "precache.blob.range_invalid"),
        ("\u0661-\u0662", 416, "precache.blob.range_invalid"),
        ("0-" + "9" * 5000, 416, "precache.blob.range_invalid"),
    ],
)
async def test_a_range_that_is_not_verified_or_not_one_gives_a_problem(
    serve: Serve, asked: str, status: int, code: str
) -> None:
    client, blob = await serve(have=0b111101)
    answer, body, headers = await client.range(asked)
    assert (answer, headers["Content-Type"].split(";")[0]) == (status, "application/problem+json")
    assert code in body.decode()
    if status == 416:
        assert headers["Content-Range"] == f"bytes */{len(DATA)}"
    blob.add(1)
    if status == 404:
        assert (await client.range(asked))[0] == 206


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        ("none", 401),
        ("Bearer nonsense", 403),
        (f"Bearer {token(key=bytes(32))}", 403),
        (f"Bearer {token(blob_id='another')}", 403),
        (f"Bearer {token(seconds=-1)}", 403),
    ],
    ids=["none", "nonsense", "another key", "another blob", "expired"],
)
async def test_nothing_leaves_without_a_token_of_this_swarm(
    serve: Serve, authorization: str, status: int
) -> None:
    client, blob = await serve()
    for path in ("", "/next", "/pieces"):
        answer, body, _ = await client.get(path, authorization=authorization)
        assert answer == status
        assert authorization.removeprefix("Bearer ").encode() not in body
    assert blob.sent_bytes == {}


async def test_a_seed_chooses_each_piece_once_and_then_has_no_more(serve: Serve) -> None:
    client, blob = await serve(policy=swarm.SeedPolicy(6))
    got = [await client.get("/next", host=f"host-{number}") for number in range(7)]
    assert [status for status, _, _ in got] == [206] * 6 + [204]
    assert b"".join(body for _, body, _ in got) == DATA
    assert blob.sent_bytes == {DISTRIBUTION: len(DATA)}
    assert (await client.range(f"0-{PIECE - 1}", host="host-0"))[0] == 206
    for number in range(10, 30):  # a few more copies are given, and then no more
        status, _, headers = await client.range(f"0-{PIECE - 1}", host=f"host-{number}")
        if status == 429:
            break
    assert (status, headers["Retry-After"]) == (429, "0")
    status, body, _ = await client.get(host="host-30")
    assert (status, body) == (200, DATA)


async def test_a_host_is_no_seed(serve: Serve) -> None:
    client, _ = await serve()
    assert (await client.get("/next"))[0] == 404


async def test_a_piece_whose_sending_broke_off_goes_out_again_before_the_next(
    serve: Serve,
) -> None:
    policy = swarm.SeedPolicy(2)
    client, blob = await serve(policy=policy, data=LARGE, piece_bytes=LARGE_PIECE, have=0b11)
    async with stalled(client, "/next"):
        assert not policy.is_injected

    async def noticed() -> bool:
        return bool(blob.sent_bytes)

    await testing.eventually(noticed)
    assert 0 < blob.sent_bytes[DISTRIBUTION] < LARGE_PIECE
    got = [(await client.get("/next"))[2]["Content-Range"] for _ in range(2)]
    assert got == [
        f"bytes 0-{LARGE_PIECE - 1}/{len(LARGE)}",
        f"bytes {LARGE_PIECE}-{LARGE_PIECE}/{len(LARGE)}",
    ]
    assert (await client.get("/next"))[0] == 204


async def test_more_askers_than_slots_wait_and_the_rest_are_sent_away(serve: Serve) -> None:
    client, _ = await serve(
        slots=1, queue=1, queue_seconds=0.2, data=LARGE, piece_bytes=LARGE_PIECE, have=0b11
    )
    async with stalled(client, ""):
        answers = await asyncio.gather(*(client.range("0-9") for _ in range(3)))
        assert [status for status, _, _ in answers] == [429, 429, 429]
        assert {headers["Retry-After"] for _, _, headers in answers} == {"0"}

    async def has_a_slot() -> bool:
        return bool((await client.range("0-9"))[0] == 206)

    await testing.eventually(has_a_slot)


async def test_a_piece_map_is_pushed_as_pieces_come(serve: Serve) -> None:
    client, blob = await serve(have=0b000001)
    headers = {"Authorization": f"Bearer {token()}"}
    async with client.session.get(
        f"{client.url}/v1/blobs/{BLOB}/pieces", headers=headers
    ) as response:
        assert await response.content.readline() == b'{"have":"01"}\n'
        blob.add(3)
        blob.add(5)
        assert await response.content.readline() == b'{"add":[3,5]}\n'
        blob.add(2)
        assert await response.content.readline() == b'{"add":[2]}\n'


async def test_the_whole_of_an_image_of_one_piece_is_no_piece_of_the_swarm(serve: Serve) -> None:
    client, _ = await serve(policy=swarm.SeedPolicy(1), data=DATA[:1000], have=1)
    for number in range(30):
        status, body, _ = await client.get(host=f"host-{number}")
        assert (status, body) == (200, DATA[:1000])


async def test_an_image_of_no_bytes_is_served_as_such(serve: Serve) -> None:
    client, _ = await serve(data=b"", have=0)
    assert (await client.get())[:2] == (200, b"")
    status, _, headers = await client.range("0-0")
    assert (status, headers["Content-Range"]) == (416, "bytes */0")


async def test_what_is_being_fetched_from_outside_and_what_was_lost_is_told(serve: Serve) -> None:
    client, blob = await serve(have=0b000001)
    headers = {"Authorization": f"Bearer {token()}"}
    async with client.session.get(
        f"{client.url}/v1/blobs/{BLOB}/pieces", headers=headers
    ) as response:
        assert await response.content.readline() == b'{"have":"01"}\n'
        blob.claim(4)
        blob.claim(0)  # is here already
        assert await response.content.readline() == b'{"coming":[4]}\n'
        blob.claim(5)
        blob.add(5)
        assert await response.content.readline() == b'{"add":[5]}\n'
        blob.lose(0b1)
        assert (await client.range("0-9"))[0] == 404
        blob.add(0)
        assert await response.content.readline() == b'{"add":[0]}\n'
        assert (await client.range("0-9"))[0] == 206


async def test_a_reader_who_stops_loses_its_slot_to_the_others(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blobs, "_SEND_FLOOR_SECONDS", 0.3)
    monkeypatch.setattr(blobs, "SLOWEST_BYTES_PER_SECOND", 1 << 40)
    client, blob = await serve(slots=1, data=LARGE, piece_bytes=LARGE_PIECE, have=0b11)
    async with stalled(client, ""):
        status, body, _ = await client.range("0-9")  # waits for the slot
        assert (status, body) == (206, LARGE[:10])
    assert 0 < blob.sent_bytes[DISTRIBUTION] < len(LARGE)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/blobs/../../../../etc/passwd",
        "/v1/blobs/..%2F..%2F..%2Fetc%2Fpasswd",
        "/v1/blobs/%2e%2e/%2e%2e/etc/passwd",
        "/v1/blobs//etc/passwd",
        f"/v1/blobs/{BLOB}%00",
        f"/v1/blobs/{BLOB}/../../../etc/passwd",
        f"/v1/blobs/{BLOB}/next/..%2f..",
    ],
)
async def test_no_path_leads_to_another_file(serve: Serve, path: str) -> None:
    client, _ = await serve()
    answer = await said(client, f"GET {path} HTTP/1.1", f"Authorization: Bearer {token()}")
    assert answer.startswith(b"HTTP/1.1 404")
    assert b"root:" not in answer


@pytest.mark.parametrize(
    "lines",
    [
        [f"GET /v1/blobs/{BLOB} HTTP/1.1", "X: " + "a" * 100_000],
        ["GET /" + "a" * 100_000 + " HTTP/1.1"],
        [f"GET /v1/blobs/{BLOB} HTTP/1.1", *["a: b"] * 200_000],
        [f"GET /v1/blobs/{BLOB} HTTP/1.1", "Content-Length: 1", "Transfer-Encoding: chunked"],
        [f"GET /v1/blobs/{BLOB} HTTP/1.1", "Content-Length: 1", "Content-Length: 2"],
        [f"POST /v1/blobs/{BLOB} HTTP/1.1", "Content-Length: 0"],
        ["\x00\x01\x02"],
    ],
    ids=["long field", "long path", "many fields", "two framings", "two lengths", "post", "noise"],
)
async def test_a_request_that_is_none_is_refused_and_others_go_on(
    serve: Serve, lines: list[str]
) -> None:
    client, blob = await serve()
    answer = await said(client, *lines)
    assert answer[:10] in (b"HTTP/1.1 4", b"HTTP/1.0 4", b"")
    assert blob.sent_bytes == {}
    assert (await client.range("0-9"))[0] == 206


async def said(client: Client, *lines: str) -> bytes:
    """What the server answers to a request as it is written here."""
    host, port = client.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write("\r\n".join([*lines, "Host: x", "Connection: close", "", ""]).encode())
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionError):
                await writer.drain()
                return await reader.read()
        return b""
    finally:
        writer.close()


async def test_a_token_that_was_seen_opens_nothing_once_it_has_expired(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = await serve()
    short = f"Bearer {token(seconds=3600)}"
    assert (await client.range("0-9", authorization=short))[0] == 206
    now = time.time()
    monkeypatch.setattr("hostler_precache.transfer.blobs.time.time", lambda: now + 3601)
    assert (await client.range("0-9", authorization=short))[0] == 403


async def test_what_a_liar_names_is_no_distribution_that_bytes_are_counted_for(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, blob = await serve()
    for name in ("x", "5a0e1d0e", DISTRIBUTION.upper()):
        grant = tokens.Grant(blob_id=BLOB, distribution_id=name, expires_at=1 << 40)
        signed = f"Bearer {tokens.mint(grant, KEY)}"
        assert (await client.range("0-9", authorization=signed))[0] == 403
    assert blob.sent_bytes == {}
    monkeypatch.setattr(blobs, "COUNTED_DISTRIBUTIONS", 3)
    for number in range(9):
        name = str(uuid.UUID(int=number))
        grant = tokens.Grant(blob_id=BLOB, distribution_id=name, expires_at=1 << 40)
        signed = f"Bearer {tokens.mint(grant, KEY)}"
        assert (await client.range("0-9", authorization=signed))[0] == 206
    assert len(blob.sent_bytes) == 3
    # what they make up is forgotten first, before it and after it
    assert (await client.range(f"0-{PIECE - 1}"))[0] == 206
    for number in range(100, 109):
        name = str(uuid.UUID(int=number))
        grant = tokens.Grant(blob_id=BLOB, distribution_id=name, expires_at=1 << 40)
        signed = f"Bearer {tokens.mint(grant, KEY)}"
        assert (await client.range("0-9", authorization=signed))[0] == 206

    async def counted() -> bool:
        return bool(blob.sent_bytes[DISTRIBUTION] == PIECE)

    await testing.eventually(counted)
    assert len(blob.sent_bytes) == 3


async def test_tokens_that_are_remembered_are_bounded(serve: Serve) -> None:
    client, blob = await serve()
    for number in range(3 * blobs.REMEMBERED_TOKENS):
        blob.granted(token(seconds=60 + number))
    assert len(blob._grants) <= blobs.REMEMBERED_TOKENS
    assert (await client.range("0-9"))[0] == 206


@pytest.mark.parametrize("portion_bytes", [LARGE_PIECE, 4096], ids=["piece", "image"])
async def test_who_reads_byte_by_byte_loses_its_connection_however_large_the_image_is(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, portion_bytes: int
) -> None:
    monkeypatch.setattr(blobs, "_SEND_FLOOR_SECONDS", 0.3)
    # the whole image may take two hours, if it comes steadily; what one portion may take is short
    monkeypatch.setattr(blobs, "SLOWEST_BYTES_PER_SECOND", portion_bytes // 2)
    monkeypatch.setattr("hostler_precache.transfer.blobs.MAX_PIECE_BYTES", portion_bytes)
    client, blob = await serve(data=LARGE, piece_bytes=LARGE_PIECE, have=0b11)
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(20), stalled(client, "") as asker:
        while not blob.sent_bytes:
            assert len(await loop.sock_recv(asker, 1)) == 1
            await asyncio.sleep(0.02)
        asker.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        with contextlib.suppress(ConnectionResetError):
            while await loop.sock_recv(asker, 65536):  # what was on its way
                pass
    assert 0 < blob.sent_bytes[DISTRIBUTION] < len(LARGE)
