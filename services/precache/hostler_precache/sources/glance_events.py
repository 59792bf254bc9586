"""What Glance says happened to its images: policies that list them run at once, and a deleted image is let go.

Glance's notifications (exchange `glance`, routing key `notifications.info`; glance/notifier.py) only
say when to look: what is wanted is still what the lister finds. So a message that is lost, comes
twice or comes late does no harm, and the periodic run stays the safety net.
"""

import bz2
import json
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from pydantic import SecretStr

from hostler_common import bus, logs
from hostler_common.service import ServiceProcess
from hostler_precache import images
from hostler_precache.transfer.manifest import ImageId

log = logs.get(__name__)

LISTER: Final = "glance"
EXCHANGE: Final = "glance"
ROUTING_KEY: Final = "notifications.info"
QUEUE: Final = "precache.glance"
MALFORMED: Final = "precache.notification.malformed"
MAX_BODY_BYTES: Final = 4 * 1024 * 1024
# image.update is also that of an image that was deactivated, renamed or tagged
_CHANGES: Final = frozenset({"image.create", "image.activate", "image.update"})
_DELETE: Final = "image.delete"


class NotificationError(ValueError):
    """The body holds no notification; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageEvent:
    """An image of Glance changed, or is gone."""

    image_id: ImageId
    is_deleted: bool


def read(body: bytes, *, compression: str = "") -> ImageEvent | None:
    """What a notification of Glance says of an image; None where it says nothing that matters here.

    Both envelopes of oslo.messaging are read (drivers `messaging` and `messagingv2`), and what
    kombu compresses with (`kombu_compression`: gzip, bz2).

    Raises:
        NotificationError: it is no notification.
    """
    try:
        outer = json.loads(_plain(body, compression))
        inner = json.loads(outer["oslo.message"]) if "oslo.message" in outer else outer
        event_type, payload = inner["event_type"], inner["payload"]
        if event_type not in _CHANGES and event_type != _DELETE:
            return None
        image_id = images.image_id(payload["id"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise NotificationError(f"no notification of Glance: {type(exc).__name__}") from exc
    return ImageEvent(image_id=image_id, is_deleted=event_type == _DELETE)


def _plain(body: bytes, compression: str) -> bytes:
    name = compression.lower().removeprefix("application/").removeprefix("x-")
    stream: zlib._Decompress | bz2.BZ2Decompressor
    if name in ("gzip", "zlib", "deflate"):
        stream = zlib.decompressobj(wbits=47)  # kombu's gzip is a zlib stream: 47 takes both
    elif name in ("bz2", "bzip2"):
        stream = bz2.BZ2Decompressor()
    elif name:
        raise NotificationError(f"compression {compression[:40]!r} is not known")
    else:
        return body
    try:
        plain = stream.decompress(body, MAX_BODY_BYTES)
    except (zlib.error, OSError, EOFError) as exc:
        raise NotificationError("the body cannot be decompressed") from exc
    if not stream.eof:
        raise NotificationError("the body is cut off, or too large once decompressed")
    return plain


@dataclass(frozen=True, slots=True, kw_only=True)
class GlanceConsumer:
    """Hands on what Glance says. Both calls may be made again for the same image."""

    policies_due: Callable[[str], Awaitable[object]]
    """Every policy of the lister of that name is due now."""
    image_deleted: Callable[[ImageId], Awaitable[object]]
    """The image is gone at its source; an image that nobody knows here is no error."""

    async def handle(self, delivery: bus.Delivery) -> None:
        """What the notification asks for is stored when this returns.

        Raises:
            Reject: it is no notification.
            Unavailable: the database is away.
        """
        compression = str(delivery.headers.get("compression") or "")
        try:
            event = read(delivery.body, compression=compression)
        except NotificationError as exc:
            raise bus.Reject(str(exc), code=MALFORMED) from exc
        if event is None:
            return
        if event.is_deleted:
            await self.image_deleted(event.image_id)
        await self.policies_due(LISTER)
        log.info("glance_said", image_id=event.image_id, is_deleted=event.is_deleted)


def queue(*, durable_exchange: bool) -> bus.Queue:
    """A queue of our own at Glance's exchange, which is taken as it stands."""
    return bus.Queue(
        name=QUEUE,
        bindings=(bus.Binding(exchange=_exchange(durable_exchange), routing_key=ROUTING_KEY),),
        max_body_bytes=MAX_BODY_BYTES,
    )


def _exchange(durable: bool) -> bus.Exchange:
    return bus.Exchange(name=EXCHANGE, durable=durable, declare=bus.Declare.PASSIVE_FIRST)


def listen(
    process: ServiceProcess,
    own_bus: bus.Bus,
    url: SecretStr,
    *,
    durable_exchange: bool,
    consumer: GlanceConsumer,
    quarantine: bus.Quarantine,
) -> None:
    """Consume what Glance says on the broker at `url`, from the process' run on.

    What is replayed from quarantine arrives on our own broker, in a queue of the same name.
    """
    wanted = queue(durable_exchange=durable_exchange)
    topology = bus.Topology(queues=(wanted,), exchanges=(_exchange(durable_exchange),))
    cloud = process.open_bus(topology, name="glance", url=url)
    process.consume(cloud, wanted, consumer.handle, quarantine=quarantine)
    replayed = bus.Queue(name=QUEUE, max_body_bytes=MAX_BODY_BYTES)
    if url.get_secret_value() != process.settings.amqp_url.get_secret_value():
        process.consume(own_bus, replayed, consumer.handle, quarantine=quarantine)
