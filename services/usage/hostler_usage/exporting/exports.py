"""What exports and reports are made of: the ledger's lines, and what they cost.

Lines come in batches, so that memory does not grow with them. By a price book that has tiers or
rounds up, the cost of a line depends on others of its project: then a project's lines are rated
together, and memory grows with those of the largest.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import takewhile
from typing import Final, Protocol

from hostler_common import auth, errors
from hostler_usage.exporting import focus
from hostler_usage.exporting.export import UsageLine
from hostler_usage.exporting.export_store import ExportStore, Snapshot
from hostler_usage.exporting.focus_pricing import Pricing
from hostler_usage.history.measures import Window
from hostler_usage.history.report_store import UsageFilter
from hostler_usage.money.price_book import PriceBook

MOST_AT_ONCE: Final = 2  # each holds a connection of the pool that ingest needs too

Priced = tuple[UsageLine, focus.Price | None]


class PriceBookUnknown(errors.NotFound):
    """There is no price book of that name, or none that the caller may see."""

    code = "usage.price_book.not_found"


class StoredBook(Protocol):
    """A price book as it is kept."""

    @property
    def book(self) -> PriceBook:
        """What it means."""


class PriceBooks(Protocol):
    """Where price books are kept."""

    async def book(self, name: str, *, is_bound: bool) -> StoredBook:
        """The book of that name. Callers bound to projects see public ones only.

        Raises:
            NotFound: there is none for the caller.
        """


class NoPriceBooks:
    """There are none."""

    async def book(self, name: str, *, is_bound: bool) -> StoredBook:
        """Nothing.

        Raises:
            PriceBookUnknown: always.
        """
        del is_bound
        raise PriceBookUnknown(f"there is no price book {name}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Exports:
    """What exports and reports are made of."""

    store: ExportStore
    books: PriceBooks = field(default_factory=NoPriceBooks)
    issuer: focus.Issuer = field(default_factory=focus.Issuer)
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MOST_AT_ONCE))

    async def pricing(self, price_book: str | None, caller: auth.Principal) -> Pricing | None:
        """The price book at work, if one is asked for.

        Raises:
            NotFound: there is none of that name that the caller may see.
        """
        if price_book is None:
            return None
        found = await self.books.book(price_book, is_bound=caller.projects is not None)
        return Pricing(book=found.book, measures=self.store.measures)


async def priced_lines(
    snapshot: Snapshot,
    asked: Window,
    groups: Iterable[str],
    where: UsageFilter,
    pricing: Pricing,
    edges: Iterable[datetime] = (),
) -> AsyncGenerator[Sequence[Priced]]:
    """The lines of a window by these groups and the book's, cut at `edges` and where prices change."""
    wanted = dict.fromkeys((*groups, *sorted(pricing.groups)))
    spans = [
        _part(asked, begin, end)
        for begin, end in pricing.spans(asked.start, asked.end, edges)
        if begin < asked.as_of
    ]
    if not spans:
        return

    def rated(lines: Sequence[UsageLine]) -> Sequence[Priced]:
        return pricing.rated(lines, counted_from=asked.start)

    if not pricing.accumulates:
        for span in spans:
            async for lines in snapshot.usage(span, list(wanted), where):
                # arithmetic with fractions takes processor time: others are served meanwhile
                yield await asyncio.to_thread(rated, lines)
        return
    names = list(dict.fromkeys(("project", *wanted)))
    whole = _part(asked, spans[0].start, spans[-1].end)
    async for found in snapshot.usage(whole, ["project"], where):
        for project in dict.fromkeys(line.group["project"] for line in found):
            together = [
                line
                for span in spans
                async for lines in snapshot.usage(span, names, _only(where, project))
                for line in lines
                if line.group["project"] == project  # what is nobody's cannot be asked for alone
            ]
            yield await asyncio.to_thread(rated, together)


async def focus_charges(
    snapshot: Snapshot,
    asked: Window,
    where: UsageFilter,
    pricing: Pricing | None,
    currency: str,
) -> AsyncGenerator[Sequence[focus.FocusCharge]]:
    """The charges of a window by day; `currency` is theirs where there is no price book."""
    days = focus.charge_periods(asked.start, asked.end)
    periods = list(takewhile(lambda day: day[0] < asked.as_of, days))
    if pricing is not None:
        edges = [end for _, end in periods]
        async for priced in priced_lines(snapshot, asked, focus.GROUPS, where, pricing, edges):
            yield [
                focus.charge(line, currency=pricing.book.currency, price=price)
                for line, price in priced
            ]
        return
    for begin, end in periods:
        async for lines in snapshot.usage(_part(asked, begin, end), focus.GROUPS, where):
            yield [focus.charge(line, currency=currency) for line in lines]


def _part(asked: Window, begin: datetime, end: datetime) -> Window:
    return Window(start=begin, end=end, as_of=asked.as_of)


def _only(where: UsageFilter, project: str | None) -> UsageFilter:
    return where if project is None else replace(where, project_id=project)
