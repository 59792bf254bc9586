"""Reading whole tables of the ledger, a batch at a time, all of it as of one moment.

An export is one transaction: every batch sees the same snapshot, however long the reading takes and
whatever is folded meanwhile, and a batch is all that is in memory. All usage rows that exports and
reports rest on are read by one function, `Snapshot.usage`.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final, cast

from hostler_common import db
from hostler_usage.exporting.export import CitedMessage, IntervalLine, UsageLine, unit
from hostler_usage.history.measures import Window, hours
from hostler_usage.history.report_store import ReportStore, UsageFilter, UsageRow
from hostler_usage.reading.mapping import Measure

GROUPS_A_PAGE: Final = 5000
ROWS_A_BATCH: Final = 1000

_INTERVALS: Final = (
    "SELECT region, resource_type, resource_id, project_id, user_id, state_class, starts_at,"
    " ends_at, attributes, opened_by, closed_by, provenance FROM usage_interval"
    " WHERE starts_at < $2 AND (ends_at IS NULL OR ends_at > $1)"
    " AND ($3::text[] IS NULL OR project_id = ANY($3))"
    " AND ($4::text IS NULL OR region = $4)"
    " AND ($5::text IS NULL OR resource_type = $5)"
    " AND ($6::text IS NULL OR resource_id = $6)"
    " ORDER BY resource_id, resource_type, region, starts_at"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportStore:
    """Opens snapshots of the ledger."""

    reports: ReportStore

    @property
    def measures(self) -> Sequence[Measure]:
        """The measures there are."""
        return self.reports.mapping.measures

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator["Snapshot"]:
        """The ledger as of now, for as long as this is open; it holds a connection of the pool.

        A reader that asks for nothing for a minute loses it (`idle_in_transaction_session_timeout`).

        Raises:
            DatabaseUnavailable: the database is away, or went away meanwhile.
        """
        async with (
            db.connection(self.reports.pool) as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            pinned = cast("db.Pool", _Pinned(connection))
            yield Snapshot(connection=connection, reports=replace(self.reports, pool=pinned))


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The ledger as of one moment."""

    connection: db.Connection
    reports: ReportStore

    async def usage(
        self, window: Window, groups: Sequence[str], where: UsageFilter
    ) -> AsyncIterator[list[UsageLine]]:
        """Usage by group and measure, in the groups' order; what is nothing is left out.

        Raises:
            GroupUnknown: there is no such group.
            DatabaseUnavailable: the database is away.
        """
        measures = {item.name: item for item in self.reports.mapping.measures}
        marker = None
        while True:
            rows, marker = await self.reports.usage(
                window, groups, where, limit=GROUPS_A_PAGE, marker=marker
            )
            for first in range(0, len(rows), ROWS_A_BATCH):
                yield [
                    line
                    for row in rows[first : first + ROWS_A_BATCH]
                    for line in _lines(window, row, measures)
                ]
            if marker is None:
                return

    async def intervals(
        self, start: datetime, end: datetime, where: UsageFilter
    ) -> AsyncIterator[list[IntervalLine]]:
        """The intervals that have part in `[start, end)`, each whole, by resource and time.

        Raises:
            DatabaseUnavailable: the database is away.
        """
        rows = self.connection.cursor(
            _INTERVALS,
            start,
            end,
            _projects(where),
            where.region,
            where.resource_type,
            where.resource_id,
            prefetch=ROWS_A_BATCH,
        )
        batch = []
        async for row in rows:
            batch.append(
                IntervalLine(
                    region=row["region"],
                    resource_type=row["resource_type"],
                    resource_id=row["resource_id"],
                    project_id=row["project_id"],
                    user_id=row["user_id"],
                    state_class=row["state_class"],
                    start=row["starts_at"],
                    end=row["ends_at"],
                    attributes=row["attributes"],
                    opened_by=[CitedMessage(**item) for item in row["opened_by"]],
                    closed_by=[CitedMessage(**item) for item in row["closed_by"]],
                    provenance=row["provenance"],
                )
            )
            if len(batch) == ROWS_A_BATCH:
                yield batch
                batch = []
        yield batch


def _lines(window: Window, row: UsageRow, measures: dict[str, Measure]) -> list[UsageLine]:
    return [
        UsageLine(
            start=window.start,
            end=window.end,
            group=row.group,
            resources=row.resources,
            measure=name,
            unit=unit(
                measures[name].resource_type, measures[name].attribute or measures[name].counter
            ),
            is_held=measures[name].is_held,
            amount=amount,
            hours=hours(amount) if measures[name].is_held else None,
        )
        for name, amount in row.amounts.items()
        if amount
    ]


def _projects(where: UsageFilter) -> list[str] | None:
    """The projects a statement may look at: those asked for among those allowed."""
    if where.project_id is None:
        return None if where.scope is None else sorted(where.scope)
    is_allowed = where.scope is None or where.project_id in where.scope
    return [where.project_id] if is_allowed else []


class _Pinned:
    """A pool of the one connection that the snapshot is on, for a store that asks a pool."""

    def __init__(self, connection: db.Connection) -> None:
        self._connection = connection

    def acquire(self, *, timeout: float) -> AbstractAsyncContextManager[db.Connection]:
        del timeout
        return self._opened()

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[db.Connection]:
        yield self._connection
