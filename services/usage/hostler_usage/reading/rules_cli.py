"""The commands `rules test` and `mapping check|show`: what is metered, tried without a service."""

import json
import zlib
from collections.abc import Sequence
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hostler_common import cli, runtime
from hostler_usage.history.measures import hours
from hostler_usage.history.observation import Observation
from hostler_usage.reading import mapping_file
from hostler_usage.reading.imports import Format, bodies
from hostler_usage.reading.mapping import Mapping
from hostler_usage.reading.mapping_file import MappingInvalid, laid_over, parsed_yaml
from hostler_usage.reading.message_file import opened
from hostler_usage.reading.statement import Statement
from hostler_usage.reading.trial import Account, Heard, Word, account, hear

rules = typer.Typer(no_args_is_help=True, help="What bodies do under the mapping.")
mapping = typer.Typer(no_args_is_help=True, help="What is metered.")

MappingOption = Annotated[
    Path | None,
    typer.Option(
        "--mapping",
        envvar="HOSTLER_USAGE_MAPPING_FILE",
        help="YAML laid over the packaged mapping.",
    ),
]


def register(app: typer.Typer) -> None:
    """The service's command line has `rules` and `mapping`."""
    app.add_typer(rules, name="rules")
    app.add_typer(mapping, name="mapping")


@rules.command("test")
def try_command(
    file: Annotated[
        Path, typer.Argument(help="NDJSON or a log, plain or gzip; - is standard input.")
    ],
    mapping_path: MappingOption = None,
    file_format: Annotated[
        Format | None,
        typer.Option("--format", help="ndjson or log; told by the first line if absent."),
    ] = None,
    region: Annotated[str, typer.Option(help="The region they are taken to come from.")] = "test",
    as_json: cli.JsonOption = False,
) -> None:
    """Show what each body says and what they all amount to, without a service or a database."""
    made = _loaded(mapping_path)
    try:
        with opened(file) as (stream, _):
            heard = hear(made, bodies(stream, file_format), region=region)
    except (OSError, EOFError, zlib.error) as exc:
        raise cli.fail(f"{file}: {exc}") from exc
    accounts = account(made, heard)
    if as_json:
        answer = {
            "mapping": made.digest,
            "bodies": [_heard_json(one) for one in heard],
            "resources": [_account_json(made, one) for one in accounts],
        }
        typer.echo(json.dumps(answer, indent=2))
        return
    console = _console()
    for one in heard:
        _show_heard(console, one)
    for item in accounts:
        _show_account(console, made, item)
    unreadable = sum(1 for one in heard if one.notification is None)
    unknown = sum(1 for one in heard if one.notification is not None and one.rule is None)
    console.print(
        f"{len(heard)} bodies of {len(accounts)} resources;"
        f" {unreadable} would be quarantined, {unknown} are of types that the mapping does not know"
    )


@mapping.command("check")
def check_command(
    file: Annotated[Path, typer.Argument(help="YAML to be laid over the packaged mapping.")],
) -> None:
    """Say whether a mapping's file can be meant, or what is wrong with it."""
    made = _loaded(file)
    typer.echo(
        f"{file} is right: with it {len(made.resources)} types of resources are metered by"
        f" {len(made.measures)} measures (mapping {made.digest[:12]})"
    )


@mapping.command("show")
def show_command(
    mapping_path: MappingOption = None,
    as_json: cli.JsonOption = False,
) -> None:
    """Print the mapping in force as YAML: the packaged one, with a file's laid over it."""
    made = _loaded(mapping_path)
    document = parsed_yaml((resources.files("hostler_usage") / "mapping.yaml").read_text("utf-8"))
    if mapping_path is not None:
        document = laid_over(document, parsed_yaml(mapping_path.read_text(encoding="utf-8")))
    if as_json:
        typer.echo(json.dumps({"digest": made.digest, **document}, indent=2))
        return
    typer.echo(f"# mapping {made.digest}")
    typer.echo(yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=110))


def _loaded(path: Path | None) -> Mapping:
    try:
        return mapping_file.load(path)
    except MappingInvalid as exc:
        raise cli.fail(f"{exc.detail} ({exc.code})", runtime.EXIT_BAD_SETTINGS) from exc


# --- for eyes


def _console() -> Console:
    """Whole, where it goes to a file or a pipe."""
    console = Console(highlight=False, soft_wrap=True)
    return console if console.is_terminal else Console(width=160, highlight=False, soft_wrap=True)


def _show_heard(console: Console, one: Heard) -> None:
    notification = one.notification
    if notification is None:
        assert one.problem is not None
        console.print(f"[bold]{one.line}[/bold] would be quarantined: {one.problem.code}")
        console.print(f"    {escape(str(one.problem))}")
        return
    assert one.normalised is not None
    known = f" [dim]= {escape(str(one.canonical))}[/dim]"
    console.print(
        f"[bold]{one.line}[/bold] {escape(notification.event_type)}"
        f"{known if one.canonical != notification.event_type else ''}"
        f"  {notification.timestamp.isoformat()}  {escape(notification.message_id)}"
    )
    if one.rule is None:
        console.print("    no rule knows this type: it is stored, and nothing follows from it")
        return
    for problem in one.normalised.problems:
        console.print(f"    [red]problem[/red] {escape(problem)}")
    if not one.words:
        console.print("    it names no resource: it is stored, and nothing follows from it")
    for word in one.words:
        _show_word(console, one, word)


def _show_word(console: Console, one: Heard, word: Word) -> None:
    key, statement = word.said.resource, word.said.statement
    console.print(f"    {escape(key.resource_type)} {escape(key.resource_id)}")
    if statement is None:
        console.print("      says nothing: neither edge, nor counter, nor part of an operation")
        return
    for name, value in _statement_json(statement).items():
        if value not in (None, [], {}, False):
            console.print(f"      {name:<11} {escape(_text(value))}")
    for item in word.observations:
        verb = "ends" if item.kind == "end" else ("opens" if item.opens else "holds")
        console.print(
            f"      [green]->[/green] {verb} from {item.t_eff.isoformat()} as {item.rank.name.lower()}:"
            f" {escape(_text(dict(item.attributes)) or '-')}"
        )
    if not word.observations and not statement.readings and statement.edge != "none":
        console.print("      -> nothing holds from it")


def _show_account(console: Console, made: Mapping, item: Account) -> None:
    key = item.resource
    console.print()
    console.print(f"[bold]{escape(key.resource_type)} {escape(key.resource_id)}[/bold]")
    for anomaly in item.ledger.anomalies:
        console.print(f"    [red]odd[/red] {anomaly}")
    if item.ledger.intervals:
        table = Table()
        for name in ("from", "until", "state class", "attributes"):
            table.add_column(name)
        for row in _intervals_json(made, item):
            attributes = _text(dict(sorted(row["attributes"].items())))
            table.add_row(row["start"], row["end"] or "-", row["state_class"], escape(attributes))
        console.print(table)
    for amount in item.ledger.amounts:
        label = f" {amount.label}" if amount.label else ""
        console.print(
            f"    {amount.at.isoformat()} {amount.counter}{escape(label)} {amount.amount}"
        )
    for name, value in _totals_json(made, item).items():
        console.print(f"    {name} {value}")
    console.print(f"    [dim]until {item.as_of.isoformat()}[/dim]")


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={_text(item)}" for name, item in value.items())
    if isinstance(value, list):
        return "; ".join(_text(item) for item in value)
    return "nothing" if value is None else str(value)


# --- for programs


def _heard_json(one: Heard) -> dict[str, Any]:
    notification, normalised = one.notification, one.normalised
    if notification is None or normalised is None:
        assert one.problem is not None
        return {
            "line": one.line,
            "quarantine": {"code": one.problem.code, "reason": str(one.problem)},
        }
    return {
        "line": one.line,
        "event_type": notification.event_type,
        "canonical": one.canonical,
        "event_time": notification.timestamp.isoformat(),
        "message_id": notification.message_id,
        "priority": notification.priority,
        "is_known": normalised.is_known,
        "project_id": normalised.project_id,
        "rule": None
        if one.rule is None
        else {
            "resource_type": one.rule.resource.name,
            "action": one.rule.action,
            "edge": one.rule.edge,
            "phase": one.rule.phase,
        },
        "problems": list(normalised.problems),
        "says": [
            {
                "resource_type": word.said.resource.resource_type,
                "resource_id": word.said.resource.resource_id,
                "statement": None
                if word.said.statement is None
                else _statement_json(word.said.statement),
                "observations": [_observation_json(item) for item in word.observations],
            }
            for word in one.words
        ],
    }


def _statement_json(statement: Statement) -> dict[str, Any]:
    operation = None
    if statement.phase is not None:
        operation = {"action": statement.operation, "phase": str(statement.phase)}
        for name in ("request_id", "reason"):
            if getattr(statement, name) is not None:
                operation[name] = getattr(statement, name)
    return {
        "edge": str(statement.edge),
        "attributes": dict(statement.attributes),
        "at": _iso(statement.at),
        "born_at": _iso(statement.born_at),
        "ended_at": _iso(statement.ended_at),
        "period": None
        if statement.period is None
        else [moment.isoformat() for moment in statement.period],
        "task": statement.task,
        "failed": statement.failed,
        "counters": [
            {
                "name": item.name,
                "reading": str(item.reading),
                "value": item.value,
                "label": item.label,
                "run": item.run,
            }
            for item in statement.readings
        ],
        "operation": operation,
    }


def _observation_json(item: Observation) -> dict[str, Any]:
    return {
        "kind": str(item.kind),
        "t_eff": item.t_eff.isoformat(),
        "rank": item.rank.name.lower(),
        "opens": item.opens,
        "is_rounded": item.is_rounded,
        "attributes": dict(item.attributes),
    }


def _account_json(made: Mapping, item: Account) -> dict[str, Any]:
    return {
        "resource_type": item.resource.resource_type,
        "resource_id": item.resource.resource_id,
        "intervals": _intervals_json(made, item),
        "amounts": [
            {
                "counter": amount.counter,
                "label": amount.label,
                "at": amount.at.isoformat(),
                "amount": amount.amount,
                "project_id": amount.project_id,
            }
            for amount in item.ledger.amounts
        ],
        "anomalies": [str(anomaly) for anomaly in item.ledger.anomalies],
        "totals": dict(item.totals),
        "as_of": item.as_of.isoformat(),
    }


def _intervals_json(made: Mapping, item: Account) -> Sequence[dict[str, Any]]:
    resource = made.resources[item.resource.resource_type]
    rows = []
    for interval in item.ledger.intervals:
        state = interval.attributes.get("state")
        rows.append(
            {
                "start": interval.start.isoformat(),
                "end": _iso(interval.end),
                "state_class": resource.state_class(state if isinstance(state, str) else None),
                "attributes": dict(interval.attributes),
                "provenance": str(interval.provenance),
                "opened_by": [evidence.message_id for evidence in interval.opened_by],
                "closed_by": [evidence.message_id for evidence in interval.closed_by],
            }
        )
    return rows


def _totals_json(made: Mapping, item: Account) -> dict[str, str]:
    """What was held in hours, what moved in its units."""
    held = {
        measure.name
        for measure in made.measures_of(item.resource.resource_type)
        if measure.is_held
    }
    return {
        name: f"{hours(value)} h" if name in held else str(value)
        for name, value in item.totals.items()
    }


def _iso(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()
