"""One notification in, its observations out: pure, total, and never in doubt about arrival.

`normalise` never raises, whatever the payload is: what cannot be read yields no observation and a
named problem. Nothing here looks at the clock or at what was seen before.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from hostler_usage import cinder, nova
from hostler_usage.envelope import Notification
from hostler_usage.observation import (
    INSTANCE,
    VOLUME,
    Evidence,
    Observation,
    ResourceKey,
    ResourceType,
)
from hostler_usage.payload import Fields
from hostler_usage.rules import Dialect, rule_for
from hostler_usage.times import is_plausible


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalised:
    """What a notification is about and what it says.

    `is_known` is whether its event type belongs to a metered resource; `problems` name the fields
    that could not be read (`bad_time:launched_at`), each a reason to look at the body.
    """

    resource: ResourceKey | None
    project_id: str | None
    observations: tuple[Observation, ...]
    is_known: bool
    problems: tuple[str, ...]


def normalise(notification: Notification, *, region: str) -> Normalised:
    """Return what `notification`, sent in `region`, says of one resource. Never raises.

    A notification from an absurd time says nothing: it would be billed from there.
    """
    rule = rule_for(notification.event_type)
    payload = notification.payload
    fields = Fields(payload if isinstance(payload, Mapping) else {})
    if rule is None:
        return Normalised(
            resource=None,
            project_id=_any_project(fields, notification),
            observations=(),
            is_known=False,
            problems=(),
        )
    evidence = Evidence(
        event_time=notification.timestamp,
        message_id=notification.message_id,
        digest=notification.digest,
    )
    resource_type: ResourceType
    match rule.dialect:
        case Dialect.NOVA_LEGACY | Dialect.NOVA_VERSIONED:
            is_legacy = rule.dialect is Dialect.NOVA_LEGACY
            instance = nova.read_legacy(fields) if is_legacy else nova.read_versioned(fields)
            resource_type, resource_id = INSTANCE, instance.instance_id
            project_id = instance.project_id
            observations = tuple(nova.observe(instance, rule.edge, evidence))
        case Dialect.CINDER_VOLUME:
            volume = cinder.read_volume(fields)
            resource_type, resource_id = VOLUME, volume.volume_id
            project_id = volume.project_id
            observations = tuple(cinder.observe(volume, rule.edge, evidence))
    problems = fields.problems
    if not is_plausible(notification.timestamp):
        problems.append("absurd_time:timestamp")
        observations = ()
    if resource_id is None:
        problems.append("no_resource_id")
        observations = ()
    return Normalised(
        resource=None
        if resource_id is None
        else ResourceKey(region=region, resource_type=resource_type, resource_id=resource_id),
        project_id=project_id or _any_project(fields, notification),
        observations=observations,
        is_known=True,
        problems=tuple(dict.fromkeys(problems)),
    )


def _any_project(fields: Fields, notification: Notification) -> str | None:
    """The project an event is filed under; the payload's owner before whoever acted."""
    return fields.text("project_id", "tenant_id") or notification.context_project_id
