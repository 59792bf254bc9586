"""Every spelling of a moment that OpenStack's notifications use, read into aware UTC datetimes.

One body may hold three of them: `str(datetime)` with and without an offset, ISO 8601 with `T` and
`Z`, `strtime` without a zone, epoch seconds; and "nothing" is spelled null, "" or "None". Naive
times are UTC, as everywhere in OpenStack. A broken time is an error for the caller to count, never
a guess: a wrong moment would be billed.
"""

import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta, timezone
from functools import lru_cache

PLAUSIBLE_FROM = datetime(2000, 1, 1, tzinfo=UTC)
PLAUSIBLE_UNTIL = datetime(2100, 1, 1, tzinfo=UTC)
SAME_MOMENT = timedelta(seconds=1)
"""Some senders cut a moment to its second and some round it, and clocks of two hosts differ by less."""
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)

_SPELLING = re.compile(
    r"(\d{4})-(\d{2})-(\d{2})[T ](\d{2}):(\d{2}):(\d{2})(?:[.,](\d{1,12}))?"
    r"\s?(Z|UTC|[+-]\d{2}:?\d{2})?",
    re.ASCII,
)
# asyncpg takes these two for the infinities, which come back without a zone
_ENDS_OF_TIME = (datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC))
_NOTHING = frozenset({"", "None"})


def _is_whole_seconds(text: str) -> bool:
    return (
        text[10] in "T "
        and text[4] == text[7] == "-"
        and text[13] == text[16] == ":"
        and text[17:19].isdigit()
    )


_Spelling = Callable[[str], bool]

# by length: `2026-05-08 16:03:44`, with a Z, with microseconds, with both
_QUICK: dict[int, _Spelling] = {
    19: _is_whole_seconds,
    20: lambda text: text[19] == "Z" and _is_whole_seconds(text),
    26: lambda text: text[19] == "." and text[20:].isdigit() and _is_whole_seconds(text),
    27: lambda text: (
        text[26] == "Z" and text[19] == "." and text[20:26].isdigit() and _is_whole_seconds(text)
    ),
}


class BadTimeError(ValueError):
    """A value that should be a moment and is in no known spelling."""


def parse_time(value: object) -> datetime | None:
    """Return the moment `value` spells, in UTC, or None where it spells "no moment".

    Fractions finer than a microsecond are cut. kombu's tagged form of a datetime
    (`{"__type__": "datetime", "__value__": ...}`, kombu/utils/json.py) is accepted as well.

    Raises:
        BadTimeError: `value` is neither a moment nor nothing.
    """
    if type(value) is not str and isinstance(value, Mapping):
        value = value.get("__value__", False)
    try:
        if value is None or isinstance(value, str):
            return None if value is None else _distinct(_parse_text(value.strip()))
        if isinstance(value, int | float) and not isinstance(value, bool):
            return _distinct(EPOCH + timedelta(seconds=value))
    except (ValueError, OverflowError) as exc:
        raise BadTimeError(f"not a time: {str(value)[:60]!r}") from exc
    raise BadTimeError(f"not a time: {type(value).__name__}")


@lru_cache(maxsize=20_000)  # audits repeat their periods and launches for thousands of messages
def _parse_text(text: str) -> datetime | None:
    if text in _NOTHING:
        return None
    quick = _QUICK.get(len(text))
    if quick is not None and text.isascii() and quick(text):
        # the spellings that nearly every message has, read in C
        return datetime.fromisoformat(text[:26].rstrip("Z")).replace(tzinfo=UTC)
    match = _SPELLING.fullmatch(text)
    if match is None:
        raise ValueError("no known spelling")
    year, month, day, hour, minute, second, fraction, zone = match.groups()
    moment = datetime(
        int(year),
        int(month),
        int(day),
        int(hour),
        int(minute),
        int(second),
        int((fraction or "0")[:6].ljust(6, "0")),
        tzinfo=_zone(zone),
    )
    return moment.astimezone(UTC)


def _distinct(moment: datetime | None) -> datetime | None:
    if moment in _ENDS_OF_TIME:
        raise ValueError("the end of the calendar")
    return moment


def _zone(spelling: str | None) -> timezone:
    if spelling is None or spelling in ("Z", "UTC"):
        return UTC
    offset = timedelta(hours=int(spelling[1:3]), minutes=int(spelling[-2:]))
    return timezone(-offset if spelling[0] == "-" else offset)


def is_plausible(moment: datetime) -> bool:
    """Whether a cloud can have emitted something at `moment`; others are kept, not folded."""
    return PLAUSIBLE_FROM <= moment < PLAUSIBLE_UNTIL


def microseconds(span: timedelta) -> int:
    """The exact length of `span`."""
    return span // MICROSECOND


def epoch_microseconds(moment: datetime) -> int:
    """Microseconds from the epoch to `moment`, exact."""
    return microseconds(moment - EPOCH)
