"""One queue at work: an inbox that sessions fill, workers that empty it, and every end that a delivery can have."""

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, cast

import aiormq
from aiormq.abc import DeliveredMessage

from hostler_common import errors, logs
from hostler_common.bus.connection import (
    BROKEN,
    FIRST_PAUSE_SECONDS,
    LONGEST_PAUSE_SECONDS,
    BrokerUnavailable,
    declare_queue,
    explain,
)
from hostler_common.bus.delivery import (
    BatchHandler,
    Delivery,
    Handler,
    Quarantine,
    Reject,
    Retry,
    Subscription,
    delivered,
    name_or,
)
from hostler_common.bus.metrics import BusMetrics
from hostler_common.bus.publisher import Publisher, Unroutable
from hostler_common.bus.stream import Connection, Incoming
from hostler_common.bus.topology import Queue

log = logs.get(__name__)

CONSUME_SECONDS = 5.0
BATCHES_IN_FLIGHT = 2


def dead_letter_handler(queue: Queue, quarantine: Quarantine) -> Handler:
    """A handler that puts what the broker gave up on into quarantine, as a message of its first queue."""

    async def keep(delivery: Delivery) -> None:
        exchange, routing_key = delivery.exchange, delivery.routing_key
        if (
            routing_key == queue.dead_name
        ):  # it came straight, not by the ladder, which keeps the origin
            exchange, routing_key = _first_death(delivery.headers) or (exchange, routing_key)
        origin = delivery._replace(queue=queue.name, exchange=exchange, routing_key=routing_key)
        await quarantine.put(
            origin,
            code="message.delivery_limit",
            reason=f"its consumer failed {queue.delivery_limit} times without an answer",
        )

    return keep


def _first_death(headers: Mapping[str, Any]) -> tuple[str, str] | None:
    """Exchange and routing key before the broker dead-lettered the message (its ``x-death`` header)."""
    deaths = headers.get("x-death")
    if not isinstance(deaths, list) or not deaths or not isinstance(deaths[-1], dict):
        return None
    keys = deaths[-1].get("routing-keys")
    first_key = keys[0] if isinstance(keys, list) and keys else None
    return name_or(deaths[-1].get("exchange"), ""), name_or(first_key, "")


class Received(NamedTuple):
    """A delivery, and what settles it: its channel and its tag there."""

    delivery: Delivery
    channel: aiormq.abc.AbstractChannel
    tag: int

    @property
    def is_stale(self) -> bool:
        """Its channel is gone: it cannot be settled, and the broker hands it out again."""
        return self.channel.is_closed


class _Turn:
    """A batch's place in the order of acks: a multiple ack takes along everything before it."""

    def __init__(self, before: "_Turn | None") -> None:
        self._before = before
        self._over = asyncio.Event()
        self._abandoned: aiormq.abc.AbstractChannel | None = None

    async def comes(self, channel: aiormq.abc.AbstractChannel) -> None:
        """Everything before this batch is settled.

        Raises:
            _Abandoned: something before it on this channel was left unsettled, and must stay so.
        """
        if self._before is None:
            return
        await self._before._over.wait()
        if self._before._abandoned is channel:
            self._abandoned = channel
            raise _Abandoned("what came before it was left unsettled")
        self._before = None

    def abandon(self, channel: aiormq.abc.AbstractChannel) -> None:
        """This batch is left unsettled, and so is what comes after it on its channel."""
        self._abandoned = channel

    async def end(self) -> None:
        """The next batch's turn comes, once this one's has."""
        if self._before is not None:
            await self._before._over.wait()
            self._before = None
        self._over.set()


class Consumer:
    """One subscription at work: an inbox that sessions fill, and workers that empty it."""

    def __init__(
        self,
        subscription: Subscription,
        *,
        publisher: Publisher,
        metrics: BusMetrics,
        draining: asyncio.Event,
        declare: bool = True,
    ) -> None:
        self._subscription = subscription
        self._publisher = publisher
        self._metrics = metrics
        self._draining = draining
        self._declare = declare
        self._inbox: asyncio.Queue[Received] = asyncio.Queue()
        self._session: tuple[aiormq.abc.AbstractChannel, str] | None = None
        self._collecting = asyncio.Lock()
        self._last_turn: _Turn | None = None
        self._busy = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def queue(self) -> Queue:
        """The queue it consumes."""
        return self._subscription.queue

    def start(self, group: asyncio.TaskGroup) -> None:
        """Start the workers: for batches, one that reads while another writes; else as many as asked for."""
        workers = BATCHES_IN_FLIGHT if self._subscription.batch else self._subscription.concurrency
        for _ in range(workers):
            group.create_task(self._work())

    async def begin(self, connection: Connection, broken: Callable[..., None]) -> None:
        """Declare the queue and consume it, on a channel of this session."""
        if self._draining.is_set():
            return
        channel = await connection.channel()
        channel.close_callbacks.add(broken)
        await channel.set_qos(self._subscription.prefetch)
        if self._declare:
            await declare_queue(channel, self.queue)
        underlay = cast("aiormq.Channel", await channel.get_underlay_channel())
        # the broker cancels a consumer when its queue is deleted or its node goes away
        underlay.on_consumer_cancel_callbacks.add(broken)
        connection.take_deliveries(underlay, partial(self._receive, underlay))
        try:
            async with asyncio.timeout(CONSUME_SECONDS):
                consuming = await underlay.basic_consume(self.queue.name, _taken_before)
        except TimeoutError as exc:
            # a quorum queue without a leader answers a declare, and lets basic.consume wait for ever
            raise BrokerUnavailable(
                f"queue {self.queue.name} has no leader to consume from"
            ) from exc
        assert consuming.consumer_tag is not None
        self._session = (underlay, consuming.consumer_tag)
        self._subscription.on_begin()

    def _receive(self, channel: aiormq.abc.AbstractChannel, incoming: Incoming) -> None:
        delivery = delivered(self.queue.name, incoming)
        self._inbox.put_nowait(Received(delivery, channel, incoming.tag))

    async def drain(self) -> None:
        """Take no more, and wait until nothing is being handled."""
        if self._session is not None:
            channel, tag = self._session
            try:
                await channel.basic_cancel(tag, timeout=5)
            except BROKEN as exc:
                log.info("consumer_cancel_failed", queue=self.queue.name, reason=explain(exc))
        await self._idle.wait()

    async def _work(self) -> None:
        while True:
            async with self._collecting:
                received = await self._collect()
                turn = self._take_turn()
            if self._draining.is_set():
                turn.abandon(received[-1].channel)
                await turn.end()
                continue  # left unacked: the broker hands it to another consumer
            self._busy += 1
            self._idle.clear()
            try:
                await self._settle([one for one in received if not one.is_stale], turn)
            except _Abandoned as exc:
                turn.abandon(received[-1].channel)
                log.info("deliveries_abandoned", queue=self.queue.name, reason=str(exc))
            except BaseException:
                # the next batch may come to its turn before it is cancelled, too: it must ack nothing
                turn.abandon(received[-1].channel)
                raise
            finally:
                await turn.end()
                self._busy -= 1
                if not self._busy:
                    self._idle.set()

    def _take_turn(self) -> _Turn:
        """The place of what was just collected; single deliveries are acked one by one, in any order."""
        turn = _Turn(self._last_turn)
        if self._subscription.batch is not None:
            self._last_turn = turn
        return turn

    async def _collect(self) -> list[Received]:
        received = [await self._inbox.get()]
        batch = self._subscription.batch
        if batch is None:
            return received
        loop = asyncio.get_running_loop()
        deadline = loop.time() + batch.seconds
        while len(received) < batch.size:
            if not self._inbox.empty():
                received.append(self._inbox.get_nowait())
                continue
            try:
                async with asyncio.timeout_at(deadline):
                    received.append(await self._inbox.get())
            except TimeoutError:
                break
        return received

    async def _settle(self, received: list[Received], turn: _Turn) -> None:
        """Handle them all, halving a batch that fails until the bad message stands alone."""
        if not received:
            return
        channel = received[-1].channel
        try:
            await self._handle(received)
        except _Abandoned:
            raise  # nothing after it may be acked: a multiple ack would take it along
        except Exception as exc:  # noqa: BLE001  every end of a handler is one of the outcomes
            await turn.comes(channel)
            if len(received) == 1:
                await self._settle_bad(received[0], exc)
                return
            half = len(received) // 2
            await self._settle(received[:half], turn)
            await self._settle(received[half:], turn)
            return
        await turn.comes(channel)
        await self._ack(received[-1], multiple=self._subscription.batch is not None)
        self._metrics.deliveries.labels(self.queue.name, "ok").inc(len(received))

    async def _handle(self, received: list[Received]) -> None:
        """Run the handler, waiting in place while a server that it needs is away.

        Raises:
            Reject: a body is larger than any that is meant.
        """
        limit = self.queue.max_body_bytes
        if limit is not None and any(len(one.delivery.body) > limit for one in received):
            raise Reject(f"a body may have {limit} bytes", code="message.too_large")
        pause = FIRST_PAUSE_SECONDS
        trace = logs.valid_traceparent(received[0].delivery.headers.get("traceparent"))
        logs.traceparent.set(trace or logs.new_traceparent())
        while True:
            try:
                with self._metrics.handling_seconds.labels(self.queue.name).time():
                    if self._subscription.batch is not None:
                        handle_batch = cast("BatchHandler", self._subscription.handler)
                        await handle_batch([one.delivery for one in received])
                    else:
                        handle = cast("Handler", self._subscription.handler)
                        await handle(received[0].delivery)
                return
            except errors.Unavailable as exc:
                if pause == FIRST_PAUSE_SECONDS:
                    log.warning("handler_waits", queue=self.queue.name, reason=exc.detail)
                if self._draining.is_set():
                    raise _Abandoned("stopping while a server is away") from exc
                await asyncio.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE_SECONDS)
                if all(one.is_stale for one in received):
                    raise _Abandoned("the channel is gone, they come again") from exc

    async def _settle_bad(self, received: Received, exc: Exception) -> None:
        delivery = received.delivery
        while True:
            try:
                outcome = await self._send_away(delivery, exc)
                break
            except errors.Unavailable as unavailable:
                if received.is_stale or self._draining.is_set():
                    raise _Abandoned("it could not be put away") from unavailable
                log.warning("settling_waits", queue=self.queue.name, reason=unavailable.detail)
                await asyncio.sleep(1.0)
        self._metrics.deliveries.labels(self.queue.name, outcome).inc()
        await self._ack(received)

    async def _send_away(self, delivery: Delivery, exc: Exception) -> str:
        """Put the delivery on the ladder or into quarantine, and say which."""
        queue = self.queue
        if isinstance(exc, Reject):
            code, reason = exc.code, exc.reason
        else:
            if isinstance(exc, Retry):
                code, reason = "message.retries_exhausted", exc.reason
            else:
                code, reason = "message.handler_failed", f"{type(exc).__name__}: {exc}"
                log.error(
                    "handler_failed", queue=queue.name, attempt=delivery.attempt, exc_info=exc
                )
            try:
                if queue.is_quorum and await self._publisher.retry(queue, delivery):
                    return "retry"
            except (
                Unroutable
            ) as unroutable:  # somebody deleted that rung: the next session declares it again
                reason = f"{reason}; {unroutable.detail}"
        quarantine = self._subscription.quarantine
        log.warning(
            "message_quarantined" if quarantine else "message_refused",
            queue=queue.name,
            routing_key=delivery.routing_key,
            message_id=delivery.message_id,
            code=code,
            reason=reason,
        )
        if quarantine is not None:
            await quarantine.put(delivery, code=code, reason=reason)
        return "quarantined"

    async def _ack(self, received: Received, *, multiple: bool = False) -> None:
        try:
            await received.channel.basic_ack(received.tag, multiple=multiple)
        except BROKEN as exc:
            # committed but not acked: it comes again, and the handler's idempotence absorbs it
            log.info("ack_failed", queue=self.queue.name, reason=explain(exc))


async def _taken_before(message: DeliveredMessage) -> None:
    raise AssertionError(f"{message} was not taken from the stream")


class _Abandoned(Exception):
    """The delivery is left unsettled: its channel is gone or the process stops."""
