"""What agents report, stored in groups: thousands of hosts tell how far they are every few seconds.

A report is answered once it is committed. Those that come while a transaction is on its way are
stored together by the next, so the database sees a few statements a batch however many hosts
there are.
"""

import asyncio
from typing import Final

from hostler_common import db, errors
from hostler_common.bus import Message
from hostler_precache import messages, protocol
from hostler_precache.distribution.distribution_store import DistributionStore
from hostler_precache.distribution.distributions import HostEnded
from hostler_precache.distribution.rollout import PRESENT
from hostler_precache.store import Store
from hostler_precache.swarming.swarm_store import SwarmStore

MAX_BATCH: Final = 500
# a transaction costs the same for one report and for fifty: those of so long go into one
GATHER_SECONDS: Final = 0.01


class Reports:
    """The writer of one replica; `run` it."""

    def __init__(self, store: Store, distributions: DistributionStore, swarms: SwarmStore) -> None:
        self._store = store
        self._distributions = distributions
        self._swarms = swarms
        self._waiting: list[tuple[str, protocol.HostReport, asyncio.Future[None]]] = []
        self._wake = asyncio.Event()

    async def put(self, host: str, report: protocol.HostReport) -> None:
        """Return when what the host says is committed.

        Raises:
            DatabaseUnavailable: it is not; the next report says it again.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((host, report, done))
        self._wake.set()
        await done

    async def run(self) -> None:
        """Store what waits, until cancelled."""
        while True:
            await self._wake.wait()
            await asyncio.sleep(GATHER_SECONDS)
            self._wake.clear()
            while self._waiting:
                batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
                await self._answer(batch)

    async def _answer(
        self, batch: list[tuple[str, protocol.HostReport, asyncio.Future[None]]]
    ) -> None:
        try:
            # of two reports of one host the later one is meant
            await self._store_some({host: report for host, report, _ in batch})
        except errors.HostlerError as exc:
            if len(batch) > 1 and not isinstance(exc, errors.Unavailable):
                for one in batch:  # one of them cannot be stored: the others can
                    await self._answer([one])
                return
            for _, _, done in batch:
                if not done.done():
                    done.set_exception(exc)
            return
        for _, _, done in batch:
            if not done.done():  # who asked may have gone away
                done.set_result(None)

    async def _store_some(self, reports: dict[str, protocol.HostReport]) -> None:
        async with db.transaction(self._store.pool) as connection:
            # what a crash of the server takes with it of its last moments, every host says again
            # with its next report: nobody need wait for the disk
            await connection.execute("SET LOCAL synchronous_commit = off")
            ended, finished = await self._swarms.report(connection, reports)
            events = [_progress(one) for one in ended]
            for distribution_id in finished:
                image_id, states = await self._distributions.host_states(
                    connection, distribution_id
                )
                events.append(
                    messages.DISTRIBUTION_FINISHED.message(
                        messages.DistributionFinished(
                            distribution_id=str(distribution_id), image_id=image_id, hosts=states
                        ),
                        app_id=messages.APP_ID,
                    )
                )
            if events:
                await self._store.announce(connection, events)


def _progress(ended: HostEnded) -> Message:
    """What Nova says when a host has cached an image, or could not."""
    has_it = ended.state in PRESENT
    return messages.CACHE_PROGRESS.message(
        messages.AggregateCacheProgress(
            payload=messages.AggregateCachePayload(
                data=messages.AggregateCacheData(
                    uuid=str(ended.distribution_id),
                    name=ended.image_id,
                    host=ended.host,
                    images_cached=[ended.image_id] if has_it else [],
                    images_failed=[] if has_it else [ended.image_id],
                    index=ended.index,
                    total=ended.total,
                )
            )
        ),
        app_id=messages.APP_ID,
    )
