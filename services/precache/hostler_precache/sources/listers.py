"""Which images to put on hosts: a list in the policy itself or at an URL, or a query of Glance v2."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal
from urllib.parse import parse_qsl, quote, urlsplit

import aiohttp
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from hostler_precache import images
from hostler_precache.images import Image, SourceHash
from hostler_precache.sources.access import Service
from hostler_precache.sources.plugins import Surroundings
from hostler_precache.sources.source import SourceError

_TIMEOUT: Final = aiohttp.ClientTimeout(total=60)
MAX_PAGES: Final = 10_000
MAX_LIST_BYTES: Final = 16 * 1024 * 1024
# what Glance takes as a query of its own, so that no property can be asked by that name
_GLANCES_OWN: Final = frozenset(
    {"created_at", "id", "limit", "marker", "member_status", "name", "os_hidden", "owner", "sort", "sort_dir",
     "sort_key", "status", "tag", "updated_at", "visibility"}
)  # fmt: skip


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ListedImage(_Options):
    """An image as a static list, or a request, names it."""

    image_id: Annotated[str, Field(pattern=images.IMAGE_ID_PATTERN)]
    fetcher: str = "http"
    location: str = Field(
        "",
        max_length=images.MAX_CHARACTERS["location"],
        description="what the fetcher needs to find it",
    )
    name: str | None = Field(None, max_length=images.MAX_CHARACTERS["name"])
    size_bytes: Annotated[int, Field(ge=0)] | None = None
    disk_format: str | None = Field(None, max_length=images.MAX_CHARACTERS["disk_format"])
    os_hash_algo: str | None = Field(None, max_length=20)
    os_hash_value: str | None = Field(None, max_length=128)
    checksum: str | None = Field(None, max_length=32)

    def to_image(self) -> Image:
        """The domain's image.

        Raises:
            ValueError: the hash is not one, or nobody says which.
        """
        if bool(self.os_hash_algo) != bool(self.os_hash_value):
            raise ValueError("os_hash_algo and os_hash_value are named together, or neither is")
        return Image(
            image_id=images.image_id(self.image_id),
            fetcher=self.fetcher,
            location=self.location,
            name=self.name,
            size_bytes=self.size_bytes,
            disk_format=self.disk_format,
            source_hash=images.source_hash(self.os_hash_algo, self.os_hash_value, self.checksum),
        )


class StaticOptions(_Options):
    """Options of the static lister: the list."""

    images: list[ListedImage]


class HttpOptions(_Options):
    """Options of the HTTP lister."""

    url: str = Field(pattern=r"^https?://", max_length=4096)


class GlanceOptions(_Options):
    """Options of the Glance lister: filters of `GET /v2/images`; all given ones must match."""

    owner: str | None = None
    visibility: Literal["public", "private", "shared", "community", "all"] | None = None
    tags: list[str] = []
    properties: dict[str, str] = {}
    name: str | None = None
    os_hidden: bool | None = None
    updated_at: str | None = Field(
        None,
        pattern=r"^(gt|gte|lt|lte|eq|neq):\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$",
        description="as Glance takes it: an operator and a moment, gte:2026-01-31T00:00:00Z",
    )
    page_size: int = Field(100, ge=1, le=1000)

    @field_validator("properties")
    @classmethod
    def _are_properties(cls, properties: dict[str, str]) -> dict[str, str]:
        taken = sorted(_GLANCES_OWN & set(properties))
        if taken:
            raise ValueError(f"{', '.join(taken)} is Glance's own filter, and no property")
        return properties


class _GlanceImage(BaseModel):
    """What is read of a Glance image; the rest of it is ignored."""

    model_config = ConfigDict(extra="ignore")

    id: str
    status: str
    name: str | None = None
    size: int | None = None
    disk_format: str | None = None
    os_hash_algo: str | None = None
    os_hash_value: str | None = None
    checksum: str | None = None


class _GlancePage(BaseModel):
    model_config = ConfigDict(extra="ignore")

    images: list[_GlanceImage]
    next: str | None = None


class StaticLister:
    """The images that the policy itself lists."""

    def __init__(self, surroundings: Surroundings) -> None:
        del surroundings  # it asks nobody

    async def list(self, options: Mapping[str, Any]) -> Sequence[Image]:
        """The images of the options; see `plugins.Lister`."""
        try:
            return [listed.to_image() for listed in StaticOptions.model_validate(options).images]
        except ValueError as exc:
            raise wrong_options(exc) from exc


class HttpLister:
    """The images of a JSON document at an URL: what the static lister's options hold."""

    def __init__(self, surroundings: Surroundings) -> None:
        self._session = surroundings.session

    async def list(self, options: Mapping[str, Any]) -> Sequence[Image]:
        """The images of the document as it is now; see `plugins.Lister`."""
        try:
            url = HttpOptions.model_validate(options).url
        except ValidationError as exc:
            raise wrong_options(exc) from exc
        try:
            async with self._session.get(url, timeout=_TIMEOUT) as response:
                if response.status != 200:
                    raise _refused("the list", response.status)
                body = await response.content.read(MAX_LIST_BYTES + 1)
                while len(body) <= MAX_LIST_BYTES and (more := await response.content.readany()):
                    body += more
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError, UnicodeError) as exc:
            raise SourceError("lister.options", "url: cannot be asked") from exc
        except (aiohttp.ClientError, TimeoutError) as exc:
            raise _unreachable("the list", exc) from exc
        if len(body) > MAX_LIST_BYTES:
            raise SourceError("source.malformed", f"the list is over {MAX_LIST_BYTES} bytes")
        try:
            document = StaticOptions.model_validate_json(body)
            return [listed.to_image() for listed in document.images]
        except ValueError as exc:
            said = wrong_options(exc).detail
            raise SourceError("source.malformed", f"the list at the URL: {said}") from exc


class GlanceLister:
    """The active images of Glance that match, every page of them."""

    def __init__(self, surroundings: Surroundings) -> None:
        self._surroundings = surroundings

    async def list(self, options: Mapping[str, Any]) -> Sequence[Image]:
        """The matching images; see `plugins.Lister`."""
        try:
            wanted = GlanceOptions.model_validate(options)
        except ValidationError as exc:
            raise wrong_options(exc) from exc
        glance = self._surroundings.glance()
        found: list[Image] = []
        query: Sequence[tuple[str, str]] = _query(wanted)
        for _ in range(MAX_PAGES):
            page = await _page(glance, query)
            found += [to_image(image) for image in page.images if image.status == "active"]
            if page.next is None:
                return found
            # only its query is taken: Glance does not know the prefix that a proxy puts before its path, and the
            # token goes nowhere but to the endpoint that was configured
            following = parse_qsl(urlsplit(page.next).query, keep_blank_values=True)
            if not following or following == query:
                raise SourceError("source.malformed", "the next page is the same again")
            query = following
        raise SourceError("source.malformed", f"the list has no end after {MAX_PAGES} pages")


async def _page(glance: Service, query: Sequence[tuple[str, str]]) -> _GlancePage:
    try:
        async with glance.get("v2/images", params=query, timeout=_TIMEOUT) as response:
            if response.status != 200:
                raise _refused("Glance", response.status)
            return _GlancePage.model_validate_json(await response.read())
    except ValidationError as exc:
        raise SourceError("source.malformed", "not a list of Glance v2 images") from exc
    except (aiohttp.ClientError, TimeoutError) as exc:
        raise _unreachable("Glance", exc) from exc


async def glance_image(glance: Service, image_id: str) -> Image | None:
    """The image of that id, if Glance has it and it is active.

    Raises:
        SourceError: Glance does not answer as it should.
    """
    path = f"v2/images/{quote(image_id, safe='')}"
    try:
        async with glance.get(path, timeout=_TIMEOUT) as response:
            if response.status in (403, 404):
                return None  # deleted, or not for us
            if response.status != 200:
                raise _refused("Glance", response.status)
            image = _GlanceImage.model_validate_json(await response.read())
    except ValidationError as exc:
        raise SourceError("source.malformed", "not a Glance v2 image") from exc
    except (aiohttp.ClientError, TimeoutError) as exc:
        raise _unreachable("Glance", exc) from exc
    return to_image(image) if image.status == "active" else None


def _query(options: GlanceOptions) -> list[tuple[str, str]]:
    query = [("status", "active"), ("limit", str(options.page_size)), ("sort", "created_at:asc")]
    hidden = None if options.os_hidden is None else str(options.os_hidden).lower()
    query += [
        (name, value)
        for name, value in (
            ("owner", options.owner),
            ("visibility", options.visibility),
            ("name", options.name),
            ("os_hidden", hidden),
            ("updated_at", options.updated_at),
        )
        if value is not None
    ]
    query += [("tag", tag) for tag in options.tags]
    return query + list(options.properties.items())


def to_image(image: _GlanceImage) -> Image:
    """The domain's image.

    Raises:
        SourceError: its id is none.
    """
    try:
        image_id = images.image_id(image.id)
    except ValueError as exc:
        raise SourceError("source.malformed", f"image {image.id!r}: {exc}") from exc
    return Image(
        image_id=image_id,
        fetcher="glance",
        name=image.name,
        size_bytes=image.size,
        disk_format=image.disk_format,
        source_hash=_best_hash(image),
    )


def _best_hash(image: _GlanceImage) -> SourceHash | None:
    # one image with a hash that nobody can compute must not hide the others
    for said in (
        (image.os_hash_algo, image.os_hash_value, None),
        (None, None, image.checksum),
    ):
        try:
            found = images.source_hash(*said)
        except ValueError:
            continue
        if found is not None:
            return found
    return None


def _refused(who: str, status: int) -> SourceError:
    return SourceError(
        "source.forbidden" if status in (401, 403) else "source.refused",
        f"{who} answered {status}",
        is_transient=status >= 500,
    )


def _unreachable(who: str, exc: BaseException) -> SourceError:
    return SourceError(
        "source.unreachable",
        f"{who} cannot be reached: {type(exc).__name__}",
        is_transient=True,
    )


def wrong_options(exc: ValueError) -> SourceError:
    """What is wrong with a lister's options, in words."""
    if isinstance(exc, ValidationError):
        parts = [
            f"{'.'.join(str(part) for part in error['loc'])}: {error['msg']}"
            for error in exc.errors(include_url=False, include_input=False, include_context=False)
        ]
        return SourceError("lister.options", "; ".join(parts))
    return SourceError("lister.options", str(exc))
