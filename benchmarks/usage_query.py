"""How long a question takes over a month of a large cloud, and what an event takes on the disk.

    python benchmarks/usage_query.py [--scale 0.1] [--questions 30] [--without-disk]

The cloud at scale 1 has 10,000 instances in 500 projects; in its month each is created, resized, stopped and
started about sixty times in all, so that it has about sixty intervals, and half are deleted. Nova would say this in
1,300 messages an instance. The messages that no interval begins or ends with would change nothing in the tables
that answer, so:

- the **disk** is measured with all 1,300 messages of some instances (720 hourly `exists`, 600 others), before the
  rest;
- the **questions** are measured with the messages that end an operation, of all instances, read from the broker and
  folded by the real service, at half the scale first and then at the scale: the slope is what the second half added
  to the fastest time. Until here nothing is written into its tables by anybody else.

To fold the messages of 10,000 instances takes long. So the **whole cloud** is made of the one at the scale: its
intervals, amounts and sums of days, as the service wrote them, are copied under other names of projects and resources
until there are as many instances. Then a **year** is made of the month: the sums of days are copied into the eleven
months before, and so are the intervals of the first projects, one of which is asked about; answers must not take
longer for it.

Of all projects by day it is asked for the month, and for windows that begin or end in the middle of a day as well:
these have a day that no sum answers for.

Questions are asked over HTTP one after the other, from the request's first byte to the answer's last, every page of
it; the figure is the median. The sum of every answer about all projects must be the hours that the timelines give.
"""

import argparse
import asyncio
import http.client
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import urlencode, urlsplit

import asyncpg

import bench
import usage_cloud
import usage_service
from hostler_usage.testing import LEGACY, Flavor, InstanceLife, Message, Step
from usage_cloud import Window

FULL_CLOUD = 10_000
INSTANCES_PER_PROJECT = 20
OPERATIONS = 60
OTHERS = 600
WHOLE_INSTANCES = 20
ROWS_A_PAGE = "20000"
MONTHS_BEFORE = 11
PROJECTS_WITH_A_YEAR = 20
WITHIN = "within"
"""Said of a question's begin or end: it is not the month's, but half a day into it, or before it."""
HALF_A_DAY = timedelta(hours=12)
QUESTIONS = {
    "all_projects_by_day_ms": {"group_by": "project,day"},
    "all_projects_by_day_in_pages_ms": {"group_by": "project,day", "limit": "1000"},
    "all_projects_until_within_a_day_ms": {"group_by": "project,day", "end": WITHIN},
    "all_projects_until_within_a_day_in_pages_ms": {
        "group_by": "project,day",
        "end": WITHIN,
        "limit": "1000",
    },
    "all_projects_from_within_a_day_ms": {
        "group_by": "project,day",
        "start": WITHIN,
        "end": WITHIN,
    },
    "all_projects_ms": {"group_by": "project"},
    "one_project_ms": {"group_by": "resource", "project_id": usage_cloud.digest_hex("project 0")},
    "one_project_by_day_ms": {
        "group_by": "day",
        "project_id": usage_cloud.digest_hex("project 0"),
    },
}
FLAVORS = tuple(
    Flavor(item.name, item.vcpus, item.memory_mb, item.root_gb, item.ephemeral_gb)
    for item in usage_cloud.FLAVORS
)


# --- the cloud


def project(number: int) -> str:
    """The project of an instance."""
    return usage_cloud.digest_hex(f"project {number // INSTANCES_PER_PROJECT}")


def life(number: int, window: Window) -> InstanceLife:
    """An instance that is created on the first day, and half of which are deleted on the last."""
    chance = random.Random(number)  # noqa: S311  a reproducible cloud
    length = int((window.end - window.start).total_seconds())
    moments = sorted(chance.sample(range(600, length - 1200, 600), OPERATIONS))
    steps = [Step(at=_at(window, moments[0]), action="create", flavor=FLAVORS[number % 5])]
    is_stopped = False
    for moment in moments[1:]:
        at = _at(window, moment)
        if is_stopped:
            steps.append(Step(at=at, action="start"))
            is_stopped = False
        elif chance.random() < 0.3:
            steps.append(Step(at=at, action="resize", flavor=chance.choice(FLAVORS)))
        else:
            steps.append(Step(at=at, action="stop"))
            is_stopped = True
    if number % 2:
        steps.append(Step(at=_at(window, length - 600), action="delete"))
    return InstanceLife(
        instance_id=usage_cloud.digest_uuid(f"asked {number}"),
        project_id=project(number),
        steps=tuple(steps),
        host=f"cmp-{number // 25:04}",
    )


def _at(window: Window, seconds: int) -> datetime:
    return window.start + timedelta(seconds=seconds)


def held_microseconds(lives: Iterable[InstanceLife], window: Window) -> int:
    """What the instances were there, in sum."""
    held = timedelta(0)
    for each in lives:
        is_deleted = each.steps[-1].action == "delete"
        end = min(each.steps[-1].at, window.end) if is_deleted else window.end
        held += max(timedelta(0), end - max(each.steps[0].at, window.start))
    return held // timedelta(microseconds=1)


def decisive(lives: Iterable[InstanceLife]) -> Iterator[bytes]:
    """The messages that end an operation."""
    for each in lives:
        for message in each.messages():
            if message.topic == LEGACY and message.event_type.endswith(".end"):
                yield message.body()


def whole(lives: Iterable[InstanceLife], window: Window) -> list[bytes]:
    """Everything Nova says of the instances: hourly audits, operations, and reboots up to 600 others."""
    bodies = []
    for each in lives:
        sent = [item for item in each.messages(audits_until=window.end) if item.topic == LEGACY]
        audits = [item for item in sent if item.event_type.endswith(".exists")]
        bodies += [item.body() for item in sent]
        pairs = max(0, OTHERS - (len(sent) - len(audits))) // 2
        for number, audit in enumerate(audits[:pairs]):
            for place, phase in enumerate(("start", "end")):
                bodies.append(_reboot(audit, phase, number, place).body())
    return bodies


def _reboot(audit: Message, phase: str, number: int, place: int) -> Message:
    """A reboot shortly after the audit, with what the audit said."""
    payload = {
        name: value
        for name, value in audit.payload.items()
        if not name.startswith("audit_period") and name != "bandwidth"
    }
    return Message(
        topic=audit.topic,
        event_type=f"compute.instance.reboot.{phase}",
        publisher_id=audit.publisher_id,
        timestamp=audit.timestamp + timedelta(seconds=20 + place),
        payload=payload,
        message_id=usage_cloud.digest_uuid(f"{audit.message_id} reboot {phase} {number}"),
    )


# --- asking


def asked_window(window: Window, parameters: Mapping[str, str]) -> Window:
    """The window of a question about the month."""
    return Window(
        window.start + (HALF_A_DAY if parameters.get("start") == WITHIN else timedelta(0)),
        window.end - (HALF_A_DAY if parameters.get("end") == WITHIN else timedelta(0)),
    )


@dataclass(slots=True)
class Asker:
    """Asks the running service, one question after the other, on one connection."""

    connection: http.client.HTTPConnection
    window: Window
    spent: Callable[[], float]  # processor seconds of the service and its database until now

    def ask(self, **parameters: str) -> tuple[float, list[Mapping[str, Any]], int]:
        """Seconds until the last byte of the last page, the rows, and how many resources are unfolded.

        Raises:
            Refused: the service does not know such a question.
        """
        rows: list[Mapping[str, Any]] = []
        seconds, unfolded, marker = 0.0, 0, ""
        while True:
            query = {
                "limit": ROWS_A_PAGE,
                **self._moments(parameters),
                **({"marker": marker} if marker else {}),
            }
            began = time.perf_counter()
            self.connection.request("GET", f"/v1/usage?{urlencode(query)}")
            answer = self.connection.getresponse()
            text = answer.read()
            seconds += time.perf_counter() - began
            page = json.loads(text)
            if answer.status != http.client.OK:
                raise Refused(f"{answer.status}: {page.get('detail', page)}")
            rows += page["usage"]
            unfolded = max(unfolded, page["unfolded_resources"])
            marker = page["next_marker"] or ""
            if not marker:
                return seconds, rows, unfolded

    def _moments(self, parameters: Mapping[str, str]) -> dict[str, str]:
        within = asked_window(self.window, parameters)
        named = {"start": within.start.isoformat(), "end": within.end.isoformat()}
        return {**parameters, **named}

    def timing(self, questions: int, **parameters: str) -> "Timing":
        """The same question so many times, after two that warm up."""
        rows = [len(self.ask(**parameters)[1]) for _ in range(2)][-1]
        before = self.spent()
        taken = [1000 * self.ask(**parameters)[0] for _ in range(questions)]
        return Timing(
            median_ms=bench.median(taken),
            best_ms=min(taken),
            cpu_ms=1000 * (self.spent() - before) / questions,
            rows=rows,
        )

    def instance_microseconds(self, **parameters: str) -> int:
        """The sum of an answer."""
        rows = self.ask(**parameters)[1]
        return sum(row["unit_microseconds"]["instance_hours"] for row in rows)


class Refused(Exception):
    """The service answered with an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long a question took. The fastest time is the one that a busy machine disturbs least: slopes are its.

    `cpu_ms` is what it cost the service and the database, whatever else the machine does; on an idle
    machine an answer takes about as long.
    """

    median_ms: float
    best_ms: float
    cpu_ms: float
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What the questions took at one size of the cloud; one that the service cannot be asked is absent."""

    name: str
    instances: int
    intervals: int
    timings: Mapping[str, Timing]


def answers(
    asker: Asker,
    *,
    name: str,
    instances: int,
    intervals: int,
    questions: int,
    true: Callable[[Window], int],
) -> Answers:
    """Ask everything.

    Raises:
        RuntimeError: an answer's sum is not what is true.
    """
    asker.connection.close()  # the server has closed it if nobody asked for some seconds
    timings = {}
    for question, parameters in QUESTIONS.items():
        try:
            if "project_id" not in parameters:
                said = asker.instance_microseconds(**parameters)
                right = true(asked_window(asker.window, parameters))
                if said != right:
                    raise RuntimeError(
                        f"{question}: {said} instance-microseconds, and not {right}"
                    )
            timings[question] = asker.timing(questions, **parameters)
        except Refused as exc:
            bench.say(f"  {question}: {exc}")
    return Answers(name=name, instances=instances, intervals=intervals, timings=timings)


# --- the service


@asynccontextmanager
async def service(
    stage: bench.Stage,
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str, str, usage_service.Database]]:
    """The running service on an empty queue and an empty database: (process, broker, API, database)."""
    url = await usage_service.new_database(stage)
    database = await asyncpg.connect(url)
    try:
        async with (
            usage_service.full_queue(stage, []) as amqp_url,
            usage_service.running(stage, amqp_url, url) as (process, address),
        ):
            await usage_service.wait_ready(address, process)
            yield process, amqp_url, address, database
    finally:
        await database.close()
        await stage.drop_database(url)


def new_asker(
    stage: bench.Stage, process: asyncio.subprocess.Process, address: str, window: Window
) -> Asker:
    """Asks this service."""
    server = stage.postgres.process
    assert server is not None

    def spent() -> float:
        pids = [process.pid, server.pid, *bench.descendants(server.pid)]
        return sum(bench.cpu_seconds(pid) for pid in pids)

    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    return Asker(connection, window, spent)


async def load(
    bodies: Iterable[bytes],
    *,
    amqp_url: str,
    asker: Asker,
    database: usage_service.Database,
    process: asyncio.subprocess.Process,
) -> int:
    """The bodies are stored and folded; how many messages are in the database now."""
    before = await database.fetchval(f"SELECT count(*) FROM {usage_service.EVENTS}")  # noqa: S608
    async with bench.channel(amqp_url) as channel:
        sent = await bench.publish(channel, usage_cloud.EXCHANGE, usage_cloud.ROUTING_KEY, bodies)
    await usage_service.wait_for_rows(
        database, usage_service.EVENTS, before + sent, amqp_url=amqp_url, process=process
    )
    asker.connection.close()  # the server has, if nobody asked for some seconds
    while True:
        _, _, unfolded = await asyncio.to_thread(asker.ask)
        if not unfolded:
            break
        await asyncio.sleep(0.5)
    return int(before + sent)


async def disk_bytes(database: usage_service.Database) -> dict[str, int]:
    """Table and index bytes of every table of the service, a partition under its parent's name."""
    await database.execute("VACUUM ANALYZE")
    rows = await database.fetch(
        "SELECT coalesce(parent.relname, c.relname) AS name, sum(pg_total_relation_size(c.oid))::bigint AS bytes"
        " FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        " LEFT JOIN pg_inherits i ON i.inhrelid = c.oid LEFT JOIN pg_class parent ON parent.oid = i.inhparent"
        " WHERE n.nspname = $1 AND c.relkind = 'r' GROUP BY 1 ORDER BY 2 DESC",
        usage_service.SCHEMA,
    )
    return {row["name"]: row["bytes"] for row in rows}


async def measure_disk(stage: bench.Stage, window: Window) -> tuple[float, float]:
    """Bytes an event with everything that is said of some instances: of the message itself, and of all else."""
    lives = [life(number, window) for number in range(WHOLE_INSTANCES)]
    async with service(stage) as (process, amqp_url, address, database):
        asker = new_asker(stage, process, address, window)
        bodies = whole(lives, window)
        events = await load(
            bodies, amqp_url=amqp_url, asker=asker, database=database, process=process
        )
        sizes = await disk_bytes(database)
    kept = sizes.pop(usage_service.EVENTS.rpartition(".")[2])
    body = sum(map(len, bodies)) / len(bodies)
    bench.say(
        f"disk, after {events:,} messages of {len(lives)} instances, {body:,.0f} bytes each:"
    )
    bench.table(
        ("table, indexes included", "bytes an event"),
        [
            ("messages", kept / events),
            *((name, size / events) for name, size in sizes.items() if size / events >= 0.5),
        ],
    )
    return kept / events, sum(sizes.values()) / events


# of what a copy is: other projects, other resources, everything else alike
_COPIED = {
    "usage_interval": (
        "region, resource_type, {resource} AS resource_id, starts_at, ends_at, {project} AS project_id,"
        " user_id, state_class, attributes, opened_by, closed_by, provenance"
    ),
    "usage_amount": (
        "region, resource_type, {resource} AS resource_id, counter, label, at, amount,"
        " {project} AS project_id, evidence"
    ),
    "usage_day": "day, region, {project} AS project_id, resource_type, measure, amount",
}


async def multiply(database: usage_service.Database, times: int) -> None:
    """The cloud is so many times as large: its copies have other projects and other resources."""
    for table, columns in _COPIED.items():
        named = columns.format(
            project="md5(project_id || ' ' || copy)",
            resource="md5(resource_id || ' ' || copy)::uuid::text",
        )
        await database.execute(
            f"INSERT INTO {usage_service.SCHEMA}.{table} SELECT {named}"  # noqa: S608  our own names
            f" FROM {usage_service.SCHEMA}.{table}, generate_series(2, $1::integer) AS copy",
            times,
            timeout=usage_service.PATIENCE_SECONDS,
        )
    await database.execute("VACUUM ANALYZE", timeout=usage_service.PATIENCE_SECONDS)


async def put_before(database: usage_service.Database, window: Window, months: int) -> None:
    """The window's days were there in as many months before: their sums, and the intervals of some projects."""
    schema, days = usage_service.SCHEMA, (window.end - window.start).days
    await database.execute(
        f"INSERT INTO {schema}.usage_day SELECT day - month * $1, region, project_id, resource_type,"  # noqa: S608
        f" measure, amount FROM {schema}.usage_day, generate_series(1, $2::integer) AS month"
        " WHERE day >= $3 AND day < $4",
        days,
        months,
        window.start.date(),
        window.end.date(),
        timeout=usage_service.PATIENCE_SECONDS,
    )
    before = "month * make_interval(days => $1)"
    await database.execute(
        f"INSERT INTO {schema}.usage_interval SELECT region, resource_type,"  # noqa: S608
        f" md5(resource_id || month)::uuid::text, starts_at - {before},"
        f" least(ends_at, $4::timestamptz) - {before}, project_id, user_id, state_class,"
        f" attributes, opened_by, closed_by, provenance FROM {schema}.usage_interval,"
        " generate_series(1, $2::integer) AS month WHERE project_id = ANY($3::text[])"
        f" AND least(ends_at, $4::timestamptz) > starts_at",
        days,
        months,
        [usage_cloud.digest_hex(f"project {number}") for number in range(PROJECTS_WITH_A_YEAR)],
        window.end,
        timeout=usage_service.PATIENCE_SECONDS,
    )
    await database.execute("VACUUM ANALYZE", timeout=usage_service.PATIENCE_SECONDS)


async def measure_questions(
    stage: bench.Stage, window: Window, *, instances: int, questions: int
) -> Sequence[Answers]:
    """Half the cloud at the scale, the cloud at the scale, the whole cloud, and the whole cloud after a year."""
    found = []
    async with service(stage) as (process, amqp_url, address, database):
        asker = new_asker(stage, process, address, window)
        done: list[InstanceLife] = []

        async def ask(name: str, size: int, times: int = 1) -> None:
            intervals = await database.fetchval(
                f"SELECT count(*) FROM {usage_service.SCHEMA}.usage_interval"  # noqa: S608
            )
            bench.say(f"{name}: {size:,} instances, {intervals:,} intervals")
            found.append(
                await asyncio.to_thread(
                    answers,
                    asker,
                    name=name,
                    instances=size,
                    intervals=intervals,
                    questions=questions,
                    true=lambda asked: times * held_microseconds(done, asked),
                )
            )

        for name, size in (("half", instances // 2), ("scale", instances)):
            lives = [life(number, window) for number in range(len(done), size)]
            done += lives
            began = time.monotonic()
            events = await load(
                decisive(lives),
                amqp_url=amqp_url,
                asker=asker,
                database=database,
                process=process,
            )
            bench.say(f"{events:,} messages, loaded in {time.monotonic() - began:.0f} s")
            await database.execute("VACUUM ANALYZE")
            await ask(name, size)
        times = max(1, round(FULL_CLOUD / instances))
        await multiply(database, times)
        await ask("whole", times * instances, times)
        await put_before(database, window, MONTHS_BEFORE)
        await ask("whole, a year", times * instances, times)
    return found


def conclude(found: Sequence[Answers], disk: tuple[float, float] | None) -> None:
    """The figures of the whole cloud, after a month and after a year, the slope at the scale, and the goals."""
    half, scale, whole, year = found
    figures: dict[str, float | None] = {}
    rows: list[Sequence[object]] = []
    for name in QUESTIONS:
        timings = [one.timings.get(name) for one in found]
        if any(timing is None for timing in timings):
            rows.append((name, *("not known to it" for _ in found), "", "", ""))
            figures[name] = None
            continue
        known = [timing for timing in timings if timing is not None]
        added = (known[1].best_ms - known[0].best_ms) / (scale.instances - half.instances)
        times = (timing.median_ms for timing in known)
        rows.append((name, *times, known[2].cpu_ms, known[2].rows, 1000 * added))
        plain = name.removesuffix("_ms")
        figures |= {
            name: known[2].median_ms,
            f"{plain}_after_a_year_ms": known[3].median_ms,
            f"{plain}_cpu_ms": known[2].cpu_ms,
            f"{plain}_after_a_year_cpu_ms": known[3].cpu_ms,
            f"{plain}_ms_per_1000_instances": 1000 * added,
        }
    bench.say()
    bench.table(
        (
            "question",
            *(f"{one.instances:,}{', a year' if one is year else ''}" for one in found),
            f"CPU ms at {whole.instances:,}",
            "rows",
            "ms per 1,000 more",
        ),
        rows,
    )
    sizes = {} if disk is None else dict(zip(("message", "state"), disk, strict=True))
    bench.conclude(
        "usage_query",
        {
            **figures,
            "instances": whole.instances,
            "intervals": whole.intervals,
            **{f"{name}_bytes_per_event": size for name, size in sizes.items()},
        },
        {
            "all_projects_by_day_ms": "<= 100",
            "one_project_ms": "<= 50",
            "all_projects_by_day_after_a_year_ms": "<= 100",
            "one_project_after_a_year_ms": "<= 50",
        },
    )


async def measure(stage: bench.Stage, arguments: argparse.Namespace) -> None:
    """Everything."""
    window = usage_cloud.last_month(30)
    disk = None if arguments.without_disk else await measure_disk(stage, window)
    found = await measure_questions(
        stage,
        window,
        instances=round(FULL_CLOUD * arguments.scale),
        questions=arguments.questions,
    )
    conclude(found, disk)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--scale", type=float, default=0.1, help="of 10,000 instances, how many are folded"
    )
    parser.add_argument("--questions", type=int, default=30)
    parser.add_argument(
        "--without-disk", action="store_true", help="the bytes of an event are not measured"
    )
    arguments = parser.parse_args()
    with bench.stage() as stage:
        asyncio.run(measure(stage, arguments))


if __name__ == "__main__":
    main()
