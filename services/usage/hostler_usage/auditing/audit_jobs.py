"""The periodic check of audit periods in which somebody did not speak, and what audits leave unsaid."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from hostler_common import logs
from hostler_usage.auditing.audit_check_store import AuditCheckStore
from hostler_usage.auditing.audit_report_store import AuditFilter, AuditGroup, AuditReportStore
from hostler_usage.metrics import Metrics

log = logs.get(__name__)

_PERIODS = 20
_RESOURCES = 200
_ROUNDS = 50  # a turn is bounded: what is left is the next one's
_TYPES = 1000
# a day's last audits are sent in the hour after it and judged when they have settled: no false alarm at midnight
_SETTLED = timedelta(hours=2)
_DAY = timedelta(days=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditJobs:
    """The loops of audit reconciliation, each method one turn. May run in every replica at once."""

    store: AuditCheckStore
    reports: AuditReportStore
    metrics: Metrics

    async def check(self) -> None:
        """Every settled period was looked at, and every silence is told; or a later turn goes on.

        Raises:
            DatabaseUnavailable: what is left is checked in a later turn.
        """
        await self.check_at(datetime.now(UTC))

    async def check_at(self, now: datetime) -> None:
        """`check`, as of `now`.

        Raises:
            DatabaseUnavailable: what is left is checked in a later turn.
        """
        expected = await self.store.expect_periods(now)
        periods = resources = 0
        for _ in range(_ROUNDS):
            done = await self.store.check_periods(now, _PERIODS)
            periods += done
            if done < _PERIODS:
                break
        for _ in range(_ROUNDS):
            done = await self.store.check_resources(_RESOURCES)
            resources += done
            if done < _RESOURCES:
                break
        if periods or resources:
            log.info("audits_checked", expected=expected, periods=periods, resources=resources)

    async def measure(self) -> None:
        """The gauges show what share of each type's hours no audit bears out.

        Raises:
            DatabaseUnavailable: they show what they did.
        """
        await self.measure_at(datetime.now(UTC))

    async def measure_at(self, now: datetime) -> None:
        """`measure`, as of `now`.

        Raises:
            DatabaseUnavailable: they show what they did.
        """
        until = (now - _SETTLED).replace(hour=0, minute=0, second=0, microsecond=0)
        rows, _ = await self.reports.report(
            until - _DAY, until, [AuditGroup.RESOURCE_TYPE], AuditFilter(), limit=_TYPES
        )
        self.metrics.unverified_share.clear()  # a type that nothing was held of has no share
        for row in rows:
            if row.held_us:
                share = self.metrics.unverified_share.labels(row.group[AuditGroup.RESOURCE_TYPE])
                share.set(row.unverified_us / row.held_us)
