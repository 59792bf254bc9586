"""Reading a mapping from YAML: every mistake in it is named by its place, and nothing half right is taken."""

import hashlib
import json
from collections.abc import Mapping as Table
from datetime import timedelta
from functools import cache
from importlib import resources
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from hostler_common import errors
from hostler_usage.reading import mapping
from hostler_usage.reading.mapping import Edge, Holds, Kind, Life, Mapping, Reading

_ALWAYS_TEXT = frozenset(
    {"project", "user", "state"}
)  # they have columns or meanings of their own
_EVERY = {"hour": timedelta(hours=1), "day": timedelta(days=1)}
_NAME = r"^[a-z][a-z0-9_]{0,62}$"
Name = Annotated[str, Field(pattern=_NAME)]
EventName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:*-]{1,255}$")]


class MappingInvalid(errors.Invalid):
    """A mapping file is not there, is no YAML, or says something that cannot be meant."""

    code = "usage.mapping.invalid"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


def _listed(value: object) -> object:
    return value if isinstance(value, list) else [value]


PathText = Annotated[str, Field(max_length=500, pattern=r"^/?[^/]+(/[^/]+)*$")]
Paths = Annotated[list[PathText], BeforeValidator(_listed), Field(min_length=1)]


class _Sum(_Model):
    sum: Paths


class _Count(_Model):
    count: PathText


class _LastSegment(_Model):
    last_segment: PathText


class _Join(_Model):
    join: PathText
    of: Annotated[list[str], BeforeValidator(_listed), Field(min_length=1)]
    unless: str | None = None


class _Present(_Model):
    present: Paths
    then: str
    otherwise: str = Field(alias="else")


class _Item(_Model):
    item: tuple[PathText, str]


class _Constant(_Model):
    constant: str | int | None


class _Rate(_Model):
    fixed: int = Field(0, ge=0)
    each: int = Field(0, ge=0)
    of: PathText | None = None
    most: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _each_is_of_something(self) -> Self:
        if bool(self.each) != (self.of is not None):
            raise ValueError("each and of are said together")
        return self


class _ByValue(_Model):
    by: PathText
    table: Annotated[dict[str, _Rate], Field(min_length=1)]


_One = PathText | _Sum | _Count | _LastSegment | _Join | _Present | _Item | _Constant | _ByValue
_Sources = Annotated[list[_One], BeforeValidator(_listed), Field(min_length=1)]


class _Attribute(_Model):
    kind: Kind = Kind.TEXT
    holds: Holds = Holds.SEGMENT
    nullable: bool = False
    otherwise: Name | None = None
    told_by: list[EventName] = []


class _Counter(_Model):
    reading: Reading
    value: PathText
    each: PathText | None = None
    inside: PathText | None = None
    label: PathText | None = None
    run: Paths | None = None


class _Period(_Model):
    beginning: Paths
    ending: Paths


class _Failed(_Model):
    path: PathText
    unless: list[str] = []


class _Body(_Model):
    events: EventName
    under: PathText | None = None
    rows: Annotated[list[PathText], BeforeValidator(_listed)] = []
    id: Paths
    at: PathText | None = None
    born: Paths | None = None
    born_if: PathText | None = None
    ended: Paths | None = None
    period: _Period | None = None
    task: PathText | None = None
    failed: _Failed | None = None
    reason: Paths | None = None
    attributes: dict[Name, _Sources] = {}
    counters: dict[Name, _Counter] = {}
    actions: dict[EventName, EventName] = {}


class _Failures(_Model):
    id: Paths
    reason: Paths | None = None
    actions: dict[EventName, EventName]


class _Audit(_Model):
    compares: list[Name] = list(mapping.Audit().compares)
    per_host: bool = False
    passing: list[str] = []
    ending: list[str] = []
    every: Literal["hour", "day"] | None = None


class _Resource(_Model):
    life: Life = Life.PLAIN
    attributes: dict[Name, _Attribute]
    states: dict[Name, list[str]] = {}
    begins_in: list[str] = []
    unborn: list[str] = []
    now_is_unborn: list[str] = []
    ids_return: bool = False
    exact: bool = False
    gone: list[str] = []
    between_segments: list[str] = []
    audit: _Audit = _Audit()
    edges: dict[Edge, list[str]]
    bodies: dict[Name, _Body]
    failures: _Failures | None = None


class _Measure(_Model):
    resource: Name
    attribute: Name | None = None
    counter: Name | None = None


class _Document(_Model):
    version: Literal[1]
    aliases: dict[EventName, EventName] = {}
    resources: dict[Name, _Resource]
    measures: dict[Name, _Measure]


@cache
def packaged() -> Mapping:
    """The mapping that comes with the service."""
    return read(None)


def load(file: FilePath | None) -> Mapping:
    """The packaged mapping with the operator's `file`, if there is one, laid over it.

    Raises:
        MappingInvalid: the file cannot be read, or says something that cannot be meant.
    """
    if file is None:
        return packaged()
    try:
        return read(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:  # not there, no UTF-8, or no path at all
        raise MappingInvalid(f"{file}: {exc}") from exc
    except MappingInvalid as exc:
        raise MappingInvalid(f"{file}: {exc.detail}") from exc


def read(text: str | None) -> Mapping:
    """The packaged mapping with a YAML text laid over it.

    Raises:
        MappingInvalid: naming the first places that are wrong.
    """
    document = _packaged_document()
    if text is not None:
        document = laid_over(document, parsed_yaml(text))
    try:
        parsed = _Document.model_validate(document)
    except ValidationError as exc:
        found = exc.errors(include_url=False, include_input=False)
        places = [f"{'.'.join(str(part) for part in one['loc'])}: {one['msg']}" for one in found]
        raise MappingInvalid("; ".join(places[:5])) from exc
    content = json.dumps(parsed.model_dump(mode="json", by_alias=True), sort_keys=True)
    made = Mapping(
        aliases=parsed.aliases,
        resources={name: _resource(name, item) for name, item in parsed.resources.items()},
        measures=tuple(
            mapping.Measure(
                name=name,
                resource_type=item.resource,
                attribute=item.attribute,
                counter=item.counter,
            )
            for name, item in parsed.measures.items()
        ),
        digest=hashlib.sha256(content.encode()).hexdigest(),
    )
    problems = _said_twice(parsed) + _contradictions(made)
    if problems:
        raise MappingInvalid("; ".join(problems[:5]))
    return made


@cache
def _packaged_document() -> dict[str, Any]:
    return parsed_yaml((resources.files("hostler_usage") / "mapping.yaml").read_text("utf-8"))


def parsed_yaml(text: str) -> dict[str, Any]:
    """The object that a text of YAML holds.

    Raises:
        MappingInvalid: it is no YAML, or holds no object.
    """
    try:
        document = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as exc:
        raise MappingInvalid(f"not YAML: {exc}") from exc
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as exc:
        # a scalar that its tag does not fit: PyYAML lets whatever its constructors raise through
        raise MappingInvalid(f"not YAML: a value cannot be read: {exc}") from exc
    if not isinstance(document, dict):
        raise MappingInvalid("a mapping is an object with version, resources and measures")
    return document


def laid_over(
    below: dict[str, Any], above: Table[str, Any], place: tuple[str, ...] = ()
) -> dict[str, Any]:
    """`above` over `below`: objects are merged, everything else is replaced; null takes away.

    How to get at a value is one thing and replaced as one.
    """
    merged = dict(below)
    is_of_values = place[:1] == ("resources",) and place[2::2] == ("bodies", "attributes")
    for key, value in above.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict) and not is_of_values:
            merged[key] = laid_over(merged[key], value, (*place, key))
        else:
            merged[key] = value
    return merged


# --- from the document to the domain's values


def _path(text: str) -> mapping.Path:
    from_root = text.startswith("/")
    return mapping.Path(tuple(text.removeprefix("/").split("/")), from_root)


def _maybe(text: str | None) -> mapping.Path | None:
    return None if text is None else _path(text)


def _all(paths: list[str] | None) -> tuple[mapping.Path, ...]:
    return tuple(_path(item) for item in paths or ())


def _source(given: list[Any]) -> mapping.Source:
    made = tuple(_single(item) for item in given)
    return made[0] if len(made) == 1 else mapping.First(made)


def _single(given: object) -> mapping.Source:
    match given:
        case str():
            return _path(given)
        case _Sum():
            return mapping.Sum(tuple(_path(item) for item in given.sum))
        case _Count():
            return mapping.Count(_path(given.count))
        case _LastSegment():
            return mapping.LastSegment(_path(given.last_segment))
        case _Join():
            return mapping.Join(_path(given.join), tuple(given.of), given.unless)
        case _Present():
            paths = tuple(_path(item) for item in given.present)
            return mapping.Present(paths, given.then, given.otherwise)
        case _Item():
            return mapping.Item(_path(given.item[0]), given.item[1])
        case _Constant():
            return mapping.Constant(given.constant)
        case _ByValue():
            return mapping.ByValue(
                _path(given.by),
                {
                    value: mapping.Rate(rate.fixed, rate.each, _maybe(rate.of), rate.most)
                    for value, rate in given.table.items()
                },
            )
    raise AssertionError(f"no such source: {given!r}")


def _body(given: _Body) -> mapping.Body:
    return mapping.Body(
        events=given.events,
        under=_maybe(given.under),
        rows=_all(given.rows),
        id=_all(given.id),
        at=_maybe(given.at),
        born=_all(given.born),
        born_if=_maybe(given.born_if),
        ended=_all(given.ended),
        period_beginning=_all(given.period.beginning if given.period else None),
        period_ending=_all(given.period.ending if given.period else None),
        task=_maybe(given.task),
        failed=None
        if given.failed is None
        else mapping.Failed(path=_path(given.failed.path), unless=frozenset(given.failed.unless)),
        reason=_all(given.reason),
        attributes={name: _source(list(item)) for name, item in given.attributes.items()},
        counters=tuple(_counter(name, item) for name, item in given.counters.items()),
        actions=given.actions,
    )


def _counter(name: str, given: _Counter) -> mapping.Counter:
    return mapping.Counter(
        name=name,
        reading=given.reading,
        value=_path(given.value),
        each=_maybe(given.each),
        inside=_maybe(given.inside),
        label=_maybe(given.label),
        run=_all(given.run),
    )


def _resource(name: str, given: _Resource) -> mapping.Resource:
    bodies = {key: _body(item) for key, item in given.bodies.items()}
    failures = given.failures
    if failures is not None:
        bodies[mapping.FAILURES] = mapping.Body(
            events=mapping.FAILURES,
            id=_all(failures.id),
            reason=_all(failures.reason),
        )
    return mapping.Resource(
        name=name,
        life=given.life,
        attributes={
            key: mapping.Attribute(
                kind=item.kind,
                holds=item.holds,
                nullable=item.nullable,
                otherwise=item.otherwise,
                told_by=frozenset(item.told_by),
            )
            for key, item in given.attributes.items()
        },
        state_classes={state: name for name, states in given.states.items() for state in states},
        begins_in=frozenset(given.begins_in),
        unborn=frozenset(given.unborn),
        now_is_unborn=frozenset(given.now_is_unborn),
        ids_return=given.ids_return,
        is_exact=given.exact,
        gone=frozenset(given.gone),
        between_segments=frozenset(given.between_segments),
        audit=mapping.Audit(
            compares=tuple(given.audit.compares),
            is_per_host=given.audit.per_host,
            passing=frozenset(given.audit.passing),
            ending=frozenset(given.audit.ending),
            every=None if given.audit.every is None else _EVERY[given.audit.every],
        ),
        edges={action: edge for edge, actions in given.edges.items() for action in actions},
        bodies=bodies,
        failures={} if failures is None else failures.actions,
    )


def _said_twice(parsed: _Document) -> list[str]:
    """What can be one thing only and is given as two."""
    found = []
    for name, resource in parsed.resources.items():
        for place, groups in (("states", resource.states), ("edges", resource.edges)):
            owner: dict[str, str] = {}
            for group, items in groups.items():
                found += [
                    f"resources.{name}.{place}.{group}: {item} is in {owner[item]} too"
                    for item in items
                    if owner.setdefault(item, group) != group
                ]
        if mapping.FAILURES in resource.bodies:
            found.append(f"resources.{name}.bodies.{mapping.FAILURES}: the name is taken")
    return found


def _contradictions(made: Mapping) -> list[str]:
    """What is well formed and cannot be meant."""
    found: list[str] = []
    owner: dict[str, str] = {}
    for name, meant in made.aliases.items():
        if name.endswith("*") != meant.endswith("*"):
            found.append(f"aliases.{name}: both names end in * or none does")
    for name, resource in made.resources.items():
        if resource.is_exact and resource.life is Life.SEGMENTS:
            found.append(f"resources.{name}.exact: moments of segments are never exact")
        found += [
            f"resources.{name}.attributes.{item}: {item} is text"
            for item in sorted(_ALWAYS_TEXT & resource.attributes.keys())
            if resource.attributes[item].kind is not Kind.TEXT
        ]
        found += [
            f"resources.{name}.attributes.{key}.otherwise:"
            f" {name} has no attribute {item.otherwise} of its kind"
            for key, item in resource.attributes.items()
            if item.otherwise is not None
            and (
                item.otherwise not in resource.attributes
                or resource.attributes[item.otherwise].kind is not item.kind
            )
        ]
        found += [
            f"resources.{name}.audit.compares: {name} has no such attribute: {item}"
            for item in resource.audit.compares
            # what is compared of every type is passed over where a type has none
            if item not in resource.attributes and item not in mapping.Audit().compares
        ]
        for key, body in resource.bodies.items():
            place = f"resources.{name}.bodies.{key}"
            unknown = body.attributes.keys() - resource.attributes.keys()
            found += [
                f"{place}.attributes.{item}: {name} has no such attribute"
                for item in sorted(unknown)
            ]
            if key != mapping.FAILURES and owner.setdefault(body.events, place) != place:
                found.append(f"{place}.events: {body.events} is read by {owner[body.events]}")
    for measure in made.measures:
        place = f"measures.{measure.name}"
        of = made.resources.get(measure.resource_type)
        if of is None:
            found.append(f"{place}.resource: there is no resource {measure.resource_type}")
            continue
        if measure.attribute is not None and measure.counter is not None:
            found.append(f"{place}: either an attribute or a counter")
        if measure.attribute is not None:
            attribute = of.attributes.get(measure.attribute)
            if attribute is None or attribute.kind is not Kind.WHOLE:
                found.append(
                    f"{place}.attribute: {of.name} has no whole attribute {measure.attribute}"
                )
        counters = {item.name for body in of.bodies.values() for item in body.counters}
        if measure.counter is not None and measure.counter not in counters:
            found.append(f"{place}.counter: {of.name} has no counter {measure.counter}")
    return found
