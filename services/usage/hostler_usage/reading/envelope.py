"""From the bytes of one AMQP body to one notification, or to a typed reason why not.

oslo.messaging has two envelopes: driver `messagingv2` sends `{"oslo.version", "oslo.message"}`
with the message as JSON text inside JSON; driver `messaging` sends the message itself. kombu may
compress either (`kombu_compression`). Reading must never crash and must not depend on anything
but the body and its compression, for what is read twice must be the same notification.
"""

import bz2
import hashlib
import json
import lzma
import uuid
import zlib
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import ClassVar, NamedTuple

import orjson

from hostler_usage.reading.reader import clean
from hostler_usage.reading.times import BadTimeError, parse_time

MAX_BODY_BYTES = 4 * 1024 * 1024
MAX_NAME_LENGTH = 255  # message ids and event types are keys of B-trees
_NAMESPACE = uuid.UUID("9d0b5a1c-3f52-5c5e-9d5b-0a8c6f3e2b71")
_LONGEST_NUMBER = 40
_LZMA_BYTES = (
    128 * 1024 * 1024
)  # the strongest preset needs half; a header of thirteen bytes can ask for gigabytes


class UnreadableError(ValueError):
    """A body that holds no notification; `code` says why and never changes its meaning.

    UnreadableError
    ├── TooLargeError          more bytes than are accepted, or a decompression bomb
    ├── BadCompressionError    compressed in a way not known, or cut off
    ├── NotTextError           not UTF-8
    ├── NotJsonError           not JSON, or nested deeper than can be read
    ├── BadEnvelopeError       JSON, but neither envelope; or an envelope version not known
    └── BadNotificationError   an envelope whose message lacks event_type or timestamp
    """

    code: ClassVar[str] = "usage.notification.unreadable"


class TooLargeError(UnreadableError):
    """More bytes than are accepted."""

    code = "usage.notification.too_large"


class BadCompressionError(UnreadableError):
    """The body cannot be decompressed."""

    code = "usage.notification.bad_compression"


class NotTextError(UnreadableError):
    """The body is not UTF-8."""

    code = "usage.notification.not_utf8"


class NotJsonError(UnreadableError):
    """The body is not JSON that can be read."""

    code = "usage.notification.not_json"


class BadEnvelopeError(UnreadableError):
    """The body is JSON but no envelope this service knows."""

    code = "usage.notification.bad_envelope"


class BadNotificationError(UnreadableError):
    """The message has no event type or no moment, so that it cannot be filed."""

    code = "usage.notification.bad_message"


class Notification(NamedTuple):
    """One notification, whichever envelope brought it.

    `digest` is the sha256 of the body as it came; `payload` may be any JSON value, for some
    senders' error payloads are plain text.
    """

    message_id: str
    has_own_id: bool
    event_type: str
    publisher_id: str
    priority: str
    timestamp: datetime
    payload: object
    context_project_id: str | None
    request_id: str | None
    digest: bytes


def open_body(
    body: bytes, *, compression: str | None = None, max_bytes: int = MAX_BODY_BYTES
) -> Notification:
    """Return the notification in `body`.

    `compression` is what kombu's `compression` header says. A message without an id of its own
    gets one made from its bytes (uuid5 of their sha256), so that a redelivery gets the same.

    Raises:
        UnreadableError: one of its subclasses, see there.
    """
    if len(body) > max_bytes:
        raise TooLargeError(f"{len(body)} bytes, at most {max_bytes} are accepted")
    digest = hashlib.sha256(body).digest()
    message = _unwrap(_read_json(_decompress(body, compression, max_bytes)))
    event_type = message.get("event_type")
    if not isinstance(event_type, str) or not 0 < len(event_type) <= MAX_NAME_LENGTH:
        raise BadNotificationError("no event_type of 1 to 255 characters")
    try:
        timestamp = parse_time(message.get("timestamp"))
    except BadTimeError as exc:
        raise BadNotificationError(f"timestamp: {exc}") from exc
    if timestamp is None:
        raise BadNotificationError("no timestamp")
    own_id = message.get("message_id")
    has_own_id = isinstance(own_id, str) and 0 < len(own_id) <= MAX_NAME_LENGTH
    return Notification(
        message_id=clean(str(own_id)) if has_own_id else str(uuid.uuid5(_NAMESPACE, digest.hex())),
        has_own_id=has_own_id,
        event_type=clean(event_type),
        publisher_id=_name(message, "publisher_id") or "",
        priority=(_name(message, "priority") or "").upper(),
        timestamp=timestamp,
        payload=message.get("payload"),
        # the key of the project changed with oslo.context's releases
        context_project_id=_name(message, "_context_project_id")
        or _name(message, "_context_tenant")
        or _name(message, "_context_tenant_id"),
        request_id=_name(message, "_context_request_id"),
        digest=digest,
    )


def open_event(
    body: bytes,
    *,
    event_type: str | None,
    message_id: str | None,
    timestamp: datetime | None,
    max_bytes: int = MAX_BODY_BYTES,
) -> Notification:
    """Return the notification that an event of hostler's own is: the envelope is in AMQP's properties.

    Raises:
        UnreadableError: one of its subclasses, see there.
    """
    if len(body) > max_bytes:
        raise TooLargeError(f"{len(body)} bytes, at most {max_bytes} are accepted")
    if not event_type or len(event_type) > MAX_NAME_LENGTH or timestamp is None:
        raise BadNotificationError("an event needs the properties type and timestamp")
    payload = _read_json(body)
    digest = hashlib.sha256(body).digest()
    has_own_id = message_id is not None and 0 < len(message_id) <= MAX_NAME_LENGTH
    return Notification(
        message_id=clean(message_id)
        if message_id is not None and has_own_id
        else str(uuid.uuid5(_NAMESPACE, digest.hex())),
        has_own_id=has_own_id,
        event_type=clean(event_type),
        publisher_id="",
        priority="INFO",
        timestamp=timestamp.astimezone(UTC),
        payload=payload,
        context_project_id=None,
        request_id=None,
        digest=digest,
    )


def _decompress(body: bytes, compression: str | None, max_bytes: int) -> bytes:
    if not compression:
        return body
    match compression.lower().removeprefix("application/").removeprefix("x-"):
        case "" | "identity" | "utf-8":
            return body
        case "gzip" | "zlib" | "deflate":
            # kombu's "gzip" is a zlib stream, others send a gzip file: 47 takes both
            stream: zlib._Decompress | bz2.BZ2Decompressor | lzma.LZMADecompressor
            stream = zlib.decompressobj(wbits=47)
        case "bz2" | "bzip2":
            stream = bz2.BZ2Decompressor()
        case "lzma":
            stream = lzma.LZMADecompressor(memlimit=_LZMA_BYTES)
        case _:
            raise BadCompressionError(f"compression {str(compression)[:40]!r} is not known")
    try:
        plain = stream.decompress(body, max_bytes + 1)
    except (zlib.error, OSError, EOFError, ValueError, lzma.LZMAError) as exc:
        raise BadCompressionError(str(exc)) from exc
    if len(plain) > max_bytes:
        raise TooLargeError(f"more than {max_bytes} bytes once decompressed")
    if not stream.eof:
        raise BadCompressionError("the compressed body is cut off")
    return plain


def _read_json(text: bytes | str) -> object:
    try:
        return orjson.loads(text)
    except ValueError:
        return _read_leniently(text)


def _read_leniently(text: bytes | str) -> object:
    """What orjson refuses and Python's senders write all the same: NaN, lone surrogates."""
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
    except UnicodeDecodeError as exc:
        raise NotTextError(f"not UTF-8 from byte {exc.start}") from exc
    try:
        return json.loads(decoded, parse_int=_integer, parse_constant=_no_number)
    except RecursionError as exc:
        raise NotJsonError("nested too deeply") from exc
    except ValueError as exc:
        raise NotJsonError(str(exc)) from exc


def _integer(digits: str) -> int | None:
    """Integers that no quantity can have are as good as absent (and slow to convert)."""
    return int(digits) if len(digits) <= _LONGEST_NUMBER else None


def _no_number(_: str) -> None:
    """NaN and Infinity are not JSON, yet Python senders write them."""


def _unwrap(outer: object) -> Mapping[str, object]:
    if not isinstance(outer, dict):
        raise BadEnvelopeError(f"the body is {type(outer).__name__}, not an object")
    # a message with only one of the two keys is a v1 message, as oslo's own receiver has it
    if "oslo.version" not in outer or "oslo.message" not in outer:
        return outer
    version = str(outer["oslo.version"])
    if version.split(".", 1)[0] != "2":
        raise BadEnvelopeError(f"envelope version {version[:20]!r} is not known")
    inner = outer["oslo.message"]
    if isinstance(inner, str):
        inner = _read_json(inner)
    if not isinstance(inner, dict):
        raise BadEnvelopeError(f"oslo.message is {type(inner).__name__}, not an object")
    return inner


def _name(message: Mapping[str, object], key: str) -> str | None:
    value = message.get(key)
    return clean(value)[:MAX_NAME_LENGTH] if isinstance(value, str) and value else None
