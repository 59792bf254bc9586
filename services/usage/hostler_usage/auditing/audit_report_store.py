"""Reading audit verdicts: ours beside theirs, and how much of the usage rests on audits.

What a caller may see is a condition inside each statement (`Scope`). A verdict about an owner can
name two projects: those that are not the caller's are left out of it there as well.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final

import asyncpg

from hostler_common import db
from hostler_usage.history.paging import (
    Conditions,
    Scope,
    marked_integer,
    marked_moment,
    marked_parts,
    marker_after,
    visible_projects,
)
from hostler_usage.reading.times import epoch_microseconds


class AuditGroup(StrEnum):
    """What the report can be grouped by; days are those of UTC."""

    PROJECT = "project"
    RESOURCE_TYPE = "resource_type"
    REGION = "region"
    DAY = "day"


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditFilter:
    """Which verdicts are asked for; None does not restrict. Periods that overlap the window count."""

    scope: Scope = None
    start: datetime | None = None
    end: datetime | None = None
    project_id: str | None = None
    region: str | None = None
    resource_type: str | None = None
    resource_id: str | None = None
    status: str | None = None
    code: str | None = None
    host: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReportRow:
    """The audits of one group: verdicts by status, and microseconds of resources in being.

    `verified`, `repaired` and `excused` microseconds exclude each other, in this order; what is in
    none of them is unverified.
    """

    group: Mapping[AuditGroup, str | None]
    verdicts: Mapping[str, int]
    held_us: int
    verified_us: int
    repaired_us: int
    excused_us: int

    @property
    def unverified_us(self) -> int:
        """Microseconds that no audit bears out."""
        return self.held_us - self.verified_us - self.repaired_us - self.excused_us


_HELD_COLUMN: Final = {
    AuditGroup.PROJECT: "coalesce(project_id, '')",
    AuditGroup.RESOURCE_TYPE: "resource_type",
    AuditGroup.REGION: "region",
    AuditGroup.DAY: "to_char(lower(span) AT TIME ZONE 'UTC', 'YYYY-MM-DD')",
}
_COUNTED_COLUMN: Final = _HELD_COLUMN | {
    AuditGroup.DAY: "to_char(greatest(period_start, $1) AT TIME ZONE 'UTC', 'YYYY-MM-DD')",
}
# of a run of equal periods, those that begin in the window
_COUNT: Final = (
    "CASE WHEN period_start = period_end THEN 1 ELSE"
    " least(periods, ceil(extract(epoch FROM $2 - period_start) * periods"
    "  / extract(epoch FROM period_end - period_start)))"
    " - greatest(0, ceil(extract(epoch FROM $1 - period_start) * periods"
    "  / extract(epoch FROM period_end - period_start))) END"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReportStore:
    """All reading of verdicts."""

    pool: db.Pool

    async def verdicts(
        self, where: AuditFilter, *, limit: int, marker: str | None = None
    ) -> tuple[list[asyncpg.Record], str | None]:
        """A page of verdicts, newest first, and the marker of the next page.

        Raises:
            BadMarker: the marker is not of this list.
            DatabaseUnavailable: the database is away.
        """
        scope = visible_projects(where.scope)
        conditions = Conditions(scope)
        conditions.add("(period_end > {} OR period_start >= {})", where.start, where.start)
        conditions.add("period_start < {}", where.end)
        conditions.add("project_id = ANY({})", visible_projects(where.scope, where.project_id))
        for name in ("region", "resource_type", "resource_id", "status", "code", "host"):
            conditions.add(f"{name} = {{}}", getattr(where, name))
        if marker is not None:
            time, region, resource_type, resource_id, origin, ordinal = marked_parts(marker, 6)
            conditions.add(
                "(period_start, region, resource_type, resource_id, origin, ordinal)"
                " < ({}, {}, {}, {}, {}, {})",
                marked_moment(time),
                region,
                resource_type,
                resource_id,
                origin,
                marked_integer(ordinal),
            )
        async with db.connection(self.pool) as connection:
            rows = await connection.fetch(
                "SELECT region, resource_type, resource_id, period_start, origin, ordinal,"  # noqa: S608  constants of this module
                " period_end, periods, is_partial, status, code, field,"
                f" {seen_value('ours')}, {seen_value('theirs')}, project_id, host, statements, evidence"
                f" FROM audit_verdict {conditions.clause} ORDER BY period_start DESC, region DESC,"
                " resource_type DESC, resource_id DESC, origin DESC, ordinal DESC"
                f" LIMIT {int(limit)}",
                *conditions.values,
            )
        if len(rows) < limit:
            return rows, None
        last = rows[-1]
        time = str(epoch_microseconds(last["period_start"]))
        names = ("region", "resource_type", "resource_id", "origin", "ordinal")
        return rows, marker_after([time, *(str(last[name]) for name in names)])

    async def report(
        self,
        start: datetime,
        end: datetime,
        groups: Sequence[AuditGroup],
        where: AuditFilter,
        *,
        limit: int,
        marker: str | None = None,
    ) -> tuple[list[AuditReportRow], str | None]:
        """A page of the report on `[start, end)`, in order of groups, of which there is at least one.

        A verdict counts where its period begins. Nothing after `end` has been held: give no later
        one than now.

        Raises:
            BadMarker: the marker is not of this list.
            DatabaseUnavailable: the database is away.
        """
        conditions = Conditions(start, end)
        conditions.add("project_id = ANY({})", visible_projects(where.scope, where.project_id))
        conditions.add("region = {}", where.region)
        conditions.add("resource_type = {}", where.resource_type)
        also = conditions.also
        names = [f"group_{number}" for number in range(len(groups))]
        keys = ", ".join(names)
        page = Conditions(*conditions.values)
        if marker is not None:
            after = marked_parts(marker, len(groups))
            page.add(f"({keys}) > ({', '.join('{}' for _ in after)})", *after)
        held_as = ", ".join(
            f"{_HELD_COLUMN[group]} AS {name}" for group, name in zip(groups, names, strict=True)
        )
        counted_as = ", ".join(
            f"{_COUNTED_COLUMN[group]} AS {name}"
            for group, name in zip(groups, names, strict=True)
        )
        async with db.connection(self.pool) as connection:
            rows = await connection.fetch(
                f"WITH {_held(also, is_by_day=AuditGroup.DAY in groups)},"  # noqa: S608  constants of this module
                f" used AS (SELECT {held_as}, sum({_length('held')}) AS held,"
                f" sum({_length('held * verified')}) AS verified,"
                f" sum({_length('held * (repaired - verified)')}) AS repaired,"
                f" sum({_length('held * (excused - repaired - verified)')}) AS excused"
                f" FROM pieces GROUP BY {keys}),"
                f" counted AS (SELECT {keys}, jsonb_object_agg(status, n) AS verdicts FROM"
                f" (SELECT {counted_as}, status, sum({_COUNT})::bigint AS n FROM audit_verdict"
                "   WHERE period_start < $2 AND (period_end > $1 OR period_start >= $1)"
                f"  {also} GROUP BY {keys}, status) AS each WHERE n > 0 GROUP BY {keys})"
                f" SELECT {keys}, coalesce(held, 0) AS held, coalesce(verified, 0) AS verified,"
                " coalesce(repaired, 0) AS repaired, coalesce(excused, 0) AS excused, verdicts"
                f" FROM used FULL JOIN counted USING ({keys}) {page.clause}"
                f" ORDER BY {keys} LIMIT {int(limit)}",
                *page.values,
            )
        found = [
            AuditReportRow(
                group={
                    group: row[name] or None for group, name in zip(groups, names, strict=True)
                },
                verdicts=row["verdicts"] or {},
                held_us=int(row["held"]),
                verified_us=int(row["verified"]),
                repaired_us=int(row["repaired"]),
                excused_us=int(row["excused"]),
            )
            for row in rows
        ]
        next_marker = (
            marker_after([rows[-1][name] for name in names]) if len(rows) == limit else None
        )
        return found, next_marker


def seen_value(name: str) -> str:
    """A value of a verdict; that of an owner only where the caller may see that project."""
    return (
        f"CASE WHEN field = 'project' AND $1::text[] IS NOT NULL AND NOT coalesce({name} #>> '{{}}'"
        f" = ANY($1), true) THEN 'null'::jsonb ELSE {name} END AS {name}"
    )


def _held(also: str, *, is_by_day: bool) -> str:
    """What was held in the window as `pieces`, each with the ranges its resource's audits bear out.

    Where a statement disagrees, none bears out its period.
    """
    span = "tstzrange(greatest(starts_at, $1), least(ends_at, $2))"
    cut = ""
    if is_by_day:
        cut = (
            " CROSS JOIN LATERAL generate_series(date_trunc('day', greatest(starts_at, $1), 'UTC'),"
            " least(ends_at, $2) - interval '1 microsecond', interval '24 hours') AS day"
        )
        span += " * tstzrange(day, day + interval '24 hours')"

    def ranges(status: str) -> str:
        return (
            "coalesce(range_agg(tstzrange(period_start, period_end))"
            f" FILTER (WHERE status = '{status}'), '{{}}')"
        )

    return (
        "pieces AS (SELECT region, resource_type, resource_id, project_id, span,"  # noqa: S608  constants of this module
        " tstzmultirange(span) AS held,"
        " coalesce(verified - mismatch, '{}') AS verified,"
        " coalesce(repaired - mismatch, '{}') AS repaired,"
        " coalesce(excused - mismatch, '{}') AS excused"
        " FROM (SELECT region, resource_type, resource_id, project_id,"
        f" {span} AS span FROM usage_interval{cut} WHERE starts_at < $2"
        f"  AND (ends_at IS NULL OR ends_at > $1){also}) AS clipped"
        " LEFT JOIN (SELECT region, resource_type, resource_id,"
        f" {ranges('verified')} AS verified, {ranges('repaired')} AS repaired,"
        f" {ranges('excused')} AS excused, {ranges('mismatch')} AS mismatch"
        "  FROM audit_verdict WHERE period_start < $2 AND period_end > $1"
        "  GROUP BY region, resource_type, resource_id) AS audited"
        " USING (region, resource_type, resource_id))"
    )


def _length(ranges: str) -> str:
    """The exact microseconds in some ranges."""
    return (
        "(SELECT coalesce(sum(1000000 * (extract(epoch FROM upper(piece))"  # noqa: S608  constants of this module
        f" - extract(epoch FROM lower(piece)))), 0) FROM unnest({ranges}) AS piece)"
    )
