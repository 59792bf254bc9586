"""The pages of price books: which there are, and what each asks for, as its document says it.

A caller bound to projects sees what the API's calls show it: public books, and of them what
concerns its projects. Books are changed by the API and the command line.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse

from hostler_common import auth, http
from hostler_usage.money.costing import Costing
from hostler_usage.money.document_body import DocumentName
from hostler_usage.money.price_book import visible_part
from hostler_usage.money.price_store import StoredBook
from hostler_usage.page_frame import Filled, Marker, render, spelled

ROWS_SHOWN: Final = 200
VERSIONS_SHOWN: Final = 50

router = APIRouter(include_in_schema=False)

CostingDep = Annotated[Costing, http.state("costing")]
Version = Annotated[int | None, Filled, Query(ge=1, le=2**31 - 1)]
READER: Any = auth.require(auth.Role.READER)
_Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A price or a discount, in words; `asks` are the price, or the steps of its tiers, in order."""

    name: str
    of: str
    conditions: Sequence[str]
    valid: str
    asks: Sequence[str]
    how: Sequence[str]


@router.get("/price-books", dependencies=[READER])
async def price_books(
    request: Request, store: CostingDep, caller: auth.Caller, marker: Marker = None
) -> HTMLResponse:
    """Price books in their newest versions, by name."""
    found, next_marker = await store.prices.books(
        public_only=caller.projects is not None, limit=ROWS_SHOWN, marker=marker
    )
    return render(
        request,
        "price_books.html",
        books=[(row, _seen(row.document, caller)) for row in found],
        sees_all=caller.projects is None,
        next_marker=next_marker,
    )


@router.get("/price-books/{name}", dependencies=[READER])
async def price_book(
    request: Request,
    name: DocumentName,
    store: CostingDep,
    caller: auth.Caller,
    version: Version = None,
) -> HTMLResponse:
    """A price book: its newest version, or the one asked for."""
    reference = name if version is None else f"{name}@{version}"
    found = await store.book(reference, is_bound=caller.projects is not None)
    versions: list[StoredBook] = []
    has_more = False
    if caller.projects is None:
        versions, before = await store.prices.versions(name, limit=VERSIONS_SHOWN, before=None)
        has_more = before is not None
    document = _seen(found.stored.document, caller)
    return render(
        request,
        "price_book.html",
        stored=found.stored,
        reference=reference,
        document=document,
        free=[spelled(name) for name in _texts(document.get("free"))],
        prices=[_price(item) for item in document.get("prices") or ()],
        discounts=[_discount(item) for item in document.get("discounts") or ()],
        versions=versions,
        has_more=has_more,
        sees_all=caller.projects is None,
    )


def _seen(document: _Document, caller: auth.Principal) -> _Document:
    return document if caller.projects is None else visible_part(document, caller.projects)


def _price(item: _Document) -> Row:
    how = []
    tiers = item.get("tiers")
    if tiers:
        scope = ", ".join(_texts(tiers.get("scope")) or ["project"])
        how.append(f"tiers count a {tiers.get('period', 'month')} of each {scope}")
    factors = item.get("state_class_factors") or {}
    how += [f"{spelled(state)} counts {factor}-fold" for state, factor in factors.items()]
    rounding = item.get("rounding") or {}
    if rounding.get("to", "none") != "none":
        how.append(f"time rounded up to the {rounding['to']}, once a {_period(rounding)}")
    if rounding.get("minimum_seconds"):
        how.append(f"at least {rounding['minimum_seconds']} s a {_period(rounding)}")
    return Row(
        name=item["name"],
        of=spelled(item["measure"]),
        conditions=_conditions(item),
        valid=_valid(item),
        asks=_steps(tiers["steps"]) if tiers else [str(item["price"])],
        how=[f"for every {item['per']}", *how] if "per" in item else how,
    )


def _discount(item: _Document) -> Row:
    return Row(
        name=item["name"],
        of=", ".join(spelled(name) for name in _texts(item.get("measures"))) or "all measures",
        conditions=_conditions(item),
        valid=_valid(item),
        asks=[f"{item['percent']} %"],
        how=(),
    )


def _steps(steps: Iterable[_Document]) -> list[str]:
    return [
        f"{step['price']} up to {step['up_to']}" if "up_to" in step else f"{step['price']} beyond"
        for step in steps
    ]


def _conditions(item: _Document) -> list[str]:
    match = item.get("match") or {}
    return [f"{spelled(name)} {' or '.join(_texts(values))}" for name, values in match.items()]


def _valid(item: _Document) -> str:
    since, until = item.get("from"), item.get("until")
    parts = [f"from {since}" if since else "", f"until {until}" if until else ""]
    return " ".join(part for part in parts if part) or "always"


def _period(rounding: _Document) -> str:
    return str(rounding.get("period", "month"))


def _texts(value: object) -> list[str]:
    """The texts of a document's value that may be one or a list of them."""
    if value is None:
        return []
    return [str(one) for one in value] if isinstance(value, list) else [str(value)]
