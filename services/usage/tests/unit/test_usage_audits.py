"""Audits beside histories: what a real Nova sends, what is lost, and what silence means."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler_usage.auditing.absences import Known, absences, expected_periods
from hostler_usage.auditing.audits import (
    MEANINGS,
    AuditStatement,
    Code,
    Lived,
    Reconciliation,
    Status,
    Told,
    Verdict,
    audit_statement,
    deletion,
    launch,
    whole_periods,
)
from hostler_usage.auditing.reconciliation import reconcile, reconcile_said
from hostler_usage.history.intervals import Interval, Provenance
from hostler_usage.history.ledger import reckon
from hostler_usage.reading.envelope import open_body
from hostler_usage.reading.mapping_file import packaged, read
from hostler_usage.reading.normalise import Normaliser
from hostler_usage.reading.statement import Evidence, Scalar, Statement
from hostler_usage.testing import LARGE, SMALL, InstanceLife, Message, Step, VolumeLife, VolumeStep

DAY = datetime(2026, 5, 8, tzinfo=UTC)
HOUR, MINUTE, SECOND = timedelta(hours=1), timedelta(minutes=1), timedelta(seconds=1)
MAPPING = packaged()
INSTANCE = MAPPING.resources["instance"]
NORMALISER = Normaliser(MAPPING)
DOCUMENT = Path(__file__).parents[4] / "docs" / "usage-audits.md"

SIZE: dict[str, Scalar] = {"project": "p1", "flavor": "m1.small", "vcpus": 1, "state": "active"}


def witness(name: str, at: datetime = DAY) -> Evidence:
    return Evidence(event_time=at, message_id=name, digest=name.encode())


def interval(
    start: datetime,
    end: datetime | None = None,
    *,
    by: str = "create",
    closed_by: str | None = None,
    provenance: Provenance = Provenance.EVENTS,
    **changes: Scalar,
) -> Interval:
    return Interval(
        start=start,
        end=end,
        attributes={**SIZE, "host": "h1", **changes},
        opened_by=(witness(by),),
        closed_by=() if end is None else (witness(closed_by or "event"),),
        provenance=provenance,
    )


def hourly(
    hour: datetime,
    *,
    launched_at: datetime | None,
    said_after: timedelta = 30 * SECOND,
    ended_at: datetime | None = None,
    name: str = "hourly",
    **changes: Scalar,
) -> AuditStatement:
    """The `exists` of the hour that begins at `hour`."""
    said_at = hour + HOUR + said_after
    return AuditStatement(
        evidence=witness(f"{name}-{hour:%d%H%M}", said_at),
        said_at=said_at,
        period_start=hour,
        period_end=hour + HOUR,
        born_at=launched_at,
        ended_at=ended_at,
        fields={**SIZE, "host": "h1", **changes},
    )


def partial(at: datetime, *, launched_at: datetime, **changes: Scalar) -> AuditStatement:
    """The `exists` of the hour so far, sent just before something happens."""
    return AuditStatement(
        evidence=witness(f"partial-{at:%d%H%M}", at),
        said_at=at,
        period_start=at.replace(minute=0, second=0, microsecond=0),
        period_end=at - timedelta(milliseconds=12),
        born_at=launched_at,
        fields={**SIZE, "host": "h1", **changes},
    )


def told(*moments: datetime) -> list[Told]:
    return [Told(at=moment, evidence=witness(f"event-{moment}")) for moment in moments]


def brief(verdicts: Iterable[Verdict]) -> list[tuple[Status, Code, str | None, int]]:
    return [(item.status, item.code, item.field, item.periods) for item in verdicts]


AGREED = (Status.VERIFIED, Code.AGREED, None, 1)


# --- one statement beside one history


def test_an_audit_that_agrees_verifies_its_period() -> None:
    born = DAY + 10 * MINUTE
    found = reconcile(
        INSTANCE, [interval(born)], [hourly(DAY, launched_at=born)], launches=told(born)
    )
    (verdict,) = found.verdicts
    assert brief([verdict]) == [AGREED]
    assert (verdict.period_start, verdict.period_end) == (DAY, DAY + HOUR)
    assert (verdict.project_id, verdict.host, verdict.statements) == ("p1", "h1", 1)
    assert verdict.evidence == (witness("hourly-080000", DAY + HOUR + 30 * SECOND),)
    assert found.confirmed_at == DAY + HOUR + 30 * SECOND


def test_equal_verdicts_of_a_day_are_one_row_that_midnight_cuts() -> None:
    audits = [hourly(DAY + n * HOUR, launched_at=DAY) for n in range(30)]
    found = reconcile(INSTANCE, [interval(DAY)], audits, launches=told(DAY)).verdicts
    assert [(item.periods, item.statements) for item in found] == [(24, 24), (6, 6)]
    assert found[0].period_end == found[1].period_start == DAY + 24 * HOUR
    assert found[1].evidence == (audits[-1].evidence,)
    assert len([period for item in found for period in whole_periods(item)]) == 30


def test_the_three_spellings_of_a_launch_are_one_moment() -> None:
    born = DAY + timedelta(minutes=4, seconds=51, microseconds=882856)
    cut, rounded = born.replace(microsecond=0), born.replace(microsecond=0) + SECOND
    audits = [
        hourly(DAY, launched_at=cut, name="versioned"),
        hourly(DAY, launched_at=rounded, name="legacy"),
    ]
    found = reconcile(INSTANCE, [interval(born)], audits, launches=told(born)).verdicts
    assert brief(found) == [AGREED]
    assert found[0].statements == 2


def test_twins_that_disagree_with_each_other_leave_a_mismatch() -> None:
    audits = [
        hourly(DAY, launched_at=DAY, name="versioned", vcpus=2),
        hourly(DAY, launched_at=DAY, name="legacy"),
    ]
    (found,) = reconcile(INSTANCE, [interval(DAY)], audits, launches=told(DAY)).verdicts
    assert brief([found]) == [(Status.MISMATCH, Code.FIELD_DIFFERS, "vcpus", 1)]
    assert (found.ours, found.theirs) == (1, 2)
    assert found.evidence == (audits[0].evidence,)


@pytest.mark.parametrize(
    ("field", "theirs"),
    [
        ("project", "p2"),
        ("flavor", "m1.large"),
        ("vcpus", 4),
        ("memory_mb", 4096),
        ("disk_gb", 40),
        ("image", "another"),
        ("os", "another"),
        ("state", "stopped"),
        ("host", "h2"),
    ],
)
def test_each_compared_field_that_differs_is_named_with_both_values(
    field: str, theirs: Scalar
) -> None:
    ours: dict[str, Scalar] = {"memory_mb": 2048, "disk_gb": 20, "image": "i1", "os": "ubuntu"}
    history = [replace(interval(DAY), attributes={**interval(DAY).attributes, **ours})]
    audit = hourly(DAY, launched_at=DAY)
    audit = replace(audit, fields={**audit.fields, **ours, field: theirs})
    (found,) = reconcile(INSTANCE, history, [audit], launches=told(DAY)).verdicts
    assert (found.code, found.field, found.theirs) == (Code.FIELD_DIFFERS, field, theirs)
    assert found.ours == history[0].attributes[field]
    assert found.project_id == "p1"


def test_what_a_format_leaves_out_is_not_compared() -> None:
    history = [interval(DAY, os="ubuntu", image="i1")]
    audit = hourly(DAY, launched_at=DAY, os=None, image=None)
    assert brief(reconcile(INSTANCE, history, [audit]).verdicts) == [AGREED]


def test_flavor_and_state_are_those_at_audit_time_not_at_the_end_of_the_period() -> None:
    """2.4b: resized at 16:00:10, the audit of 15:00-16:00 runs at 16:00:30."""
    resized = DAY + HOUR + 10 * SECOND
    history = [interval(DAY, resized), interval(resized, flavor="m1.large", state="resized")]
    launches = told(DAY, resized)
    at_audit = hourly(DAY, launched_at=resized, flavor="m1.large", state="resized")
    assert brief(reconcile(INSTANCE, history, [at_audit], launches=launches).verdicts) == [AGREED]
    read_before = hourly(DAY, launched_at=DAY)
    assert brief(reconcile(INSTANCE, history, [read_before], launches=launches).verdicts) == [
        (Status.VERIFIED, Code.AGREED_EARLIER, None, 1)
    ]


def test_what_was_ours_before_the_period_ended_only_is_a_mismatch() -> None:
    """The audit reads after the period's end: a resize before it cannot be unseen."""
    resized = DAY + 50 * MINUTE
    history = [interval(DAY, resized), interval(resized, flavor="m1.large")]
    audit = hourly(DAY, launched_at=DAY)
    found = reconcile(INSTANCE, history, [audit], launches=told(DAY, resized)).verdicts
    assert {(item.code, item.field) for item in found} == {
        (Code.FIELD_DIFFERS, "flavor"),
        (Code.LAUNCHED_AT_DIFFERS, "launched_at"),
    }


def test_a_partial_audit_beside_the_hourly_one_is_no_duplicate() -> None:
    """2.4b: the partial one comes before resize.prep, with the old flavor, and both overlap."""
    resized = DAY + 30 * MINUTE
    history = [interval(DAY, resized), interval(resized, flavor="m1.large")]
    audits = [
        partial(DAY + 20 * MINUTE, launched_at=DAY),
        hourly(DAY, launched_at=resized, flavor="m1.large"),
    ]
    found = reconcile(INSTANCE, history, audits, launches=told(DAY, resized)).verdicts
    assert sorted((item.is_partial, item.code) for item in found) == [
        (False, Code.AGREED),
        (True, Code.AGREED),
    ]


@pytest.mark.parametrize(
    ("start", "end", "said_after", "is_partial"),
    [
        (DAY, DAY + HOUR, 30 * SECOND, False),
        (DAY, DAY + 24 * HOUR, MINUTE, False),
        (datetime(2026, 2, 1, tzinfo=UTC), datetime(2026, 3, 1, tzinfo=UTC), MINUTE, False),
        (DAY + 15 * MINUTE, DAY + 75 * MINUTE, MINUTE, False),  # hour@15
        (DAY, DAY + 20 * MINUTE, timedelta(), True),
        (DAY, DAY + HOUR, timedelta(), True),  # sent as it ends: by chance a whole hour so far
        (DAY, DAY - MINUTE, timedelta(), True),
    ],
)
def test_a_statement_is_partial_where_its_period_is_cut_short(
    start: datetime, end: datetime, said_after: timedelta, is_partial: bool
) -> None:
    statement = AuditStatement(
        evidence=witness("a"), said_at=end + said_after, period_start=start, period_end=end
    )
    assert statement.is_partial == is_partial
    assert statement.period[0] <= statement.period[1]


def test_a_deleted_instance_may_have_two_more_audits_and_not_a_third() -> None:
    """2.4b: deleted between the hour and the audit; both say so; a third would be about nothing."""
    ended = DAY + HOUR + 10 * SECOND
    history = [interval(DAY, ended)]
    audits = [
        hourly(DAY + n * HOUR, launched_at=DAY, ended_at=ended, state="deleted") for n in range(3)
    ]
    found = reconcile(
        INSTANCE, history, audits, launches=told(DAY), deletions=told(ended)
    ).verdicts
    assert brief(found) == [
        (Status.VERIFIED, Code.AGREED, None, 2),
        (Status.UNEXPECTED, Code.AFTER_END, None, 1),
    ]


def test_deleted_at_is_compared_within_a_second() -> None:
    """terminated_at is rounded where deleted_at has its fraction."""
    ended = DAY + 30 * MINUTE + timedelta(microseconds=700_000)
    history = [interval(DAY, ended)]
    for theirs, code in (
        (ended.replace(microsecond=0), Code.AGREED),
        (ended + 5 * SECOND, Code.DELETED_AT_DIFFERS),
    ):
        audit = hourly(DAY, launched_at=DAY, ended_at=theirs, state="deleted")
        (found,) = reconcile(
            INSTANCE, history, [audit], launches=told(DAY), deletions=told(ended)
        ).verdicts
        assert found.code is code


def test_the_codes_of_winchester_are_told_apart() -> None:
    ended = DAY + 30 * MINUTE
    alive, dead = [interval(DAY)], [interval(DAY, ended)]
    cases: list[tuple[str, Sequence[Interval], AuditStatement]] = [
        ("U1", alive, hourly(DAY, launched_at=None)),
        ("U2", alive, hourly(DAY, launched_at=DAY - HOUR)),
        ("U3", dead, hourly(DAY, launched_at=DAY, ended_at=ended)),
        ("U4", dead, hourly(DAY, launched_at=ended + HOUR, ended_at=ended, state="deleted")),
        ("U5", alive, hourly(DAY, launched_at=DAY, ended_at=ended, state="deleted")),
        ("U6", dead, hourly(DAY, launched_at=DAY)),
        ("U8", [], hourly(DAY, launched_at=DAY)),
    ]
    for name, history, audit in cases:
        found = reconcile(
            INSTANCE, history, [audit], launches=told(DAY), deletions=told(ended)
        ).verdicts
        assert name in {MEANINGS[item.code].winchester for item in found}, name
    twice = told(ended, ended + 5 * MINUTE)
    found = reconcile(INSTANCE, dead, [], launches=told(DAY), deletions=twice).verdicts
    assert [MEANINGS[item.code].winchester for item in found] == ["U7"]
    assert brief(found) == [(Status.MISMATCH, Code.DELETED_TWICE, "deleted_at", 1)]


def test_twins_of_a_delete_event_are_not_two_deletes() -> None:
    ended = DAY + 30 * MINUTE + timedelta(microseconds=300_000)
    twins = told(ended, ended.replace(microsecond=0))
    found = reconcile(INSTANCE, [interval(DAY, ended)], [], deletions=twins)
    assert found.verdicts == ()


def test_whole_periods_that_overlap_are_named() -> None:
    audits = [
        hourly(DAY, launched_at=DAY),
        hourly(DAY + 30 * MINUTE, launched_at=DAY, name="shifted"),
    ]
    found = reconcile(INSTANCE, [interval(DAY)], audits, launches=told(DAY)).verdicts
    (overlap,) = [item for item in found if item.code is Code.PERIODS_OVERLAP]
    assert (overlap.period_start, overlap.period_end) == (DAY + 30 * MINUTE, DAY + HOUR)
    assert overlap.evidence == (audits[0].evidence, audits[1].evidence)


def test_a_rebuild_that_changes_nothing_metered_still_sets_launched_at_anew() -> None:
    """No interval begins there; the event told of it, so later audits agree."""
    rebuilt = DAY + 2 * HOUR
    audits = [hourly(DAY + HOUR, launched_at=rebuilt), hourly(DAY + 2 * HOUR, launched_at=rebuilt)]
    with_event = reconcile(INSTANCE, [interval(DAY)], audits, launches=told(DAY, rebuilt))
    assert brief(with_event.verdicts) == [(Status.VERIFIED, Code.AGREED, None, 2)]
    without = reconcile(INSTANCE, [interval(DAY)], audits, launches=told(DAY))
    assert brief(without.verdicts) == [
        (Status.REPAIRED, Code.RELAUNCH_REPAIRED, "launched_at", 1),
        AGREED,  # the first one told of it
    ]
    assert (without.verdicts[0].ours, without.verdicts[0].theirs) == (
        DAY.isoformat(),
        rebuilt.isoformat(),
    )


@pytest.mark.parametrize(
    ("resource_type", "field", "ours", "theirs"),
    [
        ("volume", "size_gb", 10, 20),
        ("volume", "volume_type", "ssd", "hdd"),
        ("snapshot", "size_gb", 10, 20),
        ("image", "size_bytes", 1000, 2000),
        ("floating_ip", "state", "allocated", "associated"),
        ("floating_ip", "project", "p1", "p2"),
    ],
)
def test_other_types_have_their_own_fields(
    resource_type: str, field: str, ours: Scalar, theirs: Scalar
) -> None:
    history = [replace(interval(DAY), attributes={"project": "p1", field: ours})]
    audit = AuditStatement(
        evidence=witness("a", DAY + 2 * HOUR),
        said_at=DAY + 2 * HOUR,
        born_at=DAY,
        fields={"project": "p1", field: ours},
    )
    assert brief(reconcile(MAPPING.resources[resource_type], history, [audit]).verdicts) == [
        AGREED
    ]
    wrong = replace(audit, fields={**audit.fields, field: theirs})
    (found,) = reconcile(MAPPING.resources[resource_type], history, [wrong]).verdicts
    assert (found.code, found.field, found.ours, found.theirs) == (
        Code.FIELD_DIFFERS,
        field,
        ours,
        theirs,
    )


@pytest.mark.parametrize(
    ("every", "at", "start", "end"),
    [
        (HOUR, DAY + 5 * HOUR + 3 * MINUTE, DAY + 5 * HOUR, DAY + 6 * HOUR),
        (HOUR, DAY + 5 * HOUR, DAY + 5 * HOUR, DAY + 6 * HOUR),
        (24 * HOUR, DAY + 5 * HOUR + 3 * MINUTE, DAY, DAY + 24 * HOUR),
        (24 * HOUR, DAY + 24 * HOUR - SECOND, DAY, DAY + 24 * HOUR),
    ],
)
def test_what_names_no_period_speaks_of_the_hour_or_day_it_was_sent_in(
    every: timedelta, at: datetime, start: datetime, end: datetime
) -> None:
    """neutron-usage-audit sends no audit period, and runs as often as its crontab says."""
    audit = AuditStatement(evidence=witness("a", at), said_at=at, born_at=DAY, every=every)
    (found,) = reconcile(MAPPING.resources["floating_ip"], [interval(DAY)], [audit]).verdicts
    assert (found.period_start, found.period_end) == (start, end)
    assert (found.status, found.is_partial) == (Status.VERIFIED, False)


def test_how_often_audits_run_that_name_no_period_is_the_mapping_s_to_say() -> None:
    (example,) = DOCUMENT.read_text().split("```yaml\n")[1:]
    daily = read(example.partition("```")[0])
    row = {"id": "f1", "project_id": "p1", "floating_ip_address": "172.24.4.227", "port_id": None}
    said: list[tuple[Statement, Evidence]] = []
    for at in (DAY, DAY + 3 * HOUR, DAY + 27 * HOUR):
        name = "create.end" if at == DAY else "exists"
        message = Message(
            topic="notifications",
            event_type=f"floatingip.{name}",
            publisher_id="network.ctl1",
            timestamp=at,
            payload={"floatingip": row},
            message_id=f"{name}/{at}",
        )
        said += said_by([message])
    for mapping, hours in ((MAPPING, [(3, 4), (27, 28)]), (daily, [(0, 24), (24, 48)])):
        verdicts = reckon(mapping.resources["floating_ip"], said).reconciliation.verdicts
        assert [
            ((item.period_start - DAY) / HOUR, (item.period_end - DAY) / HOUR) for item in verdicts
        ] == hours
        assert {item.code for item in verdicts} == {Code.AGREED}


# --- lives as Nova and Cinder tell them


def said_by(messages: Iterable[Message]) -> list[tuple[Statement, Evidence]]:
    found: list[tuple[Statement, Evidence]] = []
    for message in messages:
        notification = open_body(message.body())
        evidence = Evidence(
            event_time=notification.timestamp,
            message_id=notification.message_id,
            digest=notification.digest,
        )
        found += [
            (said.statement, evidence)
            for said in NORMALISER.read(notification, region="r1").said
            if said.statement is not None
        ]
    return found


def audited(messages: Iterable[Message], resource_type: str = "instance") -> Reconciliation:
    said = said_by(messages)
    ledger = reckon(MAPPING.resources[resource_type], said)
    return reconcile_said(MAPPING.resources[resource_type], ledger.intervals, said)


def of_volume(*steps: VolumeStep, without: Iterable[str] = ()) -> list[Verdict]:
    """The verdicts on a volume that no audit spoke of, some of its events lost."""
    life = VolumeLife(volume_id="v1", project_id="p1", steps=steps)
    kept = [item for item in life.messages() if item.event_type not in without]
    return list(audited(kept, "volume").verdicts)


def test_a_volume_that_is_being_deleted_for_hours_is_there_until_it_is() -> None:
    """Its delete may hang or fail; nothing but an end is one."""
    life = VolumeLife(volume_id="v1", project_id="p1", steps=(CREATED,))
    kept = [
        replace(item, payload=item.payload | {"status": "deleting"})
        if item.timestamp > DAY + 3 * HOUR
        else item
        for item in life.messages(audits_until=DAY + 6 * HOUR)
    ]
    said = said_by(kept)
    ledger = reckon(MAPPING.resources["volume"], said)
    assert ledger.intervals[-1].end is None
    assert brief(ledger.reconciliation.verdicts) == [(Status.VERIFIED, Code.AGREED, None, 5)]


CREATED = VolumeStep(at=DAY + HOUR, action="create", size_gb=10)
EXTENDED = VolumeStep(at=DAY + 3 * HOUR, action="extend", size_gb=20)


@pytest.mark.parametrize(
    "later",
    [
        VolumeStep(at=DAY + 5 * HOUR, action="attach", instance_id="i1"),
        VolumeStep(at=DAY + 5 * HOUR, action="transfer", project_id="p2"),
        VolumeStep(at=DAY + 5 * HOUR, action="delete"),
    ],
)
def test_a_lost_change_that_the_event_of_something_else_lets_slip_is_named(
    later: VolumeStep,
) -> None:
    (found,) = of_volume(CREATED, EXTENDED, later, without=["volume.resize.end"])
    assert (found.status, found.code, found.field) == (
        Status.MISMATCH,
        Code.CHANGE_UNTOLD,
        "size_gb",
    )
    assert (found.ours, found.theirs, found.project_id) == (10, 20, "p1")
    # the old size was last seen when the resize began
    assert (found.period_start, found.period_end) == (EXTENDED.at - SECOND / 2, later.at)
    assert of_volume(CREATED, EXTENDED, later) == []


def test_a_lost_transfer_is_named_when_the_next_one_begins() -> None:
    """The start of an operation moves nothing; whose the volume is, it says all the same."""
    twice = [VolumeStep(at=DAY + n * HOUR, action="transfer", project_id=f"p{n}") for n in (2, 3)]
    life = VolumeLife(volume_id="v1", project_id="p1", steps=(CREATED, *twice))
    kept = [
        item
        for item in life.messages()
        if (item.event_type, item.timestamp) != ("volume.transfer.accept.end", twice[0].at)
    ]
    (found,) = audited(kept, "volume").verdicts
    assert (found.code, found.field, found.ours, found.theirs) == (
        Code.CHANGE_UNTOLD,
        "project",
        "p1",
        "p2",
    )


def test_a_change_that_nothing_shows_is_named_by_nobody_and_borne_out_by_no_audit() -> None:
    assert of_volume(CREATED, EXTENDED, without=["volume.resize.end"]) == []


def test_of_a_change_across_midnight_the_day_is_named_in_which_the_new_value_was_seen() -> None:
    attached = VolumeStep(at=DAY + 50 * HOUR, action="attach", instance_id="i1")
    (found,) = of_volume(CREATED, EXTENDED, attached, without=["volume.resize.end"])
    assert (found.period_start, found.period_end) == (DAY + 48 * HOUR, attached.at)


def nova_body(event: str, at: datetime, **payload: Any) -> Message:
    """A legacy body of an instance that was launched at `DAY`."""
    known = {
        "instance_id": "i1",
        "tenant_id": "p1",
        "state": "active",
        "host": "h1",
        "launched_at": str(DAY),
        "deleted_at": "",
        "terminated_at": "",
    }
    return Message(
        topic="notifications",
        event_type=f"compute.instance.{event}",
        publisher_id="compute.h1",
        timestamp=at,
        payload=known | payload,
        message_id=f"{event}/{at}",
    )


def nova_audit(hour: int, **payload: Any) -> Message:
    start, end = DAY + (hour - 1) * HOUR, DAY + hour * HOUR
    period = {"audit_period_beginning": str(start), "audit_period_ending": str(end)}
    return nova_body("exists", end + 30 * SECOND, **period, **payload)


@pytest.mark.parametrize("is_restored", [True, False])
def test_audits_of_a_soft_deleted_instance_agree_though_it_has_a_deleted_at(
    is_restored: bool,
) -> None:
    """nova/compute/api.py sets it with the soft delete; Nova audits it until terminated_at is set."""
    at = DAY + 90 * MINUTE
    soft = {"state": "soft-delete", "deleted_at": str(at)}
    if is_restored:
        last = nova_body("restore.end", DAY + 150 * MINUTE)
        after = nova_audit(3)
    else:
        gone = {"state": "deleted", "terminated_at": str(DAY + 150 * MINUTE)}
        last = nova_body("delete.end", DAY + 150 * MINUTE, **{**soft, **gone})
        after = nova_audit(3, **{**soft, **gone})
    found = audited(
        [
            nova_body("create.end", DAY, message="Success"),
            nova_audit(1),
            nova_body("soft_delete.end", at, **soft),
            nova_audit(2, **soft),
            last,
            after,
        ]
    )
    assert brief(found.verdicts) == [(Status.VERIFIED, Code.AGREED, None, 3)]


LIFE = InstanceLife(
    instance_id="3a513875-95c9-4012-a3e7-f90c678854e5",
    project_id="p1",
    steps=(
        Step(at=DAY + 72 * MINUTE, action="create", flavor=SMALL),
        Step(at=DAY + 210 * MINUTE, action="resize", flavor=LARGE),
        Step(at=DAY + 312 * MINUTE, action="stop"),
        Step(at=DAY + 378 * MINUTE, action="rebuild"),
        Step(at=DAY + 1596 * MINUTE, action="delete"),
    ),
)
SENT = LIFE.messages(audits_until=DAY + 30 * HOUR)


def is_audit(message: Message) -> bool:
    return message.event_type.endswith(".exists")


def test_a_whole_life_of_which_nothing_is_lost_is_verified_from_end_to_end() -> None:
    found = audited(SENT)
    assert {item.status for item in found.verdicts} == {Status.VERIFIED}
    whole = [item for item in found.verdicts if not item.is_partial]
    assert [(item.periods, item.statements) for item in whole] == [(23, 46), (3, 6)]
    assert len([item for item in found.verdicts if item.is_partial]) == 2


@pytest.mark.parametrize(
    ("lost", "code"),
    [
        ("create.end", Code.BIRTH_REPAIRED),
        ("delete.end", Code.END_REPAIRED),
        ("finish_resize.end", Code.RELAUNCH_REPAIRED),
        ("rebuild.end", Code.RELAUNCH_REPAIRED),
        ("power_off.end", Code.CHANGE_REPAIRED),
    ],
)
def test_an_event_that_was_lost_is_repaired_by_an_audit_once_and_named(
    lost: str, code: Code
) -> None:
    twin = lost.replace("finish_resize", "resize_finish")
    kept = [m for m in SENT if not m.event_type.endswith((lost, twin, ".update"))]
    found = [item for item in audited(kept).verdicts if item.code is code]
    audits = {message.message_id for message in SENT if is_audit(message)}
    assert found
    assert len({(item.period_start, item.period_end) for item in found}) == 1
    assert {evidence.message_id for item in found for evidence in item.evidence} <= audits


def test_of_audits_alone_every_edge_is_repaired_and_the_rest_verified() -> None:
    found = audited([message for message in SENT if is_audit(message)])
    assert {item.status for item in found.verdicts} == {Status.VERIFIED, Status.REPAIRED}
    changed = [item for item in found.verdicts if item.code is Code.CHANGE_REPAIRED]
    assert ("flavor", "m1.small", "m1.large") in [(i.field, i.ours, i.theirs) for i in changed]


VOLUME = VolumeLife(
    volume_id="00000000-0000-4000-9000-000000000001",
    project_id="p1",
    steps=(
        VolumeStep(at=DAY + 10 * MINUTE, action="create", size_gb=10),
        VolumeStep(at=DAY + 130 * MINUTE, action="extend", size_gb=20),
        VolumeStep(at=DAY + 400 * MINUTE, action="delete"),
    ),
)


def test_a_volume_is_verified_and_what_cinder_sends_again_is_no_event_of_its_own() -> None:
    sent = VOLUME.messages(audits_until=DAY + 10 * HOUR)
    assert {item.status for item in audited(sent, "volume").verdicts} == {Status.VERIFIED}
    lost = [m for m in sent if not m.event_type.startswith("volume.create")]
    again = [*lost, *VOLUME.resent(DAY + 24 * HOUR)]
    repaired = [v for v in audited(again, "volume").verdicts if v.status is Status.REPAIRED]
    assert {item.code for item in repaired} == {Code.BIRTH_REPAIRED}


def test_a_lost_extension_of_a_volume_is_repaired() -> None:
    sent = VOLUME.messages(audits_until=DAY + 10 * HOUR)
    kept = [m for m in sent if not m.event_type.startswith("volume.resize")]
    repaired = [v for v in audited(kept, "volume").verdicts if v.status is Status.REPAIRED]
    assert [(item.code, item.field, item.ours, item.theirs) for item in repaired] == [
        (Code.CHANGE_REPAIRED, "size_gb", 10, 20)
    ]


def without_witnesses(found: Reconciliation) -> list[Verdict]:
    return [replace(item, evidence=(), statements=0) for item in found.verdicts]


@given(st.data())
def test_order_and_copies_change_nothing(data: st.DataObject) -> None:
    lost = data.draw(st.sets(st.integers(0, len(SENT) - 1), max_size=len(SENT)))
    kept = [message for number, message in enumerate(SENT) if number not in lost]
    copies = data.draw(st.lists(st.sampled_from(kept), max_size=10)) if kept else []
    shuffled = data.draw(st.permutations([*kept, *copies]))
    assert audited(shuffled) == audited(kept)


@st.composite
def odd_statements(draw: st.DrawFn) -> AuditStatement:
    """What no cloud should send: repetitions that contradict each other."""
    said_at = DAY + HOUR + draw(st.integers(0, 4)) * SECOND
    return AuditStatement(
        evidence=witness(f"{draw(st.integers(0, 10**6))}", said_at),
        said_at=said_at,
        period_start=DAY,
        period_end=DAY + HOUR + draw(st.integers(0, 2)) * timedelta(milliseconds=300),
        born_at=draw(st.sampled_from([None, DAY, DAY + 5 * MINUTE, DAY + 40 * MINUTE])),
        ended_at=draw(st.sampled_from([None, DAY + 50 * MINUTE])),
        fields={
            "project": draw(st.sampled_from(["p1", "p2"])),
            "host": draw(st.sampled_from(["h1", "h2", None])),
            "state": draw(st.sampled_from(["active", "deleted"])),
        },
    )


@given(st.data(), st.lists(odd_statements(), max_size=6, unique_by=lambda item: item.evidence))
def test_order_changes_nothing_of_statements_that_contradict_each_other(
    data: st.DataObject, statements: list[AuditStatement]
) -> None:
    for history in ([interval(DAY)], []):
        one = reconcile(INSTANCE, history, statements, launches=told(DAY))
        other = reconcile(
            INSTANCE, history, data.draw(st.permutations(statements)), launches=told(DAY)
        )
        assert one == other


@given(st.integers(0, 20), st.integers(1, 50), st.integers(0, 59))
def test_an_audit_that_only_says_again_what_we_hold_adds_a_verified_and_nothing_else(
    hours: int, minutes: int, seconds: int
) -> None:
    """Partial audits may come at any time: Nova sends one before this and that."""
    at = DAY + 7 * HOUR + hours * HOUR + timedelta(minutes=minutes, seconds=seconds)
    if at >= LIFE.steps[-1].at - MINUTE:
        at = LIFE.steps[-1].at - 2 * MINUTE
    said = said_by(SENT)
    intervals = reckon(MAPPING.resources["instance"], said).intervals
    before = reconcile_said(INSTANCE, intervals, said)
    ours = next(i for i in reversed(intervals) if i.start <= at).attributes
    redundant = AuditStatement(
        evidence=witness("redundant", at),
        said_at=at,
        period_start=at.replace(minute=0, second=0, microsecond=0),
        period_end=at,
        born_at=LIFE.steps[3].at,
        fields=dict(ours),
    )
    after = reconcile(
        INSTANCE,
        intervals,
        [*_audits(said), redundant],
        launches=_launches(said),
        deletions=_deletions(said),
    )
    added = [v for v in without_witnesses(after) if v not in without_witnesses(before)]
    assert [(item.status, item.is_partial) for item in added] == [(Status.VERIFIED, True)]
    assert len(after.verdicts) == len(before.verdicts) + 1


def _audits(said: Iterable[tuple[Statement, Evidence]]) -> list[AuditStatement]:
    return [item for pair in said if (item := audit_statement(*pair)) is not None]


def _launches(said: Iterable[tuple[Statement, Evidence]]) -> list[Told]:
    return [item for pair in said if (item := launch(*pair)) is not None]


def _deletions(said: Iterable[tuple[Statement, Evidence]]) -> list[Told]:
    return [item for pair in said if (item := deletion(*pair)) is not None]


# --- silence


def lived(
    start: datetime = DAY,
    end: datetime | None = None,
    host: str | None = "h1",
    *,
    is_offloaded: bool = False,
) -> Lived:
    return Lived(start=start, end=end, project_id="p1", host=host, is_offloaded=is_offloaded)


def known(first: int, last: int, *hosts: str) -> list[Known]:
    return [
        Known(start=DAY + n * HOUR, end=DAY + (n + 1) * HOUR, hosts=frozenset(hosts))
        for n in range(first, last)
    ]


def silence(
    spans: Sequence[Lived],
    periods: Sequence[Known],
    *,
    covered: Iterable[int] = (),
    launches: Sequence[datetime] = (),
    cadence: timedelta | None = None,
    resource_type: str = "instance",
) -> list[tuple[Status, Code, int]]:
    host = "h1" if resource_type == "instance" else ""
    found = absences(
        MAPPING.resources[resource_type].audit,
        spans,
        launches,
        [(DAY + n * HOUR, DAY + (n + 1) * HOUR) for n in covered],
        periods,
        cadence={} if cadence is None else {host: cadence},
        confirmed_at=DAY + HOUR,
    )
    return [(item.status, item.code, item.periods) for item in found]


def test_a_period_that_others_were_audited_in_and_nobody_spoke_of_is_missing() -> None:
    assert silence([lived()], known(0, 3, "h1"), covered=[0, 2]) == [
        (Status.MISSING, Code.NO_STATEMENT, 1)
    ]


def test_periods_outside_of_the_life_owe_nothing() -> None:
    assert silence([lived(DAY + 2 * HOUR, DAY + 3 * HOUR)], known(0, 6, "h1"), covered=[2]) == []
    assert silence([], known(0, 6, "h1")) == []  # never launched


def test_the_hour_before_a_relaunch_is_excused() -> None:
    """2.4b: rebuilt at 16:05, the audit at 16:06 leaves the instance out of 15:00-16:00."""
    rebuilt = DAY + HOUR + 5 * MINUTE
    assert silence([lived()], known(0, 2, "h1"), covered=[1], launches=[DAY, rebuilt]) == [
        (Status.EXCUSED, Code.RELAUNCHED, 1)
    ]
    late = [DAY, DAY + HOUR + 20 * MINUTE]  # the audit had long been then
    assert silence([lived()], known(0, 2, "h1"), covered=[1], launches=late) == [
        (Status.MISSING, Code.NO_STATEMENT, 1)
    ]


def test_shelved_offloaded_instances_are_excused_also_when_they_are_deleted() -> None:
    offloaded = DAY + 90 * MINUTE
    spans = [
        lived(DAY, offloaded),
        lived(offloaded, DAY + 5 * HOUR + MINUTE, None, is_offloaded=True),
    ]
    assert silence(spans, known(0, 8, "h1"), covered=[0]) == [
        (Status.EXCUSED, Code.SHELVED_OFFLOADED, 5)
    ]


def test_one_that_moved_between_the_hour_and_the_audit_is_excused() -> None:
    moved = DAY + HOUR + 2 * MINUTE
    spans = [lived(DAY, moved), lived(moved, None, "h2")]
    assert silence(spans, known(0, 2, "h1", "h2"), covered=[1]) == [
        (Status.EXCUSED, Code.MOVED, 1)
    ]


def test_of_a_host_that_sends_nothing_the_period_is_uncovered() -> None:
    assert silence([lived()], known(0, 3, "h2")) == [(Status.UNCOVERED, Code.NOT_AUDITED, 3)]


def test_a_host_that_is_audited_daily_owes_nothing_hourly() -> None:
    assert silence([lived()], known(0, 3, "h2"), cadence=24 * HOUR) == []
    assert silence([lived()], known(0, 3, "h2"), cadence=HOUR) == [
        (Status.UNCOVERED, Code.NOT_AUDITED, 3)
    ]


def test_a_type_that_is_audited_daily_owes_nothing_hourly() -> None:
    """Before the audits of today, which are daily, there were some of every hour."""
    for resource_type in ("volume", "floating_ip"):
        assert (
            silence([lived()], known(0, 3), cadence=24 * HOUR, resource_type=resource_type) == []
        )
        assert silence([lived()], known(0, 3), cadence=HOUR, resource_type=resource_type) == [
            (Status.UNCOVERED, Code.NOT_AUDITED, 3)
        ]


def test_one_that_falls_silent_while_its_neighbours_speak_is_unconfirmed() -> None:
    assert silence([lived()], known(0, 4, "h1"), covered=[0]) == [
        (Status.UNCONFIRMED, Code.SILENT, 3)
    ]
    # two are not enough, and what speaks again was not silent to the end
    assert silence([lived()], known(0, 3, "h1"), covered=[0]) == [
        (Status.MISSING, Code.NO_STATEMENT, 2)
    ]
    assert silence([lived()], known(0, 5, "h1"), covered=[0, 4]) == [
        (Status.MISSING, Code.NO_STATEMENT, 3)
    ]
    ended = [lived(DAY, DAY + 4 * HOUR)]
    assert silence(ended, known(0, 4, "h1"), covered=[0]) == [
        (Status.MISSING, Code.NO_STATEMENT, 3)
    ]


def test_types_that_are_not_audited_per_host_are_missing_whatever_their_host_is() -> None:
    spans = [lived(host="ctl1@ceph#rbd")]
    assert silence(spans, known(0, 2, ""), covered=[0], resource_type="volume") == [
        (Status.MISSING, Code.NO_STATEMENT, 1)
    ]
    assert silence(spans, known(0, 2), covered=[0], resource_type="volume") == [
        (Status.UNCOVERED, Code.NOT_AUDITED, 1)
    ]


def test_what_lived_for_a_part_of_a_period_owes_no_audit_that_names_none() -> None:
    """It ran at some moment of the hour, which may have been before the birth or after the end."""
    for spans in ([lived(DAY + 5 * MINUTE)], [lived(DAY, DAY + 55 * MINUTE)]):
        assert silence(spans, known(0, 1, ""), resource_type="floating_ip") == []
    assert silence([lived()], known(0, 1, ""), resource_type="floating_ip") == [
        (Status.MISSING, Code.NO_STATEMENT, 1)
    ]


def test_between_two_lives_under_one_id_no_audit_is_owed() -> None:
    spans = [lived(DAY, DAY + 2 * HOUR), lived(DAY + 5 * HOUR)]
    owed = [
        hour
        for hour in range(7)
        if silence(spans, known(hour, hour + 1, ""), resource_type="floating_ip")
    ]
    assert owed == [0, 1, 5, 6]


def test_periods_that_nobody_spoke_of_are_expected_from_those_before() -> None:
    hours = [(DAY + n * HOUR, DAY + (n + 1) * HOUR) for n in (0, 1, 4)]
    assert expected_periods(hours, DAY + 7 * HOUR) == tuple(
        (DAY + n * HOUR, DAY + (n + 1) * HOUR) for n in (2, 3, 5, 6)
    )
    future = DAY + 9999 * HOUR + 30 * MINUTE  # of a host whose clock is wrong
    assert expected_periods([*hours, (future, future + HOUR)], DAY + 7 * HOUR) == tuple(
        (DAY + n * HOUR, DAY + (n + 1) * HOUR) for n in (2, 3, 5, 6)
    )
    assert expected_periods([(DAY, DAY + 24 * HOUR)], DAY + 47 * HOUR) == ()
    february = (datetime(2026, 2, 1, tzinfo=UTC), datetime(2026, 3, 1, tzinfo=UTC))
    assert expected_periods([february], DAY) == ()
    assert len(expected_periods(hours, DAY + 9999 * HOUR, limit=10)) == 10


def test_what_the_document_says_is_compared_is_what_the_mapping_says() -> None:
    of_types = {}
    for line in DOCUMENT.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[0] in {*MAPPING.resources, "others"}:
            names = cells[1].split(", ")
            of_types[cells[0]] = tuple(name for name in names if name not in MOMENTS)
    others = of_types.pop("others")
    for name, resource in MAPPING.resources.items():
        assert of_types.get(name, others) == resource.audit.compares


MOMENTS = frozenset({"birth", "launched_at", "deleted_at"})


def test_every_code_is_in_the_document_with_its_equivalents() -> None:
    text = DOCUMENT.read_text()
    for code in Code:
        meaning = MEANINGS[code]
        row = (
            f"| `{code}` | {meaning.status} | {meaning.says} | {meaning.stacktach} |"
            f" {meaning.winchester} |"
        )
        assert row in text, row
