"""What an operator types: turned into a request, or refused in one sentence."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from typer.testing import CliRunner

from hostler_precache import __main__ as command_line

RUNNER = CliRunner()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--label", "zone"], "write NAME=VALUE"),
        (["--deadline", "tomorrow"], "write 2026-12-01T02:00:00Z or 6h"),
        (["--deadline", "2026-12-01T02:00:00"], "add the offset from UTC"),
        (["--deadline", "1e99h"], "write 2026-12-01T02:00:00Z or 6h"),
        (["--window", "22:00"], "write 22:00-06:00"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "distribute"])
def test_a_mistyped_option_is_refused_in_one_sentence(
    command: str, arguments: list[str], sentence: str
) -> None:
    result = RUNNER.invoke(command_line.main, [command, "image", *arguments])
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert "Traceback" not in result.output


def test_a_hash_without_a_location_is_refused() -> None:
    result = RUNNER.invoke(command_line.main, ["distribute", "image", "--sha512", "ab"])
    assert result.exit_code == 2
    assert "--sha512 needs --location" in result.stderr


def body(**options: Any) -> dict[str, Any]:
    given = {
        "hosts": None, "labels": None, "percent": None, "canary": None, "deadline": None,
        "deadline_percent": 100, "host_limit": None, "total_limit": None, "windows": None,
        "location": None, "fetcher": "http",
    }  # fmt: skip
    return command_line._request("image", **(given | options))


def test_options_become_a_request() -> None:
    assert body(
        labels=["zone=a", "rack=r=1"],
        host_limit=100,
        windows=["22:00-06:00@Europe/Berlin"],
        location="http://images/one",
    ) == {
        "image_id": "image",
        "hosts": None,
        "labels": {"zone": "a", "rack": "r=1"},
        "percent": None,
        "canary_percent": None,
        "deadline_at": None,
        "deadline_percent": 100,
        "host_bytes_per_second": 12_500_000,
        "total_bytes_per_second": None,
        "windows": [{"start": "22:00", "stop": "06:00", "time_zone": "Europe/Berlin"}],
        "image": {"image_id": "image", "fetcher": "http", "location": "http://images/one"},
    }


def test_a_deadline_in_hours_is_counted_from_now() -> None:
    at = datetime.fromisoformat(body(deadline="6h")["deadline_at"])
    assert abs(at - datetime.now(UTC) - timedelta(hours=6)) < timedelta(minutes=1)
