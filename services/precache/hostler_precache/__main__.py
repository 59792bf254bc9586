"""The command line of precache: the service's own commands, and clients of its API."""

import asyncio
import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from hostler_common import cli, client
from hostler_precache.app import PACKAGE, http_app, serve
from hostler_precache.settings import Settings

PORT = 8301
POLL_SECONDS = 0.5
OVER = ("done", "error", "cancelled")

main = cli.service(Settings, serve, http_app, package=PACKAGE)


@main.command("distribute")
def distribute_command(
    image_id: str,
    host: Annotated[
        list[str] | None, typer.Option(help="A host, again for each; all unless given.")
    ] = None,
    location: Annotated[
        str | None, typer.Option(help="Where an image that is not known yet is.")
    ] = None,
    fetcher: Annotated[str, typer.Option(help="How to get it: http, file, glance, ...")] = "http",
    sha512: Annotated[str | None, typer.Option(help="What it must hash to.")] = None,
    priority: Annotated[int, typer.Option(help="Higher goes first.")] = 0,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show progress until it is over.")
    ] = False,
    url: cli.UrlOption = None,
    as_json: cli.JsonOption = False,
) -> None:
    """Put an image on hosts."""
    body: dict[str, Any] = {"image_id": image_id, "hosts": host or None, "priority": priority}
    if location is not None or fetcher != "http":
        body["image"] = {
            "image_id": image_id,
            "fetcher": fetcher,
            "location": location or "",
            **({"os_hash_algo": "sha512", "os_hash_value": sha512} if sha512 else {}),
        }

    async def run() -> None:
        async with cli.api(url, default_port=PORT) as api:
            reply = await api.post("/v1/distributions", body)
            if as_json and not watch:
                print(json.dumps(reply, indent=2))
            elif not watch:
                print(f"{reply['distribution_id']} {reply['state']}")
            if watch:
                await _watch(api, reply["distribution_id"], as_json=as_json)

    asyncio.run(run())


@main.command("status")
def status_command(
    distribution_id: Annotated[
        str | None, typer.Argument(help="All of them unless given.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show progress until it is over.")
    ] = False,
    url: cli.UrlOption = None,
    as_json: cli.JsonOption = False,
) -> None:
    """How far distributions are."""

    async def run() -> None:
        async with cli.api(url, default_port=PORT) as api:
            if distribution_id is None:
                answer = await api.get("/v1/distributions", limit=50)
                _print_list(answer["distributions"]) if not as_json else _print_json(answer)
            elif watch:
                await _watch(api, distribution_id, as_json=as_json)
            else:
                answer = await api.get(f"/v1/distributions/{distribution_id}")
                _print_hosts(answer) if not as_json else _print_json(answer)

    asyncio.run(run())


@main.command("hosts")
def hosts_command(url: cli.UrlOption = None, as_json: cli.JsonOption = False) -> None:
    """The hosts whose agents have spoken."""

    async def run() -> None:
        async with cli.api(url, default_port=PORT) as api:
            answer = await api.get("/v1/hosts", limit=1000)
            if as_json:
                _print_json(answer)
                return
            table = Table("host", "serves at", "images", "last heard of")
            for one in answer["hosts"]:
                table.add_row(one["host"], one["url"], str(one["images"]), one["seen_at"])
            Console().print(table)

    asyncio.run(run())


async def _watch(api: client.Api, distribution_id: str, *, as_json: bool) -> None:
    """Show the distribution until it is over, and fail unless every host has the image."""
    path = f"/v1/distributions/{distribution_id}"
    bars = Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TextColumn("{task.fields[state]}"),
        disable=as_json,
    )
    tasks: dict[str, Any] = {}
    with bars:
        while True:
            answer = await api.get(path)
            size = answer["size_bytes"]
            if answer["state"] == "fetching":
                task = tasks.setdefault("", bars.add_task("fetch", total=size, state=""))
                bars.update(task, total=size, completed=answer["fetched_bytes"])
            for host in answer["progress"] if size is not None else ():
                name = host["host"]
                if name not in tasks:
                    tasks[name] = bars.add_task(name, total=size, state="")
                bars.update(tasks[name], completed=host["bytes_done"], state=host["state"])
            if answer["state"] in OVER:
                break
            await asyncio.sleep(POLL_SECONDS)
    _print_json(answer) if as_json else _print_hosts(answer)
    bad = [host for host in answer["progress"] if host["state"] not in ("cached", "existing")]
    if answer["state"] != "done" or bad:
        raise cli.fail(answer["reason"] or f"{len(bad)} hosts have no image")


def _print_json(document: object) -> None:
    print(json.dumps(document, indent=2))


def _print_list(distributions: list[dict[str, Any]]) -> None:
    table = Table("distribution", "image", "state", "hosts", "from seed", "from peers")
    for one in distributions:
        states = ", ".join(f"{count} {state}" for state, count in one["host_states"].items())
        table.add_row(
            one["distribution_id"], one["image_id"], one["state"], states,
            _mib(one["seed_sent_bytes"]), _mib(one["peers_sent_bytes"]),
        )  # fmt: skip
    Console().print(table)


def _print_hosts(answer: dict[str, Any]) -> None:
    table = Table("host", "state", "verified", "from seed", "from peers", "sent", "reason")
    for host in answer["progress"]:
        table.add_row(
            host["host"], host["state"], _mib(host["bytes_done"]),
            _mib(host["received_from_seed_bytes"]), _mib(host["received_from_peers_bytes"]),
            _mib(host["sent_bytes"]), host["reason"] or "",
        )  # fmt: skip
    Console().print(table)
    print(
        f"{answer['image_id']}: {answer['state']}; sent by the seed"
        f" {_mib(answer['seed_sent_bytes'])}, by peers {_mib(answer['peers_sent_bytes'])}"
    )


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.1f} MiB"


if __name__ == "__main__":
    main()
