"""What is taken out of a connection's stream and what is left in it, whatever the pieces it comes in."""

import asyncio
import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from pamqp import frame
from pamqp.body import ContentBody
from pamqp.commands import Basic
from pamqp.header import ContentHeader
from pamqp.heartbeat import Heartbeat

from hostler_common.bus import decoding
from hostler_common.bus.delivery import delivered, replaying
from hostler_common.bus.stream import Incoming, Stream

TAKEN, OTHER = 1, 2
FRAME_MAX = 50
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=10)
EXCHANGES = st.text("aZ09-_.:", max_size=20)
TABLES = st.dictionaries(NAMES, st.integers(-(2**31), 2**31 - 1) | NAMES, max_size=3)
MOMENTS = st.integers(0, 2**32 - 1).map(lambda seconds: datetime.fromtimestamp(seconds, UTC))
PROPERTIES = st.builds(
    Basic.Properties,
    content_type=st.none() | NAMES,
    content_encoding=st.none() | NAMES,
    headers=st.none() | TABLES,
    delivery_mode=st.sampled_from([None, 1, 2]),
    priority=st.none() | st.integers(0, 255),
    correlation_id=st.none() | NAMES,
    reply_to=st.none() | NAMES,
    expiration=st.none() | NAMES,
    message_id=st.none() | NAMES,
    timestamp=st.none() | MOMENTS,
    message_type=st.none() | NAMES,
    user_id=st.none() | NAMES,
    app_id=st.none() | NAMES,
)
DELIVERS = st.builds(
    Basic.Deliver,
    consumer_tag=NAMES,
    delivery_tag=st.integers(1, 2**63 - 1),
    redelivered=st.booleans(),
    exchange=EXCHANGES,
    routing_key=NAMES,
)
BODIES = st.binary(max_size=3 * FRAME_MAX)


def content(channel: int, method: Any, properties: Basic.Properties, body: bytes) -> list[bytes]:
    """The frames of a message."""
    pieces = [body[at : at + FRAME_MAX] for at in range(0, len(body), FRAME_MAX)]
    parts = [method, ContentHeader(0, len(body), properties), *map(ContentBody, pieces)]
    return [frame.marshal(part, channel) for part in parts]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """Frames of one channel that follow each other, and the delivery that is to be taken, if they are one."""

    channel: int
    frames: list[bytes]
    incoming: Incoming | None = None


def delivery(
    channel: int, method: Basic.Deliver, properties: Basic.Properties, body: bytes
) -> Sent:
    """A delivery, which is to be taken on one of the channels only."""
    incoming = Incoming(
        tag=method.delivery_tag or 0,
        redelivered=method.redelivered,
        exchange=method.exchange,
        routing_key=method.routing_key or "",
        properties={
            "type" if name == "message_type" else name: value
            for name, value in properties
            if value is not None and value != ""
        },
        body=body,
    )
    return Sent(
        channel=channel,
        frames=content(channel, method, properties, body),
        incoming=incoming if channel == TAKEN else None,
    )


def fetched(channel: int, properties: Basic.Properties, body: bytes) -> Sent:
    """What `basic.get` answers."""
    method = Basic.GetOk(delivery_tag=1, exchange="", routing_key="", message_count=0)
    return Sent(channel=channel, frames=content(channel, method, properties, body))


def answer(channel: int) -> Sent:
    """A method without a content."""
    return Sent(channel=channel, frames=[frame.marshal(Basic.CancelOk(consumer_tag="c"), channel)])


HEARTBEAT = Sent(channel=0, frames=[frame.marshal(Heartbeat(), 0)])
CHANNELS = st.sampled_from([TAKEN, OTHER])
SENT = st.one_of(
    st.builds(delivery, CHANNELS, DELIVERS, PROPERTIES, BODIES),
    st.builds(fetched, CHANNELS, PROPERTIES, BODIES),
    st.builds(answer, CHANNELS),
    st.just(HEARTBEAT),
)


def interleaved(sent: Sequence[Sent], picks: Sequence[int]) -> list[bytes]:
    """The frames of all, in their order within each channel, otherwise as the picks have it."""
    waiting = [
        [part for one in sent if one.channel == channel for part in one.frames]
        for channel in (0, TAKEN, OTHER)
    ]
    found = []
    for pick in itertools.cycle(picks):
        left = [frames for frames in waiting if frames]
        if not left:
            break
        found.append(left[pick % len(left)].pop(0))
    return found


async def read(data: bytes, cuts: Sequence[int]) -> tuple[list[Incoming], bytes]:
    """The deliveries taken out of the data when it comes cut into pieces, and what is left of it."""
    taken: list[Incoming] = []
    reader = asyncio.StreamReader()
    stream = Stream(reader)
    stream.take_deliveries(TAKEN, taken.append)
    ends = sorted({*(cut % (len(data) + 1) for cut in cuts), len(data)} - {0})
    for start, end in itertools.pairwise([0, *ends]):
        stream.data_received(data[start:end])
    stream.eof_received()
    return taken, await reader.read()


def frames_of(data: bytes) -> list[bytes]:
    """The frames that the data consists of."""
    found = []
    while data:
        size, _, _ = frame.unmarshal(data)
        found.append(data[:size])
        data = data[size:]
    return found


CUTS = st.lists(st.integers(0, 2**16), max_size=8)


@given(st.lists(SENT, max_size=4), CUTS, st.lists(st.integers(0, 2), min_size=1, max_size=50))
async def test_every_delivery_is_taken_once_and_every_other_frame_is_left_in_its_order(
    sent: list[Sent], cuts: list[int], picks: list[int]
) -> None:
    taken, left = await read(b"".join(interleaved(sent, picks)), cuts)
    assert taken == [one.incoming for one in sent if one.incoming is not None]
    for channel in (TAKEN, OTHER):
        assert [one for one in frames_of(left) if one[1:3] == channel.to_bytes(2, "big")] == [
            part
            for one in sent
            if one.channel == channel and one.incoming is None
            for part in one.frames
        ]


async def test_aiormq_hears_of_a_broker_that_sends_nothing_but_deliveries() -> None:
    method = Basic.Deliver(consumer_tag="c", delivery_tag=1, exchange="", routing_key="q")
    taken, left = await read(b"".join(content(TAKEN, method, Basic.Properties(), b"body")), [])
    assert len(taken) == 1
    assert frames_of(left) == HEARTBEAT.frames


@given(st.binary(max_size=100), CUTS)
@example(b"AMQP\x00\x00\x09\x01", [])
async def test_what_is_no_amqp_is_left_as_it_came(data: bytes, cuts: list[int]) -> None:
    assume(b"\xce" not in data)  # what ends a frame
    assert await read(data, cuts) == ([], data)


@given(st.lists(st.builds(delivery, st.just(TAKEN), DELIVERS, PROPERTIES, BODIES), max_size=3))
async def test_a_delivery_that_is_cut_off_is_not_taken(sent: list[Sent]) -> None:
    whole = b"".join(part for one in sent for part in one.frames)
    taken, left = await read(whole + answer(TAKEN).frames[0][:-1], [])
    assert len(taken) == len(sent)
    assert left.endswith(answer(TAKEN).frames[0][:-1])
    for one in sent:
        assert (await read(b"".join(one.frames)[:-1], []))[0] == []


@given(PROPERTIES)
def test_properties_are_read_as_pamqp_reads_them(given_ones: Basic.Properties) -> None:
    header = ContentHeader()
    written = ContentHeader(0, 0, given_ones).marshal()
    header.unmarshal(written)
    assert decoding.properties(written[12:]) == {
        "type" if name == "message_type" else name: value
        for name, value in header.properties
        if value is not None and value != ""
    }


@given(st.binary(max_size=60))
def test_no_properties_end_the_connection(value: bytes) -> None:
    decoding.properties(value)


def field_table(fields: dict[str, bytes]) -> bytes:
    content = b"".join(
        bytes([len(name.encode())]) + name.encode() + value for name, value in fields.items()
    )
    return struct.pack(">I", len(content)) + content


KEYS = st.text(st.characters(codec="utf-8"), max_size=5)
SIZES = dict(zip("btBsuIilLfdDTV?", (1, 1, 1, 2, 2, 4, 4, 8, 8, 4, 8, 5, 8, 0, 3), strict=True))


@st.composite
def scalars(draw: st.DrawFn) -> bytes:
    """A value of any kind that is neither a table nor an array, its letter before it."""
    letter = draw(st.sampled_from([*SIZES, "S", "x"]))
    if letter in SIZES:
        return letter.encode() + draw(st.binary(min_size=SIZES[letter], max_size=SIZES[letter]))
    text = draw(st.binary(max_size=9))
    return letter.encode() + struct.pack(">I", len(text)) + text


VALUES = st.recursive(
    scalars(),
    lambda inner: st.one_of(
        st.dictionaries(KEYS, inner, max_size=3).map(lambda fields: b"F" + field_table(fields)),
        st.lists(inner, max_size=3)
        .map(b"".join)
        .map(lambda content: b"A" + struct.pack(">I", len(content)) + content),
    ),
)


@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_what_headers_were_read_can_be_written_again_and_are_then_the_same(
    fields: dict[str, bytes],
) -> None:
    value = decoding.properties((1 << 13).to_bytes(2, "big") + field_table(fields))
    one = delivered("q", Incoming(1, False, "nova", "key", value, b"body"))
    message = replaying(one, routing_key="q")
    written = Basic.Properties(headers=dict(message.headers)).marshal()
    again = delivered("q", Incoming(1, False, "", "q", decoding.properties(written), b"body"))
    assert (again.exchange, again.routing_key) == (one.exchange, one.routing_key)
    assert comparable(again.headers) == comparable(one.headers)


def comparable(value: Any) -> str:
    """A table without what is not told apart: an order, kinds of bytes, parts of seconds, zeros after a point."""
    match value:
        case dict():
            return str({name: comparable(value[name]) for name in sorted(value)})
        case list():
            return str([comparable(item) for item in value])
        case bytes() | bytearray():
            return str(bytes(value))
        case datetime():
            return str(int(value.timestamp()))
        case Decimal():
            return str(value.normalize())
    return repr(value)


@pytest.mark.parametrize("levels", [31, 32, 33, 900, 5000])
@pytest.mark.parametrize("letter", [b"F", b"A"])
def test_no_deeper_headers_are_read_than_can_be_kept(levels: int, letter: bytes) -> None:
    value = struct.pack(">I", 0)
    for _ in range(levels - 1):
        content = (b"\1k" if letter == b"F" else b"") + letter + value
        value = struct.pack(">I", len(content)) + content
    table = field_table({"deep": letter + value})
    size, found = decoding.table(table)
    assert size == len(table)
    assert (set(found) == {decoding.UNDECODABLE}) == (levels >= decoding.MAX_DEPTH)


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("is_array", [True, False])
def test_no_more_values_are_read_than_are_meant(is_array: bool, more: int) -> None:
    number = decoding.MAX_VALUES + more
    if is_array:
        items = b"V" * (number - 1)
        table = field_table({"all": b"A" + struct.pack(">I", len(items)) + items})
    else:
        table = field_table({str(key): b"t\1" for key in range(number)})
    size, found = decoding.table(table)
    assert size == len(table)
    if more:
        assert found == {decoding.UNDECODABLE: table[4:]}
    elif is_array:
        assert found == {"all": [None] * (number - 1)}
    else:
        assert found == {str(key): True for key in range(number)}


class Measured(bytes):
    """Bytes that know how many of them were copied."""

    copied = 0

    def __getitem__(self, part: Any) -> Any:
        found = super().__getitem__(part)
        self.copied += len(found) if isinstance(part, slice) else 0
        return found


@pytest.mark.parametrize("kind", ["strings", "voids", "nested"])
def test_a_table_is_read_without_being_copied_again_for_each_of_its_values(kind: str) -> None:
    values = {
        "strings": b"S" + struct.pack(">I", 20) + b"x" * 20,
        "voids": b"V",
        "nested": b"F" + field_table({"k": b"b\1"}),
    }
    table = Measured(field_table({str(key): values[kind] for key in range(2000)}))
    _, found = decoding.table(table)
    assert len(found) == 2000
    assert table.copied <= len(table)


@pytest.mark.parametrize(
    ("last", "next_key"),
    [
        (b"?", "compression"),
        # cut off: the byte behind it, the length of the next key, would be a letter
        *((b"", "k" * letter) for letter in b"\0V"),
    ],
)
def test_a_table_that_cannot_be_read_does_not_spoil_the_one_it_is_in(
    last: bytes, next_key: str
) -> None:
    inner = field_table({"k": last})
    found = decoding.table(field_table({"bad": b"F" + inner, next_key: b"S\0\0\0\4gzip"}))[1]
    assert found == {"bad": {decoding.UNDECODABLE: inner[4:]}, next_key: "gzip"}


def test_headers_as_large_as_a_frame_are_left_out_when_published_again() -> None:
    headers = {"large": "x" * 40_000, "compression": "gzip", "half": "y" * 20_000}
    delivery = delivered("q", Incoming(1, False, "nova", "key", {"headers": headers}, b""))
    again = replaying(delivery, routing_key="q").headers
    assert set(again) == {
        *("compression", "half", "x-dropped-headers", "x-origin-exchange", "x-origin-routing-key")
    }
