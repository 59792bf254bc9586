"""How many images come at once on a host, and which is next."""

import asyncio
from collections.abc import Callable
from functools import partial

import pytest

from hostler_precache.transfer.slots import Slots


class Runner:
    """Tasks that take a slot each and hold it until they are told to go."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.running: list[str] = []
        self._go = dict[str, asyncio.Event]()
        self.tasks = dict[str, asyncio.Task[None]]()

    async def start(self, name: str, priority: Callable[[], int]) -> None:
        """It runs, or waits."""
        self._go[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._hold(name, priority))
        await asyncio.sleep(0)

    async def _hold(self, name: str, priority: Callable[[], int]) -> None:
        async with self.slots.taken(priority):
            self.running.append(name)
            try:
                await self._go[name].wait()
            finally:
                self.running.remove(name)

    async def end(self, name: str) -> None:
        """It has given its slot back, and whoever is next has it."""
        self._go[name].set()
        await self.tasks[name]
        await asyncio.sleep(0)

    async def cancel(self, name: str) -> None:
        """It is gone."""
        self.tasks[name].cancel()
        with pytest.raises(asyncio.CancelledError):
            await self.tasks[name]


async def test_the_most_urgent_of_those_that_wait_goes_first_and_then_who_came_first() -> None:
    runner = Runner(Slots(1))
    for name, priority in (("a", 0), ("b", 0), ("c", 5), ("d", 0), ("e", 5)):
        await runner.start(name, partial(int, priority))
    order = []
    for _ in range(5):
        (name,) = runner.running
        order.append(name)
        await runner.end(name)
    assert order == ["a", "c", "e", "b", "d"]


async def test_what_became_urgent_while_it_waited_goes_first() -> None:
    runner, priority = Runner(Slots(1)), {"b": 0, "c": 0}
    await runner.start("a", lambda: 0)
    await runner.start("b", lambda: priority["b"])
    await runner.start("c", lambda: priority["c"])
    priority["c"] = 1
    await runner.end("a")
    assert runner.running == ["c"]
    await runner.end("c")
    await runner.end("b")


async def test_no_slot_is_lost_with_those_that_are_cancelled_while_they_wait_or_as_they_get_it() -> (
    None
):
    runner = Runner(Slots(2))
    for name in "abcd":
        await runner.start(name, lambda: 0)
    await runner.cancel("c")
    runner.tasks["a"].cancel()
    await asyncio.sleep(0)  # a gives its slot to d, which has not run since
    await runner.cancel("d")
    await runner.end("b")
    await runner.start("e", lambda: 0)
    await runner.start("f", lambda: 0)
    assert runner.running == ["e", "f"]
    await runner.end("e")
    await runner.end("f")


async def test_a_slot_that_is_given_back_as_whoever_waits_is_cancelled_is_free() -> None:
    runner = Runner(Slots(1))
    await runner.start("a", lambda: 0)
    await runner.start("b", lambda: 0)
    for name in "ab":  # a comes to give its slot back before b has heard of its own end
        runner.tasks[name].cancel()
    ended = await asyncio.gather(*runner.tasks.values(), return_exceptions=True)
    assert [type(one) for one in ended] == [asyncio.CancelledError] * 2
    await runner.start("c", lambda: 0)
    assert runner.running == ["c"]
    await runner.end("c")
