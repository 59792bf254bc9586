"""How far from the bound distributions were when their last host had ended, as a metric.

Measured a little later than it happens: of thousands of hosts it takes a moment, and those who report
are not to wait for it. Counted by the replica that saw the last host end; again, where another host
comes later and ends.
"""

import asyncio
from collections.abc import Iterable
from datetime import UTC, datetime

from prometheus_client import Histogram

from hostler_precache.distribution import estimate
from hostler_precache.distribution.distribution_store import (
    DistributionNotFound,
    DistributionStore,
)
from hostler_precache.distribution.distributions import DistributionId


class Efficiency:
    """The distributions that are done and not counted yet; call `turn` now and then."""

    def __init__(
        self,
        distributions: DistributionStore,
        *,
        seed_bytes_per_second: int,
        cluster_bytes_per_second: int | None = None,
        over_bound: Histogram,
    ) -> None:
        self._distributions = distributions
        self._seed_bytes_per_second = seed_bytes_per_second
        self._cluster_bytes_per_second = cluster_bytes_per_second
        self._over_bound = over_bound
        self._done: set[DistributionId] = set()

    def done(self, distribution_ids: Iterable[DistributionId]) -> None:
        """Every host of these has an outcome."""
        self._done.update(distribution_ids)

    async def turn(self) -> None:
        """Those that are done are counted.

        Raises:
            DatabaseUnavailable: those that are left are counted by the next turn.
        """
        for distribution_id in list(self._done):
            try:
                record = await self._distributions.distribution(distribution_id)
                hosts = await self._distributions.progress(distribution_id)
            except DistributionNotFound:  # its policy is gone, and so is it
                self._done.discard(distribution_id)
                continue
            # in parts, not in a thread, as on the page of the distribution
            await asyncio.sleep(0)
            found = estimate.estimate(
                record,
                hosts,
                seed_bytes_per_second=self._seed_bytes_per_second,
                cluster_bytes_per_second=self._cluster_bytes_per_second,
                now=datetime.now(UTC),
            )
            self._done.discard(distribution_id)
            if found is not None and found.over_bound is not None:
                self._over_bound.observe(found.over_bound)
