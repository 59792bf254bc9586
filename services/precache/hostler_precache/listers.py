"""Which images to put on hosts: a list in the policy itself, or a query of Glance v2."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal
from urllib.parse import urljoin, urlsplit

import aiohttp
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hostler_precache import images, plugins
from hostler_precache.images import Image
from hostler_precache.plugins import SourceError, Surroundings

_TIMEOUT: Final = aiohttp.ClientTimeout(total=60)
MAX_PAGES: Final = 10_000


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ListedImage(_Options):
    """An image as a static list, or a request, names it."""

    image_id: Annotated[str, Field(pattern=images.IMAGE_ID_PATTERN)]
    fetcher: str = "http"
    location: str = Field("", max_length=4096, description="what the fetcher needs to find it")
    name: str | None = Field(None, max_length=255)
    size_bytes: Annotated[int, Field(ge=0)] | None = None
    disk_format: str | None = Field(None, max_length=20)
    os_hash_algo: str | None = Field(None, max_length=20)
    os_hash_value: str | None = Field(None, max_length=128)
    checksum: str | None = Field(None, max_length=32)

    def to_image(self) -> Image:
        """The domain's image.

        Raises:
            ValueError: the hash is not one.
        """
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


class GlanceOptions(_Options):
    """Options of the Glance lister: filters of `GET /v2/images`; all given ones must match."""

    owner: str | None = None
    visibility: Literal["public", "private", "shared", "community", "all"] | None = None
    tags: list[str] = []
    properties: dict[str, str] = {}
    name: str | None = None
    page_size: int = Field(100, ge=1, le=1000)


class _GlanceImage(BaseModel):
    """What is read of a Glance image; the rest of it is ignored."""

    model_config = ConfigDict(extra="ignore")

    id: str
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
            raise _wrong_options(exc) from exc


class GlanceLister:
    """The active images of Glance that match, every page of them."""

    def __init__(self, surroundings: Surroundings) -> None:
        self._session = surroundings.session
        self._url = surroundings.glance_url
        self._surroundings = surroundings

    async def list(self, options: Mapping[str, Any]) -> Sequence[Image]:
        """The matching images; see `plugins.Lister`."""
        if self._url is None:
            raise SourceError("source.not_configured", "glance_url is not set")
        try:
            wanted = GlanceOptions.model_validate(options)
        except ValidationError as exc:
            raise _wrong_options(exc) from exc
        base = self._url.rstrip("/") + "/"
        found: list[Image] = []
        page = await self._page(urljoin(base, "v2/images"), _query(wanted))
        for _ in range(MAX_PAGES):
            found += [_to_image(image) for image in page.images]
            if page.next is None:
                return found
            # the token goes nowhere but to the endpoint that was configured
            following = urljoin(base, page.next)
            if urlsplit(following)[:2] != urlsplit(base)[:2]:
                raise SourceError("source.malformed", "the next page is on another server")
            page = await self._page(following, ())
        raise SourceError("source.malformed", f"the list has no end after {MAX_PAGES} pages")

    async def _page(self, url: str, query: Sequence[tuple[str, str]]) -> _GlancePage:
        headers = plugins.glance_headers(self._surroundings)
        try:
            async with self._session.get(
                url, params=query, headers=headers, timeout=_TIMEOUT
            ) as response:
                if response.status != 200:
                    raise SourceError(
                        "source.refused",
                        f"Glance answered {response.status}",
                        is_transient=response.status >= 500,
                    )
                return _GlancePage.model_validate_json(await response.read())
        except ValidationError as exc:
            raise SourceError("source.malformed", "not a list of Glance v2 images") from exc
        except (aiohttp.ClientError, TimeoutError) as exc:
            raise SourceError(
                "source.unreachable",
                f"Glance cannot be reached: {type(exc).__name__}",
                is_transient=True,
            ) from exc


def _query(options: GlanceOptions) -> list[tuple[str, str]]:
    query = [("status", "active"), ("limit", str(options.page_size)), ("sort", "created_at:asc")]
    query += [
        (name, value)
        for name, value in (
            ("owner", options.owner),
            ("visibility", options.visibility),
            ("name", options.name),
        )
        if value is not None
    ]
    query += [("tag", tag) for tag in options.tags]
    return query + list(options.properties.items())


def _to_image(image: _GlanceImage) -> Image:
    try:
        return Image(
            image_id=images.image_id(image.id),
            fetcher="glance",
            name=image.name,
            size_bytes=image.size,
            disk_format=image.disk_format,
            source_hash=images.source_hash(
                image.os_hash_algo, image.os_hash_value, image.checksum
            ),
        )
    except ValueError as exc:
        raise SourceError("source.malformed", f"image {image.id!r}: {exc}") from exc


def _wrong_options(exc: ValueError) -> SourceError:
    if isinstance(exc, ValidationError):
        parts = [
            f"{'.'.join(str(part) for part in error['loc'])}: {error['msg']}"
            for error in exc.errors(include_url=False, include_input=False, include_context=False)
        ]
        return SourceError("lister.options", "; ".join(parts))
    return SourceError("lister.options", str(exc))
