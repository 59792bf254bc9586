"""The command line that every service has."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import typer
from fastapi import APIRouter, Depends, FastAPI
from pydantic import Field, SecretStr
from typer.testing import CliRunner, Result

from hostler_common import auth, cli, db, http, settings

Run = Callable[..., Result]


class Example(settings.Settings):
    service: ClassVar[str] = "example"

    ratio: float = Field(1.0, gt=0)
    key: SecretStr = SecretStr("")


async def serve(loaded: Example) -> None:
    http_app(loaded)


def http_app(loaded: Example) -> FastAPI:
    router = APIRouter(prefix="/v1/things", dependencies=[Depends(auth.public)])

    @router.get("", operation_id="list_things")
    async def things() -> list[str]:
        return []

    return http.create_app(
        loaded, title="example", package="hostler_example", routers=[router], state={}
    )


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a command in this process with exactly these settings."""
    monkeypatch.setattr(settings, "CONFIG_DIRECTORY", tmp_path)
    for name in [name for name in os.environ if name.startswith("HOSTLER_")]:
        monkeypatch.delenv(name)
    app = cli.service(Example, serve, http_app, package="hostler_example")

    @app.command("ask")
    def ask() -> None:
        async def call() -> Any:
            async with cli.api(None, default_port=1) as api:
                return await api.get("/v1/things")

        import asyncio

        typer.echo(json.dumps(asyncio.run(call())))

    def invoke(*arguments: str, **environment: str) -> Result:
        return CliRunner().invoke(app, arguments, env=environment)

    return invoke


GOOD = {
    "HOSTLER_AMQP_URL": "amqp://user:brokerword@localhost/",
    "HOSTLER_DATABASE_URL": "postgresql://user:baseword@localhost/x",
    "HOSTLER_AUTH_MODE": "none",
}


def test_config_check_says_that_complete_settings_are_complete(run: Run) -> None:
    result = run("config", "check", **GOOD)
    assert (result.exit_code, result.stdout) == (0, "the settings are complete\n")


def test_config_check_lists_every_fault_a_line_each_and_ends_with_2(run: Run) -> None:
    result = run("config", "check", HOSTLER_EXAMPLE_RATIO="-1", HOSTLER_HTTP_PORT="seventy" * 20)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert [line.partition(":")[0] for line in result.stderr.splitlines()] == [
        "HOSTLER_EXAMPLE_AMQP_URL",
        "HOSTLER_EXAMPLE_HTTP_PORT",
        "HOSTLER_EXAMPLE_DATABASE_URL",
        "HOSTLER_EXAMPLE_AUTH_TOKENS_FILE",
        "HOSTLER_EXAMPLE_RATIO",
    ]
    assert "seventy" not in result.stderr


def test_config_show_prints_every_setting_and_masks_secrets(run: Run) -> None:
    result = run("config", "show", **GOOD, HOSTLER_EXAMPLE_KEY="keyword")
    assert result.exit_code == 0
    assert set(json.loads(result.stdout)) == set(Example.model_fields)
    for secret in ("brokerword", "baseword", "keyword"):
        assert secret not in result.output


async def test_a_created_token_is_known_by_its_line(run: Run, tmp_path: Path) -> None:
    result = run("token", "create", "ci", "--role", "operator", "--projects", "p1,p2")
    assert result.exit_code == 0
    token = result.stderr.rpartition(" ")[2].strip()
    assert token not in result.stdout
    file = tmp_path / "tokens"
    file.write_text(result.stdout)
    assert await auth.TokenFile.read(file).verify(token) == auth.Principal(
        name="ci", role=auth.Role.OPERATOR, projects=frozenset({"p1", "p2"})
    )


@pytest.mark.parametrize(
    "arguments",
    [("a:b",), ("",), ("a\nb",), ("#a",), ("ci", "--projects", "a:b"), ("ci", "--role", "king")],
)
def test_a_token_whose_line_could_not_be_read_is_not_made(
    run: Run, arguments: tuple[str, ...]
) -> None:
    result = run("token", "create", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""


def test_openapi_needs_neither_settings_nor_servers_and_prints_nothing_else(run: Run) -> None:
    result = run("openapi")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["paths"]["/v1/things"]["get"]["operationId"] == "list_things"
    assert "/metrics" not in document["paths"]


def test_migrate_brings_the_database_up_to_date_and_check_only_says_so(
    run: Run, postgres: Any, database_url: str
) -> None:
    environment = {**GOOD, "HOSTLER_DATABASE_URL": database_url}
    needed = run("migrate", "--check", **environment)
    assert needed.exit_code == 1
    assert "pending: hostler_example 0001 example" in needed.stdout
    first = run("migrate", **environment)
    assert first.exit_code == 0
    applied = [
        f"applied: {item.component} {item.version:04} {item.name}"
        for item in db.migrations_of("hostler_example")
    ]
    assert first.stdout.splitlines() == [*applied, f"example: {len(applied)} applied"]
    for again in (run("migrate", **environment), run("migrate", "--check", **environment)):
        assert (again.exit_code, again.stdout) == (0, "example: up to date\n")


def test_a_service_whose_tokens_file_is_wrong_names_the_line_and_ends_with_2(
    run: Run, tmp_path: Path
) -> None:
    file = tmp_path / "tokens"
    file.write_text("# callers\nme:king:*:00ff\n")
    tokens = {"HOSTLER_AUTH_MODE": "token", "HOSTLER_AUTH_TOKENS_FILE": str(file)}
    result = run("serve", **{**GOOD, **tokens})
    assert result.exit_code == 2
    assert result.stderr.startswith(f"hostler-example: {file}, line 2: expected name:role")
    assert "king" not in result.output


def test_a_client_command_that_gets_no_answer_ends_with_1_and_one_sentence(
    run: Run, tmp_path: Path
) -> None:
    result = run("ask")
    assert result.exit_code == 1
    assert result.stderr.endswith("ConnectError (peer.unavailable)\n")
    assert result.stderr.count("\n") == 1
    missing = run("ask", HOSTLER_TOKEN_FILE=str(tmp_path / "absent"))
    assert missing.exit_code == 1
    assert "No such file" in missing.stderr


def test_without_a_command_the_help_is_shown(run: Run) -> None:
    result = run()
    for command in ("serve", "migrate", "config", "token", "openapi", "ask"):
        assert command in result.output
