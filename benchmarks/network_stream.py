"""One end of a TCP stream whose payload rate is measured where it arrives.

python network_stream.py receive ADDRESS SECONDS    says its port, then the rate in bit/s
python network_stream.py send ADDRESS PORT          sends until nobody listens any more
"""

import socket
import sys
import time

CHUNK = bytes(256 * 1024)
SETTLING_SECONDS = 0.5
"""What a shaper's burst lets pass at once is over by then."""


def receive(address: str, seconds: float) -> None:
    """Take one connection and say how fast bytes came."""
    buffer = bytearray(len(CHUNK))
    with socket.create_server((address, 0)) as server:
        print(server.getsockname()[1], flush=True)
        connection, _ = server.accept()
    with connection:
        begin = time.monotonic() + SETTLING_SECONDS
        while time.monotonic() < begin:
            connection.recv_into(buffer)
        drain(connection, buffer)
        start, count = time.monotonic(), 0
        while (now := time.monotonic()) < start + seconds:
            count += connection.recv_into(buffer)
    print(8 * count / (now - start), flush=True)


def drain(connection: socket.socket, buffer: bytearray) -> None:
    """Nothing that came before now waits to be read: a machine that was busy elsewhere does not count as speed."""
    connection.setblocking(False)
    try:
        while connection.recv_into(buffer):
            pass
    except BlockingIOError:
        connection.setblocking(True)


def send(address: str, port: int) -> None:
    """Send until the other end closes."""
    with socket.create_connection((address, port)) as connection:
        try:
            while True:
                connection.sendall(CHUNK)
        except ConnectionError:
            return


if __name__ == "__main__":
    if sys.argv[1] == "receive":
        receive(sys.argv[2], float(sys.argv[3]))
    else:
        send(sys.argv[2], int(sys.argv[3]))
