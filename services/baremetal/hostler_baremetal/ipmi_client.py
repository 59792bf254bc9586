"""The thin asyncio edge of the IPMI client: one connected UDP socket a session, and the waiting.

A socket of its own makes the kernel sort the replies, and an ICMP "refused" arrives as an error at
once. Everything with a meaning is in `ipmi_session` and `ipmi_command`.

Invariants: every way out of `connect`, cancellation included, frees the BMC's session slot (it has
about four, and a ghost lives a minute). A command that may not be repeated is sent once; when its
answer is lost the caller gets `BmcTimeout` and must look before it acts. A login that gets no
answer starts over from Open Session: BMCs do not take kindly to a repeated RAKP message.
"""

import asyncio
import contextlib
import dataclasses
import os
import random
import urllib.parse
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final, Self

from hostler_baremetal import ipmi_command, rmcp
from hostler_baremetal.ipmi_command import NOT_STARTED, PASSING, Command
from hostler_baremetal.ipmi_error import (
    AuthenticationFailed,
    BmcTimeout,
    BmcUnreachable,
    CommandRefused,
    MalformedPacket,
    SessionRefused,
    SuiteRefused,
)
from hostler_baremetal.ipmi_session import Credentials, Handshake, Privilege, Session

DEFAULT_PORT: Final = 623
_INVALID_SESSION: Final = 0x02
_NO_RESOURCES: Final = 0x01
_NO_SUCH_PRIVILEGE: Final = frozenset({0x80, 0x81})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BmcAddress:
    """Where a BMC is."""

    host: str
    port: int = DEFAULT_PORT

    @classmethod
    def parse(cls, address: str) -> Self:
        """Reads `ipmi://host[:port]`. Raises ValueError for anything else."""
        url = urllib.parse.urlsplit(address)
        if url.scheme != "ipmi" or not url.hostname:
            raise ValueError("an address reads ipmi://host or ipmi://host:port")
        if url.username or url.password or url.query or url.fragment or url.path not in ("", "/"):
            raise ValueError("an address has a host and a port, and nothing else")
        port = DEFAULT_PORT if url.port is None else url.port  # ValueError above 65535
        if port == 0:
            raise ValueError("an address cannot have port 0")
        if not url.hostname.isprintable() or " " in url.hostname:
            raise ValueError("a host has neither spaces nor control characters")
        try:
            url.hostname.encode("idna")  # as every look-up of the name begins
        except UnicodeError as exc:
            raise ValueError("a part of the host's name is empty or too long") from exc
        return cls(host=url.hostname, port=port)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"ipmi://{host}:{self.port}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long the client waits.

    Attributes:
        handshake_step_seconds: for each reply of a login, by attempt; the last one repeats.
            OpenBMC frees a half-open session after 3 s, so there is no use in waiting longer.
        retransmit_seconds: before a repeatable command is sent again, by attempt; full jitter
            is applied to the upper half.
        close_seconds: for the answer to Close Session.
    """

    handshake_step_seconds: tuple[float, ...] = (1.0, 2.0, 3.0)
    retransmit_seconds: tuple[float, ...] = (0.4, 0.8, 1.6, 3.2)
    close_seconds: float = 0.3


@dataclasses.dataclass(slots=True, kw_only=True)
class Counters:
    """What happened on the wire, for metrics."""

    retransmits: int = 0
    dropped: int = 0
    handshakes: int = 0


class _Wire(asyncio.DatagramProtocol):
    """Hands over datagrams, the socket's own errors in their place in the row."""

    def __init__(self) -> None:
        self._incoming: asyncio.Queue[bytes | Exception] = asyncio.Queue(maxsize=64)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._put(data)

    def error_received(self, exc: Exception) -> None:
        self._put(exc)

    def _put(self, item: bytes | Exception) -> None:
        # a BMC that floods us loses packets, not our memory
        if not self._incoming.full():
            self._incoming.put_nowait(item)

    async def receive(self, deadline: float) -> bytes:
        """Returns the next datagram.

        Raises TimeoutError at the deadline (of the loop's clock), BmcUnreachable when the
        network says that nobody listens.
        """
        async with asyncio.timeout_at(deadline):
            item = await self._incoming.get()
        if isinstance(item, Exception):
            raise BmcUnreachable(f"nobody listens at the BMC's address: {item}") from item
        return item


class Connection:
    """A session with one BMC. One command at a time: the owner sees to that."""

    def __init__(
        self,
        *,
        session: Session,
        transport: asyncio.DatagramTransport,
        wire: _Wire,
        timing: Timing,
        counters: Counters,
    ) -> None:
        self.counters = counters
        self._session = session
        self._transport = transport
        self._wire = wire
        self._timing = timing

    @property
    def suite(self) -> int:
        """Number of the cipher suite in use."""
        return self._session.suite.number

    async def execute(self, command: Command, *, timeout_seconds: float) -> bytes:
        """Returns the data of the answer, without its completion code.

        A repeatable command is sent again until it is answered, also after a code that says the
        BMC is busy. Another one is sent again only when the BMC said that it did not start it.

        Raises:
            BmcTimeout: no answer in time. Whether the command was carried out is not known.
            BmcUnreachable: the network says that nobody listens.
            CommandRefused: the BMC answered with another completion code.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_seconds
        attempt = 0
        while True:
            response = await self._ask(command, deadline)
            code = response.completion_code
            if code == ipmi_command.CompletionCode.NORMAL:
                return response.data
            again = PASSING if command.repeatable else NOT_STARTED
            pause = self._pause(attempt)
            if code not in again or loop.time() + pause >= deadline:
                raise CommandRefused(
                    f"{command.name} was refused with completion code {code:#04x}",
                    completion_code=code,
                )
            await asyncio.sleep(pause)
            attempt += 1

    async def _ask(self, command: Command, deadline: float) -> rmcp.Response:
        """Sends one request, retransmits it if that is allowed, and returns the answer to it."""
        loop = asyncio.get_running_loop()
        sequence = self._session.next_request_sequence()
        message = rmcp.encode_request(
            network_function=command.network_function,
            command=command.code,
            sequence=sequence,
            data=command.data,
        )
        awaited = (command.network_function | 1, command.code, sequence)
        attempt = 0
        while True:
            self._transport.sendto(self._session.seal(message))
            until = deadline
            if command.repeatable:
                until = min(deadline, loop.time() + self._pause(attempt))
            try:
                return await self._answer(awaited, until)
            except TimeoutError as exc:
                if until >= deadline:
                    raise BmcTimeout(f"no answer to {command.name} in time") from exc
            attempt += 1
            self.counters.retransmits += 1

    async def _answer(self, awaited: tuple[int, int, int], until: float) -> rmcp.Response:
        while True:
            datagram = await self._wire.receive(until)
            try:
                response = rmcp.decode_response(self._session.unseal(datagram))
            except MalformedPacket:
                self.counters.dropped += 1
                continue
            if (response.network_function, response.command, response.sequence) == awaited:
                return response
            self.counters.dropped += 1

    def _pause(self, attempt: int) -> float:
        steps = self._timing.retransmit_seconds
        step = steps[min(attempt, len(steps) - 1)]
        return step * random.uniform(0.5, 1.0)  # noqa: S311  # spreads load, hides nothing

    def send_close(self) -> None:
        """Sends Close Session and does not wait: safe while being cancelled."""
        command = ipmi_command.close_session(self._session.managed_id)
        message = rmcp.encode_request(
            network_function=command.network_function,
            command=command.code,
            sequence=self._session.next_request_sequence(),
            data=command.data,
        )
        self._transport.sendto(self._session.seal(message))

    async def close(self) -> None:
        """Closes the session: asks twice at the most, and takes silence for an answer."""
        command = ipmi_command.close_session(self._session.managed_id)
        for _ in range(2):
            try:
                await self.execute(command, timeout_seconds=self._timing.close_seconds)
            except BmcTimeout:
                continue
            except (CommandRefused, BmcUnreachable):
                return  # 87h: it does not know the session any more; or it is gone
            return


@contextlib.asynccontextmanager
async def connect(
    address: BmcAddress,
    credentials: Credentials,
    *,
    timeout_seconds: float,
    suites: Sequence[int] = (17, 3),
    privilege: Privilege = Privilege.OPERATOR,
    timing: Timing | None = None,
    counters: Counters | None = None,
    entropy: Callable[[int], bytes] = os.urandom,
) -> AsyncIterator[Connection]:
    """Logs in to a BMC, yields the connection, and logs out however the block is left.

    Args:
        address: where the BMC listens.
        credentials: sent to nobody; what proves them is.
        timeout_seconds: for the whole login, whatever it takes.
        suites: cipher suites that may be used, the one to try first in front.
        privilege: what the session may do.
        timing: how long to wait for single packets.
        counters: where to count what happens on the wire, the login included.
        entropy: gives that many random bytes.

    Raises:
        AuthenticationFailed: the credentials are not accepted; not tried again with others.
        SuiteRefused: none of the suites is.
        SessionRefused: the BMC has no free session, or another reason.
        BmcTimeout: no answer in time.
        BmcUnreachable: the name does not resolve, or nobody listens there.
    """
    timing = timing or Timing()
    counters = counters or Counters()
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_seconds
    try:
        async with asyncio.timeout_at(deadline):
            transport, wire = await loop.create_datagram_endpoint(
                _Wire, remote_addr=(address.host, address.port)
            )
    except TimeoutError as exc:
        raise BmcTimeout(f"the name of {address} does not resolve in time") from exc
    except (OSError, ValueError) as exc:  # ValueError: it is no name that can be looked up
        raise BmcUnreachable(f"{address} cannot be reached: {exc}") from exc
    try:
        login = _Login(
            transport=transport,
            wire=wire,
            credentials=credentials,
            privilege=privilege,
            timing=timing,
            entropy=entropy,
            counters=counters,
        )
        session = await login.run([rmcp.SUITES[number] for number in suites], deadline)
        connection = Connection(
            session=session, transport=transport, wire=wire, timing=timing, counters=counters
        )
        try:
            await _raise_privilege(connection, privilege, deadline - loop.time())
            yield connection
        except BaseException:
            # cancelled or failed: say goodbye without waiting for the answer
            connection.send_close()
            raise
        await connection.close()
    finally:
        transport.close()


async def _raise_privilege(
    connection: Connection, privilege: Privilege, timeout_seconds: float
) -> None:
    """Raises AuthenticationFailed when the user may not have the privilege."""
    command = ipmi_command.set_session_privilege(privilege)
    try:
        await connection.execute(command, timeout_seconds=max(timeout_seconds, 0.0))
    except CommandRefused as exc:
        if exc.completion_code in _NO_SUCH_PRIVILEGE:
            raise AuthenticationFailed(
                f"the BMC does not give the user the privilege {privilege.name.lower()}"
            ) from exc
        raise


@dataclasses.dataclass(kw_only=True)
class _Login:
    """The tries of one login: over the suites, and over silence."""

    transport: asyncio.DatagramTransport
    wire: _Wire
    credentials: Credentials
    privilege: Privilege
    timing: Timing
    entropy: Callable[[int], bytes]
    counters: Counters

    async def run(self, suites: Sequence[rmcp.CipherSuite], deadline: float) -> Session:
        remaining = list(suites)
        silent = 0
        while True:
            # boards that ignore a suite they do not have are met by taking the suites in turns
            suite = remaining[silent % len(remaining)]
            try:
                return await self._try(suite, silent, deadline)
            except TimeoutError as exc:
                silent += 1
                if asyncio.get_running_loop().time() >= deadline:
                    raise BmcTimeout("the BMC does not answer the login in time") from exc
            except SuiteRefused:
                remaining.remove(suite)
                if not remaining:
                    raise
            except SessionRefused as exc:
                if exc.status == _INVALID_SESSION:
                    # it has forgotten the half-open session: start over, but not at once, in case it always says so
                    silent += 1
                    await self._pause(deadline)
                elif exc.status == _NO_RESOURCES and len(remaining) > 1:
                    # some boards say so of a suite that they do not have
                    remaining.remove(suite)
                else:
                    raise

    async def _pause(self, deadline: float) -> None:
        """Waits before the next try. Raises BmcTimeout when there is no time left for one."""
        pause = self.timing.retransmit_seconds[0]
        if asyncio.get_running_loop().time() + pause >= deadline:
            raise BmcTimeout("the BMC forgets every session before it is open")
        await asyncio.sleep(pause)

    async def _try(self, suite: rmcp.CipherSuite, silent: int, deadline: float) -> Session:
        """One try. Raises TimeoutError on silence; frees the BMC's slot whenever it fails."""
        self.counters.handshakes += 1
        handshake = Handshake(
            credentials=self.credentials,
            suite=suite,
            privilege=self.privilege,
            entropy=self.entropy,
        )
        try:
            self.transport.sendto(handshake.start())
            while True:
                step = await self._step(handshake, silent, deadline)
                if isinstance(step, Session):
                    return step
                self.transport.sendto(step)
        except BaseException:
            goodbye = handshake.abandon()
            if goodbye is not None:
                self.transport.sendto(goodbye)
            raise

    async def _step(self, handshake: Handshake, silent: int, deadline: float) -> bytes | Session:
        steps = self.timing.handshake_step_seconds
        wait = steps[min(silent, len(steps) - 1)] * random.uniform(0.8, 1.0)  # noqa: S311  # as above
        until = min(deadline, asyncio.get_running_loop().time() + wait)
        while True:
            datagram = await self.wire.receive(until)
            try:
                return handshake.receive(datagram)
            except MalformedPacket:
                self.counters.dropped += 1
