"""Blocking calls beside the loop that own what they open: none is left behind while it still uses its files."""

import asyncio
import contextvars
from collections.abc import Callable
from typing import TypeVar

ResultT = TypeVar("ResultT")


async def to_end(
    call: Callable[[], ResultT], *, undo: Callable[[ResultT], None] = lambda _: None
) -> ResultT:
    """What a blocking call gives, from a thread.

    When cancelled, however often, only after the thread is done with its files, and what it gave is undone.
    """
    context = contextvars.copy_context()
    # not a task of its own: nobody else can cancel it
    running = asyncio.get_running_loop().run_in_executor(None, lambda: context.run(call))
    cancelled: asyncio.CancelledError | None = None
    while not running.done():
        try:
            await asyncio.wait([running])
        except asyncio.CancelledError as exc:
            cancelled = exc
    if cancelled is None:
        return running.result()
    if running.exception() is None:
        undo(running.result())
    raise cancelled
