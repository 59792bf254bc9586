"""What is ordered is done in a thread, its outcome is told in the loop, and nothing of it is kept."""

import asyncio
import threading
import weakref
from collections.abc import Iterator

import pytest

from hostler_precache.transfer.writers import Writers


@pytest.fixture
def writers() -> Iterator[Writers]:
    made = Writers(2, name="test")
    yield made
    made.close()


async def test_a_job_runs_in_a_thread_and_its_failure_is_told_in_the_loop(
    writers: Writers,
) -> None:
    told: asyncio.Queue[tuple[BaseException | None, int]] = asyncio.Queue()
    ran: list[int] = []

    def done(failure: BaseException | None) -> None:
        told.put_nowait((failure, threading.get_ident()))

    def fail() -> None:
        raise OSError("full")

    writers.run(lambda: ran.append(threading.get_ident()), done)
    assert await told.get() == (None, threading.get_ident())
    assert ran != [threading.get_ident()]
    writers.run(fail, done)
    failure, _ = await told.get()
    assert str(failure) == "full"


async def test_two_jobs_run_at_once_and_closing_waits_for_those_that_were_ordered() -> None:
    made = Writers(2, name="test")
    both = threading.Barrier(3)
    done: list[BaseException | None] = []
    for _ in range(2):
        made.run(both.wait, done.append)
    await asyncio.to_thread(both.wait)
    for _ in range(5):
        made.run(lambda: None, done.append)
    await asyncio.to_thread(made.close)
    await asyncio.sleep(0)
    assert done == [None] * 7


async def test_what_a_job_held_is_free_when_it_is_done(writers: Writers) -> None:
    class Block:
        pass

    block, ended = Block(), asyncio.Event()
    seen = weakref.ref(block)

    def work(held: Block = block) -> None:
        del held

    writers.run(work, lambda _: ended.set())
    del block, work
    await ended.wait()
    for _ in range(1000):
        if seen() is None:
            break
        await asyncio.sleep(0.001)
    assert seen() is None


def test_writers_that_were_never_used_are_closed_at_once() -> None:
    Writers(2, name="test").close()
