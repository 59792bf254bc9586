"""Structured logs: one JSON object a line on stdout, or colours on a terminal.

The standard library's loggers (uvicorn, aio-pika, aiohttp) go through the same renderer. Values under names that mean
secrets are masked before anything is rendered. ``trace`` carries the W3C trace context of the work at hand, so that a
line, an HTTP call and a published message can be joined.
"""

import logging
import re
import secrets
import sys
from collections.abc import MutableMapping
from contextvars import ContextVar
from typing import Any, Literal

import structlog
from structlog.typing import Processor

LogFormat = Literal["json", "console", "auto"]

_SECRET_NAME = re.compile(
    r"password|passwd|secret|token|authorization|cookie|credential", re.IGNORECASE
)
_URL_PASSWORD = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s:/@]*:)\S+@", re.IGNORECASE)
_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

traceparent: ContextVar[str | None] = ContextVar("traceparent", default=None)


def get(name: str) -> structlog.stdlib.BoundLogger:
    """A logger whose lines carry ``logger=name``."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger


def new_traceparent() -> str:
    """A fresh W3C trace context (Trace Context, section 3.2)."""
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"


def valid_traceparent(value: object) -> str | None:
    """The value, if it is a W3C trace context of version 00, else None."""
    return value if isinstance(value, str) and _TRACEPARENT.fullmatch(value) else None


def redact_url(text: str) -> str:
    """The text with the password of every URL in it masked."""
    return _URL_PASSWORD.sub(r"\1***@", text)


def _redact(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:  # noqa: ANN401  structlog's processor type
    for key, value in event.items():
        event[key] = _masked(key, value)
    return event


def _masked(name: str, value: Any) -> Any:  # noqa: ANN401  anything may be logged
    if _SECRET_NAME.search(name):
        return "***"
    match value:
        case str():
            return redact_url(value)
        case BaseException():
            return redact_url(f"{type(value).__name__}: {value}")
        case dict():
            return {key: _masked(str(key), item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_masked(name, item) for item in value]
        case _:
            return value


def configure(*, service: str, level: str = "INFO", log_format: LogFormat = "auto") -> None:
    """Route every log line of the process to stdout in one format.

    ``auto`` is JSON unless stdout is a terminal. Calling it again replaces what the first call set up.
    """
    as_json = log_format == "json" or (log_format == "auto" and not sys.stdout.isatty())
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    # tracebacks become text before the masking: an exception's message may hold an address with its password
    renderer: list[Processor] = [structlog.processors.format_exc_info, _redact]
    renderer.append(
        structlog.processors.JSONRenderer()
        if as_json
        else structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    )
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # these report each reconnect attempt and each request; our own lines say the same once
    for noisy in (
        "aio_pika",
        "aiormq",
        "asyncpg",
        "httpx",
        "httpcore",
        "uvicorn.access",
        "aiohttp.access",
    ):
        logging.getLogger(noisy).setLevel(max(logging.ERROR, root.level))
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, root.level))
    structlog.contextvars.bind_contextvars(service=service)
