"""A seed's directory holds its blobs, and what an operator put there, and nothing else."""

import uuid
from pathlib import Path

from hostler_precache.transfer import leftovers
from hostler_precache.transfer.manifest import BlobId


def test_files_of_blobs_that_are_not_the_seeds_go_and_nothing_else_does(tmp_path: Path) -> None:
    mine, gone = BlobId(str(uuid.uuid4())), BlobId(str(uuid.uuid4()))
    kept = [mine, f"{mine}.part", "README", "lost+found", f"{gone}.bak", f"x{gone}", gone[:-1]]
    going = [gone, f"{gone}.part", f"{gone}.raw"]
    for name in [*kept, *going]:
        (tmp_path / name).write_bytes(b"x")
    directory, link = str(uuid.uuid4()), str(uuid.uuid4())
    (tmp_path / directory).mkdir()
    (tmp_path / link).symlink_to(tmp_path / "README")
    assert leftovers.discard(tmp_path, {mine}) == sorted(going)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, directory, link])
    assert leftovers.discard(tmp_path, {mine}) == []


def test_a_seed_that_never_had_an_image_has_no_leftovers(tmp_path: Path) -> None:
    assert leftovers.discard(tmp_path / "absent", set()) == []
