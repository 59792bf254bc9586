"""What all hosts talk to is killed while an image spreads: they finish by themselves, and all is told in the end.

That a transfer is in its middle when it happens is not left to how fast anything is: gates hold pieces back.
"""

import asyncio
import json
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import aio_pika
import asyncpg
import pytest_asyncio

from hostler_common import client, db, servers
from hostler_common.testing import eventually, wait_ready
from hostler_precache import app, testing

MIB = 1 << 20
PIECE = 256 * 1024
DATA = testing.image_of(12 * MIB + 99)
PIECES = -(-len(DATA) // PIECE)

StartService = Callable[..., AbstractAsyncContextManager[testing.Program]]


@pytest_asyncio.fixture
async def start_service(database_url: str, tmp_path: Path) -> StartService:
    """`async with start_service(amqp_url=url, settings={}) as program`: always with the same files and rows."""
    await db.migrate(database_url, schema="precache", package=app.PACKAGE)
    return partial(testing.service_process, tmp_path / "seed", database_url=database_url)


async def distribute(
    url: str, source: testing.Source, hosts: Sequence[str], data: bytes = DATA
) -> tuple[str, str]:
    """The image and its distribution, when all of it is at the seed."""
    image_id = str(uuid.uuid4())
    location = source.add(image_id, data)
    async with client.open_api(url) as api:
        body = testing.request_of(image_id, location, data, hosts=list(hosts))
        made = await api.post("/v1/distributions", body)

        async def is_ready() -> bool:
            return bool((await api.get(f"/v1/images/{image_id}"))["state"] == "ready")

        await eventually(is_ready)
    return image_id, made["distribution_id"]


async def ended(url: str, distribution_id: str) -> Mapping[str, Any]:
    """The distribution, once it is over."""
    async with client.open_api(url) as api:
        return await testing.ended(api, distribution_id)


async def logged(name: str, *programs: testing.Program, **fields: object) -> None:
    """Return when each of the programs has logged an event of that name with these fields."""

    async def all_have() -> bool:
        found = (program.events(name) for program in programs)
        return all(any(fields.items() <= one.items() for one in events) for events in found)

    await eventually(all_have)


async def placed(image_id: str, *agents: testing.Program, data: bytes = DATA) -> None:
    """Return when each host has the image under its final name; whatever is there meanwhile is all of it."""

    async def all_have() -> bool:
        files = [agent.directory / image_id for agent in agents]
        there = [file for file in files if file.exists()]
        assert all(file.read_bytes() == data for file in there)
        return len(there) == len(files)

    await eventually(all_have)


async def test_hosts_finish_by_themselves_when_tracker_and_seed_are_killed_and_are_known_to_have_afterwards(
    start_service: StartService, amqp_url: str, tmp_path: Path
) -> None:
    hosts = ["host-1", "host-2", "host-3"]
    blob_port = servers.free_port()
    async with AsyncExitStack() as stack:
        source = await stack.enter_async_context(testing.http_source())
        # no host gets more than half of the image from the seed, and none anything from another one
        seed_url, seed_gate = await stack.enter_async_context(
            testing.gate(blob_port, passes=PIECES // 2, per_host=True)
        )
        settings = {
            "http_port": servers.free_port(), "blob_port": blob_port, "seed_url": seed_url,
        }  # fmt: skip
        service = await stack.enter_async_context(
            start_service(amqp_url=amqp_url, settings=settings)
        )
        image_id, distribution_id = await distribute(service.url, source, hosts)
        agents, gates = [], []
        for host in hosts:
            port = servers.free_port()
            url, gate = await stack.enter_async_context(testing.gate(port, passes=0))
            gates.append(gate)
            agents.append(
                await stack.enter_async_context(
                    testing.agent_process(
                        host,
                        tmp_path / host,
                        amqp_url=amqp_url,
                        precache_url=service.url,
                        http_port=port,
                        settings={"advertise_url": url, "desired_seconds": 1},
                    )
                )
            )

        async def all_is_out_and_all_know_each_other() -> bool:
            out = set().union(*(agent.journaled() for agent in agents))
            known = [
                gate.followers == {*hosts} - {host}
                for host, gate in zip(hosts, gates, strict=True)
            ]
            return len(out) == PIECES and all(known)

        await eventually(all_is_out_and_all_know_each_other)
        await service.kill()
        passed = Counter(seed_gate.passed)
        assert max(len(agent.journaled()) for agent in agents) <= PIECES // 2
        assert sum(gate.passed.total() for gate in gates) == 0
        assert not any((agent.directory / image_id).exists() for agent in agents)

        await logged("report_failed", *agents)
        await logged("desired_unknown", *agents)
        for gate in gates:
            gate.is_open.set()
        await placed(image_id, *agents)
        assert service.process.returncode is not None
        assert not servers.port_answers(blob_port)

        again = await stack.enter_async_context(
            start_service(amqp_url=amqp_url, settings=settings)
        )
        answer = await ended(again.url, distribution_id)
        assert (answer["state"], answer["host_states"]) == ("done", {"cached": 3})
        for host in answer["progress"]:
            from_seed = host["received_from_seed_bytes"]
            assert from_seed + host["received_from_peers_bytes"] == len(DATA)
            assert from_seed <= passed[host["host"]] * PIECE
        assert seed_gate.passed <= passed
        assert source.requests == [image_id]


class Told:
    """What was published on the suite's exchange from `listen` on, by message id, as consumers count it."""

    def __init__(self, queue: aio_pika.abc.AbstractQueue) -> None:
        self._queue = queue
        self.messages: dict[str, tuple[str, Any]] = {}

    @classmethod
    async def listen(cls, connection: aio_pika.abc.AbstractConnection) -> "Told":
        """Somebody who hears all from now on."""
        channel = await connection.channel()
        exchange = await channel.declare_exchange("hostler", "topic", durable=True)
        queue = await channel.declare_queue(exclusive=True)
        await queue.bind(exchange, "#")
        return cls(queue)

    async def read(self) -> None:
        """What has come is among the messages."""
        while (message := await self._queue.get(fail=False, no_ack=True)) is not None:
            said = message.routing_key or "", json.loads(message.body)
            assert self.messages.setdefault(message.message_id or "", said) == said


async def waiting(database: "asyncpg.Connection[Any]") -> dict[str, tuple[str, Any]]:
    """The outbox: what is told, and was not taken by the broker yet, by message id."""
    rows = await database.fetch(
        "SELECT properties->>'message_id' AS message_id, routing_key, body FROM precache.outbox"
        " WHERE exchange = 'hostler' ORDER BY id FOR UPDATE"
    )
    return {row["message_id"]: (row["routing_key"], json.loads(row["body"])) for row in rows}


async def test_an_image_spreads_while_the_broker_is_dead_and_all_that_ended_is_told_when_it_is_back(
    start_service: StartService,
    own_rabbitmq: servers.RabbitMQ,
    database_url: str,
    tmp_path: Path,
) -> None:
    hosts = ["host-1", "host-2"]
    amqp_url, blob_port = own_rabbitmq.url, servers.free_port()
    async with AsyncExitStack() as stack:
        source = await stack.enter_async_context(testing.http_source())
        seed_url, gate = await stack.enter_async_context(
            testing.gate(blob_port, passes=PIECES // 2)
        )
        settings = {"blob_port": blob_port, "seed_url": seed_url}
        service = await stack.enter_async_context(
            start_service(amqp_url=amqp_url, settings=settings)
        )
        agents = [
            await stack.enter_async_context(
                testing.agent_process(
                    host,
                    tmp_path / host,
                    amqp_url=amqp_url,
                    precache_url=service.url,
                    settings={"desired_seconds": 3600},
                )
            )
            for host in hosts
        ]
        database = await asyncpg.connect(database_url)
        stack.push_async_callback(database.close)
        image_id, distribution_id = await distribute(service.url, source, hosts)

        async def half_way() -> bool:
            have_some = all(agent.journaled() for agent in agents)
            is_half = gate.passed.total() == PIECES // 2
            return is_half and have_some and not await waiting(database)

        await eventually(half_way)
        await asyncio.to_thread(own_rabbitmq.kill)
        await logged("broker_lost", service, *agents)
        assert not any((agent.directory / image_id).exists() for agent in agents)

        gate.is_open.set()
        answer = await ended(service.url, distribution_id)
        assert (answer["state"], answer["host_states"]) == ("done", {"cached": 2})
        await placed(image_id, *agents)
        keys = {
            "aggregate.cache_images.progress": 2,
            "aggregate.cache_images.end": 1,
            "precache.distribution.finished": 1,
        }

        async def has_all_that_ended() -> bool:
            return Counter(key for key, _ in (await waiting(database)).values()) == keys

        await eventually(has_all_that_ended)

        async with database.transaction():
            # these rows are locked, so they leave when there is somebody to hear of them, and not sooner
            expected = await waiting(database)
            await asyncio.to_thread(own_rabbitmq.start)
            connection = await stack.enter_async_context(await aio_pika.connect(amqp_url))
            told = await Told.listen(connection)

        async def is_all_told() -> bool:
            await told.read()
            return told.messages.keys() >= expected.keys()

        await eventually(is_all_told)

        async def is_none_left() -> bool:
            return not await waiting(database)

        await eventually(is_none_left)
        await told.read()
        assert told.messages == expected
        by_key: dict[str, list[Any]] = {key: [] for key in keys}
        for key, body in expected.values():
            by_key[key].append(body)
        progress = [
            one["payload"]["nova_object.data"] for one in by_key["aggregate.cache_images.progress"]
        ]
        assert {one["host"] for one in progress} == {*hosts}
        assert {(one["index"], one["total"]) for one in progress} == {(1, 2), (2, 2)}
        assert [one["images_cached"] for one in progress] == [[image_id]] * 2
        (end,) = by_key["aggregate.cache_images.end"]
        assert end["payload"]["nova_object.data"]["uuid"] == distribution_id
        assert end["payload"]["nova_object.data"]["metadata"] == {"state": "done"}
        (finished,) = by_key["precache.distribution.finished"]
        assert finished["hosts"] == {"cached": 2}

        # and hosts hear of what is wanted again
        for program in (service, *agents):
            await wait_ready(program.url)
        other = testing.image_of(MIB, seed=2)
        other_id, _ = await distribute(service.url, source, hosts, data=other)
        await logged("cache_called", *agents, image_id=other_id)
        await placed(other_id, *agents, data=other)
