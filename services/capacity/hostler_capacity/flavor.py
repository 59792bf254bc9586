"""Flavors: the shapes that are sold, and the one function that says what one costs a node.

Everything that prices a guest (a claim, a fit count, a report's guests) goes through `need`, so
that a count can never promise what a claim then refuses.

Bare metal has no guests and no overhead: a node is handed out whole. A flavor of kind `node` is
for such nodes only and a flavor of kind `guest` never lands on one, since a 2 GB guest flavor that
took a 512 GB machine would be a mistake nobody asked for. Which machines serve a `node` flavor is
its `match`: `exact` is the default, as in Nova's Exact*Filters (what is ordered is what is billed);
`at_least` takes anything big enough, for fleets whose firmware keeps a few MB for itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from hostler_capacity import overhead, resources
from hostler_capacity.resources import ResourceClass


class Kind(StrEnum):
    """What a flavor is placed as."""

    GUEST = "guest"
    NODE = "node"


class Match(StrEnum):
    """Which whole nodes serve a flavor of kind `node`."""

    EXACT = "exact"
    AT_LEAST = "at_least"


@dataclass(frozen=True, slots=True, kw_only=True)
class Flavor:
    """What a guest (or the user of a whole node) gets. `extra` holds further resource classes."""

    name: str
    memory_mb: int
    vcpus: int
    disk_gb: int = 0
    extra: Mapping[ResourceClass, int] = field(default_factory=dict)
    vm_type: str | None = None
    kind: Kind = Kind.GUEST
    match: Match = Match.EXACT

    def __post_init__(self) -> None:
        """Refuse a shape that nothing can be divided by, or that says one thing twice."""
        if self.memory_mb < 1 or self.vcpus < 1 or self.disk_gb < 0:
            raise ValueError("a flavor needs memory_mb >= 1, vcpus >= 1 and disk_gb >= 0")
        if set(self.extra) & {resources.MEMORY_MB, resources.VCPUS, resources.DISK_GB}:
            raise ValueError("extra resources cannot repeat memory_mb, vcpus or disk_gb")
        if any(amount < 0 for amount in self.extra.values()):
            raise ValueError("extra resources cannot be negative")

    @property
    def shape(self) -> dict[ResourceClass, int]:
        """What the user gets, without overhead; classes of which it gets nothing are left out."""
        whole = {
            resources.MEMORY_MB: self.memory_mb,
            resources.VCPUS: self.vcpus,
            resources.DISK_GB: self.disk_gb,
            **self.extra,
        }
        return {name: amount for name, amount in whole.items() if amount}


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a placement takes from a node, and which version of which model priced it."""

    vector: Mapping[ResourceClass, int]
    overhead_mb: int
    model_id: overhead.ModelId
    model_version: int


def need(flavor: Flavor, model: overhead.Model) -> Need:
    """Return what one guest of `flavor` takes from a node that `model` prices."""
    extra_mb = model.price_mb(flavor.memory_mb, flavor.vcpus, flavor.vm_type)
    vector = flavor.shape
    vector[resources.MEMORY_MB] = flavor.memory_mb + extra_mb
    return Need(
        vector=vector, overhead_mb=extra_mb, model_id=model.id, model_version=model.version
    )


def need_whole(limits: Mapping[ResourceClass, int], model: overhead.Model) -> Need:
    """Return what taking a whole node takes from it: all it has."""
    return Need(
        vector={name: amount for name, amount in limits.items() if amount},
        overhead_mb=0,
        model_id=model.id,
        model_version=model.version,
    )


def matches_whole(flavor: Flavor, limits: Mapping[ResourceClass, int]) -> dict[ResourceClass, int]:
    """Return, per class that keeps a whole node from serving `flavor`, by how much it is off.

    Positive: the node is too small. Negative: it is bigger than an exact match allows. Empty: it
    serves. A flavor that says nothing of a class (no disk) takes any amount of it.
    """
    off: dict[ResourceClass, int] = {}
    for name, wanted in flavor.shape.items():
        difference = wanted - limits.get(name, 0)
        if difference > 0 or (difference < 0 and flavor.match is Match.EXACT):
            off[name] = difference
    return off
