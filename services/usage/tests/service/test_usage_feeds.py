"""Feeds on a real PostgreSQL: nothing is missing from them, archives never change, scopes hold."""

import asyncio
import base64
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import pytest
import pytest_asyncio

from hostler_common import db, testing
from hostler_common.testing import RunningService
from hostler_usage.feeds import feed_store
from hostler_usage.feeds.atom_testing import ReadFeed, read
from hostler_usage.feeds.feed import Feed, Kind
from hostler_usage.feeds.feeds_testing import Feeds, instance_event, open_feeds, stored_event
from hostler_usage.testing import Message

NOON = datetime(2026, 5, 8, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)
CREATED, DELETED = "compute.instance.create.end", "compute.instance.delete.end"
RunUsage = Callable[..., AbstractAsyncContextManager[RunningService]]


@pytest_asyncio.fixture
async def feeds(database_url: str, tmp_path: Path) -> AsyncIterator[Feeds]:
    async with open_feeds(database_url, tmp_path) as running:
        yield running


def urn(number: int) -> str:
    return f"urn:uuid:00000000-0000-4000-8000-{number:012}"


def urns(*numbers: int) -> list[str]:
    return [urn(number) for number in numbers]


async def store(feeds: Feeds, *numbers: int, project: str | None = "p1", **more: Any) -> None:
    """Instances' creations, each in a transaction of its own, settled."""
    for number in numbers:
        await feeds.ingest(instance_event(number, project, at=NOON + number * SECOND, **more))
    await feeds.settle()


async def chain(feeds: Feeds, path: str, token: str = "root") -> list[ReadFeed]:
    """The current document and all archives, newest first, checked to lead forth and back."""
    document = (await feeds.get(path, token)).feed()
    assert not document.is_archive
    found, newer = [document], None
    while "prev-archive" in document.links:
        here = document.links["prev-archive"]
        document = (await feeds.get(here, token)).feed()
        assert document.is_archive
        assert document.links["self"] == here
        assert document.links["current"] == feeds.url + path
        assert document.links.get("next-archive") == newer
        assert document.feed_id == found[0].feed_id
        found.append(document)
        newer = here
    return found


# --- pages


async def test_the_newest_events_are_first_and_carry_what_was_said(feeds: Feeds) -> None:
    await store(feeds, 1, 2)
    document = (await feeds.get("/feeds/all.atom")).feed()
    assert document.ids == urns(2, 1)
    assert document.links == {
        "self": f"{feeds.url}/feeds/all.atom",
        "hub": f"{feeds.url}/hub",
    }
    newest = document.entries[0]
    assert newest.published == NOON + 2 * SECOND
    assert newest.updated == document.updated
    assert newest.title == CREATED
    assert newest.categories == (CREATED, "p1", "instance/i2")
    assert newest.content == {
        "message_id": "00000000-0000-4000-8000-000000000002",
        "event_type": CREATED,
        "publisher_id": "compute.c1",
        "priority": "INFO",
        "timestamp": "2026-05-08T12:00:02Z",
        "payload": {"instance_id": "i2", "memory_mb": 512, "tenant_id": "p1"},
    }


async def test_an_empty_feed_is_a_valid_one(feeds: Feeds) -> None:
    for path in ("all", "types/volume.create.end", "projects/p1", "resources/instance/i1"):
        document = (await feeds.get(f"/feeds/{path}.atom")).feed()
        assert document.entries == ()
        assert set(document.links) == {"self", "hub"}


@pytest.mark.parametrize(
    "path",
    ["all", f"types/{CREATED}", "projects/p1", "resources/instance/i1"],
)
async def test_the_archives_and_the_current_document_hold_every_event_once(
    feeds: Feeds, path: str
) -> None:
    for number in range(1, 12):
        event = instance_event(number, at=NOON - number * SECOND, instance_id="i1")
        await feeds.ingest(event)
    await feeds.settle()
    documents = await chain(feeds, f"/feeds/{path}.atom")
    # a full page stays in the current document until the next one is full
    assert [document.ids for document in documents] == [
        urns(11, 10, 9, 8, 7),
        urns(6, 5, 4),
        urns(3, 2, 1),
    ]


async def test_what_is_not_settled_is_in_the_current_document_already(feeds: Feeds) -> None:
    await store(feeds, 1, 2, 3, 4)
    await feeds.ingest(instance_event(5, at=NOON))
    assert (await feeds.get("/feeds/all.atom")).feed().ids == urns(5, 4, 3, 2, 1)
    assert (await feeds.get("/feeds/projects/p1.atom")).feed().ids == urns(5, 4, 3, 2, 1)
    assert (await feeds.get("/feeds/resources/instance/i5.atom")).feed().ids == urns(5)


async def test_archives_stay_byte_for_byte_while_events_come(feeds: Feeds) -> None:
    await store(feeds, *range(1, 11))
    before = {d.links["self"]: d for d in await chain(feeds, "/feeds/projects/p1.atom")}
    oldest = list(before)[-1]
    body = (await feeds.get(oldest)).body
    random = Random(8)
    for number in range(11, 40):
        # late ones too: the time of an event has no part in the order of a feed
        at = NOON - random.randrange(10**6) * SECOND
        await feeds.ingest(instance_event(number, random.choice(["p1", "p2"]), at=at))
        if random.random() < 0.5:
            await feeds.settle()
    after = {d.links["self"]: d for d in await chain(feeds, "/feeds/projects/p1.atom")}
    archives = {href: d for href, d in before.items() if d.is_archive}
    assert archives.keys() < after.keys()
    assert all(after[href].ids == document.ids for href, document in archives.items())
    assert (await feeds.get(oldest)).body == body


async def test_what_comes_again_and_nothing_else_is_passed_over(feeds: Feeds) -> None:
    """Numbers are taken for it, and no event has them."""
    await store(feeds, 1, 2)
    await store(feeds, 1, 2)
    await store(feeds, 3)
    assert (await feeds.get("/feeds/all.atom")).feed().ids == urns(3, 2, 1)
    assert await feeds.feeds.settled_seq() == 5


async def test_an_event_that_commits_late_is_in_no_page_before_its_turn(feeds: Feeds) -> None:
    await store(feeds, 1, 2)
    async with db.connection(feeds.pool) as connection:
        late = connection.transaction()
        await late.start()
        await insert_like(connection, 1, 50)  # takes a seq now, and commits after later ones
        for number in range(3, 12):
            await feeds.ingest(instance_event(number, at=NOON + number * SECOND))
        await feeds.settle()
        assert len(await chain(feeds, "/feeds/all.atom")) == 1, "it cut pages too early"
        await late.commit()
    await feeds.settle()
    documents = await chain(feeds, "/feeds/all.atom")
    ids = [i for document in documents for i in document.ids]
    assert ids == urns(11, 10, 9, 8, 7, 6, 5, 4, 3, 50, 2, 1)


async def test_a_transaction_that_stays_open_does_not_hold_feeds_up_for_ever(
    feeds: Feeds,
) -> None:
    async with db.connection(feeds.pool) as connection:
        other = connection.transaction()
        await other.start()
        await connection.execute("CREATE TABLE something (a integer)")
        await feeds.ingest(*(instance_event(n, at=NOON + n * SECOND) for n in range(1, 8)))
        await feeds.settle()
        assert await feeds.feeds.settled_seq() == 0
        # as if it had been so for long: ingest's own transactions end within a minute
        await feeds.pool.execute("UPDATE feed_clock SET awaited_at = now() - interval '6 minutes'")
        await feeds.settle()
        assert await feeds.feeds.settled_seq() > 0
        await other.rollback()


async def test_replicas_cut_the_same_pages_together(feeds: Feeds) -> None:
    async def settle() -> None:
        while not done.is_set():
            await feeds.feeds.settle()

    done = asyncio.Event()
    replicas = [asyncio.create_task(settle()) for _ in range(3)]
    for number in range(0, 60, 4):
        await asyncio.gather(
            *(
                feeds.ingest(instance_event(n, f"p{n % 3}", at=NOON + n * SECOND))
                for n in range(number, number + 4)
            )
        )
    done.set()
    await asyncio.gather(*replicas)
    await feeds.settle()
    ids = [i for document in await chain(feeds, "/feeds/all.atom") for i in document.ids]
    assert sorted(ids) == urns(*range(60))
    assert len(await chain(feeds, "/feeds/all.atom")) == 20
    for project in range(3):
        documents = await chain(feeds, f"/feeds/projects/p{project}.atom")
        found = [i for document in documents for i in document.ids]
        assert sorted(found) == urns(*range(project, 60, 3))


async def test_a_backlog_is_shown_in_parts(feeds: Feeds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_store, "CURRENT_EVENTS", 4)
    await feeds.ingest(*(instance_event(n, at=NOON + n * SECOND) for n in range(10)))
    document = (await feeds.get("/feeds/all.atom")).feed()
    ids = document.ids
    while "next" in document.links:
        document = (await feeds.get(document.links["next"])).feed()
        ids += document.ids
    assert ids == urns(*range(9, -1, -1))


async def test_what_retention_drops_leaves_the_feeds_with_its_pages(feeds: Feeds) -> None:
    await store(feeds, *range(1, 14))
    documents = await chain(feeds, "/feeds/all.atom")
    kept = documents[-2].links["self"]
    await feeds.pool.execute("DELETE FROM raw_event WHERE event_time <= $1", NOON + 3 * SECOND)
    assert await feeds.feeds.forget(NOON + 4 * SECOND) == 3  # of all, of the type, of the project
    after = await chain(feeds, "/feeds/all.atom")
    assert [document.ids for document in after] == [d.ids for d in documents[:-1]]
    assert after[-1].links["self"] == kept
    resource = await feeds.get("/feeds/resources/instance/i2.atom")
    assert resource.feed().entries == ()


# 6 ends a full page, which is on the current page still
@pytest.mark.parametrize("archive", [1, 6, 10**6, 2**63 - 1])
async def test_there_is_no_archive_where_no_page_ends(feeds: Feeds, archive: int) -> None:
    await store(feeds, *range(1, 8))
    answer = await feeds.get(f"/feeds/all.atom?archive={archive}")
    assert answer.status == 404
    assert json.loads(answer.body)["code"] == "usage.feed.page_not_found"


@pytest.mark.parametrize("query", ["archive=0", "archive=x", f"archive={2**63}", "before=-1"])
async def test_a_page_that_cannot_be_is_refused(feeds: Feeds, query: str) -> None:
    assert (await feeds.get(f"/feeds/all.atom?{query}")).status == 422


# --- what is not so simple about messages


@pytest.mark.parametrize("apart", [timedelta(), SECOND, timedelta(days=31)])
async def test_two_bodies_under_one_id_are_two_entries_and_the_first_keeps_the_id(
    feeds: Feeds, apart: timedelta
) -> None:
    await feeds.ingest(instance_event(1, at=NOON, memory_mb=1))
    (before,) = (await feeds.get("/feeds/all.atom")).feed().ids
    await feeds.ingest(instance_event(1, at=NOON - apart, memory_mb=2))
    await feeds.ingest(
        instance_event(1, at=NOON - apart, memory_mb=2)
    )  # the same again: a duplicate
    document = (await feeds.get("/feeds/all.atom")).feed()
    assert before == document.ids[1] == urn(1)
    assert document.ids[0] != urn(1)
    assert [e.content["payload"]["memory_mb"] for e in document.entries] == [2, 1]


@pytest.mark.parametrize("message_id", ["req-17", "\u0001<&\ud800", ""])
async def test_any_message_is_a_valid_entry(feeds: Feeds, message_id: str) -> None:
    body = {
        "message_id": message_id,
        "event_type": 'odd.\u0000\u0008\ud800<type a="b">&\r\n',
        "publisher_id": "\u0007",
        "priority": "INFO",
        "timestamp": "2026-05-08 12:00:00.000001",
        "_context_auth_token": "hidden",
        "_unique_id": "hidden",
        "payload": {
            "instance_id": "\u000b]]>",
            "tenant_id": "p\u0001/é",
            "a\ud800": [1e300, None],
        },
    }
    await feeds.ingest(stored_event(json.dumps(body).encode()))
    await feeds.settle()
    answer = await feeds.get("/feeds/all.atom")
    (entry,) = answer.feed().entries
    assert entry.content["payload"]["a\ud800"] == [1e300, None]
    assert "hidden" not in json.dumps(entry.content)
    yagi = read((await feeds.get("/yagi/")).body, is_yagi=True)
    assert yagi.ids == [entry.entry_id]
    feed = Feed(kind=Kind.TYPE, key=entry.content["event_type"])
    assert (await feeds.get(feed.path)).feed().ids == [entry.entry_id]


async def test_any_name_has_a_feed(feeds: Feeds) -> None:
    project, instance = "p\u0001/é", "\u000b]]>\n%2F?.atom"
    await feeds.ingest(instance_event(1, project, at=NOON, instance_id=instance))
    await feeds.settle()
    for feed in (
        Feed(kind=Kind.PROJECT, key=project),
        Feed(kind=Kind.RESOURCE, key=instance, resource_type="instance"),
    ):
        document = (await feeds.get(feed.path)).feed()
        assert document.ids == urns(1)
        assert document.links["self"] == feeds.url + feed.path


async def test_what_is_too_large_for_a_feed_is_named_by_its_address(feeds: Feeds) -> None:
    await feeds.ingest(instance_event(1, at=NOON, metadata="x" * 70_000))
    (entry,) = (await feeds.get("/feeds/all.atom")).feed().entries
    assert entry.content is None
    assert re.fullmatch(f"{feeds.url}/v1/events/[0-9]+-[0-9a-f]{{64}}/body", entry.source or "")
    # its size is none of the business of a caller that sees no bodies
    (own,) = (await feeds.get("/feeds/all.atom", "one")).feed().entries
    assert own.content["resource_id"] == "i1"


# --- who sees what


async def test_a_caller_of_some_projects_sees_those_and_not_what_was_said(feeds: Feeds) -> None:
    for number in range(1, 20):
        project = ["p1", "p2", "p3", None][number % 4]
        await feeds.ingest(
            instance_event(
                number,
                project,
                at=NOON + number * SECOND,
                event_type=DELETED if number % 3 else CREATED,
                instance_id="i1",
            )
        )
    await feeds.settle()
    mine = {"one": ["p1"], "two": ["p2"], "both": ["p1", "p2"]}
    numbers = {
        project: [n for n in range(1, 20) if ["p1", "p2", "p3", None][n % 4] == project]
        for project in ("p1", "p2", "p3")
    }
    for token, projects in mine.items():
        seen = sorted(n for project in projects for n in numbers[project])
        for path, expected in (
            ("all", seen),
            (f"types/{CREATED}", [n for n in seen if n % 3 == 0]),
            (f"types/{DELETED}", [n for n in seen if n % 3]),
            ("resources/instance/i1", seen),
        ):
            documents = await chain(feeds, f"/feeds/{path}.atom", token)
            ids = [i for document in documents for i in document.ids]
            assert ids == urns(*reversed(expected)), (token, path)
            for document in documents:
                for entry in document.entries:
                    assert set(entry.content) == {
                        "message_id",
                        "event_type",
                        "resource_type",
                        "resource_id",
                        "project_id",
                        "region",
                        "event_time",
                        "received_at",
                    }
                    assert entry.content["project_id"] in projects
        for project in ("p1", "p2", "p3", "p4"):
            answer = await feeds.get(f"/feeds/projects/{project}.atom", token)
            assert answer.status == (200 if project in projects else 404), (token, project)


async def test_pages_that_show_a_caller_nothing_of_a_type_are_passed_over(feeds: Feeds) -> None:
    await store(feeds, 1)
    await store(feeds, *range(2, 30), event_type=DELETED)
    documents = await chain(feeds, f"/feeds/types/{CREATED}.atom", "one")
    assert [document.ids for document in documents] == [[], urns(1)]
    documents = await chain(feeds, f"/feeds/types/{CREATED}.atom", "both")
    assert [document.ids for document in documents] == [[], urns(1)]


async def test_callers_who_see_different_projects_see_different_feeds(feeds: Feeds) -> None:
    await store(feeds, 1)
    ids = {
        (await feeds.get("/feeds/all.atom", token)).feed().feed_id
        for token in ("root", "one", "two", "both")
    }
    assert len(ids) == 4
    assert (await feeds.get("/feeds/all.atom", "root")).feed().feed_id in ids


async def test_one_project_does_not_learn_of_another_by_an_etag_or_an_id(feeds: Feeds) -> None:
    await store(feeds, 1, project="p2")
    tag = (await feeds.get("/feeds/all.atom", "one")).headers["ETag"]
    await store(feeds, 2, 3, 4, 5, 6, project="p2")
    assert (await feeds.get("/feeds/all.atom", "one")).headers["ETag"] == tag
    path = f"/yagi/{CREATED}/00000000-0000-4000-8000-000000000001"
    assert (await feeds.get(path, "two")).status == 200
    assert (await feeds.get(path, "one")).status == 404


async def test_feed_readers_send_the_token_as_a_password(feeds: Feeds) -> None:
    await store(feeds, 1)
    basic = base64.b64encode(b"anyone:one").decode()
    answer = await feeds.get("/feeds/all.atom", None, Authorization=f"Basic {basic}")
    assert answer.feed().ids == urns(1)
    for token in (None, "nobody", "agent"):
        for path in ("/feeds/all.atom", "/yagi/", f"/{CREATED}", f"/{CREATED}/x"):
            assert (await feeds.get(path, token)).status in (401, 403)
    refused = await feeds.get("/feeds/all.atom", None)
    assert "Basic" in refused.headers["WWW-Authenticate"]


# --- conditional requests


async def test_a_reader_that_has_the_document_is_told_so(feeds: Feeds) -> None:
    await store(feeds, *range(1, 12))
    for path in ("/feeds/all.atom", "/yagi/", f"/{CREATED}?page=0"):
        first = await feeds.get(path)
        for condition in (first.headers["ETag"], f'"x", W/{first.headers["ETag"]}', "*"):
            again = await feeds.get(path, If_None_Match=condition)
            assert (again.status, again.body) == (304, b"")
            assert again.headers["ETag"] == first.headers["ETag"]
        assert (await feeds.get(path, If_None_Match='"x"')).status == 200
        # the time of a current feed tells nothing: more may come within the second
        since = first.headers["Last-Modified"]
        assert (await feeds.get(path, If_Modified_Since=since)).status == 200
    tag = (await feeds.get("/feeds/all.atom")).headers["ETag"]
    await store(feeds, 12)
    assert (await feeds.get("/feeds/all.atom", If_None_Match=tag)).status == 200


async def test_archives_may_be_kept_for_ever_but_the_newest_will_get_a_next(feeds: Feeds) -> None:
    await store(feeds, *range(1, 12))
    current, newest, oldest = await chain(feeds, "/feeds/all.atom")
    controls = [
        (await feeds.get(document.links["self"])).headers["Cache-Control"]
        for document in (current, newest, oldest)
    ]
    assert controls == [
        "private, no-cache",
        "private, no-cache",
        "private, max-age=31536000, immutable",
    ]
    href = oldest.links["self"]
    since = (await feeds.get(href)).headers["Last-Modified"]
    assert (await feeds.get(href, If_Modified_Since=since)).status == 304
    assert (await feeds.get(href, If_Modified_Since="Mon, 01 Jan 2001 00:00:00 GMT")).status == 200
    assert (await feeds.get(href, If_Modified_Since="yesterday")).status == 200


async def test_the_hub_is_found_in_the_header(feeds: Feeds) -> None:
    answer = await feeds.get("/feeds/projects/p1.atom")
    assert answer.headers["Link"] == (
        f'<{feeds.url}/feeds/projects/p1.atom>; rel="self", <{feeds.url}/hub>; rel="hub"'
    )


async def test_a_head_says_what_a_get_says_without_the_document(feeds: Feeds) -> None:
    await store(feeds, *range(1, 8))
    for path in (
        "/feeds/all.atom",
        f"/feeds/types/{CREATED}.atom",
        "/feeds/projects/p1.atom",
        "/feeds/resources/instance/i1.atom",
        f"/yagi/{CREATED}?page=0",
        f"/{CREATED}",
    ):
        whole = await feeds.get(path)
        assert whole.status == 200
        for known, status in ((None, 200), (whole.headers["ETag"], 304)):
            sent = {"Authorization": "Bearer root"}
            if known is not None:
                sent["If-None-Match"] = known
            async with feeds.session.head(feeds.url + path, headers=sent) as answer:
                assert answer.status == status
                for name in ("ETag", "Link", "Last-Modified", "Cache-Control"):
                    assert answer.headers[name] == whole.headers[name]
                assert await answer.read() == b""
    async with feeds.session.head(f"{feeds.url}/feeds/all.atom") as answer:
        assert answer.status == 401


# --- yagi's paths


async def test_the_paths_of_yagi_answer_as_yagi_did(feeds: Feeds) -> None:
    await store(feeds, *range(1, 12))
    for path in ("/yagi/", f"/yagi/{CREATED}", f"/{CREATED}"):
        newest = (await feeds.get(path)).feed(is_yagi=True)
        assert newest.ids == urns(11, 10, 9, 8, 7)
        assert newest.entries[0].categories[0] == CREATED
        assert newest.entries[0].content["payload"]["instance_id"] == "i11"
        pages, document = [newest.ids], newest
        while "previous" in document.links:
            document = (await feeds.get(document.links["previous"])).feed(is_yagi=True)
            pages.append(document.ids)
        assert pages == [urns(11, 10, 9, 8, 7), urns(6, 5, 4), urns(3, 2, 1)]
        oldest = (await feeds.get(f"{path}?page=0")).feed(is_yagi=True)
        assert oldest.ids == urns(3, 2, 1)
        forth = (await feeds.get(oldest.links["next"])).feed(is_yagi=True)
        assert forth.ids == urns(6, 5, 4)
        assert (await feeds.get(f"{path}?page=2")).feed(is_yagi=True).ids == newest.ids
        assert (await feeds.get(f"{path}?page=3")).status == 404
    one = f"{CREATED}/00000000-0000-4000-8000-000000000007"
    for path in (f"/yagi/{one}", f"/{one}"):
        document = (await feeds.get(path)).feed(is_yagi=True)
        assert document.ids == urns(7)
        assert document.links["self"] == f"{feeds.url}/yagi/{one}"


async def test_the_root_is_a_feed_for_who_accepts_one_and_a_page_for_others(feeds: Feeds) -> None:
    await store(feeds, 1)
    atom = await feeds.get("/", Accept="application/xml, application/atom+xml;q=0.9")
    assert atom.feed(is_yagi=True).ids == urns(1)
    for accept in ("text/html", "*/*"):
        page = await feeds.get("/", Accept=accept)
        assert page.headers["Content-Type"].startswith("text/html")


async def test_the_paths_of_yagi_hide_no_path_of_ours(feeds: Feeds) -> None:
    for path in ("/healthz", "/readyz", "/v1/openapi.json", "/static/common/style.css"):
        assert (await feeds.get(path, None)).status == 200
    for path in ("/favicon.ico", "/robots.txt", "/nonsense", "/no.such.type", "/no.such.type/1"):
        assert (await feeds.get(path)).status == 404


# --- the whole service


async def test_messages_of_a_broker_are_in_the_feeds(
    run_usage: RunUsage, publish: Callable[..., Awaitable[None]]
) -> None:
    async with run_usage(feed_seconds=0.05, feed_page_events=3) as service:
        messages = [
            Message(
                topic="notifications",
                event_type=CREATED,
                publisher_id="compute.c1",
                timestamp=NOON + number * SECOND,
                message_id=urn(number).removeprefix("urn:uuid:"),
                payload={"instance_id": f"i{number}", "tenant_id": "p1"},
            ).body()
            for number in range(1, 12)
        ]
        await publish(messages)

        async def all_there() -> Any:
            ids: list[str] = []
            document = read((await service.api.get("/feeds/all.atom")).encode())
            archives = 0
            while True:
                ids += document.ids
                if "prev-archive" not in document.links:
                    return archives == 2 and sorted(ids) == urns(*range(1, 12))
                href = document.links["prev-archive"].removeprefix(service.url)
                document = read((await service.api.get(href)).encode())
                archives += 1

        await testing.eventually(all_there)


# --- helpers


async def insert_like(connection: db.Connection, number: int, copy: int) -> None:
    """A copy of a stored event under another id, in the connection's transaction."""
    await connection.execute(
        "INSERT INTO raw_event (event_time, message_id, body_sha256, origin, region, event_type,"
        " publisher_id, priority, project_id, resource_type, resource_id, has_own_id, is_known,"
        " body) SELECT event_time, $2, body_sha256, origin, region, event_type, publisher_id,"
        " priority, project_id, resource_type, resource_id, has_own_id, is_known, body"
        " FROM raw_event WHERE message_id = $1",
        urn(number).removeprefix("urn:uuid:"),
        urn(copy).removeprefix("urn:uuid:"),
    )
