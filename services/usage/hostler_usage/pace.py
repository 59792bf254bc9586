"""Reading before folding: while a backlog is read, histories wait, but not for long.

In a backlog the same resources are touched by batch after batch, and a history made between two of
them is thrown away by the next. So a full batch puts the fold off, up to a bound.
"""

from collections.abc import Callable

BACKLOG_SECONDS = 1.0
PATIENCE_SECONDS = 5.0


class Pace:
    """Whether the fold should run now. `clock` gives seconds that only grow."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._full_batch_at = float("-inf")
        self._folded_at = float("-inf")

    def batch_read(self, notifications: int, batch_size: int) -> None:
        """A batch was stored; a full one means that more is waiting."""
        if notifications >= batch_size:
            self._full_batch_at = self._clock()

    def may_fold(self) -> bool:
        """Whether no backlog is being read, or the last fold is too long ago; if so, it is now."""
        now = self._clock()
        if (
            now - self._full_batch_at < BACKLOG_SECONDS
            and now - self._folded_at < PATIENCE_SECONDS
        ):
            return False
        self._folded_at = now
        return True
