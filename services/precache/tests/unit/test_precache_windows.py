"""The receive window of a connection, on real sockets."""

import contextlib
import fcntl
import socket
import sys
import termios
from collections.abc import Iterator

import pytest

from hostler_precache.transfer import windows

MBIT = 125_000  # bytes per second


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        near = socket.create_connection(listening.getsockname())
        far, _ = listening.accept()
    with near, far:
        yield near, far


def unread_bytes(reader: socket.socket, sender: socket.socket) -> int:
    """How much waits at a reader who has read quickly, so that a window may grow, and then stops."""
    sender.setblocking(False)
    for _ in range(200):
        with contextlib.suppress(BlockingIOError):
            sender.send(bytes(1 << 16))
        reader.recv(1 << 20)
    with contextlib.suppress(BlockingIOError):
        while True:
            sender.send(bytes(1 << 16))
    return int.from_bytes(fcntl.ioctl(reader, termios.FIONREAD, bytes(4)), sys.byteorder)


@pytest.mark.parametrize(
    ("link", "round_trip_seconds", "expected"),
    [
        (
            100 * MBIT,
            0.0001,
            int(100 * MBIT * windows.QUEUE_SECONDS),
        ),  # a near peer: a short queue
        (100 * MBIT, 0.020, int(100 * MBIT * windows.QUEUE_SECONDS)),  # or a busy one
        (100 * MBIT, 0.040, int(100 * MBIT * 0.040)),  # a far one: what fits on the way
        (1 * MBIT, 0.0, windows.LEAST_BYTES),
    ],
)
def test_a_window_is_what_the_link_carries_in_a_short_queue_or_on_a_long_way(
    link: int, round_trip_seconds: float, expected: int
) -> None:
    assert windows.window_bytes(link, round_trip_seconds) == expected


def test_a_peer_cannot_have_more_under_way_than_the_window_and_its_overhead(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    near, far = pair
    assert windows.Window(near, 10 * MBIT).bytes == windows.LEAST_BYTES
    assert unread_bytes(near, far) <= 3 * windows.LEAST_BYTES


def test_a_link_that_is_faster_than_any_window_that_can_be_set_keeps_the_kernels_own(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    near, _ = pair
    before = near.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    window = windows.Window(near, 400_000 * MBIT)
    assert window.bytes is None
    assert near.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == before


def test_a_window_shrinks_when_the_peer_shows_that_it_is_near_and_never_grows(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    near, _ = pair
    trips = iter([0.060, 0.030, 0.040, 0.0001])
    monkeypatch.setattr(windows, "_round_trip_seconds", lambda _: next(trips))
    window = windows.Window(near, 100 * MBIT)
    seen = [window.bytes]
    for _ in range(3):
        window.fit()
        seen.append(window.bytes)
    expected = [int(100 * MBIT * seconds) for seconds in (0.060, 0.030, 0.030)]
    assert seen == [*expected, int(100 * MBIT * windows.QUEUE_SECONDS)]


def test_the_round_trip_of_a_connection_is_known(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    near, far = pair
    near.sendall(b"x")
    far.recv(1)
    far.sendall(b"x")
    near.recv(1)
    found = windows._round_trip_seconds(near)
    assert found is not None
    assert 0.0 < found < 5.0


def test_a_peer_of_whom_it_is_not_known_how_far_it_is_keeps_the_kernels_own_window(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    near, _ = pair
    before = near.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    monkeypatch.setattr(windows, "_round_trip_seconds", lambda _: None)
    assert windows.Window(near, 50 * MBIT).bytes is None
    assert near.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == before
