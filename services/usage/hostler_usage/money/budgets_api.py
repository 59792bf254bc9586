"""The HTTP API of budgets: where they stand, and whether a request would stay within them.

A caller bound to projects sees the budgets that are of its projects alone.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from fractions import Fraction
from typing import Annotated, Any, Final

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from hostler_common import auth, errors, http
from hostler_usage.history.report_store import GroupUnknown
from hostler_usage.listing import Limit, Marker
from hostler_usage.money import budget as budgets
from hostler_usage.money import costing, document_body, document_text
from hostler_usage.money.budget_standing import Standing, reckoned, standings, unknown_group
from hostler_usage.money.costing import Costing, Wanted
from hostler_usage.money.document import DocumentError, exact
from hostler_usage.money.price_store import Audience, BudgetNotFound, StoredBudget

CostingDep = Annotated[Costing, http.state("costing")]
router = APIRouter(prefix="/v1", tags=["budgets"], dependencies=[auth.require(auth.Role.READER)])
_changes: Final = [auth.require(auth.Role.ADMIN, every_project=True)]


class BudgetInvalid(errors.Invalid):
    """The document is no budget; `errors` names each fault by its path."""

    code = "usage.budget.invalid"


class AmountsInvalid(errors.Invalid):
    """What is asked for is no amount, or of no measure."""

    code = "usage.budget.amounts_invalid"


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
    left: str | None = Field(description="before the request; null where `problem` says why")
    problem: str | None = Field(
        description="why it is not known how far it is used up: then nothing that it counts is allowed"
    )
    unpriced: list[str] = Field(description="measures asked for that have no price: not counted")


class Checked(BaseModel):
    """Whether a request fits every budget that counts it. Nothing is reserved."""

    allowed: bool
    budgets: list[CheckedBudget]


@router.get("/budgets", operation_id="list_budgets")
async def list_budgets(
    store: CostingDep, caller: auth.Caller, limit: Limit = 100, marker: Marker = None
) -> Budgets:
    """Budgets by name, with what is consumed of them now."""
    rows, next_marker = await store.prices.budgets(
        scope=caller.projects, limit=limit, marker=marker
    )
    return Budgets(budgets=await _views(store, rows), next_marker=next_marker)


@router.get("/budgets/{name}", operation_id="show_budget")
async def show_budget(
    name: document_body.DocumentName, store: CostingDep, caller: auth.Caller
) -> BudgetView:
    """One budget, with what is consumed of it now."""
    row = await store.prices.budget(name, scope=caller.projects)
    return (await _views(store, [row]))[0]


@router.put(
    "/budgets/{name}",
    operation_id="put_budget",
    dependencies=_changes,
    openapi_extra=document_body.DESCRIPTION,
)
async def put_budget(
    name: document_body.DocumentName,
    request: Request,
    store: CostingDep,
    caller: auth.Caller,
    replaces: document_body.Replaces = None,
) -> BudgetView:
    """The budget is as the document says, YAML or JSON.

    422 `usage.budget.invalid` names all that is wrong by its path.
    """
    document = await document_body.read(request)
    try:
        of = budgets.budget(name, document, store.metered.measures)
    except DocumentError as exc:
        raise BudgetInvalid(str(exc), errors=document_body.faults(exc)) from exc
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
    return (await _views(store, [row]))[0]


@router.delete(
    "/budgets/{name}",
    operation_id="delete_budget",
    status_code=204,
    dependencies=_changes,
)
async def delete_budget(name: document_body.DocumentName, store: CostingDep) -> Response:
    """The budget is gone, with the record of what it reached."""
    await store.prices.delete_budget(name)
    return Response(status_code=204)


@router.post("/budgets/check", operation_id="check_budgets")
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
        (standing,) = await reckoned(store, [Wanted(budget=of, period=period, as_of=now)])
        unit = await store.unit(of)
        left = None if standing.state is None else standing.state.left
        problem = standing.problem
        asked = None
        try:
            asked = await store.asked(wanted, of, now)
        except GroupUnknown as exc:
            problem = problem or unknown_group(of, exc)
        # what is not asked of it cannot exceed it, however far it is used up
        is_allowed = asked is not None and asked.amount <= max(left or Fraction(0), Fraction(0))
        is_shown = caller.projects is None or is_own
        checked.append(
            CheckedBudget(
                name=of.name if is_shown else None,
                allowed=is_allowed,
                unit=unit if is_shown else None,
                asked=costing.shown(asked.amount, of, unit) if is_shown and asked else None,
                left=costing.shown(left, of, unit) if is_shown and left is not None else None,
                problem=problem if is_shown else None,
                unpriced=[] if asked is None else list(asked.unpriced),
            )
        )
    return Checked(allowed=all(one.allowed for one in checked), budgets=checked)


async def _views(store: Costing, rows: Sequence[StoredBudget]) -> list[BudgetView]:
    return [_view(one) for one in await standings(store, rows, datetime.now(UTC))]


def _view(one: Standing) -> BudgetView:
    return BudgetView(
        name=one.stored.name,
        version=one.stored.version,
        document=dict(one.stored.document),
        updated_at=one.stored.updated_at,
        state=_state(one),
        problem=one.problem,
    )


def _state(one: Standing) -> BudgetStateView | None:
    state = one.state
    if state is None:
        return None
    percent = one.consumed_percent
    return BudgetStateView(
        period_start=state.period.start,
        period_end=state.period.end,
        as_of=state.as_of,
        unit=one.unit,
        limit=one.shown(state.limit),
        consumed=one.shown(state.consumed),
        left=one.shown(state.left),
        consumed_percent=None if percent is None else costing.decimals(percent, places=2),
        forecast=one.shown(state.forecast),
        crossings=[
            CrossingView(
                threshold_percent=crossing.threshold,
                crossed_at=crossing.crossed_at,
                consumed=crossing.consumed,
                limit=crossing.limit,
            )
            for crossing in one.crossings
        ],
    )
