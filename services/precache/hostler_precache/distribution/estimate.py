"""How far a distribution is from what its network allows, and when it will be over.

Read from what hosts report, so it is right as far as they are; the bound itself is `bound`'s.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise

from hostler_precache.distribution import bound
from hostler_precache.distribution.distributions import Distribution, HostProgress
from hostler_precache.distribution.rollout import OPEN, PRESENT

# in longer pauses nobody was transferring: who comes then is late, and the network is not slow
IDLE_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """See `distributions_api.EstimateView`."""

    bound_seconds: float
    limit: str
    slowest_host: str | None
    elapsed_seconds: float
    remaining_seconds: float | None
    over_bound: float | None
    ends_at: datetime | None
    is_in_time: bool | None
    cluster_bytes_per_second: int | None = None


def estimate(
    distribution: Distribution,
    hosts: Sequence[HostProgress],
    *,
    seed_bytes_per_second: int,
    cluster_bytes_per_second: int | None = None,
    now: datetime,
) -> Estimate | None:
    """The estimate; None while the size of the image is not known.

    Hosts that had the image before, or cannot get it, receive nothing and count for nothing; nor do
    those that are not there: nobody knows when they come.
    """
    if distribution.size_bytes is None:
        return None
    rollout = distribution.rollout
    receiving = [
        host for host in hosts if host.state == "cached" or (host.state in OPEN and host.is_there)
    ]
    links = {
        host.host: min(
            host.link_bytes_per_second or bound.ASSUMED_LINK_BYTES_PER_SECOND,
            rollout.host_bytes_per_second or math.inf,
        )
        for host in receiving
    }
    found = bound.bound(
        distribution.size_bytes,
        seed_bytes_per_second=seed_bytes_per_second,
        hosts_bytes_per_second=links,
        total_bytes_per_second=rollout.total_bytes_per_second,
        cluster_bytes_per_second=cluster_bytes_per_second,
    )
    found = bound.with_source(found, _source_seconds(distribution, now))
    elapsed = _elapsed_seconds(distribution, receiving, now)
    remaining: float | None = 0.0
    by_deadline: float | None = 0.0
    if not distribution.state.is_over:
        paces = [_pace(host, now) for host in receiving]
        remaining = bound.remaining_seconds(distribution.size_bytes, paces)
        if rollout.deadline_at is not None:
            # of all hosts, as when it is over: those that had it count, those that cannot get it too
            by_deadline = bound.remaining_seconds(
                distribution.size_bytes,
                [_pace(host, now) for host in hosts],
                percent=rollout.deadline_percent,
            )
    over_bound, ends_at = None, distribution.finished_at
    if remaining is not None and found.seconds > 0:
        over_bound = (elapsed + remaining) / found.seconds
        ends_at = ends_at or bound.ends_at(now, remaining)
    return Estimate(
        bound_seconds=found.seconds,
        limit=found.limit.value,
        slowest_host=found.slowest_host,
        elapsed_seconds=elapsed,
        remaining_seconds=remaining,
        over_bound=over_bound,
        ends_at=ends_at,
        is_in_time=_is_in_time(distribution, by_deadline, now),
        cluster_bytes_per_second=cluster_bytes_per_second,
    )


def pace_in_words(distribution: Distribution, found: Estimate | None) -> str:
    """How far it is from the bound, or why it does not move; empty while nobody can tell."""
    if distribution.paused_reason is not None:
        return f"paused: {distribution.paused_reason}"
    if not distribution.is_open:
        return "waits for its window"
    if found is None or found.over_bound is None:
        return ""
    host = f" ({found.slowest_host})" if found.slowest_host else ""
    return f"{found.over_bound:.2f}x; the limit is {found.limit}{host}"


def left_in_words(found: Estimate | None) -> str:
    """How long it still takes; empty where it is over, or nobody can tell."""
    if found is None or not found.remaining_seconds:
        return ""
    seconds = math.ceil(found.remaining_seconds)
    units = [("d", 86400), ("h", 3600), ("min", 60), ("s", 1)]
    for (unit, length), (smaller, part) in pairwise(units):
        if seconds >= length:
            rest = seconds % length // part
            return f"{seconds // length} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{seconds} s"


def _elapsed_seconds(
    distribution: Distribution, receiving: Sequence[HostProgress], now: datetime
) -> float:
    """How long it has been on its way since it was announced, without the times in which all had ended.

    A host that comes a day later takes its own time, and not a day. Until the first host begins the
    time goes on: that nobody is there, and that nobody is sent anything, look the same from here.
    """
    began = distribution.announced_at
    if began is None:
        return 0.0
    until = distribution.finished_at or now
    passed = max(0.0, (until - began).total_seconds())
    if passed <= IDLE_SECONDS:
        return passed
    end = until.timestamp()
    spans = []
    for host in receiving:
        stop = end if host.finished_at is None else host.finished_at.timestamp()
        spans.append((stop if host.started_at is None else host.started_at.timestamp(), stop))
    elapsed, reached = 0.0, began.timestamp()
    for number, (start, stop) in enumerate(sorted(spans)):
        if number and start - reached > IDLE_SECONDS:
            reached = start
        if stop > reached:
            elapsed += stop - reached
            reached = stop
    return elapsed


def _source_seconds(distribution: Distribution, now: datetime) -> float:
    """How long the source takes from the announcement on; 0 where it had ended before."""
    began, fetched_at = distribution.announced_at, distribution.fetched_at
    if began is None or (fetched_at is None and distribution.state.is_over):
        return 0.0
    if fetched_at is not None:
        return max(0.0, (fetched_at - began).total_seconds())
    if not distribution.fetched_bytes:
        return 0.0
    share = distribution.fetched_bytes / (distribution.size_bytes or distribution.fetched_bytes)
    return max(0.0, (now - began).total_seconds()) / share


def _pace(host: HostProgress, now: datetime) -> bound.Pace:
    """How fast it goes on; not at all where it is silent, or cannot get it."""
    seconds = 0.0
    if host.started_at is not None and host.state in OPEN and host.is_there:
        seconds = max(0.0, (now - host.started_at).total_seconds())
    return bound.Pace(bytes_done=host.bytes_done, seconds=seconds, is_over=host.state in PRESENT)


def _is_in_time(
    distribution: Distribution, remaining_seconds: float | None, now: datetime
) -> bool | None:
    deadline_at = distribution.rollout.deadline_at
    if deadline_at is None:
        return None
    if distribution.deadline_met is not None:
        return distribution.deadline_met
    if remaining_seconds is None:
        return None
    ends_at = bound.ends_at(now, remaining_seconds)
    return ends_at is not None and ends_at <= deadline_at
