"""What capacity consumes and publishes, as constants: its queue, its events, their bodies."""

from datetime import datetime
from typing import Final
from uuid import UUID

from pydantic import BaseModel, ConfigDict

from hostler_capacity.claim import Claim, State
from hostler_common import bus, hosts

HOST_REPORTS: Final = bus.Queue(
    name="capacity.host-reports",
    # a host's name has dots, hence the #
    bindings=(bus.Binding(exchange=bus.HOSTLER, routing_key="host.reported.#"),),
)


class ClaimEvent(BaseModel):
    """A claim right after the step that the event's type names."""

    model_config = ConfigDict(frozen=True)

    claim_id: UUID
    state: State
    consumer_id: UUID
    project_id: str
    flavor: str | None
    host: str
    hypervisor_hostname: str
    node_uuid: UUID | None
    resources: dict[str, int]
    overhead_mb: int
    overhead_model: str
    overhead_model_version: int
    created_at: datetime
    expires_at: datetime
    confirmed_at: datetime | None
    ended_at: datetime | None


def _event(step: str, summary: str) -> bus.EventType[ClaimEvent]:
    return bus.EventType(
        routing_key=f"capacity.claim.{step}", model=ClaimEvent, schema="1.0", summary=summary
    )


CLAIM_GRANTED: Final = _event("granted", "Room on a node was promised, until the claim expires")
CLAIM_CONFIRMED: Final = _event("confirmed", "The guest exists; the claim no longer expires")
CLAIM_RELEASED: Final = _event("released", "The claim's room is free again, on request")
CLAIM_EXPIRED: Final = _event("expired", "Nobody confirmed the claim in time; its room is free")

TOPOLOGY: Final = bus.Topology(
    queues=(HOST_REPORTS,),
    publishes=(CLAIM_GRANTED, CLAIM_CONFIRMED, CLAIM_RELEASED, CLAIM_EXPIRED),
    consumes=(hosts.HOST_REPORTED,),
)


def claim_message(event: bus.EventType[ClaimEvent], claim: Claim) -> bus.Message:
    """Return the event about this claim, ready for the outbox."""
    body = ClaimEvent(
        claim_id=claim.id,
        state=claim.state,
        consumer_id=claim.consumer_id,
        project_id=claim.project_id,
        flavor=claim.flavor,
        host=claim.host,
        hypervisor_hostname=claim.hypervisor_hostname,
        node_uuid=claim.node_uuid,
        resources={str(name): amount for name, amount in claim.resources.items()},
        overhead_mb=claim.overhead_mb,
        overhead_model=claim.overhead_model,
        overhead_model_version=claim.overhead_model_version,
        created_at=claim.created_at,
        expires_at=claim.expires_at,
        confirmed_at=claim.confirmed_at,
        ended_at=claim.ended_at,
    )
    return event.message(body, app_id="capacity")
