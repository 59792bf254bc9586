"""The RPC cast `cache(image_id, meta)` on the wire, as oslo.messaging's own clients write it.

Envelope version 2.0: an object with `oslo.version` and `oslo.message`, the latter JSON in a
string (oslo_messaging/_drivers/common.py, `serialize_msg`); inside, `method`, `args`, `version`,
a `_unique_id` for duplicates, and the context flattened to `_context_*`
(oslo_messaging/_drivers/amqp.py). A cast has no `_msg_id` and no `_reply_q`: nobody answers.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

ENVELOPE_VERSION: Final = "2.0"
METHOD: Final = "cache"
VERSION: Final = "1.0"
CONTENT_TYPE: Final = "application/json"
CONTENT_ENCODING: Final = "utf-8"
MAX_META_BYTES: Final = 2048


class EnvelopeError(ValueError):
    """The body is no call that is meant for us; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheCall:
    """`cache(image_id, meta)`."""

    image_id: str
    meta: Mapping[str, object]


def pack(call: CacheCall, *, unique_id: str) -> bytes:
    """The body of the cast.

    Raises:
        EnvelopeError: the meta is larger than a fanout should carry.
    """
    if len(json.dumps(call.meta).encode()) > MAX_META_BYTES:
        raise EnvelopeError(f"meta is over {MAX_META_BYTES} bytes")
    message = {
        "method": METHOD,
        "args": {"image_id": call.image_id, "meta": dict(call.meta)},
        "version": VERSION,
        "_unique_id": unique_id,
    }
    return json.dumps(
        {"oslo.version": ENVELOPE_VERSION, "oslo.message": json.dumps(message)}
    ).encode()


def unpack(body: bytes) -> CacheCall | None:
    """The call in a body; None where it is another method, or another major version.

    Raises:
        EnvelopeError: it is no RPC message at all.
    """
    try:
        outer = json.loads(body)
        inner = json.loads(outer["oslo.message"]) if "oslo.message" in outer else outer
        method, arguments = inner["method"], inner["args"]
        major = str(inner.get("version", "1.0")).partition(".")[0]
        if method != METHOD or major != VERSION.partition(".")[0]:
            return None
        image_id, meta = arguments["image_id"], arguments["meta"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise EnvelopeError("not an RPC message of oslo.messaging") from exc
    if not isinstance(image_id, str) or not isinstance(meta, dict):
        raise EnvelopeError("cache() takes an image id and a mapping")
    return CacheCall(image_id=image_id, meta=meta)
