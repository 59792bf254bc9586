"""Who calls: tokens in a file, signed tokens, and a key set served by a tiny identity provider."""

import base64
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import jwt
import pytest
import pytest_asyncio
from aiohttp import web
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from hostler_common import auth, errors, settings
from hostler_common.auth import Principal, Role

# --- tokens in a file


def line(name: str = "me", role: str = "reader", projects: str = "*", token: str = "t") -> str:
    return f"{name}:{role}:{projects}:{hashlib.sha256(token.encode()).hexdigest()}"


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return tmp_path / "tokens"


def read(path: Path, *lines: str) -> auth.TokenFile:
    path.write_text("\n".join(lines))
    return auth.TokenFile.read(path)


async def test_a_token_is_its_lines_principal(tokens: Path) -> None:
    file = read(
        tokens,
        "# callers",
        "",
        line("billing", "reader", "p1, p2", "one"),
        line("ops", "admin", "*", "two"),
    )
    assert await file.verify("one") == Principal(
        name="billing", role=Role.READER, projects=frozenset({"p1", "p2"})
    )
    assert await file.verify("two") == Principal(name="ops", role=Role.ADMIN, projects=None)
    for wrong in ("three", "", "one ", hashlib.sha256(b"one").hexdigest()):
        with pytest.raises(errors.Unauthenticated) as caught:
            await file.verify(wrong)
        assert not wrong or wrong not in caught.value.detail


async def test_who_bears_a_name_now_is_known_of_a_file_and_of_no_other(tokens: Path) -> None:
    file = read(
        tokens,
        line("billing", "reader", "p1", "one"),
        line("billing", "reader", "p2", "two"),
        line("ops", "admin", "*", "three"),
    )
    found = [holder.projects for holder in file.named("billing")]
    assert found == [frozenset({"p1"}), frozenset({"p2"})]
    assert file.named("nobody") == []
    assert auth.NoVerifier().named("billing") is None
    assert jwt_verifier(key="k").named("billing") is None


@pytest.mark.parametrize(
    "bad",
    [
        "hunter2",
        line(role="king"),
        line(name=""),
        line(projects=""),
        "me:reader:*:00ff",
        "me:reader:*:" + "xy" * 32,
        line() + ":more",
        "me:reader:" + hashlib.sha256(b"t").hexdigest(),
    ],
)
def test_a_bad_line_is_named_by_its_number_and_not_its_text(tokens: Path, bad: str) -> None:
    tokens.write_text(f"{line()}\n\n{bad}\n")
    with pytest.raises(settings.SettingsError, match="line 3: expected name:role") as caught:
        auth.TokenFile.read(tokens)
    assert bad not in caught.value.detail


@pytest.mark.parametrize("content", [b"", b"# nobody\n\n", b"\xff\xfe:reader:*:00"])
def test_a_file_without_a_token_or_that_is_no_text_is_refused(
    tokens: Path, content: bytes
) -> None:
    tokens.write_bytes(content)
    with pytest.raises(settings.SettingsError, match="tokens"):
        auth.TokenFile.read(tokens)
    with pytest.raises(settings.SettingsError, match="No such file"):
        auth.TokenFile.read(tokens.with_name("absent"))


@pytest.mark.parametrize(
    ("name", "role", "host"),
    [
        ("agent@node-1.example", Role.AGENT, "node-1.example"),
        ("agent@", Role.AGENT, ""),
        ("agents", Role.AGENT, None),
        ("xagent@node-1", Role.AGENT, None),
        ("agent@node-1", Role.OPERATOR, None),
    ],
)
def test_an_agents_token_speaks_for_the_host_in_its_name_and_for_no_other(
    name: str, role: Role, host: str | None
) -> None:
    caller = Principal(name=name, role=role)
    assert caller.host == host
    if host is None:
        caller.speak_for("whichever")
        return
    caller.speak_for(host)
    for other in ("node-1", "node-1.example.org", "NODE-1.example", "agent@node-1.example"):
        with pytest.raises(auth.OtherHost, match="its own host only") as caught:
            caller.speak_for(other)
        assert (caught.value.status, caught.value.code) == (403, "auth.other_host")


async def test_a_new_token_is_known_by_its_line_which_does_not_hold_it(tokens: Path) -> None:
    token, new_line = auth.new_token(name="ci", role=Role.OPERATOR, projects="p1")
    assert await read(tokens, new_line).verify(token) == Principal(
        name="ci", role=Role.OPERATOR, projects=frozenset({"p1"})
    )
    assert token not in new_line
    assert len(token) >= 43


@pytest.mark.parametrize(
    ("role", "may"),
    [
        (Role.READER, {Role.READER}),
        (Role.AGENT, {Role.AGENT}),
        (Role.OPERATOR, {Role.READER, Role.AGENT, Role.OPERATOR}),
        (Role.ADMIN, set(Role)),
    ],
)
def test_what_each_role_may(role: Role, may: set[Role]) -> None:
    principal = Principal(name="x", role=role)
    assert {each for each in Role if principal.has(each)} == may


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    ("header", "token"),
    [
        ("Bearer abc", "abc"),
        ("bearer  abc ", "abc"),
        ("Bearer ", None),
        ("abc", None),
        (None, None),
        ("Digest abc", None),
        (basic("anybody:abc"), "abc"),
        (basic("anybody:a:b"), "a:b"),
        (basic("anybody:"), None),
        (basic("abc"), None),
        ("Basic %%%", None),
        ("Basic " + base64.b64encode(b"x:\xff").decode(), None),
    ],
)
def test_the_token_of_an_authorization_header(header: str | None, token: str | None) -> None:
    assert auth.token_of(header) == token


# --- signed tokens


def make_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


KEY, OTHER_KEY = make_key(), make_key()


def public_pem(key: rsa.RSAPrivateKey) -> str:
    return (
        key.public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        .decode()
    )


def claims(**more: Any) -> dict[str, Any]:
    found = {
        "sub": "billing",
        "iss": "https://idp.example/",
        "aud": "hostler",
        "exp": time.time() + 60,
        "hostler_role": "reader",
        "hostler_projects": ["p1"],
        **more,
    }
    return {name: value for name, value in found.items() if value is not None}


def signed(key: rsa.RSAPrivateKey = KEY, *, kid: str | None = None, **more: Any) -> str:
    headers = {"kid": kid} if kid else None
    return jwt.encode(claims(**more), key, algorithm="RS256", headers=headers)


def jwt_verifier(**more: Any) -> auth.JwtVerifier:
    return auth.JwtVerifier(
        issuer="https://idp.example/", audience="hostler", algorithms=["RS256", "ES256"], **more
    )


async def test_a_good_signed_token_is_its_claims_principal() -> None:
    verifier = jwt_verifier(key=public_pem(KEY))
    assert await verifier.verify(signed()) == Principal(
        name="billing", role=Role.READER, projects=frozenset({"p1"})
    )
    everything = await verifier.verify(signed(hostler_role="admin", hostler_projects="*"))
    assert everything == Principal(name="billing", role=Role.ADMIN, projects=None)
    assert everything.expires_at is not None
    assert abs(everything.expires_at.timestamp() - time.time() - 60) < 10
    for_ever = await verifier.verify(signed(exp=10**15))
    assert for_ever.expires_at == datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
    nothing = await verifier.verify(signed(hostler_projects=None))
    assert nothing.projects == frozenset()  # what is not said is not seen


def encoded(part: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()


def unsigned(algorithm: str) -> str:
    return f"{encoded({'alg': algorithm, 'typ': 'JWT'})}.{encoded(claims())}."


def signed_with_the_public_key() -> str:
    head = f"{encoded({'alg': 'HS256', 'typ': 'JWT'})}.{encoded(claims())}"
    digest = hmac.new(public_pem(KEY).encode(), head.encode(), "sha256").digest()
    return f"{head}.{base64.urlsafe_b64encode(digest).rstrip(b'=').decode()}"


def b64(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).rstrip(b"=").decode()


def signed_text(more: str) -> str:
    """A token of our key, with these claims as they stand there."""
    body = json.dumps(claims()).removesuffix("}")
    head = f"{encoded({'alg': 'RS256', 'typ': 'JWT'})}.{b64(f'{body}, {more}}}')}"
    signature = KEY.sign(head.encode(), padding.PKCS1v15(), hashes.SHA256())
    return f"{head}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


BAD: dict[str, Callable[[], str]] = {
    "expired": lambda: signed(exp=time.time() - 60),
    "without expiry": lambda: signed(exp=None),
    "whose expiry is infinite": lambda: signed_text('"exp": 1e999'),
    "that is valid from infinity on": lambda: signed_text('"exp": 9e9, "nbf": 1e999'),
    "whose head is deep": lambda: f"{b64('[' * 5000)}.{encoded(claims())}.AAAA",
    "whose projects are deep": lambda: signed_text(f'"hostler_projects": {"[" * 50_000}'),
    "not valid yet": lambda: signed(nbf=time.time() + 60),
    "for another audience": lambda: signed(aud="somebody else"),
    "without audience": lambda: signed(aud=None),
    "from another issuer": lambda: signed(iss="https://evil.example/"),
    "without subject": lambda: signed(sub=None),
    "without role": lambda: signed(hostler_role=None),
    "with a role we do not have": lambda: signed(hostler_role="king"),
    "whose projects are one string": lambda: signed(hostler_projects="p1"),
    "whose projects are null": lambda: jwt.encode(
        {**claims(), "hostler_projects": None}, KEY, algorithm="RS256"
    ),
    "signed by another key": lambda: signed(OTHER_KEY),
    "not signed": lambda: unsigned("none"),
    "not signed, spelled otherwise": lambda: unsigned("NoNe"),
    "signed with HS256 and the public key": signed_with_the_public_key,
    "altered": lambda: signed().rsplit(".", 2)[0] + "." + encoded(claims()) + ".AAAA",
    "not a token": lambda: "abc",
    "empty": lambda: "",
}


@pytest.mark.parametrize("what", BAD)
async def test_no_token_that_is_bad_in_one_way_gets_in(what: str) -> None:
    bad = BAD[what]()
    with pytest.raises(errors.Unauthenticated) as caught:
        await jwt_verifier(key=public_pem(KEY)).verify(bad)
    assert not bad or bad not in caught.value.detail


# --- a key set


class Provider:
    """An identity provider that serves its key set."""

    def __init__(self) -> None:
        self.keys: dict[str, rsa.RSAPrivateKey] = {}
        self.fetched = 0
        self.status = 200
        self.content_type = "application/json"
        self.url = ""

    async def serve(self, _: web.Request) -> web.Response:
        """The key set."""
        self.fetched += 1
        keys = [
            {**json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key())), "kid": kid}
            for kid, key in self.keys.items()
        ]
        text = json.dumps({"keys": keys})
        return web.Response(text=text, status=self.status, content_type=self.content_type)


@pytest_asyncio.fixture
async def provider() -> AsyncIterator[Provider]:
    made = Provider()
    made.keys["one"] = KEY
    app = web.Application()
    app.router.add_get("/realms/cloud/certs", made.serve)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}/realms/cloud/certs"
    yield made
    await runner.cleanup()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """How far the verifier's clock is ahead, to be moved by the test."""
    ahead = {"seconds": 0.0}
    real = time.monotonic

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return real() + ahead["seconds"]

    monkeypatch.setattr(auth, "time", Clock)
    return ahead


@pytest.mark.parametrize("content_type", ["application/json", "application/jwk-set+json"])
async def test_a_key_is_found_in_the_providers_set_which_is_fetched_once(
    provider: Provider, content_type: str
) -> None:
    provider.content_type = content_type
    verifier = jwt_verifier(jwks_url=provider.url)
    for _ in range(3):
        assert (await verifier.verify(signed(kid="one"))).name == "billing"
    assert provider.fetched == 1


async def test_a_rotated_key_is_found_and_a_withdrawn_one_refused(
    provider: Provider, clock: dict[str, float]
) -> None:
    verifier = jwt_verifier(jwks_url=provider.url)
    await verifier.verify(signed(kid="one"))
    provider.keys = {"two": OTHER_KEY}
    clock["seconds"] = 11.0
    assert (await verifier.verify(signed(OTHER_KEY, kid="two"))).name == "billing"
    with pytest.raises(errors.Unauthenticated):
        await verifier.verify(signed(kid="one"))


async def test_made_up_key_ids_do_not_make_us_flood_the_provider(provider: Provider) -> None:
    verifier = jwt_verifier(jwks_url=provider.url)
    for number in range(20):
        with pytest.raises(errors.Unauthenticated):
            await verifier.verify(signed(OTHER_KEY, kid=f"made-up-{number}"))
    with pytest.raises(errors.Unauthenticated):
        await verifier.verify(signed())  # no key id at all
    assert provider.fetched == 1


async def test_while_the_provider_fails_known_keys_serve_on(
    provider: Provider, clock: dict[str, float]
) -> None:
    verifier = jwt_verifier(jwks_url=provider.url)
    await verifier.verify(signed(kid="one"))
    provider.status = 500
    clock["seconds"] = auth.JWKS_SECONDS + 1
    assert (await verifier.verify(signed(kid="one"))).name == "billing"


@pytest.mark.parametrize("status", [401, 404, 500])
async def test_without_keys_the_failure_is_ours_and_not_the_callers(
    provider: Provider, status: int
) -> None:
    provider.status = status
    with pytest.raises(errors.Unavailable) as caught:
        await jwt_verifier(jwks_url=provider.url).verify(signed(kid="one"))
    assert (caught.value.status, caught.value.code) == (503, "auth.keys_unavailable")


# --- what the settings ask for


class Example(settings.Settings):
    service: ClassVar[str] = "example"


@pytest.mark.parametrize(
    ("chosen", "kind"),
    [
        ({"auth_mode": "none"}, auth.NoVerifier),
        ({"auth_mode": "token", "auth_tokens_file": "tokens"}, auth.TokenFile),
        (
            {
                "auth_mode": "jwt",
                "jwt_issuer": "i",
                "jwt_audience": "a",
                "jwt_key_file": "key.pem",
            },
            auth.JwtVerifier,
        ),
    ],
)
def test_the_mode_chooses_the_verifier(
    tmp_path: Path, chosen: dict[str, Any], kind: type[auth.Verifier]
) -> None:
    (tmp_path / "tokens").write_text(line())
    (tmp_path / "key.pem").write_text(public_pem(KEY))
    files = {k: tmp_path / v for k, v in chosen.items() if k.endswith("_file")}
    options = {"amqp_url": "amqp://x/", "database_url": "postgresql://x/", **chosen, **files}
    assert isinstance(auth.verifier(settings.load(Example, **options)), kind)
    if kind is not auth.NoVerifier:
        for file in files.values():
            file.unlink()
        with pytest.raises(settings.SettingsError, match="cannot be read"):
            auth.verifier(settings.load(Example, **options))
