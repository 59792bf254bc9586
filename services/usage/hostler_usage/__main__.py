"""The command line of usage: the service's own commands, and clients of its API."""

import asyncio
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hostler_common import cli
from hostler_usage.app import PACKAGE, http_app, serve
from hostler_usage.auditing import audits_cli
from hostler_usage.explaining import explain_cli
from hostler_usage.exporting import exports_cli
from hostler_usage.history import rebuild_cli
from hostler_usage.money import rating_cli
from hostler_usage.periods import periods_cli
from hostler_usage.reading import import_cli, rules_cli
from hostler_usage.settings import Settings

PORT = 8302
PAGE = 1000

main = cli.service(Settings, serve, http_app, package=PACKAGE)

for name, command in audits_cli.COMMANDS.items():
    main.command(name)(command)
exports_cli.register(main)
rating_cli.add_to(main)
for group in (explain_cli, periods_cli, import_cli, rules_cli, rebuild_cli):
    group.register(main)

_TIMES = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%SZ"]
StartOption = Annotated[
    datetime | None,
    typer.Option("--start", formats=_TIMES, help="In UTC; a day before the end if absent."),
]
EndOption = Annotated[
    datetime | None, typer.Option("--end", formats=_TIMES, help="In UTC; now if absent.")
]


def _pages(url: str | None, path: str, name: str, **params: object) -> dict[str, Any]:
    """The last page's answer, with the rows of all pages under `name`."""

    async def call() -> dict[str, Any]:
        rows: list[Any] = []
        async with cli.api(url, default_port=PORT) as api:
            marker = None
            while True:
                answer: dict[str, Any] = await api.get(path, marker=marker, limit=PAGE, **params)
                rows += answer[name]
                marker = answer["next_marker"]
                if marker is None:
                    return {**answer, name: rows}

    return asyncio.run(call())


@main.command("report")
def report_command(
    start: StartOption = None,
    end: EndOption = None,
    group_by: Annotated[
        str, typer.Option(help="project, user, resource, type, region, flavor, ...")
    ] = "project",
    url: cli.UrlOption = None,
    as_json: cli.JsonOption = False,
) -> None:
    """Usage in a window, by project or otherwise."""
    until = end.replace(tzinfo=UTC) if end else datetime.now(UTC)
    since = start.replace(tzinfo=UTC) if start else until - timedelta(days=1)
    answer = _pages(
        url,
        "/v1/usage",
        "usage",
        start=since.isoformat().replace("+00:00", "Z"),
        end=until.isoformat().replace("+00:00", "Z"),
        group_by=group_by,
    )
    if as_json:
        print(json.dumps(answer, indent=2))
        return
    table = Table(
        title=f"usage from {answer['start']} to {answer['end']}, as of {answer['as_of']}",
        title_justify="left",
    )
    rows = list(_report_rows(answer))
    for column in rows[0]:
        table.add_column(column, justify="left" if column in answer["group_by"] else "right")
    for row in rows[1:]:
        table.add_row(*row)
    _show(table)
    if answer["unfolded_resources"]:
        print(f"{answer['unfolded_resources']} resources have messages not counted in here yet")


def _report_rows(answer: dict[str, Any]) -> Iterator[list[str]]:
    """The heading, then a row for each group; measures that nobody used are left out."""
    used = list(dict.fromkeys(name for row in answer["usage"] for name in _amounts(row)))
    # sums of whole days do not know how many resources there were
    counts = any(row["resources"] is not None for row in answer["usage"])
    yield [*answer["group_by"], *["resources"][:counts], *used]
    for row in answer["usage"]:
        groups = [row["group"][name] or "unknown" for name in answer["group_by"]]
        amounts = _amounts(row)
        resources = [str(row["resources"] or "")][:counts]
        yield [*groups, *resources, *(amounts.get(name, "") for name in used)]


def _amounts(row: dict[str, Any]) -> dict[str, str]:
    """What was held in hours, and what moved in its units."""
    hours = {name: f"{value:.2f}" for name, value in row["hours"].items()}
    return hours | {name: str(value) for name, value in row["amounts"].items()}


@main.command("events")
def events_command(
    event_type: Annotated[str | None, typer.Option(help="Only this event type.")] = None,
    resource_id: Annotated[str | None, typer.Option(help="Only of this resource.")] = None,
    project_id: Annotated[str | None, typer.Option(help="Only of this project.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many at most.")] = 50,
    url: cli.UrlOption = None,
    as_json: cli.JsonOption = False,
) -> None:
    """Stored notifications, newest first."""

    async def call() -> dict[str, Any]:
        async with cli.api(url, default_port=PORT) as api:
            answer: dict[str, Any] = await api.get(
                "/v1/events",
                event_type=event_type,
                resource_id=resource_id,
                project_id=project_id,
                limit=limit,
            )
            return answer

    answer = asyncio.run(call())
    if as_json:
        print(json.dumps(answer, indent=2))
        return
    table = Table(title="events, newest first", title_justify="left")
    columns = ["event_time", "event_type", "resource_id", "project_id", "message_id", "problems"]
    for column in columns:
        table.add_column(column)
    for event in answer["events"]:
        table.add_row(*(_cell(event[column]) for column in columns))
    _show(table)


def _show(table: Table) -> None:
    """Print the table; whole, where it goes to a file or a pipe."""
    console = Console()
    (console if console.is_terminal else Console(width=240)).print(table)


def _cell(value: object) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value or "-")


if __name__ == "__main__":
    main()
