"""The composition root of baremetal, and nothing else."""

import asyncio
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from hostler_baremetal import (
    api,
    consumer,
    credentials,
    executor,
    jobs,
    lease_api,
    messages,
    pages,
)
from hostler_baremetal.fleet import Fleet, Pace
from hostler_baremetal.metrics import Metrics
from hostler_baremetal.settings import Settings
from hostler_common import http, quarantine, service
from hostler_common.health import Health
from hostler_common.settings import SettingsError

PACKAGE = "hostler_baremetal"


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
        title="hostler baremetal",
        package=PACKAGE,
        routers=[api.router, lease_api.router, quarantine.router, pages.router],
        state=state or {},
        health=health,
        registry=registry,
    )


async def serve(settings: Settings, *, stop: asyncio.Event | None = None) -> None:
    """Run the service until it is told to stop."""
    async with service.ServiceProcess(settings, stop=stop) as process:
        vault = read_vault(settings)
        pool = await process.open_pool(package=PACKAGE)
        bus = process.open_bus(messages.topology(settings.proxy_host))
        metrics = Metrics(process.registry)
        fleet = Fleet(
            vault,
            Pace(
                timeout_seconds=settings.bmc_timeout_seconds,
                interval_seconds=settings.bmc_interval_seconds,
                linger_seconds=settings.session_linger_seconds,
            ),
            handshake_concurrency=settings.handshake_concurrency,
            metrics=metrics,
        )
        at_work = executor.Executor(pool, fleet, settings, metrics)
        sync = jobs.PowerSync(pool, fleet, settings, metrics, driver=at_work.driver)
        commands = consumer.Commands(pool, settings, at_work.wake)
        periodic = jobs.Jobs(pool, bus, settings, metrics)
        kept = quarantine.Quarantine(pool=pool)
        process.relay_outbox(pool, bus)
        process.consume(
            bus, messages.command_queue(settings.proxy_host), commands.handle, quarantine=kept
        )
        process.spawn(
            executor.drive(
                at_work,
                [fleet.run(), at_work.run(), sync.run()],
                settle_seconds=settings.bmc_timeout_seconds,
            ),
            name="drive",
        )
        process.every(settings.claim_seconds / 3, at_work.renew, name="renew")
        process.every(1.0, periodic.sweep_leases, name="sweep_leases")
        process.every(1.0, periodic.report, name="report")
        process.every(5.0, periodic.count, name="count")
        process.every(3600.0, periodic.forget, name="forget")
        process.serve_http(
            http_app(
                settings,
                state={
                    "pool": pool,
                    "vault": vault,
                    "executor": at_work,
                    "settings": settings,
                    "quarantine": kept,
                },
                health=process.health,
                registry=process.registry,
            )
        )
        await process.run()


def read_vault(settings: Settings) -> credentials.Vault:
    """The vault of the settings' key file.

    Raises:
        SettingsError: the file cannot be read or is wrong.
    """
    try:
        return credentials.Vault.read(settings.credentials_key_file)
    except credentials.KeyFileError as exc:
        raise SettingsError(f"HOSTLER_BAREMETAL_CREDENTIALS_KEY_FILE: {exc}") from exc
