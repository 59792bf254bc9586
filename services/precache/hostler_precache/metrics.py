"""Every Prometheus object of the service and of its part of the agent."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """What the service counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.fetched_bytes = Counter(
            "precache_fetched_bytes", "Bytes fetched from sources.", registry=registry
        )
        self.fetches = Counter(
            "precache_fetches",
            "Fetches ended, by outcome (ok, or the reason).",
            ["outcome"],
            registry=registry,
        )
        self.seed_sent_bytes = Counter(
            "precache_seed_sent_bytes", "Bytes of pieces sent by this seed.", registry=registry
        )
        self.moved_bytes = Gauge(
            "precache_moved_bytes",
            "Bytes of pieces that hosts have received, by source (seed, rack, outside, wasted).",
            ["source"],
            registry=registry,
        )
        self.distributions = Gauge(
            "precache_distributions", "Distributions, by state.", ["state"], registry=registry
        )
        self.over_bound = Histogram(
            "precache_distribution_over_bound",
            "Of distributions, whenever their last host has ended: their time over the bound of"
            " their network. Again where another host comes later.",
            buckets=(1.02, 1.05, 1.08, 1.1, 1.15, 1.2, 1.3, 1.5, 2, 3, 5, 10),
            registry=registry,
        )
        self.policy_runs = Counter(
            "precache_policy_runs", "Runs of policies, by outcome.", ["outcome"], registry=registry
        )


class AgentMetrics:
    """What a host counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.received_bytes = Counter(
            "precache_agent_received_bytes",
            "Bytes of pieces received, by source (seed, rack, outside, wasted).",
            ["source"],
            registry=registry,
        )
        self.sent_bytes = Counter(
            "precache_agent_sent_bytes", "Bytes of pieces sent to other hosts.", registry=registry
        )
        self.images = Gauge(
            "precache_agent_images", "Images wanted here, by state.", ["state"], registry=registry
        )
        self.held_bytes = Gauge(
            "precache_agent_held_bytes", "Bytes of images placed here.", registry=registry
        )
        self.removed = Counter(
            "precache_agent_removed_images",
            "Images removed from their place, by reason (unwanted, evicted).",
            ["reason"],
            registry=registry,
        )
        self.scrubbed_bytes = Counter(
            "precache_agent_scrubbed_bytes", "Bytes read again to check them.", registry=registry
        )
        self.damaged_pieces = Counter(
            "precache_agent_damaged_pieces",
            "Pieces of placed files that were found damaged.",
            registry=registry,
        )
