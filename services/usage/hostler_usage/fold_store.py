"""What follows from the stored messages: ledgers made anew for the resources that were touched.

One transaction takes some touched batches, locks their resources, reads everything that was ever
said of them, and replaces what followed from it before. A message that is stored meanwhile marks
its resources again with its own commit, so none is ever lost; the lock makes two processes that
meet at a resource queue up, the later one reading what the earlier one could not see.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Mapping as Table
from dataclasses import dataclass
from typing import Any, Final

from hostler_common import db
from hostler_usage import period_store, rollup_store
from hostler_usage.amounts import Amount
from hostler_usage.audit_store import replace_verdicts
from hostler_usage.citation import cited
from hostler_usage.intervals import Interval
from hostler_usage.ledger import Ledger, reckon
from hostler_usage.mapping import Mapping, Resource
from hostler_usage.operation_store import replace_operations
from hostler_usage.period import Period
from hostler_usage.rollup import Cell, HeldFact, MovedFact, sums
from hostler_usage.row_set import Change, Row, RowSet, key_columns
from hostler_usage.statement import Evidence, ResourceKey, ResourceType, Statement, decode

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
AMOUNTS: Final = RowSet(
    table="usage_amount",
    columns=(
        ("region", "text"),
        ("resource_type", "text"),
        ("resource_id", "text"),
        ("counter", "text"),
        ("label", "text"),
        ("at", "timestamptz"),
        ("amount", "numeric"),
        ("project_id", "text"),
        ("evidence", "jsonb"),
    ),
    key_length=6,
)
_BATCHES = 500  # looked at in one transaction
_AT_ONCE = (
    50  # ledgers in memory at a time: one may be long, and nothing else runs while one is reckoned
)
_KEYS = "unnest($1::text[], $2::text[], $3::text[]) AS k (region, resource_type, resource_id)"
_SAME = "(region, resource_type, resource_id)"


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldStore:
    """Reckoning resources anew, and writing down what came of it."""

    pool: db.Pool
    mapping: Mapping

    async def fold_some(self, limit: int = 1000) -> int:
        """The resources of some touched batches, about `limit` of them, are reckoned; return how many.

        Batches that touch the same resources are taken together: a ledger is made once for all.

        Raises:
            DatabaseUnavailable: nothing was changed.
        """
        async with db.transaction(self.pool) as connection:
            batches = await connection.fetch(
                "SELECT id, regions, resource_types, resource_ids FROM touched"
                " ORDER BY id LIMIT $1 FOR UPDATE SKIP LOCKED",
                _BATCHES,
            )
            taken: list[int] = []
            touched: set[tuple[str, str, str]] = set()
            for number, regions, kinds, names in batches:
                more = set(zip(regions, kinds, names, strict=True)) - touched
                if taken and len(touched) + len(more) > limit:
                    break
                taken.append(number)
                touched |= more
            keys = sorted(
                ResourceKey(region=region, resource_type=ResourceType(kind), resource_id=name)
                for region, kind, name in touched
            )
            await self.reckon(connection, keys)
            await connection.execute("DELETE FROM touched WHERE id = ANY($1)", taken)
        return len(keys)

    async def reckon(self, connection: db.Connection, keys: Sequence[ResourceKey]) -> None:
        """What follows from all that is stored about these resources is written down.

        `keys` are sorted. Runs in the caller's transaction, which holds the resources from now on.
        """
        if not keys:
            return
        until = await rollup_store.hold(connection)
        closed = await period_store.hold(connection)
        await _lock(connection, keys)
        changes: Counter[Cell] = Counter()
        for first in range(0, len(keys), _AT_ONCE):
            some = keys[first : first + _AT_ONCE]
            said = await _load(connection, some)
            ledgers = {
                key: reckon(self.mapping.resources[key.resource_type], said[key])
                for key in some
                if key.resource_type in self.mapping.resources  # the mapping may have lost one
            }
            held, moved = await self._replace(connection, ledgers, closed)
            if until is not None:
                by_type = self.mapping.measures_by_type
                changes.update(sums(_facts(held.added, moved.added), by_type, until))
                changes.subtract(sums(_facts(held.removed, moved.removed), by_type, until))
        await rollup_store.add(connection, changes)

    async def _replace(
        self,
        connection: db.Connection,
        ledgers: Table[ResourceKey, Ledger],
        closed: Sequence[Period],
    ) -> tuple[Change, Change]:
        keys = list(ledgers)
        intervals = [
            _interval_row(key, self.mapping.resources[key.resource_type], interval)
            for key, ledger in ledgers.items()
            for interval in ledger.intervals
        ]
        amounts = [
            _amount_row(key, item) for key, ledger in ledgers.items() for item in ledger.amounts
        ]
        held = await INTERVALS.replace(connection, keys, intervals)
        moved = await AMOUNTS.replace(connection, keys, amounts)
        await period_store.note(connection, closed, intervals, amounts, held, moved)
        await replace_operations(
            connection, {key: ledger.operations for key, ledger in ledgers.items()}
        )
        await replace_verdicts(
            connection, {key: ledger.reconciliation for key, ledger in ledgers.items()}
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
    connection: db.Connection, keys: Sequence[ResourceKey]
) -> dict[ResourceKey, list[tuple[Statement, Evidence]]]:
    """Everything that was ever said of these resources."""
    rows = await connection.fetch(
        "SELECT region, resource_type, resource_id, event_time, message_id, body_sha256, said"  # noqa: S608  constants of this module
        f" FROM {_KEYS} JOIN raw_event USING {_SAME} WHERE said IS NOT NULL"
        " UNION ALL"
        " SELECT region, resource_type, resource_id, event_time, message_id, body_sha256, said"
        f" FROM {_KEYS} JOIN statement_apart USING {_SAME}",
        *key_columns(keys),
    )
    found: dict[ResourceKey, list[tuple[Statement, Evidence]]] = defaultdict(list)
    by_tuple = {(key.region, str(key.resource_type), key.resource_id): key for key in keys}
    for region, kind, name, event_time, message_id, digest, said in rows:
        evidence = Evidence(event_time=event_time, message_id=message_id, digest=digest)
        found[by_tuple[region, kind, name]].append((decode(said), evidence))
    return found


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


def _amount_row(key: ResourceKey, amount: Amount) -> Row:
    return (
        key.region,
        str(key.resource_type),
        key.resource_id,
        amount.counter,
        amount.label,
        amount.at,
        amount.amount,
        amount.project_id,
        [cited(item) for item in amount.evidence],
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
