"""A seed beside other seeds: it says that it is there, and what those that are gone had is fetched again.

A blob is at one seed. When that is silent for long, hosts that still wait for the blob get it from
those that have it. Where none does they would wait for ever: it is given up, and whoever fetches the
image next, under another id, serves it to them.
"""

import asyncio
import time
from typing import Final

from hostler_common import errors, logs
from hostler_precache.store import Store
from hostler_precache.swarming.tracker import Tracker
from hostler_precache.transfer import leftovers
from hostler_precache.transfer.manifest import BlobId
from hostler_precache.transfer.replica_store import ReplicaStore
from hostler_precache.transfer.seed import Seed

log = logs.get(__name__)

BEAT_SECONDS: Final = 5.0
GONE: Final = "seed.gone"


class Replicas:
    """The periodic work of one seed; call `turn` every few seconds."""

    def __init__(
        self,
        *,
        seed: Seed,
        store: Store,
        replicas: ReplicaStore,
        tracking: Tracker,
        silent_seconds: float,
    ) -> None:
        self._seed = seed
        self._store = store
        self._replicas = replicas
        self._tracker = tracking
        self._silent_seconds = silent_seconds
        # after the database was away, every seed looks as if it were gone
        self._beats_since: float | None = None

    async def turn(self) -> None:
        """This seed is there, and others' blobs are not left where nobody gets them.

        Raises:
            DatabaseUnavailable: nobody knows who is there.
        """
        try:
            await self._replicas.beat(self._seed.name)
            if self._beats_since is None:
                self._beats_since = time.monotonic()
            if time.monotonic() - self._beats_since > self._silent_seconds:
                await self._give_up()
            await self._come_back()
        except errors.Unavailable:
            self._beats_since = None
            raise

    async def _give_up(self) -> None:
        silent_seconds = self._silent_seconds
        for blob_id in await self._replicas.blobs_of_the_gone(silent_seconds=silent_seconds):
            again = await self._store.blob_lost(
                BlobId(str(blob_id)), reason=GONE, silent_seconds=silent_seconds
            )
            self._tracker.forget(BlobId(str(blob_id)))
            log.warning("blob_of_a_gone_seed", blob_id=str(blob_id), is_fetched_again=again)

    async def _come_back(self) -> None:
        """What others gave up while this seed was silent is served here no more; hosts get the rest again."""
        served = self._seed.blob_ids
        if not served:
            return
        for blob_id in served - await self._replicas.blobs_of(self._seed.name):
            self._seed.withdraw(blob_id)
            log.warning("blob_was_given_up", blob_id=blob_id)
        again = await self._replicas.served_again(
            self._seed.name, self._seed.url, self._seed.blob_ids
        )
        for blob_id in again:
            self._tracker.forget(blob_id)
            log.info("blob_is_served_again", blob_id=blob_id)

    async def discard_leftovers(self) -> None:
        """Files of blobs that are not this seed's, or not any more, are gone; call it before fetching."""
        keep = await self._replicas.blobs_of(self._seed.name)
        try:
            # in a thread: it is a disk
            names = await asyncio.to_thread(leftovers.discard, self._seed.directory, keep)
        except OSError as exc:
            log.warning("leftovers_kept", reason=exc.strerror)
            return
        if names:
            log.info("leftovers_discarded", names=names)
