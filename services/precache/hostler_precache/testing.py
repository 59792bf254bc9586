"""What tests and benchmarks of precache stand on: sources, a gate before a seed, a lying peer, agents.

All of them are real HTTP servers or real processes; none of them knows the code under test.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import random
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import aiohttp
from aiohttp import web

from hostler_common import client, servers, testing
from hostler_precache import app
from hostler_precache.placing.placement import Wanted
from hostler_precache.placing.shelf import Shelf
from hostler_precache.settings import Settings
from hostler_precache.transfer import manifest
from hostler_precache.transfer.manifest import Manifest
from hostler_precache.transfer.pieces import PieceStore

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# a journal: its header, and the number and a checksum of each piece that is on disk
_JOURNAL_HEADER_BYTES: Final = 60
_JOURNAL_RECORD: Final = struct.Struct(">II")


def image_of(size: int, seed: int = 1) -> bytes:
    """Bytes that do not compress, the same each time."""
    return random.Random(seed).randbytes(size)  # noqa: S311  content, not a secret


def request_of(image_id: str, url: str, data: bytes, **fields: object) -> dict[str, Any]:
    """The body of a distribution of an image of an HTTP source, with its sha512; `fields` are the body's."""
    return {
        "image_id": image_id,
        "image": {
            "image_id": image_id,
            "fetcher": "http",
            "location": url,
            "os_hash_algo": "sha512",
            "os_hash_value": hashlib.sha512(data).hexdigest(),
        },
        **fields,
    }


async def ended(api: client.Api, distribution_id: str, *, seconds: float = 60) -> dict[str, Any]:
    """The distribution, once it is not on its way any more."""

    async def over() -> dict[str, Any] | None:
        answer: dict[str, Any] = await api.get(f"/v1/distributions/{distribution_id}")
        return answer if answer["state"] not in ("fetching", "distributing") else None

    found: dict[str, Any] = await testing.eventually(over, seconds=seconds)
    return found


def described(data: bytes) -> Manifest:
    """The manifest of these bytes, in the smallest pieces that there are."""
    hasher = manifest.Hasher(manifest.MIN_PIECE_BYTES)
    hasher.update(data)
    return hasher.finish()


@contextmanager
def transferred(shelf: Shelf, wanted: Wanted, data: bytes) -> Iterator[PieceStore]:
    """All pieces of the image are on the host, with the swarm left out, and nothing is placed."""
    listed = described(data)
    shelf.make_room(wanted, listed)
    store = PieceStore.open(shelf.directory, wanted.blob_id, listed)
    try:
        for piece, span in manifest.spans(listed):
            store.write(piece, data[span.start : span.stop])
        store.flush()
        yield store
    finally:
        store.close()


@asynccontextmanager
async def http_server(handler: Handler, path: str = "/{path:.*}") -> AsyncIterator[str]:
    """A server that answers everything with the handler; its address."""
    port = servers.free_port()
    application = web.Application()
    application.router.add_route("*", path, handler)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()


@dataclass(slots=True)
class Source:
    """An HTTP server of image bytes. What it serves, and how, may be changed while it runs.

    It may break off after so many bytes, or pause there until it is told to go on, or send no faster.
    With ranges it sends what is asked for from a byte on.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    has_ranges: bool = False
    ranges: list[str] = field(default_factory=list)
    break_after: int | None = None
    hold: asyncio.Event | None = None
    pause_after: int | None = None
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    bytes_per_second: int | None = None
    broken: int = 0

    def add(self, name: str, data: bytes) -> str:
        """Serve the bytes; their URL."""
        self.files[name] = data
        return f"{self.url}/{name}"

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer with a file, or the beginning of it and then nothing."""
        name = request.match_info["path"]
        self.requests.append(name)
        if name not in self.files:
            return web.Response(status=404)
        body = self.files[name]
        response = web.StreamResponse()
        asked = request.headers.get("Range")
        if self.has_ranges and asked is not None:
            self.ranges.append(asked)
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            response = web.StreamResponse(status=206)
            response.headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            body = body[start:]
        response.content_length = len(body)
        await response.prepare(request)
        if self.pause_after is not None:
            await response.write(body[: self.pause_after])
            await self.go_on.wait()
            body = body[self.pause_after :]
        if self.bytes_per_second is not None:
            await self._trickle(response, body)
            return response
        await response.write(body[: self.break_after])
        if self.hold is not None:
            await self.hold.wait()
        if self.break_after is not None and request.transport is not None:
            request.transport.close()
            self.broken += 1
        return response

    async def _trickle(self, response: web.StreamResponse, body: bytes) -> None:
        assert self.bytes_per_second is not None
        began, step = time.monotonic(), max(1, self.bytes_per_second // 50)
        for start in range(0, len(body), step):
            await response.write(body[start : start + step])
            due = began + min(len(body), start + step) / self.bytes_per_second
            await asyncio.sleep(max(0.0, due - time.monotonic()))


@asynccontextmanager
async def http_source() -> AsyncIterator[Source]:
    """A source without images."""
    source = Source()
    async with http_server(source.handle) as url:
        source.url = url
        yield source


@dataclass(slots=True)
class Gate:
    """A proxy before a seed or a host that lets so many pieces pass, and holds the others until opened.

    So many to each host that asks, where it is `per_host`. Piece maps always pass; `followers` have asked for one.
    """

    port: int
    passes: int
    per_host: bool = False
    passed: Counter[str] = field(default_factory=Counter)
    followers: set[str] = field(default_factory=set)
    is_open: asyncio.Event = field(default_factory=asyncio.Event)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Forward the request, or hold it; what is behind may be gone, and then so is the gate."""
        host, is_piece = request.headers.get("Hostler-Host", ""), True
        if request.path.endswith("/pieces"):
            self.followers.add(host)
            is_piece = False
        payer = host if self.per_host else ""
        if is_piece and self.passed[payer] >= self.passes:
            await self.is_open.wait()
        self.passed[payer] += is_piece
        has_passed = False
        try:
            answer = await self._forward(request)
            has_passed = answer.status == HTTPStatus.PARTIAL_CONTENT  # "busy" is no piece
            return answer
        except aiohttp.ClientError as exc:
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionResetError("nobody is behind the gate") from exc
        finally:
            if is_piece and not has_passed:
                self.passed[payer] -= 1

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        headers = {
            name: value
            for name, value in request.headers.items()
            if name in ("Authorization", "Range", "Hostler-Host")
        }
        url = f"http://127.0.0.1:{self.port}{request.path_qs}"
        async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as answer:
            wanted = ("Content-Range", "Retry-After", "ETag")
            kept = {name: answer.headers[name] for name in wanted if name in answer.headers}
            if not request.path.endswith("/pieces"):
                return web.Response(status=answer.status, headers=kept, body=await answer.read())
            response = web.StreamResponse(status=answer.status, headers=kept)
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            return response


def service(
    run_service: testing.RunService, directory: Path, **settings: object
) -> AbstractAsyncContextManager[testing.RunningService]:
    """The service with its seed in the directory, as an asynchronous context; `settings` besides the usual ones."""
    values = {
        "data_dir": directory / "seed",
        "blob_port": servers.free_port(),
        "reserve_bytes": 0,
        "log_level": "WARNING",
        **settings,
    }
    return run_service(app.serve, Settings, app.PACKAGE, **values)


@asynccontextmanager
async def gate(
    port: int, *, passes: int, per_host: bool = False
) -> AsyncIterator[tuple[str, Gate]]:
    """A gate before the seed or the host at that port: its address, and itself."""
    made = Gate(port=port, passes=passes, per_host=per_host)
    async with http_server(made.handle) as url:
        yield url, made


@dataclass(slots=True)
class Liar:
    """A peer that says it has every piece and sends garbage of the right length."""

    pieces: int
    asked: int = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer a piece map with all, and a range with zeros."""
        if request.path.endswith("/pieces"):
            response = web.StreamResponse()
            await response.prepare(request)
            line = json.dumps({"add": list(range(self.pieces))})
            await response.write(line.encode() + b"\n")
            with contextlib.suppress(ConnectionError):
                while True:
                    await asyncio.sleep(1)
                    await response.write(b"\n")
            return response
        self.asked += 1
        asked = request.http_range
        assert asked.start is not None
        assert asked.stop is not None
        length = asked.stop - asked.start
        return web.Response(
            status=206,
            headers={"Content-Range": f"bytes {asked.start}-{asked.stop - 1}/*"},
            body=bytes(length),
        )


def certificate_files(directory: Path, name: str = "peer") -> tuple[Path, Path, Path]:
    """Certificate, key and authority of a peer at 127.0.0.1: the certificate is its own authority."""
    certificate, key = directory / f"{name}-certificate.pem", directory / f"{name}-key.pem"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30"
        f" -subj /CN={name} -addext subjectAltName=IP:127.0.0.1,DNS:localhost"
    )
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)  # noqa: S603  a test's own
    return certificate, key, certificate


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A program of the suite in a process of its own."""

    process: asyncio.subprocess.Process
    url: str
    directory: Path
    log: Path

    async def kill(self) -> None:
        """End it with SIGKILL."""
        self.process.kill()
        await self.process.wait()

    def events(self, name: str) -> list[dict[str, object]]:
        """What it logged under that name."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line[:1] == "{"]
        return [line for line in lines if line.get("event") == name]

    def journaled(self) -> set[int]:
        """Of an agent, the pieces of its only image that are on disk for sure, read as a stranger would."""
        records = b""
        for file in (self.directory / ".precache").glob("*.journal"):
            records = file.read_bytes()[_JOURNAL_HEADER_BYTES:]
        whole = len(records) - len(records) % _JOURNAL_RECORD.size
        return {piece for piece, _ in _JOURNAL_RECORD.iter_unpack(records[:whole])}


@asynccontextmanager
async def agent_process(
    host: str,
    directory: Path,
    *,
    amqp_url: str,
    precache_url: str,
    http_port: int | None = None,
    settings: Mapping[str, object] | None = None,
) -> AsyncIterator[Program]:
    """An agent for the host is ready; stopped on leaving, unless it is dead already.

    Images go to `directory` under their own ids. Its log is beside the directory. The port is a free one unless it
    is given.
    """
    port = http_port or servers.free_port()
    directory.mkdir(parents=True, exist_ok=True)  # noqa: ASYNC240  a test's own directory
    log = directory.with_name(f"{directory.name}-{port}.log")
    own = {
        "HOSTLER_AMQP_URL": amqp_url,
        "HOSTLER_AUTH_MODE": "none",
        "HOSTLER_LOG_FORMAT": "json",
        "HOSTLER_AGENT_HOST": host,
        "HOSTLER_AGENT_PARTS": "precache",
        "HOSTLER_AGENT_HTTP_PORT": str(port),
        "HOSTLER_PRECACHE_URL": precache_url,
        "HOSTLER_PRECACHE_TARGET_DIR": str(directory),
        "HOSTLER_PRECACHE_PLACER": "directory",
        "HOSTLER_PRECACHE_TARGET_TEMPLATE": "{image_id}",
        "HOSTLER_PRECACHE_RESERVE_BYTES": "0",
        "HOSTLER_PRECACHE_REPORT_SECONDS": "0.2",
        **{f"HOSTLER_PRECACHE_{k.upper()}": str(v) for k, v in (settings or {}).items()},
    }
    url = f"http://127.0.0.1:{port}"
    async with _program(
        "hostler-agent", environment=own, url=url, directory=directory, log=log
    ) as program:
        yield program


@asynccontextmanager
async def service_process(
    directory: Path,
    *,
    amqp_url: str,
    database_url: str,
    settings: Mapping[str, object] | None = None,
) -> AsyncIterator[Program]:
    """The precache service on a migrated database is ready; stopped on leaving, unless dead.

    Images are kept in `directory`; its log is beside it. The port is a free one unless it is set.
    """
    port = int(str((settings or {}).get("http_port", servers.free_port())))
    log = directory.with_name(f"{directory.name}-{port}.log")
    own = {
        "HOSTLER_AMQP_URL": amqp_url,
        "HOSTLER_DATABASE_URL": database_url,
        "HOSTLER_AUTH_MODE": "none",
        "HOSTLER_LOG_FORMAT": "json",
        "HOSTLER_PRECACHE_HTTP_PORT": str(port),
        "HOSTLER_PRECACHE_BLOB_PORT": str(servers.free_port()),
        "HOSTLER_PRECACHE_DATA_DIR": str(directory),
        "HOSTLER_PRECACHE_RESERVE_BYTES": "0",
        **{f"HOSTLER_PRECACHE_{k.upper()}": str(v) for k, v in (settings or {}).items()},
    }
    url = f"http://127.0.0.1:{port}"
    argv = ("hostler-precache", "serve")
    async with _program(*argv, environment=own, url=url, directory=directory, log=log) as program:
        yield program


@asynccontextmanager
async def _program(
    name: str,
    *arguments: str,
    environment: Mapping[str, str],
    url: str,
    directory: Path,
    log: Path,
) -> AsyncIterator[Program]:
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            str(Path(sys.executable).parent / name),
            *arguments,
            env={**os.environ, **environment},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    # ends the wait at once, should the program end before it is ready
    ending = asyncio.create_task(_ended(process, log))
    try:
        await testing.wait_ready(url, ending)
        yield Program(process=process, url=url, directory=directory, log=log)
    finally:
        if not ending.cancel() and not ending.cancelled():
            ending.exception()  # killed by the test, which knows
        if process.returncode is None:
            process.terminate()
            await process.wait()


async def _ended(process: asyncio.subprocess.Process, log: Path) -> None:
    code = await process.wait()
    tail = (await asyncio.to_thread(log.read_text)).splitlines()[-3:]
    raise RuntimeError(f"the program ended with {code}; its log ends with {tail}")
