"""Reading fields of payloads that nobody promised anything about.

A getter returns a clean value or None and never raises: a notification whose one field is broken
still says something about its resource. What was there but could not be read is noted, so that it
can be counted and looked at.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from hostler_usage.times import BadTimeError, is_plausible, parse_time

MAX_TEXT = 255
MAX_WHOLE = 2**53  # far above any quantity a cloud meters, far below what bigint holds


def clean(text: str) -> str:
    """`text` as PostgreSQL and UTF-8 can hold it: no NUL, no lone surrogates."""
    if "\x00" in text:
        text = text.replace("\x00", "\ufffd")
    if not text.isascii():
        text = text.encode("utf-8", "replace").decode("utf-8")
    return text


@dataclass(frozen=True, slots=True)
class Fields:
    """One JSON object and the problems met while reading it."""

    values: Mapping[str, object]
    problems: list[str] = field(default_factory=list)

    def text(self, *names: str) -> str | None:
        """The first of `names` that holds text that is not empty; numbers count as text."""
        for name in names:
            value = self.values.get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                value = str(value)
            if value is None or value in ("", "None"):
                continue
            if isinstance(value, str) and len(value) <= MAX_TEXT:
                return clean(value)
            self.problems.append(f"bad_text:{name}")
        return None

    def whole(self, *names: str) -> int | None:
        """The first of `names` that holds a whole number, not negative."""
        for name in names:
            value = self.values.get(name)
            if value is None or value == "":
                continue
            number = _whole(value)
            if number is not None and 0 <= number < MAX_WHOLE:
                return number
            self.problems.append(f"bad_number:{name}")
        return None

    def moment(self, *names: str) -> datetime | None:
        """The first of `names` that holds a moment a cloud can have had."""
        for name in names:
            try:
                moment = parse_time(self.values.get(name))
            except BadTimeError:
                self.problems.append(f"bad_time:{name}")
                continue
            if moment is None:
                continue
            if is_plausible(moment):
                return moment
            self.problems.append(f"absurd_time:{name}")
        return None

    def inner(self, *names: str) -> "Fields":
        """The object under `names`, one inside the other; empty where there is none."""
        value: object = self.values
        for name in names:
            value = value.get(name) if isinstance(value, Mapping) else None
        return Fields(value if isinstance(value, Mapping) else {}, self.problems)

    def rows(self, name: str) -> tuple["Fields", ...]:
        """The objects in the list under `name`; none where it is not a list."""
        value = self.values.get(name)
        if not isinstance(value, Sequence) or isinstance(value, str):
            return ()
        return tuple(Fields(row, self.problems) for row in value if isinstance(row, Mapping))


def _whole(value: object) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 18:
        return int(value)
    return None
