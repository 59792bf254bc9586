"""Where budgets stand: how far each is used up, what it has reached, or why that is not known.

A budget that cannot be reckoned - its measure is metered no longer, its book cuts its period into
more pieces than are asked for at once or goes by what usage does not tell any more - says so itself,
and stands in no other's way.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from fractions import Fraction
from typing import Final

from hostler_usage.history.report_store import GroupUnknown
from hostler_usage.money import budget as budgets
from hostler_usage.money import costing
from hostler_usage.money.budget import Budget, Period, State
from hostler_usage.money.costing import Costing, Wanted, WindowRefused
from hostler_usage.money.price_store import Crossing, StoredBudget

_MENDED: Final = "give it a shorter period, or a price book with longer ones"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Reckoned:
    """How far a budget is used up in a period, or `problem` says why that is not known."""

    wanted: Wanted
    state: State | None = None
    problem: str | None = None


async def reckoned(store: Costing, wanted: Sequence[Wanted]) -> list[Reckoned]:
    """How far each of the budgets is used up, in the order given.

    Raises:
        PriceBookNotFound: the book that a budget counts by is gone.
        DatabaseUnavailable: the database is away.
    """
    known = store.metered.measures
    problems = {
        id(item): f"{measure} is no longer a configured measure"
        for item in wanted
        for measure in (item.budget.limit.measure,)
        if measure is not None and measure not in known
    }
    # those that are read together anyway: what is wrong with some is no reason to read the rest one by one
    alike: dict[tuple[str | None, Period, datetime], list[Wanted]] = defaultdict(list)
    for item in wanted:
        if id(item) not in problems:
            alike[item.budget.limit.price_book, item.period, item.as_of].append(item)
    states: dict[int, State] = {}
    for items in alike.values():
        try:
            found = await store.states(items)
            states |= {id(item): state for item, state in zip(items, found, strict=True)}
        except (WindowRefused, GroupUnknown):
            for item in items:
                try:
                    (states[id(item)],) = await store.states([item])
                except WindowRefused as exc:
                    problems[id(item)] = f"{exc.detail}; {_MENDED}"
                except GroupUnknown as exc:
                    problems[id(item)] = unknown_group(item.budget, exc)
    return [
        Reckoned(wanted=item, state=states.get(id(item)), problem=problems.get(id(item)))
        for item in wanted
    ]


def unknown_group(of: Budget, error: GroupUnknown) -> str:
    """Why a budget is not known whose price book goes by what usage is told apart by no longer."""
    return f"price book {of.limit.price_book}: {error.detail}"


async def crossings(
    store: Costing, wanted: Sequence[Wanted]
) -> Mapping[tuple[str, datetime], Sequence[Crossing]]:
    """What each of the budgets has reached, by its name and its period's start; empty where that is nothing.

    Raises:
        DatabaseUnavailable: the database is away.
    """
    found: dict[tuple[str, datetime], list[Crossing]] = {
        (item.budget.name, item.period.start): [] for item in wanted
    }
    for one in await store.prices.crossings(found):
        found[one.budget, one.period_start].append(one)
    return found


async def standings(store: Costing, rows: Sequence[StoredBudget], now: datetime) -> list[Standing]:
    """Where each of the budgets stands at `now`, in their order.

    Raises:
        PriceBookNotFound: the book that a budget counts by is gone.
        DatabaseUnavailable: the database is away.
    """
    found = {row.name: budgets.budget(row.name, row.document) for row in rows}
    wanted: list[Wanted] = []
    for of in found.values():
        period = of.period(now) or of.fixed
        assert period is not None
        if period.start <= now:
            wanted.append(Wanted(budget=of, period=period, as_of=min(now, period.end)))
    by_name = {item.wanted.budget.name: item for item in await reckoned(store, wanted)}
    reached = await crossings(store, wanted)
    standing = []
    for row in rows:
        known = by_name.get(row.name)
        state = None if known is None else known.state
        standing.append(
            Standing(
                stored=row,
                budget=found[row.name],
                unit="" if state is None else await store.unit(found[row.name]),
                state=state,
                problem=None if known is None else known.problem,
                crossings=() if state is None else reached[row.name, state.period.start],
            )
        )
    return standing
