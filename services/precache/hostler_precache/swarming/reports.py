"""What agents report, stored in groups: thousands of hosts tell how far they are every few seconds.

A report is answered once it is committed. Of two reports of one run of an agent the later one is
meant, in whichever order they come.
"""

from collections.abc import Callable, Iterable, Sequence

from hostler_common import db
from hostler_precache import protocol
from hostler_precache.distribution import endings
from hostler_precache.distribution.distribution_store import DistributionStore
from hostler_precache.distribution.distributions import DistributionId
from hostler_precache.store import Store
from hostler_precache.swarming.gathering import Gathering
from hostler_precache.swarming.swarm_store import SwarmStore


def latest(reports: Iterable[tuple[str, protocol.HostReport]]) -> dict[str, protocol.HostReport]:
    """The report of each host that is meant, of several in the order in which they came.

    Within a session that is the one with the largest sequence, wherever it stands; of two sessions
    the one that spoke last, since clocks of hosts jump and nothing else orders them.
    """
    found: dict[str, protocol.HostReport] = {}
    for host, report in reports:
        known = found.get(host)
        if known is None or not _is_overtaken(report, known):
            found[host] = report
    return found


def _is_overtaken(report: protocol.HostReport, by: protocol.HostReport) -> bool:
    if report.session_id != by.session_id or report.sequence is None or by.sequence is None:
        return False
    return report.sequence < by.sequence


class Reports:
    """The writer of one replica; `run` it."""

    def __init__(
        self,
        store: Store,
        distributions: DistributionStore,
        swarms: SwarmStore,
        *,
        on_done: Callable[[Sequence[DistributionId]], None],
    ) -> None:
        """Nothing waits to be written yet; `on_done` is told of distributions whose last host has ended."""
        self._store = store
        self._distributions = distributions
        self._swarms = swarms
        self._on_done = on_done
        self._gathering = Gathering(self._store_some)

    async def put(self, host: str, report: protocol.HostReport) -> None:
        """Return when what the host says is committed, or is known to be overtaken.

        Raises:
            DatabaseUnavailable: it is not; the next report says it again.
        """
        await self._gathering.ask((host, report))

    async def run(self) -> None:
        """Store what waits, until cancelled."""
        await self._gathering.run()

    async def _store_some(
        self, reports: Sequence[tuple[str, protocol.HostReport]]
    ) -> Sequence[None]:
        async with db.transaction(self._store.pool) as connection:
            # what a crash of the server takes with it of its last moments, every host says again
            # with its next report: nobody need wait for the disk
            await connection.execute("SET LOCAL synchronous_commit = off")
            ended, finished = await self._swarms.report(connection, latest(reports))
            if ended or finished:
                events = await endings.events_of(
                    connection, self._distributions, ended=ended, finished=finished
                )
                await self._store.announce(connection, events)
        self._on_done(finished)
        return [None] * len(reports)
