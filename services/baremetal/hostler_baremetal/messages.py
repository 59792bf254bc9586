"""What baremetal says and hears on RabbitMQ.

Commands come on the routing key `baremetal.<proxy host>` of the exchange `hostler`, each with the
id of the operation that it starts: sent twice, it is done once. The answer is the event
`baremetal.operation.finished`, for a command that is refused as well.
"""

from datetime import datetime
from typing import Annotated, Any, Final, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, RootModel

from hostler_baremetal.ipmi_command import BootDevice, BootMode
from hostler_baremetal.power import PowerAction
from hostler_common import bus, hosts

APP_ID: Final = "baremetal"


class Event(BaseModel):
    """What every event is: written by us, read tolerantly by others."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class PowerArgs(BaseModel):
    """Arguments of the command `power`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    action: PowerAction


class BootDeviceArgs(BaseModel):
    """Arguments of the command `boot_device`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: BootDevice
    persistent: bool = False
    mode: BootMode = "legacy"


class _Command(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    node_uuid: UUID
    operation_id: UUID
    fencing_token: int | None = None


class PowerCommand(_Command):
    """A command to switch a node."""

    command: Literal["power"]
    args: PowerArgs


class BootDeviceCommand(_Command):
    """A command to choose what a node boots from."""

    command: Literal["boot_device"]
    args: BootDeviceArgs


class Command(
    RootModel[Annotated[PowerCommand | BootDeviceCommand, Field(discriminator="command")]]
):
    """A command as it comes."""


class NodeChanged(Event):
    """A node came into the registry, was changed, or left it. No credentials."""

    node_uuid: UUID
    name: str
    generation: int


class PowerChanged(Event):
    """The power of a node changed: by an operation of ours."""

    node_uuid: UUID
    name: str
    before: str
    after: str
    observed_at: datetime
    operation_id: UUID


class PowerDrifted(Event):
    """The power of a node changed, and not by us. The last operation is named: it may be late."""

    node_uuid: UUID
    name: str
    before: str
    after: str
    observed_at: datetime
    last_operation_id: UUID | None = None


class NodeLatched(Event):
    """A BMC refused our credentials: it is left alone until they are changed."""

    node_uuid: UUID
    name: str
    reason: str


class LeaseChanged(Event):
    """A lease was taken, released, broken, or ran out.

    Moments are the database's, to the microsecond: AMQP cuts an event's own to its second. `ended_at` is when the
    lease was over, absent while it holds.
    """

    node_uuid: UUID
    name: str
    owner: str
    purpose: str
    fencing_token: int
    taken_at: datetime
    expires_at: datetime
    ended_at: datetime | None = None


class OperationFinished(Event):
    """What came of an operation."""

    operation_id: UUID
    node_uuid: UUID
    kind: str
    args: dict[str, Any]
    state: Literal["succeeded", "failed"]
    code: str | None = None
    detail: str | None = None
    fencing_token: int | None = None


NODE_ENROLLED: Final = bus.EventType(
    routing_key="baremetal.node.enrolled", model=NodeChanged, summary="A node was added"
)
NODE_UPDATED: Final = bus.EventType(
    routing_key="baremetal.node.updated", model=NodeChanged, summary="A node was changed"
)
NODE_REMOVED: Final = bus.EventType(
    routing_key="baremetal.node.removed", model=NodeChanged, summary="A node was taken out"
)
NODE_LATCHED: Final = bus.EventType(
    routing_key="baremetal.node.latched",
    model=NodeLatched,
    summary="A BMC refused our credentials and is left alone",
)
POWER_CHANGED: Final = bus.EventType(
    routing_key="baremetal.node.power_changed",
    model=PowerChanged,
    summary="An operation changed a node's power",
)
POWER_DRIFTED: Final = bus.EventType(
    routing_key="baremetal.node.power_drifted",
    model=PowerDrifted,
    summary="A node's power changed without us",
)
LEASE_TAKEN: Final = bus.EventType(
    routing_key="baremetal.lease.taken", model=LeaseChanged, summary="A node was leased"
)
LEASE_RELEASED: Final = bus.EventType(
    routing_key="baremetal.lease.released", model=LeaseChanged, summary="A lease was given back"
)
LEASE_EXPIRED: Final = bus.EventType(
    routing_key="baremetal.lease.expired", model=LeaseChanged, summary="A lease ran out"
)
OPERATION_FINISHED: Final = bus.EventType(
    routing_key="baremetal.operation.finished",
    model=OperationFinished,
    summary="An operation on a node came to its end",
)
COMMAND: Final = bus.EventType(
    routing_key="baremetal.{host}",
    model=Command,
    summary="A command to a node behind the proxy",
)


def command_queue(proxy_host: str) -> bus.Queue:
    """Returns the queue that the replicas of one proxy share."""
    return bus.Queue(
        name=f"baremetal.commands.{proxy_host}",
        bindings=(bus.Binding(exchange=bus.HOSTLER, routing_key=f"baremetal.{proxy_host}"),),
    )


def topology(proxy_host: str) -> bus.Topology:
    """Returns all that the service has on the broker."""
    return bus.Topology(
        queues=(command_queue(proxy_host),),
        publishes=(
            NODE_ENROLLED,
            NODE_UPDATED,
            NODE_REMOVED,
            NODE_LATCHED,
            POWER_CHANGED,
            POWER_DRIFTED,
            LEASE_TAKEN,
            LEASE_RELEASED,
            LEASE_EXPIRED,
            OPERATION_FINISHED,
            hosts.HOST_REPORTED,
        ),
        consumes=(COMMAND,),
    )


TOPOLOGY: Final = topology("baremetal")
