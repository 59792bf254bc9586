"""Serving pieces: one aiohttp application part, the same at the seed and on every host.

    GET /v1/blobs/{blob_id}          a range of verified pieces (206), or the whole blob (200)
    GET /v1/blobs/{blob_id}/next     seed only: the next piece that was never sent; 204 when all were;
                                     with `below`, one of the first so many, which the asker can check
    GET /v1/blobs/{blob_id}/pieces   which pieces there are, then each new one as it comes, and those
                                     that are on their way here from outside the rack (NDJSON)

Invariants: only verified pieces leave; at most `slots` of them at once, a few askers wait, the
rest are told to come back; every byte that leaves is counted, by distribution, here at the
sender. Bytes go by `loop.sendfile`: the plain asyncio loop has it, uvloop has not.
"""

import asyncio
import math
import os
import re
import socket
import time
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO, Final

from aiohttp import HttpVersion11, hdrs, web

from hostler_common import admission, errors, logs
from hostler_precache.swarming import tokens, uploads
from hostler_precache.swarming.swarm import SeedPolicy
from hostler_precache.transfer import congestion, piece_maps
from hostler_precache.transfer.manifest import MAX_PIECE_BYTES, BlobId, PieceList, Span
from hostler_precache.transfer.piece_maps import Watcher

log = logs.get(__name__)

HOST_HEADER: Final = "Hostler-Host"
SPREAD_SECONDS: Final = 2.0
# a reader slower than this, for a piece or as much of an image, loses its connection, and its slot at the latest then
SLOWEST_BYTES_PER_SECOND: Final = 128 * 1024
_SEND_FLOOR_SECONDS: Final = 20.0
REMEMBERED_TOKENS: Final = 1024
# of one blob; whoever names more makes them up, and has to fetch something for each
COUNTED_DISTRIBUTIONS: Final = 1000
KEPT_FILES: Final = 8
_TLS_CHUNK_BYTES: Final = 256 * 1024
_BELOW: Final = re.compile(r"[0-9]{1,9}", re.ASCII)
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
        manifest: PieceList,
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
        self.is_withdrawn = False
        self._fd = fd
        self._have = have
        # what a host is known to have, by its name
        self.known: Callable[[str], int] = lambda host: 0
        self._watchers: set[Watcher] = set()
        self._files: list[BinaryIO] = []
        weakref.finalize(self, _close_all, self._files)
        self._telling: asyncio.TimerHandle | None = None
        self._told_at = -math.inf
        self._grants: dict[str, tokens.Grant] = {}  # by token, each verified

    @property
    def have(self) -> int:
        """The pieces that may be served."""
        return self._have

    def add(self, piece: int) -> None:
        """The piece is verified and in the file: it is served, and those who watch are told."""
        self.add_all(1 << piece)

    def add_all(self, pieces: int) -> None:
        """All of these are."""
        self._have |= pieces
        self._tell_soon()

    def lose(self, pieces: int) -> None:
        """These pieces are damaged: they are not served until they are added again."""
        self._have &= ~pieces
        for watcher in self._watchers:
            watcher.lose(pieces)

    def claim(self, piece: int) -> None:
        """The piece is being fetched from outside the rack: those who watch are told, too."""
        for watcher in self._watchers:
            watcher.claim(1 << piece)
        self._tell_soon()

    def end_watching(self) -> None:
        """Nobody follows the piece map any more."""
        for watcher in self._watchers:
            watcher.ended.set()

    def _tell_soon(self) -> None:
        """At once; but what comes soon after is told together."""
        if self._watchers and self._telling is None:
            loop = asyncio.get_running_loop()
            due = max(loop.time(), self._told_at + piece_maps.BATCH_SECONDS)
            self._telling = loop.call_at(due, self._tell)

    def _tell(self) -> None:
        self._telling, self._told_at = None, asyncio.get_running_loop().time()
        for watcher in self._watchers:
            watcher.tell(self._have, self.known(watcher.host))

    @contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """The file with a position of its own, whatever its name now is.

        Raises:
            BlobNotFound: it is withdrawn: the descriptor's number may be another file's by now.
        """
        if self.is_withdrawn:
            raise BlobNotFound("no such blob is served here any more")
        if self._files:
            file = self._files.pop()
        else:
            fd = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)
            file = os.fdopen(fd, "rb", buffering=0)
        try:
            yield file
        finally:
            if self.is_withdrawn or len(self._files) >= KEPT_FILES:
                file.close()
            else:
                self._files.append(file)  # opening it costs as much as sending a small piece

    def withdrawn(self) -> None:
        """It is not served any more, and holds no file open but those that are being sent."""
        self.is_withdrawn = True
        self.end_watching()  # of another blob of that id, they ask again
        _close_all(self._files)

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

    def add_sent(self, distribution_id: str, sent_bytes: int) -> None:
        """So many bytes have left for the distribution; of too many, those with the fewest are forgotten."""
        if not sent_bytes:
            return
        counted = self.sent_bytes
        if distribution_id not in counted and len(counted) >= COUNTED_DISTRIBUTIONS:
            del counted[min(counted, key=counted.__getitem__)]
        counted[distribution_id] += sent_bytes

    async def tell(self, watcher: Watcher, *, expires_at: float) -> None:
        """The watcher is told what is here, and from then on what is added or claimed, until it has ended.

        That is no later than a heartbeat after its token expires, which is Unix time.
        """
        watcher.begin(self._have, self.manifest.count)
        self._watchers.add(watcher)
        try:
            while not watcher.ended.is_set() and time.time() < expires_at:
                with suppress(TimeoutError):
                    async with asyncio.timeout(piece_maps.HEARTBEAT_SECONDS):
                        await watcher.ended.wait()
                watcher.beat()
        finally:
            self._watchers.discard(watcher)


def _close_all(files: list[BinaryIO]) -> None:
    while files:
        files.pop().close()


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
        self._admission = admission.Admission()

    def attach(self, app: web.Application) -> None:
        """Add the routes to an application that is not started yet."""
        app.router.add_get("/v1/blobs/{blob_id}", _answering(self._get))
        app.router.add_get("/v1/blobs/{blob_id}/next", _answering(self._next), allow_head=False)
        app.router.add_get(
            "/v1/blobs/{blob_id}/pieces", _answering(self._pieces), allow_head=False
        )
        app.on_shutdown.append(self._stop)
        self._admission = app.get(admission.KEY, self._admission)

    def serve(self, blob: Blob) -> None:
        """The blob is served from now on."""
        blob.is_withdrawn = False
        self._blobs[blob.blob_id] = blob

    def withdraw(self, blob_id: BlobId) -> None:
        """The blob is no longer served; what is on its way out still leaves."""
        blob = self._blobs.pop(blob_id, None)
        if blob is not None:
            blob.withdrawn()

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
            blob.end_watching()

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
        below = _below(request, blob.manifest.count)
        if not policy.is_injected and not policy.has_next(_host(request), time.monotonic(), below):
            # known before a slot is taken: one that sends nothing is no measure of those that do
            raise SenderBusy("the seed itself waits for the next piece")
        async with self._slots.taken():
            piece = policy.next(_host(request), time.monotonic(), below)
            if piece is None and policy.is_injected:
                return web.Response(status=204)
            if piece is None:
                raise SenderBusy("the seed itself waits for the next piece")
            return await self._send_piece(request, blob, grant, policy, piece)

    async def _pieces(self, request: web.Request) -> web.StreamResponse:
        blob, grant = self._authorized(request)
        host = _host(request)
        self._on_watcher(host)
        response = web.StreamResponse(headers={hdrs.CONTENT_TYPE: "application/x-ndjson"})
        await response.prepare(request)
        transport = request.transport
        if transport is None or self._stopping:
            raise ConnectionResetError("the asker went away")
        is_chunked = request.version >= HttpVersion11
        watcher = Watcher(host, transport, is_chunked=is_chunked)
        await blob.tell(watcher, expires_at=grant.expires_at)
        if transport.get_write_buffer_size():
            raise ConnectionResetError("the asker does not read")  # nor would it read the end
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
        # of TLS, the socket goes a moment before the transport does
        connection = None if transport is None else transport.get_extra_info("socket")
        if transport is None or connection is None:
            raise ConnectionResetError("the asker went away")
        congestion.settle(connection)
        loop = asyncio.get_running_loop()
        count = 0
        with blob.opened() as file:
            file.seek(span.start)
            try:
                async with asyncio.timeout(None) as patience:
                    with _corked(transport):  # the head leaves with the first bytes
                        for portion in _portions(span):
                            patience.reschedule(loop.time() + _patience_seconds(portion))
                            if not response.prepared:
                                await response.prepare(request)
                            await _transmit(transport, response, file, portion)
            except TimeoutError as exc:
                transport.abort()
                raise ConnectionResetError("the asker reads too slowly") from exc
            except (OSError, RuntimeError) as exc:  # RuntimeError: the transport is closing
                raise ConnectionResetError("the asker went away") from exc
            finally:
                # the position is after the last byte that was handed to the connection
                count = max(0, file.tell() - span.start)
                blob.add_sent(grant.distribution_id, count)
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
        grant = blob.granted(token)
        self._admission.is_known(request)
        return blob, grant


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


def _below(request: web.Request, count: int) -> int:
    """Of how many pieces, from the first on, the asker can check the bytes; all, unless it says so."""
    text = request.query.get("below", "")
    return min(int(text), count) if _BELOW.fullmatch(text) else count


def _head(blob: Blob, span: Span, request: web.Request) -> web.StreamResponse:
    size = blob.manifest.size_bytes
    whole = hdrs.RANGE not in request.headers and span == Span(start=0, stop=size)
    chosen = request.path.endswith("/next")
    response = web.StreamResponse(
        status=200 if whole and not chosen else 206,
        headers={
            hdrs.CONTENT_TYPE: "application/octet-stream",
            hdrs.ACCEPT_RANGES: "bytes",
            hdrs.ETAG: f'"{blob.manifest.identity.hex()}"',
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


def _portions(span: Span) -> Iterator[Span]:
    """What a reader has to show its speed by: a piece, or of a whole image no more than of the largest one."""
    for start in range(span.start, span.stop, MAX_PIECE_BYTES):
        yield Span(start=start, stop=min(start + MAX_PIECE_BYTES, span.stop))


def _patience_seconds(portion: Span) -> float:
    return _SEND_FLOOR_SECONDS + portion.length / SLOWEST_BYTES_PER_SECOND


async def _transmit(
    transport: asyncio.Transport, response: web.StreamResponse, file: BinaryIO, span: Span
) -> None:
    """The bytes are handed to the connection; the file's position says how many, should it end early."""
    loop = asyncio.get_running_loop()
    if transport.get_extra_info("sslcontext") is None:
        count = 0
        if not transport.get_write_buffer_size():
            # what the kernel takes at once, often all of it, needs nothing of the loop
            connection = transport.get_extra_info("socket")
            with suppress(BlockingIOError):
                count = os.sendfile(connection.fileno(), file.fileno(), span.start, span.length)
            file.seek(span.start + count)
        if count < span.length:
            await loop.sendfile(transport, file, span.start + count, span.length - count)
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
