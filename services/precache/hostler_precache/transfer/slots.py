"""How many images come at once, and which is next."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    """Somebody whose turn has not come; it has when the future is done."""

    priority: Callable[[], int]
    turn: asyncio.Future[None]


class Slots:
    """So many at once. Of those that wait the most urgent goes first, and of these who has waited longest."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: list[_Waiting] = []

    @asynccontextmanager
    async def taken(self, priority: Callable[[], int]) -> AsyncIterator[None]:
        """A slot is had; `priority` is asked when one becomes free, for it may have changed: higher goes first."""
        if self._free:
            self._free -= 1
        else:
            await self._wait(priority)
        try:
            yield
        finally:
            self._give_back()

    async def _wait(self, priority: Callable[[], int]) -> None:
        one = _Waiting(priority, asyncio.get_running_loop().create_future())
        self._waiting.append(one)
        try:
            await one.turn
        except asyncio.CancelledError:
            if one in self._waiting:
                self._waiting.remove(one)
            else:  # the slot had just been given
                self._give_back()
            raise

    def _give_back(self) -> None:
        # one that is cancelled is there until it has heard of it
        waiting = [one for one in self._waiting if not one.turn.done()]
        if not waiting:
            self._free += 1
            return
        # of several that are equal max takes the first: they are in the order of their coming
        following = max(waiting, key=lambda one: one.priority())
        self._waiting.remove(following)
        following.turn.set_result(None)
