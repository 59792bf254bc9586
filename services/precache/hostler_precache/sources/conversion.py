"""qemu-img on bytes that somebody uploaded: what it takes them for, and the same disk as raw bytes.

It runs as a process of its own with bounds on memory, processor time and the size of what it
writes, as Nova runs it (nova/privsep/qemu.py), and only on a file that `inspection` has passed. The
source's format is always named: qemu-img never guesses what to open.
"""

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hostler_precache.sources.inspection import RAW
from hostler_precache.sources.source import SourceError
from hostler_precache.transfer import manifest, pieces

# Nova's own, QEMU_IMG_LIMITS
MEMORY_BYTES: Final = 1 << 30
LOOK_CPU_SECONDS: Final = 30
# qemu's thread pool has up to 64 threads: with the usual stacks of 8 MiB, and an arena of 64 MiB for each, address
# space would run out now and then
_STACK_BYTES: Final = 2 * 1024 * 1024
_MALLOC: Final = {"MALLOC_ARENA_MAX": "2"}
# what is spent on each of the disk's bytes, at most: decompression of a stream, and a slow disk
_CPU_BYTES_PER_SECOND: Final = 50 * 1024 * 1024
_WALL_BYTES_PER_SECOND: Final = 5 * 1024 * 1024
_LEAST_CPU_SECONDS: Final = 60
_LEAST_WALL_SECONDS: Final = 600
_WATCH_SECONDS: Final = 0.5
# Nova's default of [compute]vmdk_allowed_types: the kinds that are one file
_VMDK_TYPES: Final = frozenset({"streamOptimized", "monolithicSparse"})
# qemu-img check: sound; clusters that nobody refers to; a format that has no check
_CHECK_IS_FINE: Final = frozenset({0, 3, 63})
_QEMUS_NAME: Final = {"vhd": "vpc"}


class _Info(BaseModel):
    model_config = ConfigDict(extra="ignore")

    format: str
    virtual_size: int = Field(alias="virtual-size", ge=0)
    backing_filename: str | None = Field(None, alias="backing-filename")
    encrypted: bool = False
    format_specific: dict[str, Any] = Field({}, alias="format-specific")


class _Extent(BaseModel):
    model_config = ConfigDict(extra="ignore")

    length: int = Field(ge=0)
    offset: int = Field(0, ge=0, description="in the file; compressed data, and zeros, have none")
    data: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """What qemu-img takes a file for."""

    format: str
    virtual_bytes: int


def is_available() -> bool:
    """Whether the programs are installed."""
    return shutil.which("qemu-img") is not None and shutil.which("prlimit") is not None


async def look(path: Path, expected: str) -> Disk:
    """What qemu-img takes the file for, which is what `inspection` took it for.

    Raises:
        SourceError: it is something else, needs other files, is encrypted, or qemu-img failed.
    """
    said = await _run(
        ["info", "--force-share", "--output=json", str(path)],
        cpu_seconds=LOOK_CPU_SECONDS,
        wall_seconds=10 * LOOK_CPU_SECONDS,
        file_bytes=0,
    )
    try:
        info = _Info.model_validate_json(said)
    except ValidationError as exc:
        raise SourceError("source.format_unsafe", "qemu-img's answer cannot be read") from exc
    if info.format != _QEMUS_NAME.get(expected, expected):
        raise SourceError(
            "source.format_mismatch", f"the image is {expected!r}, qemu-img sees {info.format!r}"
        )
    specific = info.format_specific.get("data") or {}
    if info.backing_filename is not None or specific.get("data-file") is not None:
        raise SourceError("source.format_unsafe", f"the {expected} needs another file")
    if info.encrypted:
        raise SourceError("source.format_unsupported", f"the {expected} is encrypted")
    if expected == "vmdk" and specific.get("create-type") not in _VMDK_TYPES:
        raise SourceError(
            "source.format_unsafe",
            f"a vmdk of type {str(specific.get('create-type'))[:40]!r} is not taken:"
            f" there are {', '.join(sorted(_VMDK_TYPES))}",
        )
    if info.virtual_size > manifest.MAX_IMAGE_BYTES:
        raise SourceError(
            "source.format_unsupported", f"a disk of {info.virtual_size} bytes is too large"
        )
    return Disk(format=expected, virtual_bytes=info.virtual_size)


async def to_raw(path: Path, target: Path, *, expected: str, reserve_bytes: int) -> None:
    """The disk in the file is at `target` as raw bytes, zeros as holes; what was there is gone.

    Raises:
        SourceError: the file is not what was expected, or cannot be converted within the bounds.
        pieces.NoSpaceError: less than `reserve_bytes` would have stayed free.
    """
    disk = await look(path, expected)
    allocated = (await asyncio.to_thread(os.stat, path)).st_blocks * 512
    room = min(disk.virtual_bytes, allocated)
    if _free_bytes(target.parent) < reserve_bytes + room:
        raise pieces.NoSpaceError(
            f"{room} bytes at least are needed to convert the image, {reserve_bytes} kept free"
        )
    await _check_whole(path, disk)
    await _run(
        ["convert", "-f", _QEMUS_NAME.get(expected, expected), "-O", RAW, str(path), str(target)],
        cpu_seconds=_LEAST_CPU_SECONDS + disk.virtual_bytes // _CPU_BYTES_PER_SECOND,
        wall_seconds=_LEAST_WALL_SECONDS + disk.virtual_bytes // _WALL_BYTES_PER_SECOND,
        file_bytes=disk.virtual_bytes,
        keep_free=(target.parent, reserve_bytes),
    )
    # a short conversion ends between two looks of the watch
    if _free_bytes(target.parent) < reserve_bytes:
        raise pieces.NoSpaceError("the disk has not the room for the converted image")
    if (await asyncio.to_thread(os.stat, target)).st_size != disk.virtual_bytes:
        raise SourceError("source.convert_failed", "the converted disk has another size")
    # a guest's disk that is itself an image of another format would be taken for that by the host
    await look(target, RAW)


async def _check_whole(path: Path, disk: Disk) -> None:
    """A disk of which a part is missing is not read as if that part were zeros, as qemu-img would.

    Its check knows what a format says of itself; that all of its data lies within the file, only some
    formats say.
    """
    form = _QEMUS_NAME.get(disk.format, disk.format)
    end, is_read = 0, True

    def reach(line: bytes) -> None:
        nonlocal end, is_read
        text = line.strip().strip(b"[],")
        try:
            extent = _Extent.model_validate_json(text or b'{"length": 0, "data": false}')
        except ValidationError:
            is_read = False
            return
        if extent.data and extent.offset:
            end = max(end, extent.offset + extent.length)

    try:
        await _run(
            ["check", "--force-share", "-f", form, str(path)],
            cpu_seconds=_LEAST_CPU_SECONDS + disk.virtual_bytes // _CPU_BYTES_PER_SECOND,
            wall_seconds=_LEAST_WALL_SECONDS + disk.virtual_bytes // _WALL_BYTES_PER_SECOND,
            file_bytes=0,
            fine=_CHECK_IS_FINE,
        )
        await _run(
            ["map", "--force-share", "--output=json", "-f", form, str(path)],
            cpu_seconds=_LEAST_CPU_SECONDS + disk.virtual_bytes // _CPU_BYTES_PER_SECOND,
            wall_seconds=_LEAST_WALL_SECONDS + disk.virtual_bytes // _WALL_BYTES_PER_SECOND,
            file_bytes=0,
            on_line=reach,
        )
    except SourceError as exc:
        if exc.reason != "source.convert_failed":
            raise
        raise SourceError(
            "source.format_damaged", f"the {disk.format} is damaged or cut off: {exc.detail}"
        ) from exc
    if not is_read:
        raise SourceError("source.format_unsafe", "qemu-img's map cannot be read")
    there = (await asyncio.to_thread(os.stat, path)).st_size
    if end > there:
        raise SourceError(
            "source.format_damaged",
            f"the {disk.format} is cut off: its data ends at byte {end}, and {there} bytes came",
        )


async def _run(
    arguments: list[str],
    *,
    cpu_seconds: int,
    wall_seconds: int,
    file_bytes: int,
    keep_free: tuple[Path, int] | None = None,
    fine: frozenset[int] = frozenset({0}),
    on_line: Callable[[bytes], None] | None = None,
) -> bytes:
    """What qemu-img says; of `on_line`, each line of it, which nobody keeps.

    Raises:
        SourceError: it fails, or needs more than it may have.
        pieces.NoSpaceError: there was less room than to be kept free.
    """
    if not is_available():
        raise SourceError(
            "source.convert_unavailable",
            "qemu-img and prlimit are not installed here: install qemu-utils and util-linux,"
            " or set convert_to_raw=false",
        )
    limits = [
        f"--as={MEMORY_BYTES}", f"--stack={_STACK_BYTES}", f"--cpu={cpu_seconds}",
        f"--fsize={file_bytes}", "--core=0",
    ]  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        "prlimit", *limits, "--", "qemu-img", *arguments,
        env={**_environment(), **_MALLOC, "LC_ALL": "C"},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(wall_seconds), asyncio.TaskGroup() as group:
            watching = keep_free and group.create_task(_keep_free(process, *keep_free))
            if on_line is None:
                out, err = await process.communicate()
            else:
                out, err = b"", await _lines(process, on_line)
            if watching is not None:
                watching.cancel()
    except TimeoutError as exc:
        raise SourceError(
            "source.convert_limit", f"qemu-img took more than {wall_seconds} s"
        ) from exc
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode in fine:
        return out
    said = err.decode(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
    if keep_free is not None and _is_full(said[0], process.returncode, *keep_free):
        raise pieces.NoSpaceError("the disk has not the room for the converted image")
    if process.returncode in (-signal.SIGXCPU, -signal.SIGKILL, -signal.SIGXFSZ):
        raise SourceError(
            "source.convert_limit",
            f"qemu-img was ended by its limits of {cpu_seconds} s and {file_bytes} bytes",
        )
    raise SourceError("source.convert_failed", f"qemu-img: {said[0][-300:]}")


async def _lines(process: asyncio.subprocess.Process, on_line: Callable[[bytes], None]) -> bytes:
    """Each line is handed on; returns what the process said of its troubles."""
    assert process.stdout is not None
    assert process.stderr is not None
    async with asyncio.TaskGroup() as group:
        troubles = group.create_task(process.stderr.read())
        async for line in process.stdout:
            on_line(line)
    await process.wait()
    return troubles.result()


async def _keep_free(
    process: asyncio.subprocess.Process, directory: Path, reserve_bytes: int
) -> None:
    while _free_bytes(directory) >= reserve_bytes:  # noqa: ASYNC110  nobody says when a disk fills
        await asyncio.sleep(_WATCH_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        process.kill()


def _is_full(said: str, returncode: int | None, directory: Path, reserve_bytes: int) -> bool:
    if "No space left" in said:
        return True
    return returncode == -signal.SIGKILL and _free_bytes(directory) < reserve_bytes


def _free_bytes(directory: Path) -> int:
    try:
        volume = os.statvfs(directory)
    except OSError as exc:
        raise pieces.PieceStoreError(f"{directory}: {exc.strerror}") from exc
    return volume.f_bavail * volume.f_frsize


def _environment() -> Mapping[str, str]:
    # nothing of ours, secrets least of all, goes to a program that reads strangers' bytes
    return {name: os.environ[name] for name in ("PATH", "TMPDIR") if name in os.environ}
