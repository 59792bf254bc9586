"""Which event does what: one row per event type, as data.

`Edge` names the ways an event can move a billing edge. Everything about order, time and precedence
follows from it in `nova.py` and `cinder.py`; an event type without a row is kept and moves nothing.
`NORM_VERSION` grows whenever the same body would yield other observations: stored observations of
an older version are then made anew.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

NORM_VERSION: Final = 1


class Dialect(StrEnum):
    """Whose payload it is, and so which reader understands it."""

    NOVA_LEGACY = "nova_legacy"
    NOVA_VERSIONED = "nova_versioned"
    CINDER_VOLUME = "cinder_volume"


class Edge(StrEnum):
    """What an event of some type is evidence of."""

    LAUNCH = "launch"  # life begins at launched_at
    RELAUNCH = "relaunch"  # a new segment of life begins at launched_at: resize, rebuild, ...
    CHANGE = "change"  # the state in the payload holds from the event's own time
    NOTE = "note"  # as CHANGE, but said in passing
    AUDIT = "audit"  # a periodic statement of what is (or was) there
    END = "end"
    NONE = "none"  # belongs to a metered resource, moves nothing


@dataclass(frozen=True, slots=True)
class Rule:
    """How events of one type are read."""

    dialect: Dialect
    edge: Edge


# action in the legacy name | action in the versioned name | what it moves
_INSTANCE_ACTIONS: Final = (
    ("create.end", "create.end", Edge.LAUNCH),
    ("finish_resize.end", "resize_finish.end", Edge.RELAUNCH),
    ("resize.revert.end", "resize_revert.end", Edge.RELAUNCH),
    ("rebuild.end", "rebuild.end", Edge.RELAUNCH),
    ("rescue.end", "rescue.end", Edge.RELAUNCH),
    ("unshelve.end", "unshelve.end", Edge.RELAUNCH),
    ("resize.confirm.end", "resize_confirm.end", Edge.CHANGE),
    ("unrescue.end", "unrescue.end", Edge.CHANGE),
    ("power_off.end", "power_off.end", Edge.CHANGE),
    ("power_on.end", "power_on.end", Edge.CHANGE),
    ("pause.end", "pause.end", Edge.CHANGE),
    ("unpause.end", "unpause.end", Edge.CHANGE),
    ("suspend.end", "suspend.end", Edge.CHANGE),
    ("resume.end", "resume.end", Edge.CHANGE),
    ("suspend", None, Edge.CHANGE),
    ("resume", None, Edge.CHANGE),
    ("reboot.end", "reboot.end", Edge.CHANGE),
    ("shelve.end", "shelve.end", Edge.CHANGE),
    ("shelve_offload.end", "shelve_offload.end", Edge.CHANGE),
    ("soft_delete.end", "soft_delete.end", Edge.CHANGE),
    ("restore.end", "restore.end", Edge.CHANGE),
    ("live_migration._post.end", "live_migration_post.end", Edge.CHANGE),
    ("live_migration.post.dest.end", "live_migration_post_dest.end", Edge.CHANGE),
    ("update", "update", Edge.NOTE),
    ("exists", "exists", Edge.AUDIT),
    ("delete.end", "delete.end", Edge.END),
)

_VOLUME_ACTIONS: Final = (
    ("create.end", Edge.LAUNCH),
    ("manage_existing.end", Edge.LAUNCH),
    ("resize.start", Edge.NOTE),  # the last word on the size before
    ("resize.end", Edge.CHANGE),
    ("retype", Edge.CHANGE),
    ("attach.end", Edge.CHANGE),
    ("detach.end", Edge.CHANGE),
    ("transfer.accept.end", Edge.CHANGE),
    ("update.end", Edge.NOTE),
    ("exists", Edge.AUDIT),
    ("delete.end", Edge.END),
    ("unmanage.end", Edge.END),
)

RULES: Final[dict[str, Rule]] = {
    **{
        f"compute.instance.{legacy}": Rule(Dialect.NOVA_LEGACY, edge)
        for legacy, _, edge in _INSTANCE_ACTIONS
    },
    **{
        f"instance.{versioned}": Rule(Dialect.NOVA_VERSIONED, edge)
        for _, versioned, edge in _INSTANCE_ACTIONS
        if versioned is not None
    },
    **{f"volume.{action}": Rule(Dialect.CINDER_VOLUME, edge) for action, edge in _VOLUME_ACTIONS},
}

# what else belongs to a metered resource: kept, filed under the resource, moving nothing
_FAMILIES: Final = (
    ("compute.instance.", Dialect.NOVA_LEGACY),
    ("instance.", Dialect.NOVA_VERSIONED),
    ("volume.", Dialect.CINDER_VOLUME),
)

RESIZING: Final = frozenset({"resize_migrating", "resize_migrated", "resize_finish"})
REVERTING: Final = frozenset({"resize_reverting"})
REBUILDING: Final = frozenset({"rebuilding", "rebuild_block_device_mapping", "rebuild_spawning"})
# between the flip of flavor or image in Nova's database and the launched_at that belongs to it
BETWEEN_SEGMENTS: Final = RESIZING | REVERTING | REBUILDING

STATE_CLASSES: Final[dict[str, str]] = {
    "active": "running",
    "resized": "running",
    "rescued": "running",
    "building": "building",
    "paused": "paused",
    "suspended": "suspended",
    "stopped": "stopped",
    "shelved": "shelved",
    "shelved_offloaded": "shelved_offloaded",
    "soft-delete": "soft_deleted",
    "soft_deleted": "soft_deleted",
    "error": "error",
    # of volumes
    "available": "available",
    "reserved": "available",
    "in-use": "in_use",
    "attaching": "in_use",
    "detaching": "in_use",
}


def rule_for(event_type: str) -> Rule | None:
    """The row for `event_type`, or None where this service knows nothing of its kind."""
    rule = RULES.get(event_type)
    if rule is not None:
        return rule
    for prefix, dialect in _FAMILIES:
        if event_type.startswith(prefix):
            return Rule(dialect, Edge.NONE)
    return None


def state_class(state: str | None) -> str:
    """The class a state is billed under; a state not known is `other`, none is `unknown`."""
    if state is None:
        return "unknown"
    return STATE_CLASSES.get(state, "other")
