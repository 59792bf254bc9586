"""Who fetches from whom, and with what right: the service's side of the swarm.

The tracker is off the data path. A swarm goes on without it; it cannot grow.
"""

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Final
from uuid import UUID

from hostler_common.bus import Message
from hostler_precache import messages, protocol
from hostler_precache.distribution.distributions import (
    BlobRecord,
    DistributionId,
    SwarmRecord,
    SwarmRule,
    Wanted,
)
from hostler_precache.distribution.shares import Shares
from hostler_precache.envelope import CacheCall
from hostler_precache.swarming import graph, tokens
from hostler_precache.swarming.budget import Budget
from hostler_precache.swarming.swarm_store import SwarmStore
from hostler_precache.transfer.manifest import BlobId

IDLE_SECONDS: Final = 10.0
MOVING_SECONDS: Final = 1.0
MEMBERS_READ_PER_SECOND: Final = 1000
MEMBERS_AT_ONCE: Final = 100


def grant(blob: BlobRecord, distribution_id: DistributionId, *, token_seconds: int) -> str:
    """A token for the blob, on behalf of the distribution."""
    return tokens.mint(
        tokens.Grant(
            blob_id=blob.blob_id,
            distribution_id=str(distribution_id),
            expires_at=int(time.time()) + token_seconds,
        ),
        blob.swarm_key,
    )


def desired_image(
    wanted: Wanted, swarm: protocol.Swarm, *, token_seconds: int
) -> protocol.DesiredImage:
    """What a host is told of an image that it should have."""
    blob = wanted.blob
    assert blob.size_bytes is not None
    return protocol.DesiredImage(
        distribution_id=str(wanted.distribution_id),
        image_id=wanted.image_id,
        blob_id=blob.blob_id,
        root=blob.root.hex() if blob.root is not None else None,
        size_bytes=blob.size_bytes,
        disk_format=wanted.disk_format,
        priority=wanted.priority,
        paused=wanted.is_paused,
        limit_bytes_per_second=swarm.limit_bytes_per_second,
        seeds=swarm.seeds,
        neighbours=swarm.neighbours,
        token=grant(blob, wanted.distribution_id, token_seconds=token_seconds),
        swarm_key=blob.swarm_key.hex(),
    )


def cache_call(
    blob: BlobRecord,
    distribution_id: DistributionId,
    *,
    public_url: str | None,
    token_seconds: int,
) -> CacheCall:
    """The fanout of a distribution: all that a host needs to fetch the image.

    The key of the swarm is not in it: a fanout is read by whoever is on the broker. Nor is the root
    while the image is still being fetched: nobody knows it.
    """
    meta: dict[str, object] = {
        "schema": "1.0",
        "distribution_id": str(distribution_id),
        "blob_id": blob.blob_id,
        "root": blob.root.hex() if blob.root is not None else None,
        "size_bytes": blob.size_bytes,
        "seeds": [] if blob.seed_url is None else [blob.seed_url],
        "token": grant(blob, distribution_id, token_seconds=token_seconds),
    }
    if public_url is not None:
        meta["manifest_url"] = f"{public_url.rstrip('/')}/v1/blobs/{blob.blob_id}/manifest"
    return CacheCall(image_id=blob.image_id, meta=meta)


def announcements(
    blob: BlobRecord,
    distribution_ids: Sequence[DistributionId],
    *,
    public_url: str | None,
    token_seconds: int,
) -> list[Message]:
    """The fanout of each of these distributions of a blob that is ready."""
    return [
        messages.cache_message(
            cache_call(blob, one, public_url=public_url, token_seconds=token_seconds)
        )
        for one in distribution_ids
    ]


class _Swarm:
    """One swarm in memory: the graph over its hosts, and under which limits it moves."""

    def __init__(self, blob_id: BlobId, *, asked_at: float = 0.0) -> None:
        self._graph = graph.Graph(blob_id)
        self._urls: dict[str, str] = {}
        self._racks: dict[str, str | None] = {}
        self._rules: dict[str, Sequence[DistributionId]] = {}
        self._moving: Counter[DistributionId] = Counter()
        self.record: SwarmRecord | None = None
        self.lock = asyncio.Lock()
        self.asked_at, self.read_at = asked_at, 0.0
        # of this process: another replica counts its own
        self._name = secrets.token_hex(4)
        self._changes = 0

    async def take(self, record: SwarmRecord) -> None:
        """The swarm is as the record says. Of thousands of members it lets others be answered in between.

        Until it is done, hosts are told of the swarm as it was, with those who joined so far. Who
        calls it holds the lock. The graph's hosts are those of `_urls` all the while.
        """
        urls: dict[str, str] = {}
        racks: dict[str, str | None] = {}
        rules: dict[str, Sequence[DistributionId]] = {}
        moving: Counter[DistributionId] = Counter()
        is_new = False
        for number, member in enumerate(record.members, start=1):
            if number % MEMBERS_AT_ONCE == 0:
                await asyncio.sleep(0)
            host = member.host
            rules[host] = member.distribution_ids
            if not member.is_there:
                continue
            urls[host], racks[host] = member.url, member.rack
            if member.is_moving:
                moving.update(member.distribution_ids)
            if self._urls.get(host) != member.url or self._racks.get(host, "") != member.rack:
                is_new = True
                self._graph.add(host, member.rack)
                self._urls[host], self._racks[host] = member.url, member.rack
        gone = self._urls.keys() - urls.keys()
        for host in gone:
            self._graph.remove(host)
        is_other = self.record is None or record.seeds != self.record.seeds
        self._changes += is_new or bool(gone) or is_other
        self._urls, self._racks, self._rules, self._moving = urls, racks, rules, moving
        self.record = record
        self.read_at = time.monotonic()

    @property
    def size(self) -> int:
        """How many hosts are in it."""
        return len(self._urls)

    @property
    def is_moving(self) -> bool:
        """Whether some host is still getting it."""
        return bool(self._moving)

    @property
    def lasts_seconds(self) -> float:
        """How long it is good for: reading thousands of members costs their reports' time."""
        if not self.is_moving:
            return IDLE_SECONDS
        return len(self._urls) / MEMBERS_READ_PER_SECOND

    def is_member(self, host: str) -> bool:
        """Whether the blob is wanted on the host, as far as is known here."""
        return host in self._rules or host in self._urls

    def add(self, host: str, url: str, rack: str | None) -> None:
        """A host has joined since the record was read."""
        if self._urls.get(host) == url and self._racks.get(host) == rack:
            return
        self._graph.add(host, rack)
        self._urls[host], self._racks[host] = url, rack
        self._changes += 1

    def neighbours(self, host: str, *, banned: Collection[str]) -> list[protocol.Neighbour]:
        """Whom a host is to ask; nobody, while it is not known itself."""
        if host not in self._graph:
            return []
        rack = self._graph.rack(host)
        return [
            # what hosts said of themselves was checked when they said it
            protocol.Neighbour.model_construct(
                host=other, url=self._urls[other], in_rack=self._graph.rack(other) == rack
            )
            for other in self._graph.neighbours(host)
            if other not in banned
        ]

    def version(self, limit_bytes_per_second: int | None, banned: Collection[str]) -> str:
        """Of what a host with that limit, and with those peers banned, is told."""
        return f"{self._name}.{self._changes}.{limit_bytes_per_second}.{len(banned)}"

    def is_halted(self, host: str) -> bool | None:
        """Whether no distribution lets the host fetch the blob now; None where none wants it there."""
        rules = self._rules_of(host)
        return all(rule.is_halted for _, rule in rules) if rules else None

    def distributions_of(self, host: str) -> list[DistributionId]:
        """Those that want the blob on the host."""
        return [one for one, _ in self._rules_of(host)]

    def limit_bytes_per_second(self, host: str, cluster: Shares | None) -> int | None:
        """What the host may fetch, by the most generous of its distributions.

        That is the distribution's limit of a host, or its share of what all of it may fetch, or of what the
        whole cluster may.
        """
        limits = []
        for distribution_id, rule in self._rules_of(host):
            if rule.is_halted:
                continue
            total = rule.total_bytes_per_second
            share = None
            if total is not None:
                share = max(1, total // max(1, self._moving[distribution_id]))
            of_all = None if cluster is None else cluster.of(distribution_id)
            named = (rule.host_bytes_per_second, share, of_all)
            known = [one for one in named if one is not None]
            if not known:
                return None
            limits.append(min(known))
        return max(limits, default=None)

    def _rules_of(self, host: str) -> list[tuple[DistributionId, SwarmRule]]:
        assert self.record is not None
        rules = self.record.rules
        # a host that joined since the record was read obeys all of them
        known = self._rules.get(host, list(rules))
        return [(one, rules[one]) for one in known if one in rules]


class Tracker:
    """The swarms that hosts ask about, in memory beside the database.

    What is asked often is answered from here: a report costs no query of its own. `refresh` keeps
    it current, so what another replica was told is known here a second later.
    """

    def __init__(
        self,
        swarms: SwarmStore,
        *,
        member_seconds: float,
        cluster_bytes_per_second: int | None = None,
    ) -> None:
        self._budget = Budget(
            swarms, bytes_per_second=cluster_bytes_per_second, member_seconds=member_seconds
        )
        self._store = swarms
        self._member_seconds = member_seconds
        self._swarms: dict[BlobId, _Swarm] = {}

    async def swarm(
        self, host: str, blob_id: BlobId, *, banned: Collection[str] = ()
    ) -> protocol.Swarm:
        """Whom a host is to ask for a blob, and how fast."""
        known = await self._known(blob_id)
        assert known.record is not None
        limit = await self._limit(known, host)
        return protocol.Swarm.model_construct(
            seeds=list(known.record.seeds),
            neighbours=known.neighbours(host, banned=banned),
            limit_bytes_per_second=limit,
            version=known.version(limit, banned),
        )

    async def news(
        self, host: str, blob_id: BlobId, told: protocol.BlobReport
    ) -> protocol.Swarm | None:
        """The swarm, or None where the host goes by it already."""
        known = await self._known(blob_id)
        limit = await self._limit(known, host)
        if told.swarm_version == known.version(limit, told.banned):
            return None
        return await self.swarm(host, blob_id, banned=told.banned)

    async def has_news(self, host: str, blob_id: BlobId, told: protocol.BlobReport) -> bool:
        """Whether the host goes by what is no longer so: that it may fetch the blob, or that it may not."""
        is_halted = (await self._known(blob_id)).is_halted(host)
        return is_halted is None or is_halted != (told.reason == protocol.PAUSED)

    async def heard(self, host: str, report: protocol.HostReport, blob_id: BlobId) -> bool:
        """A host has told of a blob that it is getting: others may be sent to it at once, if it should.

        Returns:
            Whether it should; whoever is sent to it shows it a token.
        """
        # one that is known here, and has changed, is read once for all who report, and tells who is in it
        begun = await self._known(blob_id) if blob_id in self._swarms else None
        is_member = begun is not None and begun.is_member(host)
        if not is_member and not await self._store.has_blob(host, UUID(blob_id)):
            return False
        known = await self._known(blob_id)
        if not known.is_moving:
            async with known.lock:  # another replica was told of what this host begins with
                if time.monotonic() - known.read_at > MOVING_SECONDS:
                    await known.take(await self._read(blob_id))
        known.add(host, report.url, report.labels.get("rack"))
        return True

    def members(self, blob_id: BlobId) -> int:
        """How many hosts are known to be in the swarm of the blob, as far as anybody has asked."""
        known = self._swarms.get(blob_id)
        return known.size if known is not None else 0

    def forget(self, blob_id: BlobId) -> None:
        """Distributions of the blob have changed: it is read again when somebody asks."""
        self._budget.forget()
        known = self._swarms.get(blob_id)
        if known is not None:
            # another one: what is being read now may be of before
            self._swarms[blob_id] = _Swarm(blob_id, asked_at=known.asked_at)

    async def refresh(self) -> None:
        """Swarms that somebody has asked about lately are current; the others are forgotten.

        Of those in which nobody moves, which every host asks about now and then, a little less so.
        """
        now = time.monotonic()
        for blob_id in list(self._swarms):
            known = self._swarms.get(blob_id)  # while others were read it may have been forgotten
            if known is None:
                continue
            # an agent may name any blob: only those are kept that some distribution is of
            is_ours = known.record is None or bool(known.record.rules)
            is_wanted = is_ours and now - known.asked_at <= self._member_seconds
            if is_wanted and now - known.read_at > known.lasts_seconds:
                async with known.lock:
                    await known.take(await self._read(blob_id))
            if not is_wanted:
                del self._swarms[blob_id]

    async def _limit(self, known: _Swarm, host: str) -> int | None:
        cluster = await self._budget.shares(known.distributions_of(host))
        return known.limit_bytes_per_second(host, cluster)

    async def _known(self, blob_id: BlobId) -> _Swarm:
        known = self._swarms.get(blob_id)
        if known is None:
            known = self._swarms[blob_id] = _Swarm(blob_id)
        known.asked_at = time.monotonic()
        if known.record is None:
            async with known.lock:  # a thousand hosts ask at once, and one query answers them
                if known.record is None:
                    await known.take(await self._read(blob_id))
        return known

    async def _read(self, blob_id: BlobId) -> SwarmRecord:
        return await self._store.swarm(blob_id, within_seconds=self._member_seconds)
