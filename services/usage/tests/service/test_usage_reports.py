"""Reports of a real ledger: what is idle, on what evidence; who uses most."""

import asyncio
import hashlib
import html
import json
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from typer.testing import CliRunner

from hostler_common import client, errors
from hostler_common.testing import RunningService
from hostler_usage.__main__ import main
from hostler_usage.exporting import idle_findings
from hostler_usage.testing import LARGE, SMALL, InstanceLife, Step, VolumeLife, VolumeStep

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)
RunUsage = Callable[..., AbstractAsyncContextManager[RunningService]]
Publish = Callable[..., Awaitable[None]]
Settled = Callable[[RunningService, int], Awaitable[dict[str, Any]]]
Reported = Callable[..., AbstractAsyncContextManager[RunningService]]
CITED = [{"message_id": "m1", "event_id": "1-00"}]


def interval(
    resource: str,
    resource_type: str,
    state_class: str,
    days: float,
    *,
    until: float | None = None,
    project: str = "p1",
    **attributes: Any,
) -> tuple[Any, ...]:
    """A row of usage_interval that began so many days ago, and ended so many, or lasts."""
    return (
        "RegionOne",
        resource_type,
        resource,
        NOW - days * DAY,
        None if until is None else NOW - until * DAY,
        project,
        "u1",
        state_class,
        json.dumps(attributes),
        json.dumps(CITED),
        "[]",
        "events",
    )


def amounts(resource: str, resource_type: str, counter: str, amount: int, days: int) -> list[Any]:
    """So much, every hour of so many days until now."""
    return [
        ("RegionOne", resource_type, resource, counter, "", NOW - n * DAY / 24, amount, "p1", "[]")
        for n in range(days * 24 + 1)
    ]


HOUR_OF_CPU = 3600 * 10**9
SIZE: dict[str, Any] = {
    "vcpus": 2,
    "memory_mb": 4096,
    "disk_gb": 40,
    "flavor": "m1.medium",
    "image": "i-used",
}
INTERVALS = [
    # stopped for 20 days; it moved to another host meanwhile
    interval("a-stopped", "instance", "running", 90, until=20, **SIZE),
    interval("a-stopped", "instance", "stopped", 20, until=3, host="h1", **SIZE),
    interval("a-stopped", "instance", "stopped", 3, host="h2", **SIZE),
    interval("b-just-stopped", "instance", "running", 90, until=2, **SIZE),
    interval("b-just-stopped", "instance", "stopped", 2, **SIZE),
    interval("c-quiet", "instance", "running", 30, **SIZE),
    interval("d-busy", "instance", "running", 30, **SIZE),
    interval("e-unsampled", "instance", "running", 30, **SIZE),
    interval("f-deleted", "instance", "stopped", 90, until=30, **SIZE),
    interval("g-loose", "volume", "available", 60, project="p2", size_gb=100),
    interval("h-gone", "volume", "in_use", 200, until=100, size_gb=10),
    interval("i-orphan", "snapshot", "available", 150, volume="h-gone", size_gb=10),
    interval("j-snapshot", "snapshot", "available", 150, volume="g-loose", size_gb=10),
    interval("k-floating", "floating_ip", "allocated", 8, address="192.0.2.1"),
    interval("l-associated", "floating_ip", "associated", 90, address="192.0.2.2"),
    interval("m-unused", "image", "active", 200, size_bytes=5),
    interval("n-sent", "image", "active", 200, size_bytes=5),
    interval("i-used", "image", "active", 200, size_bytes=5),
]
AMOUNTS = [
    # 5 % of two vCPUs, and 95 %
    *amounts("c-quiet", "instance", "cpu_time_ns", HOUR_OF_CPU // 10, 8),
    *amounts("d-busy", "instance", "cpu_time_ns", HOUR_OF_CPU * 19 // 10, 8),
    *amounts("n-sent", "image", "image_sent_bytes", 5, 1),
]


async def insert(url: str, intervals: list[Any], moved: list[Any]) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.executemany(
            "INSERT INTO usage.usage_interval"
            f" VALUES ({', '.join(f'${n}' for n in range(1, 13))})",
            intervals,
        )
        await connection.executemany(
            f"INSERT INTO usage.usage_amount VALUES ({', '.join(f'${n}' for n in range(1, 10))})",
            moved,
        )
    finally:
        await connection.close()


@pytest.fixture
def reported(run_usage: RunUsage, database_url: str) -> Reported:
    """The service with all of the above in its ledger."""

    @asynccontextmanager
    async def run(**settings: Any) -> AsyncIterator[RunningService]:
        async with run_usage(**settings) as service:
            await insert(database_url, INTERVALS, AMOUNTS)
            yield service

    return run


async def findings(service: RunningService, **parameters: Any) -> list[dict[str, Any]]:
    answer = await service.api.get("/v1/reports/idle", **parameters)
    found: list[dict[str, Any]] = answer["findings"]
    return found


async def test_what_nobody_needs_is_found_and_nothing_else(reported: Reported) -> None:
    async with reported() as service:
        answer = await service.api.get("/v1/reports/idle")
    assert [
        (one["resource_id"], one["reason"], one["age_days"]) for one in answer["findings"]
    ] == [
        ("a-stopped", "stopped", 20),
        ("c-quiet", "inactive", 7),
        ("g-loose", "unattached", 60),
        ("i-orphan", "orphaned", 100),
        ("k-floating", "unassociated", 8),
        ("m-unused", "unused", 200),
    ]
    assert (answer["examined"], answer["unknown"], answer["next_marker"]) == (13, 1, None)
    stopped, quiet, *_ = answer["findings"]
    assert stopped["cited"] == CITED
    assert stopped["holds"] == {"vcpus": 2, "memory_mb": 4096, "disk_gb": 40}
    assert stopped["cost_per_month"] is None
    assert quiet["evidence"][0] == "p95 of CPU 5.0 % over 7 days"
    assert quiet["score"] == 8.8
    assert answer["thresholds"]["stopped_days"] == 14


async def test_what_cannot_be_told_is_told_apart(reported: Reported) -> None:
    async with reported() as service:
        found = await findings(service, include_unknown="true", resource_type="instance")
        unknown = [one for one in found if one["verdict"] == "unknown"]
        assert [(one["resource_id"], one["reason"]) for one in unknown] == [("e-unsampled", None)]
        assert unknown[0]["evidence"] == ["its counters were not read"]


@pytest.mark.parametrize(("bursts", "reasons"), [(5, ["inactive"]), (15, [])])
async def test_rare_bursts_do_not_hide_an_idle_instance(
    run_usage: RunUsage, database_url: str, bursts: int, reasons: list[str]
) -> None:
    hours = amounts("c-quiet", "instance", "cpu_time_ns", HOUR_OF_CPU // 10, 8)
    for n in range(bursts):  # of the 168 hours of a week: under a twentieth, and over
        hours[10 * n] = (*hours[10 * n][:6], HOUR_OF_CPU * 2, *hours[10 * n][7:])
    async with run_usage() as service:
        await insert(database_url, [interval("c-quiet", "instance", "running", 30, **SIZE)], hours)
        assert [one["reason"] for one in await findings(service)] == reasons


async def test_thresholds_and_reasons_are_parameters(reported: Reported) -> None:
    async with reported() as service:
        found = await findings(service, stopped_days=1, reason="stopped")
        assert [one["resource_id"] for one in found] == ["a-stopped", "b-just-stopped"]
        assert await findings(service, stopped_days=21, reason="stopped") == []
        found = await findings(service, cpu_percent=4, resource_type="instance")
        assert [one["resource_id"] for one in found] == ["a-stopped"]
        assert [one["resource_id"] for one in await findings(service, project_id="p2")] == [
            "g-loose"
        ]
        assert await findings(service, region="RegionTwo") == []


@pytest.mark.parametrize("at_once", [1, 3, 500])
async def test_pages_of_findings_hold_each_once(
    reported: Reported, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(idle_findings, "_EXAMINED_AT_ONCE", at_once)
    monkeypatch.setattr(idle_findings, "MOST_EXAMINED", 4)
    async with reported() as service:
        seen: list[str] = []
        marker, pages = None, 0
        while marker is not None or not pages:
            page = await service.api.get("/v1/reports/idle", limit=2, marker=marker)
            seen += [one["resource_id"] for one in page["findings"]]
            marker, pages = page["next_marker"], pages + 1
    assert seen == ["a-stopped", "c-quiet", "g-loose", "i-orphan", "k-floating", "m-unused"]
    assert pages > 2


async def test_a_reader_of_one_project_sees_its_own_alone(
    reported: Reported, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(f"bob:reader:p2:{hashlib.sha256(b'bob').hexdigest()}")
    start = (NOW - 10 * DAY).isoformat()
    async with reported(auth_mode="token", auth_tokens_file=tokens) as service:
        async with client.open_api(service.url, token="bob") as bob:
            answer = await bob.get("/v1/reports/idle")
            assert [one["resource_id"] for one in answer["findings"]] == ["g-loose"]
            assert answer["examined"] == 1
            assert (await bob.get("/v1/reports/idle", project_id="p1"))["findings"] == []
            top = await bob.get(
                "/v1/reports/top-projects",
                start=start,
                end=NOW.isoformat(),
                by="volume_gb_hours",
            )
            assert [(one["project_id"], one["share"]) for one in top["projects"]] == [("p2", 1.0)]
        async with client.open_api(service.url) as nobody:
            for path in ("/v1/reports/idle", "/v1/reports/top-projects"):
                with pytest.raises(errors.Unauthenticated):
                    await nobody.get(path, start=start, end=NOW.isoformat())


MAY = datetime(2026, 5, 8, tzinfo=UTC)
HOUR = timedelta(hours=1)


def life(number: int, project: str, hours: int) -> InstanceLife:
    return InstanceLife(
        instance_id=f"00000000-0000-4000-8000-{number:012}",
        project_id=project,
        steps=(
            Step(at=MAY, action="create", flavor=SMALL if number % 2 else LARGE),
            Step(at=MAY + hours * HOUR, action="delete"),
        ),
    )


async def test_top_projects_are_those_that_used_most(
    run_usage: RunUsage, publish: Publish, settled: Settled
) -> None:
    lives = (life(1, "p1", 3), life(3, "p2", 5), life(2, "p3", 2))
    messages = [message for one in lives for message in one.messages()]
    async with run_usage() as service:
        await publish([message.body() for message in messages])
        await settled(service, len(messages))

        async def top(**parameters: Any) -> list[tuple[Any, ...]]:
            answer = await service.api.get(
                "/v1/reports/top-projects",
                start="2026-05-08T00:00:00Z",
                end="2026-05-09T00:00:00Z",
                **parameters,
            )
            return [
                (one["rank"], one["project_id"], one["hours"], one["share"])
                for one in answer["projects"]
            ]

        assert await top() == [(1, "p2", 5.0, 0.5), (2, "p1", 3.0, 0.3), (3, "p3", 2.0, 0.2)]
        assert await top(by="vcpu_hours", limit=2) == [(1, "p3", 8.0, 0.5), (2, "p2", 5.0, 0.3125)]
        assert await top(by="volume_gb_hours") == []


async def test_an_unattached_volume_of_real_messages_is_found_with_its_body(
    run_usage: RunUsage, publish: Publish, settled: Settled
) -> None:
    volume = VolumeLife(
        volume_id="00000000-0000-4000-9000-000000000001",
        project_id="p1",
        steps=(VolumeStep(at=MAY, action="create", size_gb=10),),
    )
    messages = volume.messages()
    async with run_usage() as service:
        await publish([message.body() for message in messages])
        await settled(service, len(messages))
        (found,) = await findings(service)
        assert (found["resource_id"], found["reason"]) == (volume.volume_id, "unattached")
        assert found["holds"] == {"size_gb": 10}
        bodies = {message.message_id: message.body() for message in messages}
        for one in found["cited"]:
            body = await service.api.get(f"/v1/events/{one['event_id']}/body")
            assert body.encode() == bodies[one["message_id"]]


BAD_REQUESTS = {
    ("/v1/reports/idle", "marker", "!!"): "usage.marker.invalid",
    ("/v1/reports/idle", "stopped_days", "0"): "request.invalid",
    ("/v1/reports/idle", "cpu_percent", "nan"): "request.invalid",
    ("/v1/reports/idle", "reason", "boredom"): "request.invalid",
    ("/v1/reports/idle", "price_book", "none"): "usage.price_book.not_found",
    ("/v1/reports/top-projects", "by", "colour"): "usage.measure.unknown",
    ("/v1/reports/top-projects", "by", "cost"): "usage.price_book.missing",
    ("/v1/reports/top-projects", "end", "2026-05-08T00:00:00Z"): "usage.window.invalid",
}


async def test_a_bad_request_is_a_problem_with_a_stable_code(run_usage: RunUsage) -> None:
    answers = {}
    async with run_usage() as service:
        for path, name, value in BAD_REQUESTS:
            window = {"start": "2026-05-08T00:00:00Z", "end": "2026-05-09T00:00:00Z"}
            with pytest.raises(errors.HostlerError) as caught:
                await service.api.get(path, **{**window, name: value})
            answers[path, name, value] = caught.value.code
    assert answers == BAD_REQUESTS


async def test_the_command_line_lists_what_is_idle(reported: Reported) -> None:
    async with reported() as service:

        def run(*arguments: str) -> str:
            result = CliRunner().invoke(main, ["idle", *arguments, "--url", service.url])
            assert result.exit_code == 0, result.output
            return result.stdout

        shown = await asyncio.to_thread(run)
        assert "a-stopped" in shown
        assert "6 of the 13 resources that were looked at; of 1 it cannot be told" in shown
        answer = json.loads(await asyncio.to_thread(run, "--json", "--reason", "orphaned"))
        assert [one["resource_id"] for one in answer["findings"]] == ["i-orphan"]


async def page(service: RunningService, path: str, token: str | None = None) -> tuple[int, str]:
    """The status and the text of a page, as a browser asks for it."""

    def read() -> tuple[int, str]:
        headers = {
            "Accept": "text/html",
            **({"Cookie": f"hostler_token={token}"} if token else {}),
        }
        request = urllib.request.Request(f"{service.url}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as refused:
            with refused:
                return refused.code, refused.read().decode()

    return await asyncio.to_thread(read)


async def test_the_page_of_idle_resources_says_what_the_report_says(reported: Reported) -> None:
    async with reported() as service:
        _, without = await page(service, "/idle")
        book = {
            "currency": "EUR",
            "prices": [{"name": "h", "measure": "instance_hours", "price": 1}],
        }
        await service.api.put("/v1/price-books/default", book)
        status, text = await page(service, "/idle")
        for one in await findings(service, price_book="default"):
            assert f'/resources/{one["resource_type"]}/{one["resource_id"]}"' in text
            assert "; ".join(one["evidence"]) in html.unescape(text)
            assert str(one["cost_per_month"] or "-") in text
        assert status == 200
        assert ("EUR a month" in without, "EUR a month" in text) == (False, True)
        assert 'href="/idle" aria-current="page"' in text
        _, stopped = await page(service, "/idle?reason=stopped&project_id=")
        assert ("a-stopped" in stopped, "g-loose" in stopped) == (True, False)
        assert (await page(service, "/idle?price_book=nobody"))[0] == 404
        assert (await page(service, "/idle?reason=boredom"))[0] == 422
        _, nothing = await page(service, "/idle?project_id=nobody")
        assert "Nothing of that kind" in nothing


async def test_the_page_of_idle_resources_shows_a_projects_own_alone(
    reported: Reported, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(f"bob:reader:p2:{hashlib.sha256(b'bob').hexdigest()}")
    async with reported(auth_mode="token", auth_tokens_file=tokens) as service:
        _, text = await page(service, "/idle", token="bob")
        assert ("g-loose" in text, "a-stopped" in text) == (True, False)
        _, text = await page(service, "/idle?project_id=p1", token="bob")
        assert "a-stopped" not in text
