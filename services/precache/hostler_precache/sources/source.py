"""The words of where bytes come from: an opened source, its holes, what it says of its parts, and why it failed."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

from hostler_precache.images import SourceHash


class SourceError(Exception):
    """Why a source gave no image. `reason` is a stable word; `is_transient` says: try again."""

    def __init__(self, reason: str, detail: str, *, is_transient: bool = False) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.is_transient = is_transient


@dataclass(frozen=True, slots=True, kw_only=True)
class Hole:
    """A run of zeros that nobody had to read or send."""

    length_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A run of bytes of which the source knows the hash, as the segment of a large object."""

    length_bytes: int
    source_hash: SourceHash


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The bytes of an image, opened: one sequential stream, and what is known of it beforehand.

    `allocated_bytes` is how much of it is not holes, where that is known. `parts`, where there are
    any, cover the whole stream in order; whoever reads the stream checks them.

    `skip(n)`, called before the first chunk is asked for, lets the stream begin at byte n; False where
    the source gives it from its start only, which it does then. `skip(0)` takes it back. It raises
    `SourceError`.
    """

    size_bytes: int | None
    chunks: AsyncIterator[bytes | Hole]
    allocated_bytes: int | None = None
    parts: Sequence[Part] = ()
    skip: Callable[[int], Awaitable[bool]] | None = None
