"""The bare parts of a host that passes an image on, each alone, and what they cost: one JSON line of CPU seconds.

    python benchmarks/bare_transfer.py receive URL TOKEN FILE     the body of one GET, from the socket into a file
    python benchmarks/bare_transfer.py hash FILE                  sha256 of its bytes, already in memory
    python benchmarks/bare_transfer.py send FILE                  os.sendfile to a socket that somebody drains
    python benchmarks/bare_transfer.py drain URL TOKEN SIZE PIECE every piece by a GET of its own, and thrown away

Blocking calls on one block of 1 MiB, nothing else: the least that CPython can do. `drain` is the receiving end for
others, which costs nothing that is measured. `precache_cost` runs it.
"""

import hashlib
import json
import os
import resource
import socket
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

from hostler_precache.transfer import congestion

BLOCK = 1 << 20
DRAINING = 2


def cpu_seconds() -> float:
    """User and system time of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def receive(url: str, token: str, path: str) -> float:
    """The whole image is in the file."""
    parts = urlsplit(url)
    block = memoryview(bytearray(BLOCK))
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    with socket.create_connection((parts.hostname or "", parts.port or 80)) as connection:
        before = cpu_seconds()
        count, left = _ask(connection, url, token, block, "")
        os.write(file, block[count[0] : count[1]])
        left -= count[1] - count[0]
        while left:
            got = connection.recv_into(block)
            os.write(file, block[:got])
            left -= got
    used = cpu_seconds() - before
    os.close(file)
    return used


def hash_all(path: str) -> float:
    """So many bytes have been hashed as the file has."""
    block = memoryview(Path(path).open("rb").read(BLOCK))  # noqa: SIM115  ends with the process
    digest = hashlib.sha256()
    before = cpu_seconds()
    for _ in range(os.stat(path).st_size // BLOCK):  # noqa: PTH116  a number, nothing else
        digest.update(block)
    return cpu_seconds() - before


def send(path: str) -> float:
    """The file has gone through a socket."""
    file = os.open(path, os.O_RDONLY)
    size = os.fstat(file).st_size
    with socket.create_server(("127.0.0.1", 0)) as listener:
        drained = os.fork()
        if drained == 0:
            with socket.create_connection(listener.getsockname()) as connection:
                block = bytearray(BLOCK)
                while connection.recv_into(block, 0, socket.MSG_TRUNC):
                    pass
            os._exit(0)
        connection, _ = listener.accept()
    before, offset = cpu_seconds(), 0
    with connection:
        # as the agent's are: pacing, for one, has a price that is no part of sending a file
        congestion.settle(connection)
        while offset < size:
            offset += os.sendfile(connection.fileno(), file, offset, size - offset)
    used = cpu_seconds() - before
    os.waitpid(drained, 0)
    return used


def drain(url: str, token: str, size: int, piece: int) -> float:
    """Every piece of the image has come once, on two connections."""
    starts = range(0, size, piece)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            _drain(url, token, size, piece, starts[number::DRAINING])
        except BaseException as exc:  # noqa: BLE001  told by the main thread
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(DRAINING)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return 0.0


def _drain(url: str, token: str, size: int, piece: int, starts: range) -> None:
    parts = urlsplit(url)
    block = memoryview(bytearray(BLOCK))
    connection = socket.create_connection((parts.hostname or "", parts.port or 80))
    with connection:
        for start in starts:
            stop = min(size, start + piece)
            count, left = _ask(
                connection, url, token, block, f"Range: bytes={start}-{stop - 1}\r\n"
            )
            left -= count[1] - count[0]
            while left:
                left -= connection.recv_into(block, 0, socket.MSG_TRUNC)


def _ask(
    connection: socket.socket, url: str, token: str, block: memoryview, field: str
) -> tuple[tuple[int, int], int]:
    """Where in the block the body begins and ends so far, and how long it is."""
    head = f"GET {urlsplit(url).path} HTTP/1.1\r\nHost: x\r\nHostler-Host: bench\r\n{field}"
    connection.sendall(f"{head}Authorization: Bearer {token}\r\n\r\n".encode())
    filled = 0
    while (end := bytes(block[:filled]).find(b"\r\n\r\n")) < 0:
        filled += connection.recv_into(block[filled : filled + 4096])
    lines = bytes(block[:end]).split(b"\r\n")
    if lines[0].split()[1] not in (b"200", b"206"):
        raise RuntimeError(bytes(block[:filled]).decode())
    length = next(line for line in lines if line.lower().startswith(b"content-length:"))
    return (end + 4, filled), int(length.partition(b":")[2])


def main() -> None:
    """Do what is asked and say what it took."""
    what, *rest = sys.argv[1:]
    match what:
        case "receive":
            used = receive(*rest)
        case "hash":
            used = hash_all(*rest)
        case "send":
            used = send(*rest)
        case _:
            url, token, size, piece = rest
            used = drain(url, token, int(size), int(piece))
    print(json.dumps({"cpu_seconds": used}))


if __name__ == "__main__":
    main()
