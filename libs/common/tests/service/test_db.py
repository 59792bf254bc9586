"""Pool, transactions, singletons and migrations on a real PostgreSQL."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import asyncpg
import pytest

from hostler_common import db, errors, servers

Package = Callable[[dict[str, str]], str]
FIRST = "CREATE TABLE first (n integer);"
SECOND = "CREATE TABLE second (n integer); INSERT INTO second VALUES (1);"


@pytest.fixture
def package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Package:
    """Makes a package with these migrations, or gives the one it made these instead."""
    name = f"migrated_{abs(hash(request.node.nodeid))}"
    monkeypatch.syspath_prepend(tmp_path)

    def make(migrations: dict[str, str]) -> str:
        directory = tmp_path / name / "migrations"
        directory.mkdir(parents=True, exist_ok=True)
        (directory.parent / "__init__.py").touch()
        for old in directory.glob("*.sql"):
            old.unlink()
        for file, sql in migrations.items():
            (directory / file).write_text(sql)
        return name

    return make


async def tables(url: str, schema: str = "example") -> set[str]:
    connection = await asyncpg.connect(url)
    try:
        rows = await connection.fetch(
            "SELECT table_name FROM information_schema.tables WHERE table_schema = $1", schema
        )
    finally:
        await connection.close()
    return {row["table_name"] for row in rows}


async def test_the_commons_tables_and_the_services_are_made_in_the_services_schema(
    database_url: str, package: Package
) -> None:
    name = package({"0001_first.sql": FIRST, "0002_second.sql": SECOND})
    applied = await db.migrate(database_url, schema="example", package=name)
    assert applied == db.migrations_of(name)
    assert [(m.component, m.name) for m in applied[:1]] == [("hostler_common", "common")]
    assert [(m.component, m.version) for m in applied[-2:]] == [(name, 1), (name, 2)]
    assert {"outbox", "quarantine", "idempotency_key", "first", "second"} < await tables(
        database_url
    )
    assert await tables(database_url, "public") == set()


async def test_migrating_from_several_processes_at_once_applies_each_file_once(
    database_url: str, package: Package
) -> None:
    name = package({"0001_first.sql": FIRST, "0002_second.sql": SECOND})
    applied = await asyncio.gather(
        *(db.migrate(database_url, schema="example", package=name) for _ in range(5))
    )
    wanted = db.migrations_of(name)
    assert sorted(applied, key=len) == [[], [], [], [], wanted]
    connection = await asyncpg.connect(database_url)
    assert await connection.fetchval("SELECT count(*) FROM example.second") == 1
    assert await connection.fetchval("SELECT count(*) FROM example.schema_migrations") == len(
        wanted
    )
    await connection.close()


async def test_two_services_share_a_database_each_in_its_schema(
    database_url: str, package: Package
) -> None:
    name = package({"0001_first.sql": FIRST})
    await asyncio.gather(
        *(db.migrate(database_url, schema=schema, package=name) for schema in ("one", "two"))
    )
    assert await tables(database_url, "one") == await tables(database_url, "two")


async def test_pending_says_what_a_database_lacks_and_touches_nothing(
    database_url: str, package: Package
) -> None:
    name = package({"0001_first.sql": FIRST})
    async with db.open_pool(database_url, schema="example") as pool:
        assert await db.pending(pool, package=name) == db.migrations_of(name)
        assert await tables(database_url) == set()
        await db.migrate(database_url, schema="example", package=name)
        assert await db.pending(pool, package=name) == []


async def test_a_file_that_was_changed_after_it_was_applied_is_refused(
    database_url: str, package: Package
) -> None:
    name = package({"0001_first.sql": FIRST})
    await db.migrate(database_url, schema="example", package=name)
    package({"0001_first.sql": FIRST + " -- a comment"})
    with pytest.raises(db.MigrationError, match=r"0001 \(first\) was changed"):
        await db.migrate(database_url, schema="example", package=name)


async def test_a_database_that_is_newer_than_the_program_is_refused(
    database_url: str, package: Package
) -> None:
    name = package({"0001_first.sql": FIRST, "0002_second.sql": SECOND})
    await db.migrate(database_url, schema="example", package=name)
    package({"0001_first.sql": FIRST})
    with pytest.raises(db.MigrationError, match="newer than this program"):
        await db.migrate(database_url, schema="example", package=name)
    async with db.open_pool(database_url, schema="example") as pool:
        with pytest.raises(db.MigrationError, match="newer than this program"):
            await db.pending(pool, package=name)


async def test_a_failing_file_leaves_the_schema_at_the_file_before_it(
    database_url: str, package: Package
) -> None:
    files = {"0001_first.sql": FIRST, "0002_second.sql": SECOND + " SELECT nonsense();"}
    name = package(files)
    with pytest.raises(db.MigrationError, match=r"0002_second\.sql: function nonsense"):
        await db.migrate(database_url, schema="example", package=name)
    assert "first" in await tables(database_url)
    assert "second" not in await tables(database_url)
    package({**files, "0002_second.sql": SECOND})  # never applied, so it may be mended
    applied = await db.migrate(database_url, schema="example", package=name)
    assert [m.name for m in applied] == ["second"]


async def test_a_transaction_commits_on_leaving_and_rolls_back_on_an_exception(
    pool: db.Pool,
) -> None:
    async with db.transaction(pool) as connection:
        await connection.execute("INSERT INTO handled VALUES ('kept', 'x')")

    async def fail() -> None:
        async with db.transaction(pool) as connection:
            await connection.execute("INSERT INTO handled VALUES ('gone', 'x')")
            raise LookupError

    with pytest.raises(LookupError):
        await fail()
    async with db.connection(pool) as connection:
        rows = await connection.fetch("SELECT message_id FROM handled")
    assert [row["message_id"] for row in rows] == ["kept"]


async def test_jsonb_takes_and_gives_python_objects_and_times_are_aware(pool: db.Pool) -> None:
    value = {"a": [1, 2.5, None, "ü"], "b": {"c": True}}
    async with db.connection(pool) as connection:
        assert await connection.fetchval("SELECT $1::jsonb", value) == value
        now = await connection.fetchval("SELECT now()")
    assert now.utcoffset().total_seconds() == 0


async def test_one_of_many_holds_a_singleton_and_its_end_frees_it(
    pool: db.Pool, postgres: servers.Postgres
) -> None:
    async def fail() -> None:
        async with db.singleton(other, "example.fold"):
            raise LookupError

    async with db.open_pool(postgres.url, schema="example") as other:
        async with db.singleton(pool, "example.fold") as first:
            async with db.singleton(other, "example.fold") as second:
                assert (first, second) == (True, False)
            async with db.singleton(other, "example.sweep") as another:
                assert another
        async with db.singleton(other, "example.fold") as freed:
            assert freed
        with pytest.raises(LookupError):
            await fail()
        async with db.singleton(pool, "example.fold") as freed:
            assert freed


async def test_a_singleton_whose_connection_is_lost_is_free_for_others_and_its_holder_told(
    pool: db.Pool, postgres: servers.Postgres
) -> None:
    held: list[bool] = []

    async def hold_and_lose() -> None:
        async with db.singleton(other, "example.fold") as mine:
            held.append(mine)
            async with db.connection(pool) as connection:
                await connection.execute(
                    "SELECT pg_terminate_backend(pid, 5000) FROM pg_locks"
                    " WHERE locktype = 'advisory' AND granted"
                )
            async with db.singleton(pool, "example.fold") as taken_over:
                held.append(taken_over)

    async with db.open_pool(postgres.url, schema="example") as other:
        with pytest.raises(db.DatabaseUnavailable):
            await hold_and_lose()
        async with db.singleton(other, "example.fold") as again:
            held.append(again)
    assert held == [True, True, True]


async def test_a_lock_that_does_not_come_free_is_busy_and_not_a_bug(pool: db.Pool) -> None:
    async def insert() -> None:
        async with db.transaction(pool) as other:
            await other.execute("SET LOCAL lock_timeout = '50ms'")
            await other.execute("INSERT INTO handled VALUES ('a', 'x')")

    async with db.transaction(pool) as holder:
        await holder.execute("LOCK TABLE handled")
        with pytest.raises(db.DatabaseBusy):
            await insert()


async def test_one_of_two_that_lock_each_other_out_is_busy(pool: db.Pool) -> None:
    async with db.transaction(pool) as connection:
        await connection.execute("INSERT INTO handled VALUES ('a', 'x'), ('b', 'x')")
    barrier = asyncio.Barrier(2)

    async def lock(first: str, then: str) -> None:
        async with db.transaction(pool) as connection:
            await connection.execute("SET LOCAL deadlock_timeout = '50ms'")
            for message_id in (first, then):
                await connection.execute(
                    "SELECT 1 FROM handled WHERE message_id = $1 FOR UPDATE", message_id
                )
                if message_id == first:
                    await barrier.wait()

    outcomes = await asyncio.gather(lock("a", "b"), lock("b", "a"), return_exceptions=True)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["DatabaseBusy", "NoneType"]


async def test_errors_that_are_no_outage_pass_unchanged(pool: db.Pool) -> None:
    with pytest.raises(asyncpg.UniqueViolationError):
        async with db.transaction(pool) as connection:
            await connection.execute("INSERT INTO handled VALUES ('a', 'x'), ('a', 'x')")
    with pytest.raises(asyncpg.UndefinedTableError):
        async with db.connection(pool) as connection:
            await connection.execute("SELECT * FROM nothing")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("postgresql://postgres@{host}/no_such_database", "no database of that name"),
        ("postgresql://no_such_user@{host}/postgres", "refuses our user"),
        ("postgresql://postgres:hunter2@127.0.0.1:1/postgres", "cannot be reached"),
    ],
)
async def test_a_database_that_cannot_be_opened_is_unavailable_with_the_reason(
    postgres: servers.Postgres, url: str, reason: str
) -> None:
    with pytest.raises(db.DatabaseUnavailable, match=reason) as caught:
        async with db.open_pool(
            url.format(host=f"127.0.0.1:{postgres.port}"), schema="x", patience_seconds=0
        ):
            pass
    assert "hunter2" not in caught.value.detail


async def test_the_pool_works_again_after_the_server_was_stopped_and_killed(
    own_postgres: servers.Postgres, example_package: str
) -> None:
    await db.migrate(own_postgres.url, schema="example", package=example_package)
    async with db.open_pool(own_postgres.url, schema="example") as pool:

        async def insert(message_id: str) -> None:
            async with db.transaction(pool) as connection:
                await connection.execute("INSERT INTO handled VALUES ($1, 'x')", message_id)

        async def lose(how: Callable[[], None]) -> None:
            async with db.transaction(pool) as connection:
                await connection.execute("INSERT INTO handled VALUES ('lost', 'x')")
                await asyncio.to_thread(how)
                await connection.execute("SELECT 1")

        await insert("before")
        for how in (own_postgres.stop, own_postgres.kill):
            with pytest.raises(db.DatabaseUnavailable):  # under the statement
                await lose(how)
            with pytest.raises(errors.Unavailable):  # with nobody there
                await insert("lost")
            await asyncio.to_thread(own_postgres.start)
            await insert(f"after {how.__name__}")
        async with db.connection(pool) as connection:
            rows = await connection.fetch("SELECT message_id FROM handled ORDER BY 1")
    assert [row["message_id"] for row in rows] == ["after kill", "after stop", "before"]


@pytest.mark.parametrize("value", ["a\0b", 2**70])
async def test_a_value_that_no_column_holds_is_refused_as_the_callers(
    database_url: str, value: object
) -> None:
    kind = "text" if isinstance(value, str) else "bigint"
    async with db.open_pool(database_url, schema="public") as pool:
        with pytest.raises(db.Unstorable):
            async with db.transaction(pool) as connection:
                await connection.fetchval(f"SELECT $1::{kind}", value)


async def test_migrating_waits_for_another_process_longer_than_for_a_statement(
    database_url: str, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = package({"0001_first.sql": FIRST})
    monkeypatch.setattr(db, "COMMAND_SECONDS", 0.5)
    async with db.open_pool(database_url, schema="example") as pool:
        async with db.singleton(pool, "migrate.example") as held:
            assert held
            migrating = asyncio.create_task(
                db.migrate(database_url, schema="example", package=name)
            )
            await asyncio.wait([migrating], timeout=1.5)
            assert not migrating.done()
        assert await migrating == db.migrations_of(name)
