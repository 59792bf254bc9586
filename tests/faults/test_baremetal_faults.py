"""Power commands under fire: services and BMCs killed in the middle, servers away, replicas racing.

The BMC counts what it was told. Whatever happens, no power command is given twice.
"""

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from hostler_baremetal import credentials
from hostler_baremetal import testing as peers
from hostler_baremetal.simulator import SimulatedBmc
from hostler_common import client, db, errors, servers, testing

CONTROL = (0x00, 0x02)
PROGRAM = str(Path(sys.executable).parent / "hostler-baremetal")


class Service:
    """The service as a process that can be killed."""

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        self.environment = {
            **environment,
            "HOSTLER_BAREMETAL_HTTP_PORT": str(servers.free_port()),
        }
        self.url = f"http://127.0.0.1:{self.environment['HOSTLER_BAREMETAL_HTTP_PORT']}"
        self._log = log
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                PROGRAM,
                "serve",
                env={**os.environ, **self.environment},
                stdout=log,
                stderr=log,
            )
        await testing.wait_ready(self.url)

    async def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        await self._process.wait()

    async def close(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            await self._process.wait()


@pytest.fixture
async def make_service(
    tmp_path: Path, amqp_url: str, database_url: str
) -> AsyncIterator[Callable[..., Service]]:
    (tmp_path / "keys").write_text(credentials.new_key_line("k1"))
    await db.migrate(database_url, schema="baremetal", package="hostler_baremetal")
    made: list[Service] = []

    def make(**more: str) -> Service:
        service = Service(
            {
                "HOSTLER_AMQP_URL": amqp_url,
                "HOSTLER_DATABASE_URL": database_url,
                "HOSTLER_AUTH_MODE": "none",
                "HOSTLER_LOG_FORMAT": "json",
                "HOSTLER_BAREMETAL_CREDENTIALS_KEY_FILE": str(tmp_path / "keys"),
                "HOSTLER_BAREMETAL_CLAIM_SECONDS": "2",
                "HOSTLER_BAREMETAL_POLL_SECONDS": "0.5",
                "HOSTLER_BAREMETAL_POLL_BACKOFF_MAX_SECONDS": "1",
                "HOSTLER_BAREMETAL_BMC_TIMEOUT_SECONDS": "2",
                "HOSTLER_BAREMETAL_BMC_INTERVAL_SECONDS": "0",
                "HOSTLER_BAREMETAL_POWER_TIMEOUT_SECONDS": "20",
                **more,
            },
            tmp_path / f"service-{len(made)}.log",
        )
        made.append(service)
        return service

    yield make
    for service in made:
        await service.close()


@pytest.fixture
async def bmc() -> AsyncIterator[SimulatedBmc]:
    simulated = SimulatedBmc(session_limit=15)
    await simulated.start()
    yield simulated
    simulated.stop()


async def enrol(api: client.Api, address: str, name: str = "node-1") -> str:
    body = {
        "name": name,
        "address": address,
        "username": peers.USERNAME,
        "password": peers.PASSWORD,
        "memory_mb": 65536,
        "vcpus": 32,
    }
    return str((await api.post("/v1/nodes", body))["id"])


async def known(api: client.Api, node_id: str, power: str) -> None:
    async def is_so() -> bool:
        return bool((await api.get(f"/v1/nodes/{node_id}"))["power_state"] == power)

    await testing.eventually(is_so)


async def ended(api: client.Api, operation_id: str) -> dict[str, Any]:
    async def has_ended() -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = await api.get(f"/v1/operations/{operation_id}")
        except errors.Unavailable:
            return None
        return found if found["finished_at"] else None

    found: dict[str, Any] = await testing.eventually(has_ended)
    return found


async def told(bmc: SimulatedBmc, number: int = 1) -> None:
    """Returns once the BMC was given so many power commands."""

    async def has_been() -> bool:
        return len(bmc.power_commands) >= number

    await testing.eventually(has_been, every_seconds=0.005)


async def ask(api: client.Api, node_id: str, action: str) -> str:
    return str((await api.post(f"/v1/nodes/{node_id}/power", {"action": action}))["id"])


class TestKilledBetweenTheCommandAndItsRecord:
    """The BMC has the command, its answer never comes, and the service dies by SIGKILL."""

    @pytest.mark.parametrize(
        ("action", "code", "before", "state", "why"),
        [
            ("on", 1, False, "succeeded", None),
            ("off", 0, True, "succeeded", None),
            # whether it was cycled cannot be seen any more: it is not called a success, nor repeated
            ("cycle", 2, True, "failed", "baremetal.operation.outcome_unknown"),
            ("reset", 3, True, "failed", "baremetal.operation.outcome_unknown"),
        ],
    )
    async def test_the_command_is_not_given_again(
        self,
        make_service: Callable[..., Service],
        bmc: SimulatedBmc,
        action: str,
        code: int,
        before: bool,
        state: str,
        why: str | None,
    ) -> None:
        bmc.power = before
        service = make_service()
        await service.start()
        async with client.open_api(service.url) as api:
            node_id = await enrol(api, f"ipmi://127.0.0.1:{bmc.port}")
            await known(api, node_id, "on" if before else "off")
            bmc.faults.mute_commands = {CONTROL}
            operation_id = await ask(api, node_id, action)
            await told(bmc)
            await service.kill()
            bmc.faults.mute_commands = set()
            assert bmc.power_commands == [code]
            await service.start()
            finished = await ended(api, operation_id)
        assert (finished["state"], finished["code"]) == (state, why)
        assert bmc.power_commands == [code]

    async def test_nor_when_the_node_did_not_do_it(
        self, make_service: Callable[..., Service], bmc: SimulatedBmc
    ) -> None:
        service = make_service(HOSTLER_BAREMETAL_POWER_TIMEOUT_SECONDS="8")
        await service.start()
        async with client.open_api(service.url) as api:
            node_id = await enrol(api, f"ipmi://127.0.0.1:{bmc.port}")
            await known(api, node_id, "off")
            bmc.faults.mute_commands, bmc.faults.ignore_power = {CONTROL}, True
            operation_id = await ask(api, node_id, "on")
            await told(bmc)
            await service.kill()
            bmc.faults.mute_commands = set()
            await service.start()
            finished = await ended(api, operation_id)
        assert (finished["state"], finished["code"]) == (
            "failed",
            "baremetal.operation.not_reached",
        )
        assert bmc.power_commands == [1]

    async def test_an_operation_that_was_still_queued_is_carried_out_once(
        self, make_service: Callable[..., Service], bmc: SimulatedBmc
    ) -> None:
        service = make_service()
        await service.start()
        async with client.open_api(service.url) as api:
            node_id = await enrol(api, f"ipmi://127.0.0.1:{bmc.port}")
            await known(api, node_id, "off")
            # not a packet gets through: the command cannot have been given
            bmc.faults.drop_requests = lambda _: True
            operation_id = await ask(api, node_id, "on")
            await asyncio.sleep(0.3)
            await service.kill()
            bmc.faults.drop_requests = None
            await service.start()
            finished = await ended(api, operation_id)
        assert finished["state"] == "succeeded"
        assert bmc.power_commands == [1]


class TestReplicas:
    async def test_of_two_replicas_one_gives_the_command(
        self, make_service: Callable[..., Service]
    ) -> None:
        services = [make_service(), make_service()]
        bmcs = [SimulatedBmc(session_limit=1) for _ in range(10)]
        for it in bmcs:
            await it.start()
        async with contextlib.AsyncExitStack() as stack:
            apis = []
            for service in services:
                await service.start()
                apis.append(await stack.enter_async_context(client.open_api(service.url)))
            nodes = [
                await enrol(apis[0], f"ipmi://127.0.0.1:{it.port}", f"node-{number}")
                for number, it in enumerate(bmcs)
            ]
            for round_, action in enumerate(("on", "cycle", "off"), start=1):
                asked = await asyncio.gather(
                    *(ask(apis[(round_ + n) % 2], node, action) for n, node in enumerate(nodes))
                )
                for operation_id in asked:
                    assert (await ended(apis[0], operation_id))["state"] == "succeeded"
        assert [it.power_commands for it in bmcs] == [[1, 2, 0]] * 10
        for it in bmcs:
            it.stop()

    async def test_a_dead_replica_is_taken_over_from(
        self, make_service: Callable[..., Service], bmc: SimulatedBmc
    ) -> None:
        first, second = make_service(), make_service()
        await first.start()
        async with client.open_api(first.url) as api:
            node_id = await enrol(api, f"ipmi://127.0.0.1:{bmc.port}")
            await known(api, node_id, "off")
            bmc.power_delay_seconds = 4.0
            operation_id = await ask(api, node_id, "on")
            await told(bmc)
            await second.start()
            await first.kill()
        async with client.open_api(second.url) as api:
            assert (await ended(api, operation_id))["state"] == "succeeded"
            await known(api, node_id, "on")
        assert bmc.power_commands == [1]


async def test_a_database_that_is_away_between_command_and_record_costs_nothing(
    make_service: Callable[..., Service],
    bmc: SimulatedBmc,
    own_postgres: servers.Postgres,
) -> None:
    url = own_postgres.url
    await db.migrate(url, schema="baremetal", package="hostler_baremetal")
    service = make_service(HOSTLER_DATABASE_URL=url)
    await service.start()
    async with client.open_api(service.url) as api:
        node_id = await enrol(api, f"ipmi://127.0.0.1:{bmc.port}")
        await known(api, node_id, "off")
        bmc.faults.delay_replies_seconds = 0.2
        operation_id = await ask(api, node_id, "on")
        await told(bmc)
        own_postgres.kill()

        async def is_unready() -> bool:
            try:
                await api.get("/readyz")
            except errors.Unavailable:
                return True
            return False

        await testing.eventually(is_unready)
        own_postgres.start()
        await testing.wait_ready(service.url)
        bmc.faults.delay_replies_seconds = 0.0
        finished = await ended(api, operation_id)
    assert finished["state"] == "succeeded"
    assert bmc.power_commands == [1]


async def test_a_real_bmc_killed_in_the_middle_makes_its_node_unknown_until_it_is_back(
    make_service: Callable[..., Service], tmp_path: Path
) -> None:
    simulator = peers.IpmiSim.prepare(
        tmp_path / "bmc", name="bmc", port=peers.free_udp_port(), power=True
    )
    process: subprocess.Popen[bytes] = simulator.start()
    service = make_service(HOSTLER_BAREMETAL_POWER_TIMEOUT_SECONDS="3")
    await service.start()
    try:
        async with client.open_api(service.url) as api:
            node_id = await enrol(api, simulator.address)
            await known(api, node_id, "on")
            process.kill()
            process.wait()
            operation_id = await ask(api, node_id, "off")
            finished = await ended(api, operation_id)
            assert finished["state"] == "failed"
            assert finished["code"].startswith("baremetal.bmc.")
            assert finished["issued_at"] is None
            await known(api, node_id, "unknown")
            process = simulator.start()
            await known(api, node_id, "on")
            assert (await ended(api, await ask(api, node_id, "off")))["state"] == "succeeded"
        assert simulator.commands == ["power 0"]
    finally:
        peers.stop(process)


async def test_sigterm_in_the_middle_of_a_command_waits_for_its_answer(
    make_service: Callable[..., Service], bmc: SimulatedBmc
) -> None:
    bmc.power = True
    service = make_service()
    await service.start()
    async with client.open_api(service.url) as api:
        node_id = await enrol(api, f"ipmi://127.0.0.1:{bmc.port}")
        await known(api, node_id, "on")
        bmc.faults.delay_replies_seconds = 0.4
        operation_id = await ask(api, node_id, "reset")
        await told(bmc)
        await service.close()
        bmc.faults.delay_replies_seconds = 0.0
        assert bmc.active_sessions == 0
        # that the BMC took it is on record, so the next process need not doubt it
        await service.start()
        assert (await ended(api, operation_id))["state"] == "succeeded"
    assert bmc.power_commands == [3]
