"""What has been over for long is dropped, in transactions so small that nobody waits for them."""

from collections.abc import Callable, Sequence
from typing import Final

from hostler_common import db, logs
from hostler_precache.distribution import endings
from hostler_precache.distribution.distribution_store import DistributionStore
from hostler_precache.distribution.distributions import DistributionId
from hostler_precache.distribution.history_store import HistoryStore
from hostler_precache.store import Store
from hostler_precache.swarming.swarm_store import SwarmStore

log = logs.get(__name__)

EVERY_SECONDS: Final = 300.0
BATCHES_AT_ONCE: Final = 100


class History:
    """The periodic work on what is over; call `forget` every few minutes."""

    def __init__(
        self,
        history: HistoryStore,
        *,
        store: Store,
        distributions: DistributionStore,
        swarms: SwarmStore,
        on_done: Callable[[Sequence[DistributionId]], None],
        days: int,
    ) -> None:
        """Drop what has been over for `days`; `on_done` is told of what waited for gone hosts only."""
        self._history = history
        self._store = store
        self._distributions = distributions
        self._swarms = swarms
        self._on_done = on_done
        self._days = days

    async def forget(self) -> None:
        """What has been over for so many days is gone, or a bounded part of it; the next turn goes on."""
        distributions = blobs = hosts = 0
        for _ in range(BATCHES_AT_ONCE):
            dropped = await self._history.forget_distributions(days=self._days)
            if dropped is None:
                break
            distributions += dropped
        for _ in range(BATCHES_AT_ONCE):
            dropped = await self._history.forget_blobs(days=self._days)
            if not dropped:
                break
            blobs += dropped
        for _ in range(BATCHES_AT_ONCE):
            dropped = await self._forget_hosts()
            if not dropped:
                break
            hosts += dropped
        if distributions or blobs or hosts:
            log.info(
                "history_forgotten",
                distributions=distributions,
                blobs_and_images=blobs,
                hosts=hosts,
            )

    async def _forget_hosts(self) -> int:
        async with db.transaction(self._history.pool) as connection:
            gone, left = await self._history.forget_hosts(connection, days=self._days)
            # what waited for them only is done
            finished = await self._swarms.settle(connection, left)
            events = await endings.events_of(
                connection, self._distributions, ended=[], finished=finished
            )
            await self._store.announce(connection, events)
        self._on_done(finished)
        return len(gone)
