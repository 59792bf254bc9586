"""What a plugin does wrong ends what it was asked for, with the reason, and nothing else."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from hostler_precache import images
from hostler_precache.entry_points import BrokenPluginError, contained
from hostler_precache.images import Image, SourceHash
from hostler_precache.sources import plugins

SHA512 = hashlib.sha512(b"image").hexdigest()


async def never() -> None:
    await asyncio.Event().wait()


def raising(exc: BaseException) -> Callable[[], Awaitable[None]]:
    async def work() -> None:
        raise exc

    return work


async def stubborn() -> None:
    try:
        await never()
    except asyncio.CancelledError as exc:
        raise ValueError("it was cancelled") from exc


async def in_containment(work: Callable[[], Awaitable[None]]) -> None:
    with contained():
        await work()


@pytest.mark.parametrize(
    "exc", [SystemExit(1), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError()]
)
async def test_what_a_plugin_raises_to_end_the_process_or_the_task_ends_neither(
    exc: BaseException,
) -> None:
    with pytest.raises(BrokenPluginError, match=f"it raised {type(exc).__name__}"):
        await in_containment(raising(exc))


async def test_what_else_a_plugin_raises_is_not_changed() -> None:
    said = ZeroDivisionError("0")
    with pytest.raises(ZeroDivisionError) as caught:
        await in_containment(raising(said))
    assert caught.value is said


@pytest.mark.parametrize("work", [never, stubborn])
async def test_a_task_that_is_cancelled_is_that_whatever_the_plugin_makes_of_it(
    work: Callable[[], Awaitable[None]],
) -> None:
    task = asyncio.create_task(in_containment(work))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await in_containment(work)


# --- what listers list


class Once(Sequence[Any]):
    """A sequence that can be read a single time."""

    def __init__(self, *found: object) -> None:
        self._found = found
        self._reads = 0

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, index: Any) -> Any:
        self._reads += index == 0
        if self._reads > 1:
            raise RuntimeError("it was read already")
        return self._found[index]


def image_of(**fields: Any) -> Image:
    return Image(**{"image_id": images.image_id("image-1"), "fetcher": "http", **fields})


def test_images_are_taken_as_they_are_listed_and_read_once() -> None:
    known = [
        image_of(),
        image_of(
            name="n" * 255,
            size_bytes=0,
            disk_format="raw",
            source_hash=images.source_hash("sha512", SHA512, None),
        ),
        image_of(source_hash=images.source_hash(None, None, SHA512[:32])),
    ]
    listed = plugins.images_of(Once(*known))
    assert [list(listed), list(listed)] == [known, known]


@pytest.mark.parametrize("listed", ["", b"", None, {}, iter(()), range])
def test_what_is_no_list_is_not_taken_for_an_empty_one(listed: object) -> None:
    with pytest.raises(BrokenPluginError, match="no sequence of images"):
        plugins.images_of(listed)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"image_id": "../x"}, "not an image id: '../x'"),
        ({"image_id": "\ud800"}, r"not an image id: '\ud800'"),
        ({"size_bytes": True}, "whose size_bytes is a bool"),
        ({"size_bytes": 1.0}, "whose size_bytes is a float"),
        ({"name": b"n"}, "whose name is a bytes"),
        ({"name": "n" * (1 << 20)}, "whose name has more than 255 characters"),
        ({"location": "l" * 4097}, "whose location has more than 4096 characters"),
        ({"source_hash": SourceHash(algorithm="sha512", value="00")}, "source_hash no bytes can"),
        ({"source_hash": SourceHash(algorithm="md6", value=SHA512)}, "source_hash no bytes can"),
        (
            {"source_hash": SourceHash(algorithm="sha512", value=SHA512.upper())},
            "source_hash no bytes can",
        ),
        (
            {"source_hash": SourceHash(algorithm=5, value=SHA512)},  # type: ignore[arg-type]
            "source_hash no bytes can",
        ),
    ],
)
def test_an_image_that_there_cannot_be_is_named_with_what_is_wrong(
    fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(BrokenPluginError) as caught:
        plugins.images_of([image_of(), image_of(**fields)])
    assert said in str(caught.value)
