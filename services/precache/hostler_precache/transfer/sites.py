"""A site of its own that sends pieces: the seed's, and that of a host whose pieces travel over TLS."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from hostler_common import admission
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
    application[admission.KEY] = admission.Admission()
    server.attach(application)
    async with admission.serving(application, listener, drain_seconds=drain_seconds, tls=tls):
        yield


async def serve(
    server: BlobServer, listener: socket.socket, *, tls: ssl.SSLContext, drain_seconds: float
) -> None:
    """Answer on the listening socket until cancelled."""
    async with serving(server, listener, tls=tls, drain_seconds=drain_seconds):
        await asyncio.Event().wait()
