"""What may move in the whole cluster, and what of it each host may have now.

Read from the database by every replica for itself, every `CURRENT_SECONDS` while somebody asks, and when distributions
have begun or changed: so all come to the same shares, a moment apart. Hosts are told with their next report. Where
that takes long, because tens of thousands of hosts move or the database is busy, it is read less often.
"""

import asyncio
import math
import time
from collections.abc import Iterable
from typing import Final

from hostler_precache.distribution import shares
from hostler_precache.distribution.distributions import DistributionId
from hostler_precache.distribution.shares import Shares
from hostler_precache.swarming.swarm_store import SwarmStore

CURRENT_SECONDS: Final = 1.0
MOST_OF_THE_TIME: Final = 1 / 20  # that goes into reading
# of one that is not known yet: a thousand hosts ask about it at once
UNKNOWN_SECONDS: Final = 0.1


class Budget:
    """The shares in memory, beside the database."""

    def __init__(
        self, swarms: SwarmStore, *, bytes_per_second: int | None, member_seconds: float
    ) -> None:
        """Nothing is known yet.

        Args:
            swarms: where it is read who moves.
            bytes_per_second: what all hosts together may fetch; None where that has no limit.
            member_seconds: a host that was not heard of for so long gets nothing.
        """
        self._store = swarms
        self._bytes_per_second = bytes_per_second
        self._member_seconds = member_seconds
        self._shares: Shares | None = None
        self._read_at = -math.inf
        self._lasts_seconds = CURRENT_SECONDS
        # asked for, and not among those that move: paused ones, and those whose hosts are busy with others
        self._still: set[DistributionId] = set()
        self._lock = asyncio.Lock()

    async def shares(self, distribution_ids: Iterable[DistributionId]) -> Shares | None:
        """The shares as they are now, those of these distributions among them if they have any; None without a limit.

        Raises:
            DatabaseUnavailable: nobody knows.
        """
        amount = self._bytes_per_second
        if amount is None:
            return None
        wanted = list(distribution_ids)
        current = self._current(wanted)
        if current is None:
            async with self._lock:
                current = self._current(wanted)
                if current is None:
                    began = time.monotonic()
                    if began - self._read_at > self._lasts_seconds:
                        self._still.clear()
                    self._read_at = began  # before: what begins meanwhile is not in it
                    moving = await self._store.receivers(within_seconds=self._member_seconds)
                    current = self._shares = shares.share(amount, moving)
                    self._still.update(wanted)
                    took = time.monotonic() - began
                    self._lasts_seconds = max(CURRENT_SECONDS, took / MOST_OF_THE_TIME)
        return current

    def forget(self) -> None:
        """Distributions have changed: they are read again when somebody asks."""
        self._read_at = -math.inf

    def _current(self, wanted: Iterable[DistributionId]) -> Shares | None:
        known, age = self._shares, time.monotonic() - self._read_at
        if known is None or age > self._lasts_seconds:
            return None
        is_new = any(
            one not in known.hosts_bytes_per_second and one not in self._still for one in wanted
        )
        least = UNKNOWN_SECONDS * self._lasts_seconds / CURRENT_SECONDS
        return None if is_new and age > least else known
