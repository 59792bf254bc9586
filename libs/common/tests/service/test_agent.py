"""``hostler-agent`` as a real process, with a part that is installed for the test alone."""

import asyncio
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from hostler_common import agent, bus, servers, settings
from hostler_common.testing import eventually, open_bus, wait_ready

PART = """
from typing import ClassVar

from aiohttp import web

from hostler_common import bus, settings


class Settings(settings.ProcessSettings):
    service: ClassVar[str] = "echo"
    greeting: str = "hello"
    times: int = 1


async def create(context):
    loaded = context.load(Settings)
    turns = []

    async def show(request):
        return web.json_response(
            {"host": context.host, "greeting": loaded.greeting, "turns": len(turns)}
        )

    async def answer(delivery):
        await context.bus.publish(
            bus.Message(
                exchange="hostler",
                routing_key="example.echo.answered",
                body=delivery.body,
                message_id=delivery.message_id,
            )
        )

    async def turn():
        turns.append(1)

    queue = bus.Queue(
        name=f"echo.{context.host}",
        type="classic",
        exclusive=True,
        bindings=(bus.Binding(exchange=bus.HOSTLER, routing_key="echo.#"),),
    )
    context.app.router.add_get("/echo", show)
    context.consume(queue, answer)
    context.every(0.1, turn, name="echo")


async def fail(context):
    raise LookupError("the part broke")
"""


@pytest.fixture
def installed(programs: Any, tmp_path: Path) -> Path:
    """A directory on the path in which parts ``echo`` and ``broken`` are installed."""
    directory = tmp_path / "site"
    metadata = directory / "hostler_test_part-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: hostler-test-part\nVersion: 1\n"
    )
    (metadata / "entry_points.txt").write_text(
        "[hostler.agents]\necho = hostler_test_part:create\nbroken = hostler_test_part:fail\n"
    )
    (directory / "hostler_test_part.py").write_text(PART)
    return directory


@pytest.fixture
def environment(amqp_url: str, installed: Path) -> dict[str, str]:
    return {
        "PYTHONPATH": str(installed),
        "HOSTLER_AMQP_URL": amqp_url,
        "HOSTLER_AGENT_HOST": "hv1.example",
        "HOSTLER_AGENT_HTTP_PORT": str(servers.free_port()),
        "HOSTLER_AGENT_PARTS": "echo",
        "HOSTLER_ECHO_GREETING": "good day",
    }


def start(programs: Any, environment: dict[str, str]) -> Any:
    return programs.start(Path(sys.executable).with_name("hostler-agent"), **environment)


async def test_an_agent_serves_its_parts_routes_loops_and_queues_and_ends_on_sigterm(
    programs: Any, environment: dict[str, str], inbox: Any
) -> None:
    process = start(programs, environment)
    url = f"http://127.0.0.1:{environment['HOSTLER_AGENT_HTTP_PORT']}"
    await wait_ready(url)
    async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
        assert (await client.get("/healthz")).json() == {"status": "pass", "stuck": []}
        assert "hostler_broker_connected" in (await client.get("/metrics")).text

        async def has_turned() -> bool:
            shown = (await client.get("/echo")).json()
            assert shown["host"] == "hv1.example"
            assert shown["greeting"] == "good day"
            return bool(shown["turns"] > 1)

        await eventually(has_turned)
    async with open_bus(environment["HOSTLER_AMQP_URL"]) as opened:
        await opened.publish(
            bus.Message(
                exchange="hostler",
                routing_key="echo.now",
                body=b"anybody there?",
                message_id="1",
                mandatory=True,
            )
        )

    async def answered() -> list[Any]:
        taken = await inbox.take()
        return [got for got in taken if got.routing_key == "example.echo.answered"]

    (answer,) = await eventually(answered)
    assert answer.body == b"anybody there?"
    process.terminate()
    assert await process.ended() == 0
    assert '"event": "drained"' in process.out


@pytest.fixture
def run_main(
    environment: dict[str, str], installed: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """Runs the console script in this process with these settings beside the right ones; gives its exit code."""
    monkeypatch.syspath_prepend(installed)

    def run(**more: str) -> int:
        for name, value in {**environment, **more}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as caught:
            agent.main()
        assert isinstance(caught.value.code, int)
        return caught.value.code

    return run


def test_a_part_that_is_not_installed_is_refused_by_name(
    run_main: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(HOSTLER_AGENT_PARTS="echo,nonsense") == 2
    assert capsys.readouterr().err == (
        "hostler-agent: HOSTLER_AGENT_PARTS: not installed here: nonsense\n"
    )


def test_a_part_that_fails_to_start_ends_the_agent_with_its_cause(
    run_main: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(HOSTLER_AGENT_PARTS="broken") == 1
    assert "LookupError: the part broke" in capsys.readouterr().out


def test_wrong_settings_of_the_agent_end_with_2_and_each_named(
    run_main: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(HOSTLER_AGENT_HTTP_PORT="many", HOSTLER_LOG_LEVEL="LOUD") == 2
    shown = capsys.readouterr().err
    assert "HOSTLER_AGENT_HTTP_PORT" in shown
    assert "HOSTLER_AGENT_LOG_LEVEL" in shown


def test_wrong_settings_of_a_part_end_with_2(
    run_main: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(HOSTLER_ECHO_TIMES="many") == 2
    assert "HOSTLER_ECHO_TIMES" in capsys.readouterr().err


def test_an_agents_port_in_use_is_one_sentence(
    run_main: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        assert run_main(HOSTLER_AGENT_HTTP_PORT=str(port)) == 1
    assert capsys.readouterr().err == (
        f"hostler-agent: cannot listen on 127.0.0.1:{port}: Address already in use\n"
    )


async def test_a_running_download_does_not_hold_up_the_end_for_ever(
    programs: Any, environment: dict[str, str], installed: Path
) -> None:
    part = installed / "hostler_test_part.py"
    part.write_text(
        PART.replace(
            "async def show(request):",
            "async def show(request):\n        await __import__('asyncio').sleep(3600)",
        )
    )
    process = start(programs, {**environment, "HOSTLER_DRAIN_SECONDS": "2"})
    url = f"http://127.0.0.1:{environment['HOSTLER_AGENT_HTTP_PORT']}"
    await wait_ready(url)
    _reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    writer.write(b"GET /echo HTTP/1.1\r\nHost: x\r\n\r\n")
    await writer.drain()
    process.process.send_signal(signal.SIGTERM)
    assert await process.ended(20) == 0
    writer.close()


def test_unless_said_every_installed_part_runs(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(installed)
    loaded = settings.load(agent.AgentSettings, amqp_url="amqp://nowhere/")
    assert {"broken", "echo"} <= set(loaded.parts)
    assert loaded.host == socket.gethostname()
    assert loaded.http_port == 8310
