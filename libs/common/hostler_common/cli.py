"""What every service's command line has: ``serve``, ``migrate``, ``config``, ``token``, ``openapi``.

Commands end with 0, 1 for a refusal (one clear sentence on stderr), or 2 for wrong settings or usage.
"""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypeVar, cast

import typer
from fastapi import FastAPI
from rich.console import Console

from hostler_common import auth, client, db, errors, runtime, settings

SettingsT = TypeVar("SettingsT", bound=settings.Settings)

UrlOption = Annotated[str | None, typer.Option("--url", help="The service's address.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def fail(message: str, code: int = runtime.EXIT_FAILED) -> typer.Exit:
    """The sentence is on stderr; raise what this returns."""
    # soft_wrap: a line a fault, however narrow the terminal
    Console(stderr=True).print(message, style="red", markup=False, highlight=False, soft_wrap=True)
    return typer.Exit(code)


def load_or_exit(settings_type: type[SettingsT]) -> SettingsT:
    """The settings, or a list of what is wrong with them on stderr and exit code 2."""
    try:
        return settings.load(settings_type)
    except settings.SettingsError as exc:
        raise fail(exc.detail, runtime.EXIT_BAD_SETTINGS) from exc


def service(
    settings_type: type[SettingsT],
    serve: Callable[[SettingsT], Coroutine[Any, Any, None]],
    http_app: Callable[[SettingsT], FastAPI],
    *,
    package: str,
) -> typer.Typer:
    """The command line of a service, to which the service adds its own commands."""
    name = settings_type.service
    app = typer.Typer(
        name=f"hostler-{name}",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    config = typer.Typer(no_args_is_help=True, help="The service's settings.")
    token = typer.Typer(no_args_is_help=True, help="Tokens of callers.")
    app.add_typer(config, name="config")
    app.add_typer(token, name="token")

    @app.command("serve")
    def serve_command() -> None:
        """Run the service until SIGTERM."""
        loaded = load_or_exit(settings_type)
        code = runtime.main(serve(loaded), service=name)
        if code:
            raise typer.Exit(code)

    @app.command("migrate")
    def migrate_command(
        check: Annotated[
            bool, typer.Option("--check", help="Only say whether it is needed.")
        ] = False,
    ) -> None:
        """Bring the database to this version's schema."""
        loaded = load_or_exit(settings_type)
        url = loaded.database_url.get_secret_value()
        try:
            todo = asyncio.run(
                _pending(url, name, package)
                if check
                else db.migrate(url, schema=name, package=package)
            )
        except errors.HostlerError as exc:
            raise fail(exc.detail) from exc
        for migration in todo:
            print(
                f"{'pending' if check else 'applied'}: {migration.component} {migration.version:04} {migration.name}"
            )
        if check and todo:
            raise typer.Exit(runtime.EXIT_FAILED)
        print(f"{name}: {'up to date' if not todo else f'{len(todo)} applied'}")

    @config.command("check")
    def config_check() -> None:
        """Say whether the settings are complete and right."""
        load_or_exit(settings_type)
        print("the settings are complete")

    @config.command("show")
    def config_show() -> None:
        """Print every setting as JSON, with secrets masked."""
        print(json.dumps(settings.redacted(load_or_exit(settings_type)), indent=2))

    @token.command("create")
    def token_create(
        name: str,
        role: Annotated[
            auth.Role, typer.Option(help="What the caller may do.")
        ] = auth.Role.READER,
        projects: Annotated[
            str, typer.Option(help="Projects it may see, with commas, or *.")
        ] = "*",
    ) -> None:
        """Print a fresh token once (stderr), and its line for the tokens file (stdout)."""
        try:
            value, line = auth.new_token(name=name, role=role, projects=projects)
        except ValueError as exc:
            raise fail(
                "a name or project is not empty and has no colon and no line break in it",
                runtime.EXIT_BAD_SETTINGS,
            ) from exc
        print(f"token, shown this once: {value}", file=sys.stderr)
        print(line)

    @app.command("openapi")
    def openapi() -> None:
        """Print the OpenAPI document of the service's HTTP API."""
        print(json.dumps(openapi_document(settings_type, http_app), indent=2, ensure_ascii=False))

    return app


def openapi_document(
    settings_type: type[SettingsT], http_app: Callable[[SettingsT], FastAPI]
) -> dict[str, Any]:
    """The OpenAPI document of a service, made without a broker or a database."""
    defaults = {
        field: info.get_default(call_default_factory=True, validated_data={})
        for field, info in settings_type.model_fields.items()
        if not info.is_required()
    }
    nowhere = cast("SettingsT", settings_type.model_construct(**{**defaults, "auth_mode": "none"}))
    return http_app(nowhere).openapi()


async def _pending(url: str, schema: str, package: str) -> list[db.Migration]:
    async with db.open_pool(url, schema=schema, max_size=2) as pool:
        return await db.pending(pool, package=package)


@asynccontextmanager
async def api(url: str | None, *, default_port: int) -> AsyncIterator[client.Api]:
    """The service's API for a command: at ``--url``, ``HOSTLER_URL`` or loopback, with ``HOSTLER_TOKEN(_FILE)``.

    A refusal by the service becomes one sentence on stderr and exit code 1.
    """
    address = url or os.environ.get("HOSTLER_URL") or f"http://127.0.0.1:{default_port}"
    file = os.environ.get("HOSTLER_TOKEN_FILE")
    try:
        token = os.environ.get("HOSTLER_TOKEN")
        if token is None and file:
            with open(file, encoding="utf-8") as opened:  # noqa: ASYNC230, PTH123  a command line, not a server
                token = opened.read().strip()
        async with client.open_api(address, token=token) as opened_api:
            yield opened_api
    except UnicodeDecodeError as exc:
        raise fail(f"{file}: is not text") from exc
    except (errors.HostlerError, OSError) as exc:
        raise fail(
            f"{exc}" + (f" ({exc.code})" if isinstance(exc, errors.HostlerError) else "")
        ) from exc
