"""The HTTP API of price books. A caller bound to projects sees public ones, and of them what concerns it."""

import asyncio
from datetime import datetime
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field

from hostler_common import auth, errors, http
from hostler_usage.listing import Limit, Marker
from hostler_usage.money import document_body, document_text
from hostler_usage.money.costing import Costing
from hostler_usage.money.document import DocumentError
from hostler_usage.money.price_book import price_book, visible_part
from hostler_usage.money.price_store import PriceBookNotFound, StoredBook

CostingDep = Annotated[Costing, http.state("costing")]
router = APIRouter(prefix="/v1", tags=["prices"], dependencies=[auth.require(auth.Role.READER)])
_changes: Final = [auth.require(auth.Role.ADMIN, every_project=True)]


class PriceBookInvalid(errors.Invalid):
    """The document is no price book; `errors` names each fault by its path."""

    code = "usage.price_book.invalid"


class PriceBookView(BaseModel):
    """A version of a price book."""

    name: str
    version: int
    document: dict[str, Any]
    created_at: datetime
    created_by: str | None = Field(description="null for callers bound to projects")


class PriceBooks(BaseModel):
    """A page of price books in their newest versions."""

    price_books: list[PriceBookView]
    next_marker: str | None


@router.get("/price-books", operation_id="list_price_books")
async def list_price_books(
    store: CostingDep, caller: auth.Caller, limit: Limit = 100, marker: Marker = None
) -> PriceBooks:
    """Price books in their newest versions, by name."""
    rows, next_marker = await store.prices.books(
        public_only=caller.projects is not None, limit=limit, marker=marker
    )
    return PriceBooks(price_books=[_book(row, caller) for row in rows], next_marker=next_marker)


@router.get("/price-books/{name}", operation_id="show_price_book")
async def show_price_book(
    name: document_body.DocumentName,
    store: CostingDep,
    caller: auth.Caller,
    version: Annotated[int | None, Query(ge=1, le=2**31 - 1)] = None,
) -> PriceBookView:
    """A price book: its newest version, or the one asked for."""
    reference = name if version is None else f"{name}@{version}"
    found = await store.book(reference, is_bound=caller.projects is not None)
    return _book(found.stored, caller)


@router.get("/price-books/{name}/versions", operation_id="list_price_book_versions")
async def list_price_book_versions(
    name: document_body.DocumentName,
    store: CostingDep,
    caller: auth.Caller,
    limit: Limit = 100,
    marker: Annotated[int | None, Query(ge=1, le=2**31 - 1)] = None,
) -> PriceBooks:
    """Every version of a price book, newest first."""
    if caller.projects is not None:
        raise PriceBookNotFound(f"there is no list of versions of {name} for {caller.name}")
    rows, before = await store.prices.versions(name, limit=limit, before=marker)
    return PriceBooks(
        price_books=[_book(row, caller) for row in rows],
        next_marker=None if before is None else str(before),
    )


@router.put(
    "/price-books/{name}",
    operation_id="put_price_book",
    dependencies=_changes,
    openapi_extra=document_body.DESCRIPTION,
)
async def put_price_book(
    name: document_body.DocumentName,
    request: Request,
    store: CostingDep,
    caller: auth.Caller,
    replaces: document_body.Replaces = None,
) -> PriceBookView:
    """A new version of the book, YAML or JSON; the same one, if it says what it said.

    422 `usage.price_book.invalid` names all that is wrong by its path.
    """
    document = await document_body.read(request)
    try:
        await asyncio.to_thread(price_book, document, store.metered)
    except DocumentError as exc:
        raise PriceBookInvalid(str(exc), errors=document_body.faults(exc)) from exc
    row = await store.prices.put_book(
        name, document_text.plain(document), by=caller.name, replaces=replaces
    )
    return _book(row, caller)


def _book(row: StoredBook, caller: auth.Principal) -> PriceBookView:
    is_bound = caller.projects is not None
    return PriceBookView(
        name=row.name,
        version=row.version,
        document=visible_part(row.document, caller.projects or ())
        if is_bound
        else dict(row.document),
        created_at=row.created_at,
        created_by=None if is_bound else row.created_by,
    )
