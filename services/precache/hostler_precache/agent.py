"""Precache's part of the agent on a compute host: it keeps what the host should have.

A fanout is a hint: the agent then asks precache what it should have, as it does at start and now
and then, so that hosts that were down, wiped or new converge. Each image is fetched in a swarm,
placed under its final name in one step, and served to others from then on. No database: after a
restart the files on disk and their journals say what there is.
"""

import asyncio
import contextlib
import itertools
import os
import random
import uuid
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from hostler_common import client, errors, logs, runtime
from hostler_common import settings as common_settings
from hostler_common.agent import AgentContext
from hostler_common.bus import Delivery, Reject
from hostler_precache import envelope, messages, protocol, threads
from hostler_precache.metrics import AgentMetrics
from hostler_precache.placing import keeper, placement, shelf
from hostler_precache.placing.placement import Wanted
from hostler_precache.placing.shelf_records import Record
from hostler_precache.protocol import REASON_CHARACTERS, DesiredImage, HostState
from hostler_precache.settings import AgentSettings
from hostler_precache.swarming import swarm
from hostler_precache.transfer import connections, manifest, network_card, pieces, sites, tls
from hostler_precache.transfer.blobs import Blob, BlobServer
from hostler_precache.transfer.download import Download, Received
from hostler_precache.transfer.following import Following, GivenUp
from hostler_precache.transfer.manifest import BlobId, Manifest, PieceList
from hostler_precache.transfer.peers import HttpPeerClient
from hostler_precache.transfer.slots import Slots

log = logs.get(__name__)

MIN_REPORT_SECONDS = 0.1
MAX_REPORTED = 1000
REPAIR_SECONDS = 600.0
ENDING_SECONDS = 5.0


class _Refused(Exception):
    """The image will not be here, with the state and the reason to report."""

    def __init__(self, state: HostState, reason: str) -> None:
        super().__init__(reason)
        self.state = state
        self.reason = reason


class _Work:
    """One image on this host: what is wanted, how far it is, and the task that gets it there."""

    def __init__(self, wanted: DesiredImage) -> None:
        self.wanted = wanted
        self.swarm_version = ""
        self.blob_id = BlobId(wanted.blob_id)
        self.state = HostState.WAITING
        self.reason: str | None = None
        self.blob: Blob | None = None
        self.download: Download | None = None
        self.received = Received()
        self.sent_bytes: Counter[str] = Counter()
        self.resumed = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self.ended_at: float | None = None

    @property
    def placed(self) -> Wanted:
        """The image as placers know it."""
        image = self.wanted
        return Wanted(
            image_id=manifest.ImageId(image.image_id),
            blob_id=self.blob_id,
            disk_format=image.disk_format,
        )

    def tell_swarm(self) -> None:
        """The download knows whom to ask, and how fast it may."""
        if self.download is not None:
            image = self.wanted
            self.download.set_swarm(
                image.seeds,
                {one.host: one.url for one in image.neighbours},
                outside=[one.host for one in image.neighbours if not one.in_rack],
            )
            self.download.limit(image.limit_bytes_per_second)

    def _why_nothing_comes(self) -> str | None:
        if self.state is not HostState.TRANSFERRING or self.download is None:
            return None
        failure = self.download.nobody_answers
        return None if failure is None else f"peers.unreachable: {failure}"[:REASON_CHARACTERS]

    def report(self) -> protocol.BlobReport:
        """What precache is told."""
        download, blob, received = self.download, self.blob, self.received
        pieces_done = blob.have.bit_count() if blob else 0
        bytes_done = download.bytes_done if download else 0
        if blob is not None and self.state in (HostState.CACHED, HostState.EXISTING):
            bytes_done = blob.manifest.size_bytes
        return protocol.BlobReport(
            distribution_id=self.wanted.distribution_id,
            blob_id=self.blob_id,
            state=self.state,
            reason=self.reason or self._why_nothing_comes(),
            pieces_done=pieces_done,
            bytes_done=bytes_done,
            bytes_from_seed=received.from_seed,
            bytes_from_peers=received.from_peers,
            bytes_from_rack=received.from_rack,
            bytes_wasted=received.wasted,
            sent_bytes=dict(self.sent_bytes),
            coverage=(
                swarm.coverage(blob.have, blob.manifest.count, protocol.COVERAGE_BUCKETS)
                if blob
                else ""
            ),
            swarm_version=self.swarm_version,
            banned=download.banned if download else [],
        )


@dataclass(frozen=True, slots=True)
class _Transport:
    """What a transfer runs on."""

    group: asyncio.TaskGroup
    api: client.Api
    wire: connections.Connections


class CacheAgent:
    """Everything of precache on one host; `run` it for as long as the agent lives."""

    def __init__(
        self,
        *,
        host: str,
        url: str,
        link_bytes_per_second: int | None,
        settings: AgentSettings,
        token: str | None,
        server: BlobServer,
        held: shelf.Shelf,
        metrics: AgentMetrics,
        secured: tls.Tls | None = None,
    ) -> None:
        self._host = host
        self._url = url
        self._link_bytes_per_second = link_bytes_per_second
        self._settings = settings
        self._token = token
        self._server = server
        self._shelf = held
        self._secured = secured
        self._metrics = metrics
        self._session_id = str(uuid.uuid4())
        self._sequence = itertools.count(1)
        self._rng = random.Random()  # noqa: S311  breaks ties, guards nothing
        self._works: dict[BlobId, _Work] = {}
        self._deleted: frozenset[manifest.ImageId] = frozenset()
        self._slots = Slots(settings.downloads)
        # what comes as slowly as its source sends must not be in the way of what is all there
        self._growing_slots = Slots(settings.downloads)
        self._look_again = asyncio.Event()
        self._retry: asyncio.TimerHandle | None = None
        self._tell_now = asyncio.Event()

    async def on_cache(self, delivery: Delivery) -> None:
        """Somebody said `cache(image_id, meta)`: ask precache what that means for this host."""
        try:
            call = envelope.unpack(delivery.body)
        except envelope.EnvelopeError as exc:
            raise Reject(str(exc), code="precache.call.malformed") from exc
        if call is not None:
            log.info("cache_called", image_id=call.image_id)
            self.look_again()

    def look_again(self) -> None:
        """Ask precache now: what was called for before this host could hear it is not called again."""
        self._look_again.set()

    def watched_by(self, host: str) -> None:
        """Another host follows our piece map: it serves its own by now.

        If it is new to us, precache will name it as our neighbour.
        """
        known = [
            work.download.try_now(host)
            for work in self._works.values()
            if work.download is not None
        ]
        if not any(known):
            self._tell_now.set()

    async def run(self) -> None:
        """Keep this host as it should be, until cancelled; another agent may do so then."""
        try:
            await self._run()
        finally:
            # in a thread: one that was left in the middle of a step has the shelf still
            await asyncio.shield(asyncio.to_thread(self._shelf.close))

    async def _run(self) -> None:
        url = self._settings.precache_url
        context = self._secured.client if self._secured else None
        async with (
            client.open_api(url, token=self._token, timeout_seconds=10.0) as api,
            connections.Connections(
                tls=context, link_bytes_per_second=self._link_bytes_per_second
            ) as wire,
            asyncio.TaskGroup() as group,
        ):
            group.create_task(self._report_forever(api))
            transport = _Transport(group, api, wire)
            group.create_task(self._keep_house(transport))
            while True:
                self._look_again.clear()
                try:
                    answer = await api.get("/v1/desired", host=self._host)
                    ending = self._adopt(protocol.Desired.model_validate(answer), transport)
                    if ending:  # then nobody holds their files any more
                        await asyncio.wait(ending, timeout=ENDING_SECONDS)
                    await self._discard_partials()
                    pause = self._settings.desired_seconds
                except (errors.HostlerError, ValueError) as exc:
                    log.warning("desired_unknown", reason=str(exc))
                    pause = min(5.0, self._settings.desired_seconds)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause * self._rng.uniform(0.9, 1.1)):
                        await self._look_again.wait()

    # --- what is wanted

    async def _discard_partials(self) -> None:
        """What is left of images that are not wanted, or that are in place already, is gone."""
        wanted = {
            work.blob_id
            for work in self._works.values()
            if work.state not in (HostState.CACHED, HostState.EXISTING)
        }
        try:
            discarded = await asyncio.to_thread(
                pieces.discard_others, self._shelf.directory, wanted
            )
        except OSError as exc:
            log.warning("partials_kept", reason=exc.strerror)
            return
        if discarded:
            log.info("partials_discarded", blob_ids=discarded)

    def _adopt(self, desired: protocol.Desired, transport: _Transport) -> list[asyncio.Task[None]]:
        """Start what is new, retry what failed a while ago, stop what is not wanted any more.

        Returns:
            Those that were stopped.
        """
        ending = []
        self._deleted = frozenset(manifest.ImageId(one) for one in desired.deleted_image_ids)
        wanted = {BlobId(image.blob_id): image for image in desired.images}
        for blob_id in self._works.keys() - wanted.keys():
            work = self._works.pop(blob_id)
            if work.task is not None:
                work.task.cancel()
                ending.append(work.task)
            log.info("image_unwanted", image_id=work.wanted.image_id)
        now = asyncio.get_running_loop().time()
        for blob_id, image in wanted.items():
            if blob_id not in self._works:
                self._works[blob_id] = _Work(image)
                self._start(self._works[blob_id], transport)
                continue
            work = self._works[blob_id]
            work.wanted = image  # with a token that lasts longer
            work.tell_swarm()
            if not image.paused:
                work.resumed.set()
            elif not work.state.is_final and work.resumed.is_set():
                self._start(work, transport)  # anew: it waits until it is resumed
            if self._is_due(work, now):
                self._start(work, transport)
        return ending

    def _is_due(self, work: _Work, now: float) -> bool:
        has_failed = work.state is HostState.ERROR and work.ended_at is not None
        return has_failed and now - (work.ended_at or 0.0) >= self._settings.retry_seconds

    def _start(self, work: _Work, transport: _Transport) -> None:
        """The work begins, after what was left of it has ended; its totals go on."""
        before, work.ended_at = work.task, None
        work.state, work.reason = HostState.WAITING, None
        work.resumed.clear()
        if not work.wanted.paused:
            work.resumed.set()
        if before is not None:
            before.cancel()
        work.task = transport.group.create_task(
            self._keep(work, transport, before), name=f"keep {work.blob_id}"
        )

    async def _keep(
        self, work: _Work, transport: _Transport, before: asyncio.Task[None] | None
    ) -> None:
        """Get the image into place and serve it, until cancelled or refused."""
        if before is not None:
            await asyncio.wait([before])  # its files are closed
        if not work.resumed.is_set():
            work.reason = protocol.PAUSED
            self._tell_now.set()
            await work.resumed.wait()  # how far it was is told all the while
            work.reason = None
        work.download = work.blob = None
        try:
            async with AsyncExitStack() as stack:
                is_growing = work.wanted.root is None
                slots = self._growing_slots if is_growing else self._slots
                async with slots.taken(lambda: work.wanted.priority):
                    blob = await self._bring(work, transport, stack)
                log.info("image_ready", image_id=work.wanted.image_id, state=work.state.value)
                self._tell_now.set()
                self._server.serve(blob)
                stack.callback(self._server.withdraw, work.blob_id)
                await asyncio.Event().wait()  # served until it is not wanted any more
        except* _Refused as group:
            refused = _first(group)
            assert isinstance(refused, _Refused)
            self._end(work, refused.state, refused.reason)
        except* placement.UnsupportedError as group:
            self._end(work, HostState.UNSUPPORTED, str(_first(group)))
        except* GivenUp as group:
            self._look_again.set()  # there is another one, or none
            self._end(work, HostState.ERROR, str(_first(group)))
        except* pieces.PieceStoreError as group:
            failure = _first(group)
            assert isinstance(failure, pieces.PieceStoreError)
            self._end(work, HostState.ERROR, f"{failure.reason}: {failure}")

    def _end(self, work: _Work, state: HostState, reason: str) -> None:
        log.warning(
            "image_refused", image_id=work.wanted.image_id, state=state.value, reason=reason
        )
        work.state, work.reason = state, reason[:REASON_CHARACTERS]
        work.ended_at = asyncio.get_running_loop().time()
        self._tell_now.set()
        if state is HostState.ERROR:
            self._look_again_when_due()

    def _look_again_when_due(self) -> None:
        """What has failed now is tried again; what fails within a moment of each other, at one look."""
        loop, seconds = asyncio.get_running_loop(), self._settings.retry_seconds
        if self._retry is None or self._retry.when() < loop.time() + seconds:
            # other hosts have failed at the same moment: not all of them come back at once
            self._retry = loop.call_later(seconds * self._rng.uniform(1.0, 1.1), self.look_again)

    # --- one image

    async def _bring(self, work: _Work, transport: _Transport, stack: AsyncExitStack) -> Blob:
        """The image is in place; what it takes stays open on the stack.

        Raises:
            _Refused: it will not be.
            GivenUp: precache has given it up.
            placement.UnsupportedError: it cannot be placed on this host.
            pieces.PieceStoreError: the disk refused.
        """
        settings, image, held = self._settings, work.wanted, self._shelf
        if settings.unsupported_reason is not None:
            raise _Refused(HostState.UNSUPPORTED, settings.unsupported_reason)
        limit = settings.max_image_bytes
        if limit is not None and image.size_bytes > limit:
            raise _Refused(HostState.SKIPPED, f"image.too_large: {image.size_bytes} > {limit}")
        target = held.target(work.placed)
        listed, following = await self._listed(work, transport)
        if following is None:
            assert isinstance(listed, Manifest)
            found = await self._find(work, listed, stack)
            if found is not None:
                is_ours = await asyncio.to_thread(held.is_ours, work.placed)
                work.state = HostState.CACHED if is_ours else HostState.EXISTING
                return found
            await asyncio.to_thread(held.make_room, work.placed, listed)
        async with AsyncExitStack() as serving:
            store = await threads.to_end(
                lambda: pieces.PieceStore.open(
                    held.directory,
                    work.blob_id,
                    listed,
                    reserve_bytes=settings.reserve_bytes,
                    allocate=False,
                ),
                undo=pieces.PieceStore.close,
            )
            with contextlib.closing(store):
                fd = _opened_anew(store)
                serving.callback(os.close, fd)
                blob = work.blob = self._blob(work, listed, fd, have=store.journaled)
                self._server.serve(blob)
                serving.callback(self._server.withdraw, work.blob_id)
                if following is None:
                    async with asyncio.TaskGroup() as group:
                        # beside the transfer: on some file systems it writes the whole file
                        group.create_task(threads.to_end(store.allocate))
                        await self._transfer(work, blob, store, transport)
                else:
                    listed = await self._grow(work, following, blob, store, transport)
                assert isinstance(listed, Manifest)
                closed = blob.manifest = listed
                outcome = await threads.to_end(lambda: self._place(work, store, closed))
            if outcome is placement.Outcome.PLACED:
                work.state = HostState.CACHED
                stack.push_async_exit(serving.pop_all())
                return blob
        found = await self._find(work, closed, stack)
        if found is None:
            raise pieces.TargetExistsError(f"{target} was there, and went: it is tried again")
        work.state = HostState.EXISTING
        return found

    async def _listed(
        self, work: _Work, transport: _Transport
    ) -> tuple[PieceList, Following | None]:
        """The pieces of the image, with who follows their list where the transfer begins before its end.

        There has to be room for it then, even if none of its pieces were zeros, and nothing in its
        place that would first have to be compared with all of it.
        """
        image = work.wanted
        following = Following(transport.api, image, rng=self._rng)
        listed = await following.begin()
        if isinstance(listed, Manifest):
            return listed, None
        if not await asyncio.to_thread(self._has_room, work, listed):
            return await following.until_closed(), None
        return listed, following

    def _has_room(self, work: _Work, listed: PieceList) -> bool:
        """Whether the place of the image is free, and there is room for all of it; blocks.

        Raises:
            pieces.PieceStoreError: the place cannot be used.
        """
        held = self._shelf
        target = held.target(work.placed)
        try:
            is_taken = held.is_ours(work.placed) or target.exists()
        except OSError as exc:
            raise pieces.PieceStoreError(f"{target}: {exc.strerror}") from exc
        if is_taken:
            return False
        try:
            held.make_room(work.placed, listed)
        except pieces.NoSpaceError:
            return False
        return True

    async def _grow(
        self,
        work: _Work,
        following: Following,
        blob: Blob,
        store: pieces.PieceStore,
        transport: _Transport,
    ) -> Manifest:
        """All pieces are here, of the manifest that precache has closed in the end.

        Raises:
            GivenUp: what is here is nothing; it goes when precache has said what should be here now.
            pieces.PieceStoreError: the disk refused.
        """

        def grew() -> None:
            if work.download is not None:
                work.download.grew()

        async def close() -> Manifest:
            if work.wanted.root is not None and work.download is not None:
                # the rest of the list, and taking the room, would be in the way of everybody's first pieces
                await work.download.until_begun()
            closed = await following.until_closed(grew)
            await threads.to_end(
                store.allocate
            )  # beside the transfer: it may write the whole file
            return closed

        async with asyncio.TaskGroup() as group:
            closing = group.create_task(close())
            await self._transfer(work, blob, store, transport)
        return closing.result()

    async def _find(self, work: _Work, listed: Manifest, stack: AsyncExitStack) -> Blob | None:
        """The image as it is in its place, open on the stack; None where it is not."""
        fd = await threads.to_end(
            lambda: self._shelf.find(
                work.placed, listed, replace=self._settings.replace_differing
            ),
            undo=lambda found: None if found is None else os.close(found),
        )
        if fd is None:
            return None
        stack.callback(os.close, fd)
        work.blob = self._blob(work, listed, fd, have=listed.all_pieces)
        return work.blob

    async def _transfer(
        self, work: _Work, blob: Blob, store: pieces.PieceStore, transport: _Transport
    ) -> None:
        download = work.download = self._download(work, blob, store, transport)
        work.tell_swarm()  # the neighbours are known before the first piece moves
        work.state = HostState.TRANSFERRING
        log.info(
            "transfer_started", image_id=work.wanted.image_id, pieces=blob.manifest.count,
            resumed_pieces=download.pieces_done,
        )  # fmt: skip
        self._tell_now.set()
        await download.run()

    def _download(
        self, work: _Work, blob: Blob, store: pieces.PieceStore, transport: _Transport
    ) -> Download:
        received = self._metrics.received_bytes
        return Download(
            blob,
            store,
            HttpPeerClient(
                transport.wire,
                store=store,
                blob_id=work.blob_id,
                token=lambda: work.wanted.token,
                host=self._host,
            ),
            requests=self._settings.requests,
            rng=self._rng,
            host=self._host,
            received=work.received,
            on_received=lambda source, count: received.labels(source).inc(count),
        )

    def _place(self, work: _Work, store: pieces.PieceStore, listed: Manifest) -> placement.Outcome:
        """Give the file its name; blocks."""
        if self._settings.verify_whole and not pieces.is_exactly(store.fileno(), listed):
            store.discard()
            raise _Refused(HostState.ERROR, "storage.damaged: the disk returned other bytes")
        return self._shelf.place(
            work.placed, store, listed, replace=self._settings.replace_differing
        )

    def _blob(self, work: _Work, listed: PieceList, fd: int, *, have: int) -> Blob:
        key = bytes.fromhex(work.wanted.swarm_key)
        blob = Blob(work.blob_id, manifest=listed, key=key, fd=fd, have=have)
        blob.sent_bytes = work.sent_bytes  # totals of the agent's run, not of this file's
        return blob

    # --- all images

    async def _keep_house(self, transport: _Transport) -> None:
        """Placed files are pinned, checked, repaired, and removed when their time has come."""

        def lost(one: Wanted) -> None:
            work = self._works.get(one.blob_id)
            if work is not None and work.state.is_final:
                self._start(work, transport)

        def damaged(blob_id: BlobId, found: int) -> None:
            work = self._works.get(blob_id)
            if work is not None and work.blob is not None:
                work.blob.lose(found)

        async def repair(record: Record, path: Path, listed: Manifest, found: int) -> int:
            return await self._repair(transport, record.blob_id, path, listed, found)

        await keeper.run(
            self._shelf,
            wanted=lambda: frozenset(work.placed for work in self._works.values()),
            deleted=lambda: self._deleted,
            lost=lost,
            damaged=damaged,
            repair=repair,
            settings=self._settings,
            metrics=self._metrics,
        )

    async def _repair(
        self,
        transport: _Transport,
        blob_id: BlobId,
        path: Path,
        listed: Manifest,
        found: int,
    ) -> int:
        """Fetch the pieces of a placed file anew; returns those that are still damaged."""
        work = self._works.get(blob_id)
        if work is None or work.blob is None or work.wanted.paused:
            return found
        blob = work.blob
        try:
            store = await threads.to_end(
                lambda: pieces.PieceStore.reopen(path, listed, damaged=found),
                undo=pieces.PieceStore.close,
            )
            try:
                for piece in swarm.members(found & store.journaled):
                    blob.add(piece)  # zeros, which never travel
                download = work.download = self._download(work, blob, store, transport)
                work.tell_swarm()
                async with asyncio.timeout(REPAIR_SECONDS):
                    await download.run()
            finally:
                await asyncio.to_thread(store.close)
        except* TimeoutError:
            log.warning("repair_unfinished", image_id=work.wanted.image_id)
        except* pieces.PieceStoreError as group:
            log.warning("repair_failed", image_id=work.wanted.image_id, reason=str(_first(group)))
        return found & ~blob.have

    # --- telling

    async def _report_forever(self, api: client.Api) -> None:
        failing = False
        while True:
            self._tell_now.clear()
            try:
                await self._report(api)
                if failing:
                    log.info("report_recovered")
                failing = False
            except (errors.HostlerError, ValueError) as exc:
                if not failing:  # swarms go on without the tracker
                    log.warning("report_failed", reason=str(exc))
                failing = True
            await asyncio.sleep(MIN_REPORT_SECONDS)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.report_seconds):
                    await self._tell_now.wait()

    async def _report(self, api: client.Api) -> None:
        settings = self._settings
        states = Counter(work.state for work in self._works.values())
        for state in HostState:
            self._metrics.images.labels(state.value).set(states[state])
        # what moves is told first, should there ever be more images than a report may have
        works = sorted(self._works.values(), key=lambda work: work.state.is_final)
        report = protocol.HostReport(
            url=self._url,
            session_id=self._session_id,
            sequence=next(self._sequence),
            free_bytes=await asyncio.to_thread(_free_bytes, self._shelf.directory),
            link_bytes_per_second=self._link_bytes_per_second,
            labels=dict(settings.labels),
            blobs=[work.report() for work in works[:MAX_REPORTED]],
        )
        reply = protocol.ReportReply.model_validate(
            await api.put(f"/v1/hosts/{self._host}/report", report.model_dump(mode="json"))
        )
        for blob_id, told in reply.swarms.items():
            work = self._works.get(BlobId(blob_id))
            if work is not None:
                work.wanted = work.wanted.model_copy(
                    update={
                        "seeds": told.seeds,
                        "neighbours": told.neighbours,
                        "limit_bytes_per_second": told.limit_bytes_per_second,
                    }
                )
                work.swarm_version = told.version
                work.tell_swarm()
        if reply.look_again:
            self._look_again.set()


def _opened_anew(store: pieces.PieceStore) -> int:
    """A descriptor to serve from: the store's own is locked, and a repair has to lock the file.

    Raises:
        pieces.PieceStoreError: the file cannot be opened.
    """
    try:
        return os.open(f"/proc/self/fd/{store.fileno()}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise pieces.PieceStoreError(f"a partial file: {exc.strerror}") from exc


def _free_bytes(directory: Path) -> int | None:
    try:
        volume = os.statvfs(directory)
    except OSError:
        return None
    return volume.f_bavail * volume.f_frsize


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


def _own_url(context: AgentContext, settings: AgentSettings, secured: tls.Tls | None) -> str:
    own = context.process.settings
    port = settings.peer_port if secured else own.http_port
    if not port:
        raise common_settings.SettingsError(
            "HOSTLER_PRECACHE_ADVERTISE_URL: is needed where the agent's port is a free one"
        )
    name = context.host if own.http_host in ("0.0.0.0", "::") else own.http_host  # noqa: S104  compared, not bound
    return f"{'https' if secured else 'http'}://{f'[{name}]' if ':' in name else name}:{port}"


async def create(context: AgentContext) -> None:
    """Precache's routes, queue and loop are in the agent.

    Raises:
        SettingsError: a setting is missing or wrong.
    """
    settings = context.load(AgentSettings)
    secured = tls.load(
        settings.peer_certificate_file, settings.peer_key_file, settings.peer_ca_file
    )
    metrics = AgentMetrics(context.process.registry)
    agent: CacheAgent
    server = BlobServer(
        slots=settings.upload_slots,
        queue=swarm.UPLOAD_QUEUE,
        on_sent=metrics.sent_bytes.inc,
        on_watcher=lambda host: agent.watched_by(host),
    )
    url = settings.advertise_url or _own_url(context, settings, secured)
    link = settings.link_bytes_per_second
    if link is None:
        link = await asyncio.to_thread(network_card.bytes_per_second, url)
    agent = CacheAgent(
        host=context.host,
        url=url,
        link_bytes_per_second=link,
        settings=settings,
        token=common_settings.read_token(settings),
        server=server,
        held=shelf.open_shelf(settings),
        metrics=metrics,
        secured=secured,
    )
    if secured is None:
        server.attach(context.app)
    else:  # probes and metrics stay in clear, on the agent's own port
        listener = runtime.bind(context.process.settings.http_host, settings.peer_port)
        context.spawn(
            sites.serve(
                server,
                listener,
                tls=secured.server,
                drain_seconds=context.process.settings.drain_seconds,
            ),
            name="pieces",
        )
    context.consume(
        messages.agent_queue(context.host, durable=settings.transient_quorum_queue),
        agent.on_cache,
        on_begin=agent.look_again,
    )
    context.spawn(agent.run(), name="precache")
