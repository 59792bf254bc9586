"""This replica as a seed: the images on its disk, and the server that sends their pieces.

Of an image that is still being fetched, those pieces are sent that hosts can check by now. Its file
gets its name when it is complete; what is open stays open.

A file is served again after a restart only once it was read through and found to be the image;
its pieces count as sent, since they probably were: hosts get those that are nowhere else.
"""

import os
import uuid
from collections import Counter
from pathlib import Path

from hostler_common import logs
from hostler_precache import threads
from hostler_precache.distribution.distributions import BlobRecord
from hostler_precache.swarming.swarm import SeedPolicy
from hostler_precache.transfer import leftovers, pieces
from hostler_precache.transfer.blobs import Blob, BlobServer
from hostler_precache.transfer.manifest import (
    BlobId,
    GrowingManifest,
    Manifest,
    ManifestError,
    parse,
)

log = logs.get(__name__)


class Seed:
    """The blobs of this replica. `close` gives back their descriptors."""

    def __init__(self, *, name: str, url: str, directory: Path, server: BlobServer) -> None:
        self.name = name
        self.url = url
        self.session_id = uuid.uuid4()
        self.directory = directory
        self._server = server
        self._descriptors: dict[BlobId, int] = {}
        # totals of this process, also of what it serves again or no more
        self._sent: dict[BlobId, Counter[str]] = {}

    @property
    def blob_ids(self) -> set[BlobId]:
        """Those that are served."""
        return set(self._descriptors)

    def path(self, blob_id: BlobId) -> Path:
        """Where the bytes of a blob are."""
        return self.directory / blob_id

    def grow(
        self, blob_id: BlobId, key: bytes, path: Path, manifest: GrowingManifest, *, sent: int
    ) -> None:
        """A blob is served from the file that it is being fetched into, as far as `grew` says.

        Args:
            blob_id: which.
            key: of its swarm.
            path: the file, of full size.
            manifest: which grows.
            sent: the pieces that left when it was fetched before: hosts get those that are nowhere
                else.

        Raises:
            pieces.PieceStoreError: the file cannot be read.
        """
        fd = self._descriptors[blob_id] = _opened(path, None)
        policy = SeedPolicy(manifest.count, available=0, holes=sent)
        self._serve(Blob(blob_id, manifest=manifest, key=key, fd=fd, policy=policy))

    def grew(self, blob_id: BlobId) -> None:
        """The manifest of a blob that grows was told further, and so far its bytes are there."""
        blob = self._server.find(blob_id)
        if blob is not None and blob.policy is not None:
            listed = blob.manifest
            blob.add_all(listed.known_pieces)
            blob.policy.add(listed.known_pieces, holes=listed.zero_pieces)

    async def serve(
        self, blob_id: BlobId, key: bytes, manifest: Manifest, *, sent: int = 0
    ) -> None:
        """The blob, which has just been fetched and checked, is served; each piece goes out once.

        Those that were `sent` when it was fetched before count as out.

        Raises:
            pieces.PieceStoreError: its file cannot be read.
        """
        grown = self._server.find(blob_id)
        if grown is not None:
            grown.manifest = manifest
            self.grew(blob_id)
            return
        policy = SeedPolicy(manifest.count, holes=manifest.zero_pieces | sent)
        await self._open(blob_id, key, manifest, policy)

    async def resume(self, record: BlobRecord, manifest_body: bytes) -> bool:
        """Serve a blob of an earlier run, if its file still is the image; say whether it is."""
        try:
            manifest = parse(manifest_body, root=record.root)
            policy = SeedPolicy(manifest.count, is_injected=True)
            await self._open(record.blob_id, record.swarm_key, manifest, policy, check=True)
        except (pieces.PieceStoreError, ManifestError) as exc:
            log.warning("seed_blob_lost", blob_id=record.blob_id, reason=str(exc))
            return False
        return True

    async def _open(
        self,
        blob_id: BlobId,
        key: bytes,
        manifest: Manifest,
        policy: SeedPolicy,
        *,
        check: bool = False,
    ) -> None:
        path, expected = self.path(blob_id), manifest if check else None
        fd = await threads.to_end(lambda: _opened(path, expected), undo=os.close)
        self._descriptors[blob_id] = fd
        self._serve(
            Blob(
                blob_id,
                manifest=manifest,
                key=key,
                fd=fd,
                have=(1 << manifest.count) - 1,
                policy=policy,
            )
        )

    def _serve(self, blob: Blob) -> None:
        blob.sent_bytes = self._sent.setdefault(blob.blob_id, Counter())
        self._server.serve(blob)

    def sent_bytes(self) -> dict[str, int]:
        """What this process has sent, by distribution."""
        total: Counter[str] = Counter()
        for sent in self._sent.values():
            total.update(sent)
        return dict(total)

    def close(self) -> None:
        """No blob is served any more, and every file is closed."""
        for blob_id, fd in self._descriptors.items():
            self._server.withdraw(blob_id)
            os.close(fd)
        self._descriptors.clear()

    def withdraw(self, blob_id: BlobId) -> None:
        """The blob is not served here any more, and its file is gone."""
        self._server.withdraw(blob_id)
        fd = self._descriptors.pop(blob_id, None)
        if fd is not None:
            os.close(fd)
        leftovers.remove(self.path(blob_id))


def _opened(path: Path, expected: Manifest | None) -> int:
    """A descriptor of the file, which was read through if it has to be as expected; blocks.

    Raises:
        pieces.PieceStoreError: it cannot be read, or is not what is expected.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise pieces.PieceStoreError(f"{path}: {exc.strerror}") from exc
    is_good = False
    try:
        # a seed never sends what it has not verified itself
        is_good = expected is None or pieces.is_exactly(fd, expected)
    finally:
        if not is_good:
            os.close(fd)
    if not is_good:
        raise pieces.PieceStoreError(f"{path} is not the image any more")
    return fd
