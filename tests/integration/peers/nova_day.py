"""A day of a whole Nova: run as a program in the environment `nova`, which has nothing of hostler's.

    python nova_day.py --amqp-url amqp://... --format both --rows seconds --output day.json

nova-api, nova-scheduler, nova-conductor and three nova-computes with the fake driver run in this
process, from the functional fixtures of Nova's own wheel, on SQLite. Two dozen instances of four
projects are driven through 24 hours by Nova's API; what Nova says of it goes to the broker as
notifications, sent by its own notifiers. The hours pass by moving the clock that OpenStack reads
(`oslo_utils.timeutils.utcnow`): it runs on in between, so that all moments keep their fractions.

What `--output` says is Nova's own truth and comes from its database alone. `changes` are the writes
to table `instances`, kept by a trigger of that table with the moment of each: nothing in it has
passed through a notification. `instances`, `migrations` and `actions` are the rows as they are in
the end. `sent` lists the messages that Nova handed to the broker's driver, for counting them.

With `--rows seconds` the database rounds moments to whole seconds as MySQL's DATETIME does, below
most clouds; with `--rows microseconds` it keeps them as they are.
"""

import argparse
import contextlib
import json
import os
import queue
import sys
import threading
import time
import unittest
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

os.environ["OS_NOVA_DISABLE_EVENTLET_PATCHING"] = "true"  # native threads, before any Nova import
warnings.simplefilter("ignore")

# the environment of this program is not the one that types are checked in
import nova.tests.functional  # type: ignore[import-not-found]  # noqa: E402, F401  settles threads

# isort: split
import fixtures  # type: ignore[import-not-found]  # noqa: E402
import sqlalchemy  # type: ignore[import-not-found]  # noqa: E402
from nova import context, rpc, test  # noqa: E402
from nova.db.main import api as database  # type: ignore[import-not-found]  # noqa: E402
from nova.tests import fixtures as nova_fixtures  # noqa: E402
from nova.tests.functional import (  # noqa: E402
    fixtures as functional_fixtures,
)
from nova.tests.functional.api import (  # type: ignore[import-not-found]  # noqa: E402
    client as nova_client,
)
from oslo_messaging.notify import messaging as notify_messaging  # noqa: E402
from sqlalchemy.dialects import sqlite  # type: ignore[import-not-found]  # noqa: E402

DAY = datetime(2026, 5, 8, tzinfo=UTC)
HOSTS = ("compute-1", "compute-2", "compute-3")
IMAGES = ("155d900f-4e14-4e4c-a73d-069cbf4541e6", "70a599e0-31e7-49b7-b260-868f441e862b")
PROJECTS = {
    "alpha": "a1fa0000000000000000000000000001",
    "beta": "be7a0000000000000000000000000002",
    "gamma": "9a33a000000000000000000000000003",
    "delta": "de17a000000000000000000000000004",
}
# name: vCPUs, RAM in MiB, root and ephemeral disk in GB
FLAVORS = {
    "tiny": (1, 512, 1, 0),
    "small": (1, 2048, 20, 0),
    "medium": (2, 4096, 40, 10),
    "large": (4, 8192, 80, 0),
    "lean": (2, 16384, 80, 0),
    "xlarge": (8, 16384, 160, 20),
    "giant": (1, 1024, 10_000_000, 0),  # no host has room for it
}
# how long the hypervisor takes for what the fake driver does at once, in seconds: whatever Nova
# writes before and after is as far apart as it would be
WORK_SECONDS = {
    "spawn": 21.0,
    "destroy": 5.0,
    "migrate_disk_and_power_off": 97.0,
    "finish_migration": 33.0,
    "finish_revert_migration": 14.0,
    "snapshot": 61.0,
    "power_off": 7.0,
    "power_on": 6.0,
    "suspend": 9.0,
    "resume": 8.0,
    "pause": 1.5,
    "unpause": 1.5,
    "rescue": 18.0,
    "unrescue": 11.0,
    "live_migration": 44.0,
}
# when each hour's audit runs after the hour, in seconds
AUDIT_LAGS = (12, 25, 3, 48, 31, 55, 40, 9)
PATIENCE_SECONDS = 60.0

# action: the suffixes of the legacy and of the versioned names of the last events it sends
LAST_EVENTS = {
    "create": (("create.end",), ("create.end",)),
    "fail": (("create.error",), ("create.error",)),
    "no_host": ((), ()),
    "resize": (("resize.end", "finish_resize.end"), ("resize.end", "resize_finish.end")),
    "confirm": (("resize.confirm.end",), ("resize_confirm.end",)),
    "revert": (("resize.revert.end",), ("resize_revert.end",)),
    "rebuild": (("rebuild.end",), ("rebuild.end",)),
    "stop": (("power_off.end",), ("power_off.end",)),
    "start": (("power_on.end",), ("power_on.end",)),
    "suspend": (("suspend.end",), ("suspend.end",)),
    "resume": (("resume.end",), ("resume.end",)),
    "pause": (("pause.end",), ("pause.end",)),
    "unpause": (("unpause.end",), ("unpause.end",)),
    "reboot": (("reboot.end",), ("reboot.end",)),
    "rescue": (("rescue.end",), ("rescue.end",)),
    "unrescue": (("unrescue.end",), ("unrescue.end",)),
    "shelve": (("shelve.end",), ("shelve.end",)),
    "offload": (("shelve_offload.end",), ("shelve_offload.end",)),
    "unshelve": (("unshelve.end",), ("unshelve.end",)),
    "unshelve_in_place": (("power_on.end",), ("power_on.end",)),  # it was never offloaded
    "snapshot": (("snapshot.end",), ("snapshot.end",)),
    "live_migrate": (
        ("live_migration._post.end", "live_migration.post.dest.end"),
        ("live_migration_post.end", "live_migration_post_dest.end"),
    ),
    "soft_delete": (("soft_delete.end",), ("soft_delete.end",)),
    "restore": (("restore.end",), ("restore.end",)),
    "force_delete": (("delete.end",), ("delete.end",)),
    "delete": (("delete.end",), ("delete.end",)),
    "delete_amid_resize": (("delete.end",), ("delete.end",)),
}
# action: the body of POST /servers/{id}/action
REQUESTS: dict[str, dict[str, Any]] = {
    "confirm": {"confirmResize": None},
    "revert": {"revertResize": None},
    "stop": {"os-stop": None},
    "start": {"os-start": None},
    "suspend": {"suspend": None},
    "resume": {"resume": None},
    "pause": {"pause": None},
    "unpause": {"unpause": None},
    "reboot": {"reboot": {"type": "HARD"}},
    "rescue": {"rescue": {"adminPass": "secret"}},
    "unrescue": {"unrescue": None},
    "shelve": {"shelve": None},
    "offload": {"shelveOffload": None},
    "unshelve": {"unshelve": None},
    "unshelve_in_place": {"unshelve": None},
    "snapshot": {"createImage": {"name": "snapshot"}},
    "live_migrate": {"os-migrateLive": {"host": None, "block_migration": "auto"}},
    "restore": {"restore": None},
    "force_delete": {"forceDelete": None},
}
# time, server (its first word is its project), action, flavor or image; in order of time
PLAN = """
00:05 alpha-1 create small
00:20 alpha-2 create small
00:40 alpha-3 create medium
01:05 alpha-4 create small
01:30 alpha-5 create large
01:45 alpha-6 create tiny
02:10 beta-1 create medium
02:25 beta-2 create small
02:40 beta-3 create small
03:05 beta-4 create medium
03:20 beta-5 create small
03:35 beta-6 create large
04:05 gamma-1 fail small
04:20 gamma-2 create small
04:40 gamma-3 create small
04:50 gamma-2 delete
05:05 gamma-4 create small
05:15 alpha-3 resize large
05:20 gamma-5 create small
05:35 gamma-6 create small
05:50 alpha-3 revert
06:00:02 gamma-3 delete
06:15 delta-1 create medium
06:30 alpha-2 resize large
06:40 delta-2 create tiny
07:10 alpha-2 confirm
07:20 delta-3 create tiny
07:30 beta-4 resize large
08:05 beta-4 delete
08:20 alpha-4 rebuild 1
08:40 delta-7 create small
08:50 delta-8 no_host giant
09:10 alpha-5 stop
09:25 alpha-6 suspend
09:45 gamma-1 delete
09:55 delta-7 stop
10:05 beta-1 shelve
10:15 beta-2 shelve
10:30 beta-1 offload
10:45 delta-7 resize medium
11:05 beta-3 shelve
11:10 alpha-5 rebuild 1
11:20 beta-3 offload
11:30 delta-7 revert
11:40 alpha-5 start
12:05 delta-7 start
12:15 beta-5 delete_amid_resize xlarge
12:35 alpha-6 resume
12:45 delta-6 create large
13:00:04 alpha-4 rebuild 0
13:20 beta-6 stop
14:00:03 beta-6 resize lean
14:15 beta-1 unshelve
14:25 delta-6 live_migrate
14:40 beta-6 confirm
15:05 beta-2 unshelve_in_place
15:20 gamma-4 pause
15:30 delta-6 snapshot
16:10 gamma-4 unpause
16:25 beta-3 delete
16:40 gamma-4 reboot
16:50 delta-2 soft_delete
17:00:01 beta-6 start
17:20 gamma-5 rescue
17:40 delta-2 restore
18:00 alpha-2 delete
18:05 gamma-5 unrescue
18:25 gamma-6 resize large
21:05 alpha-3 delete
21:15 delta-3 soft_delete
21:20 alpha-5 delete
21:30 gamma-6 confirm
21:40 gamma-5 delete
21:50 delta-3 force_delete
22:10 beta-1 delete
22:40 delta-4 create large
23:20 delta-4 resize xlarge
23:50 delta-5 create small
"""
# hours of copying that the disk of this one takes: several audits fall into its resize
SLOW_RESIZE = ("gamma-6", 2.2 * 3600)


class Clock:
    """The clock that OpenStack reads: it runs as any, and leaps when told to."""

    def __init__(self, start: datetime) -> None:
        self._origin = start
        self._started = time.monotonic()

    def now(self) -> datetime:
        """The moment, aware."""
        return self._origin + timedelta(seconds=time.monotonic() - self._started)

    def leap(self, moment: datetime) -> None:
        """Be at `moment`; never back.

        Raises:
            RuntimeError: it is later than that already: the plan leaves too little time.
        """
        now = self.now()
        if moment < now:
            raise RuntimeError(f"it is {now} already, and the plan goes on at {moment}")
        self._origin += moment - now

    def utcnow(self, with_timezone: bool = False) -> datetime:
        """In place of `oslo_utils.timeutils.utcnow`."""
        return self.now() if with_timezone else self.now().replace(tzinfo=None)


class Sent:
    """What Nova has handed to the broker's driver."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._changed = threading.Condition()

    def record(self, topics: list[str], priority: str, message: dict[str, Any]) -> None:
        """A message went out on each of `topics`."""
        payload = message["payload"]
        payload = payload.get("nova_object.data", payload)
        with self._changed:
            self.messages += [
                {
                    "topic": topic,
                    "priority": priority,
                    "event_type": message["event_type"],
                    "message_id": message["message_id"],
                    "instance": payload.get("instance_id") or payload.get("uuid"),
                }
                for topic in topics
            ]
            self._changed.notify_all()

    def wait_for(self, server_id: str, event_types: set[str], since: int) -> None:
        """Return once the messages after the first `since` name all of the types for the server."""

        def missing() -> set[str]:
            return event_types - {
                message["event_type"]
                for message in self.messages[since:]
                if message["instance"] == server_id
            }

        with self._changed:
            if not self._changed.wait_for(lambda: not missing(), PATIENCE_SECONDS):
                raise RuntimeError(f"Nova did not send {missing()} of {server_id}")


class Day(test.TestCase):  # type: ignore[misc]
    """One day, as a test case since that is what Nova's fixtures want around them."""

    options: argparse.Namespace
    truth: dict[str, Any]

    def setUp(self) -> None:
        """Start the cloud, just before midnight."""
        self.clock = Clock(DAY - timedelta(minutes=5))
        self.sent = Sent()
        self.audits: queue.SimpleQueue[datetime] = queue.SimpleQueue()
        for hour in range(25):
            self.audits.put(
                DAY + timedelta(hours=hour, seconds=AUDIT_LAGS[hour % len(AUDIT_LAGS)])
            )
        self.next_audit = self.audits.get()
        self.servers: dict[str, str] = {}
        self.gates: dict[str, tuple[threading.Event, threading.Event]] = {}
        self.useFixture(fixtures.MonkeyPatch("oslo_utils.timeutils.utcnow", self.clock.utcnow))
        sqlalchemy.event.listen(sqlalchemy.engine.Engine, "connect", self._connected)
        if self.options.rows == "seconds":
            self.useFixture(
                fixtures.MonkeyPatch(
                    "sqlalchemy.dialects.sqlite.DATETIME.bind_processor", _in_whole_seconds()
                )
            )
        target_cell = context.target_cell
        super().setUp()
        self._name_the_cells(target_cell)
        warnings.simplefilter("ignore")  # the fixtures make errors of some that Nova never shows
        self._configure()
        self.useFixture(nova_fixtures.RealPolicyFixture())
        self.useFixture(nova_fixtures.NeutronFixture(self))
        self.useFixture(nova_fixtures.GlanceFixture(self))
        self.useFixture(nova_fixtures.CinderFixture(self))
        self.useFixture(functional_fixtures.PlacementFixture())
        self.useFixture(nova_fixtures.AllServicesCurrent())
        self.api = self.useFixture(nova_fixtures.OSAPIFixture(api_version="v2.1"))
        self._keep_changes()
        self.start_service("conductor")
        self.start_service("scheduler")
        for host in HOSTS:
            self._slow_down(self._start_compute(host).manager.driver)
        self.admin = self._client("admin", PROJECTS["alpha"], ["reader", "member", "admin"])
        for name, (vcpus, memory_mb, root_gb, ephemeral_gb) in FLAVORS.items():
            self.admin.post_flavor(
                {
                    "flavor": {
                        "id": name,
                        "name": name,
                        "vcpus": vcpus,
                        "ram": memory_mb,
                        "disk": root_gb,
                        "OS-FLV-EXT-DATA:ephemeral": ephemeral_gb,
                    }
                }
            )

    def _name_the_cells(self, target_cell: Any) -> None:
        """Whoever names no cell is in cell1.

        Nova's fixture has one variable for all threads say which cell that is, so that what a
        compute writes while the API reads cell0 is written there.
        """
        self.useFixture(fixtures.MonkeyPatch("nova.context.target_cell", target_cell))
        with target_cell(context.get_admin_context(), self.cell_mappings["cell1"]) as targeted:
            cell1 = targeted.db_connection

        def context_manager(of: Any) -> Any:
            return getattr(of, "db_connection", None) or cell1

        self.useFixture(
            fixtures.MonkeyPatch("nova.db.main.api.get_context_manager", context_manager)
        )

    def _configure(self) -> None:
        """As an operator who wants to bill would, with the real notifiers on the real broker."""
        self.flags(
            compute_driver="fake.FakeDriver",
            instance_usage_audit=True,
            instance_usage_audit_period="hour",
            service_down_time=10**8,  # the clock leaps, their heartbeats do not
            shelved_offload_time=-1,
            resize_confirm_window=0,
        )
        self.flags(cores=-1, ram=-1, instances=-1, group="quota")
        self.flags(
            notification_format=self.options.format,
            notify_on_state_change="vm_and_task_state",
            group="notifications",
        )
        self.flags(
            driver=["messagingv2"],
            transport_url=self.options.amqp_url.replace("amqp://", "rabbit://", 1),
            group="oslo_messaging_notifications",
        )
        rpc.init(test.CONF)  # RPC between the services stays within the process
        send = notify_messaging.MessagingDriver.notify

        def notify(driver: Any, ctxt: Any, message: Any, priority: str, retry: Any) -> None:
            send(driver, ctxt, message, priority, retry)
            self.sent.record(driver.topics, priority, message)

        self.useFixture(
            fixtures.MonkeyPatch("oslo_messaging.notify.messaging.MessagingDriver.notify", notify)
        )

    # -- Nova's rows

    def _connected(self, connection: Any, _record: Any) -> None:
        connection.create_function("nova_clock", 0, lambda: self.clock.now().isoformat())

    def _rows(self, statement: str, *, cell: str = "cell1") -> list[dict[str, Any]]:
        with (
            context.target_cell(context.get_admin_context(), self.cell_mappings[cell]) as targeted,
            database.get_engine(context=targeted).connect() as connection,
        ):
            found = connection.exec_driver_sql(statement).mappings().all()
            return [dict(row) for row in found]

    def _keep_changes(self) -> None:
        columns = (
            "uuid, project_id, vm_state, task_state, host, vcpus, memory_mb, root_gb,"
            " ephemeral_gb, launched_at, terminated_at, deleted_at, deleted"
        )
        new = columns.replace(" ", "").replace(",", ", NEW.")
        with (
            context.target_cell(
                context.get_admin_context(), self.cell_mappings["cell1"]
            ) as targeted,
            database.get_engine(context=targeted).begin() as connection,
        ):
            connection.exec_driver_sql(f"CREATE TABLE change (at, {columns})")
            for moment in ("INSERT", "UPDATE"):
                connection.exec_driver_sql(
                    f"CREATE TRIGGER change_{moment} AFTER {moment} ON instances BEGIN"
                    f" INSERT INTO change VALUES (nova_clock(), NEW.{new}); END"
                )

    # -- time

    def pass_until(self, moment: datetime) -> None:
        """It is `moment`, and the audits due until then have run."""
        while self.next_audit <= moment:
            due, self.next_audit = self.next_audit, self._audit_after()
            self.clock.leap(max(due, self.clock.now()))
            for compute in self.computes.values():
                compute.manager._instance_usage_audit(context.get_admin_context())
        self.clock.leap(moment)

    def _audit_after(self) -> datetime:
        try:
            return self.audits.get_nowait()
        except queue.Empty:
            return datetime.max.replace(tzinfo=UTC)

    def work(self, seconds: float) -> None:
        """So long passes for whoever is at work."""
        self.pass_until(self.clock.now() + timedelta(seconds=seconds))

    def _slow_down(self, driver: Any) -> None:
        def slowed(name: str, do: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                found = [item for item in (*args, *options.values()) if hasattr(item, "hostname")]
                server = found[0].display_name if found else ""
                if name == "spawn" and server == "gamma-1":
                    self.work(11.0)
                    raise RuntimeError("this one never starts")
                slow = name == "migrate_disk_and_power_off" and server == SLOW_RESIZE[0]
                self.work(SLOW_RESIZE[1] if slow else WORK_SECONDS[name])
                if name == "migrate_disk_and_power_off" and server in self.gates:
                    reached, opened = self.gates[server]
                    reached.set()
                    opened.wait(PATIENCE_SECONDS)
                return do(*args, **options)

            return call

        for name in WORK_SECONDS:
            setattr(driver, name, slowed(name, getattr(driver, name)))

    # -- the API

    def _client(self, user: str, project_id: str, roles: list[str]) -> Any:
        client = nova_client.TestOpenStackClient(
            user, self.api.base_url, project_id=project_id, roles=roles
        )
        client.microversion = "2.90"
        return client

    def _take(self, action: str, server: str, argument: str) -> None:
        """Do it by the API, and return when Nova has done all that it does about it."""
        project = PROJECTS[server.split("-")[0]]
        owner = self._client(f"user-of-{server.split('-')[0]}", project, ["reader", "member"])
        since = len(self.sent.messages)
        match action:
            case "create" | "fail" | "no_host":
                made = owner.post_server(
                    {
                        "server": {
                            "name": server,
                            "hostname": server,
                            "imageRef": IMAGES[0],
                            "flavorRef": argument,
                            "networks": "none",
                        }
                    }
                )
                self.servers[server] = made["id"]
            case "resize":
                owner.post_server_action(self.servers[server], {"resize": {"flavorRef": argument}})
            case "rebuild":
                owner.post_server_action(
                    self.servers[server], {"rebuild": {"imageRef": IMAGES[int(argument)]}}
                )
            case "delete":
                owner.delete_server(self.servers[server])
            case "soft_delete":
                with self._deleting_softly():
                    owner.delete_server(self.servers[server])
            case "delete_amid_resize":
                reached, _ = self.gates[server] = (threading.Event(), threading.Event())
                owner.post_server_action(self.servers[server], {"resize": {"flavorRef": argument}})
                if not reached.wait(PATIENCE_SECONDS):
                    raise RuntimeError("the resize did not come to the hypervisor")
                self.work(40.0)
                owner.delete_server(self.servers[server])
            case "offload" | "live_migrate":
                self.admin.post_server_action(self.servers[server], REQUESTS[action])
            case _:
                owner.post_server_action(self.servers[server], REQUESTS[action])
        server_id = self.servers[server]
        legacy, versioned = LAST_EVENTS[action]
        expected: set[str] = set()
        if self.options.format in ("both", "unversioned"):
            expected |= {f"compute.instance.{suffix}" for suffix in legacy}
        if self.options.format in ("both", "versioned"):
            expected |= {f"instance.{suffix}" for suffix in versioned}
        self.sent.wait_for(server_id, expected, since)
        if server in self.gates:
            self.gates.pop(server)[1].set()
        cell = "cell0" if action == "no_host" else "cell1"
        failed = action in ("fail", "no_host")
        self._wait_until_idle(server_id, cell, state="error" if failed else None)

    @contextlib.contextmanager
    def _deleting_softly(self) -> Iterator[None]:
        self.flags(reclaim_instance_interval=86_400)
        try:
            yield
        finally:
            self.flags(reclaim_instance_interval=0)

    def _wait_until_idle(self, server_id: str, cell: str, state: str | None) -> None:
        """Return when no task of the server's is under way, by Nova's rows."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            rows = self._rows(
                f"SELECT vm_state, task_state FROM instances WHERE uuid = '{server_id}'", cell=cell
            )
            running = self._rows(  # of an event begun again on another host one is ever finished
                "SELECT e.event FROM instance_actions_events e"
                " JOIN instance_actions a ON a.id = e.action_id"
                f" WHERE a.instance_uuid = '{server_id}' GROUP BY e.action_id, e.event"
                " HAVING count(e.finish_time) = 0",
                cell=cell,
            )
            idle = rows and not running and rows[0]["task_state"] is None
            if idle and (state is None or rows[0]["vm_state"] == state):
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"{server_id} never rests: {rows}, {running}")
            time.sleep(0.02)

    def test_day(self) -> None:
        """The day goes as planned; `truth` is what Nova's database says of it."""
        for line in PLAN.strip().splitlines():
            moment, server, action, *argument = line.split()
            hour, minute, second = (int(part) for part in f"{moment}:0".split(":")[:3])
            self.pass_until(DAY + timedelta(hours=hour, minutes=minute, seconds=second))
            try:
                self._take(action, server, argument[0] if argument else "")
            except Exception as exc:
                raise RuntimeError(f"the plan broke off at {line!r}") from exc
        self.pass_until(DAY + timedelta(hours=24, minutes=2))
        type(self).truth = {
            "day": DAY.isoformat(),
            "projects": PROJECTS,
            "servers": self.servers,
            "changes": self._rows("SELECT * FROM change ORDER BY rowid"),
            "instances": [
                row
                for cell in ("cell0", "cell1")
                for row in self._rows("SELECT * FROM instances ORDER BY id", cell=cell)
            ],
            "migrations": self._rows("SELECT * FROM migrations ORDER BY id"),
            "actions": self._rows(
                "SELECT a.instance_uuid, a.action, a.request_id, e.event, e.start_time,"
                " e.finish_time, e.result, e.host FROM instance_actions a"
                " JOIN instance_actions_events e ON e.action_id = a.id ORDER BY e.id"
            ),
            "sent": self.sent.messages,
        }


def _in_whole_seconds() -> Callable[..., Any]:
    """SQLite's writer of moments, made to round them half up to the second."""
    original = sqlite.DATETIME.bind_processor

    def bind_processor(self: Any, dialect: Any) -> Callable[[Any], Any]:
        process = original(self, dialect)

        def rounded(value: datetime | None) -> Any:
            if value is not None:
                value = (value + timedelta(microseconds=500_000)).replace(microsecond=0)
            return process(value)

        return rounded

    return bind_processor


def main() -> int:
    """Drive the day; 0 if all of it went as planned."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--amqp-url", required=True)
    parser.add_argument("--format", choices=("both", "unversioned", "versioned"), required=True)
    parser.add_argument("--rows", choices=("seconds", "microseconds"), required=True)
    parser.add_argument("--output", type=Path, required=True)
    Day.options = parser.parse_args()
    test.CONF.set_override("api_paste_config", f"{sys.prefix}/etc/nova/api-paste.ini", "wsgi")
    result = unittest.TestResult()
    day = Day("test_day")
    day.run(result)
    for _, trace in (*result.errors, *result.failures):
        sys.stderr.write(trace)
    if not result.wasSuccessful():
        return 1
    Day.options.output.write_text(json.dumps(Day.truth, default=str))
    return 0


if __name__ == "__main__":
    sys.exit(main())
