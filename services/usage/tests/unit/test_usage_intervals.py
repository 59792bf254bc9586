"""The fold against lives whose truth is written down: order, copies and losses change nothing."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostler_usage.history.intervals import Anomaly, History, Provenance, fold
from hostler_usage.history.measures import Window, totals
from hostler_usage.history.observation import Kind, Observation, Rank, attributes
from hostler_usage.reading.envelope import open_body
from hostler_usage.reading.mapping_file import packaged
from hostler_usage.reading.statement import Evidence, ResourceType
from hostler_usage.reading.times import microseconds
from hostler_usage.testing import (
    INSTANCE,
    LARGE,
    LEGACY,
    MEDIUM,
    SMALL,
    VERSIONED,
    VOLUME,
    Flavor,
    InstanceLife,
    Message,
    Step,
    VolumeLife,
    VolumeStep,
    observed,
)

DAY = datetime(2026, 5, 8, tzinfo=UTC)
HOUR = timedelta(hours=1)
SECOND = timedelta(seconds=1)
WINDOW = Window(start=DAY - 2 * HOUR, end=DAY + 400 * HOUR, as_of=DAY + 300 * HOUR)
UUID = "3a513875-95c9-4012-a3e7-f90c678854e5"


def observations(messages: Iterable[Message]) -> list[Observation]:
    found: list[Observation] = []
    for message in messages:
        found += observed(open_body(message.body()))
    return found


# what the lives of these tests tell of
TOLD = {
    INSTANCE: ("instance_hours", "vcpu_hours", "ram_mb_hours", "local_gb_hours"),
    VOLUME: ("volume_hours", "volume_gb_hours"),
}


def billed(
    messages: Iterable[Message], kind: ResourceType = INSTANCE, window: Window = WINDOW
) -> dict[str, int]:
    amounts = totals(packaged().measures_of(kind), fold(observations(messages)).intervals, window)
    return {name: amounts[name] for name in TOLD[kind]}


def spans(history: History, *names: str) -> list[tuple[object, ...]]:
    return [
        (item.start, item.end, *(item.attributes.get(name) for name in names))
        for item in history.intervals
    ]


# --- the truth, straight from the steps


def true_instance_usage(life: InstanceLife, window: Window = WINDOW) -> dict[str, int]:
    amounts = dict.fromkeys(("instance_hours", "vcpu_hours", "ram_mb_hours", "local_gb_hours"), 0)
    flavor = SMALL
    for step, following in zip(life.steps, (*life.steps[1:], None), strict=True):
        flavor = step.flavor or flavor
        if step.action == "delete":
            break
        start = max(step.at, window.start)
        end = min(window.end, window.as_of, following.at if following else window.end)
        span = max(0, microseconds(end - start))
        amounts["instance_hours"] += span
        amounts["vcpu_hours"] += span * flavor.vcpus
        amounts["ram_mb_hours"] += span * flavor.memory_mb
        amounts["local_gb_hours"] += span * (flavor.root_gb + flavor.ephemeral_gb)
    return amounts


def true_volume_usage(life: VolumeLife) -> dict[str, int]:
    amounts = {"volume_hours": 0, "volume_gb_hours": 0}
    size = 0
    for step, following in zip(life.steps, (*life.steps[1:], None), strict=True):
        size = step.size_gb or size
        if step.action == "delete":
            break
        end = following.at if following else WINDOW.as_of
        amounts["volume_hours"] += microseconds(end - step.at)
        amounts["volume_gb_hours"] += microseconds(end - step.at) * size
    return amounts


# --- lives to fold

FLAVORS: Sequence[Flavor] = (SMALL, MEDIUM, LARGE)
# steps lie at least three minutes apart: Nova does not resize faster
GAPS = st.integers(180, 30 * 3600).map(lambda seconds: timedelta(seconds=seconds))


@st.composite
def instance_lives(draw: st.DrawFn, *, fractions: bool = False) -> InstanceLife:
    part = st.integers(1, 999_999) if fractions else st.just(0)
    at = DAY + draw(GAPS) + timedelta(microseconds=draw(part))
    steps = [Step(at=at, action="create", flavor=draw(st.sampled_from(FLAVORS)))]
    stopped = False
    for action in draw(st.lists(st.sampled_from(["resize", "toggle", "rebuild"]), max_size=4)):
        at += draw(GAPS) + timedelta(microseconds=draw(part))
        if action == "resize":
            steps.append(Step(at=at, action="resize", flavor=draw(st.sampled_from(FLAVORS))))
        elif action == "rebuild":
            steps.append(Step(at=at, action="rebuild", image=f"image-{len(steps)}"))
            stopped = False
        else:
            stopped = not stopped
            steps.append(Step(at=at, action="stop" if stopped else "start"))
    if draw(st.booleans()):
        steps.append(Step(at=at + draw(GAPS), action="delete"))
    return InstanceLife(instance_id=UUID, project_id="p1", steps=tuple(steps))


@st.composite
def volume_lives(draw: st.DrawFn) -> VolumeLife:
    at = DAY + draw(GAPS)
    size = draw(st.integers(1, 50))
    steps = [VolumeStep(at=at, action="create", size_gb=size)]
    for action in draw(st.lists(st.sampled_from(["extend", "attach", "detach"]), max_size=4)):
        at += draw(GAPS)
        size += action == "extend"
        steps.append(
            VolumeStep(
                at=at,
                action="extend" if action == "extend" else action,  # type: ignore[arg-type]  # one of three
                size_gb=size if action == "extend" else None,
                instance_id=UUID if action == "attach" else None,
            )
        )
    if draw(st.booleans()):
        steps.append(VolumeStep(at=at + draw(GAPS), action="delete"))
    return VolumeLife(volume_id=UUID, project_id="p1", steps=tuple(steps))


# --- properties


@given(instance_lives())
def test_what_is_billed_for_an_instance_is_the_truth(life: InstanceLife) -> None:
    assert billed(life.messages(audits_until=DAY + 60 * HOUR)) == true_instance_usage(life)


@given(volume_lives())
def test_what_is_billed_for_a_volume_is_the_truth(life: VolumeLife) -> None:
    messages = life.messages(audits_until=DAY + 60 * HOUR)
    assert billed(messages, VOLUME) == true_volume_usage(life)


@given(instance_lives(fractions=True), st.data())
def test_order_and_copies_change_nothing(life: InstanceLife, data: st.DataObject) -> None:
    found = observations(life.messages(audits_until=DAY + 20 * HOUR))
    copies = data.draw(st.lists(st.sampled_from(found), max_size=20))
    shuffled = data.draw(st.permutations(found + copies))
    assert fold(shuffled) == fold(found)


@given(volume_lives(), st.data())
def test_order_and_copies_change_nothing_for_a_volume(
    life: VolumeLife, data: st.DataObject
) -> None:
    found = observations(
        life.messages(audits_until=DAY + 20 * HOUR) + life.resent(DAY + 90 * HOUR)
    )
    copies = data.draw(st.lists(st.sampled_from(found), max_size=20))
    assert fold(data.draw(st.permutations(found + copies))) == fold(found)


@given(volume_lives(), st.integers(1, 3))
def test_actions_sent_again_by_cinders_audit_change_no_total(life: VolumeLife, times: int) -> None:
    messages = life.messages()
    again = [m for n in range(times) for m in life.resent(DAY + (250 + n) * HOUR)]
    assert billed(messages + again, VOLUME) == billed(messages, VOLUME)


@given(instance_lives())
def test_either_dialect_alone_bills_the_same(life: InstanceLife) -> None:
    messages = life.messages(audits_until=DAY + 60 * HOUR)
    legacy = [m for m in messages if m.topic == LEGACY]
    versioned = [m for m in messages if m.topic == VERSIONED]
    assert billed(legacy) == billed(versioned) == billed(messages)


@given(instance_lives(fractions=True))
def test_either_dialect_alone_differs_by_less_than_a_second_an_edge(life: InstanceLife) -> None:
    messages = life.messages()
    legacy = billed(m for m in messages if m.topic == LEGACY)
    versioned = billed(m for m in messages if m.topic == VERSIONED)
    edges = 2 * len(life.steps)
    for name, unit in (("instance_hours", 1), ("ram_mb_hours", LARGE.memory_mb)):
        assert abs(legacy[name] - versioned[name]) <= edges * unit * 1_000_000


@given(instance_lives(fractions=True))
def test_the_finest_spelling_of_a_moment_is_billed(life: InstanceLife) -> None:
    assert billed(life.messages(audits_until=DAY + 60 * HOUR)) == true_instance_usage(life)


@settings(max_examples=50)
@given(instance_lives(), st.data())
def test_lost_events_that_a_later_audit_covers_change_no_total(
    life: InstanceLife, data: st.DataObject
) -> None:
    messages = life.messages(audits_until=WINDOW.as_of)
    lost = data.draw(st.sets(st.sampled_from([m.message_id for m in messages])))
    kept = [m for m in messages if "exists" in m.event_type or m.message_id not in lost]
    assert billed(kept) == true_instance_usage(life)


@given(instance_lives(fractions=True), st.data())
def test_further_audits_change_nothing(life: InstanceLife, data: st.DataObject) -> None:
    events = life.messages()
    audits = [
        m for m in life.messages(audits_until=DAY + 90 * HOUR) if m.event_type.endswith("exists")
    ]
    added = data.draw(st.lists(st.sampled_from(audits))) if audits else []
    assert billed(events + added) == billed(events)


@given(instance_lives(fractions=True), st.integers(-(10**12), 10**12))
def test_usage_is_additive_over_windows(life: InstanceLife, at: int) -> None:
    intervals = fold(observations(life.messages())).intervals
    middle = min(max(DAY + timedelta(microseconds=at), WINDOW.start), WINDOW.end)
    first = Window(start=WINDOW.start, end=middle, as_of=WINDOW.as_of)
    second = Window(start=middle, end=WINDOW.end, as_of=WINDOW.as_of)
    left, right = (
        totals(packaged().measures_of(INSTANCE), intervals, first),
        totals(packaged().measures_of(INSTANCE), intervals, second),
    )
    whole = totals(packaged().measures_of(INSTANCE), intervals, WINDOW)
    assert {name: left[name] + right[name] for name in whole} == whole


@given(instance_lives())
def test_intervals_touch_and_neighbours_differ(life: InstanceLife) -> None:
    intervals = fold(observations(life.messages(audits_until=DAY + 40 * HOUR))).intervals
    for left, right in pairwise(intervals):
        assert left.end == right.start
        assert left.start < right.start
        assert left.attributes != right.attributes


SCRAPS = st.builds(
    Observation,
    kind=st.sampled_from(Kind),
    t_eff=st.integers(0, 40).map(lambda n: DAY + n * timedelta(milliseconds=400)),
    rank=st.sampled_from(Rank),
    opens=st.booleans(),
    is_rounded=st.booleans(),
    attributes=st.builds(attributes, vcpus=st.integers(0, 3), state=st.sampled_from(["a", "b"])),
    evidence=st.builds(
        Evidence,
        event_time=st.integers(0, 3).map(lambda n: DAY + n * SECOND),
        message_id=st.sampled_from(["m1", "m2"]),
        digest=st.sampled_from([b"1", b"2"]),
    ),
)


@settings(max_examples=300)
@given(st.lists(SCRAPS, max_size=12), st.data())
def test_any_set_of_observations_folds_to_one_history(
    scraps: list[Observation], data: st.DataObject
) -> None:
    history = fold(scraps)
    assert fold(data.draw(st.permutations(scraps + scraps[:3]))) == history
    for left, right in pairwise(history.intervals):
        assert left.end == right.start
    for item in history.intervals:
        assert item.end is None or item.start < item.end


@settings(max_examples=300)
@given(st.lists(SCRAPS, max_size=12), st.data())
def test_any_set_of_observations_folds_to_one_history_of_lives_that_do_not_overlap(
    scraps: list[Observation], data: st.DataObject
) -> None:
    history = fold(scraps, ids_return=True)
    assert fold(data.draw(st.permutations(scraps + scraps[:3])), ids_return=True) == history
    for left, right in pairwise(history.intervals):
        assert left.end is not None
        assert left.end <= right.start
    for item in history.intervals:
        assert item.end is None or item.start < item.end
    if not any(item.kind is Kind.END and item.rank is Rank.DELETE for item in scraps):
        assert fold(scraps) == history


# --- cases


def life(*steps: Step) -> InstanceLife:
    return InstanceLife(instance_id=UUID, project_id="p1", steps=steps)


CREATED = Step(at=DAY, action="create", flavor=SMALL)


def test_a_day_of_an_instance_becomes_its_intervals() -> None:
    day = life(
        CREATED,
        Step(at=DAY + 2 * HOUR, action="resize", flavor=LARGE),
        Step(at=DAY + 5 * HOUR, action="stop"),
        Step(at=DAY + 6 * HOUR, action="start"),
        Step(at=DAY + 9 * HOUR, action="delete"),
    )
    history = fold(observations(day.messages()))
    assert spans(history, "flavor", "vcpus", "state") == [
        (DAY, DAY + 2 * HOUR, "m1.small", 1, "active"),
        (DAY + 2 * HOUR, DAY + 2 * HOUR + SECOND, "m1.large", 4, "resized"),
        (DAY + 2 * HOUR + SECOND, DAY + 5 * HOUR, "m1.large", 4, "active"),
        (DAY + 5 * HOUR, DAY + 6 * HOUR, "m1.large", 4, "stopped"),
        (DAY + 6 * HOUR, DAY + 9 * HOUR, "m1.large", 4, "active"),
    ]
    assert {item.provenance for item in history.intervals} == {Provenance.EVENTS}


def only(messages: Iterable[Message], *names: str) -> list[Message]:
    return [m for m in messages if m.event_type.endswith(names)]


def without(messages: Iterable[Message], *names: str) -> list[Message]:
    return [m for m in messages if not m.event_type.endswith(names)]


def test_a_lost_create_is_made_good_by_an_audit_and_says_so() -> None:
    messages = only(life(CREATED).messages(audits_until=DAY + 2 * HOUR), "exists")
    history = fold(observations(messages))
    assert spans(history, "flavor", "state") == [(DAY, None, "m1.small", "active")]
    assert history.intervals[0].provenance is Provenance.AUDIT


def test_a_lost_delete_is_made_good_by_the_last_audit_and_says_so() -> None:
    deleted = life(CREATED, Step(at=DAY + 90 * timedelta(minutes=1), action="delete"))
    messages = without(deleted.messages(audits_until=DAY + 3 * HOUR), "delete.end", ".update")
    history = fold(observations(messages))
    assert spans(history) == [(DAY, DAY + 90 * timedelta(minutes=1))]
    assert history.intervals[0].provenance is Provenance.AUDIT


def test_a_lost_resize_is_made_good_to_the_moment_by_the_next_audit() -> None:
    at = DAY + timedelta(minutes=80)
    resized = life(CREATED, Step(at=at, action="resize", flavor=LARGE))
    messages = only(resized.messages(audits_until=DAY + 2 * HOUR), "create.end", "exists")
    assert spans(fold(observations(messages)), "flavor") == [
        (DAY, at, "m1.small"),
        (at, None, "m1.large"),
    ]


def test_an_audit_between_the_flip_of_the_flavor_and_the_finished_resize_moves_nothing() -> None:
    resized = life(CREATED, Step(at=DAY + 2 * HOUR, action="resize", flavor=LARGE))
    messages = resized.messages(audits_until=DAY + HOUR)
    flipped = {
        "instance_type": LARGE.name,
        "vcpus": LARGE.vcpus,
        "memory_mb": LARGE.memory_mb,
        "root_gb": LARGE.root_gb,
        "ephemeral_gb": LARGE.ephemeral_gb,
        "state_description": "resize_migrated",
    }
    audits = [
        replace(audit, payload=audit.payload | flipped)
        for audit in only(messages, "compute.instance.exists")
    ]
    assert len(audits) == 2  # of the hour, and before the resize
    legacy = [m for m in without(messages, "exists", "create.end") if m.topic == LEGACY]
    assert billed(legacy + audits) == true_instance_usage(resized)


def test_an_instance_that_never_launched_is_not_billed() -> None:
    messages = only(life(CREATED).messages(), "create.start")
    assert fold(observations(messages)) == History(intervals=())


def test_what_comes_after_the_end_is_an_anomaly_and_not_usage() -> None:
    done = life(CREATED, Step(at=DAY + HOUR, action="delete"))
    late = life(CREATED, Step(at=DAY + 5 * HOUR, action="stop"))
    history = fold(observations(done.messages() + only(late.messages(), "power_off.end")))
    assert spans(history) == [(DAY, DAY + HOUR)]
    assert history.anomalies == (Anomaly.SEEN_AFTER_END,)


def test_an_end_before_the_birth_bills_nothing_and_is_named() -> None:
    done = volume(BORN, VolumeStep(at=DAY + HOUR, action="delete"))
    born_later = volume(VolumeStep(at=DAY + 2 * HOUR, action="create", size_gb=1))
    (deleted,) = only(done.messages(), "delete.end")
    payload = {**deleted.payload, "launched_at": "", "created_at": None}
    messages = [replace(deleted, payload=payload), *only(born_later.messages(), "create.end")]
    assert fold(observations(messages)) == History(
        intervals=(), anomalies=(Anomaly.ENDED_BEFORE_BIRTH,)
    )


def volume(*steps: VolumeStep) -> VolumeLife:
    return VolumeLife(volume_id=UUID, project_id="p1", steps=steps)


BORN = VolumeStep(at=DAY, action="create", size_gb=10)


def test_a_volume_changes_hands_when_the_transfer_is_accepted() -> None:
    moved = volume(BORN, VolumeStep(at=DAY + HOUR, action="transfer", project_id="p2"))
    assert spans(fold(observations(moved.messages())), "project", "size_gb") == [
        (DAY, DAY + HOUR, "p1", 10),
        (DAY + HOUR, None, "p2", 10),
    ]


def test_an_attached_volume_says_to_what() -> None:
    attached = volume(
        BORN,
        VolumeStep(at=DAY + HOUR, action="attach", instance_id=UUID),
        VolumeStep(at=DAY + 2 * HOUR, action="detach"),
    )
    rows = spans(fold(observations(attached.messages())), "attached_to")
    assert [row[2] for row in rows] == [None, UUID, None]


def test_a_volume_known_only_from_actions_sent_again_is_billed() -> None:
    gone = volume(BORN, VolumeStep(at=DAY + 3 * HOUR, action="delete"))
    history = fold(observations(gone.resent(DAY + 9 * HOUR)))
    assert spans(history, "size_gb", "project") == [(DAY, DAY + 3 * HOUR, 10, "p1")]
    assert history.intervals[0].provenance is Provenance.AUDIT


def test_an_extension_whose_create_was_lost_bills_the_old_size_before_it() -> None:
    grown = volume(BORN, VolumeStep(at=DAY + HOUR, action="extend", size_gb=25))
    messages = without(grown.messages(), "create.start", "create.end")
    sizes = [row[2] for row in spans(fold(observations(messages)), "size_gb")]
    assert sizes == [10, 25]


def test_an_audit_that_read_its_rows_before_an_event_and_sent_them_after_it_is_stale() -> None:
    grown = volume(BORN, VolumeStep(at=DAY + 3 * HOUR, action="extend", size_gb=25))
    messages = grown.messages(audits_until=DAY + 6 * HOUR)
    (stale,) = [m for m in messages if m.timestamp == DAY + 3 * HOUR + timedelta(seconds=4)]
    assert stale.payload["size"] == 10
    assert spans(fold(observations(messages)), "size_gb") == [
        (DAY, DAY + 3 * HOUR, 10),
        (DAY + 3 * HOUR, None, 25),
    ]


def test_a_lost_extension_is_made_good_by_the_next_audit() -> None:
    grown = volume(BORN, VolumeStep(at=DAY + HOUR * 7 / 2, action="extend", size_gb=25))
    messages = only(grown.messages(audits_until=DAY + 6 * HOUR), "create.end", "exists")
    assert spans(fold(observations(messages)), "size_gb") == [
        (DAY, DAY + 4 * HOUR + timedelta(seconds=4), 10),
        (DAY + 4 * HOUR + timedelta(seconds=4), None, 25),
    ]


def test_every_interval_names_the_messages_it_rests_on() -> None:
    messages = life(CREATED, Step(at=DAY + HOUR, action="delete")).messages()
    (interval,) = fold(observations(messages)).intervals
    by_id = {m.message_id: m.event_type for m in messages}
    assert {by_id[item.message_id] for item in interval.opened_by} <= {
        "compute.instance.create.end",
        "instance.create.end",
        "compute.instance.update",
        "instance.update",
    }
    assert [by_id[item.message_id] for item in interval.closed_by] == [
        "compute.instance.delete.end"
    ]


@pytest.mark.parametrize("microsecond", [1, 499_999, 500_000, 880_000, 999_999])
def test_cut_rounded_and_fine_spellings_of_a_launch_are_one_moment(microsecond: int) -> None:
    at = DAY.replace(microsecond=microsecond)
    (interval,) = fold(
        observations(
            life(Step(at=at, action="create", flavor=SMALL)).messages(audits_until=DAY + 3 * HOUR)
        )
    ).intervals
    assert interval.start == at
