"""What it gains that pieces go out while the source still sends: beside fetching first, then distributing.

    python benchmarks/precache_cut_through.py [--turns 1] [--size-mib 128] [--hosts 8] [--mbit 100]
                                              [--source-mbit 50,100] [--logs DIRECTORY]

A seed and 8 hosts at 100 Mbit/s each way, as in `precache_swarm`, and beside them an HTTP server with the image, whose
own link has another rate. The clock runs from `POST /v1/distributions`, when the seed has nothing, to the last file
under its final name. No scheme ends before the source has sent everything, nor before T*: the ratio is to the longer
of the two, T_source being the size over the payload rate that one TCP stream from the source has on the rig.

Where the source is as fast as the network, the seed's fetch shares its link with all that it sends meanwhile, and
takes longer than alone; so the goal is for a source that is slower.

`store_and_forward` is the same service and the same agents, asked twice: for the image on no host, and, when the seed
has it and has checked it, for the distribution.
"""

import argparse
import asyncio
import hashlib
import shutil
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench
import network_rig
import precache_cloud
import swarm_race
from hostler_common import testing
from precache_cloud import Cloud
from swarm_race import Course, Result

MBIT = 1_000_000
ORIGIN, PORT = "origin", 8080
GROWING, STORED = "cut_through", "store_and_forward"


@asynccontextmanager
async def origin(course: Course) -> AsyncIterator[str]:
    """The source's HTTP server runs; the image's URL."""
    rig = course.rig
    address = rig.hosts[ORIGIN].address
    async with rig.process(
        ORIGIN, sys.executable, "-m", "http.server", str(PORT), "--bind", address,
        "--directory", course.source.parent, log=rig.directory / "origin.log",
    ):  # fmt: skip
        url = f"http://{address}:{PORT}/{course.source.name}"

        async def answers() -> bool:
            try:
                _, writer = await asyncio.open_connection(address, PORT)
            except OSError:
                return False
            writer.close()
            return True

        await testing.eventually(answers)
        yield url


def _order(cloud: Cloud, url: str, digest: str, hosts: list[str]) -> dict[str, Any]:
    return {
        "image_id": cloud.image_id,
        "hosts": hosts,
        "image": {
            "image_id": cloud.image_id,
            "location": url,
            "disk_format": "raw",
            "os_hash_algo": "sha512",
            "os_hash_value": digest,
        },
    }


async def grow(cloud: Cloud, url: str, digest: str) -> None:
    """One call."""
    await cloud.api.post("/v1/distributions", _order(cloud, url, digest, sorted(cloud.agents)))


async def store_first(cloud: Cloud, url: str, digest: str) -> None:
    """The image is at the seed, and then it is distributed."""
    await cloud.api.post("/v1/distributions", _order(cloud, url, digest, ["nobody"]))

    async def ready() -> bool:
        image = await cloud.api.get(f"/v1/images/{cloud.image_id}")
        if image["state"] == "error":
            raise RuntimeError(f"the image was not fetched: {image['reason']}")
        return bool(image["state"] == "ready")

    await testing.eventually(ready, seconds=600.0, every_seconds=0.1)
    await cloud.distribute()


WAYS: Mapping[str, Callable[[Cloud, str, str], Awaitable[None]]] = {
    GROWING: grow,
    STORED: store_first,
}


def _sha512(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha512").hexdigest()


async def run(stage: bench.Stage, course: Course, way: str, logs: Path | None) -> Result:
    """One distribution of an image that the seed does not have."""
    digest = await asyncio.to_thread(_sha512, course.source)
    async with (
        origin(course) as url,
        precache_cloud.cloud(stage, course, is_fetched=False) as cloud,
    ):

        async def start() -> None:
            await WAYS[way](cloud, url, digest)

        try:
            result = await swarm_race.race(
                course, way, cloud.directories, start, file=cloud.image_id
            )
        finally:
            if logs is not None:
                precache_cloud.keep_logs(course.rig, logs / way)
        (answer, *_) = (await cloud.api.get("/v1/distributions"))["distributions"]
        told = await cloud.told(answer["distribution_id"], len(result.done_seconds))
        received = len(result.done_seconds) * course.size_bytes
        wasted = sum(host["wasted_bytes"] for host in told["progress"])
        shutil.rmtree(course.rig.directory / "seed-data", ignore_errors=True)
        for directory in cloud.directories.values():
            shutil.rmtree(directory, ignore_errors=True)
    return replace(result, extra={"duplicate_share": wasted / received})


async def measure(
    stage: bench.Stage, arguments: argparse.Namespace
) -> dict[int, dict[str, list[Result]]]:
    """Both ways in turns, for each rate of the source; each result's bound is the longer of the two."""
    found: dict[int, dict[str, list[Result]]] = {}
    rate_bps = int(arguments.mbit * MBIT)
    for source_mbit in arguments.source_mbit:
        plan = swarm_race.uniform(arguments.hosts, rate_bps)
        plan = replace(plan, hosts={**plan.hosts, ORIGIN: source_mbit * MBIT})
        with network_rig.network(plan) as rig:
            every = await swarm_race.course(rig, arguments.size_mib << 20)
            course = every.among([one for one in every.receivers if one != ORIGIN])
            source_seconds = 8 * course.size_bytes / course.stream_bps[ORIGIN]
            bound = max(source_seconds, course.bound_seconds)
            bench.say(
                f"source at {source_mbit} Mbit/s, T_source = {source_seconds:.2f} s; a seed and {arguments.hosts}"
                f" hosts at {arguments.mbit:.0f} Mbit/s, T* = {course.bound_seconds:.2f} s; {arguments.size_mib} MiB"
            )
            results: dict[str, list[Result]] = {way: [] for way in WAYS}
            for turn in range(arguments.turns):
                bench.say(f"turn {turn + 1} of {arguments.turns}, {bench.busyness()}")
                for way, done in results.items():
                    result = await run(stage, course, way, arguments.logs)
                    result = replace(result, bound_seconds=bound)
                    result.show()
                    done.append(result)
            found[source_mbit] = results
    return found


def figures(found: dict[int, dict[str, list[Result]]]) -> dict[str, float | None]:
    """The medians of the turns."""
    made: dict[str, float | None] = {}
    for source_mbit, results in found.items():
        for way, done in results.items():
            made[f"{way}_over_bound_{source_mbit}"] = bench.median(one.last_ratio for one in done)
        made[f"seed_copies_{source_mbit}"] = bench.median(
            one.seed_copies for one in results[GROWING]
        )
        made[f"duplicate_share_{source_mbit}"] = bench.median(
            one.extra["duplicate_share"] for one in results[GROWING]
        )
        made[f"busy_cores_{source_mbit}"] = max(
            one.busy_cores for done in results.values() for one in done
        )
    return made


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--size-mib", type=int, default=128)
    parser.add_argument("--hosts", type=int, default=8)
    parser.add_argument("--mbit", type=float, default=100.0)
    parser.add_argument("--source-mbit", default="50,100", help="rates of the source's link")
    parser.add_argument("--logs", type=Path, help="where our processes' logs are kept")
    arguments = parser.parse_args()
    arguments.source_mbit = [int(rate) for rate in arguments.source_mbit.split(",")]
    with bench.stage() as stage:
        found = asyncio.run(measure(stage, arguments))
    slower = [rate for rate in found if rate < arguments.mbit]
    goals = {f"{GROWING}_over_bound_{rate}": "<= 1.15" for rate in slower}
    bench.conclude("precache_cut_through", figures(found), goals)


if __name__ == "__main__":
    main()
