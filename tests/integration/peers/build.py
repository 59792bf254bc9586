"""The environment of a real peer: built once from its lock, kept under the user's cache folder.

    python tests/integration/peers/build.py glance      prints the environment's directory

A peer has an environment of its own, since what it needs would not fit beside what we need. The
directory is named for the hash of the lock, so that a fresh clone finds what another has built,
and a changed lock builds another. `NAME.in` says what is wanted; the lock is made from it with

    uv pip compile --universal --generate-hashes --no-emit-index-url --no-annotate --no-header \
        --python-version 3.11 NAME.in -o NAME.lock
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
COMPLETE = ".hostler-complete"


def environment(name: str) -> Path:
    """The environment of the peer, built if it is not there yet.

    Raises:
        CalledProcessError: it cannot be built; what pip said is on stderr.
        OSError: there is no lock of that name, or the cache folder cannot be written.
    """
    lock = HERE / f"{name}.lock"
    key = hashlib.sha256(lock.read_bytes()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hostler" / "peers"
    directory = cache / f"{name}-{key}"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{name}-{key}.building").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)  # two test runs may come at once
        if not (directory / COMPLETE).exists():
            shutil.rmtree(directory, ignore_errors=True)
            _build(directory, lock)
            (directory / COMPLETE).touch()
    return directory


def _build(directory: Path, lock: Path) -> None:
    uv = Path(sys.executable).parent / "uv"
    python = directory / "bin" / "python"
    if uv.exists():
        _run(uv, "venv", "-q", "-p", sys.executable, directory)
        _run(uv, "pip", "sync", "-q", "--require-hashes", "-p", python, lock)
    else:
        _run(sys.executable, "-m", "venv", directory)
        _run(python, "-m", "pip", "install", "-q", "--require-hashes", "--no-deps", "-r", lock)


def _run(*argv: str | Path) -> None:
    subprocess.run([str(word) for word in argv], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    sys.stdout.write(f"{environment(sys.argv[1])}\n")
