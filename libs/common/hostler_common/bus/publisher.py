"""Publishing with confirms, on a connection of its own: a broker's memory alarm stops publishers only."""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import cast

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractConnection, HeadersType
from aio_pika.exceptions import ChannelPreconditionFailed, DeliveryError, PublishError
from pydantic import SecretStr

from hostler_common import errors
from hostler_common.bus.connection import (
    BROKEN,
    BrokerUnavailable,
    Link,
    declare_exchange,
    explain,
)
from hostler_common.bus.delivery import ATTEMPT_HEADER, Delivery, replaying
from hostler_common.bus.metrics import BusMetrics
from hostler_common.bus.topology import Exchange, Message, Queue

PUBLISH_SECONDS = 30.0


class Unroutable(errors.HostlerError):
    """A mandatory message found no queue, or its exchange exists with other arguments than ours."""

    code = "broker.unroutable"


class Publisher:
    """Publishes to the exchanges that it declares. Nothing happens before `run`."""

    def __init__(
        self,
        url: SecretStr,
        *,
        name: str,
        role: str,
        exchanges: Iterable[Exchange],
        metrics: BusMetrics,
    ) -> None:
        self._exchanges = {exchange.name: exchange for exchange in exchanges}
        self._metrics = metrics
        self._link = Link(url, name=name, connected=metrics.connected, role=role)
        self._connection: AbstractConnection | None = None
        self._channel: AbstractChannel | None = None

    @property
    def link(self) -> Link:
        """Its connection."""
        return self._link

    async def run(self) -> None:
        """Keep the connection up until cancelled."""
        await self._link.run(self._begin)

    async def _begin(self, connection: AbstractConnection) -> None:
        for exchange in self._exchanges.values():
            if not exchange.declare_on_publish:
                await declare_exchange(connection, exchange)
        channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
        channel.close_callbacks.add(self._link.broken)
        self._connection, self._channel = connection, channel

    async def publish(self, message: Message) -> None:
        """The broker has taken the message when this returns.

        Raises:
            BrokerUnavailable: no confirm came; the broker may or may not have it, so publishing it again may
                duplicate it.
            Unroutable: it was mandatory and found no queue.
        """
        outcome = "failed"
        try:
            async with asyncio.timeout(PUBLISH_SECONDS):
                await self._publish(message)
            outcome = "confirmed"
        except PublishError as exc:
            raise Unroutable(f"no queue takes {message.routing_key!r}") from exc
        except DeliveryError as exc:  # a nack: the queue's leader is away, or the queue is full
            raise BrokerUnavailable(f"the broker refused the message: {exc}") from exc
        except BROKEN as exc:
            raise BrokerUnavailable(f"the broker cannot be reached: {explain(exc)}") from exc
        finally:
            self._metrics.published.labels(message.exchange or "default", outcome).inc()

    async def publish_many(self, messages: Sequence[Message]) -> None:
        """Publish all of them side by side; every one is confirmed when this returns.

        Raises:
            BrokerUnavailable, Unroutable: as `publish`, for the first that failed.
        """
        for outcome in await asyncio.gather(
            *(self.publish(message) for message in messages), return_exceptions=True
        ):
            if isinstance(outcome, BaseException):
                raise outcome

    async def _publish(self, message: Message) -> None:
        channel = self._channel
        if channel is None or channel.is_closed or not self._link.up.is_set():
            raise BrokerUnavailable(f"the broker cannot be reached: {self._link.detail}")
        exchange = self._exchanges.get(message.exchange)
        if exchange is not None and exchange.declare_on_publish:
            await self._declare_again(exchange)
        target = (
            await channel.get_exchange(message.exchange, ensure=False)
            if message.exchange
            else channel.default_exchange
        )
        await target.publish(
            aio_pika.Message(
                message.body,
                content_type=message.content_type,
                content_encoding=message.content_encoding,
                headers=cast("HeadersType", dict(message.headers)),
                delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
                message_id=message.message_id,
                timestamp=message.timestamp,
                type=message.type,
                app_id=message.app_id,
            ),
            message.routing_key,
            mandatory=message.mandatory,
        )

    async def _declare_again(self, exchange: Exchange) -> None:
        """Declare on a channel of its own: one that the broker refuses would take the other messages along."""
        assert self._connection is not None
        try:
            await declare_exchange(self._connection, exchange)
        except ChannelPreconditionFailed as exc:
            raise Unroutable(f"exchange {exchange.name!r}: {explain(exc)}") from exc

    async def retry(self, queue: Queue, delivery: Delivery) -> bool:
        """Put the delivery on its next rung of the ladder; False if it has used them all."""
        if delivery.attempt > len(queue.retry_delays_seconds):
            return False
        delay = queue.retry_delays_seconds[delivery.attempt - 1]
        message = replaying(delivery, routing_key=queue.retry_name(delay))
        await self.publish(
            replace(message, headers={**message.headers, ATTEMPT_HEADER: delivery.attempt})
        )
        return True
