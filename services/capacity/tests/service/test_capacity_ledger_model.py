"""Any sequence of reports and steps of claims, against a model of a few lines, on a real database."""

import asyncio
import contextlib
import uuid
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from prometheus_client import CollectorRegistry

from hostler_capacity import claim_store, inventory, overhead, report_store
from hostler_capacity.claim import ClaimId, State
from hostler_capacity.claim_store import Order
from hostler_capacity.flavor import Flavor
from hostler_capacity.fleet import FleetView
from hostler_capacity.inventory import Guest, ReportedNode
from hostler_capacity.ledger import Ledger, NoRoom, NotHeld, Replay, Wish
from hostler_capacity.metrics import Metrics
from hostler_capacity.report import Part
from hostler_capacity.report_store import Policy
from hostler_capacity.resources import DISK_GB, MEMORY_MB, VCPUS
from hostler_common import db

HOSTS = ("hv1", "hv2")
POLICY = Policy(catalogue=overhead.shipped(), ratios=inventory.Ratios(), stale=timedelta(hours=1))
SIZES = {"small": 900, "large": 3900}
COST = {name: size + 2 + (size + 127) // 128 + 1 + 1 for name, size in SIZES.items()}
"""On Xen, one vCPU: 2 + ceil(1 + memory / 128) + ceil(38 / 256), as xapi-exact-2026 has it."""


class Machine(RuleBasedStateMachine):
    """The ledger, driven by hypothesis; `url` is set by the test.

    Claims are picked in the order in which they were made: their ids are random, and an order by id would let the
    same choices of hypothesis mean another claim when it replays them.
    """

    url = ""

    @initialize()
    def begin(self) -> None:
        self.runner = asyncio.Runner()
        self.stack = contextlib.AsyncExitStack()
        self.clock = datetime.now(UTC) - timedelta(minutes=30)
        self.limit: dict[str, int] = {}
        self.foreign: dict[str, int] = {}
        self.claims: dict[ClaimId, tuple[str, str, State, uuid.UUID]] = {}
        self.keys: dict[str, tuple[Wish, ClaimId]] = {}
        self.runner.run(self._open())
        for host in HOSTS:
            self.report(host=host, memory_mb=8000, strangers=0, list_ours=False)

    async def _open(self) -> None:
        self.pool = await self.stack.enter_async_context(
            db.open_pool(self.url, schema="capacity", max_size=3)
        )
        async with db.transaction(self.pool) as connection:
            await connection.execute(
                "TRUNCATE claim, inventory, node, host, idempotency_key, outbox"
            )
        metrics = Metrics(CollectorRegistry())
        view = FleetView(
            self.pool, catalogue=POLICY.catalogue, stale_seconds=3600, metrics=metrics
        )
        self.ledger = Ledger(
            self.pool, view, catalogue=POLICY.catalogue, stale=POLICY.stale, metrics=metrics
        )

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            self.runner.run(self.stack.aclose())
            self.runner.close()

    def live(self, host: str) -> list[tuple[str, uuid.UUID]]:
        return [
            (size, consumer)
            for where, size, state, consumer in self.claims.values()
            if where == host and state in (State.HELD, State.CONFIRMED)
        ]

    def free(self, host: str) -> int:
        claimed = sum(COST[size] for size, _ in self.live(host))
        return self.limit[host] - claimed - self.foreign[host]

    @rule(
        host=st.sampled_from(HOSTS),
        memory_mb=st.sampled_from([2000, 8000, 12000]),
        strangers=st.integers(0, 3),
        list_ours=st.sampled_from([True, True, False]),
    )
    def report(self, host: str, memory_mb: int, strangers: int, list_ours: bool) -> None:
        """The host reports its memory, guests of others, and those of ours that run."""
        self.clock += timedelta(seconds=1)
        ours = [each for each in self.live(host) if list_ours]
        guests = [
            Guest(uuid=consumer, memory_mb=SIZES[size], vcpus=1) for size, consumer in ours
        ] + [Guest(uuid=uuid.uuid4(), memory_mb=SIZES["small"], vcpus=1)] * strangers
        node = ReportedNode(
            hypervisor_hostname=host,
            node_uuid=None,
            hypervisor_type="xen",
            bare_metal=False,
            total={MEMORY_MB: memory_mb, VCPUS: 1000, DISK_GB: 0},
            reserved={},
            used={MEMORY_MB: 0, VCPUS: 0, DISK_GB: 0},
            guests=guests,
            disabled=False,
            available=True,
            state=None,
            zone=None,
        )
        part = Part(
            host=host,
            report_id=uuid.uuid4(),
            reported_at=self.clock,
            part=1,
            parts=1,
            nodes=[node],
        )

        async def record() -> int:
            async with db.transaction(self.pool) as connection:
                return len((await report_store.record(connection, part, POLICY)).confirmed)

        confirmed = self.runner.run(record())
        self.limit[host] = memory_mb
        self.foreign[host] = COST["small"] * strangers
        running = {consumer for _, consumer in ours}
        newly = [
            claim_id
            for claim_id, (where, _, state, consumer) in self.claims.items()
            if where == host and state is State.HELD and consumer in running
        ]
        assert confirmed == len(newly)
        for claim_id in newly:
            where, size, _, consumer = self.claims[claim_id]
            self.claims[claim_id] = (where, size, State.CONFIRMED, consumer)

    @rule(size=st.sampled_from(sorted(SIZES)), host=st.none() | st.sampled_from(HOSTS))
    def claim(self, size: str, host: str | None) -> None:
        """A claim is granted exactly if a host that was asked has room."""
        self._claim(self._wish(size, host), size, replay=None)

    @rule(size=st.sampled_from(sorted(SIZES)))
    def claim_with_key(self, size: str) -> None:
        key = str(uuid.uuid4())
        wish = self._wish(size, None)
        granted = self._claim(wish, size, Replay(key=key, caller="me", request=size))
        if granted is not None:
            self.keys[key] = (wish, granted)

    @rule(data=st.data())
    def replay(self, data: st.DataObject) -> None:
        """A request sent again is answered with the claim it made, whatever became of it."""
        if not self.keys:
            return
        key = data.draw(st.sampled_from(list(self.keys)))
        wish, claim_id = self.keys[key]
        size = self.claims[claim_id][1]
        again = self.runner.run(
            self.ledger.grant(wish, Replay(key=key, caller="me", request=size))
        )
        assert (again.id, again.state) == (claim_id, self.claims[claim_id][2])

    def _wish(self, size: str, host: str | None) -> Wish:
        order = Order(
            claim_id=ClaimId(uuid.uuid4()),
            consumer_id=uuid.uuid4(),
            project_id="p",
            flavor=size,
            ttl=timedelta(hours=1),
        )
        return Wish(
            order=order, flavor=Flavor(name=size, memory_mb=SIZES[size], vcpus=1), host=host
        )

    def _claim(self, wish: Wish, size: str, replay: Replay | None) -> ClaimId | None:
        asked = HOSTS if wish.host is None else (wish.host,)
        has_room = any(self.free(each) >= COST[size] for each in asked)
        try:
            granted = self.runner.run(self.ledger.grant(wish, replay))
        except NoRoom:
            assert not has_room
            return None
        assert has_room
        assert granted.host in asked
        assert self.free(granted.host) >= COST[size]
        self.claims[granted.id] = (granted.host, size, State.HELD, granted.consumer_id)
        return granted.id

    @rule(data=st.data())
    def confirm(self, data: st.DataObject) -> None:
        if not self.claims:
            return
        claim_id = data.draw(st.sampled_from(list(self.claims)))
        host, size, state, consumer = self.claims[claim_id]
        if state in (State.RELEASED, State.EXPIRED):
            with pytest.raises(NotHeld):
                self.runner.run(self.ledger.confirm(claim_id, None))
        else:
            assert self.runner.run(self.ledger.confirm(claim_id, None)).state is State.CONFIRMED
            self.claims[claim_id] = (host, size, State.CONFIRMED, consumer)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if not self.claims:
            return
        claim_id = data.draw(st.sampled_from(list(self.claims)))
        host, size, state, consumer = self.claims[claim_id]
        ended = State.EXPIRED if state is State.EXPIRED else State.RELEASED
        assert self.runner.run(self.ledger.release(claim_id, None)).state is ended
        self.claims[claim_id] = (host, size, ended, consumer)

    @rule()
    def time_passes(self) -> None:
        """Every claim that nobody has confirmed so far expires."""

        async def pass_time() -> int:
            async with db.transaction(self.pool) as connection:
                await connection.execute(
                    "UPDATE claim SET expires_at = now() WHERE state = 'held'"
                )
            return await self.ledger.sweep()

        held = [each for each in self.claims.items() if each[1][2] is State.HELD]
        assert self.runner.run(pass_time()) == len(held)
        for claim_id, (host, size, _, consumer) in held:
            self.claims[claim_id] = (host, size, State.EXPIRED, consumer)

    @invariant()
    def counters_are_the_models(self) -> None:
        """The counters are the sums of the claims, and the model's."""
        if not hasattr(self, "runner"):
            return

        async def read() -> list[asyncpg.Record]:
            async with db.connection(self.pool) as connection:
                assert await claim_store.imbalances(connection) == []
                return await connection.fetch(
                    "SELECT host, capacity, claimed, foreign_used FROM node JOIN inventory"
                    " ON node_id = id WHERE resource_class = 'memory_mb'"
                )

        for row in self.runner.run(read()):
            host = row["host"]
            assert row["capacity"] == self.limit[host]
            assert row["claimed"] == sum(COST[size] for size, _ in self.live(host))
            assert row["foreign_used"] == self.foreign[host]


def test_any_history_of_reports_and_claims_keeps_the_books(database_url: str) -> None:
    asyncio.run(db.migrate(database_url, schema="capacity", package="hostler_capacity"))
    Machine.url = database_url
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=25,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
