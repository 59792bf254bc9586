"""What follows from the stored messages: ledgers made anew for the resources that were touched.

One transaction takes some touched batches, locks their resources, reads everything that was ever
said of them (or since their past was settled: `settled`), a bounded part of it at a time, and
replaces what followed from it before. A message that is stored meanwhile marks its resources again
with its own commit, so none is ever lost; the lock makes two processes that meet at a resource
queue up, the later one reading what the earlier one could not see.
"""

from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from collections.abc import Mapping as Table
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final

from hostler_common import db
from hostler_usage.auditing.audit_store import replace_verdicts
from hostler_usage.auditing.repetition import Said
from hostler_usage.history import rollup_store, settled_store, touched_store
from hostler_usage.history.amount_store import EVER, amount_rows, replace_amounts
from hostler_usage.history.intervals import Interval
from hostler_usage.history.ledger import Ledger, reckon
from hostler_usage.history.rollup import Cell, HeldFact, MovedFact, sums
from hostler_usage.history.row_set import Change, Row, RowSet, key_columns, key_of
from hostler_usage.history.settled import Settled, Span, settle
from hostler_usage.periods import period_store
from hostler_usage.periods.period import Period
from hostler_usage.profiling.operation_store import replace_operations
from hostler_usage.reading.citation import cited
from hostler_usage.reading.mapping import Mapping, Resource
from hostler_usage.reading.statement import Evidence, ResourceKey, decode

INTERVALS: Final = RowSet(
    table="usage_interval",
    columns=(
        ("region", "text"),
        ("resource_type", "text"),
        ("resource_id", "text"),
        ("starts_at", "timestamptz"),
        ("ends_at", "timestamptz"),
        ("project_id", "text"),
        ("user_id", "text"),
        ("state_class", "text"),
        ("attributes", "jsonb"),
        ("opened_by", "jsonb"),
        ("closed_by", "jsonb"),
        ("provenance", "text"),
    ),
    key_length=4,
)
_AT_ONCE = 50  # resources that are looked up at a time
# in memory at a time, but that the last resource's may be more: nothing else runs while they are reckoned
_STATEMENTS: Final = 4000
_FETCHED: Final = 1000
_KEYS = "unnest($1::text[], $2::text[], $3::text[]) AS k (region, resource_type, resource_id)"
_KEYS_SINCE = (
    "unnest($1::text[], $2::text[], $3::text[], $4::timestamptz[]) WITH ORDINALITY"
    " AS k (region, resource_type, resource_id, since, number)"
)
_SAME = "(region, resource_type, resource_id)"


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldStore:
    """Reckoning resources anew, and writing down what came of it."""

    pool: db.Pool
    mapping: Mapping

    async def gather(self, limit: int) -> int:
        """Each resource that waits is named once, if more than `limit` do; return about how many.

        Raises:
            DatabaseUnavailable: nothing was changed.
        """
        return await touched_store.gather(self.pool, limit)

    async def fold_some(self, limit: int = 1000) -> int:
        """The resources of some touched batches, about `limit` of them, are reckoned; return how many.

        Batches that touch the same resources are taken together: a ledger is made once for all.

        Raises:
            DatabaseUnavailable: nothing was changed.
        """
        async with db.transaction(self.pool) as connection:
            taken, touched = await touched_store.take(connection, limit)
            await self.reckon(connection, sorted(touched), touched)
            await touched_store.forget(connection, taken)
        return len(touched)

    async def reckon(
        self,
        connection: db.Connection,
        keys: Sequence[ResourceKey],
        oldest: Table[ResourceKey, datetime | None] = MappingProxyType({}),
    ) -> None:
        """What follows from all that is stored about these resources is written down.

        `keys` are sorted. `oldest` says when the oldest message was sent that is new about one,
        where that is known: of those that it is not known of, everything is read and written anew.
        Runs in the caller's transaction, which holds the resources from now on.
        """
        if not keys:
            return
        # a few rows by their keys: whatever the planner thinks of tables that it has no statistics of yet
        await connection.execute("SET LOCAL enable_seqscan = off; SET LOCAL jit = off")
        until = await rollup_store.hold(connection)
        closed = await period_store.hold(connection)
        await _lock(connection, keys)
        changes: Counter[Cell] = Counter()
        for first in range(0, len(keys), _AT_ONCE):
            some = keys[first : first + _AT_ONCE]
            metered = [key for key in some if key.resource_type in self.mapping.resources]
            async for ledgers, since in self._ledgers(connection, metered, oldest):
                held, moved = await self._replace(connection, ledgers, since, closed)
                if until is not None:
                    by_type = self.mapping.measures_by_type
                    changes.update(sums(_facts(held.added, moved.added), by_type, until))
                    changes.subtract(sums(_facts(held.removed, moved.removed), by_type, until))
        await rollup_store.add(connection, changes)

    async def _ledgers(
        self,
        connection: db.Connection,
        keys: Sequence[ResourceKey],
        oldest: Table[ResourceKey, datetime | None],
    ) -> AsyncIterator[tuple[dict[ResourceKey, Ledger], dict[ResourceKey, datetime]]]:
        """Ledgers, and from when on those are whose past is settled: before, all is as it was.

        There are some after the others, so that memory does not hold all that was said.
        """
        settled = await settled_store.load(connection, {key: oldest.get(key) for key in keys})
        rest = [key for key in keys if key not in settled]
        async for said in _load(connection, list(settled), settled):
            ledgers: dict[ResourceKey, Ledger] = {}
            pasts: dict[ResourceKey, Settled | None] = {}
            before = await _intervals(connection, list(said))
            for key, news in said.items():
                past = settled[key]
                needed = [*past.kept, *news]
                if past.goes_on(news):
                    ledger = reckon(self.mapping.resources[key.resource_type], needed)
                    after = [_span(row) for row in self._interval_rows(key, ledger)]
                    if past.is_past_kept(before[key], after):
                        ledgers[key] = ledger
                        later = settle(needed, ledger)
                        if later is not None and later.rows_from > past.rows_from:
                            pasts[key] = later
                        continue
                rest.append(key)
            await settled_store.save(connection, pasts)
            yield ledgers, {key: settled[key].rows_from for key in ledgers}
        async for said in _load(connection, rest, {}):
            ledgers = {
                key: reckon(self.mapping.resources[key.resource_type], all_of_it)
                for key, all_of_it in said.items()
            }
            await settled_store.save(
                connection, {key: settle(said[key], ledger) for key, ledger in ledgers.items()}
            )
            yield ledgers, {}

    def _interval_rows(self, key: ResourceKey, ledger: Ledger) -> list[Row]:
        resource = self.mapping.resources[key.resource_type]
        return [_interval_row(key, resource, interval) for interval in ledger.intervals]

    async def _replace(
        self,
        connection: db.Connection,
        ledgers: Table[ResourceKey, Ledger],
        since: Table[ResourceKey, datetime],
        closed: Sequence[Period],
    ) -> tuple[Change, Change]:
        keys = list(ledgers)
        intervals = [
            row for key, ledger in ledgers.items() for row in self._interval_rows(key, ledger)
        ]
        amounts = {
            key: amount_rows(key, ledger.amounts, since.get(key))
            for key, ledger in ledgers.items()
        }
        held = await INTERVALS.replace(connection, keys, intervals)
        moved = await replace_amounts(connection, amounts, since)
        moving = [row for rows in amounts.values() for row in rows]
        await period_store.note(connection, closed, intervals, moving, held, moved)
        await replace_operations(
            connection, {key: ledger.operations for key, ledger in ledgers.items()}
        )
        await replace_verdicts(
            connection, {key: ledger.reconciliation for key, ledger in ledgers.items()}, since
        )
        await _replace_anomalies(connection, ledgers)
        return held, moved


async def _lock(connection: db.Connection, keys: Sequence[ResourceKey]) -> None:
    """Nobody else reckons these resources until the transaction ends."""
    await connection.execute(
        "INSERT INTO resource (region, resource_type, resource_id)"  # noqa: S608  a constant of this module
        f" SELECT * FROM {_KEYS} ORDER BY 3, 2, 1"
        " ON CONFLICT (resource_id, resource_type, region) DO UPDATE SET folded_at = now()",
        *key_columns(keys),
    )


async def _load(
    connection: db.Connection, keys: Sequence[ResourceKey], settled: Table[ResourceKey, Settled]
) -> AsyncIterator[dict[ResourceKey, list[Said]]]:
    """Everything that was ever said of these resources, or since their past was settled, some after the others."""
    if not keys:
        return
    waiting = await connection.cursor(
        "SELECT number, event_time, message_id, body_sha256, said"  # noqa: S608  constants of this module
        f" FROM {_KEYS_SINCE} JOIN raw_event USING {_SAME}"
        "  WHERE said IS NOT NULL AND event_time >= since"
        " UNION ALL"
        " SELECT number, event_time, message_id, body_sha256, said"
        f" FROM {_KEYS_SINCE} JOIN statement_apart USING {_SAME} WHERE event_time >= since"
        " ORDER BY number",
        *key_columns(keys),
        [settled[key].said_from if key in settled else EVER for key in keys],
    )
    heard: set[ResourceKey] = set()
    found: dict[ResourceKey, list[Said]] = {}
    read = 0
    while rows := await waiting.fetch(_FETCHED):
        for number, event_time, message_id, digest, said in rows:
            key = keys[number - 1]
            if key not in heard:
                heard.add(key)
                if read >= _STATEMENTS:
                    yield found
                    found, read = {}, 0
            evidence = Evidence(event_time=event_time, message_id=message_id, digest=digest)
            found.setdefault(key, []).append((decode(said), evidence))
            read += 1
    yield found | {key: [] for key in keys if key not in heard}


async def _intervals(
    connection: db.Connection, keys: Sequence[ResourceKey]
) -> dict[ResourceKey, list[Span]]:
    """The intervals of these resources as they are stored, in order of time."""
    names = ", ".join(name for name, _ in INTERVALS.columns)
    rows = await connection.fetch(
        f"SELECT {names} FROM {_KEYS} JOIN usage_interval USING {_SAME} ORDER BY starts_at",  # noqa: S608  constants of this module
        *key_columns(keys),
    )
    found: dict[ResourceKey, list[Span]] = defaultdict(list)
    for row in map(tuple, rows):
        found[key_of(row)].append(_span(row))
    return found


def _span(row: Sequence[Any]) -> Span:
    _, _, _, start, end, *held, closed_by, provenance = row
    return Span(start, end, (*held, provenance), closed_by)


def _interval_row(key: ResourceKey, resource: Resource, interval: Interval) -> Row:
    said = interval.attributes
    state = said.get("state")
    return (
        key.region,
        str(key.resource_type),
        key.resource_id,
        interval.start,
        interval.end,
        said.get("project"),
        said.get("user"),
        resource.state_class(state if isinstance(state, str) else None),
        dict(said),
        [cited(item) for item in interval.opened_by],
        [cited(item) for item in interval.closed_by],
        str(interval.provenance),
    )


def _facts(
    intervals: Iterable[Sequence[Any]], amounts: Iterable[Sequence[Any]]
) -> Iterator[HeldFact | MovedFact]:
    """Rows of both tables as what days are summed up of."""
    for region, kind, _, start, end, project, _, _, attributes, *_ in intervals:
        yield HeldFact(region, kind, project, start, end, attributes)
    for region, kind, _, counter, _, at, amount, project, _ in amounts:
        yield MovedFact(region, kind, project, counter, at, int(amount))


async def _replace_anomalies(
    connection: db.Connection, ledgers: Table[ResourceKey, Ledger]
) -> None:
    await connection.executemany(
        "UPDATE resource SET anomalies = $4"
        " WHERE (region, resource_type, resource_id) = ($1, $2, $3) AND anomalies <> $4",
        [
            (
                key.region,
                str(key.resource_type),
                key.resource_id,
                [str(item) for item in ledger.anomalies],
            )
            for key, ledger in ledgers.items()
        ],
    )
