"""Real bodies of every service, what they say, and what follows; every quirk seen on a real cloud is a test.

In test_usage_<file>, quirk -> test (here unless a file is named):

  audit_period_begining               normalise: test_a_resent_delete_ends_at_its_true_moment; test_image_exists...
  nested audit_period                 test_a_versioned_exists_says_what_its_legacy_twin_says
  all spellings of times              times: test_a_known_spelling_is_read_exactly, test_a_broken_time_is_an_error
  broken time                         normalise: test_a_broken_time_is_named_and_the_rest_is_read
  bandwidth dict, list, {}, null      test_bandwidth_...; reader: test_counters_by_name_are_read_from_whatever_is_there
  bandwidth is repeated               amounts: test_of_every_period_the_highest_reading_counts_once
  label fallback                      reader: test_counters_by_name_are_read_from_whatever_is_there
  metadata dict, [], rows, str        test_metadata_of_any_shape_is_read; reader: test_a_text_is_got_at...
  image_meta's texts and __1__ keys   test_the_os_is_what_the_image_says
  decimal project ids                 normalise: test_decimal_project_ids_and_numbers_in_text_are_read
  all vm_states                       normalise: test_every_vm_state_of_nova_has_a_class
  launched_at is no birth             test_an_instance_lives_from_its_first_launch_whatever_later_launches_say
  exists just before a rebuild        test_the_audit_before_a_rebuild_has_the_old_image
  flavor flips in an update           normalise: test_between_two_segments_neither_flavor_nor_image_is_believed
  finish_resize.end shows `resized`   intervals: test_a_day_of_an_instance_becomes_its_intervals
  stale states of a delete            test_a_delete_in_the_middle_of_a_resize_ends_once_whatever_stale_states_say
  delete.end that never comes         test_a_delete_that_failed_is_no_end
  delete.end of api.<host>            test_a_shelved_instance_is_deleted_by_the_api_without_a_host
  failed create, scheduled again      test_a_create_that_failed_on_two_hosts_is_billed_from_the_third
  create.end without Success          normalise: test_a_create_that_failed_says_nothing
  partial and hourly exists overlap   intervals: test_further_audits_change_nothing
  what came before a rebuild          test_the_audit_before_a_rebuild_has_the_old_image
  deleted, and audited twice more     test_audits_after_a_delete_end_nothing_twice
  exists shows state at audit time    test_an_audit_shows_the_state_of_its_own_time
  an hour that has no exists          test_an_hour_without_an_audit_is_billed_all_the_same
  shelved-offloaded has no exists     test_a_shelved_instance_is_deleted_by_the_api_without_a_host
  never launched                      normalise: test_an_instance_that_never_launched_does_not_open
  create.error comes as ERROR         test_failures_are_listened_to
  one moment, several values          intervals: test_cut_rounded_and_fine_spellings_of_a_launch_are_one_moment
  twins under two names               normalise: test_twins_of_the_two_dialects_say_the_same
  publisher is not host               test_the_host_is_the_bodys_and_never_the_publishers
  queue order is not sending order    intervals: test_order_and_copies_change_nothing
  admin context with null project     normalise: test_the_owner_in_the_payload_outranks_the_context
  request contexts inside payloads    api: test_a_reader_of_one_project_sees_that_project_alone
  exchange of the other durability    ingest: test_a_cloud_that_came_first..., test_a_cloud_that_comes_after_us...
  actions sent again by Cinder        normalise: test_a_resent_create_...; intervals: test_actions_sent_again_...
  ERROR payload that is a text        test_a_failed_upload_says_its_text_to_nobody
  partial image.send is an ERROR      test_bytes_that_were_sent_count_even_if_the_transfer_was_cut_off
  .start holds the request only       test_the_request_of_a_floating_ip_moves_nothing
  bulk creates                        test_a_bulk_create_speaks_of_each_of_its_resources
  old delete.end with an id alone     test_a_delete_that_holds_an_id_alone_ends_the_resource
  launched_at is now, or never was    test_a_volume_is_not_there_while_it_is_being_made...; test_a_volume_that_never...
  an address allocated again          test_an_address_that_is_allocated_again_lives_again_and_is_nobodys_between
  a lease's own times, if it is told  lease_courses: test_every_lease_is_billed_exactly_however_short_it_is...
  a lease's times are whole seconds   test_a_node_that_is_taken_as_another_lease_ends_is_used_by_both_in_turn
  disassociate names the instance     test_an_address_of_nova_network_is_of_the_instance_it_names_until...
  server_id or instance_uuid          normalise: test_ceilometers_name_for_the_attached_server_is_read_too
  errors of the decorator             test_an_error_under_a_functions_name_is_filed_under_its_instance
  metering for granular traffic       test_granular_traffic_counts_once_though_it_is_told_by_label_router_and_project
"""

import json
from collections import defaultdict
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler_usage import messages
from hostler_usage.auditing.audits import Code
from hostler_usage.history.intervals import Anomaly, Provenance
from hostler_usage.history.ledger import Ledger, reckon
from hostler_usage.history.measures import MICROSECONDS_PER_HOUR, Window, totals
from hostler_usage.history.observation import attributes
from hostler_usage.profiling.operations import Outcome
from hostler_usage.reading.envelope import Notification
from hostler_usage.reading.mapping import Edge, Phase, Reading
from hostler_usage.reading.mapping_file import packaged
from hostler_usage.reading.normalise import Normalised, Normaliser
from hostler_usage.reading.statement import (
    CounterReading,
    Evidence,
    ResourceKey,
    Scalar,
    Statement,
    decode,
    encode,
)
from hostler_usage.reading.times import EPOCH, MICROSECOND
from hostler_usage.settings import Source

HOUR = timedelta(hours=1)
SECOND = timedelta(seconds=1)
Payload = dict[str, object]
NORMALISER = Normaliser(packaged())


def on(day: int, clock: str, month: int = 10) -> datetime:
    return datetime.fromisoformat(f"2026-{month:02}-{day:02}T{clock}+00:00")


def sent(
    event_type: str,
    payload: object,
    at: datetime,
    *,
    priority: str = "INFO",
    publisher: str = "",
    message_id: str | None = None,
) -> Notification:
    return Notification(
        message_id=message_id or f"{event_type}@{at}",
        has_own_id=True,
        event_type=event_type,
        publisher_id=publisher,
        priority=priority,
        timestamp=at,
        payload=payload,
        context_project_id="admin",
        request_id="req-1",
        digest=b"d",
    )


def read(item: Notification) -> Normalised:
    return NORMALISER.read(item, region="r1")


def said(item: Notification) -> Statement:
    """The one statement a message makes, without a problem."""
    normalised = read(item)
    assert normalised.problems == ()
    (one,) = normalised.said
    assert one.statement is not None
    return one.statement


def ledgers(*items: Notification) -> dict[str, Ledger]:
    """What messages amount to, by the ids of the resources they speak of."""
    told: dict[ResourceKey, list[tuple[Statement, Evidence]]] = defaultdict(list)
    for item in items:
        evidence = Evidence(
            event_time=item.timestamp, message_id=item.message_id, digest=item.digest
        )
        for one in read(item).said:
            if one.statement is not None:
                told[one.resource].append((decode(encode(one.statement)), evidence))
    return {
        key.resource_id: reckon(packaged().resources[key.resource_type], items)
        for key, items in told.items()
    }


def ledger(*items: Notification) -> Ledger:
    (only,) = ledgers(*items).values()
    return only


def spans(found: Ledger, *names: str) -> list[tuple[object, ...]]:
    return [
        (item.start, item.end, *(item.attributes.get(name) for name in names))
        for item in found.intervals
    ]


def used(found: Ledger, resource: str, start: datetime, end: datetime) -> dict[str, int]:
    window = Window(start=start, end=end, as_of=end)
    amounts = totals(packaged().measures_of(resource), found.intervals, window, found.amounts)
    return {name: amount for name, amount in amounts.items() if amount}


# --- Nova: the bodies of nova/notifications/base.py and of doc/notification_samples

INSTANCE = "3a513875-95c9-4012-a3e7-f90c678854e5"
EXISTS: Payload = json.loads(
    """{"tenant_id":"7c150a59fe714e6f9263774af9688f0e","user_id":"1e3ce043029547f1a61c1996d1a531a2",
    "instance_id":"3a513875-95c9-4012-a3e7-f90c678854e5","display_name":"web-1",
    "reservation_id":"r-npxv0e40","hostname":"web-1","instance_type":"m1.small","instance_type_id":2,
    "instance_flavor_id":"2","architecture":"x86_64","memory_mb":2048,"disk_gb":20,"vcpus":1,
    "root_gb":20,"ephemeral_gb":0,"host":"cmp-017","node":"cmp-017.example",
    "availability_zone":"nova","cell_name":"","created_at":"2026-05-07 22:16:18+00:00",
    "terminated_at":"","deleted_at":"","launched_at":"2026-05-07T23:01:27.000000",
    "image_ref_url":"http://10.0.2.15:9292/images/155d900f-4e14-4e4c-a73d-069cbf4541e6",
    "os_type":null,"kernel_id":"","ramdisk_id":"","state":"active","state_description":"",
    "progress":"","access_ip_v4":null,"access_ip_v6":null,
    "audit_period_beginning":"2026-05-08 15:00:00","audit_period_ending":"2026-05-08 16:00:00",
    "bandwidth":{"public":{"bw_in":4803908381,"bw_out":202702569},
                 "private":{"bw_in":0,"bw_out":0}},
    "image_meta":{"base_image_ref":"155d900f-4e14-4e4c-a73d-069cbf4541e6",
      "container_format":"bare","disk_format":"qcow2","min_disk":"20","min_ram":"512",
      "os_type":"linux","os_distro":"ubuntu","org.openstack__1__architecture":"x64",
      "org.openstack__1__os_distro":"com.ubuntu","org.openstack__1__os_version":"12.04"},
    "metadata":{}}"""
)
VERSIONED: Payload = json.loads(
    """{"nova_object.name":"InstanceExistsPayload","nova_object.namespace":"nova",
    "nova_object.version":"2.1","nova_object.data":{"uuid":"178b0921-8f85-4257-88b6-2e743b5a975c",
    "tenant_id":"6f70656e737461636b20342065766572","user_id":"fake","display_name":"some-server",
    "host":"compute","host_name":"some-server","node":"fake-mini","availability_zone":"nova",
    "architecture":null,"os_type":null,"image_uuid":"a2459075-d96c-40d5-893e-577ff92e721c",
    "state":"active","task_state":"rebuilding","power_state":"running","progress":0,"locked":false,
    "metadata":{},"created_at":"2012-10-29T13:42:11Z","launched_at":"2012-10-29T13:42:11Z",
    "updated_at":"2012-10-29T13:42:11Z","deleted_at":null,"terminated_at":null,
    "request_id":"req-5b6c791d-5709-4f36-8fbe-c3e02869e35d","block_devices":[
      {"nova_object.name":"BlockDevicePayload","nova_object.data":{
        "boot_index":null,"volume_id":"a07f71dc-8151-4e7d-a0cc-cd24a3f11113"}}],
    "ip_addresses":[{"nova_object.name":"IpPayload","nova_object.namespace":"nova",
      "nova_object.version":"1.0","nova_object.data":{"mac":"fa:16:3e:4c:2c:30",
      "address":"192.168.1.3","version":4,"label":"private"}}],
    "flavor":{"nova_object.name":"FlavorPayload","nova_object.namespace":"nova",
      "nova_object.version":"1.4","nova_object.data":{"name":"test_flavor","root_gb":1,"vcpus":1,
      "ephemeral_gb":0,"memory_mb":512,"swap":0,"extra_specs":{"hw:watchdog_action":"disabled"}}},
    "audit_period":{"nova_object.name":"AuditPeriodPayload","nova_object.namespace":"nova",
      "nova_object.version":"1.0","nova_object.data":{
      "audit_period_beginning":"2012-10-01T00:00:00Z",
      "audit_period_ending":"2012-10-29T13:42:11Z"}}}}"""
)
LAUNCHED = datetime(2026, 5, 7, 23, 1, 27, tzinfo=UTC)
AUDITED = datetime(2026, 5, 8, 16, 3, 44, 122481, tzinfo=UTC)


def legacy(event: str, at: datetime, /, **changes: object) -> Notification:
    priority = "ERROR" if event.endswith(".error") else "INFO"
    return sent(f"compute.instance.{event}", EXISTS | changes, at, priority=priority)


def test_a_legacy_exists_says_all_of_its_instance() -> None:
    assert said(legacy("exists", AUDITED)) == Statement(
        edge=Edge.AUDIT,
        attributes=attributes(
            project="7c150a59fe714e6f9263774af9688f0e",
            user="1e3ce043029547f1a61c1996d1a531a2",
            flavor="m1.small",
            vcpus=1,
            memory_mb=2048,
            disk_gb=20,
            image="155d900f-4e14-4e4c-a73d-069cbf4541e6",
            os="ubuntu",
            os_type=None,
            state="active",
            host="cmp-017",
            node="cmp-017.example",
            zone="nova",
        ),
        born_at=LAUNCHED,
        period=(AUDITED.replace(hour=15, minute=0, second=0, microsecond=0), on(8, "16:00", 5)),
        readings=tuple(
            CounterReading(
                name=f"bandwidth_{way}_bytes", reading=Reading.PERIOD, value=value, label=label
            )
            for way, values in (("in", (4803908381, 0)), ("out", (202702569, 0)))
            for label, value in zip(("public", "private"), values, strict=True)
        ),
    )


def test_a_versioned_exists_says_what_its_legacy_twin_says() -> None:
    statement = said(sent("instance.exists", VERSIONED, AUDITED))
    launched = datetime(2012, 10, 29, 13, 42, 11, tzinfo=UTC)
    assert (statement.edge, statement.task, statement.born_at) == (
        Edge.AUDIT,
        "rebuilding",
        launched,
    )
    assert statement.period == (datetime(2012, 10, 1, tzinfo=UTC), launched)
    assert dict(statement.attributes) == {
        "project": "6f70656e737461636b20342065766572",
        "user": "fake",
        "flavor": "test_flavor",
        "os_type": None,
        "vcpus": 1,
        "memory_mb": 512,
        "disk_gb": 1,
        "image": "a2459075-d96c-40d5-893e-577ff92e721c",
        "state": "active",
        "host": "compute",
        "node": "fake-mini",
        "zone": "nova",
        "fixed_ips": 1,
    }


def test_a_create_of_2012_in_the_oldest_shape_opens() -> None:
    payload = json.loads(
        """{"created_at":"2012-05-08 20:23:41","deleted_at":"","disk_gb":0,"display_name":"testme",
        "fixed_ips":[{"address":"10.0.0.2","floating_ips":[],"meta":{},"type":"fixed","version":4}],
        "image_ref_url":"http://10.0.2.15:9292/images/UUID",
        "instance_id":"9f9d01b9-4a58-4271-9e27-398b21ab20d1","instance_type":"m1.tiny",
        "instance_type_id":2,"launched_at":"2012-05-08 20:23:47.985999","memory_mb":512,
        "state":"active","state_description":"","tenant_id":"7c150a59fe714e6f9263774af9688f0e",
        "user_id":"1e3ce043029547f1a61c1996d1a531a2","vcpus":1,"root_gb":0,"ephemeral_gb":0,
        "host":"compute-host-name","availability_zone":"nova","os_type":"linux",
        "architecture":"x86","message":"Success","metadata":[]}"""
    )
    at = datetime(2012, 5, 8, 20, 23, 48, 28195, tzinfo=UTC)
    found = ledger(sent("compute.instance.create.end", payload, at))
    assert spans(found, "vcpus", "disk_gb", "fixed_ips", "os", "image") == [
        (at.replace(second=47, microsecond=985999), None, 1, 0, 1, "linux", "UUID")
    ]


@pytest.mark.parametrize(
    ("meta", "os"),
    [
        ({"os_distro": "ubuntu"}, "ubuntu"),
        ({"org.openstack__1__os_distro": "com.ubuntu"}, "com.ubuntu"),
        ({"min_disk": "20"}, "linux"),
        ({}, "linux"),
        (None, "linux"),
        ("text", "linux"),
        ([], "linux"),
    ],
)
def test_the_os_is_what_the_image_says(meta: object, os: str) -> None:
    found = ledger(legacy("create.end", AUDITED, image_meta=meta, os_type="linux"))
    assert spans(found, "os", "os_type") == [(LAUNCHED, None, os, "linux")]


def test_an_instance_rebuilt_from_an_image_that_names_no_os_has_that_of_its_type() -> None:
    at = LAUNCHED + 2 * HOUR
    rebuilt = legacy(
        "rebuild.end",
        at + SECOND,
        launched_at=f"{at:%Y-%m-%d %H:%M:%S}",
        image_meta={"min_disk": "1"},
        os_type="linux",
    )
    found = ledger(legacy("create.end", LAUNCHED + SECOND), rebuilt)
    assert spans(found, "os") == [(LAUNCHED, at, "ubuntu"), (at, None, "linux")]


def test_the_dialect_that_does_not_tell_the_os_contradicts_nobody() -> None:
    def versioned(event: str, at: datetime, start: datetime | None = None) -> Notification:
        inner: Payload = {
            "uuid": INSTANCE,
            "tenant_id": EXISTS["tenant_id"],
            "os_type": "linux",
            "state": "active",
            "launched_at": "2026-05-07T23:01:27Z",
        }
        if start is not None:
            period = {
                "audit_period_beginning": f"{start:%Y-%m-%dT%H:%M:%SZ}",
                "audit_period_ending": f"{start + HOUR:%Y-%m-%dT%H:%M:%SZ}",
            }
            inner["audit_period"] = {"nova_object.data": period}
        return sent(f"instance.{event}", {"nova_object.data": inner}, at)

    at = LAUNCHED + SECOND
    twins = [
        legacy("create.end", at, os_type="linux"),
        versioned("create.end", at + MICROSECOND),
        legacy("exists", AUDITED, os_type="linux"),
        versioned("exists", AUDITED + MICROSECOND, on(8, "15:00", 5)),
    ]
    found = ledger(*twins)
    assert spans(found, "os") == [(LAUNCHED, None, "ubuntu")]
    assert {item.code for item in found.reconciliation.verdicts} == {Code.AGREED}
    assert spans(ledger(twins[1]), "os") == [(LAUNCHED, None, "linux")]


PERIOD = {"audit_period_beginning": "2026-05-08 15:00:00"}


def test_bandwidth_is_the_highest_reading_of_each_period_and_network() -> None:
    def audit(event: str, ending: str, at: datetime, sent_bytes: int) -> Notification:
        return legacy(
            event,
            at,
            **PERIOD,
            audit_period_ending=ending,
            bandwidth={"public": {"bw_in": 7, "bw_out": sent_bytes}, "private": None},
        )

    found = ledger(
        legacy("create.end", LAUNCHED + SECOND, bandwidth={}),
        # an update spells its period in another way than an audit does
        audit("update", "2026-05-08T15:20:00.000000", on(8, "15:20", 5), 100),
        audit("update", "2026-05-08T15:40:00.000000", on(8, "15:40", 5), 400),
        audit("exists", "2026-05-08 15:40:01", on(8, "15:40:01", 5), 400),
        audit("exists", "2026-05-08 16:00:00", on(8, "16:00:30", 5), 900),
        legacy("update", on(8, "16:01", 5), bandwidth=None),
    )
    assert used(found, "instance", on(8, "15:00", 5), on(8, "16:00", 5)) == {
        "instance_hours": MICROSECONDS_PER_HOUR,
        "vcpu_hours": MICROSECONDS_PER_HOUR,
        "ram_mb_hours": 2048 * MICROSECONDS_PER_HOUR,
        "local_gb_hours": 20 * MICROSECONDS_PER_HOUR,
        "bandwidth_in_bytes": 7,
        "bandwidth_out_bytes": 900,
    }


def test_bandwidth_of_the_versioned_dialect_is_the_same_counter() -> None:
    rows = [
        {
            "nova_object.name": "BandwidthPayload",
            "nova_object.data": {"network_name": "public", "in_bytes": 7, "out_bytes": 900},
        }
    ]
    data: dict[str, object] = VERSIONED["nova_object.data"]  # type: ignore[assignment]
    statement = said(
        sent("instance.exists", {"nova_object.data": data | {"bandwidth": rows}}, AUDITED)
    )
    assert [(item.name, item.label, item.value) for item in statement.readings] == [
        ("bandwidth_in_bytes", "public", 7),
        ("bandwidth_out_bytes", "public", 900),
    ]


def test_an_error_under_a_functions_name_is_filed_under_its_instance() -> None:
    for payload in (
        {"exception": {"message": "no", "kwargs": {"uuid": INSTANCE}}, "args": {}},
        {"exception": {"message": "no", "kwargs": {"instance_uuid": INSTANCE}}},
        {"exception": {"message": "no", "kwargs": {}}, "args": {"instance": {"uuid": INSTANCE}}},
    ):
        item = sent("terminate_instance", payload, AUDITED, priority="ERROR")
        resource = read(item).resource
        assert resource is not None
        assert resource.resource_id == INSTANCE
        statement = said(item)
        assert (statement.operation, statement.phase) == ("delete", Phase.ERROR)
        assert (statement.reason, statement.request_id) == ("no", "req-1")


def test_a_failed_create_says_why_and_opens_nothing() -> None:
    item = legacy(
        "create.error",
        AUDITED,
        launched_at="",
        state="building",
        state_description="scheduling",
        message="Build of instance was re-scheduled: no",
        code=500,
        exception={"kwargs": {"instance_uuid": INSTANCE, "reason": "no disk"}},
    )
    statement = said(item)
    assert (statement.operation, statement.phase, statement.reason) == (
        "create",
        Phase.ERROR,
        "no disk",
    )
    assert ledger(item).intervals == ()


@pytest.mark.parametrize(
    "event", ["create.start", "power_off.start", "finish_resize.start", "delete.start"]
)
def test_a_start_alone_is_no_life_but_an_operation_that_never_ended(event: str) -> None:
    found = ledger(legacy(event, LAUNCHED + HOUR))
    assert (found.intervals, found.anomalies) == ((), ())
    assert [item.outcome for item in found.operations] == [Outcome.UNFINISHED]
    told = ledger(legacy(event, LAUNCHED + HOUR), legacy("update", LAUNCHED + 2 * HOUR))
    assert spans(told, "flavor") == [(LAUNCHED, None, EXISTS["instance_type"])]


def test_failures_are_listened_to() -> None:
    keys = {
        binding.routing_key for binding in messages.queue(Source(name="a", region="r")).bindings
    }
    assert keys == {"notifications.*", "versioned_notifications.*"}


def test_a_create_that_failed_on_two_hosts_is_billed_from_the_third() -> None:
    at = on(8, "10:00", 5)
    items = []
    for round_ in range(2):
        then = at + round_ * 100 * SECOND
        nothing = {"launched_at": "", "state": "building", "host": None, "node": None}
        items += [
            legacy("create.start", then, **nothing),
            legacy("shutdown.start", then + 9 * SECOND, **nothing),
            legacy("shutdown.end", then + 10 * SECOND, **nothing),
            legacy("create.error", then + 11 * SECOND, **nothing),
        ]
    assert ledger(*items).intervals == ()
    born = at + 300 * SECOND
    items.append(
        legacy("create.end", born + SECOND, launched_at=str(born), message="Success", host="c3")
    )
    assert spans(ledger(*items), "host") == [(born, None, "c3")]


def test_an_instance_lives_from_its_first_launch_whatever_later_launches_say() -> None:
    """launched_at is set anew by rebuild, rescue, unshelve, finished and reverted resizes."""
    found = ledger(
        legacy("create.end", LAUNCHED + SECOND),
        *(
            legacy(f"{event}.end", LAUNCHED + n * HOUR, launched_at=str(LAUNCHED + n * HOUR))
            for n, event in enumerate(
                ("rebuild", "rescue", "unshelve", "finish_resize", "resize.revert"), start=1
            )
        ),
    )
    assert spans(found) == [(LAUNCHED, None)]


def test_the_audit_before_a_rebuild_has_the_old_image() -> None:
    """With the create lost, the audit before is what tells of the time before."""
    at = on(8, "12:30", 5)
    url = "http://g/images/%s"
    items = [
        legacy(
            "exists",
            at - 60 * SECOND,
            image_ref_url=url % "old",
            image_meta={"os_distro": "debian"},
            state_description="rebuilding",
        ),
        legacy(
            "update", at - 50 * SECOND, image_ref_url=url % "new", state_description="rebuilding"
        ),
        legacy("rebuild.end", at + SECOND, image_ref_url=url % "new", launched_at=str(at)),
    ]
    assert spans(ledger(*items))[0][0] == LAUNCHED  # it was there before
    items.append(legacy("exists", at - HOUR, image_ref_url=url % "old"))
    assert spans(ledger(*items), "image") == [(LAUNCHED, at, "old"), (at, None, "new")]


def test_a_delete_in_the_middle_of_a_resize_ends_once_whatever_stale_states_say() -> None:
    at = on(8, "12:00", 5)
    end = at + 3 * SECOND
    stale = {"state": "resized"}
    found = ledger(
        legacy("create.end", LAUNCHED + SECOND),
        legacy("update", at, state_description="deleting", **stale),
        legacy("update", at, state_description="", **stale),
        legacy("update", at, state_description="deleting", **stale),
        legacy("resize.confirm.start", at + SECOND, **stale),
        legacy("delete.start", at + SECOND, **stale),
        legacy("resize.confirm.end", at + 2 * SECOND),
        legacy("delete.end", end, state="deleted", deleted_at=str(end), terminated_at=str(end)),
    )
    assert spans(found)[-1][1] == end
    assert found.anomalies == ()
    assert {item.provenance for item in found.intervals} == {Provenance.EVENTS}


def test_a_delete_that_failed_is_no_end() -> None:
    payload = {"exception": {"message": "no", "kwargs": {"instance_uuid": INSTANCE}}, "args": {}}
    found = ledger(
        legacy("create.end", LAUNCHED + SECOND),
        legacy("delete.start", AUDITED),
        sent("terminate_instance", payload, AUDITED + SECOND, priority="ERROR"),
    )
    assert spans(found) == [(LAUNCHED, None)]


def test_audits_after_a_delete_end_nothing_twice() -> None:
    """Deleted between the hour and the audit's run, it gets two, and deleted_at is rounded in them."""
    end = on(8, "16:00:12.345678", 5)
    gone = {"state": "deleted", "deleted_at": "2026-05-08T16:00:12.000000"}
    period = {"audit_period_beginning": "2026-05-08 16:00:00"}
    found = ledger(
        legacy("create.end", LAUNCHED + SECOND),
        legacy("delete.end", end + SECOND, **gone | {"deleted_at": str(end)}),
        legacy("exists", on(8, "16:00:30", 5), **gone),
        legacy("exists", on(8, "17:00:30", 5), **gone | period),
    )
    assert spans(found) == [(LAUNCHED, end)]
    assert found.anomalies == ()


def test_an_audit_shows_the_state_of_its_own_time() -> None:
    """Stopped between the hour and the audit: the audited hour it ran all of."""
    found = ledger(
        legacy("create.end", LAUNCHED + SECOND),
        legacy("power_off.end", on(8, "16:00:10", 5), state="stopped"),
        legacy("exists", on(8, "16:00:30", 5), state="stopped"),
    )
    assert spans(found, "state") == [
        (LAUNCHED, on(8, "16:00:10", 5), "active"),
        (on(8, "16:00:10", 5), None, "stopped"),
    ]


def test_an_hour_without_an_audit_is_billed_all_the_same() -> None:
    """Rebuilt between the hour and the audit: launched_at lies after the hour, which has no exists."""
    at = on(8, "16:00:10", 5)
    found = ledger(
        legacy("exists", on(8, "15:00:30", 5)),
        legacy("rebuild.end", at + SECOND, launched_at=str(at)),
        legacy("exists", on(8, "17:00:30", 5), launched_at=str(at)),
    )
    hour = used(found, "instance", on(8, "15:00", 5), on(8, "16:00", 5))
    assert hour["instance_hours"] == MICROSECONDS_PER_HOUR


def test_a_shelved_instance_is_deleted_by_the_api_without_a_host() -> None:
    at = on(8, "12:00", 5)
    nowhere = {"host": None, "node": None, "state": "shelved_offloaded"}
    end = on(9, "12:00", 5)
    found = ledger(
        legacy("create.end", LAUNCHED + SECOND),
        legacy("shelve_offload.end", at, **nowhere),
        legacy("delete.start", end - SECOND, **nowhere),
        sent(
            "compute.instance.delete.end",
            EXISTS | nowhere | {"deleted_at": str(end), "terminated_at": str(end)},
            end + SECOND,
            publisher="api.ctl1",
        ),
    )
    assert spans(found, "state", "host") == [
        (LAUNCHED, at, "active", "cmp-017"),
        (at, end, "shelved_offloaded", None),
    ]


def test_the_host_is_the_bodys_and_never_the_publishers() -> None:
    """resize.prep comes from the destination while host is the source, resize.end the other way."""
    at = on(8, "12:00", 5)
    found = ledger(
        legacy("create.end", LAUNCHED + SECOND, host="a"),
        sent(
            "compute.instance.resize.prep.end", EXISTS | {"host": "a"}, at, publisher="compute.b"
        ),
        sent(
            "compute.instance.resize.end",
            EXISTS | {"host": "b", "state_description": "resize_migrated"},
            at + SECOND,
            publisher="compute.a",
        ),
        legacy("finish_resize.end", at + HOUR, host="b", launched_at=str(at + HOUR)),
    )
    assert spans(found, "host") == [(LAUNCHED, at + HOUR, "a"), (at + HOUR, None, "b")]


# --- hostler's own agent, and bare metal


def sample(
    at: datetime, run: str, cpu: int, written: int, *, ticks: int | None = None
) -> Notification:
    payload = {
        "host": "cmp-017",
        "sampled_at": at.isoformat(),
        "report_id": f"{at}",
        "samples": [
            {
                "instance_id": name,
                "run": {"boot_id": run, "domain_id": 7, "process_start_ticks": ticks},
                "cpu_time_ns": cpu,
                "disks": [
                    {
                        "device": "vda",
                        "read_bytes": 0,
                        "read_requests": 0,
                        "write_bytes": written,
                        "write_requests": written // 512,
                    }
                ],
                "interfaces": [
                    {
                        "name": "tap1",
                        "rx_bytes": 5,
                        "rx_packets": 1,
                        "tx_bytes": 6,
                        "tx_packets": 1,
                    }
                ],
            }
            for name in (INSTANCE, "other")
        ],
    }
    return sent("usage.sampled", payload, at)


def test_samples_of_many_domains_count_for_each_of_them() -> None:
    start = on(8, "12:00", 5)
    found = ledgers(
        legacy("create.end", LAUNCHED + SECOND),
        sample(start, "a", 1_000, 512),
        sample(start + HOUR, "a", 5_000, 2048),
        sample(start + 2 * HOUR, "b", 7_000, 4096),  # it was started again
    )
    moved = used(found[INSTANCE], "instance", start - HOUR, start + 3 * HOUR)
    assert {name: value for name, value in moved.items() if not name.endswith("_hours")} == {
        "cpu_time_ns": 5_000 + 7_000,
        "disk_write_bytes": 2048 + 4096,
        "disk_write_operations": 4 + 8,
        "network_in_bytes": 5 + 5,
        "network_out_bytes": 6 + 6,
    }
    assert {item.project_id for item in found[INSTANCE].amounts} == {EXISTS["tenant_id"]}
    # of the other nothing is known of its birth: counting begins at its first sample
    moved = used(found["other"], "instance", start - HOUR, start + 3 * HOUR)
    assert moved["cpu_time_ns"] == 4_000 + 7_000


def test_a_domain_started_again_under_its_number_is_another_run_though_no_counter_fell() -> None:
    """After a restart of libvirtd the number may be given out again: the process tells them apart."""
    start = on(8, "12:00", 5)
    found = ledger_of_samples(
        sample(start, "a", 1_000, 512, ticks=100),
        sample(start + HOUR, "a", 2_000, 4096, ticks=100),
        sample(start + 2 * HOUR, "a", 3_000, 8192, ticks=900),
    )
    moved = used(found, "instance", LAUNCHED, start + 3 * HOUR)
    assert (moved["cpu_time_ns"], moved["disk_write_bytes"]) == (2_000 + 3_000, 4096 + 8192)


@pytest.mark.parametrize(
    "ticks",
    [
        (None, 100, 100, 100),
        (100, None, 100, 100),
        (100, 100, None, None),
        (None, None, 100, None),
    ],
)
def test_a_process_that_an_agent_does_not_see_at_times_is_no_other_run(
    ticks: tuple[int | None, ...],
) -> None:
    """Nor does an older agent, which saw none of them: what it counted is not counted again."""
    start = on(8, "12:00", 5)
    found = ledger_of_samples(
        *(
            sample(start + n * HOUR, "a", 1_000 * (n + 1), 4096 * (n + 1), ticks=seen)
            for n, seen in enumerate(ticks)
        )
    )
    moved = used(found, "instance", LAUNCHED, start + 5 * HOUR)
    assert (moved["cpu_time_ns"], moved["disk_write_bytes"]) == (4_000, 4 * 4096)


def ledger_of_samples(*samples: Notification) -> Ledger:
    return ledgers(legacy("create.end", LAUNCHED + SECOND), *samples)[INSTANCE]


def lease(event: str, at: datetime, owner: str = "p1", **more: object) -> Notification:
    """As baremetal says it; AMQP cuts the moment to its second."""
    payload = {"node_uuid": "n", "name": "bm-1", "owner": owner, "purpose": "burn-in", **more}
    told = sent(f"baremetal.lease.{event}", payload, at.replace(microsecond=0))
    return told._replace(message_id=f"{event} of {owner} at {at}")


def test_a_node_is_used_while_it_is_leased() -> None:
    at = on(8, "10:00")
    expired = lease("expired", at + 5 * HOUR + 20 * SECOND, "p2", expires_at=str(at + 5 * HOUR))
    found = ledger(
        lease("taken", at),
        lease("released", at + HOUR, expires_at=str(at + 9 * HOUR)),
        lease("taken", at + 3 * HOUR, "p2", purpose=None),
        expired,  # as its sweep noticed 20 s later
    )
    assert spans(found, "project", "state", "purpose") == [
        (at, at + HOUR, "p1", "leased", "burn-in"),
        (at + 3 * HOUR, at + 5 * HOUR, "p2", "leased", None),
    ]
    assert used(found, "node", at, at + 9 * HOUR) == {"node_hours": 3 * MICROSECONDS_PER_HOUR}


@pytest.mark.parametrize("ended", ["released", "expired"])
@pytest.mark.parametrize("noticed", [0, 0.4, 1.7])
def test_a_node_that_is_taken_as_another_lease_ends_is_used_by_both_in_turn(
    ended: str, noticed: float
) -> None:
    """Both are told of in one transaction: the same second, and in either order."""
    at = on(8, "12:00:00.300000")
    taken = at + timedelta(seconds=noticed)
    told = [
        lease("taken", at - HOUR),
        lease(ended, taken, expires_at=str(at)),
        lease("taken", taken, "p2"),
        lease("released", at + 2 * HOUR, "p2"),
    ]
    found = ledger(*told)
    assert ledger(*reversed(told)) == found
    assert [project for _, _, project in spans(found, "project")] == ["p1", "p2"]
    held = used(found, "node", at - 2 * HOUR, at + 3 * HOUR)["node_hours"]
    assert abs(held - 3 * MICROSECONDS_PER_HOUR) < 3_000_000
    assert found.anomalies == ()


# --- Cinder

VOLUME: Payload = json.loads(
    """{"tenant_id":"7ffe17a15c724e2aa79fc839540aec15","host":"ctl1@ceph#rbd",
    "user_id":"bcb7746c7a41472d88a1ffac89ba6a9b","availability_zone":"nova",
    "volume_id":"2925bb3b-2b51-496a-bb6e-01a20e950e07",
    "volume_type":"3a9a398b-7e3b-40da-b09e-2115ad8cd68b","display_name":"db-data",
    "launched_at":"2026-10-28T09:31:21+00:00","created_at":"2026-10-28T09:31:20+00:00",
    "status":"in-use","snapshot_id":null,"size":100,"replication_status":null,"metadata":[],
    "volume_attachment":[{"id":"8f0b4d0e-0e0f-4a3a-9a40-2f5d2a5b6c7d",
      "volume_id":"2925bb3b-2b51-496a-bb6e-01a20e950e07",
      "instance_uuid":"3a513875-95c9-4012-a3e7-f90c678854e5","attached_host":null,
      "mountpoint":"/dev/vdb","attach_time":"2026-10-28T09:40:00.000000","detach_time":null,
      "attach_status":"attached","attach_mode":"rw"}],
    "glance_metadata":[{"key":"image_id","value":"155d900f-4e14-4e4c-a73d-069cbf4541e6"}],
    "audit_period_beginning":"2026-10-29 00:00:00+00:00",
    "audit_period_ending":"2026-10-29 01:00:00+00:00"}"""
)
SNAPSHOT: Payload = json.loads(
    """{"tenant_id":"7ffe17a15c724e2aa79fc839540aec15","user_id":"bcb7746c7a41472d88a1ffac89ba6a9b",
    "availability_zone":"nova","volume_id":"2925bb3b-2b51-496a-bb6e-01a20e950e07",
    "volume_size":100,"snapshot_id":"6d1c1b1e-7a43-4e0e-8f63-6e8a1f2f7a11",
    "display_name":"nightly","created_at":"2026-10-28T09:49:07+00:00","status":"available",
    "deleted":"","metadata":"","audit_period_beginning":"2026-10-29 00:00:00+00:00",
    "audit_period_ending":"2026-10-29 01:00:00+00:00"}"""
)
BACKUP: Payload = json.loads(
    """{"tenant_id":"7ffe17a15c724e2aa79fc839540aec15","user_id":"bcb7746c7a41472d88a1ffac89ba6a9b",
    "availability_zone":"nova","backup_id":"c2c6a0b6-52f1-4d29-9b4e-6a3f0f1f2a3b","host":"bak1",
    "display_name":"b1","created_at":"2026-10-28T10:00:00+00:00","status":"available",
    "volume_id":"2925bb3b-2b51-496a-bb6e-01a20e950e07","size":100,
    "service_metadata":"volume_2925/","service":"cinder.backup.drivers.swift","fail_reason":null,
    "parent_id":null,"num_dependent_backups":0,"snapshot_id":null}"""
)


def test_a_volume_exists_says_all_of_its_volume() -> None:
    statement = said(sent("volume.exists", VOLUME, on(29, "01:00:04.118201")))
    assert (statement.edge, statement.born_at) == (Edge.AUDIT, on(28, "09:31:21"))
    assert statement.period == (on(29, "00:00"), on(29, "01:00"))
    assert dict(statement.attributes) == {
        "project": "7ffe17a15c724e2aa79fc839540aec15",
        "user": "bcb7746c7a41472d88a1ffac89ba6a9b",
        "size_gb": 100,
        "volume_type": "3a9a398b-7e3b-40da-b09e-2115ad8cd68b",
        "zone": "nova",
        "host": "ctl1@ceph#rbd",
        "attached_to": INSTANCE,
        "state": "in-use",
    }


@pytest.mark.parametrize(
    ("metadata", "iops"),
    [
        ([], None),
        ({}, None),
        ("", None),
        ("{'iops': '500'}", None),
        (None, None),
        ({"iops": "500"}, 500),
        ([{"key": "iops", "value": "500", "id": 3}], 500),
        ([{"key": "total_iops_sec", "value": 700}], 700),
    ],
)
def test_metadata_of_any_shape_is_read(metadata: object, iops: int | None) -> None:
    statement = said(sent("volume.exists", VOLUME | {"metadata": metadata}, on(29, "01:00")))
    assert dict(statement.attributes).get("provisioned_iops") == iops


@pytest.mark.parametrize(
    ("kind", "payload", "born", "deleted", "size"),
    [
        ("volume", VOLUME, on(28, "09:31:21"), {"status": "deleting"}, "volume_gb_hours"),
        ("snapshot", SNAPSHOT, on(28, "09:49:07"), {"status": "deleted"}, "snapshot_gb_hours"),
        ("backup", BACKUP, on(28, "10:00"), {"status": "deleted"}, "backup_gb_hours"),
    ],
)
def test_what_cinder_keeps_is_billed_from_its_create_to_its_delete(
    kind: str, payload: Payload, born: datetime, deleted: Payload, size: str
) -> None:
    end = on(28, "20:00")
    plain = {key: value for key, value in payload.items() if not key.startswith("audit_period")}
    found = ledger(
        sent(f"{kind}.create.start", plain | {"status": "creating"}, born),
        sent(f"{kind}.create.end", plain, born + 5 * SECOND),
        sent(f"{kind}.exists", payload, born + HOUR),
        sent(f"{kind}.delete.start", plain | deleted, end - SECOND),
        sent(f"{kind}.delete.end", plain | deleted, end),
    )
    assert (found.intervals[0].start, found.intervals[-1].end) == (born, end)
    assert found.anomalies == ()
    held = used(found, kind, on(28, "12:00"), on(28, "14:00"))
    assert held == {
        f"{kind}_hours": 2 * MICROSECONDS_PER_HOUR,
        size: 200 * MICROSECONDS_PER_HOUR,
    }


def volume(event: str, at: datetime, status: str, **changes: object) -> Notification:
    plain = {key: value for key, value in VOLUME.items() if not key.startswith("audit_period")}
    told = plain | {"status": status, "volume_attachment": []} | changes
    return sent(f"volume.{event}", told, at)


def unborn(event: str, at: datetime, status: str, **changes: object) -> Notification:
    """A body about a volume without a launched_at of its own: Cinder fills in the time it is."""
    now = (at - timedelta(milliseconds=3)).isoformat()
    return volume(event, at, status, created_at="2026-10-28T09:50:00", launched_at=now, **changes)


def test_a_volume_is_not_there_while_it_is_being_made_whatever_audits_say() -> None:
    created, launched = on(28, "09:50"), on(28, "10:20")
    period = {
        "audit_period_beginning": str(on(28, "09:00")),
        "audit_period_ending": "2026-10-28 10:00:00",
    }
    events = [
        unborn("create.start", created, "creating"),
        volume("create.end", launched + SECOND, "available", launched_at=launched.isoformat()),
    ]
    audited = [unborn("exists", on(28, "10:01"), "downloading", **period), *events]
    found = ledger(*audited)
    assert found.intervals == ledger(*events).intervals
    assert spans(found, "state") == [(launched, None, "available")]
    assert [item.code for item in found.reconciliation.verdicts] == ["agreed"]
    later = volume("exists", on(28, "11:01"), "available", launched_at=launched.isoformat())
    without_its_create = ledger(audited[0], events[0], later)
    assert spans(without_its_create, "state") == [(launched, None, "available")]


def test_a_volume_that_never_launched_is_not_billed_however_often_it_is_told_of() -> None:
    failed = [
        unborn("create.start", on(28, "09:50"), "creating"),
        unborn("exists", on(28, "11:01"), "error"),
        unborn("exists", on(28, "12:01"), "error"),
        unborn("update.end", on(28, "12:02"), "error"),
        unborn("delete.end", on(28, "12:30"), "deleting"),
    ]
    assert ledger(*failed).intervals == ()
    assert {item.code for item in ledger(*failed).reconciliation.verdicts} == {"agreed"}
    gone = ledger(failed[0], failed[-1])  # where nobody audits
    assert (gone.intervals, gone.anomalies) == ((), ())


def test_a_volume_that_never_launched_and_serves_all_the_same_is_billed_since_the_first_word() -> (
    None
):
    """Its creation failed, an operator has reset its state, and a server uses it."""

    def audit(hour: int, status: str) -> Notification:
        period = {
            "audit_period_beginning": str(on(28, f"{hour - 1}:00")),
            "audit_period_ending": str(on(28, f"{hour}:00")),
        }
        attached = VOLUME["volume_attachment"] if status == "in-use" else []
        return unborn(
            "exists", on(28, f"{hour}:00:04"), status, volume_attachment=attached, **period
        )

    failed = [unborn("create.start", on(28, "09:50"), "creating"), audit(11, "error")]
    attached = unborn(
        "attach.end", on(28, "11:30"), "in-use", volume_attachment=VOLUME["volume_attachment"]
    )
    audits = [audit(hour, "in-use") for hour in range(12, 21)]
    deleted = unborn("delete.end", on(28, "20:30"), "deleting")
    found = ledger(*failed, attached, *audits, deleted)
    assert spans(found, "state", "attached_to") == [
        (attached.timestamp, deleted.timestamp, "in-use", INSTANCE)
    ]
    assert {item.code for item in found.reconciliation.verdicts} == {Code.AGREED}
    audited = ledger(*failed, *audits)
    assert spans(audited, "state") == [(on(28, "12:00:04"), None, "in-use")]
    assert [item.code for item in audited.reconciliation.verdicts] == [
        Code.AGREED,
        Code.BIRTH_REPAIRED,
        Code.AGREED,
    ]
    after_its_end = ledger(unborn("delete.end", on(28, "11:30"), "deleting"), *audits)
    assert {item.code for item in after_its_end.reconciliation.verdicts} == {Code.NO_LIFE}


@pytest.mark.parametrize(
    ("kind", "payload", "status"),
    [
        ("volume", VOLUME, "downloading"),
        ("snapshot", SNAPSHOT, "creating"),
        ("backup", BACKUP, "creating"),
    ],
)
def test_an_end_is_one_whatever_state_it_is_told_in(
    kind: str, payload: Payload, status: str
) -> None:
    plain = {key: value for key, value in payload.items() if not key.startswith("audit_period")}
    end = on(28, "20:00")
    deleted = sent(f"{kind}.delete.end", plain | {"status": status}, end)
    assert spans(ledger(sent(f"{kind}.create.end", plain, on(28, "10:01")), deleted))[-1][1] == end
    alone = ledger(deleted)
    assert (alone.intervals, alone.anomalies) == ((), ())


@pytest.mark.parametrize(("kind", "payload"), [("snapshot", SNAPSHOT), ("backup", BACKUP)])
def test_what_is_being_made_is_billed_from_its_creation_once_it_is_there(
    kind: str, payload: Payload
) -> None:
    born = datetime.fromisoformat(str(payload["created_at"]))
    making = sent(f"{kind}.exists", payload | {"status": "creating"}, born + HOUR)
    made = sent(f"{kind}.create.end", payload, born + 2 * HOUR)
    assert ledger(making).intervals == ()
    assert spans(ledger(making, made), "state") == [(born, None, "available")]
    assert {item.code for item in ledger(making).reconciliation.verdicts} == {Code.AGREED}


def test_a_volume_that_is_attached_at_once_keeps_its_attachment() -> None:
    launched = on(28, "10:00", 10)
    at = launched + SECOND / 2
    attached = VOLUME["volume_attachment"]
    found = ledger(
        volume(
            "create.end", launched + SECOND / 10, "available", launched_at=launched.isoformat()
        ),
        volume(
            "attach.end",
            at,
            "in-use",
            launched_at=launched.isoformat(),
            volume_attachment=attached,
        ),
    )
    assert spans(found, "attached_to") == [(launched, at, None), (at, None, INSTANCE)]


@pytest.mark.parametrize("kind", ["snapshot", "backup"])
def test_what_cinder_sends_again_of_snapshots_and_backups_changes_no_total(kind: str) -> None:
    payload = {"snapshot": SNAPSHOT, "backup": BACKUP}[kind]
    plain = {key: value for key, value in payload.items() if not key.startswith("audit_period")}
    born, end = datetime.fromisoformat(str(plain["created_at"])), on(28, "20:00")
    items = [
        sent(f"{kind}.create.end", plain, born + SECOND),
        sent(f"{kind}.delete.end", plain, end),
    ]
    again = []
    for action, moment in (("create", born), ("delete", end)):
        both = {"audit_period_beginning": str(moment), "audit_period_ending": str(moment)}
        again.append(sent(f"{kind}.{action}.end", plain | both, on(29, "05:00")))
    assert spans(ledger(*items, *again)) == spans(ledger(*items)) == [(born, end)]
    assert spans(ledger(*again)) == [(born, end)]


USAGE: Payload = json.loads(
    """{"volume_id":"a07f71dc-8151-4e7d-a0cc-cd24a3f11113",
    "tenant_id":"6f70656e737461636b20342065766572","user_id":"fake","availability_zone":"nova",
    "instance_id":"88fde343-13a8-4047-84fb-2657d5e702f9",
    "last_refreshed":"2026-10-29 13:42:11+00:00","reads":1200,"read_bytes":52428800,"writes":800,
    "write_bytes":104857600}"""
)
USAGE_VERSIONED: Payload = json.loads(
    """{"nova_object.name":"VolumeUsagePayload","nova_object.namespace":"nova",
    "nova_object.version":"1.0","nova_object.data":{
    "volume_id":"a07f71dc-8151-4e7d-a0cc-cd24a3f11113",
    "project_id":"6f70656e737461636b20342065766572","user_id":"fake","availability_zone":"nova",
    "instance_uuid":"88fde343-13a8-4047-84fb-2657d5e702f9","last_refreshed":"2026-10-29T13:42:11Z",
    "reads":1200,"read_bytes":52428800,"writes":800,"write_bytes":104857600}}"""
)


@pytest.mark.parametrize("payload", [USAGE, USAGE_VERSIONED])
def test_volume_usage_counts_in_both_its_dialects(payload: Payload) -> None:
    statement = said(sent("volume.usage", payload, on(29, "13:45")))
    assert (statement.edge, statement.at) == (Edge.COUNT, on(29, "13:42:11"))
    assert dict(statement.attributes) == {"project": "6f70656e737461636b20342065766572"}
    assert {item.name: item.value for item in statement.readings} == {
        "volume_read_bytes": 52428800,
        "volume_read_operations": 1200,
        "volume_write_bytes": 104857600,
        "volume_write_operations": 800,
    }


def test_volume_usage_in_both_dialects_at_once_counts_once() -> None:
    more = USAGE | {"last_refreshed": "2026-10-29 14:42:11+00:00", "reads": 1300}
    items = [
        sent("volume.usage", USAGE, on(29, "13:45")),
        sent("volume.usage", USAGE_VERSIONED, on(29, "13:45"), message_id="versioned"),
        sent("volume.usage", more, on(29, "14:45")),
    ]
    assert used(ledger(*items), "volume", on(29, "00:00"), on(30, "00:00")) == {
        "volume_read_operations": 100
    }


# --- Glance

IMAGE: Payload = json.loads(
    """{"id":"155d900f-4e14-4e4c-a73d-069cbf4541e6","name":"ubuntu-24.04","status":"active",
    "created_at":"2026-09-18T10:13:44Z","updated_at":"2026-09-18T10:13:45Z","min_disk":0,
    "min_ram":0,"protected":false,"checksum":"d990432ef91afef3ad9dbf4a975d3365",
    "owner":"7c150a59fe714e6f9263774af9688f0e","disk_format":"qcow2","container_format":"bare",
    "size":618528768,"virtual_size":3758096384,"is_public":false,"visibility":"shared",
    "properties":{"os_distro":"ubuntu"},"tags":[],"deleted":false,"deleted_at":null}"""
)
SEND: Payload = json.loads(
    """{"bytes_sent":618528768,"image_id":"155d900f-4e14-4e4c-a73d-069cbf4541e6",
    "owner_id":"7c150a59fe714e6f9263774af9688f0e",
    "receiver_tenant_id":"6f70656e737461636b20342065766572","receiver_user_id":"fake"}"""
)
ACTIVATED = on(18, "10:13:45.001234", 9)


def test_an_image_is_billed_by_its_bytes_from_its_birth_to_its_delete() -> None:
    queued = IMAGE | {"status": "queued", "size": None}
    found = ledger(
        sent("image.create", queued, on(18, "10:13:44", 9)),
        sent("image.prepare", queued | {"status": "saving"}, on(18, "10:13:44.5", 9)),
        sent("image.activate", IMAGE, ACTIVATED),
        sent("image.update", IMAGE | {"visibility": "public"}, on(18, "12:00", 9)),
        sent(
            "image.delete",
            IMAGE | {"deleted": True, "deleted_at": "2026-09-19T08:00:00Z", "status": "deleted"},
            on(19, "08:00:03", 9),
        ),
    )
    born, changed, end = on(18, "10:13:44", 9), on(18, "12:00", 9), on(19, "08:00", 9)
    assert spans(found, "size_bytes", "visibility", "project", "os") == [
        (born, changed, 618528768, "shared", IMAGE["owner"], "ubuntu"),
        (changed, end, 618528768, "public", IMAGE["owner"], "ubuntu"),
    ]
    assert used(found, "image", on(18, "12:00", 9), on(18, "13:00", 9)) == {
        "image_hours": MICROSECONDS_PER_HOUR,
        "image_byte_hours": 618528768 * MICROSECONDS_PER_HOUR,
    }


@pytest.mark.parametrize("priority", ["INFO", "ERROR"])
def test_bytes_that_were_sent_count_even_if_the_transfer_was_cut_off(priority: str) -> None:
    item = sent("image.send", SEND, on(18, "12:00", 9), priority=priority)
    found = ledger(item)
    assert used(found, "image", on(18, "00:00", 9), on(19, "00:00", 9)) == {
        "image_sent_bytes": 618528768
    }
    assert found.amounts[0].project_id == SEND["owner_id"]
    assert read(item).project_id == SEND["owner_id"]


def test_two_transfers_of_one_second_are_two() -> None:
    items = [
        sent("image.send", SEND, on(18, "12:00", 9), message_id=f"send-{n}") for n in range(2)
    ]
    assert sum(item.amount for item in ledger(*items).amounts) == 2 * 618528768


def test_a_failed_upload_says_its_text_to_nobody() -> None:
    text = "Image storage media is full: There is not enough disk space"
    normalised = read(sent("image.upload", text, ACTIVATED, priority="ERROR"))
    assert (normalised.said, normalised.is_known) == ((), True)
    assert normalised.problems == ("no_resource_id",)


@pytest.mark.parametrize("event", ["image.activate", "image.update", "image.delete"])
def test_what_failed_at_once_moves_nothing(event: str) -> None:
    item = sent(event, IMAGE, ACTIVATED, priority="ERROR")
    assert ledger(item).intervals == ()
    assert said(item).phase is Phase.ERROR


@pytest.mark.parametrize("beginning", ["audit_period_beginning", "audit_period_begining"])
def test_image_exists_speaks_of_each_image_of_its_page(beginning: str) -> None:
    payload = json.loads(
        """{"owner":"7c150a59fe714e6f9263774af9688f0e",
        "audit_period_ending":"2013-05-20 23:59:59.999999","page_size":1000,"page_number":1,
        "total_pages":1,"images":[
        {"id":"155d900f-4e14-4e4c-a73d-069cbf4541e6","created_at":"2013-05-20 20:00:00",
         "deleted_at":null,"size":618528768,"status":"active","properties":{}},
        {"id":"gone","created_at":"2013-05-19 20:00:00","deleted_at":"2013-05-20 21:00:00",
         "size":7,"status":"deleted","properties":{"os_distro":"debian"}}]}"""
    )
    payload[beginning] = "2013-05-20 00:00:00"
    at = datetime(2013, 5, 21, tzinfo=UTC)
    item = sent("image.exists", payload, at)
    first = read(item).said[0].statement
    assert first is not None
    assert first.period == (at - 24 * HOUR, at - MICROSECOND)
    found = ledgers(item)
    assert spans(found["155d900f-4e14-4e4c-a73d-069cbf4541e6"], "size_bytes", "project") == [
        (at - 4 * HOUR, None, 618528768, payload["owner"])
    ]
    assert spans(found["gone"], "size_bytes", "os") == [
        (at - 28 * HOUR, at - 3 * HOUR, 7, "debian")
    ]
    # the public generator sends one image a message, without the page
    one = {key: value for key, value in payload.items() if key != "images"} | payload["images"][0]
    alone = ledger(sent("image.exists", one, at))
    assert spans(alone, "size_bytes") == [(at - 4 * HOUR, None, 618528768)]


# --- Neutron

ADDRESS = "2b7cc28c-6f78-4735-9246-257168405de6"
FLOATING: Payload = json.loads(
    """{"floatingip":{"id":"2b7cc28c-6f78-4735-9246-257168405de6",
    "tenant_id":"6e5f9df9b3a249ab834f25fe1b1b81fd","project_id":"6e5f9df9b3a249ab834f25fe1b1b81fd",
    "floating_network_id":"001400f7-1710-4245-98c3-39ba131cc39a",
    "floating_ip_address":"172.24.4.227","fixed_ip_address":null,"port_id":null,"router_id":null,
    "status":"DOWN","description":"","created_at":"2026-09-27T14:11:26Z",
    "updated_at":"2026-09-27T14:11:26Z","revision_number":0}}"""
)
INNER: Payload = FLOATING["floatingip"]  # type: ignore[assignment]
ALLOCATED = on(27, "14:11:26", 9)


def test_a_floating_ip_is_allocated_then_associated_then_gone() -> None:
    port = INNER | {"port_id": "8ab815c8-03cc-4b45-a673-79bdd0c258f2"}
    found = ledger(
        sent("floatingip.create.end", FLOATING, ALLOCATED + SECOND),
        sent("floatingip.update.end", {"floatingip": port}, on(27, "15:00", 9)),
        sent("floatingip.update.end", FLOATING, on(27, "16:00", 9)),
        sent(
            "floatingip.delete.end",
            {
                "floatingip_id": ADDRESS,
                "floatingip": {
                    key: INNER[key] for key in ("id", "tenant_id", "floating_ip_address")
                },
            },
            on(27, "17:00", 9),
        ),
    )
    assert spans(found, "state", "address", "project") == [
        (ALLOCATED, on(27, "15:00", 9), "allocated", "172.24.4.227", INNER["project_id"]),
        (
            on(27, "15:00", 9),
            on(27, "16:00", 9),
            "associated",
            "172.24.4.227",
            INNER["project_id"],
        ),
        (on(27, "16:00", 9), on(27, "17:00", 9), "allocated", "172.24.4.227", INNER["project_id"]),
    ]
    state_class = packaged().resources["floating_ip"].state_class
    assert [state_class(str(item.attributes["state"])) for item in found.intervals] == [
        "allocated",
        "associated",
        "allocated",
    ]


def test_the_request_of_a_floating_ip_moves_nothing() -> None:
    payload = json.loads(
        """{"id":"64262b2a-8f5d-4ade-9405-0cbdd03c1555","floatingip":{
        "fixed_ip_address":"10.0.0.5","port_id":"8ab815c8-03cc-4b45-a673-79bdd0c258f2"}}"""
    )
    item = sent("floatingip.update.start", payload, ALLOCATED)
    resource = read(item).resource
    assert resource is not None
    assert resource.resource_id == "64262b2a-8f5d-4ade-9405-0cbdd03c1555"
    assert (said(item).edge, said(item).phase) == (Edge.NONE, Phase.START)
    assert ledger(item).intervals == ()


@pytest.mark.parametrize(
    ("kind", "row", "rows"),
    [("floatingip", "floatingip", "floatingips"), ("network", "network", "networks")],
)
def test_a_bulk_create_speaks_of_each_of_its_resources(kind: str, row: str, rows: str) -> None:
    many = [{"id": f"id-{n}", "project_id": f"p{n}"} for n in range(3)]
    item = sent(f"{kind}.create.end", {rows: many}, ALLOCATED)
    found = ledgers(item)
    assert {name: spans(one, "project") for name, one in found.items()} == {
        f"id-{n}": [(ALLOCATED, None, f"p{n}")] for n in range(3)
    }
    assert ledgers(sent(f"{kind}.create.end", {row: many[0]}, ALLOCATED)).keys() == {"id-0"}


def test_a_delete_that_holds_an_id_alone_ends_the_resource() -> None:
    end = on(27, "17:00", 9)
    found = ledger(
        sent("floatingip.create.end", FLOATING, ALLOCATED + SECOND),
        sent("floatingip.delete.end", {"floatingip_id": ADDRESS}, end),
    )
    assert spans(found, "project") == [(ALLOCATED, end, INNER["project_id"])]
    network = ledger(
        sent("network.create.end", {"network": {"id": "n", "project_id": "p"}}, ALLOCATED),
        sent("network.delete.end", {"network_id": "n"}, end),
    )
    assert spans(network, "project") == [(ALLOCATED, end, "p")]


def test_an_audit_without_a_period_makes_a_lost_create_good() -> None:
    found = ledger(sent("floatingip.exists", FLOATING, on(28, "00:00", 9)))
    assert spans(found, "state") == [(ALLOCATED, None, "allocated")]
    assert found.intervals[0].provenance is Provenance.AUDIT
    without = {key: value for key, value in INNER.items() if key != "created_at"}
    found = ledger(sent("floatingip.exists", {"floatingip": without}, on(28, "00:00", 9)))
    assert spans(found) == [(on(28, "00:00", 9), None)]


def test_addresses_of_nova_network_and_of_the_2012_list_are_told_by_their_address() -> None:
    payload = {"project_id": "p", "floating_ip": "172.24.4.227"}
    at = on(27, "10:00", 9)
    for names in (
        ("network.floating_ip.allocate", "network.floating_ip.deallocate"),
        ("compute.ip.allocate.end", "compute.ip.release.end"),
    ):
        found = ledgers(sent(names[0], payload, at), sent(names[1], payload, at + HOUR))
        assert spans(found["172.24.4.227"], "project") == [(at, at + HOUR, "p")]


@pytest.mark.parametrize("prefix", ["network.floating_ip", "compute.ip"])
def test_an_address_of_nova_network_is_of_the_instance_it_names_until_it_is_disassociated(
    prefix: str,
) -> None:
    """Nova's disassociate names the instance as its associate does; that of 2012 named none."""
    at = on(27, "10:00", 9)
    payload = {"project_id": "p", "floating_ip": "172.24.4.227"}
    of_instance = payload | {"instance_id": INSTANCE}
    told = [
        ("network.floating_ip.allocate", payload),
        (f"{prefix}.associate", of_instance),
        (f"{prefix}.disassociate", of_instance),
        (f"{prefix}.associate", of_instance),
        (f"{prefix}.disassociate", payload),
        ("network.floating_ip.deallocate", payload),
    ]
    found = ledger(*(sent(name, body, at + n * HOUR) for n, (name, body) in enumerate(told)))
    course = [None, INSTANCE, None, INSTANCE, None]
    assert spans(found, "state", "port") == [
        (at + n * HOUR, at + (n + 1) * HOUR, "associated" if port else "allocated", port)
        for n, port in enumerate(course)
    ]


def address(event: str, at: datetime, project: str = "p") -> Notification:
    payload = {"project_id": project, "floating_ip": "172.24.4.227"}
    return sent(f"compute.ip.{event}", payload, at)


def test_an_address_that_is_allocated_again_lives_again_and_is_nobodys_between() -> None:
    at = on(27, "10:00", 9)
    told = [
        address("allocate.end", at, "p1"),
        address("release.end", at + HOUR, "p1"),
        address("release.end", at + HOUR + SECOND / 2, "p1"),
        address("associate", at + HOUR + 2 * SECOND, "p1"),  # of a host whose clock runs ahead
        address("allocate.end", at + 3 * HOUR, "p2"),
        address("release.end", at + 5 * HOUR, "p2"),
        address("exists", at + 8 * HOUR, "p3"),  # its allocation was lost
    ]
    found = ledger(*told)
    assert spans(found, "project") == [
        (at, at + HOUR, "p1"),
        (at + 3 * HOUR, at + 5 * HOUR, "p2"),
        (at + 8 * HOUR, None, "p3"),
    ]
    assert ledger(*reversed(told)) == found
    assert used(found, "floating_ip", at, at + 6 * HOUR) == {
        "floating_ip_hours": 3 * MICROSECONDS_PER_HOUR
    }
    assert "deleted_twice" not in {item.code for item in found.reconciliation.verdicts}


@pytest.mark.parametrize("allocated", [-0.55, -0.05, 0, 0.05, 0.5])
@pytest.mark.parametrize("lived", [0.9, 7200])
def test_an_address_that_is_allocated_as_it_is_released_is_billed_to_both(
    allocated: float, lived: float
) -> None:
    """Whoever tells of an allocation may have a clock behind that of whoever tells of the release."""
    at = on(27, "10:00", 9)
    released, end = at + HOUR, at + HOUR + timedelta(seconds=lived)
    told = [
        address("allocate.end", at, "p1"),
        address("release.end", released, "p1"),
        address("allocate.end", released + timedelta(seconds=allocated), "p2"),
        address("release.end", end, "p2"),
    ]
    found = ledger(*told)
    born = released + max(timedelta(seconds=allocated), MICROSECOND)
    assert spans(found, "project") == [(at, released, "p1"), (born, end, "p2")]
    assert ledger(*reversed(told)) == found
    assert {item.code for item in found.reconciliation.verdicts} == set()


def test_an_allocation_that_is_told_twice_is_one_however_soon_its_end_comes() -> None:
    at = on(27, "10:00", 9)
    told = [
        address("allocate.end", at),
        address("allocate.end", at + SECOND / 4),
        address("release.end", at + SECOND / 2),
    ]
    assert spans(ledger(*told), "project") == [(at, at + SECOND / 2, "p")]


def test_what_is_said_of_an_address_after_its_end_opens_no_other_life() -> None:
    at = on(27, "10:00", 9)
    told = [
        address("allocate.end", at),
        address("release.end", at + HOUR),
        address("associate", at + HOUR + 2 * SECOND),
    ]
    found = ledger(*told)
    assert spans(found, "project") == [(at, at + HOUR, "p")]
    assert found.anomalies == (Anomaly.SEEN_AFTER_END,)


METER: Payload = json.loads(
    """{"pkts":1184,"bytes":981124,"time":300,"first_update":1790431887,"last_update":1790432187,
    "host":"net1","label_id":"b3a1f0c2-7d52-4c0e-9a59-0d4f1c7a2e11",
    "project_id":"6e5f9df9b3a249ab834f25fe1b1b81fd"}"""
)


def test_traffic_counts_for_its_label() -> None:
    event = "l3.meter"
    item = sent(event, METER, on(26, "14:05", 9))
    statement = said(item)
    assert statement.at == EPOCH + timedelta(seconds=1790432187)
    (label,) = ledgers(item)
    assert label == METER["label_id"]
    found = ledger(item, sent(event, METER | {"last_update": 1790432487}, on(26, "14:10", 9)))
    assert used(found, "meter_label", on(26, "00:00", 9), on(27, "00:00", 9)) == {
        "traffic_bytes": 2 * 981124
    }
    assert {item.project_id for item in found.amounts} == {METER["project_id"]}
    again = ledger(
        item, sent(event, METER, on(26, "14:06", 9)), sent(event, METER, on(26, "14:07", 9))
    )
    assert [amount.amount for amount in again.amounts if amount.counter == "traffic_bytes"] == [
        981124
    ]
    elsewhere = sent(event, METER | {"host": "net2"}, on(26, "14:05", 9), message_id="of net2")
    assert used(
        ledger(item, elsewhere), "meter_label", on(26, "00:00", 9), on(27, "00:00", 9)
    ) == {"traffic_bytes": 2 * 981124}


def test_granular_traffic_counts_once_though_it_is_told_by_label_router_and_project() -> None:
    """doc/source/admin/ops-metering.rst of Neutron: five messages tell of the same bytes, two of each kind here."""
    label, owner, other = (
        METER["label_id"],
        METER["project_id"],
        "82ed0c40ebe64d0bb3310027039c8ed2",
    )
    shared = {"label_id": label, "label_name": "all", "label_shared": True}
    said_of: list[tuple[str, Payload]] = [
        ("label", shared | {"resource_id": f"label-{label}", "project_id": "all", "bytes": 30}),
        (
            "router",
            {"resource_id": "router-r1", "router_id": "r1", "project_id": owner, "bytes": 10},
        ),
        (
            "router",
            {"resource_id": "router-r2", "router_id": "r2", "project_id": other, "bytes": 20},
        ),
        ("project", {"resource_id": f"project-{owner}", "project_id": owner, "bytes": 10}),
        ("project", {"resource_id": f"project-{other}", "project_id": other, "bytes": 20}),
    ]
    for project, router, size in ((owner, "r1", 10), (other, "r2", 20)):
        by_project = {"resource_id": f"project-{project}-label-{label}", "project_id": project}
        by_router = {"resource_id": f"router-{router}-label-{label}", "router_id": router}
        said_of += [
            ("label_project", shared | by_project | {"bytes": size}),
            ("label_router", shared | by_router | {"project_id": project, "bytes": size}),
        ]
    legacy = {"pkts": 1, "host": "net1", "last_update": 1790432187, "time": 300}
    at = on(26, "14:05", 9)
    items = [
        sent(f"l3.meter.{name}", legacy | payload, at, message_id=str(number))
        for number, (name, payload) in enumerate(said_of)
    ]
    assert all(read(item).is_known for item in items)
    counted = [
        (amount.project_id, amount.amount)
        for found in ledgers(*items).values()
        for amount in found.amounts
        if amount.counter == "traffic_bytes"
    ]
    assert sorted(counted) == sorted([(owner, 10), (other, 20)])


def test_of_neutrons_two_names_of_the_owner_the_new_one_counts() -> None:
    row = INNER | {"tenant_id": "old", "project_id": "new"}
    assert read(sent("floatingip.create.end", {"floatingip": row}, ALLOCATED)).project_id == "new"
    row = INNER | {"tenant_id": "old", "project_id": None}
    assert read(sent("floatingip.create.end", {"floatingip": row}, ALLOCATED)).project_id == "old"
    nobody = {"floatingip_id": ADDRESS}
    assert read(sent("floatingip.delete.end", nobody, ALLOCATED)).project_id == "admin"


# --- Keystone

CADF: Payload = json.loads(
    """{"typeURI":"http://schemas.dmtf.org/cloud/audit/1.0/event",
    "id":"f5352d7b-bee6-4c22-8213-450e7b646e9f","eventType":"activity",
    "eventTime":"2026-08-29T19:03:45.932842+0000","action":"created.project","outcome":"success",
    "initiator":{"typeURI":"service/security/account/user",
      "id":"c9f76d3c31e142af9291de2935bde98a","user_id":"c9f76d3c31e142af9291de2935bde98a",
      "project_id":"24bdcff1aab8474895dbaac509793de1","request_id":"req-a",
      "host":{"agent":"curl/8","address":"127.0.0.1"}},
    "target":{"typeURI":"data/security/project","id":"671da331c47d4e29bb6ea1d270154ec3"},
    "observer":{"typeURI":"service/security","id":"3d4a50a92b59438bbf19c231f9c7625a"},
    "resource_info":"671da331c47d4e29bb6ea1d270154ec3"}"""
)


def test_a_project_is_known_from_cadf_and_from_the_basic_format() -> None:
    at = on(29, "19:03:45.960280", 8)
    project = "671da331c47d4e29bb6ea1d270154ec3"
    found = ledgers(sent("identity.project.created", CADF, at))
    assert spans(found[project], "project", "actor") == [
        (at, None, project, "c9f76d3c31e142af9291de2935bde98a")
    ]
    found = ledgers(
        sent("identity.project.created", {"resource_info": project, "request_id": "req-b"}, at),
        sent("identity.project.deleted", {"resource_info": project}, at + HOUR),
    )
    assert spans(found[project], "project") == [(at, at + HOUR, project)]
    assert read(sent("identity.project.created", CADF, at)).project_id == project


def test_a_user_is_known_from_the_basic_format() -> None:
    at = on(29, "19:03:45", 8)
    user = "c9f76d3c31e142af9291de2935bde98a"
    payload = {"resource_info": user, "request_id": "req-b"}
    item = sent("identity.user.created", payload, at)
    assert spans(ledgers(item)[user]) == [(at, None)]
    assert said(item).operation == "created"


# --- the compact form

NAMES = st.text(max_size=20)
MOMENTS = st.integers(-(10**15), 4 * 10**15).map(lambda n: EPOCH + n * MICROSECOND)
SCALARS: st.SearchStrategy[Scalar] = st.none() | st.integers(0, 2**53) | st.text(max_size=20)
READINGS = st.builds(
    CounterReading,
    name=NAMES,
    reading=st.sampled_from(Reading),
    value=st.integers(0, 2**53),
    label=NAMES,
    run=NAMES,
)


@st.composite
def statements(draw: st.DrawFn) -> Statement:
    phase = draw(st.none() | st.sampled_from(Phase))
    values = draw(st.dictionaries(NAMES, SCALARS, max_size=5))
    return Statement(
        edge=draw(st.sampled_from(Edge)),
        attributes=tuple(sorted(values.items(), key=lambda pair: pair[0])),
        at=draw(st.none() | MOMENTS),
        born_at=draw(st.none() | MOMENTS),
        ended_at=draw(st.none() | MOMENTS),
        period=draw(st.none() | st.tuples(MOMENTS, MOMENTS)),
        task=draw(st.none() | NAMES),
        failed=draw(st.booleans()),
        readings=tuple(draw(st.lists(READINGS, max_size=3))),
        # what belongs to an operation is said of one only
        operation=None if phase is None else draw(NAMES),
        phase=phase,
        request_id=None if phase is None else draw(st.none() | NAMES),
        reason=None if phase is None else draw(st.none() | NAMES),
    )


@given(statements())
def test_the_compact_form_keeps_everything(statement: Statement) -> None:
    text = encode(statement)
    assert decode(text) == statement
    assert encode(decode(text)) == text
    assert "\x00" not in text


def test_the_compact_form_is_as_it_was() -> None:
    """It is in every database: what it spells today must be read for ever."""
    told = (
        '{"e":"audit","a":{"flavor":"m1.small","image":null,"vcpus":2},"t":3,"b":1,"d":2,"p":[4,5],'
        '"k":"deleting","f":1,"c":[["c","delta",7,"public","r"]],"o":["delete","error"],'
        '"r":"req-1","w":"no"}'
    )
    at = EPOCH
    assert decode(told) == Statement(
        edge=Edge.AUDIT,
        attributes=(("flavor", "m1.small"), ("image", None), ("vcpus", 2)),
        at=at + 3 * MICROSECOND,
        born_at=at + MICROSECOND,
        ended_at=at + 2 * MICROSECOND,
        period=(at + 4 * MICROSECOND, at + 5 * MICROSECOND),
        task="deleting",
        failed=True,
        readings=(
            CounterReading(name="c", reading=Reading.DELTA, value=7, label="public", run="r"),
        ),
        operation="delete",
        phase=Phase.ERROR,
        request_id="req-1",
        reason="no",
    )
    assert encode(decode(told)) == told
