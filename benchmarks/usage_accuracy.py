"""How wrong the bill is when messages are lost, doubled and late: ours beside StackTach's and CloudKitty's formulas.

    python benchmarks/usage_accuracy.py [--instances 1000] [--days 30] [--seed 1]

A month of a cloud is written down first: when each instance is created, resized, stopped, started and deleted. From
these timelines come Nova's legacy notifications with hourly audits. Of all messages 1 % are lost, 5 % doubled and 2
% a day late; the rest is delivered in random order to the real service over a real broker. The truth is the
timelines.

Edges lie on whole seconds, which is all that an `exists` says of them. An instance is *covered* when for each of
its edges that bill (create, resize, delete) either the edge's own `.end` or an `exists` that tells it has survived:
there the bill must be right to the microsecond. The others are *uncovered*: no message tells what happened, and all
that can be asked is that the service names them: that `/v1/audits` has a period of them that is not borne out.
Which they are is computed here from what was lost. With 1 % lost there is hardly any such instance, so a bad week
follows, in which half of all messages are lost: covered instances must be right there, too. The service judges an
audit period ten minutes after it first heard of it; here, where a month comes in a minute, after five seconds, so
that what it has judged too early it has to judge again.

The rivals' formulas see the same messages, in the order most favourable to them, as their sources have them:

- **StackTach** (reports/instance_hours.py): for each row of `exists`, ceil of the hours between the later of
  launched_at and the period's beginning and the earlier of deleted_at and its end, times the memory. No unique key:
  a doubled message is a second row. Rows that its verifier would refuse are counted, too, in its favour. Beside it
  without ceil.
- **CloudKitty** (collect once, one-hour periods, wait_periods 2): an instance of which any sample of the period has
  arrived two hours after its end has used the full hour, with the memory of the last one; what comes later is never
  looked at. An `exists` counts for the period that it audits.
"""

import argparse
import asyncio
import math
import random
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg

import bench
import usage_cloud
import usage_service
from hostler_common import client, errors
from hostler_usage.testing import LEGACY, InstanceLife, Message, Step
from hostler_usage.testing import Flavor as LifeFlavor
from usage_cloud import Window

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
LOST, BADLY_LOST, DOUBLED, LATE = 0.01, 0.5, 0.05, 0.02
FLAVORS = tuple(
    LifeFlavor(item.name, item.vcpus, item.memory_mb, item.root_gb, item.ephemeral_gb)
    for item in usage_cloud.FLAVORS
)
SECONDS_PER_HOUR = 3600
MICROSECONDS_PER_HOUR = 3_600_000_000
AUDITS_SECONDS = 180.0
AUDIT_SETTLE_SECONDS = "5"
BORNE_OUT = frozenset({"verified", "repaired", "excused"})
Held = dict[tuple[str, str], tuple[int, int]]
"""(project, instance) -> microseconds, and megabyte-microseconds."""
EDGES = {"create": "create.end", "resize": "finish_resize.end", "delete": "delete.end"}


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message, and when it came."""

    life: InstanceLife
    message: Message
    arrived_at: datetime


@dataclass(frozen=True, slots=True)
class Bill:
    """Hours by project: of instances, and of a megabyte of memory."""

    instance: Mapping[str, float]
    memory: Mapping[str, float]


# --- the cloud, and what became of its messages


def lives(count: int, window: Window, chance: random.Random) -> list[InstanceLife]:
    """Timelines: some instances are there from the first hour, some live for minutes, half are deleted."""
    return [_life(number, window, chance) for number in range(count)]


def _life(number: int, window: Window, chance: random.Random) -> InstanceLife:
    length = (window.end - window.start).total_seconds()
    begin = 300 + (
        chance.uniform(0, 3000) if chance.random() < 0.3 else chance.uniform(0, length * 0.95)
    )
    at = window.start + timedelta(seconds=int(begin))
    steps = [Step(at=at, action="create", flavor=chance.choice(FLAVORS))]
    lifetime = chance.expovariate(1 / (0.4 * length)) if chance.random() > 0.05 else 2400
    last = min(at + timedelta(seconds=int(lifetime)), window.end)
    stopped = False
    while True:
        at += timedelta(seconds=int(900 + chance.expovariate(1 / (0.25 * length))))
        if at >= last - timedelta(minutes=20):
            break
        if stopped:
            steps.append(Step(at=at, action="start"))
            stopped = False
        elif chance.random() < 0.5:
            steps.append(Step(at=at, action="resize", flavor=chance.choice(FLAVORS)))
        else:
            steps.append(Step(at=at, action="stop"))
            stopped = True
    if last < window.end:
        steps.append(Step(at=last, action="delete"))
    return InstanceLife(
        instance_id=usage_cloud.digest_uuid(f"life {number}"),
        project_id=usage_cloud.digest_hex(f"project {number // 20}"),
        steps=tuple(steps),
        host=f"cmp-{number // 25:04}",
    )


def perfect(cloud: Iterable[InstanceLife], window: Window) -> list[Delivery]:
    """Every legacy message, once, as soon as it is sent."""
    return [
        Delivery(life, message, message.timestamp)
        for life in cloud
        for message in life.messages(audits_until=window.end)
        if message.topic == LEGACY
    ]


def damaged(sent: Sequence[Delivery], lost: float, chance: random.Random) -> list[Delivery]:
    """So many lost, 5 % doubled, 2 % a day late, and all in random order."""
    arrived = []
    for delivery in sent:
        if chance.random() < lost:
            continue
        for _ in range(2 if chance.random() < DOUBLED else 1):
            late = DAY if chance.random() < LATE else timedelta()
            arrived.append(Delivery(delivery.life, delivery.message, delivery.arrived_at + late))
    chance.shuffle(arrived)
    return arrived


# --- the truth, and where it can still be known


def spans(
    life: InstanceLife, window: Window
) -> Iterator[tuple[datetime, datetime, LifeFlavor, str]]:
    """(start, end, flavor, state) of everything that was held."""
    flavor, state = life.steps[0].flavor, "active"
    for step, following in zip(life.steps, (*life.steps[1:], None), strict=True):
        flavor = step.flavor or flavor
        state = {"stop": "stopped", "start": "active"}.get(step.action, state)
        if step.action != "delete":
            assert flavor is not None
            yield step.at, following.at if following else window.end, flavor, state


def truth(cloud: Iterable[InstanceLife], window: Window) -> Bill:
    """What was used."""
    instance: dict[str, float] = defaultdict(float)
    memory: dict[str, float] = defaultdict(float)
    for life in cloud:
        for start, end, flavor, _ in spans(life, window):
            hours = (end - start).total_seconds() / SECONDS_PER_HOUR
            instance[life.project_id] += hours
            memory[life.project_id] += hours * flavor.memory_mb
    return Bill(instance, memory)


def uncovered(cloud: Iterable[InstanceLife], arrived: Iterable[Delivery]) -> set[str]:
    """The instances of which no message that arrived tells one of the edges that bill."""
    messages: dict[str, list[Message]] = defaultdict(list)
    for delivery in arrived:
        messages[delivery.life.instance_id].append(delivery.message)
    return {
        life.instance_id for life in cloud if not _is_covered(life, messages[life.instance_id])
    }


def _is_covered(life: InstanceLife, messages: Sequence[Message]) -> bool:
    edges = [step for step in life.steps if step.action in EDGES]
    for step, following in zip(edges, (*edges[1:], None), strict=True):
        until = following.at if following else datetime.max.replace(tzinfo=UTC)
        name = f"compute.instance.{EDGES[step.action]}"
        if not any(
            (
                message.event_type == name
                and step.at <= message.timestamp < step.at + timedelta(seconds=1)
            )
            or (
                message.event_type == "compute.instance.exists"
                and step.at < message.timestamp
                # one that is sent while the next resize is prepared still has this one's flavor and launched_at
                and (message.timestamp < until or step.action == "delete")
            )
            for message in messages
        ):
            return False
    return True


# --- the rivals


def stacktach(arrived: Iterable[Delivery], *, ceil: bool) -> Bill:
    """Its formula over every row of `exists`."""
    instance: dict[str, float] = defaultdict(float)
    memory: dict[str, float] = defaultdict(float)
    for delivery in arrived:
        payload: Mapping[str, Any] = delivery.message.payload
        if delivery.message.event_type != "compute.instance.exists":
            continue
        end = _moment(payload["audit_period_ending"])
        if payload["deleted_at"]:
            end = min(end, _moment(payload["deleted_at"]))
        start = max(_moment(payload["launched_at"]), _moment(payload["audit_period_beginning"]))
        hours = (end - start).total_seconds() / SECONDS_PER_HOUR
        hours = math.ceil(hours) if ceil else hours
        instance[payload["tenant_id"]] += hours
        memory[payload["tenant_id"]] += hours * payload["memory_mb"]
    return Bill(instance, memory)


def cloudkitty(arrived: Iterable[Delivery]) -> Bill:
    """A full hour for any sample that was there in time."""
    latest: dict[tuple[str, datetime], tuple[datetime, str, int]] = {}
    for delivery in arrived:
        payload: Mapping[str, Any] = delivery.message.payload
        at = delivery.message.timestamp
        if not payload["launched_at"]:
            continue  # it does not run yet
        began = at
        if delivery.message.event_type == "compute.instance.exists":
            began = _moment(payload["audit_period_beginning"])
        period = began.replace(minute=0, second=0, microsecond=0)
        if delivery.arrived_at > period + 3 * HOUR:
            continue
        key = (payload["instance_id"], period)
        latest[key] = max(
            latest.get(key, (at, "", 0)), (at, payload["tenant_id"], payload["memory_mb"])
        )
    instance: dict[str, float] = defaultdict(float)
    memory: dict[str, float] = defaultdict(float)
    for _, project, memory_mb in latest.values():
        instance[project] += 1
        memory[project] += memory_mb
    return Bill(instance, memory)


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


# --- ours


async def ours(
    stage: bench.Stage,
    arrived: Sequence[Delivery],
    window: Window,
    uncovered_lives: Sequence[InstanceLife],
) -> tuple[Held, set[str] | None]:
    """What the real service says was held, and whom its audits leave unnamed, though it holds them wrongly.

    Of those only that are not covered, and that it has heard of. None: it has no audits.
    """
    heard = {delivery.life.instance_id for delivery in arrived}
    known = len({delivery.message.message_id for delivery in arrived})
    bodies = (delivery.message.body() for delivery in arrived)
    async with usage_service.full_queue(stage, bodies) as amqp_url:
        url = await usage_service.new_database(stage)
        database = await asyncpg.connect(url)
        try:
            async with usage_service.running(
                stage, amqp_url, url, audit_settle_seconds=AUDIT_SETTLE_SECONDS
            ) as (process, address):
                await usage_service.wait_for_rows(
                    database, usage_service.EVENTS, known, amqp_url=amqp_url, process=process
                )
                found = await _asked(address, window)
                wrong = set(exact_error(uncovered_lives, window, found)[1]) & heard
                named = await _named(address, window, wrong)
                return found, None if named is None else wrong - named
        finally:
            await database.close()
            await stage.drop_database(url)


async def _named(address: str, window: Window, wrong: set[str]) -> set[str] | None:
    """Those of which it says that a period is not borne out: waits a while, as its audits run behind."""
    named: set[str] = set()
    deadline = time.monotonic() + AUDITS_SECONDS
    async with client.open_api(address, timeout_seconds=60) as api:
        while True:
            for instance in wrong - named:
                try:
                    page = await api.get(
                        "/v1/audits",
                        start=window.start.isoformat(),
                        end=window.end.isoformat(),
                        resource_type="instance",
                        resource_id=instance,
                        limit=1000,
                    )
                except errors.NotFound:
                    return None
                if any(verdict["status"] not in BORNE_OUT for verdict in page["audits"]):
                    named.add(instance)
            if named == wrong or time.monotonic() > deadline:
                return named
            await asyncio.sleep(2)


async def _asked(address: str, window: Window) -> Held:
    async with client.open_api(address, timeout_seconds=60) as api:
        while True:
            found: Held = {}
            marker, unfolded = None, 0
            while True:
                page = await api.get(
                    "/v1/usage",
                    start=window.start.isoformat(),
                    end=window.end.isoformat(),
                    group_by="project,resource",
                    resource_type="instance",
                    limit=1000,
                    marker=marker,
                )
                unfolded = max(unfolded, page["unfolded_resources"])
                for row in page["usage"]:
                    amounts = row["unit_microseconds"]
                    found[row["group"]["project"], row["group"]["resource"]] = (
                        amounts["instance_hours"],
                        amounts[usage_service.MEMORY],
                    )
                marker = page["next_marker"]
                if marker is None:
                    break
            if unfolded == 0:
                return found
            await asyncio.sleep(0.5)


def bill(found: Held) -> Bill:
    """The service's answer by project."""
    instance: dict[str, float] = defaultdict(float)
    memory: dict[str, float] = defaultdict(float)
    for (project, _), (held, megabytes) in found.items():
        instance[project] += held / MICROSECONDS_PER_HOUR
        memory[project] += megabytes / MICROSECONDS_PER_HOUR
    return Bill(instance, memory)


def exact_error(
    cloud: Iterable[InstanceLife],
    window: Window,
    found: Held,
) -> tuple[float, list[str]]:
    """Wrong share of the hours of these instances, counted in microseconds, and which are wrong."""
    wrong, total, who = 0, 0, []
    for life in cloud:
        held = megabytes = 0
        for start, end, flavor, _ in spans(life, window):
            length = (end - start) // timedelta(microseconds=1)
            held, megabytes = held + length, megabytes + length * flavor.memory_mb
        said = found.get((life.project_id, life.instance_id), (0, 0))
        difference = abs(said[1] - megabytes) + abs(said[0] - held)
        wrong, total = wrong + difference, total + megabytes + held
        if difference:
            who.append(life.instance_id)
    return (wrong / total if total else 0.0), who


# --- what is said


def share(said: Mapping[str, float], true: Mapping[str, float]) -> float:
    """What is billed too much and too little, over the projects, as a share of what is right."""
    projects = set(said) | set(true)
    wrong = sum(abs(said.get(name, 0.0) - true.get(name, 0.0)) for name in projects)
    return wrong / sum(true.values())


def worst(said: Mapping[str, float], true: Mapping[str, float]) -> float:
    """The largest error of one project, as a share of its own hours."""
    return max(abs(said.get(name, 0.0) - hours) / hours for name, hours in true.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One cloud through everybody. `unnamed`: wrong instances that the service's audits say nothing of."""

    right: Bill
    bills: Mapping[tuple[str, str], Bill]
    error_share: float
    uncovered: int
    uncovered_error_share: float
    unnamed: int | None

    def memory_error(self, name: str, messages: str = "damaged") -> float:
        """The wrong share of the memory-hours over the projects."""
        return share(self.bills[name, messages].memory, self.right.memory)


async def trial(
    stage: bench.Stage, *, instances: int, window: Window, lost: float, chance: random.Random
) -> Trial:
    """Make the cloud, damage its messages, and ask everybody."""
    cloud = lives(instances, window, chance)
    sent = perfect(cloud, window)
    arrived = damaged(sent, lost, chance)
    right = truth(cloud, window)
    unknown = uncovered(cloud, arrived)
    actions: dict[str, int] = defaultdict(int)
    for life in cloud:
        for step in life.steps:
            actions[step.action] += 1
    bench.say(
        f"{len(cloud):,} instances from {window.start:%F} to {window.end:%F}: "
        + ", ".join(f"{count:,} x {action}" for action, count in actions.items())
    )
    bench.say(
        f"{len(sent):,} messages sent, {lost:.0%} lost, {DOUBLED:.0%} doubled, {LATE:.0%} a day late:"
        f" {len(arrived):,} delivered in random order; {len(unknown)} instances are not covered\n"
    )
    covered = [life for life in cloud if life.instance_id not in unknown]
    others = [life for life in cloud if life.instance_id in unknown]
    found, left = await ours(stage, arrived, window, others)
    bills = {
        ("hostler-usage", "damaged"): bill(found),
        ("StackTach", "perfect"): stacktach(sent, ceil=True),
        ("StackTach", "damaged"): stacktach(arrived, ceil=True),
        ("StackTach without ceil", "perfect"): stacktach(sent, ceil=False),
        ("StackTach without ceil", "damaged"): stacktach(arrived, ceil=False),
        ("CloudKitty", "perfect"): cloudkitty(sent),
        ("CloudKitty", "damaged"): cloudkitty(arrived),
    }
    bench.table(
        ("formula", "messages", "instance-hours wrong", "memory-hours wrong", "worst project"),
        [
            (
                *name,
                f"{share(each.instance, right.instance):.4%}",
                f"{share(each.memory, right.memory):.4%}",
                f"{worst(each.memory, right.memory):.2%}",
            )
            for name, each in bills.items()
        ],
    )
    error, wrong = exact_error(covered, window, found)
    other_error, other_wrong = exact_error(others, window, found)
    for life in covered:
        if life.instance_id in wrong[:5]:
            bench.say(f"WRONG: {life}")
    unnamed = None if left is None else len(left)
    bench.say(
        f"covered: {len(covered)} instances, {len(wrong)} wrong; not covered: {len(others)},"
        f" {len(other_wrong)} of them wrong, of which its audits leave unnamed:"
        f" {'no audits' if unnamed is None else unnamed}\n"
    )
    return Trial(
        right=right,
        bills=bills,
        error_share=error,
        uncovered=len(others),
        uncovered_error_share=other_error,
        unnamed=unnamed,
    )


async def measure(stage: bench.Stage, arguments: argparse.Namespace) -> None:
    """The month, and then a week so bad that audits do not cover everything."""
    month = await trial(
        stage,
        instances=arguments.instances,
        window=usage_cloud.last_month(arguments.days),
        lost=LOST,
        chance=random.Random(arguments.seed),  # noqa: S311  a reproducible cloud
    )
    bad = await trial(
        stage,
        instances=min(arguments.instances, 200),
        window=usage_cloud.last_month(8),
        lost=BADLY_LOST,
        chance=random.Random(arguments.seed + 1),  # noqa: S311  a reproducible cloud
    )
    unnamed = (month.unnamed, bad.unnamed)
    bench.conclude(
        "usage_accuracy",
        {
            "error_share": max(month.error_share, bad.error_share),
            "error_share_all": month.memory_error("hostler-usage"),
            "uncovered_instances": month.uncovered,
            "stacktach_error_share": month.memory_error("StackTach"),
            "stacktach_without_ceil_error_share": month.memory_error("StackTach without ceil"),
            "cloudkitty_error_share": month.memory_error("CloudKitty"),
            "stacktach_perfect_stream_error_share": month.memory_error("StackTach", "perfect"),
            "cloudkitty_perfect_stream_error_share": month.memory_error("CloudKitty", "perfect"),
            "bad_week_uncovered_instances": bad.uncovered,
            "bad_week_uncovered_error_share": bad.uncovered_error_share,
            "wrong_and_not_named": None if None in unnamed else sum(n or 0 for n in unnamed),
        },
        {"error_share": "<= 0", "wrong_and_not_named": "<= 0"},
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--instances", type=int, default=1000)
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with bench.stage() as stage:
        asyncio.run(measure(stage, arguments))


if __name__ == "__main__":
    main()
