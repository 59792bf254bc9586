"""The congestion control of a connection, on real sockets."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostler_precache.transfer import congestion, round_trips

AVAILABLE = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")


@pytest.fixture
def sending() -> Iterator[socket.socket]:
    """One end of a connection within this machine, with another control than Reno, where the kernel has one."""
    others = [name.encode() for name in AVAILABLE.read_text().split() if name != "reno"]
    with socket.create_server(("127.0.0.1", 0)) as listening:
        here = socket.create_connection(listening.getsockname())
        there, _ = listening.accept()
    with here, there:
        for name in others:
            try:
                here.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name)
            except PermissionError:  # only root may have this one
                continue
            break
        yield here


def control(connection: socket.socket) -> bytes:
    """The name of its congestion control."""
    return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")


def test_a_near_peer_is_sent_to_with_reno(sending: socket.socket) -> None:
    congestion.settle(sending)
    assert control(sending) == b"reno"
    congestion.settle(sending)  # before each piece
    assert control(sending) == b"reno"


@pytest.mark.parametrize("seconds", [round_trips.FAR_SECONDS, 0.2, None])
def test_a_peer_that_is_far_or_not_known_yet_is_sent_to_as_the_host_is_set_up_to(
    sending: socket.socket, monkeypatch: pytest.MonkeyPatch, seconds: float | None
) -> None:
    before = control(sending)
    monkeypatch.setattr(round_trips, "shortest_seconds", lambda _: seconds)
    congestion.settle(sending)
    assert control(sending) == before


def test_a_peer_that_shows_that_it_is_near_is_sent_to_with_reno_from_then_on(
    sending: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    trips = iter([0.060, 0.001])
    monkeypatch.setattr(round_trips, "shortest_seconds", lambda _: next(trips))
    congestion.settle(sending)
    congestion.settle(sending)
    assert control(sending) == b"reno"


def test_where_it_may_not_be_chosen_bytes_are_sent_all_the_same() -> None:
    class Locked(socket.socket):
        """As on a route whose congestion control is locked."""

        def setsockopt(self, *_: object) -> None:
            raise PermissionError

    with socket.create_server(("127.0.0.1", 0)) as listening, Locked() as connection:
        connection.connect(listening.getsockname())
        before = control(connection)
        congestion.settle(connection)
        assert control(connection) == before


def test_a_connection_that_has_broken_off_is_left_to_whoever_sends(sending: socket.socket) -> None:
    sending.close()
    congestion.settle(sending)
