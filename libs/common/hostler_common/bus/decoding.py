"""What a publisher wrote into a message's properties never ends our connection.

pamqp refuses a frame of which one property cannot be decoded (a timestamp in microseconds, a message id that is not
UTF-8), and with it the whole connection. The message would come again on the next one, and end it too: one sloppy
publisher could stop a queue for good. The broker does not look at these values, so we take what is readable of them.
The body is bytes and is not touched.

What was read is written again, on the retry ladder and on replay. So tables are read no deeper than everything that
keeps them can go, and numbers are written as they were read: pamqp writes a float in half the bytes it came in.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

from pamqp import decode, encode

MAX_DEPTH: Final = 32
"""How deep tables and arrays may be in each other; JSON readers and writers have limits of 254 and more."""

UNDECODABLE = "x-undecodable"
"""The one key of a header table that stands for a table nobody can read; its value is the table's bytes."""

_strict_table = decode.field_table
_value = encode.encode_table_value
_LEAST: Final = -(2**63)


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
    size, found = _inner_table(value)
    return (size, found) if _is_flat(found) else _undecodable(value)


def _inner_table(value: bytes) -> tuple[int, dict[str, Any]]:
    try:
        return _strict_table(value)
    except (ValueError, KeyError, IndexError, RecursionError):
        return _undecodable(value)


def _undecodable(value: bytes) -> tuple[int, dict[str, Any]]:
    length = int.from_bytes(value[:4], "big")
    return 4 + length, {UNDECODABLE: bytes(value[4 : 4 + length])}


def _is_flat(value: dict[str, Any]) -> bool:
    """Whether no more than `MAX_DEPTH` tables and arrays are in each other."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        inner = (item.values() if isinstance(item, dict) else item for item in level)
        level = [one for items in inner for one in items if isinstance(one, dict | list)]
        if not level:
            return True
    return False


def encoded(value: Any) -> bytes:  # noqa: ANN401  AMQP tables hold anything
    """A table's value with its letter before it, floats in the eight bytes that Python has of them.

    An integer of more than 64 bits was one, too: PostgreSQL writes large numbers that jsonb kept as integers.
    """
    if isinstance(value, float) or (isinstance(value, int) and not _LEAST <= value < -_LEAST):
        return b"d" + encode.double(float(value))
    return bytes(_value(value))


def properties(value: bytes) -> dict[str, Any]:
    """The properties that a content header says a message has, by their names in AMQP 0-9-1, section 1.8.3.

    `value` is what follows the body's size. pamqp looks at all fourteen, which takes longer than all else about a
    delivery; where the bytes end before the flags say, what is there counts.
    """
    found: dict[str, Any] = {}
    flags = int.from_bytes(value[:2], "big")
    at = 2
    for flag, name, decoded in _PROPERTIES:
        if flags & flag and at < len(value):
            size, found[name] = decoded(value[at:])
            at += size
    return found


def _octet(value: bytes) -> tuple[int, int]:
    return 1, value[0]


_PROPERTIES: Final[tuple[tuple[int, str, Callable[[bytes], tuple[int, Any]]], ...]] = (
    (1 << 15, "content_type", short_string),
    (1 << 14, "content_encoding", short_string),
    (1 << 13, "headers", table),
    (1 << 12, "delivery_mode", _octet),
    (1 << 11, "priority", _octet),
    (1 << 10, "correlation_id", short_string),
    (1 << 9, "reply_to", short_string),
    (1 << 8, "expiration", short_string),
    (1 << 7, "message_id", short_string),
    (1 << 6, "timestamp", timestamp),
    (1 << 5, "type", short_string),
    (1 << 4, "user_id", short_string),
    (1 << 3, "app_id", short_string),
)


def install() -> None:
    """Every AMQP frame of this process is decoded so, and every header encoded."""
    decode.METHODS |= {"shortstr": short_string, "timestamp": timestamp, "table": table}
    decode.TABLE_MAPPING |= {b"T": timestamp, b"F": _inner_table}
    encode.encode_table_value = encoded
