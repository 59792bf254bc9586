"""Usage as exact integers: a quantity times the microseconds it was held.

An instance of 2 vCPUs that ran 90 minutes used 2 x 5,400,000,000 vCPU-microseconds. Sums of such
integers are exact and additive over windows and groups; hours are a way of showing them, made at
the edge and never summed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from decimal import Context, Decimal
from typing import Final

from hostler_usage.intervals import Interval
from hostler_usage.observation import INSTANCE, VOLUME, ResourceType
from hostler_usage.times import microseconds

MICROSECONDS_PER_HOUR: Final = 3_600_000_000
_SHOWN: Final = Decimal("0.000001")
# whatever senders claim: the sums of a numeric column have no bound that the default's 28 digits meet
_DIGITS: Final = Context(prec=100)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """`attribute` of resources of one type, integrated over time; None counts the resource."""

    name: str
    resource_type: ResourceType
    attribute: str | None


MEASURES: Final = (
    Measure(name="instance_hours", resource_type=INSTANCE, attribute=None),
    Measure(name="vcpu_hours", resource_type=INSTANCE, attribute="vcpus"),
    Measure(name="ram_mb_hours", resource_type=INSTANCE, attribute="memory_mb"),
    Measure(name="local_gb_hours", resource_type=INSTANCE, attribute="disk_gb"),
    Measure(name="volume_hours", resource_type=VOLUME, attribute=None),
    Measure(name="volume_gb_hours", resource_type=VOLUME, attribute="size_gb"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """`[start, end)`; time after `as_of` has not happened yet and counts nothing."""

    start: datetime
    end: datetime
    as_of: datetime

    def overlap(self, interval: Interval) -> int:
        """Microseconds of `interval` inside this window."""
        upper = min(self.end, self.as_of)
        if interval.end is not None:
            upper = min(upper, interval.end)
        return max(0, microseconds(upper - max(self.start, interval.start)))


def totals(
    resource_type: ResourceType, intervals: Iterable[Interval], window: Window
) -> dict[str, int]:
    """Unit-microseconds of every measure of `resource_type` in `window`."""
    measures = [item for item in MEASURES if item.resource_type == resource_type]
    amounts = dict.fromkeys((item.name for item in measures), 0)
    for interval in intervals:
        span = window.overlap(interval)
        for measure in measures:
            amounts[measure.name] += span * quantity(measure, interval)
    return amounts


def quantity(measure: Measure, interval: Interval) -> int:
    """How much of `measure` was held during `interval`; what is not known counts nothing."""
    if measure.attribute is None:
        return 1
    value = interval.attributes.get(measure.attribute)
    return value if isinstance(value, int) else 0


def hours(unit_microseconds: int) -> Decimal:
    """The amount in unit-hours, for eyes: rounded half even to a millionth."""
    exact = _DIGITS.divide(Decimal(unit_microseconds), Decimal(MICROSECONDS_PER_HOUR))
    return exact.quantize(_SHOWN, context=_DIGITS)
