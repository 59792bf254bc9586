"""From a payload that nobody promised anything about to the rows a mapping's body describes.

A reader never raises: a notification whose one field is broken still says something about its
resource. What was there but could not be read is noted, so that it can be counted and looked at.
Paths are made into functions once, when the service starts: this runs for every message.
"""

from collections.abc import Callable, Sequence
from collections.abc import Mapping as Table
from datetime import datetime
from enum import Enum
from typing import Final, NamedTuple, TypeGuard

from hostler_usage.reading import mapping
from hostler_usage.reading.mapping import Kind
from hostler_usage.reading.statement import Attributes, CounterReading, Scalar
from hostler_usage.reading.times import BadTimeError, is_plausible, parse_time

MAX_TEXT: Final = 255
MAX_WHOLE: Final = 2**53  # far above any quantity a cloud meters, far below what bigint holds
MAX_ROWS: Final = 1000  # resources or labels in one body

Problems = list[str]


class _Missing(Enum):
    """The body says nothing of it."""

    MISSING = "missing"


_MISSING: Final = _Missing.MISSING
_Object = Table[str, object]
_Get = Callable[[_Object, _Object], object]  # (row, root) -> what is there
_NOTHING: Final = frozenset({"", "None"})


def clean(text: str) -> str:
    """`text` as PostgreSQL and UTF-8 can hold it: no NUL, no lone surrogates."""
    if "\x00" in text:
        text = text.replace("\x00", "\ufffd")
    if not text.isascii():
        text = text.encode("utf-8", "replace").decode("utf-8")
    return text


class Row(NamedTuple):
    """What one body says of one resource, read but not yet understood."""

    resource_id: str | None
    at: datetime | None
    born_at: datetime | None
    ended_at: datetime | None
    period: tuple[datetime, datetime] | None
    task: str | None
    failed: bool
    reason: str | None
    attributes: Attributes
    readings: tuple[CounterReading, ...]


class Reader:
    """One body of a mapping, ready to read payloads."""

    def __init__(self, resource: mapping.Resource, body: mapping.Body) -> None:
        self._under = None if body.under is None else _at(body.under)
        self._rows = tuple(_at(path) for path in body.rows)
        self._id = _texts("id", body.id)
        self._at = _moments("at", () if body.at is None else (body.at,))
        self._born = _moments("born", body.born)
        self._born_if = None if body.born_if is None else _at(body.born_if)
        self._ended = _moments("ended", body.ended)
        self._beginning = _moments("period", body.period_beginning)
        self._ending = _moments("period", body.period_ending)
        self._task = _texts("task", () if body.task is None else (body.task,))
        self._failed = body.failed
        self._failed_at = None if body.failed is None else _at(body.failed.path)
        self._reason = tuple(_at(path) for path in body.reason)
        self._attributes = tuple(
            (
                name,
                _only_key(body.attributes[name]),
                _PLAIN[resource.attributes[name].kind],
                _attribute(name, resource.attributes[name], body.attributes[name]),
            )
            for name in sorted(body.attributes)
        )
        self._counters = tuple(_Counter(counter) for counter in body.counters)
        self._is_exact = resource.is_exact

    def read(self, payload: object, problems: Problems) -> list[Row]:
        """The rows of `payload`, at least one; what could not be read is added to `problems`."""
        root: _Object = payload if isinstance(payload, dict) else {}
        if self._under is not None:
            inner = self._under(root, root)
            if isinstance(inner, dict):
                root = inner
        rows = self._found(root, problems)
        return [self._read(row, root, problems) for row in rows]

    def _found(self, root: _Object, problems: Problems) -> Sequence[_Object]:
        for get in self._rows:
            value = get(root, root)
            if isinstance(value, dict):
                return [value]
            if isinstance(value, list):
                rows = [row for row in value if isinstance(row, dict)]
                if len(rows) > MAX_ROWS:
                    problems.append("too_many_rows")
                return rows[:MAX_ROWS]
        return [root]

    def _read(self, row: _Object, root: _Object, problems: Problems) -> Row:
        beginning = self._beginning(row, root, problems)
        ending = self._ending(row, root, problems) if beginning is not None else None
        attributes: list[tuple[str, Scalar]] = []
        for name, key, is_plain, get in self._attributes:
            found = None if key is None else row.get(key)
            # what nearly every field holds needs no second look
            value = found if is_plain(found) else get(row, root, problems)
            if value is not _MISSING:
                attributes.append((name, value))
        is_born = self._born_if is None or self._born_if(row, root) not in (None, "")
        born_at = self._born(row, root, problems) if is_born else None
        ended_at = self._ended(row, root, problems)
        if self._is_exact and born_at is not None and ended_at is not None and ended_at < born_at:
            problems.append("absurd_time:ended")
            ended_at = None
        return Row(
            resource_id=self._id(row, root, problems),
            at=self._at(row, root, problems),
            born_at=born_at,
            ended_at=ended_at,
            period=None if beginning is None or ending is None else (beginning, ending),
            task=self._task(row, root, problems),
            failed=self._is_failed(row, root),
            reason=self._reason_of(row, root),
            attributes=tuple(attributes),
            readings=tuple(
                [
                    reading
                    for counter in self._counters
                    for reading in counter.read(row, root, problems)
                ]
            ),
        )

    def _is_failed(self, row: _Object, root: _Object) -> bool:
        if self._failed is None or self._failed_at is None:
            return False
        said = self._failed_at(row, root)
        return isinstance(said, str) and said != "" and said not in self._failed.unless

    def _reason_of(self, row: _Object, root: _Object) -> str | None:
        for get in self._reason:
            said = get(row, root)
            if isinstance(said, str) and said:
                return clean(said[:MAX_TEXT])
        return None


class _Counter:
    """Where a body keeps a counter."""

    def __init__(self, counter: mapping.Counter) -> None:
        self._counter = counter
        self._each = None if counter.each is None else _at(counter.each)
        self._inside = None if counter.inside is None else _at(counter.inside)
        self._label = None if counter.label is None else _at(counter.label)
        self._value = _at(counter.value)
        self._run = tuple(_at(path) for path in counter.run)

    def read(self, row: _Object, root: _Object, problems: Problems) -> list[CounterReading]:
        """What the body says of the counter; what could not be read is added to `problems`."""
        readings: list[CounterReading] = []
        run = None
        for label, holder in self._holders(row, root, problems):
            value = self._value(holder, root)
            if value is None:
                continue
            number = _whole(value)
            if number is None or not 0 <= number < MAX_WHOLE:
                problems.append(f"bad_number:{self._counter.name}")
                continue
            if run is None:
                run = _run_name([get(row, root) for get in self._run]) if self._run else ""
            readings.append(
                CounterReading(self._counter.name, self._counter.reading, number, label, run)
            )
        return readings

    def _holders(
        self, row: _Object, root: _Object, problems: Problems
    ) -> Sequence[tuple[str, _Object]]:
        if self._each is None:
            return [("", row)]
        found = self._each(row, root)
        if not found:
            return []
        pairs: Sequence[tuple[str, object]] = []
        if isinstance(found, dict):
            pairs = list(found.items())
        elif isinstance(found, list):
            pairs = [("", value) for value in found]
        if len(pairs) > MAX_ROWS:
            problems.append(f"too_many_rows:{self._counter.name}")
        holders: list[tuple[str, _Object]] = []
        for key, value in pairs[:MAX_ROWS]:
            holder = value
            if isinstance(holder, dict) and self._inside is not None:
                holder = self._inside(holder, root)
            if isinstance(holder, dict):
                label = key if self._label is None else self._label(holder, root)
                holders.append((clean(str(label or ""))[:MAX_TEXT], holder))
        return holders


def _run_name(parts: Sequence[object]) -> str:
    """One text for what tells a run of a counter from the next."""
    return clean("/".join(str(part) for part in parts if part is not None))[:MAX_TEXT]


# --- getting at values


def _at(path: mapping.Path) -> _Get:
    keys = path.keys
    if not path.from_root and len(keys) == 1:
        (only,) = keys

        def one(row: _Object, root: _Object) -> object:
            return row.get(only)

        return one

    def get(row: _Object, root: _Object) -> object:
        value: object = root if path.from_root else row
        for key in keys:
            if not isinstance(value, dict):
                return None
            value = value.get(key)
        return value

    return get


def _only_key(source: mapping.Source) -> str | None:
    """The key of the row that the value is under, if that is all there is to it."""
    if isinstance(source, mapping.Path) and not source.from_root and len(source.keys) == 1:
        return source.keys[0]
    return None


def _has(path: mapping.Path) -> Callable[[_Object, _Object], bool]:
    holder = _at(mapping.Path(path.keys[:-1], path.from_root))
    last = path.keys[-1]

    def has(row: _Object, root: _Object) -> bool:
        found = holder(row, root)
        return isinstance(found, dict) and last in found

    return has


def _texts(
    name: str, paths: Sequence[mapping.Path]
) -> Callable[[_Object, _Object, Problems], str | None]:
    getters = tuple(_at(path) for path in paths)

    def get(row: _Object, root: _Object, problems: Problems) -> str | None:
        for getter in getters:
            found = _text(getter(row, root), name, problems)
            if found is not None:
                return found
        return None

    return get


def _moments(
    name: str, paths: Sequence[mapping.Path]
) -> Callable[[_Object, _Object, Problems], datetime | None]:
    getters = tuple((path.keys[-1] if path.keys else name, _at(path)) for path in paths)
    if not getters:
        return _never

    def get(row: _Object, root: _Object, problems: Problems) -> datetime | None:
        for field, getter in getters:
            value = getter(row, root)
            if value is None or value == "":
                continue
            try:
                moment = parse_time(value)
            except BadTimeError:
                problems.append(f"bad_time:{field}")
                continue
            if moment is None:
                continue
            if is_plausible(moment):
                return moment
            problems.append(f"absurd_time:{field}")
        return None

    return get


def _never(row: _Object, root: _Object, problems: Problems) -> None:
    """The body has no place for it."""


def _attribute(
    name: str, attribute: mapping.Attribute, source: mapping.Source
) -> Callable[[_Object, _Object, Problems], Scalar | _Missing]:
    """A function that gives the value, None where it is said to be nothing, else _MISSING."""
    get = _value(source)
    has = _said(source) if attribute.nullable else None
    read = _text if attribute.kind is Kind.TEXT else _number

    def value(row: _Object, root: _Object, problems: Problems) -> Scalar | _Missing:
        found = get(row, root)
        if found is not None:
            good = read(found, name, problems)
            if good is not None:
                return good
            if not (isinstance(found, str) and found in _NOTHING):
                return _MISSING  # it was there and could not be read: that is no word on it
        if has is not None and has(row, root):
            return None
        return _MISSING

    return value


def _value(source: mapping.Source) -> _Get:
    match source:
        case mapping.Path():
            return _at(source)
        case mapping.First():
            return _first(tuple(_value(item) for item in source.sources))
        case mapping.LastSegment():
            return _last_segment(_at(source.source))
        case mapping.Sum():
            return _sum(tuple(_at(path) for path in source.sources))
        case mapping.Count():
            return _count(_at(source.source))
        case mapping.Join():
            return _join(source)
        case mapping.Present():
            return _present(source)
        case mapping.Item():
            return _item(_at(source.source), source.key)
        case mapping.Constant():
            return lambda row, root: source.value
        case mapping.ByValue():
            return _by_value(source)


def _by_value(source: mapping.ByValue) -> _Get:
    getter = _at(source.source)
    sizes = {path: _at(path) for rate in source.table.values() if (path := rate.of) is not None}

    def get(row: _Object, root: _Object) -> object:
        value = getter(row, root)
        rate = source.table.get(value) if isinstance(value, str) else None
        if rate is None:
            return None
        total = rate.fixed
        if rate.of is not None:
            size = _whole(sizes[rate.of](row, root))
            if size is None:
                return None  # how much it is cannot be told
            total += rate.each * size
        return total if rate.most is None else min(total, rate.most)

    return get


def _said(source: mapping.Source) -> Callable[[_Object, _Object], bool]:
    """Whether the body speaks of it at all."""
    match source:
        case mapping.Path():
            return _has(source)
        case (
            mapping.LastSegment()
            | mapping.Count()
            | mapping.Join()
            | mapping.Item()
            | mapping.ByValue()
        ):
            return _has(source.source)
        case mapping.First():
            all_of = tuple(_said(item) for item in source.sources)
            return lambda row, root: any(has(row, root) for has in all_of)
        case _:
            return lambda row, root: True


def _first(getters: tuple[_Get, ...]) -> _Get:
    def get(row: _Object, root: _Object) -> object:
        for getter in getters:
            value = getter(row, root)
            if value is not None and value != "":
                return value
        return None

    return get


def _last_segment(getter: _Get) -> _Get:
    def get(row: _Object, root: _Object) -> object:
        value = getter(row, root)
        return value.rsplit("/", 1)[-1] if isinstance(value, str) else None

    return get


def _sum(getters: tuple[_Get, ...]) -> _Get:
    needed, *others = getters

    def get(row: _Object, root: _Object) -> object:
        total = _whole(needed(row, root))
        if total is not None:
            for getter in others:
                total += _whole(getter(row, root)) or 0
        return total

    return get


def _count(getter: _Get) -> _Get:
    def get(row: _Object, root: _Object) -> object:
        value = getter(row, root)
        return len(value) if isinstance(value, list) else None

    return get


def _join(source: mapping.Join) -> _Get:
    getter = _at(source.source)

    def get(row: _Object, root: _Object) -> object:
        rows = getter(row, root)
        if not isinstance(rows, list):
            return None
        found: set[str] = set()
        for one in rows[:MAX_ROWS]:
            if not isinstance(one, dict) or (source.unless and one.get(source.unless)):
                continue
            value = next((one[key] for key in source.of if one.get(key)), None)
            if isinstance(value, str):
                found.add(value)
        return ",".join(sorted(found)) or None

    return get


def _present(source: mapping.Present) -> _Get:
    getters = tuple(_at(path) for path in source.sources)
    keys = tuple(_has(path) for path in source.sources)

    def get(row: _Object, root: _Object) -> object:
        if any(getter(row, root) not in (None, "") for getter in getters):
            return source.then
        return source.otherwise if any(has(row, root) for has in keys) else None

    return get


def _item(getter: _Get, key: str) -> _Get:
    def get(row: _Object, root: _Object) -> object:
        held = getter(row, root)
        if isinstance(held, dict):
            return held.get(key)
        if isinstance(held, list):
            for one in held[:MAX_ROWS]:
                if isinstance(one, dict) and one.get("key") == key:
                    return one.get("value")
        return None

    return get


# --- judging values


def _is_plain_text(value: object) -> TypeGuard[str]:
    """Whether it is a text, and as it stands what it is read as."""
    return (
        type(value) is str
        and len(value) <= MAX_TEXT
        and value not in _NOTHING
        and value.isascii()
        and value.isprintable()
    )


def _is_plain_number(value: object) -> TypeGuard[int]:
    """Whether it is a whole number, and as it stands what it is read as."""
    return type(value) is int and 0 <= value < MAX_WHOLE


_PLAIN: Final[Table[Kind, Callable[[object], TypeGuard[Scalar]]]] = {
    Kind.TEXT: _is_plain_text,
    Kind.WHOLE: _is_plain_number,
}


def _text(value: object, name: str, problems: Problems) -> str | None:
    if _is_plain_text(value):
        return value
    if isinstance(value, str):
        if value in _NOTHING:
            return None
        if len(value) <= MAX_TEXT:
            return clean(value)
    elif value is None:
        return None
    elif isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    problems.append(f"bad_text:{name}")
    return None


def _number(value: object, name: str, problems: Problems) -> Scalar:
    if value == "":
        return None
    number = _whole(value)
    if number is not None and 0 <= number < MAX_WHOLE:
        return number
    problems.append(f"bad_number:{name}")
    return None


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
