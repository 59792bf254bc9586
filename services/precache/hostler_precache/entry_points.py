"""What is pluggable is found by entry point: by its name, built with what it is given, and checked for its kind.

Who wrote a plugin is not known, so whatever it raises while it is found and built is one error,
which names it and says what is wrong; and what it raises later ends what it was asked for, and
nothing else (`contained`).
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
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
    except BaseException as exc:  # whatever it likes; nothing is awaited, so none is a cancel
        raise BrokenPluginError(f"{said} cannot be had: {type(exc).__name__}: {exc}") from exc
    if missing:
        raise BrokenPluginError(f"{said} is no {kind.__name__}: it has no {', '.join(missing)}")
    return made


@contextmanager
def contained() -> Iterator[None]:
    """A plugin's code runs inside: what ends it is an `Exception`, unless the task that runs it is cancelled.

    Then it is that, whatever the plugin makes of it. A task that a plugin has begun is not contained.

    Raises:
        BrokenPluginError: it raised what would have ended the process, or this task without a word.
    """
    try:
        yield
    except BaseException as exc:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise asyncio.CancelledError from exc
        if isinstance(exc, Exception):
            raise
        raise BrokenPluginError(f"it raised {type(exc).__name__}") from exc
