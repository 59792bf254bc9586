"""Verdicts on a real PostgreSQL: written with a fold, completed by the check, made anew when data come late."""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
import typer
from prometheus_client import CollectorRegistry
from typer.testing import CliRunner

from hostler_common import client, db, errors
from hostler_common.testing import eventually
from hostler_usage.auditing import audits_api, audits_cli
from hostler_usage.auditing.audit_check_store import AuditCheckStore
from hostler_usage.auditing.audit_jobs import AuditJobs
from hostler_usage.auditing.audit_report_store import AuditFilter, AuditReportStore
from hostler_usage.auditing.audit_store import mark_for_check, replace_verdicts
from hostler_usage.auditing.audits import AuditStatement, Status, Told
from hostler_usage.auditing.reconciliation import reconcile
from hostler_usage.history.intervals import Interval, Provenance
from hostler_usage.metrics import Metrics
from hostler_usage.profiling import operations_api
from hostler_usage.profiling.operation_store import OperationStore
from hostler_usage.reading.mapping_file import packaged
from hostler_usage.reading.statement import Evidence, ResourceKey, ResourceType, Scalar

DAY = datetime(2026, 5, 8, tzinfo=UTC)
LONG_AFTER = datetime(2099, 1, 1, tzinfo=UTC)  # every period has settled, and none is expected
HOUR, MINUTE = timedelta(hours=1), timedelta(minutes=1)
MICROSECONDS = 3_600_000_000
ServePart = Callable[..., AbstractAsyncContextManager[tuple[str, dict[str, client.Api]]]]
Opened = Callable[[], AbstractAsyncContextManager[dict[str, client.Api]]]


def witness(name: str, at: datetime = DAY) -> Evidence:
    return Evidence(event_time=at, message_id=name, digest=name.encode())


class Instance:
    """One instance, and the audits about it."""

    def __init__(
        self,
        name: str,
        *,
        project: str = "p1",
        host: str | None = "h1",
        born: datetime = DAY,
        ended: datetime | None = None,
        state: str = "active",
        resource_type: str = "instance",
    ) -> None:
        self.key = ResourceKey(
            region="r1", resource_type=ResourceType(resource_type), resource_id=name
        )
        self.born, self.ended = born, ended
        self.held: dict[str, Scalar] = {"project": project, "host": host, "state": state}
        self.audits: list[AuditStatement] = []

    @property
    def intervals(self) -> list[Interval]:
        return [
            Interval(
                start=self.born,
                end=self.ended,
                attributes=self.held,
                opened_by=(witness("create"),),
                closed_by=() if self.ended is None else (witness("delete"),),
                provenance=Provenance.EVENTS,
            )
        ]

    def audited(self, *hours: int, **changes: Scalar) -> "Instance":
        for hour in hours:
            end = DAY + (hour + 1) * HOUR
            is_gone = self.ended is not None and self.ended < end + MINUTE
            self.audits.append(
                AuditStatement(
                    evidence=witness(f"{self.key.resource_id}-{hour}", end + MINUTE),
                    said_at=end + MINUTE,
                    period_start=end - HOUR,
                    period_end=end,
                    born_at=self.born,
                    ended_at=self.ended if is_gone else None,
                    fields={**self.held, **({"state": "deleted"} if is_gone else {}), **changes},
                )
            )
        return self

    def reconciled(self) -> Any:
        return reconcile(
            packaged().resources[str(self.key.resource_type)],
            self.intervals,
            self.audits,
            launches=[Told(at=self.born, evidence=witness("create"))],
            deletions=[Told(at=self.ended, evidence=witness("delete"))] if self.ended else [],
        )


async def fold(pool: db.Pool, *instances: Instance) -> None:
    """As the service's fold: intervals and verdicts in one transaction."""
    async with db.transaction(pool) as connection:
        for item in instances:
            await connection.execute(
                "DELETE FROM usage_interval WHERE resource_id = $1", item.key.resource_id
            )
            await connection.execute(
                "INSERT INTO usage_interval (region, resource_type, resource_id, starts_at,"
                " ends_at, project_id, state_class, attributes, opened_by, closed_by, provenance)"
                " VALUES ('r1', $1, $2, $3, $4, $5, 'running', $6, '[]', '[]', 'events')",
                str(item.key.resource_type),
                item.key.resource_id,
                item.born,
                item.ended,
                item.held["project"],
                dict(item.held),
            )
        await replace_verdicts(connection, {item.key: item.reconciled() for item in instances})


async def check(pool: db.Pool, hours: float) -> None:
    """The check as of so many hours into the day; the periods were known by then."""
    async with db.connection(pool) as connection:
        await connection.execute("UPDATE audit_period SET first_seen = period_end")
    await jobs_of(pool).check_at(DAY + hours * HOUR)


def jobs_of(pool: db.Pool, registry: CollectorRegistry | None = None) -> AuditJobs:
    return AuditJobs(
        store=AuditCheckStore(pool=pool, mapping=packaged()),
        reports=AuditReportStore(pool=pool),
        metrics=Metrics(registry or CollectorRegistry()),
    )


async def verdicts(pool: db.Pool, **where: Any) -> list[tuple[str, str, str, int, int]]:
    """Resource, status, code, hour of the beginning, periods: oldest first."""
    rows, _ = await AuditReportStore(pool=pool).verdicts(AuditFilter(**where), limit=1000)
    return [
        (
            row["resource_id"] or row["host"],
            row["status"],
            row["code"],
            int((row["period_start"] - DAY) / HOUR),
            row["periods"],
        )
        for row in reversed(rows)
    ]


async def troubles(pool: db.Pool) -> list[tuple[str, str, str, int, int]]:
    return [row for row in await verdicts(pool) if row[1] != Status.VERIFIED]


async def test_verdicts_are_written_once_and_what_is_right_is_not_touched(pool: db.Pool) -> None:
    one = Instance("i1").audited(0, 1, 2)
    await fold(pool, one)
    statement = "SELECT ctid, * FROM audit_verdict"
    async with db.connection(pool) as connection:
        before = await connection.fetch(statement)
    assert await verdicts(pool) == [("i1", "verified", "agreed", 0, 3)]
    await fold(pool, one)
    async with db.connection(pool) as connection:
        assert await connection.fetch(statement) == before
    await fold(pool, one.audited(3))
    assert await verdicts(pool) == [("i1", "verified", "agreed", 0, 4)]


async def test_verdicts_that_no_longer_follow_are_gone(pool: db.Pool) -> None:
    one = Instance("i1").audited(0, 1)
    await fold(pool, one.audited(2, state="stopped"))
    assert await troubles(pool) == [("i1", "mismatch", "field_differs", 2, 1)]
    one.audits.pop()
    await fold(pool, one)
    assert await verdicts(pool) == [("i1", "verified", "agreed", 0, 2)]


async def test_a_period_without_a_statement_is_missing_once_it_has_settled(pool: db.Pool) -> None:
    await fold(pool, Instance("i1").audited(0, 1, 2), Instance("i2").audited(0, 2))
    await check(pool, 2.1)  # six minutes after the end of the period
    assert await troubles(pool) == []
    await check(pool, 2.5)
    assert await troubles(pool) == [("i2", "missing", "no_statement", 1, 1)]


@pytest.mark.parametrize("every", [HOUR, 24 * HOUR])
async def test_audits_that_name_no_period_and_run_daily_bear_out_the_days_they_are_said_to(
    pool: db.Pool, every: timedelta
) -> None:
    """Taken for hourly ones, the hours between them are named as not audited, once for all."""
    addresses = [Instance(name, resource_type="floating_ip", host=None) for name in ("f1", "f2")]
    for number, item in enumerate(addresses):
        for day in range(3):
            said_at = DAY + day * 24 * HOUR + 3 * HOUR + number * MINUTE
            item.audits.append(
                AuditStatement(
                    evidence=witness(f"{item.key.resource_id}-{day}", said_at),
                    said_at=said_at,
                    born_at=DAY,
                    fields=item.held,
                    every=every,
                )
            )
    await fold(pool, *addresses)
    await check(pool, 72.5)
    found = await verdicts(pool)
    if every == HOUR:
        assert {row for row in found if row[1] != "verified"} == {
            ("", "uncovered", "not_audited", hour, 1)
            for hour in range(4, 72)
            if hour not in (27, 51)
        }
        assert len([row for row in found if row[1] == "verified"]) == 2 * 3
    else:
        assert sorted(found) == [
            (name, "verified", "agreed", 24 * day, 1) for name in ("f1", "f2") for day in range(3)
        ]


async def test_a_statement_that_comes_late_takes_the_missing_back(pool: db.Pool) -> None:
    late = Instance("i2").audited(0, 2)
    await fold(pool, Instance("i1").audited(0, 1, 2), late)
    await check(pool, 4)
    assert ("i2", "missing", "no_statement", 1, 1) in await troubles(pool)
    await fold(pool, late.audited(1))
    await check(pool, 4)
    assert [row for row in await troubles(pool) if row[0] == "i2" and row[3] == 1] == []
    assert ("i2", "verified", "agreed", 0, 3) in await verdicts(pool)


async def test_a_delete_that_comes_late_takes_the_missing_back(pool: db.Pool) -> None:
    gone = Instance("i2").audited(0)
    await fold(pool, Instance("i1").audited(0, 1, 2, 3), gone)
    await check(pool, 4.5)
    assert await troubles(pool) == [("i2", "unconfirmed", "silent", 1, 3)]
    gone.ended = DAY + 50 * MINUTE
    gone.audits.clear()
    await fold(pool, gone.audited(0))
    await check(pool, 4.5)
    assert await troubles(pool) == []


async def test_an_instance_that_is_heard_of_late_owes_its_past(pool: db.Pool) -> None:
    await fold(pool, Instance("i1").audited(0, 1, 2))
    await check(pool, 3.5)
    assert await troubles(pool) == []
    await fold(pool, Instance("i2", born=DAY + HOUR))
    await check(pool, 3.5)
    assert await troubles(pool) == [("i2", "missing", "no_statement", 1, 2)]


async def test_one_that_speaks_again_was_not_silent_to_the_end(pool: db.Pool) -> None:
    quiet = Instance("i2").audited(0)
    await fold(pool, Instance("i1").audited(*range(5)), quiet)
    await check(pool, 5.5)
    assert await troubles(pool) == [("i2", "unconfirmed", "silent", 1, 4)]
    rows, _ = await AuditReportStore(pool=pool).verdicts(
        AuditFilter(status="unconfirmed"), limit=10
    )
    assert rows[0]["theirs"] == (DAY + HOUR + MINUTE).isoformat()
    await fold(pool, Instance("i1").audited(*range(6)), quiet.audited(5))
    await check(pool, 6.5)
    assert await troubles(pool) == [("i2", "missing", "no_statement", 1, 4)]


async def test_a_host_that_sends_nothing_is_named_once_a_period(pool: db.Pool) -> None:
    dark = [Instance(f"i{n}", host="dark") for n in range(20)]
    await fold(pool, Instance("lit").audited(0, 1), *dark)
    await check(pool, 2.5)
    assert await troubles(pool) == [
        ("dark", "uncovered", "not_audited", 0, 1),
        ("dark", "uncovered", "not_audited", 1, 1),
    ]
    # its audits come after all: what one of them lacks is then its own
    await fold(pool, *(item.audited(0, 1) for item in dark[1:]), dark[0].audited(0))
    await check(pool, 2.5)
    assert await troubles(pool) == [("i0", "missing", "no_statement", 1, 1)]


async def test_audits_that_stop_altogether_are_found_out(pool: db.Pool) -> None:
    await fold(pool, Instance("i1").audited(0, 1), Instance("i2").audited(0, 1))
    await check(pool, 4.5)
    assert await troubles(pool) == [
        ("h1", "uncovered", "not_audited", 2, 1),
        ("h1", "uncovered", "not_audited", 3, 1),
    ]


async def test_excused_periods_are_told_with_their_reason(pool: db.Pool) -> None:
    shelved = Instance("i2", host=None, state="shelved_offloaded")
    await fold(pool, Instance("i1").audited(0, 1), shelved)
    await check(pool, 2.5)
    assert await troubles(pool) == [("i2", "excused", "shelved_offloaded", 0, 2)]


async def test_types_that_are_not_audited_per_host_are_expected_as_a_whole(pool: db.Pool) -> None:
    volumes = [
        Instance(f"v{n}", resource_type="volume", host=f"ctl{n}@ceph#rbd") for n in range(3)
    ]
    await fold(pool, volumes[0].audited(0), volumes[1].audited(0), volumes[2])
    await check(pool, 1.5)
    assert await troubles(pool) == [("v2", "missing", "no_statement", 0, 1)]


async def test_a_resource_can_be_marked_to_be_looked_at_again(pool: db.Pool) -> None:
    one, two = Instance("i1").audited(0, 1), Instance("i2").audited(0, 1)
    await fold(pool, one, two)
    await check(pool, 2.5)
    async with db.transaction(pool) as connection:
        await connection.execute("DELETE FROM audit_verdict WHERE resource_id = 'i2'")
        await mark_for_check(connection, {two.key: DAY, one.key: DAY})
        await mark_for_check(connection, {two.key: DAY + HOUR})  # the earlier moment stands
    await check(pool, 2.5)
    assert await troubles(pool) == [("i2", "missing", "no_statement", 0, 2)]


async def test_checks_and_folds_at_once_end_as_one_after_the_other(pool: db.Pool) -> None:
    """Whoever comes first: what was missing for a moment and then said is not missing at the end."""
    instances = [Instance(f"i{n:02}", host=f"h{n % 3}") for n in range(12)]
    await fold(pool, *instances)
    done = asyncio.Event()
    jobs = jobs_of(pool)
    checks = 0

    async def keep_checking() -> None:
        nonlocal checks
        while not done.is_set():
            with contextlib.suppress(
                db.DatabaseBusy
            ):  # as the service's loop: the next turn goes on
                await jobs.check_at(LONG_AFTER)
                checks += 1

    async def speak(part: Sequence[Instance]) -> None:
        for hour in range(4):
            for item in part:
                if (hour, item) != (2, instances[4]):
                    item.audited(hour)
                await eventually(partial(folded, item))

    async def folded(item: Instance) -> bool:
        try:
            await fold(pool, item)
        except db.DatabaseBusy:  # as the service's loop
            return False
        return True

    async with asyncio.TaskGroup() as group:
        for _ in range(2):
            group.create_task(keep_checking())
        async with asyncio.TaskGroup() as speakers:
            for number in range(3):
                speakers.create_task(speak(instances[number::3]))
        done.set()
    assert checks
    await jobs.check_at(LONG_AFTER)
    assert await troubles(pool) == [("i04", "missing", "no_statement", 2, 1)]


async def test_who_speaks_while_a_period_waits_to_be_checked_again_was_not_silent(
    pool: db.Pool,
) -> None:
    jobs = jobs_of(pool)
    spoken, late = Instance("i00", host="h0"), Instance("i01", host="h0")
    elsewhere = Instance("i02", host="h1")
    spoken.audited(0)
    await fold(pool, spoken, late, elsewhere)
    await jobs.check_at(LONG_AFTER)
    assert ("i01", "missing", "no_statement", 0, 1) in await troubles(pool)
    elsewhere.audited(0)  # a host that is new to the period: it is to be checked again
    await fold(pool, elsewhere)
    late.audited(0)
    await fold(pool, late)
    await jobs.check_at(LONG_AFTER)
    assert await troubles(pool) == []


# --- the API


@pytest.fixture
def opened(pool: db.Pool, serve_part: ServePart) -> Opened:
    """Clients of the API by what their token may see: all, or one project."""

    @asynccontextmanager
    async def run() -> AsyncIterator[dict[str, client.Api]]:
        async with serve_part(
            [audits_api.router, operations_api.router],
            {
                "audit_reports": AuditReportStore(pool=pool),
                "operations": OperationStore(pool=pool),
            },
            all=("reader", "*"),
            p1=("reader", "p1"),
            agent=("agent", "*"),
        ) as (_, clients):
            yield clients

    return run


async def test_the_api_shows_ours_beside_theirs_with_the_messages(
    pool: db.Pool, opened: Opened
) -> None:
    await fold(pool, Instance("i1").audited(0).audited(1, state="stopped"))
    async with opened() as clients:
        answer = await clients["all"].get("/v1/audits", status="mismatch")
        (item,) = answer["audits"]
        assert answer["next_marker"] is None
        assert (item["code"], item["field"]) == ("field_differs", "state")
        assert (item["ours"], item["theirs"]) == ("active", "stopped")
        assert (item["period_start"], item["periods"]) == ("2026-05-08T01:00:00Z", 1)
        assert [cited["message_id"] for cited in item["evidence"]] == ["i1-1"]
        assert item["evidence"][0]["event_id"].endswith(b"i1-1".hex())


async def test_the_list_is_paged_without_loss_and_filtered(pool: db.Pool, opened: Opened) -> None:
    for number in range(7):
        one = Instance(f"i{number}", host=f"h{number % 2}")
        await fold(pool, one.audited(0).audited(1, state="stopped", host="elsewhere"))
    async with opened() as clients:
        pages: list[dict[str, Any]] = []
        marker = None
        while True:
            answer = await clients["all"].get("/v1/audits", limit=4, marker=marker)
            pages += answer["audits"]
            marker = answer["next_marker"]
            if marker is None:
                break
        assert len(pages) == 21
        assert len({json.dumps(item, sort_keys=True) for item in pages}) == 21
        starts = [item["period_start"] for item in pages]
        assert starts == sorted(starts, reverse=True)

        async def count(**filters: Any) -> int:
            return len((await clients["all"].get("/v1/audits", limit=1000, **filters))["audits"])

        assert await count(code="field_differs") == 14
        assert await count(status="verified") == 7
        assert await count(resource_id="i3") == 3
        assert await count(resource_type="volume") == 0
        assert await count(region="r2") == 0
        assert await count(project_id="p2") == 0
        assert await count(start="2026-05-08T01:00:00Z") == 14
        assert await count(end="2026-05-08T01:00:00Z") == 7


async def test_a_project_sees_its_own_verdicts_and_no_other_projects_name(
    pool: db.Pool, opened: Opened
) -> None:
    await fold(
        pool,
        Instance("i1").audited(0, project="p2"),
        Instance("i2", project="p2").audited(0),
        Instance("i3", host="dark"),
    )
    await check(pool, 1.5)
    async with opened() as clients:
        assert len((await clients["all"].get("/v1/audits"))["audits"]) == 3
        (own,) = (await clients["p1"].get("/v1/audits"))["audits"]
        assert (own["resource_id"], own["field"]) == ("i1", "project")
        assert (own["ours"], own["theirs"]) == ("p1", None)
        assert (await clients["p1"].get("/v1/audits", project_id="p2"))["audits"] == []
        report = await clients["p1"].get(
            "/v1/audits/report", start="2026-05-08T00:00:00Z", end="2026-05-08T01:00:00Z"
        )
        assert [row["group"] for row in report["report"]] == [{"project": "p1"}]
        with pytest.raises(errors.HostlerError, match="reader"):
            await clients["agent"].get("/v1/audits")


async def test_the_report_says_what_share_of_the_usage_no_audit_bears_out(
    pool: db.Pool, opened: Opened
) -> None:
    await fold(
        pool,
        Instance("i1").audited(0, 1, 3),  # hour 2 is missing
        Instance("i2").audited(0, 1, 2).audited(3, state="stopped"),  # hour 3 disagrees
        Instance("i3", project="p2", host=None, state="shelved_offloaded"),
        Instance("i4", project="p2", born=DAY + 30 * MINUTE).audited(0, 1, 2, 3),
    )
    await check(pool, 4.5)
    async with opened() as clients:
        window = {"start": "2026-05-08T00:00:00Z", "end": "2026-05-08T04:00:00Z"}
        answer = await clients["all"].get("/v1/audits/report", **window)
        one, two = answer["report"]
        assert one["group"] == {"project": "p1"}
        assert one["verdicts"] == {"verified": 6, "missing": 1, "mismatch": 1}
        assert one["resource_microseconds"] == {
            "held": 8 * MICROSECONDS,
            "verified": 6 * MICROSECONDS,
            "repaired": 0,
            "excused": 0,
            "unverified": 2 * MICROSECONDS,
        }
        assert one["unverified_share"] == 0.25
        assert two["verdicts"] == {"verified": 4, "excused": 4}
        assert two["resource_microseconds"]["verified"] == MICROSECONDS * 7 // 2
        assert two["resource_microseconds"]["excused"] == 4 * MICROSECONDS
        assert two["unverified_share"] == 0

        hour = {"start": "2026-05-08T02:00:00Z", "end": "2026-05-08T03:00:00Z"}
        (narrow, _) = (await clients["all"].get("/v1/audits/report", **hour))["report"]
        assert narrow["verdicts"] == {"verified": 1, "missing": 1}
        assert narrow["unverified_share"] == 0.5
        by_type = await clients["all"].get(
            "/v1/audits/report", **window, group_by="resource_type,region"
        )
        assert [row["group"] for row in by_type["report"]] == [
            {"resource_type": "instance", "region": "r1"}
        ]


async def test_the_metric_is_the_share_of_the_last_settled_day_by_type(pool: db.Pool) -> None:
    registry = CollectorRegistry()
    jobs = jobs_of(pool, registry)

    def shares() -> dict[str, float]:
        return {
            sample.labels["resource_type"]: round(sample.value, 6)
            for metric in registry.collect()
            for sample in metric.samples
            if sample.name == "hostler_usage_unverified_share"
        }

    gone = Instance("i2")
    gone.ended = DAY + 4 * HOUR
    await fold(pool, Instance("i1").audited(*range(20)), gone.audited(0, 1, 2, 3))
    async with db.connection(pool) as connection:
        await connection.execute(
            "INSERT INTO usage_interval (region, resource_type, resource_id, starts_at, ends_at,"
            " project_id, state_class, attributes, opened_by, closed_by, provenance) VALUES"
            " ('r1', 'network', 'n1', $1, $2, 'p1', 'active', '{}', '[]', '[]', 'events')",
            DAY + HOUR,
            DAY + 30 * HOUR,
        )
    await jobs.measure_at(DAY + 25 * HOUR)  # the last audits may be on their way
    assert shares() == {}
    await jobs.measure_at(DAY + 26 * HOUR)
    assert shares() == {"instance": round(4 / (24 + 4), 6), "network": 1.0}
    await jobs.measure_at(DAY + 50 * HOUR)
    assert shares() == {"instance": 1.0, "network": 1.0}
    await jobs.measure_at(DAY + 74 * HOUR)  # the network is gone, and its share with it
    assert shares() == {"instance": 1.0}


async def test_a_partial_audit_bears_out_nothing_that_the_hourly_one_denies(
    pool: db.Pool, opened: Opened
) -> None:
    one = Instance("i1").audited(0).audited(1, state="stopped")
    at = DAY + HOUR + 20 * MINUTE
    one.audits.append(
        AuditStatement(
            evidence=witness("partial", at),
            said_at=at,
            period_start=DAY + HOUR,
            period_end=at,
            born_at=DAY,
            fields=dict(one.held),
        )
    )
    await fold(pool, one)
    async with opened() as clients:
        (row,) = (
            await clients["all"].get(
                "/v1/audits/report", start="2026-05-08T00:00:00Z", end="2026-05-08T02:00:00Z"
            )
        )["report"]
    assert row["verdicts"] == {"verified": 2, "mismatch": 1}
    assert row["resource_microseconds"]["verified"] == MICROSECONDS
    assert row["unverified_share"] == 0.5


async def test_the_report_by_day_adds_up_to_the_report(pool: db.Pool, opened: Opened) -> None:
    hours = [hour for hour in range(20, 52) if hour != 30]
    await fold(
        pool,
        Instance("i1", born=DAY + 20 * HOUR + 10 * MINUTE).audited(*hours),
        Instance("i2", born=DAY + 20 * HOUR).audited(*range(20, 52)),
    )
    await check(pool, 53)
    window = {"start": "2026-05-08T22:30:00Z", "end": "2026-05-10T03:15:00Z"}
    async with opened() as clients:
        (whole,) = (await clients["all"].get("/v1/audits/report", **window))["report"]
        days = await clients["all"].get("/v1/audits/report", **window, group_by="day", limit=2)
        rest = await clients["all"].get(
            "/v1/audits/report", **window, group_by="day", marker=days["next_marker"]
        )
        rows = [*days["report"], *rest["report"]]
        assert [row["group"]["day"] for row in rows] == ["2026-05-08", "2026-05-09", "2026-05-10"]
        for name, amount in whole["resource_microseconds"].items():
            assert sum(row["resource_microseconds"][name] for row in rows) == amount
        for status, count in whole["verdicts"].items():
            assert sum(row["verdicts"].get(status, 0) for row in rows) == count
        assert whole["resource_microseconds"]["held"] == 2 * 28.75 * MICROSECONDS
        assert whole["resource_microseconds"]["unverified"] == MICROSECONDS  # hour 30


@pytest.mark.parametrize(
    ("path", "params", "code"),
    [
        ("/v1/audits", {"marker": "x"}, "usage.marker.invalid"),
        ("/v1/audits", {"status": "perhaps"}, "request.invalid"),
        ("/v1/audits/report", {"group_by": "weekday"}, "usage.audit.group_by_unknown"),
        ("/v1/audits/report", {"end": "2026-05-08T00:00:00Z"}, "usage.audit.window_invalid"),
        ("/v1/audits/report", {"end": "9999-12-31T23:59:59-12:00"}, "usage.audit.window_invalid"),
    ],
)
async def test_what_cannot_be_meant_is_refused(
    opened: Opened, path: str, params: dict[str, str], code: str
) -> None:
    window = {"start": "2026-05-08T00:00:00Z", "end": "2026-05-09T00:00:00Z"}
    async with opened() as clients:
        with pytest.raises(errors.HostlerError) as caught:
            await clients["all"].get(path, **{**window, **params})
        assert caught.value.code == code


async def test_a_report_may_begin_with_the_calendar(pool: db.Pool, opened: Opened) -> None:
    await fold(pool, Instance("i1").audited(0))
    window = {"start": "0001-01-01T00:00:00Z", "end": "9999-12-31T23:59:59.999999Z"}
    async with opened() as clients:
        (row,) = (await clients["all"].get("/v1/audits/report", **window))["report"]
        assert sum(row["verdicts"].values()) == 1


async def test_the_commands_show_tables_and_json(
    pool: db.Pool, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fold(pool, Instance("i1").audited(0).audited(1, state="stopped"))
    program = typer.Typer()
    for name, command in audits_cli.COMMANDS.items():
        program.command(name)(command)
    monkeypatch.setenv("COLUMNS", "240")
    async with opened() as clients:
        token = clients["all"]._http.headers["Authorization"].removeprefix("Bearer ")
        monkeypatch.setenv("HOSTLER_TOKEN", token)
        monkeypatch.setenv("HOSTLER_URL", str(clients["all"]._http.base_url))
        window = ["--start", "2026-05-08", "--end", "2026-05-09"]

        async def run(*arguments: str) -> str:
            result = await asyncio.to_thread(CliRunner().invoke, program, [*arguments, *window])
            assert result.exit_code == 0, result.output
            return result.output[max(0, result.output.find("{\n")) :]  # behind the server's log

        assert "field_differs" in await run("audits")
        assert "stopped" in await run("audits")
        assert json.loads(await run("audits", "--json"))["audits"][0]["field"] == "state"
        table = await run("audit-report")
        heads, cells = (
            [cell.strip() for cell in re.split("[┃│]", line)[1:-1]]
            for line in table.splitlines()
            if line.startswith(("┃", "│"))
        )
        said = dict(zip(heads, cells, strict=True))
        # one unit a column: hours, shares of them, and what periods came to
        shares = ("verified", "repaired", "excused", "unverified")
        assert said["hours held"] == "24.000"
        assert [said[name] for name in shares] == ["4.17 %", "0.00 %", "0.00 %", "95.83 %"]
        assert said["periods"] == "1 mismatch, 1 verified"
        assert json.loads(await run("audit-report", "--json"))["group_by"] == ["project"]
        assert "operations" in await run("operations")
