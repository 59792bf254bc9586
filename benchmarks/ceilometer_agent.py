"""Ceilometer's notification agent in an environment of its own, timed while it empties a queue into a file.

Its file publisher writes one line of JSON an event or sample, without fsync and without a database: this is a
ceiling of what Ceilometer does, not its rate with Gnocchi behind it.
"""

import asyncio
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import bench

QUEUE = "notifications.info"
PATIENCE_SECONDS = 900.0

# durable and a quorum queue, as the service's own queue is; what is not said here is Ceilometer's default
_CONFIGURATION = """\
[DEFAULT]
log_file = {directory}/agent.log
transport_url = {url}
[notification]
workers = 1
{pipelines}
{batch}
notification_control_exchanges = {exchange}
messaging_urls = {url}
[event]
definitions_cfg_file = {package}/pipeline/data/event_definitions.yaml
[oslo_messaging_rabbit]
amqp_durable_queues = true
rabbit_quorum_queue = true
{prefetch}
"""

_PIPELINE = """\
sources:
  - name: everything
    {kind}s: ["*"]
    sinks: [file]
sinks:
  - name: file
    publishers: ["file://{path}?json"]
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    """How the agent is set up; `lines` is what each pipeline writes for one notification of the benchmark."""

    name: str
    lines: Mapping[str, int]
    batch: int | None = None
    prefetch: int | None = None


BEST = Agent(name="ceilometer best", lines={"event": 1}, batch=1000, prefetch=3000)
"""The event pipeline alone, and our own batch: no setting was found that is faster."""
BATCH_100 = Agent(name="ceilometer batch 100", lines={"event": 1}, batch=100)
"""The event pipeline alone, with its prefetch of 100."""
DEFAULT = Agent(name="ceilometer default", lines={"meter": 4, "event": 1})
"""As it comes: meters and events, one notification at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Emptied:
    """What the agent did with a full queue."""

    messages_per_second: float
    cpu_us_per_message: float
    rss_mb: float


def build() -> Path:
    """The environment's directory; it is built from its lock by the first call, which takes a minute.

    Raises:
        CalledProcessError: it cannot be built; what pip said is on stderr.
    """
    script = bench.ROOT / "tests" / "integration" / "peers" / "build.py"
    done = subprocess.run(
        [sys.executable, str(script), "ceilometer"], check=True, stdout=subprocess.PIPE, text=True
    )
    return Path(done.stdout.strip())


async def empty(
    agent: Agent,
    *,
    environment: Path,
    directory: Path,
    amqp_url: str,
    exchange: str,
    messages: int,
) -> Emptied:
    """Run the agent until every line is there; the clock runs from its first line to its last.

    Raises:
        RuntimeError: it ended before.
        TimeoutError: it did not finish.
    """
    outputs = _configure(
        agent, environment=environment, directory=directory, amqp_url=amqp_url, exchange=exchange
    )
    with (directory / "output.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            str(environment / "bin" / "ceilometer-agent-notification"),
            *("--config-file", str(directory / "ceilometer.conf")),
            cwd=directory,  # it looks for its files there
            stdout=log,
            stderr=log,
        )
    record = bench.CpuRecord({"agent": lambda: [process.pid, *bench.descendants(process.pid)]})
    record.start()
    try:
        began, ended = await _timed(
            {path: messages * agent.lines[kind] for kind, path in outputs.items()}, process
        )
        peak = sum(
            bench.rss_mb(pid) for pid in bench.descendants(process.pid)
        )  # its master process is not counted against it
    finally:
        record.stop()
        await bench.stop_process(process)
    return Emptied(
        messages_per_second=messages / (ended - began),
        cpu_us_per_message=1e6 * record.between(began, ended)["agent"] / messages,
        rss_mb=peak,
    )


def _configure(
    agent: Agent, *, environment: Path, directory: Path, amqp_url: str, exchange: str
) -> dict[str, Path]:
    """The agent's files are in the directory; where each pipeline is going to write."""
    directory.mkdir(parents=True)
    (package,) = environment.glob("lib/python3*/site-packages/ceilometer")
    outputs = {kind: directory / f"{kind}s.out" for kind in agent.lines}
    for kind, path in outputs.items():
        name = "event_pipeline.yaml" if kind == "event" else "pipeline.yaml"
        (directory / name).write_text(_PIPELINE.format(kind=kind, path=path))
    (directory / "ceilometer.conf").write_text(
        _CONFIGURATION.format(
            directory=directory,
            url=amqp_url.replace("amqp://", "rabbit://"),
            exchange=exchange,
            package=package,
            pipelines="\n".join(f"pipelines = {kind}" for kind in agent.lines),
            prefetch=f"rabbit_qos_prefetch_count = {agent.prefetch}" if agent.prefetch else "",
            batch=f"batch_size = {agent.batch}\nbatch_timeout = 1" if agent.batch else "",
        )
    )
    return outputs


async def _timed(
    wanted: Mapping[Path, int], process: asyncio.subprocess.Process
) -> tuple[float, float]:
    """When the first line was written, and when the last."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    read = dict.fromkeys(wanted, 0)
    lines = dict.fromkeys(wanted, 0)
    began = 0.0
    while any(lines[path] < count for path, count in wanted.items()):
        if process.returncode is not None:
            raise RuntimeError(f"the agent ended with {process.returncode}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"the agent has written {sum(lines.values())} lines only")
        await asyncio.sleep(0.02 if not began else 0.2)
        for path in wanted:
            if path.exists() and path.stat().st_size > read[path]:
                began = began or time.time()
                with path.open("rb") as output:
                    output.seek(read[path])
                    block = output.read()
                read[path] += len(block)
                lines[path] += block.count(b"\n")
    return began, max(path.stat().st_mtime for path in wanted)
