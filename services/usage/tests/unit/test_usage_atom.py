"""Feed documents are valid whatever messages say, and pages of a feed never change."""

import base64
import json
import re
import xml.etree.ElementTree as ET
from collections import defaultdict
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from lxml import etree

from hostler_usage.feeds import atom
from hostler_usage.feeds.atom import Document, Entry, Link, entry_id, render
from hostler_usage.feeds.atom_testing import ATOM, faults, read
from hostler_usage.feeds.feed import (
    EVENT_TYPE_PATTERN,
    Feed,
    Item,
    Kind,
    Page,
    Shape,
    feed_at,
    feeds_of,
    paginate,
)

SCHEMA = etree.RelaxNG(etree.parse(str(Path(__file__).with_name("atom.rng"))))
NOON = datetime(2026, 5, 8, 12, tzinfo=UTC)
UUID = "6f3e7a51-37c5-4b0e-8a3c-2f9a1f0d5b11"
# every text that Python can hold: control characters and lone surrogates too
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=30)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=10,
)


def entry(**changes: Any) -> Entry:
    usual = Entry(
        entry_id=f"urn:uuid:{UUID}",
        title="compute.instance.create.end",
        summary="compute.instance.create.end of instance i1",
        published=NOON - timedelta(seconds=1),
        updated=NOON,
        categories=[("compute.instance.create.end", None), ("p1", "urn:hostler:usage:project")],
        link="http://usage.example/v1/events/1-ab",
        content={"event_type": "compute.instance.create.end", "payload": {"vcpus": 1}},
    )
    return replace(usual, **changes)


def document(**changes: Any) -> Document:
    usual = Document(
        feed_id="urn:uuid:00000000-0000-4000-8000-000000000001",
        title="Events",
        updated=NOON,
        links=[
            Link(rel="self", href="http://usage.example/feeds/all.atom"),
            Link(rel="hub", href="http://usage.example/hub"),
            Link(rel="prev-archive", href="http://usage.example/feeds/all.atom?archive=200"),
        ],
        entries=[entry()],
    )
    return replace(usual, **changes)


# --- documents


def is_in_the_schema(text: bytes) -> bool:
    """Whether a document is what RFC 4287's own schema (its appendix B) describes."""
    return bool(SCHEMA.validate(etree.fromstring(text)))


def test_documents_are_in_the_schema_of_the_rfc() -> None:
    source = "http://usage.example/v1/events/1-ab/body"
    for told in (
        document(),
        document(entries=[]),
        document(is_archive=True),
        document(entries=[entry(), entry(content=None, source=source)]),
        document(shape=Shape.YAGI),
    ):
        assert is_in_the_schema(render(told)), SCHEMA.error_log
    text = render(document()).decode()
    for broken in (
        text.replace("<updated>2", "<updated>x2"),
        text.replace("updated>", "modified>"),
        text.replace('href="http://usage.example/hub"', ""),
        text.replace("<title>", "<title>a</title><title>"),
        text.replace('type="application/json"', 'type="json"'),
    ):
        assert broken != text
        assert not is_in_the_schema(broken.encode())


def test_a_feed_is_read_as_it_was_meant() -> None:
    feed = read(render(document()))
    assert feed.feed_id == "urn:uuid:00000000-0000-4000-8000-000000000001"
    assert (feed.title, feed.updated, feed.is_archive) == ("Events", NOON, False)
    assert list(feed.links) == ["self", "hub", "prev-archive"]
    (found,) = feed.entries
    assert (found.entry_id, found.title) == (f"urn:uuid:{UUID}", "compute.instance.create.end")
    assert (found.updated, found.published) == (NOON, NOON - timedelta(seconds=1))
    assert found.categories == ("compute.instance.create.end", "p1")
    assert found.content == entry().content


def test_json_is_base64_with_a_summary_as_the_rfc_wants_and_plain_for_readers_of_yagi() -> None:
    (strict,) = ET.fromstring(render(document())).iter(f"{ATOM}content")
    (plain,) = ET.fromstring(render(document(shape=Shape.YAGI))).iter(f"{ATOM}content")
    assert strict.attrib == plain.attrib == {"type": "application/json"}
    assert json.loads(base64.b64decode(strict.text or "")) == entry().content
    assert json.loads(plain.text or "") == entry().content
    assert faults(render(document(shape=Shape.YAGI)), is_yagi=True) == []
    assert [fault for fault in faults(render(document(shape=Shape.YAGI))) if "base64" in fault]


def test_an_archive_says_that_it_is_one_and_names_the_current_feed() -> None:
    links = [
        Link(rel="self", href="http://usage.example/feeds/all.atom?archive=400"),
        Link(rel="current", href="http://usage.example/feeds/all.atom"),
        Link(rel="prev-archive", href="http://usage.example/feeds/all.atom?archive=200"),
        Link(rel="next-archive", href="http://usage.example/feeds/all.atom?archive=600"),
    ]
    feed = read(render(document(links=links, is_archive=True)))
    assert feed.is_archive
    assert feed.links["next-archive"] == "http://usage.example/feeds/all.atom?archive=600"


def test_content_that_is_too_large_is_named_by_its_address() -> None:
    source = "http://usage.example/v1/events/1-ab/body"
    (found,) = read(render(document(entries=[entry(content=None, source=source)]))).entries
    assert (found.content, found.source) == (None, source)


def test_a_feed_without_entries_is_valid() -> None:
    assert read(render(document(entries=[]))).entries == ()


@given(ANY_TEXT, ANY_TEXT, ANY_TEXT, st.dictionaries(ANY_TEXT, JSON, max_size=4))
@example(
    title='\r\n"<]]>\t', term="\x00\r\n\t", summary="\ud800\uffff", content={"\x08": "\udfff"}
)
def test_no_text_breaks_a_document(
    title: str, term: str, summary: str, content: dict[str, object]
) -> None:
    told = entry(title=title, summary=summary, categories=[(term, None)], content=content)
    assert is_in_the_schema(render(document(title=title, entries=[told])))
    feed = read(render(document(title=title, entries=[told])))
    (found,) = feed.entries
    assert found.content == content
    readable = re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", title)
    assert (feed.title, found.title) == (readable, readable)
    yagi = read(render(document(entries=[told], shape=Shape.YAGI)), is_yagi=True)
    assert yagi.entries[0].content == content


def test_moments_are_told_in_utc() -> None:
    east = timezone(timedelta(hours=5, minutes=30))
    assert atom.moment(datetime(2026, 1, 1, 3, tzinfo=east)) == "2025-12-31T21:30:00Z"
    assert atom.moment(NOON.replace(microsecond=120)) == "2026-05-08T12:00:00.000120Z"
    assert atom.moment(datetime(1, 1, 1, tzinfo=UTC)) == "0001-01-01T00:00:00Z"


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        (lambda text: text.replace("<updated>2", "<updated>x2"), "3.3"),
        (lambda text: re.sub("<author>.*?</author>", "", text, flags=re.DOTALL), "author"),
        (lambda text: text.replace("</entry>", "<id>urn:x:1</id></entry>"), "2 elements id"),
        (lambda text: re.sub("<summary>.*?</summary>", "", text), "needs a summary"),
        (lambda text: re.sub("(<content.*?>)[^<]*", r"\1{}", text), "not base64"),
        (lambda text: text.replace('rel="self"', 'rel="via"'), "no link self"),
        (lambda text: text.replace("</entry>", "<color>red</color></entry>"), "no element color"),
        (lambda text: text.replace('<category term="p1"', "<category"), "without a term"),
        (lambda text: re.sub("(<entry>.*</entry>)", r"\1\1", text, flags=re.DOTALL), "twice"),
        (lambda text: text.replace('href="http://usage.example/hub"', 'href="/hub"'), "4.2.7"),
        (lambda text: text.replace("<id>urn:uuid:6", "<id>6"), "4.2.6"),
        (lambda text: text[:-10], "not well-formed"),
    ],
)
def test_the_check_sees_what_is_wrong(broken: Any, fault: str) -> None:
    found = faults(broken(render(document()).decode()).encode())
    assert [text for text in found if fault in text], found


# --- ids


def test_an_entry_keeps_the_id_of_its_message() -> None:
    digest = b"\x01" * 32
    assert entry_id(UUID, digest, is_first=True) == f"urn:uuid:{UUID}"
    assert entry_id(UUID.upper(), digest, is_first=True) == f"urn:uuid:{UUID}"
    assert entry_id(UUID.replace("-", ""), digest, is_first=True) == f"urn:uuid:{UUID}"


def test_a_message_id_that_is_no_uuid_makes_one() -> None:
    ids = {entry_id(name, b"", is_first=True) for name in ("req-1", "req-2", "{" + UUID + "}", "")}
    assert len(ids) == 4
    assert all(re.fullmatch(r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", i) for i in ids)
    assert entry_id("req-1", b"a", is_first=True) == entry_id("req-1", b"b", is_first=True)


def test_two_bodies_under_one_id_are_two_entries() -> None:
    ids = {
        entry_id(UUID, b"a", is_first=True),
        entry_id(UUID, b"b", is_first=False),
        entry_id(UUID, b"c", is_first=False),
    }
    assert len(ids) == 3


# --- names


@given(st.sampled_from(Kind), st.sampled_from(Shape), st.text(min_size=1, max_size=20), st.data())
def test_a_feed_is_found_at_its_path(kind: Kind, shape: Shape, key: str, data: Any) -> None:
    key = key.replace("\x00", "x").encode("utf-8", "replace").decode()
    if kind in (Kind.PROJECT, Kind.RESOURCE):
        shape = Shape.ATOM
    feed = Feed(
        kind=kind,
        key="" if kind is Kind.ALL else key,
        resource_type=data.draw(st.sampled_from(["instance", "a/b"]))
        if kind is Kind.RESOURCE
        else "",
        shape=shape,
    )
    assert feed.path.isascii()
    assert feed_at(feed.path) == feed


@pytest.mark.parametrize(
    "path", ["", "/", "/feeds/all.atom/", "/feeds/projects/.atom", "/v1/events", "/feeds/types/a"]
)
def test_there_is_no_feed_elsewhere(path: str) -> None:
    assert feed_at(path) is None


def test_an_event_type_has_a_dot_and_is_no_file_that_browsers_ask_for() -> None:
    pattern = re.compile(EVENT_TYPE_PATTERN)
    assert pattern.fullmatch("compute.instance.exists")
    for name in ("favicon.ico", "robots.txt", "metrics", "feeds/all.atom", "healthz"):
        assert not pattern.fullmatch(name)


# --- pages


def make_items(spec: list[tuple[int, int | None]]) -> list[Item]:
    return [
        Item(
            seq=3 * number,
            event_time=NOON + timedelta(seconds=number % 7),
            event_type=f"type.{kind}",
            project_id=None if project is None else f"p{project}",
        )
        for number, (kind, project) in enumerate(spec, start=1)
    ]


SPECS = st.lists(
    st.tuples(st.integers(0, 2), st.none() | st.integers(0, 2)), min_size=1, max_size=60
)


def run(batches: list[list[Item]], size: int) -> dict[tuple[Kind, str, int], Page]:
    pages: dict[tuple[Kind, str, int], Page] = {}
    last: dict[tuple[Kind, str], Page] = {}
    for batch in batches:
        for page in paginate(last, batch, size):
            before = pages.get((page.kind, page.key, page.first_seq))
            assert before is None or not before.is_full, "a full page was changed"
            pages[page.kind, page.key, page.first_seq] = page
            last[page.kind, page.key] = page
    return pages


@given(SPECS, st.integers(1, 5), st.data())
def test_pages_do_not_depend_on_how_events_are_divided(
    spec: list[tuple[int, int | None]], size: int, data: Any
) -> None:
    items = make_items(spec)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(items)), max_size=6)) | {0, len(items)})
    parts = [items[start:end] for start, end in pairwise(cuts)]
    assert run(parts, size) == run([items], size)


@given(SPECS, st.integers(1, 5))
def test_every_event_is_in_one_page_of_each_of_its_feeds(
    spec: list[tuple[int, int | None]], size: int
) -> None:
    items = make_items(spec)
    expected: dict[tuple[Kind, str], list[Item]] = defaultdict(list)
    for item in items:
        for feed in feeds_of(item):
            expected[feed].append(item)
    pages = run([items], size)
    for (kind, key), events in expected.items():
        own = sorted(
            (p for p in pages.values() if (p.kind, p.key) == (kind, key)),
            key=lambda p: p.first_seq,
        )
        chunks = [events[at : at + size] for at in range(0, len(events), size)]
        assert [page.times for page in own] == [tuple(e.event_time for e in c) for c in chunks]
        assert [(page.first_seq, page.last_seq) for page in own] == [
            (c[0].seq, c[-1].seq) for c in chunks
        ]
        assert [page.is_full for page in own] == [len(chunk) == size for chunk in chunks]
        if kind is Kind.PROJECT:
            assert [set(page.types) for page in own] == [{e.event_type for e in c} for c in chunks]
