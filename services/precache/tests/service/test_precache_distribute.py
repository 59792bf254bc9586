"""List, Fetch, Serve, Distribute, on a real broker and database, with real agents."""

import asyncio
import base64
import contextlib
import json
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import aiohttp
import pytest

from hostler_common import errors, servers, testing
from hostler_precache.distribution import distributions_api
from hostler_precache.sources import fetchers, listers
from hostler_precache.sources.source import SourceError

MIB = 1 << 20
Over = Callable[..., Awaitable[dict[str, Any]]]


@pytest.fixture
def data(make_image: Any) -> bytes:
    image: bytes = make_image(6 * MIB + 4321)
    return image


async def counted(api: Any, distribution_id: str, total: int) -> dict[str, Any]:
    """The distribution, once its senders have told all that they sent."""

    async def told() -> dict[str, Any] | None:
        answer: dict[str, Any] = await api.get(f"/v1/distributions/{distribution_id}")
        sent = answer["seed_sent_bytes"] + answer["peers_sent_bytes"]
        return answer if sent >= total else None

    found: dict[str, Any] = await testing.eventually(told)
    return found


@contextlib.asynccontextmanager
async def open_door(door: int, *, to: tuple[str, int]) -> AsyncIterator[None]:
    """Who comes to this port of the machine is let through to another one."""

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def let_in(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner = await asyncio.open_connection(*to)
        await asyncio.gather(carry(reader, inner[1]), carry(inner[0], writer))

    server = await asyncio.start_server(let_in, "127.0.0.1", door)
    try:
        yield
    finally:
        server.close()


async def test_an_image_reaches_three_hosts_and_little_more_than_one_copy_leaves_the_seed(
    precache: Any, start_agent: Any, source: Any, make_image: Any, request_of: Any, over: Over,
    image_id: str,
) -> None:  # fmt: skip
    data = make_image(20 * MIB + 4321)
    async with precache() as service:
        hosts = [f"host-{number}" for number in range(3)]
        places = [await start_agent(host, service.url) for host in hosts]
        body = request_of(image_id, source.add("image", data), data, hosts=hosts)
        made = await service.api.post("/v1/distributions", body)
        assert made["state"] == "fetching"
        answer = await over(service.api, made["distribution_id"])
        assert answer["state"] == "done"
        assert answer["host_states"] == {"cached": 3}
        assert answer["verification"] == "hash"
        desired = await service.api.get("/v1/desired", host="host-0")
        image = desired["images"][0]
        path = f"/v1/blobs/{image['blob_id']}/growth"
        first = await service.api.get(path, after=0, most=2)
        rest = await service.api.get(path, after=2)
        assert (first["root"], rest["root"]) == (None, image["root"])
        assert len(base64.b64decode(first["digests"])) == 2 * 32
        assert first["digests"][:80] == (await service.api.get(path))["digests"][:80]
        for place in places:
            assert (place / image_id).read_bytes() == data
            assert not list((place / ".precache").glob("*.part"))
        answer = await counted(service.api, made["distribution_id"], 3 * len(data))
        by_seed, by_peers = answer["seed_sent_bytes"], answer["peers_sent_bytes"]
        assert len(data) <= by_seed <= 1.1 * len(data)
        assert 3 * len(data) <= by_seed + by_peers <= 1.01 * 3 * len(data)
        assert sum(host["sent_bytes"] for host in answer["progress"]) == by_peers
        assert sum(host["wasted_bytes"] for host in answer["progress"]) <= 0.01 * 3 * len(data)
        assert source.requests == ["image"]


async def test_three_distributions_at_once_move_no_faster_than_the_whole_cluster_may(
    precache: Any, start_agent: Any, source: Any, make_image: Any, request_of: Any, over: Over,
) -> None:  # fmt: skip
    images = {str(uuid.uuid4()): make_image(2 * MIB, seed=number) for number in range(3)}
    loop = asyncio.get_running_loop()
    async with precache(cluster_bytes_per_second=2 * MIB) as service:
        places = [await start_agent(f"host-{number}", service.url) for number in range(2)]
        began = loop.time()
        made = []
        for image_id, data in images.items():
            body = request_of(
                image_id, source.add(image_id, data), data, hosts=["host-0", "host-1"]
            )
            made.append(await service.api.post("/v1/distributions", body))
        for one in made:
            answer = await over(service.api, one["distribution_id"])
            assert answer["host_states"] == {"cached": 2}
            assert answer["estimate"]["limit"] == "the cluster's bandwidth"
        seconds = loop.time() - began
        for image_id, data in images.items():
            for place in places:
                assert (place / image_id).read_bytes() == data
    # of the 12 MiB some move before shares are known; a slow machine is only further below
    assert seconds > 3


async def test_a_second_distribution_and_a_late_host_fetch_nothing_from_the_source(
    precache: Any, start_agent: Any, source: Any, data: bytes, request_of: Any, over: Over,
    image_id: str,
) -> None:  # fmt: skip
    async with precache() as service:
        await start_agent("host-1", service.url)
        body = request_of(image_id, source.add("image", data), data)
        first = await service.api.post("/v1/distributions", body)
        await over(service.api, first["distribution_id"])
        place = await start_agent("late", service.url)

        async def has_it() -> bool:
            return bool((place / image_id).exists())

        await testing.eventually(has_it)
        answer = await over(service.api, first["distribution_id"])
        assert answer["host_states"] == {"cached": 2}
        second = await service.api.post("/v1/distributions", {"image_id": image_id})
        assert second["state"] == "distributing"
        answer = await over(service.api, second["distribution_id"])
        assert answer["host_states"] == {"cached": 2}
        assert source.requests == ["image"]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ({"os_hash_value": "0" * 128}, "source.hash_mismatch"),
        ({"size_bytes": 5}, "source.size_mismatch"),
        ({"location": "http://127.0.0.1:1/none"}, "source.unreachable"),
        ({"location": "file:///etc/passwd"}, "source.invalid"),
        ({"fetcher": "file", "location": "/etc/passwd"}, "source.forbidden"),
        ({"fetcher": "glance"}, "source.not_configured"),
    ],
)
async def test_an_image_that_is_not_what_its_source_says_is_never_served(
    precache: Any, source: Any, data: bytes, request_of: Any, over: Over, image_id: str,
    damage: dict[str, Any], reason: str, tmp_path: Any,
) -> None:  # fmt: skip
    body = request_of(image_id, source.add("image", data), data, hosts=["host-1"])
    body["image"] |= damage
    async with precache(fetch_attempts=1) as service:
        made = await service.api.post("/v1/distributions", body)
        answer = await over(service.api, made["distribution_id"])
        assert answer["state"] == "error"
        assert answer["reason"].startswith(reason)
        assert (await service.api.get("/v1/desired", host="host-1")) == {
            "images": [],
            "deleted_image_ids": [],
        }
        assert not (tmp_path / "seed").exists() or list((tmp_path / "seed").iterdir()) == []


async def test_a_source_that_breaks_off_is_asked_again(
    precache: Any, start_agent: Any, source: Any, data: bytes, request_of: Any, over: Over,
    image_id: str,
) -> None:  # fmt: skip
    source.break_after = MIB
    async with precache() as service:
        place = await start_agent("host-1", service.url)
        body = request_of(image_id, source.add("image", data), data, hosts=["host-1"])
        made = await service.api.post("/v1/distributions", body)

        async def failed_once() -> bool:
            image = await service.api.get(f"/v1/images/{image_id}")
            return str(image["reason"]).startswith("source.truncated")

        await testing.eventually(failed_once)
        source.break_after = None
        answer = await over(service.api, made["distribution_id"])
        assert answer["host_states"] == {"cached": 1}
        assert (place / image_id).read_bytes() == data


async def test_an_image_without_a_hash_is_distributed_and_marked(
    precache: Any, start_agent: Any, source: Any, data: bytes, request_of: Any, over: Over,
    image_id: str,
) -> None:  # fmt: skip
    body = request_of(image_id, source.add("image", data), data, hosts=["host-1"])
    del body["image"]["os_hash_algo"], body["image"]["os_hash_value"]
    async with precache() as service:
        await start_agent("host-1", service.url)
        made = await service.api.post("/v1/distributions", body)
        answer = await over(service.api, made["distribution_id"])
        assert (answer["state"], answer["verification"]) == ("done", "unverifiable")


async def test_an_empty_image_is_an_image(
    precache: Any, start_agent: Any, source: Any, request_of: Any, over: Over, image_id: str
) -> None:
    body = request_of(image_id, source.add("image", b""), b"", hosts=["host-1"])
    async with precache() as service:
        place = await start_agent("host-1", service.url)
        made = await service.api.post("/v1/distributions", body)
        assert (await over(service.api, made["distribution_id"]))["host_states"] == {"cached": 1}
        assert (place / image_id).read_bytes() == b""


@pytest.mark.parametrize(
    ("settings", "prepare", "state", "reason"),
    [
        ({}, "same", "existing", None),
        ({}, "other", "error", "target.exists"),
        ({"replace_differing": True}, "other", "cached", None),
        ({"unsupported_reason": "images_type is rbd"}, None, "unsupported", "images_type is rbd"),
        ({"max_image_bytes": 1000}, None, "skipped", "image.too_large"),
        ({"reserve_bytes": 2**60}, None, "error", "storage.no_space"),
        ({"target_template": "{sha1}"}, None, "cached", None),
    ],
)
async def test_every_outcome_of_a_host_has_its_word_and_reason(
    precache: Any, start_agent: Any, source: Any, data: bytes, request_of: Any, over: Over,
    settings: dict[str, Any], prepare: str | None, state: str, reason: str | None, tmp_path: Any,
) -> None:  # fmt: skip
    image_id, place = "debian-12", tmp_path / "host-1"
    place.mkdir()
    if prepare is not None:
        (place / image_id).write_bytes(data if prepare == "same" else b"somebody's file")
    body = request_of(image_id, source.add("image", data), data, hosts=["host-1"])
    async with precache() as service:
        await start_agent("host-1", service.url, **settings)
        made = await service.api.post("/v1/distributions", body)
        answer = await over(service.api, made["distribution_id"])
        (host,) = answer["progress"]
        assert host["state"] == state
        assert host["reason"] is None if reason is None else host["reason"].startswith(reason)
        if state == "cached":
            name = image_id if "target_template" not in settings else _NOVA_NAME
            assert (place / name).read_bytes() == data
        if prepare == "other" and state == "error":
            assert (place / image_id).read_bytes() == b"somebody's file"


# sha1 of "debian-12", as nova/virt/libvirt/imagecache.py makes it
_NOVA_NAME = "90f087a90d3b1a14d0c5959a5c3cecab313c7cd1"


async def test_a_sparse_image_of_forty_gigabytes_costs_what_its_data_does(
    precache: Any, start_agent: Any, over: Over, image_id: str, data: bytes, tmp_path: Any
) -> None:
    directory = tmp_path / "images"
    directory.mkdir()
    with (directory / "sparse").open("wb") as file:
        file.seek(20 << 30)
        file.write(data[:MIB])
        file.truncate(40 << 30)
    async with precache(file_roots=[str(directory)]) as service:
        place = await start_agent("host-1", service.url)
        image = {
            "image_id": image_id, "fetcher": "file", "location": str(directory / "sparse"),
            "disk_format": "raw",
        }  # fmt: skip
        made = await service.api.post(
            "/v1/distributions", {"image_id": image_id, "image": image, "hosts": ["host-1"]}
        )
        answer = await over(service.api, made["distribution_id"])
        (host,) = answer["progress"]
        assert (host["state"], host["bytes_done"]) == ("cached", 40 << 30)
        assert host["received_from_seed_bytes"] == 16 * MIB  # the piece that the data is in
        status = (place / image_id).stat()
        assert (status.st_size, status.st_blocks * 512 <= 16 * MIB) == (40 << 30, True)
        with (place / image_id).open("rb") as placed:
            placed.seek(20 << 30)
            assert placed.read(MIB) == data[:MIB]


async def test_a_cancelled_distribution_is_not_wanted_any_more(
    precache: Any, source: Any, data: bytes, request_of: Any, image_id: str
) -> None:
    body = request_of(image_id, source.add("image", data), data, hosts=["host-1"])
    async with precache() as service:
        made = await service.api.post("/v1/distributions", body)

        async def wanted() -> list[Any]:
            answer = await service.api.get("/v1/desired", host="host-1")
            images: list[Any] = answer["images"]
            return images

        await testing.eventually(wanted)
        await service.api.delete(f"/v1/distributions/{made['distribution_id']}")
        assert await wanted() == []
        answer = await service.api.get(f"/v1/distributions/{made['distribution_id']}")
        assert answer["state"] == "cancelled"


async def test_a_restarted_seed_serves_what_it_had_without_asking_the_source(
    precache: Any, start_agent: Any, source: Any, data: bytes, request_of: Any, over: Over,
    image_id: str,
) -> None:  # fmt: skip
    body = request_of(image_id, source.add("image", data), data, hosts=["host-1"])
    async with precache() as service:
        await service.api.post("/v1/distributions", body)

        async def is_ready() -> bool:
            return bool((await service.api.get(f"/v1/images/{image_id}"))["state"] == "ready")

        await testing.eventually(is_ready)
    async with precache() as service:
        place = await start_agent("host-1", service.url)
        (listed,) = (await service.api.get("/v1/distributions"))["distributions"]
        await over(service.api, listed["distribution_id"])
        assert (place / image_id).read_bytes() == data
        assert source.requests == ["image"]


async def test_a_seed_whose_file_was_damaged_fetches_it_again(
    precache: Any, start_agent: Any, source: Any, data: bytes, request_of: Any, over: Over,
    image_id: str, tmp_path: Any,
) -> None:  # fmt: skip
    body = request_of(image_id, source.add("image", data), data, hosts=["host-1"])
    async with precache() as service:
        await service.api.post("/v1/distributions", body)

        async def is_ready() -> bool:
            return bool((await service.api.get(f"/v1/images/{image_id}"))["state"] == "ready")

        await testing.eventually(is_ready)
    (file,) = (tmp_path / "seed").iterdir()
    fd = os.open(file, os.O_WRONLY)
    os.pwrite(fd, b"damage", 3 * MIB)
    os.close(fd)
    async with precache() as service:
        place = await start_agent("host-1", service.url)
        (listed,) = (await service.api.get("/v1/distributions"))["distributions"]
        answer = await over(service.api, listed["distribution_id"])
        assert answer["host_states"] == {"cached": 1}
        assert (place / image_id).read_bytes() == data
        assert source.requests == ["image", "image"]


async def test_what_was_called_for_before_an_agent_could_hear_it_is_not_missed(
    precache: Any, start_agent: Any, source: Any, data: bytes, request_of: Any, over: Over,
    image_id: str, amqp_url: str,
) -> None:  # fmt: skip
    broker, door = urlsplit(amqp_url), servers.free_port()
    away = broker._replace(netloc=broker.netloc.replace(f":{broker.port}", f":{door}")).geturl()

    async with precache() as service:
        starting = asyncio.create_task(
            start_agent("host-1", service.url, amqp_url=away, desired_seconds=3600)
        )
        looked = 'hostler_http_requests_total{method="GET",route="/v1/desired",status="200"} 1.0'

        async def has_looked() -> bool:
            async with aiohttp.request("GET", f"{service.url}/metrics") as answer:
                return looked in await answer.text()

        await testing.eventually(has_looked)
        body = request_of(image_id, source.add("image", data), data, hosts=["host-1"])
        made = await service.api.post("/v1/distributions", body)

        async def is_called_for() -> bool:
            shown = await service.api.get(f"/v1/distributions/{made['distribution_id']}")
            return shown["announced_at"] is not None

        await testing.eventually(is_called_for)
        assert broker.hostname is not None
        assert broker.port is not None
        async with open_door(door, to=(broker.hostname, broker.port)):
            place = await starting
            answer = await over(service.api, made["distribution_id"])
            assert answer["host_states"] == {"cached": 1}
            assert (place / image_id).read_bytes() == data


async def test_a_host_that_reaches_nobody_says_so_and_has_the_image_when_it_reaches_somebody(
    precache: Any, start_agent: Any, source: Any, data: bytes, request_of: Any, over: Over,
    image_id: str,
) -> None:  # fmt: skip
    seed, door = servers.free_port(), servers.free_port()
    async with precache(blob_port=seed, seed_url=f"http://127.0.0.1:{door}") as service:
        place = await start_agent("host-1", service.url)
        body = request_of(image_id, source.add("image", data), data, hosts=["host-1"])
        made = await service.api.post("/v1/distributions", body)

        async def told() -> Any:
            shown = await service.api.get(f"/v1/distributions/{made['distribution_id']}")
            (host,) = shown["progress"]
            return host if host["reason"] else None

        host = await testing.eventually(told)
        assert host["state"] == "transferring"
        assert host["reason"].startswith(f"peers.unreachable: seed http://127.0.0.1:{door}: ")
        async with open_door(door, to=("127.0.0.1", seed)):
            answer = await over(service.api, made["distribution_id"])
        assert [(host["state"], host["reason"]) for host in answer["progress"]] == [
            ("cached", None)
        ]
        assert (place / image_id).read_bytes() == data


async def test_a_restarted_agent_says_again_what_it_has(
    precache: Any, start_agent: Any, source: Any, data: bytes, request_of: Any, over: Over,
    image_id: str, tmp_path: Any,
) -> None:  # fmt: skip
    body = request_of(image_id, source.add("image", data), data, hosts=["host-1"])
    async with precache() as service:
        place = await start_agent("host-1", service.url)
        made = await service.api.post("/v1/distributions", body)
        await over(service.api, made["distribution_id"])
        before = (place / image_id).stat().st_ino
        await start_agent("host-2", service.url, target_dir=place)
        second = await service.api.post(
            "/v1/distributions", {"image_id": image_id, "hosts": ["host-1", "host-2"]}
        )
        answer = await over(service.api, second["distribution_id"])
        states = {host["host"]: host["state"] for host in answer["progress"]}
        assert states == {"host-1": "cached", "host-2": "existing"}
        assert (place / image_id).stat().st_ino == before


async def test_an_idempotency_key_makes_one_distribution(
    precache: Any, source: Any, data: bytes, request_of: Any, image_id: str
) -> None:
    body = request_of(image_id, source.add("image", data), data, hosts=["host-1"])
    async with precache() as service:
        replies = [
            await service.api.post("/v1/distributions", body, idempotency_key="key-1")
            for _ in range(3)
        ]
        assert replies[0] == replies[1] == replies[2]
        assert len((await service.api.get("/v1/distributions"))["distributions"]) == 1


async def test_a_policy_distributes_what_its_lister_names_once(
    precache: Any, start_agent: Any, source: Any, data: bytes, request_of: Any, over: Over
) -> None:
    images = [request_of(name, source.add(name, data), data)["image"] for name in ("one", "two")]
    policy = {"name": "golden", "options": {"images": images}, "every_seconds": 1}
    async with precache() as service:
        place = await start_agent("host-1", service.url)
        made = await service.api.post("/v1/policies", policy)

        async def ran_twice() -> Any:
            shown = await service.api.get(f"/v1/policies/{made['policy_id']}")
            said = "2 images, 0 new, 0 moved or withdrawn"
            return shown if shown["last_detail"] == said else None

        shown = await testing.eventually(ran_twice)
        assert shown["last_outcome"] == "ok"
        listed = (await service.api.get("/v1/distributions"))["distributions"]
        assert sorted(one["image_id"] for one in listed) == ["one", "two"]
        for one in listed:
            assert (await over(service.api, one["distribution_id"]))["state"] == "done"
        assert (place / "one").read_bytes() == (place / "two").read_bytes() == data
        await service.api.delete(f"/v1/policies/{made['policy_id']}")
        with pytest.raises(errors.NotFound):
            await service.api.get(f"/v1/policies/{made['policy_id']}")


async def test_a_policy_with_wrong_options_says_what_is_wrong(precache: Any) -> None:
    async with precache() as service:
        made = await service.api.post(
            "/v1/policies", {"name": "bad", "options": {"images": [{"image_id": "../x"}]}}
        )

        async def failed() -> Any:
            shown = await service.api.get(f"/v1/policies/{made['policy_id']}")
            return shown if shown["last_outcome"] == "failed" else None

        shown = await testing.eventually(failed)
        assert "images.0.image_id" in shown["last_detail"]


STORIES = [
    ("GET", "/v1/distributions/5a0e1d0e-0000-4000-8000-000000000001", None, 404,
     "precache.distribution.not_found"),
    ("DELETE", "/v1/distributions/5a0e1d0e-0000-4000-8000-000000000001", None, 404,
     "precache.distribution.not_found"),
    ("GET", "/v1/images/none", None, 404, "precache.image.not_found"),
    ("GET", "/v1/blobs/5a0e1d0e-0000-4000-8000-000000000001/manifest", None, 404,
     "precache.blob.not_found"),
    ("POST", "/v1/distributions", {"image_id": "unknown"}, 404, "precache.image.not_found"),
    ("POST", "/v1/distributions", {"image_id": "../../etc/passwd"}, 422, "request.invalid"),
    ("POST", "/v1/distributions", {"image_id": "x", "hosts": []}, 422, "request.invalid"),
    ("POST", "/v1/distributions", {"image_id": "x", "hosts": ["a/b"]}, 422, "request.invalid"),
    ("POST", "/v1/distributions", {"image_id": "x", "other": 1}, 422, "request.invalid"),
    ("POST", "/v1/distributions",
     {"image_id": "x", "image": {"image_id": "y"}}, 422, "request.invalid"),
    ("POST", "/v1/images", {"image_id": "x", "fetcher": "ftp"}, 422, "precache.plugin.unknown"),
    ("POST", "/v1/images", {"image_id": "x", "os_hash_algo": "crc32", "os_hash_value": "00"},
     422, "request.invalid"),
    ("POST", "/v1/images", {"image_id": "x", "os_hash_algo": "sha512", "os_hash_value": "00"},
     422, "request.invalid"),
    ("POST", "/v1/images", {"image_id": "x", "os_hash_value": "0" * 128}, 422, "request.invalid"),
    ("POST", "/v1/images", {"image_id": "x", "os_hash_algo": "sha512"}, 422, "request.invalid"),
    ("POST", "/v1/policies", {"name": "p", "lister": "none"}, 422, "precache.plugin.unknown"),
    ("POST", "/v1/policies", {"name": "p", "every_seconds": 0}, 422, "request.invalid"),
    ("PUT", "/v1/hosts/a%2Fb/report", {}, 404, "http.404"),
    ("PUT", "/v1/hosts/a/report", {"url": "ftp://x", "session_id": "x"}, 422, "request.invalid"),
    ("GET", "/v1/desired?host=..%2F", None, 422, "request.invalid"),
    ("GET", "/v1/hosts?limit=0", None, 422, "request.invalid"),
]  # fmt: skip


async def test_bad_requests_get_a_problem_with_a_stable_code(precache: Any) -> None:
    async with precache() as service:
        for method, path, body, status, code in STORIES:
            bare, _, query = path.partition("?")
            with pytest.raises(errors.HostlerError) as caught:
                await service.api.call(method, bare, params=dict(parse_qsl(query)), body=body)
            assert (method, path, caught.value.status, caught.value.code) == (
                method, path, status, code,
            )  # fmt: skip


async def test_an_image_cannot_become_another_under_its_id(
    precache: Any, source: Any, data: bytes, request_of: Any, image_id: str
) -> None:
    async with precache() as service:
        body = request_of(image_id, source.add("image", data), data, hosts=["host-1"])
        await service.api.post("/v1/distributions", body)

        async def is_ready() -> bool:
            return bool((await service.api.get(f"/v1/images/{image_id}"))["state"] == "ready")

        await testing.eventually(is_ready)
        other = request_of(image_id, source.add("other", b"other"), b"other")
        with pytest.raises(errors.Conflict) as caught:
            await service.api.post("/v1/distributions", other)
        assert caught.value.code == "precache.image.differs"


async def test_a_watcher_sees_progress_and_the_end(
    precache: Any, start_agent: Any, source: Any, data: bytes, request_of: Any, image_id: str
) -> None:
    body = request_of(image_id, source.add("image", data), data, hosts=["host-1"])
    async with precache() as service, aiohttp.ClientSession() as session:
        await start_agent("host-1", service.url)
        made = await service.api.post("/v1/distributions", body)
        url = f"{service.url}/v1/distributions/{made['distribution_id']}/events"
        async with session.get(url) as response:
            assert response.content_type == "text/event-stream"
            lines = (await response.text()).splitlines()
        events = [line.removeprefix("event: ") for line in lines if line.startswith("event")]
        last = json.loads([line for line in lines if line.startswith("data")][-2][6:])
        assert events[-1] == "end"
        assert set(events[:-1]) == {"progress"}
        assert last["progress"][0]["bytes_done"] == len(data)


async def test_a_watcher_hears_that_there_is_nothing_new(
    precache: Any, source: Any, data: bytes, request_of: Any, image_id: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(distributions_api, "HEARTBEAT_SECONDS", 0.0)
    body = request_of(image_id, source.add("image", data), data, hosts=["nobody"])
    async with precache() as service, aiohttp.ClientSession() as session:
        made = await service.api.post("/v1/distributions", body)
        url = f"{service.url}/v1/distributions/{made['distribution_id']}/events"
        async with session.get(url) as response, asyncio.timeout(30):
            lines = []
            while b": nothing new\n" not in lines:
                lines.append(await response.content.readline())
        assert b"event: progress\n" in lines


async def test_the_pages_show_distributions_hosts_and_policies(
    precache: Any, start_agent: Any, source: Any, data: bytes, request_of: Any, over: Over,
    image_id: str,
) -> None:  # fmt: skip
    body = request_of(image_id, source.add("image", data), data, hosts=["host-1"])
    async with precache() as service:
        await start_agent("host-1", service.url)
        made = await service.api.post("/v1/distributions", body)
        await over(service.api, made["distribution_id"])
        overview = await service.api.get("/")
        assert image_id in overview
        assert "host-1" in overview
        page = await service.api.get(f"/distributions/{made['distribution_id']}")
        assert "cached" in page
        assert f'value="{len(data)}"' in page
        (host,) = (await service.api.get("/v1/hosts"))["hosts"]
        assert (host["host"], host["images"]) == ("host-1", 1)
        metrics = await service.api.get("/metrics")
        assert f"precache_seed_sent_bytes_total {float(len(data)):.6e}" in metrics


@pytest.mark.parametrize(
    "location",
    ["http://[::1/image", "http://a..b/image", f"http://{'a' * 70}/image", "http://h:99999/image"],
)
async def test_a_location_that_cannot_be_asked_is_an_outcome_and_no_crash(
    precache: Any, over: Over, image_id: str, location: str
) -> None:
    image = {"image_id": image_id, "fetcher": "http", "location": location}
    async with precache() as service:
        made = await service.api.post(
            "/v1/distributions", {"image_id": image_id, "image": image, "hosts": ["host-1"]}
        )
        answer = await over(service.api, made["distribution_id"])
        assert answer["state"] == "error"
        assert answer["reason"].startswith("source.invalid")
        await service.api.get("/readyz")


async def test_a_fetcher_or_lister_that_breaks_takes_nothing_with_it(
    precache: Any, over: Over, image_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("\0")

    monkeypatch.setattr(fetchers.FileFetcher, "open", broken)
    monkeypatch.setattr(listers.GlanceLister, "list", broken)
    image = {"image_id": image_id, "fetcher": "file", "location": "/x"}
    async with precache() as service:
        made = await service.api.post("/v1/distributions", {"image_id": image_id, "image": image})
        answer = await over(service.api, made["distribution_id"])
        assert answer["reason"] == "fetcher.failed: ZeroDivisionError"
        policy = await service.api.post("/v1/policies", {"name": "all", "lister": "glance"})
        ran = await policy_ran(service.api, policy["policy_id"])
        assert ran["last_outcome"] == "failed"
        assert ran["last_detail"] == "lister.failed: ZeroDivisionError"


async def test_what_no_text_can_hold_of_a_fetchers_reason_is_in_no_answer_and_no_metric(
    precache: Any, over: Over, image_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def odd(*_: object) -> None:
        raise SourceError("\ud800.odd\0", "\ud800")

    monkeypatch.setattr(fetchers.FileFetcher, "open", odd)
    image = {"image_id": image_id, "fetcher": "file", "location": "/x"}
    async with precache() as service:
        made = await service.api.post("/v1/distributions", {"image_id": image_id, "image": image})
        answer = await over(service.api, made["distribution_id"])
        assert answer["reason"] == "?.odd: ?"
        assert 'precache_fetches_total{outcome="?.odd"} 1' in await service.api.get("/metrics")


async def test_an_image_that_cannot_be_kept_is_the_policys_outcome(precache: Any) -> None:
    listed = [{"image_id": "huge", "size_bytes": 2**70}, {"image_id": "small", "size_bytes": 1}]
    async with precache() as service:
        policy = await service.api.post(
            "/v1/policies", {"name": "two", "options": {"images": listed}}
        )
        ran = await policy_ran(service.api, policy["policy_id"])
        assert ran["last_outcome"] == "partial"
        assert ran["last_detail"].startswith("2 images, 1 new, 0 moved or withdrawn; huge: ")


async def policy_ran(api: Any, policy_id: str) -> dict[str, Any]:
    async def ran() -> dict[str, Any] | None:
        answer: dict[str, Any] = await api.get(f"/v1/policies/{policy_id}")
        return answer if answer["last_outcome"] else None  # the run began at last_run_at

    found: dict[str, Any] = await testing.eventually(ran)
    return found


@pytest.mark.parametrize("field", ["session_id", "blob_id", "distribution_id"])
@pytest.mark.parametrize("text", ["-" * 36, "0" * 36])
async def test_a_report_with_an_id_that_is_none_is_refused(
    precache: Any, field: str, text: str
) -> None:
    uuid = "5a0e1d0e-0000-4000-8000-000000000001"
    blob = {"distribution_id": uuid, "blob_id": uuid, "state": "cached"}
    report: dict[str, Any] = {"url": "http://a:1", "session_id": uuid, "blobs": [blob]}
    (report if field == "session_id" else blob)[field] = text
    async with precache() as service:
        with pytest.raises(errors.HostlerError) as caught:
            await service.api.put("/v1/hosts/a/report", report)
        assert caught.value.code == "request.invalid"


@pytest.mark.parametrize("value", [b"NaN", b"1e999", b'"\\ud800"'])
async def test_policy_options_that_are_no_json_are_refused(precache: Any, value: bytes) -> None:
    body = b'{"name": "odd", "options": {"x": ' + value + b"}}"
    async with precache() as service, aiohttp.ClientSession() as session:
        headers = {"Content-Type": "application/json"}
        url = f"{service.url}/v1/policies"
        async with session.post(url, data=body, headers=headers) as response:
            assert response.status == 422
