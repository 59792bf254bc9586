"""Nova's cache of base images, worked by Nova's own code, run in the environment `nova`.

    python nova_cache.py NOVA.CONF      reads commands as lines of JSON, answers each with a line

What runs is Nova's: `imagebackend` makes the disks, `images.fetch_to_raw` fetches from the Glance that
the configuration names, `imagecache.ImageCacheManager.update` ages bases away, `LibvirtDriver.cache_image`
caches on request. What is not: no libvirt is connected to (none of these ask it), and privileged calls
are made in this process, which is root, and not by Nova's privsep daemon.
"""

import json
import os
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

os.environ["OS_NOVA_DISABLE_EVENTLET_PATCHING"] = "true"  # native threads, before any Nova import
warnings.simplefilter("ignore")

# the environment of this program is not the one that types are checked in
import nova.conf  # type: ignore[import-not-found]  # noqa: E402
import nova.privsep  # type: ignore[import-not-found]  # noqa: E402
from nova import config, context, objects, utils  # noqa: E402
from nova.db.main import api as database  # type: ignore[import-not-found]  # noqa: E402
from nova.db.main import models  # noqa: E402
from nova.notifications.objects import (  # type: ignore[import-not-found]  # noqa: E402
    aggregate as notifications,
)
from nova.virt.libvirt import (  # type: ignore[import-not-found]  # noqa: E402
    driver,
    imagebackend,
    imagecache,
)
from nova.virt.libvirt import utils as libvirt_utils  # noqa: E402
from oslo_concurrency import lockutils  # noqa: E402

CONF = nova.conf.CONF


class Host:
    """One compute host."""

    def __init__(self) -> None:
        # a token of any kind: the Glance that is asked looks at none
        self.context = context.RequestContext(
            user_id="nova", project_id="nova", is_admin=True, auth_token="none"
        )
        self.instances: dict[str, Any] = {}
        self.release = threading.Event()
        self.holder: threading.Thread | None = None

    def spawn(self, *, uuid: str, image_id: str, size_bytes: int) -> dict[str, Any]:
        """The root disk of an instance, as `LibvirtDriver._create_and_inject_local_root` has it made."""
        instance = objects.Instance(
            uuid=uuid, id=len(self.instances) + 1, host=CONF.host, image_ref=image_id, kernel_id=None,
            ramdisk_id=None, task_state=None, vm_state="active", os_type=None, system_metadata={},
        )  # fmt: skip
        self.instances[uuid] = instance
        folder = Path(libvirt_utils.get_instance_path(instance))
        folder.mkdir(exist_ok=True)
        backend = imagebackend.Backend(CONF.use_cow_images).by_name(instance, "disk")
        backend.cache(
            fetch_func=libvirt_utils.fetch_image,
            context=self.context,
            filename=imagecache.get_cache_fname(image_id),
            size=size_bytes,
            image_id=image_id,
            trusted_certs=None,
        )
        backing = libvirt_utils.get_disk_backing_file(str(folder / "disk"), basename=False)
        return {"disk": str(folder / "disk"), "backing": backing}

    def destroy(self, *, uuid: str) -> None:
        """The instance is gone, and its disks."""
        folder = Path(libvirt_utils.get_instance_path(self.instances.pop(uuid)))
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()

    def cache_image(self, *, image_id: str) -> bool:
        """`os-aggregates/{id}/images` on this host: whether Nova fetched anything."""
        fetched: bool = driver.LibvirtDriver.cache_image(None, self.context, image_id)
        return fetched

    def notifications(self, *, uuid: str, name: str, hosts: list[str]) -> dict[str, Any]:
        """What `aggregate.cache_images.start` and `.progress` carry, of an aggregate and its first host."""
        aggregate = objects.Aggregate(id=0, uuid=uuid, name=name, hosts=hosts, metadata={})
        start = notifications.AggregatePayload(aggregate)
        progress = notifications.AggregateCachePayload(aggregate, hosts[0], 1, len(hosts))
        progress.images_cached, progress.images_failed = [name], []
        for payload in (start, progress):
            payload.obj_reset_changes(recursive=True)  # as Nova does before it sends
        return {"start": start.obj_to_primitive(), "progress": progress.obj_to_primitive()}

    def clean(self) -> list[str]:
        """A pass of the cache manager; returns what is left in the cache."""
        manager = imagecache.ImageCacheManager()
        manager.update(self.context, list(self.instances.values()))
        return sorted(path.name for path in Path(manager.cache_dir).iterdir())

    def usage(self) -> int:
        """What the cache takes on disk, by Nova's count."""
        used: int = imagecache.ImageCacheManager().get_disk_usage()
        return used

    def hold(self, *, name: str) -> None:
        """A base's lock is held, until it is let go."""
        held = threading.Event()

        def wait() -> None:
            held.set()
            self.release.wait()

        locked = utils.synchronized(name, external=True, lock_path=f"{CONF.instances_path}/locks")
        self.release.clear()
        self.holder = threading.Thread(target=locked(wait))
        self.holder.start()
        held.wait()

    def let_go(self) -> None:
        """What `hold` held is free."""
        assert self.holder is not None
        self.release.set()
        self.holder.join()

    def can_lock(self, *, name: str) -> bool:
        """Whether the lock of a base could be had now."""
        try:
            with lockutils.lock(
                name, lock_file_prefix="nova-", external=True, blocking=False,
                lock_path=f"{CONF.instances_path}/locks",
            ):  # fmt: skip
                return True
        except lockutils.AcquireLockFailedException:
            return False


def main() -> None:
    """Answer commands until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is for the log
    config.parse_args(["nova-cache", "--config-file", sys.argv[1]])
    nova.privsep.sys_admin_pctxt.set_client_mode(False)
    objects.register_all()
    models.BASE.metadata.create_all(database.get_engine())
    host = Host()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = {"ok": getattr(host, command.pop("do"))(**command)}
        except Exception as exc:  # noqa: BLE001  the test decides what it means
            answer = {"error": f"{type(exc).__name__}: {exc}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
