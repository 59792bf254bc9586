"""A small real service, for tests that need a process of its own: it is what every service's app.py is, and no more.

`HOSTLER_EXAMPLE_FAULT` says what goes wrong with it; `HOSTLER_EXAMPLE_GATE` is a file that its handler waits for.
"""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from fastapi import APIRouter, Depends, FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from hostler_common import (
    auth,
    bus,
    cli,
    db,
    errors,
    http,
    logs,
    outbox,
    quarantine,
    service,
    settings,
)

PACKAGE = "hostler_example"
log = logs.get(__name__)


class Settings(settings.Settings):
    """The example's settings."""

    service: ClassVar[str] = "example"

    ratio: float = Field(1.0, gt=0)
    fault: Literal["none", "loop", "task", "unavailable"] = "none"
    gate: Path | None = None


class ThingMade(BaseModel):
    """The event that answers a message."""

    message_id: str


THING_MADE = bus.EventType(
    routing_key="example.thing.made", model=ThingMade, summary="A thing was made"
)
WORK = bus.Queue(
    name="example.work", bindings=(bus.Binding(exchange=bus.HOSTLER, routing_key="work.#"),)
)
TOPOLOGY = bus.Topology(queues=(WORK,), publishes=(THING_MADE,))

router = APIRouter(prefix="/v1/events", dependencies=[Depends(auth.public)])


@router.get("")
async def listen() -> StreamingResponse:
    """Events without an end."""

    async def events() -> Any:
        yield "data: first\n\n"
        await asyncio.Event().wait()

    return StreamingResponse(events(), media_type="text/event-stream")


def http_app(loaded: Settings, state: Mapping[str, Any] | None = None, **more: Any) -> FastAPI:
    """The HTTP application."""
    return http.create_app(
        loaded,
        title="hostler example",
        package=PACKAGE,
        routers=[router, quarantine.router],
        state=state or {},
        **more,
    )


async def serve(loaded: Settings, *, stop: asyncio.Event | None = None) -> None:
    """Run until stopped."""
    async with service.ServiceProcess(loaded, stop=stop) as process:
        pool = await process.open_pool(package=PACKAGE)
        broker = process.open_bus(TOPOLOGY)
        kept = quarantine.Quarantine(pool=pool)

        async def handle(delivery: bus.Delivery) -> None:
            log.info("handling", message_id=delivery.message_id)
            while loaded.gate is not None and not loaded.gate.exists():  # noqa: ASYNC110  another process makes the file
                await asyncio.sleep(0.02)
            message_id = delivery.message_id or ""
            async with db.transaction(pool) as connection:
                await connection.execute(
                    "INSERT INTO handled VALUES ($1, $2)", message_id, delivery.body
                )
                event = THING_MADE.message(ThingMade(message_id=message_id), app_id="example")
                await outbox.add(connection, [event])
            log.info("handled", message_id=message_id)

        async def turn() -> None:
            if loaded.fault == "loop":
                raise LookupError("the loop broke, with postgresql://me:hunter2@db/x")
            if loaded.fault == "unavailable":
                raise errors.Unavailable("a server is away")

        async def work() -> None:
            if loaded.fault == "task":
                raise LookupError("the task broke")

        process.relay_outbox(pool, broker)
        process.consume(broker, WORK, handle, quarantine=kept)
        process.every(0.2, turn, name="turn")
        process.spawn(work(), name="work")
        process.serve_http(
            http_app(
                loaded, {"quarantine": kept}, health=process.health, registry=process.registry
            )
        )
        await process.run()


main = cli.service(Settings, serve, http_app, package=PACKAGE)

if __name__ == "__main__":
    main()
