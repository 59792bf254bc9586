import asyncio

import pytest

from hostler_common import health
from hostler_common.health import Health


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The time that health sees, to be moved by the test."""
    now = {"now": 1000.0}

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return now["now"]

    monkeypatch.setattr(health, "time", Clock)
    return now


def test_a_process_without_loops_is_alive() -> None:
    assert Health().alive() == (True, [])


def test_a_loop_that_misses_its_beats_is_named_as_stuck(clock: dict[str, float]) -> None:
    checked = Health()
    checked.beat("fold", 10.0)
    checked.beat("sweep", 1000.0)
    clock["now"] += 89.0
    assert checked.alive() == (True, [])
    clock["now"] += 2.0
    assert checked.alive() == (False, ["fold"])
    checked.beat("fold", 10.0)
    assert checked.alive() == (True, [])


def test_a_loop_that_ended_as_it_should_is_not_stuck(clock: dict[str, float]) -> None:
    checked = Health()
    checked.beat("fold", 10.0)
    checked.forget("fold")
    checked.forget("never began")
    clock["now"] += 1000.0
    assert checked.alive() == (True, [])


async def test_ready_means_that_every_check_holds_and_each_says_why() -> None:
    async def answers() -> tuple[bool, str]:
        return True, "answers"

    checked = Health()
    checked.check("database", answers)
    checked.check("broker", lambda: (False, "connection lost"))
    ready, reports = await checked.ready()
    assert not ready
    assert reports == [
        {"name": "database", "status": "pass", "detail": "answers"},
        {"name": "broker", "status": "fail", "detail": "connection lost"},
    ]


async def test_a_check_that_does_not_answer_fails_in_bounded_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def hangs() -> tuple[bool, str]:
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    monkeypatch.setattr(health, "CHECK_SECONDS", 0.01)
    checked = Health()
    checked.check("database", hangs)
    ready, reports = await checked.ready()
    assert not ready
    assert reports[0]["detail"] == "no answer within 0.01 s"


async def test_a_process_that_stops_is_alive_and_not_ready() -> None:
    checked = Health()
    checked.draining = True
    assert checked.alive() == (True, [])
    ready, reports = await checked.ready()
    assert not ready
    assert reports == [{"name": "draining", "status": "fail", "detail": "stopping"}]


async def test_a_check_that_fails_itself_says_no_and_takes_nothing_down() -> None:
    def broken() -> tuple[bool, str]:
        raise ValueError("a bug")

    checked = Health()
    checked.check("broken", broken)
    ready, reports = await checked.ready()
    assert not ready
    assert reports[0]["detail"] == "the check itself failed: ValueError"
