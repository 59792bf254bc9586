"""Commands from RabbitMQ: parse, queue the operation, and leave the rest to the executor.

The command's operation id makes it one operation however often it is delivered. A command that is
refused is answered too, with the event `baremetal.operation.finished`.
"""

import uuid
from collections.abc import Callable
from typing import Final

from pydantic import ValidationError

from hostler_baremetal import errors, messages, operation_store, store
from hostler_baremetal.executor import timeout_of
from hostler_baremetal.settings import Settings
from hostler_common import bus, db, logs, outbox
from hostler_common import errors as common_errors

log = logs.get(__name__)

MALFORMED: Final = "baremetal.command.malformed"


class Commands:
    """Handles the proxy's command queue."""

    def __init__(self, pool: db.Pool, settings: Settings, wake: Callable[[], None]) -> None:
        self._pool = pool
        self._settings = settings
        self._wake = wake

    async def handle(self, delivery: bus.Delivery) -> None:
        """Queues the command's operation, or answers that it is refused.

        Raises Reject for what is no command, or holds what no column can; DatabaseUnavailable.
        """
        try:
            command = messages.Command.model_validate_json(delivery.body).root
        except ValidationError as exc:
            found = "; ".join(
                f"{'.'.join(str(part) for part in error['loc'])}: {error['msg']}"
                for error in exc.errors(include_input=False, include_url=False)
            )
            raise bus.Reject(found, code=MALFORMED) from exc
        try:
            async with db.transaction(self._pool) as connection:
                await self._queue(connection, command, delivery.app_id or "unknown")
        except (common_errors.Conflict, errors.NodeNotFound) as exc:
            await self._refuse(command, exc)
            return
        except db.Unstorable as exc:
            raise bus.Reject(exc.detail, code=MALFORMED) from exc
        self._wake()

    async def _queue(
        self,
        connection: db.Connection,
        command: messages.PowerCommand | messages.BootDeviceCommand,
        requested_by: str,
    ) -> None:
        node = await store.get_node(connection, command.node_uuid, for_update=True)
        if await operation_store.find(connection, command.operation_id) is not None:
            log.info("command_repeated", operation_id=str(command.operation_id))
            return
        operation = await operation_store.create(
            connection,
            node,
            operation_id=command.operation_id,
            kind=command.command,
            args=command.args.model_dump(mode="json"),
            fencing_token=command.fencing_token,
            requested_by=requested_by,
            timeout_seconds=timeout_of(command.args, self._settings),
        )
        if operation.id != command.operation_id:
            # the same is under way already, under another id: both ids must have an end
            raise errors.NodeBusy(
                f"operation {operation.id} does the same already",
                operation_id=str(operation.id),
            )
        log.info("command_taken", operation_id=str(operation.id), node=node.name)

    async def _refuse(
        self,
        command: messages.PowerCommand | messages.BootDeviceCommand,
        error: common_errors.HostlerError,
    ) -> None:
        event = messages.OperationFinished(
            operation_id=command.operation_id,
            node_uuid=command.node_uuid,
            kind=command.command,
            args=command.args.model_dump(mode="json"),
            state="failed",
            code=error.code,
            detail=error.detail,
            fencing_token=command.fencing_token,
        )
        message = messages.OPERATION_FINISHED.message(
            event,
            app_id=messages.APP_ID,
            message_id=str(uuid.uuid5(command.operation_id, "refused")),
        )
        async with db.transaction(self._pool) as connection:
            await outbox.add(connection, [message])
        log.info("command_refused", operation_id=str(command.operation_id), code=error.code)
