"""What is remembered of each file that we look after, on disk beside it.

In `.precache/`, by the file's final name: `<name>.record` (JSON), `<name>.manifest` (the list of
pieces, for repairs) and `<name>.kept` (a hard link of the file, where links are kept). A record is
replaced in one step and synced; one that cannot be read counts as none: the file is then found,
checked and taken over as if somebody else had put it there.
"""

import contextlib
import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hostler_precache.transfer import manifest
from hostler_precache.transfer.manifest import BlobId, ImageId, Manifest, ManifestError

_SCHEMA: Final = 1
_RECORD: Final = ".record"
_MANIFEST: Final = ".manifest"
_KEPT: Final = ".kept"
_NEW: Final = ".new"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One file under its final name. Times are seconds since the epoch, as in its inode."""

    name: str
    image_id: ImageId
    blob_id: BlobId
    root: str
    size_bytes: int
    inode: int
    is_ours: bool
    """Whether we placed it: what others placed is never removed by us."""
    placed_at: float
    pinned_mtime_ns: int
    """The mtime that we gave it; another one is somebody else's touch."""
    used_at: float | None = None
    """When somebody else touched it last."""
    unwanted_since: float | None = None
    scrubbed_at: float = 0.0
    damaged_pieces: int = 0


class RecordStore:
    """The records in one directory. Calls block."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def load(self) -> dict[str, Record]:
        """All records by name; what an interrupted run left besides is gone.

        Raises:
            OSError: the directory cannot be used.
        """
        records = {}
        for path in self._directory.glob(f"*{_RECORD}"):
            record = _read(path)
            if record is not None and record.name == path.name.removesuffix(_RECORD):
                records[record.name] = record
        for suffix in (_KEPT, _MANIFEST, _NEW):
            for path in self._directory.glob(f"*{suffix}"):
                if path.name.removesuffix(suffix) not in records:
                    path.unlink(missing_ok=True)
        # a run that ended in the middle of `PieceStore.place`
        for path in self._directory.glob("*.journal"):
            if not path.with_suffix(".part").exists():
                path.unlink(missing_ok=True)
        return records

    def save(self, record: Record) -> None:
        """The record is on disk.

        Raises:
            OSError: it is not.
        """
        body = {"schema": _SCHEMA, **dataclasses.asdict(record)}
        self._replace(record.name, _RECORD, json.dumps(body, sort_keys=True).encode())

    def save_manifest(self, name: str, listed: Manifest) -> None:
        """The list of pieces is on disk.

        Raises:
            OSError: it is not.
        """
        self._replace(name, _MANIFEST, listed.to_json())

    def manifest(self, record: Record) -> Manifest | None:
        """The list of pieces of a record; None where it cannot be believed any more."""
        try:
            body = (self._directory / f"{record.name}{_MANIFEST}").read_bytes()
            return manifest.parse(body, root=bytes.fromhex(record.root))
        except (OSError, ManifestError, ValueError):
            return None

    def kept(self, name: str) -> Path:
        """Where the hard link of a file is, if there is one."""
        return self._directory / f"{name}{_KEPT}"

    def forget(self, name: str) -> None:
        """Nothing is known of the name any more, and no link of its file is kept.

        Raises:
            OSError: it cannot be forgotten.
        """
        # the record last: until it is gone, the next run does the same again
        for suffix in (_KEPT, _MANIFEST, _RECORD):
            (self._directory / f"{name}{suffix}").unlink(missing_ok=True)

    def _replace(self, name: str, suffix: str, body: bytes) -> None:
        path, new = self._directory / f"{name}{suffix}", self._directory / f"{name}{suffix}{_NEW}"
        try:
            with new.open("wb") as file:
                file.write(body)
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)
            raise


def _read(path: Path) -> Record | None:
    try:
        body = json.loads(path.read_bytes())
        if not isinstance(body, dict) or body.pop("schema", None) != _SCHEMA:
            return None
        record = Record(**body)
    except (OSError, ValueError, TypeError):
        return None
    for field in dataclasses.fields(Record):
        value = getattr(record, field.name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        match field.name:
            case "name" | "image_id" | "blob_id" | "root":
                fits = isinstance(value, str)
            case "is_ours":
                fits = isinstance(value, bool)
            case "used_at" | "unwanted_since":
                fits = value is None or is_number
            case _:
                fits = is_number
        if not fits:
            return None
    return record
