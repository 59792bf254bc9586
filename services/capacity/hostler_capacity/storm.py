"""A client that claims as hard as it can: for the demo, tests, and accepting an installation.

It sends all its claims at once. A claim that got no answer is sent again, to the next address,
under its own Idempotency-Key until it has one: what a careful scheduler does.

As a program (`python -m hostler_capacity.storm`) it says `ready`, waits for a line on stdin, so that
several can start together, and prints what came of its claims as one JSON object. It imports little
on purpose: four of them have to start quickly.
"""

import argparse
import asyncio
import itertools
import json
import os
import sys
import uuid
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field

from hostler_common import client, errors

RETRY_SECONDS = 0.1


@dataclass(slots=True)
class Outcome:
    """What came of the claims."""

    granted: list[str] = field(default_factory=list)
    refused: int = 0
    retries: int = 0
    unanswered: int = 0
    unexpected: list[str] = field(default_factory=list)


async def storm(
    urls: Sequence[str],
    *,
    flavor: str,
    count: int,
    project: str,
    token: str | None = None,
    patience_seconds: float = 60.0,
    connections: int = 50,
) -> Outcome:
    """Return what came of `count` claims sent side by side, spread over the addresses."""
    outcome = Outcome()
    gate = asyncio.Semaphore(connections)
    deadline = asyncio.get_running_loop().time() + patience_seconds

    async def claim(number: int) -> None:
        key = str(uuid.uuid4())
        body = {"flavor": flavor, "project_id": project, "ttl_seconds": 3600}
        async with gate:
            for attempt in itertools.count():
                if asyncio.get_running_loop().time() > deadline:
                    outcome.unanswered += 1
                    return
                # the next try goes to another process: this one may be gone
                api = apis[(number + attempt) % len(apis)]
                try:
                    reply = await api.post("/v1/claims", body, idempotency_key=key)
                    outcome.granted.append(reply["id"])
                    return
                except errors.Unavailable:
                    outcome.retries += 1
                    await asyncio.sleep(RETRY_SECONDS)
                except errors.HostlerError as exc:
                    if exc.code == "capacity.claim.no_room":
                        outcome.refused += 1
                    else:
                        outcome.unexpected.append(f"{exc.code}: {exc.detail}")
                    return

    async with AsyncExitStack() as stack:
        apis = [await stack.enter_async_context(client.open_api(url, token=token)) for url in urls]
        async with asyncio.TaskGroup() as group:
            for number in range(count):
                group.create_task(claim(number))
    return outcome


def main() -> None:
    """Run as a program; the token is `HOSTLER_TOKEN`."""
    parser = argparse.ArgumentParser(prog="python -m hostler_capacity.storm")
    parser.add_argument("urls", nargs="+", help="addresses of capacity services")
    parser.add_argument("--flavor", required=True, help="what to claim")
    parser.add_argument("--count", type=int, default=50, help="how many claims")
    parser.add_argument("--project", default="storm", help="whose claims they are")
    asked = parser.parse_args()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    outcome = asyncio.run(
        storm(
            asked.urls,
            flavor=asked.flavor,
            count=asked.count,
            project=asked.project,
            token=os.environ.get("HOSTLER_TOKEN"),
        )
    )
    sys.stdout.write(json.dumps(asdict(outcome)) + "\n")


if __name__ == "__main__":
    main()
