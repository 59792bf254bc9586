"""Budgets of users: what is read for them, and that it is enough."""

import json
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from typing import Any

from hostler_common import db
from hostler_usage.history.ledger_testing import Ledger, brief_instance
from hostler_usage.history.report_store import ReportStore, UsageFilter
from hostler_usage.history.user_projects_store import projects_of
from hostler_usage.money.budget import Budget, Limit, Period, Subject
from hostler_usage.money.costing import Costing, Wanted
from hostler_usage.money.price_store import PriceStore
from hostler_usage.reading.mapping_file import packaged

USER = "1e3ce043029547f1a61c1996d1a531a2"  # whose instances they are, in both dialects
DAY = datetime(2026, 5, 8, tzinfo=UTC)
HOUR = timedelta(hours=1)
PERIOD = Period(start=DAY, end=DAY + 24 * HOUR)
TIERED: dict[str, Any] = {
    "currency": "EUR",
    "prices": [
        {
            "name": "hours",
            "measure": "instance_hours",
            "tiers": {"steps": [{"up_to": 5, "price": 1}, {"price": "0.1"}]},
        }
    ],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording(ReportStore):
    """Reads, and remembers which usage was asked for."""

    asked: list[UsageFilter] = field(default_factory=list)

    async def usage_by_slice(
        self, edges: Sequence[datetime], groups: Sequence[str], where: UsageFilter, **how: Any
    ) -> AsyncGenerator[Any]:
        self.asked.append(where)
        async for rows in ReportStore.usage_by_slice(self, edges, groups, where, **how):
            yield rows


def of(subject: Subject, limit: Limit) -> Wanted:
    budget = Budget(
        name="b",
        subject=subject,
        limit=limit,
        span=None,
        fixed=PERIOD,
        time_zone=UTC,
        thresholds=(),
    )
    return Wanted(budget=budget, period=PERIOD, as_of=PERIOD.end)


async def ledger_of(pool: db.Pool) -> Ledger:
    """Two users in p1, one of them in p2 too, and a stranger in p3."""
    lives = (
        (brief_instance(1, "p1", DAY), "alice"),
        (brief_instance(2, "p1", DAY), "bob"),
        (brief_instance(3, "p2", DAY), "bob"),
        (brief_instance(4, "p3", DAY), "eve"),
    )
    ledger = Ledger(pool)
    await ledger.told(
        [
            replace(message, payload=json.loads(json.dumps(message.payload).replace(USER, user)))
            for life, user in lives
            for message in life.messages()
        ]
    )
    return ledger


async def test_a_users_budget_reads_the_projects_that_the_user_was_in_and_no_others(
    pool: db.Pool,
) -> None:
    await ledger_of(pool)
    reports = Recording(pool=pool, mapping=packaged())
    store = Costing(reports=reports, prices=PriceStore(pool=pool))
    hours = Limit(amount=Fraction(100), measure="instance_hours")
    for user, consumed, projects in (
        ("alice", 5, {"p1"}),
        ("bob", 10, {"p1", "p2"}),
        ("nobody", 0, set()),
    ):
        (state,) = await store.states([of(Subject(user=user), hours)])
        assert state.consumed == consumed
        where = reports.asked.pop()
        assert where.subjects is not None
        assert where.subjects.projects == projects
    both = [of(Subject(user="alice"), hours), of(Subject(projects=frozenset({"p3"})), hours)]
    assert [state.consumed for state in await store.states(both)] == [5, 5]
    where = reports.asked.pop()
    assert where.subjects is not None
    assert where.subjects.projects == {"p1", "p3"}


async def test_a_users_share_of_tiers_is_reckoned_with_all_that_its_project_used(
    pool: db.Pool,
) -> None:
    ledger = await ledger_of(pool)
    prices = PriceStore(pool=pool)
    await prices.put_book("tiered", TIERED, by="test", replaces=None)
    store = Costing(reports=ledger.reports, prices=prices)
    money = Limit(amount=Fraction(100), price_book="tiered")
    wanted = [of(Subject(user=user), money) for user in ("alice", "bob")]
    alone = [(await store.states([one]))[0].consumed for one in wanted]
    # p1 used ten hours: five at 1, five at 0.1, half of it each; p2 five at 1
    assert alone == [Fraction("2.75"), Fraction("7.75")]
    assert [state.consumed for state in await store.states(wanted)] == alone


async def test_what_is_of_no_known_project_is_not_lost_from_a_users_budget(pool: db.Pool) -> None:
    ledger = await ledger_of(pool)
    async with db.connection(pool) as connection:
        await connection.execute(
            "UPDATE usage_interval SET project_id = NULL WHERE user_id = 'bob' AND project_id = 'p2'"
        )
        # what moved is counted to a project of its own, at a moment when the interval was bob's
        await connection.execute(
            "INSERT INTO usage_amount (region, resource_type, resource_id, counter, label, at, amount,"
            " project_id, evidence) SELECT region, resource_type, resource_id, 'c', '', $1, 7,"
            " 'elsewhere', '[]' FROM usage_interval WHERE user_id = 'bob' AND project_id = 'p1'"
            " LIMIT 1",
            DAY + 2 * HOUR,
        )
    end = PERIOD.end
    assert await projects_of(pool, ["bob"], DAY, end) == {"p1", None, "elsewhere"}
    assert await projects_of(pool, ["bob"], DAY + 3 * HOUR, end) == {"p1", None}
    assert await projects_of(pool, ["bob"], end, end + HOUR) == set()
    store = Costing(reports=ledger.reports, prices=PriceStore(pool=pool))
    hours = Limit(amount=Fraction(100), measure="instance_hours")
    (state,) = await store.states([of(Subject(user="bob"), hours)])
    assert state.consumed == 10
