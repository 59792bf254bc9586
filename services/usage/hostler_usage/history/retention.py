"""Which months of messages are older than they are kept."""

import re
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Final, NamedTuple

_NAME: Final = re.compile(r"raw_event_(\d{4})_(0[1-9]|1[0-2])", re.ASCII)


class Month(NamedTuple):
    """A month's partition, `[start, end)`."""

    name: str
    start: datetime
    end: datetime


def expired(partitions: Iterable[str], now: datetime, retention_months: int) -> list[Month]:
    """The partitions whose whole month ended `retention_months` or more before `now`, oldest first.

    Names that are no month's, such as the default partition's, are never among them.
    """
    current = now.astimezone(UTC)
    oldest_kept = current.year * 12 + current.month - 1 - retention_months
    found = []
    for name in partitions:
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        number = int(match[1]) * 12 + int(match[2]) - 1
        if int(match[1]) > 0 and number < oldest_kept:
            found.append(Month(name, _first(number), _first(number + 1)))
    return sorted(found)


def _first(number: int) -> datetime:
    return datetime(number // 12, number % 12 + 1, 1, tzinfo=UTC)
