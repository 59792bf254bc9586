"""The shipped overhead models against the measurements they were made from."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler_capacity import overhead

CATALOGUE = overhead.shipped()


def evidence_of(model_id: str, dataset_id: str) -> overhead.Evidence:
    found = {e.dataset: e for e in CATALOGUE.evidence(CATALOGUE.get(model_id))}
    return found[overhead.DataSetId(dataset_id)]


def test_the_measurements_are_shipped_whole() -> None:
    assert {d.id: len(d.rows) for d in CATALOGUE.datasets} == {
        "xen-2013-07": 14,
        "xen-2013-12": 49,
    }


@pytest.mark.parametrize(
    ("model_id", "dataset_id", "raw", "worst_raw", "charged", "worst_charged"),
    [
        ("xen-nova-2013-07", "xen-2013-12", 9, 4, 9, 4),
        ("xen-nova-2013-07", "xen-2013-07", 0, 0, 0, 0),
        ("xen-nova-2013-12", "xen-2013-12", 0, 0, 0, 0),
        ("xen-wiki-fit", "xen-2013-12", 31, 2.963, 7, 2),
        ("xen-wiki-fit-envelope", "xen-2013-12", 0, 0, 0, 0),
        ("xapi-exact", "xen-2013-12", 0, 0, 0, 0),
        ("xapi-exact-2026", "xen-2013-12", 0, 0, 0, 0),
    ],
)
def test_each_model_knows_how_far_below_the_measurements_it_is(
    model_id: str,
    dataset_id: str,
    raw: int,
    worst_raw: float,
    charged: int,
    worst_charged: float,
) -> None:
    found = evidence_of(model_id, dataset_id)
    assert (found.under_rows_raw, float(found.max_under_mb_raw)) == (raw, worst_raw)
    assert (found.under_rows_charged, float(found.max_under_mb_charged)) == (
        charged,
        worst_charged,
    )


def test_xapis_own_memory_model_equals_every_measured_row() -> None:
    found = evidence_of("xapi-exact", "xen-2013-12")
    assert (found.exact_rows, found.rows) == (49, 49)


def test_novas_padded_formula_wastes_up_to_18_mb() -> None:
    assert evidence_of("xen-nova-2013-12", "xen-2013-12").max_over_mb_charged == 18


def test_the_envelope_is_no_higher_than_its_data_asks_for() -> None:
    plain = evidence_of("xen-wiki-fit", "xen-2013-12")
    lifted = CATALOGUE.get("xen-wiki-fit-envelope")
    assert plain.max_under_mb_raw <= lifted.envelope_mb < plain.max_under_mb_raw + Fraction(1, 100)


@pytest.mark.parametrize(
    ("model_id", "memory_mb", "vcpus", "vm_type", "expected"),
    [
        ("xen-nova-2013-07", 30720, 8, None, 252),  # nova's own test of 7524194b2f
        ("xen-nova-2013-12", 1024, 1, None, 13),
        ("xapi-exact", 1024, 1, "pv", 10),
        ("xapi-exact", 1024, 1, "hvm", 11),
        ("xapi-exact", 1024, 1, None, 11),
        ("xapi-exact", 9000, 2, "pv-in-pvh", 2 + 73 + 23 + 100),
        ("xapi-exact-2026", 122880, 32, "hvm", 994 + 5),
        ("kvm-kubevirt", 1024, 1, None, 290),  # kubevirt's own test
        ("kvm-ovirt", 1024, 1, None, 74),
        ("bare-metal-none", 524288, 128, None, 0),
    ],
)
def test_published_examples_come_out_to_the_megabyte(
    model_id: str, memory_mb: int, vcpus: int, vm_type: str | None, expected: int
) -> None:
    assert CATALOGUE.get(model_id).price_mb(memory_mb, vcpus, vm_type) == expected


def test_vsphere_plane_is_never_below_vmwares_table() -> None:
    table = {
        256: (20.29, 24.28, 32.23, 48.16),
        1024: (25.90, 29.91, 37.86, 53.82),
        4096: (48.64, 52.72, 60.67, 76.78),
        16384: (139.62, 143.98, 151.93, 168.60),
    }
    model = CATALOGUE.get("vsphere-6")
    short = [
        (memory_mb, vcpus)
        for memory_mb, row in table.items()
        for vcpus, measured in zip((1, 2, 4, 8), row, strict=True)
        if model.price_mb(memory_mb, vcpus) < measured
    ]
    assert short == []


@pytest.mark.parametrize("model_id", ["xen-nova-2013-07", "xen-wiki-fit"])
def test_a_model_that_under_predicts_is_refused_as_a_default(model_id: str) -> None:
    with pytest.raises(overhead.UnsafeModelError, match="of 49 guests of xen-2013-12"):
        CATALOGUE.with_defaults({"xen": model_id})


def test_the_refusal_says_how_many_rows_and_by_how_much() -> None:
    with pytest.raises(overhead.UnsafeModelError) as caught:
        CATALOGUE.with_defaults({"xen": "xen-nova-2013-07"})
    assert "9 of 49 guests" in str(caught.value)
    assert "by up to 4 MB" in str(caught.value)


def test_an_operator_may_choose_any_safe_model() -> None:
    chosen = CATALOGUE.with_defaults({"XenServer": "xen-nova-2013-12"})
    assert chosen.default_for("xenserver").id == "xen-nova-2013-12"
    assert CATALOGUE.default_for("xenserver").id == "xapi-exact-2026"


def test_a_hypervisor_nobody_has_measured_is_priced_generously() -> None:
    assert CATALOGUE.default_for("BeyondHV").id == "generous"


def test_every_shipped_default_is_safe() -> None:
    assert [
        model_id
        for model_id in CATALOGUE.defaults.values()
        if CATALOGUE.shortfall(CATALOGUE.get(model_id)) is not None
    ] == []


def test_an_unknown_model_is_an_error() -> None:
    with pytest.raises(overhead.UnknownModelError, match="no-such"):
        CATALOGUE.with_defaults({"xen": "no-such"})


@given(
    model=st.sampled_from(sorted(CATALOGUE.models)),
    memory_mb=st.integers(min_value=1, max_value=4 * 1024 * 1024),
    vcpus=st.integers(min_value=1, max_value=512),
    vm_type=st.sampled_from([None, "pv", "hvm", "pvh", "pv-in-pvh", "other"]),
)
def test_a_charge_is_the_prediction_rounded_up_and_grows_with_the_guest(
    model: str, memory_mb: int, vcpus: int, vm_type: str | None
) -> None:
    chosen = CATALOGUE.get(model)
    charge = chosen.price_mb(memory_mb, vcpus, vm_type)
    assert charge == math.ceil(chosen.predict(memory_mb, vcpus, vm_type)) >= 0
    assert chosen.price_mb(memory_mb + 1, vcpus, vm_type) >= charge
    assert chosen.price_mb(memory_mb, vcpus + 1, vm_type) >= charge
