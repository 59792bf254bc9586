"""What exports and reports are made of: the ledger's lines, and what they cost.

Lines come in batches, so that memory does not grow with them. By a price book that has tiers or
rounds up, the cost of a line depends on others of its project: then the lines of a project come one
after the other and are rated together, and memory grows with those of the largest.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import datetime
from itertools import groupby
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
    """The lines of a window by these groups and the book's, cut at `edges` and where prices change.

    They come in the order of time; by a book in which something accumulates, project by project.
    """
    wanted = list(dict.fromkeys((*groups, *sorted(pricing.groups))))
    spans = list(pricing.spans(asked.start, asked.end, edges))
    cuts = [*(begin for begin, _ in spans), spans[-1][1]]

    def rated(lines: Sequence[UsageLine]) -> Sequence[Priced]:
        return pricing.rated(lines, counted_from=asked.start)

    if not pricing.accumulates:
        async with aclosing(
            snapshot.usage_by_slice(cuts, wanted, where, as_of=asked.as_of)
        ) as batches:
            async for lines in batches:
                # arithmetic with fractions takes processor time: others are served meanwhile
                yield await asyncio.to_thread(rated, lines)
        return
    names = ["project", *(name for name in wanted if name != "project")]
    together: list[UsageLine] = []
    async with aclosing(
        snapshot.usage_by_slice(cuts, names, where, as_of=asked.as_of, leading=1)
    ) as batches:
        async for lines in batches:
            for project, found in groupby(lines, key=_project):
                if together and _project(together[0]) != project:
                    yield await asyncio.to_thread(rated, together)
                    together = []
                together += found
    if together:
        yield await asyncio.to_thread(rated, together)


async def focus_charges(
    snapshot: Snapshot,
    asked: Window,
    where: UsageFilter,
    pricing: Pricing | None,
    currency: str,
) -> AsyncGenerator[Sequence[focus.FocusCharge]]:
    """The charges of a window by day; `currency` is theirs where there is no price book."""
    edges = [end for _, end in focus.charge_periods(asked.start, asked.end)]
    if pricing is not None:
        async with aclosing(
            priced_lines(snapshot, asked, focus.GROUPS, where, pricing, edges)
        ) as found:
            async for priced in found:
                yield [
                    focus.charge(line, currency=pricing.book.currency, price=price)
                    for line, price in priced
                ]
        return
    async with aclosing(
        snapshot.usage_by_slice([asked.start, *edges], focus.GROUPS, where, as_of=asked.as_of)
    ) as batches:
        async for lines in batches:
            yield [focus.charge(line, currency=currency) for line in lines]


def _project(line: UsageLine) -> str | None:
    return line.group["project"]
