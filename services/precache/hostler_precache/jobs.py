"""List, Fetch, Serve, Distribute: the pipeline as periodic work, safe beside other replicas.

Policies and fetches are claimed by statements that lock what they claim, so replicas share the
work. A replica that dies in a fetch loses its lease, and another begins the fetch again.
"""

import asyncio
import secrets
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

from hostler_common import db, errors, idempotency, logs
from hostler_precache import messages
from hostler_precache.distribution import endings
from hostler_precache.distribution.distribution_store import DistributionStore
from hostler_precache.distribution.distributions import (
    BlobRecord,
    BlobState,
    DistributionId,
    DistributionState,
    FetchTask,
    Growth,
    Policy,
    new_distribution_id,
)
from hostler_precache.distribution.policy_store import PolicyStore
from hostler_precache.distribution.rollout import Rollout, Targets
from hostler_precache.entry_points import contained
from hostler_precache.images import Image
from hostler_precache.metrics import Metrics
from hostler_precache.settings import Settings
from hostler_precache.sources import fetch as fetching
from hostler_precache.sources.arrival import Arriving
from hostler_precache.sources.fetch import Fetched, FetchProgress, fetch
from hostler_precache.sources.plugins import (
    BrokenPluginError,
    Plugins,
    SourceError,
    UnknownPluginError,
    images_of,
)
from hostler_precache.store import ImageDiffers, ImageNotFound, Store
from hostler_precache.swarming import tokens, tracker
from hostler_precache.swarming.swarm_store import SwarmStore
from hostler_precache.transfer import pieces
from hostler_precache.transfer.manifest import DIGEST_BYTES, BlobId, GrowingManifest, Manifest
from hostler_precache.transfer.replicas import Replicas
from hostler_precache.transfer.seed import Seed

log = logs.get(__name__)

ResultT = TypeVar("ResultT")

FORGET_SECONDS: Final = 3600.0
IDLE_SECONDS: Final = 0.3
POLICIES_SECONDS: Final = 1.0
# hosts can fetch what has come since: each time costs a transaction, and each host a question
GROWTH_SECONDS: Final = 0.2
DETAIL_CHARACTERS: Final = 2000
FIRST_RETRY_SECONDS: Final = 2.0
LONGEST_RETRY_SECONDS: Final = 300.0


class _OtherBytes(SourceError):
    """The source sends other bytes than hosts were told of when it was asked before."""

    def __init__(self) -> None:
        super().__init__(
            "source.changed", "the source sends other bytes than when the fetch began"
        )


class Pipeline:
    """The service's own work, beside what it is asked over HTTP."""

    def __init__(
        self,
        *,
        settings: Settings,
        store: Store,
        distributions: DistributionStore,
        swarms: SwarmStore,
        tracking: tracker.Tracker,
        policies: PolicyStore,
        seed: Seed,
        replicas: Replicas,
        plugins: Plugins,
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._store = store
        self._distributions = distributions
        self._swarms = swarms
        self._tracker = tracking
        self._policies = policies
        self._seed = seed
        self._replicas = replicas
        self._plugins = plugins
        self._metrics = metrics
        self._fetching: set[BlobId] = set()
        # interrupted here, to be gone on with, unless another replica is faster
        self._interrupted: set[BlobId] = set()

    async def fetch_forever(self) -> None:
        """Serve what is on the disk, then fetch what somebody waits for, until cancelled."""
        await self._patiently(self._resume)
        async with asyncio.TaskGroup() as group:
            for _ in range(self._settings.fetch_concurrency):
                group.create_task(self._fetch_one_by_one())

    async def _fetch_one_by_one(self) -> None:
        while True:
            task = await self._patiently(self._claim)
            if task is None:
                await asyncio.sleep(IDLE_SECONDS)
            else:
                await self._fetch(task)

    async def run_policies_forever(self) -> None:
        """Run policies as they come due, until cancelled: what is listed may take minutes."""
        while True:
            await self._patiently(self.run_policies)
            await asyncio.sleep(POLICIES_SECONDS)

    async def run_policies(self) -> None:
        """Run every policy that is due."""
        while (policy := await self._policies.claim_policy()) is not None:
            outcome, said = await self._run_policy(policy)
            detail = _storable(said)
            self._metrics.policy_runs.labels(outcome).inc()
            log.info("policy_ran", policy=policy.name, outcome=outcome, detail=detail)
            await self._policies.policy_ran(policy.policy_id, outcome=outcome, detail=detail)

    async def tell_sent(self) -> None:
        """What this seed sent is stored."""
        sent = self._seed.sent_bytes()
        if sent:
            await self._swarms.seed_sent(self._seed.name, self._seed.session_id, sent)

    async def count(self) -> None:
        """The gauges are current."""
        for source, count in (await self._swarms.moved_bytes()).items():
            self._metrics.moved_bytes.labels(source).set(count)
        states = await self._distributions.count_states()
        for state in DistributionState:
            self._metrics.distributions.labels(state.value).set(states.get(state.value, 0))

    async def forget_old_keys(self) -> None:
        """Idempotency keys that nobody will repeat any more are gone."""
        await idempotency.forget_old(self._store.pool)

    async def image_deleted(self, image_id: str) -> None:
        """The image is deleted at its source; one that nobody has named is nobody's loss."""
        try:
            async with db.transaction(self._store.pool) as connection:
                blob_id = await self._store.image_deleted(connection, image_id)
        except ImageNotFound:
            return
        if blob_id is not None:
            self._tracker.forget(blob_id)

    async def retire(self) -> None:
        """Blobs that nobody has wanted for long, or whose image is deleted, are off this disk."""
        idle_seconds = self._settings.seed_keep_seconds
        for blob_id in await self._store.retire_blobs(self._seed.name, idle_seconds=idle_seconds):
            self._seed.withdraw(blob_id)
            log.info("blob_retired", blob_id=blob_id)
        if self._interrupted:
            mine = await self._store.fetches_of(self._seed.name)
            for blob_id in self._interrupted - self._fetching - mine:
                self._give_up(blob_id)
                self._seed.withdraw(blob_id)  # whole, and its process was killed before it said so

    def _give_up(self, blob_id: BlobId) -> None:
        """What was left of an interrupted fetch is gone."""
        self._interrupted.discard(blob_id)
        fetching.discard(self._seed.path(blob_id))

    # --- list

    async def _run_policy(self, policy: Policy) -> tuple[str, str]:
        patience = asyncio.timeout(self._settings.lister_seconds)
        try:
            async with patience:
                with contained():
                    lister = self._plugins.lister(policy.lister)
                    listed = images_of(await lister.list(policy.options))
        except (SourceError, UnknownPluginError) as exc:
            return "failed", str(exc)
        except BrokenPluginError as exc:
            log.warning("lister_broken", policy=policy.name, reason=str(exc), exc_info=exc)
            return "failed", f"lister.broken: {exc}"
        except Exception as exc:  # a lister is a plugin: it may raise whatever it likes
            if patience.expired():
                seconds = self._settings.lister_seconds
                return "failed", f"lister.timeout: it has not answered for {seconds:g} s"
            log.exception("lister_failed", policy=policy.name)
            return "failed", f"lister.failed: {type(exc).__name__}"
        async with db.transaction(self._store.pool) as connection:
            if not await self._policies.hold(connection, policy.policy_id):
                return "failed", "the policy was removed while it ran"
            known, moved = await self._distributions.policy_ran(
                connection, policy, {image.image_id for image in listed}
            )
        for blob_id in moved:
            self._tracker.forget(blob_id)
        new, refused = 0, []
        first: dict[str, Image] = {}
        for image in listed:
            if first.setdefault(image.image_id, image) != image:
                refused.append(
                    f"{image.image_id}: is listed twice, and differently: the first is taken"
                )
                continue
            try:
                async with db.transaction(self._store.pool) as connection:
                    # removed meanwhile, or run by another replica too: each image goes out once
                    if not await self._policies.hold(connection, policy.policy_id):
                        return "failed", "the policy was removed while it ran"
                    await self._store.add_image(connection, image)
                    if image.image_id not in known and not (
                        await self._distributions.has_distribution(
                            connection, policy.policy_id, image.image_id
                        )
                    ):
                        await self._distribute(connection, image, policy)
                        new += 1
            except (ImageDiffers, db.Unstorable) as exc:
                refused.append(f"{image.image_id}: {exc.detail}")
        detail = "; ".join(
            [f"{len(listed)} images, {new} new, {len(moved)} moved or withdrawn", *refused]
        )
        return ("partial" if refused else "ok"), detail

    async def _distribute(self, connection: db.Connection, image: Image, policy: Policy) -> None:
        distribution_id, state = await self._distributions.add_distribution(
            connection,
            distribution_id=new_distribution_id(),
            image_id=image.image_id,
            targets=Targets(hosts=policy.hosts, labels=policy.labels),
            rollout=Rollout(),
            priority=policy.priority,
            policy_id=policy.policy_id,
        )
        if state is DistributionState.DISTRIBUTING:  # its bytes are here already
            blob = await self._store.served_blob(connection, image.image_id)
            await self._announce(connection, blob, [distribution_id])

    # --- fetch

    async def _resume(self) -> None:
        # before others may have them: what a process before left of those goes when they do
        self._interrupted |= await self._store.fetches_of(self._seed.name)
        await self._store.seed_started(self._seed.name, self._seed.url)
        await self._replicas.discard_leftovers()
        for record in await self._store.seed_blobs(self._seed.name):
            body = await self._store.manifest(uuid.UUID(record.blob_id))
            if not await self._seed.resume(record, body):
                again = await self._store.blob_lost(
                    record.blob_id,
                    reason="seed.damaged",
                    silent_seconds=self._settings.seed_silent_seconds,
                )
                log.warning("blob_is_lost", blob_id=record.blob_id, is_fetched_again=again)
                self._seed.withdraw(record.blob_id)

    async def _claim(self) -> FetchTask | None:
        return await self._store.claim_fetch(
            seed=self._seed.name,
            seed_url=self._seed.url,
            swarm_key=secrets.token_bytes(tokens.KEY_BYTES),
            lease_seconds=self._settings.lease_seconds,
            but=self._fetching,
        )

    async def _fetch(self, task: FetchTask) -> None:
        self._fetching.add(task.blob_id)
        try:
            await self._fetch_claimed(task)
        finally:
            self._fetching.discard(task.blob_id)

    async def _fetch_claimed(self, task: FetchTask) -> None:
        started = time.monotonic()
        log.info("fetch_started", image_id=task.image.image_id, attempt=task.attempts)
        fetched: Fetched | None = None
        try:
            async with asyncio.TaskGroup() as group:
                progress = FetchProgress()
                beside = [
                    group.create_task(self._keep_lease(task, progress)),
                    group.create_task(self._tell_pieces(task, progress)),
                ]
                with contained():
                    fetched = await fetch(
                        self._plugins.fetcher(task.image.fetcher),
                        task.image,
                        self._seed.path(task.blob_id),
                        reserve_bytes=self._settings.reserve_bytes,
                        convert_to_raw=self._settings.convert_to_raw,
                        progress=progress,
                        told=task.told.digests if task.told is not None else b"",
                    )
                _require_extends(task.told, fetched.manifest)
                for one in beside:
                    one.cancel()
        except* Exception as failures:  # noqa: BLE001  a fetcher is a plugin: it may raise whatever it likes
            fetched = None
            self._seed.withdraw(task.blob_id)
            await self._failed(task, _first(failures))
        if fetched is None:
            return
        self._interrupted.discard(task.blob_id)
        self._metrics.fetched_bytes.inc(fetched.received_bytes)
        self._metrics.fetches.labels("ok").inc()
        log.info(
            "fetch_finished",
            image_id=task.image.image_id,
            size_bytes=fetched.manifest.size_bytes,
            verification=fetched.verification.value,
            left_bytes=fetched.left_bytes,
            seconds=round(time.monotonic() - started, 2),
        )
        await self._serve(task, fetched)

    async def _keep_lease(self, task: FetchTask, progress: FetchProgress) -> None:
        seconds = self._settings.lease_seconds
        while True:
            await asyncio.sleep(min(1.0, seconds / 4))
            try:
                held = await self._store.renew_fetch(
                    task.blob_id,
                    seed=self._seed.name,
                    fetched_bytes=progress.bytes_done,
                    lease_seconds=seconds,
                )
            except errors.Unavailable:
                continue  # the fetch goes on; whether it was taken over is seen at its end
            if not held:
                raise SourceError("fetch.taken_over", "another replica has taken the fetch over")

    async def _tell_pieces(self, task: FetchTask, progress: FetchProgress) -> None:
        """Pieces go out while the rest still comes: hosts are told of each, and then may have it."""
        await progress.has_arrived.wait()
        await asyncio.sleep(GROWTH_SECONDS)  # what has come by then as a whole needs none of this
        arriving = progress.arriving
        assert arriving is not None
        told = _told_before(task.told, arriving)
        listed = GrowingManifest(
            task.blob_id, size_bytes=arriving.size_bytes, piece_bytes=arriving.piece_bytes
        )
        try:
            self._seed.grow(
                task.blob_id,
                task.swarm_key,
                arriving.path,
                listed,
                sent=_told_pieces(task.told),
            )
        except pieces.PieceStoreError as exc:  # it may have got its final name just now
            log.info("growth_not_begun", image_id=task.image.image_id, reason=str(exc))
            return
        while True:
            first = listed.known
            come, known = arriving.digests(first), told[first * DIGEST_BYTES :]
            if not (come.startswith(known) or known.startswith(come)):
                raise _OtherBytes
            new = come[len(known) :]
            if not new or await self._told(task, arriving, len(told) // DIGEST_BYTES, new):
                told += new
                listed.grow(first, come)
                self._seed.grew(task.blob_id)
            await asyncio.sleep(GROWTH_SECONDS)

    async def _told(
        self, task: FetchTask, arriving: Arriving, first_piece: int, digests: bytes
    ) -> bool:
        """Hosts are told of these pieces, or cannot be, as long as the database is away."""
        growth = Growth(
            size_bytes=arriving.size_bytes,
            piece_bytes=arriving.piece_bytes,
            first_piece=first_piece,
            digests=digests,
            root=None,
        )
        try:
            async with db.transaction(self._store.pool) as connection:
                grown = await self._store.grow(
                    connection, task, seed=self._seed.name, growth=growth, begins=not first_piece
                )
                if grown is None:
                    raise SourceError("fetch.taken_over", "another replica has taken it over")
                blob, begun = grown
                await self._announce(connection, blob, begun)
        except errors.Unavailable:
            return False
        if not first_piece:
            self._tracker.forget(task.blob_id)
            log.info("growth_begun", image_id=task.image.image_id, blob_id=task.blob_id)
        return True

    async def _failed(self, task: FetchTask, exc: BaseException) -> None:
        match exc:
            case SourceError():
                reason, is_transient = _storable(str(exc.reason)), exc.is_transient
            case pieces.PieceStoreError():
                reason, is_transient = exc.reason, False
            case UnknownPluginError():
                reason, is_transient = "fetcher.unknown", False
            case BrokenPluginError():
                reason, is_transient = "fetcher.broken", False
                log.warning("fetcher_broken", image_id=task.image.image_id, exc_info=exc)
            case _:
                reason, is_transient = "fetcher.failed", False
                log.error("fetcher_failed", image_id=task.image.image_id, exc_info=exc)
                exc = RuntimeError(type(exc).__name__)  # its text may be anything
        self._metrics.fetches.labels(reason).inc()
        retry = None
        if is_transient and task.attempts < self._settings.fetch_attempts:
            retry = min(LONGEST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2 ** (task.attempts - 1))
        log.warning(
            "fetch_failed", image_id=task.image.image_id, reason=reason, detail=str(exc),
            retry_seconds=retry,
        )  # fmt: skip
        detail = _storable(f"{reason}: {exc}")
        if retry is None:
            self._give_up(task.blob_id)
        else:
            self._interrupted.add(task.blob_id)
        if isinstance(exc, _OtherBytes) and task.attempts < self._settings.fetch_attempts:
            # as another blob: what hosts have of this one must never mix with what comes now
            await self._patiently(
                lambda: self._store.fetch_begins_anew(
                    task,
                    seed=self._seed.name,
                    seed_url=self._seed.url,
                    swarm_key=secrets.token_bytes(tokens.KEY_BYTES),
                    reason=detail,
                )
            )
            self._tracker.forget(task.blob_id)
            return
        event = messages.IMAGE_FAILED.message(
            messages.ImageFailed(
                image_id=task.image.image_id, blob_id=task.blob_id, reason=detail
            ),
            app_id=messages.APP_ID,
        )
        await self._patiently(
            lambda: self._store.fetch_failed(
                task.blob_id,
                seed=self._seed.name,
                reason=detail,
                retry_seconds=retry,
                messages=[event],
            )
        )
        self._tracker.forget(task.blob_id)

    # --- serve and distribute

    async def _serve(self, task: FetchTask, fetched: Fetched) -> None:
        await self._seed.serve(
            task.blob_id, task.swarm_key, fetched.manifest, sent=_told_pieces(task.told)
        )
        record = BlobRecord(
            blob_id=task.blob_id,
            image_id=task.image.image_id,
            state=BlobState.READY,
            reason=None,
            seed=self._seed.name,
            seed_url=self._seed.url,
            swarm_key=task.swarm_key,
            fetched_bytes=fetched.manifest.size_bytes,
            size_bytes=fetched.manifest.size_bytes,
            root=fetched.manifest.root,
            verification=fetched.verification,
        )

        async def finish() -> bool:
            async with db.transaction(self._store.pool) as connection:
                ready = await self._store.fetch_finished(
                    connection,
                    task.blob_id,
                    seed=self._seed.name,
                    manifest=fetched.manifest,
                    verification=fetched.verification,
                    disk_format=fetched.disk_format,
                )
                if ready is None:
                    return await self._store.is_finished(
                        connection, task.blob_id, seed=self._seed.name, root=fetched.manifest.root
                    )
                event = messages.IMAGE_FETCHED.message(
                    messages.ImageFetched(
                        image_id=task.image.image_id,
                        blob_id=task.blob_id,
                        size_bytes=fetched.manifest.size_bytes,
                        root=fetched.manifest.root.hex(),
                        verification=fetched.verification.value,
                    ),
                    app_id=messages.APP_ID,
                )
                await self._store.announce(connection, [event])
                await self._announce(connection, record, ready)
            return True

        if not await self._patiently(finish):
            log.warning("fetch_taken_over", image_id=task.image.image_id)
            self._seed.withdraw(task.blob_id)

    async def _announce(
        self, connection: db.Connection, blob: BlobRecord, begun: Sequence[DistributionId]
    ) -> None:
        """Hosts and whoever listens are told that these distributions of the blob have begun."""
        casts = tracker.announcements(
            blob,
            begun,
            public_url=self._settings.public_url,
            token_seconds=self._settings.token_seconds,
        )
        said = await endings.beginnings_of(connection, self._distributions, begun)
        await self._store.announce(connection, [*casts, *said])

    async def _patiently(self, work: Callable[[], Awaitable[ResultT]]) -> ResultT:
        """The work's result, however long the database is away."""
        waiting = False
        while True:
            try:
                return await work()
            except errors.Unavailable as exc:
                if not waiting:
                    log.warning("pipeline_waits", reason=exc.detail)
                waiting = True
                await asyncio.sleep(1.0)


def _require_extends(told: Growth | None, made: Manifest) -> None:
    """Raises _OtherBytes: hosts were told of pieces that are not of this manifest."""
    if told is not None and (
        (told.size_bytes, told.piece_bytes) != (made.size_bytes, made.piece_bytes)
        or not made.digests.startswith(told.digests)
    ):
        raise _OtherBytes


def _told_before(told: Growth | None, arriving: Arriving) -> bytes:
    """The digests that hosts were told of in earlier attempts.

    Raises:
        _OtherBytes: of an image of another size.
    """
    if told is None:
        return b""
    if (told.size_bytes, told.piece_bytes) != (arriving.size_bytes, arriving.piece_bytes):
        raise _OtherBytes
    return told.digests


def _told_pieces(told: Growth | None) -> int:
    """The set of those that hosts were told of in earlier attempts, and so have probably got."""
    return 0 if told is None else (1 << len(told.digests) // DIGEST_BYTES) - 1


def _storable(text: str) -> str:
    """The text as a column can hold it, and no longer than somebody would read: sources say anything."""
    return text.encode(errors="replace").decode().replace("\0", "")[:DETAIL_CHARACTERS]


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
