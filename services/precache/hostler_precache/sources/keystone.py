"""Keystone v3, as much of it as a service needs: a token that is always good, and where other services are.

One `POST /v3/auth/tokens`, with an application credential or a user's password, gives the token and
the catalogue (keystone/api/auth.py; https://docs.openstack.org/api-ref/identity/v3/). A token is
renewed before it expires, and at once when a service has refused it. Agents never see any of this:
only the seed talks to the cloud.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

import aiohttp
from pydantic import AwareDatetime, BaseModel, ConfigDict, SecretStr, ValidationError

from hostler_precache.sources.source import SourceError

Interface = Literal["public", "internal", "admin"]

_TIMEOUT: Final = aiohttp.ClientTimeout(total=30)
MAX_RENEW_BEFORE: Final = timedelta(minutes=5)
"""How long before its end a token is not used any more: a request that begins with it must be
answered by services whose clocks are not ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplicationCredential:
    """An application credential: it is bound to its project, and can be revoked alone."""

    credential_id: str
    secret: SecretStr

    def request(self) -> dict[str, Any]:
        """The `auth` of the request."""
        credential = {"id": self.credential_id, "secret": self.secret.get_secret_value()}
        return {
            "identity": {
                "methods": ["application_credential"],
                "application_credential": credential,
            }
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Password:
    """A user with a password, in a project."""

    username: str
    password: SecretStr
    project: str
    user_domain: str = "Default"
    project_domain: str = "Default"

    def request(self) -> dict[str, Any]:
        """The `auth` of the request."""
        user = {
            "name": self.username,
            "domain": {"name": self.user_domain},
            "password": self.password.get_secret_value(),
        }
        return {
            "identity": {"methods": ["password"], "password": {"user": user}},
            "scope": {"project": {"name": self.project, "domain": {"name": self.project_domain}}},
        }


class _Endpoint(BaseModel):
    model_config = ConfigDict(extra="ignore")

    interface: str
    url: str
    region_id: str | None = None
    region: str | None = None


class _Service(BaseModel):
    model_config = ConfigDict(extra="ignore")

    type: str
    endpoints: list[_Endpoint] = []


class _Token(BaseModel):
    model_config = ConfigDict(extra="ignore")

    expires_at: AwareDatetime
    catalog: list[_Service] = []


class _Answer(BaseModel):
    model_config = ConfigDict(extra="ignore")

    token: _Token


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A token with its end and the catalogue that came with it."""

    value: SecretStr
    use_until: datetime
    services: Sequence[_Service] = field(repr=False)


class Keystone:
    """The service's account at a Keystone. However many ask at once, one request is made."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        credential: ApplicationCredential | Password,
        *,
        region: str | None = None,
        interface: Interface = "public",
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """The account at `url`, with or without `/v3`; endpoints are those of the region and interface."""
        self._session = session
        self._url = url.rstrip("/").removesuffix("/v3") + "/v3/auth/tokens"
        self._credential = credential
        self._region = region
        self._interface = interface
        self._now = now
        self._token: Token | None = None
        self._lock = asyncio.Lock()

    async def token(self) -> Token:
        """A token that will be good for a while.

        Raises:
            SourceError: Keystone refuses the credential, does not answer, or not as it should.
        """
        async with self._lock:
            if self._token is None or self._now() >= self._token.use_until:
                self._token = await self._ask()
            return self._token

    def refused(self, token: Token) -> None:
        """A service did not take the token: the next one is another."""
        if self._token is token:
            self._token = None

    async def endpoint(self, service_type: str) -> str:
        """Where the service is, by the catalogue, without a slash at its end.

        Raises:
            SourceError: as for `token`, or the catalogue names no such service.
        """
        token = await self.token()
        found: dict[str, None] = {}
        for service in token.services:
            if service.type != service_type:
                continue
            for endpoint in service.endpoints:
                region = endpoint.region_id or endpoint.region
                if endpoint.interface == self._interface and self._region in (None, region):
                    found[endpoint.url.rstrip("/")] = None
        if len(found) == 1:
            return next(iter(found))
        where = f"{service_type!r} with interface {self._interface!r}"
        if self._region is not None:
            where += f" in region {self._region!r}"
        if found:
            raise SourceError(
                "source.endpoint_ambiguous",
                f"Keystone's catalogue has {len(found)} endpoints of {where}: set keystone_region",
            )
        known = sorted({service.type for service in token.services})
        raise SourceError(
            "source.no_endpoint",
            f"Keystone's catalogue has no {where}; it has services {', '.join(known) or 'none'}",
        )

    async def _ask(self) -> Token:
        body = {"auth": self._credential.request()}
        try:
            async with self._session.post(
                self._url, json=body, timeout=_TIMEOUT, allow_redirects=False
            ) as response:
                if response.status != 201:
                    raise _refused(response.status)
                value = response.headers.get("X-Subject-Token")
                answer = _Answer.model_validate_json(await response.read()).token
        except ValidationError as exc:
            raise SourceError("source.malformed", "Keystone's answer holds no token") from exc
        except (aiohttp.InvalidURL, UnicodeError) as exc:
            raise SourceError("source.invalid", "keystone_url is no URL") from exc
        except (aiohttp.ClientError, TimeoutError) as exc:
            raise SourceError(
                "source.unreachable",
                f"Keystone cannot be reached: {type(exc).__name__}",
                is_transient=True,
            ) from exc
        if not value:
            raise SourceError("source.malformed", "Keystone's answer holds no token")
        # half of a token's life, where that is short: a token is used at least once
        margin = min(MAX_RENEW_BEFORE, max(timedelta(), answer.expires_at - self._now()) / 2)
        return Token(
            value=SecretStr(value),
            use_until=answer.expires_at - margin,
            services=answer.catalog,
        )


def _refused(status: int) -> SourceError:
    if status in (401, 403):
        return SourceError(
            "source.unauthenticated",
            f"Keystone answered {status}: the credential is wrong, expired or revoked",
        )
    if status == 404:  # its answer for an application credential that is gone, as for another path
        return SourceError(
            "source.unauthenticated",
            "Keystone answered 404: there is no such credential, or keystone_url is not Keystone's",
        )
    return SourceError(
        "source.refused",
        f"Keystone answered {status}",
        is_transient=status >= 500 or status == 429,
    )
