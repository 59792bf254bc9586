"""``make up``, ``make down`` and ``make demo``: the whole suite as background processes of this user.

Servers are those of ``AMQP_URL`` and ``DATABASE_URL``; else private ones from installed binaries; else those of
docker-compose.yml. What runs is written to ``suite.json`` in the state directory, with each process's start time, so
that ``down`` never signals a stranger that has got an old number.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from demo import stage as demo_stage
from hostler_common import auth, db, errors, logs, servers
from hostler_common.testing import wait_ready

ROOT = Path(__file__).resolve().parent.parent
SERVICES = {"precache": 8301, "usage": 8302, "capacity": 8303, "baremetal": 8304}
DATABASE = "hostler"

# not the project of a stack that somebody runs from this checkout, and ports that are free
COMPOSE_PROJECT = "hostler-demo"
COMPOSE_ENVIRONMENT = {
    "HOSTLER_RABBITMQ_PORT": "0",
    "HOSTLER_RABBITMQ_PAGES_PORT": "0",
    "HOSTLER_POSTGRES_PORT": "0",
}


class SuiteFailed(errors.HostlerError):
    """The suite cannot be started; the detail is one clear sentence."""

    code = "suite.failed"


def state_directory() -> Path:
    """Where this checkout's suite keeps its servers' data, logs and tokens: reachable by PostgreSQL's user.

    Raises:
        SuiteFailed: somebody else has made it, and could say what we start and stop.
    """
    key = hashlib.sha256(str(ROOT).encode()).hexdigest()[:8]
    default = f"/var/tmp/hostler-{os.getuid()}-{key}"  # noqa: S108  its owner is checked
    directory = Path(os.environ.get("HOSTLER_STATE_DIRECTORY", default))
    if directory.exists() and directory.stat().st_uid != os.getuid():
        raise SuiteFailed(f"{directory} belongs to somebody else: set HOSTLER_STATE_DIRECTORY")
    return directory


def _started_at(pid: int) -> str | None:
    """When the process with this number started, in the kernel's ticks; None if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]


@dataclass(slots=True)
class Suite:
    """What is running, as ``suite.json`` says."""

    directory: Path
    processes: list[dict[str, str]] = field(default_factory=list)
    compose: bool = False

    @property
    def file(self) -> Path:
        """The record of what runs."""
        return self.directory / "suite.json"

    def save(self) -> None:
        """Write the record; it is whole whenever it is read."""
        temporary = self.file.with_suffix(".new")
        temporary.write_text(json.dumps({"processes": self.processes, "compose": self.compose}))
        temporary.replace(self.file)

    @classmethod
    def load(cls, directory: Path) -> "Suite":
        """What an earlier call started; empty if nothing."""
        try:
            return cls(directory, **json.loads((directory / "suite.json").read_text()))
        except FileNotFoundError:
            return cls(directory)

    def record(self, name: str, pid: int, how: str = "TERM") -> None:
        """Remember a process, to be stopped with the named signal."""
        self.processes.append(
            {"name": name, "pid": str(pid), "started": _started_at(pid) or "", "signal": how}
        )
        self.save()

    def log_file(self, name: str) -> Path:
        """Where a process's output goes."""
        return self.directory / "logs" / f"{name}.log"

    def spawn(self, name: str, argv: Sequence[str], environment: Mapping[str, str]) -> int:
        """Start a background process that outlives this one; its number."""
        log = self.log_file(name)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            process = subprocess.Popen(
                list(argv),
                env={**os.environ, **environment},
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.record(name, process.pid)
        return process.pid

    def down(self) -> int:
        """Stop everything, the last started first, and forget it; how many were running.

        Raises:
            SuiteFailed: the servers are an engine's that does not answer.
        """
        stopped = 0
        for entry in reversed(self.processes):
            pid = int(entry["pid"])
            if _started_at(pid) != entry["started"]:
                continue
            stopped += 1
            os.kill(pid, getattr(signal, f"SIG{entry['signal']}"))
            deadline = time.monotonic() + 25
            while _started_at(pid) == entry["started"]:
                if time.monotonic() > deadline:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(pid, signal.SIGKILL)
                    break
                time.sleep(0.02)
        if self.compose:
            compose = compose_command()
            if not compose:
                raise SuiteFailed("the servers run in Docker, and no engine answers to stop them")
            stopped += 1
            subprocess.run(
                [*compose, "down", "--volumes"],
                cwd=ROOT,
                env={**os.environ, **COMPOSE_ENVIRONMENT},
                capture_output=True,  # its warnings about secrets that nothing here uses
                check=False,
            )
        self.processes, self.compose = [], False
        self.file.unlink(missing_ok=True)
        return stopped


def compose_command() -> list[str]:
    """``docker compose``, or the older ``docker-compose``, as a project of our own; empty where no engine answers."""
    if shutil.which("docker") is None or not _succeeds("docker", "info"):
        return []
    if _succeeds("docker", "compose", "version"):
        return ["docker", "compose", "-p", COMPOSE_PROJECT]
    return ["docker-compose", "-p", COMPOSE_PROJECT] if shutil.which("docker-compose") else []


def _succeeds(*argv: str) -> bool:
    return subprocess.run(argv, capture_output=True, check=False).returncode == 0


def start_servers(suite: Suite, say: demo_stage.Say) -> tuple[str, str]:
    """RabbitMQ's and PostgreSQL's addresses, of servers that answer; it is said which were taken.

    Raises:
        SuiteFailed, ServerFailed: there are none to be had.
    """
    amqp_url, database_url = os.environ.get("AMQP_URL"), os.environ.get("DATABASE_URL")
    compose = (
        []
        if servers.RabbitMQ.is_installed() and servers.Postgres.binaries()
        else compose_command()
    )
    started_compose = False
    if amqp_url:
        _must_answer(amqp_url, 5672, "RabbitMQ at AMQP_URL")
        say(f"RabbitMQ: the one at AMQP_URL ({urlsplit(amqp_url).hostname})")
    elif servers.RabbitMQ.is_installed():
        rabbitmq = servers.RabbitMQ(suite.directory / "rabbitmq")
        rabbitmq.start()
        for pid, name in rabbitmq.processes():
            suite.record(name, pid, "KILL" if name == "epmd" else "TERM")
        amqp_url = rabbitmq.url
        say(f"RabbitMQ: a private one, from installed binaries, on port {rabbitmq.port}")
    elif compose:
        amqp_url = _compose_up(
            suite, compose, "rabbitmq", 5672, "amqp://hostler:hostler@127.0.0.1:{}/"
        )
        started_compose = True
        say("RabbitMQ: docker compose")
    if database_url:
        _must_answer(database_url, 5432, "PostgreSQL at DATABASE_URL")
        say(f"PostgreSQL: the one at DATABASE_URL ({urlsplit(database_url).hostname})")
    elif servers.Postgres.binaries():
        postgres = servers.Postgres(suite.directory / "postgres", durable=True)
        postgres.start()
        assert postgres.process is not None
        suite.record("postgres", postgres.process.pid, "INT")
        asyncio.run(_create_database(postgres.url, DATABASE))
        database_url = _with_path(postgres.url, DATABASE)
        say(f"PostgreSQL: a private one, from installed binaries, on port {postgres.port}")
    elif compose:
        address = "postgresql://hostler:hostler@127.0.0.1:{}/hostler"
        database_url = _compose_up(suite, compose, "postgres", 5432, address)
        started_compose = True
        say("PostgreSQL: docker compose")
    suite.compose = suite.compose or started_compose
    if amqp_url is None or database_url is None:
        lacking = "RabbitMQ" if amqp_url is None else "PostgreSQL"
        raise SuiteFailed(
            f"there is no {lacking} to be had: set AMQP_URL and DATABASE_URL, or install rabbitmq-server and"
            " postgresql, or run as root on Debian, or start a Docker engine"
        )
    return amqp_url, database_url


def _must_answer(url: str, default_port: int, what: str) -> None:
    parts = urlsplit(url)
    host, port = parts.hostname or "localhost", parts.port or default_port
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError as exc:
        raise SuiteFailed(f"{what} does not answer: {host}:{port}: {exc.strerror or exc}") from exc


def _compose_up(suite: Suite, compose: list[str], service: str, port: int, address: str) -> str:
    suite.compose = True
    suite.save()
    for argv in ([*compose, "up", "-d", service], [*compose, "port", service, str(port)]):
        done = subprocess.run(
            argv,
            cwd=ROOT,
            env={**os.environ, **COMPOSE_ENVIRONMENT},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise SuiteFailed(f"{' '.join(argv)} failed: {last}")
    return address.format(done.stdout.strip().rpartition(":")[2])


def _with_path(url: str, path: str) -> str:
    return urlunsplit(urlsplit(url)._replace(path=f"/{path}"))


async def _create_database(url: str, name: str) -> None:
    async with (
        db.open_pool(url, schema="public", max_size=2) as pool,
        db.connection(pool) as connection,
    ):
        if not await connection.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", name):
            await connection.execute(f'CREATE DATABASE "{name}"')


def write_tokens(directory: Path) -> tuple[Path, Path]:
    """A tokens file and the admin's token file, made once; nobody else may read them."""
    directory.mkdir(parents=True, exist_ok=True)
    tokens, admin = directory / "tokens", directory / "admin-token"
    if not tokens.exists():
        token, line = auth.new_token(name="admin", role=auth.Role.ADMIN)
        for path, text in ((admin, token), (tokens, line)):
            path.touch(mode=0o600)
            path.write_text(text + "\n")
    return tokens, admin


def up(say: demo_stage.Say) -> demo_stage.Running:
    """The suite is running and ready, after an earlier one of this checkout was taken down.

    Raises:
        HostlerError: it is not; what was started is down again, and the detail is one clear sentence.
    """
    directory = state_directory()
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o755)
    suite = Suite.load(directory)
    if suite.down():
        say("took down the suite that was running")
    # a story starts from nothing: yesterday's rows would be in its tables
    for name in ("rabbitmq", "postgres", "logs", "work"):
        shutil.rmtree(directory / name, ignore_errors=True)
    try:
        return _up(suite, say)
    except BaseException:
        suite.down()
        raise


def _up(suite: Suite, say: demo_stage.Say) -> demo_stage.Running:
    amqp_url, database_url = start_servers(suite, say)
    tokens, admin = write_tokens(suite.directory / "secrets")
    environment = {
        "HOSTLER_AMQP_URL": amqp_url,
        "HOSTLER_DATABASE_URL": database_url,
        "HOSTLER_AUTH_MODE": "token",
        "HOSTLER_AUTH_TOKENS_FILE": str(tokens),
        "HOSTLER_TOKEN_FILE": str(admin),
        "HOSTLER_LOG_FORMAT": "json",
    }
    running = demo_stage.Running(
        amqp_url=amqp_url,
        database_url=database_url,
        environment=environment,
        token=admin.read_text().strip(),
        token_file=admin,
        directory=suite.directory,
        urls={},
        suite=suite,
    )
    for name, port in SERVICES.items():
        running.environment.update(demo_stage.service_environment(name, suite.directory, running))
        if servers.port_answers(port):
            taken = port
            port = servers.free_port()
            say(f"{name}: port {taken} is in use, taking {port}")
        running.urls[name] = f"http://127.0.0.1:{port}"
        running.environment[f"HOSTLER_{name.upper()}_HTTP_PORT"] = str(port)
        running.environment[f"HOSTLER_{name.upper()}_URL"] = running.urls[name]
    for name in SERVICES:
        migrate = [_program(name), "migrate"]
        done = subprocess.run(
            migrate, env={**os.environ, **environment}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SuiteFailed(f"hostler-{name} migrate failed: {done.stderr.strip()}")
    for name in SERVICES:
        running.pids[name] = suite.spawn(name, [_program(name), "serve"], environment)
    asyncio.run(_wait_for(running))
    (suite.directory / "environment").write_text(
        "".join(
            f"export {key}='{value}'\n" for key, value in environment.items() if "URL" not in key
        )
    )
    return running


async def _wait_for(running: demo_stage.Running) -> None:
    for name, url in running.urls.items():
        try:
            await wait_ready(url, seconds=30)
        except TimeoutError as exc:
            log = running.suite.log_file(name)
            tail = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise SuiteFailed(
                f"{name} did not become ready: {exc}; last line of {log}: {tail}"
            ) from exc


def _program(service: str) -> str:
    return str(Path(sys.executable).parent / f"hostler-{service}")


def main() -> int:
    """Run one of the three commands; 0 if it did what it says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("command", choices=["up", "down", "demo"])
    command = parser.parse_args().command
    say = demo_stage.say
    logs.configure(service="demo", level="WARNING", log_format="console")
    try:
        if command == "down":
            stopped = Suite.load(state_directory()).down()
            say(f"stopped {stopped} processes" if stopped else "nothing was running")
            return 0
        started = time.monotonic()
        running = up(say)
        if command == "demo":
            asyncio.run(demo_stage.tell_story(running))
        demo_stage.summary(running, seconds=time.monotonic() - started)
    except errors.HostlerError as exc:
        print(f"hostler: {exc.detail}", file=sys.stderr)
        return 1
    except OSError as exc:  # a missing right, a full disk
        print(f"hostler: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("hostler: interrupted; 'make down' stops what is running", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
