"""The search for resources that nobody seems to need, over the ledger as of one moment."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Final

from hostler_usage.exporting import idle, idle_store
from hostler_usage.exporting.exports import Exports
from hostler_usage.exporting.focus_pricing import Pricing
from hostler_usage.exporting.idle_store import Candidate
from hostler_usage.history.report_store import UsageFilter
from hostler_usage.money.rating import money

MOST_EXAMINED: Final = 5000
_EXAMINED_AT_ONCE: Final = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A resource, the judgement on it, and what it costs in 30 days as it is; None without a price."""

    candidate: Candidate
    judged: idle.Judgement
    age_days: int  # since it was last known to be needed
    cost: Decimal | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """A page of findings: how many resources were looked at for it, and of how many it cannot be told."""

    findings: Sequence[Finding]
    examined: int
    unknown: int
    next_marker: str | None


async def find(
    exports: Exports,
    where: UsageFilter,
    limits: idle.Thresholds,
    *,
    now: datetime,
    pricing: Pricing | None,
    reason: idle.Reason | None,
    include_unknown: bool,
    limit: int,
    marker: str | None,
) -> Findings:
    """A page of at most `limit` findings; fewer, where `MOST_EXAMINED` resources were looked at.

    Raises:
        BadMarker: the marker is not of this list.
        DatabaseUnavailable: the database is away.
    """
    found: list[Finding] = []
    examined = unknown = 0
    async with exports.store.snapshot() as snapshot:
        while True:
            page = await idle_store.candidates(
                snapshot.connection, where, limits, now=now, limit=_EXAMINED_AT_ONCE, marker=marker
            )
            for candidate in page:
                examined += 1
                marker = candidate.marker
                judged = idle.judge(candidate.held, limits, now=now)
                is_unknown = judged.verdict is idle.Verdict.UNKNOWN
                unknown += is_unknown
                is_asked_for = (
                    (include_unknown and reason is None)
                    if is_unknown
                    else (judged.verdict is idle.Verdict.IDLE and reason in (None, judged.reason))
                )
                if is_asked_for:
                    cost = None if pricing is None else _cost(candidate, pricing, now)
                    age = 0 if judged.since is None else (now - judged.since).days
                    found.append(
                        Finding(candidate=candidate, judged=judged, age_days=age, cost=cost)
                    )
                if len(found) == limit:
                    break
            is_over = len(found) < limit and len(page) < _EXAMINED_AT_ONCE
            if is_over or len(found) == limit or examined >= MOST_EXAMINED:
                break
    return Findings(
        findings=found,
        examined=examined,
        unknown=unknown,
        next_marker=None if is_over else marker,
    )


def _cost(candidate: Candidate, pricing: Pricing, now: datetime) -> Decimal | None:
    held = candidate.held
    group = {
        "region": candidate.region,
        "project": candidate.project_id,
        "user": candidate.user_id,
        "type": held.resource_type,
        "resource": candidate.resource_id,
        "state_class": held.state_class,
    }
    monthly = pricing.month(group, held.attributes, start=now)
    return None if monthly is None else money(monthly, pricing.book.currency)
