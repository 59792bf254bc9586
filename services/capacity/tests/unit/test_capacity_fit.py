"""Fit counts over arrays against counting one guest after the other."""

import itertools
import uuid

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler_capacity import fit, overhead, resources
from hostler_capacity.claim import NodeId
from hostler_capacity.fit import Blocker, Counter, Node, NodeState
from hostler_capacity.flavor import Flavor, Kind, Match
from hostler_capacity.resources import ResourceClass

CATALOGUE = overhead.shipped()
NOW = 1_000_000.0
STALE_SECONDS = 180.0
FPGA = ResourceClass("fpga")


def node(
    number: int = 1,
    *,
    hypervisor_type: str = "xen",
    memory: tuple[int, int, int] = (65536, 0, 0),
    vcpus: tuple[int, int, int] = (64, 0, 0),
    disk: tuple[int, int, int] = (2000, 0, 0),
    extra: dict[ResourceClass, tuple[int, int, int]] | None = None,
    bare_metal: bool = False,
    disabled: bool = False,
    available: bool = True,
    received_at: float = NOW,
) -> Node:
    counters = {
        resources.MEMORY_MB: memory,
        resources.VCPUS: vcpus,
        resources.DISK_GB: disk,
        **(extra or {}),
    }
    return Node(
        id=NodeId(number),
        host=f"host-{number}",
        hypervisor_hostname=f"host-{number}",
        node_uuid=uuid.UUID(int=number) if bare_metal else None,
        hypervisor_type="ironic" if bare_metal else hypervisor_type,
        bare_metal=bare_metal,
        disabled=disabled,
        available=available,
        received_at=received_at,
        counters={
            name: Counter(limit=limit, claimed=claimed, foreign=foreign)
            for name, (limit, claimed, foreign) in counters.items()
        },
    )


def fleet(*nodes: Node) -> fit.Fleet:
    return fit.build(nodes, catalogue=CATALOGUE, as_of=NOW, stale_seconds=STALE_SECONDS)


SMALL = Flavor(name="m1.small", memory_mb=2048, vcpus=1, disk_gb=20)

amounts = st.tuples(st.integers(0, 40_000), st.integers(0, 20_000), st.integers(0, 20_000))
few = st.tuples(st.integers(0, 40), st.integers(0, 20), st.integers(0, 20))


@st.composite
def nodes(draw: st.DrawFn) -> list[Node]:
    return [
        node(
            number,
            hypervisor_type=draw(st.sampled_from(["xen", "QEMU", "XenServer", "BeyondHV"])),
            memory=draw(amounts),
            vcpus=draw(few),
            disk=draw(amounts),
            extra=draw(st.sampled_from([{}, {FPGA: (4, 1, 1)}, {FPGA: (4, 4, 0)}])),
            disabled=draw(st.integers(0, 9)) == 0,
            available=draw(st.integers(0, 9)) != 0,
            received_at=draw(st.sampled_from([NOW, NOW - 180, NOW - 181])),
        )
        for number in range(1, draw(st.integers(0, 6)) + 1)
    ]


shapes = st.builds(
    Flavor,
    name=st.just("any"),
    memory_mb=st.integers(1, 9000),
    vcpus=st.integers(1, 9),
    disk_gb=st.integers(0, 5000),
    extra=st.sampled_from([{}, {FPGA: 1}, {FPGA: 2}]),
    vm_type=st.sampled_from([None, "pv", "hvm"]),
)


def count_one_by_one(where: Node, shape: Flavor) -> int:
    """The oracle: put guests on the node until one does not fit."""
    if where.disabled or not where.available or NOW - where.received_at > STALE_SECONDS:
        return 0
    model = CATALOGUE.default_for(where.hypervisor_type)
    one = dict(shape.shape)
    one[resources.MEMORY_MB] += model.price_mb(shape.memory_mb, shape.vcpus, shape.vm_type)
    free = {name: counter.free for name, counter in where.counters.items()}
    for placed in itertools.count():
        if any(free.get(name, 0) < amount for name, amount in one.items()):
            return placed
        free = {name: free[name] - one.get(name, 0) for name in free}
    raise AssertionError


@given(nodes(), shapes)
def test_counts_equal_placing_guests_one_by_one(where: list[Node], shape: Flavor) -> None:
    found = fleet(*where).fit(shape, NOW)
    assert [int(count) for count in found.counts] == [
        count_one_by_one(each, shape) for each in where
    ]


@given(nodes(), shapes)
def test_the_binding_class_is_what_one_more_guest_lacks(where: list[Node], shape: Flavor) -> None:
    found = fleet(*where).fit(shape, NOW)
    for at in range(len(where)):
        explained = found.at(at)
        if explained.blocker is not None:
            assert explained.state is not NodeState.UP
            assert explained.count == 0
        else:
            assert explained.binding is not None
            one = explained.need.vector[explained.binding.resource]
            assert one * explained.count <= max(0, explained.binding.free)
            assert one * (explained.count + 1) - explained.binding.free == (
                explained.binding.short_by
            )
            assert explained.binding.short_by > 0


@given(nodes(), nodes(), st.sets(st.integers(1, 6)), shapes)
def test_an_updated_fleet_equals_one_built_afresh(
    before: list[Node], after: list[Node], gone: set[int], shape: Flavor
) -> None:
    started = fleet(*before)
    updated = started.updated(
        after, [NodeId(number) for number in gone], catalogue=CATALOGUE, as_of=NOW + 1
    )
    rows = {each.id: each for each in before if each.id not in gone}
    rows.update((each.id, each) for each in after)
    built = fleet(*rows.values())
    assert [each.id for each in updated.nodes] == [each.id for each in built.nodes]
    assert np.array_equal(updated.fit(shape, NOW).counts, built.fit(shape, NOW).counts)
    assert np.array_equal(started.fit(shape, NOW).counts, fleet(*before).fit(shape, NOW).counts)


def test_overhead_is_counted_for_every_guest() -> None:
    # 65536 / 2048 = 32 guests without overhead; xapi takes 2 + 17 + 1 MB for each
    found = fleet(node(memory=(65536, 0, 0))).fit(SMALL, NOW)
    assert found.total == 31
    explained = found.at(0)
    assert explained.need.overhead_mb == 20
    assert explained.binding == fit.Binding(
        resource=resources.MEMORY_MB, free=65536, need=2068, short_by=32 * 2068 - 65536
    )


def test_the_same_memory_holds_fewer_guests_under_a_hungrier_hypervisor() -> None:
    found = fleet(node(1), node(2, hypervisor_type="QEMU")).fit(SMALL, NOW)
    assert [int(count) for count in found.counts] == [31, 30]


def test_claims_and_guests_that_are_not_ours_both_reduce_room() -> None:
    found = fleet(node(memory=(65536, 2068 * 10, 2068 * 20))).fit(SMALL, NOW)
    assert found.total == 1


def test_a_host_over_its_limit_takes_nothing_and_says_how_far_over_it_is() -> None:
    explained = fleet(node(memory=(1000, 3000, 500))).fit(SMALL, NOW).at(0)
    assert explained.count == 0
    assert explained.binding is not None
    assert (explained.binding.free, explained.binding.short_by) == (-2500, 2068 + 2500)


@pytest.mark.parametrize(
    ("where", "blocker"),
    [
        (node(disabled=True), Blocker.DISABLED),
        (node(available=False), Blocker.UNAVAILABLE),
        (node(received_at=NOW - STALE_SECONDS - 1), Blocker.STALE),
        (node(bare_metal=True), Blocker.WHOLE_NODE),
    ],
)
def test_a_node_that_takes_no_guests_says_why(where: Node, blocker: Blocker) -> None:
    explained = fleet(where).fit(SMALL, NOW).at(0)
    assert (explained.count, explained.blocker, explained.binding) == (0, blocker, None)


def test_a_resource_no_host_ever_reported_is_short_everywhere() -> None:
    wanted = Flavor(name="fast", memory_mb=1, vcpus=1, extra={FPGA: 3})
    explained = fleet(node()).fit(wanted, NOW).at(0)
    assert explained.binding == fit.Binding(resource=FPGA, free=0, need=3, short_by=3)


METAL = Flavor(name="metal", memory_mb=65536, vcpus=64, disk_gb=2000, kind=Kind.NODE)


def test_a_whole_node_fits_once_and_has_no_overhead() -> None:
    found = fleet(node(bare_metal=True)).fit(METAL, NOW)
    assert found.total == 1
    assert found.at(0).need.overhead_mb == 0
    assert found.at(0).need.vector == METAL.shape


@pytest.mark.parametrize("memory", [(65536, 65536, 0), (65536, 0, 65536), (65536, 0, 1)])
def test_a_whole_node_of_which_anything_is_used_has_nothing_free(
    memory: tuple[int, int, int],
) -> None:
    explained = fleet(node(bare_metal=True, memory=memory)).fit(METAL, NOW).at(0)
    assert (explained.count, explained.blocker) == (0, None)
    assert explained.binding is not None
    assert explained.binding.resource == resources.MEMORY_MB


def test_an_exact_flavor_refuses_a_bigger_machine_and_at_least_takes_the_smallest() -> None:
    machines = [
        node(1, bare_metal=True, memory=(262144, 0, 0)),
        node(2, bare_metal=True, memory=(131072, 0, 0)),
        node(3, bare_metal=True, memory=(32768, 0, 0)),
    ]
    exact = fleet(*machines).fit(METAL, NOW)
    assert exact.total == 0
    assert {exact.at(at).blocker for at in range(3)} == {Blocker.NO_MATCH}
    roomy = Flavor(name="metal", memory_mb=65536, vcpus=64, kind=Kind.NODE, match=Match.AT_LEAST)
    found = fleet(*machines).fit(roomy, NOW)
    assert found.total == 2
    assert [found.fleet.nodes[at].id for at in found.best_first()] == [2, 1]


def test_a_whole_node_flavor_never_lands_on_a_hypervisor() -> None:
    explained = fleet(node()).fit(METAL, NOW).at(0)
    assert (explained.count, explained.blocker) == (0, Blocker.NOT_A_WHOLE_NODE)


def test_the_fullest_node_with_room_is_offered_first() -> None:
    found = fleet(
        node(1), node(2, memory=(65536, 60000, 0)), node(3, memory=(65536, 65536, 0))
    ).fit(SMALL, NOW)
    assert [found.fleet.nodes[at].id for at in found.best_first()] == [2, 1]
