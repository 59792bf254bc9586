"""Reading the ledger: usage of any window, histories with their evidence, stored messages.

Usage is computed from intervals clipped to the window and from amounts inside it, in exact
arithmetic: PostgreSQL's `extract(epoch ...)` is numeric with all six decimals. What a caller may
see is a condition inside each statement (`Scope`), never a filter on its answer.
"""

import re
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import pairwise
from typing import Final, Generic, TypeVar

import asyncpg

from hostler_common import db, errors
from hostler_usage.history import usage_sql
from hostler_usage.history.day_sum_store import BUCKETS, GROUPS, SLICE, DaySums
from hostler_usage.history.measures import Window
from hostler_usage.history.paging import (
    BadMarker,
    Conditions,
    Scope,
    marked_parts,
    marker_after,
    visible_projects,
)
from hostler_usage.history.project_order_store import projects_from
from hostler_usage.history.rollup_store import days_until
from hostler_usage.history.summed_days import Parts, midnights, parts, pieces
from hostler_usage.history.usage_row import SliceRow, UsageRow
from hostler_usage.money.budget import KIND
from hostler_usage.reading.mapping import Mapping, Measure
from hostler_usage.reading.statement import ResourceKey
from hostler_usage.reading.times import EPOCH, MICROSECOND, epoch_microseconds


class EventNotFound(errors.NotFound):
    """There is no such stored message, or none that the caller may see."""

    code = "usage.event.not_found"


class ResourceNotFound(errors.NotFound):
    """No message has spoken of such a resource, or none that the caller may see."""

    code = "usage.resource.not_found"


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
T = TypeVar("T")
MOST_PIECES: Final = 16
"""Each part of a window that is not summed up is read for itself, beside the sums of days, if there are no more."""
# a page that begins with projects looks at so many of them; where they have less, at more
_PROJECTS_AT_ONCE: Final = 4
_ROWS_A_PROJECT: Final = 20
_BUCKET_LENGTHS: Final = {"hour": timedelta(hours=1), "day": timedelta(days=1)}
ROWS_A_BATCH: Final = 1000
# a whole table is grouped at once: with the usual 4 MB it is sorted on the disk. To compile so many sums takes longer
# than to reckon them
_IN_MEMORY: Final = "SET LOCAL work_mem = '64MB'; SET LOCAL jit = off"
_READING_SECONDS: Final = 600.0  # until the first rows come everything has been grouped


@dataclass(frozen=True, slots=True, kw_only=True)
class Subjects:
    """Projects by their names, and all that ever were in one of these groups, each of a kind."""

    projects: frozenset[str]
    groups: frozenset[tuple[str, str]] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageFilter:
    """Which usage is asked for; None does not restrict."""

    scope: Scope = None
    project_id: str | None = None
    region: str | None = None
    resource_type: str | None = None
    resource_id: str | None = None
    subjects: Subjects | None = None


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
    is_audit: bool | None = None


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
    " octet_length(body) AS body_bytes, (SELECT greatest(1, count(*)) FROM (SELECT"
    "  FROM event_conflict AS c WHERE c.message_id = raw_event.message_id LIMIT 100) AS under_it"
    " ) AS bodies"
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
        shown, next_marker = await self.shown_usage(
            list, window, groups, where, limit=limit, marker=marker, time_zone=time_zone
        )
        return [row for rows in shown for row in rows], next_marker

    async def shown_usage(
        self,
        show: Callable[[Sequence[UsageRow]], T],
        window: Window,
        groups: Sequence[Group],
        where: UsageFilter,
        *,
        limit: int,
        marker: str | None = None,
        time_zone: str = "UTC",
    ) -> tuple[list[T], str | None]:
        """The page that `usage` answers with, as `show` makes it of some rows after the others.

        Sums of days are shown while the database looks for the next of them.

        Raises:
            GroupUnknown: there is no such group, or no such time zone.
            BadMarker: the marker is not of this list.
            DatabaseUnavailable: the database is away.
        """
        edges = (window.start, window.upper)
        page = _Page(show)
        # which days are summed up, and the statements of a page: all of them as of one moment
        async with (
            db.connection(self.pool) as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            try:
                if not set(_BUCKETS).isdisjoint(groups):
                    # whether the name is good must not depend on what there is to cut
                    await connection.fetchval("SELECT now() AT TIME ZONE $1::text", time_zone)
                of = await self._parts(connection, edges, groups, where, time_zone)
                sums = self._day_sums(of, groups, where)
                if sums is None or sums.rest:
                    await connection.execute(_IN_MEMORY)
                if sums is not None:
                    after = marked_parts(marker, len(groups)) or None
                    is_more = await sums.page(connection, after, limit, page.take)
                else:
                    ask = partial(
                        self._query, of, edges, groups, where, time_zone=time_zone, marker=marker
                    )
                    async with aclosing(
                        self._narrowed(connection, window, groups, where, marker, limit)
                    ) as narrowed:
                        async for projects in narrowed:
                            query = ask(projects=projects, limit=limit - page.rows)
                            rows = await connection.fetch(query.text, *query.values)
                            page.take([query.usage_row(row) for row in rows])
                            if page.rows == limit:
                                break
                    is_more = bool(groups) and page.rows == limit
            except asyncpg.InvalidParameterValueError as exc:
                raise GroupUnknown(f"there is no time zone {time_zone}") from exc
        if not is_more or page.last is None:
            return page.shown, None
        return page.shown, marker_after([page.last.group[name] or "" for name in groups])

    async def _narrowed(
        self,
        connection: db.Connection,
        window: Window,
        groups: Sequence[Group],
        where: UsageFilter,
        marker: str | None,
        limit: int,
    ) -> AsyncGenerator[Sequence[str] | None]:
        """The projects to ask about for a page, some after the other; None where it needs all at once."""
        if not groups or groups[0] != "project" or where.subjects or where.resource_id is not None:
            yield None
            return
        after = marked_parts(marker, len(groups))
        lengths = [length for name, length in _BUCKET_LENGTHS.items() if name in groups]
        rows = max([_ROWS_A_PROJECT, *((window.upper - window.start) // one for one in lengths)])
        known = projects_from(
            connection,
            after[0] if after else "",
            max(_PROJECTS_AT_ONCE, limit // rows),
            among=visible_projects(where.scope, where.project_id),
            are_summed=False,
        )
        async with aclosing(known) as batches:
            async for names in batches:
                yield names

    async def all_usage(
        self, window: Window, groups: Sequence[Group], where: UsageFilter
    ) -> AsyncGenerator[Sequence[UsageRow]]:
        """All usage rows, ordered by group, in batches: the ledger is read once and as of one moment.

        Raises:
            GroupUnknown: there is no such group.
            DatabaseUnavailable: the database is away.
        """
        edges = (window.start, window.upper)
        async with db.transaction(self.pool) as connection:
            of = await self._parts(connection, edges, groups, where)
            await connection.execute(_IN_MEMORY)
            sums = self._day_sums(of, groups, where)
            if sums is not None:
                async with aclosing(sums.all(connection)) as batches:
                    async for summed in batches:
                        yield summed
                return
            query = self._query(of, edges, groups, where)
            cursor = await connection.cursor(query.text, *query.values)
            while rows := await cursor.fetch(ROWS_A_BATCH, timeout=_READING_SECONDS):
                yield [query.usage_row(row) for row in rows]

    async def usage_by_slice(
        self,
        edges: Sequence[datetime],
        groups: Sequence[Group],
        where: UsageFilter,
        *,
        as_of: datetime,
        leading: int = 0,
    ) -> AsyncGenerator[Sequence[SliceRow]]:
        """The usage of each group in each slice of a window, in batches; what is nothing is left out.

        The ledger is read once and as of one moment, however many slices there are. `edges` are the
        window's begin, the cuts between slices, and its end, in order; time from `as_of` on has not
        happened yet. Rows are ordered by so many `leading` groups, by slice, and by the other groups.

        Raises:
            GroupUnknown: there is no such group, or it is one of time.
            DatabaseUnavailable: the database is away.
        """
        if not set(_BUCKETS).isdisjoint(groups):
            raise GroupUnknown("what is cut into slices is not grouped by time as well")
        if edges[0] >= as_of:
            return
        happened = [*(edge for edge in edges if edge < as_of), min(edges[-1], as_of)]
        window = sorted(set(happened))
        async with db.transaction(self.pool) as connection:
            of = await self._parts(connection, window, groups, where)
            await connection.execute(_IN_MEMORY)
            sums = self._day_sums(of, groups, where, edges=window)
            if sums is not None:
                async with aclosing(_day_slices(sums, connection, leading)) as batches:
                    async for rows in batches:
                        yield rows
                return
            query = self._query(of, window, groups, where, is_sliced=True, leading=leading)
            cursor = await connection.cursor(query.text, *query.values)
            while found := await cursor.fetch(ROWS_A_BATCH, timeout=_READING_SECONDS):
                yield query.slice_rows(found)

    async def _parts(
        self,
        connection: db.Connection,
        edges: Sequence[datetime],
        groups: Sequence[Group],
        where: UsageFilter,
        time_zone: str = "UTC",
    ) -> Parts:
        """Which days of the window have sums that can answer, and what is left to the facts."""
        if not self._measures(where) or not _is_summed(groups, where, time_zone):
            return parts(edges, None)
        return parts(edges, await days_until(connection))

    def _measures(self, where: UsageFilter) -> list[Measure]:
        return [
            item
            for item in self.mapping.measures
            if where.resource_type in (None, item.resource_type)
        ]

    def _day_sums(
        self,
        of: Parts,
        groups: Sequence[Group],
        where: UsageFilter,
        *,
        edges: Sequence[datetime] = (),
    ) -> DaySums | None:
        """What answers where sums of whole days do, but for a few spans of time: cut at these edges, if any."""
        if not of.days or where.subjects is not None or not GROUPS.issuperset(groups):
            return None
        if len(BUCKETS.intersection(groups)) > 1:
            return None
        cuts = set(edges)
        if not BUCKETS.isdisjoint(groups):
            cuts |= {cut for cut in midnights(of.rest) if "day" in groups or cut.day == 1}
        rest = pieces(of.rest, cuts)
        if len(rest) > MOST_PIECES:
            return None
        return DaySums(
            days=of.days,
            rest=rest,
            groups=groups,
            edges=edges,
            measures=self._measures(where),
            projects=visible_projects(where.scope, where.project_id),
            region=where.region,
            resource_type=where.resource_type,
        )

    def _query(
        self,
        of: Parts,
        edges: Sequence[datetime],
        groups: Sequence[Group],
        where: UsageFilter,
        *,
        time_zone: str = "UTC",
        is_sliced: bool = False,
        leading: int = 0,
        marker: str | None = None,
        limit: int | None = None,
        projects: Sequence[str] | None = None,
    ) -> "_Query":
        """What to ask for the usage of the window that `edges` begin and end, and cut if it is sliced.

        With `projects`, visible ones, of these only; "" is what is of no known project.
        """
        measures = self._measures(where)
        conditions = Conditions(edges[0], edges[-1])
        kinds = group_kinds(groups)
        dimensions = [self._dimension(group, kinds) for group in groups]
        buckets = [group for group in groups if group in _BUCKETS]
        if len(buckets) > 1:
            raise GroupUnknown(f"one of {', '.join(_BUCKETS)} at a time")
        visible = visible_projects(where.scope, where.project_id)
        is_known = "project_id = ANY({})"
        if projects is not None and visible is None and "" in projects:
            is_known = f"({is_known} OR project_id IS NULL)"
        conditions.add(is_known, visible if projects is None else projects)
        if where.subjects is not None:
            conditions.add(
                "(project_id = ANY({}) OR project_id IN (SELECT g.project_id FROM project_group AS g"
                " JOIN unnest({}::text[], {}::text[]) AS named (kind, name)"
                " ON (g.kind, g.name) = (named.kind, named.name)))",
                sorted(where.subjects.projects),
                [kind for kind, _ in sorted(where.subjects.groups)],
                [name for _, name in sorted(where.subjects.groups)],
            )
        own_projects = conditions.also
        conditions.add("region = {}", where.region)
        conditions.add("resource_type = {}", where.resource_type)
        conditions.add("resource_id = {}", where.resource_id)
        clause = conditions.also
        bucket = buckets[0] if buckets else None
        after = Conditions(*conditions.values)
        if marker is not None:
            values = marked_parts(marker, len(groups))
            places = ", ".join("{}" for _ in values)
            after.add(f"({', '.join(dimensions)}) > ({places})", *values)
        sources, tables = self._sources(
            of,
            after,
            clause,
            own_projects,
            bucket=bucket,
            kinds=kinds,
            time_zone=time_zone,
            edges=f"({after.value(list(edges))}::timestamptz[])" if is_sliced else None,
        )
        columns = [f"{name} AS group_{n}" for n, name in enumerate(dimensions)]
        keys = list(dimensions)
        sums: tuple[str | None, ...] = ()
        if is_sliced:
            by_attribute = usage_sql.sums(measures)
            sums = tuple(by_attribute)
            columns += ["slice", *usage_sql.KINDS, *by_attribute.values()]
            keys = [*keys[:leading], "slice", *keys[leading:], *usage_sql.KINDS]
        else:
            columns += [f"{usage_sql.total(item)} AS m{n}" for n, item in enumerate(measures)]
        counts_resources = not is_sliced and not of.days
        if counts_resources:
            columns.append("count(DISTINCT (region, resource_type, resource_id)) AS resources")
        text = (
            (f"WITH {', '.join(tables)} " if tables else "") + f"SELECT {', '.join(columns)}"  # noqa: S608  constants of this module, names of the mapping
            f" FROM ({' UNION ALL '.join(sources)}) AS facts {after.clause}"
            + (f" GROUP BY {', '.join(keys)} ORDER BY {', '.join(keys)}" if keys else "")
            + (f" LIMIT {int(limit)}" if limit is not None else "")
        )
        return _Query(
            text=text,
            values=after.values,
            groups=groups,
            measures=measures,
            counts_resources=counts_resources,
            sums=sums,
        )

    def _sources(
        self,
        of: Parts,
        conditions: "Conditions",
        clause: str,
        own_projects: str,
        *,
        bucket: str | None,
        kinds: Sequence[str],
        time_zone: str,
        edges: str | None,
    ) -> tuple[list[str], list[str]]:
        """What the usage of a window is summed up from, and the common tables that this needs."""
        zone = ""
        if bucket is not None and (
            of.rest or kinds or not of.days
        ):  # else no place would be for it
            zone = conditions.value(time_zone)
        facts = partial(usage_sql.facts, clause, bucket, zone, groups=len(kinds), edges=edges)
        tables = []
        if kinds:
            places = [conditions.value(kind) for kind in kinds]
            tables.append(usage_sql.memberships(places, own_projects))
        if not of.days:
            return [facts()], tables
        stretches = [(conditions.value(first), conditions.value(last)) for first, last in of.days]
        sources = [
            facts(start=conditions.value(start), end=conditions.value(end))
            for start, end in of.rest
        ]
        sources.append(usage_sql.days(clause, bucket, stretches, groups=len(kinds), edges=edges))
        if kinds:
            tables.append(usage_sql.split_days(stretches))
            sources.append(facts(is_split=True))
        return sources, tables

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
                visible_projects(scope, None),
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
        conditions = Conditions()
        conditions.add("event_time >= {}", where.start)
        conditions.add("event_time < {}", where.end)
        conditions.add("event_type = {}", where.event_type)
        conditions.add("message_id = {}", where.message_id)
        conditions.add("project_id = ANY({})", visible_projects(where.scope, where.project_id))
        conditions.add("resource_type = {}", where.resource_type)
        conditions.add("resource_id = {}", where.resource_id)
        conditions.add("source = {}", where.source)
        conditions.add("region = {}", where.region)
        conditions.add("(event_type LIKE '%.exists') = {}", where.is_audit)
        if marker is not None:
            time, message_id, digest = marked_parts(marker, 3)
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
        return rows, marker_after([time, row["message_id"], row["body_sha256"].hex()])

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
                    visible_projects(scope, None),
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


def _is_summed(groups: Sequence[Group], where: UsageFilter, time_zone: str) -> bool:
    """Whether sums of whole days can answer, where days are summed up."""
    columns = {group for group in groups if not group.startswith(GROUP_PREFIX)}
    if not GROUPS.issuperset(columns) or where.resource_id is not None:
        return False
    return time_zone == "UTC" or {"day", "month"}.isdisjoint(groups)


async def _day_slices(
    sums: DaySums, connection: db.Connection, leading: int
) -> AsyncGenerator[list[SliceRow]]:
    """The slices between the edges of these sums."""
    slices = list(pairwise(sums.edges))
    bucket, numbers = SLICE, {str(n + 1): n for n in range(len(slices))}
    days = [start.astimezone(UTC).date() for start, _ in slices]
    if days == sorted(set(days)) and not midnights(slices):
        # each is of a day of its own: as they are stored, there is less to reckon
        bucket, numbers = "day", {f"{day}T00:00:00": n for n, day in enumerate(days)}
    sliced = replace(sums, groups=[*sums.groups[:leading], bucket, *sums.groups[leading:]])
    async with aclosing(sliced.all(connection)) as batches:
        async for batch in batches:
            yield [
                SliceRow(slice=numbers[group.pop(bucket) or ""], group=group, amounts=amounts)
                for group, amounts, _ in batch
                if amounts
            ]


@dataclass(slots=True)
class _Page(Generic[T]):
    """The rows of a page as they are found: what is made of some after the other, and the last of them."""

    show: Callable[[Sequence[UsageRow]], T]
    shown: list[T] = field(default_factory=list)
    rows: int = 0
    last: UsageRow | None = None

    def take(self, found: Sequence[UsageRow]) -> None:
        """These are the next."""
        if found:
            self.shown.append(self.show(found))
            self.rows += len(found)
            self.last = found[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Query:
    """A statement about usage, and what its rows say."""

    text: str
    values: Sequence[object]
    groups: Sequence[Group]
    measures: Sequence[Measure]
    counts_resources: bool
    sums: Sequence[str | None]

    def usage_row(self, row: asyncpg.Record) -> UsageRow:
        """The usage of a group."""
        return UsageRow(
            group=self._group(row),
            amounts=self._amounts(row),
            resources=row["resources"] if self.counts_resources else None,
        )

    def slice_rows(self, rows: Iterable[asyncpg.Record]) -> list[SliceRow]:
        """The usage of groups in slices."""
        of_type: dict[str, list[Measure]] = defaultdict(list)
        for item in self.measures:
            of_type[item.resource_type].append(item)
        first = len(self.groups)
        found = []
        for row in rows:
            number, resource_type, counter, summed = row[first : first + 4]
            sums = dict(zip(self.sums, row[first + 4 :], strict=True))
            amounts = usage_sql.amounts(of_type[resource_type], counter, summed, sums)
            if amounts:
                found.append(SliceRow(slice=number - 1, group=self._group(row), amounts=amounts))
        return found

    def _group(self, row: asyncpg.Record) -> dict[Group, str | None]:
        return {name: row[n] or None for n, name in enumerate(self.groups)}

    def _amounts(self, row: asyncpg.Record) -> dict[str, int]:
        first = len(self.groups)
        return {
            item.name: int(row[first + n])
            for n, item in enumerate(self.measures)
            if row[first + n]
        }
