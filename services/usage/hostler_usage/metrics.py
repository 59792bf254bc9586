"""Every Prometheus object of usage. Labels are bounded: sources, outcomes, kinds of problems."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from hostler_usage.reading.event import Tally


class Metrics:
    """What usage counts, and how far behind it is."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.notifications = Counter(
            "hostler_usage_notifications",
            "Notifications read, by what became of them (stored, duplicate).",
            ["source", "outcome"],
            registry=registry,
        )
        self.conflicts = Counter(
            "hostler_usage_conflicts",
            "Message ids that came to stand over several messages; all are kept and counted in.",
            ["source"],
            registry=registry,
        )
        self.unknown_types = Counter(
            "hostler_usage_unknown_types",
            "Notifications stored whose event type no rule knows.",
            ["source"],
            registry=registry,
        )
        self.problems = Counter(
            "hostler_usage_problems",
            "Notifications stored with a field that could not be read.",
            ["source"],
            registry=registry,
        )
        self.late = Counter(
            "hostler_usage_late_notifications",
            "Notifications read an hour or more after they were sent: delivered late, or imported.",
            ["source"],
            registry=registry,
        )
        self.age_seconds = Histogram(
            "hostler_usage_notification_age_seconds",
            "Age of the newest notification of a batch when it was stored.",
            ["source"],
            buckets=(0.1, 0.5, 1, 5, 15, 60, 300, 3600, 86400, 604800),
            registry=registry,
        )
        self.batch_size = Histogram(
            "hostler_usage_batch_notifications",
            "Notifications per transaction.",
            buckets=(1, 5, 20, 50, 100, 200, 500, 1000, 2000, 5000),
            registry=registry,
        )
        self.folded = Counter(
            "hostler_usage_folded_resources",
            "Resources whose history was made anew.",
            registry=registry,
        )
        self.dirty = Gauge(
            "hostler_usage_dirty_resources",
            "Resources touched and not folded yet.",
            registry=registry,
        )
        self.fold_lag_seconds = Gauge(
            "hostler_usage_fold_lag_seconds",
            "How long the resource that has waited longest has waited to be folded.",
            registry=registry,
        )
        self.unpartitioned = Gauge(
            "hostler_usage_unpartitioned_events",
            "Notifications whose time lies outside all partitions: absurd or very old.",
            registry=registry,
        )
        self.unverified_share = Gauge(
            "hostler_usage_unverified_share",
            "Of the hours held in the last settled UTC day, the share that no audit bears out.",
            ["resource_type"],
            registry=registry,
        )
        self.dropped_months = Counter(
            "hostler_usage_dropped_months",
            "Months of messages dropped by retention.",
            registry=registry,
        )
        self.dropped_messages = Counter(
            "hostler_usage_dropped_messages",
            "Messages dropped by retention; what they said is kept.",
            registry=registry,
        )
        self.hub_outcomes = Counter(
            "hostler_usage_hub_outcomes",
            "What became of subscriptions and deliveries of the WebSub hub.",
            ["outcome"],
            registry=registry,
        )

    def conflicts_found(self, found: Mapping[str, int]) -> None:
        """So many message ids, by source, were found to stand over several messages when all months were searched."""
        for source, ids in found.items():
            self.conflicts.labels(source).inc(ids)

    def ingested(self, source: str, tally: Tally, *, late: int, age_seconds: float) -> None:
        """A batch was stored, of which so many were late, and of which the newest had that age."""
        self.notifications.labels(source, "stored").inc(tally.stored)
        self.notifications.labels(source, "duplicate").inc(tally.duplicate)
        self.conflicts.labels(source).inc(tally.conflict)
        self.unknown_types.labels(source).inc(tally.unknown_type)
        self.problems.labels(source).inc(tally.problem)
        self.late.labels(source).inc(late)
        self.age_seconds.labels(source).observe(max(0.0, age_seconds))
        self.batch_size.observe(tally.stored + tally.duplicate)
