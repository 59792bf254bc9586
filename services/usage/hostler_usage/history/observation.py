"""The vocabulary the fold works with: what held, or ended, from some moment on.

A statement is worth zero or more observations (`observe`). They are plain values with a total order
made of content alone, so that a resource's history is a function of the set of them: when and how
often they arrived is not in them, and cannot matter.
"""

from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum, StrEnum

from hostler_usage.reading.statement import Attributes, Evidence, Scalar


class Kind(StrEnum):
    """What an observation does to its resource."""

    STATE = "state"  # from t_eff on, the attributes hold
    END = "end"  # at t_eff the resource ceased to exist


class Rank(IntEnum):
    """Who is believed where two observations speak of the same moment."""

    EVIDENCE = 10  # said in passing: audits, updates, anything that came later
    CREATE = 20
    UPDATE = 30
    ACTION = 40
    DELETE = 50


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
    def order(self) -> tuple[datetime, Rank, datetime, str, bytes, str, "_Said"]:
        """The total order within a resource, made of content only."""
        evidence = self.evidence
        return (
            self.t_eff,
            self.rank,
            evidence.event_time,
            evidence.message_id,
            evidence.digest,
            self.kind,
            _Said(self.attributes),
        )


def attributes(**values: Scalar) -> Attributes:
    """`values` in the one order observations keep them in."""
    return tuple(sorted(values.items()))


class _Said:
    """Attributes as the last resort of an order: spelled out only where all else is equal."""

    __slots__ = ("_attributes",)

    def __init__(self, attributes: Attributes) -> None:
        self._attributes = attributes

    def __lt__(self, other: "_Said") -> bool:
        return repr(self._attributes) < repr(other._attributes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Said) and self._attributes == other._attributes

    def __hash__(self) -> int:
        return hash(self._attributes)
