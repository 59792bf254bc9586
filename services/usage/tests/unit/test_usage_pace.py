"""When the fold runs beside reading: at once when it is quiet, seldom in a backlog, always in the end."""

from hostler_usage.history.pace import (
    MOST_QUIET_SECONDS,
    PATIENCE_FOLDS,
    PATIENCE_SECONDS,
    QUIET_SECONDS,
    Pace,
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def folded(pace: Pace, clock: Clock, seconds: float = 0.0) -> None:
    with pace.fold():
        clock.now += seconds


def test_a_quiet_service_folds_at_once() -> None:
    pace = Pace(Clock())
    assert pace.may_fold()
    folded(pace, Clock())
    pace.batch_read(20, 500)
    assert pace.may_fold()


def test_a_backlog_is_read_before_it_is_folded() -> None:
    clock = Clock()
    pace = Pace(clock)
    folded(pace, clock)
    pace.batch_read(500, 500)
    assert not pace.may_fold()
    clock.now = MOST_QUIET_SECONDS
    assert pace.may_fold()


def test_a_backlog_is_over_when_no_batch_comes_in_twice_the_time_of_the_last() -> None:
    clock = Clock()
    pace = Pace(clock)
    folded(pace, clock)
    for apart, quiet in ((0.1, QUIET_SECONDS), (0.3, 0.6), (5.0, MOST_QUIET_SECONDS)):
        pace.batch_read(500, 500)
        clock.now += apart
        pace.batch_read(500, 500)
        clock.now += 0.9 * quiet
        assert not pace.may_fold()
        clock.now += 0.2 * quiet
        assert pace.may_fold()
        folded(pace, clock)


def test_a_reader_too_slow_to_fill_its_batches_reads_a_backlog_all_the_same() -> None:
    clock = Clock()
    pace = Pace(clock)
    folded(pace, clock)
    pace.batch_read(60, 500)
    assert not pace.may_fold()


def test_a_backlog_without_end_is_folded_now_and_then() -> None:
    clock = Clock()
    pace = Pace(clock)
    folded(pace, clock)
    folds = 0
    for _ in range(1000):
        clock.now += 0.1
        pace.batch_read(500, 500)
        if pace.may_fold():
            folds += 1
            folded(pace, clock)
    assert abs(folds - 100 / PATIENCE_SECONDS) <= 1


def test_a_fold_that_takes_long_leaves_reading_the_larger_share() -> None:
    clock = Clock()
    pace = Pace(clock)
    folded(pace, clock, seconds=3.0)
    clock.now += PATIENCE_FOLDS * 3.0 - 0.1
    pace.batch_read(500, 500)
    assert not pace.may_fold()
    clock.now += 0.2
    pace.batch_read(500, 500)
    assert pace.may_fold()
