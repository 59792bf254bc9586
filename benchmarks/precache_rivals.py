"""Everybody else who could bring an image to many hosts, on the hosts of a `network_rig`, each at its best.

- aria2 with opentracker: BitTorrent, pieces of 512 KiB and of 128 KiB (its better size here), nobody choked for
  slowness; every receiver is a process that begins at the start.
- libtorrent (PyPI), TCP only, super-seeding, tuned (`libtorrent_host.py`): receivers have their sessions up, are given
  the torrent and each other's addresses at the start. Its super-seed offers nothing for its first ten seconds; the
  figures have the run with and without them.
- udpcast: multicast at 97 % of the cap, which few clouds have.
- nginx and curl: everybody from the seed.

A receiver is done when its complete file has its final name, as ours is.
"""

import asyncio
import importlib.util
import shutil
import stat
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path

import network_rig
import swarm_race
import torrent
from hostler_common import testing
from swarm_race import FILE, SEED, Course, Result

PARTIAL = "part"
TRACKER_PORT, HTTP_PORT = 6969, 8080
UDPCAST_SHARE = 0.97
KIB = 1024
BUILD = Path(__file__).parent.parent / "tests" / "integration" / "peers" / "build.py"
LIBTORRENT = Path(__file__).with_name("libtorrent_host.py")

Rival = Callable[[Course], Awaitable[Result]]
# a program that begins with the first byte on its stdin: its process is there when the clock starts
WAIT = ("sh", "-c", 'read _; exec "$@"', "sh")


class _Stand:
    """Where a rival's receivers stand ready, and what starts them."""

    def __init__(self, course: Course, stack: AsyncExitStack, name: str) -> None:
        self.course = course
        self.rig = course.rig
        self.stack = stack
        self.work = course.rig.directory / name
        self.log = course.rig.directory / f"{name}.log"
        self.receivers: list[asyncio.subprocess.Process] = []
        self.directories: dict[str, Path] = {}
        for host in course.receivers:
            self.directories[host] = self.work / host
            (self.work / host / PARTIAL).mkdir(parents=True)
        # the last thing that is done: in memory, the copies of a few rivals are a lot
        stack.callback(shutil.rmtree, self.work, ignore_errors=True)

    def address(self, host: str) -> str:
        """Where it is reached."""
        return self.rig.hosts[host].address

    async def run(self, host: str, *argv: str | Path) -> asyncio.subprocess.Process:
        """A process of the rival, until the stand is left."""
        return await self.stack.enter_async_context(
            self.rig.process(host, *argv, log=self.log, stdin=asyncio.subprocess.PIPE)
        )

    async def receive(self, host: str, *argv: str | Path) -> None:
        """A receiver that waits for the start."""
        self.receivers.append(await self.run(host, *WAIT, *argv))

    async def start(self) -> None:
        """Everybody begins."""
        for process in self.receivers:
            assert process.stdin is not None
            process.stdin.write(b"\n")
        for process in self.receivers:
            assert process.stdin is not None
            await process.stdin.drain()

    async def appears(self, path: Path) -> None:
        """Return when there is such a file."""

        async def there() -> bool:
            return path.exists()  # noqa: ASYNC240  a tmpfs

        await testing.eventually(there)

    async def says(self, word: str, times: int = 1) -> None:
        """Return when the log has the word so often."""

        async def said() -> bool:
            return self.log.exists() and self.log.read_text(errors="replace").count(word) >= times

        await testing.eventually(said)

    def script(self, name: str, *lines: str) -> Path:
        """An executable shell script."""
        path = self.work / name
        path.write_text("\n".join(("#!/bin/sh", *lines, "")))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path


def aria2(piece_kib: int) -> tuple[str, Rival]:
    """aria2 with pieces of that size."""
    name = f"aria2_{piece_kib}k"

    async def run(course: Course) -> Result:
        async with AsyncExitStack() as stack:
            stand = _Stand(course, stack, name)
            announce = f"http://{course.rig.control_address}:{TRACKER_PORT}/announce"
            body, info_hash = await asyncio.to_thread(
                torrent.make, course.source, piece_bytes=piece_kib * KIB, announce=announce
            )
            file = stand.work / "image.torrent"
            file.write_bytes(body)
            (stand.work / "whitelist").write_text(f"{info_hash.hex()}\n")
            stand.work.chmod(0o755)
            await stand.run(
                network_rig.CONTROL,
                *("opentracker", "-i", course.rig.control_address, "-p", str(TRACKER_PORT)),
                *("-d", stand.work, "-w", "whitelist"),
            )
            options = (
                *("--enable-dht=false", "--enable-dht6=false", "--bt-enable-lpd=false"),
                *("--seed-ratio=0.0", "--bt-max-peers=0", "--bt-request-peer-speed-limit=100M"),
                *("--file-allocation=none", "--listen-port=6881", "--console-log-level=warn"),
                *("--summary-interval=0", "--no-conf", "--allow-overwrite=true"),
            )
            seeding = stand.script("seeding", f"touch {stand.work}/seeding.done")
            await stand.run(
                SEED,
                *("aria2c", *options, "--check-integrity=true"),
                *(f"--dir={course.source.parent}", f"--on-bt-download-complete={seeding}", file),
            )
            await stand.appears(stand.work / "seeding.done")
            for host, directory in stand.directories.items():
                done = stand.script(f"done-{host}", f'ln "$3" {directory}/{FILE}')
                await stand.receive(
                    host,
                    *("aria2c", *options, f"--dir={directory / PARTIAL}"),
                    *(f"--on-bt-download-complete={done}", file),
                )
            return await swarm_race.race(course, name, stand.directories, stand.start)

    return name, run


async def run_libtorrent(course: Course) -> Result:
    """See `libtorrent_host.py`."""
    python = await asyncio.to_thread(libtorrent_python)
    async with AsyncExitStack() as stack:
        stand = _Stand(course, stack, "libtorrent")
        body, _ = await asyncio.to_thread(
            torrent.make, course.source, piece_bytes=512 * KIB, announce=""
        )
        file = stand.work / "image.torrent"
        file.write_bytes(body)
        await stand.run(
            SEED, python, LIBTORRENT, file, course.source.parent, stand.address(SEED), "", "super"
        )
        await stand.says("ready")
        names = course.receivers
        for number, host in enumerate(names):
            # each pair is connected once
            peers = [SEED, *names[:number]]
            process = await stand.run(
                host,
                *(python, LIBTORRENT, file, stand.directories[host] / PARTIAL),
                *(stand.address(host), ",".join(stand.address(peer) for peer in peers)),
            )
            stand.receivers.append(process)
        await stand.says("ready", 1 + len(names))
        return await swarm_race.race(course, "libtorrent", stand.directories, stand.start)


async def run_udpcast(course: Course) -> Result:
    """One multicast stream."""
    async with AsyncExitStack() as stack:
        stand = _Stand(course, stack, "udpcast")
        slowest = min(host.rate_bps for host in course.rig.hosts.values())
        await stand.receive(
            SEED,
            *("udp-sender", "--file", course.source, "--interface", "eth0", "--nokbd"),
            *("--min-receivers", str(len(course.receivers))),
            *("--max-bitrate", f"{int(slowest * UDPCAST_SHARE / 1000)}k"),
        )
        for host, directory in stand.directories.items():
            partial = directory / PARTIAL / FILE
            command = f"udp-receiver --file {partial} --interface eth0 --nokbd"
            await stand.receive(host, "sh", "-c", f"{command} && mv {partial} {directory}/{FILE}")
        return await swarm_race.race(course, "udpcast", stand.directories, stand.start)


async def run_nginx(course: Course) -> Result:
    """Everybody asks the seed for everything."""
    async with AsyncExitStack() as stack:
        stand = _Stand(course, stack, "nginx")
        address = stand.address(SEED)
        config = stand.work / "nginx.conf"
        config.write_text(
            f"daemon off; pid {stand.work}/nginx.pid; error_log {stand.work}/error.log; user root;\n"
            "events { worker_connections 1024; }\n"
            "http { sendfile on; tcp_nopush on; access_log off;\n"
            f" server {{ listen {address}:{HTTP_PORT}; root {course.source.parent}; }} }}\n"
        )
        await stand.run(SEED, "nginx", "-c", config, "-p", stand.work)
        await stand.appears(stand.work / "nginx.pid")
        url = f"http://{address}:{HTTP_PORT}/{course.source.name}"
        for host, directory in stand.directories.items():
            partial = directory / PARTIAL / FILE
            command = f"curl -sSf -o {partial} {url}"
            await stand.receive(host, "sh", "-c", f"{command} && mv {partial} {directory}/{FILE}")
        return await swarm_race.race(course, "nginx", stand.directories, stand.start)


def libtorrent_python() -> Path:
    """The interpreter of libtorrent's environment, which is built if it is not there."""
    spec = importlib.util.spec_from_file_location("build", BUILD)
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    directory: Path = build.environment("libtorrent")
    return directory / "bin" / "python"


RIVALS: Mapping[str, Rival] = dict(
    [
        aria2(512),
        aria2(128),
        ("libtorrent", run_libtorrent),
        ("udpcast", run_udpcast),
        ("nginx", run_nginx),
    ]
)
