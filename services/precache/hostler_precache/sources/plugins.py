"""Where images come from, and how they leave, is pluggable: the protocols, and how one is found.

A lister says which images there are, a fetcher opens the bytes of one, a server sends what was
fetched. Implementations are named by entry points (`hostler.precache.listers`, `.fetchers`,
`.servers`) and built once per process: listers and fetchers with `Surroundings`, and they raise
`SourceError` only; a server with the `SeedSite` that it is to serve. One that cannot be built, or
is something else, is `BrokenPluginError` for whoever needs it, and nothing to anybody else.
"""

import ssl
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Final, Protocol

import aiohttp
from pydantic import SecretStr

from hostler_common.settings import SettingsError
from hostler_precache import entry_points, images
from hostler_precache.entry_points import BrokenPluginError, UnknownPluginError
from hostler_precache.images import Image, SourceHash
from hostler_precache.sources.access import ByKeystone, Fixed, Service, TempAuth
from hostler_precache.sources.keystone import Keystone
from hostler_precache.sources.source import Hole, Part, Source, SourceError
from hostler_precache.transfer.blobs import BlobServer

__all__ = [
    "FETCHERS",
    "LISTERS",
    "SERVERS",
    "BrokenPluginError",
    "Fetcher",
    "Hole",
    "Lister",
    "Part",
    "Plugins",
    "SeedSite",
    "Server",
    "Source",
    "SourceError",
    "Surroundings",
    "UnknownPluginError",
    "check_installed",
    "images_of",
    "server",
]

LISTERS = "hostler.precache.listers"
FETCHERS = "hostler.precache.fetchers"
SERVERS = "hostler.precache.servers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a plugin is built with."""

    session: aiohttp.ClientSession
    glance_url: str | None = None
    glance_token: SecretStr | None = None
    keystone: Keystone | None = None
    swift_tempauth: TempAuth | None = None
    usage_url: str | None = None
    usage_token: str | None = field(default=None, repr=False)
    file_roots: Sequence[Path] = ()

    def glance(self) -> Service:
        """Glance, with a token where one is configured; `glance_url` goes before the catalogue.

        Raises:
            SourceError: it is not configured.
        """
        if self.keystone is not None:
            authority = ByKeystone(self.keystone, "image", self.glance_url)
            return Service("Glance", self.session, authority)
        if self.glance_url is None:
            raise SourceError(
                "source.not_configured", "neither glance_url nor keystone_url is set"
            )
        return Service("Glance", self.session, Fixed(self.glance_url, self.glance_token))

    def swift(self) -> Service:
        """Swift's account: that of the configured user, or of Keystone's project.

        Raises:
            SourceError: it is not configured.
        """
        if self.swift_tempauth is not None:
            return Service("Swift", self.session, self.swift_tempauth)
        if self.keystone is None:
            raise SourceError(
                "source.not_configured", "neither swift_auth_url nor keystone_url is set"
            )
        return Service("Swift", self.session, ByKeystone(self.keystone, "object-store"))


class Lister(Protocol):
    """Says which images a policy wants on its hosts."""

    async def list(self, options: Mapping[str, Any]) -> Sequence[Image]:
        """The images that match the options, all pages of them.

        Raises:
            SourceError: the options are wrong, or the source does not answer as it should.
        """


class Fetcher(Protocol):
    """Opens the bytes of an image."""

    def open(self, image: Image) -> AbstractAsyncContextManager[Source]:
        """The stream of the image, closed on leaving.

        Raises:
            SourceError: there is no such image, or it broke off; also while it is being read.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedSite:
    """What a server serves, and where.

    In `directory` a complete blob is a file by its id; those that hosts may have now are in
    `blobs`, also while they are being fetched. `url` is where hosts reach the server, if the
    operator says so; `host` and `port` are what it may listen on, `tls` what pieces travel over.
    """

    directory: Path
    blobs: BlobServer
    host: str
    port: int
    url: str | None
    tls: ssl.SSLContext | None
    drain_seconds: float


class Server(Protocol):
    """Sends the pieces of a seed's images to hosts."""

    def serving(self) -> AbstractAsyncContextManager[str]:
        """Inside, hosts are served; on leaving no more, and what was begun is finished or cut off.

        Gives the URL that hosts are told: a blob is at `<url>/v1/blobs/<blob_id>`, by ranges and
        with the token of its swarm, as the agents' own server has it.
        """


class Plugins:
    """The installed listers and fetchers, built on first use."""

    def __init__(self, surroundings: Surroundings) -> None:
        self._surroundings = surroundings
        self._built: dict[tuple[str, str], Any] = {}

    def lister(self, name: str) -> Lister:
        """The lister of that name.

        Raises:
            UnknownPluginError: there is none.
            BrokenPluginError: it is of no use.
        """
        lister: Lister = self._build(LISTERS, name, Lister)
        return lister

    def fetcher(self, name: str) -> Fetcher:
        """The fetcher of that name.

        Raises:
            UnknownPluginError: there is none.
            BrokenPluginError: it is of no use.
        """
        fetcher: Fetcher = self._build(FETCHERS, name, Fetcher)
        return fetcher

    def _build(self, group: str, name: str, kind: type) -> Any:  # noqa: ANN401  the callers name the type
        if (group, name) not in self._built:
            try:
                made = entry_points.build(group, name, self._surroundings, kind)
            except SettingsError as exc:  # of the plugin's own: whoever needs it is told
                raise BrokenPluginError(f"{name!r}: {exc}") from exc
            self._built[group, name] = made
        return self._built[group, name]


_KINDS: Final[Mapping[str, type | UnionType]] = {
    "image_id": str,
    "fetcher": str,
    "location": str,
    "name": str | None,
    "size_bytes": int | None,
    "disk_format": str | None,
    "source_hash": SourceHash | None,
}


def images_of(listed: object) -> Sequence[Image]:
    """What a lister gave, if it is what listers give: images, each with an id that files may have.

    It is read once, and is a list from then on.

    Raises:
        BrokenPluginError: it is not.
    """
    # an empty text would be a sequence too, and let go of all that the policy has distributed
    if isinstance(listed, str | bytes) or not isinstance(listed, Sequence):
        raise BrokenPluginError(
            f"it lists a {type(listed).__name__}, which is no sequence of images"
        )
    found = list(listed)
    for image in found:
        if not isinstance(image, Image):
            raise BrokenPluginError(f"it lists a {type(image).__name__}, which is no Image")
        _check_fields(image)
    return found


def _check_fields(image: Image) -> None:
    for name, kind in _KINDS.items():
        value = getattr(image, name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise BrokenPluginError(f"it lists an Image whose {name} is a {type(value).__name__}")
    try:
        images.image_id(image.image_id)
    except ValueError as exc:
        raise BrokenPluginError(f"it lists what is {exc}") from exc
    for name, most in images.MAX_CHARACTERS.items():
        if len(getattr(image, name) or "") > most:
            raise BrokenPluginError(
                f"it lists an Image whose {name} has more than {most} characters"
            )
    if image.source_hash is not None and not images.is_hash(image.source_hash):
        raise BrokenPluginError("it lists an Image whose source_hash no bytes can have")


def server(name: str, site: SeedSite) -> Server:
    """The server of that name, for this seed.

    Raises:
        UnknownPluginError: there is none.
        BrokenPluginError: it is of no use.
    """
    made: Server = entry_points.build(SERVERS, name, site, Server)
    return made


def check_installed(group: str, name: str) -> None:
    """Return if there is such a plugin.

    Raises:
        UnknownPluginError: there is none.
    """
    entry_points.find(group, name)
