"""The health check of the containers, as the engine runs it: a program with an exit code."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
from aiohttp import web

Listen = Callable[[int], AbstractAsyncContextManager[int]]


@pytest.fixture
def listen() -> Listen:
    """`async with listen(status) as port`: a process whose /readyz answers with that status."""

    @asynccontextmanager
    async def serve(status: int) -> AsyncIterator[int]:
        async def readyz(_: web.Request) -> web.Response:
            return web.json_response({"checks": [{"name": "broker"}]}, status=status)

        application = web.Application()
        application.router.add_get("/readyz", readyz)
        runner = web.AppRunner(application)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            yield runner.addresses[0][1]
        finally:
            await runner.cleanup()

    return serve


async def probe(*arguments: str, **environment: str) -> tuple[int | None, str]:
    """The exit code of the probe, and what it printed."""
    inherited = {key: value for key, value in os.environ.items() if key != "HOSTLER_HTTP_PORT"}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "hostler_common.probe",
        *arguments,
        env={**inherited, **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    return process.returncode, output.decode()


async def test_a_ready_process_is_healthy(listen: Listen) -> None:
    async with listen(200) as port:
        assert (await probe(HOSTLER_HTTP_PORT=str(port)))[0] == 0


async def test_the_port_may_be_an_argument(listen: Listen) -> None:
    async with listen(200) as port:
        assert (await probe(str(port)))[0] == 0


async def test_a_process_that_is_not_ready_is_unhealthy_and_the_answer_says_why(
    listen: Listen,
) -> None:
    async with listen(503) as port:
        code, output = await probe(HOSTLER_HTTP_PORT=str(port))
    assert code == 1
    assert "broker" in output


async def test_a_port_where_nobody_listens_is_unhealthy(listen: Listen) -> None:
    async with listen(200) as port:
        pass
    code, output = await probe(HOSTLER_HTTP_PORT=str(port))
    assert code == 1
    assert str(port) in output


async def test_without_a_port_the_probe_is_misused() -> None:
    assert (await probe())[0] == 2
