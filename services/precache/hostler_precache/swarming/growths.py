"""What hosts are told of images that are still being fetched: read once for all who ask.

Every replica answers, from the database, whichever one fetches. Who has been told all that there is
waits a moment for more; the larger the swarm, the longer each host then pauses, so that thousands
of hosts ask no more often than a few hundred a second.
"""

import asyncio
import time
from dataclasses import dataclass, replace
from typing import Final
from uuid import UUID

from hostler_precache.distribution.distributions import Growth
from hostler_precache.store import BlobNotFound, Store
from hostler_precache.transfer.manifest import DIGEST_BYTES, MAX_PIECES

READ_SECONDS: Final = 0.1
WAIT_SECONDS: Final = 2.0
# of a blob that is complete, nothing changes but that it may be given up
CLOSED_SECONDS: Final = 10.0
UNASKED_SECONDS: Final = 60.0
ANSWERS_PER_SECOND: Final = 200


@dataclass(slots=True)
class _Known:
    """The growth of one blob from its first piece on, and when it was read and asked for."""

    lock: asyncio.Lock
    growth: Growth | None = None
    read_at: float = 0.0
    asked_at: float = 0.0


def pause_seconds(members: int) -> float:
    """How long a host of so many waits before it asks again."""
    return members / ANSWERS_PER_SECOND


class Growths:
    """The growths that hosts ask this replica for."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[UUID, _Known] = {}

    async def ask(self, blob_id: UUID, *, after: int, most: int = MAX_PIECES) -> Growth:
        """What there is to know of the blob's pieces from number `after` on, as soon as there is any.

        Of `most` pieces, and the root with the last of all. Nothing, and no root, when nothing has come
        for a while.

        Raises:
            BlobNotFound: the blob is not served, or not any more: what hosts have of it is nothing.
        """
        until = time.monotonic() + WAIT_SECONDS
        while True:
            growth = await self._current(blob_id)
            new = growth.digests[after * DIGEST_BYTES : (after + most) * DIGEST_BYTES]
            if new or growth.root is not None or time.monotonic() >= until:
                is_all = (after + most) * DIGEST_BYTES >= len(growth.digests)
                root = growth.root if is_all else None
                return replace(growth, first_piece=after, digests=new, root=root)
            await asyncio.sleep(READ_SECONDS)

    async def _current(self, blob_id: UUID) -> Growth:
        now = time.monotonic()
        for other, one in list(self._known.items()):
            if now - one.asked_at > UNASKED_SECONDS and other != blob_id:
                del self._known[other]
        known = self._known.setdefault(blob_id, _Known(asyncio.Lock()))
        known.asked_at = now
        async with known.lock:  # a thousand hosts ask at once, and one query answers them
            growth = known.growth
            age = time.monotonic() - known.read_at
            is_closed = growth is not None and growth.root is not None
            if growth is None or age >= (CLOSED_SECONDS if is_closed else READ_SECONDS):
                try:
                    growth = known.growth = await self._read(blob_id, growth)
                except BlobNotFound:
                    self._known.pop(blob_id, None)
                    raise
                known.read_at = time.monotonic()
        return growth

    async def _read(self, blob_id: UUID, before: Growth | None) -> Growth:
        told = before.digests if before is not None else b""
        new = await self._store.growth(blob_id, after=len(told) // DIGEST_BYTES)
        return replace(new, first_piece=0, digests=told + new.digests)
