"""Where an image's file goes on a host, under which name, and who else looks after that place.

What the places have in common (one step into place, pinning, quota, repair) is `shelf`'s. What
differs is a `Placer`'s: the name, who else may be writing under it, who uses it. Placers are found
by entry point, group `hostler.precache.placers`.
"""

import hashlib
import string
from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final, Protocol

from hostler_precache.transfer.manifest import BlobId, ImageId

PLACERS: Final = "hostler.precache.placers"
NOVA_TEMPLATE: Final = "{sha1}"
HEAD_BYTES: Final = 512
"""How much of an image's beginning `foreign_format` has to see."""
_FIELDS: Final = frozenset({"image_id", "sha1"})
# what qemu-img takes by itself for something other than raw, by where its mark is
_MARKS: Final = (
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vhd"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"WithoutFreeSpace", "ploop"),
    (0, b"WithouFreSpacExt", "ploop"),
)
_RAW: Final = frozenset({"raw", "iso", "ami", "aki", "ari"})


class UnsupportedError(Exception):
    """This image cannot be put into files on this host; the text says why, and begins with a word."""


class UsersUnknownError(Exception):
    """It cannot be told who uses the files here, so all of them count as used."""


class Outcome(StrEnum):
    """How an image came to be in its place."""

    PLACED = "placed"
    """By us."""
    EXISTING = "existing"
    """By somebody else, in the same bytes, while we were fetching."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """An image that should be on this host. `disk_format` is that of the bytes distributed."""

    image_id: ImageId
    blob_id: BlobId
    disk_format: str | None = None


class Placer(Protocol):
    """A place for images: a directory that belongs to somebody else, and that somebody's rules."""

    @property
    def directory(self) -> Path:
        """Where the final files are; `.precache/` in it is ours, and its owner leaves it alone."""

    @property
    def cleaner_age_seconds(self) -> float | None:
        """The place's owner removes unused files whose mtime is older; None: it removes none."""

    @property
    def use_seconds(self) -> float:
        """Somebody else's touch says for how long that the file is in use."""

    @property
    def needs_link(self) -> bool:
        """Whether it is a second link that keeps a file, rather than its mtime."""

    @property
    def is_raw_only(self) -> bool:
        """Whether what is there is raw by rule, so that other bytes would be taken for raw."""

    def target(self, wanted: Wanted) -> Path:
        """The final path.

        Raises:
            UnsupportedError: the image cannot be placed here.
        """

    def exclusively(
        self, target: Path, *, patience_seconds: float
    ) -> AbstractContextManager[None]:
        """While inside, nobody who keeps to the owner's rules fetches, uses anew or removes it.

        Raises:
            pieces.PieceStoreError: somebody else is at it, or the rules cannot be kept.
        """

    def in_use(self, targets: Collection[Path], *, own_links: int) -> set[Path]:
        """Those of the files that something on this host needs; `own_links` names each are ours.

        Raises:
            UsersUnknownError: not all of the places to look at could be read.
        """


def check_template(template: str) -> str:
    """The template, if every image gets a name of its own from it, inside the directory.

    Raises:
        ValueError: it names no field of the image, another field, or a path.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as exc:
        raise ValueError(f"not a template: {exc}") from exc
    fields = {name for _, name, _, _ in parts if name is not None}
    if not fields or fields - _FIELDS or any(spec or conv for _, _, spec, conv in parts):
        raise ValueError("a template has {image_id} or {sha1}, and no other field")
    if "/" in template or template.startswith(".") or "\0" in template:
        raise ValueError("a template is the name of a file, and no hidden one")
    return template


def target(directory: Path, template: str, image_id: ImageId) -> Path:
    """The final path of an image's file; `{sha1}` is Nova's own name for a base file in `_base`.

    Nova's is `get_cache_fname` of nova/virt/libvirt/imagecache.py.

    Raises:
        ValueError: the template is not one.
    """
    sha1 = hashlib.sha1(image_id.encode(), usedforsecurity=False).hexdigest()
    return directory / check_template(template).format(image_id=image_id, sha1=sha1)


def foreign_format(head: bytes) -> str | None:
    """The format that a program which guesses would take these first `HEAD_BYTES` for, unless raw.

    Who writes a qcow2 header to the front of an image that is called raw may have any file of the
    host read as its backing file (OpenStack's bug 2059809).
    """
    for offset, mark, name in _MARKS:
        if head[offset : offset + len(mark)] == mark:
            return name
    return None


def check_is_raw(disk_format: str | None, owner: str) -> None:
    """Return if an image of that format, as far as it is known, is raw.

    Raises:
        UnsupportedError: it is not, with what to do about it.
    """
    if disk_format is not None and disk_format not in _RAW:
        raise UnsupportedError(
            f"image.not_raw: it is {disk_format}, and {owner} keeps raw files here: have it"
            " converted before it is distributed"
        )
