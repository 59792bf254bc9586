"""What the HTTP API takes and gives: wire models and nothing else.

A node's password and group key can be written and are never given back.
"""

import uuid
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, model_validator

from hostler_baremetal import ipmi_client, ipmi_session, node
from hostler_baremetal.ipmi_command import BootDevice, BootMode
from hostler_baremetal.power import OperationState, PowerAction, PowerState


def _address(value: str) -> str:
    return str(ipmi_client.BmcAddress.parse(value))


def _username(value: str) -> str:
    ipmi_session.Credentials(username=value, password="")
    return value


def _secret(value: SecretStr) -> SecretStr:
    ipmi_session.Credentials(username="", password=value.get_secret_value())
    return value


def _suites(value: list[int]) -> list[int]:
    if len(set(value)) != len(value):
        raise ValueError("a suite is named once")
    return value


Name = Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[^\s/\x00-\x1f\x7f]+$")]
Text = Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[^\x00]+$")]
Address = Annotated[
    str,
    Field(max_length=300, description="ipmi://host or ipmi://host:port"),
    AfterValidator(_address),
]
Username = Annotated[str, Field(max_length=16), AfterValidator(_username)]
Secret = Annotated[SecretStr, Field(min_length=1, max_length=20), AfterValidator(_secret)]
Suites = Annotated[
    list[Literal[3, 17]],
    Field(min_length=1, description="cipher suites that may be used"),
    AfterValidator(_suites),
]
Count = Annotated[int, Field(gt=0, le=2**31 - 1)]
# bounded, since every report on the fleet carries them
Traits = Annotated[list[Text], Field(max_length=256)]
ExtraSpecs = Annotated[
    dict[Text, Annotated[str, Field(max_length=1024, pattern=r"^[^\x00]*$")]],
    Field(max_length=64),
]


class Request(BaseModel):
    """A request body: an unknown member is a mistake."""

    model_config = ConfigDict(extra="forbid")


class Resource(BaseModel):
    """What is given."""

    model_config = ConfigDict(frozen=True)


class NodeCreate(Request):
    """A node to enrol."""

    id: uuid.UUID | None = Field(None, description="the node's own UUID, where it has one already")
    name: Name = Field(description="hypervisor_hostname in host reports; unique")
    address: Address
    username: Username
    password: Secret
    group_key: Secret | None = Field(None, description="the BMC's K_G, if it has one")
    cipher_suites: Suites = [17, 3]
    memory_mb: Count
    vcpus: Count
    local_gb: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    cpu_arch: Text | None = None
    zone: Text | None = None
    traits: Traits = []
    extra_specs: ExtraSpecs = {}
    maintenance: bool = False
    maintenance_reason: Text | None = None


class NodeUpdate(Request):
    """Changes to a node: what is left out stays."""

    generation: int = Field(description="of the node as it was read; 409 if it is another by now")
    name: Name | None = None
    address: Address | None = None
    username: Username | None = None
    password: Secret | None = None
    group_key: Secret | None = None
    cipher_suites: Suites | None = None
    memory_mb: Count | None = None
    vcpus: Count | None = None
    local_gb: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    cpu_arch: Text | None = None
    zone: Text | None = None
    traits: Traits | None = None
    extra_specs: ExtraSpecs | None = None
    maintenance: bool | None = None
    maintenance_reason: Text | None = None

    _CLEARABLE = frozenset({"group_key", "cpu_arch", "zone", "maintenance_reason"})

    @model_validator(mode="after")
    def _null_means_something(self) -> Self:
        for name in self.model_fields_set:
            if getattr(self, name) is None and name not in self._CLEARABLE:
                raise ValueError(f"{name} cannot be null")
        return self


class LeaseResource(Resource):
    """Who has a node."""

    owner: str
    purpose: str
    fencing_token: int
    taken_at: datetime
    expires_at: datetime

    @classmethod
    def of(cls, lease: node.Lease) -> Self:
        """Returns the lease as it is given."""
        return cls(
            owner=lease.owner,
            purpose=lease.purpose,
            fencing_token=lease.fencing_token,
            taken_at=lease.taken_at,
            expires_at=lease.expires_at,
        )


class NodeResource(Resource):
    """A node, without its secrets."""

    id: uuid.UUID
    name: str
    generation: int
    address: str
    username: str
    has_group_key: bool
    cipher_suites: list[int]
    working_suite: int | None
    memory_mb: int
    vcpus: int
    local_gb: int
    cpu_arch: str | None
    zone: str | None
    traits: list[str]
    extra_specs: dict[str, str]
    maintenance: bool
    maintenance_reason: str | None
    state: str = Field(description="available, leased or maintenance")
    power_state: PowerState
    power_observed_at: datetime | None
    last_power_state: PowerState | None
    poll_error: str | None
    latched_at: datetime | None = Field(description="its BMC refused our credentials since")
    lease: LeaseResource | None
    created_at: datetime
    updated_at: datetime

    @classmethod
    def of(cls, it: node.Node) -> Self:
        """Returns the node as it is given."""
        return cls(
            id=it.id,
            name=it.name,
            generation=it.generation,
            address=it.access.address,
            username=it.access.username,
            has_group_key=it.access.sealed_group_key is not None,
            cipher_suites=list(it.access.cipher_suites),
            working_suite=it.working_suite,
            memory_mb=it.hardware.memory_mb,
            vcpus=it.hardware.vcpus,
            local_gb=it.hardware.local_gb,
            cpu_arch=it.hardware.cpu_arch,
            zone=it.hardware.zone,
            traits=list(it.hardware.traits),
            extra_specs=dict(it.hardware.extra_specs),
            maintenance=it.maintenance,
            maintenance_reason=it.maintenance_reason,
            state=it.state,
            power_state=it.power_state,
            power_observed_at=it.power_observed_at,
            last_power_state=it.last_power_state,
            poll_error=it.poll_error,
            latched_at=it.latched_at,
            lease=None if it.lease is None else LeaseResource.of(it.lease),
            created_at=it.created_at,
            updated_at=it.updated_at,
        )


class NodePage(Resource):
    """Nodes by name."""

    nodes: list[NodeResource]
    next_marker: str | None


class PowerResource(Resource):
    """What is known of a node's power. `unknown` says that its BMC did not answer."""

    power_state: PowerState
    observed_at: datetime | None
    last_power_state: PowerState | None
    error: str | None
    operation_id: uuid.UUID | None = Field(description="the operation under way, if any")


class PowerRequest(Request):
    """What to do with a node's power."""

    action: PowerAction
    fencing_token: int | None = Field(None, description="of the node's lease, if it has one")


class BootDeviceRequest(Request):
    """What a node boots from next."""

    device: BootDevice
    persistent: bool = False
    mode: BootMode = "legacy"
    fencing_token: int | None = Field(None, description="of the node's lease, if it has one")


class BootDeviceResource(Resource):
    """What a node was last told to boot from; boards forget it, the operation says when it was."""

    device: BootDevice | None
    persistent: bool
    mode: BootMode
    operation_id: uuid.UUID | None
    set_at: datetime | None


class LeaseRequest(Request):
    """A node to take, or a lease to renew."""

    owner: Text
    purpose: Text
    ttl_seconds: Annotated[float, Field(gt=0, le=366 * 86400)]
    fencing_token: int | None = Field(
        None, description="renew this lease, and do not take another if it is over"
    )


class OperationResource(Resource):
    """Something asked of a node, and what came of it."""

    id: uuid.UUID
    node_id: uuid.UUID
    kind: str
    args: dict[str, Any]
    state: OperationState
    fencing_token: int | None
    requested_by: str
    created_at: datetime
    issued_at: datetime | None = Field(description="its command was, or may have been, sent then")
    deadline_at: datetime
    finished_at: datetime | None
    code: str | None
    detail: str | None

    @classmethod
    def of(cls, it: node.Operation) -> Self:
        """Returns the operation as it is given."""
        return cls(
            id=it.id,
            node_id=it.node_id,
            kind=it.kind,
            args=dict(it.args),
            state=it.state,
            fencing_token=it.fencing_token,
            requested_by=it.requested_by,
            created_at=it.created_at,
            issued_at=it.issued_at,
            deadline_at=it.deadline_at,
            finished_at=it.finished_at,
            code=it.code,
            detail=it.detail,
        )


class OperationPage(Resource):
    """Operations, the newest first."""

    operations: list[OperationResource]
    next_marker: str | None
