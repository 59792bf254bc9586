"""The client over real UDP, against a BMC that loses, repeats, lies and runs full."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import cast

import pytest

from hostler_baremetal import ipmi_client, ipmi_command, rmcp
from hostler_baremetal.ipmi_client import BmcAddress, Connection, Timing
from hostler_baremetal.ipmi_error import (
    AuthenticationFailed,
    BmcTimeout,
    BmcUnreachable,
    CommandRefused,
    Downgraded,
    SessionRefused,
    SuiteRefused,
)
from hostler_baremetal.ipmi_session import Credentials, Privilege
from hostler_baremetal.simulator import SimulatedBmc

QUICK = Timing(
    handshake_step_seconds=(0.1, 0.2), retransmit_seconds=(0.05, 0.1), close_seconds=0.1
)
ADMIN = Credentials(username="admin", password="secret")
STATUS = ipmi_command.GET_CHASSIS_STATUS
POWER_UP = ipmi_command.chassis_control(ipmi_command.ChassisAction.POWER_UP)


@pytest.fixture
async def bmc() -> AsyncIterator[SimulatedBmc]:
    simulated = SimulatedBmc()
    await simulated.start()
    yield simulated
    simulated.stop()


def connect(
    bmc: SimulatedBmc,
    *,
    credentials: Credentials = ADMIN,
    suites: tuple[int, ...] = (17, 3),
    timeout_seconds: float = 3.0,
    timing: Timing = QUICK,
    privilege: Privilege = Privilege.OPERATOR,
) -> contextlib.AbstractAsyncContextManager[Connection]:
    return ipmi_client.connect(
        BmcAddress(host="127.0.0.1", port=bmc.port),
        credentials,
        timeout_seconds=timeout_seconds,
        suites=suites,
        timing=timing,
        privilege=privilege,
    )


async def status(connection: Connection, timeout_seconds: float = 3.0) -> bool:
    data = await connection.execute(STATUS, timeout_seconds=timeout_seconds)
    return ipmi_command.parse_chassis_status(data).power_on


def every(number: int) -> Callable[[bytes], bool]:
    """A loss that hits all but each n-th packet."""
    counter: Iterator[int] = iter(range(1_000_000))
    return lambda _: next(counter) % number != number - 1


class TestMainPath:
    @pytest.mark.parametrize("suite", [17, 3])
    async def test_a_node_is_switched_on_and_off_in_either_suite(
        self, bmc: SimulatedBmc, suite: int
    ) -> None:
        async with connect(bmc, suites=(suite,)) as connection:
            assert connection.suite == suite
            assert not await status(connection)
            await connection.execute(POWER_UP, timeout_seconds=1)
            assert await status(connection)
        assert bmc.power_commands == [1]
        assert bmc.active_sessions == 0

    async def test_a_boot_device_is_set_and_read_back(self, bmc: SimulatedBmc) -> None:
        async with connect(bmc) as connection:
            command = ipmi_command.set_boot_flags(
                ipmi_command.BootDevice.PXE, persistent=True, mode="efi"
            )
            await connection.execute(command, timeout_seconds=1)
            data = await connection.execute(ipmi_command.GET_BOOT_FLAGS, timeout_seconds=1)
        flags = ipmi_command.parse_boot_flags(data)
        assert flags == ipmi_command.BootFlags(
            valid=True, persistent=True, mode="efi", device=ipmi_command.BootDevice.PXE
        )

    async def test_a_bmc_without_suite_17_is_met_with_3(self) -> None:
        bmc = SimulatedBmc(suites=frozenset({3}))
        await bmc.start()
        async with connect(bmc) as connection:
            assert connection.suite == 3
        bmc.stop()

    async def test_a_bmc_that_is_silent_on_suite_17_is_met_with_3(self, bmc: SimulatedBmc) -> None:
        bmc.faults.drop_requests = lambda it: it[5] == 0x10 and it[28] == 3
        async with connect(bmc) as connection:
            assert connection.suite == 3

    async def test_a_group_key_is_used(self) -> None:
        bmc = SimulatedBmc(group_key=b"group")
        await bmc.start()
        known = Credentials(username="admin", password="secret", group_key=b"group")
        async with connect(bmc, credentials=known) as connection:
            assert not await status(connection)
        with pytest.raises(AuthenticationFailed, match="group key"):
            async with connect(bmc):
                pass
        bmc.stop()

    async def test_no_suite_in_common_is_an_error_of_its_own(self) -> None:
        bmc = SimulatedBmc(suites=frozenset({3}))
        await bmc.start()
        with pytest.raises(SuiteRefused):
            async with connect(bmc, suites=(17,)):
                pass
        bmc.stop()


class TestBadNetwork:
    @pytest.mark.parametrize("keep_each", [2, 3])
    async def test_lost_requests_are_asked_again(self, bmc: SimulatedBmc, keep_each: int) -> None:
        async with connect(bmc) as connection:
            bmc.faults.drop_requests = every(keep_each)
            for _ in range(4):
                assert not await status(connection)
            assert connection.counters.retransmits >= 4

    async def test_a_login_under_loss_starts_over_and_leaves_no_ghost(
        self, bmc: SimulatedBmc
    ) -> None:
        # the first RAKP 2 and the second RAKP 4 are lost
        lost = {0x13: 1, 0x15: 1}

        def drop(reply: bytes) -> bool:
            if lost.get(reply[5], 0):
                lost[reply[5]] -= 1
                return True
            return False

        bmc.faults.drop_replies = drop
        async with connect(bmc) as connection:
            assert not await status(connection)
            assert bmc.handshakes == 3
            assert len(bmc.sessions) == 1

    async def test_duplicated_replies_are_taken_once(self, bmc: SimulatedBmc) -> None:
        bmc.faults.duplicate_replies = True
        async with connect(bmc) as connection:
            for _ in range(20):
                assert not await status(connection)

    async def test_an_old_reply_that_comes_again_is_not_taken_for_the_new_one(
        self, bmc: SimulatedBmc
    ) -> None:
        bmc.faults.reorder_replies = True
        async with connect(bmc) as connection:
            for power in (True, False) * 10:
                bmc.power = power
                assert await status(connection) == power
            assert connection.counters.dropped >= 10

    async def test_a_late_answer_to_the_last_question_is_not_taken_for_the_next_ones(
        self, bmc: SimulatedBmc
    ) -> None:
        # slower than our first retransmit: every question is answered at least twice, authentically
        async with connect(bmc) as connection:
            bmc.faults.delay_replies_seconds = 0.12
            for power in (True, False) * 4:
                bmc.power = power
                assert await status(connection) == power
            assert connection.counters.retransmits >= 4
            bmc.faults.delay_replies_seconds = 0.0

    async def test_replies_with_stale_tags_are_ignored(self, bmc: SimulatedBmc) -> None:
        bmc.faults.stale_tags = True
        async with connect(bmc) as connection:
            assert not await status(connection)

    async def test_forged_replies_are_ignored(self, bmc: SimulatedBmc) -> None:
        async with connect(bmc) as connection:
            bmc.faults.forge_replies = True
            for _ in range(5):
                assert not await status(connection)
            assert connection.counters.dropped >= 5

    async def test_sixteen_bytes_of_padding_are_accepted(self, bmc: SimulatedBmc) -> None:
        bmc.faults.pad_16 = True
        async with connect(bmc) as connection:
            # 8 bytes of frame and 7 of data are aligned with the pad length: 16 where 0 would do
            data = await connection.execute(ipmi_command.GET_BOOT_FLAGS, timeout_seconds=1)
            assert len(data) == 7
            assert connection.counters.dropped == 0

    async def test_a_port_where_nobody_listens_fails_fast(self) -> None:
        bmc = SimulatedBmc()
        await bmc.start()
        address = BmcAddress(host="127.0.0.1", port=bmc.port)
        bmc.stop()
        await asyncio.sleep(0)
        with pytest.raises(BmcUnreachable, match="nobody listens"):
            async with ipmi_client.connect(address, ADMIN, timeout_seconds=60):
                pass

    async def test_a_name_that_does_not_resolve_is_unreachable(self) -> None:
        with pytest.raises(BmcUnreachable):
            async with ipmi_client.connect(
                BmcAddress(host="bmc.invalid"), ADMIN, timeout_seconds=5
            ):
                pass

    @pytest.mark.parametrize("host", ["bmc..example.org", 64 * "b", "bmc\0", "."])
    async def test_what_is_no_name_is_unreachable(self, host: str) -> None:
        with pytest.raises(BmcUnreachable):
            async with ipmi_client.connect(BmcAddress(host=host), ADMIN, timeout_seconds=5):
                pass

    async def test_a_bmc_that_forgets_every_session_is_not_asked_in_a_frenzy(self) -> None:
        asked: list[bytes] = []

        class Forgetful(asyncio.DatagramProtocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                self.transport = cast("asyncio.DatagramTransport", transport)

            def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
                if data[5] == rmcp.PayloadType.OPEN_SESSION_REQUEST:
                    asked.append(data)
                refusal = data[16:17] + b"\x02\0\0" + data[20:24]
                self.transport.sendto(
                    rmcp.encode_plain(rmcp.PayloadType.OPEN_SESSION_RESPONSE, refusal), addr
                )

        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
            Forgetful, local_addr=("127.0.0.1", 0)
        )
        address = BmcAddress(host="127.0.0.1", port=transport.get_extra_info("sockname")[1])
        with pytest.raises(BmcTimeout):
            async with ipmi_client.connect(address, ADMIN, timeout_seconds=1.0):
                pass
        transport.close()
        assert 2 <= len(asked) <= 4

    async def test_silence_ends_at_the_deadline(self, bmc: SimulatedBmc) -> None:
        bmc.faults.drop_requests = lambda _: True
        with pytest.raises(BmcTimeout):
            async with connect(bmc, timeout_seconds=0.5):
                pass

    async def test_a_bmc_that_dies_in_a_session_is_a_timeout_and_not_a_hang(
        self, bmc: SimulatedBmc
    ) -> None:
        with pytest.raises(BmcUnreachable):  # noqa: PT012  # the block is what is being left
            async with connect(bmc) as connection:
                bmc.stop()
                await status(connection, timeout_seconds=0.5)


class TestNothingIsDoneTwice:
    async def test_a_power_command_whose_answer_is_lost_is_not_sent_again(
        self, bmc: SimulatedBmc
    ) -> None:
        async with connect(bmc) as connection:
            bmc.faults.mute_commands = {(0x00, 0x02)}
            with pytest.raises(BmcTimeout):
                await connection.execute(POWER_UP, timeout_seconds=1)
            assert bmc.power_commands == [1]
            assert await status(connection)

    @pytest.mark.parametrize("code", [0xC0, 0xD2])
    async def test_a_power_command_that_was_not_started_is_given_again(
        self, bmc: SimulatedBmc, code: int
    ) -> None:
        async with connect(bmc) as connection:
            bmc.faults.completion_codes = [code, code]
            await connection.execute(POWER_UP, timeout_seconds=2)
        assert bmc.power_commands == [1]

    @pytest.mark.parametrize("code", [0xC3, 0xC4, 0xD4])
    async def test_a_power_command_with_an_unclear_answer_is_not_given_again(
        self, bmc: SimulatedBmc, code: int
    ) -> None:
        async with connect(bmc) as connection:
            bmc.faults.completion_codes = [code]
            with pytest.raises(CommandRefused) as refused:
                await connection.execute(POWER_UP, timeout_seconds=2)
        assert refused.value.completion_code == code
        assert bmc.power_commands == []

    @pytest.mark.parametrize("code", [0xC0, 0xC3, 0xC4, 0xD2, 0xDE])
    async def test_a_read_goes_through_a_burst_of_busy_answers(
        self, bmc: SimulatedBmc, code: int
    ) -> None:
        async with connect(bmc) as connection:
            bmc.faults.completion_codes = [code] * 3
            assert not await status(connection)

    async def test_a_command_the_bmc_does_not_know_is_refused_at_once(
        self, bmc: SimulatedBmc
    ) -> None:
        unknown = ipmi_command.Command(name="unknown", network_function=0x2E, code=0x77)
        async with connect(bmc) as connection:
            with pytest.raises(CommandRefused) as refused:
                await connection.execute(unknown, timeout_seconds=60)
        assert refused.value.completion_code == 0xC1


class TestWhoWeAre:
    async def test_a_wrong_password_is_an_authentication_failure_and_one_login(
        self, bmc: SimulatedBmc
    ) -> None:
        wrong = Credentials(username="admin", password="wrong")
        with pytest.raises(AuthenticationFailed):
            async with connect(bmc, credentials=wrong):
                pass
        await asyncio.sleep(0.05)
        assert bmc.handshakes == 1
        assert len(bmc.sessions) == 0

    async def test_an_unknown_user_is_an_authentication_failure(self, bmc: SimulatedBmc) -> None:
        unknown = Credentials(username="nobody", password="secret")
        with pytest.raises(AuthenticationFailed, match="does not know the user"):
            async with connect(bmc, credentials=unknown):
                pass
        assert bmc.handshakes == 1

    async def test_a_user_without_the_privilege_is_an_authentication_failure(self) -> None:
        bmc = SimulatedBmc(users={"admin": ("secret", 2)})
        await bmc.start()
        with pytest.raises(AuthenticationFailed, match="privilege"):
            async with connect(bmc):
                pass
        async with connect(bmc, privilege=Privilege.USER) as connection:
            assert not await status(connection)
        bmc.stop()

    async def test_a_bmc_that_does_not_know_the_password_is_not_believed(
        self, bmc: SimulatedBmc
    ) -> None:
        bmc.faults.wrong_key_exchange_code = True
        with pytest.raises(AuthenticationFailed):
            async with connect(bmc):
                pass
        assert bmc.active_sessions == 0

    async def test_a_bmc_with_a_wrong_last_proof_is_not_believed(self, bmc: SimulatedBmc) -> None:
        bmc.faults.wrong_final_code = True
        with pytest.raises(AuthenticationFailed):
            async with connect(bmc):
                pass
        await asyncio.sleep(0.05)
        assert bmc.active_sessions == 0

    async def test_a_downgrade_is_refused(self, bmc: SimulatedBmc) -> None:
        bmc.faults.downgrade_to_sha1 = True
        with pytest.raises(Downgraded):
            async with connect(bmc, suites=(17,)):
                pass
        await asyncio.sleep(0.05)
        assert len(bmc.sessions) == 0


class TestSlots:
    async def test_a_full_bmc_says_so(self, bmc: SimulatedBmc) -> None:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(4):
                await stack.enter_async_context(connect(bmc))
            with pytest.raises(SessionRefused, match="no free session"):
                async with connect(bmc):
                    pass
        async with connect(bmc) as connection:
            assert not await status(connection)

    async def test_a_hundred_sessions_one_after_the_other_leave_none(
        self, bmc: SimulatedBmc
    ) -> None:
        for _ in range(100):
            async with connect(bmc):
                pass
        assert len(bmc.sessions) == 0

    async def test_a_cancelled_command_closes_its_session(self, bmc: SimulatedBmc) -> None:
        connected = asyncio.Event()

        async def hang() -> None:
            async with connect(bmc) as connection:
                bmc.faults.mute_commands = {(STATUS.network_function, STATUS.code)}
                connected.set()
                await status(connection, timeout_seconds=60)

        task = asyncio.create_task(hang())
        await connected.wait()
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.05)
        assert len(bmc.sessions) == 0

    @pytest.mark.parametrize("lost", [0x13, 0x15])
    async def test_a_login_cancelled_half_way_frees_its_slot(
        self, bmc: SimulatedBmc, lost: int
    ) -> None:
        bmc.faults.drop_replies = lambda reply: reply[5] == lost
        task = asyncio.create_task(connect(bmc, timing=Timing()).__aenter__())
        while not bmc.sessions:  # noqa: ASYNC110  # the simulator has no event to wait for
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.05)
        assert len(bmc.sessions) == 0

    async def test_an_error_in_the_block_closes_the_session(self, bmc: SimulatedBmc) -> None:
        with pytest.raises(RuntimeError, match="ours"):
            async with connect(bmc):
                raise RuntimeError("ours")
        await asyncio.sleep(0.05)
        assert len(bmc.sessions) == 0

    async def test_a_close_that_is_not_answered_does_not_hold_us_up(
        self, bmc: SimulatedBmc
    ) -> None:
        async with connect(bmc):
            bmc.faults.mute_commands = {(0x06, 0x3C)}
        assert len(bmc.sessions) == 0


class TestAddress:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("ipmi://bmc-17.example.org", BmcAddress(host="bmc-17.example.org")),
            ("ipmi://10.1.0.7:6230", BmcAddress(host="10.1.0.7", port=6230)),
            ("ipmi://[fd00::7]:623", BmcAddress(host="fd00::7")),
        ],
    )
    def test_an_address_is_read(self, text: str, expected: BmcAddress) -> None:
        assert BmcAddress.parse(text) == expected
        assert BmcAddress.parse(str(expected)) == expected

    @pytest.mark.parametrize(
        "text",
        [
            "10.1.0.7",
            "redfish://bmc",
            "ipmi://",
            "ipmi://user:pw@bmc",
            "ipmi://bmc:0",
            "ipmi://bmc:70000",
            "ipmi://bmc/path",
            "ipmi://bmc?x=1",
            "ipmi://bm c",
            "ipmi://bmc\0",
            "ipmi://bmc..example.org",
            "ipmi://" + 64 * "b",
        ],
    )
    def test_anything_else_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError):
            BmcAddress.parse(text)
