"""Precache's part of the agent on a compute host: it keeps what the host should have.

A fanout is a hint: the agent then asks precache what it should have, as it does at start and now
and then, so that hosts that were down, wiped or new converge. Each image is fetched in a swarm,
placed under its final name in one step, and served to others from then on. No database: after a
restart the files on disk and their journals say what there is.
"""

import asyncio
import contextlib
import os
import random
import uuid
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp

from hostler_common import client, errors, logs
from hostler_common import settings as common_settings
from hostler_common.agent import AgentContext
from hostler_common.bus import Delivery, Reject
from hostler_precache import (
    envelope,
    manifest,
    messages,
    pieces,
    placement,
    protocol,
)
from hostler_precache.blobs import Blob, BlobServer
from hostler_precache.download import Download
from hostler_precache.manifest import BlobId, Manifest, ManifestError
from hostler_precache.metrics import AgentMetrics
from hostler_precache.peers import HttpPeerClient
from hostler_precache.protocol import REASON_CHARACTERS, DesiredImage, HostState
from hostler_precache.settings import AgentSettings

log = logs.get(__name__)

MIN_REPORT_SECONDS = 0.1
MAX_REPORTED = 1000


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
        self.blob_id = BlobId(wanted.blob_id)
        self.state = HostState.WAITING
        self.reason: str | None = None
        self.blob: Blob | None = None
        self.download: Download | None = None
        self.task: asyncio.Task[None] | None = None
        self.ended_at: float | None = None

    def report(self) -> protocol.BlobReport:
        """What precache is told."""
        download, blob = self.download, self.blob
        pieces_done = blob.have.bit_count() if blob else 0
        bytes_done = download.bytes_done if download else 0
        if blob is not None and self.state in (HostState.CACHED, HostState.EXISTING):
            bytes_done = blob.manifest.size_bytes
        return protocol.BlobReport(
            distribution_id=self.wanted.distribution_id,
            blob_id=self.blob_id,
            state=self.state,
            reason=self.reason,
            pieces_done=pieces_done,
            bytes_done=bytes_done,
            bytes_from_seed=download.received.from_seed if download else 0,
            bytes_from_peers=download.received.from_peers if download else 0,
            bytes_wasted=download.received.wasted if download else 0,
            sent_bytes=dict(blob.sent_bytes) if blob else {},
            banned=download.banned if download else [],
        )


class CacheAgent:
    """Everything of precache on one host; `run` it for as long as the agent lives."""

    def __init__(
        self,
        *,
        host: str,
        url: str,
        settings: AgentSettings,
        token: str | None,
        server: BlobServer,
        metrics: AgentMetrics,
    ) -> None:
        self._host = host
        self._url = url
        self._settings = settings
        self._token = token
        self._server = server
        self._metrics = metrics
        self._session_id = str(uuid.uuid4())
        self._rng = random.Random()  # noqa: S311  breaks ties, guards nothing
        self._works: dict[BlobId, _Work] = {}
        self._slots = asyncio.Semaphore(settings.downloads)
        self._look_again = asyncio.Event()
        self._tell_now = asyncio.Event()

    async def on_cache(self, delivery: Delivery) -> None:
        """Somebody said `cache(image_id, meta)`: ask precache what that means for this host."""
        try:
            call = envelope.unpack(delivery.body)
        except envelope.EnvelopeError as exc:
            raise Reject(str(exc), code="precache.call.malformed") from exc
        if call is not None:
            log.info("cache_called", image_id=call.image_id)
            self._look_again.set()

    def watched_by(self, host: str) -> None:
        """Another host asks for our pieces: if it is new to us, its neighbours include us."""
        del host
        self._tell_now.set()

    async def run(self) -> None:
        """Keep this host as it should be, until cancelled."""
        url = self._settings.precache_url
        # keep-alive connections to each peer; how many at once is the downloads' own matter
        connector = aiohttp.TCPConnector(limit=0)
        async with (
            client.open_api(url, token=self._token, timeout_seconds=10.0) as api,
            aiohttp.ClientSession(connector=connector) as session,
            asyncio.TaskGroup() as group,
        ):
            group.create_task(self._report_forever(api))
            while True:
                self._look_again.clear()
                try:
                    answer = await api.get("/v1/desired", host=self._host)
                    self._adopt(protocol.Desired.model_validate(answer), group, session)
                    await self._discard_partials()
                    pause = self._pause_seconds()
                except (errors.HostlerError, ValueError) as exc:
                    log.warning("desired_unknown", reason=str(exc))
                    pause = min(5.0, self._settings.desired_seconds)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause * self._rng.uniform(0.9, 1.1)):
                        await self._look_again.wait()

    # --- what is wanted

    def _pause_seconds(self) -> float:
        has_failed = any(work.state is HostState.ERROR for work in self._works.values())
        seconds = self._settings.desired_seconds
        return min(seconds, self._settings.retry_seconds) if has_failed else seconds

    async def _discard_partials(self) -> None:
        """What is left of images that are not wanted, or that are in place already, is gone."""
        wanted = {
            work.blob_id
            for work in self._works.values()
            if work.state not in (HostState.CACHED, HostState.EXISTING)
        }
        try:
            discarded = await asyncio.to_thread(
                pieces.discard_others, self._settings.target_dir, wanted
            )
        except OSError as exc:
            log.warning("partials_kept", reason=exc.strerror)
            return
        if discarded:
            log.info("partials_discarded", blob_ids=discarded)

    def _adopt(
        self, desired: protocol.Desired, group: asyncio.TaskGroup, session: aiohttp.ClientSession
    ) -> None:
        """Start what is new, retry what failed a while ago, stop what is not wanted any more."""
        wanted = {BlobId(image.blob_id): image for image in desired.images}
        for blob_id in self._works.keys() - wanted.keys():
            work = self._works.pop(blob_id)
            if work.task is not None:
                work.task.cancel()
            log.info("image_unwanted", image_id=work.wanted.image_id)
        now = asyncio.get_running_loop().time()
        for blob_id, image in wanted.items():
            known = self._works.get(blob_id)
            if known is not None and not self._is_due(known, now):
                known.wanted = image  # with a token that lasts longer
                continue
            work = self._works[blob_id] = _Work(image)
            work.task = group.create_task(self._keep(work, session), name=f"keep {blob_id}")

    def _is_due(self, work: _Work, now: float) -> bool:
        has_failed = work.state is HostState.ERROR and work.ended_at is not None
        return has_failed and now - (work.ended_at or 0.0) >= self._settings.retry_seconds

    async def _keep(self, work: _Work, session: aiohttp.ClientSession) -> None:
        """Get the image into place and serve it, until cancelled or refused."""
        image = work.wanted
        try:
            async with AsyncExitStack() as stack:
                async with self._slots:
                    blob = await self._bring(work, session, stack)
                log.info("image_ready", image_id=image.image_id, state=work.state.value)
                self._tell_now.set()
                self._server.serve(blob)
                stack.callback(self._server.withdraw, work.blob_id)
                await asyncio.Event().wait()  # served until it is not wanted any more
        except* _Refused as group:
            refused = _first(group)
            assert isinstance(refused, _Refused)
            self._end(work, refused.state, refused.reason)
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

    # --- one image

    async def _bring(
        self, work: _Work, session: aiohttp.ClientSession, stack: AsyncExitStack
    ) -> Blob:
        """The image is in place; what it takes stays open on the stack.

        Raises:
            _Refused: it will not be.
            pieces.PieceStoreError: the disk refused.
        """
        settings, image = self._settings, work.wanted
        if settings.unsupported_reason is not None:
            raise _Refused(HostState.UNSUPPORTED, settings.unsupported_reason)
        limit = settings.max_image_bytes
        if limit is not None and image.size_bytes > limit:
            raise _Refused(HostState.SKIPPED, f"image.too_large: {image.size_bytes} > {limit}")
        target = placement.target(
            settings.target_dir, settings.target_template, manifest.ImageId(image.image_id)
        )
        listed = await self._manifest(image, session)
        existing = await asyncio.to_thread(_open_if_exact, target, listed)
        if existing is not None:
            stack.callback(os.close, existing)
            return self._existing(work, listed, existing)
        if not settings.replace_differing and await asyncio.to_thread(target.exists):
            raise _Refused(HostState.ERROR, f"target.differs: {target} is another file")
        # allocates the whole file: on some file systems that writes it
        store = await asyncio.to_thread(
            lambda: pieces.PieceStore.open(
                settings.target_dir,
                work.blob_id,
                listed,
                reserve_bytes=settings.reserve_bytes,
            )
        )
        stack.callback(store.close)
        blob = work.blob = self._blob(work, listed, store.fileno(), have=store.journaled)
        self._server.serve(blob)
        stack.callback(self._server.withdraw, work.blob_id)
        await self._transfer(work, blob, store, session)
        await asyncio.to_thread(self._place, store, target, listed)
        work.state = HostState.CACHED
        return blob

    def _existing(self, work: _Work, listed: Manifest, fd: int) -> Blob:
        work.blob = self._blob(work, listed, fd, have=(1 << listed.count) - 1)
        work.state = HostState.EXISTING
        return work.blob

    async def _transfer(
        self,
        work: _Work,
        blob: Blob,
        store: pieces.PieceStore,
        session: aiohttp.ClientSession,
    ) -> None:
        image = work.wanted
        download = work.download = Download(
            blob,
            store,
            HttpPeerClient(
                session,
                blob_id=work.blob_id,
                manifest=blob.manifest,
                token=lambda: work.wanted.token,
                host=self._host,
            ),
            requests=self._settings.requests,
            rng=self._rng,
            on_received=lambda source, count: self._metrics.received_bytes.labels(source).inc(
                count
            ),
        )
        download.set_swarm(image.seeds, {})
        work.state = HostState.TRANSFERRING
        log.info(
            "transfer_started", image_id=image.image_id, pieces=blob.manifest.count,
            resumed_pieces=download.pieces_done,
        )  # fmt: skip
        self._tell_now.set()
        await download.run()

    def _place(self, store: pieces.PieceStore, target: Path, listed: Manifest) -> None:
        """Give the file its name; blocks."""
        if self._settings.verify_whole and not pieces.is_exactly(store.fileno(), listed):
            store.discard()
            raise _Refused(HostState.ERROR, "storage.damaged: the disk returned other bytes")
        try:
            store.place(target, replace=self._settings.replace_differing)
        except pieces.TargetExistsError:
            found = _open_if_exact(target, listed)
            if found is None:
                raise
            os.close(found)  # somebody put the very image there meanwhile
            store.discard()

    def _blob(self, work: _Work, listed: Manifest, fd: int, *, have: int) -> Blob:
        key = bytes.fromhex(work.wanted.swarm_key)
        return Blob(work.blob_id, manifest=listed, key=key, fd=fd, have=have)

    async def _manifest(self, image: DesiredImage, session: aiohttp.ClientSession) -> Manifest:
        """The piece list, checked against the root that precache named.

        Raises:
            _Refused: it cannot be had, or is not what was asked for.
        """
        url = f"{self._settings.precache_url.rstrip('/')}/v1/blobs/{image.blob_id}/manifest"
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        timeout = aiohttp.ClientTimeout(total=60)
        try:
            async with session.get(url, headers=headers, timeout=timeout) as response:
                if response.status != 200:
                    raise _Refused(HostState.ERROR, f"manifest.refused: {response.status}")
                body = await response.content.read(manifest.MAX_MANIFEST_BYTES + 1)
                while chunk := await response.content.read(manifest.MAX_MANIFEST_BYTES + 1):
                    body += chunk
                    if len(body) > manifest.MAX_MANIFEST_BYTES:
                        break
            # parsing a large list takes a while
            listed = await asyncio.to_thread(manifest.parse, body, root=bytes.fromhex(image.root))
        except (aiohttp.ClientError, TimeoutError) as exc:
            raise _Refused(HostState.ERROR, f"manifest.unreachable: {type(exc).__name__}") from exc
        except ManifestError as exc:
            raise _Refused(HostState.ERROR, f"manifest.invalid: {exc}") from exc
        if listed.size_bytes != image.size_bytes:
            raise _Refused(HostState.ERROR, "manifest.invalid: another size")
        return listed

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
            free_bytes=await asyncio.to_thread(_free_bytes, settings.target_dir),
            blobs=[work.report() for work in works[:MAX_REPORTED]],
        )
        reply = protocol.ReportReply.model_validate(
            await api.put(f"/v1/hosts/{self._host}/report", report.model_dump(mode="json"))
        )
        for blob_id, swarm in reply.swarms.items():
            work = self._works.get(BlobId(blob_id))
            if work is not None and work.download is not None:
                work.download.set_swarm(
                    swarm.seeds, {one.host: one.url for one in swarm.neighbours}
                )


def _open_if_exact(target: Path, listed: Manifest) -> int | None:
    """A descriptor of the target, if it is there and is the image; reads all of it."""
    try:
        fd = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise pieces.PieceStoreError(f"{target}: {exc.strerror}") from exc
    if pieces.is_exactly(fd, listed):
        return fd
    os.close(fd)
    return None


def _free_bytes(directory: Path) -> int | None:
    try:
        volume = os.statvfs(directory)
    except OSError:
        return None
    return volume.f_bavail * volume.f_frsize


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


def _own_url(context: AgentContext) -> str:
    own = context.process.settings
    if not own.http_port:
        raise common_settings.SettingsError(
            "HOSTLER_PRECACHE_ADVERTISE_URL: is needed where the agent's port is a free one"
        )
    name = context.host if own.http_host in ("0.0.0.0", "::") else own.http_host  # noqa: S104  compared, not bound
    return f"http://{f'[{name}]' if ':' in name else name}:{own.http_port}"


async def create(context: AgentContext) -> None:
    """Precache's routes, queue and loop are in the agent.

    Raises:
        SettingsError: a setting is missing or wrong.
    """
    settings = context.load(AgentSettings)
    metrics = AgentMetrics(context.process.registry)
    agent: CacheAgent
    server = BlobServer(
        slots=settings.upload_slots,
        on_sent=metrics.sent_bytes.inc,
        on_watcher=lambda host: agent.watched_by(host),
    )
    agent = CacheAgent(
        host=context.host,
        url=settings.advertise_url or _own_url(context),
        settings=settings,
        token=common_settings.read_token(settings),
        server=server,
        metrics=metrics,
    )
    server.attach(context.app)
    context.consume(
        messages.agent_queue(context.host, durable=settings.transient_quorum_queue),
        agent.on_cache,
    )
    context.spawn(agent.run(), name="precache")
