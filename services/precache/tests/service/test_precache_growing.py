"""Pieces reach hosts while the source still sends; what comes of it depends on how the source ends."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from hostler_common.testing import RunningService, eventually
from hostler_precache import testing

PIECE = 256 * 1024
SIZE = 8 * 1024 * 1024 + 12_345
PIECES = -(-SIZE // PIECE)
HALF = 4 * 1024 * 1024

Precache = Callable[..., AbstractAsyncContextManager[RunningService]]
StartAgent = Callable[..., Awaitable[Path]]
RequestOf = Callable[..., dict[str, Any]]
Over = Callable[..., Awaitable[dict[str, Any]]]


@pytest.fixture
def data(make_image: Callable[..., bytes]) -> bytes:
    return make_image(SIZE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Coming:
    """An image of which one half has come, and the hosts that have that half."""

    service: RunningService
    made: Mapping[str, Any]
    directories: list[Path]

    async def shown(self) -> dict[str, Any]:
        """The distribution."""
        answer: dict[str, Any] = await self.service.api.get(
            f"/v1/distributions/{self.made['distribution_id']}"
        )
        return answer

    async def thrown_away(self) -> None:
        """Nothing is left of the transfers."""

        async def is_clean() -> bool:
            return not any(partials(directory) for directory in self.directories)

        await eventually(is_clean)


Begin = Callable[..., AbstractAsyncContextManager[Coming]]


@pytest.fixture
def coming(
    precache: Precache,
    start_agent: StartAgent,
    source: testing.Source,
    request_of: RequestOf,
    image_id: str,
    data: bytes,
) -> Begin:
    """`async with coming(sent=data, hosts=("host-1",), is_hashed=True, **settings) as it`.

    The source has sent one half of `sent`, and waits; the hash that was named is that of `data`.
    """

    @asynccontextmanager
    async def begin(
        *,
        sent: bytes = data,
        hosts: Sequence[str] = ("host-1",),
        is_hashed: bool = True,
        **settings: Any,
    ) -> AsyncIterator[Coming]:
        source.pause_after = HALF
        async with precache(**settings) as service:
            directories = [await start_agent(host, service.url) for host in hosts]
            url = source.add("image", sent)
            body = request_of(image_id, url, data, hosts=list(hosts))
            if not is_hashed:
                body["image"] = {"image_id": image_id, "location": url}
            made = await service.api.post("/v1/distributions", body)
            await has_come(service, made, HALF // PIECE)
            yield Coming(service=service, made=made, directories=directories)

    return begin


async def progress(service: RunningService, made: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    answer = await service.api.get(f"/v1/distributions/{made['distribution_id']}")
    return {one["host"]: one for one in answer["progress"]}


async def has_come(service: RunningService, made: Mapping[str, Any], pieces: int) -> None:
    """Every host has that many pieces."""

    async def has() -> bool:
        hosts = await progress(service, made)
        return all(one["pieces_done"] >= pieces for one in hosts.values())

    await eventually(has)


async def broken(source: testing.Source) -> None:
    """The source goes on, and breaks off; from then on it sends everything."""
    source.go_on.set()

    async def has_broken() -> bool:
        return source.broken == 1

    await eventually(has_broken)
    source.pause_after = source.break_after = None


async def test_pieces_are_on_hosts_before_the_source_has_ended_and_no_file_is(
    coming: Begin, source: testing.Source, over: Over, image_id: str, data: bytes
) -> None:
    async with coming(hosts=["host-1", "host-2"]) as it:
        answer = await it.shown()
        assert answer["state"] == "distributing"
        assert answer["verification"] is None
        assert answer["host_states"] == {"transferring": 2}

        async def waits_for_the_source() -> bool:
            return bool((await it.shown())["estimate"]["limit"] == "the image's source")

        await eventually(waits_for_the_source)
        assert not any((directory / image_id).exists() for directory in it.directories)
        source.go_on.set()
        answer = await over(it.service.api, it.made["distribution_id"])
        assert answer["host_states"] == {"cached": 2}
        assert answer["verification"] == "hash"
        for directory in it.directories:
            assert (directory / image_id).read_bytes() == data
            assert not list((directory / ".precache").glob("*.part"))


async def test_a_place_that_cannot_be_used_is_said_so_and_the_agent_goes_on(
    precache: Precache,
    start_agent: StartAgent,
    source: testing.Source,
    request_of: RequestOf,
    image_id: str,
    data: bytes,
    tmp_path: Path,
) -> None:
    source.pause_after = HALF
    (tmp_path / "host-1").mkdir()
    async with precache() as service:
        await start_agent("host-1", service.url, target_template="{image_id}" * 8)
        body = request_of(image_id, source.add("image", data), data, hosts=["host-1"])
        made = await service.api.post("/v1/distributions", body)

        async def has_failed() -> str | None:
            host = (await progress(service, made))["host-1"]
            return host["reason"] if host["state"] == "error" else None

        reason = await eventually(has_failed)
        assert reason.startswith("storage.failed: ")
        assert reason.endswith(": File name too long")
        source.go_on.set()


def partials(directory: Path) -> list[Path]:
    """What is left of transfers."""
    return [
        *(directory / ".precache").glob("*.part"),
        *(directory / ".precache").glob("*.journal"),
    ]


async def test_an_image_whose_hash_is_wrong_in_the_end_is_on_no_host(
    coming: Begin, source: testing.Source, over: Over, image_id: str, data: bytes
) -> None:
    hosts = ["host-1", "host-2"]
    async with coming(sent=data[:-1] + bytes([data[-1] ^ 1]), hosts=hosts) as it:
        source.go_on.set()
        answer = await over(it.service.api, it.made["distribution_id"])
        assert answer["state"] == "error"
        assert answer["reason"].startswith("source.hash_mismatch")
        assert answer["host_states"] == {"waiting": 2}
        assert {one["pieces_done"] for one in answer["progress"]} == {0}
        await it.thrown_away()
        assert not any((directory / image_id).exists() for directory in it.directories)
        # and running again converges
        source.add("image", data)
        again = await it.service.api.post(
            "/v1/distributions", {"image_id": image_id, "hosts": hosts}
        )
        answer = await over(it.service.api, again["distribution_id"])
        assert answer["host_states"] == {"cached": 2}
        assert all((one / image_id).read_bytes() == data for one in it.directories)


async def test_a_source_that_breaks_off_and_sends_the_same_later_costs_hosts_nothing_twice(
    coming: Begin,
    source: testing.Source,
    over: Over,
    image_id: str,
    data: bytes,
    database_url: str,
) -> None:
    source.break_after = 0
    async with coming() as it:
        told = await it.shown()
        await broken(source)
        answer = await over(it.service.api, it.made["distribution_id"])
        assert answer["host_states"] == {"cached": 1}
        assert answer["blob_id"] == told["blob_id"]
        assert (it.directories[0] / image_id).read_bytes() == data
        (host,) = answer["progress"]
        assert (host["received_from_seed_bytes"], host["wasted_bytes"]) == (SIZE, 0)
        database = await asyncpg.connect(database_url)
        attempts = await database.fetchval("SELECT attempts FROM precache.blob")
        left = await database.fetchval("SELECT count(*) FROM precache.blob_growth")
        await database.close()
        assert (attempts, left) == (2, 0)


async def test_a_source_that_sends_other_bytes_later_is_another_blob_and_nothing_mixes(
    coming: Begin, source: testing.Source, over: Over, image_id: str, data: bytes
) -> None:
    source.break_after = 0
    other = bytes([data[0] ^ 1]) + data[1:]
    async with coming(is_hashed=False) as it:
        told = await it.shown()
        source.add("image", other)
        await broken(source)
        answer = await over(it.service.api, it.made["distribution_id"])
        assert answer["host_states"] == {"cached": 1}
        assert answer["blob_id"] != told["blob_id"]
        assert (it.directories[0] / image_id).read_bytes() == other
        await it.thrown_away()


async def test_a_source_that_always_sends_other_bytes_ends_the_distribution(
    coming: Begin, source: testing.Source, over: Over, image_id: str, data: bytes
) -> None:
    source.break_after = 0
    async with coming(is_hashed=False, fetch_attempts=2) as it:
        source.add("image", bytes([data[0] ^ 1]) + data[1:])
        await broken(source)
        answer = await over(it.service.api, it.made["distribution_id"])
        assert answer["state"] == "error"
        assert answer["reason"].startswith("source.changed")
        await it.thrown_away()
        assert not (it.directories[0] / image_id).exists()


async def test_a_truncated_source_ends_the_distribution_with_its_reason(
    coming: Begin, source: testing.Source, over: Over, image_id: str, tmp_path: Path
) -> None:
    source.break_after = 0
    async with coming(fetch_attempts=1) as it:
        source.go_on.set()
        answer = await over(it.service.api, it.made["distribution_id"])
        assert answer["state"] == "error"
        assert answer["reason"].startswith("source.truncated")
        await it.thrown_away()
        assert not (it.directories[0] / image_id).exists()
        assert list((tmp_path / "seed").iterdir()) == []  # nobody goes on with it


async def test_an_image_that_is_deleted_while_it_comes_is_thrown_away(
    coming: Begin, source: testing.Source, image_id: str
) -> None:
    async with coming() as it:
        await it.service.api.delete(f"/v1/images/{image_id}")
        await it.thrown_away()
        answer = await it.shown()
        assert (answer["state"], answer["reason"]) == ("cancelled", "image.deleted")
        source.go_on.set()
    assert not (it.directories[0] / image_id).exists()


async def test_a_host_that_comes_while_the_source_still_sends_gets_what_there_is(
    precache: Precache,
    start_agent: StartAgent,
    source: testing.Source,
    request_of: RequestOf,
    over: Over,
    image_id: str,
    data: bytes,
) -> None:
    source.pause_after = HALF
    hosts = ["host-1", "host-2"]
    async with precache() as service:
        first = await start_agent("host-1", service.url)
        body = request_of(image_id, source.add("image", data), data, hosts=hosts)
        made = await service.api.post("/v1/distributions", body)

        async def one_has() -> bool:
            hosts = await progress(service, made)
            return bool(hosts["host-1"]["pieces_done"] >= HALF // PIECE)

        await eventually(one_has)
        second = await start_agent("host-2", service.url)
        await has_come(service, made, HALF // PIECE)
        # a second distribution of it joins the blob that grows
        third = await start_agent("host-3", service.url)
        again = await service.api.post(
            "/v1/distributions", {"image_id": image_id, "hosts": ["host-3"]}
        )
        assert again["state"] == "distributing"
        await has_come(service, again, HALF // PIECE)
        source.go_on.set()
        for distribution in (made, again):
            answer = await over(service.api, distribution["distribution_id"])
            assert set(answer["host_states"]) == {"cached"}
        assert all((one / image_id).read_bytes() == data for one in (first, second, third))


async def test_what_is_in_the_place_of_an_image_is_compared_when_all_of_it_is_known(
    precache: Precache,
    start_agent: StartAgent,
    source: testing.Source,
    request_of: RequestOf,
    over: Over,
    image_id: str,
    data: bytes,
    tmp_path: Path,
) -> None:
    source.pause_after = HALF
    (tmp_path / "host-1").mkdir()
    (tmp_path / "host-1" / image_id).write_bytes(data)
    async with precache() as service:
        await start_agent("host-1", service.url)
        directory = await start_agent("host-2", service.url)
        body = request_of(image_id, source.add("image", data), data, hosts=["host-1", "host-2"])
        made = await service.api.post("/v1/distributions", body)

        async def one_has() -> bool:
            hosts = await progress(service, made)
            return bool(hosts["host-2"]["pieces_done"] >= HALF // PIECE)

        await eventually(one_has)
        source.go_on.set()
        answer = await over(service.api, made["distribution_id"])
        assert answer["host_states"] == {"cached": 1, "existing": 1}
        hosts = {one["host"]: one for one in answer["progress"]}
        assert hosts["host-1"]["received_from_seed_bytes"] == 0
        assert (directory / image_id).read_bytes() == data


async def test_zeros_do_not_travel_while_an_image_comes_either(
    precache: Precache,
    start_agent: StartAgent,
    source: testing.Source,
    request_of: RequestOf,
    over: Over,
    image_id: str,
    make_image: Callable[..., bytes],
) -> None:
    # piece 25 begins with data and ends with zeros, and all that comes after it is zeros
    data = make_image(4 * PIECE) + bytes(20 * PIECE) + make_image(PIECE + 5) + bytes(3 * PIECE)
    source.pause_after = 27 * PIECE
    async with precache() as service:
        directory = await start_agent("host-1", service.url)
        body = request_of(image_id, source.add("image", data), data, hosts=["host-1"])
        made = await service.api.post("/v1/distributions", body)
        await has_come(service, made, 27)
        source.go_on.set()
        answer = await over(service.api, made["distribution_id"])
        (host,) = answer["progress"]
        assert host["state"] == "cached"
        assert host["received_from_seed_bytes"] == 6 * PIECE
        assert (directory / image_id).read_bytes() == data


@pytest.mark.parametrize("disk_format", ["qcow2", "vmdk"])
async def test_of_an_image_that_will_be_converted_nothing_is_told_before(
    precache: Precache,
    source: testing.Source,
    request_of: RequestOf,
    over: Over,
    image_id: str,
    data: bytes,
    disk_format: str,
) -> None:
    source.pause_after = HALF
    async with precache() as service:
        body = request_of(image_id, source.add("image", data), data, hosts=["host-1"])
        body["image"]["disk_format"] = disk_format
        made = await service.api.post("/v1/distributions", body)

        async def half() -> bool:
            answer = await service.api.get(f"/v1/distributions/{made['distribution_id']}")
            return bool(answer["fetched_bytes"] >= HALF)  # told a second later than pieces are

        await eventually(half)
        answer = await service.api.get(f"/v1/distributions/{made['distribution_id']}")
        assert (answer["state"], answer["size_bytes"]) == ("fetching", None)
        source.go_on.set()
        answer = await over(service.api, made["distribution_id"])
        assert answer["reason"].startswith("source.format_mismatch")


async def test_a_replica_that_does_not_fetch_tells_hosts_what_has_come(
    precache: Precache,
    start_agent: StartAgent,
    source: testing.Source,
    request_of: RequestOf,
    over: Over,
    image_id: str,
    data: bytes,
    database_url: str,
    tmp_path: Path,
) -> None:
    source.pause_after = HALF
    async with (
        precache(seed_id="seed-1") as one,
        precache(seed_id="seed-2", data_dir=tmp_path / "seed-2") as two,
    ):
        body = request_of(image_id, source.add("image", data), data, hosts=["host-1"])
        made = await one.api.post("/v1/distributions", body)
        database = await asyncpg.connect(database_url)

        async def claimed() -> str | None:
            seed: str | None = await database.fetchval("SELECT seed FROM precache.blob")
            return seed

        other = two if await eventually(claimed) == "seed-1" else one
        await database.close()
        directory = await start_agent("host-1", other.url)
        await has_come(other, made, HALF // PIECE)
        source.go_on.set()
        answer = await over(other.api, made["distribution_id"])
        assert answer["host_states"] == {"cached": 1}
        assert (directory / image_id).read_bytes() == data
