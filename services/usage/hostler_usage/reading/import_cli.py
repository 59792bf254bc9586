"""The command `import`: files of notifications, sent to the service batch by batch.

What was sent before is a duplicate, so an import that was broken off is simply run again.
"""

import gzip
import http.client
import itertools
import json
import os
import time
import urllib.error
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final
from urllib.parse import quote

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from hostler_common import cli, errors
from hostler_common.http import MAX_BODY_BYTES
from hostler_usage.reading.imports import Format, Line, bodies
from hostler_usage.reading.message_file import opened

PORT: Final = 8302
BATCH_LINES: Final = 1000
BATCH_BYTES: Final = 2 * 1024 * 1024
LONGEST_LINE: Final = 15 * 1024 * 1024  # a request holds 16 MiB once decompressed
_REASONS_KEPT: Final = 100
_REASONS_SHOWN: Final = 10
_PATIENCE_SECONDS: Final = 60.0
_ANSWER_SECONDS: Final = 120.0

FilesArgument = Annotated[
    list[Path],
    typer.Argument(help="NDJSON or logs, plain or gzip; - is standard input.", metavar="FILE..."),
]


def register(app: typer.Typer) -> None:
    """The service's command line has `import`."""
    app.command("import")(import_files)


@dataclass(slots=True, kw_only=True)
class Summary:
    """What became of every line; `lines` = `stored` + `duplicate` + `quarantined` + `refused`.

    `conflict` are message ids that were seen at once to stand over several messages now. `other` are
    lines of logs that are no notifications. `refused` lines are larger than the service takes: they
    are nowhere but in their file. `broken_files` could not be read to their ends.
    """

    lines: int = 0
    stored: int = 0
    duplicate: int = 0
    conflict: int = 0
    unknown_type: int = 0
    problem: int = 0
    quarantined: int = 0
    refused: int = 0
    other: int = 0
    seconds: float = 0.0
    quarantined_by_code: Counter[str] = field(default_factory=Counter)
    named: list[dict[str, Any]] = field(default_factory=list)
    broken_files: list[dict[str, Any]] = field(default_factory=list)

    def name(self, file: str, line: int, code: str, reason: str) -> None:
        """Remember why a line was not stored; the first hundred of them."""
        if len(self.named) < _REASONS_KEPT:
            self.named.append({"file": file, "line": line, "code": code, "reason": reason})

    def as_json(self) -> dict[str, Any]:
        """The summary for programs."""
        counts = {
            name: getattr(self, name)
            for name in (
                "lines",
                "stored",
                "duplicate",
                "conflict",
                "unknown_type",
                "problem",
                "quarantined",
                "refused",
                "other",
            )
        }
        return {
            **counts,
            "seconds": round(self.seconds, 3),
            "quarantined_by_code": dict(sorted(self.quarantined_by_code.items())),
            "not_stored": self.named,
            "broken_files": self.broken_files,
        }


def import_files(
    files: FilesArgument,
    source: Annotated[
        str, typer.Option(help="The source they belong to: its region is theirs.")
    ] = "cloud",
    file_format: Annotated[
        Format | None,
        typer.Option("--format", help="ndjson or log; told by a file's first line if absent."),
    ] = None,
    url: cli.UrlOption = None,
    as_json: cli.JsonOption = False,
) -> None:
    """Import notifications from files: archives of bodies, one a line, or logs of oslo's log driver.

    Every line ends as stored, duplicate or quarantined. An import may be run again at any time.
    """
    absent = [
        f"{path} cannot be read: {reason}" for path in files if (reason := _unreadable(path))
    ]
    if absent:
        raise cli.fail("\n".join([*absent, "Nothing was imported."]))
    summary = Summary()
    began = time.monotonic()
    service = _Service(url or os.environ.get("HOSTLER_URL") or f"http://127.0.0.1:{PORT}", source)
    try:
        with _progress() as (task_of, advance):
            for path in files:
                task = task_of(path)
                try:
                    with opened(path) as (stream, position):
                        for batch in _batches(stream, path, file_format, summary):
                            _send(service, batch, path, summary)
                            advance(task, position(), summary)
                except (OSError, EOFError, zlib.error) as exc:
                    summary.broken_files.append({"file": str(path), "reason": str(exc)})
    except errors.HostlerError as exc:
        raise cli.fail(
            f"{exc} ({exc.code}); {summary.stored} were stored before: running it again is safe"
        ) from exc
    summary.seconds = time.monotonic() - began
    _show(summary, as_json=as_json)
    if summary.refused or summary.broken_files:
        raise typer.Exit(1)


# --- reading


def _unreadable(path: Path) -> str | None:
    """Why the file cannot be opened; None where it can be."""
    try:
        if str(path) != "-" and not path.is_fifo():  # what is read of a pipe is gone
            path.open("rb").close()
    except OSError as exc:
        return exc.strerror or str(exc)
    return None


def _batches(
    stream: BinaryIO, path: Path, file_format: Format | None, summary: Summary
) -> Iterator[list[Line]]:
    """The file's bodies in requests' sizes; lines that hold none are counted here."""
    batch: list[Line] = []
    size = 0

    def refuse(number: int) -> None:
        summary.lines += 1
        summary.refused += 1
        reason = f"the line is longer than {LONGEST_LINE} bytes"
        summary.name(str(path), number, "usage.import.line_too_long", reason)

    try:
        for line in bodies(_bounded(stream, refuse), file_format):
            if line.body is None:
                summary.other += 1
                continue
            if batch and (len(batch) >= BATCH_LINES or size + len(line.body) > BATCH_BYTES):
                yield batch
                batch, size = [], 0
            batch.append(line)
            size += len(line.body) + 1
    except (OSError, EOFError, zlib.error):
        if batch:
            yield batch  # what could be read is imported
        raise
    if batch:
        yield batch


def _bounded(stream: BinaryIO, refuse: Callable[[int], None]) -> Iterator[bytes]:
    """Every line; in the place of one that is too long, which is refused, a blank one."""
    for number in itertools.count(1):
        line = stream.readline(LONGEST_LINE + 1)
        if not line:
            return
        if len(line) <= LONGEST_LINE:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(LONGEST_LINE)
        refuse(number)
        yield b"\n"


# --- sending


class _TooLarge(Exception):
    """The service does not take so much at once."""


@dataclass(frozen=True, slots=True)
class _Service:
    """The service at an address, taking imports into one source."""

    address: str
    source: str

    def post(self, lines: Sequence[bytes]) -> dict[str, Any]:
        """What became of the lines. A service that is away is waited for, for a minute.

        Raises:
            _TooLarge: they are too many bytes.
            HostlerError: the service refuses, or stays away.
        """
        if not self.address.startswith(("http://", "https://")):
            raise errors.Invalid(f"{self.address} is no address of a service: it begins with http")
        data = gzip.compress(b"\n".join(lines) + b"\n", compresslevel=1)
        if len(data) > MAX_BODY_BYTES:
            raise _TooLarge  # the service would break the connection off rather than read it
        request = urllib.request.Request(  # noqa: S310  checked above
            f"{self.address.rstrip('/')}/v1/imports?source={quote(self.source, safe='')}",
            data=data,
            headers={
                "Content-Type": "application/x-ndjson",
                "Content-Encoding": "gzip",
                **_authorization(),
            },
            method="POST",
        )
        # no proxy, as in hostler_common.client: the service is next door
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + _PATIENCE_SECONDS
        pause = 0.5
        while True:
            try:
                with opener.open(request, timeout=_ANSWER_SECONDS) as answer:
                    report: dict[str, Any] = json.loads(answer.read())
                    return report
            except urllib.error.HTTPError as exc:
                with exc:
                    refusal = _refusal(exc)
                if refusal.status == 413:
                    raise _TooLarge from exc
                if refusal.status != errors.Unavailable.status:
                    raise refusal from exc
            except (OSError, http.client.HTTPException, ValueError) as exc:
                refusal = errors.Unavailable(f"{self.address} does not answer: {exc}")
            if time.monotonic() + pause > deadline:
                raise refusal
            time.sleep(pause)
            pause = min(2 * pause, 5.0)


def _refusal(answer: urllib.error.HTTPError) -> errors.HostlerError:
    try:
        problem = json.loads(answer.read(1 << 20))
    except (OSError, ValueError, http.client.HTTPException):
        problem = {}
    return errors.from_problem(answer.code, problem if isinstance(problem, dict) else {})


def _authorization() -> dict[str, str]:
    file, token = os.environ.get("HOSTLER_TOKEN_FILE"), os.environ.get("HOSTLER_TOKEN")
    if token is None and file:
        try:
            token = Path(file).read_text(encoding="utf-8").strip()
        except OSError as exc:
            raise errors.Invalid(f"HOSTLER_TOKEN_FILE cannot be read: {exc}") from exc
    return {"Authorization": f"Bearer {token}"} if token else {}


def _send(service: _Service, batch: Sequence[Line], path: Path, summary: Summary) -> None:
    """The batch's lines are counted by what became of them; what is too large at once goes in halves."""
    try:
        report = service.post([line.body for line in batch if line.body is not None])
    except _TooLarge:
        if len(batch) > 1:
            half = len(batch) // 2
            _send(service, batch[:half], path, summary)
            _send(service, batch[half:], path, summary)
            return
        summary.lines += 1
        summary.refused += 1
        reason = "the line is larger than the service takes"
        summary.name(str(path), batch[0].number, "usage.import.line_too_long", reason)
        return
    summary.lines += report["lines"]
    for name in ("stored", "duplicate", "conflict", "unknown_type", "problem", "quarantined"):
        setattr(summary, name, getattr(summary, name) + report[name])
    for item in report["quarantine"]:
        summary.quarantined_by_code[item["code"]] += 1
        line = batch[item["line"] - 1]
        summary.name(str(path), line.number, item["code"], item["reason"])
    unnamed = report["quarantined"] - len(report["quarantine"])
    if unnamed:
        summary.quarantined_by_code["not named"] += unnamed


# --- showing


@contextmanager
def _progress() -> Iterator[tuple[Callable[[Path], Any], Callable[[Any, int, Summary], None]]]:
    """A bar for each file, on a terminal; nowhere else."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[told]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:

        def begin(path: Path) -> Any:  # noqa: ANN401  rich's TaskID
            total = path.stat().st_size if path.is_file() else None
            return progress.add_task(path.name, total=total, told="")

        def advance(task: Any, position: int, summary: Summary) -> None:  # noqa: ANN401
            told = f"{summary.stored} stored, {summary.duplicate} duplicate"
            if summary.quarantined:
                told += f", {summary.quarantined} quarantined"
            progress.update(task, completed=position, told=told)

        yield begin, advance


def _show(summary: Summary, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(summary.as_json(), indent=2))
        return
    table = Table(title=f"{summary.lines} lines", title_justify="left", show_header=False)
    for name, value in (
        ("stored", summary.stored),
        ("  of a type not known", summary.unknown_type),
        ("  with a field that cannot be read", summary.problem),
        ("  message ids with several bodies", summary.conflict),
        ("duplicate", summary.duplicate),
        ("quarantined", summary.quarantined),
        ("refused", summary.refused),
        ("lines of logs that are no notifications", summary.other),
        ("lines a second", round(summary.lines / max(summary.seconds, 0.001))),
    ):
        table.add_row(name, str(value))
    console = Console()
    (console if console.is_terminal else Console(width=240)).print(table)
    for item in summary.named[:_REASONS_SHOWN]:
        typer.echo(f"{item['file']}:{item['line']}: {item['code']}: {item['reason']}", err=True)
    if len(summary.named) > _REASONS_SHOWN:
        typer.echo("and more: see /v1/quarantine", err=True)
    for item in summary.broken_files:
        typer.echo(f"{item['file']}: cannot be read to its end: {item['reason']}", err=True)
