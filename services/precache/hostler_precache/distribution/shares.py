"""How what all may move together is shared: among distributions, and in each among its hosts.

Everybody gets as much as everybody else, but nobody more than it can take: what one leaves is for the others
(max-min fairness). So a distribution to one host has as large a share as one to a thousand, as far as that host
can take it, and none waits for another to end.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hostler_precache.distribution.distributions import DistributionId


@dataclass(frozen=True, slots=True, kw_only=True)
class Receivers:
    """The hosts that get a distribution now: of each rate that one can take, how many; None where nobody knows it."""

    distribution_id: DistributionId
    total_bytes_per_second: int | None
    hosts: Mapping[int | None, int]

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(self.hosts.values())

    @property
    def most_bytes_per_second(self) -> int | None:
        """What they can take together; None where nobody knows it."""
        own = self.total_bytes_per_second
        known = [most * count for most, count in self.hosts.items() if most is not None]
        if None in self.hosts:
            return own
        return sum(known) if own is None else min(sum(known), own)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """What each host may fetch for each distribution, in bytes a second."""

    hosts_bytes_per_second: Mapping[DistributionId, int]
    newcomer_bytes_per_second: int

    def of(self, distribution_id: DistributionId) -> int:
        """What one host of it may fetch; of one that has just begun, what there is for one host more."""
        return self.hosts_bytes_per_second.get(distribution_id, self.newcomer_bytes_per_second)


def level(amount: int, takers: Mapping[int | None, int]) -> int:
    """The largest whole rate of which all takers together, none above its own, take no more than the amount.

    Where the amount is more than all can take, the rate is the amount itself.

    Args:
        amount: what there is.
        takers: how many can take how much each; None for what is not known.
    """
    left, waiting = amount, sum(takers.values())
    for most in sorted(one for one in takers if one is not None):
        if most * waiting > left:
            break
        left -= most * takers[most]
        waiting -= takers[most]
    return left // waiting if waiting else amount


def share(amount: int, distributions: Sequence[Receivers]) -> Shares:
    """The shares of an amount in bytes a second; each host may have at least one.

    Args:
        amount: what all may move together; no less than there are hosts.
        distributions: those that move, each with its hosts.
    """
    moving = [one for one in distributions if one.count]
    mosts = {one.distribution_id: one.most_bytes_per_second for one in moving}
    each = level(amount, Counter(mosts.values()))
    hosts = {}
    for one in moving:
        most = mosts[one.distribution_id]
        own = each if most is None else min(each, most)
        hosts[one.distribution_id] = max(1, level(own, one.hosts))
    count = sum(one.count for one in moving)
    return Shares(
        hosts_bytes_per_second=hosts, newcomer_bytes_per_second=max(1, amount // (count + 1))
    )
