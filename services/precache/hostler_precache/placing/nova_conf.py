"""What Nova's own configuration says of its cache of base images.

The files are oslo.config's: sections, `name = value` or `name: value`, later files win, and
`$name` stands for another option of `[DEFAULT]`. Only what concerns the cache is read; the
defaults are Nova's own, of 2026.1 (nova/conf/imagecache.py, nova/conf/libvirt.py).
"""

import configparser
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_DEFAULT: Final = "DEFAULT"
_REFERENCE: Final = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_TRUE: Final = frozenset({"true", "1", "on", "yes", "t", "y"})
_FALSE: Final = frozenset({"false", "0", "off", "no", "f", "n"})
_DEEPEST: Final = 10
# packagers set it in the file that comes with the package; upstream's default is its source folder
_STATE_PATH: Final = "/var/lib/nova"

Sections = Mapping[str, Mapping[str, str]]


class NovaConfError(ValueError):
    """A file of Nova's configuration, or a value in it, that cannot be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NovaConf:
    """Where Nova keeps base images, in which form, and for how long."""

    instances_path: Path = Path(_STATE_PATH) / "instances"
    base_directory: Path = Path(_STATE_PATH) / "instances" / "_base"
    compute_driver: str = "libvirt.LibvirtDriver"
    images_type: str = "default"
    force_raw_images: bool = True
    removes_unused: bool = True
    original_age_seconds: float = 24 * 3600.0
    manager_interval_seconds: float = 2400.0


def read(files: Sequence[Path]) -> NovaConf:
    """What the files say, the last to say something winning; of a directory, its `*.conf`, sorted.

    Raises:
        NovaConfError: a file cannot be read, or says something that cannot be.
    """
    # Nova's [DEFAULT] is a section like any other, and its values may have a % in them
    parser = configparser.RawConfigParser(
        strict=False, default_section="\0", allow_no_value=True, comment_prefixes=("#", ";")
    )
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # names have a case
    for file in files:
        for path in sorted(file.glob("*.conf")) if file.is_dir() else [file]:
            try:
                with path.open(encoding="utf-8") as lines:
                    parser.read_file(lines)
            except (OSError, UnicodeDecodeError, configparser.Error) as exc:
                raise NovaConfError(f"{path}: {exc}") from exc
    return parse({name: dict(parser.items(name)) for name in parser.sections()})


def parse(sections: Sections) -> NovaConf:
    """What the sections say.

    Raises:
        NovaConfError: a value is not of its kind, or refers to what is not there.
    """
    values = _Values(sections)
    instances = Path(values.text(_DEFAULT, "instances_path", f"{values.state_path}/instances"))
    subdirectory = values.text("image_cache", "subdirectory_name", "_base")
    if not instances.is_absolute():
        raise NovaConfError(f"instances_path is not a full path: {instances}")
    if not subdirectory or "/" in subdirectory or subdirectory in (".", ".."):
        raise NovaConfError(f"[image_cache]subdirectory_name is not a name: {subdirectory!r}")
    images_type = values.text("libvirt", "images_type", "default")
    if images_type == "default":
        images_type = "qcow2" if values.boolean(_DEFAULT, "use_cow_images", True) else "raw"
    return NovaConf(
        instances_path=instances,
        base_directory=instances / subdirectory,
        compute_driver=values.text(_DEFAULT, "compute_driver", "libvirt.LibvirtDriver"),
        images_type=images_type,
        force_raw_images=values.boolean(_DEFAULT, "force_raw_images", True),
        removes_unused=values.boolean("image_cache", "remove_unused_base_images", True),
        original_age_seconds=values.seconds(
            "image_cache", "remove_unused_original_minimum_age_seconds", 24 * 3600
        ),
        manager_interval_seconds=values.seconds("image_cache", "manager_interval", 2400),
    )


# the names that some options of [image_cache] had in [DEFAULT], which Nova still takes
_FORMER: Final = {
    "subdirectory_name": "image_cache_subdirectory_name",
    "manager_interval": "image_cache_manager_interval",
    "remove_unused_base_images": "remove_unused_base_images",
    "remove_unused_original_minimum_age_seconds": "remove_unused_original_minimum_age_seconds",
}


class _Values:
    """Options by section and name, with their references resolved."""

    def __init__(self, sections: Sections) -> None:
        self._sections = sections
        self.state_path = _STATE_PATH
        self.state_path = self.text(_DEFAULT, "state_path", _STATE_PATH)

    def text(self, section: str, name: str, default: str) -> str:
        value = self._sections.get(section, {}).get(name)
        if value is None and section == "image_cache":
            value = self._sections.get(_DEFAULT, {}).get(_FORMER[name])
        return self._resolved(default if value is None else value, name)

    def boolean(self, section: str, name: str, default: bool) -> bool:
        text = self.text(section, name, str(default)).strip().lower()
        if text not in _TRUE | _FALSE:
            raise NovaConfError(f"[{section}]{name} is neither true nor false: {text!r}")
        return text in _TRUE

    def seconds(self, section: str, name: str, default: int) -> float:
        text = self.text(section, name, str(default))
        try:
            return float(int(text))
        except ValueError as exc:
            raise NovaConfError(f"[{section}]{name} is not a number: {text!r}") from exc

    def _resolved(self, text: str, name: str, depth: int = 0) -> str:
        if depth > _DEEPEST:
            raise NovaConfError(f"{name} refers to itself")

        def value_of(match: re.Match[str]) -> str:
            other = match[1] or match[2]
            value = self._sections.get(_DEFAULT, {}).get(other)
            if value is None and other == "state_path":
                value = self.state_path
            if value is None:
                raise NovaConfError(
                    f"{name} refers to ${other}, which is not set there: set it in Nova's files"
                )
            return self._resolved(value, name, depth + 1)

        resolved = _REFERENCE.sub(value_of, text)
        if "$" in resolved:
            raise NovaConfError(
                f"{name} refers to what is not read here: {resolved}: set it in Nova's files as it is"
            )
        return resolved
