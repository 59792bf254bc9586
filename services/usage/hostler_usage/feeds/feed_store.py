"""Feeds in PostgreSQL: cutting them into pages, and finding what a page holds.

`settle` appends to the catalogue of pages, behind ingest and never in its way: an event is
catalogued once no event with a lower `seq` can appear any more, and once its message id was looked
for in everything stored (`conflict_store`), so that a full page is final. It may run in any number
of processes; one at a time does the work.

Reading starts from the catalogue, which knows the times of a page's events, and finds them by the
key of `raw_event`; what is not catalogued yet is a range of `seq` at its end. A resource's events
are few and have an index: its pages are made when they are asked for. What a caller may see is a
condition inside each statement.
"""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import accumulate, chain
from typing import Final

import asyncpg

from hostler_common import db, errors
from hostler_usage.feeds.feed import PAGE_EVENTS, Feed, Item, Kind, Page, paginate
from hostler_usage.history.conflict_store import note_everywhere
from hostler_usage.history.paging import Scope, visible_projects
from hostler_usage.reading.times import EPOCH

CURRENT_EVENTS: Final = 1000
"""A current feed shows so many events at most; it links to the next ones behind them."""
_SLICE: Final = 20_000
# ingest's transactions are bounded to 60 s each: what is so old is committed or never will be
_PATIENCE: Final = "interval '5 minutes'"
_MAX_BODY_BYTES: Final = 64 * 1024
_HIGHEST: Final = "pg_sequence_last_value('raw_event_seq') AS highest"


class FeedNotFound(errors.NotFound):
    """There is no such feed, or none that the caller may see."""

    code = "usage.feed.not_found"


class FeedPageNotFound(errors.NotFound):
    """The feed has no such page."""

    code = "usage.feed.page_not_found"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An event on a page, without what it says."""

    seq: int
    event_time: datetime
    received_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedPage:
    """The events of a page, newest first, and the pages beside it.

    `archive`, `older` and `newer` name archives by the `seq` they end with; `before` is where the
    rest of a current feed begins that is too long for one document. `number` counts pages from the
    oldest, 0; it is only known where a page was asked for by its number.
    """

    feeds_id: str
    began_at: datetime
    events: Sequence[Found]
    archive: int | None = None
    older: int | None = None
    newer: int | None = None
    before: int | None = None
    number: int | None = None
    is_newest: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Clock:
    feeds_id: str
    began_at: datetime
    settled_seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _View:
    """A feed as one caller sees it: the catalogued feeds it is made of, and what is picked from them."""

    kind: Kind
    keys: Sequence[str]
    event_type: str | None = None
    project_ids: Sequence[str] | None = None
    resource_type: str | None = None
    resource_id: str | None = None

    @property
    def picks_types(self) -> str | None:
        """The type that is picked from pages with others; None where all of a page is shown."""
        return self.event_type if self.kind is Kind.PROJECT else None

    def condition(self, first: int) -> tuple[str, list[object]]:
        """The condition on `raw_event`, its values numbered from `first`, and the values."""
        texts = ["true"]
        values: list[object] = []
        for text, value in (
            ("event_type = {}", self.event_type),
            ("project_id = ANY({}::text[])", self.project_ids),
            ("resource_type = {}", self.resource_type),
            ("resource_id = {}", self.resource_id),
        ):
            if value is not None:
                texts.append(text.format(f"${first + len(values)}"))
                values.append(value)
        return " AND ".join(texts), values


def _tell_nobody(conflicts: Mapping[str, int]) -> None:
    """Nobody counts them here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedStore:
    """The catalogue of pages, and reading them. Another `page_events` shapes the pages begun from then on.

    `count_conflicts` is told of message ids that settling found in conflict: how many, by source.
    """

    pool: db.Pool
    page_events: int = PAGE_EVENTS
    count_conflicts: Callable[[Mapping[str, int]], None] = _tell_nobody

    # --- the catalogue

    async def settle(self) -> bool:
        """Events that no other can come before are in the catalogue; whether more is at hand at once.

        What is stored is settled two or three calls later, if no transaction stays open.

        Raises:
            DatabaseUnavailable: nothing was changed.
        """
        async with db.connection(self.pool) as connection:
            if await connection.fetchval(
                "SELECT awaited_seq IS NULL AND settled_seq >= coalesce(highest, 0)"  # noqa: S608  a constant of this module
                f" FROM feed_clock, {_HIGHEST}"
            ):
                return False  # nothing came: nothing is written
        async with db.transaction(self.pool) as connection:
            is_more, conflicts = await self._settle(connection)
        self.count_conflicts(conflicts)
        return is_more

    async def _settle(self, connection: db.Connection) -> tuple[bool, Mapping[str, int]]:
        """Whether more is at hand at once, and the message ids that were found in conflict, by source."""
        clock = await connection.fetchrow(
            "SELECT settled_seq, awaited_seq, awaited_xid IS NOT NULL AS is_marked,"  # noqa: S608  a constant of this module
            " awaited_xid <= pg_snapshot_xmin(pg_current_snapshot())"
            f" OR awaited_at < now() - {_PATIENCE} AS is_settled"
            " FROM feed_clock FOR UPDATE SKIP LOCKED"
        )
        if clock is None:  # another replica is at it
            return False, {}
        settled, awaited = clock["settled_seq"], clock["awaited_seq"]
        if awaited is not None and not clock["is_marked"]:
            # this transaction's own id: whoever took a seq a turn ago has a lower one. (xmax of a snapshot
            # is no such bound: it is one above the highest id that has ended, not that was given out.)
            await connection.execute(
                "UPDATE feed_clock SET awaited_at = now(), awaited_xid = pg_current_xact_id()"
            )
            return False, {}
        if awaited is not None and not clock["is_settled"]:
            return False, {}
        through = settled if awaited is None else min(awaited, settled + _SLICE)
        conflicts: Mapping[str, int] = {}
        if through > settled:
            conflicts = await self._catalogue(connection, settled, through)
        if awaited is not None and through < awaited:
            await connection.execute("UPDATE feed_clock SET settled_seq = $1", through)
            return True, conflicts
        highest = await connection.fetchval(f"SELECT highest FROM {_HIGHEST}")  # noqa: S608  a constant of this module
        following = highest if highest is not None and highest > through else None
        if through > settled or following != awaited:
            await connection.execute(
                "UPDATE feed_clock SET settled_seq = $1, awaited_seq = $2,"
                " awaited_xid = NULL, awaited_at = NULL",
                through,
                following,
            )
        return False, conflicts

    async def _catalogue(
        self, connection: db.Connection, after: int, through: int
    ) -> Mapping[str, int]:
        """The events in between have their places; return what `_settle` does of their conflicts."""
        rows = await connection.fetch(
            "SELECT seq, event_time, event_type, project_id, message_id FROM raw_event"
            " WHERE seq > $1 AND seq <= $2 ORDER BY seq",
            after,
            through,
        )
        if not rows:
            return {}  # what comes again takes numbers, too, and nothing is stored under them
        items = [
            Item(
                seq=row["seq"],
                event_time=row["event_time"],
                event_type=row["event_type"],
                project_id=row["project_id"],
            )
            for row in rows
        ]
        feeds = {
            *((Kind.ALL, "") for _ in items[:1]),
            *((Kind.TYPE, item.event_type) for item in items),
            *((Kind.PROJECT, item.project_id) for item in items if item.project_id is not None),
        }
        found = await connection.fetch(
            "SELECT page.* FROM unnest($1::text[], $2::text[]) AS feed (kind, key), LATERAL"
            " (SELECT kind, key, first_seq, last_seq, is_full, types, cardinality(times) AS held"
            " FROM feed_page WHERE (kind, key) = (feed.kind, feed.key)"
            " ORDER BY first_seq DESC LIMIT 1) AS page",
            [str(kind) for kind, _ in feeds],
            [key for _, key in feeds],
        )
        last = {(Kind(row["kind"]), row["key"]): _page(row) for row in found}
        held = {(page.kind, page.key, page.first_seq): len(page.times) for page in last.values()}
        pages = paginate(last, items, self.page_events)
        added = [
            page.times[held.get((page.kind, page.key, page.first_seq), 0) :] for page in pages
        ]
        ends = list(accumulate(map(len, added)))
        # an array has no rows of different lengths: what all pages get is cut into each one's
        await connection.execute(
            "INSERT INTO feed_page (kind, key, first_seq, last_seq, is_full, times, types)"
            " SELECT kind, key, first_seq, last_seq, is_full, ($6::timestamptz[])[begin_at + 1:end_at],"
            " ARRAY(SELECT jsonb_array_elements_text(types)) FROM unnest($1::text[], $2::text[],"
            " $3::bigint[], $4::bigint[], $5::boolean[], $7::integer[], $8::integer[], $9::jsonb[])"
            " AS page (kind, key, first_seq, last_seq, is_full, begin_at, end_at, types)"
            " ON CONFLICT (kind, key, first_seq) DO UPDATE"
            " SET last_seq = excluded.last_seq, is_full = excluded.is_full,"
            " times = feed_page.times || excluded.times, types = excluded.types",
            [str(page.kind) for page in pages],
            [page.key for page in pages],
            [page.first_seq for page in pages],
            [page.last_seq for page in pages],
            [page.is_full for page in pages],
            list(chain.from_iterable(added)),
            [0, *ends[:-1]],
            ends,
            [page.types for page in pages],
        )
        return await note_everywhere(connection, {row["message_id"] for row in rows})

    async def settled_seq(self) -> int:
        """Up to where the catalogue reaches.

        Raises:
            DatabaseUnavailable: the database is away.
        """
        async with db.connection(self.pool) as connection:
            return int(await connection.fetchval("SELECT settled_seq FROM feed_clock"))

    async def forget(self, before: datetime) -> int:
        """Pages all of whose events happened before a moment are gone; how many those were.

        For when the partitions that held the events were dropped.

        Raises:
            DatabaseUnavailable: nothing was changed.
        """
        async with db.connection(self.pool) as connection:
            status = await connection.execute(
                "DELETE FROM feed_page WHERE is_full"
                " AND (SELECT max(at) FROM unnest(times) AS at) < $1",
                before,
            )
        return int(status.rpartition(" ")[2])

    # --- reading

    async def current(self, feed: Feed, *, scope: Scope, before: int | None = None) -> FeedPage:
        """The feed's newest events; those in no archive are all there, or behind `before`.

        Raises:
            FeedNotFound: it is none of the caller's.
            DatabaseUnavailable: the database is away.
        """
        view = _view(feed, scope)
        async with _reading(self.pool) as connection:
            return await self._current(connection, view, before)

    async def archive(self, feed: Feed, *, scope: Scope, ending: int) -> FeedPage:
        """The archive that ends with a `seq`; its events are the same for ever.

        Raises:
            FeedNotFound: the feed is none of the caller's.
            FeedPageNotFound: it has no such archive, or not yet.
            DatabaseUnavailable: the database is away.
        """
        view = _view(feed, scope)
        async with _reading(self.pool) as connection:
            return await self._archive(connection, view, ending)

    async def numbered(self, feed: Feed, *, scope: Scope, number: int | None) -> FeedPage:
        """The page of that number, 0 being the oldest; the newest where none is given.

        Raises:
            FeedNotFound: the feed is none of the caller's.
            FeedPageNotFound: it has not so many pages.
            DatabaseUnavailable: the database is away.
        """
        view = _view(feed, scope)
        async with _reading(self.pool) as connection:
            # the newest full page is on the current page, with those after it
            full = await connection.fetchval(
                "SELECT count(DISTINCT last_seq) FROM feed_page"
                " WHERE kind = $1 AND key = ANY($2) AND is_full",
                str(view.kind),
                view.keys,
            )
            newest = max(0, full - 1)
            if number is None or number == newest:
                page = await self._current(connection, view, None)
            elif number < newest:
                ending = await connection.fetchval(
                    "SELECT DISTINCT last_seq FROM feed_page WHERE kind = $1 AND key = ANY($2)"
                    " AND is_full ORDER BY last_seq OFFSET $3 LIMIT 1",
                    str(view.kind),
                    view.keys,
                    number,
                )
                page = await self._archive(connection, view, ending)
            else:
                raise FeedPageNotFound(f"the newest page is {newest}")
        shown = newest if number is None else number
        return replace(page, number=shown, is_newest=shown == newest)

    async def news(
        self, feed: Feed, *, scope: Scope, after: int, limit: int
    ) -> tuple[FeedPage, int]:
        """Settled events after a `seq`, at most `limit`, and the `seq` up to where that is all of them.

        A long silence is passed in several calls: the second value grows in each until it is the
        settled seq.

        Raises:
            FeedNotFound: the feed is none of the caller's.
            DatabaseUnavailable: the database is away.
        """
        view = _view(feed, scope)
        async with _reading(self.pool) as connection:
            clock = await _clock(connection)
            through = min(clock.settled_seq, after + _SLICE)
            condition, values = view.condition(4)
            rows = await connection.fetch(
                "SELECT seq, event_time, received_at FROM raw_event"  # noqa: S608  constants of this module
                f" WHERE seq > $1 AND seq <= $2 AND {condition} ORDER BY seq LIMIT $3",
                after,
                through,
                limit,
                *values,
            )
        if len(rows) == limit:
            through = rows[-1]["seq"]
        events = [Found(**dict(row)) for row in reversed(rows)]
        page = FeedPage(feeds_id=clock.feeds_id, began_at=clock.began_at, events=events)
        return page, max(through, after)

    async def contents(
        self, events: Sequence[Found], *, scope: Scope, with_bodies: bool
    ) -> list[asyncpg.Record]:
        """What these events say, newest first; those dropped meanwhile, or not the caller's, are missing.

        A body is null where it is longer than 64 KiB, or not asked for. `is_first` is false for all
        but the first message under an id.

        Raises:
            DatabaseUnavailable: the database is away.
        """
        body = f"CASE WHEN octet_length(e.body) <= {_MAX_BODY_BYTES} THEN e.body END"
        async with db.connection(self.pool) as connection:
            return await connection.fetch(
                "SELECT e.seq, e.event_time, e.message_id, e.body_sha256, e.received_at,"  # noqa: S608  constants of this module
                " e.region, e.event_type, e.project_id, e.resource_type, e.resource_id, e.headers,"
                f" o.content_encoding, {body if with_bodies else 'NULL::bytea'} AS body,"
                " NOT EXISTS (SELECT FROM event_conflict AS own JOIN event_conflict AS other"
                "  USING (message_id) WHERE own.message_id = e.message_id"
                "  AND (own.event_time, own.body_sha256) = (e.event_time, e.body_sha256)"
                "  AND other.seq < own.seq) AS is_first"
                " FROM raw_event AS e JOIN origin AS o ON o.id = e.origin"
                " WHERE e.event_time = ANY($1::timestamptz[]) AND e.seq = ANY($2::bigint[])"
                " AND ($3::text[] IS NULL OR e.project_id = ANY($3)) ORDER BY e.seq DESC",
                list({event.event_time for event in events}),
                [event.seq for event in events],
                visible_projects(scope),
            )

    async def under_id(self, event_type: str, message_id: str, *, scope: Scope) -> FeedPage:
        """The events of a type under a message id: one, or several where bodies differ.

        Raises:
            FeedPageNotFound: there is none that the caller may see.
            DatabaseUnavailable: the database is away.
        """
        async with _reading(self.pool) as connection:
            clock = await _clock(connection)
            rows = await connection.fetch(
                "SELECT seq, event_time, received_at FROM raw_event WHERE message_id = $1"
                " AND event_type = $2 AND ($3::text[] IS NULL OR project_id = ANY($3))"
                " ORDER BY seq DESC LIMIT $4",
                message_id,
                event_type,
                visible_projects(scope),
                PAGE_EVENTS,
            )
        if not rows:
            raise FeedPageNotFound(f"there is no {event_type} {message_id}")
        events = [Found(**dict(row)) for row in rows]
        return FeedPage(feeds_id=clock.feeds_id, began_at=clock.began_at, events=events)

    async def has_type(self, event_type: str) -> bool:
        """Whether an event of the type is in the catalogue.

        Raises:
            DatabaseUnavailable: the database is away.
        """
        async with db.connection(self.pool) as connection:
            return bool(
                await connection.fetchval(
                    "SELECT EXISTS (SELECT FROM feed_page WHERE kind = 'type' AND key = $1)",
                    event_type,
                )
            )

    # --- pages

    async def _current(
        self, connection: db.Connection, view: _View, before: int | None
    ) -> FeedPage:
        clock = await _clock(connection)
        ends = await self._ends(connection, view, clock.settled_seq, 2)
        oldest = ends[1] if len(ends) > 1 else 0
        condition, values = view.condition(5)
        catalogued = "true"
        if view.kind is not Kind.RESOURCE:
            values.append(await _times(connection, view, oldest, clock.settled_seq))
            catalogued = f"event_time = ANY(${4 + len(values)}::timestamptz[])"
        rows = await connection.fetch(
            "SELECT * FROM (SELECT seq, event_time, received_at FROM raw_event"  # noqa: S608  constants of this module
            f" WHERE seq > $1 AND seq <= $2 AND {condition} AND {catalogued}"
            " UNION ALL SELECT seq, event_time, received_at FROM raw_event"
            f" WHERE seq > $2 AND {condition}) AS e WHERE $3::bigint IS NULL OR seq < $3"
            " ORDER BY seq DESC LIMIT $4",
            oldest,
            clock.settled_seq,
            before,
            CURRENT_EVENTS + 1,
            *values,
        )
        events = [Found(**dict(row)) for row in rows[:CURRENT_EVENTS]]
        return FeedPage(
            feeds_id=clock.feeds_id,
            began_at=clock.began_at,
            events=events,
            older=await _shown_below(connection, view, oldest) if oldest else None,
            before=events[-1].seq if len(rows) > CURRENT_EVENTS else None,
        )

    async def _archive(self, connection: db.Connection, view: _View, ending: int) -> FeedPage:
        clock = await _clock(connection)
        ends = await self._ends(connection, view, clock.settled_seq, 2)
        newest = ends[1] if len(ends) > 1 else 0
        if not 0 < ending <= newest:
            raise FeedPageNotFound(f"there is no archive that ends with {ending}")
        if view.kind is Kind.RESOURCE:
            events, older, newer = await self._resource_archive(connection, view, ending)
        else:
            here = await self._ends(connection, view, ending, 2)
            if not here or here[0] != ending:
                raise FeedPageNotFound(f"there is no archive that ends with {ending}")
            begin = here[1] if len(here) > 1 else 0
            condition, values = view.condition(4)
            events = await connection.fetch(
                "SELECT seq, event_time, received_at FROM raw_event WHERE seq > $1 AND seq <= $2"  # noqa: S608  constants of this module
                f" AND event_time = ANY($3::timestamptz[]) AND {condition} ORDER BY seq DESC",
                begin,
                ending,
                await _times(connection, view, begin, ending),
                *values,
            )
            older = await _shown_below(connection, view, begin) if begin else None
            newer = await _shown_above(connection, view, ending)
        return FeedPage(
            feeds_id=clock.feeds_id,
            began_at=clock.began_at,
            events=[Found(**dict(row)) for row in events],
            archive=ending,
            older=older,
            newer=newer if newer is not None and newer <= newest else None,
        )

    async def _resource_archive(
        self, connection: db.Connection, view: _View, ending: int
    ) -> tuple[list[asyncpg.Record], int | None, int | None]:
        """The last events of a resource up to `ending`, and the ends of the pages beside them.

        Counted from `ending` itself: a page whose address somebody keeps holds the same events when
        older ones are dropped.
        """
        condition, values = view.condition(3)
        events = await connection.fetch(
            "SELECT seq, event_time, received_at FROM raw_event WHERE seq <= $1"  # noqa: S608  constants of this module
            f" AND {condition} ORDER BY seq DESC LIMIT $2",
            ending,
            self.page_events + 1,
            *values,
        )
        newer = await connection.fetchval(
            f"SELECT seq FROM raw_event WHERE seq > $1 AND {condition} ORDER BY seq"  # noqa: S608  constants of this module
            " OFFSET $2 - 1 LIMIT 1",
            ending,
            self.page_events,
            *values,
        )
        older = events[-1]["seq"] if len(events) > self.page_events else None
        return events[: self.page_events], older, newer

    async def _ends(
        self, connection: db.Connection, view: _View, highest: int, limit: int
    ) -> list[int]:
        """Where full pages end, at or below `highest`, from there downwards."""
        if view.kind is Kind.RESOURCE:
            condition, values = view.condition(4)
            rows = await connection.fetch(
                "SELECT seq FROM (SELECT seq, row_number() OVER (ORDER BY seq) AS number"  # noqa: S608  constants of this module
                f" FROM raw_event WHERE seq <= $1 AND {condition}) AS e WHERE number % $2 = 0"
                " ORDER BY seq DESC LIMIT $3",
                highest,
                self.page_events,
                limit,
                *values,
            )
        else:
            rows = await connection.fetch(
                "SELECT DISTINCT page.last_seq AS seq FROM unnest($2::text[]) AS feed (key),"
                " LATERAL (SELECT last_seq FROM feed_page AS p WHERE p.kind = $1"
                "  AND p.key = feed.key AND is_full AND first_seq <= $3 AND last_seq <= $3"
                "  ORDER BY first_seq DESC LIMIT $4) AS page ORDER BY seq DESC LIMIT $4",
                str(view.kind),
                view.keys,
                highest,
                limit,
            )
        return [row["seq"] for row in rows]


@asynccontextmanager
async def _reading(pool: db.Pool) -> AsyncIterator[db.Connection]:
    """A connection that sees one state of the database throughout."""
    async with (
        db.connection(pool) as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        yield connection


def _view(feed: Feed, scope: Scope) -> _View:
    projects = visible_projects(scope)
    match feed.kind:
        case Kind.RESOURCE:
            return _View(
                kind=Kind.RESOURCE,
                keys=(),
                resource_type=feed.resource_type,
                resource_id=feed.key,
                project_ids=projects,
            )
        case Kind.PROJECT:
            if scope is not None and feed.key not in scope:
                raise FeedNotFound(f"there is no feed {feed.path}")
            return _View(kind=Kind.PROJECT, keys=[feed.key], project_ids=[feed.key])
    event_type = feed.key if feed.kind is Kind.TYPE else None
    if projects is None:
        return _View(kind=feed.kind, keys=[feed.key], event_type=event_type)
    # what a caller sees is made of its projects' pages, where one may show nothing of a type
    return _View(kind=Kind.PROJECT, keys=projects, project_ids=projects, event_type=event_type)


def _page(row: asyncpg.Record) -> Page:
    """A page that is gone on with. How many times it holds is known; which, nobody needs to read back."""
    return Page(
        kind=Kind(row["kind"]),
        key=row["key"],
        first_seq=row["first_seq"],
        last_seq=row["last_seq"],
        times=(EPOCH,) * row["held"],
        types=tuple(row["types"]),
        is_full=row["is_full"],
    )


async def _clock(connection: db.Connection) -> _Clock:
    row = await connection.fetchrow(
        "SELECT feeds_id::text AS feeds_id, began_at, settled_seq FROM feed_clock"
    )
    assert row is not None
    return _Clock(**dict(row))


# the pages of a feed that reach beyond a seq begin with the last that begins at or below it
_FROM = (
    "first_seq >= coalesce((SELECT max(first_seq) FROM feed_page AS q WHERE q.kind = $1"
    " AND q.key = feed.key AND q.first_seq <= $3), 0)"
)


async def _times(
    connection: db.Connection, view: _View, after: int, through: int
) -> list[datetime]:
    """The times of the catalogued events after a seq and up to another, and of some beside them."""
    rows = await connection.fetch(
        "SELECT DISTINCT item.at FROM unnest($2::text[]) AS feed (key),"  # noqa: S608  a constant of this module
        " LATERAL (SELECT times FROM feed_page AS p WHERE p.kind = $1 AND p.key = feed.key"
        f"  AND first_seq <= $4 AND last_seq > $3 AND {_FROM}) AS page,"
        " LATERAL unnest(page.times) AS item (at)",
        str(view.kind),
        view.keys,
        after,
        through,
    )
    return [row["at"] for row in rows]


async def _first_end(connection: db.Connection, view: _View, lowest: int) -> int | None:
    """Where the first full page ends, at or above `lowest`."""
    end: int | None = await connection.fetchval(
        "SELECT min(page.last_seq) FROM unnest($2::text[]) AS feed (key),"  # noqa: S608  a constant of this module
        " LATERAL (SELECT last_seq FROM feed_page AS p WHERE p.kind = $1 AND p.key = feed.key"
        f"  AND is_full AND last_seq >= $3 AND {_FROM} ORDER BY first_seq LIMIT 1) AS page",
        str(view.kind),
        view.keys,
        lowest,
    )
    return end


async def _shown_below(connection: db.Connection, view: _View, highest: int) -> int | None:
    """The last end of a page, at or below the end `highest`, whose page shows anything."""
    if view.picks_types is None or view.kind is Kind.RESOURCE:
        return highest
    place: int | None = await connection.fetchval(
        "SELECT max(least(page.last_seq, $3)) FROM unnest($2::text[]) AS feed (key),"
        " LATERAL (SELECT last_seq FROM feed_page AS p WHERE p.kind = $1 AND p.key = feed.key"
        "  AND first_seq <= $3 AND $4 = ANY(types) ORDER BY first_seq DESC LIMIT 1) AS page",
        str(view.kind),
        view.keys,
        highest,
        view.picks_types,
    )
    return None if place is None else await _first_end(connection, view, place)


async def _shown_above(connection: db.Connection, view: _View, lowest: int) -> int | None:
    """The first end of a page, above the end `lowest`, whose page shows anything."""
    if view.picks_types is None:
        return await _first_end(connection, view, lowest + 1)
    place: int | None = await connection.fetchval(
        "SELECT min(greatest(page.first_seq, $3 + 1)) FROM unnest($2::text[]) AS feed (key),"  # noqa: S608  a constant of this module
        " LATERAL (SELECT first_seq FROM feed_page AS p WHERE p.kind = $1 AND p.key = feed.key"
        f"  AND last_seq > $3 AND $4 = ANY(types) AND {_FROM} ORDER BY first_seq LIMIT 1) AS page",
        str(view.kind),
        view.keys,
        lowest,
        view.picks_types,
    )
    return None if place is None else await _first_end(connection, view, place)
