"""The ten properties of the ledger, each by its name, over worlds whose truth is written down.

A world is a handful of resources of every kind with dated lives: instances (create, resize, stop,
rebuild, delete, bandwidth), volumes (create, extend, transfer, attach, delete, and what Cinder's
audit sends again), floating IPs (allocate, associate, release) and metering labels (counters). It
is sent as Nova's legacy messages, its versioned ones or both, by services whose clocks differ by
less than a second, with an exists an hour. The oracle is the world's own timeline; no message has
touched it. And there is a day of a real Nova, with the truth of Nova's own rows.

Everything here goes from bytes to the ledger and through the compact form statements are kept in.
Where a property also stands elsewhere:

    P1 order        test_usage_intervals, _amounts, _audits, _operations: any set of observations,
                    readings, statements; tests/faults/test_usage_faults.py: broker and database
    P2 copies       as P1
    P3 crashes      tests/faults/test_usage_faults.py: SIGKILL of replicas; service/test_usage_store
    P4 rebuild      service/test_usage_rebuild (the tables' hashes), service/test_usage_rollups
    P5 additivity   test_usage_intervals, _amounts; service/test_usage_store (any calendar)
    P6 losses       test_usage_audits (what is repaired is named); benchmarks/usage_accuracy.py
    P7 more audits  test_usage_intervals, _audits
    P8 time shift   only here
    P9 dialects     test_usage_intervals; tests/integration/test_usage_nova.py (a whole Nova)
    P10 any input   test_usage_envelope, _normalise, _reader: any bytes, any JSON; the faults' count
"""

import gzip
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from hostler_common import bus
from hostler_usage.auditing.audits import Status
from hostler_usage.history.amounts import Amount
from hostler_usage.history.intervals import Interval
from hostler_usage.history.ledger import Ledger, reckon
from hostler_usage.history.measures import Window, totals
from hostler_usage.history.rollup import Cell, HeldFact, MovedFact, sums
from hostler_usage.reading.envelope import UnreadableError
from hostler_usage.reading.event import Event
from hostler_usage.reading.intake import read_delivery
from hostler_usage.reading.mapping_file import packaged
from hostler_usage.reading.normalise import Normaliser
from hostler_usage.reading.statement import (
    Evidence,
    ResourceKey,
    ResourceType,
    Statement,
    decode,
    encode,
)
from hostler_usage.reading.times import microseconds
from hostler_usage.testing import (
    INSTANCE,
    LARGE,
    LEGACY,
    MEDIUM,
    SMALL,
    VERSIONED,
    InstanceLife,
    Message,
    Step,
    VolumeLife,
    VolumeStep,
)

DATA = Path(__file__).parents[1] / "data"
DAY = datetime(2026, 5, 8, tzinfo=UTC)
HOUR, SECOND = timedelta(hours=1), timedelta(seconds=1)
FLOATING_IP, LABEL = ResourceType("floating_ip"), ResourceType("meter_label")
NORMALISER = Normaliser(packaged())
AS_OF = DAY + 40 * HOUR
WINDOW = Window(start=DAY - 2 * HOUR, end=DAY + 100 * HOUR, as_of=AS_OF)

# of a measure: unit-microseconds, or units
Usage = dict[tuple[str, str], int]  # by project and measure
Said = tuple[ResourceKey, Statement, Evidence]
Ledgers = dict[ResourceKey, Ledger]


# --- from bytes to ledgers


def opened(body: bytes, **properties: Any) -> Event:
    delivery = bus.Delivery(
        **{
            "queue": "q",
            "exchange": "nova",
            "routing_key": "notifications.info",
            "body": body,
            "headers": {},
            **properties,
        }
    )
    return read_delivery(delivery, source="cloud", region="r1", normaliser=NORMALISER)


def told(bodies: Iterable[bytes]) -> list[Said]:
    """What messages say, as the database keeps it."""
    found: list[Said] = []
    for body in bodies:
        event = opened(body)
        notification = event.notification
        evidence = Evidence(
            event_time=notification.timestamp,
            message_id=notification.message_id,
            digest=notification.digest,
        )
        for resource, statement in event.normalised.said:
            if statement is not None:
                found.append((resource, decode(encode(statement)), evidence))
    return found


def reckoned(said: Iterable[Said]) -> Ledgers:
    by_resource: dict[ResourceKey, list[tuple[Statement, Evidence]]] = defaultdict(list)
    for key, statement, evidence in said:
        by_resource[key].append((statement, evidence))
    return {
        key: reckon(packaged().resources[key.resource_type], items)
        for key, items in by_resource.items()
    }


def used(
    key: ResourceKey,
    intervals: Sequence[Interval],
    amounts: Sequence[Amount] = (),
    window: Window = WINDOW,
) -> Usage:
    """By project; what is nothing is left out."""
    found: Usage = Counter()
    measures = packaged().measures_of(key.resource_type)
    for interval in intervals:
        for name, amount in totals(measures, [interval], window).items():
            found[str(interval.attributes.get("project")), name] += amount
    for moved in amounts:
        for name, amount in totals(measures, [], window, [moved]).items():
            found[str(moved.project_id), name] += amount
    return {key: amount for key, amount in found.items() if amount}


def usage(ledgers: Ledgers, window: Window = WINDOW) -> dict[str, Usage]:
    """By resource id."""
    found = {
        key.resource_id: used(key, ledger.intervals, ledger.amounts, window)
        for key, ledger in ledgers.items()
    }
    return {name: amounts for name, amounts in found.items() if amounts}


# --- worlds


class Held(NamedTuple):
    """The truth: from `start` to `end` a project held so much."""

    project: str
    start: datetime
    end: datetime
    units: Mapping[str, int]


def integral(pieces: Iterable[Held], window: Window = WINDOW) -> Usage:
    found: Usage = Counter()
    for piece in pieces:
        span = microseconds(min(piece.end, window.upper) - max(piece.start, window.start))
        for name, units in piece.units.items():
            found[piece.project, name] += max(0, span) * units
    return {key: amount for key, amount in found.items() if amount}


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """An instance, its traffic, and until when it is audited."""

    life: InstanceLife

    @property
    def resource_id(self) -> str:
        return self.life.instance_id

    def messages(self, until: datetime) -> list[Message]:
        return [self._with_traffic(message) for message in self.life.messages(audits_until=until)]

    def _with_traffic(self, message: Message) -> Message:
        """An hourly audit tells what came in; one of part of an hour, before something is done, nothing."""
        period = audited(message)
        if period is None or period[1] - period[0] != HOUR:
            return message
        hour = period[1]
        if message.topic == LEGACY:
            bandwidth: object = {"public": {"bw_in": traffic(hour), "bw_out": 0}}
            return replace(message, payload=message.payload | {"bandwidth": bandwidth})
        row = {"network_name": "public", "in_bytes": traffic(hour), "out_bytes": 0}
        bandwidth = [{"nova_object.name": "BandwidthPayload", "nova_object.data": row}]
        data: Any = message.payload["nova_object.data"]
        inner = dict(data) | {"bandwidth": bandwidth}
        return replace(message, payload=message.payload | {"nova_object.data": inner})

    def pieces(self) -> Iterator[Held]:
        flavor = SMALL
        for step, following in zip(self.life.steps, (*self.life.steps[1:], None), strict=True):
            flavor = step.flavor or flavor
            if step.action != "delete":
                units = {
                    "instance_hours": 1,
                    "vcpu_hours": flavor.vcpus,
                    "ram_mb_hours": flavor.memory_mb,
                    "local_gb_hours": flavor.root_gb + flavor.ephemeral_gb,
                }
                end = following.at if following else AS_OF
                yield Held(self.life.project_id, step.at, end, units)

    def truth(self, until: datetime) -> Usage:
        found = integral(self.pieces())
        born, last = self.life.steps[0].at, self.life.steps[-1]
        end = last.at if last.action == "delete" else AS_OF
        hour = born.replace(minute=0, second=0, microsecond=0) + HOUR
        moved = 0
        while hour <= until:
            moved += traffic(hour) if born < hour and end > hour - HOUR else 0
            hour += HOUR
        if moved:
            found[self.life.project_id, "bandwidth_in_bytes"] = moved
        return found


def audited(message: Message) -> tuple[datetime, datetime] | None:
    """The period an instance's body says it is an audit of."""
    payload: Any = message.payload
    data = payload.get("nova_object.data", payload)
    period = data.get("audit_period", {}).get("nova_object.data", data)
    if "audit_period_ending" not in period:
        return None
    beginning, ending = (
        datetime.fromisoformat(period[f"audit_period_{name}"]).replace(tzinfo=UTC)
        for name in ("beginning", "ending")
    )
    return beginning, ending


def traffic(hour: datetime) -> int:
    """What every instance receives in the hour before."""
    return 10**9 + hour.day * 1000 + hour.hour


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A volume."""

    life: VolumeLife

    @property
    def resource_id(self) -> str:
        return self.life.volume_id

    def messages(self, until: datetime) -> list[Message]:
        sent = self.life.messages(audits_until=until)
        servers = [step.instance_id for step in self.life.steps if step.instance_id is not None]
        attached = {"volume_attachment": [{"instance_uuid": name} for name in servers]}
        for message in self.life.resent(AS_OF):  # of how it is by then
            sent.append(replace(message, payload=message.payload | attached))
        return [self._with_status(message) for message in sent]

    def _with_status(self, message: Message) -> Message:
        """What is attached is in use, whatever else is done to it."""
        is_attached = message.payload["volume_attachment"] != []
        if not is_attached or message.payload["status"] != "available":
            return message
        return replace(message, payload=message.payload | {"status": "in-use"})

    def pieces(self) -> Iterator[Held]:
        size, owner = 0, self.life.project_id
        for step, following in zip(self.life.steps, (*self.life.steps[1:], None), strict=True):
            size, owner = step.size_gb or size, step.project_id or owner
            if step.action != "delete":
                end = following.at if following else AS_OF
                yield Held(owner, step.at, end, {"volume_hours": 1, "volume_gb_hours": size})

    def truth(self, _: datetime) -> Usage:
        return integral(self.pieces())


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """A floating IP: allocated, attached and released at these moments."""

    resource_id: str
    project_id: str
    at: datetime
    attached_at: datetime | None
    released_at: datetime | None

    def messages(self, until: datetime) -> list[Message]:
        row: dict[str, object] = {
            "id": self.resource_id,
            "project_id": self.project_id,
            "floating_ip_address": "172.24.4.227",
            "port_id": None,
            "created_at": self.at.strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        port = row | {"port_id": "8ab815c8-03cc-4b45-a673-79bdd0c258f2"}
        end = self.released_at or AS_OF
        found = [self._message("create.end", self.at + SECOND / 4, {"floatingip": row})]
        if self.attached_at is not None:
            found.append(self._message("update.end", self.attached_at, {"floatingip": port}))
        hour = self.at.replace(minute=0, second=0, microsecond=0) + HOUR
        while hour < min(until, end):
            is_attached = self.attached_at is not None and self.attached_at <= hour
            found.append(
                self._message("exists", hour, {"floatingip": port if is_attached else row})
            )
            hour += HOUR
        if self.released_at is not None:
            gone: dict[str, object] = {"floatingip_id": self.resource_id}
            found.append(self._message("delete.end", self.released_at, gone))
        return found

    def _message(self, event: str, at: datetime, payload: dict[str, object]) -> Message:
        return Message(
            topic=LEGACY,
            event_type=f"floatingip.{event}",
            publisher_id="network.ctl1",
            timestamp=at,
            payload=payload,
            message_id=f"{self.resource_id}/{event}/{at}",
        )

    def pieces(self) -> Iterator[Held]:
        end = self.released_at or AS_OF
        yield Held(self.project_id, self.at, end, {"floating_ip_hours": 1})

    def truth(self, _: datetime) -> Usage:
        return integral(self.pieces())


@dataclass(frozen=True, slots=True, kw_only=True)
class Meter:
    """A metering label, and how many bytes passed until each of these moments."""

    resource_id: str
    project_id: str
    passed: tuple[tuple[datetime, int], ...]

    def messages(self, _: datetime) -> list[Message]:
        return [
            Message(
                topic=LEGACY,
                event_type="l3.meter",
                publisher_id="metering.net1",
                timestamp=at + SECOND / 2,
                payload={
                    "label_id": self.resource_id,
                    "project_id": self.project_id,
                    "bytes": size,
                    "last_update": int(at.timestamp()),
                },
                message_id=f"{self.resource_id}/{at}",
            )
            for at, size in self.passed
        ]

    def truth(self, _: datetime) -> Usage:
        total = sum(size for _, size in self.passed)
        return {(self.project_id, "traffic_bytes"): total} if total else {}


Thing = Server | Disk | Address | Meter


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Things, and until when they are audited. `skews` is by how much each service's clock is off."""

    things: tuple[Thing, ...]
    audited_until: datetime
    topics: frozenset[str] = frozenset({LEGACY, VERSIONED})
    skews: Mapping[str, timedelta] = field(default_factory=dict)

    def messages(self) -> list[Message]:
        sent = [
            message
            for thing in self.things
            for message in thing.messages(self.audited_until)
            if not isinstance(thing, Server) or message.topic in self.topics
        ]
        return [
            replace(m, timestamp=m.timestamp + self.skews.get(m.publisher_id, timedelta()))
            for m in sent
        ]

    def bodies(self) -> list[bytes]:
        return [
            message.body("v2" if number % 2 else "v1")
            for number, message in enumerate(self.messages())
        ]

    def truth(self) -> dict[str, Usage]:
        found = {thing.resource_id: thing.truth(self.audited_until) for thing in self.things}
        return {name: amounts for name, amounts in found.items() if amounts}


# Nova does not resize faster
GAPS = st.integers(180, 7 * 3600).map(lambda seconds: timedelta(seconds=seconds))
PARTS = st.integers(0, 999_999).map(lambda part: timedelta(microseconds=part))
PROJECTS = st.sampled_from(["p1", "p2", "p3"])


@st.composite
def servers(draw: st.DrawFn, number: int, *, fine: bool) -> Server:
    part = PARTS if fine else st.just(timedelta())
    at = DAY + draw(GAPS) + draw(part)
    steps = [Step(at=at, action="create", flavor=draw(st.sampled_from([SMALL, MEDIUM, LARGE])))]
    stopped = False
    for action in draw(st.lists(st.sampled_from(["resize", "toggle", "rebuild"]), max_size=3)):
        at += draw(GAPS) + draw(part)
        if action == "resize":
            flavor = draw(st.sampled_from([SMALL, MEDIUM, LARGE]))
            steps.append(Step(at=at, action="resize", flavor=flavor))
        elif action == "rebuild":
            steps.append(Step(at=at, action="rebuild", image=f"image-{len(steps)}"))
            stopped = False
        else:
            stopped = not stopped
            steps.append(Step(at=at, action="stop" if stopped else "start"))
    if draw(st.booleans()):
        steps.append(Step(at=at + draw(GAPS) + draw(part), action="delete"))
    life = InstanceLife(
        instance_id=f"10000000-0000-4000-8000-{number:012}",
        project_id=draw(PROJECTS),
        steps=tuple(steps),
        host=f"cmp-{number}",
    )
    return Server(life=life)


@st.composite
def disks(draw: st.DrawFn, number: int) -> Disk:
    at = DAY + draw(GAPS)
    size = draw(st.integers(1, 50))
    steps = [VolumeStep(at=at, action="create", size_gb=size)]
    for action in draw(st.lists(st.sampled_from(["extend", "transfer", "attach"]), max_size=3)):
        at += draw(GAPS)
        if action == "extend":
            size += draw(st.integers(1, 50))
            steps.append(VolumeStep(at=at, action="extend", size_gb=size))
        elif action == "transfer":
            steps.append(VolumeStep(at=at, action="transfer", project_id=draw(PROJECTS)))
        else:
            steps.append(VolumeStep(at=at, action="attach", instance_id="i"))
    if draw(st.booleans()):
        steps.append(VolumeStep(at=at + draw(GAPS), action="delete"))
    life = VolumeLife(
        volume_id=f"20000000-0000-4000-8000-{number:012}",
        project_id=draw(PROJECTS),
        steps=tuple(steps),
    )
    return Disk(life=life)


@st.composite
def addresses(draw: st.DrawFn, number: int) -> Address:
    at = DAY + draw(GAPS)
    attached_at = at + draw(GAPS) if draw(st.booleans()) else None
    released_at = (attached_at or at) + draw(GAPS) if draw(st.booleans()) else None
    return Address(
        resource_id=f"30000000-0000-4000-8000-{number:012}",
        project_id=draw(PROJECTS),
        at=at,
        attached_at=attached_at,
        released_at=released_at,
    )


@st.composite
def meters(draw: st.DrawFn, number: int) -> Meter:
    readings = draw(st.dictionaries(st.integers(1, 100), st.integers(0, 10**12), max_size=6))
    return Meter(
        resource_id=f"label-{number}",
        project_id=draw(PROJECTS),
        passed=tuple((DAY + n * 5 * timedelta(minutes=1), size) for n, size in readings.items()),
    )


@st.composite
def worlds(draw: st.DrawFn, *, fine: bool = True, until: int | None = None) -> World:
    topics = draw(st.sampled_from([{LEGACY}, {VERSIONED}, {LEGACY, VERSIONED}]))
    hours = draw(st.integers(0, 36)) if until is None else until
    things: list[Thing] = [
        draw(strategy)
        for strategy in (servers(1, fine=fine), servers(2, fine=fine))
        if draw(st.booleans())
    ]
    things += [draw(disks(1)), draw(addresses(1)), draw(meters(1))]
    return World(things=tuple(things), audited_until=DAY + hours * HOUR, topics=frozenset(topics))


@st.composite
def skewed(draw: st.DrawFn) -> World:
    """Of each pair of services, one's clock is less than a second behind the other's."""
    world = draw(worlds(fine=False))
    publishers = sorted({message.publisher_id for message in world.messages()})
    off = st.integers(-499_999, 499_999).map(lambda part: timedelta(microseconds=part))
    return replace(world, skews={name: draw(off) for name in publishers})


CHANCES = st.integers(0, 2**32).map(random.Random)
FEW = settings(max_examples=30, deadline=None)
MORE = settings(max_examples=60, deadline=None)


def allowed(world: World, per_edge: int) -> dict[str, Usage]:
    """How far off each total may be if every edge is off by so many microseconds."""
    found: dict[str, Usage] = {}
    for thing in world.things:
        limits: Usage = Counter()
        if not isinstance(thing, Meter):
            for piece in thing.pieces():
                for name, units in piece.units.items():
                    limits[piece.project, name] += 2 * units * per_edge
        found[thing.resource_id] = limits
    return found


def assert_near(
    ours: Mapping[str, Usage], theirs: Mapping[str, Usage], limits: Mapping[str, Usage]
) -> None:
    for name in ours.keys() | theirs.keys():
        one, other = ours.get(name, {}), theirs.get(name, {})
        for key in one.keys() | other.keys():
            off = abs(one.get(key, 0) - other.get(key, 0))
            assert off <= limits.get(name, {}).get(key, 0), (name, key, off)


# --- the truth itself

# the audit before this resize is sent half a minute past the hour, as that of the hour itself is
RESIZED_BY_THE_HOUR = World(
    things=(
        Server(
            life=InstanceLife(
                instance_id="10000000-0000-4000-8000-000000000002",
                project_id="p1",
                steps=(
                    Step(at=DAY + timedelta(minutes=3), action="create", flavor=SMALL),
                    Step(at=DAY + timedelta(minutes=6), action="stop"),
                    Step(at=DAY + HOUR + 90 * SECOND, action="resize", flavor=SMALL),
                ),
                host="cmp-2",
            )
        ),
    ),
    audited_until=DAY,
    topics=frozenset({LEGACY}),
)


@MORE
@given(worlds(fine=False))
@example(RESIZED_BY_THE_HOUR)
def test_what_is_reckoned_of_a_world_is_its_truth(world: World) -> None:
    assert usage(reckoned(told(world.bodies()))) == world.truth()


@FEW
@given(skewed())
def test_clocks_that_differ_by_less_than_a_second_move_no_edge_by_more(world: World) -> None:
    """And none of an instance's, for those are told by its launched_at and deleted_at."""
    ours, theirs = usage(reckoned(told(world.bodies()))), world.truth()
    assert_near(ours, theirs, allowed(world, 500_000))
    for thing in world.things:
        if isinstance(thing, Server):
            assert ours.get(thing.resource_id) == theirs.get(thing.resource_id)


# --- P1 to P4: order, copies, crashes, rebuild


@FEW
@given(worlds(), CHANCES)
def test_p1_any_permutation_gives_equal_ledgers(world: World, chance: random.Random) -> None:
    bodies = world.bodies()
    quiet = reckoned(told(bodies))
    chance.shuffle(bodies)
    assert reckoned(told(bodies)) == quiet


@FEW
@given(worlds(), st.data())
def test_p2_any_copies_give_equal_ledgers(world: World, data: st.DataObject) -> None:
    said = told(world.bodies())
    copies = data.draw(st.lists(st.sampled_from(said), max_size=40)) if said else []
    assert reckoned(said + copies) == reckoned(said)


class Service:
    """What a service keeps, without its database: a set of statements, marks, ledgers, sums of days."""

    def __init__(self, until: date) -> None:
        self.stored: dict[tuple[ResourceKey, Evidence], Statement] = {}
        self.touched: set[ResourceKey] = set()
        self.ledgers: Ledgers = {}
        self.days: Counter[Cell] = Counter()
        self._until = until

    def ingest(self, batch: Iterable[Said]) -> None:
        for key, statement, evidence in batch:
            self.stored.setdefault((key, evidence), statement)
            self.touched.add(key)

    def fold(self, limit: int) -> None:
        for key in sorted(self.touched)[:limit]:
            said = [(s, e) for (owner, e), s in self.stored.items() if owner == key]
            ledger = reckon(packaged().resources[key.resource_type], said)
            self.days.subtract(summed(key, self.ledgers.get(key), self._until))
            self.days.update(summed(key, ledger, self._until))
            self.ledgers[key] = ledger
            self.touched.discard(key)


def summed(key: ResourceKey, ledger: Ledger | None, until: date) -> Counter[Cell]:
    if ledger is None:
        return Counter()
    kind = str(key.resource_type)
    facts: list[HeldFact | MovedFact] = [
        HeldFact(key.region, kind, project(item), item.start, item.end, item.attributes)
        for item in ledger.intervals
    ]
    facts += [
        MovedFact(key.region, kind, item.project_id, item.counter, item.at, item.amount)
        for item in ledger.amounts
    ]
    return sums(facts, {kind: packaged().measures_of(key.resource_type)}, until)


def project(interval: Interval) -> str | None:
    value = interval.attributes.get("project")
    return value if isinstance(value, str) else None


@FEW
@given(worlds(), CHANCES, st.data())
def test_p3_any_batches_and_crashes_and_p4_a_rebuild_give_equal_ledgers_and_sums(
    world: World, chance: random.Random, data: st.DataObject
) -> None:
    """A batch that was not committed comes again; one that was and is not acked comes again too."""
    said = told(world.bodies())
    until = (DAY + timedelta(days=2)).date()
    waiting = list(said)
    chance.shuffle(waiting)
    service = Service(until)
    for size, fate, limit in data.draw(
        st.lists(
            st.tuples(
                st.integers(1, 60),
                st.sampled_from(["acked", "not committed", "not acked"]),
                st.integers(0, 3),
            ),
            max_size=12,
        )
    ):
        batch, waiting = waiting[:size], waiting[size:]
        if fate != "not committed":
            service.ingest(batch)
        if fate != "acked":
            waiting += batch  # wherever it comes again
        service.fold(limit)
    service.ingest(waiting)
    service.fold(len(service.touched))
    anew = reckoned(said)
    assert service.ledgers == anew
    rebuilt: Counter[Cell] = Counter()
    for key, ledger in anew.items():
        rebuilt.update(summed(key, ledger, until))
    # equal as multisets: a sum that came down to nothing may leave its row
    assert {k: v for k, v in service.days.items() if v} == {k: v for k, v in rebuilt.items() if v}


# --- P5: additivity


@FEW
@given(worlds(), st.lists(st.integers(-(10**11), 2 * 10**11), max_size=5))
def test_p5_usage_is_additive_over_windows_and_groups(world: World, cuts: list[int]) -> None:
    ledgers = reckoned(told(world.bodies()))
    moments = sorted({DAY + timedelta(microseconds=cut) for cut in cuts})
    inside = [moment for moment in moments if WINDOW.start < moment < WINDOW.end]
    edges = [WINDOW.start, *inside, WINDOW.end]
    for key, ledger in ledgers.items():
        whole = used(key, ledger.intervals, ledger.amounts)
        over_windows: Usage = Counter()
        for start, end in pairwise(edges):
            window = Window(start=start, end=end, as_of=WINDOW.as_of)
            over_windows.update(used(key, ledger.intervals, ledger.amounts, window))
        assert over_windows == whole
        for name in ("state", "flavor", "host", "size_gb", "attached_to"):
            groups: dict[object, list[Interval]] = defaultdict(list)
            for item in ledger.intervals:
                groups[item.attributes.get(name)].append(item)
            over_groups: Usage = Counter(used(key, [], ledger.amounts))
            for group in groups.values():
                over_groups.update(used(key, group))
            assert over_groups == whole


# --- P6: losses


def is_audit(message: Message) -> bool:
    return message.event_type.endswith("exists") or is_resent(message)


def is_resent(message: Message) -> bool:
    """By Cinder's audit."""
    beginning = message.payload.get("audit_period_beginning")
    return beginning is not None and beginning == message.payload.get("audit_period_ending")


def covered(thing: Thing, until: datetime) -> Iterator[str]:
    """The ids of the events that an audit after them makes good, before a later event hides them.

    Nothing that comes after it tells of bytes that passed, nor of the release of an address. Every
    body of an instance repeats its last launch; of a volume, an audit must come before the next change.
    """
    messages = [] if isinstance(thing, Meter) else thing.messages(until)
    audits = [m.timestamp for m in messages if is_audit(m) and not is_resent(m)]
    events = [m for m in messages if not is_audit(m)]
    for number, message in enumerate(events):
        is_told = any(message.timestamp < at for at in audits)
        if isinstance(thing, Disk) and message.event_type in ("volume.create.end", DELETED):
            is_told = True  # it is sent again
        elif isinstance(thing, Disk) and message.event_type.endswith(".end"):
            later = [m.timestamp for m in events[number + 1 :] if m.event_type.endswith(".end")]
            until_next = later[0] if later else AS_OF
            is_told = any(message.timestamp < at < until_next for at in audits)
        if is_told:
            yield message.message_id


DELETED = "volume.delete.end"
NAMED = frozenset({Status.REPAIRED, Status.MISMATCH, Status.UNEXPECTED})


def is_named(ledger: Ledger) -> bool:
    """Whether it is said of a resource that not all of its events are here."""
    return any(verdict.status in NAMED for verdict in ledger.reconciliation.verdicts)


@MORE
@given(worlds(fine=False, until=42), st.data())
def test_p6_lost_events_that_audits_cover_change_no_total_or_are_named(
    world: World, data: st.DataObject
) -> None:
    """Of instances nothing changes; a volume's lost change holds from the first audit that shows it.

    That is an audit period later, and half an hour more where another event was between: what an
    audit says against an event of the half hour before it is taken for older than it looks.
    """
    messages = world.messages()
    losable = [name for thing in world.things for name in covered(thing, world.audited_until)]
    assume(losable)
    lost = set(data.draw(st.lists(st.sampled_from(losable), unique=True)))
    kept = [message.body() for message in messages if message.message_id not in lost]
    ledgers = reckoned(told(kept))
    late = microseconds(HOUR * 3 / 2 + 5 * SECOND)
    limits = allowed(world, late)
    ours, truth = usage(ledgers), world.truth()
    for thing in world.things:
        if not isinstance(thing, Disk):
            limits[thing.resource_id] = {}
    # whose volume it was at first is known from its first event or audit
    assert_near(merged(ours), merged(truth), merged(limits))
    for key, ledger in ledgers.items():
        if ours.get(key.resource_id) != truth.get(key.resource_id):
            assert is_named(ledger), key


# the second time to whom it is already: its start shows what the lost end told
HANDED_OVER_TWICE = Disk(
    life=VolumeLife(
        volume_id="20000000-0000-4000-8000-000000000001",
        project_id="p2",
        steps=(
            VolumeStep(at=DAY + timedelta(minutes=3), action="create", size_gb=1),
            VolumeStep(at=DAY + timedelta(minutes=6), action="transfer", project_id="p1"),
            VolumeStep(at=DAY + timedelta(minutes=9), action="transfer", project_id="p1"),
        ),
    )
)


@MORE
@given(disks(1), st.integers(0, 36), st.data())
@example(HANDED_OVER_TWICE, 0, None)
def test_p6_a_volume_s_lost_change_is_named_even_where_no_audit_shows_it(
    disk: Disk, hours: int, data: st.DataObject | None
) -> None:
    """Whatever a later event shows that only a lost one can have changed, proves the loss.

    Nothing proves it where nothing later shows it: then no audit bears out the hours since.
    """
    messages = disk.messages(DAY + hours * HOUR)
    changes = [m.message_id for m in messages if m.event_type in CHANGES_OF_VOLUMES]
    assume(changes)
    lost = set(
        changes[:1]
        if data is None
        else data.draw(st.lists(st.sampled_from(changes), unique=True, min_size=1))
    )
    kept = [message.body() for message in messages if message.message_id not in lost]
    ((_, ledger),) = reckoned(told(kept)).items()
    ours = usage(reckoned(told(kept))).get(disk.resource_id, {})
    assert ours == disk.truth(AS_OF) or is_named(ledger)


CHANGES_OF_VOLUMES = frozenset({"volume.resize.end", "volume.transfer.accept.end"})


def merged(found: Mapping[str, Usage]) -> dict[str, Usage]:
    """By measure alone, and by project."""
    summed: dict[str, Usage] = {}
    for name, amounts in found.items():
        total: Usage = Counter()
        for (_, measure), amount in amounts.items():
            total["", measure] += amount
        summed[name] = dict(total)
    return summed


# --- P7 to P9: audits, time, dialects


@FEW
@given(worlds(), st.data())
def test_p7_further_audits_change_nothing(world: World, data: st.DataObject) -> None:
    quiet = replace(world, audited_until=DAY)
    # what counts is in audits too: bytes are no repetition
    audits = [
        replace(message, message_id=f"again/{message.message_id}", payload=without_counts(message))
        for message in world.messages()
        if message.event_type.endswith("exists")
    ]
    added = data.draw(st.lists(st.sampled_from(audits), max_size=20)) if audits else []
    bodies = [message.body() for message in quiet.messages()]
    before = reckoned(told(bodies))
    after = reckoned(told([*bodies, *(message.body() for message in added)]))
    assert usage(after) == usage(before)
    for key, ledger in before.items():
        assert spans(after[key]) == spans(ledger)


def without_counts(message: Message) -> dict[str, object]:
    payload = {key: value for key, value in message.payload.items() if key != "bandwidth"}
    data = payload.get("nova_object.data")
    if isinstance(data, Mapping):
        payload["nova_object.data"] = {k: v for k, v in data.items() if k != "bandwidth"}
    return payload


def spans(ledger: Ledger, shift: timedelta = timedelta()) -> list[tuple[object, ...]]:
    return [
        (item.start + shift, item.end and item.end + shift, dict(item.attributes))
        for item in ledger.intervals
    ]


@FEW
@given(worlds(), st.integers(-10_000_000, 10_000_000))
def test_p8_a_world_that_happens_later_has_the_same_ledger_later(
    world: World, seconds: int
) -> None:
    """By whole seconds: a moment of none is read as one that was cut or rounded."""
    shift = seconds * SECOND
    said = told(world.bodies())
    now, later = reckoned(said), reckoned([shifted(item, shift) for item in said])
    assert now.keys() == later.keys()
    for key, ledger in now.items():
        assert spans(later[key]) == spans(ledger, shift)
        assert [(a.counter, a.label, a.at, a.amount) for a in later[key].amounts] == [
            (a.counter, a.label, a.at + shift, a.amount) for a in ledger.amounts
        ]
        assert [(o.action, o.outcome) for o in later[key].operations] == [
            (o.action, o.outcome) for o in ledger.operations
        ]


def shifted(said: Said, shift: timedelta) -> Said:
    key, statement, evidence = said
    period = statement.period
    return (
        key,
        statement._replace(
            at=statement.at and statement.at + shift,
            born_at=statement.born_at and statement.born_at + shift,
            ended_at=statement.ended_at and statement.ended_at + shift,
            period=period and (period[0] + shift, period[1] + shift),
        ),
        evidence._replace(event_time=evidence.event_time + shift),
    )


@MORE
@given(worlds())
def test_p9_either_dialect_alone_differs_by_less_than_a_second_an_edge(world: World) -> None:
    legacy = usage(reckoned(told(replace(world, topics=frozenset({LEGACY})).bodies())))
    versioned = usage(reckoned(told(replace(world, topics=frozenset({VERSIONED})).bodies())))
    assert_near(legacy, versioned, allowed(world, 1_000_000))
    assert legacy.keys() == versioned.keys()


# --- a day of a real Nova


@cache
def nova_bodies() -> tuple[bytes, ...]:
    with gzip.open(DATA / "nova_day.ndjson.gz") as lines:
        return tuple(line.rstrip(b"\n") for line in lines)


@cache
def nova_said() -> tuple[tuple[str, str, Said], ...]:
    """Every statement of the day, with its topic and event type."""
    found = []
    for body in nova_bodies():
        message = json.loads(json.loads(body)["oslo.message"])
        is_versioned = isinstance(message["payload"], dict) and any(
            key.startswith("nova_object") for key in message["payload"]
        )
        topic = VERSIONED if is_versioned else LEGACY
        found += [(topic, message["event_type"], said) for said in told([body])]
    return tuple(found)


@cache
def nova_rows() -> dict[str, Any]:
    """What was used by Nova's own rows."""
    with gzip.open(DATA / "nova_day.rows.json.gz") as text:
        expected: dict[str, Any] = json.load(text)["expected"]
    return expected


def nova_usage(ledgers: Ledgers) -> dict[str, dict[str, int]]:
    start, end = (datetime.fromisoformat(nova_rows()[name]) for name in ("start", "end"))
    window = Window(start=start, end=end, as_of=end)
    measures = packaged().measures_of(INSTANCE)
    found = {}
    for key, ledger in ledgers.items():
        if key.resource_type == INSTANCE and ledger.intervals:
            found[key.resource_id] = totals(measures, ledger.intervals, window)
    return found


def off_of(key: ResourceKey, ledgers: Ledgers, times_half_a_second: int) -> bool:
    """Whether an instance's totals are further from those of the rows than its edges explain."""
    ours = nova_usage({key: ledgers[key]} if key in ledgers else {}).get(key.resource_id, {})
    theirs = nova_rows()["instances"].get(key.resource_id, {})
    leeway = nova_rows()["leeway_of_half_a_second"].get(key.resource_id, {})
    return any(
        abs(ours.get(name, 0) - theirs.get(name, 0)) > times_half_a_second * leeway.get(name, 0)
        for name in ("instance_hours", "vcpu_hours", "ram_mb_hours", "local_gb_hours")
    )


BOTH = frozenset({LEGACY, VERSIONED})
# legacy bodies tell the moment before the database rounds it, versioned ones cut it
DIALECTS = [(BOTH, 1), (frozenset({LEGACY}), 1), (frozenset({VERSIONED}), 2)]


@pytest.mark.parametrize(("topics", "leeway"), DIALECTS)
def test_p9_the_day_of_a_real_nova_is_billed_as_its_rows_say(
    topics: frozenset[str], leeway: int
) -> None:
    ledgers = reckoned(said for topic, _, said in nova_said() if topic in topics)
    assert [key for key in ledgers if off_of(key, ledgers, leeway)] == []
    assert len(nova_usage(ledgers)) == len(nova_rows()["instances"])


@settings(max_examples=6, deadline=None)
@given(CHANCES)
def test_p1_to_p3_the_day_of_a_real_nova_in_any_order_doubled_and_in_any_batches(
    chance: random.Random,
) -> None:
    said = [item for _, _, item in nova_said()]
    quiet = nova_quiet()
    doubled = said + chance.choices(said, k=300)
    chance.shuffle(doubled)
    service = Service(date(2026, 5, 10))
    while doubled:
        size = chance.randrange(200, 1500)
        service.ingest(doubled[:size])
        doubled = doubled[size:]
        service.fold(chance.randrange(8))
    service.fold(len(service.touched))
    assert service.ledgers == quiet


@cache
def nova_quiet() -> Ledgers:
    return reckoned(item for _, _, item in nova_said())


@pytest.mark.parametrize(("topics", "leeway"), DIALECTS)
def test_p6_of_the_day_of_a_real_nova_any_one_event_type_may_be_lost(
    topics: frozenset[str], leeway: int
) -> None:
    """Then the totals are those of the rows all the same, or what differs is named."""
    by_resource: dict[ResourceKey, list[tuple[str, Said]]] = defaultdict(list)
    for topic, event_type, said in nova_said():
        if topic in topics and said[0].resource_type == INSTANCE:
            by_resource[said[0]].append((event_type, said))
    wrong: dict[bool, list[tuple[str, str]]] = {True: [], False: []}
    for key, items in by_resource.items():
        for lost in sorted({event_type for event_type, _ in items}):
            names = {lost, TWINS.get(lost, lost)}
            kept = [said for event_type, said in items if event_type not in names]
            ledgers = reckoned(kept)
            if off_of(key, ledgers, leeway):
                wrong[key in ledgers and is_named(ledgers[key])].append((lost, key.resource_id))
    assert wrong[False] == []


TWINS = {
    "compute.instance.create.end": "instance.create.end",
    "compute.instance.delete.end": "instance.delete.end",
    "compute.instance.update": "instance.update",
    "compute.instance.rebuild.end": "instance.rebuild.end",
    "compute.instance.finish_resize.end": "instance.resize_finish.end",
    "compute.instance.resize.revert.end": "instance.resize_revert.end",
    "compute.instance.rescue.end": "instance.rescue.end",
    "compute.instance.unshelve.end": "instance.unshelve.end",
}
"""The events of both dialects that move a billing edge of that day: lost together."""


# --- P10: any input

ODD_TEXTS = ["", "None", "\0", "\ud800", "deleted", "x" * 300]
ODD_TIMES = ["2014-05-3107: 19: 43.463101", "9999-12-31 23:59:59", "0001-01-01T00:00:00Z"]
LEAVES: st.SearchStrategy[object] = (
    st.sampled_from(ODD_TEXTS + ODD_TIMES)
    | st.sampled_from([None, True, -1, 0, 10**30, 1.5])
    | st.just([])
    | st.just({})
    | st.just([{}])
    | st.text(max_size=5)
)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2117), CHANCES, st.lists(LEAVES, max_size=4))
def test_p10_whatever_becomes_of_a_real_body_it_is_an_event_or_says_why_not(
    number: int, chance: random.Random, leaves: list[object]
) -> None:
    """And of what it says, together with the truth, a ledger can be made and written down."""
    inner = json.loads(json.loads(nova_bodies()[number])["oslo.message"])
    for leaf in leaves:
        spoil(inner, leaf, chance)
    body = json.dumps({"oslo.version": "2.0", "oslo.message": json.dumps(inner)}).encode()
    if chance.random() < 0.2:
        body = body[: chance.randrange(len(body))]
    if chance.random() < 0.2:
        at = chance.randrange(len(body) + 1)
        body = body[:at] + chance.randbytes(2) + body[at + 2 :]
    event = opened_or_none(body)
    if event is None:
        return
    texts = [event.notification.message_id, event.notification.event_type]
    for key, statement in event.normalised.said:
        texts.append(key.resource_id)
        if statement is not None:
            written = encode(statement)
            texts.append(written)
            assert decode(written) == statement
    for text in texts:
        assert "\0" not in text
        text.encode("utf-8")
    others = [said for _, _, said in nova_said()[:: 40 + number % 7]]
    keys = {key for key, statement in event.normalised.said if statement is not None}
    mine = [said for _, _, said in nova_said() if said[0] in keys][:20]
    reckoned([*others[:20], *mine, *told([body])])


def opened_or_none(body: bytes) -> Event | None:
    """Nothing where it is quarantined, which is the one error that there is."""
    try:
        return opened(body)
    except UnreadableError:
        return None


def spoil(value: Any, leaf: object, chance: random.Random) -> None:
    """Somewhere inside, something is the leaf instead."""
    while True:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = chance.choice(list(keys))
        inner = value[key]
        if isinstance(inner, dict | list) and inner and chance.random() < 0.8:
            value = inner
            continue
        value[key] = deepcopy(leaf)
        return
