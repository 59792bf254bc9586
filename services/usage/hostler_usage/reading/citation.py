"""How a stored message is named wherever something rests on it."""

from datetime import datetime

from hostler_usage.reading.event import event_id
from hostler_usage.reading.statement import Evidence


def cited(evidence: Evidence) -> dict[str, str]:
    """The message as rows and answers cite it: its own id, and its name at /v1/events."""
    return {
        "message_id": evidence.message_id,
        "event_id": event_id(evidence.event_time, evidence.digest),
    }


def order(evidence: Evidence) -> tuple[datetime, str, bytes]:
    """The one order messages are cited in."""
    return (evidence.event_time, evidence.message_id, evidence.digest)
