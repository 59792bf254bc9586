"""RabbitMQ: topology as data, confirmed publishing, and consumers that commit before they ack.

A `Bus` holds two connections, one to consume and one to publish (a broker's memory alarm stops publishers only). Each
lives in *sessions*: connect, declare all that is needed, consume, and when anything of it breaks (connection, channel,
or a ``basic.cancel``), throw the whole session away and begin the next one after a short pause. Since the topology is
data, beginning again is the only recovery there is.

A handler ends in one of three ways, each a type:

- it returns: what it did is committed, and the delivery is acked;
- `Retry`, or any exception that nobody foresaw: the message goes up the queue's retry ladder (``<queue>.retry.<n>s``,
  which gives it back to that queue alone) and, from its last rung, into quarantine;
- `Reject`: into quarantine at once.

`errors.Unavailable` (the database is away) is none of the three: the delivery is kept and tried again in place, so an
outage wears out no attempts. A message whose consumer dies again and again is dead-lettered by the broker after
``delivery_limit`` into ``<queue>.dead``, and from there into quarantine as well. Nothing is ever dropped.
"""

import asyncio
from collections.abc import Sequence

from pydantic import SecretStr

from hostler_common.bus.connection import BrokerUnavailable, Link, declare_exchange
from hostler_common.bus.consumer import Consumer, dead_letter_handler
from hostler_common.bus.delivery import (
    Batch,
    BatchHandler,
    Delivery,
    Handler,
    Quarantine,
    Reject,
    Retry,
    Subscription,
    replaying,
)
from hostler_common.bus.metrics import BusMetrics
from hostler_common.bus.publisher import Publisher, Unroutable
from hostler_common.bus.stream import Connection
from hostler_common.bus.topology import (
    HOSTLER,
    Binding,
    Declare,
    EventType,
    Exchange,
    Message,
    Queue,
    Topology,
)

__all__ = [
    "HOSTLER",
    "Batch",
    "BatchHandler",
    "Binding",
    "BrokerUnavailable",
    "Bus",
    "BusMetrics",
    "Declare",
    "Delivery",
    "EventType",
    "Exchange",
    "Handler",
    "Message",
    "Publisher",
    "Quarantine",
    "Queue",
    "Reject",
    "Retry",
    "Subscription",
    "Topology",
    "Unroutable",
    "replaying",
]


class Bus:
    """The broker, as one process sees it. Nothing happens before `run`."""

    def __init__(
        self,
        url: SecretStr,
        *,
        name: str,
        metrics: BusMetrics,
        exchanges: Sequence[Exchange] = (HOSTLER,),
        connection: str = "broker",
    ) -> None:
        self._metrics = metrics
        self._publisher = Publisher(
            url,
            name=f"{name}.publish",
            role=f"{connection}.publish",
            exchanges=exchanges,
            metrics=metrics,
        )
        self._consuming = Link(
            url,
            name=f"{name}.consume",
            connected=metrics.connected,
            role=f"{connection}.consume",
        )
        self._consumers: list[Consumer] = []
        self._draining = asyncio.Event()

    def consume(self, subscription: Subscription) -> None:
        """Consume the queue from the next session on; call it before `run`.

        Raises:
            ValueError: deliveries of a lasting queue would have no quarantine.
        """
        queue = subscription.queue
        if subscription.quarantine is None and not queue.exclusive:
            raise ValueError(f"queue {queue.name} outlives its consumer and needs a quarantine")
        self._add(subscription)
        if queue.is_quorum and subscription.quarantine is not None:
            self._add(
                Subscription(
                    queue=Queue(name=queue.dead_name, max_body_bytes=None),
                    handler=dead_letter_handler(queue, subscription.quarantine),
                    quarantine=subscription.quarantine,
                    concurrency=1,
                ),
                declare=False,
            )

    def _add(self, subscription: Subscription, *, declare: bool = True) -> None:
        self._consumers.append(
            Consumer(
                subscription,
                publisher=self._publisher,
                metrics=self._metrics,
                draining=self._draining,
                declare=declare,
            )
        )

    @property
    def is_up(self) -> bool:
        """Both connections are up and everything on them is declared and consumed."""
        return self._publisher.link.up.is_set() and (
            not self._consumers or self._consuming.up.is_set()
        )

    def health(self) -> tuple[bool, str]:
        """For readiness: whether the bus works, and if not, why."""
        if self.is_up:
            return True, "connected"
        down = self._consuming if self._publisher.link.up.is_set() else self._publisher.link
        return False, down.detail

    async def run(self) -> None:
        """Keep both connections and every consumer going until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._publisher.run())
            if self._consumers:
                group.create_task(self._consuming.run(self._begin_consuming))
                for consumer in self._consumers:
                    consumer.start(group)

    async def wait_up(self, timeout_seconds: float) -> None:
        """Return when the bus is up.

        Raises:
            BrokerUnavailable: it did not come up in time; the detail says why.
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._publisher.link.up.wait()
                if self._consumers:
                    await self._consuming.up.wait()
        except TimeoutError as exc:
            raise BrokerUnavailable(f"the broker cannot be used: {self.health()[1]}") from exc

    async def drain(self) -> None:
        """Stop consuming and wait for what is being handled; deliveries not begun go back to their queues."""
        self._draining.set()
        await asyncio.gather(*(consumer.drain() for consumer in self._consumers))

    async def publish(self, message: Message) -> None:
        """See `Publisher.publish`."""
        await self._publisher.publish(message)

    async def publish_many(self, messages: Sequence[Message]) -> None:
        """See `Publisher.publish_many`."""
        await self._publisher.publish_many(messages)

    async def _begin_consuming(self, connection: Connection) -> None:
        bound = {
            binding.exchange.name: binding.exchange
            for consumer in self._consumers
            for binding in consumer.queue.bindings
        }
        for exchange in bound.values():
            await declare_exchange(connection, exchange)
        for consumer in self._consumers:
            await consumer.begin(connection, self._consuming.broken)
