"""A site of its own that sends pieces: the seed's, and that of a host whose pieces travel over TLS."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from hostler_precache.transfer.blobs import BlobServer


@asynccontextmanager
async def serving(
    server: BlobServer,
    listener: socket.socket,
    *,
    tls: ssl.SSLContext | None,
    drain_seconds: float,
) -> AsyncIterator[None]:
    """The server answers on the listening socket, which is closed in the end."""
    application = web.Application()
    server.attach(application)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=drain_seconds)
    await runner.setup()
    try:
        await web.SockSite(runner, listener, ssl_context=tls).start()
        yield
    finally:
        await runner.cleanup()


async def serve(
    server: BlobServer, listener: socket.socket, *, tls: ssl.SSLContext, drain_seconds: float
) -> None:
    """Answer on the listening socket until cancelled."""
    async with serving(server, listener, tls=tls, drain_seconds=drain_seconds):
        await asyncio.Event().wait()
