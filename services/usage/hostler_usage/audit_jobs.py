"""The periodic check of audit periods in which somebody did not speak."""

from dataclasses import dataclass
from datetime import UTC, datetime

from hostler_common import logs
from hostler_usage.audit_check_store import AuditCheckStore

log = logs.get(__name__)

_PERIODS = 20
_RESOURCES = 200
_ROUNDS = 50  # a turn is bounded: what is left is the next one's


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditJobs:
    """The loop of audit reconciliation, its method one turn. May run in every replica at once."""

    store: AuditCheckStore

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
