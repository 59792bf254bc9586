"""The composition root of usage, and nothing else."""

import asyncio
import time
import uuid
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from typing import Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from hostler_common import auth, bus, http, quarantine, service
from hostler_common.health import Health
from hostler_usage import api, messages, pages
from hostler_usage.auditing import audits_api
from hostler_usage.auditing.audit_check_store import AuditCheckStore
from hostler_usage.auditing.audit_jobs import AuditJobs
from hostler_usage.auditing.audit_report_store import AuditReportStore
from hostler_usage.consumer import NotificationConsumer
from hostler_usage.explaining import explain_api
from hostler_usage.explaining.explain_store import ExplainStore
from hostler_usage.exporting import exports_api, focus, reports_api
from hostler_usage.exporting.export_store import ExportStore
from hostler_usage.exporting.exports import Exports
from hostler_usage.feeds import feeds_api, hub_api
from hostler_usage.feeds.callbacks import open_callbacks
from hostler_usage.feeds.feed_store import FeedStore
from hostler_usage.feeds.hub_deliver import FeedJobs
from hostler_usage.feeds.hub_store import HubStore
from hostler_usage.feeds.publish import Publisher
from hostler_usage.feeds.websub import Lease
from hostler_usage.history import rebuild_store
from hostler_usage.history.fold_store import FoldStore
from hostler_usage.history.pace import Pace
from hostler_usage.history.report_store import ReportStore
from hostler_usage.history.retention_jobs import RetentionJobs
from hostler_usage.history.retention_store import RetentionStore
from hostler_usage.history.rollup_store import RollupStore
from hostler_usage.jobs import Jobs
from hostler_usage.metrics import Metrics
from hostler_usage.money import budgets_api, costs_api, price_books_api, project_groups_api
from hostler_usage.money.budget_jobs import BudgetJobs
from hostler_usage.money.costing import Costing
from hostler_usage.money.price_store import PriceStore
from hostler_usage.periods import periods_api
from hostler_usage.periods.period_jobs import PeriodJobs
from hostler_usage.periods.period_store import PeriodStore
from hostler_usage.profiling import operations_api
from hostler_usage.profiling.operation_store import OperationStore
from hostler_usage.reading import import_api, mapping_file
from hostler_usage.reading.normalise import Normaliser
from hostler_usage.settings import OWN, Settings
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
        routers=[
            feeds_api.yagi_root_router,  # "/" for whoever accepts Atom, the overview for everybody else
            api.router,
            audits_api.router,
            explain_api.router,
            periods_api.router,
            exports_api.router,
            operations_api.router,
            price_books_api.router,
            costs_api.router,
            budgets_api.router,
            project_groups_api.router,
            reports_api.router,
            pages.router,
            quarantine.router,
            feeds_api.router,
            hub_api.router,
            import_api.router,
            feeds_api.yagi_router,  # any path that is an event type's name: what is left
        ],
        state=state or {},
        health=health,
        registry=registry,
    )


async def serve(settings: Settings, *, stop: asyncio.Event | None = None) -> None:
    """Run the service until it is told to stop."""
    mapping = mapping_file.load(settings.mapping_file)
    async with service.ServiceProcess(settings, stop=stop) as process:
        pool = await process.open_pool(package=PACKAGE)
        await rebuild_store.warn_of_mapping(pool, mapping.digest)
        own_bus = process.open_bus(messages.TOPOLOGY)
        metrics = Metrics(process.registry)
        store = Store(pool=pool, writer=uuid.uuid4())
        pace = Pace(time.monotonic)
        reports = ReportStore(pool=pool, mapping=mapping)
        normaliser = Normaliser(mapping)
        costing = Costing(reports=reports, prices=PriceStore(pool=pool))
        issuer = focus.Issuer(
            provider=settings.provider,
            publisher=settings.provider,
            invoice_issuer=settings.provider,
            billing_account_id=settings.billing_account,
            billing_account_name=settings.billing_account,
            currency=settings.currency,
        )
        exports = Exports(store=ExportStore(reports=reports), books=costing, issuer=issuer)
        feeds = FeedStore(
            pool=pool,
            page_events=settings.feed_page_events,
            count_conflicts=metrics.conflicts_found,
        )
        hub = HubStore(pool=pool)
        publisher = Publisher(store=feeds, base=settings.public_url)
        kept = quarantine.Quarantine(pool=pool)
        process.relay_outbox(pool, own_bus)

        batch = bus.Batch(size=settings.batch_size, seconds=settings.batch_seconds)
        intakes: dict[str, NotificationConsumer] = {}
        for source in (*settings.sources, settings.own_source):
            consumer = NotificationConsumer(
                source=source,
                normaliser=normaliser,
                store=store,
                metrics=metrics,
                pace=pace,
                batch_size=settings.batch_size,
                max_body_bytes=settings.max_body_bytes,
            )
            if source.name == OWN:
                subscriptions = [(own_bus, messages.EVENTS)]
            elif source.is_own:
                intakes[source.name] = consumer
                subscriptions = [(own_bus, messages.queue(source))]
            else:
                intakes[source.name] = consumer
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
                    prefetch=4 * settings.batch_size,
                )

        jobs = Jobs(
            store=store,
            folds=FoldStore(pool=pool, mapping=mapping),
            rollups=RollupStore(pool=pool, mapping=mapping),
            reports=reports,
            metrics=metrics,
            pace=pace,
            fold_limit=settings.fold_limit,
            months_ahead=settings.months_ahead,
        )
        process.every(settings.fold_seconds, jobs.fold, name="fold")
        audit_reports = AuditReportStore(pool=pool)
        audits = AuditJobs(
            store=AuditCheckStore(
                pool=pool,
                mapping=mapping,
                settle=timedelta(seconds=settings.audit_settle_seconds),
                silent_after=settings.audit_silent_after,
            ),
            reports=audit_reports,
            metrics=metrics,
        )
        callbacks = await process.resources.enter_async_context(
            open_callbacks(settings.hub_callback_networks)
        )
        feed_jobs = FeedJobs(
            feeds=feeds,
            hub=hub,
            publisher=publisher,
            callbacks=callbacks,
            named=auth.verifier(settings).named,
            count=lambda outcome: metrics.hub_outcomes.labels(outcome).inc(),
        )
        settle_feeds = partial(pace.when_quiet, feed_jobs.settle)
        process.every(settings.feed_seconds, settle_feeds, name="feeds")
        process.every(settings.feed_seconds, feed_jobs.verify, name="hub-requests")
        process.every(settings.feed_seconds, feed_jobs.deliver, name="hub-deliveries")
        process.every(60.0, feed_jobs.expire, name="hub-leases")
        process.every(settings.budget_seconds, BudgetJobs(costing=costing).notice, name="budgets")
        if settings.retention_months is not None:
            retention = RetentionJobs(
                store=RetentionStore(pool=pool),
                feeds=feeds,
                retention_months=settings.retention_months,
                dropped_months=metrics.dropped_months,
                dropped_messages=metrics.dropped_messages,
            )
            process.every(6 * 3600.0, retention.drop, name="retention")
        process.every(60.0, audits.check, name="audits")
        process.every(300.0, audits.measure, name="unverified")
        process.every(60.0, jobs.sum_days, name="days")
        periods = PeriodStore(
            pool=pool,
            mapping=mapping,
            time_zone=settings.period_time_zone,
            settle=timedelta(days=settings.period_settle_days),
            kinds=settings.period_kinds,
        )
        period_jobs = PeriodJobs(store=periods)
        process.every(60.0, period_jobs.turn, name="periods")
        process.every(3600.0, period_jobs.forget_keys, name="idempotency")
        process.every(6 * 3600.0, jobs.make_partitions, name="partitions")
        process.every(5.0, jobs.measure, name="measure")

        process.serve_http(
            http_app(
                settings,
                state={
                    "reports": reports,
                    "explanations": ExplainStore(pool=pool, mapping=mapping),
                    "periods": periods,
                    "audit_reports": audit_reports,
                    "costing": costing,
                    "exports": exports,
                    "hub": hub,
                    "importer": import_api.Importer(
                        intakes=intakes,
                        queues={s.name: messages.queue(s).name for s in settings.sources},
                        quarantine=kept,
                    ),
                    "hub_terms": hub_api.HubTerms(
                        lease=Lease(
                            usual=settings.hub_lease_seconds, most=settings.hub_max_lease_seconds
                        ),
                        allowed=settings.hub_callback_networks,
                    ),
                    "publisher": publisher,
                    "operations": OperationStore(pool=pool),
                    "quarantine": kept,
                },
                health=process.health,
                registry=process.registry,
            )
        )
        await process.run()
