"""The command line of baremetal: the service's own commands, and clients of its API.

A BMC's password is read from the terminal, a file or standard input, never from an argument: others
on the machine can read those.
"""

import asyncio
import json
import pathlib
import sys
import uuid
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from hostler_baremetal import credentials, simulator
from hostler_baremetal.app import PACKAGE, http_app, serve
from hostler_baremetal.ipmi_command import BootDevice
from hostler_baremetal.power import FINISHED, PowerAction, PowerState
from hostler_baremetal.settings import Settings
from hostler_common import cli
from hostler_common.client import Api

PORT = 8304
PAGE = 1000

ResultT = TypeVar("ResultT")
TokenOption = Annotated[
    int | None, typer.Option("--fencing-token", help="Of the node's lease, if it has one.")
]
WaitOption = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the end.")]

main = cli.service(Settings, serve, http_app, package=PACKAGE)
nodes = typer.Typer(no_args_is_help=True, help="The nodes of the registry.")
operations = typer.Typer(no_args_is_help=True, help="What was asked of nodes.")
main.add_typer(nodes, name="nodes")
main.add_typer(operations, name="operations")


def _call(url: str | None, work: Callable[[Api], Coroutine[Any, Any, ResultT]]) -> ResultT:
    async def call() -> ResultT:
        async with cli.api(url, default_port=PORT) as api:
            return await work(api)

    return asyncio.run(call())


def _show(answer: Any, as_json: bool, rows: dict[str, object]) -> None:  # noqa: ANN401  JSON
    if as_json:
        print(json.dumps(answer, indent=2))
        return
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, "-" if value is None else str(value))
    Console().print(table)


async def _find(api: Api, name: str) -> dict[str, Any]:
    """The node of a name or an id."""
    named: list[dict[str, Any]] = (await api.get("/v1/nodes", name=name))["nodes"]
    if named:
        return named[0]
    try:
        uuid.UUID(name)
    except ValueError as exc:
        raise cli.fail(f"there is no node {name}") from exc
    return dict(await api.get(f"/v1/nodes/{name}"))


@nodes.command("list")
def list_command(
    zone: Annotated[str | None, typer.Option(help="Only in this zone.")] = None,
    power: Annotated[PowerState | None, typer.Option(help="Only in this power state.")] = None,
    url: cli.UrlOption = None,
    as_json: cli.JsonOption = False,
) -> None:
    """All nodes by name."""

    async def work(api: Api) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        marker = None
        while True:
            page = await api.get(
                "/v1/nodes", limit=PAGE, marker=marker, zone=zone, power_state=power
            )
            found += page["nodes"]
            marker = page["next_marker"]
            if marker is None:
                return found

    found = _call(url, work)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    table = Table()
    for column in ("node", "id", "power", "as of", "state", "lease", "memory MB", "vCPUs", "BMC"):
        table.add_column(column, overflow="fold")
    for node in found:
        lease = node["lease"]
        table.add_row(
            node["name"],
            node["id"],
            node["power_state"],
            node["power_observed_at"] or "-",
            node["state"],
            f"{lease['owner']} until {lease['expires_at']}" if lease else "-",
            str(node["memory_mb"]),
            str(node["vcpus"]),
            node["address"],
        )
    Console().print(table)


@nodes.command("show")
def show_command(node: str, url: cli.UrlOption = None) -> None:
    """One node as JSON, by its name or id."""
    print(json.dumps(_call(url, lambda api: _find(api, node)), indent=2))


@nodes.command("add")
def add_command(
    name: str,
    address: Annotated[str, typer.Option(help="ipmi://host[:port]")],
    username: Annotated[str, typer.Option(help="The BMC's user.")],
    memory_mb: Annotated[int, typer.Option(min=1)],
    vcpus: Annotated[int, typer.Option(min=1)],
    local_gb: Annotated[int, typer.Option(min=0)] = 0,
    cpu_arch: Annotated[str | None, typer.Option()] = None,
    zone: Annotated[str | None, typer.Option()] = None,
    trait: Annotated[list[str] | None, typer.Option(help="May be given often.")] = None,
    password_file: Annotated[
        pathlib.Path | None, typer.Option(help="First line is the password; - is stdin.")
    ] = None,
    url: cli.UrlOption = None,
    as_json: cli.JsonOption = False,
) -> None:
    """Enrol a node; its BMC's password is asked for."""
    body = {
        "name": name,
        "address": address,
        "username": username,
        "password": _password(password_file),
        "memory_mb": memory_mb,
        "vcpus": vcpus,
        "local_gb": local_gb,
        "cpu_arch": cpu_arch,
        "zone": zone,
        "traits": trait or [],
    }
    answer = _call(url, lambda api: api.post("/v1/nodes", body))
    _show(answer, as_json, {"node": answer["name"], "id": answer["id"]})


def _password(file: pathlib.Path | None) -> str:
    if file is None:
        value: str = typer.prompt("password of the BMC", hide_input=True)
        return value
    if str(file) == "-":
        return sys.stdin.readline().rstrip("\n")
    try:
        return file.read_text().split("\n", 1)[0]
    except OSError as exc:
        raise cli.fail(f"{file}: {exc.strerror}") from exc


@nodes.command("delete")
def delete_command(node: str, url: cli.UrlOption = None) -> None:
    """Take a node out of the registry; its power stays as it is."""

    async def work(api: Api) -> None:
        found = await _find(api, node)
        await api.delete(f"/v1/nodes/{found['id']}")

    _call(url, work)


@nodes.command("power")
def power_command(
    node: str,
    action: Annotated[PowerAction | None, typer.Argument(help="Nothing: say how it is.")] = None,
    fencing_token: TokenOption = None,
    wait: WaitOption = True,
    url: cli.UrlOption = None,
    as_json: cli.JsonOption = False,
) -> None:
    """Say how a node's power is now, or change it."""

    async def work(api: Api) -> dict[str, Any]:
        path = f"/v1/nodes/{(await _find(api, node))['id']}/power"
        if action is None:
            state: dict[str, Any] = await api.get(path, max_age_seconds=0)
            return state
        operation = await api.post(path, {"action": action, "fencing_token": fencing_token})
        return await _ended(api, operation) if wait else operation

    answer = _call(url, work)
    if action is None:
        seen = {"power": answer["power_state"], "as of": answer["observed_at"]}
        _show(answer, as_json, {**seen, "trouble": answer["error"]})
        return
    _show_operation(answer, as_json)


@nodes.command("boot-device")
def boot_device_command(
    node: str,
    device: BootDevice,
    persistent: Annotated[bool, typer.Option(help="From now on, not the next time only.")] = False,
    efi: Annotated[bool, typer.Option(help="EFI instead of legacy boot.")] = False,
    fencing_token: TokenOption = None,
    wait: WaitOption = True,
    url: cli.UrlOption = None,
    as_json: cli.JsonOption = False,
) -> None:
    """Choose what a node boots from."""
    body = {
        "device": device,
        "persistent": persistent,
        "mode": "efi" if efi else "legacy",
        "fencing_token": fencing_token,
    }

    async def work(api: Api) -> dict[str, Any]:
        path = f"/v1/nodes/{(await _find(api, node))['id']}/boot-device"
        operation: dict[str, Any] = await api.post(path, body)
        return await _ended(api, operation) if wait else operation

    _show_operation(_call(url, work), as_json)


@nodes.command("lease")
def lease_command(
    node: str,
    owner: Annotated[str, typer.Option(help="Who has it.")],
    purpose: Annotated[str, typer.Option(help="What for.")],
    ttl_seconds: Annotated[float, typer.Option(min=1, help="For how long.")] = 3600,
    fencing_token: TokenOption = None,
    url: cli.UrlOption = None,
    as_json: cli.JsonOption = False,
) -> None:
    """Take a node, or renew one's lease. Keep the fencing token: actions have to show it."""
    body = {
        "owner": owner,
        "purpose": purpose,
        "ttl_seconds": ttl_seconds,
        "fencing_token": fencing_token,
    }

    async def work(api: Api) -> dict[str, Any]:
        found = await _find(api, node)
        lease: dict[str, Any] = await api.post(f"/v1/nodes/{found['id']}/lease", body)
        return lease

    answer = _call(url, work)
    _show(answer, as_json, {key: answer[key] for key in ("owner", "fencing_token", "expires_at")})


@nodes.command("release")
def release_command(
    node: str,
    fencing_token: TokenOption = None,
    force: Annotated[bool, typer.Option(help="Break somebody else's lease.")] = False,
    url: cli.UrlOption = None,
) -> None:
    """Give a lease back."""
    params = {"force": force or None, "fencing_token": fencing_token}

    async def work(api: Api) -> None:
        found = await _find(api, node)
        await api.call("DELETE", f"/v1/nodes/{found['id']}/lease", params=params)

    _call(url, work)


async def _ended(api: Api, operation: dict[str, Any]) -> dict[str, Any]:
    while operation["state"] not in FINISHED:
        await asyncio.sleep(0.2)
        operation = await api.get(f"/v1/operations/{operation['id']}")
    return operation


def _show_operation(operation: dict[str, Any], as_json: bool) -> None:
    shown = ("id", "state", "code", "detail")
    _show(operation, as_json, {key: operation[key] for key in shown})
    if operation["state"] == "failed":
        raise typer.Exit(1)


@operations.command("list")
def list_operations_command(
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 20,
    url: cli.UrlOption = None,
    as_json: cli.JsonOption = False,
) -> None:
    """Operations, the newest first."""
    answer = _call(url, lambda api: api.get("/v1/operations", limit=limit))
    if as_json:
        print(json.dumps(answer["operations"], indent=2))
        return
    table = Table()
    for column in ("operation", "node", "what", "state", "code", "by", "when"):
        table.add_column(column, overflow="fold")
    for it in answer["operations"]:
        what = it["args"].get("action") or it["args"].get("device")
        table.add_row(
            it["id"],
            it["node_id"],
            f"{it['kind']} {what}",
            it["state"],
            it["code"] or "-",
            it["requested_by"],
            it["created_at"],
        )
    Console().print(table)


@operations.command("show")
def show_operation_command(
    operation: str, url: cli.UrlOption = None, as_json: cli.JsonOption = False
) -> None:
    """One operation."""
    answer = _call(url, lambda api: api.get(f"/v1/operations/{operation}"))
    _show(answer, as_json, answer)


@main.command("new-key")
def new_key_command(name: Annotated[str, typer.Argument(help="The key's id.")] = "k1") -> None:
    """Print a fresh line for the file of HOSTLER_BAREMETAL_CREDENTIALS_KEY_FILE."""
    print(credentials.new_key_line(name))


@main.command("simulate")
def simulate_command(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="UDP port; 0 takes a free one.")] = 0,
) -> None:
    """Be a BMC (user admin, password secret, cipher suites 17 and 3) until interrupted."""

    async def work() -> None:
        bmc = simulator.SimulatedBmc()
        await bmc.start(host, port)
        print(f"ipmi://{host}:{bmc.port}", flush=True)
        await asyncio.Event().wait()

    asyncio.run(work())


if __name__ == "__main__":
    main()
