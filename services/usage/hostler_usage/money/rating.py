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
class Rate:
    """What one microsecond of a unit held, or one unit that moved, comes to by a price, where nothing accumulates.

    `quantity` is in the price's unit; `list_cost` is before discounts, which leave the share `kept` of it.
    Amounts can be summed by it, before they become money.
    """

    price: str
    measure: str
    quantity: Fraction
    list_cost: Fraction
    kept: Fraction

    def __hash__(self) -> int:
        # few differ in their fractions alone, and to hash a fraction takes longer than to rate a line
        return hash((self.price, self.measure))


@dataclass(frozen=True, slots=True)
class Charge:
    """What a line costs, exact: its amount at the rate, or `accumulated`, where what else was used has a say in it.

    That is a quantity in the price's unit, and its cost before discounts.
    """

    line: UsageLine
    rate: Rate
    accumulated: tuple[Fraction, Fraction] | None = None

    @property
    def price(self) -> str:
        """The name of the price."""
        return self.rate.price

    @property
    def quantity(self) -> Fraction:
        """In the price's unit."""
        return self.accumulated[0] if self.accumulated else self.line.amount * self.rate.quantity

    @property
    def list_cost(self) -> Fraction:
        """Before discounts."""
        return self.accumulated[1] if self.accumulated else self.line.amount * self.rate.list_cost

    @property
    def cost(self) -> Fraction:
        """After discounts."""
        return self.list_cost * self.rate.kept


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
    return Rating(book, measures).rate(lines, counted_from)


class Rating:
    """A book by which lines are rated, some at a time: what has the same rate, has the same object for it."""

    def __init__(self, book: PriceBook, measures: Mapping[str, Measure]) -> None:
        self._book = book
        self._measures = measures
        self._rates: dict[object, Rate] = {}

    def rate(self, lines: Iterable[UsageLine], counted_from: datetime) -> Rated:
        """As `rate`; lines of one account come at once."""
        book, finder = self._book, _Finder(self._book, self._measures, self._rates)
        items: list[_Item] = []
        accumulating: list[_Item] = []
        unpriced: list[UsageLine] = []
        for line in lines:
            if not line.amount or line.measure in book.free:
                continue
            found = finder.terms(line)
            if found is None:
                if line.start >= counted_from:
                    unpriced.append(line)
                continue
            item = _Item(line, *found)
            items.append(item)
            if finder.accumulates:
                accumulating.append(item)
        _count_time(book, [item for item in accumulating if item.price.is_rounded])
        _count_tiers(book, [item for item in accumulating if item.price.is_tiered])
        return Rated(
            charges=tuple(item.charge() for item in items if item.line.start >= counted_from),
            unpriced=tuple(unpriced),
        )


def money(amount: Fraction, currency: str) -> Decimal:
    """The amount as it is shown or paid: rounded, half to even, to the currency's smallest unit.

    This is the one place where money is rounded: sums are made before it.
    """
    return rounded(amount, _EXPONENTS.get(currency, 2))


def rounded(amount: Fraction, places: int) -> Decimal:
    """The amount with so many places behind the point, rounded half to even."""
    whole, rest = divmod(amount.numerator * 10**places, amount.denominator)
    if 2 * rest > amount.denominator or (2 * rest == amount.denominator and whole % 2):
        whole += 1
    return Decimal(f"{whole}e-{places}")


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

    __slots__ = ("_charged", "_cost", "line", "measure", "price", "rate")

    def __init__(self, line: UsageLine, measure: Measure, price: Price, rate: Rate) -> None:
        self.line = line
        self.measure = measure
        self.price = price
        self.rate = rate
        self._charged: Fraction | None = None
        self._cost: Fraction | None = None

    @property
    def quantity(self) -> Fraction:
        """In the price's unit."""
        return self.line.amount * self.rate.quantity if self._charged is None else self._charged

    @property
    def held(self) -> tuple[int, int | None]:
        """For how long, in microseconds, and how much of the attribute; None where none is integrated."""
        if self.measure.attribute is None:
            return self.line.amount, None
        value = int(self.line.group[self.measure.attribute] or "1")
        return self.line.amount // value, value

    def charge_time(self, time: Fraction) -> None:
        """The quantity is that of so many microseconds."""
        self._charged = time * (self.held[1] or 1) * self.rate.quantity

    def charge_cost(self, cost: Fraction) -> None:
        """The quantity costs so much, before discounts."""
        self._cost = cost

    def charge(self) -> Charge:
        """What the line costs."""
        if self._charged is None and self._cost is None:
            return Charge(self.line, self.rate)
        quantity = self.quantity
        cost = quantity * self.price.steps[0].price if self._cost is None else self._cost
        return Charge(self.line, self.rate, (quantity, cost))


class _Finder:
    """The terms of lines, looked up once for lines that are alike."""

    def __init__(
        self, book: PriceBook, measures: Mapping[str, Measure], rates: dict[object, Rate]
    ) -> None:
        self.accumulates = bool(book.periods)
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
        self._rates = rates

    def terms(self, line: UsageLine) -> "_Terms | None":
        """What holds throughout the line; None where it has no price."""
        values = _values(line, self._names) if self._names else ()
        key = (line.measure, line.start, line.end, values)
        try:
            return self._known[key]
        except KeyError:
            found = self._known[key] = self._look_up(line)
            return found

    def _look_up(self, line: UsageLine) -> "_Terms | None":
        next_edge = bisect_right(self._edges, line.start)
        if next_edge < len(self._edges) and self._edges[next_edge] < line.end:
            raise ValueError("a price changes within a line of usage")
        measure = self._measures.get(line.measure)
        for price in self._prices.get(line.measure, ()) if measure is not None else ():
            if price.validity.holds(line.start, line.end) and meets(price.match, line.group):
                assert measure is not None
                return measure, price, self._rate(measure, price, line)
        return None

    def _rate(self, measure: Measure, price: Price, line: UsageLine) -> Rate:
        kept, quantity = self._kept(line), _unit(measure, price, line)
        key = (id(price), kept, quantity)
        if key not in self._rates:
            self._rates[key] = Rate(
                price=price.name,
                measure=measure.name,
                quantity=quantity,
                list_cost=quantity * price.steps[0].price,
                kept=kept,
            )
        return self._rates[key]

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


_Terms = tuple[Measure, Price, Rate]


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
        key = (item.price.name, period, item.rate.quantity, value, *_values(item.line, names))
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
            item.charge_cost(cost)


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
    known: tuple[Price, Fraction] | None = None  # the price and the total at the position
    for key in sorted(parts):
        start, end, is_correction = key
        if reached is not None and start < reached and not is_correction:
            raise ValueError("slices of usage overlap")
        reached = end
        price = parts[key][0][0].price
        weight = sum((weight for _, weight in parts[key][1:]), parts[key][0][1])
        if not weight:  # a factor of zero: nothing is added
            yield from ((item, Fraction(0)) for item, _ in parts[key])
            continue
        before = known[1] if known and known[0] is price else total(price, position)
        position += weight
        known = price, total(price, position)
        added = known[1] - before
        if len(parts[key]) == 1:
            yield parts[key][0][0], added
        else:
            yield from ((item, added * part / weight) for item, part in parts[key])


def _values(line: UsageLine, names: Iterable[str]) -> tuple[str | None, ...]:
    try:
        return tuple(line.group[name] for name in names)
    except KeyError as exc:
        raise ValueError(f"usage is not told apart by {exc.args[0]}") from exc


def _period(book: PriceBook, line: UsageLine, span: Span) -> datetime:
    if following(line.start, span, book.time_zone) < line.end:
        raise ValueError(f"a {span} begins within a line of usage")
    return begin(line.start, span, book.time_zone)
