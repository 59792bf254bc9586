"""What all distributions may move together: never exceeded, none starved, nothing left that somebody could take."""

import asyncio
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler_precache.distribution import shares
from hostler_precache.distribution.distributions import DistributionId
from hostler_precache.distribution.shares import Receivers, level, share
from hostler_precache.swarming import budget
from hostler_precache.swarming.budget import Budget

ONE, OTHER, THIRD = (DistributionId(uuid.UUID(int=number)) for number in (1, 2, 3))

rates = st.integers(1, 10**10)
takers = st.dictionaries(st.none() | rates, st.integers(1, 10_000), min_size=1, max_size=8)


def taken(each: int, by: Mapping[int | None, int]) -> int:
    """What they take where each may have that much."""
    return sum(n * (each if most is None else min(each, most)) for most, n in by.items())


@given(st.integers(0, 10**12), takers)
def test_a_level_is_the_largest_that_fits(amount: int, by: dict[int | None, int]) -> None:
    each = level(amount, by)
    assert taken(each, by) <= amount
    everybody_is_content = None not in by and each >= max(one or 0 for one in by)
    assert everybody_is_content or taken(each + 1, by) > amount


@st.composite
def moving(draw: st.DrawFn) -> list[Receivers]:
    found = draw(st.lists(st.tuples(st.none() | rates, takers), max_size=12))
    return [
        Receivers(
            distribution_id=DistributionId(uuid.UUID(int=number)),
            total_bytes_per_second=total,
            hosts=hosts,
        )
        for number, (total, hosts) in enumerate(found)
    ]


def used(found: shares.Shares, one: Receivers) -> int:
    """What its hosts fetch, each as much as it may and can."""
    return taken(found.of(one.distribution_id), one.hosts)


@given(st.integers(1_000_000, 10**12), moving())
def test_shares_are_never_above_the_limit_starve_nobody_and_leave_nothing_that_is_wanted(
    amount: int, distributions: list[Receivers]
) -> None:
    found = share(amount, distributions)
    count = sum(one.count for one in distributions)
    total = sum(used(found, one) for one in distributions)
    # a byte a second is the least that a host may have: that may be more than its part
    assert total <= amount + sum(
        one.count for one in distributions if found.of(one.distribution_id) == 1
    )
    wants_more = False
    for one in distributions:
        assert found.of(one.distribution_id) >= 1
        most = one.most_bytes_per_second
        # of each its part, or all that it can take; whole bytes a host are all that is left over
        fair = (
            amount // len(distributions)
            if most is None
            else min(amount // len(distributions), most)
        )
        assert used(found, one) >= fair - one.count
        assert most is None or used(found, one) <= max(most, one.count)
        wants_more |= most is None or used(found, one) < most - one.count
    assert not wants_more or total >= amount - count - len(distributions)


@given(st.integers(1_000_000, 10**12), moving())
def test_who_can_take_more_has_no_less_than_any_other(
    amount: int, distributions: list[Receivers]
) -> None:
    found = share(amount, distributions)
    each = level(amount, Counter(one.most_bytes_per_second for one in distributions))
    for one in distributions:
        most = one.most_bytes_per_second
        if most is None or most > each:
            assert used(found, one) > each - one.count
        else:
            assert used(found, one) > most - one.count


def test_a_host_that_nobody_knew_of_has_what_there_is_for_one_more() -> None:
    found = share(9_000_000, [receivers(ONE, 8)])
    assert (found.of(ONE), found.of(OTHER)) == (9_000_000 // 8, 1_000_000)
    assert share(9_000_000, []).of(ONE) == 9_000_000


def receivers(
    distribution_id: DistributionId, count: int, *, total: int | None = None
) -> Receivers:
    return Receivers(
        distribution_id=distribution_id, total_bytes_per_second=total, hosts={None: count}
    )


@pytest.mark.parametrize(
    ("distributions", "expected"),
    [
        ([receivers(ONE, 3)], [2_000_000]),
        ([receivers(ONE, 1), receivers(OTHER, 3)], [3_000_000, 1_000_000]),
        ([receivers(ONE, 2, total=1_000_000), receivers(OTHER, 5)], [500_000, 1_000_000]),
        ([receivers(ONE, 1), receivers(OTHER, 2), receivers(THIRD, 0)], [3_000_000, 1_500_000]),
    ],
    ids=["alone", "two", "one has a limit of its own", "one without hosts"],
)
def test_each_distribution_has_as_much_as_the_others(
    distributions: list[Receivers], expected: list[int]
) -> None:
    found = share(6_000_000, distributions)
    assert [found.of(one) for one in (ONE, OTHER, THIRD)[: len(expected)]] == expected


class Records:
    """What the database would say, and how often it was asked."""

    def __init__(self) -> None:
        self.moving: Sequence[Receivers] = [receivers(ONE, 2)]
        self.reads = 0
        self.meanwhile: Any = lambda: None

    async def receivers(self, *, within_seconds: float) -> Sequence[Receivers]:
        del within_seconds
        self.reads += 1
        found = self.moving
        await asyncio.sleep(0)
        self.meanwhile()
        return found


def a_budget(records: Records, limit: int | None = 6_000_000) -> Budget:
    return Budget(cast("Any", records), bytes_per_second=limit, member_seconds=30)


async def of(held: Budget, one: DistributionId) -> int:
    found = await held.shares([one])
    assert found is not None
    return found.of(one)


async def test_where_there_is_no_limit_nobody_asks_the_database() -> None:
    records = Records()
    assert await a_budget(records, None).shares([ONE]) is None
    assert records.reads == 0


async def test_a_thousand_hosts_that_ask_at_once_are_one_question() -> None:
    records = Records()
    held = a_budget(records)
    assert await asyncio.gather(*(of(held, ONE) for _ in range(1000))) == [3_000_000] * 1000
    assert records.reads == 1


async def test_what_has_begun_or_changed_is_shared_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    records = Records()
    held = a_budget(records)
    assert await of(held, ONE) == 3_000_000
    records.moving = [receivers(ONE, 2), receivers(OTHER, 1)]
    monkeypatch.setattr(budget, "UNKNOWN_SECONDS", -1.0)
    assert (await of(held, OTHER), await of(held, ONE)) == (3_000_000, 1_500_000)
    records.moving = [receivers(ONE, 2)]  # the other one is paused
    held.forget()
    assert await of(held, ONE) == 3_000_000


async def test_who_asks_about_what_does_not_move_costs_no_question_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    records = Records()
    held = a_budget(records)
    monkeypatch.setattr(budget, "UNKNOWN_SECONDS", -1.0)
    # one is paused, the hosts of another are busy: thousands of them report all the same
    for _ in range(100):
        assert (await of(held, OTHER), await of(held, THIRD)) == (2_000_000, 2_000_000)
        assert await of(held, ONE) == 3_000_000
    assert records.reads == 2
    records.moving = [receivers(OTHER, 2)]
    held.forget()
    assert await of(held, OTHER) == 3_000_000


async def test_what_takes_long_to_read_is_read_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("hostler_precache.swarming.budget.time.monotonic", lambda: now)
    records = Records()

    def pass_a_moment() -> None:
        nonlocal now
        now += 0.5

    records.meanwhile = pass_a_moment
    held = a_budget(records)
    for _ in range(1000):
        await of(held, ONE)
        now += 0.1
    assert now * budget.MOST_OF_THE_TIME * 0.9 < records.reads * 0.5 <= now * 0.055


async def test_what_changes_while_it_is_read_is_read_again() -> None:
    records = Records()
    held = a_budget(records)

    def change() -> None:
        records.moving = [receivers(ONE, 3)]
        records.meanwhile = lambda: None
        held.forget()

    records.meanwhile = change
    await of(held, ONE)
    assert await of(held, ONE) == 2_000_000
