"""The commands `export` and `idle`: clients of the service's API."""

import asyncio
import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final
from urllib.parse import urlencode

import typer
from rich.console import Console
from rich.table import Table

from hostler_common import cli, errors

PORT: Final = 8302
_CHUNK_BYTES: Final = 1 << 16
_SECONDS_BETWEEN_WORDS: Final = 0.2
_TIMES: Final = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%SZ"]


class What(StrEnum):
    """A table that can be exported."""

    USAGE = "usage"
    INTERVALS = "intervals"
    FOCUS = "focus"


class Format(StrEnum):
    """A file format."""

    CSV = "csv"
    NDJSON = "ndjson"
    PARQUET = "parquet"


def register(app: typer.Typer) -> None:
    """The service's command line has `export` and `idle`."""
    app.command("export")(export)
    app.command("idle")(idle)


def export(
    what: Annotated[What, typer.Argument(help="The table.")] = What.USAGE,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file; standard output if absent.")
    ] = None,
    file_format: Annotated[
        Format | None,
        typer.Option(
            "--format", help="By the file's ending if absent, else csv; focus: no ndjson."
        ),
    ] = None,
    start: Annotated[
        datetime | None,
        typer.Option("--start", formats=_TIMES, help="In UTC; a day before the end if absent."),
    ] = None,
    end: Annotated[
        datetime | None, typer.Option("--end", formats=_TIMES, help="In UTC; now if absent.")
    ] = None,
    group_by: Annotated[
        str | None, typer.Option(help="Usage: project, resource, day, flavor, ...")
    ] = None,
    price_book: Annotated[str | None, typer.Option(help="FOCUS: costs are by this book.")] = None,
    corrections: Annotated[
        bool,
        typer.Option("--corrections", help="FOCUS: adjustments to closed months, too."),
    ] = False,
    project_id: Annotated[str | None, typer.Option(help="Only of this project.")] = None,
    region: Annotated[str | None, typer.Option(help="Only of this region.")] = None,
    resource_type: Annotated[str | None, typer.Option(help="Only of this type.")] = None,
    guard: Annotated[
        bool, typer.Option(help="CSV: an apostrophe before text that would be a formula.")
    ] = True,
    url: cli.UrlOption = None,
) -> None:
    """Write usage, intervals or FOCUS charges of a window to a file.

    A file is there whole or not at all: it is written beside and moved to its place at the end.
    """
    until = end.replace(tzinfo=UTC) if end else datetime.now(UTC).replace(microsecond=0)
    since = start.replace(tzinfo=UTC) if start else until - timedelta(days=1)
    chosen = file_format or _format_of(output)
    parameters = {
        "start": since.isoformat().replace("+00:00", "Z"),
        "end": until.isoformat().replace("+00:00", "Z"),
        "project_id": project_id,
        "region": region,
        "resource_type": resource_type,
        **({"group_by": group_by} if what is What.USAGE else {}),
        **(
            {"price_book": price_book, "corrections": str(corrections).lower()}
            if what is What.FOCUS
            else {"guard": str(guard).lower()}
        ),
    }
    address = url or os.environ.get("HOSTLER_URL") or f"http://127.0.0.1:{PORT}"
    try:
        with _opened(address, f"/v1/exports/{what}.{chosen}", parameters) as answer:
            if output is None:
                _copy(answer, sys.stdout.buffer)
            else:
                part = output.with_name(f"{output.name}.part")
                try:
                    with part.open("wb") as file:
                        _copy(answer, file)
                    part.replace(output)
                finally:
                    part.unlink(missing_ok=True)
    except errors.HostlerError as exc:
        raise cli.fail(f"{exc} ({exc.code})") from exc
    except http.client.HTTPException as exc:
        raise cli.fail("the service broke off: the export is not whole") from exc
    except OSError as exc:
        raise cli.fail(f"{exc}") from exc


def idle(
    project_id: Annotated[str | None, typer.Option(help="Only of this project.")] = None,
    region: Annotated[str | None, typer.Option(help="Only of this region.")] = None,
    resource_type: Annotated[str | None, typer.Option(help="Only of this type.")] = None,
    reason: Annotated[
        str | None, typer.Option(help="stopped, inactive, unattached, orphaned, ...")
    ] = None,
    include_unknown: Annotated[
        bool, typer.Option("--unknown", help="Also those of which it cannot be told, and why.")
    ] = False,
    price_book: Annotated[str | None, typer.Option(help="What each costs by this book.")] = None,
    url: cli.UrlOption = None,
    as_json: cli.JsonOption = False,
) -> None:
    """Resources that are held and that nobody seems to need; thresholds are the API's defaults."""

    async def call() -> dict[str, Any]:
        findings: list[Any] = []
        examined = unknown = 0
        async with cli.api(url, default_port=PORT) as api:
            marker = None
            while True:
                answer: dict[str, Any] = await api.get(
                    "/v1/reports/idle",
                    project_id=project_id,
                    region=region,
                    resource_type=resource_type,
                    reason=reason,
                    include_unknown=str(include_unknown).lower(),
                    price_book=price_book,
                    marker=marker,
                    limit=1000,
                )
                findings += answer["findings"]
                examined += answer["examined"]
                unknown += answer["unknown"]
                marker = answer["next_marker"]
                if marker is None:
                    break
        return {**answer, "findings": findings, "examined": examined, "unknown": unknown}

    answer = asyncio.run(call())
    if as_json:
        sys.stdout.write(json.dumps(answer, indent=2) + "\n")
        return
    table = Table(title=f"idle and forgotten, as of {answer['as_of']}", title_justify="left")
    columns = ["resource_type", "resource_id", "project_id", "reason", "age_days", "score"]
    for column in [*columns, "evidence", "cost_per_month"]:
        table.add_column(column)
    for item in sorted(answer["findings"], key=lambda one: -one["score"]):
        cost = item["cost_per_month"]
        table.add_row(
            *(str(item[name] if item[name] is not None else "unknown") for name in columns),
            "; ".join(item["evidence"]),
            "-" if cost is None else f"{cost} {answer['currency']}",
        )
    console = Console()
    (console if console.is_terminal else Console(width=240)).print(table)
    sys.stdout.write(
        f"{len(answer['findings'])} of the {answer['examined']} resources that were looked at;"
        f" of {answer['unknown']} it cannot be told (--unknown says why)\n"
    )


def _format_of(output: Path | None) -> Format:
    ending = output.suffix.removeprefix(".") if output is not None else ""
    return Format(ending) if ending in set(Format) else Format.CSV


@contextmanager
def _opened(address: str, path: str, parameters: Mapping[str, str | None]) -> Iterator[Any]:
    """The answer to a GET, to be read piece by piece.

    Raises:
        HostlerError: the service refuses.
        OSError: there is no service at that address.
    """
    if not address.startswith(("http://", "https://")):
        raise OSError(f"{address} is no address of a service: it begins with http:// or https://")
    query = urlencode({name: value for name, value in parameters.items() if value is not None})
    request = urllib.request.Request(f"{address.rstrip('/')}{path}?{query}")  # noqa: S310  checked above
    token = _token()
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    # no proxy, as in hostler_common.client: the service is next door
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        answer = opener.open(request, timeout=120)
    except urllib.error.HTTPError as exc:
        with exc:
            raise _refusal(exc) from exc
    with answer:
        yield answer


def _refusal(answer: urllib.error.HTTPError) -> errors.HostlerError:
    try:
        problem = json.loads(answer.read(1 << 20))
    except ValueError:
        problem = {}
    return errors.from_problem(answer.code, problem if isinstance(problem, dict) else {})


def _token() -> str | None:
    file = os.environ.get("HOSTLER_TOKEN_FILE")
    token = os.environ.get("HOSTLER_TOKEN")
    return Path(file).read_text(encoding="utf-8").strip() if token is None and file else token


def _copy(answer: BinaryIO, file: BinaryIO) -> None:
    """All of the answer is in the file; meanwhile a line on stderr says how far it is."""
    is_watched = sys.stderr.isatty()
    began = said = time.monotonic()
    written = 0
    while chunk := answer.read(_CHUNK_BYTES):
        file.write(chunk)
        written += len(chunk)
        now = time.monotonic()
        if is_watched and now - said >= _SECONDS_BETWEEN_WORDS:
            said = now
            sys.stderr.write(f"\r{_progress(written, now - began)}")
            sys.stderr.flush()
    file.flush()
    begin, end = ("\r", "\n") if is_watched else ("", "\n")
    sys.stderr.write(f"{begin}{_progress(written, time.monotonic() - began)}, done{end}")


def _progress(written: int, seconds: float) -> str:
    rate = written / max(seconds, 0.001)
    size = f"{written / 1e6:.1f} MB" if written >= 1e5 else f"{written:,} bytes"
    return f"{size} written in {seconds:.1f} s, {rate / 1e6:.1f} MB/s"
