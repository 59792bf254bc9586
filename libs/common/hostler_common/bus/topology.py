"""What is on the broker, as data: exchanges, queues, event types, and messages to publish.

The same constants declare the topology, route the messages and make the AsyncAPI document.
"""

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel

from hostler_common import logs

MAX_BODY_BYTES = 4 * 1024 * 1024


class Declare(StrEnum):
    """How an exchange comes to be."""

    ACTIVE = "active"
    """It is ours: declared as described."""
    PASSIVE_FIRST = "passive_first"
    """It is somebody else's: taken as it stands, and declared as described only where it is absent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """An exchange. With ``declare_on_publish`` it is declared again before every publish (it may auto-delete)."""

    name: str
    type: Literal["topic", "fanout", "direct"] = "topic"
    durable: bool = True
    auto_delete: bool = False
    declare: Declare = Declare.ACTIVE
    declare_on_publish: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)


HOSTLER = Exchange(name="hostler")
"""The exchange of every event that the suite publishes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """What an exchange hands to a queue."""

    exchange: Exchange
    routing_key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """A queue of our own, with its retry ladder and its dead-letter queue where it is a quorum queue.

    The arguments of a declared queue can never change: a queue that needs others needs another name.
    """

    name: str
    bindings: tuple[Binding, ...] = ()
    type: Literal["quorum", "classic"] = "quorum"
    exclusive: bool = False
    expires_ms: int | None = None
    retry_delays_seconds: tuple[int, ...] = (5, 30, 120)
    delivery_limit: int = 20
    max_body_bytes: int | None = (
        MAX_BODY_BYTES  # a larger body is quarantined; None: the handler bounds it
    )

    @property
    def is_quorum(self) -> bool:
        """Whether it is replicated, and has a ladder and a dead-letter queue."""
        return self.type == "quorum"

    @property
    def dead_name(self) -> str:
        """Where the broker puts what killed its consumer ``delivery_limit`` times."""
        return f"{self.name}.dead"

    def retry_name(self, delay_seconds: int) -> str:
        """The rung of the ladder that gives a message back after the delay."""
        return f"{self.name}.retry.{delay_seconds}s"


ModelT = TypeVar("ModelT", bound=BaseModel)
_PATTERN_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What is published: everything that goes on the wire, so that an outbox row can hold it."""

    exchange: str
    routing_key: str
    body: bytes
    message_id: str
    type: str | None = None
    app_id: str | None = None
    content_type: str = "application/json"
    content_encoding: str | None = None
    headers: Mapping[str, Any] = field(default_factory=dict)
    timestamp: datetime | None = None
    mandatory: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EventType(Generic[ModelT]):
    """One kind of event: its routing key (``{field}`` where it varies), its body and its schema version."""

    routing_key: str
    model: type[ModelT]
    summary: str
    schema: str = "1.0"
    exchange: Exchange = HOSTLER

    def message(
        self, body: ModelT, *, app_id: str, message_id: str | None = None, **parts: str
    ) -> Message:
        """The event as a message, with a fresh id unless one is given; ``parts`` fill the routing key."""
        trace = logs.traceparent.get()
        return Message(
            exchange=self.exchange.name,
            routing_key=self.routing_key.format(**parts),
            body=body.model_dump_json(exclude_none=True).encode(),
            message_id=message_id or str(uuid.uuid4()),
            type=_PATTERN_FIELD.sub("", self.routing_key).rstrip("."),
            app_id=app_id,
            headers={"schema": self.schema, **({"traceparent": trace} if trace else {})},
            timestamp=datetime.now(UTC),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """All that a service has on the broker; the same constants make the AsyncAPI document."""

    queues: tuple[Queue, ...] = ()
    exchanges: tuple[Exchange, ...] = (HOSTLER,)
    publishes: tuple[EventType[Any], ...] = ()
    consumes: tuple[EventType[Any], ...] = ()
