"""The registry and leases over HTTP, and what capacity is told."""

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from hostler_common import auth, bus, client, errors, hosts, servers, testing

Run = Callable[..., Any]
FleetOf = Callable[[testing.RunningService], Any]
LEASE = {"owner": "ci", "purpose": "nightly", "ttl_seconds": 60}


async def release(service: testing.RunningService, path: str, **params: Any) -> None:
    await service.api.call("DELETE", path, params=params)


class Reports:
    """What capacity would hear."""

    def __init__(self) -> None:
        self.received: list[hosts.HostReport] = []

    async def handle(self, delivery: bus.Delivery) -> None:
        self.received.append(hosts.HostReport.model_validate_json(delivery.body))

    def subscription(self) -> bus.Subscription:
        queue = bus.Queue(
            name="reports",
            type="classic",
            exclusive=True,
            bindings=(bus.Binding(exchange=bus.HOSTLER, routing_key="host.reported.#"),),
        )
        return bus.Subscription(queue=queue, handler=self.handle, quarantine=None)

    async def of_node(self, name: str, **expected: Any) -> hosts.NodeRecord:
        """Waits for a report in which the node is as expected."""

        async def found() -> hosts.NodeRecord | None:
            for report in reversed(self.received):
                for node in report.nodes:
                    if node.hypervisor_hostname == name:
                        is_so = all(getattr(node, k) == v for k, v in expected.items())
                        return node if is_so else None
            return None

        record: hosts.NodeRecord = await testing.eventually(found)
        return record


class TestRegistry:
    async def test_a_node_is_enrolled_shown_changed_and_removed(
        self, run_baremetal: Run, fleet_of: FleetOf, bmc: Any
    ) -> None:
        async with run_baremetal() as service:
            fleet = fleet_of(service)
            node_id = await fleet.enrol(bmc, "rack-1.node-1", zone="z1", traits=["HW_GPU"])
            node = await fleet.node(node_id)
            assert (node["name"], node["generation"]) == ("rack-1.node-1", 1)
            assert (node["memory_mb"], node["traits"]) == (131072, ["HW_GPU"])
            changed = await service.api.call(
                "PATCH", f"/v1/nodes/{node_id}", body={"generation": 1, "zone": None, "vcpus": 32}
            )
            assert (changed["generation"], changed["zone"], changed["vcpus"]) == (2, None, 32)
            with pytest.raises(errors.Conflict) as stale:
                await service.api.call(
                    "PATCH", f"/v1/nodes/{node_id}", body={"generation": 1, "vcpus": 16}
                )
            assert stale.value.code == "baremetal.node.stale_generation"
            await service.api.delete(f"/v1/nodes/{node_id}")
            with pytest.raises(errors.NotFound) as gone:
                await fleet.node(node_id)
            assert gone.value.code == "baremetal.node.not_found"

    async def test_neither_the_api_nor_the_database_nor_the_log_has_a_password_in_clear(
        self, run_baremetal: Run, fleet_of: FleetOf, make_bmc: Any, database_url: str, capfd: Any
    ) -> None:
        bmc = await make_bmc(users={"admin": ("hunter2-hunter2", 4)}, group_key=b"g1-g1-g1-g1")
        async with run_baremetal() as service:
            fleet = fleet_of(service)
            node_id = await fleet.enrol(bmc, password="hunter2-hunter2", group_key="g1-g1-g1-g1")
            # the credentials work, and yet are nowhere to be read
            await fleet.until(node_id, power_state="off", working_suite=17)
            page = json.dumps(await service.api.get("/v1/nodes"))
            with pytest.raises(errors.Invalid) as refused:
                await fleet.enrol(bmc, "other", password="hunter2-hunter2-hunter2")
            with pytest.raises(errors.Conflict) as exists:
                await fleet.enrol(bmc, "other", password="hunter2-hunter2")
        connection = await asyncpg.connect(database_url)
        rows = await connection.fetch("SELECT n::text AS n FROM baremetal.node AS n")
        keys = await connection.fetch("SELECT k::text AS n FROM baremetal.idempotency_key AS k")
        await connection.close()
        logged = capfd.readouterr()
        for text in (
            page,
            str(refused.value.problem()),
            str(exists.value.problem()),
            *(row["n"] for row in [*rows, *keys]),
            logged.out + logged.err,
        ):
            assert "hunter2" not in text
            assert "g1-g1" not in text
            assert b"hunter2".hex() not in text

    async def test_a_wrong_member_is_named_in_the_problem(
        self, run_baremetal: Run, fleet_of: FleetOf
    ) -> None:
        wrong: list[dict[str, Any]] = [
            {"address": "10.0.0.1"},
            {"address": "ipmi://10.0.0.1:99999"},
            {"username": "u" * 17},
            {"password": "p" * 21},
            {"password": "ü" * 11},
            {"password": ""},
            {"cipher_suites": [0]},
            {"cipher_suites": []},
            {"memory_mb": 0},
            {"name": "a b"},
            {"colour": "blue"},
            {"address": "ipmi://bmc..example.org"},
            {"zone": "\0"},
            {"traits": ["\0"]},
            {"traits": 257 * ["t"]},
            {"extra_specs": {"k": "\0"}},
            {"extra_specs": {"k": 1025 * "x"}},
        ]
        async with run_baremetal() as service:
            for change in wrong:
                with pytest.raises(errors.Invalid) as refused:
                    await fleet_of(service).enrol("ipmi://127.0.0.1:6230", **change)
                assert f"/body/{next(iter(change))}" in refused.value.detail
            assert (await service.api.get("/v1/nodes"))["nodes"] == []

    @pytest.mark.parametrize("age", ["inf", "nan", "1e300", "-1"])
    async def test_an_age_that_no_look_can_have_is_refused(
        self, run_baremetal: Run, fleet_of: FleetOf, bmc: Any, age: str
    ) -> None:
        async with run_baremetal() as service:
            node_id = await fleet_of(service).enrol(bmc)
            with pytest.raises(errors.Invalid):
                await service.api.get(f"/v1/nodes/{node_id}/power", max_age_seconds=age)

    async def test_a_name_and_a_bmc_belong_to_one_node(
        self, run_baremetal: Run, fleet_of: FleetOf
    ) -> None:
        async with run_baremetal() as service:
            fleet = fleet_of(service)
            await fleet.enrol("ipmi://127.0.0.1:6230", "a")
            for address, name, column in (
                ("ipmi://127.0.0.1:6231", "a", "name"),
                ("ipmi://127.0.0.1:6230", "b", "address"),
            ):
                with pytest.raises(errors.Conflict) as exists:
                    await fleet.enrol(address, name)
                assert exists.value.code == "baremetal.node.exists"
                assert exists.value.fields["conflicts_on"] == column

    async def test_pages_follow_each_other_by_name(
        self, run_baremetal: Run, fleet_of: FleetOf
    ) -> None:
        async with run_baremetal() as service:
            fleet = fleet_of(service)
            for number in range(5):
                await fleet.enrol(f"ipmi://127.0.0.1:{6230 + number}", f"node-{number}")
            names: list[str] = []
            marker = None
            while True:
                page = await service.api.get("/v1/nodes", limit=2, marker=marker)
                names += [node["name"] for node in page["nodes"]]
                marker = page["next_marker"]
                if marker is None:
                    break
            assert names == [f"node-{number}" for number in range(5)]

    async def test_the_same_key_enrols_once(self, run_baremetal: Run) -> None:
        body = {
            "name": "a",
            "address": "ipmi://127.0.0.1:6230",
            "username": "admin",
            "password": "secret",
            "memory_mb": 1024,
            "vcpus": 1,
        }
        async with run_baremetal() as service:
            answers = await asyncio.gather(
                *(service.api.post("/v1/nodes", body, idempotency_key="k") for _ in range(4))
            )
            assert len({answer["id"] for answer in answers}) == 1
            assert len((await service.api.get("/v1/nodes"))["nodes"]) == 1

    async def test_the_page_shows_every_node(
        self, run_baremetal: Run, fleet_of: FleetOf, bmc: Any
    ) -> None:
        async with run_baremetal() as service:
            fleet = fleet_of(service)
            node_id = await fleet.enrol(bmc, "node-<b>1")
            await fleet.until(node_id, power_state="off")
            await service.api.post(f"/v1/nodes/{node_id}/lease", LEASE)
            await fleet.enrol("ipmi://127.0.0.1:9", "node-2", maintenance=True)
            page = await service.api.get("/")
            assert "node-&lt;b&gt;1" in page
            assert "node-2" in page
            assert "nightly" in page
            assert "maintenance" in page

    async def test_a_wrong_key_file_stops_the_service_with_its_name(
        self, run_baremetal: Run, tmp_path: Any
    ) -> None:
        path = tmp_path / "bad"
        path.write_text("nonsense\n")
        with pytest.raises(BaseExceptionGroup) as stopped:
            async with run_baremetal(credentials_key_file=path):
                pass
        assert stopped.group_contains(errors.HostlerError, match="CREDENTIALS_KEY_FILE.*line 1")


class TestLeases:
    async def test_a_lease_is_taken_renewed_and_given_back(
        self, run_baremetal: Run, fleet_of: FleetOf, bmc: Any
    ) -> None:
        async with run_baremetal() as service:
            fleet = fleet_of(service)
            node_id = await fleet.enrol(bmc)
            path = f"/v1/nodes/{node_id}/lease"
            lease = await service.api.post(path, LEASE)
            renewed = await service.api.post(path, {**LEASE, "ttl_seconds": 600})
            assert renewed["fencing_token"] == lease["fencing_token"]
            assert renewed["expires_at"] > lease["expires_at"]
            assert (await fleet.node(node_id))["state"] == "leased"
            with pytest.raises(errors.Conflict) as held:
                await service.api.post(path, {**LEASE, "owner": "other"})
            assert held.value.code == "baremetal.lease.held"
            with pytest.raises(errors.Conflict) as removed:
                await service.api.delete(f"/v1/nodes/{node_id}")
            assert removed.value.code == "baremetal.lease.held"
            with pytest.raises(errors.Conflict) as fenced:
                await release(service, path, fencing_token=0)
            assert fenced.value.code == "baremetal.lease.fenced"
            await release(service, path, fencing_token=lease["fencing_token"])
            with pytest.raises(errors.NotFound) as gone:
                await service.api.get(path)
            assert gone.value.code == "baremetal.lease.not_found"
            again = await service.api.post(path, LEASE)
            assert again["fencing_token"] > lease["fencing_token"]

    async def test_of_many_who_want_a_node_one_gets_it(
        self, run_baremetal: Run, fleet_of: FleetOf, bmc: Any
    ) -> None:
        async with run_baremetal() as service:
            node_id = await fleet_of(service).enrol(bmc)

            async def take(number: int) -> bool:
                try:
                    await service.api.post(
                        f"/v1/nodes/{node_id}/lease", {**LEASE, "owner": f"owner-{number}"}
                    )
                except errors.Conflict:
                    return False
                return True

            got = await asyncio.gather(*(take(number) for number in range(20)))
            assert sum(got) == 1

    async def test_a_lease_ends_by_itself_and_the_sleeper_cannot_renew_it(
        self, run_baremetal: Run, fleet_of: FleetOf, bmc: Any
    ) -> None:
        async with run_baremetal() as service:
            fleet = fleet_of(service)
            node_id = await fleet.enrol(bmc)
            path = f"/v1/nodes/{node_id}/lease"
            lease = await service.api.post(path, {**LEASE, "ttl_seconds": 0.3})
            await fleet.until(node_id, state="available")
            with pytest.raises(errors.Conflict) as over:
                await service.api.post(path, {**LEASE, "fencing_token": lease["fencing_token"]})
            assert over.value.code == "baremetal.lease.fenced"

    async def test_an_action_on_a_leased_node_needs_the_token_of_the_lease(
        self, run_baremetal: Run, fleet_of: FleetOf, bmc: Any
    ) -> None:
        async with run_baremetal() as service:
            fleet = fleet_of(service)
            node_id = await fleet.enrol(bmc)
            path = f"/v1/nodes/{node_id}/lease"
            first = await service.api.post(path, LEASE)
            await release(service, path, fencing_token=first["fencing_token"])
            second = await service.api.post(path, LEASE)
            for token in (None, first["fencing_token"], second["fencing_token"] + 1):
                with pytest.raises(errors.Conflict) as fenced:
                    await fleet.power(node_id, "on", token)
                assert fenced.value.code == "baremetal.lease.fenced"
            assert bmc.power_commands == []
            ended = await fleet.power(node_id, "on", second["fencing_token"])
            assert ended["state"] == "succeeded"
            await release(service, path, fencing_token=second["fencing_token"])
            with pytest.raises(errors.Conflict) as over:
                await fleet.power(node_id, "off", second["fencing_token"])
            assert over.value.code == "baremetal.lease.fenced"
            assert bmc.power_commands == [1]

    async def test_a_lease_that_ends_while_its_operation_waits_fences_it_at_the_bmc(
        self, run_baremetal: Run, fleet_of: FleetOf, bmc: Any
    ) -> None:
        async with run_baremetal() as service:
            fleet = fleet_of(service)
            node_id = await fleet.enrol(bmc)
            await fleet.until(node_id, power_state="off")
            lease = await service.api.post(
                f"/v1/nodes/{node_id}/lease", {**LEASE, "ttl_seconds": 0.8}
            )
            # the BMC is away while the operation is accepted, and back when the lease is over
            bmc.faults.drop_requests = lambda _: True
            operation = await fleet.ask(node_id, "on", lease["fencing_token"])
            await fleet.until(node_id, state="available")
            bmc.faults.drop_requests = None
            ended = await fleet.ended(operation["id"])
            assert (ended["state"], ended["code"]) == ("failed", "baremetal.lease.fenced")
            assert bmc.power_commands == []

    async def test_an_admin_may_break_a_lease(
        self, run_baremetal: Run, fleet_of: FleetOf, bmc: Any
    ) -> None:
        async with run_baremetal() as service:
            node_id = await fleet_of(service).enrol(bmc)
            path = f"/v1/nodes/{node_id}/lease"
            await service.api.post(path, LEASE)
            await release(service, path, force=True)
            await service.api.post(path, {**LEASE, "owner": "other"})


class TestReports:
    async def test_capacity_is_told_of_all_nodes_and_a_leased_one_is_full(
        self, run_baremetal: Run, fleet_of: FleetOf, make_bmc: Any, amqp_url: str
    ) -> None:
        reports = Reports()
        async with (
            testing.open_bus(amqp_url, reports.subscription()),
            run_baremetal(proxy_host="proxy.example.org") as service,
        ):
            fleet = fleet_of(service)
            first = await fleet.enrol(await make_bmc(power=True), "node-1", zone="z1")
            await fleet.enrol(await make_bmc(), "node-2")
            # on, and yet free: power makes no node busy
            await fleet.until(first, power_state="on")
            free = await reports.of_node("node-1", state="available")
            assert (free.memory_mb, free.memory_mb_used, free.vcpus_used) == (131072, 0, 0)
            assert free.is_bare_metal
            assert (str(free.node_uuid), free.zone) == (first, "z1")
            path = f"/v1/nodes/{first}/lease"
            lease = await service.api.post(path, LEASE)
            taken = await reports.of_node("node-1", state="leased")
            assert taken.memory_mb_used == taken.memory_mb
            assert taken.vcpus_used == taken.vcpus
            assert taken.local_gb_used == taken.local_gb
            await release(service, path, fencing_token=lease["fencing_token"])
            assert (await reports.of_node("node-1", state="available")).memory_mb_used == 0
            whole = reports.received[-1]
            assert {node.hypervisor_hostname for node in whole.nodes} == {"node-1", "node-2"}
            assert whole.host == "proxy.example.org"

    async def test_a_removed_node_is_missing_from_the_next_report(
        self, run_baremetal: Run, fleet_of: FleetOf, amqp_url: str
    ) -> None:
        reports = Reports()
        async with (
            testing.open_bus(amqp_url, reports.subscription()),
            run_baremetal() as service,
        ):
            node_id = await fleet_of(service).enrol("ipmi://127.0.0.1:9", "node-1")
            await reports.of_node("node-1")
            await service.api.delete(f"/v1/nodes/{node_id}")

            async def is_empty() -> bool:
                return reports.received[-1].nodes == []

            await testing.eventually(is_empty)

    async def test_more_nodes_than_fit_in_a_part_are_one_report_of_several(
        self, run_baremetal: Run, database_url: str, amqp_url: str
    ) -> None:
        reports = Reports()
        async with (
            testing.open_bus(amqp_url, reports.subscription()),
            run_baremetal() as service,
        ):
            connection = await asyncpg.connect(database_url)
            await connection.execute(
                "INSERT INTO baremetal.node (id, name, address, username, sealed_password,"
                " cipher_suites, memory_mb, vcpus, local_gb, latched_at)"
                " SELECT gen_random_uuid(), 'n' || n, 'ipmi://h' || n, 'u', '', '{3}', 1, 1, 1,"
                " now() FROM generate_series(1, 450) AS n"
            )
            await connection.execute("UPDATE baremetal.inventory SET version = version + 1")
            await connection.close()

            async def whole() -> bool:
                by_id: dict[Any, list[hosts.HostReport]] = {}
                for report in reports.received:
                    by_id.setdefault(report.report_id, []).append(report)
                return any(sum(len(part.nodes) for part in parts) == 450 and len(parts) == 3
                           for parts in by_id.values())  # fmt: skip

            await testing.eventually(whole)
            assert len((await service.api.get("/v1/nodes", limit=1000))["nodes"]) == 450


async def test_readiness_follows_the_broker_and_reports_come_after_it_is_back(
    run_baremetal: Run, fleet_of: FleetOf, own_rabbitmq: servers.RabbitMQ
) -> None:
    url = own_rabbitmq.make_vhost("baremetal")
    async with run_baremetal(amqp_url=url) as service:
        own_rabbitmq.stop()

        async def is_unready() -> bool:
            try:
                await service.api.get("/readyz")
            except errors.Unavailable:
                return True
            return False

        await testing.eventually(is_unready)
        # the registry does not need the broker
        await fleet_of(service).enrol("ipmi://127.0.0.1:9", "node-1")
        own_rabbitmq.start()
        await testing.wait_ready(service.url)
        reports = Reports()
        async with testing.open_bus(url, reports.subscription()):
            await reports.of_node("node-1")


async def test_who_may_do_what(
    run_baremetal: Run, fleet_of: FleetOf, tmp_path: Path, bmc: Any
) -> None:
    tokens, lines = {}, []
    for name, role, projects in (
        ("reader", auth.Role.READER, "*"),
        ("operator", auth.Role.OPERATOR, "*"),
        ("admin", auth.Role.ADMIN, "*"),
        ("scoped", auth.Role.ADMIN, "p1"),
    ):
        tokens[name], line = auth.new_token(name=name, role=role, projects=projects)
        lines.append(line)
    (tmp_path / "tokens").write_text("\n".join(lines))
    options = {"auth_mode": "token", "auth_tokens_file": tmp_path / "tokens"}
    async with contextlib.AsyncExitStack() as stack:
        service = await stack.enter_async_context(run_baremetal(**options))
        apis = {
            name: await stack.enter_async_context(client.open_api(service.url, token=token))
            for name, token in tokens.items()
        }
        fleet = fleet_of(dataclasses.replace(service, api=apis["operator"]))
        node_id = await fleet.enrol(bmc)
        path = f"/v1/nodes/{node_id}"
        await apis["reader"].get(path)
        await apis["operator"].post(f"{path}/lease", LEASE)
        refusals: list[tuple[str, str, str, type[errors.HostlerError]]] = [
            ("nobody", "GET", path, errors.Unauthenticated),
            ("reader", "DELETE", path, errors.Forbidden),
            ("reader", "POST", f"{path}/power", errors.Forbidden),
            ("scoped", "GET", "/v1/nodes", errors.Forbidden),
            ("scoped", "GET", "/", errors.Forbidden),
            ("operator", "DELETE", f"{path}/lease?force=true", errors.Forbidden),
        ]
        for who, method, where, error in refusals:
            where, _, query = where.partition("?")
            params = dict([query.split("=")]) if query else {}
            with pytest.raises(error):
                await apis.get(who, service.api).call(
                    method,
                    where,
                    params=params,
                    body={"action": "on"} if method == "POST" else None,
                )
        await release(dataclasses.replace(service, api=apis["admin"]), f"{path}/lease", force=True)
    assert bmc.power_commands == []
