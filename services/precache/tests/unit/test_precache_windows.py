"""The receive window of a connection, on real sockets."""

import contextlib
import fcntl
import socket
import sys
import termios
from collections.abc import Iterator

import pytest

from hostler_precache.transfer import round_trips, windows

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


ONE = int(100 * MBIT * windows.ONE_SECONDS)
QUEUE = int(100 * MBIT * windows.QUEUE_SECONDS)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which windows of a MiB may be set."""
    monkeypatch.setattr(windows, "_largest_bytes", lambda: 1 << 20)


@pytest.mark.parametrize(
    ("link", "round_trip_seconds", "receiving", "expected"),
    [
        (100 * MBIT, 0.0001, 1, ONE),  # a near peer: a short queue
        (100 * MBIT, 0.020, 1, ONE),  # or a busy one
        (100 * MBIT, 0.0001, 4, QUEUE // 4),
        (100 * MBIT, 0.040, 4, int(100 * MBIT * 0.040)),  # a far one: what fits on the way
        (1 * MBIT, 0.0, 1, windows.LEAST_BYTES),
        (100 * MBIT, 0.0001, 1000, windows.LEAST_BYTES),
    ],
)
def test_a_window_is_a_share_of_what_the_link_carries_in_a_short_queue_or_fits_on_a_long_way(
    link: int, round_trip_seconds: float, receiving: int, expected: int
) -> None:
    assert windows.window_bytes(link, round_trip_seconds, receiving=receiving) == expected


def test_a_peer_cannot_have_more_under_way_than_the_window_and_its_overhead(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    near, far = pair
    assert windows.Windows(1 * MBIT).open(near).bytes == windows.LEAST_BYTES
    assert unread_bytes(near, far) <= 3 * windows.LEAST_BYTES


def test_a_link_that_is_faster_than_any_window_that_can_be_set_keeps_the_kernels_own(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    near, _ = pair
    before = near.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    window = windows.Windows(400_000 * MBIT).open(near)
    assert window.bytes is None
    assert near.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == before


@pytest.mark.usefixtures("large")
def test_all_that_receive_share_what_the_link_carries_and_have_it_back_when_one_ends(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    shared = windows.Windows(100 * MBIT)
    one, other = (shared.open(end) for end in pair)
    shared.begin(one)
    assert one.bytes == ONE
    shared.begin(other)
    assert (one.bytes, other.bytes) == (QUEUE // 2, QUEUE // 2)
    assert pair[0].getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 2 * (QUEUE // 2)
    shared.end(other)
    shared.end(other)
    assert one.bytes == ONE
    other.fit()  # about to ask: it would be one of two
    assert other.bytes == QUEUE // 2


@pytest.mark.usefixtures("large")
def test_a_socket_that_was_closed_before_its_connection_was_told_keeps_nobody_from_a_share(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    near, far = pair
    shared = windows.Windows(100 * MBIT)
    closed, open_ = shared.open(near), shared.open(far)
    shared.begin(closed)
    near.close()
    for other in (open_, shared.open(far)):
        shared.begin(other)
    assert open_.bytes == QUEUE // 3


def test_a_share_is_never_larger_than_can_be_set(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "_largest_bytes", lambda: ONE - 1000)
    shared = windows.Windows(100 * MBIT)
    one, other = (shared.open(end) for end in pair)
    assert one.bytes is None
    shared.begin(one)
    shared.begin(other)
    assert one.bytes == QUEUE // 2
    shared.end(other)
    assert one.bytes == ONE - 1000


@pytest.mark.usefixtures("large")
def test_a_window_shrinks_when_the_peer_shows_that_it_is_near(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    near, _ = pair
    trips = iter([0.060, 0.030, 0.0001])
    monkeypatch.setattr(round_trips, "shortest_seconds", lambda _: next(trips))
    window = windows.Windows(100 * MBIT).open(near)
    seen = [window.bytes]
    for _ in range(2):
        window.fit()
        seen.append(window.bytes)
    assert seen == [int(100 * MBIT * 0.060), int(100 * MBIT * 0.030), ONE]


def test_the_round_trip_of_a_connection_is_known(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    near, far = pair
    near.sendall(b"x")
    far.recv(1)
    far.sendall(b"x")
    near.recv(1)
    found = round_trips.shortest_seconds(near)
    assert found is not None
    assert 0.0 < found < 5.0


def test_a_peer_of_whom_it_is_not_known_how_far_it_is_keeps_the_kernels_own_window(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    near, _ = pair
    before = near.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    monkeypatch.setattr(round_trips, "shortest_seconds", lambda _: None)
    assert windows.Windows(50 * MBIT).open(near).bytes is None
    assert near.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == before
