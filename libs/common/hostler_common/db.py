"""PostgreSQL: the pool, transactions, singletons and migrations. One schema a service, set as the search path.

asyncpg's exceptions do not leave this module and the services' ``store`` modules: a database that is away is
`DatabaseUnavailable`, which consumers answer by waiting in place and HTTP by 503.
"""

import asyncio
import hashlib
import json
import re
import zlib
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from importlib import resources
from typing import TypeAlias

import asyncpg

from hostler_common import errors, logs

log = logs.get(__name__)

Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"
Connection: TypeAlias = (
    "asyncpg.Connection[asyncpg.Record] | asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"
)

ACQUIRE_SECONDS = 10.0
COMMAND_SECONDS = 60.0
MIGRATION_SECONDS = 24 * 3600.0


class DatabaseUnavailable(errors.Unavailable):
    """PostgreSQL cannot be reached, is starting or shutting down, or has no connection, memory or disk to spare."""

    code = "database.unavailable"


class DatabaseBusy(DatabaseUnavailable):
    """Another transaction was in the way for too long, or each was in the other's; try again."""

    code = "database.busy"


class Unstorable(errors.Invalid):
    """A text holds a NUL character, or a number is beyond the column's range."""

    code = "request.unstorable"


class MigrationError(errors.HostlerError):
    """The database's schema is not what this version of the service expects."""

    code = "database.migration"


_AWAY = (
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.ReadOnlySQLTransactionError,
    ConnectionError,
    OSError,
    TimeoutError,
)


_SHORT = (
    asyncpg.InsufficientResourcesError,  # the disk is full, no memory, no connection
    asyncpg.PostgresSystemError,  # the disk cannot be read or written
)


_BUSY = (
    asyncpg.LockNotAvailableError,
    asyncpg.DeadlockDetectedError,
    asyncpg.SerializationError,
)


_UNSTORABLE = (
    asyncpg.CharacterNotInRepertoireError,
    asyncpg.UntranslatableCharacterError,
    asyncpg.NumericValueOutOfRangeError,
)


@contextmanager
def translated() -> Iterator[None]:
    """Inside, a database that is away is `DatabaseUnavailable`, and one whose rows are locked is `DatabaseBusy`.

    A value that no column could hold is `Unstorable`. Every other error passes unchanged.
    """
    try:
        yield
    except _SHORT as exc:
        raise DatabaseUnavailable(
            "the database has no disk, memory or connection to spare"
        ) from exc
    except _AWAY as exc:
        raise DatabaseUnavailable("the database cannot be reached") from exc
    except asyncpg.DataError as exc:
        # the class itself is asyncpg's own check of an argument; of its children, some are the statement's faults
        if type(exc) is asyncpg.DataError or isinstance(exc, _UNSTORABLE):
            raise Unstorable("a value is none that the database can hold") from exc
        raise
    except _BUSY as exc:
        raise DatabaseBusy("another transaction is in the way") from exc
    except asyncpg.InvalidAuthorizationSpecificationError as exc:
        raise DatabaseUnavailable("the database refuses our user or password") from exc
    except asyncpg.InvalidCatalogNameError as exc:
        raise DatabaseUnavailable("the server has no database of that name") from exc
    except asyncpg.InterfaceError as exc:
        # asyncpg has no class of its own for "the connection went away under the statement"
        if re.search(r"clos|terminat|releas", str(exc)):
            raise DatabaseUnavailable("the database cannot be reached") from exc
        raise
    except asyncpg.InternalClientError as exc:
        # a statement between the server's last word, which nobody asked for, and the end of the connection
        raise DatabaseUnavailable("the database is closing the connection") from exc


async def _prepare(connection: "asyncpg.Connection[asyncpg.Record]") -> None:
    for kind in ("json", "jsonb"):
        await connection.set_type_codec(
            kind, encoder=json.dumps, decoder=json.loads, schema="pg_catalog"
        )


@asynccontextmanager
async def open_pool(
    url: str, *, schema: str, max_size: int = 10, patience_seconds: float = 30.0
) -> AsyncIterator[Pool]:
    """A pool whose connections see ``schema`` first; closed on leaving.

    A database that is not up yet is waited for, for at most ``patience_seconds``.

    Raises:
        DatabaseUnavailable: it did not answer in that time.
    """
    deadline = asyncio.get_running_loop().time() + patience_seconds
    delay = 0.2
    while True:
        try:
            with translated():
                pool = await asyncpg.create_pool(
                    url,
                    min_size=1,
                    max_size=max_size,
                    init=_prepare,
                    command_timeout=COMMAND_SECONDS,
                    max_inactive_connection_lifetime=300,
                    server_settings={
                        "application_name": f"hostler-{schema}",
                        "search_path": schema,
                        "timezone": "UTC",
                        "lock_timeout": "10s",
                        "idle_in_transaction_session_timeout": "60s",
                    },
                )
            break
        except DatabaseUnavailable:
            if asyncio.get_running_loop().time() + delay > deadline:
                raise
            log.info("database_awaited", schema=schema)
            await asyncio.sleep(delay)
            delay = min(delay * 2, 2.0)
    try:
        yield pool
    finally:
        try:
            async with asyncio.timeout(5):
                await pool.close()
        except TimeoutError:
            pool.terminate()


@asynccontextmanager
async def connection(pool: Pool) -> AsyncIterator[Connection]:
    """A connection of the pool, for reads that need no transaction.

    Raises:
        DatabaseUnavailable: the database is away, or no connection came free in time.
    """
    with translated():
        async with pool.acquire(timeout=ACQUIRE_SECONDS) as acquired:
            yield acquired


@asynccontextmanager
async def transaction(pool: Pool) -> AsyncIterator[Connection]:
    """A connection of the pool inside a transaction that commits on leaving, or rolls back on an exception.

    Raises:
        DatabaseUnavailable: the database is away; whether the commit happened is then unknown.
    """
    async with connection(pool) as acquired, acquired.transaction():
        yield acquired


@asynccontextmanager
async def singleton(pool: Pool, name: str) -> AsyncIterator[bool]:
    """Whether this process is the one that may do ``name`` now: an advisory lock held until leaving.

    The lock belongs to a connection of its own, so it is gone when the process or the database is.

    Raises:
        DatabaseUnavailable: the database is away; or, on leaving, the lock was lost meanwhile with its connection.
    """
    key = _lock_key(name)
    async with connection(pool) as acquired:
        held = bool(await acquired.fetchval("SELECT pg_try_advisory_lock($1)", key))
        try:
            yield held
        finally:
            if held and not acquired.is_closed():
                await acquired.execute("SELECT pg_advisory_unlock($1)", key)


def _lock_key(name: str) -> int:
    return zlib.crc32(name.encode()) | (0x686F << 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """One numbered SQL file of a package."""

    component: str
    version: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        """sha256 of the file's text, in hex."""
        return hashlib.sha256(self.sql.encode()).hexdigest()


def migrations_of(package: str) -> list[Migration]:
    """The ``migrations/NNNN_name.sql`` files of hostler_common, then those of the package, in order."""
    found = []
    for component in ("hostler_common", package):
        directory = resources.files(component) / "migrations"
        files = sorted(
            (f for f in directory.iterdir() if f.name.endswith(".sql")), key=lambda f: f.name
        )
        for file in files:
            number, _, name = file.name.removesuffix(".sql").partition("_")
            sql = file.read_text(encoding="utf-8")
            found.append(Migration(component=component, version=int(number), name=name, sql=sql))
    return found


async def pending(pool: Pool, *, package: str) -> list[Migration]:
    """The migrations that the database still lacks.

    Raises:
        MigrationError: an applied file was changed afterwards, or the database is newer than this program.
    """
    async with connection(pool) as acquired:
        exists = await acquired.fetchval("SELECT to_regclass('schema_migrations') IS NOT NULL")
        rows = (
            await acquired.fetch("SELECT component, version, checksum FROM schema_migrations")
            if exists
            else []
        )
    return _pending(migrations_of(package), rows)


def _pending(wanted: Sequence[Migration], rows: Sequence[asyncpg.Record]) -> list[Migration]:
    applied = {(row["component"], row["version"]): row["checksum"] for row in rows}
    unknown = applied.keys() - {(m.component, m.version) for m in wanted}
    if unknown:
        raise MigrationError(f"the database is newer than this program: it has {sorted(unknown)}")
    for migration in wanted:
        checksum = applied.get((migration.component, migration.version))
        if checksum not in (None, migration.checksum):
            raise MigrationError(
                f"{migration.component} migration {migration.version:04} ({migration.name}) was changed after it was"
                " applied: restore the file and add a new migration instead"
            )
    return [m for m in wanted if (m.component, m.version) not in applied]


async def migrate(url: str, *, schema: str, package: str) -> list[Migration]:
    """Bring the schema to this program's version; return what was applied, possibly nothing.

    Several processes may call it at once: an advisory lock lets one work and the others find nothing left. Each file
    is one transaction, so a failing file leaves the schema at the file before it.

    Raises:
        MigrationError: see `pending`; or a file failed, with PostgreSQL's message.
        DatabaseUnavailable: the database did not answer.
    """
    async with open_pool(url, schema=schema, max_size=2) as pool, connection(pool) as acquired:
        # another process's migrations may take long, and ours are not to fail meanwhile
        await acquired.execute("SET lock_timeout = 0")
        await acquired.execute(
            "SELECT pg_advisory_lock($1)",
            _lock_key(f"migrate.{schema}"),
            timeout=MIGRATION_SECONDS,
        )
        await acquired.execute("SET lock_timeout = '60s'")
        try:
            await acquired.execute(f'CREATE SCHEMA IF NOT EXISTS "{schema}"')
            await acquired.execute(
                "CREATE TABLE IF NOT EXISTS schema_migrations (component text, version integer, name text NOT NULL,"
                " checksum text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now(),"
                " PRIMARY KEY (component, version))"
            )
            rows = await acquired.fetch(
                "SELECT component, version, checksum FROM schema_migrations"
            )
            todo = _pending(migrations_of(package), rows)
            for migration in todo:
                await _apply(acquired, migration)
        finally:
            await acquired.execute("SELECT pg_advisory_unlock($1)", _lock_key(f"migrate.{schema}"))
    return todo


async def _apply(acquired: Connection, migration: Migration) -> None:
    try:
        async with acquired.transaction():
            await acquired.execute(migration.sql, timeout=MIGRATION_SECONDS)
            await acquired.execute(
                "INSERT INTO schema_migrations (component, version, name, checksum) VALUES ($1, $2, $3, $4)",
                migration.component,
                migration.version,
                migration.name,
                migration.checksum,
            )
    except asyncpg.PostgresError as exc:
        file = f"{migration.component}/migrations/{migration.version:04}_{migration.name}.sql"
        raise MigrationError(f"{file}: {exc}") from exc
    log.info(
        "migration_applied",
        component=migration.component,
        version=migration.version,
        name=migration.name,
    )
