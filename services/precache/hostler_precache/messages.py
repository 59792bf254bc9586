"""Precache on the broker: the fanout that tells hosts to cache, and the events it publishes.

The fanout exchange belongs to oslo.messaging's topic `compute` as much as to us. oslo declares it
non-durable and auto-delete (durable with `rabbit_transient_quorum_queue`), and so do we, before
every publish: with other arguments, whoever comes second fails with 406.
"""

import uuid
from datetime import UTC, datetime
from typing import Final

from pydantic import BaseModel, ConfigDict, Field

from hostler_common.bus import Binding, EventType, Exchange, Message, Queue, Topology
from hostler_precache import envelope

APP_ID: Final = "precache"
TOPIC: Final = "compute"


def fanout_exchange(*, durable: bool) -> Exchange:
    """oslo.messaging's fanout exchange of the topic; durable where oslo's transient queues are."""
    return Exchange(
        name=f"{TOPIC}_fanout",
        type="fanout",
        durable=durable,
        auto_delete=True,
        declare_on_publish=True,
    )


def agent_queue(host: str, *, durable: bool) -> Queue:
    """An agent's own end of the fanout; it lives as long as the agent's connection."""
    return Queue(
        name=f"precache.cache.{host}.{uuid.uuid4().hex[:8]}",
        bindings=(Binding(exchange=fanout_exchange(durable=durable), routing_key=TOPIC),),
        type="classic",
        exclusive=True,
    )


def cache_message(call: envelope.CacheCall) -> Message:
    """The cast as a message.

    Raises:
        envelope.EnvelopeError: the meta is too large.
    """
    unique_id = uuid.uuid4().hex
    return Message(
        exchange=f"{TOPIC}_fanout",
        routing_key="",
        body=envelope.pack(call, unique_id=unique_id),
        message_id=unique_id,
        content_type=envelope.CONTENT_TYPE,
        content_encoding=envelope.CONTENT_ENCODING,
        app_id=APP_ID,
        timestamp=datetime.now(UTC),
    )


class _Event(BaseModel):
    model_config = ConfigDict(extra="ignore")


class ImageFetched(_Event):
    """An image is on the seed, complete and checked."""

    image_id: str
    blob_id: str
    size_bytes: int
    root: str = Field(description="sha256 over the piece list and sizes, hexadecimal")
    verification: str = Field(description="hash, checksum or unverifiable")


class ImageFailed(_Event):
    """An image could not be fetched, or its bytes are not what its source says."""

    image_id: str
    blob_id: str
    reason: str


class DistributionFinished(_Event):
    """Every host of a distribution has an outcome."""

    distribution_id: str
    image_id: str
    hosts: dict[str, int] = Field(description="how many hosts ended in which state")


IMAGE_FETCHED = EventType(
    routing_key="precache.image.fetched",
    model=ImageFetched,
    summary="An image is on the seed, complete and checked against its source's hash.",
)
IMAGE_FAILED = EventType(
    routing_key="precache.image.failed",
    model=ImageFailed,
    summary="An image could not be fetched, or is not what its source says.",
)
DISTRIBUTION_FINISHED = EventType(
    routing_key="precache.distribution.finished",
    model=DistributionFinished,
    summary="Every host of a distribution has an outcome.",
)

TOPOLOGY = Topology(publishes=(IMAGE_FETCHED, IMAGE_FAILED, DISTRIBUTION_FINISHED))


def topology(*, durable_fanout: bool) -> Topology:
    """What the service declares: the suite's exchange, and the fanout as oslo would."""
    return Topology(
        exchanges=(*TOPOLOGY.exchanges, fanout_exchange(durable=durable_fanout)),
        publishes=TOPOLOGY.publishes,
    )
