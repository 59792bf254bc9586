"""What usage has on brokers: one queue of its own for each source, bound to the cloud's exchanges.

The queue is never one that another consumer reads: taking `notifications.info` would steal from
whoever does. The cloud's exchanges are taken as they stand; only one that is absent is declared,
with the durability the source says, for a declaration that differs silences the cloud's services.
"""

from typing import Final

from hostler_common import bus
from hostler_usage.money.budget_messages import BUDGET_THRESHOLD_CROSSED
from hostler_usage.reading.sample import USAGE_SAMPLED
from hostler_usage.settings import Source

# every priority: failed creates come as notifications.error
ROUTING_KEYS: Final = ("notifications.*", "versioned_notifications.*")

EVENTS: Final = bus.Queue(
    name="usage.events",
    bindings=(
        bus.Binding(exchange=bus.HOSTLER, routing_key="baremetal.lease.*"),
        # a host's name has dots, hence the #
        bus.Binding(exchange=bus.HOSTLER, routing_key="usage.sampled.#"),
    ),
    max_body_bytes=None,  # the consumer's setting bounds it
)
"""What hostler's own services and agents say of usage: leases of nodes, samples of domains."""

TOPOLOGY: Final = bus.Topology(
    queues=(EVENTS,),
    publishes=(BUDGET_THRESHOLD_CROSSED,),
    consumes=(USAGE_SAMPLED,),
)


def queue(source: Source) -> bus.Queue:
    """The queue that collects a source's notifications."""
    return bus.Queue(
        name=f"usage.notifications.{source.name}",
        bindings=tuple(
            bus.Binding(exchange=exchange, routing_key=key)
            for exchange in exchanges(source)
            for key in ROUTING_KEYS
        ),
        max_body_bytes=None,  # the consumer's setting bounds it
    )


def replay_queue(source: Source) -> bus.Queue:
    """The same queue on hostler's own virtual host, bound to nothing.

    What is replayed from quarantine arrives there, whichever broker it first came from.
    """
    return bus.Queue(name=queue(source).name, max_body_bytes=None)


def exchanges(source: Source) -> tuple[bus.Exchange, ...]:
    """The cloud's exchanges that a source listens to."""
    return tuple(
        bus.Exchange(name=name, durable=source.durable, declare=bus.Declare.PASSIVE_FIRST)
        for name in source.exchanges
    )


def cloud_topology(source: Source) -> bus.Topology:
    """What usage has on a source's broker."""
    return bus.Topology(queues=(queue(source),), exchanges=exchanges(source))
