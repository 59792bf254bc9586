"""Feeds by name, and how a feed is cut into pages.

A feed is all events, those of a type, of a project or of a resource. Its pages are fixed ranges of
arrival: each holds `PAGE_EVENTS` events of the feed, in the order in which they were stored, and
once it is full it never changes. `paginate` cuts them, from events of which no earlier one can
still appear; a page names its events by their times, which is how they are found again.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final
from urllib.parse import quote, unquote

PAGE_EVENTS: Final = 200
_MAX_NAME: Final = 255
# an event type has a dot in it; the two names that browsers and crawlers ask every site for are none
EVENT_TYPE_PATTERN: Final = r"(?!favicon\.ico|robots\.txt)[^/]*\.[^/]*"
_FEED_PATH: Final = re.compile(
    r"/feeds/(?:(?P<all>all)|types/(?P<type>[^/]+)|projects/(?P<project>[^/]+)"
    r"|resources/(?P<resource_type>[^/]+)/(?P<resource_id>[^/]+))\.atom",
    re.ASCII,
)
_YAGI_PATH: Final = re.compile(r"/yagi/(?P<type>[^/]*)", re.ASCII)


class Kind(StrEnum):
    """What the events of a feed have in common."""

    ALL = "all"
    TYPE = "type"
    PROJECT = "project"
    RESOURCE = "resource"


class Shape(StrEnum):
    """How an entry carries its JSON: as RFC 4287 wants it (base64), or as yagi wrote it (plain)."""

    ATOM = "atom"
    YAGI = "yagi"


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """A feed: its kind, and the type, project or resource id that its events share."""

    kind: Kind
    key: str = ""
    resource_type: str = ""
    shape: Shape = Shape.ATOM

    @property
    def path(self) -> str:
        """Where the feed is served, percent-encoded."""
        key = quote(self.key, safe="")
        if self.shape is Shape.YAGI:
            return f"/yagi/{key}"
        match self.kind:
            case Kind.ALL:
                return "/feeds/all.atom"
            case Kind.TYPE:
                return f"/feeds/types/{key}.atom"
            case Kind.PROJECT:
                return f"/feeds/projects/{key}.atom"
            case Kind.RESOURCE:
                return f"/feeds/resources/{quote(self.resource_type, safe='')}/{key}.atom"

    @property
    def title(self) -> str:
        """What people read at its top."""
        match self.kind:
            case Kind.ALL:
                return "Events"
            case Kind.TYPE:
                return f"Events of type {self.key}"
            case Kind.PROJECT:
                return f"Events of project {self.key}"
            case Kind.RESOURCE:
                return f"Events of {self.resource_type} {self.key}"

    @property
    def name(self) -> str:
        """What tells it from every other feed of this ledger, whatever its shape."""
        return f"{self.kind}/{self.resource_type}/{self.key}"


def feed_at(path: str) -> Feed | None:
    """The feed that is served at a percent-encoded path; None where none is."""
    if found := _FEED_PATH.fullmatch(path):
        names = {name: unquote(text) for name, text in found.groupdict().items() if text}
        if not all(len(name) <= _MAX_NAME and "\x00" not in name for name in names.values()):
            return None
        match names:
            case {"type": key}:
                return Feed(kind=Kind.TYPE, key=key)
            case {"project": key}:
                return Feed(kind=Kind.PROJECT, key=key)
            case {"resource_type": resource_type, "resource_id": key}:
                return Feed(kind=Kind.RESOURCE, key=key, resource_type=resource_type)
            case _:
                return Feed(kind=Kind.ALL)
    if found := _YAGI_PATH.fullmatch(path):
        key = unquote(found["type"])
        if len(key) > _MAX_NAME or "\x00" in key:
            return None
        return Feed(kind=Kind.TYPE if key else Kind.ALL, key=key, shape=Shape.YAGI)
    return None


# --- pages


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """What the catalogue needs to know of an event. `seq` rises with arrival and has gaps."""

    seq: int
    event_time: datetime
    event_type: str
    project_id: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Some events of a feed that were stored one after another; `types` are those that occur."""

    kind: Kind
    key: str
    first_seq: int
    last_seq: int
    times: tuple[datetime, ...]
    types: tuple[str, ...]
    is_full: bool


Catalogue = Mapping[tuple[Kind, str], Page]
"""The last page of each feed."""


def feeds_of(item: Item) -> Iterator[tuple[Kind, str]]:
    """The catalogued feeds that an event belongs to; a resource's pages are made when they are asked for."""
    yield Kind.ALL, ""
    yield Kind.TYPE, item.event_type
    if item.project_id is not None:
        yield Kind.PROJECT, item.project_id


def paginate(last_pages: Catalogue, items: Sequence[Item], size: int = PAGE_EVENTS) -> list[Page]:
    """The pages that `items` begin, continue or fill; every other page stays as it is.

    `items` are ordered by `seq`, and each is later than all that `last_pages` hold. How the events
    are divided into calls does not matter to the pages.
    """
    events: dict[tuple[Kind, str], list[Item]] = defaultdict(list)
    for item in items:
        for feed in feeds_of(item):
            events[feed].append(item)
    return [
        page
        for feed, found in events.items()
        for page in _fill(feed, last_pages.get(feed), found, size)
    ]


def _fill(
    feed: tuple[Kind, str], last: Page | None, items: Sequence[Item], size: int
) -> Iterator[Page]:
    kind, key = feed
    held = len(last.times) if last is not None and not last.is_full else 0
    begun = last if held else None
    rest = list(items)
    while rest:
        room = max(size - held, 1)  # the size may have been larger when the page was begun
        now, rest = rest[:room], rest[room:]
        types = {item.event_type for item in now} if kind is Kind.PROJECT else set()
        yield Page(
            kind=kind,
            key=key,
            first_seq=begun.first_seq if begun else now[0].seq,
            last_seq=now[-1].seq,
            times=(*(begun.times if begun else ()), *(item.event_time for item in now)),
            types=tuple(sorted(types.union(begun.types if begun else ()))),
            is_full=held + len(now) >= size,
        )
        held, begun = 0, None
