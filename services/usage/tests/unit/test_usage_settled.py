"""A fold that reads less comes to the same: against the ledger of everything, whatever was said in whatever order."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hostler_usage.auditing.repetition import Said, without_repetitions
from hostler_usage.history import settled
from hostler_usage.history.intervals import Anomaly, fold
from hostler_usage.history.ledger import Ledger, in_order, reckon
from hostler_usage.history.observe import observe
from hostler_usage.history.settled import Settled, Span, settle
from hostler_usage.reading.mapping import Edge, Phase, Reading
from hostler_usage.reading.mapping_file import packaged
from hostler_usage.reading.statement import CounterReading, Evidence, Scalar, Statement

DAY = datetime(2026, 5, 8, tzinfo=UTC)
HOUR, MINUTE, SECOND = timedelta(hours=1), timedelta(minutes=1), timedelta(seconds=1)
CHANGES: dict[str, list[str | None]] = {
    "state": ["active", "stopped", "deleted", "building", "shelved_offloaded"],
    "host": ["h1", "h2", None],
    "project": ["p1", "p2"],
    "flavor": ["m1.small", "m1.large"],
}
INSTANCE = packaged().resources["instance"]
Reckon = Callable[[Sequence[Said]], Ledger]
RECKON: Reckon = partial(reckon, INSTANCE)
FIRST: dict[str, Scalar] = {
    "flavor": "m1.small",
    "host": "h1",
    "memory_mb": 512,
    "project": "p1",
    "state": "active",
    "vcpus": 1,
}


def message(number: int, at: datetime) -> Evidence:
    return Evidence(event_time=at, message_id=f"m{number:04}", digest=b"%04d" % number)


def audit(
    number: int, at: datetime, born_at: datetime, held: dict[str, Scalar], received: int = 0
) -> Said:
    end = at.replace(minute=0, second=0, microsecond=0)
    reading = CounterReading(
        name="bandwidth_in_bytes", reading=Reading.PERIOD, value=received, label="public"
    )
    return (
        Statement(
            edge=Edge.AUDIT,
            attributes=tuple(sorted(held.items())),
            born_at=born_at,
            period=(end - HOUR, end),
            readings=(reading,) if received else (),
        ),
        message(number, at),
    )


def sample(number: int, at: datetime, grown: int) -> Said:
    reading = CounterReading(name="cpu_ns", reading=Reading.CUMULATIVE, value=grown, run="r")
    return Statement(edge=Edge.COUNT, readings=(reading,)), message(number, at)


def event(chance: random.Random, at: datetime, held: dict[str, Scalar]) -> Statement:
    edge = chance.choice([Edge.LAUNCH, Edge.RELAUNCH, Edge.CHANGE, Edge.NOTE, Edge.END, Edge.NONE])
    phase = chance.choice([None, Phase.START, Phase.END, Phase.ERROR])
    return Statement(
        edge=edge,
        attributes=tuple(sorted(held.items())),
        born_at=chance.choice([None, at, at - 40 * MINUTE]),
        ended_at=at if edge is Edge.END else None,
        phase=phase,
        operation="resize" if phase else None,
        request_id=chance.choice([None, "req-1", "req-2"]) if phase else None,
        failed=chance.random() < 0.1,
    )


def life(chance: random.Random, hours: int) -> Iterator[Said]:
    """Hourly audits and samples, and now and then something happens, is lost, or makes no sense."""
    held = dict(FIRST)
    born_at = at = DAY - chance.choice([0, 5, 3000]) * MINUTE
    unrest = chance.choice([0, 0.01, 0.05, 0.2])
    number = grown = 0
    for hour in range(1, hours):
        number += 10
        if chance.random() < unrest:
            at = DAY + hour * HOUR - chance.choice([1, 600, 2400]) * SECOND
            name = chance.choice(list(CHANGES))
            held[name] = chance.choice(CHANGES[name])
            if chance.random() < 0.5:
                born_at = at
            if chance.random() < 0.7:
                yield event(chance, at, held), message(number, at)
        for twin in range(chance.choice([1, 1, 1, 2])):
            at = DAY + hour * HOUR + chance.choice([4, 4, 4, 610, 0]) * SECOND + twin * SECOND / 10
            received = chance.choice([0, 7, hour])
            said, evidence = audit(number + 1 + twin, at, born_at, held, received)
            if chance.random() < unrest / 4:
                said = said._replace(ended_at=at - chance.choice([0, 3000]) * SECOND)
            if chance.random() < unrest / 4:
                said = said._replace(born_at=at)  # of a volume: it is not there yet
            if chance.random() < unrest / 4:
                said = said._replace(
                    period=(at - chance.choice([20 * MINUTE, 24 * HOUR]), at), born_at=None
                )
            yield said, evidence
        if chance.random() < 0.5:
            grown = chance.choice([0, grown + 5, grown + 9])
            yield sample(number + 5, at + 5 * MINUTE, grown)


CHANCES = st.integers(0, 2**32).map(random.Random)


@pytest.mark.parametrize("resource_type", ["instance", "volume", "floating_ip"])
@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 60))
@example(14127, 14)  # of twins of one audit, the second opens another life of the address
def test_repetitions_change_no_history(resource_type: str, seed: int, hours: int) -> None:
    resource = packaged().resources[resource_type]
    said = in_order(life(random.Random(seed), hours))
    left = without_repetitions(said)
    one, other = (
        fold(
            (seen for item, evidence in some for seen in observe(item, resource, evidence)),
            ids_return=resource.ids_return,
        )
        for some in (said, left)
    )
    assert one == other


def test_audits_that_say_the_same_are_left_out_but_for_the_first() -> None:
    said = [audit(n, DAY + n * HOUR + 4 * SECOND, DAY, FIRST) for n in range(1, 20)]
    assert without_repetitions(said) == said[:1]
    stopped = FIRST | {"state": "stopped"}
    said[9] = audit(10, DAY + 10 * HOUR + 4 * SECOND, DAY, stopped)
    assert without_repetitions(said) == [said[0], said[9], said[10]]


def test_an_audit_that_may_be_older_than_an_event_does_not_make_the_next_one_a_repetition() -> (
    None
):
    stopped = Statement(edge=Edge.CHANGE, attributes=(("state", "stopped"),))
    event_at = DAY + 2 * HOUR - 10 * MINUTE
    said = [
        audit(1, DAY + HOUR + 4 * SECOND, DAY, FIRST),
        (stopped, message(2, event_at)),
        audit(3, DAY + 2 * HOUR + 4 * SECOND, DAY, FIRST),  # read before the event, perhaps
        audit(4, DAY + 3 * HOUR + 4 * SECOND, DAY, FIRST),  # and this one cannot have been
        audit(5, DAY + 4 * HOUR + 4 * SECOND, DAY, FIRST),
    ]
    assert without_repetitions(said) == said[:4]


# --- a settled past

Rows = dict[tuple[object, ...], object]


def rows_of(ledger: Ledger) -> Rows:
    """Rows by their keys, the moment they are told apart by being the second part."""
    found: Rows = {("amount", item.at, item.counter, item.label): item for item in ledger.amounts}
    ordinals: Counter[datetime] = Counter()
    for item in ledger.reconciliation.verdicts:
        found["verdict", item.period_start, ordinals[item.period_start]] = item
        ordinals[item.period_start] += 1
    return found


def others_of(ledger: Ledger) -> list[object]:
    """What is always written whole."""
    told = ledger.reconciliation
    lives = [told.lived, told.launches, told.confirmed_at]
    return [ledger.intervals, ledger.operations, ledger.anomalies, *lives]


def spans(ledger: Ledger) -> list[Span]:
    return [
        Span(
            item.start,
            item.end,
            (item.attributes, item.opened_by, item.provenance),
            item.closed_by,
        )
        for item in ledger.intervals
    ]


def since(
    past: Settled, stored: Sequence[Said], before: Ledger, reckoned: Reckon = RECKON
) -> Ledger | None:
    """What a fold makes of a settled past and all since; None where it has to read everything."""
    said = [item for item in stored if item[1].event_time >= past.said_from]
    if not past.goes_on(said):
        return None
    ledger = reckoned([*past.kept, *said])
    return ledger if past.is_past_kept(spans(before), spans(ledger)) else None


@pytest.mark.parametrize("resource_type", ["instance", "volume", "floating_ip"])
@settings(max_examples=40, deadline=None)
@given(CHANCES, st.integers(30, 120), st.sampled_from([0, 0, 0.02]))
def test_a_settled_past_and_what_came_since_are_the_ledger_of_everything(
    resource_type: str, chance: random.Random, hours: int, late: float
) -> None:
    """Of a volume, changes that no event told of are named as well, wherever one lets them slip.

    An address lives again after its end.
    """
    reckoned: Reckon = partial(reckon, packaged().resources[resource_type])
    said = list(life(chance, hours))
    delay = {item: 30 * HOUR * (chance.random() < late) for item in said}
    said.sort(key=lambda item: item[1].event_time + delay[item])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settled, "LEAST_READ", 1)
        patch.setattr(settled, "LEAST_SPARED", 1)
        past: Settled | None = None
        stored: list[Said] = []
        before = reckoned([])
        while said:
            size = chance.choice([1, 2, 10, 30])
            new, said = said[:size], said[size:]
            stored += new
            whole = reckoned(stored)
            ours = None
            if past is not None and min(item[1].event_time for item in new) >= past.said_from:
                ours = since(past, stored, before, reckoned)
            if past is None or ours is None:
                past = settle(stored, whole)
            else:
                assert others_of(ours) == others_of(whole)
                line = past.rows_from
                stay = {key: row for key, row in rows_of(before).items() if key[1] < line}  # type: ignore[operator]
                come = {key: row for key, row in rows_of(ours).items() if key[1] >= line}  # type: ignore[operator]
                assert stay | come == rows_of(whole)
                needed = [item for item in stored if item[1].event_time >= past.said_from]
                past = settle([*past.kept, *needed], ours) or past
            before = whole


def days_of_audits(
    days: int, midnight_at: timedelta, relaunched: datetime | None = None
) -> list[Said]:
    """Hourly audits, those of the last midnight sent so long after it; and a resize, if one is told."""
    line = DAY + (days - 1) * 24 * HOUR
    said: list[Said] = []
    for number in range(1, days * 24 - 9):
        period_end = DAY + number * HOUR
        at = period_end + (midnight_at if period_end == line else 4 * SECOND)
        born_at = relaunched if relaunched is not None and at >= relaunched else DAY
        statement, evidence = audit(number, at, born_at, FIRST)
        said.append((statement._replace(period=(period_end - HOUR, period_end)), evidence))
    if relaunched is not None:  # by an event that does not say into what
        told = Statement(edge=Edge.RELAUNCH, attributes=(("state", "active"),), born_at=relaunched)
        said.append((told, message(9999, relaunched + SECOND)))
    return said


@pytest.mark.parametrize("sent", [30 * MINUTE, 55 * MINUTE, 3 * HOUR])
@pytest.mark.parametrize("known", [True, False])
def test_an_audit_of_before_the_line_is_compared_with_what_held_when_it_was_sent(
    sent: timedelta, known: bool
) -> None:
    line = DAY + 3 * 24 * HOUR
    relaunched = line + sent - 10 * MINUTE
    said = days_of_audits(4, sent, relaunched if known else None)
    resized = FIRST | {"flavor": "m1.large"}
    number = len(said) + 1
    news = (
        audit(number, DAY + number * HOUR + 4 * SECOND, relaunched, resized)
        if known
        else (
            Statement(
                edge=Edge.NOTE, attributes=tuple(sorted(resized.items())), born_at=relaunched
            ),
            message(number, DAY + number * HOUR),
        )
    )
    before, whole = RECKON(said), RECKON([*said, news])
    past = settle(said, before)
    changed = {key for key, row in rows_of(whole).items() if rows_of(before).get(key) != row}
    assert any(key[0] == "verdict" and key[1] < line for key in changed)  # type: ignore[operator]
    assert past is None or past.rows_from < line or since(past, [*said, news], before) is None


def test_of_a_year_of_audits_a_day_or_two_are_read() -> None:
    said = [audit(n, DAY + n * HOUR + 4 * SECOND, DAY, FIRST, n) for n in range(1, 8761)]
    past = settle(said, RECKON(said[:30]))
    assert past is not None
    read = [item for item in said if item[1].event_time >= past.said_from]
    assert len(past.kept) + len(read) < 60
    assert past.goes_on(read)


def test_what_speaks_of_the_settled_past_is_not_a_going_on_of_it() -> None:
    said = [audit(n, DAY + n * HOUR + 4 * SECOND, DAY, FIRST, n) for n in range(1, 100)]
    past = settle(said, RECKON(said[:30]))
    assert past is not None
    at = DAY + 101 * HOUR
    old = past.rows_from - HOUR
    assert past.goes_on([audit(101, at, DAY, FIRST)])
    for statement in (
        Statement(edge=Edge.AUDIT, born_at=old),  # another birth
        Statement(edge=Edge.AUDIT, period=(old, old + HOUR)),
        Statement(edge=Edge.COUNT, at=old),
        Statement(edge=Edge.END, ended_at=old),
        Statement(edge=Edge.LAUNCH, born_at=DAY),  # the birth's own event
    ):
        assert not past.goes_on([(statement, message(102, at))])
    assert not past.goes_on([audit(3, DAY + 3 * HOUR, DAY, FIRST)])


def test_a_history_may_end_differently_after_the_line_and_be_no_other_before_it() -> None:
    said = [audit(n, DAY + n * HOUR + 4 * SECOND, DAY, FIRST, n) for n in range(1, 100)]
    past = settle(said, RECKON(said[:30]))
    assert past is not None
    line = past.rows_from
    before = [Span(DAY, None, "small", ())]
    resized = [Span(DAY, line + HOUR, "small", ("m",)), Span(line + HOUR, None, "large", ())]
    deleted = [Span(DAY, line + HOUR, "small", ("m",))]
    assert past.is_past_kept(before, resized)
    assert past.is_past_kept(before, deleted)
    assert not past.is_past_kept(before, [Span(DAY, None, "large", ())])
    assert not past.is_past_kept(before, [Span(DAY + SECOND, None, "small", ())])
    assert not past.is_past_kept(before, [Span(DAY, line - HOUR, "small", ("m",))])
    assert not past.is_past_kept(before, [])
    # an audit was compared with the end that the history had
    statement, evidence = audit(50, DAY + 50 * HOUR, DAY, FIRST)
    named = replace(past, kept=(*past.kept, (statement._replace(ended_at=DAY), evidence)))
    assert named.is_past_kept(before, resized)
    assert not named.is_past_kept(before, deleted)


def test_runs_of_a_counter_stay_in_the_order_of_their_first_readings() -> None:
    def counted(number: int, run: str, value: int) -> Said:
        reading = CounterReading(name="cpu_ns", reading=Reading.CUMULATIVE, value=value, run=run)
        statement = Statement(edge=Edge.COUNT, at=DAY + number * HOUR, readings=(reading,))
        return statement, message(5000 + 2 * number + (run == "a"), DAY + number * HOUR)

    said = days_of_audits(4, 4 * SECOND)
    # run b began first and was read last
    said += [counted(number, run, number) for run, number in [("b", 3), ("a", 5), ("a", 9)]]
    said += [counted(11, "b", 11)]
    past = settle(said, RECKON(said))
    assert past is not None
    news = [counted(90, run, 100) for run in "ab"]
    ours = since(past, [*said, *news], RECKON(said))
    assert ours is not None
    whole = rows_of(RECKON([*said, *news]))
    key = ("amount", DAY + 90 * HOUR, "cpu_ns", "")
    assert rows_of(ours)[key] == whole[key]


@given(
    st.lists(st.sampled_from(["", "a/1", "a/1/5", "a/1/6", "b/1"]), min_size=8, max_size=30),
    st.lists(st.sampled_from(["", "a/1", "a/1/5", "a/1/6", "b/1"]), min_size=1, max_size=4),
)
def test_runs_that_are_told_apart_at_times_are_those_of_everything_that_was_said(
    before: list[str], after: list[str]
) -> None:
    def counted(number: int, run: str) -> Said:
        at = DAY + number * HOUR
        reading = CounterReading(
            name="cpu_ns", reading=Reading.CUMULATIVE, value=100 + number, run=run
        )
        statement = Statement(edge=Edge.COUNT, at=at, readings=(reading,))
        return statement, message(5000 + number, at)

    said = days_of_audits(4, 4 * SECOND)
    said += [counted(number, run) for number, run in enumerate(before, 2)]
    past = settle(said, RECKON(said))
    assert past is not None
    news = [counted(number, run) for number, run in enumerate(after, 90)]
    ours = since(past, [*said, *news], RECKON(said))
    assert ours is not None
    found, whole = (
        [item for item in ledger.amounts if item.at >= past.rows_from]
        for ledger in (ours, RECKON([*said, *news]))
    )
    assert sorted(found, key=str) == sorted(whole, key=str)


def test_a_past_without_an_owner_is_not_settled_for_the_first_owner_pays_for_it() -> None:
    said = days_of_audits(4, 4 * SECOND)
    nobodys = [(item._replace(attributes=item.attributes[:3]), by) for item, by in said]
    assert settle(said, RECKON(said)) is not None
    assert settle(nobodys, RECKON(nobodys)) is None


def test_a_past_whose_counts_overlap_is_not_settled_for_nobody_would_know_any_more() -> None:
    said = [audit(n, DAY + n * HOUR + SECOND, DAY, FIRST, n) for n in range(1, 90)]
    assert settle(said, RECKON(said)) is not None
    daily, by = audit(95, DAY + 24 * HOUR + MINUTE, DAY, FIRST, 1000)
    whole_day = (daily._replace(period=(DAY, DAY + 24 * HOUR)), by)
    ledger = RECKON([*said, whole_day])
    assert Anomaly.COUNTS_OVERLAP in ledger.anomalies
    assert settle([*said, whole_day], ledger) is None


@pytest.mark.parametrize("count", [10, 30])
def test_a_short_past_is_not_settled(count: int) -> None:
    said = [audit(n, DAY + n * HOUR, DAY, FIRST, n) for n in range(1, count)]
    assert settle(said, RECKON(said)) is None
