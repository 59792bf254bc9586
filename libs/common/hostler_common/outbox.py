"""The transactional outbox: events are rows of the transaction that made the change, and are published after it.

A row is deleted once the broker has confirmed its message, so nothing is lost between the commit and the broker. A
crash between the confirm and the delete publishes it again under the same ``message_id``: consumers dedupe.
"""

import asyncio
import contextlib
import struct
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import asyncpg
from prometheus_client import CollectorRegistry, Gauge

from hostler_common import bus as bus_module
from hostler_common import db, logs
from hostler_common.bus import Bus, Message

log = logs.get(__name__)

RELAY_BATCH = 200
POLL_SECONDS = 0.5
MEASURE_SECONDS = 5.0

# what pamqp raises where no frame can be made of a message: a key of more than 255 bytes, a number without a type
_UNENCODABLE = (TypeError, ValueError, OverflowError, struct.error)
UNROUTABLE_SECONDS = 60.0


async def add(connection: db.Connection, messages: Sequence[Message]) -> None:
    """The messages will be published if, and only if, the connection's transaction commits."""
    await connection.executemany(
        "INSERT INTO outbox (exchange, routing_key, properties, body) VALUES ($1, $2, $3, $4)",
        [(m.exchange, m.routing_key, _properties(m), m.body) for m in messages],
    )


def _properties(message: Message) -> dict[str, Any]:
    return {
        "message_id": message.message_id,
        "type": message.type,
        "app_id": message.app_id,
        "content_type": message.content_type,
        "content_encoding": message.content_encoding,
        "headers": dict(message.headers),
        "timestamp": message.timestamp.isoformat() if message.timestamp else None,
        "mandatory": message.mandatory,
    }


def _message(row: asyncpg.Record) -> Message:
    properties = dict(row["properties"])
    timestamp = properties.pop("timestamp")
    return Message(
        exchange=row["exchange"],
        routing_key=row["routing_key"],
        body=row["body"],
        timestamp=datetime.fromisoformat(timestamp) if timestamp else None,
        **properties,
    )


class Relay:
    """Publishes the outbox of one schema. Replicas may run side by side: each row is locked by one of them."""

    def __init__(self, pool: db.Pool, bus: Bus, registry: CollectorRegistry) -> None:
        self._pool = pool
        self._bus = bus
        self._turn = asyncio.Lock()
        self._set_aside_until: dict[int, float] = {}  # row id -> when to try it again
        self._wake = asyncio.Event()
        self._waiting = Gauge(
            "hostler_outbox_messages", "Messages that wait to be published.", registry=registry
        )

    async def run(self) -> None:
        """Publish what is committed, in order of commit as far as one replica can tell, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._listen())
            await self._run()

    async def _run(self) -> None:
        failing, measured = False, float("-inf")
        while True:
            self._wake.clear()
            try:
                more = await self.publish_some()
                if failing:
                    log.info("outbox_recovered")
                failing = False
            except (bus_module.BrokerUnavailable, db.DatabaseUnavailable) as exc:
                if not failing:
                    log.warning("outbox_waits", reason=exc.detail)
                failing, more = True, False
            if time.monotonic() - measured > MEASURE_SECONDS:
                await self._measure()
                measured = time.monotonic()
            if failing:
                await asyncio.sleep(POLL_SECONDS)  # not at each commit: they may be many
            elif not more:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS):
                        await self._wake.wait()

    async def _listen(self) -> None:
        """Wake `run` at each commit that adds rows, whenever there is a connection to hear of it on."""
        while True:
            with contextlib.suppress(db.DatabaseUnavailable):
                async with db.connection(self._pool) as connection:
                    await self._listen_on(connection)
            await asyncio.sleep(POLL_SECONDS)

    async def _listen_on(self, connection: db.Connection) -> None:
        lost = asyncio.Event()

        def heard(*_: object) -> None:
            self._wake.set()

        connection.add_termination_listener(lambda _: lost.set())
        channel = f"{await connection.fetchval('SELECT current_schema()')}.outbox"
        await connection.add_listener(channel, heard)
        self._wake.set()  # what was committed before is announced to nobody any more
        try:
            await lost.wait()
        finally:
            if not connection.is_closed():
                await connection.remove_listener(channel, heard)

    async def _measure(self) -> None:
        """How many rows wait, broker or no broker; a database that is away is `publish_some`'s to say."""
        with contextlib.suppress(db.DatabaseUnavailable):
            async with db.connection(self._pool) as connection:
                self._waiting.set(await connection.fetchval("SELECT count(*) FROM outbox"))

    async def publish_some(self) -> bool:
        """Publish and delete up to `RELAY_BATCH` rows; True if there may be more.

        Raises:
            BrokerUnavailable, DatabaseUnavailable: nothing was deleted, all of it is published again later.
        """
        async with (
            self._turn,
            db.transaction(self._pool) as connection,
        ):  # `flush` waits for `run`'s turn
            rows = await connection.fetch(
                "SELECT id, exchange, routing_key, properties, body FROM outbox WHERE id <> ALL($2)"
                " ORDER BY id LIMIT $1 FOR UPDATE SKIP LOCKED",
                RELAY_BATCH,
                self._set_aside(),
            )
            if rows:
                published = await self._publish(rows)
                await connection.execute("DELETE FROM outbox WHERE id = ANY($1)", published)
        return len(rows) == RELAY_BATCH

    def _set_aside(self) -> list[int]:
        """Rows that could not be published lately: they wait, so that any number of them holds up nothing else."""
        now = time.monotonic()
        self._set_aside_until = {
            row: until for row, until in self._set_aside_until.items() if until > now
        }
        return list(self._set_aside_until)

    async def _publish(self, rows: Sequence[asyncpg.Record]) -> list[int]:
        outcomes = await asyncio.gather(
            *(self._bus.publish(_message(row)) for row in rows), return_exceptions=True
        )
        published, failed = [], 0
        for row, outcome in zip(rows, outcomes, strict=True):
            if outcome is None:
                published.append(row["id"])
            elif isinstance(outcome, bus_module.Unroutable):
                # its queue is gone for good or not there yet: it stays, and the log says so
                log.warning("outbox_unroutable", routing_key=row["routing_key"])
                self._set_aside_until[row["id"]] = time.monotonic() + UNROUTABLE_SECONDS
            elif isinstance(outcome, bus_module.BrokerUnavailable):
                failed += 1
            elif isinstance(outcome, _UNENCODABLE):
                # it may hold up nothing else, and least of all every start of the process
                log.error("outbox_unpublishable", row=row["id"], exc_info=outcome)
                self._set_aside_until[row["id"]] = time.monotonic() + UNROUTABLE_SECONDS
            else:
                raise outcome
        if failed == len(rows):
            raise bus_module.BrokerUnavailable("no message of the outbox was confirmed")
        return published

    async def flush(self) -> None:
        """Publish until the outbox is empty, or the broker is away."""
        try:
            while await self.publish_some():
                pass
        except (bus_module.BrokerUnavailable, db.DatabaseUnavailable) as exc:
            log.warning("outbox_not_flushed", reason=exc.detail)
