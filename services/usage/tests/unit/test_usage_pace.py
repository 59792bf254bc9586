"""The fold gives way to a backlog, and the backlog to the fold once it has waited."""

from hostler_usage.pace import BACKLOG_SECONDS, PATIENCE_SECONDS, Pace


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_without_a_backlog_the_fold_always_runs() -> None:
    pace = Pace(Clock())
    pace.batch_read(499, 500)
    assert [pace.may_fold() for _ in range(3)] == [True, True, True]


def test_a_full_batch_puts_the_fold_off_until_it_has_waited() -> None:
    clock = Clock()
    pace = Pace(clock)
    turns = []
    for _ in range(12):
        pace.batch_read(500, 500)
        turns.append(pace.may_fold())
        clock.now += PATIENCE_SECONDS / 5
    assert turns == [True, *[False] * 4, True, *[False] * 4, True, False]


def test_the_fold_runs_soon_after_the_last_full_batch() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert pace.may_fold()
    pace.batch_read(500, 500)
    assert not pace.may_fold()
    clock.now += BACKLOG_SECONDS
    assert pace.may_fold()
