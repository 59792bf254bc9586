"""What Glance says on the broker is read in every envelope, and never more is believed than that something changed."""

import bz2
import json
import zlib
from typing import Any

import pytest

from hostler_common import bus
from hostler_precache import images
from hostler_precache.sources import glance_events

IMAGE = "155d900f-4e14-4e4c-a73d-069cbf4541e6"


def body(event_type: str = "image.update", **payload: Any) -> bytes:
    inner = {
        "event_type": event_type,
        "publisher_id": "image.localhost",
        "payload": {"id": IMAGE, "status": "active", **payload},
        "priority": "INFO",
    }
    return json.dumps({"oslo.version": "2.0", "oslo.message": json.dumps(inner)}).encode()


def plain(enveloped: bytes) -> bytes:
    inner: str = json.loads(enveloped)["oslo.message"]
    return inner.encode()


@pytest.mark.parametrize("event_type", ["image.create", "image.activate", "image.update"])
@pytest.mark.parametrize("envelope", [bytes, plain])
def test_a_change_of_an_image_is_read_in_both_envelopes(event_type: str, envelope: Any) -> None:
    event = glance_events.read(envelope(body(event_type)))
    assert event == glance_events.ImageEvent(image_id=images.image_id(IMAGE), is_deleted=False)


def test_a_deleted_image_is_told_apart() -> None:
    event = glance_events.read(body("image.delete", deleted=True))
    assert event == glance_events.ImageEvent(image_id=images.image_id(IMAGE), is_deleted=True)


@pytest.mark.parametrize(
    ("pack", "compression"),
    [(zlib.compress, "application/x-gzip"), (bz2.compress, "application/x-bz2")],
)
def test_what_kombu_compressed_is_read(pack: Any, compression: str) -> None:
    assert glance_events.read(pack(body()), compression=compression) is not None


@pytest.mark.parametrize(
    "event_type", ["image.send", "image.prepare", "image.upload", "image.member.create"]
)
def test_what_changes_no_list_is_left_alone(event_type: str) -> None:
    assert glance_events.read(body(event_type, id=7)) is None


@pytest.mark.parametrize(
    ("bad", "compression"),
    [
        (b"", ""),
        (b"[]", ""),
        (b"7", ""),
        (b"\xff", ""),
        (b"[" * 10**5, ""),
        (b'{"oslo.message": 7}', ""),
        (b'{"event_type": "image.update"}', ""),
        (b'{"event_type": ["x"], "payload": {}}', ""),
        (b'{"event_type": "image.update", "payload": "text"}', ""),
        (body(id="../etc/passwd"), ""),
        (body(id=None), ""),
        (body(), "zstd"),
        (body(), "gzip"),
        (zlib.compress(body())[:-5], "gzip"),
        (zlib.compress(bytes(glance_events.MAX_BODY_BYTES + 1)), "gzip"),
    ],
)
def test_what_is_no_notification_is_refused(bad: bytes, compression: str) -> None:
    with pytest.raises(glance_events.NotificationError):
        glance_events.read(bad, compression=compression)


def delivery(content: bytes) -> bus.Delivery:
    return bus.Delivery(
        queue=glance_events.QUEUE,
        exchange="glance",
        routing_key="notifications.info",
        body=content,
        headers={},
    )


async def test_policies_are_due_after_every_change_and_a_deleted_image_is_let_go_first() -> None:
    said: list[str] = []

    async def policies_due(lister: str) -> None:
        said.append(f"due {lister}")

    async def image_deleted(image_id: str) -> None:
        said.append(f"deleted {image_id}")

    consumer = glance_events.GlanceConsumer(policies_due=policies_due, image_deleted=image_deleted)
    await consumer.handle(delivery(body("image.activate")))
    await consumer.handle(delivery(body("image.send")))
    await consumer.handle(delivery(body("image.delete")))
    assert said == ["due glance", f"deleted {IMAGE}", "due glance"]
    with pytest.raises(bus.Reject) as caught:
        await consumer.handle(delivery(b"no json"))
    assert caught.value.code == "precache.notification.malformed"
