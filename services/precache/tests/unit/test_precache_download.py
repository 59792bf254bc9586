"""A download asks for each piece once, whoever is slow, busy, wrong or gone."""

import asyncio
import contextlib
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from hostler_common.testing import eventually
from hostler_precache.swarming import swarm
from hostler_precache.testing import image_of
from hostler_precache.transfer import download as transfer
from hostler_precache.transfer import manifest
from hostler_precache.transfer.blobs import Blob
from hostler_precache.transfer.download import Download
from hostler_precache.transfer.manifest import BlobId
from hostler_precache.transfer.peers import PeerBusyError, PeerError, PieceMissingError
from hostler_precache.transfer.pieces import PieceStore

PIECE = manifest.MIN_PIECE_BYTES
DATA = image_of(6 * PIECE + 5)
BLOB = BlobId("5a0e1d0e-0000-4000-8000-000000000001")


def described() -> manifest.Manifest:
    hasher = manifest.Hasher(PIECE)
    hasher.update(DATA)
    return hasher.finish()


MANIFEST = described()


def part(piece: int) -> bytearray:
    span = MANIFEST.span(piece)
    return bytearray(DATA[span.start : span.stop])


class Network:
    """A `PeerClient` whose seed and peers do as the test says; nothing leaves the process."""

    def __init__(self) -> None:
        self.seed = swarm.SeedPolicy(MANIFEST.count)
        self.held: dict[int, asyncio.Event] = {}
        self.has: dict[str, int] = {}
        self.answers: dict[str, Callable[[int], bytearray]] = {}
        self.refuses: dict[str, PeerError] = {}
        self.asked: list[tuple[str, int]] = []
        self.chosen: list[int] = []

    async def fetch(self, url: str, piece: int, *, timeout_seconds: float) -> bytearray:
        del timeout_seconds
        self.asked.append((url, piece))
        await asyncio.sleep(0)
        return self.answers.get(url, part)(piece)

    async def fetch_next(
        self, url: str, *, timeout_seconds: float
    ) -> tuple[int, bytearray] | None:
        del timeout_seconds
        if url in self.refuses:
            raise self.refuses[url]
        piece = self.seed.next("host-1", 0.0)
        if piece is None:
            return None
        self.chosen.append(piece)
        if piece in self.held:
            await self.held[piece].wait()
        return piece, part(piece)

    async def follow(self, url: str, hear: Callable[[swarm.News], None]) -> None:
        if url not in self.has:
            raise PeerError("gone")
        hear(swarm.News(have=self.has[url]))
        await asyncio.Event().wait()


@pytest.fixture
def network() -> Network:
    return Network()


async def downloaded(
    network: Network,
    directory: Path,
    *,
    peers: dict[str, str],
    outside: Sequence[str] = (),
    counted: Counter[str] | None = None,
    during: Callable[[], None] | None = None,
) -> Download:
    """The download of everything, which ends whole or not at all."""
    store = PieceStore.open(directory, BLOB, MANIFEST)
    blob = Blob(BLOB, manifest=MANIFEST, key=bytes(32), fd=store.fileno())
    counts: Counter[str] = Counter() if counted is None else counted
    download = Download(
        blob, store, network, requests=4, rng=random.Random(1),
        on_received=lambda source, count: counts.update({source: count}),
    )  # fmt: skip
    download.set_swarm(["http://seed"], peers, outside=outside)
    try:
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            running = group.create_task(download.run())
            if during is not None:
                for _ in range(200):
                    await asyncio.sleep(0.001)
                during()
            await running
        assert os.pread(store.fileno(), len(DATA) + 1, 0) == DATA
        assert store.journaled == (1 << MANIFEST.count) - 1
    finally:
        store.close()
    return download


async def test_a_piece_of_the_seeds_choice_is_not_asked_for_by_name_while_it_is_on_its_way(
    network: Network, tmp_path: Path
) -> None:
    last = MANIFEST.count - 1
    network.held[last] = asyncio.Event()
    download = await downloaded(network, tmp_path, peers={}, during=network.held[last].set)
    assert network.chosen == list(range(MANIFEST.count))
    assert network.asked == []
    assert (download.received.from_seed, download.received.wasted) == (len(DATA), 0)


@pytest.mark.parametrize(
    ("few", "seconds", "held"),
    [(2, 3600.0, 3), (100, 3600.0, None), (2, 0.0, 0)],
    ids=["a few have come", "all are here", "none comes in a while"],
)
async def test_a_transfer_has_begun_when(
    few: int, seconds: float, held: int | None, network: Network, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(transfer, "BEGUN_PIECES", few)
    monkeypatch.setattr(transfer, "BEGUN_SECONDS", seconds)
    network.held = {} if held is None else {piece: asyncio.Event() for piece in range(held, 7)}
    with contextlib.closing(PieceStore.open(tmp_path, BLOB, MANIFEST)) as store:
        blob = Blob(BLOB, manifest=MANIFEST, key=bytes(32), fd=store.fileno())
        download = Download(blob, store, network, requests=1, rng=random.Random(1))
        download.set_swarm(["http://seed"], {})
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            group.create_task(download.run())
            await download.until_begun()
            assert min(few, MANIFEST.count if held is None else held) <= download.pieces_done
            assert download.pieces_done <= (MANIFEST.count if held is None else held)
            for waiting in network.held.values():
                waiting.set()
        async with asyncio.timeout(30):  # nothing has to come any more
            await download.until_begun()


async def test_that_nobody_answers_is_said_until_somebody_does_if_only_that_he_is_busy(
    network: Network, tmp_path: Path
) -> None:
    with contextlib.closing(PieceStore.open(tmp_path, BLOB, MANIFEST)) as store:
        blob = Blob(BLOB, manifest=MANIFEST, key=bytes(32), fd=store.fileno())
        download = Download(blob, store, network, requests=1, rng=random.Random(1))
        assert download.nobody_answers is None  # nobody was asked

        async def says(reason: str | None) -> None:
            async def is_so() -> bool:
                return download.nobody_answers == reason

            await eventually(is_so)

        network.refuses["http://seed"] = PeerError("no route")
        download.set_swarm(["http://seed"], {})
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            running = group.create_task(download.run())
            await says("seed http://seed: no route")
            network.refuses["http://seed"] = PeerBusyError(0.01)
            await says(None)
            assert download.pieces_done == 0
            network.refuses["http://seed"] = PeerError("no route")
            await says("seed http://seed: no route")
            network.has["http://peer"] = 0
            download.set_swarm(["http://seed"], {"peer": "http://peer"})
            await says(None)  # it has nothing yet, and says so
            network.refuses.clear()
            await running
        assert download.nobody_answers is None


async def test_what_a_peer_has_is_not_taken_from_the_seed_again(
    network: Network, tmp_path: Path
) -> None:
    while network.seed.next("another", 0.0) is not None:
        pass
    network.has["http://peer"] = (1 << MANIFEST.count) - 1
    download = await downloaded(network, tmp_path, peers={"peer": "http://peer"})
    assert download.received.from_peers == len(DATA)
    assert sorted(network.asked) == [("http://peer", piece) for piece in range(MANIFEST.count)]


async def test_bytes_are_counted_by_where_they_came_from(network: Network, tmp_path: Path) -> None:
    while network.seed.next("another", 0.0) is not None:
        pass
    first = MANIFEST.piece_bytes
    network.has = {"http://near": 0b001, "http://far": 0b010}
    network.answers["http://liar"] = lie
    network.has["http://liar"] = 0b100
    counted: Counter[str] = Counter()
    peers = {name: f"http://{name}" for name in ("near", "far", "liar")}
    download = await downloaded(network, tmp_path, peers=peers, outside=["far"], counted=counted)
    received = download.received
    assert (counted["rack"], counted["outside"]) == (first, first)
    assert counted["seed"] == len(DATA) - 2 * first
    assert counted["wasted"] == received.wasted
    assert counted["wasted"] >= first
    assert received.from_seed == counted["seed"]
    assert (received.from_peers, received.from_rack) == (2 * first, first)


async def test_what_nobody_has_is_asked_of_a_seed_that_sent_it_all_once(
    network: Network, tmp_path: Path
) -> None:
    while network.seed.next("dead", 0.0) is not None:
        pass
    download = await downloaded(network, tmp_path, peers={"dead": "http://dead"})
    assert download.received.from_seed == len(DATA)
    assert sorted(network.asked) == [("http://seed", piece) for piece in range(MANIFEST.count)]


def lie(piece: int) -> bytearray:
    return bytearray(MANIFEST.span(piece).length)


def be_busy(piece: int) -> bytearray:
    del piece
    raise PeerBusyError(0)


def lack(piece: int) -> bytearray:
    del piece
    raise PieceMissingError("absent")


def fail(piece: int) -> bytearray:
    del piece
    raise PeerError("reset")


@pytest.mark.parametrize("answer", [lie, be_busy, lack, fail])
async def test_a_bad_peer_costs_little_and_a_good_one_makes_up_for_it(
    network: Network, tmp_path: Path, answer: Callable[[int], bytearray]
) -> None:
    while network.seed.next("another", 0.0) is not None:
        pass
    everything = (1 << MANIFEST.count) - 1
    network.has |= {"http://bad": everything, "http://good": everything}
    network.answers["http://bad"] = answer
    download = await downloaded(
        network, tmp_path, peers={"bad": "http://bad", "good": "http://good"}
    )
    assert download.received.from_peers == len(DATA)
    assert download.received.from_seed == 0
    asked_of_bad = sum(url == "http://bad" for url, _ in network.asked)
    assert asked_of_bad <= 2 * MANIFEST.count
    assert download.banned == (["bad"] if answer is lie and asked_of_bad >= 3 else [])


async def test_neighbours_that_come_and_go_to_the_very_end_do_no_harm(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = PieceStore.flush

    def slow_flush(store: PieceStore) -> None:
        time.sleep(0.05)
        real(store)

    monkeypatch.setattr(PieceStore, "flush", slow_flush)
    store = PieceStore.open(tmp_path, BLOB, MANIFEST)
    blob = Blob(BLOB, manifest=MANIFEST, key=bytes(32), fd=store.fileno())
    download = Download(blob, store, network, requests=4, rng=random.Random(1))
    running = asyncio.create_task(download.run())
    serial = 0
    while not running.done():
        serial += 1
        download.set_swarm(["http://seed"], {f"host-{serial}": f"http://host-{serial}"})
        await asyncio.sleep(0.001)
    await running
    assert store.journaled == (1 << MANIFEST.count) - 1
    store.close()


async def test_what_comes_stays_under_the_limit(network: Network, tmp_path: Path) -> None:
    limit = 4 * PIECE
    came: list[tuple[float, int]] = []
    answers = network.fetch_next

    async def fetch_next(url: str, *, timeout_seconds: float) -> tuple[int, bytearray] | None:
        answer = await answers(url, timeout_seconds=timeout_seconds)
        if answer is not None:
            came.append((time.monotonic(), len(answer[1])))
        return answer

    network.fetch_next = fetch_next  # type: ignore[method-assign]  # the seed of this test
    store = PieceStore.open(tmp_path, BLOB, MANIFEST)
    blob = Blob(BLOB, manifest=MANIFEST, key=bytes(32), fd=store.fileno())
    download = Download(blob, store, network, requests=4, rng=random.Random(1))
    download.set_swarm(["http://seed"], {})
    download.limit(limit)
    began = time.monotonic()
    async with asyncio.timeout(30):
        await download.run()
    total = 0
    for at, count in came:  # by the clock that paces it: a slow machine is only further below
        assert total <= limit * (at - began) + 1
        total += count
    assert total == len(DATA)
    store.close()


async def test_a_request_that_brought_nothing_does_not_count_for_the_limit(
    network: Network, tmp_path: Path
) -> None:
    while network.seed.next("another", 0.0) is not None:
        pass
    network.has["http://peer"] = (1 << MANIFEST.count) - 1
    store = PieceStore.open(tmp_path, BLOB, MANIFEST)
    lacking = 3
    blob = Blob(
        BLOB, manifest=MANIFEST, key=bytes(32), fd=store.fileno(),
        have=MANIFEST.all_pieces & ~(1 << lacking),
    )  # fmt: skip
    download = Download(blob, store, network, requests=4, rng=random.Random(1), clock=lambda: 0.0)
    download.set_swarm(["http://seed"], {"peer": "http://peer"})
    download.limit(1)  # and time stands still: one request, and then never another
    async with asyncio.timeout(30):
        await download.run()
    assert network.asked == [("http://peer", lacking)]
    store.close()
