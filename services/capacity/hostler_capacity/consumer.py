"""Host reports from the wire: parse, apply in one transaction, say which claims that confirmed.

A report that cannot be read is rejected to quarantine with its body. One that is outdated or came
before is a normal thing: it is counted and changes nothing.
"""

from typing import Final

from pydantic import ValidationError

from hostler_capacity import messages, report_store
from hostler_capacity.inventory import Guest, ReportedNode
from hostler_capacity.metrics import Metrics
from hostler_capacity.report import Part
from hostler_capacity.report_store import Policy, Recorded
from hostler_capacity.resources import (
    DISK_BPS,
    DISK_GB,
    DISK_IOPS,
    MEMORY_MB,
    VCPUS,
    ResourceClass,
)
from hostler_common import bus, db, hosts, logs, outbox

log = logs.get(__name__)

MALFORMED: Final = "capacity.report.malformed"
YEARS: Final = range(1970, 9999)
"""What a host's clock can show; beyond that, times cannot be counted with."""


class ReportConsumer:
    """Applies host reports to one database."""

    def __init__(self, pool: db.Pool, policy: Policy, metrics: Metrics) -> None:
        self._pool = pool
        self._policy = policy
        self._metrics = metrics

    async def on_host_reported(self, delivery: bus.Delivery) -> None:
        """The part is applied, or known not to count, when this returns.

        Raises:
            Reject: the body is not a host report, or holds what no column can.
            DatabaseUnavailable: nothing was applied.
        """
        try:
            body = hosts.HostReport.model_validate_json(delivery.body)
        except ValidationError as exc:
            raise bus.Reject(_explain(exc), code=MALFORMED) from exc
        part = _part(body)
        try:
            recorded = await self._record(part)
        except db.Unstorable as exc:
            raise bus.Reject(exc.detail, code=MALFORMED) from exc
        self._metrics.report_parts.labels(recorded.admission).inc()
        self._metrics.nodes_moved.inc(recorded.moved)
        self._metrics.nodes_absent.inc(recorded.absent)
        self._metrics.claims.labels("confirmed").inc(len(recorded.confirmed))
        log.info(
            "host_reported",
            host=part.host,
            admission=recorded.admission,
            part=part.part,
            parts=part.parts,
            nodes=recorded.nodes,
            outdated_nodes=recorded.outdated_nodes,
            moved=recorded.moved,
            absent=recorded.absent,
            confirmed=len(recorded.confirmed),
        )

    async def _record(self, part: Part) -> Recorded:
        async with db.transaction(self._pool) as connection:
            recorded = await report_store.record(connection, part, self._policy)
            await outbox.add(
                connection,
                [
                    messages.claim_message(messages.CLAIM_CONFIRMED, each)
                    for each in recorded.confirmed
                ],
            )
        return recorded


def _explain(exc: ValidationError) -> str:
    found = exc.errors(include_url=False, include_input=False, include_context=False)
    first = found[0]
    where = ".".join(str(part) for part in first["loc"])
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"{where or 'body'}: {first['msg']}{more}"


def _part(body: hosts.HostReport) -> Part:
    if body.reported_at.year not in YEARS:
        raise bus.Reject(f"reported_at: no clock shows {body.reported_at}", code=MALFORMED)
    return Part(
        host=body.host,
        report_id=body.report_id,
        reported_at=body.reported_at,
        part=body.part,
        parts=body.parts,
        nodes=[_node(record) for record in body.nodes],
    )


def _node(record: hosts.NodeRecord) -> ReportedNode:
    total: dict[ResourceClass, int] = {
        MEMORY_MB: record.memory_mb,
        VCPUS: record.vcpus,
        DISK_GB: record.local_gb,
    }
    if record.disk_iops is not None:
        total[DISK_IOPS] = record.disk_iops
    if record.disk_bps is not None:
        total[DISK_BPS] = record.disk_bps
    return ReportedNode(
        hypervisor_hostname=record.hypervisor_hostname,
        node_uuid=record.node_uuid,
        hypervisor_type=record.hypervisor_type,
        bare_metal=record.is_bare_metal,
        total=total,
        reserved={MEMORY_MB: record.memory_mb_reserved},
        used={
            MEMORY_MB: record.memory_mb_used,
            VCPUS: record.vcpus_used,
            DISK_GB: record.local_gb_used,
        },
        guests=None
        if record.guests is None
        else [
            Guest(
                uuid=guest.uuid,
                memory_mb=guest.memory_mb,
                vcpus=guest.vcpus,
                vm_type=guest.vm_type,
                overhead_mb=guest.overhead_mb,
            )
            for guest in record.guests
        ],
        disabled=record.disabled,
        available=record.state in (None, *hosts.NodeState),
        state=record.state,
        zone=record.zone,
        traits=tuple(record.traits),
    )
