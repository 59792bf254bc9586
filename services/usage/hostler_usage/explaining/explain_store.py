"""The parts of one usage row, their audits and their messages, all read as of one moment."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

import asyncpg

from hostler_common import db, errors
from hostler_usage.auditing.audit_report_store import seen_value
from hostler_usage.explaining import explain
from hostler_usage.explaining.explain import Citation, HeldPart, MovedPart, Part, Share
from hostler_usage.history import usage_sql
from hostler_usage.history.measures import Window, quantity
from hostler_usage.history.paging import (
    Conditions,
    Scope,
    marked_moment,
    marked_parts,
    marker_after,
    visible_projects,
)
from hostler_usage.history.report_store import (
    _BUCKETS,
    _COLUMN,
    _EVENT_COLUMNS,
    GROUP_PREFIX,
    GroupUnknown,
    group_kinds,
)
from hostler_usage.reading.mapping import Mapping as Metered
from hostler_usage.reading.mapping import Measure
from hostler_usage.reading.times import epoch_microseconds

VERDICTS_A_RESOURCE: Final = 50
OTHERS_SHOWN: Final = 100


class MeasureUnknown(errors.Invalid):
    """Nothing of that name is metered."""

    code = "usage.measure.unknown"


class BucketInvalid(errors.Invalid):
    """It is no hour, day or month as usage rows spell them."""

    code = "usage.bucket.invalid"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Which number is asked about: a measure of a usage row, by the row's groups and filters.

    `groups` are values by group, as usage rows have them; an empty value is what is not known.
    """

    measure: str
    window: Window
    groups: Mapping[str, str]
    scope: Scope = None
    time_zone: str = "UTC"


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """A page of what a number is made of; `window` is what of the question's counts.

    `events` are the messages that parts cite, and those that stand under the same ids; `bodies` are
    those of the first that fit; `not_shown` are messages that parts cite and that are dropped or
    not the caller's.
    """

    measure: Measure
    window: Window
    amount: int
    resources: int
    parts: int
    shares: Sequence[Share]
    audits: Mapping[tuple[str, str, str], Sequence[asyncpg.Record]]
    events: Sequence[asyncpg.Record]
    bodies: Mapping[tuple[datetime, bytes], bytes]
    not_shown: Sequence[Citation]
    next_marker: str | None


_HELD: Final = (
    "SELECT region, resource_type, resource_id, starts_at AS begun, ends_at,"
    " {lower} AS since, {upper} AS until, project_id, user_id,"
    " state_class, attributes, opened_by, closed_by, provenance, ''::text AS label,"
    " NULL::text AS counter, NULL::jsonb AS evidence,"
    " 1000000 * (extract(epoch FROM {upper}) - extract(epoch FROM {lower}))"
    " * {quantity} AS amount{groups}"
    " FROM usage_interval{split} WHERE resource_type = $3 AND $1 < $2 AND starts_at < $2"
    " AND (ends_at IS NULL OR ends_at > $1)"
)
# as in usage_sql: what a resource was when something moved is in the interval of that moment
_MOVED: Final = (
    "SELECT a.region, a.resource_type, a.resource_id, a.at AS begun, NULL::timestamptz AS ends_at,"
    " a.at AS since, a.at AS until, a.project_id, i.user_id, i.state_class, i.attributes,"
    " NULL::jsonb AS opened_by, NULL::jsonb AS closed_by, NULL::text AS provenance, a.label,"
    " a.counter, a.evidence, a.amount{groups} FROM usage_amount AS a LEFT JOIN usage_interval AS i"
    " ON (i.resource_id, i.resource_type, i.region) = (a.resource_id, a.resource_type, a.region)"
    " AND i.starts_at <= a.at AND (i.ends_at IS NULL OR i.ends_at > a.at){split}"
    " WHERE a.resource_type = $3 AND a.counter = {counter} AND a.at >= $1 AND a.at < $2"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainStore:
    """Answers what a number of usage is made of."""

    pool: db.Pool
    mapping: Metered

    async def explain(
        self, question: Question, *, limit: int, marker: str | None = None
    ) -> Explanation:
        """A page of at most `limit` parts, in the order of resources and time, with all that they rest on.

        Raises:
            MeasureUnknown: there is no such measure.
            GroupUnknown: there is no such group, or no such time zone.
            BucketInvalid: the hour, day or month is none.
            BadMarker: the marker is not of this list.
            DatabaseUnavailable: the database is away.
        """
        measure = next((m for m in self.mapping.measures if m.name == question.measure), None)
        if measure is None:
            known = ", ".join(sorted(item.name for item in self.mapping.measures))
            raise MeasureUnknown(f"{question.measure} is not metered: there are {known}")
        async with (
            db.connection(self.pool) as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            window = await _clipped(connection, question)
            conditions = Conditions(window.start, window.upper, measure.resource_type)
            kinds = group_kinds(question.groups)
            facts = _facts(measure, conditions, len(kinds))
            tables = ""
            if kinds:
                places = [conditions.value(kind) for kind in kinds]
                tables = f"WITH {usage_sql.memberships(places, '')} "
            self._restrict(conditions, question, kinds)
            statement = f"{tables}SELECT * FROM ({facts}) AS facts {conditions.clause}"  # noqa: S608  constants, names of the mapping
            whole = await connection.fetchrow(
                "SELECT coalesce(sum(amount), 0) AS amount, count(*) AS parts,"  # noqa: S608  as above
                " count(DISTINCT (region, resource_id)) AS resources"
                f" FROM ({statement}) AS parts",
                *conditions.values,
            )
            assert whole is not None
            page = Conditions(*conditions.values)
            if marker is not None:
                resource_id, region, since, label = marked_parts(marker, 4)
                page.add(
                    "(resource_id, region, since, label) > ({}, {}, {}, {})",
                    resource_id,
                    region,
                    marked_moment(since),
                    label,
                )
            rows = await connection.fetch(
                "SELECT * FROM (SELECT *, sum(amount) OVER resource AS of_resource,"  # noqa: S608  as above
                f" count(*) OVER resource AS parts_of_resource FROM ({statement}) AS parts"
                " WINDOW resource AS (PARTITION BY resource_id, region)) AS parts"
                f" {page.clause} ORDER BY resource_id, region, since, label LIMIT {int(limit)}",
                *page.values,
            )
            parts = [_part(row, measure) for row in rows]
            found = explain.shares(
                (part, int(row["of_resource"]), row["parts_of_resource"])
                for part, row in zip(parts, rows, strict=True)
            )
            cited = explain.citations(parts)
            events = await _events(connection, cited, question.scope)
            shown = {(row["event_time"], row["body_sha256"]) for row in events}
            return Explanation(
                measure=measure,
                window=window,
                amount=int(whole["amount"]),
                resources=whole["resources"],
                parts=whole["parts"],
                shares=found,
                audits=await _audits(connection, found, window, question.scope),
                events=events,
                bodies=await _bodies(connection, events) if question.scope is None else {},
                not_shown=[
                    item for item in cited if explain.event_key(item["event_id"]) not in shown
                ],
                next_marker=_next(rows[-1]) if len(rows) == limit else None,
            )

    def _restrict(self, conditions: Conditions, question: Question, kinds: Sequence[str]) -> None:
        """What the row's groups and the caller's scope ask for."""
        scope = question.scope
        conditions.add("project_id = ANY({})", visible_projects(scope))
        for group, value in question.groups.items():
            if group in _BUCKETS:
                continue  # in the window
            column = _COLUMN.get(group)
            if group.startswith(GROUP_PREFIX):
                column = f"group_of_{kinds.index(group.removeprefix(GROUP_PREFIX))}"
            elif column is None:
                if group not in self.mapping.attribute_names:
                    known = sorted(
                        {
                            *_BUCKETS,
                            *_COLUMN,
                            *self.mapping.attribute_names,
                            f"{GROUP_PREFIX}<kind>",
                        }
                    )
                    raise GroupUnknown(
                        f"usage has no group {group[:60]}: there are {', '.join(known)}"
                    )
                column = f"attributes->>'{group}'"
            # an index knows nothing of coalesce
            conditions.add(
                f"{column} = {{}}" if value else f"coalesce({column}, '') = {{}}", value
            )


def _facts(measure: Measure, conditions: Conditions, kinds: int) -> str:
    groups = usage_sql.group_columns(kinds)
    if measure.counter is not None:
        return _MOVED.format(
            counter=conditions.value(measure.counter),
            groups=groups,
            split=usage_sql.MOVED_SPLIT if kinds else "",
        )
    lower, upper, split = "greatest(starts_at, $1)", "least(ends_at, $2)", ""
    if kinds:
        split = usage_sql.held_split(lower, upper)
        lower, upper = f"greatest({lower}, member_from)", f"least({upper}, member_until)"
    quantity = "1"
    if measure.attribute is not None:
        name = conditions.value(measure.attribute)
        quantity = f"coalesce((attributes->>{name}::text)::bigint, 0)"
    return _HELD.format(quantity=quantity, lower=lower, upper=upper, groups=groups, split=split)


async def _clipped(connection: db.Connection, question: Question) -> Window:
    """The window, cut to the hour, day or month that is asked for: as `usage_sql.facts` cuts them.

    A bucket lasts from the moment its first local time spells to the next one's.
    """
    window = question.window
    buckets = [group for group in question.groups if group in _BUCKETS]
    if len(buckets) > 1:
        raise GroupUnknown(f"one of {', '.join(_BUCKETS)} at a time")
    for bucket in buckets:
        try:
            spelled = datetime.fromisoformat(question.groups[bucket])
            if spelled.tzinfo is not None:
                raise ValueError("local times have no zone")  # noqa: TRY301  both are one refusal
            row = await connection.fetchrow(
                "SELECT $1::timestamp AT TIME ZONE $2 AS since,"
                f" ($1::timestamp + interval '1 {bucket}') AT TIME ZONE $2 AS until,"
                f" date_trunc('{bucket}', $1::timestamp) = $1::timestamp AS is_whole",
                spelled,
                question.time_zone,
            )
        except asyncpg.InvalidParameterValueError as exc:
            raise GroupUnknown(f"there is no time zone {question.time_zone}") from exc
        except (ValueError, OverflowError, asyncpg.DataError) as exc:
            raise BucketInvalid(f"{question.groups[bucket][:60]!r} is no {bucket}") from exc
        assert row is not None
        if not row["is_whole"]:
            raise BucketInvalid(f"no {bucket} begins at {question.groups[bucket]}")
        window = replace(
            window, start=max(window.start, row["since"]), end=min(window.end, row["until"])
        )
    return window


def _part(row: asyncpg.Record, measure: Measure) -> Part:
    of_resource: dict[str, Any] = {
        name: row[name]
        for name in ("region", "resource_type", "resource_id", "project_id", "state_class")
    }
    attributes = row["attributes"] or {}
    if measure.counter is not None:
        return MovedPart(
            **of_resource,
            at=row["begun"],
            counter=row["counter"],
            label=row["label"],
            amount=int(row["amount"]),
            attributes=attributes,
            evidence=row["evidence"],
        )
    return HeldPart(
        **of_resource,
        start=row["begun"],
        end=row["ends_at"],
        counted_from=row["since"],
        counted_until=row["until"],
        quantity=quantity(measure, attributes),
        user_id=row["user_id"],
        attributes=attributes,
        opened_by=row["opened_by"],
        closed_by=row["closed_by"],
        provenance=row["provenance"],
    )


def _next(row: asyncpg.Record) -> str:
    since = str(epoch_microseconds(row["since"]))
    return marker_after([row["resource_id"], row["region"], since, row["label"]])


_KEYS: Final = (
    "unnest($1::timestamptz[], $2::text[], $3::bytea[]) AS k (event_time, message_id, body_sha256)"
    " JOIN raw_event USING (event_time, message_id, body_sha256)"
)


async def _events(
    connection: db.Connection, cited: Sequence[Citation], scope: Scope
) -> list[asyncpg.Record]:
    """Those of the cited messages, and of others under their ids, that are stored and that the caller may see.

    Oldest first.
    """
    keys = [explain.event_key(item["event_id"]) for item in cited]
    # of messages under one id parts may rest on one, and the others have been weighed all the same
    others = await connection.fetch(
        "SELECT event_time, message_id, body_sha256 FROM event_conflict"  # noqa: S608  a constant of this module
        " WHERE message_id = ANY($1::text[]) AND (event_time, body_sha256) NOT IN"
        "  (SELECT * FROM unnest($2::timestamptz[], $3::bytea[]))"
        f" ORDER BY message_id, event_time, body_sha256 LIMIT {OTHERS_SHOWN}",
        [item["message_id"] for item in cited],
        [time for time, _ in keys],
        [digest for _, digest in keys],
    )
    return await connection.fetch(
        f"SELECT {_EVENT_COLUMNS} FROM {_KEYS} JOIN origin ON origin.id = raw_event.origin"  # noqa: S608  constants
        " WHERE $4::text[] IS NULL OR project_id = ANY($4)"
        " ORDER BY event_time, message_id, body_sha256",
        [*(time for time, _ in keys), *(row["event_time"] for row in others)],
        [*(item["message_id"] for item in cited), *(row["message_id"] for row in others)],
        [*(digest for _, digest in keys), *(row["body_sha256"] for row in others)],
        visible_projects(scope),
    )


async def _bodies(
    connection: db.Connection, events: Sequence[asyncpg.Record]
) -> dict[tuple[datetime, bytes], bytes]:
    first = events[: explain.affordable([row["body_bytes"] for row in events])]
    rows = await connection.fetch(
        f"SELECT event_time, body_sha256, body FROM {_KEYS}",  # noqa: S608  a constant of this module
        [row["event_time"] for row in first],
        [row["message_id"] for row in first],
        [row["body_sha256"] for row in first],
    )
    return {(row["event_time"], row["body_sha256"]): row["body"] for row in rows}


async def _audits(
    connection: db.Connection, found: Sequence[Share], window: Window, scope: Scope
) -> dict[tuple[str, str, str], list[asyncpg.Record]]:
    """The verdicts on each resource that have part in the window: at most so many, troubles first."""
    rows = await connection.fetch(
        "SELECT region, resource_type, resource_id, v.* FROM unnest($2::text[], $3::text[],"  # noqa: S608  constants
        " $4::text[]) AS k (region, resource_type, resource_id) CROSS JOIN LATERAL ("
        "  SELECT period_start, period_end, periods, is_partial, status, code, field,"
        f"  {seen_value('ours')}, {seen_value('theirs')}, evidence FROM audit_verdict AS a"
        "  WHERE (a.resource_id, a.resource_type, a.region)"
        "   = (k.resource_id, k.resource_type, k.region)"
        "  AND period_start < $6 AND (period_end > $5 OR period_start >= $5)"
        "  AND ($1::text[] IS NULL OR project_id = ANY($1))"
        f"  ORDER BY status = 'verified', period_start, origin, ordinal LIMIT {VERDICTS_A_RESOURCE}"
        ") AS v",
        visible_projects(scope),
        [item.region for item in found],
        [item.resource_type for item in found],
        [item.resource_id for item in found],
        window.start,
        window.upper,
    )
    verdicts: dict[tuple[str, str, str], list[asyncpg.Record]] = defaultdict(list)
    for row in rows:
        verdicts[row["region"], row["resource_type"], row["resource_id"]].append(row)
    return verdicts
