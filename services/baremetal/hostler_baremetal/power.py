"""What to do to bring a node into a power state, and when it is there: tables, no I/O, no clock.

Invariants: a command is chosen from what the BMC said a moment ago, never from memory, and an
operation leaves `queued` before its command is sent, so that whoever finds it later knows that the
command may have gone out and only looks. An outcome that cannot be proven is not called a success.
"""

import enum
from collections.abc import Mapping
from typing import Final

from hostler_baremetal.ipmi_command import ChassisAction


class PowerState(enum.StrEnum):
    """What is known of a node's power. `unknown` is an answer, never rounded to off."""

    ON = "on"
    OFF = "off"
    UNKNOWN = "unknown"


class PowerAction(enum.StrEnum):
    """What can be asked for."""

    ON = "on"
    OFF = "off"
    SOFT = "soft"
    CYCLE = "cycle"
    RESET = "reset"


class OperationState(enum.StrEnum):
    """Where an operation stands."""

    QUEUED = "queued"
    ISSUING = "issuing"
    """The command is being sent, or was: nobody may send it again."""
    WAITING = "waiting"
    """The BMC has taken the command; the node is not there yet."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"


FINISHED: Final = frozenset({OperationState.SUCCEEDED, OperationState.FAILED})

# state -> the states that may follow it; what is not here is a bug
TRANSITIONS: Final[Mapping[OperationState, frozenset[OperationState]]] = {
    OperationState.QUEUED: frozenset({OperationState.ISSUING}) | FINISHED,
    OperationState.ISSUING: frozenset({OperationState.WAITING}) | FINISHED,
    OperationState.WAITING: FINISHED,
    OperationState.SUCCEEDED: frozenset(),
    OperationState.FAILED: frozenset(),
}

# the state that an action ends in
TARGETS: Final[Mapping[PowerAction, PowerState]] = {
    PowerAction.ON: PowerState.ON,
    PowerAction.OFF: PowerState.OFF,
    PowerAction.SOFT: PowerState.OFF,
    PowerAction.CYCLE: PowerState.ON,
    PowerAction.RESET: PowerState.ON,
}


class Plan(enum.Enum):
    """A step that is not a command."""

    NOTHING = "nothing"
    """The node is there already."""
    REFUSE = "refuse"
    """The action makes no sense in this state."""
    LOOK_AGAIN = "look again"
    """The state is not known: no command is given into the dark."""


# (action, what the BMC says) -> what to do. A cycle of a node that is off ends with it on.
_PLANS: Final[Mapping[tuple[PowerAction, PowerState], ChassisAction | Plan]] = {
    (PowerAction.ON, PowerState.OFF): ChassisAction.POWER_UP,
    (PowerAction.ON, PowerState.ON): Plan.NOTHING,
    (PowerAction.OFF, PowerState.ON): ChassisAction.POWER_DOWN,
    (PowerAction.OFF, PowerState.OFF): Plan.NOTHING,
    (PowerAction.SOFT, PowerState.ON): ChassisAction.SOFT_SHUTDOWN,
    (PowerAction.SOFT, PowerState.OFF): Plan.NOTHING,
    (PowerAction.CYCLE, PowerState.ON): ChassisAction.POWER_CYCLE,
    (PowerAction.CYCLE, PowerState.OFF): ChassisAction.POWER_UP,
    (PowerAction.RESET, PowerState.ON): ChassisAction.HARD_RESET,
    (PowerAction.RESET, PowerState.OFF): Plan.REFUSE,
}


def plan(action: PowerAction, observed: PowerState) -> ChassisAction | Plan:
    """Returns the command that the action needs now, or why there is none."""
    return _PLANS.get((action, observed), Plan.LOOK_AGAIN)


class Verdict(enum.Enum):
    """What an observation after the command says of the operation."""

    WAIT = "wait"
    REACHED = "reached"
    UNPROVEN = "unproven"
    """The node is in the state it was in before: whether it went through it cannot be told."""


# A board needs about a second to go off: on seen this long after a cycle is on again.
CYCLE_SETTLES_SECONDS: Final = 5.0


def judge(
    action: PowerAction,
    *,
    observed: PowerState,
    acknowledged: bool,
    seen_off: bool,
    seconds_since_issue: float,
) -> Verdict:
    """Returns what an observation says.

    Args:
        action: what was asked for.
        observed: what the BMC says now.
        acknowledged: whether the BMC has taken the command.
        seen_off: whether the node was seen off since the command.
        seconds_since_issue: since the command was, or may have been, sent.
    """
    if observed is not TARGETS[action]:
        return Verdict.WAIT
    match action:
        case PowerAction.ON | PowerAction.OFF | PowerAction.SOFT:
            return Verdict.REACHED
        case PowerAction.RESET:
            return Verdict.REACHED if acknowledged else Verdict.UNPROVEN
        case PowerAction.CYCLE if seen_off:
            return Verdict.REACHED
        case PowerAction.CYCLE if seconds_since_issue < CYCLE_SETTLES_SECONDS:
            return Verdict.WAIT
        case PowerAction.CYCLE:
            return Verdict.REACHED if acknowledged else Verdict.UNPROVEN


def is_drift(last_known: PowerState | None, observed: PowerState) -> bool:
    """Returns whether a poll found the node in another state than it was last known to be in.

    What is not known is no drift, nor is the first look. A change behind an outage is.
    """
    known = {PowerState.ON, PowerState.OFF}
    return last_known in known and observed in known and last_known is not observed
