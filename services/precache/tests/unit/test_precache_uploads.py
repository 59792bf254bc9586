"""A sender's slots change hands without a gap, and nobody waits for ever."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from hostler_precache.swarming import swarm, uploads


@asynccontextmanager
async def holding(slots: uploads.Slots, count: int) -> AsyncIterator[list[asyncio.Event]]:
    """So many sendings are under way, each until its event is set."""
    ends = [asyncio.Event() for _ in range(count)]
    begun = [asyncio.Event() for _ in range(count)]

    async def send(start: asyncio.Event, end: asyncio.Event) -> None:
        async with slots.taken():
            start.set()
            await end.wait()

    async with asyncio.TaskGroup() as group:
        for start, end in zip(begun, ends, strict=True):
            group.create_task(send(start, end))
        for start in begun:
            await start.wait()
        yield ends
        for end in ends:
            end.set()


async def test_a_slot_changes_hands_in_the_order_of_asking() -> None:
    slots = uploads.Slots(1, queue=3, queue_seconds=30)
    order: list[int] = []

    async def send(number: int) -> None:
        async with slots.taken():
            order.append(number)
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        for number in range(4):
            group.create_task(send(number))
    assert order == [0, 1, 2, 3]
    assert slots.active == 0


async def test_who_finds_the_queue_full_is_told_at_once() -> None:
    slots = uploads.Slots(1, queue=0, queue_seconds=30)
    async with holding(slots, 1):
        with pytest.raises(uploads.QueueFull):
            async with slots.taken():
                raise AssertionError("there was no slot")


async def test_who_waits_too_long_is_told_to_come_back() -> None:
    slots = uploads.Slots(1, queue=1, queue_seconds=0.02)
    async with holding(slots, 1):
        with pytest.raises(uploads.QueueFull):
            async with slots.taken():
                raise AssertionError("there was no slot")
    async with slots.taken():
        assert slots.active == 1


async def test_who_gives_up_leaves_its_place_to_the_next() -> None:
    slots = uploads.Slots(1, queue=2, queue_seconds=30)
    got = asyncio.Event()

    async def send() -> None:
        async with slots.taken():
            got.set()

    async with holding(slots, 1) as (end,):
        impatient = asyncio.create_task(send())
        await asyncio.sleep(0)
        patient = asyncio.create_task(send())
        await asyncio.sleep(0)
        impatient.cancel()
        await asyncio.wait([impatient])
        end.set()
        await patient
    assert got.is_set()
    assert slots.active == 0


async def test_a_slow_receiver_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swarm, "MIN_OVERDUE_SECONDS", 0.01)
    slots = uploads.Slots(1, queue=5, queue_seconds=30)
    for _ in range(3):
        async with slots.taken():
            await asyncio.sleep(0)
    # its receiver never reads
    async with holding(slots, 1), asyncio.timeout(10), slots.taken():
        assert slots.active == 2
