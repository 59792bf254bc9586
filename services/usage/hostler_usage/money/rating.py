"""Rating: what usage costs by a price book. Exact inside, rounded once, at the edge.

Amounts stay integers (unit x microseconds of what is held, units of what moved), money is a
`Fraction` until `money` rounds it for whoever reads it. Rates are computed from usage when asked
for, so that a book can be changed, dated back or compared with another without touching usage.

What accumulates - tiers, and time rounded up for each resource - is a function f of the amount used
since the calendar period began, and a slice of time costs f(after) - f(before). So a month costs the
same however it is cut, a window that begins in mid-month needs the usage since the month's begin
(`slices` asks for it), and the order of lines means nothing: lines of one slice share its cost in
proportion to their amounts.

The lines come for the slices of `slices`: cut where a price or discount changes and where a period
begins, so that one price holds throughout each line. Those before `counted_from` move tiers and
cost nothing.

- A state's factor scales the quantity: a stopped hour at 0.5 is half an hour, in tiers too.
- Rounding is of what is held, and up, for each resource (at each value of the attribute that is
  integrated, and under each state's factor), over its time since the rounding's period began.
  `minimum_seconds` is the least time charged for it in a period in which it was there at all.
- A discount is given on the price, after tiers.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from typing import Final

from hostler_usage.history.calendar_span import Span, begin, begins_within, following
from hostler_usage.history.measures import MICROSECONDS_PER_HOUR
from hostler_usage.money.price_book import (
    PROJECT,
    RESOURCE,
    STATE_CLASS,
    Price,
    PriceBook,
    Rounding,
    Step,
    meets,
)
from hostler_usage.reading.mapping import Measure

_SECOND: Final = 1_000_000
_ROUNDED_TO: Final = {
    Rounding.NONE: 1,
    Rounding.SECOND: _SECOND,
    Rounding.HOUR: MICROSECONDS_PER_HOUR,
}

# ISO 4217: the currencies whose smallest unit is not a hundredth
_EXPONENTS: Final = {
    **dict.fromkeys(
        (
            *("BIF", "CLP", "DJF", "GNF", "ISK", "JPY", "KMF", "KRW", "PYG", "RWF", "UGX", "UYI"),
            *("VND", "VUV", "XAF", "XOF", "XPF"),
        ),
        0,
    ),
    **dict.fromkeys(("BHD", "IQD", "JOD", "KWD", "LYD", "OMR", "TND"), 3),
    **dict.fromkeys(("CLF", "UYW"), 4),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageLine:
    """How much of a measure was used in `[start, end)` by those whom `group` names.

    The amount is in unit-microseconds of what was held, in units of what moved. `group` has the
    book's dimensions, and whatever else costs are to be summed by. `amount` is
    negative in a correction.
    """

    group: Mapping[str, str | None]
    measure: str
    amount: int
    start: datetime
    end: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """What a line costs, exact. `quantity` is in the price's unit; `list_cost` is before discounts."""

    line: UsageLine
    price: str
    quantity: Fraction
    list_cost: Fraction
    cost: Fraction


@dataclass(frozen=True, slots=True, kw_only=True)
class Rated:
    """What lines cost, and those of them that have no price."""

    charges: tuple[Charge, ...]
    unpriced: tuple[UsageLine, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A span of time in which no price changes and no period begins."""

    start: datetime
    end: datetime


def slices(
    books: Iterable[PriceBook],
    start: datetime,
    end: datetime,
    *,
    edges: Iterable[datetime] = (),
) -> list[Slice]:
    """The spans to ask usage for, in order, so that `rate` can rate `[start, end)` by these books.

    They begin where the earliest period of a tier or rounding that holds `start` does, and are cut
    at `start`, at every change of a price, at every such period's begin, and at `edges`.
    """
    first = start
    cuts = {start, end, *edges}
    for book in books:
        for period in book.periods:
            first = min(first, begin(start, period.span, book.time_zone))
    for book in books:
        cuts.update(book.edges)
        for period in book.periods:
            cuts.update(begins_within(first, end, period.span, book.time_zone))
    inside = sorted({first, *(cut for cut in cuts if first < cut <= end)})
    return [Slice(start=one, end=other) for one, other in pairwise(inside)]


def rate(
    book: PriceBook,
    lines: Iterable[UsageLine],
    *,
    measures: Mapping[str, Measure],
    counted_from: datetime,
) -> Rated:
    """What the lines from `counted_from` on cost; earlier ones only say where tiers stand.

    The caller passes the lines of every slice of `slices(book, counted_from, ...)`. Lines of one
    account must come from slices that are equal or apart. `measures` says by name which are held and
    which moved; what it does not know is unpriced.

    Raises:
        ValueError: a price changes or a period begins within a line, slices overlap, or a line
            lacks a dimension of the book: the caller did not use `slices` and `dimensions`.
    """
    finder = _Finder(book, measures)
    items: list[_Item] = []
    unpriced: list[UsageLine] = []
    for line in lines:
        if not line.amount or line.measure in book.free:
            continue
        found = finder.terms(line)
        if found is None:
            if line.start >= counted_from:
                unpriced.append(line)
            continue
        items.append(_Item(line, *found))
    _count_time(book, [item for item in items if item.price.is_rounded])
    _count_tiers(book, [item for item in items if item.price.is_tiered])
    return Rated(
        charges=tuple(item.charge() for item in items if item.line.start >= counted_from),
        unpriced=tuple(unpriced),
    )


def money(amount: Fraction, currency: str) -> Decimal:
    """The amount as it is shown or paid: rounded, half to even, to the currency's smallest unit.

    This is the one place where money is rounded: sums are made before it.
    """
    exponent = _EXPONENTS.get(currency, 2)
    return Decimal(f"{round(amount * 10**exponent)}e-{exponent}")


def graduated(steps: Sequence[Step], quantity: Fraction) -> Fraction:
    """What a quantity costs from zero on: each part of it at the price of the step it lies in."""
    if quantity <= 0:
        return quantity * steps[0].price
    total = Fraction(0)
    for number, step in enumerate(steps):
        if quantity <= step.above:
            break
        upper = quantity if number == len(steps) - 1 else min(quantity, steps[number + 1].above)
        total += (upper - step.above) * step.price
    return total


def charged_microseconds(held: int, rounding: Rounding, minimum_seconds: int) -> int:
    """The time charged for a resource that was held so long: never less, and nothing for nothing."""
    if held <= 0:
        return -charged_microseconds(-held, rounding, minimum_seconds) if held else 0
    step = _ROUNDED_TO[rounding]
    return max(-(-held // step) * step, minimum_seconds * _SECOND)


class _Item:
    """A line on its way to a charge."""

    __slots__ = ("cost", "kept", "line", "measure", "price", "quantity", "unit")

    def __init__(
        self,
        line: UsageLine,
        measure: Measure,
        price: Price,
        kept: Fraction,
        unit: Fraction,
    ) -> None:
        self.line = line
        self.measure = measure
        self.price = price
        self.kept = kept
        self.unit = unit
        self.quantity = line.amount * self.unit
        self.cost = self.quantity * price.steps[0].price

    @property
    def held(self) -> tuple[int, int | None]:
        """For how long, in microseconds, and how much of the attribute; None where none is integrated."""
        if self.measure.attribute is None:
            return self.line.amount, None
        value = int(self.line.group[self.measure.attribute] or "1")
        return self.line.amount // value, value

    def charge_time(self, time: Fraction) -> None:
        """The quantity is that of so many microseconds."""
        self.quantity = time * (self.held[1] or 1) * self.unit
        self.cost = self.quantity * self.price.steps[0].price

    def charge(self) -> Charge:
        """What the line costs."""
        return Charge(
            line=self.line,
            price=self.price.name,
            quantity=self.quantity,
            list_cost=self.cost,
            cost=self.cost if self.kept == 1 else self.cost * self.kept,
        )


class _Finder:
    """The terms of lines, looked up once for lines that are alike."""

    def __init__(self, book: PriceBook, measures: Mapping[str, Measure]) -> None:
        self._edges = book.edges
        self._measures = measures
        self._prices: dict[str, list[Price]] = defaultdict(list)
        for price in book.prices:
            self._prices[price.measure].append(price)
        self._discounts = book.discounts
        matches = [item.match for item in book.prices] + [item.match for item in book.discounts]
        names = {name for match in matches for name in match}
        if any(price.state_class_factors for price in book.prices):
            names.add(STATE_CLASS)
        self._names = sorted(names)
        self._known: dict[object, _Terms | None] = {}

    def terms(self, line: UsageLine) -> "_Terms | None":
        """What holds throughout the line; None where it has no price."""
        key = (line.measure, line.start, line.end, _values(line, self._names))
        if key not in self._known:
            self._known[key] = self._look_up(line)
        return self._known[key]

    def _look_up(self, line: UsageLine) -> "_Terms | None":
        next_edge = bisect_right(self._edges, line.start)
        if next_edge < len(self._edges) and self._edges[next_edge] < line.end:
            raise ValueError("a price changes within a line of usage")
        measure = self._measures.get(line.measure)
        for price in self._prices.get(line.measure, ()) if measure is not None else ():
            if price.validity.holds(line.start, line.end) and meets(price.match, line.group):
                assert measure is not None
                return measure, price, self._kept(line), _unit(measure, price, line)
        return None

    def _kept(self, line: UsageLine) -> Fraction:
        """The share of the price that discounts leave."""
        kept = Fraction(1)
        for discount in self._discounts:
            if (
                discount.concerns(line.measure)
                and discount.validity.holds(line.start, line.end)
                and meets(discount.match, line.group)
            ):
                kept *= 1 - discount.percent / 100
        return kept


_Terms = tuple[Measure, Price, Fraction, Fraction]
"""Measure, price, the share that discounts leave, and the quantity of one microsecond or unit."""


def _unit(measure: Measure, price: Price, line: UsageLine) -> Fraction:
    factor = Fraction(1)
    if price.state_class_factors:
        factor = price.state_class_factors.get(line.group[STATE_CLASS] or "", factor)
    return factor / (price.per * (MICROSECONDS_PER_HOUR if measure.is_held else 1))


def _count_time(book: PriceBook, items: Iterable[_Item]) -> None:
    """Each item's quantity is that of the time charged for it."""
    names = sorted({PROJECT, *RESOURCE})
    accounts: dict[object, list[tuple[_Item, Fraction]]] = defaultdict(list)
    for item in items:
        if not item.measure.is_held:
            continue  # what moved has no time
        held, value = item.held
        period = _period(book, item.line, item.price.rounding_period.span)
        key = (item.price.name, period, item.unit, value, *_values(item.line, names))
        accounts[key].append((item, Fraction(held)))
    for account in accounts.values():
        for item, time in _telescoped(account, _charged_time):
            item.charge_time(time)


def _charged_time(price: Price, held: Fraction) -> Fraction:
    return Fraction(charged_microseconds(int(held), price.rounding, price.minimum_seconds))


def _count_tiers(book: PriceBook, items: Iterable[_Item]) -> None:
    """Each item's cost is that of where it stands in its account's tiers."""
    accounts: dict[object, list[tuple[_Item, Fraction]]] = defaultdict(list)
    for item in items:
        period = _period(book, item.line, item.price.tier_period.span)
        names = sorted(item.price.tier_scope)
        accounts[(item.price.name, period, *_values(item.line, names))].append(
            (item, item.quantity)
        )
    for account in accounts.values():
        for item, cost in _telescoped(account, _tier_cost):
            item.cost = cost


def _tier_cost(price: Price, quantity: Fraction) -> Fraction:
    return graduated(price.steps, quantity)


def _telescoped(
    account: list[tuple[_Item, Fraction]], total: Callable[[Price, Fraction], Fraction]
) -> Iterator[tuple[_Item, Fraction]]:
    """Each item with its share of what its slice adds to `total` of all that came before.

    Items of a slice share in proportion to their weights, corrections after the rest.
    """
    parts: dict[tuple[datetime, datetime, bool], list[tuple[_Item, Fraction]]] = defaultdict(list)
    for item, weight in account:
        parts[item.line.start, item.line.end, weight < 0].append((item, weight))
    position, reached = Fraction(0), None
    for key in sorted(parts):
        start, end, is_correction = key
        if reached is not None and start < reached and not is_correction:
            raise ValueError("slices of usage overlap")
        reached = end
        price = parts[key][0][0].price
        weight = sum((weight for _, weight in parts[key]), Fraction(0))
        if not weight:  # a factor of zero: nothing is added
            yield from ((item, Fraction(0)) for item, _ in parts[key])
            continue
        added = total(price, position + weight) - total(price, position)
        yield from ((item, added * part / weight) for item, part in parts[key])
        position += weight


def _values(line: UsageLine, names: Iterable[str]) -> tuple[str | None, ...]:
    try:
        return tuple(line.group[name] for name in names)
    except KeyError as exc:
        raise ValueError(f"usage is not told apart by {exc.args[0]}") from exc


def _period(book: PriceBook, line: UsageLine, span: Span) -> datetime:
    if following(line.start, span, book.time_zone) < line.end:
        raise ValueError(f"a {span} begins within a line of usage")
    return begin(line.start, span, book.time_zone)
