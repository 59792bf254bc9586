"""What the HTTP APIs of operators share: shapes of bodies, and what is checked in all of them."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from hostler_common import errors
from hostler_precache import protocol
from hostler_precache.images import IMAGE_ID_PATTERN, Image
from hostler_precache.sources import plugins
from hostler_precache.sources.listers import ListedImage
from hostler_precache.store import MAX_BIGINT

ImageIdText = Annotated[str, Field(pattern=IMAGE_ID_PATTERN)]
HostNames = Annotated[list[protocol.HostName], Field(min_length=1, max_length=20_000)]


class PluginUnknown(errors.Invalid):
    """No lister or fetcher of that name is installed."""

    code = "precache.plugin.unknown"


class Request(BaseModel):
    """A body that is sent to us: a field that we do not know is an error."""

    model_config = ConfigDict(extra="forbid")


class View(BaseModel):
    """A body that we send."""

    model_config = ConfigDict(from_attributes=True)


def image_of(listed: ListedImage) -> Image:
    """The image that a body describes.

    Raises:
        PluginUnknown: no fetcher of that name is installed.
        Invalid: its fields do not go together.
    """
    check_plugin(plugins.FETCHERS, listed.fetcher)
    if listed.size_bytes is not None and listed.size_bytes > MAX_BIGINT:
        raise errors.Invalid("size_bytes is more than there can be")
    try:
        return listed.to_image()
    except ValueError as exc:
        raise errors.Invalid(str(exc)) from exc


def check_plugin(group: str, name: str) -> None:
    """The plugin is installed.

    Raises:
        PluginUnknown: it is not.
    """
    try:
        plugins.check_installed(group, name)
    except plugins.UnknownPluginError as exc:
        raise PluginUnknown(str(exc)) from exc
