"""The agent's housekeeping: pins, removals, evictions and scrubs, for as long as the agent runs.

Two loops that know nothing of each other: a round every minute, which costs a `stat` a file, and
one file at a time being scrubbed. A round that fails is told once and tried again; nothing that a
disk does ends the agent.
"""

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from hostler_common import logs
from hostler_precache.metrics import AgentMetrics
from hostler_precache.placing import scrub
from hostler_precache.placing.placement import Wanted
from hostler_precache.placing.scrub import Pace, Repair
from hostler_precache.placing.shelf import Shelf
from hostler_precache.placing.shelf_records import Record
from hostler_precache.settings import AgentSettings
from hostler_precache.transfer.manifest import BlobId, ImageId
from hostler_precache.transfer.pieces import BusyError, PieceStoreError

log = logs.get(__name__)

ROUND_SECONDS: Final = 60.0
SCRUB_PAUSE_SECONDS: Final = 30.0
REPAIRS_AT_ONCE: Final = 4
RETRY_SECONDS: Final = 3600.0
"""When a file is read again whose damage could not be repaired."""

OnLost = Callable[[Wanted], None]
OnDamaged = Callable[[BlobId, int], None]


async def run(
    shelf: Shelf,
    *,
    wanted: Callable[[], Collection[Wanted]],
    deleted: Callable[[], Collection[ImageId]],
    lost: OnLost,
    damaged: OnDamaged,
    repair: Repair | None,
    settings: AgentSettings,
    metrics: AgentMetrics,
) -> None:
    """Keep house until cancelled.

    Args:
        shelf: what is kept.
        wanted: all that should be here now, whether it is yet or not.
        deleted: images that their source has no more.
        lost: told of what was here and is not any more.
        damaged: told of pieces of a placed file that are not what they should be, a set as int,
            before they are repaired: they must not be served.
        repair: fetches such pieces anew; None leaves them.
        settings: how often, how fast.
        metrics: what to count.
    """
    async with asyncio.TaskGroup() as group:
        group.create_task(
            _tend_forever(shelf, wanted=wanted, deleted=deleted, lost=lost, metrics=metrics)
        )
        if settings.scrub_seconds:
            group.create_task(
                _scrub_forever(
                    shelf, damaged=damaged, repair=repair, settings=settings, metrics=metrics
                )
            )


async def tend_once(
    shelf: Shelf,
    *,
    wanted: Collection[Wanted],
    deleted: Collection[ImageId],
    lost: OnLost,
    metrics: AgentMetrics,
) -> tuple[str, ...]:
    """One round: wanted files are pinned, what nobody wants is let go or removed.

    Returns:
        Files that could not be looked after, each with the reason.

    Raises:
        PieceStoreError: the place cannot be used.
    """
    tended = await asyncio.to_thread(shelf.tend, wanted, deleted)
    for one in tended.lost:
        log.warning("image_lost", image_id=one.image_id)
        lost(one)
    metrics.held_bytes.set(tended.held_bytes)
    metrics.removed.labels("unwanted").inc(len(tended.removed))
    metrics.removed.labels("evicted").inc(len(tended.evicted))
    return tended.failed


async def scrub_once(
    shelf: Shelf,
    record: Record,
    *,
    damaged: OnDamaged,
    repair: Repair | None,
    bytes_per_second: float,
    metrics: AgentMetrics,
) -> int:
    """One file is read and what is damaged is repaired, if it can be; returns what still is.

    Raises:
        PieceStoreError: it cannot be read.
    """
    bad = await _check(
        shelf, record, damaged=damaged, bytes_per_second=bytes_per_second, metrics=metrics
    )
    return await _mend(shelf, record, bad, repair) if bad and repair is not None else bad


async def _mend(shelf: Shelf, record: Record, bad: int, repair: Repair) -> int:
    """The damaged pieces of a file are fetched anew, as far as somebody has them; returns the others."""
    listed = await asyncio.to_thread(shelf.manifest, record)
    if listed is None:
        return bad
    left = await repair(record, shelf.directory / record.name, listed, bad)
    log.info("image_repaired", image_id=record.image_id, still_damaged=left.bit_count())
    await asyncio.to_thread(shelf.scrubbed, record, damaged_pieces=left.bit_count())
    return left


async def _check(
    shelf: Shelf,
    record: Record,
    *,
    damaged: OnDamaged,
    bytes_per_second: float,
    metrics: AgentMetrics,
) -> int:
    """One file is read, and what is damaged is told; returns it.

    Raises:
        PieceStoreError: it cannot be read.
    """
    opened = await asyncio.to_thread(shelf.open_for_scrub, record)
    if opened is None:
        return 0
    fd, listed = opened
    stopped = threading.Event()

    def sleep(seconds: float) -> None:
        stopped.wait(seconds)

    pace = Pace(bytes_per_second=bytes_per_second, sleep=sleep, is_stopped=stopped.is_set)
    # a thread of its own: it sleeps most of the time, and those of the loop have work to do
    with ThreadPoolExecutor(1, thread_name_prefix="scrub") as thread:
        loop = asyncio.get_running_loop()
        reading = loop.run_in_executor(thread, scrub.damaged, fd, listed, pace)
        try:
            bad = await asyncio.shield(reading)
        except asyncio.CancelledError:
            stopped.set()
            with contextlib.suppress(scrub.Stopped, OSError, PieceStoreError):
                await reading
            raise
        except OSError as exc:
            path = shelf.directory / record.name
            raise PieceStoreError(f"{path}: {exc.strerror}") from exc
        finally:
            os.close(fd)
            metrics.scrubbed_bytes.inc(pace.read_bytes)
    if bad:
        log.warning("image_damaged", image_id=record.image_id, pieces=bad.bit_count())
        metrics.damaged_pieces.inc(bad.bit_count())
        damaged(record.blob_id, bad)
    await asyncio.to_thread(shelf.scrubbed, record, damaged_pieces=bad.bit_count())
    return bad


async def _tend_forever(
    shelf: Shelf,
    *,
    wanted: Callable[[], Collection[Wanted]],
    deleted: Callable[[], Collection[ImageId]],
    lost: OnLost,
    metrics: AgentMetrics,
) -> None:
    told: tuple[str, ...] = ()
    while True:
        try:
            failed = await tend_once(
                shelf, wanted=wanted(), deleted=deleted(), lost=lost, metrics=metrics
            )
        except BusyError:
            failed = ()  # another agent tends it
        except PieceStoreError as exc:
            failed = (f"{exc.reason}: {exc}",)
        if failed != told:  # a disk that fails does so each minute
            log.warning("tending_failed", reasons=failed) if failed else log.info(
                "tending_recovered"
            )
        told = failed
        await asyncio.sleep(min(ROUND_SECONDS, shelf.pin_seconds / 2))


async def _scrub_forever(
    shelf: Shelf,
    *,
    damaged: OnDamaged,
    repair: Repair | None,
    settings: AgentSettings,
    metrics: AgentMetrics,
) -> None:
    # a repair waits for somebody who has the pieces: other files are read meanwhile
    repairing: set[str] = set()

    async def mend(record: Record, bad: int, repair: Repair) -> None:
        try:
            await _mend(shelf, record, bad, repair)
        except PieceStoreError as exc:
            log.warning("repair_failed", image_id=record.image_id, reason=str(exc))
        finally:
            repairing.discard(record.name)

    async with asyncio.TaskGroup() as group:
        while True:
            record = await asyncio.to_thread(
                shelf.next_scrub,
                every_seconds=settings.scrub_seconds,
                retry_seconds=min(RETRY_SECONDS, settings.scrub_seconds),
                besides=frozenset(repairing),
            )
            if record is None:
                await asyncio.sleep(min(SCRUB_PAUSE_SECONDS, settings.scrub_seconds))
                continue
            try:
                bad = await _check(
                    shelf,
                    record,
                    damaged=damaged,
                    bytes_per_second=settings.scrub_bytes_per_second,
                    metrics=metrics,
                )
            except PieceStoreError as exc:
                log.warning("scrub_failed", image_id=record.image_id, reason=str(exc))
                await asyncio.sleep(SCRUB_PAUSE_SECONDS)
                continue
            # of a disk that breaks, some at once; the others when they are read again
            if bad and repair is not None and len(repairing) < REPAIRS_AT_ONCE:
                repairing.add(record.name)
                group.create_task(mend(record, bad, repair))
