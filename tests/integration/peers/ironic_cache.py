"""Ironic's cache of instance images, worked by Ironic's own code, run in the environment `ironic`.

    python ironic_cache.py IRONIC.CONF      reads commands as lines of JSON, answers each with a line

What runs is `InstanceImageCache` of ironic.drivers.modules: it fetches from the Glance that the configuration
names, links what it has to where a deployment wants it, and cleans up. There is no conductor around it.
"""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")

# the environment of this program is not the one that types are checked in
from ironic.common import context  # type: ignore[import-not-found]  # noqa: E402
from ironic.conf import CONF  # type: ignore[import-not-found]  # noqa: E402
from ironic.drivers.modules import deploy_utils  # type: ignore[import-not-found]  # noqa: E402


class Conductor:
    """What of a conductor has to do with images."""

    def __init__(self) -> None:
        self.context = context.RequestContext(is_admin=True)
        self.cache = deploy_utils.InstanceImageCache()

    def deploy(self, *, image_id: str, to: str) -> int:
        """A deployment has the image at a path; returns the inode."""
        Path(to).parent.mkdir(parents=True, exist_ok=True)
        self.cache.fetch_image(
            image_id, to, ctx=self.context, force_raw=True, expected_format="raw"
        )
        return Path(to).stat().st_ino

    def clean(self) -> list[str]:
        """Ironic has reclaimed all the room that it can; returns what is left."""
        self.cache.clean_up(amount=1 << 50)
        return sorted(path.name for path in Path(self.cache.master_dir).iterdir())


def main() -> None:
    """Answer commands until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is for the log
    CONF(["--config-file", sys.argv[1]], project="ironic")
    conductor = Conductor()
    for line in sys.stdin:
        command: dict[str, Any] = json.loads(line)
        try:
            answer = {"ok": getattr(conductor, command.pop("do"))(**command)}
        except Exception as exc:  # noqa: BLE001  the test decides what it means
            answer = {"error": f"{type(exc).__name__}: {exc}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
