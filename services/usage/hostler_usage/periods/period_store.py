"""Periods in PostgreSQL: made, closed, and kept true by adjustments.

A fold holds the closing still while it runs (a shared advisory lock) and notes with its own commit
what it changed about closed periods; a closing holds the folds still (the same lock, exclusively).
So every fact is in the lines of a closed period or in a note, once. Notes become adjustments later,
those of one resource together; a second lock keeps that apart from closings and other replicas.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

import asyncpg

from hostler_common import db, errors
from hostler_usage.history import usage_sql
from hostler_usage.history.calendar_span import zone
from hostler_usage.history.measures import Window
from hostler_usage.history.paging import (
    Conditions,
    Scope,
    marked_integer,
    marked_parts,
    marker_after,
    visible_projects,
)
from hostler_usage.history.rollup import midnight
from hostler_usage.history.row_set import Change, Row
from hostler_usage.periods import period
from hostler_usage.periods.period import (
    Adjustment,
    Blocker,
    Facts,
    HeldRow,
    LineKey,
    Manifest,
    MovedRow,
    Noted,
    Obstacle,
    Period,
    Terms,
    Unsettled,
)
from hostler_usage.reading.mapping import Mapping as Metered

_FOLDS: Final = "hashtext('hostler_usage.period')"
_WRITERS: Final = "hashtext('hostler_usage.period.writer')"
_PERIOD: Final = "name, starts_at, ends_at, time_zone, made_at, closed_at"
_LINE: Final = "region, project_id, resource_type, state_class, kind, measure"
_FOLD_PATIENCE: Final = timedelta(seconds=60)
_CLOSING_SECONDS: Final = 600.0
_LINES_A_PAGE: Final = 5000


class PeriodNotFound(errors.NotFound):
    """There is no such period."""

    code = "usage.period.not_found"


class PeriodBlocked(errors.Conflict):
    """Something keeps the period from being closed."""

    code = "usage.period.blocked"


class PeriodClosed(errors.Conflict):
    """It is closed already."""

    code = "usage.period.closed"


class PeriodNotClosed(errors.Conflict):
    """It has no lines before it is closed."""

    code = "usage.period.not_closed"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPeriod:
    """A period as it is kept. What is frozen is None until it is closed."""

    period: Period
    closed_by: str | None
    overruled: Sequence[str]
    terms: Terms | None
    manifest: Manifest | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PeriodStore:
    """All reading and writing of periods, but for what folds note (`hold`, `note`).

    `kinds` names of resource types the attribute that tells the lines of a period apart.
    """

    pool: db.Pool
    mapping: Metered
    time_zone: str
    settle: timedelta
    kinds: Mapping[str, str]
    fold_patience: timedelta = _FOLD_PATIENCE

    async def make(self, now: datetime) -> list[str]:
        """Every month from the first fact to `now` is a period; return the names of those that were made.

        Raises:
            DatabaseUnavailable: nothing was changed.
        """
        async with db.transaction(self.pool) as connection:
            await connection.execute(f"SELECT pg_advisory_xact_lock({_WRITERS})")
            known = [
                _period(row)
                for row in await connection.fetch(f"SELECT {_PERIOD} FROM period")  # noqa: S608  a constant of this module
            ]
            day = await connection.fetchval("SELECT min(day) FROM usage_day")
            first = min([now, *(item.start for item in known)] + ([midnight(day)] if day else []))
            made = period.missing(known, first, now, zone(self.time_zone), self.time_zone)
            await connection.executemany(
                "INSERT INTO period (name, starts_at, ends_at, time_zone, made_at)"
                " VALUES ($1, $2, $3, $4, $5)",
                [(item.name, item.start, item.end, item.time_zone, item.made_at) for item in made],
            )
        return [item.name for item in made]

    async def close_due(self, now: datetime) -> tuple[list[str], Mapping[str, list[Blocker]]]:
        """Periods that have settled are closed: their names, and what keeps the others that are over.

        Raises:
            DatabaseUnavailable: some are; the rest is done in a later turn.
        """
        async with db.connection(self.pool) as connection:
            rows = await connection.fetch(
                f"SELECT {_PERIOD} FROM period WHERE closed_at IS NULL AND ends_at <= $1"  # noqa: S608  a constant of this module
                " ORDER BY starts_at",
                now,
            )
        closed = []
        kept: dict[str, list[Blocker]] = {}
        for item in map(_period, rows):
            if now < item.settles_at(self.settle):
                continue
            try:
                async with db.transaction(self.pool) as connection:
                    await self.close(connection, item.name, now, by=None)
            except PeriodBlocked:
                kept[item.name] = await self.blockers(item, now)
            except PeriodClosed:
                pass  # by another replica
            else:
                closed.append(item.name)
        return closed, kept

    async def close(
        self,
        connection: db.Connection,
        name: str,
        now: datetime,
        *,
        by: str | None,
        overrule: bool = False,
    ) -> StoredPeriod:
        """The period is closed, its lines frozen, when the caller's transaction commits.

        Whoever asks for it (`by`) does not wait for what is late; whoever overrules, for nothing but
        the period's end. No fold runs meanwhile.

        Raises:
            PeriodNotFound: there is none of that name.
            PeriodClosed: it is closed already.
            PeriodBlocked: something keeps it from being closed.
            DatabaseUnavailable: nothing was changed.
        """
        await connection.execute(f"SELECT pg_advisory_xact_lock({_WRITERS})")
        await connection.execute(f"SELECT pg_advisory_xact_lock({_FOLDS})")
        found = (await _stored(connection, name)).period
        if found.closed_at is not None:
            raise PeriodClosed(f"period {name} was closed at {found.closed_at.isoformat()}")
        settle = self.settle if by is None else timedelta(0)
        blockers = await self._blockers(connection, found, now, settle)
        if by is not None:
            blockers = [item for item in blockers if item.obstacle is not Obstacle.SETTLING]
        if any(not overrule or item.obstacle is Obstacle.RUNNING for item in blockers):
            raise PeriodBlocked(
                "; ".join(item.detail for item in blockers),
                blockers=[str(item.obstacle) for item in blockers],
            )
        terms = Terms(measures=self.mapping.measures, kinds=dict(self.kinds))
        amounts = period.ordered(await _amounts(connection, found, terms))
        manifest = period.sealed(found, amounts)
        await _freeze(connection, name, amounts)
        await connection.execute(
            "UPDATE period SET closed_at = $2, closed_by = $3, overruled = $4, terms = $5,"
            " lines = $6, totals = $7, sha256 = $8 WHERE name = $1",
            name,
            now,
            by,
            [item.detail for item in blockers],
            terms.encoded(),
            manifest.lines,
            dict(manifest.totals),
            manifest.sha256,
        )
        return await _stored(connection, name)

    async def blockers(self, item: Period, now: datetime) -> list[Blocker]:
        """What keeps a period from closing by itself at `now`.

        Raises:
            DatabaseUnavailable: the database is away.
        """
        async with db.connection(self.pool) as connection:
            return await self._blockers(connection, item, now, self.settle)

    async def _blockers(
        self, connection: db.Connection, item: Period, now: datetime, settle: timedelta
    ) -> list[Blocker]:
        row = await connection.fetchrow(
            "SELECT (SELECT now() - min(marked_at) FROM touched) AS waiting,"
            " EXISTS (SELECT FROM rebuild WHERE phase <> 'done') AS is_rebuilding,"
            " (SELECT count(*) FROM audit_period WHERE checked_at IS NULL"
            "   AND period_start < $2 AND period_end > $1) AS audit_periods,"
            " (SELECT count(*) FROM audit_recheck WHERE since < $2) AS audited_resources",
            item.start,
            item.end,
        )
        assert row is not None
        waiting = row["waiting"]
        is_behind = waiting is not None and waiting >= self.fold_patience
        return period.blockers(
            item,
            Unsettled(
                fold_behind=waiting if is_behind else None,
                is_rebuilding=row["is_rebuilding"],
                audit_periods=row["audit_periods"],
                audited_resources=row["audited_resources"],
            ),
            now,
            settle,
        )

    async def adjust(self, limit: int = 1000) -> tuple[int, int]:
        """Up to `limit` noted changes are written as adjustments; return how many were, and became.

        They are charged to the period that is open. What cancels out leaves no row.

        Raises:
            DatabaseUnavailable: nothing was changed.
        """
        async with db.transaction(self.pool) as connection:
            await connection.execute(f"SELECT pg_advisory_xact_lock({_WRITERS})")
            charged_to = await connection.fetchval(
                "SELECT name FROM period WHERE closed_at IS NULL ORDER BY starts_at DESC LIMIT 1"
            )
            if charged_to is None:
                return 0, 0  # none is made yet: in a later turn
            rows = await connection.fetch(
                "DELETE FROM period_change WHERE id IN"
                " (SELECT id FROM period_change ORDER BY id LIMIT $1) RETURNING *",
                limit,
            )
            found = period.adjustments(_noted(row) for row in rows)
            await _write(connection, charged_to, found)
        return len(rows), len(found)

    # --- reading

    async def periods(
        self, *, limit: int, marker: str | None = None
    ) -> tuple[list[StoredPeriod], str | None]:
        """A page of periods, the newest first, and the marker of the next page.

        Raises:
            BadMarker: the marker is not of this list.
            DatabaseUnavailable: the database is away.
        """
        conditions = Conditions()
        if marker is not None:
            conditions.add("name < {}", *marked_parts(marker, 1))
        async with db.connection(self.pool) as connection:
            rows = await connection.fetch(
                f"SELECT * FROM period {conditions.clause} ORDER BY name DESC LIMIT {int(limit)}",  # noqa: S608  constants of this module
                *conditions.values,
            )
        found = [_stored_period(row) for row in rows]
        return found, marker_after([found[-1].period.name]) if len(found) == limit else None

    async def period(self, name: str) -> StoredPeriod:
        """One period.

        Raises:
            PeriodNotFound: there is none of that name.
            DatabaseUnavailable: the database is away.
        """
        async with db.connection(self.pool) as connection:
            return await _stored(connection, name)

    async def unwritten(self, name: str, *, scope: Scope) -> int:
        """How many noted changes of a period are not written as adjustments yet.

        Raises:
            DatabaseUnavailable: the database is away.
        """
        async with db.connection(self.pool) as connection:
            return int(
                await connection.fetchval(
                    "SELECT count(*) FROM period_change WHERE period = $1"
                    " AND ($2::text[] IS NULL OR EXISTS (SELECT FROM jsonb_array_elements(changes)"
                    "  AS change WHERE change->>0 = ANY($2)))",
                    name,
                    visible_projects(scope),
                )
            )

    async def lines(
        self, item: Period, *, scope: Scope, after: int = -1
    ) -> tuple[list[tuple[LineKey, int]], int | None]:
        """Some lines of a closed period in their canonical order, and what the next ones come after.

        Raises:
            DatabaseUnavailable: the database is away.
        """
        async with db.connection(self.pool) as connection:
            rows = await connection.fetch(
                f"SELECT {_LINE}, amount, ordinal FROM period_line WHERE period = $1"  # noqa: S608  a constant of this module
                " AND ordinal > $2 AND ($3::text[] IS NULL OR project_id = ANY($3))"
                f" ORDER BY ordinal LIMIT {_LINES_A_PAGE}",
                item.name,
                after,
                visible_projects(scope),
            )
        found = [(LineKey(*row[:6]), int(row["amount"])) for row in rows]
        return found, rows[-1]["ordinal"] if len(rows) == _LINES_A_PAGE else None

    async def adjustments(
        self,
        name: str,
        *,
        charged: bool,
        scope: Scope,
        limit: int,
        marker: str | None = None,
    ) -> tuple[list[asyncpg.Record], str | None]:
        """A page of the adjustments of a period, or (`charged`) of those charged to it; oldest first.

        Raises:
            BadMarker: the marker is not of this list.
            DatabaseUnavailable: the database is away.
        """
        conditions = Conditions()
        conditions.add("charged_to = {}" if charged else "period = {}", name)
        conditions.add("project_id = ANY({})", visible_projects(scope))
        if marker is not None:
            (last,) = marked_parts(marker, 1)
            conditions.add("id > {}", marked_integer(last))
        async with db.connection(self.pool) as connection:
            rows = await connection.fetch(
                f"SELECT * FROM period_adjustment {conditions.clause}"  # noqa: S608  constants of this module
                f" ORDER BY id LIMIT {int(limit)}",
                *conditions.values,
            )
        return rows, marker_after([str(rows[-1]["id"])]) if len(rows) == limit else None


async def all_written(pool: db.Pool) -> None:
    """Every adjustment whose time of writing is past can be read: whoever was just writing is done.

    Raises:
        DatabaseBusy: somebody writes, or closes a period, for long; try again.
        DatabaseUnavailable: the database is away.
    """
    async with db.transaction(pool) as connection:
        await connection.execute(f"SELECT pg_advisory_xact_lock_shared({_WRITERS})")


# --- what folds note


async def hold(connection: db.Connection) -> list[Period]:
    """No period is closed until the transaction ends; return those that are."""
    await connection.execute(f"SELECT pg_advisory_xact_lock_shared({_FOLDS})")
    rows = await connection.fetch(
        f"SELECT {_PERIOD} FROM period WHERE closed_at IS NOT NULL ORDER BY starts_at"  # noqa: S608  a constant of this module
    )
    return [_period(row) for row in rows]


async def note(
    connection: db.Connection,
    closed: Sequence[Period],
    intervals: Sequence[Row],
    amounts: Sequence[Row],
    held: Change,
    moved: Change,
) -> None:
    """What a fold changed about closed periods is noted, in its transaction.

    `closed` is what `hold` gave in it, `intervals` and `amounts` are all rows that the fold wanted,
    `held` and `moved` what that changed. Costs nothing where all that changed is younger.
    """
    if not closed:
        return
    until = closed[-1].end
    changed = sorted(
        {row[:3] for row in (*held.removed, *held.added) if _is_before(row[3], until)}
        | {row[:3] for row in (*moved.removed, *moved.added) if _is_before(row[5], until)}
    )
    if not changed:
        return
    rows_of = _by_resource(changed, intervals, amounts)
    gone_of = _by_resource(changed, held.removed, moved.removed)
    came_of = _by_resource(changed, held.added, moved.added)
    terms: dict[str, Terms] = {}
    noted: list[tuple[object, ...]] = []
    for key in changed:
        region, resource_type = str(key[0]), str(key[1])
        added = {_identity(row) for rows in came_of[key] for row in rows}
        stayed = _facts([[r for r in rows if _identity(r) not in added] for rows in rows_of[key]])
        gone, came = _facts(gone_of[key]), _facts(came_of[key])
        before = Facts(held=(*stayed.held, *gone.held), moved=(*stayed.moved, *gone.moved))
        after = Facts(held=(*stayed.held, *came.held), moved=(*stayed.moved, *came.moved))
        if not period.is_touched(before, after, until):
            continue
        if not terms:
            terms = await _terms(connection)
        evidence = period.news(gone, came)
        for item in closed:
            changes = period.difference(
                region, resource_type, before, after, terms[item.name], item.start, item.end
            )
            if changes:
                noted.append((item.name, *key, _encoded(changes), evidence))
    if noted:
        await connection.executemany(
            "INSERT INTO period_change (period, region, resource_type, resource_id, changes,"
            " evidence) VALUES ($1, $2, $3, $4, $5, $6)",
            noted,
        )


def _is_before(moment: object, until: datetime) -> bool:
    return isinstance(moment, datetime) and moment < until


_Rows = tuple[list[Row], list[Row]]


def _by_resource(
    keys: Iterable[Row], intervals: Iterable[Row], amounts: Iterable[Row]
) -> dict[Row, _Rows]:
    """The rows of some resources, one of each key: those that the table has."""
    found: dict[Row, tuple[dict[Row, Row], dict[Row, Row]]] = {key: ({}, {}) for key in keys}
    for number, rows in enumerate((intervals, amounts)):
        for row in rows:
            if row[:3] in found:
                found[row[:3]][number][_identity(row)] = row
    return {
        key: (list(held.values()), list(moved.values())) for key, (held, moved) in found.items()
    }


def _identity(row: Row) -> Row:
    """The key of a row of intervals, or of amounts."""
    return row[:4] if isinstance(row[3], datetime) else row[:6]


def _facts(rows: Sequence[Sequence[Sequence[Any]]]) -> Facts:
    intervals, amounts = rows
    return Facts(
        held=[
            HeldRow(start, end, project, state_class, attributes, [*opened_by, *closed_by])
            for _, _, _, start, end, project, _, state_class, attributes, opened_by, closed_by, _ in (
                intervals
            )
        ],
        moved=[
            MovedRow(counter, label, at, int(amount), project, evidence)
            for _, _, _, counter, label, at, amount, project, evidence in amounts
        ],
    )


async def _terms(connection: db.Connection) -> dict[str, Terms]:
    rows = await connection.fetch("SELECT name, terms FROM period WHERE closed_at IS NOT NULL")
    return {row["name"]: period.decoded(row["terms"]) for row in rows}


def _encoded(changes: Mapping[LineKey, int]) -> list[list[str]]:
    return [
        [line.project_id, line.state_class, line.kind, line.measure, str(amount)]
        for line, amount in changes.items()
    ]


def _noted(row: asyncpg.Record) -> Noted:
    region, resource_type = row["region"], row["resource_type"]
    return Noted(
        period=row["period"],
        region=region,
        resource_type=resource_type,
        resource_id=row["resource_id"],
        changes=[
            (LineKey(region, project_id, resource_type, state_class, kind, measure), int(amount))
            for project_id, state_class, kind, measure, amount in row["changes"]
        ],
        evidence=row["evidence"],
        noticed_at=row["noticed_at"],
    )


async def _write(connection: db.Connection, charged_to: str, found: Sequence[Adjustment]) -> None:
    await connection.executemany(
        f"INSERT INTO period_adjustment (period, charged_to, {_LINE}, delta, resource_id, messages,"  # noqa: S608  a constant of this module
        " evidence, noticed_at, written_at) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11,"
        # not when the transaction began: it may have waited long for its turn to write
        " $12, $13, clock_timestamp())",
        [
            (
                item.period,
                charged_to,
                *item.line,
                item.delta,
                item.resource_id,
                item.messages,
                list(item.evidence),
                item.noticed_at,
            )
            for item in found
        ],
    )


# --- closing


async def _amounts(connection: db.Connection, item: Period, terms: Terms) -> dict[LineKey, int]:
    """What the ledger says of a period, line by line: by the same SQL as usage."""
    window = Window(start=item.start, end=item.end, as_of=item.end)
    totals = ", ".join(
        f"{usage_sql.total(measure)} AS m{n}" for n, measure in enumerate(terms.measures)
    )
    rows = await connection.fetch(
        "SELECT region, coalesce(project_id, '') AS project_id, resource_type,"  # noqa: S608  constants, names of the mapping
        " coalesce(state_class, '') AS state_class,"
        f" coalesce(attributes->>($3::jsonb->>resource_type), '') AS kind, {totals}"
        f" FROM ({usage_sql.facts('', None, '')}) AS facts GROUP BY 1, 2, 3, 4, 5",
        window.start,
        window.upper,
        dict(terms.kinds),
        timeout=_CLOSING_SECONDS,
    )
    found: dict[LineKey, int] = defaultdict(int)
    for row in rows:
        for n, measure in enumerate(terms.measures):
            if row[f"m{n}"]:
                found[LineKey._make((*row[:5], measure.name))] += int(row[f"m{n}"])
    return found


async def _freeze(
    connection: db.Connection, name: str, amounts: Sequence[tuple[LineKey, int]]
) -> None:
    await connection.copy_records_to_table(
        "period_line",
        records=[(name, n, *line, amount) for n, (line, amount) in enumerate(amounts)],
        columns=("period", "ordinal", *LineKey._fields, "amount"),
    )


async def _stored(connection: db.Connection, name: str) -> StoredPeriod:
    row = await connection.fetchrow("SELECT * FROM period WHERE name = $1", name)
    if row is None:
        raise PeriodNotFound(f"there is no period {name}")
    return _stored_period(row)


def _stored_period(row: asyncpg.Record) -> StoredPeriod:
    is_closed = row["closed_at"] is not None
    return StoredPeriod(
        period=_period(row),
        closed_by=row["closed_by"],
        overruled=row["overruled"] or (),
        terms=period.decoded(row["terms"]) if is_closed else None,
        manifest=Manifest(sha256=row["sha256"], lines=row["lines"], totals=row["totals"])
        if is_closed
        else None,
    )


def _period(row: asyncpg.Record) -> Period:
    return Period(
        name=row["name"],
        start=row["starts_at"],
        end=row["ends_at"],
        time_zone=row["time_zone"],
        made_at=row["made_at"],
        closed_at=row["closed_at"],
    )
