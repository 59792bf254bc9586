"""What is pluggable is found by entry point: by its name, built with what it is given, and checked for its kind.

Who wrote a plugin is not known, so whatever it raises while it is found and built is one error,
which names it and says what is wrong.
"""

from importlib import metadata
from typing import Any

from hostler_common.settings import SettingsError


class UnknownPluginError(LookupError):
    """No implementation of that name is installed; the text names those that are."""


class BrokenPluginError(Exception):
    """It is installed and of no use; the text says why."""


def find(group: str, name: str) -> metadata.EntryPoint:
    """The entry point of that name, not loaded.

    Raises:
        UnknownPluginError: there is none.
    """
    installed = metadata.entry_points(group=group)
    if name not in installed.names:
        known = ", ".join(sorted(installed.names))
        raise UnknownPluginError(f"{name!r} is not installed; there are: {known}")
    return installed[name]


def build(group: str, name: str, given: object, kind: type) -> Any:  # noqa: ANN401  a `kind`
    """The implementation of that name: what the entry point makes of `given`.

    Args:
        group: of entry points.
        name: which of them.
        given: its only argument.
        kind: the protocol whose members the result has. Their types are not checked.

    Raises:
        UnknownPluginError: there is none.
        BrokenPluginError: it cannot be imported or built, or is of another kind.
        SettingsError: it says that settings are wrong.
    """
    entry = find(group, name)
    said = f"{name!r} ({entry.value})"
    try:
        made = entry.load()(given)
        missing = [
            member for member in dir(kind) if member[0] != "_" and not hasattr(made, member)
        ]
    except SettingsError:
        raise
    except (Exception, SystemExit) as exc:  # it may raise whatever it likes
        raise BrokenPluginError(f"{said} cannot be had: {type(exc).__name__}: {exc}") from exc
    if missing:
        raise BrokenPluginError(f"{said} is no {kind.__name__}: it has no {', '.join(missing)}")
    return made
