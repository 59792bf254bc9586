"""The WebSub hub against real subscribers on a real PostgreSQL: who is told what, and that nobody misses anything."""

import asyncio
import contextlib
import hashlib
import hmac
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import jwt
import pytest
import pytest_asyncio

from hostler_common import db, servers, testing
from hostler_common.testing import RunningService
from hostler_usage.feeds import hub_deliver
from hostler_usage.feeds.atom_testing import read
from hostler_usage.feeds.callbacks import CallFailedError, open_callbacks
from hostler_usage.feeds.feeds_testing import (
    LOOPBACK,
    TOKENS,
    Feeds,
    Subscriber,
    instance_event,
    open_feeds,
    open_subscriber,
)
from hostler_usage.feeds.websub import Lease
from hostler_usage.testing import Message

NOON = datetime(2026, 5, 8, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)
CREATED = "compute.instance.create.end"
SHORT = Lease(least=60, usual=600, most=3600)
RunUsage = Callable[..., AbstractAsyncContextManager[RunningService]]


@pytest_asyncio.fixture
async def feeds(database_url: str, tmp_path: Path) -> AsyncIterator[Feeds]:
    async with open_feeds(database_url, tmp_path, lease=SHORT, most=5) as running:
        yield running


@pytest_asyncio.fixture
async def subscriber() -> AsyncIterator[Subscriber]:
    async with open_subscriber() as running:
        yield running


def urns(*numbers: int) -> list[str]:
    return [f"urn:uuid:00000000-0000-4000-8000-{number:012}" for number in numbers]


async def store(feeds: Feeds, *numbers: int, project: str | None = "p1", **more: Any) -> None:
    for number in numbers:
        await feeds.ingest(instance_event(number, project, at=NOON + number * SECOND, **more))
    await feeds.settle()


async def subscribe(
    feeds: Feeds,
    subscriber: Subscriber,
    topic: str = "/feeds/all.atom",
    token: str = "root",
    **parameters: str,
) -> None:
    values = {"mode": "subscribe", "topic": topic, "callback": subscriber.url, **parameters}
    answer = await feeds.ask(token, **values)
    assert answer.status == 202, answer.body
    await feeds.jobs.verify()


async def subscriptions(feeds: Feeds, token: str = "root") -> list[dict[str, Any]]:
    answer = await feeds.get("/v1/hub/subscriptions", token)
    assert answer.status == 200, answer.body
    found: list[dict[str, Any]] = json.loads(answer.body)["subscriptions"]
    return found


async def due_now(feeds: Feeds) -> None:
    """As if the time had come for all that waits."""
    await feeds.pool.execute("UPDATE hub_subscription SET next_at = now()")
    await feeds.pool.execute("UPDATE hub_request SET next_at = now()")


# --- subscribing


async def test_a_subscriber_that_confirms_is_told_of_what_comes_and_of_nothing_before(
    feeds: Feeds, subscriber: Subscriber
) -> None:
    await store(feeds, 1, 2)
    await subscribe(feeds, subscriber)
    (verification,) = subscriber.verifications
    assert verification["hub.mode"] == "subscribe"
    assert verification["hub.topic"] == f"{feeds.url}/feeds/all.atom"
    assert verification["hub.lease_seconds"] == "600"
    assert len(verification["hub.challenge"]) >= 32
    await feeds.jobs.deliver()
    assert subscriber.deliveries == []
    await store(feeds, 3, 4)
    await feeds.jobs.deliver()
    await feeds.jobs.deliver()
    (delivery,) = subscriber.deliveries
    assert delivery.ids() == urns(3, 4)
    assert delivery.headers["Content-Type"] == "application/atom+xml; charset=utf-8"
    assert delivery.headers["Link"] == (
        f'<{feeds.url}/hub>; rel="hub", <{feeds.url}/feeds/all.atom>; rel="self"'
    )
    assert "X-Hub-Signature" not in delivery.headers
    document = read(delivery.body)
    assert document.links == {
        "self": f"{feeds.url}/feeds/all.atom",
        "hub": f"{feeds.url}/hub",
    }
    assert document.feed_id == (await feeds.get("/feeds/all.atom")).feed().feed_id
    await store(feeds, 5)
    await feeds.jobs.deliver()
    assert subscriber.ids == urns(3, 4, 5)
    assert feeds.outcomes == ["verified", "delivered", "delivered"]


async def test_a_subscriber_that_does_not_confirm_is_not_subscribed(
    feeds: Feeds, subscriber: Subscriber
) -> None:
    subscriber.confirms = False
    await subscribe(feeds, subscriber)
    await store(feeds, 1)
    await feeds.jobs.deliver()
    assert len(subscriber.verifications) == 1
    assert subscriber.deliveries == []
    assert await subscriptions(feeds) == []
    assert feeds.outcomes == ["unverified"]
    assert await feeds.pool.fetchval("SELECT count(*) FROM hub_request") == 0


async def test_deliveries_are_signed_with_the_secret(feeds: Feeds, subscriber: Subscriber) -> None:
    await subscribe(feeds, subscriber, secret="geheim")
    await store(feeds, 1)
    await feeds.jobs.deliver()
    (delivery,) = subscriber.deliveries
    expected = hmac.new(b"geheim", delivery.body, hashlib.sha256).hexdigest()
    assert delivery.headers["X-Hub-Signature"] == f"sha256={expected}"
    assert b"geheim" not in (await feeds.get("/v1/hub/subscriptions")).body


async def test_the_query_of_a_callback_is_kept(feeds: Feeds, subscriber: Subscriber) -> None:
    await subscribe(feeds, subscriber, callback=f"{subscriber.url}?key=a%2Fb+c&x")
    assert subscriber.verifications[0]["key"] == "a/b c"
    await store(feeds, 1)
    await feeds.jobs.deliver()
    assert dict(subscriber.deliveries[0].query) == {"key": "a/b c", "x": ""}


async def test_unsubscribing_needs_the_subscriber_too(
    feeds: Feeds, subscriber: Subscriber
) -> None:
    await subscribe(feeds, subscriber)
    subscriber.confirms = False
    await subscribe(feeds, subscriber, token="one", mode="unsubscribe")
    assert len(await subscriptions(feeds)) == 1
    subscriber.confirms = True
    await subscribe(feeds, subscriber, mode="unsubscribe")
    assert [v["hub.mode"] for v in subscriber.verifications] == [
        "subscribe",
        "unsubscribe",
        "unsubscribe",
    ]
    assert await subscriptions(feeds) == []
    await store(feeds, 1)
    await feeds.jobs.deliver()
    assert subscriber.deliveries == []


async def test_requests_about_one_callback_are_verified_in_their_order(
    feeds: Feeds, subscriber: Subscriber
) -> None:
    for mode in ("subscribe", "unsubscribe", "subscribe", "unsubscribe"):
        answer = await feeds.ask(mode=mode, topic="/feeds/all.atom", callback=subscriber.url)
        assert answer.status == 202
    await feeds.jobs.verify()
    modes = [verification["hub.mode"] for verification in subscriber.verifications]
    assert modes == ["subscribe", "unsubscribe"] * 2
    assert await subscriptions(feeds) == []


async def test_a_request_waits_for_the_one_before_it(feeds: Feeds, subscriber: Subscriber) -> None:
    for mode in ("subscribe", "unsubscribe"):
        await feeds.ask(mode=mode, topic="/feeds/all.atom", callback=subscriber.url)
    first = await feeds.hub.claim_request()
    assert first is not None
    assert first.mode == "subscribe"
    assert await feeds.hub.claim_request() is None
    await feeds.hub.verified(first)
    second = await feeds.hub.claim_request()
    assert second is not None
    assert second.mode == "unsubscribe"


@pytest.mark.parametrize(
    ("wrong", "status"),
    [
        ({"mode": "publish"}, 422),
        ({"callback": "not an address"}, 422),
        ({"callback": "ftp://x/"}, 422),
        ({"topic": "http://elsewhere.example/feeds/all.atom"}, 404),
        ({"topic": "/feeds/all.atom?archive=3"}, 404),
        ({"topic": "/v1/events"}, 404),
        ({"topic": "/feeds/projects/p2.atom"}, 404),
        ({"callback": "http://[::1]:8302/v1/quarantine"}, 403),
        ({"callback": "http://169.254.169.254/latest/meta-data"}, 403),
        ({"callback": "http://[::ffff:169.254.169.254]/"}, 403),
        ({"lease_seconds": "for ever"}, 422),
        ({"secret": "s" * 200}, 422),
    ],
)
async def test_a_request_that_cannot_be_granted_is_refused_at_once(
    feeds: Feeds, subscriber: Subscriber, wrong: dict[str, str], status: int
) -> None:
    values = {"mode": "subscribe", "topic": "/feeds/all.atom", "callback": subscriber.url}
    answer = await feeds.ask("one", **{**values, **wrong})
    assert answer.status == status, answer.body
    assert json.loads(answer.body)["code"].startswith("usage.hub.")
    assert await feeds.pool.fetchval("SELECT count(*) FROM hub_request") == 0


async def test_only_callers_with_a_token_ask(feeds: Feeds, subscriber: Subscriber) -> None:
    values = {"mode": "subscribe", "topic": "/feeds/all.atom", "callback": subscriber.url}
    for token, status in ((None, 401), ("nobody", 401), ("agent", 403)):
        assert (await feeds.ask(token, **values)).status == status
    assert (await feeds.ask("root")).status == 422


async def test_a_caller_has_a_bounded_number_of_subscriptions(
    feeds: Feeds, subscriber: Subscriber
) -> None:
    for number in range(5):
        await subscribe(feeds, subscriber, token="one", callback=f"{subscriber.url}/{number}")
    values = {"mode": "subscribe", "topic": "/feeds/all.atom"}
    answer = await feeds.ask("one", callback=f"{subscriber.url}/5", **values)
    assert (answer.status, answer.headers["Retry-After"]) == (429, "1")
    # renewing is no new one, and others have their own
    assert (await feeds.ask("one", callback=f"{subscriber.url}/4", **values)).status == 202
    assert (await feeds.ask("two", callback=f"{subscriber.url}/5", **values)).status == 202


# --- leases


async def test_a_lease_is_what_was_asked_for_within_bounds(
    feeds: Feeds, subscriber: Subscriber
) -> None:
    for asked, granted in (("1", 60), ("120", 120), ("999999999", 3600)):
        await subscribe(feeds, subscriber, lease_seconds=asked)
        assert subscriber.verifications[-1]["hub.lease_seconds"] == str(granted)
        (found,) = await subscriptions(feeds)
        lasts = datetime.fromisoformat(found["expires_at"]) - datetime.fromisoformat(
            found["verified_at"]
        )
        assert lasts == timedelta(seconds=granted)


async def test_a_lease_is_no_longer_than_the_signed_token_that_asked_for_it(
    database_url: str, tmp_path: Path, subscriber: Subscriber
) -> None:
    key = tmp_path / "key"
    key.write_text("of a test, and as long as such a key has to be")
    by_token: dict[str, Any] = {
        "auth_mode": "jwt",
        "jwt_issuer": "https://idp.example/",
        "jwt_audience": "hostler",
        "jwt_key_file": key,
        "jwt_algorithms": ["HS256"],
    }
    async with open_feeds(database_url, tmp_path, lease=SHORT, **by_token) as feeds:
        for lasts, asked, longest in ((300, "3600", 300), (3000, "120", 120), (30, "3600", 30)):
            claims = {
                "sub": "portal",
                "iss": "https://idp.example/",
                "aud": "hostler",
                "exp": int(datetime.now(UTC).timestamp()) + lasts,
                "hostler_role": "reader",
                "hostler_projects": ["p1"],
            }
            token = jwt.encode(claims, key.read_text(), algorithm="HS256")
            await subscribe(feeds, subscriber, token=token, lease_seconds=asked)
            # the subscriber is told how long that is, and when to renew with a token of then
            granted = int(subscriber.verifications[-1]["hub.lease_seconds"])
            assert longest - 20 <= granted <= longest


async def test_a_lease_ends_with_the_token_however_late_the_subscriber_is_asked(
    database_url: str, tmp_path: Path, subscriber: Subscriber
) -> None:
    key = tmp_path / "key"
    key.write_text("of a test, and as long as such a key has to be")
    ends = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=3000)
    claims = {
        "sub": "portal",
        "iss": "https://idp.example/",
        "aud": "hostler",
        "exp": int(ends.timestamp()),
        "hostler_role": "reader",
        "hostler_projects": ["p1"],
    }
    token = jwt.encode(claims, key.read_text(), algorithm="HS256")
    by_token: dict[str, Any] = {
        "auth_mode": "jwt",
        "jwt_issuer": "https://idp.example/",
        "jwt_audience": "hostler",
        "jwt_key_file": key,
        "jwt_algorithms": ["HS256"],
    }
    values = {"mode": "subscribe", "topic": "/feeds/all.atom", "lease_seconds": "3600"}
    late = "UPDATE hub_request SET token_ends_at = token_ends_at - $1::interval"
    async with open_feeds(database_url, tmp_path, lease=SHORT, **by_token) as feeds:
        await feeds.ask(token, callback=subscriber.url, **values)
        await feeds.pool.execute(late, timedelta(seconds=2000))
        await feeds.jobs.verify()
        assert 980 <= int(subscriber.verifications[-1]["hub.lease_seconds"]) <= 1000
        lasts_until = "SELECT expires_at FROM hub_subscription"
        found = await feeds.pool.fetchval(lasts_until)
        assert ends - timedelta(seconds=2020) <= found <= ends - timedelta(seconds=2000)
        # a renewal whose token has ended meanwhile is none, and leaves what there is
        await feeds.ask(token, callback=subscriber.url, **values)
        await feeds.pool.execute(late, timedelta(seconds=3000))
        await feeds.jobs.verify()
        assert len(subscriber.verifications) == 1
        assert await feeds.pool.fetchval("SELECT count(*) FROM hub_request") == 0
        assert await feeds.pool.fetchval(lasts_until) == found
        assert feeds.outcomes == ["verified", "lapsed"]


def rewrite(feeds: Feeds, **lines: str | None) -> None:
    """The tokens' lines are these; None: the token is gone."""
    kept = [
        f"{line}:{hashlib.sha256(token.encode()).hexdigest()}\n"
        for token, line in {**TOKENS, **lines}.items()
        if line is not None
    ]
    feeds.tokens.write_text("".join(kept))


async def test_a_subscriber_whose_token_is_revoked_is_told_nothing_more_but_why(
    feeds: Feeds, subscriber: Subscriber
) -> None:
    await subscribe(feeds, subscriber, token="one")
    await store(feeds, 1)
    await feeds.jobs.deliver()
    assert subscriber.ids == urns(1)
    rewrite(feeds, one=None)
    await store(feeds, 2)
    await feeds.jobs.deliver()
    assert await subscriptions(feeds) == []
    await feeds.jobs.verify()
    assert subscriber.ids == urns(1)
    (denial,) = subscriber.denials
    assert denial["hub.reason"] == "whoever subscribed may see nothing of it any more"
    assert feeds.outcomes[-2:] == ["ended", "denied"]


async def test_a_subscriber_is_told_what_its_token_may_see_then_and_now(
    feeds: Feeds, subscriber: Subscriber
) -> None:
    await subscribe(feeds, subscriber, token="both")
    await store(feeds, 1, project="p1")
    await store(feeds, 2, project="p2")
    await feeds.jobs.deliver()
    rewrite(feeds, both="both:reader:p2,p3")
    await store(feeds, 3, project="p1")
    await store(feeds, 4, project="p2")
    await store(feeds, 5, project="p3")
    await due_now(feeds)
    await feeds.jobs.deliver()
    assert subscriber.ids == urns(1, 2, 4)
    rewrite(feeds, both="both:agent:*")  # an agent reads nothing
    await store(feeds, 6, project="p2")
    await due_now(feeds)
    await feeds.jobs.deliver()
    assert (subscriber.ids, await subscriptions(feeds)) == (urns(1, 2, 4), [])


async def test_a_project_that_is_taken_away_ends_its_feeds_subscription(
    feeds: Feeds, subscriber: Subscriber
) -> None:
    await subscribe(feeds, subscriber, "/feeds/projects/p1.atom", token="both")
    rewrite(feeds, both="both:reader:p2")
    await store(feeds, 1, project="p1")
    await feeds.jobs.deliver()
    assert (subscriber.deliveries, await subscriptions(feeds)) == ([], [])


async def test_a_lease_that_has_ended_ends_the_subscription(
    feeds: Feeds, subscriber: Subscriber
) -> None:
    await subscribe(feeds, subscriber)
    await feeds.pool.execute("UPDATE hub_subscription SET expires_at = now()")
    await store(feeds, 1)
    await feeds.jobs.deliver()
    assert subscriber.deliveries == []
    await feeds.jobs.expire()
    assert await subscriptions(feeds) == []


async def test_renewing_interrupts_nothing_and_replaces_the_secret(
    feeds: Feeds, subscriber: Subscriber
) -> None:
    await subscribe(feeds, subscriber, secret="old")
    await store(feeds, 1)
    subscriber.confirms = False
    await subscribe(feeds, subscriber, secret="forged")
    subscriber.confirms = True
    await store(feeds, 2)
    await subscribe(feeds, subscriber, secret="new")
    await feeds.jobs.deliver()
    (delivery,) = subscriber.deliveries
    assert delivery.ids() == urns(1, 2)
    expected = hmac.new(b"new", delivery.body, hashlib.sha256).hexdigest()
    assert delivery.headers["X-Hub-Signature"] == f"sha256={expected}"


async def test_who_comes_back_after_the_lease_begins_anew(
    feeds: Feeds, subscriber: Subscriber
) -> None:
    await subscribe(feeds, subscriber)
    await feeds.pool.execute("UPDATE hub_subscription SET expires_at = now()")
    await store(feeds, 1)
    await subscribe(feeds, subscriber)
    await store(feeds, 2)
    await feeds.jobs.deliver()
    assert subscriber.ids == urns(2)


# --- what is delivered


async def test_each_topic_has_its_own_news(feeds: Feeds) -> None:
    topics = {
        "/feeds/all.atom": urns(1, 2, 3),
        "/feeds/types/volume.create.end.atom": urns(3),
        f"/yagi/{CREATED}": urns(1, 2),
        "/feeds/projects/p2.atom": urns(2, 3),
    }
    async with open_subscriber() as reader:
        for number, topic in enumerate(topics):
            await subscribe(feeds, reader, topic, callback=f"{reader.url}/{number}?n={number}")
        await store(feeds, 1)
        await store(feeds, 2, project="p2")
        await store(feeds, 3, project="p2", event_type="volume.create.end")
        await feeds.jobs.deliver()
        told = {
            delivery.query["n"]: delivery.ids(is_yagi=delivery.query["n"] == "2")
            for delivery in reader.deliveries
        }
    assert told == {str(n): ids for n, ids in enumerate(topics.values())}


async def test_a_delivery_names_the_topic_as_the_subscriber_spelled_it(feeds: Feeds) -> None:
    spelled = (
        "/feeds/projects/a:b.atom",
        "/feeds/projects/a%3Ab.atom",
        "/feeds/projects/a%3ab.atom",
    )
    async with open_subscriber() as reader:
        for number, topic in enumerate(spelled):
            await subscribe(feeds, reader, topic, callback=f"{reader.url}/{number}?n={number}")
        await store(feeds, 1, project="a:b")
        await feeds.jobs.deliver()
        told = {one.query["n"]: one.headers["Link"] for one in reader.deliveries}
    assert told == {
        str(n): f'<{feeds.url}/hub>; rel="hub", <{feeds.url}{topic}>; rel="self"'
        for n, topic in enumerate(spelled)
    }


async def test_a_subscription_sees_what_its_maker_saw(feeds: Feeds) -> None:
    async with open_subscriber() as one, open_subscriber() as two:
        await subscribe(feeds, one, token="one")
        await subscribe(feeds, two, f"/feeds/types/{CREATED}.atom", token="two")
        for number in range(1, 7):
            await store(feeds, number, project=["p1", "p2", None][number % 3])
        await feeds.jobs.deliver()
        assert one.ids == urns(3, 6)
        assert two.ids == urns(1, 4)
        for reader, project in ((one, "p1"), (two, "p2")):
            for delivery in reader.deliveries:
                for entry in read(delivery.body).entries:
                    assert entry.content["project_id"] == project
                    assert "payload" not in entry.content
        told = len(one.deliveries), len(two.deliveries)
        await store(feeds, 7, project="p3")
        await feeds.jobs.deliver()
        assert (len(one.deliveries), len(two.deliveries)) == told
    assert {s["caller"]: s["projects"] for s in await subscriptions(feeds)} == {
        "one": ["p1"],
        "two": ["p2"],
    }
    # each sees its own; a callback is nobody else's to know
    (own,) = await subscriptions(feeds, "one")
    assert own["caller"] == "one"
    assert own["callback"] is not None
    assert all(found["callback"] is None for found in await subscriptions(feeds, "ops"))


async def test_a_long_backlog_is_delivered_in_parts_and_order(
    feeds: Feeds, subscriber: Subscriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_deliver, "DELIVERY_EVENTS", 10)
    await subscribe(feeds, subscriber)
    await feeds.ingest(*(instance_event(n, at=NOON + n * SECOND) for n in range(1, 36)))
    await feeds.settle()
    await feeds.jobs.deliver()
    assert [len(delivery.ids()) for delivery in subscriber.deliveries] == [10, 10, 10, 5]
    assert subscriber.ids == urns(*range(1, 36))


async def test_an_event_that_commits_late_is_delivered(
    feeds: Feeds, subscriber: Subscriber
) -> None:
    await subscribe(feeds, subscriber)
    await store(feeds, 1)
    await feeds.jobs.deliver()
    async with db.connection(feeds.pool) as connection:
        late = connection.transaction()
        await late.start()
        await connection.execute(
            "INSERT INTO raw_event (event_time, message_id, body_sha256, origin, region,"
            " event_type, publisher_id, priority, has_own_id, is_known, body) SELECT event_time,"
            " $1, body_sha256, origin, region, event_type, publisher_id, priority, has_own_id,"
            " is_known, body FROM raw_event LIMIT 1",
            "00000000-0000-4000-8000-000000000050",
        )
        await store(feeds, 2, 3)
        await feeds.jobs.deliver()
        await late.commit()
    await feeds.settle()
    await feeds.jobs.deliver()
    assert subscriber.ids == urns(1, 50, 2, 3)


# --- subscribers that fail


async def test_a_failing_subscriber_is_tried_again_and_misses_nothing(
    feeds: Feeds, subscriber: Subscriber
) -> None:
    await subscribe(feeds, subscriber)
    waits = []
    for number, status in enumerate((500, 404, 302, 503), start=1):
        subscriber.status = status
        await store(feeds, number)
        await feeds.jobs.deliver()
        await feeds.jobs.deliver()
        assert len(subscriber.deliveries) == number, "it was not left in peace"
        (found,) = await subscriptions(feeds)
        assert (found["failures"], found["last_answer"]) == (number, f"status {status}")
        waits.append(
            await feeds.pool.fetchval(
                "SELECT extract(epoch FROM next_at - now())::float FROM hub_subscription"
            )
        )
        await due_now(feeds)
    assert waits == sorted(waits)
    subscriber.status = 200
    await feeds.jobs.deliver()
    assert subscriber.ids == urns(1, 2, 3, 4)
    (found,) = await subscriptions(feeds)
    assert (found["failures"], found["behind"], found["last_answer"]) == (0, 0, "status 200")


async def test_a_subscriber_that_is_gone_is_not_called_again(
    feeds: Feeds, subscriber: Subscriber
) -> None:
    await subscribe(feeds, subscriber)
    subscriber.status = 410
    await store(feeds, 1)
    await feeds.jobs.deliver()
    await store(feeds, 2)
    await due_now(feeds)
    await feeds.jobs.deliver()
    assert len(subscriber.deliveries) == 1
    assert await subscriptions(feeds) == []
    assert feeds.outcomes == ["verified", "gone"]


async def test_a_subscriber_that_cannot_be_reached_delays_nobody(
    feeds: Feeds, subscriber: Subscriber
) -> None:
    async with open_subscriber() as lost:
        await subscribe(feeds, lost)
    await subscribe(feeds, subscriber)
    await store(feeds, 1)
    await feeds.jobs.deliver()
    assert subscriber.ids == urns(1)
    failing = [found for found in await subscriptions(feeds) if found["failures"]]
    assert len(failing) == 1
    assert "ClientConnectorError" in failing[0]["last_answer"]


async def test_verification_of_who_cannot_be_reached_is_tried_a_few_times(feeds: Feeds) -> None:
    callback = f"http://127.0.0.1:{servers.free_port()}/in"
    answer = await feeds.ask(mode="subscribe", topic="/feeds/all.atom", callback=callback)
    assert answer.status == 202
    for attempt in range(1, hub_deliver.VERIFY_ATTEMPTS + 1):
        assert await feeds.pool.fetchval("SELECT attempts FROM hub_request") == attempt - 1
        await feeds.jobs.verify()
        await feeds.jobs.verify()
        await due_now(feeds)
    assert await feeds.pool.fetchval("SELECT count(*) FROM hub_request") == 0
    assert feeds.outcomes == ["unreachable"]


async def test_an_operator_ends_a_subscription_and_the_subscriber_hears_of_it(
    feeds: Feeds, subscriber: Subscriber
) -> None:
    await subscribe(feeds, subscriber, token="one")
    (found,) = await subscriptions(feeds)
    url = f"{feeds.url}/v1/hub/subscriptions/{found['id']}?reason=too+much"

    async def delete(token: str) -> int:
        headers = {"Authorization": f"Bearer {token}"}
        async with feeds.session.delete(url, headers=headers) as answer:
            return answer.status

    assert [await delete(token) for token in ("one", "ops", "ops")] == [403, 204, 404]
    await feeds.jobs.verify()
    (denial,) = subscriber.denials
    assert denial["hub.topic"] == f"{feeds.url}/feeds/all.atom"
    assert denial["hub.reason"] == "too much"
    await store(feeds, 1)
    await feeds.jobs.deliver()
    assert subscriber.deliveries == []


# --- where the hub does not go


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_the_hub_does_not_call_its_own_machine(subscriber: Subscriber, host: str) -> None:
    url = subscriber.url.replace("127.0.0.1", host)
    async with open_callbacks() as callbacks:
        with pytest.raises(CallFailedError, match="none that the hub may call"):
            await callbacks.get(url + "?hub.challenge=x")
    assert subscriber.verifications == []


async def test_the_hub_reads_no_more_of_an_answer_than_it_needs_and_follows_nothing() -> None:
    answered: asyncio.Queue[None] = asyncio.Queue()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = await reader.readline()
        if b"/redirect" in line:
            writer.write(b"HTTP/1.1 307 X\r\nLocation: /in\r\nContent-Length: 0\r\n\r\n")
        elif b"/nonsense" in line:
            writer.write(b"\x00\x01\x02 nonsense\r\n\r\n")
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n" + b"x" * 5000)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
            await reader.read()  # until the hub hangs up
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        answered.put_nowait(None)

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    base = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, open_callbacks(LOOPBACK) as callbacks:
        found = await callbacks.get(f"{base}/endless")
        assert (found.status, found.body) == (200, b"x" * 1025)
        assert (await callbacks.get(f"{base}/redirect")).status == 307
        with pytest.raises(CallFailedError):
            await callbacks.get(f"{base}/nonsense")
        for _ in range(3):
            await answered.get()


# --- several replicas, and death


async def test_replicas_share_the_work(database_url: str, tmp_path: Path) -> None:
    async with (
        open_feeds(database_url, tmp_path) as feeds,
        open_feeds(database_url, tmp_path) as other,
        open_subscriber() as reader,
    ):
        for number in range(12):
            await feeds.ask(
                mode="subscribe",
                topic="/feeds/all.atom",
                callback=f"{reader.url}/{number}?n={number}",
            )
        await asyncio.gather(feeds.jobs.verify(), other.jobs.verify())
        assert sorted(feeds.outcomes + other.outcomes) == ["verified"] * 12
        random = Random(4)
        for number in range(1, 30):
            await feeds.ingest(instance_event(number, at=NOON + number * SECOND))
            if random.random() < 0.3:
                await asyncio.gather(
                    feeds.jobs.settle(),
                    other.jobs.settle(),
                    feeds.jobs.deliver(),
                    other.jobs.deliver(),
                )
        await feeds.settle()
        await asyncio.gather(feeds.jobs.deliver(), other.jobs.deliver())
        for number in range(12):
            told = [d for d in reader.deliveries if d.query["n"] == str(number)]
            assert [i for delivery in told for i in delivery.ids()] == urns(*range(1, 30))


VICTIM = """
import asyncio, sys
from pathlib import Path
from hostler_usage.feeds.feeds_testing import open_feeds

async def main():
    async with open_feeds(sys.argv[1], Path(sys.argv[2])) as feeds:
        print("up", flush=True)
        while True:
            await feeds.jobs.settle()
            await feeds.jobs.deliver()
            await asyncio.sleep(0.01)

asyncio.run(main())
"""


async def test_a_killed_hub_tells_again_what_it_had_not_written_down(
    database_url: str, tmp_path: Path, subscriber: Subscriber
) -> None:
    async with open_feeds(database_url, tmp_path) as feeds:
        await subscribe(feeds, subscriber)
        random, number, kills = Random(7), 0, 0
        while kills < 3:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                VICTIM,
                database_url,
                str(tmp_path),
                stdout=asyncio.subprocess.PIPE,
            )
            assert process.stdout is not None
            while b"up" not in (line := await process.stdout.readline()):
                assert line, "it died before it was up"
            before = len(subscriber.deliveries)
            goal = before + random.randrange(1, 4)

            async def is_time(goal: int = goal) -> bool:
                nonlocal number
                number += 1
                await feeds.ingest(instance_event(number, at=NOON + number * SECOND))
                return len(subscriber.deliveries) >= goal

            await testing.eventually(is_time)
            process.kill()
            await process.wait()
            kills += 1
            await due_now(feeds)  # as if the claim of the dead had run out
        await feeds.settle()
        await feeds.jobs.deliver()
        # at least once, and in order where a repetition is seen as one
        assert list(dict.fromkeys(subscriber.ids)) == urns(*range(1, number + 1))


async def test_a_claim_that_was_taken_over_changes_nothing(
    feeds: Feeds, subscriber: Subscriber
) -> None:
    await subscribe(feeds, subscriber)
    await store(feeds, 1)
    straggler = await feeds.hub.claim_subscription()
    assert straggler is not None
    assert await feeds.hub.claim_subscription() is None
    await due_now(feeds)
    await feeds.jobs.deliver()
    await store(feeds, 2)
    await feeds.hub.failed(straggler, 3600, "late")
    await feeds.hub.told(straggler, 10**9, "status 200")
    await feeds.jobs.deliver()
    assert subscriber.ids == urns(1, 2)


# --- the whole service


async def test_a_subscriber_is_told_of_a_broker_s_messages(
    run_usage: RunUsage, publish: Callable[..., Any], subscriber: Subscriber
) -> None:
    async with (
        run_usage(feed_seconds=0.05, hub_callback_networks=["127.0.0.0/8"]) as service,
        aiohttp.ClientSession() as session,
    ):
        form = {
            "hub.mode": "subscribe",
            "hub.topic": f"{service.url}/feeds/all.atom",
            "hub.callback": subscriber.url,
        }
        async with session.post(f"{service.url}/hub", data=form) as answer:
            assert answer.status == 202

        async def is_subscribed() -> Any:
            return (await service.api.get("/v1/hub/subscriptions"))["subscriptions"]

        await testing.eventually(is_subscribed)
        message = Message(
            topic="notifications",
            event_type=CREATED,
            publisher_id="compute.c1",
            timestamp=NOON,
            message_id="00000000-0000-4000-8000-000000000001",
            payload={"instance_id": "i1", "tenant_id": "p1"},
        )
        await publish([message.body()])

        async def is_told() -> bool:
            return bool(subscriber.deliveries)

        await testing.eventually(is_told)
        assert subscriber.ids == urns(1)
