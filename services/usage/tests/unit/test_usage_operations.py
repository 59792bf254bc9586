"""Operations from starts, ends and errors: pairs, twins, reschedules, and what was lost."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from hostler_usage.profiling.operations import Mark, Operation, Outcome, mark, pair, pair_said
from hostler_usage.reading.envelope import Notification
from hostler_usage.reading.mapping import Edge, Phase
from hostler_usage.reading.mapping_file import packaged
from hostler_usage.reading.normalise import Normaliser
from hostler_usage.reading.statement import Evidence, Statement

T = datetime(2026, 5, 8, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)
MS = timedelta(milliseconds=1)


def witness(name: str, at: datetime = T) -> Evidence:
    return Evidence(event_time=at, message_id=name, digest=name.encode())


def said(
    action: str,
    phase: Phase,
    seconds: float,
    *,
    request: str | None = "r1",
    host: str | None = "h1",
    flavor: str | None = "m1.small",
    reason: str | None = None,
    name: str = "",
) -> Mark:
    at = T + timedelta(seconds=seconds)
    return Mark(
        evidence=witness(name or f"{action}.{phase}@{seconds}/{request}/{host}", at),
        request_id=request,
        action=action,
        phase=phase,
        at=at,
        host=host,
        flavor=flavor,
        reason=reason,
        project_id="p1",
    )


START, END, ERROR = Phase.START, Phase.END, Phase.ERROR


def brief(operations: tuple[Operation, ...]) -> list[tuple[str, Outcome, int | None]]:
    return [
        (item.action, item.outcome, None if item.duration_us is None else item.duration_us // 1000)
        for item in operations
    ]


def test_a_start_and_its_end_are_one_operation() -> None:
    (found,) = pair(
        "instance",
        [said("create", START, 0, host=None), said("create", END, 12.5, host="h2")],
    )
    assert found.outcome is Outcome.SUCCEEDED
    assert (found.started_at, found.ended_at) == (T, T + 12.5 * SECOND)
    assert found.duration_us == 12_500_000
    assert (found.host, found.flavor, found.project_id) == ("h2", "m1.small", "p1")
    assert len(found.evidence) == 2


def test_the_twins_of_both_formats_are_one_mark_with_the_finer_time() -> None:
    legacy_start, legacy_end = said("create", START, 0.25), said("create", END, 9.75)
    twins = [
        replace(
            item,
            at=item.at.replace(microsecond=0),
            evidence=witness(f"versioned-{item.phase}", item.at),
        )
        for item in (legacy_start, legacy_end)
    ]
    (found,) = pair("instance", [legacy_start, legacy_end, *twins])
    assert found.duration_us == 9_500_000
    assert len(found.evidence) == 4


def test_an_error_closes_with_its_reason() -> None:
    (found,) = pair(
        "instance",
        [said("create", START, 0), said("create", ERROR, 4, reason="no valid host")],
    )
    assert (found.outcome, found.reason, found.duration_us) == (
        Outcome.FAILED,
        "no valid host",
        4_000_000,
    )


def test_an_error_told_by_the_event_and_by_the_function_is_one_failure() -> None:
    (found,) = pair(
        "instance",
        [
            said("create", START, 0),
            said("create", ERROR, 4, name="create.error"),
            said("create", ERROR, 7, name="build_and_run_instance", host=None, reason="boom"),
        ],
    )
    assert (found.outcome, found.reason, found.duration_us) == (Outcome.FAILED, "boom", 4_000_000)
    assert len(found.evidence) == 3


def test_a_create_that_is_sent_to_the_next_host_is_one_operation_a_host() -> None:
    """2.5: create.start .. create.error .. the whole loop again, one request, three hosts."""
    found = pair(
        "instance",
        [
            said("create", START, 0, host="a"),
            said("create", ERROR, 100, host="a"),
            said("create", START, 101, host="b"),
            said("create", ERROR, 300, host="b"),
            said("create", START, 302, host="c"),
            said("create", END, 818, host="c"),
        ],
    )
    assert [(item.outcome, item.host, item.duration_us) for item in found] == [
        (Outcome.FAILED, "a", 100_000_000),
        (Outcome.FAILED, "b", 199_000_000),
        (Outcome.SUCCEEDED, "c", 516_000_000),
    ]


def test_the_next_hosts_start_may_overtake_the_error_of_the_one_before() -> None:
    found = pair(
        "instance",
        [
            said("create", START, 0, host="a"),
            said("create", START, 99.5, host="b"),
            said("create", ERROR, 100, host="a"),
            said("create", END, 200, host="b"),
        ],
    )
    assert [(item.outcome, item.host) for item in found] == [
        (Outcome.FAILED, "a"),
        (Outcome.SUCCEEDED, "b"),
    ]


def test_the_actions_of_one_request_are_operations_of_their_own() -> None:
    """2.5: a resize; publisher and host differ along the way."""
    found = pair(
        "instance",
        [
            said("resize.prep", START, 0),
            said("resize.prep", END, 1),
            said("resize", START, 2),
            said("resize", END, 30, host="h2"),
            said("finish_resize", START, 31, host="h2", flavor="m1.large"),
            said("finish_resize", END, 35, host="h2", flavor="m1.large"),
            said("resize.confirm", START, 99, request="r2", host="h2", flavor="m1.large"),
            said("resize.confirm", END, 100, request="r2", host="h2", flavor="m1.large"),
        ],
    )
    assert brief(found) == [
        ("resize.prep", Outcome.SUCCEEDED, 1000),
        ("resize", Outcome.SUCCEEDED, 28_000),
        ("finish_resize", Outcome.SUCCEEDED, 4000),
        ("resize.confirm", Outcome.SUCCEEDED, 1000),
    ]


def test_what_never_ended_is_unfinished_and_what_never_started_lost_its_start() -> None:
    found = pair(
        "instance",
        [said("delete", START, 0), said("power_off", END, 5, request="r2")],
    )
    assert brief(found) == [
        ("delete", Outcome.UNFINISHED, None),
        ("power_off", Outcome.LOST_START, None),
    ]


def test_another_requests_end_does_not_finish_it() -> None:
    found = pair("instance", [said("reboot", START, 0), said("reboot", END, 5, request="r2")])
    assert [item.outcome for item in found] == [Outcome.UNFINISHED, Outcome.LOST_START]


def test_what_names_no_request_is_paired_with_the_nearest_following_end() -> None:
    found = pair(
        "instance",
        [
            said("reboot", START, 0, request=None),
            said("reboot", START, 100, request=None),
            said("reboot", END, 104, request=None),
        ],
    )
    assert brief(found) == [
        ("reboot", Outcome.UNFINISHED, None),
        ("reboot", Outcome.SUCCEEDED, 4000),
    ]
    mixed = [said("reboot", START, 0), said("reboot", END, 3, request=None)]
    assert brief(pair("instance", mixed)) == [("reboot", Outcome.SUCCEEDED, 3000)]


def test_an_end_a_moment_before_its_start_is_of_another_hosts_clock() -> None:
    found = pair("instance", [said("pause", END, 0), said("pause", START, 0.4)])
    assert brief(found) == [("pause", Outcome.SUCCEEDED, 0)]


def test_an_end_told_twice_ends_once() -> None:
    found = pair(
        "instance",
        [
            said("delete", START, 0),
            said("delete", END, 5, host="h1"),
            said("delete", END, 7, host=None, name="by the API"),
        ],
    )
    assert brief(found) == [("delete", Outcome.SUCCEEDED, 5000)]


def test_what_has_no_start_by_nature_has_not_lost_it() -> None:
    assert brief(pair("image", [said("activate", END, 1)])) == [
        ("activate", Outcome.SUCCEEDED, None)
    ]
    assert brief(pair("volume", [said("retype", END, 1)])) == [("retype", Outcome.SUCCEEDED, None)]
    assert brief(pair("volume", [said("create", END, 1)])) == [
        ("create", Outcome.LOST_START, None)
    ]


# --- from messages


def statement(**changes: object) -> Statement:
    base = Statement(
        edge=Edge.NONE,
        attributes=(("flavor", "m1.small"), ("host", "h1"), ("project", "p1")),
        operation="create",
        phase=Phase.END,
        request_id="r1",
    )
    return base._replace(**changes)  # type: ignore[arg-type]  # a test's own fields


def test_a_mark_is_read_from_a_statement() -> None:
    found = mark(statement(), witness("a"))
    assert found == Mark(
        evidence=witness("a"),
        request_id="r1",
        action="create",
        phase=Phase.END,
        at=T,
        host="h1",
        flavor="m1.small",
        reason=None,
        project_id="p1",
    )
    assert mark(statement(phase=None), witness("a")) is None


def test_a_create_end_that_says_it_failed_is_an_error() -> None:
    found = mark(statement(failed=True), witness("a"))
    assert found is not None
    assert found.phase is Phase.ERROR


def test_what_cinder_sends_again_is_no_operation() -> None:
    assert mark(statement(period=(T, T)), witness("a")) is None


def test_the_error_of_a_function_closes_what_was_begun() -> None:
    """A delete.start, then ERROR terminate_instance with the instance's id in its arguments."""
    normaliser = Normaliser(packaged())
    uuid = "3a513875-95c9-4012-a3e7-f90c678854e5"
    bodies = [
        ("compute.instance.delete.start", "INFO", {"instance_id": uuid, "tenant_id": "p1"}),
        (
            "terminate_instance",
            "ERROR",
            {"exception": {"kwargs": {"uuid": uuid}}, "args": {"instance": {"uuid": uuid}}},
        ),
    ]
    found = []
    for number, (event_type, priority, payload) in enumerate(bodies):
        notification = Notification(
            message_id=f"m{number}",
            has_own_id=True,
            event_type=event_type,
            publisher_id="compute.h1",
            priority=priority,
            timestamp=T + number * SECOND,
            payload=payload,
            request_id="r1",
            context_project_id=None,
            digest=bytes([number]),
        )
        (row,) = normaliser.read(notification, region="r1").said
        assert row.statement is not None
        assert row.resource.resource_id == uuid
        found.append((row.statement, witness(f"m{number}", notification.timestamp)))
    assert brief(pair_said("instance", found)) == [("delete", Outcome.FAILED, 1000)]


# --- a function of the set


@st.composite
def marks(draw: st.DrawFn) -> list[Mark]:
    return [
        said(
            draw(st.sampled_from(["create", "resize"])),
            draw(st.sampled_from(list(Phase))),
            draw(st.integers(0, 40)) / 4,
            request=draw(st.sampled_from(["r1", "r2", None])),
            host=draw(st.sampled_from(["h1", "h2", None])),
        )
        for _ in range(draw(st.integers(0, 12)))
    ]


@given(st.data(), marks())
def test_order_and_copies_change_nothing(data: st.DataObject, given_marks: list[Mark]) -> None:
    copies = data.draw(st.lists(st.sampled_from(given_marks), max_size=8)) if given_marks else []
    shuffled = data.draw(st.permutations([*given_marks, *copies]))
    assert pair("instance", shuffled) == pair("instance", given_marks)


@given(marks())
def test_every_mark_is_in_exactly_one_operation(given_marks: list[Mark]) -> None:
    found = pair("instance", given_marks)
    cited = [evidence for item in found for evidence in item.evidence]
    assert len(cited) == len(set(cited))
    assert set(cited) == {item.evidence for item in given_marks}


@given(marks())
def test_twins_add_witnesses_and_no_operations(given_marks: list[Mark]) -> None:
    twins = [
        replace(
            item,
            at=item.at,
            evidence=item.evidence._replace(message_id=f"twin of {item.evidence.message_id}"),
        )
        for item in given_marks
    ]
    one, both = pair("instance", given_marks), pair("instance", [*given_marks, *twins])
    assert sorted((i.action, i.begun_at, i.outcome) for i in both) == sorted(
        (i.action, i.begun_at, i.outcome) for i in one
    )
