"""A notification as it is filed: what it holds, what it says, and how it came."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from hostler_usage.reading.envelope import Notification
from hostler_usage.reading.normalise import Normalised
from hostler_usage.reading.times import epoch_microseconds


class Origin(NamedTuple):
    """How a message came: the same for thousands of them. Empty where the message says nothing."""

    source: str
    exchange: str
    routing_key: str
    content_type: str
    content_encoding: str


class Event(NamedTuple):
    """One notification, read and normalised, with its body byte for byte.

    `notification` need not hold its payload any more: what that says is in `normalised`.
    """

    notification: Notification
    normalised: Normalised
    body: bytes
    region: str
    origin: Origin
    headers: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What became of some notifications; every one is either stored or a duplicate."""

    stored: int = 0
    duplicate: int = 0
    conflict: int = 0
    unknown_type: int = 0
    problem: int = 0


def event_id(event_time: datetime, digest: bytes) -> str:
    """The name of a stored message in the API: its event time and its body's sha256."""
    return f"{epoch_microseconds(event_time)}-{digest.hex()}"
