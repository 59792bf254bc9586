"""What is asked when a number is to be explained: by which parameters, for the API and the page alike."""

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Final

from hostler_common import errors
from hostler_usage.history.measures import Window
from hostler_usage.windows import WindowInvalid, window

_MOST: Final = 255
# filters are named as those of /v1/usage, group values as its groups: both are understood
_GROUP_OF: Final = {
    "project_id": "project",
    "user_id": "user",
    "resource_id": "resource",
    "resource_type": "type",
}
_NOT_GROUPS: Final = frozenset(
    {"start", "end", "as_of", "measure", "time_zone", "limit", "marker"}
)


class GroupInvalid(errors.Invalid):
    """A group value is given twice, differently, or is too long, or none that a text can be."""

    code = "usage.group.invalid"


def asked_window(start: datetime, end: datetime, as_of: datetime | None) -> Window:
    """`[start, end)` as it was at `as_of`, or as it is now.

    Raises:
        WindowInvalid: it is empty, or outside the calendar in UTC.
    """
    asked = window(start, end)
    if as_of is None:
        return asked
    try:
        return replace(asked, as_of=min(as_of.astimezone(UTC), asked.as_of))
    except OverflowError as exc:
        raise WindowInvalid("as_of lies outside the calendar in UTC") from exc


def asked_groups(parameters: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Every parameter that is a group's value, by the group's name.

    Raises:
        GroupInvalid: one cannot be meant.
    """
    found: dict[str, str] = {}
    for name, value in parameters:
        if name in _NOT_GROUPS:
            continue
        group = _GROUP_OF.get(name, name)
        if found.get(group, value) != value:
            raise GroupInvalid(f"{group[:60]} is given twice")
        if len(value) > _MOST or "\0" in value:
            raise GroupInvalid(f"{group[:60]} has {_MOST} characters at most, none of them NUL")
        found[group] = value
    return found
