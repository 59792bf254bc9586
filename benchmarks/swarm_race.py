"""One file from a seed to every host of a shaped network: the clock, the bound, and what was really sent.

Whoever carries the file, the race is the same. It starts from one moment, a host is done when the file has its final
name in the host's directory (in memory), and every copy is hashed when the clock has stopped. The bound is that of the
fluid limit, from the payload rate that one TCP stream has on the very rig:

    T* = max(F / u_seed, F / d_min, N F / (u_seed + sum u_i))
"""

import asyncio
import hashlib
import json
import os
import random
import shutil
import sys
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Mapping,
    Sequence,
)
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import bench
import network_rig
from network_rig import Rig, Traffic

SEED = "seed"
FILE = "image"
CHUNK = 1 << 20
PATIENCE_BOUNDS, PATIENCE_SECONDS = 4.0, 30.0
"""A race that lasts so much longer than if everybody fetched from the seed alone has failed."""
FIRST_PAYLOAD_BYTES = 64_000
"""More than a host receives before the file itself, unless a racer says otherwise."""
_WATCH = Path(__file__).with_name("network_watch.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """A network, the file at its seed, and the bound."""

    rig: Rig
    source: Path
    size_bytes: int
    sha256: str
    stream_bps: Mapping[str, float]
    """What one TCP stream gets from, and to, each host."""
    receivers: Sequence[str]
    """The hosts that take part."""
    finishers: Sequence[str]
    """Those of them for whom the clock waits."""

    @property
    def bound_seconds(self) -> float:
        """T* of those who have to arrive."""
        rates = [self.stream_bps[name] for name in self.finishers]
        return bound_seconds(8 * self.size_bytes, self.stream_bps[SEED], rates)

    def among(
        self, receivers: Sequence[str], *, finishers: Sequence[str] | None = None
    ) -> "Course":
        """The same with these hosts; all of them have to arrive unless said otherwise."""
        return replace(self, receivers=receivers, finishers=finishers or receivers)

    @property
    def patience_seconds(self) -> float:
        """After that nobody waits any longer."""
        alone = len(self.receivers) + PATIENCE_BOUNDS
        return alone * self.bound_seconds + PATIENCE_SECONDS


def bound_seconds(bits: float, seed_bps: float, host_bps: Sequence[float]) -> float:
    """Kumar and Ross: no schedule ends earlier. Each host sends and receives at its rate."""
    everybody = len(host_bps) * bits / (seed_bps + sum(host_bps))
    return max(bits / seed_bps, bits / min(host_bps), everybody)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one racer did."""

    racer: str
    bound_seconds: float
    done_seconds: Mapping[str, float]
    """From the start to the file under its name, by host."""
    first_seconds: Mapping[str, float]
    """From the start to the first payload on the host."""
    traffic: Mapping[str, Traffic]
    """By host, and by rack, until the last was done."""
    size_bytes: int
    busy_cores: float
    """Of the whole machine."""
    cores: Mapping[str, float]
    """Of the processes on each host that were still there in the end."""
    load_before: float
    extra: Mapping[str, float] = field(default_factory=dict)

    @property
    def last_ratio(self) -> float:
        """The last host's time over the bound."""
        return max(self.done_seconds.values()) / self.bound_seconds

    @property
    def median_ratio(self) -> float:
        """The middle host's time over the bound."""
        return bench.median(self.done_seconds.values()) / self.bound_seconds

    @property
    def first_byte_ms(self) -> float:
        """Until the last host had its first payload; NaN when none was seen."""
        return 1000 * max(self.first_seconds.values(), default=float("nan"))

    @property
    def last_ratio_after_first_byte(self) -> float:
        """The last host's time from the first payload anywhere, over the bound."""
        begun = min(self.first_seconds.values(), default=0.0)
        return (max(self.done_seconds.values()) - begun) / self.bound_seconds

    @property
    def seed_copies(self) -> float:
        """Bytes that left the seed's interface, all of them, over the size of the file."""
        return self.traffic[SEED].sent_bytes / self.size_bytes

    @property
    def received_copies(self) -> float:
        """Bytes that came to a host's interface over the size of the file, the mean of the hosts."""
        counts = [self.traffic[host].received_bytes for host in self.done_seconds]
        return sum(counts) / len(counts) / self.size_bytes

    def show(self) -> None:
        """One line for people."""
        times = sorted(self.done_seconds.values())
        extra = "".join(f", {name} {value:.4g}" for name, value in self.extra.items())
        bench.say(
            f"  {self.racer:<24} last {times[-1]:6.2f} s = {self.last_ratio:.3f} T*,"
            f" median {self.median_ratio:.3f}, first done {times[0]:.2f} s;"
            f" seed {self.seed_copies:.3f} copies, received {self.received_copies:.3f};"
            f" first byte {self.first_byte_ms:.0f} ms;"
            f" busy {self.busy_cores:.2f} of {os.cpu_count()}, with this {sum(self.cores.values()):.2f}"
            f" (the seed {self.cores[SEED]:.2f}), load before {self.load_before:.1f}{extra}"
        )


# --- the course


def write_source(path: Path, size_bytes: int) -> str:
    """Bytes that do not compress are in the file; their sha256."""
    digest = hashlib.sha256()
    content = random.Random(size_bytes)  # noqa: S311  content, not a secret
    with path.open("wb") as file:
        left = size_bytes
        while left:
            chunk = content.randbytes(min(CHUNK, left))
            digest.update(chunk)
            file.write(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def sha256_of(path: Path) -> str:
    """The hash of the file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


async def course(rig: Rig, size_bytes: int) -> Course:
    """The source is written and the rates are measured: once for each different link.

    Raises:
        RuntimeError: the hosts' copies would not fit into memory.
    """
    source = rig.directory / "source"
    needed = (len(rig.hosts) + 1) * size_bytes  # the source, and everybody's copy
    free = shutil.disk_usage(rig.directory).free
    if free < needed:
        raise RuntimeError(
            f"{rig.directory.parent} has {free:,} bytes free, and {needed:,} are needed"
        )
    digest = await asyncio.to_thread(write_source, source, size_bytes)
    measured: dict[int, float] = {}
    names = list(rig.hosts)
    for name in names:
        rate = rig.hosts[name].rate_bps
        if rate not in measured:
            # to somebody whose link is no slower
            other = max(
                (one for one in names if one != name), key=lambda one: rig.hosts[one].rate_bps
            )
            measured[rate] = await rig.stream_bps(name, other)
    receivers = [name for name in names if name != SEED]
    return Course(
        rig=rig,
        source=source,
        size_bytes=size_bytes,
        sha256=digest,
        stream_bps={name: measured[rig.hosts[name].rate_bps] for name in names},
        receivers=receivers,
        finishers=receivers,
    )


def uniform(hosts: int, rate_bps: int) -> network_rig.Plan:
    """A seed and so many hosts, all alike."""
    names = [SEED, *(f"h{number}" for number in range(1, hosts + 1))]
    return network_rig.Plan(hosts=dict.fromkeys(names, rate_bps))


# --- the clock


@dataclass(slots=True)
class Clock:
    """What the watcher says: moments of CLOCK_MONOTONIC."""

    process: asyncio.subprocess.Process
    first: dict[str, float] = field(default_factory=dict)
    done: dict[str, float] = field(default_factory=dict)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def follow(self) -> None:
        """Take what it says until it ends."""
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            said = json.loads(line)
            async with self.changed:
                if "first" in said:
                    self.first.setdefault(said["first"], said["at"])
                elif "file" in said:
                    self.done.setdefault(said["file"], said["at"])
                self.changed.notify_all()

    async def zero(self) -> None:
        """First bytes are looked for from now on."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"{}\n")
        await self.process.stdin.drain()

    async def wait_done(self, hosts: Collection[str], seconds: float) -> None:
        """Every one of the hosts has the file.

        Raises:
            TimeoutError: not in time; who is late is in the message.
        """
        try:
            async with asyncio.timeout(seconds), self.changed:
                await self.changed.wait_for(lambda: self.done.keys() >= set(hosts))
        except TimeoutError:
            late = sorted(set(hosts) - self.done.keys())
            raise TimeoutError(f"after {seconds:.0f} s without the file: {late}") from None


@asynccontextmanager
async def watching(
    rig: Rig, directories: Mapping[str, Path], *, file: str, first_bytes: int
) -> AsyncIterator[Clock]:
    """The directories and the ports are watched, from the switch."""
    async with AsyncExitStack() as stack:
        process = await stack.enter_async_context(
            rig.process(
                network_rig.SWITCH, sys.executable, _WATCH, log=rig.directory / "watch.log",
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            )
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        order = {
            "directories": {host: str(path) for host, path in directories.items()},
            "file": file,
            "ports": {host: rig.hosts[host].port for host in directories},
            "first_bytes": first_bytes,
        }
        process.stdin.write(json.dumps(order).encode() + b"\n")
        if not await process.stdout.readline():
            raise RuntimeError(f"no watcher: {(rig.directory / 'watch.log').read_text()}")
        clock = Clock(process)
        following = asyncio.create_task(clock.follow())
        stack.callback(following.cancel)
        yield clock


def busy_seconds() -> float:
    """Seconds that the machine's cores have worked, all together; others' steal is not work."""
    words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8]
    user, nice, system, _idle, _iowait, irq, softirq = map(int, words)
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


Start = Callable[[], Awaitable[float | None]]
"""Starts the racer, and returns the moment from which first bytes count, if that is not the start."""


async def race(
    course: Course,
    racer: str,
    directories: Mapping[str, Path],
    start: Start,
    *,
    file: str = FILE,
    first_bytes: int = FIRST_PAYLOAD_BYTES,
    during: Callable[[Clock], Coroutine[Any, Any, None]] | None = None,
) -> Result:
    """Run it: what came of it.

    Args:
        course: where.
        racer: the name to show.
        directories: where each host's file appears; they exist.
        start: everything that the clock pays for begins here.
        file: the file's final name.
        first_bytes: more than a host receives before the first payload.
        during: what else happens while they race.

    Raises:
        TimeoutError: somebody did not arrive.
        RuntimeError: somebody has another file.
    """
    rig, wanted = course.rig, course.finishers
    async with watching(rig, directories, file=file, first_bytes=first_bytes) as clock:
        load = os.getloadavg()[0]
        before = rig.traffic()
        await clock.zero()
        busy, own, began = busy_seconds(), rig.cpu_seconds(), time.monotonic()
        counted_from = await start() or began
        beside = asyncio.create_task(during(clock)) if during is not None else None
        await clock.wait_done(wanted, course.patience_seconds)
        busy, used = busy_seconds() - busy, rig.cpu_seconds()
        elapsed = time.monotonic() - began
        after = rig.traffic()
        if beside is not None:
            await beside
    for host in wanted:
        if await asyncio.to_thread(sha256_of, directories[host] / file) != course.sha256:
            raise RuntimeError(f"{racer}: {host} has another file")
    return Result(
        racer=racer,
        bound_seconds=course.bound_seconds,
        done_seconds={host: clock.done[host] - began for host in wanted},
        first_seconds={
            host: at - counted_from for host, at in clock.first.items() if host in wanted
        },
        traffic={name: after[name].since(before[name]) for name in after},
        size_bytes=course.size_bytes,
        busy_cores=busy / elapsed,
        cores={host: (used[host] - own[host]) / elapsed for host in used},
        load_before=load,
    )
