"""What the pages draw, as data: tables that are charts as well, and the timeline of one resource.

A chart is drawn by the browser from the very table that stands under it, so that the two cannot
disagree. The timeline is drawn here, as shapes in a picture of `WIDTH` units: it needs no script.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from typing import Final

WIDTH: Final = 1200
LABELS_WIDTH: Final = 110
ROW_HEIGHT: Final = 26
_BAR_HEIGHT: Final = 18
_AXIS_HEIGHT: Final = 22
_GLYPH_WIDTH: Final = 7.2  # of the labels' font, on the wide side: what does not fit is left out
_HALF_LABEL: Final = 45
_TICKS_AT_MOST: Final = 9
_LANES_AT_MOST: Final = 6
_COLOURS: Final = 8

# states that have a colour of their own everywhere; others take the palette's in turn
STATES: Final = frozenset(
    {
        "running",
        "available",
        "in_use",
        "associated",
        "active",
        "building",
        "paused",
        "suspended",
        "stopped",
        "shelved",
        "shelved_offloaded",
        "soft_deleted",
        "error",
        "unknown",
    }
)
# what people look for first; further attributes follow where they change on their own
_FIRST: Final = ("flavor", "size_gb", "address")
_STEPS: Final = (
    *(timedelta(minutes=n) for n in (1, 5, 15, 30)),
    *(timedelta(hours=n) for n in (1, 2, 3, 6, 12)),
    *(timedelta(days=n) for n in (1, 2, 4, 7, 14, 28, 56, 112, 224, 448, 896, 1792, 3584)),
)
_DAY: Final = timedelta(days=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of numbers; `colour` is a name of the style sheet's, or empty for the next in turn."""

    name: str
    colour: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A row of numbers, under a day or a name; None where there is none."""

    label: str
    values: tuple[float | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A table that is drawn as well.

    `drawn` is `stack` (bars on top of each other, one a day) or `points` (a scale of powers of ten,
    one place a name).
    """

    title: str
    corner: str
    unit: str
    drawn: str
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]

    @property
    def sums(self) -> tuple[float, ...]:
        """What each column adds up to."""
        return tuple(
            sum(line.values[n] or 0.0 for line in self.lines) for n in range(len(self.columns))
        )


def stack(
    title: str,
    unit: str,
    days: Sequence[date],
    parts: Mapping[str, Mapping[date, float]],
    *,
    colours: Mapping[str, str] | None = None,
) -> Chart:
    """Amounts a day, one column a part, in the order given; a day without an amount has 0."""
    given = colours or {}
    return Chart(
        title=title,
        corner="day (UTC)",
        unit=unit,
        drawn="stack",
        columns=tuple(Column(name=name, colour=given.get(name, "")) for name in parts),
        lines=tuple(
            Line(
                label=day.isoformat(),
                values=tuple(amounts.get(day, 0.0) for amounts in parts.values()),
            )
            for day in days
        ),
    )


def days_between(start: datetime, end: datetime) -> list[date]:
    """The UTC days that `[start, end)` touches."""
    first = start.astimezone(UTC).date()
    last = (end.astimezone(UTC) - timedelta(microseconds=1)).date()
    return [first + n * _DAY for n in range((last - first).days + 1)]


# --- the timeline of a resource


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """An interval as it is drawn; `end` is None while it lasts."""

    start: datetime
    end: datetime | None
    state_class: str
    attributes: Mapping[str, str | int | None]
    anchor: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """An event as it is drawn."""

    at: datetime
    event_type: str
    is_error: bool
    href: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A piece of a lane."""

    x: float
    width: float
    label: str
    hint: str
    colour: str
    href: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """A row of pieces; `y` is its upper edge."""

    name: str
    y: int
    bars: tuple[Bar, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """An event in its row."""

    x: float
    y: int
    hint: str
    kind: str
    href: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """A time at the axis."""

    x: float
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """The picture of a resource's life in a window: lanes, rows of marks, an axis beneath."""

    height: int
    bar_height: int
    axis_y: int
    left: int
    lanes: tuple[Lane, ...]
    mark_rows: tuple[tuple[str, int], ...]
    marks: tuple[Mark, ...]
    ticks: tuple[Tick, ...]
    states: tuple[tuple[str, str], ...]
    now_x: float | None


def timeline(
    spans: Sequence[Span],
    moments: Iterable[Moment],
    start: datetime,
    end: datetime,
    now: datetime,
) -> Timeline:
    """The picture of `[start, end)`; what lies outside is left out, what lasts is drawn until `now`."""
    length = (end - start) / timedelta(microseconds=1)

    def place(moment: datetime) -> float:
        share = ((moment - start) / timedelta(microseconds=1)) / length
        return round(LABELS_WIDTH + share * (WIDTH - LABELS_WIDTH), 2)

    shown = [span for span in spans if span.start < end and (span.end or now) > start]
    colours = _colours(span.state_class for span in spans)
    lanes: list[Lane] = []
    for name in ("state", *_attribute_lanes(spans)):
        bars = []
        for piece, value in _pieces(shown, name):
            until = piece.end or now
            left, right = place(max(piece.start, start)), place(min(until, end))
            if right <= left:
                continue
            said = _spelled(piece.end)
            bars.append(
                Bar(
                    x=left,
                    width=round(right - left, 2),
                    label=value if len(value) * _GLYPH_WIDTH + 8 < right - left else "",
                    hint=f"{value}, {_spelled(piece.start)} to {said}",
                    colour=colours[value] if name == "state" else "attribute",
                    href=f"#{piece.anchor}",
                )
            )
        lanes.append(Lane(name=name, y=len(lanes) * ROW_HEIGHT, bars=tuple(bars)))
    rows = {name: (len(lanes) + n) * ROW_HEIGHT for n, name in enumerate(("events", "audits"))}
    marks = tuple(
        Mark(
            x=place(moment.at),
            y=rows["audits" if kind == "audit" else "events"] + _BAR_HEIGHT // 2,
            hint=f"{moment.event_type}, {_spelled(moment.at)}",
            kind=kind,
            href=moment.href,
        )
        for moment in moments
        if start <= moment.at < end
        for kind in (_kind(moment),)
    )
    axis_y = (len(lanes) + len(rows)) * ROW_HEIGHT
    return Timeline(
        height=axis_y + _AXIS_HEIGHT,
        bar_height=_BAR_HEIGHT,
        axis_y=axis_y,
        left=LABELS_WIDTH,
        lanes=tuple(lanes),
        mark_rows=tuple(rows.items()),
        marks=marks,
        ticks=tuple(
            # the last one's label would be cut off
            Tick(x=place(at), label=label if place(at) < WIDTH - _HALF_LABEL else "")
            for at, label in ticks(start, end)
        ),
        states=tuple(colours.items()),
        now_x=place(now) if start < now < end else None,
    )


def ticks(start: datetime, end: datetime) -> list[tuple[datetime, str]]:
    """Round moments of UTC inside a window, at most nine, and how they are spelled."""
    step = next((n for n in _STEPS if (end - start) / n <= _TICKS_AT_MOST), _STEPS[-1])
    origin = datetime(2000, 1, 1, tzinfo=UTC)
    at = origin + -((origin - start) // step) * step
    form = "%Y-%m-%d" if step >= _DAY else "%m-%d %H:%M"
    found = []
    while at < end:
        if at >= start:
            found.append((at, at.strftime(form)))
        at += step
    return found


def _colours(states: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    others = 0
    for state in states:
        if state in found:
            continue
        if state in STATES:
            found[state] = f"state-{state}"
        else:
            found[state] = f"palette-{others % _COLOURS + 1}"
            others += 1
    return found


def _attribute_lanes(spans: Sequence[Span]) -> list[str]:
    """The attributes worth a lane: the first ones, and those that change when none above does."""
    names = list(dict.fromkeys(name for span in spans for name in span.attributes))
    explained = _changes(spans, "state")
    lanes: list[str] = []
    for name in (*(n for n in _FIRST if n in names), *(n for n in names if n not in _FIRST)):
        own = _changes(spans, name)
        has_value = any(span.attributes.get(name) is not None for span in spans)
        if has_value and (name in _FIRST or not own <= explained) and len(lanes) < _LANES_AT_MOST:
            lanes.append(name)
            explained |= own
    return lanes


def _changes(spans: Sequence[Span], name: str) -> set[datetime]:
    """When a lane's value changes."""
    return {
        later.start
        for earlier, later in pairwise(spans)
        if _value(earlier, name) != _value(later, name)
    }


def _pieces(spans: Sequence[Span], name: str) -> list[tuple[Span, str]]:
    """The spans, neighbours of one value made one, with that value; none where there is no value."""
    found: list[tuple[Span, str]] = []
    for span in spans:
        value = _value(span, name)
        if found:
            last, was = found[-1]
            if was == value and last.end == span.start:
                merged = Span(
                    start=last.start,
                    end=span.end,
                    state_class=last.state_class,
                    attributes=last.attributes,
                    anchor=last.anchor,
                )
                found[-1] = (merged, value)
                continue
        found.append((span, value))
    return [(span, value) for span, value in found if value]


def _value(span: Span, name: str) -> str:
    if name == "state":
        return span.state_class
    value = span.attributes.get(name)
    return "" if value is None else str(value)


def _kind(moment: Moment) -> str:
    if moment.is_error or moment.event_type.endswith(".error"):
        return "error"
    return "audit" if moment.event_type.rpartition(".")[2] == "exists" else "event"


def _spelled(moment: datetime | None) -> str:
    return "now" if moment is None else moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
