"""What every benchmark needs: private servers, what processes cost, and how figures are said.

A benchmark is one runnable file that measures one claim: our figure beside the peer's and beside the limit, in
turns in one run, because the cores of a shared machine change their speed from one minute to the next. It starts
servers of its own, prints a table for people, and as its last line one JSON object:

    {"bench": name, "figures": {name: number}, "goals": {name: "<= 1.08"}, "met": true | false}

It ends with 0 when a goal is missed, too: a figure is a result, not a failure.
"""

import asyncio
import json
import operator
import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aio_pika
import asyncpg
from aio_pika.abc import AbstractChannel

from hostler_common import servers

ROOT = Path(__file__).resolve().parent.parent
CONFIRMED_AT_ONCE = 500
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_COMPARISONS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


# --- what is said


def say(text: str = "") -> None:
    """A line for people, at once."""
    print(text, flush=True)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Rows for people: the first column to the left, numbers to the right."""
    cells = [list(header), *([_shown(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for number, row in enumerate(cells):
        first, *others = zip(row, widths, strict=True)
        say("  ".join([first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)]))
        if number == 0:
            say("  ".join("-" * width for width in widths))
    say()


def _shown(cell: object) -> str:
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.3g}"
    return f"{cell:,}" if isinstance(cell, int) and not isinstance(cell, bool) else str(cell)


def median(values: Iterable[float]) -> float:
    """The middle one; NaN if there is none."""
    found = list(values)
    return statistics.median(found) if found else float("nan")


def conclude(bench: str, figures: Mapping[str, float | None], goals: Mapping[str, str]) -> None:
    """Print each goal beside its figure, then the JSON object. A goal without a figure is not met."""
    known = {name: round(value, 6) for name, value in figures.items() if value is not None}
    verdicts = {name: name in known and is_met(known[name], goal) for name, goal in goals.items()}
    table(
        ("figure", "value", "goal", "met"),
        [
            (
                name,
                known.get(name, "not measured"),
                goals.get(name, ""),
                ("yes" if verdicts[name] else "NO") if name in verdicts else "",
            )
            for name in dict.fromkeys((*figures, *goals))
        ],
    )
    say(
        json.dumps(
            {
                "bench": bench,
                "figures": known,
                "goals": dict(goals),
                "met": all(verdicts.values()),
            }
        )
    )


def is_met(value: float, goal: str) -> bool:
    """Whether the value is as a goal such as ``<= 1.08`` wants it."""
    comparison, _, bound = goal.partition(" ")
    return _COMPARISONS[comparison](value, float(bound))


# --- servers


@dataclass(slots=True)
class Stage:
    """A private PostgreSQL with fsync on and a private RabbitMQ, and fresh databases and vhosts on them."""

    directory: Path
    postgres: servers.Postgres
    rabbitmq: servers.RabbitMQ | None
    _serial: int = 0

    async def new_database(self) -> str:
        """An empty database; its address. What earlier ones left to write is on the disk."""
        self._serial += 1
        name = f"bench_{self._serial}"
        connection = await asyncpg.connect(self.postgres.url)
        try:
            await connection.execute(f"CREATE DATABASE {name}")
            await connection.execute("CHECKPOINT")
        finally:
            await connection.close()
        return self.postgres.url.rsplit("/", 1)[0] + f"/{name}"

    async def drop_database(self, url: str) -> None:
        """The database and its connections are gone."""
        connection = await asyncpg.connect(self.postgres.url)
        try:
            await connection.execute(f"DROP DATABASE {url.rpartition('/')[2]} WITH (FORCE)")
        finally:
            await connection.close()

    def new_vhost(self) -> str:
        """An empty virtual host; its address."""
        assert self.rabbitmq is not None
        self._serial += 1
        return self.rabbitmq.make_vhost(f"bench-{self._serial}")

    def drop_vhost(self, url: str) -> None:
        """The virtual host and its queues are gone."""
        assert self.rabbitmq is not None
        self.rabbitmq.delete_vhost(url.rpartition("/")[2])

    def new_directory(self) -> Path:
        """Where a program may keep what it likes; it does not exist yet."""
        self._serial += 1
        return self.directory / f"work-{self._serial}"

    def log_file(self, name: str) -> Path:
        """Where a process of the benchmark writes."""
        return self.directory / f"{name}.log"


@contextmanager
def stage(*, broker: bool = True) -> Iterator[Stage]:
    """Servers of one's own, gone with all their data in the end.

    PostgreSQL is as its packagers configure it, but remembers when each transaction was committed: with that the
    rates of two programs are measured by the same clock and without asking while they run.
    """
    directory = Path(tempfile.mkdtemp(prefix="hostler-bench-"))
    directory.chmod(0o755)
    postgres = servers.Postgres(directory / "postgres", durable=True)
    rabbitmq = servers.RabbitMQ(directory / "rabbitmq") if broker else None
    # told to end, it ends as on Ctrl-C: the servers never stay behind
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        postgres.start()
        asyncio.run(_execute(postgres.url, "ALTER SYSTEM SET track_commit_timestamp = on"))
        postgres.stop()
        postgres.start()
        if rabbitmq is not None:
            rabbitmq.start()
        yield Stage(directory, postgres, rabbitmq)
    finally:
        postgres.kill()
        if rabbitmq is not None:
            rabbitmq.close()
        shutil.rmtree(directory, ignore_errors=True)


async def _execute(url: str, statement: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


@asynccontextmanager
async def channel(amqp_url: str) -> AsyncIterator[AbstractChannel]:
    """A channel with publisher confirms on a connection of its own."""
    async with await aio_pika.connect(amqp_url) as connection:
        yield await connection.channel(publisher_confirms=True)


async def publish(
    channel: AbstractChannel, exchange: str, routing_key: str, bodies: Iterable[bytes]
) -> int:
    """Every body is in every queue it is routed to, as its queue's confirms say; how many there were.

    They are persistent, and carry the properties that oslo.messaging's rabbit driver gives.
    """
    target = await channel.get_exchange(exchange, ensure=False)
    waiting: set[asyncio.Task[Any]] = set()
    published = 0
    for body in bodies:
        message = aio_pika.Message(
            body,
            content_type="application/json",
            content_encoding="utf-8",
            priority=0,
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        )
        waiting.add(asyncio.create_task(target.publish(message, routing_key)))
        published += 1
        if len(waiting) >= CONFIRMED_AT_ONCE:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
    await asyncio.gather(*waiting)
    return published


async def depth(channel: AbstractChannel, queue: str) -> int:
    """How many messages of the queue are ready to be delivered."""
    declared = await channel.declare_queue(queue, passive=True)
    return declared.declaration_result.message_count or 0


# --- what processes cost


def busyness() -> str:
    """What else goes on: on a machine that others keep busy, only CPU time a message can be compared."""
    return f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"


def cpu_seconds(pid: int) -> float:
    """User and system time that the process has used; 0 if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0.0
    fields = text.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND


def rss_mb(pid: int, line: str = "VmHWM") -> float:
    """The most memory that the process has ever held (or, with VmRSS, holds), in units of 10^6 bytes."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    for entry in text.splitlines():
        if entry.startswith(f"{line}:"):
            return int(entry.split()[1]) * 1024 / 1e6
    return 0.0


def descendants(pid: int) -> list[int]:
    """Its children, and theirs."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            text = (directory / "stat").read_text()
        except OSError:
            continue
        if int(text.rpartition(")")[2].split()[1]) == pid:
            child = int(directory.name)
            found += [child, *descendants(child)]
    return found


def command_line(pid: int) -> str:
    """What the process calls itself."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return ""


@dataclass(slots=True)
class CpuRecord:
    """CPU seconds of named groups of processes over time, sampled until `stop`."""

    groups: Mapping[str, Callable[[], Iterable[int]]]
    every_seconds: float = 0.05
    times: list[float] = field(default_factory=list)
    samples: dict[str, list[float]] = field(default_factory=dict)
    _ended: dict[str, dict[int, float]] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Sampling has begun."""
        self.samples = {name: [] for name in self.groups}
        self._ended = {name: {} for name in self.groups}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Sampling has ended."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self.every_seconds):
            self.times.append(time.time())
            for name, pids in self.groups.items():
                used = self._ended[name]  # what a process had used stays counted when it has ended
                for pid in pids():
                    used[pid] = max(used.get(pid, 0.0), cpu_seconds(pid))
                self.samples[name].append(sum(used.values()))

    def between(self, start: float, end: float) -> dict[str, float]:
        """CPU seconds that each group used between two moments of the wall clock."""
        return {
            name: self._at(end, values) - self._at(start, values)
            for name, values in self.samples.items()
        }

    def _at(self, moment: float, values: Sequence[float]) -> float:
        if not values:
            return 0.0
        index = min(bisect_left(self.times, moment), len(values) - 1)
        return values[index]


def postgres_groups(server: servers.Postgres) -> dict[str, Callable[[], Iterable[int]]]:
    """PostgreSQL's processes: those that serve clients, and those that work in the background."""
    known: dict[int, bool] = {}

    def of(is_backend: bool) -> Iterator[int]:
        assert server.process is not None
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
        for pid in map(int, children.read_text().split()):
            title = command_line(pid) if pid not in known else ""
            if title.startswith("postgres: "):  # not so yet when it has just been forked
                # "postgres: postgres bench_1 127.0.0.1(40216) INSERT" beside "postgres: checkpointer"
                known[pid] = "127.0.0.1(" in title
            if known.get(pid) is is_backend:
                yield pid

    return {
        "postgres backends": lambda: list(of(True)),
        "postgres background": lambda: list(of(False)),
    }


async def stop_process(process: "asyncio.subprocess.Process", seconds: float = 30.0) -> int:
    """It has been asked to end, and has; its exit code."""
    if process.returncode is None:
        process.terminate()
        try:
            async with asyncio.timeout(seconds):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode


def python() -> str:
    """The interpreter that runs the services."""
    return sys.executable
