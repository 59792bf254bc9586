"""Which files make room for another: a decision, made of numbers.

Two limits hold at once. Our own quota counts only what we placed, whatever else fills the disk;
the reserve is what must stay free on the file system, whoever filled it. A file that is wanted or
in use is never given up, and nothing is given up in vain: where it would not be enough, all stays.
"""

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A file of ours. `last_used` is in seconds of any clock, the same for all."""

    name: str
    size_bytes: int
    last_used: float
    is_wanted: bool
    is_in_use: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """How much we may hold. Above `high_bytes` room is made, down to `low_bytes` where it can be."""

    limit_bytes: int
    high_bytes: int
    low_bytes: int

    def __post_init__(self) -> None:
        if not 0 <= self.low_bytes <= self.high_bytes <= self.limit_bytes:
            raise ValueError("0 <= low <= high <= limit")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Files to give up, in this order; none where the limits hold already."""

    evict: tuple[str, ...]
    freed_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """No room can be made: `over_bytes` too much for the quota, or for the disk."""

    over_bytes: int
    is_quota: bool


def plan(
    held: Collection[Held],
    *,
    incoming_bytes: int,
    quota: Quota | None,
    free_bytes: int,
    reserve_bytes: int,
    other_bytes: int = 0,
) -> Plan | Refusal:
    """What to give up, least recently used first, so that `incoming_bytes` more are within limits.

    Args:
        held: what we placed.
        incoming_bytes: what is about to be stored; 0 to keep house only.
        quota: our own; None where there is none.
        free_bytes: what the file system has left.
        reserve_bytes: what it must have left after.
        other_bytes: what counts against the quota and cannot be given up: files on their way.
    """
    used = sum(file.size_bytes for file in held) + other_bytes
    lacking = max(0, incoming_bytes + reserve_bytes - free_bytes) if incoming_bytes else 0
    wished = over = 0
    if quota is not None:
        over = max(0, used + incoming_bytes - quota.limit_bytes)
        if used + incoming_bytes > quota.high_bytes:
            wished = used + incoming_bytes - quota.low_bytes
    evict: list[str] = []
    freed = 0
    for file in sorted(held, key=lambda file: (file.last_used, file.name)):
        if freed >= max(wished, lacking):
            break
        if not file.is_wanted and not file.is_in_use:
            evict.append(file.name)
            freed += file.size_bytes
    if incoming_bytes and over > freed:
        return Refusal(over_bytes=over - freed, is_quota=True)
    if lacking > freed:
        return Refusal(over_bytes=lacking - freed, is_quota=False)
    return Plan(evict=tuple(evict), freed_bytes=freed)
