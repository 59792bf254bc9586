"""Reading the ledger: usage of any window, histories with their evidence, stored messages.

Usage is computed from intervals clipped to the window and from amounts inside it, in exact
arithmetic: PostgreSQL's `extract(epoch ...)` is numeric with all six decimals. What a caller may
see is a condition inside each statement (`Scope`), never a filter on its answer.
"""

import base64
import json
import re
from collections.abc import Iterable, Sequence
from collections.abc import Mapping as Table
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import partial
from typing import Final

import asyncpg

from hostler_common import db, errors
from hostler_usage.history import usage_sql
from hostler_usage.history.measures import Window
from hostler_usage.history.rollup import midnight
from hostler_usage.history.rollup_store import days_until
from hostler_usage.money.budget import KIND
from hostler_usage.reading.mapping import Mapping
from hostler_usage.reading.statement import ResourceKey
from hostler_usage.reading.times import EPOCH, MICROSECOND, epoch_microseconds

Scope = frozenset[str] | None
"""The projects that a caller may see; None is all of them."""


class EventNotFound(errors.NotFound):
    """There is no such stored message, or none that the caller may see."""

    code = "usage.event.not_found"


class ResourceNotFound(errors.NotFound):
    """No message has spoken of such a resource, or none that the caller may see."""

    code = "usage.resource.not_found"


class BadMarker(errors.Invalid):
    """The marker is none that a page of this list ended with."""

    code = "usage.marker.invalid"


class GroupUnknown(errors.Invalid):
    """Usage cannot be grouped by that."""

    code = "usage.group_by.unknown"


Group = str
"""What usage can be grouped by: one of these, an attribute that the mapping names, or `group:<kind>`."""

GROUP_PREFIX: Final = "group:"
"""Before the kind of a group of projects: who is in which, and when, is said at /v1/project-groups."""

_COLUMN: Final = {
    "project": "project_id",
    "user": "user_id",
    "resource": "resource_id",
    "type": "resource_type",
    "region": "region",
    "state_class": "state_class",
    "label": "label",
}
_BUCKETS: Final = ("hour", "day", "month")
# what sums of whole days can be grouped by
_SUMMED: Final = frozenset({"project", "region", "type", "day", "month"})
_DAY = timedelta(days=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageFilter:
    """Which usage is asked for; None does not restrict."""

    scope: Scope = None
    project_id: str | None = None
    region: str | None = None
    resource_type: str | None = None
    resource_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageRow:
    """The usage of one group, and how many resources had part in it.

    `amounts` are unit-microseconds of measures that are held, units of those that move; a measure
    that nothing was used of is left out. `resources` is None where sums of whole days answered.
    """

    group: Table[Group, str | None]
    amounts: Table[str, int]
    resources: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EventFilter:
    """Which stored messages are asked for; None does not restrict."""

    scope: Scope = None
    start: datetime | None = None
    end: datetime | None = None
    event_type: str | None = None
    message_id: str | None = None
    project_id: str | None = None
    resource_type: str | None = None
    resource_id: str | None = None
    source: str | None = None
    region: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """The state of the ledger, for the page and the metrics."""

    stored: int
    duplicate: int
    conflict: int
    unknown_type: int
    problem: int
    last_received_at: datetime | None
    dirty: int
    oldest_dirty_seconds: float
    unpartitioned: int  # at most 100,000 are counted


# of a large backlog only the oldest batches are looked at: what matters is that there is one
_UNFOLDED = (
    "SELECT count(DISTINCT (region, resource_type, resource_id)) FROM (SELECT * FROM touched"
    " ORDER BY id LIMIT 100) AS oldest, unnest(regions, resource_types, resource_ids)"
    " AS k (region, resource_type, resource_id)"
)
_EVENT_COLUMNS = (
    "event_time, message_id, body_sha256, seq, received_at, source, region, exchange, routing_key,"
    " event_type, publisher_id, priority, request_id, project_id, resource_type, resource_id,"
    " has_own_id, is_known, coalesce(problems, '{}') AS problems, content_type, content_encoding,"
    " octet_length(body) AS body_bytes"
)
_EVENTS = "raw_event JOIN origin ON origin.id = raw_event.origin"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportStore:
    """All reading of the ledger."""

    pool: db.Pool
    mapping: Mapping

    async def usage(
        self,
        window: Window,
        groups: Sequence[Group],
        where: UsageFilter,
        *,
        limit: int,
        marker: str | None = None,
        time_zone: str = "UTC",
    ) -> tuple[list[UsageRow], str | None]:
        """A page of usage rows, ordered by group, and the marker of the next page.

        Days, hours and months are those of `time_zone`, an IANA name.

        Raises:
            GroupUnknown: there is no such group, or no such time zone.
            BadMarker: the marker is not of this list.
            DatabaseUnavailable: the database is away.
        """
        measures = [
            item
            for item in self.mapping.measures
            if where.resource_type in (None, item.resource_type)
        ]
        conditions = _Conditions(window.start, window.upper)
        kinds = group_kinds(groups)
        dimensions = [self._dimension(group, kinds) for group in groups]
        buckets = [group for group in groups if group in _BUCKETS]
        if len(buckets) > 1:
            raise GroupUnknown(f"one of {', '.join(_BUCKETS)} at a time")
        keys = ", ".join(dimensions)
        conditions.add("project_id = ANY({})", _projects(where.scope, where.project_id))
        own_projects = conditions.also
        conditions.add("region = {}", where.region)
        conditions.add("resource_type = {}", where.resource_type)
        conditions.add("resource_id = {}", where.resource_id)
        clause = conditions.also
        bucket = buckets[0] if buckets else None
        summed = await self._summed_days(window, groups, where, time_zone) if measures else None
        after = _Conditions(*conditions.values)
        if marker is not None:
            parts = _after(marker, len(groups))
            places = ", ".join("{}" for _ in parts)
            after.add(f"({keys}) > ({places})", *parts)
        zone = after.value(time_zone) if buckets else ""
        facts = partial(usage_sql.facts, clause, bucket, zone, groups=len(kinds))
        tables = []
        if kinds:
            tables.append(
                usage_sql.memberships([after.value(kind) for kind in kinds], own_projects)
            )
        if summed is None:
            sources = facts()
        else:
            first, last = after.value(summed[0]), after.value(summed[1])
            since, until = after.value(midnight(summed[0])), after.value(midnight(summed[1]))
            parts_of_window = [
                facts(end=since),
                usage_sql.days(clause, bucket, first=first, last=last, groups=len(kinds)),
                facts(start=until),
            ]
            if kinds:
                tables.append(usage_sql.split_days(first=first, last=last))
                parts_of_window.append(facts(is_split=True))
            sources = " UNION ALL ".join(parts_of_window)
        columns = [f"{name} AS group_{n}" for n, name in enumerate(dimensions)]
        columns += [f"{usage_sql.total(item)} AS m{n}" for n, item in enumerate(measures)]
        if summed is None:
            columns.append("count(DISTINCT (region, resource_type, resource_id)) AS resources")
        statement = (
            (f"WITH {', '.join(tables)} " if tables else "") + f"SELECT {', '.join(columns)}"  # noqa: S608  constants of this module, names of the mapping
            f" FROM ({sources}) AS facts {after.clause}"
            + (f" GROUP BY {keys} ORDER BY {keys} LIMIT {int(limit)}" if groups else "")
        )
        async with db.connection(self.pool) as connection:
            try:
                if buckets:  # whether the name is good must not depend on what there is to cut
                    await connection.fetchval("SELECT now() AT TIME ZONE $1::text", time_zone)
                rows = await connection.fetch(statement, *after.values)
            except asyncpg.InvalidParameterValueError as exc:
                raise GroupUnknown(f"there is no time zone {time_zone}") from exc
        names = [[row[f"group_{n}"] for n in range(len(groups))] for row in rows]
        found = [
            UsageRow(
                group={group: name or None for group, name in zip(groups, key, strict=True)},
                amounts={
                    item.name: int(row[f"m{n}"]) for n, item in enumerate(measures) if row[f"m{n}"]
                },
                resources=row["resources"] if summed is None else None,
            )
            for row, key in zip(rows, names, strict=True)
        ]
        return found, _marker(names[-1]) if groups and len(rows) == limit else None

    async def _summed_days(
        self, window: Window, groups: Sequence[Group], where: UsageFilter, time_zone: str
    ) -> tuple[date, date] | None:
        """The whole days of the window whose sums answer the question; None where they cannot."""
        columns = {group for group in groups if not group.startswith(GROUP_PREFIX)}
        if not _SUMMED.issuperset(columns) or where.resource_id is not None:
            return None
        if time_zone != "UTC" and not {"day", "month"}.isdisjoint(groups):
            return None
        first = (window.start.astimezone(UTC) + _DAY - MICROSECOND).date()
        last = window.upper.astimezone(UTC).date()
        if first >= last:
            return None
        async with db.connection(self.pool) as connection:
            until = await days_until(connection)
        if until is None or first >= min(last, until):
            return None
        return first, min(last, until)

    def _dimension(self, group: Group, kinds: Sequence[str]) -> str:
        """The expression of a group; names come from this module or were checked with the mapping."""
        if group.startswith(GROUP_PREFIX):
            return f"coalesce(group_of_{kinds.index(group.removeprefix(GROUP_PREFIX))}, '')"
        if group in _BUCKETS:
            return "bucket"
        if group in _COLUMN:
            return f"coalesce({_COLUMN[group]}, '')"
        if group in self.mapping.attribute_names:
            return f"coalesce(attributes->>'{group}', '')"
        known = {*_BUCKETS, *_COLUMN, *self.mapping.attribute_names, f"{GROUP_PREFIX}<kind>"}
        raise GroupUnknown(
            f"usage cannot be grouped by {group}: there are {', '.join(sorted(known))}"
        )

    async def intervals(
        self, resource_type: str, resource_id: str, *, region: str | None, scope: Scope
    ) -> list[asyncpg.Record]:
        """The history of a resource, oldest first; of every region that has one by that id.

        Raises:
            ResourceNotFound: no message spoke of it, or it is none of the caller's.
            DatabaseUnavailable: the database is away.
        """
        async with db.connection(self.pool) as connection:
            rows = await connection.fetch(
                "SELECT * FROM usage_interval WHERE resource_type = $1 AND resource_id = $2"
                " AND ($3::text IS NULL OR region = $3)"
                " AND ($4::text[] IS NULL OR project_id = ANY($4)) ORDER BY region, starts_at",
                resource_type,
                resource_id,
                region,
                _projects(scope, None),
            )
            if not rows and (
                scope is not None
                or not await connection.fetchval(
                    "SELECT EXISTS (SELECT FROM resource WHERE resource_type = $1"
                    " AND resource_id = $2 AND ($3::text IS NULL OR region = $3))",
                    resource_type,
                    resource_id,
                    region,
                )
            ):
                raise ResourceNotFound(f"there is no {resource_type} {resource_id}")
        return rows

    async def anomalies(self, key: ResourceKey) -> list[str]:
        """What is odd about the history of a resource; nothing for one that is not known.

        Raises:
            DatabaseUnavailable: the database is away.
        """
        async with db.connection(self.pool) as connection:
            found = await connection.fetchval(
                "SELECT anomalies FROM resource"
                " WHERE (region, resource_type, resource_id) = ($1, $2, $3)",
                key.region,
                str(key.resource_type),
                key.resource_id,
            )
        return list(found or ())

    async def events(
        self, where: EventFilter, *, limit: int, marker: str | None = None
    ) -> tuple[list[asyncpg.Record], str | None]:
        """A page of stored messages without their bodies, newest first, and the next marker.

        Raises:
            BadMarker: the marker is not of this list.
            DatabaseUnavailable: the database is away.
        """
        conditions = _Conditions()
        conditions.add("event_time >= {}", where.start)
        conditions.add("event_time < {}", where.end)
        conditions.add("event_type = {}", where.event_type)
        conditions.add("message_id = {}", where.message_id)
        conditions.add("project_id = ANY({})", _projects(where.scope, where.project_id))
        conditions.add("resource_type = {}", where.resource_type)
        conditions.add("resource_id = {}", where.resource_id)
        conditions.add("source = {}", where.source)
        conditions.add("region = {}", where.region)
        if marker is not None:
            time, message_id, digest = _after(marker, 3)
            try:
                last = (EPOCH + int(time) * MICROSECOND, message_id, bytes.fromhex(digest))
            except (ValueError, OverflowError) as exc:
                raise BadMarker("the marker is not one of this list's") from exc
            conditions.add("(event_time, message_id, body_sha256) < ({}, {}, {})", *last)
        async with db.connection(self.pool) as connection:
            rows = await connection.fetch(
                f"SELECT {_EVENT_COLUMNS} FROM {_EVENTS} {conditions.clause}"  # noqa: S608  constants of this module
                " ORDER BY event_time DESC, message_id DESC, body_sha256 DESC"
                f" LIMIT {int(limit)}",
                *conditions.values,
            )
        if len(rows) < limit:
            return rows, None
        row = rows[-1]
        time = str(epoch_microseconds(row["event_time"]))
        return rows, _marker([time, row["message_id"], row["body_sha256"].hex()])

    async def event(self, event_id: str, *, scope: Scope) -> asyncpg.Record:
        """One stored message with its body and headers, by the id the API gives it.

        Raises:
            EventNotFound: there is none, or it is none of the caller's.
            DatabaseUnavailable: the database is away.
        """
        time, _, digest = event_id.rpartition("-")  # before 1970 the time has a sign
        row = None
        try:
            event_time, body_sha256 = EPOCH + int(time) * MICROSECOND, bytes.fromhex(digest)
        except (ValueError, OverflowError):
            pass  # an id of no event: not found, like any other
        else:
            async with db.connection(self.pool) as connection:
                row = await connection.fetchrow(
                    f"SELECT {_EVENT_COLUMNS}, headers, body FROM {_EVENTS}"  # noqa: S608  a constant of this module
                    " WHERE event_time = $1 AND body_sha256 = $2"
                    " AND ($3::text[] IS NULL OR project_id = ANY($3))",
                    event_time,
                    body_sha256,
                    _projects(scope, None),
                )
        if row is None:
            raise EventNotFound(f"there is no event {event_id}")
        return row

    async def unfolded(self) -> int:
        """How many resources have stored messages that their history does not hold yet.

        Of a large backlog at least the oldest hundred batches are counted.

        Raises:
            DatabaseUnavailable: the database is away.
        """
        async with db.connection(self.pool) as connection:
            return int(await connection.fetchval(_UNFOLDED))

    async def overview(self) -> Overview:
        """Counters of the last day, and how far behind the fold is.

        Raises:
            DatabaseUnavailable: the database is away.
        """
        async with db.connection(self.pool) as connection:
            tally = await connection.fetchrow(
                "SELECT coalesce(sum(stored), 0)::bigint AS stored,"
                " coalesce(sum(duplicate), 0)::bigint AS duplicate,"
                " coalesce(sum(conflict), 0)::bigint AS conflict,"
                " coalesce(sum(unknown_type), 0)::bigint AS unknown_type,"
                " coalesce(sum(problem), 0)::bigint AS problem, max(last_at) AS last_received_at"
                " FROM ingest_tally WHERE hour > now() - interval '1 day'"
            )
            dirty = int(await connection.fetchval(_UNFOLDED))
            oldest = await connection.fetchval(
                "SELECT coalesce(extract(epoch FROM now() - min(marked_at)), 0)::float8 FROM touched"
            )
            unpartitioned = await connection.fetchval(
                "SELECT count(*) FROM (SELECT FROM raw_event_default LIMIT 100000) AS found"
            )
        assert tally is not None
        return Overview(
            **dict(tally),
            dirty=dirty,
            oldest_dirty_seconds=oldest,
            unpartitioned=unpartitioned,
        )


def group_kinds(groups: Iterable[Group]) -> list[str]:
    """The kinds of groups of projects among these.

    Raises:
        GroupUnknown: one of them is none.
    """
    kinds = [
        group.removeprefix(GROUP_PREFIX) for group in groups if group.startswith(GROUP_PREFIX)
    ]
    for kind in kinds:
        if not re.fullmatch(KIND, kind):
            raise GroupUnknown(f"{kind[:60]!r} is no kind of groups of projects")
    return kinds


class _Conditions:
    """A WHERE clause of those conditions whose value is given, with the values in their places.

    Conditions that do not restrict are left out, so that the planner sees the plain statement.
    """

    def __init__(self, *values: object) -> None:
        self.values: list[object] = list(values)
        self._texts: list[str] = []

    def value(self, value: object) -> str:
        """A place in the statement for one more value."""
        self.values.append(value)
        return f"${len(self.values)}"

    def add(self, text: str, *values: object) -> None:
        """`text` holds with `values` in place of its braces; nothing, where a value is None."""
        if None not in values:
            first = len(self.values) + 1
            self.values += values
            self._texts.append(text.format(*(f"${first + n}" for n in range(len(values)))))

    @property
    def clause(self) -> str:
        """The clause; empty where nothing restricts."""
        return f"WHERE {' AND '.join(self._texts)}" if self._texts else ""

    @property
    def also(self) -> str:
        """The conditions behind others; empty where nothing restricts."""
        return "".join(f" AND {text}" for text in self._texts)


def _projects(scope: Scope, project_id: str | None) -> list[str] | None:
    """The projects a statement may look at: those asked for among those allowed."""
    if project_id is None:
        return None if scope is None else sorted(scope)
    return [project_id] if scope is None or project_id in scope else []


def _marker(parts: Sequence[str]) -> str:
    return base64.urlsafe_b64encode(json.dumps(parts).encode()).decode().rstrip("=")


def _after(marker: str | None, parts: int) -> list[str]:
    """The parts a marker was made of; none for the first page."""
    if marker is None:
        return []
    try:
        found = json.loads(base64.urlsafe_b64decode(marker + "=" * (-len(marker) % 4)))
    except (ValueError, RecursionError) as exc:
        raise BadMarker("the marker is not one of this list's") from exc
    if (
        not isinstance(found, list)
        or not found  # usage that is not grouped has one row, and no page after it
        or len(found) != parts
        or not all(isinstance(part, str) and "\0" not in part for part in found)
    ):
        raise BadMarker("the marker is not one of this list's")
    return found
