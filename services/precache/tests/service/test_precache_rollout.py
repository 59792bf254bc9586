"""How an image gets onto its hosts: labels, shares, canaries, windows, limits, deadlines, pauses.

The service is real; the hosts are told of by reports, as agents send them.
"""

import html
import uuid
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from hostler_common import errors, testing
from hostler_precache.distribution import rollout_jobs

MIB = 1 << 20


class Cloud:
    """A service with hosts that say what the test makes them say."""

    def __init__(self, api: Any, url: str, source: str) -> None:
        self.api, self.url, self.source = api, url, source
        self.sessions: dict[str, str] = {}

    async def page(self, path: str) -> str:
        """What a browser shows."""
        async with aiohttp.ClientSession() as session, session.get(self.url + path) as response:
            return html.unescape(await response.text())

    async def speak(self, host: str, labels: dict[str, str] | None = None, **blob: Any) -> Any:
        """One report of the host."""
        report = {
            "url": f"http://{host}:8310",
            "session_id": self.sessions.setdefault(host, str(uuid.uuid4())),
            "labels": labels or {},
            "free_bytes": 100 * MIB,
            "link_bytes_per_second": 10 * MIB,
            "blobs": [blob] if blob else [],
        }
        return await self.api.put(f"/v1/hosts/{host}/report", report)

    async def desired(self, host: str) -> list[dict[str, Any]]:
        """What the host should have."""
        answer = await self.api.get("/v1/desired", host=host)
        return list(answer["images"])

    async def end(self, host: str, state: str, **more: Any) -> None:
        """The host has come to an end with all that it should have."""
        for image in await self.desired(host):
            keys = {key: image[key] for key in ("distribution_id", "blob_id")}
            await self.speak(host, state=state, **keys, **more)


@pytest.fixture
def settings() -> dict[str, Any]:
    """Of the service, where a test needs others."""
    return {}


@pytest_asyncio.fixture
async def cloud(
    precache: Any,
    source: Any,
    make_image: Any,
    request_of: Any,
    image_id: str,
    settings: dict[str, Any],
) -> AsyncIterator[Cloud]:
    """Ten hosts in two zones, and an image that is fetched already."""
    data = make_image(2 * MIB)
    async with precache(**settings) as service:
        made = Cloud(service.api, service.url, source.url)
        for number in range(10):
            await made.speak(f"h{number}", {"zone": "a" if number < 6 else "b", "rack": "r1"})
        body = request_of(image_id, source.add("image", data), data, hosts=["nobody"])
        await service.api.post("/v1/distributions", body)

        async def fetched() -> bool:
            answer = await service.api.get(f"/v1/images/{image_id}")
            return bool(answer["state"] == "ready")

        await testing.eventually(fetched)
        yield made


@pytest.fixture
def distribute(cloud: Cloud, image_id: str) -> Callable[..., Any]:
    async def run(**fields: Any) -> dict[str, Any]:
        made = await cloud.api.post("/v1/distributions", {"image_id": image_id, **fields})
        answer: dict[str, Any] = await cloud.api.get(
            f"/v1/distributions/{made['distribution_id']}"
        )
        return answer

    return run


def hosts_of(answer: dict[str, Any], wave: int | None = None) -> list[str]:
    return [h["host"] for h in answer["progress"] if wave is None or h["wave"] == wave]


async def test_hosts_are_chosen_by_their_labels_and_later_ones_join(
    cloud: Cloud, distribute: Any
) -> None:
    answer = await distribute(labels={"zone": "b"})
    assert hosts_of(answer) == ["h6", "h7", "h8", "h9"]
    await cloud.speak("h10", {"zone": "b"})
    await cloud.speak("h11", {"zone": "a"})
    assert len(await cloud.desired("h10")) == 1
    assert await cloud.desired("h11") == []
    again = await cloud.api.get(f"/v1/distributions/{answer['distribution_id']}")
    assert hosts_of(again) == ["h10", "h6", "h7", "h8", "h9"]


async def test_a_share_of_the_hosts_is_rounded_up_and_kept_as_hosts_join(
    cloud: Cloud, distribute: Any
) -> None:
    answer = await distribute(percent=25)
    assert len(hosts_of(answer)) == 3
    for number in range(10, 20):
        await cloud.speak(f"h{number}")
        await cloud.desired(f"h{number}")
    again = await cloud.api.get(f"/v1/distributions/{answer['distribution_id']}")
    assert len(hosts_of(again)) == 5


async def test_every_host_knows_its_neighbours_before_the_first_report(
    cloud: Cloud, distribute: Any
) -> None:
    await distribute()
    for host in ("h0", "h9"):
        (image,) = await cloud.desired(host)
        names = {one["host"] for one in image["neighbours"]}
        assert names == {f"h{n}" for n in range(10)} - {host}
        assert all(one["in_rack"] for one in image["neighbours"])


async def test_canaries_go_first_and_the_others_follow_when_none_has_failed(
    cloud: Cloud, distribute: Any
) -> None:
    answer = await distribute(canary_percent=20)
    canaries = hosts_of(answer, wave=0)
    others = hosts_of(answer, wave=1)
    assert (len(canaries), len(others)) == (2, 8)
    assert await cloud.desired(others[0]) == []
    await cloud.end(canaries[0], "cached")
    assert await cloud.desired(others[0]) == []
    await cloud.end(canaries[1], "existing")

    async def goes_on() -> bool:
        return len(await cloud.desired(others[0])) == 1

    await testing.eventually(goes_on)


async def test_a_failed_canary_stops_the_others_until_somebody_resumes(
    cloud: Cloud, distribute: Any
) -> None:
    answer = await distribute(canary_percent=20)
    path = f"/v1/distributions/{answer['distribution_id']}"
    one, other = hosts_of(answer, wave=0)
    await cloud.end(one, "cached")
    await cloud.end(other, "error", reason="storage.no_space: 0 bytes are free")

    async def stopped() -> dict[str, Any] | None:
        found: dict[str, Any] = await cloud.api.get(path)
        return found if found["state"] == "paused" else None

    found = await testing.eventually(stopped)
    assert found["paused_reason"].startswith("canary.failed: 1 of the first 2")
    rest = hosts_of(answer, wave=1)[0]
    assert await cloud.desired(rest) == []
    resumed = await cloud.api.post(f"{path}/resume", {})
    assert (resumed["state"], resumed["wave"]) == ("distributing", 1)
    assert len(await cloud.desired(rest)) == 1


IMPATIENT = {"canary_silent_seconds": 1.0}


@pytest.mark.parametrize("settings", [IMPATIENT])
async def test_a_canary_that_is_silent_is_skipped_and_the_others_judge(
    cloud: Cloud, distribute: Any, hostler_inbox: Any
) -> None:
    answer = await distribute(canary_percent=20)
    alive, dead = hosts_of(answer, wave=0)
    await cloud.end(alive, "cached")

    async def goes_on() -> dict[str, Any] | None:
        found: dict[str, Any] = await cloud.api.get(
            f"/v1/distributions/{answer['distribution_id']}"
        )
        return found if found["wave"] == 1 else None

    found = await testing.eventually(goes_on)
    (skipped,) = [host for host in found["progress"] if host["state"] == "skipped"]
    assert (skipped["host"], skipped["reason"]) == (dead, "host.silent: not heard of for 1 s")
    told = await hostler_inbox("aggregate.cache_images.progress", count=2)
    ends = [one["payload"]["nova_object.data"] for one in told]
    assert [(one["host"], one["index"]) for one in ends] == [(alive, 1), (dead, 2)]
    # it comes back, and is told what it should have as any other
    await cloud.end(dead, "cached")
    found = await cloud.api.get(f"/v1/distributions/{answer['distribution_id']}")
    assert found["host_states"] == {"cached": 2, "waiting": 8}


@pytest.mark.parametrize("settings", [IMPATIENT])
async def test_without_a_canary_that_is_heard_it_stops_and_says_why(
    cloud: Cloud, distribute: Any, hostler_inbox: Any
) -> None:
    answer = await distribute(canary_percent=20, hosts=["ghost", "h1"])
    path = f"/v1/distributions/{answer['distribution_id']}"

    async def stopped() -> dict[str, Any] | None:
        found: dict[str, Any] = await cloud.api.get(path)
        return found if found["state"] == "paused" else None

    found = await testing.eventually(stopped)
    reason = "canary.none_left: none of the first 1 hosts got it: 1 skipped"
    assert found["paused_reason"] == reason
    (event,) = await hostler_inbox("precache.distribution.paused")
    assert event["reason"] == reason
    page = await cloud.page(f"/distributions/{answer['distribution_id']}")
    assert f"paused: {reason}" in page
    assert (await cloud.api.post(f"{path}/resume", {}))["wave"] == 1


@pytest.mark.parametrize("settings", [IMPATIENT])
async def test_where_all_hosts_were_canaries_it_is_done_when_the_last_is_skipped(
    cloud: Cloud, distribute: Any, over: Any, hostler_inbox: Any
) -> None:
    answer = await distribute(canary_percent=99, hosts=["ghost", "h1"])
    assert len(hosts_of(answer, wave=0)) == 2
    await cloud.end("h1", "existing")
    found = await over(cloud.api, answer["distribution_id"])
    assert (found["state"], found["host_states"]) == ("done", {"existing": 1, "skipped": 1})
    (event,) = await hostler_inbox("precache.distribution.finished")
    assert event["hosts"] == {"existing": 1, "skipped": 1}


async def test_a_paused_distribution_tells_its_hosts_to_wait_and_then_to_go_on(
    cloud: Cloud, distribute: Any
) -> None:
    answer = await distribute(hosts=["h1"])
    path = f"/v1/distributions/{answer['distribution_id']}"
    (image,) = await cloud.desired("h1")
    keys = {key: image[key] for key in ("distribution_id", "blob_id")}
    assert not (await cloud.speak("h1", state="transferring", **keys))["look_again"]
    assert (await cloud.api.post(f"{path}/pause", {}))["state"] == "paused"
    assert (await cloud.speak("h1", state="transferring", **keys))["look_again"]
    assert [one["paused"] for one in await cloud.desired("h1")] == [True]
    await cloud.api.post(f"{path}/resume", {})
    assert not (await cloud.speak("h1", state="transferring", **keys))["look_again"]
    assert [one["paused"] for one in await cloud.desired("h1")] == [False]
    await cloud.end("h1", "cached")
    with pytest.raises(errors.Conflict):
        await cloud.api.post(f"{path}/pause", {})


async def test_a_host_that_should_not_have_an_image_is_nobodys_neighbour_and_told_to_look(
    cloud: Cloud, distribute: Any
) -> None:
    await distribute(hosts=["h1", "h2"], canary_percent=50)
    (first,) = [host for host in ("h1", "h2") if await cloud.desired(host)]
    (image,) = await cloud.desired(first)
    keys = {key: image[key] for key in ("distribution_id", "blob_id")}
    others = [host for host in ("h1", "h2", "h9", "h99") if host != first]  # its turn comes later
    for host in others:
        told = await cloud.speak(host, state="transferring", **keys)
        assert told == {"swarms": {}, "look_again": True}
    told = await cloud.speak(first, state="transferring", **keys)
    assert not told["look_again"]
    (image,) = await cloud.desired(first)
    assert image["neighbours"] == []


async def test_outside_its_windows_a_distribution_waits(cloud: Cloud, distribute: Any) -> None:
    later = datetime.now(UTC) + timedelta(hours=3)
    window = {
        "start": later.strftime("%H:%M"),
        "stop": (later + timedelta(hours=1)).strftime("%H:%M"),
    }
    answer = await distribute(hosts=["h1"], windows=[window])
    path = f"/v1/distributions/{answer['distribution_id']}"
    assert not answer["is_open"]
    assert [one["paused"] for one in await cloud.desired("h1")] == [True]
    changed = await cloud.api.call("PATCH", path, body={"windows": []})
    assert changed["is_open"]
    assert [one["paused"] for one in await cloud.desired("h1")] == [False]


async def test_a_window_opens_and_closes_by_itself(
    cloud: Cloud, distribute: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begins = datetime.now(UTC) + timedelta(hours=3)
    window = {
        "start": begins.strftime("%H:%M"),
        "stop": (begins + timedelta(hours=1)).strftime("%H:%M"),
    }
    await distribute(hosts=["h1"], windows=[window])
    (image,) = await cloud.desired("h1")
    keys = {key: image[key] for key in ("distribution_id", "blob_id")}
    assert image["paused"]
    for hours, is_paused in ((3.5, False), (4.5, True)):

        class Later(datetime):
            ahead = timedelta(hours=hours)

            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return datetime.now(tz) + cls.ahead

        monkeypatch.setattr(rollout_jobs, "datetime", Later)

        async def is_so(expected: bool = is_paused) -> bool:
            (image,) = await cloud.desired("h1")
            return bool(image["paused"] is expected)

        await testing.eventually(is_so)
        told = await cloud.speak("h1", state="transferring", **keys)
        assert told["look_again"] is is_paused


async def test_bytes_are_measured_by_where_they_came_from_and_transfers_by_their_bound(
    cloud: Cloud, distribute: Any
) -> None:
    await distribute(hosts=["h1"])
    await cloud.end("h1", "transferring")
    await cloud.end(
        "h1", "cached", bytes_done=2 * MIB, bytes_from_seed=1000, bytes_from_peers=700,
        bytes_from_rack=300, bytes_wasted=7,
    )  # fmt: skip

    async def all_is_measured() -> bool:
        metrics = (await cloud.page("/metrics")).splitlines()
        return not {
            "precache_fetched_bytes_total 2.097152e+06",
            'precache_moved_bytes{source="seed"} 1000.0',
            'precache_moved_bytes{source="rack"} 300.0',
            'precache_moved_bytes{source="outside"} 400.0',
            'precache_moved_bytes{source="wasted"} 7.0',
            "precache_distribution_over_bound_count 1.0",
        } - set(metrics)

    await testing.eventually(all_is_measured)


async def test_a_limit_of_all_hosts_is_shared_by_those_that_still_move(
    cloud: Cloud, distribute: Any
) -> None:
    answer = await distribute(
        hosts=["h1", "h2", "h3", "h4"],
        total_bytes_per_second=4 * MIB,
        host_bytes_per_second=3 * MIB,
    )
    (image,) = await cloud.desired("h1")
    assert image["limit_bytes_per_second"] == MIB
    for host in ("h2", "h3", "h4"):
        await cloud.end(host, "cached")

    async def has_all() -> bool:
        (image,) = await cloud.desired("h1")
        return bool(image["limit_bytes_per_second"] == 3 * MIB)

    await testing.eventually(has_all)
    changed = await cloud.api.call(
        "PATCH",
        f"/v1/distributions/{answer['distribution_id']}",
        body={"host_bytes_per_second": None, "total_bytes_per_second": None},
    )
    assert changed["rollout"]["host_bytes_per_second"] is None
    (image,) = await cloud.desired("h1")
    assert image["limit_bytes_per_second"] is None


@pytest.mark.parametrize("settings", [{"cluster_bytes_per_second": 6 * MIB}])
async def test_what_all_distributions_may_move_together_is_shared_by_those_that_move(
    cloud: Cloud, distribute: Any, image_id: str
) -> None:
    async def limits(**expected: int) -> None:
        async def are_these() -> bool:
            found = {}
            for host in expected:
                (image,) = await cloud.desired(host)
                found[host] = image["limit_bytes_per_second"]
            return found == expected

        await testing.eventually(are_these)

    body = {"image_id": image_id, "hosts": ["h1", "h2"]}
    plan = await cloud.api.post("/v1/plans", body)
    assert (plan["limit"], plan["cluster_bytes_per_second"]) == (
        "the cluster's bandwidth",
        6 * MIB,
    )
    one = await distribute(hosts=["h1", "h2"])
    assert one["estimate"]["limit"] == "the cluster's bandwidth"
    page = await cloud.page(f"/distributions/{one['distribution_id']}")
    assert "At most 6.0 MiB/s of all distributions together." in page
    await limits(h1=3 * MIB, h2=3 * MIB)
    other = await distribute(hosts=["h3"])
    await limits(h1=3 * MIB // 2, h2=3 * MIB // 2, h3=3 * MIB)
    path = f"/v1/distributions/{other['distribution_id']}"
    await cloud.api.post(f"{path}/pause", {})
    await limits(h1=3 * MIB)
    await cloud.api.post(f"{path}/resume", {})
    await limits(h1=3 * MIB // 2, h3=3 * MIB)
    # what one leaves because of its own limit is for the others
    await cloud.api.call("PATCH", path, body={"total_bytes_per_second": MIB})
    await limits(h1=5 * MIB // 2, h3=MIB)
    await cloud.end("h3", "cached")
    await limits(h1=3 * MIB)
    await cloud.end("h2", "cached")
    await limits(h1=6 * MIB)


@pytest.mark.parametrize("settings", [{"cluster_bytes_per_second": 6 * MIB}])
async def test_a_host_that_gets_one_image_takes_no_share_of_another_that_waits_its_turn_there(
    cloud: Cloud, distribute: Any, request_of: Any, make_image: Any, source: Any
) -> None:
    data = make_image(MIB, seed=2)
    other_id = str(uuid.uuid4())
    body = request_of(other_id, source.add("other", data), data, hosts=["h1"])
    await cloud.api.post("/v1/distributions", body)
    await distribute(hosts=["h1"])

    async def both() -> bool:
        return len(await cloud.desired("h1")) == 2

    await testing.eventually(both)
    first, second = await cloud.desired("h1")
    keys = {key: first[key] for key in ("distribution_id", "blob_id")}
    await cloud.speak("h1", state="transferring", **keys)

    async def has_all() -> bool:
        images = {one["blob_id"]: one for one in await cloud.desired("h1")}
        return bool(images[first["blob_id"]]["limit_bytes_per_second"] == 6 * MIB)

    await testing.eventually(has_all)
    # it may begin with its part, and has its share with its first report
    (waiting,) = [o for o in await cloud.desired("h1") if o["blob_id"] == second["blob_id"]]
    assert waiting["limit_bytes_per_second"] == 3 * MIB


async def test_what_a_policy_could_not_fetch_says_how_often_why_and_when_it_is_tried_again(
    cloud: Cloud,
) -> None:
    image = {"image_id": "gone", "fetcher": "http", "location": f"{cloud.source}/gone"}
    policy = {"name": "p", "lister": "static", "options": {"images": [image]}, "hosts": ["h1"]}
    made = await cloud.api.post("/v1/policies", {**policy, "every_seconds": 3600})

    async def failed(times: int = 1) -> dict[str, Any] | None:
        found = (await cloud.api.get("/v1/distributions", image_id="gone"))["distributions"]
        assert len(found) <= 1
        return found[0] if found and found[0]["failures"] == times else None

    first = await testing.eventually(failed)
    assert first["state"] == "error"
    assert first["reason"] == first["last_failure"]
    assert first["retry_at"] > first["finished_at"]
    page = await cloud.page(f"/distributions/{first['distribution_id']}")
    assert "Not fetched 1 time in a row: tried again by its policy from " in page
    await cloud.api.post(f"/v1/policies/{made['policy_id']}/run", {})

    async def again() -> dict[str, Any] | None:
        found = await failed()
        return found if found and found["finished_at"] > first["finished_at"] else None

    second = await testing.eventually(again)
    assert second["distribution_id"] == first["distribution_id"]


async def test_a_deadline_that_has_passed_is_told_once(
    cloud: Cloud, distribute: Any, hostler_inbox: Any
) -> None:
    answer = await distribute(
        hosts=["h1", "h2"],
        deadline_at=(datetime.now(UTC) - timedelta(seconds=1)).isoformat(),
        deadline_percent=50,
    )
    path = f"/v1/distributions/{answer['distribution_id']}"

    async def missed() -> bool:
        found = await cloud.api.get(path)
        return found["deadline_met"] is False

    await testing.eventually(missed)
    (event,) = await hostler_inbox("precache.distribution.late")
    assert event["hosts"] == {"waiting": 2}


async def test_a_deadline_is_met_by_the_share_that_it_asks_for(
    cloud: Cloud, distribute: Any
) -> None:
    answer = await distribute(
        hosts=["h1", "h2"],
        deadline_at=(datetime.now(UTC) + timedelta(hours=1)).isoformat(),
        deadline_percent=50,
    )
    await cloud.end("h1", "cached")

    async def met() -> bool:
        found = await cloud.api.get(f"/v1/distributions/{answer['distribution_id']}")
        return found["deadline_met"] is True

    await testing.eventually(met)


async def test_a_plan_names_the_bound_and_what_is_in_the_way_and_does_nothing(
    cloud: Cloud, image_id: str
) -> None:
    body = {
        "image_id": image_id,
        "hosts": ["h1", "h2", "ghost"],
        "canary_percent": 34,
        "deadline_at": (datetime.now(UTC) - timedelta(hours=1)).isoformat(),
    }
    before = await cloud.api.get("/v1/distributions")
    plan = await cloud.api.post("/v1/plans", body)
    assert plan["host_count"] == 3
    assert plan["canary_count"] == 2
    assert plan["unknown_hosts"] == ["ghost"]
    assert plan["full_hosts"] == []
    assert plan["bound_seconds"] == pytest.approx(0.2)
    assert plan["limit"] == "the slowest host's downlink"
    assert plan["slowest_host"] == "h1"
    assert plan["is_in_time"] is False
    assert await cloud.api.get("/v1/distributions") == before


async def test_a_distribution_tells_how_far_it_is_from_the_bound(
    cloud: Cloud, distribute: Any
) -> None:
    answer = await distribute(hosts=["h1"])
    assert answer["estimate"]["bound_seconds"] == pytest.approx(0.2)
    assert answer["estimate"]["over_bound"] is None
    await cloud.end("h1", "transferring", bytes_done=MIB, coverage="f" * 32 + "0" * 32)
    moving = await cloud.api.get(f"/v1/distributions/{answer['distribution_id']}")
    assert moving["progress"][0]["coverage"] == "f" * 32 + "0" * 32
    assert moving["estimate"]["over_bound"] > 0
    await cloud.end("h1", "cached", bytes_done=2 * MIB)
    done = await cloud.api.get(f"/v1/distributions/{answer['distribution_id']}")
    assert done["estimate"]["remaining_seconds"] == 0
    assert done["estimate"]["over_bound"] > 0


async def test_a_deleted_image_is_wanted_nowhere_and_its_hosts_are_told(
    cloud: Cloud, distribute: Any, image_id: str
) -> None:
    await distribute(hosts=["h1"])
    await cloud.end("h1", "cached")
    await cloud.api.delete(f"/v1/images/{image_id}")
    answer = await cloud.api.get("/v1/desired", host="h1")
    assert answer == {"images": [], "deleted_image_ids": [image_id]}
    assert (await cloud.api.get("/v1/desired", host="h2"))["deleted_image_ids"] == []


async def test_a_cancelled_distribution_unpins_what_was_placed(
    cloud: Cloud, distribute: Any
) -> None:
    answer = await distribute(hosts=["h1"])
    await cloud.end("h1", "cached")
    assert len(await cloud.desired("h1")) == 1
    await cloud.api.delete(f"/v1/distributions/{answer['distribution_id']}")
    assert await cloud.desired("h1") == []


async def test_every_host_that_ends_is_told_in_novas_words(
    cloud: Cloud, distribute: Any, hostler_inbox: Any, image_id: str
) -> None:
    answer = await distribute(hosts=["h2", "h1"])
    of_all = {"uuid": answer["distribution_id"], "name": image_id, "hosts": ["h1", "h2"]}

    async def start() -> dict[str, Any] | None:
        told: list[dict[str, Any]] = await hostler_inbox("aggregate.cache_images.start")
        of_it = {"id": 0, "metadata": {}, **of_all}  # and not the one it was fetched for
        return next((n for n in told if n["payload"]["nova_object.data"] == of_it), None)

    started = await testing.eventually(start)
    assert started["event_type"] == "aggregate.cache_images.start"
    await cloud.end("h1", "cached")
    await cloud.end("h2", "error", reason="storage.no_space")
    (ended,) = await hostler_inbox("aggregate.cache_images.end")
    started["payload"]["nova_object.data"]["metadata"] = {"state": "done"}
    assert ended == {**started, "event_type": "aggregate.cache_images.end"}
    first, second = await hostler_inbox("aggregate.cache_images.progress", count=2)
    assert first["event_type"] == "aggregate.cache_images.progress"
    assert first["payload"]["nova_object.name"] == "AggregateCachePayload"
    data = first["payload"]["nova_object.data"]
    assert data["uuid"] == answer["distribution_id"]
    assert (data["host"], data["index"], data["total"]) == ("h1", 1, 2)
    assert (data["images_cached"], data["images_failed"]) == ([image_id], [])
    data = second["payload"]["nova_object.data"]
    assert (data["images_cached"], data["images_failed"]) == ([], [image_id])


async def test_whoever_waits_for_the_end_of_a_distribution_hears_that_it_was_cancelled(
    cloud: Cloud, distribute: Any, hostler_inbox: Any
) -> None:
    answer = await distribute(hosts=["h1"])
    await cloud.api.delete(f"/v1/distributions/{answer['distribution_id']}")
    (ended,) = await hostler_inbox("aggregate.cache_images.end")
    data = ended["payload"]["nova_object.data"]
    assert (data["uuid"], data["metadata"]) == (answer["distribution_id"], {"state": "cancelled"})


@pytest.mark.parametrize(
    "fields",
    [
        {"hosts": ["h1"], "labels": {"zone": "a"}},
        {"percent": 0},
        {"percent": 101},
        {"canary_percent": 100},
        {"total_bytes_per_second": 0},
        {"deadline_at": "2026-11-21T02:00:00"},
        {"windows": [{"start": "22:00", "stop": "06:00", "time_zone": "Mars/Olympus"}]},
        {"windows": [{"start": "22:00", "stop": "06:00", "days": ["someday"]}]},
        {"windows": [{"start": "22:00+01:00", "stop": "06:00"}]},
        {"windows": [{"start": "25:00", "stop": "06:00"}]},
        {"labels": {"zone": "a\0"}},
        {"labels": {"": "a"}},
    ],
)
async def test_what_cannot_be_meant_is_refused(
    cloud: Cloud, image_id: str, fields: dict[str, Any]
) -> None:
    with pytest.raises(errors.Invalid):
        await cloud.api.post("/v1/distributions", {"image_id": image_id, **fields})


async def test_one_report_that_cannot_be_stored_does_not_keep_the_others(cloud: Cloud) -> None:
    await cloud.speak("h1", state="error", reason="a\0b", distribution_id=str(uuid.uuid4()),
                      blob_id=str(uuid.uuid4()))  # fmt: skip
    hosts = await cloud.api.get("/v1/hosts")
    assert len(hosts["hosts"]) == 10
