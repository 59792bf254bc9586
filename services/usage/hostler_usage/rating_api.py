"""The HTTP API of rating: price books, what usage costs by them, budgets, groups of projects.

Costs are computed from usage when asked for. A caller bound to projects sees what its own projects
cost by public books, and the budgets that are of its projects alone.
"""

import asyncio
import base64
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from fractions import Fraction
from typing import Annotated, Any, Final

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from hostler_common import auth, errors, http
from hostler_usage import budget as budgets
from hostler_usage import costing, document_text
from hostler_usage.budget import Budget, Membership, State
from hostler_usage.costing import Costing, Question, Share, Wanted
from hostler_usage.document import DocumentError, exact
from hostler_usage.measures import hours
from hostler_usage.price_book import NAME, price_book, visible_part
from hostler_usage.price_store import (
    Audience,
    BudgetNotFound,
    Crossing,
    PriceBookNotFound,
    StoredBook,
    StoredBudget,
)
from hostler_usage.rating import money
from hostler_usage.report_store import BadMarker
from hostler_usage.times import PLAUSIBLE_FROM

CostingDep = Annotated[Costing, http.state("costing")]
router = APIRouter(prefix="/v1", dependencies=[auth.require(auth.Role.READER)])
_changes: Final = [auth.require(auth.Role.ADMIN, every_project=True)]

Limit = Annotated[int, Query(ge=1, le=1000)]
Marker = Annotated[str | None, Query(max_length=2000, description="next_marker of the last page")]
Name = Annotated[str | None, Query(max_length=255, pattern=r"^[^\x00]*$")]
DocumentName = Annotated[str, Path(pattern=f"^{NAME}$")]
BookName = Annotated[
    str, Query(pattern=f"^{NAME}(@[1-9][0-9]{{0,8}})?$", description="name, or name@version")
]
Kind = Annotated[str, Path(pattern=f"^{budgets.KIND}$")]
PathName = Annotated[str, Path(max_length=255, pattern=r"^[^\x00]+$")]
Replaces = Annotated[
    int | None, Query(ge=0, description="refuse unless this is the version now; 0: there is none")
]
_DOCUMENT: Final = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "application/yaml": {"schema": {"type": "object"}},
        },
    }
}


class PriceBookInvalid(errors.Invalid):
    """The document is no price book; `errors` names each fault by its path."""

    code = "usage.price_book.invalid"


class BudgetInvalid(errors.Invalid):
    """The document is no budget; `errors` names each fault by its path."""

    code = "usage.budget.invalid"


class AmountsInvalid(errors.Invalid):
    """What is asked for is no amount, or of no measure."""

    code = "usage.budget.amounts_invalid"


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


class BookUsed(BaseModel):
    """By which book costs were computed."""

    name: str
    version: int
    currency: str


class ChargeView(BaseModel):
    """What one price makes of a group's usage of one measure."""

    price: str
    measure: str
    quantity: str = Field(description="in the price's units; six decimals")
    cost: str


class UnpricedView(BaseModel):
    """Usage that no price was found for: its cost is not known, and not zero."""

    measure: str
    amount: int = Field(
        description="exact: unit-microseconds of what was held, units of what moved"
    )
    hours: float | None = Field(description="unit-hours, rounded for showing; null of what moved")


class CostView(BaseModel):
    """What something costs. `cost` is rounded once, from the exact sum, to the currency's unit."""

    cost: str
    cost_exact: str = Field(description="numerator/denominator")
    list_cost: str = Field(description="before discounts")
    charges: list[ChargeView]
    unpriced: list[UnpricedView]


class CostItem(CostView):
    """The costs of one group; with a second book, by that as well."""

    group: dict[str, str | None]
    compared: CostView | None
    difference: str | None = Field(description="compared less cost, rounded once")


class CostTotal(CostView):
    """The costs of all groups, of every page."""

    compared: CostView | None
    difference: str | None


class CostsView(BaseModel):
    """A page of costs in a window, as far as it had passed at `as_of`."""

    start: datetime
    end: datetime
    as_of: datetime
    group_by: list[str]
    price_book: BookUsed
    compared_book: BookUsed | None
    costs: list[CostItem]
    total: CostTotal
    next_marker: str | None
    unfolded_resources: int = Field(
        description="resources with messages that are stored but not counted in here yet"
    )


class CrossingView(BaseModel):
    """That a threshold was reached, as it was first noticed."""

    threshold_percent: int
    crossed_at: datetime
    consumed: str
    limit: str


class BudgetStateView(BaseModel):
    """How far a budget is used up in a period, in its unit."""

    period_start: datetime
    period_end: datetime
    as_of: datetime
    unit: str = Field(description="a currency, or a measure (unit-hours of what is held)")
    limit: str
    consumed: str
    left: str = Field(description="negative beyond the limit")
    consumed_percent: str | None = Field(description="null of a limit of nothing")
    forecast: str = Field(description="at the period's end, going on as in the last 7 days")
    crossings: list[CrossingView]


class BudgetView(BaseModel):
    """A budget, and where it stands."""

    name: str
    version: int
    document: dict[str, Any]
    updated_at: datetime
    state: BudgetStateView | None = Field(description="null before a fixed period begins")
    problem: str | None = Field(description="why the state is not known")


class Budgets(BaseModel):
    """A page of budgets, by name."""

    budgets: list[BudgetView]
    next_marker: str | None


class CheckBody(BaseModel):
    """What somebody would use: amounts in unit-hours of what is held, units of what moves."""

    model_config = ConfigDict(extra="forbid")

    project_id: str = Field(min_length=1, max_length=255)
    user_id: str | None = Field(None, max_length=255)
    what: dict[str, int | str] = Field(
        min_length=1, max_length=100, description="measure: amount, a decimal in quotes"
    )
    attributes: dict[str, Annotated[str, Field(max_length=255)]] = Field(
        default_factory=dict, max_length=100, description="flavor, region, ...: what prices go by"
    )


class CheckedBudget(BaseModel):
    """What a budget has to say to a request; of one that counts other projects too, no figures."""

    name: str | None
    allowed: bool
    unit: str | None
    asked: str | None
    left: str | None = Field(description="before the request")
    unpriced: list[str] = Field(description="measures asked for that have no price: not counted")


class Checked(BaseModel):
    """Whether a request fits every budget that counts it. Nothing is reserved."""

    allowed: bool
    budgets: list[CheckedBudget]


class MembershipBody(BaseModel):
    """A time that a project belongs to a group."""

    model_config = ConfigDict(extra="forbid")

    group: str = Field(min_length=1, max_length=255, pattern=r"^[^\x00]*$")
    valid_from: AwareDatetime = PLAUSIBLE_FROM
    valid_until: AwareDatetime | None = None


class MembershipsBody(BaseModel):
    """Every group of one kind that a project was or is in."""

    model_config = ConfigDict(extra="forbid")

    memberships: list[MembershipBody] = Field(max_length=1000)


class MembershipView(BaseModel):
    """That a project belongs to a group from then until then."""

    kind: str
    group: str
    project_id: str
    valid_from: datetime
    valid_until: datetime | None


class Memberships(BaseModel):
    """A page of memberships, by kind, project and time."""

    project_groups: list[MembershipView]
    next_marker: str | None


# --- price books


@router.get("/price-books", operation_id="list_price_books", tags=["prices"])
async def list_price_books(
    store: CostingDep, caller: auth.Caller, limit: Limit = 100, marker: Marker = None
) -> PriceBooks:
    """Price books in their newest versions, by name."""
    rows, next_marker = await store.prices.books(
        public_only=caller.projects is not None, limit=limit, marker=marker
    )
    return PriceBooks(price_books=[_book(row, caller) for row in rows], next_marker=next_marker)


@router.get("/price-books/{name}", operation_id="show_price_book", tags=["prices"])
async def show_price_book(
    name: DocumentName,
    store: CostingDep,
    caller: auth.Caller,
    version: Annotated[int | None, Query(ge=1, le=2**31 - 1)] = None,
) -> PriceBookView:
    """A price book: its newest version, or the one asked for."""
    reference = name if version is None else f"{name}@{version}"
    found = await store.book(reference, is_bound=caller.projects is not None)
    return _book(found.stored, caller)


@router.get(
    "/price-books/{name}/versions", operation_id="list_price_book_versions", tags=["prices"]
)
async def list_price_book_versions(
    name: DocumentName,
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
    tags=["prices"],
    dependencies=_changes,
    openapi_extra=_DOCUMENT,
)
async def put_price_book(
    name: DocumentName,
    request: Request,
    store: CostingDep,
    caller: auth.Caller,
    replaces: Replaces = None,
) -> PriceBookView:
    """A new version of the book, YAML or JSON; the same one, if it says what it said.

    422 `usage.price_book.invalid` names all that is wrong by its path.
    """
    document = await _document(request)
    try:
        await asyncio.to_thread(price_book, document, store.metered)
    except DocumentError as exc:
        raise PriceBookInvalid(str(exc), errors=_faults(exc)) from exc
    row = await store.prices.put_book(
        name, document_text.plain(document), by=caller.name, replaces=replaces
    )
    return _book(row, caller)


# --- costs


@router.get("/costs", operation_id="show_costs", tags=["prices"])
async def show_costs(
    store: CostingDep,
    caller: auth.Caller,
    start: AwareDatetime,
    end: AwareDatetime,
    group_by: Annotated[
        list[str] | None,
        Query(description="project, type, flavor, day, month, group:<kind>, ...: with commas"),
    ] = None,
    price_book: BookName = "default",
    compare: BookName | None = None,
    project_id: Name = None,
    region: Name = None,
    resource_type: Name = None,
    resource_id: Name = None,
    time_zone: Annotated[str, Query(max_length=64, description="of days and months")] = "UTC",
    limit: Limit = 1000,
    marker: Marker = None,
) -> CostsView:
    """What usage in a window costs by a price book, and by a second one beside it."""
    is_bound = caller.projects is not None
    books = [
        await store.book(name, is_bound=is_bound)
        for name in ([price_book] if compare is None else [price_book, compare])
    ]
    names = _group_names(group_by)
    only = {"region": region, "resource_type": resource_type, "resource": resource_id}
    question = Question(
        start=_utc(start),
        end=_utc(end),
        as_of=datetime.now(UTC),
        group_by=tuple(costing.dimension(name) for name in names),
        time_zone=time_zone,
        scope=caller.projects,
        project_id=project_id,
        only={name: value for name, value in only.items() if value is not None},
    )
    # asked first: a fold between the two may be counted twice as a doubt, and never passes unsaid
    unfolded = await store.reports.unfolded()
    found = await store.costs(question, [one.book for one in books])
    currency = books[0].book.currency
    after = _after(marker, len(names))
    keys = [key for key in found.rows if after is None or _sortable(key) > after]
    page = keys[:limit]

    def item(shares: Sequence[Share]) -> dict[str, Any]:
        return {
            **_share(store, shares[0], currency),
            "compared": _share(store, shares[1], currency) if compare else None,
            "difference": _money(shares[1].cost - shares[0].cost, currency) if compare else None,
        }

    return CostsView(
        start=question.start,
        end=question.end,
        as_of=question.as_of,
        group_by=names,
        price_book=_used(books[0]),
        compared_book=_used(books[1]) if compare else None,
        costs=[
            CostItem(group=dict(zip(names, key, strict=True)), **item(found.rows[key]))
            for key in page
        ],
        total=CostTotal(**item(found.totals)),
        next_marker=_marker(page[-1]) if len(page) < len(keys) else None,
        unfolded_resources=unfolded,
    )


# --- budgets


@router.get("/budgets", operation_id="list_budgets", tags=["budgets"])
async def list_budgets(
    store: CostingDep, caller: auth.Caller, limit: Limit = 100, marker: Marker = None
) -> Budgets:
    """Budgets by name, with what is consumed of them now."""
    rows, next_marker = await store.prices.budgets(
        scope=caller.projects, limit=limit, marker=marker
    )
    return Budgets(budgets=await _budget_views(store, rows), next_marker=next_marker)


@router.get("/budgets/{name}", operation_id="show_budget", tags=["budgets"])
async def show_budget(name: DocumentName, store: CostingDep, caller: auth.Caller) -> BudgetView:
    """One budget, with what is consumed of it now."""
    row = await store.prices.budget(name, scope=caller.projects)
    return (await _budget_views(store, [row]))[0]


@router.put(
    "/budgets/{name}",
    operation_id="put_budget",
    tags=["budgets"],
    dependencies=_changes,
    openapi_extra=_DOCUMENT,
)
async def put_budget(
    name: DocumentName,
    request: Request,
    store: CostingDep,
    caller: auth.Caller,
    replaces: Replaces = None,
) -> BudgetView:
    """The budget is as the document says, YAML or JSON.

    422 `usage.budget.invalid` names all that is wrong by its path.
    """
    document = await _document(request)
    try:
        of = budgets.budget(name, document, store.metered.measures)
    except DocumentError as exc:
        raise BudgetInvalid(str(exc), errors=_faults(exc)) from exc
    if of.limit.price_book is not None:
        await store.book(of.limit.price_book, is_bound=False)
    subject = of.subject
    audience = Audience(
        projects=sorted(subject.projects) or None,
        user=subject.user,
        group_kind=subject.group_kind,
        group=subject.group,
    )
    row = await store.prices.put_budget(
        name, document_text.plain(document), audience, by=caller.name, replaces=replaces
    )
    return (await _budget_views(store, [row]))[0]


@router.delete(
    "/budgets/{name}",
    operation_id="delete_budget",
    tags=["budgets"],
    status_code=204,
    dependencies=_changes,
)
async def delete_budget(name: DocumentName, store: CostingDep) -> Response:
    """The budget is gone, with the record of what it reached."""
    await store.prices.delete_budget(name)
    return Response(status_code=204)


@router.post("/budgets/check", operation_id="check_budgets", tags=["budgets"])
async def check_budgets(body: CheckBody, store: CostingDep, caller: auth.Caller) -> Checked:
    """Whether a request would stay within every budget that counts its project and user."""
    if caller.projects is not None and body.project_id not in caller.projects:
        raise BudgetNotFound(f"there is nothing of project {body.project_id} for {caller.name}")
    measures = store.metered.measures
    amounts: dict[str, Fraction] = {}
    for name, value in body.what.items():
        amount = exact(value)
        if amount is None or name not in measures:
            raise AmountsInvalid(
                f"{name[:60]}: expected a configured measure, and a number for it"
            )
        amounts[name] = amount
    counted = {item.attribute for item in measures.values()}
    for name, text in body.attributes.items():
        if name in counted and not (text.isdecimal() and text.isascii() and int(text[:16]) > 0):
            raise AmountsInvalid(f"{name[:60]}: expected a whole number, more than zero")
    wanted = costing.Request(
        project=body.project_id, user=body.user_id, amounts=amounts, attributes=body.attributes
    )
    now = datetime.now(UTC)
    checked = []
    for row, is_own in await store.prices.budgets_of(body.project_id, body.user_id, now):
        of = budgets.budget(row.name, row.document)
        period = of.period(now)
        if period is None:
            continue
        (standing,) = await store.states([Wanted(budget=of, period=period, as_of=now)])
        asked = await store.asked(wanted, of, now)
        unit = await store.unit(of)
        # what is not asked of it cannot exceed it, however far it is used up
        is_allowed = asked.amount <= max(standing.left, Fraction(0))
        is_shown = caller.projects is None or is_own
        checked.append(
            CheckedBudget(
                name=of.name if is_shown else None,
                allowed=is_allowed,
                unit=unit if is_shown else None,
                asked=costing.shown(asked.amount, of, unit) if is_shown else None,
                left=costing.shown(standing.left, of, unit) if is_shown else None,
                unpriced=list(asked.unpriced),
            )
        )
    return Checked(allowed=all(one.allowed for one in checked), budgets=checked)


# --- groups of projects


@router.get("/project-groups", operation_id="list_project_groups", tags=["project groups"])
async def list_project_groups(
    store: CostingDep,
    caller: auth.Caller,
    kind: Name = None,
    group: Name = None,
    project_id: Name = None,
    at: AwareDatetime | None = None,
    limit: Limit = 100,
    marker: Marker = None,
) -> Memberships:
    """Which project belongs to which group, from when until when."""
    after = None
    place = _after(marker, 3)
    if place is not None:
        try:
            after = (place[0], place[1], datetime.fromisoformat(place[2]))
        except ValueError as exc:
            raise BadMarker("the marker is not one of this list's") from exc
    rows = await store.prices.memberships(
        scope=caller.projects,
        kind=kind,
        group=group,
        project=project_id,
        at=at,
        limit=limit,
        after=after,
    )
    last = rows[-1] if len(rows) == limit else None
    return Memberships(
        project_groups=[_membership(row) for row in rows],
        next_marker=None
        if last is None
        else _marker((last.kind, last.project, last.start.isoformat())),
    )


@router.put(
    "/project-groups/{kind}/{project_id}",
    operation_id="put_project_groups",
    tags=["project groups"],
    dependencies=_changes,
)
async def put_project_groups(
    kind: Kind, project_id: PathName, body: MembershipsBody, store: CostingDep
) -> Memberships:
    """All the groups of a kind that the project was and is in; 409 where two of them overlap."""
    found = [
        Membership(
            kind=kind,
            group=one.group,
            project=project_id,
            start=_utc(one.valid_from),
            end=None if one.valid_until is None else _utc(one.valid_until),
        )
        for one in body.memberships
    ]
    for one in found:
        if one.end is not None and one.end <= one.start:
            raise errors.Invalid("valid_until must be later than valid_from")
    await store.prices.put_memberships(kind, project_id, found)
    return Memberships(
        project_groups=[_membership(one) for one in sorted(found, key=lambda one: one.start)],
        next_marker=None,
    )


# --- between the wire and the domain


async def _document(request: Request) -> object:
    text = await request.body()
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return await asyncio.to_thread(
        document_text.read, text, is_json=media_type == "application/json"
    )


def _faults(exc: DocumentError) -> list[dict[str, str]]:
    return [{"path": fault.path, "detail": fault.problem} for fault in exc.faults]


def _utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC)
    except OverflowError as exc:
        raise costing.WindowRefused("a time lies outside the calendar in UTC") from exc


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


def _used(book: costing.Book) -> BookUsed:
    return BookUsed(
        name=book.stored.name, version=book.stored.version, currency=book.book.currency
    )


def _money(amount: Fraction, currency: str) -> str:
    return format(money(amount, currency), "f")


def _share(store: Costing, share: Share, currency: str) -> dict[str, Any]:
    measures = store.metered.measures
    return {
        "cost": _money(share.cost, currency),
        "cost_exact": f"{share.cost.numerator}/{share.cost.denominator}",
        "list_cost": _money(share.list_cost, currency),
        "charges": [
            ChargeView(
                price=price,
                measure=measure,
                quantity=costing.decimals(share.quantities[price, measure]),
                cost=_money(share.costs[price, measure], currency),
            )
            for price, measure in sorted(share.costs)
        ],
        "unpriced": [
            UnpricedView(
                measure=name,
                amount=share.unpriced[name],
                hours=float(hours(share.unpriced[name])) if measures[name].is_held else None,
            )
            for name in sorted(share.unpriced)
        ],
    }


async def _budget_views(store: Costing, rows: Sequence[StoredBudget]) -> list[BudgetView]:
    now = datetime.now(UTC)
    measures = store.metered.measures
    reached = await store.prices.crossings([row.name for row in rows])
    wanted: dict[str, Wanted] = {}
    problems: dict[str, str] = {}
    for row in rows:
        of = budgets.budget(row.name, row.document)
        period = of.period(now) or of.fixed
        assert period is not None
        if of.limit.measure is not None and of.limit.measure not in measures:
            problems[row.name] = f"{of.limit.measure} is no longer a configured measure"
        elif period.start <= now:
            wanted[row.name] = Wanted(budget=of, period=period, as_of=min(now, period.end))
    states = await store.states(list(wanted.values()))
    found = {
        name: await _state(store, item.budget, state, reached)
        for (name, item), state in zip(wanted.items(), states, strict=True)
    }
    return [
        BudgetView(
            name=row.name,
            version=row.version,
            document=dict(row.document),
            updated_at=row.updated_at,
            state=found.get(row.name),
            problem=problems.get(row.name),
        )
        for row in rows
    ]


async def _state(
    store: Costing, of: Budget, state: State, reached: Sequence[Crossing]
) -> BudgetStateView:
    unit = await store.unit(of)
    percent = None
    if state.limit:
        percent = costing.decimals(100 * state.consumed / state.limit, places=2)
    return BudgetStateView(
        period_start=state.period.start,
        period_end=state.period.end,
        as_of=state.as_of,
        unit=unit,
        limit=costing.shown(state.limit, of, unit),
        consumed=costing.shown(state.consumed, of, unit),
        left=costing.shown(state.left, of, unit),
        consumed_percent=percent,
        forecast=costing.shown(state.forecast, of, unit),
        crossings=[
            CrossingView(
                threshold_percent=one.threshold,
                crossed_at=one.crossed_at,
                consumed=one.consumed,
                limit=one.limit,
            )
            for one in reached
            if (one.budget, one.period_start) == (of.name, state.period.start)
        ],
    )


def _membership(row: Membership) -> MembershipView:
    return MembershipView(
        kind=row.kind,
        group=row.group,
        project_id=row.project,
        valid_from=row.start,
        valid_until=row.end,
    )


def _group_names(given: list[str] | None) -> list[str]:
    names = [name for text in given or [] for name in text.split(",") if name]
    return list(dict.fromkeys(names))


def _sortable(key: Sequence[str | None]) -> tuple[str, ...]:
    return tuple(name or "" for name in key)


def _marker(key: Sequence[str | None]) -> str:
    return base64.urlsafe_b64encode(json.dumps(_sortable(key)).encode()).decode().rstrip("=")


def _after(marker: str | None, parts: int) -> tuple[str, ...] | None:
    if marker is None:
        return None
    try:
        found = json.loads(base64.urlsafe_b64decode(marker + "=" * (-len(marker) % 4)))
    except (ValueError, RecursionError) as exc:
        raise BadMarker("the marker is not one of this list's") from exc
    if not (
        isinstance(found, list)
        and len(found) == parts > 0
        and all(isinstance(part, str) and "\0" not in part for part in found)
    ):
        raise BadMarker("the marker is not one of this list's")
    return tuple(found)
