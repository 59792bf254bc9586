"""What only the database can promise."""

import asyncio
import datetime
import uuid
from collections.abc import AsyncIterator

import pytest

from hostler_baremetal import errors, operation_store, store
from hostler_baremetal.node import Access, Hardware, Lease, Node, Operation
from hostler_baremetal.operation_store import Superseded
from hostler_baremetal.power import OperationState, PowerState
from hostler_common import db
from hostler_common.testing import eventually

US, THEM = uuid.uuid4(), uuid.uuid4()


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[db.Pool]:
    await db.migrate(database_url, schema="baremetal", package="hostler_baremetal")
    async with db.open_pool(database_url, schema="baremetal") as opened:
        yield opened


async def enrol(pool: db.Pool, name: str = "n") -> Node:
    new = store.NewNode(
        name=name,
        hardware=Hardware(
            memory_mb=1, vcpus=1, local_gb=1, cpu_arch=None, zone=None, traits=(), extra_specs={}
        ),
        access=Access(
            address=f"ipmi://{name}:623",
            username="u",
            sealed_password=b"x",
            sealed_group_key=None,
            cipher_suites=(17,),
        ),
    )
    async with db.transaction(pool) as connection:
        return await store.create_node(connection, uuid.uuid4(), new)


async def queue(pool: db.Pool, node: Node) -> Operation:
    async with db.transaction(pool) as connection:
        return await operation_store.create(
            connection,
            node,
            operation_id=uuid.uuid4(),
            kind="power",
            args={"action": "on"},
            fencing_token=None,
            requested_by="test",
            timeout_seconds=60,
        )


async def claim(pool: db.Pool, driver: uuid.UUID, seconds: float = 60) -> list[Operation]:
    async with db.transaction(pool) as connection:
        return await operation_store.claim_operations(
            connection, driver, seconds=seconds, limit=10, busy=()
        )


async def see(pool: db.Pool, node: Node, state: PowerState) -> operation_store.Observed | None:
    async with db.transaction(pool) as connection:
        return await operation_store.observed(
            connection,
            node.id,
            state,
            observed_at=datetime.datetime.now(datetime.UTC),
            working_suite=17,
            next_poll_seconds=60,
        )


async def test_a_node_that_another_replica_drives_is_not_claimed_until_its_time_is_over(
    pool: db.Pool,
) -> None:
    await queue(pool, await enrol(pool))
    assert len(await claim(pool, THEM, seconds=0.2)) == 1
    assert await claim(pool, US) == []
    async with db.connection(pool) as connection:
        await connection.execute("SELECT pg_sleep(0.25)")
    assert len(await claim(pool, US)) == 1
    assert await claim(pool, THEM) == []


async def test_a_command_is_issued_once_and_only_by_the_nodes_driver(pool: db.Pool) -> None:
    operation = await queue(pool, await enrol(pool))
    with pytest.raises(Superseded):
        async with db.transaction(pool) as connection:
            await operation_store.issue(connection, operation, driver=US)
    await claim(pool, US)
    async with db.transaction(pool) as connection:
        await operation_store.issue(connection, operation, driver=US)
    for driver in (US, THEM):
        with pytest.raises(Superseded):
            async with db.transaction(pool) as connection:
                await operation_store.issue(connection, operation, driver=driver)


async def test_an_operation_ends_once(pool: db.Pool) -> None:
    operation = await queue(pool, await enrol(pool))
    async with db.transaction(pool) as connection:
        await operation_store.finish(connection, operation, OperationState.FAILED, code="c")
    for state in (OperationState.SUCCEEDED, OperationState.FAILED):
        with pytest.raises(Superseded):
            async with db.transaction(pool) as connection:
                await operation_store.finish(connection, operation, state)


async def test_a_look_while_an_operation_is_under_way_is_not_taken_for_drift(
    pool: db.Pool,
) -> None:
    node = await enrol(pool)
    assert await see(pool, node, PowerState.OFF) is not None
    operation = await queue(pool, node)
    # the command is out, and the poll that was due at the same time sees what it did
    assert await see(pool, node, PowerState.ON) is None
    async with db.transaction(pool) as connection:
        await operation_store.finish(connection, operation, OperationState.SUCCEEDED)
    seen = await see(pool, node, PowerState.ON)
    assert seen is not None
    assert seen.node.last_power_state is PowerState.OFF


async def test_a_look_older_than_what_is_known_changes_nothing(pool: db.Pool) -> None:
    node = await enrol(pool)
    await see(pool, node, PowerState.ON)
    async with db.transaction(pool) as connection:
        old = await operation_store.observed(
            connection,
            node.id,
            PowerState.OFF,
            observed_at=datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC),
            working_suite=None,
            next_poll_seconds=60,
        )
        assert old is None
        assert (await store.get_node(connection, node.id)).power_state is PowerState.ON


async def test_a_latch_is_not_set_for_credentials_that_were_changed_meanwhile(
    pool: db.Pool,
) -> None:
    node = await enrol(pool)
    async with db.transaction(pool) as connection:
        stale = await operation_store.latch(connection, node.id, generation=0, reason="r")
        assert stale is None
        assert await operation_store.latch(connection, node.id, generation=1, reason="r")
        with pytest.raises(errors.NodeLatched):
            await operation_store.create(
                connection,
                await store.get_node(connection, node.id),
                operation_id=uuid.uuid4(),
                kind="power",
                args={"action": "on"},
                fencing_token=None,
                requested_by="test",
                timeout_seconds=60,
            )


async def test_the_inventory_is_due_after_a_change_and_not_before_the_next(pool: db.Pool) -> None:
    async def due() -> store.Inventory | None:
        async with (
            db.connection(pool) as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            return await store.inventory_due(connection, every_seconds=3600)

    await enrol(pool, "a")
    inventory = await due()
    assert inventory is not None
    # a change while the report is on its way is not swallowed by it
    node = await enrol(pool, "b")
    async with db.transaction(pool) as connection:
        await store.inventory_reported(connection, inventory)
    later = await due()
    assert later is not None
    assert [it.name for it in later.nodes] == ["a", "b"]
    async with db.transaction(pool) as connection:
        await store.inventory_reported(connection, later)
    assert await due() is None
    async with db.transaction(pool) as connection:
        node = await store.get_node(connection, node.id, for_update=True)
        await store.take_lease(connection, node, owner="o", purpose="p", ttl_seconds=0.01)
    assert await due() is not None


async def take(pool: db.Pool, node: Node, *, ttl_seconds: float = 60) -> Lease:
    async with db.transaction(pool) as connection:
        node = await store.get_node(connection, node.id, for_update=True)
        return await store.take_lease(
            connection, node, owner="o", purpose="p", ttl_seconds=ttl_seconds
        )


async def test_who_waited_for_the_end_of_a_lease_has_the_node_since_that_end(
    pool: db.Pool,
) -> None:
    """Its transaction began before, so that the moment of that is the one of no lease."""
    node = await enrol(pool)
    first = await take(pool, node)
    async with db.transaction(pool) as connection:
        await connection.fetchval("SELECT now()")  # it has begun
        async with db.transaction(pool) as other:
            held = await store.get_node(other, node.id, for_update=True)
            ended_at = await store.end_lease(other, held)
        free = await store.get_node(connection, node.id, for_update=True)
        second = await store.take_lease(connection, free, owner="p", purpose="p", ttl_seconds=60)
    assert first.taken_at < ended_at < second.taken_at
    assert second.expires_at - second.taken_at == datetime.timedelta(seconds=60)


async def test_a_renewal_that_had_to_wait_counts_from_when_it_is_made(pool: db.Pool) -> None:
    node = await enrol(pool)
    async with db.transaction(pool) as connection:
        await connection.fetchval("SELECT now()")  # it has begun
        lease = await take(pool, node)
        held = await store.get_node(connection, node.id, for_update=True)
        renewed = await store.renew_lease(connection, held, ttl_seconds=60)
    assert renewed.expires_at > lease.expires_at
    assert (renewed.taken_at, renewed.fencing_token) == (lease.taken_at, lease.fencing_token)


async def test_a_lease_that_ran_out_and_was_swept_up_is_not_ended_once_more(pool: db.Pool) -> None:
    node = await enrol(pool)
    lease = await take(pool, node, ttl_seconds=0.2)
    async with db.transaction(pool) as connection:
        held = await store.get_node(connection, node.id, for_update=True)
        assert held.lease == lease
        await asyncio.sleep(0.3)
        async with db.transaction(pool) as sweeper:
            ((_, _, swept),) = await store.sweep_leases(sweeper)
        assert swept == lease
        with pytest.raises(errors.LeaseNotFound):
            await store.end_lease(connection, held)


async def test_a_lease_that_ran_out_is_told_of_by_who_comes_next_if_its_sweep_fails(
    pool: db.Pool,
) -> None:
    node = await enrol(pool)
    lease = await take(pool, node, ttl_seconds=0.01)

    async def end() -> list[Lease]:
        async with db.transaction(pool) as connection:
            return [it for _, _, it in await store.sweep_leases(connection, node_id=node.id)]

    async def one_waits() -> bool:
        async with db.connection(pool) as connection:
            return bool(
                await connection.fetchval(
                    "SELECT EXISTS (SELECT FROM pg_stat_activity"
                    " WHERE wait_event_type = 'Lock' AND datname = current_database())"
                )
            )

    await asyncio.sleep(0.02)
    async with asyncio.TaskGroup() as group:
        async with db.connection(pool) as sweeper:
            sweep = sweeper.transaction()
            await sweep.start()
            assert len(await store.sweep_leases(sweeper)) == 1
            ended = group.create_task(end())
            await eventually(one_waits)
            await sweep.rollback()
        assert await ended == [lease]


async def test_a_lease_that_is_given_back_after_it_ran_out_was_over_when_it_ran_out(
    pool: db.Pool,
) -> None:
    node = await enrol(pool)
    lease = await take(pool, node, ttl_seconds=0.2)
    async with db.transaction(pool) as connection:
        held = await store.get_node(connection, node.id, for_update=True)
        await asyncio.sleep(0.3)
        assert await store.end_lease(connection, held) == lease.expires_at
