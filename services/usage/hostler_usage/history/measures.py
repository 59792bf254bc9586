"""Usage as exact integers: what was held times the microseconds it was held, and what moved.

An instance of 2 vCPUs that ran 90 minutes used 2 x 5,400,000,000 vCPU-microseconds. Sums of such
integers are exact and additive over windows and groups; hours are a way of showing them, made at
the edge and never summed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Context, Decimal
from typing import Final

from hostler_usage.history.amounts import Amount
from hostler_usage.history.intervals import Interval
from hostler_usage.reading.mapping import Measure
from hostler_usage.reading.times import microseconds

MICROSECONDS_PER_HOUR: Final = 3_600_000_000
_SHOWN: Final = Decimal("0.000001")
# whatever senders claim: the sums of a numeric column have no bound that the default's 28 digits meet
_DIGITS: Final = Context(prec=100)


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """`[start, end)`; time after `as_of` has not happened yet and counts nothing."""

    start: datetime
    end: datetime
    as_of: datetime

    @property
    def upper(self) -> datetime:
        """Where counting ends."""
        return min(self.end, self.as_of)

    def overlap(self, interval: Interval) -> int:
        """Microseconds of `interval` inside this window."""
        upper = self.upper if interval.end is None else min(self.upper, interval.end)
        return max(0, microseconds(upper - max(self.start, interval.start)))

    def holds(self, moment: datetime) -> bool:
        """Whether what moved at `moment` counts."""
        return self.start <= moment < self.upper


def totals(
    measures: Iterable[Measure],
    intervals: Iterable[Interval],
    window: Window,
    moved: Iterable[Amount] = (),
) -> dict[str, int]:
    """What every measure of one resource type amounts to in `window`: unit-microseconds, or units."""
    by_name = {item.name: item for item in measures}
    found = dict.fromkeys(by_name, 0)
    for interval in intervals:
        span = window.overlap(interval)
        for name, measure in by_name.items():
            if measure.is_held:
                found[name] += span * quantity(measure, interval.attributes)
    for amount in moved:
        for name, measure in by_name.items():
            if measure.counter == amount.counter and window.holds(amount.at):
                found[name] += amount.amount
    return found


def quantity(measure: Measure, attributes: Mapping[str, object]) -> int:
    """How much of a held `measure` these attributes are; what is not known counts nothing."""
    if measure.attribute is None:
        return 1
    value = attributes.get(measure.attribute)
    return value if isinstance(value, int) else 0


def hours(unit_microseconds: int) -> Decimal:
    """The amount in unit-hours, for eyes: rounded half even to a millionth."""
    exact = _DIGITS.divide(Decimal(unit_microseconds), Decimal(MICROSECONDS_PER_HOUR))
    return exact.quantize(_SHOWN, context=_DIGITS)


def shown_hours(unit_microseconds: Mapping[str, int]) -> dict[str, float]:
    """For each measure the number that is nearest to its `hours`, reckoned in whole numbers: it is asked for often."""
    # a millionth of an hour is 3,600 microseconds; what lies between two even halves goes to the even one
    return {
        name: ((amount + 1800) // 3600 - (amount % 7200 == 1800)) / 1_000_000
        for name, amount in unit_microseconds.items()
    }
