"""The ledger of claims: choose a node, take from it, and say so to the world in one transaction.

Candidates come from the fleet in memory, best first; the database decides. A claim that is refused
has been refused by the database: before it says no, the ledger reads the fleet again and asks every
node that still shows room. Each try is a transaction of its own, so nothing of a failed try can be
seen by the next one.

Lock order: the idempotency key, then one node. A node that turns out to have no room is let go (its
savepoint is rolled back) before the next one is locked, so claims never wait for each other in a
circle.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Final
from uuid import UUID

from hostler_capacity import claim as claims
from hostler_capacity import claim_store, fit, flavor, messages, overhead, resources
from hostler_capacity.claim import Claim, ClaimId, NodeId
from hostler_capacity.claim_store import LockedNode, Order
from hostler_capacity.fit import Blocker, NodeState
from hostler_capacity.fleet import FleetView
from hostler_capacity.metrics import Metrics
from hostler_common import db, errors, idempotency, logs, outbox

log = logs.get(__name__)

FIRST_CHOICES: Final = 8
"""How many of the best nodes are tried without waiting, so that many claims spread over them."""

EXPLAINED_NODES: Final = 20
"""How many nodes a refusal explains."""

SWEEP_NODES: Final = 500


class ClaimNotFound(errors.NotFound):
    """There is no such claim, or none that the caller may see."""

    code = "capacity.claim.not_found"


class NoRoom(errors.Conflict):
    """No node that was asked for has room. The fields say which resource is short where."""

    code = "capacity.claim.no_room"


class NotHeld(errors.Conflict):
    """The claim has ended, so there is nothing to confirm."""

    code = "capacity.claim.not_held"


class NodeNotFound(errors.NotFound):
    """No node has that address."""

    code = "capacity.node.not_found"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What somebody asks for. Without an address, any node will do."""

    order: Order
    flavor: flavor.Flavor
    host: str | None = None
    hypervisor_hostname: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """The `Idempotency-Key` of a request, its sender, and what was asked for."""

    key: str
    caller: str
    request: object


@dataclass(frozen=True, slots=True, kw_only=True)
class Short:
    """Why one node did not take the claim."""

    host: str
    hypervisor_hostname: str
    blocker: Blocker | None
    resource: resources.ResourceClass | None
    free: int
    need: int

    @property
    def short_by(self) -> int:
        """How much more would have had to be free."""
        return max(0, self.need - self.free)


class Ledger:
    """Claims of one database. Any number of processes may keep one side by side."""

    def __init__(
        self,
        pool: db.Pool,
        view: FleetView,
        *,
        catalogue: overhead.Catalogue,
        stale: timedelta,
        metrics: Metrics,
    ) -> None:
        self._pool = pool
        self._view = view
        self._catalogue = catalogue
        self._stale = stale
        self._metrics = metrics

    async def grant(self, wish: Wish, replay: Replay | None = None) -> Claim:
        """Return a claim that is held for the caller; the same one for a request sent twice.

        Raises:
            NoRoom: no node has room, by the database's own counters.
            NodeNotFound: the address is of no node.
            KeyReused: the key was used for another request.
            Busy: a node was locked for too long.
        """
        with self._metrics.claim_seconds.time():
            try:
                return await self._try(wish, replay)
            except _NothingTakenError:
                await self._view.refresh()
            try:
                return await self._try(wish, replay)
            except _NothingTakenError:
                await self._view.refresh()
            refusal = self._refusal(wish)
            self._metrics.claims.labels("refused").inc()
            log.info("claim_refused", flavor=wish.order.flavor, code=refusal.code)
            raise refusal

    async def granted_before(self, replay: Replay) -> Claim | None:
        """Return the claim that this request was granted already; None where it was not.

        Raises:
            KeyReused: the key was used for another request.
        """
        async with db.connection(self._pool) as connection:
            looking = connection.transaction()
            await looking.start()
            try:
                return await _begin(connection, replay)
            finally:
                await looking.rollback()  # which lets the key go

    async def _try(self, wish: Wish, replay: Replay | None) -> Claim:
        async with db.transaction(self._pool) as connection:
            if replay is not None:
                earlier = await _begin(connection, replay)
                if earlier is not None:
                    return earlier
            if not await self._take_one(connection, wish):
                raise _NothingTakenError
            granted = await _must_get(connection, wish.order.claim_id)
            await outbox.add(connection, [messages.claim_message(messages.CLAIM_GRANTED, granted)])
            if replay is not None:
                await idempotency.finish(
                    connection,
                    replay.key,
                    caller=replay.caller,
                    status=201,
                    body=str(granted.id),
                )
        self._metrics.claims.labels("granted").inc()
        log.info("claim_granted", claim_id=str(granted.id), host=granted.host)
        return granted

    def _candidates(self, wish: Wish) -> Iterator[NodeId]:
        fleet = self._view.fleet
        if wish.host is not None:
            return (node.id for node in fleet.nodes if _is_at(node, wish))
        found = fleet.fit(wish.flavor, self._view.now())
        return (fleet.nodes[at].id for at in found.best_first())

    async def _take_one(self, connection: db.Connection, wish: Wish) -> bool:
        candidates = self._candidates(wish)
        left = []
        for node_id in itertools.islice(candidates, FIRST_CHOICES):
            taken = await self._take(connection, node_id, wish, wait=False)
            if taken:
                return True
            if taken is None:
                left.append(node_id)
        for node_id in itertools.chain(left, candidates):
            if await self._take(connection, node_id, wish, wait=True):
                return True
        return False

    async def _take(
        self, connection: db.Connection, node_id: NodeId, wish: Wish, *, wait: bool
    ) -> bool | None:
        """Whether the node gave what was asked for; None if it could not be locked."""
        savepoint = connection.transaction()
        await savepoint.start()
        node = await claim_store.lock_node(connection, node_id, stale=self._stale, wait=wait)
        need = self._need(node, wish.flavor) if node else None
        if need is not None and await claim_store.take(connection, node_id, need, wish.order):
            await savepoint.commit()
            return True
        await savepoint.rollback()  # which lets the node's lock go
        return False if node else None

    def _need(self, node: LockedNode, wanted: flavor.Flavor) -> flavor.Need | None:
        whole = wanted.kind is flavor.Kind.NODE
        if node.state is not NodeState.UP or node.bare_metal != whole:
            return None
        model = self._catalogue.default_for(node.hypervisor_type)
        if not whole:
            return flavor.need(wanted, model)
        limits = {name: counter.limit for name, counter in node.counters.items()}
        if flavor.matches_whole(wanted, limits):
            return None
        return flavor.need_whole(limits, model)

    def _refusal(self, wish: Wish) -> errors.HostlerError:
        """Explain a refusal by the fleet that was read after it."""
        fleet = self._view.fleet
        found = fleet.fit(wish.flavor, self._view.now())
        asked = [at for at, node in enumerate(fleet.nodes) if _is_at(node, wish)]
        if wish.host is not None and not asked:
            return NodeNotFound(f"no node is at {wish.host}", host=wish.host)
        short = [_short(found.at(at)) for at in asked if found.counts[at] == 0]
        nearest = sorted(short, key=lambda each: (each.blocker is not None, each.short_by))
        where = f"{wish.host} has" if wish.host else f"none of {len(asked)} nodes has"
        reason = ""
        if nearest and nearest[0].blocker is None:
            best = nearest[0]
            reason = f"; nearest is {best.host}, short of {best.short_by} {best.resource}"
        elif nearest:
            reason = f"; {nearest[0].host}: {nearest[0].blocker}"
        return NoRoom(
            f"{where} room for this claim{reason}",
            nodes_asked=len(asked),
            short=[
                {
                    "host": each.host,
                    "hypervisor_hostname": each.hypervisor_hostname,
                    "blocker": each.blocker,
                    "resource": each.resource,
                    "free": each.free,
                    "need": each.need,
                    "short_by": each.short_by,
                }
                for each in nearest[:EXPLAINED_NODES]
            ],
        )

    async def show(self, claim_id: ClaimId, projects: frozenset[str] | None) -> Claim:
        """Return the claim.

        Raises:
            ClaimNotFound: there is none that these projects may see.
        """
        async with db.connection(self._pool) as connection:
            return await _visible(connection, claim_id, projects)

    async def confirm(self, claim_id: ClaimId, projects: frozenset[str] | None) -> Claim:
        """Return the claim, confirmed; confirming twice changes nothing.

        Raises:
            ClaimNotFound: there is none that these projects may see.
            NotHeld: it was released or has expired.
        """
        async with db.transaction(self._pool) as connection:
            known = await _visible(connection, claim_id, projects)
            confirmed = await claim_store.confirm(connection, claim_id)
            if confirmed is None:
                known = await _must_get(connection, claim_id)
                _may_confirm(known)
                return known
            await outbox.add(
                connection, [messages.claim_message(messages.CLAIM_CONFIRMED, confirmed)]
            )
        self._metrics.claims.labels("confirmed").inc()
        log.info("claim_confirmed", claim_id=str(claim_id), host=confirmed.host)
        return confirmed

    async def release(self, claim_id: ClaimId, projects: frozenset[str] | None) -> Claim:
        """Return the claim, ended; what ended before stays as it was.

        Raises:
            ClaimNotFound: there is none that these projects may see.
        """
        async with db.transaction(self._pool) as connection:
            known = await _visible(connection, claim_id, projects)
            released = await claim_store.release(connection, known)
            if released is None:
                return await _must_get(connection, claim_id)
            await outbox.add(
                connection, [messages.claim_message(messages.CLAIM_RELEASED, released)]
            )
        self._metrics.claims.labels("released").inc()
        log.info("claim_released", claim_id=str(claim_id), host=released.host)
        return released

    async def sweep(self) -> int:
        """End the claims whose time is up; return how many. Several processes may sweep at once."""
        async with db.connection(self._pool) as connection:
            due = await claim_store.due_nodes(connection, limit=SWEEP_NODES)
        count = 0
        for node_id in due:
            async with db.transaction(self._pool) as connection:
                ended = await claim_store.expire(connection, node_id)
                await outbox.add(
                    connection,
                    [messages.claim_message(messages.CLAIM_EXPIRED, each) for each in ended],
                )
            count += len(ended)
            self._metrics.claims.labels("expired").inc(len(ended))
            for each in ended:
                log.info("claim_expired", claim_id=str(each.id), host=each.host)
        return count

    async def audit(self) -> None:
        """Say, loudly, if any counter is not the sum of its live claims."""
        async with db.connection(self._pool) as connection:
            found = await claim_store.imbalances(connection)
        self._metrics.imbalances.set(len(found))
        for each in found:
            log.error(
                "counter_out_of_balance",
                host=each.host,
                hypervisor_hostname=each.hypervisor_hostname,
                resource=each.resource,
                claimed=each.claimed,
                sum_of_claims=each.sum_of_claims,
                ceiling=each.ceiling,
            )


class _NothingTakenError(Exception):
    """Rolls back a transaction or savepoint in which nothing was taken."""


def _may_confirm(known: Claim) -> None:
    # a held claim that could not be confirmed has had its time; the sweep has yet to come by
    state = claims.State.EXPIRED if known.state is claims.State.HELD else known.state
    try:
        claims.after(state, claims.Action.CONFIRM)
    except claims.IllegalStepError as exc:
        raise NotHeld(f"{exc}: make a new one", state=state) from exc


def _is_at(node: fit.Node, wish: Wish) -> bool:
    return wish.host in (None, node.host) and wish.hypervisor_hostname in (
        None,
        node.hypervisor_hostname,
    )


def _short(found: fit.NodeFit) -> Short:
    binding = found.binding
    return Short(
        host=found.node.host,
        hypervisor_hostname=found.node.hypervisor_hostname,
        blocker=found.blocker,
        resource=binding.resource if binding else None,
        free=binding.free if binding else 0,
        need=binding.need if binding else 0,
    )


async def _begin(connection: db.Connection, replay: Replay) -> Claim | None:
    """Claim the key for this transaction; return what it was used for before, if it was."""
    stored = await idempotency.begin(
        connection, replay.key, caller=replay.caller, request=replay.request
    )
    return None if stored is None else await _must_get(connection, ClaimId(UUID(stored.body)))


async def _must_get(connection: db.Connection, claim_id: ClaimId) -> Claim:
    found = await claim_store.get(connection, claim_id)
    if found is None:
        raise ClaimNotFound(f"there is no claim {claim_id}")
    return found


async def _visible(
    connection: db.Connection, claim_id: ClaimId, projects: frozenset[str] | None
) -> Claim:
    found = await _must_get(connection, claim_id)
    if projects is not None and found.project_id not in projects:
        raise ClaimNotFound(f"there is no claim {claim_id}")
    return found
