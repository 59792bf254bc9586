"""What one notification says of one resource, in the vocabulary all clouds' dialects map to.

A notification is worth zero or more observations: "from this moment on these attributes hold" and
"at this moment it ended". They are plain values with a total order made of content alone, so that
a resource's history is a function of the set of them: when and how often they arrived is not in
them, and cannot matter.
"""

from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum, StrEnum
from typing import NewType

ResourceType = NewType("ResourceType", str)
INSTANCE = ResourceType("instance")
VOLUME = ResourceType("volume")

Scalar = str | int | None
Attributes = tuple[tuple[str, Scalar], ...]


class Kind(StrEnum):
    """What an observation does to its resource."""

    STATE = "state"  # from t_eff on, the attributes hold
    END = "end"  # at t_eff the resource ceased to exist


class Rank(IntEnum):
    """Who is believed where two observations speak of the same moment; stored, never renumbered."""

    EVIDENCE = 10  # said in passing: audits, updates, anything that came later
    CREATE = 20
    UPDATE = 30
    ACTION = 40
    DELETE = 50


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class ResourceKey:
    """A resource of one cloud region; regions share nothing, not even ids."""

    region: str
    resource_type: ResourceType
    resource_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """The stored message that says so: enough to fetch its body."""

    event_time: datetime
    message_id: str
    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One statement about one resource.

    `opens` says that the resource was in being, and billable, at `t_eff`. `is_rounded` says that
    `t_eff` was read from a field that some senders cut or round to a whole second, so that the
    same moment may be met again up to a second away. `attributes` are sorted by name; a name that
    is absent is not spoken of, a name with None is said to be nothing.
    """

    kind: Kind
    t_eff: datetime
    rank: Rank
    opens: bool = False
    is_rounded: bool = False
    attributes: Attributes = ()
    evidence: Evidence

    @property
    def order(self) -> tuple[datetime, Rank, datetime, str, bytes, str, str]:
        """The total order within a resource, made of content only."""
        evidence = self.evidence
        return (
            self.t_eff,
            self.rank,
            evidence.event_time,
            evidence.message_id,
            evidence.digest,
            self.kind,
            repr(self.attributes),
        )


def attributes(**values: Scalar) -> Attributes:
    """`values` in the one order observations keep them in."""
    return tuple(sorted(values.items()))
