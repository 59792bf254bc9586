"""A real libvirt, a guest that moves a known amount, and the agent's samples of it on a real broker.

The guest is a Linux under software emulation; what it reads, writes and sends is known to the byte,
and so is what the published counters must say.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aio_pika
import pytest
import pytest_asyncio

from hostler_common import servers
from hostler_common.testing import RunService, eventually, wait_ready
from hostler_usage import app
from hostler_usage.reading.sample import DomainSample, SampleReport
from hostler_usage.settings import Settings

PEER = Path(__file__).parent / "peers" / "libvirt_guest.py"
MIB = 1 << 20
PACKET_BYTES = 14 + 20 + 8 + 1000
"""Ethernet, IPv4, ICMP, and what `ping -s 1000` sends."""


@dataclass(frozen=True, slots=True)
class Libvirt:
    """The peer program, its libvirtd and its guest, which is up."""

    process: asyncio.subprocess.Process
    uri: str
    instance_id: str
    disk_bytes: int

    async def do(self, what: str, **request: Any) -> str:
        """What the peer answers."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": what, **request}).encode() + b"\n")
        return str((await _answer(self.process))["said"])

    async def guest(self, command: str) -> str:
        """What the shell command prints in the guest; it has ended well."""
        return await self.do("guest", command=command)

    async def block_counters(self) -> dict[str, int]:
        """What libvirt says itself of the guest's disk."""
        text = await self.do("virsh", arguments=["domblkstat", "guest", "vda"])
        words = [line.split() for line in text.splitlines()]
        return {name: int(value) for _, name, value in words}


async def _answer(process: asyncio.subprocess.Process) -> Any:
    assert process.stdout is not None
    async with asyncio.timeout(180):
        line = await process.stdout.readline()
    if not line:
        assert process.stderr is not None
        raise RuntimeError((await process.stderr.read()).decode(errors="replace"))
    return json.loads(line)


@pytest.fixture
def directory(server_directory: Path) -> Path:
    """A directory that any user can reach, with a short path: sockets lie in it."""
    directory = Path(tempfile.mkdtemp(dir=server_directory))
    directory.chmod(0o755)
    return directory


@pytest_asyncio.fixture
async def libvirt(directory: Path) -> AsyncIterator[Libvirt]:
    """A libvirt of the test's own; nothing of it is left afterwards."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(PEER), "run", str(directory)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield Libvirt(process, **await _answer(process))
    finally:
        assert process.stdin is not None
        process.stdin.close()
        async with asyncio.timeout(60):
            await process.wait()
    # its namespace ended with its first process, and so did all that ran in there
    assert [command for _, command in _commands() if str(directory) in command] == []


def _commands() -> Iterator[tuple[int, str]]:
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            arguments = each.read_bytes().replace(b"\0", b" ")
            yield int(each.parent.name), arguments.decode(errors="replace")


def _qemu_processes(instance_id: str) -> list[int]:
    return [pid for pid, command in _commands() if f" -uuid {instance_id} " in command]


class Samples:
    """What the agent has published, read from the exchange by a stranger."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[aio_pika.abc.AbstractIncomingMessage] = asyncio.Queue()

    async def after(self, moment: datetime) -> list[DomainSample]:
        """The samples of the first report whose reading may not have begun before the moment."""
        seen = 0
        while True:
            async with asyncio.timeout(60):
                message = await self.queue.get()
            assert message.routing_key == "usage.sampled.compute-1"
            report = SampleReport.model_validate_json(message.body)
            assert report.host == "compute-1"
            # a reading that began before may end after: the one that follows it did not
            seen += report.sampled_at > moment
            if seen > 1:
                return report.samples

    async def now(self) -> DomainSample:
        """The guest, sampled after this was called."""
        (sample,) = await self.after(datetime.now(UTC))
        return sample


@asynccontextmanager
async def agent(uri: str, amqp_url: str, tmp_path: Path) -> AsyncIterator[Samples]:
    """hostler-agent as a process of its own that samples every tenth of a second."""
    port, samples = servers.free_port(), Samples()
    async with await aio_pika.connect(amqp_url) as connection:
        channel = await connection.channel()
        exchange = await channel.declare_exchange("hostler", "topic", durable=True)
        queue = await channel.declare_queue(exclusive=True)
        await queue.bind(exchange, "usage.sampled.#")
        await queue.consume(samples.queue.put, no_ack=True)
        with (tmp_path / "agent.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                Path(sys.executable).parent / "hostler-agent",
                env={
                    **os.environ,
                    "HOSTLER_AMQP_URL": amqp_url,
                    "HOSTLER_AGENT_PARTS": "usage",
                    "HOSTLER_AGENT_HOST": "compute-1",
                    "HOSTLER_AGENT_HTTP_PORT": str(port),
                    "HOSTLER_USAGE_LIBVIRT_URI": uri,
                    "HOSTLER_USAGE_SAMPLE_SECONDS": "0.1",
                    "HOSTLER_USAGE_LIBVIRT_SECONDS": "2",
                },
                stdout=log,
                stderr=log,
            )
        try:
            await wait_ready(f"http://127.0.0.1:{port}")
            yield samples
        finally:
            process.terminate()
            assert await process.wait() == 0


async def test_samples_say_to_the_byte_what_a_guest_has_read_written_and_sent(
    libvirt: Libvirt, directory: Path, amqp_url: str, tmp_path: Path
) -> None:
    async with agent(libvirt.uri, amqp_url, tmp_path) as samples:
        before = await samples.now()
        assert str(before.instance_id) == libvirt.instance_id
        assert before.state == "running"
        assert before.run.process_start_ticks is not None
        (disk,) = before.disks
        assert (disk.device, disk.write_bytes, disk.write_requests) == ("vda", 0, 0)
        assert disk.source == str(directory / "disk.raw")
        (interface,) = before.interfaces
        assert (interface.name, interface.rx_bytes, interface.tx_bytes) == ("guest0", 0, 0)

        await libvirt.guest("dd if=/dev/zero of=/dev/vda bs=1M count=16 conv=fsync")
        after = await samples.now()
        assert after.disks[0].write_bytes == 16 * MIB
        assert after.disks[0].read_bytes == disk.read_bytes
        assert after.interfaces == before.interfaces
        assert after.run == before.run

        # the whole disk, and nothing from the guest's memory: no read-ahead can pass its end
        await libvirt.guest("echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/vda of=/dev/null bs=1M")
        later = await samples.now()
        assert later.disks[0].read_bytes - after.disks[0].read_bytes == libvirt.disk_bytes
        assert later.disks[0].write_bytes == 16 * MIB
        assert later.cpu_time_ns is not None
        assert before.cpu_time_ns is not None
        assert later.cpu_time_ns > before.cpu_time_ns

        # nobody answers: sent and received cannot be taken for each other
        await libvirt.guest("ping -c 3 -s 1000 -i 0.1 -W 1 192.0.2.1 || true")
        last = await samples.now()
        (interface,) = last.interfaces
        assert (interface.tx_packets, interface.tx_bytes) == (3, 3 * PACKET_BYTES)
        assert (interface.rx_packets, interface.rx_bytes) == (0, 0)
        counters = await libvirt.block_counters()
        (disk,) = last.disks
        assert counters["rd_req"] == disk.read_requests > 0
        assert counters["rd_bytes"] == disk.read_bytes
        assert counters["wr_req"] == disk.write_requests > 0
        assert counters["wr_bytes"] == disk.write_bytes


async def test_a_domain_started_again_is_another_run_even_where_libvirt_repeats_its_number(
    libvirt: Libvirt, amqp_url: str, tmp_path: Path, run_service: RunService
) -> None:
    """And what it wrote in each run is in the ledger, to the byte."""
    async with (
        run_service(
            app.serve, Settings, app.PACKAGE, fold_seconds=0.05, log_level="WARNING"
        ) as usage,
        agent(libvirt.uri, amqp_url, tmp_path) as samples,
    ):
        await _launched(amqp_url, libvirt.instance_id)
        await libvirt.guest("dd if=/dev/zero of=/dev/vda bs=1M count=4 conv=fsync")
        first = await samples.now()
        assert first.disks[0].write_bytes == 4 * MIB

        # libvirtd goes and comes back, and the guest does not notice
        await libvirt.do("stop_libvirtd")
        await libvirt.do("start_libvirtd")
        same = await samples.now()
        assert same.run == first.run
        assert same.disks[0].write_bytes == 4 * MIB

        await libvirt.do("destroy")
        assert await samples.after(datetime.now(UTC)) == []
        await libvirt.do("stop_libvirtd")
        await libvirt.do("start_libvirtd")
        await libvirt.do("start")
        await libvirt.guest("dd if=/dev/zero of=/dev/vda bs=1M count=8 conv=fsync")
        again = await samples.now()
        # nothing but the process tells them apart: the number is the same, and no counter fell
        assert again.instance_id == first.instance_id
        assert again.run.domain_id == first.run.domain_id
        assert again.disks[0].write_bytes == 8 * MIB
        assert not again.run.continues(first.run)

        async def written() -> Any:
            today = datetime.now(UTC)
            rows = await usage.api.get(
                "/v1/usage",
                start=(today - timedelta(days=1)).isoformat(),
                end=(today + timedelta(days=1)).isoformat(),
                group_by="project",
                resource_id=libvirt.instance_id,
            )
            found = {row["group"]["project"]: row["amounts"] for row in rows["usage"]}
            return found.get("p1", {}).get("disk_write_bytes") == 12 * MIB

        await eventually(written)


async def _launched(amqp_url: str, instance_id: str) -> None:
    """Nova has told of the instance."""
    launched_at = datetime.now(UTC) - timedelta(hours=1)
    message = {
        "message_id": "launched",
        "event_type": "compute.instance.create.end",
        "timestamp": str(launched_at),
        "payload": {
            "instance_id": instance_id,
            "tenant_id": "p1",
            "launched_at": str(launched_at),
            "state": "active",
        },
    }
    async with await aio_pika.connect(amqp_url) as connection:
        channel = await connection.channel()
        exchange = await channel.get_exchange("nova")
        await exchange.publish(
            aio_pika.Message(json.dumps(message).encode()), "notifications.info"
        )


async def test_a_qemu_that_does_not_answer_costs_one_reading_and_then_its_own_disks_only(
    libvirt: Libvirt, amqp_url: str, tmp_path: Path
) -> None:
    async with agent(libvirt.uri, amqp_url, tmp_path) as samples:
        before = await samples.now()
        (qemu,) = _qemu_processes(libvirt.instance_id)
        os.kill(qemu, signal.SIGSTOP)
        try:
            # the first reading waits for QEMU and is given up; the next ones find the domain busy

            async def without_disks() -> DomainSample | None:
                sample = await samples.now()
                return sample if not sample.disks else None

            hung: DomainSample = await eventually(without_disks)
            assert hung.run == before.run
            assert hung.interfaces == before.interfaces
        finally:
            os.kill(qemu, signal.SIGCONT)

        async def with_disks() -> DomainSample | None:
            sample = await samples.now()
            return sample if sample.disks else None

        after: DomainSample = await eventually(with_disks)
        assert after.run == before.run
        assert after.disks == before.disks


async def test_a_guest_that_pauses_keeps_its_run_and_its_counters(
    libvirt: Libvirt, amqp_url: str, tmp_path: Path
) -> None:
    async with agent(libvirt.uri, amqp_url, tmp_path) as samples:
        await libvirt.guest("dd if=/dev/zero of=/dev/vda bs=1M count=1 conv=fsync")
        running = await samples.now()
        await libvirt.do("virsh", arguments=["suspend", "guest"])

        async def paused() -> DomainSample | None:
            sample = await samples.now()
            return sample if sample.state == "paused" else None

        sample: DomainSample = await eventually(paused)
        assert sample.run == running.run
        assert sample.disks == running.disks
