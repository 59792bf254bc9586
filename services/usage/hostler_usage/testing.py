"""A cloud that never was: what Nova and Cinder would send for lives written down beforehand.

Tests, demo and benchmarks need notifications whose truth is known. A life is a list of dated steps;
from it come the messages a cloud sends, in sending order, with the habits of the real ones: partial
audits before a resize, a flavor that flips before launched_at follows, launched_at rounded by the
database, three spellings of time in one body. Pure and without randomness: the same life gives the
same messages, ids included.
"""

import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Literal

from hostler_usage.history.observation import Observation
from hostler_usage.history.observe import observe
from hostler_usage.reading.envelope import Notification
from hostler_usage.reading.mapping_file import packaged
from hostler_usage.reading.normalise import Normaliser
from hostler_usage.reading.statement import Evidence, ResourceType

Action = Literal["create", "resize", "stop", "start", "rebuild", "delete"]
VolumeAction = Literal["create", "extend", "attach", "detach", "transfer", "delete"]
Payload = dict[str, object]

INSTANCE, VOLUME = ResourceType("instance"), ResourceType("volume")
LEGACY, VERSIONED = "notifications", "versioned_notifications"
_IDS = uuid.UUID("6f3e7a51-37c5-4b0e-8a3c-2f9a1f0d5b11")
_HOUR = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Flavor:
    """What an instance is sized by."""

    name: str
    vcpus: int
    memory_mb: int
    root_gb: int
    ephemeral_gb: int = 0


SMALL = Flavor("m1.small", 1, 2048, 20)
MEDIUM = Flavor("m1.medium", 2, 4096, 40)
LARGE = Flavor("m1.large", 4, 8192, 80, 20)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Something that happened to an instance, at the moment it took effect."""

    at: datetime
    action: Action
    flavor: Flavor | None = None
    image: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeStep:
    """Something that happened to a volume, at the moment it took effect."""

    at: datetime
    action: VolumeAction
    size_gb: int | None = None
    instance_id: str | None = None
    project_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One notification, before an envelope is put around it."""

    topic: str
    event_type: str
    publisher_id: str
    timestamp: datetime
    payload: Payload
    message_id: str = ""
    priority: str = "INFO"
    request_id: str = ""

    def body(self, envelope: Literal["v1", "v2"] = "v2") -> bytes:
        """The bytes oslo.messaging's driver messaging (v1) or messagingv2 (v2) would send."""
        inner = json.dumps(
            {
                "message_id": self.message_id,
                "publisher_id": self.publisher_id,
                "event_type": self.event_type,
                "priority": self.priority,
                "payload": self.payload,
                "timestamp": str(self.timestamp.replace(tzinfo=None)),
                "_unique_id": uuid.uuid5(_IDS, self.message_id).hex,
                "_context_request_id": self.request_id
                or f"req-{uuid.uuid5(_IDS, self.message_id)}",
            }
        )
        if envelope == "v1":
            return inner.encode()
        return json.dumps({"oslo.version": "2.0", "oslo.message": inner}).encode()


@dataclass(slots=True)
class _Now:
    """An instance as Nova's database has it while its life is played."""

    flavor: Flavor = SMALL
    image: str = "155d900f-4e14-4e4c-a73d-069cbf4541e6"
    state: str = "building"
    task: str | None = None
    launched_at: datetime | None = None
    deleted_at: datetime | None = None
    terminated_at: datetime | None = None
    extra: Payload = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceLife:
    """An instance and what happened to it, in order; the first step creates it."""

    instance_id: str
    project_id: str
    steps: tuple[Step, ...]
    host: str = "cmp-017"

    def messages(self, *, audits_until: datetime | None = None) -> list[Message]:
        """All messages both dialects send, ids given, in the order of their timestamps.

        With `audits_until` an hourly `exists` is sent for every full hour up to then.
        """
        sent = list(self._play(audits_until))
        sent.sort(key=lambda item: item.timestamp)
        return [_numbered(item, f"{self.instance_id}/{n}") for n, item in enumerate(sent)]

    def _play(self, audits_until: datetime | None) -> Iterator[Message]:
        now = _Now()
        born = self.steps[0].at - timedelta(seconds=30)
        hour = born.replace(minute=0, second=0, microsecond=0) + _HOUR
        for step in (*self.steps, None):
            limit = audits_until if step is None else step.at
            while (
                audits_until is not None and limit is not None and hour <= min(limit, audits_until)
            ):
                yield from self._audit(now, hour)
                hour += _HOUR
            if step is not None:
                request = f"req-{uuid.uuid5(_IDS, f'{self.instance_id}/{step.at}')}"
                for message in self._take(step, now, born):
                    yield replace(message, request_id=request)

    def _audit(self, now: _Now, hour: datetime) -> Iterator[Message]:
        ended = now.deleted_at
        if now.launched_at is None or now.launched_at > hour:
            return
        if ended is None or ended > hour - _HOUR:
            period = (hour - _HOUR, hour)
            yield from self._send("exists", "exists", hour + timedelta(seconds=30), now, period)

    def _take(self, step: Step, now: _Now, born: datetime) -> Iterator[Message]:
        at, ms = step.at, timedelta(milliseconds=1)
        second = timedelta(seconds=1)
        before = at - 60 * second  # when the audit is sent that precedes a new segment
        period = (before.replace(minute=0, second=0, microsecond=0), before)
        match step.action:
            case "create":
                now.flavor, now.image = step.flavor or now.flavor, step.image or now.image
                yield from self._send("create.start", "create.start", born, now)
                now.task = "spawning"
                yield from self._send("update", "update", at - 5 * second, now)
                now.state, now.task, now.launched_at = "active", None, at
                yield from self._send("update", "update", at + 200 * ms, now)
                now.extra = {"message": "Success"}
                yield from self._send("create.end", "create.end", at + 300 * ms, now)
                now.extra = {}
            case "resize":
                state = now.state
                now.task = "resize_prep"
                yield from self._send("exists", "exists", before, now, period)
                yield from self._send("resize.prep.end", "resize_prep.end", at - 59 * second, now)
                now.task = "resize_migrated"
                yield from self._send("resize.end", "resize.end", at - 20 * second, now)
                now.flavor = step.flavor or now.flavor
                yield from self._send("update", "update", at - 10 * second, now)
                now.task = "resize_finish"
                yield from self._send(
                    "finish_resize.start", "resize_finish.start", at - 5 * second, now
                )
                now.state, now.task, now.launched_at = "resized", None, at
                yield from self._send("update", "update", at + 100 * ms, now)
                yield from self._send("finish_resize.end", "resize_finish.end", at + 200 * ms, now)
                now.state = state
                yield from self._send("resize.confirm.end", "resize_confirm.end", at + second, now)
            case "stop" | "start":
                was, now.task = now.state, "powering-off"
                yield from self._send("update", "update", at - 2 * second, now)
                now.state, now.task = ("stopped" if step.action == "stop" else "active"), None
                name = "power_off.end" if step.action == "stop" else "power_on.end"
                if was != now.state:
                    yield from self._send("update", "update", at, now)
                yield from self._send(name, name, at + 100 * ms, now)
            case "rebuild":
                now.task = "rebuilding"
                yield from self._send("exists", "exists", before, now, period)
                now.image = step.image or now.image
                yield from self._send("update", "update", at - 50 * second, now)
                now.state, now.task, now.launched_at = "active", None, at
                yield from self._send("rebuild.end", "rebuild.end", at + 200 * ms, now)
            case "delete":
                now.task = "deleting"
                yield from self._send("delete.start", "delete.start", at - 2 * second, now)
                now.state, now.task, now.terminated_at = "deleted", None, at
                yield from self._send("update", "update", at, now)
                now.deleted_at = at
                yield from self._send("delete.end", "delete.end", at + 100 * ms, now)

    def _send(
        self,
        legacy: str,
        versioned: str,
        at: datetime,
        now: _Now,
        period: tuple[datetime, datetime] | None = None,
    ) -> Iterator[Message]:
        yield Message(
            topic=LEGACY,
            event_type=f"compute.instance.{legacy}",
            publisher_id=f"compute.{self.host}",
            timestamp=at,
            payload=self._legacy(now, at, period),
        )
        yield Message(
            topic=VERSIONED,
            event_type=f"instance.{versioned}",
            publisher_id=f"nova-compute:{self.host}",
            timestamp=at + timedelta(milliseconds=3),
            payload=self._versioned(now, period),
        )

    def _legacy(
        self, now: _Now, at: datetime, period: tuple[datetime, datetime] | None
    ) -> Payload:
        # fresh from the compute process: with its fraction; read back from the database: rounded
        launched_at = now.launched_at
        if launched_at is not None and at - launched_at > timedelta(seconds=1):
            launched_at = _rounded(launched_at)
        payload: Payload = {
            "tenant_id": self.project_id,
            "user_id": "1e3ce043029547f1a61c1996d1a531a2",
            "instance_id": self.instance_id,
            "display_name": "web-1",
            "instance_type": now.flavor.name,
            "instance_type_id": 2,
            "instance_flavor_id": "2",
            "memory_mb": now.flavor.memory_mb,
            "vcpus": now.flavor.vcpus,
            "root_gb": now.flavor.root_gb,
            "ephemeral_gb": now.flavor.ephemeral_gb,
            "disk_gb": now.flavor.root_gb + now.flavor.ephemeral_gb,
            "host": self.host,
            "node": f"{self.host}.example",
            "availability_zone": "nova",
            "created_at": str(self.steps[0].at - timedelta(seconds=30)),
            "launched_at": _strtime(launched_at),
            "deleted_at": _strtime(now.deleted_at),
            "terminated_at": _strtime(now.terminated_at),
            "image_ref_url": f"http://10.0.2.15:9292/images/{now.image}",
            "state": now.state,
            "state_description": now.task or "",
            "progress": "",
            "metadata": {},
            **now.extra,
        }
        if period is not None:
            payload["audit_period_beginning"] = str(period[0].replace(tzinfo=None))
            payload["audit_period_ending"] = str(period[1].replace(tzinfo=None))
            payload["bandwidth"] = {}
        return payload

    def _versioned(self, now: _Now, period: tuple[datetime, datetime] | None) -> Payload:
        data: Payload = {
            "uuid": self.instance_id,
            "tenant_id": self.project_id,
            "user_id": "1e3ce043029547f1a61c1996d1a531a2",
            "display_name": "web-1",
            "host": self.host,
            "node": f"{self.host}.example",
            "availability_zone": "nova",
            "image_uuid": now.image,
            "state": now.state,
            "task_state": now.task,
            "launched_at": _zulu(now.launched_at),
            "deleted_at": _zulu(now.deleted_at),
            "terminated_at": _zulu(now.terminated_at),
            "flavor": _object(
                "FlavorPayload",
                {
                    "name": now.flavor.name,
                    "vcpus": now.flavor.vcpus,
                    "memory_mb": now.flavor.memory_mb,
                    "root_gb": now.flavor.root_gb,
                    "ephemeral_gb": now.flavor.ephemeral_gb,
                    "swap": 0,
                },
            ),
        }
        if period is not None:
            data["audit_period"] = _object(
                "AuditPeriodPayload",
                {
                    "audit_period_beginning": _zulu(period[0]),
                    "audit_period_ending": _zulu(period[1]),
                },
            )
        return _object("InstanceActionPayload", data)


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeLife:
    """A volume and what happened to it, in order; the first step creates it."""

    volume_id: str
    project_id: str
    steps: tuple[VolumeStep, ...]
    volume_type: str = "3a9a398b-7e3b-40da-b09e-2115ad8cd68b"

    def messages(self, *, audits_until: datetime | None = None) -> list[Message]:
        """All messages Cinder sends, ids given, in the order of their timestamps."""
        sent = list(self._play(audits_until))
        sent.sort(key=lambda item: item.timestamp)
        return [_numbered(item, f"{self.volume_id}/{n}") for n, item in enumerate(sent)]

    def resent(self, at: datetime) -> list[Message]:
        """What `cinder-volume-usage-audit --send_actions`, run `at` that time, sends again."""
        born = self.steps[0].at
        last = self.steps[-1]
        size, owner = 0, self.project_id
        for step in self.steps:
            size, owner = step.size_gb or size, step.project_id or owner
        sent = []
        for action, moment in (
            ("create", born),
            ("delete", last.at if last.action == "delete" else None),
        ):
            if moment is not None:
                extra: Payload = {
                    "audit_period_beginning": str(moment),
                    "audit_period_ending": str(moment),
                }
                for phase in ("start", "end"):
                    payload = self._payload(size, owner, None, "available") | extra
                    sent.append(self._message(f"{action}.{phase}", at, payload))
        return [
            _numbered(item, f"{self.volume_id}/resent/{at}/{n}") for n, item in enumerate(sent)
        ]

    def _play(self, audits_until: datetime | None) -> Iterator[Message]:
        size, owner, server = 0, self.project_id, None
        ms = timedelta(milliseconds=1)
        hour = self.steps[0].at.replace(minute=0, second=0, microsecond=0) + _HOUR
        for step in (*self.steps, None):
            limit = audits_until if step is None else step.at
            while (
                audits_until is not None and limit is not None and hour <= min(limit, audits_until)
            ):
                period: Payload = {
                    "audit_period_beginning": str(hour - _HOUR),
                    "audit_period_ending": str(hour),
                }
                payload = self._payload(size, owner, server, "available") | period
                yield self._message("exists", hour + timedelta(seconds=4), payload)
                hour += _HOUR
            if step is None:
                return
            name = {"extend": "resize", "transfer": "transfer.accept"}.get(
                step.action, step.action
            )
            status = {"attach": "in-use", "delete": "deleting"}.get(step.action, "available")
            before = self._payload(size, owner, server, status)
            request = f"req-{uuid.uuid5(_IDS, f'{self.volume_id}/{step.at}')}"
            start = self._message(f"{name}.start", step.at - 500 * ms, before)
            yield replace(start, request_id=request)
            size, owner = step.size_gb or size, step.project_id or owner
            server = {"attach": step.instance_id, "detach": None}.get(step.action, server)
            after = self._payload(size, owner, server, status)
            lag = 300 * ms if step.action == "create" else 0 * ms
            end = self._message(f"{name}.end", step.at + lag, after)
            yield replace(end, request_id=request)
            if step.action == "delete":
                return

    def _message(self, action: str, at: datetime, payload: Payload) -> Message:
        return Message(
            topic=LEGACY,
            event_type=f"volume.{action}",
            publisher_id="volume.ctl1@ceph#rbd",
            timestamp=at,
            payload=payload,
        )

    def _payload(self, size: int, owner: str, server: str | None, status: str) -> Payload:
        born = self.steps[0].at
        return {
            "tenant_id": owner,
            "host": "ctl1@ceph#rbd",
            "user_id": "bcb7746c7a41472d88a1ffac89ba6a9b",
            "availability_zone": "nova",
            "volume_id": self.volume_id,
            "volume_type": self.volume_type,
            "display_name": "db-data",
            "launched_at": born.isoformat(),
            "created_at": (born - timedelta(seconds=1)).isoformat(),
            "status": status,
            "snapshot_id": None,
            "size": size,
            "metadata": [],
            "volume_attachment": [{"instance_uuid": server}] if server else [],
        }


def _numbered(message: Message, seed: str) -> Message:
    return replace(message, message_id=str(uuid.uuid5(_IDS, seed)))


def _object(name: str, data: Mapping[str, object]) -> Payload:
    return {
        "nova_object.name": name,
        "nova_object.namespace": "nova",
        "nova_object.version": "1.0",
        "nova_object.data": dict(data),
    }


def _rounded(moment: datetime) -> datetime:
    return (moment + timedelta(milliseconds=500)).replace(microsecond=0)


def _strtime(moment: datetime | None) -> str:
    return "" if moment is None else moment.strftime("%Y-%m-%dT%H:%M:%S.%f")


def _zulu(moment: datetime | None) -> str | None:
    return None if moment is None else moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def observed(notification: Notification) -> list[Observation]:
    """All that follows from a notification under the packaged mapping, whichever resource it is of."""
    mapping = packaged()
    evidence = Evidence(
        event_time=notification.timestamp,
        message_id=notification.message_id,
        digest=notification.digest,
    )
    return [
        observation
        for said in Normaliser(mapping).read(notification, region="r1").said
        if said.statement is not None
        for observation in observe(
            said.statement, mapping.resources[said.resource.resource_type], evidence
        )
    ]
