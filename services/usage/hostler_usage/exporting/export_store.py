"""Reading whole tables of the ledger, a batch at a time, all of it as of one moment.

An export is one transaction: every batch sees the same snapshot, however long the reading takes and
whatever is folded meanwhile. A cursor on the server reads the facts once, however many groups there
are, and a batch is all that is in memory here.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final, cast

from hostler_common import db
from hostler_usage.exporting.export import CitedMessage, IntervalLine, UsageLine, unit
from hostler_usage.history.measures import Window, hours
from hostler_usage.history.paging import visible_projects
from hostler_usage.history.report_store import ROWS_A_BATCH, ReportStore, UsageFilter
from hostler_usage.periods.period_store import all_written
from hostler_usage.reading.mapping import Measure

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
    async def snapshot(self, *, has_corrections: bool = False) -> AsyncIterator["Snapshot"]:
        """The ledger as of now, for as long as this is open; it holds a connection of the pool.

        A reader that asks for nothing for a minute loses it (`idle_in_transaction_session_timeout`).
        Where it `has_corrections`, it has all that were written before: who is just writing is waited for.

        Raises:
            DatabaseUnavailable: the database is away, or went away meanwhile, or is busy writing corrections.
        """
        if has_corrections:
            await all_written(self.reports.pool)
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
    ) -> AsyncGenerator[list[UsageLine]]:
        """Usage by group and measure, in the groups' order; what is nothing is left out.

        Raises:
            GroupUnknown: there is no such group.
            DatabaseUnavailable: the database is away.
        """
        measures = {item.name: item for item in self.reports.mapping.measures}
        async with aclosing(self.reports.all_usage(window, groups, where)) as batches:
            async for rows in batches:
                yield [
                    line
                    for row in rows
                    for line in _lines(
                        window.start, window.end, row.group, row.amounts, row.resources, measures
                    )
                ]

    async def usage_by_slice(
        self,
        edges: Sequence[datetime],
        groups: Sequence[str],
        where: UsageFilter,
        *,
        as_of: datetime,
        leading: int = 0,
    ) -> AsyncGenerator[list[UsageLine]]:
        """Usage in each slice of a window, by group and measure; as `ReportStore.usage_by_slice`.

        Raises:
            GroupUnknown: there is no such group.
            DatabaseUnavailable: the database is away.
        """
        measures = {item.name: item for item in self.reports.mapping.measures}
        async with aclosing(
            self.reports.usage_by_slice(edges, groups, where, as_of=as_of, leading=leading)
        ) as batches:
            async for rows in batches:
                yield [
                    line
                    for row in rows
                    for line in _lines(
                        edges[row.slice],
                        edges[row.slice + 1],
                        row.group,
                        row.amounts,
                        None,
                        measures,
                    )
                ]

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


def _lines(
    start: datetime,
    end: datetime,
    group: Mapping[str, str | None],
    amounts: Mapping[str, int],
    resources: int | None,
    measures: Mapping[str, Measure],
) -> Iterator[UsageLine]:
    for name, amount in amounts.items():
        measure = measures[name]
        yield UsageLine(
            start=start,
            end=end,
            group=group,
            resources=resources,
            measure=name,
            unit=unit(measure.resource_type, measure.attribute or measure.counter),
            is_held=measure.is_held,
            amount=amount,
            hours=hours(amount) if measure.is_held else None,
        )


def _projects(where: UsageFilter) -> list[str] | None:
    """The projects a statement may look at: those asked for among those allowed."""
    if where.project_id is None:
        return visible_projects(where.scope)
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
