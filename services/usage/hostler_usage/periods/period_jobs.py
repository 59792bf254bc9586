"""The periodic care of periods: months are made, late news is written down, what has settled is closed."""

from dataclasses import dataclass, field
from datetime import UTC, datetime

from hostler_common import idempotency, logs
from hostler_usage.periods.period import Obstacle
from hostler_usage.periods.period_store import PeriodStore

log = logs.get(__name__)

_CHANGES = 1000
_ROUNDS = 50  # a turn is bounded: what is left is the next one's


@dataclass(frozen=True, slots=True, kw_only=True)
class PeriodJobs:
    """The loops of periods, each method one turn. May run in every replica at once."""

    store: PeriodStore
    # what keeps a period open, as it was said last: it is not said every minute
    _kept: dict[str, list[Obstacle]] = field(default_factory=dict, repr=False)

    async def turn(self) -> None:
        """The present month is a period, what folds noted is adjusted, what has settled is closed.

        Raises:
            DatabaseUnavailable: what is left is done in a later turn.
        """
        await self.turn_at(datetime.now(UTC))

    async def turn_at(self, now: datetime) -> None:
        """`turn`, as of `now`.

        Raises:
            DatabaseUnavailable: what is left is done in a later turn.
        """
        made = await self.store.make(now)
        if made:
            log.info("periods_made", periods=made)
        changes = adjustments = 0
        for _ in range(_ROUNDS):
            done, became = await self.store.adjust(_CHANGES)
            changes, adjustments = changes + done, adjustments + became
            if done < _CHANGES:
                break
        if changes:
            log.info("periods_adjusted", changes=changes, adjustments=adjustments)
        closed, kept = await self.store.close_due(now)
        for name in closed:
            log.info("period_closed", period=name)
            self._kept.pop(name, None)
        for name, blockers in kept.items():
            obstacles = [item.obstacle for item in blockers]
            if self._kept.get(name) != obstacles:
                log.warning(
                    "period_kept_open", period=name, blockers=[item.detail for item in blockers]
                )
            self._kept[name] = obstacles

    async def forget_keys(self) -> None:
        """Idempotency keys that nobody will send again are gone.

        Raises:
            DatabaseUnavailable: they are forgotten in a later turn.
        """
        await idempotency.forget_old(self.store.pool)
