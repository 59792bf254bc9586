"""When the tracker's process looks for cycles of garbage: by the clock, and what is young only.

Each connection keeps the objects of its last request until the next, so with ten thousand of them
all that is new survives: Python's own count, which falls with every object that dies of old age,
does not see them, and lets them grow to a million before it looks through them all. The tracker
stood still for a quarter of a second then. Looked through every quarter of a second they are few.
"""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

YOUNG_SECONDS: Final = 0.25
OLD_SECONDS: Final = 600.0


@contextmanager
def by_the_clock() -> Iterator["Collector"]:
    """Inside, nothing looks for garbage but `Collector.collect`, which is to be called every `YOUNG_SECONDS`."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield Collector()
    finally:
        if was_enabled:
            gc.enable()


class Collector:
    """Looks for garbage among what is young, and now and then among all."""

    def __init__(self) -> None:
        self._old_at = time.monotonic()

    async def collect(self) -> None:
        """Cycles of young objects are gone; every ten minutes all cycles, which takes a pause."""
        gc.collect(0)
        if time.monotonic() - self._old_at >= OLD_SECONDS:
            self._old_at = time.monotonic()
            gc.collect()
