"""What a node has and what on it is not ours: from one report and the live claims to counters.

A node's room in one resource class is `limit - claimed - foreign`:

- `limit` is what the operator lets us fill: `(total - reserved) * ratio`, reserve first, in
  integers. Bare metal is never handed out twice: its ratio is 1.
- `claimed` is the sum of the live claims' vectors. Only claims change it (store.py).
- `foreign` is what the host reports as used and no live claim covers. Only reports change it.

A guest that is ours must not count twice, and one that is not must count once:

1. *A listed guest whose uuid is the consumer of a live claim on this node* is covered: the claim
   counts already. If the guest is bigger than its claims (it was resized behind our back), the
   excess is foreign.
2. *Any other listed guest* is foreign, with the overhead the hypervisor reports for it, else the
   node's model's. That includes the guest of a claim that expired: it runs, so it takes room.
3. *What the host says is used beyond all its listed guests* (a leak, an unlisted domain) is
   foreign as well. Total and list are one snapshot, so no timing can blur the difference.
4. *Where a class is not listed per guest* (disk; everything, when the host cannot list guests)
   the reported total is compared with the claims whose guest that total must contain: those of
   listed guests, or, without a list, those confirmed `CONFIRMED_BEFORE` or longer before the
   report was taken. A younger claim may or may not be in the total; it counts beside it until the
   next report. Room may be understated for one report interval; it is never overstated.

So `claimed + foreign >= reported used` always holds, and so does `>= claimed`: both are counted,
and the larger rules.

Bare metal is whole or nothing: any reported use takes all of a node. A claim on it covers that use
while it lives; when it ends on a node that is still reported as taken (leased, say), the node
stays full until a report says that it is free. A guest's claim, in contrast, is believed when it
is released: its room is free at once, and if the guest still runs, the next report says so.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from hostler_capacity import overhead, resources
from hostler_capacity.resources import ResourceClass

CONFIRMED_BEFORE: Final = timedelta(seconds=10)
"""How far a host's clock may be ahead of the database's before rule 4 could be fooled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """A guest that a hypervisor lists."""

    uuid: UUID
    memory_mb: int
    vcpus: int
    vm_type: str | None = None
    overhead_mb: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedNode:
    """One node as its host reported it. `guests` is None where the host cannot list them."""

    hypervisor_hostname: str
    node_uuid: UUID | None
    hypervisor_type: str
    bare_metal: bool
    total: Mapping[ResourceClass, int]
    reserved: Mapping[ResourceClass, int]
    used: Mapping[ResourceClass, int]
    guests: Sequence[Guest] | None
    disabled: bool
    available: bool
    state: str | None
    zone: str | None
    traits: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratios:
    """How far each class may be filled, in percent of what is left after the reserve."""

    percent: Mapping[ResourceClass, int] = field(default_factory=dict)

    def of(self, name: ResourceClass) -> int:
        """Return the percentage for a class; 100 where none is set."""
        return self.percent.get(name, 100)


def limits(node: ReportedNode, ratios: Ratios) -> dict[ResourceClass, int]:
    """Return how much of each class may be taken: whole units, rounded down, never negative."""
    return {
        name: max(0, total - node.reserved.get(name, 0))
        * (100 if node.bare_metal else ratios.of(name))
        // 100
        for name, total in node.total.items()
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveClaim:
    """The part of a live claim that matters here."""

    consumer_id: UUID
    vector: Mapping[ResourceClass, int]
    confirmed_at: datetime | None


def foreign(
    node: ReportedNode,
    *,
    live: Iterable[LiveClaim],
    model: overhead.Model,
    limit: Mapping[ResourceClass, int],
    reported_at: datetime,
) -> dict[ResourceClass, int]:
    """Return what of each class the report says is used and no live claim covers.

    `live` are the live claims on this node. The rules are in the module's docstring.
    """
    live = list(live)
    if node.bare_metal:
        taken = is_taken(node) and not live
        return {name: amount if taken else 0 for name, amount in limit.items()}
    result = dict.fromkeys(limit, 0)
    present = _present(node, live, reported_at)
    listed: dict[ResourceClass, int] = {}
    if node.guests is not None:
        covered = _by_consumer(live)
        for guest in node.guests:
            cover = covered.get(guest.uuid, {})
            for name, amount in _price(guest, model).items():
                listed[name] = listed.get(name, 0) + amount
                # what covers one guest covers no second of the same uuid
                spent = min(amount, cover.get(name, 0))
                if spent:
                    cover[name] -= spent
                result[name] = result.get(name, 0) + amount - spent
    for name, used in node.used.items():
        known = listed.get(name)
        if known is None:
            known = sum(each.vector.get(name, 0) for each in present)
        result[name] = result.get(name, 0) + max(0, used - known)
    return result


def is_taken(node: ReportedNode) -> bool:
    """Return whether a bare-metal node is in use, by whatever it reports."""
    return node.bare_metal and any(node.used.values())


def running(node: ReportedNode) -> frozenset[UUID]:
    """Return the guests that the host lists: a held claim for one of them is as good as confirmed."""
    return frozenset(guest.uuid for guest in node.guests or ())


def _present(
    node: ReportedNode, live: Sequence[LiveClaim], reported_at: datetime
) -> list[LiveClaim]:
    if node.guests is not None:
        names = running(node)
        return [each for each in live if each.consumer_id in names]
    before = reported_at - CONFIRMED_BEFORE
    return [each for each in live if each.confirmed_at is not None and each.confirmed_at <= before]


def _by_consumer(live: Iterable[LiveClaim]) -> dict[UUID, dict[ResourceClass, int]]:
    sums: dict[UUID, dict[ResourceClass, int]] = {}
    for each in live:
        vector = sums.setdefault(each.consumer_id, {})
        for name, amount in each.vector.items():
            vector[name] = vector.get(name, 0) + amount
    return sums


def _price(guest: Guest, model: overhead.Model) -> dict[ResourceClass, int]:
    extra_mb = guest.overhead_mb
    if extra_mb is None:
        extra_mb = model.price_mb(guest.memory_mb, guest.vcpus, guest.vm_type)
    return {resources.MEMORY_MB: guest.memory_mb + extra_mb, resources.VCPUS: guest.vcpus}
