"""Nova's cache of base images on a libvirt host: `{instances_path}/_base/<sha1 of the image id>`.

Nova trusts a file that bears the name (it fetches only what is missing), so what is placed there
must be whole and of the form that Nova itself would have left: raw where `force_raw_images` says
so. Its cache cleaner looks at names of 40 characters and at `swap_*` and `ephemeral_*` only, and
never into folders: `_base/.precache/` is left alone. It removes a base that no instance of Nova's
database uses once the mtime is old; a newer mtime keeps it.
"""

from collections.abc import Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

from hostler_precache.placing import backing, nova_lock, placement
from hostler_precache.placing.nova_conf import NovaConf
from hostler_precache.placing.placement import UnsupportedError, Wanted

# each pass of Nova's cleaner touches what instances use: two passes without one, and none does
_PASSES: Final = 2
_SHORTEST_USE_SECONDS: Final = 3600.0


class NovaPlacer:
    """A `placement.Placer` for `_base`."""

    def __init__(self, conf: NovaConf) -> None:
        self._conf = conf
        self.directory: Path = conf.base_directory
        age = conf.original_age_seconds if conf.removes_unused else None
        self.cleaner_age_seconds: float | None = age
        self.use_seconds: float = max(
            _PASSES * conf.manager_interval_seconds, _SHORTEST_USE_SECONDS
        )
        self.needs_link: bool = False
        self.is_raw_only: bool = conf.force_raw_images
        self._locks = conf.instances_path / "locks"

    def target(self, wanted: Wanted) -> Path:
        """`_base/<sha1>`.

        Raises:
            UnsupportedError: Nova's images are not in files, or not in files of this form.
        """
        conf = self._conf
        if not conf.compute_driver.startswith("libvirt."):
            raise UnsupportedError(
                f"nova.compute_driver: {conf.compute_driver} keeps no base images in files"
            )
        match conf.images_type:
            case "rbd":
                raise UnsupportedError(
                    "nova.images_type: rbd: disks are cloned in Ceph, no base file is ever read"
                )
            case "ploop":
                raise UnsupportedError("nova.images_type: ploop: never tried with hostler")
            case _:
                pass  # qcow2 stands on the base; raw, flat and lvm copy it
        if conf.force_raw_images:
            placement.check_is_raw(wanted.disk_format, "Nova (force_raw_images)")
        return placement.target(self.directory, placement.NOVA_TEMPLATE, wanted.image_id)

    def exclusively(
        self, target: Path, *, patience_seconds: float
    ) -> AbstractContextManager[None]:
        """Nova's own lock on the base.

        Raises:
            pieces.PieceStoreError: Nova has it, or it cannot be taken.
        """
        return nova_lock.held(self._locks, target.name, patience_seconds=patience_seconds)

    def in_use(self, targets: Collection[Path], *, own_links: int) -> set[Path]:
        """Those that a disk in `instances_path` stands on, by the disk's own word.

        Raises:
            UsersUnknownError: a disk could not be read.
        """
        del own_links  # an overlay names its base, it does not link it
        by_name = {target.name: target for target in targets}
        used = backing.used_by_disks(
            by_name, self._conf.instances_path, outside=(self.directory, self._locks)
        )
        return {by_name[name] for name in used}
