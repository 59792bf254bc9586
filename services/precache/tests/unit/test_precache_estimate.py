"""How far a distribution is from the bound, from what its hosts have said."""

import uuid
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler_precache.distribution import estimate as module
from hostler_precache.distribution.distributions import (
    Distribution,
    DistributionId,
    DistributionState,
    HostProgress,
)
from hostler_precache.distribution.estimate import estimate, left_in_words, pace_in_words
from hostler_precache.distribution.rollout import Rollout

BEGAN = datetime(2026, 11, 21, tzinfo=UTC)
LINK = 100
SIZE = 1000


def after(seconds: float) -> datetime:
    return BEGAN + timedelta(seconds=seconds)


def distribution_of(**fields: Any) -> Distribution:
    values: dict[str, Any] = {
        "distribution_id": DistributionId(uuid.UUID(int=1)), "image_id": "image", "blob_id": None,
        "policy_id": None, "hosts": None, "labels": {}, "percent": None, "rollout": Rollout(),
        "wave": 1, "is_open": True, "paused_reason": None, "deadline_met": None, "priority": 0,
        "state": DistributionState.DISTRIBUTING, "reason": None, "failures": 0,
        "last_failure": None, "retry_at": None, "size_bytes": SIZE, "fetched_bytes": SIZE,
        "fetched_at": BEGAN, "verification": "hash", "seed_sent_bytes": 0, "peers_sent_bytes": 0,
        "host_states": {}, "created_at": BEGAN, "announced_at": BEGAN, "finished_at": None,
    }  # fmt: skip
    return Distribution(**(values | fields))


def host_of(name: str, **fields: Any) -> HostProgress:
    values: dict[str, Any] = {
        "host": name, "is_there": True, "state": "cached", "reason": None, "pieces_done": 0, "bytes_done": SIZE,
        "sent_bytes": 0, "received_from_seed_bytes": 0, "received_from_peers_bytes": 0,
        "received_from_rack_bytes": 0, "wasted_bytes": 0, "coverage": "", "wave": 1,
        "link_bytes_per_second": LINK, "started_at": None, "updated_at": BEGAN,
        "finished_at": None,
    }  # fmt: skip
    return HostProgress(**(values | fields))


def found(distribution: Distribution, *hosts: HostProgress, now: float = 0) -> module.Estimate:
    result = estimate(distribution, hosts, seed_bytes_per_second=LINK, now=after(now))
    assert result is not None
    return result


def done(seconds: float) -> Mapping[str, Any]:
    return {"state": DistributionState.DONE, "finished_at": after(seconds)}


def test_what_all_hosts_took_is_set_against_the_bound() -> None:
    hosts = [
        host_of("a", started_at=after(0.5), finished_at=after(11)),
        host_of("b", started_at=after(1), finished_at=after(12)),
    ]
    result = found(distribution_of(**done(12)), *hosts, now=999)
    assert (result.bound_seconds, result.elapsed_seconds, result.over_bound) == (10, 12, 1.2)
    assert result.ends_at == after(12)


def test_a_host_that_comes_a_day_later_adds_its_own_time_and_not_the_day() -> None:
    day = 86400
    hosts = [
        host_of("a", started_at=after(1), finished_at=after(12)),
        host_of("late", started_at=after(day), finished_at=after(day + 11)),
    ]
    result = found(distribution_of(**done(day + 11)), *hosts, now=2 * day)
    assert result.over_bound == pytest.approx(2.3)
    moving = host_of("late", state="transferring", started_at=after(day), bytes_done=500)
    result = found(distribution_of(), hosts[0], moving, now=day + 5)
    assert result.remaining_seconds == pytest.approx(5)
    assert result.over_bound == pytest.approx(2.2)


def test_of_an_image_so_small_that_nobody_said_it_was_on_its_way_the_end_is_known() -> None:
    hosts = [host_of("a", finished_at=after(2)), host_of("b", finished_at=after(3))]
    assert found(distribution_of(**done(3)), *hosts, now=99).elapsed_seconds == 3


def test_while_hosts_wait_the_time_goes_on() -> None:
    waiting = [host_of(name, state="waiting", bytes_done=0) for name in "ab"]
    result = found(distribution_of(), *waiting, now=30)
    assert (result.elapsed_seconds, result.remaining_seconds) == (30, None)
    assert pace_in_words(distribution_of(), result) == ""


def test_hosts_that_are_not_there_keep_nobody_from_knowing_when_the_others_have_it() -> None:
    hosts = [
        host_of("a", state="transferring", started_at=after(0), bytes_done=500),
        host_of("dead", state="waiting", bytes_done=0, is_there=False),
        host_of("died", state="transferring", started_at=after(0), bytes_done=1, is_there=False),
        host_of("had it", started_at=after(0), finished_at=after(5), is_there=False),
    ]
    result = found(distribution_of(), *hosts, now=5)
    assert (result.remaining_seconds, result.over_bound) == (5, 1)
    came = host_of("dead", state="waiting", bytes_done=0)
    assert found(distribution_of(), *hosts, came, now=5).remaining_seconds is None


@pytest.mark.parametrize(
    ("percent", "others", "is_in_time"),
    [
        (50, ["error"], True),
        (51, ["error"], None),  # one of two is not enough, and the other one never gets it
        (50, ["existing"], True),
        (100, ["existing"], True),
        (34, ["error", "skipped"], None),
        (33, ["error", "skipped"], True),
        (7, ["error"] * 13, True),  # of 14 hosts 7 percent is one
        (8, ["error"] * 13, None),
    ],
)
def test_a_deadline_is_reckoned_as_it_will_be_judged(
    percent: int, others: list[str], is_in_time: bool | None
) -> None:
    moving = host_of("a", state="transferring", started_at=after(0), bytes_done=500)
    rest = [host_of(f"h{n}", state=state, bytes_done=0) for n, state in enumerate(others)]
    rollout = Rollout(deadline_at=after(60), deadline_percent=percent)
    assert found(distribution_of(rollout=rollout), moving, *rest, now=5).is_in_time is is_in_time


TIMES = st.floats(0, 500, allow_nan=False)


@given(st.lists(st.tuples(TIMES, TIMES), min_size=1, max_size=8))
def test_the_time_taken_is_never_more_than_has_passed_nor_less_than_any_host_took(
    spans: list[tuple[float, float]],
) -> None:
    ordered = [(min(span), max(span)) for span in spans]
    hosts = [
        host_of(f"h{number}", started_at=after(start), finished_at=after(stop))
        for number, (start, stop) in enumerate(ordered)
    ]
    end = max(stop for _, stop in ordered)
    elapsed = found(distribution_of(**done(end)), *hosts, now=600).elapsed_seconds
    assert max(stop - start for start, stop in ordered) <= elapsed + 1e-3
    assert elapsed <= end + 1e-3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"paused_reason": "by root"}, "paused: by root"),
        ({"is_open": False}, "waits for its window"),
        ({}, "1.20x; the limit is the seed's uplink"),
        ({"size_bytes": None}, ""),
    ],
)
def test_how_far_it_is_is_one_sentence(fields: dict[str, Any], words: str) -> None:
    record = distribution_of(**done(12), **fields)
    host = host_of("a", started_at=after(1), finished_at=after(12), link_bytes_per_second=200)
    result = estimate(record, [host], seed_bytes_per_second=LINK, now=after(12))
    assert pace_in_words(record, result) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, ""), (0.0, ""), (0.2, "1 s"), (59.1, "1 min"), (61.0, "1 min 1 s"), (3600.0, "1 h"),
        (5000.0, "1 h 23 min"), (86400.0, "1 d"), (200_000.0, "2 d 7 h"),
    ],
)  # fmt: skip
def test_how_long_it_takes_is_told_in_two_units_at_most(seconds: float | None, words: str) -> None:
    result = module.Estimate(
        bound_seconds=1, limit="", slowest_host=None, elapsed_seconds=0, over_bound=None,
        remaining_seconds=seconds, ends_at=None, is_in_time=None,
    )  # fmt: skip
    assert left_in_words(result) == words
