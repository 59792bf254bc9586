"""However many watch a distribution, its hosts are read once for all, and each is told what it does not know."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any
from uuid import UUID

import pytest

from hostler_common import errors
from hostler_precache.distribution import looks as module
from hostler_precache.distribution.distribution_store import (
    DistributionNotFound,
    DistributionStore,
)
from hostler_precache.distribution.distributions import HostProgress
from hostler_precache.distribution.looks import Look, Looks

Watch = AsyncGenerator[tuple[Look, Any], None]


class Counted(DistributionStore):
    """Counts how often hosts are read; may be away."""

    reads = 0
    is_away = False

    async def progress(self, distribution_id: UUID) -> list[HostProgress]:
        if self.is_away:
            raise errors.Unavailable("away")
        self.reads += 1
        return await super().progress(distribution_id)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(module, "IDLE_OVER_BUSY", 0)


async def told(watch: Watch) -> list[str]:
    """The hosts of the next look that has any."""
    while True:
        _, hosts = await anext(watch)
        if hosts:
            return [host.host for host in hosts]


async def test_all_who_watch_are_told_from_one_read_and_who_comes_later_is_told_all(
    control: Any,
) -> None:
    store = Counted(control.pool)
    looks = Looks(store, seed_bytes_per_second=1)
    blob_id = await control.add_blob()
    distribution_id = await control.distribute()
    keys = {"distribution_id": str(distribution_id), "blob_id": blob_id}
    watches = [looks.watch(distribution_id) for _ in range(20)]
    assert await asyncio.gather(*map(told, watches)) == [["h1", "h2"]] * 20
    assert store.reads == 1
    await control.say("h2", {**keys, "state": "transferring", "bytes_done": 5})
    assert await asyncio.gather(*map(told, watches)) == [["h2"]] * 20
    reads, numbers = store.reads, [(await anext(watch))[0].number for watch in watches]
    assert (len(set(numbers)), store.reads) == (1, reads + 1)
    late = looks.watch(distribution_id)
    assert await told(late) == ["h1", "h2"]
    assert store.reads == reads + 1
    for watch in (*watches, late):
        await watch.aclose()
    assert looks._watched == {}


async def test_who_missed_a_look_is_told_all_again(control: Any) -> None:
    looks = Looks(control.distributions, seed_bytes_per_second=1)
    distribution_id = await control.distribute()
    slow, quick = (looks.watch(distribution_id) for _ in range(2))
    assert await told(slow) == await told(quick) == ["h1", "h2"]
    for _ in range(2):
        assert (await anext(quick))[1] == []
    assert await told(slow) == ["h1", "h2"]
    await slow.aclose()
    await quick.aclose()


async def test_watching_goes_on_when_the_database_is_back_and_ends_with_the_distribution(
    control: Any,
) -> None:
    store = Counted(control.pool)
    looks = Looks(store, seed_bytes_per_second=1)
    distribution_id = await control.distribute()
    async with aclosing(looks.watch(distribution_id)) as watch:
        assert (await anext(watch))[0].number == 1
        store.is_away = True
        following = asyncio.create_task(anext(watch))
        await asyncio.sleep(0.5)
        assert not following.done()
        store.is_away = False
        assert (await following)[0].number == 2
    with pytest.raises(DistributionNotFound):
        await anext(looks.watch(UUID(int=1)))
    assert looks._watched == {}
