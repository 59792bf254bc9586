"""Ironic's cache of instance images on a conductor: `master_images/<image id>.converted`.

By ironic/drivers/modules/image_cache.py: a Glance image's file is named for its UUID, with
`.converted` after it where `force_raw_images` holds; a deployment hard-links it, so a file with
more than one link is in use. The cleaner (by age, then by total size) never removes such a file:
the hard link that we keep beside a wanted image pins it. It skips folders, so `.precache/` is
left alone.

Ironic's locks live inside its process, so there is none for us to take. What shows from outside
is that it fetches into a folder `tmp*` of its own, and that it fails if the name has appeared by
the time it is done: while there is such a folder that is, or may become, this image's, we wait.
"""

import contextlib
import re
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

from hostler_precache.placing import placement
from hostler_precache.placing.placement import UnsupportedError, UsersUnknownError, Wanted
from hostler_precache.transfer.pieces import PieceStoreError

MASTER_IMAGES: Final = Path("/var/lib/ironic/master_images")
_TEMPORARY: Final = re.compile(r"tmp[a-z0-9_]{8}\Z")  # of tempfile.mkdtemp
_USE_SECONDS: Final = 3600.0


class FetchingError(PieceStoreError):
    """Ironic is fetching, and would fail if the file were there when it is done."""

    reason = "target.locked"


class IronicPlacer:
    """A `placement.Placer` for `[pxe]instance_master_path`."""

    def __init__(self, directory: Path, *, force_raw: bool) -> None:
        self.directory: Path = directory
        self.cleaner_age_seconds: float | None = None  # our link keeps it, however old
        self.use_seconds: float = _USE_SECONDS
        self.needs_link: bool = True
        self.is_raw_only: bool = force_raw

    def target(self, wanted: Wanted) -> Path:
        """`<image id>`, or `<image id>.converted`.

        Raises:
            UnsupportedError: the image has no UUID, or is not raw and should be.
        """
        try:
            is_uuid = str(uuid.UUID(wanted.image_id)) == wanted.image_id
        except ValueError:
            is_uuid = False
        if not is_uuid:
            raise UnsupportedError(
                f"ironic.name: {wanted.image_id} is no image of Glance's: Ironic calls others by"
                " their URL, which is not known here"
            )
        if self.is_raw_only:
            placement.check_is_raw(wanted.disk_format, "Ironic (force_raw_images)")
            return self.directory / f"{wanted.image_id}.converted"
        return self.directory / wanted.image_id

    @contextlib.contextmanager
    def exclusively(self, target: Path, *, patience_seconds: float) -> Iterator[None]:
        """Ironic was not fetching the image when we came.

        Raises:
            FetchingError: it is, or may be.
        """
        del patience_seconds  # it takes as long as the image does
        try:
            folders = [
                entry
                for entry in self.directory.iterdir()
                if _TEMPORARY.match(entry.name) and entry.is_dir()
            ]
            busy = [folder.name for folder in folders if _may_become(folder, target.name)]
        except FileNotFoundError:
            busy = []
        except OSError as exc:
            raise PieceStoreError(f"{self.directory}: {exc.strerror}") from exc
        if busy:
            raise FetchingError(f"Ironic is fetching in {self.directory / busy[0]}")
        yield

    def in_use(self, targets: Collection[Path], *, own_links: int) -> set[Path]:
        """Those with more links than ours: a deployment has the others.

        Raises:
            UsersUnknownError: one could not be looked at.
        """
        used = set()
        for target in targets:
            try:
                if target.stat().st_nlink > own_links:
                    used.add(target)
            except FileNotFoundError:
                continue
            except OSError as exc:
                raise UsersUnknownError(f"{target}: {exc.strerror}") from exc
        return used


def _may_become(folder: Path, name: str) -> bool:
    """Whether what is in the folder is that image on its way, or cannot be told yet."""
    try:
        names = [entry.name for entry in folder.iterdir()]
    except FileNotFoundError:
        return False
    return not names or any(found in (name, f"{name}.part") for found in names)
