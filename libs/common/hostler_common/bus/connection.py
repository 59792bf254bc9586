"""One connection to the broker, kept up by sessions, and how exchanges and queues are declared on it."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import aio_pika
import aiormq
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractQueue
from aio_pika.exceptions import (
    AMQPError,
    ChannelInvalidStateError,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
)
from prometheus_client import Gauge
from pydantic import SecretStr

from hostler_common import errors, logs
from hostler_common.bus import decoding
from hostler_common.bus.stream import Connection
from hostler_common.bus.topology import Declare, Exchange, Queue

log = logs.get(__name__)
decoding.install()

BEGIN_SECONDS = 15.0
NO_DELIVERY_LIMIT = 1_000_000_000
FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 5.0

# what aio-pika and aiormq raise when the broker, the connection or the channel is gone: RuntimeError, too
BROKEN = (
    AMQPError,
    aiormq.exceptions.AMQPError,
    ChannelInvalidStateError,
    ConnectionError,
    OSError,
    RuntimeError,
    TimeoutError,
)


class BrokerUnavailable(errors.Unavailable):
    """RabbitMQ cannot be reached, or did not confirm in time; whether it has the message is then unknown."""

    code = "broker.unavailable"


class Link:
    """One connection to the broker, kept up by sessions. ``begin`` declares what the session needs."""

    def __init__(self, url: SecretStr, *, name: str, connected: Gauge, role: str) -> None:
        self._url = url
        self._name = name
        self._connected = connected
        self._role = role
        self._broken = asyncio.Event()
        self.up = asyncio.Event()
        self.detail = "not connected yet"

    def broken(self, *_: object) -> None:
        """The session is over; the next one begins."""
        self._broken.set()

    async def run(self, begin: Callable[[Connection], Awaitable[None]]) -> None:
        """Keep sessions going until cancelled. The first failure and the recovery are logged, each retry is not."""
        pause, failing = FIRST_PAUSE_SECONDS, False
        while True:
            self._broken.clear()
            connection: Connection | None = None
            try:
                async with asyncio.timeout(BEGIN_SECONDS):
                    connection = await aio_pika.connect(
                        self._url.get_secret_value(),
                        client_properties={"connection_name": self._name},
                        connection_class=Connection,
                    )
                    connection.close_callbacks.add(self.broken)
                    await begin(connection)
                self.up.set()
                self._connected.labels(self._role).set(1)
                log.info("broker_connected", connection=self._name, recovered=failing)
                pause, failing = FIRST_PAUSE_SECONDS, False
                await self._broken.wait()
                self.detail = "connection lost"
            except BrokerUnavailable as exc:
                self.detail = exc.detail
            except BROKEN as exc:
                self.detail = explain(exc)
            finally:
                self.up.clear()
                self._connected.labels(self._role).set(0)
                if connection is not None:
                    await _close(connection)
            if not failing:
                log.warning("broker_lost", connection=self._name, reason=self.detail)
            failing = True
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE_SECONDS)


def explain(exc: BaseException) -> str:
    """The broker's error in one line, without passwords."""
    if isinstance(exc, ChannelPreconditionFailed):
        return f"the broker has it with other arguments: {exc}"
    return logs.redact_url(f"{type(exc).__name__}: {exc}")


async def _close(connection: AbstractConnection) -> None:
    try:
        async with asyncio.timeout(5):
            await connection.close()
    except BROKEN as exc:
        log.debug("broker_close_failed", reason=explain(exc))


async def declare_exchange(connection: AbstractConnection, exchange: Exchange) -> None:
    """The exchange exists, as described by us or as it stood.

    Raises:
        aio_pika.exceptions.ChannelPreconditionFailed: it exists otherwise, and we were to declare it.
    """
    if exchange.declare is Declare.PASSIVE_FIRST:
        probe = await connection.channel()  # a failed passive declare closes its channel
        try:
            await probe.declare_exchange(exchange.name, passive=True)
            await probe.close()
            return
        except ChannelNotFoundEntity:
            log.info("exchange_absent", exchange=exchange.name, durable=exchange.durable)
    channel = await connection.channel()
    await _declare_on(channel, exchange)
    await channel.close()


async def _declare_on(channel: AbstractChannel, exchange: Exchange) -> None:
    """The exchange exists as described; one that exists otherwise closes the channel."""
    await channel.declare_exchange(
        exchange.name,
        exchange.type,
        durable=exchange.durable,
        auto_delete=exchange.auto_delete,
        arguments=dict(exchange.arguments) or None,
    )


async def declare_queue(channel: AbstractChannel, queue: Queue) -> AbstractQueue:
    """The queue exists with its bindings, its retry ladder and its dead-letter queue."""
    arguments: dict[str, Any] = {"x-queue-type": queue.type}
    if queue.is_quorum:
        arguments |= {
            "x-delivery-limit": queue.delivery_limit,
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": queue.dead_name,
        }
        await channel.declare_queue(
            queue.dead_name,
            durable=True,
            # RabbitMQ 4 has a limit of 20 where none is said, and behind this queue is nothing
            arguments={"x-queue-type": "quorum", "x-delivery-limit": NO_DELIVERY_LIMIT},
        )
        for delay in queue.retry_delays_seconds:
            await channel.declare_queue(
                queue.retry_name(delay),
                durable=True,
                arguments={
                    "x-queue-type": "quorum",
                    "x-message-ttl": delay * 1000,
                    "x-dead-letter-exchange": "",
                    "x-dead-letter-routing-key": queue.name,
                },
            )
    if queue.expires_ms is not None:
        arguments["x-expires"] = queue.expires_ms
    declared = await channel.declare_queue(
        queue.name,
        durable=not queue.exclusive,
        exclusive=queue.exclusive,
        arguments=arguments,
    )
    for binding in queue.bindings:
        await declared.bind(binding.exchange.name, binding.routing_key)
    return declared
