"""Reading the ledger: usage of any window, histories with their evidence, stored messages.

Usage is computed from the intervals themselves, clipped to the window, in exact arithmetic:
PostgreSQL's `extract(epoch ...)` is numeric with all six decimals. What a caller may see is a
condition inside each statement (`Scope`), never a filter on its answer.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final

import asyncpg

from hostler_common import db, errors
from hostler_usage.measures import MEASURES, Window
from hostler_usage.observation import ResourceKey
from hostler_usage.times import EPOCH, MICROSECOND, epoch_microseconds

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


class Group(StrEnum):
    """What usage can be grouped by."""

    PROJECT = "project"
    USER = "user"
    RESOURCE = "resource"
    TYPE = "type"
    REGION = "region"
    ZONE = "zone"
    HOST = "host"
    FLAVOR = "flavor"
    IMAGE = "image"
    VOLUME_TYPE = "volume_type"
    STATE_CLASS = "state_class"


_COLUMN: Final = {
    Group.PROJECT: "project_id",
    Group.USER: "user_id",
    Group.RESOURCE: "resource_id",
    Group.TYPE: "resource_type",
    Group.REGION: "region",
    Group.ZONE: "zone",
    Group.HOST: "host",
    Group.FLAVOR: "flavor",
    Group.IMAGE: "image",
    Group.VOLUME_TYPE: "volume_type",
    Group.STATE_CLASS: "state_class",
}


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
    """The usage of one group: unit-microseconds of every measure, and how many resources had part."""

    group: Mapping[Group, str | None]
    amounts: Mapping[str, int]
    resources: int


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


_DIRTY = (
    "SELECT count(*) AS dirty, coalesce(extract(epoch FROM now() - min(marked_at)), 0)::float8"
    " AS oldest_dirty_seconds FROM dirty"
)
_EVENT_COLUMNS = (
    "event_time, message_id, body_sha256, received_at, source, region, exchange, routing_key,"
    " event_type, publisher_id, priority, request_id, project_id, resource_type, resource_id,"
    " has_own_id, problems, content_type, content_encoding, octet_length(body) AS body_bytes"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportStore:
    """All reading of the ledger."""

    pool: db.Pool

    async def usage(
        self,
        window: Window,
        groups: Sequence[Group],
        where: UsageFilter,
        *,
        limit: int,
        marker: str | None = None,
    ) -> tuple[list[UsageRow], str | None]:
        """A page of usage rows, ordered by group, and the marker of the next page.

        Raises:
            BadMarker: the marker is not of this list.
            DatabaseUnavailable: the database is away.
        """
        dimensions = [f"coalesce({_COLUMN[group]}, '')" for group in groups]
        keys = ", ".join(dimensions)
        sums = ", ".join(
            f"coalesce(sum({_product(item.attribute)}) FILTER (WHERE resource_type ="
            f" '{item.resource_type}'), 0) AS {item.name}"
            for item in MEASURES
        )
        conditions = _Conditions(window.start, min(window.end, window.as_of))
        conditions.say("$1 < $2 AND starts_at < $2 AND (ends_at IS NULL OR ends_at > $1)")
        conditions.add("project_id = ANY({})", _projects(where.scope, where.project_id))
        conditions.add("region = {}", where.region)
        conditions.add("resource_type = {}", where.resource_type)
        conditions.add("resource_id = {}", where.resource_id)
        if marker is not None:
            after = _after(marker, len(groups))
            places = ", ".join("{}" for _ in after)
            conditions.add(f"({keys}) > ({places})", *after)
        columns = "".join(f"{name} AS group_{n}, " for n, name in enumerate(dimensions))
        statement = (
            f"SELECT {columns}{sums},"  # noqa: S608  constants of this module
            " count(DISTINCT (region, resource_type, resource_id)) AS resources"
            " FROM (SELECT *, 1000000 * (extract(epoch FROM least(ends_at, $2))"
            "  - extract(epoch FROM greatest(starts_at, $1))) AS span FROM usage_interval"
            f" {conditions.clause}) AS clipped"
            + (f" GROUP BY {keys} ORDER BY {keys} LIMIT {int(limit)}" if groups else "")
        )
        async with db.connection(self.pool) as connection:
            rows = await connection.fetch(statement, *conditions.values)
        names = [[row[f"group_{n}"] for n in range(len(groups))] for row in rows]
        found = [
            UsageRow(
                group={group: name or None for group, name in zip(groups, key, strict=True)},
                amounts={item.name: int(row[item.name]) for item in MEASURES},
                resources=row["resources"],
            )
            for row, key in zip(rows, names, strict=True)
        ]
        return found, _marker(names[-1]) if groups and len(rows) == limit else None

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
                f"SELECT {_EVENT_COLUMNS} FROM raw_event {conditions.clause}"  # noqa: S608  constants of this module
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
                    f"SELECT {_EVENT_COLUMNS}, headers, body FROM raw_event"  # noqa: S608  a constant of this module
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

        Raises:
            DatabaseUnavailable: the database is away.
        """
        async with db.connection(self.pool) as connection:
            return int(await connection.fetchval("SELECT count(*) FROM dirty"))

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
            dirty = await connection.fetchrow(_DIRTY)
            unpartitioned = await connection.fetchval(
                "SELECT count(*) FROM (SELECT FROM raw_event_default LIMIT 100000) AS found"
            )
        assert tally is not None
        assert dirty is not None
        return Overview(**dict(tally), **dict(dirty), unpartitioned=unpartitioned)


class _Conditions:
    """A WHERE clause of those conditions whose value is given, with the values in their places.

    Conditions that do not restrict are left out, so that the planner sees the plain statement.
    """

    def __init__(self, *values: object) -> None:
        self.values: list[object] = list(values)
        self._texts: list[str] = []

    def say(self, text: str) -> None:
        """`text` holds; it may speak of values given at the beginning."""
        self._texts.append(text)

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


def _product(attribute: str | None) -> str:
    return "span" if attribute is None else f"span * {attribute}"


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
