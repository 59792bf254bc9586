"""A service of the cloud, as the seed asks it: where it is, and the token that each request carries.

What differs is who gives the token: Keystone, Swift's own tempauth, or a setting. A token that is
refused is renewed and the request made once more; a redirect is never followed, since the token
would go wherever it points.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, Protocol

import aiohttp
from pydantic import SecretStr

from hostler_precache.sources.keystone import Keystone, Token
from hostler_precache.sources.source import SourceError

_TIMEOUT: Final = aiohttp.ClientTimeout(total=30)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What opens a service: its address, without a slash at the end, and a token, where it wants one."""

    url: str
    token: SecretStr | None

    def headers(self) -> dict[str, str]:
        """What a request carries."""
        return {"X-Auth-Token": self.token.get_secret_value()} if self.token else {}


class Authority(Protocol):
    """Gives grants for one service."""

    async def grant(self) -> Grant:
        """A grant that is good, as far as is known.

        Raises:
            SourceError: there is none to be had.
        """

    def refused(self, grant: Grant) -> bool:
        """The service did not take the grant; whether another one can be had."""


class Fixed:
    """An address and a token from settings. Nobody renews that token."""

    def __init__(self, url: str, token: SecretStr | None) -> None:
        self._grant = Grant(url=_root(url), token=token)

    async def grant(self) -> Grant:
        """See `Authority.grant`."""
        return self._grant

    def refused(self, grant: Grant) -> bool:
        """See `Authority.refused`."""
        del grant  # there is one only
        return False


class ByKeystone:
    """Keystone's token; the address is from its catalogue, unless a setting names it."""

    def __init__(self, keystone: Keystone, service_type: str, url: str | None = None) -> None:
        self._keystone = keystone
        self._service_type = service_type
        self._url = url
        self._last: tuple[Grant, Token] | None = None

    async def grant(self) -> Grant:
        """See `Authority.grant`."""
        url = self._url or await self._keystone.endpoint(self._service_type)
        token = await self._keystone.token()
        grant = Grant(url=_root(url), token=token.value)
        self._last = (grant, token)
        return grant

    def refused(self, grant: Grant) -> bool:
        """See `Authority.refused`."""
        if self._last is not None and self._last[0] == grant:
            self._keystone.refused(self._last[1])
        return True


class TempAuth:
    """Swift's own v1 authentication: one GET gives the account's address and a token."""

    def __init__(
        self, session: aiohttp.ClientSession, url: str, *, user: str, key: SecretStr
    ) -> None:
        self._session = session
        self._url = url
        self._user = user
        self._key = key
        self._grant: Grant | None = None

    async def grant(self) -> Grant:
        """See `Authority.grant`."""
        if self._grant is None:
            self._grant = await self._ask()
        return self._grant

    def refused(self, grant: Grant) -> bool:
        """See `Authority.refused`."""
        if self._grant == grant:
            self._grant = None
        return True

    async def _ask(self) -> Grant:
        headers = {"X-Auth-User": self._user, "X-Auth-Key": self._key.get_secret_value()}
        try:
            async with self._session.get(
                self._url, headers=headers, timeout=_TIMEOUT, allow_redirects=False
            ) as response:
                if response.status not in (200, 204):
                    raise SourceError(
                        "source.unauthenticated"
                        if response.status in (401, 403)
                        else "source.refused",
                        f"Swift's authentication answered {response.status}",
                        is_transient=response.status >= 500,
                    )
                url = response.headers.get("X-Storage-Url")
                token = response.headers.get("X-Auth-Token")
        except (aiohttp.InvalidURL, UnicodeError) as exc:
            raise SourceError("source.invalid", "swift_auth_url is no URL") from exc
        except (aiohttp.ClientError, TimeoutError) as exc:
            raise SourceError(
                "source.unreachable",
                f"Swift's authentication cannot be reached: {type(exc).__name__}",
                is_transient=True,
            ) from exc
        if not url or not token:
            raise SourceError("source.malformed", "Swift's authentication gave no account")
        return Grant(url=url.rstrip("/"), token=SecretStr(token))


def _root(url: str) -> str:
    # some catalogues name Glance with its version, most without
    return url.rstrip("/").removesuffix("/v2")


class Service:
    """A service of the cloud that is asked over HTTP; `name` is how errors call it."""

    def __init__(self, name: str, session: aiohttp.ClientSession, authority: Authority) -> None:
        self.name = name
        self._session = session
        self._authority = authority

    @asynccontextmanager
    async def get(
        self,
        path: str,
        *,
        params: Sequence[tuple[str, str]] = (),
        headers: Mapping[str, str] | None = None,
        timeout: aiohttp.ClientTimeout = aiohttp.ClientTimeout(total=60),  # noqa: ASYNC109, B008  aiohttp's own kind
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer to a GET of the path below the service's address, whatever its status but 3xx.

        Raises:
            SourceError: no token is to be had, the service cannot be reached, or sends elsewhere.
        """
        grant = await self._authority.grant()
        for is_last in (False, True):
            async with self._ask(grant, path, params, headers or {}, timeout) as response:
                if is_last or response.status != 401 or not self._authority.refused(grant):
                    yield response
                    return
            grant = await self._authority.grant()

    @asynccontextmanager
    async def _ask(
        self,
        grant: Grant,
        path: str,
        params: Sequence[tuple[str, str]],
        headers: Mapping[str, str],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109  aiohttp's own kind
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        try:
            response = await self._session.get(
                f"{grant.url}/{path}",
                params=params,
                headers={**headers, **grant.headers()},
                timeout=timeout,
                allow_redirects=False,
            )
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError, UnicodeError) as exc:
            raise SourceError("source.invalid", f"the address of {self.name} is no URL") from exc
        except (aiohttp.ClientError, TimeoutError) as exc:
            raise SourceError(
                "source.unreachable",
                f"{self.name} cannot be reached: {type(exc).__name__}",
                is_transient=True,
            ) from exc
        async with response:
            if response.status in (301, 302, 303, 307, 308):
                raise SourceError(
                    "source.redirected",
                    f"{self.name} answered {response.status} and points elsewhere:"
                    " the token is not sent there; set its address",
                )
            yield response
