"""Serving pieces: one aiohttp application part, the same at the seed and on every host.

    GET /v1/blobs/{blob_id}          a range of verified pieces (206), or the whole blob (200)
    GET /v1/blobs/{blob_id}/next     seed only: the next piece that was never sent; 204 when all were
    GET /v1/blobs/{blob_id}/pieces   which pieces there are, then each new one as it comes (NDJSON)

Invariants: only verified pieces leave; at most `slots` of them at once, a few askers wait, the
rest are told to come back; every byte that leaves is counted, by distribution, here at the
sender. Bytes go by `loop.sendfile`: the plain asyncio loop has it, uvloop has not.
"""

import asyncio
import json
import os
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

from aiohttp import hdrs, web

from hostler_common import errors, logs
from hostler_precache import swarm, tokens
from hostler_precache.manifest import BlobId, Manifest, Span
from hostler_precache.swarm import SeedPolicy, UploadSlots

log = logs.get(__name__)

HOST_HEADER: Final = "Hostler-Host"
MAP_BATCH_SECONDS: Final = 0.03
MAP_HEARTBEAT_SECONDS: Final = 5.0
MAP_LINE_PIECES: Final = 1000
SPREAD_SECONDS: Final = 2.0
# a reader slower than this for a whole piece gives its slot back to the others
SLOWEST_BYTES_PER_SECOND: Final = 128 * 1024
_SEND_FLOOR_SECONDS: Final = 20.0


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
        self._watchers: set[asyncio.Event] = set()

    @property
    def have(self) -> int:
        """The pieces that may be served."""
        return self._have

    def add(self, piece: int) -> None:
        """The piece is verified and in the file: it is served, and those who watch are told."""
        self._have |= 1 << piece
        self.wake_watchers()

    def wake_watchers(self) -> None:
        """Those who watch look again."""
        for watcher in self._watchers:
            watcher.set()

    def reopen(self) -> int:
        """A descriptor of the same file with a position of its own, whatever its name now is."""
        return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[asyncio.Event]:
        """An event that is set whenever pieces were added."""
        watcher = asyncio.Event()
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)


class BlobServer:
    """The blobs of this process. `attach` puts its routes into an application."""

    def __init__(
        self,
        *,
        slots: int,
        queue: int = 8,
        queue_seconds: float = 0.25,
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
        self._slots = _Slots(slots, queue, queue_seconds)
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
        is_piece = len(touched) == 1 and span == blob.manifest.span(piece)
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
        async with blob.watching() as changed:
            told = blob.have
            count = blob.manifest.count
            await response.write(_line({"have": swarm.to_hex(told, count)}))
            while not self._stopping:
                changed.clear()
                new = blob.have & ~told
                if new:
                    told |= new
                    pieces = list(swarm.members(new))
                    for some in range(0, len(pieces), MAP_LINE_PIECES):
                        line = _line({"add": pieces[some : some + MAP_LINE_PIECES]})
                        await response.write(line)
                    await asyncio.sleep(MAP_BATCH_SECONDS)
                else:
                    try:
                        async with asyncio.timeout(MAP_HEARTBEAT_SECONDS):
                            await changed.wait()
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
        await response.prepare(request)
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the asker went away")
        loop = asyncio.get_running_loop()
        limit = _SEND_FLOOR_SECONDS + span.length / SLOWEST_BYTES_PER_SECOND
        with os.fdopen(blob.reopen(), "rb", buffering=0) as file:
            try:
                async with asyncio.timeout(limit):
                    await loop.sendfile(transport, file, span.start, span.length)
            except TimeoutError as exc:
                transport.abort()
                raise ConnectionResetError("the asker reads too slowly") from exc
            except (OSError, RuntimeError) as exc:  # RuntimeError: the transport is closing
                raise ConnectionResetError("the asker went away") from exc
            finally:
                # sendfile leaves the position after the last byte that it handed to the socket
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
        try:
            grant = tokens.verify(token, blob.key, blob_id=blob.blob_id, now=time.time())
        except tokens.TokenError as exc:
            raise errors.Forbidden(str(exc)) from exc
        return blob, grant


class _Slots:
    """Upload slots with a short queue, first come first served."""

    def __init__(self, slots: int, queue: int, queue_seconds: float) -> None:
        self._slots = UploadSlots(slots, queue=queue)
        self._queue_seconds = queue_seconds
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def active(self) -> int:
        return self._slots.active

    @asynccontextmanager
    async def taken(self) -> AsyncIterator[None]:
        await self._take()
        try:
            yield
        finally:
            self._give_back()

    async def _take(self) -> None:
        if self._slots.take():
            return
        if not self._slots.enqueue():
            raise SenderBusy("every slot is taken and the queue is full")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(self._queue_seconds):
                await turn
        except BaseException as exc:
            if turn.done() and not turn.cancelled():
                self._give_back()  # the slot came in the same moment
            if isinstance(exc, TimeoutError):
                raise SenderBusy("no slot came free in time") from exc
            raise
        finally:
            self._slots.dequeue()
            if turn in self._waiting:
                self._waiting.remove(turn)

    def _give_back(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)  # the slot changes hands and never looks free
                return
        self._slots.give_back()


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _answering(handler: Handler) -> Handler:
    """The handler, with the suite's errors as problem documents."""

    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except errors.HostlerError as exc:
            return problem(exc)
        except ConnectionError:
            # the asker went away in the middle: nothing more can be said on this connection
            if request.transport is not None:
                request.transport.abort()
            return web.Response(status=499)

    return answer


def problem(error: errors.HostlerError) -> web.Response:
    """An error of the tree as RFC 9457 says it."""
    headers = {}
    if error.retry_after_seconds is not None:
        headers[hdrs.RETRY_AFTER] = str(error.retry_after_seconds)
    return web.json_response(
        error.problem(),
        status=error.status,
        headers=headers,
        content_type="application/problem+json",
    )


def _span(request: web.Request, size_bytes: int) -> Span:
    try:
        asked = request.http_range
    except ValueError as exc:
        raise RangeInvalid("only one range, as bytes=first-last") from exc
    start, stop = asked.start, asked.stop
    if start is None:
        return Span(start=0, stop=size_bytes)
    if start < 0:
        start = max(0, size_bytes + start)
    stop = size_bytes if stop is None else min(stop, size_bytes)
    if start >= stop:
        raise RangeInvalid(f"the blob has {size_bytes} bytes")
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


def _host(request: web.Request) -> str:
    return request.headers.get(HOST_HEADER) or request.remote or "unknown"


def _line(document: dict[str, object]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"
