"""One actor a BMC: whoever wants something of a BMC puts it in the actor's row.

BMCs have about four sessions and crash or fall silent when asked too fast. So each has one actor in
the process that drives it, with one session, one command in flight, a pause between commands, and
the urgent first. The actor opens its session on demand, keeps it for a while and ends with it; a
thousand idle BMCs cost nothing.

Invariants: a command is sent by one actor only, and once; `ipmi_error` does not leave this module,
callers get the service's errors; whoever stops waiting is not answered and not served.
"""

import asyncio
import contextlib
import dataclasses
import enum
import itertools
import time
import uuid
from typing import Final

from hostler_baremetal import errors, ipmi_client, ipmi_command
from hostler_baremetal.credentials import Unopenable, Vault
from hostler_baremetal.ipmi_client import BmcAddress, Connection, Counters, Timing
from hostler_baremetal.ipmi_command import BootDevice, BootMode, ChassisAction, Command
from hostler_baremetal.ipmi_error import (
    AuthenticationFailed,
    BmcTimeout,
    BmcUnreachable,
    CommandRefused,
    IpmiError,
    MalformedPacket,
    SessionRefused,
)
from hostler_baremetal.ipmi_session import Credentials
from hostler_baremetal.metrics import Metrics
from hostler_baremetal.node import Node
from hostler_baremetal.power import PowerState
from hostler_common import errors as common_errors
from hostler_common import logs

log = logs.get(__name__)


class Urgency(enum.IntEnum):
    """Who goes first."""

    ACTION = 0
    LOOK = 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a BMC says of its node's power, and the cipher suite that it was said under."""

    state: PowerState
    suite: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How a BMC is treated."""

    timeout_seconds: float
    interval_seconds: float
    linger_seconds: float
    timing: Timing = dataclasses.field(default_factory=Timing)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    data: bytes
    suite: int


@dataclasses.dataclass(slots=True, kw_only=True)
class _Request:
    node: Node
    command: Command
    answer: asyncio.Future[_Answer]


_STALE_SESSION_SECONDS: Final = 3.0


class Fleet:
    """The actors of this process. `run` must be running while commands are given."""

    def __init__(
        self, vault: Vault, pace: Pace, *, handshake_concurrency: int, metrics: Metrics
    ) -> None:
        self._vault = vault
        self._pace = pace
        self._metrics = metrics
        self._handshakes = asyncio.Semaphore(handshake_concurrency)
        self._actors: dict[uuid.UUID, _Actor] = {}
        self._group: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Keeps the actors until cancelled; then every session is closed."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            try:
                await asyncio.Event().wait()
            finally:
                self._group = None

    async def read_power(self, node: Node, *, urgency: Urgency) -> Reading:
        """Returns whether the node is on, as its BMC says now. Raises as `control`."""
        answer = await self._execute(node, ipmi_command.GET_CHASSIS_STATUS, urgency)
        try:
            status = ipmi_command.parse_chassis_status(answer.data)
        except MalformedPacket as exc:
            raise _translated(node, exc) from exc
        state = PowerState.ON if status.power_on else PowerState.OFF
        return Reading(state=state, suite=answer.suite)

    async def control(self, node: Node, action: ChassisAction) -> None:
        """Has the BMC take a chassis command, sent once: when this returns, it has.

        Raises:
            BmcSilent: no answer in time; the command may have been taken.
            BmcUnreachable: the BMC cannot be reached, or opens no session.
            BmcAuthenticationFailed: it does not accept the credentials.
            BmcRefused: it answered with a completion code.
            CredentialsUnreadable: the credentials cannot be opened.
        """
        await self._execute(node, ipmi_command.chassis_control(action), Urgency.ACTION)

    async def set_boot_device(
        self, node: Node, device: BootDevice, *, persistent: bool, mode: BootMode
    ) -> None:
        """Has the node boot from a device next time, or from now on. Raises as `control`.

        May be called again: it says the same again.
        """
        # boards drop the flags after 60 s without a power command, unless told not to; some do
        # not know that parameter, which is no reason to fail
        try:
            await self._execute(node, ipmi_command.KEEP_BOOT_FLAGS, Urgency.ACTION)
        except errors.BmcRefused:
            log.info("boot_flags_may_expire", node=node.name)
        command = ipmi_command.set_boot_flags(device, persistent=persistent, mode=mode)
        await self._execute(node, command, Urgency.ACTION)

    async def _execute(self, node: Node, command: Command, urgency: Urgency) -> _Answer:
        if self._group is None:
            raise errors.BmcUnreachable("this process is stopping")
        actor = self._actors.get(node.id)
        if actor is None:
            actor = _Actor(self._vault, self._pace, self._handshakes, self._metrics)
            self._actors[node.id] = actor
            self._group.create_task(self._run(node.id, actor), name=f"bmc {node.name}")
        answer: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()
        actor.put(urgency, _Request(node=node, command=command, answer=answer))
        return await answer

    async def _run(self, node_id: uuid.UUID, actor: "_Actor") -> None:
        try:
            await actor.run()
        finally:
            # between the actor's last look into its row and here nothing else has run
            del self._actors[node_id]
            actor.refuse_all()

    @property
    def nodes(self) -> list[uuid.UUID]:
        """The nodes whose BMCs are being talked to."""
        return list(self._actors)


class _Actor:
    def __init__(
        self, vault: Vault, pace: Pace, handshakes: asyncio.Semaphore, metrics: Metrics
    ) -> None:
        self._vault = vault
        self._pace = pace
        self._handshakes = handshakes
        self._metrics = metrics
        self._row: asyncio.PriorityQueue[tuple[int, int, _Request]] = asyncio.PriorityQueue()
        self._serial = itertools.count()
        self._last = float("-inf")

    def put(self, urgency: Urgency, request: _Request) -> None:
        self._row.put_nowait((urgency, next(self._serial), request))

    def refuse_all(self) -> None:
        while not self._row.empty():
            _, _, request = self._row.get_nowait()
            _fail(request, errors.BmcUnreachable("this process is stopping"))

    async def run(self) -> None:
        """Serves until nobody has asked for as long as a session lingers."""
        request = await self._next(self._pace.linger_seconds)
        while request is not None:
            request = await self._session(request)

    async def _next(self, patience_seconds: float) -> _Request | None:
        """Returns the next request that somebody still waits for, or None."""
        deadline = asyncio.get_running_loop().time() + patience_seconds
        while True:
            try:
                _, _, request = self._row.get_nowait()
            except asyncio.QueueEmpty:
                try:
                    async with asyncio.timeout_at(deadline):
                        _, _, request = await self._row.get()
                except TimeoutError:
                    if self._row.empty():
                        return None
                    continue
            if not request.answer.done():
                return request

    async def _session(self, first: _Request) -> _Request | None:
        """Serves requests in one session, and returns the one to begin the next session with."""
        following: _Request | None = None
        counters = Counters()
        try:
            credentials = self._open(first.node)
            async with contextlib.AsyncExitStack() as stack:
                async with self._handshakes:
                    connection = await stack.enter_async_context(
                        ipmi_client.connect(
                            _address(first.node),
                            credentials,
                            timeout_seconds=self._pace.timeout_seconds,
                            suites=_suites(first.node),
                            timing=self._pace.timing,
                            counters=counters,
                        )
                    )
                with self._metrics.sessions.track_inprogress():
                    following = await self._serve(connection, first)
        except (IpmiError, common_errors.HostlerError) as exc:
            # no session came about, or it broke: those it happened to in a session are told already
            _fail(first, _translated(first.node, exc))
        except asyncio.CancelledError:
            _fail(first, errors.BmcSilent("this process is stopping"))
            raise
        finally:
            self._metrics.count_wire(counters)
        return following or await self._next(0.0)

    async def _serve(self, connection: Connection, first: _Request) -> _Request | None:
        """Serves until nobody has asked for long (None), or a request needs another session (that).

        Raises what broke the session, after telling the one it happened to.
        """
        request: _Request | None = first
        idle_seconds = 0.0
        while request is not None:
            if _access(request.node) != _access(first.node):
                return request
            is_stale = idle_seconds > _STALE_SESSION_SECONDS
            if is_stale and not request.command.repeatable:
                # the BMC may have forgotten the session, and this may be said once only
                return request
            timeout_seconds = self._pace.timeout_seconds
            if is_stale:
                timeout_seconds = min(timeout_seconds, _STALE_SESSION_SECONDS)
            try:
                await self._one(connection, request, timeout_seconds)
            except BmcTimeout as exc:
                if is_stale:
                    return request
                _fail(request, _translated(request.node, exc))
                raise
            idle_since = time.monotonic()
            request = await self._next(self._pace.linger_seconds)
            idle_seconds = time.monotonic() - idle_since
        return None

    async def _one(
        self, connection: Connection, request: _Request, timeout_seconds: float
    ) -> None:
        """Gives one command. Raises BmcTimeout without, all else after telling who asked."""
        pause = self._last + self._pace.interval_seconds - time.monotonic()
        if pause > 0:
            await asyncio.sleep(pause)
        if request.answer.done():
            return
        started = time.monotonic()
        outcome = "lost"
        try:
            data = await connection.execute(request.command, timeout_seconds=timeout_seconds)
            outcome = "ok"
            if not request.answer.done():
                request.answer.set_result(_Answer(data=data, suite=connection.suite))
        except CommandRefused as exc:
            outcome = "refused"
            _fail(request, _translated(request.node, exc))
        except BmcTimeout:
            raise
        except IpmiError as exc:
            _fail(request, _translated(request.node, exc))
            raise
        except asyncio.CancelledError:
            _fail(request, errors.BmcSilent("this process is stopping"))
            raise
        finally:
            self._last = time.monotonic()
            self._metrics.command(request.command.name, outcome, self._last - started)

    def _open(self, node: Node) -> Credentials:
        access = node.access
        try:
            password = self._vault.open(access.sealed_password, belongs_to=f"{node.id}/password")
            group_key = None
            if access.sealed_group_key is not None:
                group_key = self._vault.open(
                    access.sealed_group_key, belongs_to=f"{node.id}/group_key"
                )
        except Unopenable as exc:
            raise errors.CredentialsUnreadable(f"credentials of {node.name}: {exc}") from exc
        return Credentials(
            username=access.username, password=password.decode(), group_key=group_key
        )


def _address(node: Node) -> BmcAddress:
    """The address of the node's BMC; one that was stored when more was taken for one may be none."""
    try:
        return BmcAddress.parse(node.access.address)
    except ValueError as exc:
        raise BmcUnreachable(f"{node.access.address}: {exc}") from exc


def _access(node: Node) -> tuple[object, ...]:
    access = node.access
    return (
        access.address,
        access.username,
        access.sealed_password,
        access.sealed_group_key,
        access.cipher_suites,
    )


def _suites(node: Node) -> list[int]:
    """The suites that may be used, the one that worked last in front."""
    return sorted(
        node.access.cipher_suites,
        key=lambda number: (number != node.working_suite, -number),
    )


def _fail(request: _Request, error: common_errors.HostlerError) -> None:
    if not request.answer.done():
        request.answer.set_exception(error)


def _translated(
    node: Node, exc: IpmiError | common_errors.HostlerError
) -> common_errors.HostlerError:
    """Returns the service's error for one of the driver's, its cause attached."""
    error: common_errors.HostlerError
    match exc:
        case common_errors.HostlerError():
            return exc
        case AuthenticationFailed():
            error = errors.BmcAuthenticationFailed(f"{node.name}: {exc}")
        case BmcTimeout():
            error = errors.BmcSilent(f"{node.name}: {exc}")
        case BmcUnreachable() | SessionRefused():
            error = errors.BmcUnreachable(f"{node.name}: {exc}")
        case CommandRefused():
            error = errors.BmcRefused(
                f"{node.name}: {exc}", completion_code=f"{exc.completion_code:#04x}"
            )
        case MalformedPacket() | _:
            error = errors.BmcUnreachable(f"{node.name}: {exc}")
    error.__cause__ = exc
    return error
