"""Sample reports: what the agent on a compute host says that libvirt has counted for its domains.

Published by the agent's part on exchange `hostler` with key `usage.sampled.<host>`; a host's name
may have dots, so bind `usage.sampled.#`. Every counter is cumulative: it counts from zero since
the *run* of the domain began, and what moved between two samples is their difference as long as
the later one `continues` the earlier. If it does not, all that the later one says has moved since
that run began.

What begins a run, so that every counter is zero again: the domain is started, whoever does it (a
first boot, stop and start, a hard reboot, a restore from a saved state), or it arrives by live
migration (its host is another one then, too). What does not: a reboot inside the guest, pause and
resume, a restart of libvirtd. Within a run a single device begins again at zero when it is
unplugged and another one is plugged in under its name: a counter that fell says so.

What a run moved after its last sample is never said: libvirt's counters end with the run. A
domain that began and ended between two samples is in none. So the sums are never too high, and too
low by at most what moved in one interval at the end of each run.
"""

from __future__ import annotations

from typing import Annotated, Final
from uuid import UUID

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from hostler_common import bus, hosts
from hostler_usage.reading.domain_stats import MAX_COUNTER, DomainState

SAMPLES_PER_REPORT: Final = 200
"""The most domains one report names; a host with more sends more than one report."""

Counter = Annotated[int, Field(ge=0, le=MAX_COUNTER)]
Word = Annotated[str, Field(min_length=1)]


class DomainRun(BaseModel):
    """One run of a domain: from the start of its process on one host to that process's end."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    boot_id: UUID
    """Linux's id of the host's own run (`/proc/sys/kernel/random/boot_id`)."""
    domain_id: Annotated[int, Field(ge=0)]
    """libvirt's number of the run. After a restart of libvirtd it may give one out again."""
    process_start_ticks: Counter | None = None
    """When the domain's QEMU process began, in clock ticks since the host did (field 22 of
    `/proc/PID/stat`). None where the agent cannot see that process."""

    def continues(self, earlier: DomainRun) -> bool:
        """Whether both may be the same run, as far as both say; the counters have the last word."""
        starts = {self.process_start_ticks, earlier.process_start_ticks} - {None}
        return (
            self.boot_id == earlier.boot_id
            and self.domain_id == earlier.domain_id
            and len(starts) < 2
        )


class DiskSample(BaseModel):
    """What the guest has read from and written to one disk since the run began."""

    model_config = ConfigDict(extra="ignore", frozen=True, from_attributes=True)

    device: Word
    """The disk's name in the domain: `vda`."""
    source: str | None = None
    """The file or block device behind it, where it is one: it may tell the volume."""
    read_bytes: Counter
    read_requests: Counter
    write_bytes: Counter
    write_requests: Counter


class InterfaceSample(BaseModel):
    """What the guest has received (rx) and sent (tx) since the run began."""

    model_config = ConfigDict(extra="ignore", frozen=True, from_attributes=True)

    name: Word
    """The host's end of it; Neutron's begin with `tap` and eleven characters of the port's id."""
    rx_bytes: Counter
    rx_packets: Counter
    tx_bytes: Counter
    tx_packets: Counter


class DomainSample(BaseModel):
    """What libvirt has counted for one domain since its run began.

    A disk, an interface or a CPU time that is not named is unknown, not zero: libvirt does not
    wait for a domain that is busy.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, from_attributes=True)

    instance_id: UUID
    """The domain's UUID: Nova gives it the instance's."""
    run: DomainRun
    state: DomainState
    cpu_time_ns: Counter | None = None
    """Of all its CPUs and of the emulator, user and system together."""
    disks: list[DiskSample] = Field(default_factory=list)
    interfaces: list[InterfaceSample] = Field(default_factory=list)


class SampleReport(BaseModel):
    """What a host's libvirt said, no later than `sampled_at`, of some of its running domains.

    A statement about those that it names and no others: a domain that is in no report may well
    run. A report that the broker did not confirm is not sent again, for the next one says more;
    one id may arrive twice all the same, and reports may overtake each other.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    host: hosts.Name
    sampled_at: AwareDatetime
    """The host's clock when all had been read: what is counted here moved before."""
    report_id: UUID
    samples: Annotated[list[DomainSample], Field(max_length=SAMPLES_PER_REPORT)]


USAGE_SAMPLED: Final = bus.EventType(
    routing_key="usage.sampled.{host}",
    model=SampleReport,
    schema="1.0",
    summary="What libvirt has counted for a host's domains: CPU time, disk and network traffic",
)
