"""The tracker's memory: current, bounded, and never in its own way."""

import asyncio
import math
import time
import uuid
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler_precache import protocol
from hostler_precache.distribution.distributions import (
    DistributionId,
    Member,
    SwarmRecord,
    SwarmRule,
)
from hostler_precache.swarming import tracker as module
from hostler_precache.swarming.tracker import MEMBERS_AT_ONCE, Tracker
from hostler_precache.transfer.manifest import BlobId

ONE, OTHER = (BlobId(str(uuid.UUID(int=number))) for number in (1, 2))
DISTRIBUTION = DistributionId(uuid.uuid4())


class Records:
    """What the database would say; `meanwhile` happens while it is asked."""

    def __init__(self) -> None:
        self.is_halted = False
        self.has_rules = self.is_moving = True
        self.reads = 0
        self.hosts = ["h1"]
        self.silent: list[str] = []
        self.late: list[str] = []
        self.asked: list[str] = []
        self.meanwhile: Any = lambda: None

    async def swarm(self, blob_id: BlobId, *, within_seconds: float) -> SwarmRecord:
        """The record."""
        del blob_id, within_seconds
        self.meanwhile()
        self.reads += 1
        rule = SwarmRule(
            is_halted=self.is_halted, host_bytes_per_second=None, total_bytes_per_second=None
        )
        members = [
            Member(
                host=host,
                url=f"http://{host}",
                rack=None,
                is_there=host not in self.silent,
                is_moving=self.is_moving,
                distribution_ids=[DISTRIBUTION],
            )
            for host in (*self.hosts, *self.silent)
        ]
        return SwarmRecord(
            seeds=["http://seed"],
            rules={DISTRIBUTION: rule} if self.has_rules else {},
            members=members if self.has_rules else [],
        )

    async def has_blob(self, host: str, blob_id: uuid.UUID) -> bool:
        """Whether it is wanted there by now."""
        del blob_id
        self.asked.append(host)
        return host in self.late


def tracker_of(records: Records) -> Tracker:
    return Tracker(cast("Any", records), member_seconds=30)


def report_of(reason: str | None = None) -> protocol.BlobReport:
    return protocol.BlobReport(
        distribution_id=str(DISTRIBUTION),
        blob_id=str(uuid.uuid4()),
        state=protocol.HostState.WAITING,
        reason=reason,
    )


async def test_a_swarm_may_be_forgotten_while_the_others_are_read() -> None:
    records = Records()
    tracker = tracker_of(records)
    await tracker.swarm("h1", ONE)
    await tracker.swarm("h1", OTHER)
    tracker._swarms[OTHER].asked_at = -math.inf
    records.meanwhile = lambda: tracker.forget(OTHER)
    await tracker.refresh()
    assert list(tracker._swarms) == [ONE]


async def test_a_swarm_that_nobody_may_be_in_is_not_kept() -> None:
    records = Records()
    records.has_rules = False
    tracker = tracker_of(records)
    for _ in range(10):
        await tracker.swarm("h1", BlobId(str(uuid.uuid4())))
    await tracker.refresh()
    assert tracker._swarms == {}


async def test_a_host_is_told_to_look_again_until_it_has_and_no_longer() -> None:
    records = Records()
    tracker = tracker_of(records)
    assert not await tracker.has_news("h1", ONE, report_of())
    records.is_halted = True
    tracker.forget(ONE)
    assert await tracker.has_news("h1", ONE, report_of())
    assert not await tracker.has_news("h1", ONE, report_of(reason=protocol.PAUSED))
    records.is_halted = False
    tracker.forget(ONE)
    assert await tracker.has_news("h1", ONE, report_of(reason=protocol.PAUSED))
    records.has_rules = False
    tracker.forget(ONE)
    assert await tracker.has_news("h1", ONE, report_of())
    assert await tracker.has_news("h1", ONE, report_of(reason=protocol.PAUSED))


async def test_a_refresh_leaves_what_was_asked_lately() -> None:
    tracker = tracker_of(Records())
    await tracker.swarm("h1", ONE)
    assert tracker._swarms[ONE].asked_at <= time.monotonic()
    await tracker.refresh()
    assert list(tracker._swarms) == [ONE]


async def test_a_swarm_in_which_nobody_moves_is_read_seldom_until_somebody_begins() -> None:
    records = Records()
    records.is_moving = False
    tracker = tracker_of(records)
    await tracker.swarm("h1", ONE)
    for _ in range(5):
        await tracker.refresh()
    assert records.reads == 1
    tracker._swarms[ONE].read_at -= 5
    records.is_moving = True
    report = protocol.HostReport(url="http://h1", session_id=str(uuid.uuid4()))
    await tracker.heard("h1", report, ONE)
    assert records.reads == 2
    tracker._swarms[ONE].read_at -= 1
    await tracker.refresh()
    await tracker.heard("h1", report, ONE)
    assert records.reads == 3


async def test_a_host_is_told_of_its_swarm_when_it_has_changed_and_only_then() -> None:
    records = Records()
    records.late = ["late"]
    tracker = tracker_of(records)
    first = await tracker.swarm("h1", ONE)
    told = protocol.BlobReport(
        distribution_id=str(uuid.uuid4()),
        blob_id=str(uuid.uuid4()),
        state=protocol.HostState.TRANSFERRING,
        swarm_version=first.version,
    )
    assert await tracker.news("h1", ONE, told) is None
    again = protocol.HostReport(url="http://h1", session_id=str(uuid.uuid4()))
    await tracker.heard("h1", again, ONE)
    known = await tracker.swarm("h1", ONE)
    told = told.model_copy(update={"swarm_version": known.version})
    await tracker.heard("h1", again, ONE)
    assert await tracker.news("h1", ONE, told) is None
    other = protocol.HostReport(url="http://late", session_id=str(uuid.uuid4()))
    await tracker.heard("late", other, ONE)
    changed = await tracker.news("h1", ONE, told)
    assert changed is not None
    assert "late" in {one.host for one in changed.neighbours}
    assert changed.version != known.version


async def test_nobody_is_sent_to_a_host_that_should_not_have_the_blob() -> None:
    records = Records()
    records.silent, records.late = ["silent"], ["late"]
    tracker = tracker_of(records)
    said = protocol.HostReport(url="http://it", session_id=str(uuid.uuid4()))
    await tracker.swarm("h1", ONE)
    heard = {
        name: await tracker.heard(name, said, ONE)
        for name in ("h1", "silent", "late", "late", "stranger", "stranger")
    }
    assert heard == {"h1": True, "silent": True, "late": True, "stranger": False}
    neighbours = (await tracker.swarm("h1", ONE)).neighbours
    assert {one.host for one in neighbours} == {"silent", "late"}
    assert tracker.members(ONE) == 3
    # what the record says costs no question
    assert records.asked == ["late", "stranger", "stranger"]
    # nor is a swarm read for who has no part in it
    assert not await tracker.heard("stranger", said, OTHER)
    assert (list(tracker._swarms), records.reads) == ([ONE], 1)


async def test_when_a_swarm_has_changed_one_read_answers_all_who_report() -> None:
    records = Records()
    records.hosts, records.late = [f"h{number}" for number in range(50)], ["late"]
    tracker = tracker_of(records)
    said = protocol.HostReport(url="http://it", session_id=str(uuid.uuid4()))
    first = await tracker.swarm("h1", ONE)
    tracker.forget(ONE)
    heard = await asyncio.gather(*(tracker.heard(host, said, ONE) for host in records.hosts))
    assert (all(heard), records.reads, records.asked) == (True, 2, [])
    assert (await tracker.swarm("h1", ONE)).version != first.version
    # what is read while it changes is of before, and is read again
    tracker.forget(ONE)
    changes = iter([ONE])

    def meanwhile() -> None:
        for blob_id in changes:
            tracker.forget(blob_id)

    records.meanwhile = meanwhile
    assert await tracker.heard("late", said, ONE)
    assert (records.reads, records.asked) == (4, ["late"])


async def test_a_host_that_fell_silent_is_nobodys_neighbour_until_it_speaks() -> None:
    records = Records()
    records.hosts, records.silent = ["h1", "h2"], ["h3"]
    tracker = tracker_of(records)
    assert [one.host for one in (await tracker.swarm("h1", ONE)).neighbours] == ["h2"]
    assert (await tracker.swarm("h3", ONE)).neighbours == []


async def test_a_read_of_ten_thousand_members_lets_others_be_answered_in_between() -> None:
    records = Records()
    records.hosts = [f"h{number}" for number in range(10_000)]
    tracker = tracker_of(records)
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    answering = asyncio.create_task(others())
    await tracker.swarm("h1", ONE)
    first, turns = turns, 0
    tracker._swarms[ONE].read_at = -math.inf
    await tracker.refresh()
    answering.cancel()
    assert min(first, turns) >= 10_000 / MEMBERS_AT_ONCE


HOSTS = st.lists(st.sampled_from([f"h{number}" for number in range(9)]), unique=True)


@given(st.lists(st.tuples(HOSTS, HOSTS, HOSTS), min_size=1, max_size=5))
def test_whoever_joins_while_the_swarm_is_read_no_host_is_lost_or_told_of_the_gone(
    rounds: list[tuple[list[str], list[str], list[str]]],
) -> None:
    async def run() -> None:
        records = Records()
        tracker = tracker_of(records)
        known = await tracker._known(ONE)
        for before, members, joining in rounds:
            read = iter([before])
            # the first to read sees other members than who reads after it
            records.meanwhile = lambda read=read, members=members: setattr(
                records, "hosts", next(read, members)
            )

            async def join(joining: list[str] = joining) -> None:
                for host in joining:
                    known.add(host, f"http://{host}", None)
                    await asyncio.sleep(0)

            known.read_at = -math.inf
            await asyncio.gather(tracker.refresh(), join(), tracker.refresh())
            assert {host for host in known._urls if host in known._graph} == set(known._urls)
            assert len(known._graph) == len(known._urls)
            known.read_at = -math.inf
            await tracker.refresh()
            assert set(known._urls) == set(members)
            for host in members:
                others = {one.host for one in known.neighbours(host, banned=[])}
                assert others == set(members) - {host}

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "MEMBERS_AT_ONCE", 1)
        asyncio.run(run())
