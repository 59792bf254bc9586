"""What RFC 4287 section 4 and RFC 5005 section 4 demand of a feed document, for tests.

A hand-written check beside the schema of RFC 4287's appendix B (`tests/unit/atom.rng`): it knows
the rules that a schema cannot say, about base64, ids that repeat, authors and archives. Standard
library only; it shares nothing with `atom`, which writes the documents.
"""

import base64
import binascii
import json
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

ATOM: Final = "{http://www.w3.org/2005/Atom}"
HISTORY: Final = "{http://purl.org/syndication/history/1.0}"
_DATE: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)", re.ASCII)
_IRI: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:[^\s<>\"{}|\\^`]+")
_MEDIA: Final = re.compile(r"[\w.+-]+/[\w.+-]+", re.ASCII)
_ONCE: Final = {
    "feed": ({"id", "title", "updated"}, {"generator", "icon", "logo", "rights", "subtitle"}),
    "entry": (
        {"id", "title", "updated"},
        {"content", "published", "rights", "source", "summary"},
    ),
}
_OFTEN: Final = {"author", "category", "contributor", "link"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadEntry:
    """An entry as a reader sees it, its content decoded."""

    entry_id: str
    title: str
    updated: datetime
    published: datetime
    categories: tuple[str, ...]
    summary: str
    content: Any
    source: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadFeed:
    """A feed document as a reader sees it."""

    feed_id: str
    title: str
    updated: datetime
    is_archive: bool
    links: dict[str, str]
    entries: tuple[ReadEntry, ...]

    @property
    def ids(self) -> list[str]:
        """The ids of the entries, in their order."""
        return [entry.entry_id for entry in self.entries]


def faults(document: bytes, *, is_yagi: bool = False) -> list[str]:
    """What is wrong with a feed document; nothing where it is valid.

    With `is_yagi`, JSON content is plain text instead of base64, which RFC 4287 forbids and yagi did.
    """
    try:
        feed = ET.fromstring(document)  # noqa: S314  a document of our own
    except ET.ParseError as exc:
        return [f"not well-formed: {exc}"]
    if feed.tag != f"{ATOM}feed":
        return [f"the document is a {feed.tag}"]
    return [*_container(feed, "feed"), *_feed(feed, is_yagi=is_yagi)]


def read(document: bytes, *, is_yagi: bool = False) -> ReadFeed:
    """The document as a reader sees it.

    Raises:
        AssertionError: it is not valid.
    """
    found = faults(document, is_yagi=is_yagi)
    assert not found, found
    feed = ET.fromstring(document)  # noqa: S314  a document of our own
    return ReadFeed(
        feed_id=_text(feed, "id"),
        title=_text(feed, "title"),
        updated=datetime.fromisoformat(_text(feed, "updated")),
        is_archive=feed.find(f"{HISTORY}archive") is not None,
        links={link.get("rel", "alternate"): link.get("href", "") for link in _all(feed, "link")},
        entries=tuple(_read_entry(entry, is_yagi=is_yagi) for entry in _all(feed, "entry")),
    )


def _read_entry(entry: ET.Element, *, is_yagi: bool) -> ReadEntry:
    content = entry.find(f"{ATOM}content")
    body: Any = None
    if content is not None and content.text:
        body = json.loads(content.text if is_yagi else base64.b64decode(content.text))
    return ReadEntry(
        entry_id=_text(entry, "id"),
        title=_text(entry, "title"),
        updated=datetime.fromisoformat(_text(entry, "updated")),
        published=datetime.fromisoformat(_text(entry, "published")),
        categories=tuple(item.get("term", "") for item in _all(entry, "category")),
        summary=_text(entry, "summary"),
        content=body,
        source=content.get("src") if content is not None else None,
    )


def _all(parent: ET.Element, name: str) -> list[ET.Element]:
    return parent.findall(f"{ATOM}{name}")


def _text(parent: ET.Element, name: str) -> str:
    return parent.findtext(f"{ATOM}{name}") or ""


def _feed(feed: ET.Element, *, is_yagi: bool) -> Iterator[str]:
    entries = _all(feed, "entry")
    if not _all(feed, "author") and not all(_all(entry, "author") for entry in entries):
        yield "4.1.1: neither the feed nor every entry has an author"
    for number, entry in enumerate(entries):
        yield from (f"entry {number}: {fault}" for fault in _container(entry, "entry"))
        yield from (f"entry {number}: {fault}" for fault in _content(entry, is_yagi=is_yagi))
    versions = Counter((_text(entry, "id"), _text(entry, "updated")) for entry in entries)
    yield from (f"4.1.1: twice {key}" for key, count in versions.items() if count > 1)
    children = [child.tag for child in feed]
    if f"{ATOM}entry" in children:
        begin = children.index(f"{ATOM}entry")
        if any(tag != f"{ATOM}entry" for tag in children[begin:]):
            yield "4.1.1: an element follows the entries"
    relations = Counter(link.get("rel", "alternate") for link in _all(feed, "link"))
    for relation in ("self", "prev-archive", "next-archive", "current", "next", "previous"):
        if relations[relation] > 1:
            yield f"RFC 5005: more than one link {relation}"
    if not relations["self"]:
        yield "4.1.1: no link self"
    is_archive = feed.find(f"{HISTORY}archive") is not None
    if is_archive and not relations["current"]:
        yield "RFC 5005 4: an archive does not name its subscription document"
    if not is_archive and relations["next-archive"]:
        yield "RFC 5005 4: the subscription document has a next archive"


def _container(element: ET.Element, kind: str) -> Iterator[str]:
    needed, possible = _ONCE[kind]
    counts = Counter(child.tag for child in element)
    for tag, count in counts.items():
        name = tag.removeprefix(ATOM)
        if not tag.startswith("{"):
            yield f"element {tag} without a namespace"
        elif tag.startswith(ATOM) and name not in needed | possible | _OFTEN | {"entry"}:
            yield f"there is no element {name}"
        elif count > 1 and name in needed | possible:
            yield f"{count} elements {name}"
    yield from (f"no element {name}" for name in sorted(needed) if not counts[f"{ATOM}{name}"])
    if not _IRI.fullmatch(_text(element, "id")):
        yield f"4.2.6: id {_text(element, 'id')!r} is no absolute IRI"
    for name in ("updated", "published"):
        for date in _all(element, name):
            if not _is_date(date.text or ""):
                yield f"3.3: {name} {date.text!r} is no date of RFC 3339"
    for name in ("title", "summary", "subtitle", "rights"):
        for text in _all(element, name):
            if text.get("type", "text") not in ("text", "html", "xhtml"):
                yield f"3.1: {name} has a type {text.get('type')!r}"
            if len(text) and text.get("type") != "xhtml":
                yield f"3.1: {name} has elements in it"
    yield from _links(element)
    for category in _all(element, "category"):
        if "term" not in category.attrib:
            yield "4.2.2: a category without a term"
        if "scheme" in category.attrib and not _IRI.fullmatch(category.attrib["scheme"]):
            yield "4.2.2: a category's scheme is no IRI"
    for person in _all(element, "author") + _all(element, "contributor"):
        if len(_all(person, "name")) != 1 or len(_all(person, "uri")) > 1:
            yield "3.2: a person has one name and at most one uri"


def _links(element: ET.Element) -> Iterator[str]:
    alternates: Counter[tuple[str | None, str | None]] = Counter()
    for link in _all(element, "link"):
        if not _IRI.fullmatch(link.get("href", "")):
            yield f"4.2.7: href {link.get('href')!r} is no absolute IRI"
        if not re.fullmatch(r"[\w.-]+", link.get("rel", "alternate")):
            yield f"4.2.7.2: rel {link.get('rel')!r}"
        if "type" in link.attrib and not _MEDIA.fullmatch(link.attrib["type"]):
            yield f"4.2.7.3: type {link.attrib['type']!r}"
        if link.get("rel", "alternate") == "alternate":
            alternates[link.get("type"), link.get("hreflang")] += 1
    yield from (f"4.1.1: twice the alternate {key}" for key, n in alternates.items() if n > 1)


def _content(entry: ET.Element, *, is_yagi: bool) -> Iterator[str]:
    content = entry.find(f"{ATOM}content")
    has_summary = bool(_all(entry, "summary"))
    if content is None:
        if not any(link.get("rel", "alternate") == "alternate" for link in _all(entry, "link")):
            yield "4.1.2: neither content nor a link alternate"
        return
    media_type = content.get("type", "text")
    if "src" in content.attrib:
        if content.text or len(content):
            yield "4.1.3.2: content with src is not empty"
        if media_type in ("text", "html", "xhtml"):
            yield "4.1.3.2: the type of content with src is a media type"
        if not has_summary:
            yield "4.1.2: content with src needs a summary"
        return
    if media_type not in ("text", "html", "xhtml") and not _MEDIA.fullmatch(media_type):
        yield f"4.1.3.1: type {media_type!r}"
    is_text = media_type in ("text", "html") or media_type.startswith("text/")
    is_xml = media_type == "xhtml" or media_type.endswith(("+xml", "/xml"))
    if len(content) and not is_xml:
        yield "4.1.3.3: content has elements in it"
    if is_text or is_xml or is_yagi:
        return
    if not has_summary:
        yield "4.1.2: content in base64 needs a summary"
    try:
        base64.b64decode("".join((content.text or "").split()), validate=True)
    except binascii.Error:
        yield f"4.1.3.3: content of type {media_type} is not base64"


def _is_date(text: str) -> bool:
    if not _DATE.fullmatch(text):
        return False
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True
