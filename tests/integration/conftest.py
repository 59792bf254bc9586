"""What the tests with real peers share: servers of environments of their own, and what they notify of."""

import asyncio
import functools
import io
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aio_pika
import aiohttp
import pytest
import pytest_asyncio

from hostler_common import servers
from hostler_common.testing import RunningService, eventually

PEERS = Path(__file__).parent / "peers"
START_SECONDS = 120.0  # on a machine that is busy with other tests

RunPeer = Callable[..., AbstractAsyncContextManager[str]]
Overheard = Callable[[str], AbstractAsyncContextManager[Callable[[], Awaitable[int]]]]


@functools.cache
def environment(name: str) -> Path:
    """The peer, installed."""
    done = subprocess.run(
        [sys.executable, str(PEERS / "build.py"), name],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return Path(done.stdout.strip())


@asynccontextmanager
async def _run_peer(name: str, directory: Path, *arguments: str) -> AsyncIterator[str]:
    python = await asyncio.to_thread(environment, name) / "bin" / "python"
    port = servers.free_port()
    log = directory / "log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *(str(python), str(PEERS / f"{name}_server.py"), *arguments),
            *("--directory", str(directory), "--port", str(port)),
            stdout=output,
            stderr=output,
        )
    url = f"http://127.0.0.1:{port}"

    async def answers() -> bool:
        said = await asyncio.to_thread(log.read_text, errors="replace")
        assert process.returncode is None, said[-3000:]
        try:
            async with aiohttp.ClientSession() as session, session.get(f"{url}/"):
                return True
        except aiohttp.ClientConnectionError:
            return False

    try:
        await eventually(answers, seconds=START_SECONDS, every_seconds=0.2)
        yield url
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


@pytest.fixture
def run_peer() -> RunPeer:
    """`async with run_peer(name, directory, *options) as url`: peers/NAME_server.py, as it answers.

    Leaving ends the peer in good order: it has then said all that it says.
    """
    return _run_peer


class Commanded:
    """A peer's own code in a process of its own, which takes commands and answers them, a line of JSON each."""

    class Failed(Exception):
        """The peer failed at it; the text is the peer's."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def begin(self, do: str, **arguments: object) -> None:
        """Tell it to do something."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()

    def end(self) -> Any:
        """What came of it."""
        assert self._process.stdout is not None
        answer = json.loads(self._process.stdout.readline())
        if "error" in answer:
            raise self.Failed(answer["error"])
        return answer["ok"]

    def do(self, what: str, **arguments: object) -> Any:
        """Both."""
        self.begin(what, **arguments)
        return self.end()


@contextmanager
def _command_peer(name: str, program: str, conf: Path) -> Iterator[Commanded]:
    python = environment(name) / "bin" / "python"
    with conf.with_name("log").open("wb") as log:
        process = subprocess.Popen(
            [python, PEERS / program, conf],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
    try:
        yield Commanded(process)
    finally:
        process.communicate()


@pytest.fixture(scope="session")
def command_peer() -> Callable[[str, str, Path], Any]:
    """`with command_peer(name, program, conf) as peer`: peers/PROGRAM, to be told what to `do`.

    Its log is beside its configuration.
    """
    return _command_peer


@pytest_asyncio.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """A client of whatever it is."""
    async with aiohttp.ClientSession() as opened:
        yield opened


@pytest_asyncio.fixture
async def glance(run_peer: RunPeer, tmp_path: Path) -> AsyncIterator[str]:
    """A real Glance without Keystone, with its file store in `tmp_path / "glance"`; its address."""
    directory = tmp_path / "glance"
    directory.mkdir()
    async with run_peer("glance", directory) as url:
        yield url


async def _upload(
    glance: str, data: bytes, *, token: str | None = None, **fields: Any
) -> dict[str, Any]:
    body = {"name": "golden", "disk_format": "raw", "container_format": "bare", **fields}
    own = {"X-Auth-Token": token} if token else {}
    async with aiohttp.ClientSession(headers=own) as session:
        async with session.post(f"{glance}/v2/images", json=body) as response:
            assert response.status == 201, await response.text()
            url = f"{glance}/v2/images/{(await response.json())['id']}"
        kind = {"Content-Type": "application/octet-stream"}
        async with session.put(f"{url}/file", data=io.BytesIO(data), headers=kind) as response:
            assert response.status == 204, await response.text()
        async with session.get(url) as response:
            assert response.status == 200, await response.text()
            described: dict[str, Any] = await response.json()
            return described


@pytest.fixture
def upload() -> Callable[..., Awaitable[dict[str, Any]]]:
    """`await upload(glance, data, token=None, **fields)`: an image in Glance, as Glance describes it."""
    return _upload


def _qcow2_of(data: bytes, directory: Path) -> bytes:
    raw, shaped = directory / "disk.raw", directory / "disk.qcow2"
    raw.write_bytes(data)
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c"]
    subprocess.run([*convert, str(raw), str(shaped)], check=True)
    return shaped.read_bytes()


@pytest.fixture
def qcow2_of() -> Callable[[bytes, Path], bytes]:
    """`qcow2_of(data, directory)`: the data as a virtual disk, compressed."""
    return _qcow2_of


@pytest.fixture
def overheard(amqp_url: str) -> Overheard:
    """`async with overheard(exchange) as count`: `await count()` messages were published since."""

    @asynccontextmanager
    async def listen(exchange: str) -> AsyncIterator[Callable[[], Awaitable[int]]]:
        async with await aio_pika.connect(amqp_url) as connection:
            channel = await connection.channel()
            queue = await channel.declare_queue(exclusive=True)
            await queue.bind(exchange, "#")

            async def count() -> int:
                state = await channel.declare_queue(queue.name, passive=True)
                return state.declaration_result.message_count or 0

            yield count

    return listen


async def _settled(service: RunningService, expected: int) -> list[dict[str, Any]]:
    async def holds() -> Any:
        listed = await service.api.get("/v1/events", limit=1000)
        if len(listed["events"]) < expected:
            return None
        usage = await service.api.get(
            "/v1/usage", start="2026-05-08T00:00:00Z", end="2026-05-09T00:00:00Z"
        )
        return listed if usage["unfolded_resources"] == 0 else None

    listed: dict[str, Any] = await eventually(holds)
    assert listed["next_marker"] is None
    assert len(listed["events"]) == expected
    assert (await service.api.get("/v1/quarantine"))["entries"] == []
    events: list[dict[str, Any]] = listed["events"]
    return events[::-1]


@pytest.fixture
def stored() -> Callable[[RunningService, int], Awaitable[list[dict[str, Any]]]]:
    """`await stored(service, count)`: so many events exactly, oldest first, all of them folded.

    Nothing is in quarantine then.
    """
    return _settled
