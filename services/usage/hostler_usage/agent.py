"""The host's side of usage: what libvirt has counted for each domain, said again and again.

One virsh process a turn reads the counters; without libvirt's Python binding there is nothing
to compile, and a libvirtd that hangs can be left behind. Only reading is asked for, so an
unprivileged user will do. A turn that fails is counted and the next one says more: counters are
cumulative. No database, no FastAPI.
"""

import asyncio
import contextlib
import itertools
import os
import signal
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar
from uuid import UUID, uuid4

from prometheus_client import Counter
from pydantic import Field

from hostler_common import errors, settings
from hostler_common.agent import AgentContext
from hostler_usage.reading import domain_stats
from hostler_usage.reading.domain_stats import Domain
from hostler_usage.reading.sample import (
    SAMPLES_PER_REPORT,
    USAGE_SAMPLED,
    DiskSample,
    DomainRun,
    DomainSample,
    InterfaceSample,
    SampleReport,
)

CONNECT_SECONDS = 10.0
PROC = Path("/proc")
REASON_CHARACTERS = 300


class SampleSettings(settings.ProcessSettings):
    """`HOSTLER_USAGE_*` of the agent."""

    service: ClassVar[str] = "usage"

    sample_seconds: float = Field(60.0, gt=0, description="how often the domains are sampled")
    libvirt_uri: str = Field("qemu:///system", description="what virsh connects to")
    libvirt_seconds: float = Field(20.0, gt=0, description="how long virsh may take")


class LibvirtUnavailable(errors.Unavailable):
    """virsh is not installed, or libvirt did not answer it; the next turn tries again."""

    code = "usage.libvirt.unavailable"


async def read_domains(loaded: SampleSettings) -> list[Domain]:
    """Return what libvirt has counted for the domains that were active all the while.

    Raises:
        LibvirtUnavailable: with virsh's own words, where it had any.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *("virsh", "--readonly", "--connect", loaded.libvirt_uri),
            domain_stats.READ_COMMANDS,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "LC_ALL": "C"},  # it translates what we parse
            start_new_session=True,
        )
    except OSError as exc:
        raise LibvirtUnavailable(f"virsh cannot be run: {exc.strerror}") from exc
    try:
        async with asyncio.timeout(loaded.libvirt_seconds):
            output, complaint = await process.communicate()
    except TimeoutError as exc:
        raise LibvirtUnavailable(f"no answer within {loaded.libvirt_seconds:g} s") from exc
    finally:
        if process.returncode is None:
            # with the ssh that it may have started, which holds the pipes open as well
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if process.returncode:
        said = " ".join(complaint.decode(errors="replace").split())
        reason = said[-REASON_CHARACTERS:] or f"virsh ended with {process.returncode}"
        raise LibvirtUnavailable(reason)
    return domain_stats.parse(output.decode(errors="replace"))


def read_process_starts(proc: Path) -> dict[UUID, int]:
    """Return when each domain's QEMU process began, in clock ticks since the host did.

    A process is a domain's if it is a QEMU with `-uuid` and the domain's UUID among its arguments,
    as libvirt starts it; of two the older, since the other one is about to become something else.
    Those that cannot be read, or that end meanwhile, are left out.
    """
    starts: dict[UUID, int] = {}
    for directory in proc.iterdir():
        if not directory.name.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            arguments = (directory / "cmdline").read_bytes().split(b"\0")
            if b"qemu" not in arguments[0]:
                continue
            instance_id = UUID(arguments[arguments.index(b"-uuid") + 1].decode())
            # the second field is the program's name in brackets, with anything in it
            after_name = (directory / "stat").read_text(errors="replace").rpartition(")")[2]
            ticks = int(after_name.split()[19])
            starts[instance_id] = min(ticks, starts.get(instance_id, ticks))
    return starts


def to_samples(
    domains: Iterable[Domain],
    *,
    boot_id: UUID,
    starts_before: Mapping[UUID, int],
    starts_after: Mapping[UUID, int],
) -> list[DomainSample]:
    """Return a sample of each domain whose process was the same before and after the reading."""
    return [
        DomainSample(
            instance_id=domain.instance_id,
            run=DomainRun(
                boot_id=boot_id,
                domain_id=domain.domain_id,
                process_start_ticks=starts_after.get(domain.instance_id),
            ),
            state=domain.state,
            cpu_time_ns=domain.cpu_time_ns,
            disks=[DiskSample.model_validate(disk) for disk in domain.disks],
            interfaces=[InterfaceSample.model_validate(each) for each in domain.interfaces],
        )
        for domain in domains
        if starts_before.get(domain.instance_id) == starts_after.get(domain.instance_id)
    ]


def to_reports(
    *, host: str, sampled_at: datetime, samples: Iterable[DomainSample]
) -> list[SampleReport]:
    """Return the samples in as few reports as can be, at least one: an empty one says we looked."""
    rest = iter(samples)
    groups = iter(lambda: list(itertools.islice(rest, SAMPLES_PER_REPORT)), [])
    return [
        SampleReport(host=host, sampled_at=sampled_at, report_id=uuid4(), samples=group)
        for group in list(groups) or [[]]
    ]


async def read_reports(host: str, loaded: SampleSettings, proc: Path = PROC) -> list[SampleReport]:
    """Return what is to be said of this host's domains now.

    Raises:
        LibvirtUnavailable: see `read_domains`.
    """
    # a thread, since a host has thousands of processes
    starts_before = await asyncio.to_thread(read_process_starts, proc)
    domains = await read_domains(loaded)
    starts_after = await asyncio.to_thread(read_process_starts, proc)
    samples = to_samples(
        domains,
        boot_id=UUID((proc / "sys/kernel/random/boot_id").read_text().strip()),
        starts_before=starts_before,
        starts_after=starts_after,
    )
    return to_reports(host=host, sampled_at=datetime.now(UTC), samples=samples)


async def create(context: AgentContext) -> None:
    """The part of `hostler-agent` that samples this host, now and every `sample_seconds`."""
    loaded = context.load(SampleSettings)
    sent = Counter(
        "hostler_usage_sample_reports_sent",
        "Sample reports that the broker confirmed.",
        registry=context.process.registry,
    )
    failed = Counter(
        "hostler_usage_sample_turns_failed",
        "Turns that ended without every report sent, by what was away: libvirt or broker.",
        ["away"],
        registry=context.process.registry,
    )
    for away in ("libvirt", "broker"):
        failed.labels(away)  # both are shown from the start

    async def sample() -> None:
        away = "libvirt"
        try:
            reports = await read_reports(context.host, loaded)
            away = "broker"
            # the first turn comes before the broker's connection is up
            await context.bus.wait_up(CONNECT_SECONDS)
            for report in reports:
                await context.bus.publish(
                    USAGE_SAMPLED.message(
                        report,
                        app_id="hostler-agent",
                        message_id=str(report.report_id),
                        host=context.host,
                    )
                )
                sent.inc()
        except errors.Unavailable:
            failed.labels(away).inc()
            raise

    context.every(loaded.sample_seconds, sample, name="usage_sample")
