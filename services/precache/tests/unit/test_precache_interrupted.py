"""A fetch that was interrupted goes on where it was, if every byte is checked in the end, and else begins anew."""
# ruff: noqa: ASYNC240  the files are the test's own, and small

import asyncio
import errno
import hashlib
import os
import subprocess
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostler_precache import images, testing
from hostler_precache.images import Image, SourceHash, Verification
from hostler_precache.sources import arrival, fetchers, plugins, sparse
from hostler_precache.sources import fetch as fetching
from hostler_precache.sources.fetch import FetchProgress, fetch
from hostler_precache.sources.source import Hole, Part, Source, SourceError
from hostler_precache.transfer import manifest

KIB, MIB = 1 << 10, 1 << 20
PIECE = manifest.MIN_PIECE_BYTES
DATA = testing.image_of(2 * PIECE) + bytes(PIECE) + testing.image_of(2 * PIECE + 77, 2)
PIECES = 5  # whole ones


def hash_of(data: bytes) -> SourceHash:
    return SourceHash(algorithm="sha512", value=hashlib.sha512(data).hexdigest())


def image_of(data: bytes = DATA, **fields: Any) -> Image:
    return Image(
        image_id=images.image_id("debian"),
        fetcher="test",
        **{"source_hash": hash_of(data), **fields},
    )


def digests(pieces: int, data: bytes = DATA) -> bytes:
    hasher = manifest.Hasher(PIECE)
    hasher.update(data)
    return hasher.finish().digests[: pieces * manifest.DIGEST_BYTES]


class Breaking:
    """A source of bytes that breaks off after so many, and remembers where it was begun."""

    def __init__(
        self, data: bytes = DATA, *, breaks_at: int | None = None, chunk_bytes: int = 100_000
    ) -> None:
        self.data = data
        self.breaks_at = breaks_at
        self.chunk_bytes = chunk_bytes
        self.parts: list[Part] = []
        self.can_skip = True
        self.began: list[int] = []

    @asynccontextmanager
    async def open(self, image: Image) -> AsyncIterator[Source]:
        del image
        at = 0

        async def skip(to: int) -> bool:
            nonlocal at
            at = to if self.can_skip else 0
            return self.can_skip

        async def chunks() -> AsyncIterator[bytes | Hole]:
            nonlocal at
            self.began.append(at)
            while at < len(self.data):
                if self.breaks_at is not None and at >= self.breaks_at:
                    raise SourceError("source.truncated", "it broke off", is_transient=True)
                stop = at + self.chunk_bytes
                if self.breaks_at is not None:
                    stop = min(stop, self.breaks_at)
                yield self.data[at:stop]
                at = stop

        yield Source(size_bytes=len(self.data), chunks=chunks(), parts=self.parts, skip=skip)


async def interrupted(fetcher: Breaking, image: Image, target: Path, **options: Any) -> None:
    with pytest.raises(SourceError, match="broke off"):
        await fetch(fetcher, image, target, **options)
    assert not target.exists()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    directory = tmp_path / "seed"
    directory.mkdir()
    return directory / "blob"


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    breaks_at=st.integers(1, len(DATA) - 1),
    lag=st.integers(0, 2),
    chunk_bytes=st.sampled_from([10_007, 100_000, PIECE, MIB]),
)
def test_wherever_it_broke_off_what_others_were_told_of_is_not_asked_for_again(
    breaks_at: int, lag: int, chunk_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    target = tmp_path_factory.mktemp("seed") / "blob"
    told = max(0, breaks_at // PIECE - lag)

    async def run() -> None:
        source = Breaking(breaks_at=breaks_at, chunk_bytes=chunk_bytes)
        await interrupted(source, image_of(), target)
        source.breaks_at = None
        progress = FetchProgress()
        fetched = await fetch(source, image_of(), target, told=digests(told), progress=progress)
        assert source.began == [0, told * PIECE]
        assert fetched.left_bytes == told * PIECE
        assert fetched.manifest.digests == digests(PIECES + 1)
        assert fetched.verification is Verification.HASH
        assert progress.bytes_done == len(DATA)

    asyncio.run(run())
    assert target.read_bytes() == DATA
    assert [each.name for each in target.parent.iterdir()] == [target.name]


async def test_pieces_that_were_there_are_told_of_before_the_source_sends_any(
    target: Path,
) -> None:
    source = Breaking(breaks_at=3 * PIECE)
    await interrupted(source, image_of(), target)
    progress = FetchProgress()
    with pytest.raises(SourceError, match="broke off"):
        await fetch(source, image_of(), target, told=digests(3), progress=progress)
    assert source.began == [0, 3 * PIECE]
    assert progress.arriving is not None
    assert progress.arriving.digests(0) == digests(3)
    assert (progress.arriving.known, progress.bytes_done) == (3, 3 * PIECE)


@pytest.mark.parametrize(
    "meddle",
    [
        lambda part: os.truncate(part, 3 * PIECE),
        lambda part: part.write_bytes(b"\1" + part.read_bytes()[1:]),
        lambda part: part.unlink(),
    ],
    ids=["cut", "another byte", "gone"],
)
async def test_what_is_left_but_is_not_what_others_were_told_of_is_fetched_again(
    target: Path, meddle: Callable[[Path], None]
) -> None:
    source = Breaking(breaks_at=4 * PIECE)
    await interrupted(source, image_of(), target)
    meddle(target.with_name("blob.part"))
    source.breaks_at = None
    fetched = await fetch(source, image_of(), target, told=digests(4))
    assert source.began == [0, 0]
    assert (fetched.left_bytes, target.read_bytes() == DATA) == (0, True)


async def test_what_lay_beyond_it_is_not_taken_for_the_zeros_that_come(target: Path) -> None:
    target.with_name("blob.part").write_bytes(DATA[: 2 * PIECE] + b"\1" * (len(DATA) - 2 * PIECE))
    source = Breaking()
    await fetch(source, image_of(), target, told=digests(2))
    assert source.began == [2 * PIECE]
    assert target.read_bytes() == DATA


async def test_a_source_that_gives_all_of_it_only_is_read_from_its_start(target: Path) -> None:
    source = Breaking(breaks_at=4 * PIECE)
    source.can_skip = False
    await interrupted(source, image_of(), target)
    source.breaks_at = None
    await fetch(source, image_of(), target, told=digests(4))
    assert source.began == [0, 0]
    assert target.read_bytes() == DATA


async def test_without_a_hash_nothing_is_put_together_from_two_attempts(target: Path) -> None:
    source = Breaking(breaks_at=4 * PIECE)
    await interrupted(source, image_of(source_hash=None), target)
    assert list(target.parent.iterdir()) == []
    # nor of what a killed process left
    target.with_name("blob.part").write_bytes(DATA)
    source.breaks_at = None
    fetched = await fetch(source, image_of(source_hash=None), target, told=digests(4))
    assert (source.began, fetched.verification) == ([0, 0], Verification.UNVERIFIABLE)


async def test_the_hashes_of_parts_are_of_every_byte_too(target: Path) -> None:
    def part(data: bytes) -> Part:
        value = hashlib.md5(data, usedforsecurity=False).hexdigest()
        return Part(length_bytes=len(data), source_hash=SourceHash(algorithm="md5", value=value))

    source = Breaking(breaks_at=4 * PIECE)
    source.parts = [part(DATA[:300_000]), part(DATA[300_000:])]
    image = image_of(source_hash=None)
    await interrupted(source, image, target)
    source.breaks_at = None
    fetched = await fetch(source, image, target, told=digests(4))
    assert (source.began, fetched.verification) == ([0, 4 * PIECE], Verification.CHECKSUM)
    # another version of the object: what is left of the first one is of no use
    target.replace(target.with_name("blob.part"))
    other = Breaking(b"\1" + DATA[1:])
    other.parts = [part(other.data[:300_000]), part(other.data[300_000:])]
    await fetch(other, image, target, told=digests(4))
    assert (other.began, target.read_bytes() == other.data) == ([0], True)


async def test_a_hash_that_is_wrong_over_two_attempts_is_no_verdict_yet(target: Path) -> None:
    source = Breaking(breaks_at=4 * PIECE)
    await interrupted(source, image_of(), target)
    source.breaks_at = None
    source.data = DATA[:-1] + bytes([DATA[-1] ^ 1])
    for told, is_transient, began in ((digests(4), True, 4 * PIECE), (digests(4), False, 0)):
        with pytest.raises(SourceError) as caught:
            await fetch(source, image_of(), target, told=told)
        assert (caught.value.reason, caught.value.is_transient) == (
            "source.hash_mismatch",
            is_transient,
        )
        assert source.began[-1] == began
        assert list(target.parent.iterdir()) == []


async def test_a_disk_that_is_to_be_converted_goes_on_at_the_end_of_its_file(
    tmp_path: Path, target: Path
) -> None:
    raw, shaped = tmp_path / "raw", tmp_path / "shaped"
    raw.write_bytes(testing.image_of(3 * MIB))
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(shaped)]
    await asyncio.to_thread(subprocess.run, convert, check=True)
    data = shaped.read_bytes()
    source = Breaking(data, breaks_at=2 * MIB)
    image = image_of(data, disk_format="qcow2")
    await interrupted(source, image, target)
    source.breaks_at = None
    fetched = await fetch(source, image, target)
    assert source.began == [0, 2 * MIB]
    assert (fetched.disk_format, target.read_bytes() == raw.read_bytes()) == ("raw", True)


async def test_a_fetch_that_is_cancelled_leaves_what_has_come_until_it_is_discarded(
    target: Path,
) -> None:
    source, progress = Breaking(), FetchProgress()
    come = asyncio.Event()

    @asynccontextmanager
    async def opened(image: Image) -> AsyncIterator[Source]:
        async with Breaking.open(source, image) as inner:

            async def chunks() -> AsyncIterator[bytes | Hole]:
                yield DATA[: 3 * PIECE]
                come.set()
                await asyncio.Event().wait()

            yield Source(size_bytes=len(DATA), chunks=chunks(), skip=inner.skip)

    class Hanging(Breaking):
        open = staticmethod(opened)

    task = asyncio.create_task(fetch(Hanging(), image_of(), target, progress=progress))
    await come.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    fetched = await fetch(source, image_of(), target, told=digests(3))
    assert (source.began, fetched.left_bytes) == ([3 * PIECE], 3 * PIECE)
    # nobody was told that it is complete: it is not fetched again for that
    again = Breaking()
    await fetch(again, image_of(), target, told=digests(PIECES))
    assert again.began == [PIECES * PIECE]
    target.with_name("blob.part").touch()
    fetching.discard(target)
    assert [each.name for each in target.parent.iterdir()] == [target.name]


@pytest.mark.parametrize(("told", "can_skip"), [(0, True), (4, False)])
async def test_what_is_still_sent_of_an_attempt_before_is_not_cut_by_one_that_begins_anew(
    target: Path, told: int, can_skip: bool
) -> None:
    source = Breaking(breaks_at=4 * PIECE)
    source.can_skip = can_skip
    await interrupted(source, image_of(), target)
    sending = os.open(target.with_name("blob.part"), os.O_RDONLY)
    try:
        source.breaks_at = PIECE
        await interrupted(source, image_of(), target, told=digests(told))
        assert source.began == [0, 0]
        assert os.pread(sending, 4 * PIECE, 0) == DATA[: 4 * PIECE]
    finally:
        os.close(sending)


async def test_what_is_left_and_cannot_be_read_is_not_taken_for_zeros(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Breaking(breaks_at=4 * PIECE)
    await interrupted(source, image_of(), target)

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "lseek", broken)
    source.breaks_at = None
    fetched = await fetch(source, image_of(), target, told=digests(4))
    assert (source.began, fetched.left_bytes) == ([0, 0], 0)
    assert target.read_bytes() == DATA


async def test_a_fetch_that_is_cancelled_while_it_opens_its_file_leaves_it_not_open(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening, goes_on = threading.Event(), threading.Event()
    opened: list[arrival.Writer] = []

    class Slow(arrival.Writer):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            opening.set()
            assert goes_on.wait(10)
            super().__init__(*arguments, **named)
            opened.append(self)

    monkeypatch.setattr(fetching, "Writer", Slow)
    task = asyncio.create_task(fetch(Breaking(), image_of(), target))
    await asyncio.to_thread(opening.wait)
    task.cancel()
    await asyncio.sleep(0)
    goes_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    (writer,) = opened
    assert writer._fd == -1


async def test_half_of_a_converted_disk_takes_no_room_from_the_next_attempt(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged = target.with_name("blob.raw")
    staged.write_bytes(b"half")
    real = os.statvfs

    def statvfs(path: Path) -> os.statvfs_result:
        assert not staged.exists()
        return real(path)

    monkeypatch.setattr(os, "statvfs", statvfs)
    await fetch(Breaking(), image_of(), target)
    assert [each.name for each in target.parent.iterdir()] == [target.name]


async def test_room_is_asked_for_what_is_not_there_yet_only(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Breaking(breaks_at=4 * PIECE)
    await interrupted(source, image_of(), target)
    free = os.statvfs(target.parent)
    real = os.statvfs_result((*free[:4], 3 * PIECE // free.f_frsize, *free[5:10]))
    monkeypatch.setattr(os, "statvfs", lambda _: real)
    source.breaks_at = None
    await fetch(source, image_of(), target, told=digests(4))
    assert target.read_bytes() == DATA


# --- over HTTP


def served(data: bytes, asked: list[str], **how: Any) -> Any:
    """A server of the data: with or without ranges, under an entity tag."""

    async def handle(request: web.Request) -> web.StreamResponse:
        wanted = request.headers.get("Range")
        asked.append(wanted or "all")
        if wanted is not None and how.get("status"):
            return web.Response(status=how["status"])
        headers = {"ETag": how["tags"].pop(0)} if how.get("tags") else {}
        start = 0
        if wanted is not None and how.get("has_ranges", True):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return web.Response(status=206 if start else 200, body=data[start:], headers=headers)

    return testing.http_server(handle)


async def fetched_from(url: str, target: Path) -> fetching.Fetched:
    async with aiohttp.ClientSession() as session:
        fetcher = fetchers.HttpFetcher(plugins.Surroundings(session=session))
        image = image_of(location=f"{url}/image")
        return await fetch(fetcher, image, target, told=digests(3))


def left(target: Path) -> None:
    """What a killed process left."""
    part = target.with_name("blob.part")
    part.write_bytes(DATA[: 3 * PIECE])
    os.truncate(part, len(DATA))


@pytest.mark.parametrize(
    ("how", "asked", "left_bytes"),
    [
        ({}, ["all", f"bytes={3 * PIECE}-"], 3 * PIECE),
        ({"tags": ['"1"', '"1"']}, ["all", f"bytes={3 * PIECE}-"], 3 * PIECE),
        ({"has_ranges": False}, ["all", f"bytes={3 * PIECE}-"], 0),  # all of it comes
        ({"status": 400}, ["all", f"bytes={3 * PIECE}-", "all"], 0),  # as Glance
        ({"status": 416}, ["all", f"bytes={3 * PIECE}-", "all"], 0),
        ({"status": 403}, ["all", f"bytes={3 * PIECE}-", "all"], 0),
        ({"status": 405}, ["all", f"bytes={3 * PIECE}-", "all"], 0),
        ({"status": 406}, ["all", f"bytes={3 * PIECE}-", "all"], 0),
    ],
    ids=[
        "ranges",
        "ranges and a tag",
        "no ranges",
        "refuses them",
        "has none",
        "403",
        "405",
        "406",
    ],
)
async def test_over_http_only_the_rest_is_asked_for_where_the_server_has_ranges(
    target: Path, how: dict[str, Any], asked: list[str], left_bytes: int
) -> None:
    left(target)
    said: list[str] = []
    async with served(DATA, said, **how) as url:
        fetched = await fetched_from(url, target)
    assert (said, fetched.left_bytes) == (asked, left_bytes)
    assert target.read_bytes() == DATA


async def test_what_is_left_and_of_no_use_is_found_out_and_all_of_it_is_asked_for(
    target: Path,
) -> None:
    left(target)
    with target.with_name("blob.part").open("r+b") as file:
        file.write(b"\1")
    said: list[str] = []
    async with served(DATA, said) as url:
        fetched = await fetched_from(url, target)
    assert (said, fetched.left_bytes) == (["all", f"bytes={3 * PIECE}-", "all"], 0)
    assert target.read_bytes() == DATA


async def test_a_source_that_has_no_ranges_is_known_before_what_is_left_is_read(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left(target)
    monkeypatch.setattr(sparse, "read", None)  # nobody calls it
    async with served(DATA, [], status=400) as url:
        fetched = await fetched_from(url, target)
    assert (fetched.left_bytes, target.read_bytes() == DATA) == (0, True)


async def test_an_object_that_changes_between_the_answers_is_begun_anew(target: Path) -> None:
    for how in ({"has_ranges": True}, {"has_ranges": False}, {"status": 400}):
        left(target)
        said: list[str] = []
        async with served(DATA, said, tags=['"1"', '"2"'], **how) as url:
            with pytest.raises(SourceError) as caught:
                await fetched_from(url, target)
        assert (caught.value.reason, caught.value.is_transient) == ("source.changed", True)
        assert list(target.parent.iterdir()) == []


async def test_a_file_is_read_from_where_it_was(tmp_path: Path, target: Path) -> None:
    (tmp_path / "image").write_bytes(DATA)
    left(target)
    async with aiohttp.ClientSession() as session:
        surroundings = plugins.Surroundings(session=session, file_roots=[tmp_path])
        fetched = await fetch(
            fetchers.FileFetcher(surroundings),
            image_of(location=str(tmp_path / "image")),
            target,
            told=digests(3),
        )
    assert (fetched.left_bytes, target.read_bytes() == DATA) == (3 * PIECE, True)
