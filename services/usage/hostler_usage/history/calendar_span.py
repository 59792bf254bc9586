"""Days, weeks and months as a time zone's calendar has them, in UTC.

Tiers, budgets and reports count by calendar periods of a place, not by lengths: a day there may
have 23 or 25 hours, and a month ends at its own midnight.
"""

from datetime import UTC, date, datetime, timedelta, tzinfo
from enum import StrEnum
from zoneinfo import ZoneInfo


class Span(StrEnum):
    """A calendar period; a week begins on Monday (ISO 8601)."""

    DAY = "day"
    WEEK = "week"
    MONTH = "month"


class ZoneUnknownError(ValueError):
    """The name is none of the time zone database's."""


def zone(name: str) -> ZoneInfo:
    """The time zone of that IANA name.

    Raises:
        ZoneUnknownError: there is none.
    """
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError) as exc:  # OSError: the name is a directory's ("Europe")
        raise ZoneUnknownError(f"there is no time zone {name[:60]!r}") from exc


def begin(moment: datetime, span: Span, place: tzinfo) -> datetime:
    """The first moment of the period that holds `moment`, in UTC."""
    return _midnight(_first_day(moment.astimezone(place).date(), span), place)


def following(moment: datetime, span: Span, place: tzinfo) -> datetime:
    """The first moment of the period after the one that holds `moment`, in UTC."""
    first = _first_day(moment.astimezone(place).date(), span)
    match span:
        case Span.DAY:
            after = first + timedelta(days=1)
        case Span.WEEK:
            after = first + timedelta(days=7)
        case Span.MONTH:
            after = (first + timedelta(days=31)).replace(day=1)
    return _midnight(after, place)


def begins_within(start: datetime, end: datetime, span: Span, place: tzinfo) -> list[datetime]:
    """The first moments of the periods that begin after `start` and before `end`, in order."""
    found = []
    moment = following(start, span, place)
    while moment < end:
        found.append(moment)
        moment = following(moment, span, place)
    return found


def _first_day(day: date, span: Span) -> date:
    match span:
        case Span.DAY:
            return day
        case Span.WEEK:
            return day - timedelta(days=day.weekday())
        case Span.MONTH:
            return day.replace(day=1)


def _midnight(day: date, place: tzinfo) -> datetime:
    # a midnight that the clocks leap over is the moment they leap; of two midnights it is the first
    return datetime(day.year, day.month, day.day, tzinfo=place).astimezone(UTC)
