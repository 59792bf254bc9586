"""From the lines of a file to the bodies of notifications: archives, and what oslo's log driver wrote.

An archive has one body a line, of either envelope, as it was sent. oslo.messaging's log driver
(oslo_messaging/notify/_impl_log.py) logs the message as JSON under the name
`oslo.messaging.notification.<event_type>`; before it stands whatever the log's format puts there,
or around it, where the format is JSON (oslo_log's JSONFormatter). In a log there are other lines
too, which are no notifications and not broken either.
"""

from collections.abc import Iterable, Iterator
from enum import StrEnum
from itertools import chain
from typing import Final, NamedTuple

import orjson

LOGGER: Final = b"oslo.messaging.notification"
_LONGEST_FIRST_LINE: Final = 1 << 20  # looked at to tell a log from an archive


class Format(StrEnum):
    """What the lines of a file are."""

    NDJSON = "ndjson"  # every line is a body
    LOG = "log"


class Line(NamedTuple):
    """One line of a file, counted from 1; `body` is None where it is no notification's."""

    number: int
    body: bytes | None


def format_of(first_line: bytes) -> Format:
    """What a file is that begins so: an archive, where that is an object that no logger wrote."""
    text = first_line[:_LONGEST_FIRST_LINE].removeprefix(b"\xef\xbb\xbf").strip()
    if not text.startswith(b"{"):
        return Format.LOG
    return Format.LOG if _log_record(text) is not None else Format.NDJSON


def bodies(lines: Iterable[bytes], file_format: Format | None = None) -> Iterator[Line]:
    """Yield every line that is not blank, with the body it holds. Without a format, the first of them tells it.

    The body is the line without its end: the bytes that were sent, by which copies are known.
    """
    if file_format is None:
        rest = iter(lines)
        head = []
        for line in rest:
            head.append(line)
            if not line.isspace():
                break
        file_format = format_of(head[-1] if head else b"")
        lines = chain(head, rest)
    find = _in_log if file_format is Format.LOG else _in_archive
    for number, line in enumerate(lines, start=1):
        text = line.removesuffix(b"\n").removesuffix(b"\r")
        if number == 1:
            text = text.removeprefix(b"\xef\xbb\xbf")
        if text and not text.isspace():
            yield Line(number, find(text))


def _in_archive(text: bytes) -> bytes:
    return text


def _in_log(text: bytes) -> bytes | None:
    record = _log_record(text) if text.lstrip().startswith(b"{") else None
    if record is not None:
        name, message = record
        return message if name.startswith(LOGGER) else None
    _, name, rest = text.partition(LOGGER)
    if name:
        # a line of the notifier's is one, whatever became of it: broken ones are to be seen
        return rest[_begin(rest) :].rstrip()
    # a format that leaves the logger's name out
    body = text[_begin(text) :].rstrip()
    return body if b'"event_type"' in body and b'"payload"' in body else None


def _begin(text: bytes) -> int:
    """Where the message begins: no format has an object's brace and quote in its prefix."""
    found = text.find(b'{"')
    return found if found >= 0 else max(0, text.find(b"{"))


def _log_record(text: bytes) -> tuple[bytes, bytes] | None:
    """The logger's name and the message, if the line is a log record in JSON."""
    if b'"message"' not in text or b'"name"' not in text:
        return None
    try:
        record = orjson.loads(text)
    except ValueError:
        return None
    if not isinstance(record, dict) or "event_type" in record:
        return None
    name, message = record.get("name"), record.get("message")
    if not isinstance(name, str) or not isinstance(message, str):
        return None
    return name.encode("utf-8", "replace"), message.encode("utf-8", "replace")
