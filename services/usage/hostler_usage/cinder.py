"""Cinder's volumes, read into observations.

A body is a full snapshot at the time of its event; nothing in it dates an earlier change, so each
speaks of its own moment, and of the birth (`launched_at`, else `created_at`) only that it happened.

`cinder-volume-usage-audit --send_actions` sends the create and delete events of its period again:
new message ids, the audit run's timestamp, today's size. They are told by their audit period of no
length (cinder/cmd/volume_usage_audit.py), whose moment is the true one, and count as evidence only.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from hostler_usage.observation import Attributes, Evidence, Kind, Observation, Rank, attributes
from hostler_usage.payload import Fields
from hostler_usage.rules import Edge

_GONE = frozenset({"deleted", "deleting"})


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeBody:
    """The fields of a volume payload that metering reads."""

    volume_id: str | None
    project_id: str | None
    user_id: str | None
    status: str | None
    born_at: datetime | None
    resent_moment: datetime | None
    volume_type: str | None
    size_gb: int | None
    zone: str | None
    host: str | None
    attached_to: str | None

    @property
    def snapshot(self) -> Attributes:
        """Everything the body says of its own moment."""
        said: dict[str, str | int | None] = {
            "project": self.project_id,
            "user": self.user_id,
            "state": self.status,
            "size_gb": self.size_gb,
        }
        stated = {name: value for name, value in said.items() if value is not None}
        return attributes(
            volume_type=self.volume_type,
            zone=self.zone,
            host=self.host,
            attached_to=self.attached_to,
            **stated,
        )


def read_volume(payload: Fields) -> VolumeBody:
    """Read the payload of `volume.*` (cinder/volume/volume_utils.py, `_usage_from_volume`)."""
    beginning = payload.moment("audit_period_beginning", "audit_period_begining")
    ending = payload.moment("audit_period_ending")
    servers = {
        server
        for row in payload.rows("volume_attachment")
        if row.moment("detach_time") is None
        and (server := row.text("instance_uuid", "server_id")) is not None
    }
    return VolumeBody(
        volume_id=payload.text("volume_id"),
        project_id=payload.text("tenant_id", "project_id"),
        user_id=payload.text("user_id"),
        status=payload.text("status"),
        born_at=payload.moment("launched_at", "created_at"),
        resent_moment=beginning if beginning is not None and beginning == ending else None,
        volume_type=payload.text("volume_type"),
        size_gb=payload.whole("size"),
        zone=payload.text("availability_zone"),
        host=payload.text("host"),
        attached_to=",".join(sorted(servers)) or None,
    )


def observe(body: VolumeBody, edge: Edge, evidence: Evidence) -> Iterator[Observation]:
    """Yield what an event with this `edge` and `body` says of its volume."""
    if edge is Edge.NONE:
        return
    is_resent = edge in (Edge.LAUNCH, Edge.END) and body.resent_moment is not None
    born_at = body.born_at or (body.resent_moment if edge is Edge.LAUNCH else None)
    if edge is Edge.LAUNCH and not is_resent:
        yield Observation(
            kind=Kind.STATE,
            t_eff=born_at or evidence.event_time,
            rank=Rank.CREATE,
            opens=True,
            is_rounded=born_at is not None,
            attributes=body.snapshot,
            evidence=evidence,
        )
        return
    if born_at is not None:
        yield Observation(
            kind=Kind.STATE,
            t_eff=born_at,
            rank=Rank.EVIDENCE,
            opens=True,
            is_rounded=True,
            evidence=evidence,
        )
    is_gone = edge is Edge.END or (edge is Edge.AUDIT and body.status == "deleted")
    if is_gone:
        yield Observation(
            kind=Kind.END,
            t_eff=(body.resent_moment if is_resent else None) or evidence.event_time,
            rank=Rank.EVIDENCE if is_resent or edge is Edge.AUDIT else Rank.DELETE,
            is_rounded=is_resent,
            evidence=evidence,
        )
    yield Observation(
        kind=Kind.STATE,
        t_eff=evidence.event_time,
        rank=Rank.ACTION if edge is Edge.CHANGE else Rank.EVIDENCE,
        attributes=tuple(
            pair for pair in body.snapshot if pair[0] != "state" or pair[1] not in _GONE
        ),
        evidence=evidence,
    )
