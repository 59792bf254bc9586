"""A token is asked for once, renewed before it ends and when it is refused; the catalogue names the service."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from pydantic import SecretStr

from hostler_common import settings as common_settings
from hostler_precache import testing
from hostler_precache.settings import Settings
from hostler_precache.sources import cloud
from hostler_precache.sources.access import ByKeystone, Service
from hostler_precache.sources.keystone import ApplicationCredential, Keystone, Password
from hostler_precache.sources.source import SourceError

NOW = datetime(2026, 5, 8, 12, tzinfo=UTC)
CREDENTIAL = ApplicationCredential(credential_id="ac", secret=SecretStr("secret"))


def endpoint(url: str, interface: str = "public", region: str = "RegionOne") -> dict[str, Any]:
    return {"url": url, "interface": interface, "region_id": region, "id": "1"}


@dataclass(slots=True)
class Peer:
    """A Keystone and, at every other path, a service that takes the latest token only."""

    url: str = ""
    bodies: list[Any] = field(default_factory=list)
    life: timedelta = timedelta(hours=1)
    catalogue: list[Any] = field(default_factory=list)
    answer: web.Response | None = None
    refusals: int = 0

    async def handle(self, request: web.Request) -> web.Response:
        if request.path == "/v3/auth/tokens":
            self.bodies.append((await request.json())["auth"])
            if self.answer is not None:
                return self.answer
            token = {
                "expires_at": (NOW + self.life).isoformat(),
                "catalog": self.catalogue,
                "methods": ["application_credential"],
            }
            headers = {"X-Subject-Token": f"token-{len(self.bodies)}"}
            return web.json_response({"token": token}, status=201, headers=headers)
        if self.refusals:
            self.refusals -= 1
            return web.Response(status=401)
        return web.Response(text=request.headers["X-Auth-Token"])


@pytest_asyncio.fixture
async def peer() -> AsyncIterator[Peer]:
    made = Peer()
    async with testing.http_server(made.handle) as made.url:
        yield made


@pytest_asyncio.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as opened:
        yield opened


@dataclass(slots=True)
class Clock:
    now: datetime = NOW

    def __call__(self) -> datetime:
        return self.now


async def test_however_many_ask_keystone_is_asked_once_and_again_before_the_token_ends(
    peer: Peer, session: aiohttp.ClientSession
) -> None:
    clock = Clock()
    keystone = Keystone(session, f"{peer.url}/v3/", CREDENTIAL, now=clock)
    tokens = await asyncio.gather(*(keystone.token() for _ in range(20)))
    assert {token.value.get_secret_value() for token in tokens} == {"token-1"}
    assert peer.bodies == [
        {
            "identity": {
                "methods": ["application_credential"],
                "application_credential": {"id": "ac", "secret": "secret"},
            }
        }
    ]
    clock.now = NOW + timedelta(minutes=54)
    assert (await keystone.token()).value.get_secret_value() == "token-1"
    clock.now = NOW + timedelta(minutes=55)
    assert (await keystone.token()).value.get_secret_value() == "token-2"


async def test_a_token_of_a_short_life_is_used_for_half_of_it(
    peer: Peer, session: aiohttp.ClientSession
) -> None:
    peer.life = timedelta(seconds=60)
    clock = Clock()
    keystone = Keystone(session, peer.url, CREDENTIAL, now=clock)
    assert (await keystone.token()).use_until == NOW + timedelta(seconds=30)


async def test_a_password_asks_for_the_project(peer: Peer, session: aiohttp.ClientSession) -> None:
    password = Password(
        username="precache", password=SecretStr("pass"), project="service", user_domain="d"
    )
    await Keystone(session, peer.url, password).token()
    (auth,) = peer.bodies
    user = {"name": "precache", "domain": {"name": "d"}, "password": "pass"}
    assert auth["identity"] == {"methods": ["password"], "password": {"user": user}}
    assert auth["scope"] == {"project": {"name": "service", "domain": {"name": "Default"}}}


@pytest.mark.parametrize(("refusals", "status"), [(0, 200), (1, 200), (2, 401)])
async def test_a_refused_token_is_renewed_once(
    peer: Peer, session: aiohttp.ClientSession, refusals: int, status: int
) -> None:
    peer.refusals = refusals
    keystone = Keystone(session, peer.url, CREDENTIAL, now=Clock())
    service = Service("Glance", session, ByKeystone(keystone, "image", peer.url))
    async with service.get("v2/images") as response:
        assert response.status == status
        if status == 200:
            assert await response.text() == f"token-{1 + refusals}"
    assert len(peer.bodies) == 1 + min(1, refusals)


async def test_a_refusal_of_an_older_token_does_not_end_the_newer_one(
    peer: Peer, session: aiohttp.ClientSession
) -> None:
    keystone = Keystone(session, peer.url, CREDENTIAL, now=Clock())
    old = await keystone.token()
    keystone.refused(old)
    new = await keystone.token()
    keystone.refused(old)
    assert await keystone.token() is new


IMAGE = [
    endpoint("http://a"),
    endpoint("http://b/", "internal"),
    endpoint("http://c", region="Two"),
]


@pytest.mark.parametrize(
    ("interface", "region", "expected"),
    [
        ("public", "RegionOne", "http://a"),
        ("internal", None, "http://b"),
        ("public", "Two", "http://c"),
        ("public", None, "source.endpoint_ambiguous"),
        ("admin", None, "source.no_endpoint"),
        ("internal", "Two", "source.no_endpoint"),
    ],
)
async def test_the_endpoint_is_that_of_the_interface_and_the_region(
    peer: Peer,
    session: aiohttp.ClientSession,
    interface: Any,
    region: str | None,
    expected: str,
) -> None:
    peer.catalogue = [{"type": "image", "endpoints": IMAGE}, {"type": "identity", "endpoints": []}]
    keystone = Keystone(
        session, peer.url, CREDENTIAL, region=region, interface=interface, now=Clock()
    )
    if expected.startswith("http"):
        assert await keystone.endpoint("image") == expected
    else:
        with pytest.raises(SourceError) as caught:
            await keystone.endpoint("image")
        assert caught.value.reason == expected


async def test_a_catalogue_without_the_service_says_what_it_has(
    peer: Peer, session: aiohttp.ClientSession
) -> None:
    peer.catalogue = [{"type": "identity", "endpoints": []}, {"type": "compute"}]
    keystone = Keystone(session, peer.url, CREDENTIAL, now=Clock())
    with pytest.raises(SourceError, match=r"'object-store'.*compute, identity") as caught:
        await keystone.endpoint("object-store")
    assert caught.value.reason == "source.no_endpoint"


@pytest.mark.parametrize(
    ("answer", "reason", "is_transient"),
    [
        (web.Response(status=401), "source.unauthenticated", False),
        (web.Response(status=404), "source.unauthenticated", False),
        (web.Response(status=500), "source.refused", True),
        (web.Response(status=429), "source.refused", True),
        (web.Response(status=300), "source.refused", False),
        (web.Response(status=302, headers={"Location": "/elsewhere"}), "source.refused", False),
        (web.Response(status=201, body=b"<html>"), "source.malformed", False),
        (web.json_response({"token": {}}, status=201), "source.malformed", False),
        (
            web.json_response({"token": {"expires_at": NOW.isoformat()}}, status=201),
            "source.malformed",  # no X-Subject-Token
            False,
        ),
    ],
)
async def test_a_keystone_that_gives_no_token_is_told_apart(
    peer: Peer, session: aiohttp.ClientSession, answer: Any, reason: str, is_transient: bool
) -> None:
    peer.answer = answer
    keystone = Keystone(session, peer.url, CREDENTIAL, now=Clock())
    with pytest.raises(SourceError) as caught:
        await keystone.token()
    assert (caught.value.reason, caught.value.is_transient) == (reason, is_transient)
    assert "secret" not in str(caught.value)


async def test_a_keystone_that_is_away_is_transient(session: aiohttp.ClientSession) -> None:
    keystone = Keystone(session, "http://127.0.0.1:1", CREDENTIAL)
    with pytest.raises(SourceError) as caught:
        await keystone.token()
    assert (caught.value.reason, caught.value.is_transient) == ("source.unreachable", True)


def settings_of(**values: Any) -> Settings:
    return Settings(
        amqp_url=SecretStr("amqp://x"),
        database_url=SecretStr("postgresql://x"),
        auth_mode="none",
        **values,
    )


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"keystone_url": "http://k"}, "KEYSTONE_SECRET_FILE: is not set"),
        (
            {"keystone_url": "http://k", "keystone_secret_file": "SECRET"},
            "KEYSTONE_APPLICATION_CREDENTIAL_ID: is not set",
        ),
        (
            {
                "keystone_url": "http://k",
                "keystone_secret_file": "SECRET",
                "keystone_application_credential_id": "ac",
                "keystone_username": "u",
            },
            "KEYSTONE_USERNAME: is set beside",
        ),
        (
            {
                "keystone_url": "http://k",
                "keystone_secret_file": "SECRET",
                "keystone_username": "u",
            },
            "KEYSTONE_PROJECT: is not set",
        ),
        ({"swift_auth_url": "http://s/auth/v1.0"}, "SWIFT_USER: is not set"),
        ({"swift_auth_url": "http://s", "swift_user": "u"}, "SWIFT_KEY_FILE: is not set"),
        ({"glance_token_file": "/nowhere/token"}, "/nowhere/token: No such file"),
    ],
)
async def test_settings_that_lack_another_say_which(
    session: aiohttp.ClientSession, tmp_path: Path, values: dict[str, Any], said: str
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret\n")
    given = {name: str(secret) if value == "SECRET" else value for name, value in values.items()}
    with pytest.raises(common_settings.SettingsError) as caught:
        cloud.surroundings(settings_of(**given), session)
    assert said in caught.value.detail


async def test_settings_make_what_plugins_are_built_with(
    peer: Peer, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s3cret\n")
    peer.catalogue = [{"type": "image", "endpoints": [endpoint(f"{peer.url}/image/v2/")]}]
    peer.life = timedelta(days=36500)
    made = cloud.surroundings(
        settings_of(
            keystone_url=peer.url,
            keystone_secret_file=str(secret),
            keystone_application_credential_id="ac",
            swift_auth_url="http://s/auth/v1.0",
            swift_user="test:tester",
            swift_key_file=str(secret),
            usage_url="http://usage",
        ),
        session,
    )
    async with made.glance().get("v2/images") as response:
        assert response.url.path == "/image/v2/images"
    assert peer.bodies[0]["identity"]["application_credential"]["secret"] == "s3cret"
    assert made.swift().name == "Swift"
    assert made.usage_url == "http://usage"
    with pytest.raises(SourceError, match="glance_url"):
        cloud.surroundings(settings_of(), session).glance()
