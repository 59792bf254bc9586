"""An HTTP port that anybody in the network may connect to: how long a connection may do nothing, and how many may.

A connection costs a descriptor, of which a process may have 1,024 where nobody says more. So one on which no whole
request has come within `IDLE_SECONDS`, of its own beginning or of the last answer's end, is closed, however many bytes
of a head come meanwhile. And of strangers, who have shown no right to anything yet, only so many may stay: for
one more, the one that has been here the longest goes. Whoever has a right shows it at once, and is no stranger
from then on.

Nothing of this happens between the bytes of a request or an answer: those pass as they would without it.
"""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from aiohttp import web

from hostler_common import logs

log = logs.get(__name__)

# longer than those who ask keep a connection that they do not need now: else it may be closed just when they ask
IDLE_SECONDS: Final = 60.0
HANDSHAKE_SECONDS: Final = 10.0
STRANGERS: Final = 256
# before those who are here are heard: all are strangers for a moment, and a thousand may come at once
_ADMITTED_AT_ONCE: Final = 16
_BACKLOG: Final = 1024
_FIRST_LOOK: Final = 16


class Admission:
    """The strangers at one port."""

    def __init__(self, *, strangers: int = STRANGERS) -> None:
        """Nobody is there yet; so many strangers may be."""
        self._limit = strangers
        self._strangers: dict[asyncio.BaseTransport, None] = {}  # in the order in which they came
        self._look_at = min(strangers, _FIRST_LOOK)
        self._is_crowded = False

    def came(self, transport: asyncio.BaseTransport) -> None:
        """Somebody has connected; if too many strangers are here, the first of them goes."""
        if len(self._strangers) >= self._look_at:
            self._strangers = {one: None for one in self._strangers if not _is_gone(one)}
            self._look_at = min(self._limit, 2 * len(self._strangers) + _FIRST_LOOK)
            is_crowded = len(self._strangers) >= self._limit
            if is_crowded:
                first = next(iter(self._strangers))
                del self._strangers[first]
                assert isinstance(first, asyncio.Transport)
                first.abort()
            if is_crowded and not self._is_crowded:
                log.warning("port_crowded", strangers=self._limit)
            self._is_crowded = is_crowded
        self._strangers[transport] = None

    def is_known(self, request: web.Request) -> None:
        """Who asks has shown that it may: its connection is no stranger's."""
        if request.transport is not None:
            self._strangers.pop(request.transport, None)


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
                lambda: _Arrival(admission, server),
                sock=listener,
                backlog=_ADMITTED_AT_ONCE,
                ssl=tls,
                ssl_handshake_timeout=HANDSHAKE_SECONDS if tls is not None else None,
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

    def __init__(self, admission: Admission, server: web.Server) -> None:
        self._admission = admission
        self._server = server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Somebody has connected, and with TLS has shown who it is."""
        self._admission.came(transport)
        protocol = self._server()
        transport.set_protocol(protocol)
        protocol.connection_made(transport)


def _is_gone(transport: asyncio.BaseTransport) -> bool:
    """Whether its descriptor is free again: one that is being closed may wait for ever for its reader."""
    connection = transport.get_extra_info("socket")
    return connection is None or bool(connection.fileno() < 0)
