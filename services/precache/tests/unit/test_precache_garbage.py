"""Garbage is found by the clock, and by nothing else."""

import gc
import weakref

import pytest

from hostler_precache.swarming import garbage


class Knot:
    """An object that only a look for cycles gets rid of."""

    def __init__(self) -> None:
        self.own = self


async def test_cycles_go_with_the_next_turn_and_old_ones_with_a_rarer_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert gc.isenabled()
    with garbage.by_the_clock() as collector:
        assert not gc.isenabled()
        young = weakref.ref(Knot())
        kept = Knot()
        old = weakref.ref(kept)
        await collector.collect()
        assert young() is None
        del kept
        await collector.collect()
        assert old() is not None
        monkeypatch.setattr(garbage, "OLD_SECONDS", 0.0)
        await collector.collect()
        assert old() is None
    assert gc.isenabled()


def test_where_it_was_off_it_stays_off() -> None:
    gc.disable()
    try:
        with garbage.by_the_clock():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
