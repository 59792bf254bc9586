"""The event that tells of a budget's threshold, and the message that carries it."""

from datetime import datetime
from typing import Final

from pydantic import BaseModel, ConfigDict

from hostler_common import bus
from hostler_usage.money.budget import Subject
from hostler_usage.money.price_store import Crossing


class BudgetThresholdCrossed(BaseModel):
    """That a budget's use reached a threshold in a period; sent once for each of them.

    Once more where the budget was changed, had not reached it then, and reaches it anew.

    Amounts are decimals in `unit`: a currency, or a measure, in unit-hours of what is held.
    """

    model_config = ConfigDict(frozen=True)

    budget: str
    threshold_percent: int
    period_start: datetime
    period_end: datetime
    crossed_at: datetime
    unit: str
    limit: str
    consumed: str
    forecast: str
    project_ids: list[str]
    user_id: str | None
    group_kind: str | None
    group: str | None


BUDGET_THRESHOLD_CROSSED: Final = bus.EventType(
    routing_key="usage.budget.threshold_crossed",
    model=BudgetThresholdCrossed,
    schema="1.0",
    summary="A budget's use reached one of its thresholds in the current period",
)


def crossing_message(
    crossing: Crossing, subject: Subject, *, unit: str, forecast: str
) -> bus.Message:
    """The event about this crossing, ready for the outbox."""
    body = BudgetThresholdCrossed(
        budget=crossing.budget,
        threshold_percent=crossing.threshold,
        period_start=crossing.period_start,
        period_end=crossing.period_end,
        crossed_at=crossing.crossed_at,
        unit=unit,
        limit=crossing.limit,
        consumed=crossing.consumed,
        forecast=forecast,
        project_ids=sorted(subject.projects),
        user_id=subject.user,
        group_kind=subject.group_kind,
        group=subject.group,
    )
    return BUDGET_THRESHOLD_CROSSED.message(body, app_id="usage")
