"""The agent's part: a host that reports itself, through a real broker, to the running service."""

import asyncio
import json
import uuid
from pathlib import Path
from typing import Any

import pytest

from hostler_capacity import agent
from hostler_common import agent as agent_module
from hostler_common import client, settings
from hostler_common.servers import free_port
from hostler_common.testing import eventually

MEMINFO = """MemTotal:       16384000 kB
MemFree:         1000000 kB
MemAvailable:    8192000 kB
HugePages_Total:       0
"""


def loaded(**values: Any) -> agent.ReportSettings:
    return settings.load(agent.ReportSettings, amqp_url="amqp://localhost", **values)


def test_this_machine_is_what_the_kernel_says_of_it() -> None:
    node = agent.read_machine("hv", loaded(memory_mb_reserved=1000), MEMINFO)
    assert (node.memory_mb, node.memory_mb_reserved) == (16000, 1000)
    assert node.memory_mb_used == 16000 - 8000 - 1000
    assert node.guests is None
    assert node.vcpus > 0
    assert node.local_gb >= node.local_gb_used


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "No such file or directory"),
        ("no json", "Invalid JSON"),
        ('[{"hypervisor_hostname": "a", "hypervisor_type": "xen", "vcpus": 1}]', "0.memory_mb"),
    ],
)
def test_a_bad_inventory_file_is_named_with_what_is_wrong(
    tmp_path: Path, text: str | None, reason: str
) -> None:
    file = tmp_path / "inventory.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(agent.InventoryUnreadable) as caught:
        agent.read_inventory(file)
    assert str(file) in caught.value.detail
    assert reason in caught.value.detail


async def test_an_agent_reports_its_inventory_again_and_again(
    capacity: Any, amqp_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "inventory.json"

    def write(memory_mb: int) -> None:
        node = {
            "hypervisor_hostname": "xen-7",
            "hypervisor_type": "xen",
            "memory_mb": memory_mb,
            "vcpus": 8,
            "guests": [{"uuid": str(uuid.uuid4()), "memory_mb": 1024, "vcpus": 1}],
        }
        file.write_text(json.dumps([node]))

    write(8192)
    monkeypatch.setenv("HOSTLER_AMQP_URL", amqp_url)
    monkeypatch.setenv("HOSTLER_CAPACITY_INVENTORY_FILE", str(file))
    monkeypatch.setenv("HOSTLER_CAPACITY_REPORT_SECONDS", "0.2")
    stop = asyncio.Event()
    port = free_port()
    process = settings.load(
        agent_module.AgentSettings, host="pool-master", parts=["capacity"], http_port=port
    )
    async with asyncio.TaskGroup() as group:
        group.create_task(agent_module.serve(process, stop=stop))
        try:
            shown = await capacity.shows("xen-7", limit=8192, foreign=1024 + 12)
            assert shown["host"] == "pool-master"
            file.write_text("half a file")

            async def failing() -> bool:
                async with client.open_api(f"http://127.0.0.1:{port}") as api:
                    return 'loop_failing{loop="capacity_report"} 1.0' in await api.get("/metrics")

            await eventually(failing)
            write(4096)
            await capacity.shows("xen-7", limit=4096)

            async def stays_fresh() -> bool:
                now = (await capacity.hosts())["xen-7"]["received_at"]
                return bool(now > shown["received_at"])

            await eventually(stays_fresh)
        finally:
            stop.set()
