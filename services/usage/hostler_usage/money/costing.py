"""What usage costs and how far budgets are used up: usage asked for by slices, prices put to it.

Nothing is stored: the same window, books and usage give the same costs at any time. However many
slices a question has, the ledger is read once for it, as of one moment, and the pure rating cuts.
By a book in which nothing accumulates each line has its price by itself; else what a project used of
anything may say what the rest costs it, but never what another project pays. So lines are rated a batch
at a time, in which those of a project are together.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fractions import Fraction
from functools import cache
from typing import Final

from hostler_common import errors
from hostler_usage.history import user_projects_store
from hostler_usage.history.calendar_span import Span, ZoneUnknownError, begin, begins_within, zone
from hostler_usage.history.measures import MICROSECONDS_PER_HOUR
from hostler_usage.history.paging import Scope
from hostler_usage.history.report_store import (
    GROUP_PREFIX,
    GroupUnknown,
    ReportStore,
    Subjects,
    UsageFilter,
    group_kinds,
)
from hostler_usage.money import budget as budgets
from hostler_usage.money.budget import Budget, Period, State, Subject
from hostler_usage.money.price_book import Metered, PriceBook, price_book
from hostler_usage.money.price_store import PriceBookNotFound, PriceStore, StoredBook
from hostler_usage.money.rating import (
    Charge,
    Rate,
    Rating,
    Slice,
    UsageLine,
    money,
    rate,
    rounded,
    slices,
)
from hostler_usage.reading.times import MICROSECOND, PLAUSIBLE_FROM, PLAUSIBLE_UNTIL

MAX_SLICES: Final = 500
_NAMES: Final = {"resource_type": "type"}
"""A dimension's name in the ledger's reports, where it is another."""
_COLUMNS: Final = ("project", "user", "resource", "resource_type", "region", "state_class")
_BUCKETS: Final = {"day": Span.DAY, "month": Span.MONTH}


class WindowRefused(errors.Invalid):
    """The window ends before it begins, lies outside the calendar, or is cut into too many pieces."""

    code = "usage.costs.window_invalid"


class CurrenciesDiffer(errors.Invalid):
    """Costs in two currencies cannot be compared."""

    code = "usage.costs.currencies_differ"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Whose costs are asked for, when, and by what they are told apart."""

    start: datetime
    end: datetime
    as_of: datetime
    group_by: tuple[str, ...]
    time_zone: str
    scope: Scope
    project_id: str | None
    only: Mapping[str, str]  # dimensions that must have a value


@dataclass(frozen=True, slots=True, kw_only=True)
class Book:
    """A stored book and what it means."""

    stored: StoredBook
    book: PriceBook


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """What something costs by a book, exact: in all, and by price and measure."""

    list_cost: Fraction
    quantities: Mapping[tuple[str, str], Fraction]
    costs: Mapping[tuple[str, str], Fraction]

    @property
    def cost(self) -> Fraction:
        """By all prices together."""
        return sum(self.costs.values(), Fraction(0))


@dataclass(slots=True, eq=False)
class Share:
    """What a group costs by one book, and amounts that have no price.

    Of many groups few are looked at: what is charged at a rate is summed up as the integer it is, and
    becomes money in `sums`.
    """

    unpriced: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    _amounts: dict[Rate, int] = field(default_factory=lambda: defaultdict(int))
    # what accumulated, by rate: its quantity, and its cost before discounts
    _accumulated: dict[Rate, tuple[Fraction, Fraction]] = field(default_factory=dict)

    def sums(self) -> Sums:
        """The exact sums."""
        quantities: dict[tuple[str, str], Fraction] = {}
        costs: dict[tuple[str, str], Fraction] = {}
        found = [
            (at, amount * at.quantity, amount * at.list_cost)
            for at, amount in self._amounts.items()
        ]
        found += ((at, *charged) for at, charged in self._accumulated.items())
        for at, quantity, list_cost in found:
            key = (at.price, at.measure)
            cost = list_cost if at.kept == 1 else list_cost * at.kept
            if key in costs:
                quantities[key] += quantity
                costs[key] += cost
            else:
                quantities[key], costs[key] = quantity, cost
        return Sums(
            list_cost=sum((list_cost for _, _, list_cost in found), Fraction(0)),
            quantities=quantities,
            costs=costs,
        )

    @property
    def cost(self) -> Fraction:
        """What it costs by all prices together."""
        return self.sums().cost

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Share):
            return NotImplemented
        return (self.sums(), self.unpriced) == (other.sums(), other.unpriced)

    __hash__ = None  # type: ignore[assignment]  # it is added to

    def charge(self, item: Charge) -> None:
        """The charge is in the sums."""
        if item.accumulated is None:
            self._amounts[item.rate] += item.line.amount
        else:
            self._accumulate(item.rate, item.accumulated)

    def add(self, other: "Share") -> None:
        """The other is in the sums."""
        for at, amount in other._amounts.items():
            self._amounts[at] += amount
        for at, charged in other._accumulated.items():
            self._accumulate(at, charged)
        for name, amount in other.unpriced.items():
            self.unpriced[name] += amount

    def _accumulate(self, at: Rate, charged: tuple[Fraction, Fraction]) -> None:
        before = self._accumulated.get(at)
        if before is not None:
            charged = (before[0] + charged[0], before[1] + charged[1])
        self._accumulated[at] = charged


Key = tuple[str | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """The answer: for each group, in order, its share by each of the books."""

    rows: Mapping[Key, Sequence[Share]]
    totals: Sequence[Share]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A budget in a period, as it stands at `as_of` (the period's end, when it is over)."""

    budget: Budget
    period: Period
    as_of: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Something somebody would use: amounts by measure, in unit-hours or units that move."""

    project: str
    user: str | None
    amounts: Mapping[str, Fraction]
    attributes: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a request comes to, in a budget's unit, and those of its measures that have no price."""

    amount: Fraction
    unpriced: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Grouping:
    """How lines become rows."""

    edges: frozenset[datetime]
    dimensions: frozenset[str]
    key: Callable[[UsageLine], Key]


@dataclass(frozen=True, slots=True, kw_only=True)
class Costing:
    """Costs and budgets over the ledger's usage."""

    reports: ReportStore
    prices: PriceStore

    @property
    def metered(self) -> Metered:
        """The measures there are, and what usage can be told apart by."""
        mapping = self.reports.mapping
        return Metered(
            measures={item.name: item for item in mapping.measures},
            dimensions=frozenset({*_COLUMNS, *mapping.attribute_names}),
        )

    async def book(self, name: str, *, is_bound: bool) -> Book:
        """The book named `name`, or `name@version`. Callers bound to projects see public ones only.

        Raises:
            PriceBookNotFound: there is none for the caller.
            DatabaseUnavailable: the database is away.
        """
        plain, _, version = name.partition("@")
        if version and not (version.isdecimal() and len(version) < 10):
            raise PriceBookNotFound(f"there is no price book {name}")
        stored = await self.prices.book(plain, int(version) if version else None)
        book = price_book(stored.document)
        if is_bound and not book.is_public:
            raise PriceBookNotFound(f"there is no price book {name}")
        return Book(stored=stored, book=book)

    # --- the one place where usage is asked for

    async def lines(
        self,
        spans: Sequence[Slice],
        dimensions: Iterable[str],
        where: UsageFilter,
        as_of: datetime,
        *,
        are_together: bool,
    ) -> AsyncGenerator[Sequence[UsageLine]]:
        """The usage in each span, told apart by the dimensions; what comes after `as_of` is none.

        In batches; where they `are_together`, all lines of a project are in the same one, and `project` is
        among the dimensions. Spans leave no gap between them.

        Raises:
            GroupUnknown: usage cannot be told apart by one of the dimensions.
            DatabaseUnavailable: the database is away.
        """
        ordered = sorted(dimensions, key=lambda name: (name != "project", name))
        names = {name: _NAMES.get(name, name) for name in ordered}
        edges = [*(span.start for span in spans), spans[-1].end]
        found: list[UsageLine] = []
        begun = 0  # where the lines of the last project begin, of which there may be more
        async with aclosing(
            self.reports.usage_by_slice(
                edges, list(names.values()), where, as_of=as_of, leading=int(are_together)
            )
        ) as batches:
            async for rows in batches:
                for row in rows:
                    group = {name: row.group[known] for name, known in names.items()}
                    span = spans[row.slice]
                    if are_together and found and found[-1].group["project"] != group["project"]:
                        begun = len(found)
                    found += (
                        UsageLine(
                            group=group,
                            measure=measure,
                            amount=amount,
                            start=span.start,
                            end=span.end,
                        )
                        for measure, amount in row.amounts.items()
                    )
                if not are_together:
                    begun = len(found)
                if begun:
                    yield found[:begun]
                    found, begun = found[begun:], 0
        if found:
            yield found

    # --- costs

    async def costs(self, question: Question, books: Sequence[PriceBook]) -> Costs:
        """What the usage of a window costs by each of the books, which have one currency.

        Raises:
            WindowRefused, GroupUnknown, CurrenciesDiffer: the question cannot be meant.
            DatabaseUnavailable: the database is away.
        """
        if len({book.currency for book in books}) > 1:
            raise CurrenciesDiffer("the two price books have different currencies")
        if not PLAUSIBLE_FROM <= question.start < question.end <= PLAUSIBLE_UNTIL:
            raise WindowRefused("end must be later than start, and both lie from 2000 to 2099")
        grouping = await self._grouping(question, books)
        spans = _bounded(slices(books, question.start, question.end, edges=grouping.edges))
        dimensions = {*grouping.dimensions, *question.only}
        for book in books:
            dimensions |= book.dimensions(self.metered.measures)
        # where something accumulates, what a project used of anything may say what the rest costs
        accumulates = any(book.periods for book in books)
        known = {} if accumulates else question.only
        where = UsageFilter(
            scope=question.scope,
            project_id=question.project_id,
            region=known.get("region"),
            resource_type=known.get("resource_type"),
            resource_id=known.get("resource"),
        )
        rows: dict[Key, list[Share]] = defaultdict(lambda: [Share() for _ in books])

        ratings = [Rating(book, self.metered.measures) for book in books]

        def add(lines: Sequence[UsageLine]) -> None:
            _add(rows, question, ratings, grouping, lines)

        async with aclosing(
            self.lines(spans, dimensions, where, question.as_of, are_together=accumulates)
        ) as batches:
            async for lines in batches:
                # arithmetic with fractions takes processor time: others are served meanwhile
                await asyncio.to_thread(add, lines)
        totals = [Share() for _ in books]
        for shares in rows.values():
            for sum_of, share in zip(totals, shares, strict=True):
                sum_of.add(share)
        order = sorted(rows, key=lambda key: tuple(name or "" for name in key))
        return Costs(rows={key: rows[key] for key in order}, totals=totals)

    async def _grouping(self, question: Question, books: Sequence[PriceBook]) -> _Grouping:
        kinds = group_kinds(question.group_by)
        edges: set[datetime] = set()
        if any(book.periods for book in books):
            # lines of a slice share what they accumulate: what a project used before it changed its group comes first
            edges |= await self.prices.membership_edges(kinds, scope=question.scope)
        try:
            place = zone(question.time_zone)
        except ZoneUnknownError as exc:
            raise GroupUnknown(str(exc)) from exc
        for name in question.group_by:
            if name in _BUCKETS:
                edges.update(begins_within(question.start, question.end, _BUCKETS[name], place))
        known = self.metered.dimensions
        dimensions = set()
        for name in question.group_by:
            if name.startswith(GROUP_PREFIX) or name in known:
                dimensions.add(name)
            elif name not in _BUCKETS:
                listed = ", ".join(sorted({*known, *_BUCKETS, f"{GROUP_PREFIX}<kind>"}))
                raise GroupUnknown(f"costs cannot be grouped by {name}: there are {listed}")

        @cache
        def bucket(name: str, start: datetime) -> str:
            first = begin(start, _BUCKETS[name], place).astimezone(place)
            return first.date().isoformat()

        def key(line: UsageLine) -> Key:
            found: list[str | None] = []
            for name in question.group_by:
                if name in _BUCKETS:
                    found.append(bucket(name, line.start))
                else:
                    found.append(line.group[name])
            return tuple(found)

        return _Grouping(edges=frozenset(edges), dimensions=frozenset(dimensions), key=key)

    # --- budgets

    async def unit(self, of: Budget) -> str:
        """What the budget is counted in: a measure, or its price book's currency.

        Raises:
            PriceBookNotFound: the book is gone.
            DatabaseUnavailable: the database is away.
        """
        if of.limit.price_book is None:
            return of.limit.measure or ""
        return (await self.book(of.limit.price_book, is_bound=False)).book.currency

    async def states(self, wanted: Sequence[Wanted]) -> list[State]:
        """How far each of the budgets is used up, in the order given.

        Raises:
            PriceBookNotFound: the book that a budget counts by is gone.
            DatabaseUnavailable: the database is away.
        """
        alike: dict[tuple[str | None, Period, datetime], list[Wanted]] = defaultdict(list)
        for item in wanted:
            alike[item.budget.limit.price_book, item.period, item.as_of].append(item)
        found: dict[int, State] = {}
        for (name, period, as_of), items in alike.items():
            consumed = await self._consumed(name, period, as_of, [item.budget for item in items])
            for item, (whole, recent) in zip(items, consumed, strict=True):
                found[id(item)] = budgets.state(
                    item.budget, period, as_of, consumed=whole, recent=recent
                )
        return [found[id(item)] for item in wanted]

    async def _consumed(
        self, name: str | None, period: Period, as_of: datetime, of: Sequence[Budget]
    ) -> list[tuple[Fraction, Fraction]]:
        """For each budget what was consumed in the period until `as_of`, and in the week before."""
        if as_of <= period.start:
            return [(Fraction(0), Fraction(0)) for _ in of]
        book = None if name is None else (await self.book(name, is_bound=False)).book
        accumulates = book is not None and bool(book.periods)
        groups = frozenset(
            (one.subject.group_kind, one.subject.group)
            for one in of
            if one.subject.group_kind is not None and one.subject.group is not None
        )
        kinds = sorted({kind for kind, _ in groups})
        lately = as_of - budgets.FORECAST_FROM
        start = min(period.start, lately) if as_of < period.end else period.start
        edges = {period.start, lately}
        if accumulates:  # as in `_grouping`
            edges |= await self.prices.membership_edges(kinds, scope=None)
        spans = _bounded(slices([] if book is None else [book], start, as_of, edges=edges))
        dimensions = {"project", *(f"{GROUP_PREFIX}{kind}" for kind in kinds)}
        if any(one.subject.user is not None for one in of):
            dimensions.add("user")
        if book is not None:
            dimensions |= book.dimensions(self.metered.measures)
        users = {one.subject.user for one in of if one.subject.user is not None}
        theirs = await user_projects_store.projects_of(self.reports.pool, users, start, as_of)
        projects = theirs.union(*(one.subject.projects for one in of))
        named = frozenset(name for name in projects if name is not None)
        where = UsageFilter(
            # what is of no known project can only be found by reading everything
            subjects=None if None in projects else Subjects(projects=named, groups=groups)
        )
        consumed = [_Consumed() for _ in of]

        def add(lines: Sequence[UsageLine]) -> None:
            self._split(consumed, book, lines, of, start, period.start, lately)

        async with aclosing(
            self.lines(spans, dimensions, where, as_of, are_together=accumulates)
        ) as batches:
            async for lines in batches:
                await asyncio.to_thread(add, lines)
        return [(one.whole, one.recent) for one in consumed]

    def _split(
        self,
        consumed: Sequence["_Consumed"],
        book: PriceBook | None,
        lines: Sequence[UsageLine],
        of: Sequence[Budget],
        start: datetime,
        period_start: datetime,
        lately: datetime,
    ) -> None:
        """What the lines come to is in what each of the budgets, in order, has consumed."""
        measures = self.metered.measures
        used: list[tuple[UsageLine, Fraction]]
        if book is None:
            needed = {one.limit.measure for one in of}
            used = [
                (line, budgets.amount_of(measures[line.measure], line.amount))
                for line in lines
                if line.measure in needed
            ]
        else:
            used = [
                (item.line, item.cost)
                for item in rate(book, lines, measures=measures, counted_from=start).charges
            ]
        by_name: dict[tuple[str, str | None], list[tuple[UsageLine, Fraction]]]
        by_name = {key: [] for one in of for key in _counted(one.subject)}
        for item in used:
            for key in item[0].group.items():
                if key in by_name:
                    by_name[key].append(item)
        for one, sum_of in zip(of, consumed, strict=True):
            for key in _counted(one.subject):
                for line, amount in by_name[key]:
                    if line.measure == (one.limit.measure or line.measure):
                        sum_of.whole += amount if line.start >= period_start else 0
                        sum_of.recent += amount if line.start >= lately else 0

    async def asked(self, request: Request, of: Budget, now: datetime) -> Asked:
        """What the request would come to if it were used now, on top of what was used before.

        Raises:
            PriceBookNotFound: the book that the budget counts by is gone.
            DatabaseUnavailable: the database is away.
        """
        if of.limit.measure is not None:
            return Asked(amount=request.amounts.get(of.limit.measure, Fraction(0)), unpriced=())
        assert of.limit.price_book is not None
        book = (await self.book(of.limit.price_book, is_bound=False)).book
        measures = self.metered.measures
        spans = slices([book], now, now + MICROSECOND)
        dimensions = book.dimensions(measures)
        where = UsageFilter(scope=frozenset({request.project}))
        lines: list[UsageLine] = []
        if book.periods:
            async with aclosing(
                self.lines(spans, dimensions | {"project"}, where, now, are_together=True)
            ) as batches:
                async for found in batches:
                    lines += found
        group: dict[str, str | None] = {name: request.attributes.get(name) for name in dimensions}
        group |= {"project": request.project, "user": request.user, "resource": None}
        lines += [
            UsageLine(
                group=group,
                measure=name,
                amount=_whole(amount * (MICROSECONDS_PER_HOUR if measures[name].is_held else 1)),
                start=now,
                end=now + MICROSECOND,
            )
            for name, amount in request.amounts.items()
        ]
        result = await asyncio.to_thread(rate, book, lines, measures=measures, counted_from=now)
        return Asked(
            amount=sum((charge.cost for charge in result.charges), Fraction(0)),
            unpriced=tuple(sorted({line.measure for line in result.unpriced})),
        )


def dimension(name: str) -> str:
    """The dimension that a name in a question means: reports call a resource's type `type`."""
    return "resource_type" if name == "type" else name


def in_utc(moment: datetime) -> datetime:
    """The moment in UTC.

    Raises:
        WindowRefused: it has none, being outside the calendar there.
    """
    try:
        return moment.astimezone(UTC)
    except OverflowError as exc:
        raise WindowRefused("a time lies outside the calendar in UTC") from exc


def decimals(amount: Fraction, places: int = 6) -> str:
    """The amount for eyes, rounded half to even."""
    return format(rounded(amount, places), "f")


def shown(amount: Fraction, of: Budget, unit: str) -> str:
    """An amount of a budget as it is shown: money in its unit, else with six decimals."""
    if of.limit.price_book is None:
        return decimals(amount)
    return format(money(amount, unit), "f")


@dataclass(slots=True)
class _Consumed:
    """What is consumed of a budget in its period, and what of that (or before it) lately."""

    whole: Fraction = Fraction(0)
    recent: Fraction = Fraction(0)


def _counted(subject: Subject) -> list[tuple[str, str]]:
    """The dimensions, and their values, whose usage counts; no usage has two of them."""
    if subject.user is not None:
        return [("user", subject.user)]
    if subject.group is not None:
        return [(f"{GROUP_PREFIX}{subject.group_kind}", subject.group)]
    return [("project", project) for project in subject.projects]


def _bounded(spans: list[Slice]) -> list[Slice]:
    if len(spans) > MAX_SLICES:
        raise WindowRefused(
            f"the window is cut into {len(spans)} pieces by price changes, periods, groups and"
            f" days: {MAX_SLICES} at most"
        )
    return spans


def _add(
    rows: Mapping[Key, list[Share]],
    question: Question,
    ratings: Sequence[Rating],
    grouping: _Grouping,
    lines: Sequence[UsageLine],
) -> None:
    """What the lines cost is in the rows."""
    for number, rating in enumerate(ratings):
        result = rating.rate(lines, question.start)
        for charge in result.charges:
            if _is_asked_for(charge.line, question.only):
                rows[grouping.key(charge.line)][number].charge(charge)
        for line in result.unpriced:
            if _is_asked_for(line, question.only):
                rows[grouping.key(line)][number].unpriced[line.measure] += line.amount


def _is_asked_for(line: UsageLine, only: Mapping[str, str]) -> bool:
    return not only or all(line.group[name] == value for name, value in only.items())


def _whole(amount: Fraction) -> int:
    """The least whole number that is no less."""
    return -(-amount.numerator // amount.denominator)
