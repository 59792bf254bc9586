"""The command `explain`: a client of the service's API, a table or JSON."""

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hostler_common import cli

PORT = 8302
_PAGE = 200
_TIMES = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%SZ"]


def register(app: typer.Typer) -> None:
    """The service's command line has `explain`."""
    app.command("explain")(explain)


def explain(
    measure: Annotated[str, typer.Argument(help="instance_hours, volume_gb_hours, ...")],
    groups: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[GROUP=VALUE]...",
            help="As usage rows have them: project=p1 flavor=m1.small day=2026-05-04T00:00:00 ...",
        ),
    ] = None,
    start: Annotated[
        datetime | None,
        typer.Option("--start", formats=_TIMES, help="In UTC; a day before the end if absent."),
    ] = None,
    end: Annotated[
        datetime | None, typer.Option("--end", formats=_TIMES, help="In UTC; now if absent.")
    ] = None,
    time_zone: Annotated[str, typer.Option(help="Of an hour, day or month.")] = "UTC",
    url: cli.UrlOption = None,
    as_json: cli.JsonOption = False,
) -> None:
    """What a number of usage is made of: its resources, their intervals, and the messages behind them."""
    until = end.replace(tzinfo=UTC) if end else datetime.now(UTC)
    since = start.replace(tzinfo=UTC) if start else until - timedelta(days=1)
    params: dict[str, object] = {}
    for text in groups or []:
        name, sign, value = text.partition("=")
        if not sign or name in params:
            raise cli.fail(f"{text}: a group and its value are meant, once: project=p1", 2)
        params[name] = value
    params |= {
        "measure": measure,
        "start": since.isoformat(),
        "end": until.isoformat(),
        "as_of": datetime.now(UTC).isoformat(),
        "time_zone": time_zone,
    }
    answer = asyncio.run(_whole(url, params))
    if as_json:
        typer.echo(json.dumps(answer, indent=2))
        return
    shown = "" if answer["hours"] is None else f" ({answer['hours']:.6f} hours)"
    typer.echo(
        f"{measure} from {answer['start']} to {answer['end']}, as of {answer['as_of']}:"
        f" {answer['amount']}{shown} of {answer['resources']} resources, {answer['parts']} parts"
    )
    table = Table(title_justify="left")
    columns = ("resource", "from", "until", "state", "quantity", "amount", "rests on")
    for column in columns:
        table.add_column(column)
    for share in answer["shares"]:
        name = f"{share['resource_type']} {share['resource_id']}"
        for part in share["intervals"]:
            table.add_row(
                name,
                part["counted_from"],
                part["counted_until"],
                part["state_class"],
                str(part["quantity"]),
                str(part["amount"]),
                _messages([*part["opened_by"], *part["closed_by"]]),
            )
        for part in share["amounts"]:
            cells = (part["at"], "-", part["state_class"] or "-", "-", str(part["amount"]))
            table.add_row(name, *cells, _messages(part["evidence"]))
    console = Console()
    (console if console.is_terminal else Console(width=240)).print(table)
    if answer["unfolded_resources"]:
        typer.echo(
            f"{answer['unfolded_resources']} resources have messages not counted in here yet"
        )


def _messages(cited: list[dict[str, str]]) -> str:
    return ", ".join(dict.fromkeys(item["message_id"] for item in cited))


async def _whole(url: str | None, params: dict[str, object]) -> dict[str, Any]:
    """All pages as one answer: a resource whose parts are on several is there once."""
    shares: dict[tuple[str, str, str], dict[str, Any]] = {}
    events: dict[str, Any] = {}
    not_shown: dict[str, Any] = {}
    async with cli.api(url, default_port=PORT) as api:
        marker = None
        while True:
            answer: dict[str, Any] = await api.get(
                "/v1/usage/explain", marker=marker, limit=_PAGE, **params
            )
            for share in answer["shares"]:
                key = (share["region"], share["resource_type"], share["resource_id"])
                known = shares.setdefault(key, share)
                if known is not share:
                    known["intervals"] += share["intervals"]
                    known["amounts"] += share["amounts"]
            events |= {item["id"]: item for item in answer["events"]}
            not_shown |= {item["event_id"]: item for item in answer["not_shown"]}
            marker = answer["next_marker"]
            if marker is None:
                break
    return {
        **answer,
        "shares": list(shares.values()),
        "events": list(events.values()),
        "not_shown": list(not_shown.values()),
    }
