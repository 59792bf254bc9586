"""What virsh prints becomes samples, and what it leaves out stays out; a run is told from the next."""

import itertools
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hostler_usage import agent
from hostler_usage.reading import domain_stats
from hostler_usage.reading.domain_stats import Disk, Domain, DomainState, Interface
from hostler_usage.reading.sample import SAMPLES_PER_REPORT, DomainRun, DomainSample, SampleReport

UUID = uuid.UUID("7d5a3f52-8a6e-4f0a-9a50-0f4b5c9d7e01")
OTHER = uuid.UUID("7d5a3f52-8a6e-4f0a-9a50-0f4b5c9d7e02")
BOOT = uuid.UUID("9e764ee9-1957-4384-949f-95a9adbd994e")

# printed by virsh 9.0.0 for a guest that had written 16 MiB and sent three packets of 1042 bytes
LIST = "7d5a3f52-8a6e-4f0a-9a50-0f4b5c9d7e01 1 guest"
STATS = """\
Domain: 'guest'
  state.state=1
  state.reason=1
  cpu.time=3750000000
  cpu.user=2760000000
  cpu.system=990000000
  cpu.cache.monitor.count=0
  cpu.haltpoll.success.time=0
  cpu.haltpoll.fail.time=0
  net.count=1
  net.0.name=guest0
  net.0.rx.bytes=176
  net.0.rx.pkts=2
  net.0.rx.errs=0
  net.0.rx.drop=0
  net.0.tx.bytes=3126
  net.0.tx.pkts=3
  net.0.tx.errs=0
  net.0.tx.drop=0
  block.count=1
  block.0.name=vda
  block.0.path=/var/lib/nova/instances/7d5a/disk
  block.0.backingIndex=1
  block.0.rd.reqs=2
  block.0.rd.bytes=4608
  block.0.rd.times=191005
  block.0.wr.reqs=20
  block.0.wr.bytes=16777216
  block.0.wr.times=5659255
  block.0.fl.reqs=1
  block.0.fl.times=5625732
  block.0.allocation=16777216
  block.0.capacity=67108864
  block.0.physical=16777216
"""


def text(before: str, stats: str, after: str) -> str:
    return "\n".join([before, "", stats, after, ""])


def parse(stats: str) -> Domain:
    (domain,) = domain_stats.parse(text(LIST, stats, LIST))
    return domain


def test_every_counter_is_read_from_what_virsh_prints() -> None:
    assert parse(STATS) == Domain(
        instance_id=UUID,
        domain_id=1,
        name="guest",
        state=DomainState.RUNNING,
        cpu_time_ns=3_750_000_000,
        disks=(
            Disk(
                device="vda",
                source="/var/lib/nova/instances/7d5a/disk",
                read_bytes=4608,
                read_requests=2,
                write_bytes=16 * 1024 * 1024,
                write_requests=20,
            ),
        ),
        interfaces=(
            Interface(name="guest0", rx_bytes=176, rx_packets=2, tx_bytes=3126, tx_packets=3),
        ),
    )


def test_a_busy_domain_of_which_virsh_says_little_has_no_counters_rather_than_zeros() -> None:
    domain = parse("Domain: 'guest'\n  state.state=3\n  block.count=1\n  block.0.name=vda\n")
    assert (domain.state, domain.cpu_time_ns) == (DomainState.PAUSED, None)
    assert (domain.disks, domain.interfaces) == ((), ())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (LIST, ""),  # it ended
        ("", LIST),  # it began
        (LIST, f"{UUID} 2 guest"),  # it was started again
        (LIST, f"{OTHER} 1 guest"),  # its name is another domain's now
    ],
)
def test_a_domain_that_changed_while_it_was_read_is_left_out(before: str, after: str) -> None:
    assert domain_stats.parse(text(before, STATS, after)) == []


@pytest.mark.parametrize("value", ["-1", "", "18446744073709551616", "1e3", "٣", "0x10"])
def test_what_is_no_counter_is_left_out_with_its_disk(value: str) -> None:
    domain = parse(STATS.replace("wr.bytes=16777216", f"wr.bytes={value}"))
    assert domain.disks == ()
    assert len(domain.interfaces) == 1


def test_the_largest_counter_of_libvirt_passes() -> None:
    domain = parse(STATS.replace("wr.bytes=16777216", "wr.bytes=18446744073709551615"))
    assert domain.disks[0].write_bytes == domain_stats.MAX_COUNTER


def test_a_count_beyond_what_follows_costs_nothing() -> None:
    assert len(parse(STATS.replace("block.count=1", "block.count=4294967295")).disks) == 1


def test_a_device_named_twice_counts_once() -> None:
    second = "".join(
        line.replace("block.0", "block.1") + "\n"
        for line in STATS.splitlines()
        if line.startswith("  block.0")
    )
    domain = parse(STATS.replace("block.count=1", "block.count=2") + second)
    assert [disk.device for disk in domain.disks] == ["vda"]


def test_a_state_that_we_do_not_know_is_no_state() -> None:
    assert parse(STATS.replace("state.state=1", "state.state=99")).state is DomainState.NO_STATE


@pytest.mark.parametrize("name", ["it's", "a  b ", "1 guest", "ü x", "'"])
def test_any_name_is_followed_from_the_list_to_the_counters(name: str) -> None:
    listed = f"{UUID} 1 {name}"
    (domain,) = domain_stats.parse(text(listed, STATS.replace("'guest'", f"'{name}'"), listed))
    assert (domain.name, domain.instance_id) == (name, UUID)


_names = st.text(min_size=1).filter(lambda name: "\n" not in name)
_counters = st.integers(0, domain_stats.MAX_COUNTER)
_disks = st.builds(
    Disk,
    device=_names,
    source=st.none() | _names,
    read_bytes=_counters,
    read_requests=_counters,
    write_bytes=_counters,
    write_requests=_counters,
)
_interfaces = st.builds(
    Interface,
    name=_names,
    rx_bytes=_counters,
    rx_packets=_counters,
    tx_bytes=_counters,
    tx_packets=_counters,
)
_domains = st.builds(
    Domain,
    instance_id=st.uuids(),
    domain_id=st.integers(0, 999_999_999),
    name=_names,
    state=st.sampled_from(DomainState),
    cpu_time_ns=st.none() | _counters,
    disks=st.lists(_disks, unique_by=lambda disk: disk.device, max_size=12).map(tuple),
    interfaces=st.lists(_interfaces, unique_by=lambda each: each.name, max_size=3).map(tuple),
)


def printed(domains: Sequence[Domain]) -> str:
    """What virsh would print of the domains."""
    lines = []
    for domain in domains:
        lines += [
            f"Domain: '{domain.name}'",
            f"  state.state={list(DomainState).index(domain.state)}",
        ]
        if domain.cpu_time_ns is not None:
            lines.append(f"  cpu.time={domain.cpu_time_ns}")
        lines.append(f"  net.count={len(domain.interfaces)}")
        for index, each in enumerate(domain.interfaces):
            lines += [
                f"  net.{index}.name={each.name}",
                f"  net.{index}.rx.bytes={each.rx_bytes}",
                f"  net.{index}.rx.pkts={each.rx_packets}",
                f"  net.{index}.tx.bytes={each.tx_bytes}",
                f"  net.{index}.tx.pkts={each.tx_packets}",
            ]
        lines.append(f"  block.count={len(domain.disks)}")
        for index, disk in enumerate(domain.disks):
            lines.append(f"  block.{index}.name={disk.device}")
            if disk.source is not None:
                lines.append(f"  block.{index}.path={disk.source}")
            lines += [
                f"  block.{index}.rd.reqs={disk.read_requests}",
                f"  block.{index}.rd.bytes={disk.read_bytes}",
                f"  block.{index}.wr.reqs={disk.write_requests}",
                f"  block.{index}.wr.bytes={disk.write_bytes}",
            ]
        lines.append("")
    listed = "\n".join(f"{each.instance_id} {each.domain_id} {each.name}" for each in domains)
    return text(listed, "\n".join(lines), listed)


@given(st.lists(_domains, max_size=4, unique_by=lambda domain: domain.name))
def test_whatever_virsh_prints_of_domains_reads_back_as_it_was(domains: list[Domain]) -> None:
    assert domain_stats.parse(printed(domains)) == domains


@given(
    st.text() | st.lists(st.sampled_from([*text(LIST, STATS, LIST).split("\n")])).map("\n".join)
)
def test_no_text_is_too_strange_to_be_read(strange: str) -> None:
    for domain in domain_stats.parse(strange):
        agent.to_samples([domain], boot_id=BOOT, starts_before={}, starts_after={})


# --- runs and reports


def run(boot_id: uuid.UUID = BOOT, domain_id: int = 1, ticks: int | None = 500) -> DomainRun:
    return DomainRun(boot_id=boot_id, domain_id=domain_id, process_start_ticks=ticks)


@pytest.mark.parametrize(
    ("later", "continues"),
    [
        (run(), True),
        (run(ticks=None), True),  # the process was not to be seen: the rest decides
        (run(domain_id=2), False),
        (run(ticks=501), False),  # libvirtd was restarted, and gave the number out again
        (run(boot_id=OTHER), False),
    ],
)
def test_a_run_is_told_from_the_next_one(later: DomainRun, continues: bool) -> None:
    assert later.continues(run()) is run().continues(later) is continues


def test_a_domain_whose_process_changed_while_it_was_read_is_left_out() -> None:
    domain = parse(STATS)

    def sampled(before: dict[uuid.UUID, int], after: dict[uuid.UUID, int]) -> list[DomainSample]:
        return agent.to_samples([domain], boot_id=BOOT, starts_before=before, starts_after=after)

    assert sampled({UUID: 500}, {UUID: 700}) == sampled({UUID: 500}, {}) == []
    (sample,) = sampled({UUID: 500}, {UUID: 500})
    assert sample.run == run()
    (sample,) = sampled({}, {})
    assert sample.run == run(ticks=None)


def test_a_sample_says_on_the_wire_what_was_read() -> None:
    samples = agent.to_samples(
        [parse(STATS)], boot_id=BOOT, starts_before={UUID: 500}, starts_after={UUID: 500}
    )
    (report,) = agent.to_reports(host="hv", sampled_at=datetime.now(UTC), samples=samples)
    assert SampleReport.model_validate_json(report.model_dump_json(exclude_none=True)) == report
    (said,) = report.model_dump(mode="json")["samples"]
    assert said == {
        "instance_id": str(UUID),
        "run": {"boot_id": str(BOOT), "domain_id": 1, "process_start_ticks": 500},
        "state": "running",
        "cpu_time_ns": 3_750_000_000,
        "disks": [
            {
                "device": "vda",
                "source": "/var/lib/nova/instances/7d5a/disk",
                "read_bytes": 4608,
                "read_requests": 2,
                "write_bytes": 16_777_216,
                "write_requests": 20,
            }
        ],
        "interfaces": [
            {"name": "guest0", "rx_bytes": 176, "rx_packets": 2, "tx_bytes": 3126, "tx_packets": 3}
        ],
    }


@pytest.mark.parametrize(
    ("domains", "sizes"),
    [(0, [0]), (1, [1]), (SAMPLES_PER_REPORT, [200]), (2 * SAMPLES_PER_REPORT + 1, [200, 200, 1])],
)
def test_every_domain_of_a_large_host_is_in_one_report(domains: int, sizes: list[int]) -> None:
    samples = [
        DomainSample(instance_id=uuid.uuid4(), run=run(), state=DomainState.RUNNING)
        for _ in range(domains)
    ]
    reports = agent.to_reports(host="hv", sampled_at=datetime.now(UTC), samples=samples)
    assert [len(report.samples) for report in reports] == sizes
    assert list(itertools.chain.from_iterable(each.samples for each in reports)) == samples
    assert len({report.report_id for report in reports}) == len(reports)


@pytest.mark.parametrize(
    "field",
    [{"samples": [{}]}, {"sampled_at": "2026-05-07T00:00:00"}, {"host": ""}, {"report_id": "7"}],
)
def test_a_report_that_is_none_is_refused(field: dict[str, object]) -> None:
    (report,) = agent.to_reports(host="hv", sampled_at=datetime.now(UTC), samples=[])
    with pytest.raises(ValidationError):
        SampleReport.model_validate({**report.model_dump(), **field})
