"""Where images come from is pluggable: the two protocols, and how an implementation is found.

A lister says which images there are, a fetcher opens the bytes of one. Implementations are named
by entry points (`hostler.precache.listers`, `hostler.precache.fetchers`), built once per process
with `Surroundings`, and raise `SourceError` only.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import aiohttp
from pydantic import SecretStr

from hostler_precache.images import Image

LISTERS = "hostler.precache.listers"
FETCHERS = "hostler.precache.fetchers"


class SourceError(Exception):
    """Why a source gave no image. `reason` is a stable word; `is_transient` says: try again."""

    def __init__(self, reason: str, detail: str, *, is_transient: bool = False) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.is_transient = is_transient


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a plugin is built with."""

    session: aiohttp.ClientSession
    glance_url: str | None = None
    glance_token: SecretStr | None = None
    file_roots: Sequence[Path] = ()


def glance_headers(surroundings: Surroundings) -> dict[str, str]:
    """What a request to Glance carries."""
    token = surroundings.glance_token
    return {"X-Auth-Token": token.get_secret_value()} if token else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The bytes of an image, opened: one sequential stream, and its length where it is known."""

    size_bytes: int | None
    chunks: AsyncIterator[bytes]


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


class UnknownPluginError(LookupError):
    """No implementation of that name is installed; the text names those that are."""


class Plugins:
    """The installed listers and fetchers, built on first use."""

    def __init__(self, surroundings: Surroundings) -> None:
        self._surroundings = surroundings
        self._built: dict[tuple[str, str], Any] = {}

    def lister(self, name: str) -> Lister:
        """The lister of that name.

        Raises:
            UnknownPluginError: there is none.
        """
        lister: Lister = self._build(LISTERS, name)
        return lister

    def fetcher(self, name: str) -> Fetcher:
        """The fetcher of that name.

        Raises:
            UnknownPluginError: there is none.
        """
        fetcher: Fetcher = self._build(FETCHERS, name)
        return fetcher

    def _build(self, group: str, name: str) -> Any:  # noqa: ANN401  the callers name the type
        if (group, name) not in self._built:
            self._built[group, name] = _entry_point(group, name).load()(self._surroundings)
        return self._built[group, name]


def check_installed(group: str, name: str) -> None:
    """Return if there is such a plugin.

    Raises:
        UnknownPluginError: there is none.
    """
    _entry_point(group, name)


def _entry_point(group: str, name: str) -> metadata.EntryPoint:
    installed = metadata.entry_points(group=group)
    if name not in installed.names:
        known = ", ".join(sorted(installed.names))
        raise UnknownPluginError(f"{name!r} is not installed; there are: {known}")
    return installed[name]
