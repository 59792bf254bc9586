"""The composition root of usage, and nothing else."""

import asyncio
import time
import uuid
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from hostler_common import bus, http, quarantine, service
from hostler_common.health import Health
from hostler_usage import api, messages, pages
from hostler_usage.consumer import NotificationConsumer
from hostler_usage.jobs import Jobs
from hostler_usage.metrics import Metrics
from hostler_usage.pace import Pace
from hostler_usage.report_store import ReportStore
from hostler_usage.settings import Settings
from hostler_usage.store import Store

PACKAGE = "hostler_usage"


def http_app(
    settings: Settings,
    *,
    state: Mapping[str, Any] | None = None,
    health: Health | None = None,
    registry: CollectorRegistry | None = None,
) -> FastAPI:
    """The HTTP application; without a state it can only be described, not served."""
    return http.create_app(
        settings,
        title="hostler usage",
        package=PACKAGE,
        routers=[api.router, pages.router, quarantine.router],
        state=state or {},
        health=health,
        registry=registry,
    )


async def serve(settings: Settings, *, stop: asyncio.Event | None = None) -> None:
    """Run the service until it is told to stop."""
    async with service.ServiceProcess(settings, stop=stop) as process:
        pool = await process.open_pool(package=PACKAGE)
        own_bus = process.open_bus(messages.TOPOLOGY)
        metrics = Metrics(process.registry)
        store = Store(pool=pool, writer=uuid.uuid4())
        pace = Pace(time.monotonic)
        reports = ReportStore(pool=pool)
        kept = quarantine.Quarantine(pool=pool)
        process.relay_outbox(pool, own_bus)

        batch = bus.Batch(size=settings.batch_size, seconds=settings.batch_seconds)
        for source in settings.sources:
            consumer = NotificationConsumer(
                source=source,
                store=store,
                metrics=metrics,
                pace=pace,
                batch_size=settings.batch_size,
                max_body_bytes=settings.max_body_bytes,
            )
            subscriptions = [(own_bus, messages.queue(source))]
            if not source.is_own:
                cloud_bus = process.open_bus(
                    messages.cloud_topology(source),
                    name=source.name,
                    url=source.address(settings.amqp_url),
                )
                subscriptions = [
                    (cloud_bus, messages.queue(source)),
                    (own_bus, messages.replay_queue(source)),
                ]
            for a_bus, queue in subscriptions:
                process.consume(
                    a_bus,
                    queue,
                    consumer.handle,
                    quarantine=kept,
                    batch=batch,
                    prefetch=3 * settings.batch_size,
                )

        jobs = Jobs(
            store=store,
            reports=reports,
            metrics=metrics,
            pace=pace,
            fold_limit=settings.fold_limit,
            months_ahead=settings.months_ahead,
        )
        process.every(settings.fold_seconds, jobs.fold, name="fold")
        process.every(6 * 3600.0, jobs.make_partitions, name="partitions")
        process.every(5.0, jobs.measure, name="measure")

        process.serve_http(
            http_app(
                settings,
                state={"reports": reports, "quarantine": kept},
                health=process.health,
                registry=process.registry,
            )
        )
        await process.run()
