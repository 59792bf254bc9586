"""Audit verdicts in PostgreSQL: written beside a resource's history, completed by a periodic check.

The fold writes what follows from a resource's own statements (`replace_verdicts`). What follows
from their absence is known only once the others have spoken, and is the check's
(`audit_check_store`). Whatever changes the past queues its resource for the check again, so that
late data needs no run of its own.

Fold and check exclude each other by one advisory lock, which folds share: a statement cannot come
in unseen between the check's look and its mark.
"""

import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any, Final

from hostler_common import db
from hostler_usage.auditing.audits import Reconciliation, Verdict
from hostler_usage.history.row_set import Change, Row, RowSet, key_columns, key_of
from hostler_usage.reading.citation import cited
from hostler_usage.reading.statement import ResourceKey
from hostler_usage.reading.times import EPOCH, MICROSECOND, epoch_microseconds

AUDIT_LOCK: Final = zlib.crc32(b"usage.audits") | (0x686F << 32)
_COLUMNS: Final = (
    ("region", "text"),
    ("resource_type", "text"),
    ("resource_id", "text"),
    ("period_start", "timestamptz"),
    ("origin", "text"),
    ("ordinal", "integer"),
    ("period_end", "timestamptz"),
    ("periods", "integer"),
    ("is_partial", "boolean"),
    ("status", "text"),
    ("code", "text"),
    ("field", "text"),
    ("ours", "jsonb"),
    ("theirs", "jsonb"),
    ("project_id", "text"),
    ("host", "text"),
    ("statements", "integer"),
    ("evidence", "jsonb"),
)
VERDICTS: Final = RowSet(
    table="audit_verdict", columns=_COLUMNS, key_length=6, condition="origin = 'statement'"
)
_RESOURCES: Final = RowSet(
    table="audit_resource",
    columns=(
        ("region", "text"),
        ("resource_type", "text"),
        ("resource_id", "text"),
        ("born_at", "timestamptz"),
        ("ended_at", "timestamptz"),
        ("lived", "jsonb"),
        ("launches", "jsonb"),
        ("confirmed_at", "timestamptz"),
    ),
    key_length=3,
)
_START, _END, _PERIODS, _IS_PARTIAL, _HOST = 3, 6, 7, 8, 15


async def replace_verdicts(
    connection: db.Connection,
    reconciliations: Mapping[ResourceKey, Reconciliation],
    since: Mapping[ResourceKey, datetime] = MappingProxyType({}),
) -> None:
    """The verdicts on these resources' own statements are these; what is right already is not touched.

    Of a resource in `since`, verdicts on earlier periods are not looked at.
    Runs in the fold's transaction, which holds the resources against other folds. Resources whose
    change reaches into periods that were checked already are queued for the check.
    """
    if not reconciliations:
        return
    await connection.execute("SELECT pg_advisory_xact_lock_shared($1)", AUDIT_LOCK)
    keys = list(reconciliations)
    change = await _replace(connection, reconciliations, since)
    lives = await _RESOURCES.replace(
        connection,
        keys,
        (
            _resource_row(key, reconciliations[key])
            for key in keys
            if _is_audited(reconciliations[key])
        ),
    )
    await _note_periods(connection, change)
    await _queue(connection, _changed_since(change, lives))
    await _queue_unsilenced(connection, lives)


async def _replace(
    connection: db.Connection,
    reconciliations: Mapping[ResourceKey, Reconciliation],
    since: Mapping[ResourceKey, datetime],
) -> Change:
    removed: list[Row] = []
    added: list[Row] = []
    for start in {since.get(key) for key in reconciliations}:  # a midnight or two
        keys = [key for key in reconciliations if since.get(key) == start]
        rows = (
            row
            for key in keys
            for row in verdict_rows(key, "statement", reconciliations[key].verdicts)
            if start is None or row[_START] >= start
        )
        verdicts = VERDICTS
        if start is not None:
            condition = f"{VERDICTS.condition} AND period_start >= '{start.isoformat()}'"
            verdicts = replace(VERDICTS, condition=condition)
        change = await verdicts.replace(connection, keys, rows)
        removed += change.removed
        added += change.added
    return Change(removed=removed, added=added)


async def mark_for_check(
    connection: db.Connection, since_by_key: Mapping[ResourceKey, datetime]
) -> None:
    """The silence of these resources is looked at anew, from those moments on."""
    keys = sorted(since_by_key)
    if keys:
        await connection.execute(
            "INSERT INTO audit_recheck AS r (region, resource_type, resource_id, since)"
            " SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::timestamptz[])"
            " ON CONFLICT (resource_id, resource_type, region)"
            " DO UPDATE SET since = least(r.since, excluded.since)",
            *key_columns(keys),
            [since_by_key[key] for key in keys],
        )


def _is_audited(found: Reconciliation) -> bool:
    return bool(found.lived) or found.confirmed_at is not None


def verdict_rows(
    key: ResourceKey, origin: str, verdicts: Iterable[Verdict]
) -> Iterator[tuple[Any, ...]]:
    """The verdicts on a resource as rows of `VERDICTS`; `origin` says who writes them."""
    ordinals: dict[datetime, int] = defaultdict(int)
    for item in verdicts:
        ordinal = ordinals[item.period_start]
        ordinals[item.period_start] += 1
        yield (
            key.region,
            str(key.resource_type),
            key.resource_id,
            item.period_start,
            origin,
            ordinal,
            item.period_end,
            item.periods,
            item.is_partial,
            str(item.status),
            str(item.code),
            item.field,
            item.ours,
            item.theirs,
            item.project_id,
            item.host or "",
            item.statements,
            [cited(evidence) for evidence in item.evidence],
        )


def _resource_row(key: ResourceKey, found: Reconciliation) -> tuple[object, ...]:
    return (
        key.region,
        str(key.resource_type),
        key.resource_id,
        found.lived[0].start if found.lived else None,
        found.lived[-1].end if found.lived else None,
        [
            [
                epoch_microseconds(item.start),
                None if item.end is None else epoch_microseconds(item.end),
                item.project_id,
                item.host,
                item.is_offloaded,
            ]
            for item in found.lived
        ],
        [epoch_microseconds(item) for item in found.launches],
        found.confirmed_at,
    )


async def _note_periods(connection: db.Connection, change: Change) -> None:
    """The periods that statements newly speak of are known, and checked again if they were before."""
    new = sorted(
        {item for span in _differences(change) if span.is_added for item in _hosts_of(span)}
    )
    if not new:
        return
    added = await connection.fetch(
        "INSERT INTO audit_period_host (region, resource_type, host, period_start, period_end)"
        " SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::timestamptz[],"
        "  $5::timestamptz[]) ON CONFLICT DO NOTHING"
        " RETURNING region, resource_type, period_start, period_end",
        *zip(*new, strict=True),
    )
    periods = sorted({tuple(row) for row in added})
    if not periods:
        return
    columns = list(zip(*periods, strict=True))
    unnested = "unnest($1::text[], $2::text[], $3::timestamptz[], $4::timestamptz[])"
    await connection.execute(
        "INSERT INTO audit_period (region, resource_type, period_start, period_end, is_expected,"  # noqa: S608  constants of this module
        f" first_seen) SELECT *, false, now() FROM {unnested} ON CONFLICT DO NOTHING",
        *columns,
    )
    await connection.execute(
        "UPDATE audit_period SET is_expected = false, checked_at = NULL"  # noqa: S608  constants of this module
        " WHERE (is_expected OR checked_at IS NOT NULL)"
        f" AND (region, resource_type, period_start, period_end) IN (SELECT * FROM {unnested})",
        *columns,
    )


_HostPeriod = tuple[str, str, str, datetime, datetime]


def _hosts_of(span: "_Span") -> Iterator[_HostPeriod]:
    """The host periods that a span of statements makes known; a partial one's end is its own."""
    row, length = span.row, span.length
    if row[_IS_PARTIAL] or not length:
        return
    start = span.start
    while start < span.end:
        yield (row[0], row[1], row[_HOST], start, start + length)
        start += length


@dataclass(frozen=True, slots=True, kw_only=True)
class _Span:
    """Periods that statements speak of now and did not before, or the other way round."""

    row: tuple[Any, ...]
    start: datetime
    end: datetime
    length: timedelta
    is_added: bool


def _differences(change: Change) -> Iterator[_Span]:
    """Where the periods spoken of differ; a row that grew differs in what it grew by."""
    removed: dict[tuple[Any, ...], tuple[Any, ...]] = {row[:6]: row for row in change.removed}
    for row in change.added:
        added = _span(row, is_added=True)
        before = removed.get(row[:6])
        if before is None:
            yield added
            continue
        gone = _span(before, is_added=False)
        is_longer = (gone.length, before[_HOST], before[_IS_PARTIAL]) == (
            added.length,
            row[_HOST],
            row[_IS_PARTIAL],
        )
        del removed[row[:6]]
        if not is_longer:
            yield gone
            yield added
        elif gone.end < added.end:
            yield replace(added, start=gone.end)
        elif added.end < gone.end:
            yield replace(gone, start=added.end)
    yield from (_span(row, is_added=False) for row in removed.values())


def _span(row: tuple[Any, ...], *, is_added: bool) -> _Span:
    length = (row[_END] - row[_START]) / row[_PERIODS]
    return _Span(row=row, start=row[_START], end=row[_END], length=length, is_added=is_added)


def _changed_since(change: Change, lives: Change) -> dict[ResourceKey, datetime]:
    """From which moment on something is different for a resource; without what is merely newer."""
    since: dict[ResourceKey, datetime] = {}

    def note(key: ResourceKey, moment: datetime) -> None:
        since[key] = min(moment, since.get(key, moment))

    for span in _differences(change):
        note(key_of(span.row), span.start)
    before = {row[:3]: row for row in lives.removed}
    after = {row[:3]: row for row in lives.added}
    for name in before.keys() | after.keys():
        moment = _first_difference(before.get(name), after.get(name))
        if moment is not None:
            note(key_of(name), moment)
    return since


def _first_difference(
    before: tuple[Any, ...] | None, after: tuple[Any, ...] | None
) -> datetime | None:
    if before is not None and after is not None and before[5:7] == after[5:7]:
        return None  # a later word, about the same life

    def said(row: tuple[Any, ...] | None) -> set[tuple[Any, ...]]:
        if row is None:
            return set()
        spans = {("span", *span[:1], *span[2:]) for span in row[5]}
        end = {("end", row[5][-1][1])} if row[5] and row[5][-1][1] is not None else set()
        return spans | end | {("launch", moment) for moment in row[6]}

    differing = said(before) ^ said(after)
    if not differing:
        return None
    first: int = min(item[1] for item in differing)
    return EPOCH + first * MICROSECOND


async def _queue(connection: db.Connection, since: Mapping[ResourceKey, datetime]) -> None:
    """Those whose change reaches into a period that was checked already are queued."""
    if not since:
        return
    rows = await connection.fetch(
        "SELECT region, resource_type, (SELECT max(period_end) FROM audit_period p"
        "  WHERE p.checked_at IS NOT NULL AND (p.region, p.resource_type)"
        "   = (k.region, k.resource_type)) AS until"
        " FROM unnest($1::text[], $2::text[]) AS k (region, resource_type)",
        *zip(*sorted({(key.region, str(key.resource_type)) for key in since}), strict=True),
    )
    checked = {(row["region"], row["resource_type"]): row["until"] for row in rows}

    def is_past(key: ResourceKey) -> bool:
        until = checked[key.region, str(key.resource_type)]
        return until is not None and since[key] < until

    await mark_for_check(
        connection, {key: moment for key, moment in since.items() if is_past(key)}
    )


async def _queue_unsilenced(connection: db.Connection, lives: Change) -> None:
    """Those that speak again after a silence: it was one, and is over."""
    before = {row[:3]: row[7] for row in lives.removed}
    keys = sorted(key_of(row) for row in lives.added if before.get(row[:3]) != row[7])
    if keys:
        await connection.execute(
            "INSERT INTO audit_recheck AS r (region, resource_type, resource_id, since)"
            " SELECT v.region, v.resource_type, v.resource_id, min(v.period_start)"
            " FROM unnest($1::text[], $2::text[], $3::text[])"
            "  AS k (region, resource_type, resource_id)"
            " JOIN audit_verdict v USING (region, resource_type, resource_id)"
            " WHERE v.origin = 'silence' AND v.status = 'unconfirmed' GROUP BY 1, 2, 3"
            " ON CONFLICT (resource_id, resource_type, region)"
            " DO UPDATE SET since = least(r.since, excluded.since)",
            *key_columns(keys),
        )
