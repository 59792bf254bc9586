"""Serving pieces: one aiohttp application part, the same at the seed and on every host.

    GET /v1/blobs/{blob_id}          a range of verified pieces (206), or the whole blob (200)
    GET /v1/blobs/{blob_id}/next     seed only: the next piece that was never sent; 204 when all were
    GET /v1/blobs/{blob_id}/pieces   which pieces there are, then each new one as it comes, and those
                                     that are on their way here from outside the rack (NDJSON)

Invariants: only verified pieces leave; at most `slots` of them at once, a few askers wait, the
rest are told to come back; every byte that leaves is counted, by distribution, here at the
sender. Bytes go by `loop.sendfile`: the plain asyncio loop has it, uvloop has not.
"""

import asyncio
import json
import os
import re
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import BinaryIO, Final

from aiohttp import hdrs, web

from hostler_common import errors, logs
from hostler_precache.swarming import swarm, tokens, uploads
from hostler_precache.swarming.swarm import SeedPolicy
from hostler_precache.transfer.manifest import BlobId, Manifest, Span

log = logs.get(__name__)

HOST_HEADER: Final = "Hostler-Host"
MAP_BATCH_SECONDS: Final = 0.05
MAP_HEARTBEAT_SECONDS: Final = 5.0
MAP_LINE_PIECES: Final = 1000
SPREAD_SECONDS: Final = 2.0
# a reader slower than this for a whole piece gives its slot back to the others
SLOWEST_BYTES_PER_SECOND: Final = 128 * 1024
_SEND_FLOOR_SECONDS: Final = 20.0
REMEMBERED_TOKENS: Final = 1024
_TLS_CHUNK_BYTES: Final = 256 * 1024
_RANGE: Final = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


class BlobNotFound(errors.NotFound):
    """No such blob is served here."""

    code = "precache.blob.not_found"


class PieceAbsent(errors.NotFound):
    """The blob is served here, but not yet these bytes of it."""

    code = "precache.blob.piece_absent"


class RangeInvalid(errors.HostlerError):
    """The range is malformed, or reaches outside the blob."""

    code = "precache.blob.range_invalid"
    status = 416

    def __init__(self, size_bytes: int) -> None:
        super().__init__(f"only one range, as bytes=first-last, of the blob's {size_bytes} bytes")
        self.size_bytes = size_bytes


class SenderBusy(errors.TooMany):
    """Every slot is taken and the queue is full, or the piece left for another host just now."""

    code = "precache.blob.busy"
    retry_after_seconds = 0


class Blob:
    """One blob as it is served: its manifest, an open file, and which pieces are good."""

    def __init__(
        self,
        blob_id: BlobId,
        *,
        manifest: Manifest,
        key: bytes,
        fd: int,
        have: int = 0,
        policy: SeedPolicy | None = None,
    ) -> None:
        """Serve the pieces `have` of the file `fd`, which stays the caller's to close.

        With a `policy` this is a seed: it decides what leaves, and answers `next`.
        """
        self.blob_id = blob_id
        self.manifest = manifest
        self.key = key
        self.policy = policy
        self.sent_bytes: Counter[str] = Counter()
        self._fd = fd
        self._have = have
        self._watchers: set[_Watcher] = set()
        self._grants: dict[str, tokens.Grant] = {}  # by token, each verified

    @property
    def have(self) -> int:
        """The pieces that may be served."""
        return self._have

    def add(self, piece: int) -> None:
        """The piece is verified and in the file: it is served, and those who watch are told."""
        self._have |= 1 << piece
        self.wake_watchers()

    def lose(self, pieces: int) -> None:
        """These pieces are damaged: they are not served until they are added again."""
        self._have &= ~pieces
        for watcher in self._watchers:
            watcher.told &= ~pieces

    def claim(self, piece: int) -> None:
        """The piece is being fetched from outside the rack: those who watch are told, too."""
        for watcher in self._watchers:
            watcher.coming |= 1 << piece
        self.wake_watchers()

    def wake_watchers(self) -> None:
        """Those who watch look again."""
        for watcher in self._watchers:
            watcher.changed.set()

    def opened(self) -> BinaryIO:
        """The file with a position of its own, whatever its name now is; to be closed."""
        fd = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)
        return os.fdopen(fd, "rb", buffering=0)

    def granted(self, token: str) -> tokens.Grant:
        """What the token allows; one that was seen is not verified again, until it expires.

        Raises:
            Forbidden: nothing.
        """
        now = time.time()
        grant = self._grants.get(token)
        if grant is None or grant.expires_at <= now:
            try:
                grant = tokens.verify(token, self.key, blob_id=self.blob_id, now=now)
            except tokens.TokenError as exc:
                raise errors.Forbidden(str(exc)) from exc
            if len(self._grants) >= REMEMBERED_TOKENS:
                self._grants.clear()
            self._grants[token] = grant
        return grant

    @asynccontextmanager
    async def watching(self) -> AsyncIterator["_Watcher"]:
        """Somebody who is told whenever pieces were added or claimed."""
        watcher = _Watcher()
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)


class _Watcher:
    """One who follows a piece map: woken by `changed`."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self.told = 0
        self.coming = 0


class BlobServer:
    """The blobs of this process. `attach` puts its routes into an application."""

    def __init__(
        self,
        *,
        slots: int,
        queue: int = 64,
        queue_seconds: float = 4.0,
        on_sent: Callable[[int], None] = lambda count: None,
        on_watcher: Callable[[str], None] = lambda host: None,
    ) -> None:
        """A server of no blobs yet.

        Args:
            slots: pieces on the wire at once.
            queue: askers that wait for a slot.
            queue_seconds: how long they wait before they are told to come back.
            on_sent: called with every count of bytes that left.
            on_watcher: called with the name of a host that begins to watch a blob.
        """
        self._blobs: dict[BlobId, Blob] = {}
        self._slots = uploads.Slots(slots, queue=queue, queue_seconds=queue_seconds)
        self._on_sent = on_sent
        self._on_watcher = on_watcher
        self._stopping = False
        self._piece_seconds = 0.0

    def attach(self, app: web.Application) -> None:
        """Add the routes to an application that is not started yet."""
        app.router.add_get("/v1/blobs/{blob_id}", _answering(self._get))
        app.router.add_get("/v1/blobs/{blob_id}/next", _answering(self._next), allow_head=False)
        app.router.add_get(
            "/v1/blobs/{blob_id}/pieces", _answering(self._pieces), allow_head=False
        )
        app.on_shutdown.append(self._stop)

    def serve(self, blob: Blob) -> None:
        """The blob is served from now on."""
        self._blobs[blob.blob_id] = blob

    def withdraw(self, blob_id: BlobId) -> None:
        """The blob is no longer served; what is on its way out still leaves."""
        self._blobs.pop(blob_id, None)

    def find(self, blob_id: BlobId) -> Blob | None:
        """The blob, if it is served here."""
        return self._blobs.get(blob_id)

    @property
    def active(self) -> int:
        """How many pieces are on the wire."""
        return self._slots.active

    async def _stop(self, _: web.Application) -> None:
        # ends the endless map streams; the server waits for the rest
        self._stopping = True
        for blob in self._blobs.values():
            blob.wake_watchers()

    # --- handlers

    async def _get(self, request: web.Request) -> web.StreamResponse:
        blob, grant = self._authorized(request)
        span = _span(request, blob.manifest.size_bytes)
        if span.length == 0:
            return _head(blob, span, request)
        touched = blob.manifest.pieces_of(span)
        wanted = ((1 << len(touched)) - 1) << touched.start
        if wanted & ~blob.have:
            raise PieceAbsent("these bytes are not here yet")
        if request.method == hdrs.METH_HEAD:
            return _head(blob, span, request)
        policy = blob.policy
        piece = touched.start
        # who asks for exactly a piece is a member of the swarm, and gets it when that is good for all
        is_piece = hdrs.RANGE in request.headers and span == blob.manifest.span(piece)
        async with self._slots.taken():
            if policy is None or not is_piece:
                return await self._send(request, blob, grant, span)
            host = _host(request)
            spread = max(SPREAD_SECONDS, 8 * self._piece_seconds)
            if not policy.may_send(piece, host, time.monotonic(), spread_seconds=spread):
                raise SenderBusy("another host has just got this piece: ask it")
            return await self._send_piece(request, blob, grant, policy, piece)

    async def _next(self, request: web.Request) -> web.StreamResponse:
        blob, grant = self._authorized(request)
        policy = blob.policy
        if policy is None:
            raise BlobNotFound("only a seed chooses the piece")
        async with self._slots.taken():
            piece = policy.next(_host(request), time.monotonic())
            if piece is None and policy.is_injected:
                return web.Response(status=204)
            if piece is None:
                raise SenderBusy("the seed itself waits for the next piece")
            return await self._send_piece(request, blob, grant, policy, piece)

    async def _pieces(self, request: web.Request) -> web.StreamResponse:
        blob, _ = self._authorized(request)
        self._on_watcher(_host(request))
        response = web.StreamResponse(headers={hdrs.CONTENT_TYPE: "application/x-ndjson"})
        await response.prepare(request)
        async with blob.watching() as watcher:
            watcher.told = blob.have
            count = blob.manifest.count
            await response.write(_line({"have": swarm.to_hex(watcher.told, count)}))
            while not self._stopping:
                watcher.changed.clear()
                new, coming = blob.have & ~watcher.told, watcher.coming & ~blob.have
                watcher.told, watcher.coming = blob.have, 0
                for name, pieces in (("add", new), ("coming", coming)):
                    for line in _lines(name, pieces):
                        await response.write(line)
                if new or coming:
                    await asyncio.sleep(MAP_BATCH_SECONDS)
                    continue
                try:
                    async with asyncio.timeout(MAP_HEARTBEAT_SECONDS):
                        await watcher.changed.wait()
                except TimeoutError:
                    await response.write(b"\n")
        await response.write_eof()
        return response

    # --- sending

    async def _send_piece(
        self,
        request: web.Request,
        blob: Blob,
        grant: tokens.Grant,
        policy: SeedPolicy,
        piece: int,
    ) -> web.StreamResponse:
        host, started, whole = _host(request), time.monotonic(), False
        span = blob.manifest.span(piece)
        try:
            response = await self._send(request, blob, grant, span)
            whole = True
            return response
        finally:
            now = time.monotonic()
            if whole:
                policy.completed(piece, now)
                self._piece_seconds += (now - started - self._piece_seconds) / 8
            else:
                policy.failed(piece, host)

    async def _send(
        self, request: web.Request, blob: Blob, grant: tokens.Grant, span: Span
    ) -> web.StreamResponse:
        """Send the bytes and count them.

        Raises:
            ConnectionResetError: the asker went away, or read too slowly.
        """
        response = _head(blob, span, request)
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the asker went away")
        limit = _SEND_FLOOR_SECONDS + span.length / SLOWEST_BYTES_PER_SECOND
        count = 0
        with blob.opened() as file:
            file.seek(span.start)
            try:
                async with asyncio.timeout(limit):
                    with _corked(transport):  # the head leaves with the first bytes
                        await response.prepare(request)
                        await _transmit(transport, response, file, span)
            except TimeoutError as exc:
                transport.abort()
                raise ConnectionResetError("the asker reads too slowly") from exc
            except (OSError, RuntimeError) as exc:  # RuntimeError: the transport is closing
                raise ConnectionResetError("the asker went away") from exc
            finally:
                # the position is after the last byte that was handed to the connection
                count = max(0, file.tell() - span.start)
                blob.sent_bytes[grant.distribution_id] += count
                self._on_sent(count)
        await response.write_eof()
        return response

    def _authorized(self, request: web.Request) -> tuple[Blob, tokens.Grant]:
        scheme, _, token = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise errors.Unauthenticated("send the swarm's token: Authorization: Bearer ...")
        blob = self._blobs.get(BlobId(request.match_info["blob_id"]))
        if blob is None:
            raise BlobNotFound("no such blob is served here")
        return blob, blob.granted(token)


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _answering(handler: Handler) -> Handler:
    """The handler, with the suite's errors as problem documents."""

    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except errors.HostlerError as exc:
            return problem(exc)
        except uploads.QueueFull as exc:
            return problem(SenderBusy(str(exc)))
        except ConnectionError:
            # the asker went away in the middle: nothing more can be said on this connection
            if request.transport is not None:
                request.transport.abort()
            return web.Response(status=499)

    return answer


def problem(error: errors.HostlerError) -> web.Response:
    """An error of the tree as RFC 9457 says it."""
    headers = {}
    if isinstance(error, RangeInvalid):
        headers[hdrs.CONTENT_RANGE] = f"bytes */{error.size_bytes}"
    if error.retry_after_seconds is not None:
        headers[hdrs.RETRY_AFTER] = str(error.retry_after_seconds)
    return web.json_response(
        error.problem(),
        status=error.status,
        headers=headers,
        content_type="application/problem+json",
    )


def _span(request: web.Request, size_bytes: int) -> Span:
    """The bytes that are asked for: all, or one range (RFC 9110, section 14.1.2)."""
    text = request.headers.get(hdrs.RANGE)
    if text is None:
        return Span(start=0, stop=size_bytes)
    asked = _RANGE.fullmatch(text)
    if asked is None:
        raise RangeInvalid(size_bytes)
    first, last = asked.groups()
    if first:
        start, stop = int(first), min(int(last) + 1, size_bytes) if last else size_bytes
    else:
        start, stop = max(0, size_bytes - int(last or 0)), size_bytes
    if start >= stop:
        raise RangeInvalid(size_bytes)
    return Span(start=start, stop=stop)


def _head(blob: Blob, span: Span, request: web.Request) -> web.StreamResponse:
    size = blob.manifest.size_bytes
    whole = hdrs.RANGE not in request.headers and span == Span(start=0, stop=size)
    chosen = request.path.endswith("/next")
    response = web.StreamResponse(
        status=200 if whole and not chosen else 206,
        headers={
            hdrs.CONTENT_TYPE: "application/octet-stream",
            hdrs.ACCEPT_RANGES: "bytes",
            hdrs.ETAG: f'"{blob.manifest.root.hex()}"',
        },
    )
    if response.status == 206:
        response.headers[hdrs.CONTENT_RANGE] = f"bytes {span.start}-{span.stop - 1}/{size}"
    response.content_length = span.length
    return response


@contextmanager
def _corked(transport: asyncio.Transport) -> Iterator[None]:
    """Small writes leave together with what follows them: one packet and one wake-up less a piece."""
    connection = transport.get_extra_info("socket")
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    try:
        yield
    finally:
        if not transport.is_closing():
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)


async def _transmit(
    transport: asyncio.Transport, response: web.StreamResponse, file: BinaryIO, span: Span
) -> None:
    """The bytes are handed to the connection; the file's position says how many, should it end early."""
    loop = asyncio.get_running_loop()
    if transport.get_extra_info("sslcontext") is None:
        await loop.sendfile(transport, file, span.start, span.length)
        return
    # what is encrypted passes through this process: about a CPU-second more a GiB
    left = span.length
    while left:
        chunk = await asyncio.to_thread(file.read, min(left, _TLS_CHUNK_BYTES))
        if not chunk:
            raise ConnectionResetError("the file became shorter")
        await response.write(chunk)
        left -= len(chunk)


def _host(request: web.Request) -> str:
    return request.headers.get(HOST_HEADER) or request.remote or "unknown"


def _line(document: dict[str, object]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


def _lines(name: str, pieces: int) -> Iterator[bytes]:
    """The set as lines of a piece map, none of them long."""
    found = list(swarm.members(pieces))
    for some in range(0, len(found), MAP_LINE_PIECES):
        yield _line({name: found[some : some + MAP_LINE_PIECES]})
