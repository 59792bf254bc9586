"""What any way of reading the ledger says of a group."""

from typing import NamedTuple


class UsageRow(NamedTuple):
    """The usage of one group, and how many resources had part in it.

    `amounts` are unit-microseconds of measures that are held, units of those that move; a measure
    that nothing was used of is left out. `resources` is None where sums of whole days answered.
    """

    group: dict[str, str | None]
    amounts: dict[str, int]
    resources: int | None
