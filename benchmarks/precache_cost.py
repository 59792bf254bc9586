"""What a host pays for an image that it receives, verifies, writes and passes on once.

    python benchmarks/precache_cost.py [--mib 4096] [--turns 3] [--without-tls]

CPU time of processes, never the wall clock: the machine is shared. Everything is on tmpfs, over loopback, without a
cap; a seed in a process of its own serves the same bytes to all, and whoever drains what a host sends costs nothing
that is counted. In every turn, one after the other:

- **bare parts** (`bare_transfer.py`): one blocking process each for receiving the body of one GET into a file, for
  sha256 of as many bytes that are in memory already, and for one `os.sendfile` of the file;
- **curl -o**, then **sha256sum** of the file;
- **the agent**: a real `hostler-agent` with precache's part, bus and reports on, told by a stand-in for the tracker to
  have the image. `received` is its CPU from then to its report that the image is cached (asked for, received,
  verified, written, synced and placed); `served` what it then takes to send each piece once.

Figures: `cpu_over_bare` is the agent's received + served over the sum of the bare parts, `one_receiver_over_curl` the
agent's Gbit/s per core while it received over that of curl and sha256sum, both as the median of turns.
`agent_rss_mb` is the most memory that any agent held, among them one with pieces of 16 MiB. The same with the smaller
image (1 GiB, pieces of 1 MiB: the cost is then more one of requests than of bytes) is in the table.

With TLS between peers there is no sendfile: the last rows say what a GiB takes then, and without it, for the same
parts of the agent (`piece_hosts.py`).
"""

import argparse
import asyncio
import base64
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

import bench
import piece_hosts
import tracker_load
from hostler_common import servers
from hostler_precache.testing import agent_process, certificate_files
from hostler_precache.transfer import manifest

HERE = Path(__file__).parent
MEMORY = Path("/dev/shm")  # noqa: S108  a fresh directory is made below it
SMALL_MIB = 1024
PATIENCE_SECONDS = 600.0
LARGE_PIECE = manifest.MAX_PIECE_BYTES


@dataclass(slots=True)
class Turn:
    """CPU seconds of everything in one turn, by name."""

    cpu: dict[str, float] = field(default_factory=dict)

    @property
    def over_bare(self) -> float:
        """The agent, over the bare parts."""
        bare = sum(self.cpu[f"bare: {part}"] for part in ("receive", "sha256", "sendfile"))
        return (self.cpu["agent: received"] + self.cpu["agent: served"]) / bare

    @property
    def over_curl(self) -> float:
        """Bits per CPU second of the agent that receives, over those of curl and sha256sum."""
        return (self.cpu["curl -o"] + self.cpu["sha256sum"]) / self.cpu["agent: received"]


# --- the tracker that the agent sees


@dataclass(slots=True)
class StandIn:
    """As much of precache's API as one agent needs: what it should have, and where it says how far it is."""

    url: str = ""
    image: dict[str, Any] | None = None
    listing: bytes = b""
    is_cached: asyncio.Event = field(default_factory=asyncio.Event)
    failure: str | None = None

    async def handle(self, request: web.Request) -> web.Response:
        """Answer the agent."""
        if request.path == "/v1/desired":
            return web.json_response({"images": [self.image] if self.image else []})
        if request.path.endswith("/growth"):
            after = int(request.query["after"])
            return web.json_response(self.growth(after, int(request.query.get("most", 1 << 20))))
        blobs = (await request.json())["blobs"]
        for blob in blobs:
            if blob["state"] == "error":
                self.failure = blob["reason"]
            if blob["state"] in ("cached", "error"):
                self.is_cached.set()
        return web.json_response({"swarms": {}, "look_again": bool(self.image and not blobs)})

    def growth(self, after: int, most: int) -> dict[str, Any]:
        """The piece list from that piece on, or some of it."""
        listed = manifest.parse(self.listing)
        told = listed.digests[after * manifest.DIGEST_BYTES :][: most * manifest.DIGEST_BYTES]
        is_all = after * manifest.DIGEST_BYTES + len(told) == len(listed.digests)
        return {
            "size_bytes": listed.size_bytes,
            "piece_bytes": listed.piece_bytes,
            "first_piece": after,
            "digests": base64.b64encode(told).decode(),
            "root": listed.root.hex() if is_all else None,
        }

    def announce(self, seed_url: str, listing: bytes) -> None:
        """The agent should have the image."""
        listed = manifest.parse(listing)
        self.listing = listing
        self.image = {
            "distribution_id": piece_hosts.DISTRIBUTION_ID,
            "image_id": "5a0e1d0e-0000-4000-8000-00000000000e",
            "blob_id": piece_hosts.BLOB_ID,
            "root": listed.root.hex(),
            "size_bytes": listed.size_bytes,
            "disk_format": "raw",
            "seeds": [seed_url],
            "token": piece_hosts.token(),
            "swarm_key": piece_hosts.KEY.hex(),
        }


@asynccontextmanager
async def stand_in() -> AsyncIterator[StandIn]:
    """A stand-in that listens."""
    made = StandIn()
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", made.handle)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    port = servers.free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    made.url = f"http://127.0.0.1:{port}"
    try:
        yield made
    finally:
        await runner.cleanup()


# --- the parts


def run(*command: str | Path) -> float:
    """CPU seconds of a command that ends well: what it says of itself, or else what it used."""
    before = os.times()
    done = subprocess.run([str(word) for word in command], check=True, capture_output=True)
    after = os.times()
    last = done.stdout.splitlines()[-1:] or [b""]
    if last[0].startswith(b"{"):
        return float(json.loads(last[0])["cpu_seconds"])
    return sum(after[2:4]) - sum(before[2:4])


@contextmanager
def seed(
    image: Path, piece_bytes: int, *, tls: tuple[Path, Path] | None = None
) -> Iterator[tuple[str, int]]:
    """The address of a process that serves the image, and its id."""
    port = servers.free_port()
    files = [str(file) for file in tls or ()]
    process = subprocess.Popen(
        [
            bench.python(),
            HERE / "piece_hosts.py",
            "seed",
            image,
            str(piece_bytes),
            str(port),
            *files,
        ],
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise RuntimeError("the seed did not start")
        yield f"{'https' if tls else 'http'}://127.0.0.1:{port}", process.pid
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


async def bare_turn(turn: Turn, url: str, directory: Path) -> None:
    """The bare parts, curl and sha256sum, in turns."""
    target, blob = directory / "received", f"{url}/v1/blobs/{piece_hosts.BLOB_ID}"
    transfer, secret = HERE / "bare_transfer.py", piece_hosts.token()
    steps: dict[str, tuple[str | Path, ...]] = {
        "bare: receive": (bench.python(), transfer, "receive", blob, secret, target),
        "bare: sha256": (bench.python(), transfer, "hash", target),
        "bare: sendfile": (bench.python(), transfer, "send", target),
        "curl -o": ("curl", "-sf", "-H", f"Authorization: Bearer {secret}", "-o", target, blob),
        "sha256sum": ("sha256sum", target),
    }
    for name, command in steps.items():
        if name == "curl -o":
            target.unlink()
        turn.cpu[name] = await asyncio.to_thread(run, *command)
    target.unlink()


async def agent_turn(
    turn: Turn, url: str, image: Path, directory: Path, *, amqp_url: str, piece_bytes: int
) -> float:
    """A fresh agent has received the image and has sent it once; the most memory it held, in MB."""
    listing = await asyncio.to_thread(Path(f"{image}.manifest").read_bytes)
    size = manifest.parse(listing).size_bytes
    # as it comes, but for the place: how often it reports is part of what it costs
    settings = {"placer": "directory", "report_seconds": 2}
    async with (
        stand_in() as tracker,
        agent_process(
            "bench-host",
            directory / "agent",
            amqp_url=amqp_url,
            precache_url=tracker.url,
            settings=settings,
        ) as agent,
    ):
        pid = agent.process.pid
        before = bench.cpu_seconds(pid)
        tracker.announce(url, listing)
        async with asyncio.timeout(PATIENCE_SECONDS):
            await tracker.is_cached.wait()
        if tracker.failure is not None:
            raise RuntimeError(tracker.failure)
        received = bench.cpu_seconds(pid)
        await asyncio.to_thread(
            run,
            *(bench.python(), HERE / "bare_transfer.py", "drain"),
            *(f"{agent.url}/v1/blobs/{piece_hosts.BLOB_ID}", piece_hosts.token()),
            *(str(size), str(piece_bytes)),
        )
        turn.cpu["agent: received"] = received - before
        turn.cpu["agent: served"] = bench.cpu_seconds(pid) - received
        peak = bench.rss_mb(pid)
    shutil.rmtree(directory / "agent")
    return peak


async def tls_turn(turn: Turn, image: Path, directory: Path, piece_bytes: int) -> None:
    """The agent's own parts, sending and receiving in clear and over TLS."""
    certificate, key, _ = certificate_files(directory)
    for name, files in {"clear": None, "TLS": (certificate, key)}.items():
        with seed(image, piece_bytes, tls=files) as (url, pid):
            before = bench.cpu_seconds(pid)
            turn.cpu[f"{name}: received"] = await asyncio.to_thread(
                run,
                *(bench.python(), HERE / "piece_hosts.py", "receive", url, piece_hosts.token()),
                *(f"{image}.manifest", directory / "host", *(files or ())),
            )
            turn.cpu[f"{name}: sent"] = bench.cpu_seconds(pid) - before
        shutil.rmtree(directory / "host")


# --- all of it


def make_image(path: Path, mib: int) -> None:
    """Bytes that are not zeros and do not repeat within a piece."""
    generator = random.Random(1)  # noqa: S311  content, not a secret
    with path.open("wb") as file:
        for _ in range(mib):
            file.write(generator.randbytes(1 << 20))


def show(title: str, turns: list[Turn], gib: float) -> None:
    """CPU seconds a GiB, median of the turns."""
    bench.say(f"{title}: CPU seconds per GiB, median of {len(turns)} turns")
    names = list(turns[0].cpu)
    bench.table(
        ("what", "median", "least", "most"),
        [
            (name, bench.median(values), min(values), max(values))
            for name in names
            for values in [[turn.cpu[name] / gib for turn in turns]]
        ],
    )


async def measure(
    image: Path, piece_bytes: int, turns: int, directory: Path, amqp_url: str
) -> tuple[list[Turn], float]:
    """Turns of the bare parts, curl and the agent, and the most memory that an agent held."""
    done, peak = [], 0.0
    for _ in range(turns):
        turn = Turn()
        with seed(image, piece_bytes) as (
            url,
            _,
        ):  # a seed sends each piece once: a new one a turn
            await bare_turn(turn, url, directory)
            held = await agent_turn(
                turn, url, image, directory, amqp_url=amqp_url, piece_bytes=piece_bytes
            )
        peak = max(peak, held)
        done.append(turn)
    return done, peak


async def host_costs(
    arguments: argparse.Namespace, directory: Path, amqp_url: str
) -> dict[str, float]:
    """The figures of a host."""
    image = directory / "image"
    figures: dict[str, float] = {}
    peak = 0.0
    for mib in dict.fromkeys((SMALL_MIB, arguments.mib)):
        make_image(image, mib)
        piece_bytes = manifest.piece_bytes_for(mib << 20)
        turns, held = await measure(image, piece_bytes, arguments.turns, directory, amqp_url)
        peak = max(peak, held)
        show(f"{mib} MiB in pieces of {piece_bytes >> 10} KiB", turns, mib / 1024)
        ratio = bench.median(turn.over_bare for turn in turns)
        bench.say(f"the agent over the bare parts: {ratio:.2f}; {bench.busyness()}\n")
        figures["cpu_over_bare"] = ratio
        figures["one_receiver_over_curl"] = bench.median(turn.over_curl for turn in turns)
        if mib == SMALL_MIB:
            figures["cpu_over_bare_1_gib"] = ratio
            with seed(image, LARGE_PIECE) as (url, _):
                held = await agent_turn(
                    Turn(), url, image, directory, amqp_url=amqp_url, piece_bytes=LARGE_PIECE
                )
            bench.say(f"with pieces of 16 MiB the agent held {held:.0f} MB at most\n")
            peak = max(peak, held)
            if arguments.tls:
                turn = Turn()
                await tls_turn(turn, image, directory, piece_bytes)
                show("clear and TLS", [turn], mib / 1024)
    figures["agent_rss_mb"] = peak
    return figures


def main() -> None:
    """Measure, and say what was seen."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mib", type=int, default=4096, help="size of the image")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--without-tls", dest="tls", action="store_false")
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="hostler-bench-", dir=MEMORY))
    rabbitmq = servers.RabbitMQ(Path(tempfile.mkdtemp(prefix="hostler-bench-")) / "rabbitmq")
    started = time.monotonic()
    # told to end, it ends as on Ctrl-C: the broker never stays behind
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        rabbitmq.start()
        amqp_url = rabbitmq.make_vhost("cost")
        figures: dict[str, float | None] = dict(
            asyncio.run(host_costs(arguments, directory, amqp_url))
        )
    finally:
        rabbitmq.close()
        shutil.rmtree(directory, ignore_errors=True)
    with bench.stage() as stage:
        load = asyncio.run(tracker_load.measure(stage))
    tracker_load.show(load)
    figures["tracker_p99_ms"] = load.p99_ms
    bench.say(f"{time.monotonic() - started:.0f} s in all\n")
    bench.conclude(
        "precache_cost",
        figures,
        {
            "cpu_over_bare": "<= 1.3",
            "one_receiver_over_curl": ">= 0.8",
            "agent_rss_mb": "< 120",
            "tracker_p99_ms": "< 50",
        },
    )


if __name__ == "__main__":
    main()
