"""How often an image crosses into a rack, and whether keeping it inside costs time.

    python benchmarks/precache_racks.py [--turns 1] [--peers all|none|NAME,...] [--size-mib 256] [--mbit 50]
                                        [--rack-hosts 8] [--logs DIRECTORY]

Two racks of 8 hosts, each behind an uplink of the rate of 4 hosts, the seed outside both; our agents know their rack
by `HOSTLER_PRECACHE_LABELS`. Then the same hosts on one switch. `cross_rack_copies` is all that came into a rack
through its uplink, headers and all, over the size of the file: the larger of the two racks'.
`ratio_difference` is the last host's time over the bound with racks, less that without.
"""

import argparse
import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence

import bench
import network_rig
import precache_cloud
import precache_rivals
import precache_swarm
import swarm_race
from precache_cloud import NAME
from swarm_race import SEED, Result

RACKS = ("r1", "r2")
UPLINK_HOSTS = 4
RACKED, FLAT = "two racks", "one switch"

Results = Mapping[str, Mapping[str, Sequence[Result]]]
"""Layout -> racer -> a result a turn."""


def plans(rack_hosts: int, rate_bps: int) -> dict[str, network_rig.Plan]:
    """Both layouts, of the same hosts."""
    rack_of = {f"h{number}-{rack}": rack for rack in RACKS for number in range(1, rack_hosts + 1)}
    hosts = dict.fromkeys([SEED, *rack_of], rate_bps)
    uplinks = dict.fromkeys(RACKS, UPLINK_HOSTS * rate_bps)
    return {
        RACKED: network_rig.Plan(hosts=hosts, racks=rack_of, uplinks=uplinks),
        FLAT: network_rig.Plan(hosts=hosts),
    }


def into_racks(result: Result) -> float:
    """Copies that came into a rack: the larger number."""
    return max(result.traffic[rack].received_bytes for rack in RACKS) / result.size_bytes


async def measure(
    stage: bench.Stage, arguments: argparse.Namespace
) -> dict[str, dict[str, list[Result]]]:
    """Both layouts, everybody in turns."""
    rate_bps = int(arguments.mbit * precache_swarm.MBIT)
    found: dict[str, dict[str, list[Result]]] = {}
    for layout, plan in plans(arguments.rack_hosts, rate_bps).items():
        with network_rig.network(plan) as rig:
            course = await swarm_race.course(rig, arguments.size_mib << 20)
            bench.say(f"{layout}: {precache_swarm.describe(course, rate_bps)}")
            results: dict[str, list[Result]] = defaultdict(list)
            for turn in range(arguments.turns):
                bench.say(f"turn {turn + 1} of {arguments.turns}, {bench.busyness()}")
                result = await precache_cloud.run(stage, course, logs=arguments.logs)
                result.show()
                results[NAME].append(result)
                for name in arguments.peers if layout == RACKED else ():
                    result = await precache_rivals.RIVALS[name](course)
                    result.show()
                    results[name].append(result)
            found[layout] = results
    return found


def conclude(found: Results) -> None:
    """The medians of the turns, and the goals."""
    racked = found[RACKED]
    copies = {name: bench.median(map(into_racks, done)) for name, done in racked.items()}
    ratios = {
        layout: bench.median(one.last_ratio for one in found[layout][NAME])
        for layout in (RACKED, FLAT)
    }
    figures: dict[str, float | None] = {
        "cross_rack_copies": copies[NAME],
        "ratio_difference": ratios[RACKED] - ratios[FLAT],
        "racks_last_over_t_star": ratios[RACKED],
        "flat_last_over_t_star": ratios[FLAT],
        "busy_cores": max(one.busy_cores for layout in found.values() for one in layout[NAME]),
    }
    for name, done in racked.items():
        if name != NAME:
            figures[f"{name}_cross_rack_copies"] = copies[name]
            figures[f"{name}_racks_last_over_t_star"] = bench.median(
                one.last_ratio for one in done
            )
    bench.conclude(
        "precache_racks", figures, {"cross_rack_copies": "<= 1.3", "ratio_difference": "<= 0.03"}
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    precache_swarm.add_common(parser)
    parser.add_argument("--mbit", type=float, default=50.0)
    parser.add_argument("--rack-hosts", type=int, default=8, help="in each of the two racks")
    arguments = parser.parse_args()
    # from the seed alone it would take 16 times the bound
    arguments.peers = precache_swarm.peers(parser, arguments.peers, without=precache_swarm.SLOWEST)
    with bench.stage() as stage:
        conclude(asyncio.run(measure(stage, arguments)))


if __name__ == "__main__":
    main()
