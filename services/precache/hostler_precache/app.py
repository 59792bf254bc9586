"""The composition root of precache, and nothing else."""

import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import aiohttp
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from starlette.staticfiles import StaticFiles

from hostler_common import http, quarantine, service
from hostler_common.health import Health
from hostler_common.settings import SettingsError
from hostler_precache import api, clock_store, messages, pages
from hostler_precache.distribution import distributions_api, endings, history_jobs, policies_api
from hostler_precache.distribution.distribution_store import DistributionStore
from hostler_precache.distribution.efficiency import Efficiency
from hostler_precache.distribution.history_store import HistoryStore
from hostler_precache.distribution.looks import Looks
from hostler_precache.distribution.policy_store import PolicyStore
from hostler_precache.distribution.rollout_jobs import Rollouts
from hostler_precache.jobs import FORGET_SECONDS, LONGEST_RETRY_SECONDS, Pipeline
from hostler_precache.metrics import Metrics
from hostler_precache.settings import Settings
from hostler_precache.sources import cloud, glance_events, plugins
from hostler_precache.sources.plugins import Plugins, SeedSite, Server
from hostler_precache.store import Store
from hostler_precache.swarming import agent_api, garbage
from hostler_precache.swarming.desires import Desires
from hostler_precache.swarming.growths import Growths
from hostler_precache.swarming.reports import Reports
from hostler_precache.swarming.swarm_store import SwarmStore
from hostler_precache.swarming.tracker import Tracker
from hostler_precache.transfer import tls
from hostler_precache.transfer.blobs import BlobServer
from hostler_precache.transfer.replica_store import ReplicaStore
from hostler_precache.transfer.replicas import BEAT_SECONDS, Replicas
from hostler_precache.transfer.seed import Seed

PACKAGE = "hostler_precache"


def http_app(
    settings: Settings,
    *,
    state: Mapping[str, Any] | None = None,
    health: Health | None = None,
    registry: CollectorRegistry | None = None,
) -> FastAPI:
    """The HTTP application; without a state it can only be described, not served."""
    made = http.create_app(
        settings,
        title="hostler precache",
        package=PACKAGE,
        routers=[
            agent_api.direct_router,  # asked thousands of times a second: found first
            api.router,
            distributions_api.router,
            policies_api.router,
            agent_api.router,
            quarantine.router,
            pages.router,
        ],
        state=state or {},
        health=health,
        registry=registry,
    )
    made.mount("/static/precache", StaticFiles(packages=[(PACKAGE, "static")]))
    return made


async def serve(settings: Settings, *, stop: asyncio.Event | None = None) -> None:
    """Run the service until it is told to stop."""
    # what the stack holds is closed after the process has drained and ended its tasks
    async with AsyncExitStack() as stack, service.ServiceProcess(settings, stop=stop) as process:
        pool = await process.open_pool(package=PACKAGE)
        bus = process.open_bus(messages.topology(durable_fanout=settings.transient_quorum_queue))
        metrics = Metrics(process.registry)
        store, distributions = Store(pool), DistributionStore(pool)
        swarms, policies = SwarmStore(pool), PolicyStore(pool)
        tracker = Tracker(
            swarms,
            member_seconds=settings.member_seconds,
            cluster_bytes_per_second=settings.cluster_bytes_per_second,
        )
        efficiency = Efficiency(
            distributions,
            seed_bytes_per_second=settings.link_bytes_per_second,
            cluster_bytes_per_second=settings.cluster_bytes_per_second,
            over_bound=metrics.over_bound,
        )
        reports = Reports(store, distributions, swarms, on_done=efficiency.done)
        desires = Desires(swarms)
        session = await stack.enter_async_context(aiohttp.ClientSession())
        surroundings = cloud.surroundings(settings, session)
        server = BlobServer(slots=settings.upload_slots, on_sent=metrics.seed_sent_bytes.inc)
        seed = Seed(
            name=settings.seed_id,
            url=await stack.enter_async_context(_seed_server(server, settings).serving()),
            directory=settings.data_dir,
            server=server,
        )
        stack.callback(seed.close)
        replicas = Replicas(
            seed=seed,
            store=store,
            replicas=ReplicaStore(pool),
            tracking=tracker,
            silent_seconds=settings.seed_silent_seconds,
        )
        pipeline = Pipeline(
            settings=settings,
            store=store,
            distributions=distributions,
            swarms=swarms,
            tracking=tracker,
            policies=policies,
            seed=seed,
            replicas=replicas,
            plugins=Plugins(surroundings),
            metrics=metrics,
        )
        kept = quarantine.Quarantine(pool=pool)
        if settings.glance_amqp_url is not None:
            glance_events.listen(
                process,
                bus,
                settings.glance_amqp_url,
                durable_exchange=settings.glance_exchange_durable,
                quarantine=kept,
                consumer=glance_events.GlanceConsumer(
                    policies_due=policies.run_lister_now, image_deleted=pipeline.image_deleted
                ),
            )
        process.relay_outbox(pool, bus)
        process.spawn(reports.run(), name="reports")
        process.spawn(desires.run(), name="desires")
        process.every(1.0, tracker.refresh, name="swarms")
        collector = stack.enter_context(garbage.by_the_clock())
        process.every(garbage.YOUNG_SECONDS, collector.collect, name="garbage")
        process.spawn(pipeline.fetch_forever(), name="fetch")
        rollouts = Rollouts(
            settings=settings,
            store=store,
            distributions=distributions,
            swarms=swarms,
            tracking=tracker,
            on_done=efficiency.done,
        )
        process.every(1.0, rollouts.advance, name="rollouts")
        process.every(1.0, partial(endings.tell, distributions), name="endings")
        process.spawn(pipeline.run_policies_forever(), name="policies")
        process.every(BEAT_SECONDS, replicas.turn, name="replicas")
        process.every(60.0, pipeline.retire, name="retire")
        process.every(0.5, pipeline.tell_sent, name="tell_sent")
        process.every(10.0, pipeline.count, name="count")
        process.every(10.0, efficiency.turn, name="efficiency")
        history = history_jobs.History(
            HistoryStore(pool),
            store=store,
            distributions=distributions,
            swarms=swarms,
            on_done=efficiency.done,
            days=settings.history_days,
        )
        process.every(history_jobs.EVERY_SECONDS, history.forget, name="history")
        process.every(FORGET_SECONDS, pipeline.forget_old_keys, name="forget_old_keys")
        clock = clock_store.ClockStore(
            pool, longest_lease_seconds=max(LONGEST_RETRY_SECONDS, settings.lease_seconds)
        )
        process.every(clock_store.EVERY_SECONDS, clock.put_right, name="clock")
        state = {
            "store": store,
            "distributions": distributions,
            "efficiency": efficiency,
            "looks": Looks(
                distributions,
                seed_bytes_per_second=settings.link_bytes_per_second,
                cluster_bytes_per_second=settings.cluster_bytes_per_second,
            ),
            "swarms": swarms,
            "policies": policies,
            "tracker": tracker,
            "growths": Growths(store),
            "desires": desires,
            "reports": reports,
            "settings": settings,
            "quarantine": kept,
        }
        process.serve_http(
            http_app(settings, state=state, health=process.health, registry=process.registry)
        )
        await process.run()


def _seed_server(server: BlobServer, settings: Settings) -> Server:
    """What sends the pieces that are in `server`.

    Raises:
        SettingsError: no server of the configured name is installed, or it is of no use, or a
            certificate is wrong.
    """
    contexts = tls.load(
        settings.peer_certificate_file, settings.peer_key_file, settings.peer_ca_file
    )
    site = SeedSite(
        directory=settings.data_dir,
        blobs=server,
        host=settings.http_host,
        port=settings.blob_port,
        url=settings.seed_url,
        tls=contexts.server if contexts else None,
        drain_seconds=settings.drain_seconds,
    )
    try:
        return plugins.server(settings.server, site)
    except (plugins.UnknownPluginError, plugins.BrokenPluginError) as exc:
        raise SettingsError(f"HOSTLER_PRECACHE_SERVER: {exc}") from exc
