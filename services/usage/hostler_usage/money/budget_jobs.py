"""Periodic work on budgets: what they have reached is noticed and told.

May run in every replica at once: a crossing is recorded by whoever comes first, with its event.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final

from hostler_common import db, logs
from hostler_usage.money import budget as budgets
from hostler_usage.money import costing
from hostler_usage.money.budget import Budget
from hostler_usage.money.budget_messages import crossing_message
from hostler_usage.money.budget_standing import Reckoned, crossings, reckoned
from hostler_usage.money.costing import Costing, Wanted
from hostler_usage.money.price_store import Crossing

log = logs.get(__name__)

SETTLING: Final = timedelta(days=3)
"""For how long a period that is over is still looked at: messages about it come late."""
_PAGE: Final = 500
_ONCE: Final = "usage.budgets"


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetJobs:
    """The loop of the service that concerns budgets."""

    costing: Costing
    # budgets, in a period each, of which it is said already that they cannot be reckoned
    _unknown: set[tuple[str, datetime]] = field(default_factory=set, repr=False)

    async def notice(self) -> None:
        """Every threshold that a budget has reached is recorded, and its event on its way, once.

        What it had reached before it was changed, and has not now, is forgotten.

        Raises:
            DatabaseUnavailable: the rest is noticed in a later turn.
        """
        async with db.singleton(self.costing.prices.pool, _ONCE) as is_ours:
            if is_ours:  # else another replica is at it
                await self._notice(datetime.now(UTC))

    async def _notice(self, now: datetime) -> None:
        marker = None
        while True:
            rows, marker = await self.costing.prices.budgets(
                scope=None, limit=_PAGE, marker=marker
            )
            wanted = [
                item
                for row in rows
                for item in _current(budgets.budget(row.name, row.document), row.updated_at, now)
            ]
            changed_at = {row.name: row.updated_at for row in rows}
            told = await crossings(self.costing, wanted)
            for one in await reckoned(self.costing, wanted):
                if one.state is None:
                    self._note_unknown(one)
                    continue
                name, start = one.wanted.budget.name, one.wanted.period.start
                self._unknown.discard((name, start))
                known = told[name, start]
                thresholds = {crossing.threshold for crossing in known}
                for percent in one.state.crossed:
                    if percent not in thresholds:
                        await self._tell(one.wanted, one.state, percent, now)
                for crossing in known:
                    # of the budget as it was before: it may be reached once more, and is news then
                    if (
                        crossing.threshold not in one.state.crossed
                        and crossing.crossed_at < changed_at[name]
                    ):
                        await self.costing.prices.forget_crossing(crossing)
            if marker is None:
                return

    def _note_unknown(self, one: Reckoned) -> None:
        name = one.wanted.budget.name
        key = (name, one.wanted.period.start)
        if key not in self._unknown:
            log.warning("budget_not_reckoned", budget=name, reason=one.problem)
        self._unknown.add(key)

    async def _tell(self, item: Wanted, state: budgets.State, percent: int, now: datetime) -> None:
        of = item.budget
        unit = await self.costing.unit(of)
        crossing = Crossing(
            budget=of.name,
            period_start=state.period.start,
            period_end=state.period.end,
            threshold=percent,
            crossed_at=now,
            consumed=costing.shown(state.consumed, of, unit),
            limit=costing.shown(state.limit, of, unit),
        )
        message = crossing_message(
            crossing, of.subject, unit=unit, forecast=costing.shown(state.forecast, of, unit)
        )
        if await self.costing.prices.record_crossing(crossing, message):
            log.info(
                "budget_threshold_crossed",
                budget=of.name,
                threshold_percent=percent,
                period_start=state.period.start.isoformat(),
            )


def _current(of: Budget, since: datetime, now: datetime) -> Iterator[Wanted]:
    """The budget in the period at hand, and in those that settle and ended after `since`."""
    period = of.period(now - SETTLING) or of.period(now)
    while period is not None and period.start <= now:
        if period.end > since:
            yield Wanted(budget=of, period=period, as_of=min(now, period.end))
        period = None if of.fixed is not None else of.period(period.end)
