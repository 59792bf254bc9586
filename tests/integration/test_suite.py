"""``make demo``, ``make up`` and ``make down``, as somebody would run them."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostler_common import servers

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def directory(server_directory: Path) -> Iterator[Path]:
    path = server_directory / "suite"
    yield path
    run("down", path)


def run(command: str, directory: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    inherited = {k: v for k, v in os.environ.items() if k not in ("AMQP_URL", "DATABASE_URL")}
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / "suite.py", command],
        env={**inherited, "HOSTLER_STATE_DIRECTORY": str(directory), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


def pids(directory: Path) -> dict[str, int]:
    recorded = json.loads((directory / "suite.json").read_text())
    return {entry["name"]: int(entry["pid"]) for entry in recorded["processes"]}


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.timeout(400)
def test_the_demo_holds_every_claim_and_leaves_a_suite_that_a_second_run_takes_down(
    directory: Path,
) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # somebody else has it: as good
            taken.bind(("127.0.0.1", 8302))
            taken.listen()
        told = run("demo", directory)
    assert told.returncode == 0, told.stdout + told.stderr
    assert "usage: port 8302 is in use, taking" in told.stdout
    for part in ("usage", "capacity", "precache", "baremetal"):
        assert f"{part} ─" in told.stdout
    assert told.stdout.count("  ok: ") >= 20
    assert "stop it with: make down" in told.stdout
    first = pids(directory)
    assert {"rabbitmq", "postgres", "usage", "capacity", "precache", "baremetal"} <= first.keys()
    assert all(is_running(pid) for pid in first.values())

    again = run("up", directory)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "took down the suite that was running" in again.stdout
    assert not [name for name, pid in first.items() if is_running(pid)]

    second = pids(directory)
    os.kill(second["usage"], signal.SIGKILL)
    down = run("down", directory)
    assert down.returncode == 0
    assert f"stopped {len(second) - 1} processes" in down.stdout
    assert not [name for name, pid in second.items() if is_running(pid)]
    assert "nothing was running" in run("down", directory).stdout


def test_servers_that_do_not_answer_end_it_with_one_sentence(directory: Path) -> None:
    nowhere = servers.free_port()
    up = run(
        "up",
        directory,
        AMQP_URL=f"amqp://guest:brokerword@127.0.0.1:{nowhere}/",
        DATABASE_URL=f"postgresql://me:baseword@127.0.0.1:{nowhere}/x",
    )
    assert up.returncode == 1
    assert up.stderr.startswith("hostler: ")
    assert len(up.stderr.strip().splitlines()) == 1
    assert "does not answer" in up.stderr
    assert "word@" not in up.stdout + up.stderr
    assert "nothing was running" in run("down", directory).stdout
