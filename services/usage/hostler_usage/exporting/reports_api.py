"""Reports over HTTP: resources nobody seems to need, and the projects that use most.

Both are computed when asked for, from the ledger as of one moment. What a caller that is bound to
projects may see is a condition in the SQL.
"""

import heapq
from collections import defaultdict
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from typing import Annotated, Final

from fastapi import APIRouter, Depends, Query
from pydantic import AwareDatetime, BaseModel, Field

from hostler_common import auth, errors, http
from hostler_usage.exporting import idle, idle_findings
from hostler_usage.exporting.exports import Exports, priced_lines
from hostler_usage.history.measures import hours
from hostler_usage.history.report_store import UsageFilter
from hostler_usage.listing import Cited, Name
from hostler_usage.money.rating import money
from hostler_usage.windows import window

COST: Final = "cost"

ExportsDep = Annotated[Exports, http.state("exports")]
PriceBookName = Annotated[
    str | None, Query(max_length=255, pattern=r"^[^\x00]*$", description="costs are by this book")
]
Days = Annotated[int, Query(ge=1, le=3650)]
Rate = Annotated[int, Query(ge=1, le=10**15)]
router = APIRouter(
    prefix="/v1/reports", tags=["reports"], dependencies=[auth.require(auth.Role.READER)]
)


class MeasureUnknown(errors.Invalid):
    """There is no such measure to rank by."""

    code = "usage.measure.unknown"


class BookMissing(errors.Invalid):
    """Costs were asked for without a price book."""

    code = "usage.price_book.missing"


class Finding(BaseModel):
    """A resource that nobody seems to need, or of which that cannot be told."""

    region: str
    resource_type: str
    resource_id: str
    project_id: str | None
    user_id: str | None
    state_class: str
    verdict: idle.Verdict
    reason: idle.Reason | None = Field(description="null where the verdict is unknown")
    since: datetime | None = Field(description="when it was last known to be needed")
    age_days: int
    score: float = Field(description="0 to 10, the more the surer: 5 is at the threshold")
    evidence: list[str]
    cited: list[Cited] = Field(description="the messages that its state rests on")
    holds: dict[str, int] = Field(description="what would be free without it")
    cost_per_month: Decimal | None = Field(
        description="of 30 days as it is now, by the price book; null where there is no price"
    )


class IdleThresholds(BaseModel):
    """From when on something is found."""

    stopped_days: int
    error_days: int
    unattached_days: int
    unassociated_days: int
    orphaned_days: int
    unused_days: int
    inactive_days: int
    cpu_percent: float
    network_bytes_per_second: int
    disk_bytes_per_second: int
    volume_bytes_per_second: int


class IdleReport(BaseModel):
    """A page of findings, by resource id. A page may hold fewer than asked for, and go on all the same."""

    as_of: datetime
    thresholds: IdleThresholds
    currency: str | None
    examined: int = Field(description="resources looked at for this page")
    unknown: int = Field(description="those of them of which it cannot be told")
    findings: list[Finding]
    next_marker: str | None


class TopProject(BaseModel):
    """A project, and what it used or cost."""

    rank: int
    project_id: str | None = Field(description="null: of what belongs to no project")
    amount: int | None = Field(description="unit-microseconds of what is held, else units; exact")
    hours: float | None
    cost: Decimal | None
    share: float = Field(description="of all that the caller may see")


class TopProjects(BaseModel):
    """The projects that used or cost most, the largest first."""

    start: datetime
    end: datetime
    as_of: datetime
    by: str
    currency: str | None
    unpriced_measures: list[str] = Field(description="used, and without a price in the book")
    projects: list[TopProject]


def thresholds(
    stopped_days: Annotated[Days, Query(description="stopped, shelved, suspended, paused")] = 14,
    error_days: Annotated[Days, Query(description="in error, of any type")] = 7,
    unattached_days: Annotated[Days, Query(description="volumes")] = 14,
    unassociated_days: Annotated[Days, Query(description="floating IPs")] = 7,
    orphaned_days: Annotated[Days, Query(description="snapshots whose volume is gone")] = 30,
    unused_days: Annotated[Days, Query(description="images never sent, run by nobody")] = 90,
    inactive_days: Annotated[
        int, Query(ge=1, le=90, description="over which activity is looked at")
    ] = 7,
    cpu_percent: Annotated[float, Query(gt=0, le=100, description="p95 of all vCPUs")] = 20,
    network_bytes_per_second: Annotated[Rate, Query(description="a mean")] = 100_000,
    disk_bytes_per_second: Annotated[Rate, Query(description="of instances, a mean")] = 1_000_000,
    volume_bytes_per_second: Annotated[Rate, Query(description="of volumes, a mean")] = 1_000,
) -> idle.Thresholds:
    """The thresholds of a request; what it does not name has the default."""
    return idle.Thresholds(
        stopped_days=stopped_days,
        error_days=error_days,
        unattached_days=unattached_days,
        unassociated_days=unassociated_days,
        orphaned_days=orphaned_days,
        unused_days=unused_days,
        inactive_days=inactive_days,
        cpu_percent=Fraction(str(cpu_percent)),
        network_bytes_per_second=network_bytes_per_second,
        disk_bytes_per_second=disk_bytes_per_second,
        volume_bytes_per_second=volume_bytes_per_second,
    )


@router.get("/idle", operation_id="report_idle")
async def report_idle(
    exports: ExportsDep,
    caller: auth.Caller,
    limits: Annotated[idle.Thresholds, Depends(thresholds)],
    project_id: Name = None,
    region: Name = None,
    resource_type: Name = None,
    reason: idle.Reason | None = None,
    include_unknown: Annotated[
        bool, Query(description="also those of which it cannot be told, and why not")
    ] = False,
    price_book: PriceBookName = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    marker: Annotated[str | None, Query(max_length=2000)] = None,
) -> IdleReport:
    """Resources that are held and that nobody seems to need, with the evidence and what each costs."""
    pricing = await exports.pricing(price_book, caller)
    where = UsageFilter(
        scope=caller.projects, project_id=project_id, region=region, resource_type=resource_type
    )
    now = datetime.now(UTC)
    found = await idle_findings.find(
        exports,
        where,
        limits,
        now=now,
        pricing=pricing,
        reason=reason,
        include_unknown=include_unknown,
        limit=limit,
        marker=marker,
    )
    return IdleReport(
        as_of=now,
        thresholds=_said(limits),
        currency=None if pricing is None else pricing.book.currency,
        examined=found.examined,
        unknown=found.unknown,
        findings=[_finding(one) for one in found.findings],
        next_marker=found.next_marker,
    )


@router.get("/top-projects", operation_id="report_top_projects")
async def report_top_projects(
    exports: ExportsDep,
    caller: auth.Caller,
    start: AwareDatetime,
    end: AwareDatetime,
    by: Annotated[str, Query(max_length=100, description="a measure, or cost")] = "instance_hours",
    price_book: PriceBookName = None,
    region: Name = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 10,
) -> TopProjects:
    """The projects that used most of a measure, or cost most by a price book."""
    asked = window(start, end)
    where = UsageFilter(scope=caller.projects, region=region)
    measures = {item.name: item for item in exports.store.measures}
    if by != COST and by not in measures:
        raise MeasureUnknown(f"there is no measure {by}: there are {', '.join(measures)}, {COST}")
    if by == COST and price_book is None:
        raise BookMissing("say by which price book: price_book")
    pricing = await exports.pricing(price_book, caller) if by == COST else None
    sums: dict[str | None, Fraction] = defaultdict(Fraction)
    unpriced: set[str] = set()
    async with exports.store.snapshot() as snapshot:
        if pricing is None:
            async for lines in snapshot.usage(asked, ["project"], where):
                for line in lines:
                    if line.measure == by:
                        sums[line.group["project"]] += line.amount
        else:
            async for priced in priced_lines(snapshot, asked, ["project"], where, pricing):
                for line, price in priced:
                    if price is None:
                        unpriced.add(line.measure)
                    else:
                        sums[line.group["project"]] += price.cost
    total = sum(sums.values(), Fraction(0))
    largest = heapq.nsmallest(limit, sums.items(), key=lambda item: (-item[1], item[0] or ""))
    is_held = by != COST and measures[by].is_held
    return TopProjects(
        start=asked.start,
        end=asked.end,
        as_of=asked.as_of,
        by=by,
        currency=None if pricing is None else pricing.book.currency,
        unpriced_measures=sorted(unpriced),
        projects=[
            TopProject(
                rank=rank,
                project_id=project,
                amount=None if by == COST else int(amount),
                hours=float(hours(int(amount))) if is_held else None,
                cost=None if pricing is None else money(amount, pricing.book.currency),
                share=round(float(amount / total), 6) if total else 0.0,
            )
            for rank, (project, amount) in enumerate(largest, start=1)
        ],
    )


def _finding(one: idle_findings.Finding) -> Finding:
    candidate, judged, held = one.candidate, one.judged, one.candidate.held
    return Finding(
        region=candidate.region,
        resource_type=held.resource_type,
        resource_id=candidate.resource_id,
        project_id=candidate.project_id,
        user_id=candidate.user_id,
        state_class=held.state_class,
        verdict=judged.verdict,
        reason=judged.reason,
        since=judged.since,
        age_days=one.age_days,
        score=round(float(judged.score), 1),
        evidence=list(judged.evidence),
        cited=[
            Cited(message_id=cited.message_id, event_id=cited.event_id)
            for cited in candidate.opened_by
        ],
        holds=idle.holds(held),
        cost_per_month=one.cost,
    )


def _said(limits: idle.Thresholds) -> IdleThresholds:
    return IdleThresholds(
        **{
            name: float(value) if isinstance(value, Fraction) else value
            for name in IdleThresholds.model_fields
            for value in (getattr(limits, name),)
        }
    )
