"""Who may hold a connection to a port of ours, and for how long."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

import pytest
from aiohttp import web

from hostler_common import admission, runtime

PATIENCE_SECONDS: Final = 20.0


@asynccontextmanager
async def port(*, strangers: int | None = 8, idle_seconds: float = 60.0) -> AsyncIterator[int]:
    """A server whose `/known` shows a right, and whose `/` shows none; its port."""
    application = web.Application()
    application[admission.KEY] = admission.Admission(strangers=strangers)

    async def known(request: web.Request) -> web.Response:
        request.app[admission.KEY].is_known(request)
        return web.Response(text="known")

    async def anybody(request: web.Request) -> web.Response:
        return web.Response(text="hello")

    application.add_routes([web.get("/known", known), web.get("/", anybody)])
    listener = runtime.bind("127.0.0.1", 0)
    number = listener.getsockname()[1]
    async with admission.serving(
        application, listener, drain_seconds=1.0, idle_seconds=idle_seconds
    ):
        yield number


class Peer:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def ask(self, path: str, *fields: str) -> bytes:
        """The body of the answer; nothing where the connection was closed."""
        lines = [f"GET {path} HTTP/1.1", "Host: x", *fields, "", ""]
        self.writer.write("\r\n".join(lines).encode())
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            return await self.reader.readexactly(length)
        return b""

    async def until_closed(self) -> None:
        """The server has closed the connection."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            with contextlib.suppress(ConnectionError):
                while await self.reader.read(1024):
                    pass


@asynccontextmanager
async def connected(number: int) -> AsyncIterator[Peer]:
    reader, writer = await asyncio.open_connection("127.0.0.1", number)
    try:
        yield Peer(reader, writer)
    finally:
        writer.transport.abort()


async def test_a_head_that_comes_byte_by_byte_holds_a_connection_no_longer_than_silence() -> None:
    async with port(idle_seconds=0.5) as number, connected(number) as slow:

        async def dribble() -> None:
            slow.writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nX: ")
            while not slow.writer.is_closing():
                slow.writer.write(b"a")
                await asyncio.sleep(0.02)

        async with asyncio.TaskGroup() as group:
            dribbling = group.create_task(dribble())
            await slow.until_closed()
            dribbling.cancel()


async def test_a_second_head_that_never_ends_closes_the_connection_too() -> None:
    async with port(idle_seconds=0.5) as number, connected(number) as slow:
        assert await slow.ask("/known") == b"known"  # its right is one to ask, not to stay
        slow.writer.write(b"GET / HT")
        await slow.until_closed()


async def test_a_connection_on_which_nothing_is_asked_is_closed_and_one_that_is_used_is_kept() -> (
    None
):
    async with port(idle_seconds=3.0) as number, connected(number) as used:
        async with connected(number) as idle, asyncio.TaskGroup() as group:
            closed = group.create_task(idle.until_closed())
            while not closed.done():
                assert await used.ask("/") == b"hello"
                await asyncio.sleep(0.05)
        assert await used.ask("/") == b"hello"


async def test_for_one_stranger_too_many_the_first_goes_and_who_is_known_stays() -> None:
    async with port(strangers=3) as number, AsyncExitStack() as stack:
        known = await stack.enter_async_context(connected(number))
        assert await known.ask("/known") == b"known"
        strangers = []
        for _ in range(4):
            strangers.append(await stack.enter_async_context(connected(number)))
            if len(strangers) < 4:
                assert await strangers[-1].ask("/") == b"hello"
        await strangers[0].until_closed()
        for one in strangers[1:]:
            assert await one.ask("/") == b"hello"
        assert await known.ask("/known") == b"known"


async def test_one_who_has_left_takes_no_place_from_one_who_stays() -> None:
    async with port(strangers=3) as number, connected(number) as stays:
        assert await stays.ask("/") == b"hello"
        for _ in range(100):
            async with connected(number) as other:
                assert await other.ask("/", "Connection: close") == b"hello"
                await other.until_closed()
        assert await stays.ask("/") == b"hello"


async def test_hundreds_who_come_at_once_and_have_a_right_are_all_heard() -> None:
    async with port(strangers=256) as number:

        async def come() -> bytes:
            async with connected(number) as one:
                return await one.ask("/known")

        assert await asyncio.gather(*(come() for _ in range(400))) == [b"known"] * 400


async def test_hundreds_who_have_a_right_and_ask_late_are_all_heard() -> None:
    runtime._allow_descriptors()  # as every process does
    async with port(strangers=None) as number, AsyncExitStack() as stack:
        came = [await stack.enter_async_context(connected(number)) for _ in range(600)]
        assert [await one.ask("/known") for one in came] == [b"known"] * 600


def test_strangers_leave_three_quarters_of_the_descriptors_to_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 4096))
    assert admission.Admission()._limit == 256
    monkeypatch.setattr("resource.getrlimit", lambda _: (1 << 20, 1 << 20))
    assert admission.Admission()._limit == admission.STRANGERS
