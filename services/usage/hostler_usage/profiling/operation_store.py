"""Operations in PostgreSQL: written beside a resource's history, read as a list or as profiles."""

from collections.abc import Iterator, Mapping, Sequence
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
from hostler_usage.history.row_set import RowSet
from hostler_usage.profiling.operations import Operation
from hostler_usage.reading.citation import cited
from hostler_usage.reading.statement import ResourceKey
from hostler_usage.reading.times import epoch_microseconds

_ROWS: Final = RowSet(
    table="operation",
    columns=(
        ("region", "text"),
        ("resource_type", "text"),
        ("resource_id", "text"),
        ("begun_at", "timestamptz"),
        ("ordinal", "integer"),
        ("action", "text"),
        ("request_id", "text"),
        ("started_at", "timestamptz"),
        ("ended_at", "timestamptz"),
        ("outcome", "text"),
        ("duration_us", "bigint"),
        ("host", "text"),
        ("flavor", "text"),
        ("project_id", "text"),
        ("reason", "text"),
        ("evidence", "jsonb"),
    ),
    key_length=5,
)


class Profile(StrEnum):
    """What operations can be profiled by."""

    ACTION = "action"
    HOST = "host"
    FLAVOR = "flavor"
    RESOURCE_TYPE = "resource_type"
    REGION = "region"
    PROJECT = "project"


_COLUMN: Final = {item: str(item) for item in Profile} | {Profile.PROJECT: "project_id"}


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationFilter:
    """Which operations are asked for; None does not restrict. Times are those of their beginnings.

    `unfinished_since` asks for what started before it and has not ended.
    """

    scope: Scope = None
    start: datetime | None = None
    end: datetime | None = None
    project_id: str | None = None
    region: str | None = None
    resource_type: str | None = None
    resource_id: str | None = None
    action: str | None = None
    outcome: str | None = None
    host: str | None = None
    flavor: str | None = None
    request_id: str | None = None
    unfinished_since: datetime | None = None


async def replace_operations(
    connection: db.Connection, operations_by_key: Mapping[ResourceKey, Sequence[Operation]]
) -> None:
    """The operations of these resources are these; rows that are right already are not touched.

    Runs in the caller's transaction, which holds the resources against other folds.
    """
    await _ROWS.replace(
        connection,
        list(operations_by_key),
        (row for key, operations in operations_by_key.items() for row in _rows(key, operations)),
    )


def _rows(key: ResourceKey, operations: Sequence[Operation]) -> Iterator[tuple[object, ...]]:
    ordinal, before = 0, None
    for item in operations:  # in order of their beginnings
        ordinal = ordinal + 1 if item.begun_at == before else 0
        before = item.begun_at
        yield (
            key.region,
            str(key.resource_type),
            key.resource_id,
            item.begun_at,
            ordinal,
            item.action,
            item.request_id,
            item.started_at,
            item.ended_at,
            str(item.outcome),
            item.duration_us,
            item.host,
            item.flavor,
            item.project_id,
            item.reason,
            [cited(evidence) for evidence in item.evidence],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationStore:
    """All reading of operations."""

    pool: db.Pool

    async def operations(
        self, where: OperationFilter, *, limit: int, marker: str | None = None
    ) -> tuple[list[asyncpg.Record], str | None]:
        """A page of operations, newest first, and the marker of the next page.

        Raises:
            BadMarker: the marker is not of this list.
            DatabaseUnavailable: the database is away.
        """
        conditions = _conditions(where)
        if marker is not None:
            time, region, resource_type, resource_id, ordinal = marked_parts(marker, 5)
            conditions.add(
                "(begun_at, region, resource_type, resource_id, ordinal) < ({}, {}, {}, {}, {})",
                marked_moment(time),
                region,
                resource_type,
                resource_id,
                marked_integer(ordinal),
            )
        async with db.connection(self.pool) as connection:
            rows = await connection.fetch(
                f"SELECT * FROM operation {conditions.clause} ORDER BY begun_at DESC,"  # noqa: S608  constants of this module
                " region DESC, resource_type DESC, resource_id DESC, ordinal DESC"
                f" LIMIT {int(limit)}",
                *conditions.values,
            )
        if len(rows) < limit:
            return rows, None
        last = rows[-1]
        return rows, marker_after(
            [
                str(epoch_microseconds(last["begun_at"])),
                last["region"],
                last["resource_type"],
                last["resource_id"],
                str(last["ordinal"]),
            ]
        )

    async def profiles(
        self,
        groups: Sequence[Profile],
        where: OperationFilter,
        *,
        limit: int,
        marker: str | None = None,
    ) -> tuple[list[asyncpg.Record], str | None]:
        """A page of profiles in order of their groups: `group_0`..., counts, and durations.

        Durations are those of operations that succeeded, in milliseconds; the failure share is of
        all that came to an end.

        Raises:
            BadMarker: the marker is not of this list.
            DatabaseUnavailable: the database is away.
        """
        dimensions = [f"coalesce({_COLUMN[group]}, '')" for group in groups]
        keys = ", ".join(dimensions)
        conditions = _conditions(where)
        if marker is not None:
            after = marked_parts(marker, len(groups))
            places = ", ".join("{}" for _ in after)
            conditions.add(f"({keys}) > ({places})", *after)
        columns = "".join(f"{name} AS group_{n}, " for n, name in enumerate(dimensions))
        took = "WITHIN GROUP (ORDER BY duration_us) FILTER (WHERE outcome = 'succeeded')"
        statement = (
            f"SELECT {columns}count(*) AS operations,"  # noqa: S608  constants of this module
            " count(*) FILTER (WHERE outcome = 'succeeded') AS succeeded,"
            " count(*) FILTER (WHERE outcome = 'failed') AS failed,"
            " count(*) FILTER (WHERE outcome = 'unfinished') AS unfinished,"
            " count(*) FILTER (WHERE outcome = 'lost_start') AS lost_start,"
            " count(*) FILTER (WHERE outcome = 'failed')::float8"
            "  / nullif(count(*) FILTER (WHERE outcome <> 'unfinished'), 0) AS failure_share,"
            f" percentile_cont(0.5) {took} / 1000 AS p50_ms,"
            f" percentile_cont(0.99) {took} / 1000 AS p99_ms"
            f" FROM operation {conditions.clause}"
            + (f" GROUP BY {keys} ORDER BY {keys} LIMIT {int(limit)}" if groups else "")
        )
        async with db.connection(self.pool) as connection:
            rows = await connection.fetch(statement, *conditions.values)
        if not groups or len(rows) < limit:
            return rows, None
        return rows, marker_after([rows[-1][f"group_{n}"] for n in range(len(groups))])


def _conditions(where: OperationFilter) -> Conditions:
    conditions = Conditions()
    conditions.add("begun_at >= {}", where.start)
    conditions.add("begun_at < {}", where.end)
    conditions.add("project_id = ANY({})", visible_projects(where.scope, where.project_id))
    for name in ("region", "resource_type", "resource_id", "action", "outcome", "host", "flavor"):
        conditions.add(f"{name} = {{}}", getattr(where, name))
    conditions.add("request_id = {}", where.request_id)
    conditions.add("outcome = 'unfinished' AND started_at < {}", where.unfinished_since)
    return conditions
