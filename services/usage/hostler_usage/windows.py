"""The window that a request asks for."""

from datetime import UTC, datetime

from hostler_common import errors
from hostler_usage.history.measures import Window


class WindowInvalid(errors.Invalid):
    """The window ends before it begins, or lies outside the calendar."""

    code = "usage.window.invalid"


def window(start: datetime, end: datetime) -> Window:
    """`[start, end)` in UTC, of which only what has passed by now is counted.

    Raises:
        WindowInvalid: it is empty, or outside the calendar in UTC.
    """
    if end <= start:
        raise WindowInvalid("end must be later than start")
    try:
        start, end = start.astimezone(UTC), end.astimezone(UTC)
    except OverflowError as exc:
        raise WindowInvalid("start or end lies outside the calendar in UTC") from exc
    return Window(start=start, end=end, as_of=datetime.now(UTC))
