"""The rest of a manifest that still grows, asked of precache until its root closes it.

Of an image that is all there, the first pieces come first, and the others when the transfer has begun:
they would keep a slow link busy, with all hosts asking at once, before anybody could ask for a piece.

Precache may be away meanwhile: what is known stays good, and it is asked again. When it says that
there is no such blob any more, its source failed, or sends other bytes by now.
"""

import asyncio
import base64
import binascii
import random
from collections.abc import Callable
from typing import Final

from hostler_common import client, errors, logs
from hostler_precache import protocol
from hostler_precache.transfer import manifest
from hostler_precache.transfer.manifest import GrowingManifest, Manifest, ManifestError, PieceList

log = logs.get(__name__)

# a moment for what else comes, also where the swarm is small
MIN_PAUSE_SECONDS: Final = 0.1
AWAY_SECONDS: Final = 2.0
FIRST_PIECES: Final = 128
BLOB_NOT_FOUND: Final = "precache.blob.not_found"


class GivenUp(Exception):
    """The blob will never be complete: what is here of it is nothing. The text says why."""


class Following:
    """One manifest as it grows: `begin`, then `until_closed`."""

    def __init__(
        self, api: client.Api, image: protocol.DesiredImage, *, rng: random.Random
    ) -> None:
        self._api = api
        self._image = image
        self._rng = rng
        self._growing: GrowingManifest | None = None
        self._closed: Manifest | None = None
        self._pause_seconds = 0.0

    async def begin(self) -> PieceList:
        """What is known so far; a `Manifest` if that is all.

        Raises:
            GivenUp: see there.
        """
        await self._ask()
        assert self._growing is not None
        return self._closed or self._growing

    async def until_closed(self, on_growth: Callable[[], None] = lambda: None) -> Manifest:
        """The manifest, once it is closed by the root of all that was told.

        Args:
            on_growth: called each time when more is known.

        Raises:
            GivenUp: see there.
        """
        is_more_there = self._image.root is not None
        while self._closed is None:
            if not is_more_there:
                pause = max(MIN_PAUSE_SECONDS, self._pause_seconds)
                await asyncio.sleep(pause * self._rng.uniform(0.5, 1.5))
            has_grown = await self._ask()
            if has_grown:
                on_growth()
            is_more_there = has_grown and self._image.root is not None
        return self._closed

    async def _ask(self) -> bool:
        """Whether more is known than before."""
        known = self._growing.known if self._growing is not None else 0
        begins = self._growing is None and self._image.root is not None
        most = {"most": FIRST_PIECES} if begins else {}
        path = f"/v1/blobs/{self._image.blob_id}/growth"
        is_away = False
        while True:
            try:
                said = await self._api.get(path, after=known, **most)
                self._take(protocol.Growth.model_validate(said))
            except ManifestError as exc:
                raise GivenUp(f"manifest.invalid: {exc}") from exc
            except errors.NotFound as exc:
                if exc.code == BLOB_NOT_FOUND:
                    raise GivenUp(f"blob.given_up: {exc.detail}") from exc
                reason = str(exc)
            except (errors.HostlerError, ValueError) as exc:
                reason = str(exc)
            else:
                assert self._growing is not None
                return self._growing.known > known
            if not is_away:  # the swarm goes on with what is known
                log.warning("growth_unknown", blob_id=self._image.blob_id, reason=reason)
            is_away = True
            await asyncio.sleep(AWAY_SECONDS * self._rng.uniform(0.5, 1.5))

    def _take(self, told: protocol.Growth) -> None:
        if self._growing is None:
            if told.size_bytes != self._image.size_bytes:
                raise ManifestError("another size")
            self._growing = GrowingManifest(
                manifest.BlobId(self._image.blob_id),
                size_bytes=told.size_bytes,
                piece_bytes=told.piece_bytes,
                root=bytes.fromhex(self._image.root) if self._image.root is not None else None,
            )
        growing = self._growing
        if (told.size_bytes, told.piece_bytes) != (growing.size_bytes, growing.piece_bytes):
            raise ManifestError("another size")
        try:
            digests = base64.b64decode(told.digests, validate=True)
        except binascii.Error as exc:
            raise ManifestError("digests are not base64") from exc
        growing.grow(told.first_piece, digests)
        self._pause_seconds = told.pause_seconds
        if told.root is not None:
            self._closed = growing.closed(bytes.fromhex(self._image.root or told.root))
