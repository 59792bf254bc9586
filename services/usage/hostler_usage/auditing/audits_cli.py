"""The commands for audits and operations: clients of the service's API, a table or JSON."""

import asyncio
import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hostler_common import cli

PORT = 8302

_TIMES = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%SZ"]
StartOption = Annotated[
    datetime | None,
    typer.Option("--start", formats=_TIMES, help="In UTC; a day before the end if absent."),
]
EndOption = Annotated[
    datetime | None, typer.Option("--end", formats=_TIMES, help="In UTC; now if absent.")
]
ProjectOption = Annotated[str | None, typer.Option(help="Only of this project.")]
TypeOption = Annotated[str | None, typer.Option(help="Only of this resource type.")]
_SHARES = ("verified", "repaired", "excused", "unverified")
LimitOption = Annotated[int, typer.Option(min=1, max=1000, help="How many at most.")]


def audits(
    start: StartOption = None,
    end: EndOption = None,
    project_id: ProjectOption = None,
    resource_type: TypeOption = None,
    status: Annotated[
        str | None, typer.Option(help="verified, repaired, mismatch, missing, ...")
    ] = None,
    code: Annotated[str | None, typer.Option(help="Only this code.")] = None,
    limit: LimitOption = 100,
    url: cli.UrlOption = None,
    as_json: cli.JsonOption = False,
) -> None:
    """What became of each audit period, ours beside theirs, newest first."""
    answer = _get(
        url,
        "/v1/audits",
        **_window(start, end),
        project_id=project_id,
        resource_type=resource_type,
        status=status,
        code=code,
        limit=limit,
    )
    columns = (
        "period_start",
        "period_end",
        "periods",
        "status",
        "code",
        "resource_type",
        "resource_id",
        "host",
        "field",
        "ours",
        "theirs",
    )
    _show(answer, as_json, "audits, newest first", columns, answer["audits"])


def audit_report(
    start: StartOption = None,
    end: EndOption = None,
    group_by: Annotated[str, typer.Option(help="project, resource_type, region, day")] = "project",
    url: cli.UrlOption = None,
    as_json: cli.JsonOption = False,
) -> None:
    """How much of the usage in a window rests on audits, by project or otherwise."""
    answer = _get(url, "/v1/audits/report", **_window(start, end), group_by=group_by, limit=1000)
    # one unit a column: hours, then shares of those hours; how many periods got which verdict is a column of its own
    columns = (*answer["group_by"], "hours held", *_SHARES, "periods")
    rows = [
        {
            **{name: value or "unknown" for name, value in row["group"].items()},
            "hours held": row["resource_microseconds"]["held"] / 3_600_000_000,
            **{name: _share_of_held(row["resource_microseconds"], name) for name in _SHARES},
            "periods": ", ".join(
                f"{count} {status}" for status, count in sorted(row["verdicts"].items())
            )
            or "-",
        }
        for row in answer["report"]
    ]
    _show(answer, as_json, f"audits from {answer['start']} to {answer['end']}", columns, rows)


def _share_of_held(microseconds: dict[str, int], part: str) -> str:
    if not microseconds["held"]:
        return "-"
    return f"{100 * microseconds[part] / microseconds['held']:.2f} %"


def operations(
    start: StartOption = None,
    end: EndOption = None,
    group_by: Annotated[
        str, typer.Option(help="action, host, flavor, resource_type, region, project")
    ] = "resource_type,action",
    url: cli.UrlOption = None,
    as_json: cli.JsonOption = False,
) -> None:
    """How many operations there were, how many failed, and how long they took."""
    answer = _get(
        url, "/v1/operations/summary", **_window(start, end), group_by=group_by, limit=1000
    )
    columns = (
        *answer["group_by"],
        "operations",
        "failed",
        "unfinished",
        "failure_share",
        "p50_ms",
        "p99_ms",
    )
    rows = [{**row, **row["group"]} for row in answer["profiles"]]
    _show(answer, as_json, "operations", columns, rows)


def _window(start: datetime | None, end: datetime | None) -> dict[str, str]:
    until = end.replace(tzinfo=UTC) if end else datetime.now(UTC)
    since = start.replace(tzinfo=UTC) if start else until - timedelta(days=1)
    return {
        "start": since.isoformat().replace("+00:00", "Z"),
        "end": until.isoformat().replace("+00:00", "Z"),
    }


def _get(url: str | None, path: str, **params: object) -> dict[str, Any]:
    async def call() -> dict[str, Any]:
        async with cli.api(url, default_port=PORT) as api:
            answer: dict[str, Any] = await api.get(path, **params)
            return answer

    return asyncio.run(call())


def _show(
    answer: dict[str, Any],
    as_json: bool,
    title: str,
    columns: Sequence[str],
    rows: Sequence[dict[str, Any]],
) -> None:
    """The answer itself, or its rows as a table; whole, where it goes to a file or a pipe."""
    if as_json:
        typer.echo(json.dumps(answer, indent=2))
        return
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(_cell(row[column]) for column in columns))
    console = Console()
    (console if console.is_terminal else Console(width=240)).print(table)
    if answer["next_marker"] is not None:
        typer.echo("there are more: narrow the window, or raise --limit")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return "-" if value is None else str(value)


COMMANDS: dict[str, Callable[..., None]] = {
    "audits": audits,
    "audit-report": audit_report,
    "operations": operations,
}
"""The commands by name, for the service's own command line to add."""
