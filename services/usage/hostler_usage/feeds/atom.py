"""Atom documents: entries and feeds as bytes, valid to RFC 4287 and RFC 5005.

What an entry carries is JSON. RFC 4287 section 4.1.3.3 wants content of such a type in base64, and
section 4.1.2 then wants a summary beside it: so it is written. The predecessor yagi wrote the JSON
as plain text under the same type, and its readers take it so: that is the other `Shape`.

Whatever a message says, the document is well-formed: characters that XML 1.0 cannot hold become
U+FFFD, carriage returns are escaped so that they arrive.
"""

import base64
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from hostler_usage.feeds.feed import Shape

MEDIA_TYPE: Final = "application/atom+xml"
CONTENT_TYPE: Final = "application/json"
AUTHOR: Final = "hostler usage"
MAX_CONTENT_BYTES: Final = 64 * 1024
_ENTRIES: Final = uuid.UUID("2b0f6c8e-51d3-4a4e-9c57-6f1d0f6a7e21")
_UUID: Final = re.compile(
    r"[0-9a-f]{8}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{12}", re.IGNORECASE | re.ASCII
)
_NOT_XML: Final = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_ESCAPES: Final = {
    ord("&"): "&amp;",
    ord("<"): "&lt;",
    ord(">"): "&gt;",
    ord('"'): "&quot;",
    ord("\r"): "&#13;",
    # in an attribute, a reader makes spaces of these unless they are escaped
    ord("\t"): "&#9;",
    ord("\n"): "&#10;",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A link of a feed or an entry; `href` is an absolute address."""

    rel: str
    href: str
    media_type: str = MEDIA_TYPE


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An event as an entry. Its content is `content`, or lies at `source` where it is too large."""

    entry_id: str
    title: str
    summary: str
    published: datetime
    updated: datetime
    categories: Sequence[tuple[str, str | None]]
    link: str
    content: Mapping[str, object] | None
    source: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A feed document: the current one of a feed, or with `is_archive` one that will not change."""

    feed_id: str
    title: str
    updated: datetime
    links: Sequence[Link]
    entries: Sequence[Entry]
    shape: Shape = Shape.ATOM
    is_archive: bool = False


def entry_id(message_id: str, digest: bytes, *, is_first: bool) -> str:
    """The id of the entry of a message, for ever.

    It is the message's own id where that is a UUID, as in yagi's feeds; else a UUID made of it. Of
    messages under one id, only the first has it; another's id is made of the id and its body's
    sha256.
    """
    if not is_first:
        return uuid.uuid5(_ENTRIES, f"{message_id} {digest.hex()}").urn
    if _UUID.fullmatch(message_id):
        return uuid.UUID(message_id).urn
    return uuid.uuid5(_ENTRIES, message_id).urn


def moment(value: datetime) -> str:
    """A moment in UTC as RFC 3339 spells it."""
    return value.astimezone(UTC).isoformat().removesuffix("+00:00") + "Z"


def as_json(content: Mapping[str, object]) -> bytes:
    """Content as bytes that are ASCII, so that any text in it survives, lone surrogates too."""
    return json.dumps(content, separators=(",", ":")).encode("ascii")


def render(document: Document) -> bytes:
    """The document in UTF-8."""
    parts = [
        '<?xml version="1.0" encoding="utf-8"?>\n<feed xmlns="http://www.w3.org/2005/Atom"'
        ' xmlns:fh="http://purl.org/syndication/history/1.0">\n',
        _element("id", document.feed_id),
        _element("title", document.title),
        _element("updated", moment(document.updated)),
        f"<author>{_element('name', AUTHOR)}</author>\n",
        _element("generator", AUTHOR),
        "<fh:archive/>\n" if document.is_archive else "",
        *(_link(link) for link in document.links),
        *(_entry(entry, document.shape) for entry in document.entries),
        "</feed>\n",
    ]
    return "".join(parts).encode()


def _entry(entry: Entry, shape: Shape) -> str:
    categories = "".join(
        f'<category term="{_escaped(term)}"'
        + (f' scheme="{_escaped(scheme)}"/>\n' if scheme else "/>\n")
        for term, scheme in entry.categories
    )
    return (
        "<entry>\n"
        + _element("id", entry.entry_id)
        + _element("title", entry.title)
        + _element("updated", moment(entry.updated))
        + _element("published", moment(entry.published))
        + _link(Link(rel="alternate", href=entry.link, media_type=CONTENT_TYPE))
        + categories
        + _element("summary", entry.summary)
        + _content(entry, shape)
        + "</entry>\n"
    )


def _content(entry: Entry, shape: Shape) -> str:
    if entry.content is None:
        # the link above is the alternate that an entry without content of its own needs
        source = f' src="{_escaped(entry.source)}"' if entry.source else ""
        return f'<content type="{CONTENT_TYPE}"{source}/>\n' if source else ""
    text = as_json(entry.content)
    if shape is Shape.YAGI:
        return f'<content type="{CONTENT_TYPE}">{_escaped(text.decode())}</content>\n'
    return f'<content type="{CONTENT_TYPE}">{base64.b64encode(text).decode()}</content>\n'


def _link(link: Link) -> str:
    return (
        f'<link rel="{_escaped(link.rel)}" type="{_escaped(link.media_type)}"'
        f' href="{_escaped(link.href)}"/>\n'
    )


def _element(name: str, text: str) -> str:
    return f"<{name}>{_escaped(text)}</{name}>\n"


def _escaped(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text).translate(_ESCAPES)
