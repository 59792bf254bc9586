"""Reading a document that people write - a price book, a budget - wholly, with every fault named by its path.

A reader goes on after a fault and gives a value of the right type in its place, so that one answer
lists everything that is wrong; nothing made from a document with faults is ever used, because
`Fields.finish` raises. Numbers are exact: decimals or text, never floats.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, tzinfo
from decimal import Decimal
from enum import StrEnum
from fractions import Fraction
from typing import Final, TypeVar

EnumT = TypeVar("EnumT", bound=StrEnum)

# a bound on both sides: 1e999999999 is a short text and an endless number
_NUMBER: Final = re.compile(r"\d{1,15}(\.\d{1,15})?", re.ASCII)
_DAY: Final = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)
_YEARS: Final = range(2000, 2100)
_TEXT_LENGTH: Final = 255


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a document, and where: `prices[2].tiers.steps[0].price`."""

    path: str
    problem: str


class DocumentError(ValueError):
    """The document cannot be meant; `faults` says all that is wrong with it."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("; ".join(f"{fault.path}: {fault.problem}" for fault in faults))
        self.faults = tuple(faults)


class Fields:
    """The members of a mapping in a document, each read once; those nobody reads are faults."""

    def __init__(self, value: object, path: str = "", faults: list[Fault] | None = None) -> None:
        self.path = path
        self._faults: list[Fault] = [] if faults is None else faults
        self._read: set[str] = set()
        self._values: Mapping[str, object] = {}
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            self._values = value
            self._is_mapping = True
        else:
            self._is_mapping = False
            self.fault("", "must be a mapping of names to values")

    def fault(self, name: str, problem: str) -> None:
        """Something is wrong with the member `name`; with the whole, where it is empty."""
        self._faults.append(Fault(self._at(name) or "document", problem))

    def _at(self, name: str) -> str:
        return name if not self.path else f"{self.path}.{name}" if name else self.path

    def close(self) -> None:
        """Members that nobody has read are faults."""
        for name in self._values:
            if name not in self._read:
                self.fault(name, "is not known here")

    def finish(self) -> None:
        """The document is without fault.

        Raises:
            DocumentError: it is not.
        """
        self.close()
        if self._faults:
            raise DocumentError(self._faults)

    def has(self, name: str) -> bool:
        """Whether the member is there and says something."""
        self._read.add(name)
        return self._values.get(name) is not None

    def is_mapping(self, name: str) -> bool:
        """Whether the member is a mapping."""
        return isinstance(self._values.get(name), Mapping)

    def _take(self, name: str) -> object:
        self._read.add(name)
        return self._values.get(name)

    def _required(self, name: str) -> None:
        if self._is_mapping:
            self.fault(name, "is missing")

    def text(self, name: str, *, pattern: str | None = None, default: str | None = None) -> str:
        """A text that is not empty; `default` where it is absent, if there is one."""
        value = self._take(name)
        if value is None:
            if default is None:
                self._required(name)
            return default or ""
        problem = _text_problem(value, pattern)
        if problem:
            self.fault(name, problem)
            return default or ""
        return str(value)

    def texts(self, name: str, *, pattern: str | None = None) -> tuple[str, ...]:
        """A list of texts, each once; one alone may stand for a list. Nothing where it is absent."""
        found = []
        for place, value in self._listed(name):
            problem = _text_problem(value, pattern)
            if problem:
                self.fault(place, problem)
            elif value in found:
                self.fault(place, "is there twice")
            else:
                found.append(str(value))
        return tuple(found)

    def choice(self, name: str, kind: type[EnumT], *, default: EnumT) -> EnumT:
        """One of the words of `kind`."""
        value = self._take(name)
        if value is None:
            return default
        if not isinstance(value, str) or value not in list(kind):
            self.fault(name, f"must be one of {', '.join(kind)}")
            return default
        return kind(value)

    def truth(self, name: str, *, default: bool) -> bool:
        """True or false."""
        value = self._take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.fault(name, "must be true or false")
            return default
        return value

    def number(self, name: str, *, default: Fraction | None = None) -> Fraction:
        """An exact number, zero or more."""
        value = self._take(name)
        if value is None:
            if default is None:
                self._required(name)
            return default or Fraction(0)
        number = exact(value)
        if number is None:
            self.fault(name, NUMBER_IS)
            return default or Fraction(0)
        return number

    def whole(self, name: str, *, least: int, most: int, default: int) -> int:
        """An integer between two others."""
        value = self._take(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self.fault(name, f"must be a whole number from {least} to {most}")
            return default
        return value

    def wholes(self, name: str, *, least: int, most: int) -> tuple[int, ...]:
        """A list of integers between two others; nothing where it is absent."""
        found = []
        for place, value in self._listed(name):
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                self.fault(place, f"must be a whole number from {least} to {most}")
            else:
                found.append(value)
        return tuple(found)

    def moment(self, name: str, place: tzinfo) -> datetime | None:
        """A moment in UTC: RFC 3339 with its offset, or a day, which is its midnight in `place`."""
        value = self._take(name)
        if value is None:
            return None
        found = _moment(value, place)
        if found is None:
            self.fault(
                name, "must be a day (2026-01-31) or a time with its offset, of 2000 to 2099"
            )
        return found

    def moments(self, place: tzinfo) -> tuple[datetime | None, datetime | None]:
        """`from` and `until`: when the thing is valid; None on a side that has no end."""
        valid_from, valid_until = self.moment("from", place), self.moment("until", place)
        if valid_from is not None and valid_until is not None and valid_until <= valid_from:
            self.fault("until", "must be later than from")
        return valid_from, valid_until

    def mapping(self, name: str) -> "Fields":
        """The members of a mapping; of an empty one, where it is absent."""
        value = self._take(name)
        return Fields({} if value is None else value, self._at(name), self._faults)

    def mappings(self, name: str) -> Iterator["Fields"]:
        """The mappings of a list."""
        value = self._take(name)
        if value is None:
            return
        if not isinstance(value, list):
            self.fault(name, "must be a list")
            return
        for position, item in enumerate(value):
            yield Fields(item, self._at(f"{name}[{position}]"), self._faults)

    def each(self, read: Callable[["Fields", str], None]) -> None:
        """Call `read` for every member, by name."""
        for name in self._values:
            read(self, name)

    def _listed(self, name: str) -> Iterator[tuple[str, object]]:
        value = self._take(name)
        if value is None:
            return
        if not isinstance(value, list):
            yield name, value
            return
        for position, item in enumerate(value):
            yield f"{name}[{position}]", item


NUMBER_IS: Final = (
    "must be a number, zero or more, with at most 15 digits on either side of the point"
)


def exact(value: object) -> Fraction | None:
    """The number that a document's value is; None where it is none. A float is none: it is not exact."""
    if isinstance(value, Decimal):
        value = format(value, "f") if value.is_finite() and -30 < value.adjusted() < 30 else ""
    if isinstance(value, int):  # not true and false: their texts are no numbers
        value = str(value) if 0 <= value < 10**15 else ""
    if not isinstance(value, str) or not _NUMBER.fullmatch(value):
        return None
    return Fraction(value)


def _moment(value: object, place: tzinfo) -> datetime | None:
    if isinstance(value, date) and not isinstance(value, datetime):
        value = value.isoformat()
    if not isinstance(value, str):
        return None
    try:
        found = datetime.fromisoformat(value)
    except ValueError:
        return None
    if _DAY.fullmatch(value):
        found = found.replace(tzinfo=place)
    if found.tzinfo is None or found.year not in _YEARS:
        return None
    return found.astimezone(UTC)


def _text_problem(value: object, pattern: str | None) -> str | None:
    if not isinstance(value, str):
        return "must be a text: put it in quotes"
    if not 0 < len(value) <= _TEXT_LENGTH or not value.isprintable():
        return f"must have 1 to {_TEXT_LENGTH} characters, all printable"
    if pattern is not None and not re.fullmatch(pattern, value, re.ASCII):
        return f"must look like {pattern}"
    return None
