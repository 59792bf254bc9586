"""Power and boot device through the API, drift, the latch, and commands from RabbitMQ."""

import asyncio
import dataclasses
import datetime
import json
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from hostler_baremetal import messages
from hostler_common import bus, errors, testing

Run = Callable[..., Any]
FleetOf = Callable[[testing.RunningService], Any]


class Events:
    """What the service says on the exchange."""

    def __init__(self) -> None:
        self.received: list[tuple[str, dict[str, Any]]] = []

    async def handle(self, delivery: bus.Delivery) -> None:
        self.received.append((delivery.routing_key, json.loads(delivery.body)))

    def subscription(self) -> bus.Subscription:
        queue = bus.Queue(
            name="events",
            type="classic",
            exclusive=True,
            bindings=(bus.Binding(exchange=bus.HOSTLER, routing_key="baremetal.#"),),
        )
        return bus.Subscription(queue=queue, handler=self.handle, quarantine=None)

    def of(self, routing_key: str) -> list[dict[str, Any]]:
        return [body for key, body in self.received if key == routing_key]

    async def one(self, routing_key: str, **expected: Any) -> dict[str, Any]:
        """Waits for an event that is as expected."""

        async def found() -> dict[str, Any] | None:
            for body in self.of(routing_key):
                if all(body.get(key) == value for key, value in expected.items()):
                    return body
            return None

        body: dict[str, Any] = await testing.eventually(found)
        return body


class TestPower:
    async def test_a_node_goes_through_every_action_with_one_command_each(
        self, run_baremetal: Run, fleet_of: FleetOf, bmc: Any, amqp_url: str
    ) -> None:
        events = Events()
        async with (
            testing.open_bus(amqp_url, events.subscription()),
            run_baremetal() as service,
        ):
            fleet = fleet_of(service)
            node_id = await fleet.enrol(bmc)
            for action, code, power in (
                ("on", 1, "on"),
                ("cycle", 2, "on"),
                ("reset", 3, "on"),
                ("soft", 5, "off"),
                ("cycle", 1, "on"),
                ("off", 0, "off"),
            ):
                ended = await fleet.power(node_id, action)
                assert (action, ended["state"], ended["code"]) == (action, "succeeded", None)
                assert bmc.power_commands[-1] == code
                node = await fleet.node(node_id)
                assert node["power_state"] == power
                await events.one("baremetal.operation.finished", operation_id=ended["id"])
            assert bmc.power_commands == [1, 2, 3, 5, 1, 0]
            changed = await events.one("baremetal.node.power_changed", after="on")
            assert (changed["before"], changed["node_uuid"]) in {
                ("off", node_id),
                ("unknown", node_id),
            }
            assert events.of("baremetal.node.power_drifted") == []

    async def test_what_is_so_already_needs_no_command(
        self, run_baremetal: Run, fleet_of: FleetOf, make_bmc: Any
    ) -> None:
        bmc = await make_bmc(power=True)
        async with run_baremetal() as service:
            fleet = fleet_of(service)
            ended = await fleet.power(await fleet.enrol(bmc), "on")
            assert (ended["state"], ended["issued_at"]) == ("succeeded", None)
            assert bmc.power_commands == []

    async def test_a_reset_of_a_node_that_is_off_fails_without_a_command(
        self, run_baremetal: Run, fleet_of: FleetOf, bmc: Any
    ) -> None:
        async with run_baremetal() as service:
            fleet = fleet_of(service)
            ended = await fleet.power(await fleet.enrol(bmc), "reset")
            assert (ended["state"], ended["code"]) == ("failed", "baremetal.power.not_possible")
            assert bmc.power_commands == []

    async def test_a_slow_node_is_waited_for_and_the_command_given_once(
        self, run_baremetal: Run, fleet_of: FleetOf, make_bmc: Any
    ) -> None:
        bmc = await make_bmc(power_delay_seconds=1.5)
        async with run_baremetal() as service:
            fleet = fleet_of(service)
            ended = await fleet.power(await fleet.enrol(bmc), "on")
            assert ended["state"] == "succeeded"
            assert bmc.power_commands == [1]

    async def test_a_command_without_effect_fails_at_the_deadline(
        self, run_baremetal: Run, fleet_of: FleetOf, bmc: Any
    ) -> None:
        bmc.faults.ignore_power = True
        async with run_baremetal(power_timeout_seconds=1.5) as service:
            fleet = fleet_of(service)
            ended = await fleet.power(await fleet.enrol(bmc), "on")
            assert (ended["state"], ended["code"]) == ("failed", "baremetal.operation.not_reached")
            assert bmc.power_commands == [1]

    async def test_a_lost_answer_to_on_is_settled_by_looking(
        self, run_baremetal: Run, fleet_of: FleetOf, bmc: Any
    ) -> None:
        bmc.faults.mute_commands = {(0x00, 0x02)}
        async with run_baremetal(bmc_timeout_seconds=0.5) as service:
            fleet = fleet_of(service)
            ended = await fleet.power(await fleet.enrol(bmc), "on")
            assert ended["state"] == "succeeded"
            assert bmc.power_commands == [1]

    async def test_a_lost_answer_to_reset_is_not_called_a_success(
        self, run_baremetal: Run, fleet_of: FleetOf, make_bmc: Any
    ) -> None:
        bmc = await make_bmc(power=True)
        bmc.faults.mute_commands = {(0x00, 0x02)}
        async with run_baremetal(bmc_timeout_seconds=0.5) as service:
            fleet = fleet_of(service)
            ended = await fleet.power(await fleet.enrol(bmc), "reset")
            assert ended["code"] == "baremetal.operation.outcome_unknown"
            assert bmc.power_commands == [3]

    async def test_a_bmc_that_refuses_the_command_fails_the_operation(
        self, run_baremetal: Run, fleet_of: FleetOf, bmc: Any
    ) -> None:
        async with run_baremetal(poll_seconds=600) as service:
            fleet = fleet_of(service)
            node_id = await fleet.enrol(bmc)
            await fleet.until(node_id, power_state="off")
            bmc.faults.refuse_power = 0xD5
            ended = await fleet.power(node_id, "on")
            assert (ended["state"], ended["code"]) == ("failed", "baremetal.bmc.refused")

    async def test_the_same_asked_again_while_under_way_is_the_same_and_another_is_refused(
        self, run_baremetal: Run, fleet_of: FleetOf, make_bmc: Any
    ) -> None:
        bmc = await make_bmc(power_delay_seconds=1.0)
        async with run_baremetal() as service:
            fleet = fleet_of(service)
            node_id = await fleet.enrol(bmc)
            asked = await asyncio.gather(*(fleet.ask(node_id, "on") for _ in range(5)))
            assert len({operation["id"] for operation in asked}) == 1
            with pytest.raises(errors.Conflict) as busy:
                await fleet.ask(node_id, "off")
            assert busy.value.code == "baremetal.node.busy"
            assert busy.value.fields["operation_id"] == asked[0]["id"]
            with pytest.raises(errors.Conflict):
                await service.api.delete(f"/v1/nodes/{node_id}")
            with pytest.raises(errors.Conflict) as leased:
                await service.api.post(
                    f"/v1/nodes/{node_id}/lease", {"owner": "a", "purpose": "b", "ttl_seconds": 9}
                )
            assert leased.value.code == "baremetal.node.busy"
            await fleet.ended(asked[0]["id"])
            assert bmc.power_commands == [1]

    async def test_a_repeated_request_with_a_key_is_answered_alike_and_done_once(
        self, run_baremetal: Run, fleet_of: FleetOf, make_bmc: Any
    ) -> None:
        bmc = await make_bmc(power=True)
        async with run_baremetal() as service:
            fleet = fleet_of(service)
            path = f"/v1/nodes/{await fleet.enrol(bmc)}/power"
            body = {"action": "cycle"}
            first = await service.api.post(path, body, idempotency_key="k")
            await fleet.ended(first["id"])
            second = await service.api.post(path, body, idempotency_key="k")
            assert second == first
            await asyncio.sleep(0.5)
            assert bmc.power_commands == [2]
            with pytest.raises(errors.Conflict) as reused:
                await service.api.post(path, {"action": "off"}, idempotency_key="k")
            assert reused.value.code == "request.idempotency_key_reused"

    async def test_a_boot_device_is_set_before_the_node_is_switched_on(
        self, run_baremetal: Run, fleet_of: FleetOf, bmc: Any
    ) -> None:
        async with run_baremetal() as service:
            fleet = fleet_of(service)
            node_id = await fleet.enrol(bmc)
            path = f"/v1/nodes/{node_id}/boot-device"
            assert (await service.api.get(path))["device"] is None
            operation = await service.api.post(path, {"device": "pxe", "mode": "efi"})
            assert (await fleet.ended(operation["id"]))["state"] == "succeeded"
            assert bmc.boot_flags.hex() == "a004000000"
            shown = await service.api.get(path)
            assert (shown["device"], shown["mode"], shown["persistent"]) == ("pxe", "efi", False)

    async def test_a_fresh_look_is_taken_when_asked_for(
        self, run_baremetal: Run, fleet_of: FleetOf, bmc: Any
    ) -> None:
        async with run_baremetal(poll_seconds=3600) as service:
            fleet = fleet_of(service)
            node_id = await fleet.enrol(bmc)
            await fleet.until(node_id, power_state="off")
            bmc.power = True
            path = f"/v1/nodes/{node_id}/power"
            assert (await service.api.get(path))["power_state"] == "off"
            fresh = await service.api.get(path, max_age_seconds=0)
            assert fresh["power_state"] == "on"

    async def test_unknown_nodes_and_operations_are_not_found(self, run_baremetal: Run) -> None:
        nobody = uuid.uuid4()
        async with run_baremetal() as service:
            for path, code in (
                (f"/v1/nodes/{nobody}/power", "baremetal.node.not_found"),
                (f"/v1/nodes/{nobody}/boot-device", "baremetal.node.not_found"),
                (f"/v1/nodes/{nobody}/lease", "baremetal.node.not_found"),
                (f"/v1/operations/{nobody}", "baremetal.operation.not_found"),
            ):
                with pytest.raises(errors.NotFound) as missing:
                    await service.api.get(path)
                assert missing.value.code == code


class TestSync:
    async def test_a_change_that_was_not_ours_is_drift_and_one_that_was_is_not(
        self, run_baremetal: Run, fleet_of: FleetOf, bmc: Any, amqp_url: str
    ) -> None:
        events = Events()
        async with (
            testing.open_bus(amqp_url, events.subscription()),
            run_baremetal() as service,
        ):
            fleet = fleet_of(service)
            node_id = await fleet.enrol(bmc)
            await fleet.power(node_id, "on")
            await asyncio.sleep(1.0)
            assert events.of("baremetal.node.power_drifted") == []
            bmc.power = False
            drifted = await events.one("baremetal.node.power_drifted")
            assert (drifted["before"], drifted["after"]) == ("on", "off")
            assert drifted["node_uuid"] == node_id

    async def test_a_bmc_that_falls_silent_makes_its_node_unknown_and_keeps_the_last_state(
        self, run_baremetal: Run, fleet_of: FleetOf, make_bmc: Any, amqp_url: str
    ) -> None:
        bmc = await make_bmc(power=True)
        events = Events()
        async with (
            testing.open_bus(amqp_url, events.subscription()),
            run_baremetal(bmc_timeout_seconds=0.5) as service,
        ):
            fleet = fleet_of(service)
            node_id = await fleet.enrol(bmc)
            seen = await fleet.until(node_id, power_state="on")
            bmc.faults.drop_requests = lambda _: True
            lost = await fleet.until(node_id, power_state="unknown")
            assert lost["last_power_state"] == "on"
            assert lost["power_observed_at"] >= seen["power_observed_at"]
            assert "in time" in lost["poll_error"]
            # it went off behind the outage
            bmc.power = False
            bmc.faults.drop_requests = None
            await fleet.until(node_id, power_state="off", poll_error=None)
            drifted = await events.one("baremetal.node.power_drifted")
            assert (drifted["before"], drifted["after"]) == ("on", "off")

    async def test_one_refusal_of_the_credentials_stops_all_asking_until_they_change(
        self, run_baremetal: Run, fleet_of: FleetOf, bmc: Any, amqp_url: str
    ) -> None:
        events = Events()
        async with (
            testing.open_bus(amqp_url, events.subscription()),
            run_baremetal() as service,
        ):
            fleet = fleet_of(service)
            node_id = await fleet.enrol(bmc, password="wrong")
            await events.one("baremetal.node.latched", node_uuid=node_id)
            handshakes = bmc.handshakes
            assert handshakes == 1
            await asyncio.sleep(1.5)
            assert bmc.handshakes == handshakes
            node = await fleet.node(node_id)
            assert (node["power_state"], node["latched_at"] is None) == ("unknown", False)
            with pytest.raises(errors.Conflict) as latched:
                await fleet.power(node_id, "on")
            assert latched.value.code == "baremetal.node.latched"
            assert bmc.handshakes == handshakes
            body = {"generation": node["generation"], "password": "secret"}
            await service.api.call("PATCH", f"/v1/nodes/{node_id}", body=body)
            await fleet.until(node_id, power_state="off", latched_at=None)

    async def test_a_refusal_during_an_operation_latches_too(
        self, run_baremetal: Run, fleet_of: FleetOf, bmc: Any
    ) -> None:
        async with run_baremetal(poll_seconds=3600, session_linger_seconds=0.1) as service:
            fleet = fleet_of(service)
            node_id = await fleet.enrol(bmc)
            await fleet.until(node_id, power_state="off")
            bmc.users["admin"] = ("changed", 4)
            await asyncio.sleep(0.3)
            ended = await fleet.power(node_id, "on")
            assert ended["code"] == "baremetal.bmc.authentication_failed"
            assert (await fleet.node(node_id))["latched_at"] is not None
            assert bmc.power_commands == []

    async def test_every_lease_has_its_beginning_and_its_end_told(
        self, run_baremetal: Run, fleet_of: FleetOf, bmc: Any, amqp_url: str
    ) -> None:
        events = Events()
        async with (
            testing.open_bus(amqp_url, events.subscription()),
            run_baremetal() as service,
        ):
            node_id = await fleet_of(service).enrol(bmc)
            path = f"/v1/nodes/{node_id}/lease"
            body = {"owner": "a", "purpose": "p", "ttl_seconds": 0.05}
            first = await service.api.post(path, body)
            await asyncio.sleep(0.06)
            # taken again before or after the sweep: the first one's end is told either way
            second = await service.api.post(path, {**body, "owner": "b", "ttl_seconds": 60})
            assert second["fencing_token"] > first["fencing_token"]
            await events.one("baremetal.lease.expired", fencing_token=first["fencing_token"])
            params = {"fencing_token": second["fencing_token"]}
            await service.api.call("DELETE", path, params=params)
            await events.one("baremetal.lease.released", fencing_token=second["fencing_token"])
            taken = {event["fencing_token"] for event in events.of("baremetal.lease.taken")}
            assert taken == {first["fencing_token"], second["fencing_token"]}
            (expired,) = events.of("baremetal.lease.expired")
            assert expired["taken_at"] == first["taken_at"]
            assert expired["ended_at"] == expired["expires_at"] == first["expires_at"]
            (released,) = events.of("baremetal.lease.released")
            assert released["taken_at"] == second["taken_at"]
            moments = [expired["ended_at"]]
            moments += [released[name] for name in ("taken_at", "ended_at", "expires_at")]
            assert sorted(moments, key=datetime.datetime.fromisoformat) == moments
            assert not any("ended_at" in event for event in events.of("baremetal.lease.taken"))

    async def test_a_lease_that_has_run_out_is_told_of_when_its_node_leaves(
        self, run_baremetal: Run, fleet_of: FleetOf, bmc: Any, amqp_url: str
    ) -> None:
        events = Events()
        async with (
            testing.open_bus(amqp_url, events.subscription()),
            run_baremetal() as service,
        ):
            node_id = await fleet_of(service).enrol(bmc)
            body = {"owner": "a", "purpose": "p", "ttl_seconds": 0.05}
            lease = await service.api.post(f"/v1/nodes/{node_id}/lease", body)
            await asyncio.sleep(0.06)
            # before or after the sweep: its end is told either way
            await service.api.call("DELETE", f"/v1/nodes/{node_id}")
            await events.one("baremetal.node.removed", node_uuid=node_id)
            (expired,) = events.of("baremetal.lease.expired")
            assert expired["fencing_token"] == lease["fencing_token"]

    async def test_changed_credentials_are_used_by_the_next_command(
        self, run_baremetal: Run, fleet_of: FleetOf, bmc: Any
    ) -> None:
        async with run_baremetal(session_linger_seconds=30) as service:
            fleet = fleet_of(service)
            node_id = await fleet.enrol(bmc)
            await fleet.until(node_id, power_state="off")
            bmc.users["admin"] = ("changed", 4)
            body = {"generation": 1, "password": "changed"}
            await service.api.call("PATCH", f"/v1/nodes/{node_id}", body=body)
            assert (await fleet.power(node_id, "on"))["state"] == "succeeded"

    async def test_no_session_is_left_behind_when_the_service_stops(
        self, run_baremetal: Run, fleet_of: FleetOf, make_bmc: Any
    ) -> None:
        bmcs = [await make_bmc() for _ in range(5)]
        async with run_baremetal(session_linger_seconds=30) as service:
            fleet = fleet_of(service)
            for number, bmc in enumerate(bmcs):
                node_id = await fleet.enrol(bmc, f"node-{number}")
                await fleet.until(node_id, power_state="off")
            assert sum(bmc.active_sessions for bmc in bmcs) == 5
        await asyncio.sleep(0.1)
        assert sum(len(bmc.sessions) for bmc in bmcs) == 0

    async def test_a_slow_bmc_holds_nobody_up(
        self, run_baremetal: Run, fleet_of: FleetOf, make_bmc: Any
    ) -> None:
        dead, alive = await make_bmc(), await make_bmc()
        dead.faults.drop_requests = lambda _: True
        async with run_baremetal(bmc_timeout_seconds=30, claim_seconds=60) as service:
            fleet = fleet_of(service)
            await fleet.enrol(dead, "dead")
            node_id = await fleet.enrol(alive, "alive")
            await fleet.until(node_id, power_state="off")
            assert (await fleet.power(node_id, "on"))["state"] == "succeeded"


class TestCommands:
    @staticmethod
    def command(host: str = "baremetal", **more: Any) -> bus.Message:
        body = {"command": "power", "args": {"action": "on"}, "operation_id": str(uuid.uuid4())}
        return bus.Message(
            exchange="hostler",
            routing_key=f"baremetal.{host}",
            body=json.dumps({**body, **more}).encode(),
            message_id=str(uuid.uuid4()),
            app_id="scheduler",
            mandatory=True,
        )

    async def test_a_command_delivered_three_times_is_done_once_and_answered(
        self, run_baremetal: Run, fleet_of: FleetOf, bmc: Any, amqp_url: str
    ) -> None:
        events = Events()
        async with (
            testing.open_bus(amqp_url, events.subscription()) as client,
            run_baremetal(proxy_host="proxy.example.org") as service,
        ):
            node_id = await fleet_of(service).enrol(bmc)
            command = self.command("proxy.example.org", node_uuid=node_id)
            for _ in range(3):
                await client.publish(command)
            operation_id = json.loads(command.body)["operation_id"]
            finished = await events.one("baremetal.operation.finished", operation_id=operation_id)
            assert (finished["state"], finished["node_uuid"]) == ("succeeded", node_id)
            await client.publish(command)
            await asyncio.sleep(0.5)
            assert bmc.power_commands == [1]
            shown = await service.api.get(f"/v1/operations/{operation_id}")
            assert shown["requested_by"] == "scheduler"

    async def test_a_command_that_is_refused_is_answered_with_the_code(
        self, run_baremetal: Run, fleet_of: FleetOf, bmc: Any, amqp_url: str
    ) -> None:
        events = Events()
        async with (
            testing.open_bus(amqp_url, events.subscription()) as client,
            run_baremetal() as service,
        ):
            fleet = fleet_of(service)
            node_id = await fleet.enrol(bmc)
            await client.publish(self.command(node_uuid=str(uuid.uuid4())))
            await events.one("baremetal.operation.finished", code="baremetal.node.not_found")
            await client.publish(self.command(node_uuid=node_id, fencing_token=7))
            await events.one("baremetal.operation.finished", code="baremetal.lease.fenced")
            assert bmc.power_commands == []

    async def test_what_is_no_command_goes_to_quarantine_with_its_body(
        self, run_baremetal: Run, amqp_url: str
    ) -> None:
        bodies = [
            b"not json",
            b"{}",
            b'{"command": "explode"}',
            b'{"command": "power", "args": {"action": "melt"}, "node_uuid": "x"}',
        ]
        async with testing.open_bus(amqp_url) as client, run_baremetal() as service:
            message = self.command()
            for body in bodies:
                await client.publish(dataclasses.replace(message, body=body))

            async def kept() -> Any:
                entries = (await service.api.get("/v1/quarantine"))["entries"]
                return entries if len(entries) == len(bodies) else None

            entries = await testing.eventually(kept)
            assert {entry["code"] for entry in entries} == {"baremetal.command.malformed"}
            shown = [await service.api.get(f"/v1/quarantine/{entry['id']}") for entry in entries]
            assert {whole["body_text"].encode() for whole in shown} == set(bodies)

    async def test_a_command_that_cannot_be_stored_goes_to_quarantine_at_once(
        self, run_baremetal: Run, fleet_of: FleetOf, bmc: Any, amqp_url: str
    ) -> None:
        async with testing.open_bus(amqp_url) as client, run_baremetal() as service:
            node_id = await fleet_of(service).enrol(bmc)
            message = self.command(node_uuid=node_id)
            await client.publish(dataclasses.replace(message, app_id="sched\0uler"))

            async def kept() -> Any:
                return (await service.api.get("/v1/quarantine"))["entries"]

            (entry,) = await testing.eventually(kept)
            assert (entry["code"], entry["attempts"]) == ("baremetal.command.malformed", 1)

    def test_a_boot_device_command_is_a_command(self) -> None:
        command = messages.Command.model_validate(
            {
                "command": "boot_device",
                "node_uuid": str(uuid.uuid4()),
                "operation_id": str(uuid.uuid4()),
                "args": {"device": "pxe"},
                "something_new": 1,
            }
        ).root
        assert isinstance(command, messages.BootDeviceCommand)
