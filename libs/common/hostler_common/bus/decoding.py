"""What a publisher wrote into a message's properties never ends our connection.

pamqp refuses a frame of which one property cannot be decoded (a timestamp in microseconds, a message id that is not
UTF-8), and with it the whole connection. The message would come again on the next one, and end it too: one sloppy
publisher could stop a queue for good. The broker does not look at these values, so we take what is readable of them.
The body is bytes and is not touched.
"""

from datetime import UTC, datetime
from typing import Any

from pamqp import decode

UNDECODABLE = "x-undecodable"
"""The one key of a header table that stands for a table nobody can read; its value is the table's bytes."""

_strict_table = decode.field_table


def short_string(value: bytes) -> tuple[int, str]:
    """The string with a question mark for what is not UTF-8: it never grows, so that it can be published again."""
    length = value[0]
    return length + 1, bytes(value[1 : length + 1]).decode(errors="replace").replace("\ufffd", "?")


def timestamp(value: bytes) -> tuple[int, datetime | None]:
    """The time, if it is seconds or milliseconds since 1970 as pamqp reads them, else None."""
    number: float = int.from_bytes(value[:8], "big")
    if number > 0xFFFFFFFF:
        number /= 1000.0
    try:
        return 8, datetime.fromtimestamp(number, tz=UTC)
    except (ValueError, OverflowError, OSError):
        return 8, None


def table(value: bytes) -> tuple[int, dict[str, Any]]:
    """The header table, or its bytes under `UNDECODABLE`."""
    try:
        return _strict_table(value)
    except (ValueError, KeyError, IndexError, RecursionError):
        length = int.from_bytes(value[:4], "big")
        return 4 + length, {UNDECODABLE: bytes(value[4 : 4 + length])}


def install() -> None:
    """Every AMQP frame of this process is decoded so."""
    decode.METHODS |= {"shortstr": short_string, "timestamp": timestamp, "table": table}
    decode.TABLE_MAPPING |= {b"T": timestamp, b"F": table}
