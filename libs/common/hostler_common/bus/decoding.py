"""What a publisher wrote into a message's properties never ends our connection.

pamqp refuses a frame of which one property cannot be decoded (a timestamp in microseconds, a message id that is not
UTF-8), and with it the whole connection. The message would come again on the next one, and end it too: one sloppy
publisher could stop a queue for good. The broker does not look at these values, so we take what is readable of them.
The body is bytes and is not touched.

Anybody who may publish fills a frame with what he likes, so reading one takes no longer than it is long, and a bounded
number of values is read: nothing else runs meanwhile.

What was read is written again, on the retry ladder and on replay. So tables are read no deeper than everything that
keeps them can go, and numbers are written as they were read: pamqp writes a float in half the bytes it came in.
"""

import struct
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

from pamqp import decode, encode

MAX_DEPTH: Final = 32
"""How deep tables and arrays may be in each other; JSON readers and writers have limits of 254 and more."""

MAX_VALUES: Final = 4096
"""How many values a header table may have, with those of the tables and arrays in it."""

UNDECODABLE = "x-undecodable"
"""The one key of a header table that stands for a table nobody can read; its value is the table's bytes."""

_LENGTH: Final = struct.Struct(">I")
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
    """The header table, or its bytes under `UNDECODABLE`: where it cannot be read, or is more than is meant."""
    try:
        return _Table(value).read()
    except (ValueError, IndexError):
        return _undecodable(value, 0)


class _Table:
    """A header table in its bytes, which are read where they lie.

    pamqp copies the rest of a table for each of its values: of a frame full of them that takes a second.
    """

    def __init__(self, value: bytes) -> None:
        self._value = value
        self._left = MAX_VALUES

    def read(self) -> tuple[int, dict[str, Any]]:
        """Its size, and what it holds.

        Raises:
            ValueError: it is cut off, holds what is not known, is too deep or too much.
            IndexError: it is cut off.
        """
        return self._table(0, 1)

    def _table(self, at: int, depth: int) -> tuple[int, dict[str, Any]]:
        at, end = self._inside(at, depth)
        found: dict[str, Any] = {}
        while at < end:
            begin = at + 1
            at = self._within(begin + self._value[at], end)
            key = self._value[begin:at].decode()
            at, found[key] = self._one(at, end, depth)
        return end, found

    def _array(self, at: int, depth: int) -> tuple[int, list[Any]]:
        at, end = self._inside(at, depth)
        found = []
        while at < end:
            at, one = self._one(at, end, depth)
            found.append(one)
        return end, found

    def _inside(self, at: int, depth: int) -> tuple[int, int]:
        """Where the content of a table or an array begins and ends."""
        if depth > MAX_DEPTH:
            raise _TooMuchError(f"more than {MAX_DEPTH} tables are in each other")
        begin = at + _LENGTH.size
        return begin, self._within(begin + self._length(at), len(self._value))

    def _one(self, at: int, end: int, depth: int) -> tuple[int, Any]:
        """The value after its letter, and where the next thing begins."""
        self._left -= 1
        if self._left < 0:
            raise _TooMuchError(f"more than {MAX_VALUES} values")
        self._within(at + 1, end)
        letter = self._value[at : at + 1]
        at += 1
        fixed = _FIXED.get(letter)
        if fixed is not None:
            size, decoded = fixed
            until = self._within(at + size, end)
            return until, decoded(self._value[at:until])[1]
        match letter:
            case b"S" | b"x":
                begin = at + _LENGTH.size
                until = self._within(begin + self._length(at), end)
                content = self._value[begin:until]
                return until, _text(content) if letter == b"S" else bytearray(content)
            case b"F":
                until, inner = self._inner_table(at, depth + 1)
                return self._within(until, end), inner
            case b"A":
                until, items = self._array(at, depth + 1)
                return self._within(until, end), items
            case b"V" | b"\0":
                return at, None
        raise ValueError(f"unknown kind of value {letter!r}")

    def _inner_table(self, at: int, depth: int) -> tuple[int, dict[str, Any]]:
        """A table in another; that it cannot be read does not spoil the other one."""
        try:
            return self._table(at, depth)
        except _TooMuchError:
            raise
        except (ValueError, IndexError):
            return _undecodable(self._value, at)

    def _length(self, at: int) -> int:
        if at + _LENGTH.size > len(self._value):
            raise ValueError("cut off")
        length: int = _LENGTH.unpack_from(self._value, at)[0]
        return length

    def _within(self, at: int, end: int) -> int:
        if at > end:
            raise ValueError("cut off")
        return at


class _TooMuchError(ValueError):
    """A table that nobody means: all of it is left as it is."""


def _undecodable(value: bytes, at: int) -> tuple[int, dict[str, Any]]:
    begin = at + _LENGTH.size
    end = begin + int.from_bytes(value[at:begin], "big")
    return end, {UNDECODABLE: bytes(value[begin:end])}


def _text(content: bytes) -> str | bytes:
    """As pamqp has it: what is not UTF-8 stays bytes."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content


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


_FIXED: Final[dict[bytes, tuple[int, Callable[[bytes], tuple[int, Any]]]]] = {
    b"t": (1, decode.boolean),
    b"b": (1, decode.short_short_int),
    b"B": (1, decode.short_short_uint),
    b"s": (2, decode.short_int),
    b"u": (2, decode.short_uint),
    b"I": (4, decode.long_int),
    b"i": (4, decode.long_uint),
    b"l": (8, decode.long_long_int),
    b"L": (8, decode.long_long_int),
    b"f": (4, decode.floating_point),
    b"d": (8, decode.double),
    b"D": (5, decode.decimal),
    b"T": (8, timestamp),
}
"""How many bytes follow the letter of a value, and how they are read (AMQP 0-9-1 as RabbitMQ and pamqp have it)."""


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
    encode.encode_table_value = encoded
