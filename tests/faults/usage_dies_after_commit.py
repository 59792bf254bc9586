"""The usage service with one fault: it kills itself between a batch's commit and its ack.

Run as a process of its own; its settings come from the environment, as always.
"""

import os
import signal
from collections.abc import Sequence

from hostler_common import runtime, settings
from hostler_usage import app
from hostler_usage.reading.event import Event, Tally
from hostler_usage.settings import Settings
from hostler_usage.store import Store

ingest = Store.ingest


async def ingest_and_die(self: Store, events: Sequence[Event]) -> Tally:
    """Store the events, durably, and never come back."""
    await ingest(self, events)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


if __name__ == "__main__":
    Store.ingest = ingest_and_die  # type: ignore[method-assign]  # this is the fault
    runtime.main(app.serve(settings.load(Settings)), service="usage")
