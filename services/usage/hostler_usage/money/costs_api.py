"""The HTTP API of costs: what usage costs by a price book, computed when asked for.

A caller bound to projects sees what its own projects cost, by public books.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from fractions import Fraction
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import AwareDatetime, BaseModel, Field

from hostler_common import auth, http
from hostler_usage.history.measures import hours
from hostler_usage.history.paging import marked_parts, marker_after
from hostler_usage.listing import Limit, Marker, Name, Selected, names
from hostler_usage.money import costing
from hostler_usage.money.costing import Costing, Question, Share, in_utc
from hostler_usage.money.price_book import NAME
from hostler_usage.money.rating import money

CostingDep = Annotated[Costing, http.state("costing")]
router = APIRouter(prefix="/v1", tags=["prices"], dependencies=[auth.require(auth.Role.READER)])

BookName = Annotated[
    str, Query(pattern=f"^{NAME}(@[1-9][0-9]{{0,8}})?$", description="name, or name@version")
]


class BookUsed(BaseModel):
    """By which book costs were computed."""

    name: str
    version: int
    currency: str


class ChargeView(BaseModel):
    """What one price makes of a group's usage of one measure."""

    price: str
    measure: str
    quantity: str = Field(description="in the price's units; six decimals")
    cost: str


class UnpricedView(BaseModel):
    """Usage that no price was found for: its cost is not known, and not zero."""

    measure: str
    amount: int = Field(
        description="exact: unit-microseconds of what was held, units of what moved"
    )
    hours: float | None = Field(description="unit-hours, rounded for showing; null of what moved")


class CostView(BaseModel):
    """What something costs. `cost` is rounded once, from the exact sum, to the currency's unit."""

    cost: str
    cost_exact: str = Field(description="numerator/denominator")
    list_cost: str = Field(description="before discounts")
    charges: list[ChargeView]
    unpriced: list[UnpricedView]


class CostItem(CostView):
    """The costs of one group; with a second book, by that as well."""

    group: dict[str, str | None]
    compared: CostView | None
    difference: str | None = Field(description="compared less cost, rounded once")


class CostTotal(CostView):
    """The costs of all groups, of every page."""

    compared: CostView | None
    difference: str | None


class CostsView(BaseModel):
    """A page of costs in a window, as far as it had passed at `as_of`."""

    start: datetime
    end: datetime
    as_of: datetime
    group_by: list[str]
    price_book: BookUsed
    compared_book: BookUsed | None
    costs: list[CostItem]
    total: CostTotal
    next_marker: str | None
    unfolded_resources: int = Field(
        description="resources with messages that are stored but not counted in here yet"
    )


@router.get("/costs", operation_id="show_costs")
async def show_costs(
    store: CostingDep,
    caller: auth.Caller,
    start: AwareDatetime,
    end: AwareDatetime,
    selected: Selected,
    group_by: Annotated[
        list[str] | None,
        Query(description="project, type, flavor, day, month, group:<kind>, ...: with commas"),
    ] = None,
    price_book: BookName = "default",
    compare: BookName | None = None,
    resource_id: Name = None,
    time_zone: Annotated[str, Query(max_length=64, description="of days and months")] = "UTC",
    limit: Limit = 1000,
    marker: Marker = None,
) -> CostsView:
    """What usage in a window costs by a price book, and by a second one beside it."""
    is_bound = caller.projects is not None
    books = [
        await store.book(name, is_bound=is_bound)
        for name in ([price_book] if compare is None else [price_book, compare])
    ]
    groups = names(group_by)
    only = {
        "region": selected.region,
        "resource_type": selected.resource_type,
        "resource": resource_id,
    }
    question = Question(
        start=in_utc(start),
        end=in_utc(end),
        as_of=datetime.now(UTC),
        group_by=tuple(costing.dimension(name) for name in groups),
        time_zone=time_zone,
        scope=caller.projects,
        project_id=selected.project_id,
        only={name: value for name, value in only.items() if value is not None},
    )
    # asked first: a fold between the two may be counted twice as a doubt, and never passes unsaid
    unfolded = await store.reports.unfolded()
    found = await store.costs(question, [one.book for one in books])
    currency = books[0].book.currency
    after = tuple(marked_parts(marker, len(groups)))
    keys = [key for key in found.rows if marker is None or _sortable(key) > after]
    page = keys[:limit]

    def item(shares: Sequence[Share]) -> dict[str, Any]:
        return {
            **_share(store, shares[0], currency),
            "compared": _share(store, shares[1], currency) if compare else None,
            "difference": _money(shares[1].cost - shares[0].cost, currency) if compare else None,
        }

    return CostsView(
        start=question.start,
        end=question.end,
        as_of=question.as_of,
        group_by=groups,
        price_book=_used(books[0]),
        compared_book=_used(books[1]) if compare else None,
        costs=[
            CostItem(group=dict(zip(groups, key, strict=True)), **item(found.rows[key]))
            for key in page
        ],
        total=CostTotal(**item(found.totals)),
        next_marker=marker_after(_sortable(page[-1])) if len(page) < len(keys) else None,
        unfolded_resources=unfolded,
    )


def _used(book: costing.Book) -> BookUsed:
    return BookUsed(
        name=book.stored.name, version=book.stored.version, currency=book.book.currency
    )


def _money(amount: Fraction, currency: str) -> str:
    return format(money(amount, currency), "f")


def _share(store: Costing, share: Share, currency: str) -> dict[str, Any]:
    measures, sums = store.metered.measures, share.sums()
    cost = sums.cost
    return {
        "cost": _money(cost, currency),
        "cost_exact": f"{cost.numerator}/{cost.denominator}",
        "list_cost": _money(sums.list_cost, currency),
        "charges": [
            ChargeView(
                price=price,
                measure=measure,
                quantity=costing.decimals(sums.quantities[price, measure]),
                cost=_money(sums.costs[price, measure], currency),
            )
            for price, measure in sorted(sums.costs)
        ],
        "unpriced": [
            UnpricedView(
                measure=name,
                amount=share.unpriced[name],
                hours=float(hours(share.unpriced[name])) if measures[name].is_held else None,
            )
            for name in sorted(share.unpriced)
        ],
    }


def _sortable(key: Sequence[str | None]) -> tuple[str, ...]:
    return tuple(name or "" for name in key)
