"""What hosts are told of an image that still comes is in order, whole, and told by whoever has the lease."""

import asyncio
import random
import uuid
from collections.abc import Sequence
from typing import Any

import asyncpg
import pytest

from hostler_common import db
from hostler_precache.distribution.distributions import FetchTask, Growth
from hostler_precache.images import Verification
from hostler_precache.store import BlobNotFound, Store
from hostler_precache.swarming import growths
from hostler_precache.swarming.growths import Growths
from hostler_precache.transfer import manifest
from hostler_precache.transfer.manifest import BlobId

PIECE = manifest.MIN_PIECE_BYTES
COUNT = 9
LISTED = manifest.build(
    size_bytes=COUNT * PIECE - 5, piece_bytes=PIECE, digests=random.Random(1).randbytes(32 * COUNT)
)


def digests(start: int, stop: int) -> bytes:
    return LISTED.digests[start * 32 : stop * 32]


async def claim(control: Any, seed: str = "seed-1") -> FetchTask:
    """The image's fetch, which somebody waits for."""
    task: FetchTask | None = await control.store.claim_fetch(
        seed=seed, seed_url=f"http://{seed}", swarm_key=b"k", lease_seconds=0.0
    )
    assert task is not None
    return task


async def tell(
    control: Any, task: FetchTask, start: int, stop: int, seed: str = "seed-1"
) -> tuple[Any, Sequence[Any]] | None:
    growth = Growth(
        size_bytes=LISTED.size_bytes,
        piece_bytes=PIECE,
        first_piece=start,
        digests=digests(start, stop),
        root=None,
    )
    async with db.transaction(control.pool) as connection:
        told: tuple[Any, Sequence[Any]] | None = await control.store.grow(
            connection, task, seed=seed, growth=growth, begins=start == 0
        )
    return told


async def close(control: Any, task: FetchTask, seed: str = "seed-1") -> None:
    async with db.transaction(control.pool) as connection:
        done = await control.store.fetch_finished(
            connection, task.blob_id, seed=seed, manifest=LISTED,
            verification=Verification.HASH, disk_format="raw",
        )  # fmt: skip
    assert done is not None


def uid(task: FetchTask) -> uuid.UUID:
    return uuid.UUID(task.blob_id)


async def test_whoever_asks_from_any_piece_on_is_told_the_rest(control: Any) -> None:
    distribution_id = await control.distribute()
    task = await claim(control)
    told = await tell(control, task, 0, 2)
    assert told is not None
    assert told[1] == [distribution_id]
    for start, stop in [(2, 3), (3, 7)]:
        told = await tell(control, task, start, stop)
        assert told is not None
        assert told[1] == []
    for after in range(COUNT + 2):
        growth = await control.store.growth(uid(task), after=after)
        assert (growth.first_piece, growth.root) == (after, None)
        assert growth.digests == digests(after, 7)
    await close(control, task)
    for after in range(COUNT + 2):
        growth = await control.store.growth(uid(task), after=after)
        assert (growth.digests, growth.root) == (digests(after, COUNT), LISTED.root)
        assert (growth.size_bytes, growth.piece_bytes) == (LISTED.size_bytes, PIECE)


async def test_a_run_that_is_told_again_after_a_lost_answer_may_be_longer(control: Any) -> None:
    await control.distribute()
    task = await claim(control)
    await tell(control, task, 0, 2)
    await tell(control, task, 0, 4)
    assert (await control.store.growth(uid(task), after=1)).digests == digests(1, 4)


async def test_only_who_has_the_lease_tells_hosts_anything(control: Any) -> None:
    await control.distribute()
    first = await claim(control)
    await tell(control, first, 0, 2)
    second = await claim(control, "seed-2")
    assert second.blob_id == first.blob_id
    assert second.told is not None
    assert second.told.digests == digests(0, 2)
    assert await tell(control, first, 2, 3) is None
    # nor does an earlier attempt of the same seed
    third = await claim(control, "seed-2")
    assert await tell(control, second, 2, 3, "seed-2") is None
    assert await tell(control, third, 2, 4, "seed-2") is not None
    assert (await control.store.growth(uid(third), after=0)).digests == digests(0, 4)


async def test_a_blob_that_is_completed_while_somebody_asks_is_not_said_to_be_given_up(
    control: Any,
) -> None:
    await control.distribute()
    task = await claim(control)
    await tell(control, task, 0, 2)

    class Late(Store):
        async def _growth(
            self, connection: db.Connection, blob_id: uuid.UUID, after: int
        ) -> Growth | None:
            await close(control, task)
            return await super()._growth(connection, blob_id, after)

    growth = await Late(control.pool).growth(uid(task), after=2)
    assert (growth.digests, growth.root) == (digests(2, COUNT), LISTED.root)


async def test_a_distribution_of_an_image_that_comes_is_told_of_what_has_come(
    control: Any, database_url: str
) -> None:
    first = await control.distribute()
    task = await claim(control)
    await tell(control, task, 0, 2)
    second = await control.distribute()
    async with db.transaction(control.pool) as connection:
        assert (await control.store.served_blob(connection, "image-1")).blob_id == task.blob_id
    await control.store.fetch_failed(
        task.blob_id, seed="seed-1", reason="source.hash_mismatch: x", retry_seconds=None
    )
    for distribution_id in (first, second):
        found = await control.distributions.distribution(distribution_id)
        assert (found.state, found.reason) == ("error", "source.hash_mismatch: x")
    with pytest.raises(BlobNotFound):
        await control.store.growth(uid(task), after=0)
    database = await asyncpg.connect(database_url)
    assert await database.fetchval("SELECT count(*) FROM precache.blob_growth") == 0
    await database.close()


async def test_a_thousand_hosts_that_ask_cost_one_query_and_hear_at_once_of_more(
    control: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growths, "WAIT_SECONDS", 30.0)
    await control.distribute()
    task = await claim(control)
    await tell(control, task, 0, 2)
    reads: list[int] = []

    class Counted(Store):
        async def growth(self, blob_id: uuid.UUID, *, after: int) -> Growth:
            reads.append(after)
            return await super().growth(blob_id, after=after)

    asked = Growths(Counted(control.pool))
    answers = await asyncio.gather(*(asked.ask(uid(task), after=0) for _ in range(1000)))
    assert {one.digests for one in answers} == {digests(0, 2)}
    assert reads == [0]
    waiting = [asyncio.create_task(asked.ask(uid(task), after=2)) for _ in range(100)]
    await asyncio.sleep(0)
    assert not any(one.done() for one in waiting)
    await tell(control, task, 2, 5)
    assert {one.digests for one in await asyncio.gather(*waiting)} == {digests(2, 5)}
    assert set(reads) == {0, 2}  # only what is new is read
    await close(control, task)
    late = await asked.ask(uid(task), after=5)
    assert (late.digests, late.root) == (digests(5, COUNT), LISTED.root)


async def test_a_long_list_is_told_in_parts_and_closed_by_the_last(control: Any) -> None:
    await control.distribute()
    task = await claim(control)
    await tell(control, task, 0, COUNT)
    await close(control, task)
    asked = Growths(control.store)
    for most in (1, 4, COUNT, COUNT + 1):
        told = b""
        while True:
            after = len(told) // 32
            growth = await asked.ask(uid(task), after=after, most=most)
            assert growth.digests == digests(after, min(COUNT, after + most))
            told += growth.digests
            if growth.root is not None:
                break
        assert (told, growth.root) == (LISTED.digests, LISTED.root)


async def test_who_asks_for_nothing_new_is_answered_with_nothing_after_a_while(
    control: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growths, "WAIT_SECONDS", 0.3)
    await control.distribute()
    task = await claim(control)
    await tell(control, task, 0, 2)
    asked = Growths(control.store)
    growth = await asked.ask(uid(task), after=2)
    assert (growth.first_piece, growth.digests, growth.root) == (2, b"", None)
    with pytest.raises(BlobNotFound):
        await asked.ask(uuid.UUID(BlobId(str(uuid.uuid4()))), after=0)
