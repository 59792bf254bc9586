"""Images from a server over TLS, whose authority the operator names as OpenSSL takes it."""

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from hostler_common import servers
from hostler_precache import testing
from hostler_precache.images import Image
from hostler_precache.sources.fetch import fetch
from hostler_precache.sources.fetchers import HttpFetcher
from hostler_precache.sources.plugins import Surroundings
from hostler_precache.sources.source import SourceError
from hostler_precache.transfer.manifest import ImageId

DATA = testing.image_of(1 << 20)


@asynccontextmanager
async def tls_source(directory: Path) -> AsyncIterator[tuple[str, Path]]:
    """A server of `/image`, and of `/clear`, which leads out of TLS; its address and its authority."""
    certificate, key, authority = testing.certificate_files(directory)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    port = servers.free_port()

    async def image(request: web.Request) -> web.Response:
        del request
        return web.Response(body=DATA)

    async with testing.http_server(image) as clear:

        async def lead(request: web.Request) -> web.Response:
            del request
            raise web.HTTPFound(f"{clear}/image")

        application = web.Application()
        application.router.add_get("/image", image)
        application.router.add_get("/clear", lead)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port, ssl_context=context).start()
        try:
            yield f"https://127.0.0.1:{port}", authority
        finally:
            await runner.cleanup()


@pytest.mark.parametrize(
    ("path", "is_trusted", "reason"),
    [
        ("image", True, None),
        ("image", False, "source.unreachable"),
        ("clear", True, "source.redirected"),
    ],
)
async def test_an_image_over_https_is_had_from_whom_we_trust_and_never_in_clear(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    is_trusted: bool,
    reason: str | None,
) -> None:
    async with tls_source(tmp_path) as (url, authority):
        if is_trusted:
            monkeypatch.setenv("SSL_CERT_FILE", str(authority))
        # as aiohttp makes its own, once, when it is imported
        connector = aiohttp.TCPConnector(ssl=ssl.create_default_context())
        async with aiohttp.ClientSession(connector=connector) as session:
            fetcher = HttpFetcher(Surroundings(session=session))
            image = Image(image_id=ImageId("golden"), fetcher="http", location=f"{url}/{path}")
            target = tmp_path / "blob"
            if reason is None:
                await fetch(fetcher, image, target)
                assert target.read_bytes() == DATA
                return
            with pytest.raises(SourceError) as caught:
                await fetch(fetcher, image, target)
            assert caught.value.reason == reason
            assert not target.exists()
