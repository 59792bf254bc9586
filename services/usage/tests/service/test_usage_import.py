"""Files of notifications go the way that a broker's messages go, and every line has exactly one end."""

import asyncio
import gzip
import json
import random
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import typer
from typer.testing import CliRunner

from hostler_common import auth, bus, client, errors, testing
from hostler_common.testing import RunningService
from hostler_usage.reading import import_api, import_cli
from hostler_usage.reading.event import Event, Tally
from hostler_usage.reading.intake import read_delivery
from hostler_usage.reading.mapping_file import packaged
from hostler_usage.reading.normalise import Normaliser
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
EMITTER = Path(__file__).parents[4] / "scripts" / "demo" / "emitter.py"
RunUsage = Callable[..., AbstractAsyncContextManager[RunningService]]
Publish = Callable[..., Awaitable[None]]
Settled = Callable[[RunningService, int], Awaitable[dict[str, Any]]]
Stored = Callable[..., Awaitable[list[dict[str, Any]]]]

WEB = InstanceLife(
    instance_id="3a513875-95c9-4012-a3e7-f90c678854e5",
    project_id="p-web",
    steps=(
        Step(at=DAY + HOUR, action="create", flavor=SMALL),
        Step(at=DAY + 4 * HOUR, action="resize", flavor=LARGE),
        Step(at=DAY + 9 * HOUR, action="delete"),
    ),
)
DATA = VolumeLife(
    volume_id="2925bb3b-2b51-496a-bb6e-01a20e950e07",
    project_id="p-db",
    steps=(
        VolumeStep(at=DAY + HOUR, action="create", size_gb=10),
        VolumeStep(at=DAY + 5 * HOUR, action="delete"),
    ),
)
MESSAGES = WEB.messages(audits_until=DAY + 12 * HOUR) + DATA.messages()
TRUTH = {
    "p-db": {"volume_hours": 4 * US, "volume_gb_hours": 40 * US},
    "p-web": {
        "instance_hours": 8 * US,
        "vcpu_hours": (3 * 1 + 5 * 4) * US,
        "ram_mb_hours": (3 * 2048 + 5 * 8192) * US,
        "local_gb_hours": (3 * 20 + 5 * 100) * US,
    },
}
BAD = [
    (b"not json", "not_json"),
    (b"\xff\xfe", "not_utf8"),
    (b"[]", "bad_envelope"),
    (b'{"oslo.version": "3.0", "oslo.message": "{}"}', "bad_envelope"),
    (b'{"event_type": "x"}', "bad_message"),
]

app = typer.Typer()
import_cli.register(app)
app.command("nothing")(lambda: None)  # so that `import` is a command of several, as it is


def amounts(usage: dict[str, Any]) -> dict[str, dict[str, int]]:
    return {
        row["group"]["project"]: {k: v for k, v in row["unit_microseconds"].items() if v}
        for row in usage["usage"]
    }


async def run(service: RunningService, *arguments: object) -> Any:
    given = ["import", *map(str, arguments), "--url", service.url]
    return await asyncio.to_thread(CliRunner().invoke, app, given)


async def imported(service: RunningService, *arguments: object) -> dict[str, Any]:
    result = await run(service, *arguments, "--json")
    assert result.exit_code == 0, result.output
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def written(path: Path, lines: Sequence[bytes]) -> Path:
    text = b"".join(line + b"\n" for line in lines)
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


async def tally(service: RunningService) -> dict[str, int]:
    connection = await asyncpg.connect(service.settings.database_url.get_secret_value())
    try:
        row = await connection.fetchrow(
            "SELECT coalesce(sum(stored), 0)::int AS stored,"
            " coalesce(sum(duplicate), 0)::int AS duplicate,"
            " coalesce(sum(conflict), 0)::int AS conflict FROM usage.ingest_tally"
        )
    finally:
        await connection.close()
    assert row is not None
    return dict(row)


async def test_an_archive_is_imported_once_however_often_and_billed_right(
    run_usage: RunUsage, settled: Settled, tmp_path: Path
) -> None:
    bodies = [message.body("v2" if n % 2 else "v1") for n, message in enumerate(MESSAGES)]
    random.Random(1).shuffle(bodies)
    plain = written(tmp_path / "a.ndjson", bodies[:40])
    packed = written(tmp_path / "b.ndjson.gz", [*bodies[30:], b"", b"  "])
    async with run_usage() as service:
        first = await imported(service, plain, packed)
        assert (first["lines"], first["stored"], first["duplicate"]) == (
            len(bodies) + 10,
            len(bodies),
            10,
        )
        again = await imported(service, plain, packed)
        assert (again["stored"], again["duplicate"]) == (0, len(bodies) + 10)
        assert amounts(await settled(service, len(bodies))) == TRUTH
        assert await tally(service) == {
            "stored": len(bodies),
            "duplicate": len(bodies) + 20,
            "conflict": 0,
        }


async def test_what_came_over_the_broker_is_a_duplicate_and_is_told_from_what_was_imported(
    run_usage: RunUsage, publish: Publish, settled: Settled, stored: Stored, tmp_path: Path
) -> None:
    bodies = [message.body() for message in MESSAGES]
    async with run_usage() as service:
        await publish(bodies[::2])
        await settled(service, len(bodies[::2]))
        answer = await imported(service, written(tmp_path / "all.ndjson", bodies))
        assert (answer["stored"], answer["duplicate"]) == (len(bodies[1::2]), len(bodies[::2]))
        assert amounts(await settled(service, len(bodies))) == TRUTH
        events = await stored(service)
        by_key = {event["routing_key"] for event in events}
        assert by_key == {"notifications.info", import_api.ROUTING_KEY}
        assert {(event["source"], event["region"]) for event in events} == {("cloud", "RegionOne")}


LOG_SETUP = """
import logging, runpy, sys
from oslo_log import formatters
handler = logging.FileHandler(sys.argv[1], delay=False)
handler.setFormatter({formatter})
logging.basicConfig(level=logging.INFO, handlers=[handler])
logging.getLogger("nova.compute.manager").info("Took {{1.2}} seconds to do it")
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
FORMATTERS = {
    "json": "formatters.JSONFormatter()",
    "oslo": "logging.Formatter('%(asctime)s.%(msecs)03d %(process)d %(levelname)s %(name)s [None req-1 -"
    " - - -] %(message)s')",
    "bare": "logging.Formatter('%(asctime)s %(levelname)s %(message)s')",
}


@pytest.mark.parametrize("formatter", FORMATTERS)
async def test_what_the_real_log_driver_wrote_is_billed_right(
    formatter: str, run_usage: RunUsage, settled: Settled, tmp_path: Path
) -> None:
    """oslo.messaging's Notifier with driver `log`, in a process of its own, into a log file."""
    log = tmp_path / "nova-compute.log"
    plan = "\n".join(
        json.dumps(
            {
                "driver": "log",
                "exchange": "nova",
                "topic": message.topic,
                "event_type": message.event_type,
                "publisher_id": message.publisher_id,
                "priority": message.priority,
                "timestamp": message.timestamp.isoformat(),
                "payload": message.payload,
            }
        )
        for message in MESSAGES
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-W",
        "ignore",
        "-c",
        LOG_SETUP.format(formatter=FORMATTERS[formatter]),
        str(log),
        str(EMITTER),
        "amqp://nobody.invalid/",
        "{}",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate(plan.encode())
    assert process.returncode == 0, output.decode(errors="replace")[-3000:]
    async with run_usage() as service:
        answer = await imported(service, log)
        assert (answer["stored"], answer["quarantined"]) == (len(MESSAGES), 0)
        assert answer["other"] >= 1
        assert amounts(await settled(service, len(MESSAGES))) == TRUTH


async def test_broken_lines_stop_nothing_and_are_quarantined_listed_and_replayed(
    run_usage: RunUsage, settled: Settled, tmp_path: Path
) -> None:
    bodies = [message.body() for message in MESSAGES]
    lines = [*bodies[:5], *(line for line, _ in BAD), *bodies[5:], bodies[0], BAD[0][0]]
    async with run_usage() as service:
        answer = await imported(service, written(tmp_path / "x.ndjson", lines))
        assert answer["lines"] == len(lines)
        assert answer["stored"] == len(bodies)
        assert answer["duplicate"] == 1
        assert answer["quarantined"] == len(BAD) + 1
        assert answer["quarantined_by_code"] == {
            "usage.notification.bad_envelope": 2,
            "usage.notification.bad_message": 1,
            "usage.notification.not_json": 2,
            "usage.notification.not_utf8": 1,
        }
        assert [item["line"] for item in answer["not_stored"]] == [6, 7, 8, 9, 10, len(lines)]
        assert amounts(await settled(service, len(bodies))) == TRUTH
        entries = (await service.api.get("/v1/quarantine"))["entries"]
        assert [(entry["code"], entry["seen"]) for entry in entries] == [
            (f"usage.notification.{code}", 2 if n == 0 else 1) for n, (_, code) in enumerate(BAD)
        ]
        # what is replayed goes to the source's queue, and is what it was
        connection = await asyncpg.connect(service.settings.database_url.get_secret_value())
        try:
            await connection.execute(
                "UPDATE usage.quarantine SET body = $1 WHERE id = $2",
                Message(
                    topic="notifications",
                    event_type="volume.create.end",
                    publisher_id="volume.ctl1",
                    timestamp=DAY,
                    payload={"volume_id": "v"},
                    message_id="repaired",
                ).body(),
                entries[0]["id"],
            )
        finally:
            await connection.close()
        await service.api.post(f"/v1/quarantine/{entries[0]['id']}/replay")

        async def replayed() -> Any:
            page = await service.api.get("/v1/events", resource_id="v")
            return page["events"]

        (event,) = await testing.eventually(replayed)
        assert (event["source"], event["routing_key"]) == ("cloud", import_api.ROUTING_KEY)


async def test_a_message_in_other_bytes_is_kept_and_counted_as_a_conflict(
    run_usage: RunUsage, settled: Settled, tmp_path: Path
) -> None:
    async with run_usage() as service:
        lines = [message.body(envelope) for message in MESSAGES for envelope in ("v1", "v2")]
        answer = await imported(service, written(tmp_path / "x.ndjson", lines))
        assert (answer["stored"], answer["conflict"]) == (len(lines), len(MESSAGES))
        assert amounts(await settled(service, len(lines))) == TRUTH


async def test_a_file_cut_off_is_imported_as_far_as_it_goes_and_said_to_be(
    run_usage: RunUsage, tmp_path: Path
) -> None:
    bodies = [message.body() for message in MESSAGES]
    cut = tmp_path / "cut.ndjson.gz"
    cut.write_bytes(gzip.compress(b"".join(body + b"\n" for body in bodies))[:-400])
    whole = written(tmp_path / "whole.ndjson", bodies[-3:])
    async with run_usage() as service:
        result = await run(service, cut, whole, "--json")
        assert result.exit_code == 1
        answer = json.loads(result.stdout)
        assert [Path(item["file"]).name for item in answer["broken_files"]] == [cut.name]
        assert 3 <= answer["stored"] <= len(bodies)
        assert answer["lines"] == answer["stored"] + answer["duplicate"] + answer["quarantined"]


def test_a_file_that_is_not_there_is_said_to_be_and_nothing_else(tmp_path: Path) -> None:
    there = written(tmp_path / "there.ndjson", [b"{}"])
    for absent, why in ((tmp_path / "absent", "No such file"), (tmp_path, "Is a directory")):
        given = ["import", str(there), str(absent), "--url", "http://127.0.0.1:9"]
        result = CliRunner().invoke(app, given)
        assert result.exit_code == 1
        assert result.stdout == ""
        said, conclusion = result.stderr.splitlines()
        assert said.startswith(f"{absent} cannot be read: {why}")
        assert conclusion == "Nothing was imported."


async def test_bodies_too_large_are_quarantined_whole_and_lines_beyond_any_bound_are_named(
    run_usage: RunUsage, tmp_path: Path
) -> None:
    good = MESSAGES[0].body()
    large = b'{"padding": "' + b"x" * (5 * 1024 * 1024) + b'"}'
    endless = b"y" * (40 * 1024 * 1024)
    noise = random.Random(1).randbytes(6 * 1024 * 1024).hex().encode()
    file = written(tmp_path / "x.ndjson", [good, large, endless, noise, MESSAGES[1].body()])
    async with run_usage() as service:
        result = await run(service, file, "--json", "--format", "ndjson")
        assert result.exit_code == 1
        answer = json.loads(result.stdout)
        assert [answer[name] for name in ("lines", "stored", "quarantined", "refused")] == [
            5,
            2,
            1,
            2,
        ]
        assert sorted((item["line"], item["code"]) for item in answer["not_stored"]) == [
            (2, "usage.notification.too_large"),
            (3, "usage.import.line_too_long"),
            (4, "usage.import.line_too_long"),
        ]
        (entry,) = (await service.api.get("/v1/quarantine"))["entries"]
        assert entry["body_bytes"] == len(large)


async def test_an_import_that_is_killed_is_run_again_and_nothing_is_doubled(
    run_usage: RunUsage, settled: Settled, tmp_path: Path
) -> None:
    bodies = [message.body() for message in MESSAGES]
    async with run_usage() as service:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            "import typer; from hostler_usage.reading import import_cli; app = typer.Typer();"
            " import_cli.BATCH_LINES = 5; import_cli.register(app); app()",
            "-",
            "--url",
            service.url,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
        )
        assert process.stdin is not None
        process.stdin.write(b"".join(body + b"\n" for body in bodies[:20]))
        await process.stdin.drain()

        async def begun() -> Any:
            return (await tally(service))["stored"]

        await testing.eventually(begun)
        process.send_signal(signal.SIGKILL)
        await process.wait()
        before = (await tally(service))["stored"]
        assert 0 < before < len(bodies)
        answer = await imported(service, written(tmp_path / "x.ndjson", bodies))
        assert answer["stored"] + answer["duplicate"] == len(bodies)
        assert amounts(await settled(service, len(bodies))) == TRUTH
        assert (await tally(service))["stored"] == len(bodies)


# --- the API


async def test_only_an_operator_of_everything_imports(run_usage: RunUsage, tmp_path: Path) -> None:
    made = {
        (role, projects): auth.new_token(name=f"{role}-{n}", role=role, projects=projects)
        for n, (role, projects) in enumerate(
            [
                (auth.Role.READER, "*"),
                (auth.Role.AGENT, "*"),
                (auth.Role.OPERATOR, "p-web"),
                (auth.Role.OPERATOR, "*"),
            ]
        )
    }
    tokens = tmp_path / "tokens"
    tokens.write_text("".join(f"{line}\n" for _, line in made.values()))
    async with run_usage(auth_mode="token", auth_tokens_file=tokens) as service:
        for (role, projects), (token, _) in made.items():
            async with client.open_api(service.url, token=token) as api:
                if (role, projects) == (auth.Role.OPERATOR, "*"):
                    assert (await api.post("/v1/imports?source=cloud"))["lines"] == 0
                    continue
                with pytest.raises(errors.Forbidden):
                    await api.post("/v1/imports?source=cloud")


@pytest.mark.parametrize("source", ["elsewhere", "hostler"])
async def test_a_source_that_is_not_configured_is_refused_with_the_names_of_those_that_are(
    source: str, run_usage: RunUsage, tmp_path: Path
) -> None:
    """hostler's own messages have their envelope in AMQP: a file of bodies does not hold them."""
    file = written(tmp_path / "x.ndjson", [MESSAGES[0].body()])
    async with run_usage() as service:
        result = await run(service, file, "--source", source)
        assert result.exit_code == 1
        assert "usage.import.source_unknown" in result.stderr
        assert "only cloud" in result.stderr


async def post(service: RunningService, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    """The status and the answer to a request with these bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", service.settings.http_port)
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    writer.write(
        f"POST /v1/imports?source=cloud HTTP/1.1\r\nHost: h\r\nConnection: close\r\n{head}"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    answer = await reader.read()
    writer.close()
    first, _, rest = answer.partition(b"\r\n")
    return int(first.split()[1]), json.loads(rest.partition(b"\r\n\r\n")[2])


async def test_requests_are_bounded_in_bytes_in_lines_and_once_decompressed(
    run_usage: RunUsage,
) -> None:
    bomb = gzip.compress(b"\n" * (import_api.MAX_PLAIN_BYTES + 1))
    async with run_usage() as service:
        for body, headers, expected in [
            (bomb, {"Content_Encoding": "gzip"}, (413, "usage.import.batch_too_large")),
            (b"{}\n" * 2001, {}, (422, "usage.import.batch_invalid")),
            (b"no gzip", {"Content_Encoding": "gzip"}, (422, "usage.import.batch_invalid")),
            (
                gzip.compress(b"{}")[:-4],
                {"Content_Encoding": "gzip"},
                (422, "usage.import.batch_invalid"),
            ),
            (b"{}", {"Content_Encoding": "br"}, (422, "usage.import.batch_invalid")),
        ]:
            status, answer = await post(service, body, **headers)
            assert (status, answer["code"]) == expected
        status, answer = await post(service, b"\n\r\n" + MESSAGES[0].body() + b"\r\nbad")
        assert (status, answer["lines"], answer["stored"]) == (200, 2, 1)
        assert [item["line"] for item in answer["quarantine"]] == [4]
        assert await tally(service) == {"stored": 1, "duplicate": 0, "conflict": 0}


# --- what the database refuses


class Keeper:
    """Quarantine in memory."""

    def __init__(self) -> None:
        self.kept: list[tuple[bytes, str]] = []

    async def put(self, delivery: bus.Delivery, *, code: str, reason: str) -> None:
        self.kept.append((delivery.body, code))


class Refusing:
    """An intake whose ledger refuses some events, as PostgreSQL might."""

    def __init__(self, *refused: str) -> None:
        self._refused = refused
        self._normaliser = Normaliser(packaged())
        self.stored: list[str] = []

    def read(self, delivery: bus.Delivery) -> Event:
        return read_delivery(delivery, source="cloud", region="r1", normaliser=self._normaliser)

    async def keep(self, events: Sequence[Event]) -> Tally:
        names = [event.notification.message_id for event in events]
        if "away" in self._refused:
            raise errors.Unavailable("the database is away")
        if set(names) & set(self._refused):
            raise ValueError("no column could hold it")
        self.stored += names
        return Tally(stored=len(names))


async def test_a_message_that_the_ledger_refuses_is_quarantined_alone() -> None:
    refused = [MESSAGES[3].message_id, MESSAGES[17].message_id]
    intake, keeper = Refusing(*refused), Keeper()
    importer = import_api.Importer(
        intakes={"cloud": intake}, queues={"cloud": "q"}, quarantine=keeper
    )
    outcome = await importer.take("cloud", [message.body() for message in MESSAGES])
    assert [item.line for item in outcome.quarantined] == [4, 18]
    assert {code for _, code in keeper.kept} == {"message.handler_failed"}
    assert outcome.tally.stored == len(MESSAGES) - 2
    assert sorted(intake.stored) == sorted(
        message.message_id for message in MESSAGES if message.message_id not in refused
    )


async def test_a_database_that_is_away_quarantines_nothing() -> None:
    keeper = Keeper()
    importer = import_api.Importer(
        intakes={"cloud": Refusing("away")}, queues={"cloud": "q"}, quarantine=keeper
    )
    with pytest.raises(errors.Unavailable):
        await importer.take("cloud", [message.body() for message in MESSAGES])
    assert keeper.kept == []
