"""What an agent does with an image after it was told to fetch it: wait, go slow, repair, remove."""

import asyncio
import os
import shutil
import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from hostler_common import servers, testing
from hostler_precache import testing as precache_testing
from hostler_precache.placing import keeper
from hostler_precache.transfer.download import Download
from hostler_precache.transfer.pieces import PieceStore

MIB = 1 << 20
PIECE = 256 * 1024
DATA = precache_testing.image_of(6 * MIB + 4321)


def journaled(directory: Path) -> int:
    """How many pieces a host has of the image that it is getting, read as a stranger would."""
    files = list((directory / ".precache").glob("*.journal"))
    return max(0, (files[0].stat().st_size - 60) // 8) if files else 0


async def host_of(api: Any, distribution_id: str) -> dict[str, Any]:
    """Where its only host is."""
    answer = await api.get(f"/v1/distributions/{distribution_id}")
    (host,) = answer["progress"]
    found: dict[str, Any] = host
    return found


async def reports(api: Any, count: int) -> None:
    """The only host has reported so many times more."""

    async def seen() -> str:
        (host,) = (await api.get("/v1/hosts"))["hosts"]
        return str(host["seen_at"])

    for _ in range(count):
        before = await seen()

        async def is_seen_again(before: str = before) -> bool:
            return await seen() > before

        await testing.eventually(is_seen_again)


async def test_a_paused_image_keeps_what_is_here_fetches_nothing_and_then_goes_on(
    precache: Any, start_agent: Any, source: Any, request_of: Any, over: Any, image_id: str
) -> None:
    port, passes = servers.free_port(), 8
    async with (
        precache_testing.gate(port, passes=passes) as (seed_url, gate),
        precache(blob_port=port, seed_url=seed_url) as service,
    ):
        api = service.api
        place = await start_agent("host-1", service.url)
        body = request_of(image_id, source.add("image", DATA), DATA, hosts=["host-1"])
        distribution_id = (await api.post("/v1/distributions", body))["distribution_id"]

        async def is_held() -> bool:
            return journaled(place) == passes

        await testing.eventually(is_held)
        await api.post(f"/v1/distributions/{distribution_id}/pause", {})

        async def is_paused() -> dict[str, Any] | None:
            host = await host_of(api, distribution_id)
            return host if host["reason"] == "paused" else None

        paused = await testing.eventually(is_paused)
        assert (paused["state"], paused["pieces_done"]) == ("waiting", passes)
        gate.is_open.set()
        await reports(api, 5)
        waiting = await host_of(api, distribution_id)
        assert (waiting["state"], waiting["reason"]) == ("waiting", "paused")
        assert waiting["received_from_seed_bytes"] == passes * PIECE
        assert journaled(place) == passes
        assert not (place / image_id).exists()
        await api.post(f"/v1/distributions/{distribution_id}/resume", {})
        answer = await over(api, distribution_id)
        assert answer["host_states"] == {"cached": 1}
        assert (place / image_id).read_bytes() == DATA
        done = await host_of(api, distribution_id)
        assert (done["received_from_seed_bytes"], done["wasted_bytes"]) == (len(DATA), 0)


async def test_a_disk_that_returns_other_bytes_is_noticed_before_placing_where_all_is_read_again(
    precache: Any, start_agent: Any, source: Any, request_of: Any, image_id: str
) -> None:
    port, passes = servers.free_port(), 8
    async with (
        precache_testing.gate(port, passes=passes) as (seed_url, gate),
        precache(blob_port=port, seed_url=seed_url) as service,
    ):
        api = service.api
        place = await start_agent(
            "host-1", service.url, verify_whole=True, retry_seconds=5, desired_seconds=0.3
        )
        body = request_of(image_id, source.add("image", DATA), DATA, hosts=["host-1"])
        distribution_id = (await api.post("/v1/distributions", body))["distribution_id"]

        async def is_held() -> bool:
            return journaled(place) == passes

        await testing.eventually(is_held)
        (part,) = (place / ".precache").glob("*.part")
        fd = os.open(part, os.O_WRONLY)
        os.pwrite(fd, b"damage", 3 * PIECE + 17)
        os.close(fd)
        gate.is_open.set()

        async def is_said() -> bool:
            host = await host_of(api, distribution_id)
            return (host["reason"] or "").startswith("storage.damaged: ")

        await testing.eventually(is_said)
        assert not (place / image_id).exists()

        async def is_fetched_anew() -> bool:
            return bool((await host_of(api, distribution_id))["state"] == "cached")

        await testing.eventually(is_fetched_anew)
        assert (place / image_id).read_bytes() == DATA


async def test_a_limit_reaches_the_download_and_so_does_its_end(
    precache: Any, start_agent: Any, source: Any, request_of: Any, over: Any, image_id: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    told: list[int | None] = []
    real = Download.limit

    def limit(download: Download, bytes_per_second: int | None) -> None:
        told.append(bytes_per_second)
        real(download, bytes_per_second)

    monkeypatch.setattr(Download, "limit", limit)
    async with precache() as service:
        place = await start_agent("host-1", service.url)
        body = request_of(
            image_id,
            source.add("image", DATA),
            DATA,
            hosts=["host-1"],
            host_bytes_per_second=PIECE,
        )
        made = await service.api.post("/v1/distributions", body)

        async def is_limited() -> bool:
            return PIECE in told

        await testing.eventually(is_limited)
        assert told[0] == PIECE  # before anything was asked for
        path = f"/v1/distributions/{made['distribution_id']}"
        await service.api.call("PATCH", path, body={"host_bytes_per_second": None})
        answer = await over(service.api, made["distribution_id"])
        assert answer["host_states"] == {"cached": 1}
        assert told[-1] is None
        assert (place / image_id).read_bytes() == DATA


async def test_labels_choose_the_hosts_and_racks_the_neighbours(
    precache: Any, start_agent: Any, source: Any, request_of: Any, over: Any, image_id: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    swarms: set[tuple[frozenset[str], frozenset[str]]] = set()
    real = Download.set_swarm

    def set_swarm(
        download: Download,
        seeds: Sequence[str],
        neighbours: Mapping[str, str],
        *,
        outside: Collection[str] = (),
    ) -> None:
        swarms.add((frozenset(neighbours), frozenset(outside)))
        real(download, seeds, neighbours, outside=outside)

    monkeypatch.setattr(Download, "set_swarm", set_swarm)
    async with precache() as service:
        racks = {"host-1": "r1", "host-2": "r1", "host-3": "r2"}
        for host, rack in racks.items():
            await start_agent(host, service.url, labels=f"rack={rack}, zone=a")
        await start_agent("host-4", service.url, labels="rack=r2,zone=b")

        async def all_known() -> list[Any] | None:
            hosts: list[Any] = (await service.api.get("/v1/hosts"))["hosts"]
            return hosts if len(hosts) == 4 else None

        hosts = await testing.eventually(all_known)
        assert {one["host"]: one["labels"] for one in hosts} == {
            **{host: {"rack": rack, "zone": "a"} for host, rack in racks.items()},
            "host-4": {"rack": "r2", "zone": "b"},
        }
        body = request_of(image_id, source.add("image", DATA), DATA, labels={"zone": "a"})
        made = await service.api.post("/v1/distributions", body)
        answer = await over(service.api, made["distribution_id"])
        assert [one["host"] for one in answer["progress"]] == ["host-1", "host-2", "host-3"]
        assert answer["host_states"] == {"cached": 3}
    # each knows the two others before it asks for anything, and which of them are in its rack
    for host, rack in racks.items():
        others = frozenset(racks) - {host}
        outside = frozenset(other for other in others if racks[other] != rack)
        assert (others, outside) in swarms


async def test_a_piece_that_changed_on_disk_comes_back_from_the_swarm(
    precache: Any, start_agent: Any, source: Any, request_of: Any, over: Any, image_id: str
) -> None:
    async with precache() as service:
        api = service.api
        place = await start_agent("host-1", service.url, scrub_seconds=0.3)
        await start_agent("host-2", service.url)
        body = request_of(image_id, source.add("image", DATA), DATA, hosts=["host-1", "host-2"])
        made = await api.post("/v1/distributions", body)
        assert (await over(api, made["distribution_id"]))["host_states"] == {"cached": 2}
        file = place / image_id
        before = file.stat()
        fd = os.open(file, os.O_WRONLY)
        os.pwrite(fd, b"damage", 3 * PIECE + 17)
        os.close(fd)

        async def is_repaired() -> bool:
            return bool(file.read_bytes() == DATA)

        await testing.eventually(is_repaired)
        assert file.stat().st_ino == before.st_ino

        async def is_told() -> dict[str, Any] | None:
            answer = await api.get(f"/v1/distributions/{made['distribution_id']}")
            host: dict[str, Any] = answer["progress"][0]
            total = host["received_from_seed_bytes"] + host["received_from_peers_bytes"]
            return host if total > len(DATA) else None

        host = await testing.eventually(is_told)
        total = host["received_from_seed_bytes"] + host["received_from_peers_bytes"]
        assert (host["host"], host["state"]) == ("host-1", "cached")
        assert total == len(DATA) + PIECE  # that piece, and no other
        assert source.requests == ["image"]


@pytest.fixture
def short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent looks after its files several times a second."""
    monkeypatch.setattr(keeper, "ROUND_SECONDS", 0.1)


@pytest.mark.usefixtures("short_rounds")
async def test_an_image_that_its_source_deleted_goes_as_soon_as_nobody_uses_it(
    precache: Any, start_agent: Any, source: Any, request_of: Any, over: Any, tmp_path: Path
) -> None:
    async with precache() as service:
        api = service.api
        place = await start_agent("host-1", service.url, desired_seconds=0.2)
        made = {}
        for name in ("deleted", "used", "withdrawn"):
            body = request_of(name, source.add(name, DATA), DATA, hosts=["host-1"])
            made[name] = (await api.post("/v1/distributions", body))["distribution_id"]
            assert (await over(api, made[name]))["host_states"] == {"cached": 1}
        disk_of_a_guest = tmp_path / "disk"
        os.link(place / "used", disk_of_a_guest)
        await api.delete(f"/v1/distributions/{made['withdrawn']}")
        await api.delete("/v1/images/used")
        await api.delete("/v1/images/deleted")

        async def is_gone(name: str = "deleted") -> bool:
            return not (place / name).exists()

        await testing.eventually(is_gone)
        assert (place / "used").read_bytes() == DATA
        disk_of_a_guest.unlink()
        await testing.eventually(lambda: is_gone("used"))
        # unwanted for less than a day, and not deleted
        assert (place / "withdrawn").read_bytes() == DATA

        async def is_forgotten() -> bool:
            left = [path.name for path in (place / ".precache").iterdir()]
            return not any("deleted" in name or "used" in name for name in left)

        await testing.eventually(is_forgotten)  # what is known of a file goes after the file


@pytest.mark.usefixtures("short_rounds")
async def test_a_host_that_is_wiped_under_its_agent_gets_its_images_again(
    precache: Any, start_agent: Any, source: Any, request_of: Any, over: Any
) -> None:
    async with precache() as service:
        place = await start_agent("host-1", service.url)
        for name in ("one", "two"):
            body = request_of(name, source.add(name, DATA), DATA, hosts=["host-1"])
            made = (await service.api.post("/v1/distributions", body))["distribution_id"]
            assert (await over(service.api, made))["host_states"] == {"cached": 1}
        shutil.rmtree(place)

        async def is_back() -> bool:
            files = [place / "one", place / "two"]
            return all(file.exists() and file.read_bytes() == DATA for file in files)

        await testing.eventually(is_back)
        assert source.requests == ["one", "two"]


async def test_an_image_that_was_withdrawn_while_its_file_was_opened_can_be_had_again(
    precache: Any, start_agent: Any, source: Any, request_of: Any, over: Any, image_id: str,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    is_open, may_go_on = threading.Event(), threading.Event()
    real = PieceStore.open

    def slow(directory: Path, *arguments: Any, **options: Any) -> PieceStore:
        store = real(directory, *arguments, **options)
        if directory == tmp_path / "host-1":
            is_open.set()
            may_go_on.wait(30)
        return store

    monkeypatch.setattr(PieceStore, "open", slow)
    async with precache() as service:
        api = service.api
        place = await start_agent("host-1", service.url, desired_seconds=0.1)
        body = request_of(image_id, source.add("image", DATA), DATA, hosts=["host-1"])
        made = await api.post("/v1/distributions", body)
        await asyncio.to_thread(is_open.wait, 30)
        await api.delete(f"/v1/distributions/{made['distribution_id']}")
        await reports(api, 5)
        may_go_on.set()
        again = await api.post("/v1/distributions", {"image_id": image_id, "hosts": ["host-1"]})
        answer = await over(api, again["distribution_id"])
        assert answer["host_states"] == {"cached": 1}
        assert (place / image_id).read_bytes() == DATA
