"""A whole Nova lives through a day; our totals are those of Nova's own rows.

Nova, its API, scheduler, conductor and computes run in a process and an environment of their own
(peers/nova_day.py) and send real notifications to the broker that usage listens to. What was used
is then reckoned twice: by usage, from the notifications, and here, from the writes to Nova's table
of instances, which a trigger of that table kept and no notification has touched.

The reckoning here takes Nova's word for the moments: an instance is held from its first launched_at
until its terminated_at (as in Nova's own os-simple-tenant-usage; deleted_at follows some tenths of a
second later, when the row is marked); whenever launched_at is set anew it has the size that the row
shows from then on. How far usage may be from that is stated in three parts, each per edge (a birth, a death, a change
of size by so many units):

- legacy notifications, rows with microseconds: nothing. Both tell the same moments exactly.
- rows of whole seconds, as MySQL keeps them: a legacy `.end` says the moment before it is rounded, so
  half a second lies between.
- versioned notifications alone: they cut every moment to its second, the database rounds it: up to
  one second.

The state of an instance has no moment in its row. It holds from the time of the event that shows it,
sent when the row is written: within a second of the write, and the edge's own leeway where it is
the state that a launch ends in.
"""

import asyncio
import json
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import aio_pika
import asyncpg
import pytest

from hostler_common import servers
from hostler_common.testing import RunningService, RunService, eventually
from hostler_usage import app
from hostler_usage.settings import Settings

PEERS = Path(__file__).parent / "peers"
SECOND = 1_000_000  # in microseconds
HOUR = timedelta(hours=1)
STATE_CLASSES = {
    "active": "running",
    "resized": "running",
    "rescued": "running",
    "stopped": "stopped",
    "paused": "paused",
    "suspended": "suspended",
    "shelved": "shelved",
    "shelved_offloaded": "shelved_offloaded",
    "soft-delete": "soft_deleted",
}

Units = dict[str, int]
Timeline = list[tuple[datetime, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one instance held, unchanged, from `start` to `end`, by Nova's rows."""

    start: datetime
    end: datetime
    group: tuple[str, ...]
    units: Units


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """A message as it lay in the broker."""

    routing_key: str
    body: bytes

    @property
    def is_versioned(self) -> bool:
        return self.routing_key.startswith("versioned_")


# --- Nova's truth


def moment(text: str | None) -> datetime | None:
    """A moment of Nova's database, which are in UTC without saying so."""
    if text is None:
        return None
    parsed = datetime.fromisoformat(text)
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)


def day_of(day: dict[str, Any]) -> tuple[datetime, datetime]:
    """The day as a window; after it Nova was stopped."""
    start = datetime.fromisoformat(day["day"])
    return start, start + 24 * HOUR


def held(row: dict[str, Any]) -> Units:
    return {
        "instance_hours": 1,
        "vcpu_hours": row["vcpus"],
        "ram_mb_hours": row["memory_mb"],
        "local_gb_hours": row["root_gb"] + row["ephemeral_gb"],
    }


def lives(day: dict[str, Any]) -> Iterator[tuple[list[dict[str, Any]], datetime]]:
    """The changes of each instance that ever ran, and when it went: the day's end at the latest."""
    changes = defaultdict(list)
    for row in day["changes"]:
        changes[row["uuid"]].append(row)
    for row in day["instances"]:
        end = moment(row["terminated_at"]) or day_of(day)[1] + 24 * HOUR
        if row["launched_at"] is not None:
            yield changes[row["uuid"]], end


def sizes(day: dict[str, Any]) -> list[Piece]:
    """By project and instance: a piece from each launch to the next."""
    pieces = []
    for changes, end in lives(day):
        launches: list[tuple[datetime, dict[str, Any]]] = []
        for row in changes:
            at = moment(row["launched_at"])
            if at is not None and (not launches or launches[-1][0] != at):
                launches.append((at, row))
        for (start, row), (stop, _) in pairwise([*launches, (end, {})]):
            group = (row["project_id"], row["uuid"])
            pieces.append(Piece(start=start, end=stop, group=group, units=held(row)))
    return pieces


def timelines(day: dict[str, Any]) -> dict[str, Timeline]:
    """Of each instance: when it came into which class of state, by the writes, and when it went."""
    found = {}
    for changes, end in lives(day):
        course: Timeline = []
        for row in changes:
            if row["launched_at"] is None or row["vm_state"] == "deleted":
                continue
            at = moment(row["at"] if course else row["launched_at"])
            state_class = STATE_CLASSES[row["vm_state"]]
            assert at is not None
            if not course or course[-1][1] != state_class:
                course.append((at, state_class))
        if end < day_of(day)[1]:
            course.append((end, "gone"))
        found[changes[0]["uuid"]] = course
    return found


def assert_same_course(ours: Timeline, theirs: Timeline, *, per_edge: int) -> None:
    """The same states in the same order, each from within a second of the write.

    The state that a launch ends in holds from the launch, which a dialect may have cut: then the
    edge's own leeway comes on top of that second.
    """
    leeway = timedelta(seconds=1, microseconds=per_edge)
    assert [state for _, state in ours] == [state for _, state in theirs], (ours, theirs)
    for (at, state), (noted, _) in zip(ours, theirs, strict=True):
        assert abs(at - noted) <= leeway, (state, at, noted)


def reckoned(
    pieces: Iterable[Piece], start: datetime, end: datetime
) -> dict[tuple[str, ...], Units]:
    """Unit-microseconds of each group in the window."""
    totals: dict[tuple[str, ...], Units] = {}
    for piece in pieces:
        span = (min(end, piece.end) - max(start, piece.start)) // timedelta(microseconds=1)
        if span > 0:
            total = totals.setdefault(piece.group, dict.fromkeys(piece.units, 0))
            for name, units in piece.units.items():
                total[name] += span * units
    return totals


def leeway(
    pieces: Iterable[Piece], start: datetime, end: datetime, per_edge: int
) -> dict[tuple[str, ...], Units]:
    """How far off a total may be if each edge in the window is off by `per_edge` microseconds."""
    steps: dict[tuple[tuple[str, ...], datetime], Counter[str]] = defaultdict(Counter)
    for piece in pieces:
        steps[piece.group, piece.start].update(piece.units)
        steps[piece.group, piece.end].subtract(piece.units)
    allowed: dict[tuple[str, ...], Units] = {}
    margin = timedelta(microseconds=per_edge)
    for (group, edge), step in steps.items():
        limits = allowed.setdefault(group, dict.fromkeys(step, 0))
        if start - margin < edge < end + margin:
            for name, units in step.items():
                limits[name] += abs(units) * per_edge
    return allowed


def of_projects(totals: dict[tuple[str, ...], Units]) -> dict[tuple[str, ...], Units]:
    """What the instances of each project make together."""
    summed: dict[tuple[str, ...], Units] = {}
    for group, units in totals.items():
        total = summed.setdefault(group[:1], dict.fromkeys(units, 0))
        for name, amount in units.items():
            total[name] += amount
    return summed


def agree(
    ours: dict[tuple[str, ...], Units],
    theirs: dict[tuple[str, ...], Units],
    allowed: dict[tuple[str, ...], Units],
) -> None:
    """No group's totals are further apart than allowed."""
    found = []
    for group in sorted(ours.keys() | theirs.keys()):
        mine, other = ours.get(group, {}), theirs.get(group, {})
        for name in sorted(mine.keys() | other.keys()):
            off = mine.get(name, 0) - other.get(name, 0)
            limit = allowed.get(group, {}).get(name, 0)
            if abs(off) > limit:
                found.append(f"{group} {name}: off by {off / SECOND} unit-s of {limit / SECOND}")
    assert found == []


# --- the day


@pytest.fixture(scope="session")
def nova_environment() -> Path:
    """Nova, installed."""
    done = subprocess.run(
        [sys.executable, str(PEERS / "build.py"), "nova"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return Path(done.stdout.strip())


async def live_through(
    environment: Path, amqp_url: str, work: Path, *, notifications: str, rows: str
) -> dict[str, Any]:
    """Nova's own truth of a day that it has just been driven through."""
    process = await asyncio.create_subprocess_exec(
        *(str(environment / "bin" / "python"), str(PEERS / "nova_day.py")),
        *("--amqp-url", amqp_url, "--format", notifications, "--rows", rows),
        *("--output", str(work / "day.json")),
        cwd=work,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        _, complaint = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0, complaint.decode(errors="replace")[-4000:]
    day: dict[str, Any] = json.loads((work / "day.json").read_bytes())
    return day


@asynccontextmanager
async def overheard(amqp_url: str, exchange: str) -> AsyncIterator[list[Body]]:
    """Everything that is published to the exchange (which must exist), as it comes."""
    heard: list[Body] = []

    async def hear(message: aio_pika.abc.AbstractIncomingMessage) -> None:
        heard.append(Body(routing_key=message.routing_key or "", body=message.body))

    async with await aio_pika.connect(amqp_url) as connection:
        channel = await connection.channel()
        queue = await channel.declare_queue(exclusive=True)
        await queue.bind(exchange, "#")
        await queue.consume(hear, no_ack=True)
        yield heard


async def publish(amqp_url: str, exchange: str, bodies: Sequence[Body]) -> None:
    async with await aio_pika.connect(amqp_url) as connection:
        channel = await connection.channel(publisher_confirms=True)
        target = await channel.get_exchange(exchange)
        for item in bodies:
            message = aio_pika.Message(item.body, content_type="application/json")
            await target.publish(message, item.routing_key)


# --- usage's answers


async def stored_ids(service: RunningService) -> Counter[str]:
    ids: Counter[str] = Counter()
    marker = None
    while True:
        page = await service.api.get("/v1/events", limit=1000, marker=marker)
        ids.update(event["message_id"] for event in page["events"])
        marker = page["next_marker"]
        if marker is None:
            return ids


async def settled(service: RunningService, expected: int) -> Counter[str]:
    """The ids of the messages that are stored, once there are so many and all are folded."""

    async def holds() -> Any:
        ids = await stored_ids(service)
        if ids.total() < expected:
            return None
        answer = await service.api.get(
            "/v1/usage", start="2026-05-08T00:00:00Z", end="2026-05-09T00:00:00Z"
        )
        return ids if answer["unfolded_resources"] == 0 else None

    ids: Counter[str] = await eventually(holds, seconds=120, every_seconds=0.5)
    return ids


async def answered(
    service: RunningService, start: datetime, end: datetime, *names: str
) -> dict[tuple[str, ...], Units]:
    """What usage says was held in the window, in unit-microseconds, by group."""
    answer = await service.api.get(
        "/v1/usage",
        start=start.isoformat(),
        end=end.isoformat(),
        group_by=",".join(names),
        resource_type="instance",
    )
    measures = ("instance_hours", "vcpu_hours", "ram_mb_hours", "local_gb_hours")
    return {
        tuple(row["group"][name] for name in names): {
            measure: row["unit_microseconds"][measure] for measure in measures
        }
        for row in answer["usage"]
        if row["unit_microseconds"]["instance_hours"] > 0
    }


async def timeline(service: RunningService, instance_id: str) -> Timeline:
    """When usage says that an instance came into which class of state, and when it went."""
    answer = await service.api.get(f"/v1/resources/instance/{instance_id}/intervals")
    course: Timeline = []
    for interval in answer["intervals"]:
        if not course or course[-1][1] != interval["state_class"]:
            course.append((datetime.fromisoformat(interval["start"]), interval["state_class"]))
    if (end := answer["intervals"][-1]["end"]) is not None:
        course.append((datetime.fromisoformat(end), "gone"))
    return course


async def check(service: RunningService, day: dict[str, Any], *, per_edge: int) -> None:
    """Usage agrees with Nova's rows: every instance, every project by the day and by the hour, every state of it."""
    whole = start, _ = day_of(day)
    hours = [(start + hour * HOUR, start + (hour + 1) * HOUR) for hour in range(24)]
    pieces = sizes(day)
    ours = await answered(service, *whole, "project", "resource")
    agree(ours, reckoned(pieces, *whole), leeway(pieces, *whole, per_edge))
    for window in [whole, *hours]:
        ours = await answered(service, *window, "project")
        theirs, allowed = reckoned(pieces, *window), leeway(pieces, *window, per_edge)
        agree(ours, of_projects(theirs), of_projects(allowed))
    for instance_id, theirs_of_it in timelines(day).items():
        ours_of_it = await timeline(service, instance_id)
        assert_same_course(ours_of_it, theirs_of_it, per_edge=per_edge)


async def run_of(
    service: RunningService, environment: Path, amqp_url: str, work: Path, **how: str
) -> tuple[dict[str, Any], list[Body]]:
    """A day, stored and folded to the last message: Nova's truth, and what it sent."""
    async with overheard(amqp_url, "nova") as bodies:
        day = await live_through(environment, amqp_url, work, **how)
        sent = Counter(message["message_id"] for message in day["sent"])
        assert len(sent) == sent.total() > 900
        ids = await settled(service, sent.total())

        async def all_heard() -> bool:
            return len(bodies) >= sent.total()

        await eventually(all_heard)
    assert ids == sent, "what Nova sent is what is stored, each once"
    assert len(bodies) == sent.total()
    assert (await service.api.get("/v1/quarantine"))["entries"] == []
    return day, bodies


def the_day_has_everything(day: dict[str, Any]) -> None:
    """The day went as the plan says: what it is to show has happened in Nova."""
    assert len(day["servers"]) > 20
    assert len({row["project_id"] for row in day["instances"]}) == 4
    actions = Counter(row["action"] for row in day["actions"])
    assert actions.keys() >= {
        "create", "resize", "confirmResize", "revertResize", "rebuild", "stop", "start", "suspend",
        "resume", "shelve", "shelveOffload", "unshelve", "pause", "rescue", "delete",
    }  # fmt: skip
    assert Counter(row["status"] for row in day["migrations"]) == {
        "confirmed": 4, "reverted": 2, "error": 1, "finished": 1, "completed": 1,
    }  # fmt: skip
    never = [row for row in day["instances"] if row["launched_at"] is None]
    assert len(never) == 2


NOVA_MINUTES = 8  # for one run and its checks, on a machine that is busy with other tests


@asynccontextmanager
async def usage_alone(
    rabbitmq: servers.RabbitMQ, postgres: servers.Postgres, run_service: RunService, name: str
) -> AsyncIterator[tuple[RunningService, str]]:
    """A service with a broker and a database of its own beside the test's."""
    address = rabbitmq.make_vhost(name)
    admin = await asyncpg.connect(postgres.url)
    await admin.execute(f'CREATE DATABASE "{name}"')
    database_url = postgres.url.rsplit("/", 1)[0] + f"/{name}"
    try:
        async with run_usage(run_service, amqp_url=address, database_url=database_url) as service:
            yield service, address
    finally:
        await admin.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
        await admin.close()
        rabbitmq.delete_vhost(name)


def run_usage(
    run_service: RunService, **overrides: Any
) -> AbstractAsyncContextManager[RunningService]:
    return run_service(
        app.serve, Settings, app.PACKAGE, fold_seconds=0.2, log_level="WARNING", **overrides
    )


@pytest.mark.timeout(60 * NOVA_MINUTES)
async def test_a_day_of_nova_is_counted_as_novas_rows_say_and_in_either_dialect_alone(
    nova_environment: Path,
    rabbitmq: servers.RabbitMQ,
    postgres: servers.Postgres,
    amqp_url: str,
    run_service: RunService,
    tmp_path: Path,
) -> None:
    """Both formats from a database of whole seconds; then each half of the messages for itself."""
    async with run_usage(run_service) as service:
        day, bodies = await run_of(
            service, nova_environment, amqp_url, tmp_path, notifications="both", rows="seconds"
        )
        the_day_has_everything(day)
        await check(service, day, per_edge=SECOND // 2)
        window = day_of(day)
        totals = {"both": await answered(service, *window, "project")}
    for name, is_versioned in {"legacy": False, "versioned": True}.items():
        half = [item for item in bodies if item.is_versioned is is_versioned]
        alone = f"nova-day-{name}"
        async with usage_alone(rabbitmq, postgres, run_service, alone) as (service, address):
            await publish(address, "nova", half)
            await settled(service, len(half))
            await check(service, day, per_edge=SECOND)
            totals[name] = await answered(service, *window, "project")
    allowed = of_projects(leeway(sizes(day), *window, SECOND))
    for one, other in combinations(totals.values(), 2):
        agree(one, other, allowed)


@pytest.mark.timeout(60 * NOVA_MINUTES)
@pytest.mark.parametrize(
    ("notifications", "rows", "per_edge"),
    [
        pytest.param("unversioned", "microseconds", 0, id="legacy-to-the-microsecond"),
        pytest.param("versioned", "seconds", SECOND, id="versioned-to-the-second"),
    ],
)
async def test_a_nova_that_sends_one_dialect_is_counted_as_its_rows_say(
    nova_environment: Path,
    amqp_url: str,
    run_service: RunService,
    tmp_path: Path,
    notifications: str,
    rows: str,
    per_edge: int,
) -> None:
    async with run_usage(run_service) as service:
        day, _ = await run_of(
            service, nova_environment, amqp_url, tmp_path, notifications=notifications, rows=rows
        )
        the_day_has_everything(day)
        await check(service, day, per_edge=per_edge)
