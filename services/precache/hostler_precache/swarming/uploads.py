"""Upload slots as a sender uses them: `swarm.UploadSlots`, with those who wait, in their order.

A receiver keeps more requests out than are being answered, so that its downlink never runs dry;
they wait here, where no time is lost between one piece and the next.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from hostler_precache.swarming.swarm import UploadSlots


class QueueFull(Exception):
    """No slot, and no place to wait for one; or none came free in time."""


class Slots:
    """Upload slots of one process, first come first served."""

    def __init__(self, slots: int, *, queue: int, queue_seconds: float) -> None:
        """Slots that are all free.

        Args:
            slots: pieces on the wire at once.
            queue: askers that wait for a slot.
            queue_seconds: how long they wait before they are told to come back.
        """
        self._slots = UploadSlots(slots, queue=queue)
        self._queue_seconds = queue_seconds
        self._waiting: deque[asyncio.Future[int]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def active(self) -> int:
        """How many pieces are on the wire."""
        return self._slots.active

    @asynccontextmanager
    async def taken(self) -> AsyncIterator[None]:
        """Hold a slot, after waiting for it.

        Raises:
            QueueFull: see there.
        """
        ticket = await self._take()
        try:
            yield
        finally:
            self._give_back(ticket)

    async def _take(self) -> int:
        loop = asyncio.get_running_loop()
        if not self._waiting:
            ticket = self._slots.take(loop.time())
            if ticket is not None:
                return ticket
        if not self._slots.enqueue():
            raise QueueFull("every slot is taken and the queue is full")
        turn: asyncio.Future[int] = loop.create_future()
        self._waiting.append(turn)
        self._watch()
        try:
            async with asyncio.timeout(self._queue_seconds):
                return await turn
        except BaseException as exc:
            if turn.done() and not turn.cancelled():
                self._give_back(turn.result())  # the slot came in the same moment
            if isinstance(exc, TimeoutError):
                raise QueueFull("no slot came free in time") from exc
            raise
        finally:
            self._slots.dequeue()
            if turn in self._waiting:
                self._waiting.remove(turn)

    def _give_back(self, ticket: int) -> None:
        self._slots.give_back(ticket, asyncio.get_running_loop().time())
        self._hand_on()

    def _hand_on(self) -> None:
        """Whoever waits has a slot, as long as there are any."""
        now = asyncio.get_running_loop().time()
        while self._waiting:
            if self._waiting[0].done():  # gave up
                self._waiting.popleft()
                continue
            ticket = self._slots.take(now)
            if ticket is None:
                break
            self._waiting.popleft().set_result(ticket)
        self._watch()

    def _watch(self) -> None:
        """Look again when the next of those being sent is overdue, while anybody waits."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        loop = asyncio.get_running_loop()
        seconds = self._slots.next_overdue(loop.time()) if self._waiting else None
        if seconds is not None:
            self._timer = loop.call_later(seconds + 0.001, self._hand_on)
