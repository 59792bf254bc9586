"""The commands `prices`, `budgets` and `groups`: clients of the rating API.

A document is read here, checked for what its language hides (floats, doubled names, aliases), and
sent as JSON that loses nothing: numbers with a point go as text.
"""

import asyncio
import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hostler_common import cli, client, errors
from hostler_usage.money import document_text
from hostler_usage.money.document import DocumentError
from hostler_usage.money.price_book import price_book
from hostler_usage.settings import Settings

PORT: int = Settings.model_fields["http_port"].default
PAGE = 1000

prices = typer.Typer(no_args_is_help=True, help="Price books, and what usage costs by them.")
budgets = typer.Typer(no_args_is_help=True, help="Budgets and quotas.")
groups = typer.Typer(no_args_is_help=True, help="Dated groups of projects.")

_TIMES = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%SZ"]
FileArgument = Annotated[
    Path, typer.Argument(exists=True, dir_okay=False, help="YAML, or JSON by its name's ending.")
]
ReplacesOption = Annotated[
    int | None, typer.Option(min=0, help="Refuse unless this is the version now; 0: none.")
]


def add_to(main: typer.Typer) -> None:
    """The commands belong to `main`."""
    main.add_typer(prices, name="prices")
    main.add_typer(budgets, name="budgets")
    main.add_typer(groups, name="groups")


# --- prices


@prices.command("list")
def list_command(url: cli.UrlOption = None, as_json: cli.JsonOption = False) -> None:
    """Price books, in their newest versions."""
    rows = _pages(url, "/v1/price-books", "price_books")
    if as_json:
        return _json(rows)
    return _table(
        ["name", "version", "currency", "prices", "public", "since"],
        [
            [
                row["name"],
                row["version"],
                row["document"]["currency"],
                len(row["document"]["prices"]),
                row["document"].get("public", False),
                row["created_at"],
            ]
            for row in rows
        ],
    )


@prices.command("show")
def show_command(
    name: str,
    version: Annotated[int | None, typer.Option(min=1, help="The newest one if absent.")] = None,
    url: cli.UrlOption = None,
) -> None:
    """A price book, as JSON."""
    _json(_get(url, f"/v1/price-books/{name}", version=version))


@prices.command("put")
def put_command(
    name: str,
    file: FileArgument,
    replaces: ReplacesOption = None,
    url: cli.UrlOption = None,
    as_json: cli.JsonOption = False,
) -> None:
    """Make the file the newest version of a price book."""
    _put(url, f"/v1/price-books/{name}", file, replaces, as_json=as_json)


@prices.command("check")
def check_file_command(file: FileArgument) -> None:
    """Say what is wrong with a price book's file, without a service: measures are not looked up."""
    try:
        price_book(_read(file))
    except DocumentError as exc:
        raise cli.fail(
            "\n".join(f"{fault.path}: {fault.problem}" for fault in exc.faults)
        ) from exc
    typer.echo(f"{file} is a price book")


@prices.command("costs")
def costs_command(
    start: Annotated[
        datetime | None, typer.Option(formats=_TIMES, help="In UTC; a day before the end.")
    ] = None,
    end: Annotated[datetime | None, typer.Option(formats=_TIMES, help="In UTC; now.")] = None,
    group_by: Annotated[
        str, typer.Option(help="project, type, flavor, day, month, group:<kind>, ...")
    ] = "project",
    book: Annotated[str, typer.Option(help="name, or name@version")] = "default",
    compare: Annotated[str | None, typer.Option(help="A second book, beside the first.")] = None,
    time_zone: Annotated[str, typer.Option(help="Of days and months.")] = "UTC",
    url: cli.UrlOption = None,
    as_json: cli.JsonOption = False,
) -> None:
    """What usage in a window costs."""
    until = end.replace(tzinfo=UTC) if end else datetime.now(UTC)
    since = start.replace(tzinfo=UTC) if start else until - timedelta(days=1)

    async def call(api: client.Api) -> dict[str, Any]:
        rows: list[Any] = []
        marker = None
        while True:
            answer: dict[str, Any] = await api.get(
                "/v1/costs",
                start=since.isoformat(),
                end=until.isoformat(),
                group_by=group_by,
                price_book=book,
                compare=compare,
                time_zone=time_zone,
                limit=PAGE,
                marker=marker,
            )
            rows += answer["costs"]
            marker = answer["next_marker"]
            if marker is None:
                return {**answer, "costs": rows}

    answer = _with_api(url, call)
    if as_json:
        return _json(answer)
    currency = answer["price_book"]["currency"]
    beside = [f"{compare} {currency}", "difference"] if compare else []
    rows = [
        [*(row["group"][name] or "unknown" for name in answer["group_by"]), *_costs(row, compare)]
        for row in answer["costs"]
    ]
    blank = ["all", *[""] * len(answer["group_by"])][: len(answer["group_by"])]
    _table(
        [*answer["group_by"], f"{book} {currency}", *beside, "unpriced"],
        [*rows, [*blank, *_costs(answer["total"], compare)]],
        numbers={f"{book} {currency}", *beside},
    )
    if answer["unfolded_resources"]:
        typer.echo(
            f"{answer['unfolded_resources']} resources have messages not counted in here yet"
        )
    return None


def _costs(row: dict[str, Any], compare: str | None) -> list[str]:
    beside = [row["compared"]["cost"], row["difference"]] if compare else []
    return [row["cost"], *beside, ", ".join(one["measure"] for one in row["unpriced"])]


# --- budgets


@budgets.command("list")
def budgets_command(url: cli.UrlOption = None, as_json: cli.JsonOption = False) -> None:
    """Budgets, and how far they are used up."""
    rows = _pages(url, "/v1/budgets", "budgets")
    if as_json:
        return _json(rows)
    columns = ["name", "unit", "limit", "consumed", "left", "percent", "forecast", "until"]
    return _table(
        columns,
        [[row["name"], *_standing(row)] for row in rows],
        numbers={"limit", "consumed", "left", "percent", "forecast"},
    )


def _standing(row: dict[str, Any]) -> list[object]:
    state = row["state"]
    if state is None:
        return [row["problem"] or "has not begun", *[""] * 6]
    return [
        *(state[name] for name in ("unit", "limit", "consumed", "left")),
        state["consumed_percent"] or "-",
        state["forecast"],
        state["period_end"],
    ]


@budgets.command("show")
def budget_command(name: str, url: cli.UrlOption = None) -> None:
    """A budget and where it stands, as JSON."""
    _json(_get(url, f"/v1/budgets/{name}"))


@budgets.command("put")
def put_budget_command(
    name: str,
    file: FileArgument,
    replaces: ReplacesOption = None,
    url: cli.UrlOption = None,
    as_json: cli.JsonOption = False,
) -> None:
    """Make or change a budget."""
    _put(url, f"/v1/budgets/{name}", file, replaces, as_json=as_json)


@budgets.command("delete")
def delete_budget_command(name: str, url: cli.UrlOption = None) -> None:
    """Delete a budget, with the record of what it reached."""
    _with_api(url, lambda api: api.delete(f"/v1/budgets/{name}"))
    typer.echo(f"{name} is deleted")


@budgets.command("check")
def check_command(
    what: Annotated[list[str], typer.Argument(help="measure=amount, in unit-hours or units")],
    project: Annotated[str, typer.Option(help="Who would use it.")],
    user: Annotated[str | None, typer.Option()] = None,
    attribute: Annotated[
        list[str] | None,
        typer.Option(help="flavor=m1.small: what prices go by; may be given often"),
    ] = None,
    url: cli.UrlOption = None,
    as_json: cli.JsonOption = False,
) -> None:
    """Say whether a use would stay within its budgets; exit code 1 if not."""
    body = {
        "project_id": project,
        "user_id": user,
        "what": _pairs(what),
        "attributes": _pairs(attribute or []),
    }
    answer = _with_api(url, lambda api: api.post("/v1/budgets/check", body))
    if as_json:
        _json(answer)
    else:
        _table(
            ["budget", "allowed", "unit", "asked", "left", "unpriced", "problem"],
            [
                [
                    row["name"] or "another's",
                    "yes" if row["allowed"] else "no",
                    *(row[name] or "" for name in ("unit", "asked", "left")),
                    ", ".join(row["unpriced"]),
                    row["problem"] or "",
                ]
                for row in answer["budgets"]
            ],
            numbers={"asked", "left"},
        )
    if not answer["allowed"]:
        raise cli.fail("a budget does not allow it")


# --- groups of projects


@groups.command("list")
def groups_command(
    kind: Annotated[str | None, typer.Option(help="Only of this kind.")] = None,
    project: Annotated[str | None, typer.Option(help="Only of this project.")] = None,
    url: cli.UrlOption = None,
    as_json: cli.JsonOption = False,
) -> None:
    """Which project belongs to which group, and when."""
    rows = _pages(url, "/v1/project-groups", "project_groups", kind=kind, project_id=project)
    if as_json:
        return _json(rows)
    columns = ["kind", "group", "project_id", "valid_from", "valid_until"]
    return _table(columns, [[row[name] or "-" for name in columns] for row in rows])


@groups.command("put")
def put_groups_command(
    kind: str,
    project: str,
    memberships: Annotated[
        list[str] | None,
        typer.Argument(help="group[,from[,until]]: days in UTC; all there are, none takes away"),
    ] = None,
    url: cli.UrlOption = None,
    as_json: cli.JsonOption = False,
) -> None:
    """Say which groups of a kind a project was and is in; what is not said is no longer so."""
    body = {"memberships": [_membership(text) for text in memberships or []]}
    answer = _with_api(url, lambda api: api.put(f"/v1/project-groups/{kind}/{project}", body))
    if as_json:
        return _json(answer["project_groups"])
    count = len(answer["project_groups"])
    return typer.echo(f"{project} has {count} membership{'s' * (count != 1)} of kind {kind}")


def _membership(text: str) -> dict[str, str]:
    group, *days = text.split(",")
    try:
        moments = [
            datetime.fromisoformat(day).replace(tzinfo=UTC).isoformat() if day else ""
            for day in days
        ]
    except ValueError as exc:
        raise cli.fail(f"{text}: expected group[,from[,until]] with days like 2026-01-31") from exc
    if len(moments) > 2:
        raise cli.fail(f"{text}: expected group[,from[,until]]")
    names = zip(("valid_from", "valid_until"), moments, strict=False)
    return {"group": group, **{name: moment for name, moment in names if moment}}


# --- what the commands share


def _read(file: Path) -> Any:  # noqa: ANN401  JSON
    try:
        return document_text.read(file.read_bytes(), is_json=file.suffix == ".json")
    except errors.HostlerError as exc:
        raise cli.fail(f"{file}: {exc}") from exc


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    found = {}
    for text in texts:
        name, is_there, value = text.partition("=")
        if not is_there:
            raise cli.fail(f"{text}: expected name=value")
        found[name] = value
    return found


def _with_api(url: str | None, call: Any) -> Any:  # noqa: ANN401  JSON
    async def run() -> Any:  # noqa: ANN401  JSON
        async with cli.api(url, default_port=PORT) as api:
            return await call(api)

    return asyncio.run(run())


def _get(url: str | None, path: str, **params: object) -> Any:  # noqa: ANN401  JSON
    return _with_api(url, lambda api: api.get(path, **params))


def _put(url: str | None, path: str, file: Path, replaces: int | None, *, as_json: bool) -> None:
    """The file is the newest version of what is at the path, and that is said."""
    document = document_text.plain(_read(file))
    query = "" if replaces is None else f"?replaces={replaces}"
    row = _with_api(url, lambda api: api.put(path + query, document))
    if as_json:
        _json(row)
    else:
        typer.echo(f"{row['name']} is at version {row['version']}")


def _pages(url: str | None, path: str, name: str, **params: object) -> list[Any]:
    async def call(api: client.Api) -> list[Any]:
        rows: list[Any] = []
        marker = None
        while True:
            answer = await api.get(path, marker=marker, limit=PAGE, **params)
            rows += answer[name]
            marker = answer["next_marker"]
            if marker is None:
                return rows

    found: list[Any] = _with_api(url, call)
    return found


def _json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2))


def _table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    numbers: set[str] | frozenset[str] = frozenset(),
) -> None:
    """Print a table; whole, where it goes to a file or a pipe."""
    table = Table()
    for name in columns:
        table.add_column(name, justify="right" if name in numbers else "left")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console = Console()
    (console if console.is_terminal else Console(width=240)).print(table)
