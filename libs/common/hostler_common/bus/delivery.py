"""What a handler is given, and the three ways in which it ends: it returns, or raises `Retry` or `Reject`."""

import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple, Protocol

from hostler_common.bus import decoding
from hostler_common.bus.stream import Incoming
from hostler_common.bus.topology import Message, Queue

MAX_NAME_BYTES = 255
MAX_FOREIGN_BYTES = 32 * 1024
"""What of a message's headers is published again: all must fit into a frame, with what brokers add on the way."""
DROPPED_HEADER = "x-dropped-headers"
"""How many headers were left out because they were too large to be published again."""
ATTEMPT_HEADER = "x-attempt"
ORIGIN_EXCHANGE_HEADER = "x-origin-exchange"
ORIGIN_ROUTING_KEY_HEADER = "x-origin-routing-key"
# what a quorum queue adds when it hands a message out again
_BROKERS_HEADERS = ("x-delivery-count", "x-acquired-count")


class Retry(Exception):
    """Raised by a handler: not now, perhaps later. Bounded by the queue's retry ladder."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Reject(Exception):
    """Raised by a handler: never. The message goes to quarantine with its body, this code and this reason."""

    def __init__(self, reason: str, *, code: str = "message.rejected") -> None:
        super().__init__(reason)
        self.reason = reason
        self.code = code


class Delivery(NamedTuple):
    """One message as it came, with the exchange and routing key it was first published to."""

    queue: str
    exchange: str
    routing_key: str
    body: bytes
    headers: Mapping[str, Any]
    message_id: str | None = None
    type: str | None = None
    app_id: str | None = None
    content_type: str | None = None
    content_encoding: str | None = None
    timestamp: datetime | None = None
    redelivered: bool = False
    attempt: int = 1


class Quarantine(Protocol):
    """Where bad messages are kept; `hostler_common.quarantine` is the real one."""

    async def put(self, delivery: Delivery, *, code: str, reason: str) -> None:
        """The delivery is kept, durably, when this returns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Hand over up to ``size`` deliveries at once, waiting at most ``seconds`` for more after the first.

    The next batch is handed over while the one before is still being handled, and acked after it: what one waits for
    the database, the other uses to be read. A handler therefore runs twice at a time.
    """

    size: int = 500
    seconds: float = 0.1


Handler = Callable[[Delivery], Awaitable[None]]
BatchHandler = Callable[[Sequence[Delivery]], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subscription:
    """A queue and who handles it. Without a batch, up to ``concurrency`` deliveries are handled side by side.

    ``quarantine`` may be missing only where losing a bad message is meant: exclusive queues of hints. ``on_begin`` is
    called whenever deliveries begin to come: what was published to an exclusive queue before that is lost.
    """

    queue: Queue
    handler: Handler | BatchHandler
    quarantine: Quarantine | None
    batch: Batch | None = None
    prefetch: int = 32
    concurrency: int = 8
    on_begin: Callable[[], None] = lambda: None


def delivered(queue: str, incoming: Incoming) -> Delivery:
    """The broker's message as it was first published, whatever it went through since."""
    given = incoming.properties.get
    headers = given("headers") or {}
    for name in _BROKERS_HEADERS:
        headers.pop(name, None)
    attempt = headers.pop(ATTEMPT_HEADER, 0)
    return Delivery(
        queue=queue,
        exchange=name_or(headers.pop(ORIGIN_EXCHANGE_HEADER, None), incoming.exchange),
        routing_key=name_or(headers.pop(ORIGIN_ROUTING_KEY_HEADER, None), incoming.routing_key),
        body=incoming.body,
        headers=headers,
        message_id=given("message_id"),
        type=given("type"),
        app_id=given("app_id"),
        content_type=given("content_type"),
        content_encoding=given("content_encoding"),
        timestamp=given("timestamp"),
        redelivered=incoming.redelivered,
        # anybody may have written the headers: only what our own ladder can have written is believed
        attempt=(attempt if isinstance(attempt, int) and 0 < attempt < 1000 else 0) + 1,
    )


def name_or(value: object, otherwise: str) -> str:
    """The value, if it can be the name of an exchange or a routing key: no longer than AMQP's short strings."""
    is_name = isinstance(value, str) and len(value.encode(errors="replace")) <= MAX_NAME_BYTES
    return str(value) if is_name else otherwise


def replaying(delivery: Delivery, *, routing_key: str) -> Message:
    """The delivery as a message to one queue through the default exchange, keeping where it first came from.

    Headers as large as a frame are not kept: with one more, the broker would close the connection each time.
    """
    return Message(
        exchange="",
        routing_key=routing_key,
        body=delivery.body,
        message_id=delivery.message_id or str(uuid.uuid4()),
        type=delivery.type,
        app_id=delivery.app_id,
        content_type=delivery.content_type or "application/octet-stream",
        content_encoding=delivery.content_encoding,
        headers={
            **_that_fit({k: _encodable(v) for k, v in delivery.headers.items() if k != "x-death"}),
            ORIGIN_EXCHANGE_HEADER: delivery.exchange,
            ORIGIN_ROUTING_KEY_HEADER: delivery.routing_key,
        },
        timestamp=delivery.timestamp,
        mandatory=True,
    )


def _that_fit(headers: dict[str, Any]) -> dict[str, Any]:
    sizes = {name: len(name.encode()) + len(decoding.encoded(headers[name])) for name in headers}
    if sum(sizes.values()) <= MAX_FOREIGN_BYTES:
        return headers
    kept: dict[str, Any] = {}
    left = MAX_FOREIGN_BYTES
    for name in sorted(headers, key=lambda name: (sizes[name], name)):  # as many as can be
        left -= sizes[name]
        if left < 0:
            break
        kept[name] = headers[name]
    return kept | {DROPPED_HEADER: len(headers) - len(kept)}


def _encodable(value: Any) -> Any:  # noqa: ANN401  AMQP tables hold anything
    """A header's value as pamqp encodes it: it decodes a string that is not UTF-8 to bytes, and encodes bytearrays."""
    if isinstance(value, dict):
        return {key: _encodable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_encodable(item) for item in value]
    return bytearray(value) if isinstance(value, bytes) else value
