"""Connections to peers.

On most of them pieces come: bytes go from the socket to the disk untouched.

One request at a time on a connection, which is kept for the next one. The body is received by
`BufferedProtocol` straight into a block; a full block is hashed and written by a thread
(`pieces.Landing.write`; both release the interpreter lock) while the next one fills. So a transfer
holds two blocks, whatever the size of its pieces, and the loop does nothing for each chunk but
count it. When the disk is slower than the network, reading stops until it has caught up. Until an
answer comes, a request holds no block: many may wait in the queues of peers.

On a link that is slower than we are, bytes trickle in, packet by packet. While a body comes the kernel
therefore wakes us only when `AWAKE_BYTES` of it are there, or its end (SO_RCVLOWAT, which epoll
obeys; see tcp(7) and tcp_set_rcvlowat in the kernel): the mark is never more than what is still to
come of this answer, so whatever the peer has sent of it is read, and the end of the connection wakes
us in any case. Not with TLS: of a record that has come in part nobody knows what is still to come.

Where the rate of our link is known, connections share receive windows to match (`windows`). Else
sockets keep the kernel's own sizing of receive buffers, which grows further than SO_RCVBUF may.

What a peer tells line by line, for as long as both live, comes on a connection of its own (`listen`),
asked for by HTTP/1.0: then lines are all there is, and each costs one call.
"""

import asyncio
import contextlib
import enum
import math
import socket
import ssl
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Final, Self, TypeVar
from urllib.parse import urlsplit

from hostler_precache.transfer import response_head
from hostler_precache.transfer.pieces import Landing
from hostler_precache.transfer.response_head import Head, HeadError
from hostler_precache.transfer.windows import Window, Windows
from hostler_precache.transfer.writers import Writers

CONNECT_SECONDS: Final = 5.0
STALL_SECONDS: Final = 10.0
IDLE_SECONDS: Final = 30.0
BLOCK_BYTES: Final = 1024 * 1024
# half of the receive buffer that a connection begins with (net.ipv4.tcp_rmem): the mark makes none grow;
# if the window shuts below it all the same, the kernel wakes us (tcp_epollin_ready)
AWAKE_BYTES: Final = 64 * 1024
KEPT_BLOCKS: Final = 8
WRITER_THREADS: Final = 2
# an explanation longer than this is not read to the end: the connection is closed instead
_LONGEST_REFUSAL_BYTES: Final = 64 * 1024
ProtocolT = TypeVar("ProtocolT", bound=asyncio.BaseProtocol)


class ConnectionFailed(Exception):
    """The peer cannot be reached, is too slow, or sent what cannot be understood."""


class ConnectionLost(ConnectionFailed):
    """The connection ended; `is_silent` when no byte of an answer had come."""

    def __init__(self, reason: str, *, is_silent: bool) -> None:
        super().__init__(reason)
        self.is_silent = is_silent


@dataclass(frozen=True, slots=True, kw_only=True)
class _Address:
    """Where a URL points to."""

    host: str
    port: int
    is_tls: bool
    prefix: str  # of every path

    @property
    def authority(self) -> str:
        """As the Host field has it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Connections:
    """The connections of one process to its peers. Use it as an asynchronous context."""

    def __init__(
        self, *, tls: ssl.SSLContext | None = None, link_bytes_per_second: int | None = None
    ) -> None:
        """No connection yet.

        Args:
            tls: who is trusted, and who we are, at ``https`` addresses.
            link_bytes_per_second: what our link carries, where that is known.
        """
        self.tls = tls
        self._windows = Windows(link_bytes_per_second) if link_bytes_per_second else None
        self._idle: dict[_Address, list[_Connection]] = defaultdict(list)
        self._open: set[_Connection] = set()
        self._blocks = _Blocks()
        self._writers = Writers(WRITER_THREADS, name="precache-receive")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for connection in list(self._open):
            connection.abort("closed")
        await asyncio.to_thread(self._writers.close)  # the last blocks are being written

    @asynccontextmanager
    async def ask(
        self, url: str, path: str, fields: dict[str, str], *, timeout_seconds: float
    ) -> AsyncIterator["Answer"]:
        """Send a GET request; the answer's head is there, its body not yet.

        Left before the body was received, the connection is closed; but a refusal is read to its end.

        Args:
            url: the peer's address.
            path: below it, beginning with a slash.
            fields: header fields besides Host.
            timeout_seconds: for all of it, to the end of the context.

        Raises:
            ConnectionFailed: see there.
            PieceStoreError: from `Answer.land`.
        """
        address = _address(url)
        request = _request(address, path, fields)
        connection, head = await self._begin(address, request, timeout_seconds)
        try:
            if head.length_bytes == 0 or head.status >= 300:
                await connection.skip()
            yield Answer(connection, head)
        finally:
            if connection.is_reusable:
                self._idle[address].append(connection)
                connection.rest(IDLE_SECONDS)
            else:
                connection.abort("given up")

    async def listen(
        self,
        url: str,
        path: str,
        fields: dict[str, str],
        hear: Callable[[bytes], None],
        *,
        longest_line_bytes: int,
        quiet_seconds: float,
    ) -> None:
        """Send a GET request and hand each line of the answer to `hear`, until the peer ends it.

        Args:
            url: the peer's address.
            path: below it, beginning with a slash.
            fields: header fields besides Host.
            hear: called with a line without its end; an empty one only shows that the peer lives.
            longest_line_bytes: a peer that says more in one is not listened to.
            quiet_seconds: nor one that says nothing for so long, or for twice as long.

        Raises:
            ConnectionFailed: the peer cannot be reached, refuses, says nothing any more, or what
                cannot be understood.
            Exception: what `hear` raises.
        """
        address = _address(url)
        request = _request(address, path, fields, version="1.0")
        listener = await self._opened(
            address, lambda: _Listener(request, hear, longest_line_bytes), CONNECT_SECONDS
        )
        try:
            while True:
                listener.is_quiet = True
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(quiet_seconds):
                        await listener.ended.wait()
                if listener.failure is not None:
                    raise listener.failure
                if listener.ended.is_set():
                    return
                if listener.is_quiet:
                    raise ConnectionFailed(f"nothing came for {quiet_seconds:g} s")
        finally:
            listener.abort()

    async def _begin(
        self, address: _Address, request: bytes, timeout_seconds: float
    ) -> tuple["_Connection", Head]:
        """A connection on which the answer has begun."""
        limit = _Limit(
            at=asyncio.get_running_loop().time() + timeout_seconds,
            reason=f"not done within {timeout_seconds:g} s",
        )
        idle = self._idle[address]
        while idle:
            connection = idle.pop()
            if not connection.is_reusable:
                continue
            try:
                return connection, await self._head(connection, request, limit)
            except ConnectionLost as exc:
                if not exc.is_silent:
                    raise
                # closed by the peer just when we asked: asking once more is safe
                break
        connection = await self._connect(address, min(CONNECT_SECONDS, timeout_seconds))
        return connection, await self._head(connection, request, limit)

    async def _head(self, connection: "_Connection", request: bytes, limit: "_Limit") -> Head:
        try:
            return await connection.ask(request, limit)
        except BaseException:
            connection.abort("given up")
            raise

    async def _connect(self, address: _Address, timeout_seconds: float) -> "_Connection":
        connection = await self._opened(
            address,
            lambda: _Connection(
                self._blocks,
                self._writers,
                windows=self._windows,
                on_lost=lambda connection: self._forget(address, connection),
            ),
            timeout_seconds,
        )
        self._open.add(connection)
        return connection

    async def _opened(
        self, address: _Address, make: Callable[[], ProtocolT], timeout_seconds: float
    ) -> ProtocolT:
        context = (self.tls or True) if address.is_tls else None
        try:
            async with asyncio.timeout(timeout_seconds):
                _, protocol = await asyncio.get_running_loop().create_connection(
                    make, address.host, address.port, ssl=context
                )
        except (OSError, ValueError) as exc:  # ValueError: a name that cannot be looked up
            raise ConnectionFailed(f"not reached: {exc or type(exc).__name__}") from exc
        return protocol

    def _forget(self, address: _Address, connection: "_Connection") -> None:
        self._open.discard(connection)
        idle = self._idle[address]
        if connection in idle:
            idle.remove(connection)
        if not idle:
            del self._idle[address]


class Answer:
    """An answer whose head was read."""

    def __init__(self, connection: "_Connection", head: Head) -> None:
        self.head = head
        self._connection = connection

    async def land(self, landing: Landing) -> None:
        """The whole body is in the landing.

        Raises:
            ConnectionFailed: the peer broke off, or was too slow.
            PieceStoreError: the disk refused.
        """
        await self._connection.land(landing)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Limit:
    """When a connection is given up, by the clock of the loop, and why."""

    at: float = math.inf
    reason: str = ""


class _Phase(enum.Enum):
    """What the next byte is part of."""

    IDLE = enum.auto()
    HEAD = enum.auto()
    BODY = enum.auto()
    CLOSED = enum.auto()


class _Blocks:
    """Memory that is used again and again. What is taken is given back."""

    def __init__(self) -> None:
        self._free: list[bytearray] = []

    def take(self) -> bytearray:
        return self._free.pop() if self._free else bytearray(BLOCK_BYTES)

    def give(self, block: bytearray) -> None:
        if len(self._free) < KEPT_BLOCKS:
            self._free.append(block)


class _Connection(asyncio.BufferedProtocol):
    """One connection; see the module."""

    def __init__(
        self,
        blocks: _Blocks,
        writers: Writers,
        *,
        windows: Windows | None,
        on_lost: Callable[["_Connection"], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._blocks = blocks
        self._writers = writers
        self._windows = windows
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._phase = _Phase.IDLE
        self._unasked = bytearray(1)
        self._waiter: asyncio.Future[Any] | None = None
        self._failure: BaseException | None = None
        self._socket: socket.socket | None = None  # whose mark is set; none with TLS
        self._mark_bytes = 1
        self._window: Window | None = None
        # one timer for all that may be late; it looks again by itself, so few are made
        self._timer: asyncio.TimerHandle | None = None
        self._limit = _Limit()
        self._moved_at = 0.0
        self._is_paused = False
        self._head: Head | None = None
        self._landing: Landing | None = None
        self._is_writing = False
        self._begun = bytearray(response_head.MAX_HEAD_BYTES)  # the head, and what came with it
        # the block that fills, up to `_filled`; `_left` bytes of the body are still to come
        self._block: bytearray | None = None
        self._filled = 0
        self._left = 0

    # --- what its user does

    @property
    def is_reusable(self) -> bool:
        """Whether another request may be sent."""
        return (
            self._phase is _Phase.IDLE
            and self._transport is not None
            and (self._head is None or self._head.keeps_alive)
        )

    async def ask(self, request: bytes, limit: _Limit) -> Head:
        """Send a request and read the head of its answer; all of which is to come by the limit."""
        assert self._phase is _Phase.IDLE, "one request at a time"
        if self._transport is None:
            raise ConnectionLost("closed", is_silent=True)
        self._phase = _Phase.HEAD
        self._filled = 0
        if self._window is not None:
            self._window.fit()
        self._moved_at = self._loop.time()
        self._limit = limit
        self._watch()
        waiter: asyncio.Future[Head] = self._loop.create_future()
        self._waiter = waiter
        self._transport.write(request)
        return await waiter

    async def land(self, landing: Landing) -> None:
        """Receive the body into the landing."""
        if self._failure is not None:
            raise self._failure
        self._landing = landing
        await self._until_received()

    async def skip(self) -> None:
        """The body was received and forgotten, if it is short enough for that."""
        assert self._head is not None
        if self._phase is _Phase.BODY and self._head.length_bytes <= _LONGEST_REFUSAL_BYTES:
            await self._until_received()

    def rest(self, seconds: float) -> None:
        """Close it unless it is used again by then."""
        self._limit = _Limit(at=self._loop.time() + seconds, reason="idle")
        self._watch()

    def abort(self, reason: str) -> None:
        """Close it now; whoever waits is told why."""
        self._fail(ConnectionFailed(reason))

    async def _until_received(self) -> None:
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._waiter = waiter
        self._advance()
        await waiter

    # --- what the transport does

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        connection = transport.get_extra_info("socket")
        if self._windows is not None:
            self._window = self._windows.open(connection)
        if transport.get_extra_info("sslcontext") is None:
            self._socket = connection

    def get_buffer(self, sizehint: int) -> bytearray | memoryview:
        """Where the next bytes go."""
        del sizehint
        if self._phase is _Phase.HEAD:
            return memoryview(self._begun)[self._filled :]
        if self._block is None or not self._left:
            return self._unasked
        stop = min(len(self._block), self._filled + self._left)
        return memoryview(self._block)[self._filled : stop]

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes have come."""
        self._moved_at = self._loop.time()
        if self._phase is _Phase.BODY and nbytes <= self._left:
            self._filled += nbytes
            self._left -= nbytes
            if not self._left:
                self._receives_no_more()
            self._set_mark(min(self._awake_bytes, self._left))
            self._advance()
        elif self._phase is _Phase.HEAD:
            self._filled += nbytes
            self._read_head(self._filled - nbytes)
        else:
            self._fail(ConnectionFailed("bytes that nobody asked for"))

    def eof_received(self) -> None:
        """The peer sends no more."""

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is no more."""
        self._transport = self._socket = None
        if not self._has_all:
            is_silent = self._phase is _Phase.HEAD and self._filled == 0
            reason = f"connection lost: {exc}" if exc else "the peer closed the connection"
            self._fail(ConnectionLost(reason, is_silent=is_silent))
        self._on_lost(self)

    # --- how it goes on

    @property
    def _has_all(self) -> bool:
        """Whether the answer was received to its end, and only our disk is waited for."""
        return self._phase is _Phase.BODY and self._left == 0

    def _read_head(self, searched: int) -> None:
        end = self._begun.find(
            response_head.END, max(0, searched - len(response_head.END) + 1), self._filled
        )
        if end < 0:
            if self._filled == len(self._begun):
                self._fail(ConnectionFailed("a head without end"))
            return
        try:
            head = response_head.parse(bytes(self._begun[:end]))
        except HeadError as exc:
            self._fail(ConnectionFailed(f"an answer that is not understood: {exc}"))
            return
        body = memoryview(self._begun)[end + len(response_head.END) : self._filled]
        self._left = head.length_bytes - len(body)
        if self._left < 0:
            self._fail(ConnectionFailed("more bytes than the answer has"))
            return
        self._block, self._filled = self._blocks.take(), len(body)
        self._block[: len(body)] = body
        self._head = head
        self._phase = _Phase.BODY
        if self._left and self._windows is not None and self._window is not None:
            self._windows.begin(self._window)
        self._set_mark(min(self._awake_bytes, self._left))
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            self._waiter = None
            waiter.set_result(head)
        self._advance()

    def _advance(self) -> None:
        """Hand a block that is full, or the last, to a thread; read on while there is room."""
        block = self._block
        if self._phase is not _Phase.BODY or block is None:
            return
        if self._left and self._filled < len(block):
            return
        if self._waiter is None or self._is_writing:
            # nobody has said yet where to; or the thread is still at the block before
            if self._left:
                self._pause()
            return
        landing = self._landing
        if landing is None:  # a refusal's text
            self._filled = 0
        elif self._filled:
            region = memoryview(block)[: self._filled]
            self._is_writing = True
            self._writers.run(partial(landing.write, region), partial(self._written, block))
            self._block = self._blocks.take() if self._left else None
            self._filled = 0
        if self._left:
            self._resume()
        elif not self._is_writing:
            self._complete()

    def _written(self, block: bytearray, failure: BaseException | None) -> None:
        self._is_writing = False
        self._blocks.give(block)
        if failure is not None:
            self._fail(failure)
        elif self._phase is _Phase.BODY:
            if self._block is not None:
                self._advance()
            else:
                self._complete()

    def _complete(self) -> None:
        """The whole answer was received."""
        self._phase = _Phase.IDLE
        self._landing = None
        self._drop_block()
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _fail(self, failure: BaseException) -> None:
        if self._phase is _Phase.CLOSED:
            return
        self._phase = _Phase.CLOSED
        self._receives_no_more()
        self._failure = failure
        self._landing = None
        self._drop_block()
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.abort()
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_exception(failure)

    def _receives_no_more(self) -> None:
        if self._windows is not None and self._window is not None:
            self._windows.end(self._window)

    def _drop_block(self) -> None:
        # never one that a thread works on: that one is not `_block` any more
        block, self._block = self._block, None
        if block is not None:
            self._blocks.give(block)

    def _pause(self) -> None:
        if not self._is_paused and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()

    def _resume(self) -> None:
        if self._is_paused and self._transport is not None:
            self._is_paused = False
            self._moved_at = self._loop.time()
            self._transport.resume_reading()

    @property
    def _awake_bytes(self) -> int:
        """How much has to be there for us to be woken."""
        if self._window is None or self._window.bytes is None:
            return AWAKE_BYTES
        # the other third comes while we are about to read
        return min(AWAKE_BYTES, self._window.bytes * 2 // 3)

    def _set_mark(self, count: int) -> None:
        """Wake us when that many bytes are there, which must still be to come; for 0, when any is."""
        count = max(1, count)
        if count != self._mark_bytes and self._socket is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)
            self._mark_bytes = count

    def _watch(self) -> None:
        """See to it that `_look` is called when something may be late, or before."""
        due = self._limit.at
        if self._phase is not _Phase.IDLE:
            half_time = self._moved_at + STALL_SECONDS / 2
            is_later = self._loop.time() >= half_time
            due = min(due, self._moved_at + STALL_SECONDS if is_later else half_time)
        if self._timer is not None:
            if self._timer.when() <= due:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(due, self._look)

    def _look(self) -> None:
        """Give the peer up if it is late or silent; that we wait for the disk is no silence of it.

        At half-time the mark falls: bytes that wait below it are read, and it rises again. So a peer
        that is slow is not given up, and one that is silent within twice `STALL_SECONDS`.
        """
        self._timer = None
        now = self._loop.time()
        if now >= self._limit.at:
            self._fail(ConnectionFailed(self._limit.reason))
            return
        if self._phase is not _Phase.IDLE:
            if self._is_paused or self._has_all:
                self._moved_at = now
            silent = now - self._moved_at
            if self._mark_bytes > 1 and silent >= STALL_SECONDS / 2:
                self._set_mark(1)
                self._moved_at = now - STALL_SECONDS / 2  # the other half begins, if nothing waits
            elif silent >= STALL_SECONDS:
                self._fail(ConnectionFailed(f"nothing came for {STALL_SECONDS:g} s"))
                return
        self._watch()


class _Listener(asyncio.Protocol):
    """One connection on which lines come; `ended` says that no more will, `failure` why, if not by itself."""

    def __init__(
        self, request: bytes, hear: Callable[[bytes], None], longest_line_bytes: int
    ) -> None:
        self.is_quiet = True
        self.ended = asyncio.Event()
        self.failure: Exception | None = None
        self._request = request
        self._hear = hear
        self._longest_line_bytes = longest_line_bytes
        self._transport: asyncio.Transport | None = None
        self._begun = b""  # a head, or a line, whose end has not come
        self._has_head = False

    def abort(self) -> None:
        """Close it now."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected: the request leaves."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Bytes have come."""
        self.is_quiet = False
        if self.ended.is_set():
            return
        try:
            self._take(self._begun + data)
        except Exception as exc:  # noqa: BLE001  whoever listens is told, whatever it is
            self._end(exc)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is no more."""
        if exc is not None or not self._has_head:
            self._end(ConnectionFailed(f"connection lost: {exc or 'closed by the peer'}"))
        self.ended.set()

    def _take(self, data: bytes) -> None:
        if not self._has_head:
            head, end, data = data.partition(response_head.END)
            if len(head) > response_head.MAX_HEAD_BYTES:
                raise ConnectionFailed("a head without end")
            if not end:
                self._begun = head
                return
            try:
                status = response_head.parse_unbounded(head)
            except HeadError as exc:
                raise ConnectionFailed(f"an answer that is not understood: {exc}") from exc
            if status != 200:
                raise ConnectionFailed(f"status {status}")
            self._has_head = True
        *lines, self._begun = data.split(b"\n")
        if max(map(len, (*lines, self._begun))) > self._longest_line_bytes:
            raise ConnectionFailed("a line without end")
        for line in lines:
            self._hear(line)

    def _end(self, failure: Exception) -> None:
        if not self.ended.is_set():
            self.failure = failure
            self.ended.set()
            self.abort()


@lru_cache(maxsize=1024)
def _address(url: str) -> _Address:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as exc:
        raise ConnectionFailed(f"not an address: {exc}") from exc
    if parts.scheme not in ("http", "https") or not parts.hostname or not url.isascii():
        raise ConnectionFailed("not an address of HTTP")
    is_tls = parts.scheme == "https"
    return _Address(
        host=parts.hostname,
        port=port or (443 if is_tls else 80),
        is_tls=is_tls,
        prefix=parts.path.rstrip("/"),
    )


def _request(
    address: _Address, path: str, fields: dict[str, str], *, version: str = "1.1"
) -> bytes:
    lines = [
        f"GET {address.prefix}{path} HTTP/{version}",
        f"Host: {address.authority}",
        *(f"{name}: {value}" for name, value in fields.items()),
    ]
    said = "".join(lines)
    if not (said.isascii() and said.isprintable()):
        raise ConnectionFailed("a request that cannot be written")
    return "\r\n".join([*lines, "", ""]).encode("ascii")
