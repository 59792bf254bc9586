"""A manifest that grows tells nothing twice differently, and nothing is asked for that it has not told."""

import asyncio
import base64
import contextlib
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostler_common import client, errors
from hostler_precache import protocol
from hostler_precache.swarming import swarm
from hostler_precache.testing import image_of
from hostler_precache.transfer import following, manifest, pieces
from hostler_precache.transfer.blobs import Blob
from hostler_precache.transfer.download import Download
from hostler_precache.transfer.following import Following, GivenUp
from hostler_precache.transfer.manifest import BlobId, GrowingManifest, Manifest, ManifestError
from hostler_precache.transfer.peers import PeerBusyError

PIECE = manifest.MIN_PIECE_BYTES
BLOB = BlobId("5a0e1d0e-0000-4000-8000-000000000001")


def described(data: bytes) -> Manifest:
    hasher = manifest.Hasher(PIECE)
    hasher.update(data)
    return hasher.finish()


# the third and the last piece are zeros
DATA = image_of(2 * PIECE) + bytes(PIECE) + image_of(2 * PIECE, 2) + bytes(77)
MANIFEST = described(DATA)
COUNT = MANIFEST.count


def growing(known: int = 0, listed: Manifest = MANIFEST) -> GrowingManifest:
    made = GrowingManifest(BLOB, size_bytes=listed.size_bytes, piece_bytes=listed.piece_bytes)
    made.grow(0, digests(0, known, listed))
    return made


def digests(start: int, stop: int, listed: Manifest = MANIFEST) -> bytes:
    return listed.digests[start * manifest.DIGEST_BYTES : stop * manifest.DIGEST_BYTES]


def part(piece: int) -> bytes:
    span = MANIFEST.span(piece)
    return DATA[span.start : span.stop]


# --- the list


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """Of up to 30 pieces, some of them zeros, the last one maybe short."""
    whole = draw(st.lists(st.booleans(), max_size=30))
    hasher = manifest.Hasher(PIECE)
    rest = draw(st.integers(min_value=0, max_value=PIECE - 1))
    # the digest of any piece that is not zeros is as good as another: no bytes are hashed
    made = bytearray()
    for number, is_zero in enumerate(whole):
        zero = manifest.Hasher(PIECE)
        zero.update_zeros(PIECE)
        made += zero.finish().digests if is_zero else random.Random(number).randbytes(32)
    if rest:
        hasher.update_zeros(rest)
        made += hasher.finish().digests if draw(st.booleans()) else bytes(32)
    return manifest.build(
        size_bytes=len(whole) * PIECE + rest, piece_bytes=PIECE, digests=bytes(made)
    )


@given(listed=manifests(), data=st.data())
@settings(deadline=None)
def test_in_whatever_runs_a_list_is_told_it_grows_at_its_end_into_the_manifest(
    listed: Manifest, data: st.DataObject
) -> None:
    grown = growing(0, listed)
    number = st.integers(min_value=0, max_value=listed.count)
    for first, stop in data.draw(st.lists(st.tuples(number, number), max_size=12)):
        before = grown.known
        run = digests(first, max(first, stop), listed)
        if first > before:
            with pytest.raises(ManifestError):
                grown.grow(first, run)
            assert grown.known == before
        else:
            grown.grow(first, run)
            assert grown.known == max(before, stop if stop > first else 0)
        assert grown.digests == digests(0, grown.known, listed)
        assert grown.zero_pieces == listed.zero_pieces & grown.known_pieces
        assert grown.data_bytes >= listed.data_bytes
    if grown.known < listed.count:
        with pytest.raises(ManifestError):
            grown.closed(listed.root)
    grown.grow(grown.known, digests(grown.known, listed.count, listed))
    assert grown.closed(listed.root) == listed
    assert grown.data_bytes == listed.data_bytes
    with pytest.raises(ManifestError, match="root"):
        grown.closed(bytes(32))


@given(listed=manifests().filter(lambda one: one.count > 0), data=st.data())
@settings(deadline=None)
def test_a_piece_that_was_told_is_never_told_differently(
    listed: Manifest, data: st.DataObject
) -> None:
    known = data.draw(st.integers(min_value=1, max_value=listed.count))
    grown = growing(known, listed)
    first = data.draw(st.integers(min_value=0, max_value=known - 1))
    run = bytearray(digests(first, listed.count, listed))
    at = data.draw(st.integers(min_value=0, max_value=(known - first) * 32 - 1))
    run[at] ^= 1
    with pytest.raises(ManifestError, match="differently"):
        grown.grow(first, bytes(run))
    assert grown.digests == digests(0, known, listed)


@pytest.mark.parametrize(
    "run", [digests(0, COUNT) + bytes(32), bytes(31)], ids=["more than there are", "half a digest"]
)
def test_what_cannot_be_the_digests_of_the_pieces_is_refused(run: bytes) -> None:
    grown = growing()
    with pytest.raises(ManifestError):
        grown.grow(0, run)
    assert grown.known == 0


def test_a_piece_is_accepted_once_it_is_told_and_not_before() -> None:
    grown = growing(1)
    assert grown.accepts(0, part(0))
    assert not grown.accepts(1, part(1))
    with pytest.raises(IndexError):
        grown.digest(1)
    grown.grow(1, digests(1, 2))
    assert grown.accepts(1, part(1))
    assert grown.count == COUNT


# --- who asks, and who sends


@given(
    told=st.integers(min_value=0, max_value=40),
    have=st.integers(min_value=0, max_value=2**40 - 1),
    seed=st.integers(),
)
def test_a_receiver_asks_for_nothing_that_it_could_not_check(
    told: int, have: int, seed: int
) -> None:
    rng = random.Random(seed)
    picker = swarm.Picker(40, have=have)
    picker.grew((1 << told) - 1, 0)
    picker.neighbour_has("peer", 2**40 - 1)
    asked = set()
    while (piece := picker.pick("peer", rng)) is not None:
        asked.add(piece)
        # a source that is waited for is no reason to fetch anything twice
        assert told == 40 or not picker.is_endgame
    assert asked == {piece for piece in range(told) if not have >> piece & 1}
    picker.grew(2**40 - 1, 0)
    assert picker.pick("peer", rng) is not None or told == 40 or have >> told == 2**40 - 1 >> told


@given(
    st.lists(
        st.tuples(st.integers(min_value=0, max_value=20), st.integers(min_value=0, max_value=20)),
        max_size=60,
    )
)
def test_a_seed_sends_each_piece_once_in_order_and_only_to_who_can_check_it(
    steps: list[tuple[int, int]],
) -> None:
    policy = swarm.SeedPolicy(20, available=0)
    available, sent = 0, list[int]()
    for now, (grown, below) in enumerate(steps):
        available = max(available, grown)
        policy.add((1 << available) - 1)
        expected = len(sent) if len(sent) < min(available, below) else None
        assert policy.has_next("host", now * 1e-6, below) == (expected is not None)
        piece = policy.next("host", now * 1e-6, below)
        assert piece == expected
        if piece is not None:
            sent.append(piece)
            policy.completed(piece, now * 1e-6)
        assert policy.is_injected == (len(sent) == 20)


# --- what is on disk


def opened(directory: Path, listed: manifest.PieceList) -> pieces.PieceStore:
    return pieces.PieceStore.open(directory, BLOB, listed, allocate=False)


def begun(directory: Path, known: int, written: list[int]) -> None:
    """What a host that was stopped left of an image that was still coming."""
    store = opened(directory, growing(known))
    with contextlib.closing(store):
        for piece in written:
            store.write(piece, part(piece))
        store.flush()


@pytest.mark.parametrize("later", [growing(2), growing(4), MANIFEST], ids=["2", "4", "closed"])
def test_what_was_verified_while_the_image_came_is_kept_over_a_restart(
    tmp_path: Path, later: manifest.PieceList
) -> None:
    begun(tmp_path, 2, [0, 1])
    with contextlib.closing(opened(tmp_path, later)) as store:
        assert store.journaled == 0b11 | later.zero_pieces
        store.manifest = MANIFEST
        store.grew()
        for piece in (3, 4):
            store.write(piece, part(piece))
        store.place(tmp_path / "image")
    assert (tmp_path / "image").read_bytes() == DATA


@pytest.mark.parametrize("later", [growing(2), MANIFEST], ids=["growing", "closed"])
def test_what_is_on_disk_is_compared_with_what_is_told_after_a_restart(
    tmp_path: Path, later: manifest.PieceList
) -> None:
    begun(tmp_path, 2, [0, 1])
    data = tmp_path / ".precache" / f"{BLOB}.part"
    fd = os.open(data, os.O_RDWR)
    os.pwrite(fd, bytes([part(1)[9] ^ 1]), PIECE + 9)
    os.close(fd)
    with contextlib.closing(opened(tmp_path, later)) as store:
        assert store.journaled == later.zero_pieces
    assert data.read_bytes() == bytes(len(DATA))


def test_of_what_is_not_told_again_yet_nothing_is_believed(tmp_path: Path) -> None:
    begun(tmp_path, 2, [0, 1])
    with contextlib.closing(opened(tmp_path, growing(1))) as store:
        assert store.journaled == 0b1


def test_zeros_are_there_as_soon_as_they_are_told(tmp_path: Path) -> None:
    grown = growing(2)
    with contextlib.closing(opened(tmp_path, grown)) as store:
        assert store.grew() == 0
        grown.grow(2, digests(2, COUNT))
        assert store.grew() == MANIFEST.zero_pieces == 0b100100
        assert store.grew() == 0
        for piece in (0, 1, 3, 4):
            store.write(piece, part(piece))
        store.place(tmp_path / "image")
    assert (tmp_path / "image").read_bytes() == DATA


# --- who follows it


class Precache:
    """An API that tells what the test says, one answer after the other."""

    def __init__(self, answers: list[Any]) -> None:
        self.answers = answers
        self.asked: list[object] = []

    async def get(self, path: str, **params: object) -> Any:
        assert path == f"/v1/blobs/{BLOB}/growth"
        self.asked.append(params["after"])
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def told(first: int, stop: int, *, root: bytes | None = None, **fields: object) -> dict[str, Any]:
    return {
        "size_bytes": len(DATA),
        "piece_bytes": PIECE,
        "first_piece": first,
        "digests": base64.b64encode(digests(first, stop)).decode(),
        "root": None if root is None else root.hex(),
        **fields,
    }


def follow(answers: list[Any]) -> tuple[Following, Precache]:
    image = protocol.DesiredImage(
        distribution_id="5a0e1d0e-0000-4000-8000-000000000009",
        image_id="image",
        blob_id=BLOB,
        size_bytes=len(DATA),
        seeds=[],
        token="",
        swarm_key="00",
    )
    api = Precache(answers)
    return Following(api, image, rng=random.Random(1)), api  # type: ignore[arg-type]


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody pauses."""
    monkeypatch.setattr(following, "MIN_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(following, "AWAY_SECONDS", 0.0)


@pytest.mark.usefixtures("at_once")
async def test_a_list_is_followed_over_everything_until_its_root_closes_it() -> None:
    away = client.PeerUnavailable("does not answer")
    proxy = errors.from_problem(404, {"title": "not a precache"})
    lines = [away, told(0, 2), told(2, 2), proxy, told(2, 4), {"no": "growth"}, told(4, COUNT)]
    followed, api = follow([*lines, told(COUNT, COUNT, root=MANIFEST.root)])
    listed = await followed.begin()
    assert listed.known == 2
    seen: list[int] = []
    assert await followed.until_closed(lambda: seen.append(listed.known)) == MANIFEST
    assert seen == [4, COUNT]
    assert api.asked == [0, 0, 2, 2, 2, 4, 4, COUNT]


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (errors.from_problem(404, {"code": "precache.blob.not_found"}), "blob.given_up"),
        (told(COUNT, COUNT, root=bytes(32)), "manifest.invalid"),
        (told(2, 4, root=MANIFEST.root), "manifest.invalid"),
        (told(3, 4), "manifest.invalid"),
        (told(2, 4, size_bytes=len(DATA) + 1), "manifest.invalid"),
        (told(2, 4, piece_bytes=2 * PIECE), "manifest.invalid"),
        (told(2, 4, digests="%"), "manifest.invalid"),
    ],
    ids=["given up", "root", "root too early", "gap", "size", "piece size", "no base64"],
)
async def test_what_cannot_be_true_or_is_not_any_more_ends_it(answer: Any, reason: str) -> None:
    start = COUNT if isinstance(answer, dict) and answer["first_piece"] == COUNT else 2
    followed, _ = follow([told(0, start), answer])
    await followed.begin()
    with pytest.raises(GivenUp, match=reason):
        await followed.until_closed()


# --- the whole of it


class SlowSource:
    """A seed that has what was told, and gets more of it whenever everybody has that."""

    def __init__(self, grown: GrowingManifest) -> None:
        self.policy = swarm.SeedPolicy(COUNT, available=0)
        self.grown = grown
        self.sent: list[int] = []

    def grow(self, stop: int) -> None:
        self.grown.grow(self.grown.known, digests(self.grown.known, stop))
        self.policy.add(self.grown.known_pieces, holes=self.grown.zero_pieces)

    async def fetch(self, url: str, piece: int, *, timeout_seconds: float) -> bytes:
        raise AssertionError(f"{url} was asked for {piece} in {timeout_seconds}")

    async def fetch_next(self, url: str, *, timeout_seconds: float) -> tuple[int, bytes] | None:
        del url, timeout_seconds
        await asyncio.sleep(0)
        piece = self.policy.next("host", 0.0, self.grown.known)
        if piece is None:
            if self.policy.is_injected:
                return None
            raise PeerBusyError(0.0)
        self.policy.completed(piece, 0.0)
        self.sent.append(piece)
        return piece, part(piece)

    async def follow(self, url: str, hear: Callable[[swarm.News], None]) -> None:
        raise AssertionError(f"{url} is a seed: {hear}")


@given(stops=st.sets(st.integers(min_value=0, max_value=COUNT - 1)))
@settings(max_examples=25, deadline=None)
def test_a_download_keeps_up_with_a_list_that_grows_and_ends_with_it(
    tmp_path_factory: pytest.TempPathFactory, stops: set[int]
) -> None:
    directory = tmp_path_factory.mktemp("growing")

    async def run() -> None:
        grown = growing()
        source = SlowSource(grown)
        with contextlib.closing(opened(directory, grown)) as store:
            blob = Blob(BLOB, manifest=grown, key=bytes(32), fd=store.fileno())
            download = Download(blob, store, source, requests=3, rng=random.Random(1))
            download.set_swarm(["http://seed"], {})
            running = asyncio.create_task(download.run())
            for stop in [*sorted(stops), COUNT]:
                source.grow(stop)
                download.grew()
                while blob.have != grown.known_pieces:
                    assert not running.done()
                    await asyncio.sleep(0.001)
            await running
            assert source.sent == [0, 1, 3, 4]
            assert download.received.from_seed == 4 * PIECE
            assert download.bytes_done == len(DATA)
            store.place(directory / "image")
        assert (directory / "image").read_bytes() == DATA

    asyncio.run(asyncio.wait_for(run(), 30))
