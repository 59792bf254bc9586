"""Messages as sloppy or hostile publishers make them, written by another AMQP library."""

import asyncio
from typing import Any

import amqp  # type: ignore[import-untyped]  # py-amqp has no types; it writes what our own library refuses to
import pytest
from aio_pika import connect

from hostler_common import bus
from hostler_common.testing import eventually, open_bus

ODD: dict[str, dict[str, Any]] = {
    "a timestamp in microseconds": {"timestamp": 1_763_712_000_000_000},
    "the last timestamp there is": {"timestamp": 2**64 - 1},
    "a message id that is not UTF-8": {"message_id": "\ud800"},
    "a longest message id that is not UTF-8": {"message_id": "\ud800" * 85},
    "a header of bytes": {"application_headers": {"a": b"\xff\xfe", "b": [{"c": b"\xff"}]}},
    "a NUL in the message id": {"message_id": "a\0b"},
    "a header that is not UTF-8": {"application_headers": {"\ud800": "\ud800"}},
    "a header within headers that is not UTF-8": {"application_headers": {"a": {"\ud800": 1}}},
    "an attempt below zero": {"application_headers": {"x-attempt": -7}},
    "an attempt beyond all": {"application_headers": {"x-attempt": 2**62}},
    "an attempt that is no number": {"application_headers": {"x-attempt": "many"}},
}


@pytest.mark.parametrize("fails", [False, True])
async def test_odd_properties_neither_stop_the_queue_nor_lose_the_message(
    amqp_url: str, fails: bool
) -> None:
    queue = bus.Queue(
        name="work",
        bindings=(bus.Binding(exchange=bus.HOSTLER, routing_key="#"),),
        retry_delays_seconds=(1,),
    )
    got: list[bus.Delivery] = []
    kept: list[bytes] = []

    class Kept:
        async def put(self, delivery: bus.Delivery, *, code: str, reason: str) -> None:
            kept.append(delivery.body)

    async def handle(delivery: bus.Delivery) -> None:
        got.append(delivery)
        if fails:
            raise bus.Retry("not now")

    async def all_settled() -> bool:
        return len(kept if fails else got) == len(ODD)

    subscription = bus.Subscription(queue=queue, handler=handle, quarantine=Kept())
    async with open_bus(amqp_url, subscription) as opened:
        await asyncio.to_thread(publish_odd, amqp_url)
        await eventually(all_settled)
        assert opened.is_up
    assert {each.body.decode() for each in got} == ODD.keys()
    assert len(got) == (2 if fails else 1) * len(ODD)
    assert {each.attempt for each in got} == ({1, 2} if fails else {1})
    connection = await connect(amqp_url)
    async with connection:
        channel = await connection.channel()
        declared = await channel.declare_queue("work", passive=True)
        assert declared.declaration_result.message_count == 0


def publish_odd(url: str) -> None:
    """Publish each, and return when the broker has it."""
    host, _, vhost = url.partition("@")[2].partition("/")
    connection = amqp.Connection(
        host=host, userid="guest", password="guest", virtual_host=vhost, confirm_publish=True
    )
    connection.connect()
    channel = connection.channel()
    for name, properties in ODD.items():
        channel.basic_publish(
            amqp.Message(name, **properties), exchange="hostler", routing_key="example.odd"
        )
    connection.close()
