"""Threads that blocks are hashed and written in, for a loop that goes on receiving meanwhile.

An executor would do; but its futures, locks and semaphores cost a third as much again as hashing and
writing a block of a quarter of a MiB.
"""

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue

_Job = Callable[[], object]
_Done = Callable[[BaseException | None], None]


class Writers:
    """So many threads, which start with the first job."""

    def __init__(self, threads: int, *, name: str) -> None:
        self._jobs: SimpleQueue[tuple[_Job, asyncio.AbstractEventLoop, _Done] | None] = (
            SimpleQueue()
        )
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True)
            for number in range(threads)
        ]
        self._is_started = False

    def run(self, job: _Job, done: _Done) -> None:
        """Run the job in a thread, then `done` in this loop, with what the job has raised."""
        if not self._is_started:
            self._is_started = True
            for thread in self._threads:
                thread.start()
        self._jobs.put((job, asyncio.get_running_loop(), done))

    def close(self) -> None:
        """All jobs are done, and the threads are gone; blocks. What is `done` is still to be run."""
        if self._is_started:
            for _ in self._threads:
                self._jobs.put(None)
            for thread in self._threads:
                thread.join()

    def _work(self) -> None:
        while (order := self._jobs.get()) is not None:
            job, loop, done = order
            failure: BaseException | None = None
            try:
                job()
            except BaseException as exc:  # noqa: BLE001  whoever ordered it decides
                failure = exc
            loop.call_soon_threadsafe(done, failure)
            # what the job held is not held until the next one comes
            del order, job, done, failure
