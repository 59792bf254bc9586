"""Until a host has its first few pieces, whatever else there is to do for the image waits."""

from collections.abc import Callable
from typing import Any

import pytest

from hostler_common.testing import eventually
from hostler_precache.transfer import download, following
from hostler_precache.transfer.following import Following
from hostler_precache.transfer.manifest import Manifest
from hostler_precache.transfer.pieces import PieceData, PieceStore

MIB = 1024 * 1024
FIRST, BEGUN = 4, 2


@pytest.fixture
def pieces_before(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many pieces had come when the rest of the list was asked for, and when the room was taken."""
    found: dict[str, int] = {}
    written = 0
    write, allocate = PieceStore.write, PieceStore.allocate
    until_closed = Following.until_closed

    def writing(store: PieceStore, piece: int, data: PieceData) -> None:
        nonlocal written
        write(store, piece, data)
        written += 1

    def allocating(store: PieceStore) -> None:
        found["room"] = written
        allocate(store)

    async def closing(followed: Following, on_growth: Callable[[], None]) -> Manifest:
        found["list"] = written
        return await until_closed(followed, on_growth)

    monkeypatch.setattr(PieceStore, "write", writing)
    monkeypatch.setattr(PieceStore, "allocate", allocating)
    monkeypatch.setattr(Following, "until_closed", closing)
    return found


async def _ready(api: Any, image_id: str) -> None:
    async def is_ready() -> bool:
        image = await api.get(f"/v1/images/{image_id}")
        return bool(image["state"] == "ready")

    await eventually(is_ready)


async def test_the_rest_of_the_list_and_the_room_on_disk_wait_for_the_first_pieces(
    precache: Any, start_agent: Any, source: Any, make_image: Any, request_of: Any,
    image_id: str, pieces_before: dict[str, int], monkeypatch: pytest.MonkeyPatch, over: Any,
) -> None:  # fmt: skip
    monkeypatch.setattr(following, "FIRST_PIECES", FIRST)
    monkeypatch.setattr(download, "BEGUN_PIECES", BEGUN)
    monkeypatch.setattr(download, "BEGUN_SECONDS", 3600.0)
    data = make_image(3 * MIB + 4321)
    async with precache() as service:
        place = await start_agent("host-1", service.url)
        # once it is all here: while it is fetched, its list grows, and all that is known is told
        fetched = request_of(image_id, source.add("image", data), data, hosts=["nobody"])
        await service.api.post("/v1/distributions", fetched)
        await _ready(service.api, image_id)
        made = await service.api.post(
            "/v1/distributions", {"image_id": image_id, "hosts": ["host-1"]}
        )
        answer = await over(service.api, made["distribution_id"])
        assert answer["host_states"] == {"cached": 1}
        assert (place / image_id).read_bytes() == data
    assert BEGUN <= pieces_before["list"] <= FIRST
    assert pieces_before["room"] >= BEGUN
