"""Deliveries taken straight from a connection's stream.

aiormq makes three frame objects of a delivery, which pass a queue of ten places one by one, and then a task: seven
tenths of what it costs to consume a message. Here frames are looked at as their bytes arrive. What a delivery consists
of is put together and handed over; every other frame is left to aiormq, in its order: the handshake, answers,
cancellations, and what `basic.get` fetches.

The layout of frames is in AMQP 0-9-1, sections 2.3.5 (frames) and 4.2 (contents).
"""

import asyncio
import struct
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import aio_pika
import aiormq
from aiormq.abc import AbstractChannel
from pamqp.commands import Basic
from yarl import URL

from hostler_common.bus import decoding

_METHOD, _HEADER, _HEARTBEAT = 1, 2, 8
_FRAME: Final = struct.Struct(">BHI")  # kind, channel, bytes of the payload
_AROUND_PAYLOAD: Final = _FRAME.size + 1
_END: Final = 0xCE
_IS_DELIVER: Final = Basic.Deliver.index.to_bytes(4, "big")
_TAG: Final = struct.Struct(">QB")  # delivery tag, redelivered
_BODY_SIZE: Final = struct.Struct(">4xQ")  # after class and weight
_ALIVE: Final = _FRAME.pack(_HEARTBEAT, 0, 0) + bytes([_END])


class Incoming(NamedTuple):
    """A delivery as the broker sent it."""

    tag: int
    redelivered: bool
    exchange: str
    routing_key: str
    properties: dict[str, Any]
    body: bytes


Receive = Callable[[Incoming], None]


class Connection(aio_pika.Connection):
    """A connection of aio-pika's whose deliveries can be taken before aiormq sees them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  aio-pika's own arguments
        super().__init__(*args, **kwargs)
        self._transport = _Transport()
        self.kwargs["transport_factory"] = self._transport

    def take_deliveries(self, channel: AbstractChannel, receive: Receive) -> None:
        """From now on, `receive` gets every delivery on the channel, in order; call it before consuming."""
        assert self._transport.stream is not None  # or there would be no channel
        self._transport.stream.take_deliveries(channel.number, receive)


class _Transport(aiormq.TransportFactory):
    """What `asyncio.open_connection` does, with a protocol that looks at frames."""

    def __init__(self) -> None:
        self.stream: Stream | None = None

    async def create(
        self,
        url: URL,
        **kwargs: Any,  # noqa: ANN401  aiormq's ssl_context_provider, and those of asyncio's create_connection
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        context = kwargs.pop("ssl_context_provider")
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        stream = self.stream = Stream(reader)
        transport, _ = await loop.create_connection(
            lambda: stream,
            host=url.host or "localhost",
            port=url.port or 5672,
            ssl=await context.get_context() if url.scheme == "amqps" else None,
            **kwargs,
        )
        return reader, asyncio.StreamWriter(transport, stream, reader, loop)


class Stream(asyncio.StreamReaderProtocol):
    """Its reader reads as if the frames that are taken had never come."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        super().__init__(reader)
        self._takers: dict[int, _Taker] = {}
        self._held = b""  # the beginning of a frame

    def take_deliveries(self, channel: int, receive: Receive) -> None:
        """From now on, `receive` gets every delivery on the channel."""
        self._takers[channel] = _Taker(receive)

    def data_received(self, data: bytes) -> None:
        """Bytes have come from the broker."""
        data = self._held + data
        at, left, has_taken = 0, [], False
        while len(data) - at >= _AROUND_PAYLOAD:
            kind, channel, size = _FRAME.unpack_from(data, at)
            end = at + _AROUND_PAYLOAD + size
            if end > len(data):
                break
            if data[end - 1] != _END:  # no AMQP: aiormq says so and closes the connection
                left.append(data[at:])
                at = len(data)
                break
            taker = self._takers.get(channel)
            if taker is not None and taker.takes(kind, data[at + _FRAME.size : end - 1]):
                has_taken = True
            else:
                left.append(data[at:end])
            at = end
        self._held = data[at:]
        if has_taken:
            left.append(_ALIVE)  # the broker sends no heartbeats between deliveries
        if left:
            super().data_received(b"".join(left))

    def eof_received(self) -> bool | None:
        """Nothing comes any more."""
        super().data_received(self._held)  # cut off: aiormq says so
        return super().eof_received()


class _Taker:
    """Puts the deliveries of one channel together: a method frame, a header frame, and body frames."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._method = b""  # empty while no delivery has begun
        self._header = b""
        self._pieces: list[bytes] = []
        self._missing_bytes = 0

    def takes(self, kind: int, payload: bytes) -> bool:
        """Whether the frame belongs to a delivery; its last one hands it over."""
        if kind == _METHOD:
            if not payload.startswith(_IS_DELIVER):
                return False
            self._method = payload
            return True
        if not self._method:
            return False
        if kind == _HEADER:
            self._header = payload
            (self._missing_bytes,) = _BODY_SIZE.unpack_from(payload)
        else:
            self._pieces.append(payload)
            self._missing_bytes -= len(payload)
        if self._missing_bytes <= 0:
            incoming = _incoming(self._method, self._header, b"".join(self._pieces))
            self._method = b""
            self._pieces.clear()
            self._receive(incoming)
        return True


def _incoming(method: bytes, header: bytes, body: bytes) -> Incoming:
    at = len(_IS_DELIVER)
    at += 1 + method[at]  # the consumer's tag
    tag, redelivered = _TAG.unpack_from(method, at)
    at += _TAG.size
    size, exchange = decoding.short_string(method[at:])
    _, routing_key = decoding.short_string(method[at + size :])
    return Incoming(
        tag,
        bool(redelivered),
        exchange,
        routing_key,
        decoding.properties(header[_BODY_SIZE.size :]),
        body,
    )
