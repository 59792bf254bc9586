"""A blocking call is never left behind while it uses its files."""

import asyncio
import contextvars
import threading

import pytest

from hostler_precache import threads


@pytest.mark.parametrize("times", [1, 3])
async def test_however_often_it_is_cancelled_the_call_is_over_and_undone_before_it_is(
    times: int,
) -> None:
    begun, goes_on = threading.Event(), threading.Event()
    undone: list[str] = []

    def call() -> str:
        begun.set()
        assert goes_on.wait(10)
        return "opened"

    task = asyncio.create_task(threads.to_end(call, undo=undone.append))
    await asyncio.to_thread(begun.wait)
    for _ in range(times):
        task.cancel()
        for _ in range(3):
            await asyncio.sleep(0)
        assert not task.done()
    goes_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert undone == ["opened"]


async def test_a_call_that_fails_after_it_was_cancelled_has_nothing_to_undo() -> None:
    begun, goes_on = threading.Event(), threading.Event()
    undone: list[None] = []

    def call() -> None:
        begun.set()
        assert goes_on.wait(10)
        raise OSError

    task = asyncio.create_task(threads.to_end(call, undo=undone.append))
    await asyncio.to_thread(begun.wait)
    task.cancel()
    await asyncio.sleep(0)
    goes_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert undone == []


async def test_what_it_gives_or_raises_is_the_callers_in_the_callers_context() -> None:
    said = contextvars.ContextVar("said", default="nothing")
    said.set("host h1")
    assert await threads.to_end(said.get) == "host h1"
    with pytest.raises(ZeroDivisionError):
        await threads.to_end(lambda: 1 // 0)
