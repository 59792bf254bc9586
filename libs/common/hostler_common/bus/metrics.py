"""What the bus counts."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class BusMetrics:
    """What the bus counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.deliveries = Counter(
            "hostler_deliveries",
            "Deliveries settled, by queue and outcome (ok, retry, quarantined).",
            ["queue", "outcome"],
            registry=registry,
        )
        self.handling_seconds = Histogram(
            "hostler_delivery_handling_seconds",
            "Time a handler took for a delivery or a batch.",
            ["queue"],
            registry=registry,
        )
        self.published = Counter(
            "hostler_messages_published",
            "Messages published, by exchange and outcome (confirmed, failed).",
            ["exchange", "outcome"],
            registry=registry,
        )
        self.connected = Gauge(
            "hostler_broker_connected",
            "1 while the connection is up and everything on it is declared.",
            ["connection"],
            registry=registry,
        )
