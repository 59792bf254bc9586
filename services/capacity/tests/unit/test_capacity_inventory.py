"""Reports against claims: what is ours is not counted twice, what is not is counted once."""

import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from hostler_capacity import inventory, overhead, resources
from hostler_capacity.inventory import Guest, LiveClaim, Ratios, ReportedNode
from hostler_capacity.resources import DISK_GB, MEMORY_MB, VCPUS, ResourceClass

MODEL = overhead.shipped().get("xapi-exact")
AT = datetime(2026, 1, 1, tzinfo=UTC)
OURS = uuid.UUID(int=1)
THEIRS = uuid.UUID(int=2)


def reported(
    *,
    guests: Sequence[Guest] | None = None,
    used: tuple[int, int, int] = (0, 0, 0),
    bare_metal: bool = False,
) -> ReportedNode:
    classes = (MEMORY_MB, VCPUS, DISK_GB)
    return ReportedNode(
        hypervisor_hostname="hv",
        node_uuid=None,
        hypervisor_type="xen",
        bare_metal=bare_metal,
        total=dict(zip(classes, (10_000, 16, 1000), strict=True)),
        reserved={MEMORY_MB: 1000},
        used=dict(zip(classes, used, strict=True)),
        guests=guests,
        disabled=False,
        available=True,
        state=None,
        zone=None,
    )


def claim_of(
    consumer: uuid.UUID, memory_mb: int, *, vcpus: int = 1, confirmed_at: datetime | None = None
) -> LiveClaim:
    return LiveClaim(
        consumer_id=consumer,
        vector={MEMORY_MB: memory_mb, VCPUS: vcpus, DISK_GB: 20},
        confirmed_at=confirmed_at,
    )


def foreign(node: ReportedNode, *live: LiveClaim) -> dict[ResourceClass, int]:
    return inventory.foreign(
        node,
        live=live,
        model=MODEL,
        limit=inventory.limits(node, Ratios()),
        reported_at=AT,
    )


def guest(number: uuid.UUID, memory_mb: int = 1024, overhead_mb: int | None = None) -> Guest:
    return Guest(uuid=number, memory_mb=memory_mb, vcpus=1, overhead_mb=overhead_mb)


def test_the_reserve_is_taken_before_the_ratio_and_units_stay_whole() -> None:
    node = reported()
    assert inventory.limits(node, Ratios(percent={MEMORY_MB: 150, VCPUS: 33})) == {
        MEMORY_MB: 13_500,
        VCPUS: 5,
        DISK_GB: 1000,
    }


def test_bare_metal_is_never_oversold() -> None:
    limit = inventory.limits(reported(bare_metal=True), Ratios(percent={VCPUS: 400}))
    assert limit[VCPUS] == 16


def test_a_guest_that_is_not_ours_costs_its_memory_and_its_overhead() -> None:
    assert foreign(reported(guests=[guest(THEIRS)]))[MEMORY_MB] == 1024 + 11


def test_an_overhead_the_hypervisor_measured_is_taken_over_the_models() -> None:
    assert foreign(reported(guests=[guest(THEIRS, overhead_mb=40)]))[MEMORY_MB] == 1024 + 40


def test_a_guest_that_a_live_claim_covers_is_not_counted_again() -> None:
    found = foreign(reported(guests=[guest(OURS)]), claim_of(OURS, 1035))
    assert found == {MEMORY_MB: 0, VCPUS: 0, DISK_GB: 0}


def test_what_a_guest_takes_beyond_its_claim_is_counted() -> None:
    found = foreign(reported(guests=[guest(OURS, 2048)]), claim_of(OURS, 1035))
    assert found[MEMORY_MB] == 2048 + 19 - 1035


def test_memory_used_beyond_the_listed_guests_is_counted() -> None:
    found = foreign(reported(guests=[guest(THEIRS)], used=(3000, 1, 0)))
    assert found[MEMORY_MB] == 3000


def test_without_a_guest_list_only_claims_confirmed_before_the_report_are_in_its_total() -> None:
    total = reported(used=(5000, 2, 60))
    old = claim_of(OURS, 1035, confirmed_at=AT - timedelta(seconds=60))
    young = claim_of(OURS, 1035, confirmed_at=AT - timedelta(seconds=1))
    held = claim_of(OURS, 1035)
    assert foreign(total, old) == {MEMORY_MB: 3965, VCPUS: 1, DISK_GB: 40}
    assert foreign(total, young)[MEMORY_MB] == 5000
    assert foreign(total, held)[MEMORY_MB] == 5000


def test_disk_is_compared_with_the_claims_of_listed_guests() -> None:
    found = foreign(reported(guests=[guest(OURS)], used=(0, 0, 50)), claim_of(OURS, 1035))
    assert found[DISK_GB] == 30


def test_any_use_of_bare_metal_takes_all_of_it_unless_it_is_claimed() -> None:
    taken = reported(bare_metal=True, used=(1, 0, 0))
    assert foreign(taken) == inventory.limits(taken, Ratios())
    assert set(foreign(taken, claim_of(OURS, 9000)).values()) == {0}
    assert set(foreign(reported(bare_metal=True)).values()) == {0}


guests = st.lists(
    st.builds(
        Guest,
        uuid=st.integers(1, 8).map(lambda number: uuid.UUID(int=number)),
        memory_mb=st.integers(1, 4000),
        vcpus=st.integers(1, 4),
        overhead_mb=st.none() | st.integers(0, 100),
    ),
    unique_by=lambda each: each.uuid,
    max_size=6,
)
claims = st.lists(
    st.builds(
        LiveClaim,
        consumer_id=st.integers(1, 8).map(lambda number: uuid.UUID(int=number)),
        vector=st.fixed_dictionaries(
            {MEMORY_MB: st.integers(1, 4000), VCPUS: st.integers(1, 4)},
        ),
        confirmed_at=st.sampled_from([None, AT, AT - timedelta(minutes=1)]),
    ),
    max_size=6,
)


@given(
    st.none() | guests,
    claims,
    st.tuples(st.integers(0, 9000), st.integers(0, 16), st.integers(0, 1000)),
)
def test_claimed_and_foreign_together_never_understate_what_is_reported(
    listed: list[Guest] | None, live: list[LiveClaim], used: tuple[int, int, int]
) -> None:
    node = reported(guests=listed, used=used)
    found = foreign(node, *live)
    for name in (MEMORY_MB, VCPUS, DISK_GB):
        claimed = sum(each.vector.get(name, 0) for each in live)
        assert found[name] >= 0
        assert claimed + found[name] >= node.used[name]
    listed_mb = sum(
        each.memory_mb
        + (
            each.overhead_mb
            if each.overhead_mb is not None
            else MODEL.price_mb(each.memory_mb, each.vcpus)
        )
        for each in listed or ()
    )
    claimed_mb = sum(each.vector[resources.MEMORY_MB] for each in live)
    assert claimed_mb + found[resources.MEMORY_MB] >= listed_mb


def test_a_guest_that_is_listed_twice_is_covered_once() -> None:
    guest = Guest(uuid=OURS, memory_mb=2048, vcpus=1)
    price = 2048 + MODEL.price_mb(2048, 1)
    node = reported(guests=[guest, guest], used=(2 * price, 2, 0))
    assert foreign(node, claim_of(OURS, price)) == {MEMORY_MB: price, VCPUS: 1, DISK_GB: 0}
