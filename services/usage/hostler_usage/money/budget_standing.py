"""Where budgets stand now: how far each is used up, what it has reached, or why that is not known."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from fractions import Fraction

from hostler_usage.money import budget as budgets
from hostler_usage.money import costing
from hostler_usage.money.budget import Budget, State
from hostler_usage.money.costing import Costing, Wanted
from hostler_usage.money.price_store import Crossing, StoredBudget


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A budget, and where it stands in the period that is now, or in its only one.

    `state` is None before a fixed period begins, and where `problem` says why it is not known.
    `unit` is a currency or a measure, empty where there is no state; `crossings` are the period's.
    """

    stored: StoredBudget
    budget: Budget
    unit: str = ""
    state: State | None = None
    problem: str | None = None
    crossings: Sequence[Crossing] = ()

    @property
    def consumed_percent(self) -> Fraction | None:
        """How much of its limit is consumed; None of a limit of nothing."""
        if self.state is None or not self.state.limit:
            return None
        return 100 * self.state.consumed / self.state.limit

    def shown(self, amount: Fraction) -> str:
        """An amount of the budget as it is shown."""
        return costing.shown(amount, self.budget, self.unit)


async def standings(store: Costing, rows: Sequence[StoredBudget], now: datetime) -> list[Standing]:
    """Where each of the budgets stands at `now`, in their order.

    Raises:
        PriceBookNotFound: the book that a budget counts by is gone.
        DatabaseUnavailable: the database is away.
    """
    measures = store.metered.measures
    reached = await store.prices.crossings([row.name for row in rows])
    found = {row.name: budgets.budget(row.name, row.document) for row in rows}
    wanted: dict[str, Wanted] = {}
    problems: dict[str, str] = {}
    for name, of in found.items():
        period = of.period(now) or of.fixed
        assert period is not None
        if of.limit.measure is not None and of.limit.measure not in measures:
            problems[name] = f"{of.limit.measure} is no longer a configured measure"
        elif period.start <= now:
            wanted[name] = Wanted(budget=of, period=period, as_of=min(now, period.end))
    states = dict(zip(wanted, await store.states(list(wanted.values())), strict=True))
    return [
        Standing(
            stored=row,
            budget=found[row.name],
            unit=await store.unit(found[row.name]) if row.name in states else "",
            state=states.get(row.name),
            problem=problems.get(row.name),
            crossings=[
                one
                for one in reached
                if row.name in states
                and (one.budget, one.period_start) == (row.name, states[row.name].period.start)
            ],
        )
        for row in rows
    ]
