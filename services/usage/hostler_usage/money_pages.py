"""The pages of money: what usage costs, how far budgets are used up, and which months are closed.

They read, and say what the API's calls of the same name say; what they show is changed by the API
and the command line.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import StrEnum
from fractions import Fraction
from typing import Annotated, Any, Final

from fastapi import APIRouter, Path, Request
from fastapi.responses import HTMLResponse

from hostler_common import auth, http
from hostler_usage.charts import Chart, days_between, stack
from hostler_usage.history.measures import hours
from hostler_usage.money import costing
from hostler_usage.money.budget_standing import standings
from hostler_usage.money.costing import Book, Costing, Question, Share
from hostler_usage.money.price_store import PriceBookNotFound
from hostler_usage.money.rating import money
from hostler_usage.page_frame import (
    DEFAULT_BOOK,
    BookName,
    Marker,
    Month,
    Name,
    Shown,
    render,
    shown_month,
)
from hostler_usage.periods.period import State
from hostler_usage.periods.period_store import PeriodStore, StoredPeriod

ROWS_SHOWN: Final = 200
DRAWN: Final = 6
_DAY: Final = "day"
_REST: Final = "all others"

router = APIRouter(include_in_schema=False)

CostingDep = Annotated[Costing, http.state("costing")]
PeriodsDep = Annotated[PeriodStore, http.state("periods")]
PeriodName = Annotated[str, Path(max_length=255, pattern=r"^[^\x00]*$")]
READER: Any = auth.require(auth.Role.READER)


class Which(StrEnum):
    """Which adjustments of a period are shown."""

    CORRECTED = "corrected"  # of its own lines
    CHARGED = "charged"  # of others, while it was the open one


@dataclass(frozen=True, slots=True, kw_only=True)
class CostRow:
    """What a group costs; `share` is of the whole."""

    name: str | None
    cost: Decimal
    list_cost: Decimal
    share: float
    has_unpriced: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Bill:
    """What a month costs, as it is shown: by group, by price, by day, and what has no price."""

    cost: Decimal
    list_cost: Decimal
    rows: Sequence[CostRow]
    is_cut: bool
    charges: Sequence[tuple[str, str, Decimal, Decimal]]
    unpriced: Sequence[tuple[str, float]]
    chart: Chart | None


# --- costs


@router.get("/costs", dependencies=[READER])
async def costs(
    request: Request,
    store: CostingDep,
    caller: auth.Caller,
    month: Month = None,
    price_book: BookName = None,
    group_by: Name = None,
    project_id: Name = None,
) -> HTMLResponse:
    """What a month's usage costs by a price book: by day, by group, by price."""
    now = datetime.now(UTC)
    shown = shown_month(month, now)
    is_bound = caller.projects is not None
    books, _ = await store.prices.books(public_only=is_bound, limit=ROWS_SHOWN, marker=None)
    book = None
    try:
        book = await store.book(price_book or DEFAULT_BOOK, is_bound=is_bound)
    except PriceBookNotFound:
        if price_book is not None:
            raise
    group = group_by or "project"
    unfolded, bill = 0, None
    if book is not None:
        question = Question(
            start=shown.window.start,
            end=shown.window.end,
            as_of=now,
            group_by=(_DAY, costing.dimension(group)),
            time_zone="UTC",
            scope=caller.projects,
            project_id=project_id,
            only={},
        )
        # asked first: a fold between the two may be counted twice as a doubt, and never passes unsaid
        unfolded = await store.reports.unfolded()
        found = await store.costs(question, [book.book])
        rows = {key: shares[0] for key, shares in found.rows.items()}
        bill = _bill(store, book, shown, rows, found.totals[0])
    return render(
        request,
        "costs.html",
        shown=shown,
        book=book,
        asked_book=price_book or DEFAULT_BOOK,
        books=[item.name for item in books],
        group=group,
        project_id=project_id,
        bill=bill,
        unfolded=unfolded,
    )


def _bill(
    store: Costing,
    book: Book,
    shown: Shown,
    rows: Mapping[tuple[str | None, ...], Share],
    total: Share,
) -> Bill:
    currency = book.book.currency
    by_group: dict[str | None, Share] = defaultdict(Share)
    by_day: dict[str | None, dict[date, Fraction]] = defaultdict(lambda: defaultdict(Fraction))
    for (day, name), share in rows.items():
        by_group[name].add(share)
        by_day[name][date.fromisoformat(day or "")] += share.cost
    costs = {name: share.cost for name, share in by_group.items()}
    largest = sorted(by_group, key=lambda name: (-costs[name], name or ""))
    measures, whole = store.metered.measures, total.sums()
    return Bill(
        cost=money(whole.cost, currency),
        list_cost=money(whole.list_cost, currency),
        rows=[
            CostRow(
                name=name,
                cost=money(costs[name], currency),
                list_cost=money(by_group[name].sums().list_cost, currency),
                share=float(costs[name] / whole.cost) if whole.cost else 0.0,
                has_unpriced=bool(by_group[name].unpriced),
            )
            for name in largest[:ROWS_SHOWN]
        ],
        is_cut=len(largest) > ROWS_SHOWN,
        charges=[
            (
                price,
                measure,
                Decimal(costing.decimals(whole.quantities[price, measure], places=2)),
                money(whole.costs[price, measure], currency),
            )
            for price, measure in sorted(whole.costs)
        ],
        unpriced=[
            (name, float(hours(amount)) if measures[name].is_held else amount)
            for name, amount in sorted(total.unpriced.items())
        ],
        chart=_by_day(shown, currency, largest, by_day) if whole.cost else None,
    )


def _by_day(
    shown: Shown,
    currency: str,
    largest: Sequence[str | None],
    by_day: Mapping[str | None, Mapping[date, Fraction]],
) -> Chart:
    """Costs by day: the groups that cost most, and all others as one."""
    parts = {
        name or "unknown": {day: float(cost) for day, cost in by_day[name].items()}
        for name in largest[:DRAWN]
    }
    rest = _summed(by_day[name] for name in largest[DRAWN:])
    if any(rest.values()):
        parts[_REST] = rest
    return stack(
        f"Costs by day in {currency}",
        currency,
        days_between(shown.window.start, shown.window.upper),
        parts,
        colours={_REST: "rest"},
    )


def _summed(parts: Iterable[Mapping[date, Fraction]]) -> dict[date, float]:
    total: dict[date, Fraction] = defaultdict(Fraction)
    for part in parts:
        for day, cost in part.items():
            total[day] += cost
    return {day: float(cost) for day, cost in total.items()}


# --- budgets


@router.get("/budgets", dependencies=[READER])
async def budgets(
    request: Request, store: CostingDep, caller: auth.Caller, marker: Marker = None
) -> HTMLResponse:
    """Budgets by name, and how far each is used up."""
    rows, next_marker = await store.prices.budgets(
        scope=caller.projects, limit=ROWS_SHOWN, marker=marker
    )
    found = await standings(store, rows, datetime.now(UTC))
    return render(
        request,
        "budgets.html",
        standings=[(one, _percent(one.consumed_percent)) for one in found],
        next_marker=next_marker,
    )


def _percent(share: Fraction | None) -> float | None:
    return None if share is None else float(share)


# --- periods


@router.get("/periods", dependencies=[READER])
async def periods(
    request: Request, store: PeriodsDep, caller: auth.Caller, marker: Marker = None
) -> HTMLResponse:
    """Months of usage, the newest first: which are closed, and what the others wait for."""
    now = datetime.now(UTC)
    found, next_marker = await store.periods(limit=ROWS_SHOWN, marker=marker)
    return render(
        request,
        "periods.html",
        periods=[(one, one.period.state(now), await _details(store, one, now)) for one in found],
        settle=store.settle,
        sees_all=caller.projects is None,
        next_marker=next_marker,
    )


@router.get("/periods/{name}", dependencies=[READER])
async def period(
    request: Request,
    name: PeriodName,
    store: PeriodsDep,
    caller: auth.Caller,
    of: Which = Which.CORRECTED,
    marker: Marker = None,
) -> HTMLResponse:
    """One month: its manifest once it is closed, what it waits for, and what late news changed."""
    now = datetime.now(UTC)
    found = await store.period(name)
    adjustments, next_marker = await store.adjustments(
        name,
        charged=of is Which.CHARGED,
        scope=caller.projects,
        limit=ROWS_SHOWN,
        marker=marker,
    )
    is_closed = found.manifest is not None
    held = {item.name for item in found.terms.measures if item.is_held} if found.terms else set()
    return render(
        request,
        "period.html",
        stored=found,
        state=found.period.state(now),
        settles_at=found.period.settles_at(store.settle),
        blockers=await _details(store, found, now),
        sees_all=caller.projects is None,
        totals=[
            (measure, amount, float(hours(amount)) if measure in held else amount)
            for measure, amount in sorted(found.manifest.totals.items())
        ]
        if found.manifest
        else [],
        unwritten=await store.unwritten(name, scope=caller.projects) if is_closed else 0,
        of=of,
        choices=list(Which),
        adjustments=adjustments,
        next_marker=next_marker,
    )


async def _details(store: PeriodStore, found: StoredPeriod, now: datetime) -> list[str]:
    """What keeps a period from closing, in words; nothing once it is closed."""
    if found.period.state(now) is State.CLOSED:
        return []
    return [blocker.detail for blocker in await store.blockers(found.period, now)]
