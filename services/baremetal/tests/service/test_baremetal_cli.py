"""The command line as an operator uses it, against a running service."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostler_baremetal.simulator import SimulatedBmc

PROGRAM = str(Path(sys.executable).parent / "hostler-baremetal")


async def hostler(url: str, *arguments: str, stdin: str = "", fails: bool = False) -> str:
    """What the command prints; its exit code is as expected."""
    done = await asyncio.to_thread(
        subprocess.run,
        [PROGRAM, *arguments],
        input=stdin,
        env={**os.environ, "HOSTLER_URL": url, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stderr if fails and done.stderr else done.stdout


async def test_a_node_is_enrolled_switched_leased_and_removed_from_a_shell(
    run_baremetal: Callable[..., Any], bmc: SimulatedBmc
) -> None:
    async with run_baremetal() as service:
        url = service.url
        address = f"ipmi://127.0.0.1:{bmc.port}"
        options = ("--address", address, "--username", "admin", "--memory-mb", "65536")
        enrolled = json.loads(
            await hostler(
                url,
                *("nodes", "add", "n1", *options, "--vcpus", "32", "--trait", "HW_GPU"),
                *("--password-file", "-", "--json"),
                stdin="secret\n",
            )
        )
        assert enrolled["traits"] == ["HW_GPU"]
        assert "succeeded" in await hostler(url, "nodes", "power", "n1", "on")
        state = json.loads(await hostler(url, "nodes", "power", "n1", "--json"))
        assert state["power_state"] == "on"
        lease = json.loads(
            await hostler(url, "nodes", "lease", "n1", "--owner", "me", "--purpose", "x", "--json")
        )
        refused = await hostler(url, "nodes", "power", "n1", "off", fails=True)
        assert "baremetal.lease.fenced" in refused
        token = ("--fencing-token", str(lease["fencing_token"]))
        ended = json.loads(await hostler(url, "nodes", "power", "n1", "off", *token, "--json"))
        assert ended["state"] == "succeeded"
        await hostler(url, "nodes", "boot-device", "n1", "pxe", *token)
        assert bmc.boot_flags[1] == 0x04
        listed = json.loads(await hostler(url, "nodes", "list", "--json"))
        assert [(node["name"], node["state"]) for node in listed] == [("n1", "leased")]
        await hostler(url, "nodes", "release", "n1", *token)
        operations = json.loads(await hostler(url, "operations", "list", "--json"))
        assert len(operations) == 3
        await hostler(url, "nodes", "delete", "n1")
        missing = await hostler(url, "nodes", "show", enrolled["id"], fails=True)
        assert "baremetal.node.not_found" in missing
        assert bmc.power_commands == [1, 0]


async def test_a_new_key_is_a_line_that_the_service_takes(
    run_baremetal: Callable[..., Any], tmp_path: Path
) -> None:
    path = tmp_path / "fresh"
    path.write_text(await hostler("", "new-key", "2026-11"))
    async with run_baremetal(credentials_key_file=path) as service:
        assert (await service.api.get("/v1/nodes"))["nodes"] == []
