"""Claims through the HTTP API, on a real broker and a real database."""

import asyncio
import uuid
from typing import Any

import asyncpg
import pytest

from hostler_capacity import claim_store
from hostler_common import errors
from hostler_common.testing import eventually

SMALL_MB = 2048 + 20
"""A m1.small on Xen: xapi takes 2 + 17 + 1 MB for it."""


async def test_a_claim_takes_memory_and_overhead_and_says_which_model_priced_it(
    capacity: Any, node: Any
) -> None:
    await capacity.flavor()
    await capacity.reporter.report(node())
    await capacity.shows("hv1", free=8192)

    claim = await capacity.claim(flavor="m1.small")

    assert claim["state"] == "held"
    assert claim["resources"] == {"memory_mb": SMALL_MB, "vcpus": 1, "disk_gb": 20}
    assert (claim["overhead_mb"], claim["overhead_model"]) == (20, "xapi-exact-2026")
    assert claim["overhead_model_version"] == 1
    await capacity.shows("hv1", claimed=SMALL_MB, free=8192 - SMALL_MB)


async def test_as_many_are_granted_as_fit_says_and_no_more(capacity: Any, node: Any) -> None:
    await capacity.flavor()
    await capacity.reporter.report(node())
    await capacity.shows("hv1", free=8192)
    fits = (await capacity.api.get("/v1/fit", flavor="m1.small"))["total"]
    assert fits == 8192 // SMALL_MB == 3

    for _ in range(fits):
        await capacity.claim(flavor="m1.small")
    with pytest.raises(errors.Conflict) as refused:
        await capacity.claim(flavor="m1.small")

    assert refused.value.code == "capacity.claim.no_room"
    assert refused.value.fields["short"] == [
        {
            "host": "hv1",
            "hypervisor_hostname": "hv1",
            "blocker": None,
            "resource": "memory_mb",
            "free": 8192 - 3 * SMALL_MB,
            "need": SMALL_MB,
            "short_by": 4 * SMALL_MB - 8192,
        }
    ]


async def test_a_fit_count_can_be_asked_to_be_of_this_moment(capacity: Any, node: Any) -> None:
    await capacity.flavor()
    await capacity.reporter.report(node())
    await capacity.shows("hv1", free=8192)
    for left in (2, 1, 0):
        await capacity.claim(flavor="m1.small")
        answer = await capacity.api.get("/v1/fit", flavor="m1.small", max_age_seconds=0)
        assert answer["total"] == left


async def test_fit_says_why_not_one_more(capacity: Any, node: Any) -> None:
    await capacity.flavor()
    await capacity.reporter.report(node())
    await capacity.shows("hv1", free=8192)
    await capacity.reporter.report(node("hv2", disabled=True), host="hv2")
    await capacity.shows("hv2", free=8192)

    answer = await capacity.api.get("/v1/fit", flavor="m1.small")

    first, second = answer["hosts"]
    assert (first["fits"], first["blocker"]) == (3, None)
    assert first["binding"] == {
        "resource": "memory_mb",
        "free": 8192,
        "need": SMALL_MB,
        "short_by": 4 * SMALL_MB - 8192,
    }
    assert (second["fits"], second["blocker"], second["binding"]) == (0, "disabled", None)


async def test_a_claim_that_nobody_confirms_expires_and_gives_its_room_back(
    capacity: Any, node: Any
) -> None:
    await capacity.flavor()
    await capacity.reporter.report(node())
    await capacity.shows("hv1", free=8192)
    claim = await capacity.claim(flavor="m1.small", ttl_seconds=1)
    await capacity.shows("hv1", claimed=SMALL_MB)

    await capacity.shows("hv1", claimed=0, free=8192)

    assert (await capacity.api.get(f"/v1/claims/{claim['id']}"))["state"] == "expired"
    with pytest.raises(errors.Conflict) as refused:
        await capacity.api.post(f"/v1/claims/{claim['id']}/confirm")
    assert refused.value.code == "capacity.claim.not_held"


async def test_a_confirmed_claim_outlives_its_ttl(capacity: Any, node: Any) -> None:
    await capacity.flavor()
    await capacity.reporter.report(node())
    await capacity.shows("hv1", free=8192)
    kept = await capacity.claim(flavor="m1.small", ttl_seconds=1)
    confirmed = await capacity.api.post(f"/v1/claims/{kept['id']}/confirm")
    assert confirmed["state"] == "confirmed"
    again = await capacity.api.post(f"/v1/claims/{kept['id']}/confirm")
    assert again == confirmed

    other = await capacity.claim(flavor="m1.small", ttl_seconds=1)

    async def other_expired() -> bool:
        shown = await capacity.api.get(f"/v1/claims/{other['id']}")
        return bool(shown["state"] == "expired")

    await eventually(other_expired)
    assert (await capacity.api.get(f"/v1/claims/{kept['id']}"))["state"] == "confirmed"
    await capacity.shows("hv1", claimed=SMALL_MB)


async def test_a_released_claim_gives_back_exactly_what_it_took_once(
    capacity: Any, node: Any
) -> None:
    await capacity.flavor()
    await capacity.reporter.report(node())
    await capacity.shows("hv1", free=8192)
    claim = await capacity.claim(flavor="m1.small")
    await capacity.claim(flavor="m1.small")
    await capacity.api.put(
        "/v1/flavors/m1.small", {"memory_mb": 4096, "vcpus": 2, "generation": 1}
    )

    first = await capacity.api.delete(f"/v1/claims/{claim['id']}")
    second = await capacity.api.delete(f"/v1/claims/{claim['id']}")

    assert first["state"] == "released"
    assert second == first
    await capacity.shows("hv1", claimed=SMALL_MB)


async def test_the_same_key_sent_forty_times_at_once_is_one_claim(
    capacity: Any, node: Any, database_url: str
) -> None:
    await capacity.flavor()
    await capacity.reporter.report(node())
    await capacity.shows("hv1", free=8192)
    consumer = str(uuid.uuid4())

    replies = await asyncio.gather(
        *(capacity.claim(flavor="m1.small", consumer_id=consumer, key="boot-1") for _ in range(40))
    )

    assert len({reply["id"] for reply in replies}) == 1
    await capacity.shows("hv1", claimed=SMALL_MB)
    database = await asyncpg.connect(database_url)
    try:
        assert await database.fetchval("SELECT count(*) FROM capacity.claim") == 1
    finally:
        await database.close()


async def test_claims_that_are_short_of_different_things_take_all_or_nothing(
    capacity: Any, node: Any, database_url: str
) -> None:
    await capacity.reporter.report(node(memory_mb=10_100, local_gb=10_000))
    await capacity.shows("hv1", free=10_100)
    shapes = [
        {"memory_mb": 990, "vcpus": 1, "disk_gb": 1},
        {"memory_mb": 1, "vcpus": 1, "disk_gb": 990},
    ]

    replies = await asyncio.gather(
        *(capacity.claim(resources=shapes[n % 2]) for n in range(80)), return_exceptions=True
    )

    granted = [reply for reply in replies if isinstance(reply, dict)]
    refused = [reply for reply in replies if not isinstance(reply, dict)]
    assert {getattr(error, "code", error) for error in refused} == {"capacity.claim.no_room"}
    for name, limit in (("memory_mb", 10_100), ("disk_gb", 10_000)):
        assert sum(reply["resources"][name] for reply in granted) <= limit
    database = await asyncpg.connect(database_url, server_settings={"search_path": "capacity"})
    try:
        assert await claim_store.imbalances(database) == []
    finally:
        await database.close()


async def test_a_key_of_another_request_is_refused(capacity: Any, node: Any) -> None:
    await capacity.flavor()
    await capacity.reporter.report(node())
    await capacity.shows("hv1", free=8192)
    await capacity.claim(flavor="m1.small", key="boot-1")

    with pytest.raises(errors.Conflict) as refused:
        await capacity.claim(flavor="m1.small", ttl_seconds=5, key="boot-1")

    assert refused.value.code == "request.idempotency_key_reused"


async def test_a_claim_is_replayed_though_its_flavor_is_gone(capacity: Any, node: Any) -> None:
    await capacity.reporter.report(node())
    await capacity.shows("hv1", limit=8192)
    await capacity.flavor()
    granted = await capacity.claim(key="k", flavor="m1.small")
    await capacity.api.delete("/v1/flavors/m1.small")
    assert await capacity.claim(key="k", flavor="m1.small") == granted
    with pytest.raises(errors.NotFound):
        await capacity.claim(key="another", flavor="m1.small")


async def test_a_refused_claim_does_not_use_up_its_key(capacity: Any, node: Any) -> None:
    await capacity.flavor()
    await capacity.reporter.report(node(memory_mb=1024))
    await capacity.shows("hv1", free=1024)
    with pytest.raises(errors.Conflict):
        await capacity.claim(flavor="m1.small", key="boot-1")

    await capacity.reporter.report(node())
    await capacity.shows("hv1", free=8192)

    assert (await capacity.claim(flavor="m1.small", key="boot-1"))["state"] == "held"


async def test_a_claim_may_name_its_host_and_is_refused_there_alone(
    capacity: Any, node: Any
) -> None:
    await capacity.flavor()
    await capacity.reporter.report(node("hv1", memory_mb=1024))
    await capacity.reporter.report(node("hv2"), host="hv2")
    await capacity.shows("hv1", free=1024)
    await capacity.shows("hv2", free=8192)

    assert (await capacity.claim(flavor="m1.small", host="hv2"))["host"] == "hv2"
    with pytest.raises(errors.Conflict) as refused:
        await capacity.claim(flavor="m1.small", host="hv1")
    short = refused.value.fields["short"]
    assert isinstance(short, list)
    assert [each["host"] for each in short] == ["hv1"]
    with pytest.raises(errors.NotFound) as unknown:
        await capacity.claim(flavor="m1.small", host="nowhere")
    assert unknown.value.code == "capacity.node.not_found"


async def test_disk_operations_are_claimed_like_memory(capacity: Any, node: Any) -> None:
    await capacity.reporter.report(node(disk_iops=1000))
    await capacity.shows("hv1", free=8192)
    wish = {"memory_mb": 10, "vcpus": 1, "extra": {"disk_iops": 600}}

    await capacity.claim(resources=wish)
    with pytest.raises(errors.Conflict) as refused:
        await capacity.claim(resources=wish)

    short = refused.value.fields["short"]
    assert isinstance(short, list)
    assert (short[0]["resource"], short[0]["short_by"]) == ("disk_iops", 200)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"flavor": "a", "resources": {"memory_mb": 1, "vcpus": 1}},
        {"resources": {"memory_mb": 0, "vcpus": 1}},
        {"resources": {"memory_mb": 1, "vcpus": 1, "extra": {"memory_mb": 1}}},
        {"flavor": "m1.small", "ttl_seconds": 10**9},
        {"flavor": "m1.small", "hypervisor_hostname": "hv1"},
        {"flavor": "m1.small", "surprise": 1},
    ],
)
async def test_a_request_that_cannot_be_meant_is_refused_with_a_code(
    capacity: Any, body: dict[str, Any]
) -> None:
    await capacity.flavor()
    with pytest.raises(errors.Invalid) as refused:
        await capacity.claim(**body)
    assert refused.value.code == "request.invalid"


async def test_claims_are_listed_by_state_and_paged(capacity: Any, node: Any) -> None:
    await capacity.flavor("tiny", memory_mb=64, disk_gb=0)
    await capacity.reporter.report(node())
    await capacity.shows("hv1", free=8192)
    ids = [(await capacity.claim(flavor="tiny"))["id"] for _ in range(3)]
    await capacity.api.delete(f"/v1/claims/{ids[1]}")

    first = await capacity.api.get("/v1/claims", limit=2)
    rest = await capacity.api.get("/v1/claims", limit=2, marker=first["next_marker"])
    held = await capacity.api.get("/v1/claims", state="held")

    assert [each["id"] for each in (*first["claims"], *rest["claims"])] == ids
    assert rest["next_marker"] is None
    assert [each["id"] for each in held["claims"]] == [ids[0], ids[2]]


async def test_changing_a_flavor_needs_its_generation(capacity: Any) -> None:
    await capacity.flavor()
    body = {"memory_mb": 4096, "vcpus": 2, "generation": 1}
    assert (await capacity.api.put("/v1/flavors/m1.small", body))["generation"] == 2

    with pytest.raises(errors.Conflict) as late:
        await capacity.api.put("/v1/flavors/m1.small", body)
    with pytest.raises(errors.Conflict) as twice:
        await capacity.flavor()
    await capacity.api.delete("/v1/flavors/m1.small")
    with pytest.raises(errors.NotFound) as gone:
        await capacity.api.get("/v1/fit", flavor="m1.small")

    assert late.value.code == "capacity.flavor.changed"
    assert twice.value.code == "capacity.flavor.exists"
    assert gone.value.code == "capacity.flavor.not_found"
