"""The pytest plugin of the suite: real, private servers, and everything fresh for each test.

One PostgreSQL and one RabbitMQ a session, started when the first test asks for them. ``database_url`` is a database of
the test's own, ``amqp_url`` a vhost of its own. Tests that stop or kill a server take ``own_postgres`` or
``own_rabbitmq``, which nobody else uses.
"""

import asyncio
import itertools
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import asyncpg
import hypothesis
import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from hostler_common import bus, client, db, errors, servers, settings
from hostler_common.bus import Bus, BusMetrics

# no timed asserts: how long an example takes says how busy the machine is
hypothesis.settings.register_profile("hostler", deadline=None)
hypothesis.settings.load_profile("hostler")

_serial = itertools.count(1)
SettingsT = TypeVar("SettingsT", bound=settings.Settings)


@pytest.fixture(scope="session")
def server_directory() -> Iterator[Path]:
    """A directory for servers' data that any user can reach, removed at the end of the session."""
    directory = Path(tempfile.mkdtemp(prefix="hostler-test-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres(server_directory: Path) -> Iterator[servers.Postgres]:
    """The session's PostgreSQL server: do not stop it, see ``own_postgres``."""
    server = servers.Postgres(server_directory / "postgres")
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def rabbitmq(server_directory: Path) -> Iterator[servers.RabbitMQ]:
    """The session's RabbitMQ node: do not stop it, see ``own_rabbitmq``."""
    server = servers.RabbitMQ(server_directory / "rabbitmq")
    server.start()
    yield server
    server.close()


@pytest.fixture
def own_postgres(server_directory: Path) -> Iterator[servers.Postgres]:
    """A PostgreSQL server that the test may stop, kill and start."""
    server = servers.Postgres(server_directory / f"postgres-{next(_serial)}")
    server.start()
    yield server
    server.kill()


@pytest.fixture
def own_rabbitmq(server_directory: Path) -> Iterator[servers.RabbitMQ]:
    """A RabbitMQ node that the test may stop, kill and start."""
    server = servers.RabbitMQ(server_directory / f"rabbitmq-{next(_serial)}")
    server.start()
    yield server
    server.close()


@pytest_asyncio.fixture
async def database_url(postgres: servers.Postgres) -> AsyncIterator[str]:
    """An empty database of the test's own."""
    name = f"test_{next(_serial)}"
    admin = await asyncpg.connect(postgres.url)
    try:
        await admin.execute(f"CREATE DATABASE {name}")
        yield postgres.url.rsplit("/", 1)[0] + f"/{name}"
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await admin.close()


@pytest.fixture
def amqp_url(rabbitmq: servers.RabbitMQ) -> Iterator[str]:
    """A vhost of the test's own, as an address."""
    name = f"test-{next(_serial)}"
    yield rabbitmq.make_vhost(name)
    rabbitmq.delete_vhost(name)


@asynccontextmanager
async def open_bus(url: str, *subscriptions: bus.Subscription) -> AsyncIterator[Bus]:
    """A running bus with its consumers, drained on leaving: a client for tests and the demo."""
    opened = Bus(SecretStr(url), name="test", metrics=BusMetrics(CollectorRegistry()))
    for subscription in subscriptions:
        opened.consume(subscription)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(opened.run())
        await opened.wait_up(60)
        try:
            yield opened
        finally:
            await opened.drain()
            running.cancel()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningService:
    """A service in this process."""

    url: str
    api: client.Api
    settings: Any
    stop: asyncio.Event


class Serve(Protocol):
    """What ``app.serve`` of every service is."""

    def __call__(
        self,
        settings: Any,  # noqa: ANN401  each service's own type
        *,
        stop: asyncio.Event | None = None,
    ) -> Awaitable[None]:
        """Run until stopped."""


RunService = Callable[..., AbstractAsyncContextManager[RunningService]]


@pytest.fixture
def run_service(amqp_url: str, database_url: str) -> RunService:
    """Runs a service in this process: use it as ``async with``, and talk to what it yields.

    The service runs on the test's own vhost and database, migrated, ready, on a free port, with auth off; leaving
    drains it.
    """

    @asynccontextmanager
    async def run(
        serve: Serve,
        settings_type: type[SettingsT],
        package: str,
        **overrides: Any,  # noqa: ANN401
    ) -> AsyncIterator[RunningService]:
        values = {
            "amqp_url": amqp_url,
            "database_url": database_url,
            "http_port": servers.free_port(),
            "auth_mode": "none",
            "log_format": "json",
            "drain_seconds": 10.0,
            **overrides,
        }
        loaded = settings.load(settings_type, **values)
        url = loaded.database_url.get_secret_value()
        await db.migrate(url, schema=loaded.service, package=package)
        stop = asyncio.Event()
        task = asyncio.create_task(_as_coroutine(serve(loaded, stop=stop)))
        address = f"http://127.0.0.1:{loaded.http_port}"
        async with client.open_api(address) as api:
            try:
                await wait_ready(address, task)
                yield RunningService(url=address, api=api, settings=loaded, stop=stop)
            finally:
                stop.set()
                await task

    return run


async def _as_coroutine(work: Awaitable[None]) -> None:
    await work


async def wait_ready(
    url: str, task: "asyncio.Task[None] | None" = None, seconds: float = 60.0
) -> None:
    """Return when the service at ``url`` is ready.

    Raises:
        TimeoutError: it did not become ready; the last answer is in the message.
    """
    deadline = time.monotonic() + seconds
    last = "no answer"
    async with client.open_api(url) as api:
        while time.monotonic() < deadline:
            if task is not None and task.done():
                task.result()
                raise RuntimeError("the service ended before it was ready")
            try:
                await api.get("/readyz")
                return
            except errors.HostlerError as exc:
                last = f"{exc.detail} {dict(exc.fields)}"
            await asyncio.sleep(0.05)
    raise TimeoutError(f"{url} is not ready: {last}")


async def eventually(
    holds: Callable[[], Awaitable[Any]], *, seconds: float = 60.0, every_seconds: float = 0.05
) -> Any:  # noqa: ANN401  what the callable gives
    """The first true value that ``holds`` gives.

    Raises:
        TimeoutError: it gave none in time; the last value is in the message.
    """
    deadline = time.monotonic() + seconds
    while True:
        value = await holds()
        if value:
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"it did not happen within {seconds:g} s; last: {value!r}")
        await asyncio.sleep(every_seconds)
