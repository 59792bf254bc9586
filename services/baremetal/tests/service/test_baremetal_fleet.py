"""The actors: one session, one command at a time, the urgent first, and no stale session believed."""

import asyncio
import contextlib
import dataclasses
import time
import uuid
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from hostler_baremetal import errors
from hostler_baremetal.credentials import Vault
from hostler_baremetal.fleet import Fleet, Pace, Urgency
from hostler_baremetal.ipmi_client import Timing
from hostler_baremetal.ipmi_command import BootDevice, ChassisAction
from hostler_baremetal.metrics import Metrics
from hostler_baremetal.node import Access, Hardware, Node, NodeId
from hostler_baremetal.power import PowerState
from hostler_baremetal.simulator import SimulatedBmc

VAULT = Vault({"k1": bytes(32)})
QUICK = Timing(handshake_step_seconds=(0.2,), retransmit_seconds=(0.05, 0.1), close_seconds=0.1)


def node_of(bmc: SimulatedBmc, password: str = "secret", node_id: uuid.UUID | None = None) -> Node:
    node_id = node_id or uuid.uuid4()
    now = datetime.now(UTC)
    return Node(
        id=NodeId(node_id),
        name="node",
        generation=1,
        hardware=Hardware(
            memory_mb=1, vcpus=1, local_gb=1, cpu_arch=None, zone=None, traits=(), extra_specs={}
        ),
        access=Access(
            address=f"ipmi://127.0.0.1:{bmc.port}",
            username="admin",
            sealed_password=VAULT.seal(password, belongs_to=f"{node_id}/password"),
            sealed_group_key=None,
            cipher_suites=(17, 3),
        ),
        maintenance=False,
        maintenance_reason=None,
        power_state=PowerState.UNKNOWN,
        last_power_state=None,
        power_observed_at=None,
        looked_at=None,
        poll_error=None,
        poll_failures=0,
        latched_at=None,
        working_suite=None,
        lease=None,
        created_at=now,
        updated_at=now,
    )


@contextlib.asynccontextmanager
async def running(**pace: Any) -> AsyncIterator[Fleet]:
    values = {"timeout_seconds": 1.0, "interval_seconds": 0.0, "linger_seconds": 0.5, **pace}
    fleet = Fleet(
        VAULT,
        Pace(timing=QUICK, **values),
        handshake_concurrency=4,
        metrics=Metrics(CollectorRegistry()),
    )
    task = asyncio.create_task(fleet.run())
    await asyncio.sleep(0)
    try:
        yield fleet
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def read(fleet: Fleet, node: Node) -> PowerState:
    return (await fleet.read_power(node, urgency=Urgency.LOOK)).state


async def test_a_hundred_questions_at_once_are_one_session(bmc: SimulatedBmc) -> None:
    async with running() as fleet:
        node = node_of(bmc)
        states = await asyncio.gather(*(read(fleet, node) for _ in range(100)))
        assert set(states) == {PowerState.OFF}
        assert bmc.handshakes == 1


async def test_the_session_is_closed_when_nobody_asks_and_opened_again(bmc: SimulatedBmc) -> None:
    async with running(linger_seconds=0.1) as fleet:
        node = node_of(bmc)
        await read(fleet, node)
        await asyncio.sleep(0.3)
        assert (len(bmc.sessions), fleet.nodes) == (0, [])
        await read(fleet, node)
        assert bmc.handshakes == 2


async def test_an_action_goes_before_the_looks_that_wait(bmc: SimulatedBmc) -> None:
    async with running(interval_seconds=0.02) as fleet:
        node = node_of(bmc)
        await read(fleet, node)
        looks = [asyncio.create_task(read(fleet, node)) for _ in range(20)]
        await asyncio.sleep(0)
        await fleet.control(node, ChassisAction.POWER_UP)
        assert sum(look.done() for look in looks) <= 2
        await asyncio.gather(*looks)


async def test_commands_to_one_bmc_keep_their_distance(bmc: SimulatedBmc) -> None:
    async with running(interval_seconds=0.1) as fleet:
        node = node_of(bmc)
        began = time.monotonic()
        await asyncio.gather(*(read(fleet, node) for _ in range(4)))
        assert time.monotonic() - began >= 0.3


async def test_a_bmc_that_forgot_the_session_is_asked_in_a_new_one(
    bmc: SimulatedBmc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hostler_baremetal.fleet._STALE_SESSION_SECONDS", 0.1)
    async with running(linger_seconds=5) as fleet:
        node = node_of(bmc)
        await read(fleet, node)
        bmc.sessions.clear()  # as after its own restart
        await asyncio.sleep(0.15)
        assert await read(fleet, node) is PowerState.OFF
        bmc.sessions.clear()
        await asyncio.sleep(0.15)
        # what may be said once only is said in a fresh session from the start
        await fleet.control(node, ChassisAction.POWER_UP)
        assert bmc.power_commands == [1]


async def test_changed_access_ends_the_old_session(bmc: SimulatedBmc) -> None:
    async with running(linger_seconds=5) as fleet:
        node = node_of(bmc)
        await read(fleet, node)
        bmc.users["admin"] = ("changed", 4)
        again = node_of(bmc, "changed", node.id)
        assert await read(fleet, again) is PowerState.OFF
        assert bmc.handshakes == 2
        assert len(bmc.sessions) == 1


async def test_who_stopped_waiting_is_not_served(bmc: SimulatedBmc) -> None:
    async with running(interval_seconds=0.1) as fleet:
        node = node_of(bmc)
        await read(fleet, node)
        waiting = asyncio.create_task(fleet.control(node, ChassisAction.POWER_UP))
        await asyncio.sleep(0.02)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await read(fleet, node) is PowerState.OFF
        assert bmc.power_commands == []


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda bmc: bmc.users.clear(), errors.BmcAuthenticationFailed),
        (lambda bmc: setattr(bmc, "session_limit", 0), errors.BmcUnreachable),
        (lambda bmc: bmc.stop(), errors.BmcUnreachable),
        (lambda bmc: setattr(bmc.faults, "drop_requests", lambda _: True), errors.BmcSilent),
        (lambda bmc: setattr(bmc.faults, "refuse_power", 0xD5), errors.BmcRefused),
    ],
)
async def test_every_failure_is_one_of_the_services_errors_and_the_next_call_is_answered(
    bmc: SimulatedBmc, spoil: Callable[[SimulatedBmc], None], error: type[Exception]
) -> None:
    async with running() as fleet:
        node = node_of(bmc)
        spoil(bmc)
        await asyncio.sleep(0)
        for _ in range(2):
            with pytest.raises(error):
                await fleet.control(node, ChassisAction.POWER_UP)


async def test_an_address_that_is_none_fails_its_own_node_alone(bmc: SimulatedBmc) -> None:
    async with running() as fleet:
        node, lost = node_of(bmc), node_of(bmc)
        access = dataclasses.replace(lost.access, address="ipmi://bmc..example.org:623")
        lost = dataclasses.replace(lost, access=access)
        for _ in range(2):
            with pytest.raises(errors.BmcUnreachable):
                await read(fleet, lost)
        assert await read(fleet, node) is PowerState.OFF


async def test_credentials_of_another_node_do_not_open(bmc: SimulatedBmc) -> None:
    async with running() as fleet:
        moved = dataclasses.replace(node_of(bmc), id=NodeId(uuid.uuid4()))
        with pytest.raises(errors.CredentialsUnreadable, match="another node"):
            await read(fleet, moved)
        assert bmc.handshakes == 0


async def test_a_board_without_the_validity_parameter_still_gets_its_boot_device(
    bmc: SimulatedBmc,
) -> None:
    async with running() as fleet:
        node = node_of(bmc)
        await read(fleet, node)
        bmc.faults.completion_codes = [0x80]
        await fleet.set_boot_device(node, BootDevice.PXE, persistent=False, mode="legacy")
        assert bmc.boot_flags.hex() == "8004000000"


async def test_stopping_answers_everybody_and_closes_every_session(bmc: SimulatedBmc) -> None:
    async with running(linger_seconds=5) as fleet:
        node = node_of(bmc)
        await read(fleet, node)
        bmc.faults.mute_commands = {(0x00, 0x01)}
        waiting = [asyncio.create_task(read(fleet, node)) for _ in range(5)]
        await asyncio.sleep(0.1)
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(outcome, errors.BmcUnreachable) for outcome in outcomes)
    await asyncio.sleep(0.05)
    assert len(bmc.sessions) == 0
