"""Where an image's file goes on a host, and under which name.

The name comes from a template with `{image_id}` or `{sha1}`, the latter being Nova's own name
for a base file in `_base` (nova/virt/libvirt/imagecache.py, `get_cache_fname`).
"""

import hashlib
import string
from pathlib import Path
from typing import Final

from hostler_precache.manifest import ImageId

NOVA_TEMPLATE: Final = "{sha1}"
_FIELDS: Final = frozenset({"image_id", "sha1"})


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
    """The final path of an image's file.

    Raises:
        ValueError: the template is not one.
    """
    sha1 = hashlib.sha1(image_id.encode(), usedforsecurity=False).hexdigest()
    return directory / check_template(template).format(image_id=image_id, sha1=sha1)
