"""From a real broker to the real database: kept byte for byte, once, and folded into usage."""

import asyncio
import json
import random
import zlib
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime, timedelta
from typing import Any

import aio_pika
import asyncpg

from hostler_common import servers, testing
from hostler_common.testing import RunningService
from hostler_usage.testing import (
    LARGE,
    SMALL,
    InstanceLife,
    Message,
    Step,
    VolumeLife,
    VolumeStep,
)

DAY = datetime(2026, 5, 8, tzinfo=UTC)
HOUR = timedelta(hours=1)
US = 3_600_000_000
RunUsage = Callable[..., AbstractAsyncContextManager[RunningService]]
Publish = Callable[..., Awaitable[None]]
Emit = Callable[..., Awaitable[None]]
Settled = Callable[[RunningService, int], Awaitable[dict[str, Any]]]
Stored = Callable[..., Awaitable[list[dict[str, Any]]]]

WEB = InstanceLife(
    instance_id="3a513875-95c9-4012-a3e7-f90c678854e5",
    project_id="p-web",
    steps=(
        Step(at=DAY + HOUR, action="create", flavor=SMALL),
        Step(at=DAY + 4 * HOUR, action="resize", flavor=LARGE),
        Step(at=DAY + 6 * HOUR, action="stop"),
        Step(at=DAY + 9 * HOUR, action="delete"),
    ),
)
DATA = VolumeLife(
    volume_id="2925bb3b-2b51-496a-bb6e-01a20e950e07",
    project_id="p-db",
    steps=(
        VolumeStep(at=DAY + HOUR, action="create", size_gb=10),
        VolumeStep(at=DAY + 3 * HOUR, action="extend", size_gb=25),
        VolumeStep(at=DAY + 5 * HOUR, action="delete"),
    ),
)
MESSAGES = WEB.messages(audits_until=DAY + 12 * HOUR) + DATA.messages(audits_until=DAY + 12 * HOUR)
TRUTH = {
    "p-db": {"volume_hours": 4 * US, "volume_gb_hours": (2 * 10 + 2 * 25) * US},
    "p-web": {
        "instance_hours": 8 * US,
        "vcpu_hours": (3 * 1 + 5 * 4) * US,
        "ram_mb_hours": (3 * 2048 + 5 * 8192) * US,
        "local_gb_hours": (3 * 20 + 5 * 100) * US,
    },
}


def amounts(usage: dict[str, Any]) -> dict[str, dict[str, int]]:
    return {
        row["group"]["project"]: {k: v for k, v in row["unit_microseconds"].items() if v}
        for row in usage["usage"]
    }


def bodies(messages: list[Message]) -> list[bytes]:
    return [message.body("v2" if n % 2 else "v1") for n, message in enumerate(messages)]


async def tally(service: RunningService) -> dict[str, int]:
    """What the service has counted in the transactions that stored it."""
    url = service.settings.database_url.get_secret_value()
    connection = await asyncpg.connect(url)
    try:
        row = await connection.fetchrow(
            "SELECT sum(stored)::int AS stored, sum(duplicate)::int AS duplicate,"
            " sum(conflict)::int AS conflict, sum(unknown_type)::int AS unknown_type,"
            " sum(problem)::int AS problem FROM usage.ingest_tally"
        )
    finally:
        await connection.close()
    return {key: value or 0 for key, value in dict(row or {}).items()}


async def test_a_real_notifier_in_both_envelopes_and_both_dialects_is_billed_right(
    run_usage: RunUsage, emit: Emit, settled: Settled
) -> None:
    async with run_usage() as service:
        nova, cinder = WEB.messages(audits_until=DAY + 12 * HOUR), DATA.messages()
        await emit(nova[::2], driver="messagingv2")
        await emit(nova[1::2], driver="messaging")
        await emit(cinder, driver="messaging", exchange="openstack")
        usage = await settled(service, len(nova) + len(cinder))
        assert amounts(usage) == TRUTH


async def test_a_real_notifier_that_compresses_is_read(
    run_usage: RunUsage, emit: Emit, settled: Settled
) -> None:
    async with run_usage() as service:
        messages = WEB.messages()
        half = len(messages) // 2
        await emit(messages[:half], options={"kombu_compression": "gzip"})
        await emit(messages[half:], options={"kombu_compression": "bzip2"})
        usage = await settled(service, len(messages))
        assert amounts(usage) == {"p-web": TRUTH["p-web"]}


async def test_a_cloud_that_came_first_with_durable_exchanges_is_not_silenced(
    run_usage: RunUsage, emit: Emit, settled: Settled
) -> None:
    messages = WEB.messages()
    options = {"amqp_durable_queues": True}
    await emit(messages[:1], options=options)  # nova declares its exchange durable
    async with run_usage() as service:
        await emit(messages[1:], options=options)
        await settled(service, len(messages) - 1)


async def test_a_cloud_that_comes_after_us_is_not_silenced(
    run_usage: RunUsage, emit: Emit, settled: Settled
) -> None:
    source = {"name": "cloud", "region": "r1", "exchanges": ["nova"], "durable": True}
    async with run_usage(sources=[source]) as service:
        messages = WEB.messages()
        await emit(messages, options={"amqp_durable_queues": True})
        await settled(service, len(messages))


async def test_any_order_and_any_copies_give_the_same_intervals(
    run_usage: RunUsage, publish: Publish, settled: Settled
) -> None:
    seen = []
    async with run_usage(batch_size=7) as service:
        rng = random.Random(7)
        all_bodies = bodies(MESSAGES)
        for _ in range(3):
            order = all_bodies + rng.sample(all_bodies, 30)
            rng.shuffle(order)
            await publish(order)
            usage = await settled(service, len(MESSAGES))
            seen.append((amounts(usage), await intervals(service)))
        copies = 3 * (len(MESSAGES) + 30) - len(MESSAGES)
        await testing.eventually(lambda: counted(service, copies))
    assert seen[0][0] == TRUTH
    assert seen[1] == seen[0]
    assert seen[2] == seen[0]


async def counted(service: RunningService, duplicates: int) -> bool:
    found = await tally(service)
    assert found["duplicate"] <= duplicates
    return found["duplicate"] == duplicates


async def intervals(service: RunningService) -> list[Any]:
    return [
        await service.api.get(f"/v1/resources/{kind}/{name}/intervals")
        for kind, name in (("instance", WEB.instance_id), ("volume", DATA.volume_id))
    ]


async def test_the_intervals_do_not_depend_on_the_database_they_were_made_in(
    run_usage: RunUsage, publish: Publish, settled: Settled, postgres: servers.Postgres
) -> None:
    """Two services that saw the same messages in other orders and batches hold equal histories."""
    histories = []
    admin = await asyncpg.connect(postgres.url)
    for number, size in enumerate((1, 500)):
        name = f"usage_order_{number}"
        await admin.execute(f"CREATE DATABASE {name}")
        url = postgres.url.rsplit("/", 1)[0] + f"/{name}"
        async with run_usage(batch_size=size, database_url=url) as service:
            order = bodies(MESSAGES)
            random.Random(size).shuffle(order)
            await publish(order)
            await settled(service, len(MESSAGES))
            histories.append(await intervals(service))
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await admin.close()
    assert histories[0] == histories[1]


async def test_a_body_is_kept_byte_for_byte_with_how_it_came(
    run_usage: RunUsage, publish: Publish, settled: Settled, stored: Stored, database_url: str
) -> None:
    body = b' {"event_type": "dns.zone.create", "event_type": "dns.zone.create", \n'
    body += b'"timestamp":"2026-05-08 00:00:00", "payload": {"n": 1e2, "name": "a\\u0000b"}}\t'
    packed = zlib.compress(body)
    async with run_usage() as service:
        await publish([packed], exchange="glance", headers={"compression": "application/x-gzip"})
        await settled(service, 1)
        (event,) = await stored(service)
        assert event["event_type"] == "dns.zone.create"
        assert (event["exchange"], event["routing_key"]) == ("glance", "notifications.info")
        assert event["has_own_id"] is False
    connection = await asyncpg.connect(database_url)
    row = await connection.fetchrow("SELECT body, headers FROM usage.raw_event")
    await connection.close()
    assert row is not None
    assert row["body"] == packed
    assert json.loads(row["headers"]) == {"compression": "application/x-gzip"}


async def test_the_api_gives_the_exact_body_back(
    run_usage: RunUsage, publish: Publish, settled: Settled, stored: Stored
) -> None:
    body = MESSAGES[0].body("v1")
    async with run_usage() as service:
        await publish([body])
        await settled(service, 1)
        (event,) = await stored(service)
        assert (await service.api.get(f"/v1/events/{event['id']}/body")).encode() == body


async def test_an_unknown_event_type_is_kept_and_counted(
    run_usage: RunUsage, publish: Publish, settled: Settled
) -> None:
    unknown = b'{"event_type":"x.y","message_id":"m","timestamp":"2026-05-08 00:00:00"}'
    async with run_usage() as service:
        await publish([unknown])
        await settled(service, 1)
        assert (await tally(service))["unknown_type"] == 1
        assert (await service.api.get("/v1/quarantine"))["entries"] == []


async def test_one_id_with_two_bodies_is_two_events_and_one_conflict(
    run_usage: RunUsage, publish: Publish, settled: Settled, stored: Stored
) -> None:
    created = next(m for m in MESSAGES if m.event_type == "compute.instance.create.end")
    async with run_usage() as service:
        await publish([created.body("v1"), created.body("v2"), created.body("v1")])
        await settled(service, 2)
        found = await stored(service, message_id=created.message_id)
        assert {event["message_id"] for event in found} == {created.message_id}
        assert await tally(service) == {
            "stored": 2,
            "duplicate": 1,
            "conflict": 1,
            "unknown_type": 0,
            "problem": 0,
        }


async def test_an_absurd_date_is_kept_flagged_and_not_billed(
    run_usage: RunUsage, publish: Publish, settled: Settled, stored: Stored
) -> None:
    created = next(m for m in MESSAGES if m.event_type == "compute.instance.create.end")
    absurd = created.body("v1").replace(b'"timestamp": "2026', b'"timestamp": "9026')
    async with run_usage() as service:
        await publish([absurd])
        usage = await settled(service, 1)
        (event,) = await stored(service)
        assert event["problems"] == ["absurd_time:timestamp"]
        assert amounts(usage) == {}


async def test_poison_among_a_thousand_lands_alone_in_quarantine(
    run_usage: RunUsage, publish: Publish, settled: Settled
) -> None:
    good = [
        json.dumps(
            {
                "event_type": "x.y",
                "message_id": f"m{n}",
                "timestamp": "2026-05-08 00:00:00",
                "payload": {"n": n},
            }
        ).encode()
        for n in range(1000)
    ]
    poison = b"\xff not a notification \x00"
    async with run_usage(batch_size=250) as service:
        await publish([*good[:613], poison, *good[613:]])
        await settled(service, 1000)

        async def quarantined() -> Any:
            return (await service.api.get("/v1/quarantine"))["entries"]

        (entry,) = await testing.eventually(quarantined)
        assert entry["code"] == "usage.notification.not_utf8"
        assert entry["queue"] == "usage.notifications.cloud"
        assert (await tally(service))["stored"] == 1000


async def test_every_kind_of_unreadable_body_is_quarantined_with_its_reason(
    run_usage: RunUsage, publish: Publish
) -> None:
    bad = {
        "usage.notification.not_json": b"{",
        "usage.notification.not_utf8": b"\xff",
        "usage.notification.bad_envelope": b'{"oslo.version":"3.0","oslo.message":"{}"}',
        "usage.notification.bad_message": b'{"event_type":"x"}',
        "usage.notification.too_large": b"[" + b" " * 70_000 + b"]",
    }
    async with run_usage(max_body_bytes=65_536) as service:
        await publish(list(bad.values()))

        async def all_there() -> Any:
            found = (await service.api.get("/v1/quarantine"))["entries"]
            return found if len(found) == len(bad) else None

        entries = await testing.eventually(all_there)
        assert {entry["code"] for entry in entries} == set(bad)


async def test_a_quarantined_message_is_replayed_into_the_ledger(
    run_usage: RunUsage, publish: Publish, settled: Settled, amqp_url: str
) -> None:
    """Raised limits make an oversized message readable: replay stores it, from another broker."""
    body = MESSAGES[0].body("v1")
    padded = body[:-1] + b', "_pad": "' + b"x" * 4000 + b'"}'
    source = {"name": "r2", "region": "r2", "url": amqp_url}
    async with run_usage(sources=[source], max_body_bytes=4000) as service:
        await publish([padded])

        async def quarantined() -> Any:
            return (await service.api.get("/v1/quarantine"))["entries"]

        (entry,) = await testing.eventually(quarantined)
    async with run_usage(sources=[source]) as service:
        await service.api.post(f"/v1/quarantine/{entry['id']}/replay")
        await settled(service, 1)
        assert (await service.api.get("/v1/quarantine"))["entries"] == []


async def test_two_sources_are_two_regions_and_are_summed_only_when_asked(
    run_usage: RunUsage, rabbitmq: servers.RabbitMQ, publish: Publish, settled: Settled
) -> None:
    other = rabbitmq.make_vhost("usage-second-region")
    sources = [
        {"name": "one", "region": "r1", "exchanges": ["nova"]},
        {"name": "two", "region": "r2", "exchanges": ["nova"], "vhost": "usage-second-region"},
    ]
    created = next(m for m in MESSAGES if m.event_type == "compute.instance.create.end")
    deleted = next(m for m in MESSAGES if m.event_type == "compute.instance.delete.end")
    async with run_usage(sources=sources) as service:
        await publish([created.body(), deleted.body()])
        await settled(service, 2)
        async with await aio_pika.connect(other) as connection:
            channel = await connection.channel()
            exchange = await channel.get_exchange("nova")
            body = deleted.body().replace(b"m1.large", b"m1.other")
            await exchange.publish(aio_pika.Message(body), "notifications.info")
        await settled(service, 3)
        window = {"start": "2026-05-08T00:00:00Z", "end": "2026-05-09T00:00:00Z"}
        rows = (await service.api.get("/v1/usage", group_by="region", **window))["usage"]
        # the first region knows the launch of the resized instance too, the second only that
        assert [(row["group"]["region"], row["hours"]["instance_hours"]) for row in rows] == [
            ("r1", 8.0),
            ("r2", 5.0),
        ]
        (total,) = (await service.api.get("/v1/usage", **window))["usage"]
        assert total["hours"]["instance_hours"] == 13.0
    await asyncio.to_thread(rabbitmq.delete_vhost, "usage-second-region")
