"""Carries out operations: read the power, give the command once, look until it shows.

A power command must not be given twice: boards have been broken that way, and a second cycle is a
second cycle. So an operation is committed as `issuing` before its command is sent, and whoever
finds one that is no longer `queued`, after a crash or a takeover, only looks. What cannot be proven
fails with `baremetal.operation.outcome_unknown`: a person decides.

Invariant: an operation ends, at its deadline at the latest, and its end is an event.
"""

import asyncio
import datetime
import uuid
from collections.abc import Coroutine, Sequence
from typing import Any, Final

import structlog

from hostler_baremetal import errors, messages, operation_store, power, store
from hostler_baremetal.fleet import Fleet, Reading, Urgency
from hostler_baremetal.ipmi_command import ChassisAction
from hostler_baremetal.metrics import Metrics
from hostler_baremetal.node import Node, Operation
from hostler_baremetal.operation_store import Superseded
from hostler_baremetal.power import OperationState, Plan, PowerAction, PowerState, Verdict
from hostler_baremetal.settings import Settings
from hostler_common import bus, db, logs, outbox
from hostler_common import errors as common_errors

log = logs.get(__name__)

OUTCOME_UNKNOWN: Final = "baremetal.operation.outcome_unknown"
NOT_REACHED: Final = "baremetal.operation.not_reached"
NOT_POSSIBLE: Final = "baremetal.power.not_possible"
_LOOK_SECONDS: Final = (0.2, 0.5, 1.0, 2.0, 5.0)
_AT_ONCE: Final = 256


class _Ended(Exception):
    """The operation's end: not an error of ours."""

    def __init__(self, state: OperationState, code: str | None = None, detail: str = "") -> None:
        super().__init__(detail)
        self.state = state
        self.code = code
        self.detail = detail


class Executor:
    """Carries out the operations that this process has claimed."""

    def __init__(self, pool: db.Pool, fleet: Fleet, settings: Settings, metrics: Metrics) -> None:
        self.driver = uuid.uuid4()
        self._pool = pool
        self._fleet = fleet
        self._settings = settings
        self._metrics = metrics
        self._wake = asyncio.Event()
        self._at_work: set[uuid.UUID] = set()
        self._giving = 0
        self._given = asyncio.Condition()

    def wake(self) -> None:
        """An operation was queued: do not wait for the next look at the table."""
        self._wake.set()

    async def run(self) -> None:
        """Claims and carries out operations until cancelled."""
        failing = False
        async with asyncio.TaskGroup() as group:
            while True:
                self._wake.clear()
                try:
                    await self._claim(group)
                    failing = False
                except common_errors.Unavailable as exc:
                    if not failing:
                        log.warning("operations_wait", code=exc.code)
                    failing = True
                try:
                    async with asyncio.timeout(1.0):
                        await self._wake.wait()
                except TimeoutError:
                    continue

    async def _claim(self, group: asyncio.TaskGroup) -> None:
        room = _AT_ONCE - len(self._at_work)
        if room <= 0:
            return
        async with db.transaction(self._pool) as connection:
            claimed = await operation_store.claim_operations(
                connection,
                self.driver,
                seconds=self._settings.claim_seconds,
                limit=room,
                busy=self._at_work,
            )
        for operation in claimed:
            self._at_work.add(operation.id)
            group.create_task(self._carry_out(operation), name=f"operation {operation.id}")

    async def settle(self) -> None:
        """Returns once no command is between being sent and being noted as taken."""
        async with self._given:
            await self._given.wait_for(lambda: self._giving == 0)

    async def renew(self) -> None:
        """Puts off the end of our hold on every node whose BMC is being talked to.

        Raises DatabaseUnavailable.
        """
        async with db.transaction(self._pool) as connection:
            await operation_store.renew(
                connection, self.driver, self._fleet.nodes, seconds=self._settings.claim_seconds
            )

    async def let_go(self) -> None:
        """Lets go of all nodes, so that another replica need not wait for our claim to end.

        Raises DatabaseUnavailable.
        """
        async with db.transaction(self._pool) as connection:
            await operation_store.let_go(connection, self.driver)

    # --- one operation

    async def _carry_out(self, operation: Operation) -> None:
        with structlog.contextvars.bound_contextvars(operation_id=str(operation.id)):
            try:
                while not await self._until_ended(operation):
                    operation = await self._again(operation)
            except errors.OperationNotFound:
                log.info("operation_gone")  # it went with its node
            finally:
                self._at_work.discard(operation.id)

    async def _again(self, operation: Operation) -> Operation:
        """Returns what the database says of the operation, once it is back."""
        while True:
            await asyncio.sleep(1.0)
            try:
                async with db.connection(self._pool) as connection:
                    return await operation_store.get(connection, operation.id)
            except common_errors.Unavailable:
                continue

    async def _until_ended(self, operation: Operation) -> bool:
        """Carries the operation on; False if the database went away and it must be read again."""
        if operation.is_finished:
            return True
        try:
            await self._attempt(operation)
        except (errors.NodeNotFound, Superseded) as exc:
            log.info("operation_superseded", reason=str(exc))
        except db.DatabaseUnavailable as exc:
            log.info("operation_waits", code=exc.code)
            return False
        return True

    async def _attempt(self, operation: Operation) -> None:
        async with db.connection(self._pool) as connection:
            node = await store.get_node(connection, operation.node_id)
        reading: Reading | None = None
        end = _Ended(OperationState.SUCCEEDED)
        try:
            if operation.kind == "power":
                reading = await self._power(operation, node)
            else:
                await self._boot_device(operation, node)
        except _Ended as ended:
            end = ended
        except errors.BmcAuthenticationFailed as exc:
            await latch(self._pool, node, exc.detail)
            end = _Ended(OperationState.FAILED, exc.code, exc.detail)
        except (errors.BmcRefused, errors.Fenced, errors.CredentialsUnreadable) as exc:
            end = _Ended(OperationState.FAILED, exc.code, exc.detail)
        await self._end(operation, node, end, reading)

    async def _boot_device(self, operation: Operation, node: Node) -> None:
        """Setting it twice is setting it: after a crash it is simply done again."""
        args = messages.BootDeviceArgs.model_validate(operation.args)
        attempt = 0
        issued = operation.state is not OperationState.QUEUED
        while True:
            if not issued:
                async with db.transaction(self._pool) as connection:
                    await operation_store.issue(connection, operation, driver=self.driver)
                issued = True
            try:
                await self._fleet.set_boot_device(
                    node, args.device, persistent=args.persistent, mode=args.mode
                )
                return
            except errors.BmcUnreachable as exc:
                await self._pause(operation, attempt, exc)
                attempt += 1

    async def _power(self, operation: Operation, node: Node) -> Reading:
        """Returns the reading that shows the target. Raises _Ended for every other end."""
        action = PowerAction(operation.args["action"])
        acknowledged = operation.state is OperationState.WAITING
        issued_at = operation.issued_at
        if operation.state is OperationState.QUEUED:
            reading = await self._look(operation, node)
            command = power.plan(action, reading.state)
            if command is Plan.NOTHING:
                return reading
            if isinstance(command, Plan):
                raise _Ended(
                    OperationState.FAILED,
                    NOT_POSSIBLE,
                    f"{action} is not possible while {node.name} is {reading.state}",
                )
            self._giving += 1
            try:
                async with db.transaction(self._pool) as connection:
                    issued_at = await operation_store.issue(
                        connection, operation, driver=self.driver
                    )
                log.info("power_command_issued", command=command.name.lower())
                acknowledged = await self._give(operation, node, command)
            finally:
                self._giving -= 1
                async with self._given:
                    self._given.notify_all()
        else:
            log.info("operation_resumed", state=str(operation.state))
        assert issued_at is not None
        return await self._until_shown(
            operation, node, action, issued_at=issued_at, acknowledged=acknowledged
        )

    async def _give(self, operation: Operation, node: Node, command: ChassisAction) -> bool:
        """Gives the command, once. Returns whether the BMC said that it took it."""
        try:
            await self._fleet.control(node, command)
        except errors.BmcUnreachable as exc:
            log.warning("power_command_unanswered", code=exc.code, detail=exc.detail)
            return False
        async with db.transaction(self._pool) as connection:
            await operation_store.acknowledged(connection, operation)
        return True

    async def _until_shown(
        self,
        operation: Operation,
        node: Node,
        action: PowerAction,
        *,
        issued_at: datetime.datetime,
        acknowledged: bool,
    ) -> Reading:
        seen_off = False
        attempt = 0
        while True:
            reading = await self._look(operation, node, attempt)
            seen_off = seen_off or reading.state is PowerState.OFF
            verdict = power.judge(
                action,
                observed=reading.state,
                acknowledged=acknowledged,
                seen_off=seen_off,
                seconds_since_issue=(_now() - issued_at).total_seconds(),
            )
            match verdict:
                case Verdict.REACHED:
                    return reading
                case Verdict.UNPROVEN:
                    raise _Ended(
                        OperationState.FAILED,
                        OUTCOME_UNKNOWN,
                        f"the BMC of {node.name} never said that it took the command;"
                        f" the node is {reading.state}",
                    )
                case Verdict.WAIT:
                    await self._pause(operation, attempt, None)
                    attempt += 1

    async def _look(self, operation: Operation, node: Node, attempt: int = 0) -> Reading:
        """Reads the power until the BMC says, or the deadline has passed."""
        while True:
            try:
                return await self._fleet.read_power(node, urgency=Urgency.ACTION)
            except errors.BmcUnreachable as exc:
                await self._pause(operation, attempt, exc)
                attempt += 1

    async def _pause(
        self, operation: Operation, attempt: int, because: errors.BmcUnreachable | None
    ) -> None:
        """Waits before the next look. Raises _Ended when the deadline comes before that."""
        pause = _LOOK_SECONDS[min(attempt, len(_LOOK_SECONDS) - 1)]
        left = (operation.deadline_at - _now()).total_seconds()
        if left > 0:
            await asyncio.sleep(min(pause, left))
            return
        if because is not None:
            raise _Ended(OperationState.FAILED, because.code, because.detail) from because
        raise _Ended(
            OperationState.FAILED,
            NOT_REACHED,
            "the command was given, and the node did not follow",
        )

    async def _end(
        self, operation: Operation, node: Node, end: _Ended, reading: Reading | None
    ) -> None:
        async with db.transaction(self._pool) as connection:
            ended = await operation_store.finish(
                connection, operation, end.state, code=end.code, detail=end.detail or None
            )
            published = [finished_message(ended)]
            if reading is not None:
                observed_at = _now()
                before = await operation_store.observed(
                    connection,
                    node.id,
                    reading.state,
                    observed_at=observed_at,
                    working_suite=reading.suite,
                    next_poll_seconds=self._settings.poll_seconds,
                )
                if before is not None and before.node.power_state is not reading.state:
                    published.append(
                        messages.POWER_CHANGED.message(
                            messages.PowerChanged(
                                node_uuid=node.id,
                                name=node.name,
                                before=before.node.power_state,
                                after=reading.state,
                                observed_at=observed_at,
                                operation_id=operation.id,
                            ),
                            app_id=messages.APP_ID,
                        )
                    )
            await outbox.add(connection, published)
        seconds = (_now() - operation.created_at).total_seconds()
        action = str(operation.args.get("action", operation.kind))
        self._metrics.operations.labels(operation.kind, action, end.code or "ok").inc()
        self._metrics.operation_seconds.labels(operation.kind, action).observe(seconds)
        log.info(
            "operation_finished",
            node=node.name,
            action=action,
            state=str(end.state),
            code=end.code,
            seconds=round(seconds, 3),
        )


async def drive(
    executor: Executor, works: Sequence[Coroutine[Any, Any, None]], *, settle_seconds: float
) -> None:
    """Runs the works until cancelled; commands on their way are seen to their answer before that."""
    async with asyncio.TaskGroup() as group:
        for work in works:
            group.create_task(work)
        try:
            await asyncio.Event().wait()
        finally:
            try:
                async with asyncio.timeout(settle_seconds):
                    await executor.settle()
            except TimeoutError:
                log.warning("commands_left_unanswered")
            try:
                await executor.let_go()
            except common_errors.Unavailable as exc:
                log.info("nodes_not_let_go", code=exc.code)


def timeout_of(args: messages.PowerArgs | messages.BootDeviceArgs, settings: Settings) -> float:
    """Returns how long an operation may take."""
    if isinstance(args, messages.PowerArgs) and args.action is PowerAction.SOFT:
        return settings.soft_off_timeout_seconds
    return settings.power_timeout_seconds


def finished_message(operation: Operation) -> bus.Message:
    """Returns the event of an operation's end; its id is the operation's, so it is one event."""
    return messages.OPERATION_FINISHED.message(
        messages.OperationFinished(
            operation_id=operation.id,
            node_uuid=operation.node_id,
            kind=operation.kind,
            args=dict(operation.args),
            state="succeeded" if operation.state is OperationState.SUCCEEDED else "failed",
            code=operation.code,
            detail=operation.detail,
            fencing_token=operation.fencing_token,
        ),
        app_id=messages.APP_ID,
        message_id=str(operation.id),
    )


async def latch(pool: db.Pool, node: Node, reason: str) -> None:
    """Leaves the node's BMC alone until its credentials change. Raises DatabaseUnavailable."""
    async with db.transaction(pool) as connection:
        latched = await operation_store.latch(
            connection, node.id, generation=node.generation, reason=reason
        )
        if latched is None:
            return
        event = messages.NodeLatched(node_uuid=node.id, name=node.name, reason=reason)
        await outbox.add(
            connection, [messages.NODE_LATCHED.message(event, app_id=messages.APP_ID)]
        )
    log.warning("bmc_latched", node=node.name, reason=reason)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
