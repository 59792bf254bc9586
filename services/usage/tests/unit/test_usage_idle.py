"""What is thought of a resource follows from what is known of it, and never from what is missing."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler_usage.exporting.idle import Counted, Held, Reason, Thresholds, Verdict, holds, judge

NOW = datetime(2026, 5, 31, tzinfo=UTC)
DAY = timedelta(days=1)
LIMITS = Thresholds()
WEEK = LIMITS.inactive_days * 86_400


def held(resource_type: str, state_class: str, days: float, **more: Any) -> Held:
    values: dict[str, Any] = {
        "born": NOW - 400 * DAY,
        "since": NOW - days * DAY,
        "attributes": {"vcpus": 2, "disk_gb": 20},
        "activity": {},
        **more,
    }
    return Held(resource_type=resource_type, state_class=state_class, **values)


def counted(total: int, *, p95: Fraction | int | None = None, days: float = 7) -> Counted:
    return Counted(
        samples=100,
        first_at=NOW - days * DAY,
        last_at=NOW,
        total=total,
        p95_per_second=None if p95 is None else Fraction(p95),
    )


def cpu(percent: Fraction | int, *, days: float = 7) -> dict[str, Counted]:
    """Samples that say that of two vCPUs so much was used."""
    return {"cpu_time_ns": counted(1, p95=Fraction(percent) * 2 * 10_000_000, days=days)}


STATES = [
    ("instance", "stopped", 14, Reason.STOPPED),
    ("instance", "suspended", 14, Reason.SUSPENDED),
    ("instance", "paused", 14, Reason.PAUSED),
    ("instance", "shelved", 14, Reason.SHELVED),
    ("instance", "shelved_offloaded", 14, Reason.SHELVED),
    ("instance", "error", 7, Reason.ERROR),
    ("volume", "error", 7, Reason.ERROR),
    ("snapshot", "error", 7, Reason.ERROR),
    ("volume", "available", 14, Reason.UNATTACHED),
    ("floating_ip", "allocated", 7, Reason.UNASSOCIATED),
]


@pytest.mark.parametrize(("kind", "state_class", "days", "reason"), STATES)
def test_a_state_is_found_from_its_threshold_on(
    kind: str, state_class: str, days: int, reason: Reason
) -> None:
    before = judge(held(kind, state_class, days - 0.001), LIMITS, now=NOW)
    assert before.verdict is Verdict.IN_USE
    at = judge(held(kind, state_class, days), LIMITS, now=NOW)
    assert (at.verdict, at.reason, at.score) == (Verdict.IDLE, reason, Fraction(5))
    assert at.since == NOW - days * DAY
    later = judge(held(kind, state_class, 4 * days), LIMITS, now=NOW)
    assert later.score == 10
    assert judge(held(kind, state_class, 40 * days), LIMITS, now=NOW).score == 10


@pytest.mark.parametrize(
    ("kind", "state_class"),
    [
        ("volume", "building"),
        ("floating_ip", "associated"),
        ("network", "active"),
        ("backup", "available"),
    ],
)
def test_what_is_in_use_is_not_found(kind: str, state_class: str) -> None:
    assert judge(held(kind, state_class, 900), LIMITS, now=NOW).verdict is Verdict.IN_USE


# --- activity


@pytest.mark.parametrize(
    ("percent", "verdict", "score"),
    [
        (0, Verdict.IDLE, 10),
        (10, Verdict.IDLE, Fraction(15, 2)),
        (20, Verdict.IN_USE, 0),
        (90, Verdict.IN_USE, 0),
    ],
)
def test_cpu_below_the_threshold_is_idle(percent: int, verdict: Verdict, score: Fraction) -> None:
    found = judge(held("instance", "running", 30, activity=cpu(percent)), LIMITS, now=NOW)
    assert (found.verdict, found.score) == (verdict, score)


@pytest.mark.parametrize(
    ("counter", "limit"),
    [
        ("network_in_bytes", LIMITS.network_bytes_per_second),
        ("network_out_bytes", LIMITS.network_bytes_per_second),
        ("bandwidth_out_bytes", LIMITS.network_bytes_per_second),
        ("disk_write_bytes", LIMITS.disk_bytes_per_second),
    ],
)
def test_traffic_and_disk_take_the_verdict_back(counter: str, limit: int) -> None:
    quiet = {**cpu(1), counter: counted(limit * WEEK - 1)}
    assert judge(held("instance", "running", 30, activity=quiet), LIMITS, now=NOW).reason is (
        Reason.INACTIVE
    )
    busy = {**cpu(1), counter: counted(limit * WEEK)}
    found = judge(held("instance", "running", 30, activity=busy), LIMITS, now=NOW)
    assert found.verdict is Verdict.IN_USE


@pytest.mark.parametrize(
    "activity",
    [
        {},
        {"network_in_bytes": counted(1)},
        {"bandwidth_in_bytes": counted(1), "disk_read_bytes": counted(1)},
        {"cpu_time_ns": counted(1)},  # one sample has no rate
        cpu(1, days=6.2),  # read in less than nine tenths of the time
    ],
)
def test_without_samples_throughout_nothing_is_idle(activity: dict[str, Counted]) -> None:
    found = judge(held("instance", "running", 30, activity=activity), LIMITS, now=NOW)
    assert found.verdict is Verdict.UNKNOWN
    assert found.evidence


def test_a_resource_younger_than_the_days_asked_about_is_in_use() -> None:
    found = judge(held("instance", "running", 6.9, activity=cpu(0)), LIMITS, now=NOW)
    assert found.verdict is Verdict.IN_USE


def test_an_instance_whose_size_is_unknown_is_unknown() -> None:
    found = judge(held("instance", "running", 30, activity=cpu(0), attributes={}), LIMITS, now=NOW)
    assert found.verdict is Verdict.UNKNOWN


def test_a_volume_that_is_read_and_moves_nothing_is_idle() -> None:
    read = (NOW - 7 * DAY, NOW)
    assert judge(held("volume", "in_use", 30), LIMITS, now=NOW).verdict is Verdict.UNKNOWN
    still = judge(held("volume", "in_use", 30, read=read), LIMITS, now=NOW)
    assert (still.verdict, still.reason, still.score) == (
        Verdict.IDLE,
        Reason.INACTIVE,
        Fraction(10),
    )
    limit = LIMITS.volume_bytes_per_second * WEEK
    busy = held("volume", "in_use", 30, read=read, activity={"volume_write_bytes": counted(limit)})
    assert judge(busy, LIMITS, now=NOW).verdict is Verdict.IN_USE


@given(
    st.lists(st.sampled_from(["cpu_time_ns", "network_in_bytes", "disk_read_bytes"]), unique=True)
)
def test_nothing_running_is_idle_unless_its_cpu_was_sampled(counters: list[str]) -> None:
    activity = {**cpu(0), "network_in_bytes": counted(1), "disk_read_bytes": counted(1)}
    some = {name: activity[name] for name in counters}
    found = judge(held("instance", "running", 30, activity=some), LIMITS, now=NOW)
    assert (found.verdict is Verdict.IDLE) == ("cpu_time_ns" in counters)


# --- what was left behind


def test_a_snapshot_is_orphaned_by_the_end_of_its_volume() -> None:
    snapshot = held("snapshot", "available", 300, attributes={"volume": "v1", "size_gb": 5})
    assert judge(snapshot, LIMITS, now=NOW).verdict is Verdict.UNKNOWN
    alive = replace(snapshot, is_source_known=True)
    assert judge(alive, LIMITS, now=NOW).verdict is Verdict.IN_USE
    gone = replace(alive, source_gone_at=NOW - 30 * DAY)
    found = judge(gone, LIMITS, now=NOW)
    assert (found.verdict, found.reason) == (Verdict.IDLE, Reason.ORPHANED)
    assert found.since == NOW - 30 * DAY
    assert found.evidence == ("volume v1 gone since 2026-05-01",)


def test_an_image_is_unused_only_where_sending_is_reported() -> None:
    image = held("image", "active", 400)
    assert judge(image, LIMITS, now=NOW).verdict is Verdict.UNKNOWN
    reported = replace(image, are_uses_reported=True)
    assert judge(reported, LIMITS, now=NOW).reason is Reason.UNUSED
    for used in (
        replace(reported, is_wanted=True),
        replace(reported, activity={"image_sent_bytes": counted(1)}),
        replace(reported, born=NOW - 89 * DAY),
    ):
        assert judge(used, LIMITS, now=NOW).verdict is Verdict.IN_USE


def test_a_shelved_instance_that_is_on_no_host_holds_nothing_there() -> None:
    attributes = {"vcpus": 2, "memory_mb": 2048, "disk_gb": 20, "fixed_ips": 1, "flavor": "m1"}
    stopped = held("instance", "stopped", 30, attributes=attributes)
    assert holds(stopped) == {"vcpus": 2, "memory_mb": 2048, "disk_gb": 20, "fixed_ips": 1}
    assert holds(replace(stopped, state_class="shelved_offloaded")) == {"fixed_ips": 1}
