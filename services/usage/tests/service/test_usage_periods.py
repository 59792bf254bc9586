"""Closed periods on a real PostgreSQL: frozen, sealed, and corrected by adjustments that always add up."""

import asyncio
import csv
import hashlib
import json
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
import typer
from typer.testing import CliRunner

from hostler_common import client, db, errors
from hostler_common.testing import eventually
from hostler_usage.exporting import exports_api
from hostler_usage.exporting.export_store import ExportStore
from hostler_usage.exporting.exports import Exports
from hostler_usage.history.ledger_testing import Ledger, event, instance, with_bandwidth
from hostler_usage.history.measures import Window
from hostler_usage.history.report_store import UsageFilter
from hostler_usage.history.rollup_store import RollupStore
from hostler_usage.money.costing import Costing
from hostler_usage.money.price_store import PriceStore
from hostler_usage.periods import periods_api, periods_cli
from hostler_usage.periods.period import LineKey
from hostler_usage.periods.period_jobs import PeriodJobs
from hostler_usage.periods.period_store import PeriodBlocked, PeriodClosed, PeriodStore
from hostler_usage.reading.event import Origin
from hostler_usage.reading.mapping_file import packaged
from hostler_usage.reading.normalise import Normaliser
from hostler_usage.reading.statement import ResourceKey
from hostler_usage.testing import (
    LARGE,
    MEDIUM,
    SMALL,
    Message,
    Step,
    VolumeLife,
    VolumeStep,
)

MARCH = datetime(2026, 3, 1, tzinfo=UTC)
HOUR, DAYS = timedelta(hours=1), timedelta(days=1)
ORIGIN = Origin("cloud", "nova", "notifications.info", "application/json", "")
NORMALISER = Normaliser(packaged())
KINDS = {"instance": "flavor", "volume": "volume_type"}
SETTLE = timedelta(days=3)
ServePart = Callable[..., AbstractAsyncContextManager[tuple[str, dict[str, client.Api]]]]


def at(month: int, day: int, hour: int = 0) -> datetime:
    return datetime(2026, month, day, hour, tzinfo=UTC)


def periods_of(pool: db.Pool, **changes: Any) -> PeriodStore:
    values: dict[str, Any] = {"time_zone": "UTC", "settle": SETTLE, "kinds": KINDS, **changes}
    return PeriodStore(pool=pool, mapping=packaged(), **values)


class Months(Ledger):
    """A ledger with periods."""

    def __init__(self, pool: db.Pool) -> None:
        super().__init__(pool)
        self.periods = periods_of(pool)

    async def make(self, now: datetime) -> list[str]:
        await RollupStore(pool=self.pool, mapping=packaged()).advance(now)
        return await self.periods.make(now)

    async def close(self, name: str, now: datetime, *, overrule: bool = True) -> None:
        async with db.transaction(self.pool) as connection:
            await self.periods.close(connection, name, now, by="test", overrule=overrule)

    async def frozen(self, name: str) -> Counter[LineKey]:
        found: Counter[LineKey] = Counter()
        after: int | None = -1
        stored = await self.periods.period(name)
        while after is not None:
            rows, after = await self.periods.lines(stored.period, scope=None, after=after)
            found.update(dict(rows))
        return found

    async def adjusted(self, name: str) -> Counter[LineKey]:
        found: Counter[LineKey] = Counter()
        for row in await self.adjustments(name):
            found[LineKey._make(row[one] for one in LineKey._fields)] += int(row["delta"])
        return found

    async def adjustments(self, name: str, *, charged: bool = False) -> list[asyncpg.Record]:
        rows, marker = await self.periods.adjustments(
            name, charged=charged, scope=None, limit=1000
        )
        assert marker is None
        return rows

    async def said_now(self, name: str) -> Counter[LineKey]:
        """What usage() says of the period, as lines."""
        one = (await self.periods.period(name)).period
        found: Counter[LineKey] = Counter()
        for resource_type in ("instance", "volume"):
            kind = KINDS[resource_type]
            rows, _ = await self.reports.usage(
                Window(start=one.start, end=one.end, as_of=at(12, 1)),
                ["region", "project", "state_class", kind],
                UsageFilter(resource_type=resource_type),
                limit=1000,
            )
            for row in rows:
                region, project, state, kind_value = (value or "" for value in row.group.values())
                for measure, amount in row.amounts.items():
                    key = LineKey(region, project, resource_type, state, kind_value, measure)
                    found[key] += amount
        return found

    async def assert_adds_up(self, name: str) -> None:
        while (await self.periods.adjust(7))[0]:
            pass
        total = await self.frozen(name)
        total.update(await self.adjusted(name))
        now = await self.said_now(name)
        assert {k: v for k, v in total.items() if v} == {k: v for k, v in now.items() if v}


@pytest.fixture
def ledger(pool: db.Pool) -> Months:
    return Months(pool)


def world(chance: random.Random) -> list[Message]:
    """A few months of a small cloud."""
    messages: list[Message] = []
    for number in range(8):
        born = MARCH + chance.randrange(60 * 24) * HOUR + timedelta(microseconds=number)
        steps = [Step(at=born, action="create", flavor=SMALL)]
        moment = born
        for action in chance.sample(("resize", "stop", "rebuild"), chance.randrange(4)):
            moment += chance.randrange(1, 30 * 24) * HOUR
            flavor = chance.choice((MEDIUM, LARGE)) if action == "resize" else None
            steps.append(Step(at=moment, action=action, flavor=flavor))  # type: ignore[arg-type]
        if chance.random() < 0.7:
            steps.append(Step(at=moment + chance.randrange(1, 900) * HOUR, action="delete"))
        life = instance(number, *steps, project=f"p{number % 3}")
        audits_until = born + 30 * HOUR if number < 3 else None
        messages += with_bandwidth(life.messages(audits_until=audits_until))
    for number in range(3):
        born = MARCH + chance.randrange(60 * 24) * HOUR
        volume = VolumeLife(
            volume_id=f"00000000-0000-4000-9000-{number:012}",
            project_id=f"p{number}",
            steps=(
                VolumeStep(at=born, action="create", size_gb=10),
                VolumeStep(at=born + 200 * HOUR, action="extend", size_gb=30),
                VolumeStep(at=born + 500 * HOUR, action="transfer", project_id="p9"),
                VolumeStep(at=born + 900 * HOUR, action="delete"),
            ),
        )
        messages += volume.messages()
    return messages


@pytest.mark.parametrize("seed", range(6))
async def test_frozen_lines_and_adjustments_are_what_usage_says_whatever_comes_late(
    ledger: Months, seed: int
) -> None:
    chance = random.Random(seed)
    messages = world(chance)
    # mostly in order, some far too late, a tenth never
    messages.sort(
        key=lambda item: item.timestamp + (chance.random() < 0.2) * chance.randrange(90) * DAYS
    )
    messages = [item for item in messages if chance.random() < 0.9]
    ends = [("2026-03", at(4, 2)), ("2026-04", at(5, 2)), ("2026-05", at(6, 2))]
    closed: list[str] = []
    for first in range(0, len(messages), 25):
        some = messages[first : first + 25]
        await ledger.store.ingest([event(message.body()) for message in some])
        if chance.random() < 0.7:
            await ledger.fold()
        share = first / len(messages)
        if ends and share > (0.3, 0.5, 0.7)[len(closed)]:
            name, now = ends.pop(0)
            await ledger.make(now)
            await ledger.close(name, now)
            closed.append(name)
        if closed and chance.random() < 0.5:
            await ledger.assert_adds_up(chance.choice(closed))
    await ledger.fold()
    assert closed == ["2026-03", "2026-04", "2026-05"]
    corrections = [await ledger.adjustments(name) for name in closed]
    for name in closed:
        before = await ledger.frozen(name)
        await ledger.assert_adds_up(name)
        assert await ledger.frozen(name) == before
        corrections.append(await ledger.adjustments(name))
    assert any(corrections)  # or the test has seen nothing


async def test_a_period_is_what_usage_says_of_its_month(ledger: Months) -> None:
    life = instance(
        1,
        Step(at=at(3, 30), action="create", flavor=SMALL),
        Step(at=at(4, 10), action="resize", flavor=LARGE),
        Step(at=at(4, 20), action="stop"),
    )
    await ledger.told(life.messages())
    assert await ledger.make(at(5, 1)) == ["2026-03", "2026-04", "2026-05"]
    await ledger.close("2026-04", at(5, 1))
    assert await ledger.frozen("2026-04") == await ledger.said_now("2026-04")
    hours = {
        (line.state_class, line.kind): amount // 3_600_000_000
        for line, amount in (await ledger.frozen("2026-04")).items()
        if line.measure == "instance_hours"
    }
    assert hours == {
        ("running", "m1.small"): 9 * 24,
        ("running", "m1.large"): 10 * 24,
        ("stopped", "m1.large"): 11 * 24,
    }


async def test_a_delete_that_comes_late_is_an_adjustment_that_names_its_message(
    ledger: Months,
) -> None:
    life = instance(
        1,
        Step(at=at(3, 30), action="create", flavor=SMALL),
        Step(at=at(4, 20), action="delete"),
    )
    messages = life.messages()
    (legacy,) = [item for item in messages if item.event_type == "compute.instance.delete.end"]
    await ledger.told([item for item in messages if item.timestamp < at(4, 1)])
    await ledger.make(at(5, 2))
    await ledger.close("2026-04", at(5, 2))
    await ledger.told([legacy])
    assert await ledger.periods.unwritten("2026-04", scope=None) == 1
    await ledger.periods.adjust()
    assert await ledger.periods.unwritten("2026-04", scope=None) == 0
    rows = {row["measure"]: row for row in await ledger.adjustments("2026-04")}
    assert rows.keys() == {"instance_hours", "vcpu_hours", "ram_mb_hours", "local_gb_hours"}
    row = rows["instance_hours"]
    assert row["delta"] == -11 * 24 * 3_600_000_000
    assert (row["charged_to"], row["resource_id"]) == ("2026-05", life.instance_id)
    assert [item["message_id"] for item in row["evidence"]] == [legacy.message_id]
    await ledger.told(messages)  # which says the same again
    await ledger.periods.adjust()
    assert len(await ledger.adjustments("2026-04")) == len(rows)
    assert await ledger.adjustments("2026-05", charged=True) == await ledger.adjustments("2026-04")


BOOK: dict[str, Any] = {
    "currency": "EUR",
    "prices": [
        {"name": "small", "measure": "instance_hours", "match": {"flavor": "m1.small"}, "price": 2}
    ],
    "discounts": [{"name": "half", "percent": 50, "match": {"project": "p1"}}],
}


WAITING = (
    "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)


async def late_delete(ledger: Months) -> None:
    """April is closed, and a delete in it that is told late is noted."""
    steps = (
        Step(at=at(3, 30), action="create", flavor=SMALL),
        Step(at=at(4, 20), action="delete"),
    )
    messages = instance(1, *steps).messages()
    await ledger.told([item for item in messages if item.timestamp < at(4, 1)])
    await ledger.make(at(5, 2))
    await ledger.close("2026-04", at(5, 2))
    await ledger.told(messages)


async def wait_until_so_many_wait(ledger: Months, count: int) -> None:
    async def holds() -> bool:
        return int(await ledger.pool.fetchval(WAITING)) >= count

    await eventually(holds)


async def test_an_adjustment_is_of_when_it_was_written_not_of_when_it_began_to_wait(
    ledger: Months,
) -> None:
    await late_delete(ledger)
    async with asyncio.TaskGroup() as tasks, db.transaction(ledger.pool) as other:
        writers = "hashtext('hostler_usage.period.writer')"
        await other.execute(f"SELECT pg_advisory_xact_lock({writers})")
        tasks.create_task(ledger.periods.adjust())
        await wait_until_so_many_wait(ledger, 1)
        waited = await ledger.pool.fetchval("SELECT clock_timestamp()")
    rows = await ledger.adjustments("2026-04")
    assert rows
    assert all(row["written_at"] > waited for row in rows)


async def test_a_file_with_corrections_waits_for_those_that_are_just_written(
    ledger: Months, serve_part: ServePart
) -> None:
    await late_delete(ledger)
    await ledger.pool.execute(
        "CREATE FUNCTION linger() RETURNS trigger LANGUAGE plpgsql"
        " AS 'BEGIN PERFORM pg_advisory_xact_lock_shared(1); RETURN NULL; END';"
        "CREATE CONSTRAINT TRIGGER linger AFTER INSERT ON period_adjustment"
        " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION linger()"
    )
    costing = Costing(reports=ledger.reports, prices=PriceStore(pool=ledger.pool))
    exports = Exports(store=ExportStore(reports=ledger.reports), books=costing)
    asked = {
        "start": (datetime.now(UTC) - DAYS).replace(microsecond=0).isoformat(),
        "end": (datetime.now(UTC) + DAYS).replace(microsecond=0).isoformat(),
        "corrections": "true",
    }
    async with (
        serve_part([exports_api.router], {"exports": exports}, all=("reader", "*")) as (
            _,
            clients,
        ),
        asyncio.TaskGroup() as tasks,
    ):
        async with db.transaction(ledger.pool) as other:
            await other.execute("SELECT pg_advisory_xact_lock(1)")
            writing = tasks.create_task(ledger.periods.adjust())
            await wait_until_so_many_wait(ledger, 1)  # it is written, and not committed
            file = tasks.create_task(clients["all"].get("/v1/exports/focus.csv", **asked))

            async def waits_or_is_made() -> bool:
                return file.done() or int(await ledger.pool.fetchval(WAITING)) >= 2

            await eventually(waits_or_is_made)
        found = list(csv.DictReader((await file).splitlines()))
        _, written = await writing
        assert len(found) == written > 0


async def test_adjustments_are_corrections_in_the_focus_file_of_when_they_were_written(
    ledger: Months, serve_part: ServePart
) -> None:
    lives = [
        instance(
            number,
            Step(at=at(3, 30), action="create", flavor=SMALL),
            Step(at=at(4, 20), action="delete"),
            project=project,
        )
        for number, project in ((1, "p1"), (2, "p2"))
    ]
    messages = [item for life in lives for item in life.messages()]
    await ledger.told([item for item in messages if item.timestamp < at(4, 1)])
    await ledger.make(at(5, 2))
    await ledger.close("2026-04", at(5, 2))
    before = datetime.now(UTC)
    await ledger.told(messages)
    await ledger.periods.adjust()
    costing = Costing(reports=ledger.reports, prices=PriceStore(pool=ledger.pool))
    exports = Exports(store=ExportStore(reports=ledger.reports), books=costing)
    tiers = {"steps": [{"up_to": 5, "price": 1}, {"price": 2}]}
    hours = {"name": "hours", "measure": "instance_hours"}
    unfit = {
        "tiered": [{**hours, "tiers": tiers}],
        "changing": [{**hours, "price": 1, "until": "2026-04-10"}],
        "zoned": [{**hours, "price": 1, "match": {"zone": "nova"}}],
    }
    for name, prices in {"flat": BOOK["prices"], **unfit}.items():
        book = {**BOOK, "discounts": BOOK["discounts"] if name == "flat" else [], "prices": prices}
        await costing.prices.put_book(name, book, by="test", replaces=None)
    now = {
        "start": before.replace(microsecond=0).isoformat(),
        "end": (before + 2 * DAYS).replace(microsecond=0).isoformat(),
    }

    async with serve_part(
        [exports_api.router], {"exports": exports}, all=("reader", "*"), one=("reader", "p1")
    ) as (_, clients):

        async def rows(caller: str = "all", **asked: Any) -> list[dict[str, str]]:
            text = await clients[caller].get("/v1/exports/focus.csv", **{**now, **asked})
            return list(csv.DictReader(text.splitlines()))

        assert await rows() == []  # nothing is left of them by now
        found = {
            (row["ResourceId"], row["SkuMeter"]): row for row in await rows(corrections="true")
        }
        adjusted = await ledger.adjustments("2026-04")
        assert {(row["resource_id"], row["measure"]) for row in adjusted} == found.keys()
        row = found[lives[0].instance_id, "instance_hours"]
        assert (row["ChargeClass"], row["ConsumedQuantity"]) == ("Correction", "-264.0")
        assert (row["ChargePeriodStart"], row["ChargePeriodEnd"]) == (
            "2026-04-01T00:00:00Z",
            "2026-05-01T00:00:00Z",
        )
        assert row["BillingPeriodStart"] == "2026-05-01T00:00:00Z"
        assert (row["SubAccountId"], row["SkuId"]) == ("p1", "instance_hours/m1.small")
        costs = {
            (row["SubAccountId"], row["SkuMeter"]): (row["BilledCost"], row["ListCost"])
            for row in await rows(corrections="true", price_book="flat")
        }
        assert costs["p1", "instance_hours"] == ("-264.0", "-528.0")
        assert costs["p2", "instance_hours"] == ("-528.0", "-528.0")
        assert costs["p1", "vcpu_hours"] == ("0.0", "0.0")
        # what was written before the window is in an earlier file, and what is another's in no file of one's own
        early = {"start": "2026-05-01T00:00:00Z", "end": now["start"]}
        assert await rows(corrections="true", **early) == []
        own = await rows("one", corrections="true")
        assert {row["SubAccountId"] for row in own} == {"p1"}
        for name in unfit:
            with pytest.raises(errors.Invalid) as caught:
                await rows(corrections="true", price_book=name)
            assert caught.value.code == "usage.focus.corrections_unpriced"
            assert await rows(price_book=name) == []


async def test_an_adjustment_that_undoes_another_is_a_row_of_its_own(ledger: Months) -> None:
    life = instance(
        1,
        Step(at=at(3, 30), action="create", flavor=SMALL),
        Step(at=at(4, 10), action="stop"),
        Step(at=at(4, 10, 1), action="start"),
    )
    messages = life.messages()
    create = [item for item in messages if item.timestamp < at(4, 1)]
    stop = [item for item in messages if at(4, 1) < item.timestamp < at(4, 10, 0) + HOUR / 2]
    start = [item for item in messages if item.timestamp > at(4, 10) + HOUR / 2]
    await ledger.told(create)
    await ledger.make(at(5, 2))
    await ledger.close("2026-04", at(5, 2))
    seen: list[Counter[tuple[str, int]]] = []
    for news in (stop, start):
        await ledger.told(news)
        await ledger.periods.adjust()
        seen.append(
            Counter(
                (row["state_class"], int(row["delta"]) // 3_600_000_000)
                for row in await ledger.adjustments("2026-04")
                if row["measure"] == "instance_hours"
            )
        )
    left = 21 * 24
    assert seen[0] == {("running", -left): 1, ("stopped", left): 1}
    assert seen[1] == seen[0] + Counter({("running", left - 1): 1, ("stopped", 1 - left): 1})
    await ledger.assert_adds_up("2026-04")


async def test_changes_that_cancel_out_before_they_are_written_leave_no_row(
    ledger: Months,
) -> None:
    life = instance(
        1,
        Step(at=at(4, 3), action="create", flavor=SMALL),
        Step(at=at(4, 20), action="delete"),
    )
    gone = life.messages()
    await ledger.told([item for item in gone if item.timestamp < at(4, 4)])
    await ledger.make(at(5, 2))
    await ledger.close("2026-04", at(5, 2))
    await ledger.told(gone)
    async with db.transaction(ledger.pool) as connection:  # as if it had been taken back
        await connection.execute(
            "INSERT INTO period_change (period, region, resource_type, resource_id, changes,"
            " evidence) SELECT period, region, resource_type, resource_id, (SELECT jsonb_agg("
            "  jsonb_set(c, '{4}', to_jsonb((-(c->>4)::numeric)::text))) FROM"
            "  jsonb_array_elements(changes) AS c), evidence FROM period_change"
        )
    changes, written = await ledger.periods.adjust()
    assert changes >= 2
    assert written == 0
    assert await ledger.adjustments("2026-04") == []


async def test_what_is_younger_than_every_closed_period_is_not_noted(ledger: Months) -> None:
    life = instance(
        1,
        Step(at=at(4, 3), action="create", flavor=SMALL),
        Step(at=at(5, 20), action="stop"),
        Step(at=at(5, 25), action="delete"),
    )
    messages = life.messages()
    await ledger.told([item for item in messages if item.timestamp < at(5, 1)])
    await ledger.make(at(5, 2))
    await ledger.close("2026-04", at(5, 2))
    await ledger.told(messages)
    assert await ledger.periods.adjust() == (0, 0)


async def test_what_is_closed_cannot_be_edited(ledger: Months) -> None:
    life = instance(1, Step(at=at(4, 3), action="create", flavor=SMALL))
    await ledger.told(life.messages()[:-2])
    await ledger.make(at(5, 2))
    await ledger.close("2026-04", at(5, 2))
    for statement in (
        "UPDATE period_line SET amount = 0",
        "DELETE FROM period_line",
        "TRUNCATE period_line",
        "UPDATE period_adjustment SET delta = 1",
        "DELETE FROM period_adjustment",
        "UPDATE period SET closed_at = NULL WHERE closed_at IS NOT NULL",
        "DELETE FROM period WHERE closed_at IS NOT NULL",
    ):
        async with db.connection(ledger.pool) as connection:
            with pytest.raises(asyncpg.IntegrityConstraintViolationError, match="never edited"):
                await connection.execute(statement)
    with pytest.raises(PeriodClosed):
        await ledger.close("2026-04", at(5, 3))


async def test_a_period_closes_by_itself_once_it_has_settled_and_nothing_is_behind(
    ledger: Months,
) -> None:
    jobs = PeriodJobs(store=replace(ledger.periods, fold_patience=timedelta(0)))
    life = instance(1, Step(at=at(4, 3), action="create", flavor=SMALL))
    await ledger.told(life.messages())
    await ledger.make(at(4, 4))
    await jobs.turn_at(at(5, 3, 23))

    async def states(now: datetime) -> dict[str, str]:
        found, _ = await ledger.periods.periods(limit=10)
        return {item.period.name: str(item.period.state(now)) for item in found}

    assert await states(at(5, 3, 23)) == {"2026-05": "open", "2026-04": "settling"}
    late = instance(2, Step(at=at(4, 5), action="create", flavor=SMALL)).messages()
    await ledger.store.ingest([event(message.body()) for message in late])  # and not folded
    await jobs.turn_at(at(5, 4, 1))
    assert (await states(at(5, 4, 1)))["2026-04"] == "settling"
    april = (await ledger.periods.period("2026-04")).period
    blockers = await jobs.store.blockers(april, at(5, 4, 1))
    assert [str(item.obstacle) for item in blockers] == ["fold_behind"]
    await ledger.fold()
    async with db.connection(ledger.pool) as connection:
        await connection.execute(
            "INSERT INTO audit_period (region, resource_type, period_start, period_end,"
            " is_expected, first_seen) VALUES ('r1', 'instance', $1, $2, false, $2)",
            at(4, 30, 23),
            at(5, 1),
        )
    await jobs.turn_at(at(5, 4, 1))
    blockers = await jobs.store.blockers(april, at(5, 4, 1))
    assert [str(item.obstacle) for item in blockers] == ["audits_unsettled"]
    async with db.connection(ledger.pool) as connection:
        await connection.execute("UPDATE audit_period SET checked_at = now()")
    await jobs.turn_at(at(5, 4, 1))
    assert await states(at(5, 4, 1)) == {"2026-05": "open", "2026-04": "closed"}
    assert (await ledger.periods.period("2026-04")).closed_by is None
    assert await ledger.frozen("2026-04") == await ledger.said_now("2026-04")


async def test_what_keeps_a_period_open_is_logged_when_it_changes_and_not_every_minute(
    ledger: Months, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[str, Any]] = []

    class Log:
        def info(self, event: str, **fields: Any) -> None:
            said.append((event, fields.get("period")))

        def warning(self, event: str, **fields: Any) -> None:
            said.append((event, fields["blockers"]))

    monkeypatch.setattr("hostler_usage.periods.period_jobs.log", Log())
    jobs = PeriodJobs(store=replace(ledger.periods, fold_patience=timedelta(0)))
    await ledger.make(at(4, 4))
    await jobs.turn_at(at(5, 3, 23))
    said.clear()
    late = instance(2, Step(at=at(4, 5), action="create", flavor=SMALL)).messages()
    await ledger.store.ingest([event(message.body()) for message in late])  # and not folded
    for minute in range(3):
        await jobs.turn_at(at(5, 4, 1) + timedelta(minutes=minute))
    ((name, blockers),) = said
    assert name == "period_kept_open"
    assert "wait to be folded" in blockers[0]
    async with db.connection(ledger.pool) as connection:
        await connection.execute(
            "INSERT INTO rebuild (program, phase, hashes_before) VALUES ('other', 'messages', '{}')"
        )
    await jobs.turn_at(at(5, 4, 2))
    assert [name for name, _ in said] == ["period_kept_open"] * 2
    async with db.connection(ledger.pool) as connection:
        await connection.execute("DELETE FROM rebuild")
    await ledger.fold()
    await jobs.turn_at(at(5, 4, 3))
    assert said[2:] == [("period_closed", "2026-04")]


async def test_no_period_closes_while_it_runs_and_one_behind_closes_by_overruling_alone(
    ledger: Months,
) -> None:
    await ledger.make(at(4, 4))
    with pytest.raises(PeriodBlocked, match="it runs until"):
        await ledger.close("2026-04", at(4, 30, 23))
    async with db.connection(ledger.pool) as connection:
        await connection.execute(
            "INSERT INTO rebuild (program, phase, hashes_before)"
            " VALUES ('another', 'messages', '{}')"
        )
    with pytest.raises(PeriodBlocked, match="made anew"):
        await ledger.close("2026-04", at(5, 1), overrule=False)
    await ledger.close("2026-04", at(5, 1))
    stored = await ledger.periods.period("2026-04")
    assert stored.closed_by == "test"
    assert stored.overruled == ["everything is being made anew"]


async def test_months_are_those_of_the_time_zone_and_never_overlap_when_it_changes(
    ledger: Months,
) -> None:
    await ledger.make(at(3, 20))
    there = replace(ledger.periods, time_zone="America/New_York")
    await there.make(at(5, 20))
    found, _ = await there.periods(limit=10)
    spans = {item.period.name: (item.period.start, item.period.end) for item in found}
    assert spans == {
        "2026-03": (at(3, 1), at(4, 1)),
        "2026-04": (at(4, 1), at(5, 1, 4)),
        "2026-05": (at(5, 1, 4), at(6, 1, 4)),
    }


async def test_replicas_at_once_close_once_and_write_each_change_once(ledger: Months) -> None:
    lives = [
        instance(
            number,
            Step(at=at(4, 3), action="create", flavor=SMALL),
            Step(at=at(4, 20), action="delete"),
        )
        for number in range(20)
    ]
    await ledger.told(
        [item for life in lives for item in life.messages() if item.timestamp < at(4, 4)]
    )
    await ledger.make(at(5, 2))
    jobs = [PeriodJobs(store=replace(ledger.periods, settle=timedelta(0))) for _ in range(4)]
    await asyncio.gather(*(job.turn_at(at(5, 2)) for job in jobs))
    before = await ledger.frozen("2026-04")
    assert before
    await asyncio.gather(
        *(ledger.told(life.messages()) for life in lives[:10]),
        ledger.told([item for life in lives[10:] for item in life.messages()]),
        *(job.turn_at(at(5, 3)) for job in jobs * 3),
    )
    assert await ledger.frozen("2026-04") == before
    await ledger.assert_adds_up("2026-04")
    hours = [
        row["resource_id"]
        for row in await ledger.adjustments("2026-04")
        if row["measure"] == "instance_hours"
    ]
    assert sorted(hours) == [life.instance_id for life in lives]


async def waits_for_a_lock(pool: db.Pool, task: "asyncio.Task[None]") -> None:
    """Return once somebody waits for an advisory lock, or the task is done without."""

    async def holds() -> bool:
        async with db.connection(pool) as connection:
            statement = (
                "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND locktype = 'advisory')"
            )
            return bool(await connection.fetchval(statement)) or task.done()

    await eventually(holds)


async def told_and_not_folded(ledger: Months) -> list[ResourceKey]:
    life = instance(1, Step(at=at(4, 3), action="create", flavor=SMALL))
    for now in (at(4, 4), at(5, 2)):
        await ledger.make(now)
    events = [event(item.body()) for item in life.messages()]
    await ledger.store.ingest(events)
    return sorted({said.resource for one in events for said in one.normalised.said})


async def test_a_closing_waits_for_the_fold_that_runs_and_freezes_what_it_did(
    ledger: Months,
) -> None:
    keys = await told_and_not_folded(ledger)
    async with db.transaction(ledger.pool) as connection:
        await ledger.folds.reckon(connection, keys)
        closing = asyncio.create_task(ledger.close("2026-04", at(5, 2)))
        await waits_for_a_lock(ledger.pool, closing)
    await closing
    assert await ledger.frozen("2026-04") == await ledger.said_now("2026-04") != Counter()


async def test_a_fold_waits_for_the_closing_that_runs_and_notes_what_it_does(
    ledger: Months,
) -> None:
    await told_and_not_folded(ledger)
    async with db.transaction(ledger.pool) as connection:
        now = at(5, 2)
        await ledger.periods.close(connection, "2026-04", now, by="test", overrule=True)
        folding = asyncio.create_task(ledger.fold())
        await waits_for_a_lock(ledger.pool, folding)
    await folding
    assert await ledger.frozen("2026-04") == Counter()
    await ledger.assert_adds_up("2026-04")
    assert await ledger.adjustments("2026-04")


DIES = """
import asyncio, os, signal, sys
from datetime import UTC, datetime, timedelta
from hostler_common import db
from hostler_usage.periods import period_store
from hostler_usage.exporting import exports_api
from hostler_usage.exporting.export_store import ExportStore
from hostler_usage.exporting.exports import Exports
from hostler_usage.history.ledger_testing import Ledger, event, instance, with_bandwidth
from hostler_usage.reading.mapping_file import packaged

url, where = sys.argv[1:]
wrapped = getattr(period_store, where)

async def dies(*arguments):
    await wrapped(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)

setattr(period_store, where, dies)

async def main():
    async with db.open_pool(url, schema="usage") as pool:
        store = period_store.PeriodStore(
            pool=pool, mapping=packaged(), time_zone="UTC", settle=timedelta(0), kinds={}
        )
        await store.adjust()
        await store.close_due(datetime(2026, 5, 2, tzinfo=UTC))

asyncio.run(main())
"""


@pytest.mark.parametrize("where", ["_freeze", "_write"])
async def test_a_process_that_is_killed_leaves_all_or_nothing_and_the_next_turn_does_the_rest(
    ledger: Months, database_url: str, where: str
) -> None:
    life = instance(
        1, Step(at=at(4, 3), action="create", flavor=SMALL), Step(at=at(4, 9), action="delete")
    )
    await ledger.told([item for item in life.messages() if item.timestamp < at(4, 4)])
    await ledger.make(at(5, 2))
    if where == "_write":
        await ledger.close("2026-04", at(5, 2))
        await ledger.told(life.messages())
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", DIES, database_url, where, stdout=asyncio.subprocess.DEVNULL
    )
    assert await process.wait() == -signal.SIGKILL
    stored = await ledger.periods.period("2026-04")
    assert (stored.manifest is None) == (where == "_freeze")
    assert await ledger.adjustments("2026-04") == []
    jobs = PeriodJobs(store=replace(ledger.periods, settle=timedelta(0)))
    await jobs.turn_at(at(5, 2))
    assert bool(await ledger.adjustments("2026-04")) == (where == "_write")
    await ledger.told(life.messages())
    await ledger.assert_adds_up("2026-04")
    again = await ledger.adjustments("2026-04")
    assert len({(row["resource_id"], row["measure"]) for row in again}) == len(again) == 4


async def test_a_measure_that_is_added_later_is_not_in_a_closed_period(ledger: Months) -> None:
    """Adjustments are by the measures of the closing."""
    life = instance(
        1, Step(at=at(4, 3), action="create", flavor=SMALL), Step(at=at(4, 9), action="delete")
    )
    few = replace(
        packaged(), measures=tuple(m for m in packaged().measures if m.name == "vcpu_hours")
    )
    await ledger.told([item for item in life.messages() if item.timestamp < at(4, 4)])
    await ledger.make(at(5, 2))
    ledger.periods = replace(ledger.periods, mapping=few)
    await ledger.close("2026-04", at(5, 2))
    assert {line.measure for line in await ledger.frozen("2026-04")} == {"vcpu_hours"}
    await ledger.told(life.messages())
    await ledger.periods.adjust()
    assert {row["measure"] for row in await ledger.adjustments("2026-04")} == {"vcpu_hours"}


# --- HTTP and commands

Clients = dict[str, client.Api]
Opened = Callable[[], AbstractAsyncContextManager[tuple[str, Clients]]]


@pytest.fixture
def opened(ledger: Months, serve_part: ServePart) -> Opened:
    """The API's address and clients of it, by what their token may do and see."""

    def run() -> AbstractAsyncContextManager[tuple[str, Clients]]:
        return serve_part(
            [periods_api.router],
            {"periods": ledger.periods},
            **{
                "admin": ("admin", "*"),
                "reader": ("reader", "*"),
                "p1": ("reader", "p1"),
                "admin-p1": ("admin", "p1"),
            },
        )

    return run


async def two_projects(ledger: Months) -> None:
    """April of two projects is there to be closed, and one's delete is not told yet."""
    for number, project in enumerate(("p1", "p2")):
        life = instance(
            number,
            Step(at=at(4, 3), action="create", flavor=SMALL),
            Step(at=at(4, 20), action="delete"),
            project=project,
        )
        await ledger.told([item for item in life.messages() if item.timestamp < at(4, 4)])
    await ledger.make(at(5, 2))


async def late_deletes(ledger: Months) -> None:
    for number, project in enumerate(("p1", "p2")):
        life = instance(
            number,
            Step(at=at(4, 3), action="create", flavor=SMALL),
            Step(at=at(4, 19), action="delete"),
            project=project,
        )
        await ledger.told(life.messages()[-2:])
    await ledger.periods.adjust()


async def test_the_hash_of_the_lines_is_the_manifests(ledger: Months, opened: Opened) -> None:
    await two_projects(ledger)
    async with opened() as (_, apis):
        closed = await apis["admin"].post("/v1/periods/2026-04/close")
        body = await apis["reader"].get("/v1/periods/2026-04/lines")
        manifest = closed["manifest"]
        assert hashlib.sha256(body.encode()).hexdigest() == manifest["sha256"]
        rows = [json.loads(line) for line in body.splitlines()]
        assert len(rows) == manifest["lines"] == 8
        totals: Counter[str] = Counter()
        for row in rows:
            totals[row["measure"]] += row["amount"]
        assert totals == manifest["totals"]
        assert rows[0] == {
            "period": "2026-04",
            "start": "2026-04-01T00:00:00Z",
            "end": "2026-05-01T00:00:00Z",
            "region": "r1",
            "project_id": "p1",
            "resource_type": "instance",
            "state_class": "running",
            "kind": "m1.small",
            "measure": "instance_hours",
            "amount": rows[0]["amount"],
        }
        assert closed["closed_by"] == "admin"
        assert (await apis["reader"].get("/v1/periods/2026-04"))["manifest"] == manifest


async def test_closing_twice_with_one_key_answers_alike_and_without_is_a_conflict(
    ledger: Months, opened: Opened
) -> None:
    await two_projects(ledger)
    async with opened() as (_, apis):
        path = "/v1/periods/2026-04/close"
        answers = await asyncio.gather(
            *(apis["admin"].post(path, idempotency_key="k") for _ in range(3))
        )
        assert answers[0] == answers[1] == answers[2]
        with pytest.raises(errors.Conflict) as refused:
            await apis["admin"].post(path)
        assert refused.value.code == "usage.period.closed"
        with pytest.raises(errors.Conflict) as refused:
            await apis["admin"].post(path, {"overrule": True}, idempotency_key="k")
        assert refused.value.code == "request.idempotency_key_reused"


async def test_only_admins_of_every_project_close_a_period(ledger: Months, opened: Opened) -> None:
    await two_projects(ledger)
    async with opened() as (_, apis):
        for name in ("reader", "p1", "admin-p1"):
            with pytest.raises(errors.Forbidden):
                await apis[name].post("/v1/periods/2026-04/close")
        assert (await apis["reader"].get("/v1/periods/2026-04"))["manifest"] is None


async def test_a_project_sees_its_own_lines_and_adjustments_and_no_others_totals(
    ledger: Months, opened: Opened
) -> None:
    await two_projects(ledger)
    async with opened() as (_, apis):
        await apis["admin"].post("/v1/periods/2026-04/close")
        await late_deletes(ledger)
        body = await apis["p1"].get("/v1/periods/2026-04/lines")
        assert {json.loads(line)["project_id"] for line in body.splitlines()} == {"p1"}
        for of in ("corrected", "charged"):
            name = "2026-04" if of == "corrected" else "2026-05"
            path = f"/v1/periods/{name}/adjustments"
            every = (await apis["reader"].get(path, of=of))["adjustments"]
            own = (await apis["p1"].get(path, of=of))["adjustments"]
            assert {item["project_id"] for item in every} == {"p1", "p2"}
            assert own == [item for item in every if item["project_id"] == "p1"]
        shown = await apis["p1"].get("/v1/periods/2026-04")
        whole = (await apis["reader"].get("/v1/periods/2026-04"))["manifest"]
        assert shown["manifest"] == {"sha256": whole["sha256"], "lines": None, "totals": None}
        assert "p2" not in json.dumps(shown)


async def test_adjustments_and_periods_are_paged_without_loss(
    ledger: Months, opened: Opened
) -> None:
    await two_projects(ledger)
    async with opened() as (_, apis):
        await apis["admin"].post("/v1/periods/2026-04/close")
        await late_deletes(ledger)
        for path, name in (
            ("/v1/periods/2026-04/adjustments", "adjustments"),
            ("/v1/periods", "periods"),
        ):
            whole = (await apis["reader"].get(path, limit=1000))[name]
            pages: list[Any] = []
            marker = None
            while True:
                answer = await apis["reader"].get(path, limit=1, marker=marker)
                pages += answer[name]
                marker = answer["next_marker"]
                if marker is None:
                    break
            assert pages == whole
            assert len(whole) > 1


async def test_bad_requests_are_refused_with_a_code(ledger: Months, opened: Opened) -> None:
    await two_projects(ledger)
    async with opened() as (_, apis):
        reader = apis["reader"]
        for path, params, code in (
            ("/v1/periods/2026-99", {}, "usage.period.not_found"),
            ("/v1/periods/x%2Fy/lines", {}, None),
            ("/v1/periods/nothing/adjustments", {}, "usage.period.not_found"),
            ("/v1/periods/2026-04/lines", {}, "usage.period.not_closed"),
            ("/v1/periods/2026-04/adjustments", {"marker": "%%"}, "usage.marker.invalid"),
            ("/v1/periods/2026-04/adjustments", {"of": "x"}, None),
            ("/v1/periods", {"marker": "WzFd"}, "usage.marker.invalid"),
        ):
            with pytest.raises(errors.HostlerError) as refused:
                await reader.get(path, **params)
            assert refused.value.status in (404, 409, 422)
            if code is not None:
                assert refused.value.code == code
        now = datetime.now(UTC)
        await ledger.make(now)
        with pytest.raises(errors.Conflict) as conflict:
            await apis["admin"].post(f"/v1/periods/{now:%Y-%m}/close", {"overrule": True})
        assert conflict.value.code == "usage.period.blocked"
        assert conflict.value.fields["blockers"] == ["running"]


async def test_verify_recomputes_the_manifest_and_finds_a_line_that_was_changed(
    ledger: Months, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    await two_projects(ledger)
    commands = typer.Typer()
    periods_cli.register(commands)
    async with opened() as (address, apis):
        monkeypatch.setenv("HOSTLER_URL", address)
        monkeypatch.setenv("HOSTLER_TOKEN_FILE", "")
        token = apis["admin"]._http.headers["authorization"].removeprefix("Bearer ")
        monkeypatch.setenv("HOSTLER_TOKEN", token)

        async def run(*arguments: str) -> tuple[int, str]:
            result = await asyncio.to_thread(CliRunner().invoke, commands, ["periods", *arguments])
            return result.exit_code, result.output

        assert (await run("close", "2026-04", "--idempotency-key", "one"))[0] == 0
        code, said = await run("verify", "2026-04")
        assert (code, "8 lines hash to" in said) == (0, True), said
        await late_deletes(ledger)
        assert (await run("verify", "2026-04"))[0] == 0
        code, said = await run("adjustments", "2026-04", "--json")
        assert len(json.loads(said[said.index("[\n") :])) == 8  # the server logs to stdout, too
        assert "closed" in (await run("list"))[1]
        said = (await run("show", "2026-04"))[1]
        assert json.loads(said[said.index("{\n") :])["state"] == "closed"
        async with db.connection(ledger.pool) as connection:
            await connection.execute(
                "ALTER TABLE period_line DISABLE TRIGGER frozen;"
                " UPDATE period_line SET amount = amount + 1 WHERE ordinal = 3"
            )
        code, said = await run("verify", "2026-04")
        assert (code, "is not what was sealed" in said) == (1, True), said
