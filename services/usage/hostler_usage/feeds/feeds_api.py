"""Atom feeds over HTTP: all events, those of a type, of a project, of a resource; and yagi's paths.

`/feeds/...` are valid Atom with the archives of RFC 5005. yagi's feeds are at `/yagi/`,
`/yagi/<event_type>` and `/yagi/<event_type>/<uuid>`, with `?page=N` (0 is the oldest, the newest is
the default) and JSON as plain text; they also answer where yagi had them: at `/<event_type>` and
`/<event_type>/<uuid>`, which are no other paths of ours, for an event type has a dot in it, and at
`/` for who accepts `application/atom+xml`, where others get the overview.

A feed of something that nothing was said of yet is empty: a reader may wait for its first event.
Readers look for changes, and subscribers for the hub, by HEAD as well as by GET.
"""

from collections.abc import Mapping
from datetime import UTC
from email.utils import format_datetime, parsedate_to_datetime
from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.routing import APIRoute
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.routing import Match
from starlette.types import Scope as AsgiScope

from hostler_common import auth, http
from hostler_usage.feeds import atom
from hostler_usage.feeds.feed import EVENT_TYPE_PATTERN, Feed, Kind, Shape
from hostler_usage.feeds.feed_store import FeedNotFound, FeedPage
from hostler_usage.feeds.publish import Edition, Publisher

MAX_SEQ = 2**63 - 1
ARCHIVE_SECONDS = 365 * 86_400

PublisherDep = Annotated[Publisher, http.state("publisher")]
Name = Annotated[str, Path(min_length=1, max_length=255, pattern=r"^[^\x00]*$")]
Archive = Annotated[
    int | None, Query(ge=1, le=MAX_SEQ, description="the archive that ends here; from a link")
]
Before = Annotated[
    int | None, Query(ge=1, le=MAX_SEQ, description="what is behind it; from a link")
]
PageNumber = Annotated[
    int | None, Query(ge=0, le=MAX_SEQ, description="0 is the oldest; the newest if left out")
]
ATOM: dict[int | str, dict[str, object]] = {
    200: {"content": {atom.MEDIA_TYPE: {}}, "description": "An Atom feed"},
    304: {"description": "The document with the ETag of If-None-Match is still the newest"},
}


class _EventType(StringConvertor):
    regex = EVENT_TYPE_PATTERN


class _FeedKey(StringConvertor):
    regex = "(?s:.+)"  # nobody keeps slashes and line breaks out of names


register_url_convertor("event_type", _EventType())
register_url_convertor("feed_key", _FeedKey())


class _AtomOnly(APIRoute):
    """A route for who accepts Atom; for others it is not there, and the next one may match."""

    def matches(self, scope: AsgiScope) -> tuple[Match, AsgiScope]:
        """Whether the route is the request's, as in `Route`."""
        accepted = b",".join(value for name, value in scope["headers"] if name == b"accept")
        if atom.MEDIA_TYPE.encode() not in accepted.lower():
            return Match.NONE, {}
        return super().matches(scope)


router = APIRouter(
    tags=["feeds"],
    dependencies=[auth.require(auth.Role.READER)],
    default_response_class=Response,
    responses=ATOM,
)
yagi_router = APIRouter(
    include_in_schema=False,
    dependencies=[auth.require(auth.Role.READER)],
    default_response_class=Response,
)
yagi_root_router = APIRouter(
    include_in_schema=False,
    dependencies=[auth.require(auth.Role.READER)],
    default_response_class=Response,
    route_class=_AtomOnly,
)


@router.head("/feeds/all.atom", include_in_schema=False)
@router.get("/feeds/all.atom", operation_id="feed_all")
async def feed_all(
    request: Request,
    publisher: PublisherDep,
    caller: auth.Caller,
    archive: Archive = None,
    before: Before = None,
) -> Response:
    """Every event that the caller may see."""
    return await _feed(request, publisher, caller, Feed(kind=Kind.ALL), archive, before)


@router.head("/feeds/types/{event_type:feed_key}.atom", include_in_schema=False)
@router.get("/feeds/types/{event_type:feed_key}.atom", operation_id="feed_type")
async def feed_type(
    request: Request,
    publisher: PublisherDep,
    caller: auth.Caller,
    event_type: Name,
    archive: Archive = None,
    before: Before = None,
) -> Response:
    """The events of one type."""
    feed = Feed(kind=Kind.TYPE, key=event_type)
    return await _feed(request, publisher, caller, feed, archive, before)


@router.head("/feeds/projects/{project_id:feed_key}.atom", include_in_schema=False)
@router.get("/feeds/projects/{project_id:feed_key}.atom", operation_id="feed_project")
async def feed_project(
    request: Request,
    publisher: PublisherDep,
    caller: auth.Caller,
    project_id: Name,
    archive: Archive = None,
    before: Before = None,
) -> Response:
    """The events of one project."""
    feed = Feed(kind=Kind.PROJECT, key=project_id)
    return await _feed(request, publisher, caller, feed, archive, before)


@router.head(
    "/feeds/resources/{resource_type}/{resource_id:feed_key}.atom", include_in_schema=False
)
@router.get(
    "/feeds/resources/{resource_type}/{resource_id:feed_key}.atom", operation_id="feed_resource"
)
async def feed_resource(
    request: Request,
    publisher: PublisherDep,
    caller: auth.Caller,
    resource_type: Name,
    resource_id: Name,
    archive: Archive = None,
    before: Before = None,
) -> Response:
    """The events of one instance, volume, image, ..."""
    feed = Feed(kind=Kind.RESOURCE, key=resource_id, resource_type=resource_type)
    return await _feed(request, publisher, caller, feed, archive, before)


# --- yagi's


@yagi_root_router.head("/")
@yagi_root_router.get("/")
@yagi_router.head("/yagi/")
@yagi_router.get("/yagi/")
async def yagi_all(
    request: Request, publisher: PublisherDep, caller: auth.Caller, page: PageNumber = None
) -> Response:
    """Every event, as yagi had it."""
    return await _yagi(request, publisher, caller, Feed(kind=Kind.ALL, shape=Shape.YAGI), page)


@yagi_router.head("/yagi/{event_type}")
@yagi_router.get("/yagi/{event_type}")
@yagi_router.head("/{event_type:event_type}")
@yagi_router.get("/{event_type:event_type}")
async def yagi_type(
    request: Request,
    publisher: PublisherDep,
    caller: auth.Caller,
    event_type: Name,
    page: PageNumber = None,
) -> Response:
    """The events of a type, as yagi had it; not found for a type that no event ever had."""
    if not await publisher.store.has_type(event_type):
        raise FeedNotFound(f"no event of type {event_type} was stored yet")
    feed = Feed(kind=Kind.TYPE, key=event_type, shape=Shape.YAGI)
    return await _yagi(request, publisher, caller, feed, page)


@yagi_router.head("/yagi/{event_type}/{message_id}")
@yagi_router.get("/yagi/{event_type}/{message_id}")
@yagi_router.head("/{event_type:event_type}/{message_id}")
@yagi_router.get("/{event_type:event_type}/{message_id}")
async def yagi_event(
    request: Request,
    publisher: PublisherDep,
    caller: auth.Caller,
    event_type: Name,
    message_id: Name,
) -> Response:
    """One event, as a feed with one entry."""
    page = await publisher.store.under_id(event_type, message_id, scope=caller.projects)
    feed = Feed(kind=Kind.TYPE, key=event_type, shape=Shape.YAGI)
    path = f"{feed.path}/{quote(message_id, safe='')}"
    return await _answer(request, publisher, caller, feed, page, path)


# --- answers


async def _feed(
    request: Request,
    publisher: Publisher,
    caller: auth.Principal,
    feed: Feed,
    archive: int | None,
    before: int | None,
) -> Response:
    store, scope = publisher.store, caller.projects
    if archive is not None:
        page = await store.archive(feed, scope=scope, ending=archive)
    else:
        page = await store.current(feed, scope=scope, before=before)
    return await _answer(request, publisher, caller, feed, page)


async def _yagi(
    request: Request,
    publisher: Publisher,
    caller: auth.Principal,
    feed: Feed,
    number: int | None,
) -> Response:
    page = await publisher.store.numbered(feed, scope=caller.projects, number=number)
    return await _answer(request, publisher, caller, feed, page)


async def _answer(
    request: Request,
    publisher: Publisher,
    caller: auth.Principal,
    feed: Feed,
    page: FeedPage,
    path: str | None = None,
) -> Response:
    base = publisher.base or str(request.base_url).rstrip("/")
    edition = Edition(feed=feed, scope=caller.projects, base=base, page=page, path=path)
    # the newest archive has no next one yet, and will: only those before it never change
    # (and yagi's numbers are counted from the oldest that is left)
    is_final = feed.shape is Shape.ATOM and page.archive is not None and page.newer is not None
    discovery = ", ".join(
        f'<{link.href}>; rel="{link.rel}"' for link in edition.links if link.rel in ("self", "hub")
    )
    headers = {
        "ETag": edition.etag,
        "Last-Modified": format_datetime(
            edition.updated.astimezone(UTC).replace(microsecond=0), usegmt=True
        ),
        "Cache-Control": f"private, max-age={ARCHIVE_SECONDS}, immutable"
        if is_final
        else "private, no-cache",
        "Vary": "Authorization, Cookie, Accept",
        "Link": discovery,
    }
    if _is_known(request.headers, edition, headers["Last-Modified"], is_final=is_final):
        return Response(status_code=304, headers=headers)
    document = await publisher.document(edition)
    return Response(document, headers=headers, media_type=f"{atom.MEDIA_TYPE}; charset=utf-8")


def _is_known(
    asked: Mapping[str, str], edition: Edition, modified: str, *, is_final: bool
) -> bool:
    """Whether the reader has this document.

    Its time tells so of a final archive alone: in a current feed, events of the same second may
    still come.
    """
    tags = asked.get("if-none-match")
    if tags is not None:
        known = {tag.strip().removeprefix("W/") for tag in tags.split(",")}
        return "*" in known or edition.etag in known
    since = asked.get("if-modified-since")
    if since is None or not is_final:
        return False
    try:
        return parsedate_to_datetime(since) >= parsedate_to_datetime(modified)
    except (TypeError, ValueError):
        return False
