"""The turn that drops messages older than they are kept."""

from dataclasses import dataclass
from datetime import UTC, datetime

from prometheus_client import Counter

from hostler_common import logs
from hostler_usage.feeds.feed_store import FeedStore
from hostler_usage.history.retention import expired
from hostler_usage.history.retention_store import RetentionStore

log = logs.get(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionJobs:
    """The loop of retention, its method one turn. May run in every replica at once.

    `dropped_months` and `dropped_messages` count what this process dropped.
    """

    store: RetentionStore
    feeds: FeedStore
    retention_months: int
    dropped_months: Counter
    dropped_messages: Counter

    async def drop(self) -> None:
        """No whole month is left that ended `retention_months` ago, unless another process is at it.

        Raises:
            DatabaseUnavailable: what is left is dropped in a later turn.
        """
        await self.drop_at(datetime.now(UTC))

    async def drop_at(self, now: datetime) -> None:
        """`drop`, as of `now`.

        Raises:
            DatabaseUnavailable: what is left is dropped in a later turn.
        """
        for month in expired(await self.store.partitions(), now, self.retention_months):
            dropped = await self.store.drop(month)
            if dropped is None:
                return
            await self.feeds.forget(month.end)
            await self.store.forget_conflicts(month.end)
            self.dropped_months.inc()
            self.dropped_messages.inc(dropped.messages)
            log.info(
                "month_dropped",
                month=f"{month.start:%Y-%m}",
                messages=dropped.messages,
                statements_kept=dropped.statements,
            )
