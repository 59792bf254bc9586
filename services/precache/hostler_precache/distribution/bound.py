"""How fast a network can carry an image to all its hosts, and how far from that a transfer is.

The fluid bound of Kumar and Ross (2006) for one file from one seed to N receivers that help each
other: T* = max(F / u_seed, F / d_min, N F / (u_seed + sum u_i)). No scheme is faster; a transfer
at 1.06 times T* has 6 % left to gain, and the largest of the terms says what to buy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final

ASSUMED_LINK_BYTES_PER_SECOND: Final = 125_000_000
"""1 Gbit/s, for a host that does not say what its network card can do."""


class Limit(StrEnum):
    """What the bound comes from."""

    SEED = "the seed's uplink"
    HOST = "the slowest host's downlink"
    UPLINKS = "the uplinks of the seed and all hosts together"
    RULE = "the limit of the distribution"
    CLUSTER = "the cluster's bandwidth"
    SOURCE = "the image's source"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """The shortest time in which every host can have the image, and what makes it so long."""

    seconds: float
    limit: Limit
    slowest_host: str | None = None


def bound(
    size_bytes: int,
    *,
    seed_bytes_per_second: int,
    hosts_bytes_per_second: Mapping[str, float],
    total_bytes_per_second: int | None = None,
    cluster_bytes_per_second: int | None = None,
) -> Bound:
    """The bound for hosts whose links are as fast up as down.

    Args:
        size_bytes: what a host without any of it must receive.
        seed_bytes_per_second: of the seed.
        hosts_bytes_per_second: of each host that is to receive it.
        total_bytes_per_second: what all hosts together may receive, by rule.
        cluster_bytes_per_second: what those of all distributions together may; as if there were no other.
    """
    if not hosts_bytes_per_second or not size_bytes:
        return Bound(seconds=0.0, limit=Limit.SEED)
    lowest = min(hosts_bytes_per_second.values())
    slowest = min(host for host, rate in hosts_bytes_per_second.items() if rate == lowest)
    count = len(hosts_bytes_per_second)
    uplinks = seed_bytes_per_second + sum(hosts_bytes_per_second.values())
    terms = [
        (size_bytes / seed_bytes_per_second, Limit.SEED),
        (size_bytes / hosts_bytes_per_second[slowest], Limit.HOST),
        (count * size_bytes / uplinks, Limit.UPLINKS),
    ]
    if total_bytes_per_second is not None:
        terms.append((count * size_bytes / total_bytes_per_second, Limit.RULE))
    if cluster_bytes_per_second is not None:
        terms.append((count * size_bytes / cluster_bytes_per_second, Limit.CLUSTER))
    seconds, limit = max(terms, key=lambda term: term[0])
    return Bound(
        seconds=seconds, limit=limit, slowest_host=slowest if limit is Limit.HOST else None
    )


def with_source(found: Bound, source_seconds: float) -> Bound:
    """The bound where the seed itself has the last byte only after so long."""
    if source_seconds <= found.seconds:
        return found
    return Bound(seconds=source_seconds, limit=Limit.SOURCE)


def ends_at(begins_at: datetime, seconds: float) -> datetime | None:
    """When something ends that takes so long; None where that is beyond the calendar."""
    try:
        return begins_at + timedelta(seconds=seconds)
    except OverflowError:
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """One host's part in a transfer: what it has, and since when it is at it."""

    bytes_done: int
    seconds: float
    is_over: bool


def remaining_seconds(
    size_bytes: int, paces: Sequence[Pace], *, percent: int = 100
) -> float | None:
    """When so many percent of the hosts will have the image, each going on as fast as until now.

    None where so many have not begun, or nothing is known of their speed yet.
    """
    left = []
    for pace in paces:
        if pace.is_over:
            left.append(0.0)
        elif pace.bytes_done > 0 and pace.seconds > 0:
            left.append((size_bytes - pace.bytes_done) * pace.seconds / pace.bytes_done)
        else:
            left.append(float("inf"))
    wanted = max(1, -(-len(left) * percent // 100))
    if len(left) < wanted:
        return None
    found = sorted(left)[wanted - 1]
    return None if found == float("inf") else found
