"""Where an image's bytes come from: HTTP(S), a file of this machine, Glance v2.

Each opens one sequential stream. Glance serves ranges only from some of its stores, and some old
stores answer a range with the whole image, so nothing here asks for one.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final
from urllib.parse import quote

import aiohttp

from hostler_precache import plugins
from hostler_precache.images import Image
from hostler_precache.plugins import Source, SourceError, Surroundings

CHUNK_BYTES: Final = 1024 * 1024
# no limit on the whole, which may be 50 GB; a source that sends nothing for a minute is dead
_TIMEOUT: Final = aiohttp.ClientTimeout(total=None, connect=20, sock_read=60)


class HttpFetcher:
    """`location` is an http or https URL."""

    def __init__(self, surroundings: Surroundings) -> None:
        self._session = surroundings.session

    @asynccontextmanager
    async def open(self, image: Image) -> AsyncIterator[Source]:
        """The stream of the URL; see `plugins.Fetcher`."""
        if not image.location.lower().startswith(("http://", "https://")):
            raise SourceError("source.invalid", "location is not an http or https URL")
        async with _stream(self._session, image.location, headers={}) as source:
            yield source


class GlanceFetcher:
    """The image in Glance with the same id, at the configured endpoint."""

    def __init__(self, surroundings: Surroundings) -> None:
        self._session = surroundings.session
        self._url = surroundings.glance_url
        self._surroundings = surroundings

    @asynccontextmanager
    async def open(self, image: Image) -> AsyncIterator[Source]:
        """The stream of `GET /v2/images/{id}/file`; see `plugins.Fetcher`."""
        if self._url is None:
            raise SourceError("source.not_configured", "glance_url is not set")
        url = f"{self._url.rstrip('/')}/v2/images/{quote(image.image_id, safe='')}/file"
        headers = plugins.glance_headers(self._surroundings)
        async with _stream(self._session, url, headers=headers) as source:
            yield source


class FileFetcher:
    """`location` is a file below one of the configured roots; without roots there is none."""

    def __init__(self, surroundings: Surroundings) -> None:
        self._roots = [Path(root) for root in surroundings.file_roots]

    @asynccontextmanager
    async def open(self, image: Image) -> AsyncIterator[Source]:
        """The content of the file; see `plugins.Fetcher`."""
        path = await asyncio.to_thread(self._resolve, image.location)  # a path may be on NFS
        try:
            file = await asyncio.to_thread(path.open, "rb")
        except OSError as exc:
            raise SourceError("source.unreadable", f"{path}: {exc.strerror}") from exc
        try:
            size_bytes = (await asyncio.to_thread(path.stat)).st_size

            async def chunks() -> AsyncIterator[bytes]:
                try:
                    while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
                        yield chunk
                except OSError as exc:
                    raise SourceError("source.unreadable", f"{path}: {exc.strerror}") from exc

            yield Source(size_bytes=size_bytes, chunks=chunks())
        finally:
            await asyncio.to_thread(file.close)

    def _resolve(self, location: str) -> Path:
        try:
            path = Path(location.removeprefix("file://")).resolve(strict=True)
        except (OSError, ValueError, RuntimeError) as exc:
            raise SourceError("source.not_found", f"there is no file {location!r}") from exc
        if not any(path.is_relative_to(root.resolve()) for root in self._roots):
            raise SourceError("source.forbidden", "the file is not below a configured file root")
        if not path.is_file():
            raise SourceError("source.not_found", f"{location!r} is not a file")
        return path


@asynccontextmanager
async def _stream(
    session: aiohttp.ClientSession, url: str, *, headers: dict[str, str]
) -> AsyncIterator[Source]:
    # an encoding would change the bytes that the hash is of
    wanted = {**headers, "Accept-Encoding": "identity"}
    try:
        async with session.get(url, headers=wanted, timeout=_TIMEOUT) as response:
            if response.status != 200:
                raise _refused(response.status)
            yield Source(size_bytes=response.content_length, chunks=_chunks(response))
    except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError, UnicodeError) as exc:
        # UnicodeError: a name that no resolver takes, as one with a label of 70 characters
        raise SourceError("source.invalid", "location is not a URL that can be asked") from exc
    except (aiohttp.ClientError, TimeoutError) as exc:
        raise SourceError(
            "source.unreachable", f"the source cannot be reached: {type(exc).__name__}",
            is_transient=True,
        ) from exc  # fmt: skip


async def _chunks(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    try:
        async for chunk in response.content.iter_chunked(CHUNK_BYTES):
            yield chunk
    except (aiohttp.ClientError, TimeoutError) as exc:
        raise SourceError(
            "source.truncated", f"the source broke off: {type(exc).__name__}", is_transient=True
        ) from exc


def _refused(status: int) -> SourceError:
    reason = {
        204: "source.empty",  # Glance: the image has no data yet
        401: "source.forbidden",
        403: "source.forbidden",
        404: "source.not_found",
        410: "source.not_found",
    }.get(status, "source.refused")
    return SourceError(
        reason, f"the source answered {status}", is_transient=status >= 500 or status == 429
    )
