"""Reading before folding: while a backlog is read, histories wait, but not for long.

In a backlog the same resources are touched by batch after batch, and a history made between two of
them is thrown away by the next. So batches that come well filled put the fold off: until none has
come for twice the time that the last two were apart, up to a bound that grows with what a fold
takes: reading always gets the larger share.
"""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final

QUIET_SECONDS: Final = 0.25
MOST_QUIET_SECONDS: Final = 1.0
PATIENCE_SECONDS: Final = 10.0
PATIENCE_FOLDS: Final = 4.0  # as many times as long as the last fold took
_FILLED: Final = 0.1  # of a batch: a slow reader may not fill one in the time a batch waits


class Pace:
    """Whether the fold should run now. `clock` gives seconds that only grow."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._backlog_at = float("-inf")
        self._quiet_seconds = QUIET_SECONDS
        self._folded_at = clock()  # what waits at the start is read first, too
        self._patience_seconds = PATIENCE_SECONDS

    def batch_read(self, notifications: int, batch_size: int) -> None:
        """A batch was stored; a well filled one means that more is waiting."""
        if notifications >= _FILLED * batch_size:
            now = self._clock()
            took = now - self._backlog_at
            self._quiet_seconds = min(MOST_QUIET_SECONDS, max(QUIET_SECONDS, 2 * took))
            self._backlog_at = now

    def may_fold(self) -> bool:
        """Whether no backlog is being read, or the last fold is too long ago."""
        now = self._clock()
        return (
            now - self._backlog_at >= self._quiet_seconds
            or now - self._folded_at >= self._patience_seconds
        )

    async def when_quiet(self, turn: Callable[[], Awaitable[object]]) -> None:
        """`turn` is done, unless a backlog is being read and it can wait."""
        if self.may_fold():
            await turn()

    @contextmanager
    def fold(self) -> Iterator[None]:
        """Inside, a fold runs; the next one waits in proportion to what it took."""
        began = self._clock()
        try:
            yield
        finally:
            self._folded_at = self._clock()
            took = self._folded_at - began
            self._patience_seconds = max(PATIENCE_SECONDS, PATIENCE_FOLDS * took)
