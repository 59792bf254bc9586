"""The command line of precache: the service's own commands, and clients of its API."""

import asyncio
import json
import time
from collections.abc import Coroutine
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Column, Table

from hostler_common import cli, client
from hostler_precache.app import PACKAGE, http_app, serve
from hostler_precache.settings import Settings

PORT = 8301
PAGE = 1000
POLL_SECONDS = 0.5
IDLE_OVER_BUSY = 9
BARS_SHOWN = 30  # of hosts: more fit on no screen
OVER = ("done", "error", "cancelled")

main = cli.service(Settings, serve, http_app, package=PACKAGE)

HostOption = Annotated[
    list[str] | None, typer.Option("--host", help="A host, again for each; all unless given.")
]
LabelOption = Annotated[
    list[str] | None,
    typer.Option("--label", help="Hosts with this label: zone=a, again for each."),
]
PercentOption = Annotated[int | None, typer.Option(help="Of those hosts, so many percent.")]
CanaryOption = Annotated[
    int | None, typer.Option(help="So many percent first; the others once none has failed.")
]
DeadlineOption = Annotated[
    str | None, typer.Option(help="By when: 2026-12-01T02:00:00Z, or in hours: 6h.")
]
DeadlinePercentOption = Annotated[int, typer.Option(help="Of the hosts, by the deadline.")]
HostLimitOption = Annotated[float | None, typer.Option(help="Mbit/s that one host may fetch.")]
TotalLimitOption = Annotated[
    float | None, typer.Option(help="Mbit/s that all hosts together may fetch.")
]
WindowOption = Annotated[
    list[str] | None,
    typer.Option(
        "--window", help="When pieces may move: 22:00-06:00, or 22:00-06:00@Europe/Berlin."
    ),
]
LocationOption = Annotated[
    str | None, typer.Option(help="Where an image that is not known yet is.")
]
FetcherOption = Annotated[str, typer.Option(help="How to get it: http, file, glance, ...")]
WatchOption = Annotated[bool, typer.Option("--watch", help="Show progress until it is over.")]


@main.command("distribute")
def distribute_command(
    image_id: str,
    host: HostOption = None,
    label: LabelOption = None,
    percent: PercentOption = None,
    canary: CanaryOption = None,
    deadline: DeadlineOption = None,
    deadline_percent: DeadlinePercentOption = 100,
    host_limit: HostLimitOption = None,
    total_limit: TotalLimitOption = None,
    window: WindowOption = None,
    location: LocationOption = None,
    fetcher: FetcherOption = "http",
    sha512: Annotated[str | None, typer.Option(help="What it must hash to.")] = None,
    priority: Annotated[int, typer.Option(help="Higher goes first.")] = 0,
    watch: WatchOption = False,
    url: cli.UrlOption = None,
    as_json: cli.JsonOption = False,
) -> None:
    """Put an image on hosts."""
    body = _request(
        image_id, host, label, percent, canary, deadline, deadline_percent, host_limit,
        total_limit, window, location, fetcher,
    )  # fmt: skip
    body["priority"] = priority
    if sha512 is not None:
        if "image" not in body:
            raise cli.fail("--sha512 needs --location: a known image has its hash already", 2)
        body["image"] |= {"os_hash_algo": "sha512", "os_hash_value": sha512}

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


@main.command("plan")
def plan_command(
    image_id: str,
    host: HostOption = None,
    label: LabelOption = None,
    percent: PercentOption = None,
    canary: CanaryOption = None,
    deadline: DeadlineOption = None,
    deadline_percent: DeadlinePercentOption = 100,
    host_limit: HostLimitOption = None,
    total_limit: TotalLimitOption = None,
    window: WindowOption = None,
    location: LocationOption = None,
    fetcher: FetcherOption = "http",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Always so: a plan changes nothing.", hidden=True)
    ] = True,
    url: cli.UrlOption = None,
    as_json: cli.JsonOption = False,
) -> None:
    """Say what `distribute` with the same options would do: which hosts, how fast, what is in the way."""
    del dry_run
    body = _request(
        image_id, host, label, percent, canary, deadline, deadline_percent, host_limit,
        total_limit, window, location, fetcher,
    )  # fmt: skip

    async def run() -> None:
        async with cli.api(url, default_port=PORT) as api:
            answer = await api.post("/v1/plans", body)
            _print_json(answer) if as_json else _print_plan(answer)

    asyncio.run(run())


@main.command("status")
def status_command(
    distribution_id: Annotated[
        str | None, typer.Argument(help="All of them unless given.")
    ] = None,
    watch: WatchOption = False,
    url: cli.UrlOption = None,
    as_json: cli.JsonOption = False,
) -> None:
    """How far distributions are."""

    async def run() -> None:
        async with cli.api(url, default_port=PORT) as api:
            if distribution_id is None:
                answer = await _all(api, "distributions")
                _print_list(answer["distributions"]) if not as_json else _print_json(answer)
            elif watch:
                await _watch(api, distribution_id, as_json=as_json)
            else:
                answer = await api.get(f"/v1/distributions/{distribution_id}")
                _print_hosts(answer) if not as_json else _print_json(answer)

    asyncio.run(run())


@main.command("pause")
def pause_command(
    distribution_id: str, url: cli.UrlOption = None, as_json: cli.JsonOption = False
) -> None:
    """Its hosts fetch nothing more, and keep what they have."""
    _act(url, "POST", f"/v1/distributions/{distribution_id}/pause", as_json=as_json)


@main.command("resume")
def resume_command(
    distribution_id: str, url: cli.UrlOption = None, as_json: cli.JsonOption = False
) -> None:
    """Its hosts go on where they were; one that its canaries stopped goes on to all."""
    _act(url, "POST", f"/v1/distributions/{distribution_id}/resume", as_json=as_json)


@main.command("cancel")
def cancel_command(distribution_id: str, url: cli.UrlOption = None) -> None:
    """Hosts that are still fetching stop; files that are in place are unpinned."""
    _act(url, "DELETE", f"/v1/distributions/{distribution_id}", as_json=False)


@main.command("hosts")
def hosts_command(url: cli.UrlOption = None, as_json: cli.JsonOption = False) -> None:
    """The hosts whose agents have spoken."""

    async def run() -> None:
        async with cli.api(url, default_port=PORT) as api:
            answer = await _all(api, "hosts")
            if as_json:
                _print_json(answer)
                return
            table = Table("host", "serves at", "labels", "images", "free", "last heard of")
            for one in answer["hosts"]:
                free = "-" if one["free_bytes"] is None else _mib(one["free_bytes"])
                table.add_row(
                    one["host"], one["url"], _labels(one["labels"]), str(one["images"]), free,
                    one["seen_at"],
                )  # fmt: skip
            Console().print(table)

    asyncio.run(run())


@main.command("policies")
def policies_command(
    run: Annotated[str | None, typer.Option(help="Run the policy of this id now.")] = None,
    url: cli.UrlOption = None,
    as_json: cli.JsonOption = False,
) -> None:
    """What puts images on hosts again and again, and how its last run went."""

    async def show() -> None:
        async with cli.api(url, default_port=PORT) as api:
            if run is not None:
                await api.post(f"/v1/policies/{run}/run")
            answer = await _all(api, "policies")
            if as_json:
                _print_json(answer)
                return
            table = Table("policy", "name", "lister", "hosts", "last run", "outcome", "next run")
            for one in answer["policies"]:
                table.add_row(
                    one["policy_id"], one["name"], one["lister"], _targets(one),
                    one["last_run_at"] or "never",
                    f"{one['last_outcome'] or '-'}: {one['last_detail'] or ''}",
                    one["next_run_at"],
                )  # fmt: skip
            Console().print(table)

    asyncio.run(show())


async def _all(api: client.Api, name: str) -> dict[str, Any]:
    """The answer of a list as if all of it were one page."""
    found: list[dict[str, Any]] = []
    marker = None
    while True:
        page = await api.get(f"/v1/{name}", limit=PAGE, marker=marker)
        found += page[name]
        marker = page["next_marker"]
        if marker is None:
            return {name: found, "next_marker": None}


# --- what was asked


def _request(
    image_id: str,
    hosts: list[str] | None,
    labels: list[str] | None,
    percent: int | None,
    canary: int | None,
    deadline: str | None,
    deadline_percent: int,
    host_limit: float | None,
    total_limit: float | None,
    windows: list[str] | None,
    location: str | None,
    fetcher: str,
) -> dict[str, Any]:
    """The body of a distribution request."""
    body: dict[str, Any] = {
        "image_id": image_id,
        "hosts": hosts or None,
        "labels": dict(_label(one) for one in labels or []),
        "percent": percent,
        "canary_percent": canary,
        "deadline_at": None if deadline is None else _deadline(deadline),
        "deadline_percent": deadline_percent,
        "host_bytes_per_second": _bytes_per_second(host_limit),
        "total_bytes_per_second": _bytes_per_second(total_limit),
        "windows": [_window(one) for one in windows or []],
    }
    if location is not None or fetcher != "http":
        body["image"] = {"image_id": image_id, "fetcher": fetcher, "location": location or ""}
    return body


def _label(text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not found:
        raise cli.fail(f"--label {text}: write NAME=VALUE", 2)
    return name, value


def _deadline(text: str) -> str:
    try:
        if text.endswith("h"):
            return (datetime.now(UTC) + timedelta(hours=float(text[:-1]))).isoformat()
        at = datetime.fromisoformat(text)
    except (ValueError, OverflowError) as exc:
        raise cli.fail(f"--deadline {text}: write 2026-12-01T02:00:00Z or 6h", 2) from exc
    if at.tzinfo is None:
        raise cli.fail(f"--deadline {text}: add the offset from UTC, as in {text}Z", 2)
    return at.isoformat()


def _bytes_per_second(mbit: float | None) -> int | None:
    return None if mbit is None else max(1, int(mbit * 1_000_000 / 8))


def _window(text: str) -> dict[str, str]:
    times, _, zone = text.partition("@")
    start, found, stop = times.partition("-")
    if not found:
        raise cli.fail(f"--window {text}: write 22:00-06:00 or 22:00-06:00@Europe/Berlin", 2)
    return {"start": start, "stop": stop, "time_zone": zone or "UTC"}


def _act(url: str | None, method: str, path: str, *, as_json: bool) -> None:
    async def run() -> None:
        async with cli.api(url, default_port=PORT) as api:
            answer = await api.call(method, path)
            if as_json:
                _print_json(answer)
            elif answer is not None:
                print(f"{answer['distribution_id']} {answer['state']}")

    work: Coroutine[Any, Any, None] = run()
    asyncio.run(work)


# --- what is shown


async def _watch(api: client.Api, distribution_id: str, *, as_json: bool) -> None:
    """Show the distribution until it is over, and fail unless every host has the image."""
    path = f"/v1/distributions/{distribution_id}"
    bars = Progress(
        TextColumn("{task.description}", table_column=Column(no_wrap=True, max_width=24)),
        BarColumn(bar_width=20),
        DownloadColumn(binary_units=True, table_column=Column(no_wrap=True)),
        TransferSpeedColumn(table_column=Column(no_wrap=True)),
        # how far from the bound is a sentence: it takes more lines, and no other column's room
        TextColumn("{task.fields[state]}", table_column=Column(ratio=1)),
        disable=as_json,
    )
    fetching = bars.add_task("fetch", total=None, state="", visible=False)
    everybody = bars.add_task("all hosts", total=None, state="", visible=False)
    tasks: dict[str, Any] = {}
    with bars:
        while True:
            began = time.monotonic()
            answer = await api.get(path)
            size, hosts = answer["size_bytes"], answer["progress"]
            if answer["state"] == "fetching":
                bars.update(fetching, total=size, completed=answer["fetched_bytes"], visible=True)
            elif size is not None:
                bars.update(
                    everybody,
                    visible=True,
                    total=size * len(hosts),
                    completed=sum(host["bytes_done"] for host in hosts),
                    state=_pace(answer),
                )
            for host in hosts if size is not None else ():
                name = host["host"]
                if name not in tasks and len(tasks) < BARS_SHOWN:
                    tasks[name] = bars.add_task(name, total=size, state="")
                if name in tasks:
                    bars.update(tasks[name], completed=host["bytes_done"], state=host["state"])
            if answer["state"] in OVER:
                break
            # an answer with thousands of hosts costs the service much: it is not asked all the time
            await asyncio.sleep(max(POLL_SECONDS, IDLE_OVER_BUSY * (time.monotonic() - began)))
    _print_json(answer) if as_json else _print_hosts(answer)
    bad = [host for host in answer["progress"] if host["state"] not in ("cached", "existing")]
    if answer["state"] != "done" or bad:
        raise cli.fail(answer["reason"] or f"{len(bad)} hosts have no image")


def _pace(answer: dict[str, Any]) -> str:
    """How far from the bound it is, and when it will be over."""
    left = f"{answer['left']} left" if answer["left"] else ""
    return ", ".join(part for part in (answer["pace"], left) if part)


def _print_json(document: object) -> None:
    print(json.dumps(document, indent=2))


def _print_plan(plan: dict[str, Any]) -> None:
    size = "of unknown size" if plan["size_bytes"] is None else _mib(plan["size_bytes"])
    print(f"{plan['image_id']}, {size}, to {plan['host_count']} hosts")
    if plan["canary_count"]:
        print(f"  first to {plan['canary_count']} of them")
    if plan["bound_seconds"] is not None:
        slowest = f" ({plan['slowest_host']})" if plan["slowest_host"] else ""
        print(f"  at best {plan['bound_seconds']:.1f} s; the limit is {plan['limit']}{slowest}")
    if plan["begins_at"] is None:
        print("  no window opens in the next 8 days")
    if plan["is_in_time"] is not None:
        print(f"  the deadline is {'possible' if plan['is_in_time'] else 'NOT possible'}")
    for words, names in (
        ("no agent has spoken for", plan["unknown_hosts"]),
        ("no room on", plan["full_hosts"]),
    ):
        if names:
            print(f"  {words}: {', '.join(names)}")


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
            host["host"], host["state"] if host["is_there"] else f"{host['state']}, not heard of",
            _mib(host["bytes_done"]),
            _mib(host["received_from_seed_bytes"]), _mib(host["received_from_peers_bytes"]),
            _mib(host["sent_bytes"]), host["reason"] or "",
        )  # fmt: skip
    Console().print(table)
    print(
        f"{answer['image_id']}: {answer['state']}; sent by the seed"
        f" {_mib(answer['seed_sent_bytes'])}, by peers {_mib(answer['peers_sent_bytes'])}"
    )
    if pace := _pace(answer):
        print(pace)


def _targets(policy: dict[str, Any]) -> str:
    if policy["hosts"] is not None:
        return ", ".join(policy["hosts"])
    return _labels(policy["labels"]) or "all"


def _labels(labels: dict[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(labels.items()))


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.1f} MiB"


if __name__ == "__main__":
    main()
