"""Feed documents: what a caller may see of a page, as Atom.

A caller that may see every project gets an event as oslo.messaging would send it, without the
sender's context (keys that begin with `_`): a whole request may be in there. A caller of some
projects gets what the event is about, and not what it says: `message_id`, `event_type`,
`resource_type`, `resource_id`, `project_id`, `region`, `event_time`, `received_at`.
"""

import hashlib
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import asyncpg

from hostler_usage.feeds import atom
from hostler_usage.feeds.atom import Document, Entry, Link
from hostler_usage.feeds.feed import Feed, Shape
from hostler_usage.feeds.feed_store import FeedPage, FeedStore, Found
from hostler_usage.history.paging import Scope
from hostler_usage.reading.envelope import UnreadableError, open_body
from hostler_usage.reading.event import event_id

_FORMAT: Final = 1
"""Grows when documents change though their events do not, so that nobody is told that nothing did."""
_COMPRESSED: Final = frozenset({"gzip", "zlib", "deflate", "bz2", "bzip2", "lzma"})
_PROJECT: Final = "urn:hostler:usage:project"
_RESOURCE: Final = "urn:hostler:usage:resource"


@dataclass(frozen=True, slots=True, kw_only=True)
class Edition:
    """A page of a feed on its way to a document: enough to tell whether a reader has it already.

    `path` is where it is served, if that is not where its feed is.
    """

    feed: Feed
    scope: Scope
    base: str
    page: FeedPage
    path: str | None = None

    @property
    def feed_id(self) -> str:
        """The feed's id; callers who see different projects see different feeds."""
        seen = "*" if self.scope is None else json.dumps(sorted(self.scope))
        return uuid.uuid5(uuid.UUID(self.page.feeds_id), f"{self.feed.name} {seen}").urn

    @property
    def updated(self) -> datetime:
        """When the newest of its events was received; of a page without any, when feeds began."""
        return max((event.received_at for event in self.page.events), default=self.page.began_at)

    @property
    def etag(self) -> str:
        """A strong validator: it differs wherever the documents do."""
        told = (
            _FORMAT,
            self.feed_id,
            self.feed.shape,
            [(link.rel, link.href) for link in self.links],
            [event.seq for event in self.page.events],
        )
        return f'"{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:40]}"'

    @property
    def links(self) -> list[Link]:
        """The links of the document."""
        here, page = self.base + self.feed.path, self.page
        found = []
        if self.feed.shape is Shape.YAGI:
            own = here if self.path is None else self.base + self.path
            found.append(Link(rel="self", href=own + _query(page=_number(page))))
            if page.number:
                found.append(Link(rel="previous", href=f"{here}?page={page.number - 1}"))
            if page.number is not None and not page.is_newest:
                found.append(Link(rel="next", href=f"{here}?page={page.number + 1}"))
        else:
            found.append(Link(rel="self", href=here + _query(archive=page.archive)))
            if page.archive is not None:
                found.append(Link(rel="current", href=here))
            if page.older is not None:
                found.append(Link(rel="prev-archive", href=f"{here}?archive={page.older}"))
            if page.newer is not None:
                found.append(Link(rel="next-archive", href=f"{here}?archive={page.newer}"))
            if page.before is not None:
                found.append(Link(rel="next", href=f"{here}?before={page.before}"))
        if page.archive is None:
            found.append(Link(rel="hub", href=f"{self.base}/hub"))
        return found


def _number(page: FeedPage) -> int | None:
    return None if page.is_newest else page.number


def _query(**values: int | None) -> str:
    given = [f"{name}={value}" for name, value in values.items() if value is not None]
    return f"?{'&'.join(given)}" if given else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Publisher:
    """Makes documents of pages. `base` is where readers reach the service; None asks each request."""

    store: FeedStore
    base: str | None = None

    async def document(self, edition: Edition) -> bytes:
        """The edition as Atom.

        Raises:
            DatabaseUnavailable: the database is away.
        """
        return atom.render(
            Document(
                feed_id=edition.feed_id,
                title=edition.feed.title,
                updated=edition.updated,
                links=edition.links,
                entries=await self._entries(edition),
                shape=edition.feed.shape,
                is_archive=edition.page.archive is not None and edition.feed.shape is Shape.ATOM,
            )
        )

    async def _entries(self, edition: Edition) -> list[Entry]:
        events: Sequence[Found] = edition.page.events
        if not events:
            return []
        rows = await self.store.contents(
            events, scope=edition.scope, with_bodies=edition.scope is None
        )
        return [_entry(row, edition) for row in rows]


def _entry(row: asyncpg.Record, edition: Edition) -> Entry:
    about = f"{row['resource_type']} {row['resource_id']}" if row["resource_id"] else "no resource"
    owner = f" of project {row['project_id']}" if row["project_id"] else ""
    categories: list[tuple[str, str | None]] = [(row["event_type"], None)]
    if row["project_id"]:
        categories.append((row["project_id"], _PROJECT))
    if row["resource_id"]:
        categories.append((f"{row['resource_type']}/{row['resource_id']}", _RESOURCE))
    name = event_id(row["event_time"], row["body_sha256"])
    link = f"{edition.base}/v1/events/{name}"
    content = _about(row) if edition.scope is not None else _said(row)
    return Entry(
        entry_id=atom.entry_id(row["message_id"], row["body_sha256"], is_first=row["is_first"]),
        title=row["event_type"],
        summary=f"{row['event_type']}: {about}{owner}",
        published=row["event_time"].astimezone(UTC),
        updated=row["received_at"],
        categories=categories,
        link=link,
        content=content,
        source=f"{link}/body" if content is None else None,
    )


def _about(row: asyncpg.Record) -> dict[str, object]:
    return {
        "message_id": row["message_id"],
        "event_type": row["event_type"],
        "resource_type": row["resource_type"],
        "resource_id": row["resource_id"],
        "project_id": row["project_id"],
        "region": row["region"],
        "event_time": atom.moment(row["event_time"]),
        "received_at": atom.moment(row["received_at"]),
    }


def _said(row: asyncpg.Record) -> dict[str, object] | None:
    """The message, without what its sender's request was; None where it is too large for a feed."""
    if row["body"] is None:
        return None
    try:
        message = open_body(row["body"], compression=_compression(row))
    except UnreadableError:  # it was read once, by rules that have changed since
        return None
    content: dict[str, object] = {
        "message_id": message.message_id,
        "event_type": message.event_type,
        "publisher_id": message.publisher_id,
        "priority": message.priority,
        "timestamp": atom.moment(message.timestamp),
        "payload": message.payload,
    }
    try:
        size = len(atom.as_json(content))
    except (RecursionError, ValueError):
        return None
    return content if size <= atom.MAX_CONTENT_BYTES else None


def _compression(row: asyncpg.Record) -> str | None:
    """How the body is compressed, as the consumer found it: kombu's header, or a content encoding."""
    header = (row["headers"] or {}).get("compression")
    if header is not None:
        return str(header)
    encoding = str(row["content_encoding"]).lower().removeprefix("x-")
    return encoding if encoding in _COMPRESSED else None
