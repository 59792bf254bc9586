"""Periodic work: make touched histories anew, keep partitions ahead of time, measure the lag.

Each may run in every replica at once: the fold takes rows nobody else holds, a partition is made
by whoever comes first.
"""

from dataclasses import dataclass
from datetime import UTC, datetime

from hostler_common import logs
from hostler_usage.history.fold_store import FoldStore
from hostler_usage.history.pace import Pace
from hostler_usage.history.report_store import ReportStore
from hostler_usage.history.rollup_store import RollupStore
from hostler_usage.metrics import Metrics
from hostler_usage.store import Store

log = logs.get(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Jobs:
    """The loops of the service, each method one turn."""

    store: Store
    folds: FoldStore
    rollups: RollupStore
    reports: ReportStore
    metrics: Metrics
    pace: Pace
    fold_limit: int
    months_ahead: int

    async def fold(self) -> None:
        """No resource that was touched before this turn is left unfolded, unless a backlog is read.

        Raises:
            DatabaseUnavailable: what is left is folded in a later turn.
        """
        waiting = 0
        while self.pace.may_fold():
            with self.pace.fold():
                waiting = waiting or await self.folds.gather(self.fold_limit)
                folded = await self.folds.fold_some(self.fold_limit) if waiting else 0
            if not folded:
                return  # nothing waits, or another process has it in hand
            self.metrics.folded.inc(folded)
            waiting = max(0, waiting - folded)

    async def sum_days(self) -> None:
        """Every day that has ended is summed up.

        Raises:
            DatabaseUnavailable: the rest is done in a later turn.
        """
        done = await self.rollups.advance(datetime.now(UTC))
        if done:
            log.info("days_summed", days=done)

    async def make_partitions(self) -> None:
        """The partitions of last month, this month and the months ahead exist.

        Raises:
            DatabaseUnavailable: they are made in a later turn; until then events go
                to the default partition, whose rows move when theirs is made.
        """
        made = await self.store.make_partitions(months(datetime.now(UTC), self.months_ahead))
        if made:
            log.info("partitions_made", months=made)

    async def measure(self) -> None:
        """The gauges show how far behind the fold is.

        Raises:
            DatabaseUnavailable: they show what they did.
        """
        overview = await self.reports.overview()
        self.metrics.dirty.set(overview.dirty)
        self.metrics.fold_lag_seconds.set(overview.oldest_dirty_seconds)
        self.metrics.unpartitioned.set(overview.unpartitioned)


def months(now: datetime, ahead: int) -> list[datetime]:
    """The first moments of the month before `now`, of its own, and of those `ahead`."""
    first = now.year * 12 + now.month - 1
    return [
        datetime(number // 12, number % 12 + 1, 1, tzinfo=UTC)
        for number in range(first - 1, first + ahead + 1)
    ]
