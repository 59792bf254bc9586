"""Host reports on a real broker and a real database: parts, order, identity, guests, staleness."""

import json
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from hostler_capacity import app
from hostler_capacity.settings import Settings
from hostler_common import bus as bus_module
from hostler_common import errors, hosts
from hostler_common.testing import RunService, eventually, open_bus

SMALL_MB = 2048 + 20
MACHINE = str(uuid.UUID(int=77))


def metal(name: str = "node-1", **values: Any) -> hosts.NodeRecord:
    return hosts.NodeRecord.model_validate(
        {
            "hypervisor_hostname": name,
            "node_uuid": MACHINE,
            "hypervisor_type": "ironic",
            "memory_mb": 65536,
            "vcpus": 32,
            "local_gb": 900,
            "state": "available",
            **values,
        }
    )


def unusual(reported_at: str = "2026-01-01T00:00:00Z", **values: Any) -> bytes:
    """A report on one node, on the wire."""
    node = metal().model_dump(mode="json") | values
    report = {"host": "h", "report_id": MACHINE, "reported_at": reported_at, "nodes": [node]}
    return json.dumps(report).encode()


async def parts_seen(capacity: Any, admission: str, count: int) -> None:
    """Wait until that many parts were admitted that way."""

    async def holds() -> bool:
        text = await capacity.api.get("/metrics")
        name = f'hostler_capacity_report_parts_total{{admission="{admission}"}}'
        found = [line for line in text.splitlines() if line.startswith(name)]
        return bool(found) and float(found[0].split()[-1]) == count

    await eventually(holds)


async def test_an_older_report_and_a_duplicate_change_nothing(capacity: Any, node: Any) -> None:
    old = capacity.reporter.parts(node(memory_mb=1000))
    new = capacity.reporter.parts(node(memory_mb=2000))
    await capacity.reporter.send(*new)
    await capacity.shows("hv1", limit=2000)

    await capacity.reporter.send(*old, *new, *old)

    await parts_seen(capacity, "outdated", 2)
    await parts_seen(capacity, "duplicate", 1)
    await capacity.settled()
    await capacity.shows("hv1", limit=2000)


async def test_only_a_whole_report_marks_nodes_absent(capacity: Any) -> None:
    reporter = capacity.reporter
    many = [metal(f"node-{n}", node_uuid=str(uuid.UUID(int=n + 1))) for n in range(450)]
    parts = reporter.parts(*many, host="proxy")
    assert [len(part.nodes) for part in parts] == [200, 200, 50]
    await reporter.send(*reversed(parts))

    async def count() -> int:
        answer = await capacity.api.get("/v1/fit", flavor="any")
        return int(answer["nodes"])

    await capacity.flavor("any")
    await eventually(lambda: _is(count, 450))

    fewer = reporter.parts(*many[:399], host="proxy")
    await reporter.send(fewer[1])
    await parts_seen(capacity, "new_report", 2)
    await capacity.settled()
    assert await count() == 450
    await reporter.send(fewer[0])
    await eventually(lambda: _is(count, 399))

    await reporter.send(*reporter.parts(*many, host="proxy"))
    await eventually(lambda: _is(count, 450))


async def _is(count: Any, wanted: object) -> bool:
    return bool(await count() == wanted)


async def test_a_guest_of_ours_counts_once_and_confirms_its_claim(
    capacity: Any, node: Any, guest: Any
) -> None:
    await capacity.flavor()
    await capacity.reporter.report(node())
    await capacity.shows("hv1", free=8192)
    claim = await capacity.claim(flavor="m1.small")
    theirs = uuid.uuid4()

    await capacity.reporter.report(node(guests=[guest(claim["consumer_id"]), guest(theirs, 1024)]))

    await capacity.shows("hv1", claimed=SMALL_MB, foreign=1024 + 12)
    shown = await capacity.api.get(f"/v1/claims/{claim['id']}")
    assert shown["state"] == "confirmed"


async def test_a_guest_whose_claim_was_released_counts_as_foreign_while_it_runs(
    capacity: Any, node: Any, guest: Any
) -> None:
    await capacity.flavor()
    await capacity.reporter.report(node())
    await capacity.shows("hv1", free=8192)
    claim = await capacity.claim(flavor="m1.small")
    await capacity.api.delete(f"/v1/claims/{claim['id']}")
    await capacity.shows("hv1", claimed=0, foreign=0)

    await capacity.reporter.report(node(guests=[guest(claim["consumer_id"])]))

    await capacity.shows("hv1", claimed=0, foreign=SMALL_MB)


async def test_memory_that_no_guest_accounts_for_is_not_free(capacity: Any, node: Any) -> None:
    await capacity.reporter.report(node(memory_mb_used=5000, memory_mb_reserved=1000))
    await capacity.shows("hv1", limit=7192, foreign=5000, free=2192)


async def test_a_host_that_shrinks_below_its_claims_keeps_them_and_takes_no_more(
    capacity: Any, node: Any
) -> None:
    await capacity.flavor()
    await capacity.reporter.report(node())
    await capacity.shows("hv1", free=8192)
    for _ in range(3):
        await capacity.claim(flavor="m1.small")

    await capacity.reporter.report(node(memory_mb=4096))

    shown = await capacity.shows("hv1", limit=4096, claimed=3 * SMALL_MB)
    assert shown["resources"]["memory_mb"]["free"] == 4096 - 3 * SMALL_MB
    with pytest.raises(errors.Conflict):
        await capacity.claim(flavor="m1.small")


async def test_a_machine_that_moves_to_another_proxy_is_the_same_node(capacity: Any) -> None:
    await capacity.api.post(
        "/v1/flavors",
        {"name": "metal", "memory_mb": 65536, "vcpus": 32, "disk_gb": 900, "kind": "node"},
    )
    reporter = capacity.reporter
    await reporter.report(metal(), host="proxy-a")
    await capacity.shows("node-1", free=65536)
    claim = await capacity.claim(flavor="metal")
    assert (claim["host"], claim["node_uuid"]) == ("proxy-a", MACHINE)
    await capacity.shows("node-1", claimed=65536)

    late = reporter.parts(metal(), host="proxy-a")
    await reporter.report(metal("node-1b"), host="proxy-b")

    moved = await capacity.shows("node-1b", claimed=65536)
    assert (moved["host"], moved["node_uuid"]) == ("proxy-b", MACHINE)
    assert list(await capacity.hosts()) == ["node-1b"]
    await reporter.send(*late)  # what proxy-a said before proxy-b took over
    await parts_seen(capacity, "new_report", 3)
    await reporter.report(host="proxy-a")  # and it no longer has any node
    await parts_seen(capacity, "new_report", 4)
    await capacity.settled()
    assert list(await capacity.hosts()) == ["node-1b"]
    assert (await capacity.api.get(f"/v1/claims/{claim['id']}"))["host"] == "proxy-b"


async def test_a_leased_machine_has_nothing_free_even_after_its_claim_ended(
    capacity: Any,
) -> None:
    await capacity.api.post(
        "/v1/flavors", {"name": "metal", "memory_mb": 65536, "vcpus": 32, "kind": "node"}
    )
    await capacity.reporter.report(metal(), host="proxy")
    await capacity.shows("node-1", free=65536)
    claim = await capacity.claim(flavor="metal")
    await capacity.reporter.report(metal(memory_mb_used=65536, state="leased"), host="proxy")

    async def leased() -> Any:
        shown = (await capacity.hosts())["node-1"]
        return shown if shown["reported_state"] == "leased" else None

    assert (await eventually(leased))["state"] == "unavailable"
    await capacity.shows("node-1", claimed=65536, foreign=0, free=0)

    await capacity.api.delete(f"/v1/claims/{claim['id']}")

    await capacity.shows("node-1", claimed=0, foreign=65536, free=0)
    await capacity.reporter.report(metal(), host="proxy")
    await capacity.shows("node-1", claimed=0, foreign=0, free=65536)


async def test_another_machine_at_the_same_address_is_another_node(capacity: Any) -> None:
    other = str(uuid.UUID(int=78))
    await capacity.reporter.report(metal(), host="proxy")
    await capacity.shows("node-1", free=65536)
    await capacity.reporter.report(metal(node_uuid=other, memory_mb=1024), host="proxy")
    shown = await capacity.shows("node-1", free=1024)
    assert shown["node_uuid"] == other


async def test_guests_beyond_all_measure_fill_their_host_and_no_counter(
    capacity: Any, node: Any
) -> None:
    await capacity.reporter.report(node())
    await capacity.shows("hv1", limit=8192)
    await capacity.claim(resources={"memory_mb": 1024, "vcpus": 1})
    largest = {"memory_mb": 2**48, "vcpus": 1, "overhead_mb": 2**48}
    guests = [{"uuid": str(uuid.UUID(int=n + 1)), **largest} for n in range(2**14)]
    guests[0]["overhead_mb"] = 2**48 - 1
    await capacity.reporter.report(node(guests=guests))
    shown = await capacity.shows("hv1", foreign=2**62)
    assert shown["resources"]["memory_mb"]["claimed"] > 1024


async def test_machines_that_change_places_are_both_still_there(capacity: Any) -> None:
    first, second = str(uuid.UUID(int=1)), str(uuid.UUID(int=2))

    def at() -> Any:
        async def places() -> dict[str, str]:
            nodes = await capacity.hosts()
            return {name: node["node_uuid"] for name, node in nodes.items()}

        return places

    report = capacity.reporter.report
    await report(metal("a", node_uuid=first), metal("b", node_uuid=second), host="proxy")
    await eventually(lambda: _is(at(), {"a": first, "b": second}))
    await report(metal("a", node_uuid=second), metal("b", node_uuid=first), host="proxy")
    await eventually(lambda: _is(at(), {"a": second, "b": first}))
    # a nameless one at the address that a named one leaves is not the named one
    await report(metal("a", node_uuid=None), metal("c", node_uuid=second), host="proxy")
    await eventually(lambda: _is(at(), {"a": None, "c": second}))


async def test_a_silent_host_takes_no_claims_and_its_clock_cannot_hide_it(
    run_service: RunService, amqp_url: str, node: Any
) -> None:
    async with (
        run_service(
            app.serve,
            Settings,
            "hostler_capacity",
            refresh_seconds=0.05,
            stale_seconds=1.0,
        ) as service,
        open_bus(amqp_url) as bus,
    ):
        part = hosts.split(
            host="hv1",
            # an hour ahead of everybody else
            reported_at=_now() + timedelta(hours=1),
            report_id=uuid.uuid4(),
            nodes=[node()],
        )[0]
        await bus.publish(hosts.HOST_REPORTED.message(part, app_id="test", host="hv1"))

        async def state() -> str | None:
            found = (await service.api.get("/v1/hosts"))["hosts"]
            return str(found[0]["state"]) if found else None

        await eventually(lambda: _equals(state, "up"))
        await eventually(lambda: _equals(state, "stale"))
        wish = {"resources": {"memory_mb": 1, "vcpus": 1}, "project_id": "p"}
        with pytest.raises(errors.Conflict) as refused:
            await service.api.post("/v1/claims", wish)
        short = refused.value.fields["short"]
        assert isinstance(short, list)
        assert short[0]["blocker"] == "stale"
        # its clock was put right: the report looks older, and is taken since the host is stale
        right = part.model_copy(update={"reported_at": _now(), "report_id": uuid.uuid4()})
        await bus.publish(hosts.HOST_REPORTED.message(right, app_id="test", host="hv1"))
        await eventually(lambda: _equals(state, "up"))


def _now() -> datetime:
    return datetime.now(UTC)


async def _equals(ask: Any, wanted: str) -> bool:
    return bool(await ask() == wanted)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"not json", "Invalid JSON"),
        (b"{}", "host: Field required"),
        (
            b'{"host": "h", "reported_at": "2026-01-01T00:00:00Z", "report_id":'
            b' "00000000-0000-0000-0000-000000000001", "nodes": [{"hypervisor_hostname": "h",'
            b' "hypervisor_type": "xen", "memory_mb": -1, "vcpus": 1}]}',
            "nodes.0.memory_mb: Input should be greater than or equal to 0",
        ),
        (
            b'{"host": "h", "reported_at": "2026-01-01T00:00:00", "report_id":'
            b' "00000000-0000-0000-0000-000000000001", "nodes": []}',
            "reported_at: Input should have timezone info",
        ),
        (unusual(zone="a\0b"), "none that the database can hold"),
        (unusual(traits=["\0"]), "none that the database can hold"),
        (unusual("0001-01-01T00:00:00Z"), "no clock shows"),
        (unusual("9999-12-31T23:59:59-14:00"), "no clock shows"),
    ],
)
async def test_a_report_that_cannot_be_read_is_quarantined_with_its_body(
    capacity: Any, body: bytes, reason: str
) -> None:
    await capacity.reporter.bus.publish(
        bus_module.Message(
            exchange="hostler",
            routing_key="host.reported.bad.host",
            body=body,
            message_id=str(uuid.uuid4()),
        )
    )

    async def entries() -> Any:
        return (await capacity.api.get("/v1/quarantine"))["entries"]

    (entry,) = await eventually(entries)
    assert entry["code"] == "capacity.report.malformed"
    assert reason in entry["reason"]
    assert entry["routing_key"] == "host.reported.bad.host"


async def test_every_step_of_a_claim_is_published(capacity: Any, node: Any, amqp_url: str) -> None:
    heard: list[tuple[str, str]] = []

    async def hear(delivery: bus_module.Delivery) -> None:
        event = json.loads(delivery.body)
        heard.append((delivery.routing_key, event["claim_id"]))

    queue = bus_module.Queue(
        name="test.claims",
        type="classic",
        exclusive=True,
        bindings=(bus_module.Binding(exchange=bus_module.HOSTLER, routing_key="capacity.#"),),
    )
    subscription = bus_module.Subscription(queue=queue, handler=hear, quarantine=None)
    async with open_bus(amqp_url, subscription):
        await capacity.flavor()
        await capacity.reporter.report(node())
        await capacity.shows("hv1", free=8192)
        kept = (await capacity.claim(flavor="m1.small"))["id"]
        await capacity.api.post(f"/v1/claims/{kept}/confirm")
        await capacity.api.delete(f"/v1/claims/{kept}")
        lost = (await capacity.claim(flavor="m1.small", ttl_seconds=1))["id"]

        async def all_heard() -> bool:
            return len(heard) == 5

        await eventually(all_heard)
    assert heard == [
        ("capacity.claim.granted", kept),
        ("capacity.claim.confirmed", kept),
        ("capacity.claim.released", kept),
        ("capacity.claim.granted", lost),
        ("capacity.claim.expired", lost),
    ]


async def test_the_models_are_shown_with_what_they_are_worth(capacity: Any) -> None:
    answer = await capacity.api.get("/v1/overhead-models")
    models = {each["id"]: each for each in answer["overhead_models"]}
    assert models["xen-wiki-fit"]["under_predicts"] is True
    assert models["xen-wiki-fit"]["default_for"] == []
    (found,) = models["xen-wiki-fit"]["evidence"]
    assert (found["rows"], found["under_rows_raw"], found["max_under_mb_raw"]) == (49, 31, 2.963)
    assert (found["under_rows_charged"], found["max_under_mb_charged"]) == (7, 2)
    assert models["xapi-exact"]["evidence"][0]["exact_rows"] == 49
    assert models["xapi-exact-2026"]["default_for"] == ["xen", "xenserver"]


async def test_the_page_shows_hosts_flavors_claims_and_models(capacity: Any, node: Any) -> None:
    await capacity.flavor()
    await capacity.reporter.report(node("<b>hv1</b>"), host="hv1")
    await capacity.shows("<b>hv1</b>", free=8192)
    claim = await capacity.claim(flavor="m1.small")
    await capacity.shows("<b>hv1</b>", claimed=SMALL_MB)

    page = await capacity.api.get("/")

    assert "&lt;b&gt;hv1&lt;/b&gt;" in page
    assert "<b>hv1" not in page
    assert f"0 foreign, {SMALL_MB} claimed, {8192 - SMALL_MB} free of 8192 MB" in page
    assert claim["id"] in page
    assert "xapi-exact-2026" in page
    assert 'style="' not in page
    assert "<script" not in page
