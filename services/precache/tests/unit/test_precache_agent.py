"""The agent's part ends as it should, whatever it was in the middle of."""

import asyncio
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from hostler_common import servers, testing
from hostler_precache.agent import CacheAgent
from hostler_precache.metrics import AgentMetrics
from hostler_precache.placing.shelf import Shelf, open_shelf
from hostler_precache.settings import AgentSettings
from hostler_precache.transfer.blobs import BlobServer
from hostler_precache.transfer.pieces import BusyError


def is_looked_after(shelf: Shelf) -> bool:
    """Whether another agent has the place."""
    try:
        shelf.tend([])
    except BusyError:
        return True
    shelf.close()
    return False


async def test_when_an_agent_has_ended_another_may_look_after_the_place(tmp_path: Path) -> None:
    settings = AgentSettings(
        amqp_url=SecretStr("amqp://localhost"),
        precache_url=f"http://127.0.0.1:{servers.free_port()}",  # nobody answers
        target_dir=tmp_path,
        placer="directory",
        target_template="{image_id}",
    )
    agent = CacheAgent(
        host="host-1",
        url="http://127.0.0.1:1",
        link_bytes_per_second=None,
        settings=settings,
        token=None,
        server=BlobServer(slots=2),
        held=open_shelf(settings),
        metrics=AgentMetrics(CollectorRegistry()),
    )
    another = open_shelf(settings)
    running = asyncio.create_task(agent.run())

    async def is_at_work() -> bool:
        return await asyncio.to_thread(is_looked_after, another)

    await testing.eventually(is_at_work)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not await is_at_work()
