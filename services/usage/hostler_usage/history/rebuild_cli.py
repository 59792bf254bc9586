"""The command `rebuild`: everything that follows from the messages is made anew, beside the service."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from hostler_common import cli, db, errors
from hostler_usage.history.fold_store import FoldStore
from hostler_usage.history.rebuild_store import REWRITING, RebuildStore, settle_mapping
from hostler_usage.reading import mapping_file
from hostler_usage.reading.mapping import Mapping
from hostler_usage.reading.normalise import Normaliser
from hostler_usage.settings import Settings

PACKAGE: Final = "hostler_usage"
_DAYS: Final = 10
_PAUSE_SECONDS: Final = 0.2


class RebuildBusy(errors.Conflict):
    """Another rebuild, or the dropping of old months, is at work."""

    code = "usage.rebuild.busy"


def register(app: typer.Typer) -> None:
    """The service's command line has `rebuild`."""
    app.command("rebuild")(rebuild)


def rebuild(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say which messages would say something else.")
    ] = False,
    anew: Annotated[
        bool, typer.Option("--anew", help="From the beginning, also if one was broken off.")
    ] = False,
    batch: Annotated[
        int, typer.Option(min=1, max=5000, help="Messages, or resources, in one transaction.")
    ] = 1000,
    as_json: cli.JsonOption = False,
) -> None:
    """Read every stored message again under the present mapping and make all usage anew.

    Needs the service's settings; safe beside running replicas that have the same mapping. Run it
    again when it was broken off: it goes on where it was. Equal hashes say that nothing changed.
    """
    settings = cli.load_or_exit(Settings)
    try:
        answer = asyncio.run(
            _compare(settings, batch) if dry_run else _rebuild(settings, batch, anew=anew)
        )
    except errors.HostlerError as exc:
        raise cli.fail(f"{exc.detail} ({exc.code})") from exc
    if as_json:
        typer.echo(json.dumps(answer, indent=2))
    else:
        _show(answer)


async def _rebuild(settings: Settings, batch: int, *, anew: bool) -> dict[str, Any]:
    mapping = mapping_file.load(settings.mapping_file)
    async with _pool(settings) as pool:
        await _check_schema(pool)
        async with db.singleton(pool, REWRITING) as is_alone:
            if not is_alone:
                raise RebuildBusy("another rebuild, or the dropping of old months, is at work")
            store = _store(pool, mapping)
            # what is waiting is folded first: what differs after is the rebuild's doing
            await _fold(store, batch)
            progress = await store.begin(await store.hashes(), anew=anew)
            is_resumed, at_first = progress.is_resumed, progress.messages
            with _progress() as shown:
                show = _task(shown, "messages", await store.messages())
                while progress.phase == "messages":
                    progress = await store.read_some(batch)
                    show(progress.messages)
                show = _task(shown, "resources", await store.resources())
                while progress.phase == "resources":
                    progress = await store.mark_some(batch)
                    await _fold(store, batch)
                    show(progress.resources)
                days = 0
                show = _task(shown, "days", None)
                while progress.phase == "days":
                    progress = await store.sum_some_days(_DAYS)
                    show(days := days + _DAYS)
            await settle_mapping(pool, mapping.digest)
            return {
                "mapping": mapping.digest,
                "is_resumed": is_resumed,
                "messages_before": at_first,
                "messages": progress.messages,
                "changed": progress.changed,
                "unreadable": progress.unreadable,
                "resources": progress.resources,
                "hashes": {
                    "before": dict(progress.hashes_before),
                    "after": (after := await store.hashes()),
                },
                "is_identical": dict(progress.hashes_before) == after,
            }


async def _compare(settings: Settings, batch: int) -> dict[str, Any]:
    mapping = mapping_file.load(settings.mapping_file)
    changed: Counter[str] = Counter()
    messages = unreadable = 0
    async with _pool(settings) as pool:
        await _check_schema(pool)
        store = _store(pool, mapping)
        with _progress() as shown:
            show = _task(shown, "messages", await store.messages())
            after = None
            while True:
                found = await store.compare_some(after, batch)
                messages += found.messages
                unreadable += found.unreadable
                changed.update(found.changed)
                show(messages)
                if found.after is None:
                    break
                after = found.after
        hashes = await store.hashes()
    return {
        "mapping": mapping.digest,
        "messages": messages,
        "changed": changed.total(),
        "changed_by_event_type": dict(changed.most_common()),
        "unreadable": unreadable,
        "hashes": {"now": hashes},
    }


def _pool(settings: Settings) -> Any:  # noqa: ANN401  db.open_pool's context manager
    return db.open_pool(
        settings.database_url.get_secret_value(), schema=settings.service, max_size=4
    )


async def _check_schema(pool: db.Pool) -> None:
    lacking = await db.pending(pool, package=PACKAGE)
    if lacking:
        raise db.MigrationError(
            f"the database lacks {len(lacking)} migrations: run 'hostler-usage migrate' first"
        )


def _store(pool: db.Pool, mapping: Mapping) -> RebuildStore:
    return RebuildStore(
        pool=pool,
        mapping=mapping,
        normaliser=Normaliser(mapping),
        folds=FoldStore(pool=pool, mapping=mapping),
        program=f"{version('hostler-usage')} {mapping.digest}",
    )


async def _fold(store: RebuildStore, batch: int) -> None:
    """All that is marked by now is folded, here or by a replica."""
    mark = await store.last_mark()
    while True:
        if await store.fold_until(mark, batch):
            return
        await asyncio.sleep(_PAUSE_SECONDS)


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def _task(shown: Progress, name: str, total: int | None) -> Callable[[int], None]:
    task = shown.add_task(name, total=total)

    def show(done: int) -> None:
        # the total is an estimate of the planner's
        shown.update(task, completed=done, total=None if total is None else max(total, done))

    return show


def _show(answer: dict[str, Any]) -> None:
    hashes = answer["hashes"]
    table = Table(title="sha256 of what follows from the messages", title_justify="left")
    table.add_column("table")
    for name in hashes:
        table.add_column(name)
    for name in next(iter(hashes.values())):
        table.add_row(name, *(found.get(name, "-")[:32] for found in hashes.values()))
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)
    for event_type, number in answer.get("changed_by_event_type", {}).items():
        typer.echo(f"{number} of {event_type} would say something else")
    typer.echo(
        f"{answer['messages']} messages read, {answer['changed']} say something else than before,"
        f" {answer['unreadable']} cannot be read any more and say what they said"
    )
    if "is_identical" in answer:
        typer.echo(
            f"{answer['resources']} resources reckoned anew:"
            f" {'nothing changed' if answer['is_identical'] else 'the hashes differ'}"
        )
