"""Why a number of usage is what it is: the parts that add up to it, and the messages they rest on.

A part of what was held is the time an interval spent inside the window, times how much was held; a
part of what moved is an amount as it stands. Both are exact integers, and the amount of a usage row
is their plain sum.
"""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from hostler_usage.reading.times import EPOCH, MICROSECOND, microseconds

Citation = Mapping[str, str]
"""A message as rows cite it: `message_id` and `event_id`."""

BODY_BUDGET_BYTES: Final = 16 * 1024 * 1024
"""How many bytes of bodies one answer holds; those beyond it are fetched one by one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldPart:
    """An interval's share of what was held: `span_us` x `quantity` unit-microseconds."""

    region: str
    resource_type: str
    resource_id: str
    start: datetime
    end: datetime | None
    counted_from: datetime
    counted_until: datetime
    quantity: int
    project_id: str | None
    user_id: str | None
    state_class: str
    attributes: Mapping[str, Any]
    opened_by: Sequence[Citation]
    closed_by: Sequence[Citation]
    provenance: str

    @property
    def span_us(self) -> int:
        """Microseconds that count."""
        return microseconds(self.counted_until - self.counted_from)

    @property
    def amount(self) -> int:
        """What it adds to the sum."""
        return self.span_us * self.quantity

    @property
    def cited(self) -> Sequence[Citation]:
        """The messages it rests on."""
        return [*self.opened_by, *self.closed_by]


@dataclass(frozen=True, slots=True, kw_only=True)
class MovedPart:
    """What moved at one moment, and what the resource was then (None where it was not in being)."""

    region: str
    resource_type: str
    resource_id: str
    at: datetime
    counter: str
    label: str
    amount: int
    project_id: str | None
    state_class: str | None
    attributes: Mapping[str, Any]
    evidence: Sequence[Citation]

    @property
    def cited(self) -> Sequence[Citation]:
        """The messages it rests on."""
        return self.evidence


Part = HeldPart | MovedPart


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One resource's share of a row: all it adds to it, and those of its parts that are on this page."""

    region: str
    resource_type: str
    resource_id: str
    amount: int
    parts_in_all: int
    parts: Sequence[Part]


def shares(rows: Iterable[tuple[Part, int, int]]) -> list[Share]:
    """Parts in the order of their resources, each with what its resource adds and has in all."""
    found: dict[tuple[str, str, str], tuple[int, int, list[Part]]] = {}
    for part, amount, parts in rows:
        key = (part.region, part.resource_type, part.resource_id)
        found.setdefault(key, (amount, parts, []))[2].append(part)
    return [
        Share(
            region=region,
            resource_type=resource_type,
            resource_id=resource_id,
            amount=amount,
            parts_in_all=count,
            parts=parts,
        )
        for (region, resource_type, resource_id), (amount, count, parts) in found.items()
    ]


def citations(parts: Iterable[Part]) -> list[Citation]:
    """Every message that some parts rest on, once, oldest first."""
    found = {item["event_id"]: item for part in parts for item in part.cited}
    return [found[name] for name in sorted(found, key=lambda name: (event_key(name)[0], name))]


def event_key(event_id: str) -> tuple[datetime, bytes]:
    """The event time and the body's sha256 that an event id of ours is made of."""
    time, _, digest = event_id.rpartition("-")  # before 1970 the time has a sign
    return EPOCH + int(time) * MICROSECOND, bytes.fromhex(digest)


def affordable(sizes: Sequence[int], budget: int = BODY_BUDGET_BYTES) -> int:
    """How many of the first bodies fit into an answer."""
    for number, size in enumerate(sizes):
        budget -= size
        if budget < 0:
            return number
    return len(sizes)


def body_text(body: bytes) -> tuple[str, str]:
    """The encoding and the text of a body: as it is where it is UTF-8, else base64."""
    try:
        return "utf-8", body.decode()
    except UnicodeDecodeError:
        return "base64", base64.b64encode(body).decode()
