"""One message id over several messages: all are kept and flagged, however far apart and in whatever order."""

import asyncio
import random
import uuid
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import aiohttp
import prometheus_client
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostler_common import client, db, testing
from hostler_common.testing import RunningService
from hostler_usage.explaining.explain_store import ExplainStore, Explanation, Question
from hostler_usage.feeds.feed_store import FeedStore
from hostler_usage.history import conflict_store
from hostler_usage.history.conflict_store import near_tables
from hostler_usage.history.fold_store import FoldStore
from hostler_usage.history.ledger_testing import event, instance
from hostler_usage.history.measures import Window
from hostler_usage.history.report_store import EventFilter, ReportStore
from hostler_usage.history.retention import Month
from hostler_usage.history.retention_jobs import RetentionJobs
from hostler_usage.history.retention_store import RetentionStore
from hostler_usage.jobs import months
from hostler_usage.reading.envelope import open_event
from hostler_usage.reading.event import Event, Tally
from hostler_usage.reading.mapping_file import packaged
from hostler_usage.store import Store
from hostler_usage.testing import LEGACY, SMALL, Message, Step

NOON = datetime(2026, 5, 31, 12, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
ABSURD = datetime(9026, 1, 1, tzinfo=UTC)
OLD = datetime(2024, 2, 29, tzinfo=UTC)  # before all partitions
FIRST, LAST = datetime(2025, 1, 5, tzinfo=UTC), datetime(2026, 5, 30, tzinfo=UTC)
# near: in one month, over its edge, in the default partition; and two of one time
NEAR = (NOON, NOON + HOUR, NOON + DAY, OLD, ABSURD)
RunUsage = Callable[..., AbstractAsyncContextManager[RunningService]]
Publish = Callable[..., Awaitable[None]]


def told(message_id: str, at: datetime, publisher: str = "compute.cmp1") -> Event:
    """A message of a life that begins then."""
    (message, *_) = instance(
        1, Step(at=at, action="create", flavor=SMALL), project="p1"
    ).messages()
    return event(replace(message, message_id=message_id, publisher_id=publisher).body())


MONTHS = [*months(FIRST, 1), *months(NOON, 1)]


class Ledger:
    """What is stored, and how it is looked through."""

    def __init__(self, pool: db.Pool) -> None:
        self.pool = pool
        self.store = Store(pool=pool, writer=uuid.uuid4())
        self.found: Counter[str] = Counter()
        self.feeds = FeedStore(pool=pool, count_conflicts=self.found.update)

    async def fetch(self, statement: str) -> list[tuple[Any, ...]]:
        async with db.connection(self.pool) as connection:
            return [tuple(row) for row in await connection.fetch(statement)]

    async def ingest(self, *events: Event) -> Tally:
        return await self.store.ingest(events)

    async def searched(self) -> int:
        """How many ids are found to be in conflict when everything is searched."""
        before = self.found.total()
        for _ in range(4):  # nothing with a lower seq can come any more
            await self.feeds.settle()
        return self.found.total() - before

    async def rows(self) -> set[tuple[str, datetime, bytes]]:
        found = await self.fetch("SELECT message_id, event_time, body_sha256 FROM event_conflict")
        assert len(found) == len(set(found))
        return set(found)

    async def counted(self) -> int:
        ((ids,),) = await self.fetch(
            "SELECT coalesce(sum(conflict), 0)::int FROM ingest_tally WHERE source = 'cloud'"
        )
        return int(ids)


@pytest.fixture
async def ledger(pool: db.Pool) -> Ledger:
    made = Ledger(pool)
    await made.store.make_partitions(MONTHS)
    return made


def keys(*events: Event) -> set[tuple[str, datetime, bytes]]:
    return {
        (item.notification.message_id, item.notification.timestamp, item.notification.digest)
        for item in events
    }


@pytest.mark.parametrize("first", NEAR)
async def test_a_message_that_is_sent_again_otherwise_is_in_conflict_at_once(
    ledger: Ledger, first: datetime
) -> None:
    """In whichever order they come."""
    pairs: set[tuple[str, datetime, bytes]] = set()
    for number, second in enumerate(NEAR, start=1):
        one = told(f"twins {number}", first)
        other = told(f"twins {number}", second, "compute.other")
        assert (await ledger.ingest(one)).conflict == 0
        assert await ledger.rows() == pairs
        # from the default partition, where what has no month is, the months are not searched at once
        is_seen = second not in {OLD, ABSURD} or first in {OLD, ABSURD}
        assert (await ledger.ingest(other)).conflict == is_seen
        assert await ledger.searched() == (not is_seen)
        pairs |= keys(one, other)
        assert await ledger.rows() == pairs
        assert await ledger.counted() == number


@pytest.mark.parametrize(
    ("first", "second"), [(FIRST, LAST), (LAST, FIRST), (LAST, OLD), (NOON, ABSURD)]
)
async def test_messages_that_are_far_apart_are_found_behind_ingest_and_counted_once(
    ledger: Ledger, first: datetime, second: datetime
) -> None:
    one, other = told("twins", first), told("twins", second)
    await ledger.ingest(one, told("alone", first))
    assert await ledger.searched() == 0
    assert (await ledger.ingest(other, told("alone too", second))).conflict == 0
    assert await ledger.searched() == 1
    assert await ledger.rows() == keys(one, other)
    # neither what comes again nor another look through all finds anything new
    assert (await ledger.ingest(one, other)).conflict == 0
    await ledger.fetch("UPDATE feed_clock SET settled_seq = 0")
    assert await ledger.searched() == 0
    assert await ledger.rows() == keys(one, other)
    assert await ledger.counted() == 1


async def test_a_duplicate_is_no_conflict(ledger: Ledger) -> None:
    one = told("one", NOON)
    without = [
        event(told("", at, who).body) for at, who in ((NOON, "a"), (NOON, "b"), (LAST, "a"))
    ]
    assert await ledger.ingest(one, one, *without, *without) == Tally(stored=4, duplicate=4)
    assert await ledger.ingest(one, *without) == Tally(duplicate=4)
    assert await ledger.ingest(one, told("two", NOON)) == Tally(stored=1, duplicate=1)
    assert await ledger.searched() == 0
    assert await ledger.rows() == set()
    assert not any(item.notification.has_own_id for item in without)  # made of the bodies


@pytest.mark.parametrize("apart", [HOUR, -400 * DAY])
async def test_an_event_without_an_id_that_says_the_same_at_another_time_is_no_conflict(
    ledger: Ledger, apart: timedelta
) -> None:
    """Of hostler's own events the time is not in the body that the id is made of."""

    def unnamed(at: datetime, message_id: str | None = None) -> Event:
        told_of = open_event(b"{}", event_type="node.lost", message_id=message_id, timestamp=at)
        return told("", at)._replace(notification=told_of, body=b"{}")

    one, other = unnamed(LAST), unnamed(LAST + apart)
    made = one.notification.message_id
    assert other.notification.message_id == made
    assert await ledger.ingest(one) == Tally(stored=1)
    assert await ledger.ingest(other) == Tally(stored=1)
    assert await ledger.searched() == 0
    assert await ledger.rows() == set()
    # unless a message gives itself that id
    third = unnamed(LAST + 2 * HOUR, made)
    assert (await ledger.ingest(third)).conflict + await ledger.searched() == 1
    assert await ledger.rows() == keys(one, other, third)


@pytest.mark.parametrize("apart", [timedelta(), HOUR, DAY, -400 * DAY])
async def test_two_of_one_batch_are_a_conflict(ledger: Ledger, apart: timedelta) -> None:
    one, other = told("twins", NOON), told("twins", NOON + apart, "compute.other")
    others = [told(f"alone {n}", NOON) for n in range(5)]
    assert (await ledger.ingest(one, *others, other)).conflict == 1
    assert await ledger.searched() == 0
    assert await ledger.rows() == keys(one, other)


@pytest.mark.parametrize("apart", [timedelta(), HOUR, DAY])
async def test_two_that_are_stored_at_once_are_one_conflict(
    ledger: Ledger, apart: timedelta
) -> None:
    twins = [told("twins", NOON), told("twins", NOON + apart, "compute.other")]

    async def both_wait() -> bool:
        found = await ledger.fetch(
            "SELECT 1 FROM pg_stat_activity"
            " WHERE wait_event_type = 'Lock' AND datname = current_database()",
        )
        return len(found) == 2

    # each is stored before the other is committed, and looks for it if nothing keeps it from doing so
    async with db.transaction(ledger.pool) as other:
        await other.execute("LOCK TABLE ingest_tally IN ACCESS EXCLUSIVE MODE")
        tasks = [asyncio.create_task(ledger.ingest(twin)) for twin in twins]
        await testing.eventually(both_wait)
    assert sorted([(await task).conflict for task in tasks]) == [0, 1]
    assert await ledger.searched() == 0
    assert await ledger.rows() == keys(*twins)


async def test_a_batch_and_a_search_that_find_the_same_count_it_once(ledger: Ledger) -> None:
    """The search has seen two that are far apart when a third comes near one of them."""
    far = [told("twins", FIRST), told("twins", LAST)]
    third = told("twins", LAST + HOUR)
    for one in far:
        await ledger.ingest(one)
    for _ in range(2):  # the next turn catalogues
        await ledger.feeds.settle()

    async def waiting(number: int) -> bool:
        found = await ledger.fetch(
            "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        )
        return len(found) == number

    async with db.transaction(ledger.pool) as other:
        await other.execute("SELECT pg_advisory_xact_lock(hashtext('hostler_usage.conflicts'))")
        batch = asyncio.create_task(ledger.ingest(third))
        await testing.eventually(partial(waiting, 1))
        search = asyncio.create_task(ledger.feeds.settle())
        await testing.eventually(partial(waiting, 2))
    await search
    assert (await batch).conflict + ledger.found.total() == 1
    assert await ledger.searched() == 0
    assert await ledger.rows() == keys(*far, third)
    assert await ledger.counted() == 1


async def test_replicas_that_search_at_once_count_a_conflict_once(ledger: Ledger) -> None:
    pairs = [(told(f"twins {n}", FIRST), told(f"twins {n}", LAST)) for n in range(20)]
    for side in (0, 1):
        await ledger.ingest(*(pair[side] for pair in pairs))
    replicas = [FeedStore(pool=ledger.pool, count_conflicts=ledger.found.update) for _ in range(3)]

    async def run(replica: FeedStore) -> None:
        for _ in range(10):
            await replica.settle()

    await asyncio.gather(*(run(replica) for replica in replicas))
    await ledger.searched()
    assert await ledger.rows() == keys(*(item for pair in pairs for item in pair))
    assert (ledger.found.total(), await ledger.counted()) == (len(pairs), len(pairs))


async def test_a_long_stretch_is_searched_in_parts(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conflict_store, "_IDS_AT_ONCE", 3)
    pairs = [(told(f"twins {n}", FIRST), told(f"twins {n}", LAST)) for n in range(10)]
    for side in (0, 1):
        await ledger.ingest(*(pair[side] for pair in pairs))
    assert await ledger.searched() == len(pairs)
    assert await ledger.rows() == keys(*(item for pair in pairs for item in pair))


async def test_whoever_gives_all_messages_one_id_has_each_flagged_as_it_comes_however_far_apart(
    ledger: Ledger,
) -> None:
    """And what is known to be in conflict is looked for no more, else every batch would read all before it."""
    first = [told("0", NOON + n * HOUR) for n in range(3)]
    assert (await ledger.ingest(*first)).conflict == 1
    far = [told("0", at) for at in (FIRST, OLD, ABSURD, LAST)]
    for one in far:
        assert (await ledger.ingest(one)).conflict == 0
    assert await ledger.rows() == keys(*first, *far)
    assert await ledger.searched() == 0
    assert await ledger.counted() == 1


Sending = list[list[tuple[int, int, int]]]
MOMENTS = (FIRST, FIRST + 40 * DAY, LAST, NOON, NOON + DAY, OLD, ABSURD)


async def test_arrival_decides_nothing(database_url: str) -> None:
    """Any messages, in any order, in any batches, searched at any time, and whenever their partitions were made."""
    await db.migrate(database_url, schema="usage", package="hostler_usage")

    async def run(batches: Sequence[Sequence[tuple[int, int, int]]], made_after: int) -> None:
        async with db.open_pool(database_url, schema="usage") as pool:
            ledger = Ledger(pool)
            await ledger.fetch(
                "TRUNCATE raw_event, event_conflict, ingest_tally, touched, statement_apart, feed_page"
            )
            for (name,) in await ledger.fetch(
                "SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid"
                " WHERE i.inhparent = 'raw_event'::regclass AND c.relname <> 'raw_event_default'"
            ):
                await ledger.fetch(f"DROP TABLE {name}")
            stored: dict[str, set[tuple[str, datetime, bytes]]] = defaultdict(set)
            for number, batch in enumerate(batches):
                if number == made_after:
                    await ledger.store.make_partitions(MONTHS)
                events = [
                    told(f"id {one}", MOMENTS[moment], f"compute.{body}")
                    for one, moment, body in batch
                ]
                await ledger.ingest(*events)
                for item in events:
                    stored[item.notification.message_id] |= keys(item)
                if number % 3 == 2:
                    await ledger.searched()
            await ledger.searched()
            wanted = [found for found in stored.values() if len(found) > 1]
            assert await ledger.rows() == set().union(*wanted)
            assert await ledger.counted() == len(wanted)

    one = st.tuples(st.integers(0, 5), st.integers(0, len(MOMENTS) - 1), st.integers(0, 1))
    sendings = st.lists(st.lists(one, min_size=1, max_size=4), min_size=1, max_size=6)

    @settings(max_examples=50)
    @given(sendings, st.integers(0, 6))
    def check(batches: Sending, made_after: int) -> None:
        # a loop of its own for each example, outside of this test's
        asyncio.run(run(batches, made_after))

    await asyncio.to_thread(check)


MAY = Month(
    "raw_event_2026_05", datetime(2026, 5, 1, tzinfo=UTC), datetime(2026, 6, 1, tzinfo=UTC)
)


async def test_a_message_is_flagged_while_it_is_kept_and_no_longer(ledger: Ledger) -> None:
    pair = [told("twins", NOON), told("twins", NOON + DAY)]
    gone = [told("both of May", NOON), told("both of May", NOON - HOUR)]
    absurd = [told("never dropped", ABSURD), told("never dropped", NOON)]
    for events in zip(pair, gone, absurd, strict=True):
        await ledger.ingest(*events)
    await ledger.searched()
    assert await ledger.rows() == keys(*pair, *gone, *absurd)
    assert (await entry_ids(ledger, "twins")) == [False, True]
    jobs = RetentionJobs(
        store=RetentionStore(pool=ledger.pool),
        feeds=ledger.feeds,
        retention_months=1,
        dropped_months=prometheus_client.Counter("a", "", registry=None),
        dropped_messages=prometheus_client.Counter("b", "", registry=None),
    )
    await jobs.drop_at(datetime(2026, 7, 1, tzinfo=UTC))
    assert await ledger.rows() == keys(*pair, *absurd)
    (kept,), _ = await ReportStore(pool=ledger.pool, mapping=packaged()).events(
        EventFilter(message_id="twins"), limit=10
    )
    assert (kept["event_time"], kept["bodies"]) == (pair[1].notification.timestamp, 2)
    assert (await entry_ids(ledger, "twins")) == [False]  # its id in the feeds is for ever
    # the first comes again, to the default partition: it is the same message, and counted once
    assert (await ledger.ingest(pair[0])) == Tally(stored=1)
    assert await ledger.searched() == 0
    assert await ledger.rows() == keys(*pair, *absurd)
    assert sorted(await entry_ids(ledger, "twins")) == [False, True]
    await jobs.drop_at(datetime(2026, 8, 1, tzinfo=UTC))
    assert await ledger.rows() == keys(*pair, *absurd)
    await ledger.fetch("DELETE FROM raw_event WHERE message_id = 'twins'")
    await RetentionStore(pool=ledger.pool).forget_conflicts(MAY.end + DAY * 60)
    assert await ledger.rows() == keys(*absurd)


async def entry_ids(ledger: Ledger, message_id: str) -> list[bool]:
    """Of the messages under an id, newest first, whether each has the id itself in the feeds."""
    page = await ledger.feeds.under_id("compute.instance.create.start", message_id, scope=None)
    found = await ledger.feeds.contents(page.events, scope=None, with_bodies=False)
    return [row["is_first"] for row in found]


async def test_all_messages_under_an_id_are_explained_though_a_number_rests_on_one(
    ledger: Ledger,
) -> None:
    life = instance(
        1,
        Step(at=LAST, action="create", flavor=SMALL),
        Step(at=LAST + 4 * HOUR, action="delete"),
        project="p1",
    )
    folds = FoldStore(pool=ledger.pool, mapping=packaged())
    store = ExplainStore(pool=ledger.pool, mapping=packaged())
    window = Window(start=LAST, end=LAST + DAY, as_of=LAST + DAY)

    async def explained(scope: frozenset[str] | None) -> Explanation:
        while await folds.fold_some():
            pass
        asked = Question(measure="instance_hours", window=window, groups={}, scope=scope)
        return await store.explain(asked, limit=10)

    await ledger.ingest(*(event(message.body()) for message in life.messages()))
    cited, *_ = (await explained(None)).events
    born = next(m for m in life.messages() if m.message_id == cited["message_id"])
    strange = replace(born, event_type="compute.instance.strange", payload={}, timestamp=FIRST)
    foreign = replace(strange, payload={"tenant_id": "p2"}, timestamp=NOON)
    await ledger.ingest(event(strange.body()), event(foreign.body()))
    await ledger.searched()
    for scope, sent in (
        (None, [FIRST, born.timestamp, NOON]),
        (frozenset({"p1"}), [born.timestamp]),
    ):
        found = await explained(scope)
        assert found.amount == 4 * 3_600_000_000
        twins = [row for row in found.events if row["message_id"] == born.message_id]
        assert [row["event_time"] for row in twins] == sent
        assert {row["bodies"] for row in twins} == {3}
        assert {row["bodies"] for row in found.events if row not in twins} == {1}
        shown = {(row["event_time"], row["body_sha256"]) for row in twins}
        assert (shown <= found.bodies.keys()) == (scope is None)


async def test_a_person_sees_the_flag_wherever_the_message_is_shown(
    run_usage: RunUsage, publish: Publish
) -> None:
    now = datetime.now(UTC).replace(microsecond=0)
    life = instance(1, Step(at=now - 3 * HOUR, action="create", flavor=SMALL), project="p1")
    born = next(m for m in life.messages() if m.event_type.endswith("create.end"))
    twin = replace(born, timestamp=now - 400 * DAY, publisher_id="compute.edited")
    alone = Message(
        topic=LEGACY,
        event_type="compute.instance.strange",
        publisher_id="compute.cmp1",
        timestamp=now,
        message_id="alone",
        payload={},
    )
    async with (
        run_usage(feed_seconds=0.05, fold_seconds=0.05) as service,
        client.open_api(service.url) as api,
        aiohttp.ClientSession() as session,
    ):

        async def listed(message: Message) -> list[dict[str, Any]]:
            answer = await api.get("/v1/events", message_id=message.message_id)
            return list(answer["events"])

        async def flagged() -> bool:
            return [item["bodies"] for item in await listed(born)] == [2, 2]

        async def page(path: str) -> str:
            async with session.get(service.url + path) as answer:
                assert answer.status == 200
                return await answer.text()

        await publish([message.body() for message in (born, alone)])
        await testing.eventually(partial(stored, listed, born))
        await publish([twin.body()])
        await testing.eventually(flagged)
        await testing.eventually(partial(stored, listed, alone))
        (only,) = await listed(alone)
        assert only["bodies"] == 1
        first, second = await listed(born)
        for item in (first, second):
            text = await page(f"/events/{item['id']}")
            assert (
                f'<a href="/events?message_id={born.message_id}">2 messages under this id' in text
            )
        assert "messages under this id" not in await page(f"/events/{only['id']}")
        text = await page("/events")
        assert text.count("one of 2 under its id") == 2
        text = await page(f"/resources/instance/{life.instance_id}")
        assert "one of 2 under its id" in text

        async def explained() -> bool:
            text = await page("/explain?measure=instance_hours")
            return text.count("one of 2 messages under this id") == 2

        await testing.eventually(explained)
        async with session.get(service.url + "/metrics") as answer:
            assert 'hostler_usage_conflicts_total{source="cloud"} 1.0' in await answer.text()


async def stored(
    listed: Callable[[Message], Awaitable[list[dict[str, Any]]]], message: Message
) -> bool:
    return bool(await listed(message))


async def test_an_archive_that_is_full_does_not_change_by_a_conflict(ledger: Ledger) -> None:
    """An entry's id in it is final: what is far apart was found before it was full."""
    feeds = FeedStore(pool=ledger.pool, page_events=2)
    far = [told("twins", FIRST), told("twins", LAST)]
    for one in (*far, told("a", LAST), told("b", LAST)):
        await ledger.ingest(one)
    while not await ledger.fetch("SELECT FROM feed_page WHERE is_full AND kind = 'all'"):
        assert await ledger.rows() == set()
        await feeds.settle()
    assert await ledger.rows() == keys(*far)
    assert await entry_ids(ledger, "twins") == [False, True]


def test_the_months_near_a_batch_are_those_that_most_of_it_is_in_and_of_three_days_around() -> (
    None
):
    def of(*moments: datetime) -> list[str]:
        return [name.removeprefix("raw_event_") for name in near_tables(moments)]

    middle = datetime(2026, 5, 15, tzinfo=UTC)
    assert of() == []
    assert of(middle) == ["2026_05"]
    assert of(middle, NOON) == ["2026_05", "2026_06"]
    assert of(datetime(2026, 5, 3, 23, tzinfo=UTC), middle) == ["2026_04", "2026_05"]
    assert of(datetime(2026, 5, 4, tzinfo=UTC)) == ["2026_05"]
    assert of(datetime(2026, 12, 31, 23, tzinfo=UTC)) == ["2026_12", "2027_01"]
    assert of(datetime(2027, 1, 1, tzinfo=UTC)) == ["2026_12", "2027_01"]
    assert of(middle, FIRST + 10 * DAY) == ["2025_01", "2026_05"]
    many = [middle, middle, FIRST, FIRST, middle - 90 * DAY, middle - 90 * DAY, OLD]
    random.Random(1).shuffle(many)
    assert of(*many) == ["2025_01", "2026_02", "2026_05"]
    assert of(datetime.min.replace(tzinfo=UTC)) == ["0000_12", "0001_01"]
    assert of(datetime.max.replace(tzinfo=UTC)) == ["9999_12", "10000_01"]
