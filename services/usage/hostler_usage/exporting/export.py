"""Tables as text that leaves the service: CSV (RFC 4180) and NDJSON, one row at a time.

What is written can be read back to exactly the same values:

- integers are written whole, whatever their size: sums of unit-microseconds pass 2^63, and a reader
  of NDJSON that makes floating-point numbers of them loses digits beyond 2^53;
- decimals are text with a point in it, never in scientific notation; in NDJSON they are strings,
  since JSON's numbers are read as floating point nearly everywhere;
- moments are RFC 3339 in UTC with a `Z`;
- in CSV nothing (null) is an empty field, and the empty text is a quoted empty field (`""`).

A text cell that a spreadsheet would take for a formula (`=`, `+`, `-`, `@`, tab or line break in
front, in their full width too) gets one apostrophe in front where `guard` is on: names of flavors
and projects come from a cloud's users. It can be undone: `unguarded` takes the apostrophe away
from such cells and from no others. Numbers and times are never touched.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum
from typing import Final, Protocol

Json = Mapping[str, object] | Sequence[object]
Value = str | int | bool | Decimal | datetime | Json | None
Row = Sequence[Value]
"""Values in the order of the table's columns."""


class Kind(StrEnum):
    """What the values of a column are."""

    TEXT = "text"
    INTEGER = "integer"  # of any size
    DECIMAL = "decimal"
    BOOLEAN = "boolean"
    TIME = "time"
    JSON = "json"  # a list or an object; text in it is data, no cell


PLACES: Final = 18


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table. `about` is for whoever reads the table.

    `places` of a decimal are kept by formats whose numbers have a fixed point.
    """

    name: str
    kind: Kind
    about: str = ""
    places: int = PLACES


class Encoder(Protocol):
    """Turns rows into bytes of one format, piece by piece; the pieces together are the file."""

    media_type: str

    def batch(self, rows: Sequence[Row]) -> bytes:
        """The bytes that these rows add to the file; there may be none yet."""

    def end(self) -> bytes:
        """What is left to write when all rows have been given."""


# a cell that begins so is a formula to Excel, LibreOffice or Google Sheets (OWASP, CSV Injection)
_FORMULA: Final = re.compile("'*[=+\\-@\t\r\n＝＋－＠]")  # noqa: RUF001  the full-width ones are meant
_QUOTED: Final = re.compile(r'[",\r\n]|^\s|\s$|^$')


class Csv:
    """The CSV file of a table: a header line, then a line a row, each ended with CR LF."""

    media_type = "text/csv; charset=utf-8; header=present"

    def __init__(self, columns: Sequence[Column], *, guard: bool) -> None:
        self._columns = columns
        self._guard = guard
        self._begun = False

    def batch(self, rows: Sequence[Row]) -> bytes:
        """The lines of these rows; with the header, the first time."""
        return (self._head() + "".join(self._line(row) for row in rows)).encode()

    def end(self) -> bytes:
        """The header, where there was no batch."""
        return self._head().encode()

    def _head(self) -> str:
        if self._begun:
            return ""
        self._begun = True
        return ",".join(_quoted(column.name) for column in self._columns) + "\r\n"

    def _line(self, row: Row) -> str:
        pairs = zip(self._columns, row, strict=True)
        return ",".join(self._cell(column, value) for column, value in pairs) + "\r\n"

    def _cell(self, column: Column, value: Value) -> str:
        if value is None:
            return ""
        said = text(column.kind, value)
        if column.kind is Kind.TEXT:
            return _quoted(guarded(said) if self._guard else said)
        return _quoted(said) if column.kind is Kind.JSON else said


class Ndjson:
    """One JSON object a line, with every column in it."""

    media_type = "application/x-ndjson"

    def __init__(self, columns: Sequence[Column]) -> None:
        self._columns = columns

    def batch(self, rows: Sequence[Row]) -> bytes:
        """The lines of these rows."""
        return "".join(self._line(row) for row in rows).encode()

    def end(self) -> bytes:
        """Nothing."""
        return b""

    def _line(self, row: Row) -> str:
        said = {
            column.name: _plain(column.kind, value)
            for column, value in zip(self._columns, row, strict=True)
        }
        return json.dumps(said, ensure_ascii=False, separators=(",", ":")) + "\n"


def guarded(cell: str) -> str:
    """The text with an apostrophe in front, if a spreadsheet would take it for a formula.

    A text that would look guarded already gets another one, so that `unguarded` gives back any text.
    """
    return f"'{cell}" if _FORMULA.match(cell) else cell


def unguarded(cell: str) -> str:
    """The text that `guarded` was given."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def text(kind: Kind, value: str | int | Decimal | datetime | Json) -> str:
    """A value as the text that stands for it in CSV."""
    match kind:
        case Kind.BOOLEAN:
            return "true" if value else "false"
        case Kind.DECIMAL:
            assert isinstance(value, Decimal)
            return decimal_text(value)
        case Kind.TIME:
            assert isinstance(value, datetime)
            return time_text(value)
        case Kind.JSON:
            return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        case _:
            return str(value)


def decimal_text(value: Decimal) -> str:
    """All digits of the value, with a point, and no zeros behind the last; zero has no sign."""
    whole, _, places = format(value or abs(value), "f").partition(".")
    return f"{whole}.{places.rstrip('0') or '0'}"


def time_text(moment: datetime) -> str:
    """RFC 3339 in UTC, with microseconds where there are any."""
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat() + "Z"


def _plain(kind: Kind, value: Value) -> object:
    """The value as JSON has it."""
    if value is None or kind in (Kind.INTEGER, Kind.BOOLEAN, Kind.JSON):
        return value
    return text(kind, value)


def _quoted(said: str) -> str:
    """RFC 4180, section 2: quotes around what holds a comma, a quote or a line break."""
    if not _QUOTED.search(said):
        return said
    return '"' + said.replace('"', '""') + '"'


# --- the two tables of the ledger itself


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageLine:
    """How much of one measure one group used in `[start, end)`.

    `amount` is exact: unit-microseconds of what is held over time, else what moved, in its units.
    `group` names what usage was grouped by, in the order asked.
    """

    start: datetime
    end: datetime
    group: Mapping[str, str | None]
    resources: int | None
    measure: str
    unit: str
    is_held: bool
    amount: int
    hours: Decimal | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CitedMessage:
    """A message that an interval rests on; `event_id` is its name at /v1/events."""

    message_id: str
    event_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class IntervalLine:
    """One interval of one resource, whole: it is not cut at the window's ends."""

    region: str
    resource_type: str
    resource_id: str
    project_id: str | None
    user_id: str | None
    state_class: str
    start: datetime
    end: datetime | None
    attributes: Mapping[str, object]
    opened_by: Sequence[CitedMessage]
    closed_by: Sequence[CitedMessage]
    provenance: str


def usage_columns(groups: Iterable[str]) -> tuple[Column, ...]:
    """The columns of usage: the window, what it is grouped by, and the amount."""
    return (
        Column("start", Kind.TIME, "inclusive"),
        Column("end", Kind.TIME, "exclusive"),
        *(Column(name, Kind.TEXT) for name in groups),
        Column(
            "resources",
            Kind.INTEGER,
            "how many the group has; nothing where sums of days answered",
        ),
        Column("measure", Kind.TEXT),
        Column("unit", Kind.TEXT, "of what is held or moved"),
        Column("unit_microseconds", Kind.INTEGER, "of what is held: exact"),
        Column("hours", Kind.DECIMAL, "unit-hours, rounded to a millionth: do not sum them", 6),
        Column("amount", Kind.INTEGER, "of what moved: exact"),
    )


def usage_row(line: UsageLine) -> Row:
    """The row of `usage_columns` that says `line`."""
    return (
        line.start,
        line.end,
        *line.group.values(),
        line.resources,
        line.measure,
        line.unit,
        line.amount if line.is_held else None,
        line.hours,
        None if line.is_held else line.amount,
    )


INTERVAL_COLUMNS: Final = (
    Column("region", Kind.TEXT),
    Column("resource_type", Kind.TEXT),
    Column("resource_id", Kind.TEXT),
    Column("project_id", Kind.TEXT),
    Column("user_id", Kind.TEXT),
    Column("state_class", Kind.TEXT),
    Column("start", Kind.TIME, "inclusive"),
    Column("end", Kind.TIME, "exclusive; nothing while it lasts"),
    Column("attributes", Kind.JSON),
    Column("opened_by", Kind.JSON, "the messages it rests on: message_id, event_id"),
    Column("closed_by", Kind.JSON, "the messages that ended it"),
    Column("provenance", Kind.TEXT),
)


def interval_row(line: IntervalLine) -> Row:
    """The row of `INTERVAL_COLUMNS` that says `line`."""
    return (
        line.region,
        line.resource_type,
        line.resource_id,
        line.project_id,
        line.user_id,
        line.state_class,
        line.start,
        line.end,
        line.attributes,
        _cited(line.opened_by),
        _cited(line.closed_by),
        line.provenance,
    )


def _cited(messages: Sequence[CitedMessage]) -> Json:
    return [{"message_id": item.message_id, "event_id": item.event_id} for item in messages]


# --- units


_UNITS: Final = {
    "_mb": "MiB",
    "_gb": "GiB",
    "_bytes": "B",
    "_operations": "Operation",
    "_ns": "ns",
}
_NAMED: Final = {
    "vcpus": "vCPU",
    "provisioned_iops": "IOPS",
    "leased": "Node",
    "cpu_time_ns": "Nanosecond",
}


def unit(resource_type: str, quantity: str | None) -> str:
    """What a measure counts, in the singular: the unit of an attribute or counter, or the resource.

    OpenStack's megabytes and gigabytes of memory, disks and volumes are powers of two.
    """
    if quantity is None:
        return _words(resource_type)
    if quantity in _NAMED:
        return _NAMED[quantity]
    for ending, name in _UNITS.items():
        if quantity.endswith(ending):
            return name
    return _words(quantity.removesuffix("s"))


def _words(name: str) -> str:
    words = (word.upper() if word in ("ip", "gpu", "iops") else word for word in name.split("_"))
    said = " ".join(words)
    return said[:1].upper() + said[1:]
