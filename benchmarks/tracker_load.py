"""Ten thousand hosts that report every five seconds to one tracker process: how long it takes to answer.

Each host has a connection of its own, as an agent has, and its reports say each time that it has more of the image,
so every one is written and committed before it is answered. The hosts are told to get one image and never get it.
What is measured is the time from the last byte of a request to the last byte of its answer, at the client, which is
a process of the same machine: what it takes of a core is told, too.

With `--storm` the same hosts ask at once what they should have, as they do after a fanout: all in the same moment,
and again spread over five seconds.
"""

import asyncio
import gc
import json
import math
import sys
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import bench
from hostler_common import client, db
from hostler_precache import testing

PIECES = 1024
CONNECT_AT_ONCE = 200
SETTLE_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackerLoad:
    """What was measured."""

    hosts: int
    reports: int
    seconds: float
    p50_ms: float
    p99_ms: float
    worst_ms: float
    failed: int
    cpu_us_a_report: float
    database_cpu_us_a_report: float
    client_cpu_us_a_report: float

    @property
    def reports_per_second(self) -> float:
        """Those that were answered."""
        return self.reports / self.seconds


class _Host(asyncio.Protocol):
    """One agent's connection: a request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answered: asyncio.Future[bytes] | None = None
        self._received = bytearray()
        self.version = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, body = bytes(self._received).partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0] or 0)
        if len(body) >= length and self._answered is not None and not self._answered.done():
            self._received.clear()
            told = body.partition(b'"version":"')[2].partition(b'"')[0]
            if told:  # an agent says which swarm it goes by, and is not told it again
                self.version = told.decode()
            self._answered.set_result(head.split(b"\r\n", 1)[0])

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(exc or ConnectionResetError("closed"))
        self._transport = None

    async def ask(self, request: bytes) -> bytes:
        """The status line of the answer."""
        if self._transport is None:
            raise ConnectionResetError("closed")
        self._answered = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answered


@dataclass(slots=True)
class _Spent:
    """CPU seconds of the service, the database and this process since it was made."""

    stage: bench.Stage
    pid: int
    began: tuple[float, float, float] = field(init=False)

    def __post_init__(self) -> None:
        self.began = self._now()

    def _now(self) -> tuple[float, float, float]:
        postgres = self.stage.postgres.process
        assert postgres is not None
        database = [postgres.pid, *bench.descendants(postgres.pid)]
        return (
            bench.cpu_seconds(self.pid),
            sum(bench.cpu_seconds(one) for one in database),
            time.process_time(),
        )

    def microseconds(self, count: int) -> list[float]:
        """Of each, so far, by one of so many."""
        return [(b - a) * 1e6 / count for a, b in zip(self.began, self._now(), strict=True)]


@dataclass(slots=True)
class _Run:
    """The hosts, and what they have seen."""

    address: tuple[str, int]
    every_seconds: float
    latencies_ms: list[float] = field(default_factory=list)
    failed: int = 0
    is_counting: bool = False

    async def connect(self, gate: asyncio.Semaphore) -> _Host:
        """A connection; so many are made at once as the gate lets through."""
        link = _Host()
        async with gate:
            await asyncio.get_running_loop().create_connection(lambda: link, *self.address)
        return link

    async def host(
        self, name: str, keys: dict[str, str], gate: asyncio.Semaphore, at: float
    ) -> None:
        """One host, for as long as it is let: it reports, and again after so many seconds."""
        loop = asyncio.get_running_loop()
        session = str(uuid.uuid4())
        link = await self.connect(gate)
        pieces = sequence = 0
        while True:
            await asyncio.sleep(max(0.0, at - loop.time()))
            at += self.every_seconds
            pieces, sequence = (pieces + 3) % PIECES, sequence + 1
            told = {**keys, "swarm_version": link.version}
            if not await self.ask(link, _request(name, session, sequence, told, pieces)):
                link = await self.connect(gate)

    async def ask(self, link: _Host, request: bytes) -> bool:
        """Whether the connection is there still; the answer is counted."""
        started = time.perf_counter()
        try:
            status = await link.ask(request)
        except OSError:
            status = b""
        if self.is_counting and b" 200 " in status:
            self.latencies_ms.append((time.perf_counter() - started) * 1000)
        elif self.is_counting:
            self.failed += 1
        return bool(status)


def _request(name: str, session: str, sequence: int, keys: dict[str, str], pieces: int) -> bytes:
    filled = pieces * 64 // PIECES
    body = json.dumps(
        {
            "url": f"http://{name}:8310",
            "session_id": session,
            "sequence": sequence,
            "free_bytes": 1 << 40,
            "labels": {"rack": f"r{hash(name) % 500}"},
            "blobs": [
                {
                    **keys,
                    "state": "transferring",
                    "pieces_done": pieces,
                    "bytes_done": pieces << 20,
                    "bytes_from_peers": pieces << 20,
                    "bytes_from_rack": pieces << 19,
                    "sent_bytes": {keys["distribution_id"]: pieces << 20},
                    "coverage": "f" * filled + "0" * (64 - filled),
                }
            ],
        }
    ).encode()
    head = (
        f"PUT /v1/hosts/{name}/report HTTP/1.1\r\nHost: precache\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@asynccontextmanager
async def _service(
    stage: bench.Stage, names: list[str], *, every_seconds: float
) -> AsyncIterator[tuple[_Run, dict[str, str], int]]:
    """One service with an image that these hosts are told to get: the hosts' side, its ids, the process."""
    database_url, amqp_url = await stage.new_database(), stage.new_vhost()
    await db.migrate(database_url, schema="precache", package="hostler_precache")
    directory = stage.new_directory()
    directory.mkdir()
    source = directory / "source"
    source.write_bytes(testing.image_of(PIECES << 10))
    async with (
        testing.service_process(
            directory / "seed",
            amqp_url=amqp_url,
            database_url=database_url,
            settings={"file_roots": str(directory), "log_level": "WARNING"},
        ) as service,
        client.open_api(service.url) as api,
    ):
        parts = urlsplit(service.url)
        assert parts.hostname is not None
        assert parts.port is not None
        run = _Run(address=(parts.hostname, parts.port), every_seconds=every_seconds)
        yield run, await _distribution(api, source, names), service.process.pid


@asynccontextmanager
async def _counting(run: _Run) -> AsyncIterator[None]:
    # ten thousand hosts in one process: a look for garbage here would be seen as a slow tracker
    gc.collect()
    gc.disable()
    await asyncio.sleep(SETTLE_SECONDS)  # and so would this one
    run.is_counting = True
    try:
        yield
    finally:
        run.is_counting = False
        gc.enable()


async def measure(
    stage: bench.Stage, *, hosts: int = 10_000, every_seconds: float = 5.0, seconds: float = 30.0
) -> TrackerLoad:
    """One tracker process under that load, after a first round in which every host makes itself known."""
    names = [f"host-{number:05}" for number in range(hosts)]
    async with (
        _service(stage, names, every_seconds=every_seconds) as (run, keys, pid),
        asyncio.TaskGroup() as group,
    ):
        gate = asyncio.Semaphore(CONNECT_AT_ONCE)
        first = asyncio.get_running_loop().time() + 1.0
        tasks = [
            group.create_task(run.host(name, keys, gate, first + every_seconds * number / hosts))
            for number, name in enumerate(names)
        ]
        await asyncio.sleep(1.0 + 2 * every_seconds)
        async with _counting(run):
            spent, began = _Spent(stage, pid), time.perf_counter()
            await asyncio.sleep(seconds)
            took = time.perf_counter() - began
            found = _found(run, hosts=hosts, seconds=took, spent=spent)
        for task in tasks:
            task.cancel()
    return found


async def measure_storm(
    stage: bench.Stage, *, hosts: int = 10_000, spread_seconds: float = 0.0
) -> TrackerLoad:
    """As many hosts, known and connected, ask what they should have, evenly over so many seconds."""
    names = [f"host-{number:05}" for number in range(hosts)]
    async with _service(stage, names, every_seconds=math.inf) as (run, keys, pid):
        gate = asyncio.Semaphore(CONNECT_AT_ONCE)

        async def begin(name: str) -> _Host:
            link = await run.connect(gate)
            async with gate:
                await run.ask(link, _request(name, str(uuid.uuid4()), 1, keys, 0))
            return link

        links = await asyncio.gather(*(begin(name) for name in names))
        loop = asyncio.get_running_loop()

        async def ask(number: int, name: str, link: _Host) -> None:
            await asyncio.sleep(first + spread_seconds * number / hosts - loop.time())
            request = f"GET /v1/desired?host={name} HTTP/1.1\r\nHost: precache\r\n\r\n"
            await run.ask(link, request.encode())

        async with _counting(run):
            spent, began, first = _Spent(stage, pid), time.perf_counter(), loop.time() + 0.2
            async with asyncio.TaskGroup() as group:
                for number, (name, link) in enumerate(zip(names, links, strict=True)):
                    group.create_task(ask(number, name, link))
            took = time.perf_counter() - began - 0.2
            return _found(run, hosts=hosts, seconds=took, spent=spent)


def _found(run: _Run, *, hosts: int, seconds: float, spent: _Spent) -> TrackerLoad:
    found = sorted(run.latencies_ms)
    if not found:
        raise RuntimeError("nothing was answered")
    service, database, own = spent.microseconds(len(found))
    return TrackerLoad(
        hosts=hosts,
        reports=len(found),
        seconds=seconds,
        p50_ms=_quantile(found, 0.5),
        p99_ms=_quantile(found, 0.99),
        worst_ms=found[-1],
        failed=run.failed,
        cpu_us_a_report=service,
        database_cpu_us_a_report=database,
        client_cpu_us_a_report=own,
    )


async def _distribution(api: client.Api, source: Path, names: list[str]) -> dict[str, str]:
    image_id = str(uuid.uuid4())
    made: dict[str, Any] = await api.post(
        "/v1/distributions",
        {
            "image_id": image_id,
            "image": {"image_id": image_id, "fetcher": "file", "location": str(source)},
            "hosts": names,
        },
    )
    while True:
        images = await api.get(f"/v1/images/{image_id}")
        if images["state"] == "ready":
            return {"distribution_id": made["distribution_id"], "blob_id": images["blob_id"]}
        if images["state"] == "error":
            raise RuntimeError(f"the image was not fetched: {images['reason']}")
        await asyncio.sleep(0.1)


def _quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, math.ceil(len(ordered) * share) - 1)]


def show(found: TrackerLoad, what: str = "reports") -> None:
    """What was measured, for people."""
    bench.say(
        f"{found.hosts} hosts, {found.reports_per_second:.0f} {what}/s answered,"
        f" {found.failed} failed: p50 {found.p50_ms:.1f} ms, p99 {found.p99_ms:.1f} ms,"
        f" worst {found.worst_ms:.1f} ms"
    )
    bench.say(
        f"CPU each: service {found.cpu_us_a_report:.0f} us,"
        f" database {found.database_cpu_us_a_report:.0f} us,"
        f" the hosts themselves {found.client_cpu_us_a_report:.0f} us, which is"
        f" {found.client_cpu_us_a_report * found.reports_per_second / 1e6:.0%} of a core"
    )


def main() -> None:
    """The load on its own."""
    with bench.stage() as stage:
        if "--storm" in sys.argv[1:]:
            for spread in (0.0, 5.0):
                bench.say(f"all ask what they should have within {spread:.0f} s:")
                show(asyncio.run(measure_storm(stage, spread_seconds=spread)), "questions")
        else:
            show(asyncio.run(measure(stage)))


if __name__ == "__main__":
    main()
