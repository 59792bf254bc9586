"""Messages as sloppy or hostile publishers make them, written by another AMQP library."""

import asyncio
import random
import struct
from collections.abc import Mapping
from typing import Any

import amqp  # type: ignore[import-untyped]  # py-amqp has no types; it writes what our own library refuses to
import pytest
from aio_pika import connect
from prometheus_client import CollectorRegistry

from hostler_common import bus, db, outbox, quarantine
from hostler_common.bus import decoding
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


def table(*fields: tuple[str, bytes]) -> bytes:
    """A field table; each value with its letter before it."""
    content = b"".join(bytes([len(name)]) + name.encode() + value for name, value in fields)
    return struct.pack(">I", len(content)) + content


def text(value: bytes) -> bytes:
    return b"S" + struct.pack(">I", len(value)) + value


def nested(levels: int, letter: bytes) -> bytes:
    """Tables in tables, or arrays in arrays."""
    value = struct.pack(">I", 0)
    for _ in range(levels):
        content = (b"\1k" if letter == b"F" else b"") + letter + value
        value = struct.pack(">I", len(content)) + content
    return table(("deep", letter + value))


LONG = bytes(random.Random(1).choices(range(97, 123), k=20_000))  # no compression makes it short
HOSTILE: Mapping[str, bytes] = {
    **{f"{n} tables in each other": nested(n, b"F") for n in (20, 260, 900, 8000)},
    **{f"{n} arrays in each other": nested(n, b"A") for n in (20, 260, 900, 8000)},
    "a number too large for a float": table(("d", b"d" + struct.pack(">d", 1e300))),
    "a time after the last year": table(("t", b"T" + b"\xff" * 8)),
    "a decimal of 255 places": table(("d", b"D\xff\x7f\xff\xff\xff")),
    "an origin longer than a name can be": table(
        ("x-origin-exchange", text(LONG)), ("x-origin-routing-key", text(LONG))
    ),
    "an origin that is no name": table(
        ("x-origin-exchange", b"t\1"), ("x-origin-routing-key", b"F" + table())
    ),
    "deaths that are none": table(("x-death", b"A" + struct.pack(">I", 2) + b"t\1")),
    **{
        f"headers that leave {left} bytes of a frame": table(
            ("a", text(b"x" * (131_072 - 8 - 12 - 2 - 4 - 2 - 5 - left)))
        )
        for left in (0, 40, 400)
    },
}


async def test_what_hostile_headers_are_on_ends_in_quarantine_and_comes_back_whole_on_replay(
    amqp_url: str, pool: db.Pool
) -> None:
    """Through a handler that fails, the ladder, the database and the outbox: no header stops the queue."""
    queue = bus.Queue(
        name="hostile",
        bindings=(bus.Binding(exchange=bus.HOSTLER, routing_key="#"),),
        retry_delays_seconds=(1,),
    )
    kept = quarantine.Quarantine(pool=pool)
    got: list[bus.Delivery] = []
    is_failing = True

    async def handle(delivery: bus.Delivery) -> None:
        got.append(delivery)
        if is_failing:
            raise RuntimeError("not this one")

    async def is_kept() -> bool:
        return await kept.count() == len(HOSTILE)

    async def has_come_back() -> bool:
        return len(got) == len(HOSTILE)

    subscription = bus.Subscription(queue=queue, handler=handle, quarantine=kept)
    async with open_bus(amqp_url, subscription) as opened:
        await asyncio.to_thread(publish_hostile, amqp_url)
        await eventually(is_kept)
        assert {delivery.attempt for delivery in got} == {1, 2}
        is_failing = False
        got.clear()
        for row in await kept.rows():
            await kept.replay(row["id"])
        await outbox.Relay(pool, opened, CollectorRegistry()).flush()
        await eventually(has_come_back)
    assert {delivery.body.decode() for delivery in got} == HOSTILE.keys()
    by_name = {delivery.body.decode(): delivery for delivery in got}
    assert {delivery.exchange for delivery in got} == {"hostler"}
    assert {delivery.routing_key for delivery in got} == {"example.hostile"}
    assert by_name["a number too large for a float"].headers["d"] == 1e300
    assert decoding.UNDECODABLE in by_name["900 tables in each other"].headers
    assert by_name["headers that leave 0 bytes of a frame"].headers["x-dropped-headers"] == 1


def publish_hostile(url: str) -> None:
    """Publish each, its properties as bytes, and return when the broker has it."""

    class Raw(amqp.Message):  # type: ignore[misc]  # it has no types
        def _serialize_properties(self) -> bytes:
            return HOSTILES_FLAGS + HOSTILE[self.body]

    publish_all(url, [Raw(name) for name in HOSTILE], "example.hostile")


HOSTILES_FLAGS = (1 << 13).to_bytes(2, "big")  # headers, and nothing else


def publish_odd(url: str) -> None:
    """Publish each, and return when the broker has it."""
    publish_all(url, [amqp.Message(name, **more) for name, more in ODD.items()], "example.odd")


def publish_all(url: str, messages: list[amqp.Message], routing_key: str) -> None:
    host, _, vhost = url.partition("@")[2].partition("/")
    connection = amqp.Connection(
        host=host, userid="guest", password="guest", virtual_host=vhost, confirm_publish=True
    )
    connection.connect()
    channel = connection.channel()
    for message in messages:
        channel.basic_publish(message, exchange="hostler", routing_key=routing_key)
    connection.close()
