"""The feeds and the hub alone, on a real database and a real port, for tests: no broker, no folding.

What was stored is settled when a test says so, and the hub works when it is told to.
"""

import asyncio
import hashlib
import ipaddress
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp
from aiohttp import web
from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from hostler_common import auth, db, http, settings
from hostler_usage import app
from hostler_usage.feeds import feeds_api, hub_api
from hostler_usage.feeds.atom_testing import ReadFeed, read
from hostler_usage.feeds.callbacks import open_callbacks
from hostler_usage.feeds.feed_store import FeedStore
from hostler_usage.feeds.hub_api import HubTerms
from hostler_usage.feeds.hub_deliver import FeedJobs
from hostler_usage.feeds.hub_store import HubStore
from hostler_usage.feeds.publish import Publisher
from hostler_usage.feeds.websub import Lease
from hostler_usage.reading.envelope import open_body
from hostler_usage.reading.event import Event, Origin
from hostler_usage.reading.mapping_file import packaged
from hostler_usage.reading.normalise import Normaliser
from hostler_usage.settings import Settings
from hostler_usage.store import Store
from hostler_usage.testing import Message

NORMALISER = Normaliser(packaged())
LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"),)
TOKENS = {
    "root": "root:admin:*",
    "ops": "ops:operator:*",
    "one": "one:reader:p1",
    "two": "two:reader:p2",
    "both": "both:reader:p1,p2",
    "agent": "agent:agent:*",
}
"""Tokens that are their own names."""


def instance_event(
    number: int, project: str | None = "p1", *, at: datetime, event_type: str = "", **more: object
) -> Event:
    """The event of instance `number`'s creation."""
    payload: dict[str, object] = {"instance_id": f"i{number}", "memory_mb": 512, **more}
    if project is not None:
        payload["tenant_id"] = project
    message = Message(
        topic="notifications",
        event_type=event_type or "compute.instance.create.end",
        publisher_id="compute.c1",
        timestamp=at,
        message_id=f"00000000-0000-4000-8000-{number:012}",
        payload=payload,
    )
    return stored_event(message.body())


def stored_event(body: bytes) -> Event:
    """The event that a body brings."""
    notification = open_body(body)
    return Event(
        notification=notification,
        normalised=NORMALISER.read(notification, region="RegionOne"),
        body=body,
        region="RegionOne",
        origin=Origin("cloud", "nova", "notifications.info", "application/json", ""),
        headers={},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer of the service."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def feed(self, *, is_yagi: bool = False) -> ReadFeed:
        """The feed document that it is, which must be valid."""
        assert self.status == 200, (self.status, self.body)
        assert self.headers["Content-Type"] == "application/atom+xml; charset=utf-8"
        return read(self.body, is_yagi=is_yagi)


@dataclass(frozen=True, slots=True, kw_only=True)
class Feeds:
    """The running part of the service."""

    url: str
    pool: db.Pool
    store: Store
    feeds: FeedStore
    hub: HubStore
    jobs: FeedJobs
    session: aiohttp.ClientSession
    outcomes: list[str]
    tokens: Path

    async def ingest(self, *events: Event) -> None:
        """These events are stored, in one transaction, and arrive in the order of their times."""
        await self.store.ingest(events)

    async def settle(self) -> None:
        """All that is stored is in the catalogue, if no transaction is open."""
        for _ in range(4):
            await self.jobs.settle()

    async def get(
        self,
        path: str,
        token: str | None = "root",  # noqa: S107  a token for tests
        **headers: str,
    ) -> Reply:
        """The answer to a GET; `path` may be a whole address."""
        url = path if path.startswith("http") else self.url + path
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if token is not None:
            sent["Authorization"] = f"Bearer {token}"
        async with self.session.get(url, headers=sent, allow_redirects=False) as answer:
            return Reply(status=answer.status, headers=answer.headers, body=await answer.read())

    async def ask(
        self,
        token: str | None = "root",  # noqa: S107  a token for tests
        **parameters: str,
    ) -> Reply:
        """The answer of the hub to a request; `topic` may be a path."""
        form = {f"hub.{name}": value for name, value in parameters.items()}
        if form.get("hub.topic", "").startswith("/"):
            form["hub.topic"] = self.url + form["hub.topic"]
        sent = {"Authorization": f"Bearer {token}"} if token else {}
        async with self.session.post(f"{self.url}/hub", data=form, headers=sent) as answer:
            return Reply(status=answer.status, headers=answer.headers, body=await answer.read())


_page = APIRouter()


@_page.get("/", dependencies=[auth.require(auth.Role.READER)])
async def _overview() -> HTMLResponse:
    """The page that is where yagi's feed of everything was."""
    return HTMLResponse("<h1>Usage</h1>")


@asynccontextmanager
async def open_feeds(
    database_url: str,
    directory: Path,
    *,
    page_events: int = 3,
    lease: Lease = Lease(),  # noqa: B008  frozen
    most: int = 1000,
    **overrides: Any,  # noqa: ANN401  settings of any type
) -> AsyncIterator[Feeds]:
    """The feeds and the hub on a migrated database, with tokens; `overrides` are settings."""
    tokens = directory / "tokens"
    tokens.write_text(
        "".join(
            f"{line}:{hashlib.sha256(token.encode()).hexdigest()}\n"
            for token, line in TOKENS.items()
        )
    )
    given: dict[str, Any] = {
        "amqp_url": "amqp://nobody.invalid",
        "database_url": database_url,
        "auth_mode": "token",
        "auth_tokens_file": tokens,
        "http_port": 0,
        "log_level": "WARNING",
    }
    values = settings.load(Settings, **{**given, **overrides})
    await db.migrate(database_url, schema="usage", package=app.PACKAGE)
    outcomes: list[str] = []
    async with (
        db.open_pool(database_url, schema="usage") as pool,
        open_callbacks(LOOPBACK) as callbacks,
        aiohttp.ClientSession() as session,
    ):
        feeds, hub = FeedStore(pool=pool, page_events=page_events), HubStore(pool=pool, most=most)
        publisher = Publisher(store=feeds)
        server = http.Server(
            http.create_app(
                values,
                title="feeds",
                package=app.PACKAGE,
                routers=[
                    feeds_api.yagi_root_router,
                    feeds_api.router,
                    feeds_api.yagi_router,
                    hub_api.router,
                    _page,
                ],
                state={
                    "publisher": publisher,
                    "hub": hub,
                    "hub_terms": HubTerms(lease=lease, allowed=LOOPBACK),
                },
            ),
            values,
        )
        running = asyncio.create_task(server.run())
        try:
            yield Feeds(
                url=f"http://127.0.0.1:{server.port}",
                pool=pool,
                store=Store(pool=pool, writer=uuid4()),
                feeds=feeds,
                hub=hub,
                jobs=FeedJobs(
                    feeds=feeds,
                    hub=hub,
                    publisher=publisher,
                    callbacks=callbacks,
                    # as the service does when it is started anew with a changed file
                    named=lambda name: auth.TokenFile.read(tokens).named(name),
                    at_once=4,
                    count=outcomes.append,
                ),
                session=session,
                outcomes=outcomes,
                tokens=tokens,
            )
        finally:
            await server.drain()
            await running


# --- a subscriber


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """What a subscriber was sent."""

    headers: Mapping[str, str]
    query: Mapping[str, str]
    body: bytes
    at: datetime

    def ids(self, *, is_yagi: bool = False) -> list[str]:
        """The ids of the entries, oldest first; the document must be valid."""
        return read(self.body, is_yagi=is_yagi).ids[::-1]


@dataclass(slots=True)
class Subscriber:
    """A subscriber that does what it is told to: confirm or not, take deliveries or not."""

    url: str
    confirms: bool = True
    status: int = 204
    verifications: list[Mapping[str, str]] = field(default_factory=list)
    denials: list[Mapping[str, str]] = field(default_factory=list)
    deliveries: list[Delivery] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)

    @property
    def ids(self) -> list[str]:
        """The ids of all entries that were delivered and taken, in the order they came."""
        taken = zip(self.deliveries, self.answers, strict=True)
        return [i for delivery, status in taken if status < 300 for i in delivery.ids()]


@asynccontextmanager
async def open_subscriber() -> AsyncIterator[Subscriber]:
    """A subscriber on a port of its own; its callback is `url` with anything after it."""
    subscriber = Subscriber(url="")

    async def get(request: web.Request) -> web.Response:
        query = dict(request.query)
        if query.get("hub.mode") == "denied":
            subscriber.denials.append(query)
            return web.Response(status=200)
        subscriber.verifications.append(query)
        if not subscriber.confirms:
            return web.Response(status=404)
        return web.Response(text=query["hub.challenge"])

    async def post(request: web.Request) -> web.Response:
        subscriber.deliveries.append(
            Delivery(
                headers=request.headers.copy(),
                query=dict(request.query),
                body=await request.read(),
                at=datetime.now(UTC),
            )
        )
        subscriber.answers.append(subscriber.status)
        return web.Response(status=subscriber.status, headers={"Location": "/elsewhere"})

    application = web.Application()
    application.router.add_get("/{path:.*}", get)
    application.router.add_post("/{path:.*}", post)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        addresses: Sequence[tuple[str, int]] = runner.addresses
        subscriber.url = f"http://127.0.0.1:{addresses[0][1]}/in"
        yield subscriber
    finally:
        await runner.cleanup()
