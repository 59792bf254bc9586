"""Who calls, and whether they may. Default deny: a route without a `require` or `public` stops the service at start.

Three modes: ``token`` (a file of hashed tokens), ``jwt`` (signed by the operator's identity provider) and ``none``
(everybody is admin; only on loopback, or when said twice). A token comes as a bearer token, as the password of Basic
(feed readers), or in the cookie that ``/login`` sets; with the cookie, only same-origin requests may change anything.
"""

import asyncio
import base64
import binascii
import hashlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Protocol

import jwt
from fastapi import Depends, Request

from hostler_common import client, errors, logs
from hostler_common.settings import Settings, SettingsError

log = logs.get(__name__)

COOKIE = "hostler_token"
HOST_AGENT = "agent@"
"""How the name of an agent's token begins that is good for one host: `agent@<host>`."""
JWKS_SECONDS = 300.0
JWKS_TIMEOUT_SECONDS = 5.0
_LAST_SECOND = 253_402_300_799  # of the calendar


class Role(StrEnum):
    """What a caller is. A role may do what the roles in its row of `_INCLUDES` may."""

    READER = "reader"
    AGENT = "agent"
    OPERATOR = "operator"
    ADMIN = "admin"


_INCLUDES: dict[Role, frozenset[Role]] = {
    Role.READER: frozenset({Role.READER}),
    Role.AGENT: frozenset({Role.AGENT}),
    Role.OPERATOR: frozenset({Role.READER, Role.AGENT, Role.OPERATOR}),
    Role.ADMIN: frozenset(Role),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """An authenticated caller. ``projects`` is what it may see; None is everything.

    ``expires_at`` is when the token that was shown ends by itself; None where it does not.
    """

    name: str
    role: Role
    projects: frozenset[str] | None = None
    expires_at: datetime | None = field(default=None, compare=False)

    @property
    def host(self) -> str | None:
        """The one host that the caller speaks for; None for whoever may speak for any."""
        if self.role is not Role.AGENT or not self.name.startswith(HOST_AGENT):
            return None
        return self.name.removeprefix(HOST_AGENT)

    def speak_for(self, host: str) -> None:
        """Return if the caller may say or be told what is this host's.

        Raises:
            OtherHost: its token is another host's.
        """
        if self.host not in (None, host):
            raise OtherHost(f"{self.name} speaks for its own host only, not for {host}")

    def has(self, role: Role) -> bool:
        """Whether the caller may do what ``role`` may."""
        return role in _INCLUDES[self.role]


class OtherHost(errors.Forbidden):
    """The token is bound to a host, and this is about another one."""

    code = "auth.other_host"


class KeysUnavailable(errors.Unavailable):
    """The identity provider's key set cannot be fetched, and none was fetched before."""

    code = "auth.keys_unavailable"


class Verifier(Protocol):
    """Turns a token into a principal."""

    async def verify(self, token: str) -> Principal:
        """The token's principal.

        Raises:
            Unauthenticated: the token is not valid.
        """

    def named(self, name: str) -> Sequence[Principal] | None:
        """Who may call by that name now; None where that is not known until a token is shown."""


class NoVerifier:
    """Everybody is admin."""

    async def verify(self, token: str) -> Principal:
        """The one principal there is, whatever the token."""
        del token
        return Principal(name="anybody", role=Role.ADMIN)

    def named(self, name: str) -> Sequence[Principal] | None:
        """Not known: everybody is."""
        del name
        return None


class TokenFile:
    """Tokens by their sha256, from a file of lines ``name:role:project|*:sha256``."""

    def __init__(self, principals: dict[bytes, Principal]) -> None:
        self._principals = principals

    @classmethod
    def read(cls, path: Path) -> "TokenFile":
        """The tokens of the file.

        Raises:
            SettingsError: it cannot be read, or a line of it is wrong; the line's number is named, not its text.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as exc:
            raise SettingsError(
                f"auth_tokens_file cannot be read: {path}: {exc.strerror}"
            ) from exc
        except UnicodeDecodeError as exc:
            raise SettingsError(f"auth_tokens_file is not a text in UTF-8: {path}") from exc
        principals = {}
        for number, line in enumerate(lines, start=1):
            if not line.strip() or line.startswith("#"):
                continue
            try:
                digest, principal = _parse_line(line)
            except ValueError as exc:
                raise SettingsError(
                    f"{path}, line {number}: expected name:role:project|*:sha256, with a role of"
                    f" {', '.join(Role)}"
                ) from exc
            principals[digest] = principal
        if not principals:
            raise SettingsError(f"{path} holds no token: nobody could call this service")
        return cls(principals)

    async def verify(self, token: str) -> Principal:
        """The principal of the line that has the token's sha256."""
        # how long the look takes depends on the hash, which nobody can choose: it tells nothing of any
        # token, and ten thousand hosts may have one each
        found = self._principals.get(hashlib.sha256(token.encode()).digest())
        if found is None:
            raise errors.Unauthenticated("the token is not known here")
        return found

    def named(self, name: str) -> Sequence[Principal]:
        """The principals of all lines of that name: a name may have several tokens."""
        return [found for found in self._principals.values() if found.name == name]


def _parse_line(line: str) -> tuple[bytes, Principal]:
    name, role, projects, digest = (part.strip() for part in line.split(":"))
    key = bytes.fromhex(digest)
    if len(key) != hashlib.sha256().digest_size or not name or not projects:
        raise ValueError("not a token's line")
    seen = None if projects == "*" else frozenset(part.strip() for part in projects.split(","))
    return key, Principal(name=name, role=Role(role), projects=seen)


def new_token(*, name: str, role: Role, projects: str = "*") -> tuple[str, str]:
    """A fresh token, and its line for the tokens file.

    Raises:
        ValueError: the line could not be read back: a name or project is empty or has a colon or a line break in it.
    """
    token = secrets.token_urlsafe(32)
    line = f"{name}:{role}:{projects}:{hashlib.sha256(token.encode()).hexdigest()}"
    if line.startswith("#") or line.splitlines() != [line]:
        raise ValueError("a name starts with no # and has no line break in it")
    _parse_line(line)
    return token, line


class JwtVerifier:
    """Signed tokens: ``sub``, ``hostler_role``, and ``hostler_projects`` (a list, or ``*``).

    A key set that cannot be fetched again goes on being used: a provider's outage locks nobody out.
    """

    def __init__(
        self,
        *,
        issuer: str,
        audience: str,
        algorithms: list[str],
        key: str | None = None,
        jwks_url: str | None = None,
    ) -> None:
        self._issuer = issuer
        self._audience = audience
        self._algorithms = algorithms
        self._key = key
        self._jwks_url = jwks_url
        self._jwks: jwt.PyJWKSet | None = None
        self._jwks_at = float("-inf")
        self._fetching = asyncio.Lock()

    async def verify(self, token: str) -> Principal:
        """The token's principal, if its signature, issuer, audience and expiry hold."""
        try:
            key: Any = self._key if self._key is not None else await self._signing_key(token)
            claims = jwt.decode(
                token,
                key,
                algorithms=self._algorithms,
                audience=self._audience,
                issuer=self._issuer,
                options={"require": ["exp", "sub", "iss", "aud"]},
            )
            return Principal(
                name=str(claims["sub"]),
                role=Role(str(claims.get("hostler_role"))),
                projects=_projects(claims.get("hostler_projects", [])),
                expires_at=datetime.fromtimestamp(min(int(claims["exp"]), _LAST_SECOND), UTC),
            )
        except (jwt.PyJWTError, ValueError, TypeError) as exc:
            raise errors.Unauthenticated(f"the token is not valid: {type(exc).__name__}") from exc

    def named(self, name: str) -> Sequence[Principal] | None:
        """Not known: the identity provider gives out the tokens."""
        del name
        return None

    async def _signing_key(self, token: str) -> jwt.PyJWK:
        kid = jwt.get_unverified_header(token).get("kid")
        async with self._fetching:
            keys = await self._key_set(max_age_seconds=JWKS_SECONDS)
            if all(key.key_id != kid for key in keys.keys):
                keys = await self._key_set(max_age_seconds=10.0)  # the provider may have a new key
        for key in keys.keys:
            if key.key_id == kid:
                return key
        raise jwt.InvalidKeyError("no such key")

    async def _key_set(self, *, max_age_seconds: float) -> jwt.PyJWKSet:
        if time.monotonic() - self._jwks_at > max_age_seconds:
            try:
                self._jwks = await self._fetch_keys()
            except (errors.HostlerError, jwt.PyJWTError) as exc:
                log.warning("jwks_not_fetched", reason=str(exc), known=self._jwks is not None)
                if self._jwks is None:
                    raise KeysUnavailable("the token's keys cannot be fetched") from exc
            self._jwks_at = time.monotonic()  # also after a failure: the keys we have serve on
        assert self._jwks is not None
        return self._jwks

    async def _fetch_keys(self) -> jwt.PyJWKSet:
        assert self._jwks_url is not None
        async with client.open_api(self._jwks_url, timeout_seconds=JWKS_TIMEOUT_SECONDS) as api:
            answer = await api.get("")
        if not isinstance(answer, dict):
            raise jwt.PyJWKSetError("the key set is no JSON object")
        return jwt.PyJWKSet.from_dict(answer)


def _projects(claim: object) -> frozenset[str] | None:
    if claim == "*":
        return None
    if not isinstance(claim, list):  # a string is iterable too: its letters are no projects
        raise TypeError("hostler_projects is neither a list nor *")
    return frozenset(str(project) for project in claim)


def verifier(settings: Settings) -> Verifier:
    """The verifier that the settings ask for.

    Raises:
        SettingsError: a file that it needs cannot be read or is wrong.
    """
    if settings.auth_mode == "none":
        return NoVerifier()
    if settings.auth_mode == "token":
        assert settings.auth_tokens_file is not None
        return TokenFile.read(settings.auth_tokens_file)
    assert settings.jwt_issuer is not None
    assert settings.jwt_audience is not None
    try:
        key = settings.jwt_key_file.read_text() if settings.jwt_key_file else None
    except OSError as exc:
        raise SettingsError(f"jwt_key_file cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise SettingsError("jwt_key_file is not PEM: it is no text at all") from exc
    return JwtVerifier(
        issuer=settings.jwt_issuer,
        audience=settings.jwt_audience,
        algorithms=settings.jwt_algorithms,
        key=key,
        jwks_url=settings.jwt_jwks_url,
    )


def token_of(authorization: str | None) -> str | None:
    """The token of an ``Authorization`` header: bearer, or the password of Basic."""
    scheme, _, value = (authorization or "").partition(" ")
    match scheme.lower():
        case "bearer":
            return value.strip() or None
        case "basic":
            try:
                return base64.b64decode(value, validate=True).decode().partition(":")[2] or None
            except (binascii.Error, UnicodeDecodeError):
                return None
        case _:
            return None


async def authenticate(request: Request) -> Principal:
    """The caller of a request.

    Raises:
        Unauthenticated: it has no token or a bad one.
        Forbidden: another site's page sent a change with the caller's cookie.
    """
    known: Verifier = request.app.state.verifier
    if isinstance(known, NoVerifier):
        return await known.verify("")
    token = token_of(request.headers.get("authorization"))
    if token is None:
        token = request.cookies.get(COOKIE)
        if token is not None and request.method not in ("GET", "HEAD"):
            _same_origin(request)
    if token is None:
        raise errors.Unauthenticated(
            "send a token: Authorization: Bearer ..., or sign in at /login"
        )
    return await known.verify(token)


def _same_origin(request: Request) -> None:
    site = request.headers.get("sec-fetch-site")
    origin = request.headers.get("origin", "")
    if site == "same-origin" or origin.partition("://")[2] == request.headers.get("host"):
        return
    raise errors.Forbidden("changes by cookie must come from this service's own pages")


class Require:
    """A dependency that lets a role through and gives its principal; see `require`."""

    def __init__(self, role: Role, *, every_project: bool) -> None:
        self.role = role
        self.every_project = every_project

    async def __call__(self, request: Request) -> Principal:
        """The caller, who has the role."""
        principal = await authenticate(request)
        if not principal.has(self.role):
            raise errors.Forbidden(
                f"this needs the role {self.role}; {principal.name} is {principal.role}"
            )
        if self.every_project and principal.projects is not None:
            raise errors.Forbidden(
                f"this belongs to no project, and {principal.name} may see its projects only"
            )
        request.state.principal = principal
        return principal


async def public() -> None:
    """A dependency that says: everybody may."""


def require(role: Role, *, every_project: bool = False) -> Any:  # noqa: ANN401  what fastapi.Depends returns
    """The dependency of a route, or of a router, that only ``role`` may use.

    With ``every_project``, only callers that are not limited to some projects: the thing belongs to none.
    """
    return Depends(Require(role, every_project=every_project))


async def _principal(request: Request) -> Principal:
    principal: Principal = request.state.principal
    return principal


Caller = Annotated[Principal, Depends(_principal)]
"""The principal that the route's `require` let through."""
