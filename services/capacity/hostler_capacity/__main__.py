"""The command line of capacity: the service's own commands, and clients of its API."""

import asyncio
import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hostler_capacity.app import PACKAGE, http_app, serve
from hostler_capacity.settings import Settings
from hostler_common import cli

PORT = 8303

main = cli.service(Settings, serve, http_app, package=PACKAGE)


def _call(url: str | None, path: str, **params: object) -> Any:  # noqa: ANN401  JSON
    async def call() -> Any:  # noqa: ANN401  JSON
        async with cli.api(url, default_port=PORT) as api:
            return await api.get(path, **params)

    return asyncio.run(call())


def _print(title: str, columns: list[str], rows: list[list[object]]) -> None:
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="right" if name.endswith((" MB", "fits")) else "left")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console().print(table)


def _why(host: dict[str, Any]) -> str:
    if host["blocker"]:
        return str(host["blocker"])
    binding = host["binding"]
    return f"{binding['resource']}: one more lacks {binding['short_by']}"


@main.command("fit")
def fit_command(flavor: str, url: cli.UrlOption = None, as_json: cli.JsonOption = False) -> None:
    """How many more of a flavor fit, where, and why not more."""
    answer = _call(url, "/v1/fit", flavor=flavor, limit=1000)
    if as_json:
        print(json.dumps(answer, indent=2))
        return
    _print(
        f"{answer['total']} more {flavor} fit on {answer['nodes']} nodes",
        ["host", "node", "state", "fits", "overhead MB", "model", "why not one more"],
        [
            [
                host["host"],
                host["hypervisor_hostname"],
                host["state"],
                host["fits"],
                host["overhead_mb"],
                host["overhead_model"],
                _why(host),
            ]
            for host in answer["hosts"]
        ],
    )


@main.command("hosts")
def hosts_command(url: cli.UrlOption = None, as_json: cli.JsonOption = False) -> None:
    """Every node and its memory: limit, foreign use, claims, free."""
    answer = _call(url, "/v1/hosts", limit=1000)
    if as_json:
        print(json.dumps(answer, indent=2))
        return
    rows = []
    for host in answer["hosts"]:
        memory = host["resources"]["memory_mb"]
        rows.append(
            [
                host["host"],
                host["hypervisor_hostname"],
                host["hypervisor_type"],
                host["state"],
                memory["limit"],
                memory["foreign"],
                memory["claimed"],
                memory["free"],
            ]
        )
    columns = ["host", "node", "type", "state", "limit MB", "foreign MB", "claimed MB", "free MB"]
    _print(f"hosts as of {answer['as_of']}", columns, rows)


@main.command("claims")
def claims_command(
    state: Annotated[
        str | None, typer.Option(help="Only those held, confirmed, released or expired.")
    ] = None,
    url: cli.UrlOption = None,
    as_json: cli.JsonOption = False,
) -> None:
    """Claims, oldest first."""
    answer = _call(url, "/v1/claims", state=state, limit=1000)
    if as_json:
        print(json.dumps(answer, indent=2))
        return
    _print(
        "claims",
        ["claim", "state", "flavor", "project", "host", "memory MB", "expires"],
        [
            [
                claim["id"],
                claim["state"],
                claim["flavor"] or "-",
                claim["project_id"],
                claim["host"],
                claim["resources"]["memory_mb"],
                claim["expires_at"] if claim["state"] == "held" else "-",
            ]
            for claim in answer["claims"]
        ],
    )


if __name__ == "__main__":
    main()
