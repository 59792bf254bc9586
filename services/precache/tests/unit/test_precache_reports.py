"""Which report counts, and that those who ask together are answered together and each for itself."""

import asyncio
import random
import uuid
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler_common import errors
from hostler_precache import protocol
from hostler_precache.swarming.gathering import MAX_BATCH, Gathering
from hostler_precache.swarming.reports import latest

SESSIONS = [str(uuid.UUID(int=number)) for number in (1, 2)]


def report_of(session: str, sequence: int | None) -> protocol.HostReport:
    return protocol.HostReport(url="http://h", session_id=session, sequence=sequence)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5)), min_size=1), st.randoms())
def test_of_one_session_the_last_report_counts_in_whichever_order_they_come(
    told: list[tuple[str, int]], rng: random.Random
) -> None:
    reports = [(host, report_of(SESSIONS[0], sequence)) for host, sequence in told]
    expected = {host: max(n for other, n in told if other == host) for host, _ in told}
    shuffled = [*reports, *reports]
    rng.shuffle(shuffled)
    assert {host: one.sequence for host, one in latest(shuffled).items()} == expected


def test_a_run_that_begins_counts_from_one_and_is_believed() -> None:
    before, after = report_of(SESSIONS[0], 900), report_of(SESSIONS[1], 1)
    assert latest([("h", before), ("h", after)]) == {"h": after}


def test_of_an_agent_that_does_not_count_the_last_to_come_is_meant() -> None:
    first, second = report_of(SESSIONS[0], None), report_of(SESSIONS[0], None)
    assert latest([("h", first), ("h", second)])["h"] is second


async def test_those_who_ask_one_after_the_other_while_others_are_answered_share_a_batch() -> None:
    sizes = []
    begun, free = asyncio.Event(), asyncio.Event()

    async def answer(asked: Sequence[int]) -> Sequence[int]:
        sizes.append(len(asked))
        begun.set()
        await free.wait()
        return asked

    gathering = Gathering(answer)
    running = asyncio.create_task(gathering.run())
    first = asyncio.create_task(gathering.ask(0))
    await begun.wait()
    later = []
    for n in range(1, 10):
        later.append(asyncio.create_task(gathering.ask(n)))
        await asyncio.sleep(0)
    free.set()
    assert await asyncio.gather(first, *later) == list(range(10))
    running.cancel()
    assert sizes == [1, 9]


class Odd(errors.Invalid):
    """Thirteen cannot be answered."""


async def test_thousands_who_ask_at_once_are_answered_each_with_its_own_in_few_batches() -> None:
    sizes = []

    async def double(asked: Sequence[int]) -> Sequence[int]:
        sizes.append(len(asked))
        await asyncio.sleep(0)
        return [2 * one for one in asked]

    gathering = Gathering(double)
    running = asyncio.create_task(gathering.run())
    answers = await asyncio.gather(*(gathering.ask(one) for one in range(2000)))
    running.cancel()
    assert answers == [2 * one for one in range(2000)]
    assert sizes == [MAX_BATCH] * 4


async def test_one_that_cannot_be_answered_keeps_no_other() -> None:
    async def answer(asked: Sequence[int]) -> Sequence[int]:
        if 13 in asked:
            raise Odd("thirteen")
        return asked

    gathering = Gathering(answer)
    running = asyncio.create_task(gathering.run())
    found = await asyncio.gather(
        *(gathering.ask(one) for one in range(20)), return_exceptions=True
    )
    running.cancel()
    assert [one for one in found if isinstance(one, int)] == [n for n in range(20) if n != 13]
    assert isinstance(found[13], Odd)


async def test_while_the_database_is_away_all_are_told_so_at_once() -> None:
    calls = 0

    async def answer(asked: Sequence[int]) -> Sequence[int]:
        nonlocal calls
        calls += 1
        raise errors.Unavailable("away")

    gathering = Gathering(answer)
    running = asyncio.create_task(gathering.run())
    found = await asyncio.gather(*(gathering.ask(n) for n in range(9)), return_exceptions=True)
    running.cancel()
    assert [type(one) for one in found] == [errors.Unavailable] * 9
    assert calls == 1


@pytest.mark.parametrize("gone", [0, 4])
async def test_who_has_gone_away_keeps_nobody_waiting(gone: int) -> None:
    async def answer(asked: Sequence[int]) -> Sequence[int]:
        return asked

    gathering = Gathering(answer)
    asking = [asyncio.create_task(gathering.ask(n)) for n in range(5)]
    await asyncio.sleep(0)
    asking[gone].cancel()
    running = asyncio.create_task(gathering.run())
    found = await asyncio.gather(*asking, return_exceptions=True)
    running.cancel()
    assert [one for one in found if isinstance(one, int)] == [n for n in range(5) if n != gone]
