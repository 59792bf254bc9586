"""Private PostgreSQL and RabbitMQ servers, from binaries that are installed, on free ports, with data of their own.

Tests and ``make demo`` run on them; production does not. PostgreSQL refuses to run as root, so as root it runs as
``postgres`` or ``nobody``, and its data lies where that user can reach it. RabbitMQ gets its own Erlang port mapper,
cookie and plugins file, so that two nodes on one machine never meet.
"""

import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path

from hostler_common import errors

START_SECONDS = 180.0


class ServerFailed(errors.HostlerError):
    """A private server is not installed, or did not come up; the detail has the end of its log."""

    code = "servers.failed"


def free_port() -> int:
    """A TCP port on loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(
    holds: Callable[[], bool], process: "subprocess.Popen[bytes] | None", log: Path, what: str
) -> None:
    """Return when it holds.

    Raises:
        ServerFailed: the process ended, or it took longer than `START_SECONDS`.
    """
    deadline = time.monotonic() + START_SECONDS
    while not holds():
        ended = process is not None and process.poll() is not None
        if ended or time.monotonic() > deadline:
            tail = log.read_text(errors="replace")[-1500:] if log.exists() else ""
            raise ServerFailed(f"{what} {'ended' if ended else 'did not come up'}:\n{tail}")
        time.sleep(0.05)


def port_answers(port: int) -> bool:
    """Whether something accepts connections on the loopback port."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _runs(pid: int) -> bool:
    """Whether the process is there and is no zombie, which holds nothing any more."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(b")")[2].split()[0] not in (b"Z", b"X")


def _terminate(process: "subprocess.Popen[bytes] | None", number: int, patience: float) -> None:
    if process is None or process.poll() is not None:
        return
    process.send_signal(number)
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Postgres:
    """A private PostgreSQL server. ``start`` after ``stop`` or ``kill`` finds the same data."""

    def __init__(self, directory: Path, *, durable: bool = False, port: int | None = None) -> None:
        self._directory = directory
        self._durable = durable
        self.port = port or free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def binaries() -> Path | None:
        """The newest installed server's ``bin`` directory, or None."""
        found = sorted(
            (path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")),
            key=lambda path: float(path.parent.name),
        )
        if found:
            return found[-1]
        on_path = shutil.which("initdb")
        return Path(on_path).resolve().parent if on_path else None

    @property
    def url(self) -> str:
        """Its address, with the ``postgres`` database."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def _user(self) -> str | None:
        """Who runs it: nobody else if we are not root."""
        if os.geteuid() != 0:
            return None
        names = {entry.pw_name for entry in pwd.getpwall()}
        return "postgres" if "postgres" in names else "nobody"

    def _spawn(self, argv: list[str], log: Path) -> "subprocess.Popen[bytes]":
        user = self._user()
        with log.open("ab") as output:
            return subprocess.Popen(  # noqa: S603  our own arguments
                argv,
                user=user,
                group=pwd.getpwnam(user).pw_gid if user else None,
                extra_groups=[] if user else None,
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def start(self) -> None:
        """It accepts connections.

        Raises:
            ServerFailed: it is not installed or did not come up.
        """
        binaries = self.binaries()
        if binaries is None:
            raise ServerFailed("PostgreSQL is not installed")
        data, log = self._directory / "data", self._directory / "postgres.log"
        self._directory.mkdir(parents=True, exist_ok=True)
        log.touch()
        user = self._user()
        if user:
            for path in (self._directory, log):
                shutil.chown(path, user)
        if not (data / "PG_VERSION").exists():
            argv = [str(binaries / "initdb"), "-D", str(data), "-U", "postgres", "-A", "trust"]
            process = self._spawn([*argv, "-E", "UTF8", "--locale=C", "--no-sync"], log)
            if process.wait(START_SECONDS):
                raise ServerFailed(f"initdb failed:\n{log.read_text(errors='replace')[-1500:]}")
        options = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "max_connections": "300",
        }
        if (
            not self._durable
        ):  # a killed server loses nothing even so, only a crash of the machine would
            options |= {"fsync": "off", "full_page_writes": "off"}
        argv = [str(binaries / "postgres"), "-D", str(data), "-p", str(self.port)]
        for name, value in options.items():
            argv += ["-c", f"{name}={value}"]
        self.process = self._spawn(argv, log)
        ready = [
            str(binaries / "pg_isready"),
            "-q",
            "-h",
            "127.0.0.1",
            "-p",
            str(self.port),
            "-U",
            "postgres",
        ]
        wait_until(
            lambda: subprocess.run(ready, check=False).returncode == 0,  # noqa: S603  our own arguments
            self.process,
            log,
            "PostgreSQL",
        )

    def stop(self) -> None:
        """It has shut down in good order; its clients were disconnected."""
        _terminate(self.process, signal.SIGINT, 20)

    def kill(self) -> None:
        """Every process of it has been killed with SIGKILL and is gone: it can be started again at once.

        Raises:
            ServerFailed: a process of it is still there after `START_SECONDS`.
        """
        if self.process is None or self.process.poll() is not None:
            return
        # a backend leads a group of its own (setsid), and while one lives the next server refuses to start
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        backends = [int(pid) for pid in listed.read_text().split()]
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pid in backends:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        log = self._directory / "postgres.log"
        wait_until(lambda: not any(map(_runs, backends)), None, log, "the end of PostgreSQL")


class RabbitMQ:
    """A private RabbitMQ node with the management plugin. Durable things survive ``stop`` and ``kill``."""

    BINARIES = Path("/usr/lib/rabbitmq/bin")

    def __init__(self, directory: Path, *, port: int | None = None) -> None:
        self._directory = directory
        self.port = port or free_port()
        self.management_port = free_port()
        self._epmd_port = free_port()
        self._distribution_port = free_port()
        self._epmd: subprocess.Popen[bytes] | None = None
        self.process: subprocess.Popen[bytes] | None = None

    @classmethod
    def is_installed(cls) -> bool:
        """Whether the server and Erlang's port mapper are here."""
        return (cls.BINARIES / "rabbitmq-server").exists() and shutil.which("epmd") is not None

    @property
    def url(self) -> str:
        """Its address, with the default vhost."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"

    def _environment(self) -> dict[str, str]:
        root = self._directory
        return {
            "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
            "LANG": "C.UTF-8",
            "HOME": str(root / "home"),  # the Erlang cookie is made here
            "RABBITMQ_NODENAME": f"hostler{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_MNESIA_BASE": str(root / "mnesia"),
            "RABBITMQ_LOG_BASE": str(root / "log"),
            "RABBITMQ_PID_FILE": str(root / "rabbit.pid"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(root / "enabled_plugins"),
            "RABBITMQ_CONF_ENV_FILE": str(
                root / "none.conf"
            ),  # a missing path: Debian's is not read
            "RABBITMQ_CONFIG_FILE": str(root / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(root / "none.config"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_CRASH_DUMP": str(root / "erl_crash.dump"),
            "RUNNING_UNDER_SYSTEMD": "true",  # the script then becomes the node: one pid to signal
        }

    def _spawn(self, argv: list[str], log: Path) -> "subprocess.Popen[bytes]":
        with log.open("ab") as output:
            return subprocess.Popen(  # noqa: S603  our own arguments
                argv,
                env=self._environment(),
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def start(self) -> None:
        """It accepts connections, and its management API answers.

        Raises:
            ServerFailed: it is not installed or did not come up.
        """
        if not self.is_installed():
            raise ServerFailed("RabbitMQ is not installed")
        root, log = self._directory, self._directory / "rabbitmq.log"
        (root / "home").mkdir(parents=True, exist_ok=True)
        (root / "enabled_plugins").write_text("[rabbitmq_management].\n")
        (root / "rabbitmq.conf").write_text(
            f"listeners.tcp.1 = 127.0.0.1:{self.port}\n"
            f"management.tcp.ip = 127.0.0.1\nmanagement.tcp.port = {self.management_port}\n"
            "log.console.level = warning\nvm_memory_high_watermark.relative = 0.6\n"
            "disk_free_limit.absolute = 50MB\n"
        )
        epmd = shutil.which("epmd")
        assert epmd is not None
        if self._epmd is None or self._epmd.poll() is not None:
            self._epmd = self._spawn(
                [epmd, "-port", str(self._epmd_port), "-address", "127.0.0.1"], log
            )
            wait_until(lambda: port_answers(self._epmd_port), self._epmd, log, "epmd")
        self.process = self._spawn([str(self.BINARIES / "rabbitmq-server")], log)
        wait_until(lambda: port_answers(self.port), self.process, log, "RabbitMQ")
        wait_until(self._management_answers, self.process, log, "RabbitMQ's management API")

    def _management_answers(self) -> bool:
        try:
            self.manage("GET", "/api/overview")
        except (OSError, ValueError):
            return False
        return True

    def manage(self, method: str, path: str, body: object = None) -> object:
        """Call the management API; return its decoded answer, or None."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.management_port}{path}",
            method=method,
            data=json.dumps(body).encode() if body is not None else None,
            headers={
                "Authorization": "Basic " + b64encode(b"guest:guest").decode(),
                "Content-Type": "application/json",
            },
        )
        with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310  our own address
            text = answer.read()
        return json.loads(text) if text else None

    def make_vhost(self, name: str) -> str:
        """The vhost exists, and this is its address."""
        self.manage("PUT", f"/api/vhosts/{name}")
        self.manage(
            "PUT",
            f"/api/permissions/{name}/guest",
            {"configure": ".*", "write": ".*", "read": ".*"},
        )
        return f"{self.url}{name}"

    def delete_vhost(self, name: str) -> None:
        """The vhost and all in it are gone; its connections were closed."""
        self.manage("DELETE", f"/api/vhosts/{name}")

    def stop(self) -> None:
        """It has shut down in good order; its port mapper runs on."""
        _terminate(self.process, signal.SIGTERM, 30)

    def kill(self) -> None:
        """Every process of the node has been killed with SIGKILL; its port mapper runs on.

        RabbitMQ 3.10 syncs its list of quorum queues every three minutes and when it stops: one declared since then is
        without a leader for ever after a SIGKILL, as an operator would find it too. ``stop`` and ``start`` it first.
        """
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def processes(self) -> list[tuple[int, str]]:
        """What runs, as (pid, name), in the order in which it was started."""
        found = [(self._epmd, "epmd"), (self.process, "rabbitmq")]
        return [(process.pid, name) for process, name in found if process is not None]

    def close(self) -> None:
        """Node and port mapper are gone."""
        self.kill()
        _terminate(self._epmd, signal.SIGKILL, 5)
