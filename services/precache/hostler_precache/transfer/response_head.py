"""The head of an HTTP/1.1 response, as strictly as a stranger's is to be read.

Only what `blobs` sends is understood: a status from 200 to 599 and a body of a length that is said.
Chunks, compression, folded lines, interim answers, a length that is said twice: whoever sends one
is not a peer of this swarm, or means no good (RFC 9112, sections 2 to 6).
"""

import re
from dataclasses import dataclass
from typing import Final

from hostler_precache.transfer.manifest import Span

MAX_HEAD_BYTES: Final = 16 * 1024
MAX_FIELDS: Final = 64
END: Final = b"\r\n\r\n"

# each character is looked at once: what was taken is not given back
_STATUS_LINE: Final = re.compile(
    rb"HTTP/1\.1 ([2-5][0-9]{2})(?: [\t\x20-\x7e\x80-\xff]*+)?(?=\r\n|\Z)"
)
_UNBOUNDED: Final = re.compile(_STATUS_LINE.pattern.replace(rb"1\.1", rb"1\.[01]"))
_FIELDS: Final = re.compile(rb"(?:\r\n[!#$%&'*+\-.^_`|~0-9A-Za-z]++:[\t\x20-\x7e\x80-\xff]*+)*+")
# what changes how the body or the connection is read, and so may be said once
_READ: Final = re.compile(
    rb"\r\n(connection|content-encoding|content-length|content-range|retry-after"
    rb"|transfer-encoding):([^\r]*+)",
    re.IGNORECASE,
)
_LENGTH: Final = re.compile(rb"[0-9]{1,15}")
_RANGE: Final = re.compile(rb"bytes ([0-9]{1,15})-([0-9]{1,15})/(\*|[0-9]{1,15})")
_SECONDS: Final = re.compile(rb"[0-9]{1,6}")


class HeadError(ValueError):
    """A head that is not understood, or not believed; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What an answer says before its body."""

    status: int
    length_bytes: int
    span: Span | None = None  # of Content-Range
    total_bytes: int | None = None  # of Content-Range, where it says
    retry_after_seconds: int | None = None
    keeps_alive: bool = True


def parse(head: bytes) -> Head:
    """What the head says.

    Args:
        head: all bytes before the empty line, without the line end before it.

    Raises:
        HeadError: it is no head of an answer as `blobs` gives them.
    """
    status = _STATUS_LINE.match(head)
    if status is None:
        raise HeadError("not a final answer of HTTP/1.1")
    fields = _fields(head, status.end())
    code = int(status[1])
    span, total = _content_range(fields.get(b"content-range"))
    return Head(
        status=code,
        length_bytes=_length(code, fields.get(b"content-length")),
        span=span,
        total_bytes=total,
        retry_after_seconds=_seconds(fields.get(b"retry-after")),
        keeps_alive=fields.get(b"connection", b"keep-alive").lower() == b"keep-alive",
    )


def parse_unbounded(head: bytes) -> int:
    """The status of an answer to HTTP/1.0, whose body is all that comes until the connection ends.

    Raises:
        HeadError: it is no head of an answer as `blobs` gives them.
    """
    status = _UNBOUNDED.match(head)
    if status is None:
        raise HeadError("not a final answer of HTTP/1.0")
    _fields(head, status.end())
    return int(status[1])


def _fields(head: bytes, start: int) -> dict[bytes, bytes]:
    """Those that change how the body or the connection is read, by their names in small letters."""
    if head.count(b"\r\n") > MAX_FIELDS:
        raise HeadError("too many header fields")
    if _FIELDS.fullmatch(head, start) is None:
        raise HeadError("a malformed header field")
    fields: dict[bytes, bytes] = {}
    for name, value in _READ.findall(head, start):
        known = name.lower()
        if known in fields:
            raise HeadError(f"{known.decode()} twice")
        fields[known] = value.strip(b" \t")
    if b"transfer-encoding" in fields:
        raise HeadError("Transfer-Encoding")
    if fields.get(b"content-encoding", b"identity").lower() != b"identity":
        raise HeadError("Content-Encoding")
    return fields


def _length(status: int, text: bytes | None) -> int:
    if text is None:
        if status == 204:
            return 0
        raise HeadError("no Content-Length")
    if _LENGTH.fullmatch(text) is None:
        raise HeadError("a malformed Content-Length")
    length = int(text)
    if status == 204 and length:
        raise HeadError("a body where none may be")
    return length


def _content_range(text: bytes | None) -> tuple[Span | None, int | None]:
    if text is None:
        return None, None
    found = _RANGE.fullmatch(text)
    if found is None:
        return None, None  # of another unit, or of none, as with status 416
    total = None if found[3] == b"*" else int(found[3])
    return Span(start=int(found[1]), stop=int(found[2]) + 1), total


def _seconds(text: bytes | None) -> int | None:
    return int(text) if text is not None and _SECONDS.fullmatch(text) else None
