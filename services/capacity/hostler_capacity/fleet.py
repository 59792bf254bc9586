"""The fleet this process reads from: a copy of the counters in memory, refreshed from the database.

Every process has its own; nothing is told to it, it asks for what changed. An answer from it says
how old it is (`as_of`, by the database's clock).
"""

import asyncio
import time

from hostler_capacity import fit, overhead, store
from hostler_capacity.metrics import Metrics
from hostler_common import db


class FleetView:
    """The newest fleet that was read. Readers take `fleet` once and use that."""

    def __init__(
        self,
        pool: db.Pool,
        *,
        catalogue: overhead.Catalogue,
        stale_seconds: float,
        metrics: Metrics,
    ) -> None:
        self._pool = pool
        self._catalogue = catalogue
        self._metrics = metrics
        self._snapshot = store.BEGINNING
        self._refreshing = asyncio.Lock()
        self._began_at = float("-inf")
        self._clock_offset = 0.0
        self.fleet = fit.build((), catalogue=catalogue, as_of=0.0, stale_seconds=stale_seconds)

    def now(self) -> float:
        """Return what the database's clock says now, as far as the last refresh can tell."""
        return time.monotonic() + self._clock_offset

    async def require(self, max_age_seconds: float | None) -> None:
        """`fleet` is at most that old, or as it was where None is given.

        Raises:
            DatabaseUnavailable: it would have had to be read, and cannot be.
        """
        if max_age_seconds is not None and self.now() - self.fleet.as_of >= max_age_seconds:
            await self.refresh()

    async def refresh(self) -> None:
        """`fleet` shows at least everything that was committed when this was called.

        Calls that wait for each other share one read.

        Raises:
            DatabaseUnavailable: the fleet stays as it was.
        """
        asked_at = time.monotonic()
        async with self._refreshing:
            if self._began_at >= asked_at:
                return
            began_at = time.monotonic()
            async with db.connection(self._pool) as connection:
                changes = await store.changes(connection, self._snapshot)
            self.fleet = self.fleet.updated(
                changes.nodes, changes.gone, catalogue=self._catalogue, as_of=changes.as_of
            )
            self._snapshot = changes.snapshot
            self._began_at = began_at
            self._clock_offset = changes.as_of - began_at
            self._metrics.show(self.fleet, self.now())
