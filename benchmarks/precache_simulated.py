"""Swarms larger than any machine here: the policies of precache in an event simulation, up to 10,000 hosts.

What decides is the product's own: `receiving.Receiver` with `swarm.Picker` at each host, `swarm.SeedPolicy` at the
seed, `graph.Graph` between them. What is modelled is what lies between:

- an uplink sends one piece after the other, in the order of asking, each in the time that one TCP stream would take
  for it, longer by the share that streams which compete lose (`LOST_SHARE`); a link that is busy queues, and a sender
  with `swarm.UPLOAD_QUEUE` askers waiting says that it is busy;
- a downlink receives one after the other in the same way; a piece is there when its last byte is;
- a request takes `ASK_SECONDS` to get to its sender and the first byte to come back, news of pieces come in batches,
  `TELL_SECONDS` late (both are queues of busy links, more than distance);
- hosts begin within `START_SECONDS` of the order;
- with racks, a rack's uplink and downlink are two more such queues for what crosses.

Measured on the rig: `LOST_SHARE` (8 hosts at 50 Mbit/s, all sending and receiving 1, 2 and 4 streams at once, with the
congestion control and the windows that agents use: 0.2, 0.8 and 0.3 % less than one stream alone, of which the most is
taken; with the machine's own control and no windows it was 1.5 to 2.9 %) and `START_SECONDS` (the first payload came
after 114 to 155 ms in quiet runs of 8). `TELL_SECONDS` is the batch of a piece map; `ASK_SECONDS` is an estimate.
**The processors are not modelled**: where a real run keeps both cores busy, it is slower than this says. What a ratio
below is worth is said only by `simulated_over_real`, from figures of real runs on the same machine (`--real-8`,
`--real-16`); without them the run says nothing about how near the truth it is. Real 1.041 and 1.059 to 1.082 are
simulated as 1.032 and 1.041.

**How many requests are best it cannot say**: fewer than 13 come to less here (10 to 0.5 % less for 1,000), but to late
single hosts on real links: of 16 with 10 or 8 the last ended at 1.07 to 1.12, with 13 at 1.06 to 1.08. Senders with
two slots at once, simulated, came to the same ratios as one piece after the other.

**What a ratio is made of**: the time that a piece takes to get to all, once. From the first third of a run on, 300
hosts use 98 to 99.5 % of what `LOST_SHARE` (then 0.02) leaves of their uplinks; but at its beginning they have little
that others lack. 4 % of T* is lost there, half of it in the first four seconds, and is never made good: the seed is no
faster than they are. More hosts lose more: 1.051, 1.061, 1.065 and 1.081 for 100, 300, 1,000 and 10,000. Shorter or
longer queues at the senders (4 or 8 askers) and senders that begin with what they never sent change nothing for the
better at 300.

The cost is 6 to 7 events a piece and host, however many hosts. With `--compiled`, which comes to the same figures to
the last digit: 3 s of CPU for 100 hosts, 12 for 300 and 67 for 1,000 (60 MB), on two cores that ten processes wanted;
10,000 take 280 MB and 23 minutes. Without it, 6 to 9 s for 100 and 150 to 180 for 1,000.

T* is Kumar and Ross' bound (2006) with the payload rate of one stream, as in the real runs. The effect of a slow host
is the others' last time with it over that without it.
"""

import argparse
import gc
import heapq
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import bench
from hostler_precache.swarming import graph, receiving, swarm
from hostler_precache.swarming.graph import Graph
from hostler_precache.swarming.receiving import Receiver, Request, Source
from hostler_precache.swarming.swarm import REQUESTS, UPLOAD_QUEUE, News, Picker, SeedPolicy

LARGE: Final = (100, 1000, 10_000)
PIECES: Final = 1024
PIECE_BYTES: Final = 256 * 1024
SEED_QUEUE: Final = 64
# what they come from: see above
LOST_SHARE: Final = 0.008
START_SECONDS: Final = 0.15
ASK_SECONDS: Final = 0.03
TELL_SECONDS: Final = 0.05
SPREAD_SECONDS: Final = 2.0
JITTER: Final = 0.1
PAYLOAD_SHARE: Final = 0.957
# of a large swarm, how far it is, so often
SAID_HOSTS: Final = 1000
SAID_SECONDS: Final = 10.0


@dataclass(slots=True)
class Link:
    """One direction of a network card, or of a rack: what is sent leaves one after the other."""

    seconds: float
    free_at: float = 0.0

    def carry(self, at: float, factor: float) -> float:
        """A piece is ready for it at that moment; when its last byte has passed."""
        begun = max(at, self.free_at)
        self.free_at = begun + self.seconds * factor
        return self.free_at


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A swarm and its network. Rates in bits per second; rates of hosts that differ by number, from 1."""

    hosts: int
    bps: float
    pieces: int = PIECES
    piece_bytes: int = PIECE_BYTES
    rack_hosts: int = 0
    rack_bps: float = 0.0
    slow: dict[int, float] = field(default_factory=dict)
    killed: dict[int, float] = field(default_factory=dict)
    loss: float = 0.0


@dataclass(slots=True, eq=False)
class Host:
    """One receiver, and the sender that it is."""

    number: int
    name: str
    rack: int
    receiver: Receiver
    up: Link
    down: Link
    dies_at: float = float("inf")
    followers: list["Host"] = field(default_factory=list)
    # what neighbours have told, in the order in which it comes: when, who, what
    inbox: deque[tuple[float, Source, News]] = field(default_factory=deque)
    inboxes: list[tuple["Host", Source]] = field(default_factory=list)
    # when those that wait at this sender begin to be sent
    begins: deque[float] = field(default_factory=deque)
    is_hungry: bool = False
    wakes_at: float = float("inf")
    done_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run came to. Times over T*; copies are of the image; the last time in seconds, too."""

    last_seconds: float
    last: float
    median: float
    seed_copies: float
    duplicates: float
    refusals: float
    copies_into_racks: float
    events: int


class Simulation:
    """One run of a scene."""

    def __init__(self, scene: Scene, *, seed: int = 1) -> None:
        self.scene = scene
        self.rng = random.Random(seed)  # noqa: S311  a simulation
        self.seconds = scene.piece_bytes * 8 / (scene.bps * PAYLOAD_SHARE)
        self.policy = SeedPolicy(scene.pieces)
        self.seed_up = Link(self.seconds)
        self.seed_begins: deque[float] = deque()
        self.rack_up: dict[int, Link] = {}
        self.rack_down: dict[int, Link] = {}
        self.sent_by_seed = self.duplicates = self.crossings = self.refusals = self.events = 0
        self._queue: list[tuple[float, int, Action, Host, Any]] = []
        self._serial = 0
        self.hosts: list[Host] = []
        self._build()

    def _build(self) -> None:
        scene, graph = self.scene, Graph("simulated")
        by_name: dict[str, Host] = {}
        for number in range(1, scene.hosts + 1):
            rack = (number - 1) // scene.rack_hosts if scene.rack_hosts else 0
            graph.add(str(number), f"rack-{rack}" if scene.rack_hosts else None)
            seconds = self.seconds * scene.bps / scene.slow.get(number, scene.bps)
            receiver = Receiver(
                scene.pieces,
                have=0,
                piece_bytes=scene.piece_bytes,
                requests=REQUESTS,
                rng=self.rng,
                name=str(number),
            )
            host = by_name[str(number)] = Host(
                number, str(number), rack, receiver, Link(seconds), Link(seconds)
            )
            host.dies_at = scene.killed.get(number, host.dies_at)
            self.hosts.append(host)
        if scene.rack_hosts:
            seconds = self.seconds * scene.bps / scene.rack_bps
            for rack in {host.rack for host in self.hosts}:
                self.rack_up[rack], self.rack_down[rack] = Link(seconds), Link(seconds)
        for host in self.hosts:
            host.receiver.add("seed", is_seed=True)
            for name in graph.neighbours(host.name):
                other = by_name[name]
                source = host.receiver.add(name, in_rack=other.rack == host.rack)
                other.inboxes.append((host, source))
                host.receiver.heard(source, News(), 0.0)
        self._by_name = by_name

    def run(self) -> Outcome:
        """Until every host that lives has all."""
        for host in self.hosts:
            self._wake_at(host, START_SECONDS * self.rng.uniform(0.5, 1))
            if host.dies_at < float("inf"):
                self._at(host.dies_at, self._kill, host, None)
        queue, events = self._queue, 0
        say_at = SAID_SECONDS if self.scene.hosts >= SAID_HOSTS else float("inf")
        while queue:
            now, _, action, host, what = heapq.heappop(queue)
            if now >= say_at:
                self._say(now)
                say_at += SAID_SECONDS
            events += 1
            action(now, host, what)
        self.events = events
        return self._outcome()

    def _say(self, now: float) -> None:
        have = sum(host.receiver.picker.have.bit_count() for host in self.hosts)
        share = have / (self.scene.pieces * self.scene.hosts)
        bench.say(
            f"{now:.0f} s simulated, {share:.3f} received, {time.process_time():.0f} s of CPU"
        )

    def _outcome(self) -> Outcome:
        scene = self.scene
        fast = [
            host
            for host in self.hosts
            if host.dies_at == float("inf") and host.number not in scene.slow
        ]
        ends = sorted(host.done_at or float("inf") for host in fast)
        slowest = [scene.slow.get(host.number, scene.bps) for host in self.hosts]
        size = scene.pieces * scene.piece_bytes * 8 / PAYLOAD_SHARE
        t_star = max(size / scene.bps, scene.hosts * size / (scene.bps + sum(slowest)))
        whole = scene.pieces * scene.hosts
        racks = max(1, len(self.rack_down))
        return Outcome(
            last_seconds=ends[-1],
            last=ends[-1] / t_star,
            median=statistics.median(ends) / t_star,
            seed_copies=self.sent_by_seed / scene.pieces,
            duplicates=self.duplicates / whole,
            refusals=self.refusals / whole,
            copies_into_racks=self.crossings / scene.pieces / racks,
            events=self.events,
        )

    # --- what happens: each action with the moment, the receiver that it is about, and what

    def _at(self, when: float, action: "Action", host: Host, what: object) -> None:
        self._serial = serial = self._serial + 1
        heapq.heappush(self._queue, (when, serial, action, host, what))

    def _fill(self, now: float, host: Host) -> None:
        receiver, inbox = host.receiver, host.inbox
        while inbox and inbox[0][0] <= now:
            _, source, news = inbox.popleft()
            relayed = receiver.heard(source, news, now)
            if relayed:
                self._tell(now, host, News(coming=relayed))
        while (request := receiver.ask(now)) is not None:
            source = request.source
            if source.is_seed:
                self._ask_seed(now + ASK_SECONDS / 2, host, request)
                continue
            if not source.in_rack:
                assert request.piece is not None
                self._tell(now, host, News(coming=1 << request.piece))
            self._ask(now + ASK_SECONDS / 2, host, request)
        host.is_hungry = receiver.is_hungry
        if host.is_hungry:
            # the next news that changes anything, or whoever may be asked again
            lacking = _lacking(receiver.picker)
            wakes_at = now + receiver.rest_seconds(now)
            for at, _, news in inbox:
                if at >= wakes_at:
                    break
                if news.have & lacking:
                    wakes_at = at
                    break
            self._wake_at(host, wakes_at)

    # A host has one timer, as an agent has: a wake that an earlier one replaced is still in the queue, but is none.
    # Would it fill, it would set the next, and there would be ever more.

    def _wake_at(self, host: Host, when: float) -> None:
        if when < host.wakes_at:
            host.wakes_at = when
            self._at(when, self._wake, host, None)

    def _wake(self, now: float, host: Host, what: object) -> None:
        del what
        if host.wakes_at != now or host.done_at is not None or host.dies_at <= now:
            return
        host.wakes_at = float("inf")
        self._fill(now, host)

    def _factor(self) -> float:
        """How much longer than a stream alone this piece takes."""
        factor = (1 + LOST_SHARE) * (1 - JITTER + 2 * JITTER * self.rng.random())
        loss = self.scene.loss
        return factor * 4 if loss and self.rng.random() < loss else factor

    # All requests take equally long to their senders: they come there in the order in which they are made, and so what
    # a sender will do with one is known as it is made.

    def _ask(self, at: float, host: Host, request: Request) -> None:
        """The request is at its sender at that moment: the piece takes its place in the queue of the uplink."""
        sender = self._by_name[request.source.name]
        up, begins = sender.up, sender.begins
        if sender.dies_at <= at:
            self._at(at + ASK_SECONDS / 2, self._broken, host, request)
            return
        while begins and begins[0] <= at:
            begins.popleft()
        if len(begins) >= UPLOAD_QUEUE:
            self.refusals += 1
            self._at(at + ASK_SECONDS / 2, self._refused, host, request)
            return
        factor = self._factor()
        ends = up.carry(at, factor)
        if ends > sender.dies_at:
            self._at(sender.dies_at + ASK_SECONDS / 2, self._broken, host, request)
            return
        begin = ends - up.seconds * factor
        if begin > at:
            begins.append(begin)
        if sender.rack != host.rack and self.rack_up:
            self._at(begin, self._leaves_rack, host, (sender, request, factor))
        else:
            self._at(begin, self._arrives, host, (up.seconds, request, factor))

    def _ask_seed(self, at: float, host: Host, request: Request) -> None:
        waiting = self.seed_begins
        while waiting and waiting[0] <= at:
            waiting.popleft()
        if len(waiting) >= SEED_QUEUE:
            self.refusals += 1
            self._at(at + ASK_SECONDS / 2, self._refused, host, request)
            return
        # what the seed decides, it decides when it begins to send
        begin = max(at, self.seed_up.free_at)
        piece = request.piece
        if piece is None:
            chosen = self.policy.next(host.name, begin)
            if chosen is None:
                self._at(begin + ASK_SECONDS / 2, self._injected, host, request)
                return
            piece = chosen
        elif not self.policy.may_send(piece, host.name, begin, spread_seconds=SPREAD_SECONDS):
            self.refusals += 1
            self._at(begin + ASK_SECONDS / 2, self._refused, host, request)
            return
        self.sent_by_seed += 1
        factor = self._factor()
        self.policy.completed(piece, self.seed_up.carry(begin, factor))
        waiting.append(begin)
        if request.piece is None and not host.receiver.chosen(request, piece):
            self.duplicates += 1
            host.receiver.ended(request)
            return
        self._at(begin, self._enters_rack, host, (self.seconds, request, factor))

    # A piece flows through all the links on its way at once: it is there when the last of its bytes has passed the
    # one that is the slowest, or that was busy the longest.

    def _leaves_rack(self, now: float, host: Host, what: tuple[Host, Request, float]) -> None:
        sender, request, factor = what
        link = self.rack_up[sender.rack]
        begin = link.carry(now, factor) - link.seconds * factor
        self._at(begin, self._enters_rack, host, (sender.up.seconds, request, factor))

    def _enters_rack(self, now: float, host: Host, what: tuple[float, Request, float]) -> None:
        link = self.rack_down.get(host.rack)
        if link is None:
            self._arrives(now, host, what)
            return
        self.crossings += 1
        factor = what[2]
        self._at(link.carry(now, factor) - link.seconds * factor, self._arrives, host, what)

    def _arrives(self, now: float, host: Host, what: tuple[float, Request, float]) -> None:
        seconds, request, factor = what
        here = max(now + seconds * factor, host.down.carry(now, factor))
        self._at(here + ASK_SECONDS / 2, self._came, host, request)

    def _came(self, now: float, host: Host, request: Request) -> None:
        if host.done_at is not None or host.dies_at <= now:
            return
        receiver = host.receiver
        losers = receiver.arrived(request, now)
        if losers is None:
            self.duplicates += 1
        else:
            assert request.piece is not None
            for loser in losers:  # what has left already is lost
                receiver.ended(loser)
            self._tell(now, host, News(have=1 << request.piece))
        receiver.ended(request)
        if receiver.picker.is_complete:
            host.done_at = now
            for other in receiver.sources:  # it is not told any more
                if not other.is_seed:
                    self._by_name[other.name].inboxes.remove((host, other))
            host.inbox.clear()
        else:
            self._fill(now, host)

    def _tell(self, now: float, host: Host, news: News) -> None:
        """The neighbours hear of it; who waits for something to ask for is woken by it."""
        at, have = now + TELL_SECONDS, news.have
        for other, source in host.inboxes:
            other.inbox.append((at, source, news))
            if other.is_hungry and at < other.wakes_at and have & _lacking(other.receiver.picker):
                self._wake_at(other, at)

    def _injected(self, now: float, host: Host, request: Request) -> None:
        host.receiver.injected(request.source, now)
        self._over(now, host, request)

    def _refused(self, now: float, host: Host, request: Request) -> None:
        host.receiver.busy(request, 0.0, now)
        self._over(now, host, request)

    def _broken(self, now: float, host: Host, request: Request) -> None:
        host.receiver.failed(request.source, now)
        self._over(now, host, request)

    def _over(self, now: float, host: Host, request: Request) -> None:
        host.receiver.ended(request)
        if host.done_at is None and host.dies_at > now:
            self._fill(now, host)

    def _kill(self, now: float, host: Host, what: object) -> None:
        del now, what
        for other, source in host.inboxes:
            other.inbox = deque(news for news in other.inbox if news[1] is not source)
            other.receiver.silent(source)


def _lacking(picker: Picker) -> int:
    """What to hear of is worth a look: when all that it lacks is on its way, who else has that."""
    return picker.missing or ~picker.have


Action = Callable[[float, Host, Any], None]


def simulated(scene: Scene, *, runs: int = 1) -> Outcome:
    """The outcome of a scene; of several runs, the one whose last host is in the middle."""
    outcomes = [Simulation(scene, seed=seed).run() for seed in range(1, runs + 1)]
    return sorted(outcomes, key=lambda one: one.last)[len(outcomes) // 2]


def _run_compiled(arguments: list[str]) -> int:
    """Run this with itself and the policies translated by mypyc; what that ended with."""
    here = Path(__file__)
    with tempfile.TemporaryDirectory() as name:
        package = Path(name, "hostler_precache", "swarming")
        package.mkdir(parents=True)
        for folder in (package.parent, package):
            (folder / "__init__.py").touch()
        policies = (swarm.__file__, receiving.__file__, graph.__file__)
        modules = [
            shutil.copy(str(here), name),
            *(shutil.copy(policy, str(package)) for policy in policies),
        ]
        environment = {**os.environ, "PYTHONPATH": f"{name}{os.pathsep}{here.parent}"}
        subprocess.run(
            [sys.executable, "-m", "mypyc", "--ignore-missing-imports", *modules],
            cwd=name,
            env=environment,
            stdout=sys.stderr,
            check=True,
        )
        # what is compiled has no docstring
        run = f"import {here.stem} as run; run.__doc__ = ''; run.main()"
        return subprocess.run(
            [sys.executable, "-c", run, *arguments], env=environment, check=False
        ).returncode


def main() -> None:
    """Print the tables and the figures."""
    # nothing abbreviated: what is compiled is told all but one of the options
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--real-8", type=float, help="last_over_t_star_8 of precache_swarm")
    parser.add_argument("--real-16", type=float, help="last_over_t_star_16 of precache_swarm")
    parser.add_argument(
        "--hosts",
        type=int,
        choices=LARGE,
        default=1000,
        help="the largest swarm: 10,000 takes 23 minutes of CPU if --compiled, and an hour if not",
    )
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="the same figures in less than half the time; needs a C compiler and Python's headers",
    )
    options = parser.parse_args()
    if options.compiled:
        sys.exit(_run_compiled([one for one in sys.argv[1:] if one != "--compiled"]))
    gc.disable()  # nothing here is ever garbage in a cycle worth the looking
    rows: list[tuple[str, Scene, int]] = [
        ("8 hosts, 100 Mbit/s", Scene(hosts=8, bps=100e6), 5),
        ("16 hosts, 50 Mbit/s", Scene(hosts=16, bps=50e6), 5),
        ("100 hosts", _large(100), 1),
        ("100 hosts, 256 MiB at 100 Mbit/s", Scene(hosts=100, bps=100e6), 1),
        ("7 hosts, 100 Mbit/s", Scene(hosts=7, bps=100e6), 5),
        ("8 hosts, one with a tenth", Scene(hosts=8, bps=100e6, slow={8: 10e6}), 5),
        ("8 hosts, one killed half-way", Scene(hosts=8, bps=100e6, killed={8: 11.0}), 5),
        ("100 hosts, 10 killed half-way", _killed(100, 10), 1),
        (
            "100 hosts, 1 % of pieces take 4 times as long",
            Scene(hosts=100, bps=100e6, loss=0.01),
            1,
        ),
        ("100 hosts, 5 with a tenth", _slow(100, 5), 1),
        ("2 racks of 8 behind 4 hosts' rate", _racks(16, 8, 4), 5),
        ("8 racks of 20 behind 5 hosts' rate", _racks(160, 20, 5), 1),
        *(
            (f"{hosts:,} hosts", _large(hosts), 1)
            for hosts in LARGE
            if 100 < hosts <= options.hosts
        ),
    ]
    found: dict[str, Outcome] = {}
    cpu_seconds: dict[str, float] = {}
    shown: list[tuple[object, ...]] = []
    for name, scene, runs in rows:
        began = time.process_time()
        outcome = found[name] = simulated(scene, runs=runs)
        took = cpu_seconds[name] = time.process_time() - began
        bench.say(f"{name}: {outcome.last:.3f} in {took:.0f} s of CPU, {outcome.events:,} events")
        shown.append(
            (
                name,
                outcome.last,
                outcome.median,
                outcome.seed_copies,
                outcome.duplicates,
                outcome.refusals,
                outcome.copies_into_racks,
                took,
            )
        )
        gc.collect()
    bench.table(
        (
            "swarm",
            "last / T*",
            "median / T*",
            "seed's copies",
            "duplicates",
            "refused",
            "into a rack",
            "CPU s",
        ),
        shown,
    )
    ratios = {
        f"ratio_{hosts}": found[f"{hosts:,} hosts"].last
        for hosts in LARGE
        if hosts <= options.hosts
    }
    if options.hosts < max(LARGE):
        bench.say(f"Not simulated: {max(LARGE):,} hosts (--hosts {max(LARGE)})")
    real = [
        found[name].last / measured
        for name, measured in (
            ("8 hosts, 100 Mbit/s", options.real_8),
            ("16 hosts, 50 Mbit/s", options.real_16),
        )
        if measured
    ]
    racks = found["2 racks of 8 behind 4 hosts' rate"]
    # the ratio that is further off
    worst = max(real, key=lambda ratio: abs(ratio - 1)) if real else None
    bench.conclude(
        "precache_simulated",
        {
            **ratios,
            **{
                f"cpu_seconds_{hosts}": cpu_seconds[f"{hosts:,} hosts"]
                for hosts in LARGE
                if hosts <= options.hosts
            },
            "ratio_8": found["8 hosts, 100 Mbit/s"].last,
            "ratio_16": found["16 hosts, 50 Mbit/s"].last,
            "simulated_over_real": worst,
            "simulated_off_real": None if worst is None else abs(worst - 1),
            "slow_host_effect": (
                found["8 hosts, one with a tenth"].last_seconds
                / found["7 hosts, 100 Mbit/s"].last_seconds
            ),
            "slow_hosts_of_100_effect": (
                found["100 hosts, 5 with a tenth"].last_seconds
                / found["100 hosts, 256 MiB at 100 Mbit/s"].last_seconds
            ),
            "killed_over_t_star": max(
                found["8 hosts, one killed half-way"].last,
                found["100 hosts, 10 killed half-way"].last,
            ),
            "cross_rack_copies": racks.copies_into_racks,
            "ratio_difference": racks.last - found["16 hosts, 50 Mbit/s"].last,
            "cross_rack_copies_8_racks": found[
                "8 racks of 20 behind 5 hosts' rate"
            ].copies_into_racks,
        },
        {
            **dict.fromkeys(ratios, "<= 1.08"),
            "slow_host_effect": "<= 1.03",
            "killed_over_t_star": "<= 1.25",
            "cross_rack_copies": "<= 1.3",
            "ratio_difference": "<= 0.03",
            **({"simulated_off_real": "<= 0.03"} if real else {}),
        },
    )


def _large(hosts: int) -> Scene:
    """An image as clouds have them, 8 GiB in 1,024 pieces, at a share of 1 Gbit/s; delays as on the small rig."""
    return Scene(hosts=hosts, bps=1e9, piece_bytes=8 << 20)


def _slow(hosts: int, slow: int) -> Scene:
    return Scene(hosts=hosts, bps=100e6, slow=dict.fromkeys(range(1, slow + 1), 10e6))


def _killed(hosts: int, killed: int) -> Scene:
    return Scene(hosts=hosts, bps=100e6, killed=dict.fromkeys(range(1, killed + 1), 11.0))


def _racks(hosts: int, rack_hosts: int, uplink_hosts: int) -> Scene:
    return Scene(hosts=hosts, bps=50e6, rack_hosts=rack_hosts, rack_bps=50e6 * uplink_hosts)


if __name__ == "__main__":
    main()
