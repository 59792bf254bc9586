"""One process: one task group, one stop, one order of draining.

A background task that fails takes the process down with its cause in the log, and the supervisor starts it again: a
process that has lost one of its loops must not look healthy. On SIGTERM or SIGINT it drains: readiness turns 503,
consuming stops, what is being handled is finished and acked, loops and requests end, the outbox is flushed,
connections close. What is not done within ``drain_seconds`` is cancelled: unacked messages come again, and what was
not committed never was.
"""

import asyncio
import gc
import random
import resource
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, suppress
from types import TracebackType
from typing import Any, Self

from prometheus_client import (
    CollectorRegistry,
    Gauge,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
)

from hostler_common import errors, logs, lookups
from hostler_common.bus import (
    Batch,
    BatchHandler,
    Bus,
    BusMetrics,
    Handler,
    Quarantine,
    Queue,
    Subscription,
    Topology,
)
from hostler_common.health import Health
from hostler_common.settings import ProcessSettings, SettingsError

log = logs.get(__name__)

EXIT_FAILED = 1
EXIT_BAD_SETTINGS = 2


class Process:
    """A process of the suite, from start to drained. Use as an async context manager, then `run`."""

    def __init__(self, settings: ProcessSettings, *, stop: asyncio.Event | None = None) -> None:
        self.settings = settings
        self.health = Health()
        self.registry = CollectorRegistry()
        self._own_signals = stop is None
        self._stop = stop or asyncio.Event()
        self._looping = asyncio.Event()  # set when loops should end
        self.resources = AsyncExitStack()
        self._group = asyncio.TaskGroup()
        self._services: list[asyncio.Task[None]] = []
        self._loops: list[asyncio.Task[None]] = []
        self._buses: list[Bus] = []
        self._bus_metrics = BusMetrics(self.registry)
        self._failing = Gauge(
            "hostler_loop_failing",
            "1 while the loop's last turn failed.",
            ["loop"],
            registry=self.registry,
        )

    async def __aenter__(self) -> Self:
        logs.configure(
            service=self.settings.service,
            level=self.settings.log_level,
            log_format=self.settings.log_format,
        )
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        if self._own_signals:
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._stop.set)
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for task in (*self._loops, *self._services):
            task.cancel()  # what a drain past its deadline has left; the group would wait for it for ever
        try:
            await self._group.__aexit__(kind, exc, traceback)
        finally:
            await self.resources.aclose()
            log.info("stopped")

    # --- building blocks, in the order in which a composition root uses them

    def open_bus(self, topology: Topology, *, name: str | None = None, url: Any = None) -> Bus:  # noqa: ANN401
        """A bus at the settings' broker, or at ``url`` (a SecretStr) for another one; it runs from `run` on."""
        label = name or "broker"
        bus = Bus(
            url or self.settings.amqp_url,
            name=f"hostler-{self.settings.service}" + (f".{name}" if name else ""),
            exchanges=topology.exchanges,
            metrics=self._bus_metrics,
            connection=label,
        )
        self._buses.append(bus)
        self.health.check(label, bus.health)
        return bus

    def consume(
        self,
        bus: Bus,
        queue: Queue,
        handler: Handler | BatchHandler,
        *,
        quarantine: Quarantine | None,
        batch: Batch | None = None,
        prefetch: int = 32,
        concurrency: int = 8,
        on_begin: Callable[[], None] = lambda: None,
    ) -> None:
        """Hand the queue's deliveries to the handler, from `run` on; `on_begin` is told when they begin to come."""
        bus.consume(
            Subscription(
                queue=queue,
                handler=handler,
                quarantine=quarantine,
                batch=batch,
                prefetch=prefetch,
                concurrency=concurrency,
                on_begin=on_begin,
            )
        )

    def every(self, seconds: float, turn: Callable[[], Awaitable[object]], *, name: str) -> None:
        """Call ``turn`` now and then every so many seconds, with a tenth of jitter, until draining.

        A turn that finds a server away is tried again at the next one: the first failure and the recovery are logged.
        Any other exception is a bug and takes the process down.
        """
        self._loops.append(self._group.create_task(self._loop(seconds, turn, name), name=name))

    async def _loop(
        self, seconds: float, turn: Callable[[], Awaitable[object]], name: str
    ) -> None:
        failing = False
        while not self._looping.is_set():
            self.health.beat(name, seconds)
            try:
                await turn()
                if failing:
                    log.info("loop_recovered", loop=name)
                failing = False
            except errors.Unavailable as exc:
                if not failing:
                    log.warning("loop_waits", loop=name, code=exc.code, reason=exc.detail)
                failing = True
            self._failing.labels(name).set(failing)
            pause = seconds * random.uniform(0.9, 1.1)  # noqa: S311  jitter, not a secret
            try:
                async with asyncio.timeout(pause):
                    await self._looping.wait()
            except TimeoutError:
                continue
        self.health.forget(name)

    def spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """Run ``work`` beside everything else until the process has drained; if it fails, so does the process."""
        task = self._group.create_task(work, name=name)
        self._services.append(task)
        return task

    # --- life

    async def run(self) -> None:
        """Start the buses, then wait for the stop and drain."""
        for bus in self._buses:
            self.spawn(bus.run(), name="bus")
        # thousands of messages or requests a second are objects that live for a moment: without this, a third of the
        # time goes into looking through everything that was ever loaded for cycles that are not there
        gc.collect()
        gc.freeze()
        usual = gc.get_threshold()
        gc.set_threshold(50_000, 20, 20)
        log.info("started")
        try:
            await self._stop.wait()
        finally:  # tests start many in one process: what was frozen may be garbage by now
            gc.set_threshold(*usual)
            gc.unfreeze()
        started = time.monotonic()
        self.health.draining = True
        log.info("draining")
        try:
            async with asyncio.timeout(self.settings.drain_seconds):
                await self.drain()
        except TimeoutError:
            log.warning("drain_deadline_passed", seconds=self.settings.drain_seconds)
        log.info("drained", seconds=round(time.monotonic() - started, 2))

    async def drain(self) -> None:
        """Consuming has stopped, what was being handled is done, and the loops have ended."""
        # side by side: a cloud's broker that hangs does not use up the time of the others
        await asyncio.gather(*(bus.drain() for bus in self._buses))
        self._looping.set()
        if self._loops:
            await asyncio.wait(self._loops)


class PortUnavailable(errors.HostlerError):
    """The port to listen on is taken, or may not be bound."""

    code = "http.port_unavailable"


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        PortUnavailable: with what is in the way.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle off only on sockets that say they are TCP: without, answers wait 40 ms
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as exc:
        listener.close()
        raise PortUnavailable(f"cannot listen on {host}:{port}: {exc.strerror}") from exc
    listener.setblocking(False)
    return listener


def main(serve: Coroutine[Any, Any, None], *, service: str) -> int:
    """Run a process to its end and return its exit code; what stopped it is in the log, once, with its cause."""
    _allow_descriptors()
    try:
        with asyncio.Runner(loop_factory=lookups.Loop) as runner:
            runner.run(serve)
    except* errors.HostlerError as group:
        return_code = EXIT_FAILED
        for error in _leaves(group):
            assert isinstance(error, errors.HostlerError)
            if isinstance(error, SettingsError):
                return_code = EXIT_BAD_SETTINGS
            # a refusal with a clear sentence, no traceback
            log.error("cannot_run", service=service, code=error.code, reason=error.detail)  # noqa: TRY400
            print(f"hostler-{service}: {error.detail}", file=sys.stderr)  # noqa: T201  for the operator at the terminal
    except* Exception as group:
        log.critical("crashed", service=service, exc_info=group)
        return_code = EXIT_FAILED
    else:
        return_code = 0
    return return_code


def _allow_descriptors() -> None:
    """As many may be open as the system lets this process have.

    The usual 1,024 are for those who call select(2), which nobody does here: a seed has a thousand hosts connected.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # it does with fewer
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    found: list[BaseException] = []
    for exc in group.exceptions:
        found += _leaves(exc) if isinstance(exc, BaseExceptionGroup) else [exc]
    return found
