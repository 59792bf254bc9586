"""The life of a process: real processes, real signals, a real broker and database."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
import pytest_asyncio

from hostler_common import bus, db, servers
from hostler_common.db import Connection
from hostler_common.testing import eventually, open_bus, wait_ready


@pytest_asyncio.fixture
async def migrated_url(database_url: str, example_package: str) -> str:
    """A database with the example service's schema."""
    await db.migrate(database_url, schema="example", package=example_package)
    return database_url


@pytest.fixture
def environment(amqp_url: str, migrated_url: str) -> dict[str, str]:
    """Complete settings of the example service."""
    return {
        "HOSTLER_AMQP_URL": amqp_url,
        "HOSTLER_DATABASE_URL": migrated_url,
        "HOSTLER_AUTH_MODE": "none",
        "HOSTLER_EXAMPLE_HTTP_PORT": str(servers.free_port()),
        "HOSTLER_DRAIN_SECONDS": "15",
    }


@pytest_asyncio.fixture
async def handled(migrated_url: str) -> AsyncIterator[Connection]:
    """A connection that sees the service's tables."""
    connection = await asyncpg.connect(migrated_url, server_settings={"search_path": "example"})
    yield connection
    await connection.close()


def test_a_process_may_open_as_much_as_the_system_lets_it() -> None:
    program = (
        "import asyncio, resource\n"
        "from hostler_common import runtime\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (512, 4096))\n"
        "assert runtime.main(asyncio.sleep(0), service='test') == 0\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))\n"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (said.stdout, said.stderr) == ("(4096, 4096)\n", "")


def url(environment: dict[str, str]) -> str:
    return f"http://127.0.0.1:{environment['HOSTLER_EXAMPLE_HTTP_PORT']}"


async def send(amqp_url: str, *message_ids: str) -> None:
    async with open_bus(amqp_url) as opened:
        for message_id in message_ids:
            await opened.publish(
                bus.Message(
                    exchange="hostler",
                    routing_key="work.now",
                    body=b"x",
                    message_id=message_id,
                )
            )


async def left(inbox: Any, queue: str) -> int:
    """How many messages the queue holds."""
    declared = await inbox.queue.channel.declare_queue(queue, passive=True)
    return int(declared.declaration_result.message_count)


async def test_sigterm_finishes_and_acks_the_delivery_at_hand_and_flushes_the_outbox(
    programs: Any,
    environment: dict[str, str],
    tmp_path: Path,
    inbox: Any,
    handled: Connection,
) -> None:
    gate = tmp_path / "gate"
    process = programs.example("serve", **environment, HOSTLER_EXAMPLE_GATE=str(gate))
    await wait_ready(url(environment))
    await send(environment["HOSTLER_AMQP_URL"], "at hand")
    await eventually(lambda: process.has_logged("handling"))
    process.terminate()
    async with httpx.AsyncClient(trust_env=False) as client:

        async def is_draining() -> bool:
            answer = await client.get(f"{url(environment)}/readyz")
            return answer.status_code == 503 and "draining" in answer.text

        await eventually(is_draining)
        assert (await client.get(f"{url(environment)}/healthz")).status_code == 200
        await send(environment["HOSTLER_AMQP_URL"], "too late")
        assert process.process.poll() is None
        gate.touch()
        assert await process.ended() == 0
    assert [row["message_id"] for row in await handled.fetch("SELECT * FROM handled")] == [
        "at hand"
    ]
    assert await handled.fetchval("SELECT count(*) FROM outbox") == 0
    events = [got for got in await inbox.take() if got.type == "example.thing.made"]
    assert [json.loads(got.body) for got in events] == [{"message_id": "at hand"}]
    assert await left(inbox, "example.work") == 1  # the late one, for somebody else
    logged = [json.loads(line)["event"] for line in process.out.splitlines()]
    assert [event for event in logged if event in ("draining", "handled", "drained")] == [
        "draining",
        "handled",
        "drained",
    ]
    assert logged[-1] == "stopped"


async def test_a_handler_that_never_ends_is_left_at_the_deadline_and_its_message_returned(
    programs: Any, environment: dict[str, str], tmp_path: Path, inbox: Any
) -> None:
    environment |= {
        "HOSTLER_DRAIN_SECONDS": "1",
        "HOSTLER_EXAMPLE_GATE": str(tmp_path / "never"),
    }
    process = programs.example("serve", **environment)
    await wait_ready(url(environment))
    await send(environment["HOSTLER_AMQP_URL"], "stuck")
    await eventually(lambda: process.has_logged("handling"))
    process.process.send_signal(signal.SIGINT)
    assert await process.ended(20) == 0
    assert '"event": "drain_deadline_passed"' in process.out

    async def is_returned() -> bool:
        return await left(inbox, "example.work") == 1

    await eventually(is_returned)


async def test_a_client_that_listens_for_ever_does_not_use_up_the_drain(
    programs: Any, environment: dict[str, str]
) -> None:
    environment |= {"HOSTLER_DRAIN_SECONDS": "3"}
    process = programs.example("serve", **environment)
    await wait_ready(url(environment))
    async with (
        httpx.AsyncClient(trust_env=False) as client,
        client.stream("GET", f"{url(environment)}/v1/events") as answer,
    ):
        assert answer.status_code == 200
        events = answer.aiter_text()  # kept, or the stream would be closed with it
        assert await anext(events) == "data: first\n\n"
        process.terminate()
        assert await process.ended(20) == 0
        del events
    assert '"event": "drained"' in process.out
    assert "drain_deadline_passed" not in process.out


@pytest.mark.parametrize("fault", ["loop", "task"])
async def test_a_background_task_that_fails_ends_the_process_with_its_cause_in_the_log(
    programs: Any, environment: dict[str, str], fault: str
) -> None:
    process = programs.example("serve", **environment, HOSTLER_EXAMPLE_FAULT=fault)
    assert await process.ended() == 1
    (line,) = (
        json.loads(line) for line in process.out.splitlines() if '"event": "crashed"' in line
    )
    assert f"LookupError: the {fault} broke" in line["exception"]
    assert line["level"] == "critical"
    assert "hunter2" not in process.out + process.err


async def test_a_loop_that_finds_a_server_away_says_so_once_and_goes_on(
    programs: Any, environment: dict[str, str]
) -> None:
    process = programs.example("serve", **environment, HOSTLER_EXAMPLE_FAULT="unavailable")
    await wait_ready(url(environment))
    async with httpx.AsyncClient(trust_env=False) as client:

        async def several_turns() -> bool:
            shown = (await client.get(f"{url(environment)}/metrics")).text
            assert process.process.poll() is None
            return 'hostler_loop_failing{loop="turn"} 1.0' in shown

        await eventually(several_turns)
        await asyncio.sleep(0.7)  # at least two more turns, which must say nothing
    process.terminate()
    assert await process.ended() == 0
    assert process.out.count('"event": "loop_waits"') == 1


async def test_a_port_in_use_is_one_sentence_and_no_traceback(
    programs: Any, environment: dict[str, str]
) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        process = programs.example(
            "serve", **{**environment, "HOSTLER_EXAMPLE_HTTP_PORT": str(port)}
        )
        assert await process.ended() == 1
    assert process.err == (
        f"hostler-example: cannot listen on 127.0.0.1:{port}: Address already in use\n"
    )
    assert "Traceback" not in process.out


async def test_a_database_that_lacks_migrations_is_refused_with_the_command_to_run(
    programs: Any, environment: dict[str, str], handled: Connection
) -> None:
    await handled.execute("DROP SCHEMA example CASCADE")
    process = programs.example("serve", **environment)
    assert await process.ended() == 1
    lacking = len(db.migrations_of("hostler_example"))
    assert process.err == (
        f"hostler-example: the database lacks {lacking} migrations:"
        " run 'hostler-example migrate' first\n"
    )


async def test_wrong_settings_end_with_2_and_every_one_named(programs: Any) -> None:
    process = programs.example(
        "serve",
        HOSTLER_EXAMPLE_RATIO="-3.25",
        HOSTLER_HTTP_PORT="seventy",
        HOSTLER_DATABASE_URL="postgresql://me:hunter2@db/x",
    )
    assert await process.ended() == 2
    named = {line.partition(":")[0] for line in process.err.splitlines()}
    assert named == {
        "HOSTLER_EXAMPLE_AMQP_URL",
        "HOSTLER_EXAMPLE_RATIO",
        "HOSTLER_EXAMPLE_HTTP_PORT",
        "HOSTLER_EXAMPLE_AUTH_TOKENS_FILE",
    }
    for value in ("-3.25", "seventy", "hunter2"):
        assert value not in process.err + process.out


async def test_while_broker_or_database_are_away_the_service_lives_and_is_not_ready(
    programs: Any, environment: dict[str, str], wire: Any, inbox: Any
) -> None:
    environment |= {"HOSTLER_AMQP_URL": wire.url}
    process = programs.example("serve", **environment)
    await wait_ready(url(environment))
    async with httpx.AsyncClient(trust_env=False) as client:

        async def is_unready() -> bool:
            return (await client.get(f"{url(environment)}/readyz")).status_code == 503

        await wire.cut()
        await eventually(is_unready)
        unready = (await client.get(f"{url(environment)}/readyz")).json()
        assert (await client.get(f"{url(environment)}/healthz")).status_code == 200
        await wire.mend()
        await wait_ready(url(environment))
    failed = {check["name"] for check in unready["checks"] if check["status"] == "fail"}
    assert failed == {"broker"}
    await send(wire.url, "afterwards")
    await eventually(lambda: process.has_logged("handled"))
    process.terminate()
    assert await process.ended() == 0


@pytest.mark.parametrize("batched", [False, True])
async def test_a_consumer_killed_between_commit_and_ack_loses_nothing_and_counts_nothing_twice(
    programs: Any,
    amqp_url: str,
    database_url: str,
    example_package: str,
    tmp_path: Path,
    inbox: Any,
    batched: bool,
) -> None:
    await db.migrate(database_url, schema="mortal", package=example_package)
    environment = {
        "HOSTLER_AMQP_URL": amqp_url,
        "HOSTLER_DATABASE_URL": database_url,
        "HOSTLER_AUTH_MODE": "none",
        "HOSTLER_MORTAL_OMEN": str(tmp_path / "omen"),
        "HOSTLER_MORTAL_BATCHED": str(batched),
    }
    command = (sys.executable, programs.sources / "mortal_consumer.py")
    bodies = [b"harmless", b"fatal", b"harmless", b"harmless"]
    sent = {f"m{n}": body for n, body in enumerate(bodies)}
    queue = bus.Queue(
        name="mortal.work", bindings=(bus.Binding(exchange=bus.HOSTLER, routing_key="work.#"),)
    )
    connection = await asyncpg.connect(database_url, server_settings={"search_path": "mortal"})

    async def nothing(delivery: bus.Delivery) -> None:
        raise AssertionError("this bus only declares the queue")

    class Nowhere:
        async def put(self, delivery: bus.Delivery, *, code: str, reason: str) -> None:
            raise AssertionError("nothing is bad")

    async with open_bus(
        amqp_url, bus.Subscription(queue=queue, handler=nothing, quarantine=Nowhere())
    ):
        pass
    async with open_bus(amqp_url) as opened:
        for message_id, body in sent.items():
            await opened.publish(
                bus.Message(
                    exchange="hostler",
                    routing_key="work.now",
                    body=body,
                    message_id=message_id,
                    mandatory=True,
                )
            )

    killed = programs.start(*command, **environment)
    assert await killed.ended() == -signal.SIGKILL
    committed = await connection.fetch("SELECT message_id, body FROM handled")
    assert b"fatal" in {row["body"] for row in committed}

    survivor = programs.start(*command, **environment)

    async def all_handled() -> bool:
        assert survivor.process.poll() is None, survivor.out + survivor.err
        handed = await connection.fetchval("SELECT count(DISTINCT message_id) FROM handover")
        again = await connection.fetchval("SELECT count(*) FROM handover WHERE message_id = 'm1'")
        return bool(handed == len(sent) and again == 2)

    await eventually(all_handled)
    survivor.terminate()
    assert await survivor.ended() == 0
    rows = await connection.fetch("SELECT message_id, body FROM handled")
    assert sorted((row["message_id"], row["body"]) for row in rows) == sorted(sent.items())
    assert await left(inbox, "mortal.work") == 0
    await connection.close()
