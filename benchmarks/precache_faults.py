"""What one slow host does to the others, and what it costs when hosts die in the middle.

    python benchmarks/precache_faults.py [--turns 1] [--peers all|none|NAME,...] [--hosts 8] [--size-mib 256]
                                         [--mbit 100] [--logs DIRECTORY]

- **slow**: one of the hosts has a tenth of the others' bandwidth, both ways. `slow_host_effect` is when the others had
  the image, over when they had it in a run of their own without that host, on the same rig in the same turn. For the
  peers, too.
- **killed**: a tenth of the hosts, at least one, is killed with SIGKILL when half of the bound has passed;
  `killed_over_t_star` is when the others had the image. Then those who were killed are started again, and
  `killed_host_received` is what came to the interface of such a host before and after together, over the size of the
  file: 1 and headers, if it fetched nothing twice. The journal of what a host has is written once a second, and what
  was on the wire is lost with the process, so that up to about a second's bytes come again.
"""

import argparse
import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial

import bench
import network_rig
import precache_cloud
import precache_rivals
import precache_swarm
import swarm_race
from hostler_common import testing
from network_rig import Traffic
from precache_cloud import NAME, Cloud
from swarm_race import Clock, Course, Result

SLOW_SHARE = 10
KILLED_SHARE = 10
RESTART_SECONDS = 600.0

Racer = Callable[[Course], Awaitable[Result]]


async def slow_host(racer: Racer, course: Course, slow: str) -> tuple[Result, Result]:
    """The others' result with the slow host among them, and without it."""
    others = [name for name in course.receivers if name != slow]
    with_it = await racer(course.among(course.receivers, finishers=others))
    with_it.show()
    without_it = await racer(course.among(others))
    without_it.show()
    return with_it, without_it


class Killing:
    """Kills some hosts in the middle of a run, and afterwards starts them again."""

    def __init__(self, course: Course, victims: Sequence[str]) -> None:
        self._course = course
        self._victims = victims
        self._base: Mapping[str, Traffic] = {}
        self._before: Mapping[str, Traffic] = {}

    async def during(self, cloud: Cloud, clock: Clock) -> None:
        """They are killed when half of the bound has passed."""
        self._base = cloud.course.rig.traffic()
        await asyncio.sleep(self._course.bound_seconds / 2)
        if early := clock.done.keys() & set(self._victims):
            raise RuntimeError(f"done too early to be killed: {sorted(early)}")
        for host in self._victims:
            await cloud.agents[host].kill()
        self._before = cloud.course.rig.traffic()

    async def after(self, cloud: Cloud) -> Mapping[str, float]:
        """They run again and have the image; what came to them in all."""
        rig, size = cloud.course.rig, cloud.course.size_bytes
        again = rig.traffic()
        copies, kept = [], []
        for host in self._victims:
            await cloud.start_agent(host)
        for host in self._victims:
            await testing.eventually(partial(_exists, cloud, host), seconds=RESTART_SECONDS)
            copy = cloud.directories[host] / cloud.image_id
            if await asyncio.to_thread(swarm_race.sha256_of, copy) != cloud.course.sha256:
                raise RuntimeError(f"{host} has another file")
        ended = rig.traffic()
        for host in self._victims:
            before = self._before[host].since(self._base[host]).received_bytes
            came = ended[host].since(again[host]).received_bytes
            kept.append(before / size)
            copies.append((before + came) / size)
        return {"killed_host_had": min(kept), "killed_host_received": max(copies)}


async def _exists(cloud: Cloud, host: str) -> bool:
    cloud.check()
    return (cloud.directories[host] / cloud.image_id).exists()


async def measure_slow(
    stage: bench.Stage, arguments: argparse.Namespace
) -> dict[str, list[tuple[Result, Result]]]:
    """Everybody with one slow host, in turns."""
    rate_bps = int(arguments.mbit * precache_swarm.MBIT)
    plan = swarm_race.uniform(arguments.hosts, rate_bps)
    slow = f"h{arguments.hosts}"
    plan = network_rig.Plan(hosts={**plan.hosts, slow: rate_bps // SLOW_SHARE})
    found: dict[str, list[tuple[Result, Result]]] = defaultdict(list)
    with network_rig.network(plan) as rig:
        course = await swarm_race.course(rig, arguments.size_mib << 20)
        others = course.among([name for name in course.receivers if name != slow])
        bench.say(f"{slow} has a tenth; without it {precache_swarm.describe(others, rate_bps)}")

        async def ours(course: Course) -> Result:
            return await precache_cloud.run(stage, course, logs=arguments.logs)

        for turn in range(arguments.turns):
            bench.say(f"turn {turn + 1} of {arguments.turns}, {bench.busyness()}")
            found[NAME].append(await slow_host(ours, course, slow))
            for name in arguments.peers:
                found[name].append(await slow_host(precache_rivals.RIVALS[name], course, slow))
    return found


async def measure_killed(stage: bench.Stage, arguments: argparse.Namespace) -> list[Result]:
    """Ours with hosts that die."""
    rate_bps = int(arguments.mbit * precache_swarm.MBIT)
    with network_rig.network(swarm_race.uniform(arguments.hosts, rate_bps)) as rig:
        course = await swarm_race.course(rig, arguments.size_mib << 20)
        victims = course.receivers[: max(1, arguments.hosts // KILLED_SHARE)]
        survivors = [name for name in course.receivers if name not in victims]
        course = course.among(course.receivers, finishers=survivors)
        bench.say(f"{', '.join(victims)} killed; {precache_swarm.describe(course, rate_bps)}")
        results = []
        for turn in range(arguments.turns):
            bench.say(f"turn {turn + 1} of {arguments.turns}, {bench.busyness()}")
            killing = Killing(course, victims)
            result = await precache_cloud.run(
                stage, course, during=killing.during, after=killing.after, logs=arguments.logs
            )
            result.show()
            results.append(result)
    return results


def conclude(
    slowed: Mapping[str, Sequence[tuple[Result, Result]]], killed: Sequence[Result]
) -> None:
    """The medians of the turns, and the goals."""

    def effect(pairs: Sequence[tuple[Result, Result]]) -> float:
        return bench.median(
            max(with_it.done_seconds.values()) / max(without_it.done_seconds.values())
            for with_it, without_it in pairs
        )

    busy = [*killed, *(one for pair in slowed[NAME] for one in pair)]
    bench.conclude(
        "precache_faults",
        {
            "slow_host_effect": effect(slowed[NAME]),
            "killed_over_t_star": bench.median(one.last_ratio for one in killed),
            "killed_host_received": bench.median(
                one.extra["killed_host_received"] for one in killed
            ),
            "killed_host_had": bench.median(one.extra["killed_host_had"] for one in killed),
            "busy_cores": max(one.busy_cores for one in busy),
            **{
                f"{name}_slow_host_effect": effect(pairs)
                for name, pairs in slowed.items()
                if name != NAME
            },
        },
        {
            "slow_host_effect": "<= 1.03",
            "killed_over_t_star": "<= 1.25",
            "killed_host_received": "<= 1.1",
        },
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    precache_swarm.add_common(parser)
    parser.add_argument("--hosts", type=int, default=8)
    parser.add_argument("--mbit", type=float, default=100.0)
    arguments = parser.parse_args()
    # multicast goes at the rate of the slowest, and from the seed alone nobody waits for another
    arguments.peers = precache_swarm.peers(parser, arguments.peers, without=precache_swarm.SLOWEST)
    with bench.stage() as stage:
        slowed = asyncio.run(measure_slow(stage, arguments))
        killed = asyncio.run(measure_killed(stage, arguments))
    conclude(slowed, killed)


if __name__ == "__main__":
    main()
