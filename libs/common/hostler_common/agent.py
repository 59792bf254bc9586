"""``hostler-agent``: the one process of the suite on a compute host.

It has one AMQP connection pair and one HTTP port, and runs the ``agent`` module of every service installed there: the
entry points of group ``hostler.agents``, each a coroutine function that adds its routes, consumers and loops to the
context. No database, no FastAPI: what is lost with the process is asked for again at the next start.
"""

import asyncio
import importlib.metadata
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

from aiohttp import web
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from pydantic import Field

from hostler_common import admission, logs, runtime, settings
from hostler_common.bus import Bus, Handler, Queue, Topology

log = logs.get(__name__)

GROUP = "hostler.agents"


class AgentSettings(settings.ProcessSettings):
    """Settings of the agent process; each part has settings of its own beside them."""

    service: ClassVar[str] = "agent"

    http_port: int = Field(8310, ge=0, le=65535)
    host: str = Field(
        default_factory=socket.gethostname, description="the host's name in the cloud"
    )
    parts: settings.CommaList = Field(
        default_factory=lambda: sorted(entry.name for entry in _entry_points()),
        description="which parts run; all that are installed unless said",
    )


PartSettingsT = TypeVar("PartSettingsT", bound=settings.ProcessSettings)


class Create(Protocol):
    """What an entry point of the group is."""

    async def __call__(self, context: "AgentContext") -> None:
        """The part's routes, consumers and loops are in the context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentContext:
    """What a part of the agent builds on."""

    host: str
    bus: Bus
    app: web.Application
    process: runtime.Process

    def load(self, settings_type: type[PartSettingsT]) -> PartSettingsT:
        """The part's own settings.

        Raises:
            SettingsError: naming every bad one.
        """
        return settings.load(settings_type)

    def consume(
        self, queue: Queue, handler: Handler, *, on_begin: Callable[[], None] = lambda: None
    ) -> None:
        """Hand the deliveries of an exclusive queue to the handler.

        `on_begin` is called whenever they begin to come: what was published before is lost.
        """
        self.process.consume(self.bus, queue, handler, quarantine=None, on_begin=on_begin)

    def every(self, seconds: float, turn: Callable[[], Awaitable[object]], *, name: str) -> None:
        """See `runtime.Process.every`."""
        self.process.every(seconds, turn, name=name)

    def spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> None:
        """See `runtime.Process.spawn`."""
        self.process.spawn(work, name=name)


def _entry_points() -> importlib.metadata.EntryPoints:
    return importlib.metadata.entry_points(group=GROUP)


async def serve(loaded: AgentSettings, *, stop: asyncio.Event | None = None) -> None:
    """Run the agent until it is told to stop.

    Raises:
        SettingsError: a part is not installed, or its settings are wrong.
        PortUnavailable: the HTTP port is taken.
    """
    entries = {entry.name: entry for entry in _entry_points()}
    unknown = set(loaded.parts) - entries.keys()
    if unknown:
        raise settings.SettingsError(
            f"HOSTLER_AGENT_PARTS: not installed here: {', '.join(sorted(unknown))}"
        )
    async with runtime.Process(loaded, stop=stop) as process:
        context = AgentContext(
            host=loaded.host,
            bus=process.open_bus(Topology()),
            app=web.Application(),
            process=process,
        )
        context.app[admission.KEY] = admission.Admission()
        _add_service_routes(context.app, process)
        for name in loaded.parts:
            create: Create = entries[name].load()
            await create(context)
            log.info("part_started", part=name)
        listener = runtime.bind(loaded.http_host, loaded.http_port)
        async with admission.serving(
            context.app, listener, drain_seconds=loaded.drain_seconds / 2
        ):
            log.info(
                "agent_started",
                host=loaded.host,
                http=f"{loaded.http_host}:{listener.getsockname()[1]}",
            )
            await process.run()


def _add_service_routes(app: web.Application, process: runtime.Process) -> None:
    async def healthz(_: web.Request) -> web.Response:
        alive, stuck = process.health.alive()
        return web.json_response(
            {"status": "pass" if alive else "fail", "stuck": stuck}, status=200 if alive else 503
        )

    async def readyz(_: web.Request) -> web.Response:
        ready, checks = await process.health.ready()
        return web.json_response(
            {"status": "pass" if ready else "fail", "checks": checks}, status=200 if ready else 503
        )

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(
            body=generate_latest(process.registry), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )

    app.add_routes(
        [web.get("/healthz", healthz), web.get("/readyz", readyz), web.get("/metrics", metrics)]
    )


def main() -> None:
    """The console script."""
    try:
        loaded = settings.load(AgentSettings)
    except settings.SettingsError as exc:
        print(exc.detail, file=sys.stderr)  # noqa: T201  for the operator at the terminal
        sys.exit(runtime.EXIT_BAD_SETTINGS)
    sys.exit(runtime.main(serve(loaded), service="agent"))
