"""What the tests of the shared library build on: an example service's package, schema, HTTP server and processes."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import aio_pika
import httpx
import pytest
import pytest_asyncio
import structlog
from aio_pika.abc import AbstractIncomingMessage, AbstractQueue
from fastapi import FastAPI

from hostler_common import db, http, logs, servers
from hostler_common.settings import Settings

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def example_package(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an importable package with migrations and templates."""
    monkeypatch.syspath_prepend(HERE)
    return "hostler_example"


@pytest.fixture(autouse=True)
def json_logs() -> Iterator[None]:
    """Logs as a service writes them, to this test's stdout; afterwards they are as they were."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    logs.configure(service="example", log_format="json")
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


@pytest.fixture
def schema() -> str:
    """A schema of the test's own: sooner made than a database."""
    return f"example_{uuid.uuid4().hex[:12]}"


@pytest_asyncio.fixture
async def pool(
    postgres: servers.Postgres, schema: str, example_package: str
) -> AsyncIterator[db.Pool]:
    """A pool on the example service's migrated tables, in a schema of the test's own."""
    await db.migrate(postgres.url, schema=schema, package=example_package)
    async with db.open_pool(postgres.url, schema=schema) as opened:
        yield opened


@dataclass
class Inbox:
    """A queue of the test's own that takes every event of exchange ``hostler``."""

    queue: AbstractQueue

    async def take(self) -> list[AbstractIncomingMessage]:
        """All that is in it now, acked."""
        found = []
        while (message := await self.queue.get(fail=False)) is not None:
            await message.ack()
            found.append(message)
        return found


@pytest_asyncio.fixture
async def inbox(amqp_url: str) -> AsyncIterator[Inbox]:
    """What was published to exchange ``hostler``, on a connection that no fault of the test touches."""
    connection = await aio_pika.connect(amqp_url)
    async with connection:
        channel = await connection.channel()
        await channel.declare_exchange("hostler", "topic", durable=True)
        queue = await channel.declare_queue("inbox", durable=True)
        await queue.bind("hostler", "#")
        yield Inbox(queue)


class Wire:
    """The way to the broker, which the test can cut and mend."""

    def __init__(self, url: str) -> None:
        target = urlsplit(url)
        self._target = (target.hostname, target.port)
        self._server: asyncio.Server | None = None
        self._ends: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self.port = servers.free_port()
        self.url = url.replace(f":{target.port}", f":{self.port}")

    async def mend(self) -> None:
        """Connections are taken and go through."""
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", self.port)

    async def cut(self) -> None:
        """Every connection is gone without a word, and new ones are refused."""
        if self._server is not None:
            self._server.close()
        for end in self._ends:
            end.transport.abort()
        await asyncio.gather(*self._pumps)
        self._ends.clear()
        self._server = None

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(*self._target)
        self._ends |= {writer, far_writer}
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            pump = asyncio.create_task(self._pump(source, sink))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        except OSError:
            sink.transport.abort()
        else:
            sink.close()


@pytest_asyncio.fixture
async def wire(amqp_url: str) -> AsyncIterator[Wire]:
    """A mended way to the test's vhost."""
    made = Wire(amqp_url)
    await made.mend()
    yield made
    await made.cut()


Serving = Callable[[FastAPI, Settings], AbstractAsyncContextManager[httpx.AsyncClient]]


@pytest.fixture
def serving() -> Serving:
    """Serves an app on a free port, and gives a client of it."""

    @asynccontextmanager
    async def serve(app: FastAPI, settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
        server = http.Server(app, settings)
        running = asyncio.create_task(server.run())
        try:
            async with httpx.AsyncClient(
                base_url=f"http://127.0.0.1:{server.port}", trust_env=False
            ) as client:
                yield client
        finally:
            await server.drain()
            await running

    return serve


@dataclass
class Program:
    """A real process of ours, with its output on files."""

    process: subprocess.Popen[bytes]
    stdout: Path
    stderr: Path

    @property
    def out(self) -> str:
        """What it has written to stdout so far."""
        return self.stdout.read_text()

    @property
    def err(self) -> str:
        """What it has written to stderr so far."""
        return self.stderr.read_text()

    async def ended(self, seconds: float = 40.0) -> int:
        """Its exit code, once it has ended."""
        return await asyncio.to_thread(self.process.wait, seconds)

    async def has_logged(self, event: str) -> bool:
        """Whether the line is in its log; for `eventually`."""
        if self.process.poll() is not None:
            raise AssertionError(f"it ended with {self.process.returncode}: {self.out}{self.err}")
        return f'"event": "{event}"' in self.out

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.process.send_signal(signal.SIGTERM)


@dataclass
class Programs:
    """Starts processes with an environment of exactly the given settings."""

    directory: Path
    sources: Path = HERE / "programs"
    started: list[Program] = field(default_factory=list)

    def start(self, *argv: str | Path, **environment: str) -> Program:
        """Run a program, by its file in `programs` or its path, with these environment variables."""
        number = len(self.started)
        stdout, stderr = self.directory / f"{number}.out", self.directory / f"{number}.err"
        with stdout.open("wb") as out, stderr.open("wb") as err:
            process = subprocess.Popen(
                [str(part) for part in argv],
                env=self.environment(environment),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )
        program = Program(process, stdout, stderr)
        self.started.append(program)
        return program

    def example(self, *arguments: str, **environment: str) -> Program:
        """The example service's command line."""
        return self.start(
            sys.executable, self.sources / "example_service.py", *arguments, **environment
        )

    def environment(self, more: Mapping[str, str]) -> dict[str, str]:
        """No setting of the machine leaks in."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HOSTLER_")}
        paths = [more.get("PYTHONPATH"), str(HERE), kept.get("PYTHONPATH")]
        path = os.pathsep.join(each for each in paths if each)
        return {**kept, "HOSTLER_LOG_FORMAT": "json", **more, "PYTHONPATH": path}


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    """Real processes, killed at the end of the test if they still run."""
    directory = tmp_path / "programs"
    directory.mkdir()
    running = Programs(directory)
    yield running
    for program in running.started:
        if program.process.poll() is None:
            program.process.kill()
        program.process.wait()
