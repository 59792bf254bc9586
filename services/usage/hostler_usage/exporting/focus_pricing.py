"""What lines of an export or a report cost by a price book: from the ledger's lines to the book's and back.

The price book's own rules are in `rating`; here is only what the two call the same thing.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from fractions import Fraction
from functools import cached_property
from typing import Final

from hostler_usage.exporting import focus
from hostler_usage.exporting.export import UsageLine, unit
from hostler_usage.money import rating
from hostler_usage.money.price_book import PriceBook
from hostler_usage.reading.mapping import Measure
from hostler_usage.reading.times import microseconds

MONTH: Final = timedelta(days=30)
_TYPE: Final = "type"  # usage is grouped by it under this name
_RESOURCE_TYPE: Final = "resource_type"  # a book's conditions know it under that one


@dataclass(frozen=True, kw_only=True)
class Pricing:
    """A price book at work on the measures there are."""

    book: PriceBook
    measures: Sequence[Measure]

    @cached_property
    def groups(self) -> frozenset[str]:
        """By what lines must be told apart, in the words that usage is grouped by."""
        names = self.book.dimensions(self._by_name)
        return frozenset(_TYPE if name == _RESOURCE_TYPE else name for name in names)

    @property
    def accumulates(self) -> bool:
        """Whether the cost of a line depends on others: then those of a project are rated together."""
        return bool(self.book.periods)

    def spans(
        self, start: datetime, end: datetime, edges: Iterable[datetime] = ()
    ) -> Iterator[tuple[datetime, datetime]]:
        """The spans to ask lines for, to rate `[start, end)`; the first may begin before `start`."""
        for piece in rating.slices([self.book], start, end, edges=edges):
            yield piece.start, piece.end

    def rated(
        self, lines: Iterable[UsageLine], *, counted_from: datetime
    ) -> list[tuple[UsageLine, focus.Price | None]]:
        """The lines from `counted_from` on, each with its price; None where the book has none."""
        given = [(line, _as_rated(line)) for line in lines]
        found = {
            id(charge.line): charge
            for charge in rating.rate(
                self.book,
                [theirs for _, theirs in given],
                measures=self._by_name,
                counted_from=counted_from,
            ).charges
        }
        return [
            (line, self._price(line, found.get(id(theirs))))
            for line, theirs in given
            if line.start >= counted_from
        ]

    def month(
        self, group: Mapping[str, str | None], attributes: Mapping[str, object], *, start: datetime
    ) -> Fraction | None:
        """What a resource costs in 30 days from `start` if it stays as it is and is all there is.

        `group` names its region, project, user, type, resource and state class. Only what is held
        is counted: what will move nobody knows. None where the book prices nothing of it.
        """
        words = {name: None if value is None else str(value) for name, value in attributes.items()}
        named = {**dict.fromkeys(self.groups), **words, **group}
        lines = [
            UsageLine(
                start=begin,
                end=end,
                group=named,
                resources=1,
                measure=item.name,
                unit=unit(item.resource_type, item.attribute),
                is_held=True,
                amount=held * microseconds(end - begin),
                hours=None,
            )
            for begin, end in self.spans(start, start + MONTH)
            if begin >= start
            for item in self.measures
            if item.is_held and item.resource_type == group[_TYPE]
            for held in (_held(item, attributes),)
            if held
        ]
        prices = [price for _, price in self.rated(lines, counted_from=start) if price is not None]
        return sum((price.cost for price in prices), Fraction(0)) if prices else None

    @cached_property
    def _by_name(self) -> Mapping[str, Measure]:
        return {item.name: item for item in self.measures}

    @cached_property
    def _per(self) -> Mapping[str, Fraction]:
        return {price.name: price.per for price in self.book.prices}

    def _price(self, line: UsageLine, charge: rating.Charge | None) -> focus.Price | None:
        if charge is not None:
            return focus.Price(
                price_id=charge.price,
                quantity=charge.quantity,
                per=self._per[charge.price],
                list_cost=charge.list_cost,
                cost=charge.cost,
            )
        if line.measure in self.book.free:
            nothing = Fraction(0)
            return focus.Price(
                price_id="free", quantity=focus.quantity(line), list_cost=nothing, cost=nothing
            )
        return None


def _held(measure: Measure, attributes: Mapping[str, object]) -> int:
    value = 1 if measure.attribute is None else attributes.get(measure.attribute)
    return value if isinstance(value, int) else 0


def _as_rated(line: UsageLine) -> rating.UsageLine:
    group = dict(line.group)
    if _TYPE in group:
        group[_RESOURCE_TYPE] = group.pop(_TYPE)
    return rating.UsageLine(
        group=group, measure=line.measure, amount=line.amount, start=line.start, end=line.end
    )
