"""One blob being fetched from a seed and from peers, until it is complete.

Workers take the next best request (a piece of the seed's choice while it injects, else the rarest
piece of a neighbour, else an orphan from the seed), verify what comes in a thread, and only then
let it count, be journaled and be served. Decisions are `swarm.Picker`'s; this module keeps the
promises around them: a peer that sends bad pieces is banned, one that fails is left alone for a
while, and nothing that a peer does ends the download. Only the disk can.
"""

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from hostler_common import logs
from hostler_precache import swarm
from hostler_precache.blobs import Blob
from hostler_precache.peers import PeerBusyError, PeerClient, PeerError, PieceMissingError
from hostler_precache.pieces import PieceRejectedError, PieceStore, PieceStoreError

log = logs.get(__name__)

BAD_PIECES_TO_BAN: Final = 3
SEED_REST_SECONDS: Final = 30.0
FIRST_REST_SECONDS: Final = 0.5
LONGEST_REST_SECONDS: Final = 30.0
BUSY_REST_SECONDS: Final = 0.05
REFUSED_ORPHAN_SECONDS: Final = 0.5
TIMEOUT_FLOOR_SECONDS: Final = 60.0
REQUESTS_PER_PEER: Final = 2
FLUSH_SECONDS: Final = 1.0


@dataclass(slots=True)
class _Peer:
    """What is known of one that may be asked."""

    name: str
    url: str
    is_seed: bool
    outstanding: int = 0
    choosing: int = 0
    failures: int = 0
    bad_pieces: int = 0
    is_banned: bool = False
    is_injected: bool = False
    not_before: float = 0.0
    durations: deque[float] = field(default_factory=lambda: deque(maxlen=8))
    follower: asyncio.Task[None] | None = None


@dataclass(slots=True)
class Received:
    """Bytes that came, by where from."""

    from_seed: int = 0
    from_peers: int = 0
    wasted: int = 0


class Download:
    """The download of one blob into one store. `run` it once."""

    def __init__(
        self,
        blob: Blob,
        store: PieceStore,
        client: PeerClient,
        *,
        requests: int,
        rng: random.Random,
        clock: Callable[[], float] = time.monotonic,
        on_received: Callable[[str, int], None] = lambda source, count: None,
    ) -> None:
        """A download that begins with the pieces that `blob` has.

        Args:
            blob: told of each piece, which it serves from then on.
            store: where pieces go.
            client: how pieces are asked for.
            requests: how many pieces are on their way at once.
            rng: breaks ties.
            clock: monotonic seconds.
            on_received: called with "seed", "peer" or "wasted" and a count of bytes.
        """
        self._blob = blob
        self._store = store
        self._client = client
        self._requests = requests
        self._rng = rng
        self._clock = clock
        self._on_received = on_received
        self._picker = swarm.Picker(blob.manifest.count, have=blob.have)
        self._peers: dict[str, _Peer] = {}
        self._refused: dict[int, float] = {}
        self._wake = asyncio.Event()
        self._group: asyncio.TaskGroup | None = None
        self.received = Received()

    @property
    def pieces_done(self) -> int:
        """How many pieces are verified."""
        return self._picker.have.bit_count()

    @property
    def bytes_done(self) -> int:
        """How many bytes are verified."""
        manifest = self._blob.manifest
        whole = self.pieces_done * manifest.piece_bytes
        if manifest.count and self._picker.have >> (manifest.count - 1) & 1:
            whole -= manifest.count * manifest.piece_bytes - manifest.size_bytes
        return whole

    @property
    def banned(self) -> list[str]:
        """The peers that sent bad pieces too often."""
        return sorted(peer.name for peer in self._peers.values() if peer.is_banned)

    def set_swarm(self, seeds: Sequence[str], neighbours: Mapping[str, str]) -> None:
        """Ask these from now on: seeds by URL, neighbours as host -> URL; others no more."""
        wanted = {f"seed {url}": (url, True) for url in seeds}
        wanted |= {host: (url, False) for host, url in neighbours.items()}
        for name, peer in list(self._peers.items()):
            if peer.is_banned:
                continue  # it stays known, so that it stays banned
            if wanted.get(name) != (peer.url, peer.is_seed):
                self._drop(peer)
                del self._peers[name]
        for name, (url, is_seed) in wanted.items():
            if name not in self._peers:
                self._peers[name] = _Peer(name=name, url=url, is_seed=is_seed)
        self._start_followers()
        self._wake.set()

    async def run(self) -> None:
        """Return when every piece is verified and journaled.

        Raises:
            pieces.PieceStoreError: the disk refused (inside an exception group).
        """
        flushed = False
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                self._start_followers()
                flusher = group.create_task(self._flush_now_and_then())
                workers = [group.create_task(self._work()) for _ in range(self._requests)]
                await asyncio.wait(workers)
                self._group = None  # from here on, nobody starts a follower
                flusher.cancel()
                for peer in self._peers.values():
                    self._drop(peer)
            await asyncio.to_thread(self._store.flush)
            flushed = True
        finally:
            self._group = None
            if not flushed:
                # stopped in the middle: what came is journaled, and not fetched again
                with contextlib.suppress(PieceStoreError):
                    await asyncio.shield(asyncio.to_thread(self._store.flush))

    # --- workers

    async def _work(self) -> None:
        while not self._picker.is_complete:
            self._wake.clear()
            chosen = self._choose()
            if chosen is None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._rest_seconds()):
                        await self._wake.wait()
                continue
            peer, piece = chosen
            peer.outstanding += 1
            try:
                await self._ask(peer, piece)
            finally:
                peer.outstanding -= 1
                self._wake.set()

    def _choose(self) -> tuple[_Peer, int | None] | None:
        """Whom to ask for what; None for the piece means: what the seed chooses."""
        now = self._clock()
        ready = [
            peer
            for peer in self._peers.values()
            if not peer.is_banned
            and peer.outstanding < REQUESTS_PER_PEER
            and peer.not_before <= now
        ]
        self._rng.shuffle(ready)
        ready.sort(key=lambda peer: peer.outstanding)
        seeds = [peer for peer in ready if peer.is_seed]
        for seed in seeds:
            if not seed.is_injected and self._picker.missing:
                return seed, None
        for peer in ready:
            if not peer.is_seed:
                piece = self._picker.pick(peer.name, self._rng)
                if piece is not None:
                    return peer, piece
        orphans = self._picker.orphans() & ~self._refused_now(now)
        # a piece of the seed's choice that is still on its way would look like an orphan
        if orphans and seeds and not any(peer.choosing for peer in self._peers.values()):
            piece = swarm.choose(orphans, self._rng)
            self._picker.started(piece)
            return seeds[0], piece
        return None

    def _refused_now(self, now: float) -> int:
        self._refused = {piece: until for piece, until in self._refused.items() if until > now}
        return swarm.bits(self._refused)

    def _rest_seconds(self) -> float:
        now = self._clock()
        times = [peer.not_before for peer in self._peers.values()] + list(self._refused.values())
        return min((at - now for at in times if at > now), default=1.0)

    async def _ask(self, peer: _Peer, piece: int | None) -> None:
        """One request and all that may become of it; the piece is no longer in flight after."""
        started = self._clock()
        timeout = swarm.timeout_seconds(peer.durations, floor=TIMEOUT_FLOOR_SECONDS)
        try:
            if piece is None:
                peer.choosing += 1
                try:
                    answer = await self._client.fetch_next(peer.url, timeout_seconds=timeout)
                finally:
                    peer.choosing -= 1
                if answer is None:
                    peer.is_injected = True
                    return
                chosen, data = answer
                if not self._picker.is_wanted(chosen):
                    self._count("wasted", len(data))
                    return
                piece = chosen
                self._picker.started(piece)
            else:
                data = await self._client.fetch(peer.url, piece, timeout_seconds=timeout)
            # sha256 and pwrite release the interpreter lock
            await asyncio.to_thread(self._store.write, piece, data)
        except BaseException as exc:
            if piece is not None:
                self._picker.failed(piece)
            match exc:
                case PeerBusyError():
                    self._busy(peer, piece, exc.retry_after_seconds)
                case PieceMissingError():
                    self._missing(peer, piece)
                case PeerError():
                    self._failed(peer, str(exc))
                case PieceRejectedError():
                    self._bad(peer, piece, len(data))
                case _:
                    raise
            return
        self._picker.received(piece)
        self._blob.add(piece)
        peer.failures = 0
        peer.durations.append(self._clock() - started)
        self._count("seed" if peer.is_seed else "peer", len(data))

    def _busy(self, peer: _Peer, piece: int | None, retry_after_seconds: float) -> None:
        if peer.is_seed and piece is not None:
            # the seed has just given it to somebody else, who will show it soon
            self._refused[piece] = self._clock() + REFUSED_ORPHAN_SECONDS
        else:
            peer.not_before = self._clock() + max(retry_after_seconds, BUSY_REST_SECONDS)

    def _missing(self, peer: _Peer, piece: int | None) -> None:
        if piece is not None and not peer.is_seed:
            self._picker.neighbour_lacks(peer.name, piece)
        else:
            self._failed(peer, "the seed does not serve this blob")

    def _failed(self, peer: _Peer, reason: str) -> None:
        if not peer.failures:
            log.info("peer_failed", blob_id=self._blob.blob_id, peer=peer.name, reason=reason)
        rest = min(LONGEST_REST_SECONDS, FIRST_REST_SECONDS * 2**peer.failures)
        peer.failures = min(peer.failures + 1, 16)
        peer.not_before = self._clock() + rest

    def _bad(self, peer: _Peer, piece: int | None, count: int) -> None:
        self._count("wasted", count)
        peer.bad_pieces += 1
        log.warning(
            "piece_rejected", blob_id=self._blob.blob_id, peer=peer.name, piece=piece,
            bad_pieces=peer.bad_pieces,
        )  # fmt: skip
        if peer.bad_pieces < BAD_PIECES_TO_BAN:
            return
        if peer.is_seed:  # there may be no other: its operator has to see it, and it may recover
            peer.not_before = self._clock() + SEED_REST_SECONDS
            return
        peer.is_banned = True
        self._drop(peer)
        log.warning("peer_banned", blob_id=self._blob.blob_id, peer=peer.name)

    def _count(self, source: str, count: int) -> None:
        match source:
            case "seed":
                self.received.from_seed += count
            case "peer":
                self.received.from_peers += count
            case _:
                self.received.wasted += count
        self._on_received(source, count)

    # --- piece maps

    def _start_followers(self) -> None:
        if self._group is None:
            return
        for peer in self._peers.values():
            if peer.follower is None and not peer.is_seed and not peer.is_banned:
                peer.follower = self._group.create_task(self._follow(peer))

    async def _follow(self, peer: _Peer) -> None:
        while True:
            try:
                async for pieces in self._client.follow(peer.url):
                    self._picker.neighbour_has(peer.name, pieces)
                    self._wake.set()
                reason = "it closed the piece map"
            except PeerError as exc:
                reason = str(exc)
            self._picker.forget_neighbour(peer.name)
            self._failed(peer, reason)
            await asyncio.sleep(max(0.0, peer.not_before - self._clock()))

    def _drop(self, peer: _Peer) -> None:
        if peer.follower is not None:
            peer.follower.cancel()
            peer.follower = None
        self._picker.forget_neighbour(peer.name)

    async def _flush_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            await asyncio.to_thread(self._store.flush)
