"""Charges say in FOCUS's columns what the ledger's lines and the price book say."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler_usage.exporting import focus
from hostler_usage.exporting.export import UsageLine, decimal_text
from hostler_usage.exporting.focus import Issuer, Price
from hostler_usage.exporting.focus_pricing import MONTH, Pricing
from hostler_usage.money.price_book import price_book
from hostler_usage.reading.mapping import Measure

DAY = datetime(2026, 5, 31, tzinfo=UTC)
HOUR = 3_600_000_000
GROUP: Mapping[str, str | None] = {
    "region": "RegionOne",
    "project": "p1",
    "type": "instance",
    "resource": "i1",
    "flavor": "m1.small",
    "volume_type": None,
    "state_class": "running",
    "zone": "nova",
}
LINE = UsageLine(
    start=DAY,
    end=DAY + timedelta(days=1),
    group=GROUP,
    resources=1,
    measure="vcpu_hours",
    unit="vCPU",
    is_held=True,
    amount=48 * HOUR,
    hours=Decimal(48),
)
MEASURES = (
    Measure(name="instance_hours", resource_type="instance"),
    Measure(name="vcpu_hours", resource_type="instance", attribute="vcpus"),
    Measure(name="disk_read_bytes", resource_type="instance", counter="disk_read_bytes"),
)


def said(
    line: UsageLine = LINE, price: Price | None = None, *, priced: bool = True, **more: Any
) -> dict[str, Any]:
    """The row of a line, by column."""
    charge = focus.charge(line, currency="EUR", price=price, **more)
    row = focus.row(charge, Issuer(), priced=priced)
    return dict(zip((column.name for column in focus.columns(priced=priced)), row, strict=True))


def test_a_charge_says_what_was_used_by_whom_and_when() -> None:
    row = said()
    assert (row["ConsumedQuantity"], row["ConsumedUnit"]) == (Decimal(48), "vCPU-Hours")
    assert (row["ChargePeriodStart"], row["ChargePeriodEnd"]) == (LINE.start, LINE.end)
    assert row["BillingPeriodStart"] == datetime(2026, 5, 1, tzinfo=UTC)
    assert row["BillingPeriodEnd"] == datetime(2026, 6, 1, tzinfo=UTC)
    assert (row["SubAccountId"], row["SubAccountType"]) == ("p1", "Project")
    assert (row["RegionId"], row["AvailabilityZone"]) == ("RegionOne", "nova")
    assert (row["ResourceId"], row["ResourceType"]) == ("i1", "instance")
    assert (row["ChargeCategory"], row["ChargeClass"]) == ("Usage", None)
    assert (row["SkuMeter"], row["SkuId"]) == ("vcpu_hours", "vcpu_hours/m1.small")
    assert row["Tags"] == {"hostler/flavor": "m1.small", "hostler/state_class": "running"}


def test_a_late_adjustment_is_a_correction() -> None:
    late = datetime(2026, 6, 16, tzinfo=UTC)
    row = said(replace(LINE, amount=-HOUR), corrected_in=late)
    assert (row["ChargeClass"], row["ConsumedQuantity"]) == ("Correction", Decimal(-1))
    # of the period that it corrects, and billed in the one that it is charged to
    assert row["ChargePeriodStart"] == LINE.start
    assert row["BillingPeriodStart"] == datetime(2026, 6, 1, tzinfo=UTC)
    assert row["BillingPeriodEnd"] == datetime(2026, 7, 1, tzinfo=UTC)


def test_what_is_nobody_s_has_no_sub_account() -> None:
    row = said(replace(LINE, group={**GROUP, "project": None}))
    assert (row["SubAccountId"], row["SubAccountName"], row["SubAccountType"]) == (None,) * 3


def test_without_a_book_nothing_is_charged_and_no_unit_price_is_claimed() -> None:
    row = said(priced=False)
    costs = [row[name] for name in ("BilledCost", "EffectiveCost", "ListCost", "ContractedCost")]
    assert costs == [0, 0, 0, 0]
    assert not {"ListUnitPrice", "ContractedUnitPrice", "SkuPriceId", "x_IsPriced"} & row.keys()


def test_what_a_book_does_not_price_costs_nothing_and_says_so() -> None:
    row = said()
    assert (row["BilledCost"], row["ListUnitPrice"], row["x_IsPriced"]) == (0, 0, False)


@pytest.mark.parametrize(
    ("unit", "is_held", "amount", "spelled", "quantity", "unit_price"),
    [
        ("B", False, 48_000, "1000 B", 48, 250),
        ("GiB", True, 48_000 * HOUR, "GiB-Hours", 48_000, Decimal("0.25")),
    ],
)
def test_a_price_for_many_units_is_spelled_with_their_number_where_focus_can(
    unit: str, is_held: bool, amount: int, spelled: str, quantity: int, unit_price: Decimal
) -> None:
    price = Price(
        price_id="bulk",
        quantity=Fraction(48),
        per=Fraction(1000),
        list_cost=Fraction(12_000),
        cost=Fraction(6000),
    )
    row = said(replace(LINE, unit=unit, is_held=is_held, amount=amount), price)
    assert (row["PricingQuantity"], row["PricingUnit"]) == (quantity, spelled)
    assert (row["ListUnitPrice"], row["ContractedUnitPrice"]) == (unit_price, unit_price / 2)
    assert (row["ListCost"], row["ContractedCost"], row["BilledCost"]) == (12_000, 6000, 6000)
    assert row["SkuPriceId"] == "vcpu_hours/m1.small@bulk"


@given(
    st.integers(1, 10**18),
    st.fractions(min_value=Fraction(1, 10**6), max_value=10**4, max_denominator=10**6),
    st.fractions(min_value=0, max_value=1, max_denominator=100),
)
def test_costs_are_unit_price_times_quantity(
    amount: int, unit_price: Fraction, discount: Fraction
) -> None:
    line = replace(LINE, amount=amount)
    quantity = focus.quantity(line)
    price = Price(
        price_id="p",
        quantity=quantity,
        list_cost=quantity * unit_price,
        cost=quantity * unit_price * (1 - discount),
    )
    row = said(line, price)
    for unit, cost in (("ListUnitPrice", "ListCost"), ("ContractedUnitPrice", "ContractedCost")):
        product = Fraction(row[unit]) * Fraction(row["PricingQuantity"])
        assert abs(product - Fraction(row[cost])) <= Fraction(1, 10**18)
    assert abs(Fraction(row["BilledCost"]) - price.cost) <= Fraction(1, 10**18)


@pytest.mark.parametrize(
    ("unit", "is_held", "amount", "spelled", "quantity"),
    [
        ("GiB", True, HOUR // 2, "GiB-Hours", "0.5"),
        ("Floating IP", True, HOUR, "Floating IP-Hours", "1.0"),
        ("B", False, 7, "B", "7.0"),
        ("Operation", False, 7, "Operations", "7.0"),
        ("Nanosecond", False, 1_500_000_000, "Seconds", "1.5"),
        ("vCPU", True, 1, "vCPU-Hours", "0.000000000277777778"),
    ],
)
def test_units_are_spelled_as_focus_has_them(
    unit: str, is_held: bool, amount: int, spelled: str, quantity: str
) -> None:
    row = said(replace(LINE, unit=unit, is_held=is_held, amount=amount))
    assert (row["ConsumedUnit"], decimal_text(row["ConsumedQuantity"])) == (spelled, quantity)
    assert (row["PricingUnit"], decimal_text(row["PricingQuantity"])) == (spelled, quantity)


@given(
    st.integers(0, 3 * 365 * 86_400).map(
        lambda seconds: datetime(2024, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
    ),
    st.timedeltas(timedelta(seconds=1), timedelta(days=70)),
)
def test_charge_periods_cover_the_window_and_never_cross_a_month(
    start: datetime, length: timedelta
) -> None:
    periods = list(focus.charge_periods(start, start + length))
    assert periods[0][0] == start
    assert periods[-1][1] == start + length
    assert [end for _, end in periods[:-1]] == [begin for begin, _ in periods[1:]]
    for begin, end in periods:
        month = focus.billing_period(begin)
        assert month[0] <= begin < end <= month[1]


def test_every_type_of_the_mapping_has_a_service_of_its_own_category() -> None:
    categories: dict[str, set[tuple[str, str]]] = {}
    for kind in ("instance", "volume", "snapshot", "backup", "image", "network", "gpu_box"):
        service, category, subcategory = focus.service_of(kind)
        categories.setdefault(service, set()).add((category, subcategory))
    assert all(len(found) == 1 for found in categories.values())
    assert focus.service_of("gpu_box") == ("Gpu Box", "Other", "Other (Other)")


# --- with a book


FLAT = {
    "currency": "EUR",
    "free": ["instance_hours"],
    "prices": [
        {
            "name": "cpu",
            "measure": "vcpu_hours",
            "price": "0.25",
            "state_class_factors": {"stopped": "0.5"},
        }
    ],
    "discounts": [{"name": "half", "percent": 50, "match": {"project": "p1"}}],
}
TIERED = {
    "currency": "EUR",
    "prices": [
        {
            "name": "cpu",
            "measure": "vcpu_hours",
            "tiers": {
                "period": "month",
                "scope": ["project"],
                "steps": [{"up_to": 24, "price": 1}, {"price": "0.5"}],
            },
        }
    ],
}


def test_a_book_s_factors_and_discounts_are_in_the_price() -> None:
    pricing = Pricing(book=price_book(FLAT), measures=MEASURES)
    stopped = replace(LINE, group={**GROUP, "state_class": "stopped"})
    unpriced = replace(LINE, measure="disk_read_bytes", is_held=False, amount=5)
    free = replace(LINE, measure="instance_hours")
    assert not pricing.accumulates
    assert {"project", "state_class"} <= pricing.groups
    prices = [
        price for _, price in pricing.rated([LINE, stopped, unpriced, free], counted_from=DAY)
    ]
    assert [None if price is None else (price.list_cost, price.cost) for price in prices] == [
        (Fraction(12), Fraction(6)),
        (Fraction(6), Fraction(3)),
        None,
        (Fraction(0), Fraction(0)),
    ]
    row = said(stopped, prices[1])
    assert (row["ConsumedQuantity"], row["PricingQuantity"]) == (48, 24)


def test_what_came_before_the_window_moves_tiers_and_is_no_charge() -> None:
    pricing = Pricing(book=price_book(TIERED), measures=MEASURES)
    assert pricing.accumulates
    spans = list(pricing.spans(DAY, DAY + timedelta(days=1)))
    assert spans[0] == (datetime(2026, 5, 1, tzinfo=UTC), DAY)
    before = replace(LINE, start=spans[0][0], end=spans[0][1], amount=24 * HOUR)
    rated = pricing.rated([before, LINE], counted_from=DAY)
    assert [(line, price and price.cost) for line, price in rated] == [(LINE, Fraction(24))]


def test_a_month_of_a_resource_costs_what_it_holds() -> None:
    pricing = Pricing(book=price_book(FLAT), measures=MEASURES)
    group = {**GROUP, "user": "u1", "state_class": "stopped"}
    cost = pricing.month(group, {"vcpus": 2, "flavor": "m1.small"}, start=DAY)
    assert cost == MONTH // timedelta(hours=1) * 2 * Fraction(1, 4) / 2 / 2
    assert pricing.month({**group, "type": "image"}, {}, start=DAY) is None
