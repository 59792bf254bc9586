"""A price book: what each measure costs, for which resources, from when until when.

A book is a document of prices in order. A line of usage is charged at the first price of its measure
whose conditions it meets, so that what is special stands above what is general; a project's own price
is a price whose condition is the project. Usage that meets no price is not free: it is unpriced, and
said to be. What is free on purpose is listed under `free`.

    currency: EUR                      # ISO 4217
    time_zone: Europe/Berlin           # of days, months and dates without a time; UTC if absent
    public: true                       # projects may see what they cost by it; false if absent
    free: [vcpu_hours, ram_mb_hours]
    prices:
      - name: small                    # dated versions of one price share its name
        measure: instance_hours
        match: {flavor: [m1.tiny, m1.small], region: RegionOne}
        from: 2026-01-01               # included
        until: 2027-01-01              # not included
        price: 0.012                   # per hour; of what moved, per unit
        state_class_factors: {stopped: 0.5, shelved: 0}
        rounding: {to: hour, minimum_seconds: 600, period: month}
      - name: traffic
        measure: bandwidth_out_bytes
        per: 1000000000                # price and steps are for so many units
        tiers:
          period: month
          scope: [project]
          steps: [{up_to: 100, price: 0}, {up_to: 10000, price: 0.05}, {price: 0.03}]
    discounts:
      - {name: acme, percent: 10, match: {project: acme}, measures: [instance_hours]}
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from enum import StrEnum
from fractions import Fraction
from typing import Final

from hostler_usage.history.calendar_span import Span, ZoneUnknownError, zone
from hostler_usage.money.document import Fields
from hostler_usage.reading.mapping import Measure

NAME: Final = r"[A-Za-z0-9][A-Za-z0-9._ -]{0,99}"
DIMENSION: Final = r"[a-z][a-z0-9_]{0,62}"
PROJECT: Final = "project"
STATE_CLASS: Final = "state_class"
RESOURCE: Final = frozenset({"region", "resource_type", "resource"})
"""A resource's id is its own in its region and type only."""
_SCOPES: Final = frozenset({PROJECT, "user", *RESOURCE})
_MOST_PRICES: Final = 2000


class Rounding(StrEnum):
    """To what a resource's time is rounded up."""

    NONE = "none"
    SECOND = "second"
    HOUR = "hour"


class TierPeriod(StrEnum):
    """After what tiers and rounding begin anew: periods of which the larger holds the smaller whole."""

    DAY = "day"
    MONTH = "month"

    @property
    def span(self) -> Span:
        """The calendar's period."""
        return Span(self.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A tier: what each of the quantities above `above` costs, up to the next step's `above`."""

    above: Fraction
    price: Fraction


@dataclass(frozen=True, slots=True, kw_only=True)
class Validity:
    """`[start, end)`; None on a side that has no end."""

    start: datetime | None
    end: datetime | None

    def holds(self, start: datetime, end: datetime) -> bool:
        """Whether all of `[start, end)` lies in it."""
        return (self.start is None or self.start <= start) and (
            self.end is None or end <= self.end
        )

    def meets(self, other: "Validity") -> bool:
        """Whether the two have a moment in common."""
        return (self.start is None or other.end is None or self.start < other.end) and (
            other.start is None or self.end is None or other.start < self.end
        )

    def covers(self, other: "Validity") -> bool:
        """Whether all of the other lies in it."""
        return (
            self.start is None or (other.start is not None and self.start <= other.start)
        ) and (self.end is None or (other.end is not None and other.end <= self.end))


Match = Mapping[str, frozenset[str]]
"""For each dimension the values that meet the condition."""


def meets(match: Match, group: Mapping[str, str | None]) -> bool:
    """Whether a line of usage with these dimensions meets the conditions."""
    return all(group[name] in values for name, values in match.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """One price. A flat one has a single step from zero and no scope."""

    name: str
    measure: str
    match: Match
    validity: Validity
    per: Fraction
    steps: tuple[Step, ...]
    tier_period: TierPeriod
    tier_scope: frozenset[str]
    state_class_factors: Mapping[str, Fraction]
    rounding: Rounding
    minimum_seconds: int
    rounding_period: TierPeriod

    @property
    def is_tiered(self) -> bool:
        """Whether the price of a quantity depends on how much was used before."""
        return len(self.steps) > 1

    @property
    def is_rounded(self) -> bool:
        """Whether a resource's time is rounded before it is charged."""
        return self.rounding is not Rounding.NONE or self.minimum_seconds > 0

    @property
    def periods(self) -> frozenset[TierPeriod]:
        """The calendar's periods whose beginning must be known, because something accumulates."""
        return frozenset(
            ([self.tier_period] if self.is_tiered else [])
            + ([self.rounding_period] if self.is_rounded else [])
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Discount:
    """A share of the price that is not asked for; several that apply multiply."""

    name: str
    match: Match
    measures: frozenset[str]
    percent: Fraction
    validity: Validity

    def concerns(self, measure: str) -> bool:
        """Whether it is given on that measure; without measures it is on all."""
        return not self.measures or measure in self.measures


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceBook:
    """A whole book, valid in itself."""

    currency: str
    time_zone: tzinfo
    is_public: bool
    free: frozenset[str]
    prices: tuple[Price, ...]
    discounts: tuple[Discount, ...]

    @property
    def edges(self) -> list[datetime]:
        """Every moment at which a price or discount begins or ends, in order."""
        validities = [item.validity for item in self.prices]
        validities += [item.validity for item in self.discounts]
        return sorted(
            {edge for one in validities for edge in (one.start, one.end) if edge is not None}
        )

    @property
    def periods(self) -> frozenset[TierPeriod]:
        """The periods over which something accumulates in this book."""
        return frozenset(period for price in self.prices for period in price.periods)

    def dimensions(self, measures: Mapping[str, Measure]) -> frozenset[str]:
        """By what usage must be told apart to be rated; `measures` are those there are, by name."""
        found: set[str] = set()
        for discount in self.discounts:
            found |= discount.match.keys()
        for price in self.prices:
            found |= price.match.keys()
            if price.is_tiered:
                found |= price.tier_scope
            if price.state_class_factors:
                found.add(STATE_CLASS)
            if price.is_rounded:
                found |= {PROJECT, *RESOURCE}
                measure = measures.get(price.measure)
                if measure is not None and measure.attribute is not None:
                    found.add(measure.attribute)
        return frozenset(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metered:
    """What there is to be priced: measures by name, and the dimensions that usage can be told apart by."""

    measures: Mapping[str, Measure]
    dimensions: frozenset[str]


def price_book(document: object, metered: Metered | None = None) -> PriceBook:
    """The book that a document describes; with `metered`, one that speaks only of what there is.

    Raises:
        DocumentError: with everything that is wrong with it, each fault by its path.
    """
    fields = Fields(document)
    place: tzinfo = UTC
    try:
        place = zone(fields.text("time_zone", default="UTC"))
    except ZoneUnknownError as exc:
        fields.fault("time_zone", str(exc))
    book = PriceBook(
        currency=fields.text("currency", pattern=r"[A-Z]{3}"),
        time_zone=place,
        is_public=fields.truth("public", default=False),
        free=frozenset(fields.texts("free", pattern=DIMENSION)),
        prices=tuple(_price(item, place) for item in fields.mappings("prices")),
        discounts=tuple(_discount(item, place) for item in fields.mappings("discounts")),
    )
    if not book.prices:
        fields.fault("prices", "must be a list with at least one price")
    if len(book.prices) > _MOST_PRICES or len(book.discounts) > _MOST_PRICES:
        fields.fault("", f"may have {_MOST_PRICES} prices and as many discounts")
    else:
        for path, problem in _contradictions(book):
            fields.fault(path, problem)
        for path, problem in () if metered is None else _unmetered(book, metered):
            fields.fault(path, problem)
    fields.finish()
    return book


def visible_part(document: Mapping[str, object], projects: Iterable[str]) -> dict[str, object]:
    """The document as callers bound to these projects may see it.

    Prices and discounts for other projects alone are left out; of the projects a condition names,
    only theirs are shown. `document` is one that `price_book` took.
    """
    allowed = frozenset(projects)

    def seen(name: str) -> list[object]:
        found: list[object] = []
        items = document.get(name)
        for item in items if isinstance(items, list) else []:
            match = item.get("match") or {}
            named = match.get(PROJECT)
            if named is None:
                found.append(item)
                continue
            own = [one for one in ([named] if isinstance(named, str) else named) if one in allowed]
            if own:
                found.append({**item, "match": {**match, PROJECT: own}})
        return found

    return {
        name: seen(name) if name in ("prices", "discounts") else value
        for name, value in document.items()
    }


def _price(fields: Fields, place: tzinfo) -> Price:
    valid_from, valid_until = fields.moments(place)
    per = fields.number("per", default=Fraction(1))
    if per == 0:
        fields.fault("per", "must be more than zero")
    steps: tuple[Step, ...]
    tier_period, tier_scope = TierPeriod.MONTH, frozenset[str]()
    if fields.has("tiers"):
        if fields.has("price"):
            fields.fault("price", "must be absent where there are tiers")
        tiers = fields.mapping("tiers")
        tier_period = tiers.choice("period", TierPeriod, default=TierPeriod.MONTH)
        tier_scope = _scope(tiers)
        steps = _steps(tiers)
        tiers.close()
    else:
        steps = (Step(above=Fraction(0), price=fields.number("price")),)
    rounding = fields.mapping("rounding")
    factors = fields.mapping("state_class_factors")
    found: dict[str, Fraction] = {}
    factors.each(lambda item, name: found.update({name: item.number(name)}))
    price = Price(
        name=fields.text("name", pattern=NAME),
        measure=fields.text("measure", pattern=DIMENSION),
        match=_match(fields),
        validity=Validity(start=valid_from, end=valid_until),
        per=per or Fraction(1),
        steps=steps,
        tier_period=tier_period,
        tier_scope=tier_scope,
        state_class_factors=found,
        rounding=rounding.choice("to", Rounding, default=Rounding.NONE),
        minimum_seconds=rounding.whole("minimum_seconds", least=0, most=31 * 86400, default=0),
        rounding_period=rounding.choice("period", TierPeriod, default=TierPeriod.MONTH),
    )
    rounding.close()
    fields.close()
    return price


def _scope(tiers: Fields) -> frozenset[str]:
    scope = frozenset(tiers.texts("scope") or (PROJECT,))
    if not scope <= _SCOPES:
        tiers.fault("scope", f"may name {', '.join(sorted(_SCOPES))}")
    if PROJECT not in scope:
        # a project's cost would depend on what others use, and tell of it
        tiers.fault("scope", "must name project: tiers count no two projects together")
    return scope | RESOURCE if "resource" in scope else scope


def _steps(tiers: Fields) -> tuple[Step, ...]:
    steps: list[Step] = []
    above, is_open = Fraction(0), True
    items = list(tiers.mappings("steps"))
    for position, item in enumerate(items):
        steps.append(Step(above=above, price=item.number("price")))
        if item.has("up_to"):
            bound = item.number("up_to")
            if bound <= above:
                item.fault("up_to", "must be more than the step before")
            above = bound
            is_open = False
        else:
            is_open = True
            if position != len(items) - 1:
                item.fault("up_to", "is missing: only the last step has none")
        item.close()
    if len(steps) < 2:
        tiers.fault("steps", "must be a list of two or more: a flat price is 'price'")
    elif not is_open:
        tiers.fault(f"steps[{len(steps) - 1}].up_to", "must be absent: the last step has no end")
    return tuple(steps) or (Step(above=Fraction(0), price=Fraction(0)),)


def _discount(fields: Fields, place: tzinfo) -> Discount:
    valid_from, valid_until = fields.moments(place)
    percent = fields.number("percent")
    if percent > 100:
        fields.fault("percent", "must be 100 at most")
    discount = Discount(
        name=fields.text("name", pattern=NAME),
        match=_match(fields),
        measures=frozenset(fields.texts("measures", pattern=DIMENSION)),
        percent=percent,
        validity=Validity(start=valid_from, end=valid_until),
    )
    fields.close()
    return discount


def _match(fields: Fields) -> dict[str, frozenset[str]]:
    conditions = fields.mapping("match")
    found: dict[str, frozenset[str]] = {}

    def read(item: Fields, name: str) -> None:
        values = item.texts(name)
        if not re.fullmatch(DIMENSION, name, re.ASCII):
            item.fault(name, f"must look like {DIMENSION}")
        elif values:
            found[name] = frozenset(values)
        else:
            item.fault(name, "must name a value")

    conditions.each(read)
    return found


def _contradictions(book: PriceBook) -> Iterable[tuple[str, str]]:
    for position, price in enumerate(book.prices):
        path = f"prices[{position}]"
        if price.measure in book.free:
            yield f"{path}.measure", "is free in this book"
        for earlier_position, earlier in enumerate(book.prices[:position]):
            if earlier.name == price.name:
                yield from _twins(path, price, earlier, earlier_position)
            elif _hides(earlier, price):
                yield path, f"is never reached: prices[{earlier_position}] takes all that it would"
    for position, discount in enumerate(book.discounts):
        for price_position, price in enumerate(book.prices):
            if discount.concerns(price.measure) and discount.validity.meets(price.validity):
                # within an account the discount must be one, or the cost of a window would depend
                # on where it is cut
                alien = sorted(discount.match.keys() - _account(price)) if price.periods else []
                if alien:
                    yield (
                        f"discounts[{position}].match.{alien[0]}",
                        f"must be absent: prices[{price_position}] accumulates over"
                        f" {', '.join(sorted(_account(price)))}",
                    )
                    break


def _unmetered(book: PriceBook, metered: Metered) -> Iterable[tuple[str, str]]:
    for name in sorted(book.free - metered.measures.keys()):
        yield "free", f"names {name}, and no such measure is configured"
    for position, price in enumerate(book.prices):
        measure = metered.measures.get(price.measure)
        if measure is None and price.measure:  # without one it is a fault already
            yield f"prices[{position}].measure", "is none of the configured measures"
        elif price.is_rounded and measure is not None and not measure.is_held:
            yield (
                f"prices[{position}].rounding",
                "must be absent: the measure has no time to round",
            )
        for name in sorted(price.match.keys() - metered.dimensions):
            yield f"prices[{position}].match.{name}", "is nothing that usage is told apart by"
    for position, discount in enumerate(book.discounts):
        for name in sorted(discount.measures - metered.measures.keys()):
            yield f"discounts[{position}].measures", f"names {name}, which is none"
        for name in sorted(discount.match.keys() - metered.dimensions):
            yield f"discounts[{position}].match.{name}", "is nothing that usage is told apart by"


def _account(price: Price) -> frozenset[str]:
    rounded = RESOURCE | {PROJECT}
    if not price.is_tiered:
        return rounded
    return price.tier_scope & rounded if price.is_rounded else price.tier_scope


def _twins(
    path: str, price: Price, earlier: Price, earlier_position: int
) -> Iterable[tuple[str, str]]:
    if price.validity.meets(earlier.validity):
        yield f"{path}.name", f"is that of prices[{earlier_position}], which is valid meanwhile"
    if (
        price.measure != earlier.measure
        or price.tier_scope != earlier.tier_scope
        or price.per != earlier.per
        or price.tier_period != earlier.tier_period
        or price.rounding_period != earlier.rounding_period
    ):
        yield (
            f"{path}.name",
            f"is that of prices[{earlier_position}]: versions of a price share its measure, per,"
            " scope and periods",
        )


def _hides(earlier: Price, price: Price) -> bool:
    return (
        earlier.measure == price.measure
        and earlier.validity.covers(price.validity)
        and all(
            name in price.match and price.match[name] <= values
            for name, values in earlier.match.items()
        )
    )
