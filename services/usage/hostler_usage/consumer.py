"""From deliveries to stored events: read, normalise, and hand a whole batch to one transaction.

A body that holds no notification is rejected with its reason; the bus halves the batch until it
stands alone, and keeps it in quarantine. Everything else is stored, event types nobody knows
included: what is in quarantine is not billed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from hostler_common import bus
from hostler_usage.history.pace import Pace
from hostler_usage.metrics import Metrics
from hostler_usage.reading.envelope import UnreadableError
from hostler_usage.reading.event import Event, Tally
from hostler_usage.reading.intake import read_delivery
from hostler_usage.reading.normalise import Normaliser
from hostler_usage.settings import Source
from hostler_usage.store import Store

LATE: Final = timedelta(hours=1)
"""From what age on a notification is counted as late: the hour it speaks of is over, and may have been asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NotificationConsumer:
    """Stores the notifications of one source."""

    source: Source
    normaliser: Normaliser
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
        await self.keep([self.read(delivery) for delivery in deliveries])

    def read(self, delivery: bus.Delivery) -> Event:
        """The event that a delivery brings.

        Raises:
            Reject: it brings none; the code says why.
        """
        try:
            return read_delivery(
                delivery,
                source=self.source.name,
                region=self.source.region,
                normaliser=self.normaliser,
                max_bytes=self.max_body_bytes,
            )
        except UnreadableError as exc:
            raise bus.Reject(str(exc), code=exc.code) from exc

    async def keep(self, events: Sequence[Event]) -> Tally:
        """All of the events, of which there is one at least, are stored and counted, each once.

        Raises:
            Unavailable: the database is away; none is stored, as far as is known.
        """
        tally = await self.store.ingest(events)
        self.pace.batch_read(len(events), self.batch_size)
        sent = [event.notification.timestamp for event in events]
        now = datetime.now(UTC)
        due = now - LATE
        self.metrics.ingested(
            self.source.name,
            tally,
            late=sum(at <= due for at in sent),
            age_seconds=(now - max(sent)).total_seconds(),
        )
        return tally
