"""Notifications as real clouds send them, and what each says of its resource."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler_usage import testing
from hostler_usage.history.observation import Kind, Observation, Rank
from hostler_usage.reading.envelope import Notification
from hostler_usage.reading.mapping_file import packaged
from hostler_usage.reading.normalise import Normalised, Normaliser
from hostler_usage.reading.statement import ResourceKey
from hostler_usage.testing import INSTANCE, VOLUME

AT = datetime(2026, 5, 8, 16, 3, 44, 122481, tzinfo=UTC)
LAUNCHED = datetime(2026, 5, 7, 23, 1, 27, tzinfo=UTC)
UUID = "3a513875-95c9-4012-a3e7-f90c678854e5"

LEGACY: dict[str, object] = {
    "tenant_id": "7c150a59fe714e6f9263774af9688f0e",
    "user_id": "1e3ce043029547f1a61c1996d1a531a2",
    "instance_id": UUID,
    "instance_type": "m1.small",
    "instance_type_id": 2,
    "instance_flavor_id": "2",
    "memory_mb": 2048,
    "disk_gb": 25,
    "vcpus": 1,
    "root_gb": 20,
    "ephemeral_gb": 5,
    "host": "cmp-017",
    "node": "cmp-017.example",
    "availability_zone": "nova",
    "created_at": "2026-05-07 22:16:18+00:00",
    "terminated_at": "",
    "deleted_at": "",
    "launched_at": "2026-05-07T23:01:27.000000",
    "image_ref_url": "http://10.0.2.15:9292/images/155d900f-4e14-4e4c-a73d-069cbf4541e6",
    "state": "active",
    "state_description": "",
    "progress": "",
    "metadata": {},
}
VERSIONED_DATA: dict[str, object] = {
    "uuid": UUID,
    "tenant_id": LEGACY["tenant_id"],
    "user_id": LEGACY["user_id"],
    "host": "cmp-017",
    "node": "cmp-017.example",
    "availability_zone": "nova",
    "image_uuid": "155d900f-4e14-4e4c-a73d-069cbf4541e6",
    "state": "active",
    "task_state": None,
    "launched_at": "2026-05-07T23:01:27Z",
    "deleted_at": None,
    "terminated_at": None,
    "flavor": {
        "nova_object.name": "FlavorPayload",
        "nova_object.data": {
            "flavorid": "2",
            "name": "m1.small",
            "vcpus": 1,
            "memory_mb": 2048,
            "root_gb": 20,
            "ephemeral_gb": 5,
        },
    },
}
VOLUME_PAYLOAD: dict[str, object] = {
    "tenant_id": "7ffe17a15c724e2aa79fc839540aec15",
    "user_id": "bcb7746c7a41472d88a1ffac89ba6a9b",
    "host": "ctl1@ceph#rbd",
    "availability_zone": "nova",
    "volume_id": "2925bb3b-2b51-496a-bb6e-01a20e950e07",
    "volume_type": "3a9a398b-7e3b-40da-b09e-2115ad8cd68b",
    "launched_at": "2026-05-07T23:01:27+00:00",
    "created_at": "2026-05-07T23:01:26+00:00",
    "status": "in-use",
    "size": 100,
    "metadata": [],
    "volume_attachment": [{"instance_uuid": UUID, "detach_time": None}],
}


def notification(event_type: str, payload: object, at: datetime = AT) -> Notification:
    return Notification(
        message_id="4b884c03",
        has_own_id=True,
        event_type=event_type,
        publisher_id="compute.cmp-017",
        priority="INFO",
        timestamp=at,
        payload=payload,
        context_project_id="admin-project",
        request_id=None,
        digest=b"d",
    )


def normalise(item: Notification, *, region: str) -> Normalised:
    return Normaliser(packaged()).read(item, region=region)


def observed(event_type: str, payload: dict[str, object], **changes: object) -> list[Observation]:
    return testing.observed(notification(event_type, payload | changes))


def versioned(**changes: object) -> dict[str, object]:
    return {"nova_object.data": VERSIONED_DATA | changes}


def said(observation: Observation) -> dict[str, object]:
    return dict(observation.attributes)


def test_a_create_opens_at_launched_at_with_its_size() -> None:
    (opened,) = observed("compute.instance.create.end", LEGACY, message="Success")
    assert (opened.kind, opened.t_eff, opened.opens) == (Kind.STATE, LAUNCHED, True)
    assert said(opened) == {
        "project": "7c150a59fe714e6f9263774af9688f0e",
        "user": "1e3ce043029547f1a61c1996d1a531a2",
        "flavor": "m1.small",
        "vcpus": 1,
        "memory_mb": 2048,
        "disk_gb": 25,
        "image": "155d900f-4e14-4e4c-a73d-069cbf4541e6",
        "state": "active",
        "host": "cmp-017",
        "node": "cmp-017.example",
        "zone": "nova",
    }


@pytest.mark.parametrize(
    ("legacy", "twin"),
    [
        ("create.end", "create.end"),
        ("finish_resize.end", "resize_finish.end"),
        ("resize.revert.end", "resize_revert.end"),
        ("power_off.end", "power_off.end"),
        ("update", "update"),
        ("exists", "exists"),
        ("delete.end", "delete.end"),
    ],
)
def test_twins_of_the_two_dialects_say_the_same(legacy: str, twin: str) -> None:
    assert observed(f"compute.instance.{legacy}", LEGACY) == observed(
        f"instance.{twin}", versioned()
    )


@pytest.mark.parametrize("event", ["finish_resize.end", "rebuild.end", "unshelve.end"])
def test_a_cloud_that_keeps_the_launch_of_the_birth_changes_at_the_event(event: str) -> None:
    (changed,) = observed(f"compute.instance.{event}", LEGACY)
    assert changed.t_eff == AT
    fresh = AT - timedelta(seconds=2)
    (changed,) = observed(f"compute.instance.{event}", LEGACY, launched_at=str(fresh))
    assert changed.t_eff == fresh


def test_a_create_that_is_told_late_still_opens_at_its_launch() -> None:
    (opened,) = observed("compute.instance.create.end", LEGACY)
    assert AT - opened.t_eff > timedelta(hours=10)
    assert opened.t_eff == LAUNCHED


def test_a_create_that_failed_says_nothing() -> None:
    assert observed("compute.instance.create.end", LEGACY, message="No valid host") == []


def test_an_instance_that_never_launched_does_not_open() -> None:
    payload = LEGACY | {"launched_at": "", "deleted_at": "2026-05-08T16:00:00.000000"}
    assert [o.opens for o in observed("compute.instance.delete.end", payload)] == [False]


@pytest.mark.parametrize("field", ["deleted_at", "terminated_at"])
def test_a_delete_ends_at_the_moment_in_the_payload(field: str) -> None:
    *_, end = observed(
        "compute.instance.delete.end", LEGACY, state="deleted", **{field: "2026-05-08T16:00:00.5"}
    )
    assert (end.kind, end.rank) == (Kind.END, Rank.DELETE)
    assert end.t_eff == datetime(2026, 5, 8, 16, 0, 0, 500000, tzinfo=UTC)


def test_a_delete_without_a_moment_ends_at_the_event() -> None:
    *_, end = observed("compute.instance.delete.end", LEGACY)
    assert (end.kind, end.t_eff) == (Kind.END, AT)


@pytest.mark.parametrize("event", ["exists", "update"])
def test_a_body_that_says_deleted_is_evidence_of_the_end(event: str) -> None:
    payload = LEGACY | {"state": "deleted", "terminated_at": "2026-05-08T16:00:00"}
    ends = [o for o in observed(f"compute.instance.{event}", payload) if o.kind is Kind.END]
    assert [end.t_eff for end in ends] == [datetime(2026, 5, 8, 16, tzinfo=UTC)]
    assert ends[0].rank < Rank.DELETE


def test_a_soft_delete_is_not_the_end() -> None:
    kinds = [
        o.kind for o in observed("compute.instance.soft_delete.end", LEGACY, state="soft-delete")
    ]
    assert Kind.END not in kinds


@pytest.mark.parametrize(
    "task", ["resize_migrated", "resize_finish", "resize_reverting", "rebuilding"]
)
def test_between_two_segments_neither_flavor_nor_image_is_believed(task: str) -> None:
    segment = observed("compute.instance.exists", LEGACY, state_description=task)[0]
    assert (segment.opens, segment.attributes) == (True, ())


def test_an_update_in_the_middle_of_a_task_says_nothing_of_the_state() -> None:
    moments = [
        o.t_eff
        for o in observed("compute.instance.update", LEGACY, state_description="powering-off")
    ]
    assert moments == [LAUNCHED]


@pytest.mark.parametrize(
    "event", ["exists.verified", "exists.failed", "resize.prep.start", "shutdown.end"]
)
def test_events_that_move_no_edge_are_known_and_say_nothing(event: str) -> None:
    item = notification(f"compute.instance.{event}", LEGACY)
    result = normalise(item, region="r1")
    assert result.is_known
    assert result.resource == ResourceKey(region="r1", resource_type=INSTANCE, resource_id=UUID)
    assert testing.observed(item) == []


def test_an_unknown_event_type_is_filed_under_its_project() -> None:
    item = notification("dns.zone.create", {"project_id": "p"})
    result = normalise(item, region="r1")
    assert (result.is_known, result.resource, result.project_id) == (False, None, "p")


def test_the_owner_in_the_payload_outranks_the_context() -> None:
    item = notification("compute.instance.exists", LEGACY)
    result = normalise(item, region="r1")
    assert result.project_id == LEGACY["tenant_id"]
    assert (
        normalise(notification("dns.zone.create", "text"), region="r1").project_id
        == "admin-project"
    )


def test_a_volume_opens_with_its_size_type_and_attachment() -> None:
    (opened,) = observed("volume.create.end", VOLUME_PAYLOAD)
    assert (opened.t_eff, opened.opens, opened.rank) == (LAUNCHED, True, Rank.CREATE)
    assert said(opened) == {
        "project": "7ffe17a15c724e2aa79fc839540aec15",
        "user": "bcb7746c7a41472d88a1ffac89ba6a9b",
        "state": "in-use",
        "size_gb": 100,
        "volume_type": "3a9a398b-7e3b-40da-b09e-2115ad8cd68b",
        "zone": "nova",
        "host": "ctl1@ceph#rbd",
        "attached_to": UUID,
    }


def test_ceilometers_name_for_the_attached_server_is_read_too() -> None:
    (opened,) = observed(
        "volume.create.end", VOLUME_PAYLOAD, volume_attachment=[{"server_id": "s"}]
    )
    assert said(opened)["attached_to"] == "s"


def test_a_resent_create_is_evidence_at_its_true_moment() -> None:
    moment = "2026-05-07 23:01:26+00:00"
    opening, today = observed(
        "volume.create.end",
        VOLUME_PAYLOAD,
        audit_period_beginning=moment,
        audit_period_ending=moment,
        size=500,
    )
    assert (opening.t_eff, opening.opens, opening.rank) == (LAUNCHED, True, Rank.EVIDENCE)
    assert opening.attributes == ()  # its size is today's, not that of the birth
    assert (today.t_eff, said(today)["size_gb"]) == (AT, 500)


@pytest.mark.parametrize("beginning", ["audit_period_beginning", "audit_period_begining"])
def test_a_resent_delete_ends_at_its_true_moment(beginning: str) -> None:
    moment = "2026-05-08 09:00:00+00:00"
    ends = [
        o
        for o in observed(
            "volume.delete.end",
            VOLUME_PAYLOAD,
            **{beginning: moment, "audit_period_ending": moment},
        )
        if o.kind is Kind.END
    ]
    assert [(end.t_eff, end.rank) for end in ends] == [
        (datetime(2026, 5, 8, 9, tzinfo=UTC), Rank.EVIDENCE)
    ]


def test_a_transfer_says_the_new_project() -> None:
    *_, state = observed("volume.transfer.accept.end", VOLUME_PAYLOAD, tenant_id="new")
    assert (said(state)["project"], state.t_eff) == ("new", AT)


def test_a_broken_time_is_named_and_the_rest_is_read() -> None:
    item = notification(
        "compute.instance.create.end", LEGACY | {"launched_at": "2014-05-3107: 19: 43.46"}
    )
    result = normalise(item, region="r1")
    assert result.problems == ("bad_time:launched_at",)
    assert [o.t_eff for o in testing.observed(item)] == [AT]


@pytest.mark.parametrize("year", [1970, 9999])
def test_an_absurd_time_is_kept_and_not_folded(year: int) -> None:
    item = notification("compute.instance.create.end", LEGACY, AT.replace(year=year))
    result = normalise(item, region="r1")
    assert (testing.observed(item), result.problems) == ([], ("absurd_time:timestamp",))


def test_an_absurd_time_in_the_payload_is_not_believed() -> None:
    item = notification(
        "compute.instance.delete.end", LEGACY | {"deleted_at": "3026-01-01 00:00:00"}
    )
    result = normalise(item, region="r1")
    assert result.problems == ("absurd_time:deleted_at",)
    assert testing.observed(item)[-1].t_eff == AT


def test_old_payloads_without_root_gb_take_the_whole_disk() -> None:
    old = {key: value for key, value in LEGACY.items() if key not in ("root_gb", "ephemeral_gb")}
    (opened,) = observed("compute.instance.create.end", old)
    assert said(opened)["disk_gb"] == 25


def test_an_instance_booted_from_a_volume_has_no_image() -> None:
    (opened,) = observed("compute.instance.create.end", LEGACY, image_ref_url="http://x/images/")
    assert said(opened)["image"] is None


def test_decimal_project_ids_and_numbers_in_text_are_read() -> None:
    (opened,) = observed("compute.instance.create.end", LEGACY, tenant_id=604905, vcpus="4")
    assert (said(opened)["project"], said(opened)["vcpus"]) == ("604905", 4)


@pytest.mark.parametrize("vcpus", [-1, 1.5, 2**70, True, "many", [], {"n": 1}])
def test_a_quantity_that_is_none_is_named_and_not_billed(vcpus: object) -> None:
    item = notification("compute.instance.create.end", LEGACY | {"vcpus": vcpus})
    result = normalise(item, region="r1")
    assert result.problems == ("bad_number:vcpus",)
    assert "vcpus" not in said(testing.observed(item)[0])


def test_a_volume_without_an_id_is_named() -> None:
    item = notification("volume.create.end", {})
    result = normalise(item, region="r1")
    assert (result.resource, testing.observed(item), result.problems) == (
        None,
        [],
        ("no_resource_id",),
    )


NOVA_STATES = (
    "active building paused suspended stopped rescued resized soft-delete error shelved"
    " shelved_offloaded"
)


def test_every_vm_state_of_nova_has_a_class() -> None:
    nova_states = NOVA_STATES.split()
    state_class = packaged().resources["instance"].state_class
    assert "other" not in {state_class(state) for state in nova_states}
    assert (state_class(None), state_class("new-in-2030")) == ("unknown", "other")


EVENT_TYPES = [
    body.events + action if body.events.endswith(".") else body.events
    for resource in packaged().resources.values()
    for body in resource.bodies.values()
    for action in resource.edges
]

SCALAR = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["", "None", "active", "deleted", "2026-05-08 16:00:00", "resized", UUID])
)
JSON = st.recursive(
    SCALAR,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text() | st.sampled_from(sorted(LEGACY)), inner, max_size=3)
    ),
)
LEGACY_LIKE = st.fixed_dictionaries({}, optional=dict.fromkeys(LEGACY, JSON)).map(
    lambda c: LEGACY | c
)
VERSIONED_LIKE = st.fixed_dictionaries({}, optional=dict.fromkeys(VERSIONED_DATA, JSON)).map(
    lambda c: versioned(**c)
)
VOLUME_LIKE = st.fixed_dictionaries({}, optional=dict.fromkeys(VOLUME_PAYLOAD, JSON)).map(
    lambda c: VOLUME_PAYLOAD | c
)


@given(
    st.sampled_from(EVENT_TYPES) | st.text(min_size=1),
    LEGACY_LIKE | VERSIONED_LIKE | VOLUME_LIKE | JSON,
    st.datetimes(timezones=st.just(UTC)),
)
def test_any_payload_is_normalised_without_raising(
    event_type: str, payload: object, at: datetime
) -> None:
    item = notification(event_type, payload, at)
    result = normalise(item, region="r1")
    assert result.is_known or result.said == ()
    for observation in testing.observed(item):
        text = json.dumps(dict(observation.attributes), ensure_ascii=False)
        assert "\x00" not in text.encode("utf-8").decode()
        assert abs(observation.t_eff - AT) < timedelta(days=366 * 100)


def test_volumes_and_instances_do_not_share_a_name_space() -> None:
    item = notification("volume.create.end", VOLUME_PAYLOAD)
    result = normalise(item, region="r1")
    assert result.resource is not None
    assert result.resource.resource_type == VOLUME
