"""One blob being fetched from a seed and from peers, until it is complete.

One dispatcher keeps enough requests out that the downlink never runs dry: whatever happens (a
piece came, a neighbour told what it has, a peer may be asked again) wakes it, and it asks as long
as there is something to ask for. What comes is verified in a thread, and only then counts, is
journaled and served. What to ask of whom is decided by `receiving.Receiver`; this module keeps the
promises around it: nothing that a peer does ends the download. Only the disk can.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from hostler_common import logs
from hostler_precache.swarming import swarm
from hostler_precache.swarming.receiving import Receiver, Request, Source
from hostler_precache.swarming.swarm import News
from hostler_precache.transfer.blobs import Blob
from hostler_precache.transfer.peers import PeerBusyError, PeerClient, PeerError, PieceMissingError
from hostler_precache.transfer.pieces import (
    Landing,
    PieceData,
    PieceRejectedError,
    PieceStore,
    PieceStoreError,
)

log = logs.get(__name__)

FLUSH_SECONDS: Final = 1.0
FAILURES_TO_TELL: Final = 2  # one may be nothing but a restart
# until so many have come, or so long, everybody's first piece goes before whatever else there is to do; they are few
# of `following.FIRST_PIECES`, and so a fast link does not run dry
BEGUN_PIECES: Final = 16
BEGUN_SECONDS: Final = 1.0


@dataclass(slots=True)
class Received:
    """Bytes that came, by where from."""

    from_seed: int = 0
    from_peers: int = 0
    from_rack: int = 0
    wasted: int = 0


class _Link:
    """The way to one source: where it is, how often in a row it failed, and who follows its piece map."""

    def __init__(self, source: Source, url: str) -> None:
        self.source = source
        self.url = url
        self.unanswered = 0
        self.follower: asyncio.Task[None] | None = None
        self.heard_of = asyncio.Event()


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
        host: str = "",
        clock: Callable[[], float] = time.monotonic,
        received: Received | None = None,
        on_received: Callable[[str, int], None] = lambda source, count: None,
    ) -> None:
        """A download that begins with the pieces that `blob` has.

        Args:
            blob: told of each piece, which it serves from then on.
            store: where pieces go.
            client: how pieces are asked for.
            requests: how many pieces are asked for at once, most of which wait at their senders.
            rng: breaks ties.
            host: this host's name, as its neighbours know it.
            clock: monotonic seconds.
            received: totals of earlier attempts, to be added to.
            on_received: called with "seed", "rack", "outside" or "wasted" and a count of bytes.
        """
        self._blob = blob
        self._store = store
        self._client = client
        self._clock = clock
        self._on_received = on_received
        self._receiver = Receiver(
            blob.manifest.count,
            have=blob.have,
            piece_bytes=blob.manifest.piece_bytes,
            requests=requests,
            rng=rng,
            name=host,
        )
        self._picker = self._receiver.picker
        blob.known = self._picker.known  # what a neighbour has need not be told to it
        self._picker.grew(blob.manifest.known_pieces, 0)
        self._links: dict[str, _Link] = {}
        self._tasks: dict[Request, asyncio.Task[None]] = {}
        self._pace: swarm.Pace | None = None
        self._most_requests = requests
        self._wake = asyncio.Event()
        self._arrivals = 0
        self._begun = asyncio.Event()
        self._group: asyncio.TaskGroup | None = None
        self._last_failure = ""
        self.received = received or Received()

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
    def _has_to_come(self) -> bool:
        """Whether some piece lacks of those that the manifest tells of."""
        return bool(self._picker.missing or self._picker.in_flight)

    @property
    def banned(self) -> list[str]:
        """The peers that sent bad pieces too often."""
        return sorted(one.name for one in self._receiver.sources if one.is_banned)

    @property
    def nobody_answers(self) -> str | None:
        """What went wrong last, where each seed and neighbour has failed twice since it last answered.

        "Busy" is an answer, and so is that it has nothing: who gives them is reached.
        """
        links = [link for link in self._links.values() if not link.source.is_banned]
        if not links or any(link.unanswered < FAILURES_TO_TELL for link in links):
            return None
        return self._last_failure

    def set_swarm(
        self,
        seeds: Sequence[str],
        neighbours: Mapping[str, str],
        *,
        outside: Collection[str] = (),
    ) -> None:
        """Ask these from now on: seeds by URL, neighbours as host -> URL; others no more.

        Of those `outside` the rack, only what nobody in the rack has or is getting.
        """
        wanted = {f"seed {url}": (url, True, True) for url in seeds}
        wanted |= {host: (url, False, host not in outside) for host, url in neighbours.items()}
        for name, link in list(self._links.items()):
            source = link.source
            if source.is_banned:
                continue  # it stays known, so that it stays banned
            if wanted.get(name) != (link.url, source.is_seed, source.in_rack):
                self._stop_following(link)
                self._receiver.drop(name)
                del self._links[name]
        for name, (url, is_seed, in_rack) in wanted.items():
            if name not in self._links:
                source = self._receiver.add(name, is_seed=is_seed, in_rack=in_rack)
                self._links[name] = _Link(source, url)
        self._start_followers()
        self._wake.set()

    def grew(self) -> None:
        """The manifest has grown: what it tells of can be checked, and so may be asked for."""
        zeros = self._store.grew()
        self._picker.grew(self._blob.manifest.known_pieces, zeros)
        if zeros:
            self._blob.add_all(zeros)
        self._receiver.grew()
        self._wake.set()

    def limit(self, bytes_per_second: int | None) -> None:
        """Ask for no more than so much from now on; None: as much as comes."""
        if bytes_per_second is None:
            self._pace = None
        elif self._pace is None or self._pace.bytes_per_second != bytes_per_second:
            self._pace = swarm.Pace(bytes_per_second)
        self._wake.set()

    def try_now(self, host: str) -> bool:
        """A neighbour has been heard of: what waits for it waits no more. Whether it is one."""
        link = self._links.get(host)
        if link is None:
            return False
        link.heard_of.set()
        return True

    async def until_begun(self) -> None:
        """Return when a few pieces have come, or all that are known of are here, or neither in a while."""
        if self._has_to_come:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BEGUN_SECONDS):
                    await self._begun.wait()

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
                while not self._picker.is_complete:
                    self._wake.clear()
                    rest = self._fill(group)
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(rest):
                            await self._wake.wait()
                self._group = None  # from here on, nobody starts a follower
                flusher.cancel()
                for task in self._tasks.values():
                    task.cancel()
                for link in self._links.values():
                    self._stop_following(link)
            await asyncio.to_thread(self._store.flush)
            flushed = True
        finally:
            self._group = None
            if not flushed:
                # stopped in the middle: what came is journaled, and not fetched again
                with contextlib.suppress(PieceStoreError):
                    await asyncio.shield(asyncio.to_thread(self._store.flush))

    # --- asking

    def _fill(self, group: asyncio.TaskGroup) -> float:
        """Ask for as much as there is to ask for now; returns how long that is all."""
        now = self._clock()
        while True:
            wait = self._pace.wait_seconds(now) if self._pace is not None else 0.0
            if wait:
                return wait
            request = self._receiver.ask(now)
            if request is None:
                return self._receiver.rest_seconds(now)
            if self._pace is not None:
                self._pace.spend(self._blob.manifest.piece_bytes, now)
            source, piece = request.source, request.piece
            if piece is not None and not source.in_rack:
                self._blob.claim(piece)
            url = self._links[source.name].url
            self._tasks[request] = group.create_task(self._ask(request, url))

    async def _ask(self, request: Request, url: str) -> None:
        """One request and all that may become of it; it is not out any more after."""
        source, data = request.source, None
        try:
            data = await self._fetch(request, url)
            self._answered(source)
            if data is not None:
                assert request.piece is not None
                if isinstance(data, Landing) and not data.is_spilled:  # hashed, and in its place
                    self._store.write(request.piece, data)
                else:  # sha256 and pwrite release the interpreter lock
                    await asyncio.to_thread(self._store.write, request.piece, data)
                self._arrived(request, len(data))
        except PeerBusyError as exc:
            self._answered(source)
            self._nothing_sent()
            self._receiver.busy(request, exc.retry_after_seconds, self._clock())
        except PieceMissingError as exc:
            self._nothing_sent()
            if request.piece is not None and not source.is_seed:
                self._answered(source)
                self._receiver.lacking(request)
            else:
                self._failed(source, str(exc))
        except PeerError as exc:
            self._failed(source, str(exc))
        except PieceRejectedError:
            self._rejected(request, len(data or b""))
        finally:
            self._receiver.ended(request)
            self._tasks.pop(request, None)
            self._wake.set()

    async def _fetch(self, request: Request, url: str) -> PieceData | None:
        """What came as the piece of the request; None when nothing did that is of use."""
        source, timeout = request.source, self._receiver.timeout_seconds(request.source)
        if request.piece is not None:
            return await self._client.fetch(url, request.piece, timeout_seconds=timeout)
        answer = await self._client.fetch_next(url, timeout_seconds=timeout)
        if answer is None:
            self._nothing_sent()
            self._receiver.injected(source, self._clock())
            return None
        piece, data = answer
        if not self._receiver.chosen(request, piece):
            self._count("wasted", len(data))
            return None
        return data

    def _nothing_sent(self) -> None:
        """The request does not count for the limit."""
        if self._pace is not None:
            self._pace.give_back(self._blob.manifest.piece_bytes)

    def _arrived(self, request: Request, length: int) -> None:
        source, piece = request.source, request.piece
        assert piece is not None
        losers = self._receiver.arrived(request, self._clock())
        if losers is None:
            self._count("wasted", length)
            return
        self._blob.add(piece)
        self._arrivals += 1
        if self._arrivals >= BEGUN_PIECES or not self._has_to_come:
            self._begun.set()
        self._count("seed" if source.is_seed else "rack" if source.in_rack else "outside", length)
        for loser in losers:
            self._tasks[loser].cancel()

    def _answered(self, source: Source) -> None:
        link = self._links.get(source.name)
        if link is not None:
            link.unanswered = 0

    def _failed(self, source: Source, reason: str) -> None:
        if not source.failures:
            log.info("peer_failed", blob_id=self._blob.blob_id, peer=source.name, reason=reason)
        self._last_failure = f"{source.name}: {reason}"
        link = self._links.get(source.name)
        if link is not None:
            link.unanswered += 1
        self._receiver.failed(source, self._clock())

    def _rejected(self, request: Request, length: int) -> None:
        source = request.source
        self._count("wasted", length)
        self._receiver.rejected(source, self._clock())
        log.warning(
            "piece_rejected", blob_id=self._blob.blob_id, peer=source.name, piece=request.piece,
            bad_pieces=source.bad_pieces,
        )  # fmt: skip
        link = self._links.get(source.name)
        if source.is_banned and link is not None:
            self._stop_following(link)
            log.warning("peer_banned", blob_id=self._blob.blob_id, peer=source.name)

    def _count(self, source: str, count: int) -> None:
        match source:
            case "seed":
                self.received.from_seed += count
            case "rack":
                self.received.from_peers += count
                self.received.from_rack += count
            case "outside":
                self.received.from_peers += count
            case _:
                self.received.wasted += count
        self._on_received(source, count)

    # --- piece maps

    def _start_followers(self) -> None:
        if self._group is None:
            return
        for link in self._links.values():
            if link.follower is None and not link.source.is_seed and not link.source.is_banned:
                link.follower = self._group.create_task(self._follow(link))

    def _stop_following(self, link: _Link) -> None:
        if link.follower is not None:
            link.follower.cancel()
            link.follower = None

    async def _follow(self, link: _Link) -> None:
        source = link.source
        while True:
            link.heard_of.clear()
            try:
                await self._client.follow(link.url, partial(self._hear, link))
                reason = "it closed the piece map"
            except PeerError as exc:
                reason = str(exc)
            self._receiver.silent(source)
            self._failed(source, reason)
            # it may not serve yet: when it does, it follows our map, and then it is tried at once
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, source.not_before - self._clock())):
                    await link.heard_of.wait()

    def _hear(self, link: _Link, news: News) -> None:
        if link.follower is None:
            return  # its last words, after we have stopped listening
        link.unanswered = 0
        for piece in swarm.members(self._receiver.heard(link.source, news, self._clock())):
            self._blob.claim(piece)  # told on: not all of a rack are neighbours
        if (
            len(self._tasks) < self._most_requests
        ):  # else there is nothing to ask for before one ends
            self._wake.set()

    async def _flush_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            await asyncio.to_thread(self._store.flush)
