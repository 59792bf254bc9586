"""Room is made from what nobody wants or uses, the oldest first, and never in vain."""

import random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from hostler_precache.placing import eviction
from hostler_precache.placing.eviction import Held, Plan, Quota, Refusal

SIZES = st.integers(0, 1000)


@st.composite
def helds(draw: st.DrawFn) -> list[Held]:
    names = draw(st.lists(st.text("abcdef", min_size=1, max_size=3), unique=True, max_size=8))
    return [
        Held(
            name=name,
            size_bytes=draw(SIZES),
            last_used=draw(st.integers(0, 5)),
            is_wanted=draw(st.booleans()),
            is_in_use=draw(st.booleans()),
        )
        for name in names
    ]


@st.composite
def quotas(draw: st.DrawFn) -> Quota | None:
    if draw(st.booleans()):
        return None
    low, high, limit = sorted(draw(st.tuples(SIZES, SIZES, st.integers(0, 4000))))
    return Quota(limit_bytes=limit, high_bytes=high, low_bytes=low)


@st.composite
def situations(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "incoming_bytes": draw(SIZES),
        "quota": draw(quotas()),
        "free_bytes": draw(SIZES),
        "reserve_bytes": draw(SIZES),
        "other_bytes": draw(SIZES),
    }


def evictable(held: list[Held]) -> list[Held]:
    free = [file for file in held if not file.is_wanted and not file.is_in_use]
    return sorted(free, key=lambda file: (file.last_used, file.name))


@given(held=helds(), situation=situations())
def test_what_goes_is_a_run_of_the_least_recently_used_of_what_nobody_wants_or_uses(
    held: list[Held], situation: dict[str, Any]
) -> None:
    found = eviction.plan(held, **situation)

    if isinstance(found, Plan):
        expected = evictable(held)[: len(found.evict)]
        assert list(found.evict) == [file.name for file in expected]
        assert found.freed_bytes == sum(file.size_bytes for file in expected)


@given(held=helds(), situation=situations())
def test_after_a_plan_both_limits_hold_for_what_is_coming(
    held: list[Held], situation: dict[str, Any]
) -> None:
    found = eviction.plan(held, **situation)

    if isinstance(found, Plan) and situation["incoming_bytes"]:
        free = situation["free_bytes"] + found.freed_bytes - situation["incoming_bytes"]
        assert free >= situation["reserve_bytes"]
        if situation["quota"] is not None:
            held_bytes = sum(file.size_bytes for file in held) - found.freed_bytes
            used = held_bytes + situation["other_bytes"] + situation["incoming_bytes"]
            assert used <= situation["quota"].limit_bytes


@given(held=helds(), situation=situations())
def test_a_refusal_means_that_giving_up_everything_would_not_be_enough(
    held: list[Held], situation: dict[str, Any]
) -> None:
    found = eviction.plan(held, **situation)

    if isinstance(found, Refusal):
        freed = sum(file.size_bytes for file in evictable(held))
        held_bytes = sum(file.size_bytes for file in held) - freed
        used = held_bytes + situation["other_bytes"] + situation["incoming_bytes"]
        free = situation["free_bytes"] + freed - situation["incoming_bytes"]
        if found.is_quota:
            assert used - situation["quota"].limit_bytes == found.over_bytes > 0
        else:
            assert situation["reserve_bytes"] - free == found.over_bytes > 0


@given(held=helds(), situation=situations())
def test_nothing_goes_that_did_not_have_to(held: list[Held], situation: dict[str, Any]) -> None:
    found = eviction.plan(held, **situation)

    if isinstance(found, Plan) and found.evict:
        sizes = {file.name: file.size_bytes for file in held}
        without_last = found.freed_bytes - sizes[found.evict[-1]]
        quota, incoming = situation["quota"], situation["incoming_bytes"]
        used = sum(sizes.values()) + situation["other_bytes"] + incoming - without_last
        is_over_low = quota is not None and used > quota.low_bytes
        free = situation["free_bytes"] + without_last - incoming
        assert is_over_low or (incoming and free < situation["reserve_bytes"])


@given(held=helds(), situation=situations(), order=st.randoms())
def test_the_order_of_listing_decides_nothing(
    held: list[Held], situation: dict[str, Any], order: random.Random
) -> None:
    shuffled = held.copy()
    order.shuffle(shuffled)

    assert eviction.plan(shuffled, **situation) == eviction.plan(held, **situation)


@given(held=helds(), quota=quotas(), other=SIZES)
def test_keeping_house_below_the_high_mark_removes_nothing_and_never_refuses(
    held: list[Held], quota: Quota | None, other: int
) -> None:
    found = eviction.plan(
        held, incoming_bytes=0, quota=quota, free_bytes=0, reserve_bytes=10**9, other_bytes=other
    )

    assert isinstance(found, Plan)
    used = sum(file.size_bytes for file in held) + other
    if quota is None or used <= quota.high_bytes:
        assert found.evict == ()
