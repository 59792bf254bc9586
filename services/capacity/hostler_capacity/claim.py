"""Claims: a promise of room on one node, and the life of such a promise.

    held --confirm--> confirmed --release--> released
     |---release-----------------------------^
     |---expire--> expired

A claim is born `held` with a time to live. Whoever asked for it confirms it once the guest exists;
a host report that lists the guest confirms it too. What is neither confirmed nor released in time
expires. `held` and `confirmed` claims are live: they, and only they, count against a node, with
exactly the vector that was written down when they were granted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType
from typing import Final, NewType
from uuid import UUID

from hostler_capacity.resources import ResourceClass

ClaimId = NewType("ClaimId", UUID)
NodeId = NewType("NodeId", int)


class State(StrEnum):
    """Where a claim is in its life."""

    HELD = "held"
    CONFIRMED = "confirmed"
    RELEASED = "released"
    EXPIRED = "expired"


class Action(StrEnum):
    """What can happen to a claim."""

    CONFIRM = "confirm"
    RELEASE = "release"
    EXPIRE = "expire"


LIVE: Final = frozenset({State.HELD, State.CONFIRMED})

TRANSITIONS: Final[Mapping[tuple[State, Action], State]] = MappingProxyType(
    {
        (State.HELD, Action.CONFIRM): State.CONFIRMED,
        (State.HELD, Action.RELEASE): State.RELEASED,
        (State.HELD, Action.EXPIRE): State.EXPIRED,
        (State.CONFIRMED, Action.CONFIRM): State.CONFIRMED,
        (State.CONFIRMED, Action.RELEASE): State.RELEASED,
        (State.RELEASED, Action.RELEASE): State.RELEASED,
        (State.EXPIRED, Action.RELEASE): State.EXPIRED,
    }
)
"""Every legal step. A pair that is not here is refused; a step onto itself changes nothing."""


class IllegalStepError(ValueError):
    """The claim's state does not allow the action."""


def after(state: State, action: Action) -> State:
    """Return the state that `action` leads to.

    Raises:
        IllegalStepError: the action makes no sense in this state.
    """
    reached = TRANSITIONS.get((state, action))
    if reached is None:
        raise IllegalStepError(f"a claim that is {state} cannot {action}")
    return reached


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One claim as it is stored. `resources` is what it takes from the node, overhead included."""

    id: ClaimId
    state: State
    node_id: NodeId
    host: str
    hypervisor_hostname: str
    node_uuid: UUID | None
    consumer_id: UUID
    project_id: str
    flavor: str | None
    resources: Mapping[ResourceClass, int]
    overhead_mb: int
    overhead_model: str
    overhead_model_version: int
    created_at: datetime
    expires_at: datetime
    confirmed_at: datetime | None
    ended_at: datetime | None

    @property
    def is_live(self) -> bool:
        """True while the claim counts against its node."""
        return self.state in LIVE
