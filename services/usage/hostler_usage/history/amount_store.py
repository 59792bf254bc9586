"""What moved, in PostgreSQL: two or three rows a message, so written with as little as they can be said with.

A resource's rows differ in counter, moment and amount only. What they have in common goes to the
server once a series, and each row names its series by a number.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Final

import orjson

from hostler_common import db
from hostler_usage.history.amounts import Amount
from hostler_usage.history.row_set import Change, Row, key_columns
from hostler_usage.reading.citation import cited
from hostler_usage.reading.statement import ResourceKey

_PRESENT = (
    "SELECT k.number, a.counter, a.label, a.at, a.amount, a.project_id, a.evidence"
    " FROM unnest($1::text[], $2::text[], $3::text[], $4::timestamptz[]) WITH ORDINALITY"
    "  AS k (region, resource_type, resource_id, since, number)"
    " JOIN usage_amount AS a USING (region, resource_type, resource_id)"
    " WHERE a.at >= k.since"
)
_DELETE = (
    "DELETE FROM usage_amount WHERE (region, resource_type, resource_id, counter, label, at) IN"
    " (SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[],"
    "  $6::timestamptz[]))"
)
_INSERT = (
    "INSERT INTO usage_amount (region, resource_type, resource_id, counter, label, at, amount,"
    " project_id, evidence)"
    " SELECT s.region, s.resource_type, s.resource_id, s.counter, s.label, row.at,"
    "  row.amount::numeric, s.project_id, row.evidence::jsonb"
    " FROM unnest($1::integer[], $2::timestamptz[], $3::text[], $4::text[])"
    "  AS row (series, at, amount, evidence)"
    " JOIN unnest($5::text[], $6::text[], $7::text[], $8::text[], $9::text[], $10::text[])"
    "  WITH ORDINALITY AS s (region, resource_type, resource_id, counter, label, project_id, number)"
    "  ON s.number = row.series"
)
_KEY: Final = 6
EVER: Final = datetime(1, 1, 2, tzinfo=UTC)  # asyncpg takes the first day of all for an infinity


def amount_rows(
    key: ResourceKey, amounts: Sequence[Amount], since: datetime | None = None
) -> list[Row]:
    """A resource's amounts as rows of the table: those of `since` and later, where it is given."""
    region, resource_type, resource_id = key.region, str(key.resource_type), key.resource_id
    messages = {evidence: cited(evidence) for item in amounts for evidence in item.evidence}
    return [
        (
            region,
            resource_type,
            resource_id,
            item.counter,
            item.label,
            item.at,
            item.amount,
            item.project_id,
            [messages[evidence] for evidence in item.evidence],
        )
        for item in amounts
        if since is None or item.at >= since
    ]


async def replace_amounts(
    connection: db.Connection,
    wanted: Mapping[ResourceKey, Sequence[Row]],
    since: Mapping[ResourceKey, datetime],
) -> Change:
    """The rows of these resources are these; those that are there already are not touched.

    Of a resource in `since`, rows of earlier moments are neither wanted nor looked at.
    Runs in the caller's transaction, which holds the resources against other folds.
    """
    names = [(key.region, str(key.resource_type), key.resource_id) for key in wanted]
    found = await connection.fetch(
        _PRESENT,
        *key_columns(list(wanted)),
        [since.get(key, EVER) for key in wanted],
    )
    present = {row[:_KEY]: row for row in ((*names[number - 1], *said) for number, *said in found)}
    rows = {row[:_KEY]: row for rows in wanted.values() for row in rows}
    removed = [row for key, row in present.items() if rows.get(key) != row]
    added = [row for key, row in rows.items() if present.get(key) != row]
    if removed:
        await connection.execute(_DELETE, *zip(*(row[:_KEY] for row in removed), strict=True))
    if added:
        await _insert(connection, added)
    return Change(removed=removed, added=added)


async def _insert(connection: db.Connection, rows: Sequence[Row]) -> None:
    numbers: dict[Row, int] = {}
    series, moments, amounts, evidence = [], [], [], []
    for row in rows:
        region, resource_type, resource_id, counter, label, at, amount, project_id, rests_on = row
        said = (region, resource_type, resource_id, counter, label, project_id)
        series.append(numbers.setdefault(said, len(numbers) + 1))
        moments.append(at)
        amounts.append(str(amount))
        evidence.append(orjson.dumps(rests_on).decode())
    await connection.execute(
        _INSERT, series, moments, amounts, evidence, *zip(*numbers, strict=True)
    )
