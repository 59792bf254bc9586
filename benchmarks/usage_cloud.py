"""What a cloud of a given size would have sent by now: real message shapes, known truth, no randomness of its own.

The bodies are Nova's legacy notifications with every field that `info_from_instance` and `notify_usage_exists`
write (nova/notifications/base.py, nova/compute/utils.py), in the envelope of oslo.messaging's driver messagingv2:
JSON within JSON, 2 to 3 kB each.
"""

import hashlib
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

HOUR = timedelta(hours=1)
EXCHANGE, ROUTING_KEY = "nova", "notifications.info"


@dataclass(frozen=True, slots=True)
class Flavor:
    """A size, as Nova's database has it."""

    number: int
    name: str
    vcpus: int
    memory_mb: int
    root_gb: int
    ephemeral_gb: int = 0


FLAVORS = (
    Flavor(1, "m1.tiny", 1, 512, 1),
    Flavor(2, "m1.small", 1, 2048, 20),
    Flavor(3, "m1.medium", 2, 4096, 40),
    Flavor(4, "m1.large", 4, 8192, 80),
    Flavor(5, "m1.xlarge", 8, 16384, 160, 40),
)
IMAGES = tuple(str(uuid.uuid5(uuid.NAMESPACE_DNS, f"image-{number}")) for number in range(20))


def digest_hex(text: str) -> str:
    """32 hex digits, as Keystone's ids have them."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def digest_uuid(text: str) -> str:
    """A uuid in the usual spelling."""
    return str(uuid.UUID(hashlib.blake2b(text.encode(), digest_size=16).hexdigest(), version=4))


def full_hours_ago(hours: int) -> datetime:
    """The full hour that was so many hours before the last one."""
    return datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - hours * HOUR


@dataclass(frozen=True, slots=True)
class Window:
    """A span of time, with its start and without its end."""

    start: datetime
    end: datetime


def last_month(days: int) -> Window:
    """So many days, which ended when this month began."""
    end = datetime.now(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return Window(end - timedelta(days=days), end)


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """The hourly audits of a cloud whose instances have all run for long: `messages` in the order of their times.

    Each hour every instance sends one `compute.instance.exists`; hosts tell one after the other, within the first ten
    minutes after the hour. So consecutive messages are of different instances, and an instance comes again after
    `instances` messages.
    """

    messages: int
    hours: int
    start: datetime

    @property
    def instances(self) -> int:
        """How many instances the cloud has; the last hour may be told in part."""
        return -(-self.messages // self.hours)

    @property
    def end(self) -> datetime:
        """When the last audited period ends."""
        return self.start + self.hours * HOUR

    @property
    def instance_hours(self) -> int:
        """What was used between `start` and `end`: an instance that is not said to be deleted goes on."""
        return self.instances * self.hours

    def describe(self) -> str:
        """Its shape in a line."""
        return (
            f"{self.messages:,} compute.instance.exists of {self.instances:,} instances"
            f" ({-(-self.instances // 20)} projects) over {self.hours} hours from"
            f" {self.start:%F %H:%M}Z, in time order"
        )

    def bodies(self) -> Iterator[bytes]:
        """The bodies as oslo.messaging would send them."""
        instances = [_Instance.numbered(number, self.start) for number in range(self.instances)]
        spread = timedelta(minutes=10) / self.instances
        sent = 0
        for hour in range(self.hours):
            begin = self.start + hour * HOUR
            for place, instance in enumerate(instances):
                if sent == self.messages:
                    return
                at = begin + HOUR + timedelta(seconds=4) + place * spread
                yield instance.exists(begin, at)
                sent += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Instance:
    """One running instance."""

    instance_id: str
    project_id: str
    user_id: str
    flavor: Flavor
    image: str
    host: str
    number: int
    launched_at: datetime

    @classmethod
    def numbered(cls, number: int, start: datetime) -> "_Instance":
        project = number // 20
        return cls(
            instance_id=digest_uuid(f"instance {number}"),
            project_id=digest_hex(f"project {project}"),
            user_id=digest_hex(f"user {project} {number % 3}"),
            flavor=FLAVORS[number % len(FLAVORS)],
            image=IMAGES[number % len(IMAGES)],
            host=f"cmp-{number // 25:04}",
            number=number,
            launched_at=start - timedelta(days=1 + number % 60, seconds=number % 3601),
        )

    def exists(self, begin: datetime, at: datetime) -> bytes:
        """The audit of the hour from `begin`, sent at `at`."""
        seed = f"{self.instance_id} {begin.isoformat()}"
        created_at = self.launched_at - timedelta(seconds=31)
        payload = {
            "tenant_id": self.project_id,
            "user_id": self.user_id,
            "instance_id": self.instance_id,
            "display_name": f"web-{self.number}",
            "reservation_id": f"r-{digest_hex(self.instance_id)[:8]}",
            "hostname": f"web-{self.number}",
            "instance_type": self.flavor.name,
            "instance_type_id": self.flavor.number,
            "instance_flavor_id": str(self.flavor.number),
            "architecture": None,
            "memory_mb": self.flavor.memory_mb,
            "disk_gb": self.flavor.root_gb + self.flavor.ephemeral_gb,
            "vcpus": self.flavor.vcpus,
            "root_gb": self.flavor.root_gb,
            "ephemeral_gb": self.flavor.ephemeral_gb,
            "host": self.host,
            "node": f"{self.host}.example.net",
            "availability_zone": f"az{self.number % 3}",
            "cell_name": "",
            "created_at": created_at.strftime("%Y-%m-%d %H:%M:%S+00:00"),
            "terminated_at": "",
            "deleted_at": "",
            "launched_at": self.launched_at.strftime("%Y-%m-%dT%H:%M:%S.000000"),
            "image_ref_url": f"http://10.0.2.15:9292/images/{self.image}",
            "os_type": None,
            "kernel_id": "",
            "ramdisk_id": "",
            "state": "active",
            "state_description": "",
            "progress": "",
            "access_ip_v4": None,
            "access_ip_v6": None,
            "metadata": {"role": "web", "stack": digest_hex(self.project_id)},
            "image_meta": {
                "base_image_ref": self.image,
                "container_format": "bare",
                "disk_format": "qcow2",
                "min_disk": str(self.flavor.root_gb),
                "min_ram": "512",
                "os_type": "linux",
                "os_distro": "ubuntu",
                "os_version": "24.04",
            },
            "audit_period_beginning": begin.strftime("%Y-%m-%d %H:%M:%S"),
            "audit_period_ending": (begin + HOUR).strftime("%Y-%m-%d %H:%M:%S"),
            "bandwidth": {
                "public": {
                    "bw_in": int(digest_hex(seed)[:8], 16),
                    "bw_out": int(digest_hex(seed)[8:16], 16),
                }
            },
        }
        return enveloped(
            seed, f"compute.{self.host}", "compute.instance.exists", at=at, payload=payload
        )


def enveloped(
    seed: str, publisher_id: str, event_type: str, *, at: datetime, payload: dict[str, object]
) -> bytes:
    """A notification in the v2 envelope, with ids made from the seed and an administrator's context."""
    inner: dict[str, object] = {
        "message_id": digest_uuid(f"message {seed}"),
        "publisher_id": publisher_id,
        "event_type": event_type,
        "priority": "INFO",
        "payload": payload,
        "timestamp": at.strftime("%Y-%m-%d %H:%M:%S.%f"),
        "_unique_id": digest_hex(f"unique {seed}"),
        "_context_request_id": f"req-{digest_uuid(f'request {seed}')}",
        "_context_global_request_id": None,
        "_context_user_id": None,
        "_context_project_id": None,
        "_context_domain_id": None,
        "_context_user_domain_id": None,
        "_context_project_domain_id": None,
        "_context_is_admin": True,
        "_context_read_only": False,
        "_context_show_deleted": False,
        "_context_read_deleted": "no",
        "_context_roles": [],
        "_context_timestamp": at.strftime("%Y-%m-%dT%H:%M:%S.%f"),
    }
    return json.dumps({"oslo.version": "2.0", "oslo.message": json.dumps(inner)}).encode()
