"""Courses of leases of one node, as baremetal tells of them: each is billed to the microsecond, however short."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler_usage.history.ledger import Ledger, reckon
from hostler_usage.reading import mapping_file
from hostler_usage.reading.envelope import Notification
from hostler_usage.reading.mapping import Mapping
from hostler_usage.reading.mapping_file import packaged
from hostler_usage.reading.normalise import Normaliser
from hostler_usage.reading.statement import Evidence, decode, encode

BEGUN = datetime(2026, 5, 8, tzinfo=UTC)
MILLISECOND = timedelta(milliseconds=1)
SECOND = timedelta(seconds=1)
BEFORE = mapping_file.read(
    "resources: {node: {exact: false, bodies: {lease: {born: never, ended: never}, expired: {born: never}}}}"
)
"""What was metered while events named no moments of their leases."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Who had the node from when until when, and when somebody noticed that it was over."""

    owner: str
    taken_at: datetime
    ended_at: datetime
    end: Literal["released", "expired"]
    noticed_at: datetime

    def told(self, *, names_moments: bool = True) -> tuple[Notification, Notification]:
        """Its two events; a release before this one named no moments but `expires_at`."""
        taken = {"taken_at": str(self.taken_at)} if names_moments else {}
        ended = taken | ({"ended_at": str(self.ended_at)} if names_moments else {})
        return (
            self._event("taken", self.taken_at, taken),
            self._event(self.end, self.noticed_at, ended),
        )

    def _event(self, name: str, at: datetime, moments: dict[str, str]) -> Notification:
        left = timedelta() if self.end == "expired" else timedelta(hours=1)
        payload = {
            "node_uuid": "n",
            "name": "bm-1",
            "owner": self.owner,
            "purpose": "burn-in",
            "expires_at": str(self.ended_at + left),
            **moments,
        }
        return Notification(
            message_id=f"{name} at {at}",
            has_own_id=True,
            event_type=f"baremetal.lease.{name}",
            publisher_id="baremetal",
            priority="INFO",
            timestamp=at.replace(microsecond=0),  # as AMQP cuts it
            payload=payload,
            context_project_id=None,
            request_id=None,
            digest=b"d",
        )


@st.composite
def courses(draw: st.DrawFn, least: timedelta, most: timedelta) -> list[Lease]:
    """Leases one after the other; who waits takes the node in the millisecond in which it is free."""
    spans = st.integers(least // MILLISECOND, most // MILLISECOND)
    gaps = st.one_of(st.just(1), st.integers(1, 3000))
    taken_at = BEGUN + draw(st.integers(0, 999)) * MILLISECOND
    leases = []
    for held, gap in draw(st.lists(st.tuples(spans, gaps), min_size=1, max_size=6)):
        ended_at = taken_at + held * MILLISECOND
        end: Literal["released", "expired"] = draw(st.sampled_from(["released", "expired"]))
        late = draw(st.integers(0, gap if end == "expired" else 0))
        leases.append(
            Lease(
                owner=draw(st.sampled_from(["p1", "p2", "p3"])),
                taken_at=taken_at,
                ended_at=ended_at,
                end=end,
                noticed_at=ended_at + late * MILLISECOND,
            )
        )
        taken_at = ended_at + gap * MILLISECOND
    return leases


def ledger(
    told: list[Notification], mapping: Mapping | None = None, *, problems: tuple[str, ...] = ()
) -> Ledger:
    metered = mapping or packaged()
    normaliser = Normaliser(metered)
    found = []
    named: list[str] = []
    for item in told:
        normalised = normaliser.read(item, region="r1")
        named += normalised.problems
        (one,) = normalised.said
        assert one.statement is not None
        evidence = Evidence(
            event_time=item.timestamp, message_id=item.message_id, digest=item.digest
        )
        found.append((decode(encode(one.statement)), evidence))
    assert tuple(named) == problems
    return reckon(metered.resources["node"], found)


def billed(found: Ledger) -> list[tuple[object, ...]]:
    return [
        (item.attributes["project"], item.attributes["purpose"], item.start, item.end)
        for item in found.intervals
    ]


def truth(leases: list[Lease]) -> list[tuple[object, ...]]:
    return [(item.owner, "burn-in", item.taken_at, item.ended_at) for item in leases]


@given(
    courses(300 * MILLISECOND, 1200 * MILLISECOND) | courses(MILLISECOND, 8 * SECOND), st.data()
)
def test_every_lease_is_billed_exactly_however_short_it_is_and_whatever_follows_it(
    leases: list[Lease], data: st.DataObject
) -> None:
    told = [event for lease in leases for event in lease.told()]
    found = ledger(data.draw(st.permutations(told)))
    assert billed(found) == truth(leases)
    assert found.anomalies == ()


@given(courses(300 * MILLISECOND, 1200 * MILLISECOND), st.integers(1, 40), st.data())
def test_a_lease_is_billed_exactly_after_one_that_was_held_for_long(
    leases: list[Lease], hours: int, data: st.DataObject
) -> None:
    """What an event says of the moment it is sent in is not believed of the lease before."""
    long_ago = BEGUN - timedelta(hours=hours)
    held = Lease(
        owner="p9",
        taken_at=long_ago,
        ended_at=leases[0].taken_at - MILLISECOND,
        end=data.draw(st.sampled_from(["released", "expired"])),
        noticed_at=leases[0].taken_at - MILLISECOND,
    )
    told = [event for lease in (held, *leases) for event in lease.told()]
    assert billed(ledger(told)) == truth([held, *leases])


@given(courses(MILLISECOND, 8 * SECOND), st.data())
def test_a_lease_whose_beginning_is_lost_is_billed_by_its_end(
    leases: list[Lease], data: st.DataObject
) -> None:
    lost = data.draw(st.sets(st.integers(0, len(leases) - 1)))
    told = [
        event
        for number, lease in enumerate(leases)
        for event in lease.told()[1 if number in lost else 0 :]
    ]
    assert billed(ledger(data.draw(st.permutations(told)))) == truth(leases)


def one_lease(held: timedelta, end: Literal["released", "expired"] = "released") -> Lease:
    taken_at = BEGUN + 400 * MILLISECOND
    ended_at = taken_at + held
    return Lease(owner="p1", taken_at=taken_at, ended_at=ended_at, end=end, noticed_at=ended_at)


@pytest.mark.parametrize(("end", "field"), [("released", "ended_at"), ("expired", "expires_at")])
def test_an_end_before_its_own_beginning_is_named_and_the_lease_is_over_at_the_event(
    end: Literal["released", "expired"], field: str
) -> None:
    """The database's clock was put back meanwhile; without an end, it would be billed for ever."""
    held = one_lease(10 * SECOND, end)
    taken, ended = held.told()
    assert isinstance(ended.payload, dict)
    ended = ended._replace(payload={**ended.payload, field: str(held.taken_at - SECOND)})
    found = ledger([taken, ended], problems=("absurd_time:ended",))
    assert billed(found) == [("p1", "burn-in", held.taken_at, BEGUN + 10 * SECOND)]
    assert found.anomalies == ()


@pytest.mark.parametrize(
    ("moment", "problem"),
    [
        ("soon", "bad_time:ended_at"),
        (10**40, "bad_time:ended_at"),
        (True, "bad_time:ended_at"),
        ([], "bad_time:ended_at"),
        ({"__value__": {}}, "bad_time:ended_at"),
        (-1, "absurd_time:ended_at"),
        ("9998-12-31 23:59:59+00:00", "absurd_time:ended_at"),
    ],
)
def test_an_end_that_is_no_moment_is_named_and_a_short_lease_is_over_all_the_same(
    moment: object, problem: str
) -> None:
    """AMQP cuts the moment of the event that tells of the end: to before the lease was taken."""
    held = one_lease(500 * MILLISECOND)
    taken, ended = held.told()
    assert isinstance(ended.payload, dict)
    ended = ended._replace(payload={**ended.payload, "ended_at": moment})
    assert billed(ledger([taken, ended], problems=(problem,))) == []
    # and the next one is its own
    after = Lease(
        owner="p2",
        taken_at=BEGUN + 5 * SECOND,
        ended_at=BEGUN + 6 * SECOND,
        end="released",
        noticed_at=BEGUN + 6 * SECOND,
    )
    assert billed(ledger([taken, ended, *after.told()], problems=(problem,))) == truth([after])


@given(courses(1001 * MILLISECOND, 9000 * MILLISECOND))
def test_leases_whose_events_name_no_moments_are_read_as_before(leases: list[Lease]) -> None:
    told = [event for lease in leases for event in lease.told(names_moments=False)]
    assert ledger(told) == ledger(told, BEFORE)


@given(courses(2200 * MILLISECOND, 9000 * MILLISECOND), st.integers(0, 6), st.booleans())
def test_a_course_of_which_the_first_events_name_no_moments_is_billed_within_two_seconds(
    leases: list[Lease], upgraded: int, is_held: bool
) -> None:
    """Baremetal was upgraded between two leases, or while one was held."""
    told = []
    for number, lease in enumerate(leases):
        begins_before = number < upgraded or (number == upgraded and is_held)
        told.append(lease.told(names_moments=not begins_before)[0])
        told.append(lease.told(names_moments=number >= upgraded)[1])
    found = billed(ledger(told))
    assert [item[0] for item in found] == [lease.owner for lease in leases]
    for (_, _, start, end), lease in zip(found, leases, strict=True):
        assert isinstance(start, datetime)
        assert isinstance(end, datetime)
        assert abs(start - lease.taken_at) <= 2 * SECOND
        assert abs(end - lease.ended_at) <= 2 * SECOND
