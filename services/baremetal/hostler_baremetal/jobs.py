"""Periodic work: looking at every node's power, ending leases, telling capacity what there is.

Looks are spread: each node has its own next time, jittered, later the longer its BMC does not
answer. Replicas share them; a replica takes a node together with the right to talk to its BMC.

Invariants: a node whose BMC did not answer is `unknown`, never off; a BMC that refused our
credentials is not asked again; a whole report always tells all nodes, as of one moment.
"""

import asyncio
import datetime
import random
import uuid
from typing import Final

from hostler_baremetal import (
    errors,
    executor,
    leases,
    messages,
    operation_store,
    power,
    store,
)
from hostler_baremetal.fleet import Fleet, Urgency
from hostler_baremetal.metrics import Metrics
from hostler_baremetal.node import Node
from hostler_baremetal.settings import Settings
from hostler_common import bus, db, hosts, idempotency, logs, outbox
from hostler_common import errors as common_errors

log = logs.get(__name__)

_JITTER: Final = 0.25
_CLAIM_EACH: Final = 1.0


class PowerSync:
    """Keeps what is known of every node's power fresh."""

    def __init__(
        self,
        pool: db.Pool,
        fleet: Fleet,
        settings: Settings,
        metrics: Metrics,
        *,
        driver: uuid.UUID,
    ) -> None:
        self._pool = pool
        self._fleet = fleet
        self._settings = settings
        self._metrics = metrics
        self._driver = driver
        self._looking: set[uuid.UUID] = set()

    async def run(self) -> None:
        """Looks at nodes as they fall due until cancelled."""
        failing = False
        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    await self._look_at_due(group)
                    failing = False
                except common_errors.Unavailable as exc:
                    if not failing:
                        log.warning("power_sync_waits", code=exc.code)
                    failing = True
                pause = min(_CLAIM_EACH, self._settings.poll_seconds)
                await asyncio.sleep(_jittered(pause))

    async def _look_at_due(self, group: asyncio.TaskGroup) -> None:
        room = self._settings.poll_concurrency - len(self._looking)
        if room <= 0:
            return
        async with db.transaction(self._pool) as connection:
            nodes = await operation_store.claim_polls(
                connection, self._driver, seconds=self._settings.claim_seconds, limit=room
            )
        for node in nodes:
            if node.id not in self._looking:
                self._looking.add(node.id)
                group.create_task(self._look(node), name=f"look at {node.name}")

    async def _look(self, node: Node) -> None:
        outcome = "lost"
        try:
            outcome = await self._look_at(node)
        except common_errors.Unavailable as exc:
            log.info("look_not_written", node=node.name, code=exc.code)
        finally:
            self._looking.discard(node.id)
            self._metrics.polls.labels(outcome).inc()

    async def _look_at(self, node: Node) -> str:
        """Looks at a node and writes what it saw. Raises DatabaseUnavailable."""
        observed_at = datetime.datetime.now(datetime.UTC)
        try:
            reading = await self._fleet.read_power(node, urgency=Urgency.LOOK)
        except errors.BmcAuthenticationFailed as exc:
            await executor.latch(self._pool, node, exc.detail)
            return "authentication_failed"
        except (errors.BmcUnreachable, errors.BmcRefused, errors.CredentialsUnreadable) as exc:
            if node.poll_failures == 0:
                log.warning("bmc_lost", node=node.name, code=exc.code, detail=exc.detail)
            async with db.transaction(self._pool) as connection:
                await operation_store.not_observed(
                    connection,
                    node.id,
                    reason=exc.detail,
                    next_poll_seconds=self._after_failures(node.poll_failures + 1),
                )
            return "failed"
        if node.poll_failures:
            log.info("bmc_recovered", node=node.name, failures=node.poll_failures)
        async with db.transaction(self._pool) as connection:
            before = await operation_store.observed(
                connection,
                node.id,
                reading.state,
                observed_at=observed_at,
                working_suite=reading.suite,
                next_poll_seconds=_jittered(self._settings.poll_seconds),
            )
            if before is None or not power.is_drift(before.node.last_power_state, reading.state):
                return "ok"
            assert before.node.last_power_state is not None
            event = messages.PowerDrifted(
                node_uuid=node.id,
                name=node.name,
                before=before.node.last_power_state,
                after=reading.state,
                observed_at=observed_at,
                last_operation_id=before.last_operation_id,
            )
            await outbox.add(
                connection, [messages.POWER_DRIFTED.message(event, app_id=messages.APP_ID)]
            )
        self._metrics.drifts.inc()
        log.warning("power_drifted", node=node.name, before=event.before, after=event.after)
        return "drifted"

    def _after_failures(self, failures: int) -> float:
        longest = self._settings.poll_backoff_max_seconds
        return _jittered(min(self._settings.poll_seconds * 2.0 ** min(failures, 16), longest))


def _jittered(seconds: float) -> float:
    return seconds * random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311  # spreads load, hides nothing


class Jobs:
    """What happens every so often."""

    def __init__(
        self, pool: db.Pool, opened: bus.Bus, settings: Settings, metrics: Metrics
    ) -> None:
        self._pool = pool
        self._bus = opened
        self._settings = settings
        self._metrics = metrics

    async def sweep_leases(self) -> None:
        """Ends the leases that have run out, each with its event. Raises DatabaseUnavailable."""
        async with db.transaction(self._pool) as connection:
            await leases.end_expired(connection)

    async def report(self) -> None:
        """Tells capacity of all nodes, if something changed or it is time to.

        One replica at a time, so that an older report never follows a newer one.
        Raises DatabaseUnavailable or BrokerUnavailable.
        """
        async with db.singleton(self._pool, "baremetal.report") as is_ours:
            if not is_ours:
                return
            async with (
                db.connection(self._pool) as connection,
                connection.transaction(isolation="repeatable_read", readonly=True),
            ):
                inventory = await store.inventory_due(
                    connection, every_seconds=self._settings.report_seconds
                )
            if inventory is None:
                return
            host = self._settings.proxy_host
            parts = hosts.split(
                host=host,
                reported_at=inventory.taken_at,
                report_id=uuid.uuid4(),
                nodes=[record_of(node) for node in inventory.nodes],
            )
            await self._bus.publish_many(
                [
                    hosts.HOST_REPORTED.message(part, app_id=messages.APP_ID, host=host)
                    for part in parts
                ]
            )
            async with db.transaction(self._pool) as connection:
                await store.inventory_reported(connection, inventory)

    async def count(self) -> None:
        """Brings the gauges up to date. Raises DatabaseUnavailable."""
        async with db.connection(self._pool) as connection:
            self._metrics.fleet(await store.count(connection))

    async def forget(self) -> None:
        """Drops what is older than it is kept. Raises DatabaseUnavailable."""
        async with db.transaction(self._pool) as connection:
            await operation_store.forget_old(
                connection, keep_days=self._settings.operation_keep_days
            )
        await idempotency.forget_old(self._pool)


def record_of(node: Node) -> hosts.NodeRecord:
    """Returns what capacity is told of a node: under a lease, all of it is used."""
    hardware = node.hardware
    is_taken = node.lease is not None
    return hosts.NodeRecord(
        hypervisor_hostname=node.name,
        node_uuid=node.id,
        hypervisor_type="baremetal",
        memory_mb=hardware.memory_mb,
        memory_mb_used=hardware.memory_mb if is_taken else 0,
        vcpus=hardware.vcpus,
        vcpus_used=hardware.vcpus if is_taken else 0,
        local_gb=hardware.local_gb,
        local_gb_used=hardware.local_gb if is_taken else 0,
        cpu_arch=hardware.cpu_arch,
        cpu_info="baremetal cpu",
        extra_specs=dict(hardware.extra_specs) or None,
        zone=hardware.zone,
        disabled=node.maintenance,
        state=node.state,
        traits=list(hardware.traits),
    )
