"""Where an image's bytes come from: HTTP(S), a file of this machine, Glance v2, Swift.

Each opens one sequential stream. One that breaks off over HTTP goes on with a range from where it
was, but only as far as the server proves that it does: a 206 for exactly the rest of a body of the
same size and the same validator. Glance serves ranges only from some of its stores, and some old
stores answer a range with the whole image; what cannot go on is begun again from its start. In the
same way a stream begins somewhere else than at its start (`Source.skip`).
"""

import asyncio
import os
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final, Self
from urllib.parse import quote

import aiohttp
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from hostler_precache import threads
from hostler_precache.images import Image, SourceHash
from hostler_precache.sources import sparse
from hostler_precache.sources.access import Service
from hostler_precache.sources.plugins import Surroundings
from hostler_precache.sources.source import Hole, Part, Source, SourceError

CHUNK_BYTES: Final = 1024 * 1024
RESUME_PAUSES_SECONDS: Final = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Before each try to go on; begun anew whenever bytes have come."""
MAX_SEGMENTS: Final = 100_000
# no limit on the whole, which may be 50 GB; a source that sends nothing for a minute is dead
_TIMEOUT: Final = aiohttp.ClientTimeout(total=None, connect=20, sock_read=60)
# an encoding would change the bytes that the hash is of
_AS_IT_IS: Final = {"Accept-Encoding": "identity"}
_CONTENT_RANGE: Final = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)\Z")
_MD5: Final = re.compile(r'"?([0-9a-f]{32})"?\Z')

# the server has answered, and gives no range
_NO_RANGE: Final = frozenset({"source.truncated", "source.range_ignored"})
# the server is away or busy: it may yet go on with the same bytes
_WAIT_FOR: Final = frozenset({"source.unreachable", "source.refused"})
# no ranges here, or not for us; what is really forbidden is so without one, too. Glance says 400 for most stores
_HAS_NO_RANGE: Final = frozenset({200, 400, 401, 403, 405, 406, 412, 416, 501})

Ask = Callable[[Mapping[str, str]], AbstractAsyncContextManager[aiohttp.ClientResponse]]


class HttpFetcher:
    """`location` is an http or https URL. Redirects are followed, but never from https to http."""

    def __init__(self, surroundings: Surroundings) -> None:
        self._session = surroundings.session

    @asynccontextmanager
    async def open(self, image: Image) -> AsyncIterator[Source]:
        """The stream of the URL; see `plugins.Fetcher`."""
        if not image.location.lower().startswith(("http://", "https://")):
            raise SourceError("source.invalid", "location is not an http or https URL")

        def ask(headers: Mapping[str, str]) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
            return self._ask(image.location, headers)

        async with _Download(ask, image) as download:
            yield download.source()

    @asynccontextmanager
    async def _ask(
        self, url: str, headers: Mapping[str, str]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        try:
            response = await self._session.get(
                url, headers={**headers, **_AS_IT_IS}, timeout=_TIMEOUT, max_redirects=5
            )
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError, UnicodeError) as exc:
            # UnicodeError: a name that no resolver takes, as one with a label of 70 characters
            raise SourceError(
                "source.invalid", "location is not a URL that can be asked, or redirects to none"
            ) from exc
        except aiohttp.TooManyRedirects as exc:
            raise SourceError("source.redirected", "the source redirects without end") from exc
        except (aiohttp.ClientError, TimeoutError) as exc:
            raise SourceError(
                "source.unreachable",
                f"the source cannot be reached: {type(exc).__name__}",
                is_transient=True,
            ) from exc
        async with response:
            schemes = [hop.url.scheme for hop in (*response.history, response)]
            if schemes[0] == "https" and "http" in schemes:
                raise SourceError("source.redirected", "the source redirects from https to http")
            yield response


class GlanceFetcher:
    """The image in Glance with the same id."""

    def __init__(self, surroundings: Surroundings) -> None:
        self._surroundings = surroundings

    @asynccontextmanager
    async def open(self, image: Image) -> AsyncIterator[Source]:
        """The stream of `GET /v2/images/{id}/file`; see `plugins.Fetcher`."""
        glance = self._surroundings.glance()
        path = f"v2/images/{quote(image.image_id, safe='')}"
        try:
            async with _Download(_asking(glance, f"{path}/file"), image) as download:
                yield download.source()
        except SourceError as exc:
            if exc.reason == "source.empty" and await _is_gone(glance, path):
                raise SourceError(
                    "source.deleted", "the image was deleted while its fetch began"
                ) from exc
            raise


async def _is_gone(glance: Service, path: str) -> bool:
    """Whether there is no such image: deleted in the middle of a request, its data is found missing first."""
    async with glance.get(path) as response:
        return response.status in (404, 410)


class SwiftFetcher:
    """`location` is `container/object` in the account of the service's own user or project.

    Swift gives the md5 of a plain object, and of a static large object that of each segment: the
    stream is checked against those, segment by segment. Of a dynamic large object, or segments
    that are ranges or large objects themselves, Swift tells no hash of the bytes.
    """

    def __init__(self, surroundings: Surroundings) -> None:
        self._surroundings = surroundings

    @asynccontextmanager
    async def open(self, image: Image) -> AsyncIterator[Source]:
        """The stream of the object; see `plugins.Fetcher`."""
        container, _, name = image.location.partition("/")
        if not container or not name:
            raise SourceError("source.invalid", "location is not container/object")
        swift = self._surroundings.swift()
        path = f"{quote(container, safe='')}/{quote(name)}"
        async with _Download(_asking(swift, path), image) as download:
            parts = await _parts(swift, path, download.headers, download.size_bytes)
            yield download.source(parts)


class FileFetcher:
    """`location` is a file below one of the configured roots; without roots there is none.

    Holes of a sparse file are not read.
    """

    def __init__(self, surroundings: Surroundings) -> None:
        self._roots = [Path(root) for root in surroundings.file_roots]

    @asynccontextmanager
    async def open(self, image: Image) -> AsyncIterator[Source]:
        """The content of the file; see `plugins.Fetcher`."""
        path = await asyncio.to_thread(self._resolve, image.location)  # a path may be on NFS
        try:
            fd = await threads.to_end(
                partial(os.open, path, os.O_RDONLY | os.O_CLOEXEC), undo=os.close
            )
        except OSError as exc:
            raise SourceError("source.unreadable", f"{path}: {exc.strerror}") from exc
        try:
            status = await asyncio.to_thread(os.fstat, fd)
            offset = 0

            async def skip(to: int) -> bool:
                nonlocal offset
                offset = to
                return True

            async def chunks() -> AsyncIterator[bytes | Hole]:
                nonlocal offset
                try:
                    while piece := await threads.to_end(
                        partial(sparse.read, fd, offset, status.st_size)
                    ):
                        offset += piece.length_bytes if isinstance(piece, Hole) else len(piece)
                        yield piece
                    now = await asyncio.to_thread(os.fstat, fd)
                except OSError as exc:
                    raise SourceError("source.unreadable", f"{path}: {exc.strerror}") from exc
                if (now.st_size, now.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
                    raise SourceError(
                        "source.changed", "the file was written to meanwhile", is_transient=True
                    )

            yield Source(
                size_bytes=status.st_size,
                allocated_bytes=min(status.st_size, status.st_blocks * 512),
                chunks=chunks(),
                skip=skip,
            )
        finally:
            await asyncio.to_thread(os.close, fd)

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


def _asking(service: Service, path: str) -> Ask:
    def ask(headers: Mapping[str, str]) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        return service.get(path, headers={**headers, **_AS_IT_IS}, timeout=_TIMEOUT)

    return ask


class _Download:
    """One body over HTTP, as a stream that goes on where it broke off. Opened on entering."""

    def __init__(self, ask: Ask, image: Image) -> None:
        self._ask = ask
        # without a validator, only a hash of the whole tells one version from the next
        self._has_hash = image.source_hash is not None
        self._is_empty = image.size_bytes == 0
        self._stack = AsyncExitStack()
        self._begin = 0

    async def __aenter__(self) -> Self:
        try:
            await self._open()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def _open(self) -> None:
        self._response = await self._stack.enter_async_context(self._ask({}))
        self.headers = self._response.headers
        self.size_bytes: int | None
        if self._response.status == 204 and self._is_empty:
            self.size_bytes = 0  # Glance's answer for an image without bytes
        elif self._response.status == 200:
            self.size_bytes = self._response.content_length
        else:
            raise _refused(self._response.status)
        encoding = self.headers.get("Content-Encoding", "identity")
        if encoding.lower() != "identity":
            raise SourceError("source.encoded", f"the source sends it as {encoding!r}")
        self._validator = _validator(self.headers)

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def source(self, parts: Sequence[Part] = ()) -> Source:
        """The stream; there is one."""
        return Source(
            size_bytes=self.size_bytes,
            chunks=self._chunks(),
            parts=parts,
            skip=None if self.size_bytes is None else self._skip,
        )

    async def _skip(self, to: int) -> bool:
        """See `Source.skip`."""
        assert self.size_bytes is not None
        if to == 0:
            await self._open_again()
        elif to < self.size_bytes:
            await self._stack.aclose()
            try:
                await self._resume(to, None)
            except SourceError as exc:
                if exc.reason not in _NO_RANGE:
                    raise
                is_whole = self._response.status == 200
                if not is_whole or self._response.content_length != self.size_bytes:
                    await self._open_again()
                return False
        self._begin = to
        return True

    async def _open_again(self) -> None:
        await self._stack.aclose()
        opened = (self.size_bytes, self._validator)
        await self._open()
        if (self.size_bytes, self._validator) != opened:
            raise _changed()

    async def _chunks(self) -> AsyncIterator[bytes | Hole]:
        done, failures = self._begin, 0
        if done and done == self.size_bytes:
            return
        broken: BaseException | None = None
        while True:
            try:
                async for chunk in self._response.content.iter_chunked(CHUNK_BYTES):
                    done += len(chunk)
                    failures = 0
                    if self.size_bytes is not None and done > self.size_bytes:
                        raise SourceError(
                            "source.size_mismatch",
                            f"more than {self.size_bytes} bytes came",
                            is_transient=True,
                        )
                    yield chunk
                if self.size_bytes is None or done == self.size_bytes:
                    return
            except (aiohttp.ClientError, TimeoutError) as exc:
                broken = exc
            while True:
                if failures == len(RESUME_PAUSES_SECONDS) or not self._can_resume:
                    raise _broke_off(done, self.size_bytes, broken) from broken
                await self._stack.aclose()
                await asyncio.sleep(RESUME_PAUSES_SECONDS[failures])
                failures += 1
                try:
                    await self._resume(done, broken)
                    break
                except SourceError as exc:
                    if not exc.is_transient or exc.reason not in _WAIT_FOR:
                        raise
                    broken = exc

    @property
    def _can_resume(self) -> bool:
        return self.size_bytes is not None and (self._validator is not None or self._has_hash)

    async def _resume(self, done: int, broken: BaseException | None) -> None:
        """The response is one of exactly the rest.

        Raises:
            SourceError: there is none; the stream is over.
        """
        headers = {"Range": f"bytes={done}-"}
        if self._validator is not None:
            headers["If-Range"] = self._validator
        self._response = await self._stack.enter_async_context(self._ask(headers))
        status = self._response.status
        validator = _validator(self._response.headers)
        if status in (200, 206) and self._validator is not None and validator != self._validator:
            raise _changed()
        if status in _HAS_NO_RANGE:
            raise _broke_off(done, self.size_bytes, broken)
        if status != 206:
            raise _refused(status)
        assert self.size_bytes is not None
        found = _CONTENT_RANGE.match(self._response.headers.get("Content-Range", ""))
        is_rest = (
            found is not None
            and (int(found[1]), int(found[2])) == (done, self.size_bytes - 1)
            and found[3] in ("*", str(self.size_bytes))
            and self._response.content_length in (None, self.size_bytes - done)
        )
        if not is_rest:
            raise SourceError(
                "source.range_ignored",
                f"asked for bytes {done}- of {self.size_bytes}, the source answered with others",
                is_transient=True,
            )


def _validator(headers: Mapping[str, str]) -> str | None:
    """What `If-Range` takes: a strong entity tag, else the time of the last change."""
    tag = headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified")


def _changed() -> SourceError:
    return SourceError(
        "source.changed", "the source has other bytes now than before", is_transient=True
    )


def _broke_off(done: int, size_bytes: int | None, cause: BaseException | None) -> SourceError:
    why = f": {type(cause).__name__}" if cause is not None else ""
    return SourceError(
        "source.truncated",
        f"the source broke off after {done} of {size_bytes or 'unknown'} bytes"
        f" and did not go on from there{why}",
        is_transient=True,
    )


def _refused(status: int) -> SourceError:
    reason = {
        204: "source.empty",  # Glance: the image has no data yet
        401: "source.forbidden",
        403: "source.forbidden",
        404: "source.not_found",
        409: "source.incomplete",  # Swift: a segment of a large object is missing or another
        410: "source.not_found",
    }.get(status, "source.refused")
    return SourceError(
        reason, f"the source answered {status}", is_transient=status >= 500 or status == 429
    )


class _Segment(BaseModel):
    """What is read of an entry of a static large object's manifest."""

    model_config = ConfigDict(extra="ignore")

    bytes: int
    hash: str = ""
    range: str | None = None
    sub_slo: bool = False


_SEGMENTS: Final = TypeAdapter(list[_Segment])


async def _parts(
    swift: Service, path: str, headers: Mapping[str, str], size_bytes: int | None
) -> Sequence[Part]:
    """The md5 of each run of the object's bytes, as Swift tells them; none where it does not."""
    if size_bytes is None or "X-Object-Manifest" in headers:
        return ()
    if headers.get("X-Static-Large-Object", "").lower() != "true":
        return _all_md5([(size_bytes, headers.get("ETag", ""))], size_bytes)
    query = (("multipart-manifest", "get"), ("format", "json"))
    async with swift.get(path, params=query) as response:
        if response.status != 200:
            raise _refused(response.status)
        try:
            segments = _SEGMENTS.validate_json(await response.read())
        except (ValidationError, aiohttp.ClientError) as exc:
            raise SourceError("source.malformed", "Swift's manifest cannot be read") from exc
    if any(segment.range or segment.sub_slo for segment in segments):
        return ()
    return _all_md5([(segment.bytes, segment.hash) for segment in segments], size_bytes)


def _all_md5(runs: Sequence[tuple[int, str]], size_bytes: int) -> Sequence[Part]:
    if sum(length for length, _ in runs) != size_bytes or len(runs) > MAX_SEGMENTS:
        return ()
    found = [(length, _MD5.match(tag)) for length, tag in runs]
    return [
        Part(length_bytes=length, source_hash=SourceHash(algorithm="md5", value=match[1]))
        for length, match in found
        if match is not None
    ] if all(match is not None for _, match in found) else ()  # fmt: skip
