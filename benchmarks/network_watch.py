"""Says when files appear, and when the first payload reached a host; runs on the switch of a `network_rig`.

    python network_watch.py    commands and answers are lines of JSON, on stdin and stdout

First line in: `{"directories": {host: directory}, "file": name, "ports": {host: interface}, "first_bytes": n}`. It
answers `{"ready": true}` when it watches. A second line, any, sets the counters to zero: from then on the first moment
at which a host's port has passed more than `first_bytes` is `{"first": host, "at": moment}`, read at most 2 ms late.
A file that appears under its name, by a rename, a link or a creation, is `{"file": host, "at": moment}`, told by
inotify. Moments are of CLOCK_MONOTONIC. It ends with its stdin.
"""

import ctypes
import json
import os
import select
import struct
import sys
import time
from pathlib import Path

COUNTER_SECONDS = 0.002
_IN_CREATE, _IN_MOVED_TO = 0x100, 0x80
_EVENT = struct.Struct("iIII")


def say(**answer: object) -> None:
    """One line."""
    print(json.dumps(answer), flush=True)


class Counters:
    """Bytes that the switch has sent to each port."""

    def __init__(self) -> None:
        self._file = Path("/proc/net/dev").open("rb", buffering=0)  # noqa: SIM115  as long as the process

    def read(self) -> dict[str, int]:
        """Interface -> bytes sent."""
        self._file.seek(0)
        lines = self._file.read().decode().splitlines()[2:]
        pairs = (line.split(":", 1) for line in lines)
        return {name.strip(): int(numbers.split()[8]) for name, numbers in pairs}


def watch(directories: dict[str, str]) -> tuple[int, dict[int, str]]:
    """An inotify descriptor, and whose directory each of its watches is."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_NONBLOCK)
    hosts = {}
    for host, directory in directories.items():
        number = libc.inotify_add_watch(fd, directory.encode(), _IN_CREATE | _IN_MOVED_TO)
        if number < 0:
            raise OSError(ctypes.get_errno(), f"cannot watch {directory}")
        hosts[number] = host
    return fd, hosts


def names(data: bytes) -> list[tuple[int, str]]:
    """(watch, file name) of each inotify event."""
    found, at = [], 0
    while at < len(data):
        number, _, _, length = _EVENT.unpack_from(data, at)
        at += _EVENT.size
        found.append((number, data[at : at + length].rstrip(b"\0").decode(errors="replace")))
        at += length
    return found


def main() -> None:
    """Watch until stdin ends."""
    told = json.loads(sys.stdin.readline())
    counters, file = Counters(), told["file"]
    fd, hosts = watch(told["directories"])
    say(ready=True)
    waiting: dict[str, str] = {}
    base: dict[str, int] = {}
    stdin = sys.stdin.fileno()
    while True:
        timeout = COUNTER_SECONDS if waiting else None
        readable, _, _ = select.select([stdin, fd], [], [], timeout)
        now = time.monotonic()
        if fd in readable:
            for number, name in names(os.read(fd, 65536)):
                if name == file:
                    say(file=hosts[number], at=now)
        if stdin in readable:
            if not os.read(stdin, 4096):
                return
            waiting, base = dict(told["ports"]), counters.read()
        if waiting:
            current = counters.read()
            for host, port in list(waiting.items()):
                if current[port] - base[port] > told["first_bytes"]:
                    del waiting[host]
                    say(first=host, at=time.monotonic())


if __name__ == "__main__":
    main()
