"""Runs inside each container of the compose stack: what its process may do is what docker-compose.yml promises.

Standard library only. Prints what does not hold, a line each; none and an exit code of 0 if all of it holds.
"""

import errno
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

NOBODY = "65532"


def broken_promises() -> Iterator[str]:
    """What process 1 of this container is or may do, against what it should."""
    status = dict(
        line.split(":\t", 1)
        for line in Path("/proc/1/status").read_text().splitlines()
        if ":\t" in line
    )
    if set(status["Uid"].split() + status["Gid"].split()) != {NOBODY}:
        yield f"it runs as {status['Uid']}, group {status['Gid']}"
    for held in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        if int(status[held], 16):
            yield f"it has capabilities: {held} {status[held]}"
    if status["NoNewPrivs"].strip() != "1":
        yield "it may gain privileges"
    argv = Path("/proc/1/cmdline").read_text().split("\0")
    if any("://" in argument for argument in argv):
        yield "an address, and with it a password, is in its argv"
    if not os.statvfs("/").f_flag & os.ST_RDONLY:
        yield "its root file system is mounted read-write"
    for directory in ("/", "/etc", sys.prefix):
        try:
            Path(directory, "written").touch()
        except OSError as exc:
            if exc.errno not in (errno.EROFS, errno.EACCES):
                yield f"{directory}: {exc}"
        else:
            yield f"it can write in {directory}"
    with tempfile.NamedTemporaryFile(dir="/tmp") as file:
        file.write(b"there is room for what is in transit")


if __name__ == "__main__":
    found = list(broken_promises())
    print(*found, sep="\n", end="\n" if found else "")  # noqa: T201  a program
    sys.exit(bool(found))
