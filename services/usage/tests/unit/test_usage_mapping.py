"""What is metered is data: which events mean what, an operator's own resources, and mistakes that are named."""

from collections.abc import Mapping as Table
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hostler_usage.history.ledger import Ledger, reckon
from hostler_usage.history.measures import MICROSECONDS_PER_HOUR, Window, totals
from hostler_usage.reading import mapping_file
from hostler_usage.reading.envelope import Notification
from hostler_usage.reading.mapping import Edge, Mapping, Phase
from hostler_usage.reading.mapping_file import MappingInvalid, packaged, read
from hostler_usage.reading.normalise import Normaliser
from hostler_usage.reading.statement import Evidence, Statement, decode, encode

DAY = datetime(2026, 5, 8, tzinfo=UTC)
HOUR = timedelta(hours=1)


def notification(event_type: str, payload: object, at: datetime = DAY) -> Notification:
    return Notification(
        message_id=f"{event_type}@{at}",
        has_own_id=True,
        event_type=event_type,
        publisher_id="test",
        priority="INFO",
        timestamp=at,
        payload=payload,
        context_project_id=None,
        request_id=None,
        digest=b"d",
    )


def ledger(mapping: Mapping, resource: str, *messages: Notification) -> Ledger:
    """What messages amount to for the one resource they all speak of."""
    said: list[tuple[Statement, Evidence]] = []
    for message in messages:
        (one,) = Normaliser(mapping).read(message, region="r1").said
        assert one.resource.resource_type == resource
        assert one.statement is not None
        evidence = Evidence(
            event_time=message.timestamp, message_id=message.message_id, digest=message.digest
        )
        said.append((decode(encode(one.statement)), evidence))
    return reckon(mapping.resources[resource], said)


def used(mapping: Mapping, resource: str, found: Ledger) -> dict[str, int]:
    window = Window(start=DAY, end=DAY + 24 * HOUR, as_of=DAY + 24 * HOUR)
    amounts = totals(mapping.measures_of(resource), found.intervals, window, found.amounts)
    return {name: amount for name, amount in amounts.items() if amount}


# --- the packaged mapping


@pytest.mark.parametrize(
    ("event_type", "resource", "edge", "action", "phase"),
    [
        ("compute.instance.create.start", "instance", Edge.NONE, "create", Phase.START),
        ("compute.instance.create.end", "instance", Edge.LAUNCH, "create", Phase.END),
        ("compute.instance.create.error", "instance", Edge.NONE, "create", Phase.ERROR),
        ("instance.create.end", "instance", Edge.LAUNCH, "create", Phase.END),
        ("compute.instance.update", "instance", Edge.NOTE, "update", None),
        ("instance.update", "instance", Edge.NOTE, "update", None),
        ("compute.instance.exists", "instance", Edge.AUDIT, "exists", None),
        ("compute.instance.exists.verified", "instance", Edge.NONE, "exists.verified", None),
        ("compute.instance.exists.failed", "instance", Edge.NONE, "exists.failed", None),
        ("compute.instance.resize.prep.start", "instance", Edge.NONE, "resize.prep", Phase.START),
        ("instance.resize_prep.start", "instance", Edge.NONE, "resize.prep", Phase.START),
        ("compute.instance.resize.end", "instance", Edge.NONE, "resize", Phase.END),
        (
            "compute.instance.finish_resize.end",
            "instance",
            Edge.RELAUNCH,
            "finish_resize",
            Phase.END,
        ),
        ("instance.resize_finish.end", "instance", Edge.RELAUNCH, "finish_resize", Phase.END),
        ("instance.resize_finish.error", "instance", Edge.NONE, "finish_resize", Phase.ERROR),
        (
            "compute.instance.resize.confirm.end",
            "instance",
            Edge.CHANGE,
            "resize.confirm",
            Phase.END,
        ),
        ("instance.resize_confirm.end", "instance", Edge.CHANGE, "resize.confirm", Phase.END),
        ("instance.resize_revert.end", "instance", Edge.RELAUNCH, "resize.revert", Phase.END),
        ("compute.instance.rebuild.end", "instance", Edge.RELAUNCH, "rebuild", Phase.END),
        ("compute.instance.rebuild.scheduled", "instance", Edge.NONE, "rebuild.scheduled", None),
        ("instance.rescue.end", "instance", Edge.RELAUNCH, "rescue", Phase.END),
        ("instance.unshelve.end", "instance", Edge.RELAUNCH, "unshelve", Phase.END),
        ("compute.instance.suspend", "instance", Edge.CHANGE, "suspend", Phase.END),  # at once
        ("compute.instance.soft_delete.end", "instance", Edge.CHANGE, "soft_delete", Phase.END),
        ("compute.instance.shutdown.end", "instance", Edge.NONE, "shutdown", Phase.END),
        ("compute.instance.delete.end", "instance", Edge.END, "delete", Phase.END),
        (
            "compute.instance.live_migration._post.end",
            "instance",
            Edge.CHANGE,
            "live_migration._post",
            Phase.END,
        ),
        (
            "instance.live_migration_post.end",
            "instance",
            Edge.CHANGE,
            "live_migration._post",
            Phase.END,
        ),
        ("instance.volume_attach.end", "instance", Edge.NONE, "volume_attach", Phase.END),
        ("usage.sampled", "instance", Edge.COUNT, "sampled", None),
        ("terminate_instance", "instance", Edge.NONE, "delete", Phase.ERROR),
        ("rebuild_instance", "instance", Edge.NONE, "rebuild", Phase.ERROR),
        ("snapshot_instance", "instance", Edge.NONE, "snapshot", Phase.ERROR),
        ("volume.create.end", "volume", Edge.LAUNCH, "create", Phase.END),
        ("volume.manage_existing.end", "volume", Edge.LAUNCH, "manage_existing", Phase.END),
        ("volume.resize.end", "volume", Edge.CHANGE, "resize", Phase.END),
        ("volume.retype", "volume", Edge.CHANGE, "retype", Phase.END),
        ("volume.transfer.accept.end", "volume", Edge.CHANGE, "transfer.accept", Phase.END),
        ("volume.transfer.create.end", "volume", Edge.NONE, "transfer.create", Phase.END),
        ("volume.exists", "volume", Edge.AUDIT, "exists", None),
        ("volume.usage", "volume", Edge.COUNT, "usage", None),
        ("volume.delete.end", "volume", Edge.END, "delete", Phase.END),
        ("snapshot.create.end", "snapshot", Edge.LAUNCH, "create", Phase.END),
        ("snapshot.exists", "snapshot", Edge.AUDIT, "exists", None),
        ("backup.restore.end", "backup", Edge.NOTE, "restore", Phase.END),
        ("backup.delete.end", "backup", Edge.END, "delete", Phase.END),
        ("image.activate", "image", Edge.LAUNCH, "activate", Phase.END),
        ("image.send", "image", Edge.COUNT, "send", None),
        ("image.delete", "image", Edge.END, "delete", Phase.END),
        ("image.member.create", "image", Edge.NONE, "member.create", None),
        ("network.create.end", "network", Edge.LAUNCH, "create", Phase.END),
        ("floatingip.create.end", "floating_ip", Edge.LAUNCH, "create", Phase.END),
        ("floatingip.update.start", "floating_ip", Edge.NONE, "update", Phase.START),
        ("floatingip.exists", "floating_ip", Edge.AUDIT, "exists", None),
        ("network.floating_ip.allocate", "floating_ip", Edge.LAUNCH, "allocate", Phase.END),
        (
            "network.floating_ip.disassociate",
            "floating_ip",
            Edge.CHANGE,
            "disassociate",
            Phase.END,
        ),
        ("l3.meter", "meter_label", Edge.COUNT, "meter", None),
        ("identity.project.created", "project", Edge.LAUNCH, "created", Phase.END),
        ("identity.user.deleted", "user", Edge.END, "deleted", Phase.END),
        ("baremetal.lease.taken", "node", Edge.LAUNCH, "taken", Phase.END),
        ("baremetal.lease.expired", "node", Edge.END, "expired", Phase.END),
        # names of the 2012 list
        ("compute.volume.create.end", "volume", Edge.LAUNCH, "create", Phase.END),
        ("compute.volume.attached.end", "volume", Edge.CHANGE, "attach", Phase.END),
        ("compute.image.create.end", "image", Edge.LAUNCH, "activate", Phase.END),
        ("compute.ip.allocate.end", "floating_ip", Edge.LAUNCH, "allocate", Phase.END),
        ("compute.ip.release.end", "floating_ip", Edge.END, "deallocate", Phase.END),
        ("keystone.tenant.created", "project", Edge.LAUNCH, "created", Phase.END),
        ("keystone.user.created", "user", Edge.LAUNCH, "created", Phase.END),
    ],
)
def test_an_event_type_means_what_openstack_means_by_it(
    event_type: str, resource: str, edge: Edge, action: str, phase: Phase | None
) -> None:
    rule = packaged().rule_for(event_type)
    assert rule is not None
    assert (rule.resource.name, rule.edge, rule.action, rule.phase) == (
        resource,
        edge,
        action,
        phase,
    )


@pytest.mark.parametrize(
    "event_type",
    [
        "aggregate.create.end",
        "keypair.create.end",
        "servergroup.create",
        "scheduler.select_destinations.start",
        "flavor.create",
        "service.update",
        "capacity.backend",
        "group.create.end",
        "port.create.end",
        "identity.authenticate",
        "identity.role_assignment.created",
        "instance",
        "volume",
        "usage.sampled.more",
        "baremetal.lease",
        "",
        ".",
    ],
)
def test_other_events_are_kept_and_mean_nothing(event_type: str) -> None:
    assert packaged().rule_for(event_type) is None


def test_the_digest_tells_one_mapping_from_another_and_not_its_spelling() -> None:
    assert read("version: 1").digest == packaged().digest
    assert read("measures: {image_hours: {resource: image}}").digest == packaged().digest
    one = read("measures: {a: {resource: image}, b: {resource: volume}}")
    other = read("measures:\n  b: {resource: volume}\n  a:\n    resource: image\n")
    assert one.digest == other.digest != packaged().digest


def test_every_attribute_and_counter_that_a_measure_rests_on_is_read_from_some_body() -> None:
    mapping = packaged()
    for measure in mapping.measures:
        bodies = mapping.resources[measure.resource_type].bodies.values()
        if measure.attribute is not None:
            assert any(measure.attribute in body.attributes for body in bodies), measure
        if measure.counter is not None:
            names = {counter.name for body in bodies for counter in body.counters}
            assert measure.counter in names, measure


# --- an operator's own

OCTAVIA = """
version: 1
aliases: {lbaas.loadbalancer.created: octavia.loadbalancer.create.end}
resources:
  load_balancer:
    attributes:
      project: {}
      state: {}
      flavor: {nullable: true}
      listeners: {kind: whole}
    states: {running: [ACTIVE, PENDING_UPDATE], error: [ERROR]}
    gone: [DELETED]
    edges:
      launch: [create.end]
      change: [update.end]
      audit: [exists]
      end: [delete.end]
      count: [stats]
    bodies:
      octavia:
        events: octavia.loadbalancer.
        rows: [loadbalancers, loadbalancer]
        id: id
        born: created_at
        attributes:
          project: [project_id, tenant_id]
          state: provisioning_status
          flavor: flavor_id
          listeners: {count: listeners}
        counters:
          lb_bytes_out: {reading: cumulative, value: stats/bytes_out}
measures:
  load_balancer_hours: {resource: load_balancer}
  listener_hours: {resource: load_balancer, attribute: listeners}
  load_balancer_bytes_out: {resource: load_balancer, counter: lb_bytes_out}
"""
BALANCER: dict[str, object] = {
    "id": "607226db-27ef-4d41-ae89-f2a800e9c2db",
    "project_id": "p1",
    "provisioning_status": "ACTIVE",
    "created_at": "2026-05-08T01:00:00",
    "flavor_id": None,
    "listeners": [{"id": "l1"}],
}


def test_an_operator_meters_load_balancers_without_code() -> None:
    mapping = read(OCTAVIA)
    two = {**BALANCER, "listeners": [{"id": "l1"}, {"id": "l2"}]}
    found = ledger(
        mapping,
        "load_balancer",
        notification(
            "lbaas.loadbalancer.created", {"loadbalancer": BALANCER}, DAY + HOUR + HOUR / 60
        ),
        notification("octavia.loadbalancer.update.end", {"loadbalancer": two}, DAY + 3 * HOUR),
        *(
            notification(
                "octavia.loadbalancer.stats",
                {"loadbalancer": BALANCER | {"stats": {"bytes_out": sent}}},
                DAY + hours * HOUR,
            )
            for hours, sent in ((2, 1000), (4, 5000), (6, 300))
        ),
        notification("octavia.loadbalancer.delete.end", {"loadbalancer": two}, DAY + 9 * HOUR),
    )
    assert [item.attributes["listeners"] for item in found.intervals] == [1, 2]
    assert mapping.resources["load_balancer"].state_class("ACTIVE") == "running"
    assert used(mapping, "load_balancer", found) == {
        "load_balancer_hours": 8 * MICROSECONDS_PER_HOUR,
        "listener_hours": (2 * 1 + 6 * 2) * MICROSECONDS_PER_HOUR,
        "load_balancer_bytes_out": 5000 + 300,
    }
    # and everything else is metered as before
    assert packaged().resources.items() <= mapping.resources.items()
    assert set(packaged().measures) <= set(mapping.measures)


GPUS = """
resources:
  instance:
    attributes: {gpus: {kind: whole}}
    bodies:
      legacy: {attributes: {gpus: metadata/gpus}}
      versioned: {attributes: {gpus: flavor/nova_object.data/extra_specs/resources:VGPU}}
measures: {gpu_hours: {resource: instance, attribute: gpus}}
"""


def test_an_operator_meters_a_further_attribute_of_instances() -> None:
    mapping = read(GPUS)
    legacy = {
        "instance_id": "i",
        "tenant_id": "p1",
        "vcpus": 8,
        "launched_at": "2026-05-08T02:00:00.000000",
        "state": "active",
        "metadata": {"gpus": "2"},
    }
    found = ledger(
        mapping, "instance", notification("compute.instance.create.end", legacy, DAY + 2 * HOUR)
    )
    assert used(mapping, "instance", found) == {
        "instance_hours": 22 * MICROSECONDS_PER_HOUR,
        "vcpu_hours": 22 * 8 * MICROSECONDS_PER_HOUR,
        "gpu_hours": 22 * 2 * MICROSECONDS_PER_HOUR,
    }
    data = {
        "uuid": "i",
        "launched_at": "2026-05-08T02:00:00Z",
        "flavor": {"nova_object.data": {"extra_specs": {"resources:VGPU": "4"}}},
    }
    found = ledger(
        mapping,
        "instance",
        notification("instance.create.end", {"nova_object.data": data}, DAY + 2 * HOUR),
    )
    assert used(mapping, "instance", found)["gpu_hours"] == 22 * 4 * MICROSECONDS_PER_HOUR


def test_what_is_laid_over_adds_replaces_and_takes_away() -> None:
    mapping = read(
        """
        resources:
          network: null
          volume:
            edges: {note: [update.end], change: [resize.end]}
            bodies:
              cinder:
                attributes:
                  attached_to: {constant: nobody}
                  host: null
        measures: {network_hours: null}
        """
    )
    assert "network" not in mapping.resources
    assert mapping.rule_for("network.create.end") is None
    cinder = mapping.resources["volume"].bodies["cinder"]
    assert "host" not in cinder.attributes
    rule = mapping.rule_for("volume.resize.start")
    assert rule is not None
    assert rule.edge is Edge.NONE
    assert len(mapping.resources["volume"].bodies["cinder"].counters) == 4
    assert mapping.digest != packaged().digest
    assert "network" in packaged().resources  # the packaged one is as it was


def test_how_to_get_at_a_value_is_replaced_as_one_thing() -> None:
    mapping = read(
        "resources: {floating_ip: {bodies: {neutron: {attributes: {state: {constant: x}}}}}}"
    )
    found = ledger(
        mapping, "floating_ip", notification("floatingip.create.end", {"floatingip": {"id": "f"}})
    )
    assert found.intervals[0].attributes["state"] == "x"


BY_TYPE = """
resources:
  volume:
    bodies:
      cinder:
        attributes:
          provisioned_iops:
            - {item: [metadata, iops]}
            - by: volume_type
              table:
                gold: {fixed: 3000}
                grows: {fixed: 5, each: 10, of: size, most: 1500}
                none: {}
            - {constant: 7}
"""


@pytest.mark.parametrize(
    ("payload", "iops"),
    [
        ({"volume_type": "gold", "size": 5}, 3000),
        ({"volume_type": "gold", "metadata": [{"key": "iops", "value": "77"}]}, 77),
        ({"volume_type": "grows", "size": 100}, 1005),
        ({"volume_type": "grows", "size": "100"}, 1005),
        ({"volume_type": "grows", "size": 1000}, 1500),
        ({"volume_type": "grows", "size": 0}, 5),
        ({"volume_type": "grows"}, 7),  # how much it is cannot be told
        ({"volume_type": "grows", "size": "large"}, 7),
        ({"volume_type": "grows", "size": -1000}, None),
        ({"volume_type": "none"}, 0),
        ({"volume_type": "other"}, 7),
        ({"volume_type": None}, 7),
        ({"volume_type": ["gold"]}, 7),
        ({}, 7),
    ],
)
def test_a_table_says_a_number_that_bodies_do_not(
    payload: dict[str, object], iops: int | None
) -> None:
    message = notification("volume.create.end", {"volume_id": "v", **payload})
    (said,) = Normaliser(read(BY_TYPE)).read(message, region="r1").said
    assert said.statement is not None
    assert dict(said.statement.attributes).get("provisioned_iops") == iops


def test_a_file_is_read_and_names_itself_in_its_mistakes(tmp_path: Path) -> None:
    file = tmp_path / "mapping.yaml"
    file.write_text(OCTAVIA)
    assert mapping_file.load(file).digest == read(OCTAVIA).digest
    assert mapping_file.load(None) is packaged()
    file.write_text("version: 2")
    with pytest.raises(MappingInvalid, match=r"mapping\.yaml: version"):
        mapping_file.load(file)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_bytes(b"\xff\xfe\xff"),
        lambda file: file.mkdir(),
        lambda file: None,
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, spoil: Any) -> None:
    spoil(tmp_path / "m.yaml")
    with pytest.raises(MappingInvalid, match=r"m\.yaml"):
        mapping_file.load(tmp_path / "m.yaml")


def test_a_path_that_is_none_is_a_mistake_like_others() -> None:
    with pytest.raises(MappingInvalid):
        mapping_file.load(Path("a\0b"))


# --- mistakes

OF_CINDER = "resources: {volume: {bodies: {cinder: {%s}}}}"
MISTAKES = {
    "version: 2": "version",
    "versions: 1": "versions",
    "resources: []": "resources",
    "resources: {Upper: {attributes: {}, edges: {}, bodies: {}}}": "resources.Upper",
    "resources: {volume: {life: long}}": "resources.volume.life",
    "resources: {volume: {attributes: {size_gb: {kind: float}}}}": (
        "resources.volume.attributes.size_gb.kind"
    ),
    "resources: {volume: {attributes: {project: {kind: whole}}}}": (
        "resources.volume.attributes.project"
    ),
    "resources: {volume: {attributes: {zone: {otherwise: region}}}}": (
        "resources.volume.attributes.zone.otherwise"
    ),
    "resources: {volume: {attributes: {zone: {otherwise: size_gb}}}}": (
        "resources.volume.attributes.zone.otherwise"
    ),
    "resources: {instance: {exact: true}}": "resources.instance.exact",
    "resources: {volume: {edges: {born: [create.end]}}}": "resources.volume.edges.born",
    "resources: {volume: {edges: {change: [create.end]}}}": "resources.volume.edges",
    "resources: {volume: {states: {in_use: [available]}}}": "resources.volume.states",
    "resources: {volume: {bodies: {failures: {events: x., id: x}}}}": (
        "resources.volume.bodies.failures"
    ),
    "resources: {volume: {bodies: {twin: {events: volume., id: x}}}}": (
        "resources.volume.bodies.twin.events"
    ),
    OF_CINDER % "id: []": "resources.volume.bodies.cinder.id",
    OF_CINDER % "id: null": "resources.volume.bodies.cinder.id",
    OF_CINDER % "id: /": "resources.volume.bodies.cinder.id",
    OF_CINDER % "id: a//b": "resources.volume.bodies.cinder.id",
    OF_CINDER % "id: ''": "resources.volume.bodies.cinder.id",
    OF_CINDER % "born: 7": "resources.volume.bodies.cinder.born",
    OF_CINDER % "attributes: {colour: colour}": "resources.volume.bodies.cinder.attributes.colour",
    OF_CINDER
    % "attributes: {host: {summ: [a]}}": "resources.volume.bodies.cinder.attributes.host",
    OF_CINDER % "attributes: {host: {sum: [a], count: b}}": (
        "resources.volume.bodies.cinder.attributes.host"
    ),
    OF_CINDER % "attributes: {host: {present: a, then: b}}": (
        "resources.volume.bodies.cinder.attributes.host"
    ),
    OF_CINDER
    % "attributes: {host: {item: [a]}}": "resources.volume.bodies.cinder.attributes.host",
    **{
        OF_CINDER % f"attributes: {{provisioned_iops: {{by: volume_type, table: {table}}}}}": (
            "resources.volume.bodies.cinder.attributes.provisioned_iops"
        )
        for table in (
            "{}",
            "{a: {each: 10}}",
            "{a: {of: size}}",
            "{a: {fixed: -1}}",
            "{a: {fixed: 1.5}}",
            "{a: {most: -1}}",
            "{a: {fixed: 1, nope: 2}}",
        )
    },
    OF_CINDER % "counters: {volume_read_bytes: {reading: gauge}}": (
        "resources.volume.bodies.cinder.counters.volume_read_bytes.reading"
    ),
    OF_CINDER % "counters: {volume_read_bytes: null}": "measures.volume_read_bytes.counter",
    OF_CINDER % 'actions: {a: "b\\ud800"}': "resources.volume.bodies.cinder.actions.a",
    "measures: {x: {resource: nothing}}": "measures.x.resource",
    "measures: {x: {resource: volume, attribute: host}}": "measures.x.attribute",
    "measures: {x: {resource: volume, attribute: nothing}}": "measures.x.attribute",
    "measures: {x: {resource: volume, counter: nothing}}": "measures.x.counter",
    "measures: {x: {resource: volume, counter: volume_read_bytes, attribute: size_gb}}": (
        "measures.x"
    ),
    "measures: {'x; DROP TABLE': {resource: volume}}": "measures.x; DROP TABLE",
    "resources: {volume: null}": "measures.volume_hours.resource",
    "aliases: {a.*: b}": "aliases.a.*",
    "aliases: {'a b': c}": "aliases.a b",
    "aliases: {a: 7}": "aliases.a",
    "1: 2": "1",
    "{": "not YAML",
    "- a": "a mapping is an object",
    "text": "a mapping is an object",
    "": "a mapping is an object",
    "a: !!python/object:os.system x": "not YAML",
    "a: !!timestamp x": "not YAML",
    "a: !!bool x": "not YAML",
    "a: 2026-13-45": "not YAML",
    "a: !!int x": "not YAML",
    f"a: {'1' * 5000}": "not YAML",
    "[" * 5000: "not YAML",
    "a: \0": "not YAML",
}


@pytest.mark.parametrize("text", MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_named_by_its_place(text: str) -> None:
    with pytest.raises(MappingInvalid) as caught:
        read(text)
    assert caught.value.code == "usage.mapping.invalid"
    assert MISTAKES[text] in caught.value.detail


def places(document: Table[str, Any], place: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in document.items():
        found.append((*place, key))
        if isinstance(value, dict):
            found += places(value, (*place, key))
    return found


PACKAGED_TEXT = (Path(mapping_file.__file__).parents[1] / "mapping.yaml").read_text()
PLACES = places(yaml.safe_load(PACKAGED_TEXT))
WORDS = sorted({part for place in PLACES for part in place})
SCALAR = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=3)
    | st.dates()
    | st.sampled_from([*WORDS, "/", "//", ".", "a/b", "*", "create.end", "active"])
)
BROKEN = st.recursive(
    SCALAR,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=3), inner, max_size=3)
        | st.sets(st.text(max_size=3), max_size=2)
    ),
    max_leaves=6,
)
SPOKEN: list[tuple[str, dict[str, object]]] = [
    ("compute.instance.create.end", {"instance_id": "i", "launched_at": str(DAY), "vcpus": 2}),
    ("instance.exists", {"nova_object.data": {"uuid": "i", "bandwidth": None}}),
    (
        "volume.create.end",
        {"volume_id": "v", "size": 3, "volume_attachment": [{"server_id": "s"}]},
    ),
    ("volume.usage", {"volume_id": "v", "reads": 3}),
    ("floatingip.create.end", {"floatingip": {"id": "f", "port_id": None}}),
    ("image.exists", {"images": [{"id": "a"}, {"id": "b", "size": 3}]}),
    ("terminate_instance", {"exception": {"kwargs": {"uuid": "i"}}, "args": {}}),
]


def read_or_none(text: str) -> Mapping | None:
    """The mapping, or None where its mistakes are named."""
    try:
        return read(text)
    except MappingInvalid as exc:
        return None if exc.detail else packaged()


@settings(max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(PLACES), BROKEN), min_size=1, max_size=3))
def test_any_document_is_a_mapping_that_works_or_a_mistake_that_is_named(
    changes: list[tuple[tuple[str, ...], object]],
) -> None:
    document: dict[Any, Any] = {}
    for place, value in changes:
        inner = document
        for key in place[:-1]:
            inner = inner.setdefault(key, {}) if isinstance(inner.get(key, {}), dict) else {}
        inner[place[-1]] = value
    mapping = read_or_none(yaml.safe_dump(document))
    if mapping is None:
        return
    normaliser = Normaliser(mapping)
    for event_type, payload in SPOKEN:
        for said in normaliser.read(notification(event_type, payload), region="r1").said:
            if said.statement is not None:
                evidence = Evidence(event_time=DAY, message_id="m", digest=b"d")
                resource = mapping.resources[said.resource.resource_type]
                found = reckon(resource, [(decode(encode(said.statement)), evidence)])
                used(mapping, resource.name, found)


@given(st.text(max_size=40))
def test_any_text_is_a_mapping_or_a_mistake(text: str) -> None:
    mapping = read_or_none(text)
    assert mapping is None or mapping.measures
