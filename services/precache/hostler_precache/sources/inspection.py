"""What an image's bytes are, before anything else touches them: the rules by which Nova takes or refuses an image.

The content must be what it was declared to be (`disk_format`), and must name no other file: no
backing file, no data file, no extents beside it. Whoever may upload an image could otherwise have
files of the seed, or of every host, read into it (nova/virt/images.py, `do_image_deep_inspection`;
https://bugs.launchpad.net/nova/+bug/2059809). The parsers are those of oslo.utils, which Nova and
Glance use.
"""

from pathlib import Path
from typing import Final

from oslo_utils.imageutils import format_inspector

from hostler_precache.sources.source import SourceError

RAW: Final = "raw"
# bytes that a hypervisor takes as they are; Nova calls all of them raw from here on
_AS_THEY_ARE: Final = frozenset({RAW, "gpt", "iso", "ami", "ari", "aki"})
_AMAZONS: Final = frozenset({"ami", "ari", "aki"})
# those that hold a disk in another shape, and that qemu-img reads
_SHAPED: Final = frozenset({"qcow2", "vhd", "vhdx", "vmdk", "vdi"})
_READ_BYTES: Final = 256 * 1024


def is_shaped(declared: str | None) -> bool:
    """Whether a file of that format holds a disk in another shape; what is not that is taken as it is."""
    return (declared or RAW).lower() in _SHAPED


def inspect(path: Path, declared: str | None) -> str:
    """The format of the file, `raw` or one that can be converted: the declared one, and safe.

    An image of which no format was declared has to be raw: what looks like another format may be
    content that somebody wrote into a raw disk.

    Raises:
        SourceError: the content is another than declared, names other files, or cannot be judged.
        OSError: the file cannot be read.
    """
    expected = (declared or RAW).lower()
    if expected not in _AS_THEY_ARE | _SHAPED:
        raise SourceError(
            "source.format_unsupported", f"disk_format {expected[:20]!r} cannot be inspected"
        )
    if path.stat().st_size == 0:
        found = RAW
    else:
        inspector = _inspector(path)
        found = str(inspector)
        _check_safety(inspector, found)
    if found != expected and not _is_taken_for(found, expected):
        said = f"declared as {expected!r}" if declared else "declared as nothing, so as 'raw'"
        raise SourceError(
            "source.format_mismatch", f"the image is {said}, and its content is {found!r}"
        )
    return expected if expected in _SHAPED else RAW


def _is_taken_for(found: str, expected: str) -> bool:
    # a raw disk may begin with a partition table; Amazon's formats may be anything, and run as they are
    return (expected == RAW and found == "gpt") or (
        expected in _AMAZONS and found not in _SHAPED and found != "luks"
    )


def _inspector(path: Path) -> format_inspector.FileInspector:
    with path.open("rb") as file:
        wrapper = format_inspector.InspectWrapper(file)
        try:
            while wrapper.read(_READ_BYTES) and not wrapper.formats:
                pass
        finally:
            wrapper.close()
    found = wrapper.formats or []
    if {str(each) for each in found} == {"iso", "gpt"}:  # a CD that boots as a disk, too
        found = [each for each in found if str(each) == "iso"]
    if len(found) != 1:
        names = ", ".join(sorted(str(each) for each in found)) or "nothing known"
        raise SourceError("source.format_unsafe", f"the content is several formats: {names}")
    return found[0]


def _check_safety(inspector: format_inspector.FileInspector, found: str) -> None:
    try:
        inspector.safety_check()
    except format_inspector.SafetyCheckFailed as exc:
        why = "; ".join(f"{name}: {said}" for name, said in sorted(exc.failures.items()))
        raise SourceError("source.format_unsafe", f"the {found} is not safe: {why}") from exc
    except format_inspector.ImageFormatError as exc:
        raise SourceError(
            "source.format_unsafe", f"the {found} cannot be judged: {str(exc)[:200]}"
        ) from exc
