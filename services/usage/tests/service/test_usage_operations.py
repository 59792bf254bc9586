"""Operations on a real PostgreSQL, and their API: lists, profiles, and who may see what."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from hostler_common import client, db, errors
from hostler_usage.profiling import operations_api
from hostler_usage.profiling.operation_store import OperationStore, replace_operations
from hostler_usage.profiling.operations import Mark, pair
from hostler_usage.reading.mapping import Phase
from hostler_usage.reading.statement import Evidence, ResourceKey, ResourceType

DAY = datetime(2026, 5, 8, tzinfo=UTC)
SECOND = timedelta(seconds=1)
ServePart = Callable[..., AbstractAsyncContextManager[tuple[str, dict[str, client.Api]]]]
Opened = Callable[[], AbstractAsyncContextManager[dict[str, client.Api]]]


def key(name: str, resource_type: str = "instance") -> ResourceKey:
    return ResourceKey(region="r1", resource_type=ResourceType(resource_type), resource_id=name)


def mark(
    action: str,
    phase: Phase,
    at: datetime,
    *,
    project: str = "p1",
    host: str = "h1",
    flavor: str = "m1.small",
    reason: str | None = None,
) -> Mark:
    name = f"{action}.{phase}@{at}"
    return Mark(
        evidence=Evidence(event_time=at, message_id=name, digest=name.encode()),
        request_id=f"req-{action}",
        action=action,
        phase=phase,
        at=at,
        host=host,
        flavor=flavor,
        reason=reason,
        project_id=project,
    )


def took(action: str, seconds: float, start: datetime = DAY, **about: Any) -> list[Mark]:
    """A start and an end."""
    return [
        mark(action, Phase.START, start, **about),
        mark(action, Phase.END, start + seconds * SECOND, **about),
    ]


async def fold(pool: db.Pool, marks: dict[ResourceKey, list[Mark]]) -> None:
    async with db.transaction(pool) as connection:
        await replace_operations(
            connection,
            {name: pair(str(name.resource_type), given) for name, given in marks.items()},
        )


@pytest.fixture
def opened(pool: db.Pool, serve_part: ServePart) -> Opened:
    """Clients of the API by what their token may see: all, or one project."""

    @asynccontextmanager
    async def run() -> AsyncIterator[dict[str, client.Api]]:
        async with serve_part(
            [operations_api.router],
            {"operations": OperationStore(pool=pool)},
            all=("reader", "*"),
            p1=("reader", "p1"),
            agent=("agent", "*"),
        ) as (_, clients):
            yield clients

    return run


async def listed(api: client.Api, **filters: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await api.get("/v1/operations", **filters))["operations"]
    return found


async def test_operations_are_those_of_the_last_fold_and_what_is_right_is_not_touched(
    pool: db.Pool,
) -> None:
    marks = took("create", 10)
    await fold(pool, {key("i1"): marks[:1], key("i2"): took("delete", 5)})
    statement = "SELECT ctid, resource_id, action, outcome, duration_us FROM operation ORDER BY 2"
    async with db.connection(pool) as connection:
        before = await connection.fetch(statement)
    assert [tuple(row)[1:] for row in before] == [
        ("i1", "create", "unfinished", None),
        ("i2", "delete", "succeeded", 5_000_000),
    ]
    await fold(pool, {key("i1"): marks, key("i2"): took("delete", 5)})
    async with db.connection(pool) as connection:
        after = await connection.fetch(statement)
    assert tuple(after[0])[1:] == ("i1", "create", "succeeded", 10_000_000)
    assert after[1] == before[1]
    await fold(pool, {key("i1"): []})
    async with db.connection(pool) as connection:
        assert [row["resource_id"] for row in await connection.fetch(statement)] == ["i2"]


async def test_an_operation_is_shown_with_its_outcome_and_its_messages(
    pool: db.Pool, opened: Opened
) -> None:
    failed = [
        mark("create", Phase.START, DAY),
        mark("create", Phase.ERROR, DAY + 4 * SECOND, reason="no valid host"),
    ]
    await fold(pool, {key("i1"): failed})
    async with opened() as clients:
        (item,) = await listed(clients["all"])
    cited = item.pop("evidence")
    assert [message["message_id"] for message in cited] == [
        mark.evidence.message_id for mark in failed
    ]
    assert item == {
        "region": "r1",
        "resource_type": "instance",
        "resource_id": "i1",
        "action": "create",
        "request_id": "req-create",
        "started_at": "2026-05-08T00:00:00Z",
        "ended_at": "2026-05-08T00:00:04Z",
        "outcome": "failed",
        "duration_ms": 4000.0,
        "host": "h1",
        "flavor": "m1.small",
        "project_id": "p1",
        "reason": "no valid host",
    }


async def test_starts_that_never_ended_are_listed_once_they_are_old_enough(
    pool: db.Pool, opened: Opened
) -> None:
    now = datetime.now(UTC)
    await fold(
        pool,
        {
            key("old"): [mark("resize", Phase.START, now - timedelta(hours=2))],
            key("new"): [mark("resize", Phase.START, now)],
            key("done"): took("resize", 5, now - timedelta(hours=3)),
        },
    )
    async with opened() as clients:
        found = await listed(clients["all"], unfinished_longer_than_seconds=3600)
        assert [item["resource_id"] for item in found] == ["old"]
        assert len(await listed(clients["all"], outcome="unfinished")) == 2
        with pytest.raises(errors.HostlerError):
            await listed(clients["all"], unfinished_longer_than_seconds=-1)


async def test_the_list_is_paged_without_loss_newest_first_and_filtered(
    pool: db.Pool, opened: Opened
) -> None:
    await fold(
        pool,
        {
            key(f"i{n}"): took("create", 10, host=f"h{n % 2}") + took("pause", 1, flavor="big")
            for n in range(6)
        }
        | {key("v1", "volume"): took("create", 2, DAY + SECOND)},
    )
    async with opened() as clients:
        api = clients["all"]
        rows: list[dict[str, Any]] = []
        marker = None
        while True:
            answer = await api.get("/v1/operations", limit=3, marker=marker)
            rows += answer["operations"]
            marker = answer["next_marker"]
            if marker is None:
                break
        assert len(rows) == 13
        assert len({(row["resource_id"], row["action"]) for row in rows}) == 13
        assert rows[0]["resource_id"] == "v1"
        for filters, count in (
            ({"action": "pause"}, 6),
            ({"host": "h0"}, 3),
            ({"flavor": "big"}, 6),
            ({"resource_type": "volume"}, 1),
            ({"resource_id": "i1"}, 2),
            ({"request_id": "req-pause"}, 6),
            ({"region": "r2"}, 0),
            ({"start": "2026-05-08T00:00:01Z"}, 1),
            ({"end": "2026-05-08T00:00:01Z"}, 12),
        ):
            assert len(await listed(api, **filters)) == count, filters
        with pytest.raises(errors.HostlerError) as caught:
            await listed(api, marker="x")
        assert caught.value.code == "usage.marker.invalid"


async def test_profiles_give_percentiles_failures_and_what_hangs(
    pool: db.Pool, opened: Opened
) -> None:
    marks = {key(f"i{n:03}"): took("create", n + 1) for n in range(100)}
    for number in range(25):
        marks[key(f"f{number:03}")] = [
            mark("create", Phase.START, DAY),
            mark("create", Phase.ERROR, DAY + 900 * SECOND),
        ]
    marks[key("u")] = [mark("create", Phase.START, DAY)]
    marks[key("l")] = [mark("delete", Phase.END, DAY, host="h2")]
    await fold(pool, marks)
    async with opened() as clients:
        answer = await clients["all"].get("/v1/operations/summary", group_by="action,host")
        assert answer["group_by"] == ["action", "host"]
        create, delete = answer["profiles"]
        assert create == {
            "group": {"action": "create", "host": "h1"},
            "operations": 126,
            "succeeded": 100,
            "failed": 25,
            "unfinished": 1,
            "lost_start": 0,
            "failure_share": 0.2,
            "p50_ms": 50_500.0,  # continuous: between the 50th and the 51st
            "p99_ms": 99_010.0,
        }
        assert (delete["lost_start"], delete["failure_share"], delete["p50_ms"]) == (1, 0.0, None)
        (whole,) = (await clients["all"].get("/v1/operations/summary"))["profiles"]
        assert (whole["group"], whole["operations"]) == ({}, 127)
        page = await clients["all"].get("/v1/operations/summary", group_by="action", limit=1)
        rest = await clients["all"].get(
            "/v1/operations/summary", group_by="action", marker=page["next_marker"]
        )
        assert [row["group"] for row in (*page["profiles"], *rest["profiles"])] == [
            {"action": "create"},
            {"action": "delete"},
        ]
        with pytest.raises(errors.HostlerError) as caught:
            await clients["all"].get("/v1/operations/summary", group_by="weather")
        assert caught.value.code == "usage.operation.group_by_unknown"


async def test_a_project_sees_its_own_operations_only(pool: db.Pool, opened: Opened) -> None:
    await fold(pool, {key("i1"): took("create", 1), key("i2"): took("create", 9, project="p2")})
    async with opened() as clients:
        assert [item["resource_id"] for item in await listed(clients["p1"])] == ["i1"]
        assert await listed(clients["p1"], project_id="p2") == []
        (profile,) = (await clients["p1"].get("/v1/operations/summary"))["profiles"]
        assert (profile["operations"], profile["p99_ms"]) == (1, 1000.0)
        assert len(await listed(clients["all"])) == 2
        for path in ("/v1/operations", "/v1/operations/summary"):
            with pytest.raises(errors.HostlerError, match="reader"):
                await clients["agent"].get(path)
