"""The list of an image that is all there comes in two parts; it counts only with the root that was named."""

import asyncio
import base64
import contextlib
import random
from pathlib import Path
from typing import Any

import pytest

from hostler_precache import protocol
from hostler_precache.testing import image_of
from hostler_precache.transfer import following, manifest, pieces
from hostler_precache.transfer.following import Following, GivenUp
from hostler_precache.transfer.manifest import BlobId, GrowingManifest, Manifest

BLOB = BlobId("5a0e1d0e-0000-4000-8000-000000000001")
PIECE = manifest.MIN_PIECE_BYTES
DATA = image_of(4 * PIECE + 5)


def _listed() -> Manifest:
    hasher = manifest.Hasher(PIECE)
    hasher.update(DATA)
    return hasher.finish()


LISTED = _listed()


class Precache:
    """An API that tells of the image; with `lies`, another last piece."""

    def __init__(self, *, lies: bool = False) -> None:
        self.asked: list[dict[str, int]] = []
        self.silent = False
        self.digests = LISTED.digests[:-32] + bytes(32) if lies else LISTED.digests

    async def get(self, path: str, **asked: int) -> dict[str, Any]:
        assert path == f"/v1/blobs/{BLOB}/growth"
        self.asked.append(asked)
        told = self.digests[32 * asked["after"] :][: 32 * asked.get("most", 1000)]
        if self.silent:
            told = b""
        is_all = 32 * asked["after"] + len(told) == len(self.digests)
        return {
            "size_bytes": len(DATA),
            "piece_bytes": PIECE,
            "first_piece": asked["after"],
            "digests": base64.b64encode(told).decode(),
            "root": manifest.build(
                size_bytes=len(DATA), piece_bytes=PIECE, digests=self.digests
            ).root.hex()
            if is_all
            else None,
        }


def follow(api: Precache) -> Following:
    image = protocol.DesiredImage(
        distribution_id="5a0e1d0e-0000-4000-8000-000000000009",
        image_id="image",
        blob_id=BLOB,
        root=LISTED.root.hex(),
        size_bytes=len(DATA),
        seeds=[],
        token="",
        swarm_key="00",
    )
    return Following(api, image, rng=random.Random(1))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def two_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "FIRST_PIECES", 2)


async def test_the_first_pieces_come_first_and_then_all_the_others() -> None:
    api = Precache()
    followed = follow(api)
    assert (await followed.begin()).known == 2
    assert await followed.until_closed() == LISTED
    assert api.asked == [{"after": 0, "most": 2}, {"after": 2}]


async def test_an_answer_that_tells_nothing_more_is_not_asked_for_again_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            api.silent = False

    api = Precache()
    followed = follow(api)
    await followed.begin()
    api.silent = True
    monkeypatch.setattr(asyncio, "sleep", sleep)
    assert await followed.until_closed() == LISTED
    assert len(slept) == 3
    assert min(slept) > 0


async def test_an_image_of_few_pieces_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "FIRST_PIECES", LISTED.count)
    api = Precache()
    assert await follow(api).begin() == LISTED
    assert len(api.asked) == 1


async def test_a_list_that_has_not_the_root_that_was_named_is_none() -> None:
    followed = follow(Precache(lies=True))
    await followed.begin()
    with pytest.raises(GivenUp, match=r"manifest\.invalid"):
        await followed.until_closed()


def test_what_was_received_before_the_list_is_whole_is_not_fetched_again(tmp_path: Path) -> None:
    def grown(known: int) -> GrowingManifest:
        made = GrowingManifest(BLOB, size_bytes=len(DATA), piece_bytes=PIECE, root=LISTED.root)
        made.grow(0, LISTED.digests[: 32 * known])
        return made

    def written(listed: manifest.PieceList, *numbers: int) -> int:
        with contextlib.closing(pieces.PieceStore.open(tmp_path, BLOB, listed)) as store:
            before = store.journaled
            for piece in numbers:
                span = LISTED.span(piece)
                store.write(piece, DATA[span.start : span.stop])
            store.flush()
        return before

    assert written(grown(2), 0) == 0
    assert written(LISTED, 3) == 0b0001
    assert written(grown(1)) == 0b1001
    assert written(LISTED) == 0b1001
