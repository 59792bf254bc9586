"""Old months of messages go, and what they said stays.

A month's messages say the same after it is dropped, for what they said is copied into
`statement_apart` first. Nearly all of it is copied in small steps beside everything else; only what
was stored during those steps is copied in the transaction that drops the month and keeps everybody
else out of it. Nothing changes for the fold at any time: what stands in both places counts once.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from hostler_common import db
from hostler_usage.history.conflict_store import forget_some
from hostler_usage.history.rebuild_store import REWRITING
from hostler_usage.history.retention import Month

_STEP: Final = 5000
_KEY: Final = "event_time, message_id, body_sha256"
_SAID: Final = f"region, resource_type, resource_id, {_KEY}, said"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """A month that is gone: how many messages it held, and of how many it is kept what they said."""

    messages: int
    statements: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionStore:
    """Dropping of months. Any number of processes may try at once: one does it."""

    pool: db.Pool

    async def partitions(self) -> list[str]:
        """The names of the partitions that messages are in.

        Raises:
            DatabaseUnavailable: the database is away.
        """
        async with db.connection(self.pool) as connection:
            rows = await connection.fetch(
                "SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid"
                " WHERE i.inhparent = 'raw_event'::regclass"
            )
        return [row["relname"] for row in rows]

    async def drop(self, month: Month) -> Dropped | None:
        """The month's messages are gone, and histories are what they were; None where others are at it.

        Raises:
            DatabaseBusy: others did not let go of the messages in time; nothing is dropped.
            DatabaseUnavailable: nothing is dropped, as far as is known.
        """
        async with db.singleton(self.pool, REWRITING) as is_alone:
            if not is_alone or month.name not in await self.partitions():
                return None
            settled = await self._settled_seq()
            messages = statements = 0
            after: tuple[datetime, str, bytes] | None = None
            while True:
                read, copied, after = await self._copy_some(month, after)
                messages += read
                statements += copied
                if after is None:
                    break
            return await self._finish(month, settled, messages, statements)

    async def forget_conflicts(self, before: datetime) -> None:
        """No conflict is kept of messages before a moment, if none is stored any more under their ids.

        For when months were dropped. A message that is kept goes on being said to have had another beside it.

        Raises:
            DatabaseUnavailable: some of them are kept, as far as is known; the next month's takes them along.
        """
        after: tuple[datetime, str, bytes] | None = None
        while True:
            async with db.transaction(self.pool) as connection:
                after = await forget_some(connection, before, after)
            if after is None:
                return

    async def _settled_seq(self) -> int:
        """A number up to which every message is committed, or never will be."""
        async with db.transaction(self.pool) as connection:
            await connection.execute("SET LOCAL lock_timeout = '2s'")
            # waits for everybody who is writing, and is let go at once
            await connection.execute("LOCK TABLE raw_event IN SHARE MODE")
            return int(await connection.fetchval("SELECT last_value FROM raw_event_seq"))

    async def _copy_some(
        self, month: Month, after: tuple[datetime, str, bytes] | None
    ) -> tuple[int, int, tuple[datetime, str, bytes] | None]:
        """Copy what the next messages said; how many were read and copied, and the last of them."""
        begin = f"({_KEY}) > ($2, $3, $4)" if after is not None else "TRUE"
        async with db.transaction(self.pool) as connection:
            row = await connection.fetchrow(
                f"WITH batch AS MATERIALIZED (SELECT {_SAID} FROM {month.name} WHERE {begin}"  # noqa: S608  the name was matched
                f"  ORDER BY {_KEY} LIMIT $1),"
                f" copied AS (INSERT INTO statement_apart ({_SAID}) SELECT {_SAID} FROM batch"
                "  WHERE said IS NOT NULL ON CONFLICT DO NOTHING RETURNING 1)"
                f" SELECT {_KEY}, (SELECT count(*) FROM batch) AS read,"
                " (SELECT count(*) FROM copied) AS copied"
                f" FROM batch ORDER BY event_time DESC, message_id DESC, body_sha256 DESC LIMIT 1",
                _STEP,
                *(after or ()),
            )
        if row is None:
            return 0, 0, None
        return (
            row["read"],
            row["copied"],
            (row["event_time"], row["message_id"], row["body_sha256"]),
        )

    async def _finish(self, month: Month, settled: int, messages: int, statements: int) -> Dropped:
        async with db.connection(self.pool) as connection:
            # so that the rest is found without reading the month through
            await connection.execute(
                "SELECT brin_summarize_new_values(i.indexrelid) FROM pg_index i"
                " JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am a ON a.oid = c.relam"
                " WHERE i.indrelid = $1::regclass AND a.amname = 'brin'",
                month.name,
            )
        async with db.transaction(self.pool) as connection:
            await connection.execute("SET LOCAL lock_timeout = '2s'")
            await connection.execute("LOCK TABLE raw_event IN ACCESS EXCLUSIVE MODE")
            rest = await connection.execute(
                f"INSERT INTO statement_apart ({_SAID}) SELECT {_SAID} FROM {month.name}"  # noqa: S608  the name was matched
                " WHERE seq > $1 AND said IS NOT NULL ON CONFLICT DO NOTHING",
                settled,
            )
            await connection.execute(f"DROP TABLE {month.name}")
        return Dropped(messages=messages, statements=statements + int(rest.split()[-1]))
