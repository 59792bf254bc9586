"""Which parts of which reports count."""

import uuid
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hostler_capacity.report import Admission, Latest, Part, admit
from hostler_common import hosts

NOW = datetime(2026, 1, 1, tzinfo=UTC)
STALE = timedelta(minutes=3)
FIRST = uuid.UUID(int=1)
SECOND = uuid.UUID(int=2)


def part(
    report_id: uuid.UUID = FIRST, *, at: datetime = NOW, number: int = 1, parts: int = 2
) -> Part:
    return Part(host="h", report_id=report_id, reported_at=at, part=number, parts=parts, nodes=())


def latest(
    *, at: datetime = NOW, received_at: datetime = NOW, seen: frozenset[int] = frozenset({1})
) -> Latest:
    return Latest(
        report_id=FIRST, reported_at=at, received_at=received_at, parts=2, parts_seen=seen
    )


@pytest.mark.parametrize(
    ("known", "arriving", "expected"),
    [
        (None, part(), Admission.NEW_REPORT),
        (latest(), part(number=2), Admission.NEXT_PART),
        (latest(), part(number=1), Admission.DUPLICATE),
        (latest(), part(number=2, parts=3), Admission.DUPLICATE),
        (latest(), part(SECOND, at=NOW + timedelta(seconds=1)), Admission.NEW_REPORT),
        (latest(), part(SECOND, at=NOW - timedelta(seconds=1)), Admission.OUTDATED),
        (latest(), part(SECOND), Admission.OUTDATED),
    ],
)
def test_a_part_counts_once_and_only_while_its_report_is_the_newest(
    known: Latest | None, arriving: Part, expected: Admission
) -> None:
    assert admit(known, arriving, now=NOW, stale=STALE) is expected


def test_a_report_that_looks_older_counts_when_the_newer_one_has_gone_stale() -> None:
    ahead = latest(at=NOW + timedelta(hours=1), received_at=NOW - STALE - timedelta(seconds=1))
    assert admit(ahead, part(SECOND), now=NOW, stale=STALE) is Admission.NEW_REPORT


def test_a_report_from_long_ago_never_makes_a_stale_host_look_alive() -> None:
    silent = latest(received_at=NOW - timedelta(hours=1))
    old = part(SECOND, at=NOW - timedelta(minutes=30))
    assert admit(silent, old, now=NOW, stale=STALE) is Admission.OUTDATED


def test_a_report_is_whole_when_every_part_has_arrived() -> None:
    assert latest().completed_by(part(number=2))
    assert not latest(seen=frozenset()).completed_by(part(number=2))


def record(number: int, *, guests: int = 0) -> hosts.NodeRecord:
    return hosts.NodeRecord(
        hypervisor_hostname=f"node-{number}",
        hypervisor_type="QEMU",
        memory_mb=1,
        vcpus=1,
        guests=[
            hosts.GuestRecord(uuid=uuid.UUID(int=each), memory_mb=1, vcpus=1)
            for each in range(guests)
        ],
    )


@given(count=st.integers(0, 650), guests=st.sampled_from([0, 0, 40]))
def test_a_split_report_names_every_node_once_in_order_in_small_parts(
    count: int, guests: int
) -> None:
    nodes = [record(number, guests=guests) for number in range(min(count, 260 if guests else 650))]
    parts = hosts.split(host="h", reported_at=NOW, report_id=FIRST, nodes=nodes)
    assert [node for each in parts for node in each.nodes] == nodes
    assert [each.part for each in parts] == list(range(1, len(parts) + 1))
    assert {each.parts for each in parts} == {len(parts)}
    assert all(len(each.nodes) <= 200 for each in parts)
    assert all(len(each.model_dump_json()) < 256 * 1024 for each in parts)


def test_a_host_without_nodes_still_gives_a_whole_report() -> None:
    (only,) = hosts.split(host="h", reported_at=NOW, report_id=FIRST, nodes=[])
    assert (only.part, only.parts, only.nodes) == (1, 1, [])


def test_two_nodes_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="same hypervisor_hostname"):
        hosts.split(host="h", reported_at=NOW, report_id=FIRST, nodes=[record(1), record(1)])


def test_a_report_survives_the_wire_and_ignores_what_it_does_not_know() -> None:
    (sent,) = hosts.split(host="h", reported_at=NOW, report_id=FIRST, nodes=[record(1, guests=2)])
    message = hosts.HOST_REPORTED.message(sent, app_id="test", host="h.example.org")
    assert message.routing_key == "host.reported.h.example.org"
    body = message.body.replace(b'{"host"', b'{"novelty": 1, "host"')
    assert hosts.HostReport.model_validate_json(body) == sent


@pytest.mark.parametrize(
    "change",
    [
        {"part": 2, "parts": 1},
        {"part": 0},
        {"host": ""},
        {"host": "a\u0000b"},
        {"nodes": [record(1).model_dump()] * 2},
        {"nodes": [{**record(1).model_dump(), "memory_mb": 2**60}]},
    ],
)
def test_a_report_that_makes_no_sense_is_refused(change: dict[str, object]) -> None:
    good = {"host": "h", "reported_at": NOW, "report_id": FIRST, "nodes": []}
    hosts.HostReport.model_validate(good)
    with pytest.raises(ValidationError):
        hosts.HostReport.model_validate({**good, **change})
