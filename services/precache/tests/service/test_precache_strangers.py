"""The port that sends pieces is open to whoever reaches it: those without a token take nobody's place there."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from hostler_common import admission, runtime
from hostler_precache import testing
from hostler_precache.swarming.tokens import Grant, mint
from hostler_precache.transfer import manifest, sites, tls
from hostler_precache.transfer.blobs import Blob, BlobServer
from hostler_precache.transfer.manifest import BlobId

BLOB = BlobId("5a0e1d0e-0000-4000-8000-000000000001")
DATA = testing.image_of(1000)
KEY = bytes(32)
DISTRIBUTION = "5a0e1d0e-0000-4000-8000-00000000000d"
STRANGERS = 3
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture(params=["clear", "tls"])
def secured(request: pytest.FixtureRequest, tmp_path: Path) -> tls.Tls | None:
    if request.param == "clear":
        return None
    return tls.load(*testing.certificate_files(tmp_path, "peer"))


@asynccontextmanager
async def seed(
    directory: Path, monkeypatch: pytest.MonkeyPatch, secured: tls.Tls | None
) -> AsyncIterator[int]:
    """A seed at which few strangers may be; its port."""
    few = partial(admission.Admission, strangers=STRANGERS)
    monkeypatch.setattr(admission, "Admission", few)
    (directory / BLOB).write_bytes(DATA)
    hasher = manifest.Hasher(manifest.MIN_PIECE_BYTES)
    hasher.update(DATA)
    fd = os.open(directory / BLOB, os.O_RDONLY)
    server = BlobServer(slots=2)
    server.serve(Blob(BLOB, manifest=hasher.finish(), key=KEY, fd=fd, have=1))
    listener = runtime.bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    context = secured.server if secured else None
    try:
        async with sites.serving(server, listener, tls=context, drain_seconds=1.0):
            yield port
    finally:
        os.close(fd)


async def connect(stack: AsyncExitStack, port: int, secured: tls.Tls | None) -> Streams:
    context = secured.client if secured else None
    streams = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    stack.callback(streams[1].transport.abort)
    return streams


async def ask(streams: Streams, *, token: str) -> bytes:
    """The status line of the answer to a request for the image; nothing where there is none."""
    reader, writer = streams
    lines = [f"GET /v1/blobs/{BLOB} HTTP/1.1", "Host: x", f"Authorization: Bearer {token}"]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    with suppress(ConnectionError, asyncio.IncompleteReadError):
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
        return head.split(b"\r\n")[0]
    return b""


def a_token(key: bytes) -> str:
    grant = Grant(blob_id=BLOB, distribution_id=DISTRIBUTION, expires_at=1 << 40)
    return mint(grant, key)


async def is_shown_out(reader: asyncio.StreamReader) -> None:
    """The connection ends, and nothing was said on it."""
    async with asyncio.timeout(20):
        with suppress(ConnectionError):
            assert await reader.read() == b""


async def test_who_has_shown_a_token_stays_however_many_come_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secured: tls.Tls | None
) -> None:
    async with seed(tmp_path, monkeypatch, secured) as port, AsyncExitStack() as stack:
        member = await connect(stack, port, secured)
        assert await ask(member, token=a_token(KEY)) == b"http/1.1 200 ok"
        liar = await connect(stack, port, secured)
        assert await ask(liar, token=a_token(bytes(31) + b"1")) == b"http/1.1 403 forbidden"
        strangers = [await connect(stack, port, secured) for _ in range(2 * STRANGERS)]
        for reader, _ in (liar, *strangers[:STRANGERS]):
            await is_shown_out(reader)
        assert await ask(strangers[-1], token=a_token(KEY)) == b"http/1.1 200 ok"
        assert await ask(member, token=a_token(KEY)) == b"http/1.1 200 ok"


async def test_who_does_not_even_say_who_it_is_is_a_stranger_from_the_first_byte_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "HANDSHAKE_SECONDS", 600)
    secured = tls.load(*testing.certificate_files(tmp_path, "peer"))
    async with seed(tmp_path, monkeypatch, secured) as port, AsyncExitStack() as stack:
        member = await connect(stack, port, secured)
        assert await ask(member, token=a_token(KEY)) == b"http/1.1 200 ok"
        silent = [await connect(stack, port, None) for _ in range(2 * STRANGERS)]
        silent[0][1].write(b"\x16\x03\x01")
        for reader, _ in silent[:STRANGERS]:
            await is_shown_out(reader)
        other = await connect(stack, port, secured)
        assert await ask(other, token=a_token(KEY)) == b"http/1.1 200 ok"
        assert await ask(member, token=a_token(KEY)) == b"http/1.1 200 ok"


async def test_who_connects_and_does_not_say_who_it_is_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "HANDSHAKE_SECONDS", 0.3)
    secured = tls.load(*testing.certificate_files(tmp_path, "peer"))
    async with seed(tmp_path, monkeypatch, secured) as port, AsyncExitStack() as stack:
        silent, _ = await connect(stack, port, None)
        await is_shown_out(silent)
        member = await connect(stack, port, secured)
        assert await ask(member, token=a_token(KEY)) == b"http/1.1 200 ok"
