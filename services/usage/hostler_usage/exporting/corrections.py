"""What late news changed about closed periods, as lines for an export: each adjustment is one.

An adjustment says by how much a resource's line of a whole month is wrong, not on which days. It is
priced where that is enough: by a book in which nothing accumulates, whose prices did not change
within the month, and that goes by nothing but what an adjustment tells of the resource.
"""

from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import asyncpg

from hostler_common import errors
from hostler_usage.exporting import focus
from hostler_usage.exporting.export import UsageLine, unit
from hostler_usage.exporting.export_store import Snapshot
from hostler_usage.exporting.focus_pricing import Pricing
from hostler_usage.history.measures import Window, hours
from hostler_usage.history.paging import visible_projects
from hostler_usage.history.report_store import ROWS_A_BATCH, UsageFilter
from hostler_usage.money.price_book import STATE_CLASS
from hostler_usage.periods import period
from hostler_usage.periods.period import Terms

# a window that is over has all its corrections: they are told apart by when they were written, and
# the snapshot waits for who is just writing
_WRITTEN: Final = (
    "a.written_at >= $1 AND a.written_at < $2 AND ($3::text[] IS NULL OR a.project_id = ANY($3))"
    " AND ($4::text IS NULL OR a.region = $4) AND ($5::text IS NULL OR a.resource_type = $5)"
)
_PERIODS: Final = (
    "SELECT name, starts_at, ends_at, terms FROM period WHERE name IN"  # noqa: S608  a constant of this module
    f" (SELECT a.period FROM period_adjustment AS a WHERE {_WRITTEN})"
)
_ADJUSTMENTS: Final = (
    "SELECT a.period, a.region, a.project_id, a.resource_type, a.resource_id, a.state_class,"  # noqa: S608  as above
    " a.kind, a.measure, a.delta, c.starts_at + (c.ends_at - c.starts_at) / 2 AS charged_at"
    " FROM period_adjustment AS a JOIN period AS c ON c.name = a.charged_to"
    f" WHERE {_WRITTEN} ORDER BY a.id"
)
_TOLD: Final = frozenset({"region", "project", "type", "resource", "resource_type", STATE_CLASS})
"""What an adjustment tells of a resource, beside its kind."""


class CorrectionsUnpriced(errors.Invalid):
    """The price book's prices cannot be put to a change of a whole month."""

    code = "usage.focus.corrections_unpriced"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Corrected:
    """A closed period that is corrected, and what it was metered by."""

    start: datetime
    end: datetime
    terms: Terms


async def correction_charges(
    snapshot: Snapshot,
    asked: Window,
    where: UsageFilter,
    pricing: Pricing | None,
    currency: str,
) -> AsyncGenerator[list[focus.FocusCharge]]:
    """A charge for each adjustment that was written in the window, billed in the month it is charged to.

    Raises:
        CorrectionsUnpriced: before the first charge.
        DatabaseUnavailable: the database is away.
    """
    values = (
        asked.start,
        asked.upper,
        visible_projects(where.scope, where.project_id),
        where.region,
        where.resource_type,
    )
    periods = {
        row["name"]: _Corrected(
            start=row["starts_at"], end=row["ends_at"], terms=period.decoded(row["terms"])
        )
        for row in await snapshot.connection.fetch(_PERIODS, *values)
    }
    if pricing is not None:
        for name, one in periods.items():
            if problem := _unpriceable(pricing, one):
                raise CorrectionsUnpriced(
                    f"corrections of {name} cannot be priced: {problem}; leave out price_book, or"
                    " corrections and take them from /v1/periods"
                )
    batch: list[focus.FocusCharge] = []
    async for row in snapshot.connection.cursor(_ADJUSTMENTS, *values, prefetch=ROWS_A_BATCH):
        of = periods[row["period"]]
        line = _line(of, row, () if pricing is None else pricing.groups)
        price = None
        if pricing is not None:
            ((_, price),) = pricing.rated([line], counted_from=line.start)
        batch.append(
            focus.charge(
                line,
                currency=currency if pricing is None else pricing.book.currency,
                price=price,
                corrected_in=row["charged_at"],
            )
        )
        if len(batch) == ROWS_A_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _line(of: _Corrected, row: asyncpg.Record, groups: Iterable[str]) -> UsageLine:
    """The line of an adjustment; by these groups, too, nothing is known of it."""
    measure = next(item for item in of.terms.measures if item.name == row["measure"])
    amount = int(row["delta"])
    group: dict[str, str | None] = dict.fromkeys((*focus.GROUPS, *groups))
    for name, column in (
        ("region", "region"),
        ("project", "project_id"),
        ("type", "resource_type"),
        ("resource", "resource_id"),
        ("state_class", "state_class"),
    ):
        group[name] = row[column] or None
    kind = of.terms.kinds.get(measure.resource_type)
    if kind is not None:
        group[kind] = row["kind"] or None
    return UsageLine(
        start=of.start,
        end=of.end,
        group=group,
        resources=1,
        measure=measure.name,
        unit=unit(measure.resource_type, measure.attribute or measure.counter),
        is_held=measure.is_held,
        amount=amount,
        hours=hours(amount) if measure.is_held else None,
    )


def _unpriceable(pricing: Pricing, of: _Corrected) -> str | None:
    """Why a change of the whole period has no certain price by the book; None where it has."""
    book = pricing.book
    if book.periods:
        return "by the price book, what is used at one time says what it costs at another"
    if any(of.start < edge < of.end for edge in book.edges):
        return "the price book's prices change within the month"
    types = {item.name: item.resource_type for item in of.terms.measures}
    for price in book.prices:
        told = {*_TOLD, of.terms.kinds.get(types.get(price.measure, ""))}
        if unknown := price.match.keys() - told:
            return f"price {price.name} goes by {', '.join(sorted(unknown))}"
    for discount in book.discounts:
        kinds = {of.terms.kinds.get(types.get(name, "")) for name in discount.measures}
        told = {*_TOLD, *(kinds if len(kinds) == 1 else ())}
        if unknown := discount.match.keys() - told:
            return f"discount {discount.name} goes by {', '.join(sorted(unknown))}"
    return None
