"""Usage as charges in the columns of FOCUS 1.2 (the FinOps Open Cost and Usage Specification).

A charge is what one resource used of one measure in one charge period, priced or not. What the
specification leaves open, and how it is read here:

- Invoicing is outside: `InvoiceId` is always null. `BilledCost` and `EffectiveCost` are what the
  price book bills, to 18 places: money is rounded where it is summed, never row by row. `ListCost`
  and `ContractedCost` are exactly unit price times `PricingQuantity`, as the specification demands;
  of what falls into several tiers, the unit price is their mean.
- Without a price book nothing is charged, so the four costs are 0 (they may not be null), and the
  columns that speak of published prices (`_PRICED`) are left out: the specification wants them of
  providers that publish prices, and forbids null in them. With a book, what it does not price costs
  0 at a unit price of 0, and says `x_IsPriced` false.
- A billing period is a calendar month in UTC. A charge period never crosses its end, and begins and
  ends on a whole second, which is as fine as the format goes.
- A project is a sub account. Notifications name projects and resources by id only: `SubAccountName`,
  which may not be null, repeats the id, and `ResourceName` is null.
- `ResourceType` and the units are the ledger's words; OpenStack's MB and GB are MiB and GiB.
- A late adjustment to a closed period is a row of its own with `ChargeClass` "Correction", and may
  have a negative quantity and cost. Its charge period is the whole period that it corrects, its
  billing period the month that it is charged to.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Context, Decimal
from fractions import Fraction
from typing import Final

from hostler_usage.exporting.export import Column, Kind, Row, UsageLine, Value
from hostler_usage.history.measures import MICROSECONDS_PER_HOUR

VERSION: Final = "1.2"
_PLACES: Final = 18
_SCALE: Final = 10**_PLACES
_NANOSECONDS: Final = 1_000_000_000
_DIGITS: Final = Context(prec=100)
ZERO: Final = Decimal(0)

# what usage is grouped by, for a charge to know all it says
GROUPS: Final = (
    "region",
    "project",
    "type",
    "resource",
    "flavor",
    "volume_type",
    "state_class",
    "zone",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Issuer:
    """Who charges whom: the operator's words, the same on every row. `currency` is for rows without a price book."""

    provider: str = "hostler"
    publisher: str = "hostler"
    invoice_issuer: str = "hostler"
    billing_account_id: str = "private-cloud"
    billing_account_name: str = "Private cloud"
    currency: str = "USD"


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What a price book asks for a charge, exact.

    `quantity` is what is charged for, in units of `per` units of the measure (unit-hours of what is
    held): after the book's factors and rounding. `list_cost` is before discounts.
    """

    price_id: str
    quantity: Fraction
    per: Fraction = Fraction(1)
    list_cost: Fraction
    cost: Fraction


@dataclass(frozen=True, slots=True, kw_only=True)
class FocusCharge:
    """What one resource used of one measure in one charge period.

    `quantity` is what was consumed: unit-hours, or what moved, in `unit` as FOCUS spells it.
    `price` is None where no price book is in use, or it does not price this. `corrected_in` is a
    moment of the month that a correction is charged to; None of what is no correction.
    """

    start: datetime
    end: datetime
    region: str
    zone: str | None
    project_id: str | None
    resource_type: str
    resource_id: str
    variant: str | None
    measure: str
    unit: str
    quantity: Fraction
    currency: str
    price: Price | None = None
    corrected_in: datetime | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


_COLUMNS: Final = (
    Column("AvailabilityZone", Kind.TEXT),
    Column("BilledCost", Kind.DECIMAL),
    Column("BillingAccountId", Kind.TEXT),
    Column("BillingAccountName", Kind.TEXT),
    Column("BillingAccountType", Kind.TEXT),
    Column("BillingCurrency", Kind.TEXT),
    Column("BillingPeriodEnd", Kind.TIME),
    Column("BillingPeriodStart", Kind.TIME),
    Column("ChargeCategory", Kind.TEXT),
    Column("ChargeClass", Kind.TEXT),
    Column("ChargeDescription", Kind.TEXT),
    Column("ChargeFrequency", Kind.TEXT),
    Column("ChargePeriodEnd", Kind.TIME),
    Column("ChargePeriodStart", Kind.TIME),
    Column("CommitmentDiscountStatus", Kind.TEXT),
    Column("ConsumedQuantity", Kind.DECIMAL),
    Column("ConsumedUnit", Kind.TEXT),
    Column("ContractedCost", Kind.DECIMAL),
    Column("ContractedUnitPrice", Kind.DECIMAL),
    Column("EffectiveCost", Kind.DECIMAL),
    Column("InvoiceId", Kind.TEXT),
    Column("InvoiceIssuerName", Kind.TEXT),
    Column("ListCost", Kind.DECIMAL),
    Column("ListUnitPrice", Kind.DECIMAL),
    Column("PricingCategory", Kind.TEXT),
    Column("PricingCurrency", Kind.TEXT),
    Column("PricingCurrencyContractedUnitPrice", Kind.DECIMAL),
    Column("PricingCurrencyEffectiveCost", Kind.DECIMAL),
    Column("PricingCurrencyListUnitPrice", Kind.DECIMAL),
    Column("PricingQuantity", Kind.DECIMAL),
    Column("PricingUnit", Kind.TEXT),
    Column("ProviderName", Kind.TEXT),
    Column("PublisherName", Kind.TEXT),
    Column("RegionId", Kind.TEXT),
    Column("RegionName", Kind.TEXT),
    Column("ResourceId", Kind.TEXT),
    Column("ResourceName", Kind.TEXT),
    Column("ResourceType", Kind.TEXT),
    Column("ServiceCategory", Kind.TEXT),
    Column("ServiceName", Kind.TEXT),
    Column("ServiceSubcategory", Kind.TEXT),
    Column("SkuId", Kind.TEXT),
    Column("SkuMeter", Kind.TEXT),
    Column("SkuPriceDetails", Kind.JSON),
    Column("SkuPriceId", Kind.TEXT),
    Column("SubAccountId", Kind.TEXT),
    Column("SubAccountName", Kind.TEXT),
    Column("SubAccountType", Kind.TEXT),
    Column("Tags", Kind.JSON),
    Column("x_IsPriced", Kind.BOOLEAN),
)
_PRICED: Final = frozenset(
    {
        "ContractedUnitPrice",
        "ListUnitPrice",
        "PricingCategory",
        "PricingCurrency",
        "PricingCurrencyContractedUnitPrice",
        "PricingCurrencyEffectiveCost",
        "PricingCurrencyListUnitPrice",
        "SkuPriceDetails",
        "SkuPriceId",
        "x_IsPriced",
    }
)

# by resource type: the service, and the category and subcategory of FOCUS 1.2 that it belongs to
_SERVICES: Final = {
    "instance": ("Compute", "Compute", "Virtual Machines"),
    "node": ("Bare Metal", "Compute", "Other (Compute)"),
    "volume": ("Block Storage", "Storage", "Block Storage"),
    "snapshot": ("Block Storage", "Storage", "Block Storage"),
    "backup": ("Volume Backup", "Storage", "Backup Storage"),
    "image": ("Image", "Storage", "Other (Storage)"),
    "share": ("Shared File Systems", "Storage", "File Storage"),
    "network": ("Networking", "Networking", "Network Infrastructure"),
    "router": ("Networking", "Networking", "Network Infrastructure"),
    "floating_ip": ("Networking", "Networking", "Network Infrastructure"),
    "meter_label": ("Networking", "Networking", "Network Infrastructure"),
    "load_balancer": ("Load Balancing", "Networking", "Application Networking"),
}
_OTHER: Final = ("Other", "Other (Other)")


def columns(*, priced: bool) -> tuple[Column, ...]:
    """The columns of the file, in order; those of published prices where a price book is in use."""
    return tuple(column for column in _COLUMNS if priced or column.name not in _PRICED)


def row(charge: FocusCharge, issuer: Issuer, *, priced: bool) -> Row:
    """The row of `columns` that says `charge`."""
    pricing_unit, pricing_quantity = _pricing(charge)
    price = charge.price
    unit_price = ZERO if price is None else _unit_price(price.cost, pricing_quantity)
    list_price = ZERO if price is None else _unit_price(price.list_cost, pricing_quantity)
    billed = ZERO if price is None else _decimal(price.cost)
    began, ended = billing_period(charge.corrected_in or charge.start)
    service, category, subcategory = service_of(charge.resource_type)
    sku = charge.measure if charge.variant is None else f"{charge.measure}/{charge.variant}"
    price_id = f"{sku}@{'unpriced' if price is None else price.price_id}"
    values: dict[str, Value] = {
        "AvailabilityZone": charge.zone,
        "BilledCost": billed,
        "BillingAccountId": issuer.billing_account_id,
        "BillingAccountName": issuer.billing_account_name,
        "BillingAccountType": "Cloud",
        "BillingCurrency": charge.currency,
        "BillingPeriodEnd": ended,
        "BillingPeriodStart": began,
        "ChargeCategory": "Usage",
        "ChargeClass": None if charge.corrected_in is None else "Correction",
        "ChargeDescription": f"{sku} of {charge.resource_type} {charge.resource_id}",
        "ChargeFrequency": "Usage-Based",
        "ChargePeriodEnd": charge.end,
        "ChargePeriodStart": charge.start,
        "CommitmentDiscountStatus": None,
        "ConsumedQuantity": _decimal(charge.quantity),
        "ConsumedUnit": charge.unit,
        "ContractedCost": _product(unit_price, pricing_quantity),
        "ContractedUnitPrice": unit_price,
        "EffectiveCost": billed,
        "InvoiceId": None,
        "InvoiceIssuerName": issuer.invoice_issuer,
        "ListCost": _product(list_price, pricing_quantity),
        "ListUnitPrice": list_price,
        "PricingCategory": "Standard",
        "PricingCurrency": charge.currency,
        "PricingCurrencyContractedUnitPrice": unit_price,
        "PricingCurrencyEffectiveCost": billed,
        "PricingCurrencyListUnitPrice": list_price,
        "PricingQuantity": pricing_quantity,
        "PricingUnit": pricing_unit,
        "ProviderName": issuer.provider,
        "PublisherName": issuer.publisher,
        "RegionId": charge.region,
        "RegionName": charge.region,
        "ResourceId": charge.resource_id,
        "ResourceName": None,
        "ResourceType": charge.resource_type,
        "ServiceCategory": category,
        "ServiceName": service,
        "ServiceSubcategory": subcategory,
        "SkuId": sku,
        "SkuMeter": charge.measure,
        "SkuPriceDetails": None,
        "SkuPriceId": price_id,
        "SubAccountId": charge.project_id,
        "SubAccountName": charge.project_id,
        "SubAccountType": None if charge.project_id is None else "Project",
        "Tags": {f"hostler/{key}": value for key, value in charge.tags.items()},
        "x_IsPriced": price is not None,
    }
    return tuple(values[column.name] for column in columns(priced=priced))


def charge(
    line: UsageLine,
    *,
    currency: str,
    price: Price | None = None,
    corrected_in: datetime | None = None,
) -> FocusCharge:
    """The charge for a line of usage that is told apart by `GROUPS`."""
    unit, amount = consumed(line)
    group = line.group
    return FocusCharge(
        start=line.start,
        end=line.end,
        region=group["region"] or "unknown",
        zone=group["zone"],
        project_id=group["project"],
        resource_type=group["type"] or "unknown",
        resource_id=group["resource"] or "unknown",
        variant=group["flavor"] or group["volume_type"],
        measure=line.measure,
        unit=unit,
        quantity=amount,
        currency=currency,
        price=price,
        corrected_in=corrected_in,
        tags={
            name: value
            for name in ("flavor", "volume_type", "state_class")
            if (value := group[name]) is not None
        },
    )


def consumed(line: UsageLine) -> tuple[str, Fraction]:
    """The unit as FOCUS spells it, and the quantity in it: unit-hours of what is held."""
    if line.unit == "Nanosecond":  # the finest unit of time that FOCUS has is the second
        return "Seconds", Fraction(line.amount, _NANOSECONDS)
    if line.is_held:
        return f"{line.unit}-Hours", quantity(line)
    is_plural = line.unit in ("B", "MiB", "GiB")
    return line.unit if is_plural else f"{line.unit}s", quantity(line)


def quantity(line: UsageLine) -> Fraction:
    """How much of its measure a line says, as prices count it: unit-hours of what is held, else units."""
    return Fraction(line.amount, MICROSECONDS_PER_HOUR if line.is_held else 1)


def service_of(resource_type: str) -> tuple[str, str, str]:
    """ServiceName, ServiceCategory and ServiceSubcategory of a type of resources."""
    found = _SERVICES.get(resource_type)
    return found or (f"{resource_type.replace('_', ' ').title()}", *_OTHER)


def billing_period(moment: datetime) -> tuple[datetime, datetime]:
    """The calendar month in UTC that holds `moment`."""
    start = moment.astimezone(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return start, (start + timedelta(days=32)).replace(day=1)


def charge_periods(start: datetime, end: datetime) -> Iterator[tuple[datetime, datetime]]:
    """`[start, end)` cut at every midnight in UTC."""
    while start < end:
        midnight = start.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        after = min(midnight + timedelta(days=1), end)
        yield start, after
        start = after


def _pricing(charge: FocusCharge) -> tuple[str, Decimal]:
    """PricingUnit and PricingQuantity: the book's, where its unit can be spelled ("1000 GiB-Hours" cannot)."""
    price = charge.price
    if price is None:
        return charge.unit, _decimal(charge.quantity)
    if charge.unit == "Seconds":
        return charge.unit, _decimal(price.quantity * price.per / _NANOSECONDS)
    if price.per == 1 or price.per.denominator != 1 or "-" in charge.unit:
        return charge.unit, _decimal(price.quantity * price.per)
    return f"{price.per.numerator} {charge.unit}", _decimal(price.quantity)


def _unit_price(cost: Fraction, quantity: Decimal) -> Decimal:
    return _decimal(cost / Fraction(quantity)) if quantity else ZERO


def _product(price: Decimal, quantity: Decimal) -> Decimal:
    return _decimal(Fraction(price) * Fraction(quantity))


def _decimal(value: Fraction) -> Decimal:
    """To 18 places, half to even."""
    return Decimal(round(value * _SCALE)).scaleb(-_PLACES, _DIGITS)
