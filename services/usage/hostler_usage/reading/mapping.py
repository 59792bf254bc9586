"""What is metered, as data: resource types, the events that move their billing edges, where bodies keep what.

A `Mapping` says everything the service knows of a cloud's dialects. It is read from YAML
(`mapping_file`), validated once, and never changes while the service runs. What an edge means for
order, time and precedence is in `observe`; nothing here knows an event type by name.
"""

from collections.abc import Mapping as Table
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from functools import cached_property
from typing import Final


class Edge(StrEnum):
    """What an event of some type is evidence of."""

    LAUNCH = "launch"  # life begins at the moment of birth
    RELAUNCH = "relaunch"  # a new segment of life begins: resize, rebuild, ...
    CHANGE = "change"  # what the body says holds from the event's own time
    NOTE = "note"  # as CHANGE, but said in passing
    AUDIT = "audit"  # a periodic statement of what is (or was) there
    END = "end"
    COUNT = "count"  # speaks of counters only
    NONE = "none"  # belongs to a metered resource, moves nothing


class Life(StrEnum):
    """How a resource's bodies date what they say."""

    SEGMENTS = "segments"  # the moment of birth is set anew with each segment and repeated since
    PLAIN = "plain"  # each body speaks of its own moment, and of the birth only that it happened


class Kind(StrEnum):
    """What an attribute's values are."""

    TEXT = "text"
    WHOLE = "whole"  # not negative; what measures integrate


class Holds(StrEnum):
    """From when on an attribute holds, in a life of segments."""

    SEGMENT = "segment"
    MOMENT = "moment"


class Reading(StrEnum):
    """What the number under a counter is."""

    PERIOD = "period"  # grows since the beginning of the audit period, and is repeated
    CUMULATIVE = "cumulative"  # grows until it is reset
    DELTA = "delta"  # what was added since the last message


class Phase(StrEnum):
    """Where in an operation an event stands."""

    START = "start"
    END = "end"
    ERROR = "error"


# --- how to get at a value: see mapping.yaml


@dataclass(frozen=True, slots=True)
class Path:
    """Keys, one inside the other; from the payload's root, or from the row."""

    keys: tuple[str, ...]
    from_root: bool = False


@dataclass(frozen=True, slots=True)
class First:
    """The first that holds something."""

    sources: tuple["Source", ...]


@dataclass(frozen=True, slots=True)
class LastSegment:
    """What stands behind the last slash of a URL."""

    source: Path


@dataclass(frozen=True, slots=True)
class Sum:
    """A sum of whole numbers; nothing where the first of them is missing."""

    sources: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Count:
    """How many rows a list has."""

    source: Path


@dataclass(frozen=True, slots=True)
class Join:
    """The distinct values under `of` in the rows of a list, sorted, commas between."""

    source: Path
    of: tuple[str, ...]
    unless: str | None = None


@dataclass(frozen=True, slots=True)
class Present:
    """One word where something is there, another where the key is there and holds nothing."""

    sources: tuple[Path, ...]
    then: str
    otherwise: str


@dataclass(frozen=True, slots=True)
class Item:
    """The value under a key of an object, or of a list of {"key", "value"} rows."""

    source: Path
    key: str


@dataclass(frozen=True, slots=True)
class Constant:
    """The same whatever the body says."""

    value: str | int | None


@dataclass(frozen=True, slots=True)
class Rate:
    """A whole number: `fixed`, and `each` for every unit of what is at `of`; `most` at most."""

    fixed: int = 0
    each: int = 0
    of: Path | None = None
    most: int | None = None


@dataclass(frozen=True, slots=True)
class ByValue:
    """What an operator's table says of the value at a path; nothing of a value that is not in it."""

    source: Path
    table: Table[str, Rate]


Source = Path | First | LastSegment | Sum | Count | Join | Present | Item | Constant | ByValue


# --- resources


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribute:
    """A property of resources of one type.

    `nullable`: that it is nothing can be said. `otherwise` names the attribute whose value it has where
    no body says its own. `told_by` are the only actions that change it; none
    where any may. Then another event's body that shows it changed proves that one of theirs was lost.
    """

    kind: Kind = Kind.TEXT
    holds: Holds = Holds.SEGMENT
    nullable: bool = False
    otherwise: str | None = None
    told_by: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Counter:
    """Where a body keeps a growing number; `each`: one for every row of a list or value of an object.

    `run`: what tells one run of a cumulative counter from the next, which begins at nothing again;
    of a difference, who measured it.
    """

    name: str
    reading: Reading
    value: Path
    each: Path | None = None
    inside: Path | None = None
    label: Path | None = None
    run: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """Text that says that the event was none, unless it is one of some words."""

    path: Path
    unless: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """Where one dialect keeps what; `events` is a prefix of event types, or one of them."""

    events: str
    under: Path | None = None
    rows: tuple[Path, ...] = ()
    id: tuple[Path, ...]
    at: Path | None = None
    born: tuple[Path, ...] = ()
    born_if: Path | None = None  # of what may never have come to life: it did if something is here
    ended: tuple[Path, ...] = ()
    period_beginning: tuple[Path, ...] = ()
    period_ending: tuple[Path, ...] = ()
    task: Path | None = None
    failed: Failed | None = None
    reason: tuple[Path, ...] = ()
    attributes: Table[str, Source] = field(default_factory=dict)
    counters: tuple[Counter, ...] = ()
    actions: Table[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """How audits of one type are compared with histories.

    `compares` are the attributes, beside the moments of birth and end. `is_per_host`: each host is
    audited by itself. `passing` are states too short-lived for events to tell of them. `ending` are
    states that name a moment of their end before it has come. `every` is how often an audit runs
    that names no period: what it says is of the hour, or the day of UTC, it was sent in. None where
    audits name their periods.
    """

    compares: tuple[str, ...] = ("project", "state")
    is_per_host: bool = False
    passing: frozenset[str] = frozenset()
    ending: frozenset[str] = frozenset()
    every: timedelta | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """A type of resources: what they are and how their lives are told.

    `now_is_unborn`: states of what has not come to life, where a body names its own sending as the
    birth; in another state such a body says only that it is there.
    `ids_return`: after an end the same id may be given to another one, whose life is another.
    `is_exact`: moments that bodies name are of one clock and not cut, so that none is another spelling of the next.
    """

    name: str
    life: Life
    attributes: Table[str, Attribute]
    state_classes: Table[str, str]
    begins_in: frozenset[str]
    unborn: frozenset[str]
    now_is_unborn: frozenset[str]
    ids_return: bool
    is_exact: bool
    gone: frozenset[str]
    between_segments: frozenset[str]
    audit: Audit
    edges: Table[str, Edge]
    bodies: Table[str, Body]
    failures: Table[str, str]

    def state_class(self, state: str | None) -> str:
        """The class a state is billed under; a state not known is `other`, none is `unknown`."""
        if state is None:
            return "unknown"
        return self.state_classes.get(state, "other")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """What is metered of resources of one type.

    With a `counter`, what moved, in its units; else what was held: `attribute` integrated over
    time, or the resource itself where it is None.
    """

    name: str
    resource_type: str
    attribute: str | None = None
    counter: str | None = None

    @property
    def is_held(self) -> bool:
        """Whether it is an integral over time, shown in hours."""
        return self.counter is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How events of one type are read; `phase` is None where the event is no part of an operation."""

    resource: Resource
    body: Body
    edge: Edge
    action: str
    phase: Phase | None


_PHASES: Final = {f".{phase}": phase for phase in Phase}
# events without .start and .end that are operations all the same
_AT_ONCE: Final = frozenset({Edge.LAUNCH, Edge.RELAUNCH, Edge.CHANGE, Edge.END})


@dataclass(frozen=True, kw_only=True)
class Mapping:
    """All of it. `digest` tells one mapping from another."""

    aliases: Table[str, str]
    resources: Table[str, Resource]
    measures: tuple[Measure, ...]
    digest: str

    def canonical(self, event_type: str) -> str:
        """The name that the rules know an event by."""
        exact = self.aliases.get(event_type)
        if exact is not None:
            return exact
        for prefix, meant in self._alias_prefixes:
            if event_type.startswith(prefix):
                return meant + event_type[len(prefix) :]
        return event_type

    def rule_for(self, event_type: str) -> Rule | None:
        """How to read events of a type, or None where nothing is known of its kind."""
        name = self.canonical(event_type)
        failure = self._failures.get(name)
        if failure is not None:
            return failure
        for prefix, resource, body in self._bodies:
            if name == prefix or (prefix.endswith(".") and name.startswith(prefix)):
                spelled = name[len(prefix) :] if prefix.endswith(".") else name.rpartition(".")[2]
                return _rule(resource, body, spelled)
        return None

    def measures_of(self, resource_type: str) -> tuple[Measure, ...]:
        """The measures of one resource type."""
        return self.measures_by_type.get(resource_type, ())

    @cached_property
    def measures_by_type(self) -> Table[str, tuple[Measure, ...]]:
        """The measures of each resource type that has any."""
        found: dict[str, tuple[Measure, ...]] = {}
        for item in self.measures:
            found[item.resource_type] = (*found.get(item.resource_type, ()), item)
        return found

    @cached_property
    def attribute_names(self) -> frozenset[str]:
        """Every attribute of every resource type."""
        return frozenset(name for item in self.resources.values() for name in item.attributes)

    @cached_property
    def _alias_prefixes(self) -> list[tuple[str, str]]:
        found = [
            (name[:-1], meant[:-1]) for name, meant in self.aliases.items() if name.endswith("*")
        ]
        return sorted(found, key=lambda pair: -len(pair[0]))

    @cached_property
    def _bodies(self) -> list[tuple[str, Resource, Body]]:
        found = [
            (body.events, resource, body)
            for resource in self.resources.values()
            for name, body in resource.bodies.items()
            if name != FAILURES
        ]
        return sorted(found, key=lambda item: -len(item[0]))

    @cached_property
    def _failures(self) -> dict[str, Rule]:
        return {
            function: Rule(
                resource=resource,
                body=resource.bodies[FAILURES],
                edge=Edge.NONE,
                action=action,
                phase=Phase.ERROR,
            )
            for resource in self.resources.values()
            for function, action in resource.failures.items()
        }


FAILURES: Final = "failures"
"""The name of the body of errors that carry a function's name for an event type."""


def _rule(resource: Resource, body: Body, spelled: str) -> Rule:
    phase = next((item for ending, item in _PHASES.items() if spelled.endswith(ending)), None)
    stem = spelled.removesuffix(f".{phase}") if phase else spelled
    stem = body.actions.get(stem, stem)
    action = f"{stem}.{phase}" if phase else stem
    edge = resource.edges.get(action, Edge.NONE)
    if phase is None and edge in _AT_ONCE:
        phase = Phase.END
    return Rule(resource=resource, body=body, edge=edge, action=stem, phase=phase)
