"""The operators' commands, as processes that talk to the running service."""

import asyncio
import json
import sys
from typing import Any

SMALL_MB = 2048 + 20


async def run(*argv: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "hostler_capacity",
        *argv,
        env={"COLUMNS": "200"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, problems = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode(), problems.decode()


async def test_commands_show_fits_hosts_and_claims(capacity: Any, node: Any) -> None:
    await capacity.flavor()
    await capacity.reporter.report(node())
    await capacity.shows("hv1", free=8192)
    claim = await capacity.claim(flavor="m1.small")
    await capacity.shows("hv1", claimed=SMALL_MB)
    at = ("--url", capacity.url)

    fits, hosts, claims, fits_json, unknown = await asyncio.gather(
        run("fit", "m1.small", *at),
        run("hosts", *at),
        run("claims", "--state", "held", *at),
        run("fit", "m1.small", "--json", *at),
        run("fit", "nonsense", *at),
    )

    assert (fits[0], hosts[0], claims[0]) == (0, 0, 0)
    assert "2 more m1.small fit on 1 nodes" in fits[1]
    assert f"memory_mb: one more lacks {4 * SMALL_MB - 8192}" in fits[1]
    assert str(8192 - SMALL_MB) in hosts[1]
    assert claim["id"] in claims[1]
    assert json.loads(fits_json[1])["total"] == 2
    assert (unknown[0], unknown[1]) == (1, "")
    assert unknown[2].strip() == "there is no flavor nonsense (capacity.flavor.not_found)"
