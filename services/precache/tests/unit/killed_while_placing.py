"""Kills a process at each step that placing or removing an image takes on disk, and runs it again.

    python killed_while_placing.py place|remove DIRECTORY      prints how many steps there were

A step is what the interpreter audits: each open, link, rename, unlink, change of owner or time. A
program of its own, since it forks.
"""

import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from hostler_precache.placing.nova_conf import NovaConf
from hostler_precache.placing.nova_placer import NovaPlacer
from hostler_precache.placing.placement import Wanted
from hostler_precache.placing.shelf import Shelf
from hostler_precache.transfer import manifest, pieces
from hostler_precache.transfer.manifest import BlobId, ImageId

WANTED = Wanted(
    image_id=ImageId("155d900f-4e14-4e4c-a73d-069cbf4541e6"),
    blob_id=BlobId("5a0e1d0e-0000-4000-8000-000000000001"),
    disk_format="raw",
)
DATA = random.Random(1).randbytes(manifest.MIN_PIECE_BYTES + 1234)
STEPS = ("open", "os.link", "os.rename", "os.remove", "os.chown", "os.utime", "os.chmod", "fcntl.")
hasher = manifest.Hasher(manifest.MIN_PIECE_BYTES)
hasher.update(DATA)
LISTED = hasher.finish()


def shelf_of(instances: Path) -> Shelf:
    conf = NovaConf(instances_path=instances, base_directory=instances / "_base")
    return Shelf(NovaPlacer(conf))


def place(instances: Path) -> None:
    """What the agent does at start, with all pieces at hand."""
    shelf = shelf_of(instances)
    if shelf.find(WANTED, LISTED) is not None:
        return
    shelf.make_room(WANTED, LISTED)
    store = pieces.PieceStore.open(shelf.directory, WANTED.blob_id, LISTED)
    for piece, span in manifest.spans(LISTED):
        store.write(piece, DATA[span.start : span.stop])
    shelf.place(WANTED, store, LISTED)
    shelf.close()


def remove(instances: Path) -> None:
    shelf_of(instances).tend([], [WANTED.image_id])


def killed(work: Callable[[Path], None], instances: Path, step: int) -> bool:
    """Whether the process was killed before that step, rather than done."""
    pid = os.fork()
    if pid == 0:
        left = [step]

        def count(event: str, _: object) -> None:
            if event.startswith(STEPS):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            work(instances)
        except BaseException:  # noqa: BLE001  the child ends here, whatever it is
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def check_visible(instances: Path) -> None:
    """Under the final name is the whole image, or nothing."""
    path = shelf_of(instances).target(WANTED)
    assert not path.exists() or path.read_bytes() == DATA


def check_placed(instances: Path) -> None:
    """The image is in its place, known, pinned, and nothing is left over."""
    shelf = shelf_of(instances)
    assert shelf.target(WANTED).read_bytes() == DATA
    pieces.discard_others(shelf.directory, ())  # as the agent does once it has the image
    assert shelf.tend([WANTED]).lost == ()
    assert shelf.is_ours(WANTED)
    assert [one.is_kept for one in shelf.holdings()] == [True]
    name = shelf.target(WANTED).name
    expected = {"agent.lock", f"{name}.record", f"{name}.manifest", f"{name}.kept"}
    left = {path.name for path in (shelf.directory / ".precache").iterdir()}
    assert left == expected, left ^ expected
    shelf.close()


def check_removed(instances: Path) -> None:
    shelf = shelf_of(instances)
    assert {path.name for path in shelf.directory.iterdir()} == {".precache"}
    assert {path.name for path in (shelf.directory / ".precache").iterdir()} == {"agent.lock"}


def main(action: str, directory: Path) -> int:
    step = 0
    while True:
        instances = directory / f"at-{step}"
        instances.mkdir()
        if action == "remove":
            place(instances)
        work, check = (place, check_placed) if action == "place" else (remove, check_removed)
        was_killed = killed(work, instances, step)
        check_visible(instances)
        assert not killed(work, instances, 1 << 30)
        check_visible(instances)
        check(instances)
        shutil.rmtree(instances)
        if not was_killed:
            return step
        step += 1


if __name__ == "__main__":
    sys.stdout.write(str(main(sys.argv[1], Path(sys.argv[2]))))
