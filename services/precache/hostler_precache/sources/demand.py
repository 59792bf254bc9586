"""Which images people launch most: asked of usage, described by Glance.

Usage tells which instances were created in a window (`/v1/operations`) and which image each of
those that ran in it had (`/v1/usage` by image and resource); together they are launches an image.
"""

from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hostler_common import client, errors
from hostler_precache.images import Image
from hostler_precache.sources.listers import MAX_PAGES, glance_image, wrong_options
from hostler_precache.sources.plugins import Surroundings
from hostler_precache.sources.source import SourceError

_PAGE: Final = 1000
# what usage calls a create that ended well, whether or not its start was heard
_LAUNCHED: Final = frozenset({"succeeded", "lost_start"})


class DemandOptions(BaseModel):
    """Options of the demand lister: the `top` images by instances launched in the last `days`."""

    model_config = ConfigDict(extra="forbid")

    top: int = Field(10, ge=1, le=1000)
    days: float = Field(7, gt=0, le=366)
    region: str | None = Field(None, max_length=255)
    min_launches: int = Field(1, ge=1, description="images launched less often are left out")


class _Operation(BaseModel):
    model_config = ConfigDict(extra="ignore")

    resource_id: str
    outcome: str


class _Operations(BaseModel):
    model_config = ConfigDict(extra="ignore")

    operations: list[_Operation]
    next_marker: str | None


class _Group(BaseModel):
    model_config = ConfigDict(extra="ignore")

    image: str | None = None
    resource: str | None = None


class _Item(BaseModel):
    model_config = ConfigDict(extra="ignore")

    group: _Group


class _Usage(BaseModel):
    model_config = ConfigDict(extra="ignore")

    usage: list[_Item]
    next_marker: str | None


class DemandLister:
    """The images launched most often lately, the most wanted first, as far as Glance still has them."""

    def __init__(self, surroundings: Surroundings) -> None:
        self._surroundings = surroundings

    async def list(self, options: Mapping[str, Any]) -> Sequence[Image]:
        """The most wanted images; see `plugins.Lister`."""
        try:
            wanted = DemandOptions.model_validate(options)
        except ValidationError as exc:
            raise wrong_options(exc) from exc
        url = self._surroundings.usage_url
        if url is None:
            raise SourceError("source.not_configured", "usage_url is not set")
        glance = self._surroundings.glance()
        found: list[Image] = []
        async with client.open_api(url, token=self._surroundings.usage_token) as usage:
            counts = await self._launches(usage, wanted)
        for image_id in ranked(counts, min_launches=wanted.min_launches):
            image = await glance_image(glance, image_id)
            if image is not None:
                found.append(image)
            if len(found) == wanted.top:
                break
        return found

    async def _launches(self, usage: client.Api, wanted: DemandOptions) -> Counter[str]:
        end = datetime.now(UTC)
        window = {
            "start": (end - timedelta(days=wanted.days)).isoformat(),
            "end": end.isoformat(),
            "region": wanted.region,
            "resource_type": "instance",
            "limit": _PAGE,
        }
        try:
            launches = Counter(
                [
                    operation.resource_id
                    async for page in _pages(usage, "/v1/operations", action="create", **window)
                    for operation in _Operations.model_validate(page).operations
                    if operation.outcome in _LAUNCHED
                ]
            )
            image_of = {
                item.group.resource: item.group.image
                async for page in _pages(usage, "/v1/usage", group_by="image,resource", **window)
                for item in _Usage.model_validate(page).usage
            }
        except ValidationError as exc:
            raise SourceError("source.malformed", "usage answered something else") from exc
        except errors.Unavailable as exc:
            raise SourceError("source.unreachable", exc.detail, is_transient=True) from exc
        except errors.HostlerError as exc:
            raise SourceError("source.refused", f"usage says: {exc.detail}") from exc
        counts: Counter[str] = Counter()
        for instance, times in launches.items():
            image = image_of.get(instance)
            if image:  # without: booted from a volume
                counts[image] += times
        return counts


def ranked(counts: Mapping[str, int], *, min_launches: int) -> Sequence[str]:
    """The images launched so often at least, the most wanted first; equals in order of their ids."""
    wanted = [image for image, count in counts.items() if count >= min_launches]
    return sorted(wanted, key=lambda image: (-counts[image], image))


async def _pages(usage: client.Api, path: str, **params: object) -> AsyncIterator[object]:
    marker = None
    for _ in range(MAX_PAGES):
        page = await usage.get(path, marker=marker, **params)
        yield page
        marker = page.get("next_marker") if isinstance(page, dict) else None
        if marker is None:
            return
    raise SourceError("source.malformed", f"usage's answer has no end after {MAX_PAGES} pages")
