"""The commands for periods: clients of the service's API, a table or JSON, and the check of a manifest."""

import asyncio
import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hostler_common import cli
from hostler_usage.periods.period import Manifest, recomputed

PORT = 8302
_PAGE = 1000

periods = typer.Typer(
    no_args_is_help=True, help="Months of usage, and what they were closed with."
)
NameArgument = Annotated[str, typer.Argument(help="YYYY-MM.")]


def register(app: typer.Typer) -> None:
    """The service's command line has `periods`."""
    app.add_typer(periods, name="periods")


@periods.command("list")
def list_command(url: cli.UrlOption = None, as_json: cli.JsonOption = False) -> None:
    """Periods, the newest first."""
    found = _pages(url, "/v1/periods", "periods")
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    table = Table(title="periods", title_justify="left")
    columns = ("name", "start", "end", "state", "settles_at", "closed_at", "closed_by")
    for column in (*columns, "lines", "sha256"):
        table.add_column(column)
    for item in found:
        manifest = item["manifest"] or {"lines": None, "sha256": None}
        cells = (*(item[name] for name in columns), manifest["lines"], manifest["sha256"])
        table.add_row(*("-" if cell is None else str(cell) for cell in cells))
    _show(table)


@periods.command("show")
def show_command(name: NameArgument, url: cli.UrlOption = None) -> None:
    """One period as JSON: its state, what it waits for, its manifest."""
    typer.echo(json.dumps(_call(url, "GET", f"/v1/periods/{name}"), indent=2))


@periods.command("close")
def close_command(
    name: NameArgument,
    overrule: Annotated[
        bool, typer.Option("--overrule", help="Even if the fold is behind or audits unchecked.")
    ] = False,
    key: Annotated[
        str | None, typer.Option("--idempotency-key", help="Sent twice, it is done once.")
    ] = None,
    url: cli.UrlOption = None,
) -> None:
    """Close a period that is over, without waiting for what is late."""
    body = {"overrule": overrule}
    found = _call(url, "POST", f"/v1/periods/{name}/close", body=body, key=key)
    typer.echo(json.dumps(found, indent=2))


@periods.command("adjustments")
def adjustments_command(
    name: NameArgument,
    charged: Annotated[
        bool, typer.Option("--charged", help="Those charged to it, not those of its own lines.")
    ] = False,
    url: cli.UrlOption = None,
    as_json: cli.JsonOption = False,
) -> None:
    """What late news changed about a closed period, or those corrections that were charged to it."""
    found = _pages(
        url,
        f"/v1/periods/{name}/adjustments",
        "adjustments",
        of="charged" if charged else "corrected",
    )
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    table = Table(title=f"adjustments of {name}", title_justify="left")
    columns = (
        "noticed_at",
        "period",
        "charged_to",
        "region",
        "project_id",
        "resource_type",
        "resource_id",
        "state_class",
        "kind",
        "measure",
        "delta",
        "messages",
    )
    for column in columns:
        table.add_column(column)
    for item in found:
        table.add_row(*("-" if item[one] is None else str(item[one]) for one in columns))
    _show(table)


@periods.command("verify")
def verify_command(name: NameArgument, url: cli.UrlOption = None) -> None:
    """Recompute the manifest of a closed period from its lines; exit code 1 where they differ."""
    said = _call(url, "GET", f"/v1/periods/{name}")["manifest"]
    text = _call(url, "GET", f"/v1/periods/{name}/lines")
    if said is None or said["lines"] is None:
        raise cli.fail("only callers that may see every project see all that the manifest is over")
    try:
        found = recomputed((text or "").encode().splitlines(keepends=True))
    except ValueError as exc:
        raise cli.fail(f"period {name}: {exc}") from exc
    stored = Manifest(
        sha256=bytes.fromhex(said["sha256"]), lines=said["lines"], totals=said["totals"]
    )
    if found != stored:
        raise cli.fail(
            f"period {name} is not what was sealed: {found.lines} lines hash to"
            f" {found.sha256.hex()}, the manifest says {stored.lines} and {stored.sha256.hex()}"
        )
    typer.echo(f"period {name}: {found.lines} lines hash to {found.sha256.hex()}, as was sealed")


def _call(
    url: str | None, method: str, path: str, *, body: object = None, key: str | None = None
) -> Any:  # noqa: ANN401  JSON
    async def call() -> Any:  # noqa: ANN401  JSON
        async with cli.api(url, default_port=PORT) as api:
            if method == "POST":
                return await api.post(path, body, idempotency_key=key)
            return await api.get(path)

    return asyncio.run(call())


def _pages(url: str | None, path: str, name: str, **params: object) -> list[dict[str, Any]]:
    async def call() -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        async with cli.api(url, default_port=PORT) as api:
            marker = None
            while True:
                answer = await api.get(path, marker=marker, limit=_PAGE, **params)
                rows += answer[name]
                marker = answer["next_marker"]
                if marker is None:
                    return rows

    return asyncio.run(call())


def _show(table: Table) -> None:
    console = Console()
    (console if console.is_terminal else Console(width=280)).print(table)
