"""The process of a service: a `runtime.Process` with a database, an outbox and an HTTP server.

Its drain ends requests after consumers and loops, and flushes the outbox last, so that what the last request wrote is
published too.
"""

import asyncio

from fastapi import FastAPI

from hostler_common import db, errors, http, outbox, runtime
from hostler_common.bus import Bus
from hostler_common.settings import Settings


class ServiceProcess(runtime.Process):
    """A service, from start to drained. Use as an async context manager, then `run`."""

    def __init__(self, settings: Settings, *, stop: asyncio.Event | None = None) -> None:
        super().__init__(settings, stop=stop)
        self._settings = settings
        self._relay: outbox.Relay | None = None
        self._server: http.Server | None = None
        self._serving: asyncio.Task[None] | None = None

    async def open_pool(self, *, package: str) -> db.Pool:
        """The service's database, migrated to this program's version; closed at the end.

        Raises:
            DatabaseUnavailable: it does not answer.
            MigrationError: it needs ``migrate`` first, or is newer than this program.
        """
        settings = self._settings
        pool = await self.resources.enter_async_context(
            db.open_pool(
                settings.database_url.get_secret_value(),
                schema=settings.service,
                max_size=settings.database_pool_size,
            )
        )
        lacking = await db.pending(pool, package=package)
        if lacking:
            raise db.MigrationError(
                f"the database lacks {len(lacking)} migrations: run 'hostler-{settings.service} migrate' first"
            )

        async def answers() -> tuple[bool, str]:
            try:
                async with db.connection(pool) as connection:
                    await connection.fetchval("SELECT 1")
            except errors.Unavailable as exc:
                return False, exc.detail
            return True, "answers"

        self.health.check("database", answers)
        return pool

    def relay_outbox(self, pool: db.Pool, bus: Bus) -> None:
        """Publish the schema's outbox, and flush it when draining."""
        self._relay = outbox.Relay(pool, bus, self.registry)
        self.spawn(self._relay.run(), name="outbox")

    def serve_http(self, app: FastAPI) -> http.Server:
        """Serve the app from now on, until draining.

        Raises:
            PortUnavailable: the port is taken or may not be bound.
        """
        self._server = http.Server(app, self._settings)
        self._serving = self.spawn(self._server.run(), name="http")
        return self._server

    async def drain(self) -> None:
        """See `runtime.Process.drain`; requests are answered too, and the outbox is published."""
        await super().drain()
        if self._server is not None and self._serving is not None:
            await self._server.drain()
            await asyncio.wait([self._serving])
        if self._relay is not None:
            await self._relay.flush()
