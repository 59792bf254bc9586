"""One notification in, its statements out: pure, total, and never in doubt about arrival.

`Normaliser.read` never raises, whatever the payload is: what cannot be read says nothing and names
its problem. Nothing here looks at the clock or at what was seen before.
"""

from collections.abc import Mapping as Table
from typing import NamedTuple

from hostler_usage.reading.envelope import Notification
from hostler_usage.reading.mapping import Edge, Life, Mapping, Phase, Rule
from hostler_usage.reading.reader import Problems, Reader, Row, clean
from hostler_usage.reading.statement import Attributes, ResourceKey, ResourceType, Statement
from hostler_usage.reading.times import is_plausible

_RULES_KEPT = 10_000  # event types come from outside: what is remembered of them is bounded


class Said(NamedTuple):
    """A resource, and what the notification says of it; nothing where nothing can follow."""

    resource: ResourceKey
    statement: Statement | None


class Normalised(NamedTuple):
    """What a notification is about and what it says.

    `said` is empty where no resource is named. `is_known` is whether its event type belongs to a
    metered resource; `problems` name the fields that could not be read (`bad_time:launched_at`),
    each a reason to look at the body.
    """

    said: tuple[Said, ...]
    project_id: str | None
    is_known: bool
    problems: tuple[str, ...]

    @property
    def resource(self) -> ResourceKey | None:
        """The resource the notification is filed under: the first it names."""
        return self.said[0].resource if self.said else None


class Normaliser:
    """A mapping at work."""

    def __init__(self, mapping: Mapping) -> None:
        self._mapping = mapping
        self._rules: dict[str, tuple[Rule, Reader] | None] = {}
        self._readers: dict[int, Reader] = {}

    def read(self, notification: Notification, *, region: str) -> Normalised:
        """Return what `notification`, sent in `region`, says. Never raises.

        A notification from an absurd time says nothing: it would be billed from there.
        """
        payload = notification.payload
        found = self._rule(notification.event_type)
        if found is None:
            return Normalised(
                said=(),
                project_id=_any_project(payload, notification),
                is_known=False,
                problems=(),
            )
        rule, reader = found
        problems: Problems = []
        rows = reader.read(payload, problems)
        is_dated = is_plausible(notification.timestamp)
        if not is_dated:
            problems.append("absurd_time:timestamp")
        resource_type = ResourceType(rule.resource.name)
        said: dict[ResourceKey, Said] = {}
        project_id = None
        for row in rows:
            if row.resource_id is None:
                problems.append("no_resource_id")
                continue
            key = ResourceKey(
                region=region, resource_type=resource_type, resource_id=row.resource_id
            )
            statement = _statement(rule, row, notification)
            is_said = is_dated and not statement.says_nothing
            if key in said:
                problems.append("resource_named_twice")  # the first word counts
                continue
            said[key] = Said(resource=key, statement=statement if is_said else None)
            project_id = project_id or _owner(statement.attributes)
        return Normalised(
            said=tuple(said.values()),
            project_id=project_id or _any_project(payload, notification),
            is_known=True,
            problems=tuple(dict.fromkeys(problems)),
        )

    def _rule(self, event_type: str) -> tuple[Rule, Reader] | None:
        if event_type in self._rules:
            return self._rules[event_type]
        rule = self._mapping.rule_for(event_type)
        found = None
        if rule is not None:
            reader = self._readers.get(id(rule.body))
            if reader is None:
                reader = self._readers[id(rule.body)] = Reader(rule.resource, rule.body)
            found = (rule, reader)
        if len(self._rules) < _RULES_KEPT:
            self._rules[event_type] = found
        return found


def _statement(rule: Rule, row: Row, notification: Notification) -> Statement:
    resource = rule.resource
    attributes = row.attributes
    edge = rule.edge
    phase = rule.phase
    if notification.priority == "ERROR" and edge is not Edge.COUNT:
        edge = Edge.NONE  # what did not happen moves nothing; bytes that were sent were sent
        phase = Phase.ERROR if phase is Phase.END else phase
    if edge is Edge.NONE or edge is Edge.COUNT:
        kept = ("project", "host", "flavor")
        attributes = tuple(pair for pair in attributes if pair[0] in kept)
    is_segmented = resource.life is Life.SEGMENTS
    return Statement(
        edge=edge,
        attributes=attributes,
        at=row.at if row.readings else None,
        born_at=row.born_at if edge is not Edge.NONE else None,
        ended_at=row.ended_at if edge is not Edge.NONE else None,
        period=row.period if edge is not Edge.NONE else None,
        task=row.task if is_segmented and edge is not Edge.NONE else None,
        failed=row.failed,
        readings=row.readings,
        operation=rule.action if phase is not None else None,
        phase=phase,
        request_id=notification.request_id if phase is not None else None,
        reason=row.reason if phase is Phase.ERROR else None,
    )


def _owner(attributes: Attributes) -> str | None:
    for name, value in attributes:
        if name == "project":
            return value if isinstance(value, str) else None
    return None


def _any_project(payload: object, notification: Notification) -> str | None:
    """The project an event is filed under; the payload's owner before whoever acted."""
    if isinstance(payload, Table):
        for name in ("project_id", "tenant_id"):
            value = payload.get(name)
            if isinstance(value, str) and 0 < len(value) <= 255 and value != "None":
                return clean(value)
    return notification.context_project_id
