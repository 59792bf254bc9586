"""Asking others for pieces: the wire of `blobs`, seen from the other side.

Who answers is a stranger: lengths are checked before bytes are kept, and whether the bytes are
the piece is decided later, by the manifest.
"""

import json
from collections.abc import Callable
from typing import Final, Protocol

from aiohttp import hdrs

from hostler_precache.swarming import swarm
from hostler_precache.swarming.swarm import News
from hostler_precache.transfer import piece_maps
from hostler_precache.transfer.blobs import HOST_HEADER
from hostler_precache.transfer.connections import Answer, ConnectionFailed, Connections
from hostler_precache.transfer.manifest import BlobId
from hostler_precache.transfer.pieces import Landing, PieceData, PieceStore
from hostler_precache.transfer.response_head import Head

LONGEST_RETRY_SECONDS: Final = 30.0
_LONGEST_LINE_BYTES: Final = 16 * 1024  # and a hex digit for each four pieces


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

    async def fetch(self, url: str, piece: int, *, timeout_seconds: float) -> PieceData:
        """What the peer sends as that piece, of the right length, for `PieceStore.write`.

        Raises:
            PeerBusyError, PieceMissingError: see there.
            PeerError: anything else went wrong.
            pieces.PieceStoreError: the disk refused.
        """

    async def fetch_next(
        self, url: str, *, timeout_seconds: float
    ) -> tuple[int, PieceData] | None:
        """A piece of the seed's choice with its bytes, or None when it has sent each once.

        Raises:
            PeerBusyError, PeerError, pieces.PieceStoreError: as for `fetch`.
        """

    async def follow(self, url: str, hear: Callable[[News], None]) -> None:
        """Call `hear` with what the peer says that it has: first all, then what is new or on its way.

        Not each piece: what it knows that this host has it does not tell. Returns when the peer ends it.

        Raises:
            PeerError: the peer is gone, or says what cannot be.
        """


class HttpPeerClient:
    """The real one. ``token`` gives the swarm's token as it stands: a long transfer outlives one."""

    def __init__(
        self,
        connections: Connections,
        *,
        store: PieceStore,
        blob_id: BlobId,
        token: Callable[[], str],
        host: str,
    ) -> None:
        self._connections = connections
        self._store = store
        self._path = f"/v1/blobs/{blob_id}"
        self._manifest = store.manifest
        self._token = token
        self._host = host

    def _headers(self) -> dict[str, str]:
        return {hdrs.AUTHORIZATION: f"Bearer {self._token()}", HOST_HEADER: self._host}

    async def fetch(self, url: str, piece: int, *, timeout_seconds: float) -> Landing:
        """See `PeerClient`."""
        span = self._manifest.span(piece)
        fields = {**self._headers(), hdrs.RANGE: f"bytes={span.start}-{span.stop - 1}"}
        try:
            async with self._connections.ask(
                url, self._path, fields, timeout_seconds=timeout_seconds
            ) as answer:
                if self._piece(answer.head) != piece:
                    raise PeerError("the peer sent another range than it was asked for")
                return await self._land(answer, piece)
        except ConnectionFailed as exc:
            raise PeerError(str(exc)) from exc

    async def fetch_next(self, url: str, *, timeout_seconds: float) -> tuple[int, Landing] | None:
        """See `PeerClient`."""
        try:
            async with self._connections.ask(
                url, self._next_path(), self._headers(), timeout_seconds=timeout_seconds
            ) as answer:
                if answer.head.status == 204:
                    return None
                piece = self._piece(answer.head)
                return piece, await self._land(answer, piece)
        except ConnectionFailed as exc:
            raise PeerError(str(exc)) from exc

    def _next_path(self) -> str:
        manifest = self._manifest
        growing = manifest.known < manifest.count
        return f"{self._path}/next" + (f"?below={manifest.known}" if growing else "")

    async def _land(self, answer: Answer, piece: int) -> Landing:
        landing = self._store.landing(piece)
        await answer.land(landing)
        return landing

    def _piece(self, head: Head) -> int:
        """The piece that an answer has."""
        _require_content(head)
        span = head.span
        if span is None or head.total_bytes not in (None, self._manifest.size_bytes):
            raise PeerError("no Content-Range, or of another blob")
        piece = span.start // self._manifest.piece_bytes
        if not 0 <= piece < self._manifest.known or span != self._manifest.span(piece):
            raise PeerError("the peer sent what is not a piece")
        if head.length_bytes != span.length:
            raise PeerError("another number of bytes than the range has")
        return piece

    async def follow(self, url: str, hear: Callable[[News], None]) -> None:
        """See `PeerClient`."""

        def take(line: bytes) -> None:
            if not line:
                return
            try:
                news = self._news(line)
            except (ValueError, RecursionError) as exc:
                raise PeerError(f"{type(exc).__name__}: {exc}") from exc
            hear(news)

        try:
            await self._connections.listen(
                url,
                f"{self._path}/pieces",
                self._headers(),
                take,
                longest_line_bytes=_LONGEST_LINE_BYTES + self._manifest.count // 4,
                quiet_seconds=3 * piece_maps.HEARTBEAT_SECONDS,
            )
        except ConnectionFailed as exc:
            raise PeerError(str(exc)) from exc

    def _news(self, line: bytes) -> News:
        said = json.loads(
            str(line, "utf-8")
        )  # from bytes, it would look for the encoding each time
        count = self._manifest.count
        match said:
            case {"have": str(text)}:
                return News(have=swarm.from_hex(text, count))
            case {"add": list(pieces)}:
                return News(have=_set(pieces, count))
            case {"coming": list(pieces)}:
                return News(coming=_set(pieces, count))
            case _:
                raise ValueError("not a line of a piece map")


def _set(pieces: list[object], count: int) -> int:
    found = [piece for piece in pieces if type(piece) is int and 0 <= piece < count]
    if len(found) != len(pieces) or len(found) > piece_maps.LINE_PIECES:
        raise ValueError("not pieces of this blob, or too many for a line")
    return swarm.bits(found)


def _require_content(head: Head) -> None:
    if head.status == 206:
        return
    if head.status == 404:
        raise PieceMissingError("absent")
    if head.status in (429, 503):
        after = head.retry_after_seconds
        raise PeerBusyError(1.0 if after is None else min(LONGEST_RETRY_SECONDS, after))
    raise PeerError(f"status {head.status}")
