"""The agent's part: what virsh says goes to the broker again and again, whatever is away meanwhile.

A script stands in for virsh; tests/integration/test_usage_libvirt.py has the real one.
"""

import asyncio
import os
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aio_pika
import pytest

from hostler_common import agent as agent_module
from hostler_common import client, servers, settings
from hostler_common.testing import eventually, wait_ready
from hostler_usage import agent
from hostler_usage.reading.sample import SampleReport

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
UUID = uuid.UUID("7d5a3f52-8a6e-4f0a-9a50-0f4b5c9d7e01")

OUTPUT = """\
{uuid} 1 guest

Domain: 'guest'
  state.state=1
  cpu.time={cpu_time_ns}
  block.count=1
  block.0.name=vda
  block.0.rd.reqs=2
  block.0.rd.bytes=4608
  block.0.wr.reqs=20
  block.0.wr.bytes=16777216

{uuid} 1 guest

"""


@dataclass(frozen=True, slots=True)
class Virsh:
    """A program of that name, the first on the path."""

    directory: Path

    def is_shell(self, text: str) -> None:
        """From now on it does this."""
        made = self.directory / "virsh.new"
        made.write_text(f"#!/bin/sh\n{text}\n")
        made.chmod(0o755)
        made.rename(self.directory / "virsh")  # never a half of it

    def says(self, cpu_time_ns: int) -> None:
        """From now on it prints one domain with so much CPU time, and notes how it was called."""
        said = OUTPUT.format(uuid=UUID, cpu_time_ns=cpu_time_ns)
        self.is_shell(
            f'printf "%s\\n" "$LC_ALL" "$@" >{self.directory}/called\ncat <<"END"\n{said}END'
        )

    def is_missing(self) -> None:
        """There is none."""
        (self.directory / "virsh").unlink()


@pytest.fixture
def virsh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Virsh:
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("sh", "cat", "sleep"):
        found = next(
            Path(each) / name for each in ("/bin", "/usr/bin") if (Path(each) / name).exists()
        )
        (programs / name).symlink_to(found)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return Virsh(programs)


@dataclass(frozen=True, slots=True)
class Running:
    """An agent, and what it has published."""

    api: client.Api
    messages: "asyncio.Queue[aio_pika.abc.AbstractIncomingMessage]"

    async def report(self) -> SampleReport:
        """The next report."""
        async with asyncio.timeout(60):
            message = await self.messages.get()
        return SampleReport.model_validate_json(message.body)

    async def report_with(self, cpu_time_ns: int) -> SampleReport:
        """The first report from here on that says this CPU time."""
        while True:
            report = await self.report()
            if [each.cpu_time_ns for each in report.samples] == [cpu_time_ns]:
                return report

    async def metric(self, name: str) -> float:
        """Its value now; zero before the first turn has ended."""
        text = await self.api.get("/metrics")
        lines = [each for each in text.splitlines() if each.startswith(f"{name} ")]
        return float(lines[0].split()[-1]) if lines else 0.0

    async def has_failed(self, away: str) -> None:
        """A turn has failed since, for this reason."""
        name = f'hostler_usage_sample_turns_failed_total{{away="{away}"}}'
        count = await self.metric(name)

        async def again() -> bool:
            failing = await self.metric('hostler_loop_failing{loop="usage_sample"}')
            return failing == 1.0 and await self.metric(name) > count

        await eventually(again)


@asynccontextmanager
async def listening(
    url: str,
) -> AsyncIterator["asyncio.Queue[aio_pika.abc.AbstractIncomingMessage]"]:
    """What is published with the agent's keys, from the exchange as a stranger would declare it."""
    messages: asyncio.Queue[aio_pika.abc.AbstractIncomingMessage] = asyncio.Queue()
    async with await aio_pika.connect_robust(url) as connection:
        channel = await connection.channel()
        exchange = await channel.declare_exchange("hostler", "topic", durable=True)
        queue = await channel.declare_queue("samples", durable=True)
        await queue.bind(exchange, "usage.sampled.#")
        await queue.consume(messages.put, no_ack=True)
        yield messages


RunAgent = Callable[..., AbstractAsyncContextManager[Running]]


@pytest.fixture
def run_agent(monkeypatch: pytest.MonkeyPatch) -> RunAgent:
    """`async with run_agent(amqp_url, **settings) as running`."""

    @asynccontextmanager
    async def run(url: str, **values: str) -> AsyncIterator[Running]:
        monkeypatch.setenv("HOSTLER_AMQP_URL", url)
        monkeypatch.setenv("HOSTLER_USAGE_SAMPLE_SECONDS", "0.2")
        for name, value in values.items():
            monkeypatch.setenv(f"HOSTLER_USAGE_{name.upper()}", value)
        stop, port = asyncio.Event(), servers.free_port()
        process = settings.load(
            agent_module.AgentSettings, host="hv-1.example", parts=["usage"], http_port=port
        )
        async with asyncio.TaskGroup() as group, listening(url) as messages:
            group.create_task(agent_module.serve(process, stop=stop))
            try:
                await wait_ready(f"http://127.0.0.1:{port}")
                async with client.open_api(f"http://127.0.0.1:{port}") as api:
                    yield Running(api, messages)
            finally:
                stop.set()

    return run


async def test_samples_are_published_again_and_again_each_newer_than_the_last(
    run_agent: RunAgent, amqp_url: str, virsh: Virsh
) -> None:
    virsh.says(1_000)
    async with run_agent(amqp_url, libvirt_uri="test:///x") as running:
        async with asyncio.timeout(60):
            message = await running.messages.get()
        assert (message.exchange, message.routing_key) == ("hostler", "usage.sampled.hv-1.example")
        assert (message.type, message.app_id) == ("usage.sampled", "hostler-agent")
        assert message.headers["schema"] == "1.0"
        first = SampleReport.model_validate_json(message.body)
        assert message.message_id == str(first.report_id)
        assert first.host == "hv-1.example"
        (sample,) = first.samples
        assert (sample.instance_id, sample.cpu_time_ns) == (UUID, 1_000)
        assert (sample.disks[0].write_bytes, sample.interfaces) == (16_777_216, [])
        assert str(sample.run.boot_id) == BOOT_ID.read_text().strip()  # noqa: ASYNC240  of the kernel
        virsh.says(2_000)
        later = await running.report_with(2_000)
        assert later.sampled_at > first.sampled_at
        assert later.report_id != first.report_id
        assert later.samples[0].run.continues(sample.run)
    assert (virsh.directory / "called").read_text().splitlines() == [
        "C",
        "--readonly",
        "--connect",
        "test:///x",
        "list --id --uuid --name; domstats --raw --nowait --list-active --state --cpu-total --block"
        " --interface; list --id --uuid --name",
    ]


async def test_without_virsh_the_turns_fail_until_there_is_one(
    run_agent: RunAgent,
    amqp_url: str,
    virsh: Virsh,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", str(virsh.directory))  # the machine's own is not found
    async with run_agent(amqp_url) as running:
        await running.has_failed("libvirt")
        await running.has_failed("libvirt")
        virsh.says(1_000)
        await running.report_with(1_000)
        virsh.is_missing()
        await running.has_failed("libvirt")
    output = "".join(capsys.readouterr())
    # twice away, twice said, however many turns failed
    assert output.count("loop_waits") == 2
    assert output.count("virsh cannot be run: No such file or directory") == 2


async def test_what_virsh_complains_of_is_said_and_nothing_is_published(
    run_agent: RunAgent, amqp_url: str, virsh: Virsh, capsys: pytest.CaptureFixture[str]
) -> None:
    virsh.is_shell('echo "error: failed to connect to the hypervisor" >&2; exit 1')
    async with run_agent(amqp_url) as running:
        await running.has_failed("libvirt")
        assert await running.metric("hostler_usage_sample_reports_sent_total") == 0
        virsh.says(1_000)
        await running.report_with(1_000)
    assert "failed to connect to the hypervisor" in "".join(capsys.readouterr())


async def test_a_virsh_that_hangs_is_ended_with_what_it_started(
    run_agent: RunAgent, amqp_url: str, virsh: Virsh, tmp_path: Path
) -> None:
    pids = tmp_path / "pids"
    virsh.is_shell(f"echo $$ >>{pids}; sleep 600 & wait")
    async with run_agent(amqp_url, libvirt_seconds="0.2") as running:
        await running.has_failed("libvirt")
        virsh.says(1_000)
        await running.report_with(1_000)
        groups = [int(line) for line in pids.read_text().splitlines()]
        assert groups

        async def are_gone() -> bool:
            return not any(is_running(group) for group in groups)

        await eventually(are_gone)


def is_running(group: int) -> bool:
    """Whether a process of the group lives: one that ended counts not, though nobody has asked how.

    In a container process 1 may be none that asks.
    """
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group, *_ = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its_group) == group and state != "Z":
            return True
    return False


async def test_a_stop_in_the_middle_of_a_reading_leaves_no_virsh_behind(
    run_agent: RunAgent,
    amqp_url: str,
    virsh: Virsh,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pids = tmp_path / "pids"
    virsh.is_shell(f"echo $$ >>{pids}; sleep 600 & wait")
    monkeypatch.setenv("HOSTLER_DRAIN_SECONDS", "0.5")
    async with run_agent(amqp_url):

        async def reads() -> bool:
            return pids.exists() and pids.read_text().endswith("\n")

        await eventually(reads)
    (group,) = pids.read_text().splitlines()

    async def is_gone() -> bool:
        return not is_running(int(group))

    await eventually(is_gone)


async def test_a_report_that_the_broker_did_not_take_is_not_sent_again_but_counted(
    run_agent: RunAgent,
    own_rabbitmq: servers.RabbitMQ,
    virsh: Virsh,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(agent, "CONNECT_SECONDS", 0.3)
    virsh.says(1_000)
    async with run_agent(own_rabbitmq.url) as running:
        await running.report_with(1_000)
        own_rabbitmq.stop()
        virsh.says(2_000)
        await running.has_failed("broker")
        virsh.says(3_000)
        await running.has_failed("broker")
        own_rabbitmq.start()
        said: set[int | None] = set()
        while 3_000 not in said:
            said |= {each.cpu_time_ns for each in (await running.report()).samples}
        assert 2_000 not in said
