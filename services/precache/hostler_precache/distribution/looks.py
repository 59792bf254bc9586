"""Looks at a distribution: its hosts are read once for all who watch it.

To read thousands of hosts takes a tenth of a second. So between two looks is nine times what one takes,
however many pages are open, and each tells only what has changed since the one before.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final
from uuid import UUID

from hostler_common import errors
from hostler_precache.distribution import estimate
from hostler_precache.distribution.distribution_store import HOSTS_AT_ONCE, DistributionStore
from hostler_precache.distribution.distributions import Distribution, HostProgress
from hostler_precache.distribution.estimate import Estimate

LOOK_SECONDS: Final = 0.5
IDLE_OVER_BUSY: Final = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """A distribution at one moment, and those of its hosts that have changed since the look before.

    `texts` is where whoever first tells of those puts what all others tell, too.
    """

    number: int
    record: Distribution
    estimate: Estimate | None
    hosts: Sequence[HostProgress]
    changed: Sequence[HostProgress]
    texts: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Watched:
    """A distribution that somebody watches; `known` are its hosts at the last look."""

    watchers: int = 0
    look: Look | None = None
    due_at: float = 0.0
    known: dict[str, HostProgress] = field(default_factory=dict)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Looks:
    """The distributions that somebody watches at this replica."""

    def __init__(
        self,
        distributions: DistributionStore,
        *,
        seed_bytes_per_second: int,
        cluster_bytes_per_second: int | None = None,
    ) -> None:
        self._distributions = distributions
        self._seed_bytes_per_second = seed_bytes_per_second
        self._cluster_bytes_per_second = cluster_bytes_per_second
        self._watched: dict[UUID, _Watched] = {}

    async def watch(
        self, distribution_id: UUID
    ) -> AsyncGenerator[tuple[Look, Sequence[HostProgress]], None]:
        """Look after look, each with the hosts that this watcher does not know as they are: at first all.

        Raises:
            DistributionNotFound: there is none any more.
        """
        watched = self._watched.setdefault(distribution_id, _Watched())
        watched.watchers += 1
        seen = 0
        try:
            while True:
                look = await self._after(seen, distribution_id, watched)
                is_next = seen > 0 and look.number == seen + 1
                seen = look.number
                yield look, look.changed if is_next else look.hosts
        finally:
            watched.watchers -= 1
            if not watched.watchers:
                del self._watched[distribution_id]

    async def _after(self, seen: int, distribution_id: UUID, watched: _Watched) -> Look:
        """A look that is not the one that was seen."""
        while True:
            look = watched.look
            if look is not None and look.number != seen:
                return look
            wait_seconds = watched.due_at - time.monotonic()
            if wait_seconds > 0:
                await asyncio.sleep(wait_seconds)
                continue
            async with watched.lock:
                if watched.look is look:  # else another watcher has looked meanwhile
                    await self._look(distribution_id, watched)

    async def _look(self, distribution_id: UUID, watched: _Watched) -> None:
        began = time.monotonic()
        try:
            record = await self._distributions.distribution(distribution_id)
            hosts = await self._distributions.progress(distribution_id)
        except errors.Unavailable:  # it goes on when the database is back
            watched.due_at = time.monotonic() + LOOK_SECONDS
            return
        changed: list[HostProgress] = []
        for start in range(0, len(hosts), HOSTS_AT_ONCE):
            await asyncio.sleep(0)
            part = hosts[start : start + HOSTS_AT_ONCE]
            changed += [host for host in part if watched.known.get(host.host) != host]
        watched.known |= {host.host: host for host in changed}
        watched.look = Look(
            number=1 if watched.look is None else watched.look.number + 1,
            record=record,
            estimate=estimate.estimate(
                record,
                hosts,
                seed_bytes_per_second=self._seed_bytes_per_second,
                cluster_bytes_per_second=self._cluster_bytes_per_second,
                now=datetime.now(UTC),
            ),
            hosts=hosts,
            changed=changed,
        )
        ended = time.monotonic()
        watched.due_at = ended + max(LOOK_SECONDS, IDLE_OVER_BUSY * (ended - began))
