"""The HTTP API against a real ledger: windows, groups, pages, evidence, and who may see what."""

import asyncio
import hashlib
import json
import re
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import pytest
from typer.testing import CliRunner

from hostler_common import client, errors, testing
from hostler_common.testing import RunningService
from hostler_usage.__main__ import main
from hostler_usage.history.ledger_testing import brief_instance, brief_volume
from hostler_usage.testing import LARGE, InstanceLife, Step

DAY = datetime(2026, 5, 8, tzinfo=UTC)
HOUR = timedelta(hours=1)
WINDOW = {"start": "2026-05-08T00:00:00Z", "end": "2026-05-09T00:00:00Z"}
RunUsage = Callable[..., AbstractAsyncContextManager[RunningService]]
Publish = Callable[..., Awaitable[None]]
Settled = Callable[[RunningService, int], Awaitable[dict[str, Any]]]


LIVES = tuple(
    brief_instance(number, project, DAY) for number, project in ((1, "p1"), (2, "p1"), (3, "p2"))
)
MESSAGES = [m for life in LIVES for m in life.messages()] + brief_volume("p2", DAY).messages()


@pytest.fixture
def run_with_lives(run_told: RunUsage) -> RunUsage:
    """The service with all lives folded."""
    return partial(run_told, MESSAGES)


async def rows(api: client.Api, **params: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await api.get("/v1/usage", **WINDOW, **params))["usage"]
    return found


async def test_usage_is_grouped_as_asked(run_with_lives: RunUsage) -> None:
    async with run_with_lives() as service:
        api = service.api
        (total,) = await rows(api)
        assert total["hours"]["instance_hours"] == 15.0
        assert total["resources"] in (4, None)  # None where sums of whole days answered
        parts = {"start": WINDOW["start"], "end": "2026-05-08T23:59:59Z"}  # no whole day
        (in_parts,) = (await api.get("/v1/usage", **parts))["usage"]
        assert in_parts["resources"] == len(await rows(api, group_by="resource")) == 4
        assert in_parts["unit_microseconds"] == total["unit_microseconds"]
        assert total["unit_microseconds"]["instance_hours"] == 15 * 3_600_000_000
        by_flavor = await rows(api, group_by="flavor", resource_type="instance")
        assert [(r["group"]["flavor"], r["hours"]["vcpu_hours"]) for r in by_flavor] == [
            ("m1.large", 36.0),
            ("m1.small", 6.0),
        ]
        by_state = await rows(api, group_by="state_class", project_id="p1")
        assert [(r["group"]["state_class"], r["hours"]["instance_hours"]) for r in by_state] == [
            ("running", 6.0),
            ("stopped", 4.0),
        ]
        by_both = await rows(api, group_by="project,type")
        assert [tuple(r["group"].values()) for r in by_both] == [
            ("p1", "instance"),
            ("p2", "instance"),
            ("p2", "volume"),
        ]


async def test_usage_is_grouped_by_any_attribute_and_by_local_days(
    run_with_lives: RunUsage,
) -> None:
    async with run_with_lives() as service:
        api = service.api
        by_both = await rows(api, group_by="vcpus,zone", resource_type="instance")
        assert [(tuple(r["group"].values()), r["hours"]["instance_hours"]) for r in by_both] == [
            (("1", "nova"), 6.0),
            (("4", "nova"), 9.0),
        ]
        (nobody,) = await rows(api, group_by="volume_type", resource_type="instance")
        assert (nobody["group"], nobody["resources"]) == ({"volume_type": None}, 3)
        by_hour = await rows(api, group_by="hour", project_id="p2", resource_type="volume")
        assert [(r["group"]["hour"], r["hours"]["volume_gb_hours"]) for r in by_hour] == [
            ("2026-05-08T00:00:00", 10.0)
        ]
        # New York's eighth of May begins at four in the morning, UTC
        by_day = await rows(
            api, group_by="day,flavor", time_zone="America/New_York", resource_type="instance"
        )
        assert [(tuple(r["group"].values()), r["hours"]["instance_hours"]) for r in by_day] == [
            (("2026-05-07T00:00:00", "m1.large"), 3.0),
            (("2026-05-07T00:00:00", "m1.small"), 6.0),
            (("2026-05-08T00:00:00", "m1.large"), 6.0),
        ]
        by_month = await rows(api, group_by="month", resource_type="instance")
        assert [r["group"]["month"] for r in by_month] == ["2026-05-01T00:00:00"]
        assert await rows(api, group_by="project", resource_type="user") == []
        (nothing,) = await rows(api, resource_type="user")
        assert (nothing["resources"] or 0, nothing["hours"]) == (0, {})


async def test_usage_is_grouped_by_user_host_image_and_os(
    run_usage: RunUsage, publish: Publish, settled: Settled
) -> None:
    lives = [
        {
            "message_id": f"{event} of {name}",
            "event_type": f"compute.instance.{event}",
            "timestamp": f"2026-05-08 {hour:02}:00:00",
            "payload": {
                "instance_id": name,
                "tenant_id": "p1",
                "user_id": f"user of {name}",
                "host": f"host of {name}",
                "image_ref_url": f"http://glance/images/image of {name}",
                "image_meta": {"os_distro": f"os of {name}"},
                "launched_at": "2026-05-08T01:00:00",
                "state": "active",
            },
        }
        for name, end in (("a", 4), ("b", 6))
        for event, hour in (("create.end", 1), ("delete.end", end))
    ]
    async with run_usage() as service:
        await publish([json.dumps(message).encode() for message in lives])
        await settled(service, len(lives))
        for name in ("user", "host", "image", "os"):
            found = await rows(service.api, group_by=name)
            assert [(r["group"][name], r["hours"]["instance_hours"]) for r in found] == [
                (f"{name} of a", 3.0),
                (f"{name} of b", 5.0),
            ]


METERED = [
    {
        "message_id": f"meter-{number}",
        "event_type": "l3.meter",
        "timestamp": f"2026-05-08 0{number}:00:00",
        "payload": {"label_id": f"label-{number % 2}", "project_id": "p1", "bytes": 1000 + number},
    }
    for number in range(4)
] + [
    {
        "message_id": f"exists-{number}",
        "event_type": "compute.instance.exists",
        "timestamp": f"2026-05-08 0{number}:00:30",
        "payload": {
            "instance_id": "i1",
            "tenant_id": "p2",
            "launched_at": "2026-05-08T00:00:00",
            "state": "active",
            "instance_type": "m1.tiny",
            "audit_period_beginning": f"2026-05-08 0{number - 1}:00:00",
            "audit_period_ending": f"2026-05-08 0{number}:00:00",
            "bandwidth": {"public": {"bw_in": 7, "bw_out": 70}, "private": {"bw_in": 0}},
        },
    }
    for number in range(1, 4)
]


async def test_what_moved_is_summed_where_it_moved_and_by_its_label(
    run_usage: RunUsage, publish: Publish, settled: Settled
) -> None:
    async with run_usage() as service:
        await publish([json.dumps(message).encode() for message in METERED])
        await settled(service, len(METERED))
        api = service.api
        found = {r["group"]["project"]: r["amounts"] for r in await rows(api, group_by="project")}
        assert found == {
            "p1": {"traffic_bytes": 4006},
            "p2": {"bandwidth_in_bytes": 21, "bandwidth_out_bytes": 210},
        }
        by_label = await rows(api, group_by="label,flavor", project_id="p2")
        assert [(tuple(r["group"].values()), r["amounts"]) for r in by_label] == [
            ((None, "m1.tiny"), {}),
            (("public", "m1.tiny"), {"bandwidth_in_bytes": 21, "bandwidth_out_bytes": 210}),
        ]
        by_hour = await rows(api, group_by="hour", resource_type="instance")
        assert [r["amounts"].get("bandwidth_in_bytes") for r in by_hour[:4]] == [7, 7, 7, None]
        by_hour = await rows(api, group_by="hour", resource_id="label-1")
        assert [(r["group"]["hour"], r["amounts"]["traffic_bytes"]) for r in by_hour] == [
            ("2026-05-08T01:00:00", 1001),
            ("2026-05-08T03:00:00", 1003),
        ]


async def test_windows_are_additive_to_the_microsecond(run_with_lives: RunUsage) -> None:
    async with run_with_lives() as service:
        cuts = [
            "2026-05-08T00:00:00Z",
            "2026-05-08T01:23:45.678901Z",
            "2026-05-08T03:00:00.000001Z",
            "2026-05-08T05:59:59.999999Z",
            "2026-05-09T00:00:00Z",
        ]
        parts: dict[str, int] = {}
        for start, end in pairwise(cuts):
            (row,) = (await service.api.get("/v1/usage", start=start, end=end))["usage"]
            for name, amount in row["unit_microseconds"].items():
                parts[name] = parts.get(name, 0) + amount
        (whole,) = await rows(service.api)
        assert parts == whole["unit_microseconds"]


async def test_pages_of_usage_and_events_hold_each_row_once(run_with_lives: RunUsage) -> None:
    async with run_with_lives() as service:
        seen, marker = [], None
        while True:
            page = await service.api.get(
                "/v1/usage", **WINDOW, group_by="resource,flavor", limit=2, marker=marker
            )
            seen += [tuple(row["group"].values()) for row in page["usage"]]
            marker = page["next_marker"]
            if marker is None:
                break
        assert len(seen) == len(set(seen)) == 7
        assert seen == sorted(seen, key=lambda group: tuple(name or "" for name in group))
        events, marker = [], None
        while True:
            page = await service.api.get("/v1/events", limit=7, marker=marker)
            events += page["events"]
            marker = page["next_marker"]
            if marker is None:
                break
        assert len({event["id"] for event in events}) == len(events) == len(MESSAGES)
        times = [datetime.fromisoformat(event["event_time"]) for event in events]
        assert times == sorted(times, reverse=True)


async def test_every_interval_leads_to_the_bodies_it_rests_on(run_with_lives: RunUsage) -> None:
    bodies = {m.message_id: m.body() for m in MESSAGES}
    async with run_with_lives() as service:
        path = f"/v1/resources/instance/{LIVES[0].instance_id}/intervals"
        history = await service.api.get(path)
        assert [
            (item["start"], item["attributes"]["flavor"], item["state_class"])
            for item in history["intervals"]
        ] == [
            ("2026-05-08T01:00:00Z", "m1.small", "running"),
            ("2026-05-08T03:00:00Z", "m1.large", "running"),  # resized
            ("2026-05-08T03:00:01Z", "m1.large", "running"),  # confirmed
            ("2026-05-08T04:00:00Z", "m1.large", "stopped"),
        ]
        assert history["intervals"][-1]["end"] == "2026-05-08T06:00:00Z"
        for item in history["intervals"]:
            for cited in item["opened_by"] + item["closed_by"]:
                body = await service.api.get(f"/v1/events/{cited['event_id']}/body")
                assert body.encode() == bodies[cited["message_id"]]
                digest = hashlib.sha256(bodies[cited["message_id"]]).hexdigest()
                assert cited["event_id"].endswith(digest)


async def test_a_reader_of_one_project_sees_that_project_alone(
    run_with_lives: RunUsage, tokens: Callable[..., Path]
) -> None:
    callers = {"admin": ("admin", "*"), "alice": ("reader", "p1")}
    async with run_with_lives(auth_mode="token", auth_tokens_file=tokens(**callers)) as service:
        async with client.open_api(service.url, token="admin") as admin:
            (p2_event,) = (await admin.get("/v1/events", project_id="p2", limit=1))["events"]
        async with client.open_api(service.url, token="alice") as alice:
            assert [r["group"]["project"] for r in await rows(alice, group_by="project")] == ["p1"]
            assert await rows(alice, group_by="project", project_id="p2") == []
            (total,) = await rows(alice)
            assert total["hours"]["instance_hours"] == 10.0
            events = (await alice.get("/v1/events", limit=1000))["events"]
            assert {event["project_id"] for event in events} == {"p1"}
            with pytest.raises(errors.NotFound):
                await alice.get(f"/v1/events/{p2_event['id']}")
            with pytest.raises(errors.NotFound):
                await alice.get(f"/v1/resources/instance/{LIVES[2].instance_id}/intervals")
            with pytest.raises(errors.Forbidden) as caught:
                await alice.get(f"/v1/events/{events[0]['id']}/body")
            assert caught.value.code == "usage.event.body_not_shown"
            page = await alice.get("/")
            assert "in the last 24 hours" in page
            assert "Ingest" not in page
        async with client.open_api(service.url) as nobody:
            for path in ("/v1/events", "/v1/usage", "/v1/quarantine"):
                with pytest.raises(errors.Unauthenticated):
                    await nobody.get(path, **WINDOW)


BAD_REQUESTS = {
    "/v1/usage": "request.invalid",
    "/v1/usage?start=2026-05-08T00:00:00Z&end=2026-05-08T00:00:00Z": "usage.window.invalid",
    "/v1/usage?start=2026-05-08T00:00:00&end=2026-05-09T00:00:00": "request.invalid",
    "/v1/usage?start=x&end=2026-05-09T00:00:00Z": "request.invalid",
    "/v1/usage?start=2026-05-08T00:00:00Z&end=2026-05-09T00:00:00Z&group_by=colour": (
        "usage.group_by.unknown"
    ),
    "/v1/usage?start=2026-05-08T00:00:00Z&end=2026-05-09T00:00:00Z&group_by=hour,day": (
        "usage.group_by.unknown"
    ),
    "/v1/usage?start=2026-05-08T00:00:00Z&end=2026-05-09T00:00:00Z&group_by=day&time_zone=Mars": (
        "usage.group_by.unknown"
    ),
    "/v1/usage?start=2026-05-08T00:00:00Z&end=2026-05-09T00:00:00Z&group_by=day&time_zone=%00": (
        "request.unstorable"
    ),
    "/v1/usage?start=2026-05-08T00:00:00Z&end=2026-05-09T00:00:00Z&group_by=project&marker=!!": (
        "usage.marker.invalid"
    ),
    "/v1/usage?start=2026-05-08T00:00:00Z&end=2026-05-09T00:00:00Z&marker=W10": (
        "usage.marker.invalid"
    ),
    "/v1/usage?start=0001-01-01T00:00:00%2B02:00&end=2026-05-09T00:00:00Z": "usage.window.invalid",
    "/v1/usage?start=2026-05-08T00:00:00Z&end=9999-12-31T23:59:59-02:00": "usage.window.invalid",
    f"/v1/events?marker={'W1tb' * 500}": "usage.marker.invalid",  # brackets inside brackets
    "/v1/events?marker=WyJ4IiwieSIsInoiXQ": "usage.marker.invalid",
    "/v1/events?marker=bnVsbA": "usage.marker.invalid",
    "/v1/events?limit=0": "request.invalid",
    "/v1/events?project_id=%00": "request.invalid",
    "/v1/events/nothing": "usage.event.not_found",
    "/v1/events/99999999999999999999999-00": "usage.event.not_found",
    "/v1/events/1-zz/body": "usage.event.not_found",
    "/v1/resources/instance/none/intervals": "usage.resource.not_found",
}


async def test_a_bad_request_is_a_problem_with_a_stable_code(run_usage: RunUsage) -> None:
    answers = {}
    async with run_usage() as service:
        for request in BAD_REQUESTS:
            path, _, query = request.partition("?")
            parameters: dict[str, Any] = dict(parse_qsl(query, keep_blank_values=True))
            with pytest.raises(errors.HostlerError) as caught:
                await service.api.get(path, **parameters)
            answers[request] = caught.value.code
    assert answers == BAD_REQUESTS


async def test_claims_beyond_reason_and_before_the_epoch_can_still_be_read(
    run_usage: RunUsage, publish: Publish, stored: Callable[..., Awaitable[list[dict[str, Any]]]]
) -> None:
    claims = [
        {
            "message_id": f"m{number}",
            "event_type": "compute.instance.create.end",
            "timestamp": "1969-12-31 23:59:59" if number == 0 else "2001-01-01 00:00:00",
            "payload": {
                "instance_id": f"i{number}",
                "launched_at": "2001-01-01 00:00:00",
                "vcpus": 2**53 - 1,
            },
        }
        for number in range(8)
    ]
    async with run_usage() as service:
        await publish([json.dumps(claim).encode() for claim in claims])

        async def used() -> Any:
            window = {"start": "2001-01-01T00:00:00Z", "end": "2026-01-01T00:00:00Z"}
            each = await service.api.get("/v1/usage", **window, group_by="resource")
            is_done = len(each["usage"]) == 7 and each["unfolded_resources"] == 0
            return await service.api.get("/v1/usage", **window) if is_done else None

        usage = await testing.eventually(used)
        span = (datetime(2026, 1, 1, tzinfo=UTC) - datetime(2001, 1, 1, tzinfo=UTC)) // timedelta(
            microseconds=1
        )
        amount = usage["usage"][0]["unit_microseconds"]["vcpu_hours"]
        assert amount == 7 * (2**53 - 1) * span
        for event in await stored(service):
            assert await service.api.get(f"/v1/events/{event['id']}") == event


async def test_the_page_shows_usage_of_now_and_how_ingest_does(
    run_usage: RunUsage, publish: Publish, settled: Settled
) -> None:
    now = datetime.now(UTC).replace(microsecond=0)
    life = InstanceLife(
        instance_id=LIVES[0].instance_id,
        project_id="p-<now>",
        steps=(Step(at=now - 2 * HOUR, action="create", flavor=LARGE),),
    )
    async with run_usage() as service:
        await publish([message.body() for message in life.messages()])
        await settled(service, len(life.messages()))
        page = await service.api.get("/")
        assert "p-&lt;now&gt;" in page
        assert "in the last 24 hours" in page
        assert re.search(r"\b8\.0\d\b", page)  # 4 vCPUs for two hours, and until the page was made
        # no script but the service's own files
        assert re.findall("<script(?! src=./static/)", page) == []


async def test_the_metrics_count_what_became_of_every_notification(
    run_usage: RunUsage, publish: Publish, settled: Settled
) -> None:
    body = MESSAGES[0].body()
    async with run_usage() as service:
        await publish([body])
        await settled(service, 1)
        await publish([body])
        await settled(service, 1)
        await publish([MESSAGES[1].body()])
        await settled(service, 2)
        fresh = {"event_type": "x.y", "message_id": "fresh", "timestamp": str(datetime.now(UTC))}
        await publish([json.dumps(fresh).encode()])
        await settled(service, 3)
        metrics = await service.api.get("/metrics")
        for line in (
            "# TYPE hostler_usage_unverified_share gauge",
            'hostler_usage_notifications_total{outcome="stored",source="cloud"} 3.0',
            'hostler_usage_notifications_total{outcome="duplicate",source="cloud"} 1.0',
            'hostler_usage_unknown_types_total{source="cloud"} 1.0',
            # those of May, one of them twice
            'hostler_usage_late_notifications_total{source="cloud"} 3.0',
        ):
            assert line in metrics


async def test_the_command_line_reports_usage_and_events(run_with_lives: RunUsage) -> None:
    async with run_with_lives() as service:

        def run(*arguments: str) -> str:
            result = CliRunner().invoke(main, [*arguments, "--url", service.url])
            assert result.exit_code == 0, result.output
            return result.output

        window = ("--start", "2026-05-08", "--end", "2026-05-09")
        report = await asyncio.to_thread(run, "report", *window)
        assert "p1" in report
        assert "10.00" in report
        as_json = await asyncio.to_thread(run, "report", *window, "--json")
        assert '"instance_hours": 36000000000' in as_json
        events = await asyncio.to_thread(run, "events", "--event-type", "volume.delete.end")
        assert "volume.delete.end" in events
