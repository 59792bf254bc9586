"""Only an answer as `blobs` gives them is understood; anything else is refused, and quickly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler_precache.transfer import response_head
from hostler_precache.transfer.manifest import Span
from hostler_precache.transfer.response_head import Head, HeadError

PIECE = [
    b"HTTP/1.1 206 Partial Content",
    b"Content-Type: application/octet-stream",
    b'ETag: "00ff"',
    b"Content-Range: bytes 262144-524287/1000000",
    b"Content-Length: 262144",
]


def lines(*more: bytes, without: bytes = b"\0") -> bytes:
    return b"\r\n".join([line for line in PIECE if not line.startswith(without)] + list(more))


def test_a_piece_is_understood() -> None:
    assert response_head.parse(lines()) == Head(
        status=206,
        length_bytes=262144,
        span=Span(start=262144, stop=524288),
        total_bytes=1000000,
    )


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"HTTP/1.1 204 No Content", Head(status=204, length_bytes=0)),
        (b"HTTP/1.1 204\r\ncontent-length:0", Head(status=204, length_bytes=0)),
        (
            b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 0\r\nContent-Length: 12",
            Head(status=429, length_bytes=12, retry_after_seconds=0),
        ),
        (
            b"HTTP/1.1 404 Not Found\r\nContent-Length:5\t\r\nConnection: close",
            Head(status=404, length_bytes=5, keeps_alive=False),
        ),
        (
            b"HTTP/1.1 416 x\r\nContent-Range: bytes */9\r\nContent-Length: 0",
            Head(status=416, length_bytes=0),
        ),
        (
            b"HTTP/1.1 206 x\r\nContent-Range: bytes 0-1/*\r\nContent-Length: 2",
            Head(status=206, length_bytes=2, span=Span(start=0, stop=2)),
        ),
    ],
)
def test_a_refusal_or_an_end_is_understood(head: bytes, expected: Head) -> None:
    assert response_head.parse(head) == expected


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (b"", "final answer"),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 1", "final answer"),
        (b"HTTP/2 200\r\nContent-Length: 1", "final answer"),
        (b"HTTP/1.1 100 Continue", "final answer"),
        (b"HTTP/1.1 103 Early Hints\r\nLink: x", "final answer"),
        (b"HTTP/1.1 2000 OK\r\nContent-Length: 1", "final answer"),
        (b"HTTP/1.1 206 a\nb\r\nContent-Length: 1", "final answer"),
        ("HTTP/1.1 \u0662\u0660\u0660 OK".encode(), "final answer"),
        (lines(without=b"Content-Length"), "no Content-Length"),
        (lines(b"Content-Length: 262144"), "twice"),
        (lines(b"Content-Length: 1, 2", without=b"Content-Length"), "malformed Content-Length"),
        (lines(b"Content-Length: +1", without=b"Content-Length"), "malformed Content-Length"),
        (lines(b"Content-Length: -1", without=b"Content-Length"), "malformed Content-Length"),
        (lines(b"Content-Length: 0x10", without=b"Content-Length"), "malformed Content-Length"),
        (lines(b"Content-Length: " + b"9" * 16, without=b"Content-Length"), "malformed"),
        (lines(b"Content-Length:", without=b"Content-Length"), "malformed Content-Length"),
        (lines(b"Content-Range: bytes 0-1/2"), "twice"),
        (lines(b"Transfer-Encoding: chunked"), "Transfer-Encoding"),
        (lines(b"Transfer-Encoding: chunked", without=b"Content-Length"), "Transfer-Encoding"),
        (lines(b"Content-Encoding: gzip"), "Content-Encoding"),
        (lines(b"Content-Encoding: deflate, gzip"), "Content-Encoding"),
        (lines(b" folded: line"), "malformed header field"),
        (lines(b"no colon"), "malformed header field"),
        (lines(b"space before : colon"), "malformed header field"),
        (lines(b": no name"), "malformed header field"),
        (lines(b"nul: \0"), "malformed header field"),
        (lines(b"return: a\rb"), "malformed header field"),
        (lines(b"feed: a\nContent-Length: 1"), "malformed header field"),
        (lines(*[b"x: y"] * response_head.MAX_FIELDS), "too many"),
        (b"HTTP/1.1 204 No Content\r\nContent-Length: 3", "where none may be"),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(head: bytes, reason: str) -> None:
    with pytest.raises(HeadError, match=reason):
        response_head.parse(head)


@pytest.mark.parametrize(
    "text", ["bytes 0-1", "items 0-1/2", "bytes 1-0x/2", "bytes \u00b2-3/9", "bytes 0-1/2, 3-4/5"]
)
def test_a_range_that_is_none_is_no_range(text: str) -> None:
    head = f"HTTP/1.1 206 x\r\nContent-Range: {text}\r\nContent-Length: 2".encode("latin-1")
    assert response_head.parse(head).span is None


@given(
    st.one_of(
        st.binary(max_size=300),
        st.lists(st.sampled_from([*PIECE, b" ", b"\r", b"\0"])).map(b"\r\n".join),
    )
)
def test_any_bytes_are_a_head_or_are_refused(head: bytes) -> None:
    try:
        found = response_head.parse(head)
    except HeadError:
        return
    assert 200 <= found.status <= 599
    assert found.length_bytes >= 0


@pytest.mark.parametrize("unit", [b" ", b"a", b"\t", b"::", b"\x80"])
def test_a_long_line_costs_no_more_than_its_length(unit: bytes) -> None:
    # a pattern that tries again from every place would take minutes for this
    head = lines(b"x:" + unit * (response_head.MAX_HEAD_BYTES * 64 // len(unit)) + b"\0")
    with pytest.raises(HeadError):
        response_head.parse(head)
