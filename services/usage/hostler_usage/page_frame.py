"""What the pages of usage share: their frame, their static files, and how forms ask.

A form sends what nobody filled in as an empty text, which asks for nothing here. A time without a
zone is UTC, as everything on the pages is. What changes something takes requests of these pages
alone, however the caller signed in: browsers send Basic credentials, and none at all where
authentication is off, from other sites' pages as well.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib import resources
from typing import Annotated, Any, Final
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import HTMLResponse
from fastapi.routing import iter_route_contexts
from pydantic import BeforeValidator, StringConstraints

from hostler_common import auth, errors
from hostler_common.pages import Pages
from hostler_usage.history.measures import Window
from hostler_usage.money.price_book import NAME

_MEDIA_TYPES: Final = {".js": "text/javascript", ".css": "text/css", ".txt": "text/plain"}
_STATIC: Final = {
    entry.name: entry.read_bytes()
    for entry in resources.files("hostler_usage").joinpath("static").iterdir()
    if entry.name.endswith(tuple(_MEDIA_TYPES))
}
_ADDRESSES: Final = {
    name: f"/static/usage/{name}?v={hashlib.sha256(content).hexdigest()[:12]}"
    for name, content in _STATIC.items()
}
# parts of the service that a page links to where the service has them, by the paths of their routes
_PARTS: Final = (
    ("/costs", "/costs", "costs"),
    ("/budgets", "/budgets", "budgets"),
    ("/periods", "/periods", "periods"),
    ("/idle", "/idle", "idle resources"),
    ("/price-books", "/price-books", "price books"),
    ("/feeds/all.atom", "/feeds/all.atom", "feed"),
)

_ACRONYMS: Final = {
    "vcpu": "vCPU",
    "cpu": "CPU",
    "ram": "RAM",
    "mb": "MB",
    "gb": "GB",
    "ip": "IP",
    "iops": "IOPS",
}

router = APIRouter(include_in_schema=False)
_pages = Pages("hostler_usage")

_filled = BeforeValidator(lambda value: value or None)
_ShortText = Annotated[str, StringConstraints(max_length=255, pattern=r"^[^\x00]*$")]
Name = Annotated[_ShortText | None, _filled, Query()]
_MarkerText = Annotated[str, StringConstraints(max_length=2000, pattern=r"^[^\x00]*$")]
Marker = Annotated[_MarkerText | None, _filled, Query()]
Moment = Annotated[datetime | None, _filled, Query(description="UTC where it names no zone")]
Filled = _filled
"""For parameters of other types: an empty text is nothing."""
_MonthText = Annotated[str, StringConstraints(pattern=r"^(20|21)\d\d-(0[1-9]|1[0-2])$")]
Month = Annotated[_MonthText | None, _filled, Query()]
_BookText = Annotated[str, StringConstraints(pattern=f"^{NAME}(@[1-9][0-9]{{0,8}})?$")]
BookName = Annotated[_BookText | None, _filled, Query()]
DEFAULT_BOOK: Final = "default"
_DAY: Final = timedelta(days=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A month on a page, and its neighbours."""

    name: str
    window: Window
    before: str
    after: str | None


class StaticNotFound(errors.NotFound):
    """The pages have no such file."""

    code = "usage.static.not_found"


class MomentInvalid(errors.Invalid):
    """The moment lies outside the calendar in UTC."""

    code = "usage.moment.invalid"


class OtherSite(errors.Forbidden):
    """The change was not asked for on one of this service's own pages."""

    code = "usage.page.other_site"


@router.get("/static/usage/{name}", dependencies=[Depends(auth.public)])
async def static_file(name: str) -> Response:
    """One of the pages' own files. They hold nothing of anybody's, so everybody may read them."""
    content = _STATIC.get(name)
    if content is None:
        raise StaticNotFound(f"there is no {name}")
    media_type = next(kind for end, kind in _MEDIA_TYPES.items() if name.endswith(end))
    # their addresses change with what is in them
    headers = {"Cache-Control": "public, max-age=31536000, immutable"}
    return Response(content, media_type=media_type, headers=headers)


def render(request: Request, template: str, **context: Any) -> HTMLResponse:  # noqa: ANN401
    """The template as a page, with links to the parts that this service has."""
    paths = route_paths(request)
    return _pages.render(
        request,
        template,
        static=_ADDRESSES,
        parts=[(href, name) for path, href, name in _PARTS if path in paths],
        spelled=spelled,
        explained=explained,
        query=request.query_params,
        other_page=lambda **changed: _address(request, changed),
        **context,
    )


def shown_month(name: str | None, now: datetime) -> Shown:
    """The month of that name, or the one that is now: the future has no usage yet."""
    this = now.strftime("%Y-%m")
    name = min(name or this, this)
    start = datetime.strptime(name, "%Y-%m").replace(tzinfo=UTC)
    end = (start + 31 * _DAY).replace(day=1)
    return Shown(
        name=name,
        window=Window(start=start, end=end, as_of=now),
        before=(start - _DAY).strftime("%Y-%m"),
        after=end.strftime("%Y-%m") if end <= now else None,
    )


def spelled(name: str) -> str:
    """A name of the API's as words."""
    return " ".join(_ACRONYMS.get(word, word) for word in name.split("_"))


def explained(measure: str, window: Window, group: Mapping[str, str | None]) -> str:
    """Where a number of usage is explained: a measure in a window, of a group."""
    moments = {"start": window.start, "end": window.end, "as_of": window.as_of}
    question = {
        "measure": measure,
        **{name: at.isoformat().replace("+00:00", "Z") for name, at in moments.items()},
        **{name: value or "" for name, value in group.items()},
    }
    return f"/explain?{urlencode(question, safe=':')}"


def route_paths(request: Request) -> frozenset[str]:
    """The paths of the service's routes, as they are declared."""
    return frozenset(str(route.path) for route in iter_route_contexts(request.app.routes))


def _address(request: Request, changed: Mapping[str, object]) -> str:
    """The page's own address with some parameters changed; a marker is of one question only."""
    kept = request.url.remove_query_params(["marker", "done"])
    return kept.include_query_params(**changed).query


def in_utc(moment: datetime | None) -> datetime | None:
    """The moment in UTC, which is also what one without a zone means.

    Raises:
        MomentInvalid: it has none, being outside the calendar there.
    """
    if moment is None:
        return None
    if moment.tzinfo is None:
        return moment.replace(tzinfo=UTC)
    try:
        return moment.astimezone(UTC)
    except OverflowError as exc:
        raise MomentInvalid("the time lies outside the calendar in UTC") from exc


async def _own_pages_only(request: Request) -> None:
    site = request.headers.get("sec-fetch-site")
    if site is None:  # not sent to plain HTTP on another host than this one
        origin = request.headers.get("origin", "")
        is_own = origin.partition("://")[2] == request.headers.get("host")
    else:
        is_own = site == "same-origin"
    if not is_own:
        raise OtherSite("this is for this service's own pages: use the API elsewhere")


own_pages_only: Any = Depends(_own_pages_only)
"""The dependency of a form's route: the request comes from a page of this service."""
