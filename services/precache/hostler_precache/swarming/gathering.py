"""Calls that come together are answered together: one transaction for hundreds of hosts.

What comes while a batch is on its way goes into the next, so the database sees a few statements a
batch however many hosts there are.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic, TypeVar

from hostler_common import errors

MAX_BATCH: Final = 500
# a transaction costs the same for one and for fifty: those of so long go into one
GATHER_SECONDS: Final = 0.01

AskedT = TypeVar("AskedT")
AnswerT = TypeVar("AnswerT")


class Gathering(Generic[AskedT, AnswerT]):
    """Answers in batches, with what `answer` gives for each of a batch, in its order; `run` it.

    Should `answer` fail for a batch, each of it is tried alone: one of them keeps no other.
    """

    def __init__(self, answer: Callable[[Sequence[AskedT]], Awaitable[Sequence[AnswerT]]]) -> None:
        self._answer = answer
        self._waiting: list[tuple[AskedT, asyncio.Future[AnswerT]]] = []
        self._wake = asyncio.Event()

    async def ask(self, asked: AskedT) -> AnswerT:
        """The answer, as part of the next batch.

        Raises:
            HostlerError: what `answer` raised for it.
        """
        done: asyncio.Future[AnswerT] = asyncio.get_running_loop().create_future()
        self._waiting.append((asked, done))
        self._wake.set()
        return await done

    async def run(self) -> None:
        """Answer what waits, until cancelled."""
        while True:
            await self._wake.wait()
            await asyncio.sleep(GATHER_SECONDS)
            self._wake.clear()
            # who asks from now on is gathered again, or a busy service would have a batch for each few
            waiting, self._waiting = self._waiting, []
            for start in range(0, len(waiting), MAX_BATCH):
                await self._answer_all(waiting[start : start + MAX_BATCH])

    async def _answer_all(self, batch: list[tuple[AskedT, asyncio.Future[AnswerT]]]) -> None:
        try:
            answers = await self._answer([asked for asked, _ in batch])
        except errors.HostlerError as exc:
            if len(batch) > 1 and not isinstance(exc, errors.Unavailable):
                for one in batch:
                    await self._answer_all([one])
                return
            for _, done in batch:
                if not done.done():
                    done.set_exception(exc)
            return
        for (_, done), answer in zip(batch, answers, strict=True):
            if not done.done():  # who asked may have gone away
                done.set_result(answer)
