"""Every Prometheus object of baremetal. Labels are bounded: no node, no address."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from hostler_baremetal.ipmi_client import Counters
from hostler_baremetal.power import PowerState
from hostler_baremetal.store import Counts


class Metrics:
    """What baremetal counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._nodes = Gauge(
            "baremetal_nodes", "Nodes by power state.", ["power_state"], registry=registry
        )
        self._leased = Gauge("baremetal_nodes_leased", "Nodes under a lease.", registry=registry)
        self._latched = Gauge(
            "baremetal_nodes_latched",
            "Nodes whose BMC refused our credentials and is left alone.",
            registry=registry,
        )
        self._unfinished = Gauge(
            "baremetal_operations_unfinished", "Operations under way.", registry=registry
        )
        self.operations = Counter(
            "baremetal_operations",
            "Operations finished, by kind, action and code (ok, or why they failed).",
            ["kind", "action", "code"],
            registry=registry,
        )
        self.operation_seconds = Histogram(
            "baremetal_operation_seconds",
            "From the request of an operation to its end, by kind and action.",
            ["kind", "action"],
            buckets=(0.5, 1, 2, 5, 10, 20, 40, 60, 120, 300, 600),
            registry=registry,
        )
        self.polls = Counter(
            "baremetal_polls", "Looks at a node's power, by outcome.", ["outcome"],
            registry=registry,
        )  # fmt: skip
        self.drifts = Counter(
            "baremetal_power_drifts", "Changes of power that were not ours.", registry=registry
        )
        self.sessions = Gauge(
            "baremetal_bmc_sessions", "IPMI sessions that are open.", registry=registry
        )
        self._commands = Counter(
            "baremetal_bmc_commands",
            "IPMI commands, by name and outcome (ok, refused, lost).",
            ["command", "outcome"],
            registry=registry,
        )
        self._command_seconds = Histogram(
            "baremetal_bmc_command_seconds",
            "Time to a BMC's answer, by command.",
            ["command"],
            buckets=(0.001, 0.005, 0.02, 0.1, 0.4, 1, 3, 10),
            registry=registry,
        )
        self._retransmits = Counter(
            "baremetal_bmc_retransmits", "Packets sent again.", registry=registry
        )
        self._dropped = Counter(
            "baremetal_bmc_packets_dropped",
            "Packets that were malformed, forged, late or repeated.",
            registry=registry,
        )
        self._handshakes = Counter(
            "baremetal_bmc_handshakes", "Tries at a login.", registry=registry
        )

    def command(self, name: str, outcome: str, seconds: float) -> None:
        """Counts a command."""
        self._commands.labels(name, outcome).inc()
        self._command_seconds.labels(name).observe(seconds)

    def count_wire(self, counters: Counters) -> None:
        """Counts what happened in a session, at its end."""
        self._retransmits.inc(counters.retransmits)
        self._dropped.inc(counters.dropped)
        self._handshakes.inc(counters.handshakes)

    def fleet(self, counts: Counts) -> None:
        """Shows the fleet in numbers."""
        for state in PowerState:
            self._nodes.labels(state).set(counts.by_power[state])
        self._leased.set(counts.leased)
        self._latched.set(counts.latched)
        self._unfinished.set(counts.unfinished)
