"""A lister, a fetcher, a server and a placer of somebody else's, and some that are broken, as their package has them.

It is a part of no service: a test installs it by itself. Its images are gzip files in a directory, each named
`<image id>.gz`, which no fetcher of hostler's reads.
"""

import asyncio
import contextlib
import dataclasses
import gzip
import hashlib
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hostler_precache import images
from hostler_precache.images import Image
from hostler_precache.placing.placement import Wanted
from hostler_precache.settings import AgentSettings
from hostler_precache.sources.plugins import SeedSite, Source, SourceError, Surroundings
from hostler_precache.transfer.seed_server import HttpServer

READ_BYTES = 64 * 1024


class Archive:
    """Lists what is in `directory`, an option of the policy."""

    def __init__(self, surroundings: Surroundings) -> None:
        del surroundings

    async def list(self, options: Mapping[str, Any]) -> Sequence[Image]:
        """An image of each file."""
        return await asyncio.to_thread(_images_in, Path(options["directory"]))


def _images_in(directory: Path) -> Sequence[Image]:
    return [
        Image(
            image_id=images.image_id(path.stem),
            fetcher="foreign-gzip",
            location=str(path),
            disk_format="raw",
            source_hash=images.source_hash(
                "sha256", hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest(), None
            ),
        )
        for path in sorted(directory.glob("*.gz"))
    ]


class Gzip:
    """Reads what is inside of a gzip file."""

    def __init__(self, surroundings: Surroundings) -> None:
        del surroundings

    @contextlib.asynccontextmanager
    async def open(self, image: Image) -> AsyncIterator[Source]:
        """A stream of an unknown length."""
        try:
            file = await asyncio.to_thread(gzip.open, image.location)
        except OSError as exc:
            raise SourceError("foreign.unreadable", f"{image.location}: {exc.strerror}") from exc

        async def chunks() -> AsyncIterator[bytes]:
            while chunk := await asyncio.to_thread(file.read, READ_BYTES):
                yield chunk

        with file:
            yield Source(size_bytes=None, chunks=chunks())


class ByName:
    """Has hosts ask for pieces by a name, and not by an address."""

    def __init__(self, site: SeedSite) -> None:
        self._server = HttpServer(dataclasses.replace(site, url=f"http://localhost:{site.port}"))

    def serving(self) -> contextlib.AbstractAsyncContextManager[str]:
        """As hostler's own does."""
        return self._server.serving()


class Cellar:
    """Images are `cellar-<image id>`, and nobody else looks after them."""

    cleaner_age_seconds: float | None = None
    use_seconds = 0.0
    needs_link = False
    is_raw_only = True

    def __init__(self, settings: AgentSettings) -> None:
        self.directory = settings.target_dir

    def target(self, wanted: Wanted) -> Path:
        """The final path."""
        return self.directory / f"cellar-{wanted.image_id}"

    @contextlib.contextmanager
    def exclusively(self, target: Path, *, patience_seconds: float) -> Iterator[None]:
        """There is nobody."""
        del target, patience_seconds
        yield

    def in_use(self, targets: Collection[Path], *, own_links: int) -> set[Path]:
        """None is."""
        del targets, own_links
        return set()


class Nothing:
    """Is none of them."""

    def __init__(self, given: object) -> None:
        del given


class Liar:
    """Lists whatever the policy has it list, by a word."""

    def __init__(self, surroundings: Surroundings) -> None:
        del surroundings

    async def list(self, options: Mapping[str, Any]) -> Any:
        """Not what it should."""
        whole: dict[str, Any] = {"image_id": "image-1", "fetcher": "http"}
        return {
            "nothing": None,
            "text": "",
            "texts": ["image-1"],
            "path": [Image(**whole | {"image_id": "../../etc/passwd"})],
            "number": [Image(**whole | {"image_id": 5})],
            "size": [Image(**whole, size_bytes="5")],  # type: ignore[arg-type]
            "hash": [Image(**whole, source_hash="sha512:00")],  # type: ignore[arg-type]
        }[options["lists"]]


class Ended(BaseException):
    """Nobody's error."""


class Ender:
    """A lister and a fetcher that would take with it whoever asks, by a word."""

    def __init__(self, surroundings: Surroundings) -> None:
        del surroundings

    async def list(self, options: Mapping[str, Any]) -> Sequence[Image]:
        """Nothing."""
        raise _ending(options["by"])

    @contextlib.asynccontextmanager
    async def open(self, image: Image) -> AsyncIterator[Source]:
        """A byte, and the end."""

        async def chunks() -> AsyncIterator[bytes]:
            yield b"0"
            raise _ending(image.location)

        yield Source(size_bytes=None, chunks=chunks())


def _ending(word: str) -> BaseException:
    return {
        "exit": SystemExit(0),
        "interrupt": KeyboardInterrupt(),
        "cancel": asyncio.CancelledError(),
        "own": Ended(),
    }[word]
