"""Asking others for pieces: the wire of `blobs`, seen from the other side.

Who answers is a stranger: lengths are checked before bytes are kept, and whether the bytes are
the piece is decided later, by the manifest.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Final, Protocol

import aiohttp
from aiohttp import hdrs

from hostler_precache import swarm
from hostler_precache.blobs import HOST_HEADER, MAP_HEARTBEAT_SECONDS
from hostler_precache.manifest import BlobId, Manifest, Span

CONNECT_SECONDS: Final = 5.0
STALL_SECONDS: Final = 10.0


class PeerError(Exception):
    """A peer did not answer, or not as it should."""


class PeerBusyError(PeerError):
    """A peer has no slot; the same request may succeed in a moment."""

    def __init__(self, retry_after_seconds: float) -> None:
        super().__init__("busy")
        self.retry_after_seconds = retry_after_seconds


class PieceMissingError(PeerError):
    """A peer does not have the piece."""


class PeerClient(Protocol):
    """Gets pieces of one blob from others."""

    async def fetch(self, url: str, piece: int, *, timeout_seconds: float) -> bytearray:
        """The bytes that the peer sends as that piece, of the right length.

        Raises:
            PeerBusyError, PieceMissingError: see there.
            PeerError: anything else went wrong.
        """

    async def fetch_next(
        self, url: str, *, timeout_seconds: float
    ) -> tuple[int, bytearray] | None:
        """A piece of the seed's choice with its bytes, or None when it has sent each once.

        Raises:
            PeerBusyError, PeerError: as for `fetch`.
        """

    def follow(self, url: str) -> AsyncIterator[int]:
        """The sets of pieces that the peer says it has, first all, then each time what is new.

        Raises:
            PeerError: the peer is gone, or says what cannot be.
        """


class HttpPeerClient:
    """The real one, on aiohttp. ``token`` gives the swarm's token as it stands: a long transfer outlives one."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        *,
        blob_id: BlobId,
        manifest: Manifest,
        token: Callable[[], str],
        host: str,
    ) -> None:
        self._session = session
        self._path = f"/v1/blobs/{blob_id}"
        self._manifest = manifest
        self._token = token
        self._host = host

    def _headers(self) -> dict[str, str]:
        return {hdrs.AUTHORIZATION: f"Bearer {self._token()}", HOST_HEADER: self._host}

    async def fetch(self, url: str, piece: int, *, timeout_seconds: float) -> bytearray:
        """See `PeerClient`."""
        span = self._manifest.span(piece)
        headers = {**self._headers(), hdrs.RANGE: f"bytes={span.start}-{span.stop - 1}"}
        try:
            async with self._session.get(
                url.rstrip("/") + self._path, headers=headers, timeout=_timeout(timeout_seconds)
            ) as response:
                _require_status(response, 206)
                if _content_range(response) != span:
                    raise PeerError("the peer sent another range than it was asked for")
                return await _read(response, span.length)
        except (aiohttp.ClientError, TimeoutError, ValueError) as exc:
            raise PeerError(type(exc).__name__) from exc

    async def fetch_next(
        self, url: str, *, timeout_seconds: float
    ) -> tuple[int, bytearray] | None:
        """See `PeerClient`."""
        try:
            async with self._session.get(
                f"{url.rstrip('/')}{self._path}/next",
                headers=self._headers(),
                timeout=_timeout(timeout_seconds),
            ) as response:
                if response.status == 204:
                    return None
                _require_status(response, 206)
                span = _content_range(response)
                piece = span.start // self._manifest.piece_bytes
                if not 0 <= piece < self._manifest.count or span != self._manifest.span(piece):
                    raise PeerError("the seed sent what is not a piece")
                return piece, await _read(response, span.length)
        except (aiohttp.ClientError, TimeoutError, ValueError) as exc:
            raise PeerError(type(exc).__name__) from exc

    async def follow(self, url: str) -> AsyncIterator[int]:
        """See `PeerClient`."""
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_SECONDS, sock_read=3 * MAP_HEARTBEAT_SECONDS
        )
        try:
            async with self._session.get(
                f"{url.rstrip('/')}{self._path}/pieces", headers=self._headers(), timeout=timeout
            ) as response:
                _require_status(response, 200)
                async for line in response.content:
                    if line.strip():
                        yield self._pieces(line)
        except (aiohttp.ClientError, TimeoutError, ValueError, RecursionError) as exc:
            raise PeerError(f"{type(exc).__name__}: {exc}") from exc

    def _pieces(self, line: bytes) -> int:
        said = json.loads(line)
        count = self._manifest.count
        match said:
            case {"have": str(text)}:
                return swarm.from_hex(text, count)
            case {"add": list(pieces)} if all(
                type(piece) is int and 0 <= piece < count for piece in pieces
            ):
                return swarm.bits(pieces)
            case _:
                raise ValueError("not a line of a piece map")


def _timeout(seconds: float) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(
        total=seconds, sock_connect=CONNECT_SECONDS, sock_read=STALL_SECONDS
    )


def _require_status(response: aiohttp.ClientResponse, wanted: int) -> None:
    status = response.status
    if status == wanted:
        return
    if status == 404:
        raise PieceMissingError("absent")
    if status in (429, 503):
        text = response.headers.get(hdrs.RETRY_AFTER, "1")
        raise PeerBusyError(min(30.0, float(text)) if text.isdigit() else 1.0)
    raise PeerError(f"status {status}")


def _content_range(response: aiohttp.ClientResponse) -> Span:
    unit, _, rest = response.headers.get(hdrs.CONTENT_RANGE, "").partition(" ")
    first, dash, last = rest.partition("/")[0].partition("-")
    if unit != "bytes" or not dash or not first.isdigit() or not last.isdigit():
        raise PeerError("no Content-Range")
    return Span(start=int(first), stop=int(last) + 1)


async def _read(response: aiohttp.ClientResponse, length: int) -> bytearray:
    data = bytearray()
    while chunk := await response.content.readany():
        data += chunk
        if len(data) > length:
            raise PeerError("more bytes than the range has")
    if len(data) != length:
        raise PeerError("fewer bytes than the range has")
    await asyncio.sleep(0)  # a fast peer must not keep the loop from the others
    return data
