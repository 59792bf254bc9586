"""What the silence about resources means, in PostgreSQL: the periodic check of settled audit periods.

Each audit period is looked at once it has settled: the resources that lack a statement about it are
queued. Each of those has its silence made anew, from all periods since some moment, and what was
said of it before is replaced. Periods in which nobody spoke are expected from those before them, so
that audits which stopped altogether are found out too.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from hostler_common import db
from hostler_usage.auditing import absences
from hostler_usage.auditing.audit_store import AUDIT_LOCK, VERDICTS, verdict_rows
from hostler_usage.auditing.audits import Code, Lived, Status, whole_periods
from hostler_usage.history.row_set import key_of
from hostler_usage.reading.mapping import Audit
from hostler_usage.reading.mapping import Mapping as Rules
from hostler_usage.reading.statement import ResourceKey
from hostler_usage.reading.times import EPOCH, MICROSECOND

_DAY: Final = timedelta(days=1)
# how far back a silence is looked at beyond the moment of the change: the runs that end in it
_BACK: Final = 4 * _DAY


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditCheckStore:
    """The check of periods in which nobody spoke. Any number of processes may run it."""

    pool: db.Pool
    mapping: Rules
    settle: timedelta = absences.SETTLE
    silent_after: int = absences.SILENT_AFTER_PERIODS

    async def expect_periods(self, now: datetime) -> int:
        """The periods that those of the last month lead to expect are known; return how many are new.

        Raises:
            DatabaseUnavailable: nothing was changed.
        """
        made = 0
        async with db.transaction(self.pool) as connection:
            rows = await connection.fetch(
                "SELECT region, resource_type, period_start, period_end FROM audit_period"
                " WHERE period_start >= $1",
                now - 31 * _DAY,
            )
            known: dict[tuple[str, str], list[tuple[datetime, datetime]]] = defaultdict(list)
            for row in rows:
                known[row["region"], row["resource_type"]].append(tuple(row)[2:4])
            for (region, resource_type), periods in sorted(known.items()):
                found = absences.expected_periods(periods, now - self.settle)
                if found:
                    await connection.execute(
                        "INSERT INTO audit_period (region, resource_type, period_start,"
                        " period_end, is_expected, first_seen) SELECT $1, $2, s, e, true, e"
                        " FROM unnest($3::timestamptz[], $4::timestamptz[]) AS p (s, e)"
                        " ON CONFLICT DO NOTHING",
                        region,
                        resource_type,
                        [start for start, _ in found],
                        [end for _, end in found],
                    )
                    made += len(found)
        return made

    async def check_periods(self, now: datetime, limit: int = 50) -> int:
        """Up to `limit` settled periods have those without a statement queued; return how many.

        Raises:
            DatabaseUnavailable: nothing was changed.
        """
        async with db.transaction(self.pool) as connection:
            await connection.execute("SELECT pg_advisory_xact_lock($1)", AUDIT_LOCK)
            rows = await connection.fetch(
                "SELECT region, resource_type, period_start, period_end FROM audit_period"
                " WHERE checked_at IS NULL AND period_end <= $1 AND first_seen <= $1"
                " ORDER BY period_end, region, resource_type, period_start LIMIT $2",
                now - self.settle,
                limit,
            )
            for row in rows:
                await self._check_period(connection, tuple(row), now)
        return len(rows)

    async def _check_period(
        self, connection: db.Connection, period: tuple[object, ...], now: datetime
    ) -> None:
        # what was said of the whole host (or type) is said anew by the resources that are queued
        await connection.execute(
            "DELETE FROM audit_verdict WHERE resource_id = '' AND region = $1"
            " AND resource_type = $2 AND period_start = $3 AND period_end = $4",
            *period,
        )
        covers = (
            "EXISTS (SELECT FROM audit_verdict v WHERE (v.resource_id, v.resource_type, v.region)"
            " = (r.resource_id, r.resource_type, r.region) AND v.origin = 'statement'"
            " AND v.period_start <= $3 AND v.period_end >= $4)"
        )
        # who spoke while the period was to be checked again is not queued by the fold, and was silent before
        silent = (
            "EXISTS (SELECT FROM audit_verdict v WHERE (v.resource_id, v.resource_type, v.region)"
            " = (r.resource_id, r.resource_type, r.region) AND v.origin = 'silence'"
            " AND v.period_start < $4 AND v.period_end > $3)"
        )
        counted = await connection.fetchval(
            "WITH due AS (SELECT region, resource_type, resource_id,"  # noqa: S608  constants of this module
            f" {covers} AS is_covered, {silent} AS is_silent FROM audit_resource r"
            " WHERE region = $1 AND resource_type = $2 AND born_at < $4"
            "  AND (ended_at IS NULL OR ended_at > $3)),"
            " queued AS (INSERT INTO audit_recheck AS q (region, resource_type, resource_id, since)"
            " SELECT region, resource_type, resource_id, $3 FROM due WHERE NOT is_covered OR is_silent"
            " ORDER BY resource_id ON CONFLICT (resource_id, resource_type, region)"
            " DO UPDATE SET since = least(q.since, excluded.since))"
            " SELECT count(*) FILTER (WHERE is_covered) FROM due",
            *period,
        )
        await connection.execute(
            "UPDATE audit_period SET checked_at = $5, statements = $6 WHERE region = $1"
            " AND resource_type = $2 AND period_start = $3 AND period_end = $4",
            *period,
            now,
            counted,
        )

    async def check_resources(self, limit: int = 200) -> int:
        """Up to `limit` queued resources have their silence made anew; return how many.

        Raises:
            DatabaseUnavailable: nothing was changed.
        """
        async with db.transaction(self.pool) as connection:
            await connection.execute("SELECT pg_advisory_xact_lock($1)", AUDIT_LOCK)
            rows = await connection.fetch(
                "DELETE FROM audit_recheck WHERE (region, resource_type, resource_id) IN"
                " (SELECT region, resource_type, resource_id FROM audit_recheck"
                "  ORDER BY resource_id LIMIT $1)"
                " RETURNING region, resource_type, resource_id, since",
                limit,
            )
            since = {key_of(tuple(row)): _midnight(row["since"]) - _BACK for row in rows}
            by_type: dict[tuple[str, str], list[ResourceKey]] = defaultdict(list)
            for key in sorted(since):
                by_type[key.region, str(key.resource_type)].append(key)
            for (region, resource_type), keys in by_type.items():
                await self._check_type(connection, region, resource_type, keys, since)
        return len(rows)

    async def _check_type(
        self,
        connection: db.Connection,
        region: str,
        resource_type: str,
        keys: Sequence[ResourceKey],
        since: Mapping[ResourceKey, datetime],
    ) -> None:
        oldest = min(since[key] for key in keys)
        names = [key.resource_id for key in keys]
        lives = {
            row["resource_id"]: row
            for row in await connection.fetch(
                "SELECT resource_id, lived, launches, confirmed_at FROM audit_resource"
                " WHERE region = $1 AND resource_type = $2 AND resource_id = ANY($3)",
                region,
                resource_type,
                names,
            )
        }
        covered: dict[str, list[tuple[datetime, datetime]]] = defaultdict(list)
        for row in await connection.fetch(
            "SELECT resource_id, period_start, period_end FROM audit_verdict WHERE region = $1"
            " AND resource_type = $2 AND resource_id = ANY($3) AND origin = 'statement'"
            " AND period_end > $4",
            region,
            resource_type,
            names,
            oldest,
        ):
            covered[row["resource_id"]].append((row["period_start"], row["period_end"]))
        lived = {name: _lived(row["lived"]) for name, row in lives.items()}
        hosts = {span.host for spans in lived.values() for span in spans if span.host is not None}
        known = await _known(connection, region, resource_type, oldest, hosts)
        cadence = await _cadence(connection, region, resource_type, {*hosts, ""})
        for key in keys:
            await connection.execute(
                "DELETE FROM audit_verdict WHERE region = $1 AND resource_type = $2"
                " AND resource_id = $3 AND origin = 'silence' AND period_start >= $4",
                region,
                resource_type,
                key.resource_id,
                since[key],
            )
        resource = self.mapping.resources.get(resource_type)
        rule = Audit() if resource is None else resource.audit  # it was metered once
        found: list[tuple[object, ...]] = []
        uncovered: set[tuple[datetime, datetime, str]] = set()
        for key in keys:
            if key.resource_id not in lives:
                continue
            row = lives[key.resource_id]
            verdicts = absences.absences(
                rule,
                lived[key.resource_id],
                [EPOCH + moment * MICROSECOND for moment in row["launches"]],
                covered[key.resource_id],
                (item for item in known if item.start >= since[key]),
                cadence=cadence,
                confirmed_at=row["confirmed_at"],
                settle=self.settle,
                silent_after=self.silent_after,
            )
            own = [item for item in verdicts if item.status is not Status.UNCOVERED]
            found += verdict_rows(key, "silence", own)
            uncovered |= {
                (start, end, item.host or "")
                for item in verdicts
                if item.status is Status.UNCOVERED
                for start, end in whole_periods(item)
            }
        await _note_uncovered(connection, region, resource_type, sorted(uncovered))
        await VERDICTS.insert(connection, found)


def _midnight(moment: datetime) -> datetime:
    return moment.replace(hour=0, minute=0, second=0, microsecond=0)


def _lived(spans: Iterable[Sequence[Any]]) -> tuple[Lived, ...]:
    return tuple(
        Lived(
            start=EPOCH + start * MICROSECOND,
            end=None if end is None else EPOCH + end * MICROSECOND,
            project_id=project_id,
            host=host,
            is_offloaded=is_offloaded,
        )
        for start, end, project_id, host, is_offloaded in spans
    )


async def _known(
    connection: db.Connection,
    region: str,
    resource_type: str,
    since: datetime,
    hosts: Iterable[str],
) -> list[absences.Known]:
    """The checked periods since a moment, and which of `hosts` sent statements about them."""
    rows = await connection.fetch(
        "SELECT p.period_start, p.period_end,"
        " coalesce(array_agg(h.host) FILTER (WHERE h.host IS NOT NULL), '{}') AS hosts"
        " FROM audit_period p LEFT JOIN audit_period_host h"
        "  ON (h.region, h.resource_type, h.period_start, h.period_end)"
        "   = (p.region, p.resource_type, p.period_start, p.period_end)"
        "  AND h.host = ANY($4)"
        " WHERE p.region = $1 AND p.resource_type = $2 AND p.period_start >= $3"
        "  AND p.checked_at IS NOT NULL GROUP BY 1, 2",
        region,
        resource_type,
        since,
        [*hosts, ""],
    )
    return [
        absences.Known(
            start=row["period_start"], end=row["period_end"], hosts=frozenset(row["hosts"])
        )
        for row in rows
    ]


async def _cadence(
    connection: db.Connection, region: str, resource_type: str, hosts: Iterable[str]
) -> dict[str, timedelta]:
    """How long the newest period of each host was, "" being that of what is not audited per host."""
    rows = await connection.fetch(
        "SELECT DISTINCT ON (host) host, period_start, period_end FROM audit_period_host"
        " WHERE region = $1 AND resource_type = $2 AND host = ANY($3)"
        " ORDER BY host, period_start DESC, period_end",
        region,
        resource_type,
        list(hosts),
    )
    return {row["host"]: row["period_end"] - row["period_start"] for row in rows}


async def _note_uncovered(
    connection: db.Connection,
    region: str,
    resource_type: str,
    rows: Sequence[tuple[datetime, datetime, str]],
) -> None:
    """Each host and period is named once, however many resources were there."""
    if rows:
        await connection.execute(
            "INSERT INTO audit_verdict (region, resource_type, resource_id, period_start, origin,"
            " ordinal, period_end, periods, is_partial, status, code, ours, theirs, host,"
            " statements, evidence)"
            " SELECT $1, $2, '', s, 'silence', row_number() OVER (PARTITION BY s ORDER BY e, host)"
            "  + coalesce((SELECT max(ordinal) FROM audit_verdict v WHERE (v.resource_id,"
            "   v.resource_type, v.region, v.period_start) = ('', $2, $1, s)), -1),"
            " e, 1, false, $6, $7, 'null', 'null', host, 0, '[]'"
            " FROM unnest($3::timestamptz[], $4::timestamptz[], $5::text[]) AS new (s, e, host)"
            " WHERE NOT EXISTS (SELECT FROM audit_verdict v WHERE (v.resource_id, v.resource_type,"
            "  v.region, v.period_start, v.period_end, v.host) = ('', $2, $1, s, e, new.host))",
            region,
            resource_type,
            *zip(*rows, strict=True),
            str(Status.UNCOVERED),
            str(Code.NOT_AUDITED),
        )
