"""Our client and our simulator against programs that no one here wrote: ipmi_sim, ipmitool, ipmipower.

And the whole way: two services as processes, real BMCs, and capacity hearing of them.
"""

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from hostler_baremetal import credentials, ipmi_client, ipmi_command
from hostler_baremetal import testing as peers
from hostler_baremetal.ipmi_client import BmcAddress
from hostler_baremetal.ipmi_command import BootDevice, ChassisAction
from hostler_baremetal.ipmi_error import AuthenticationFailed, BmcUnreachable, SuiteRefused
from hostler_baremetal.ipmi_session import Credentials
from hostler_baremetal.simulator import SimulatedBmc
from hostler_common import client, servers, testing

ADMIN = Credentials(username=peers.USERNAME, password=peers.PASSWORD)


@pytest.fixture
def ipmi_sim(tmp_path: Path) -> Iterator[peers.IpmiSim]:
    simulator = peers.IpmiSim.prepare(tmp_path / "bmc", name="bmc", port=peers.free_udp_port())
    process = simulator.start()
    yield simulator
    peers.stop(process)


def connect(
    simulator: peers.IpmiSim, credentials: Credentials = ADMIN, suites: tuple[int, ...] = (17, 3)
) -> contextlib.AbstractAsyncContextManager[ipmi_client.Connection]:
    address = BmcAddress.parse(simulator.address)
    return ipmi_client.connect(address, credentials, timeout_seconds=10, suites=suites)


async def power(connection: ipmi_client.Connection) -> bool:
    data = await connection.execute(ipmi_command.GET_CHASSIS_STATUS, timeout_seconds=5)
    return ipmi_command.parse_chassis_status(data).power_on


async def control(connection: ipmi_client.Connection, action: ChassisAction) -> None:
    await connection.execute(ipmi_command.chassis_control(action), timeout_seconds=5)


class TestOurClientWithIpmiSim:
    async def test_it_is_switched_and_says_so_and_so_does_its_chassis(
        self, ipmi_sim: peers.IpmiSim
    ) -> None:
        async with connect(ipmi_sim) as connection:
            assert connection.suite == 3
            assert not await power(connection)
            await control(connection, ChassisAction.POWER_UP)
            assert await power(connection)
            assert ipmi_sim.power
            await control(connection, ChassisAction.HARD_RESET)
            await control(connection, ChassisAction.SOFT_SHUTDOWN)
            assert not await power(connection)
        assert ipmi_sim.commands == ["power 1", "reset", "shutdown"]

    async def test_a_cycle_is_off_and_then_on(self, ipmi_sim: peers.IpmiSim) -> None:
        ipmi_sim.switch(power=True)
        async with connect(ipmi_sim) as connection:
            await control(connection, ChassisAction.POWER_CYCLE)
            assert not await power(connection)

            async def is_on() -> bool:
                return await power(connection)

            await testing.eventually(is_on)
        assert ipmi_sim.commands == ["power 0", "power 1"]

    async def test_its_boot_device_is_set_and_read_back(self, ipmi_sim: peers.IpmiSim) -> None:
        async with connect(ipmi_sim) as connection:
            for device, name in (
                (BootDevice.PXE, "pxe"),
                (BootDevice.CDROM, "cdrom"),
                (BootDevice.BIOS, "bios"),
            ):
                command = ipmi_command.set_boot_flags(device, persistent=False, mode="legacy")
                await connection.execute(command, timeout_seconds=5)
                data = await connection.execute(ipmi_command.GET_BOOT_FLAGS, timeout_seconds=5)
                assert ipmi_command.parse_boot_flags(data).device is device
                assert ipmi_sim.commands[-1] == f"boot {name}"

    async def test_it_says_who_it_is(self, ipmi_sim: peers.IpmiSim) -> None:
        async with connect(ipmi_sim) as connection:
            data = await connection.execute(ipmi_command.GET_DEVICE_ID, timeout_seconds=5)
            device = ipmi_command.parse_device_id(data)
            assert (device.ipmi_version, device.manufacturer_id) == ("2.0", 0x1291)
            guid = await connection.execute(ipmi_command.GET_SYSTEM_GUID, timeout_seconds=5)
            assert ipmi_command.parse_system_guid(guid) is not None

    @pytest.mark.parametrize(
        "wrong",
        [
            Credentials(username=peers.USERNAME, password="wrong"),
            Credentials(username="nobody", password=peers.PASSWORD),
        ],
    )
    async def test_wrong_credentials_are_an_authentication_failure(
        self, ipmi_sim: peers.IpmiSim, wrong: Credentials
    ) -> None:
        with pytest.raises(AuthenticationFailed):
            async with connect(ipmi_sim, wrong):
                pass

    async def test_suite_17_alone_is_refused(self, ipmi_sim: peers.IpmiSim) -> None:
        with pytest.raises(SuiteRefused):
            async with connect(ipmi_sim, suites=(17,)):
                pass

    async def test_more_sessions_than_it_has_slots_can_follow_each_other(
        self, ipmi_sim: peers.IpmiSim
    ) -> None:
        # it has 63, and keeps a ghost for 30 s: without Close Session the 64th would fail
        for _ in range(150):
            async with connect(ipmi_sim, suites=(3,)) as connection:
                await power(connection)

    async def test_failed_logins_use_up_no_slots(self, ipmi_sim: peers.IpmiSim) -> None:
        wrong = Credentials(username=peers.USERNAME, password="wrong")
        for _ in range(100):
            with pytest.raises(AuthenticationFailed):
                async with connect(ipmi_sim, wrong, suites=(3,)):
                    pass
        async with connect(ipmi_sim) as connection:
            assert not await power(connection)

    async def test_a_bmc_that_is_killed_in_a_session_is_unreachable_at_once(
        self, tmp_path: Path
    ) -> None:
        simulator = peers.IpmiSim.prepare(tmp_path / "b", name="b", port=peers.free_udp_port())
        process = simulator.start()
        with pytest.raises(BmcUnreachable):  # noqa: PT012  # the session is what is being left
            async with connect(simulator) as connection:
                assert not await power(connection)
                process.kill()
                process.wait()
                await power(connection)


def run_program(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv, env=peers.environment(), capture_output=True, text=True, timeout=60, check=False
    )


async def ipmitool(bmc: SimulatedBmc, suite: int, *arguments: str) -> str:
    """What the real ipmitool prints; the password goes by environment (-E)."""
    done = await asyncio.to_thread(
        run_program,
        *("ipmitool", "-I", "lanplus", "-C", str(suite), "-H", "127.0.0.1", "-p", str(bmc.port)),
        *("-U", peers.USERNAME, "-E", *arguments),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
async def our_bmc() -> AsyncIterator[SimulatedBmc]:
    bmc = SimulatedBmc()
    await bmc.start()
    yield bmc
    bmc.stop()


class TestOurSimulatorWithTheirClients:
    @pytest.mark.parametrize("suite", [17, 3])
    async def test_ipmitool_switches_it(self, our_bmc: SimulatedBmc, suite: int) -> None:
        assert "is off" in await ipmitool(our_bmc, suite, "power", "status")
        for command, code in (("on", 1), ("reset", 3), ("cycle", 2)):
            await ipmitool(our_bmc, suite, "power", command)
            assert our_bmc.power_commands[-1] == code
        assert our_bmc.active_sessions == 0

    @pytest.mark.parametrize("suite", [17, 3])
    async def test_ipmitool_reads_it_and_sets_its_boot_device(
        self, our_bmc: SimulatedBmc, suite: int
    ) -> None:
        assert "IPMI Version              : 2.0" in await ipmitool(our_bmc, suite, "mc", "info")
        await ipmitool(our_bmc, suite, "chassis", "bootdev", "pxe", "options=efiboot")
        shown = await ipmitool(our_bmc, suite, "chassis", "bootparam", "get", "5")
        assert "Force PXE" in shown
        assert "EFI boot" in shown

    async def test_ipmitool_finds_its_suites_by_itself(self, our_bmc: SimulatedBmc) -> None:
        done = await asyncio.to_thread(
            run_program,
            *("ipmitool", "-I", "lanplus", "-H", "127.0.0.1", "-p", str(our_bmc.port)),
            *("-U", peers.USERNAME, "-E", "power", "status"),
        )
        assert "is off" in done.stdout

    @pytest.mark.parametrize("suite", [17, 3])
    async def test_ipmitool_is_refused_with_a_wrong_password(
        self, our_bmc: SimulatedBmc, suite: int
    ) -> None:
        our_bmc.users = {"admin": ("other", 4)}
        done = await asyncio.to_thread(
            run_program,
            *("ipmitool", "-I", "lanplus", "-C", str(suite), "-H", "127.0.0.1"),
            *("-p", str(our_bmc.port), "-U", peers.USERNAME, "-E", "power", "status"),
        )
        assert done.returncode != 0
        assert our_bmc.active_sessions == 0

    @pytest.mark.parametrize("suite", [17, 3])
    async def test_ipmipower_switches_it(
        self, our_bmc: SimulatedBmc, suite: int, tmp_path: Path
    ) -> None:
        config = tmp_path / "freeipmi.conf"
        config.touch(mode=0o600)
        config.write_text(f"username {peers.USERNAME}\npassword {peers.PASSWORD}\n")
        program = shutil.which("ipmipower", path=f"{os.environ['PATH']}:/usr/sbin")
        assert program is not None, "apt-get install freeipmi-tools"
        for option, said in (("--on", "ok"), ("--stat", "on"), ("--off", "ok"), ("--stat", "off")):
            done = await asyncio.to_thread(
                run_program,
                *(program, "-D", "LAN_2_0", "-I", str(suite), "--config-file", str(config)),
                *("-h", f"127.0.0.1:{our_bmc.port}", option),
            )
            assert done.stdout.strip() == f"127.0.0.1: {said}", done.stderr
        assert our_bmc.power_commands == [1, 0]


@contextlib.asynccontextmanager
async def service(name: str, environment: dict[str, str], directory: Path) -> AsyncIterator[str]:
    """A service as a process, migrated and ready; yields its address."""
    program = str(Path(sys.executable).parent / f"hostler-{name}")
    url = f"http://127.0.0.1:{environment[f'HOSTLER_{name.upper()}_HTTP_PORT']}"
    environment = {**os.environ, **environment}
    migrated = await asyncio.to_thread(
        subprocess.run, [program, "migrate"], env=environment, capture_output=True, text=True
    )
    assert migrated.returncode == 0, migrated.stderr
    with (directory / f"{name}.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            program, "serve", env=environment, stdout=log, stderr=log
        )
    try:
        await testing.wait_ready(url)
        yield url
    finally:
        process.terminate()
        assert await process.wait() == 0


async def test_three_real_bmcs_appear_in_capacity_and_the_leased_one_has_nothing_free(
    tmp_path: Path, amqp_url: str, database_url: str
) -> None:
    (tmp_path / "keys").write_text(credentials.new_key_line("k1"))
    environment = {
        "HOSTLER_AMQP_URL": amqp_url,
        "HOSTLER_DATABASE_URL": database_url,
        "HOSTLER_AUTH_MODE": "none",
        "HOSTLER_LOG_FORMAT": "json",
        "HOSTLER_BAREMETAL_HTTP_PORT": str(servers.free_port()),
        "HOSTLER_BAREMETAL_CREDENTIALS_KEY_FILE": str(tmp_path / "keys"),
        "HOSTLER_BAREMETAL_POLL_SECONDS": "1",
        "HOSTLER_CAPACITY_HTTP_PORT": str(servers.free_port()),
    }
    async with contextlib.AsyncExitStack() as stack:
        simulators = []
        for number in (1, 2, 3):
            name = f"bm-{number}"
            simulator = peers.IpmiSim.prepare(
                tmp_path / name, name=name, port=peers.free_udp_port()
            )
            stack.callback(peers.stop, simulator.start())
            simulators.append(simulator)
        capacity_url = await stack.enter_async_context(service("capacity", environment, tmp_path))
        url = await stack.enter_async_context(service("baremetal", environment, tmp_path))
        api = await stack.enter_async_context(client.open_api(url))
        capacity = await stack.enter_async_context(client.open_api(capacity_url))
        ids = {}
        for simulator in simulators:
            node = await api.post(
                "/v1/nodes",
                {
                    "name": simulator.name,
                    "address": simulator.address,
                    "username": peers.USERNAME,
                    "password": peers.PASSWORD,
                    "memory_mb": 65536,
                    "vcpus": 32,
                    "local_gb": 900,
                },
            )
            ids[simulator.name] = node["id"]

        operation = await api.post(f"/v1/nodes/{ids['bm-1']}/power", {"action": "on"})

        async def ended() -> Any:
            found = await api.get(f"/v1/operations/{operation['id']}")
            return found if found["finished_at"] else None

        assert (await testing.eventually(ended))["state"] == "succeeded"
        assert [simulator.power for simulator in simulators] == [True, False, False]
        assert simulators[0].commands == ["power 1"]

        await api.post(
            f"/v1/nodes/{ids['bm-3']}/lease",
            {"owner": "demo", "purpose": "burn-in", "ttl_seconds": 600},
        )

        async def free() -> dict[str, int] | None:
            found = {
                host["hypervisor_hostname"]: host["resources"]["memory_mb"]["free"]
                for host in (await capacity.get("/v1/hosts"))["hosts"]
            }
            return found if found.get("bm-3") == 0 else None

        # bm-1 is on and free, bm-3 is off and taken
        assert await testing.eventually(free) == {"bm-1": 65536, "bm-2": 65536, "bm-3": 0}
