"""From deliveries to stored events: read, normalise, and hand a whole batch to one transaction.

A body that holds no notification is rejected with its reason; the bus halves the batch until it
stands alone, and keeps it in quarantine. Everything else is stored, event types nobody knows
included: what is in quarantine is not billed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from hostler_common import bus
from hostler_usage.envelope import UnreadableError, open_body
from hostler_usage.event import Event
from hostler_usage.metrics import Metrics
from hostler_usage.normalise import normalise
from hostler_usage.pace import Pace
from hostler_usage.payload import clean
from hostler_usage.settings import Source
from hostler_usage.store import Store

_COMPRESSED = frozenset({"gzip", "deflate", "zlib", "bz2", "bzip2", "lzma"})


@dataclass(frozen=True, slots=True, kw_only=True)
class NotificationConsumer:
    """Stores the notifications of one source."""

    source: Source
    store: Store
    metrics: Metrics
    pace: Pace
    batch_size: int
    max_body_bytes: int

    async def handle(self, deliveries: Sequence[bus.Delivery]) -> None:
        """All of the deliveries are stored, each once, when this returns.

        Raises:
            Reject: one of them holds no notification; none is stored.
            Unavailable: the database is away; none is stored, as far as is known.
        """
        events = [self.read(delivery) for delivery in deliveries]
        tally = await self.store.ingest(events)
        self.pace.batch_read(len(events), self.batch_size)
        newest = max(event.notification.timestamp for event in events)
        age = datetime.now(UTC) - newest
        self.metrics.ingested(self.source.name, tally, age.total_seconds())

    def read(self, delivery: bus.Delivery) -> Event:
        """The event that a delivery brings.

        Raises:
            Reject: it brings none; the code says why.
        """
        try:
            notification = open_body(
                delivery.body, compression=_compression(delivery), max_bytes=self.max_body_bytes
            )
        except UnreadableError as exc:
            raise bus.Reject(str(exc), code=exc.code) from exc
        return Event(
            notification=notification,
            normalised=normalise(notification, region=self.source.region),
            body=delivery.body,
            source=self.source.name,
            region=self.source.region,
            exchange=clean(delivery.exchange),
            routing_key=clean(delivery.routing_key),
            content_type=_text(delivery.content_type),
            content_encoding=_text(delivery.content_encoding),
            headers={clean(str(key)): _plain(value) for key, value in delivery.headers.items()},
        )


def _compression(delivery: bus.Delivery) -> str | None:
    """How the body is compressed: kombu's header, or a content encoding that is a compression."""
    header = delivery.headers.get("compression")
    if header is not None:
        return str(header)
    encoding = (delivery.content_encoding or "").lower().removeprefix("x-")
    return encoding if encoding in _COMPRESSED else None


def _text(value: str | None) -> str | None:
    return None if value is None else clean(value)


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
