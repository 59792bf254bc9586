"""The server `http`: a seed's pieces by HTTP ranges, from a port of their own."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from hostler_common import runtime
from hostler_precache.sources.plugins import SeedSite
from hostler_precache.transfer import sites


class HttpServer:
    """See `plugins.Server`."""

    def __init__(self, site: SeedSite) -> None:
        self._site = site

    def serving(self) -> AbstractAsyncContextManager[str]:
        """Inside, the site answers; gives its URL.

        Raises:
            PortUnavailable: the port is taken, or may not be bound.
        """
        return self._serving()

    @asynccontextmanager
    async def _serving(self) -> AsyncIterator[str]:
        site = self._site
        listener = runtime.bind(site.host, site.port)
        scheme = "https" if site.tls else "http"
        url = site.url or f"{scheme}://{site.host}:{listener.getsockname()[1]}"
        async with sites.serving(
            site.blobs, listener, tls=site.tls, drain_seconds=site.drain_seconds
        ):
            yield url
