"""What an image is to precache: a name, where its bytes are, and what they must hash to.

An image id becomes part of file names on hosts and of URLs, so it is checked once, here.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from hostler_precache.transfer.manifest import ImageId

IMAGE_ID_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
_IMAGE_ID: Final = re.compile(IMAGE_ID_PATTERN.rstrip("$") + r"\Z")
# Glance's own, but for the location
MAX_CHARACTERS: Final[Mapping[str, int]] = {"location": 4096, "name": 255, "disk_format": 20}
# what Glance may be configured with (os_hash_algo) and hashlib has in every build
HASH_ALGORITHMS: Final = frozenset(
    {"sha256", "sha384", "sha512", "sha3_256", "sha3_384", "sha3_512", "blake2b", "blake2s"}
)


class Verification(StrEnum):
    """How far the source's bytes could be checked against what the source says of them."""

    HASH = "hash"
    """Against `os_hash_value`."""
    CHECKSUM = "checksum"
    """Against an md5 `checksum` only: it finds damage, not malice."""
    UNVERIFIABLE = "unverifiable"
    """The source says nothing of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceHash:
    """What the whole image hashes to, as its source says: lower-case hexadecimal."""

    algorithm: str
    value: str

    @property
    def verification(self) -> Verification:
        """What a match is worth."""
        return Verification.CHECKSUM if self.algorithm == "md5" else Verification.HASH


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An image that some lister named."""

    image_id: ImageId
    fetcher: str
    location: str = ""
    name: str | None = None
    size_bytes: int | None = None
    disk_format: str | None = None
    source_hash: SourceHash | None = None


def image_id(text: str) -> ImageId:
    """The text as an image id.

    Raises:
        ValueError: it could not be a file name and a path segment everywhere.
    """
    if not _IMAGE_ID.match(text):
        raise ValueError(f"not an image id: {text[:200]!r}")
    return ImageId(text)


def source_hash(
    algorithm: str | None, value: str | None, checksum: str | None
) -> SourceHash | None:
    """The best that a source says of its bytes: its hash, else its md5, else nothing.

    Raises:
        ValueError: it names a hash that we cannot compute, or a value that is not one.
    """
    if algorithm and value:
        algorithm = algorithm.lower().replace("-", "_").removesuffix("_")
        if algorithm not in HASH_ALGORITHMS:
            raise ValueError(f"hash algorithm {algorithm!r} is not supported")
    elif checksum:
        algorithm, value = "md5", checksum
    else:
        return None
    value = value.lower()
    length = 2 * hashlib.new(algorithm, usedforsecurity=False).digest_size
    if not re.fullmatch(r"[0-9a-f]+", value) or len(value) != length:
        raise ValueError(f"not a value of {algorithm}")
    return SourceHash(algorithm=algorithm, value=value)


def is_hash(known: SourceHash) -> bool:
    """Whether it is one that `source_hash` could have made, and so one that bytes can be compared with."""
    if not (isinstance(known.algorithm, str) and isinstance(known.value, str)):
        return False
    is_md5 = known.algorithm == "md5"
    try:
        made = source_hash(
            None if is_md5 else known.algorithm, known.value, known.value if is_md5 else None
        )
    except ValueError:
        return False
    return made == known
