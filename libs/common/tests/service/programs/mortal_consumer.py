"""A consumer that kills itself with SIGKILL between the commit and the ack of the message ``fatal``, once.

`HOSTLER_MORTAL_OMEN` is the file that it leaves before it dies, and that keeps it alive afterwards.
"""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from hostler_common import bus, db, quarantine, runtime, service, settings

WORK = bus.Queue(
    name="mortal.work", bindings=(bus.Binding(exchange=bus.HOSTLER, routing_key="work.#"),)
)


class Settings(settings.Settings):
    """The consumer's settings."""

    service: ClassVar[str] = "mortal"

    omen: Path
    batched: bool = False


async def serve(loaded: Settings) -> None:
    """Consume until stopped, or dead."""
    async with service.ServiceProcess(loaded) as process:
        pool = await process.open_pool(package="hostler_example")

        async def handle(deliveries: Sequence[bus.Delivery]) -> None:
            async with db.transaction(pool) as connection:
                for each in deliveries:
                    await connection.execute(
                        "INSERT INTO handled VALUES ($1, $2) ON CONFLICT (message_id) DO NOTHING",
                        each.message_id,
                        each.body,
                    )
                    await connection.execute(
                        "INSERT INTO handover (message_id) VALUES ($1)", each.message_id
                    )
            fatal = any(each.body == b"fatal" for each in deliveries)
            if fatal and not loaded.omen.exists():
                loaded.omen.touch()
                os.kill(os.getpid(), signal.SIGKILL)

        async def handle_one(delivery: bus.Delivery) -> None:
            await handle([delivery])

        process.consume(
            process.open_bus(bus.Topology(queues=(WORK,))),
            WORK,
            handle if loaded.batched else handle_one,
            quarantine=quarantine.Quarantine(pool=pool),
            batch=bus.Batch(size=10, seconds=0.05) if loaded.batched else None,
        )
        await process.run()


if __name__ == "__main__":
    sys.exit(runtime.main(serve(settings.load(Settings)), service="mortal"))
