"""The placers that come with hostler, built from the agent's settings, and how others are found."""

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path

from hostler_common.settings import SettingsError
from hostler_precache import entry_points
from hostler_precache.placing import nova_conf, placement
from hostler_precache.placing.ironic_placer import MASTER_IMAGES, IronicPlacer
from hostler_precache.placing.nova_placer import NovaPlacer
from hostler_precache.placing.placement import Placer, Wanted
from hostler_precache.settings import AgentSettings


class DirectoryPlacer:
    """A `placement.Placer` for a directory that nobody else looks after."""

    def __init__(self, directory: Path, template: str) -> None:
        self.directory: Path = directory
        self.cleaner_age_seconds: float | None = None
        self.use_seconds: float = 0.0
        self.needs_link: bool = False
        self.is_raw_only: bool = False
        self._template = template

    def target(self, wanted: Wanted) -> Path:
        """The name that the template makes of the image's id."""
        return placement.target(self.directory, self._template, wanted.image_id)

    @contextlib.contextmanager
    def exclusively(self, target: Path, *, patience_seconds: float) -> Iterator[None]:
        """There is nobody to exclude."""
        del target, patience_seconds
        yield

    def in_use(self, targets: Collection[Path], *, own_links: int) -> set[Path]:
        """Those that somebody has linked elsewhere; who only reads one keeps what is open."""
        return {
            target for target in targets if target.exists() and target.stat().st_nlink > own_links
        }


def build(settings: AgentSettings) -> Placer:
    """The placer that the settings name.

    Raises:
        SettingsError: there is none of that name, or it is of no use, or cannot be had with these
            settings.
    """
    try:
        placer: Placer = entry_points.build(placement.PLACERS, settings.placer, settings, Placer)
    except (entry_points.UnknownPluginError, entry_points.BrokenPluginError) as exc:
        raise SettingsError(f"HOSTLER_PRECACHE_PLACER: {exc}") from exc
    return placer


def directory(settings: AgentSettings) -> Placer:
    """A plain directory."""
    return DirectoryPlacer(settings.target_dir, settings.target_template)


def nova(settings: AgentSettings) -> Placer:
    """Nova's `_base`: from Nova's own configuration where that is named, else from ours.

    Raises:
        SettingsError: Nova's files are wrong, or settings contradict each other.
    """
    if settings.target_template != placement.NOVA_TEMPLATE:
        raise SettingsError(
            "HOSTLER_PRECACHE_TARGET_TEMPLATE: Nova's names are its own;"
            " a template goes with HOSTLER_PRECACHE_PLACER=directory"
        )
    if not settings.nova_config_files:
        return NovaPlacer(
            nova_conf.NovaConf(
                instances_path=settings.target_dir.parent,
                base_directory=settings.target_dir,
                force_raw_images=settings.force_raw,
            )
        )
    try:
        conf = nova_conf.read([Path(file) for file in settings.nova_config_files])
    except nova_conf.NovaConfError as exc:
        raise SettingsError(f"HOSTLER_PRECACHE_NOVA_CONFIG_FILES: {exc}") from exc
    if "target_dir" in settings.model_fields_set and settings.target_dir != conf.base_directory:
        raise SettingsError(
            f"HOSTLER_PRECACHE_TARGET_DIR: is {settings.target_dir}, and Nova's own configuration"
            f" says {conf.base_directory}: leave it out"
        )
    return NovaPlacer(conf)


def ironic(settings: AgentSettings) -> Placer:
    """Ironic's `master_images`."""
    named = "target_dir" in settings.model_fields_set
    return IronicPlacer(
        settings.target_dir if named else MASTER_IMAGES, force_raw=settings.force_raw
    )
