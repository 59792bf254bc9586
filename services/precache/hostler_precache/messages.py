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


class DistributionPaused(_Event):
    """A distribution was stopped by its own canaries: somebody should look."""

    distribution_id: str
    reason: str


class DistributionLate(_Event):
    """A deadline has passed and too few hosts have the image."""

    distribution_id: str
    deadline_at: datetime
    deadline_percent: int
    hosts: dict[str, int] = Field(description="how many hosts are in which state")


class AggregateData(_Event):
    """The data of Nova's AggregatePayload 1.1."""

    id: int = Field(0, description="of an aggregate; a distribution has none")
    uuid: str = Field(description="the distribution")
    name: str = Field(description="the image")
    hosts: list[str]
    metadata: dict[str, str] = Field(
        {}, description="at its end, `state`: done, error or cancelled"
    )


class AggregatePayload(_Event):
    """Nova's AggregatePayload 1.1."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    name: str = Field("AggregatePayload", alias="nova_object.name")
    namespace: str = Field("nova", alias="nova_object.namespace")
    version: str = Field("1.1", alias="nova_object.version")
    data: AggregateData = Field(alias="nova_object.data")


class AggregateCacheImages(_Event):
    """Hosts begin to get an image, or that is over, in the shape of Nova's versioned notification.

    Source: nova, doc/notification_samples/aggregate-cache_images-start.json, and -end.json.
    """

    priority: str = "INFO"
    event_type: str = Field(description="aggregate.cache_images.start, or .end")
    publisher_id: str = "precache"
    payload: AggregatePayload


class AggregateCacheData(_Event):
    """The data of Nova's AggregateCachePayload 1.0."""

    id: int = Field(0, description="of an aggregate; a distribution has none")
    uuid: str = Field(description="the distribution")
    name: str = Field(description="the image")
    host: str
    images_cached: list[str]
    images_failed: list[str]
    index: int = Field(description="hosts that have ended, this one among them")
    total: int


class AggregateCachePayload(_Event):
    """Nova's AggregateCachePayload 1.0."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    name: str = Field("AggregateCachePayload", alias="nova_object.name")
    namespace: str = Field("nova", alias="nova_object.namespace")
    version: str = Field("1.0", alias="nova_object.version")
    data: AggregateCacheData = Field(alias="nova_object.data")


class AggregateCacheProgress(_Event):
    """A host has ended, in the shape of Nova's versioned notification of that name.

    Source: nova, doc/notification_samples/aggregate-cache_images-progress.json.
    """

    priority: str = "INFO"
    event_type: str = "aggregate.cache_images.progress"
    publisher_id: str = "precache"
    payload: AggregateCachePayload


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
DISTRIBUTION_PAUSED = EventType(
    routing_key="precache.distribution.paused",
    model=DistributionPaused,
    summary="A distribution was stopped by its canaries.",
)
DISTRIBUTION_LATE = EventType(
    routing_key="precache.distribution.late",
    model=DistributionLate,
    summary="A deadline has passed and too few hosts have the image.",
)
CACHE_START = EventType(
    routing_key="aggregate.cache_images.start",
    model=AggregateCacheImages,
    summary="An image begins to reach its hosts, in the shape of Nova's notification of that name.",
)
CACHE_END = EventType(
    routing_key="aggregate.cache_images.end",
    model=AggregateCacheImages,
    summary="It is over, however it came to that, in the shape of Nova's notification of that name.",
)
CACHE_PROGRESS = EventType(
    routing_key="aggregate.cache_images.progress",
    model=AggregateCacheProgress,
    summary="A host has ended, in the shape of Nova's notification of that name.",
)

TOPOLOGY = Topology(
    publishes=(
        IMAGE_FETCHED,
        IMAGE_FAILED,
        DISTRIBUTION_FINISHED,
        DISTRIBUTION_PAUSED,
        DISTRIBUTION_LATE,
        CACHE_START,
        CACHE_PROGRESS,
        CACHE_END,
    )
)


def topology(*, durable_fanout: bool) -> Topology:
    """What the service declares: the suite's exchange, and the fanout as oslo would."""
    return Topology(
        exchanges=(*TOPOLOGY.exchanges, fanout_exchange(durable=durable_fanout)),
        publishes=TOPOLOGY.publishes,
    )
