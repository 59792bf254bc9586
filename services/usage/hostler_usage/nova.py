"""Nova's two dialects, read into the same few observations.

The hinge is `launched_at`. Nova sets it anew whenever a segment of an instance's life begins
(create, finished resize, revert, rebuild, rescue, unshelve) and repeats it in every later body.
Each of them therefore says "from launched_at on it had this flavor", which is how a lost create or
resize is made good to the exact moment by any later update or audit. Two spans must not be taken
at their word: flavor and image flip in Nova's database some time before launched_at follows
(`rules.BETWEEN_SEGMENTS`).

States and hosts have no such field: they hold from the time of the event that shows them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from hostler_usage.observation import Attributes, Evidence, Kind, Observation, Rank, attributes
from hostler_usage.payload import Fields
from hostler_usage.rules import BETWEEN_SEGMENTS, Edge

# the .end of a launch follows the launch within seconds
_LAUNCH_IS_OLD = timedelta(minutes=10)
_DELETED = "deleted"
_NOT_YET = frozenset({"building", _DELETED})
_RANK_OF_STATE = {Edge.CHANGE: Rank.ACTION, Edge.NOTE: Rank.UPDATE, Edge.AUDIT: Rank.EVIDENCE}
_RANK_OF_END = {Edge.END: Rank.DELETE, Edge.NOTE: Rank.UPDATE, Edge.AUDIT: Rank.EVIDENCE}


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceBody:
    """The fields of an instance payload that metering reads, whichever dialect spelled them."""

    instance_id: str | None
    project_id: str | None
    user_id: str | None
    state: str | None
    task_state: str | None
    launched_at: datetime | None
    ended_at: datetime | None
    failed: bool
    flavor: str | None
    vcpus: int | None
    memory_mb: int | None
    disk_gb: int | None
    image: str | None
    host: str | None
    node: str | None
    zone: str | None

    @property
    def size(self) -> Attributes:
        """What a segment fixes from its launched_at on."""
        owner: dict[str, str | int | None] = {"project": self.project_id, "user": self.user_id}
        shape: dict[str, str | int | None] = {
            "flavor": self.flavor,
            "vcpus": self.vcpus,
            "memory_mb": self.memory_mb,
            "disk_gb": self.disk_gb,
        }
        stated = {name: value for name, value in (owner | shape).items() if value is not None}
        return attributes(image=self.image, **stated)

    @property
    def place(self) -> dict[str, str | None]:
        """Where it runs; all None once offloaded."""
        return {"host": self.host, "node": self.node, "zone": self.zone}


def read_legacy(payload: Fields) -> InstanceBody:
    """Read the payload of `compute.instance.*` (nova/notifications/base.py)."""
    root_gb, ephemeral_gb = payload.whole("root_gb"), payload.whole("ephemeral_gb")
    image = payload.text("image_ref_url")
    message = payload.values.get("message")
    return InstanceBody(
        instance_id=payload.text("instance_id"),
        project_id=payload.text("tenant_id"),
        user_id=payload.text("user_id"),
        state=payload.text("state"),
        task_state=payload.text("state_description"),
        launched_at=payload.moment("launched_at"),
        ended_at=payload.moment("deleted_at", "terminated_at"),
        failed=isinstance(message, str) and message not in ("", "Success"),
        flavor=payload.text("instance_type"),
        vcpus=payload.whole("vcpus"),
        memory_mb=payload.whole("memory_mb"),
        disk_gb=payload.whole("disk_gb") if root_gb is None else root_gb + (ephemeral_gb or 0),
        # ".../images/<uuid>", and ".../images/" for an instance booted from a volume
        image=(image.rsplit("/", 1)[-1] or None) if image else None,
        host=payload.text("host"),
        node=payload.text("node"),
        zone=payload.text("availability_zone"),
    )


def read_versioned(payload: Fields) -> InstanceBody:
    """Read the payload of `instance.*` (nova/notifications/objects/instance.py)."""
    data = payload.inner("nova_object.data")
    flavor = data.inner("flavor", "nova_object.data")
    root_gb, ephemeral_gb = flavor.whole("root_gb"), flavor.whole("ephemeral_gb")
    return InstanceBody(
        instance_id=data.text("uuid"),
        project_id=data.text("tenant_id"),
        user_id=data.text("user_id"),
        state=data.text("state"),
        task_state=data.text("task_state"),
        launched_at=data.moment("launched_at"),
        ended_at=data.moment("deleted_at", "terminated_at"),
        failed=False,
        flavor=flavor.text("name"),
        vcpus=flavor.whole("vcpus"),
        memory_mb=flavor.whole("memory_mb"),
        disk_gb=None if root_gb is None else root_gb + (ephemeral_gb or 0),
        image=data.text("image_uuid"),
        host=data.text("host"),
        node=data.text("node"),
        zone=data.text("availability_zone"),
    )


def observe(body: InstanceBody, edge: Edge, evidence: Evidence) -> Iterator[Observation]:
    """Yield what an event with this `edge` and `body` says of its instance."""
    if edge is Edge.NONE or body.failed:
        return
    if edge in (Edge.LAUNCH, Edge.RELAUNCH):
        yield _launch(body, edge, evidence)
        return
    if body.launched_at is not None:
        yield from _segment(body, body.launched_at, evidence)
    if edge in _RANK_OF_END and (edge is Edge.END or body.state == _DELETED):
        yield Observation(
            kind=Kind.END,
            t_eff=body.ended_at or evidence.event_time,
            rank=_RANK_OF_END[edge],
            is_rounded=body.ended_at is not None,
            evidence=evidence,
        )
    elif edge in _RANK_OF_STATE and body.state is not None and body.state not in _NOT_YET:
        if edge is Edge.NOTE and body.task_state is not None:
            return  # sent by whichever service began the task, whose clock may run ahead
        place = {} if edge is Edge.NOTE else body.place
        yield Observation(
            kind=Kind.STATE,
            t_eff=evidence.event_time,
            rank=_RANK_OF_STATE[edge],
            attributes=attributes(state=body.state, **place),
            evidence=evidence,
        )


def _launch(body: InstanceBody, edge: Edge, evidence: Evidence) -> Observation:
    launched_at = body.launched_at
    is_relaunch = edge is Edge.RELAUNCH
    if (
        is_relaunch
        and launched_at is not None
        and evidence.event_time - launched_at > _LAUNCH_IS_OLD
    ):
        launched_at = None  # of a cloud that did not set it anew: it is that of the birth
    return Observation(
        kind=Kind.STATE,
        # a body that cannot say when: the event itself is the nearest moment known
        t_eff=launched_at or evidence.event_time,
        rank=Rank.ACTION if is_relaunch else Rank.CREATE,
        opens=True,
        is_rounded=launched_at is not None,
        attributes=attributes(
            **dict(body.size), **({"state": body.state} if body.state else {}), **body.place
        ),
        evidence=evidence,
    )


def _segment(
    body: InstanceBody, launched_at: datetime, evidence: Evidence
) -> Iterator[Observation]:
    """What a body says in passing about the segment it belongs to."""
    settled = body.task_state not in BETWEEN_SEGMENTS
    yield Observation(
        kind=Kind.STATE,
        t_eff=launched_at,
        rank=Rank.EVIDENCE,
        opens=True,
        is_rounded=True,
        # a launch ends in "active"; where it did not, the event that says so outranks this
        attributes=attributes(**dict(body.size), state="active") if settled else (),
        evidence=evidence,
    )
