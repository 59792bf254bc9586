"""Everything derived, made anew from the bodies that are kept.

A rebuild reads every raw body again under the present mapping, rewrites what it says where that has
changed, and has every resource reckoned anew. It works in small transactions, each of which notes
how far it has come, so that it goes on where it was broken off; beside it the service ingests and
folds as ever. What a dropped month's messages said is taken as it stands: their bodies are gone.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Final

import asyncpg

from hostler_common import bus, db, logs
from hostler_usage.history import rollup_store
from hostler_usage.history.fold_store import FoldStore
from hostler_usage.history.rollup import Cell, HeldFact, MovedFact, midnight, sums
from hostler_usage.reading.envelope import UnreadableError
from hostler_usage.reading.event import Event
from hostler_usage.reading.intake import read_delivery
from hostler_usage.reading.mapping import Mapping as Metered
from hostler_usage.reading.normalise import Normaliser
from hostler_usage.reading.statement import ResourceKey, encode

log = logs.get(__name__)

REWRITING: Final = "usage.rewriting"
"""The advisory lock (`db.singleton`) of whatever rewrites what is stored: rebuild and retention."""

MAX_BATCH_BYTES: Final = 32 * 1024 * 1024
_DAY: Final = timedelta(days=1)
_ROWS_AT_ONCE: Final = 1000
_ANY_SIZE: Final = 1 << 30  # what was stored was within the bounds of its time
_KEY: Final = "event_time, message_id, body_sha256"
_SAME: Final = "region, resource_type, resource_id"


@dataclass(frozen=True, slots=True, kw_only=True)
class Derived:
    """A table that follows from the messages: `order` makes its rows unique, `where` picks those that do."""

    table: str
    order: str
    columns: str = "*"
    where: str = "TRUE"


_OF_RESOURCE: Final = "resource_id, resource_type, region"
DERIVED: Final = (
    Derived(table="usage_interval", order=f"{_OF_RESOURCE}, starts_at"),
    Derived(table="usage_amount", order=f"{_OF_RESOURCE}, counter, label, at"),
    # when it was folded does not follow; neither does that something was said of what came to nothing
    Derived(
        table="resource",
        order=_OF_RESOURCE,
        columns=f"{_OF_RESOURCE}, anomalies",
        where="anomalies <> '{}'",
    ),
    Derived(table="operation", order=f"{_OF_RESOURCE}, begun_at, ordinal"),
    Derived(table="audit_resource", order=_OF_RESOURCE),
    # silences are told by a check that looks at the clock
    Derived(
        table="audit_verdict",
        order=f"{_OF_RESOURCE}, period_start, origin, ordinal",
        where="origin = 'statement'",
    ),
    # a sum that came down to nothing may leave its row
    Derived(
        table="usage_day",
        order="day, region, project_id, resource_type, measure",
        where="amount <> 0",
    ),
)
"""The tables whose contents are a function of the messages and the mapping."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a rebuild has come; `is_resumed` where another one began it."""

    phase: str
    messages: int
    changed: int
    unreadable: int
    resources: int
    hashes_before: Mapping[str, str]
    is_resumed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What a batch's messages say now: which of them say something else than is stored."""

    messages: int
    changed: Mapping[str, int]  # by event type
    unreadable: int
    after: tuple[datetime, str, bytes] | None  # the last one read; None where there are no more


@dataclass(frozen=True, slots=True, kw_only=True)
class RebuildStore:
    """Rebuilding. `program` names the version and the mapping: a half of another's is not gone on with."""

    pool: db.Pool
    mapping: Metered
    normaliser: Normaliser
    folds: FoldStore
    program: str

    async def begin(self, hashes: Mapping[str, str], *, anew: bool = False) -> Progress:
        """The rebuild that was broken off goes on, if it was this program's, or else one begins.

        `hashes` are those before it; of one that goes on they are kept from its beginning.

        Raises:
            DatabaseUnavailable: nothing was changed.
        """
        async with db.transaction(self.pool) as connection:
            row = await connection.fetchrow("SELECT * FROM rebuild FOR UPDATE")
            if (
                row is not None
                and not anew
                and row["program"] == self.program
                and row["phase"] != "done"
            ):
                return _progress(row, is_resumed=True)
            await connection.execute("DELETE FROM rebuild")
            row = await connection.fetchrow(
                "INSERT INTO rebuild (program, phase, hashes_before) VALUES ($1, 'messages', $2)"
                " RETURNING *",
                self.program,
                dict(hashes),
            )
            assert row is not None
            return _progress(row)

    async def messages(self) -> int:
        """About how many messages there are, for showing progress."""
        async with db.connection(self.pool) as connection:
            return int(
                await connection.fetchval(
                    "SELECT coalesce(sum(CASE WHEN c.reltuples < 0 THEN 0 ELSE c.reltuples END), 0)"
                    " FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid"
                    " WHERE i.inhparent = 'raw_event'::regclass"
                )
            )

    async def resources(self) -> int:
        """How many resources there are to be reckoned."""
        async with db.connection(self.pool) as connection:
            return int(await connection.fetchval("SELECT count(*) FROM resource"))

    async def read_some(self, limit: int) -> Progress:
        """The next `limit` messages say what they say under this mapping; the phase ends with the last.

        Resources they spoke of or speak of now, where that changed, are marked to be folded.

        Raises:
            DatabaseUnavailable: nothing of it was changed, as far as is known.
        """
        async with db.transaction(self.pool) as connection:
            row = await connection.fetchrow("SELECT * FROM rebuild FOR UPDATE")
            assert row is not None
            after = None
            if row["event_time"] is not None:
                after = (row["event_time"], row["message_id"], row["body_sha256"])
            stored = await _next(connection, after, limit)
            if not stored:
                done = await connection.fetchrow(
                    "UPDATE rebuild SET phase = 'resources' RETURNING *"
                )
                assert done is not None
                return _progress(done)
            apart = await _apart(connection, stored)
            changed, unreadable = [], 0
            for one in stored:
                event = self._read(one)
                if event is None:
                    unreadable += 1
                elif _differs(one, event, apart.get(_key(one), {})):
                    changed.append((one, event))
            if changed:
                await _rewrite(connection, changed, apart)
            last = stored[-1]
            written = await connection.fetchrow(
                f"UPDATE rebuild SET ({_KEY}) = ($1, $2, $3), messages = messages + $4,"  # noqa: S608  a constant of this module
                " changed = changed + $5, unreadable = unreadable + $6 RETURNING *",
                *_key(last),
                len(stored),
                len(changed),
                unreadable,
            )
            assert written is not None
            return _progress(written)

    async def compare_some(
        self, after: tuple[datetime, str, bytes] | None, limit: int
    ) -> Difference:
        """What the next `limit` messages after one say differently under this mapping; nothing is written.

        Raises:
            DatabaseUnavailable: the database is away.
        """
        async with db.connection(self.pool) as connection:
            stored = await _next(connection, after, limit)
            apart = await _apart(connection, stored) if stored else {}
        changed: dict[str, int] = {}
        unreadable = 0
        for one in stored:
            event = self._read(one)
            if event is None:
                unreadable += 1
            elif _differs(one, event, apart.get(_key(one), {})):
                changed[one["event_type"]] = changed.get(one["event_type"], 0) + 1
        return Difference(
            messages=len(stored),
            changed=changed,
            unreadable=unreadable,
            after=_key(stored[-1]) if stored else None,
        )

    async def mark_some(self, limit: int) -> Progress:
        """The next `limit` resources are marked to be folded; the phase ends with the last.

        Raises:
            DatabaseUnavailable: nothing of it was changed, as far as is known.
        """
        async with db.transaction(self.pool) as connection:
            row = await connection.fetchrow("SELECT * FROM rebuild FOR UPDATE")
            assert row is not None
            keys = await connection.fetch(
                f"SELECT {_OF_RESOURCE} FROM resource WHERE ({_OF_RESOURCE}) > ($1, $2, $3)"  # noqa: S608  constants of this module
                f" ORDER BY {_OF_RESOURCE} LIMIT $4",
                *((row[name] or "") for name in ("resource_id", "resource_type", "region")),
                limit,
            )
            if not keys:
                await self._forget_types(connection)
                done = await connection.fetchrow("UPDATE rebuild SET phase = 'days' RETURNING *")
                assert done is not None
                return _progress(done)
            await connection.execute(
                "INSERT INTO touched (regions, resource_types, resource_ids) VALUES ($1, $2, $3)",
                [key["region"] for key in keys],
                [key["resource_type"] for key in keys],
                [key["resource_id"] for key in keys],
            )
            written = await connection.fetchrow(
                f"UPDATE rebuild SET ({_OF_RESOURCE}) = ($1, $2, $3), resources = resources + $4"  # noqa: S608  a constant of this module
                " RETURNING *",
                *keys[-1],
                len(keys),
            )
            assert written is not None
            return _progress(written)

    async def _forget_types(self, connection: db.Connection) -> None:
        """Nothing is left of resources of types that the mapping knows no more."""
        for item in DERIVED:
            if item.order.startswith(_OF_RESOURCE):
                await connection.execute(
                    f"DELETE FROM {item.table} WHERE resource_type <> ALL($1)",  # noqa: S608  constants of this module
                    list(self.mapping.resources),
                )

    async def sum_some_days(self, limit: int) -> Progress:
        """The sums of the next `limit` days are made of that day's facts; the phase ends with the last.

        Raises:
            DatabaseUnavailable: the days before it are done.
        """
        progress = None
        for _ in range(limit):
            progress = await self._sum_day()
            if progress.phase == "done":
                break
        assert progress is not None
        return progress

    async def _sum_day(self) -> Progress:
        async with db.transaction(self.pool) as connection:
            # as the turn of a day: no fold changes facts meanwhile
            await connection.execute(f"SELECT pg_advisory_xact_lock({rollup_store.LOCK})")
            row = await connection.fetchrow("SELECT * FROM rebuild FOR UPDATE")
            assert row is not None
            until = await rollup_store.days_until(connection)
            day = await _day_after(connection, row["day"])
            if until is None or day is None or day >= until:
                done = await connection.fetchrow("UPDATE rebuild SET phase = 'done' RETURNING *")
                assert done is not None
                return _progress(done)
            await connection.execute("DELETE FROM usage_day WHERE day = $1", day)
            await rollup_store.add(connection, await self._sums_of(connection, day))
            written = await connection.fetchrow("UPDATE rebuild SET day = $1 RETURNING *", day)
            assert written is not None
            return _progress(written)

    async def _sums_of(self, connection: db.Connection, day: date) -> Counter[Cell]:
        start, end = midnight(day), midnight(day + _DAY)
        by_type = self.mapping.measures_by_type
        found: Counter[Cell] = Counter()
        held = await connection.cursor(
            "SELECT region, resource_type, project_id, greatest(starts_at, $1), ends_at, attributes"
            " FROM usage_interval WHERE starts_at < $2 AND (ends_at IS NULL OR ends_at > $1)",
            start,
            end,
        )
        while rows := await held.fetch(_ROWS_AT_ONCE):
            found.update(sums((HeldFact(*row) for row in rows), by_type, day + _DAY))
        moved = await connection.cursor(
            "SELECT region, resource_type, project_id, counter, at, amount::bigint"
            " FROM usage_amount WHERE at >= $1 AND at < $2",
            start,
            end,
        )
        while rows := await moved.fetch(_ROWS_AT_ONCE):
            found.update(sums((MovedFact(*row) for row in rows), by_type, day + _DAY))
        return found

    async def last_mark(self) -> int:
        """The newest mark that a resource is to be folded."""
        async with db.connection(self.pool) as connection:
            return int(await connection.fetchval("SELECT coalesce(max(id), 0) FROM touched"))

    async def fold_until(self, mark: int, limit: int) -> bool:
        """Fold what nobody else is folding; return whether all that was marked until `mark` is folded.

        Raises:
            DatabaseUnavailable: what is left is folded by the service, or by another call.
        """
        while await self._is_marked(mark):
            if not await self.folds.fold_some(limit):
                return not await self._is_marked(mark)  # another process has it in hand
        return True

    async def _is_marked(self, mark: int) -> bool:
        async with db.connection(self.pool) as connection:
            return bool(
                await connection.fetchval(
                    "SELECT EXISTS (SELECT FROM touched WHERE id <= $1)", mark
                )
            )

    async def hashes(self, tables: Sequence[Derived] = DERIVED) -> dict[str, str]:
        """The sha256 of each table's rows as text, in order of their keys, all as of one moment.

        Tables that are not there are left out.

        Raises:
            DatabaseUnavailable: the database is away.
        """
        found: dict[str, str] = {}
        async with (
            db.connection(self.pool) as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            for item in tables:
                if not await connection.fetchval("SELECT to_regclass($1) IS NOT NULL", item.table):
                    continue
                digest = hashlib.sha256()
                columns = "t::text" if item.columns == "*" else f"ROW({item.columns})::text"
                cursor = await connection.cursor(
                    f"SELECT {columns} FROM {item.table} t WHERE {item.where}"  # noqa: S608  constants of this module
                    f" ORDER BY {item.order}"
                )
                while rows := await cursor.fetch(5000):
                    for (text,) in rows:
                        digest.update(text.encode())
                        digest.update(b"\n")
                found[item.table] = digest.hexdigest()
        return found

    def _read(self, stored: asyncpg.Record) -> Event | None:
        """The message as it is read now; None where it is none any more."""
        delivery = bus.Delivery(
            queue="",
            exchange=stored["exchange"],
            routing_key=stored["routing_key"],
            body=stored["body"],
            headers=stored["headers"] or {},
            message_id=stored["message_id"] if stored["has_own_id"] else None,
            type=stored["event_type"],
            content_type=stored["content_type"],
            content_encoding=stored["content_encoding"],
            timestamp=stored["event_time"],
        )
        try:
            event = read_delivery(
                delivery,
                source=stored["source"],
                region=stored["region"],
                normaliser=self.normaliser,
                max_bytes=_ANY_SIZE,
            )
        except UnreadableError:
            return None
        # a program that dates or names it otherwise would make another message of it
        is_same = (event.notification.timestamp, event.notification.message_id) == (
            stored["event_time"],
            stored["message_id"],
        )
        return event if is_same else None


# --- the mapping that histories were made with


async def note_mapping(pool: db.Pool, digest: str) -> bool:
    """The mapping is in use from now on; return whether another was since everything was made anew.

    Raises:
        DatabaseUnavailable: the database is away.
    """
    async with db.transaction(pool) as connection:
        await connection.execute(
            "INSERT INTO mapping_in_use (digest) VALUES ($1) ON CONFLICT DO NOTHING", digest
        )
        return bool(
            await connection.fetchval(
                "SELECT EXISTS (SELECT FROM mapping_in_use WHERE digest <> $1)", digest
            )
        )


async def warn_of_mapping(pool: db.Pool, digest: str) -> None:
    """The mapping is in use from now on; the log says so if histories were made with another.

    Raises:
        DatabaseUnavailable: the database is away.
    """
    if await note_mapping(pool, digest):
        log.warning("mapping_changed", mapping=digest, remedy="run 'hostler-usage rebuild' once")


async def settle_mapping(pool: db.Pool, digest: str) -> None:
    """Everything was made anew with this mapping.

    Raises:
        DatabaseUnavailable: the database is away.
    """
    async with db.transaction(pool) as connection:
        await connection.execute("DELETE FROM mapping_in_use WHERE digest <> $1", digest)
        await connection.execute(
            "INSERT INTO mapping_in_use (digest) VALUES ($1)"
            " ON CONFLICT (digest) DO UPDATE SET since = now()",
            digest,
        )


# --- the statements


def _names(key: ResourceKey) -> tuple[str, str, str]:
    return (key.region, str(key.resource_type), key.resource_id)


def _key(row: asyncpg.Record) -> tuple[datetime, str, bytes]:
    return (row["event_time"], row["message_id"], row["body_sha256"])


async def _day_after(connection: db.Connection, day: date | None) -> date | None:
    """The day that is summed up after `day`: the first that anything belongs to, or the next."""
    if day is not None:
        return day + _DAY
    first: date | None = await connection.fetchval(
        "SELECT least((SELECT min(day) FROM usage_day),"
        " (SELECT (min(starts_at) AT TIME ZONE 'UTC')::date FROM usage_interval),"
        " (SELECT (min(at) AT TIME ZONE 'UTC')::date FROM usage_amount))"
    )
    return first


async def _next(
    connection: db.Connection, after: tuple[datetime, str, bytes] | None, limit: int
) -> Sequence[asyncpg.Record]:
    """The next messages in order of their keys, within the bounds of memory."""
    # the bare condition on the time is what lets the planner leave months out
    begin = f"event_time >= $2 AND ({_KEY}) > ($2, $3, $4)" if after is not None else "TRUE"
    # the sizes are known without reading what was moved out of line
    keys = await connection.fetch(
        f"SELECT {_KEY}, octet_length(body) AS size FROM raw_event"  # noqa: S608  constants of this module
        f" WHERE {begin} ORDER BY {_KEY} LIMIT $1",
        limit,
        *(after or ()),
    )
    taken, size = 0, 0
    for row in keys:
        size += row["size"]
        if taken and size > MAX_BATCH_BYTES:
            break
        taken += 1
    if not taken:
        return []
    return await connection.fetch(
        "SELECT e.*, o.source, o.exchange, o.routing_key, o.content_type, o.content_encoding"
        " FROM raw_event e JOIN origin o ON o.id = e.origin"
        " WHERE e.event_time BETWEEN $1 AND $4 AND (e.event_time, e.message_id, e.body_sha256)"
        "  BETWEEN ($1, $2, $3) AND ($4, $5, $6)"
        " ORDER BY e.event_time, e.message_id, e.body_sha256",
        *_key(keys[0]),
        *_key(keys[taken - 1]),
    )


_Apart = dict[tuple[datetime, str, bytes], dict[tuple[str, str, str], str]]


async def _apart(connection: db.Connection, stored: Sequence[asyncpg.Record]) -> _Apart:
    """What these messages are known to say of further resources."""
    rows = await connection.fetch(
        f"SELECT {_KEY}, {_SAME}, said FROM statement_apart"  # noqa: S608  constants of this module
        " WHERE event_time BETWEEN $1 AND $2",
        stored[0]["event_time"],
        stored[-1]["event_time"],
    )
    present = {_key(row) for row in stored}
    found: _Apart = {}
    for row in rows:
        if _key(row) in present:  # the others are of messages that are not here any more
            found.setdefault(_key(row), {})[tuple(row)[3:6]] = row["said"]
    return found


def _wanted(event: Event) -> dict[tuple[str, str, str], str]:
    """What the message says of its second and further resources; of one twice, the first word."""
    wanted: dict[tuple[str, str, str], str] = {}
    for said in event.normalised.said[1:]:
        if said.statement is not None:
            wanted.setdefault(_names(said.resource), encode(said.statement))
    return wanted


_DERIVED_COLUMNS: Final = (
    ("project_id", "text"),
    ("resource_type", "text"),
    ("resource_id", "text"),
    ("is_known", "boolean"),
    ("said", "text"),
)


def _derived(event: Event) -> tuple[object, ...]:
    normalised = event.normalised
    said = normalised.said[0] if normalised.said else None
    return (
        normalised.project_id,
        str(said.resource.resource_type) if said else None,
        said.resource.resource_id if said else None,
        normalised.is_known,
        encode(said.statement) if said and said.statement else None,
    )


def _differs(
    stored: asyncpg.Record, event: Event, apart: Mapping[tuple[str, str, str], str]
) -> bool:
    return (
        tuple(stored[name] for name, _ in _DERIVED_COLUMNS) != _derived(event)
        or tuple(stored["problems"] or ()) != event.normalised.problems
        or apart != _wanted(event)
    )


async def _rewrite(
    connection: db.Connection, changed: Sequence[tuple[asyncpg.Record, Event]], apart: _Apart
) -> None:
    """These messages say what their events say, and the resources of old and new words are marked."""
    names = [name for name, _ in _DERIVED_COLUMNS]
    places = ", ".join(
        f"${number}::{kind}[]" for number, (_, kind) in enumerate(_DERIVED_COLUMNS, start=4)
    )
    rows = [(*_key(one), *_derived(event)) for one, event in changed]
    await connection.execute(
        "UPDATE raw_event e SET"  # noqa: S608  constants of this module
        f" ({', '.join(names)}) = ({', '.join(f'v.{name}' for name in names)})"
        f" FROM unnest($1::timestamptz[], $2::text[], $3::bytea[], {places})"
        f"  AS v (event_time, message_id, body_sha256, {', '.join(names)})"
        " WHERE (e.event_time, e.message_id, e.body_sha256)"
        "  = (v.event_time, v.message_id, v.body_sha256)"
        " AND e.event_time BETWEEN $9 AND $10",
        *(list(column) for column in zip(*rows, strict=True)),
        changed[0][0]["event_time"],
        changed[-1][0]["event_time"],
    )
    await connection.executemany(
        "UPDATE raw_event SET problems = $4"
        " WHERE (event_time, message_id, body_sha256) = ($1, $2, $3)",
        [
            (*_key(one), list(event.normalised.problems) or None)
            for one, event in changed
            if tuple(one["problems"] or ()) != event.normalised.problems
        ],
    )
    await connection.executemany(
        f"DELETE FROM statement_apart WHERE ({_KEY}, {_SAME}) = ($1, $2, $3, $4, $5, $6)",  # noqa: S608  constants of this module
        [
            (*_key(one), *key)
            for one, event in changed
            for key in apart.get(_key(one), {}).keys() - _wanted(event).keys()
        ],
    )
    await connection.executemany(
        f"INSERT INTO statement_apart ({_KEY}, {_SAME}, said) VALUES ($1, $2, $3, $4, $5, $6, $7)"  # noqa: S608  constants of this module
        f" ON CONFLICT ({_OF_RESOURCE}, {_KEY}) DO UPDATE SET said = excluded.said",
        [
            (*_key(one), *key, text)
            for one, event in changed
            for key, text in _wanted(event).items()
        ],
    )
    keys = sorted(set(_spoken_of(changed, apart)))
    if keys:
        await connection.execute(
            "INSERT INTO touched (regions, resource_types, resource_ids) VALUES ($1, $2, $3)",
            *(list(column) for column in zip(*keys, strict=True)),
        )


def _spoken_of(
    changed: Sequence[tuple[asyncpg.Record, Event]], apart: _Apart
) -> Iterator[tuple[str, str, str]]:
    """The resources that were spoken of, and those that are."""
    for one, event in changed:
        if one["said"] is not None:
            yield (one["region"], one["resource_type"], one["resource_id"])
        yield from apart.get(_key(one), {})
        for said in event.normalised.said:
            if said.statement is not None:
                yield _names(said.resource)


def _progress(row: asyncpg.Record, *, is_resumed: bool = False) -> Progress:
    return Progress(
        phase=row["phase"],
        messages=row["messages"],
        changed=row["changed"],
        unreadable=row["unreadable"],
        resources=row["resources"],
        hashes_before=row["hashes_before"],
        is_resumed=is_resumed,
    )
