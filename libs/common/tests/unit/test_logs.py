import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from hostler_common import logs


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A test that configures the process's logs leaves them as they were."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def fail(message: str) -> None:
    raise RuntimeError(message)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_line_is_one_json_object_with_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(service="example", log_format="json")
    logs.get("x").info("claim_granted", host="h1", count=3)
    (line,) = lines(capsys)
    assert line["event"] == "claim_granted"
    assert line["host"] == "h1"
    assert line["count"] == 3
    assert line["service"] == "example"
    assert line["level"] == "info"


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_secrets_never_reach_the_log(
    capsys: pytest.CaptureFixture[str], log_format: logs.LogFormat
) -> None:
    logs.configure(service="example", log_format=log_format)
    logs.get("x").info(
        "connected", password="hunter2", url="amqp://guest:hunter2@host/v", api_token="hunter2"
    )
    logs.get("x").info(
        "nested",
        settings={"amqp": {"password": "hunter2", "url": "amqp://guest:hunter2@host/v"}},
        urls=["amqp://guest:hunter2@host/v"],
        reason=OSError("cannot reach postgresql://me:hunter2@db/x"),
    )
    try:
        fail("cannot reach postgresql://me:hunter2@db/x")
    except RuntimeError:
        logs.get("x").exception("failed")
    logging.getLogger("somebody").warning("lost amqp://u:hunter2@h/")
    out = capsys.readouterr().out
    assert "hunter2" not in out
    assert out.count("amqp://guest:***@host/v") == 3
    assert "RuntimeError: cannot reach postgresql://me:***@db/x" in out


def test_a_valid_trace_context_is_taken_and_others_are_not() -> None:
    fresh = logs.new_traceparent()
    assert logs.valid_traceparent(fresh) == fresh
    assert logs.valid_traceparent("00-" + "0" * 32 + "-" + "1" * 16 + "-01") is None
    assert logs.valid_traceparent(7) is None


def test_levels_below_the_chosen_one_and_chatty_libraries_are_silent(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.configure(service="example", level="WARNING", log_format="json")
    logs.get("x").info("quiet")
    logging.getLogger("aio_pika.connection").warning("reconnecting")
    logging.getLogger("somebody").warning("spoken")
    assert [line["event"] for line in lines(capsys)] == ["spoken"]


def test_a_foreign_line_has_the_fields_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(service="example", log_format="json")
    logging.getLogger("somebody").error("it is %s", "broken", extra={"host": "h1"})
    (line,) = lines(capsys)
    assert (line["event"], line["logger"], line["level"]) == ("it is broken", "somebody", "error")
    assert (line["service"], line["host"]) == ("example", "h1")
    assert str(line["timestamp"]).endswith("Z")


def test_configuring_again_replaces_what_was_configured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for _ in range(2):
        logs.configure(service="example", log_format="json")
    logs.get("x").info("once")
    assert len(lines(capsys)) == 1


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("amqp://u:p@h:5672/v", "amqp://u:***@h:5672/v"),
        (
            "postgresql://u:p%40q@h/db and amqps://a:b@c",
            "postgresql://u:***@h/db and amqps://a:***@c",
        ),
        ("amqp://:p@h/", "amqp://:***@h/"),
        ("amqp://u:p@ss@h/v", "amqp://u:***@h/v"),
        ("http://h:80/path", "http://h:80/path"),
        ("no address", "no address"),
    ],
)
def test_only_the_password_of_an_address_is_masked(text: str, masked: str) -> None:
    assert logs.redact_url(text) == masked
