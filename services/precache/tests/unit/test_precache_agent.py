"""The agent's part asks no more than it has to, and ends as it should, whatever it was in the middle of."""

import asyncio
import uuid
from asyncio import TimerHandle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from hostler_common import servers, testing
from hostler_precache import testing as precache_testing
from hostler_precache.agent import CacheAgent
from hostler_precache.metrics import AgentMetrics
from hostler_precache.placing.shelf import Shelf, open_shelf
from hostler_precache.settings import AgentSettings
from hostler_precache.transfer.blobs import BlobServer
from hostler_precache.transfer.pieces import BusyError, NoSpaceError


def is_looked_after(shelf: Shelf) -> bool:
    """Whether another agent has the place."""
    try:
        shelf.tend([])
    except BusyError:
        return True
    shelf.close()
    return False


def settings_of(directory: Path, precache_url: str, **more: Any) -> AgentSettings:
    return AgentSettings(
        amqp_url=SecretStr("amqp://localhost"),
        precache_url=precache_url,
        target_dir=directory,
        placer="directory",
        target_template="{image_id}",
        **more,
    )


def agent_of(settings: AgentSettings) -> CacheAgent:
    return CacheAgent(
        host="host-1",
        url="http://127.0.0.1:1",
        link_bytes_per_second=None,
        settings=settings,
        token=None,
        server=BlobServer(slots=2),
        held=open_shelf(settings),
        metrics=AgentMetrics(CollectorRegistry()),
    )


async def test_when_an_agent_has_ended_another_may_look_after_the_place(tmp_path: Path) -> None:
    # nobody answers
    settings = settings_of(tmp_path, f"http://127.0.0.1:{servers.free_port()}")
    agent = agent_of(settings)
    another = open_shelf(settings)
    running = asyncio.create_task(agent.run())

    async def is_at_work() -> bool:
        return await asyncio.to_thread(is_looked_after, another)

    await testing.eventually(is_at_work)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not await is_at_work()


async def test_images_that_fail_together_are_tried_again_at_one_look_and_not_at_one_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [
        {
            "distribution_id": str(uuid.uuid4()), "image_id": f"image-{number}",
            "blob_id": str(uuid.uuid4()), "root": "00" * 32, "size_bytes": 1, "seeds": [],
            "token": "token", "swarm_key": "00",
        }
        for number in range(100)
    ]  # fmt: skip
    tried: Counter[str] = Counter()
    looks = 0

    async def answer(request: web.Request) -> web.Response:
        del request
        return web.json_response({"images": images})

    async def fail(agent: CacheAgent, work: Any, *more: Any) -> None:
        del agent, more
        tried[work.wanted.image_id] += 1
        raise NoSpaceError("no room")

    loop = asyncio.get_running_loop()
    call_later = loop.call_later

    def counting(
        delay: float, callback: Callable[..., object], *more: Any, **named: Any
    ) -> TimerHandle:
        nonlocal looks
        looks += callback == agent.look_again
        return call_later(delay, callback, *more, **named)

    monkeypatch.setattr(CacheAgent, "_bring", fail)
    async with precache_testing.http_server(answer) as url:
        agent = agent_of(settings_of(tmp_path, url, retry_seconds=60.0))
        monkeypatch.setattr(loop, "call_later", counting)
        running = asyncio.create_task(agent.run())

        async def all_have_failed() -> bool:
            return len(tried) == len(images)

        await testing.eventually(all_have_failed)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert 1 <= looks <= 5
