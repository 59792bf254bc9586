"""How close to the bound an image comes to every host, beside everybody else who could bring it there.

    python benchmarks/precache_swarm.py [--turns 1] [--peers all|none|NAME,...] [--hosts 8,16] [--size-mib 256]
                                        [--mbit RATE] [--logs DIRECTORY]

A seed and 8 hosts behind 100 Mbit/s each way, then 16 behind 50: real processes in network namespaces (`network_rig`),
our service and agents as they come (`precache_cloud`), and in turns with them aria2, libtorrent, udpcast, and nginx
with curl (`precache_rivals`). Random bytes; every copy is hashed after the clock.

The bound T* is of the payload rate that one TCP stream has on the rig, measured in the same run (`swarm_race`). For us
the clock runs from `POST /v1/distributions`, the image fetched and hashed by the seed, no agent connected to another,
to the last file under its final name. A figure is the median of the turns'; `seed_copies` counts all that left the
seed's interface, its API's answers too; `first_byte_ms` is from the call on the fanout, as a foreign agent hears it,
to the moment when the slowest host's interface has received more than the piece list; `duplicate_share` is what the
agents say they threw away.

nginx needs N times the bound: with `all` it runs at 8 hosts only. How busy the cores were is said for each run: beyond
1.5 of 2 it is they that are measured, and then `--mbit` has to be lower.
"""

import argparse
import asyncio
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import bench
import network_rig
import precache_cloud
import precache_rivals
import swarm_race
from precache_cloud import NAME
from swarm_race import Course, Result

MBIT = 1_000_000
RATES = {8: 100 * MBIT, 16: 50 * MBIT}
SLOWEST, FEW_HOSTS = "nginx", 8

Results = Mapping[int, Mapping[str, Sequence[Result]]]
"""Number of hosts -> racer -> a result a turn."""


async def measure(
    stage: bench.Stage, arguments: argparse.Namespace
) -> dict[int, dict[str, list[Result]]]:
    """Everybody, in turns, for each number of hosts."""
    found: dict[int, dict[str, list[Result]]] = {}
    for hosts in arguments.hosts:
        rate_bps = int(arguments.mbit * MBIT) if arguments.mbit else RATES[hosts]
        with network_rig.network(swarm_race.uniform(hosts, rate_bps)) as rig:
            course = await swarm_race.course(rig, arguments.size_mib << 20)
            bench.say(describe(course, rate_bps))
            racers = [name for name in arguments.peers if runs(name, hosts, arguments)]
            results: dict[str, list[Result]] = defaultdict(list)
            for turn in range(arguments.turns):
                bench.say(f"turn {turn + 1} of {arguments.turns}, {bench.busyness()}")
                for name in (NAME, *racers):
                    if name == NAME:
                        result = await precache_cloud.run(stage, course, logs=arguments.logs)
                    else:
                        result = await precache_rivals.RIVALS[name](course)
                    result.show()
                    results[name].append(result)
            bench.say()
            show(hosts, results)
            found[hosts] = results
    return found


def describe(course: Course, rate_bps: int) -> str:
    """The course for people."""
    return (
        f"{len(course.receivers)} hosts and a seed at {rate_bps / MBIT:.0f} Mbit/s each way, of which one TCP stream"
        f" gets {course.stream_bps[swarm_race.SEED] / MBIT:.2f}; {course.size_bytes >> 20} MiB;"
        f" T* = {course.bound_seconds:.2f} s"
    )


def runs(name: str, hosts: int, arguments: argparse.Namespace) -> bool:
    """Whether the rival takes part with so many hosts."""
    return name != SLOWEST or hosts <= FEW_HOSTS or arguments.named


def show(hosts: int, results: Mapping[str, Sequence[Result]]) -> None:
    """The medians of the turns."""
    columns = ("last/T*", "median/T*", "seed's copies", "received", "first byte ms", "busy cores")
    bench.table(
        (f"{hosts} hosts", *columns),
        [
            (
                name,
                bench.median(one.last_ratio for one in done),
                bench.median(one.median_ratio for one in done),
                bench.median(one.seed_copies for one in done),
                bench.median(one.received_copies for one in done),
                bench.median(one.first_byte_ms for one in done),
                bench.median(one.busy_cores for one in done),
            )
            for name, done in results.items()
        ],
    )


def figures(found: Results) -> dict[str, float | None]:
    """All figures, of the medians of the turns."""
    made: dict[str, float | None] = {}
    for hosts, results in found.items():
        ours = results[NAME]
        made[f"last_over_t_star_{hosts}"] = bench.median(one.last_ratio for one in ours)
        made[f"median_over_t_star_{hosts}"] = bench.median(one.median_ratio for one in ours)
        made[f"busy_cores_{hosts}"] = max(one.busy_cores for one in ours)
        for name, done in results.items():
            if name != NAME:
                made[f"{name}_last_over_t_star_{hosts}"] = bench.median(
                    one.last_ratio for one in done
                )
                made[f"{name}_seed_copies_{hosts}"] = bench.median(one.seed_copies for one in done)
        if "libtorrent" in results:
            made[f"libtorrent_without_its_start_{hosts}"] = bench.median(
                one.last_ratio_after_first_byte for one in results["libtorrent"]
            )

    def worst(values: Iterable[Iterable[float]]) -> float:
        return max(bench.median(turns) for turns in values)

    ours_by_hosts = [results[NAME] for results in found.values()]
    made["seed_copies"] = worst([one.seed_copies for one in turns] for turns in ours_by_hosts)
    made["duplicate_share"] = worst(
        [one.extra["duplicate_share"] for one in turns] for turns in ours_by_hosts
    )
    made["first_byte_ms"] = worst([one.first_byte_ms for one in turns] for turns in ours_by_hosts)
    made["agent_rss_mb"] = max(
        one.extra["agent_rss_mb"] for turns in ours_by_hosts for one in turns
    )
    return made


GOALS = {
    "last_over_t_star_8": "<= 1.08",
    "last_over_t_star_16": "<= 1.08",
    "median_over_t_star_8": "<= 1.06",
    "seed_copies": "<= 1.10",
    "duplicate_share": "<= 0.01",
    "first_byte_ms": "<= 300",
}


def add_common(parser: argparse.ArgumentParser) -> None:
    """What the benchmarks on the rig have in common."""
    names = ", ".join(precache_rivals.RIVALS)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--peers", default="all", help=f"all, none, or some of {names}")
    parser.add_argument("--size-mib", type=int, default=256)
    parser.add_argument("--logs", type=Path, help="where our processes' logs are kept")


def peers(parser: argparse.ArgumentParser, text: str, *, without: str = "") -> list[str]:
    """The rivals that take part; `without` one that only does when it is named."""
    match text:
        case "all":
            return [name for name in precache_rivals.RIVALS if name != without]
        case "none":
            return []
    names = text.split(",")
    if unknown := set(names) - precache_rivals.RIVALS.keys():
        parser.error(f"unknown peers: {', '.join(sorted(unknown))}")
    return names


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_common(parser)
    parser.add_argument("--hosts", default="8,16", help="numbers of hosts")
    parser.add_argument("--mbit", type=float, help="another rate than 100 (8 hosts) and 50 (16)")
    arguments = parser.parse_args()
    arguments.named = arguments.peers != "all"
    arguments.peers = peers(parser, arguments.peers)
    arguments.hosts = [int(number) for number in arguments.hosts.split(",")]
    if not arguments.mbit and set(arguments.hosts) - RATES.keys():
        parser.error("another number of hosts than 8 and 16 needs --mbit")
    with bench.stage() as stage:
        found = asyncio.run(measure(stage, arguments))
    bench.conclude("precache_swarm", figures(found), GOALS)


if __name__ == "__main__":
    main()
