"""Names are looked up in threads of their own.

asyncio looks them up in the few threads in which everything else that blocks runs, too: where a name server does not
answer, each of them hangs for half a minute, and nothing is read, written or hashed meanwhile. Here only lookups wait
for lookups. Whoever asks for a name that is being looked up waits for that one, so each takes one thread at most.

An address that is written in figures is looked up by nobody: asyncio sees that by itself.
"""

import asyncio
import socket
import threading
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Any, Final

THREADS: Final = 8

_Addresses = list[Any]
_Lookup = Callable[[], _Addresses]


class Loop(asyncio.SelectorEventLoop):
    """The loop of a process of the suite: that of asyncio, but for where it looks names up."""

    def __init__(self) -> None:
        super().__init__()
        self._orders: SimpleQueue[tuple[_Lookup, asyncio.Future[_Addresses]] | None] = (
            SimpleQueue()
        )
        self._threads = 0
        self._asked: dict[object, asyncio.Future[_Addresses]] = {}

    async def getaddrinfo(
        self,
        host: str | bytes | None,
        port: str | bytes | int | None,
        *,
        family: int = 0,
        type: int = 0,
        proto: int = 0,
        flags: int = 0,
    ) -> _Addresses:
        """See `asyncio.loop.getaddrinfo`."""
        key = (host, port, family, type, proto, flags)
        asked = self._asked.get(key)
        if asked is None:
            asked = self._asked[key] = self.create_future()
            asked.add_done_callback(partial(self._answered, key))
            self._order(partial(socket.getaddrinfo, *key), asked)
        return await asyncio.shield(asked)

    def close(self) -> None:
        """Nobody waits any more: threads end, but for those that hang."""
        super().close()
        for _ in range(self._threads):
            self._orders.put(None)
        self._threads = 0

    def _answered(self, key: object, asked: asyncio.Future[_Addresses]) -> None:
        del self._asked[key]
        asked.exception()  # all who asked may have left by now: then that there is no answer is no news

    def _order(self, lookup: _Lookup, asked: asyncio.Future[_Addresses]) -> None:
        if self._threads < THREADS:
            self._threads += 1
            # one that hangs must not keep the process from ending
            threading.Thread(
                target=self._work, name=f"lookup-{self._threads}", daemon=True
            ).start()
        self._orders.put((lookup, asked))

    def _work(self) -> None:
        while (order := self._orders.get()) is not None:
            lookup, asked = order
            try:
                tell = partial(asked.set_result, lookup())
            except Exception as exc:  # noqa: BLE001  whoever asked is told
                tell = partial(asked.set_exception, exc)
            try:
                self.call_soon_threadsafe(tell)
            except RuntimeError:  # nobody waits any more: the loop is closed
                return
            del order, lookup, asked, tell
