"""Usage's part: a real Notifier tells yesterday's story of two projects, and the hours come out right."""

import asyncio
import json
import sys
import uuid
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from demo.stage import Stage
from hostler_common import bus, client
from hostler_common.testing import eventually, open_bus
from hostler_usage.testing import (
    LARGE,
    LEGACY,
    MEDIUM,
    SMALL,
    InstanceLife,
    Message,
    Step,
    VolumeLife,
    VolumeStep,
)

EMITTER = Path(__file__).parent / "emitter.py"
CUT_OFF = '{"oslo.version": "2.0", "oslo.message": "{\\"_unique_id\\": \\"%s\\", \\"event_ty'
COLUMNS = ("instance_hours", "vcpu_hours", "ram_mb_hours", "volume_hours", "volume_gb_hours")

Lives = tuple[list[InstanceLife], list[VolumeLife]]


def lives(day: datetime, webshop: str, analytics: str) -> Lives:
    """Yesterday in the lives of three instances and two volumes."""

    def at(hour: float) -> datetime:
        return day + timedelta(hours=hour)

    instances = [
        InstanceLife(
            instance_id=str(uuid.uuid4()),
            project_id=webshop,
            steps=(
                Step(at=at(2), action="create", flavor=SMALL),
                Step(at=at(10.5), action="resize", flavor=MEDIUM),
                Step(at=at(20.25), action="delete"),
            ),
        ),
        InstanceLife(
            instance_id=str(uuid.uuid4()),
            project_id=webshop,
            steps=(
                Step(at=at(6), action="create", flavor=LARGE),
                Step(at=at(12), action="stop"),
                Step(at=at(18), action="start"),
            ),
        ),
        InstanceLife(
            instance_id=str(uuid.uuid4()),
            project_id=analytics,
            steps=(
                Step(at=at(9), action="create", flavor=LARGE),
                Step(at=at(21.5), action="delete"),
            ),
        ),
    ]
    volumes = [
        VolumeLife(
            volume_id=str(uuid.uuid4()),
            project_id=webshop,
            steps=(
                VolumeStep(at=at(2), action="create", size_gb=50),
                VolumeStep(at=at(14), action="extend", size_gb=80),
                VolumeStep(at=at(22), action="delete"),
            ),
        ),
        VolumeLife(
            volume_id=str(uuid.uuid4()),
            project_id=analytics,
            steps=(VolumeStep(at=at(9), action="create", size_gb=200),),
        ),
    ]
    return instances, volumes


def truth(webshop: str, analytics: str) -> dict[str, dict[str, float]]:
    """The same day by hand: hours times what was held, up to midnight."""
    return {
        webshop: {
            "instance_hours": 18.25 + 18,
            "vcpu_hours": 8.5 * 1 + 9.75 * 2 + 18 * 4,
            "ram_mb_hours": 8.5 * 2048 + 9.75 * 4096 + 18 * 8192,
            "volume_hours": 20,
            "volume_gb_hours": 12 * 50 + 8 * 80,
        },
        analytics: {
            "instance_hours": 12.5,
            "vcpu_hours": 12.5 * 4,
            "ram_mb_hours": 12.5 * 8192,
            "volume_hours": 15,
            "volume_gb_hours": 15 * 200,
        },
    }


def without_deletes(messages: Iterable[Message], instance_id: str) -> Iterator[Message]:
    """The messages without what tells of the deletion of one instance, but for its last audit."""
    for message in messages:
        data: Any = message.payload.get("nova_object.data", message.payload)
        is_its = instance_id in (data.get("instance_id"), data.get("uuid"))
        is_audit = message.event_type.endswith("exists")
        if not is_its or is_audit or data.get("state") != "deleted":
            yield message


async def emit(stage: Stage, messages: list[Message], *, driver: str, exchange: str) -> None:
    """A real oslo.messaging Notifier sends the messages.

    Raises:
        RuntimeError: it failed; its output is in the message.
    """
    plan = "".join(
        json.dumps(
            {
                "driver": driver,
                "exchange": exchange,
                "topic": message.topic,
                "event_type": message.event_type,
                "publisher_id": message.publisher_id,
                "priority": message.priority,
                "timestamp": message.timestamp.isoformat(),
                "payload": message.payload,
            }
        )
        + "\n"
        for message in messages
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "ignore", str(EMITTER), stage.amqp_url, "{}"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate(plan.encode())
    if process.returncode:
        raise RuntimeError(f"the Notifier failed:\n{output.decode(errors='replace')[-2000:]}")


async def usage_of(
    api: client.Api, day: datetime, projects: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """Yesterday's usage of these projects, by project, from the HTTP API; empty until all is in it.

    What was nothing is not in it.
    """
    answer = await api.get(
        "/v1/usage",
        start=_spelled(day),
        end=_spelled(day + timedelta(days=1)),
        group_by="project",
    )
    if answer["unfolded_resources"]:
        return {}
    rows = {row["group"]["project"]: row["hours"] for row in answer["usage"]}
    return {project: rows[project] for project in projects if project in rows}


def _spelled(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


async def tell(stage: Stage) -> None:
    """Play usage's part of the demo.

    Raises:
        ClaimBroken: something is not as it says.
    """
    now = datetime.now(UTC)
    day = now.replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=1)
    run = uuid.uuid4().hex[:6]  # the ledger may hold earlier runs
    projects = webshop, analytics = f"webshop-{run}", f"analytics-{run}"
    instances, volumes = lives(day, webshop, analytics)
    midnight = day + timedelta(days=1)
    nova = [message for life in instances for message in life.messages(audits_until=midnight)]
    nova = list(without_deletes(nova, instances[2].instance_id))
    cinder = [message for life in volumes for message in life.messages(audits_until=midnight)]

    stage.step("yesterday, told by a real oslo.messaging Notifier")
    legacy = sum(message.topic == LEGACY for message in nova)
    stage.say(
        f"Nova, envelope v2: {legacy} legacy and {len(nova) - legacy} versioned notifications"
        f" of {len(instances)} instances; Cinder, envelope v1: {len(cinder)} of {len(volumes)} volumes"
    )
    stage.say("create, resize, stop, start, extend, delete, hourly audits; one delete is lost")
    await emit(stage, nova, driver="messagingv2", exchange="nova")
    await emit(stage, cinder, driver="messaging", exchange="openstack")

    async with stage.api("usage") as api:
        await eventually(
            lambda: _all_stored(api, day, len(nova) + len(cinder), instances, volumes)
        )
        rows = await eventually(lambda: usage_of(api, day, projects))
        stage.table(
            f"usage per project on {day:%Y-%m-%d}, from /v1/usage",
            ["project", *(name.replace("_", " ") for name in COLUMNS)],
            [[project, *(rows[project].get(name, 0) for name in COLUMNS)] for project in projects],
        )
        expected = truth(webshop, analytics)
        found = {p: {n: rows[p].get(n, 0) for n in COLUMNS} for p in projects}
        stage.check("every hour is the one reckoned by hand", found == expected)

        lost = instances[2].instance_id
        history = await api.get(f"/v1/resources/instance/{lost}/intervals")
        last = history["intervals"][-1]
        stage.check(
            "the instance whose delete was lost ends when it was deleted, and says that an audit told",
            (last["end"], last["provenance"]) == (_spelled(day + timedelta(hours=21.5)), "audit"),
        )

        stage.step("a message that is cut off")
        malformed, message_id = (CUT_OFF % run).encode(), str(uuid.uuid4())
        async with open_bus(stage.amqp_url) as sender:
            await sender.publish(
                bus.Message(
                    exchange="nova",
                    routing_key="notifications.info",
                    body=malformed,
                    message_id=message_id,
                )
            )
        entry = await eventually(lambda: _quarantined(api, message_id))
        stage.say(f"quarantine: {entry['code']}: {entry['reason']}")
        stage.check("it is in quarantine with its reason", entry["body_bytes"] == len(malformed))


async def _all_stored(
    api: client.Api,
    day: datetime,
    expected: int,
    instances: list[InstanceLife],
    volumes: list[VolumeLife],
) -> bool:
    stored = 0
    for resource in [life.instance_id for life in instances] + [
        life.volume_id for life in volumes
    ]:
        page = await api.get("/v1/events", resource_id=resource, start=_spelled(day), limit=1000)
        stored += len(page["events"])
    return stored == expected


async def _quarantined(api: client.Api, message_id: str) -> dict[str, Any] | None:
    entries: list[dict[str, Any]] = (await api.get("/v1/quarantine", limit=1000))["entries"]
    return next((entry for entry in entries if entry["message_id"] == message_id), None)
