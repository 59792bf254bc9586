"""What virsh says of a hypervisor's domains, as values. Pure.

The text is that of one virsh process which lists the active domains, reads their counters, and
lists them again:

    7d5a3f52-8a6e-4f0a-9a50-0f4b5c9d7e01 1 instance-00000001

    Domain: 'instance-00000001'
      state.state=1
      block.0.name=vda
      block.0.wr.bytes=16777216

    7d5a3f52-8a6e-4f0a-9a50-0f4b5c9d7e01 1 instance-00000001

`domstats` knows domains by name only, and a name may pass to another domain at any moment: a domain
counts only if both lists say the same of it. What virsh leaves out (it does not wait for a domain
that is busy) is left out here too: absent is not zero.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final
from uuid import UUID

LIST_COMMAND: Final = "list --id --uuid --name"
STATS_COMMAND: Final = (
    "domstats --raw --nowait --list-active --state --cpu-total --block --interface"
)
READ_COMMANDS: Final = f"{LIST_COMMAND}; {STATS_COMMAND}; {LIST_COMMAND}"
"""The one argument of virsh that prints the text that `parse` reads."""

MAX_COUNTER: Final = 2**64 - 1
"""libvirt's counters are unsigned 64 bit numbers."""

_LISTED = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\s+([0-9]{1,9})\s(.+)")
_DOMAIN = re.compile(r"Domain: '(.*)'")
_FIELD = re.compile(r"  ([a-z][a-zA-Z0-9._-]*)=(.*)")
_NUMBER = re.compile(r"[0-9]{1,20}")


class DomainState(StrEnum):
    """libvirt's virDomainState, in its own words."""

    NO_STATE = "no_state"
    RUNNING = "running"
    BLOCKED = "blocked"
    PAUSED = "paused"
    SHUTDOWN = "shutdown"
    SHUTOFF = "shutoff"
    CRASHED = "crashed"
    PM_SUSPENDED = "pm_suspended"


_STATES = dict(enumerate(DomainState))


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """The counters of one disk of a domain."""

    device: str
    source: str | None
    read_bytes: int
    read_requests: int
    write_bytes: int
    write_requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """The counters of one network interface of a domain, as the guest sees the directions."""

    name: str
    rx_bytes: int
    rx_packets: int
    tx_bytes: int
    tx_packets: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """What was read of one active domain."""

    instance_id: UUID
    domain_id: int
    name: str
    state: DomainState
    cpu_time_ns: int | None
    disks: tuple[Disk, ...]
    interfaces: tuple[Interface, ...]


def parse(text: str) -> list[Domain]:
    """Return the domains that both lists and the counters name, in virsh's order.

    A line that cannot be read is passed over, and a disk or an interface without all of its
    counters is left out.
    """
    before: dict[str, tuple[UUID, int]] = {}
    after: dict[str, tuple[UUID, int]] = {}
    stats: dict[str, dict[str, str]] = {}
    fields: dict[str, str] = {}
    for line in text.split("\n"):  # not splitlines(): a name may hold one of its other marks
        if match := _DOMAIN.fullmatch(line):
            fields = stats.setdefault(match[1], {})
        elif match := _FIELD.fullmatch(line):
            fields[match[1]] = match[2]
        elif match := _LISTED.fullmatch(line):
            listed = after if stats else before
            listed[match[3]] = (UUID(match[1]), int(match[2]))
    return [
        _domain(name, before[name], fields)
        for name, fields in stats.items()
        if name in before and before[name] == after.get(name)
    ]


def _domain(name: str, listed: tuple[UUID, int], fields: Mapping[str, str]) -> Domain:
    instance_id, domain_id = listed
    return Domain(
        instance_id=instance_id,
        domain_id=domain_id,
        name=name,
        state=_STATES.get(_number(fields, "state.state") or 0, DomainState.NO_STATE),
        cpu_time_ns=_number(fields, "cpu.time"),
        disks=tuple(_disks(fields)),
        interfaces=tuple(_interfaces(fields)),
    )


def _number(fields: Mapping[str, str], key: str) -> int | None:
    text = fields.get(key, "")
    number = int(text) if _NUMBER.fullmatch(text) else None
    return number if number is not None and number <= MAX_COUNTER else None


def _devices(fields: Mapping[str, str], kind: str) -> Iterator[tuple[str, str]]:
    """The prefix and the name of each, once a name."""
    names = set()
    for index in range(min(_number(fields, f"{kind}.count") or 0, len(fields))):
        name = fields.get(f"{kind}.{index}.name")
        if name and name not in names:
            names.add(name)
            yield f"{kind}.{index}", name


def _disks(fields: Mapping[str, str]) -> Iterator[Disk]:
    for prefix, device in _devices(fields, "block"):
        read_bytes = _number(fields, f"{prefix}.rd.bytes")
        read_requests = _number(fields, f"{prefix}.rd.reqs")
        write_bytes = _number(fields, f"{prefix}.wr.bytes")
        write_requests = _number(fields, f"{prefix}.wr.reqs")
        if (
            read_bytes is None
            or read_requests is None
            or write_bytes is None
            or write_requests is None
        ):
            continue
        yield Disk(
            device=device,
            source=fields.get(f"{prefix}.path") or None,
            read_bytes=read_bytes,
            read_requests=read_requests,
            write_bytes=write_bytes,
            write_requests=write_requests,
        )


def _interfaces(fields: Mapping[str, str]) -> Iterator[Interface]:
    for prefix, name in _devices(fields, "net"):
        rx_bytes = _number(fields, f"{prefix}.rx.bytes")
        rx_packets = _number(fields, f"{prefix}.rx.pkts")
        tx_bytes = _number(fields, f"{prefix}.tx.bytes")
        tx_packets = _number(fields, f"{prefix}.tx.pkts")
        if rx_bytes is None or rx_packets is None or tx_bytes is None or tx_packets is None:
            continue
        yield Interface(
            name=name,
            rx_bytes=rx_bytes,
            rx_packets=rx_packets,
            tx_bytes=tx_bytes,
            tx_packets=tx_packets,
        )
