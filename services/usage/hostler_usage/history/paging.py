"""What lists that SQL reads have in common: who may see what, conditions, and where a page goes on."""

import base64
import json
from collections.abc import Sequence
from datetime import datetime
from typing import Final

from hostler_common import errors
from hostler_usage.reading.times import EPOCH, MICROSECOND

_MAX_INTEGER: Final = 2**31 - 1

Scope = frozenset[str] | None
"""The projects that a caller may see; None is all of them."""


class BadMarker(errors.Invalid):
    """The marker is none that a page of this list ended with."""

    code = "usage.marker.invalid"


class Conditions:
    """A WHERE clause of those conditions whose value is given, with the values in their places.

    Conditions that do not restrict are left out, so that the planner sees the plain statement.
    """

    def __init__(self, *values: object) -> None:
        self.values: list[object] = list(values)
        self._texts: list[str] = []

    def value(self, value: object) -> str:
        """A place in the statement for one more value."""
        self.values.append(value)
        return f"${len(self.values)}"

    def add(self, text: str, *values: object) -> None:
        """`text` holds with `values` in place of its braces; nothing, where a value is None."""
        if None not in values:
            first = len(self.values) + 1
            self.values += values
            self._texts.append(text.format(*(f"${first + n}" for n in range(len(values)))))

    @property
    def clause(self) -> str:
        """The clause; empty where nothing restricts."""
        return f"WHERE {' AND '.join(self._texts)}" if self._texts else ""

    @property
    def also(self) -> str:
        """The conditions behind others; empty where nothing restricts."""
        return "".join(f" AND {text}" for text in self._texts)


def visible_projects(scope: Scope, project_id: str | None = None) -> list[str] | None:
    """The projects a statement may look at: those asked for among those allowed.

    Never one without a name: so sums call what is of no known project, which is nobody's own.
    """
    if project_id is None:
        return None if scope is None else sorted(name for name in scope if name)
    return [project_id] if project_id and (scope is None or project_id in scope) else []


def marker_after(parts: Sequence[str]) -> str:
    """Where the page that ends with a row of these parts is gone on from."""
    return base64.urlsafe_b64encode(json.dumps(parts).encode()).decode().rstrip("=")


def marked_parts(marker: str | None, parts: int) -> list[str]:
    """The parts a marker was made of; none for the first page."""
    if marker is None:
        return []
    try:
        found = json.loads(base64.urlsafe_b64decode(marker + "=" * (-len(marker) % 4)))
    except (ValueError, RecursionError) as exc:
        raise BadMarker("the marker is not one of this list's") from exc
    if (
        not isinstance(found, list)
        or not found  # usage that is not grouped has one row, and no page after it
        or len(found) != parts
        or not all(isinstance(part, str) and "\0" not in part for part in found)
    ):
        raise BadMarker("the marker is not one of this list's")
    return found


def marked_moment(text: str) -> datetime:
    """A part of a marker as the moment it spells.

    Raises:
        BadMarker: it spells none.
    """
    try:
        return EPOCH + int(text) * MICROSECOND
    except (ValueError, OverflowError) as exc:
        raise BadMarker("the marker is not one of this list's") from exc


def marked_integer(text: str) -> int:
    """A part of a marker as the number it spells.

    Raises:
        BadMarker: it spells none.
    """
    try:
        value = int(text)
    except ValueError as exc:
        raise BadMarker("the marker is not one of this list's") from exc
    if not 0 <= value <= _MAX_INTEGER:
        raise BadMarker("the marker is not one of this list's")
    return value
