"""The bus against a real broker."""

import asyncio
import urllib.parse
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import aio_pika
import pytest
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from hostler_common import bus, errors, servers
from hostler_common.testing import eventually, open_bus

EVENTS = bus.Exchange(name="events")


class Kept:
    """A quarantine that remembers."""

    def __init__(self) -> None:
        self.rows: list[tuple[bus.Delivery, str, str]] = []

    async def put(self, delivery: bus.Delivery, *, code: str, reason: str) -> None:
        self.rows.append((delivery, code, reason))


def queue(name: str = "work", **more: Any) -> bus.Queue:
    options = {"retry_delays_seconds": (1, 1), **more}
    return bus.Queue(
        name=name, bindings=(bus.Binding(exchange=EVENTS, routing_key="thing.#"),), **options
    )


def message(body: str, *, routing_key: str = "thing.happened", **more: Any) -> bus.Message:
    return bus.Message(
        exchange="events",
        routing_key=routing_key,
        body=body.encode(),
        message_id=str(uuid.uuid4()),
        **more,
    )


def subscribe(
    handler: Callable[..., Awaitable[None]],
    *,
    kept: Kept | None = None,
    of: bus.Queue | None = None,
    **more: Any,
) -> bus.Subscription:
    return bus.Subscription(
        queue=of or queue(), handler=handler, quarantine=kept or Kept(), **more
    )


async def test_a_published_message_arrives_with_its_properties(amqp_url: str) -> None:
    got: asyncio.Queue[bus.Delivery] = asyncio.Queue()
    async with open_bus(amqp_url, subscribe(got.put)) as opened:
        sent = message("hello", type="thing.happened", app_id="test", headers={"schema": "1.0"})
        await opened.publish(sent)
        delivery = await asyncio.wait_for(got.get(), 10)
    assert delivery.body == b"hello"
    assert delivery.message_id == sent.message_id
    assert delivery.routing_key == "thing.happened"
    assert delivery.exchange == "events"
    assert delivery.headers["schema"] == "1.0"
    assert delivery.attempt == 1


async def test_a_mandatory_message_without_a_queue_is_unroutable(amqp_url: str) -> None:
    async with open_bus(amqp_url, subscribe(asyncio.Queue[bus.Delivery]().put)) as opened:
        with pytest.raises(bus.Unroutable):
            await opened.publish(message("x", routing_key="nobody", mandatory=True))
        await opened.publish(message("x", routing_key="nobody"))  # an event nobody wants is normal


async def test_a_rejected_message_is_in_quarantine_with_its_body_and_acked(amqp_url: str) -> None:
    kept = Kept()

    async def refuse(delivery: bus.Delivery) -> None:
        raise bus.Reject("not json", code="example.malformed")

    async def quarantined() -> bool:
        return len(kept.rows) == 1

    async with open_bus(amqp_url, subscribe(refuse, kept=kept)) as opened:
        await opened.publish(message("\x00 not json"))
        await eventually(quarantined)
    delivery, code, reason = kept.rows[0]
    assert delivery.body == b"\x00 not json"
    assert (code, reason) == ("example.malformed", "not json")
    assert await depth(amqp_url, "work") == 0


async def test_a_body_over_the_queues_limit_never_reaches_the_handler(amqp_url: str) -> None:
    kept = Kept()
    got: asyncio.Queue[bus.Delivery] = asyncio.Queue()
    small = queue(max_body_bytes=100)

    async def quarantined() -> bool:
        return len(kept.rows) == 1

    async with open_bus(amqp_url, subscribe(got.put, kept=kept, of=small)) as opened:
        await opened.publish_many([message("x" * 101), message("x" * 100)])
        await eventually(quarantined)
        assert len((await asyncio.wait_for(got.get(), 10)).body) == 100
    delivery, code, _ = kept.rows[0]
    assert code == "message.too_large"
    assert len(delivery.body) == 101


async def test_a_failing_message_climbs_the_ladder_and_ends_in_quarantine(amqp_url: str) -> None:
    kept = Kept()
    attempts: list[tuple[int, str, str]] = []

    async def fail(delivery: bus.Delivery) -> None:
        attempts.append((delivery.attempt, delivery.exchange, delivery.routing_key))
        raise ValueError("a bug")

    async def quarantined() -> bool:
        return len(kept.rows) == 1

    async with open_bus(amqp_url, subscribe(fail, kept=kept)) as opened:
        await opened.publish(message("x"))
        await eventually(quarantined)
    assert attempts == [(n, "events", "thing.happened") for n in (1, 2, 3)]
    delivery, code, reason = kept.rows[0]
    assert code == "message.handler_failed"
    assert reason == "ValueError: a bug"
    assert delivery.attempt == 3


async def test_a_retried_message_goes_back_to_its_own_queue_only(amqp_url: str) -> None:
    first: list[int] = []
    other: list[bus.Delivery] = []

    async def once_not_now(delivery: bus.Delivery) -> None:
        first.append(delivery.attempt)
        if delivery.attempt == 1:
            raise bus.Retry("not now")

    async def count(delivery: bus.Delivery) -> None:
        other.append(delivery)

    async def twice() -> bool:
        return first == [1, 2]

    async with open_bus(
        amqp_url, subscribe(once_not_now), subscribe(count, of=queue("other"))
    ) as opened:
        await opened.publish(message("x"))
        await eventually(twice)
    assert len(other) == 1


async def test_poison_in_a_batch_stands_alone_in_quarantine(amqp_url: str) -> None:
    kept = Kept()
    done: list[bytes] = []

    async def handle(deliveries: Sequence[bus.Delivery]) -> None:
        if any(delivery.body == b"poison" for delivery in deliveries):
            raise bus.Reject("poison")
        done.extend(delivery.body for delivery in deliveries)

    async def all_settled() -> bool:
        return len(done) == 99 and len(kept.rows) == 1

    batch = bus.Batch(size=50, seconds=0.2)
    async with open_bus(
        amqp_url, subscribe(handle, kept=kept, batch=batch, prefetch=200)
    ) as opened:
        bodies = [str(n) for n in range(100)]
        bodies[37] = "poison"
        await opened.publish_many([message(body) for body in bodies])
        await eventually(all_settled)
    assert sorted(done) == sorted(body.encode() for body in bodies if body != "poison")
    assert await depth(amqp_url, "work") == 0


async def test_an_outage_of_a_server_wears_out_no_attempts(amqp_url: str) -> None:
    calls: list[int] = []

    async def handle(delivery: bus.Delivery) -> None:
        calls.append(delivery.attempt)
        if len(calls) < 6:
            raise errors.Unavailable("the database is away")

    async def done() -> bool:
        return len(calls) == 6

    kept = Kept()
    async with open_bus(amqp_url, subscribe(handle, kept=kept)) as opened:
        await opened.publish(message("x"))
        await eventually(done)
    assert calls == [1] * 6
    assert not kept.rows


async def test_consuming_goes_on_after_the_queue_was_deleted(amqp_url: str) -> None:
    got: asyncio.Queue[bus.Delivery] = asyncio.Queue()
    async with open_bus(amqp_url, subscribe(got.put)) as opened:
        connection = await aio_pika.connect(amqp_url)
        async with connection:
            channel = await connection.channel()
            await channel.queue_delete("work")  # the broker sends basic.cancel to our consumer

            async def bound_again() -> bool:
                try:
                    await opened.publish(message("x", mandatory=True))
                except errors.HostlerError:
                    return False
                return True

            await eventually(bound_again)
            assert (await asyncio.wait_for(got.get(), 10)).body == b"x"


async def test_who_consumes_is_told_whenever_deliveries_begin_to_come(amqp_url: str) -> None:
    begun: asyncio.Queue[None] = asyncio.Queue()
    got: asyncio.Queue[bus.Delivery] = asyncio.Queue()
    subscription = subscribe(got.put, on_begin=lambda: begun.put_nowait(None))
    async with open_bus(amqp_url, subscription) as opened:
        for _ in range(2):
            await asyncio.wait_for(begun.get(), 30)
            await opened.publish(message("x", mandatory=True))  # it is bound by then
            assert (await asyncio.wait_for(got.get(), 10)).body == b"x"
            async with await aio_pika.connect(amqp_url) as connection:
                await (await connection.channel()).queue_delete("work")
        await asyncio.wait_for(begun.get(), 30)
    assert begun.empty()


async def test_nothing_confirmed_is_lost_when_the_broker_is_stopped_and_killed(
    own_rabbitmq: servers.RabbitMQ,
) -> None:
    seen: set[bytes] = set()

    async def remember(delivery: bus.Delivery) -> None:
        seen.add(delivery.body)

    confirmed: set[bytes] = set()
    async with open_bus(own_rabbitmq.url, subscribe(remember)) as opened:

        async def publish(number: int) -> None:
            one = message(str(number))
            while one.body not in confirmed:
                try:
                    await opened.publish(one)
                    confirmed.add(one.body)
                except bus.BrokerUnavailable:
                    await asyncio.sleep(0.1)

        restarted = asyncio.Event()

        async def publish_all() -> None:
            number = 0
            while not restarted.is_set() or number < 300:
                await asyncio.gather(*(publish(n) for n in range(number, number + 20)))
                number += 20

        publishing = asyncio.create_task(publish_all())

        async def some() -> bool:
            return len(confirmed) >= 60

        await eventually(some)
        for end in (own_rabbitmq.stop, own_rabbitmq.kill):
            before = len(confirmed)
            await asyncio.to_thread(end)
            await asyncio.to_thread(own_rabbitmq.start)

            async def publishing_goes_on(before: int = before) -> bool:
                return len(confirmed) > before + 60

            await eventually(publishing_goes_on)
        restarted.set()
        await asyncio.wait_for(publishing, 60)

        async def all_seen() -> bool:
            return seen == confirmed

        await eventually(all_seen)
        await opened.wait_up(60)


async def test_what_kills_its_consumer_again_and_again_ends_in_quarantine(amqp_url: str) -> None:
    kept = Kept()
    deadly = queue("deadly", delivery_limit=2)

    async def never(delivery: bus.Delivery) -> None:
        raise AssertionError("only the broker hands it out in this test")

    async def quarantined() -> bool:
        return len(kept.rows) == 1

    async with open_bus(
        amqp_url, subscribe(asyncio.Queue[bus.Delivery]().put, of=deadly)
    ) as opened:
        pass  # declares
    connection = await aio_pika.connect(amqp_url)
    async with connection:
        channel = await connection.channel()
        exchange = await channel.get_exchange("events")
        await exchange.publish(aio_pika.Message(b"deadly"), "thing.deadly")
    for _ in range(3):  # a consumer that dies with the delivery in hand
        connection = await aio_pika.connect(amqp_url)
        channel = await connection.channel()
        declared = await channel.get_queue("deadly", ensure=False)

        async def taken(declared: Any = declared) -> bool:
            return await declared.get(no_ack=False, fail=False) is not None

        await eventually(taken)
        await connection.close()
    async with open_bus(amqp_url, subscribe(never, of=deadly, kept=kept)) as opened:
        await eventually(quarantined)
        assert opened.is_up
    delivery, code, _ = kept.rows[0]
    assert code == "message.delivery_limit"
    assert delivery.body == b"deadly"
    assert delivery.queue == "deadly"


async def test_draining_finishes_what_is_being_handled_and_returns_the_rest(amqp_url: str) -> None:
    begun: list[bytes] = []
    finished: list[bytes] = []
    go_on = asyncio.Event()

    async def slow(delivery: bus.Delivery) -> None:
        begun.append(delivery.body)
        await go_on.wait()
        finished.append(delivery.body)

    async def two_begun() -> bool:
        return len(begun) == 2

    async with open_bus(amqp_url, subscribe(slow, concurrency=2, prefetch=10)) as opened:
        await opened.publish_many([message(str(n)) for n in range(6)])
        await eventually(two_begun)
        asyncio.get_running_loop().call_later(0.2, go_on.set)
    assert sorted(finished) == sorted(begun)
    assert await depth(amqp_url, "work") == 6 - len(finished)


async def test_a_foreign_exchange_is_taken_as_it_stands(amqp_url: str) -> None:
    connection = await aio_pika.connect(amqp_url)
    async with connection:
        channel = await connection.channel()
        await channel.declare_exchange("nova", "topic", durable=False)
    foreign = bus.Exchange(name="nova", durable=True, declare=bus.Declare.PASSIVE_FIRST)
    absent = bus.Exchange(name="cinder", durable=False, declare=bus.Declare.PASSIVE_FIRST)
    own = bus.Queue(
        name="own",
        bindings=tuple(
            bus.Binding(exchange=e, routing_key="notifications.*") for e in (foreign, absent)
        ),
    )
    got: asyncio.Queue[bus.Delivery] = asyncio.Queue()
    async with open_bus(amqp_url, subscribe(got.put, of=own)) as opened:
        for name in ("nova", "cinder"):
            await opened.publish(
                bus.Message(
                    exchange=name, routing_key="notifications.info", body=b"x", message_id="1"
                )
            )
            assert (await asyncio.wait_for(got.get(), 10)).exchange == name


async def test_an_exchange_that_exists_otherwise_holds_up_no_other_message(amqp_url: str) -> None:
    connection = await aio_pika.connect(amqp_url)
    async with connection:
        channel = await connection.channel()
        await channel.declare_exchange("fan", "fanout", durable=True)
    ours = bus.Exchange(
        name="fan", type="fanout", durable=False, auto_delete=True, declare_on_publish=True
    )
    opened = bus.Bus(
        SecretStr(amqp_url),
        name="test",
        metrics=bus.BusMetrics(CollectorRegistry()),
        exchanges=(EVENTS, ours),
    )
    async with asyncio.TaskGroup() as group:
        running = group.create_task(opened.run())
        await opened.wait_up(60)
        mismatched = bus.Message(exchange="fan", routing_key="", body=b"x", message_id="1")
        outcomes = await asyncio.gather(
            *(opened.publish(one) for one in (message("a"), mismatched, message("b"))),
            return_exceptions=True,
        )
        assert [type(outcome) for outcome in outcomes] == [type(None), bus.Unroutable, type(None)]
        assert "fan" in str(outcomes[1])
        assert opened.is_up
        running.cancel()


async def test_a_lasting_queue_needs_a_quarantine() -> None:
    metrics = bus.BusMetrics(CollectorRegistry())
    opened = bus.Bus(SecretStr("amqp://nowhere/"), name="x", metrics=metrics)
    with pytest.raises(ValueError, match="needs a quarantine"):
        opened.consume(
            bus.Subscription(
                queue=queue(), handler=asyncio.Queue[bus.Delivery]().put, quarantine=None
            )
        )


async def depth(amqp_url: str, name: str) -> int:
    connection = await aio_pika.connect(amqp_url)
    async with connection:
        channel = await connection.channel()
        declared = await channel.declare_queue(name, passive=True)
        return declared.declaration_result.message_count or 0


async def test_a_message_whose_rung_of_the_ladder_is_gone_is_kept_in_quarantine(
    amqp_url: str,
) -> None:
    kept = Kept()

    async def fail(delivery: bus.Delivery) -> None:
        raise bus.Retry("not now")

    async def quarantined() -> bool:
        return len(kept.rows) == 1

    async with open_bus(amqp_url, subscribe(fail, kept=kept)) as opened:
        connection = await aio_pika.connect(amqp_url)
        async with connection, connection.channel() as channel:
            await channel.queue_delete("work.retry.1s")
        await opened.publish(message("x"))
        await eventually(quarantined)
        assert opened.is_up
    _, code, reason = kept.rows[0]
    assert code == "message.retries_exhausted"
    assert "not now" in reason
    assert "work.retry.1s" in reason


class Gates:
    """A batch handler in which each body waits until the test lets it through; `bad` ones are rejected."""

    def __init__(self, *bodies: bytes, bad: Sequence[bytes] = ()) -> None:
        self.begun: list[bytes] = []
        self.done: list[bytes] = []
        self._bad = set(bad)
        self._gates = {body: asyncio.Event() for body in bodies}

    async def __call__(self, deliveries: Sequence[bus.Delivery]) -> None:
        bodies = [delivery.body for delivery in deliveries]
        self.begun += bodies
        for body in bodies:
            await self._gates[body].wait()
        if self._bad.intersection(bodies):
            raise bus.Reject("bad")
        self.done += bodies

    def let(self, *bodies: bytes) -> None:
        """These go on."""
        for body in bodies:
            self._gates[body].set()

    async def begins(self, *bodies: bytes) -> None:
        """All of these are being handled, or were."""

        async def holds() -> bool:
            return set(bodies) <= set(self.begun)

        await eventually(holds)

    async def ends(self, *bodies: bytes) -> None:
        """All of these were handled."""

        async def holds() -> bool:
            return set(bodies) <= set(self.done)

        await eventually(holds)


def running_bus(
    amqp_url: str, subscription: bus.Subscription
) -> tuple[bus.Bus, "asyncio.Task[None]"]:
    """A bus that the test may end as it likes: nothing is drained."""
    opened = bus.Bus(SecretStr(amqp_url), name="test", metrics=bus.BusMetrics(CollectorRegistry()))
    opened.consume(subscription)
    return opened, asyncio.create_task(opened.run())


async def two_in_flight(opened: bus.Bus, handle: Gates) -> None:
    """`first` is being handled, and `second`, a batch of its own, was."""
    await opened.wait_up(60)
    await opened.publish(message("first"))
    await handle.begins(b"first")
    await opened.publish(message("second"))
    handle.let(b"second")
    await handle.ends(b"second")


async def left(amqp_url: str, name: str) -> int:
    """How many messages the queue has, once its consumers are gone and what they held was returned."""

    async def deserted() -> Any:
        connection = await aio_pika.connect(amqp_url)
        async with connection:
            channel = await connection.channel()
            found = (await channel.declare_queue(name, passive=True)).declaration_result
            return None if found.consumer_count else found

    return (await eventually(deserted)).message_count or 0


ONE_BY_ONE = bus.Batch(size=1, seconds=0.05)


async def test_a_later_batch_is_not_acked_before_the_one_before_it_was_handled(
    amqp_url: str,
) -> None:
    handle = Gates(b"first", b"second")
    opened, running = running_bus(amqp_url, subscribe(handle, batch=ONE_BY_ONE))
    await two_in_flight(opened, handle)
    assert handle.done == [b"second"]
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert await left(amqp_url, "work") == 2


async def test_a_consumer_that_dies_over_a_batch_acks_nothing_that_came_after_it(
    amqp_url: str,
) -> None:
    class Broken(Kept):
        async def put(self, delivery: bus.Delivery, *, code: str, reason: str) -> None:
            raise LookupError("nobody foresaw this")

    handle = Gates(b"first", b"second", bad=[b"first"])
    opened, running = running_bus(amqp_url, subscribe(handle, kept=Broken(), batch=ONE_BY_ONE))
    await two_in_flight(opened, handle)
    handle.let(b"first")
    (died,) = await asyncio.gather(running, return_exceptions=True)
    assert isinstance(died, ExceptionGroup)
    assert died.subgroup(LookupError)
    assert await left(amqp_url, "work") == 2


async def test_a_batch_that_fails_after_the_next_one_was_handled_is_settled_all_the_same(
    amqp_url: str,
) -> None:
    kept = Kept()
    handle = Gates(b"a", b"bad", b"b", b"second", bad=[b"bad"])
    batch = bus.Batch(size=3, seconds=0.3)

    async def all_settled() -> bool:
        return len(handle.done) == 3 and len(kept.rows) == 1

    async with open_bus(amqp_url, subscribe(handle, kept=kept, batch=batch, prefetch=9)) as opened:
        await opened.publish_many([message("a"), message("bad"), message("b")])
        await handle.begins(b"a", b"bad", b"b")
        await opened.publish(message("second"))
        handle.let(b"second")
        await handle.ends(b"second")
        assert (handle.done, kept.rows) == ([b"second"], [])
        handle.let(b"a", b"bad", b"b")
        await eventually(all_settled)
    assert handle.done == [b"second", b"a", b"b"]
    assert [delivery.body for delivery, _, _ in kept.rows] == [b"bad"]
    assert await left(amqp_url, "work") == 0


async def test_poison_in_a_later_batch_is_put_away_in_its_turn(amqp_url: str) -> None:
    kept = Kept()
    handle = Gates(b"first", b"poison", b"good", bad=[b"poison"])

    async def put_away() -> bool:
        return bool(kept.rows)

    async with open_bus(
        amqp_url, subscribe(handle, kept=kept, batch=ONE_BY_ONE, prefetch=9)
    ) as opened:
        await opened.publish(message("first"))
        await handle.begins(b"first")
        await opened.publish_many([message("poison"), message("good")])
        handle.let(b"poison", b"good")
        await handle.begins(b"poison")
        assert not kept.rows
        handle.let(b"first")
        await eventually(put_away)
        await handle.ends(b"first", b"good")
    assert handle.done == [b"first", b"good"]
    assert [delivery.body for delivery, _, _ in kept.rows] == [b"poison"]
    assert await left(amqp_url, "work") == 0


async def test_batches_whose_channel_is_lost_between_them_come_again(
    rabbitmq: servers.RabbitMQ, amqp_url: str
) -> None:
    handle = Gates(b"first", b"second")
    vhost = amqp_url.rsplit("/", 1)[1]

    async def cut() -> bool:
        listed = await asyncio.to_thread(
            rabbitmq.manage, "GET", f"/api/vhosts/{vhost}/connections"
        )
        assert isinstance(listed, list)
        for connection in listed:
            name = urllib.parse.quote(connection["name"], safe="")
            await asyncio.to_thread(rabbitmq.manage, "DELETE", f"/api/connections/{name}")
        return len(listed) == 2

    async def came_again() -> bool:
        return handle.begun.count(b"first") == handle.done.count(b"second") == 2

    async with open_bus(amqp_url, subscribe(handle, batch=ONE_BY_ONE)) as opened:
        await two_in_flight(opened, handle)
        await eventually(cut)
        handle.let(b"first")
        await eventually(came_again)
        await handle.ends(b"first")
        await opened.wait_up(60)  # messages may come before everything is consumed again
    assert sorted(handle.done) == [b"first", b"first", b"second", b"second"]
    assert await left(amqp_url, "work") == 0


async def test_draining_waits_for_both_batches_and_acks_both(amqp_url: str) -> None:
    handle = Gates(b"first", b"second", b"third")
    opened, running = running_bus(amqp_url, subscribe(handle, batch=ONE_BY_ONE))
    await two_in_flight(opened, handle)
    await opened.publish(message("third"))
    draining = asyncio.create_task(opened.drain())
    handle.let(b"first", b"third")
    await draining
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert handle.done == [b"second", b"first"]
    assert await left(amqp_url, "work") == 1
