"""The sums of whole days in PostgreSQL, changed with the facts and carried on as days end.

A fold holds the days still while it runs (a shared advisory lock), the turn of a day holds the
folds still (the same lock, exclusively): so every fact is in the sums of all ended days, once.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, datetime, timedelta

from hostler_common import db
from hostler_usage.history.rollup import Cell, HeldFact, MovedFact, midnight, sums
from hostler_usage.reading.mapping import Mapping
from hostler_usage.reading.times import PLAUSIBLE_FROM

LOCK = "hashtext('hostler_usage.rollup')"
_DAY = timedelta(days=1)
_ROWS_AT_ONCE = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class RollupStore:
    """Keeping `usage_day` true."""

    pool: db.Pool
    mapping: Mapping

    async def advance(self, now: datetime) -> int:
        """Every UTC day that ended before `now` is summed up; return how many were.

        Raises:
            DatabaseUnavailable: some are; the rest is done in a later turn.
        """
        done = 0
        while await self._advance_one(now.date()):
            done += 1
        return done

    async def _advance_one(self, today: date) -> bool:
        async with db.transaction(self.pool) as connection:
            await connection.execute(f"SELECT pg_advisory_xact_lock({LOCK})")
            until = await days_until(connection)
            if until is None:
                # before the first turn there are no sums; whatever comes later is added by the folds
                await self._add(connection, None, today)
                await connection.execute("INSERT INTO rollup_state (until) VALUES ($1)", today)
                return False
            if until >= today:
                return False
            await self._add(connection, until, until + _DAY)
            await connection.execute("UPDATE rollup_state SET until = $1", until + _DAY)
        return True

    async def _add(self, connection: db.Connection, first: date | None, until: date) -> None:
        """Add what all facts amount to from `first` (or ever) until `until`."""
        found: Counter[Cell] = Counter()
        by_type = self.mapping.measures_by_type
        start, end = midnight(first or PLAUSIBLE_FROM.date()), midnight(until)
        held = await connection.cursor(
            "SELECT region, resource_type, project_id, greatest(starts_at, $1), ends_at, attributes"
            " FROM usage_interval WHERE starts_at < $2 AND (ends_at IS NULL OR ends_at > $1)",
            start,
            end,
        )
        while rows := await held.fetch(_ROWS_AT_ONCE):
            found.update(sums((HeldFact(*row) for row in rows), by_type, until))
        moved = await connection.cursor(
            "SELECT region, resource_type, project_id, counter, at, amount::bigint"
            " FROM usage_amount WHERE at >= $1 AND at < $2",
            start,
            end,
        )
        while rows := await moved.fetch(_ROWS_AT_ONCE):
            found.update(sums((MovedFact(*row) for row in rows), by_type, until))
        await add(connection, found)


async def hold(connection: db.Connection) -> date | None:
    """No day is summed up until the transaction ends; return the day before which all are."""
    await connection.execute(f"SELECT pg_advisory_xact_lock_shared({LOCK})")
    return await days_until(connection)


async def days_until(connection: db.Connection) -> date | None:
    """The day before which every day is summed up; None before the first turn."""
    until: date | None = await connection.fetchval("SELECT until FROM rollup_state")
    return until


async def add(connection: db.Connection, changes: Counter[Cell]) -> None:
    """The sums are changed by so much."""
    cells: Iterable[Cell] = sorted(cell for cell, amount in changes.items() if amount)
    columns = list(zip(*((*cell, changes[cell]) for cell in cells), strict=True))
    if columns:
        await connection.execute(
            "INSERT INTO usage_day AS d (day, region, project_id, resource_type, measure, amount)"
            " SELECT * FROM unnest($1::date[], $2::text[], $3::text[], $4::text[], $5::text[],"
            " $6::numeric[])"
            " ON CONFLICT (day, region, project_id, resource_type, measure)"
            " DO UPDATE SET amount = d.amount + excluded.amount",
            *columns,
        )
