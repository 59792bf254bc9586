"""``Idempotency-Key`` under concurrency, on a real PostgreSQL."""

import asyncio
from datetime import timedelta

import pytest

from hostler_common import db, idempotency
from hostler_common.testing import eventually

REQUEST = {"host": "h1", "memory_mb": 512}


async def do(
    pool: db.Pool,
    key: str,
    done: list[str],
    *,
    caller: str = "me",
    request: object = REQUEST,
    name: str = "work",
) -> idempotency.StoredReply:
    """What a handler does: claim the key, work, keep the reply, all in one transaction."""
    async with db.transaction(pool) as connection:
        stored = await idempotency.begin(connection, key, caller=caller, request=request)
        if stored is not None:
            return stored
        done.append(name)
        await asyncio.sleep(0)
        reply = {"done_by": name}
        await idempotency.finish(connection, key, caller=caller, status=201, body=reply)
    return idempotency.StoredReply(status=201, body=reply)


async def test_of_many_at_once_with_one_key_one_does_the_work_and_all_get_its_reply(
    pool: db.Pool,
) -> None:
    done: list[str] = []
    replies = await asyncio.gather(*(do(pool, "k", done, name=str(n)) for n in range(8)))
    assert len(done) == 1
    assert all(
        reply == idempotency.StoredReply(status=201, body={"done_by": done[0]})
        for reply in replies
    )


async def test_the_second_waits_for_the_first_and_gets_its_reply(pool: db.Pool) -> None:
    done: list[str] = []
    async with db.transaction(pool) as first:
        assert await idempotency.begin(first, "k", caller="me", request=REQUEST) is None
        second = asyncio.create_task(do(pool, "k", done))
        await waits_for_a_lock(pool)
        assert not second.done()
        await idempotency.finish(first, "k", caller="me", status=202, body=["first"])
    assert await second == idempotency.StoredReply(status=202, body=["first"])
    assert done == []


async def test_if_the_first_rolls_back_the_second_does_the_work(pool: db.Pool) -> None:
    done: list[str] = []
    second: list[asyncio.Task[idempotency.StoredReply]] = []

    async def first_fails() -> None:
        async with db.transaction(pool) as first:
            assert await idempotency.begin(first, "k", caller="me", request=REQUEST) is None
            second.append(asyncio.create_task(do(pool, "k", done, name="second")))
            await waits_for_a_lock(pool)
            raise LookupError

    with pytest.raises(LookupError):
        await first_fails()
    assert (await second[0]).body == {"done_by": "second"}
    assert done == ["second"]


async def test_a_key_used_for_another_request_is_a_conflict(pool: db.Pool) -> None:
    done: list[str] = []
    await do(pool, "k", done)
    with pytest.raises(idempotency.KeyReused) as caught:
        await do(pool, "k", done, request={**REQUEST, "memory_mb": 513})
    assert (caught.value.status, caught.value.code) == (409, "request.idempotency_key_reused")
    assert len(done) == 1


async def test_the_order_of_a_requests_members_does_not_matter(pool: db.Pool) -> None:
    done: list[str] = []
    await do(pool, "k", done)
    await do(pool, "k", done, request=dict(reversed(REQUEST.items())))
    assert len(done) == 1


@pytest.mark.parametrize(
    ("one", "other"), [(("a", "k"), ("b", "k")), (("a", "b:c"), ("a:b", "c"))]
)
async def test_keys_belong_to_their_callers(
    pool: db.Pool, one: tuple[str, str], other: tuple[str, str]
) -> None:
    done: list[str] = []
    for caller, key in (one, other):
        await do(pool, key, done, caller=caller, name=caller)
    assert done == [one[0], other[0]]


async def test_old_keys_are_forgotten_and_young_ones_kept(pool: db.Pool) -> None:
    done: list[str] = []
    await do(pool, "old", done)
    await do(pool, "young", done)
    async with db.transaction(pool) as connection:
        await connection.execute(
            "UPDATE idempotency_key SET created_at = now() - $1::interval WHERE key LIKE '%old'",
            timedelta(days=idempotency.KEEP_DAYS, hours=1),
        )
    await idempotency.forget_old(pool)
    await do(pool, "old", done)
    await do(pool, "young", done)
    assert len(done) == 3


async def waits_for_a_lock(pool: db.Pool) -> None:
    """Return when a transaction of this database waits for another one."""
    async with db.connection(pool) as connection:
        await eventually(
            lambda: connection.fetchval(
                "SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid)"
                " WHERE NOT granted AND datname = current_database()"
            ),
            every_seconds=0.01,
        )
