"""A name server that does not answer holds up those who ask for names, and nobody else."""

import asyncio
import gc
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from hostler_common import lookups, runtime
from hostler_common.testing import eventually

ANSWER = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 1))]


class Resolver:
    """In the place of the system's: what is called `hangs-...` waits until it is told to go on."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.asked = Counter[str]()

    def getaddrinfo(self, host: str, *_: object, **__: object) -> list[Any]:
        self.asked[host] += 1
        if host.startswith("hangs") or host == "nobody-slow":
            self.go_on.wait(60)
        if host.startswith("nobody"):
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return ANSWER


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Resolver]:
    made = Resolver()
    monkeypatch.setattr(socket, "getaddrinfo", made.getaddrinfo)
    yield made
    made.go_on.set()


async def until_asked(resolver: Resolver, count: int) -> None:
    async def has_asked() -> bool:
        return sum(resolver.asked.values()) >= count

    await eventually(has_asked)


def test_where_no_name_is_found_out_files_are_written_and_addresses_reached_all_the_same(
    resolver: Resolver,
) -> None:
    done: list[object] = []

    async def work() -> None:
        async with asyncio.timeout(30):
            asking = [
                asyncio.create_task(asyncio.open_connection(f"hangs-{number}", 80))
                for number in range(100)
            ]
            await until_asked(resolver, lookups.THREADS)
            done.append(await asyncio.to_thread(lambda: "written"))
            server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
            async with server:
                address = server.sockets[0].getsockname()
                reader, writer = await asyncio.open_connection(*address)
                done.append(await reader.read())
                writer.close()
            for one in asking:
                one.cancel()
            await asyncio.wait(asking)

    # it ends, too, while the threads still hang
    assert runtime.main(work(), service="test") == 0
    assert done == ["written", b""]
    assert len(resolver.asked) == lookups.THREADS
    assert not resolver.go_on.is_set()


def test_a_name_that_is_being_looked_up_is_looked_up_once_for_all_who_ask(
    resolver: Resolver,
) -> None:
    async def again() -> None:
        await asyncio.get_running_loop().getaddrinfo("hangs", 80)

    async def work() -> list[Any]:
        loop = asyncio.get_running_loop()
        impatient = asyncio.create_task(loop.getaddrinfo("hangs", 80))
        others = [asyncio.create_task(loop.getaddrinfo("hangs", 80)) for _ in range(50)]
        await until_asked(resolver, 1)
        assert await loop.getaddrinfo("another", 80) == ANSWER
        impatient.cancel()
        resolver.go_on.set()
        return [await one for one in others]

    with asyncio.Runner(loop_factory=lookups.Loop) as runner:
        assert runner.run(work()) == [ANSWER] * 50
        assert resolver.asked == {"hangs": 1, "another": 1}
        runner.run(again())
    assert resolver.asked == {"hangs": 2, "another": 1}


def test_who_asks_for_a_name_that_there_is_not_is_told_so(resolver: Resolver) -> None:
    async def work() -> None:
        for _ in range(2):
            with pytest.raises(socket.gaierror, match="no such name"):
                await asyncio.open_connection("nobody", 80)

    with asyncio.Runner(loop_factory=lookups.Loop) as runner:
        runner.run(work())
    assert resolver.asked == {"nobody": 2}


def test_an_answer_that_nobody_waits_for_any_more_is_no_error_and_threads_end_with_their_loop(
    resolver: Resolver, caplog: pytest.LogCaptureFixture
) -> None:
    def waiting() -> set[threading.Thread]:
        return {one for one in threading.enumerate() if one.name.startswith("lookup-")}

    async def work() -> set[threading.Thread]:
        loop = asyncio.get_running_loop()
        impatient = asyncio.create_task(loop.getaddrinfo("nobody-slow", 80))
        await until_asked(resolver, 1)
        impatient.cancel()
        resolver.go_on.set()
        await loop.getaddrinfo("another", 80)

        async def is_answered() -> bool:
            return not loop._asked  # type: ignore[attr-defined]

        await eventually(is_answered)
        gc.collect()
        return waiting() - before

    before = waiting()
    with asyncio.Runner(loop_factory=lookups.Loop) as runner:
        mine = runner.run(work())
    assert mine
    for thread in mine:
        thread.join(20)
    assert not waiting() - before
    assert "never retrieved" not in caplog.text
