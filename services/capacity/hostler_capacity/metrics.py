"""Every Prometheus object of capacity. Labels are bounded: states, classes and outcomes, no hosts."""

from collections import Counter as Tally

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from hostler_capacity import fit


class Metrics:
    """What capacity counts, and what its fleet looks like."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.report_parts = Counter(
            "hostler_capacity_report_parts",
            "Parts of host reports, by what they were: new_report, next_part, duplicate, outdated.",
            ["admission"],
            registry=registry,
        )
        self.nodes_moved = Counter(
            "hostler_capacity_nodes_moved",
            "Nodes that another host reported than before.",
            registry=registry,
        )
        self.nodes_absent = Counter(
            "hostler_capacity_nodes_absent",
            "Nodes that a whole report of their host no longer named.",
            registry=registry,
        )
        self.claims = Counter(
            "hostler_capacity_claims",
            "Steps in the life of claims: granted, refused, confirmed, released, expired.",
            ["outcome"],
            registry=registry,
        )
        self.claim_seconds = Histogram(
            "hostler_capacity_claim_seconds",
            "Time to grant or refuse a claim.",
            buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),
            registry=registry,
        )
        self.imbalances = Gauge(
            "hostler_capacity_imbalances",
            "Counters that differ from the sum of their live claims at the last audit: must be 0.",
            registry=registry,
        )
        self._nodes = Gauge(
            "hostler_capacity_nodes",
            "Nodes by state (up, disabled, unavailable, stale).",
            ["state"],
            registry=registry,
        )
        self._capacity = Gauge(
            "hostler_capacity_limit",
            "What may be taken of all usable nodes, in the unit the class names.",
            ["resource"],
            registry=registry,
        )
        self._used = Gauge(
            "hostler_capacity_used",
            "What is claimed or otherwise used of all usable nodes, in the unit the class names.",
            ["resource"],
            registry=registry,
        )

    def show(self, fleet: fit.Fleet, now: float) -> None:
        """The gauges show this fleet."""
        fresh = now - fleet.received_at <= fleet.stale_seconds
        usable = fleet.usable & fresh
        unusable = Tally(
            fleet.nodes[int(at)].state(now, fleet.stale_seconds) for at in np.flatnonzero(~usable)
        )
        for state in fit.NodeState:
            self._nodes.labels(state).set(unusable[state])
        self._nodes.labels(fit.NodeState.UP).set(int(usable.sum()))
        limit = np.where(usable[:, None], fleet.limit, 0).sum(axis=0)
        used = np.where(usable[:, None], fleet.used, 0).sum(axis=0)
        for name, most, taken in zip(fleet.classes, limit, used, strict=True):
            self._capacity.labels(name).set(int(most))
            self._used.labels(name).set(int(taken))
