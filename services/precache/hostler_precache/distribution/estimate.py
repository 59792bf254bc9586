"""How far a distribution is from what its network allows, and when it will be over.

Read from what hosts report, so it is right as far as they are; the bound itself is `bound`'s.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from hostler_precache.distribution import bound
from hostler_precache.distribution.distributions import Distribution, HostProgress
from hostler_precache.distribution.rollout import OPEN

_TRANSFERRED = OPEN | {"cached"}


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


def estimate(
    distribution: Distribution,
    hosts: Sequence[HostProgress],
    *,
    seed_bytes_per_second: int,
    now: datetime,
) -> Estimate | None:
    """The estimate; None while the size of the image is not known.

    Hosts that had the image before, or cannot get it, receive nothing and count for nothing.
    """
    if distribution.size_bytes is None:
        return None
    rollout = distribution.rollout
    receiving = [host for host in hosts if host.state in _TRANSFERRED]
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
    )
    found = bound.with_source(found, _source_seconds(distribution, now))
    began = distribution.announced_at
    until = distribution.finished_at or now
    elapsed = max(0.0, (until - began).total_seconds()) if began is not None else 0.0
    remaining: float | None = 0.0
    by_deadline: float | None = 0.0
    if not distribution.state.is_over:
        paces = [_pace(host, now) for host in receiving]
        remaining = bound.remaining_seconds(distribution.size_bytes, paces)
        if rollout.deadline_at is not None:
            by_deadline = bound.remaining_seconds(
                distribution.size_bytes, paces, share=rollout.deadline_percent / 100
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
    )


def in_words(
    *,
    paused_reason: str | None,
    is_open: bool,
    over_bound: float | None,
    limit: str | None,
    slowest_host: str | None,
    remaining_seconds: float | None = None,
) -> str:
    """How far a distribution is from the bound, or why it does not move; empty while nobody can tell."""
    if paused_reason is not None:
        return f"paused: {paused_reason}"
    if not is_open:
        return "waits for its window"
    if over_bound is None:
        return ""
    host = f" ({slowest_host})" if slowest_host else ""
    left = f", {remaining_seconds:.0f} s left" if remaining_seconds else ""
    return f"{over_bound:.2f}x; the limit is {limit}{host}{left}"


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
    seconds = (now - host.started_at).total_seconds() if host.started_at is not None else 0.0
    return bound.Pace(
        bytes_done=host.bytes_done, seconds=max(0.0, seconds), is_over=host.state not in OPEN
    )


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
