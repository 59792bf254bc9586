"""Windows, canaries, deadlines and the bound: decided from what is passed in, and right at the edges."""

from collections import Counter
from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler_precache.distribution import bound, rollout
from hostler_precache.distribution.rollout import Verdict, Window

BERLIN = ZoneInfo("Europe/Berlin")
NIGHT = Window(start=time(22), stop=time(6), time_zone="Europe/Berlin")


@pytest.mark.parametrize(
    ("local", "inside"),
    [
        ("2026-11-21 21:59", False),
        ("2026-11-21 22:00", True),
        ("2026-11-22 05:59", True),
        ("2026-11-22 06:00", False),
        # the night in which clocks are put forward, and the one in which they are put back
        ("2026-03-29 03:30", True),
        ("2026-10-25 02:30", True),
    ],
)
def test_a_window_past_midnight_is_open_from_its_start_to_its_stop(
    local: str, inside: bool
) -> None:
    at = datetime.fromisoformat(local).replace(tzinfo=BERLIN)
    assert NIGHT.contains(at.astimezone(UTC)) is inside


def test_a_window_belongs_to_the_day_on_which_it_starts() -> None:
    friday = Window(start=time(22), stop=time(6), days=frozenset({"fri"}))
    assert friday.contains(datetime(2026, 11, 20, 23, tzinfo=UTC))
    assert friday.contains(datetime(2026, 11, 21, 5, tzinfo=UTC))
    assert not friday.contains(datetime(2026, 11, 20, 5, tzinfo=UTC))
    assert not friday.contains(datetime(2026, 11, 21, 23, tzinfo=UTC))


def test_without_windows_it_is_always_open() -> None:
    assert rollout.is_open([], datetime(2026, 1, 1, tzinfo=UTC))


MOMENTS = st.integers(0, 365 * 24 * 60).map(
    lambda minutes: datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=minutes)
)
# the days on which clocks change, in either hemisphere; Lord Howe's by half an hour
CHANGES = st.builds(
    lambda day, minutes: day + timedelta(minutes=minutes),
    st.sampled_from(
        [
            datetime(2026, month, day, tzinfo=UTC)
            for month, day in ((3, 27), (4, 3), (10, 2), (10, 23))
        ]
    ),
    st.integers(0, 3 * 24 * 60),
)
TIMES = st.builds(time, st.integers(0, 23), st.integers(0, 59))
WINDOWS = st.builds(
    Window,
    start=TIMES,
    stop=TIMES,
    time_zone=st.sampled_from(["UTC", "Europe/Berlin", "Australia/Lord_Howe", "Asia/Kathmandu"]),
    days=st.frozensets(st.sampled_from(rollout.DAYS), min_size=1),
)


@given(st.lists(WINDOWS, min_size=1, max_size=2), MOMENTS | CHANGES)
def test_the_next_opening_is_the_first_minute_that_is_open(
    windows: list[Window], at: datetime
) -> None:
    minutes = (at + timedelta(minutes=n) for n in range(8 * 24 * 60))
    first = next((minute for minute in minutes if rollout.is_open(windows, minute)), None)
    found = rollout.next_open(windows, at)
    assert found == first or (first is None and found is not None and found > at)


@pytest.mark.parametrize("zone", ["Mars/Olympus", "", "../etc/passwd", "/etc/passwd", "a\0b"])
def test_a_time_zone_that_there_is_not_is_refused(zone: str) -> None:
    with pytest.raises(ValueError, match="no time zone"):
        Window(start=time(1), stop=time(2), time_zone=zone)


@pytest.mark.parametrize(
    ("states", "verdict"),
    [
        ({}, Verdict.WAIT),
        ({"waiting": 1, "cached": 3}, Verdict.WAIT),
        ({"transferring": 1, "error": 1}, Verdict.WAIT),
        ({"cached": 2, "existing": 1}, Verdict.GO),
        ({"cached": 2, "error": 1}, Verdict.STOP),
        ({"unsupported": 1, "skipped": 1, "cached": 1}, Verdict.GO),
        ({"unsupported": 1, "skipped": 2}, Verdict.NOBODY),
        ({"skipped": 1, "error": 1}, Verdict.STOP),
    ],
)
def test_canaries_decide_when_all_of_them_have_ended(
    states: dict[str, int], verdict: Verdict
) -> None:
    assert rollout.canary_verdict(states) is verdict


STATES = ("waiting", "transferring", "cached", "existing", "error", "unsupported", "skipped")
CANARIES = st.dictionaries(
    st.text("abc", min_size=1, max_size=3),
    st.tuples(st.sampled_from(STATES), st.floats(0, 10_000)),
    min_size=1,
)


@given(CANARIES, st.floats(0, 10_000), st.floats(1, 1000))
def test_a_silent_canary_is_neither_waited_for_nor_its_word_taken(
    canaries: dict[str, tuple[str, float]], listened: float, patience: float
) -> None:
    waited = {
        host: seconds for host, (state, seconds) in canaries.items() if state in rollout.OPEN
    }
    silent = rollout.silent(waited, listened_seconds=listened, patience_seconds=patience)
    assert set(silent) <= waited.keys()
    assert not silent or listened > patience
    after = Counter(
        "skipped" if host in silent else state for host, (state, _) in canaries.items()
    )
    verdict = rollout.canary_verdict(after)
    judges = Counter(
        state for host, (state, _) in canaries.items()
        if host not in silent and state not in ("skipped", "unsupported")
    )  # fmt: skip
    # by the others it is judged as if the silent ones had never been among the canaries
    assert verdict is (rollout.canary_verdict(judges) if judges else Verdict.NOBODY)
    if listened > patience and all(seconds > patience for seconds in waited.values()):
        assert verdict is not Verdict.WAIT


def test_nobody_is_silent_while_nobody_listens() -> None:
    told = {"h1": 1000.0, "h2": 20.0}
    assert rollout.silent(told, listened_seconds=10, patience_seconds=60) == []
    assert rollout.silent(told, listened_seconds=100, patience_seconds=60) == ["h1"]


def test_a_share_is_rounded_up() -> None:
    assert [rollout.share_of(3, percent) for percent in (1, 33, 34, 67, 100)] == [1, 1, 2, 3, 3]


def test_a_deadline_is_met_by_the_share_it_asks_for() -> None:
    states = {"cached": 18, "existing": 1, "error": 1}
    assert rollout.deadline_met(states, 95)
    assert not rollout.deadline_met(states, 96)


MIB = 1 << 20
LINKS = st.dictionaries(st.text("abc", min_size=1), st.integers(1, 10**9), min_size=1)


@given(st.integers(1, 1 << 40), st.integers(1, 10**9), LINKS)
def test_no_bound_is_below_what_any_single_link_allows(
    size: int, seed: int, links: dict[str, int]
) -> None:
    found = bound.bound(size, seed_bytes_per_second=seed, hosts_bytes_per_second=links)
    assert found.seconds >= size / seed
    assert found.seconds >= size / min(links.values())
    assert found.seconds * (seed + sum(links.values())) >= len(links) * size * (1 - 1e-9)


def test_equal_links_give_the_time_of_one_copy_for_any_number_of_hosts() -> None:
    for count in (1, 8, 1000):
        found = bound.bound(
            100 * MIB,
            seed_bytes_per_second=MIB,
            hosts_bytes_per_second={f"h{n}": MIB for n in range(count)},
        )
        assert found.seconds == 100
        assert found.limit is bound.Limit.SEED


def test_a_slow_host_is_named_as_the_limit() -> None:
    found = bound.bound(
        MIB, seed_bytes_per_second=MIB, hosts_bytes_per_second={"fast": MIB, "slow": MIB // 8}
    )
    assert (found.seconds, found.limit, found.slowest_host) == (8, bound.Limit.HOST, "slow")


def test_a_rule_can_be_the_limit() -> None:
    found = bound.bound(
        MIB,
        seed_bytes_per_second=MIB,
        hosts_bytes_per_second={"a": MIB, "b": MIB},
        total_bytes_per_second=MIB // 4,
    )
    assert (found.seconds, found.limit) == (8, bound.Limit.RULE)


def test_what_remains_is_the_slowest_of_the_share_asked_for() -> None:
    paces = [
        bound.Pace(bytes_done=MIB, seconds=1, is_over=True),
        bound.Pace(bytes_done=MIB // 2, seconds=1, is_over=False),
        bound.Pace(bytes_done=MIB // 4, seconds=1, is_over=False),
        bound.Pace(bytes_done=0, seconds=0, is_over=False),
    ]
    assert bound.remaining_seconds(MIB, paces, percent=25) == 0
    assert bound.remaining_seconds(MIB, paces, percent=50) == 1
    assert bound.remaining_seconds(MIB, paces, percent=75) == 3
    assert bound.remaining_seconds(MIB, paces) is None
    assert bound.remaining_seconds(MIB, []) is None


def test_what_takes_longer_than_the_calendar_lasts_has_no_end() -> None:
    now = datetime(2026, 11, 21, tzinfo=UTC)
    assert bound.ends_at(now, 3600) == datetime(2026, 11, 21, 1, tzinfo=UTC)
    assert bound.ends_at(now, 1e12) is None
    assert bound.ends_at(now, 1e300) is None
