"""From one delivery to one event, whoever hands it over: a broker, a file, or the ledger itself.

Reading depends on the delivery and on the mapping alone: what is read twice is the same event.
"""

from functools import lru_cache
from typing import Final

from hostler_common import bus
from hostler_usage.reading.envelope import MAX_BODY_BYTES, Notification, open_body, open_event
from hostler_usage.reading.event import Event, Origin
from hostler_usage.reading.normalise import Normaliser
from hostler_usage.reading.reader import clean

_COMPRESSED: Final = frozenset({"gzip", "deflate", "zlib", "bz2", "bzip2", "lzma"})


def read_delivery(
    delivery: bus.Delivery,
    *,
    source: str,
    region: str,
    normaliser: Normaliser,
    max_bytes: int = MAX_BODY_BYTES,
) -> Event:
    """The event that a delivery of a source, which belongs to a region, brings.

    Raises:
        UnreadableError: it brings none; one of its subclasses says why.
    """
    notification = open_delivery(delivery, max_bytes=max_bytes)
    normalised = normaliser.read(notification, region=region)
    return Event(
        # a batch of payloads in parsed form is several times its bodies, and nobody reads them again
        notification=notification._replace(payload=None),
        normalised=normalised,
        body=delivery.body,
        region=region,
        origin=_origin(
            source,
            delivery.exchange,
            delivery.routing_key,
            delivery.content_type,
            delivery.content_encoding,
        ),
        headers={clean(str(key)): _plain(value) for key, value in delivery.headers.items()},
    )


@lru_cache(maxsize=1000)  # the same for thousands of messages
def _origin(
    source: str,
    exchange: str,
    routing_key: str,
    content_type: str | None,
    content_encoding: str | None,
) -> Origin:
    return Origin(
        source,
        clean(exchange),
        clean(routing_key),
        clean(content_type or ""),
        clean(content_encoding or ""),
    )


def open_delivery(delivery: bus.Delivery, *, max_bytes: int = MAX_BODY_BYTES) -> Notification:
    """The notification in a delivery; of hostler's own events the envelope is in the properties.

    Raises:
        UnreadableError: there is none; one of its subclasses says why.
    """
    if delivery.exchange == bus.HOSTLER.name:
        return open_event(
            delivery.body,
            event_type=delivery.type,
            message_id=delivery.message_id,
            timestamp=delivery.timestamp,
            max_bytes=max_bytes,
        )
    return open_body(delivery.body, compression=_compression(delivery), max_bytes=max_bytes)


def _compression(delivery: bus.Delivery) -> str | None:
    """How the body is compressed: kombu's header, or a content encoding that is a compression."""
    header = delivery.headers.get("compression")
    if header is not None:
        return str(header)
    encoding = (delivery.content_encoding or "").lower().removeprefix("x-")
    return encoding if encoding in _COMPRESSED else None


def _plain(value: object) -> object:
    """An AMQP header as JSON that jsonb takes."""
    if isinstance(value, dict):
        return {clean(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    return clean(str(value))
