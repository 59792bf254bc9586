"""Periods: which months there are, what keeps them open, what late news comes to, and the seal."""

import hashlib
import itertools
import json
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler_usage.explaining import explain
from hostler_usage.history.calendar_span import Span, begin
from hostler_usage.history.intervals import Interval, Provenance
from hostler_usage.history.measures import Window, quantity, totals
from hostler_usage.periods.period import (
    MOST_EVIDENCE,
    Facts,
    HeldRow,
    LineKey,
    MovedRow,
    Noted,
    Obstacle,
    Period,
    State,
    Terms,
    Unsettled,
    adjustments,
    blockers,
    canonical,
    decoded,
    difference,
    is_touched,
    lines,
    missing,
    news,
    ordered,
    recomputed,
    sealed,
)
from hostler_usage.reading.mapping import Measure

START = datetime(2026, 4, 1, tzinfo=UTC)
END = datetime(2026, 5, 1, tzinfo=UTC)
DAY, HOUR = timedelta(days=1), timedelta(hours=1)
MEASURES = (
    Measure(name="instance_hours", resource_type="instance"),
    Measure(name="vcpu_hours", resource_type="instance", attribute="vcpus"),
    Measure(name="bytes_in", resource_type="instance", counter="in"),
)
TERMS = Terms(measures=MEASURES, kinds={"instance": "flavor"})
APRIL = Period(name="2026-04", start=START, end=END, time_zone="UTC", made_at=START)


def cited(number: int) -> dict[str, str]:
    return {"message_id": f"m{number}", "event_id": f"{number}-{number:064x}"}


def held(
    start: datetime, end: datetime | None, vcpus: int = 1, state: str = "running", *names: int
) -> HeldRow:
    attributes = {"vcpus": vcpus, "flavor": f"f{vcpus}"}
    return HeldRow(start, end, "p1", state, attributes, [cited(n) for n in names])


moments = st.integers(0, 100 * 24 * 60).map(lambda n: START - 30 * DAY + n * timedelta(minutes=1))


@st.composite
def facts(draw: st.DrawFn) -> Facts:
    """A life of a resource, and what moved in and out of it."""
    edges = sorted(draw(st.sets(moments, max_size=5)))
    ends: list[datetime | None] = [*edges[1:], None if draw(st.booleans()) else END + 90 * DAY]
    return Facts(
        held=[
            held(
                start, end, draw(st.integers(0, 4)), draw(st.sampled_from(("running", "stopped")))
            )
            for start, end in zip(edges, ends, strict=False)
        ],
        moved=[
            MovedRow("in", "", moment, draw(st.integers(1, 2**70)), "p1")
            for moment in sorted(draw(st.sets(moments, max_size=4)))
        ],
    )


# --- which months there are


@given(
    first=moments,
    months=st.integers(0, 8),
    zones=st.lists(
        st.sampled_from(("UTC", "Europe/Berlin", "America/New_York", "Pacific/Apia")),
        min_size=1,
        max_size=4,
    ),
)
def test_every_moment_is_in_one_period_however_often_the_zone_changes(
    first: datetime, months: int, zones: list[str]
) -> None:
    known: list[Period] = []
    now = first
    for name in zones:
        known += missing(known, min([first, *(i.start for i in known)]), now, ZoneInfo(name), name)
        now += timedelta(days=20 * months)
    last = ZoneInfo(zones[-1])
    known += missing(known, min(item.start for item in known), now, last, zones[-1])
    known.sort(key=lambda item: item.start)
    assert known[0].start <= first
    assert known[-1].end > now or known[-1].end > begin(now, Span.MONTH, last) - DAY
    assert [item.end for item in known[:-1]] == [item.start for item in known[1:]]
    assert len({item.name for item in known}) == len(known)


def test_no_month_is_made_twice_nor_before_its_time() -> None:
    made = missing([], START - 40 * DAY, START + DAY, UTC, "UTC")
    assert [item.name for item in made] == ["2026-02", "2026-03", "2026-04"]
    assert missing(made, START - 40 * DAY, START + 2 * DAY, UTC, "UTC") == []


def test_months_before_the_first_known_are_made_when_facts_of_them_turn_up() -> None:
    made = missing([APRIL], START - 40 * DAY, START + DAY, UTC, "UTC")
    assert [item.name for item in made] == ["2026-02", "2026-03"]


# --- states and what keeps a period open


def test_a_period_runs_then_settles_and_is_closed_for_good() -> None:
    assert APRIL.state(END - HOUR) is State.OPEN
    assert APRIL.state(END) is State.SETTLING
    closed = Period(
        name="2026-04", start=START, end=END, time_zone="UTC", made_at=START, closed_at=END
    )
    assert closed.state(START) is State.CLOSED


def test_a_month_that_is_made_late_settles_from_then_on() -> None:
    late = Period(name="x", start=START, end=END, time_zone="UTC", made_at=END + 30 * DAY)
    assert late.settles_at(3 * DAY) == END + 33 * DAY
    assert APRIL.settles_at(3 * DAY) == END + 3 * DAY


@pytest.mark.parametrize(
    ("unsettled", "now", "obstacles"),
    [
        (Unsettled(), END - HOUR, [Obstacle.RUNNING]),
        (Unsettled(), END + HOUR, [Obstacle.SETTLING]),
        (Unsettled(), END + 3 * DAY, []),
        (Unsettled(fold_behind=HOUR), END + 3 * DAY, [Obstacle.FOLD_BEHIND]),
        (Unsettled(is_rebuilding=True), END + 3 * DAY, [Obstacle.REBUILDING]),
        (Unsettled(audit_periods=1), END + 3 * DAY, [Obstacle.AUDITS_UNSETTLED]),
        (Unsettled(audited_resources=1), END + 3 * DAY, [Obstacle.AUDITS_UNSETTLED]),
        (
            Unsettled(fold_behind=HOUR, is_rebuilding=True, audit_periods=1),
            END,
            [
                Obstacle.SETTLING,
                Obstacle.FOLD_BEHIND,
                Obstacle.REBUILDING,
                Obstacle.AUDITS_UNSETTLED,
            ],
        ),
    ],
)
def test_whatever_keeps_a_period_open_is_named(
    unsettled: Unsettled, now: datetime, obstacles: list[Obstacle]
) -> None:
    found = blockers(APRIL, unsettled, now, 3 * DAY)
    assert [item.obstacle for item in found] == obstacles
    assert all(item.detail for item in found)


# --- lines and differences


@given(facts=facts())
def test_lines_of_a_month_sum_to_the_measures_of_its_window(facts: Facts) -> None:
    intervals = [
        Interval(
            start=row.start,
            end=row.end,
            attributes={"vcpus": int(str(row.attributes["vcpus"]))},
            opened_by=(),
            closed_by=(),
            provenance=Provenance.EVENTS,
        )
        for row in facts.held
    ]
    expected = totals(MEASURES, intervals, Window(start=START, end=END, as_of=END))
    found = dict.fromkeys(expected, 0)
    for line, amount in lines("r1", "instance", facts, TERMS, START, END).items():
        found[line.measure] += amount
    expected["bytes_in"] = sum(row.amount for row in facts.moved if START <= row.at < END)
    assert found == expected


@given(facts=facts(), cut=moments)
def test_lines_are_additive_over_windows(facts: Facts, cut: datetime) -> None:
    start, end = START - 60 * DAY, END + 60 * DAY
    parts = lines("r1", "instance", facts, TERMS, start, cut)
    parts.update(lines("r1", "instance", facts, TERMS, cut, end))
    assert parts == lines("r1", "instance", facts, TERMS, start, end)


@given(worlds=st.lists(facts(), min_size=1, max_size=5))
def test_frozen_lines_and_all_differences_are_the_lines_of_now(worlds: list[Facts]) -> None:
    total = dict(lines("r1", "instance", worlds[0], TERMS, START, END))
    for before, after in itertools.pairwise(worlds):
        found = difference("r1", "instance", before, after, TERMS, START, END)
        assert found == {} or is_touched(before, after, END)
        for line, amount in found.items():
            total[line] = total.get(line, 0) + amount
    now = lines("r1", "instance", worlds[-1], TERMS, START, END)
    assert {k: v for k, v in total.items() if v} == {k: v for k, v in now.items() if v}


def test_what_moved_is_under_the_state_and_kind_of_its_moment() -> None:
    one = Facts(
        held=[held(START, START + DAY, 1), held(START + DAY, None, 2, "stopped")],
        moved=[
            MovedRow("in", "net", START + DAY - HOUR, 5, "p1"),
            MovedRow("in", "net", START + DAY, 7, "p1"),
            MovedRow("in", "net", START - DAY, 100, "p1"),
        ],
    )
    found = lines("r1", "instance", one, TERMS, START - 2 * DAY, END)
    assert {key[3:5]: n for key, n in found.items() if key.measure == "bytes_in"} == {
        ("running", "f1"): 5,
        ("stopped", "f2"): 7,
        ("", ""): 100,
    }


def test_the_end_of_a_life_after_every_closed_period_touches_nothing() -> None:
    before = Facts(held=[held(START, None)])
    after = Facts(held=[held(START, END + DAY)])
    assert not is_touched(before, after, END)
    assert is_touched(before, after, END + 2 * DAY)


def test_news_are_the_messages_that_what_is_now_rests_on_and_what_was_did_not() -> None:
    before = Facts(held=[held(START, None, 1, "running", 2)])
    after = Facts(held=[held(START, END, 1, "running", 2, 11, 10)])
    assert news(before, after) == [cited(10), cited(11)]
    assert news(after, before) == [cited(10), cited(11)]  # taken back
    assert news(before, before) == [cited(2)]


# --- adjustments


def noted(amount: int, resource: str = "i1", *names: int, hour: int = 0) -> Noted:
    line = LineKey("r1", "p1", "instance", "running", "f1", "instance_hours")
    return Noted(
        "2026-04",
        "r1",
        "instance",
        resource,
        [(line, amount)],
        [cited(n) for n in names],
        END + hour * HOUR,
    )


def test_changes_of_one_line_and_resource_are_one_adjustment_and_zeros_are_none() -> None:
    found = adjustments(
        [
            noted(5, "i1", 3, hour=2),
            noted(-7, "i1", 1, 3, hour=1),
            noted(4, "i2", 5),
            noted(-4, "i2", 6),
        ]
    )
    (one,) = found
    assert (one.resource_id, one.delta, one.messages) == ("i1", -2, 2)
    assert one.evidence == [cited(1), cited(3)]
    assert one.noticed_at == END + HOUR


def test_of_many_messages_the_first_are_named_and_all_are_counted() -> None:
    (one,) = adjustments([noted(5, "i1", *range(1, 251))])
    assert one.messages == 250
    assert one.evidence == [cited(n) for n in range(1, MOST_EVIDENCE + 1)]


# --- the seal


def test_the_canonical_bytes_of_a_line_are_these() -> None:
    line = LineKey("Ré", "", "instance", "running", 'a"b', "ram_mb_hours")
    assert canonical(APRIL, line, 2**70) == (
        b'{"period":"2026-04","start":"2026-04-01T00:00:00Z","end":"2026-05-01T00:00:00Z",'
        b'"region":"R\\u00e9","project_id":null,"resource_type":"instance",'
        b'"state_class":"running","kind":"a\\"b","measure":"ram_mb_hours",'
        b'"amount":1180591620717411303424}\n'
    )


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=4)
line_keys = st.builds(LineKey, texts, texts, texts, texts, texts, texts)


@given(amounts=st.dictionaries(line_keys, st.integers(-(2**80), 2**80), max_size=8))
def test_whoever_has_the_lines_can_recompute_the_manifest(amounts: dict[LineKey, int]) -> None:
    rows = ordered(amounts)
    manifest = sealed(APRIL, rows)
    body = b"".join(canonical(APRIL, line, amount) for line, amount in rows)
    assert manifest.sha256 == hashlib.sha256(body).digest()
    assert recomputed(body.splitlines(keepends=True)) == manifest
    assert manifest.lines == len([n for n in amounts.values() if n])
    keys = [[part.encode() for part in line] for line, _ in rows]
    assert keys == sorted(keys)
    assert [json.loads(text)["amount"] for text in body.splitlines()] == [n for _, n in rows]


def test_lines_that_are_none_are_refused() -> None:
    for text in (b"[]\n", b"{}\n", b"x\n", b'{"measure":"m","amount":"1"}\n'):
        with pytest.raises(ValueError, match="line 1 is none"):
            recomputed([text])


def test_terms_are_kept_and_read_back() -> None:
    assert decoded(json.loads(json.dumps(TERMS.encoded()))) == TERMS


# --- explanations


@given(facts=facts(), start=moments, span=st.integers(1, 60 * 24 * 60))
def test_the_parts_of_a_number_are_what_its_measure_counts(
    facts: Facts, start: datetime, span: int
) -> None:
    window = Window(start=start, end=start + span * timedelta(minutes=1), as_of=END)
    for measure in MEASURES[:2]:
        expected = 0
        found = 0
        for row in facts.held:
            until = window.upper if row.end is None else min(row.end, window.upper)
            since = max(row.start, window.start)
            if since >= until:
                continue
            part = explain.HeldPart(
                region="r1",
                resource_type="instance",
                resource_id="i1",
                start=row.start,
                end=row.end,
                counted_from=since,
                counted_until=until,
                quantity=quantity(measure, row.attributes),
                project_id=row.project_id,
                user_id=None,
                state_class=row.state_class,
                attributes=row.attributes,
                opened_by=[],
                closed_by=[],
                provenance="events",
            )
            found += part.amount
        for line, amount in lines(
            "r1", "instance", facts, TERMS, window.start, max(window.start, window.upper)
        ).items():
            expected += amount if line.measure == measure.name else 0
        assert found == expected


def test_bodies_are_taken_as_long_as_they_fit() -> None:
    assert explain.affordable([5, 5, 5], 10) == 2
    assert explain.affordable([11, 1], 10) == 0
    assert explain.affordable([], 0) == 0


def test_a_body_is_text_where_it_can_be() -> None:
    assert explain.body_text("né".encode()) == ("utf-8", "né")
    assert explain.body_text(b"\xff\x00") == ("base64", "/wA=")
