"""Where the demo is played: the running suite, and how a part of the story says, shows and checks things.

Each service's part is a module of this package with ``async def tell(stage)``. On a terminal rich draws tables and
progress bars; elsewhere the same comes as plain lines.
"""

import contextlib
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from hostler_common import client, errors

PARTS = ("usage", "capacity", "precache", "baremetal")
PLAIN_LINE_SECONDS = 1.0

PLAIN_WIDTH = 120

console = Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
Say = Callable[[str], None]


class ClaimBroken(errors.HostlerError):
    """The demo showed that something is not as it says."""

    code = "demo.claim_broken"


class Spawner(Protocol):
    """The suite's record of processes, as far as the demo needs it."""

    def spawn(self, name: str, argv: Sequence[str], environment: Mapping[str, str]) -> int:
        """Start a background process that ``make down`` stops."""

    def log_file(self, name: str) -> Path:
        """Where its output goes."""


@dataclass(slots=True)
class Running:
    """The suite, up and ready."""

    amqp_url: str
    database_url: str
    environment: dict[str, str]
    token: str
    token_file: Path
    directory: Path
    urls: dict[str, str]
    suite: Spawner
    pids: dict[str, int] = field(default_factory=dict)


def service_environment(name: str, directory: Path, running: Running) -> dict[str, str]:
    """The settings that the demo gives a service beyond the common ones."""
    work = directory / "work" / name
    work.mkdir(parents=True, exist_ok=True)
    try:
        part = importlib.import_module(f"demo.{name}")
    except ModuleNotFoundError:
        return {}
    environment: Callable[[Path, Running], dict[str, str]] | None = getattr(
        part, "environment", None
    )
    return environment(work, running) if environment else {}


def say(text: str) -> None:
    """Print a line."""
    console.print(text, markup=False)


@dataclass(slots=True)
class Stage:
    """What a part of the story has to work with."""

    running: Running
    name: str
    checked: int = 0

    @property
    def urls(self) -> Mapping[str, str]:
        """The services' addresses by name."""
        return self.running.urls

    @property
    def amqp_url(self) -> str:
        """The broker's address."""
        return self.running.amqp_url

    @property
    def database_url(self) -> str:
        """The database's address."""
        return self.running.database_url

    @property
    def token(self) -> str:
        """An admin's token for every service."""
        return self.running.token

    @property
    def state_dir(self) -> Path:
        """A directory for this part's files; empty when the story starts."""
        directory = self.running.directory / "work" / self.name
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def api(self, service: str) -> contextlib.AbstractAsyncContextManager[client.Api]:
        """The service's API, called as admin."""
        return client.open_api(self.urls[service], token=self.token)

    def say(self, text: str) -> None:
        """Print a line of the story."""
        say(f"  {text}")

    def step(self, title: str) -> None:
        """Begin the next step of the part."""
        console.print(f"[bold]→ {title}[/bold]" if sys.stdout.isatty() else f"-> {title}")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a table; numbers are right-aligned."""
        drawn = Table(title=title, title_justify="left")
        numeric = [
            all(isinstance(row[i], int | float) for row in rows) for i in range(len(columns))
        ]
        for column, is_number in zip(columns, numeric, strict=True):
            drawn.add_column(column, justify="right" if is_number else "left")
        for row in rows:
            drawn.add_row(*(str(cell) for cell in row))
        console.print(drawn)

    def check(self, claim: str, holds: bool) -> None:
        """Print the claim with a tick.

        Raises:
            ClaimBroken: it does not hold; the demo ends with a failure.
        """
        if not holds:
            raise ClaimBroken(f"{self.name}: this does not hold: {claim}")
        self.checked += 1
        console.print(f"  [green]✓[/green] {claim}" if sys.stdout.isatty() else f"  ok: {claim}")

    def spawn(self, name: str, argv: Sequence[str], environment: Mapping[str, str]) -> int:
        """Start a background process with the suite's settings and these; ``make down`` stops it."""
        return self.running.suite.spawn(name, argv, {**self.running.environment, **environment})

    @contextlib.contextmanager
    def progress(
        self, total_bytes: int, names: Sequence[str]
    ) -> Iterator[Callable[[str, int], None]]:
        """Progress of several transfers: call what it gives with (name, bytes done)."""
        if sys.stdout.isatty():
            with Progress(
                TextColumn("  {task.description}"),
                BarColumn(),
                DownloadColumn(binary_units=True),
                TransferSpeedColumn(),
                console=console,
            ) as bars:
                tasks = {name: bars.add_task(name, total=total_bytes) for name in names}
                yield lambda name, done: bars.update(tasks[name], completed=done)
            return
        last_line = time.monotonic()
        state = dict.fromkeys(names, 0)

        def plain(name: str, done: int) -> None:
            nonlocal last_line
            state[name] = done
            if time.monotonic() - last_line >= PLAIN_LINE_SECONDS:
                last_line = time.monotonic()
                parts = (f"{one} {100 * at // max(1, total_bytes)} %" for one, at in state.items())
                say("  " + ", ".join(parts))

        yield plain
        say(
            "  "
            + ", ".join(f"{one} {100 * at // max(1, total_bytes)} %" for one, at in state.items())
        )


async def tell_story(running: Running) -> None:
    """Play every part, in order.

    Raises:
        HostlerError: a part failed, or a claim of it does not hold.
    """
    for name in PARTS:
        part = importlib.import_module(f"demo.{name}")
        console.rule(f"[bold]{name}[/bold]" if sys.stdout.isatty() else name, align="left")
        began = time.monotonic()
        stage = Stage(running, name)
        await part.tell(stage)
        say(f"  {stage.checked} claims held, {time.monotonic() - began:.1f} s")


def summary(running: Running, *, seconds: float) -> None:
    """Say what runs, where, and how to stop it."""
    console.rule("hostler is running", align="left")
    for name, url in running.urls.items():
        say(f"  {name:<10} {url}/")
    say(f"  sign in at /login with the token in {running.token_file}")
    say(f"  logs: {running.directory / 'logs'}")
    say(f"  ready after {seconds:.0f} s; stop it with: make down")
    if os.environ.get("CI"):
        sys.stdout.flush()
