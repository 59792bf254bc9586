"""The pages over HTTP: what they say, to whom, and what their forms refuse. A browser looks at them elsewhere."""

import html
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
import pytest_asyncio

from hostler_common import auth, client
from hostler_common.testing import RunningService, eventually
from hostler_usage import pages
from hostler_usage.testing import LARGE, LEGACY, SMALL, InstanceLife, Message, Step

HOUR = timedelta(hours=1)
NOW = datetime.now(UTC).replace(microsecond=0)
RunUsage = Callable[..., AbstractAsyncContextManager[RunningService]]
Publish = Callable[..., Awaitable[None]]
Settled = Callable[[RunningService, int], Awaitable[dict[str, Any]]]
ODD = "p2/<script>alert(1)</script>?#%"


def life(number: int, project: str) -> InstanceLife:
    return InstanceLife(
        instance_id=f"00000000-0000-4000-8000-{number:012}",
        project_id=project,
        steps=(
            Step(at=NOW - 6 * HOUR, action="create", flavor=SMALL),
            Step(at=NOW - 4 * HOUR, action="resize", flavor=LARGE),
            Step(at=NOW - 2 * HOUR, action="stop"),
        ),
    )


ALICES, ODDS = life(1, "p1"), life(2, ODD)
MESSAGES = [m for one in (ALICES, ODDS) for m in one.messages(audits_until=NOW)]
STARTED = Message(
    topic=LEGACY,
    event_type="compute.instance.live_migration.pre.start",
    publisher_id="compute.cmp-001",
    timestamp=NOW - 3 * HOUR,
    message_id="22222222-2222-4222-8222-222222222222",
    payload={"tenant_id": ODD, "instance_id": ODDS.instance_id},
)
SECRET = "the context of whoever acted"
ODD_EVENT = Message(
    topic=LEGACY,
    event_type="compute.instance.strange",
    publisher_id="compute.cmp-001",
    timestamp=NOW - HOUR,
    message_id="33333333-3333-4333-8333-333333333333",
    payload={"tenant_id": "p1", "instance_id": ALICES.instance_id, "context": SECRET},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """The service with its messages folded, as callers of different kinds see it."""

    url: str
    session: aiohttp.ClientSession
    secrets: dict[str, str]
    api: client.Api

    async def get(
        self, path: str, caller: str = "admin", **params: str
    ) -> tuple[int, str, Mapping[str, str]]:
        async with self.session.get(
            self.url + path,
            params=params,
            headers={"Authorization": f"Bearer {self.secrets[caller]}"},
            allow_redirects=False,
        ) as answer:
            return answer.status, await answer.text(), answer.headers

    async def page(self, path: str, caller: str = "admin", **params: str) -> str:
        status, text, headers = await self.get(path, caller, **params)
        assert status == 200, text
        assert headers["Content-Type"].startswith("text/html")
        return text

    async def post(self, path: str, **headers: str) -> tuple[int, str]:
        async with self.session.post(
            self.url + path, headers=headers, allow_redirects=False
        ) as answer:
            return answer.status, answer.headers.get("Location") or await answer.text()


@pytest_asyncio.fixture
async def site(
    run_usage: RunUsage, publish: Publish, settled: Settled, tmp_path: Path
) -> AsyncIterator[Site]:
    issued = {
        name: auth.new_token(name=name, role=role, projects=projects)
        for name, role, projects in (
            ("admin", auth.Role.ADMIN, "*"),
            ("operator", auth.Role.OPERATOR, "*"),
            ("reader", auth.Role.READER, "*"),
            ("alice", auth.Role.READER, "p1"),
        )
    }
    tokens = tmp_path / "tokens"
    tokens.write_text("\n".join(line for _, line in issued.values()))
    secrets = {name: token for name, (token, _) in issued.items()}
    sent = [*MESSAGES, STARTED, ODD_EVENT]
    async with (
        run_usage(auth_mode="token", auth_tokens_file=tokens) as service,
        client.open_api(service.url, token=secrets["admin"]) as api,
        aiohttp.ClientSession() as session,
    ):
        await publish([message.body() for message in sent])
        await publish([b"not \xff json", b'{"oslo.version": "3.0", "oslo.message": "<b>"}'])

        async def holds() -> bool:
            stored = (await api.get("/v1/events", limit=1000))["events"]
            usage = await api.get("/v1/usage", start=_text(NOW - HOUR), end=_text(NOW))
            kept = (await api.get("/v1/quarantine"))["entries"]
            return len(stored) == len(sent) and len(kept) == 2 and not usage["unfolded_resources"]

        await eventually(holds)
        await api.put("/v1/price-books/default", BOOK)
        limit = {"amount": 9, "price_book": "default"}
        for number, project in enumerate(("p1", "p2", ODD)):
            document = {"subject": {"projects": [project]}, "limit": limit, "period": "month"}
            await api.put(f"/v1/budgets/b{number}", document)
        yield Site(url=service.url, session=session, secrets=secrets, api=api)


def _text(moment: datetime) -> str:
    return moment.isoformat()


PAGES = (
    *("/", "/projects", "/projects/p1", "/audits", "/operations", "/events"),
    *("/costs", "/costs?group_by=resource", "/budgets", "/periods"),
    *("/price-books", "/price-books/default", "/idle", "/explain?measure=instance_hours"),
)
BOOK = {
    "currency": "EUR",
    "public": True,
    "prices": [
        {"name": "odd", "measure": "instance_hours", "match": {"project": ODD}, "price": "1"},
        {
            "name": "hours",
            "measure": "instance_hours",
            "match": {"flavor": ["m1.small", "m1.large"], "project": ["p1", ODD]},
            "from": "2026-01-01",
            "price": "1",
            "state_class_factors": {"stopped": "0.5"},
            "rounding": {"to": "hour", "minimum_seconds": 600},
        },
        {
            "name": "memory",
            "measure": "ram_mb_hours",
            "per": 1024,
            "tiers": {"steps": [{"up_to": 5, "price": 0}, {"price": "0.01"}]},
        },
    ],
    "discounts": [{"name": "friends", "percent": 25, "match": {"project": ODD}}],
}


async def test_pages_say_what_the_api_says(site: Site) -> None:
    text = await site.page("/")
    assert "Ingest" in text
    assert '>2</strong> <a href="/quarantine">in quarantine' in text
    assert "Projects in the last 24 hours" in text

    text = await site.page("/projects/p1", month=f"{NOW:%Y-%m}", measure="ram_mb_hours")
    assert "RAM MB hours by day" in text
    assert f'href="/resources/instance/{ALICES.instance_id}"' in text

    text = await site.page(f"/resources/instance/{ALICES.instance_id}")
    history = await site.api.get(f"/v1/resources/instance/{ALICES.instance_id}/intervals")
    assert len(re.findall(r'<tr id="interval-\d+">', text)) == len(history["intervals"])
    for interval in history["intervals"]:
        for cited in (*interval["opened_by"], *interval["closed_by"]):
            assert f'href="/events/{cited["event_id"]}"' in text
    events = await site.api.get("/v1/events", resource_id=ALICES.instance_id, limit=1000)
    assert (
        len(re.findall(r'class="mark (?:event|audit|error)"', text)) == len(events["events"]) + 3
    )  # the key's
    for event in events["events"]:
        assert text.count(f'href="/events/{event["id"]}"') >= 2  # mark and row

    text = await site.page("/operations", group_by="action")
    assert "live_migration.pre" in text
    assert STARTED.message_id[:8] in text  # unfinished
    text = await site.page("/operations", group_by="action", unfinished_minutes="600")
    assert STARTED.message_id[:8] not in text

    text = await site.page("/audits")
    verdicts = await site.api.get("/v1/audits")
    assert verdicts["audits"]
    assert text.count("</td><td>agreed") + text.count(">agreed</td>") >= 1


async def test_every_number_that_is_drawn_is_in_a_table_as_the_api_has_it(site: Site) -> None:
    begun = datetime.now(UTC)
    month = begun.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    text = await site.page("/", month=f"{month:%Y-%m}", measure="instance_hours")
    ended = datetime.now(UTC)
    usage = await site.api.get(
        "/v1/usage", start=_text(month), end=_text(ended), group_by="project,day"
    )
    cells = [float(value) for value in re.findall(r'data-value="([^"]+)"', text)]
    hours = sum(row["hours"].get("instance_hours", 0) for row in usage["usage"])
    assert sum(cells) == pytest.approx(hours, abs=0.2)  # both still run
    # two projects, every day of the month so far: it may be midnight
    assert len(cells) in {2 * begun.day, 2 * ended.day}


async def test_a_project_token_sees_its_project_alone(site: Site) -> None:
    odd = quote(ODD, safe="")
    for path in PAGES:
        text = await site.page(path, "alice")
        assert "p2" not in text, path
        assert ODDS.instance_id not in text, path
        assert "Ingest" not in text, path
    assert ODDS.instance_id not in await site.page(f"/projects/{odd}", "alice")
    assert ODDS.instance_id in await site.page(f"/projects/{odd}", "reader")
    status, text, _ = await site.get(f"/resources/instance/{ODDS.instance_id}", "alice")
    assert (status, json.loads(text)["code"]) == (404, "usage.resource.not_found")
    for message in (STARTED, ODD_EVENT):
        (event,) = (await site.api.get("/v1/events", message_id=message.message_id))["events"]
        status, text, _ = await site.get(f"/events/{event['id']}", "alice")
        if message is STARTED:
            assert status == 404
        else:
            assert status == 200
            assert SECRET not in text  # its own, and yet no bodies
        assert (SECRET in await site.page(f"/events/{event['id']}", "reader")) == (
            message is ODD_EVENT
        )
    for path in ("/quarantine", "/quarantine/1"):
        assert (await site.get(path, "alice"))[0] == 403
        assert (await site.get(path, "reader"))[0] == 403


async def test_names_from_messages_are_text_on_every_page(site: Site) -> None:
    quoted = quote(ODD, safe="/")
    for path in (*PAGES, f"/projects/{quote(ODD, safe='')}"):
        text = await site.page(path)
        assert "<script>" not in text
        assert set(re.findall(r"<script[^>]*>", text)) == set(
            re.findall(r'<script src="/static/usage/[\w.]+\?v=\w{12}" defer>', text)
        )
    assert f'href="/projects/{quoted}"' in await site.page("/")
    entry = (await site.api.get("/v1/quarantine"))["entries"][1]["id"]
    text = await site.page(f"/quarantine/{entry}", "operator")
    assert "&lt;b&gt;" in text
    assert "<b>" not in text


async def test_a_page_of_a_price_book_says_what_its_document_says(site: Site) -> None:
    await site.api.put("/v1/price-books/inside", {**BOOK, "public": False})
    text = await site.page("/price-books")
    assert 'href="/price-books/default"' in text
    assert 'href="/price-books/inside"' in text
    assert '<a href="/price-books">price books</a>' in await site.page("/")
    text = await site.page("/price-books/default")
    for words in (
        "flavor m1.small or m1.large<br>project p1 or p2/&lt;script&gt;",
        "from 2026-01-01",
        "stopped counts 0.5-fold<br>time rounded up to the hour, once a month<br>at least 600 s a month",
        "0 up to 5<br>0.01 beyond",
        "for every 1024<br>tiers count a month of each project",
        "25 %",
    ):
        assert words in text
    assert (await site.get("/price-books/inside"))[0] == 200
    # of a public book a project sees what concerns it, of others nothing
    text = await site.page("/price-books/default", "alice")
    assert "project p1<" in text
    assert "friends" not in text
    assert "by admin" not in text
    assert "inside" not in await site.page("/price-books", "alice")
    status, text, _ = await site.get("/price-books/inside", "alice")
    assert (status, json.loads(text)["code"]) == (404, "usage.price_book.not_found")
    # a version that is no longer the newest is still what it was
    await site.api.put("/v1/price-books/default", {**BOOK, "currency": "USD", "discounts": []})
    assert "<td>USD</td>" in await site.page("/price-books/default")
    text = await site.page("/price-books/default", version="1")
    assert "<td>EUR</td>" in text
    assert "friends" in text
    assert 'href="/price-books/default?version=2"' in text


async def test_every_number_of_usage_is_one_click_from_its_intervals_messages_and_bodies(
    site: Site,
) -> None:
    clicks = 0
    for path in ("/", "/projects/p1", f"/resources/instance/{ALICES.instance_id}"):
        text = await site.page(path)
        links = re.findall(r'<a class="why" href="([^"]+)">([^<]+)</a>', text)
        assert links, path
        for address, shown in links:
            target = html.unescape(address)
            why = await site.page(target)
            # the page is about the very number that was clicked on
            assert f"<h1>{shown} " in why, target
            answer = await site.api.get(f"/v1/usage{target}&limit=50")
            assert f'<span class="exact">{answer["amount"]:,}</span>' in why
            parts = [part for share in answer["shares"] for part in share["intervals"]]
            assert parts
            table = why[why.index('id="parts"') : why.index("The messages behind them")]
            assert table.count("<tr>") == len(parts) + 1
            for part in parts:
                assert part["counted_from"][:19].replace("T", " ") in table
                for cited in (*part["opened_by"], *part["closed_by"]):
                    assert f'href="#m{cited["event_id"]}"' in table
            for event in answer["events"]:
                assert f'id="m{event["id"]}"' in why
                body = json.loads(event["body"]["text"])
                inner = json.loads(body["oslo.message"])
                assert f'"message_id": "{inner["message_id"]}"' in html.unescape(why)
            clicks += 1
    assert clicks > 20
    # a month that is named by its end alone
    await site.page("/explain", "alice", measure="instance_hours", end="2026-05-01T00:00")
    # a project's own numbers are explained to it, without the bodies
    why = await site.page("/explain", "alice", measure="instance_hours", project="p1")
    assert ALICES.instance_id in why
    assert "<pre>" not in why
    assert "Nothing adds to it" in await site.page(
        "/explain", "alice", measure="instance_hours", project=ODD
    )


BAD_QUESTIONS = {
    "/explain": "request.invalid",
    "/explain?measure=nonsense": "usage.measure.unknown",
    "/explain?measure=instance_hours&nonsense=1": "usage.group_by.unknown",
    "/explain?measure=instance_hours&project=p1&project=p2": "usage.group.invalid",
    "/explain?measure=instance_hours&day=yesterday": "usage.bucket.invalid",
    "/explain?measure=instance_hours&end=0001-01-01T00:00": "usage.window.invalid",
    "/explain?measure=instance_hours&marker=nonsense": "usage.marker.invalid",
    "/price-books?marker=%00": "request.invalid",
    "/price-books/nobody": "usage.price_book.not_found",
    "/price-books/default?version=99": "usage.price_book.not_found",
    "/price-books/default?version=0": "request.invalid",
    "/?measure=nonsense": "usage.measure.unknown",
    "/?month=2026-13": "request.invalid",
    "/?month=9999-01": "request.invalid",
    "/projects?marker=nonsense": "usage.marker.invalid",
    "/audits?status=nonsense": "request.invalid",
    "/audits?start=2026-05-09T00:00&end=2026-05-08T00:00": "usage.window.invalid",
    "/audits?start=2020-05-09T00:00&end=2026-05-08T00:00": "usage.window.too_long",
    "/audits?end=0001-01-01T00:00": "usage.moment.invalid",
    "/operations?start=9999-12-31T00:00:00-12:00": "usage.moment.invalid",
    "/operations?group_by=nonsense": "request.invalid",
    "/events?event_type=%00": "request.invalid",
    "/events/nonsense": "usage.event.not_found",
    "/resources/instance/nonsense": "usage.resource.not_found",
    "/costs?group_by=nonsense": "usage.group_by.unknown",
    "/costs?group_by=group:Nonsense": "usage.group_by.unknown",
    "/costs?price_book=nobody": "usage.price_book.not_found",
    "/costs?price_book=../x": "request.invalid",
    "/budgets?marker=%00": "request.invalid",
    "/v1/budgets?marker=%00": "request.invalid",
    "/v1/price-books?marker=%00": "request.invalid",
    "/periods?marker=nonsense": "usage.marker.invalid",
    "/periods/nonsense": "usage.period.not_found",
    "/periods/nonsense?of=nonsense": "request.invalid",
    "/quarantine/999999": "quarantine.not_found",
    "/quarantine/0": "request.invalid",
    "/static/usage/../settings.py": "http.404",
    "/static/usage/nonsense.js": "usage.static.not_found",
}


async def test_bad_questions_have_clear_answers(site: Site) -> None:
    for path, code in BAD_QUESTIONS.items():
        status, text, _ = await site.get(path)
        assert 400 <= status < 500, (path, text)
        assert json.loads(text)["code"] == code, path


async def test_a_timeline_may_be_asked_for_at_the_ends_of_the_calendar(site: Site) -> None:
    path = f"/resources/instance/{ALICES.instance_id}"
    for question in (
        {"end": "0001-01-01T00:00:00Z"},
        {"end": "9999-12-31T23:59:59.999999Z"},
        {"start": "0001-01-01T00:00:00Z"},
        {"start": "9999-12-31T23:59:59.999999Z"},
        {"start": "0001-01-01T00:00:00Z", "end": "9999-12-31T23:59:59Z"},
    ):
        status, text, _ = await site.get(path, **question)
        assert status in (200, 422), text


async def test_fields_that_nobody_filled_in_ask_for_nothing(site: Site) -> None:
    names = ("start", "end", "project_id", "region", "resource_type", "resource_id", "host")
    empty = dict.fromkeys(names, "")
    assert ALICES.instance_id in await site.page("/audits", **empty, status="", code="")
    assert ALICES.instance_id in await site.page("/events", **empty, event_type="", marker="")
    assert "create" in await site.page("/operations", **empty, flavor="")
    assert "vCPU hours by day" in await site.page("/", month="", measure="")
    costs = await site.page("/costs", month="", price_book="", group_by="", project_id="")
    assert "Costs by day in EUR" in costs
    assert "b2" in await site.page("/budgets", marker="")
    # a time without a zone is UTC
    day = f"{NOW + timedelta(days=1):%Y-%m-%dT%H:%M}"
    assert "No stored message is like that" in await site.page("/events", start=day)


async def test_a_page_leads_to_the_next_and_keeps_the_question(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hostler_usage.pages.ROWS_SHOWN", 3)
    seen: list[str] = []
    path = f"/events?project_id=p1&resource_id={ALICES.instance_id}"
    while path:
        text = await site.page(path)
        seen += re.findall(r'class="when"><a href="/events/([^"]+)"', text)
        found = re.search(r'<a href="\?([^"]+)" rel="next">', text)
        path = "/events?" + found[1].replace("&amp;", "&") if found else ""
        assert not path or "project_id=p1" in path
    events = await site.api.get(
        "/v1/events", project_id="p1", resource_id=ALICES.instance_id, limit=1000
    )
    assert seen == [event["id"] for event in events["events"]]


async def test_only_own_pages_change_anything_however_the_caller_signed_in(site: Site) -> None:
    first, second = (await site.api.get("/v1/quarantine"))["entries"]
    host = site.url.partition("://")[2]
    basic = aiohttp.encode_basic_auth("anybody", site.secrets["admin"])
    bearer = f"Bearer {site.secrets['admin']}"
    cookie = f"{auth.COOKIE}={site.secrets['admin']}"
    discard, replay = f"/quarantine/{first['id']}/discard", f"/quarantine/{second['id']}/replay"
    for way in ({"Authorization": basic}, {"Authorization": bearer}, {"Cookie": cookie}):
        for about in (
            {},
            {"Origin": "null"},
            {"Origin": "http://elsewhere.example"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site", "Origin": "http://elsewhere.example"},
        ):
            for path in (discard, replay):
                status, text = await site.post(path, **way, **about)
                assert status == 403, (way, about, text)
    for caller, status in (("alice", 403), ("reader", 403), ("operator", 403)):
        asked = {
            "Authorization": f"Bearer {site.secrets[caller]}",
            "Sec-Fetch-Site": "same-origin",
        }
        assert (await site.post(discard, **asked))[0] == status
    assert len((await site.api.get("/v1/quarantine"))["entries"]) == 2

    status, target = await site.post(discard, Cookie=cookie, Origin=f"http://{host}")
    assert (status, target) == (303, "/quarantine?done=discarded")
    assert (await site.post(discard, Cookie=cookie, Origin=f"http://{host}"))[0] == 404
    operator = f"{auth.COOKIE}={site.secrets['operator']}"
    status, target = await site.post(
        replay, **{"Cookie": operator, "Sec-Fetch-Site": "same-origin"}
    )
    assert (status, target) == (303, "/quarantine?done=replayed")
    assert "on its way to its queue" in await site.page(target, "operator")

    async def came_back() -> bool:
        kept = (await site.api.get("/v1/quarantine"))["entries"]
        return bool(kept) and kept[0]["id"] > second["id"] and kept[0]["code"] == second["code"]

    await eventually(came_back)


async def test_static_files_are_the_packages_own_with_their_licence(site: Site) -> None:
    text = await site.page("/")
    addresses = re.findall(r'(?:src|href)="(/static/usage/[^"]+)"', text)
    assert len(addresses) == 4
    for address in addresses:
        async with site.session.get(site.url + address) as answer:
            assert answer.status == 200
            assert "immutable" in answer.headers["Cache-Control"]
            assert answer.headers["Content-Type"].partition(";")[0] in {
                "text/css",
                "text/javascript",
            }
    assert "https:" not in text  # nothing comes from elsewhere
    async with site.session.get(site.url + "/static/usage/uPlot.LICENSE.txt") as answer:
        assert "Leon Sorokin" in await answer.text()


async def test_an_empty_service_says_what_to_do(run_usage: RunUsage) -> None:
    async with run_usage() as service:
        for path, words in {
            "/": "driver = messagingv2",
            "/projects": "Nothing was used",
            "/projects/p1": "used nothing",
            "/audits": "instance_usage_audit",
            "/operations": "No operation began",
            "/events": "none came yet",
            "/quarantine": "Nothing is in quarantine",
        }.items():
            assert words in await service.api.get(path), path


async def test_what_happened_is_drawn_however_many_audits_came_since(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "EVENTS_SHOWN", 4)
    found = (await site.api.get("/v1/events", resource_id=ALICES.instance_id, limit=1000))[
        "events"
    ]
    told = [one for one in found if not one["event_type"].endswith(".exists")]
    text = await site.page(f"/resources/instance/{ALICES.instance_id}")
    drawn = text[: text.index("<h2>Intervals")]
    newest = {one["id"] for one in found[:4]} | {one["id"] for one in told[:4]}
    assert {one["id"] for one in found if f"/events/{one['id']}" in drawn} == newest
    assert len(newest) > 4
