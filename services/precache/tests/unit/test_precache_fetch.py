"""An image comes from its source onto the seed's disk whole, checked and raw, or not at all."""
# ruff: noqa: ASYNC240  the files are the test's own, and small

import asyncio
import errno
import hashlib
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostler_common.testing import eventually
from hostler_precache import images, testing
from hostler_precache.images import Image, SourceHash, Verification
from hostler_precache.sources import conversion, fetchers, plugins
from hostler_precache.sources.fetch import Fetched, fetch
from hostler_precache.sources.source import Hole, Part, Source, SourceError
from hostler_precache.transfer import manifest, pieces

KIB, MIB = 1 << 10, 1 << 20
IMAGE = images.image_id("debian")


class Given:
    """A fetcher of chunks that a test has made."""

    def __init__(self, *chunks: bytes | Hole, parts: Sequence[Part] = (), **known: Any) -> None:
        self._chunks = chunks
        self._parts = parts
        self._known = known

    @asynccontextmanager
    async def open(self, image: Image) -> AsyncIterator[Source]:
        del image

        async def chunks() -> AsyncIterator[bytes | Hole]:
            for chunk in self._chunks:
                yield chunk

        known = {"size_bytes": None, **self._known}
        yield Source(chunks=chunks(), parts=self._parts, **known)


def image_of(**fields: Any) -> Image:
    return Image(image_id=IMAGE, fetcher="test", **fields)


def plain(chunks: Sequence[bytes | Hole]) -> bytes:
    return b"".join(bytes(c.length_bytes) if isinstance(c, Hole) else c for c in chunks)


def disk(data: bytes, path: Path, form: str, *options: str) -> Path:
    """The data as a virtual disk of that format, as qemu-img makes it."""
    raw = path.with_suffix(".source")
    raw.write_bytes(data)
    command = ["qemu-img", "convert", "-f", "raw", "-O", form, *options, str(raw), str(path)]
    subprocess.run(command, check=True)
    raw.unlink()
    return path


def empty_disk(path: Path, size: str) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), size], check=True)


async def fetch_file(source: Path, target: Path, **fields: Any) -> Fetched:
    async with aiohttp.ClientSession() as session:
        fetcher = fetchers.FileFetcher(
            plugins.Surroundings(session=session, file_roots=[source.parent])
        )
        return await fetch(fetcher, image_of(location=str(source), **fields), target)


async def refused(source: Path, target: Path, **fields: Any) -> SourceError:
    with pytest.raises(SourceError) as caught:
        await fetch_file(source, target, **fields)
    assert not target.exists()
    assert [each.name for each in target.parent.iterdir()] == []
    return caught.value


@pytest.fixture
def target(tmp_path: Path) -> Path:
    directory = tmp_path / "seed"
    directory.mkdir()
    return directory / "blob"


# --- the bytes


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    chunks=st.lists(
        st.one_of(
            st.builds(lambda n: Hole(length_bytes=n), st.integers(1, 300 * KIB)),
            st.builds(bytes, st.integers(0, 200 * KIB)),
            st.builds(
                lambda n, s: testing.image_of(n, s), st.integers(0, 200 * KIB), st.integers(1, 3)
            ),
        ),
        max_size=6,
    ),
    is_size_known=st.booleans(),
)
def test_whatever_the_chunks_the_file_and_its_manifest_are_those_of_the_bytes(
    chunks: list[bytes | Hole], is_size_known: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    target = tmp_path_factory.mktemp("seed") / "blob"
    data = plain(chunks)
    claimed = SourceHash(algorithm="sha512", value=hashlib.sha512(data).hexdigest())
    fetcher = Given(*chunks, size_bytes=len(data) if is_size_known else None)
    fetched = asyncio.run(fetch(fetcher, image_of(source_hash=claimed), target))
    assert target.read_bytes() == data
    expected = manifest.Hasher(manifest.piece_bytes_for(len(data)))
    expected.update(data)
    assert fetched.manifest == expected.finish()
    assert fetched.verification is Verification.HASH


async def test_zeros_take_no_room_on_the_seed_whether_sent_or_not(target: Path) -> None:
    data = testing.image_of(64 * KIB)
    await fetch(
        Given(data + bytes(8 * MIB) + data, Hole(length_bytes=8 * MIB)), image_of(), target
    )
    assert target.stat().st_size == 16 * MIB + 128 * KIB
    assert target.stat().st_blocks * 512 <= 256 * KIB


async def test_holes_of_a_file_are_not_read_and_forty_gigabytes_of_them_cost_nothing(
    tmp_path: Path, target: Path
) -> None:
    source = tmp_path / "sparse"
    data = testing.image_of(MIB)
    with source.open("wb") as file:
        file.seek(20 << 30)
        file.write(data)
        file.truncate(40 << 30)
    fetched = await fetch_file(source, target)
    assert fetched.manifest.size_bytes == 40 << 30
    assert target.stat().st_size == 40 << 30
    assert target.stat().st_blocks * 512 < 2 * MIB
    with target.open("rb") as file:
        file.seek(20 << 30)
        assert file.read(MIB) == data


async def test_an_image_of_no_bytes_is_an_image(tmp_path: Path, target: Path) -> None:
    (tmp_path / "empty").touch()
    fetched = await fetch_file(tmp_path / "empty", target, disk_format="raw", size_bytes=0)
    assert (fetched.manifest.size_bytes, fetched.disk_format) == (0, "raw")
    assert target.read_bytes() == b""


@pytest.mark.parametrize(
    "meddle", [lambda path: os.utime(path, (1, 1)), lambda path: os.truncate(path, MIB)]
)
async def test_a_file_that_changes_while_it_is_read_is_not_taken(
    tmp_path: Path, meddle: Callable[[Path], None]
) -> None:
    source = tmp_path / "image"
    source.write_bytes(testing.image_of(3 * MIB))

    async def read() -> None:
        async with aiohttp.ClientSession() as session:
            surroundings = plugins.Surroundings(session=session, file_roots=[tmp_path])
            fetcher = fetchers.FileFetcher(surroundings)
            async with fetcher.open(image_of(location=str(source))) as opened:
                async for _ in opened.chunks:
                    meddle(source)

    with pytest.raises(SourceError) as caught:
        await read()
    assert (caught.value.reason, caught.value.is_transient) == ("source.changed", True)


async def test_a_file_that_cannot_be_read_is_not_taken_for_zeros(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "image").write_bytes(testing.image_of(MIB))

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "lseek", broken)
    error = await refused(tmp_path / "image", target)
    assert (error.reason, "Input/output error" in error.detail) == ("source.unreadable", True)


# --- what the source says of its bytes


def part_of(data: bytes, length: int | None = None) -> Part:
    value = hashlib.md5(data, usedforsecurity=False).hexdigest()
    return Part(
        length_bytes=len(data) if length is None else length,
        source_hash=SourceHash(algorithm="md5", value=value),
    )


async def test_parts_are_checked_as_they_come_whatever_the_chunks(target: Path) -> None:
    one, two = testing.image_of(300 * KIB, 1), testing.image_of(5, 2)
    data = one + two + one
    chunks = [data[at : at + 70_000] for at in range(0, len(data), 70_000)]
    parts = [part_of(one), part_of(b""), part_of(two), part_of(one)]
    fetched = await fetch(Given(*chunks, parts=parts, size_bytes=len(data)), image_of(), target)
    assert fetched.verification is Verification.CHECKSUM
    assert target.read_bytes() == data


async def test_a_part_that_is_another_ends_the_fetch(target: Path) -> None:
    data = testing.image_of(300 * KIB)
    fetcher = Given(data, data, parts=[part_of(data), part_of(b"other", len(data))])
    with pytest.raises(SourceError, match="part 2") as caught:
        await fetch(fetcher, image_of(), target)
    assert caught.value.reason == "source.hash_mismatch"
    assert list(target.parent.iterdir()) == []


async def test_without_any_hash_the_image_is_marked_unverifiable(target: Path) -> None:
    fetched = await fetch(Given(b"image"), image_of(), target)
    assert fetched.verification is Verification.UNVERIFIABLE


@pytest.mark.parametrize(
    ("fetcher", "fields", "reason"),
    [
        (Given(b"abc", size_bytes=4), {}, "source.truncated"),
        (Given(b"abc", size_bytes=2), {}, "source.size_mismatch"),
        (Given(b"abc"), {"size_bytes": 4}, "source.truncated"),
        (Given(b"abc"), {"size_bytes": 2}, "source.size_mismatch"),
        (Given(b"abc", size_bytes=3), {"size_bytes": 2}, "source.size_mismatch"),
        (Given(b"abc", Hole(length_bytes=-2)), {}, "source.malformed"),
        (Given(b"abc", Hole(length_bytes=1 << 80), size_bytes=9), {}, "source.size_mismatch"),
        (
            Given(b"abc", size_bytes=3),
            {"source_hash": SourceHash(algorithm="sha256", value="0" * 64)},
            "source.hash_mismatch",
        ),
    ],
)
async def test_bytes_that_are_not_what_the_source_says_leave_nothing(
    target: Path, fetcher: Given, fields: dict[str, Any], reason: str
) -> None:
    with pytest.raises(SourceError) as caught:
        await fetch(fetcher, image_of(**fields), target)
    assert caught.value.reason == reason
    assert list(target.parent.iterdir()) == []


async def test_a_disk_that_fills_up_is_told_apart(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(pieces.NoSpaceError):
        await fetch(Given(b"image"), image_of(), target)
    assert list(target.parent.iterdir()) == []


async def test_a_disk_that_became_read_only_is_what_is_told(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object) -> int:
        monkeypatch.setattr(os, "unlink", read_only)
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "pwrite", read_only)
    with pytest.raises(pieces.PieceStoreError, match="Read-only"):
        await fetch(Given(b"image"), image_of(), target)
    assert [each.name for each in target.parent.iterdir()] == ["blob.part"]


async def test_room_is_asked_for_before_the_first_byte(target: Path) -> None:
    with pytest.raises(pieces.NoSpaceError):
        await fetch(Given(b"", size_bytes=1 << 60), image_of(), target)


async def test_room_for_holes_is_not_asked_for(target: Path) -> None:
    fetcher = Given(Hole(length_bytes=1 << 40), size_bytes=1 << 40, allocated_bytes=0)
    fetched = await fetch(fetcher, image_of(), target)
    assert fetched.manifest.size_bytes == 1 << 40


# --- formats


CONTENT = testing.image_of(3 * MIB + 512) + bytes(20 * MIB) + testing.image_of(MIB, 2)


FORMATS = [
    ("qcow2", "qcow2", ()),
    ("qcow2", "qcow2", ("-c",)),
    ("qcow2", "qcow2", ("-o", "preallocation=metadata")),
    ("vmdk", "vmdk", ()),
    ("vmdk", "vmdk", ("-o", "subformat=streamOptimized")),
    ("vhd", "vpc", ("-o", "force_size=on")),
    ("vhdx", "vhdx", ()),
    ("vdi", "vdi", ()),
    ("vdi", "vdi", ("-o", "static=on")),
]


@pytest.mark.parametrize(("disk_format", "qemus_name", "options"), FORMATS)
async def test_a_disk_in_another_format_reaches_the_seed_as_the_raw_disk_it_holds(
    tmp_path: Path, target: Path, disk_format: str, qemus_name: str, options: tuple[str, ...]
) -> None:
    source = disk(CONTENT, tmp_path / "image", qemus_name, *options)
    claimed = SourceHash(algorithm="sha512", value=hashlib.sha512(source.read_bytes()).hexdigest())
    fetched = await fetch_file(
        source,
        target,
        disk_format=disk_format,
        source_hash=claimed,
        size_bytes=source.stat().st_size,
    )
    assert target.read_bytes() == CONTENT
    assert fetched.manifest.size_bytes == len(CONTENT)
    assert (fetched.disk_format, fetched.verification) == ("raw", Verification.HASH)
    assert target.stat().st_blocks * 512 < 6 * MIB  # sparse
    assert [each.name for each in target.parent.iterdir()] == [target.name]


async def test_the_source_hash_is_of_the_source_and_not_of_the_raw_disk(
    tmp_path: Path, target: Path
) -> None:
    source = disk(CONTENT, tmp_path / "image", "qcow2")
    claimed = SourceHash(algorithm="sha256", value=hashlib.sha256(CONTENT).hexdigest())
    error = await refused(source, target, disk_format="qcow2", source_hash=claimed)
    assert error.reason == "source.hash_mismatch"


async def test_without_conversion_the_image_is_served_in_its_own_format(
    tmp_path: Path, target: Path
) -> None:
    source = disk(CONTENT, tmp_path / "image", "qcow2")
    fetcher = Given(source.read_bytes())
    fetched = await fetch(fetcher, image_of(disk_format="qcow2"), target, convert_to_raw=False)
    assert target.read_bytes() == source.read_bytes()
    assert fetched.disk_format == "qcow2"


@pytest.mark.parametrize("disk_format", [None, "raw", "vmdk", "iso"])
async def test_a_qcow2_that_is_declared_as_something_else_is_refused(
    tmp_path: Path, target: Path, disk_format: str | None
) -> None:
    source = disk(CONTENT, tmp_path / "image", "qcow2")
    error = await refused(source, target, disk_format=disk_format)
    assert error.reason == "source.format_mismatch"
    assert "'qcow2'" in error.detail


async def test_raw_bytes_that_are_declared_as_qcow2_are_refused(
    tmp_path: Path, target: Path
) -> None:
    (tmp_path / "image").write_bytes(CONTENT)
    error = await refused(tmp_path / "image", target, disk_format="qcow2")
    assert error.reason == "source.format_mismatch"


def qcow2_with_a_backing_file(path: Path) -> Path:
    disk(CONTENT, path.with_name("base"), "qcow2")
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]
    subprocess.run([*command, str(path.with_name("base")), str(path)], check=True)
    return path


def qcow2_with_a_data_file(path: Path) -> Path:
    beside = f"data_file={path.with_name('data')},data_file_raw=on"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", beside, str(path), "1M"]
    subprocess.run(command, check=True)
    return path


def vmdk_of_several_files(path: Path) -> Path:
    return disk(CONTENT, path, "vmdk", "-o", "subformat=monolithicFlat")


def vmdk_that_reads_a_host_file(path: Path) -> Path:
    path.write_text(
        "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n"
        'createType="monolithicFlat"\nRW 4096 FLAT "/etc/passwd" 0\n'
    )
    return path


def qcow2_within_a_qcow2(path: Path) -> Path:
    inner = qcow2_with_a_backing_file(path.with_name("inner"))
    return disk(inner.read_bytes(), path, "qcow2")


def luks(path: Path) -> Path:
    path.write_bytes(b"LUKS\xba\xbe\x00\x01".ljust(MIB, b"\0"))
    return path


def encrypted_qcow2(path: Path) -> Path:
    disk(CONTENT, path, "qcow2")
    with path.open("r+b") as file:
        file.seek(32)  # crypt_method: AES
        file.write((1).to_bytes(4, "big"))
    return path


def parallels(path: Path) -> Path:
    # a format that qemu-img takes by its magic, and that no inspector knows
    subprocess.run(["qemu-img", "create", "-q", "-f", "parallels", str(path), "1M"], check=True)
    return path


@pytest.mark.parametrize(
    ("make", "disk_format", "reason"),
    [
        (qcow2_with_a_backing_file, "qcow2", "source.format_unsafe"),
        (qcow2_with_a_data_file, "qcow2", "source.format_unsafe"),
        (vmdk_of_several_files, "vmdk", "source.format_mismatch"),
        (vmdk_that_reads_a_host_file, "vmdk", "source.format_unsafe"),
        (vmdk_that_reads_a_host_file, "raw", "source.format_unsafe"),
        (qcow2_within_a_qcow2, "qcow2", "source.format_mismatch"),
        (luks, "luks", "source.format_unsupported"),
        (luks, "raw", "source.format_mismatch"),
        (encrypted_qcow2, "qcow2", "source.format_unsupported"),
        (parallels, "raw", "source.format_mismatch"),
        (parallels, "ploop", "source.format_unsupported"),
    ],
)
async def test_an_image_that_could_read_other_files_or_cannot_be_judged_is_never_served(
    tmp_path: Path, target: Path, make: Any, disk_format: str, reason: str
) -> None:
    directory = tmp_path / "source"
    directory.mkdir()
    error = await refused(make(directory / "image"), target, disk_format=disk_format)
    assert (error.reason, error.is_transient) == (reason, False)


@pytest.mark.parametrize("kept_bytes", [10, 600, 70_000, 200_000])
async def test_a_qcow2_that_was_cut_off_when_it_was_uploaded_is_refused(
    tmp_path: Path, target: Path, kept_bytes: int
) -> None:
    source = disk(CONTENT, tmp_path / "image", "qcow2")
    os.truncate(source, kept_bytes)
    error = await refused(source, target, disk_format="qcow2")
    assert error.reason.startswith("source.format_")


@pytest.mark.parametrize(("disk_format", "qemus_name", "options"), FORMATS)
async def test_of_a_disk_that_was_cut_off_no_part_is_taken_for_zeros(
    tmp_path: Path, target: Path, disk_format: str, qemus_name: str, options: tuple[str, ...]
) -> None:
    made = disk(CONTENT, tmp_path / "made", qemus_name, *options).read_bytes()
    source = tmp_path / "image"
    refusals = 0
    for lost_bytes in (1, 512, MIB // 2, 3 * MIB // 2, len(made) // 2, len(made) - 5000):
        source.write_bytes(made[:-lost_bytes])
        try:
            await fetch_file(source, target, disk_format=disk_format)
        except SourceError as error:
            assert error.reason.startswith(("source.format_", "source.convert_failed"))  # noqa: PT017
            refusals += 1
        else:  # what is after the data is of no use to the disk
            assert target.read_bytes() == CONTENT
    assert refusals >= 2


async def test_a_disk_larger_than_any_image_is_refused(tmp_path: Path, target: Path) -> None:
    source = tmp_path / "image"
    empty_disk(source, "5T")
    error = await refused(source, target, disk_format="qcow2")
    assert error.reason == "source.format_unsupported"


async def test_an_empty_disk_of_terabytes_is_converted_into_holes(
    tmp_path: Path, target: Path
) -> None:
    source = tmp_path / "image"
    empty_disk(source, "2T")
    fetched = await fetch_file(source, target, disk_format="qcow2")
    assert (fetched.manifest.size_bytes, fetched.manifest.data_bytes) == (2 << 40, 0)
    assert target.stat().st_blocks * 512 < MIB


async def test_a_partition_table_is_raw_and_a_cd_is_a_cd(tmp_path: Path, target: Path) -> None:
    table = bytearray(MIB)
    table[446:462] = bytes([0, 0, 2, 0, 0xEE, 0xFF, 0xFF, 0xFF, 1, 0, 0, 0, 0xFF, 7, 0, 0])
    table[510:512] = b"\x55\xaa"
    (tmp_path / "image").write_bytes(table)
    assert (await fetch_file(tmp_path / "image", target, disk_format="raw")).disk_format == "raw"
    target.unlink()
    cd = bytearray(MIB)
    cd[32768:32774] = b"\x01CD001"
    (tmp_path / "image").write_bytes(cd)
    assert (await fetch_file(tmp_path / "image", target, disk_format="iso")).disk_format == "raw"
    target.unlink()
    error = await refused(tmp_path / "image", target, disk_format="raw")
    assert error.reason == "source.format_mismatch"


async def test_a_conversion_that_needs_too_much_is_ended_by_its_limits(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = disk(CONTENT, tmp_path / "image", "qcow2")
    monkeypatch.setattr(conversion, "MEMORY_BYTES", 8 * MIB)
    error = await refused(source, target, disk_format="qcow2")
    assert error.reason == "source.convert_failed"


async def test_a_conversion_that_would_fill_the_disk_is_not_begun(
    tmp_path: Path, target: Path
) -> None:
    source = disk(CONTENT, tmp_path / "image", "qcow2")
    with pytest.raises(pieces.NoSpaceError):
        await conversion.to_raw(source, target, expected="qcow2", reserve_bytes=1 << 60)
    assert not target.exists()


async def test_a_conversion_ends_when_the_disk_fills_meanwhile(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = disk(CONTENT, tmp_path / "image", "qcow2")
    # as much as is needed when it begins, nothing from then on; qemu-img is slow enough to be seen
    free = iter([1 << 50])
    monkeypatch.setattr(conversion, "_free_bytes", lambda _: next(free, 0))
    with pytest.raises(pieces.NoSpaceError):
        await conversion.to_raw(source, target, expected="qcow2", reserve_bytes=1)


async def test_a_fetch_that_is_cancelled_while_it_converts_leaves_no_process(
    tmp_path: Path, target: Path
) -> None:
    source = disk(testing.image_of(64 * MIB), tmp_path / "image", "qcow2", "-c")
    task = asyncio.create_task(fetch_file(source, target, disk_format="qcow2"))

    async def converts() -> bool:
        return target.with_name("blob.raw").exists()

    await eventually(converts, every_seconds=0.002)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list(target.parent.iterdir()) == []
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    names = [Path(f"/proc/{child}/comm").read_text().strip() for child in children]
    assert "qemu-img" not in names


async def test_where_qemu_img_is_missing_raw_images_are_served_and_others_say_why_not(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = disk(CONTENT, tmp_path / "image", "qcow2")
    (tmp_path / "raw").write_bytes(CONTENT)
    monkeypatch.setenv("PATH", str(tmp_path))
    error = await refused(source, target, disk_format="qcow2")
    assert error.reason == "source.convert_unavailable"
    assert (await fetch_file(tmp_path / "raw", target, disk_format="raw")).disk_format == "raw"
