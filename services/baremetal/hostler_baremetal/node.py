"""Nodes, their leases and the operations on them, as values.

Invariant: a lease makes a node busy, its power does not; and whoever acts on a leased node shows
the fencing token of the lease that holds now. Tokens only grow, so that one who slept through the
end of its lease is found out.
"""

import dataclasses
import uuid
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal, NewType

from hostler_baremetal.power import FINISHED, OperationState, PowerState

NodeId = NewType("NodeId", uuid.UUID)
OperationId = NewType("OperationId", uuid.UUID)
FencingToken = NewType("FencingToken", int)

OperationKind = Literal["power", "boot_device"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What a node is, as capacity hears of it."""

    memory_mb: int
    vcpus: int
    local_gb: int
    cpu_arch: str | None
    zone: str | None
    traits: tuple[str, ...]
    extra_specs: Mapping[str, str]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How a node's BMC is reached. The secrets are sealed."""

    address: str
    username: str
    sealed_password: bytes = dataclasses.field(repr=False)
    sealed_group_key: bytes | None = dataclasses.field(repr=False)
    cipher_suites: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Who has a node, what for and until when."""

    owner: str
    purpose: str
    fencing_token: FencingToken
    taken_at: datetime
    expires_at: datetime


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node as the registry has it.

    Attributes:
        power_observed_at: when its BMC last said on or off.
        looked_at: when it was last looked at, whether or not the BMC answered.
        latched_at: since when it is left alone, because its BMC refused the credentials.
        working_suite: the cipher suite that worked last.
    """

    id: NodeId
    name: str
    generation: int
    hardware: Hardware
    access: Access
    maintenance: bool
    maintenance_reason: str | None
    power_state: PowerState
    last_power_state: PowerState | None
    power_observed_at: datetime | None
    looked_at: datetime | None
    poll_error: str | None
    poll_failures: int
    latched_at: datetime | None
    working_suite: int | None
    lease: Lease | None
    created_at: datetime
    updated_at: datetime

    @property
    def state(self) -> str:
        """`leased`, `maintenance` or `available`: what capacity may make of it."""
        if self.lease is not None:
            return "leased"
        return "maintenance" if self.maintenance else "available"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """Something asked of a node, and what came of it.

    Attributes:
        issued_at: when its command was, or may have been, sent; None if none was needed.
        deadline_at: when it is given up.
    """

    id: OperationId
    node_id: NodeId
    kind: OperationKind
    args: Mapping[str, Any]
    state: OperationState
    fencing_token: FencingToken | None
    requested_by: str
    created_at: datetime
    issued_at: datetime | None
    deadline_at: datetime
    finished_at: datetime | None
    code: str | None
    detail: str | None

    @property
    def is_finished(self) -> bool:
        """Whether nothing will happen to it any more."""
        return self.state in FINISHED


def may_act(lease: Lease | None, token: FencingToken | None) -> bool:
    """Returns whether an action that shows `token` may be done under the lease that holds now.

    On a node that nobody has, an action shows no token: one that does thinks that its lease holds.
    """
    return token == (lease.fencing_token if lease is not None else None)
