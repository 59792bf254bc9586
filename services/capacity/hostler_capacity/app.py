"""The composition root of capacity, and nothing else."""

import asyncio
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from hostler_capacity import api, claim_api, consumer, jobs, messages, pages
from hostler_capacity.fleet import FleetView
from hostler_capacity.ledger import Ledger
from hostler_capacity.metrics import Metrics
from hostler_capacity.report_store import Policy
from hostler_capacity.settings import Settings
from hostler_common import http, quarantine, service
from hostler_common.health import Health

PACKAGE = "hostler_capacity"


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
        title="hostler capacity",
        package=PACKAGE,
        routers=[api.router, claim_api.router, quarantine.router, pages.router],
        state=state or {},
        health=health,
        registry=registry,
    )


async def serve(settings: Settings, *, stop: asyncio.Event | None = None) -> None:
    """Run the service until it is told to stop."""
    async with service.ServiceProcess(settings, stop=stop) as process:
        pool = await process.open_pool(package=PACKAGE)
        bus = process.open_bus(messages.TOPOLOGY)
        metrics = Metrics(process.registry)
        catalogue, stale = settings.catalogue, timedelta(seconds=settings.stale_seconds)
        view = FleetView(
            pool, catalogue=catalogue, stale_seconds=settings.stale_seconds, metrics=metrics
        )
        await view.refresh()
        ledger = Ledger(pool, view, catalogue=catalogue, stale=stale, metrics=metrics)
        policy = Policy(catalogue=catalogue, ratios=settings.ratios, stale=stale)
        reports = consumer.ReportConsumer(pool, policy, metrics)
        kept = quarantine.Quarantine(pool=pool)
        process.relay_outbox(pool, bus)
        process.consume(bus, messages.HOST_REPORTS, reports.on_host_reported, quarantine=kept)
        process.every(settings.refresh_seconds, jobs.refresh(view), name="refresh")
        process.every(settings.sweep_seconds, jobs.sweep(ledger), name="sweep")
        process.every(settings.audit_seconds, jobs.audit(ledger), name="audit")
        process.every(jobs.FORGET_SECONDS, jobs.forget_old_keys(pool), name="forget_old_keys")
        process.serve_http(
            http_app(
                settings,
                state={
                    "pool": pool,
                    "view": view,
                    "ledger": ledger,
                    "catalogue": catalogue,
                    "settings": settings,
                    "quarantine": kept,
                },
                health=process.health,
                registry=process.registry,
            )
        )
        await process.run()
