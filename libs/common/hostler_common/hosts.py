"""Host reports: what a compute agent, or a proxy in front of many nodes, says of what it has.

Reports are the one message two services share (baremetal and compute agents write them, capacity
reads them), hence their home here. A report is a list of capability records, each addressed by
`(host, hypervisor_hostname)` as in Nova's compute_nodes table: one host may front many nodes. A
bare-metal node also carries its UUID, which stays its identity when another proxy fronts it.

Invariant: a report is a statement about *all* nodes of its host. It travels in parts of at most
200 nodes that share `report_id` and `reported_at`; only when every part has arrived may a reader
conclude that a node not named in it is gone. Quantities follow Nova's units (MiB, GiB).
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Any, Final
from uuid import UUID

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from hostler_common import bus

NODES_PER_PART: Final = 200
"""The most nodes one part may name."""

PART_BYTES: Final = 192 * 1024
"""Parts are cut before they grow past this, since a hypervisor lists its guests too."""

Quantity = Annotated[int, Field(ge=0, le=2**48)]
Name = Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f]+$")]


class NodeState(StrEnum):
    """The values of `NodeRecord.state` that take guests; any other value takes none.

    A leased bare-metal node says so in `state` *and* reports all of its memory as used.
    """

    UP = "up"
    AVAILABLE = "available"


class GuestRecord(BaseModel):
    """One guest that the hypervisor runs, whoever started it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    uuid: UUID
    memory_mb: Quantity
    vcpus: Quantity
    vm_type: str | None = None
    """Virtualisation mode where the overhead depends on it: pv, hvm, pvh."""
    overhead_mb: Quantity | None = None
    """What the hypervisor itself says it spends on this guest, where it can tell."""


class NodeRecord(BaseModel):
    """One hypervisor or one bare-metal node: its capacity, its use and what it can do."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    hypervisor_hostname: Name
    node_uuid: UUID | None = None
    hypervisor_type: Name
    """As Nova spells it (`QEMU`, `kvm`, `xen`, `XenServer`, ...); `ironic` or `baremetal` for
    a node without a hypervisor. Compared without regard to case."""
    memory_mb: Quantity
    memory_mb_reserved: Quantity = 0
    memory_mb_used: Quantity = 0
    """Memory taken by guests. On bare metal anything above zero means that the node is taken."""
    vcpus: Quantity
    vcpus_used: Quantity = 0
    local_gb: Quantity = 0
    local_gb_used: Quantity = 0
    cpu_arch: str | None = None
    cpu_info: dict[str, Any] | str | None = None
    supported_instances: list[list[str]] | None = None
    extra_specs: dict[str, str] | None = None
    zone: str | None = None
    disabled: bool = False
    disk_iops: Quantity | None = None
    disk_bps: Quantity | None = None
    state: str | None = None
    traits: list[str] = Field(default_factory=list)
    guests: list[GuestRecord] | None = None
    """None: this host cannot list its guests. An empty list: it can, and runs none."""

    @property
    def is_bare_metal(self) -> bool:
        """True for a node that is handed out whole, with no hypervisor on it."""
        return self.hypervisor_type.lower() in {"ironic", "baremetal"}


class HostReport(BaseModel):
    """One part of what `host` says of its nodes at `reported_at`; `1 <= part <= parts`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    host: Name
    reported_at: AwareDatetime
    report_id: UUID
    part: Annotated[int, Field(ge=1)] = 1
    parts: Annotated[int, Field(ge=1, le=10_000)] = 1
    nodes: Annotated[list[NodeRecord], Field(max_length=NODES_PER_PART)]

    @model_validator(mode="after")
    def _is_consistent(self) -> HostReport:
        if self.part > self.parts:
            raise ValueError(f"part {self.part} of {self.parts}")
        names = [node.hypervisor_hostname for node in self.nodes]
        if len(set(names)) != len(names):
            raise ValueError("two nodes of one part have the same hypervisor_hostname")
        uuids = [node.node_uuid for node in self.nodes if node.node_uuid is not None]
        if len(set(uuids)) != len(uuids):
            raise ValueError("two nodes of one part have the same node_uuid")
        return self


def split(
    *, host: str, reported_at: AwareDatetime, report_id: UUID, nodes: list[NodeRecord]
) -> list[HostReport]:
    """Return the parts of a whole report: every node once, in order, at least one part.

    A host with nothing to report gives one part without nodes: that too is a whole report, and
    says that all nodes it had are gone.

    Raises:
        ValueError: two nodes have the same `hypervisor_hostname`.
    """
    names = {node.hypervisor_hostname for node in nodes}
    if len(names) != len(nodes):
        raise ValueError(f"{host}: two nodes have the same hypervisor_hostname")
    groups = list(_groups(nodes)) or [[]]
    return [
        HostReport(
            host=host,
            reported_at=reported_at,
            report_id=report_id,
            part=number,
            parts=len(groups),
            nodes=group,
        )
        for number, group in enumerate(groups, start=1)
    ]


def _groups(nodes: list[NodeRecord]) -> Iterator[list[NodeRecord]]:
    group: list[NodeRecord] = []
    size = 0
    for node in nodes:
        length = len(node.model_dump_json())
        if group and (len(group) == NODES_PER_PART or size + length > PART_BYTES):
            yield group
            group, size = [], 0
        group.append(node)
        size += length
    if group:
        yield group


HOST_REPORTED: Final = bus.EventType(
    routing_key="host.reported.{host}",
    model=HostReport,
    schema="1.0",
    summary="What a host has, uses and can do: one part of a report on all of its nodes",
)
