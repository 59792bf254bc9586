"""Both envelopes, every way to compress them, and everything that is no notification."""

import bz2
import gzip
import hashlib
import json
import lzma
import struct
import zlib
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler_usage.reading import envelope

INNER = {
    "message_id": "4b884c03-756d-4c06-8b42-80b6def9d302",
    "publisher_id": "compute.cmp-017",
    "event_type": "compute.instance.exists",
    "priority": "info",
    "payload": {"instance_id": "3a51"},
    "timestamp": "2026-05-08 16:03:44.122481",
    "_unique_id": "0ee26117077648e18d88ac76e28a72e2",
    "_context_request_id": "req-659a8eb2-4372-4c01-9028-ad6e40b0ed22",
    "_context_project_id": "7c15",
}


def v1(**changes: object) -> bytes:
    return json.dumps(INNER | changes).encode()


def v2(**changes: object) -> bytes:
    return json.dumps(
        {"oslo.version": "2.0", "oslo.message": json.dumps(INNER | changes)}
    ).encode()


@pytest.mark.parametrize("body", [v1(), v2()])
def test_both_envelopes_hold_the_same_notification(body: bytes) -> None:
    assert envelope.open_body(body) == envelope.Notification(
        message_id="4b884c03-756d-4c06-8b42-80b6def9d302",
        has_own_id=True,
        event_type="compute.instance.exists",
        publisher_id="compute.cmp-017",
        priority="INFO",
        timestamp=datetime(2026, 5, 8, 16, 3, 44, 122481, tzinfo=UTC),
        payload={"instance_id": "3a51"},
        context_project_id="7c15",
        request_id="req-659a8eb2-4372-4c01-9028-ad6e40b0ed22",
        digest=hashlib.sha256(body).digest(),
    )


@pytest.mark.parametrize(
    ("compression", "compress"),
    [
        ("application/x-gzip", zlib.compress),  # what kombu calls gzip
        ("application/x-gzip", gzip.compress),
        ("gzip", gzip.compress),
        ("application/x-bz2", bz2.compress),
        ("application/x-lzma", lzma.compress),
        ("application/x-lzma", partial(lzma.compress, preset=9)),
    ],
)
def test_a_compressed_body_is_read(compression: str, compress: Callable[[bytes], bytes]) -> None:
    opened = envelope.open_body(compress(v2()), compression=compression)
    assert opened.message_id == INNER["message_id"]


def test_one_oslo_key_without_the_other_is_a_v1_message() -> None:
    body = v1(**{"oslo.version": "2.0"})
    assert envelope.open_body(body).event_type == "compute.instance.exists"


@pytest.mark.parametrize("missing", [None, "", 7, "x" * 256])
def test_a_message_without_a_usable_id_gets_one_from_its_bytes(missing: object) -> None:
    first = envelope.open_body(v2(message_id=missing))
    assert first == envelope.open_body(v2(message_id=missing))
    assert not first.has_own_id
    other = envelope.open_body(v2(message_id=missing, priority="ERROR"))
    assert other.message_id != first.message_id


def test_a_nul_and_a_lone_surrogate_become_storable_text() -> None:
    opened = envelope.open_body(v2(publisher_id="a\x00b\ud800c", event_type="x\x00"))
    assert (opened.publisher_id, opened.event_type) == ("a\ufffdb?c", "x\ufffd")


def test_duplicate_keys_and_numbers_that_are_none_are_read() -> None:
    body = b'{"event_type":"a","event_type":"b","timestamp":"2026-05-08 16:03:44","payload":[NaN,-Infinity,%s]}'
    opened = envelope.open_body(body % (b"9" * 5000))
    assert (opened.event_type, opened.payload) == ("b", [None, None, None])


DEEP = b"[" * 100_000 + b"]" * 100_000
# a header that asks for a dictionary of 2 GiB
GREEDY = lzma.compress(v2(), format=lzma.FORMAT_ALONE)
GREEDY = GREEDY[:1] + struct.pack("<I", 1 << 31) + GREEDY[5:]


@pytest.mark.parametrize(
    ("body", "compression", "code"),
    [
        (b"x" * (envelope.MAX_BODY_BYTES + 1), None, "too_large"),
        (zlib.compress(b" " * (envelope.MAX_BODY_BYTES + 1)), "gzip", "too_large"),
        (bz2.compress(b" " * (envelope.MAX_BODY_BYTES + 1)), "bz2", "too_large"),
        (b"not compressed", "application/x-gzip", "bad_compression"),
        (zlib.compress(v2())[:-9], "application/x-gzip", "bad_compression"),
        (b"", "application/x-bz2", "bad_compression"),
        (GREEDY, "application/x-lzma", "bad_compression"),
        (v2(), "application/x-brotli", "bad_compression"),
        (b'{"event_type": "\xff"}', None, "not_utf8"),
        (b"", None, "not_json"),
        (b"{", None, "not_json"),
        (DEEP, None, "not_json"),
        (b'{"oslo.version":"2.0","oslo.message":"{"}', None, "not_json"),
        (
            json.dumps({"oslo.version": "2.0", "oslo.message": DEEP.decode()}).encode(),
            None,
            "not_json",
        ),
        (b"17", None, "bad_envelope"),
        (b"null", None, "bad_envelope"),
        (b'"text"', None, "bad_envelope"),
        (b"[]", None, "bad_envelope"),
        (b'{"oslo.version":"3.0","oslo.message":"{}"}', None, "bad_envelope"),
        (b'{"oslo.version":null,"oslo.message":"{}"}', None, "bad_envelope"),
        (b'{"oslo.version":"2.0","oslo.message":"7"}', None, "bad_envelope"),
        (b"{}", None, "bad_message"),
        (v1(event_type=None), None, "bad_message"),
        (v1(event_type="x" * 256), None, "bad_message"),
        (v1(timestamp=""), None, "bad_message"),
        (v1(timestamp="2014-05-3107: 19: 43.463101"), None, "bad_message"),
    ],
)
def test_what_is_no_notification_says_why(body: bytes, compression: str | None, code: str) -> None:
    with pytest.raises(envelope.UnreadableError) as caught:
        envelope.open_body(body, compression=compression)
    assert caught.value.code == f"usage.notification.{code}"


def opened_or_reason(
    body: bytes, compression: str | None = None
) -> envelope.Notification | envelope.UnreadableError:
    try:
        return envelope.open_body(body, compression=compression)
    except envelope.UnreadableError as exc:
        return exc


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_notification_or_unreadable(body: bytes) -> None:
    for compression in (None, "gzip", "bz2", "application/x-lzma"):
        opened = opened_or_reason(body, compression)
        assert isinstance(opened, envelope.UnreadableError) or opened.timestamp.tzinfo is UTC


@given(
    st.fixed_dictionaries({}, optional=dict.fromkeys(INNER, JSON))
    .map(lambda changes: INNER | changes)
    .flatmap(
        lambda inner: st.sampled_from(
            [
                json.dumps(inner),
                json.dumps({"oslo.version": "2.0", "oslo.message": json.dumps(inner)}),
            ]
        )
    )
)
def test_any_field_of_a_message_may_be_anything(text: str) -> None:
    opened = opened_or_reason(text.encode())
    if isinstance(opened, envelope.UnreadableError):
        assert opened.code == "usage.notification.bad_message"
    else:
        for name in (opened.message_id, opened.event_type, opened.publisher_id, opened.priority):
            assert "\x00" not in name
            assert len(name.encode("utf-8")) <= 4 * envelope.MAX_NAME_LENGTH
