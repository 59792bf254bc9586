"""How many more of a flavor fit where, and why not one more: integer arithmetic over arrays.

A `Fleet` is a snapshot of all nodes as a structure of arrays, taken from the counters in the
database. It is immutable: a refresh makes a new one, so that readers never see half of a change.
Counting over it is exact for the moment it was read (`as_of`); whether a claim is granted is
decided by the database alone, so an old fleet can cost time and never an overcommit.

For a node, the count is the smallest `floor((limit - claimed - foreign) / need)` over the classes
that the flavor needs, with the node's own overhead model in `need`. The class that gives the
smallest count is the one that binds.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from uuid import UUID

import numpy as np
import numpy.typing as npt

from hostler_capacity import flavor as flavors
from hostler_capacity import overhead, resources
from hostler_capacity.claim import NodeId
from hostler_capacity.resources import STANDARD, ResourceClass

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]


class NodeState(StrEnum):
    """Whether a node takes guests. Only `up` does."""

    UP = "up"
    DISABLED = "disabled"
    UNAVAILABLE = "unavailable"
    STALE = "stale"


class Blocker(StrEnum):
    """Why a node takes none of a flavor although nothing of it is short."""

    DISABLED = "disabled"
    UNAVAILABLE = "unavailable"
    STALE = "stale"
    WHOLE_NODE = "whole_node"
    """The node is bare metal, the flavor is for guests."""
    NOT_A_WHOLE_NODE = "not_a_whole_node"
    """The flavor is for bare metal, the node is a hypervisor."""
    NO_MATCH = "no_match"
    """The machine is not what the flavor says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counter:
    """One class of one node: how much may be taken, and by whom it is."""

    limit: int
    claimed: int
    foreign: int

    @property
    def free(self) -> int:
        """What is left; negative where the host is over its limit."""
        return self.limit - self.claimed - self.foreign


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One row of a fleet. `received_at` is the database's clock, in seconds since the epoch."""

    id: NodeId
    host: str
    hypervisor_hostname: str
    node_uuid: UUID | None
    hypervisor_type: str
    bare_metal: bool
    disabled: bool
    available: bool
    received_at: float
    counters: Mapping[ResourceClass, Counter]
    zone: str | None = None
    reported_state: str | None = None

    def state(self, now: float, stale_seconds: float) -> NodeState:
        """Return the node's state when the database's clock says `now`."""
        if self.disabled:
            return NodeState.DISABLED
        if not self.available:
            return NodeState.UNAVAILABLE
        if now - self.received_at > stale_seconds:
            return NodeState.STALE
        return NodeState.UP


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """The class that allows no more: one more would need `short_by` above what is free."""

    resource: ResourceClass
    free: int
    need: int
    short_by: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFit:
    """How many fit on one node, what one takes there, and what keeps out one more."""

    node: Node
    state: NodeState
    count: int
    need: flavors.Need
    binding: Binding | None
    blocker: Blocker | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The counts over a whole fleet, index for index with its nodes."""

    fleet: "Fleet"
    flavor: flavors.Flavor
    now: float
    counts: Int64
    binding: Int64
    columns: tuple[ResourceClass, ...]
    needs: Sequence[flavors.Need]

    @property
    def total(self) -> int:
        """How many fit in all. Never counted over a truncated list."""
        return int(self.counts.sum())

    def best_first(self) -> Iterator[int]:
        """Yield the indices of the nodes that take at least one, the fullest first.

        Filling the fullest node that still has room keeps room for big guests elsewhere; of whole
        nodes the smallest is first, which wastes least. Ties go to the node known for longest.
        """
        where = np.flatnonzero(self.counts > 0)
        rank = self.counts[where]
        if self.flavor.kind is flavors.Kind.NODE:
            rank = self.fleet.limit[where, self.fleet.classes.index(resources.MEMORY_MB)]
        # converted one by one: of ten thousand candidates the first is nearly always taken
        return (int(at) for at in where[np.argsort(rank, kind="stable")])

    def at(self, index: int) -> NodeFit:
        """Return the count of one node, explained."""
        node = self.fleet.nodes[index]
        state = node.state(self.now, self.fleet.stale_seconds)
        limits = {name: counter.limit for name, counter in node.counters.items()}
        model = self.fleet.models[self.fleet.pricing[index]]
        need = self.needs[self.fleet.pricing[index]]
        if self.flavor.kind is flavors.Kind.NODE:
            need = flavors.need_whole(limits, model)
        count = int(self.counts[index])
        blocker = _blocker(node, state, self.flavor, limits)
        binding = None
        if blocker is None:
            name = self.columns[int(self.binding[index])]
            free = node.counters[name].free if name in node.counters else 0
            one = need.vector.get(name, 0)
            short_by = one * (count + 1) - free
            binding = Binding(resource=name, free=free, need=one, short_by=short_by)
        return NodeFit(
            node=node, state=state, count=count, need=need, binding=binding, blocker=blocker
        )


def _blocker(
    node: Node, state: NodeState, flavor: flavors.Flavor, limits: Mapping[ResourceClass, int]
) -> Blocker | None:
    if state is not NodeState.UP:
        return Blocker(state)
    if node.bare_metal and flavor.kind is flavors.Kind.GUEST:
        return Blocker.WHOLE_NODE
    if not node.bare_metal and flavor.kind is flavors.Kind.NODE:
        return Blocker.NOT_A_WHOLE_NODE
    if node.bare_metal and flavors.matches_whole(flavor, limits):
        return Blocker.NO_MATCH
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """All nodes at one moment, as arrays of int64: `[node]` and `[node, class]`.

    `pricing[i]` is the index in `models` of the model that prices node `i`.
    """

    nodes: Sequence[Node]
    index: Mapping[NodeId, int] = field(repr=False)
    models: Sequence[overhead.Model]
    pricing: Int64
    classes: tuple[ResourceClass, ...]
    limit: Int64
    used: Int64
    usable: Bool
    whole: Bool
    received_at: Float64
    as_of: float
    stale_seconds: float

    def fit(self, flavor: flavors.Flavor, now: float) -> Fit:
        """Return how many more of `flavor` fit on each node when the database's clock is `now`."""
        takes = self.usable & (now - self.received_at <= self.stale_seconds)
        needs = [flavors.need(flavor, model) for model in self.models]
        if flavor.kind is flavors.Kind.NODE:
            takes &= self.whole
            counts, binding, columns = self._count_whole(flavor)
        else:
            takes &= ~self.whole
            counts, binding, columns = self._count_guests(flavor, needs)
        return Fit(
            fleet=self,
            flavor=flavor,
            now=now,
            counts=np.where(takes, counts, 0),
            binding=binding,
            columns=columns,
            needs=needs,
        )

    def _count_guests(
        self, flavor: flavors.Flavor, needs: Sequence[flavors.Need]
    ) -> tuple[Int64, Int64, tuple[ResourceClass, ...]]:
        columns = tuple(flavor.shape)
        table = np.array([[need.vector[name] for name in columns] for need in needs])
        per_node = table.reshape(len(needs), len(columns)).astype(np.int64)[self.pricing]
        room = np.maximum(
            self._columns(self.limit, columns) - self._columns(self.used, columns), 0
        )
        each = room // per_node
        return each.min(axis=1), each.argmin(axis=1), columns

    def _count_whole(
        self, flavor: flavors.Flavor
    ) -> tuple[Int64, Int64, tuple[ResourceClass, ...]]:
        wanted = np.array(list(flavor.shape.values()), dtype=np.int64)
        limit = self._columns(self.limit, tuple(flavor.shape))
        fits = limit == wanted if flavor.match is flavors.Match.EXACT else limit >= wanted
        # a whole node has one answer: the class of which most is taken, memory where nothing is
        free = fits.all(axis=1) & (self.used == 0).all(axis=1)
        return free.astype(np.int64), self.used.argmax(axis=1).astype(np.int64), self.classes

    def _columns(self, table: Int64, names: Sequence[ResourceClass]) -> Int64:
        """Return those columns; a class that no node has ever reported is a column of zeros."""
        chosen = np.zeros((len(table), len(names)), dtype=np.int64)
        for at, name in enumerate(names):
            if name in self.classes:
                chosen[:, at] = table[:, self.classes.index(name)]
        return chosen

    def updated(
        self,
        changed: Iterable[Node],
        gone: Iterable[NodeId],
        *,
        catalogue: overhead.Catalogue,
        as_of: float,
    ) -> "Fleet":
        """Return a fleet with these nodes replaced or added, and those taken out.

        Nodes that only changed their numbers are written into copies of the arrays, which at
        10,000 nodes is a hundred times cheaper than building them again.
        """
        rows = {node.id: node for node in changed}
        dropped = {node_id for node_id in gone if node_id in self.index} - rows.keys()
        same_shape = not dropped and all(
            node_id in self.index
            and set(node.counters) <= set(self.classes)
            and catalogue.default_for(node.hypervisor_type)
            is self.models[self.pricing[self.index[node_id]]]
            for node_id, node in rows.items()
        )
        if not same_shape:
            merged = {node.id: node for node in self.nodes if node.id not in dropped} | rows
            return build(
                merged.values(),
                catalogue=catalogue,
                as_of=as_of,
                stale_seconds=self.stale_seconds,
            )
        nodes = list(self.nodes)
        limit, used = self.limit.copy(), self.used.copy()
        usable, received_at = self.usable.copy(), self.received_at.copy()
        for node in rows.values():
            at = self.index[node.id]
            nodes[at] = node
            limit[at], used[at] = _row(node, self.classes)
            usable[at] = node.available and not node.disabled
            received_at[at] = node.received_at
        return replace(
            self,
            nodes=nodes,
            limit=limit,
            used=used,
            usable=usable,
            received_at=received_at,
            as_of=as_of,
        )


def build(
    nodes: Iterable[Node],
    *,
    catalogue: overhead.Catalogue,
    as_of: float,
    stale_seconds: float,
) -> Fleet:
    """Return a fleet of these nodes, in order of their ids."""
    rows = sorted(nodes, key=lambda node: node.id)
    named = {name for node in rows for name in node.counters}
    classes = (*STANDARD, *sorted(named - set(STANDARD)))
    priced_by = [catalogue.default_for(node.hypervisor_type) for node in rows]
    models = list({model.id: model for model in priced_by}.values())
    table = np.array([_row(node, classes) for node in rows], dtype=np.int64)
    table = table.reshape(len(rows), 2, len(classes))
    return Fleet(
        nodes=rows,
        index={node.id: at for at, node in enumerate(rows)},
        models=models,
        pricing=np.array([models.index(model) for model in priced_by], dtype=np.int64),
        classes=classes,
        limit=table[:, 0, :],
        used=table[:, 1, :],
        usable=np.array([node.available and not node.disabled for node in rows], dtype=np.bool_),
        whole=np.array([node.bare_metal for node in rows], dtype=np.bool_),
        received_at=np.array([node.received_at for node in rows], dtype=np.float64),
        as_of=as_of,
        stale_seconds=stale_seconds,
    )


def _row(node: Node, classes: Sequence[ResourceClass]) -> tuple[list[int], list[int]]:
    counters = [node.counters.get(name) for name in classes]
    return (
        [counter.limit if counter else 0 for counter in counters],
        [counter.claimed + counter.foreign if counter else 0 for counter in counters],
    )
