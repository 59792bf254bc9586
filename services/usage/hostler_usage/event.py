"""A notification as it is filed: what it holds, what it says, and how it came."""

from collections.abc import Mapping
from dataclasses import dataclass

from hostler_usage.envelope import Notification
from hostler_usage.normalise import Normalised


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One notification, read and normalised, with its body byte for byte."""

    notification: Notification
    normalised: Normalised
    body: bytes
    source: str
    region: str
    exchange: str
    routing_key: str
    content_type: str | None
    content_encoding: str | None
    headers: Mapping[str, object]

    @property
    def key(self) -> tuple[object, ...]:
        """What tells this message from every other: its time, its id and its bytes."""
        return (
            self.notification.timestamp,
            self.notification.message_id,
            self.notification.digest,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What became of some notifications; every one is either stored or a duplicate."""

    stored: int = 0
    duplicate: int = 0
    conflict: int = 0
    unknown_type: int = 0
    problem: int = 0
