"""The outbox between a real PostgreSQL and a real RabbitMQ."""

import asyncio
import json
from datetime import UTC, datetime
from typing import Any

import aio_pika
import pytest
from prometheus_client import CollectorRegistry

from hostler_common import bus, db, outbox
from hostler_common.testing import eventually, open_bus


def event(number: int, **more: Any) -> bus.Message:
    options = {"exchange": "hostler", "routing_key": "example.thing.made", **more}
    return bus.Message(body=b"%d" % number, message_id=str(number), **options)


def relay(pool: db.Pool, opened: bus.Bus) -> outbox.Relay:
    return outbox.Relay(pool, opened, CollectorRegistry())


async def add(pool: db.Pool, *messages: bus.Message) -> None:
    async with db.transaction(pool) as connection:
        await outbox.add(connection, messages)


async def rows(pool: db.Pool) -> int:
    async with db.connection(pool) as connection:
        return int(await connection.fetchval("SELECT count(*) FROM outbox"))


async def test_what_is_committed_is_published_as_it_was_added_and_its_row_deleted(
    pool: db.Pool, amqp_url: str, inbox: Any
) -> None:
    sent = bus.Message(
        exchange="hostler",
        routing_key="example.thing.made",
        body=b"\x00\xff{not json",
        message_id="an id",
        type="example.thing.made",
        app_id="example",
        content_type="application/octet-stream",
        content_encoding="gzip",
        headers={"schema": "1.2", "nested": {"a": [1, None, "ü"]}},
        timestamp=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    )
    async with open_bus(amqp_url) as opened:
        await add(pool, sent)
        await relay(pool, opened).flush()
    (got,) = await inbox.take()
    for name in ("body", "message_id", "type", "app_id", "content_type", "content_encoding"):
        assert getattr(got, name) == getattr(sent, name)
    assert (got.routing_key, got.timestamp) == (sent.routing_key, sent.timestamp)
    assert got.headers == sent.headers
    assert got.delivery_mode == aio_pika.DeliveryMode.PERSISTENT
    assert await rows(pool) == 0


async def test_what_is_rolled_back_is_never_published(
    pool: db.Pool, amqp_url: str, inbox: Any
) -> None:
    async def fail() -> None:
        async with db.transaction(pool) as connection:
            await outbox.add(connection, [event(1)])
            raise LookupError

    with pytest.raises(LookupError):
        await fail()
    async with open_bus(amqp_url) as opened:
        async with db.transaction(pool) as connection:
            await outbox.add(connection, [event(2)])
            await relay(pool, opened).flush()  # not committed yet, so not there for others
            assert await inbox.take() == []
        await relay(pool, opened).flush()
    assert [got.message_id for got in await inbox.take()] == ["2"]


async def test_events_are_published_in_the_order_of_their_rows(
    pool: db.Pool, amqp_url: str, inbox: Any
) -> None:
    await add(pool, *(event(n) for n in range(450)))
    async with open_bus(amqp_url) as opened:
        await relay(pool, opened).flush()
    assert [int(got.body) for got in await inbox.take()] == list(range(450))


async def test_while_the_broker_is_away_rows_wait_and_go_when_it_is_back(
    pool: db.Pool, wire: Any, inbox: Any
) -> None:
    async def is_lost() -> bool:
        return not opened.is_up

    async def is_empty() -> bool:
        return await rows(pool) == 0

    async with open_bus(wire.url) as opened:
        running = asyncio.create_task(relay(pool, opened).run())
        await wire.cut()
        await eventually(is_lost)
        await add(pool, *(event(n) for n in range(20)))
        with pytest.raises(bus.BrokerUnavailable):
            await relay(pool, opened).publish_some()
        assert await rows(pool) == 20
        await wire.mend()
        await eventually(is_empty)
        running.cancel()
    assert sorted(int(got.body) for got in await inbox.take()) == list(range(20))


async def test_a_connection_cut_while_publishing_loses_no_event(
    pool: db.Pool, wire: Any, inbox: Any
) -> None:
    async def some_are_out() -> bool:
        return await rows(pool) <= 1600

    async def is_empty() -> bool:
        return await rows(pool) == 0

    await add(pool, *(event(n) for n in range(2000)))
    async with open_bus(wire.url) as opened:
        running = asyncio.create_task(relay(pool, opened).run())
        await eventually(some_are_out, every_seconds=0.01)
        await wire.cut()
        await wire.mend()
        await eventually(is_empty)
        running.cancel()
    assert {int(got.body) for got in await inbox.take()} == set(range(2000))


async def test_an_event_published_but_not_deleted_comes_again_with_its_id(
    pool: db.Pool, amqp_url: str, inbox: Any
) -> None:
    class DiesAfterPublishing:
        async def publish(self, message: bus.Message) -> None:
            await opened.publish(message)
            raise LookupError

    await add(pool, event(7))
    async with open_bus(amqp_url) as opened:
        dying: Any = DiesAfterPublishing()
        with pytest.raises(LookupError):
            await relay(pool, dying).publish_some()
        await relay(pool, opened).flush()
    assert [got.message_id for got in await inbox.take()] == ["7", "7"]


async def test_two_relays_side_by_side_publish_each_row_once(
    pool: db.Pool, amqp_url: str, inbox: Any
) -> None:
    await add(pool, *(event(n) for n in range(1500)))
    async with open_bus(amqp_url) as one, open_bus(amqp_url) as other:
        await asyncio.gather(relay(pool, one).flush(), relay(pool, other).flush())
        await relay(pool, one).flush()  # a row that the other had locked may be left
    assert sorted(int(got.body) for got in await inbox.take()) == list(range(1500))
    assert await rows(pool) == 0


async def test_messages_without_a_queue_stay_and_hold_up_no_other(
    pool: db.Pool, amqp_url: str, inbox: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = [
        event(n, exchange="", routing_key="later", mandatory=True)
        for n in range(outbox.RELAY_BATCH + 50)
    ]
    await add(pool, *lost)
    await add(pool, event(1000))
    async with open_bus(amqp_url) as opened:
        working = relay(pool, opened)
        await working.flush()
        assert [got.message_id for got in await inbox.take()] == ["1000"]
        assert await rows(pool) == len(lost)
        monkeypatch.setattr(outbox, "UNROUTABLE_SECONDS", 0.0)
        connection = await aio_pika.connect(amqp_url)
        async with connection:
            channel = await connection.channel()
            queue = await channel.declare_queue("later", durable=True)
            await relay(pool, opened).flush()
            again = await channel.declare_queue("later", passive=True, durable=True)
            assert again.declaration_result.message_count == len(lost)
            await queue.delete(if_empty=False)
    assert await rows(pool) == 0


async def test_a_flush_waits_for_the_turn_at_hand_and_leaves_nothing(
    pool: db.Pool, amqp_url: str, inbox: Any
) -> None:
    in_turn, go_on = asyncio.Event(), asyncio.Event()

    class Slow:
        async def publish(self, message: bus.Message) -> None:
            in_turn.set()
            await go_on.wait()
            await opened.publish(message)

    await add(pool, event(1))
    async with open_bus(amqp_url) as opened:
        slow: Any = Slow()
        working = relay(pool, slow)
        running = asyncio.create_task(working.run())
        await in_turn.wait()
        flushing = asyncio.create_task(working.flush())
        # time in which a flush that does not wait would end
        ended_early, _ = await asyncio.wait([flushing], timeout=0.2)
        go_on.set()
        await flushing
        running.cancel()
    assert not ended_early
    assert await rows(pool) == 0
    assert len(await inbox.take()) == 1


async def test_an_event_type_makes_a_message_that_carries_its_schema_and_trace(
    pool: db.Pool, amqp_url: str, inbox: Any
) -> None:
    from pydantic import BaseModel

    from hostler_common import logs

    class Made(BaseModel):
        name: str
        note: str | None = None

    made = bus.EventType(
        routing_key="example.thing.made.{name}", model=Made, summary="A thing was made"
    )
    logs.traceparent.set(trace := logs.new_traceparent())
    async with open_bus(amqp_url) as opened:
        await opened.publish(made.message(Made(name="x"), app_id="example", name="x"))
    (got,) = await inbox.take()
    assert json.loads(got.body) == {"name": "x"}
    assert (got.routing_key, got.type) == ("example.thing.made.x", "example.thing.made")
    assert got.headers == {"schema": "1.0", "traceparent": trace}
    assert (got.app_id, got.content_type) == ("example", "application/json")
    assert got.message_id
    assert got.timestamp is not None


async def test_a_message_that_no_frame_can_hold_stays_and_holds_up_no_other(
    pool: db.Pool, amqp_url: str, inbox: Any
) -> None:
    async def only_the_bad_one_is_left() -> bool:
        return await rows(pool) == 1

    await add(pool, event(1), event(2, app_id="x" * 300), event(3))
    async with open_bus(amqp_url) as opened:
        running = asyncio.create_task(relay(pool, opened).run())
        await eventually(only_the_bad_one_is_left)
        await add(pool, event(4))
        await eventually(only_the_bad_one_is_left)
        assert not running.done()
        running.cancel()
    assert {got.message_id for got in await inbox.take()} == {"1", "3", "4"}


async def test_what_waits_is_counted_while_the_broker_is_away(pool: db.Pool, wire: Any) -> None:
    registry = CollectorRegistry()

    async def is_lost() -> bool:
        return not opened.is_up

    async def three_wait() -> bool:
        return registry.get_sample_value("hostler_outbox_messages") == 3

    async with open_bus(wire.url) as opened:
        await wire.cut()
        await eventually(is_lost)
        await add(pool, *(event(n) for n in range(3)))
        running = asyncio.create_task(outbox.Relay(pool, opened, registry).run())
        await eventually(three_wait)
        running.cancel()
        await wire.mend()


async def test_a_commit_wakes_the_relay_at_once(
    pool: db.Pool, amqp_url: str, inbox: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "POLL_SECONDS", 3600.0)  # so that nothing but the commit wakes it
    async with open_bus(amqp_url) as opened:
        running = asyncio.create_task(relay(pool, opened).run())
        await eventually(lambda: _is_listened_to(pool))
        for number in range(3):
            await add(pool, event(number))
            await eventually(lambda: _is_empty(pool))
        running.cancel()
    assert [int(got.body) for got in await inbox.take()] == [0, 1, 2]


async def test_a_relay_whose_listening_connection_is_killed_listens_again(
    pool: db.Pool, amqp_url: str, inbox: Any
) -> None:
    async with open_bus(amqp_url) as opened:
        running = asyncio.create_task(relay(pool, opened).run())
        await eventually(lambda: _is_listened_to(pool))
        async with db.connection(pool) as connection:
            await connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE query LIKE 'LISTEN%' AND datname = current_database()"
            )
        await add(pool, event(1))
        await eventually(lambda: _is_empty(pool))
        await eventually(lambda: _is_listened_to(pool))
        running.cancel()
    assert [int(got.body) for got in await inbox.take()] == [1]


async def _is_listened_to(pool: db.Pool) -> bool:
    async with db.connection(pool) as connection:
        return bool(
            await connection.fetchval(
                "SELECT count(*) FROM pg_stat_activity"
                " WHERE query LIKE 'LISTEN%' AND datname = current_database()"
            )
        )


async def _is_empty(pool: db.Pool) -> bool:
    return await rows(pool) == 0
