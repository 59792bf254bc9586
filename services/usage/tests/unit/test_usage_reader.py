"""How values are got at, whatever stands in their place; and that nothing in a payload can stop the reading."""

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hostler_usage.reading import mapping_file
from hostler_usage.reading.envelope import Notification
from hostler_usage.reading.mapping import Reading
from hostler_usage.reading.normalise import Normaliser
from hostler_usage.reading.reader import MAX_ROWS, MAX_TEXT, Problems, Reader, Row
from hostler_usage.reading.statement import CounterReading, decode, encode

AT = datetime(2026, 5, 8, tzinfo=UTC)
THING = """
resources:
  thing:
    attributes: {a: {nullable: true}, n: {kind: whole}}
    edges: {launch: [made]}
    bodies: {one: {events: thing., id: id, %s}}
"""


def rows(body: str, payload: object) -> tuple[list[Row], Problems]:
    thing = mapping_file.read(THING % body).resources["thing"]
    problems: Problems = []
    return Reader(thing, thing.bodies["one"]).read(payload, problems), problems


def value(source: str, payload: dict[str, object], name: str = "a") -> Any:
    """What an attribute is read as; "unsaid" where the body does not speak of it."""
    (row,), _ = rows(f"attributes: {{{name}: {source}}}", payload)
    return dict(row.attributes).get(name, "unsaid")


@pytest.mark.parametrize(
    ("source", "payload", "expected"),
    [
        ("x", {"x": "y"}, "y"),
        ("x", {"x": 7}, "7"),
        ("x", {"x": None}, None),
        ("x", {"x": ""}, None),
        ("x", {"x": "None"}, None),  # str(None), as old services send it
        ("x", {}, "unsaid"),
        ("x", {"x": True}, "unsaid"),
        ("x", {"x": ["y"]}, "unsaid"),
        ("x", {"x": "y" * (MAX_TEXT + 1)}, "unsaid"),
        ("x", {"x": "a\x00b\ud800"}, "a\ufffdb?"),
        ("x/y", {"x": {"y": "z"}}, "z"),
        ("x/y", {"x": "y"}, "unsaid"),
        ("x/y", {"x": {"y": None}}, None),
        ("/x", {"x": "y"}, "y"),
        ("[x, y]", {"y": "z"}, "z"),
        ("[x, y]", {"x": "", "y": "z"}, "z"),
        ("[x, y]", {"x": None}, None),
        ("[x, y]", {}, "unsaid"),
        ("{last_segment: x}", {"x": "http://h:9292/images/155d"}, "155d"),
        ("{last_segment: x}", {"x": "155d"}, "155d"),
        ("{last_segment: x}", {"x": "http://h/images/"}, None),
        ("{last_segment: x}", {"x": 155}, None),
        ("{join: x, of: [s, t]}", {"x": [{"t": "b"}, {"s": "a", "t": "c"}, {"s": "b"}]}, "a,b"),
        ("{join: x, of: s, unless: d}", {"x": [{"s": "a", "d": "now"}, {"s": "b"}]}, "b"),
        ("{join: x, of: s}", {"x": []}, None),
        ("{join: x, of: s}", {"x": [7, None, {"s": 7}]}, None),
        ("{present: x, then: yes it is, else: nay}", {"x": "y"}, "yes it is"),
        ("{present: x, then: yes it is, else: not so}", {"x": None}, "not so"),
        ("{present: [x, y], then: t, else: e}", {"x": "", "y": 7}, "t"),
        ("{item: [x, k]}", {"x": {"k": "v"}}, "v"),
        ("{item: [x, k]}", {"x": [{"key": "j", "value": 1}, {"key": "k", "value": "v"}]}, "v"),
        ("{item: [x, k]}", {"x": [None, "k", {"k": "v"}]}, None),
        ("{item: [x, k]}", {"x": "{'k': 'v'}"}, None),  # a snapshot's metadata is a str()
        ("{constant: leased}", {}, "leased"),
        ("{constant: null}", {"x": 1}, None),
    ],
)
def test_a_text_is_got_at_as_the_mapping_says(
    source: str, payload: dict[str, object], expected: object
) -> None:
    assert value(source, payload) == expected


@pytest.mark.parametrize(
    ("source", "payload", "expected"),
    [
        ("x", {"x": 20}, 20),
        ("x", {"x": "20"}, 20),  # image_meta's numbers are text
        ("x", {"x": 20.0}, 20),
        ("x", {"x": 0}, 0),
        ("x", {"x": ""}, "unsaid"),  # progress
        ("x", {"x": None}, "unsaid"),
        ("x", {"x": "\u0662"}, "unsaid"),  # a digit, but not ours
        ("x", {"x": 2**53}, "unsaid"),
        ("x", {"x": True}, "unsaid"),
        ("{sum: [x, y]}", {"x": 20, "y": 5}, 25),
        ("{sum: [x, y]}", {"x": 20}, 20),
        ("{sum: [x, y]}", {"y": 5}, "unsaid"),
        ("[{sum: [x, y]}, z]", {"z": 25}, 25),
        ("{count: x}", {"x": [1, 2]}, 2),
        ("{count: x}", {"x": []}, 0),
        ("{count: x}", {"x": {}}, "unsaid"),
        ("{constant: 1}", {}, 1),
    ],
)
def test_a_whole_number_is_got_at_as_the_mapping_says(
    source: str, payload: dict[str, object], expected: object
) -> None:
    assert value(source, payload, "n") == expected


def test_what_is_there_and_cannot_be_read_is_named_once_for_each_field() -> None:
    _, problems = rows(
        "attributes: {a: x, n: y}, born: [b, c], at: t",
        {"id": "i", "x": {}, "y": "many", "b": "yesterday", "c": "3026-01-01 00:00:00", "t": []},
    )
    assert sorted(problems) == [
        "absurd_time:c",
        "bad_number:n",
        "bad_text:a",
        "bad_time:b",
        "bad_time:t",
    ]


@pytest.mark.parametrize(
    ("payload", "ids"),
    [
        ({"rows": [{"id": "1"}, {"id": "2"}]}, ["1", "2"]),
        ({"rows": [None, 7, {"id": "2"}]}, ["2"]),
        ({"row": {"id": "1"}}, ["1"]),
        ({"id": "1"}, ["1"]),
        ({"rows": []}, []),
        ({"rows": "text", "id": "1"}, ["1"]),
        ("text", [None]),
        (None, [None]),
        ([], [None]),
    ],
)
def test_a_body_speaks_of_its_rows_or_of_one_resource(payload: object, ids: list[object]) -> None:
    found, _ = rows("rows: [rows, row]", payload)
    assert [row.resource_id for row in found] == ids


def test_rows_beyond_reason_are_cut_and_named() -> None:
    found, problems = rows("rows: rows", {"rows": [{"id": str(n)} for n in range(MAX_ROWS + 1)]})
    assert (len(found), problems) == (MAX_ROWS, ["too_many_rows"])


def test_a_body_under_another_is_read_with_and_without_it() -> None:
    body = "under: data/inner, born: /b"
    for payload in (
        {"data": {"inner": {"id": "1", "b": "2026-05-08 00:00:00"}}},
        {"id": "1", "b": "2026-05-08 00:00:00"},
    ):
        (row,), _ = rows(body, payload)
        assert (row.resource_id, row.born_at) == ("1", AT)


COUNTER = "counters: {c: {reading: period, each: band, value: in%s}}"


def counted(body: str, payload: dict[str, object]) -> dict[str, int]:
    (row,), _ = rows(body, payload)
    assert all(item.reading is Reading.PERIOD for item in row.readings)
    return {item.label: item.value for item in row.readings}


@pytest.mark.parametrize(
    ("band", "expected"),
    [
        ({"public": {"in": 7}, "private": {"in": 0}}, {"public": 7, "private": 0}),
        ({"net-name-not-found-fa:16:3e:4c": {"in": 7}}, {"net-name-not-found-fa:16:3e:4c": 7}),
        ({}, {}),
        (None, {}),
        ("text", {}),
        ([{"in": 7}], {"": 7}),
        ({"public": None, "x": {"in": None}, "y": {}}, {}),
        ({"public": {"in": "7"}}, {"public": 7}),
        ({"public": {"in": -7}, "x": {"in": 2**53}, "y": {"in": 0.5}}, {}),
    ],
)
def test_counters_by_name_are_read_from_whatever_is_there(
    band: object, expected: dict[str, int]
) -> None:
    assert counted(COUNTER % "", {"band": band}) == expected
    assert counted(COUNTER % "", {}) == {}


def test_counters_of_a_list_are_labelled_by_a_field_of_their_rows() -> None:
    band = [{"inner": {"in": 7, "name": "public"}}, {"inner": {"in": 8, "name": None}}, {"in": 9}]
    body = COUNTER % ", inside: inner, label: name"
    assert counted(body, {"band": band}) == {"public": 7, "": 8}


def test_a_number_that_no_counter_can_have_is_named() -> None:
    _, problems = rows(COUNTER % "", {"band": {"p": {"in": -1}}})
    assert problems == ["bad_number:c"]


def test_a_run_is_told_by_what_the_mapping_says() -> None:
    body = "counters: {c: {reading: cumulative, value: n, run: [r/boot, r/domain]}}"
    (row,), _ = rows(body, {"n": 1, "r": {"boot": "b", "domain": 7}})
    # what only some samples can tell is no part of the name
    (other,), _ = rows(body, {"n": 1, "r": {"ticks": 99, "domain": 7, "boot": "b"}})
    (third,), _ = rows(body, {"n": 1, "r": {"boot": "b", "domain": 8}})
    assert row.readings == other.readings
    assert row.readings[0].run != third.readings[0].run
    (row,), _ = rows(body, {"n": 1})
    assert row.readings == (CounterReading(name="c", reading=Reading.CUMULATIVE, value=1),)


# --- nothing stops the reading

TEXT = st.text() | st.text(st.characters(categories=["Cs", "Cc"]), max_size=3)
SCALAR = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | TEXT
    | st.sampled_from(["", "None", "2026-05-08 00:00:00", "active", "http://x/y", "9" * 30])
)
REAL = mapping_file.packaged()
KEYS = [
    *("nova_object.data", "instance_id", "uuid", "volume_id", "id", "image_id", "label_id"),
    *("images", "samples", "disks", "interfaces", "run", "boot_id", "device", "networks"),
    *("floatingip", "floatingips", "network", "target", "resource_info", "exception", "args"),
    *("kwargs", "instance", "bandwidth", "bw_in", "bytes", "bytes_sent", "cpu_time_ns"),
    *("read_bytes", "reads", "metadata", "key", "value", "volume_attachment", "message"),
    *("instance_uuid", "detach_time", "launched_at", "status", "state", "size", "owner"),
    *("audit_period_beginning", "audit_period_ending", "tenant_id"),
]
JSON = st.recursive(
    SCALAR,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(KEYS) | TEXT, inner, max_size=8)
    ),
    max_leaves=30,
)
EVENT_TYPES = sorted(
    {
        body.events + action if body.events.endswith(".") else body.events
        for resource in REAL.resources.values()
        for body in resource.bodies.values()
        for action in resource.edges
    }
    | {action for resource in REAL.resources.values() for action in resource.failures}
)
RUN = {"boot_id": "\ud800\x00", "\ud800": 7}
IDENTIFIED = st.sampled_from(
    [
        {"instance_id": "i"},
        {"volume_id": "v"},
        {"id": "x"},
        {"samples": [{"instance_id": "i", "cpu_time_ns": 1, "run": RUN}]},
        {"resource_info": "p"},
        {"label_id": "l"},
    ]
)


@example("usage.sampled", {"samples": [{"instance_id": "i", "cpu_time_ns": 1, "run": RUN}]})
@given(
    st.sampled_from(EVENT_TYPES),
    JSON | st.builds(lambda a, b: b | a if isinstance(b, dict) else a, IDENTIFIED, JSON),
)
def test_whatever_is_read_can_be_written_down_and_read_again(
    event_type: str, payload: object
) -> None:
    item = Notification(
        message_id="m",
        has_own_id=True,
        event_type=event_type,
        publisher_id="",
        priority="INFO",
        timestamp=AT,
        payload=payload,
        context_project_id=None,
        request_id="req-1",
        digest=b"d",
    )
    for said in Normaliser(REAL).read(item, region="r1").said:
        assert "\x00" not in said.resource.resource_id
        if said.statement is not None:
            text = encode(said.statement)
            text.encode("utf-8")
            assert decode(text) == said.statement
