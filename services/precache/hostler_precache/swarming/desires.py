"""What hosts should have, asked by thousands at once: after a fanout, or when the service is back.

Those that ask together are answered from one transaction, so that ten thousand hosts are a few
dozen reads and not ten thousand that wait for a connection.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hostler_precache.distribution.distributions import Wanted
from hostler_precache.swarming.gathering import Gathering
from hostler_precache.swarming.swarm_store import SwarmStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Desire:
    """What one host should have, most urgent first, and what it need not keep any longer."""

    wanted: Sequence[Wanted]
    deleted_image_ids: Sequence[str]


class Desires:
    """The reader of one replica; `run` it."""

    def __init__(self, swarms: SwarmStore) -> None:
        self._swarms = swarms
        self._gathering = Gathering(self._read)

    async def ask(self, host: str) -> Desire:
        """What the host should have, as it is in the database after this call began.

        Raises:
            DatabaseUnavailable: nobody knows.
        """
        return await self._gathering.ask(host)

    async def run(self) -> None:
        """Answer what waits, until cancelled."""
        await self._gathering.run()

    async def _read(self, hosts: Sequence[str]) -> Sequence[Desire]:
        wanted = await self._swarms.desired_of(hosts)
        deleted = await self._swarms.deleted_of(hosts)
        return [
            Desire(wanted=wanted[host], deleted_image_ids=deleted.get(host, ())) for host in hosts
        ]
