"""Streams over HTTP go on where they broke off, if the server proves that it does; listers read what they ask for."""
# ruff: noqa: ASYNC240  the files are the test's own, and small

import asyncio
import gzip
import hashlib
import json
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from pydantic import SecretStr

from hostler_precache import images, testing
from hostler_precache.images import Image, SourceHash, Verification
from hostler_precache.sources import fetchers, listers, plugins
from hostler_precache.sources.access import TempAuth
from hostler_precache.sources.fetch import Fetched, fetch
from hostler_precache.sources.source import SourceError
from hostler_precache.transfer import manifest

MIB = 1 << 20
DATA = testing.image_of(3 * MIB + 77)
OTHER = testing.image_of(3 * MIB + 77, seed=2)
SHA512 = SourceHash(algorithm="sha512", value=hashlib.sha512(DATA).hexdigest())
Answer = Callable[[web.Request], web.Response]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetchers, "RESUME_PAUSES_SECONDS", (0.0, 0.0, 0.0))


@dataclass(slots=True)
class Server:
    """An HTTP server that breaks off as told, and serves ranges as a real one does, or as told."""

    url: str = ""
    body: bytes = DATA
    etag: str | None = '"v1"'
    breaks: list[int] = field(default_factory=list)
    """After so many bytes of each answer in turn; answers after those are whole."""
    on_range: Callable[["Server", web.Request, int], web.Response] | None = None
    ranges: list[str | None] = field(default_factory=list)
    change: Callable[["Server"], None] | None = None

    async def handle(self, request: web.Request) -> web.StreamResponse:
        asked = request.headers.get("Range")
        self.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        if asked and self.on_range is not None:
            return self.on_range(self, request, start)
        if request.headers.get("If-Range", self.etag) != self.etag:
            start = 0
        response = web.StreamResponse(status=206 if start else 200)
        if self.etag:
            response.headers["ETag"] = self.etag
        if start:
            size = len(self.body)
            response.headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        response.content_length = len(self.body) - start
        await response.prepare(request)
        stop = start + self.breaks.pop(0) if self.breaks else len(self.body)
        await response.write(self.body[start:stop])
        if stop < len(self.body):
            if self.change is not None:
                self.change(self)
            assert request.transport is not None
            request.transport.close()
        return response


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Server]:
    made = Server()
    async with testing.http_server(made.handle) as made.url:
        yield made


@pytest_asyncio.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as opened:
        yield opened


async def get(
    session: aiohttp.ClientSession, url: str, path: Path, source_hash: SourceHash | None = SHA512
) -> Fetched:
    fetcher = fetchers.HttpFetcher(plugins.Surroundings(session=session))
    image = Image(
        image_id=images.image_id("debian"), fetcher="http", location=url, source_hash=source_hash
    )
    return await fetch(fetcher, image, path)


async def refused(*arguments: Any, **named: Any) -> SourceError:
    with pytest.raises(SourceError) as caught:
        await get(*arguments, **named)
    return caught.value


async def test_a_stream_that_breaks_off_goes_on_from_where_it_was(
    server: Server, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    server.breaks = [2 * MIB, 500_000, 300_000]
    await get(session, server.url, tmp_path / "blob")
    assert (tmp_path / "blob").read_bytes() == DATA
    assert server.ranges[0] is None
    # what was on its way when the connection broke comes again
    starts = [
        int(asked.removeprefix("bytes=").rstrip("-")) for asked in server.ranges[1:] if asked
    ]
    assert len(starts) == 3
    assert 0 < starts[0] <= 2 * MIB
    assert starts == sorted(starts)


async def test_without_progress_it_gives_up_and_says_how_far_it_came(
    server: Server, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    server.breaks = [MIB, 0, 0, 0, 0]
    error = await refused(session, server.url, tmp_path / "blob")
    assert (error.reason, error.is_transient) == ("source.truncated", True)
    assert re.search(rf"after [1-9]\d+ of {len(DATA)} bytes", error.detail)
    assert len(server.ranges) == 4
    assert not (tmp_path / "blob").exists()


async def test_an_image_that_changes_at_the_source_meanwhile_is_begun_anew(
    server: Server, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    def change(server: Server) -> None:
        server.body, server.etag = OTHER, '"v2"'

    server.breaks, server.change = [MIB], change
    error = await refused(session, server.url, tmp_path / "blob", source_hash=None)
    assert (error.reason, error.is_transient) == ("source.changed", True)


async def test_an_image_that_is_deleted_at_the_source_meanwhile_is_not_found(
    server: Server, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    server.breaks = [MIB]
    server.on_range = lambda *_: web.Response(status=404)
    error = await refused(session, server.url, tmp_path / "blob")
    assert (error.reason, error.is_transient) == ("source.not_found", False)
    assert list(tmp_path.iterdir()) == []


async def test_a_server_that_is_away_for_a_moment_is_waited_for(
    server: Server, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    server.breaks = [MIB]

    def away_once(server: Server, request: web.Request, start: int) -> web.Response:
        del request, start
        server.on_range = None
        return web.Response(status=503)

    server.on_range = away_once
    await get(session, server.url, tmp_path / "blob")
    assert (tmp_path / "blob").read_bytes() == DATA


async def test_without_a_validator_and_a_hash_nothing_is_put_together_from_two_answers(
    server: Server, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    server.breaks, server.etag = [MIB], None
    error = await refused(session, server.url, tmp_path / "blob", source_hash=None)
    assert (error.reason, error.is_transient) == ("source.truncated", True)
    assert server.ranges == [None]
    server.breaks = [MIB]
    await get(session, server.url, tmp_path / "blob")
    assert (tmp_path / "blob").read_bytes() == DATA


SIZE = len(DATA)


def answer(
    status: int, content_range: str | None = None, *, skip: int | None = None, cut: int = 0
) -> Any:
    """An answer to a range: the rest from `skip` after its start, or the whole; without its last `cut` bytes."""

    def made(server: Server, request: web.Request, start: int) -> web.Response:
        del request
        headers = {"ETag": server.etag or ""}
        if content_range is not None:
            headers["Content-Range"] = content_range.format(start=start, next=start + 1)
        first = 0 if skip is None else start + skip
        return web.Response(status=status, headers=headers, body=DATA[first : SIZE - cut])

    return made


LAST = SIZE - 1


def another_part(server: Server, request: web.Request, start: int) -> web.Response:
    """As many bytes as were asked for, and honestly named: from the beginning."""
    del request
    headers = {"ETag": server.etag or "", "Content-Range": f"bytes 0-{LAST - start}/{SIZE}"}
    return web.Response(status=206, headers=headers, body=DATA[: SIZE - start])


@pytest.mark.parametrize(
    ("on_range", "reason"),
    [
        # ranges are not served: the whole comes again, or Glance's 400 for most of its stores
        (answer(200), "source.truncated"),
        (answer(400), "source.truncated"),
        (answer(416), "source.truncated"),
        # the whole image under a 206, as old stores of Glance send it
        (answer(206), "source.range_ignored"),
        (answer(206, f"bytes 0-{LAST}/{SIZE}"), "source.range_ignored"),
        (answer(206, f"bytes {{start}}-{LAST}/{SIZE}"), "source.range_ignored"),
        # another part, another size, fewer bytes than were said
        (another_part, "source.range_ignored"),
        (answer(206, f"bytes {{next}}-{LAST}/{SIZE}", skip=1), "source.range_ignored"),
        (answer(206, f"bytes {{start}}-{SIZE}/{SIZE + 1}", skip=0), "source.range_ignored"),
        (answer(206, f"bytes {{start}}-{LAST}/{SIZE}", skip=0, cut=1), "source.range_ignored"),
        (answer(206, f"bytes {{start}}-{LAST - 1}/{SIZE}", skip=0, cut=1), "source.range_ignored"),
        (answer(206, "bytes twelve", skip=0), "source.range_ignored"),
        (answer(206, skip=0), "source.range_ignored"),
        # some refuse ranges, and give the whole: to the next attempt, or they say that it is forbidden, too
        (answer(403), "source.truncated"),
        (answer(405), "source.truncated"),
        (answer(406), "source.truncated"),
    ],
)
async def test_what_is_not_exactly_the_rest_is_never_taken_for_it(
    server: Server,
    session: aiohttp.ClientSession,
    tmp_path: Path,
    on_range: Any,
    reason: str,
) -> None:
    server.breaks, server.on_range = [MIB], on_range
    error = await refused(session, server.url, tmp_path / "blob")
    assert error.reason == reason
    assert error.is_transient
    assert not (tmp_path / "blob").exists()


async def test_a_206_without_a_length_that_sends_too_much_is_refused(
    session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    async def handle(request: web.Request) -> web.StreamResponse:
        if "Range" not in request.headers:
            response = web.StreamResponse(headers={"ETag": '"v1"'})
            response.content_length = SIZE
            await response.prepare(request)
            await response.write(DATA[:MIB])
            assert request.transport is not None
            request.transport.close()
            return response
        start = request.headers["Range"].removeprefix("bytes=")
        said = {"ETag": '"v1"', "Content-Range": f"bytes {start}{SIZE - 1}/{SIZE}"}
        response = web.StreamResponse(status=206, headers=said)
        response.enable_chunked_encoding()
        await response.prepare(request)
        await response.write(DATA)
        return response

    async with testing.http_server(handle) as url:
        error = await refused(session, url, tmp_path / "blob", source_hash=None)
    assert error.reason == "source.size_mismatch"
    assert list(tmp_path.iterdir()) == []


async def test_redirects_are_followed_but_never_without_end(
    server: Server, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    async def elsewhere(request: web.Request) -> web.Response:
        to = server.url if request.path == "/once" else request.path
        return web.Response(status=302, headers={"Location": to})

    async with testing.http_server(elsewhere) as url:
        await get(session, f"{url}/once", tmp_path / "blob")
        assert (tmp_path / "blob").read_bytes() == DATA
        error = await refused(session, f"{url}/round", tmp_path / "other")
    assert error.reason == "source.redirected"


async def test_bytes_that_the_server_has_encoded_are_refused(
    session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    async def handle(request: web.Request) -> web.Response:
        assert request.headers["Accept-Encoding"] == "identity"
        return web.Response(body=gzip.compress(DATA), headers={"Content-Encoding": "gzip"})

    async with testing.http_server(handle) as url:
        error = await refused(session, url, tmp_path / "blob")
    assert error.reason == "source.encoded"


# --- services of the cloud


@dataclass(slots=True)
class Glance:
    """A Glance that says what a test wants said, to whoever has the token of the moment."""

    url: str = ""
    token: str = "first"
    pages: list[Any] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    tokens_given: int = 0

    async def handle(self, request: web.Request) -> web.Response:
        if request.path == "/auth":
            self.tokens_given += 1
            headers = {"X-Storage-Url": f"{self.url}/", "X-Auth-Token": self.token}
            return web.Response(headers=headers)
        self.asked.append(request.path_qs)
        if request.headers.get("X-Auth-Token") != self.token:
            return web.Response(status=401)
        page = self.pages[0] if len(self.pages) == 1 else self.pages.pop(0)
        return page if isinstance(page, web.Response) else web.json_response(page)


@pytest_asyncio.fixture
async def glance() -> AsyncIterator[Glance]:
    made = Glance()
    async with testing.http_server(made.handle) as made.url:
        yield made


def entry(image_id: str, **fields: Any) -> dict[str, Any]:
    return {"id": image_id, "status": "active", **fields}


def lister(session: aiohttp.ClientSession, url: str, token: str = "first") -> Any:
    return listers.GlanceLister(
        plugins.Surroundings(session=session, glance_url=url, glance_token=SecretStr(token))
    )


async def listed_error(lister: Any, **options: Any) -> SourceError:
    with pytest.raises(SourceError) as caught:
        await lister.list(options)
    return caught.value


async def test_every_filter_reaches_glance_and_pages_are_followed_behind_a_prefix(
    glance: Glance, session: aiohttp.ClientSession
) -> None:
    glance.pages = [
        {"images": [entry("one")], "next": "/v2/images?marker=one&limit=1"},
        {"images": [entry("two")]},
    ]
    options = {
        "owner": "p1", "visibility": "private", "tags": ["a", "b"], "name": "n", "os_hidden": True,
        "updated_at": "gte:2026-01-01T00:00:00Z", "properties": {"os_distro": "debian"},
    }  # fmt: skip
    found = await lister(session, f"{glance.url}/image/v2/").list(options)
    assert [image.image_id for image in found] == ["one", "two"]
    first, second = glance.asked
    assert first == (
        "/image/v2/images?status=active&limit=100&sort=created_at:asc&owner=p1&visibility=private"
        "&name=n&os_hidden=true&updated_at=gte:2026-01-01T00:00:00Z&tag=a&tag=b&os_distro=debian"
    )
    assert second == "/image/v2/images?marker=one&limit=1"


async def test_only_active_images_are_listed_and_one_odd_hash_hides_no_other(
    glance: Glance, session: aiohttp.ClientSession
) -> None:
    md5 = "ab" * 16
    glance.pages = [
        {
            "images": [
                entry("odd", os_hash_algo="whirlpool", os_hash_value="00", checksum=md5),
                entry("none", os_hash_algo="whirlpool", os_hash_value="00"),
                entry("old", checksum=md5, os_hash_value=None),
                entry("good", os_hash_algo="sha512", os_hash_value=SHA512.value, checksum=md5),
                {"id": "queued", "status": "queued"},
            ]
        }
    ]
    found = {
        image.image_id: image.source_hash for image in await lister(session, glance.url).list({})
    }
    weak = SourceHash(algorithm="md5", value=md5)
    assert found == {"odd": weak, "none": None, "old": weak, "good": SHA512}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tag": ["x"]}, "tag: Extra inputs"),
        ({"properties": {"status": "queued"}}, "status is Glance's own filter"),
        ({"updated_at": "yesterday"}, "updated_at"),
        ({"visibility": "everybody"}, "visibility"),
    ],
)
async def test_options_that_mean_nothing_are_refused(
    glance: Glance, session: aiohttp.ClientSession, options: dict[str, Any], said: str
) -> None:
    error = await listed_error(lister(session, glance.url), **options)
    assert error.reason == "lister.options"
    assert said in error.detail
    assert glance.asked == []


@pytest.mark.parametrize(
    ("page", "reason", "is_transient"),
    [
        (web.Response(status=503), "source.refused", True),
        (web.Response(status=403), "source.forbidden", False),
        (web.Response(body=b"<html>"), "source.malformed", False),
        ({"images": [{"id": "x"}]}, "source.malformed", False),
        ({"images": [entry("../x")]}, "source.malformed", False),
        ({"images": [], "next": "/v2/images"}, "source.malformed", False),
        ({"images": [], "next": "/v2/images?marker=x"}, "source.malformed", False),
        (
            web.Response(status=302, headers={"Location": "http://127.0.0.1:1/"}),
            "source.redirected",
            False,
        ),
    ],
)
async def test_a_glance_that_answers_oddly_is_told_apart(
    glance: Glance,
    session: aiohttp.ClientSession,
    page: Any,
    reason: str,
    is_transient: bool,
) -> None:
    glance.pages = [page]
    error = await listed_error(lister(session, glance.url))
    assert (error.reason, error.is_transient) == (reason, is_transient)


async def test_a_fixed_token_that_is_refused_is_not_tried_again(
    glance: Glance, session: aiohttp.ClientSession
) -> None:
    error = await listed_error(lister(session, glance.url, token="old"))
    assert error.reason == "source.forbidden"
    assert len(glance.asked) == 1


@dataclass(slots=True)
class Swift:
    """A Swift whose tokens a test can end, with an object that breaks off once."""

    url: str = ""
    token: int = 0
    breaks: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    manifest: list[dict[str, Any]] = field(default_factory=list)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/auth/v1.0":
            if request.headers.get("X-Auth-Key") != "testing":
                return web.Response(status=401)
            said = {"X-Storage-Url": f"{self.url}/v1/AUTH_test", "X-Auth-Token": str(self.token)}
            return web.Response(headers=said)
        if request.headers.get("X-Auth-Token") != str(self.token):
            return web.Response(status=401)
        if request.query.get("multipart-manifest") == "get":
            return web.json_response(self.manifest)
        found = re.match(r"bytes=(\d+)-", request.headers.get("Range", ""))
        start = int(found[1]) if found else 0
        response = web.StreamResponse(status=206 if start else 200, headers=self.headers)
        if start:
            response.headers["Content-Range"] = f"bytes {start}-{SIZE - 1}/{SIZE}"
        response.content_length = SIZE - start
        await response.prepare(request)
        if self.breaks:
            self.breaks -= 1
            self.token += 1  # the one in use ends, too
            await response.write(DATA[start : start + MIB])
            assert request.transport is not None
            request.transport.close()
        else:
            await response.write(DATA[start:])
        return response


@pytest_asyncio.fixture
async def swift() -> AsyncIterator[Swift]:
    made = Swift(headers={"ETag": hashlib.md5(DATA, usedforsecurity=False).hexdigest()})
    async with testing.http_server(made.handle) as made.url:
        yield made


async def get_from_swift(
    swift: Swift,
    session: aiohttp.ClientSession,
    path: Path,
    *,
    location: str = "c/o",
    key: str = "testing",
) -> Fetched:
    account = TempAuth(session, f"{swift.url}/auth/v1.0", user="test:tester", key=SecretStr(key))
    fetcher = fetchers.SwiftFetcher(plugins.Surroundings(session=session, swift_tempauth=account))
    image = Image(image_id=images.image_id("debian"), fetcher="swift", location=location)
    return await fetch(fetcher, image, path)


async def test_a_token_that_ends_between_two_answers_is_renewed_and_the_stream_goes_on(
    swift: Swift, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    fetched = await get_from_swift(swift, session, tmp_path / "blob")
    assert (tmp_path / "blob").read_bytes() == DATA
    assert fetched.verification is Verification.CHECKSUM
    assert swift.token == 1


HALF = SIZE // 2


def segment(data: bytes, **fields: Any) -> dict[str, Any]:
    value = hashlib.md5(data, usedforsecurity=False).hexdigest()
    return {"name": "/c/s", "bytes": len(data), "hash": value, **fields}


@pytest.mark.parametrize(
    ("headers", "manifest", "outcome"),
    [
        ({"X-Object-Manifest": "c/o_"}, [], Verification.UNVERIFIABLE),
        (
            {"X-Static-Large-Object": "True"},
            [segment(DATA[:HALF]), segment(DATA[HALF:])],
            Verification.CHECKSUM,
        ),
        (
            {"X-Static-Large-Object": "True"},
            [segment(DATA[:HALF]), segment(DATA[:HALF], bytes=SIZE - HALF)],
            "source.hash_mismatch",
        ),
        (
            {"X-Static-Large-Object": "True"},
            [segment(DATA[:HALF], sub_slo=True), segment(DATA[HALF:])],
            Verification.UNVERIFIABLE,
        ),
        (
            {"X-Static-Large-Object": "True"},
            [segment(DATA[:HALF], range="0-5"), segment(DATA[HALF:])],
            Verification.UNVERIFIABLE,
        ),
        ({"X-Static-Large-Object": "True"}, [segment(DATA[:9])], Verification.UNVERIFIABLE),
        ({"X-Static-Large-Object": "True"}, [{"x": 1}], "source.malformed"),
        ({"ETag": "0" * 32}, [], "source.hash_mismatch"),
    ],
)
async def test_swift_objects_are_checked_as_far_as_swift_says_what_they_hash_to(
    swift: Swift,
    session: aiohttp.ClientSession,
    tmp_path: Path,
    headers: dict[str, str],
    manifest: list[dict[str, Any]],
    outcome: Verification | str,
) -> None:
    swift.headers, swift.manifest, swift.breaks = {"ETag": '"etags"', **headers}, manifest, 0
    if isinstance(outcome, Verification):
        fetched = await get_from_swift(swift, session, tmp_path / "blob")
        assert fetched.verification is outcome
    else:
        with pytest.raises(SourceError) as caught:
            await get_from_swift(swift, session, tmp_path / "blob")
        assert caught.value.reason == outcome
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("location", ["", "container", "/object", "container/"])
async def test_a_location_that_names_no_object_is_refused(
    swift: Swift, session: aiohttp.ClientSession, tmp_path: Path, location: str
) -> None:
    with pytest.raises(SourceError) as caught:
        await get_from_swift(swift, session, tmp_path / "blob", location=location)
    assert caught.value.reason == "source.invalid"


async def test_a_wrong_key_for_swift_is_told(
    swift: Swift, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    with pytest.raises(SourceError) as caught:
        await get_from_swift(swift, session, tmp_path / "blob", key="wrong")
    assert (caught.value.reason, caught.value.is_transient) == ("source.unauthenticated", False)


# --- the list at an URL


async def http_list(session: aiohttp.ClientSession, body: bytes, status: int = 200) -> Any:
    async def handle(request: web.Request) -> web.Response:
        del request
        return web.Response(body=body, status=status)

    async with testing.http_server(handle) as url:
        found = listers.HttpLister(plugins.Surroundings(session=session))
        return await found.list({"url": f"{url}/images.json"})


async def test_a_list_at_an_url_names_images_as_a_policy_does(
    session: aiohttp.ClientSession,
) -> None:
    images_there = [{"image_id": "debian", "location": "http://x/debian", "disk_format": "qcow2"}]
    (found,) = await http_list(session, json.dumps({"images": images_there}).encode())
    assert (found.image_id, found.fetcher, found.disk_format) == ("debian", "http", "qcow2")


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"", 404, "source.refused"),
        (b"no json", 200, "source.malformed"),
        (b'{"images": [{"image_id": "../x"}]}', 200, "source.malformed"),
        (b'{"images": []}'.ljust(listers.MAX_LIST_BYTES + 2), 200, "source.malformed"),
    ],
)
async def test_a_list_that_is_none_is_told(
    session: aiohttp.ClientSession, body: bytes, status: int, reason: str
) -> None:
    with pytest.raises(SourceError) as caught:
        await http_list(session, body, status)
    assert caught.value.reason == reason


async def test_a_source_that_hangs_is_given_up(
    session: aiohttp.ClientSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetchers, "_TIMEOUT", aiohttp.ClientTimeout(sock_read=0.2))
    ended = asyncio.Event()

    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_length = SIZE
        await response.prepare(request)
        await response.write(DATA[:100])
        await ended.wait()
        return response

    async with testing.http_server(handle) as url:
        error = await refused(session, url, tmp_path / "blob", source_hash=None)
        ended.set()
    assert (error.reason, error.is_transient) == ("source.truncated", True)


@pytest.mark.parametrize(
    ("then", "reason"),
    [
        (web.Response(status=404), "source.deleted"),
        ({"id": "x", "status": "queued"}, "source.empty"),
        (web.Response(status=503), "source.empty"),
    ],
    ids=["gone", "queued", "nobody knows"],
)
async def test_an_image_that_is_deleted_just_when_its_fetch_begins_is_said_to_be_deleted(
    glance: Glance, session: aiohttp.ClientSession, then: Any, reason: str
) -> None:
    glance.pages = [web.Response(status=204), then]
    fetcher = fetchers.GlanceFetcher(
        plugins.Surroundings(
            session=session, glance_url=glance.url, glance_token=SecretStr("first")
        )
    )
    image = Image(image_id=manifest.ImageId("x"), fetcher="glance", location="", size_bytes=7)
    with pytest.raises(SourceError) as caught:
        async with fetcher.open(image):
            pass
    assert (caught.value.reason, caught.value.is_transient) == (reason, False)
    assert glance.asked == ["/v2/images/x/file", "/v2/images/x"]
