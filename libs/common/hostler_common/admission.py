"""An HTTP port that anybody in the network may connect to: how long a connection may do nothing, and how many may.

A connection costs a descriptor, of which a process has only so many, and some memory. So one on which no whole
request has come within `IDLE_SECONDS`, of its own beginning or of the last answer's end, is closed, however many bytes
of a head come meanwhile. And of strangers, who have shown no right to anything yet, only so many may stay: for
one more, the one that has been here the longest goes. Thousands with a right may come at once, and all are strangers
until they have asked: so many are not too many. With TLS one is a stranger from the first byte of the
handshake on, not from its end. Whoever has a right shows it at once, and is no stranger from then on.

Nothing of this happens between the bytes of a request or an answer: those pass as they would without it.
"""

import asyncio
import contextlib
import resource
import socket
import ssl
from asyncio import sslproto
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from aiohttp import web

from hostler_common import logs

log = logs.get(__name__)

# longer than those who ask keep a connection that they do not need now: else it may be closed just when they ask
IDLE_SECONDS: Final = 60.0
HANDSHAKE_SECONDS: Final = 10
# of some 13 KiB each; or fewer, where a quarter of the descriptors are fewer
STRANGERS: Final = 4096
# before those who are here are heard: all are strangers for a moment, and a thousand may come at once
_ADMITTED_AT_ONCE: Final = 16
_BACKLOG: Final = 1024
_FIRST_LOOK: Final = 16


class Admission:
    """The strangers at one port."""

    def __init__(self, *, strangers: int | None = None) -> None:
        """Nobody is there yet; so many strangers may be, or as many as the process has room for."""
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._limit = strangers or min(STRANGERS, descriptors // 4)
        # by their sockets, which are the same below TLS and above it; in the order in which they came
        self._strangers: dict[Any, asyncio.Transport] = {}
        self._look_at = min(self._limit, _FIRST_LOOK)
        self._is_crowded = False

    def came(self, transport: asyncio.Transport) -> None:
        """Somebody has connected; if too many strangers are here, the first of them go.

        Args:
            transport: of TCP, also where TLS is to come.
        """
        if len(self._strangers) >= self._look_at:
            # who has left has no descriptor; one that is being closed may wait for ever for its reader
            self._strangers = {
                connection: one
                for connection, one in self._strangers.items()
                if connection.fileno() >= 0
            }
            self._look_at = min(self._limit, 2 * len(self._strangers) + _FIRST_LOOK)
            is_crowded = len(self._strangers) >= self._limit
            if is_crowded:
                # some at a time: looking through thousands for each who comes would be what a crowd is after
                for first in list(self._strangers)[: max(1, self._limit // 64)]:
                    self._strangers.pop(first).abort()
            if is_crowded and not self._is_crowded:
                log.warning("port_crowded", strangers=self._limit)
            self._is_crowded = is_crowded
        self._strangers[transport.get_extra_info("socket")] = transport

    def is_known(self, request: web.Request) -> None:
        """Who asks has shown that it may: its connection is no stranger's."""
        if request.transport is not None:
            self._strangers.pop(request.transport.get_extra_info("socket"), None)


KEY: Final = web.AppKey("admission", Admission)
"""Where an application has the admission of its port, for those of its handlers that look at rights."""


@asynccontextmanager
async def serving(
    application: web.Application,
    listener: socket.socket,
    *,
    drain_seconds: float,
    tls: ssl.SSLContext | None = None,
    idle_seconds: float = IDLE_SECONDS,
) -> AsyncIterator[None]:
    """The application, with its `KEY` set, answers on the listening socket, which is closed in the end.

    Args:
        application: not started yet.
        listener: non-blocking.
        drain_seconds: how long requests may go on in the end.
        tls: who we are, and whom we answer.
        idle_seconds: see the module.
    """
    admission = application[KEY]
    runner = web.AppRunner(
        application,
        access_log=None,
        shutdown_timeout=drain_seconds,
        keepalive_timeout=idle_seconds,
    )
    with contextlib.closing(listener):
        await runner.setup()
        try:
            server = runner.server
            assert server is not None
            site = await asyncio.get_running_loop().create_server(
                lambda: _Arrival(admission, server, tls),
                sock=listener,
                backlog=_ADMITTED_AT_ONCE,
            )
            listener.listen(_BACKLOG)  # asyncio takes one number for both
            try:
                yield
            finally:
                site.close()
        finally:
            await runner.cleanup()


class _Arrival(asyncio.Protocol):
    """A connection up to the moment in which it is made; whatever comes on it is the server's."""

    def __init__(
        self, admission: Admission, server: web.Server, tls: ssl.SSLContext | None
    ) -> None:
        self._admission = admission
        self._server = server
        self._tls = tls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Somebody has connected; with TLS it has to show who it is before the server hears of it."""
        assert isinstance(transport, asyncio.Transport)
        self._admission.came(transport)
        protocol: asyncio.Protocol | asyncio.BufferedProtocol = self._server()
        if self._tls is not None:
            # as asyncio's own servers have it, which say nothing of a connection before its handshake is done
            protocol = sslproto.SSLProtocol(
                asyncio.get_running_loop(),
                protocol,
                self._tls,
                waiter=None,  # type: ignore[arg-type]  # nobody waits: the server is told, or the connection ends
                server_side=True,
                ssl_handshake_timeout=HANDSHAKE_SECONDS,
            )
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
