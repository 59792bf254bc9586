"""The host's side of capacity: say what this host has, uses and can do, again and again.

Numbers come from an inventory file, read anew for every report, or from the kernel where there is
none. A report goes out with a publisher confirm; one that was not confirmed is not sent again: the
next turn says something newer. No database, no FastAPI.
"""

import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar
from uuid import uuid4

from prometheus_client import Counter
from pydantic import Field, TypeAdapter, ValidationError

from hostler_common import errors, hosts, settings
from hostler_common.agent import AgentContext
from hostler_common.hosts import NodeRecord

GIB = 1024**3
CONNECT_SECONDS = 10.0
MEMINFO = Path("/proc/meminfo")


class ReportSettings(settings.ProcessSettings):
    """`HOSTLER_CAPACITY_*` of the agent."""

    service: ClassVar[str] = "capacity"

    report_seconds: float = Field(30.0, gt=0, description="how often the host reports")
    inventory_file: Path | None = Field(
        None, description="JSON: a list of nodes as in a host report; else this machine itself"
    )
    hypervisor_type: str = Field("QEMU", description="of this machine, without inventory_file")
    memory_mb_reserved: int = Field(512, ge=0, description="for the host itself, as above")
    disk_path: Path = Field(Path("/"), description="the file system that guests' disks are on")


class InventoryUnreadable(errors.Unavailable):
    """The inventory file is missing or wrong; the next turn reads it again."""

    code = "capacity.inventory.unreadable"


def read_inventory(path: Path) -> list[NodeRecord]:
    """Return the nodes that the file lists.

    Raises:
        InventoryUnreadable: there is no such file, or it is no list of nodes.
    """
    try:
        return TypeAdapter(list[NodeRecord]).validate_json(path.read_bytes())
    except OSError as exc:
        raise InventoryUnreadable(f"{path}: {exc.strerror}") from exc
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InventoryUnreadable(f"{path}: {where}: {first['msg']}") from exc


def read_machine(host: str, loaded: ReportSettings, meminfo: str) -> NodeRecord:
    """Return this machine as a node, from the text of /proc/meminfo, its CPUs and its disk.

    What is in use is the kernel's own word (total less available), beyond what is reserved for the
    host: guests and anything else alike, since without libvirt they cannot be told apart.

    Raises:
        KeyError: the text has neither MemTotal nor MemAvailable.
    """
    sizes_kb = {
        name: int(rest.split()[0])
        for name, _, rest in (line.partition(":") for line in meminfo.splitlines())
        if rest.strip()
    }
    total_mb = sizes_kb["MemTotal"] // 1024
    used_mb = total_mb - sizes_kb["MemAvailable"] // 1024
    disk = shutil.disk_usage(loaded.disk_path)
    return NodeRecord(
        hypervisor_hostname=host,
        hypervisor_type=loaded.hypervisor_type,
        memory_mb=total_mb,
        memory_mb_reserved=loaded.memory_mb_reserved,
        memory_mb_used=max(0, used_mb - loaded.memory_mb_reserved),
        vcpus=os.cpu_count() or 1,
        local_gb=disk.total // GIB,
        local_gb_used=-(-disk.used // GIB),
        cpu_arch=os.uname().machine,
        state=hosts.NodeState.UP,
    )


def read_nodes(host: str, loaded: ReportSettings) -> list[NodeRecord]:
    """Return what this host has: the inventory file's nodes, or else the machine itself.

    Raises:
        InventoryUnreadable: there is a file, and it is wrong.
    """
    if loaded.inventory_file is not None:
        return read_inventory(loaded.inventory_file)
    return [read_machine(host, loaded, MEMINFO.read_text())]


async def create(context: AgentContext) -> None:
    """The part of `hostler-agent` that reports this host, now and every `report_seconds`."""
    loaded = context.load(ReportSettings)
    sent = Counter(
        "hostler_capacity_reports_sent",
        "Parts of host reports that the broker confirmed.",
        registry=context.process.registry,
    )

    async def report() -> None:
        parts = hosts.split(
            host=context.host,
            reported_at=datetime.now(UTC),
            report_id=uuid4(),
            nodes=read_nodes(context.host, loaded),
        )
        # the first turn comes before the broker's connection is up
        await context.bus.wait_up(CONNECT_SECONDS)
        await context.bus.publish_many(
            [
                hosts.HOST_REPORTED.message(part, app_id="hostler-agent", host=context.host)
                for part in parts
            ]
        )
        sent.inc(len(parts))

    context.every(loaded.report_seconds, report, name="capacity_report")
