"""What any way of reading the ledger says of a group."""

from collections.abc import Mapping as Table
from dataclasses import dataclass
from typing import NamedTuple


class UsageRow(NamedTuple):
    """The usage of one group, and how many resources had part in it.

    `amounts` are unit-microseconds of measures that are held, units of those that move; a measure
    that nothing was used of is left out. `resources` is None where sums of whole days answered.
    """

    group: dict[str, str | None]
    amounts: dict[str, int]
    resources: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceRow:
    """The usage of one group in one slice of a window, counted from zero; amounts as in `UsageRow`.

    A group may have a row for each type of its resources and for each counter that moved, and one from
    the sums of days beside those from the facts: they add up.
    """

    slice: int
    group: Table[str, str | None]
    amounts: Table[str, int]
