"""Sums of whole days are what the facts of those days add up to, whatever changed when."""

import random
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest

from hostler_common import db
from hostler_usage.history.fold_store import FoldStore
from hostler_usage.history.measures import Window
from hostler_usage.history.report_store import ReportStore, UsageFilter
from hostler_usage.history.rollup_store import RollupStore
from hostler_usage.history.usage_row import UsageRow
from hostler_usage.reading.envelope import open_body
from hostler_usage.reading.event import Event, Origin
from hostler_usage.reading.mapping_file import packaged
from hostler_usage.reading.normalise import Normaliser
from hostler_usage.service_testing import FromFacts
from hostler_usage.store import Store
from hostler_usage.testing import LARGE, SMALL, InstanceLife, Message, Step

DAY = datetime(2026, 5, 4, tzinfo=UTC)
HOUR = timedelta(hours=1)
ORIGIN = Origin("cloud", "nova", "notifications.info", "application/json", "")
NORMALISER = Normaliser(packaged())


def life(number: int) -> InstanceLife:
    born = DAY + number * 5 * HOUR
    steps = [
        Step(at=born, action="create", flavor=SMALL),
        Step(at=born + (20 + number) * HOUR, action="resize", flavor=LARGE),
        Step(at=born + 50 * HOUR, action="stop"),
    ]
    if number % 2:
        steps.append(Step(at=born + (70 + number) * HOUR, action="delete"))
    return InstanceLife(
        instance_id=f"00000000-0000-4000-8000-{number:012}",
        project_id=f"p{number % 3}",
        steps=tuple(steps),
    )


def event(message: Message) -> Event:
    body = message.body()
    notification = open_body(body)
    return Event(
        notification=notification,
        normalised=NORMALISER.read(notification, region="r1"),
        body=body,
        region="r1",
        origin=ORIGIN,
        headers={},
    )


EVENTS = [event(message) for number in range(12) for message in life(number).messages()]


async def ask(reports: ReportStore, window: Window, groups: Sequence[str]) -> list[object]:
    rows: list[UsageRow]
    rows, _ = await reports.usage(window, groups, UsageFilter(), limit=1000)
    if isinstance(reports, FromFacts):  # sums of days do not know how many resources there were
        assert None not in [row.resources for row in rows]
    return [(dict(row.group), dict(row.amounts)) for row in rows]


@pytest.mark.parametrize("seed", range(4))
async def test_sums_of_days_equal_the_facts_through_late_news_and_the_turn_of_days(
    pool: db.Pool, seed: int
) -> None:
    chance = random.Random(seed)
    order = list(EVENTS)
    chance.shuffle(order)
    store = Store(pool=pool, writer=uuid.uuid4())
    folds = FoldStore(pool=pool, mapping=packaged())
    rollups = RollupStore(pool=pool, mapping=packaged())
    summed = ReportStore(pool=pool, mapping=packaged())
    facts = FromFacts(pool=pool, mapping=packaged())
    now = DAY + timedelta(days=2, hours=3)
    for first in range(0, len(order), 40):
        await store.ingest(order[first : first + 40])
        if chance.random() < 0.7:
            await folds.fold_some()
        if chance.random() < 0.5:
            await rollups.advance(now)
            now += timedelta(hours=chance.randrange(30))
    while await folds.fold_some():
        pass
    await rollups.advance(DAY + timedelta(days=6, hours=1))
    for start, end in [
        (DAY, DAY + timedelta(days=9)),  # beyond what is summed
        (DAY + 7 * HOUR, DAY + timedelta(days=5, hours=2)),  # parts of days at both ends
        (DAY + timedelta(days=1), DAY + timedelta(days=3)),
        (DAY + HOUR, DAY + 3 * HOUR),
    ]:
        window = Window(start=start, end=end, as_of=DAY + timedelta(days=8, hours=5))
        for groups in (["project", "day"], ["day", "type"], ["region"], ["type", "month"], []):
            assert await ask(summed, window, groups) == await ask(facts, window, groups)


async def test_whole_days_are_answered_from_the_sums_alone(pool: db.Pool) -> None:
    """Where the facts are gone the answer is the same: nothing else was read."""
    store = Store(pool=pool, writer=uuid.uuid4())
    await store.ingest(EVENTS)
    while await FoldStore(pool=pool, mapping=packaged()).fold_some():
        pass
    await RollupStore(pool=pool, mapping=packaged()).advance(DAY + timedelta(days=9))
    reports = ReportStore(pool=pool, mapping=packaged())
    window = Window(start=DAY, end=DAY + timedelta(days=7), as_of=DAY + timedelta(days=9))
    before = await ask(reports, window, ["project", "day"])
    assert before
    async with db.connection(pool) as connection:
        await connection.execute("TRUNCATE usage_interval, usage_amount")
    assert await ask(reports, window, ["project", "day"]) == before
